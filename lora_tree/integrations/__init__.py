"""Thin layers between a tree and the libraries that people train and serve with.

    hub/, diffusers/, vllm/    a room for each, whose public names are imported from the room itself
    transformers.py, trl.py    the trainers; trainers/ has their parts
    flat_cache/                the folder of flattened adapters that vllm/ serves from
    trackers.py                reports of a run, for tensorboard and wandb

None of these is imported before its user asks for it.
"""
