"""Find the modules that read the weights of a plan's sites.

A linear layer reads its own weight when it is called, so a hook on it sees every use. The weights
of fused experts, other raw parameters and the projections of `nn.MultiheadAttention` are read by
the forward of a module around them, and that forward has to be watched (`inside.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...sites import Site, experts_around

__all__ = ["Reader", "Readers", "is_around", "readers_of"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A module whose forward is watched.

    Args:
        name: its dotted name.
        module: the module.
    """

    name: str
    module: nn.Module

    def token_axes(self, x: Tensor) -> Sequence[int] | None:
        """Return the sizes of the axes that might be an input's rows, as `Site.token_axes`."""
        return x.shape[1:-1] if x.ndim > 1 else x.shape


@dataclass(frozen=True)
class Readers:
    """The modules that read the weights of a plan's sites.

    Args:
        watched: the modules whose forwards have to be watched, and the sites whose weights they
            read.
        called: the names of the sites whose own modules are called, so that a hook finds them.
    """

    watched: Mapping[str, Sequence[Site]]
    called: frozenset[str]


def readers_of(base: nn.Module, sites: Collection[Site], is_routed: bool) -> Readers:
    """Return the modules that read the weights of some sites.

    Args:
        base: the model.
        sites: of a plan.
        is_routed: rows go by different paths, so that they have to be followed into modules of
            experts.
    """
    reader_names = {site: site.reader_names for site in sites}
    watched: dict[str, list[Site]] = {}
    called: set[str] = set()
    for site, names in reader_names.items():
        if not names:
            called.add(site.name)
        if is_routed and not names:
            around = experts_around(base, site.name)
            names = () if around is None else (around,)
        for name in names:
            watched[name] = []
    for site, names in reader_names.items():
        for name, read in watched.items() if names else ():
            # A forward may run within another; the outer one then watches for both.
            if any(is_around(name, reader) for reader in names):
                read.append(site)
    return Readers(watched, frozenset(called))


def is_around(module: str, name: str) -> bool:
    """Return whether a name belongs to the module or to something in it."""
    return not module or f"{name}.".startswith(f"{module}.")
