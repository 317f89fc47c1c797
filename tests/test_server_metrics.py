"""The figures of the plugin, as Prometheus reads them, beside the requests that were made."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from forked import Forked
from front import adapter, front_end, served_zoo, waits
from zoo import opened

import lora_tree as lt
from lora_tree.integrations.vllm import plugin
from lora_tree.integrations.vllm.metrics import REASONS


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return served_zoo(tmp_path / "zoo")


def test_requests_and_refusals_are_counted_by_kind_and_reason(zoo: Path, tmp_path: Path) -> None:
    with front_end(zoo, tmp_path / "cache", blends="1", allow="fr/** de", max_rank="3") as front:
        assert {front.figure("refused_total", reason=reason) for reason in REASONS} == {0}
        assert front.figure("requests_total", kind="path") == 0
        assert None not in front.answers("fr", "fr", "fr", "de", "fr:0.5", "fr:0.50")
        assert front.answers("it", "fr/x", "fr/x", "fr:nan", "fr/legal") == [None] * 5
        (zoo / "de" / "adapter_config.json").write_text("{")
        (zoo / "fr" / "medical" / "adapter_config.json").write_text("{")
        waits(lambda: front.figure("paths_behind") == 1, "de is not behind")
        assert front.answers("fr/medical", "de") == [None, front.answers("de")[0]]
        counts = {reason: front.figure("refused_total", reason=reason) for reason in REASONS}
        assert {reason: count for reason, count in counts.items() if count} == {
            "not_admitted": 2,  # it, fr:nan
            "unknown": 2,
            "inexact": 1,  # fr/legal has rank 4
            "broken": 1,
        }
        assert front.figure("requests_total", kind="path") == 6
        assert front.figure("requests_total", kind="blend") == 2
        assert front.answers("fr:1") == front.answers("fr")  # another spelling of one path
        assert front.figure("flattened_total") == 3
        assert front.figure("first_answer_delay_seconds_count") == 3
        assert 0 < front.figure("first_answer_delay_seconds_sum") < 60
        waits(lambda: front.figure("paths_served") == 3, "three are served")


def test_clients_that_wait_for_one_first_loading_are_counted_once_each(
    zoo: Path, tmp_path: Path
) -> None:
    with front_end(zoo, tmp_path / "cache") as front:
        front.answers("de")
        front.is_slow = True
        running = [front.start("fr") for _ in range(5)]
        front.is_slow = False
        assert None not in [one.result(30) for one in running]
        assert front.figure("requests_total", kind="path") == 1 + 5
        assert front.figure("first_answer_delay_seconds_count") == 2


def test_the_look_at_the_tree_tells_stale_swapped_and_unreadable(zoo: Path, tmp_path: Path) -> None:
    with front_end(zoo, tmp_path / "cache") as front:
        front.answers("fr", "fr/legal", "de")
        tree = opened(zoo)
        tree.update("fr", adapter=adapter(9))
        tree.save(zoo)
        waits(lambda: front.figure("swapped_total") == 2, "fr and fr/legal are swapped")
        waits(lambda: front.figure("paths_stale") == 1, "fr/legal is stale")
        assert front.figure("first_answer_delay_seconds_count") == 3  # a swap keeps nobody waiting
        assert front.figure("flattened_total") == 5
        assert front.figure("unreadable") == 0
        (zoo / "tree.yaml").write_text("version: [")
        waits(lambda: front.figure("unreadable") == 1, "it can't be read")
        waits(lambda: front.figure("paths_behind") == 3, "all go on as they were")
        assert front.answers("fr/medical") == [None]
        assert front.figure("refused_total", reason="unreadable") == 1
        (zoo / "tree.yaml").unlink()
        waits(lambda: front.figure("unreadable") == 0, "it can be read again")


def test_the_cache_s_bytes_and_evictions(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "SHORT_GRACE_S", 0.0)
    monkeypatch.setattr(plugin, "ROOM_S", 0.0)
    with front_end(zoo, tmp_path / "cache", cache_bytes=str((1 << 20) + 500)) as front:
        assert None not in front.answers("fr", "de", "fr")
        assert front.figure("cache_evictions_total") == 2
        files = [file for file in (tmp_path / "cache").glob("*/*") if "." not in file.parent.name]
        assert front.figure("cache_bytes") == sum(file.stat().st_size for file in files) > 0
        assert front.figure("cache_budget_bytes") == (1 << 20) + 500
        kept = front.resolver._cache
        assert kept is not None
        kept.budget_bytes = 1000
        assert front.answers("fr/medical") == [None]
        assert front.figure("refused_total", reason="no_room") == 1


def test_a_request_s_line_names_the_version_of_each_node_and_is_off_by_default(
    zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with front_end(zoo, tmp_path / "cache") as front:
        front.answers("fr/legal", "fr/legal")
    assert "request {" not in caplog.text
    tree = opened(zoo)
    tree.update("fr/legal", adapter=adapter(9))
    tree.save(zoo)
    with front_end(zoo, tmp_path / "cache", log_requests="1") as front:
        front.answers("fr/legal", "fr/legal", "de")
        names = [request.lora_name for request in front.loaded]
    begins = "lora_tree: request "
    lines = [text.removeprefix(begins) for text in caplog.messages if text.startswith(begins)]
    told = [json.loads(line) for line in lines]
    assert [(one["path"], one["adapter"]) for one in told] == [
        ("fr/legal", names[0]),
        ("fr/legal", names[0]),
        ("de", names[1]),
    ]
    assert told[0]["nodes"].keys() == {"fr", "fr/legal"}
    assert told[0]["content"][:16] in names[0]
    # The digits are those of the version: with them the node is brought back as it was then.
    answered = opened(zoo).flatten("fr/legal").modules["up"].dense()
    tree.update("fr/legal", adapter=adapter(1))
    tree.save(zoo)
    lt.restore(zoo, f"fr/legal@{told[0]['nodes']['fr/legal']}")
    assert opened(zoo).flatten("fr/legal").modules["up"].dense().equal(answered)


WRITER = """
import os, signal, sys
served, nbytes = int(sys.argv[1]), int(sys.argv[2])
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[3]
from lora_tree.integrations.vllm.metrics import Metrics
metrics = Metrics()
for _ in range(served):
    metrics.answered("fr")
metrics.looked(served=served, stale=0, behind=0)
metrics.note_cache_size(nbytes, 1000)
metrics.loaded(0.3)
print("ready", flush=True)
signal.pause()
"""


def test_several_front_ends_answer_for_all_of_them(tmp_path: Path) -> None:
    """As vLLM sets them up: each process writes files, and any of them can be asked."""
    from prometheus_client import CollectorRegistry, multiprocess

    running = []
    try:
        for served, nbytes in ((3, 700), (5, 200)):
            one = Forked(WRITER, served, nbytes, tmp_path)
            running.append(one)
            assert one.stdout.readline() == "ready\n"
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
        value = registry.get_sample_value
        assert value("lora_tree_requests_total", {"kind": "path"}) == 8
        assert value("lora_tree_refused_total", {"reason": "broken"}) == 0
        assert value("lora_tree_paths_served") == 5
        assert value("lora_tree_cache_bytes") == 200  # the folder is one: the last to change it
        assert value("lora_tree_first_answer_delay_seconds_count") == 2
    finally:
        for one in running:
            one.kill()
