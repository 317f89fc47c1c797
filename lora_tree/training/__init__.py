"""Training over one base: the nodes that train, their factors, and a step of an optimiser.

session.py      the nodes that train now: flags of the base, factors, optimisers that are followed
factors.py      node → its factors as parameters; node_factors.py: one node's
losses.py       the loss of rows on different paths; levels.py: training several levels at once
sampling.py     the order of rows
steps.py        a step of an optimiser, node by node
diverged.py     factors or losses that are no longer finite
sharded.py      tensors of which each rank holds a part
every_rank.py   a backward that reaches all factors on every rank
bare_base_watch.py   refuses a trainer that was given the bare base
"""
