"""A save: what it writes, replaces and deletes, and what it leaves alone."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from zoo import (
    CONFIG,
    WEIGHTS,
    adapter,
    listing,
    nested,
    nudge,
    opened,
    tree,
    untouched,
    value,
    write,
)

import lora_tree as lt
from lora_tree.errors import (
    FolderError,
    FormatError,
)
from lora_tree.node import Node


# ---------------------------------------------------------------------- saving
def test_an_adapter_elsewhere_stays_there_unless_copied(tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "out")
    made = lt.AdapterTree()
    made.add("fr", adapter=tmp_path / "out")
    made.save(tmp_path / "zoo")
    assert "adapter: ../out\n" in (tmp_path / "zoo/tree.yaml").read_text()
    assert not (tmp_path / "zoo/fr").exists()
    again = lt.load(tmp_path / "zoo", strict=True)
    again.save(tmp_path / "zoo")
    again.save(tmp_path / "a/b/c")
    assert "adapter: ../../../out\n" in (tmp_path / "a/b/c/tree.yaml").read_text()
    again.save(tmp_path / "zoo", copy=True)
    assert "adapter" not in (tmp_path / "zoo/tree.yaml").read_text()
    assert (tmp_path / "zoo/fr" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert value(lt.load(tmp_path / "zoo", strict=True)) == value(again)


def test_a_typo_in_a_folder_is_an_error_when_it_is_added(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no adapter there"):
        lt.AdapterTree().add("fr", adapter=tmp_path / "typo")


def test_what_a_save_wrote_goes_when_its_node_goes(zoo: Path) -> None:
    write(zoo / "fr/legal/notes.txt", "mine")
    loaded = lt.load(zoo)
    loaded.remove("fr", recursive=True)
    loaded.save(zoo)
    assert listing(zoo / "fr") == {"legal": None, "legal/notes.txt": b"mine"}
    assert lt.load(zoo, strict=True).paths() == ["de", "grp", "grp/x"]


def test_what_no_save_wrote_stays_and_would_come_back(tmp_path: Path) -> None:
    nested(tmp_path, "fr", "fr/legal", "de")
    for locked in (False, True):
        if locked:
            lt.lock(tmp_path)
        before = listing(tmp_path)
        loaded = lt.load(tmp_path)
        loaded.remove("fr/legal")
        with pytest.raises(
            FolderError,
            match=r"(?s)fr/legal: the tree no longer has this node, but .*init NEW --from /",
        ):
            loaded.save(tmp_path)
        moved = lt.load(tmp_path)
        moved.rename("de", "german")
        with pytest.raises(FolderError, match="de: the tree no longer has this node"):
            moved.save(tmp_path)
        assert listing(tmp_path) == before
    loaded = lt.load(tmp_path)
    loaded.remove("fr/legal")
    loaded.add("fr/legal", group=True)
    loaded.save(tmp_path)  # said to be none: it does not come back, and stays
    assert not lt.load(tmp_path)["fr/legal"].has_adapter
    assert (tmp_path / "fr/legal" / WEIGHTS).exists()


def test_files_that_a_hand_changed_are_not_ours_any_more(zoo: Path) -> None:
    loaded = lt.load(zoo)
    loaded.remove("grp/x")
    nudge(zoo / "grp/x" / WEIGHTS)
    with pytest.raises(FolderError, match="grp/x: the tree no longer has this node"):
        loaded.save(zoo)


def test_a_trained_node_replaces_the_files_it_came_from_and_no_others(tmp_path: Path) -> None:
    nested(tmp_path / "zoo", "fr", "de")
    loaded = lt.load(tmp_path / "zoo")
    loaded.update("fr", adapter=adapter(9))
    loaded.save(tmp_path / "zoo")
    assert value(lt.load(tmp_path / "zoo", strict=True)) == value(loaded)
    made = lt.AdapterTree()
    made.add("de", adapter=adapter(3))
    with pytest.raises(
        FolderError,
        match=r"de: .*an adapter that no save wrote lies where this node's files belong",
    ):
        made.save(tmp_path / "zoo")
    other = lt.load(nested(tmp_path / "other", "it", "de"))
    with pytest.raises(
        FolderError,
        match=r"de: .*an adapter that no save wrote lies where this node's files belong",
    ):
        other.save(tmp_path / "zoo")


def test_swapping_two_nodes(zoo: Path) -> None:
    loaded = lt.load(zoo)
    expected = value(loaded)
    loaded.move("fr/legal", "fr/other")
    loaded.move("fr/medical", "fr/legal")
    loaded.move("fr/other", "fr/medical")
    loaded.save(zoo)
    again = value(lt.load(zoo, strict=True))
    assert again["fr/legal"] == expected["fr/medical"]
    assert again["fr/medical"] == expected["fr/legal"]


def test_a_comment_survives_where_nothing_changed(zoo: Path) -> None:
    text = (zoo / "tree.yaml").read_text()
    write(zoo / "tree.yaml", "# by hand\n" + text.replace("weight: 0.8", "weight: 8.0e-1"))
    loaded = lt.load(zoo)
    loaded.update("grp/x", adapter=adapter(12))
    loaded.save(zoo)
    assert (zoo / "tree.yaml").read_text().startswith("# by hand\n")
    loaded.update("grp/x", weight=2.0)
    loaded.save(zoo)
    assert not (zoo / "tree.yaml").read_text().startswith("#")


def test_the_yaml_of_another_tree_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "zoo/tree.yaml", "version: 1\nbase: precious\n")
    with pytest.raises(FolderError, match="belongs to another tree, and no save wrote it"):
        tree().save(tmp_path / "zoo")
    assert (tmp_path / "zoo/tree.yaml").read_text() == "version: 1\nbase: precious\n"
    assert listing(tmp_path / "zoo").keys() == {"tree.yaml"}


def test_a_value_that_cannot_be_written_leaves_everything_as_it_was(
    zoo: Path, tmp_path: Path
) -> None:
    before = listing(zoo)
    loaded = lt.load(zoo)
    loaded.update("grp/x", adapter=lt.Adapter({}))
    for folder in (zoo, tmp_path / "new/one"):
        with pytest.raises(FormatError, match="grp/x: "):
            loaded.save(folder)
    assert listing(zoo) == before
    assert not (tmp_path / "new").exists()


def test_a_weight_alone_changes_only_text(zoo: Path) -> None:
    before = {
        name: (zoo / name).stat().st_ino for name, data in listing(zoo).items() if data is not None
    }
    loaded = lt.load(zoo)
    loaded.update("fr/medical", weight=0.25)
    loaded.save(zoo)
    changed = {name for name, inode in before.items() if (zoo / name).stat().st_ino != inode}
    assert changed == {"tree.yaml", "tree.lock"}


# ---------------------------------------------------------------------- two writers
def test_a_save_does_not_undo_what_another_added(zoo: Path, tmp_path: Path) -> None:
    one, two = opened(zoo), opened(zoo)
    one.add("x", adapter=adapter(10))
    one.add("x/deep", adapter=adapter(11))
    one.save(zoo)
    two.add("y", adapter=adapter(12))
    text = untouched(
        zoo,
        lambda: two.save(zoo),
        match="zoo/x.*zoo/x/deep: written by another writer since this tree was",
    )
    assert (
        f"open the tree again, lt.load('{zoo}'), and change that one; or save into another folder"
        in text
    )
    two.save(tmp_path / "other")
    assert "y" in opened(tmp_path / "other")
    again = opened(zoo)
    again.add("y", adapter=adapter(12))
    again.save(zoo)
    assert {"x", "x/deep", "y"} <= set(opened(zoo))
    one.save(tmp_path / "third")
    untouched(zoo, lambda: one.save(zoo), match="zoo/y: written by another writer")


def test_a_save_does_not_undo_what_another_changed(zoo: Path) -> None:
    one, two = opened(zoo), opened(zoo)
    one.update("grp/x", adapter=adapter(10))
    one.save(zoo)
    two.update("grp/x", adapter=adapter(11))
    untouched(zoo, lambda: two.save(zoo), match="grp/x: .*written by another writer")
    two.remove("grp", recursive=True)
    untouched(zoo, lambda: two.save(zoo), match="grp/x: written by another writer")
    one.update("grp/x", adapter=adapter(12))
    one.save(zoo)


def test_a_save_does_not_undo_what_another_wrote_into_a_folder_without_a_lock(
    tmp_path: Path,
) -> None:
    one, two = opened(nested(tmp_path, "fr", "de")), opened(tmp_path)
    one.update("fr", adapter=adapter(10))
    one.save(tmp_path)
    two.update("fr", adapter=adapter(11))
    untouched(tmp_path, lambda: two.save(tmp_path), match="fr: .*written by another writer")


def test_a_save_does_not_bring_back_what_another_took_out(zoo: Path) -> None:
    one, two, lazily = opened(zoo), opened(zoo), opened(zoo)
    assert two.adapter("fr/legal") is not None
    one.remove("fr/legal")
    one.save(zoo)
    untouched(zoo, lambda: two.save(zoo), match="fr/legal: .*taken out by another writer")
    untouched(zoo, lambda: lazily.save(zoo), match="fr/legal: .*taken out by another writer")
    two.update("fr/legal", adapter=adapter(10))
    untouched(zoo, lambda: two.save(zoo), match="fr/legal: .*taken out by another writer")
    one.add("fr/legal", adapter=adapter(11))
    one.save(zoo)


def test_a_save_does_not_undo_a_line_of_yaml(zoo: Path) -> None:
    one, two = opened(zoo), opened(zoo)
    one.update("fr/medical", weight=0.5)
    one.save(zoo)
    two.update("fr/legal", weight=0.25)
    untouched(zoo, lambda: two.save(zoo), match=r"tree.yaml: written by another writer")
    again = opened(zoo)
    write(zoo / "tree.yaml", (zoo / "tree.yaml").read_text() + "# a note\n")
    again.update("grp/x", adapter=adapter(10))
    again.update("de", weight=2.0)
    untouched(zoo, lambda: again.save(zoo), match=r"tree.yaml: written by another writer")


def test_another_tree_is_not_overwritten(zoo: Path) -> None:
    other = lt.AdapterTree()
    other.add("it", adapter=adapter(10))
    text = untouched(
        zoo,
        lambda: other.save(zoo),
        match="zoo/fr, .*zoo/grp/x: belongs to another tree, and this save would",
    )
    assert (
        "save into another folder; or open that tree and change it; or remove its files first"
        in text
    )
    one = tree()
    one.update("fr", adapter=adapter(10))
    untouched(zoo, lambda: one.save(zoo), match="fr: .*zoo/fr: belongs to another tree")
    untouched(zoo, lambda: tree(weight=0.5).save(zoo), match="tree.yaml: belongs to another tree")
    before = listing(zoo)
    tree().save(zoo)  # the very same tree: nothing is lost
    assert before == {**listing(zoo), "tree.lock": before["tree.lock"]}
    shutil.rmtree(zoo / "fr")
    shutil.rmtree(zoo / "grp")
    (zoo / "tree.yaml").unlink()
    other.save(zoo)
    assert list(opened(zoo)) == ["it"]


def test_what_lock_accepted_since_the_opening_stays_accepted(zoo: Path) -> None:
    changed = opened(zoo)
    changed.update("fr", adapter=adapter(9))
    changed.save(zoo)
    loaded = opened(zoo)
    lt.lock(zoo, accept_stale=True)
    loaded.update("grp/x", adapter=adapter(10))
    loaded.save(zoo)
    assert lt.check(zoo) == []


# ---------------------------------------------------------------------- training
class Training:
    """A tree over a base of one layer, whose node fr trains."""

    def __init__(self, folder: Path) -> None:
        fresh, old = (
            lt.LowRank(torch.ones(2, 4), B) for B in (torch.zeros(3, 2), torch.ones(3, 2))
        )
        self.tree, self.folder = lt.AdapterTree(), folder
        self.tree.add("fr", adapter=lt.Adapter({"0": fresh}))
        self.tree.add("fr/legal", adapter=lt.Adapter({"0": old}))
        self.model = lt.attach(self.tree, torch.nn.Sequential(torch.nn.Linear(4, 3)))
        self.parameters = self.model.trainable("fr")[0]["params"]
        self.model.activate("fr", mode="unmerged")

    def step(self) -> None:
        """Change the factors in place, as an optimiser does."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(1.0)

    def saved(self, folder: Path | None = None) -> float:
        """Save, and say what a reader finds."""
        self.tree.save(folder or self.folder)
        found = opened(folder or self.folder).adapter("fr")
        assert found is not None
        return found.modules["0"].B.mean().item()


def test_what_was_trained_since_the_last_save_is_saved(tmp_path: Path) -> None:
    run = Training(tmp_path / "zoo")
    for steps in (1.0, 2.0, 3.0):
        run.step()
        assert run.saved() == steps
    run.step()
    assert run.saved(tmp_path / "other") == 4.0
    run.step()
    run.model.trainable()
    assert run.saved(tmp_path / "third") == 5.0
    assert run.saved() == 5.0


def test_a_save_between_two_steps_writes_only_what_changed(tmp_path: Path) -> None:
    run = Training(tmp_path / "zoo")
    run.step()
    run.saved()
    before = {path: path.stat().st_ino for path in run.folder.rglob("*")}
    run.saved()
    assert {path: path.stat().st_ino for path in run.folder.rglob("*")} == before
    run.step()
    run.saved()
    changed = {
        str(path.relative_to(run.folder))
        for path, inode in before.items()
        if path.stat().st_ino != inode
    }
    assert changed == {f"fr/{WEIGHTS}", f"fr/{CONFIG}", "tree.lock"}


def test_training_after_a_save_makes_the_children_stale_and_the_node_itself_fresh(
    tmp_path: Path,
) -> None:
    run = Training(tmp_path / "zoo")
    run.saved()
    run.tree.update("fr/legal", weight=0.5)
    run.step()
    run.saved()
    assert [(p.node, p.kind) for p in lt.check(run.folder)] == [("fr/legal", "stale")]
    run.parameters = run.model.trainable("fr/legal")[0]["params"]
    for _ in range(2):
        run.step()
        run.saved()
        assert lt.check(run.folder) == []


def test_a_tree_in_memory_outlives_its_files(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    tree().save(zoo)
    changed = opened(zoo)
    changed.update("fr", adapter=adapter(9))
    changed.save(zoo)
    loaded = opened(zoo)
    expected = value(loaded)
    shutil.rmtree(zoo)
    for folder in (tmp_path / "other", zoo):
        loaded.save(folder)
        assert value(opened(folder)) == expected
        assert {(p.node, p.kind) for p in lt.check(folder)} == {
            ("fr/legal", "stale"),
            ("fr/medical", "stale"),
        }
    shutil.rmtree(zoo / "fr/legal")
    loaded.save(zoo)
    assert value(opened(zoo)) == expected
    lazily = opened(tmp_path / "other")
    shutil.rmtree(tmp_path / "other/fr")
    with pytest.raises(FormatError, match="no adapter there"):
        lazily.save(tmp_path / "third")


# ---------------------------------------------------------------------- memory
def test_a_save_holds_one_adapter_at_a_time_of_those_that_it_reads_itself(tmp_path: Path) -> None:
    """Files of other programs are rendered for the save; all of them at once may not fit memory."""
    read: weakref.WeakSet[lt.Adapter] = weakref.WeakSet()

    class Read:
        key, where = None, tmp_path

        def __init__(self, seed: int) -> None:
            self.seed = seed

        def load(self, *how: object) -> lt.Adapter:
            gc.collect()
            assert len(read) == 0, "the one before is let go of"
            made = adapter(self.seed)
            read.add(made)
            return made

        def outline(self) -> lt.Adapter:
            return adapter(self.seed)

    made = lt.AdapterTree(base="org/model")
    for seed in range(3):
        made.replace(Node(f"n{seed}", source=Read(seed)))
    made.save(tmp_path / "zoo")
    for seed in range(3):
        saved = lt.load(tmp_path / "zoo").adapter(f"n{seed}")
        assert saved is not None
        assert torch.equal(saved.modules["q_proj"].A, adapter(seed).modules["q_proj"].A)
