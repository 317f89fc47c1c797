"""Overrides that train: gradients and steps are PEFT's, siblings train different heads in one
batch, runs resume.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joint
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_overrides import IDS, bert, causal, llama
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.demo.bytelevel import new_base, save_base
from lora_tree.errors import BaseMismatch, SpecError
from lora_tree.integrations.transformers import TreeTrainer

SPECS: dict[str, tuple[Any, dict[str, Any]]] = {
    "reward head": (llama, dict(target_modules=["q_proj"], modules_to_save=["score"])),
    "classes": (bert, dict(target_modules=["query"], modules_to_save=["classifier"])),
    "embedding and head": (
        causal,
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "norms": (causal, dict(target_modules=["q_proj"], modules_to_save=["norm"])),
    "tokens": (causal, dict(target_modules=["q_proj"], trainable_token_indices=[1, 40, 7])),
    "tokens of both": (
        causal,
        dict(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [1, 40], "lm_head": [3]},
        ),
    ),
    "tokens, tied": (
        lambda: causal(tie_word_embeddings=True),
        dict(target_modules=["q_proj"], trainable_token_indices=[1, 40, 7]),
    ),
}


def moved(tree: lt.AdapterTree, path: str, seed: int = 3) -> None:
    """Draw a node's numbers anew, so that every one of them has a gradient."""
    adapter = tree.adapter(path)
    assert adapter is not None
    g = torch.Generator().manual_seed(seed)
    tree.update(
        path,
        adapter=adapter.with_tensors(lambda t: t + torch.randn(t.shape, generator=g) * 0.2),
    )


def one_node(kind: str) -> tuple[lt.TreeModel, lt.AdapterTree]:
    make, spec = SPECS[kind]
    tree = lt.AdapterTree()
    tree.add("a", r=4, lora_alpha=8, **spec)
    model = lt.attach(tree, make())
    moved(tree, "a")
    return model, tree


def loss_of(logits: Tensor) -> Tensor:
    return (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).tanh().sum()


def peft_names(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains in PEFT, under the names of our parameters."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("base_model.model.")
        for end, ours in (
            (".lora_A.default.weight", "/A"),
            (".lora_B.default.weight", "/B"),
            (".token_adapter.trainable_tokens_delta.default", "/weight/override"),
        ):
            if name.endswith(end):
                found[name.removesuffix(end).replace(".", "/") + ours] = parameter
        if ".modules_to_save.default." in name:
            plain = name.replace(".modules_to_save.default.", ".")
            found[plain.replace(".", "/") + "/override"] = parameter
    return found


@pytest.mark.parametrize("kind", SPECS)
def test_gradients_and_steps_are_pefts(kind: str, tmp_path: Path) -> None:
    model, tree = one_node(kind)
    tree["a"].loaded.save(tmp_path / "start")  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = SPECS[kind][0]()
        theirs = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).eval()
    wanted = peft_names(theirs)
    model.activate("a", mode="unmerged")
    groups = model.trainable("a")
    ours = dict(model.factors["/a"].named_parameters())
    assert ours.keys() == wanted.keys()
    optimizers = [
        torch.optim.AdamW(groups, lr=0.01),
        torch.optim.AdamW(wanted.values(), lr=0.01),
    ]
    model.follow(optimizers[0])
    for _ in range(3):
        for each, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(each(IDS).logits).backward()
        for name, parameter in wanted.items():
            assert parameter.grad is not None
            got = ours[name].grad
            torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in wanted.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=1e-4)
    # What was trained is saved, and PEFT opens it.
    tree.save(tmp_path / "zoo")
    saved = lt.load(tmp_path / "zoo").adapter("a")
    assert saved is not None
    for name, override in saved.overrides.items():
        assert torch.equal(override.values, ours[name.replace(".", "/") + "/override"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(SPECS[kind][0](), tmp_path / "zoo" / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SPECS)
def test_a_fresh_override_changes_nothing(kind: str) -> None:
    make, spec = SPECS[kind]
    base = make()
    with torch.no_grad():
        bare = base(IDS).logits
    tree = lt.AdapterTree(defaults=dict(r=4, **spec))
    tree.add("a")
    model = lt.attach(tree, base)
    modes: tuple[Any, ...] = ("merged", "unmerged")
    for mode in modes:
        model.activate("a", mode=mode)
        with torch.no_grad():
            torch.testing.assert_close(base(IDS).logits, bare, rtol=1e-6, atol=1e-6)
    # Below a node that was trained it is a copy of that, whatever is merged at the moment.
    model.activate("")
    moved(tree, "a")
    for active in ("", "a"):
        model.activate(active)
        tree.add(f"a/b{len(active)}")
        model.activate("a")
        with torch.no_grad():
            above = base(IDS).logits
        model.activate(f"a/b{len(active)}")
        with torch.no_grad():
            torch.testing.assert_close(base(IDS).logits, above, rtol=1e-5, atol=1e-6)


def heads() -> tuple[lt.TreeModel, lt.AdapterTree]:
    """top → fr, de: a head each, and rows of the embedding in fr; top adds to what both read."""
    tree = lt.AdapterTree(defaults=dict(r=2, lora_alpha=4))
    tree.add("top", target_modules=["q_proj", "v_proj"])
    more: dict[str, Any] = dict(target_modules=["o_proj"], modules_to_save=["score"])
    tree.add("top/fr", **more, trainable_token_indices={"embed_tokens": [1, 4]})
    tree.add("top/de", **more)
    model = lt.attach(tree, llama().double())
    for i, path in enumerate(tree.paths()):
        moved(tree, path, seed=i)
    return model, tree


def gradients(model: lt.TreeModel) -> dict[str, Tensor]:
    return {
        name: p.grad.clone() for name, p in model.factors.named_parameters() if p.grad is not None
    }


def test_siblings_train_different_heads_in_one_batch() -> None:
    """As the two paths do one after the other, and as float64 has it by finite differences."""
    paths = ["top/fr", "top/de", "", "top/fr"]
    ids = torch.arange(24).reshape(4, 6) % 11 + 1
    model, _ = heads()
    model.trainable("top*", "top/*", dtype=None)
    with model.route(paths):
        loss_of(model(ids).logits).backward()
    got = gradients(model)
    apart, _ = heads()
    apart.trainable("top*", "top/*", dtype=None)
    weights = torch.linspace(-1, 1, 8).view(4, 2)
    for path in ("top/fr", "top/de"):
        mine = [i for i, each in enumerate(paths) if each == path]
        apart.activate(path, mode="unmerged")
        (apart(ids[mine]).logits.float() * weights[mine]).tanh().sum().backward()
    wanted = gradients(apart)
    assert got.keys() == wanted.keys()
    assert {name.partition(".")[0] for name in got} == {"/top", "/top/fr", "/top/de"}
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_node_without_rows_does_not_move_its_head() -> None:
    model, tree = heads()
    optimizer = torch.optim.AdamW(model.trainable("top/*"), lr=0.1, weight_decay=0.5)
    model.follow(optimizer)
    before = {p: copy.deepcopy(tree.adapter(p)) for p in ("top/fr", "top/de")}
    with model.route(["top/fr", "top/fr"]):
        loss_of(model(IDS).logits).backward()
    optimizer.step()
    for path, was in before.items():
        now = tree.adapter(path)
        same = torch.equal(
            now.overrides["score.weight"].values,  # type: ignore[union-attr]
            was.overrides["score.weight"].values,  # type: ignore[union-attr]
        )
        assert same == (path == "top/de")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (dict(modules_to_save=["scor"]), "modules_to_save: 'scor' names no module"),
        (dict(trainable_token_indices=[50]), "has 50 rows, and 50 is named"),
        (
            dict(modules_to_save=["embed_tokens"], trainable_token_indices=[1]),
            "modules_to_save replaces all of it",
        ),
        (dict(trainable_token_indices={"norm": [0]}), "names 3 modules"),
    ],
)
def test_a_spec_that_names_nothing_is_refused(spec: dict[str, Any], text: str) -> None:
    tree = lt.AdapterTree()
    tree.add("a", target_modules=["q_proj"], **spec)
    with pytest.raises(BaseMismatch, match=f"a: .*{text}"):
        lt.attach(tree, llama())
    with pytest.raises(SpecError, match="trainable_token_indices"):
        tree.add("b", trainable_token_indices=[-1])


def test_statistics_of_a_batch_norm_are_refused_for_training() -> None:
    base = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))})
    tree = lt.AdapterTree()
    tree.add("a", modules_to_save=["head"])
    with pytest.raises(BaseMismatch, match=r"head\.1\.num_batches_tracked: .* statistic"):
        lt.attach(tree, base)


# ---------------------------------------------------------------------- runs
def trainer(folder: Path, **more: Any) -> tuple[TreeTrainer, lt.AdapterTree]:
    base = joint.base(torch.float32)
    tree = lt.AdapterTree(
        defaults=dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    for path in ("a", "a/b", "d"):
        tree.add(path, **({"trainable_token_indices": [3, 5]} if path == "d" else {}))
    model = lt.attach(tree, base)
    for i, path in enumerate(tree.paths()):
        moved(tree, path, seed=i)
    groups = model.trainable("a/b", "d", dropout=0.1)
    rows = joint.rows(["a/b", "d", "a", "d", "a/b", "", "d", "a/b"])
    args = joint.arguments(folder, num_train_epochs=2, save_strategy="steps", save_steps=2, seed=5)
    return TreeTrainer(model, args, groups=groups, train_dataset=rows, **more), tree


def numbers(tree: lt.AdapterTree) -> Sequence[Tensor]:
    found = []
    for path in tree.paths():
        adapter = tree.adapter(path)
        assert adapter is not None
        found += [tensor.detach().clone() for _, tensor in adapter.named_tensors()]
    return found


def test_a_run_with_heads_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, straight = trainer(tmp_path / "whole")
    start = numbers(straight)
    whole.train()
    assert whole.state.global_step == 4
    changed = [not torch.equal(x, y) for x, y in zip(start, numbers(straight), strict=True)]
    again, resumed = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(x, y) for x, y in zip(numbers(straight), numbers(resumed), strict=True))
    # Two factors and a head of a; then those of a/b and of d, and d's rows.
    layers = 2 * 2
    assert changed == [False] * (layers + 1) + [True] * (layers + 1) + [True] * (layers + 2)
    # A node of a checkpoint is a PEFT folder with its head in it.
    node = tmp_path / "whole" / "checkpoint-4" / "nodes" / "d"
    saved = load_file(node / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in saved
    assert "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta" in saved


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
def test_the_commands_train_tell_and_export_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    torch.manual_seed(0)
    save_base(new_base(hidden=32, layers=1, window=64), tmp_path / "base")
    spec = {
        "version": 1,
        "base": str(tmp_path / "base"),
        "defaults": {"r": 2, "target_modules": ["q_proj"]},
        "tree": {
            "fr": {
                "target_modules": ["q_proj", "lm_head"],
                "children": {"legal": {"modules_to_save": ["lm_head"]}},
            }
        },
    }
    (zoo / "tree.yaml").write_text(json.dumps(spec))  # JSON is YAML
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"path": "fr", "text": "oui"}\n{"path": "fr/legal", "text": "bail"}\n' * 4)

    def told(*args: object) -> str:
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        out = capsys.readouterr()
        assert exit.value.code == 0, out.err
        return out.out

    told("train", zoo, "--data", rows, "--steps", "2", "--json", "--quiet")
    assert "replaces lm_head.weight" in told("show", zoo)
    nodes = json.loads(told("show", zoo, "--json"))["nodes"]
    assert [node["overrides"] for node in nodes] == [[], ["lm_head.weight"]]
    checked = told("check", zoo, "--base", tmp_path / "base")
    assert "note: increments under an override do not count: fr: lm_head: fr/legal" in checked
    assert "all is well" in checked
    told("export", zoo, "fr/legal", "--as", "model", "--out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    override = lt.Adapter.load(zoo / "fr" / "legal").overrides["lm_head.weight"]
    assert torch.equal(merged["lm_head.weight"], override.values)


# ---------------------------------------------------------------------- frozen inside of a block
def frozen_inside() -> tuple[lt.TreeModel, Tensor]:
    """A head alone, a head with increments of its own, and a node beside them; and inputs that
    have gradients."""
    base = llama()
    tree = lt.AdapterTree()
    shape = base.score.weight.shape
    low = lt.LowRank(torch.randn(2, shape[1]), torch.randn(shape[0], 2))
    override = lt.Override(torch.randn(shape))
    tree.add("head", adapter=lt.Adapter({}, overrides={"score.weight": override}))
    tree.add("both", adapter=lt.Adapter({"score": low}, overrides={"score.weight": override}))
    tree.add("x", r=2, target_modules=["q_proj"])
    inputs = base.get_input_embeddings()(IDS).detach().requires_grad_()
    return lt.attach(tree, base), inputs


def test_a_head_that_was_frozen_inside_of_a_block_is_not_taken_for_one_that_trains() -> None:
    model, inputs = frozen_inside()
    model.trainable("head")
    model.activate("head", mode="unmerged")
    before = model._stage.current
    assert before.side_paths.training == {"score": ["head"]}
    with model.using("x", mode="unmerged"):
        pass
    assert model._stage.current is before, "nothing has changed, so nothing is composed again"
    with model.using("x", mode="unmerged"):
        model.trainable("x")
    assert model._stage.current.side_paths.training == {}
    model.base(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    assert model._stage.side_hooks.reached == set()
    with model.using("x", mode="unmerged"):
        model.trainable("head")
    assert model._stage.current.side_paths.training == {"score": ["head"]}


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.parametrize("frozen", ["override", "increments"])
def test_an_override_and_increments_at_one_site_are_told_apart(frozen: str) -> None:
    model, _ = frozen_inside()
    model.trainable("both")
    model.activate("both", mode="unmerged")
    adapter = model.tree.adapter("both")
    assert adapter is not None
    override = adapter.overrides["score.weight"].values
    increments = adapter.modules["score"]
    tensors = [override] if frozen == "override" else [increments.A, increments.B]

    def is_renewed(trains: bool) -> bool:
        """Say whether the behaviour is another one after a block in which the flags are set."""
        before = model._stage.current
        with model.using("x", mode="unmerged"):
            for tensor in tensors:
                tensor.requires_grad_(trains)
        return model._stage.current is not before

    assert is_renewed(trains=False)
    assert not is_renewed(trains=False)
    assert is_renewed(trains=True)
    assert not is_renewed(trains=True)


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_a_bias_that_was_written_to_inside_of_a_block_counts(mode: Any) -> None:
    base = llama()
    tree = lt.AdapterTree()
    inner, outer = base.score.weight.shape[1], base.score.weight.shape[0]
    for path in ("a", "a/b"):
        low = lt.LowRank(torch.randn(2, inner), torch.randn(outer, 2), bias=torch.randn(outer))
        tree.add(path, adapter=lt.Adapter({"score": low}))
    tree.add("x", r=2, target_modules=["q_proj"])
    base.score.bias = nn.Parameter(torch.zeros(outer))
    model = lt.attach(tree, base)
    model.trainable("a", "a/b")
    model.trainable()
    model.activate("a/b", mode=mode)
    before = base(input_ids=IDS, use_cache=False).logits
    adapter = tree.adapter("a/b")
    assert adapter is not None
    bias = adapter.modules["score"].bias
    assert bias is not None
    with model.using("x"), torch.no_grad():
        bias.add_(1)
    torch.testing.assert_close(base(input_ids=IDS, use_cache=False).logits, before + 1)
