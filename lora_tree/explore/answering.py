"""The models that the playground asks: a language model or a pipeline, behind one interface."""

from __future__ import annotations

from typing import Any, Protocol

from ..tree import AdapterTree
from .answer_html import answers_html, pictures_html
from .answers import Answerer, AnswerRun, Answers
from .pictures import Painter, Pictures, PicturesRun
from .question import Question

__all__ = ["Answering", "AnsweringModel", "AnsweringPipeline"]


class Answering(Protocol):
    """Something that answers a prompt at several paths, and shows its answers as HTML."""

    verb: str
    """The button's word."""

    @property
    def tree(self) -> AdapterTree:
        """The tree whose paths answer."""

    def numbers(self, gr: Any) -> list[Any]:
        """Make gradio's components for the numbers of `begin`."""

    def begin(self, prompt: str, blends: tuple[str, ...], *numbers: float) -> Any:
        """Begin to answer, and return the run; a loop over it gives the results."""

    def html(self, result: Any) -> str:
        """Return a result of the run as HTML."""


class AnsweringModel:
    """Answers of a language model.

    Args:
        answerer: the model with its tree, and its tokenizer.
    """

    verb = "Answer"

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    @property
    def tree(self) -> AdapterTree:
        """The tree whose paths answer."""
        return self._answerer.model.tree

    def numbers(self, gr: Any) -> list[Any]:
        """Make components for the number of tokens, the temperature and the seed."""
        return [
            gr.Slider(1, 1024, 64, step=1, label="New tokens", elem_id="tokens"),
            gr.Slider(
                0,
                2,
                0,
                step=0.05,
                label="Temperature",
                info="0 takes the likeliest token every time.",
                elem_id="temperature",
            ),
            gr.Number(0, label="Seed", precision=0, elem_id="seed"),
        ]

    def begin(self, prompt: str, blends: tuple[str, ...], *numbers: float) -> AnswerRun:
        """Begin to answer. ``numbers``: the number of tokens, the temperature and the seed."""
        tokens, temperature, seed = numbers
        return self._answerer.ask(
            Question(prompt, blends, int(tokens), float(temperature), int(seed or 0))
        )

    def html(self, result: Answers) -> str:
        """Return the table of answers."""
        return answers_html(result)


class AnsweringPipeline:
    """Images of a diffusion pipeline.

    Args:
        painter: the pipeline with its tree.
    """

    verb = "Make images"

    def __init__(self, painter: Painter) -> None:
        self._painter = painter

    @property
    def tree(self) -> AdapterTree:
        """The tree whose paths answer."""
        return self._painter.model.tree

    def numbers(self, gr: Any) -> list[Any]:
        """Make components for the number of steps, the guidance and the seed."""
        return [
            gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="steps"),
            gr.Slider(0, 20, 7.5, step=0.5, label="Guidance", elem_id="guidance"),
            gr.Number(0, label="Seed", precision=0, elem_id="seed"),
        ]

    def begin(self, prompt: str, blends: tuple[str, ...], *numbers: float) -> PicturesRun:
        """Begin to make images. ``numbers``: the number of steps, the guidance and the seed."""
        steps, guidance, seed = numbers
        question = Question(prompt, blends, seed=int(seed or 0))
        return self._painter.paint(question, steps=int(steps), guidance=float(guidance))

    def html(self, result: Pictures) -> str:
        """Return the images, or the steps so far."""
        return pictures_html(result)
