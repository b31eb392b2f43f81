"""Files of your own: folders of captioned pictures."""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff.io.images import fit, open_image
from minidiff.io.plain_text import parse

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def stream_folder(folder: str | Path, size: int) -> Iterator[tuple[Tensor, str]]:
    """The pictures of a folder and their captions, one after the other: what is not being looked at is not in memory.

    Captions are those of `metadata.jsonl`, one line per picture: {"file_name": "cats/1.jpg", "text": "a cat on a mat"}
    (the layout of Hugging Face's `imagefolder`; other keys are ignored). Without it, every picture in the folder and
    those inside it counts; its caption is the text beside it, `1.txt` or `1.caption` (kohya's layout), else its name:
    `a-red_house (2).jpg` is "a red house". Pictures are made RGB as by `minidiff.io.images.plain`, resized so that the
    shorter side has `size` pixels, and the middle square is kept.

    Yields:
        (3,size,size) uint8, caption; in the order of the file, or by name.

    Raises:
        FileNotFoundError: no such folder, no picture in it, or one that is named is missing.
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
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not path.is_file():
        return _beside(folder)
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


def _beside(folder: Path) -> list[tuple[Path, str]]:
    """Pictures without a metadata.jsonl: each with the text beside it, or with its name."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise FileNotFoundError(f"there is no picture in {folder}, and no metadata.jsonl; it should hold either that "
                                f"or files that end in {', '.join(SUFFIXES)}, with captions in .txt files beside them "
                                "or as their names")
    rows = []
    for path in found:
        text = next((file for file in (path.with_suffix(".txt"), path.with_suffix(".caption")) if file.is_file()), None)
        try:
            caption = _named(path.stem) if text is None else " ".join(text.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{text} is not UTF-8 text: {error}") from error
        rows.append((path, caption))
    return rows


def _named(stem: str) -> str:
    """The caption that a file's name is: words, without the number that tells it from others."""
    words = re.sub(r"[-_\s]+", " ", stem).strip()
    return re.sub(r"(?<=\w) ?\(?\d+\)?$", "", words) or words
