"""Several paths answer one prompt in one batch, as each of them answers by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from speakers import (
    PROMPT,
    language_model,
    one_by_one,
    save_base,
    speaking_in_words,
    tree_over,
)

import lora_tree as lt
from lora_tree.errors import PathError, SpecError
from lora_tree.explore.answers import Answerer, SharedNoise
from lora_tree.explore.question import Question, parent_of, rows_of
from lora_tree.explore.tokens import TextRun, differing_tokens, text_runs

BLEND = "fr/legal:0.7+de:0.3"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("base")
    save_base(language_model(), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def answerer(tokenizer: Any) -> Iterator[Answerer]:
    base = language_model()
    model = lt.attach(tree_over(base), base)
    yield Answerer(model, tokenizer)
    model.detach()


# ---------------------------------------------------------------------- answers
def test_every_row_answers_as_its_path_does_by_itself(answerer: Answerer) -> None:
    asked = ("fr/legal", BLEND, "", "de")
    made = answerer.answer(Question(PROMPT, asked, max_new_tokens=24))
    assert made.done
    assert [answer.row.blend for answer in made.rows] == ["fr/legal", "de:0.3+fr/legal:0.7", "",
                                                          "de", "fr"]  # fmt: skip
    for answer in made.rows:
        alone = one_by_one(answerer.model, answerer.tokenizer, answer.row.blend, PROMPT, 24)
        assert list(answer.tokens) == alone, answer.row.blend
        assert answer.text == answerer.tokenizer.decode(alone, skip_special_tokens=True)
    texts = {answer.text for answer in made.rows}
    assert len(texts) == len(made.rows), "the adapters change nothing: nothing was tested"


def test_a_row_ends_at_its_end_and_the_others_go_on(answerer: Answerer) -> None:
    first = one_by_one(answerer.model, answerer.tokenizer, "fr", PROMPT, 20)
    others = one_by_one(answerer.model, answerer.tokenizer, "de", PROMPT, 20)
    # A token that fr writes early and de does not write: from now on it ends a text.
    end = next(token for token in first if token not in others)
    answerer.model.base.generation_config.eos_token_id = [256, end]
    made = answerer.answer(Question(PROMPT, ("fr", "de"), max_new_tokens=20))
    assert list(made.rows[0].tokens) == first[: first.index(end)]
    assert list(made.rows[1].tokens) == others


def test_a_drawn_answer_does_not_depend_on_the_rows_beside_it(answerer: Answerer) -> None:
    def drawn(*blends: str, seed: int) -> dict[str, tuple[int, ...]]:
        question = Question(PROMPT, blends, max_new_tokens=16, temperature=0.8, seed=seed)
        return {answer.row.blend: answer.tokens for answer in answerer.answer(question).rows}

    beside = drawn("de", "fr/legal", "", seed=7)
    for path in ("de", "fr/legal", ""):
        assert drawn(path, seed=7)[path] == beside[path]
    assert drawn("de", seed=8)["de"] != beside["de"]


def test_what_is_drawn_has_the_odds_of_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    noise = SharedNoise(0.5, seed=3)
    counts = torch.zeros(4)
    draws = 20_000
    for _ in range(draws):
        counts[noise(torch.empty(1, 0), scores).argmax()] += 1
    wanted = torch.softmax(scores[0] / 0.5, dim=0)
    # Four standard deviations of a count.
    allowed = 4 * (wanted * (1 - wanted) / draws).sqrt()
    assert ((counts / draws - wanted).abs() <= allowed).all()


def test_the_model_does_again_what_it_did_before(answerer: Answerer) -> None:
    answerer.model.activate("de")
    answerer.answer(Question(PROMPT, ("fr",), max_new_tokens=2))
    assert answerer.model.active == "de"


def test_answers_grow_and_stop_at_once(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_tree.explore.answers.SHOWN_EVERY_S", 0.0)
    run = answerer.ask(Question(PROMPT, ("fr", "de"), max_new_tokens=200))
    seen = []
    for answers in run:
        seen.append(answers)
        if len(answers.rows[0].tokens) >= 5:
            run.stop()
    assert seen[-1].done
    assert not seen[0].done
    assert 5 <= len(seen[-1].rows[0].tokens) < 200
    assert answerer.model.active == ""


def test_whoever_leaves_early_leaves_the_model_free(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_tree.explore.answers.SHOWN_EVERY_S", 0.0)
    growing = iter(answerer.ask(Question(PROMPT, ("fr",), max_new_tokens=200)))
    next(growing)
    growing.close()
    assert "lora_tree side run" not in [thread.name for thread in threading.enumerate()]
    answerer.model.activate("de")


# ---------------------------------------------------------------------- rows and refusals
def test_parents_are_rows_once(answerer: Answerer) -> None:
    rows = rows_of(Question(PROMPT, ("fr/legal", "fr/medical", "fr")), answerer.model.tree)
    assert [(row.blend, row.parent, row.is_requested) for row in rows] == [
        ("fr/legal", "fr", True),
        ("fr/medical", "fr", True),
        ("fr", "", True),
        ("", None, False),
    ]
    assert parent_of("fr:0.5+fr/legal:0.5") == "fr"


def test_what_can_not_be_asked_is_refused(answerer: Answerer) -> None:
    def refused(prompt: str = PROMPT, blends: tuple[str, ...] = ("fr",), **more: Any) -> str:
        with pytest.raises((PathError, SpecError)) as caught:
            answerer.ask(Question(prompt, blends, **more))
        return str(caught.value)

    assert "'fr/legl'" in refused(blends=("fr/legl",))
    assert "'x' is not a number" in refused(blends=("fr:x",))
    assert refused(blends=()).startswith("nothing is asked\n")
    many = tuple(f"fr:{k}" for k in range(2, 19))
    assert refused(blends=many).startswith("17 paths and blends are asked at once; the most is 16")
    assert refused(prompt="").startswith("the prompt has no tokens")
    assert refused(max_new_tokens=0) == "max_new_tokens must be at least 1, got 0"
    assert refused(temperature=-1.0).startswith("temperature must be 0 or a positive number")
    assert refused(temperature=float("nan")).startswith("temperature must be 0 or a positive")
    assert refused(max_new_tokens=250) == (
        "the prompt's 17 tokens and 250 new ones are more than the 256 that the base can read\n"
        "  shorten the prompt, or ask for fewer tokens"
    )
    assert answerer.model.active == ""


def test_an_error_of_the_base_is_told_and_the_model_is_free(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel")

    with monkeypatch.context() as patch:
        patch.setattr(answerer.model.base.model, "forward", broken)
        with pytest.raises(SpecError) as caught:
            answerer.answer(Question(PROMPT, ("fr",)))
    assert str(caught.value) == "the base can't continue the prompt: RuntimeError: no kernel"
    assert answerer.answer(Question(PROMPT, ("fr",), max_new_tokens=2)).done


# ---------------------------------------------------------------------- what differs
def test_the_tokens_that_the_parent_lacks_are_marked(answerer: Answerer) -> None:
    made = answerer.answer(Question(PROMPT, ("fr/legal", "fr", ""), max_new_tokens=24))
    tokens = {answer.row.blend: answer.tokens for answer in made.rows}
    for answer in made.rows:
        if answer.row.parent is None:
            assert answer.differing is None
            continue
        differs = differing_tokens(tokens[answer.row.parent], answer.tokens)
        assert answer.differing == sum(differs) > 0
        marked = "".join(run.text for run in answer.runs if run.differs)
        assert marked, answer.row.blend
    # The slow way: what is not marked is a common subsequence, in order.
    left = list(tokens["fr"])
    differs = differing_tokens(tokens["fr"], tokens["fr/legal"])
    for token, marked_token in zip(tokens["fr/legal"], differs, strict=True):
        if not marked_token:
            del left[: left.index(token) + 1]


def test_a_path_that_changes_nothing_differs_in_nothing(tokenizer: Any) -> None:
    base = language_model()
    tree = tree_over(base)
    tree.add("fr/same", adapter=lt.Adapter({}), weight=1.0)
    with_model = Answerer(lt.attach(tree, base), tokenizer)
    answer = with_model.answer(Question(PROMPT, ("fr/same",), max_new_tokens=12)).rows[0]
    assert answer.differing == 0
    assert len(answer.runs) == 1


@pytest.mark.parametrize("text", ["aé☃b", "héllo", "", "🙂🙂", "plain"])
def test_characters_are_whole_whatever_tokens_differ(tokenizer: Any, text: str) -> None:
    prompt, answer = list(b"x = "), list(text.encode())
    for at in range(len(answer)):
        differs = [k == at for k in range(len(answer))]
        runs = text_runs(tokenizer, prompt, answer, differs)
        assert "".join(run.text for run in runs) == text
        marked = [run for run in runs if run.differs]
        assert len(marked) == 1
        assert len(marked[0].text) == 1
    assert text_runs(tokenizer, prompt, answer, [False] * len(answer)) == (
        (TextRun(text, False),) if text else ()
    )


def test_half_a_character_at_the_end_is_shown(tokenizer: Any) -> None:
    runs = text_runs(tokenizer, list(b"x"), list("a☃".encode())[:-1], [False] * 3)
    assert "".join(run.text for run in runs) == "a\ufffd"


def test_a_token_without_text_takes_no_space_away() -> None:
    _, words = speaking_in_words()
    say = words.get_vocab()
    prompt, answer = [say["the"], say["tenant"]], [say["pays"], say[";"], say["rent"], say["."]]
    runs = text_runs(words, prompt, answer, [False, False, True, False])
    assert runs == (TextRun(" pays", False), TextRun(" rent", True), TextRun(" .", False))
