"""Rename an adapter's modules to the names that a base has today, and convert its factors.

An adapter has the module names of the transformers version that trained it. Since then language
models have moved (``language_model.model.layers…`` is ``model.language_model.layers…`` now), and
the experts of a layer became one parameter. When transformers loads a checkpoint, it renames the
tensors by its own mapping. The same mapping renames adapters here, so nothing in this room knows an
architecture.

    bound.py         Renaming: an adapter in the names of one base
    renamed.py       moves each value of one adapter to its present name
    conversion.py    several modules that became one parameter, by transformers' own operation
    loading.py       transformers' mapping, behind one class

Law: a name that the base has is left alone. If two names become one, their increments are added.
Every room that needs an adapter in a base's names calls `Renaming.bound`; it works for loaded bases
and for skeletons on the meta device, with factors and with outlines.
"""

from ..storage import install_names
from .bound import Renaming
from .loading import Loading, loading_module

__all__ = ["Loading", "Renaming", "loading_module"]

install_names(Renaming)
