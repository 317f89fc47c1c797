"""Read the bytes of an untrusted adapter_config.json, PEFT's or mlx-lm's."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FormatError
from ..system.reading import Inside, open_stream
from .limits import CONFIG_BYTES
from .pointer import check_pointer

__all__ = ["read_config"]


def read_config(file: str | Path, where: str, inside: Inside | None) -> bytes:
    """Return the bytes of a config.

    Args:
        file: its present path.
        where: its name in errors.
        inside: where it may lie, all links followed; None: anywhere.

    Raises:
        FormatError: it can't be read, is too large, or is a Git LFS pointer.
    """
    try:
        with open_stream(file, inside=inside) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > CONFIG_BYTES:
                raise FormatError(
                    f"{where}: more than {CONFIG_BYTES >> 20} MiB: got {size:,} bytes, "
                    "and no adapter config is that large",
                    "is it another file of this name? save the adapter again with PEFT",
                )
            # Read at most the size that was checked: the file may grow meanwhile, and read() would
            # allocate memory for all of it.
            data = stream.read(size)
            check_pointer(data, where, "JSON")
            return data
    except OSError as error:
        raise FormatError(f"{where}: can't be read: {error.strerror or error}") from error
