"""Answers in which the library has no part: dense float64 sums, tiny nets, random adapters.

    W(path) = W0 + Σ weight · scale · B A    in float64, term by term, never through `LowRank`'s own
                                             algebra

Only a node's weight, its factors and the names of paths are taken from a tree. Coefficients,
lineages and products are worked out here, slowly, so that a mistake in the library can't hide in
what it is compared with.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import lora_tree as lt

M = TypeVar("M", bound=nn.Module)


# ---------------------------------------------------------------------- random adapters
def low_rank(
    out: int,
    into: int,
    r: int = 2,
    *,
    seed: int | torch.Generator = 0,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> lt.LowRank:
    """Draw B·A of shape (out, in) and rank r, A first.

    Args:
        seed: of a generator of its own, or a generator that goes on.
        more: what `LowRank` takes besides: scale, bias, layout.
    """
    draw = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    A = torch.randn(*batch, r, into, generator=draw, dtype=dtype)
    B = torch.randn(*batch, out, r, generator=draw, dtype=dtype)
    return lt.LowRank(A, B, **more)


def random_adapter(
    shapes: Mapping[str, tuple[int, int]],
    seed: int = 0,
    *,
    r: int = 2,
    scale: float = 1.0,
    **more: Any,
) -> lt.Adapter:
    """Draw an adapter for modules of these (out, in); another seed gives other numbers in the same
    shapes.

    Args:
        more: what `Adapter` takes besides: base, config.
    """
    draw = torch.Generator().manual_seed(seed)
    modules = {
        name: low_rank(out, into, r, seed=draw, scale=scale) for name, (out, into) in shapes.items()
    }
    return lt.Adapter(modules, **more)


def shapes_of(base: nn.Module, *ends: str) -> dict[str, tuple[int, int]]:
    """Return (out, in) of each linear module whose name ends so, in the order of the base."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ends)
    }


# ---------------------------------------------------------------------- tiny nets
NET = {"0": (6, 5), "2": (4, 6)}
"""(out, in) of the linear modules of `net`."""


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return two linear layers, 5 → 6 → 4, always with the same numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


# ---------------------------------------------------------------------- dense sums
def lineage(path: str) -> list[str]:
    """Return the nodes from the root down to a path, by its name alone."""
    names = path.split("/") if path else []
    return ["/".join(names[: i + 1]) for i in range(len(names))]


def coefficients(tree: lt.AdapterTree, blend: lt.Blend) -> dict[str, float]:
    """Return each node's coefficient: its own weight times the weights of the entries that pass
    through it.
    """
    entries = {blend: 1.0} if isinstance(blend, str) else blend
    found: dict[str, float] = {}
    for path, weight in entries.items():
        for node in lineage(path):
            found[node] = found.get(node, 0.0) + weight * tree[node].weight
    return found


def dense(value: lt.LowRank) -> Tensor:
    """Return ΔW of one value in float64, by a slow loop over its rank."""
    total = torch.zeros(value.shape, dtype=torch.float64)
    for k in range(value.rank):
        column = value.B[..., :, k : k + 1].detach().double()
        total += column * value.A[..., k : k + 1, :].detach().double()
    return total * value.scale


def terms(tree: lt.AdapterTree, blend: lt.Blend) -> Iterator[tuple[str, Tensor, lt.LowRank]]:
    """Yield (module, coefficient · ΔW in float64, the value that it came from) for all nodes of a
    blend.
    """
    for node, coefficient in coefficients(tree, blend).items():
        adapter = tree.adapter(node)
        assert adapter is not None, f"{node} has no adapter"
        for name, value in adapter.modules.items():
            yield name, coefficient * dense(value), value


def summed(
    tree: lt.AdapterTree, blend: lt.Blend, name: str
) -> tuple[Tensor | float, Tensor | float, int]:
    """Return ΔW and Σ|s||B||A| of one module in float64, and Σr: the value, and what its rounding
    errors scale with.

    An ancestor that two entries of a blend share is added once for each of them.
    """
    delta: Tensor | float = 0.0
    sizes: Tensor | float = 0.0
    rank = 0
    for path, share in ({blend: 1.0} if isinstance(blend, str) else dict(blend)).items():
        for node in lineage(path):
            adapter = tree.adapter(node)
            assert adapter is not None, f"{node} has no adapter"
            if name in adapter.modules:
                value = adapter.modules[name]
                A, B = value.A.detach().double(), value.B.detach().double()
                s = share * value.scale * tree[node].weight
                delta = delta + s * (B @ A)
                sizes = sizes + abs(s) * (B.abs() @ A.abs())
                rank += value.rank
    return delta, sizes, rank


def with_sum(base: M, tree: lt.AdapterTree, blend: lt.Blend) -> M:
    """Return a copy of a base in float64 with the dense sum of a blend in its weights.

    Embeddings have their weight as (vocab, dim), so the sum is added to them transposed.
    """
    made = copy.deepcopy(base).double()
    with torch.no_grad():
        for name, delta, value in terms(tree, blend):
            weight = made.get_submodule(name).get_parameter("weight")
            weight += delta.mT if value.layout.kind == "embedding" else delta
    return made


def net_by_hand(
    base: nn.Sequential,
    tree: lt.AdapterTree,
    x: Tensor,
    rows: Sequence[lt.Blend],
    factors: dict[tuple[str, str, str], Tensor],
) -> Tensor:
    """Return the net's output in float64, row by row; ``factors`` takes part in autograd."""
    outputs = []
    for row, blend in zip(x.double(), rows, strict=True):
        hidden = row
        for name in ("0", "2"):
            linear: Any = base.get_submodule(name)
            after = hidden @ linear.weight.double().mT + linear.bias.double()
            for node, c in coefficients(tree, blend).items():
                adapter = tree.adapter(node)
                assert adapter is not None
                value = adapter.modules[name]
                A, B = factors[node, name, "A"], factors[node, name, "B"]
                after = after + hidden @ A.mT @ B.mT * (c * value.scale)
                if value.bias is not None:
                    after = after + value.bias.double() * (c * value.scale)
            hidden = torch.tanh(after) if name == "0" else after
        outputs.append(hidden)
    return torch.stack(outputs)


def doubled(tree: lt.AdapterTree) -> dict[tuple[str, str, str], Tensor]:
    found = {}
    for node in tree.paths():
        adapter = tree.adapter(node)
        assert adapter is not None
        for name, value in adapter.modules.items():
            found[node, name, "A"] = value.A.detach().double().requires_grad_()
            found[node, name, "B"] = value.B.detach().double().requires_grad_()
    return found


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error if the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
