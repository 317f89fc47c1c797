"""Kernels in Triton's interpreter, which runs them on a CPU with numpy.

The interpreter spends half of its time on two things that these tests don't need, so they are
switched off:

- It computes each sum and product of integers a second time in 64 bits, to notice an overflow. The
  weights of tests are far too small for one.
- At each call of one kernel's function from another it replaces the functions of `triton.language`
  again, which the launch has replaced already.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_tree as lt

__all__ = ["interpreted"]

SOURCES = Path(lt.__file__).parent / "engine/kernels"

SHARED = ("direct", "expand", "merge", "shrink", "slots", "tiles", "undo_kernel", "undo_numbers")
"""Modules of the kernels that others take functions from."""


def interpreted(name: str) -> Iterator[Any]:
    """Yield a kernel's module, loaded once more for the interpreter: Triton reads the variable when
    it decorates a function.
    """
    with pytest.MonkeyPatch.context() as patch:
        # The functions that it takes from these modules are decorated again, too. Other tests keep
        # the modules for the compiler.
        shared = [f"lora_tree.engine.kernels.{module}" for module in SHARED]
        for module in shared:
            importlib.import_module(module)
        for module in shared:
            patch.delitem(sys.modules, module)
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location(
            f"lora_tree.engine.kernels._{name}", SOURCES / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, loaded)
        spec.loader.exec_module(loaded)
        _make_faster(patch)
        yield loaded


def _make_faster(patch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    unchecked = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch.setattr(builder, "options", unchecked)
    patch.setattr(interpreter, "_patch_lang", _PatchOnce(interpreter._patch_lang))


class _PatchOnce:
    """Replace the functions of `triton.language` at a launch, and not again until it ends.

    Args:
        replace: the interpreter's own function. It returns an object whose ``restore`` undoes it.
    """

    def __init__(self, replace: Any) -> None:
        self._replace = replace
        self._open: Any = None

    def __call__(self, function: Any) -> _PatchOnce:
        # The launch comes first, and is the only caller that calls `restore`.
        if self._open is None:
            self._open = self._replace(function)
        return self

    def restore(self) -> None:
        replaced, self._open = self._open, None
        replaced.restore()
