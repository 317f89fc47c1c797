"""The kernels of routed sums compile for a GPU, and fit into its shared memory, on any machine.

Triton's interpreter runs much that its compiler refuses, so it is not enough that it runs them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling import sampled, slow

from lora_tree.engine.kernels import FactorTable, Segments, Tiling, group_of, segment_numbers

pytest.importorskip("triton", reason="Triton has no build for this platform")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

SHARED_BYTES = {90: 227 << 10, 89: 99 << 10}
"""Compute capability → the shared memory that a program may have."""

TYPES = {
    **dict.fromkeys(("order", "owed", "begins", "nodes", "owners"), "*i32"),
    **dict.fromkeys(("by_node", "node_begins"), "*i32"),
    **dict.fromkeys(("coefficients", "scales"), "*fp32"),
    "table": "*i64",
}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
BATCHES = {
    "one input": (1, 1),
    "a few rows": (5, 1),
    "rows of sixteen inputs": (20, 16),
    "rows of many inputs": (64, 128),
}
ONE_ROW = {"one input": (1, 1), "a few inputs": (1, 7)}
"""Name → rows, and inputs of a row."""


@pytest.fixture
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return importlib.import_module(f"lora_tree.engine.kernels.{request.param}")


def batch(
    name: str, dtype: torch.dtype, rank: int, compute: torch.dtype | None = None
) -> tuple[Segments, FactorTable, Tiling]:
    """Return lists of a batch over three nodes, factors of one site, and the tiling."""
    rows, tokens = (BATCHES | ONE_ROW)[name]
    kinds = [(1.0, 0.5, 0.0), (1.0, 0.0, 2.0)]
    sizes, numbers = segment_numbers(kinds, [i % 2 for i in range(rows)], group_of(tokens, rows))
    factors = []
    for _ in range(3):
        factors.append(
            (torch.zeros(rank, 256, dtype=dtype), torch.zeros(512, rank, dtype=dtype), 1)
        )
    table = FactorTable.of(factors, torch.device("cpu"))
    return Segments(sizes, numbers), table, Tiling.of(sizes, tokens, compute or dtype)


def constants_for(
    module: Any, which: tuple[Segments, FactorTable, Tiling], side: int, capability: int
) -> tuple[dict[str, Any], int]:
    """Return what a kernel is compiled for on a GPU, by name, and the parts of the narrow sum."""
    segments, table, tiling = which
    parts = tiling.parts(table.wide[1 - side])
    if module.__name__.endswith("direct"):
        x = torch.zeros(1, dtype=table.dtype)
        plan = module._plan(x, x, segments, table, tiling)
    elif module.__name__.endswith("shrink"):
        x = torch.zeros(1, dtype=table.dtype)
        plan, _, _ = module._plan(x, segments, table, side, tiling)
    else:
        low = torch.zeros(parts, 1)
        out = torch.zeros(1, dtype=table.dtype)
        plan = module._plan(low, out, out, segments, table, side, tiling)
    names = [each.name for each in module._kernel.params if each.is_constexpr]
    found = dict(zip(names, plan.constants, strict=True))
    found["COMPUTE"] = getattr(tl, str(tiling.compute).removeprefix("torch."))
    found["PRECISION"] = "tf32x3"
    found["EARLY"] = capability >= 90
    if "LOOP" in found and capability >= 90:
        found["LOOP"] = 3
    return found, parts


def compiled(
    module: Any,
    constants: dict[str, Any],
    dtype: torch.dtype,
    low: str,
    capability: int,
    stages: int,
) -> Any:
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    fixed: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(module._kernel.params):
        name = parameter.name
        if name in constants:
            signature[name], fixed[i,] = "constexpr", constants[name]
            continue
        if name in ("x", "base", "out", "low", *TYPES):
            own = low if name == "low" else f"*{NAMES[dtype]}"
            signature[name] = TYPES.get(name, own)
            attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(module._kernel, signature, constexprs=fixed, attrs=attributes)
    options = {
        "num_warps": getattr(module, "WARPS", 4),
        "num_stages": stages,
        "launch_pdl": capability >= 90,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", sampled(SHARED_BYTES, [90]))
@pytest.mark.parametrize("side", [0, 1], ids=["A", "B"])
@pytest.mark.parametrize("name", sampled(BATCHES, ["one input", "rows of many inputs"]))
@pytest.mark.parametrize("module", ["shrink", "expand"], indirect=True)
def test_kernels_compile_and_read_sixteen_bytes_at_a_time(
    module: Any, name: str, side: int, capability: int
) -> None:
    constants, parts = constants_for(module, batch(name, torch.bfloat16, 16), side, capability)
    low = "*fp32" if parts > 1 else "*bf16"
    stages = getattr(module, "MOST_STAGES", 1) if capability >= 90 else 3
    kernel = compiled(module, constants, torch.bfloat16, low, capability, stages)
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    code = kernel.asm["ptx"]
    wide = code.count(".v4.b32") + code.count("cp.async.cg")
    assert wide > 0
    narrow = [line for line in code.splitlines() if "ld.global" in line and ".b16" in line]
    assert len(narrow) <= 8, "factors and outputs are read number by number"


@pytest.mark.parametrize("capability", sampled(SHARED_BYTES, [90]))
@pytest.mark.parametrize("name", ONE_ROW)
@pytest.mark.parametrize("module", ["direct"], indirect=True)
def test_the_one_launch_compiles_and_reads_sixteen_bytes_at_a_time(
    module: Any, name: str, capability: int
) -> None:
    constants, _ = constants_for(module, batch(name, torch.bfloat16, 16), 0, capability)
    kernel = compiled(module, constants, torch.bfloat16, "", capability, module.STAGES)
    assert kernel.metadata.shared <= SHARED_BYTES[capability]
    code = kernel.asm["ptx"]
    assert code.count(".v4.b32") + code.count("cp.async.cg") > 0
    narrow = [line for line in code.splitlines() if "ld.global" in line and ".b16" in line]
    assert len(narrow) <= 8, "factors and outputs are read number by number"


@slow
@pytest.mark.parametrize("name", ONE_ROW)
@pytest.mark.parametrize("module", ["direct"], indirect=True)
def test_the_largest_ranks_of_one_launch_fit_into_a_small_gpu(module: Any, name: str) -> None:
    constants, _ = constants_for(module, batch(name, torch.float32, 128), 0, 89)
    kernel = compiled(module, constants, torch.float32, "", 89, module.STAGES)
    assert kernel.metadata.shared <= SHARED_BYTES[89]


@slow
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("name", ["one input", "rows of many inputs"])
@pytest.mark.parametrize("module", ["shrink", "expand"], indirect=True)
def test_the_largest_ranks_fit_into_a_small_gpu(module: Any, name: str, dtype: torch.dtype) -> None:
    constants, _ = constants_for(module, batch(name, dtype, 128), 0, 89)
    kernel = compiled(module, constants, dtype, "*fp32", 89, 3)
    assert kernel.metadata.shared <= SHARED_BYTES[89]


@pytest.mark.parametrize("name", sampled(BATCHES, ["rows of many inputs"]))
@pytest.mark.parametrize("module", ["shrink", "expand"], indirect=True)
def test_wide_factors_of_narrow_products_fit(module: Any, name: str) -> None:
    # Under autocast fp32 factors are read, and multiplied in bf16.
    which = batch(name, torch.float32, 16, torch.bfloat16)
    constants, _ = constants_for(module, which, 0, 90)
    stages = getattr(module, "MOST_STAGES", 1)
    kernel = compiled(module, constants, torch.float32, "*fp32", 90, stages)
    assert kernel.metadata.shared <= SHARED_BYTES[90]
