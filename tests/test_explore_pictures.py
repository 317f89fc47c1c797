"""Several paths make an image each in one batch, as each of them does by itself."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import pipelines as tiny
import pytest
import torch
from PIL import Image

import lora_tree as lt
from lora_tree.errors import PathError, SpecError
from lora_tree.explore.pictures import Painter
from lora_tree.explore.question import Question
from lora_tree.integrations.diffusers import attach_pipeline

ENDS = {"unet": ("to_q", "to_out.0", "conv1"), "text_encoder": ("q_proj", "fc1")}
BLENDS = ("ink/knight", "", "ink/knight:0.5+ink/wizard:0.5")


@pytest.fixture
def painter() -> Iterator[Painter]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = tiny.stable_diffusion()
        tree = lt.AdapterTree()
        for seed, path in enumerate(("ink", "ink/knight", "ink/wizard")):
            tree.add(path, adapter=tiny.adapter(pipe, ENDS, seed=seed))
        model = attach_pipeline(tree, pipe)
        yield Painter(model, pipe)
        model.detach()


def pixels(png: bytes) -> Any:
    return numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)


def test_every_image_is_its_paths_own(painter: Painter) -> None:
    run = painter.paint(Question("a castle", BLENDS, seed=5), steps=3, guidance=4.0)
    seen = list(run)
    assert [pictures.step for pictures in seen] == [1, 2, 3, 3]
    assert [pictures.done for pictures in seen] == [False, False, False, True]
    rows = seen[-1].rows
    found = {row.blend: pixels(row.png) for row in rows}
    assert list(found) == list(BLENDS)
    for blend, made in found.items():
        with painter.model.using(blend), torch.no_grad(), tiny.quiet():
            alone = painter.pipe(
                "a castle",
                generator=torch.Generator().manual_seed(5),
                num_inference_steps=3,
                guidance_scale=4.0,
            ).images[0]
        # A step of 8 bits: sums in another order round to the neighbour at most.
        assert abs(numpy.asarray(alone, dtype=int) - made).max() <= 1, blend
    assert len({made.tobytes() for made in found.values()}) == len(BLENDS)


def test_stopping_passes_over_the_steps_that_are_left(painter: Painter) -> None:
    calls = []
    painter.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    run = painter.paint(Question("a castle", ("ink", "")), steps=50)
    for pictures in run:
        if not pictures.done:
            run.stop()
    assert pictures.done
    assert len(calls) < 50
    assert painter.model.active == ""


def test_what_can_not_be_made_is_refused(painter: Painter) -> None:
    with pytest.raises(PathError, match="'ink/king'"):
        painter.paint(Question("a castle", ("ink/king",)))
    with pytest.raises(SpecError, match="steps must be at least 1, got 0"):
        painter.paint(Question("a castle", ("ink",)), steps=0)
    broken = painter.paint(Question("a castle", ("ink",)), steps=2)
    painter.pipe.scheduler = None
    with pytest.raises(SpecError, match="the pipeline can't make the images: AttributeError: "):
        list(broken)
    assert painter.model.active == ""
