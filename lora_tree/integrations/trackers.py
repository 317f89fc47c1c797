"""Report a run to tensorboard or wandb while it goes on, through accelerate's trackers.

    loss/fr/legal  grad_norm/fr/legal  learning_rate/fr/legal  tokens/fr/legal     after each step
    eval_loss/fr/legal                                                  after each evaluation

The names are those of `TreeTrainer`. Tensorboard's files go into the record of the run; wandb
writes and sends where its own settings say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MissingExtra, SpecError
from ..extras import foreign, need
from ..runs import StepLosses
from ..training.diverged import BASE_LABEL

__all__ = ["TRACKERS", "check_trackers", "reporting"]

TRACKERS = ("tensorboard", "wandb")
_WHAT = "--report-to"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before anything trains.

    Raises:
        SpecError: there is no such tracker.
        MissingExtra: its package, or accelerate, is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise SpecError(f"{_WHAT} {name}: expected one of {', '.join(TRACKERS)}")
        need("accelerate", extra="train", what=f"{_WHAT} {name}")
        # No extra of this library installs these two, because many users want neither.
        if find_spec(name) is None:
            raise MissingExtra(
                f"{_WHAT} {name} needs {name}, which is not installed", f"pip install {name}"
            )


@contextmanager
def reporting(
    names: Sequence[str], folder: Callable[[], Path], config: Mapping[str, Any], *, done: int
) -> Iterator[Callable[[StepLosses], None]]:
    """Yield a function to call after every step.

    Args:
        names: of the trackers, as `check_trackers` has checked them.
        folder: returns the folder of the run's record, which exists once a step was taken.
        config: settings of the run, to be shown beside it.
        done: steps that the run has taken: tensorboard is told to forget later ones.

    Raises:
        SpecError: a tracker can't begin.
    """
    with ExitStack() as closing:
        trackers: list[Any] = []

        def tell(step: StepLosses) -> None:
            if not trackers:
                for name in names:
                    trackers.append(_start_tracker(name, folder(), config, done))
                    closing.callback(trackers[-1].finish)
            for number, values in _values(step).items():
                for tracker in trackers:
                    tracker.log(values, step=number)

        yield tell


def _start_tracker(name: str, folder: Path, config: Mapping[str, Any], done: int) -> Any:
    classes = need("accelerate.tracking", extra="train", what=_WHAT).LOGGER_TYPE_TO_CLASS
    with foreign(f"{_WHAT} {name}: the tracker can't start"):
        if name == "tensorboard":
            # A resumed run repeats steps that a killed one has reported already.
            tracker = classes[name]("tensorboard", folder, purge_step=done + 1 if done else None)
        else:
            tracker = classes[name]("lora-tree", name=f"run-{folder.name}", dir=str(folder))
        # Accelerate begins a tracker in `start` since 1.7, and before that in its constructor.
        if hasattr(tracker, "start"):
            tracker.start()
        if name == "wandb":
            tracker.store_init_configuration(dict(config))
        return tracker


def _values(step: StepLosses) -> dict[int, dict[str, float]]:
    """Return step → name → number; an evaluation has the step after which it was made."""
    values: dict[int, dict[str, float]] = {}
    for line in step.nodes:
        values.setdefault(line.step, {}).update(
            {
                f"loss/{line.node}": line.loss,
                f"grad_norm/{line.node}": line.grad_norm,
                f"learning_rate/{line.node}": line.lr,
                f"tokens/{line.node}": float(line.tokens),
            }
        )
    for measured in step.held_out:
        name = f"eval_loss/{measured.path or BASE_LABEL}"
        values.setdefault(measured.step, {})[name] = measured.loss
    return dict(sorted(values.items()))
