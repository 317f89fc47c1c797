"""The flags and environment variables of a vLLM server of a tree, written here and read here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...errors import LoraTreeError, SpecError
from ...export import ENGINE_RANKS, ceil_rank_of
from ...folder import Problem, survey
from ...folder.problem import HARMLESS
from ...storage import as_path
from ...tree import AdapterTree
from .client_names import NameRules

__all__ = ["DEFAULT_ERROR", "ZOO", "PluginSettings", "ServerArgs", "server_args"]

ZOO = "LORA_TREE_VLLM_ZOO"
CACHE = "LORA_TREE_VLLM_CACHE"
CACHE_BYTES = "LORA_TREE_VLLM_CACHE_BYTES"
MAX_RANK = "LORA_TREE_VLLM_MAX_RANK"
MAX_ERROR = "LORA_TREE_VLLM_MAX_ERROR"
POLL_S = "LORA_TREE_VLLM_POLL_S"
BLENDS = "LORA_TREE_VLLM_BLENDS"
ALLOW = "LORA_TREE_VLLM_ALLOW"
OUTSIDE = "LORA_TREE_VLLM_OUTSIDE"
LOG_REQUESTS = "LORA_TREE_VLLM_LOG_REQUESTS"

DEFAULT_BYTES = 10 << 30
DEFAULT_RANK = 16  # vLLM's own
DEFAULT_ERROR = 0.05
DEFAULT_POLL_S = 1.0

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class PluginSettings:
    """The plugin's settings, as its environment gives them."""

    zoo: str
    cache: str
    cache_bytes: int
    max_rank: int
    max_error: float
    poll_s: float
    names: NameRules
    outside: bool
    log_requests: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> PluginSettings:
        """Read the environment.

        Raises:
            SpecError: a variable is missing or makes no sense; names it.

        >>> PluginSettings.of({ZOO: "zoo", CACHE: "cache", ALLOW: "fr/** de"}).names.allow
        ('fr/**', 'de')
        """
        if not environment.get(CACHE):
            raise SpecError(f"{ZOO} is set, but {CACHE} is not", "lora-tree vllm-args prints both")
        allow = environment.get(ALLOW)
        patterns = None if allow is None else tuple(filter(None, re.split(r"[,\s]+", allow)))
        blends = _switch(environment, BLENDS)
        try:
            names = NameRules(blends=blends, allow=patterns)
        except SpecError as error:
            raise error.within(ALLOW) from None
        return cls(
            zoo=environment[ZOO],
            cache=environment[CACHE],
            cache_bytes=_number(environment, CACHE_BYTES, DEFAULT_BYTES, least=1),
            max_rank=_number(environment, MAX_RANK, DEFAULT_RANK, least=1),
            max_error=_number(environment, MAX_ERROR, DEFAULT_ERROR, least=0.0),
            poll_s=_number(environment, POLL_S, DEFAULT_POLL_S, least=0.01),
            names=names,
            outside=_switch(environment, OUTSIDE),
            log_requests=_switch(environment, LOG_REQUESTS),
        )


def _number(environment: Mapping[str, str], name: str, default: N, *, least: N) -> N:
    text = environment.get(name)
    if text is None:
        return default
    try:
        value = type(default)(text)
    except ValueError:
        value = None
    # It says `not >=` rather than `<`, so that NaN is refused as well.
    if value is None or not value >= least:
        raise SpecError(f"{name}={text!r}: expected a number, at least {least}")
    return value


def _switch(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name, "0").strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("", "0", "false", "no", "off"):
        return False
    raise SpecError(f"{name}={text!r}: expected 1 or 0")


# ---------------------------------------------------------------------- the start of a server
@dataclass(frozen=True)
class ServerArgs:
    """The flags and the environment that start a vLLM server of a tree.

    Args:
        flags: of ``vllm serve`` or ``python -m vllm.entrypoints.openai.api_server``.
        environment: for the same process.
        rank: the largest Σr of a path; paths over the flag's rank are recompressed.
        base: the tree's base, for ``--model``; None where the tree names none.
        unmatched: patterns of the list of allowed paths that no path of the tree fits.
        problems: nodes that can't be served as they are now, and why.
    """

    flags: tuple[str, ...]
    environment: Mapping[str, str]
    rank: int
    base: str | None = None
    unmatched: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def server_args(
    folder: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str],
    max_rank: int | None = None,
    max_error: float = DEFAULT_ERROR,
    max_loras: int = 8,
    cache_bytes: int = DEFAULT_BYTES,
    allow: Sequence[str] | None = None,
    blends: bool = False,
    outside: bool = False,
) -> ServerArgs:
    """Return the flags and the environment with which vLLM serves the paths of a tree; only headers
    are read.

    Args:
        folder: of the tree, or its tree.yaml.
        cache: a folder for flattened adapters, on a disk of the machine that serves.
        max_rank: the largest rank to serve; None: enough for every path, at most 512.
        max_error: refuse a path whose recompression to that rank loses more in a module.
        max_loras: the number of different paths that one batch may hold.
        cache_bytes: the most that the cache folder may hold.
        allow: the paths that clients may ask for, or patterns: ``fr/*``, ``fr/**``; every path
            without it.
        blends: let clients ask for blends, like ``fr/legal:0.5+fr/medical:0.5``.
        outside: serve adapters, too, that tree.yaml names outside of its folder.

    Raises:
        SpecError: a number or a pattern makes no sense.
        FolderError, FormatError: the tree can't be read.

    >>> import tempfile, torch
    >>> import lora_tree as lt
    >>> tree = lt.AdapterTree()
    >>> for path in ("fr", "fr/legal"):
    ...     value = lt.LowRank(torch.ones(12, 16), torch.ones(16, 12))
    ...     _ = tree.add(path, adapter=lt.Adapter({"up": value}))
    >>> with tempfile.TemporaryDirectory() as zoo:
    ...     tree.save(zoo)
    ...     made = server_args(zoo, cache="cache")
    >>> made.rank, made.flags[:3]
    (24, ('--enable-lora', '--max-lora-rank', '32'))
    """
    if max_loras < 1 or cache_bytes < 1:
        raise SpecError(
            f"max_loras and cache_bytes must be at least 1, got {max_loras} and {cache_bytes}"
        )
    if not max_error >= 0:
        raise SpecError(f"max_error must be at least 0, got {max_error}")
    rules = NameRules(blends=blends, allow=None if allow is None else tuple(allow))
    tree, problems = survey(folder, outside=outside)
    paths = [path for path in tree.paths() if rules.allows(path)]
    broken = _broken(tree, problems, rules, paths)
    # The server refuses a path through a broken node and serves the others, so the rank is that of
    # the others.
    usable = [path for path in paths if broken.keys().isdisjoint(tree.lineage(path))]
    rank = max((_rank(tree, path) for path in usable), default=1)
    allowed = ceil_rank_of(max_rank or min(max(rank, 1), ENGINE_RANKS[-1]))
    # vLLM keeps adapters that left a batch in host memory. With room for only as many as a batch
    # holds, it would read adapters from the disk whenever the batch changes.
    on_the_host = max(2 * max_loras, 16)
    flags = (
        *("--enable-lora", "--max-lora-rank", str(allowed)),
        *("--max-loras", str(max_loras), "--max-cpu-loras", str(on_the_host)),
    )
    environment = {
        # vLLM asks resolvers only if this is set; docs/export.md says what else it allows.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        # The paths are absolute, because the server may be started in another folder than this
        # command.
        ZOO: os.path.abspath(as_path(folder)),
        CACHE: os.path.abspath(as_path(cache)),
        CACHE_BYTES: str(cache_bytes),
        MAX_RANK: str(allowed),
        # `repr` keeps every bit of the number; a rounded bound could refuse a path that this one
        # allows.
        MAX_ERROR: repr(float(max_error)),
    }
    if rules.allow is not None:
        environment[ALLOW] = ",".join(rules.allow)
    if blends:
        environment[BLENDS] = "1"
    if outside:
        environment[OUTSIDE] = "1"
    unmatched = _unmatched(rules, paths)
    return ServerArgs(flags, environment, rank, tree.base, unmatched, tuple(broken.values()))


def _broken(
    tree: AdapterTree, problems: Sequence[Problem], rules: NameRules, paths: Sequence[str]
) -> dict[str, Problem]:
    """Return the nodes that keep an allowed path from being served, each with its first problem.

    The headers of the allowed paths' nodes are read: `survey` does not look into the files.

    Args:
        paths: the allowed paths of the tree.
    """
    needed: set[str] = set()
    for path in paths:
        needed.update(tree.lineage(path))
    broken: dict[str, Problem] = {}
    for problem in problems:
        if problem.kind in HARMLESS:
            continue
        # A node that can't be opened at all is in no lineage of the tree.
        if problem.node in needed or rules.allows(problem.node):
            broken.setdefault(problem.node, problem)
    for node in tree.paths():
        if node in needed and node not in broken:
            reason = _header_fault(tree, node)
            if reason is not None:
                broken[node] = Problem(node, "adapter", reason)
    return broken


def _header_fault(tree: AdapterTree, node: str) -> str | None:
    try:
        tree.outline(node)
    except LoraTreeError as error:
        return str(error)
    return None


def _unmatched(rules: NameRules, paths: list[str]) -> tuple[str, ...]:
    each = {pattern: NameRules(allow=(pattern,)) for pattern in rules.allow or ()}
    return tuple(pattern for pattern, rule in each.items() if not any(map(rule.allows, paths)))


def _rank(tree: AdapterTree, path: str) -> int:
    """Return the largest Σr of a module over a path's lineage."""
    total: dict[str, int] = {}
    for node in tree.lineage(path):
        outline = tree.outline(node)
        for name, r in outline.ranks.items() if outline is not None else ():
            total[name] = total.get(name, 0) + r
    return max(total.values(), default=1)
