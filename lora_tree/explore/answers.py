"""Answers of several paths to one prompt, side by side, from one routed batch.

    Question ─rows_of─▶ rows ─model.route + generate─▶ steps: a token a row ─▶ Answers, growing

All rows have the same prompt, so nothing is padded in front. A row that has ended is padded, and
its padding is cut off again.

Law: a row's answer does not depend on the rows beside it, drawn answers included. Drawing takes the
token with the largest  score / temperature + g,  where g is -log of an exponential variate: that is
a draw from the softmax (the Gumbel-max trick: Yellott 1977). Every row is given the same g, so two
rows differ where their scores do, and not by luck.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError, plural
from ..extras import foreign
from ..model import TreeModel
from .question import Question, QuestionRow, rows_of
from .side_run import SideRun
from .tokens import TextRun, differing_tokens, text_runs

__all__ = ["AnswerRun", "Answerer", "Answers", "RowAnswer", "TokenStep"]

SHOWN_EVERY_S = 0.2
"""Seconds between two updates of growing answers: each update decodes the whole text again."""


@dataclass(frozen=True)
class RowAnswer:
    """The answer of one path or blend.

    Args:
        row: the path or blend that answers.
        tokens: of the answer, without the end of the text.
        runs: its text, cut where it begins or ceases to differ from the parent's answer. While
            answers grow nothing is compared yet.
        differing: how many tokens differ; None if nothing was compared.
        seconds: until its last token.
    """

    row: QuestionRow
    tokens: tuple[int, ...]
    runs: tuple[TextRun, ...]
    differing: int | None
    seconds: float

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(run.text for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        """The answer's tokens, over the time until the last of them."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Answers:
    """All answers to a question, so far.

    Args:
        rows: one for each row of the batch.
        seconds: until the last token of all.
        done: False while they grow.
    """

    rows: tuple[RowAnswer, ...]
    seconds: float
    done: bool

    @property
    def tokens_per_second(self) -> float:
        """The tokens of all rows, over the time until the last of them."""
        tokens = sum(len(answer.tokens) for answer in self.rows)
        return tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class TokenStep:
    """A step of ``generate``.

    Args:
        at_s: when its tokens were ready, in seconds since generation began. The thread that
            generates reads the clock, so that a slow reader makes no row look slower.
        tokens: one for each row.
    """

    at_s: float
    tokens: list[int]


class Answerer:
    """A tree that is attached to a language model, with its tokenizer: it answers questions.

    Args:
        model: of `lora_tree.attach`.
        tokenizer: the base's, of transformers.
    """

    def __init__(self, model: TreeModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def base(self) -> Any:
        """The language model, of a class of transformers that is not known here."""
        return self.model.base

    def ask(self, question: Question) -> AnswerRun:
        """Begin to answer, and return the run; a loop over it shows the answers grow.

        Raises:
            PathError, SpecError: as `rows_of`; or the prompt has no tokens, or is too long.
        """
        rows = rows_of(question, self.model.tree)
        with foreign("the tokenizer can't read the prompt"):
            prompt = list(self.tokenizer(question.prompt)["input_ids"])
        if not prompt:
            raise SpecError(
                "the prompt has no tokens, so there is nothing to continue", "give it a word"
            )
        room = getattr(self.base.config, "max_position_embeddings", None)
        if isinstance(room, int) and len(prompt) + question.max_new_tokens > room:
            raise SpecError(
                f"the prompt's {plural(len(prompt), 'token')} and "
                f"{plural(question.max_new_tokens, 'new one')} are more than the {room} "
                "that the base can read",
                "shorten the prompt, or ask for fewer tokens",
            )
        return AnswerRun(self, question, rows, prompt)

    def answer(self, question: Question) -> Answers:
        """Answer a question, and return the complete answers.

        Raises:
            LoraTreeError: as `ask`, and as `TreeModel.route` and the base's forward raise.
        """
        *_, last = self.ask(question)
        return last


class AnswerRun(SideRun[TokenStep, Answers]):
    """One batch that is being answered; made by `Answerer.ask`. Iterate over it once."""

    def __init__(
        self,
        answerer: Answerer,
        question: Question,
        rows: tuple[QuestionRow, ...],
        prompt: list[int],
    ) -> None:
        super().__init__()
        self._answerer, self._question = answerer, question
        self._rows, self._prompt = rows, prompt

    # ------------------------------------------------------------------ the caller's threads
    def shown(self, items: Iterator[TokenStep]) -> Iterator[Answers]:
        """Yield the answers as they grow, and finally with their differences marked."""
        now_s = shown_s = 0.0
        tokens: list[list[int]] = [[] for _ in self._rows]
        seconds = [0.0 for _ in self._rows]
        ended = [False for _ in self._rows]
        ends = self._end_tokens()
        for step in items:
            now_s = step.at_s
            for at, token in enumerate(step.tokens):
                # After the end of a row there is only padding.
                ended[at] = ended[at] or token in ends
                if not ended[at]:
                    tokens[at].append(token)
                    seconds[at] = now_s
            if now_s - shown_s >= SHOWN_EVERY_S:
                shown_s = now_s
                yield self._answers(tokens, seconds, now_s, done=False)
        yield self._answers(tokens, seconds, now_s, done=True)

    def _answers(
        self, tokens: list[list[int]], seconds: list[float], whole_s: float, *, done: bool
    ) -> Answers:
        found = {row.blend: own for row, own in zip(self._rows, tokens, strict=True)}
        answers = []
        for row, own, took_s in zip(self._rows, tokens, seconds, strict=True):
            differs, count = [False] * len(own), None
            # A parent that is a row only to be compared with may have no parent among the rows.
            if done and row.parent is not None and row.parent in found:
                differs = differing_tokens(found[row.parent], own)
                count = sum(differs)
            runs = text_runs(self._answerer.tokenizer, self._prompt, own, differs)
            answers.append(RowAnswer(row, tuple(own), runs, count, took_s))
        return Answers(tuple(answers), whole_s, done)

    def _end_tokens(self) -> set[int]:
        ends = self._answerer.base.generation_config.eos_token_id
        if ends is None:
            return set()
        return {ends} if isinstance(ends, int) else set(ends)

    # ------------------------------------------------------------------ the thread of the run
    def work(self) -> None:
        """Generate for all rows at once."""
        blends = [row.blend for row in self._rows]
        with self._answerer.model.route(blends):
            # It may have been stopped while it waited for the model's lock.
            if not self.is_stopped:
                with foreign("the base can't continue the prompt"):
                    self._continue()

    def _continue(self) -> None:
        base, question = self._answerer.base, self._question
        prompt = torch.tensor([self._prompt], device=base.device).expand(len(self._rows), -1)
        pad = self._answerer.tokenizer.pad_token_id
        if pad is None:
            pad = self._answerer.tokenizer.eos_token_id
        noise = []
        if question.temperature:
            noise.append(SharedNoise(question.temperature, question.seed))
        base.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=question.max_new_tokens,
            pad_token_id=pad,
            # The noise draws; a base whose own generation_config samples must not draw once more.
            do_sample=False,
            num_beams=1,
            logits_processor=noise,
            streamer=StepsOfRows(self.give),
            stopping_criteria=[self._ends],
        )

    def _ends(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return for each row whether it ends; transformers calls this after every token."""
        return torch.full((len(tokens),), self.is_stopped, device=tokens.device)


class StepsOfRows:
    """A streamer for transformers' ``generate`` that passes on the tokens of all rows at each step.

    The streamers of transformers take only one row.
    """

    def __init__(self, give: Callable[[TokenStep], None]) -> None:
        self._give = give
        self._is_prompt = True
        self._began = time.perf_counter()

    def put(self, tokens: Tensor) -> None:
        """Take the prompt, (rows, tokens), at first, and then a token for every row, (rows,)."""
        if self._is_prompt:
            self._is_prompt = False
            return
        at_s = time.perf_counter() - self._began
        self._give(TokenStep(at_s, tokens.flatten().tolist()))

    def end(self) -> None:
        """Do nothing: the thread itself reports the end."""


class SharedNoise:
    """A logits processor that makes the likeliest token a draw, by the same noise for each row.

    Args:
        temperature: above 0.
        seed: of the noise.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature = temperature
        # On the CPU, so that a seed means the same on each device.
        self._draw = torch.Generator().manual_seed(seed)

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Return scores, (rows, vocabulary), whose largest is the token that is drawn."""
        exponential = torch.empty(scores.shape[-1]).exponential_(generator=self._draw)
        gumbel = -exponential.log()  # (vocabulary,)
        return scores / self._temperature + gumbel.to(scores)
