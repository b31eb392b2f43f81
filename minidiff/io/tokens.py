"""What the files of a tokenizer state beside its vocabulary: special tokens, length, sides, added words."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.io.plain_text import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LENGTH = 77  # tokens of a prompt, start and end included
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
OPEN, CLOSE = "\ue000", "\ue001"  # private-use characters: a word's own name that is added later, in no prompt
MORE = ("additional_special_tokens", "extra_special_tokens")  # lists of others
UNSAID = 10**6  # larger lengths mean in transformers' files that nobody said it


def stated_tokens(folder: Path) -> dict[str, Any]:
    """What the folder says of the tokens; special_tokens_map.json goes first: Stable Diffusion 2 pads with "!".

    Raises:
        ValueError: a length, a side or a token that is not CLIP's.

    >>> from minidiff.io.weights import weights_dir
    >>> stated_tokens(weights_dir() / "mini-sd" / "tokenizer")["pad_token"]
    '<|endoftext|>'
    """
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    whole = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    cut, fill = ({} if not isinstance(whole.get(name), dict) else whole[name] for name in ("truncation", "padding"))
    sides = {"padding_side": fill.get("direction"), "truncation_side": cut.get("direction")}
    stated: dict[str, Any] = {"pad_token": fill.get("pad_token")} | {
        name: str(side).lower() for name, side in sides.items() if side}
    for file in filter(Path.is_file, files):
        stated |= {k: v.get("content") if isinstance(v, dict) and k.endswith("_token") else v
                   for k, v in read_json(file).items() if v}
    right = {"padding_side": "right", "truncation_side": "right"}
    for name, known in {"bos_token": BOS, "eos_token": EOS, **right}.items():
        if stated.get(name, known) != known:
            raise ValueError(f"the tokenizer in {folder} has {name} = {stated[name]!r}; supported is {known!r}")
    length = stated.get("model_max_length", LENGTH)
    if length != LENGTH and not (isinstance(length, (int, float)) and length > UNSAID):
        raise ValueError(f"the tokenizer in {folder} has model_max_length = {length!r}; supported is {LENGTH}")
    if not isinstance(stated["pad_token"], str | None):
        raise ValueError(f"the tokenizer in {folder} has pad_token = {stated['pad_token']!r}; it should be a text")
    listed = [token for key in MORE if isinstance(stated.get(key), list) for token in stated[key]]
    listed += [stated["unk_token"]] if stated.get("unk_token") else []
    stated["special"] = [token.get("content") if isinstance(token, dict) else token for token in listed]
    if odd := [token for token in stated["special"] if not isinstance(token, str) or not token]:
        raise ValueError(f"the tokenizer in {folder} has a special token {odd[0]!r}; it should be a text")
    return stated


def add_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """The tokens that were added to the vocabulary, such as the words of a textual inversion, where files name them.

    Raises:
        ValueError: they are garbled, or their ids do not follow those of the vocabulary.
    """
    from tokenizers import AddedToken

    content = {name: read_json(folder / name) if (folder / name).is_file() else {}
               for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")}
    try:
        listed = [(each["content"], each["id"], each) for each in content["tokenizer.json"].get("added_tokens") or []]
        decoder = content["tokenizer_config.json"].get("added_tokens_decoder") or {}
        listed += [(each["content"], int(i), each) for i, each in decoder.items()]
        listed += [(token, i, {}) for token, i in content["added_tokens.json"].items()]
        for token, i, flags in sorted(listed, key=lambda each: each[1]):
            if tokenizer.token_to_id(token) is None:
                flags = {k: v for k, v in flags.items() if k in ("lstrip", "rstrip", "single_word", "normalized")}
                tokenizer.add_tokens([AddedToken(token, **flags)])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"the added tokens of the tokenizer in {folder} are garbled: {error!r}") from error
    if moved := [(token, i) for token, i, _ in listed if tokenizer.token_to_id(token) != i]:
        raise ValueError("the tokenizer in {} adds {!r} with the id {!r}; it should be a text with the next number of "
                         "its vocabulary".format(folder, *moved[0]))
