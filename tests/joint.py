"""A tiny float64 Llama, a tree over it, rows with paths, and what training them together has to
come to.

The oracle is torch's own: a dense weight W + Σ c·s·B·A for every path, one optimiser for every
node, stepped only where the node had rows, clipped by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

import lora_tree as lt

VOCABULARY, TOKENS = 20, 6
PATHS = ("a", "a/b", "a/b/c", "d")
CLIP, DECAY = 0.5, 0.1
RATES = {"a": 0.02, "a/b": 0.01, "a/b/c": 0.03, "d": 0.01}


def base(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes: dict[str, Any] = dict(
        hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1
    )
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).to(dtype)


def tree(of: LlamaForCausalLM, dtype: torch.dtype = torch.float64) -> lt.AdapterTree:
    """a → b → c, and d; every factor is drawn, so that all of them have gradients."""
    g = torch.Generator().manual_seed(2)
    made = lt.AdapterTree()
    for i, path in enumerate(PATHS):
        modules = {}
        for name, module in of.named_modules():
            if name.endswith(("q_proj", "v_proj", "down_proj")):
                out, into = module.weight.shape
                A, B = torch.randn(i + 1, into, generator=g), torch.randn(out, i + 1, generator=g)
                modules[name] = lt.LowRank((A * 0.3).to(dtype), (B * 0.3).to(dtype), 0.5 + i)
        made.add(path, adapter=lt.Adapter(modules), weight=0.75 if path == "a" else 1.0)
    return made


def rows(paths: Sequence[str], seed: int = 3) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for path in paths:
        ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=g)
        labels = ids.clone()
        labels[torch.rand(TOKENS, generator=g) < 0.3] = -100
        labels[2] = ids[2]  # every row learns something
        made.append({"path": path, "input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def misleading_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return 40 rows of a/b/c, and the quarter of them that is held back.

    The others are one row over and over. What they teach is wrong for nine in ten of those held
    back, which have other labels.
    """
    (one,) = rows(["a/b/c"])
    wrong = [label if label < 0 else (label + 7) % VOCABULARY for label in one["labels"]]
    made = [dict(one) for _ in range(40)]
    held = [dict(one) if i > 8 else {**one, "labels": wrong} for i in range(10)]
    for i, row in enumerate(held):
        made[4 * i + 2] = row  # where a quarter of 40 rows lies, evenly
    return made, held


def groups(model: lt.TreeModel, *training: str) -> list[dict[str, Any]]:
    found = model.trainable(*training)
    return [{**g, "lr": RATES[g["name"]], "clip_norm": CLIP, "weight_decay": DECAY} for g in found]


def factors(of: lt.AdapterTree) -> dict[str, list[Tensor]]:
    """Node → A and B of every module, by the modules' names."""
    held = {path: of.adapter(path) for path in of.paths()}
    return {
        p: [t.detach().clone() for v in a.modules.values() for t in v.tensors]
        for p, a in held.items()
        if a
    }


class ByHand:
    """Training by dense algebra."""

    def __init__(
        self,
        training: Sequence[str],
        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.model = base().requires_grad_(False)
        self.tree = tree(self.model)
        self.weights = weights or {}
        self.factors = factors(self.tree)
        for path in training:
            for t in self.factors[path]:
                t.requires_grad_()
        self.optimizers = {
            p: make(self.factors[p], lr=RATES[p], weight_decay=DECAY) for p in training
        }
        self.losses: list[dict[str, float]] = []

    def losses_of(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Path → the mean over its tokens."""
        each: dict[str, list[Tensor]] = {}
        for row in batch:
            logits = functional_call(
                self.model,
                self.dense(row["path"]),
                kwargs=dict(input_ids=torch.tensor([row["input_ids"]])),
            ).logits[0]
            logp = logits.log_softmax(-1)
            for t in range(1, TOKENS):
                if row["labels"][t] != -100:
                    each.setdefault(row["path"], []).append(-logp[t - 1, row["labels"][t]])
        return {path: torch.stack(mine).mean() for path, mine in each.items()}

    def step(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """One step over all rows of all micro-batches and ranks."""
        losses = self.losses_of(batch)
        self.losses.append({path: float(loss.detach()) for path, loss in losses.items()})
        total = torch.stack(
            [self.weights.get(path, 1.0) * loss for path, loss in losses.items()]
        ).sum()
        if total.requires_grad:
            total.backward()
        seen = {node for row in batch for node in self.tree.lineage(row["path"])}
        for path, optimizer in self.optimizers.items():
            if path in seen:
                torch.nn.utils.clip_grad_norm_(self.factors[path], CLIP)
                optimizer.step()
            optimizer.zero_grad()

    def dense(self, path: str) -> dict[str, Tensor]:
        weights = dict(self.model.named_parameters())
        for node in self.tree.lineage(path):
            adapter = self.tree.adapter(node)
            assert adapter is not None
            pairs = zip(self.factors[node][::2], self.factors[node][1::2], strict=True)
            for (name, value), (A, B) in zip(adapter.modules.items(), pairs, strict=True):
                delta = self.tree[node].weight * value.scale * B @ A
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
        return weights

    def same_as(self, got: Mapping[str, Sequence[Tensor]]) -> None:
        for path, wanted in self.factors.items():
            for mine, want in zip(got[path], wanted, strict=True):
                torch.testing.assert_close(
                    mine, want.detach(), rtol=1e-9, atol=1e-9, msg=lambda m, p=path: f"{p}: {m}"
                )


def arguments(folder: Any, **more: Any) -> Any:
    """TrainingArguments for a run on CPU that says nothing."""
    from transformers import TrainingArguments

    given: dict[str, Any] = dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        weight_decay=DECAY,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        adam_beta2=0.999,
        optim="adamw_torch",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TrainingArguments(output_dir=str(folder), **{**given, **more})
