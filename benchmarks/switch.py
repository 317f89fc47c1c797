"""Merged switches: ours, PEFT's unmerge and merge, and the floor of stock operations.

floor = a copy of the touched weights from their pristine values + W.addmm_(B, A) of rank Σr over
them
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_tree as lt

from .common import Case, Result, cycle, interleaved
from .setting import COUSIN, SIBLING, START, base, name_in_peft, tree, with_peft
from .sizes import FULL, Size

__all__ = ["run"]

# (title, base, factors, scale, times faster than PEFT, times the floor)
SETTINGS: list[tuple[str, torch.dtype, torch.dtype, float, float | None, float]] = [
    ("bf16 base, bf16 factors, alpha = r", torch.bfloat16, torch.bfloat16, 1.0, 25.0, 1.2),
    ("fp32 base, fp32 factors, alpha = r", torch.float32, torch.float32, 1.0, 15.0, 1.2),
    ("bf16 base, fp32 factors, any scale", torch.bfloat16, torch.float32, 0.3, None, 2.2),
]


def run(size: Size = FULL) -> list[Result]:
    """Return one table for each of `SETTINGS`."""
    return [_one(size, *setting) for setting in SETTINGS]


@torch.no_grad()
def _one(
    size: Size,
    title: str,
    dtype: torch.dtype,
    factors: torch.dtype,
    scale: float,
    faster: float | None,
    over_floor: float,
) -> Result:
    model = base(size, dtype)
    adapters = tree(model, size, dtype=factors, scale=scale)
    with tempfile.TemporaryDirectory() as folder:
        theirs = with_peft(base(size, dtype), adapters, Path(folder) / "tree")
    copy, product = _floor(model, adapters)
    attached = lt.attach(adapters, model)
    ours = {
        "siblings": Case(lambda: attached.activate(SIBLING), lambda: attached.activate(START)),
        "cousins": Case(lambda: attached.activate(COUSIN), lambda: attached.activate(START)),
    }
    _merge_in_peft(theirs, adapters, START)
    cases = {
        **ours,
        "PEFT, siblings": Case(_peft_switch(theirs, adapters, SIBLING, START)),
        "PEFT, cousins": Case(_peft_switch(theirs, adapters, COUSIN, START)),
        "floor: copy": Case(copy),
        "floor: rank-Σr product in place": Case(product),
    }
    result = Result(f"merged switch; {size}, depth 3; {title}", interleaved(cases, size.repeats))
    times = result.timings
    times["floor"] = times["floor: copy"].plus(times["floor: rank-Σr product in place"])
    for kin in ("siblings", "cousins"):
        if faster is not None:
            result.aim(
                f"PEFT / ours, {kin}", times[f"PEFT, {kin}"].ms / times[kin].ms, at_least=faster
            )
        result.aim(f"ours / floor, {kin}", times[kin].ms / times["floor"].ms, at_most=over_floor)
    attached.detach()
    _add_logged(result, size, dtype, adapters)
    return result


def _add_logged(result: Result, size: Size, dtype: torch.dtype, adapters: lt.AdapterTree) -> None:
    """Add the same switch with an undo log instead of copies, and the memory that each takes."""
    attached = lt.attach(adapters, base(size, dtype), pristine="log")
    start = Case(lambda: attached.activate(SIBLING), lambda: attached.activate(START))
    result.timings |= interleaved({"siblings, undo log": start}, min(size.repeats, 3))
    times = result.timings
    result.facts["undo log / copies, time"] = times["siblings, undo log"].ms / times["siblings"].ms
    adapter = adapters.adapter(START)
    assert adapter is not None
    weights = [attached.base.get_parameter(f"{name}.weight") for name in adapter.modules]
    touched = sum(weight.nbytes for weight in weights)
    result.facts["undo log, % of the touched weights"] = 100 * attached.pristine.log_bytes / touched
    attached.detach()


def _peft_switch(wrapped: Any, adapters: lt.AdapterTree, *paths: str) -> Callable[[], None]:
    """Unmerge the merged lineage and merge the next one: the same work every time."""
    following = cycle(*paths)

    def switch() -> None:
        wrapped.base_model.unmerge_adapter()
        _merge_in_peft(wrapped, adapters, following())

    return switch


def _merge_in_peft(wrapped: Any, adapters: lt.AdapterTree, path: str) -> None:
    names = [name_in_peft(node) for node in adapters.lineage(path)]
    wrapped.base_model.set_adapter(names)
    wrapped.base_model.merge_adapter(adapter_names=names)


def _floor(model: Any, adapters: lt.AdapterTree) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the two stock operations over every touched weight, with factors in its dtype."""
    flat = adapters.flatten(START)
    sites: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for name, value in flat.modules.items():
        weight = model.get_submodule(name).weight
        value = value.folded().to(dtype=weight.dtype)
        sites.append((weight.detach().clone(), weight.detach().clone(), value.B, value.A))

    def copy() -> None:
        for weight, pristine, _, _ in sites:
            weight.copy_(pristine)

    def product() -> None:
        for weight, _, B, A in sites:
            weight.addmm_(B, A)

    return copy, product
