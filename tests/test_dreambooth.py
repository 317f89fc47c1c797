"""examples/dreambooth_tree.py on a tiny pipeline: a style learns from every image, a subject from
its own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pipelines as tiny
import pytest
import torch
from sampling import slow

import lora_tree as lt
from lora_tree.integrations.diffusers import attach

FILE = Path(__file__).parent.parent / "examples" / "dreambooth_tree.py"
PROMPTS = {"ink": "a castle", "ink/knight": "a knight in snow", "ink/wizard": "a wizard in a tower"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dreambooth_tree", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dreambooth_tree"] = module  # its dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three nodes with two images each, of one colour for a node."""
    from PIL import Image

    for colour, (path, prompt) in enumerate(PROMPTS.items()):
        folder = tmp_path / "photos" / path
        folder.mkdir(parents=True)
        (folder / "prompt.txt").write_text(prompt)
        for number in range(2):
            pixel = (80 * colour, 40 * number, 200 - 80 * colour)
            Image.new("RGB", (24, 20), pixel).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_every_folder_is_a_node_and_its_images_are_its_rows(
    example: ModuleType, photos: Path
) -> None:
    found = example.read_examples(photos, 16)
    assert [each.path for each in found] == [path for path in sorted(PROMPTS) for _ in range(2)]
    assert {each.prompt for each in found} == set(PROMPTS.values())
    assert all(each.pixels.shape == (3, 16, 16) for each in found)
    tree = example.plant(found, r=2)
    assert tree.paths() == sorted(PROMPTS)
    (photos / "ink/knight/prompt.txt").unlink()
    with pytest.raises(SystemExit, match=r"with a prompt\.txt beside it"):
        example.read_examples(photos, 16)


def test_a_style_learns_from_every_image_and_a_subject_from_its_own(
    example: ModuleType, photos: Path
) -> None:
    pipe = tiny.stable_diffusion()
    found = [each for each in example.read_examples(photos, 16) if each.path != "ink/wizard"]
    tree = example.plant(example.read_examples(photos, 16), r=2)
    bare = tiny.call(pipe, "a castle")
    example.train(pipe, tree, found, steps=3, batch=4, lr=1e-2)
    assert torch.equal(tiny.call(pipe, "a castle"), bare)
    moved = {}
    for path in tree.paths():
        adapter = tree.adapter(path)
        moved[path] = adapter is not None and any(v.B.any() for v in adapter.modules.values())
    assert moved == {"ink": True, "ink/knight": True, "ink/wizard": False}


@slow
def test_the_loss_falls(example: ModuleType, photos: Path) -> None:
    pipe = tiny.stable_diffusion()
    found = example.read_examples(photos, 16)
    tree = example.plant(found, r=4)
    losses = example.train(pipe, tree, found, steps=60, batch=6, lr=2e-2)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_the_command_saves_the_tree_and_a_file_for_each_subject(
    example: ModuleType, photos: Path, tmp_path: Path
) -> None:
    tiny.stable_diffusion().save_pretrained(tmp_path / "base")
    said = [str(photos), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "zoo")]
    with tiny.quiet():
        example.main([*said, "--steps", "2", "--batch", "3", "--r", "2", "--size", "16"])
    tree = lt.load(tmp_path / "zoo")
    assert tree.paths() == sorted(PROMPTS)
    files = sorted(file.name for file in (tmp_path / "zoo-files").iterdir())
    assert files == ["ink-knight.safetensors", "ink-wizard.safetensors"]
    pipe = tiny.stable_diffusion()
    again = lt.AdapterTree()
    again.add("knight", adapter=tmp_path / "zoo-files" / "ink-knight.safetensors")
    images = []
    for each, path in ((tree, "ink/knight"), (again, "knight")):
        model = attach(each, pipe)
        with model.using(path):
            images.append(tiny.call(pipe, "a knight"))
        model.detach()
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
