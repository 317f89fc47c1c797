"""Names and factors of an adapter as a base has them today.

An adapter names modules as the transformers did that trained it. Since then language models have
moved (``language_model.model.layers…`` is ``model.language_model.layers…`` now), and the experts of
a layer became one parameter. transformers renames a checkpoint when it loads one, by a mapping of
its own. The same mapping renames adapters here, so nothing below knows an architecture.

    bound.py         Renaming: an adapter in the names of one base
    renamed.py       one adapter on its way: each value to its name of today
    conversion.py    several modules that became one parameter, by transformers' own operation
    loading.py       transformers' mapping, behind one class

Law: a name that the base has is left alone, and two names that become one are one module whose
increments add up. Every room that needs an adapter in a base's names calls `Renaming.bound`, over
a loaded base as over a skeleton, with factors as with their outlines.
"""

from ..storage import install_names
from .bound import Renaming
from .loading import Loading, loading_module

__all__ = ["Loading", "Renaming", "loading_module"]

install_names(Renaming)
