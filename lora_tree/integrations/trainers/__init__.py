"""The parts of `TreeTrainer`, some of which the trainers for trl use too.

    rows        row_paths.py, held_rows.py: the path of every row; rows that judge and do not train
    steps       path_losses.py, finite_steps.py, step_notes.py: what a step is measured by
    evaluation  path_evaluation.py, node_stopping.py: a loss for each path, and nodes that stop
    files       checkpoints.py, sharded_state.py
    arguments   arguments.py: refused before anything starts

The trainers are `integrations/transformers.py` and `integrations/trl.py`.
"""

from ...extras import need

# Most files of this room import transformers. Here, before any of them, a missing package gets the
# message with the extra that brings it.
for _needed in ("transformers", "accelerate"):
    need(_needed, extra="train", what="TreeTrainer")
