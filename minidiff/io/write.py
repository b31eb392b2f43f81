"""Files written all or nothing; what cannot be written is named."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file all or nothing: to a temporary file in the same folder, flushed to disk, then renamed.

    >>> folder = tempfile.TemporaryDirectory()
    >>> write_atomic(Path(folder.name) / "note.txt", "hello")
    >>> (Path(folder.name) / "note.txt").read_text()
    'hello'
    """
    replace(path, lambda file: file.write(data.encode() if isinstance(data, str) else data))


def append(path: str | Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file by a function that gets it open, all or nothing; its folder is made if need be.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    from safetensors import SafetensorError

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.chmod(file.name, 0o644)                                   # temporary files are made private
            os.replace(file.name, path)
        except BaseException as error:
            with suppress(OSError):                                      # what is buffered has no room either
                file.close()
            os.unlink(file.name)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror or str(error), str(path)) from error
            if isinstance(error, SafetensorError):
                raise OSError(f"{path} cannot be written: {error}") from error
            raise
