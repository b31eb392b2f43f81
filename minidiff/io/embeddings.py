"""Textual inversion (Gal et al., 2208.01618): files that teach a text encoder a new word, one vector or several."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff import values
from minidiff.io.weight_file import read_object
from minidiff.io.weights import is_dense, load_state

if TYPE_CHECKING:

    pass


FORMS = ("emb_params", "*", "clip_l", "clip_g")  # names that are no words


def load_embedding(path: str | Path, token: str | None = None) -> tuple[str, list[Tensor]]:
    """Read a textual inversion.

    The forms: diffusers' `{"<word>": vectors}`; AUTOMATIC1111's `{"string_to_param": {"*": vectors}, "name": word}`,
    and `{"emb_params": vectors}` as safetensors; SDXL's `{"clip_l": vectors, "clip_g": vectors}`.

    Args:
        token: the word for it; None: the one in the file, else the file's name.

    Returns:
        The word, and its vectors (n, D) for each text encoder, float32.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or has none of these forms.

    >>> import tempfile
    >>> from minidiff.io.weights import save_state
    >>> folder = tempfile.TemporaryDirectory()
    >>> save_state({"<cat-toy>": torch.zeros(768)}, f"{folder.name}/learned_embeds.safetensors")
    >>> word, [vectors] = load_embedding(f"{folder.name}/learned_embeds.safetensors")
    >>> word, vectors.shape
    ('<cat-toy>', torch.Size([1, 768]))
    """
    path = Path(path)
    # in pickles the vectors may lie deeper
    content, name = (read_object(path) if path.is_file() else load_state(path, "learned_embeds")), None
    if isinstance(content, dict) and "string_to_param" in content:
        content, name = content["string_to_param"], content.get("name")
    # beside them stand a trainer's notes
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if state.keys() == {"clip_l", "clip_g"}:
        parts = [state["clip_l"], state["clip_g"]]
    elif len(state) == 1:
        (key, vectors), = state.items()
        name, parts = name or (key if key not in FORMS else None), [vectors]
    else:
        raise ValueError(f"{path} is no textual inversion: it should hold one word with its vectors, "
                         "string_to_param, or clip_l and clip_g")
    if not all(is_dense(part) and part.is_floating_point() and part.ndim in (1, 2) and part.numel()
               and part.float().isfinite().all() for part in parts):
        raise ValueError(f"{path} is no textual inversion: that is a tensor (vectors, width) of finite numbers")
    parts = [torch.atleast_2d(part.detach().float()) for part in parts]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"{path} is no textual inversion: clip_l has {len(parts[0])} vectors and clip_g "
                         f"{len(parts[1])}; they need as many")
    word = name or path.stem if token is None else token
    if not isinstance(word, str) or not word.strip():
        raise ValueError(f"the word {word!r} for {path} is {'blank' if isinstance(word, str) else 'no text'}; give "
                         "another token")
    return values.text(word), parts
