"""Prompts to tokens and embeddings."""

import json
import shutil

import pytest
import torch

from minidiff.io.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.text import Text, lost_words, tokenize, words
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_tokenizer(tiny.CAPTIONS, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_the_vocabulary_has_clips_layout(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    words = list(vocab)
    assert list(vocab.values()) == list(range(512 + len(merges) + 2))
    assert words[:3] == ["!", '"', "#"] and words[256:259] == ["!</w>", '"</w>', "#</w>"]
    assert words[512:-2] == [merge.replace(" ", "") for merge in merges]
    assert words[-2:] == ["<|startoftext|>", "<|endoftext|>"]


def test_training_is_reproducible_and_stops_at_merges(folder, tmp_path):
    for i in range(3):
        train_tokenizer(tiny.CAPTIONS, tmp_path / "again")
        assert (tmp_path / "again" / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()
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


@pytest.mark.parametrize(("prompt", "lost"), [
    ("", ""), ("red " * 75, ""), ("red " * 75 + "house, night", "house, night"),
    ("red " * 74 + "xyzzy house", "xyzzy house"), ("red " * 74 + "house, night", "house, night")])
def test_lost_words_start_at_the_first_word_that_is_not_whole(tokenizer, prompt, lost):
    assert lost_words(tokenizer, prompt) == lost


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
def test_a_garbled_tokenizer_is_named(folder, tmp_path, name, content):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="garbled|lacks"):
        load_tokenizer(tmp_path)


def test_text_skips_layers_and_checks_its_vocabulary(tmp_path):
    text = tiny.pipeline(tmp_path).text
    context, vec = text(["a red house", ""])
    assert context.shape == (2, 77, 24) and vec is None
    assert not torch.allclose(context, text(["a red house", ""], clip_skip=1)[0])


@pytest.mark.parametrize("bad, message", [("caf\udce9", r"the text 'caf\\udce9' holds bytes that are not UTF-8"),
                                          ("\ud83d x", "holds bytes that are not UTF-8"), (b"red", "not a bytes"),
                                          (3, "a prompt is a text, not a int"), (None, "not a NoneType")])
def test_what_is_no_text_is_named_at_every_door(folder, tokenizer, bad, message):
    encoder = CLIPText(CLIPTextConfig.from_dict({**tiny.TEXT, "vocab_size": tokenizer.get_vocab_size()}))
    text = Text([tokenizer], [encoder])
    for door in (lambda: tokenize(tokenizer, ["red", bad]), lambda: lost_words(tokenizer, bad), lambda: text([bad]),
                 lambda: words(tokenizer, bad), lambda: text.chunks(bad)):
        with pytest.raises(ValueError, match=message):
            door()


def changed(folder, tmp_path, **files):
    """A copy of a tokenizer's folder with these JSON files, or entries of them, changed."""
    to = shutil.copytree(folder, tmp_path / "words")
    for name, content in files.items():
        path = to / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **content}))
    return to


@pytest.mark.parametrize("config, message", [
    ({"model_max_length": 64}, "model_max_length = 64; supported is 77"),
    ({"model_max_length": "77"}, "model_max_length = '77'"), ({"padding_side": "left"}, "padding_side = 'left'"),
    ({"truncation_side": "left"}, "truncation_side = 'left'; supported is 'right'"),
    ({"added_tokens_decoder": {"x": 3}}, "added tokens .* are garbled"),
    ({"added_tokens_decoder": {"9999": {"content": "<cat>"}}},
     "adds '<cat>' with the id 9999; it should be a text with the next")])
def test_what_a_tokenizer_states_and_we_cannot_do_is_named(folder, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(changed(folder, tmp_path, tokenizer_config=config))


@pytest.mark.parametrize("special, message", [
    ({"bos_token": "<s>"}, "bos_token = '<s>'; supported is"),
    ({"eos_token": {"content": "</s>"}}, "eos_token = '</s>'"),
    ({"pad_token": {"content": 3}}, "pad_token = 3; it should be a text"), ({"pad_token": "<pad>"}, "lacks <pad>"),
    ({"pad_token": ["!"]}, r"pad_token = \['!'\]"), ({"unk_token": 5}, "special token 5; it should be a text"),
    ({"additional_special_tokens": [None]}, "special token None; it should be a text")])
def test_special_tokens_that_are_not_clips_are_named(folder, tmp_path, special, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(changed(folder, tmp_path, special_tokens_map=special))


@pytest.mark.parametrize("config", [{"model_max_length": None}, {"model_max_length": 10**30},
                                    {"model_max_length": 1e30}, {"model_max_length": 77.0},
                                    {"pad_token": None}, {"do_lower_case": False}])
def test_what_means_nothing_else_is_accepted(folder, tokenizer, tmp_path, config):
    """As in transformers, whose CLIP lowers the case whatever the config says."""
    found = load_tokenizer(changed(folder, tmp_path, tokenizer_config=config))
    assert found.encode("A Red house").ids == tokenizer.encode("a red house").ids


def test_the_padding_of_a_whole_tokenizer_counts(folder, tmp_path):
    whole = load_tokenizer(folder, "!")
    (tmp_path / "x").mkdir()
    whole.save(str(tmp_path / "x" / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "x").padding["pad_token"] == "!"


def test_added_tokens_are_words_and_stay_when_saved(folder, tokenizer, tmp_path):
    size = tokenizer.get_vocab_size()
    for name, entries in (("added_tokens", {"<cat>": size}),
                          ("tokenizer_config", {"added_tokens_decoder": {str(size): {"content": "<cat>"}}})):
        (tmp_path / name).mkdir()
        found = load_tokenizer(changed(folder, tmp_path / name, **{name: entries}))
        assert found.encode("red <cat>").ids[2] == size and found.get_vocab_size() == size + 1
        save_tokenizer(found, tmp_path / name / "again")
        assert load_tokenizer(tmp_path / name / "again").encode("red <cat>").ids[2] == size


def test_files_with_a_byte_order_mark_load(folder, tokenizer, tmp_path):
    to = changed(folder, tmp_path)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (to / name).write_text((folder / name).read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_tokenizer(to).encode("a red house").ids == tokenizer.encode("a red house").ids


def test_an_encoder_with_too_few_places_is_named(tokenizer):
    small = {**tiny.TEXT, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 32}
    with pytest.raises(ValueError, match="max_position_embeddings of the text encoder is 32; supported are 77 or more"):
        Text([tokenizer], [CLIPText(CLIPTextConfig.from_dict(small))])


def test_a_whole_tokenizer_of_another_side_is_named_and_its_dropout_is_left_out(folder, tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for name, side in (("padding", "padding_side"), ("truncation", "truncation_side")):
        changed = {**content, name: {**content[name], "direction": "Left"}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{side} = 'left'; supported is 'right'"):
            load_tokenizer(tmp_path)
    random = {**content, "normalizer": None, "model": {**content["model"], "dropout": 1.0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(random))
    assert load_tokenizer(tmp_path).encode("A Red house").ids == tokenizer.encode("a red house").ids
