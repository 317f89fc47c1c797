"""Flatten three adapters of rank r to one: QR cores against PEFT's SVD of the dense sum.

Both errors are printed.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import lora_tree as lt

from .common import Case, Result, interleaved
from .setting import name_in_peft
from .sizes import FULL, Size

__all__ = ["run"]

MODULE = "layer"
LINEAGE = ("a", "a/b", "a/b/c")


@torch.no_grad()
def run(size: Size = FULL) -> list[Result]:
    """Flatten adapters of one square weight."""
    draw = torch.Generator().manual_seed(0)
    tree = lt.AdapterTree()
    for path in LINEAGE:
        A = torch.randn(size.r, size.hidden, generator=draw)
        B = torch.randn(size.hidden, size.r, generator=draw)
        tree.add(path, adapter=lt.Adapter({MODULE: lt.LowRank(A, B)}))
    names = [name_in_peft(path) for path in LINEAGE]
    bare = nn.Sequential()
    bare.add_module(MODULE, nn.Linear(size.hidden, size.hidden, bias=False))
    wrapped = peft.PeftModel(
        bare, peft.LoraConfig(r=size.r, lora_alpha=size.r, target_modules=[MODULE]), names[0]
    )
    with tempfile.TemporaryDirectory() as folder:
        tree.save(Path(folder) / "tree")
        wrapped.delete_adapter(names[0])
        for path, name in zip(LINEAGE, names, strict=True):
            wrapped.load_adapter(Path(folder) / "tree" / path, adapter_name=name)

    def theirs() -> None:
        wrapped.add_weighted_adapter(
            names, [1.0] * 3, "flat", combination_type="svd", svd_rank=size.r
        )

    def forget() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns if the active adapter is deleted
            if "flat" in wrapped.peft_config:
                wrapped.delete_adapter("flat")

    cases = {
        "ours": Case(lambda: tree.flatten(LINEAGE[-1], size.r)),
        "PEFT, svd": Case(theirs, forget),
    }
    title = f"flatten 3 × r{size.r} to r{size.r} at {size.hidden}²"
    result = Result(title, interleaved(cases, max(2, size.repeats // 2)))
    result.aim(
        "PEFT / ours", result.timings["PEFT, svd"].ms / result.timings["ours"].ms, at_least=200.0
    )
    exact = tree.flatten(LINEAGE[-1]).modules[MODULE].dense(dtype=torch.float64)
    ours = tree.flatten(LINEAGE[-1], size.r).modules[MODULE].dense(dtype=torch.float64)
    layer = wrapped.base_model.model.get_submodule(MODULE)
    delta = layer.get_delta_weight("flat").double()
    result.facts["relative error, ours"] = _error(ours, exact)
    result.facts["relative error, PEFT"] = _error(delta, exact)
    result.aim("error, ours / PEFT", _error(ours, exact) / _error(delta, exact), at_most=1.0001)
    return [result]


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())
