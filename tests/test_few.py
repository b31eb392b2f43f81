"""The two small sets to adapt a model with."""
import json

import numpy as np
import pytest
import torch

from minidiff.data import few, scenes
from minidiff.data.drawing import OBJECTS, UNSEEN
from minidiff.data.files import stream_folder

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", few.SETS)
def test_a_drawing_depends_on_its_number_and_the_seed_alone(name):
    (first, text), (second, _) = few.SETS[name](2, 32)
    again, same = next(few.SETS[name](1, 32))
    other, _ = next(few.SETS[name](1, 32, seed=1))
    assert np.array_equal(first, again) and text == same
    assert not np.array_equal(first, second) and not np.array_equal(first, other)


def test_a_cat_is_in_no_scene_and_in_every_picture_of_its_set():
    assert not UNSEEN.keys() & (OBJECTS.keys() | scenes.words())
    assert all(text.split(" cat ")[1] for _, text in few.cats(few.FEW, 16))
    colours = {text.split(" cat ")[0].split()[-1] for _, text in few.cats(few.FEW, 16)}
    assert len(colours) > 5                                          # so that the colour stays free


def test_a_watercolour_has_a_bare_margin_and_keeps_its_colours():
    picture = torch.rand(3, 1, 1).expand(3, 128, 128)
    painted = few.watercolour(picture, 3)
    paper = torch.tensor(few.PAPER) / 255
    assert (painted[:, :2].mean((1, 2)) - paper).abs().max() < 0.02
    middle = painted[:, 32:96, 32:96].mean((1, 2))
    assert (middle - paper).norm() > 0.5 * (picture[:, 0, 0] - paper).norm()
    assert torch.corrcoef(torch.stack([middle, picture[:, 0, 0]]))[0, 1] > 0.9
    assert painted.min() >= 0 and painted.max() <= 1


def test_a_set_is_written_as_a_folder_that_training_reads(tmp_path):
    few.write("watercolour", tmp_path / "here", 16)
    read, drawn = list(stream_folder(tmp_path / "here", 16)), list(few.watercolours(size=16))
    assert len(read) == few.FEW == len((tmp_path / "here/metadata.jsonl").read_text().splitlines())
    for (pixels, caption), (picture, text) in zip(read, drawn):
        assert caption == text and np.array_equal(pixels.permute(1, 2, 0).numpy(), picture)
    assert json.loads((tmp_path / "here/metadata.jsonl").read_text().splitlines()[0])["file_name"] == "00.png"
