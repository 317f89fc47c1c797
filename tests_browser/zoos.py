"""Trees for the browser tests: a small one with everything to see, and one of many nodes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import lora_tree as lt

__all__ = ["EVIL", "large_facts", "losses", "small_zoo"]

EVIL = "<img src=x onerror=window.evil=1>"
"""Text that would run if it became markup."""


def adapter(seed: int, *, like: int = 0, layers: int = 4, rank: int = 4) -> lt.Adapter:
    """Return an adapter with half of another one's increments in it."""
    modules = {}
    for layer in range(layers):
        for i, kind in enumerate(("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")):
            draw = torch.Generator().manual_seed(1000 * like + 10 * layer + i)
            own = torch.Generator().manual_seed(100_000 + 1000 * seed + 10 * layer + i)
            A = torch.randn(rank, 32, generator=draw) + torch.randn(rank, 32, generator=own) / 2
            B = torch.randn(32, rank, generator=draw) + torch.randn(32, rank, generator=own) / 2
            scale = 0.02 * (1 + layer) * (1 + i)
            modules[f"model.layers.{layer}.{kind}"] = lt.LowRank(A, B, scale=scale)
    return lt.Adapter(modules)


def small_zoo(folder: Path) -> Path:
    """Write a tree with stale and broken nodes, earlier versions, and names that are markup."""
    tree = lt.AdapterTree(base=EVIL)
    for i, path in enumerate(
        ("fr", "fr/legal", "fr/legal/acme", "fr/medical", "de", "de/legal", "de/medical", "ja")
    ):
        tree.add(path, adapter=adapter(i, like=len(path.split("/")[0]) + path.count("legal")))
    tree.save(folder)
    tree.update("fr", adapter=adapter(50, like=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.StaleWarning)
        tree.save(folder, note=lt.SaveNote(by=EVIL))
    whole = folder / "ja" / "adapter_model.safetensors"
    whole.write_bytes(whole.read_bytes()[:100])
    return folder


def losses(file: Path) -> Path:
    """Write losses as ``lora-tree eval --json`` prints them."""
    paths = ["", "fr", "fr/legal", "de"]
    table = {}
    for i, path in enumerate(paths):
        row = {}
        for j, domain in enumerate(("fr/legal", "de", EVIL)):
            row[domain] = 2.5 - 0.3 * (i > 0) - 0.2 * (path == domain) + 0.05 * j
        table[path] = row
    file.write_text(json.dumps({"unit": "nats per token", "losses": table, "tokens": {}}))
    return file


def large_facts(folder: Path, nodes: int) -> dict[str, Any]:
    """Return the facts of a tree of so many very small nodes: languages, domains, customers.

    A hundred nodes are written and read; the others are these under other names, because to write
    ten thousand takes minutes.
    """
    tree = lt.AdapterTree(base="org/model")
    name = "model.layers.0.self_attn.q_proj"
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        A, B = torch.randn(1, 8, generator=draw), torch.randn(8, 1, generator=draw)
        tree.add(f"n{seed}", adapter=lt.Adapter({name: lt.LowRank(A, B)}))
    tree.save(folder)
    facts = lt.explore_facts(folder).as_dict()
    few, norms = facts["nodes"], facts["norms"]
    many, many_norms = [], {}
    for path in islice(_paths(), nodes):
        node = few[len(many) % len(few)]
        many.append({**node, "path": path})
        many_norms[path] = norms[node["path"]]
    return {**facts, "nodes": many, "norms": many_norms}


def _paths() -> Iterator[str]:
    for language in range(40):
        yield f"lang{language:02}"
        for domain in range(25):
            yield f"lang{language:02}/domain{domain:02}"
            for customer in range(20):
                yield f"lang{language:02}/domain{domain:02}/customer{customer:02}"
