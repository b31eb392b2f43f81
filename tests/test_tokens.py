"""What the files of a tokenizer state beside its vocabulary."""
import json

import pytest

from minidiff.io.tokenizer import load_tokenizer, save_tokenizer
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("config, message", [
    ({"model_max_length": 64}, "model_max_length = 64; supported is 77"),
    ({"model_max_length": "77"}, "model_max_length = '77'"), ({"padding_side": "left"}, "padding_side = 'left'"),
    ({"truncation_side": "left"}, "truncation_side = 'left'; supported is 'right'"),
    ({"added_tokens_decoder": {"x": 3}}, "added tokens .* are garbled"),
    ({"added_tokens_decoder": {"9999": {"content": "<cat>"}}},
     "adds '<cat>' with the id 9999; it should be a text with the next")])
def test_what_a_tokenizer_states_and_we_cannot_do_is_named(vocabulary, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tiny.changed(vocabulary, tmp_path, tokenizer_config=config))


@pytest.mark.parametrize("special, message", [
    ({"bos_token": "<s>"}, "bos_token = '<s>'; supported is"),
    ({"eos_token": {"content": "</s>"}}, "eos_token = '</s>'"),
    ({"pad_token": {"content": 3}}, "pad_token = 3; it should be a text"), ({"pad_token": "<pad>"}, "lacks <pad>"),
    ({"pad_token": ["!"]}, r"pad_token = \['!'\]"), ({"unk_token": 5}, "special token 5; it should be a text"),
    ({"additional_special_tokens": [None]}, "special token None; it should be a text")])
def test_special_tokens_that_are_not_clips_are_named(vocabulary, tmp_path, special, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tiny.changed(vocabulary, tmp_path, special_tokens_map=special))


@pytest.mark.parametrize("config", [{"model_max_length": None}, {"model_max_length": 10**30},
                                    {"model_max_length": 1e30}, {"model_max_length": 77.0},
                                    {"pad_token": None}, {"do_lower_case": False}])
def test_what_means_nothing_else_is_accepted(vocabulary, tokenizer, tmp_path, config):
    """As in transformers, whose CLIP lowers the case whatever the config says."""
    found = load_tokenizer(tiny.changed(vocabulary, tmp_path, tokenizer_config=config))
    assert found.encode("A Red house").ids == tokenizer.encode("a red house").ids


def test_the_padding_of_a_whole_tokenizer_counts(vocabulary, tmp_path):
    whole = load_tokenizer(vocabulary, "!")
    (tmp_path / "x").mkdir()
    whole.save(str(tmp_path / "x" / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "x").padding["pad_token"] == "!"


def test_added_tokens_are_words_and_stay_when_saved(vocabulary, tokenizer, tmp_path):
    size = tokenizer.get_vocab_size()
    for name, entries in (("added_tokens", {"<cat>": size}),
                          ("tokenizer_config", {"added_tokens_decoder": {str(size): {"content": "<cat>"}}})):
        (tmp_path / name).mkdir()
        found = load_tokenizer(tiny.changed(vocabulary, tmp_path / name, **{name: entries}))
        assert found.encode("red <cat>").ids[2] == size and found.get_vocab_size() == size + 1
        save_tokenizer(found, tmp_path / name / "again")
        assert load_tokenizer(tmp_path / name / "again").encode("red <cat>").ids[2] == size


def test_a_whole_tokenizer_of_another_side_is_named_and_its_dropout_is_left_out(vocabulary, tokenizer, tmp_path):
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
