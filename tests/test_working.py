"""Working on a tree from the shell: what a command prints, what it saves, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from dense import zoo_of
from shell import Shell, answer
from zoo import listing, opened

import lora_tree as lt


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """fr (1) → legal (2, half), medical (3); misc, a group; de, the same as fr."""
    tree = lt.AdapterTree(base="org/model")
    tree.add("fr", adapter=zoo_of(1))
    tree.add("fr/legal", adapter=zoo_of(2), weight=0.5)
    tree.add("fr/medical", adapter=zoo_of(3))
    tree.add("misc", group=True)
    tree.add("de", adapter=zoo_of(1))
    tree.save(tmp_path / "zoo")
    return tmp_path / "zoo"


# ---------------------------------------------------------------------- diff
def test_diff_tells_what_moved(shell: Shell, zoo: Path) -> None:
    code, out, err = shell("diff", zoo, "fr/legal", "fr/medical")
    assert (code, err) == (0, "")
    assert out.startswith("fr/legal → fr/medical: moved ")
    assert "block.mlp" in out
    assert shell("diff", zoo, "fr", "de")[1] == "fr and de are the same\n"
    told = answer(shell, "diff", zoo, "fr/legal", "fr/medical")
    wanted = lt.diff_paths(lt.load(zoo), "fr/legal", "fr/medical")
    assert told["moved"] == wanted.moved
    assert told["modules"]["q_proj"]["cosine"] == wanted.modules["q_proj"].cosine
    assert "and 4 more modules" in shell("diff", zoo, "fr", "fr/legal", "--most", "1")[1]


def test_diff_of_what_never_trained_does_not_call_it_the_same(shell: Shell, tmp_path: Path) -> None:
    zero = lt.Adapter({"q": lt.LowRank(torch.ones(2, 4), torch.zeros(4, 2))})
    other = lt.Adapter({"q": lt.LowRank(-torch.ones(2, 4), torch.zeros(4, 2))})
    tree = lt.AdapterTree(defaults={"target_modules": ["q"]})
    tree.add("fr", adapter=zero)
    tree.add("de", adapter=other)
    tree.add("it")
    tree.save(tmp_path / "zoo")
    for a, b in (("fr", "de"), ("fr", "it"), ("it", "")):
        told = shell("diff", tmp_path / "zoo", a, b)[1]
        name = b or "the base"
        assert told == f"{a} and {name} add nothing: what differs between them never trained\n"
    assert answer(shell, "diff", tmp_path / "zoo", "fr", "it")["fresh"] == ["it"]
    assert shell("diff", tmp_path / "zoo", "it", "it")[1] == "it and it are the same\n"


def test_diff_compares_trees(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    tree.update("fr/legal", adapter=zoo_of(5), weight=1.0)
    tree.remove("misc")
    tree.save(tmp_path / "other")
    code, out, _ = shell("diff", zoo, "--with", tmp_path / "other")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "only in the first: misc"
    assert lines[1] == "fr/legal: weight 0.5 → 1"
    assert lines[2].startswith("fr/legal: moved ")
    assert shell("diff", zoo, "--with", zoo)[1] == "the two trees are the same\n"
    both = answer(shell, "diff", zoo, "fr/legal", "--with", tmp_path / "other")
    assert both["moved"] > 0.0
    assert both["a"] == f"{zoo}: fr/legal"


def test_diff_needs_two_sides(shell: Shell, zoo: Path) -> None:
    assert "name two paths, or a second tree" in shell("diff", zoo, "fr")[2]
    code, _, err = shell("diff", zoo, "fr", "fr/leagl")
    assert code == 1
    assert "did you mean 'fr/legal'?" in err


# ---------------------------------------------------------------------- similar
def test_similar_lists_pairs_and_clusters(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    code, out, err = shell("similar", zoo, "--picture", tmp_path / "map.svg")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "4 adapters, exact"
    assert lines[1] == "  1.000   de   fr"
    assert "alike: de, fr" in lines
    assert lines[-1] == "like no other by 0.5: 2"
    ElementTree.fromstring((tmp_path / "map.svg").read_text())
    told = answer(shell, "similar", zoo, "fr", "de", "--cosine", "1.0", "--sketch")
    assert told["names"] == ["de", "fr"]
    assert told["cosines"][0][1] == pytest.approx(1.0, abs=1e-6)
    lineage = answer(shell, "similar", zoo, "fr/*", "--of", "lineage")
    wanted = lt.similar(lt.load(zoo), ["fr/*"], of="lineage").cosines.tolist()
    assert lineage["cosines"] == wanted


def broken_at(folder: Path) -> Path:
    """Write an adapter with NaN in a factor."""
    A = torch.full((2, 6), float("nan"))
    lt.Adapter({"q": lt.LowRank(A, torch.ones(6, 2))}).save(folder)
    return folder


def plain_at(folder: Path) -> Path:
    """Write an adapter's folder by itself, which no save of a tree wrote."""
    zoo_of(4).save(folder)
    return folder


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("add", "zoo", "new", "broken"), "new: q (lora_A): a factor holds NaN"),
        (("add", "zoo", "new", "broken", "--copy"), "new: q (lora_A): a factor holds NaN"),
        (("add", "zoo", "stray/x", "--group"), "no node 'stray'"),
        (("set", "zoo", "fr", "--adapter", "broken"), "fr: q (lora_A): a factor holds NaN"),
        (("rm", "plain", "a"), "so they stay, and would be a node again"),
        (("mv", "plain", "a", "b"), "so they stay, and would be a node again"),
        (("mv", "zoo", "fr/legal", "fr/Legal"), "only by case"),
        (("squash", "blocked", "fr/legal", "--to", "x"), "a file or a link lies where a folder"),
        (("pick", "blocked", "fr/legal", "--to", "x"), "a file or a link lies where a folder"),
        (("init", "file/new"), "file/new: can't make the folder"),
        (("gc", "hidden"), "a file or a link lies where a folder"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_a_dry_run_refuses_what_the_run_refuses(
    shell: Shell, zoo: Path, tmp_path: Path, command: tuple[str, ...], why: str
) -> None:
    broken_at(tmp_path / "broken")
    plain_at(tmp_path / "plain/a")
    for name, file in (("blocked", "x"), ("hidden", ".lora_tree")):
        lt.load(zoo).save(tmp_path / name)
        (tmp_path / name / file).write_text("mine")
    (tmp_path / "file").write_text("mine")
    places = {"zoo", "broken", "plain", "blocked", "hidden", "file/new"}
    arguments = [tmp_path / word if word in places else word for word in command]
    before = listing(tmp_path)
    told = {}
    for options in (["--dry-run"], []):
        code, out, told[bool(options)] = shell(*arguments, *options)
        assert (code, out) == (1, "")
        assert listing(tmp_path) == before
    assert why in told[True]
    assert told[True] == told[False]


@pytest.mark.parametrize("bound", [("--rank", 1), ("--max-error", 0.1)])
@pytest.mark.parametrize(
    "command", [("mv", "fr/legal", "x"), ("set", "fr", "--weight", "2")], ids=lambda c: c[0]
)
def test_bounds_without_keep_effective_are_refused_in_the_same_words(
    shell: Shell, zoo: Path, command: tuple[str, ...], bound: tuple[str, float]
) -> None:
    name, *rest = command
    before = listing(zoo)
    code, _, told = shell(name, zoo, *rest, *bound)
    assert code == 1
    assert told == (
        "error: --rank and --max-error are for --keep-effective; without it nothing is cut\n"
        "  give --keep-effective as well, or leave them out; lora-tree compress cuts nodes\n"
    )
    assert listing(zoo) == before


# ---------------------------------------------------------------------- editing
def adapter_at(folder: Path, seed: int) -> Path:
    zoo_of(seed).save(folder)
    return folder


def test_init_begins_an_empty_tree(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    code, out, _ = shell("init", folder, "--base", "org/model", "--r", 4, "--target", "q_proj")
    assert (code, out) == (0, f"{folder}: a tree of 0 nodes over org/model\n")
    tree = lt.load(folder)
    assert (tree.base, tree.defaults.r, tree.defaults.target_modules) == (
        "org/model",
        4,
        ["q_proj"],
    )
    assert "it has a tree.yaml already" in shell("init", folder)[2]


def test_init_takes_the_adapters_that_lie_there(shell: Shell, tmp_path: Path) -> None:
    adapter_at(tmp_path / "zoo" / "a", 1)
    assert shell("init", tmp_path / "zoo", "--dry-run")[0] == 0
    assert not (tmp_path / "zoo" / "tree.lock").exists()
    told = answer(shell, "init", tmp_path / "zoo")
    assert told == {
        "folder": str(tmp_path / "zoo"),
        "base": "org/model",
        "nodes": ["a"],
        "dry_run": False,
    }
    assert lt.load(tmp_path / "zoo").paths() == ["a"]


def test_init_copies_what_it_begins_with(shell: Shell, tmp_path: Path) -> None:
    """A tree may move and remove files that it wrote, and never those that a user put there."""
    adapter_at(tmp_path / "mine" / "a", 1)
    before = listing(tmp_path / "mine")
    told = answer(shell, "init", tmp_path / "zoo", "--from", tmp_path / "mine")
    assert told["nodes"] == ["a"]
    assert shell("mv", tmp_path / "zoo", "a", "b")[0] == 0
    assert lt.load(tmp_path / "zoo").paths() == ["b"]
    assert listing(tmp_path / "mine") == before


def test_add_says_what_it_added(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    away = adapter_at(tmp_path / "away", 7)
    code, out, err = shell("add", zoo, "fr/new", away, "--weight", 0.5)
    assert (code, err) == (0, "")
    size = f"{zoo_of(7).nbytes:,}"
    assert out.splitlines() == [
        f"added fr/new: an adapter of 5 modules, r=2, {size} bytes, weight 0.5",
        f"note: {away}: peft: a folder with adapter_config.json and adapter_model.safetensors",
    ]
    assert lt.load(zoo)["fr/new"].weight == 0.5
    assert not (zoo / "fr" / "new").exists()
    shell("add", zoo, "fr/mine", away, "--copy")
    assert (zoo / "fr" / "mine" / "adapter_config.json").exists()
    assert shell("add", zoo, "g", "--group")[1] == "added g: a group\n"
    fresh = shell("add", zoo, "g/x", "--r", 4, "--target", "q_proj")[1]
    assert fresh == "added g/x: fresh, made when the tree is attached\n"
    code, _, err = shell("add", zoo, "fr/new", away)
    assert code == 1
    assert "fr/new exists already" in err


def test_add_hangs_another_tree_below_a_path(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    other = lt.AdapterTree(base="org/model")
    other.add("x", adapter=zoo_of(8))
    other.add("x/y", adapter=zoo_of(9), weight=0.5)
    other.save(tmp_path / "other")
    told = answer(shell, "add", zoo, "team", tmp_path / "other")
    assert told["added"] == ["team", "team/x", "team/x/y"]
    assert told["notes"] == [f"{tmp_path / 'other'}: a tree of 2 nodes"]
    tree = lt.load(zoo)
    assert tree["team/x/y"].weight == 0.5
    assert lt.diff(tree.flatten("team/x/y"), other.flatten("x/y")).is_nothing
    assert not any(tree[path].stale for path in tree)
    stranger = lt.AdapterTree(base="org/other")
    stranger.add("x", group=True)
    stranger.save(tmp_path / "stranger")
    assert (
        "can't be a part of one over 'org/model'"
        in shell("add", zoo, "s", tmp_path / "stranger")[2]
    )
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in shell("add", zoo, "e", tmp_path / "empty")[2]


def test_mv_says_what_becomes_stale(shell: Shell, zoo: Path) -> None:
    before = lt.load(zoo).flatten("fr/legal")
    code, out, _ = shell("mv", zoo, "fr/legal", "misc/law", "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        "moved fr/legal to misc/law",
        "stale from now on: misc/law: trained on another lineage",
        "dry run: nothing was written",
    ]
    assert "fr/legal" in lt.load(zoo)
    told = answer(shell, "mv", zoo, "fr/legal", "misc/law", "--keep-effective")
    assert told["stale"] == []
    tree = lt.load(zoo)
    assert not tree["misc/law"].stale
    assert lt.deviation(before, tree.flatten("misc/law")).relative_error < 1e-6
    told = answer(shell, "mv", zoo, "fr/medical", "medical")
    assert told["stale"] == ["medical"]
    assert opened(zoo)["medical"].stale
    assert "without it nothing is cut" in shell("mv", zoo, "de", "d", "--rank", 1)[2]


@pytest.mark.parametrize(
    ("command", "stale"),
    [
        (("set", "fr", "--weight", "0.7"), ["fr/legal", "fr/medical"]),
        (("mv", "fr", "misc/fr"), []),  # a group adds nothing, so no lineage has changed
        (("mv", "fr", "de/fr"), ["de/fr", "de/fr/legal", "de/fr/medical"]),
        (("set", "de", "--weight", "0.7"), []),
        (("compress", "fr", "--rank", "1"), ["fr/legal", "fr/medical"]),
    ],
    ids=lambda given: " ".join(given),
)
def test_what_is_foretold_to_be_stale_is_what_the_lock_finds(
    shell: Shell, zoo: Path, command: tuple[str, ...], stale: list[str]
) -> None:
    name, *rest = command
    assert answer(shell, name, zoo, *rest)["stale"] == stale
    tree = opened(zoo)
    assert [path for path in tree.paths() if tree[path].stale] == stale


def test_a_weight_that_is_given_twice_is_refused(shell: Shell, zoo: Path) -> None:
    before = lt.load(zoo)["fr"].weight
    code, _, err = shell("set", zoo, "fr", "--weight", "*.q_proj=1", "--weight", "default=0.5")
    assert code == 1
    assert "--weight was given 2 times" in err
    assert "--weight '*.q_proj=1,default=0.5'" in err
    assert lt.load(zoo)["fr"].weight == before
    assert "lora-tree rm --recursive" in shell("rm", zoo, "fr")[2]


def test_rm_takes_nodes_and_their_files(shell: Shell, zoo: Path) -> None:
    code, _, err = shell("rm", zoo, "fr")
    assert code == 1
    assert "fr has children" in err
    assert shell("rm", zoo, "fr/*", "--dry-run")[0] == 0
    assert "fr/legal" in lt.load(zoo)
    assert shell("rm", zoo, "fr/legal")[1] == "removed fr/legal\n"
    assert not (zoo / "fr" / "legal").exists()
    assert answer(shell, "rm", zoo, "fr", "-r")["removed"] == ["fr", "fr/medical"]


def test_set_changes_weights_and_adapters(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    before = lt.load(zoo).flatten("fr/legal")
    away = adapter_at(tmp_path / "away", 7)
    told = answer(shell, "set", zoo, "fr", "--adapter", away, "--keep-effective")
    assert told["changed"] == ["fr", "fr/legal", "fr/medical"]
    assert told["stale"] == []
    tree = lt.load(zoo)
    assert lt.deviation(before, tree.flatten("fr/legal")).relative_error < 1e-6
    code, out, _ = shell("set", zoo, "fr", "--weight", 2)
    assert code == 0
    assert "stale from now on: fr/legal, fr/medical" in out
    assert "nothing to set" in shell("set", zoo, "fr")[2]


# ---------------------------------------------------------------------- the verbs
def test_squash_split_and_pick(shell: Shell, zoo: Path) -> None:
    before = lt.load(zoo).flatten("fr/legal")
    code, out, err = shell("squash", zoo, "fr/legal", "--to", "flat")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "error of flat: none, exact"
    assert lt.deviation(before, lt.load(zoo).flatten("flat")).relative_error < 1e-6
    cut = answer(shell, "squash", zoo, "fr/legal", "--to", "short", "--rank", 1)
    assert 0.0 < cut["errors"]["short"]["relative_error"] < 1.0
    told = answer(shell, "split", zoo, "fr", "--to", "fr/rest", "--module", "q_proj")
    assert told["moved"]["fr/legal"] == "fr/rest/legal"
    assert lt.deviation(before, lt.load(zoo).flatten("fr/rest/legal")).relative_error < 1e-6
    told = answer(shell, "pick", zoo, "fr/rest/legal", "--to", "de/legal")
    assert told["added"] == ["de/legal"]
    assert "trained on the ancestors of fr/rest/legal" in told["notes"][0]
    assert opened(zoo)["de/legal"].stale


def test_rebase_gives_children_their_models_back(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    before = tree.flatten("fr/legal")
    tree.adapter("fr").save(tmp_path / "old")
    tree.update("fr", adapter=zoo_of(12))
    tree.save(zoo)
    assert opened(zoo)["fr/legal"].stale
    code, out, _ = shell("rebase", zoo, "--all", "fr", "--was", tmp_path / "old")
    assert code == 0
    assert "changed fr/legal" in out
    tree = lt.load(zoo)
    assert not tree["fr/legal"].stale
    assert lt.deviation(before, tree.flatten("fr/legal")).relative_error < 1e-6


def test_hoist_and_merge(shell: Shell, zoo: Path) -> None:
    before = lt.load(zoo).flatten("fr/legal")
    told = answer(shell, "hoist", zoo, "fr", "--into", "fr/law", "--rank", 1)
    assert told["added"] == ["fr/law"]
    assert lt.deviation(before, lt.load(zoo).flatten("fr/law/legal")).relative_error < 1e-6
    code, out, _ = shell("hoist", zoo, "fr/law", "--method", "ties", "--density", 0.5)
    assert code == 0
    assert "note: fr/law: its own model has changed" in out
    made = answer(
        shell,
        "merge",
        zoo,
        "fr/law/legal",
        "fr/law/medical",
        "--to",
        "fr/law/both",
        "--space",
        "knots",
    )
    assert made["distances"].keys() == {"fr/law/legal", "fr/law/medical"}
    assert "fr/law/both" in lt.load(zoo)


def test_compress_tells_bytes_and_error(shell: Shell, zoo: Path) -> None:
    size = sum(lt.load(zoo).adapter(path).nbytes for path in ("fr", "fr/legal", "fr/medical", "de"))
    told = answer(shell, "compress", zoo, "--budget", size // 2)
    assert told["bytes_before"] == size
    assert told["bytes_after"] <= size // 2
    assert told["stale"] == ["fr/legal", "fr/medical"] or told["stale"] == []
    code, out, _ = shell("compress", zoo, "--rank", 1, "--dtype", "bf16", "--dry-run")
    assert code == 0
    assert "relative error" in out
    assert "one of the three" in shell("compress", zoo)[2]


@pytest.mark.parametrize(
    "command",
    [
        ("squash", "fr/legal", "--to", "x"),
        ("split", "fr", "--to", "fr/x", "--rank", "1"),
        ("pick", "fr/legal", "--to", "de/x"),
        ("mv", "fr/legal", "x", "--keep-effective"),
        ("set", "fr", "--weight", "2", "--keep-effective"),
        ("hoist", "fr", "--into", "fr/x"),
        ("merge", "fr/legal", "fr/medical", "--to", "fr/x"),
        ("compress", "--rank", "1"),
        ("rm", "de"),
        ("add", "x", "--group"),
    ],
    ids=lambda command: command[0],
)
def test_a_dry_run_writes_nothing_and_a_run_goes_through(
    shell: Shell, zoo: Path, command: tuple[str, ...]
) -> None:
    name, *rest = command
    before = listing(zoo)
    code, out, _ = shell(name, zoo, *rest, "--dry-run")
    assert code == 0
    assert out.endswith("dry run: nothing was written\n")
    assert listing(zoo) == before
    told = answer(shell, name, zoo, *rest)
    assert told["dry_run"] is False
    assert listing(zoo) != before
    lt.load(zoo, strict=not told["stale"] and name not in ("compress", "pick"))
