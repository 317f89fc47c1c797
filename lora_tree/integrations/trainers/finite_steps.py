"""Stop a Trainer at the step that diverged, and say whether the base or a frozen node is to blame.

That is found by running the step's micro-batches again (`frozen_cause`). A Trainer drops them
before it says that a step has ended, so they are kept here until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from ...model import TreeModel
from ...runs.frozen_cause import frozen_cause, inputs_of_path
from ...training.diverged import check_finite_step

__all__ = ["FiniteSteps", "StepInputs"]


class StepInputs:
    """The micro-batches of one step.

    Args:
        model: of the tree.
        called_with: a micro-batch → what the base is called with; {} where it has no tokens.
    """

    def __init__(
        self, model: TreeModel, called_with: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> None:
        self._model, self._called_with = model, called_with
        self._seen: list[tuple[Mapping[str, Any], Sequence[object] | None]] = []

    def note(self, inputs: Mapping[str, Any], paths: Sequence[object] | None = None) -> None:
        """Keep a micro-batch, and its rows' paths; None: they are all of one."""
        self._seen.append((inputs, paths))

    def check_step(
        self, losses: Mapping[str, Tensor], *, step: int, path: str | None = None
    ) -> None:
        """Raise if the step made numbers that are not finite, and let go of its micro-batches.

        Args:
            losses: path → its loss.
            step: its number.
            path: of all rows, where the losses are not known.

        Raises:
            DivergedError: as `check_finite_step`.
        """
        try:
            check_finite_step(
                self._model.factors,
                losses,
                step=step,
                cause=lambda lost: frozen_cause(
                    self._model, lost if path is None else [path], self._of_path
                ),
            )
        finally:
            self._seen = []

    def _of_path(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield what the base was called with for the rows of a path."""
        for inputs, paths in self._seen:
            if paths is not None and path not in paths:
                continue
            own = self._called_with(inputs)
            if own:
                yield own if paths is None else inputs_of_path(own, paths, path)


class FiniteSteps(TrainerCallback):  # type: ignore[misc]
    """Stops a run that has diverged, before the Trainer logs, evaluates or saves.

    Args:
        inputs: of its steps.
        losses: returns path → its loss.
        path: of all rows, where the losses are not known.
    """

    def __init__(
        self,
        inputs: StepInputs,
        losses: Callable[[], Mapping[str, Tensor]] = dict,
        path: str | None = None,
    ) -> None:
        self._inputs, self._losses, self._path = inputs, losses, path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._inputs.check_step(self._losses(), step=state.global_step, path=self._path)
