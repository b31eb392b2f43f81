"""PyTorch's files without unpickling: only tensors are rebuilt, every other object becomes an inert stub.

`torch.load(weights_only=True)` refuses a file at the first name that it does not know, and original checkpoints hold
many beside their tensors: callbacks and settings of the trainer. Here such a name stands for a class that does nothing,
so nothing of the file's choosing is imported or called.
"""
from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
TRAINER = {"epoch", "global_step", "pytorch-lightning_version", "callbacks", "optimizer_states", "lr_schedulers",
           "loops", "hyper_parameters", "hparams_name", "native_amp_scaling_state"}  # what Lightning saves besides


DEEPEST = 5  # dictionaries in each other around the tensors


class Stub:
    """Stands for an object of a class that is not loaded: it takes whatever a pickle does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Nothing: the object is not there."""

    def extend(self, items: Any) -> None:
        """Nothing, likewise."""


class Parameters(dict):
    """What a `torch.nn.ParameterDict` holds: the tensors of its pickled state, nothing else of it."""

    def __setstate__(self, state: Any) -> None:
        held = state.get("_parameters") if isinstance(state, dict) else None
        self.update((k, v) for k, v in (held if isinstance(held, dict) else {}).items() if isinstance(v, Tensor))


PARAMETERS = [(Parameters, "torch.nn.modules.container.ParameterDict")]  # for torch.serialization.safe_globals


def load_tensors(path: str | Path) -> Any:
    """Read a file of torch ≥ 1.6 (a zip archive), its tensors memory-mapped.

    Returns:
        What was saved; whatever is no tensor, number, string or container is a `Stub`, a ParameterDict `Parameters`.

    Raises:
        Exception: of many kinds, if the file is damaged or of another format.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    >>> torch.save({"a": torch.ones(2), "where": Path("x")}, f"{folder.name}/x.ckpt")
    >>> found = load_tensors(f"{folder.name}/x.ckpt")
    >>> found["a"], isinstance(found["where"], Stub)
    (tensor([1., 1.]), True)
    """
    whole = torch.UntypedStorage.from_file(str(path), False, Path(path).stat().st_size)
    with zipfile.ZipFile(path) as archive:
        entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        folder = entry.removesuffix("data.pkl")

        def storage(saved: tuple) -> tuple[torch.UntypedStorage, torch.dtype]:
            _, dtype, key, _, _ = saved
            record = archive.getinfo(f"{folder}data/{key}")
            if record.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"{record.filename} is compressed")
            # before the bytes: a header of 30 bytes that ends with the lengths of two fields, and these
            at = record.header_offset + 26
            name, extra = (int.from_bytes(bytes(whole[at + i:at + i + 2].tolist()), "little") for i in (0, 2))
            start = at + 4 + name + extra
            return whole[start:start + record.file_size], dtype

        with archive.open(entry) as file:
            reader = _Unpickler(file)
            reader.persistent_load = storage
            return reader.load()


def load_old(path: str | Path) -> Any:
    """The same for a file as torch < 1.6 wrote it: five pickles, then the bytes of the storages.

    Raises:
        Exception: of many kinds, as `load_tensors`.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> torch.save({"a": torch.ones(2)}, f"{folder.name}/x.pt", _use_new_zipfile_serialization=False)
    >>> load_old(f"{folder.name}/x.pt")
    {'a': tensor([1., 1.])}
    """
    storages: dict[str, tuple[torch.UntypedStorage, torch.dtype]] = {}
    size = Path(path).stat().st_size
    left = size                                                          # bytes that storages may have

    def storage(saved: tuple) -> Any:
        if saved[0] == "module":                                             # a class, with its source text
            return saved[1]
        _, dtype, key, _, n, view = saved
        nonlocal left
        if key not in storages:
            left -= n * dtype.itemsize
            if view is not None or n < 0 or left < 0:
                raise pickle.UnpicklingError(f"storage {key} is a view or longer than the file")
            storages[key] = torch.UntypedStorage(n * dtype.itemsize), dtype
        return storages[key]

    with open(path, "rb") as file:
        if _Unpickler(file).load() != torch.serialization.MAGIC_NUMBER:
            raise pickle.UnpicklingError("not a file of torch.save")
        _version, _system = (_Unpickler(file).load() for _ in range(2))
        reader = _Unpickler(file)
        reader.persistent_load = storage
        content = reader.load()
        for key in _Unpickler(file).load():
            data, _ = storages[key]
            if len(file.read(8)) < 8:                                        # the number of its elements
                raise EOFError(f"the file ends before storage {key}")
            if len(data):
                data.copy_(torch.frombuffer(bytearray(file.read(len(data))), dtype=torch.uint8).untyped_storage())
    return content


def inner(content: Any, path: Path) -> Any:
    """Of dictionaries in a dictionary the one that holds tensors, as trainers save it beside their own state.

    Raises:
        ValueError: there are several, and none is called state_dict. path: of the file, for the message.

    >>> inner({"model": {"a": torch.ones(1)}, "epoch": 3}, Path("x.ckpt"))
    {'a': tensor([1.])}
    """
    for _ in range(DEEPEST):                                             # a dictionary may hold itself
        if not isinstance(content, dict) or any(isinstance(v, Tensor) for v in content.values()):
            break
        inside = {k: v for k, v in content.items()
                  if isinstance(k, str) and k not in TRAINER and isinstance(v, dict) and _holds(v)}
        if len(inside) > 1 and "state_dict" not in inside:
            raise ValueError(f"{path} holds several dictionaries of tensors: {', '.join(sorted(inside)[:10])}; save "
                             "the one to use in a file of its own")
        if not inside:
            break
        content = inside.get("state_dict") or next(iter(inside.values()))
    return content


class _Unpickler(pickle._Unpickler):  # that in C makes room for as many notes as a pickle says it has
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # made anew for each use: a pickle may set attributes of what it is given
        known = {("collections", "OrderedDict"): OrderedDict,
                 ("torch.nn.modules.container", "ParameterDict"): type("Parameters", (Parameters,), {}),
                 ("torch._utils", "_rebuild_tensor"): lambda *args: _tensor(*args),
                 ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _tensor(*args),
                 ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
                 ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data}
        return known.get((module, name)) or type(name, (Stub,), {})


def _tensor(stored: tuple, start: int, shape: tuple, strides: tuple, *_: Any) -> Tensor:
    data, dtype = stored
    return torch.empty(0, dtype=dtype).set_(data, start, shape, strides)   # beyond the storage's end is an error


def _holds(content: dict, depth: int = DEEPEST - 1) -> bool:
    """Whether tensors are in a dictionary by their names, or deeper."""
    return any(isinstance(k, str) and (isinstance(v, Tensor) or depth and isinstance(v, dict) and _holds(v, depth - 1))
               for k, v in content.items() if k not in TRAINER)
