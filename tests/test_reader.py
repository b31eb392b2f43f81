"""The attribute reader: shapes, reading of slots, and its accuracy on fresh drawings."""
from collections import Counter

import pytest
import torch

from minidiff.data import scenes
from minidiff.io.weights import weights_dir
from minidiff.nets.reader import Reader, ReaderConfig, Reading


@pytest.fixture(scope="module")
def shipped() -> Reader:
    return Reader.from_pretrained(weights_dir() / "reader")


def test_shipped_reader_is_right_on_fresh_drawings(shipped):
    n = 1000
    pictures, drawn = scenes.render(n, 32, seed=77, held_out=None, second=0.0)
    read = shipped.read(pictures.float() / 127.5 - 1)
    for name in scenes.ATTRIBUTES:
        truth = torch.tensor([scenes.labels(scene)[name] for scene in drawn])
        assert (read[name] == truth).float().mean() >= 0.99, name


def test_shipped_reader_sees_both_objects(shipped):
    pictures, drawn = scenes.render(300, 32, seed=78, held_out=None, second=1.0)
    colors, objects = scenes.ATTRIBUTES["color"], scenes.ATTRIBUTES["object"]
    named = [((s.color, s.object), s.second[:2]) for s in drawn]
    truth = [Counter((colors.index(c), objects.index(o)) for c, o in pairs) for pairs in named]
    right = sum(a == b for a, b in zip(shipped.things(pictures.float() / 127.5 - 1), truth))
    assert right >= 0.97 * len(drawn)


@pytest.mark.quick
def test_reader_takes_any_picture_size():
    reader = Reader(ReaderConfig(ch=8))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    larger = image.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert reader.read(larger).keys() == scenes.ATTRIBUTES.keys()
    assert reader(larger).thing["object"].shape == (2, 3, len(scenes.ATTRIBUTES["object"]) + 1)


@pytest.mark.quick
def test_read_takes_object_colour_and_size_from_the_occupied_place(monkeypatch):
    reader = Reader(ReaderConfig(ch=8))
    obj, color, size = torch.zeros(1, 3, 7), torch.zeros(1, 3, 8), torch.zeros(1, 3, 2)
    obj[0, :, 6] = 5.0                     # nothing anywhere ...
    obj[0, 2, 6], obj[0, 2, 4] = -5.0, 3.0  # ... but object 4 at the right
    obj[0, 0, 1] = 4.0                     # a distraction at the left
    color[0, 2, 7], size[0, 2, 1] = 1.0, 1.0
    scene = {name: torch.eye(5)[2:3, :len(scenes.ATTRIBUTES[name])] for name in ("time", "sky", "ground")}
    reading = Reading(scene, {"object": obj, "color": color, "size": size})
    monkeypatch.setattr(Reader, "forward", lambda self, image: reading)
    assert {k: v.item() for k, v in reader.read(torch.zeros(1)).items()} == {
        "time": 2, "sky": 2, "ground": 2, "object": 4, "color": 7, "size": 1, "place": 2}
    assert reader.things(torch.zeros(1)) == [Counter({(7, 4): 1})]


@pytest.mark.quick
def test_reader_round_trips_through_its_folder(tmp_path):
    reader = Reader(ReaderConfig(ch=8)).half().float()
    reader.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(Reader.from_pretrained(tmp_path)(image), reader(image))
