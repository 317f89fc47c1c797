"""Site: one module (or raw parameter) of the base that an adapter changes, and how it takes a delta.

A kind of site says three things, and inherits the rest:

    matrix shape    the (*batch, out, in) that a LowRank must have here            `expected`
    write           how W += left @ right lies in the stored weight                `rows`, `sides_of`
    side path       what is added to the module's output when nothing is written,  `down`, `up`
                    in two halves, with the rank in between

Law: a site never keeps state of a path. What is active where is the engine's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import BaseMismatch, MergedOnly, UnmergedOnly
from ..lowrank import Layout, LowRank

__all__ = ["Site", "in_dtype", "recorded", "wider_of"]


class Site(ABC):
    """A place where a delta goes.

    Args:
        name: as adapters name it: the module's dotted name, or the parameter's.
        module: the module that holds the weight.
        parent: the dotted name of the nearest module around it that runs a forward of its own.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, module: nn.Module, parent: str) -> None:
        self.name = name
        self.module_name = name
        self.module = module
        self.parent = parent
        self._way: tuple[str, tuple[str, ...]] = ("", ())
        self._shape = self._shape_now()

    weight_name: str = "weight"
    bias_name: str = "bias"
    channels: ClassVar[int] = -1
    """The axis of an output's features; between the two halves of a side path the rank lies there."""

    # ------------------------------------------------------------------ what a kind says
    @abstractmethod
    def expected(self, value: LowRank) -> tuple[int, ...]:
        """The (\\*batch, out, in) that ``value`` must have to fit this weight."""

    @abstractmethod
    def accepts(self, layout: Layout) -> bool:
        """Whether a delta of this layout belongs here."""

    def rows(self, weight: Tensor) -> Tensor:
        """A view of the stored weight as (batch, rows, cols), the shape that left @ right has."""
        return weight.reshape(1, *weight.shape)

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        """Left (batch, rows, r) and right (batch, r, cols), views of the factors: rows(ΔW) = scale · left @ right."""
        return _batched(value.B), _batched(value.A)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """The first half of a side path: A x, the rank (of every group, one after the other) on axis `channels`."""
        raise NotImplementedError(self.why_merged_only)

    def up(self, low: Tensor, B: Tensor) -> Tensor:
        """The second half: what B makes of `down`'s result, in the shape of the module's output."""
        raise NotImplementedError(self.why_merged_only)

    def onto(self, out: Tensor, low: Tensor, B: Tensor, *, scale: float, spare: bool) -> Tensor:
        """``out + scale · up(low, B)``; ``spare``: nobody else holds ``out``, it may be written over."""
        delta = self.up(low, B)
        if (
            spare
            and out.dtype == torch.promote_types(out.dtype, delta.dtype)
            and not recorded(out, delta)
        ):
            return out.add_(delta, alpha=scale)
        return torch.add(out, delta, alpha=scale)

    def token_axes(self, x: Tensor) -> Sequence[int] | None:
        """The axes of an input, beside the first, that might be its rows; None where none can be."""
        return x.shape[1:-1] if x.ndim > 1 else x.shape

    def along_channels(self, numbers: Tensor, ndim: int) -> Tensor:
        """(…, features) in the shape that broadcasts over an output of ``ndim`` axes, a row each where it is 2-D."""
        *rows, features = numbers.shape
        after = -1 - self.channels
        between = ndim - len(rows) - 1 - after
        return numbers.reshape(
            *rows, *(1 for _ in range(between)), features, *(1 for _ in range(after))
        )

    # ------------------------------------------------------------------ inherited
    @property
    def makes_its_output(self) -> bool:
        """Whether the module's output is known to be new memory, so that a side path may add to it in place."""
        return False

    @property
    def weight(self) -> Tensor | None:
        """The stored weight, whatever it is; None where the module has none by that name."""
        found = self.module._parameters.get(self.weight_name)
        return _tensor(self.module, self.weight_name) if found is None else found

    @property
    def bias(self) -> Tensor | None:
        return _tensor(self.module, self.bias_name)

    @property
    def why_merged_only(self) -> str | None:
        """Why a side path would never run here; None where it would."""
        return None

    def why_unmerged_only(self, value: LowRank) -> str | None:
        """Why this delta can't be written into the weight; None where it can."""
        weight = self.weight
        if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
            held = "no plain weight" if weight is None else f"a weight of {str(weight.dtype)[6:]}"
            return f"{type(self.module).__name__} holds {held} (quantised)"
        if type(weight) not in (Tensor, nn.Parameter):
            return f"its weight is a {type(weight).__name__}, not a plain tensor"
        if value.bias is not None and self.bias is None:
            return "the adapter adds a bias (lora_bias) and the layer has none to add it to"
        return None

    def is_in(self, base: nn.Module) -> bool:
        """Whether the base still has this very module under this name; it may have been replaced or resized since."""
        holder: nn.Module | None = base
        name, way = self._way
        if name != self.module_name:  # split once: this is asked of every site at every switch
            way = tuple(self.module_name.split("."))
            self._way = self.module_name, way
        for part in way:
            holder = holder._modules.get(part) if holder is not None else None
        return holder is self.module and self._shape_now() == self._shape

    def _shape_now(self) -> tuple[int, ...] | None:
        weight = self.module._parameters.get(
            self.weight_name
        )  # not getattr: this is asked of every site at every switch
        return None if weight is None or is_lazy(weight) else weight.shape

    @property
    def dtype(self) -> torch.dtype | None:
        """The stored weight's; None where it is no parameter."""
        weight = self.module._parameters.get(self.weight_name)
        return None if weight is None else weight.dtype

    def check(self, value: LowRank) -> None:
        """That ``value`` fits, whatever the mode.

        Raises:
            BaseMismatch: wrong kind or shape, or a weight that nothing can be added to (parametrised, meta, offloaded).
        """
        self._check_plain()
        self.check_shape(value)

    def check_shape(self, value: LowRank) -> None:
        """That ``value`` is of the right kind and shape, whatever is in the weight; the meta device will do.

        Raises:
            BaseMismatch: it is not.
        """
        if not self.accepts(value.layout):
            raise BaseMismatch(
                f"{self.name}: the adapter holds {_article(str(value.layout))} delta, the base has "
                f"{_article(type(self.module).__name__)} there"
            )
        expected = self.expected(value)
        if value.shape != expected:
            A, B = (
                (*expected[:-2], value.rank, expected[-1]),
                (*expected[:-2], expected[-2], value.rank),
            )
            raise BaseMismatch(
                f"{self.name}: A is {tuple(value.A.shape)} and B {tuple(value.B.shape)}, this base needs {A} and {B}"
            )

    def check_mode(self, value: LowRank, *, merged: bool, node: str) -> None:
        """That ``value``, which is ``node``'s, can be applied in the mode asked for.

        Raises:
            UnmergedOnly, MergedOnly: it can't; says why and which mode does.
        """
        where = f"{node}: {self.name}"
        if merged:
            reason = self.why_unmerged_only(value)
            if reason:
                raise UnmergedOnly(
                    f"{where}: can't be merged: {reason}", 'use activate(…, mode="unmerged")'
                )
        elif self.why_merged_only:
            raise MergedOnly(
                f"{where}: can't run unmerged: {self.why_merged_only}",
                'use activate(…, mode="merged")',
            )

    def _check_plain(self) -> None:
        module, name = self.module, self.weight_name
        parametrised = name in (module._modules.get("parametrizations") or ())  # type: ignore[operator]
        if (
            parametrised
            or f"{name}_g" in module._parameters
            or f"{name}_orig" in module._parameters
        ):
            raise BaseMismatch(
                f"{self.name}: its {name} is computed from other parameters (weight norm or another parametrisation)",
                "remove the parametrisation from the base first: torch.nn.utils.parametrize.remove_parametrizations",
            )
        hook = vars(module).get("_hf_hook")
        if hook is not None and any(
            getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ()))
        ):
            raise BaseMismatch(
                f"{self.name}: its weight is offloaded", "load the base without offloading"
            )
        weight = self.weight
        if weight is not None and weight.is_meta:
            raise BaseMismatch(
                f"{self.name}: its weight is on the meta device", "load the base's weights first"
            )
        if weight is not None and weight.is_inference():
            raise BaseMismatch(
                f"{self.name}: its weight was made under inference_mode",
                "load the base outside of it",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``. Where it is in that already nothing is called: side paths ask for every site."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def wider_of(x: torch.dtype, y: torch.dtype) -> torch.dtype:
    """The dtype that holds both."""
    return x if x == y else torch.promote_types(x, y)


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd is watching what is done to these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """A module's tensor of that name: asked of every site at every switch, and getattr is slow on modules."""
    found = module._parameters.get(name)
    if found is None:
        found = getattr(module, name, None)
    return found if isinstance(found, Tensor) else None


def _batched(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 3 else factor.reshape(1, *factor.shape)


def _article(word: str) -> str:
    return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"
