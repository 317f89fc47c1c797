"""The same adapters in polylora, whose Triton kernels add up a mixed batch.

polylora is not a dependency. If it is installed (`pip install polylora`), its rows appear in the
tables of `benchmarks gpu`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import lora_tree as lt

__all__ = ["is_installed", "with_polylora"]


def is_installed() -> bool:
    """Return whether polylora can be imported."""
    return importlib.util.find_spec("polylora") is not None


def with_polylora(model: Any, adapters: lt.AdapterTree, folder: Path) -> Any:
    """Return a base whose Linears polylora has replaced, with every node of a tree as an adapter.

    It is called with ``adapter_ids=``, a path for each row.

    Args:
        model: the base, which can't be used without polylora afterwards.
        adapters: each node becomes one adapter, without its ancestors.
        folder: where the adapters are saved for polylora to read.
    """
    import polylora  # type: ignore[import-not-found]

    adapters.save(folder)
    ranks, modules = [], set()
    for path in adapters.paths():
        adapter = adapters.adapter(path)
        assert adapter is not None
        for name, value in adapter.modules.items():
            ranks.append(value.rank)
            modules.add(name.rpartition(".")[2])
    config = polylora.PolyLoraConfig(
        max_gpu_adapters=len(adapters.paths()),
        max_rank=max(ranks),
        target_modules=sorted(modules),
    )
    wrapped = polylora.PolyLoraModel(model, config).eval()
    for path in adapters.paths():
        wrapped.load_adapter_from_disk(path, str(folder / path))
    return wrapped
