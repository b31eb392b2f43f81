"""Prompts as tensors: chunks, embeddings, SDXL's two encoders and zeros."""

import dataclasses
import warnings

import pytest
import torch
from torch.testing import assert_close

from minidiff.io.tokenizer import load_tokenizer, train_tokenizer
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.nets.unet import UNetConfig
from minidiff.schedule import SD
from minidiff.sd.conditions import encode, plan, rows
from minidiff.sd.scheduler import SD_CONFIG
from minidiff.sd.settings import Settings
from minidiff.text import Text
from tests import tiny

pytestmark = pytest.mark.quick
LONG = "red " * 80 + "house"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_tokenizer(tiny.CAPTIONS, folder)
    return load_tokenizer(folder)


def encoder(tokenizer, seed, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
        return CLIPText(CLIPTextConfig.from_dict({**tiny.TEXT, **ids, **more})).eval()


@pytest.fixture(scope="module")
def one(tokenizer):
    return Text([tokenizer], [encoder(tokenizer, 0)])


@pytest.fixture(scope="module")
def two(tokenizer):
    return Text([tokenizer] * 2, [encoder(tokenizer, 0), encoder(tokenizer, 1, hidden_size=32, with_projection=True)])


def conditions(text, prompt, zeros=False, guided=True, **settings):
    return encode(text, prompt, Settings(**settings), guided=guided, zeros=zeros)


def test_long_prompts_are_read_in_chunks_of_75_tokens(one):
    (context, _), (other, _) = conditions(one, LONG, long=True)
    assert context.shape == other.shape == (1, 2 * 77, 24)
    first, _ = one(["red " * 75])
    second, _ = one(["red " * 5 + "house"])
    assert_close(context, torch.cat([first, second], 1))
    empty, _ = one([""])
    assert_close(other, torch.cat([empty, empty], 1))


def test_the_longest_text_says_how_many_chunks(one):
    (context, _), (other, _) = conditions(one, ["a tree", LONG], negative_prompt=[LONG + LONG, ""], long=True)
    assert context.shape == other.shape == (2, 3 * 77, 24)
    assert conditions(one, "a tree", negative_prompt=LONG, long=True, guided=False)[0][0].shape == (1, 77, 24)
    assert conditions(one, "a tree", long=True)[0][0].equal(conditions(one, "a tree")[0][0])


def test_only_what_is_cut_off_is_warned_of(one):
    with pytest.warns(UserWarning, match="left out: red red red red red house"):
        conditions(one, LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditions(one, LONG, long=True)


def test_sdxl_reads_the_layer_before_the_last_of_both_encoders(two):
    context, vec = two(["a tree"])
    ids = torch.tensor([two.tokenizers[0].encode("a tree").ids])
    parts = [net(ids, clip_skip=1, norm=False) for net in two.encoders]
    assert_close(context, torch.cat([part for part, _ in parts], -1))
    assert_close(vec, parts[1][1])
    assert vec.shape == (1, 24)


def test_the_second_prompt_is_the_second_encoders(two):
    (context, vec), _ = conditions(two, "a tree", prompt_2="a boat")
    a, b = two(["a tree", "a boat"])[0]
    assert_close(context[0], torch.cat([a[:, :24], b[:, 24:]], 1))
    assert_close(vec, two(["a boat"])[1])
    with pytest.raises(ValueError, match="1 prompts, but 2 in prompt_2"):
        conditions(two, "a tree", prompt_2=["a boat", "a boat"])


def test_the_vec_of_a_long_prompt_is_that_of_its_first_chunk(two):
    (_, vec), _ = conditions(two, LONG, long=True)
    assert_close(vec, two(["red " * 75])[1])


def test_no_negative_prompt_is_zeros_only_where_the_model_says_so(two):
    assert all(not part.any() for part in conditions(two, "a tree", zeros=True)[1])
    for other in (conditions(two, "a tree", zeros=True, negative_prompt="")[1], conditions(two, "a tree")[1]):
        assert_close(other, two([""]))


def test_clip_skip_is_not_the_negative_prompts(one, two):
    for text in (one, two):
        (given, _), (other, _) = conditions(text, "a tree", clip_skip=1, negative_prompt="a tree")
        assert_close(given, text(["a tree"], 1)[0])
        assert_close(other, text(["a tree"])[0])


def test_embeddings_of_another_length_are_named(one):
    with pytest.raises(ValueError, match="prompt_embeds have 154 tokens, negative_prompt_embeds 77; they need as many"):
        conditions(one, None, prompt_embeds=(torch.zeros(1, 154, 24), None))


def test_sdxl_needs_a_vec_with_its_embeddings():
    config = UNetConfig.from_dict({"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                                   "projection_class_embeddings_input_dim": 20 + 48, "cross_attention_dim": 24})
    with pytest.raises(ValueError, match=r"vec is None, not \(1, 20\)"):
        rows((torch.zeros(1, 77, 24), None), config, Settings(), (32, 32))
    with pytest.raises(ValueError, match=r"vec is \(1, 9\), not \(1, 20\)"):
        rows((torch.zeros(1, 77, 24), torch.zeros(1, 9)), config, Settings(), (32, 32))
    told = rows((torch.zeros(2, 77, 24), torch.zeros(2, 20)), config, Settings(num_images=3), (32, 32))
    assert {name: tuple(part.shape) for name, part in told.items()} == {"context": (6, 77, 24), "vec": (6, 68)}


def test_the_plan_follows_the_config_unless_a_sampler_is_named():
    config = {**SD_CONFIG, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    names = {sampler: plan(config, SD, Settings(sampler=sampler, steps=5))[0].__name__ for sampler in (None, "unipc")}
    assert names == {None: "plms", "unipc": "unipc"}
    config = {key: value for key, value in config.items() if key not in ("clip_sample", "skip_prk_steps")}
    assert plan(config, SD, Settings(sampler="ddim", steps=5))[3] == 1.0
    assert plan(config, SD, Settings(sampler="plms", steps=5))[3] is None
    with pytest.raises(ValueError, match="skip_prk_steps = False is not supported"):
        plan(config, SD, Settings(steps=5))


@pytest.mark.parametrize("said", [{}, {"original_inference_steps": 50.0}, {"original_inference_steps": None}], ids=str)
def test_a_consistency_model_spreads_its_steps_over_those_it_was_distilled_for(said):
    """However the config writes their number."""
    s = Settings(steps=4, image=torch.zeros(3, 8, 8), strength=0.5)
    levels = plan({**SD_CONFIG, "_class_name": "LCMScheduler", **said}, SD, s, spreads=True)[1]
    assert [level.t for level in levels] == [499, 379, 259, 139, 0]


def test_strength_cuts_the_grid():
    image = torch.zeros(3, 8, 8)
    for strength, mask, taken in ((None, None, 6), (0.35, None, 3), (None, image, 10), (1.0, None, 10)):
        s = dataclasses.replace(Settings(steps=10, image=image), strength=strength, mask=mask)
        levels = plan({**SD_CONFIG, "_class_name": "DDIMScheduler"}, SD, s)[1]
        assert (len(levels) - 1, levels.n) == (taken, 10)
