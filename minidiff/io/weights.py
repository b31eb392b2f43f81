"""Weight files: reading (safetensors, PyTorch zip files, shards), strict loading, atomic saving.

The layout is diffusers' and transformers': a folder with `config.json` and `<stem>[.variant].safetensors` (or `.bin`),
or an index `<stem>.safetensors.index[.variant].json` that names the shards. Nothing is ever unpickled unsafely, no file
outside the given folder is opened, and whatever is wrong with a file is said in one sentence.
"""

import json
import os
import pickle
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def weights_dir() -> Path:
    """The folder with the weights that ship: `data/` of a checkout, `minidiff/_weights` of an installed wheel.

    >>> weights_dir().name in ("data", "_weights")
    True
    """
    package = Path(__file__).resolve().parent.parent
    wheel = package / "_weights"
    return wheel if wheel.is_dir() else package.parent / "data"


def read_json(path: str | Path) -> dict:
    """Read a JSON object, such as a `config.json`.

    Args:
        path: the file.

    Returns:
        The object as a dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.

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
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_diagnosis(path) or f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, it holds a {type(value).__name__}")
    return value


def load_state(source: str | Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> State:
    """Read all tensors of a weight file, or of a folder in diffusers' layout, memory-mapped where possible.

    Args:
        source: a `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` file, or a folder.
        stem: in a folder, the file name without its ending: "diffusion_pytorch_model" (diffusers) or "model"
            (transformers, whose `.bin` is called `pytorch_model`).
        variant: in a folder, the tag before the ending, such as "fp16".

    Returns:
        {name: CPU tensor}, in the dtype of the file.

    Raises:
        FileNotFoundError: nothing of that name; the message says what was looked for, and what is there.
        ValueError: the file is empty, truncated, garbled, a git-LFS pointer, a web page, or a shard index that
            points out of its folder.

    >>> folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    >>> save_state({"a": torch.ones(2)}, Path(folder.name) / "model.safetensors")
    >>> load_state(folder.name, "model")
    {'a': tensor([1., 1.])}
    """
    source = Path(source)
    if not source.is_dir():
        return _read(source)
    tag = f".{variant}" if variant else ""
    pickled = "pytorch_model" if stem == "model" else stem
    for name, ending in ((stem, ".safetensors"), (pickled, ".bin")):
        file, index = source / f"{name}{tag}{ending}", source / f"{name}{ending}.index{tag}.json"
        if file.is_file():
            return _read(file)
        if index.is_file():
            return _read_shards(index)
    found = sorted(p.name for p in source.iterdir() if p.suffix in (".safetensors", ".bin"))
    raise FileNotFoundError(
        f"looked for {stem}{tag}.safetensors or {pickled}{tag}.bin in {source}: "
        + (f"there is only {', '.join(found)}" + _variant_hint(found, variant) if found else "it holds no weights")
    )


def load_strict(module: nn.Module, state: State, source: str | Path = "the weights") -> None:
    """Give `module` the tensors of `state`: every name and shape must agree and every number be finite.

    Checks come first, so a bad file leaves the module as it was. Tensors are assigned, not copied: a module made on
    the meta device costs no memory and no random numbers before this.

    Args:
        module: the network, on any device, "meta" included.
        state: {name: tensor} with exactly the names and shapes of `module.state_dict()`.
        source: where it came from, for messages.

    Raises:
        ValueError: missing, unexpected or misshapen tensors (the first ten, then a count), or NaN or infinite ones.

    >>> net = nn.Linear(2, 1, device="meta")
    >>> load_strict(net, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> net(torch.ones(2)).item()
    2.0
    """
    own = module.state_dict()
    shapes = {k: f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in own.keys() & state.keys()
              if state[k].shape != own[k].shape}
    problems = {"missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys(),
                "of the wrong shape": shapes.values()}
    found = "; ".join(f"{what}: {_first_ten(names)}" for what, names in problems.items() if names)
    if found:
        raise ValueError(f"{source} does not fit {type(module).__name__}; {found}")
    if broken := [k for k, v in state.items() if not _finite(v)]:
        raise ValueError(f"{source} holds NaN or infinite numbers in {_first_ten(broken)}")
    module.load_state_dict(state, assign=True)


def save_state(state: State, path: str | Path) -> None:
    """Write tensors to a safetensors file, all or nothing: a temporary file beside it, then one rename.

    Args:
        state: {name: tensor} of any device, layout or sharing; they are written contiguous and untied.
        path: the `.safetensors` file; its folder is made if need be, an existing file is replaced.

    >>> folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    >>> save_state({"a": torch.zeros(2, 3).T}, Path(folder.name) / "new" / "a.safetensors")
    >>> load_state(Path(folder.name) / "new" / "a.safetensors")["a"].shape
    torch.Size([3, 2])
    """
    from safetensors.torch import save

    plain, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor      # safetensors refuses shared storage
        seen.add(storage)
    write_atomic(path, save(plain, metadata={"format": "pt"}))           # transformers insists on this entry


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file all or nothing: to a temporary file in the same folder, flushed to disk, then renamed.

    >>> folder = tempfile.TemporaryDirectory()
    >>> write_atomic(Path(folder.name) / "note.txt", "hello")
    >>> (Path(folder.name) / "note.txt").read_text()
    'hello'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)                                           # temporary files are made private
    os.replace(file.name, path)


def _read(path: Path) -> State:
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        state = _unpickle(path)
    except pickle.UnpicklingError as error:     # torch's own text advises to load it unsafely
        raise ValueError(_diagnosis(path) or f"{path} is no plain file of tensors: it is garbled, or would run code to "
                         "load, which minidiff never does") from error
    except Exception as error:      # each reader has its own exceptions, all mean: this is not a whole weight file
        raise ValueError(_diagnosis(path) or f"{path} is garbled or truncated: {error}".splitlines()[0]) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} should hold a flat dictionary of tensors")
    return state


def _unpickle(path: Path) -> State:
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"                           # before torch 1.6: a bare pickle, no mmap
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _read_shards(index: Path) -> State:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    if bad := sorted({name for name in where.values() if name in (".", "..") or set(name) & set("/\\:")}):
        raise ValueError(f"{index} points out of its folder: {_first_ten(bad)}")
    shards = {name: _read(index.parent / name) for name in sorted(set(where.values()))}
    return {key: shards[name][key] for key, name in where.items() if key in shards[name]}


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite: one pass, no temporary; a sum that overflows is looked at again."""
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(tensor).all())


def _diagnosis(path: Path) -> str | None:
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
    if path.suffix == ".safetensors" and (size < 8 or 8 + int.from_bytes(head[:8], "little") > size):
        return f"{path} is truncated or no safetensors file: its {size} bytes end within the header"
    return None


def _variant_hint(found: list[str], variant: str | None) -> str:
    tags = sorted({parts[1] for name in found if len(parts := name.split(".")) == 3 and parts[1] != variant})
    return f"; variant={tags[0]!r} would take it" if tags else ""


def _first_ten(names) -> str:
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
