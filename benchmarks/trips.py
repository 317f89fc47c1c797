"""The trip of one call through the code: its function calls, and its changes of file.

    calls    functions of the package that ran
    moves    calls whose file differs from that of the call before: a reader opens another file

Counted with `sys.setprofile` on a model of two linear sites under a tree a, a/b, a/c, d; no time is
taken, so the numbers are the same on every machine. Run it with ``python -m benchmarks.trips``;
``--calls`` prints every call.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import lora_tree as lt

__all__ = ["Trip", "trips"]

PACKAGE = f"{Path(lt.__file__).parent}/"
ROWS = ["a/b", "", "a/c", "d"]


@dataclass(frozen=True)
class Trip:
    """The calls of one trip, in order: (file, function)."""

    name: str
    calls: Sequence[tuple[str, str]]

    @property
    def moves(self) -> int:
        """The number of calls in another file than the call before."""
        files = [file for file, _ in self.calls]
        return sum(here != there for here, there in pairwise(files))


def trips() -> list[Trip]:
    """Return the four trips, on one model; a path has its plan before it first runs unmerged."""
    x = torch.zeros(4, 5)
    model = _model()
    model.activate("a/b")
    model.activate("d")
    merged = _followed("activate merged, a path seen before", lambda: model.activate("a/b"))

    beside = _followed("activate unmerged, first", lambda: model.activate("a/b", mode="unmerged"))

    model.base(x)  # the first forward checks that every side path runs
    forward = _followed("forward unmerged, again", lambda: model.base(x))

    model.deactivate()
    _routed(model, x)
    routed = _followed("route of four rows and a forward, again", lambda: _routed(model, x))
    return [merged, beside, routed, forward]


def _model() -> lt.TreeModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).requires_grad_(False)
    tree = lt.AdapterTree()
    for path in ("a", "a/b", "a/c", "d"):
        values = {
            "0": lt.LowRank(torch.randn(2, 5), torch.randn(6, 2)),
            "2": lt.LowRank(torch.randn(2, 6), torch.randn(4, 2)),
        }
        tree.add(path, adapter=lt.Adapter(values))
    return lt.attach(tree, base)


def _routed(model: lt.TreeModel, x: torch.Tensor) -> None:
    with model.route(ROWS):
        model.base(x)


def _followed(name: str, act: Callable[[], object]) -> Trip:
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            calls.append((file.removeprefix(PACKAGE), frame.f_code.co_name))

    # A garbage collection within the trip would run finalizers of earlier models and count them.
    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
        gc.enable()
    return Trip(name, calls)


def main(arguments: Sequence[str]) -> None:
    """Print a line for each trip; with ``--calls`` all calls, with ``--files`` counts by file."""
    for trip in trips():
        print(f"{trip.name:42} {len(trip.calls):4} calls {trip.moves:4} moves")
        if "--files" in arguments:
            for file, count in Counter(file for file, _ in trip.calls).most_common():
                print(f"    {count:4} {file}")
        if "--calls" in arguments:
            for file, function in trip.calls:
                print(f"    {file:28} {function}")


if __name__ == "__main__":
    main(sys.argv[1:])
