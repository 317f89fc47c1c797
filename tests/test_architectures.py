"""Real architectures from transformers, tiny and random: merged, unmerged and flattened in PEFT are
the dense model.

Everything runs in float64, so that a wrong layout, scale or order can't hide in rounding, and once
in fp32 and bf16. What is compared with is `architectures.dense`, W + Σ c·s·B·A written out by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    ARCHS,
    BLEND,
    BLENDED,
    PATHS,
    VOCAB,
    Arch,
    along,
    assert_close,
    bits,
    deltas,
    dense,
    place,
    run,
    same_bits,
)
from peft import PeftModel
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import MergedOnly, TiedWeights

BLENDS: list[tuple[lt.Blend, dict[str, float]]] = [
    *((path, along(path)) for path in PATHS),
    (BLEND, BLENDED),
]
EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}

every_arch = pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)


def forward_hooks(base: nn.Module) -> list[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        f"{name}{kind}"
        for name, module in base.named_modules()
        for kind in kinds
        if getattr(module, kind)
    ]


# ---------------------------------------------------------------------- merged and unmerged
@every_arch
def test_merged_is_the_dense_model(arch: Arch) -> None:
    base, inputs = arch.base(), arch.inputs()
    tree, before, bare = arch.tree(base), bits(base), run(base, inputs)
    pristine = copy.deepcopy(base)
    model = lt.attach(tree, base)
    seen = [bare]
    for path, nodes in BLENDS:
        model.activate(path)
        assert_weights_are_the_sum(base, before, tree, nodes)
        assert not forward_hooks(base)
        out = run(base, inputs)
        assert_close(out, run(dense(pristine, tree, nodes), inputs))
        assert all((out - other).abs().max() > 0.01 for other in seen), (
            "every path should change the outputs"
        )
        seen.append(out)
    model.deactivate()
    assert torch.equal(run(base, inputs), bare)


def assert_weights_are_the_sum(
    base: nn.Module, before: dict[str, Tensor], tree: lt.AdapterTree, nodes: Any
) -> None:
    """Each weight on the path within ½ ulp of the exact sum and what R + 2 additions may lose;
    others bit for bit.
    """
    now = dict(base.state_dict())
    for name, delta, size, rank in deltas(tree, nodes):
        where, placed = place(base, name, delta)
        was, got = before[where].double(), now.pop(where)
        exact, sizes = was + placed, was.abs() + place(base, name, size)[1]
        u, wide = EPS[got.dtype], min(EPS[got.dtype], 2.0**-24)
        assert (
            (got.double() - exact).abs() <= u * exact.abs() + (rank + 2) * wide * sizes
        ).all(), where
        assert (got != before[where]).any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in now.items())


@every_arch
def test_unmerged_is_the_dense_model(arch: Arch) -> None:
    base, inputs = arch.base(), arch.inputs()
    tree, before, bare = arch.tree(base), bits(base), run(base, inputs)
    model = lt.attach(tree, base)
    for path, nodes in BLENDS:
        wanted = run(dense(base, tree, nodes), inputs)
        with model.using(path, mode="unmerged"):
            assert same_bits(base, before)
            for _ in range(2):  # the first forward is watched, the second is not
                assert_close(run(base, inputs), wanted)
    assert torch.equal(run(base, inputs), bare)


def test_an_embedding_with_a_forward_of_its_own_is_merged_only() -> None:
    """Whisper's decoder gives its position table token ids, and the table looks up positions: PEFT
    goes wrong there.
    """
    arch = ARCHS["whisper"]
    base, inputs = arch.base(), arch.inputs()
    tree = arch.tree(base)
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    value = lt.LowRank(A.double(), B.double(), layout=lt.Layout("embedding"))
    tree.add("at", adapter=lt.Adapter({"model.decoder.embed_positions": value}))
    wanted = run(dense(base, tree, {"at": 1.0}), inputs)
    model = lt.attach(tree, base)
    with pytest.raises(
        MergedOnly, match="can't run unmerged: WhisperPositionalEmbedding has a forward of its own"
    ):
        model.activate("at", mode="unmerged")
    model.activate("at")
    assert_close(run(base, inputs), wanted)


def _redrawn(arch: Arch, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The architecture's inputs with other numbers in them: one draw's rounding may cancel by luck,
    many draws' not.
    """
    draw = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(v.shape, generator=draw).to(dtype)
        if v.is_floating_point()
        else (v if k == "attention_mask" else torch.randint(3, VOCAB, v.shape, generator=draw))
        for k, v in arch.inputs().items()
    }


def run_all(model: Any, asked: list[dict[str, Tensor]]) -> Tensor:
    """The logits of every draw, in float64; a float64 model is given the same numbers, widened."""
    wide = next(model.parameters()).dtype == torch.float64
    given = [
        {k: v.double() if wide and v.is_floating_point() else v for k, v in x.items()}
        for x in asked
    ]
    return torch.stack([run(model, x).double() for x in given])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "whisper"])
def test_in_narrow_dtypes_no_mode_is_twice_as_wrong_as_the_dense_model(
    name: str, dtype: torch.dtype
) -> None:
    arch = ARCHS[name]
    base = arch.base().to(dtype)
    tree = arch.tree(base, factors=torch.float32)
    before, nodes = bits(base), along("a/b/c")
    asked = [_redrawn(arch, seed, dtype) for seed in range(16)]
    exact = run_all(dense(copy.deepcopy(base).double(), tree, nodes), asked)
    error = (
        run_all(dense(base, tree, nodes), asked) - exact
    ).norm()  # the dense model's own, in this dtype
    model = lt.attach(tree, base)
    with model.using("a/b/c"):
        assert_weights_are_the_sum(base, before, tree, nodes)
        assert (run_all(base, asked) - exact).norm() <= 2 * error
    with model.using("a/b/c", mode="unmerged"):
        assert (run_all(base, asked) - exact).norm() <= 2 * error
    assert same_bits(base, before)


# ---------------------------------------------------------------------- generate
def greedy(model: Any, arch: Arch, **options: Any) -> list[list[int]]:
    assert arch.generates is not None
    options = {"do_sample": False, "max_new_tokens": 6, **options}
    return model.generate(**arch.generates(), **options).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
@pytest.mark.parametrize("name", [n for n, a in ARCHS.items() if a.generates])
def test_generate_gives_the_tokens_of_the_dense_model_and_the_bare_ones_after(
    name: str, mode: Any
) -> None:
    arch = ARCHS[name]
    base = arch.base()
    tree = arch.tree(base)
    bare, inner, outer = (
        greedy(dense(base, tree, n), arch) for n in ({}, along("a/b/c"), along("a/d"))
    )
    assert bare != inner != outer != bare
    model = lt.attach(tree, base)
    with model.using("a/d", mode=mode):
        assert greedy(base, arch) == outer
        with model.using("a/b/c", mode=mode):
            assert greedy(base, arch) == inner
        assert greedy(base, arch) == outer
        assert (model.active, model.state.value) == ("a/d", mode)
    assert greedy(base, arch) == bare
    assert not forward_hooks(base)


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_beams_and_several_sequences_are_those_of_the_dense_model(mode: Any) -> None:
    arch = ARCHS["llama"]
    base = arch.base()
    tree = arch.tree(base)
    options = dict(num_beams=3, num_return_sequences=2)
    wanted = greedy(dense(base, tree, along("a/b/c")), arch, **options)
    with lt.attach(tree, base).using("a/b/c", mode=mode):
        assert greedy(base, arch, **options) == wanted


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_decoder_that_starts_from_a_finished_cache_is_not_taken_for_a_silent_one(
    name: str,
) -> None:
    """Cross-attention's k and v are called once and read from the cache afterwards, as in every
    step of generate.
    """
    arch = ARCHS[name]
    base, inputs = arch.base(), arch.inputs()
    tree = arch.tree(base)
    start, rest = inputs["decoder_input_ids"].split([3, 1], dim=1)
    whole = run(dense(base, tree, along("a/d")), inputs)[:, -1:]
    model = lt.attach(tree, base)
    with model.using("a/d", mode="unmerged"), torch.no_grad():
        begun = base(**{**inputs, "decoder_input_ids": start}, use_cache=True)
        encoded = {"encoder_outputs": (begun.encoder_last_hidden_state,)}
        step = base(**encoded, decoder_input_ids=rest, past_key_values=begun.past_key_values)
    assert_close(step.logits, whole)


# ---------------------------------------------------------------------- flattened, in PEFT
quiet_peft = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
    ),
    pytest.mark.filterwarnings(
        "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
    ),
    # said of raw parameters, whose patterns PEFT does use
    pytest.mark.filterwarnings(
        r"ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning:peft"
    ),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft"),
]


def with_quiet_peft(test: Any) -> Any:
    for mark in quiet_peft:
        test = mark(test)
    return test


def in_peft(base: nn.Module, folder: Path) -> Any:
    return (
        PeftModel.from_pretrained(copy.deepcopy(base), folder)
        .to(next(base.parameters()).dtype)
        .eval()
    )


@with_quiet_peft
@every_arch
def test_a_flattened_path_gives_the_same_outputs_in_peft(arch: Arch, tmp_path: Path) -> None:
    base, inputs = arch.base(), arch.inputs()
    tree = arch.tree(base)
    for number, (path, nodes) in enumerate(BLENDS[2:]):
        tree.flatten(path).save(tmp_path / str(number))
        peft = in_peft(base, tmp_path / str(number))
        if arch is ARCHS["whisper"]:
            with pytest.raises(AttributeError, match="stride"):
                run(peft, inputs)  # PEFT wraps the convolutions, and Whisper reads their stride
            peft = peft.merge_and_unload()
        assert_close(run(peft, inputs), run(dense(base, tree, nodes), inputs))
        model = lt.attach(tree, base)
        with model.using(path):
            assert_close(run(peft, inputs), run(base, inputs))
        model.detach()


@with_quiet_peft
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_flattened_path_generates_the_same_tokens_in_peft(name: str, tmp_path: Path) -> None:
    arch = ARCHS[name]
    base = arch.base()
    tree = arch.tree(base, factors=torch.float32)
    tree.flatten("a/b/c").save(tmp_path / "flat")
    assert greedy(in_peft(base, tmp_path / "flat"), arch) == greedy(
        dense(base, tree, along("a/b/c")), arch
    )


# ---------------------------------------------------------------------- bare means bare
def state(base: nn.Module) -> dict[str, Any]:
    """Everything about a base that is not the numbers: identities, addresses, flags, hooks,
    attributes.
    """
    parameters = list(base.named_parameters(remove_duplicate=False))
    return {
        "parameters": [
            (n, id(p), p.data_ptr(), p.requires_grad, p.dtype, p.stride(), p.grad)
            for n, p in parameters
        ],
        "buffers": [(n, id(b), b.data_ptr()) for n, b in base.named_buffers()],
        "keys": list(base.state_dict()),
        "flags": [(n, m.training, type(m)) for n, m in base.named_modules()],
        "hooks": [(n, kind, list(hooks.items())) for n, kind, hooks in _hooks(base)],
        "attributes": [(n, sorted(vars(m))) for n, m in base.named_modules()],
    }


def _hooks(base: nn.Module) -> Iterator[tuple[str, str, dict[int, Any]]]:
    for name, module in base.named_modules():
        for kind, hooks in vars(module).items():
            if "_hooks" in kind and isinstance(hooks, dict):
                yield name, kind, hooks


@every_arch
def test_after_deactivate_and_detach_nothing_of_ours_is_left(arch: Arch) -> None:
    base, inputs = arch.base(), arch.inputs()
    tree = arch.tree(base)
    run(base, inputs)
    for i, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    next(iter(base.children())).train()
    before, numbers = state(base), bits(base)
    assert any(kind == "_forward_hooks" for _, kind, _ in _hooks(base))
    model = lt.attach(tree, base)
    for mode in ("merged", "unmerged") * 2:
        for path in ("a/b/c", "a/d", BLEND):
            model.activate(path, mode=mode)  # type: ignore[arg-type]
            now = state(base)
            if mode == "unmerged":  # the forward of a module that reads its own weight is watched
                now["attributes"] = [
                    (n, [a for a in names if a != "forward"]) for n, names in now["attributes"]
                ]
            assert [now[k] for k in ("parameters", "buffers", "keys", "flags", "attributes")] == [
                before[k] for k in ("parameters", "buffers", "keys", "flags", "attributes")
            ]
            run(base, inputs)
        model.deactivate()
        assert state(base) == before
        assert same_bits(base, numbers)
    model.activate("a/b/c", mode="unmerged")  # type: ignore[arg-type]
    model.detach()
    assert state(base) == before
    assert same_bits(base, numbers)


# ---------------------------------------------------------------------- tied weights
def one_module(base: nn.Module, name: str) -> lt.AdapterTree:
    torch.manual_seed(4)
    module = base.get_submodule(name)
    out, into = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
    layout = lt.Layout("linear" if isinstance(module, nn.Linear) else "embedding")
    value = lt.LowRank(
        torch.randn(2, into).double() / 8, torch.randn(out, 2).double(), 1.5, layout=layout
    )
    tree = lt.AdapterTree()
    tree.add("one", adapter=lt.Adapter({name: value}))
    return tree


@with_quiet_peft
@pytest.mark.parametrize("side", [0, 1], ids=["head", "embedding"])
@pytest.mark.parametrize(
    "arch", [a for a in ARCHS.values() if a.tied], ids=[n for n, a in ARCHS.items() if a.tied]
)
def test_a_tied_weight_is_refused_merged_and_changed_alone_unmerged(
    arch: Arch, side: int, tmp_path: Path
) -> None:
    assert arch.tied
    base, inputs, name, other = arch.base(), arch.inputs(), arch.tied[side], arch.tied[1 - side]
    assert base.get_submodule(name).weight is base.get_submodule(other).weight
    tree = one_module(base, name)
    model = lt.attach(tree, base)
    with pytest.raises(TiedWeights) as refused:
        model.activate("one")
    first, *choices = str(refused.value).splitlines()
    assert first.startswith(f"one: {name}: its weight is tied to ")
    assert f"{other}.weight" in first
    assert [word for word, line in zip(("unmerged", "untie", "leave"), choices, strict=True) if word in line] == [
        "unmerged", "untie", "leave",
    ]  # fmt: skip
    wanted = run(dense(base, tree, {"one": 1.0}), inputs)  # `dense` unties
    assert (wanted - run(base, inputs)).abs().max() > 0.01
    with model.using("one", mode="unmerged"):
        assert_close(run(base, inputs), wanted)
    tree.flatten("one").save(tmp_path / "flat")
    assert_close(run(in_peft(base, tmp_path / "flat"), inputs), wanted)


def test_untied_as_the_error_says_the_weight_can_be_merged() -> None:
    arch = ARCHS["llama, tied"]
    base, inputs = arch.base(), arch.inputs()
    tree = one_module(base, "lm_head")
    wanted = run(dense(base, tree, {"one": 1.0}), inputs)
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    with lt.attach(tree, base).using("one"):
        assert_close(run(base, inputs), wanted)


def test_a_weight_tied_after_it_was_merged_once_is_refused() -> None:
    base = ARCHS["llama"].base()
    model = lt.attach(one_module(base, "lm_head"), base)
    with model.using("one"):
        pass
    base.model.embed_tokens.weight = base.lm_head.weight
    with pytest.raises(
        TiedWeights, match=r"lm_head: its weight is tied to model\.embed_tokens\.weight"
    ):
        model.activate("one")


def test_a_shared_embedding_that_is_never_called_names_those_that_are() -> None:
    """T5's ``shared`` only owns the weight; its encoder and decoder look up in tables of their own,
    tied to it.
    """
    arch = ARCHS["t5"]
    base = arch.base()
    model = lt.attach(one_module(base, "shared"), base)
    with pytest.raises(TiedWeights, match=r"shared: its weight is tied to .*encoder\.embed_tokens"):
        model.activate("one")
    model.activate("one", mode="unmerged")
    with pytest.raises(
        MergedOnly, match=r"(?s)shared: T5.* without calling it.*decoder\.embed_tokens.* instead"
    ):
        run(base, arch.inputs())


def test_a_tied_bias_that_no_adapter_adds_to_is_no_hindrance() -> None:
    """BERT's decoder shares its bias with ``cls.predictions``, whatever becomes of its weight."""
    arch = ARCHS["bert"]
    base, inputs = arch.base(), arch.inputs()
    decoder = base.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    assert decoder.bias is base.cls.predictions.bias
    tree = one_module(base, "cls.predictions.decoder")
    wanted = run(dense(base, tree, {"one": 1.0}), inputs)
    model = lt.attach(tree, base)
    with model.using("one"):
        assert_close(run(base, inputs), wanted)
    adapter = tree.adapter("one")
    assert adapter is not None
    tree.update(
        "one", adapter=adapter.map(lambda v: replace(v, bias=torch.ones(v.shape[0]).double()))
    )
    with pytest.raises(TiedWeights, match=r"decoder: its bias is tied to cls\.predictions\.bias"):
        model.activate("one")
