"""Captioned storybook pictures, drawn by code: time of day × sky × ground × object × colour × size × place."""
from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.data.drawing import paint
from minidiff.io.images import contact_sheet  # noqa: F401  (sheets of drawings are made with it)

if TYPE_CHECKING:
    from PIL import Image

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "time": ("day", "sunset", "night"),
    "sky": ("sun", "moon", "stars", "clouds", "clear"),
    "ground": ("grass", "sand", "snow", "sea"),
    "object": ("house", "tree", "boat", "rocket", "balloon", "mushroom"),
    "color": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "size": ("small", "large"),
    "place": ("left", "centre", "right"),
}
HELD_OUT = frozenset({("red", "boat"), ("yellow", "house"), ("green", "rocket"), ("blue", "mushroom"),
                      ("purple", "tree"), ("white", "balloon")})  # (colour, object) that mini-sd is never shown

# The first wording of each value is the canonical one.
TIME_WORDS = {"day": ("day", "by day", "in daylight"), "sunset": ("sunset", "at sunset", "in the evening light"),
              "night": ("night", "at night", "in the dark")}
SKY_WORDS = {"sun": ("sun", "under the sun", "a bright sun"), "moon": ("moon", "under the moon", "a crescent moon"),
             "stars": ("stars", "under the stars", "a starry sky"),
             "clouds": ("clouds", "under clouds", "a cloudy sky"),
             "clear": ("clear sky", "under a clear sky", "a clear sky")}
GROUND_WORDS = {"grass": ("grass", "on the grass", "on a green meadow"),
                "sand": ("sand", "on the sand", "in the desert"),
                "snow": ("snow", "in the snow", "on snow"), "sea": ("sea", "on the sea", "by the sea")}
PLACE_WORDS = {"left": ("on the left", "at the left", "on the left side"),
               "centre": ("in the centre", "in the center", "in the middle"),
               "right": ("on the right", "at the right", "on the right side")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}


class Scene(NamedTuple):
    """What a picture shows.

    Args:
        time, sky, ground, object, color, size, place: one value each of ATTRIBUTES.
        second: (colour, object, size) of an object at the right; then `place`, of the first, is "left".
    """

    time: str
    sky: str
    ground: str
    object: str
    color: str
    size: str
    place: str
    second: tuple[str, str, str] | None = None


def sample(rng: random.Random, *, held_out: bool | None = False, second: float = 0.15) -> Scene:
    """A random scene: independent attributes, the (colour, object) pair as `held_out` says.

    Args:
        rng: where the chance comes from.
        held_out: False: never a pair of HELD_OUT; True: always; None: any of the 48.
        second: share of scenes with two objects, in [0, 1].

    Raises:
        ValueError: `second` is no share.

    >>> sample(random.Random(3), second=0.0)[:6]
    ('day', 'clear', 'sand', 'mushroom', 'white', 'large')
    """
    if not 0.0 <= second <= 1.0:
        raise ValueError(f"second is {second}; a share lies in [0, 1]")

    def pair() -> tuple[str, str]:
        if held_out:
            return rng.choice(sorted(HELD_OUT))
        while True:
            chosen = rng.choice(ATTRIBUTES["color"]), rng.choice(ATTRIBUTES["object"])
            if held_out is None or chosen not in HELD_OUT:
                return chosen

    time, sky, ground, size, place = (rng.choice(ATTRIBUTES[name])
                                      for name in ("time", "sky", "ground", "size", "place"))
    color, obj = pair()
    if rng.random() >= second:
        return Scene(time, sky, ground, obj, color, size, place)
    return Scene(time, sky, ground, obj, color, size, "left", (*pair(), rng.choice(ATTRIBUTES["size"])))


def labels(scene: Scene) -> dict[str, int]:
    """Index into ATTRIBUTES of each of the seven values (of the first object, where there are two).

    Raises:
        ValueError: a value that is not in ATTRIBUTES, or a first of two objects that is not at the left.

    >>> labels(Scene("night", "stars", "snow", "house", "red", "large", "left"))
    {'time': 2, 'sky': 2, 'ground': 2, 'object': 0, 'color': 0, 'size': 1, 'place': 0}
    """
    if scene.second:
        if scene.place != "left":
            raise ValueError(f"the first of two objects is at the left, not at the {scene.place}")
        color, obj, size = scene.second
        labels(scene._replace(color=color, object=obj, size=size, second=None))
    for name, values in ATTRIBUTES.items():
        if getattr(scene, name) not in values:
            raise ValueError(f"{name} is {getattr(scene, name)!r}; there are {', '.join(values)}")
    return {name: values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()}


def counts(scene: Scene) -> dict[str, int]:
    """How many suns, moons and objects a scene has; `drawing.crowd` says the same of its pictures.

    >>> counts(Scene("night", "moon", "snow", "house", "red", "large", "left", ("blue", "tree", "small")))
    {'sun': 0, 'moon': 1, 'object': 2}
    """
    return {"sun": int(scene.sky == "sun"), "moon": int(scene.sky == "moon"), "object": 1 + bool(scene.second)}


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """What the scene shows, in words.

    Args:
        rng: None: the canonical wording that names every attribute; else one of many natural ones, of which two thirds
            name every attribute and the others leave some out (where one of two objects stands is said in 40 %).

    >>> scene = Scene("night", "stars", "snow", "house", "red", "large", "left")
    >>> caption(scene)
    'a large red house on the left, snow, night, stars'
    >>> caption(scene, random.Random(0))
    'big red house at the left, snow, at night, under the stars'
    """
    def word(table: dict[str, tuple[str, ...]], value: str) -> str:
        return table[value][0] if rng is None or rng.random() < 0.5 else rng.choice(table[value])

    share = 1.0 if rng is None else rng.random()
    keep = (lambda: True) if share > 0.35 else (lambda: rng.random() < 0.4) if share > 0.1 else (lambda: False)

    def thing(color: str, obj: str, size: str, place: str | None = None) -> str:
        words = [word(SIZE_WORDS, size)] if keep() else []
        article = "" if rng and rng.random() < 0.1 else "an " if not words and color[0] == "o" else "a "
        tail = [word(PLACE_WORDS, place)] if place else []
        return article + " ".join([*words, color, obj, *tail])

    if scene.second:
        left, right = ("left", "right") if rng and rng.random() < 0.4 else (None, None)
        first = thing(scene.color, scene.object, scene.size, left)
        head = f"{first} and {thing(*scene.second, right)}"
    else:
        head = thing(scene.color, scene.object, scene.size, scene.place if keep() else None)
    rest = [word(table, value) for table, value in
            ((GROUND_WORDS, scene.ground), (TIME_WORDS, scene.time), (SKY_WORDS, scene.sky)) if keep()]
    if rng and rng.random() < 0.5:
        rng.shuffle(rest)
    if rng and rest and rng.random() < 0.15:
        return ", ".join([*rest, head])
    return ", ".join([head, *rest])


def words() -> frozenset[str]:
    """Every word that a caption can contain, in lower case.

    >>> sorted(words() & {"mushroom", "middle", "dragon"})
    ['middle', 'mushroom']
    """
    tables = (TIME_WORDS, SKY_WORDS, GROUND_WORDS, PLACE_WORDS, SIZE_WORDS)
    phrases = [phrase for table in tables for row in table.values() for phrase in row]
    return frozenset(" ".join([*phrases, *ATTRIBUTES["object"], *ATTRIBUTES["color"], "a an and"]).split())


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that no caption contains, in order, each once; case and punctuation do not count.

    >>> unknown_words("A red dragon, on the sea!")
    ['dragon']
    """
    known = words()
    return list(dict.fromkeys(word for word in re.findall(r"[^\W_]+", prompt.lower()) if word not in known))


def draw(scene: Scene, size: int = 32, rng: random.Random | None = None) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """Draw a scene, anti-aliased.

    Args:
        size: side in pixels.
        rng: jitter of place, scale, brightness, horizon and all that is in the sky and on the ground; None: the middle
            of every range.

    Returns:
        RGB picture size×size, and the masks (bool, (size,size)) of what was drawn as "object" and, where there is one,
        "second", which may cover the edge of the first.

    Raises:
        ValueError: size < 1, or a scene that `labels` refuses.

    >>> picture, masks = draw(Scene("day", "sun", "sea", "boat", "white", "large", "centre"), 64)
    >>> picture.size, masks["object"].shape, bool(masks["object"][32, 32])
    ((64, 64), (64, 64), True)
    """
    labels(scene)
    if size < 1:
        raise ValueError(f"size is {size}; a picture has at least 1 pixel")
    return paint(scene, size, rng.uniform if rng else lambda low, high: (low + high) / 2)


def render(n: int, size: int = 32, *, seed: int = 0, held_out: bool | None = False, second: float = 0.15,
           first: int = 0) -> tuple[Tensor, list[Scene]]:
    """Scenes number first … first + n − 1 of a seed; picture i depends on (seed, i) and the options of `sample` only.

    Returns:
        pictures (n,3,size,size) uint8, and what they show.

    Raises:
        ValueError: n < 0, size < 1, or `second` outside [0, 1].

    >>> pictures, shown = render(2, 16); pictures.shape, len(shown)
    (torch.Size([2, 3, 16, 16]), 2)
    """
    if n < 0 or size < 1:
        raise ValueError(f"cannot draw {n} pictures of {size}×{size} pixels")
    pictures, drawn = np.empty((n, size, size, 3), np.uint8), []
    for i in range(n):
        rng = random.Random(f"{seed} {first + i}")
        scene = sample(rng, held_out=held_out, second=second)
        pictures[i] = np.asarray(draw(scene, size, rng)[0])
        drawn.append(scene)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), drawn
