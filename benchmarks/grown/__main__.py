"""``python -m benchmarks.grown FOLDER``: train adapters, shrink them by each method, compare."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console

import lora_tree as lt

from .measure import held_out_bits, input_moments, relative_error
from .methods import Method, flat_bytes, methods
from .tables import Point, markdown
from .zoo import Kind, Leaf, ZooSize, opened_base, opened_zoo, texts

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
SIZES = {64: ZooSize(64), 500: ZooSize(500, rows=48, windows=2)}
SMALL = ZooSize(
    6, hidden=32, layers=1, base_steps=2, rows=4, batch=4, length=32, windows=1, ranks=(1, 1, 1)
)


@dataclass(frozen=True)
class Zoo:
    """Adapters, the base under them and the texts that they were trained on."""

    folder: Path
    base: Any
    leaves: list[Leaf]
    methods: Mapping[str, Method]

    def measured(self, method: str, part: float) -> Point:
        """Shrink the adapters to a part of their bytes, and measure the result."""
        flat = lt.load(self.folder)
        whole = flat_bytes(flat)
        made = self.methods[method](self.folder, int(part * whole))
        if made is None:
            return Point(method, part)
        error = relative_error(made.adapters, flat)
        bits = held_out_bits(self.base, made.adapters, self.leaves)
        return Point(method, part, made.nbytes / whole, error, bits, made.cpu_s)

    def unshrunk(self) -> tuple[float, float]:
        """Return the held-out bits of the bare base, and of the unchanged adapters."""
        flat = lt.load(self.folder)
        whole = {path: flat.flatten(path) for path in flat.paths()}
        bare = {path: lt.Adapter({}) for path in whole}
        bits = held_out_bits(self.base, bare, self.leaves)
        return bits, held_out_bits(self.base, whole, self.leaves)


def main(
    folder: Annotated[Path, typer.Argument(help="Keeps what is trained and measured.")],
    kinds: Annotated[list[Kind] | None, typer.Option("--kind", help="Both without it.")] = None,
    counts: Annotated[
        list[int] | None, typer.Option("--count", help="Adapters: 64, 500; both without it.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="A toy size: that it runs, not what comes out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The figures, and no tables.")] = False,
) -> None:
    """Shrink many trained adapters to the same bytes by several methods, and compare them."""
    transformers.utils.logging.disable_progress_bar()
    console = Console(stderr=True, highlight=False)
    sizes = [SMALL] if small else [SIZES[count] for count in counts or SIZES]
    found = {}
    for size in sizes:
        for kind in kinds or list(Kind):
            title = f"{size.leaves} adapters, {kind}"
            points = _all_points(folder, size, kind, lambda text: console.print(text))
            found[title] = points
            if not as_json:
                sys.stdout.write(f"\n### {title}\n\n{markdown(points)}")
                sys.stdout.flush()
    if as_json:
        plain = {title: [asdict(point) for point in points] for title, points in found.items()}
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")


def _all_points(
    folder: Path, size: ZooSize, kind: Kind, say: Callable[[str], object]
) -> list[Point]:
    """Return every method's figures at every budget; figures in the folder are reused."""
    leaves = texts(size)
    base = opened_base(folder / f"base-{size.hidden}", size)
    zoo = folder / f"{kind}-{size.leaves}"
    say(f"{zoo}: {len(leaves)} adapters")
    opened_zoo(zoo, kind, base, leaves, size)
    file = folder / f"{kind}-{size.leaves}.json"
    points: list[Point] = []
    if file.is_file():
        points = [Point(**each) for each in json.loads(file.read_text())]
    done = {(point.method, point.budget) for point in points}
    modules = lt.load(zoo).flatten(leaves[0].name).modules
    moments = input_moments(base, modules, leaves, size.length)
    here = Zoo(zoo, base, leaves, methods(moments))
    if not done:
        bare, whole = here.unshrunk()
        points = [Point("base", 0.0, 0.0, 1.0, bare), Point("flat", 1.0, 1.0, 0.0, whole)]
    for part in BUDGETS:
        for method in here.methods:
            missing = method in ("vlora", "lorashare") and not importlib.util.find_spec(method)
            if missing or (method, part) in done:
                continue
            point = here.measured(method, part)
            say(f"{zoo.name}: {point}")
            points.append(point)
            # Written after each figure, so that an interrupted command resumes there.
            file.write_text(json.dumps([asdict(each) for each in points], indent=1))
    return points


if __name__ == "__main__":
    typer.run(main)
