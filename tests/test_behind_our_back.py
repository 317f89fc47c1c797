"""What others do to a base while a tree is attached: wrap it, save it, cast, load, resize or
replace its weights.

While bare, the next activation starts from what the weights are now. While a path is merged,
nothing is guessed: the next switch is refused until somebody says which weights are the base's own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import ARCHS, along, assert_close, bits, dense, run, same_bits
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import lora_tree as lt
from lora_tree.errors import BaseMismatch, ForeignWrite, StateError, TiedWeights

ARCH = ARCHS["llama, tied"]  # its adapters leave the vocabulary alone, so it can be resized
WHOLE = ARCHS["llama"]  # its adapters change embeddings and head as well
MODES: tuple[Any, ...] = ("merged", "unmerged")
Q = "model.layers.0.self_attn.q_proj"


def other_numbers() -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    return {name: torch.randn_like(tensor) / 6 for name, tensor in ARCH.base().state_dict().items()}


def write_under_no_grad(base: Any) -> None:
    with torch.no_grad():
        base.get_parameter(f"{Q}.weight").mul_(2)


def replace_parameter(base: Any) -> None:
    module = base.get_submodule(Q)
    module.weight = nn.Parameter(module.weight.detach() * 2)


def replace_module(base: Any) -> None:
    torch.manual_seed(9)
    base.model.layers[0].self_attn.q_proj = nn.Linear(32, 32, bias=False).double()


DEEDS: dict[str, Callable[[Any], Any]] = {
    "to(bfloat16)": lambda base: base.to(torch.bfloat16),
    "load_state_dict": lambda base: base.load_state_dict(other_numbers()),
    "load_state_dict(assign)": lambda base: base.load_state_dict(other_numbers(), assign=True),
    "p.data.add_": lambda base: base.get_parameter(f"{Q}.weight").data.add_(0.5),
    "p.mul_": write_under_no_grad,
    "a new parameter": replace_parameter,
    "a new module": replace_module,
}
every_deed = pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)


# ---------------------------------------------------------------------- weights
@every_deed
def test_a_base_changed_while_bare_is_what_the_next_activation_starts_from(
    deed: Callable[[Any], Any],
) -> None:
    base = ARCH.base()
    tree = ARCH.tree(base)
    model = lt.attach(tree, base)
    for mode in MODES:
        with model.using("a/b/c", mode=mode):
            pass
    deed(base)
    now, alone = bits(base), copy.deepcopy(base)
    wanted = dense(base, tree, along("a/b/c"))
    with lt.attach(tree, alone).using("a/b/c", mode="unmerged"):
        beside = run(alone, ARCH.inputs())
    with model.using("a/b/c"):
        for name, parameter in wanted.named_parameters():
            got = base.get_parameter(name)
            if parameter.dtype == torch.bfloat16:
                assert int((got != parameter).sum()) <= parameter.numel() // 1000
            else:
                torch.testing.assert_close(got, parameter, rtol=1e-13, atol=1e-13)
    with model.using("a/b/c", mode="unmerged"):
        assert same_bits(base, now)
        assert torch.equal(run(base, ARCH.inputs()), beside)
        if base.dtype == torch.float64:
            assert_close(beside, run(wanted, ARCH.inputs()))
    assert same_bits(base, now)


def test_after_a_switch_that_failed_a_bare_weight_is_still_the_owners_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(False)
    values = {
        "0": lt.LowRank(torch.ones(1, 4), torch.ones(3, 1)),
        "1": lt.LowRank(torch.ones(1, 3), torch.ones(2, 1)),
    }
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter(values))
    model = lt.attach(tree, base)
    with model.using("a"):
        pass  # from here on there are copies of both weights

    def fail(*args: object) -> None:
        raise RuntimeError("at the first write")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="at the first write"):
        patch.setattr("lora_tree.engine.arithmetic.write_sum", fail)
        model.activate("a")
    base[1].weight.mul_(2)  # the second weight was not begun, and no path is merged into it
    now = base[1].weight.clone()
    model.activate("a")
    torch.testing.assert_close(base[1].weight, now + 1)
    model.deactivate()
    assert torch.equal(base[1].weight, now)


@every_deed
def test_a_base_changed_while_merged_is_refused_with_the_choices(
    deed: Callable[[Any], Any],
) -> None:
    base = ARCH.base()
    model = lt.attach(ARCH.tree(base), base)
    model.activate("a/b/c")
    deed(base)
    now = bits(base)
    attempts: list[Callable[[], None]] = [
        lambda: model.activate("a/d"),
        lambda: model.activate("a/b/c"),
        lambda: model.activate("a/d", mode="unmerged"),
        model.deactivate,
        model.detach,
    ]
    for attempt in attempts:
        with pytest.raises(ForeignWrite) as refused:
            attempt()
        message = str(refused.value)
        assert f"{Q}.weight" in message
        for choice in (
            'model.trust("pristine")',
            'model.trust("weights")',
            "model.deactivate() before loading",
        ):
            assert choice in message
        assert same_bits(base, now)
        assert (model.active, model.state) == ("a/b/c", lt.State.MERGED)


@pytest.mark.parametrize("name", [name for name in DEEDS if name != "a new module"])
def test_trusting_pristine_puts_the_base_back(name: str) -> None:
    base = ARCH.base()
    tree, untouched = ARCH.tree(base), ARCH.base()
    model = lt.attach(tree, base)
    model.activate("a/b/c")
    sites = {f"{n}.weight" for n in (model.tree.flatten("a/b/c").modules)}
    DEEDS[name](base)
    after = bits(base)
    model.trust("pristine")
    for key, tensor in base.state_dict().items():
        own = untouched.state_dict()[key].to(tensor.dtype)
        assert torch.equal(tensor, own if key in sites else after[key]), key
    assert (model.active, model.state) == ("", lt.State.BARE)
    model.activate("a/b/c")
    model.deactivate()


@every_deed
def test_trusting_the_weights_takes_them_for_the_base(deed: Callable[[Any], Any]) -> None:
    base = ARCH.base()
    tree = ARCH.tree(base)
    model = lt.attach(tree, base)
    model.activate("a/b/c")
    deed(base)
    now = bits(base)
    model.trust("weights")
    assert same_bits(base, now)
    assert (model.active, model.state) == ("", lt.State.BARE)
    wanted = dense(base, tree, along("a/d"))
    with model.using("a/d"):
        if base.dtype == torch.float64:
            assert_close(run(base, ARCH.inputs()), run(wanted, ARCH.inputs()))
    assert same_bits(base, now)


@pytest.mark.parametrize("new", [70, 50])
def test_a_resized_vocabulary_is_noticed(new: int) -> None:
    """`resize_token_embeddings` gives the embedding other numbers and the model another head."""
    base = WHOLE.base()
    model = lt.attach(WHOLE.tree(base), base)
    for mode in MODES:
        with model.using("a/b/c", mode=mode):
            pass
    base.resize_token_embeddings(new, mean_resizing=False)
    now = bits(base)
    for _ in range(2):  # a refusal must not be forgotten
        for mode in MODES:
            with pytest.raises(
                BaseMismatch,
                match=rf"a/b/c: (lm_head|model\.embed_tokens): .*\(61.*needs .*\b{new}\b",
            ):
                model.activate("a/b/c", mode=mode)
    wanted, inputs = (
        dense(base, model.tree, along("a/b")),
        {"input_ids": torch.arange(3, new)[None]},
    )
    with model.using("a/b"):  # changes no vocabulary
        assert_close(run(base, inputs), run(wanted, inputs))
    assert same_bits(base, now)


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_an_embedding_resized_in_its_place_is_noticed(mode: Any) -> None:
    """The same module object with another weight in it: what was checked against the old one is
    checked again.
    """
    base = WHOLE.base()
    tree = lt.AdapterTree()
    value = lt.LowRank(torch.ones(2, 61), torch.ones(32, 2), layout=lt.Layout("embedding"))
    tree.add("words", adapter=lt.Adapter({"model.embed_tokens": value}))
    model, module = lt.attach(tree, base), base.model.embed_tokens
    with model.using("words", mode=mode):
        pass
    base.resize_token_embeddings(70, mean_resizing=False)
    assert base.model.embed_tokens is module
    with pytest.raises(
        BaseMismatch, match=r"words: model\.embed_tokens: .*\(2, 61\).*needs \(2, 70\)"
    ):
        model.activate("words", mode=mode)


def test_a_vocabulary_resized_while_merged_can_not_be_put_back() -> None:
    base = WHOLE.base()
    model = lt.attach(WHOLE.tree(base), base)
    model.activate("a/b/c")
    base.resize_token_embeddings(70, mean_resizing=False)
    now = bits(base)
    with pytest.raises(
        ForeignWrite, match=r"^lm_head\.weight, model\.embed_tokens\.weight: written or replaced"
    ):
        model.deactivate()
    with pytest.raises(
        ForeignWrite,
        match=r"(?s)lm_head\.weight, model\.embed_tokens\.weight: .*resized.*trust\(\"weights",
    ):
        model.trust("pristine")
    assert same_bits(base, now)
    assert model.state is lt.State.MERGED
    model.trust("weights")
    assert same_bits(base, now)
    model.activate("a/b")


def test_a_module_replaced_while_merged_can_come_back() -> None:
    base = ARCH.base()
    before = bits(base)
    model = lt.attach(ARCH.tree(base), base)
    model.activate("a/b/c")
    old = base.get_submodule(Q)
    replace_module(base)
    with pytest.raises(
        ForeignWrite, match=r"q_proj\.weight: replaced or resized .*\n  put the old module back"
    ):
        model.trust("pristine")
    base.model.layers[0].self_attn.q_proj = old
    model.deactivate()
    assert same_bits(base, before)


def test_pristine_can_not_be_trusted_where_none_was_kept() -> None:
    base = ARCH.base()
    with pytest.warns(lt.MergedWarning):
        model = lt.attach(ARCH.tree(base), base, pristine="none")
    model.activate("a")
    with pytest.raises(StateError, match=r'pristine="none" kept no copies'):
        model.trust("pristine")
    assert (model.active, model.state) == ("a", lt.State.MERGED)


def test_one_weight_under_two_names_is_written_by_one_of_them_at_a_time() -> None:
    """``q_proj`` as a module and ``q_proj.weight`` as a raw parameter are the same numbers."""
    base = ARCH.base()
    A, B = torch.randn(2, 32).double(), torch.randn(32, 2).double()
    tree = lt.AdapterTree()
    tree.add("module", adapter=lt.Adapter({Q: lt.LowRank(A, B)}))
    raw = lt.LowRank(A[None], B[None], 2.0, layout=lt.Layout("parameter"))
    tree.add("raw", adapter=lt.Adapter({f"{Q}.weight": raw}))
    tree.add("module/raw", adapter=tree.adapter("raw"))
    model = lt.attach(tree, base)
    with pytest.raises(TiedWeights, match=rf"{Q} and {Q}\.weight are two names of one weight"):
        model.activate("module/raw")
    was = base.get_parameter(f"{Q}.weight").detach().clone()
    for path, scale in (("module", 1), ("raw", 2), ("module", 1), ("raw", 2), ("", 0)):
        model.activate(path)
        torch.testing.assert_close(
            base.get_parameter(f"{Q}.weight").detach(), was + scale * (B @ A)
        )
    assert torch.equal(base.get_parameter(f"{Q}.weight"), was)


def test_a_raw_parameter_written_while_merged_is_named_as_it_is() -> None:
    base = ARCHS["mixtral, experts"].base()
    model = lt.attach(ARCHS["mixtral, experts"].tree(base), base)
    model.activate("a")
    base.model.layers[1].mlp.experts.down_proj.data.zero_()
    with pytest.raises(
        ForeignWrite, match=r"^model\.layers\.1\.mlp\.experts\.down_proj: written or replaced"
    ):
        model.deactivate()


def test_a_write_to_one_column_of_a_large_weight_is_noticed() -> None:
    """Without autograd's counter a sample has to see it, so the sample must not lie in one
    column.
    """
    base = nn.ModuleDict({"m": nn.Linear(256, 512, bias=False)})
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m": lt.LowRank(torch.ones(1, 256), torch.ones(512, 1))}))
    model = lt.attach(tree, base)
    model.activate("a")
    base["m"].weight.data[:, 1:64] += 1
    with pytest.raises(ForeignWrite, match=r"^m\.weight: written or replaced"):
        model.deactivate()


def test_a_write_to_one_number_is_noticed_where_torch_counts_it() -> None:
    base = nn.ModuleDict({"m": nn.Linear(256, 512, bias=False)})
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"m": lt.LowRank(torch.ones(1, 256), torch.ones(512, 1))}))
    model = lt.attach(tree, base)
    model.activate("a")
    with torch.no_grad():
        base["m"].weight[7, 11] += 1
    with pytest.raises(ForeignWrite, match=r"^m\.weight: written or replaced"):
        model.deactivate()


def test_a_cast_leaves_no_trace_of_the_dtype_before_in_a_side_path() -> None:
    """Scales are folded in the widest dtype at hand, so what was folded in fp32 is folded again in
    float64.
    """
    base, inputs = ARCH.base().float(), ARCH.inputs()
    tree = ARCH.tree(base, factors=torch.float32)
    model = lt.attach(tree, base)
    with model.using("a/b/c", mode="unmerged"):
        run(base, inputs)
    base.double()
    wanted = run(dense(base, tree, along("a/b/c")), inputs)
    with model.using("a/b/c", mode="unmerged"):
        assert_close(run(base, inputs), wanted)


# ---------------------------------------------------------------------- saving
def test_saving_a_merged_base_warns_and_a_bare_one_does_not(tmp_path: Path) -> None:
    base = ARCH.base()
    tree = ARCH.tree(base)
    wanted = dense(base, tree, along("a/b/c"))
    model = lt.attach(tree, base)
    model.activate("a/b/c")
    with pytest.warns(lt.MergedWarning, match=r"merged into it; deactivate\(\) first"):
        base.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.state_dict()  # only saving warns
        model.activate("a/b/c", mode="unmerged")
        base.save_pretrained(tmp_path / "unmerged")
        model.deactivate()
        base.save_pretrained(tmp_path / "bare")
    for name, right in (("merged", wanted), ("unmerged", ARCH.base()), ("bare", ARCH.base())):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        assert_close(run(loaded, ARCH.inputs()), run(right, ARCH.inputs()))


# ---------------------------------------------------------------------- wrappers
def test_a_base_wrapped_by_peft_is_refused_by_name() -> None:
    base = ARCH.base()
    tree = ARCH.tree(base)
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    for found in (
        wrapped,
        wrapped.base_model,
        base,
    ):  # PEFT has put its layers into the base itself
        with pytest.raises(
            StateError, match=r"the base is wrapped by PEFT \(peft\.\S+\)\n  peft_model\.unload\(\)"
        ):
            lt.attach(tree, found)
    bare = wrapped.unload()
    wanted = run(dense(bare, tree, along("a")), ARCH.inputs())
    with lt.attach(tree, bare).using("a"):
        assert_close(run(bare, ARCH.inputs()), wanted)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
@pytest.mark.usefixtures("one_process")
def test_a_base_wrapped_by_ddp_is_looked_through(mode: Any) -> None:
    base = ARCH.base()
    tree = ARCH.tree(base)
    wanted, bare = run(dense(base, tree, along("a/b/c")), ARCH.inputs()), run(base, ARCH.inputs())
    wrapped = nn.parallel.DistributedDataParallel(base)
    model = lt.attach(tree, wrapped)
    assert model.base is base
    with model.using("a/b/c", mode=mode):
        assert_close(run(wrapped, ARCH.inputs()), wanted)
    assert torch.equal(run(wrapped, ARCH.inputs()), bare)


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(base)", "base.compile()"])
def test_a_compiled_base_is_switched_merged_and_refused_unmerged(in_place: bool) -> None:
    base = ARCH.base()
    tree = ARCH.tree(base)
    wanted, bare = run(dense(base, tree, along("a/b/c")), ARCH.inputs()), run(base, ARCH.inputs())
    compiled: Any = base
    if in_place:
        base.compile(backend="eager")
    else:
        compiled = torch.compile(base, backend="eager")
    assert_close(run(compiled, ARCH.inputs()), bare)
    model = lt.attach(tree, compiled)
    assert model.base is base
    with pytest.raises(StateError, match=r"compiled .*\n  activate\(…, mode=\"merged\"\) works"):
        model.activate("a/b/c", mode="unmerged")
    with model.using("a/b/c"):
        assert_close(run(compiled, ARCH.inputs()), wanted)
    assert_close(run(compiled, ARCH.inputs()), bare)
    torch.compiler.reset()


def test_a_base_that_compiles_itself_after_attach_is_refused_unmerged() -> None:
    base = ARCH.base()
    model = lt.attach(ARCH.tree(base), base)
    base.compile(backend="eager")
    with pytest.raises(StateError, match="compiled"):
        model.activate("a", mode="unmerged")
