"""Export every leaf of a tree as a portable adapter, several in parallel.

    out/fr/legal   out/fr/medical   out/de      each leaf in a folder of its own path

Law: a leaf's bytes equal those that `portable` gives for it alone, whatever the order and the
number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..adapter import Adapter
from ..errors import LoraTreeError, SpecError, agreeing, listing, plural
from ..storage import as_path
from ..tree import AdapterTree
from .portable import Portable, portable

__all__ = ["export_leaves"]


def export_leaves(
    tree: AdapterTree,
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    max_error: float | None = None,
    ceil_rank: bool = False,
    dtype: torch.dtype | None = None,
    base: nn.Module | str | os.PathLike[str] | None = None,
    complete: bool = False,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    workers: int | None = None,
    progress: Callable[[Portable, int, int], None] | None = None,
) -> list[Portable]:
    """Write every leaf that has something to export as ``folder/<path>``, each whole or not at all.

    Args:
        rank, max_error, ceil_rank, dtype, base, complete, shapes: as `portable`.
        workers: the number of threads; None: one per core, at most 4. Each holds one leaf in
            memory.
        progress: called for each leaf once it is written, in the tree's order, with the number of
            leaves done and the number of all.

    Returns:
        the adapters that were written, in the tree's order, with factors on the meta device.

    Raises:
        LoraTreeError: as `portable`, at the first leaf that fails; those written before it stay,
            and the error names them.

    >>> import tempfile, torch
    >>> import lora_tree as lt
    >>> tree = lt.AdapterTree()
    >>> for path in ("fr", "fr/legal", "fr/medical"):
    ...     value = lt.LowRank(torch.ones(2, 4), torch.ones(4, 2))
    ...     _ = tree.add(path, adapter=lt.Adapter({"up": value}))
    >>> with tempfile.TemporaryDirectory() as out:
    ...     written = lt.export_leaves(tree, out, ceil_rank=True)
    ...     [(one.path, one.rank) for one in written], lt.Adapter.load(f"{out}/fr/legal").ranks
    ([('fr/legal', 8), ('fr/medical', 8)], {'up': 8})
    """
    if workers is not None and workers < 1:
        raise SpecError(
            f"workers must be at least 1, got {workers}", "leave workers out, or give a number"
        )
    out = as_path(folder)
    leaves = [path for path in tree.leaves() if _has_adapter(tree, path)]
    if not leaves:
        raise SpecError(
            "the tree has no leaf with something to export",
            "add adapters first, or train the fresh ones",
        )
    _open_shared(tree, leaves)
    written: list[str] = []

    def one(path: str) -> Portable:
        # A tree object per leaf: the nodes that it reads are freed with it.
        made = portable(
            _same_nodes(tree),
            path,
            rank=rank,
            max_error=max_error,
            ceil_rank=ceil_rank,
            dtype=dtype,
            base=base,
            complete=complete,
            shapes=shapes,
        )
        made.save(out / path)
        written.append(path)
        # The factors are on the disk now. To keep those of a thousand leaves would fill the memory.
        return replace(made, adapter=_without_factors(made.adapter))

    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        jobs = {path: pool.submit(one, path) for path in leaves}
        try:
            done: list[Portable] = []
            for job in jobs.values():
                done.append(job.result())
                if progress is not None:
                    progress(done[-1], len(done), len(leaves))
        except BaseException as error:
            # On Ctrl-C too: cancel the leaves that have not begun and wait for the running ones, so
            # that each is written whole or not at all.
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, LoraTreeError):
                # Only now is the list complete: other threads may have written leaves after this
                # one failed.
                raise error.advised(_written_text(written, leaves, out)) from error
            raise
    return done


def _written_text(written: Sequence[str], leaves: Sequence[str], out: Path) -> str:
    """Say which leaves are on the disk although the export failed."""
    if not written:
        return f"nothing was written in {out}"
    stay = [path for path in leaves if path in set(written)]  # in the tree's order
    leaves_in_all = plural(len(leaves), "leaf", "leaves")
    were, stays = agreeing(len(stay), "was", "were"), agreeing(len(stay), "is kept", "are kept")
    return f"{len(stay)} of {leaves_in_all} {were} written in {out}, and {stays}: {listing(stay)}"


def _has_adapter(tree: AdapterTree, path: str) -> bool:
    return any(tree[node].has_adapter for node in tree.lineage(path))


def _open_shared(tree: AdapterTree, leaves: Sequence[str]) -> None:
    """Read the nodes above the leaves once, before the threads ask for them."""
    above: set[str] = set()
    for path in leaves:
        above.update(tree.lineage(path)[:-1])
    for node in tree.paths():
        if node in above:
            tree.adapter(node)


def _same_nodes(tree: AdapterTree) -> AdapterTree:
    """Return a copy of the tree, so that adapters read here are not kept in the caller's.

    They are freed with the copy, so at most ``workers`` leaves are in memory.
    """
    return AdapterTree.from_nodes(
        (tree[path] for path in tree.paths()), base=tree.base, home=tree.home
    )


def _without_factors(adapter: Adapter) -> Adapter:
    return adapter.map(lambda value: value.to(device="meta"))
