"""The studio: what its controls do, without a browser (tests/test_browser.py has one)."""
import base64
import io
from unittest.mock import MagicMock

import ipywidgets as widgets
import pytest
import torch
from PIL import Image

import minidiff as md
from minidiff.teach import studio
from minidiff.teach.show import light
from minidiff.teach.studio import Drawing


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
    box = widgets.widget._instances[shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"]]
    flat = [each for child in box.children for each in (child.children if isinstance(child, widgets.Box) else [child])]
    found = {each.description: each for each in flat if getattr(each, "description", "")}
    found["said"] = next(each for each in flat if type(each) is widgets.HTML)
    return found | {"picture": next(each for each in flat if isinstance(each, widgets.Image)), "shown": shown[0]}


def pixels(picture):
    return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).float()


def test_what_is_stored_is_a_film_and_the_widget_begins_at_its_end(live):
    film = Image.open(io.BytesIO(base64.b64decode(live["shown"]["text/html"].split("base64,")[1].split('"')[0])))
    assert film.n_frames == 5
    assert light(bytes(live["picture"].value)) == base64.b64decode(live["shown"]["image/png"])


def test_draw_follows_prompt_seed_steps_and_sampler(live, pipe):
    before = live["picture"].value
    live["prompt"].value, live["second prompt"].value = "a green boat, sea, night", ""
    live["steps"].value, live["sampler"].value, live["seed"].value = 3, "euler", 5
    assert live["picture"].value == before                               # nothing moves until it is asked to
    live["draw"].click()
    assert live["step"].max == 3 and live["step"].value == 3 and live["said"].value == ""
    *_, last = pipe.stream("a green boat, sea, night", steps=3, sampler="euler", seed=5)
    shown = Image.open(io.BytesIO(live["picture"].value))
    assert shown.size == (2 * 192 + 8, 200)
    right = pipe.preview(last.x0)[0].resize((192, 192), Image.Resampling.BICUBIC)
    assert (pixels(shown.crop((200, 0, 392, 192))) - pixels(right)).abs().mean() < 1
    live["step"].value = 0
    assert live["picture"].value != before


def test_a_word_adds_where_it_is_looked_at(live):
    plain = Image.open(io.BytesIO(live["picture"].value))
    live["word"].value = "red"                                           # in the first prompt alone
    both = Image.open(io.BytesIO(live["picture"].value)).convert("RGB")
    assert both.width == plain.width + 200
    first, second = both.crop((400, 0, 592, 192)), both.crop((400, 204, 592, 396))
    assert first.getextrema() != ((255, 255),) * 3 and second.getextrema() == ((255, 255),) * 3


def test_mistakes_are_said_in_a_line_and_the_picture_stays(live):
    before = live["picture"].value
    live["prompt"].value = live["second prompt"].value = " "
    live["draw"].click()
    assert "no prompt" in live["said"].value and live["picture"].value == before and not live["draw"].disabled
    live["prompt"].value = "a red zebra"
    live["draw"].click()
    assert "zebra" in live["said"].value


def test_both_prompts_start_from_the_same_noise(pipe):
    drawing = Drawing(pipe, ["a red house", "a blue house"], {"steps": 2, "seed": 3})
    assert list(drawing) == [0, 1, 2] and torch.equal(drawing.steps[0].x[0], drawing.steps[0].x[1])
    assert list(drawing.words) == ["a", "red", "house", "blue"]
    with pytest.raises(ValueError, match="alt|prompt"):
        studio(pipe, " ")
