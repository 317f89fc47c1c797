"""Site: a module (or raw parameter) of the base that an adapter changes, and how to add a delta.

A kind of site is a class that defines

    claims          whether a module is of this kind
    layout          the layout of the deltas that it takes
    matrix_shape    the (*batch, out, in) that a LowRank must have here
    rows, sides_of  how to write W += left @ right into the stored weight
    down, up        the side path: an addition to the module's output, in two halves

and inherits the rest. Every other method has a default that is right for a plain (out, in) weight.

Law: a site keeps no state of a path. Only the engine knows which path is active.
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
from ..override import Override

__all__ = ["Site"]


class Site(ABC):
    """A weight of the base to which deltas are added.

    Args:
        name: its name in adapters: the module's dotted name, or the parameter's.
        module: the module that holds the weight.
        parent: the dotted name of the nearest module around it that has a forward.
    """

    layers: ClassVar[str] = ""
    """The layers of this kind, for the error that says which layers take a delta."""

    is_raw: ClassVar[bool] = False
    """True for a raw parameter, whose name is the parameter's, not its module's."""

    is_read_by_parent: ClassVar[bool] = False
    """True if the module around it reads its tensors and never calls it."""

    is_product: ClassVar[bool] = False
    """True if `down` and `up` are `F.linear` over the last axis; the engine then batches rows."""

    weight_name: str = "weight"
    bias_name: str = "bias"

    channels: ClassVar[int] = -1
    """The axis of an output's features; in the result of `down` it is the axis of the rank."""

    def __init__(self, name: str, module: nn.Module, parent: str) -> None:
        self.name = name
        self.module_name = name
        self.module = module
        self.parent = parent
        self._module_names: tuple[str, tuple[str, ...]] = ("", ())
        # `is_in` compares the weight's present shape with this one, because
        # `resize_token_embeddings` changes the shape but keeps the module.
        self.shape = self._shape_now()

    # ------------------------------------------------------------------ for each kind to define
    @staticmethod
    @abstractmethod
    def claims(module: nn.Module, holder: nn.Module | None) -> bool:
        """Return whether a module is of this kind; a kind further down in `KINDS` is asked first.

        Args:
            module: of the base.
            holder: the module that it is a child of; None for the base itself.
        """

    @staticmethod
    def is_linear(module: nn.Module) -> bool:
        """Return whether PEFT's ``all-linear`` means a module of this kind."""
        return False

    @staticmethod
    def in_own_layout(module: nn.Module, value: LowRank) -> LowRank:
        """Return the value in this kind's layout, if its file did not state one; else unchanged."""
        return value

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The layout of the deltas that it takes."""

    @property
    @abstractmethod
    def matrix_shape(self) -> tuple[int, ...]:
        """The (\\*batch, out, in) that a value must have to fit this weight."""

    @property
    def groups(self) -> int:
        """The number of groups that share the rank of a delta: one matrix of its batch for each."""
        return 1

    def rows(self, weight: Tensor) -> Tensor:
        """Return a view of the stored weight as (batch, rows, cols), the shape of left @ right."""
        return weight.reshape(1, *weight.shape)

    def sides_of(self, value: LowRank) -> tuple[Tensor, Tensor]:
        """Return left (batch, rows, r) and right (batch, r, cols): rows(ΔW) = scale · left @ right.

        Both are views of the factors, not copies: a plan keeps them as long as the adapter lives.
        """
        return _batched(value.B), _batched(value.A)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Return the first half of a side path, A x.

        Axis `channels` of the result is the rank, with the groups' ranks one after the other.
        """
        raise NotImplementedError(self.why_merged_only)

    def up(self, low: Tensor, B: Tensor) -> Tensor:
        """Return the second half: B times `down`'s result, in the shape of the module's output."""
        raise NotImplementedError(self.why_merged_only)

    def onto(self, out: Tensor, low: Tensor, B: Tensor, *, scale: float, spare: bool) -> Tensor:
        """Return ``out + scale · up(low, B)``.

        Args:
            out: the module's output.
            low: the result of `down`.
            B: the value's factor.
            scale: the value's scale times its coefficient.
            spare: whether ``out`` may be overwritten: no other code holds it, and autograd does not
                record this.
        """
        delta = self.up(low, B)
        if spare and out.dtype == torch.promote_types(out.dtype, delta.dtype):
            return out.add_(delta, alpha=scale)
        return torch.add(out, delta, alpha=scale)

    def token_axes(self, x: Tensor) -> Sequence[int] | None:
        """Return the sizes of the axes after the first that might be an input's rows, or None."""
        return x.shape[1:-1] if x.ndim > 1 else x.shape

    @property
    def has_new_output(self) -> bool:
        """Return whether the module's output is always new memory, so that it may be added to in
        place.
        """
        return False

    @property
    def reader_names(self) -> tuple[str, ...]:
        """The dotted names of the modules that may read the weight directly; none if the weight is
        used only in the site's own forward.
        """
        return ()

    @property
    def why_merged_only(self) -> str | None:
        """The reason why a side path can't be right here; None if it can."""
        return None

    @property
    def why_no_rows(self) -> str | None:
        """The reason why single rows of the weight can't be replaced; None if they can."""
        return f"{type(self.module).__name__} is no embedding, and no output layer"

    def with_rows(
        self, out: Tensor, x: Tensor, rows: Tensor, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return the output that the module would have with some rows of its weight replaced.

        Args:
            out: its output with its own weight.
            x: its input.
            rows: (rows,) int64, the indices of the replaced rows.
            values: (rows, dim), the replacements, in the weight's dtype.
            bias: the bias of the whole module, or None.
        """
        raise NotImplementedError(self.why_no_rows)

    def why_unmerged_only(self, value: LowRank) -> str | None:
        """Return why this delta can't be written into the weight; None if it can."""
        reason = self.why_not_written(self.weight_name)
        if reason:
            return reason
        if value.bias is not None and self.bias is None:
            return "the adapter adds a bias (lora_bias) and the layer has none to add it to"
        return None

    def why_not_written(self, attribute: str) -> str | None:
        """Return why nothing can be written into one of the module's tensors; None if it can."""
        tensor = _tensor(self.module, attribute)
        kind = type(self.module).__name__
        if tensor is None:
            return f"{kind} holds no plain {attribute} (quantised)"
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"{kind} holds a {attribute} of {dtype} (quantised)"
        # A subclass (DTensor, a quantised tensor) may store its numbers elsewhere, so that a write
        # in place would miss them.
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its {attribute} is a {type(tensor).__name__}, not a plain tensor"
        return None

    # ------------------------------------------------------------------ inherited
    @property
    def weight(self) -> Tensor | None:
        """The stored weight, of any class; None if the module has none by that name."""
        # Nearly always a parameter; the fast path matters, because every switch asks every site.
        found = self.module._parameters.get(self.weight_name)
        if found is not None:
            return found
        return _tensor(self.module, self.weight_name)

    @property
    def bias(self) -> Tensor | None:
        """The stored bias; None if the module has none."""
        return _tensor(self.module, self.bias_name)

    @property
    def dtype(self) -> torch.dtype | None:
        """The stored weight's dtype; None if it is not a parameter."""
        weight = self.module._parameters.get(self.weight_name)
        return None if weight is None else weight.dtype

    def accepts(self, layout: Layout) -> bool:
        """Return whether a delta of this layout belongs here."""
        return layout == self.layout

    def along_channels(self, numbers: Tensor, ndim: int) -> Tensor:
        """Return (features,) or (rows, features) in a shape that broadcasts over ``ndim`` axes."""
        *rows, features = numbers.shape
        after = -1 - self.channels
        between = ndim - len(rows) - 1 - after
        return numbers.reshape(*rows, *[1] * between, features, *[1] * after)

    def is_in(self, base: nn.Module) -> bool:
        """Return whether the base still has this module under this name, with this shape.

        Other code may have replaced or resized it since. For all sites of a plan, `Ways` checks the
        same in one pass.
        """
        holder: nn.Module | None = base
        name, module_names = self._module_names
        if name != self.module_name:
            module_names = tuple(self.module_name.split("."))
            self._module_names = self.module_name, module_names
        for part in module_names:
            if holder is None:
                return False
            holder = holder._modules.get(part)
        return holder is self.module and self._shape_now() == self.shape

    def _shape_now(self) -> tuple[int, ...] | None:
        # `_parameters` instead of getattr, which is slow on modules: every switch asks every site.
        weight = self.module._parameters.get(self.weight_name)
        return None if weight is None or is_lazy(weight) else weight.shape

    # ------------------------------------------------------------------ checks
    def check(self, value: LowRank) -> None:
        """Check that ``value`` fits, in any mode.

        Raises:
            BaseMismatch: wrong layout or shape, or a weight that nothing can be added to
                (parametrised, meta, offloaded).
        """
        self._check_plain()
        self.check_shape(value)

    def check_shape(self, value: LowRank) -> None:
        """Check the layout and the shape of ``value``; the weight may be on the meta device.

        Raises:
            BaseMismatch: the layout or the shape is wrong.
        """
        # Check the layout first: if it is wrong, an error about sizes would mislead.
        if not self.accepts(value.layout):
            raise BaseMismatch(
                f"{self.name}: the adapter holds {_article(str(value.layout))} delta, the base has "
                f"{_article(type(self.module).__name__)} there"
            )
        expected = self.matrix_shape
        if value.shape != expected:
            *batch, out, into = expected
            A, B = (*batch, value.rank, into), (*batch, out, value.rank)
            raise BaseMismatch(
                f"{self.name}: A is {tuple(value.A.shape)} and B {tuple(value.B.shape)}, "
                f"this base needs {A} and {B}"
            )

    def check_override(self, attribute: str, override: Override) -> None:
        """Check that an override can replace one of the module's tensors, in any mode.

        Raises:
            BaseMismatch: the module has no such tensor, or one of another shape, or one that can't
                be replaced (parametrised, meta, offloaded, quantised).
        """
        # The shape is checked by a method of its own, which also works on the meta device.
        self.check_override_shape(attribute, override)
        self._check_plain(attribute)
        reason = self.why_not_written(attribute)
        if reason:
            raise BaseMismatch(
                f"{self._named(attribute)}: can't be replaced: {reason}",
                "leave the module out of modules_to_save, or load the base in bf16, fp16 or fp32",
            )

    def check_override_shape(self, attribute: str, override: Override) -> None:
        """Check the shape of an override; the tensor may be on the meta device.

        Raises:
            BaseMismatch: the module has no such tensor, or one of another shape.
        """
        name, own = self._named(attribute), _tensor(self.module, attribute)
        if own is None:
            raise BaseMismatch(
                f"{name}: the adapter replaces this tensor, and the base's "
                f"{type(self.module).__name__} has none such"
            )
        given = tuple(override.values.shape)
        if override.rows is None:
            if given != tuple(own.shape):
                raise BaseMismatch(
                    f"{name}: the adapter replaces it by one of {given}, the base has "
                    f"{tuple(own.shape)}",
                    *_of_other_size(given, tuple(own.shape)),
                )
            return
        if max(override.rows) >= own.shape[0] or given[1:] != tuple(own.shape[1:]):
            raise BaseMismatch(
                f"{name}: the adapter replaces rows up to {max(override.rows)}, each of "
                f"{given[1:]}, and the base has {own.shape[0]}, each of {tuple(own.shape[1:])}",
                *_of_other_size((max(override.rows) + 1, *given[1:]), tuple(own.shape)),
            )
        if self.why_no_rows is not None:
            raise BaseMismatch(f"{name}: rows of it can't be replaced: {self.why_no_rows}")

    def _named(self, attribute: str) -> str:
        return f"{self.module_name}.{attribute}" if self.module_name else attribute

    def check_mode(self, value: LowRank, *, merged: bool, node: str) -> None:
        """Check that ``value``, from ``node``, can be applied in a mode.

        Raises:
            UnmergedOnly, MergedOnly: it can't; the error has the reason and names the other mode.
        """
        where = f"{node}: {self.name}"
        if merged:
            reason = self.why_unmerged_only(value)
            if reason:
                todo = ['use activate(…, mode="unmerged")']
                if self.why_not_written(self.weight_name):
                    todo += [
                        "for merged weights, add the path to the base's unquantised checkpoint: "
                        "lora-tree export zoo/ PATH --as model --base FOLDER --out DIR",
                        "or attach to the base loaded in full (bitsandbytes: base.dequantize())",
                    ]
                raise UnmergedOnly(f"{where}: can't be merged: {reason}", *todo)
        elif self.why_merged_only:
            raise MergedOnly(
                f"{where}: can't run unmerged: {self.why_merged_only}",
                'use activate(…, mode="merged")',
            )

    def _check_plain(self, name: str | None = None) -> None:
        """Check that a delta can be added to the weight, or to another tensor.

        Raises:
            BaseMismatch: it can't; the error has the reason.
        """
        module, name = self.module, name or self.weight_name
        if _is_computed(module, name):
            raise BaseMismatch(
                f"{self.name}: its {name} is computed from other parameters "
                "(weight norm or another parametrisation)",
                "remove the parametrisation from the base first: "
                "torch.nn.utils.parametrize.remove_parametrizations",
            )
        if _is_offloaded(module):
            raise BaseMismatch(
                f"{self.name}: its weight is offloaded", "load the base without offloading"
            )
        weight = _tensor(module, name)
        if weight is None:
            return
        if weight.is_meta:
            raise BaseMismatch(
                f"{self.name}: its weight is on the meta device", "load the base's weights first"
            )
        # torch refuses to write to such a tensor outside of inference_mode, and does not count its
        # versions.
        if weight.is_inference():
            raise BaseMismatch(
                f"{self.name}: its weight was made under inference_mode",
                "load the base outside of it",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's tensor of that name; parameters first, since getattr is slow on modules."""
    found = module._parameters.get(name)
    if found is None:
        found = getattr(module, name, None)
    return found if isinstance(found, Tensor) else None


def _is_computed(module: nn.Module, name: str) -> bool:
    """Return whether a weight is recomputed in every forward, so that a write to it is lost."""
    # torch.nn.utils.parametrize adds a child module ``parametrizations``; the older weight_norm and
    # pruning add a parameter ``…_g`` or ``…_orig``.
    parametrised = name in (module._modules.get("parametrizations") or ())  # type: ignore[operator]
    older = f"{name}_g" in module._parameters or f"{name}_orig" in module._parameters
    return parametrised or older


def _is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate keeps the module's weights elsewhere between forwards."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return False
    hooks = (hook, *getattr(hook, "hooks", ()))  # one hook, or a sequence of them
    return any(getattr(each, "offload", False) for each in hooks)


def _of_other_size(given: tuple[int, ...], own: tuple[int, ...]) -> tuple[str, ...]:
    """Return the advice for an override whose size differs from the base's tensor."""
    if len(given) != len(own) or given[1:] != own[1:] or not given:
        return ("attach the tree to the base that the adapter was trained on",)
    return (
        f"an embedding or its head of another vocabulary: base.resize_token_embeddings({given[0]}) "
        "before attach",
        f"a classifier of other labels: load the base with num_labels={given[0]}",
    )


def _batched(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 3 else factor.reshape(1, *factor.shape)


def _article(word: str) -> str:
    return f"an {word}" if word[0].lower() in "aeiou" else f"a {word}"
