"""Weight files: reading (safetensors, PyTorch zip files, shards), strict loading, atomic saving.

The layout is diffusers' and transformers': a folder with `config.json` and `<stem>[.variant].safetensors` (or `.bin`),
or an index `<stem>.safetensors.index[.variant].json` that names the shards. Nothing is ever unpickled unsafely, no file
outside the given folder is opened, and whatever is wrong with a file is said in one sentence.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.io.plain_text import read_json
from minidiff.io.unpickle import TRAINER, Stub, inner
from minidiff.io.weight_file import read_object
from minidiff.io.write import replace

State = dict[str, Tensor]
CHECKED = 2**28  # bytes up to which loading looks for NaN: a tenth of a second
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name


def weights_dir() -> Path:
    """The folder with the weights that ship: `data/` of a checkout, `minidiff/_weights` of an installed wheel.

    >>> weights_dir().name in ("data", "_weights")
    True
    """
    package = Path(__file__).resolve().parent.parent
    wheel = package / "_weights"
    return wheel if wheel.is_dir() else package.parent / "data"


def load_state(source: str | Path, stem: str = "diffusion_pytorch_model", variant: str | None = None, *,
               headers: bool = False) -> State:
    """Read all tensors of a weight file, or of a folder in diffusers' layout, memory-mapped where possible.

    Args:
        source: a `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` file, or a folder.
        stem: in a folder, the file name without its ending: "diffusion_pytorch_model" (diffusers) or "model"
            (transformers, whose `.bin` is called `pytorch_model`).
        variant: in a folder, the tag before the ending, such as "fp16".
        headers: of safetensors files only read the headers, and give tensors on the meta device.

    Returns:
        {name: CPU tensor}, in the dtype of the file. Of a pickle with one dictionary of tensors in others
        ("state_dict", "model" …) that one; without the prefix that DataParallel or torch.compile gives to all names.

    Raises:
        FileNotFoundError: nothing of that name; the message says what was looked for, and what is there.
        ValueError: the file is empty, truncated, garbled, a git-LFS pointer, a web page, or a shard index that
            points out of its folder.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    >>> save_state({"a": torch.ones(2)}, Path(folder.name) / "model.safetensors")
    >>> load_state(folder.name, "model")
    {'a': tensor([1., 1.])}
    """
    source = Path(source)
    if not source.is_dir():
        return _read(source, headers)
    tag = f".{variant}" if variant else ""
    pickled = "pytorch_model" if stem == "model" else stem
    for name, ending in ((stem, ".safetensors"), (pickled, ".bin")):
        file, index = source / f"{name}{tag}{ending}", source / f"{name}{ending}.index{tag}.json"
        if file.is_file():
            return _read(file, headers)
        if index.is_file():
            return _read_shards(index, headers)
    if not source.exists():
        raise FileNotFoundError(f"there is no folder {source}")
    there = sorted(p.name for p in source.iterdir() if p.suffix in (".safetensors", ".bin"))
    raise FileNotFoundError(
        f"looked for {stem}{tag}.safetensors or {pickled}{tag}.bin in {source}: "
        + (f"there is only {', '.join(there)}" + _variant_hint(source, (stem, pickled), variant) if there
           else "it holds no weights"))


def variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant to read of a part of a model, as in diffusers: None where only other parts come in that variant.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_state({"a": torch.ones(2)}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    >>> save_state({"a": torch.ones(2)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    >>> variant_of(folder / "unet", "fp16"), variant_of(folder / "vae", "fp16")
    ('fp16', None)
    """
    def comes(part: Path) -> bool:
        return any(part.glob(f"*.{variant}.*")) or any(part.glob(f"*.{variant}-*"))

    elsewhere = variant and not comes(folder) and any(comes(part) for part in folder.parent.iterdir() if part.is_dir())
    return None if elsewhere else variant


def load_strict(module: nn.Module, state: State, source: str | Path = "the weights") -> None:
    """Give `module` the tensors of `state`: every name and shape must agree and every number be finite.

    NOTE: more than CHECKED bytes are not looked at here: reading them now would take longer than all the rest. A run
    looks for NaN after its first step: test_a_large_model_with_nan_is_named_after_the_first_step.

    Checks come first, so a bad file leaves the module as it was. A 1×1 convolution and a linear layer hold the same
    numbers, (out, in, 1, 1) and (out, in): either will do for the other. Tensors are assigned, not copied: a module
    made on the meta device costs no memory and no random numbers before this.

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
    wanted = module.state_dict()
    state = {k: v.view(wanted[k].shape) if k in wanted and _pointwise(v, wanted[k]) else v for k, v in state.items()}
    shapes = {k: f"{k} {list(state[k].shape)} instead of {list(wanted[k].shape)}" for k in wanted.keys() & state.keys()
              if state[k].shape != wanted[k].shape}
    problems = {"missing": wanted.keys() - state.keys(), "unexpected": state.keys() - wanted.keys(),
                "of the wrong shape": shapes.values(),
                "not of real numbers": [k for k in wanted.keys() & state.keys() if not state[k].is_floating_point()]}
    said = "; ".join(f"{what}: {first_ten(names)}" for what, names in problems.items() if names)
    if said:
        raise ValueError(f"{source} does not fit {type(module).__name__}; {said}")
    if sum(v.nbytes for v in state.values()) <= CHECKED and (broken := nonfinite(state)):
        raise ValueError(f"{source} holds NaN or infinite numbers in {broken}")
    module.load_state_dict(state, assign=True)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is all of its numbers: not sparse or nested, not on the meta device, none of them repeated.

    >>> is_dense(torch.eye(2)), is_dense(torch.eye(2).to_sparse()), is_dense(torch.ones(1).expand(10**9))
    (True, False, False)
    """
    return (tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)
            and tensor.nbytes <= tensor.untyped_storage().nbytes())


def nonfinite(state: State) -> str:
    """The names of tensors that hold NaN or infinite numbers, the first ten, then a count; "" if there are none.

    >>> nonfinite({"a": torch.zeros(2), "b": torch.tensor([float("nan")])})
    'b'
    """
    return first_ten([name for name, tensor in state.items() if not _finite(tensor)])


def save_state(state: State, path: str | Path, notes: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, all or nothing: a temporary file beside it, then one rename.

    Args:
        state: {name: tensor} of any device, layout or sharing; they are written contiguous and untied.
        path: the `.safetensors` file; its folder is made if need be, an existing file is replaced.
        notes: for the file's `__metadata__`.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    >>> save_state({"a": torch.zeros(2, 3).T}, Path(folder.name) / "new" / "a.safetensors")
    >>> load_state(Path(folder.name) / "new" / "a.safetensors")["a"].shape
    torch.Size([3, 2])
    """
    from safetensors.torch import save_file

    plain, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor      # safetensors refuses shared storage
        seen.add(storage)
    # transformers insists on the format
    replace(path, lambda file: save_file(plain, file.name, metadata={"format": "pt", **(notes or {})}))


def _read(path: Path, headers: bool = False) -> State:
    content = inner(read_object(path, headers), path)
    if isinstance(content, dict):
        # such as a LoRA's alpha
        content = {k: torch.tensor(v) if isinstance(v, (int, float)) and "." in str(k) else v
                   for k, v in content.items() if k not in TRAINER}
        if foreign := [str(k) for k, v in content.items() if isinstance(v, Stub)]:
            raise ValueError(f"{path} is no plain file of tensors: {first_ten(foreign)} would run code to load, which "
                             "minidiff never does")
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} should hold a flat dictionary of tensors" + _odd(content))
    if odd := [repr(k) for k in content if not isinstance(k, str)]:
        raise ValueError(f"{path} should hold tensors by their names; {first_ten(odd)} is no name")
    if odd := [k for k, v in content.items() if not (is_dense(v) or headers and v.is_meta)]:
        raise ValueError(f"{path} should hold plain tensors; sparse, nested, quantised, repeated or without their "
                         f"numbers: {first_ten(odd)}")
    while prefix := next((p for p in WRAPPERS if content and all(k.startswith(p) for k in content)), None):
        content = {k.removeprefix(prefix): v for k, v in content.items()}
    return content


def _odd(content: Any) -> str:
    """What stands in the way of a flat dictionary of tensors."""
    if not isinstance(content, dict):
        return f", not a {type(content).__name__}"
    name, value = next((k, v) for k, v in content.items() if not isinstance(v, Tensor))
    return f"; its {name} is a {type(value).__name__}"


def _read_shards(index: Path, headers: bool) -> State:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) and v for v in where.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    if bad := sorted({name for name in where.values() if name in (".", "..") or set(name) & set("/\\:")}):
        raise ValueError(f"{index} points out of its folder: {first_ten(bad)}")
    # as in diffusers, all that is in the shards, wherever the index says that a tensor is
    return {key: tensor for name in sorted(set(where.values())) for key, tensor in
            _read(index.parent / name, headers).items()}


def _pointwise(a: Tensor, b: Tensor) -> bool:
    """Whether one is a matrix and the other the same as a 1×1 convolution."""
    return {a.ndim, b.ndim} == {2, 4} and a.shape[:2] == b.shape[:2] and a.numel() == b.numel()


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite: one pass, no temporary; a sum that overflows is looked at again."""
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.half()).all())  # of 8 bits: not asked


def _variant_hint(folder: Path, stems: tuple[str, str], variant: str | None) -> str:
    """Which variant would find a file, or an index of shards."""
    name = re.compile(r"([^.]+)(?:\.(?P<file>[^.-]+))?\.(?:safetensors|bin)"
                      r"(?P<index>\.index(?:\.(?P<tag>[^.]+))?\.json)?")
    files = [match for path in folder.iterdir() if (match := name.fullmatch(path.name)) and match[1] in stems]
    tags = {match["tag" if match["index"] else "file"] or "" for match in files} - {variant or ""}
    return f"; variant={min(tags) or None!r} would take it" if tags else ""


def first_ten(names: Iterable[str]) -> str:
    """Ten names in alphabetical order, and how many more there are.

    >>> first_ten(map(str, range(100, 112)))
    '100, 101, 102, 103, 104, 105, 106, 107, 108, 109 and 2 more'
    """
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
