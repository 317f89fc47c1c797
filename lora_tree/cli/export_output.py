"""Print the outcome of an export: one line for a person, JSON for a program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..errors import plural
from ..export import MergedCheckpoint, Portable
from ..export.siblings import without_v
from .console import out, print_json

__all__ = ["plain_portable", "tell_files", "tell_flat", "tell_merged", "tell_portable"]


def tell_portable(one: Portable, where: str, *, per_module: bool) -> None:
    """Print the line of a portable adapter, and with ``per_module`` a line for each module."""
    zeros = f" ({len(one.added)} of them zeros)" if one.added else ""
    modules = f"{plural(len(one.adapter), 'module')}{zeros}"
    _say(f"{one.path} → {where}: {modules}, r={one.rank}, {_cost(one)}{_incomplete_note(one)}")
    if per_module:
        for name, error in one.errors.items():
            _say(f"  {error:.2e}  {name}")


def plain_portable(one: Portable, where: str) -> dict[str, Any]:
    """Return the JSON value of a portable adapter."""
    return {
        "path": one.path,
        "out": where,
        "as": "portable",
        "modules": len(one.adapter),
        "rank": one.rank,
        "parameters": one.adapter.numel,
        "bytes": one.adapter.nbytes,
        "error": one.error,
        "worst": one.worst,
        "errors": dict(one.errors),
        "added": list(one.added),
        "incomplete": list(one.incomplete),
    }


def tell_flat(
    path: str, to: str, flat: Adapter, kind: str, dtype: str | None, *, as_json: bool
) -> None:
    """Print the modules of an adapter written with its own ranks."""
    ranks = sorted(set(flat.ranks.values()))
    if as_json:
        print_json(
            {
                "path": path,
                "out": to,
                "as": kind,
                "modules": len(flat),
                "ranks": ranks,
                "parameters": flat.numel,
                "bytes": flat.nbytes,
                "error": flat.error,  # of the truncation
                "dtype": dtype,
                "rounded": bool(flat.rounded),
            }
        )
        return
    ranks_text = "/".join(map(str, ranks)) or "-"
    modules = plural(len(flat), "module")
    _say(f"{path} → {to}: {modules}, r={ranks_text}, {_exactness(flat, dtype)}")


def tell_files(files: Sequence[Path], *, as_json: bool) -> None:
    """Print the files that were written, by the numbers that llama.cpp gives them."""
    if as_json:
        print_json({"files": [str(file) for file in files]})
        return
    for number, file in enumerate(files):
        _say(f"{number}  {file}")


def tell_merged(made: MergedCheckpoint, path: str, *, as_json: bool) -> None:
    """Print the files of a merged checkpoint."""
    if as_json:
        print_json(
            {
                "path": path,
                "out": str(made.folder),
                "as": "model",
                "changed": list(made.changed),
                "bytes": made.nbytes,
                "left_out": list(made.left_out),
            }
        )
        return
    left = f"; left out: {', '.join(made.left_out)}" if made.left_out else ""
    changed = f"{plural(len(made.changed), 'tensor')} changed, {made.nbytes:,} bytes{left}"
    _say(f"{path or 'the bare base'} → {made.folder}: {changed}")


def _say(line: str) -> None:
    out().print(line, soft_wrap=True)


def _incomplete_note(one: Portable) -> str:
    """Return a note about the members of q/k/v and gate/up that no node changes."""
    if not one.incomplete:
        return ""
    kinds = sorted({name.rpartition(".")[2] for name in one.incomplete})
    words = f"; no node changes {', '.join(kinds)}: left as they are"
    # Said only where it matters: SGLang refuses q_proj without v_proj, other engines take both.
    if without_v(one.adapter.modules):
        words += " (SGLang needs v_proj where q_proj is: --complete adds zeros)"
    return words


def _cost(one: Portable) -> str:
    # `portable` gives exactly zero where nothing was cut or rounded, so no tolerance is wanted:
    # with one, a small loss would be called exact.
    if one.worst == 0.0:
        return "exact"
    worst = max(one.errors, key=lambda name: one.errors[name])
    return f"relative error {one.error:.2g} in total, at most {one.worst:.2g} in a module ({worst})"


def _exactness(flat: Adapter, dtype: str | None) -> str:
    words = []
    if flat.errors:
        words.append(f"relative error at most {flat.error:.2g} in a module")
    if flat.rounded:
        # Rounding comes after truncation, so its error is not in the number before it.
        words.append(f"then rounded to {dtype}" if words else f"rounded to {dtype}")
    return ", ".join(words) or "exact"
