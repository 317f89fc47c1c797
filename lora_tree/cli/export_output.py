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


def tell_portable(portable: Portable, where: str, *, per_module: bool) -> None:
    """Print the line of a portable adapter, and with ``per_module`` a line for each module."""
    zeros = f" ({len(portable.added)} of them zeros)" if portable.added else ""
    modules = f"{plural(len(portable.adapter), 'module')}{zeros}"
    quality = f"{_cost(portable)}{_incomplete_note(portable)}"
    _say(f"{portable.path} → {where}: {modules}, r={portable.rank}, {quality}")
    if per_module:
        for name, error in portable.errors.items():
            _say(f"  {error:.2e}  {name}")


def plain_portable(portable: Portable, where: str) -> dict[str, Any]:
    """Return the JSON value of a portable adapter."""
    return {
        "path": portable.path,
        "out": where,
        "as": "portable",
        "modules": len(portable.adapter),
        "rank": portable.rank,
        "parameters": portable.adapter.numel,
        "bytes": portable.adapter.nbytes,
        "error": portable.error,
        "worst": portable.worst,
        "errors": dict(portable.errors),
        "added": list(portable.added),
        "incomplete": list(portable.incomplete),
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


def _incomplete_note(portable: Portable) -> str:
    """Return a note about the members of q/k/v and gate/up that no node changes."""
    if not portable.incomplete:
        return ""
    kinds = sorted({name.rpartition(".")[2] for name in portable.incomplete})
    words = f"; no node changes {', '.join(kinds)}: left as they are"
    # Said only where it matters: SGLang refuses q_proj without v_proj, other engines take both.
    if without_v(portable.adapter.modules):
        words += " (SGLang needs v_proj where q_proj is: --complete adds zeros)"
    return words


def _cost(portable: Portable) -> str:
    # `portable` gives exactly zero where nothing was cut or rounded, so no tolerance is wanted:
    # with one, a small loss would be called exact.
    if portable.worst == 0.0:
        return "exact"
    worst = max(portable.errors, key=lambda name: portable.errors[name])
    at_most = f"at most {portable.worst:.2g} in a module ({worst})"
    return f"relative error {portable.error:.2g} in total, {at_most}"


def _exactness(flat: Adapter, dtype: str | None) -> str:
    words = []
    if flat.errors:
        words.append(f"relative error at most {flat.error:.2g} in a module")
    if flat.rounded:
        # Rounding comes after truncation, so its error is not in the number before it.
        words.append(f"then rounded to {dtype}" if words else f"rounded to {dtype}")
    return ", ".join(words) or "exact"
