"""Prompts to tokens and embeddings."""
import pytest
import torch

from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.text import Text, lost_words, tokenize, words
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("prompt", "lost"), [
    ("", ""), ("red " * 75, ""), ("red " * 75 + "house, night", "house, night"),
    ("red " * 74 + "xyzzy house", "xyzzy house"), ("red " * 74 + "house, night", "house, night")])
def test_lost_words_start_at_the_first_word_that_is_not_whole(tokenizer, prompt, lost):
    assert lost_words(tokenizer, prompt) == lost


def test_text_skips_layers_and_checks_its_vocabulary(tmp_path):
    text = tiny.pipeline(tmp_path).text
    context, vec = text(["a red house", ""])
    assert context.shape == (2, 77, 24) and vec is None
    assert not torch.allclose(context, text(["a red house", ""], clip_skip=1)[0])


@pytest.mark.parametrize("bad, message", [("caf\udce9", r"the text 'caf\\udce9' holds bytes that are not UTF-8"),
                                          ("\ud83d x", "holds bytes that are not UTF-8"), (b"red", "not a bytes"),
                                          (3, "a prompt is a text, not a int"), (None, "not a NoneType")])
def test_what_is_no_text_is_named_at_every_door(vocabulary, tokenizer, bad, message):
    encoder = CLIPText(CLIPTextConfig.from_dict({**tiny.TEXT, "vocab_size": tokenizer.get_vocab_size()}))
    text = Text([tokenizer], [encoder])
    for door in (lambda: tokenize(tokenizer, ["red", bad]), lambda: lost_words(tokenizer, bad), lambda: text([bad]),
                 lambda: words(tokenizer, bad), lambda: text.chunks(bad)):
        with pytest.raises(ValueError, match=message):
            door()


def test_an_encoder_with_too_few_places_is_named(tokenizer):
    small = {**tiny.TEXT, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 32}
    with pytest.raises(ValueError, match="max_position_embeddings of the text encoder is 32; supported are 77 or more"):
        Text([tokenizer], [CLIPText(CLIPTextConfig.from_dict(small))])
