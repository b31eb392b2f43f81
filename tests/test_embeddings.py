"""Textual inversion: new words, of every trainer's file, in one encoder or two."""
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from minidiff.io.embeddings import load_embedding
from minidiff.io.tokenizer import load_tokenizer
from minidiff.io.weights import save_state
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.fixture
def pipe(tmp_path):
    return tiny.pipeline(tmp_path)


def learn(pipe, tmp_path, word: str, vectors: torch.Tensor) -> None:
    save_state({word: vectors}, tmp_path / "learned.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "learned.safetensors") == word


def test_a_word_of_several_vectors_takes_their_place_and_number(pipe, tmp_path):
    vectors = torch.randn(3, 24)
    learn(pipe, tmp_path, "<cat-toy>", vectors)
    size = pipe.text.encoders[0].config.vocab_size
    ids = torch.tensor([pipe.text.tokenizers[0].encode("red <CAT-toy>, house").ids])
    assert ids[0, 2:5].tolist() == [size, size + 1, size + 2]
    table = pipe.text.encoders[0].text_model.embeddings
    assert_close(table(ids)[0, 2:5], vectors + table.position_embedding.weight[2:5])


def test_a_word_is_found_where_it_stands_alone(pipe, tmp_path):
    plain, red = pipe.text(["reddish house"])[0], pipe.text(["red house"])[0]
    learn(pipe, tmp_path, "red", torch.randn(24))
    assert torch.equal(pipe.text(["reddish house"])[0], plain)
    assert not torch.equal(pipe.text(["red house"])[0], red)


def test_new_words_leave_the_saved_model_as_it_was(pipe, tmp_path):
    before = tiny.snapshot(pipe)
    learn(pipe, tmp_path, "<a>", torch.randn(2, 24))
    learn(pipe, tmp_path, "<b>", torch.randn(24))
    pipe.save_pretrained(tmp_path / "model")
    again = type(pipe).from_pretrained(tmp_path / "model", device="cpu")
    assert tiny.unchanged(tiny.snapshot(again), before)
    assert not torch.equal(again.text(["<a>"])[0], pipe.text(["<a>"])[0])


def test_the_end_of_text_is_found_beside_new_words():
    """Old configs say eos_token_id 2, for: the largest id. New words have larger ones."""
    config = {**tiny.TEXT, "vocab_size": 60, "with_projection": True}
    torch.manual_seed(0)
    old = CLIPText(CLIPTextConfig.from_dict({**config, "eos_token_id": 2})).eval()
    new = CLIPText(CLIPTextConfig.from_dict({**config, "eos_token_id": 59})).eval()
    new.load_state_dict(old.state_dict())
    for net in (old, new):
        net.text_model.embeddings.extra = torch.ones(1, 24)
    ids = torch.tensor([[58, 3, 60, 4, 59, 59]])
    assert torch.equal(old(ids)[1], new(ids)[1])


@pytest.mark.parametrize("state, message", [
    ({"<a>": torch.ones(2, 16)}, "are 16 wide, those of this model's text encoder 24.*another family"),
    ({"<a>": torch.ones(2, 24), "<b>": torch.ones(24)}, "is no textual inversion: it should hold one word"),
    ({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 32)}, "made for 2 text encoder"),
    ({" ": torch.ones(24)}, "the word ' ' for .*bad.safetensors is blank; give another token"),
    ({"<a>": torch.ones(0, 24)}, r"a tensor \(vectors, width\) of finite numbers"),
    ({"<a>": torch.ones(1, 2, 24)}, r"a tensor \(vectors, width\) of finite numbers"),
    ({"<a>": torch.ones(24, dtype=torch.int64)}, r"a tensor \(vectors, width\) of finite numbers"),
    ({"<a>": torch.ones(())}, r"a tensor \(vectors, width\) of finite numbers"),
    ({"clip_l": torch.ones(2, 24), "clip_g": torch.ones(1, 32)}, "clip_l has 2 vectors and clip_g 1; they need"),
    ({}, "it should hold one word with its vectors"),
    ({"<a>": torch.full((24,), torch.inf)}, r"a tensor \(vectors, width\) of finite numbers"),
])
def test_an_embedding_that_does_not_fit_is_one_sentence(pipe, state, message, tmp_path):
    save_state(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        pipe.load_textual_inversion(tmp_path / "bad.safetensors")


def test_the_same_word_twice_is_an_error(pipe, tmp_path):
    learn(pipe, tmp_path, "<a>", torch.ones(24))
    with pytest.raises(ValueError, match="'<a>' is loaded already; give this textual inversion another token"):
        pipe.load_textual_inversion(tmp_path / "learned.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "learned.safetensors", token="<b>") == "<b>"


@pytest.mark.parametrize("make", [
    lambda v: {"string_to_param": nn.ParameterDict({"*": nn.Parameter(v)}), "string_to_token": {"*": torch.ones(())}},
    lambda v: {"string_to_param": nn.ParameterDict({"<cat>": nn.Parameter(v)}), "name": None},
    lambda v: {"string_to_param": {"*": v.half()}, "name": "<cat>", "step": np.int64(3), "sd_checkpoint": None},
    lambda v: {"<cat>": v.double(), "step": 500}, lambda v: {"<cat>": v[0]}, lambda v: {"emb_params": v, "name": 3},
    lambda v: {"string_to_param": {"*": v.bfloat16()}, "name": ""}, lambda v: {"*": nn.Parameter(v)}])
@pytest.mark.parametrize("legacy", [False, True])
def test_embeddings_of_every_trainer_load(pipe, make, legacy, tmp_path):
    vectors = torch.arange(24.0).expand(2, 24).clone()
    torch.save(make(vectors), tmp_path / "<cat>.pt", _use_new_zipfile_serialization=not legacy)
    word, [found] = load_embedding(tmp_path / "<cat>.pt")
    assert word == "<cat>" and found.dtype == torch.float32 and torch.equal(found, vectors[:len(found)])
    assert pipe.load_textual_inversion(tmp_path / "<cat>.pt") == "<cat>"


def test_a_word_that_is_no_text_is_named(pipe, tmp_path):
    vectors = torch.ones(24)
    torch.save({"string_to_param": {"*": vectors}, "name": 7}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="the word 7 for .*a.pt is no text; give another token"):
        pipe.load_textual_inversion(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the text 'caf\\udce9' holds bytes that are not UTF-8"):
        pipe.load_textual_inversion(tmp_path / "a.pt", token="caf\udce9")


def test_a_pair_that_fits_one_encoder_of_two_is_learned_by_none(tmp_path):
    """As with SDXL: the first encoder must not keep what the second refuses."""
    pipe = tiny.pipeline(tmp_path)
    pipe.text.tokenizers.append(load_tokenizer(tmp_path))
    config = {**tiny.TEXT, "hidden_size": 32, "vocab_size": pipe.text.tokenizers[0].get_vocab_size()}
    pipe.text.encoders.append(CLIPText(CLIPTextConfig.from_dict(config)))
    save_state({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 24)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="are 24 wide, those of this model's text encoder 32"):
        pipe.load_textual_inversion(tmp_path / "x.safetensors")
    save_state({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 32)}, tmp_path / "x.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "x.safetensors") == "x"


def test_an_embedding_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    for held in ({"*": Evil()}, Evil(), nn.ParameterDict({"*": nn.Parameter(torch.ones(1))})):
        if isinstance(held, nn.ParameterDict):
            held._parameters["*"] = Evil()
        torch.save({"string_to_param": held}, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match="is no textual inversion"):
            load_embedding(tmp_path / "evil.pt")
    assert not (tmp_path / "hacked").exists()


def test_vectors_that_are_not_plain_are_named_and_an_encoders_name_is_no_word(tmp_path):
    for vectors in (torch.ones(2, 24).to_sparse(), torch.ones(2, 24, device="meta")):
        torch.save({"<a>": vectors}, tmp_path / "a.bin")
        with pytest.raises(ValueError, match="is no textual inversion: that is a tensor"):
            load_embedding(tmp_path / "a.bin")
    save_file({"clip_l": torch.ones(2, 24)}, tmp_path / "cat.safetensors")
    assert load_embedding(tmp_path / "cat.safetensors")[0] == "cat"
    with pytest.raises(ValueError, match="the word '' for .* is blank; give another token"):
        load_embedding(tmp_path / "cat.safetensors", token="")
