"""The playground in a real browser: it opens, chooses, blends, answers, stops, and stays at home.

A language model and a pipeline, both tiny and with random weights, are served on loopback.
"""

from __future__ import annotations

import http.client
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipelines as tiny
import pytest
from playwright.sync_api import Page
from speakers import (
    PROMPT,
    language_model,
    one_by_one,
    save_base,
    speaking_in_words,
    tree_over,
)

import lora_tree as lt
from lora_tree.explore.answering import AnsweringModel, AnsweringPipeline
from lora_tree.explore.answers import Answerer
from lora_tree.explore.pictures import Painter
from lora_tree.explore.playground import Playground
from lora_tree.explore.server import Served, serving
from lora_tree.integrations.diffusers import attach_pipeline

LOOKS = [("light", 1280), ("light", 400), ("dark", 1280), ("dark", 400)]
WAIT_MS = 60_000

# Gradio counts its own requests with options of pandas that are going away.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    from transformers import AutoTokenizer

    base = language_model()
    folder = tmp_path_factory.mktemp("base")
    save_base(base, folder)
    return Answerer(lt.attach(tree_over(base), base), AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def playground(answerer: Answerer) -> Playground:
    return Playground(AnsweringModel(answerer))


@pytest.fixture(scope="module")
def served(playground: Playground) -> Iterator[Served]:
    with serving(lambda: "<h1>tree</h1>", playground=playground) as served:
        yield served


@pytest.fixture
def page(opened: Callable[..., Page], served: Served) -> Page:
    return playground_of(opened, served)


def playground_of(opened: Callable[..., Page], served: Served, **look: Any) -> Page:
    """Open the playground; `opened` fails if the browser says or loads anything wrong."""
    page = opened(f"{served.url}playground/", **look)
    page.wait_for_selector("#ask")
    return page


def choose(page: Page, label: str, *words: str) -> None:
    """Type into a list that is searched, and take what it finds, by keyboard alone."""
    page.get_by_label(label, exact=True).focus()
    for word in words:
        page.keyboard.type(word)
        page.get_by_role("option").first.wait_for()
        page.keyboard.press("Enter")
    page.keyboard.press("Escape")


def ask(page: Page, prompt: str = PROMPT, *, tokens: int = 24) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#tokens input[type=number]").fill(str(tokens))
    page.keyboard.press("Tab")
    page.click("#ask")


def finished(page: Page) -> dict[str, str]:
    """Wait for the end of the answers; return the words of each row."""
    page.wait_for_function(
        "() => { const note = document.querySelector('#answers [role=status]');"
        " return note && !note.textContent.includes('…') }"
    )
    names = page.locator("#answers th[scope=row]").all_text_contents()
    words = page.locator("#answers .lt-words").all_text_contents()
    return dict(zip(names, words, strict=True))


# ---------------------------------------------------------------------- text
def test_paths_and_a_blend_answer_as_they_do_by_themselves(page: Page, answerer: Answerer) -> None:
    choose(page, "Paths", "legal")
    page.get_by_text("Blend with sliders").click()
    choose(page, "Paths of the blend", "medical", "de")
    page.locator("#weight-1 input[type=number]").wait_for()
    page.locator("#weight-0 input[type=range]").focus()
    for _ in range(4):  # 0.5 → 0.7, by steps of 0.05
        page.keyboard.press("ArrowRight")
    page.locator("#weight-1 input[type=number]").fill("0.3")
    page.keyboard.press("Tab")
    page.click("#add-blend")
    page.locator("#blends").get_by_text("de:0.3+fr/medical:0.7").wait_for()
    ask(page)
    words = finished(page)
    assert list(words) == ["(bare base)", "de", "fr/legal", "de:0.3+fr/medical:0.7", "fr"]
    for blend in ("de", "fr/legal", "de:0.3+fr/medical:0.7"):
        alone = one_by_one(answerer.model, answerer.tokenizer, blend, PROMPT, 24)
        assert shown(answerer.tokenizer.decode(alone)) == words[blend]
    assert page.locator("#answers mark").count() > 0


def shown(text: str) -> str:
    """A text as the page spells it: what drives a terminal is escaped."""
    return "".join(
        sign if sign.isprintable() or sign in "\n\t\xa0" else ascii(sign)[1:-1] for sign in text
    )


def test_a_question_that_can_not_be_asked_is_told_and_the_next_one_is_answered(page: Page) -> None:
    page.get_by_label("Blends", exact=True).focus()
    page.keyboard.type("fr/legl:0.5+<img src=x onerror=alert(1)>:1")
    page.keyboard.press("Enter")
    ask(page)
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "<img src=x onerror=alert(1)>" in toast.inner_text()
    assert page.locator("#answers img, .toast-body img").count() == 0
    page.get_by_label("Blends", exact=True).focus()
    page.keyboard.press("Backspace")
    ask(page, "<script>alert(1)</script>", tokens=4)
    assert list(finished(page)) == ["(bare base)", "de"]


def test_stop_ends_an_answer_with_what_it_has(
    page: Page, playground: Playground, answerer: Answerer
) -> None:
    forwards, held = [], threading.Event()

    def hold(*_: Any) -> None:
        # The model waits in its tenth forward until the button is pressed.
        forwards.append(1)
        if len(forwards) == 10:
            held.set()
            assert playground._run._stopped.wait(WAIT_MS / 1000)

    handle = answerer.base.model.layers[0].register_forward_pre_hook(hold)
    try:
        ask(page, tokens=200)
        assert held.wait(WAIT_MS / 1000)
        page.click("#stop")
        finished(page)
    finally:
        handle.remove()
    note = page.locator("#answers [role=status]").inner_text()
    assert note.startswith("2 rows in one batch: 20 tokens in ")
    ask(page, tokens=3)
    page.get_by_text("2 rows in one batch: 6 tokens in ").wait_for()


def test_everything_is_reached_by_the_keyboard(page: Page) -> None:
    page.locator("#prompt textarea").focus()
    page.keyboard.type(PROMPT)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "() => document.activeElement.closest('[id]:not(input):not(textarea)')?.id"
            )
        )
        if page.evaluate("() => document.activeElement.id") == "ask":
            break
    assert {"ask", "tokens", "temperature", "seed"} <= reached
    page.locator("#tokens input[type=number]").fill("3")
    page.locator("#ask").focus()
    page.keyboard.press("Enter")
    assert len(finished(page)) == 2


@pytest.fixture(scope="module")
def in_words() -> Iterator[Served]:
    """A playground whose answers are words."""
    base, tokenizer = speaking_in_words()
    model = lt.attach(tree_over(base), base)
    playground = Playground(AnsweringModel(Answerer(model, tokenizer)))
    with serving(lambda: "<h1>tree</h1>", playground=playground) as served:
        yield served


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_it_fits_the_window(
    opened: Callable[..., Page],
    picture: Callable[..., None],
    in_words: Served,
    scheme: str,
    width: int,
) -> None:
    page = playground_of(opened, in_words, scheme=scheme, width=width)
    choose(page, "Paths", "legal", "medical")
    page.get_by_label("Blends", exact=True).focus()
    page.keyboard.type("fr/legal:0.7+de:0.3")
    page.keyboard.press("Enter")
    ask(page, "the tenant pays", tokens=32)
    assert len(finished(page)) == 6
    wide = page.evaluate("() => document.documentElement.scrollWidth")
    assert wide <= width
    picture(page, f"playground-{scheme}-{width}", full=True)


# ---------------------------------------------------------------------- images
def test_images_stand_side_by_side(opened: Callable[..., Page]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = tiny.stable_diffusion()
        tree = lt.AdapterTree()
        ends = {"unet": ("to_q", "to_out.0", "conv1"), "text_encoder": ("q_proj", "fc1")}
        for seed, path in enumerate(("ink", "ink/knight", "ink/wizard")):
            tree.add(path, adapter=tiny.adapter(pipe, ends, seed=seed))
        playground = Playground(AnsweringPipeline(Painter(attach_pipeline(tree, pipe), pipe)))
        with serving(lambda: "", playground=playground) as served:
            page = playground_of(opened, served)
            choose(page, "Paths", "knight", "wizard")
            page.locator("#prompt textarea").fill("a castle")
            page.locator("#steps input[type=number]").fill("3")
            page.keyboard.press("Tab")
            page.click("#ask")
            page.wait_for_selector("#answers figure:nth-child(4) img")
            names = page.locator("#answers figcaption").all_text_contents()
            assert names == ["(bare base)", "ink", "ink/knight", "ink/wizard"]
            sizes = "images => images.map(image => image.naturalWidth)"
            assert page.locator("#answers img").evaluate_all(sizes) == [8, 8, 8, 8]


# ---------------------------------------------------------------------- nothing else
@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/upload",
        "gradio_api/file=/etc/hostname",
        "gradio_api/proxy=http://example.org/",
        "gradio_api/info",
        "gradio_api/runs",
        "gradio_api/vibe-code/",
        "monitoring",
    ],
)
def test_the_rest_of_gradio_is_closed(served: Served, path: str) -> None:
    client = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    client.request("GET", f"/playground/{path}")
    assert client.getresponse().status == 404
    client.close()


def test_nothing_is_written(
    opened: Callable[..., Page],
    answerer: Answerer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(cache))
    monkeypatch.chdir(tmp_path)
    playground = Playground(AnsweringModel(answerer))
    with serving(lambda: "", playground=playground) as served:
        page = playground_of(opened, served)
        ask(page, tokens=4)
        finished(page)
    assert list(tmp_path.iterdir()) == []
