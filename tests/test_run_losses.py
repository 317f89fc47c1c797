"""The losses of a run: of its paths, of its nodes, and in a checkpoint."""

from __future__ import annotations

import json

import pytest

import lora_tree as lt
from lora_tree.runs.run_losses import RunLosses, read_losses


def noted() -> RunLosses:
    losses = RunLosses()
    for step in ({"fr/legal": 2.0}, {"fr/legal": 1.5, "de": 3.0}, {"": 9.0, "fr/medical": 1.0}):
        losses.note(step)
    return losses


def test_each_path_has_the_loss_of_its_own_first_and_last_step() -> None:
    losses = noted()
    assert losses.first == {"fr/legal": 2.0, "de": 3.0, "": 9.0, "fr/medical": 1.0}
    assert losses.last == {"fr/legal": 1.5, "de": 3.0, "": 9.0, "fr/medical": 1.0}


def test_a_node_has_the_mean_of_the_paths_through_it() -> None:
    tree = lt.AdapterTree()
    for path in ("de", "es", "fr", "fr/legal", "fr/medical"):
        tree.add(path, group=True)
    assert noted().of_nodes(tree, tree.paths()) == {
        "de": (3.0, 3.0),
        "fr": (1.5, 1.25),
        "fr/legal": (2.0, 1.5),
        "fr/medical": (1.0, 1.0),
    }


def test_a_run_that_goes_on_has_the_losses_that_it_had() -> None:
    losses, before = RunLosses(), noted()
    about = json.loads(json.dumps({"losses": before.plain()}))
    losses.resume(about, {"", "de", "fr/legal", "fr/medical"})
    assert (losses.first, losses.last) == (before.first, before.last)
    losses.note({"de": 0.5})
    assert (losses.first["de"], losses.last["de"]) == (3.0, 0.5)


@pytest.mark.parametrize(
    "about", [{}, {"losses": 3}, {"losses": {"first": [1]}}, {"losses": {"first": {"fr": "low"}}}]
)
def test_what_is_no_loss_of_a_known_path_is_passed_over(about: dict[str, object]) -> None:
    assert read_losses(about, "first", {"fr"}) == {}
    assert read_losses({"losses": {"first": {"fr": 1, "es": 2.0}}}, "first", {"fr"}) == {"fr": 1.0}
