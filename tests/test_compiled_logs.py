"""The kernel of undo logs compiles for a GPU, in every form in which it is launched, on any
machine.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from sampling import sampled

pytest.importorskip("triton", reason="Triton has no build for this platform")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_tree.engine.kernels import undo
from lora_tree.engine.kernels.log_part import WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

SHARED_BYTES = {90: (227 << 10) // 3 - 1024, 89: 99 << 10}
"""Compute capability → the shared memory that a program may have: on an H100 three are to share a
multiprocessor, and each takes 1 KiB more.
"""


def compiled(folder: Path, capability: int, **changes: Any) -> Any:
    """Compile the kernel for bf16 factors over a bf16 weight, but for some changes."""
    constants = {
        "WEIGHT": tl.bfloat16,
        "INTEGER": tl.int16,
        "COUNTER": tl.uint8,
        "FACTOR": tl.bfloat16,
        "TURNED": False,
        "WEIGHTS_ALIGNED": True,
        "FACTORS_ALIGNED": True,
        "PAIRS": True,
        "HAS_OLD": True,
        "HAS_NEW": True,
        "SLOTS": 3,
        "EVEN": True,
        "FULL": True,
        "PRECISION": "tf32x3",
        "WIDEN": False,
        "ROWS": 64,
        "COLUMNS": WIDTH,
        "RANKS": undo.RANKS,
        "TILES": undo.TILES,
        "STAGES": undo.STAGES,
        "POLICY": undo.POLICY,
        "FIELDS": undo.FIELDS,
        "SLOT_FIELDS": undo.SLOT_FIELDS,
        **changes,
    }
    types = {"table": "*i64", "flags": "*i32"}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    fixed: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(undo.rewrite_logged.params):
        name = parameter.name
        if name in constants:
            signature[name], fixed[i,] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32")
        if name in types:
            attributes[i,] = [["tt.divisibility", 16]]
    assert len(fixed) == len(constants)
    source = ASTSource(undo.rewrite_logged, signature, constexprs=fixed, attrs=attributes)
    options = {"num_warps": undo.WARPS, "maxnreg": undo.REGISTERS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


SINGLE = {"PAIRS": False, "WEIGHT": tl.float32, "INTEGER": tl.int32, "PRECISION": "ieee"}
WIDE = {"FACTOR": tl.float32, "ROWS": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests share: some compile the same kernel."""
    return tmp_path_factory.mktemp("triton")


CHANGES: list[dict[str, Any]] = [
    {},
    {"HAS_OLD": False},
    {"HAS_NEW": False},
    {"SLOTS": 0, "EVEN": False},
    {"SLOTS": 4, "EVEN": False, "FULL": False, "COUNTER": tl.int16},
    {"WEIGHT": tl.float16, "FACTOR": tl.float16, "TURNED": True},
    {**WIDE, "FULL": False},
    {**SINGLE, **WIDE},
    SINGLE,
    {"PAIRS": False, "FULL": False, "WEIGHTS_ALIGNED": False},
]

OLDER: list[dict[str, Any]] = [{}, {**WIDE, "FULL": False}, {**SINGLE, **WIDE}]
"""The changes that an older GPU is compiled for, too: the usual form, and the widest factors."""


@pytest.mark.parametrize(
    ("changes", "capability"),
    sampled(
        [*itertools.product(CHANGES, [90]), *itertools.product(OLDER, [89])],
        [({}, 90), ({**SINGLE, **WIDE}, 90), ({**SINGLE, **WIDE}, 89)],
    ),
    ids=lambda given: (
        "-".join(f"{k}={v}" for k, v in given.items()) or "usual"
        if isinstance(given, dict)
        else str(given)
    ),
)
def test_every_form_compiles_and_fits_into_shared_memory(
    changes: dict[str, Any], capability: int, folder: Path
) -> None:
    binary = compiled(folder, capability, **changes)
    assert binary.metadata.shared <= SHARED_BYTES[capability]


def test_the_next_tile_is_on_its_way_while_one_is_computed(folder: Path) -> None:
    """Weights, codes and factors are copied ahead; a loop that Triton sees would prevent it."""
    text = compiled(folder, 90).asm["ttgir"]
    inner = text[text.index("scf.for") :]
    assert inner.count("async_copy_global_to_local") >= 2 + 2 * 3
    assert "tt.load %at" not in inner
