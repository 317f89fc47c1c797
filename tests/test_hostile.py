"""What people who open others' trees, or serve strangers, are promised (docs/security.md), one
hostile case a test.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from architectures import ARCHS
from front import front_end
from looks import looking
from safetensors.torch import load_file, save_file
from sampling import slow
from shell import Shell, commands, save_base
from test_renaming import CASES
from torch import nn
from zoo import adapter, listing, tree, value

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.errors import (
    BaseMismatch,
    BudgetError,
    FolderError,
    FormatError,
    LoraTreeError,
    NewerFormat,
    SpecError,
)
from lora_tree.export.shards import open_checkpoint
from lora_tree.folder import disk, lockfile, survey, yamlfile
from lora_tree.folder.adapters import source
from lora_tree.folder.reading import opening
from lora_tree.folder.transactions import commit
from lora_tree.formats import limits, strict_json
from lora_tree.formats.safetensors import _ordinary, parse_header
from lora_tree.integrations.flat_cache import cache as flat_cache
from lora_tree.integrations.vllm import plugin
from lora_tree.integrations.vllm.settings import PluginSettings, server_args
from lora_tree.runs import promote
from lora_tree.runs.evaluation import LossMatrix
from lora_tree.system import memory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# ---------------------------------------------------------------- names that clients send
@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A saved tree: fr, fr/legal, fr/medical, grp/x."""
    made = lt.AdapterTree(base="org/model")
    for seed, path in enumerate(("fr", "fr/legal", "fr/medical", "de")):
        made.add(path, adapter=adapter(seed))
    made.save(tmp_path / "served")
    return tmp_path / "served"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_a_refused_name_leaves_no_open_file_no_file_and_no_lock(
    served: Path, tmp_path: Path
) -> None:
    with front_end(served, tmp_path / "cache", blends="1") as front:
        assert front.answers("fr", "fr:1e308+de:1") == [front.answers("fr")[0], None]
        files, before = sorted((tmp_path / "cache" / ".locks").iterdir()), open_files()
        names = [f"fr:1.{i}e308+de:-1.{i}e308" for i in range(70)]  # no factor of theirs is finite
        assert front.answers(*names, "gpt-4", "fr/../de", "fr:nan") == [None] * 73
        assert open_files() == before
        locks = {file.name for file in (tmp_path / "cache" / ".locks").iterdir()}
        assert len(locks) <= len(files) + 16  # one for each first digit of a content
        assert set(front.lora_resolver_lock) == {"fr"}  # vLLM's own, one for each name, for ever
        assert set(front.lora_requests) == {"fr"}


def test_every_spelling_of_a_blend_is_one_adapter_and_one_entry(
    served: Path, tmp_path: Path
) -> None:
    with front_end(served, tmp_path / "cache", blends="1") as front:
        spellings = [f"fr:0.5{'0' * i}+de:.5" for i in range(20)] + [
            "de:5e-1+fr: 0.5",
            "de:0.5+fr:0.5",
        ]
        assert len(set(front.answers(*spellings))) == 1
        assert len(set(front.answers(*(f"fr:1.{'0' * i}" for i in range(20)), "fr"))) == 1
        assert set(front.lora_requests) == {"de:0.5+fr:0.5", "fr"}
        assert len(front.loaded) == 2
        near = front.answers("fr:0.12345671+de:1", "fr:0.12345672+de:1")
        assert near[0] != near[1]  # they are told apart to the last bit
        kept = [entry for entry in (tmp_path / "cache").iterdir() if not entry.name.startswith(".")]
        assert len(kept) == 4


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
def test_a_client_who_makes_up_blends_shuts_no_path_out(
    served: Path, tmp_path: Path, grace_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "SHORT_GRACE_S", grace_s)
    monkeypatch.setattr(plugin, "ROOM_S", 0.0)
    monkeypatch.setattr(flat_cache, "CONFIG_BYTES", 4096)
    room = 32_000  # some ten adapters
    with front_end(served, tmp_path / "cache", blends="1", cache_bytes=str(room)) as front:
        idle, tenant = front.answers("fr", "fr/medical"), front.answers("fr/legal")
        for i in range(40):
            front.answers(f"fr:0.{i + 1}+de:1")
            assert front.answers("fr/legal") == tenant
        assert front.answers("fr", "fr/medical") == idle
        assert None not in front.answers("de")
        loaded = [one.lora_name.partition("@")[0] for one in front.loaded]
        assert sorted(name for name in loaded if ":" not in name) == [
            "de",
            "fr",
            "fr/legal",
            "fr/medical",
        ]
        blends = [name for name in front.lora_requests if ":" in name]
        assert 1 <= len(blends) < 12
        there = sum(file.stat().st_size for file in (tmp_path / "cache").glob("[0-9a-f]*/*"))
        assert room / 4 < there <= room


def test_blends_are_refused_unless_they_are_allowed(served: Path, tmp_path: Path) -> None:
    with front_end(served, tmp_path / "cache") as front:
        assert front.answers("fr:0.5+de:0.5", "fr:1", "fr+de") == [None] * 3
        assert None not in front.answers("fr", "de")


def test_only_paths_on_the_list_are_served_alone_or_in_a_blend(
    served: Path, tmp_path: Path
) -> None:
    with front_end(served, tmp_path / "cache", allow="fr/*, de", blends="1") as front:
        assert None not in front.answers("fr/legal", "fr/medical", "de", "fr/legal:0.5+de:0.5")
        assert front.answers("fr", "fr/legal+fr:-1", "fr/legal/../..", "gpt-4") == [None] * 4
    with pytest.raises(SpecError, match=r"LORA_TREE_VLLM_ALLOW: the list of paths .* is empty"):
        PluginSettings.of(
            {"LORA_TREE_VLLM_ZOO": "z", "LORA_TREE_VLLM_CACHE": "c", "LORA_TREE_VLLM_ALLOW": ""}
        )


def test_unknown_names_cost_one_look_at_the_tree_in_an_interval(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []

    def counted(*args: object, **more: object) -> object:
        looks.append(args)
        return survey(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(plugin, "survey", counted)
    with front_end(served, tmp_path / "cache", poll_s="30") as front:
        assert front.answers("fr/..", "fr:1", "x" * 10_000, "fr//legal") == [None] * 4
        assert not looks  # these are no paths, whatever the tree is
        assert front.answers(*(f"gpt-{i}" for i in range(200))) == [None] * 200
        assert None not in front.answers("fr", "de", "fr/legal")
        assert len(looks) == 1


def test_a_name_of_any_length_is_one_short_line_in_the_log(
    served: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [
        "x" * 1_000_000,
        "fr/" * 300_000,
        "fr:1+" * 200_000,
        "gpt-4\nINFO: all is well\x1b[2J",
        "é" * 9_000,
    ]
    with front_end(served, tmp_path / "cache", blends="1") as front:
        assert front.answers(*names) == [None] * 5
    assert len(caplog.messages) == 5
    assert max(map(len, caplog.messages)) < 400
    assert all(message.isprintable() for message in caplog.messages)


def test_an_error_about_a_name_of_any_length_is_short(served: Path) -> None:
    loaded, began = lt.load(served), time.monotonic()
    for name in ("x" * 1_000_000, "fr/" * 300_000, "fr:1+" * 200_000, f"fr:{'9' * 1_000_000}"):
        for ask in (
            loaded.lineage,
            loaded.flatten,
            loaded.add,
            lambda name: loaded.move("de", name),
        ):
            with pytest.raises(lt.errors.LoraTreeError) as raised:
                ask(name)
            assert len(str(raised.value)) < 10_000
    assert time.monotonic() - began < 20
    assert loaded.paths() == ["de", "fr", "fr/legal", "fr/medical"]


def test_an_adapter_outside_of_the_tree_s_folder_is_served_only_on_the_user_s_word(
    served: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter(9).save(tmp_path / "elsewhere")
    (served / "tree.lock").unlink()
    (served / "tree.yaml").write_text(
        "version: 1\ntree:\n  away: {adapter: ../elsewhere, children: {below: {r: 4, "
        "target_modules: [q_proj]}}}\n"
    )
    with front_end(served, tmp_path / "cache") as front:
        assert front.answers("away", "away/below") == [None, None]
        assert None not in front.answers("fr", "fr/legal")
    assert "leads out of" in caplog.messages[0]
    kept = server_args(served, cache="c").problems
    assert [problem.node for problem in kept] == ["away", "away/below"]
    assert kept[0].text.endswith("allow it: outside=True, or vllm-args --outside")
    assert not server_args(served, cache="c", outside=True).problems
    with front_end(served, tmp_path / "cache", outside="1") as front:
        assert None not in front.answers("away")


# --------------------------------------------------------------- patterns: a bounded amount of work
SLOW = (
    "((.{0,43}){0,43})X"  # 18 characters, 3,742 steps, nearly all of them alive at every character
)


def stack(layers: int, name: str = "layers") -> nn.Module:
    """A base with so many Linears, named like a transformer's."""
    return nn.ModuleDict(
        {name: nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}) for _ in range(layers))}
    )


def adapter_folder(folder: Path, names: Iterable[str], **config: Any) -> Path:
    """A PEFT folder with a pair of rank 1 for every name, and such a config."""
    folder.mkdir(parents=True)
    one = torch.ones(1, 2)
    tensors = {
        f"base_model.model.{n}.lora_{half}.weight": t
        for n in names
        for half, t in (("A", one), ("B", one.mT))
    }
    save_file(
        {key: t.clone().contiguous() for key, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


@pytest.mark.parametrize(
    "patterns",
    [
        {SLOW: 1},
        {f"(.*{i}.*){{9}}X": 1 for i in range(5000)},
        {"(?=(.*a)*b)" * 40 + str(i): 1 for i in range(100)},
    ],
    ids=["one", "thousands", "look-aheads"],
)
def test_the_patterns_of_an_adapter_cost_a_bounded_amount_of_work(
    tmp_path: Path, patterns: dict[str, int]
) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.{'a' * i}" for i in range(1, 101)]
    folder = adapter_folder(tmp_path / "fr", names, rank_pattern=patterns)
    with pytest.raises(
        FormatError,
        match=r"fr/adapter_config\.json: matching its patterns takes too long: more than",
    ):
        lt.Adapter.load(folder)


def test_a_pattern_for_every_module_is_no_bounded_work_exceeded(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.q_proj" for i in range(40) for j in range(64)]
    folder = adapter_folder(
        tmp_path / "fr", names, r=8, rank_pattern=dict.fromkeys(reversed(names), 1)
    )
    assert set(lt.Adapter.load(folder).ranks.values()) == {1}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_pattern_that_keeps_re_busy_for_ever_is_matched_at_once(
    tmp_path: Path, field: str
) -> None:
    said = {"target_modules": "'.*'", "layers_to_transform": "0"} | {field: "'([a-z._0-9]+)+X'"}
    fields = ", ".join(f"{name}: {value}" for name, value in said.items())
    (tmp_path / "tree.yaml").write_text(f"version: 1\ntree: {{fr: {{{fields}}}}}\n")
    with contextlib.suppress(
        lt.errors.BaseMismatch
    ):  # nothing of that name, or a ModuleList that takes no delta
        lt.attach(lt.load(tmp_path), stack(40, "layers_of_a_name_that_is_long_enough"))


def test_the_patterns_of_a_tree_share_one_budget_of_work(tmp_path: Path) -> None:
    nodes = "\n".join(f"  n{i}: {{target_modules: '{SLOW}|a{i}'}}" for i in range(20))
    (tmp_path / "tree.yaml").write_text(f"version: 1\ntree:\n{nodes}\n")
    tree, base = lt.load(tmp_path), stack(40)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(
        SpecError, match=r"the tree's fresh nodes: matching its patterns takes too long: more than"
    ):
        lt.attach(tree, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not any(tree[path].has_adapter for path in tree)


def test_a_thousand_nodes_with_one_pattern_cost_what_one_does() -> None:
    tree = lt.AdapterTree(
        defaults={"r": 1, "target_modules": r".*\.(q|v)_proj", "rank_pattern": {"(0|1).q_proj": 2}}
    )
    for i in range(1000):
        tree.add(f"n{i}")
    assert lt.misfits(tree, stack(40, "layers" * 40)) == []


def test_look_aheads_of_a_tree_yaml_go_on_working(tmp_path: Path) -> None:
    target = r"^(?!.*layers\.0\.).*(?<=layers\.[12])\.(?P<which>q|v)_proj$"
    (tmp_path / "tree.yaml").write_text(
        f"version: 1\ntree: {{fr: {{r: 1, target_modules: '{target}'}}}}\n"
    )
    tree = lt.load(tmp_path)
    lt.attach(tree, stack(4))
    made = tree.adapter("fr")
    assert made is not None
    assert list(made.modules) == ["layers.1.q_proj", "layers.2.q_proj"]


def test_a_pattern_of_a_tree_yaml_that_has_no_bound_is_refused_with_its_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "tree.yaml").write_text("version: 1\ntree:\n  fr: {target_modules: '(a*)\\1+X'}\n")
    with pytest.raises(
        SpecError,
        match=r"tree\.yaml:3:8: node fr: target_modules: .*can't be matched in bounded time",
    ):
        lt.load(tmp_path)


# ----------------------------------------------------- a base's own code, and what an export copies
OWN_CODE = """
import os, sys
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

with open(os.environ["RAN"], "a") as ran:
    ran.write("x")
print("hello from the base")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A tree over a base whose config, model and tokenizer are Python files of its own."""
    base = save_base(tmp_path / "base")
    (base / "own.py").write_text(OWN_CODE)
    for file, change in (
        (
            "config.json",
            {
                "model_type": "own",
                "architectures": ["OwnModel"],
                "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
            },
        ),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
            },
        ),
    ):
        written = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps(written | change))
    q = "model.layers.0.self_attn.q_proj"
    tree = lt.AdapterTree(base=str(base))
    tree.add("fr", adapter=lt.Adapter({q: lt.LowRank(torch.ones(2, 32), torch.ones(32, 2))}))
    tree.save(tmp_path / "zoo")
    (tmp_path / "rows.jsonl").write_text('{"path": "fr", "text": "def f"}\n')
    return tmp_path


def _over_own_code(folder: Path) -> dict[str, list[str | Path]]:
    zoo, base, rows = folder / "zoo", folder / "base", folder / "rows.jsonl"
    return {
        "check": ["check", zoo, "--base", base, "--json"],
        "generate": ["generate", zoo, "fr", "--prompt", "def ", "--max-new-tokens", "1"],
        "train": ["train", zoo, "--data", rows, "--steps", "1", "--json"],
        "eval": ["eval", zoo, "--data", rows, "--json"],
        "model": ["export", zoo, "fr", "--as", "model", "--out", folder / "model", "--json"],
    }


@slow
def test_the_code_of_a_base_runs_only_on_the_users_own_word(own_code: Path) -> None:
    told = _over_own_code(own_code)
    trust = "--trust-remote-code"
    # Training and evaluation open a base as generate does.
    trusting = {name: [*told[name], trust] for name in ("check", "generate", "model")}
    ran = {name: own_code / f"ran-{name}" for name in told}
    ran |= {f"{name}, trusting": own_code / f"ran-{name}-trusting" for name in trusting}
    asked = zip([*told.values(), *trusting.values()], ran.values(), strict=True)
    done = commands(
        own_code / "streams",
        *((arguments, {"RAN": str(mark)}) for arguments, mark in asked),
        # A "y" lies in the pipe for every question that anybody might ask.
        stdin="y\n" * 20,
        env={"HF_HOME": str(own_code / "hf")},
    )
    for name, refused in zip(told, done, strict=False):
        assert not ran[name].exists(), name
        assert (refused.returncode, refused.stdout) == (1, ""), name
        said = refused.stderr
        assert "it needs the base's own Python code, which is not run by default" in said, name
        assert trust in said
        assert "[y/N]" not in said
    for name, trusted in zip(trusting, done[len(told) :], strict=True):
        assert ran[f"{name}, trusting"].exists(), name
        assert trusted.returncode == 0, trusted.stderr
        if "--json" in trusting[name]:  # the base printed; the document stands alone all the same
            json.loads(trusted.stdout)
            assert "hello from the base" in trusted.stderr


def base_folder(folder: Path) -> nn.Module:
    """A tiny base on the disk."""
    base = ARCHS["llama"].base().float()
    base.save_pretrained(folder)
    return base


@pytest.mark.parametrize(
    "name", ["vocab.txt", "extra/vocab.txt", "generation_config.json", "model.safetensors"]
)
def test_a_file_outside_the_base_never_reaches_a_checkpoint(name: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    link, secret = tmp_path / "base" / name, tmp_path / "id_rsa"
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.rename(secret)
    else:
        secret.write_text("PRIVATE KEY")
    link.symlink_to(os.path.relpath(secret, link.parent))
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    with pytest.raises(
        FolderError, match=f"{name}: is a link to .*id_rsa, which lies outside the base"
    ):
        lt.export_model(tree, "a/d", tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
    link.unlink()
    secret.rename(link)
    lt.export_model(tree, "a/d", tmp_path / "out", base=tmp_path / "base")


def test_a_linked_folder_and_a_pipe_in_a_base_are_not_copied(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("PRIVATE KEY")
    (tmp_path / "base" / "tokenizer").symlink_to(tmp_path / "home")
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    told = lt.export_model(tree, "a/d", tmp_path / "out", base=tmp_path / "base")
    assert told.left_out == ("tokenizer",)
    assert not (tmp_path / "out" / "tokenizer").exists()
    os.mkfifo(tmp_path / "base" / "merges.txt")
    with pytest.raises(FolderError, match=r"merges\.txt: can't be copied: not a plain file"):
        lt.export_model(tree, "a/d", tmp_path / "again", base=tmp_path / "base")


def test_links_into_the_hub_s_own_blobs_are_the_base_s(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    base = base_folder(repository / "snapshots" / "abc")
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted((repository / "snapshots" / "abc").iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        file.rename(blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    lt.export_model(tree, "a/d", tmp_path / "out", base=repository / "snapshots" / "abc")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    (tmp_path / "hub" / "models--me--private" / "blobs").mkdir(parents=True)
    other = tmp_path / "hub" / "models--me--private" / "blobs" / "0"
    other.write_text("of another repository")
    (repository / "snapshots" / "abc" / "vocab.txt").symlink_to(other)
    with pytest.raises(FolderError, match=r"vocab\.txt: is a link to .*private"):
        lt.export_model(tree, "a/d", tmp_path / "again", base=repository / "snapshots" / "abc")


def test_code_is_copied_only_where_it_is_asked_for(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    (tmp_path / "base" / "modeling_x.py").write_text("print('run')")
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    told = lt.export_model(tree, "a/d", tmp_path / "out", base=tmp_path / "base")
    assert told.left_out == ("modeling_x.py",)
    assert not (tmp_path / "out" / "modeling_x.py").exists()
    told = lt.export_model(tree, "a/d", tmp_path / "with", base=tmp_path / "base", with_code=True)
    assert told.left_out == ()
    assert (tmp_path / "with" / "modeling_x.py").read_text() == "print('run')"


# ---------------------------------------------------------------- escapes for the terminal
CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
"""Puts a command into the clipboard of many terminals; the person pastes it later."""
HOSTILE = f"{CLIPBOARD}\x9b2J\r\u202e[link=file:///etc/passwd]x[/link]"


def _hostile_tree(folder: Path) -> Path:
    """A tree whose base, folder, tensors and config keys drive a terminal."""
    zoo = folder / f"zoo{HOSTILE.replace('/', '-')}"
    pair = lt.LowRank(torch.ones(2, 8), torch.ones(8, 2))
    tree = lt.AdapterTree(base=f"org/model{HOSTILE}")
    tree.add(
        "fr", adapter=lt.Adapter({f"layers.{HOSTILE}.q_proj": pair}, base=f"org/model{HOSTILE}")
    )
    tree.save(zoo)
    return zoo


def _with_config(zoo: Path, **change: object) -> Path:
    """The same tree, with other words in the config of its node."""
    config = zoo / "fr" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    (zoo / "tree.lock").unlink()
    return zoo


def _obeyed(shown: str) -> set[str]:
    """What a terminal would obey in a text: all but line ends, and what rich itself writes."""
    own = re.compile(r"\x1b\[[0-9;]*[mAKGJ]|\x1b\[\?25[lh]|\r?\n")
    return {sign for sign in own.sub("", shown) if not sign.isprintable()}


def _on_a_terminal(commands: list[list[str]]) -> str:
    """What a terminal is sent by some commands, each of which may fail."""
    code = (
        "import sys, json\n"
        "from lora_tree.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(commands)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"},
    )
    os.close(slave)
    shown = bytearray()
    while True:
        try:
            read = os.read(master, 1 << 16)
        except OSError:  # Linux's way to say that nobody holds the other end any more
            break
        if not read:
            break
        shown += read
    os.close(master)
    process.wait(timeout=60)
    return shown.decode()


def test_no_word_of_a_strangers_file_drives_the_terminal(tmp_path: Path) -> None:
    zoo = str(_hostile_tree(tmp_path / "whole"))
    base = str(save_base(tmp_path / "base"))
    other = str(
        _with_config(_hostile_tree(tmp_path / "config"), **{HOSTILE: 1, "peft_type": HOSTILE})
    )
    broken = _hostile_tree(tmp_path / "broken")
    (broken / "tree.yaml").write_text(f"version: 1\ntree: {{}}\n? {json.dumps(HOSTILE)}\n: 1\n")
    commands = [
        ["show", zoo],
        ["show", zoo, "--json"],
        ["check", zoo],
        ["check", zoo, "--json"],
        ["check", zoo, "--base", base],
        ["generate", zoo, "fr", "--prompt", "x"],
        ["export", zoo, "fr", "--out", str(tmp_path / "flat"), "--per-module"],
        ["export", zoo, "fr", "--out", str(tmp_path / "flat"), "--rank", "1", "--per-module"],
        ["export", zoo, "fr", "--as", "peft", "--out", str(tmp_path / f"out{CLIPBOARD}")],
        ["lock", zoo],
        ["show", other],
        ["check", other],
        ["check", str(broken)],
        ["show", zoo, zoo],
        [HOSTILE],
        ["promote", zoo, "fr", "--from", base],
    ]
    shown = _on_a_terminal(commands)
    assert shown.count("\\x1b]52;c;cm0gLXJmIH4=") >= len(
        commands
    )  # the names are there, as they are spelled
    assert _obeyed(shown) == set()


def test_an_error_and_a_warning_can_be_printed_anywhere(tmp_path: Path) -> None:
    hostile = f"org/model{HOSTILE}\nerror: all is well"
    error = lt.errors.SpecError(f"{hostile}: no such base", f"name another than {hostile}").within(
        hostile
    )
    told = str(error)
    assert _obeyed(told) == set()
    assert len(told.splitlines()) == 2  # a name can't pretend to be a line of ours
    assert "\\x1b]52;c;cm0gLXJmIH4=\\x07\\x9b2J\\r\\u202e" in told
    assert str(lt.StaleWarning(hostile)).count("\n") == 0
    with pytest.raises(lt.errors.LoraTreeError) as caught:
        lt.Adapter.load(_with_config(_hostile_tree(tmp_path), peft_type=HOSTILE) / "fr")
    assert _obeyed(str(caught.value)) == set()


def test_json_holds_hostile_names_whole_and_shows_none_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["show", str(_hostile_tree(tmp_path)), "--json"])
    shown = capsys.readouterr().out
    assert _obeyed(shown) == set()
    assert json.loads(shown)["base"] == f"org/model{HOSTILE}"


def test_a_picture_with_hostile_names_is_well_formed(tmp_path: Path) -> None:
    name = f"</text><script>{HOSTILE}"
    picture = LossMatrix(("", name), (name,), ((2.0,), (1.0,)), (10,)).picture()
    assert _obeyed(picture) == set()
    texts = [element.text or "" for element in ElementTree.fromstring(picture).iter()]
    assert any(text.startswith("</text><script>\\x1b]52") for text in texts)


# ------------------------------------------------- pipes, devices, and swaps between check and open
@pytest.fixture
def soon() -> Iterator[None]:
    """Whatever waits for a pipe that nobody writes to is ended."""

    def too_long(*_: object) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def swapped(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, swap: Callable[[], object]
) -> None:
    """Call ``swap`` right after the first answer of a function that looks at files."""
    real, todo = getattr(module, name), [swap]

    def looks(*args: Any, **more: Any) -> Any:
        answer = real(*args, **more)
        if answer and todo:
            todo.pop()()
        return answer

    monkeypatch.setattr(module, name, looks)


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def test_a_shard_of_a_base_that_is_a_pipe_is_refused(soon: None, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "one.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    pipe(base / "one.safetensors")
    with pytest.raises(FormatError, match=r"one.safetensors: can't be read: not a plain file"):
        open_checkpoint(base)


def test_a_shard_is_read_from_the_file_whose_header_was_read(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    norm = open_checkpoint(base).tensors["model.norm.weight"]
    assert torch.equal(norm.read(), load_file(base / "model.safetensors")["model.norm.weight"])
    other = {name: tensor * 2 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(other, tmp_path / "other", {"format": "pt"})
    os.replace(tmp_path / "other", base / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"model.safetensors: has changed since its header was read"
    ):
        norm.read()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_an_adapter_s_file_that_becomes_a_pipe_is_refused(
    soon: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    adapter(1).save(tmp_path / "one")
    swapped(monkeypatch, os.path, "isfile", lambda: pipe(tmp_path / "one" / name))
    with pytest.raises(
        FormatError, match=f"one: half an adapter: .* without {name}"
    ):  # as it is by now
        lt.Adapter.load(tmp_path / "one")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_becomes_a_link_out_of_the_tree_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    adapter(1).save(tmp_path / "zoo/fr")
    adapter(2).save(tmp_path / "secret")
    loaded = lt.load(tmp_path / "zoo")
    file = tmp_path / "zoo/fr" / name

    def link() -> None:
        file.unlink()
        file.symlink_to(tmp_path / "secret" / name)

    swapped(monkeypatch, os.path, "isfile", link)
    with pytest.raises(LoraTreeError, match="zoo/fr"):
        loaded.adapter("fr")


def test_a_checkpoint_with_a_pipe_in_it_is_not_promoted(soon: None, tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "checkpoint-1/nodes/fr")
    pipe(tmp_path / "checkpoint-1/factors.safetensors")
    with pytest.raises(FormatError, match=r"factors.safetensors: can't be read: not a plain file"):
        promote(lt.AdapterTree(), "fr", tmp_path / "checkpoint-1")


@pytest.mark.parametrize("name", ["tree.yaml", "tree.lock"])
def test_a_yaml_and_a_lock_that_are_pipes_are_refused(
    soon: None, tmp_path: Path, name: str
) -> None:
    tree().save(tmp_path)
    pipe(tmp_path / name)
    with pytest.raises(LoraTreeError, match=name):
        lt.load(tmp_path)


def test_lock_files_in_a_cache_are_opened_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "cache/.locks").mkdir(parents=True)
    (tmp_path / "cache/.locks/budget").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderError, match=r"\.locks/budget: can't lock it"):
        flat_cache.FlatCache(tmp_path / "cache", budget_bytes=1 << 30, form=flat_cache.FlatForm(8))
    assert not (tmp_path / "elsewhere").exists()


# ---------------------------------------------------------------- sizes
HUGE = 1 << 40  # more than this machine has; a sparse file of that length takes no room


def refuse_to_work(
    real: Callable[..., Any] | None = None, only: Callable[[Any], bool] = bool
) -> Any:
    """Return a function to put in the place of one that a refusal must come before."""

    def function(*arguments: Any, **options: Any) -> Any:
        assert real is not None, "the work was done all the same"
        assert not (arguments and only(arguments[0])), "the work was done all the same"
        return real(*arguments, **options)

    return function


def huge_adapter(folder: Path) -> None:
    """A whole adapter by its header, with 1 TiB of zeros behind it."""
    wide, middle = HUGE // 64, HUGE // 2
    tensors = {
        "base_model.model.q.lora_A.weight": {
            "dtype": "F32",
            "shape": [8, wide],
            "data_offsets": [0, middle],
        },
        "base_model.model.q.lora_B.weight": {
            "dtype": "F32",
            "shape": [wide, 8],
            "data_offsets": [middle, HUGE],
        },
    }
    head = json.dumps(tensors).encode()
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(folder / WEIGHTS, 8 + len(head) + HUGE)
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q"]})
    )


def test_an_adapter_larger_than_memory_is_refused_before_it_is_read_or_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge_adapter(tmp_path / "zoo/fr")
    adapter(1).save(tmp_path / "zoo/de")
    loaded = lt.load(tmp_path / "zoo")
    assert loaded["fr"].source is not None
    assert loaded["fr"].source.outline().numel == HUGE // 4
    monkeypatch.setattr(
        "lora_tree.formats.safetensors._ordinary", refuse_to_work(_ordinary, lambda n: n >= HUGE)
    )
    monkeypatch.setattr("lora_tree.folder.disk.digest", refuse_to_work())
    for use in (
        lambda: lt.Adapter.load(tmp_path / "zoo/fr"),
        lambda: loaded.adapter("fr"),
        lambda: lt.lock(tmp_path / "zoo"),
    ):
        with pytest.raises(
            BudgetError, match=r"fr.*takes 1,099,511,627,776 bytes of memory, and [\d,]+ are free"
        ):
            use()
    assert [(problem.node, problem.kind) for problem in lt.check(tmp_path / "zoo")] == [
        ("fr", "adapter")
    ]
    assert loaded.adapter("de") is not None


def test_memory_is_compared_with_what_is_free_and_a_pool_with_all_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, total = memory.free_bytes(), memory.total_bytes()
    assert free is not None
    assert total is not None
    assert 0 < free <= total < HUGE
    monkeypatch.setattr(memory, "free_bytes", lambda: 1 << 30)
    monkeypatch.setattr(memory, "total_bytes", lambda: 1 << 31)
    memory.check_fits(1 << 30, "x")
    memory.check_fits(1 << 31, "x", free=False)
    with pytest.raises(BudgetError, match=r"1,073,741,824 are free"):
        memory.check_fits((1 << 30) + 1, "x")
    with pytest.raises(BudgetError, match=r"2,147,483,648 is all there is"):
        memory.check_fits((1 << 31) + 1, "x", free=False)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)  # a system that does not say
    memory.check_fits(HUGE, "x")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_own_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    names = {1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes",
                 "memory/memory.stat", "cache"),
             2: ("memory.max", "memory.current", "memory.stat", "file")}[version]  # fmt: skip
    monkeypatch.setattr(memory, "_GROUP", str(tmp_path))
    without = memory.total_bytes()
    (tmp_path / "memory").mkdir()
    for name, text in zip(
        names, ("1000\n", "700\n", f"anon 1\n{names[3]} 250\nother 3\n"), strict=False
    ):
        (tmp_path / name).write_text(text)
    assert (memory.total_bytes(), memory.free_bytes()) == (1000, 550)
    (tmp_path / names[0]).write_text("max\n" if version == 2 else "9223372036854771712\n")
    assert memory.total_bytes() == without


TOO_MANY = {
    "brackets": b'{"a": [' + b"[]," * 1_000_000 + b"[]]}",
    "keys": b'{"a": {}' + b',"b":0' * 2_000_001 + b"}",
    "depth": b'{"a": ' + b"[" * 2_000_001,
}


@pytest.mark.parametrize("data", TOO_MANY.values(), ids=TOO_MANY)
def test_json_of_too_many_values_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(json, "loads", refuse_to_work())
    with pytest.raises(
        FormatError, match=r"tree.lock: some 2,000,\d+ values; the most is 2,000,000"
    ):
        strict_json.loads(data, "tree.lock")


@pytest.mark.parametrize("depth", [33, 500, 100_000, 1_900_000])
def test_json_that_is_nested_deeply_is_refused_by_its_depth(depth: int) -> None:
    for text in (
        b'{"a":' + b"[" * depth + b"]" * depth + b"}",
        b'{"a":' * depth + b"1" + b"}" * depth,
    ):
        with pytest.raises(FormatError, match="nested"):
            strict_json.loads(text, "tree.lock")


def test_files_over_their_limits_are_refused_by_their_size(tmp_path: Path) -> None:
    tree().save(tmp_path)
    for name, most in (("tree.lock", limits.LOCK_BYTES), ("tree.yaml", limits.YAML_BYTES)):
        whole = (tmp_path / name).read_bytes()
        os.truncate(tmp_path / name, most + 1)
        told = rf"{name}: {most + 1:,} bytes; the most is {most:,}"
        with pytest.raises(LoraTreeError, match=told):
            lt.load(tmp_path)
        (tmp_path / name).write_bytes(whole)
    os.truncate(tmp_path / "fr" / CONFIG, limits.CONFIG_BYTES + 1)
    with pytest.raises(FormatError, match="more than 16 MiB"):
        lt.Adapter.load(tmp_path / "fr")


def test_ten_thousand_nodes_are_far_below_the_limits() -> None:
    digest, file = "0" * 64, lockfile.FileLock(size=1, mtime_ns=2**60)
    node = lockfile.NodeLock(content=digest, config=file, weights=file, trained_on=digest)
    step = lockfile.LineageLock(
        above=digest, content=digest, weight=0.123456789, node="language/domain/customer-1234"
    )
    paths = [f"language-{i % 10}/domain-{i % 100}/customer-{i}" for i in range(10_000)]
    lineages = {f"{i:064x}": step for i in range(10_000)}
    lock = lockfile.TreeLock(nodes=dict.fromkeys(paths, node), lineages=lineages)
    data = lockfile.render_lock(lock)
    assert len(data) < limits.LOCK_BYTES / 4
    assert lockfile.parse_lock(data, "tree.lock") == lock
    nodes = {path.replace("/", "."): {"weight": 0.8} for path in paths}
    text = yamlfile.render_yaml({"version": 1, "tree": nodes})
    assert len(text) < limits.YAML_BYTES / 2
    assert len(yamlfile.read_spec(text, "tree.yaml")[0].tree) == 10_000


@slow
def test_a_tree_yaml_of_keys_alone_is_refused_where_they_are_too_many() -> None:
    text = b"version: 1\n" + b"".join(b"k%d:\n" % i for i in range(150_000))
    assert len(text) < limits.YAML_BYTES
    with pytest.raises(SpecError, match=r"tree.yaml:\d+:\d+: more than 200,000 keys and values"):
        yamlfile.read_spec(text, "tree.yaml")


def test_thousands_of_mistakes_are_not_all_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = difflib.get_close_matches

    def counted(word: str, *arguments: Any, **options: Any) -> list[str]:
        asked.append(word)
        return real(word, *arguments, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    text = b"version: 1\n" + b"".join(b"versoin%d: 1\n" % i for i in range(1_000))
    with pytest.raises(SpecError) as caught:
        yamlfile.read_spec(text, "tree.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "tree.yaml:2:1: unknown key 'versoin0'; did you mean 'version'?"
    assert lines[-1] == "  and 950 more"
    assert len(lines) == 51
    assert len(asked) <= 50


def test_a_header_of_too_many_tensors_is_refused_before_they_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_tree.formats.safetensors_header._entry", refuse_to_work())
    head = b"{" + b",".join(b'"t%d":0' % i for i in range(limits.TENSORS + 1)) + b"}"
    with pytest.raises(FormatError, match="200,001 tensors; the most is 200,000"):
        parse_header(head, 0, "adapter_model.safetensors")


def seconds(work: Callable[[], object]) -> float:
    """The least time of this process that it took, of three tries; Python's collector has a rhythm
    of its own.
    """
    found = []
    for _ in range(3):
        gc.disable()
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
        gc.enable()
    return min(found)


def many_tensors(n: int) -> Callable[[], object]:
    names = {
        f"t{i}": {"dtype": "BF16", "shape": [1, 1], "data_offsets": [2 * i, 2 * i + 2]}
        for i in range(n)
    }
    head = json.dumps(names).encode()
    return lambda: parse_header(head, 2 * n, "f")


def many_nodes(n: int) -> Callable[[], object]:
    text = b"version: 1\ntree:\n" + b"".join(b"  n%d: {weight: 0.5}\n" % i for i in range(n))
    return lambda: yamlfile.read_spec(text, "tree.yaml")


def many_locked(n: int) -> Callable[[], object]:
    digest, file = "0" * 64, lockfile.FileLock(size=1, mtime_ns=1)
    node = lockfile.NodeLock(content=digest, config=file, weights=file, trained_on=digest)
    data = lockfile.render_lock(lockfile.TreeLock(nodes={f"n{i}": node for i in range(n)}))
    return lambda: lockfile.parse_lock(data, "tree.lock")


MANY = {"tensors": (many_tensors, 1_000), "yaml": (many_nodes, 100), "lock": (many_locked, 500)}


@pytest.mark.parametrize(("made", "n"), MANY.values(), ids=MANY)
def test_the_parsers_take_time_in_proportion_to_what_they_read(
    made: Callable[[int], Callable[[], object]], n: int
) -> None:
    assert seconds(made(8 * n)) < 8 * 3 * seconds(made(n))  # a square would be 64 times as long


# ---------------------------------------------------------------- commit records
STAGED = f"stage-{'0' * 32}"


def plant(
    folder: Path,
    *,
    moves: dict[str, object] | None = None,
    deletes: dict[str, object] | None = None,
) -> None:
    """A commit record as somebody's download may hold it: place → what it says lay there."""
    stage = folder / ".lora_tree" / STAGED
    stage.mkdir(parents=True)
    data = b"planted"
    told = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    record = {
        "version": 2,
        "stage": STAGED,
        "moves": [{"to": place, "was": was, **told} for place, was in (moves or {}).items()],
        "deletes": [{"at": place, "was": was} for place, was in (deletes or {}).items()],
    }
    for i in range(len(moves or {})):
        (stage / str(i)).write_bytes(data)
    (stage.parent / "commit.json").write_text(json.dumps(record))


def told(file: Path) -> dict[str, int]:
    return {"size": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a tree in it, and with files of whoever lives there."""
    adapter(1).save(tmp_path / "fr")
    lt.lock(tmp_path)
    adapter(2).save(tmp_path / "mine")
    for name in ("uv.lock", "docker-compose.yml", "mkdocs.yaml"):
        (tmp_path / name).write_text("mine")
    return tmp_path


def untouched(folder: Path, match: str) -> None:
    """The next writer says what is wrong, and changes nothing."""
    before = listing(folder)
    with pytest.raises(LoraTreeError, match=match):
        adapter(3).save(folder / "fr")
        lt.lock(folder)
    after = listing(folder)
    own = {name for name in before if not name.startswith("fr/")}
    assert {name: after.get(name) for name in own} == {name: before[name] for name in own}


def test_a_record_deletes_no_file_but_of_a_node(project: Path) -> None:
    plant(project, deletes={"uv.lock": told(project / "uv.lock")})
    untouched(project, r"'uv\.lock' is no file that a save deletes\n  remove the record")


def test_the_record_of_an_earlier_version_is_not_carried_out(project: Path) -> None:
    plant(project)
    record = {"version": 1, "stage": STAGED, "moves": [], "deletes": ["uv.lock"]}
    (project / ".lora_tree/commit.json").write_text(json.dumps(record))
    untouched(
        project,
        r"an earlier lora_tree \(format 1\).*\n  let that version finish it: lora-tree lock",
    )


@pytest.mark.parametrize("guess", [None, {"size": 4, "mtime_ns": 0}], ids=["nothing", "its size"])
def test_a_record_replaces_and_deletes_nothing_that_it_does_not_know(
    project: Path, guess: object
) -> None:
    plant(project, moves={"docker-compose.yml": guess})
    untouched(
        project,
        "docker-compose.yml: not the file that an interrupted save was to replace or delete",
    )
    shutil.rmtree(project / ".lora_tree")
    plant(project, deletes={f"mine/{name}": guess for name in (CONFIG, WEIGHTS)})
    untouched(project, f"mine/{CONFIG}: not the file that an interrupted save")
    shutil.rmtree(project / ".lora_tree")
    plant(project, moves={"new/adapter_config.json": None, f"mine/{WEIGHTS}": guess})
    untouched(project, f"mine/{WEIGHTS}: not the file that an interrupted save")
    assert not (project / "new").exists(), "all is compared before anything is done"


@pytest.mark.parametrize(
    "places",
    [
        ("tree.yaml", "mkdocs.yaml"),
        ("tree.lock", "uv.lock"),
        ("tree.yaml", "uv.lock"),
        ("mkdocs.yaml", "mkdocs.yaml.lock"),
    ],
    ids=str,
)
def test_a_record_writes_one_yaml_and_its_own_lock(project: Path, places: tuple[str, ...]) -> None:
    plant(
        project,
        moves={place: told(project / place) for place in places if (project / place).exists()}
        | {place: None for place in places if not (project / place).exists()},
    )
    untouched(project, "of more than one tree, and a save writes one")


def test_what_no_save_staged_stays_where_it_is(project: Path) -> None:
    stage = project / ".lora_tree" / STAGED
    (stage / "0").mkdir(parents=True)
    (stage / "1").write_text("staged by a save that was cut off")
    (stage / "notes.txt").write_text("mine")
    lt.lock(project)
    assert sorted(file.name for file in stage.iterdir()) == ["0", "notes.txt"]


def test_a_cut_off_save_does_not_undo_what_came_after_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    lt.lock(project)
    tree = lt.load(project)
    tree.update("fr", adapter=adapter(4))
    with monkeypatch.context() as patched:
        patched.setattr(commit, "carry_out", killed)
        with pytest.raises(KeyboardInterrupt):
            tree.save(project)
    (project / f"fr/{CONFIG}").write_text("edited since")
    with pytest.raises(
        FolderError, match=f"fr/{CONFIG}: not the file that an interrupted save was to replace"
    ):
        lt.lock(project)
    assert (project / f"fr/{CONFIG}").read_text() == "edited since"
    (project / f"fr/{CONFIG}").unlink()
    lt.lock(project)
    assert value(lt.load(project)) == value(tree)


# ---------------------------------------------------------------- modes
def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o000], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mask: int) -> None:
    tree = lt.AdapterTree(base="org/model")
    tree.add("fr", adapter=adapter(1), weight=0.5)
    tree.save(tmp_path / "zoo")
    files = [
        tmp_path / "zoo" / name
        for name in (f"fr/{CONFIG}", f"fr/{WEIGHTS}", "tree.yaml", "tree.lock")
    ]
    for file, bits in zip(files, (0o600, 0o640, 0o604, 0o660), strict=True):
        file.chmod(bits)
    before = [(file.read_bytes(), mode(file)) for file in files]
    scaled = lt.Adapter({name: lt.LowRank(m.A, m.B, 0.5) for name, m in adapter(2).modules.items()})
    tree.update("fr", adapter=scaled, weight=0.25)
    tree.save(tmp_path / "zoo")
    for file, (data, bits) in zip(files, before, strict=True):
        assert file.read_bytes() != data
        assert oct(mode(file)) == oct(bits)
    adapter(3).save(tmp_path / "zoo/fr")
    assert (mode(files[0]), mode(files[1])) == (0o600, 0o640)
    disk.replace(files[2], b"another")
    assert mode(files[2]) == 0o604


@pytest.mark.parametrize(
    ("folder", "files", "folders"),
    [(0o700, 0o600, 0o700), (0o750, 0o640, 0o750), (0o2770, 0o660, 0o2770)],
    ids=str,
)
def test_new_files_follow_their_folder(
    tmp_path: Path, mask: int, folder: int, files: int, folders: int
) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    zoo.chmod(folder)
    tree = lt.AdapterTree()
    tree.add("fr", adapter=adapter(1))
    tree.add("fr/legal", adapter=adapter(2))
    tree.save(zoo)
    found = {oct(mode(file)) for file in zoo.rglob("*") if file.is_file()}
    assert found == {oct(files)}
    assert {oct(mode(file)) for file in zoo.rglob("*") if file.is_dir()} == {oct(folders)}


def test_new_folders_follow_the_mask_and_a_staged_file_is_never_readable_by_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    adapter(1).save(tmp_path / "one")
    assert mode(tmp_path / "one") == 0o777 & ~mask
    weights = tmp_path / "one" / WEIGHTS
    assert mode(weights) == 0o666 & ~mask & ~0o002
    weights.chmod(0o600)
    seen, real = [], disk.sync_file

    def sync(file: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(file).st_mode))
        real(file)

    monkeypatch.setattr(disk, "sync_file", sync)
    adapter(2).save(tmp_path / "one")
    assert seen[1] == 0o600


# ---------------------------------------------------------------- outside the folder
@pytest.mark.parametrize("name", ["tree.yaml", "tree.lock"])
def test_a_tree_s_own_file_that_becomes_a_link_out_of_the_folder_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tree().save(tmp_path / "zoo")
    lt.AdapterTree(base="secret").save(tmp_path / "other")
    real = opening.inside

    def looks(path: str, folder: str) -> bool:
        answer = real(path, folder)
        if path.endswith(name):  # right after the look that finds it inside
            os.unlink(tmp_path / "zoo" / name)
            os.symlink(tmp_path / "other" / name, tmp_path / "zoo" / name)
            monkeypatch.setattr(opening, "inside", real)
        return answer

    monkeypatch.setattr(opening, "inside", looks)
    with pytest.raises(
        FolderError, match=rf"zoo/{name}: .*which is not where it may lie|a link that leads out"
    ):
        lt.load(tmp_path / "zoo")


def test_a_named_adapter_s_file_that_becomes_a_link_while_it_is_read_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(1).save(tmp_path / "zoo/.kept/one")
    adapter(2).save(tmp_path / "secret")
    (tmp_path / "zoo/tree.yaml").write_text("version: 1\ntree: {fr: {adapter: .kept/one}}\n")
    loaded = lt.load(tmp_path / "zoo", outside=False)
    file = tmp_path / "zoo/.kept/one" / WEIGHTS

    real = source.inside

    def looks(path: str, folder: str) -> bool:
        answer = real(path, folder)
        if (
            path.endswith(WEIGHTS) and not file.is_symlink()
        ):  # right after the look that finds it inside
            file.unlink()
            file.symlink_to(tmp_path / "secret" / WEIGHTS)
        return answer

    monkeypatch.setattr(source, "inside", looks)
    with pytest.raises(FormatError, match=r"one.*leads"):
        loaded.adapter("fr")


@pytest.mark.parametrize("how", ["relative", "absolute", "home", "through a link"])
def test_an_adapter_outside_of_the_folder_is_refused_where_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    zoo, secret = tmp_path / "zoo", tmp_path / "secret"
    adapter(1).save(secret)
    adapter(2).save(zoo / "de")
    monkeypatch.setenv("HOME", str(tmp_path))
    (zoo / "link").symlink_to(secret)
    named = {
        "relative": "../secret",
        "absolute": secret,
        "home": "~/secret",
        "through a link": "link",
    }
    (zoo / "tree.yaml").write_text(f"version: 1\ntree:\n  fr:\n    adapter: {named[how]}\n")
    if how != "through a link":
        (zoo / "link").unlink()
    assert lt.load(zoo).paths() == ["de", "fr"]
    with pytest.raises(FolderError) as caught:
        lt.load(zoo, outside=False)
    text = str(caught.value)
    assert f"{zoo}/tree.yaml:4:5: node fr: adapter: {named[how]} leads out of {zoo}" in text
    tree, problems = survey(zoo, outside=False)  # a server goes on with the others
    assert tree.paths() == ["de"]
    assert [(problem.node, problem.kind) for problem in problems if problem.node == "fr"] == [
        ("fr", "folder")
    ]


def test_an_adapter_inside_of_the_folder_is_not_outside(tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "zoo/.kept/one")
    (tmp_path / "zoo/tree.yaml").write_text("version: 1\ntree: {fr: {adapter: .kept/one}}\n")
    assert value(lt.load(tmp_path / "zoo", outside=False)) == value(lt.load(tmp_path / "zoo"))


@pytest.mark.parametrize("swapped", ["the folder", "the file"])
def test_a_folder_that_becomes_a_link_out_of_the_tree_after_it_was_opened_is_not_read(
    tmp_path: Path, swapped: str
) -> None:
    zoo = tmp_path / "zoo"
    for folder in (zoo / "de", zoo / ".kept/one", tmp_path / "secret"):
        adapter(1).save(folder)
    (zoo / "tree.yaml").write_text("version: 1\ntree: {fr: {adapter: .kept/one}}\n")
    tree = lt.load(zoo, outside=False)
    for folder in (zoo / "de", zoo / ".kept/one"):
        place = folder if swapped == "the folder" else folder / WEIGHTS
        place.rename(tmp_path / f"old-{folder.name}")
        place.symlink_to(tmp_path / "secret" / ("" if swapped == "the folder" else WEIGHTS))
    for node in ("de", "fr"):
        with pytest.raises(FormatError, match=r"leads out of|half an adapter"):
            tree.adapter(node)


def test_a_base_outside_of_the_folder_is_not_looked_at_where_that_was_asked_for(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    tree = lt.AdapterTree(base=str(base))
    tree.add("fr", adapter=adapter(1))
    tree.save(tmp_path / "zoo")

    inside = os.path.realpath(base)
    with looking() as looked:
        assert lt.load(tmp_path / "zoo", outside=False).base == str(base)
    assert looked
    assert not [path for path in looked if path.startswith(inside)]
    with looking() as looked:
        lt.load(tmp_path / "zoo")
    assert [path for path in looked if path.startswith(inside)]


# ---------------------------------------------------------------- numbers that are not finite
def llama_zoo(
    folder: Path, *, weight: float = 1.0, **config: object
) -> tuple[nn.Module, lt.AdapterTree]:
    """fr → legal over a tiny Llama, as files; ``config`` is put into legal's
    adapter_config.json.
    """
    base = base_folder(folder / "base")
    legal = ARCHS["llama"].tree(base).flatten("a", dtype=torch.float32).scaled(0.01)
    tree = lt.AdapterTree(base=str(folder / "base"))
    tree.add("fr", adapter=legal)
    tree.add("fr/legal", adapter=legal, weight=weight)
    tree.save(folder / "zoo")
    written = json.loads((folder / "zoo" / "fr" / "legal" / "adapter_config.json").read_text())
    (folder / "zoo" / "fr" / "legal" / "adapter_config.json").write_text(
        json.dumps(written | config)
    )
    (folder / "zoo" / "tree.lock").unlink()
    return base, lt.load(folder / "zoo")


@pytest.mark.parametrize("how", ["lora_alpha", "weight", "both"])
def test_a_scale_that_leaves_no_finite_number_is_refused_before_the_first_write(
    how: str, tmp_path: Path
) -> None:
    alpha = {"lora_alpha": 10**300, "use_rslora": False} if how != "weight" else {}
    base, tree = llama_zoo(tmp_path, weight=1e300 if how != "lora_alpha" else 1.0, **alpha)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    problems = [(p.node, p.kind) for p in lt.check(tmp_path / "zoo")]
    assert problems == [("fr/legal", "numbers")]
    model = lt.attach(tree, base)
    q_proj = r"fr/legal: .*model\.layers\.\d\.[a-z_.]+: .*"
    for mode in ("merged", "unmerged"):
        with pytest.raises(BaseMismatch, match=q_proj):
            model.activate("fr/legal", mode=mode)
    with pytest.raises(BaseMismatch, match=q_proj), model.route(["fr", "fr/legal"]):
        pass
    assert (model.active, model.state.value) == ("", "bare")
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    model.activate("fr")
    model.detach()
    for call in (
        lambda: tree.flatten("fr/legal"),
        lambda: lt.portable(tree, "fr/legal"),
        lambda: lt.export_model(tree, "fr/legal", tmp_path / "out"),
    ):
        with pytest.raises(LoraTreeError, match="fr/legal"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("delta", "fits"), [(5503.0, True), (5535.0, False), (-125530.0, False), (-125515.0, True)]
)
def test_a_sum_that_fp16_can_not_hold_is_refused_before_the_first_write(
    delta: float, fits: bool, tmp_path: Path
) -> None:
    """Against W + ΔW in float64, rounded once."""
    base = base_folder(tmp_path / "base").half()
    name = "model.layers.0.self_attn.q_proj"
    weight = base.get_submodule(name).weight
    with torch.no_grad():
        weight[3, 5] = 60000.0
    base.save_pretrained(tmp_path / "base")
    A, B = torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1)
    A[0, 5], B[3, 0] = 1.0, delta
    tree = lt.AdapterTree(base=str(tmp_path / "base"))
    tree.add("fr", adapter=lt.Adapter({name: lt.LowRank(A, B)}))
    dense = (weight.double() + B.double() @ A.double()).half()
    assert bool(dense.isfinite().all()) is fits
    model = lt.attach(tree, base)
    if fits:
        model.activate("fr")
        assert torch.equal(weight, dense)
        lt.export_model(tree, "fr", tmp_path / "out")
        return
    with pytest.raises(
        BaseMismatch,
        match=rf"^fr: {name}: its scale .* goes over 65504, the largest number of float16",
    ):
        model.activate("fr")
    assert weight[3, 5] == 60000.0
    with pytest.raises(BaseMismatch, match=rf"^fr: {name}: its scale .* goes over 65504"):
        lt.export_model(tree, "fr", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.activate("fr", mode="unmerged")  # nothing is written there


def test_scales_that_fused_experts_have_in_their_factors_count_as_well(tmp_path: Path) -> None:
    """One pair for each expert under an earlier transformers: the fused parameter has the scales in
    its B.
    """
    case = CASES["mixtral"]
    model: Any = case.base().half()
    modules = {
        name: lt.LowRank(torch.full((2, into), 0.01), torch.full((out, 2), 0.01))
        for name, (out, into) in case.old.items()
        if ".experts." in name
    }
    tree = lt.AdapterTree()
    tree.add("fine", adapter=lt.Adapter(modules))
    first = min(modules)
    tree.add("huge", adapter=lt.Adapter({**modules, first: modules[first].scaled(1e9)}))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attached = lt.attach(tree, model)
    with pytest.raises(BaseMismatch, match=r"huge: .*experts.* goes over 65504"):
        attached.activate("huge")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    attached.activate("fine")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_check_looks_at_increments_in_the_dtype_of_the_base(tmp_path: Path, shell: Shell) -> None:
    base = base_folder(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    out, into = base.get_submodule(name).weight.shape
    for path, size in (("fine", 60000.0), ("huge", 70000.0)):
        tree = lt.AdapterTree()
        tree.add(
            "fr",
            adapter=lt.Adapter(
                {name: lt.LowRank(torch.full((1, into), size / 100), torch.full((out, 1), 100.0))}
            ),
        )
        tree.save(tmp_path / path)
    for dtype, path, code in (
        (torch.bfloat16, "huge", 0),
        (torch.float16, "huge", 1),
        (torch.float16, "fine", 0),
    ):
        base.to(dtype).save_pretrained(tmp_path / "base")
        found, out, err = shell("check", tmp_path / path, "--base", tmp_path / "base")
        assert found == code, out + err
        assert ("the largest number of float16" in out) is bool(code)
    assert lt.check(tmp_path / "huge") == []


def test_a_factor_that_is_nan_never_reaches_a_base(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    before = base[0].weight.detach().clone()
    tree = lt.AdapterTree()
    for path, number in (("nan", float("nan")), ("inf", float("inf")), ("fine", 1.0)):
        tree.add(
            path,
            adapter=lt.Adapter({"0": lt.LowRank(torch.full((2, 4), number), torch.ones(3, 2))}),
        )
    model = lt.attach(tree, base)
    for path in ("nan", "inf", {"fine": 0.5, "nan": 0.5}):
        for mode in ("merged", "unmerged"):
            with pytest.raises(
                BaseMismatch, match=r"^(nan|inf): 0: a factor holds NaN or an infinity"
            ):
                model.activate(path, mode=mode)
    model.activate("fine")
    assert torch.equal(base[0].weight, before + 2.0)


# ---------------------------------------------------------------- versions of our own files
NEWER_YAML = {
    "known keys": "version: 2\nbase: org/model\n",
    "unknown keys": "tree: {fr: {soul: 1}}\nversion: 2  # of the future\nmoods: {}\n",
    "no plain YAML": "base: &b org/model\nversion: 3\nother: *b\n",
    "no YAML at all": "version: 2\ntree: [\n",
}


def newer(folder: Path, file: Path, number: int, reads: int = 1) -> None:
    """Every way in says that the file is newer, first and alone, and leaves all files as they
    are.
    """
    before = listing(folder)
    told = rf"\A{re.escape(str(file))}(:\d+:\d+)?: written by a newer lora_tree \(format {number}\)"
    told += rf"; this one reads {reads}\n"
    for use in (lt.load, lt.lock, survey, lambda path: tree().save(path)):
        with pytest.raises(NewerFormat, match=told) as caught:
            use(folder)
        assert "upgrade" in str(caught.value)
        assert not re.search("remove|restore|lora-tree lock", str(caught.value))
    problems = lt.check(folder)
    assert len(problems) == 1
    assert re.match(told, problems[0].text)
    assert listing(folder) == before


@pytest.mark.parametrize("text", NEWER_YAML.values(), ids=NEWER_YAML)
def test_a_newer_tree_yaml_is_said_first_and_alone(tmp_path: Path, text: str) -> None:
    tree().save(tmp_path / "zoo")
    (tmp_path / "zoo/tree.yaml").write_text(text)
    (tmp_path / "zoo/tree.lock").write_text("{broken")
    newer(tmp_path / "zoo", tmp_path / "zoo/tree.yaml", 3 if "3" in text else 2)


def test_a_newer_lock_is_said_first_and_alone(tmp_path: Path) -> None:
    tree().save(tmp_path / "zoo")
    lock = json.loads((tmp_path / "zoo/tree.lock").read_text())
    for changed in ({**lock, "version": 2}, {"version": 2, "nodes": [], "souls": {}}):
        (tmp_path / "zoo/tree.lock").write_text(json.dumps(changed))
        (tmp_path / "zoo/tree.yaml").write_text("version: 1\nunknown: 1\n")
        newer(tmp_path / "zoo", tmp_path / "zoo/tree.lock", 2)


def test_a_newer_commit_record_is_said_first_and_alone(tmp_path: Path) -> None:
    tree().save(tmp_path / "zoo")
    (tmp_path / "zoo/.lora_tree").mkdir()
    (tmp_path / "zoo/.lora_tree/commit.json").write_text('{"version": 3, "moves": {}}')
    newer(tmp_path / "zoo", tmp_path / "zoo/.lora_tree/commit.json", 3, reads=2)
