"""Find the tensors of an adapter that hold NaN or an infinity, and refuse them by their names.

    reading a file      looks at no number, for a request has to be quick
    a verb, `flatten`   refuses a node that is not finite: its result would be NaN everywhere
    a save              refuses what it adds: `folder/examine.py`
    a base              refuses what it would hold: `engine/finite.py`

Law: an adapter that passes costs one pass over its numbers, and a large buffer is one call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .adapter import Adapter
from .errors import SpecError, listing, plural
from .lowrank import LowRank, all_finite, spans

__all__ = ["BrokenTensor", "broken_tensors", "listed_broken", "refuse_broken"]

BrokenTensor = tuple[str, str]
"""(module, its tensor as PEFT names it), or (tensor of the base, ``"override"``)."""

_ADVICE = "train it again, or put back an earlier version of it: lora-tree log, lora-tree restore"


def broken_tensors(adapter: Adapter) -> list[BrokenTensor]:
    """Return the tensors that hold NaN or an infinity; those on the meta device hold no numbers.

    >>> import torch
    >>> broken_tensors(Adapter({"q": LowRank(torch.ones(1, 2), torch.full((2, 1), torch.inf))}))
    [('q', 'lora_B')]
    """
    tensors = [tensor for _, tensor in adapter.named_tensors() if not tensor.is_meta]
    # One pass over the buffer into which they were read. The bytes between them may be anything, so
    # only a yes is an answer.
    if all_finite(spans(tensors)):
        return []
    broken: list[BrokenTensor] = []
    for module, value in adapter.modules.items():
        broken += [(module, name) for name, tensor in _parts(value) if not _is_fine(tensor)]
    for name, override in adapter.overrides.items():
        if not _is_fine(override.values):
            broken.append((name, "override"))
    return broken


def refuse_broken(node: str, adapter: Adapter) -> None:
    """Refuse an adapter that holds NaN or an infinity.

    Args:
        node: its node, or the name that its user gave it.
        adapter: as it was read.

    Raises:
        SpecError: it holds some; names the node, the module and the tensor.
    """
    broken = broken_tensors(adapter)
    if not broken:
        return
    module, name = broken[0]
    kind = {"override": "the override is", "lora_bias": "the bias is"}.get(name, "the factors are")
    more = f"; {plural(len(broken) - 1, 'other tensor')} as well" if len(broken) > 1 else ""
    raise SpecError(
        f"{node}: {module}: {kind} not finite: {name} holds NaN or an infinity{more}", _ADVICE
    )


def listed_broken(broken: Sequence[BrokenTensor]) -> str:
    """Return broken tensors as text.

    >>> listed_broken([("q", "lora_A"), ("q", "lora_B"), ("head.weight", "override")])
    'q (lora_A, lora_B), head.weight (override)'
    """
    of_each: dict[str, list[str]] = {}
    for module, name in broken:
        of_each.setdefault(module, []).append(name)
    return listing([f"{module} ({', '.join(names)})" for module, names in of_each.items()])


def _parts(value: LowRank) -> list[tuple[str, Tensor]]:
    parts = [("lora_A", value.A), ("lora_B", value.B)]
    if value.bias is not None:
        parts.append(("lora_bias", value.bias))
    return parts


def _is_fine(tensor: Tensor) -> bool:
    return tensor.is_meta or all_finite([tensor])
