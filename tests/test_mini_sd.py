"""The model that ships does what its bigger relatives do with two objects, negative prompts and the guidance scale."""
from collections import Counter

import pytest
import torch

from minidiff.data import scenes
from minidiff.io.weights import weights_dir
from minidiff.measure.evaluate import _pairs_right, prompt_set
from minidiff.nets.reader import Reader
from minidiff.sd.pipeline import StableDiffusion

N = 16  # pictures per claim


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusion.from_pretrained("mini-sd", device="cpu")


@pytest.fixture(scope="module")
def reader():
    return Reader.from_pretrained(weights_dir() / "reader")


def draw(pipe, prompt, **settings):
    """(N,3,128,128) in [−1, 1], of N seeds, or of N prompts."""
    n = 1 if isinstance(prompt, list) else N
    return pipe(prompt, num_images=n, steps=12, output="tensor", **settings) * 2 - 1


def test_two_objects_keep_their_colours(pipe, reader):
    scene = scenes.Scene("day", "clouds", "grass", "house", "red", "large", "left", ("blue", "tree", "large"))
    rows = _pairs_right(reader, [scene] * N, draw(pipe, scenes.caption(scene)))
    assert sum(all(row.values()) for row in rows) >= 0.7 * N


def test_a_negative_prompt_keeps_away_what_it_names(pipe, reader):
    found = {text: Counter(reader.read(draw(pipe, "a house", negative_prompt=text))["time"].tolist())
             for text in (None, "sunset", "night", "day")}
    _, sunset, night = range(3)
    assert found["sunset"][sunset] < found[None][sunset] - N // 4
    assert found["night"][night] == 0
    assert found["day"][night] > found[None][night] + N // 4


def test_guidance_adds_adherence_then_only_contrast(pipe, reader):
    asked, hits, contrast, clipped = prompt_set("two", N), [], [], []
    for scale in (1.0, 3.0, 10.0):
        image = draw(pipe, [scenes.caption(scene) for scene in asked], guidance_scale=scale)
        hits.append(sum(all(row.values()) for row in _pairs_right(reader, asked, image)))
        contrast.append(image.flatten(1).std(1).mean())
        clipped.append((image.abs() > 0.98).float().mean())
    assert hits[0] < min(hits[1:])
    assert contrast == sorted(contrast) and clipped == sorted(clipped) and clipped[2] > 3 * clipped[1]


def test_the_unseen_pairs_were_never_in_the_training_data():
    drawn = [scene for _, part in [scenes.render(300, 16, seed=0)] for scene in part]
    assert drawn and not any((scene.color, scene.object) in scenes.HELD_OUT for scene in drawn)
    assert torch.tensor([scene.second is not None for scene in drawn]).float().mean() > 0.05
