"""One weight file: opened without running any of its code, or a sentence about what is wrong with it."""

import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.io.plain_text import ZIP, diagnosis
from minidiff.io.unpickle import PARAMETERS, load_old, load_tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
          "F4": torch.float4_e2m1fn_x2}  # in safetensors headers
TENSORS = 100_000  # at most in one file; Stable Diffusion XL has 2,515


def read_object(path: str | Path, headers: bool = False) -> Any:
    """Read a weight file as it is: a dictionary of tensors, or in a pickle whatever holds them.

    Returns:
        Tensors on the CPU, memory-mapped where possible, and containers; objects of other kinds are `Stub`s.

    Raises:
        FileNotFoundError, ValueError: as `load_state`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file {path}")
    try:
        with _utf8(path) as name:
            return _headers(name) if headers and path.suffix == ".safetensors" else _content(name)
    except pickle.UnpicklingError as error:     # torch's own text advises to load it unsafely
        raise ValueError(diagnosis(path) or f"{path} is no plain file of tensors: it is garbled, or would run code to "
                         "load, which minidiff never does") from error
    except Exception as error:      # each reader has its own exceptions, all mean: this is not a whole weight file
        if "TorchScript" in str(error):                                  # torch advises to load it unsafely here too
            raise ValueError(f"{path} is a TorchScript program, which minidiff never runs; it needs the tensors alone, "
                             "such as its state_dict()") from error
        reason = "" if isinstance(error, LookupError) else f": {error}"          # a lookup's is a bare key
        raise ValueError(diagnosis(path) or f"{path} is garbled or truncated{reason}".splitlines()[0]) from error


def read_notes(path: str | Path) -> dict[str, Any]:
    """What a weight file says beside its tensors: a safetensors file's `__metadata__`, a pickle's texts and numbers.

    Raises:
        FileNotFoundError, ValueError: as `load_state`.

    >>> folder = tempfile.TemporaryDirectory()
    >>> torch.save({"state_dict": {}, "global_step": 875000}, f"{folder.name}/x.ckpt")
    >>> read_notes(f"{folder.name}/x.ckpt")
    {'global_step': 875000}
    """
    if Path(path).suffix != ".safetensors":
        content = read_object(path)
        items = content.items() if isinstance(content, dict) else ()
        return {k: v for k, v in items if isinstance(v, (str, int, float))}
    from safetensors import safe_open

    with _utf8(Path(path)) as name, safe_open(name, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _utf8(path: Path) -> Iterator[Path]:
    """The file by a name in UTF-8, the only ones that safetensors' and torch's readers open: a link, if need be."""
    if os.fsencode(path).decode(errors="replace") == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"link{path.suffix}"
        link.symlink_to(path.absolute())
        yield link


def _headers(path: Path) -> dict[str, Tensor]:
    """A safetensors file's names and shapes: reading a tensor touches it, and the system then reads ahead."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in _names(file)}
        # what is of a dtype that torch lacks counts as bytes: no parameters
        return {name: torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
                for name, part in parts.items()}


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in _names(file)}
    with open(path, "rb") as file:
        is_zip = file.read(4) == ZIP                                     # before torch 1.6: a bare pickle, no mmap
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if packed := [each.filename for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"its {packed[0]} is compressed, which torch.save never does")
    try:
        with torch.serialization.safe_globals(PARAMETERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")                              # of formats that fail then, or are old
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        return (load_tensors if is_zip else load_old)(path)


def _names(file: Any) -> list[str]:
    """Of the tensors in an open safetensors file."""
    names = file.keys()
    if len(names) > TENSORS:
        raise ValueError(f"it has {len(names):,} tensors; at most {TENSORS:,} are read")
    return names
