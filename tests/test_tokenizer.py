"""CLIP's byte-pair encoding: learned, read, found and written."""
import gzip
import json
import os
import shutil
import sys

import pytest
import torch

from minidiff.io.tokenizer import find_vocabulary, load_tokenizer, load_tokenizers, train_tokenizer
from minidiff.text import tokenize
from tests import tiny

pytestmark = pytest.mark.quick


def test_the_vocabulary_has_clips_layout(vocabulary):
    vocab = json.loads((vocabulary / "vocab.json").read_text(encoding="utf-8"))
    merges = (vocabulary / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    words = list(vocab)
    assert list(vocab.values()) == list(range(512 + len(merges) + 2))
    assert words[:3] == ["!", '"', "#"] and words[256:259] == ["!</w>", '"</w>', "#</w>"]
    assert words[512:-2] == [merge.replace(" ", "") for merge in merges]
    assert words[-2:] == ["<|startoftext|>", "<|endoftext|>"]


def test_training_is_reproducible_and_stops_at_merges(vocabulary, tmp_path):
    for i in range(3):
        train_tokenizer(tiny.CAPTIONS, tmp_path / "again")
        assert (tmp_path / "again" / "vocab.json").read_bytes() == (vocabulary / "vocab.json").read_bytes()
    train_tokenizer(tiny.CAPTIONS, tmp_path / "few", merges=20)
    assert load_tokenizer(tmp_path / "few").get_vocab_size() == 512 + 20 + 2


def test_frequent_words_become_one_token(tokenizer):
    assert tokenizer.encode("large red house").tokens[1:4] == ["large</w>", "red</w>", "house</w>"]


def test_a_prompt_starts_ends_and_is_padded_to_77(tokenizer):
    ids = tokenize(tokenizer, ["", "a red house", "red " * 200])
    start, end = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    assert ids.shape == (3, 77) and ids.dtype == torch.int64
    assert (ids[:, 0] == start).all() and (ids[:, -1] == end).all()
    assert (ids[0, 1:] == end).all() and (ids[2, 1:-1] == ids[2, 1]).all()


def test_any_unicode_is_tokenized(tokenizer):
    assert (tokenize(tokenizer, ["日本語 🙂 \x00 é"])[0] < tokenizer.get_vocab_size()).all()


def test_case_and_white_space_do_not_matter(tokenizer):
    a, b = tokenize(tokenizer, ["A  Red\n\tHOUSE ", "a red house"])
    assert a.equal(b)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither vocab.json and merges.txt nor tokenizer.json in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "content"), [
    ("vocab.json", "{"), ("vocab.json", '{"a": "b"}'), ("vocab.json", '{"a": 0}'), ("merges.txt", "one two three\n"),
    ("merges.txt", "zz qq\n")])
def test_a_garbled_tokenizer_is_named(vocabulary, tmp_path, name, content):
    for file in vocabulary.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="garbled|lacks"):
        load_tokenizer(tmp_path)


def test_files_with_a_byte_order_mark_load(vocabulary, tokenizer, tmp_path):
    to = tiny.changed(vocabulary, tmp_path)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (to / name).write_text((vocabulary / name).read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_tokenizer(to).encode("a red house").ids == tokenizer.encode("a red house").ids


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with nothing around it: no cache, no packages."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    for name in ("clip", "open_clip"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def packed(folder, package):
    """A package as OpenAI's and OpenCLIP's: its merges, gzipped, under a title."""
    place = folder / "packages" / package
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise SystemExit('never imported')")
    merges = (folder / "words" / "merges.txt").read_text(encoding="utf-8").split("\n", 1)[1]
    (place / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(f'"bpe_simple_vocab"\n{merges}'.encode()))
    return place / "bpe_simple_vocab_16e6.txt.gz"


@pytest.mark.parametrize("where", ["tokenizer", ".", "hub/models--openai--clip/snapshots/abc",
                                   "hub/models--someone--model/snapshots/abc/tokenizer"])
def test_a_vocabulary_is_found_in_a_folder(vocabulary, elsewhere, where):
    size = load_tokenizer(vocabulary).get_vocab_size()
    assert find_vocabulary(elsewhere / "model.safetensors", size) is None
    shutil.copytree(vocabulary, elsewhere / where, dirs_exist_ok=True)
    assert find_vocabulary(elsewhere / "model.safetensors", size) == elsewhere / where
    assert find_vocabulary(elsewhere / "model.safetensors", size + 1) is None          # another model's


@pytest.mark.parametrize("package", ["open_clip", "clip"])
def test_a_vocabulary_is_found_in_a_package_that_is_not_imported(vocabulary, elsewhere, package):
    shutil.copytree(vocabulary, elsewhere / "words")
    file, own = packed(elsewhere, package), load_tokenizer(vocabulary)
    assert find_vocabulary(elsewhere / "model.safetensors", own.get_vocab_size()) == file
    first, second = load_tokenizers(file, ["<|endoftext|>", "!"])
    for text in ("a large red house!", "café 日本 <|endoftext|>", "", "red " * 100):
        assert first.encode(text).ids == own.encode(text).ids
    assert second.padding["pad_token"] == "!"
    file.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="bpe_simple_vocab_16e6.txt.gz is garbled"):
        load_tokenizers(file, [None])


@pytest.mark.skipif(not os.environ.get("MINIDIFF_CLIP_TOKENIZER"),
                    reason="MINIDIFF_CLIP_TOKENIZER names no folder with CLIP's vocabulary")
def test_clips_own_vocabulary_is_the_same_packed(elsewhere):
    shutil.copytree(os.environ["MINIDIFF_CLIP_TOKENIZER"], elsewhere / "words")
    own, = load_tokenizers(elsewhere / "words", [None])
    other, = load_tokenizers(packed(elsewhere, "clip"), [None])
    assert own.get_vocab() == other.get_vocab() and own.get_vocab_size() == 49408
    assert find_vocabulary(elsewhere / "model.safetensors", 49408).suffix == ".gz"
    assert own.encode("a photo of an astronaut").ids == other.encode("a photo of an astronaut").ids
