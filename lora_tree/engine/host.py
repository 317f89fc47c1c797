"""The claim of one model on a base, and the wrappers around the base."""

from __future__ import annotations

import gc
import warnings
import weakref

from torch import nn

from ..assembly import Assembly
from ..callers import called_by
from ..errors import LoraTreeWarning, SpecError, StateError
from .unpromised import compiled_frames, guard_on_hooks, is_compiled

__all__ = [
    "Claim",
    "CompileWatch",
    "MergedWarning",
    "claim",
    "release_claim",
    "self_saving_modules",
    "unwrapped",
    "warn_on_save",
]


class MergedWarning(LoraTreeWarning):
    """A base is about to be saved with a path merged into it, or drifts by ``pristine="none"``."""


class CompileWatch:
    """The watch for a ``torch.compile`` wrapper around a base.

    The base has no reference to its wrapper, so every object that refers to the base is inspected.
    That takes a while, and is repeated only if torch has compiled something since.

    Args:
        compiled: the base was compiled before the tree was attached.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self._frames = 0

    def check(self, base: nn.Module, *, compiles_next: bool = False) -> None:
        """Refuse hooks on a base whose compiled forward would ignore them.

        Args:
            base: is about to get hooks.
            compiles_next: the hooks are for a ``torch.compile`` that comes after them.

        Raises:
            StateError: the base, or something around it, is compiled.
        """
        guard_on_hooks(wanted=compiles_next)
        frames = compiled_frames()
        is_base_compiled = self._compiled or is_compiled(base)
        if not is_base_compiled and (frames is None or frames != self._frames):
            for holder in gc.get_referrers(base):
                # The wrapper's `_modules`, by the name that torch gives to a wrapped module.
                if isinstance(holder, dict) and holder.get("_orig_mod") is base:
                    is_base_compiled = True
        if is_base_compiled:
            raise StateError(
                "the base is compiled, and a compiled forward ignores hooks that come later",
                'activate(…, mode="merged") works under torch.compile as it is',
                "or attach first, model.prepare(max_rank=…), and then torch.compile(base)",
            )
        self._frames = frames or 0


class Claim:
    """A model's claim on a base.

    It outlives the model, so that the next one knows whether it finds a bare base.

    Args:
        model: held weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.bare = True
        """Nothing of the model is in the base."""


# Weak keys: a base that is dropped takes its claim along.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Claim] = weakref.WeakKeyDictionary()


def claim(base: nn.Module, model: nn.Module) -> Claim:
    """Claim ``base`` for ``model``.

    Raises:
        StateError: another model has claimed it, or was dropped while a path was active.
    """
    earlier = _ATTACHED.get(base)
    if earlier is not None and earlier.model() is not None:
        raise StateError(
            "this base is attached already", "use that model, or call its detach() first"
        )
    if earlier is not None and not earlier.bare:
        raise StateError(
            "an earlier model of this base was dropped without detach(), while a path was active "
            "or prepared, and left that in the base",
            "load the base again; next time keep the model that attach returns, and detach() it",
        )
    _ATTACHED[base] = own_claim = Claim(model)
    return own_claim


def release_claim(base: nn.Module) -> None:
    """Drop the claim on ``base``."""
    _ATTACHED.pop(base, None)


def unwrapped(base: nn.Module) -> tuple[nn.Module, bool]:
    """Return the module inside torch.compile and DDP wrappers, and whether it was compiled.

    Raises:
        SpecError, StateError: not a module, or wrapped by PEFT or FSDP.
    """
    if not isinstance(base, nn.Module):
        raise SpecError(f"the base must be a torch.nn.Module, got {type(base).__name__}")
    compiled = False
    # Wrappers may be nested: DDP around a compiled module, or the other way round.
    while True:
        if isinstance(inner := base._modules.get("_orig_mod"), nn.Module):
            base, compiled = inner, True
        elif isinstance(base, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            base = base.module
        else:
            break
    # Wrappers of inner modules count as well: PEFT wraps layers, and a block may be compiled alone.
    for module in base.modules():
        name = f"{type(module).__module__}.{type(module).__name__}"
        if name.startswith("peft."):
            raise StateError(
                f"the base is wrapped by PEFT ({name})",
                "peft_model.unload() gives the base back; save its adapters first and add them to "
                "the tree",
            )
        if ".fsdp" in name.lower():
            raise StateError(f"the base is sharded ({name})", "attach the tree before sharding")
        compiled = compiled or is_compiled(module) or "_orig_mod" in module._modules
    return base, compiled


def self_saving_modules(base: nn.Module) -> list[nn.Module]:
    """Return the modules of a base whose own ``save_pretrained`` would write merged weights.

    That is the base itself, or each of the models of an assembly.
    """
    if isinstance(base, Assembly):
        return [part for part in base.children() if hasattr(part, "save_pretrained")]
    return [base] if hasattr(base, "save_pretrained") else []


def warn_on_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Warn if ``save_pretrained`` is about to write a base with a path merged into it.

    This is a ``state_dict`` pre-hook. A call of `state_dict` itself gets no warning, because
    checkpoints of a training use it.
    """
    if called_by("save_pretrained"):
        warnings.warn(
            "save_pretrained writes the base with a path merged into it; deactivate() first for "
            "the base's own weights, or tree.flatten(path).save(folder) for the path as an adapter",
            MergedWarning,
            stacklevel=2,
        )
