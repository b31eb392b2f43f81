"""Prompts to embeddings: CLIP's byte-pair encoding (Radford et al. 2021, arXiv 2103.00020) and its text encoder."""
from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minidiff import values
from minidiff.io.checkpoint import named
from minidiff.io.emphasis import parse
from minidiff.io.plain_text import read_json
from minidiff.io.tokenizer import load_tokenizer, load_tokenizers
from minidiff.io.tokens import BOS, CLOSE, EOS, LENGTH, OPEN
from minidiff.io.weights import load_state, variant_of
from minidiff.nets.clip import CLIPText

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Text(nn.Module):
    """Tokenizers and CLIP text encoders: `text(prompts) -> (context, vec)`, what conditions the U-Net.

    Stable Diffusion 1 and 2 have one encoder: context is its last layer, normed. SDXL has two, the last one with a
    projection: context is the layer before the last of both, not normed, side by side; vec the projected end token.

    Args:
        tokenizers, encoders: one or two of each.

    >>> from minidiff.io.weights import weights_dir
    >>> text = Text.from_pretrained(weights_dir() / "mini-sd")
    >>> context, vec = text(["a red house", ""])
    >>> context.shape, vec
    (torch.Size([2, 77, 128]), None)
    """

    def __init__(self, tokenizers: Iterable[Tokenizer], encoders: Iterable[CLIPText]):
        super().__init__()
        self.tokenizers, self.encoders = list(tokenizers), nn.ModuleList(encoders)
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            tokens, known = tokenizer.get_vocab_size(), encoder.config.vocab_size
            if tokens > known:
                raise ValueError(f"the tokenizer has {tokens} tokens, but its text encoder only {known}")
            if (places := encoder.config.max_position_embeddings) < LENGTH:
                raise ValueError(f"max_position_embeddings of the text encoder is {places}; supported are {LENGTH} or "
                                 "more")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, tokenizer: str | Path | None = None, variant: str | None = None,
                        device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Text:
        """Load `tokenizer/` and `text_encoder/` of a diffusers folder, and those with `_2` where its index names them.

        Args:
            tokenizer: take it from this folder instead, see `load_tokenizers`.
            variant: see `minidiff.io.weights.variant_of`.

        Raises:
            FileNotFoundError, ValueError: a file is missing, or is not what its name says.
        """
        folder = Path(folder)
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
        ends = [end for end in ("", "_2") if named(index, f"text_encoder{end}")] or [""]
        if tokenizer is None:
            tokenizers = [load_tokenizer(folder / f"tokenizer{end}") for end in ends]
        else:
            tokenizers = load_tokenizers(tokenizer, [None] * len(ends))
        encoders = []
        for part in (folder / f"text_encoder{end}" for end in ends):
            values, name = read_json(part / "config.json"), named(index, part.name)
            values |= {"architectures": [name]} if name else {}          # diffusers takes the class from the index too
            state = load_state(part, CLIPText.stem, variant_of(part, variant))
            encoders.append(CLIPText.from_state(values, state, part, device=device, dtype=dtype))
        return cls(tokenizers, encoders)

    @property
    def pooled(self) -> bool:
        """Whether prompts have a vec too, as in SDXL."""
        return self.encoders[-1].config.with_projection

    @property
    def width(self) -> int:
        """Of the context: D."""
        return sum(encoder.config.hidden_size for encoder in self.encoders)

    def forward(self, prompts: list[str], clip_skip: int = 0, *, prompts_2: list[str] | None = None,
                chunks: int = 1, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Encode prompts.

        Args:
            prompts: B texts; what does not fit is cut off (`lost_words` tells).
            clip_skip: leave out the last clip_skip layers of each encoder.
            prompts_2: B texts for the second encoder instead.
            chunks: read so many times 75 tokens, each with a start and an end of its own, as AUTOMATIC1111's web UI;
                vec is that of the first.
            weights: read (red:1.3), [red] and BREAK, see `minidiff.io.emphasis`: each token's vector is multiplied by
                its weight, and all of a chunk by what brings its mean back. vec stays as it is.

        Matches:
            with weights, AUTOMATIC1111's "original" emphasis and the recipe of diffusers' community pipeline
            lpw_stable_diffusion: tests/parity/test_clip.py.

        Returns:
            context (B,77·chunks,D), one vector per token, and vec (B,P), one per prompt, or None without projection.

        Raises:
            ValueError: a prompt is no text, see `values.text`.
        """
        texts = [prompts, prompts_2 or prompts][-len(self.encoders):]
        parts, vec = [], None
        for tokenizer, encoder, text in zip(self.tokenizers, self.encoders, texts):
            device = next(encoder.parameters()).device
            ids, weight = weigh(tokenizer, text, chunks) if weights else (tokenize(tokenizer, text, chunks), None)
            x, vec = encoder(ids.to(device).view(-1, LENGTH), clip_skip=clip_skip + self.pooled, norm=not self.pooled)
            if weight is not None:
                # NOTE: the mean of each chunk of each prompt; the web UI takes that of all prompts of a batch
                heavy = x * weight.to(x).view(-1, LENGTH, 1)
                before, after = (each.float().mean((1, 2), keepdim=True) for each in (x, heavy))
                x = heavy * (before / after).nan_to_num(1.0, 1.0, 1.0).to(x)
            parts.append(x.reshape(len(ids), -1, x.shape[-1]))               # (B, 77·chunks, D)
        return torch.cat(parts, dim=-1), None if vec is None else vec[::chunks]

    def chunks(self, prompt: str, weights: bool = False) -> int:
        """How many times 75 tokens a prompt has, at least 1; with weights, each BREAK begins anew.

        >>> from minidiff.io.weights import weights_dir
        >>> Text.from_pretrained(weights_dir() / "mini-sd").chunks("red " * 76)
        2
        """
        if weights:
            return max(len(_weighted(tokenizer, prompt)) for tokenizer in self.tokenizers)
        return max(1 + len(tokenizer.encode(values.text(prompt)).overflowing) for tokenizer in self.tokenizers)


def tokenize(tokenizer: Tokenizer, prompts: list[str], chunks: int = 1) -> Tensor:
    """Token ids (B, 77·chunks) int64, in each chunk: start, at most 75 tokens, end, padding.

    >>> from minidiff.io.weights import weights_dir
    >>> tokenize(load_tokenizer(weights_dir() / "mini-sd" / "tokenizer"), ["", "a red house"]).shape
    torch.Size([2, 77])
    """
    empty = tokenizer.encode("").ids
    read = tokenizer.encode_batch([values.text(prompt) for prompt in prompts])
    rows = [[part.ids for part in (first, *first.overflowing)] for first in read]
    return torch.tensor([sum((row + [empty] * chunks)[:chunks], []) for row in rows])


def weigh(tokenizer: Tokenizer, prompts: list[str], chunks: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and their weights (B, 77·chunks) of prompts with weights; start, end and padding weigh 1.

    NOTE: a chunk ends after 75 tokens; the web UI goes back to a comma, if one is among the last 20.

    >>> from minidiff.io.weights import weights_dir
    >>> ids, weights = weigh(load_tokenizer(weights_dir() / "mini-sd" / "tokenizer"), ["a (red:1.3) house"])
    >>> weights[0, :5]
    tensor([1.0000, 1.0000, 1.3000, 1.0000, 1.0000])
    """
    start, *rest = tokenizer.encode("").ids
    ids, weights = [], []
    for prompt in prompts:
        parts = (_weighted(tokenizer, prompt) + [[]] * chunks)[:chunks]
        ids.append([i for part in parts for i in (start, *(i for i, _ in part), *rest[:LENGTH - 1 - len(part)])])
        weights.append([w for part in parts for w in (1.0, *(w for _, w in part), *[1.0] * (LENGTH - 1 - len(part)))])
    return torch.tensor(ids), torch.tensor(weights)


def _weighted(tokenizer: Tokenizer, prompt: str) -> list[list[tuple[int, float]]]:
    """Of each chunk, at most 75 pairs of token and weight."""
    chunks: list[list[tuple[int, float]]] = [[]]
    for part in parse(values.text(prompt)):
        if part is None:
            chunks.append([])
            continue
        text, weight = part
        first = tokenizer.encode(text)
        for read in (first, *first.overflowing):
            for i in read.ids[1:sum(read.attention_mask) - 1]:               # without start, end and padding
                if len(chunks[-1]) == LENGTH - 2:
                    chunks.append([])
                chunks[-1].append((i, weight))
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def words(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """Each word of a prompt, and the places of its tokens among the 77; punctuation is a word of its own.

    >>> from minidiff.io.weights import weights_dir
    >>> words(load_tokenizer(weights_dir() / "mini-sd" / "tokenizer"), "a red house")
    [('a', [1]), ('red', [2]), ('house', [3])]
    """
    read, grouped, begun = tokenizer.encode(values.text(prompt)), [], False
    for place, (token, (begin, end)) in enumerate(zip(read.tokens, read.offsets)):
        if token in (BOS, EOS):
            continue
        if not begun:
            grouped.append(("", []))
        word, places = grouped.pop()
        grouped.append((word + prompt[begin:end], [*places, place]))
        begun = not token.endswith("</w>")
    return grouped


def lost_words(tokenizer: Tokenizer, prompt: str) -> str:
    """The end of a prompt that does not fit into 77 tokens, from the first word that is not whole; "" if all fits.

    >>> from minidiff.io.weights import weights_dir
    >>> lost_words(load_tokenizer(weights_dir() / "mini-sd" / "tokenizer"), "red " * 75 + "house, night")
    'house, night'
    """
    rest = tokenizer.encode(values.text(prompt)).overflowing
    if not rest:
        return ""
    first = rest[0].offsets[1][0]  # entry 0 is the start token
    return prompt[len(prompt[:first].rstrip()) if prompt[first].isspace() else prompt.rfind(" ", 0, first) + 1:].strip()


def check_word(tokenizer: Tokenizer, encoder: CLIPText, word: str, vectors: Tensor) -> None:
    """See whether a word can be added, and leave both as they are.

    Raises:
        ValueError: as `add_word`.
    """
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
