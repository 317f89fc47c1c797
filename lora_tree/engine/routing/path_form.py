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

from ...lowrank import LowRank
from ...sites import Site
from ..kernels import routes
from ..rows.batch import Batch
from ..sidepaths.side import Draft, recorded
from .factor_tables import PlanTables
from .owed import Owed
from .segmented import NARROW, SegmentedForm

__all__ = ["OneRowForm", "one_row", "one_row_owed", "read_in_place"]


class OneRowForm(SegmentedForm):
    """The kernels of a routed batch, for a batch of one row that holds all inputs."""

    def added(self, out: Tensor, x: Tensor, *, spare: bool) -> Tensor | None:
        """Return ``out`` plus the sum; None if the kernels do not add up for such tensors.

        Args:
            out: the module's output.
            x: its input.
            spare: ``out`` may be written over.
        """
        # A forward may run on fake tensors, which have no memory.
        if type(out) is not Tensor or type(x) is not Tensor:
            return None
        size = self._size(out, x)
        known = self._known
        is_known = known is not None and known[0] == size
        if not (is_known or self._covers(out, x, size[0])):
            return None
        if recorded(out, x):
            return self._add(out, x)
        out, x = (out if spare else out.clone()).contiguous(), x.contiguous()
        self._launch(size, out, x)
        return out

    def _covers(self, out: Tensor, x: Tensor, compute: torch.dtype) -> bool:
        """Return whether the kernels add up for such an output and input: the base may have been
        moved or cast since.
        """
        device = self.owed.device
        if out.device != device or x.device != device or not x.numel():
            return False
        return out.dtype in NARROW and x.dtype in NARROW and compute in NARROW


def one_row(coefficients: Sequence[float]) -> Batch:
    """Return the batch of one row that owes this much to each of some nodes."""
    nodes = tuple([str(i) for i in range(len(coefficients))])
    return Batch(nodes, (tuple(coefficients),), (0,))


def one_row_owed(
    site: Site,
    values: Sequence[LowRank],
    dtype: torch.dtype,
    device: torch.device,
    tables: PlanTables,
    batch: Batch | None = None,
) -> Owed:
    """Return what one row owes at a site to frozen values, which are not laid out.

    Args:
        site: the site.
        values: in the order of the sum.
        dtype, device: as `Owed` takes them.
        tables: of the plan.
        batch: of one row; None: it owes each of the values once.
    """
    if batch is None:
        count = len(values)
        batch = tables.once(("one row", count), partial(one_row, [1.0] * count))
    return Owed(site, values, batch, dtype, device, tables=tables, trains=False)


def read_in_place(drafts: Iterable[Draft], tables: PlanTables) -> None:
    """Let kernels read the frozen factors of those side paths that they cover.

    Args:
        drafts: side paths of one plan; a draft whose factors the kernels cover gets its form.
        tables: of the plan.
    """
    by_device: dict[torch.device, list[Draft]] = {}
    for draft in drafts:
        biased = any(value.bias is not None for value in draft.frozen)
        if draft.frozen and not biased and routes(draft.device):
            by_device.setdefault(draft.device, []).append(draft)
    for device, on_device in by_device.items():
        tables.lay_out({draft.site.name: draft.frozen for draft in on_device}, device)
        for draft in on_device:
            owed = one_row_owed(draft.site, draft.frozen, draft.dtype, device, tables)
            if OneRowForm.suits(owed, 1):
                draft.reads_by(OneRowForm(owed))
