"""Find how the rows of a routed batch lie in the input of each component of a pipeline.

    rows of the UNet = prompts · images for each (repeat) · guidance (tile)

With guidance diffusers calls a text encoder twice on n rows, and the UNet once on 2n, the negative
prompts first. ``num_images_per_prompt`` repeats every prompt in succession. Only the pipeline's own
call knows that number, so that call is looked up on the call stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...callers import locals_of_call
from ...engine.rows.batch_axis import BatchAxis, Place, SeenSites
from ...errors import BaseMismatch, plural

__all__ = ["PipelineAxis"]

MAIN_INPUTS = ("hidden_states", "sample", "input_ids")


class PipelineAxis(BatchAxis):
    """The batch axis of a pipeline: it finds how the rows lie in each component's input.

    Args:
        pipe: the pipeline; its running call is looked up.
        rows: the number of paths in the route.
        repeat, tile, batch_first, seen: as for `BatchAxis`.
    """

    def __init__(
        self,
        pipe: Any,
        rows: int,
        *,
        repeat: int,
        tile: int,
        batch_first: bool,
        seen: SeenSites,
    ) -> None:
        super().__init__(rows, repeat=repeat, tile=tile, batch_first=batch_first, seen=seen)
        self._pipe = pipe
        self._spreads: dict[str, tuple[int, tuple[int, int] | None]] = {}

    def begins(
        self, name: str, component: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note how the rows lie in a component's forward, which begins now.

        Raises:
            BaseMismatch: their number does not follow from the paths, prompts and images.
        """
        self._spreads.pop(name, None)
        # Only the pipeline's own call knows the number of images per prompt.
        call = locals_of_call("__call__", self._pipe, ("batch_size", "num_images_per_prompt"))
        given = _row_count(args, kwargs)
        if call is None or given is None:
            return  # the component was called by itself: `spread` uses what the caller declared
        if name.startswith("text_encoder"):
            self._spreads[name] = given, self._of_prompts(given)
        else:
            self._spreads[name] = given, self._of_images(name, given, call)

    def spread(self, site: Place, x: Tensor, out: Tensor) -> tuple[int, int]:
        """Return (repeat, tile) at a site: repeats of each row in succession, and of the batch.

        Raises:
            BaseMismatch: the first axis is not the rows; names the site.
        """
        component = site.name.partition(".")[0]
        known = self._spreads.get(component)
        if known is None:
            return super().spread(site, x, out)
        given, spread = known
        if spread is None:
            raise BaseMismatch(
                f"{site.name}: {component} was given {plural(given, 'prompt')}, and the route "
                f"is for {plural(self.rows, 'row')}, which differ in it: "
                "the images of one prompt share its text",
                "repeat the prompt, one for each path: pipe([prompt] * n)",
            )
        if x.shape[:1] != (given,) or out.shape[:1] != (given,):
            raise BaseMismatch(
                f"{site.name}: its input is {tuple(x.shape)}, and the first axis should be the "
                f"{plural(given, 'row')} of {component}"
            )
        return spread

    # A text encoder is called for the prompts, and once more for the negative ones: n rows each.
    def _of_prompts(self, given: int) -> tuple[int, int] | None:
        """Return (repeat, tile) for a text encoder; None if a prompt has several paths."""
        if given % self.rows:
            return None
        return 1, given // self.rows

    def _of_images(self, name: str, given: int, call: Mapping[str, Any]) -> tuple[int, int]:
        """Return (repeat, tile) for the UNet or transformer."""
        each = call.get("num_images_per_prompt") or 1
        prompts = call.get("batch_size")
        if not isinstance(prompts, int):
            prompts = self.rows
        # With one path for each prompt, the prompt's images are rows in succession. With one for
        # each image, no row is repeated. Guidance stacks that whole batch once more.
        repeat = each if self.rows == prompts else 1
        if self.rows not in (prompts, prompts * each) or given % (self.rows * repeat):
            raise BaseMismatch(
                f"{name}: the pipeline makes {plural(each, 'image')} for each of "
                f"{plural(prompts, 'prompt')} ({plural(given, 'row')} at once), "
                f"and the route is for {plural(self.rows, 'row')}",
                "give route one path for each prompt, or one for each image",
            )
        return repeat, given // (self.rows * repeat)


def _row_count(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the size of the first axis of a component's main input; None if it has none."""
    main = [kwargs[name] for name in MAIN_INPUTS if name in kwargs]
    found = next((x for x in [*args, *main] if isinstance(x, Tensor) and x.ndim > 1), None)
    return None if found is None else found.shape[0]
