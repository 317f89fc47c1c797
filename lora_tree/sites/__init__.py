"""The kinds of sites, and the search for the site that a name in an adapter means.

    site.py      the contract of a kind, and everything that a kind inherits
    finding.py   KINDS, and the site of a name
    targets.py   the modules that a fresh adapter changes
    replaced.py  the tensors that a fresh adapter replaces
    ways.py      checks in one pass whether a base still has some sites
    linear.py, conv.py, embedding.py, attention.py, parameter.py     one kind of layer each

A new kind of layer is one file beside these and one row in `KINDS`. The kind defines its layout,
its shape and how a delta is added. Finding, targeting, fresh factors, merging, side paths and
routes use only this interface, and know no kind by name.
"""

from .finding import (
    as_site_has_it,
    experts_around,
    find_site,
    find_tensor_site,
    is_there,
    takes_delta,
    weight_names,
    with_tied_rows,
)
from .parameter import ParameterSite
from .site import Site
from .ways import Ways

__all__ = [
    "ParameterSite",
    "Site",
    "Ways",
    "as_site_has_it",
    "experts_around",
    "find_site",
    "find_tensor_site",
    "is_there",
    "takes_delta",
    "weight_names",
    "with_tied_rows",
]
