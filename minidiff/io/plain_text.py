"""JSON that others wrote, and texts of theirs in messages."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ZIP = b"PK\x03\x04"  # what a zip archive begins with, and a file of torch.save
DEPTH, LENGTH = 100, 2000  # of nested JSON, and of a message


def parse(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or nested more than DEPTH deep.

    >>> parse("[" * 10**5)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    inside, depth = [value], 0
    while inside := [part for whole in inside if isinstance(whole, dict | list)
                     for part in (whole.values() if isinstance(whole, dict) else whole)]:
        if (depth := depth + 1) > DEPTH:
            raise ValueError("it is nested too deeply")
    return value


def one_line(text: object) -> str:
    """A text on one line, for a terminal: control characters as escapes, of a long one its begin and end.

    >>> one_line("a\\n b\\x1b[31m")
    'a b\\\\x1b[31m'
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= LENGTH else f"{line[:LENGTH // 2]} … {line[-LENGTH // 2:]}"


def read_json(path: str | Path) -> dict:
    """Read a JSON object, such as a `config.json`.

    Args:
        path: the file.

    Returns:
        The object as a dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "config.json"
    >>> _ = path.write_text('{"ch": 32}')
    >>> read_json(path)
    {'ch': 32}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    try:
        value = parse(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(diagnosis(path) or f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, it holds a {type(value).__name__}")
    return value


def diagnosis(path: Path) -> str | None:
    """What a file that cannot be read is instead, if that can be told from its first bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if size == 0:
        return f"{path} is empty"
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a git-LFS pointer, not the file itself: run `git lfs pull` where it came from"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page, not weights: the download was redirected"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF")):
        return f"{path} is a picture, not weights"
    if path.suffix == ".safetensors" and head.startswith(ZIP):
        return f"{path} is a file of torch.save under another name: let it end in .ckpt, and it is read as one"
    if path.suffix != ".safetensors" and head[8:10] == b'{"':
        return f"{path} is a safetensors file under another name: let it end in .safetensors, and it is read as one"
    if path.suffix == ".safetensors" and (size < 8 or 8 + int.from_bytes(head[:8], "little") > size):
        return f"{path} is truncated or no safetensors file: its {size} bytes end within the header"
    return None
