"""Give the base the behaviour of a path, a blend, or a batch of them.

    blend ─→ plan (site → terms) ─┬─→ merged:   switching/   written once into the weights
                                  └─→ unmerged: sidepaths/   added to what a module computes
    batch ─→ rows/ ───────────────────────────→ routing/     the same, for each row by its own path

`stage.py` composes a behaviour and installs it; `kernels/` does the arithmetic on CUDA.
"""
