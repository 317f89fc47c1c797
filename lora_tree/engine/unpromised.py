"""Ask torch for names that may be missing: private ones, and ones younger than our oldest torch.

Every such name is looked up here and nowhere else, with a fallback: a slower way to the same
result, or an answer on the safe side. So a torch that drops or renames one costs time, not
correctness. The tests take each of them away (tests/test_versions.py).

    name                                           since  without it
    F.grouped_mm                                   2.10   batches are added up node by node
    _C._autograd._top_saved_tensors_default_hooks  2.8    every recorded side path walks the stack
                                                          to look for checkpointing
    ops.mkldnn._is_mkldnn_{bf16,fp16}_supported    2.0    narrow products on a CPU are widened
    ops.mkldnn._linear_pointwise                   2.0    fp32 products of a merge are MKL's
    _subclasses.fake_tensor                        2.0    a batch with as many tokens as rows is not
                                                          probed
    nn.modules.module._global_forward_hooks        1.8    no output is written to in place
    _dynamo.convert_frame.FRAME_COUNTER            2.0    a compiled wrapper is looked for at every
                                                          switch
    _dynamo.config.skip_nnmodule_hook_guards       2.0    a forward that was compiled for another
                                                          base of the same class passes hooks by
    nn.Module._compiled_call_impl                  2.2    base.compile() is not seen; the compiled
                                                          wrapper still is
    F.multi_head_attention_forward.__code__        1.8    nn.MultiheadAttention is merged only
    utils._pytree                                  1.8    nothing: training over FSDP2 takes outputs
                                                          apart with it
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree

__all__ = [
    "attention_body",
    "compiled_frames",
    "fake_tensors",
    "fp32_product",
    "global_hooks",
    "grouped_product",
    "guard_on_hooks",
    "is_compiled",
    "pytree",
    "saved_tensor_hook",
    "slow_on_cpu",
]

autograd: Any = torch._C._autograd

# Frames whose code `guard_on_hooks` has dropped: torch sets its own count back to 0 then.
_dropped_frames = 0


def grouped_product() -> Callable[..., Tensor] | None:
    """Return `torch.nn.functional.grouped_mm`; None if this torch has none."""
    found: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)
    return found


@functools.cache
def attention_body() -> Callable[..., Any] | None:
    """Return `F.multi_head_attention_forward` without its first step, which hands the whole call to
    an active `TorchFunctionMode`: so a mode sees the products in it. None if this torch has another
    body.
    """
    function = F.multi_head_attention_forward
    code = getattr(function, "__code__", None)
    if code is None or not {"has_torch_function", "linear"} <= set(code.co_names):
        return None
    own = {**vars(F), "has_torch_function": lambda tensors: False}
    return FunctionType(code, own, function.__name__, function.__defaults__, function.__closure__)


def saved_tensor_hook() -> Callable[[bool], object]:
    """Return torch's function that returns the hook for tensors that autograd saves now, or None.

    Called with False, it also finds hooks that tracing may ignore. If torch has no such function,
    the one returned never returns None. Every side path calls it, so it is torch's own, without a
    wrapper of ours.
    """
    found: Callable[[bool], object] = getattr(
        autograd, "_top_saved_tensors_default_hooks", lambda is_tracing: "unknown"
    )
    return found


def slow_on_cpu() -> frozenset[torch.dtype]:
    """Return the narrow dtypes for which torch does not report a fast product on this machine.

    Without AVX-512 or similar instructions torch multiplies them in a plain loop, which is far
    slower than widening to fp32 (bf16 on AVX2: docs/benchmarks.md).
    """
    op_names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    # Without mkldnn the ops below exist, but can't be called.
    if not getattr(torch._C, "_has_mkldnn", False):
        return frozenset(op_names)
    slow = set()
    for dtype, name in op_names.items():
        is_fast: Callable[[], bool] | None = getattr(torch.ops.mkldnn, name, None)
        if is_fast is None or not is_fast():
            slow.add(dtype)
    return frozenset(slow)


def fp32_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return oneDNN's product of fp32 matrices, x @ w.mT for (m, k) and (n, k); None without it.

    torch multiplies fp32 matrices with MKL, which uses half the vector width of AMD's processors.
    """
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if found is None:
        return None

    def product(x: Tensor, w: Tensor) -> Tensor:
        made: Tensor = found(x, w, None, "none", [], "")
        return made

    return product


def fake_tensors() -> tuple[Any, Any] | None:
    """Return (FakeTensorMode, FakeCopyMode), which run a module on shapes; None without them."""
    try:
        from torch._subclasses import fake_tensor
    except ImportError:
        return None
    modes = getattr(fake_tensor, "FakeTensorMode", None), getattr(fake_tensor, "FakeCopyMode", None)
    return None if None in modes else modes


def global_hooks() -> Collection[object]:
    """Return torch's own collection of the forward hooks that are set on all modules at once.

    If torch does not have it, the collection returned is never empty.
    """
    found: Collection[object] = getattr(nn_module, "_global_forward_hooks", ("unknown",))
    return found


def compiled_frames() -> int | None:
    """Return the number of frames that torch.compile has compiled in this process.

    None if torch does not say.
    """
    # Looked up and not imported: an import takes a second, and if nothing has imported it, nothing
    # was compiled.
    compiler: Any = sys.modules.get("torch._dynamo.convert_frame")
    if compiler is None:
        return 0
    count: int | None = getattr(compiler, "FRAME_COUNTER", None)
    return None if count is None else _dropped_frames + count


def guard_on_hooks(*, wanted: bool = False) -> None:
    """Make torch.compile guard on a module's hooks before it reuses code compiled for another one.

    By default it reuses a compiled forward for all modules of the same classes, whether or not
    these have hooks. Two bases of one architecture in one process are enough: the paths of the
    second would be ignored without an error. Code that was compiled before has no such guard, so it
    is dropped, and compiled again at its next call.

    Args:
        wanted: a base is about to be compiled, so the compiler is imported.
    """
    if wanted:
        importlib.import_module("torch._dynamo")
    # If nothing has imported it, nothing was compiled.
    config: Any = sys.modules.get("torch._dynamo.config")
    if config is None or not getattr(config, "skip_nnmodule_hook_guards", False):
        return
    config.skip_nnmodule_hook_guards = False
    # A torch that keeps settings for each thread uses the default in the others, which may compile
    # too.
    entry: Any = getattr(config, "_config", {}).get("skip_nnmodule_hook_guards")
    if entry is not None:
        entry.default = False
    frames = compiled_frames()
    if frames != 0:
        # A base may have been compiled since the last search for wrappers: the count that says so
        # has to go on from here.
        global _dropped_frames
        _dropped_frames = frames or 0
        torch._dynamo.reset()


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None
