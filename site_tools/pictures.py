"""Make the pictures at the top of the README: ``make pictures``.

    lora-tree demo  ──▶  a real tree  ──show --svg──▶  docs/pictures/tree-light.svg, tree-dark.svg
                                      ──commands────▶  docs/pictures/terminal.svg

The demo trains for minutes; name a folder that it has written to take the pictures again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from terminal import run_in_terminal, session

from lora_tree.drawn import tree_picture

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
PROGRAMS = Path(sys.executable).parent
ZOO = "demo-zoo"
GENERATE = "--max-new-tokens 60 --prompt 'def '"
RECORDED = (
    f"lora-tree show {ZOO} --filter 'net*'",
    f"lora-tree generate {ZOO} net/asyncio {GENERATE}",
    f"lora-tree generate {ZOO} tables/cp {GENERATE}",
    f"lora-tree export {ZOO} net/asyncio --rank 8 --out for-peft",
    f"lora-tree export {ZOO} asyncio --out for-peft",
)
"""The commands of the session; the last one is wrong, so that a reader sees an error, too."""
DARK = {
    tree_picture.PAPER: "#0d1117",
    tree_picture.INK: "#e6edf3",
    tree_picture.QUIET: "#8b949e",
    tree_picture.GUIDE: "#484f58",
    tree_picture.STALE: "#d29922",
    tree_picture.BROKEN: "#f85149",
}
"""Each colour of a picture of a tree → the one on a dark page."""


def in_the_dark(picture: str) -> str:
    """Return a picture of a tree in the colours of a dark page."""
    for light, dark in DARK.items():
        picture = picture.replace(f'"{light}"', f'"{dark}"')
    return picture


def take(place: Path, programs: Path = PROGRAMS) -> dict[str, str]:
    """Return file name → picture, of the tree in ``place``."""
    # The picture is written by the command that the README names.
    run_in_terminal(f"lora-tree show {ZOO} --svg tree.svg", place, programs)
    tree = (place / "tree.svg").read_text(encoding="utf-8").replace(f"{place}/", "")
    (place / "tree.svg").unlink()
    recorded = session([run_in_terminal(command, place, programs) for command in RECORDED])
    return {
        "tree-light.svg": tree,
        "tree-dark.svg": in_the_dark(tree),
        "terminal.svg": recorded,
    }


def main() -> None:
    """Write the pictures of the demo's tree; an argument names the folder of the tree."""
    with tempfile.TemporaryDirectory() as made:
        place = Path(sys.argv[1] if len(sys.argv) > 1 else made).resolve()
        if not (place / ZOO).is_dir():
            subprocess.run([PROGRAMS / "lora-tree", "demo", ZOO], cwd=place, check=True)
        PICTURES.mkdir(exist_ok=True)
        for name, picture in take(place).items():
            (PICTURES / name).write_text(picture, encoding="utf-8")
            print(PICTURES / name)


if __name__ == "__main__":
    main()
