"""lora_tree: LoRA adapters as a tree over one base model. `surface.py` is the map.

torch takes seconds to import. The first use of a name imports everything at once; until then
``lora-tree --version``, and a program that only looks whether the package is there, need not wait.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .surface import *  # noqa: F403 (the map has an __all__)
    from .surface import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":  # asked of every module by all kinds of tools
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    surface = importlib.import_module(".surface", __name__)
    for each in ("__all__", *surface.__all__):
        globals()[each] = getattr(surface, each)
    if name not in globals():  # a room that the import above has brought along is there by now
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    __getattr__("__all__")
    return sorted(globals())
