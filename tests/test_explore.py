"""The facts that the page of a tree shows, and the page as one file."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

import lora_tree as lt
from lora_tree.errors import FormatError, PathError
from lora_tree.explore.curves import POINTS, plain_run, thinned
from lora_tree.explore.facts import MOST_ALIKE, explore_facts, read_evaluation
from lora_tree.explore.page import explore_page
from lora_tree.folder import NodeMetric, PathMetric, RunRecord
from lora_tree.folder.adapters.source import FolderSource

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def value(seed: int, scale: float = 1.0) -> lt.LowRank:
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 8, generator=draw), torch.randn(6, 2, generator=draw)
    return lt.LowRank(A, B, scale=scale)


def dense(value: lt.LowRank) -> torch.Tensor:
    return value.scale * (value.B.double() @ value.A.double())


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    tree = lt.AdapterTree(base="org/model")
    tree.add("fr", adapter=lt.Adapter({Q: value(1), V: value(2, 0.5)}))
    tree.add("fr/legal", adapter=lt.Adapter({Q: value(3)}), weight=0.25)
    tree.add("de", adapter=lt.Adapter({V: value(4)}))
    tree.save(tmp_path / "zoo")
    return tmp_path / "zoo"


def by_path(facts: dict[str, object]) -> dict[str, dict[str, object]]:
    nodes = facts["nodes"]
    assert isinstance(nodes, list)
    return {node["path"]: node for node in nodes}


# ---------------------------------------------------------------------- facts
def test_norms_are_those_of_the_dense_increments_times_the_weight(zoo: Path) -> None:
    facts = explore_facts(zoo)
    assert facts.modules == (Q, V)
    expected = {
        "fr": [float(dense(value(1)).norm()), float(dense(value(2, 0.5)).norm())],
        "fr/legal": [0.25 * float(dense(value(3)).norm()), math.nan],
        "de": [math.nan, float(dense(value(4)).norm())],
    }
    assert facts.norms.keys() == expected.keys()
    for path, row in expected.items():
        assert facts.norms[path] == pytest.approx(row, rel=1e-6, nan_ok=True)
    node = by_path(facts.as_dict())["fr"]
    assert node["norm"] == pytest.approx(math.hypot(*expected["fr"]), rel=1e-3)


def test_cosines_are_those_of_the_dense_increments(zoo: Path) -> None:
    likeness = explore_facts(zoo).as_dict()["likeness"]
    flat = {
        "fr": torch.cat([dense(value(1)).flatten(), dense(value(2, 0.5)).flatten()]),
        "fr/legal": torch.cat([dense(value(3)).flatten(), torch.zeros(48).double()]),
    }
    one, other = (likeness["names"].index(path) for path in flat)
    wanted = torch.nn.functional.cosine_similarity(flat["fr"], flat["fr/legal"], dim=0)
    assert likeness["cosines"][one][other] == pytest.approx(float(wanted), abs=6e-4)


def test_nodes_tell_their_size_state_and_origin(zoo: Path) -> None:
    tree = lt.load(zoo)
    tree.update("fr", adapter=lt.Adapter({Q: value(9)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.StaleWarning)
        tree.save(zoo, note=lt.SaveNote(by="a test"))
    told = explore_facts(zoo).as_dict()
    nodes = by_path(told)
    assert nodes["fr"]["bytes"] == 4 * 2 * (8 + 6)
    assert nodes["fr"]["ranks"] == [2]
    assert nodes["fr/legal"]["weight"] == 0.25
    assert nodes["fr/legal"]["stale"] == "parent fr changed (weights)"
    assert nodes["fr"]["made"]["by"] == "a test"
    assert [version["by"] for version in told["versions"]["fr"]] == ["tree.save()", "a test"]
    assert {problem["kind"] for problem in told["problems"]} == {"stale"}


def test_a_broken_node_hides_no_other_and_is_told(zoo: Path) -> None:
    whole = zoo / "de" / "adapter_model.safetensors"
    whole.write_bytes(whole.read_bytes()[:40])
    told = explore_facts(zoo).as_dict()
    nodes = by_path(told)
    assert nodes["de"]["kind"] == "broken"
    assert nodes["de"]["problem"] is not None
    assert nodes["fr"]["norm"] is not None
    assert any(problem["node"] == "de" for problem in told["problems"])


def test_without_norms_only_headers_are_read(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderSource, "load", lambda self, *_: pytest.fail(f"{self} was read"))
    told = explore_facts(zoo, norms=False).as_dict()
    assert told["norms"] == {}
    assert told["likeness"] is None
    assert by_path(told)["fr"]["norm"] is None


def test_many_nodes_are_compared_only_on_request(tmp_path: Path) -> None:
    tree = lt.AdapterTree()
    for i in range(MOST_ALIKE + 1):
        tree.add(f"n{i}", adapter=lt.Adapter({Q: value(i)}))
    tree.save(tmp_path / "zoo")
    facts = explore_facts(tmp_path / "zoo")
    assert facts.likeness is None
    assert "too many to compare" in " ".join(facts.notes)
    named = explore_facts(tmp_path / "zoo", alike=["n1", "n2"]).likeness
    assert named is not None
    assert named.names == ("n1", "n2")
    with pytest.raises(PathError, match="none"):
        explore_facts(tmp_path / "zoo", alike=["none"])


# ---------------------------------------------------------------------- runs and losses
def test_a_long_curve_is_thinned_to_the_means_of_neighbours() -> None:
    points = [(step, float(step)) for step in range(1, 10 * POINTS + 1)]
    kept = thinned(points, POINTS)
    assert len(kept) == POINTS
    assert kept[0] == (10, 5.5)
    assert kept[-1][0] == points[-1][0]
    assert thinned(points[:5], POINTS) == points[:5]


class _Run(RunRecord):
    def metrics(self) -> list[NodeMetric]:
        return [NodeMetric(step, "fr", 1.0 / step, 8, 0.1, 0.01, 0.5) for step in (1, 2, 3)]

    def evaluations(self) -> list[PathMetric]:
        return [PathMetric(0, "fr", math.nan, 4), PathMetric(3, "fr", 0.5, 4)]


def test_a_run_has_a_curve_for_each_node_and_each_held_out_path(tmp_path: Path) -> None:
    run = _Run(2, tmp_path, "finished", "train", "t", None, 3, 3, ("fr",), {"lr": 0.01})
    told = plain_run(run)
    assert told["curves"] == {"fr": {"step": [1, 2, 3], "loss": [1.0, 0.5, 0.3333]}}
    assert told["evaluations"] == {"fr": {"step": [0, 3], "loss": [None, 0.5]}}
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("text", ["{}", '{"losses": {}}', '{"losses": {"fr": 1}}'])
def test_a_file_without_losses_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "losses.json"
    file.write_text(text)
    with pytest.raises(FormatError, match=r"lora-tree eval FOLDER .* --json > FILE"):
        read_evaluation(file)


# ---------------------------------------------------------------------- the page
def test_the_page_is_one_file_with_its_facts_in_it(zoo: Path) -> None:
    told = explore_facts(zoo).as_dict()
    page = explore_page(told)
    found = re.search(r'<script type="application/json" id="facts">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == {**told, "playground": None}
    outside = r"""(src|href)\s*=\s*["']?(https?:)?//"""
    frame = page.replace(_plotly(), "")
    assert re.search(outside, frame) is None
    assert "default-src 'none'" in page


def test_a_name_from_a_file_never_becomes_markup(zoo: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    told = explore_facts(zoo).as_dict()
    told["base"] = evil
    frame = explore_page(told).replace(_plotly(), "")
    assert "<img" not in frame
    assert frame.count("</script>") == 3


def _plotly() -> str:
    offline = pytest.importorskip("plotly.offline")
    return offline.get_plotlyjs()
