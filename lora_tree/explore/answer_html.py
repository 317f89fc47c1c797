"""Answers and pictures as HTML, in which names and a model's words are text and never markup.

Law: every string that comes from a file or a model goes through `_text`, and pictures are ``data:``
URLs with their bytes, so the page loads and writes nothing.
"""

from __future__ import annotations

import base64
import html

from ..errors import LoraTreeError, plural, printable
from .answers import Answers, RowAnswer
from .pictures import Pictures
from .tokens import TextRun

__all__ = ["BARE", "STYLE", "answers_html", "error_html", "pictures_html"]

BARE = "(bare base)"
"""The root's name among the choices; no path can be called so."""

KEPT = "\n\t\xa0\u200c\u200d"
"""Invisible characters that text needs: in Persian, in Hindi, in joined emoji."""

STYLE = """
.lt-header { display: flex; align-items: baseline; gap: 1.5rem; }
.lt-header h1 { font-size: 1.5rem; font-weight: 700; margin: 0; color: var(--body-text-color); }
.lt-header a { color: var(--link-text-color); text-decoration: underline; }
.lt-answers { border-collapse: collapse; width: 100%; }
.lt-answers th, .lt-answers td { text-align: left; vertical-align: top; padding: .5rem .75rem;
  border-top: 1px solid var(--border-color-primary); color: var(--body-text-color); }
.lt-answers th[scope=row] { font-weight: 600; overflow-wrap: anywhere;
  min-width: 8.5rem; }
.lt-answers .lt-words { white-space: pre-wrap; overflow-wrap: anywhere; width: 70%;
  font-family: var(--font-mono); font-size: .85rem; line-height: 1.45; }
.lt-answers .lt-number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.lt-answers thead th { font-size: .8rem; font-weight: 500; border-top: 0;
  color: var(--body-text-color-subdued); }
.lt-answers .lt-parent th, .lt-answers .lt-parent td { color: var(--body-text-color-subdued); }
.lt-answers mark { background: #fde68a; color: #1c1917; border-radius: 2px; }
.lt-note { color: var(--body-text-color-subdued); font-size: .85rem; margin: .25rem 0 .75rem; }
.lt-pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.lt-pictures figure { margin: 0; flex: 0 1 16rem; min-width: 8rem; }
.lt-pictures img { width: 100%; border-radius: 4px; image-rendering: auto; }
.lt-pictures figcaption { overflow-wrap: anywhere; padding-top: .25rem; }
@media (max-width: 640px) {
  .lt-answers thead { display: none; }
  .lt-answers tr { display: block; border-top: 1px solid var(--border-color-primary);
    padding: .5rem 0; }
  .lt-answers th, .lt-answers td, .lt-answers .lt-words { display: block; width: auto; border: 0;
    padding: .15rem 0; }
  .lt-answers .lt-number { display: inline-block; text-align: left; margin-right: 1rem;
    font-size: .8rem; color: var(--body-text-color-subdued); }
  .lt-answers .lt-number:empty { display: none; }
  .lt-answers .lt-number::after { content: " " attr(data-unit); }
}
"""


def answers_html(answers: Answers) -> str:
    """Return a table of answers, one row each; tokens that the parent's answer lacks are marked."""
    rows = "".join(_row(answer) for answer in answers.rows)
    count = sum(len(answer.tokens) for answer in answers.rows)
    rate = f"{answers.tokens_per_second:.1f} tokens per second"
    batch = plural(len(answers.rows), "row", "rows in one batch")
    note = f"{batch}: {plural(count, 'token')} in {answers.seconds:.1f} s, {rate}"
    if not answers.done:
        note += " …"
    return (
        f'<p class="lt-note" role="status">{note}</p>'
        '<table class="lt-answers"><thead><tr><th scope="col">Path</th><th scope="col">Answer</th>'
        '<th scope="col" class="lt-number">Differs</th><th scope="col" class="lt-number">Tokens/s'
        f"</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def pictures_html(pictures: Pictures) -> str:
    """Return the images side by side, each with its path below; before that, the steps done."""
    took = f"{pictures.step} of {plural(pictures.steps, 'step')} in {pictures.seconds:.1f} s"
    figures = []
    for row in pictures.rows:
        name = _text(row.blend or BARE)
        data = base64.b64encode(row.png).decode("ascii")
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{name}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    more = "" if pictures.done else " …"
    return (
        f'<p class="lt-note" role="status">{took}{more}</p>'
        f'<div class="lt-pictures">{"".join(figures)}</div>'
    )


def error_html(error: LoraTreeError) -> str:
    """Return an error's lines; gradio shows a message as HTML."""
    return "<br>".join(_text(line) for line in (error.what, *error.todo))


def _row(answer: RowAnswer) -> str:
    row = answer.row
    differs = "" if answer.differing is None else f"{answer.differing} of {len(answer.tokens)}"
    against = "" if row.parent is None else f"from {_text(row.parent or BARE)}"
    kind = "" if row.is_requested else ' class="lt-parent" title="a row to compare with"'
    name = _text(row.blend or BARE)
    words = "".join(_run(run) for run in answer.runs)
    return (
        f'<tr{kind}><th scope="row">{name}</th><td class="lt-words">{words}</td>'
        f'<td class="lt-number" data-unit="differ {against}" title="{against}">{differs}</td>'
        f'<td class="lt-number" data-unit="tokens/s">{answer.tokens_per_second:.1f}</td></tr>'
    )


def _run(run: TextRun) -> str:
    text = _text(run.text)
    return f"<mark>{text}</mark>" if run.differs else text


def _text(text: str) -> str:
    """Return a string as text of a page; characters that hide or reverse text are escaped."""
    return html.escape(printable(text, keep=KEPT), quote=True)
