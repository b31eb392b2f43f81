"""Textual inversion (Gal et al., 2208.01618): files that teach a text encoder a new word, one vector or several."""
from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff.io.tokens import CLOSE, OPEN
from minidiff.io.weights import is_dense, load_state, read_object
from minidiff.text import checked

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from minidiff.nets.clip import CLIPText


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
    return checked(word), parts


def check_word(tokenizer: Tokenizer, encoder: CLIPText, word: str, vectors: Tensor) -> None:
    """Raise the errors of `add_word`, and leave both as they are."""
    table = encoder.text_model.embeddings
    size, width = table.token_embedding.weight.shape
    if vectors.shape[1] != width:
        raise ValueError(f"the vectors of {word!r} are {vectors.shape[1]} wide, those of this model's text encoder "
                         f"{width}: the textual inversion was made for another family of models")
    if OPEN in tokenizer.normalizer.normalize_str(word):
        raise ValueError(f"{word!r} is loaded already; give this textual inversion another token")
    if (tokens := tokenizer.get_vocab_size()) != (known := size + (0 if table.extra is None else len(table.extra))):
        raise ValueError(f"the tokenizer has {tokens} tokens and its text encoder {known}; words can only be added "
                         "where they agree")


def add_word(tokenizer: Tokenizer, encoder: CLIPText, word: str, vectors: Tensor) -> None:
    """Teach a word to a tokenizer and its encoder: wherever it stands alone in a prompt, it becomes these vectors.

    NOTE: in diffusers a word is found inside longer words too: test_a_word_is_found_where_it_stands_alone.

    Args:
        vectors: (n, D): the word then takes n of the prompt's 75 tokens.

    Raises:
        ValueError: the width D is not the encoder's, or the word was added before.
    """
    from tokenizers import AddedToken, Regex, normalizers

    check_word(tokenizer, encoder, word, vectors)
    table, first = encoder.text_model.embeddings, tokenizer.get_vocab_size()
    names = [f"{OPEN}{first + i}{CLOSE}" for i in range(len(vectors))]
    # added tokens are looked for in the normalized text: so the word is written as their names there
    tokenizer.add_tokens([AddedToken(name, normalized=True) for name in names])
    before, after = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"(?i){before}{re.escape(word)}{after}"), "".join(names)), tokenizer.normalizer])
    extra = vectors.to(table.token_embedding.weight)
    table.extra = extra if table.extra is None else torch.cat([table.extra, extra])
