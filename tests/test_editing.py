"""Editing: interpolation on the sphere, inversion, prompt-to-prompt and where words look."""
import math

import pytest
import torch

import minidiff as md
from minidiff import exact
from minidiff.data.toys import Mixture
from minidiff.editing import aligned, invert, look, prompt_to_prompt, slerp
from minidiff.nets.attention import watched
from minidiff.samplers import ddim
from minidiff.sd.scheduler import preset
from minidiff.text import words


@pytest.fixture(scope="module")
def pipe():
    return md.StableDiffusion.from_pretrained("mini-sd", device="cpu")


@pytest.mark.quick
def test_slerp_keeps_the_length_and_divides_the_angle():
    a, b = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    between = slerp(a, b, 0.3)
    torch.testing.assert_close(between.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))

    def angle(u, v):
        return torch.cosine_similarity(u.flatten(1), v.flatten(1)).acos()

    torch.testing.assert_close(angle(a, between), 0.3 * angle(a, b))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)  # parallel: the straight line


@pytest.mark.quick
def test_inversion_is_the_way_down_backwards_and_gets_better_with_steps():
    mixture = Mixture(torch.tensor([0.3, 0.7]).double(), torch.tensor([[-1.0, 0.5], [0.8, -0.3]]).double(), 0.4)
    denoise, x = exact.denoiser(mixture), torch.tensor([[0.5, -0.5], [1.0, 0.2], [-0.9, 0.4]]).double()
    errors = []
    for n in (10, 20, 40, 80):
        grid = preset("sd-ddim", n)
        *_, up = invert(denoise, x, grid)
        *_, down = ddim(denoise, up.x, grid)
        errors.append((down.x - x).abs().max().item())
    assert all(after < 0.75 * before for before, after in zip(errors, errors[1:]))


@pytest.mark.quick
def test_tokens_correspond_one_by_one_where_as_many_take_their_place(pipe):
    tokenizer = pipe.text.tokenizers[0]
    same = aligned(tokenizer, "a red house, snow", "a blue house, snow")
    assert torch.equal(same, torch.arange(77))
    longer = aligned(tokenizer, "a house, snow", "a large red house, snow")
    assert longer[:8].tolist() == [0, 1, -1, -1, 2, 3, 4, 5]
    assert (longer < 0).sum() == 2 and longer[-1] >= 0


@pytest.mark.quick
def test_words_are_whole_and_know_their_tokens(pipe):
    found = words(pipe.text.tokenizers[0], "A red zebra, snow!")
    assert [word for word, _ in found] == ["A", "red", "zebra", ",", "snow", "!"]
    assert [place for _, places in found for place in places] == list(range(1, found[-1][1][-1] + 1))
    assert len(dict(found)["zebra"]) > 1


def test_the_target_takes_the_sources_maps_word_by_word_for_a_share_of_the_steps(pipe):
    pair = ["a house, snow, day", "a large house, snow, day"]
    places = aligned(pipe.text.tokenizers[0], *pair)
    change, z = prompt_to_prompt(places[None], 4, words=0.5, layout=0.25), torch.randn(1, 4, 16, 16)
    with watched(pipe.unet) as plain:
        sources = pipe(pair, latents=z.repeat(2, 1, 1, 1), steps=4, output="latent")
    with watched(pipe.unet, change) as maps:
        edited = pipe(pair, latents=z.repeat(2, 1, 1, 1), steps=4, output="latent")
    torch.testing.assert_close(edited[0], sources[0], atol=1e-4, rtol=0)
    assert (edited[1] - sources[1]).abs().max() > 0.05
    new = places < 0
    for name, calls in maps.items():
        taken = 2 if "attn2" in name else 1
        for step, call in enumerate(calls):
            source, target = call[-2], call[-1]
            if "attn2" in name:
                source, target = source[..., places[~new]], target[..., ~new]
            assert torch.equal(source, target) == (step < taken)
        torch.testing.assert_close(calls[0][:-1], plain[name][0][:-1])


def test_nothing_is_changed_by_shares_of_zero(pipe):
    pair, z = ["a red house", "a blue house"], torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
    before = pipe(pair, latents=z, steps=3, output="latent")
    with watched(pipe.unet, prompt_to_prompt(torch.arange(77)[None], 3, words=0, layout=0)):
        assert torch.equal(pipe(pair, latents=z, steps=3, output="latent"), before)


def test_words_look_adds_up_over_all_tokens(pipe):
    with watched(pipe.unet) as seen:
        pipe("a red house", steps=3, output="latent")
    whole = look(seen, list(range(77)), (16, 16))
    layers = sum("attn2" in name for name in seen)
    assert whole.shape == (3, layers, 16, 16)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    house = look(seen, dict(words(pipe.text.tokenizers[0], "a red house"))["house"], (16, 16))
    assert 0 < house.mean() < 1 and math.isfinite(house.max())
