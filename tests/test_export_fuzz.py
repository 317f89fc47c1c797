"""Broken bases and exports: what comes out is a whole folder or an error of ours, and nothing
elsewhere is opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from looks import looking
from sampling import slow

import lora_tree as lt
from lora_tree.errors import LoraTreeError
from lora_tree.export.shards import INDEX, open_checkpoint
from lora_tree.export.unloaded_base import Base

pytestmark = slow

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
DEAR = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
Q = "model.layers.0.self_attn.q_proj"

edits = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.integers(0, 3),
        st.binary(max_size=3)
        | st.sampled_from(
            [b"0", b"-", b"9" * 20, b'"', b"{", b"[[", b"}", b"\\ud800", b"\x00", b"null", b"../"]
        ),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes: list[tuple[int, int, bytes]], within: int | None = None) -> bytes:
    """Some bytes taken out and others put in, in the first ``within`` of them."""
    for at, remove, insert in changes:
        place = at % ((within or len(data)) + 1)
        data = data[:place] + insert + data[place + remove :]
    return data


# ------------------------------------------------------- one base in shards, and a secret beside it
@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ in several shards; secret/ with a whole checkpoint that nobody named; exported/: a
    portable adapter.
    """
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("fuzz")
    base = ARCHS["llama"].base().float()
    base.save_pretrained(folder / "base", max_shard_size="30KB")
    base.save_pretrained(folder / "secret")
    lt.portable(tree(), "fr/legal").save(folder / "exported")
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    return folder


def tree() -> lt.AdapterTree:
    g = torch.Generator().manual_seed(0)
    value = lt.LowRank(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g))
    made = lt.AdapterTree()
    made.add("fr", adapter=lt.Adapter({Q: value}))
    made.add("fr/legal", adapter=lt.Adapter({Q: value.scaled(0.5)}))
    return made


@pytest.fixture
def watch(home: Path) -> Iterator[None]:
    """Nothing of the secret is opened, whatever the test does."""
    with looking() as looked:
        yield
    assert looked
    assert not [path for path in looked if f"{os.sep}secret{os.sep}" in path]


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """A copy beside it, which goes again."""
    where = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")
    shutil.copytree(folder, where, symlinks=True)
    try:
        yield where
    finally:
        shutil.rmtree(where)


def survives(base: Path) -> None:
    """The checkpoint there is whole, and every number can be read; or the library says why not."""
    try:
        checkpoint = open_checkpoint(base)
        for stored in checkpoint.tensors.values():
            stored.read()
    except LoraTreeError as error:
        str(error).encode()
    known = Base(base, named_by_caller=False)
    with contextlib.suppress(LoraTreeError):
        known.shape(Q)
        known.last_names()


# ---------------------------------------------------------------------- the index and the shards
@MANY
@given(edits)
@pytest.mark.usefixtures("watch")
def test_an_index_with_other_bytes(home: Path, changes: list[tuple[int, int, bytes]]) -> None:
    whole = (home / "base" / INDEX).read_bytes()
    with _put(home / "base" / INDEX, edited(whole, changes)):
        survives(home / "base")


HOSTILE = [
    *(
        "../secret/model.safetensors",
        "/etc/passwd",
        "a/../../secret/model.safetensors",
        "",
        ".",
        "..",
    ),
    *(
        "x\0.safetensors",
        "\ud800.safetensors",
        "/dev/zero.safetensors",
        "config.json",
        "model.safetensors",
    ),
    "a" * 5000 + ".safetensors",
]
names = st.sampled_from(HOSTILE) | st.text(max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


@MANY
@given(
    st.dictionaries(names | st.just(f"{Q}.weight"), names | anything, max_size=4),
    st.booleans(),
    anything,
)
@pytest.mark.usefixtures("watch")
def test_an_index_that_names_other_files(
    home: Path, named: dict[str, Any], added: bool, map_: Any
) -> None:
    fields = json.loads((home / "base" / INDEX).read_bytes())
    fields["weight_map"] = (fields["weight_map"] | named) if added else (named or map_)
    data = json.dumps(fields).encode()
    with _put(home / "base" / INDEX, data):
        survives(home / "base")


@MANY
@given(st.integers(0, 9), edits, st.booleans())
@pytest.mark.usefixtures("watch")
def test_a_shard_with_another_header(
    home: Path, which: int, changes: list[tuple[int, int, bytes]], cut: bool
) -> None:
    shards = sorted((home / "base").glob("*.safetensors"))
    shard = shards[which % len(shards)]
    whole = shard.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    changed = whole[: changes[0][0] % len(whole)] if cut else edited(whole, changes, within=start)
    with _put(shard, changed):
        survives(home / "base")


@contextlib.contextmanager
def _put(file: Path, data: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_names_files_of_its_folder_only(home: Path, name: str) -> None:
    fields = json.loads((home / "base" / INDEX).read_bytes())
    fields["weight_map"][f"{Q}.weight"] = name
    with _put(home / "base" / INDEX, json.dumps(fields).encode()), pytest.raises(LoraTreeError):
        open_checkpoint(home / "base")


# ---------------------------------------------------------------------- whole exports
@DEAR
@given(st.sampled_from(["index", "shard", "link", "named"]), edits, names)
@pytest.mark.usefixtures("watch")
def test_an_export_is_whole_or_not_there(
    home: Path, what: str, changes: list[tuple[int, int, bytes]], name: str
) -> None:
    out = home / f"out-{uuid.uuid4().hex[:8]}"
    with copied(home / "base") as base:
        shard = min(base.glob("*.safetensors"))
        if what == "index":
            (base / INDEX).write_bytes(edited((base / INDEX).read_bytes(), changes))
        elif what == "shard":
            whole = shard.read_bytes()
            shard.write_bytes(
                edited(whole, changes, within=8 + int.from_bytes(whole[:8], "little"))
            )
        elif what == "link":
            target = [shard, base / INDEX, base / "vocab.txt"][len(changes) % 3]
            target.unlink(missing_ok=True)
            target.symlink_to("../secret/model.safetensors")
        else:
            fields = json.loads((base / INDEX).read_bytes())
            fields["weight_map"][f"{Q}.weight"] = name
            (base / INDEX).write_text(json.dumps(fields))
        try:
            lt.export_model(tree(), "fr/legal", out, base=base)
        except LoraTreeError as error:
            str(error).encode()
            assert not out.exists()
            return
        assert sorted(open_checkpoint(out).tensors) == sorted(open_checkpoint(base).tensors)
        shutil.rmtree(out)


@MANY
@given(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), edits)
@pytest.mark.usefixtures("watch")
def test_an_exported_adapter_with_other_bytes(
    home: Path, name: str, changes: list[tuple[int, int, bytes]]
) -> None:
    file = home / "exported" / name
    whole = file.read_bytes()
    within = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else None
    with _put(file, edited(whole, changes, within)), contextlib.suppress(LoraTreeError):
        again = lt.AdapterTree()
        again.add("fr", adapter=home / "exported")
        made = lt.portable(
            again, "fr", rank=2, complete=True, shapes={"k_proj": (16, 32), "v_proj": (16, 32)}
        )
        lt.combine([(made.adapter, 0.5), (lt.Adapter.load(home / "exported"), -1.0)])
