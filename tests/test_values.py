"""Numbers, truth values and texts of every library, and what only looks like one."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from minidiff import values
from minidiff.sd.settings import Settings

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint32, np.array, torch.tensor])
@pytest.mark.parametrize("name", ["steps", "seed", "num_images", "clip_skip", "height", "width", "tile"])
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(name, kind):
    value = getattr(Settings(**{name: kind(8)}), name)
    assert value == 8 and type(value) is int


@pytest.mark.parametrize("name", ["steps", "seed", "num_images", "clip_skip", "height", "width", "tile"])
@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 8.0, np.float64(8), torch.tensor(8.0), "8",
                                   torch.tensor([8]), np.array([8]), math.nan, -1, None])
def test_what_only_looks_like_a_whole_number_is_refused(name, value):
    if value is None and name in ("steps", "height", "width", "tile"):
        return
    with pytest.raises(ValueError, match=f"{name} is .*; it must be a whole number from . to "):
        Settings(**{name: value})


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, np.array, torch.tensor, Fraction])
def test_numbers_of_numpy_and_torch_are_numbers(kind):
    s = Settings(guidance_scale=kind(2.5), guidance_rescale=kind(0.5), eta=kind(0.25), strength=kind(1))
    assert (s.guidance_scale, s.guidance_rescale, s.eta, s.strength) == (2.5, 0.5, 0.25, 1.0)
    assert all(type(value) is float for value in (s.guidance_scale, s.guidance_rescale, s.eta, s.strength))
    control = {"control_scale": kind(0.5), "control_start": kind(0), "control_end": kind(1)}
    assert Settings(controlnet=1, control_image=1, **control).controls == [(1, 1, 0.5, 0.0, 1.0, False)]


@pytest.mark.parametrize("value", [True, np.True_, "1", 1j, math.nan, np.float32("nan"), math.inf, torch.tensor([1.0]),
                                   torch.tensor(torch.nan), 10**400])
@pytest.mark.parametrize("name", ["guidance_scale", "guidance_rescale", "eta", "strength", "control_scale",
                                  "control_start", "control_end"])
def test_what_only_looks_like_a_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be (a finite number|between 0 and 1)"):
        Settings(**{"controlnet": 1, "control_image": 1, name: value})


@pytest.mark.parametrize("value", [torch.tensor(1j), torch.tensor(1.0, device="meta"), 10**5000],
                         ids=["complex", "meta", "huge"])
def test_numbers_that_python_cannot_have_or_print_are_refused(value):
    for name, said in (("steps", "a whole number"), ("eta", "between 0 and 1")):
        with pytest.raises(ValueError, match=f"{name} is .*; it must be {said}"):
            Settings(**{name: value})


def test_a_type_is_only_to_blame_where_it_is_not_accepted():
    for settings, said in (({"steps": Fraction(8)}, "steps is 8; .* from 1 to 1000, not a Fraction"),
                           ({"steps": np.int64(0)}, "steps is 0; .* from 1 to 1000$"),
                           ({"eta": torch.tensor(2.0)}, "eta is 2.0; it must be between 0 and 1$"),
                           ({"guidance_scale": np.float32("nan")}, "is nan; it must be a finite number$")):
        with pytest.raises(ValueError, match=said):
            Settings(**settings)


def test_a_text_is_no_truth_value():
    assert Settings(long=np.True_).long is True
    guess = {"controlnet": 1, "control_image": 1, "guess_mode": "no"}
    for settings in ({"long": "no"}, {"long": 1}, {"long": None}, guess):
        with pytest.raises(ValueError, match="(long|guess_mode) is .*; it must be True or False"):
            Settings(**settings)


def test_a_text_of_whole_characters_is_itself():
    for given in ("", "a red house", "ein Haus im März", "🏠"):
        assert values.text(given) is given


@pytest.mark.parametrize("value, said", [(b"red", "not a bytes"), (None, "not a NoneType"),
                                         (np.array("red"), "not a ndarray"),
                                         ("caf\udce9", r"the text 'caf\\udce9' holds bytes that are not UTF-8")])
def test_what_only_looks_like_a_text_is_refused(value, said):
    with pytest.raises(ValueError, match=said):
        values.text(value)
