"""The nodes of a tree and their order, without anything that a node holds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tree.blend import depth_first
from lora_tree.errors import LoraTreeError
from lora_tree.node import Node
from lora_tree.node_graph import NodeGraph

PATHS = st.sets(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map("/".join), max_size=12
)


def with_ancestors(paths: set[str]) -> set[str]:
    found = set()
    for path in paths:
        names = path.split("/")
        found.update("/".join(names[: i + 1]) for i in range(len(names)))
    return found


def graph_of(paths: list[str]) -> NodeGraph:
    graph = NodeGraph()
    for path in paths:
        graph.put(Node(path))
    return graph


@given(PATHS, st.integers(0, 99))
def test_the_order_is_that_of_the_names_however_the_nodes_came(paths: set[str], seed: int) -> None:
    nodes = sorted(with_ancestors(paths))
    random.Random(seed).shuffle(nodes)
    graph = graph_of(sorted(nodes, key=lambda path: path.count("/")))  # parents first
    assert graph.paths() == sorted(nodes, key=depth_first)
    assert len(graph) == len(nodes) + 1  # and the root
    for path in nodes:
        assert graph.paths(path) == [each for each in graph.paths() if each.startswith(path + "/")]
        assert [each for each in graph.paths() if path.startswith(each + "/")] + [path] == (
            graph.lineage(path)
        )


def test_a_move_takes_what_lies_below_along_and_leaves_a_copy_as_it_was() -> None:
    graph = graph_of(["de", "fr", "fr/legal", "fr/legal/acme"])
    acme, before = graph["fr/legal/acme"], graph.copy()
    graph.check_move("fr/legal", "de/law")
    graph.move("fr/legal", "de/law")
    assert graph.paths() == ["de", "de/law", "de/law/acme", "fr"]
    assert graph["de/law/acme"].path == "de/law/acme"
    assert before.paths() == ["de", "fr", "fr/legal", "fr/legal/acme"]
    assert before["fr/legal/acme"] is acme


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        ("es", "it", "no node 'es' in the tree"),
        ("", "it", "the root is the bare base and has no node"),
        ("fr", "", "the root is the bare base and can't be moved to"),
        ("fr", "fr/legal/fr", "fr can't be moved below itself, to fr/legal/fr"),
        ("fr", "es/fr", "no node 'es' in the tree, below which es/fr would lie"),
        ("fr", "de", "de exists already"),
        ("fr", "De", "De differs from de only by case"),
    ],
)
def test_a_move_that_breaks_the_law_is_refused(path: str, to: str, message: str) -> None:
    graph = graph_of(["de", "fr", "fr/legal"])
    with pytest.raises(LoraTreeError) as refused:
        graph.check_move(path, to)
    assert str(refused.value).startswith(message)
    # A node is not in its own way.
    graph.check_move("fr", "fr")
    graph.check_move("fr", "FR")
