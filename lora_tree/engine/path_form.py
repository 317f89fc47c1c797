"""Add up a path's frozen terms where their factors lie: two launches a site, and no stack.

    an adapter's buffer on the device  ──addresses──▶ table of the plan  ─┐
    the path: one row that holds all inputs  ───────▶ lists              ─┼─▶ shrink ─▶ expand
    output and input of the site  ────────────────────────────────────────┘

The kernels are those of routed batches. So the memory into which the cache copied an adapter is the
memory that a forward reads: nothing is copied after the transfer, and a path takes no memory beside
its adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from .batch import Batch
from .factor_tables import PlanTables
from .kernels import routes
from .owed import Owed
from .segmented import NARROW, SegmentedForm, route_dtype
from .side import Draft

__all__ = ["OneRowForm", "one_row", "read_in_place"]


class OneRowForm(SegmentedForm):
    """The kernels of a routed batch, for a batch of one row that holds all inputs."""

    def covers(self, out: Tensor, x: Tensor) -> bool:
        """Return whether the kernels add up for such an output and input.

        The base may have been moved or cast since, and a forward may run on fake tensors, which
        have no memory.
        """
        device = self.owed.device
        if type(out) is not Tensor or type(x) is not Tensor or not x.numel():
            return False
        if out.device != device or x.device != device:
            return False
        if out.dtype not in NARROW or x.dtype not in NARROW:
            return False
        return route_dtype(self.owed.dtype, x) in NARROW


def one_row(coefficients: Sequence[float]) -> Batch:
    """Return the batch of one row that owes this much to each of some nodes."""
    nodes = tuple([str(i) for i in range(len(coefficients))])
    return Batch(nodes, (tuple(coefficients),), (0,))


def read_in_place(drafts: Iterable[Draft], tables: PlanTables) -> None:
    """Let kernels read the frozen factors of side paths where they cover them.

    Args:
        drafts: side paths of one plan; each whose factors the kernels read gets its form.
        tables: of the plan.
    """
    found: dict[torch.device, list[Draft]] = {}
    for draft in drafts:
        biased = any(value.bias is not None for value in draft.frozen)
        if draft.frozen and not biased and routes(draft.device):
            found.setdefault(draft.device, []).append(draft)
    for device, mine in found.items():
        tables.lay_out({draft.site.name: draft.frozen for draft in mine}, device)
        for draft in mine:
            count = len(draft.frozen)
            batch = tables.once(("one row", count), partial(one_row, [1.0] * count))
            owed = Owed(
                draft.site,
                draft.frozen,
                batch,
                draft.dtype,
                device,
                tables=tables,
                trains=False,
            )
            if OneRowForm.suits(owed, 1):
                draft.reads_by(OneRowForm(owed))
