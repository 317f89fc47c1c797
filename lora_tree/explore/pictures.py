"""Images of several paths for one prompt, side by side, from one routed batch of a pipeline.

    Question ─▶ blends ─model.route + pipe([prompt] * n), in a thread─▶ steps … images ─▶ Pictures

Every row begins with the noise of the same seed, so two images differ by their paths alone.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SpecError
from ..extras import foreign
from ..integrations.diffusers import PipelineModel
from .question import Question, rows_of
from .side_run import SideRun

__all__ = ["Painter", "Pictures", "PicturesRun", "RowPicture"]


@dataclass(frozen=True)
class RowPicture:
    """The image of one path or blend.

    Args:
        blend: in its one spelling; ``""`` is the bare base.
        png: the image, as the bytes of a PNG file.
    """

    blend: str
    png: bytes


@dataclass(frozen=True)
class Pictures:
    """All images for a question, so far.

    Args:
        rows: one for each path or blend that was asked; empty while they are made.
        step: how many steps are done.
        steps: how many there are.
        seconds: since the batch began.
    """

    rows: tuple[RowPicture, ...]
    step: int
    steps: int
    seconds: float

    @property
    def done(self) -> bool:
        """True if the images are there."""
        return bool(self.rows)


class Painter:
    """A tree that is attached to a diffusion pipeline: it makes images.

    Args:
        model: of `lora_tree.integrations.diffusers.attach_pipeline`.
        pipe: the pipeline that it is attached to.
    """

    def __init__(self, model: PipelineModel, pipe: Any) -> None:
        self.model, self.pipe = model, pipe

    def paint(
        self, question: Question, *, steps: int = 20, guidance: float | None = None
    ) -> PicturesRun:
        """Begin to make the images; a loop over the run gives the steps, then the images.

        Args:
            question: its number of tokens and temperature do not count here.
            steps: of the denoising.
            guidance: the pipeline's ``guidance_scale``; None: its own.

        Raises:
            PathError, SpecError: something asked is no path or blend of this tree, nothing is asked
                or too much, or a number makes no sense.
        """
        rows = rows_of(question, self.model.tree)
        if steps < 1:
            raise SpecError(f"steps must be at least 1, got {steps}")
        # A row is expensive here, so a parent's image is made only if it was asked for.
        blends = tuple(row.blend for row in rows if row.is_requested)
        options: dict[str, Any] = {"num_inference_steps": steps}
        if guidance is not None:
            options["guidance_scale"] = guidance
        return PicturesRun(self, question, blends, options)


class PicturesRun(SideRun[int | list[bytes], Pictures]):
    """One batch of images that is being made; made by `Painter.paint`. Iterate over it once."""

    def __init__(
        self,
        painter: Painter,
        question: Question,
        blends: tuple[str, ...],
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self._painter, self._question = painter, question
        self._blends, self._options = blends, options

    # ------------------------------------------------------------------ the caller's threads
    def shown(self, items: Iterator[int | list[bytes]]) -> Iterator[Pictures]:
        """Yield each step that was done, and at last the images."""
        began = time.perf_counter()
        step, steps = 0, self._options["num_inference_steps"]
        for item in items:
            rows: tuple[RowPicture, ...] = ()
            if isinstance(item, int):
                step = item
            else:
                made = zip(self._blends, item, strict=True)
                rows = tuple(RowPicture(blend, png) for blend, png in made)
            yield Pictures(rows, step, steps, time.perf_counter() - began)

    # ------------------------------------------------------------------ the thread of the run
    def work(self) -> None:
        """Call the pipeline once, for all rows."""
        pipe, question = self._painter.pipe, self._question
        options = dict(self._options)
        # The oldest pipelines have no such argument; those can't be stopped.
        if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
            options["callback_on_step_end"] = self._after_step
        count = len(self._blends)
        generators = [torch.Generator().manual_seed(question.seed) for _ in range(count)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._painter.model.route(self._blends))
            if self.is_stopped:  # while it waited for the model's lock
                return
            stack.enter_context(foreign("the pipeline can't make the images"))
            made = pipe([question.prompt] * count, generator=generators, **options)
            self.give([_png(image) for image in made.images])

    def _after_step(self, pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Report a step; diffusers calls this after each."""
        self.give(step + 1)
        if self.is_stopped:
            # With this mark, diffusers skips the remaining steps.
            pipe._interrupt = True
        return tensors


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
