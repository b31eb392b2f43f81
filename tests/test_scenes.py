"""The scenes: what is drawn, what is said about it, and that neither ever changes under the shipped weights."""
import hashlib
import random
import re
from collections import Counter
from itertools import product

import pytest
import torch

from minidiff.data import scenes
from minidiff.data.scenes import ATTRIBUTES, HELD_OUT, Scene
from tests.tiny import one

pytestmark = pytest.mark.quick
MANY = [scenes.sample(random.Random(i), held_out=None, second=0.2) for i in range(4000)]
WORDINGS = [(scene, scenes.caption(scene, random.Random(f"say {i}"))) for i, scene in enumerate(MANY)]
TABLES = {"time": scenes.TIME_WORDS, "sky": scenes.SKY_WORDS, "ground": scenes.GROUND_WORDS,
          "size": scenes.SIZE_WORDS, "place": scenes.PLACE_WORDS}


def named(scene: Scene, text: str) -> set[str]:
    """The attributes whose value the text says, in any of its wordings."""
    said = {name for name, table in TABLES.items()
            if any(re.search(rf"\b{phrase}\b", text) for phrase in table[getattr(scene, name)])}
    return said | {name for name in ("color", "object") if re.search(rf"\b{getattr(scene, name)}\b", text)}


def test_picture_i_depends_only_on_seed_and_i():
    pictures, drawn = scenes.render(7, 16, seed=5, second=0.5)
    later, same = scenes.render(4, 16, seed=5, second=0.5, first=3)
    assert torch.equal(later, pictures[3:]) and same == drawn[3:]
    assert pictures.dtype == torch.uint8 and pictures.shape == (7, 3, 16, 16)
    other, _ = scenes.render(7, 16, seed=6, second=0.5)
    assert all((other[i] != pictures[i]).any() for i in range(7))


def test_scenes_and_captions_are_those_of_the_shipped_weights():
    said = [scenes.caption(scene, random.Random(f"0 {i} 0")) for i, scene in enumerate(scenes.render(200, 8)[1])]
    assert hashlib.sha256("\n".join(said).encode()).hexdigest()[:16] == "9977f44691afab96"


def test_pictures_are_those_of_the_shipped_weights():
    pictures = scenes.render(64, 32)[0].float()
    found = pictures.view(4, 16, 3, 2, 16, 32).mean((1, 4, 5))  # of 16 pictures: per colour, upper and lower half
    expected = torch.tensor([101, 137, 114, 142, 150, 144, 135, 141, 125, 143, 151, 113, 133, 150, 115, 135,
                             139, 119, 117, 115, 120, 130, 148, 122])
    torch.testing.assert_close(found.flatten(), expected.float(), atol=1.5, rtol=0)  # other versions of Pillow
    assert round(pictures.std().item()) == 71


def test_held_out_pairs_are_spread():
    colors, objects = zip(*HELD_OUT)
    assert len(HELD_OUT) == 6 == len(set(colors)) and set(objects) == set(ATTRIBUTES["object"])


@pytest.mark.parametrize("held_out, expected", [
    (False, set(product(ATTRIBUTES["color"], ATTRIBUTES["object"])) - HELD_OUT), (True, HELD_OUT),
    (None, set(product(ATTRIBUTES["color"], ATTRIBUTES["object"])))])
def test_held_out_says_which_pairs_are_sampled(held_out, expected):
    drawn = [scenes.sample(random.Random(i), held_out=held_out, second=0.5) for i in range(1500)]
    assert {(scene.color, scene.object) for scene in drawn} == expected
    assert {scene.second[:2] for scene in drawn if scene.second} == expected


def test_render_never_shows_a_held_out_pair_unless_asked():
    _, drawn = scenes.render(400, 4)
    pairs = {(s.color, s.object) for s in drawn} | {s.second[:2] for s in drawn if s.second}
    assert not pairs & HELD_OUT


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_occurs_equally_often(name):
    seen = Counter(getattr(scene, name) for scene in MANY if not scene.second)
    share = sum(seen.values()) / len(ATTRIBUTES[name])
    assert set(seen) == set(ATTRIBUTES[name]) and all(abs(count / share - 1) < 0.25 for count in seen.values())


def test_second_is_the_share_of_two_objects():
    assert abs(sum(scene.second is not None for scene in MANY) / len(MANY) - 0.2) < 0.03
    assert all(scene.place == "left" for scene in MANY if scene.second)


def test_labels_are_indices_into_attributes():
    for scene in MANY[:100]:
        found = scenes.labels(scene)
        assert list(found) == list(ATTRIBUTES)
        assert all(ATTRIBUTES[name][index] == getattr(scene, name) for name, index in found.items())


def test_canonical_captions_name_all_seven_and_differ_for_all_17280_scenes():
    every = [Scene(*values) for values in product(*ATTRIBUTES.values())]
    assert len({scenes.caption(scene) for scene in every}) == len(every) == 17_280
    assert all(named(scene, scenes.caption(scene)) == set(ATTRIBUTES) for scene in every[::37])
    assert scenes.caption(one()) == "a large red house in the centre, grass, day, clear sky"


def test_canonical_caption_of_two_objects_keeps_colors_with_their_objects():
    scene = one(place="left", color="orange", second=("blue", "tree", "small"))
    assert scenes.caption(scene) == "a large orange house and a small blue tree, grass, day, clear sky"


def test_two_thirds_of_the_wordings_name_everything_and_some_are_very_short():
    counts = Counter(len(named(scene, text)) for scene, text in WORDINGS if not scene.second)
    n = counts.total()
    assert 0.6 < counts[7] / n < 0.75 and 0.08 < counts[2] / n < 0.16
    assert min(counts) == 2 and all(counts[k] for k in range(2, 8))  # colour and object are always said


def test_wordings_vary_and_never_contradict_the_scene():
    assert len({scenes.caption(MANY[0], random.Random(i)) for i in range(100)}) > 50
    for scene, text in WORDINGS:
        shown = {scene.object} | ({scene.second[1]} if scene.second else set())
        assert {name for name in ATTRIBUTES["object"] if name in text} == shown
        assert not re.search(r"\ba orange|\ban [^o]|  |^,|,$", text)


def test_words_are_exactly_those_of_the_captions():
    said = {word for _, text in WORDINGS for word in re.findall(r"\w+", text)}
    said |= {word for scene in MANY for word in re.findall(r"\w+", scenes.caption(scene))}
    assert said == scenes.words()
    assert all(scenes.unknown_words(text) == [] for _, text in WORDINGS)


def test_unknown_words_ignores_case_and_punctuation_and_repeats_nothing():
    assert scenes.unknown_words("A RED house; under the 'Stars'!") == []
    assert scenes.unknown_words("Dragon, red dragon & a castle") == ["dragon", "castle"]
    assert scenes.unknown_words("") == []


def test_contact_sheet_puts_pictures_in_rows():
    pictures = [scenes.draw(one(color=color), 8)[0] for color in ("red", "green", "blue")]
    sheet = scenes.contact_sheet(pictures, 2, scale=3)
    assert sheet.size == (48, 48)
    for picture, corner in zip(pictures, [(0, 0), (24, 0), (0, 24)]):
        assert sheet.getpixel((corner[0] + 10, corner[1] + 16)) == picture.getpixel((3, 5))
    assert sheet.getpixel((40, 40)) == (255, 255, 255)
    assert scenes.contact_sheet(pictures[:1], 5, gap=2).size == (8, 8)
    apart = scenes.contact_sheet(pictures, 2, gap=2)
    assert apart.size == (18, 18) and apart.crop((0, 10, 8, 18)).tobytes() == pictures[2].tobytes()
    assert {apart.getpixel((8, 4)), apart.getpixel((9, 4)), apart.getpixel((4, 9))} == {(255, 255, 255)}


@pytest.mark.parametrize("call, message", [
    (lambda: scenes.draw(one(color="mauve")), "color is 'mauve'; there are red, orange"),
    (lambda: scenes.labels(one(place="center")), "place is 'center'; there are left, centre, right"),
    (lambda: scenes.draw(one(place="left", second=("red", "dragon", "small"))), "object is 'dragon'"),
    (lambda: scenes.draw(one(second=("blue", "tree", "small"))), "first of two objects is at the left, not at the c"),
    (lambda: scenes.draw(one(), 0), "size is 0"),
    (lambda: scenes.render(-1), "cannot draw -1 pictures"),
    (lambda: scenes.render(1, 0), "cannot draw 1 pictures of 0×0"),
    (lambda: scenes.sample(random.Random(0), second=15), "second is 15; a share lies in"),
    (lambda: scenes.contact_sheet([], 3), "cannot arrange 0 pictures")])
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
