"""Token ids equal transformers' CLIPTokenizer, on a small vocabulary and on CLIP's own."""

import json
import os

import pytest
from transformers import CLIPTokenizer

from minidiff.io.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from minidiff.text import tokenize
from tests import tiny

TEXTS = ["A photo of an astronaut riding a horse on mars", "Hello,   World!!  it's 2024 & 3.14",
         "café naïve — “quotes” 日本語 🙂", "(masterpiece:1.2), best_quality", "don't we'll I'm",
         "<|startoftext|>x<|endoftext|>y", "", " ", "  <|ENDOFTEXT|> a\n\tb", "red " * 100, "e\u0301 \x00 \u200b ǅ ﬁ"]
CLIP = os.environ.get("MINIDIFF_CLIP_TOKENIZER")
needs_clip = pytest.mark.skipif(not CLIP, reason="MINIDIFF_CLIP_TOKENIZER names no folder with CLIP's vocabulary")


def assert_same_ids(folder):
    theirs = CLIPTokenizer.from_pretrained(folder)
    want = theirs(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert tokenize(load_tokenizer(folder), TEXTS).tolist() == want.tolist()


def test_a_trained_vocabulary_loads_in_transformers(tmp_path):
    train_tokenizer(tiny.CAPTIONS, tmp_path)
    assert_same_ids(tmp_path)


def test_what_transformers_saves_loads(tmp_path):
    train_tokenizer(tiny.CAPTIONS, tmp_path / "ours")
    CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.json").unlink(missing_ok=True)
    assert_same_ids(tmp_path / "theirs")
    save_tokenizer(load_tokenizer(tmp_path / "theirs"), tmp_path / "back")
    assert (tmp_path / "back" / "vocab.json").read_text() == (tmp_path / "ours" / "vocab.json").read_text()
    assert (tmp_path / "back" / "merges.txt").read_text() == (tmp_path / "ours" / "merges.txt").read_text()


@pytest.mark.parametrize("form", ["whole", "added_tokens", "decoder"])
def test_added_tokens_are_transformers_tokens(tmp_path, form):
    """As a pipeline with a textual inversion is saved: tokenizer.json, or files of the years before it."""
    train_tokenizer(tiny.CAPTIONS, tmp_path / "ours")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "ours")
    theirs.add_tokens(["<cat>", "Dog_1"])
    folder = tmp_path / "theirs"
    if form == "whole":
        theirs.save_pretrained(folder)
    else:
        size = len(theirs) - 2
        save_tokenizer(load_tokenizer(tmp_path / "ours"), folder)
        if form == "added_tokens":
            (folder / "added_tokens.json").write_text(json.dumps({"<cat>": size, "Dog_1": size + 1}))
        else:
            path, names = folder / "tokenizer_config.json", ("<cat>", "Dog_1")
            added = {str(size + i): {"content": name, "normalized": True} for i, name in enumerate(names)}
            path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": added}))
    texts = ["a <cat> on a dog_1", "<CAT> house Dog_1s", "red<cat>tree"]
    want = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    assert tokenize(load_tokenizer(folder), texts).tolist() == want


@needs_clip
def test_clips_own_vocabulary():
    assert_same_ids(CLIP)


@needs_clip
def test_stable_diffusion_2_pads_with_an_exclamation_mark(tmp_path):
    tokenizer = load_tokenizer(CLIP)
    tokenizer.enable_padding(pad_id=0, pad_token="!", length=77)
    save_tokenizer(tokenizer, tmp_path)
    assert_same_ids(tmp_path)
    assert tokenize(load_tokenizer(tmp_path), ["a"])[0, 2:5].tolist() == [49407, 0, 0]
    assert tokenize(load_tokenizer(tmp_path), ["a!!"])[0, 2:5].tolist() == [0, 0, 49407]


@needs_clip
@pytest.mark.parametrize(("text", "ids"), [
    (TEXTS[0], [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]),
    (TEXTS[1], [3306, 267, 1002, 748, 585, 568, 273, 271, 273, 275, 261, 274, 269, 272, 275]),
    (TEXTS[2], [15304, 1097, 35689, 563, 2005, 728, 506, 5808, 728, 507, 39121, 44353, 34002, 508, 14860]),
    (TEXTS[3], [263, 12066, 281, 272, 269, 273, 2361, 949, 318, 3027]),
    (TEXTS[4], [847, 713, 649, 1342, 328, 880]), (TEXTS[5], [49406, 343, 49407, 344])])
def test_published_ids(text, ids):
    row = tokenize(load_tokenizer(CLIP), [text])[0].tolist()
    assert row == [49406, *ids, 49407] + [49407] * (75 - len(ids))


@pytest.mark.parametrize("special", [{"unk_token": "!"}, {"additional_special_tokens": ["!", "red</w>"]},
                                     {"additional_special_tokens": ["<new>"]}])
def test_other_special_tokens_are_transformers_tokens(tmp_path, special):
    train_tokenizer(tiny.CAPTIONS, tmp_path)
    path = tmp_path / "special_tokens_map.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **special}))
    texts = ["a !red!! house", "red<new>tree"]
    want = CLIPTokenizer.from_pretrained(tmp_path)(texts, padding="max_length", max_length=77, truncation=True)
    assert tokenize(load_tokenizer(tmp_path), texts).tolist() == want.input_ids
