"""Files of your own: folders of captioned pictures."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff.io.images import fit, open_image
from minidiff.io.plain_text import parse


def stream_folder(folder: str | Path, size: int) -> Iterator[tuple[Tensor, str]]:
    """The pictures of a folder and their captions, one after the other: what is not being looked at is not in memory.

    The folder holds a `metadata.jsonl`, one line per picture: {"file_name": "cats/1.jpg", "text": "a cat on a mat"}
    (the layout of Hugging Face's `imagefolder`; other keys are ignored). Pictures are made RGB as by
    `minidiff.io.images.plain`, resized so that the shorter side has `size` pixels, and the middle square is kept.

    Yields:
        (3,size,size) uint8, caption; in the order of the file.

    Raises:
        FileNotFoundError: no such folder, no metadata.jsonl in it, or a missing picture.
        ValueError: a line that is not such an object or no text, a name that leads out of the folder, or a damaged
            picture.

    >>> import tempfile; from PIL import Image
    >>> folder = Path(tempfile.mkdtemp()); Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    >>> _ = (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}')
    >>> [(picture.shape, caption) for picture, caption in stream_folder(folder, 16)]
    [(torch.Size([3, 16, 16]), 'red')]
    """
    for path, caption in metadata(Path(folder), size):
        square = np.array(fit(open_image(path), size))
        yield torch.from_numpy(square).permute(2, 0, 1), caption


def metadata(folder: Path, size: int) -> list[tuple[Path, str]]:
    """The picture files and captions that `stream_folder` reads.

    Raises:
        FileNotFoundError, ValueError: as `stream_folder`.
    """
    if size < 1:
        raise ValueError(f"size is {size}; pictures need at least 1 pixel")
    path = folder / "metadata.jsonl"
    for there, what in ((folder.is_dir(), f"folder {folder}"), (path.is_file(), f"{path.name} in {folder}")):
        if not there:
            raise FileNotFoundError(f"there is no {what}")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
            raise ValueError(f'{where}: expected {{"file_name": "…", "text": "…"}}, got {line.strip()[:80]}')
        try:
            row["text"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the text holds half a character, \\ud800 to \\udfff: {error}") from error
        name = Path(row["file_name"])
        if name.anchor or ".." in name.parts:
            raise ValueError(f"{where}: {name} leads out of the folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{where}: there is no picture {name}")
        rows.append((folder / name, row["text"]))
    if not rows:
        raise ValueError(f"{path} is empty; it should have one line per picture")
    return rows
