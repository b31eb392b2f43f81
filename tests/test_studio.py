"""The studio: what its controls do, without a browser (tests/test_browser.py has one)."""
import base64
import importlib
import io
import math
import re
import time
from unittest.mock import MagicMock

import ipywidgets as widgets
import pytest
import torch
from PIL import Image

import minidiff as md
from minidiff.data.scenes import unknown_words
from minidiff.teach import studio
from minidiff.teach.studio import Drawing

studio_module = importlib.import_module("minidiff.teach.studio")


@pytest.fixture(scope="module")
def pipe():
    return md.StableDiffusion.from_pretrained("mini-sd", device="cpu")


@pytest.fixture
def live(monkeypatch, pipe):
    """The studio's controls by their description, its message, its picture and what was displayed."""
    shown = []
    monkeypatch.setattr("IPython.get_ipython", MagicMock())
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    studio(pipe, "a red house, snow, day", "a blue house, snow, day", steps=4)
    box = widgets.widget._instances[shown[1]["application/vnd.jupyter.widget-view+json"]["model_id"]]
    flat = [each for child in box.children for each in (child.children if isinstance(child, widgets.Box) else [child])]
    found = {each.description: each for each in flat if getattr(each, "description", "")}
    found["said"], found["hidden"] = (each for each in flat if type(each) is widgets.HTML)
    found["machine"], found["lit"] = box.children[-1].children[1].children
    return found | {"picture": next(each for each in flat if isinstance(each, widgets.Image)), "shown": shown[0]}


def pixels(picture):
    return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).float()


def test_what_is_stored_is_a_film_and_the_widget_begins_at_its_end(live):
    film = Image.open(io.BytesIO(base64.b64decode(live["shown"]["text/html"].split("base64,")[1].split('"')[0])))
    assert film.n_frames == 5 and film.width == 2 * 192 + 8
    assert Image.open(io.BytesIO(live["picture"].value)).width == 2 * 384 + 8 and live["step"].value == 4


def test_the_quick_model_draws_with_each_letter_and_the_own_one_with_enter(live, pipe):
    assert not live["prompt"].continuous_update
    live["second prompt"].value = ""
    live["model"].value = studio_module.QUICK
    assert live["prompt"].continuous_update and live["sampler"].options == ("lcm",)
    assert (live["steps"].value, live["guidance"].value, live["step"].max) == (4, 8.5, 4)
    before = live["picture"].value
    live["prompt"].value = "a green boat, sea, night"
    assert live["picture"].value != before and live["said"].value == ""
    *_, last = md.StableDiffusion.from_pretrained("mini-sd-lcm", device="cpu").stream("a green boat, sea, night")
    shown = Image.open(io.BytesIO(live["picture"].value)).crop((392, 36, 776, 420))
    right = pipe.preview(last.x0)[0].resize((384, 384), Image.Resampling.BICUBIC)
    assert (pixels(shown) - pixels(right)).abs().mean() < 1
    live["model"].value = studio_module.OWN
    assert not live["prompt"].continuous_update and live["steps"].value == 25 and "ddim" in live["sampler"].options


def test_only_mini_sd_is_offered_another_model(pipe):
    quick = md.StableDiffusion.from_pretrained("mini-sd-lcm", device="cpu")
    for each, names in ((pipe, 2), (quick, 1)):
        drawing = Drawing(each, ["a boat"], {"steps": 2, "seed": 0})
        list(drawing)
        model, *_ = studio_module._widget(drawing, "a boat").children
        assert len(model.options) == names


@pytest.mark.parametrize("by", ["draw", "Enter"])
def test_draw_follows_prompt_seed_steps_and_sampler(live, pipe, by):
    live["second prompt"].value = ""
    live["steps"].value, live["sampler"].value, live["seed"].value = 3, "euler", 5
    before = live["picture"].value
    live["prompt"].value = "a green boat, sea, night"                    # the text's value changes with Enter
    if by == "draw":
        live["draw"].click()
    assert live["picture"].value != before
    assert live["step"].max == 3 and live["step"].value == 3 and live["said"].value == ""
    *_, last = pipe.stream("a green boat, sea, night", steps=3, sampler="euler", seed=5)
    shown = Image.open(io.BytesIO(live["picture"].value))
    assert shown.size == (2 * 384 + 8, 18 + 18 + 384 + 8)
    right = pipe.preview(last.x0)[0].resize((384, 384), Image.Resampling.BICUBIC)
    assert (pixels(shown.crop((392, 36, 776, 420))) - pixels(right)).abs().mean() < 1
    drawn = live["picture"].value
    live["◀"].click()
    assert live["step"].value == 2 and live["picture"].value != drawn
    live["▶"].click()
    assert live["step"].value == 3 and live["picture"].value == drawn
    live["▶"].click()
    assert live["step"].value == 3


@pytest.mark.parametrize("name, value", [("seed", 7), ("guidance", 2.0), ("sampler", "euler_ancestral"), ("steps", 2)])
def test_a_setting_redraws_at_once(live, name, value):
    before = live["picture"].value
    live[name].value = value
    assert live["picture"].value != before and live["said"].value == ""


def test_an_example_sets_both_prompts_and_draws_once(live, monkeypatch):
    drawn = []
    monkeypatch.setattr(studio_module, "Drawing", lambda *row: drawn.append(row[1]) or Drawing(*row))
    live["examples"].value = dict(live["examples"].options)["one word: the colour"]
    assert drawn == [["a large red house on the left, snow, night, stars",
                      "a large blue house on the left, snow, night, stars"]]
    assert [live["prompt"].value, live["second prompt"].value] == drawn[0]


def test_every_example_is_of_words_that_mini_sd_knows():
    for name, *pair in studio_module.PAIRS:
        assert all(not unknown_words(prompt) for prompt in pair), name


def test_a_word_adds_where_it_is_looked_at(live):
    plain = Image.open(io.BytesIO(live["picture"].value))
    live["word"].value = "red"                                           # in the first prompt alone
    both = Image.open(io.BytesIO(live["picture"].value)).convert("RGB")
    assert both.width == plain.width + 392
    first, second = both.crop((784, 36, 1168, 420)), both.crop((784, 446, 1168, 830))
    assert first.getextrema() != ((255, 255),) * 3 and second.getextrema() == ((255, 255),) * 3


def test_mistakes_are_said_in_a_line_and_the_picture_stays(live):
    live["second prompt"].value = ""
    before = live["picture"].value
    live["prompt"].value = " "
    assert "no prompt" in live["said"].value and live["picture"].value == before and not live["draw"].disabled
    live["prompt"].value = "a red zebra"
    assert "zebra" in live["said"].value


def test_a_screen_reader_is_told_what_is_to_be_seen(live):
    live["prompt"].value, live["step"].value = "a green boat, sea", 2
    assert "a green boat, sea | a blue house, snow, day: state and guess after 2 of 4 steps" in live["hidden"].value


def test_the_map_grows_by_step_and_keeps_the_distances(pipe):
    drawing = Drawing(pipe, ["a red house", "a blue house"], {"steps": 6, "seed": 3})
    for _ in drawing:
        pass
    plane, share = drawing.ways
    states = torch.stack([step.x / math.hypot(*step.level[1:]) for step in drawing.steps]).flatten(2)
    assert plane.shape == (7, 2, 2) and torch.equal(plane[0, 0], plane[0, 1]) and 0.5 < share <= 1
    middle = states.mean((0, 1))
    total = (states - middle).square().sum().item()
    assert plane.square().sum().item() == pytest.approx(share * total, rel=1e-4)
    blue = [sum(b > r + 99 for r, _, b in drawing.path(k).get_flattened_data()) for k in (1, 3, 6)]
    assert blue == sorted(set(blue)) and drawing.path(6).size == (384, 384)


def test_the_parts_at_work_are_lit_up(live):
    def lit():
        return re.findall(r"\.p(\d)", live["lit"].value)

    found = [lit()]
    for live["step"].value in (2, 0):
        found.append(lit())
    assert found == [["3"], ["1", "2"], ["0"]]
    name = re.search(r"machine-\w+", live["lit"].value)[0]
    assert f'<div class="{name}">' in live["machine"].value and live["machine"].value.count("aria-label") == 4


def test_looking_on_takes_a_small_share_of_the_time(live, monkeypatch):
    """With a picture that takes ten steps' time, few are shown on the way; the last one always is."""
    real, shown = Drawing.picture, []

    def slow(self, k, *more, **options):
        shown.append(k)
        time.sleep(0.2)
        return real(self, k, *more, **options)

    monkeypatch.setattr(Drawing, "picture", slow)
    live["steps"].value = 20
    assert shown[-1] == 20 and len(shown) < 12


def test_both_prompts_start_from_the_same_noise(pipe):
    drawing = Drawing(pipe, ["a red house", "a blue house"], {"steps": 2, "seed": 3})
    assert list(drawing) == [0, 1, 2] and torch.equal(drawing.steps[0].x[0], drawing.steps[0].x[1])
    assert list(drawing.words) == ["a", "red", "house", "blue"]
    with pytest.raises(ValueError, match="alt|prompt"):
        studio(pipe, " ")
