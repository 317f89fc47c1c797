"""Overrides: heads, embeddings and token rows that stand for the base's own, against PEFT and
against float64.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import low_rank
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch, FormatError, SpecError, TiedWeights, UnmergedOnly

IDS = torch.arange(12).reshape(2, 6) * 3 + 1
SIZES: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=50,
    pad_token_id=0,
)


def llama(cls: str = "LlamaForSequenceClassification", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = getattr(transformers, cls)(transformers.LlamaConfig(**SIZES, **more))
    return made.eval()


def causal(**more: Any) -> nn.Module:
    return llama("LlamaForCausalLM", **more)


def bert(cls: str = "BertForTokenClassification") -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = getattr(transformers, cls)(transformers.BertConfig(**SIZES))
    return made.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def trained_by_peft(base: nn.Module, config: Any, folder: Path, seed: int = 1) -> Path:
    """Save a PEFT adapter of which every trained number was moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder)
    return folder


def opened_by_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval()


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "reward head": (llama, lambda: LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])),
    "token classes": (bert, lambda: LoraConfig(task_type="TOKEN_CLS", target_modules=["query"])),
    "pooler and head": (
        lambda: bert("BertForSequenceClassification"),
        lambda: LoraConfig(
            task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"]
        ),
    ),
    "embedding, head, norms": (
        causal,
        lambda: LoraConfig(
            target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]
        ),
    ),
    "token rows": (
        causal,
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4, 1, 40]),
    ),
    "token rows of both": (
        causal,
        lambda: LoraConfig(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [4, 1], "lm_head": [7]},
        ),
    ),
    "token rows, tied": (
        lambda: causal(tie_word_embeddings=True),
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4, 1, 40]),
    ),
    "token rows alone": (causal, lambda: TrainableTokensConfig(token_indices=[4, 1, 40])),
    "biases": (
        bert,
        lambda: LoraConfig(task_type="TOKEN_CLS", target_modules=["query"], bias="all"),
    ),
}


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_through_peft_changes_no_bit(kind: str, tmp_path: Path) -> None:
    base, config = KINDS[kind]
    theirs = trained_by_peft(base(), config(), tmp_path / "peft")
    lt.Adapter.load(theirs).save(tmp_path / "ours")
    lt.Adapter.load(tmp_path / "ours").save(tmp_path / "again")
    wanted = load_file(theirs / "adapter_model.safetensors")
    got = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    # With bias="all" PEFT writes a replaced module's bias three times.
    twice = {key for key in wanted if ".modules_to_save." in key or ".original_module." in key}
    assert wanted.keys() - twice == got.keys()
    assert all(torch.equal(wanted[key], got[key]) for key in got)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        ours, again = tmp_path / "ours" / name, tmp_path / "again" / name
        assert ours.read_bytes() == again.read_bytes()
    opened = opened_by_peft(base(), tmp_path / "ours")
    assert torch.equal(logits(opened), logits(opened_by_peft(base(), theirs)))


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_gives_what_peft_gives(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    theirs = trained_by_peft(make(), config(), tmp_path / "peft")
    tree = lt.AdapterTree()
    tree.add("a", adapter=theirs)
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    bare = logits(base)
    model = lt.attach(tree, base)
    model.activate("a")
    wanted = logits(opened_by_peft(make(), theirs))
    torch.testing.assert_close(logits(base), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bare, wanted, atol=1e-3)
    model.detach()
    assert all(torch.equal(before[name], now) for name, now in base.state_dict().items())


def edited(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def test_every_form_of_the_keys_is_read(tmp_path: Path) -> None:
    """As a state dict has them, and as PEFT wrote them when the config did not name the head."""
    folder = trained_by_peft(
        llama(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]), tmp_path
    )
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("base_model.model.score.weight")
    for key in (
        "score.weight",
        "score.modules_to_save.weight",
        "score.modules_to_save.default.weight",
    ):
        save_file({**tensors, f"base_model.model.{key}": head}, file)
        edited(folder, modules_to_save=None)
        assert torch.equal(lt.Adapter.load(folder).overrides["score.weight"].values, head)
    edited(folder, task_type=None)
    save_file({**tensors, "base_model.model.score.weight": head}, file)
    with pytest.raises(FormatError, match=r"score\.weight' is a whole weight, .*\n.*modules_to_s"):
        lt.Adapter.load(folder)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(modules_to_save=["norm"], task_type=None), "no tensor of norm, .*\n.*lost its head"),
        (dict(modules_to_save="score"), "modules_to_save: got 'score', expected a list of names"),
        (dict(trainable_token_indices=[1, 2]), "no trainable_tokens_delta, and .* says"),
        (dict(trainable_token_indices=[-1]), "expected a list of rows"),
        (dict(trainable_token_indices=[3, 3]), "a row occurs twice"),
        (dict(trainable_token_indices={"x": 3}), "expected a list of rows"),
    ],
)
def test_a_config_that_does_not_fit_the_file_is_refused(
    fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    folder = trained_by_peft(
        llama(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]), tmp_path
    )
    edited(folder, **fields)
    with pytest.raises(FormatError, match=text):
        lt.Adapter.load(folder)


def test_rows_that_the_config_does_not_count_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4, 1])
    folder = trained_by_peft(causal(), config, tmp_path)
    for said, text in (([4], "1 row for model.embed_tokens, whose .* has 2"), (None, "no rows")):
        edited(folder, trainable_token_indices=said)
        with pytest.raises(FormatError, match=text):
            lt.Adapter.load(folder)


# ---------------------------------------------------------------------- what counts on a path
class Net(nn.Module):
    """An embedding, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.lin = nn.Linear(6, 6)
        self.score = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.score(torch.tanh(self.lin(self.norm(self.embed(ids)))))
        return out


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(seed: int) -> dict[str, lt.Override]:
    return {
        "score.weight": lt.Override(drawn(4, 6, seed=seed)),
        "score.bias": lt.Override(drawn(4, seed=seed + 100)),
    }


def rows(seed: int, *of: int) -> dict[str, lt.Override]:
    return {"embed.weight": lt.Override(drawn(len(of), 6, seed=seed), of)}


def zoo() -> lt.AdapterTree:
    """fr and fr/legal/x replace the head, every node adds to it; rows of the embedding by two."""
    tree = lt.AdapterTree()
    embed = low_rank(6, 9, seed=7, layout=lt.lowrank.EMBEDDING)
    for i, (path, overrides) in enumerate(
        {
            "top": {},
            "top/fr": {**head(1), **rows(2, 3, 5), "norm.weight": lt.Override(drawn(6, seed=3))},
            "top/fr/legal": rows(4, 5, 8),
            "top/fr/legal/x": head(5),
            "top/fr/medical": {},
            "top/de": head(6),
        }.items()
    ):
        modules = {"score": low_rank(4, 6, seed=10 + i), "lin": low_rank(6, 6, seed=30 + i)}
        if path in ("top", "top/fr/legal"):
            modules["embed"] = embed
        tree.add(path, adapter=lt.Adapter(modules, overrides=overrides))
    return tree


def summed(tree: lt.AdapterTree, path: str) -> Net:
    """Return the base in float64 under a path, from the law and by hand: node after node, what is
    replaced is put over everything that was there before."""
    net = Net().double()
    names = path.split("/")
    with torch.no_grad():
        for i in range(len(names)):
            adapter = tree.adapter("/".join(names[: i + 1]))
            assert adapter is not None
            for name, override in adapter.overrides.items():
                own = net.get_parameter(name)
                if override.rows is None:
                    own.copy_(override.values)
                else:
                    own[list(override.rows)] = override.values.double()
            for name, value in adapter.modules.items():
                delta = value.dense(dtype=torch.float64)
                weight = net.get_submodule(name).get_parameter("weight")
                weight += delta.mT if name == "embed" else delta
    return net


PATHS = ["top", "top/fr", "top/fr/legal", "top/fr/legal/x", "top/fr/medical", "top/de"]


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.filterwarnings("ignore:.*the increments are so large:RuntimeWarning")
@pytest.mark.parametrize(
    ("dtype", "pristine"),
    [
        (torch.float64, "auto"),
        (torch.float32, "auto"),
        (torch.bfloat16, "auto"),
        (torch.bfloat16, "log"),
    ],
)
def test_the_deepest_override_counts_with_its_bits(dtype: torch.dtype, pristine: Any) -> None:
    tree, base = zoo(), Net().to(dtype)
    own = copy.deepcopy(base.state_dict())
    model = lt.attach(tree, base, pristine=pristine)
    fresh = {}
    for path in [*PATHS, "", *reversed(PATHS), "top/de", "top/fr/legal"]:
        model.activate(path)
        state = copy.deepcopy(base.state_dict())
        for name, tensor in fresh.setdefault(path, state).items():
            assert torch.equal(tensor, state[name]), (path, name)  # whatever was active before
        if not path:
            assert all(torch.equal(own[name], now) for name, now in state.items())
            continue
        bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
        wanted = summed(tree, path).state_dict()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=bound, atol=bound)
    # A tensor that nothing is added to has the very bits of the override.
    model.activate("top/fr/legal")
    norm = tree.adapter("top/fr").overrides["norm.weight"].values
    assert torch.equal(base.norm.weight, norm.to(dtype))
    assert torch.equal(base.score.bias, head(1)["score.bias"].values.to(dtype))


def test_increments_that_are_dropped_are_told_once() -> None:
    model = lt.attach(zoo(), Net())
    with pytest.warns(
        lt.OverrideWarning,
        match=r"top: embed: top/fr overrides embed\.weight, top: score: top/fr overrides score",
    ):
        model.activate("top/fr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.activate("")
        model.activate("top/fr")
    routed = lt.attach(without_embeddings(zoo()), Net())
    with (
        pytest.warns(lt.OverrideWarning, match="top: score: top/de overrides score"),
        routed.route(["top/de"]),
    ):
        pass


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
def test_a_blend_needs_one_override_for_all_its_paths() -> None:
    tree, base = zoo(), Net()
    model = lt.attach(tree, base)
    model.activate({"top/fr": 0.5, "top/fr/medical": 0.5})  # both under fr's head
    assert torch.equal(base.score.bias, head(1)["score.bias"].values)
    before = copy.deepcopy(base.state_dict())
    for blend, text in (
        (
            {"top/fr": 0.5, "top/de": 0.5},
            "embed.weight: replaced by top/fr for one path .* the b",
        ),
        (
            {"top": 0.5, "top/de": 0.5},
            "score.bias: the base's own for one .* replaced by top/de for another",
        ),
    ):
        with pytest.raises(SpecError, match=text):
            model.activate(blend)
        with pytest.raises(SpecError, match=text):
            tree.flatten(blend)
    assert all(torch.equal(before[name], now) for name, now in base.state_dict().items())
    tree = zoo()
    tree.update("top/de", weight=0.0)  # a node of weight 0 is no part of any path
    lt.attach(tree, Net()).activate({"top": 0.5, "top/de": 0.5})


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            {"embed.weight": lt.Override(torch.ones(11, 6))},
            r"embed\.weight: .*\(11, 6\), the base has \(9, 6\)\n.*resize_token_embeddings\(11\)",
        ),
        ({"score.weight": lt.Override(torch.ones(2, 6))}, r"\n.*num_labels=2"),
        ({"embed.weight": lt.Override(torch.ones(1, 6), (9,))}, "rows up to 9, .* has 9"),
        ({"norm.weight": lt.Override(torch.ones(1), (2,))}, "is no embedding"),
        ({"scor.weight": lt.Override(torch.ones(4, 6))}, "none of that name.*score"),
        (
            {"score.weight": lt.Override(torch.full((4, 6), 1e39, dtype=torch.float64))},
            "goes up to",
        ),
        ({"score.weight": lt.Override(torch.full((4, 6), torch.nan))}, "numbers up to nan"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_by_name(
    overrides: dict[str, lt.Override], text: str
) -> None:
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({}, overrides=overrides))
    with pytest.raises(BaseMismatch, match=f"(?s)a: .*{text}"):
        lt.attach(tree, Net()).activate("a")


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
def test_without_a_copy_of_the_base_nothing_is_replaced() -> None:
    with pytest.warns(lt.MergedWarning):
        model = lt.attach(zoo(), Net(), pristine="none")
    with pytest.raises(UnmergedOnly, match=r"top/fr: embed: an override can't be taken b"):
        model.activate("top/fr")


def test_a_tied_embedding_is_replaced_with_its_head_or_not_at_all() -> None:
    base = causal(tie_word_embeddings=True)
    values = drawn(50, 32, seed=1)
    tree = lt.AdapterTree()
    whole = {"model.embed_tokens.weight": lt.Override(values)}
    tree.add("one", adapter=lt.Adapter({}, overrides=whole))
    both = {**whole, "lm_head.weight": lt.Override(values.clone())}
    tree.add("both", adapter=lt.Adapter({}, overrides=both))
    model = lt.attach(tree, base)
    with pytest.raises(TiedWeights, match=r"one: model\.embed_tokens: its weight is tied to lm_h"):
        model.activate("one")
    model.activate("both")
    assert torch.equal(base.get_input_embeddings().weight, values)
    model.activate("")
    assert not torch.equal(base.get_input_embeddings().weight, values)


# ---------------------------------------------------------------------- ways out
@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
def test_a_flattened_path_is_the_path(tmp_path: Path) -> None:
    """In the tree, over a base, and from its files."""
    tree = zoo()
    for path in PATHS:
        flat = tree.flatten(path)
        alone = lt.AdapterTree()
        alone.add("flat", adapter=flat)
        base = Net().double()
        lt.attach(alone, base).activate("flat")
        for name, wanted in summed(tree, path).state_dict().items():
            torch.testing.assert_close(base.state_dict()[name], wanted, rtol=1e-5, atol=1e-5)
        if path == "top/de":
            flat.save(tmp_path / "flat")
            again = lt.Adapter.load(tmp_path / "flat")
            told = again.split_unchanged(dict(Net().named_parameters()))
            assert told.overrides.keys() == flat.overrides.keys()


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.parametrize("kind", ["reward head", "embedding, head, norms", "token rows, tied"])
def test_a_merged_checkpoint_has_the_bits_of_a_switch(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    theirs = trained_by_peft(make(), config(), tmp_path / "peft")
    tree = lt.AdapterTree()
    tree.add("a", adapter=theirs)
    base = make()
    base.save_pretrained(tmp_path / "base")
    lt.export_model(tree, "a", tmp_path / "merged", base=tmp_path / "base")
    made = type(base).from_pretrained(tmp_path / "merged")
    lt.attach(tree, base).activate("a")
    state = made.state_dict()
    assert all(torch.equal(state[name], now) for name, now in base.state_dict().items())
    with pytest.raises(FormatError, match=r"^a: .*: replaced by the adapter, and the portable f"):
        lt.portable(tree, "a")
    for form in ("kohya", "diffusers"):
        with pytest.raises(FormatError, match=f"and a {form} file holds increments alone"):
            tree.flatten("a").save(tmp_path / "one.safetensors", form=form)  # type: ignore[arg-type]
    assert not (tmp_path / "one.safetensors").exists()
    if "LlamaForCausalLM" in type(base).__name__:
        with pytest.raises(FormatError, match="and a GGUF adapter holds increments alone"):
            lt.export_gguf(tree, "a", tmp_path / "a.gguf", base=tmp_path / "base")


# ---------------------------------------------------------------------- beside the weights
@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_unmerged_it_gives_what_peft_gives(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    theirs = trained_by_peft(make(), config(), tmp_path / "peft")
    tree = lt.AdapterTree()
    tree.add("a", adapter=theirs)
    base = make()
    own = {name: (tensor, tensor.clone()) for name, tensor in base.state_dict().items()}
    bare, hooks = logits(base), [len(m._forward_hooks) for m in base.modules()]
    model = lt.attach(tree, base)
    model.activate("a", mode="unmerged")
    wanted = logits(opened_by_peft(make(), theirs))
    torch.testing.assert_close(logits(base), wanted, rtol=1e-4, atol=1e-5)
    model.activate("")
    assert torch.equal(logits(base), bare)
    model.activate("a", mode="unmerged")
    model.detach()
    assert [len(m._forward_hooks) for m in base.modules()] == hooks
    assert all(torch.equal(now, then) for now, then in own.values())


def out_of(net: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(ids)
    return found


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.parametrize("path", PATHS)
def test_beside_the_weights_a_path_is_what_it_is_in_them(path: str) -> None:
    base, tree = Net().double(), zoo()
    ids = torch.arange(27).reshape(3, 9) % 9
    model = lt.attach(tree, base)
    model.activate(path, mode="unmerged")
    wanted = out_of(summed(tree, path), ids)
    torch.testing.assert_close(out_of(base, ids), wanted, rtol=1e-6, atol=1e-6)
    at = model.at(path)
    model.activate("")
    torch.testing.assert_close(out_of(at, ids), wanted, rtol=1e-6, atol=1e-6)


def without_embeddings(tree: lt.AdapterTree) -> lt.AdapterTree:
    """Return the tree without increments of the embedding, rows of which are overridden below."""
    for path in tree.paths():
        adapter = tree.adapter(path)
        assert adapter is not None
        modules = {name: value for name, value in adapter.modules.items() if name != "embed"}
        tree.update(path, adapter=lt.Adapter(modules, overrides=adapter.overrides))
    return tree


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.parametrize("strategy", ["auto", "nodes", "paths", "grouped", "matrix"])
def test_rows_of_a_batch_go_through_their_own_overrides(strategy: Any) -> None:
    base, tree = Net().double(), without_embeddings(zoo())
    model = lt.attach(tree, base)
    batches = [
        ["", *PATHS, "top/fr"],
        ["top/fr", "top/fr/medical", "top/fr"],  # one head for all, of which two add to it
        ["top/de", "top/fr/legal/x", "", ""],
    ]
    for paths in batches:
        ids = (torch.arange(len(paths) * 7) % 9).reshape(len(paths), 7)
        with model.route(paths, strategy=strategy):
            got = out_of(base, ids)
        for i, path in enumerate(paths):
            net = summed(tree, path) if path else Net().double()
            torch.testing.assert_close(got[i], out_of(net, ids[i]), rtol=1e-6, atol=1e-6)
            if not path:
                assert torch.equal(got[i], out_of(base, ids)[i])
    assert torch.equal(out_of(base, ids), out_of(Net().double(), ids))


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
def test_a_routed_blend_with_two_overrides_is_refused_by_its_row() -> None:
    base, tree = Net(), without_embeddings(zoo())
    model = lt.attach(tree, base)
    before = out_of(base, torch.zeros(1, 2, dtype=torch.int64))
    with (
        pytest.raises(SpecError, match=r"row 1: .*: replaced by .* for one path"),
        model.route(["top", {"top/fr": 0.5, "top/de": 0.5}]),
    ):
        pass
    assert torch.equal(before, out_of(base, torch.zeros(1, 2, dtype=torch.int64)))
    assert model.active == ""


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
def test_rows_below_an_increment_can_be_activated_and_not_routed() -> None:
    model = lt.attach(zoo(), Net())
    with (
        pytest.raises(
            lt.errors.MergedOnly, match=r"embed: top/fr overrides a part .* ancestor top has"
        ),
        model.route(["top/fr", ""]),
    ):
        pass


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.parametrize("spread", [dict(repeat=2), dict(tile=3)])
def test_rows_that_are_repeated_keep_their_overrides(spread: dict[str, int]) -> None:
    base, tree = Net().double(), without_embeddings(zoo())
    paths = ["top/fr", "", "top/de"]
    ids = torch.arange(15).reshape(3, 5) % 9
    if "repeat" in spread:
        ids, rows = ids.repeat_interleave(2, 0), [0, 0, 1, 1, 2, 2]
    else:
        ids, rows = ids.repeat(3, 1), [0, 1, 2] * 3
    with lt.attach(tree, base).route(paths, **spread):
        got = out_of(base, ids)
    for i, row in enumerate(rows):
        net = summed(tree, paths[row]) if paths[row] else Net().double()
        torch.testing.assert_close(got[i], out_of(net, ids[i]), rtol=1e-6, atol=1e-6)


def test_an_attention_reads_its_projection_so_an_override_of_it_is_merged_only() -> None:
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 1)})
    tree = lt.AdapterTree()
    weight = {"attn.out_proj.weight": lt.Override(torch.ones(4, 4))}
    tree.add("a", adapter=lt.Adapter({}, overrides=weight))
    model = lt.attach(tree, base)
    with pytest.raises(lt.errors.MergedOnly, match=r"a: attn\.out_proj: an override can't run"):
        model.activate("a", mode="unmerged")
    model.activate("a")
    assert torch.equal(base["attn"].out_proj.weight, torch.ones(4, 4))


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
def test_a_prepared_model_refuses_overrides_by_name() -> None:
    model = lt.attach(without_embeddings(zoo()), Net())
    model.prepare(max_rank=8)
    with pytest.raises(lt.errors.StateError, match=r"top/fr: .*: an override has no buffer"):
        model.activate("top/fr", mode="unmerged")


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
@pytest.mark.parametrize("before", ["", "top/de", "top/fr/legal"])
def test_a_fault_while_an_override_is_written_leaves_the_path_before(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = zoo(), Net()
    model = lt.attach(tree, base)
    model.activate(before)
    kept = copy.deepcopy(base.state_dict())
    write, left = lt.Override.write, [0]

    def failing(self: lt.Override, target: Tensor) -> None:
        write(self, target)
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("put in")

    monkeypatch.setattr(lt.Override, "write", failing)
    faults = 0
    while True:
        left[0] = faults + 1
        try:
            model.activate("top/fr/legal/x")
            break
        except MemoryError:
            faults += 1
        assert model.active == before
        assert all(torch.equal(kept[name], now) for name, now in base.state_dict().items())
    assert faults >= 2  # the head's weight and its bias, at least
    assert model.active == "top/fr/legal/x"


def test_rows_over_a_whole_embedding_are_one_override_when_flattened() -> None:
    tree = lt.AdapterTree()
    whole = {"embed.weight": lt.Override(drawn(9, 6, seed=1))}
    tree.add("a", adapter=lt.Adapter({}, overrides=whole))
    tree.add("a/b", adapter=lt.Adapter({}, overrides=rows(2, 4, 0)))
    tree.add("a/b/c", adapter=lt.Adapter({}, overrides=rows(3, 4, 7)))
    wanted = whole["embed.weight"].values.clone()
    wanted[[4, 0]] = rows(2, 4, 0)["embed.weight"].values
    wanted[[4, 7]] = rows(3, 4, 7)["embed.weight"].values
    flat = tree.flatten("a/b/c").overrides["embed.weight"]
    assert flat.rows is None
    assert torch.equal(flat.values, wanted)
    base = Net()
    model = lt.attach(tree, base)
    model.activate("a/b/c")
    assert torch.equal(base.embed.weight, wanted)
    model.activate("a/b/c", mode="unmerged")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(out_of(base.embed, ids), wanted[None], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")
def test_a_weight_per_module_counts_beside_overrides_in_every_mode() -> None:
    """A number of 0 at a module switches its override off; any other leaves it whole."""
    tree = without_embeddings(zoo())
    tree.update("top/fr", weight={"score": 0.5, "default": 2.0})
    tree.update("top/de", weight={"score": 0})
    wanted = {}
    for path, factors in (("top/fr", {"score": 0.5, "lin": 2.0}), ("top/de", {"lin": 1.0})):
        net = Net().double()
        top, adapter = tree.adapter("top"), tree.adapter(path)
        assert top is not None
        assert adapter is not None
        with torch.no_grad():
            for name, value in top.modules.items():
                if path == "top/de" or name == "lin":
                    net.get_submodule(name).weight += value.dense(dtype=torch.float64)
            for tensor, override in adapter.overrides.items():
                own = net.get_parameter(tensor)
                if override.rows is not None:
                    own[list(override.rows)] = override.values.double()
                elif path == "top/fr":
                    own.copy_(override.values)
            for name, factor in factors.items():
                delta = adapter.modules[name].dense(dtype=torch.float64)
                net.get_submodule(name).weight += factor * delta
        wanted[path] = net
    base = Net().double()
    model = lt.attach(tree, base)
    ids = (torch.arange(12) % 9).reshape(2, 6)
    modes: tuple[Any, ...] = ("merged", "unmerged")
    for path, net in wanted.items():
        for mode in modes:
            model.activate(path, mode=mode)
            torch.testing.assert_close(out_of(base, ids), out_of(net, ids), rtol=1e-6, atol=1e-6)
    with model.route(list(wanted)):
        got = out_of(base, ids)
    for i, net in enumerate(wanted.values()):
        torch.testing.assert_close(got[i], out_of(net, ids[i]), rtol=1e-6, atol=1e-6)


def test_rows_of_a_head_are_computed_with_the_bias_that_stands_there() -> None:
    tree, base = lt.AdapterTree(), Net().double()
    row = {"score.weight": lt.Override(drawn(1, 6, seed=1), (2,))}
    bias = {"score.bias": lt.Override(drawn(4, seed=2))}
    tree.add("a", adapter=lt.Adapter({}, overrides={**row, **bias}))
    model = lt.attach(tree, base)
    ids = torch.arange(9)[None]
    model.activate("a")
    wanted = out_of(base, ids)
    model.activate("a", mode="unmerged")
    torch.testing.assert_close(out_of(base, ids), wanted, rtol=1e-12, atol=1e-12)
    with model.route(["a", ""]):
        got = out_of(base, ids.repeat(2, 1))
    torch.testing.assert_close(got[:1], wanted, rtol=1e-12, atol=1e-12)
    model.activate("")
    torch.testing.assert_close(got[1:], out_of(base, ids), rtol=0, atol=0)
