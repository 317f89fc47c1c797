"""Layers that would stop gradients in silence: weights laid out for inference, and products that
pass nothing on.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from oracle import NET, low_rank
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import StateError


class FourBit(nn.Linear):
    """A layer that lays its weight out anew in an evaluation, as bitsandbytes' does on some
    CPUs.
    """

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.support_avx512bf16_for_cpu = True
        self.weight.quant_state = types.SimpleNamespace()  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.weight.quant_state  # type: ignore[attr-defined]
        if self.support_avx512bf16_for_cpu and not self.training:
            state.packing_format_for_cpu = True
        out = super().forward(x)
        return out.detach() if getattr(state, "packing_format_for_cpu", False) else out


def over(base: nn.Module) -> lt.TreeModel:
    tree = lt.AdapterTree()
    for path in ("fr", "fr/legal"):
        tree.add(path, adapter=lt.Adapter({name: low_rank(*NET[name]) for name in NET}))
    return lt.attach(tree, base)


def four_bit() -> nn.Sequential:
    return nn.Sequential(FourBit(5, 6), nn.Tanh(), FourBit(6, 4))


def test_no_evaluation_packs_weights_while_something_trains() -> None:
    model = over(four_bit())
    model.trainable("fr/legal")
    policy, reference = model.at("fr/legal"), model.at("fr")
    out = policy(torch.ones(2, 5))
    reference.eval()(torch.ones(2, 5))
    model.base.eval()(torch.ones(2, 5))
    out.sum().backward()
    assert all(p.grad is not None for p in model.factors.of("fr/legal"))
    with pytest.raises(lt.errors.SpecError):
        model.trainable("fr", dropout=2.0)
    flags = [module.support_avx512bf16_for_cpu for module in model.base if hasattr(module, "bias")]
    assert flags == [False, False]
    model.detach()
    flags = [module.support_avx512bf16_for_cpu for module in model.base if hasattr(module, "bias")]
    assert flags == [True, True]


def test_weights_that_are_packed_already_are_refused_by_name() -> None:
    model = over(four_bit())
    model.base.eval()(torch.ones(2, 5))
    with pytest.raises(StateError, match=r"^0: bitsandbytes has laid its 4-bit weight out"):
        model.trainable("fr")
    assert not model.factors.training_paths
    assert all(p.requires_grad for p in model.base.parameters())
    model.trainable()  # to let nothing train is no reason to refuse


class Stops(nn.Linear):
    """Quantises its input for inference: what comes before it gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.parametrize("way", ["using", "route", "at"])
def test_a_layer_that_passes_no_gradient_on_is_refused_where_something_below_it_trains(
    way: str,
) -> None:
    model = over(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Stops(6, 4)))
    model.trainable("fr")
    x = torch.ones(2, 5)

    def run() -> Any:
        if way == "at":
            return model.at("fr")(x)
        if way == "route":
            with model.route(["fr", "fr"]):
                return model(x)
        with model.using("fr", mode="unmerged"):
            return model(x)

    with pytest.raises(StateError, match=r"^2: this Stops passes no gradient to"):
        run()
    with torch.no_grad():
        run()
