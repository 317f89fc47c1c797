"""Versions: what torch does not promise may be gone, other packages older, and everything is right
all the same.

`make test-lowest` and `make test-newest` run this file, and the others that they name, on the
oldest and on the newest packages that pyproject.toml allows.
"""

from __future__ import annotations

import ast
import importlib
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import with_sum as dense
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import adapter

import lora_tree as lt
from lora_tree.engine import arithmetic, unpromised
from lora_tree.engine.host import CompileWatch
from lora_tree.errors import StateError

PACKAGE = Path(lt.__file__).parent


# ---------------------------------------------------------------------- what torch does not promise
def gone(owner: str, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Take a name of torch away, for the length of a test."""

    def take(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(importlib.import_module(owner), name)

    return take


def unseen(module: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Take away what torch itself reads, too: only our module sees another one, with nothing in
    it.
    """

    def take(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unpromised, module, types.SimpleNamespace())

    return take


def no_mkldnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch whose CPU library can't be asked; what was found out at import is found out again."""
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", unpromised.slow_on_cpu())


ABSENT = {
    "grouped_mm": gone("torch.nn.functional", "grouped_mm"),
    "saved tensor hooks": unseen("autograd"),
    "mkldnn": no_mkldnn,
    "FakeCopyMode": gone("torch._subclasses.fake_tensor", "FakeCopyMode"),
    "global hooks": unseen("nn_module"),
    "frame counter": gone("torch._dynamo.convert_frame", "FRAME_COUNTER"),
    "hook guards": gone("torch._dynamo.config", "skip_nnmodule_hook_guards"),
}


@pytest.fixture(params=[*ABSENT, "all of them", "none of them"])
def absent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, take in ABSENT.items():
        if request.param in (name, "all of them"):
            take(monkeypatch)
    return str(request.param)


class Net(nn.Module):
    """Two Linears, the first one checkpointed where that is asked for."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            middle: Tensor = checkpoint(self.one, x, use_reentrant=False)
        else:
            middle = self.one(x)
        out: Tensor = self.two(torch.tanh(middle))
        return out


def grown(dtype: torch.dtype = torch.float32) -> lt.AdapterTree:
    """a → a/b, and c, each on both Linears."""
    made, draw = lt.AdapterTree(), torch.Generator().manual_seed(1)
    for path in ("a", "a/b", "c"):
        pairs = {}
        for name in ("one", "two"):
            A, B = torch.randn(8, 16, generator=draw), torch.randn(16, 8, generator=draw)
            pairs[name] = lt.LowRank((A / 4).to(dtype), (B / 4).to(dtype))
        made.add(path, adapter=lt.Adapter(pairs))
    return made


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["auto", "nodes", "paths", "grouped", "matrix"])
def test_a_routed_batch_is_right_whatever_torch_lacks(absent: str, strategy: Any) -> None:
    base, tree = Net(), grown()
    rows = ["a/b", "", "c", "a"]
    x = torch.randn(4, 7, 16)
    wanted = torch.stack([dense(base, tree, path)(x[i].double()) for i, path in enumerate(rows)])
    model = lt.attach(tree, base)
    with torch.no_grad(), model.route(rows, strategy=strategy):
        for _ in range(2):  # the first forward is watched
            close(base(x), wanted)
    with model.route(rows, strategy=strategy):
        close(base(x), wanted)


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_is_right_whatever_torch_lacks(absent: str, mode: Any, dtype: torch.dtype) -> None:
    base, tree = Net().to(dtype), grown(dtype)
    bare = {name: value.clone() for name, value in base.state_dict().items()}
    wanted = dense(base, tree, "a/b")
    model = lt.attach(tree, base)
    model.activate("a/b", mode=mode)
    if mode == "merged":  # the exact sum, rounded once
        for name in ("one", "two"):
            exact = wanted.get_submodule(name).weight
            got = base.get_submodule(name).weight
            assert (got.double() - exact).abs().max() <= torch.finfo(
                dtype
            ).eps * 2 * exact.abs().max()
    x = torch.randn(3, 16).to(dtype)
    torch.testing.assert_close(
        base(x).double(), wanted(x.double()), rtol=0, atol=16 * torch.finfo(dtype).eps * 4
    )
    model.deactivate()
    assert all(torch.equal(value, bare[name]) for name, value in base.state_dict().items())


def test_a_checkpointed_backward_under_another_path_is_refused_whatever_torch_lacks(
    absent: str,
) -> None:
    base, tree = Net(checkpointed=True), grown()
    model = lt.attach(tree, base)
    x = torch.randn(2, 16, requires_grad=True)
    with model.using("a", mode="unmerged"):
        base(x).sum().backward()  # the path is still there
        out = base(x)
    with pytest.raises(
        StateError, match="backward through checkpointed layers whose path is no longer active"
    ):
        out.sum().backward()


def test_a_plain_backward_needs_no_path_whatever_torch_lacks(absent: str) -> None:
    base, tree = Net(), grown()
    wanted = dense(base, tree, "a")
    model = lt.attach(tree, base)
    x = torch.randn(2, 16, requires_grad=True)
    with model.using("a", mode="unmerged"):
        out = base(x)
    out.sum().backward()
    again = x.detach().double().requires_grad_()
    wanted(again).sum().backward()
    close(x.grad, again.grad)  # type: ignore[arg-type]


def test_a_compiled_wrapper_is_seen_whatever_torch_lacks(absent: str) -> None:
    importlib.import_module("torch._dynamo.convert_frame")
    base = Net()
    wrapper = torch.compile(base, backend="eager")
    if absent in ("frame counter", "all of them"):
        with pytest.raises(StateError, match="compiled"):
            CompileWatch(compiled=False).check(base)
    del wrapper
    CompileWatch(compiled=False).check(Net())


def test_narrow_products_are_widened_where_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {torch.bfloat16, torch.float16}
    assert unpromised.slow_on_cpu() <= narrow
    no_mkldnn(monkeypatch)
    assert unpromised.slow_on_cpu() == narrow


def dotted(node: ast.expr) -> list[str]:
    """``torch.nn.Linear`` → its parts; none where the expression is more than names and dots."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


@pytest.mark.parametrize(
    "source",
    [s for s in sorted(PACKAGE.rglob("*.py")) if s.name != "unpromised.py"],
    ids=lambda source: str(source.relative_to(PACKAGE)),
)
def test_private_names_of_torch_are_asked_for_in_one_file(source: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            parts = [] if isinstance(node.ctx, ast.Store) else dotted(node)
            parts = parts if parts[:1] and parts[0] in ("torch", "nn", "F") else []
        else:
            continue
        private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
        if private:
            found.append(f"line {node.lineno}: {'.'.join(parts)}")
    assert not found, (
        f"{found}: ask for it in engine/unpromised.py, which says what is right without it"
    )


# ---------------------------------------------------------------------- what an older PEFT wrote
class Experts(nn.Module):
    """A square fused parameter, whose factors look the same either way round, and a flat one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.flat = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.einsum("eoi,bi->bo", self.fused, x) + x @ self.flat.T
        return out


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts(x)
        return out


def trained_by_peft(folder: Path, parameter: str) -> tuple[nn.Module, Path]:
    """A model with an adapter on a raw parameter, as the PEFT that is installed makes it, and the
    adapter's folder.
    """
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[f"experts.{parameter}"])
    model = peft.get_peft_model(Around(), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_()
    model.save_pretrained(folder)
    return model, folder


def with_version(folder: Path, version: str | None) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("peft_version")
    if version is not None:
        config["peft_version"] = version
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.1", "0.19.0", "nonsense"])
def test_fused_factors_of_a_peft_before_they_were_turned_are_warned_of(
    tmp_path: Path, version: str | None
) -> None:
    folder = with_version(trained_by_peft(tmp_path / "one", "fused")[1], version)
    told = (
        r"it has target_parameters, and its peft_version is .*: "
        r"PEFT before 0\.19\.1 wrote the factors of fused"
    )
    with pytest.warns(lt.errors.LoraTreeWarning, match=told):
        lt.Adapter.load(folder)


@pytest.mark.parametrize(
    "version", ["0.19.1", "0.19.2.dev0@UNKNOWN", "0.21", "1.0.0rc1", "9" * 5000]
)
def test_fused_factors_are_read_as_the_installed_peft_reads_them(
    tmp_path: Path, version: str
) -> None:
    theirs, folder = trained_by_peft(tmp_path / "one", "fused")
    tree = lt.AdapterTree()
    tree.add("a", adapter=with_version(folder, version))  # no warning
    base, x = Around(), torch.randn(2, 8)
    lt.attach(tree, base).activate("a")
    torch.testing.assert_close(base(x), theirs(x))


def test_what_is_no_matter_of_turning_is_not_warned_of(tmp_path: Path) -> None:
    flat = with_version(trained_by_peft(tmp_path / "flat", "flat")[1], None)
    lt.Adapter.load(flat)
    adapter(1).save(tmp_path / "plain")
    lt.Adapter.load(tmp_path / "plain")


def test_a_file_of_ours_says_which_way_its_factors_lie(tmp_path: Path) -> None:
    old = with_version(trained_by_peft(tmp_path / "one", "fused")[1], "0.18.1")
    with pytest.warns(lt.errors.LoraTreeWarning):
        value = lt.Adapter.load(old)
    value.save(tmp_path / "again")
    again = lt.Adapter.load(
        tmp_path / "again"
    )  # no warning: what is in memory lies as PEFT writes it now
    assert again.config["peft_version"] == "0.19.1"
    new = lt.Adapter.load(trained_by_peft(tmp_path / "new", "fused")[1])
    new.save(tmp_path / "newer")
    assert lt.Adapter.load(tmp_path / "newer").config["peft_version"] == peft.__version__
