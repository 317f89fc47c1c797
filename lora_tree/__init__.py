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
    # Tools ask every module for such names. That is no reason to import torch.
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    surface = importlib.import_module(".surface", __name__)
    for each in ("__all__", *surface.__all__):
        globals()[each] = getattr(surface, each)
    # The import above also binds the subpackages: `lora_tree.folder` is found here.
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    __getattr__("__all__")
    return sorted(globals())
