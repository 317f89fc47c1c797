"""Follow the rows of a batch through the functions that a forward calls.

A function that is known here leaves each token with its row, and its rule says on which axis the
rows are then. A tensor from any other function has no layout, and neither has one that such a
function wrote to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .row_layout import AXIS_ORDERS, RowLayout, axis_order

__all__ = ["followed", "function_name"]

Layouts = MutableMapping[Tensor, RowLayout]
Args: TypeAlias = Sequence[Any]
Kwargs: TypeAlias = Mapping[str, Any]
Made = Iterable[tuple[Tensor, RowLayout | None]]
Rule = Callable[[RowLayout, Args, Kwargs, Any], Made]
"""(layout of the first argument, args, kwargs, result) → the layouts of the tensors in the result.
"""


def function_name(func: Any) -> str:
    """Return the name of a function of torch; of an attribute, for the function that reads it.

    >>> function_name(torch.Tensor.matmul), function_name(torch.Tensor.mT.__get__)
    ('matmul', 'mT')
    """
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", name)
    return name


def followed(layouts: Layouts, func: Any, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Note the layouts of a function's results where they are known.

    Args:
        layouts: tensor → its layout.
        func: the function.
        args, kwargs: its arguments.
        out: what it returned.
    """
    name = function_name(func)
    made: Made = ()
    x = args[0] if args else None
    input_layout = layouts.get(x) if isinstance(x, Tensor) else None
    if is_pointwise(name):
        made = [(out, _of_operands(layouts, (*args, *kwargs.values()), out))]
    elif input_layout is not None and name in _RULES:
        made = _RULES[name](input_layout, args, kwargs, out)
    elif input_layout is None or not _writes(name):
        return
    else:
        made = [(args[0], None)]
    for tensor, layout in made:
        if layout is not None:
            layouts[tensor] = layout
        elif isinstance(tensor, Tensor):
            layouts.pop(tensor, None)


def _writes(name: str) -> bool:
    """Return whether a function writes to its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


# ---------------------------------------------------------------------- pointwise
@functools.cache
def is_pointwise(name: str) -> bool:
    """Return whether torch calls a function of this name pointwise: each number of the result
    depends only on the numbers at the same place in the operands.

    >>> is_pointwise("silu"), is_pointwise("__imul__"), is_pointwise("sort")
    (True, True, False)
    """
    plain = name.strip("_").replace("truediv", "div").replace("floordiv", "floor_divide")
    # Reflected and in-place operators: __rsub__, __iadd__.
    spelled = (plain, plain[1:]) if name.startswith(("__r", "__i")) else (plain,)
    for each in spelled:
        packet = getattr(torch.ops.aten, each, None) if each else None
        for overload in packet.overloads() if packet is not None else ():
            if torch.Tag.pointwise in getattr(packet, overload).tags:
                return True
    return False


def _of_operands(layouts: Layouts, operands: Args, out: Any) -> RowLayout | None:
    """Return the layout of a pointwise result: the layout shared by all operands that have one."""
    common = None
    for x in operands:
        layout = layouts.get(x) if isinstance(x, Tensor) else None
        if layout is None:
            continue
        kept_layout = _keep(layout, x, out)
        if kept_layout is None or (common is not None and not kept_layout.like(common)):
            return None
        common = kept_layout
    return common


def _keep(layout: RowLayout, x: Tensor, out: Any) -> RowLayout | None:
    """Return the layout of a result with the axes of ``x``; the last may have another length."""
    if not isinstance(out, Tensor) or out.shape[:-1] != x.shape[:-1] or out.ndim != x.ndim:
        return None
    if out.shape == x.shape:
        return layout
    return None if layout.place() == x.ndim - 1 else layout.with_last(out.shape[-1])


# ---------------------------------------------------------------------- one function each
def _kept(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    outs = out if isinstance(out, (tuple, list)) else (out,)
    return [(each, _keep(layout, args[0], each)) for each in outs if isinstance(each, Tensor)]


def _reshaped(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    is_cast = out.dtype != args[0].dtype  # view(dtype)
    return [(out, None if is_cast else layout.reshape(out.shape))]


def _reordered(name: str, layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    order = axis_order(name, args[0].ndim, [*args[1:], *kwargs.values()])
    return [(out, layout.permute(order))]


def _item(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    x, index = args
    if isinstance(index, (Tensor, slice)):
        return [(out, layout.take(index, x.device))]
    # Some features of every token, as in x[..., ::2].
    if isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis:
        return [(out, _keep(layout, x, out) if isinstance(index[1], slice) else None)]
    return [(out, None)]


def _selected(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    x, dim, index = args if len(args) == 3 else (args[0], kwargs["dim"], kwargs["index"])
    return [(out, None if dim % x.ndim else layout.take(index, x.device))]


def _repeated(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    times = list(args[1:]) or list(kwargs.values())
    if len(times) == 1 and isinstance(times[0], Sequence):
        times = list(times[0])
    return [(out, layout.repeat(times))]


def _repeated_each(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    given = dict(zip(("repeats", "dim"), args[1:], strict=False)) | dict(kwargs)
    times, dim = given["repeats"], given.get("dim")
    if not isinstance(times, int) or dim is None:
        return [(out, None)]
    return [(out, layout.repeat_each(times, dim))]


def _expanded(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    x = args[0]
    sizes = [1] * (out.ndim - x.ndim) + list(x.shape)
    times = [new if old == 1 else 1 for old, new in zip(sizes, out.shape, strict=True)]
    return [(out, layout.repeat(times))]


def _pieces(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    """Return the layouts of what `chunk` or `split` makes of the features, or of the tokens."""
    x = args[0]
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % x.ndim
    if dim == x.ndim - 1:
        return _along_last_axis(layout, args, kwargs, out)
    made: list[tuple[Tensor, RowLayout | None]] = []
    start = 0
    for piece in out:
        where = slice(start, start + piece.shape[dim])
        made.append((piece, None if dim else layout.take(where, x.device)))
        start += piece.shape[dim]
    return made


def _along_last_axis(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    """Return the layouts for a function that mixes numbers along the last axis only; nothing if
    that has the rows.
    """
    return [] if layout.place() == args[0].ndim - 1 else _kept(layout, args, kwargs, out)


def _normed(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    return _along_last_axis(layout, args, kwargs, out) if len(shape) == 1 else []


def _of_last_axis(at: int, default: int | None = -1) -> Rule:
    """Return the rule of a function that mixes numbers along the axis that it is given.

    Args:
        at: which argument is the axis.
        default: the axis if none is given; None: all of them.
    """

    def rule(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
        dim = kwargs.get("dim", args[at] if len(args) > at else default)
        if isinstance(dim, Sequence) and len(dim) == 1:
            (dim,) = dim
        if not isinstance(dim, int) or dim % args[0].ndim != args[0].ndim - 1:
            return []
        return _along_last_axis(layout, args, kwargs, out)

    return rule


def _times_matrix(layout: RowLayout, args: Args, kwargs: Kwargs, out: Any) -> Made:
    x, matrix = args[:2]
    # A matrix with more axes is a batch of matrices, and a product with a vector is a sum over
    # tokens or features: these have no rule.
    return _along_last_axis(layout, args, kwargs, out) if matrix.ndim == 2 and x.ndim > 1 else []


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"), _reshaped
    ),
    "__getitem__": _item,
    "index_select": _selected,
    "repeat": _repeated,
    "repeat_interleave": _repeated_each,
    **dict.fromkeys(("expand", "expand_as"), _expanded),
    **dict.fromkeys(("chunk", "split"), _pieces),
    **dict.fromkeys(
        ("to", "type_as", "float", "half", "bfloat16", "type", "contiguous", "detach"), _kept
    ),
    **dict.fromkeys(("dropout", "zeros_like", "empty_like"), _kept),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normed),
    **dict.fromkeys(("linear", "matmul", "__matmul__"), _times_matrix),
    "topk": _of_last_axis(2),
    **dict.fromkeys(("sort", "glu"), _of_last_axis(1)),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), _of_last_axis(1, None)),
    **dict.fromkeys(("mean", "sum", "amax", "max"), _of_last_axis(1, None)),
    **{name: functools.partial(_reordered, name) for name in AXIS_ORDERS},
}
