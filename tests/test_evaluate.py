"""Prompt adherence: the interval, the fixed prompts, and the counting, checked on pictures whose truth is known."""
import json
import random
from collections import Counter

import pytest
import torch

import minidiff.measure.evaluate as evaluation
from minidiff.data import scenes
from minidiff.io.images import to_tensor
from minidiff.io.weights import weights_dir
from minidiff.measure import metrics
from minidiff.measure.evaluate import evaluate, prompt_set, wilson
from minidiff.nets.patches import Patches
from minidiff.nets.reader import Reader
from minidiff.sd.pipeline import StableDiffusion


@pytest.mark.quick
def test_wilson_interval_equals_scipy():
    from scipy.stats import binomtest

    for hits, n in [(0, 10), (3, 7), (950, 1000), (10, 10)]:
        truth = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((truth.low, truth.high), abs=1e-4)


@pytest.mark.quick
def test_prompt_sets_are_fixed_and_hold_what_they_say():
    assert prompt_set("seen", 30) == prompt_set("seen", 30)
    assert {(s.color, s.object) for s in prompt_set("seen", 300)}.isdisjoint(scenes.HELD_OUT)
    assert {(s.color, s.object) for s in prompt_set("unseen", 300)} == scenes.HELD_OUT
    assert all(s.second for s in prompt_set("two", 30)) and not any(s.second for s in prompt_set("seen", 30))


@pytest.mark.quick
@pytest.mark.parametrize("name", ["seen", "unseen", "two"])
def test_the_prompts_of_a_set_are_different_ones(name):
    asked = [scenes.caption(scene) for scene in prompt_set(name, 1000)]
    assert len(set(asked)) == 1000 and asked[:50] == [scenes.caption(scene) for scene in prompt_set(name, 50)]
    assert len(prompt_set(name, evaluation.MOST)) == evaluation.MOST


@pytest.mark.quick
def test_a_set_ends():
    with pytest.raises(ValueError, match="n is 2001; it must be a whole number from 1 to 2000"):
        prompt_set("seen", evaluation.MOST + 1)


class Painter(StableDiffusion):
    """A perfect model: draws the scene that the prompt names; with `wrong`, always in another colour."""

    def __init__(self, real: StableDiffusion, wrong: bool):
        self.__dict__.update(real.__dict__)
        self.known = {scenes.caption(s): s for name in ("seen", "unseen", "two") for s in prompt_set(name, 20)}
        self.wrong = wrong

    def __call__(self, prompts, *, seed, output):
        colors, pictures = scenes.ATTRIBUTES["color"], []
        for prompt in prompts:
            scene = self.known[prompt]
            if self.wrong:
                other = colors[(colors.index(scene.color) + 3) % len(colors)]
                scene = scene._replace(color=other) if hasattr(scene, "_replace") else _replace(scene, color=other)
            picture, _ = scenes.draw(scene, self.size)
            side = picture.size
            pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*side, 3))
        return torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def _replace(scene, **changes):
    from dataclasses import replace

    return replace(scene, **changes)


@pytest.fixture(scope="module")
def mini_sd() -> StableDiffusion:
    return StableDiffusion.from_pretrained("mini-sd")


def test_a_perfect_painter_scores_one_and_a_colour_blind_one_fails_colour_alone(mini_sd, tmp_path):
    perfect = evaluate(Painter(mini_sd, wrong=False), n=20, json_path=tmp_path / "out.json")
    assert perfect["attribute_accuracy"] > 0.98 and perfect["unseen_pair_accuracy"]["value"] > 0.9
    assert perfect["binding_accuracy"]["value"] > 0.9
    assert json.loads((tmp_path / "out.json").read_text()) == perfect
    assert perfect["extras"]["value"] <= 0.05 and perfect["sharpness"]["low"] < 1 < perfect["sharpness"]["high"]
    assert perfect["pictures"].keys() == perfect["drawings"].keys() == metrics.MEASURES.keys()
    blind = evaluate(Painter(mini_sd, wrong=True), n=20)
    assert blind["per_attribute"]["color"]["value"] == 0 == blind["picture_accuracy"]["value"]
    assert blind["unseen_pair_accuracy"]["value"] == 0 == blind["binding_accuracy"]["value"]
    assert blind["per_attribute"]["object"]["value"] > 0.9


def test_a_set_of_drawings_is_like_the_drawings_and_one_in_a_single_colour_is_not():
    reader = Reader.from_pretrained(weights_dir() / "reader")
    red = [scene._replace(color="red", object="tree") for scene in prompt_set("seen", 60)]
    sets = [scenes.render(60, 32, seed=3, second=0.0)[0].float() / 127.5 - 1,
            to_tensor([scenes.draw(scene, 32, random.Random(i))[0] for i, scene in enumerate(red)])]
    all_kinds, one = (evaluation.against_drawings(reader, reader.features(x), 32) for x in sets)
    assert all_kinds["drawings"] == one["drawings"]
    drawn = one["drawings"]
    for name in ("frechet", "kernel_distance"):
        assert all_kinds["pictures"][name]["value"] < drawn[name]["high"] < one["pictures"][name]["low"]
    assert one["pictures"]["recall"]["high"] < drawn["recall"]["low"]


@pytest.fixture(scope="module")
def counter() -> Patches:
    return Patches.from_pretrained(weights_dir() / "counter")


def test_the_counter_finds_what_nobody_asked_for_and_nothing_in_what_was_asked(counter):
    """On 300 drawings that no recipe has seen, with their own scenes and as if less had been asked for."""
    pictures, asked = scenes.render(300, 128, seed=evaluation.FRESH + 1, held_out=None, second=0.5)
    image = pictures.float() / 127.5 - 1
    assert sum(map(bool, evaluation.extras(counter, asked, image))) <= 3
    less = [scene._replace(sky="clear", second=None) for scene in asked]
    truth = [[name for name, there in (("extra sun", scene.sky == "sun"), ("extra moon", scene.sky == "moon"),
                                       ("extra object", scene.second)) if there] for scene in asked]
    assert sum(map(list.__eq__, evaluation.extras(counter, less, image), truth)) >= 294


def test_a_second_sun_is_an_extra_one(counter):
    from minidiff.data.drawing import crowd

    found = []
    for i in range(200):
        picture, counts = crowd(128, random.Random(f"extras {i}"))
        if counts["sun"] + counts["moon"] > 1:
            scene = scenes.Scene("day", "sun" if counts["sun"] else "moon", "sea", "boat", "red", "small", "left")
            found.append(bool({"extra sun", "extra moon"} & {*evaluation.extras(counter, [scene],
                                                                               to_tensor([picture]))[0]}))
    assert len(found) > 20 and sum(found) >= 0.95 * len(found)


@pytest.mark.quick
def test_a_blurred_picture_is_less_sharp_by_the_square_of_what_the_blur_leaves():
    wave = (torch.arange(64) * torch.pi / 4).cos().expand(1, 3, 64, 64)
    energy = evaluation.laplacian_energy(torch.cat([wave, 0.5 * wave]))
    torch.testing.assert_close(energy[1] / energy[0], torch.tensor(0.25))
    answer = 2 * (1 - torch.tensor(torch.pi / 4).cos())                     # of the Laplacian to this wave
    torch.testing.assert_close(energy[0], answer**2 * wave[..., 1:-1, 1:-1].square().mean())


def test_two_object_pairs_are_counted_as_a_multiset():
    """"a red house and a red house" needs two of them; a third thing does no harm."""
    class Fake:
        def things(self, image):
            colors, objects = scenes.ATTRIBUTES["color"], scenes.ATTRIBUTES["object"]
            red, blue, house = colors.index("red"), colors.index("blue"), objects.index("house")
            return [Counter({(red, house): 1}), Counter({(red, house): 2, (blue, house): 1})]

    twins = scenes.Scene("day", "sun", "sea", "house", "red", "large", "left", ("red", "house", "small"))
    one, both = evaluation._pairs_right(Fake(), [twins, twins], torch.zeros(2, 3, 8, 8))
    assert one == {"red house": False} and both == {"red house": True}


def test_the_contact_sheet_shows_every_set_and_the_failures(mini_sd, tmp_path):
    """A colour-blind painter fails everywhere: four full parts; a perfect one leaves the last part empty."""
    from PIL import Image

    sheets = []
    for wrong in (True, False):
        evaluate(Painter(mini_sd, wrong), n=20, sheet_path=tmp_path / f"{wrong}.png")
        sheets.append(Image.open(tmp_path / f"{wrong}.png"))
    blind, perfect = sheets
    assert blind.width == perfect.width and blind.height > perfect.height
    first = scenes.draw(prompt_set("seen", 1)[0], 128)[0]
    assert perfect.crop((0, 28, 128, 156)).tobytes() == first.tobytes()  # under the title, not chosen


def test_no_caption_of_the_contact_sheet_is_cut_off():
    second = ("purple", "mushroom", "small")
    two = scenes.Scene("sunset", "clouds", "grass", "mushroom", "orange", "large", "left", second)
    row = evaluation.Drawn(two, torch.ones(3, 8, 8), ["orange mushroom", "purple mushroom"])
    sheet = evaluation.contact_sheet({"seen": [], "unseen": [], "two": 8 * [row]}).convert("L")
    width, height = sheet.size
    assert sheet.crop((0, height - 4, width, height)).getextrema() == (255, 255)
    assert sheet.crop((width - 4, 0, width, height)).getextrema() == (255, 255)


def test_settings_reach_the_pipeline(mini_sd):
    with pytest.raises(ValueError, match="steps"):
        evaluate(mini_sd, n=1, steps=0)


def test_mini_sd_draws_what_it_is_told(mini_sd):
    result = evaluate(mini_sd, n=30)
    assert result["attribute_accuracy"] >= 0.9 and result["images"] == 90
    ceiling = result["ceiling"]
    assert all(ceiling[name]["value"] >= 0.97 for name in scenes.ATTRIBUTES) and ceiling["extras"]["value"] <= 0.03
    assert 0.5 < ceiling["sharpness"]["value"] < 1.1


def test_evaluate_rejects_an_empty_set(mini_sd):
    with pytest.raises(ValueError, match="n is 0; it must be a whole number from 1 to 2000"):
        evaluate(mini_sd, n=0)
