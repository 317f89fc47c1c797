"""Names and a model's words are text on the page, whatever they say."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from lora_tree.errors import SpecError
from lora_tree.explore.answer_html import answers_html, error_html, pictures_html
from lora_tree.explore.answers import Answers, RowAnswer
from lora_tree.explore.pictures import Pictures, RowPicture
from lora_tree.explore.question import QuestionRow
from lora_tree.explore.tokens import TextRun

EVIL = [
    "</td><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; stays as it is",
]
OURS = {"p", "table", "thead", "tbody", "tr", "th", "td", "mark", "div", "figure", "figcaption",
        "img", "br"}  # fmt: skip


class Read(HTMLParser):
    """What a browser makes of it: tags, attributes, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def answers(blend: str, words: str) -> Answers:
    runs = (TextRun(words, False), TextRun(words, True))
    row = RowAnswer(QuestionRow(blend, blend, True), (1, 2), runs, 1, 0.5)
    return Answers((row,), 0.5, True)


@pytest.mark.parametrize("evil", EVIL)
def test_what_looks_like_markup_is_text(evil: str) -> None:
    pages = [
        answers_html(answers(evil, evil)),
        pictures_html(Pictures((RowPicture(evil, b"png"),), 1, 1, 0.1)),
        error_html(SpecError(evil, evil)),
    ]
    for page in pages:
        read = Read(page)
        assert read.tags <= OURS
        assert not [name for name in read.attributes if name.startswith("on")]
        assert evil in read.text
    assert "<mark>" in pages[0]


def test_what_would_turn_text_around_is_spelled_out_and_writing_is_kept() -> None:
    read = Read(answers_html(answers("fr", "a\u202eb\x1b[0m می\u200cخواهم\n🙂")))
    assert "a\\u202eb\\x1b[0m می\u200cخواهم\n🙂" in read.text


def test_a_row_says_what_differs_from_whom() -> None:
    page = answers_html(answers("fr/legal", "x"))
    assert "1 of 2" in page
    assert 'title="from fr/legal"' in page
    assert "1 row: 2 tokens in 0.5 s, 4.0 tokens per second" in page
