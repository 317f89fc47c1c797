"""A view of a base: a second set of modules over the same parameters and buffers.

    base                 view                     one nn.Module for each of the base's
    ├── model            ├── model                  hooks, flags (training, checkpointing): its own
    │   └── q_proj  W    │   └── q_proj  W          parameters, buffers, config: the base's own
    └── lm_head     V    └── lm_head     V

Side paths are hooks on modules. On the base's own modules one request runs at a time, and a module
that is called alone has a path only while that path is active. The hooks of a view are permanent,
whichever of its modules is called, and in whatever order with other views. So a checkpointed layer
that runs again in backward finds the side path that it ran with first.

Law: a view without side paths computes what its base computes, and takes no memory of its size.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import StateError
from .hook import Hook
from .packing import forbid_packing

__all__ = ["gate", "viewed"]

_OURS = __name__.partition(".")[0]
"""The name of this package. Hooks that are its functions belong to the base's own paths, and are
not copied into a view.
"""

_HOOKED = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks")

_DEPTH = 2
"""Modules at most this far below the root count as entrances: a head, a model without its head, a
tower.
"""


def viewed(base: nn.Module) -> nn.Module:
    """Return a view of a base: new modules over the same parameters and buffers.

    The base's hooks come along, except this package's own.

    Raises:
        StateError: a module can't be seen a second time; names it.
    """
    twins: dict[int, nn.Module] = {}
    for name, module in base.named_modules():
        _check(name, module)
        # Not `copy.copy`, which some modules answer with a state of their own.
        twins[id(module)] = object.__new__(type(module))
    for name, module in base.named_modules():
        twin = twins[id(module)]
        _fill(twin, module, twins)
        own_forward, twin_forward = vars(module).get("forward"), vars(twin).get("forward")
        # `_fill` has bound methods and partials to the twin. Any other callable may hold the base's
        # module where this code can't find it, and would run that module.
        if own_forward is not None and own_forward is twin_forward:
            raise StateError(
                f"{name or 'the base'}: its forward was replaced by a "
                f"{type(own_forward).__name__}, which runs the base's own module in every view",
                'use model.activate(path, mode="unmerged"), or ask for the path before the forward '
                "is replaced",
            )
    return twins[id(base)]


def gate(view: nn.Module, check: Callable[[], None]) -> None:
    """Call ``check`` whenever a forward of the view begins at its root or at a module near it."""

    def before(module: nn.Module, args: Any) -> None:
        check()

    for name, module in view.named_modules():
        if not name or name.count(".") < _DEPTH:
            module.register_forward_pre_hook(Hook(before))


def _check(name: str, module: nn.Module) -> None:
    kind = type(module)
    is_sharded = hasattr(module, "reshard") and hasattr(module, "set_requires_gradient_sync")
    is_compiled = kind.__module__.startswith("torch.jit")
    if is_sharded or is_compiled:
        how = "sharded" if is_sharded else "compiled"
        raise StateError(
            f"{name or 'the base'}: a {kind.__name__} is {how}, and can't be seen a second time",
            'use model.activate(path, mode="unmerged")',
        )


def _fill(twin: nn.Module, module: nn.Module, twins: Mapping[int, nn.Module]) -> None:
    """Give a twin the module's state: the same tensors, and modules and methods of the view."""
    held: dict[str, Any] = {}
    ours = _our_hooks(module)
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            # The same dictionary object, so that a parameter that `to` or a quantiser replaces in
            # the base is replaced here as well.
            held[name] = value
        elif name == "_modules":
            held[name] = {key: child and twins[id(child)] for key, child in value.items()}
        elif isinstance(value, OrderedDict) and name.startswith("_"):
            held[name] = OrderedDict((key, v) for key, v in value.items() if key not in ours)
        elif not _is_ours(value):
            held[name] = _seen_from(value, twins)
    vars(twin).update(held)
    # A view shares its weights with the base, and must not repack them for its own evaluation.
    forbid_packing(twin)


def _our_hooks(module: nn.Module) -> set[int]:
    """Return the numbers of the hooks that this package put on a module."""
    found = set()
    for kind in _HOOKED:
        for number, hook in vars(module).get(kind, {}).items():
            if _is_ours(hook):
                found.add(number)
    return found


def _is_ours(value: object) -> bool:
    """Return whether a hook, or a method set on an object, is a function of this package."""
    value = value.func if isinstance(value, functools.partial) else value
    # Not by `__module__`, which `functools.wraps` copies from the function that was wrapped.
    names: Mapping[str, Any] = getattr(getattr(value, "__func__", value), "__globals__", {})
    return str(names.get("__name__", "")).partition(".")[0] == _OURS


def _seen_from(value: Any, twins: Mapping[int, nn.Module]) -> Any:
    """Return an attribute's value for the view: references to modules of the base become references
    to their twins. A value that has none is returned unchanged.
    """
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = twins.get(id(value.__self__))
        return value if owner is None else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        args = [_seen_from(arg, twins) for arg in value.args]
        words = {key: _seen_from(arg, twins) for key, arg in value.keywords.items()}
        changed = any(a is not b for a, b in zip(args, value.args, strict=True))
        changed = changed or any(words[key] is not arg for key, arg in value.keywords.items())
        if not changed:
            return value
        made = functools.partial(value.func, *args, **words)
        vars(made).update({key: _seen_from(v, twins) for key, v in vars(value).items()})
        return made
    if type(value) in (list, tuple):
        items = [_seen_from(item, twins) for item in value]
        changed = any(a is not b for a, b in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    if type(value) is dict:
        pairs = {key: _seen_from(item, twins) for key, item in value.items()}
        return pairs if any(pairs[key] is not item for key, item in value.items()) else value
    return value
