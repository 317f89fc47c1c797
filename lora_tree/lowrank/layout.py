"""Layout: the form of an increment's matrix in a weight: plain, transposed, kernel, per expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import SpecError, suggest
from ..given import unchecked

__all__ = ["EMBEDDING", "LINEAR", "PARAMETER", "Layout"]

LAYOUT_KINDS = ("linear", "embedding", "conv", "parameter")


@dataclass(frozen=True)
class Layout:
    """The place of the (out, in) matrix of a `LowRank` in the weight that it changes.

    Args:
        kind: ``linear`` (the matrix, or its transpose in a Conv1D), ``embedding`` (the transpose),
            ``conv`` (a kernel: ``in`` counts channels × kernel positions, the batch counts groups)
            or ``parameter`` (the batch counts experts).
        kernel: the kernel's size, for ``conv`` only.

    Raises:
        SpecError: the kind is unknown, or the kernel is missing, superfluous or not a tuple of
            positive integers.

    >>> str(Layout("conv", (3, 3)))
    'conv 3×3'
    """

    kind: Literal["linear", "embedding", "conv", "parameter"]
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        kind, kernel = unchecked(self.kind), unchecked(self.kernel)
        if kind not in LAYOUT_KINDS:
            hint = suggest(str(kind), LAYOUT_KINDS)
            raise SpecError(
                f"a layout's kind is one of {', '.join(LAYOUT_KINDS)}, got {kind!r:.80}{hint}"
            )
        # `type(size) is int`, because isinstance accepts True. An empty tuple passes here; whether
        # it is right depends on the kind.
        is_sizes = isinstance(kernel, tuple) and all(
            type(size) is int and size > 0 for size in kernel
        )
        needs_kernel = kind == "conv"
        if not is_sizes or bool(kernel) != needs_kernel:
            expected = "a tuple of whole numbers, (3, 3)" if needs_kernel else "none"
            raise SpecError(f"a {kind}'s kernel: got {kernel!r:.80}, expected {expected}")

    def __str__(self) -> str:
        sizes = "×".join(map(str, self.kernel))
        return f"{self.kind} {sizes}" if sizes else self.kind


LINEAR, EMBEDDING, PARAMETER = Layout("linear"), Layout("embedding"), Layout("parameter")
