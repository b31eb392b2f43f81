"""Files written all or nothing; what cannot be written is named."""
from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def targets(out: str | Path | None, n: int) -> list[Path]:
    """The n files to write: minidiff-0001.png … from the next free number on, or `out`, with -1, -2 … if n > 1.

    >>> [path.name for path in targets("house.png", 2)]
    ['house-1.png', 'house-2.png']
    """
    if out is None:
        names = [path.stem.split("-")[1] for path in Path().glob("minidiff-*.png")]
        taken = [int(name) for name in names if name.isdecimal()]
        return [Path(f"minidiff-{max(taken, default=0) + i:04d}.png") for i in range(1, n + 1)]
    out = Path(out)
    return [out] if n == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, n + 1)]


@contextmanager
def claimed(wanted: list[Path], free: bool) -> Iterator[list[Path]]:
    """The files to write. Of `free` ones, whose names were the next, those that nobody else took meanwhile.

    They are there at once, empty, so that nobody takes them from now on, and go again if nothing is written.
    """
    if not free:
        yield wanted
        return
    taken, numbers = [], itertools.count(int(wanted[0].stem.split("-")[1]))
    while len(taken) < len(wanted):
        path = Path(f"minidiff-{next(numbers):04d}.png")
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            taken.append(path)
    try:
        yield taken
    except BaseException:
        for path in taken:
            if not path.stat().st_size:
                path.unlink()
        raise
