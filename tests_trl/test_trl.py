"""trl's trainers over a path of a tree, step by step beside trl over PEFT.

The node that trains is on the third level, over a frozen domain and a frozen task; for PEFT these
two are added into the base's weights. Losses of every step and the factors at the end have to
agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import (
    DOMAIN,
    POLICY,
    assert_same_factors,
    base,
    begin_alike,
    judged,
    losses,
    merged,
    model,
    pairs,
    peft_config,
    prompts,
    settings,
    texts,
    tokenizer,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

import lora_tree as lt
from lora_tree.errors import DivergedError, SpecError, StateError
from lora_tree.integrations.trl import (
    TreeDPOTrainer,
    TreeGRPOTrainer,
    TreeKTOTrainer,
    TreeSFTTrainer,
)
from lora_tree.runs import Run, Settings, read_rows


def thirds(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells nearly every two completions apart."""
    return [sum(token % 3 for token in ids) / 8 for ids in completion_ids]


KINDS: dict[str, tuple[Any, Any, Any, Callable[..., Any], dict[str, Any]]] = {
    "sft": (TreeSFTTrainer, SFTTrainer, SFTConfig, texts, {}),
    "dpo": (TreeDPOTrainer, DPOTrainer, DPOConfig, pairs, {}),
    "kto": (TreeKTOTrainer, KTOTrainer, KTOConfig, judged, {}),
    "grpo": (TreeGRPOTrainer, GRPOTrainer, GRPOConfig, prompts, {"reward_funcs": thirds}),
}
GROUPS = dict(num_generations=2, max_completion_length=6, per_device_train_batch_size=4)


def ours(kind: str, of: lt.TreeModel, folder: Path, *, trains: str = POLICY, **more: Any) -> Any:
    made, _, config, data, extra = KINDS[kind]
    save_to = more.pop("save_to", None)
    return made(
        of.at(trains),
        args=settings(config, folder, **more),
        train_dataset=data(),
        processing_class=tokenizer(),
        save_to=save_to,
        **extra,
    )


def theirs(kind: str, of: lt.TreeModel, folder: Path, **more: Any) -> Any:
    _, made, config, data, extra = KINDS[kind]
    trainer = made(
        model=merged(of),
        args=settings(config, folder, **more),
        train_dataset=data(),
        processing_class=tokenizer(),
        peft_config=peft_config(),
        **extra,
    )
    begin_alike(trainer.model, of)
    return trainer


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("sft", dict(gradient_checkpointing=True)),
    ("sft", dict(packing=True, max_length=40)),
    ("sft", dict(packing=True, max_length=40, packing_strategy="wrapped")),
    ("sft", dict(padding_free=True, max_length=None)),
    ("sft", dict(weight_decay=0.1, gradient_accumulation_steps=2)),
    ("dpo", {}),
    ("dpo", dict(gradient_checkpointing=True)),
    (
        "dpo",
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    ),
    ("dpo", dict(precompute_ref_log_probs=True)),
    ("dpo", dict(loss_type=["ipo", "sft"], loss_weights=[1.0, 0.5], beta=0.3)),
    ("dpo", dict(ld_alpha=0.5, use_weighting=True)),
    ("kto", {}),
    ("kto", dict(gradient_checkpointing=True)),
    ("kto", dict(precompute_ref_log_probs=True)),
    ("grpo", dict(GROUPS, beta=0.1, temperature=0.7)),
    ("grpo", dict(GROUPS, beta=0.1, gradient_checkpointing=True, num_iterations=2)),
    ("grpo", dict(GROUPS)),
]


def told(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *map(str, case[1])])


@pytest.mark.parametrize("case", CASES, ids=told)
def test_every_loss_and_the_factors_are_those_of_trl_over_peft(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    kind, more = case
    of = model()
    # One after the other: a trainer seeds torch's generator when it is made, and GRPO draws from
    # it.
    other = theirs(kind, of, tmp_path / "o", **more)
    other.train()
    own = ours(kind, of, tmp_path / "own", **more)
    own.train()
    assert len(losses(own)) == 4
    torch.testing.assert_close(losses(own), losses(other), rtol=1e-4, atol=1e-6)
    assert_same_factors(of, other.model, tol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    more: dict[str, Any] = dict(GROUPS, beta=0.1) if kind == "grpo" else {}
    more |= dict(save_strategy="steps", save_steps=2, gradient_checkpointing=True)
    whole, again = model(), model()
    ours(kind, whole, tmp_path / "a", save_to=tmp_path / "zoo", **more).train()
    trainer = ours(kind, again, tmp_path / "a", **more)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    for mine, wanted in zip(again.factors.of(POLICY), whole.factors.of(POLICY), strict=True):
        assert torch.equal(mine, wanted)
    saved = lt.load(tmp_path / "zoo").adapter(POLICY)
    kept = lt.Adapter.load(tmp_path / f"a/checkpoint-4/nodes/{POLICY}")
    now = whole.tree.adapter(POLICY)
    assert saved is not None
    assert now is not None
    for name, value in now.modules.items():
        assert torch.equal(saved.modules[name].B, value.B)
        assert torch.equal(kept.modules[name].B, value.B)
    assert not list((tmp_path / "a/checkpoint-4").glob("model*.safetensors"))


def test_a_run_of_our_own_learns_preferences_as_trl_does(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    two = pairs(2)
    file.write_text("".join(json.dumps({"path": POLICY, **row}) + "\n" for row in two))
    one, other = model(), model()
    more: dict[str, Any] = dict(beta=0.2, gradient_checkpointing=True)
    trainer = TreeDPOTrainer(
        one.at(POLICY),
        args=settings(DPOConfig, tmp_path / "a", **more),
        train_dataset=two,
        processing_class=tokenizer(),
    )
    trainer.train()
    how = Settings(steps=4, batch=2, lr=1e-2, beta=0.2, schedule="constant", hold_back=0)
    run = Run(other, read_rows([file], other.tree, tokenizer()), how, tmp_path / "run")
    found = [step.losses[POLICY] for step in run.steps()]
    torch.testing.assert_close(found, losses(trainer), rtol=1e-5, atol=1e-6)
    for mine, wanted in zip(other.factors.of(POLICY), one.factors.of(POLICY), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-4, atol=2e-5)


# ---------------------------------------------------------------------- one base, and no copy of it
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_policy_and_reference_are_one_base_and_its_parent(kind: str, tmp_path: Path) -> None:
    of = model()
    before = {name: p.clone() for name, p in of.base.named_parameters()}
    more: dict[str, Any] = dict(GROUPS, beta=0.1) if kind == "grpo" else {}
    trainer = ours(kind, of, tmp_path, **more)
    assert trainer.ref_model.path == DOMAIN
    theirs_ids = {id(p) for p in trainer.ref_model.base.parameters()}
    assert theirs_ids == {id(p) for p in trainer.model.base.parameters()}
    assert theirs_ids == {id(p) for p in of.base.parameters()}
    trainer.train()
    for name, p in of.base.named_parameters():
        assert torch.equal(p, before[name])
    assert of.state is lt.State.BARE
    assert not of.base.is_activation_checkpointing


def test_a_root_node_has_the_bare_base_for_its_reference_and_another_may_be_named(
    tmp_path: Path,
) -> None:
    of = model()
    of.trainable("de")
    assert ours("dpo", of, tmp_path, trains="de").ref_model.path == ""
    word = dict(train_dataset=pairs(), processing_class=tokenizer())
    args = settings(DPOConfig, tmp_path)
    trainer = TreeDPOTrainer(of.at("de"), ref_model=of.at("fr"), args=args, **word)
    assert trainer.ref_model.path == "fr"
    with pytest.raises(SpecError, match="is a blend, and has no parent"):
        TreeDPOTrainer(of.at({"de": 1.0, "fr": 0.5}), args=args, **word)
    with pytest.raises(StateError, match=r"^de trains and is in the reference"):
        TreeDPOTrainer(of.at({"de": 1.0, "fr": 0.5}), ref_model=of.at("de"), args=args, **word)


def test_precomputed_log_probabilities_of_another_reference_are_not_taken_from_the_cache(
    tmp_path: Path,
) -> None:
    rows = pairs()
    rows.save_to_disk(str(tmp_path / "rows"))
    from datasets import load_from_disk

    found = []
    for seed in (1, 2):
        of = model(seed=seed)
        trainer = TreeDPOTrainer(
            of.at(POLICY),
            args=settings(DPOConfig, tmp_path / "o", precompute_ref_log_probs=True),
            train_dataset=load_from_disk(str(tmp_path / "rows")),
            processing_class=tokenizer(),
        )
        found.append(list(trainer.train_dataset["ref_chosen_logps"]))
    assert found[0] != found[1]


def test_trls_own_trainer_takes_path_models_as_they_are(tmp_path: Path) -> None:
    one, two = model(), model()
    ours("dpo", one, tmp_path / "a").train()
    stock = DPOTrainer(
        two.at(POLICY),
        ref_model=two.at(DOMAIN),
        args=settings(DPOConfig, tmp_path / "b", gradient_checkpointing=True),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )
    stock.train()
    for mine, wanted in zip(two.factors.of(POLICY), one.factors.of(POLICY), strict=True):
        torch.testing.assert_close(mine, wanted)


# ---------------------------------------------------------------------- what is refused
def test_what_would_not_hold_over_a_path_is_refused_by_name(tmp_path: Path) -> None:
    of = model()
    for given in (of, of.base):
        with pytest.raises(SpecError, match=f"given a {type(given).__name__}, not one path"):
            TreeDPOTrainer(given, args=settings(DPOConfig, tmp_path), train_dataset=pairs())
    with pytest.raises(StateError, match="nothing on 'de' trains"):
        ours("sft", of, tmp_path, trains="de")
    for kind, name, value in (
        ("dpo", "sync_ref_model", True),
        ("dpo", "padding_free", True),
        ("grpo", "use_vllm", True),
        ("grpo", "cast_lm_head_to_fp32", True),
        ("sft", "torch_compile", True),
        ("sft", "push_to_hub", True),
    ):
        groups = GROUPS if kind == "grpo" else {}
        with pytest.raises(SpecError, match=f"takes no {name}"):
            ours(kind, of, tmp_path, **{**groups, name: value})
    with pytest.raises(SpecError, match="peft_config: the policy is a node"):
        TreeSFTTrainer(
            of.at(POLICY),
            args=settings(SFTConfig, tmp_path),
            train_dataset=texts(),
            processing_class=tokenizer(),
            peft_config=peft_config(),
        )


def test_a_head_that_is_adapted_is_refused_because_trl_takes_its_weight_alone(
    tmp_path: Path,
) -> None:
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=["q_proj", "lm_head"]))
    tree.add("fr")
    of = lt.attach(tree, base())
    of.trainable("fr")
    with pytest.raises(StateError, match=r"^lm_head: the head is changed by fr"):
        ours("dpo", of, tmp_path, trains="fr")


def test_a_run_that_diverges_stops_and_the_tree_is_what_it_was(tmp_path: Path) -> None:
    of = model()
    before = [p.clone() for p in of.factors.of(POLICY)]
    trainer = ours("dpo", of, tmp_path, learning_rate=1e38, max_grad_norm=0.0)
    with pytest.raises(DivergedError, match=POLICY):
        trainer.train()
    for mine, wanted in zip(of.factors.of(POLICY), before, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_a_frozen_node_that_makes_outputs_infinite_is_named(tmp_path: Path, kind: str) -> None:
    of = model()
    adapter = of.tree.adapter(DOMAIN)
    assert adapter is not None
    of.tree.update(DOMAIN, adapter=adapter.with_tensors(lambda tensor: tensor * 1e30))
    trainer = ours(kind, of, tmp_path)
    with pytest.raises(
        DivergedError,
        match=rf"^{DOMAIN}: step 1: this frozen part alone makes the outputs not finite",
    ):
        trainer.train()
