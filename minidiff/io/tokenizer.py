"""Tokenizers as files: CLIP's byte-pair encoding (Radford et al. 2021, arXiv 2103.00020), read, learned and written."""
from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.io.plain_text import read_json
from minidiff.io.tokens import BOS, EOS, LENGTH, OPEN, add_tokens, stated_tokens
from minidiff.io.write import write_atomic

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# the special tokens, English contractions, runs of letters, single digits, runs of anything else
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def load_tokenizers(folder: str | Path, pads: Iterable[str | None]) -> list[Tokenizer]:
    """One tokenizer or two, with their padding tokens, from a model's folder or from a tokenizer's, which serves both.

    Args:
        folder: or the vocabulary as the packages of CLIP and OpenCLIP carry it, see `find_vocabulary`.

    >>> from minidiff.io.weights import weights_dir
    >>> [words.padding["pad_token"] for words in load_tokenizers(weights_dir() / "mini-sd" / "tokenizer", [None, "!"])]
    ['<|endoftext|>', '!']
    """
    folder = Path(folder)
    folders = [folder / name for name in ("tokenizer", "tokenizer_2")]
    if folders[0].is_dir():
        return [load_tokenizer(words if words.is_dir() else folders[0], pad) for words, pad in zip(folders, pads)]
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
    folder = Path(folder)
    if folder.suffix == ".gz":
        return _finished(_packed(folder), pad or EOS, [], folder)
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
    return _finished(tokenizer, pad or stated["pad_token"] or EOS, stated["special"], folder)


def _finished(tokenizer: Tokenizer, pad: str, special: list[str], folder: Path) -> Tokenizer:
    """The tokenizer, which now starts, ends, cuts and pads."""
    from tokenizers import AddedToken
    from tokenizers.processors import RobertaProcessing

    ids = {token: tokenizer.token_to_id(token) for token in (BOS, EOS, pad)}
    if missing := [token for token, i in ids.items() if i is None]:
        raise ValueError(f"the vocabulary in {folder} lacks {', '.join(missing)}")
    # NOTE: as in transformers the padding token is split off wherever it stands: with Stable Diffusion 2 each "!" is
    # padding in the prompt too, tests/parity/test_text.py test_stable_diffusion_2_pads_with_an_exclamation_mark
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token in (pad, *special) if token == pad or token not in added])
    tokenizer.post_processor = RobertaProcessing((EOS, ids[EOS]), (BOS, ids[BOS]), False, False)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=ids[pad], pad_token=pad, length=LENGTH)
    return tokenizer


def find_vocabulary(file: str | Path, size: int) -> Path | None:
    """Where CLIP's vocabulary is for a model in a single file; None: nowhere.

    Beside the file, in the cache of the Hugging Face Hub, or in an installed open_clip or clip package.

    Args:
        file: of the model. size: how many tokens the vocabulary has.

    Returns:
        A folder, or a file that ends in .gz, for `load_tokenizers`.
    """
    from huggingface_hub import constants

    beside = Path(file).parent
    snapshots = sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*"))
    for folder in (beside / "tokenizer", beside, *snapshots, *(folder / "tokenizer" for folder in snapshots)):
        try:
            if load_tokenizer(folder).get_vocab_size() == size:
                return folder
        except (OSError, ValueError):                                    # none is there, or another model's
            continue
    for name in ("open_clip", "clip"):
        with suppress(ImportError, ValueError):                          # half-installed packages
            spec = importlib.util.find_spec(name)
            for place in (spec.submodule_search_locations or []) if spec else []:
                if (packed := Path(place) / "bpe_simple_vocab_16e6.txt.gz").is_file():
                    return packed
    return None


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


def _packed(file: Path) -> Tokenizer:
    """From the file that OpenAI's CLIP came with: under a title its merges, and more of them than are used."""
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1:49152 - 256 - 2 + 1]
        merges = [(first, second) for first, second in (line.split() for line in lines if line)]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"the vocabulary {file} is garbled: {error}") from error
    symbols = _byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), BOS, EOS]
    return _tokenizer({word: i for i, word in enumerate(words)}, merges)


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte (GPT-2's table): itself, or one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
