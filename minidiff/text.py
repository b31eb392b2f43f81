"""Prompts to embeddings: CLIP's byte-pair encoding (Radford et al. 2021, arXiv 2103.00020) and its text encoder."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minidiff import values
from minidiff.io.checkpoint import named
from minidiff.io.tokens import BOS, CLOSE, EOS, LENGTH, OPEN, add_tokens, stated_tokens
from minidiff.io.weights import load_state, read_json, variant_of, write_atomic
from minidiff.nets.clip import CLIPText

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# the special tokens, English contractions, runs of letters, single digits, runs of anything else
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


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
        found = [end for end in ("", "_2") if named(index, f"text_encoder{end}")] or [""]
        if tokenizer is None:
            tokenizers = [load_tokenizer(folder / f"tokenizer{end}") for end in found]
        else:
            tokenizers = load_tokenizers(tokenizer, [None] * len(found))
        encoders = []
        for part in (folder / f"text_encoder{end}" for end in found):
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
                chunks: int = 1) -> tuple[Tensor, Tensor | None]:
        """Encode prompts.

        Args:
            prompts: B texts; what does not fit is cut off (`lost_words` tells).
            clip_skip: leave out the last clip_skip layers of each encoder.
            prompts_2: B texts for the second encoder instead.
            chunks: read so many times 75 tokens, each with a start and an end of its own, as AUTOMATIC1111's web UI;
                vec is that of the first.

        Returns:
            context (B,77·chunks,D), one vector per token, and vec (B,P), one per prompt, or None without projection.

        Raises:
            ValueError: a prompt is no text, see `values.text`.
        """
        texts = [prompts, prompts_2 or prompts][-len(self.encoders):]
        parts, vec = [], None
        for tokenizer, encoder, text in zip(self.tokenizers, self.encoders, texts):
            ids = tokenize(tokenizer, text, chunks).to(next(encoder.parameters()).device)
            x, vec = encoder(ids.view(-1, LENGTH), clip_skip=clip_skip + self.pooled, norm=not self.pooled)
            parts.append(x.reshape(len(ids), -1, x.shape[-1]))               # (B, 77·chunks, D)
        return torch.cat(parts, dim=-1), None if vec is None else vec[::chunks]

    def chunks(self, prompt: str) -> int:
        """How many times 75 tokens a prompt has, at least 1.

        >>> from minidiff.io.weights import weights_dir
        >>> Text.from_pretrained(weights_dir() / "mini-sd").chunks("red " * 76)
        2
        """
        return max(1 + len(tokenizer.encode(values.text(prompt)).overflowing) for tokenizer in self.tokenizers)


def load_tokenizers(folder: str | Path, pads: Iterable[str | None]) -> list[Tokenizer]:
    """One tokenizer or two, with their padding tokens, from a model's folder or from a tokenizer's, which serves both.

    >>> from minidiff.io.weights import weights_dir
    >>> [words.padding["pad_token"] for words in load_tokenizers(weights_dir() / "mini-sd" / "tokenizer", [None, "!"])]
    ['<|endoftext|>', '!']
    """
    folder = Path(folder)
    own = [folder / name for name in ("tokenizer", "tokenizer_2")]
    if own[0].is_dir():
        return [load_tokenizer(words if words.is_dir() else own[0], pad) for words, pad in zip(own, pads)]
    return [load_tokenizer(folder, pad) for pad in pads]


def load_tokenizer(folder: str | Path, pad: str | None = None) -> Tokenizer:
    """CLIP's tokenizer from `vocab.json` + `merges.txt`, or from `tokenizer.json`; it starts, ends, cuts and pads.

    Text is normalised (NFC, white space, lower case), split into PIECES, turned into bytes, and the pair of symbols
    that stands first in merges.txt is joined again and again; the last symbol of a piece carries `</w>`.

    Args:
        pad: the token to pad with; None: what the folder says.

    Returns:
        A `tokenizers.Tokenizer` whose `encode(text).ids` has 77 entries.

    Raises:
        FileNotFoundError: neither form is in the folder.
        ValueError: a file is garbled, or states what is not CLIP's: another length, side or special token.

    Matches: transformers' CLIPTokenizer (tests/parity/test_text.py).

    >>> from minidiff.io.weights import weights_dir
    >>> load_tokenizer(weights_dir() / "mini-sd" / "tokenizer").encode("A red  house").tokens[:5]
    ['<|startoftext|>', 'a</w>', 'red</w>', 'house</w>', '<|endoftext|>']
    """
    from tokenizers import AddedToken
    from tokenizers.processors import RobertaProcessing

    folder = Path(folder)
    whole = folder / "tokenizer.json"
    if not whole.is_file() and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise FileNotFoundError(f"there is neither vocab.json and merges.txt nor tokenizer.json in {folder}")
    stated = stated_tokens(folder)
    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").splitlines()
            vocab, merges = read_json(folder / "vocab.json"), [line for line in lines if line[:8] != "#version"]
        else:       # as in transformers, whatever else it says: of one vocabulary there is one CLIP tokenizer
            vocab, merges = (read_json(whole)["model"][name] for name in ("vocab", "merges"))
        pairs = [tuple(line.split(" ") if isinstance(line, str) else line) for line in merges if line]
        tokenizer = _tokenizer(vocab, pairs)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"the tokenizer in {folder} is garbled: {error}".splitlines()[0]) from error
    add_tokens(tokenizer, folder)
    bos, eos = BOS, EOS
    pad = pad or stated["pad_token"] or EOS
    ids = {token: tokenizer.token_to_id(token) for token in (bos, eos, pad)}
    if missing := [token for token, i in ids.items() if i is None]:
        raise ValueError(f"the vocabulary in {folder} lacks {', '.join(missing)}")
    # NOTE: as in transformers the padding token is split off wherever it stands: with Stable Diffusion 2 each "!" is
    # padding in the prompt too, tests/parity/test_text.py test_stable_diffusion_2_pads_with_an_exclamation_mark
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token in (pad, *stated["special"]) if token == pad or token not in added])
    tokenizer.post_processor = RobertaProcessing((eos, ids[eos]), (bos, ids[bos]), False, False)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=ids[pad], pad_token=pad, length=LENGTH)
    return tokenizer


def train_tokenizer(captions: Iterable[str], folder: str | Path, merges: int = 512) -> None:
    """Learn a vocabulary in CLIP's format: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1).

    The vocabulary is the 256 bytes, the same with `</w>`, one entry per merge and the two special tokens, the end
    token last (its id is the largest, which CLIP uses to find it).

    Args:
        captions: the texts to learn from.
        folder: gets vocab.json, merges.txt, special_tokens_map.json, tokenizer_config.json (transformers reads them).
        merges: at most so many; fewer once every piece is one token.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> train_tokenizer(["a red house", "a red tree"], folder.name)
    >>> load_tokenizer(folder.name).encode("red house").tokens[1:3]
    ['red</w>', 'house</w>']
    """
    from tokenizers.trainers import BpeTrainer

    symbols = _byte_symbols()
    symbols += [symbol + "</w>" for symbol in symbols]
    # as special tokens the symbols have fixed ids, by which the trainer decides between equally frequent pairs
    trainer = BpeTrainer(vocab_size=len(symbols) + merges, special_tokens=symbols, end_of_word_suffix="</w>",
                         show_progress=False)
    learner = _tokenizer({}, [])
    learner.train_from_iterator(captions, trainer)
    learned = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = [*symbols, *map("".join, learned), BOS, EOS]
    save_tokenizer(_tokenizer({word: i for i, word in enumerate(words)}, learned), folder)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write vocab.json, merges.txt, special_tokens_map.json and tokenizer_config.json, which transformers reads too.

    Words beyond the vocabulary that the files had go to added_tokens.json; those of textual inversions stay out.
    """
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    pad = (tokenizer.padding or {}).get("pad_token", EOS)
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special}
    lines = ["#version: 0.2", *map(" ".join, model["merges"])]
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()
             if token.content not in vocab and not token.content.startswith(OPEN)}
    folder = Path(folder)
    if added:
        write_atomic(folder / "added_tokens.json", json.dumps(added, indent=2) + "\n")
    write_atomic(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
    write_atomic(folder / "merges.txt", "\n".join(lines) + "\n")
    write_atomic(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


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


def words(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """Each word of a prompt, and the places of its tokens among the 77; punctuation is a word of its own.

    >>> from minidiff.io.weights import weights_dir
    >>> words(load_tokenizer(weights_dir() / "mini-sd" / "tokenizer"), "a red house")
    [('a', [1]), ('red', [2]), ('house', [3])]
    """
    read, found, begun = tokenizer.encode(values.text(prompt)), [], False
    for place, (token, (begin, end)) in enumerate(zip(read.tokens, read.offsets)):
        if token in (BOS, EOS):
            continue
        if not begun:
            found.append(("", []))
        word, places = found.pop()
        found.append((word + prompt[begin:end], [*places, place]))
        begun = not token.endswith("</w>")
    return found


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


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=EOS,
                                     continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    if vocab:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (BOS, EOS)])
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte (GPT-2's table): itself, or one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
