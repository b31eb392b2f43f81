"""Files of your own: folders of captioned pictures, and the published files of MNIST and CIFAR-10."""
from __future__ import annotations

import gzip
import json
import math
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from minidiff.io.images import open_image


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
        yield _square(path, size), caption


def load_folder(folder: str | Path, size: int) -> tuple[Tensor, list[str]]:
    """All of `stream_folder` at once: pictures (n,3,size,size) uint8 and n captions, with the same errors."""
    rows = metadata(Path(folder), size)
    pictures = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for i, (path, _) in enumerate(rows):
        pictures[i] = _square(path, size)
    return pictures, [caption for _, caption in rows]


def load_mnist(folder: str | Path, *, train: bool = True) -> tuple[Tensor, Tensor]:
    """MNIST (or Fashion-MNIST: same format) from its published files, as they come or unpacked.

    Args:
        folder: holds train-images-idx3-ubyte[.gz] and train-labels-idx1-ubyte[.gz], or the same with t10k.
        train: the 60,000 training pictures, else the 10,000 test pictures.

    Returns:
        pictures (n,1,28,28) uint8, labels (n,) int64.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says.
    """
    stem = "train" if train else "t10k"
    images, labels = (read_idx(_first(Path(folder), f"{stem}-{name}-ubyte", f"{stem}-{name}-ubyte.gz"))
                      for name in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{folder} holds images {tuple(images.shape)} and labels {tuple(labels.shape)}; "
                         "MNIST has (n, rows, columns) and (n,)")
    return images[:, None], labels.long()


def read_idx(path: str | Path) -> Tensor:
    """A uint8 array in IDX format (0, 0, 8, number of axes, big-endian sizes, data), also gzipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another format, another type than unsigned bytes, too few or too many bytes, or a damaged gzip file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a"; _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    >>> read_idx(path)
    tensor([7, 9], dtype=torch.uint8)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as start:
        zipped = start.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or not head[3]:
                raise ValueError(f"{path} is not an IDX file of unsigned bytes: "
                                 f"it starts with {head.hex(' ') or 'nothing'}, not 00 00 08")
            sizes = file.read(4 * head[3])
            shape = [int.from_bytes(sizes[i:i + 4], "big") for i in range(0, len(sizes), 4)]
            data = bytearray(file.read(math.prod(shape) + 1)) if len(shape) == head[3] else b""
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    if len(shape) < head[3] or len(data) != math.prod(shape) or not data:
        raise ValueError(f"{path} should hold {' × '.join(map(str, shape))} bytes, it holds "
                         f"{'more' if len(data) > math.prod(shape) else len(data)}")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def load_cifar10(folder: str | Path, *, train: bool = True) -> tuple[Tensor, Tensor]:
    """CIFAR-10 from its published files: the "python" or the "binary" version, unpacked.

    The python version is pickled; it is read without running anything of what a pickle may contain.

    Args:
        folder: cifar-10-batches-py (data_batch_1 … 5, test_batch) or cifar-10-batches-bin (the same with .bin).
        train: the 50,000 training pictures, else the 10,000 test pictures.

    Returns:
        pictures (n,3,32,32) uint8, labels (n,) int64.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    paths = [_first(Path(folder), name, f"{name}.bin") for name in names]
    parts = [_cifar_binary(path) if path.suffix == ".bin" else _cifar_pickle(path) for path in paths]
    pictures, labels = (torch.cat(part) for part in zip(*parts))
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{folder} has labels from {labels.min()} to {labels.max()}; CIFAR-10 has 0 to 9")
    return pictures, labels


def metadata(folder: Path, size: int) -> list[tuple[Path, str]]:
    """The picture files and captions that `stream_folder` reads, with the same errors."""
    if size < 1:
        raise ValueError(f"size is {size}; pictures need at least 1 pixel")
    path = _first(folder, "metadata.jsonl")
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
            row = json.loads(line)
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


def _square(path: Path, size: int) -> Tensor:
    from PIL import Image, ImageOps

    picture = ImageOps.fit(open_image(path), (size, size), Image.Resampling.LANCZOS)
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, 3).permute(2, 0, 1)  # (3, size, size)


def _first(folder: Path, *names: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"there is no {' or '.join(names)} in {folder}")


def _cifar_binary(path: Path) -> tuple[Tensor, Tensor]:
    data = bytearray(path.read_bytes())
    if not data or len(data) % 3073:
        raise ValueError(f"{path} has {len(data)} bytes; CIFAR-10 has 1 + 3072 per picture")
    rows = torch.frombuffer(data, dtype=torch.uint8).view(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def _cifar_pickle(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        _, shape, dtype, fortran, data = batch["data"].state
        labels = torch.tensor(batch["labels"])
        if shape != (len(labels), 3072) or dtype.args[0] not in (b"u1", "u1") or fortran or labels.dtype != torch.int64:
            raise ValueError(f"data of shape {shape} and type {dtype.args[0]}")
        pictures = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 3, 32, 32)
    except Exception as error:  # garbled pickles fail in every possible way
        raise ValueError(f"{path} is not a batch of the CIFAR-10 python version: {error}") from error
    return pictures, labels


class _Stub:
    """Stands in for numpy's arrays and dtypes: notes what the pickle says about them, runs nothing."""

    def __init__(self, *args):
        self.args, self.state = args, ()

    def __setstate__(self, state):
        self.state = state


def _latin1(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")  # bytes in a pickle that Python 3 wrote for Python 2


class _Unpickler(pickle.Unpickler):
    """Knows the few names of a pickled uint8 array, all of them harmless stand-ins; any other is refused."""

    KNOWN = {("_codecs", "encode"): _latin1, ("numpy", "ndarray"): _Stub, ("numpy", "dtype"): _Stub,
             ("numpy.core.multiarray", "_reconstruct"): _Stub, ("numpy._core.multiarray", "_reconstruct"): _Stub}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch does not need")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside the file")
