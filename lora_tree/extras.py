"""Optional packages: imported at their first use; a missing one is an error with the pip command.

An error that such a package raises becomes one of ours here, once: the action that failed, then the
package's own words.

Law: a base's own Python code never runs unless the user said so (`open_pretrained`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import LoraTreeError, MissingExtra, SpecError, nearest

__all__ = ["OTHER_BASE", "foreign", "hub_answers", "need", "open_pretrained"]

MOST_CHARACTERS = 300
"""The most of a foreign message that is shown; transformers lists every model it knows."""

CONNECT_TIMEOUT_S = 5.0

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

OTHER_BASE = "name the folder or the hub id of a transformers model: --base MODEL"


def _folder_meant(base: str) -> list[str]:
    """Return a line that names the folder whose name is most like the base's, if one is."""
    above, name = os.path.split(base)
    if not os.path.isdir(above or "."):
        return []
    folders = [entry.name for entry in os.scandir(above or ".") if entry.is_dir()]
    near = nearest(name, folders)
    return [] if near is None else [f"there is a folder {os.path.join(above, near)!r}"]


def need(module: str, *, extra: str, what: str) -> Any:
    """Import an optional module and return it.

    Args:
        module: its name, ``transformers``.
        extra: the extra of lora_tree that brings it.
        what: what is being done, for the message.

    Raises:
        MissingExtra: the module is not installed.

    >>> need("no_such_module", extra="peft", what="the demo")
    Traceback (most recent call last):
    lora_tree.errors.MissingExtra: the demo needs no_such_module, which is not installed
      pip install 'lora_tree[peft]'
    """
    # Looked for before it is imported: an ImportError out of a package that is installed has
    # another cause, and the advice to install it would be wrong.
    try:
        module_spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # find_spec imports the package around a.b, which may be missing
        module_spec = None
    if module_spec is None:
        raise MissingExtra(
            f"{what} needs {module}, which is not installed", f"pip install 'lora_tree[{extra}]'"
        )
    return importlib.import_module(module)


@contextmanager
def foreign(what: str, *todo: str) -> Iterator[None]:
    """Raise an optional package's error inside the block as a `SpecError`.

    Our own errors pass unchanged, and so does a MemoryError.

    Args:
        what: what was being done, for the message.
        todo: what to do about it.

    Raises:
        SpecError: the block raised an error.

    >>> with foreign("the folder 'x' is no model", "name another: --base MODEL"):
    ...     1 / 0
    Traceback (most recent call last):
    lora_tree.errors.SpecError: the folder 'x' is no model: ZeroDivisionError: division by zero
      name another: --base MODEL
    """
    try:
        yield
    except (LoraTreeError, MemoryError):
        raise
    except Exception as error:
        # The first line: transformers adds paragraphs of links to its own documentation.
        first_line = next(iter(str(error).strip().splitlines()), "")
        if len(first_line) > MOST_CHARACTERS:
            first_line = f"{first_line[:MOST_CHARACTERS]}…"
        raise SpecError(
            f"{what}: {type(error).__name__}: {first_line}".removesuffix(": "), *todo
        ) from error


def hub_answers() -> bool:
    """Return whether the model hub can be reached, after one try of a few seconds.

    The hub's own client tries six times, with pauses that add up to half a minute, before it looks
    into its cache. Through a proxy only that client can tell, so True is returned.
    """
    constants = importlib.import_module("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:  # the user said so, by an environment variable
        return False
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    if endpoint.hostname is None or endpoint.scheme in urllib.request.getproxies():
        return True
    try:
        socket.create_connection((endpoint.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def open_pretrained(
    kind: Any,
    base: str | os.PathLike[str],
    *,
    failed: str,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Return what ``kind.from_pretrained(base)`` makes: a config, a tokenizer or a model.

    A base may bring Python files of its own. They run only if ``trust_remote_code`` is true, and
    only the user may decide that. Without the argument transformers would ask a question on stdout,
    and obey a "y" that happens to lie in a pipe. So every call passes it, and all are made here.

    Args:
        kind: an Auto class or a model class of transformers.
        base: a folder or a hub id.
        failed: the message if it can't be opened: ``transformers can't open its tokenizer``.
        trust_remote_code: run the base's own code.
        options: more arguments of ``from_pretrained``.

    Raises:
        SpecError: there is no such folder, transformers can't open it, or it needs code of its own.
    """
    todo = [OTHER_BASE]
    if not os.path.isdir(base) and not HUB_ID.fullmatch(os.fspath(base)):
        # transformers would take it for a hub id, and complain about its letters.
        raise SpecError(
            f"{base}: {failed}: no such folder, and not a hub id, which is written org/name",
            "a relative path in tree.yaml starts at the folder of tree.yaml, any other at the "
            "current folder",
            *_folder_meant(os.fspath(base)),
            OTHER_BASE,
        )
    if not os.path.isdir(base):
        # Without this, from_pretrained waits half a minute for a hub that does not answer.
        if not hub_answers():
            options["local_files_only"] = True
            todo.insert(
                0, "the hub does not answer, so only models fetched before can be opened by hub id"
            )
        todo[:0] = _folder_meant(os.fspath(base))
    try:
        with foreign(f"{base}: {failed}", *todo):
            return kind.from_pretrained(base, trust_remote_code=trust_remote_code, **options)
    except SpecError as error:
        # transformers (5) has no exception of its own for this; its text names the argument.
        if trust_remote_code or "trust_remote_code" not in str(error.__cause__):
            raise
        raise SpecError(
            f"{base}: {failed}: it needs the base's own Python code, which is not run by default",
            "read that code; if you trust it, give --trust-remote-code, "
            "or open the model in Python and attach the tree to it",
        ) from error
