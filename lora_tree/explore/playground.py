"""The playground: a gradio page that asks several paths and blends at once.

    prompt, paths, blends, numbers ─▶ Answering.begin ─▶ a run ─▶ Answering.html ─▶ the page

Laws: gradio sends no reports, shares no link, keeps no history and writes no file: pictures and
answers are parts of the page. The model answers one question at a time; others wait in a queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..blend import spelled
from ..errors import LoraTreeError
from ..extras import need
from ..tree import AdapterTree
from .answer_html import BARE, STYLE, error_html
from .answering import Answering

__all__ = ["Playground", "mount"]

MOST_BLENDED = 6
"""Sliders of a blend; a blend of more paths can be typed."""

HEADING = '<header class="lt-header"><h1>Playground</h1><a href="/">The tree</a></header>'
ABOVE_TABLE = "Answers stand here, side by side."


class Playground:
    """The playground's page, and the actions behind its buttons.

    Args:
        answering: an `AnsweringModel` or `AnsweringPipeline`.

    Raises:
        MissingExtra: gradio is not installed.
    """

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self._gradio = need("gradio", extra="explore", what="the playground")
        self._run: Any = None
        self.blocks = self._page()

    def stop(self) -> None:
        """End the answers under way; their tokens so far stay."""
        if self._run is not None:
            self._run.stop()

    # ------------------------------------------------------------------ the page's actions
    def _answer(
        self, prompt: str, paths: list[str], blends: list[str] | None, *numbers: Any
    ) -> Iterator[str]:
        requested = ["" if name == BARE else name for name in [*paths, *(blends or [])]]
        try:
            self._run = self.answering.begin(prompt, tuple(requested), *numbers)
            for result in self._run:
                yield self.answering.html(result)
        except LoraTreeError as error:
            raise self._refusal(error) from error
        finally:
            self._run = None

    def _show_sliders(self, paths: list[str] | None) -> list[Any]:
        """Show a slider for each path of the blend, at equal weights."""
        gr = self._gradio
        paths = paths or []
        shown = []
        for at in range(MOST_BLENDED):
            if at < len(paths):
                weight = round(1 / len(paths), 2)
                shown.append(gr.update(label=paths[at], value=weight, visible=True))
            else:
                shown.append(gr.update(visible=False))
        return shown

    def _add_blend(
        self, blends: list[str] | None, paths: list[str] | None, *weights: float
    ) -> list[str]:
        """Add the blend of the sliders to the blends that are asked."""
        try:
            blend = spelled(dict(zip(paths or [], weights, strict=False)))
            self.answering.tree.coefficients(blend)
        except LoraTreeError as error:
            raise self._refusal(error) from error
        # A dict keeps the order, and a blend that is asked already stays where it is.
        return list(dict.fromkeys([*(blends or []), blend or BARE]))

    def _refusal(self, error: LoraTreeError) -> Exception:
        refusal: Exception = self._gradio.Error(error_html(error), print_exception=False)
        return refusal

    # ------------------------------------------------------------------ how the page looks
    def _page(self) -> Any:
        gr = self._gradio
        paths = [BARE, *self.answering.tree.paths()]
        with gr.Blocks(title="lora_tree playground", analytics_enabled=False) as blocks:
            gr.HTML(HEADING, apply_default_css=False, js_on_load=None)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    prompt = gr.Textbox(label="Prompt", lines=4, elem_id="prompt")
                    chosen = gr.Dropdown(
                        paths,
                        value=_first(self.answering.tree),
                        multiselect=True,
                        label="Paths",
                        info="Type to search.",
                        elem_id="paths",
                    )
                    blends = self._blend_parts(paths[1:])
                    numbers = self.answering.numbers(gr)
                    with gr.Row():
                        ask = gr.Button(self.answering.verb, variant="primary", elem_id="ask")
                        stop = gr.Button("Stop", elem_id="stop")
                with gr.Column(scale=5, min_width=320):
                    answers = gr.HTML(
                        f'<p class="lt-note">{ABOVE_TABLE}</p>',
                        elem_id="answers",
                        apply_default_css=False,
                        js_on_load=None,
                    )
            # The model answers one question at a time, however many windows are open.
            gr.on(
                [ask.click, prompt.submit],
                self._answer,
                inputs=[prompt, chosen, blends, *numbers],
                outputs=answers,
                concurrency_limit=1,
                show_progress="hidden",
            )
            # Not in that queue: it must not wait for the answers that it stops.
            stop.click(self.stop, concurrency_limit=None, show_progress="hidden")
        return blocks

    def _blend_parts(self, paths: list[str]) -> Any:
        """Make the list of blends, to be typed in, and sliders that add one; return the list."""
        gr = self._gradio
        blends = gr.Dropdown(
            multiselect=True,
            allow_custom_value=True,
            label="Blends",
            info="Type one, as fr/legal:0.7+de:0.3, or make one with sliders.",
            elem_id="blends",
        )
        with gr.Accordion("Blend with sliders", open=False, elem_id="blend"):
            blended = gr.Dropdown(
                paths,
                multiselect=True,
                max_choices=MOST_BLENDED,
                label="Paths of the blend",
                elem_id="blended",
            )
            sliders = []
            for at in range(MOST_BLENDED):
                sliders.append(
                    gr.Slider(-1, 2, 1, step=0.05, label="", visible=False, elem_id=f"weight-{at}")
                )
            add = gr.Button("Ask this blend too", size="sm", elem_id="add-blend")
        blended.change(self._show_sliders, inputs=blended, outputs=sliders, show_progress="hidden")
        add.click(
            self._add_blend,
            inputs=[blends, blended, *sliders],
            outputs=blends,
            show_progress="hidden",
        )
        return blends


def _first(tree: AdapterTree) -> list[str]:
    """Return the choice when the page opens: the bare base and the first path."""
    return [BARE, *tree.paths()[:1]]


def mount(app: Any, playground: Playground) -> None:
    """Add the playground to a FastAPI application, at ``/playground``.

    Args:
        app: of fastapi.
        playground: its blocks.
    """
    gr = need("gradio", extra="explore", what="the playground")
    gr.mount_gradio_app(
        app,
        playground.blocks,
        path="/playground",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=_theme(gr),
        css=STYLE,
    )


def _theme(gr: Any) -> Any:
    """Return gradio's plain theme with the system's fonts, and with notes dark enough to read.

    Gradio's themes may use Google's fonts, which the browser would load from Google.
    """
    theme = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
    )
