"""Every error this library raises, in one tree.

    LoraTreeError
    ├── SpecError               a tree.yaml, a lock or an argument makes no sense
    │   └── NewerFormat         a newer lora_tree wrote the file, in a format unknown to this one
    ├── PathError               a path or a blend names no node of the tree, or is no valid name
    ├── TreeError               the change asked of the tree can't be made
    ├── ShapeMismatch           two values differ in (out, in), or two factors do not multiply
    ├── FormatError             the files of an adapter are broken or incomplete
    │   └── UnsupportedAdapter  the files are whole, but their kind does not add up to W + B·A
    ├── FolderError             a folder of adapters can't be read or written as a tree
    │   ├── StaleError          a node's lineage has changed since it was trained
    │   └── UnlockedError       a node's files are not those of tree.lock
    ├── HubError                the model hub lacks it, refuses it, or can't be asked
    ├── BaseMismatch            the adapter names a module that this base lacks or has otherwise
    │   ├── TiedWeights         a weight to be merged is used by a second module
    │   ├── MergedOnly          the site can be changed merged, but was asked for unmerged
    │   └── UnmergedOnly        the site can be changed unmerged, but was asked for merged
    ├── StateError              the call does not fit the present state of the model
    │   └── ForeignWrite        other code wrote to a weight that a path is merged into
    ├── DivergedError           training made a factor or a loss that is not finite
    ├── BudgetError             the adapters in use at once do not fit into the budget
    └── MissingExtra            an optional package is needed and not installed

The first line of a message says what failed and where (node, module, file, line), with the value
found and the one expected; the lines after it say what to do.

Law: a name in a message can't control the terminal. Names and keys come out of files that strangers
wrote, and a terminal obeys control characters instead of showing them. They are escaped here, once,
for every error and warning.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BaseMismatch",
    "BudgetError",
    "DivergedError",
    "FolderError",
    "ForeignWrite",
    "FormatError",
    "HubError",
    "LoraTreeError",
    "LoraTreeWarning",
    "MergedOnly",
    "MissingExtra",
    "NewerFormat",
    "PathError",
    "ShapeMismatch",
    "SpecError",
    "StaleError",
    "StateError",
    "TiedWeights",
    "TreeError",
    "UnlockedError",
    "UnmergedOnly",
    "UnsupportedAdapter",
    "agreeing",
    "listing",
    "nearest",
    "plural",
    "printable",
    "suggest",
    "suggest_path",
]

MOST_CHARACTERS = 4000
"""The most characters in a line of a message; longer lines are cut."""
_MOST_SUGGESTED = 1000
_MOST_MEANT = 3
"""The most paths that one error suggests."""


def printable(text: str, *, keep: str = "") -> str:
    """Return ``text`` with every character escaped that is neither visible nor a space.

    Control characters drive a terminal: they write to its clipboard, move its cursor, hide text.
    Characters that turn the direction of text make it appear in another order than it has. Both are
    shown as Python's escapes.

    Args:
        keep: characters that stay as they are: ``"\\n"`` where lines are meant.

    >>> printable("org/model\\x1b]52;c;cm0gLXJm\\a")
    'org/model\\\\x1b]52;c;cm0gLXJm\\\\x07'
    """
    if text.isprintable():  # nearly every message
        return text
    shown = []
    for sign in text:
        visible = sign.isprintable() or sign in keep
        shown.append(sign if visible else sign.encode("unicode_escape").decode("ascii"))
    return "".join(shown)


def _line(text: str) -> str:
    """Return one line of a message: printable, and cut in the middle if it is very long."""
    # Cut before it is escaped: escaping goes over every character, and a stranger's name may be as
    # long as the file that it comes from.
    if len(text) > MOST_CHARACTERS:
        # In the middle: the place stands at the beginning, got and expected at the end.
        half = MOST_CHARACTERS // 2
        text = f"{text[:half]}… ({plural(len(text), 'character')}) …{text[-half:]}"
    return printable(text)


class LoraTreeError(Exception):
    """The root: ``except LoraTreeError`` catches everything that this library raises on purpose.

    Args:
        what: the first line: what failed, where, got and expected.
        todo: lines that say what to do about it.
    """

    def __init__(self, what: str, *todo: str) -> None:
        self.what = _line(what)
        self.todo = tuple(_line(line) for line in todo)
        super().__init__("\n  ".join((self.what, *self.todo)))

    def within(self, where: str) -> LoraTreeError:
        """Return the same error with ``where`` (a node, a file) put before its first line."""
        # Callers on the way out add what they know, and two of them may know the same.
        what = self.what if self.what.startswith(f"{where}: ") else f"{where}: {self.what}"
        # The same type, so that a caller who catches it still does. Every subclass is made of
        # these two arguments alone.
        return type(self)(what, *self.todo)

    def advised(self, *todo: str) -> LoraTreeError:
        """Return the same error with further lines of advice at its end."""
        return type(self)(self.what, *self.todo, *todo)


class LoraTreeWarning(UserWarning):
    """The root of the warnings whose text holds names out of files.

    Args:
        what, todo: as for `LoraTreeError`.
    """

    def __init__(self, what: str, *todo: str) -> None:
        super().__init__("\n  ".join(_line(line) for line in (what, *todo)))


# Each error also derives from one of Python's own, so that code which does not know this library
# catches it with ``except ValueError`` and so on.
class SpecError(LoraTreeError, ValueError):
    """A tree.yaml, a lock or an argument says something that makes no sense."""


class NewerFormat(SpecError):
    """A newer lora_tree wrote the file, in a format unknown to this one; upgrade to read it."""


# LookupError and not KeyError: str() of a KeyError is a repr, which would show the lines of a
# message as one, with \n between them.
class PathError(LoraTreeError, LookupError):
    """A path or a blend names a node that the tree does not have, or is not a valid name."""


class TreeError(LoraTreeError, ValueError):
    """The change asked of the tree can't be made: the node exists, has children, is in use."""


class ShapeMismatch(LoraTreeError, ValueError):
    """Two values do not have the same (out, in), or two factors do not multiply."""


class FormatError(LoraTreeError, ValueError):
    """The files of an adapter are broken, incomplete or not what their config says."""


class UnsupportedAdapter(FormatError):
    """An adapter of a kind that does not add up to W + B·A (DoRA, OFT, …)."""


class FolderError(LoraTreeError, OSError):
    """A folder can't be read or written as a tree."""


class StaleError(FolderError):
    """A node's lineage has changed since it was trained (raised with ``strict=True`` only)."""


class UnlockedError(FolderError):
    """A node's files are not those that tree.lock records."""


class HubError(LoraTreeError, OSError):
    """The model hub lacks the repository or file, refuses the request, or can't be reached."""


class BaseMismatch(LoraTreeError, ValueError):
    """The adapter names a module that this base does not have, or has in another shape or kind."""


class TiedWeights(BaseMismatch):
    """A weight to be merged is used by a second module, which would change as well."""


class MergedOnly(BaseMismatch):
    """The site's weight is read without calling its module, so a side path would never run."""


class UnmergedOnly(BaseMismatch):
    """The delta can't be written into the site's weight (quantised, grouped, no bias to add to)."""


class StateError(LoraTreeError, RuntimeError):
    """The call does not fit the model's present state."""


class ForeignWrite(StateError):
    """Other code wrote to a weight, or replaced it, while a path was merged into it."""


class DivergedError(LoraTreeError, ArithmeticError):
    """Training made a factor or a loss that is not finite; nothing of it was saved."""


class BudgetError(LoraTreeError, MemoryError):
    """The adapters needed at once do not fit into the budget; says how much they need."""


class MissingExtra(LoraTreeError, ImportError):
    """An optional package is needed and not installed."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like ``name``; None if none is near.

    >>> nearest("rnak", ["rank", "weight"])
    'rank'
    """
    if len(name) > _MOST_SUGGESTED:
        return None  # a comparison costs the product of the lengths
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def suggest(name: str, known: Iterable[str], *, prefix: str = "; did you mean ") -> str:
    """Return ``; did you mean 'r'?`` for the nearest known name; an empty string if none is near.

    >>> suggest("rnak", ["rank", "weight"])
    "; did you mean 'rank'?"
    """
    near = nearest(name, known)
    return "" if near is None else f"{prefix}{near!r}?"


def suggest_path(path: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'shared/fr'?`` for a path that names no node; or an empty string.

    A node may have moved below another one, and people remember the path that it had. So a path
    that ends in ``path`` comes first, then the nearest spelling, then a node elsewhere whose last
    name is like that of ``path``.

    >>> suggest_path("fr", ["shared/fr", "shared/fr/legal", "de"])
    "; did you mean 'shared/fr'?"
    >>> suggest_path("legal", ["de/legal", "fr/legal"])
    "; did you mean 'de/legal' or 'fr/legal'?"
    >>> suggest_path("leagl", ["shared/fr", "shared/fr/legal"])
    "; did you mean 'shared/fr/legal'?"
    """
    paths = list(known)
    suggested = [candidate for candidate in paths if path and candidate.endswith(f"/{path}")]
    near = nearest(path, paths)
    if not suggested and near is not None:
        suggested = [near]
    if not suggested:
        name = nearest(
            path.rpartition("/")[2], {candidate.rpartition("/")[2] for candidate in paths}
        )
        suggested = [
            candidate for candidate in paths if name and candidate.rpartition("/")[2] == name
        ]
    if not suggested:
        return ""
    return (
        f"; did you mean {' or '.join(repr(candidate) for candidate in suggested[:_MOST_MEANT])}?"
    )


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun, for a message.

    Args:
        count: thousands are set apart by commas.
        one: the noun for one; other words may stand before or after it.
        many: the same for other counts; None: ``one`` with an s.

    >>> plural(1, "row"), plural(1200, "held-back row"), plural(0, "leaf", "leaves")
    ('1 row', '1,200 held-back rows', '0 leaves')
    """
    return f"{count:,} {agreeing(count, one, many or f'{one}s')}"


def agreeing(count: int, one: str, many: str) -> str:
    """Return the form of a word that agrees with a count: ``was`` or ``were``."""
    return one if count == 1 else many


def listing(names: Iterable[str], *, most: int = 8) -> str:
    """Return names for a message, at most ``most`` of them: ``a, b, c and 4 more``."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
