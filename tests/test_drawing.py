"""How scenes are painted: any resolution, true masks, colours and places that can be told apart."""
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest

from minidiff.data import drawing, scenes
from minidiff.data.drawing import RGB
from minidiff.data.scenes import ATTRIBUTES, Scene
from tests.tiny import one

pytestmark = pytest.mark.quick
MANY = [scenes.sample(random.Random(i), held_out=None, second=0.2) for i in range(4000)]


def pixels(scene: Scene, size: int = 32, rng: random.Random | None = None) -> np.ndarray:
    return np.asarray(scenes.draw(scene, size, rng)[0]).astype(int)


def test_the_same_scene_is_drawn_at_any_resolution():
    small, large = pixels(MANY[1], 32, random.Random(4)), pixels(MANY[1], 96, random.Random(4))
    reduced = large.reshape(32, 3, 32, 3, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 4


@pytest.mark.parametrize("obj", ATTRIBUTES["object"])
def test_masks_are_where_the_object_is(obj):
    for i in range(6):
        scene = one(object=obj, ground="snow", place=ATTRIBUTES["place"][i % 3])
        (_, masks), before = scenes.draw(scene, 64, random.Random(i)), pixels(scene, 64, random.Random(i))
        changed = (before != pixels(scene._replace(color="blue"), 64, random.Random(i))).any(-1)
        mask = np.pad(masks["object"], 1)
        near = np.any([np.roll(mask, shift, (0, 1)) for shift in product((-1, 0, 1), repeat=2)], 0)[1:-1, 1:-1]
        assert not changed[~near].any()  # a pixel beside the mask may be covered by less than half
        assert changed[masks["object"]].mean() > 0.6  # not: basket, stem, trunk, door
        assert list(masks) == ["object"] and mask.dtype == bool


@pytest.mark.parametrize("obj", ATTRIBUTES["object"])
def test_most_of_an_object_has_its_color_at_any_time(obj):
    names = ATTRIBUTES["color"]
    for time, color, size in product(ATTRIBUTES["time"], names, ATTRIBUTES["size"]):
        picture, masks = scenes.draw(one(object=obj, time=time, color=color, size=size, ground="sea"), 48)
        inside = np.asarray(picture)[masks["object"]].astype(float)
        palette = np.array([RGB[name] for name in names])
        nearest = np.abs(inside[:, None] - palette).sum(-1).argmin(1)
        close = np.abs(inside - palette[names.index(color)]).sum(1) < 120
        assert close.mean() > 0.3, (time, color, size)
        assert Counter(nearest[close].tolist()).most_common(1)[0][0] == names.index(color), (time, color, size)


def extent(scene: Scene, i: int) -> tuple[float, float]:
    """Height and middle of the object, as shares of the picture."""
    rows, columns = np.nonzero(scenes.draw(scene, 64, random.Random(i))[1]["object"])
    return (rows.max() - rows.min() + 1) / 64, (columns.max() + columns.min() + 1) / 128


@pytest.mark.parametrize("obj", ATTRIBUTES["object"])
def test_small_and_large_and_left_centre_right_never_overlap(obj):
    found = {(size, place): [extent(one(object=obj, size=size, place=place), i) for i in range(12)]
             for size, place in product(ATTRIBUTES["size"], ATTRIBUTES["place"])}
    heights = {size: [h for key, pairs in found.items() if key[0] == size for h, _ in pairs]
               for size in ATTRIBUTES["size"]}
    assert max(heights["small"]) + 0.1 < min(heights["large"])
    middles = {place: [x for key, pairs in found.items() if key[1] == place for _, x in pairs]
               for place in ATTRIBUTES["place"]}
    assert max(middles["left"]) + 0.08 < min(middles["centre"])
    assert max(middles["centre"]) + 0.08 < min(middles["right"])


@pytest.mark.parametrize("sky", ATTRIBUTES["sky"][:4])
def test_no_object_hides_the_sky_at_32_pixels(sky):
    for time, obj, size, place in product(*(ATTRIBUTES[name] for name in ("time", "object", "size", "place"))):
        scene = one(time=time, object=obj, size=size, place=place)
        seen = np.abs(pixels(scene._replace(sky=sky)) - pixels(scene)).max(-1) > 30
        assert seen.sum() >= 12, (time, obj, size, place)


def test_grounds_differ_at_every_time_of_day():
    for time in ATTRIBUTES["time"]:
        foot = [pixels(one(time=time, ground=kind, size="small"))[-4:].mean((0, 1)) for kind in ATTRIBUTES["ground"]]
        assert all(np.abs(a - b).max() > 25 for i, a in enumerate(foot) for b in foot[:i])


def test_two_objects_stand_left_and_right():
    for i in range(30):
        scene = scenes.sample(random.Random(i), second=1.0)
        masks = scenes.draw(scene, 48, random.Random(i))[1]
        left, right = (np.nonzero(masks[name])[1].mean() / 48 for name in ("object", "second"))
        assert left < 0.4 and right > 0.6 and list(masks) == ["object", "second"]


def test_a_crowd_is_drawn_as_it_is_counted():
    """Suns are the only yellow of their kind in the sky of a night without stars or objects."""
    for i in range(300):
        picture, counts = drawing.crowd(64, random.Random(i))
        again, _ = drawing.crowd(64, random.Random(i))
        assert picture.tobytes() == again.tobytes() and sum(counts.values()) <= 8
        sky = np.asarray(picture)[4:20].astype(int)
        suns = (abs(sky - (255, 240, 90)).sum(-1) < 12).any(0)                    # columns with a sun's own colour
        if not counts["object"]:                                                  # yellow objects have it too, nearly
            assert np.diff(suns.astype(int), prepend=0).clip(0).sum() == counts["sun"], i


def test_numbers_that_are_apart_stay():
    assert drawing.apart([0.0, 0.25, 0.5], 0.25) == [0.0, 0.25, 0.5] and drawing.apart([], 1.0) == []
