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


def test_weights_of_one_change_nothing(tmp_path):
    text = tiny.pipeline(tmp_path).text
    for prompt in ("a red house", "", "red " * 100):
        n = text.chunks(prompt)
        plain, weighted = text([prompt], chunks=n)[0], text([prompt], chunks=n, weights=True)[0]
        assert torch.equal(plain, weighted) and text.chunks(prompt, weights=True) == n


def test_weights_go_to_their_tokens_alone_and_keep_the_mean(tmp_path):
    text = tiny.pipeline(tmp_path).text
    plain, heavy = text(["a red house"])[0][0], text(["a (red:3) house"], weights=True)[0][0]
    torch.testing.assert_close(plain.mean(), heavy.mean())
    ratio = (heavy / plain).mean(-1)
    torch.testing.assert_close(ratio[2] / ratio[1], torch.tensor(3.0))
    assert ratio[[0, 1, 3, 4, 76]].std() < 1e-5


def test_a_break_begins_a_chunk_of_its_own(tmp_path):
    text, more = tiny.pipeline(tmp_path).text, "a red house BREAK snow, night"
    assert text.chunks(more, weights=True) == 2 and text.chunks("a red house BREAK", weights=True) == 1
    context, _ = text([more, "a tree"], chunks=2, weights=True)
    alone = text(["a red house", "snow, night", "a tree", ""])[0]
    torch.testing.assert_close(context, torch.cat([torch.cat([alone[0], alone[1]])[None],
                                                   torch.cat([alone[2], alone[3]])[None]]))
