"""Captioned storybook pictures, drawn by code: time of day × sky × ground × object × colour × size × place."""
from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
                      ("purple", "tree"), ("white", "balloon")})

RGB = {"red": (222, 35, 38), "orange": (250, 135, 20), "yellow": (252, 222, 45), "green": (40, 165, 60),
       "blue": (35, 85, 225), "purple": (130, 45, 175), "pink": (255, 140, 190), "white": (248, 248, 248)}
SKIES = {"day": ((88, 172, 240), (190, 228, 250)), "sunset": ((120, 70, 140), (255, 160, 90)),
         "night": ((10, 14, 46), (40, 52, 110))}  # colour at the top, at the horizon
GROUNDS = {"grass": (96, 170, 66), "sand": (226, 196, 120), "snow": (238, 243, 250), "sea": (30, 105, 165)}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.95, 0.78, 0.68), "night": (0.42, 0.45, 0.62)}  # on the ground
PLACES = {"small": (0.2, 0.5, 0.8), "large": (0.26, 0.5, 0.74)}  # centres of left, centre and right
HEIGHTS = {"small": 0.30, "large": 0.56}
OUTLINE = 0.55  # brightness of an object's edge


class Scene(NamedTuple):
    """What a picture shows. `second`: (colour, object, size) of a thing at the right; then the first is at the left."""

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
        held_out: False: never a pair of HELD_OUT; True: always; None: any of the 48.
        second: share of scenes with two objects.
    """
    def pair() -> tuple[str, str]:
        if held_out:
            return rng.choice(sorted(HELD_OUT))
        while True:
            found = rng.choice(ATTRIBUTES["color"]), rng.choice(ATTRIBUTES["object"])
            if held_out is None or found not in HELD_OUT:
                return found

    names = ("time", "sky", "ground", "size", "place")
    time, sky, ground, size, place = (rng.choice(ATTRIBUTES[name]) for name in names)
    color, obj = pair()
    if rng.random() >= second:
        return Scene(time, sky, ground, obj, color, size, place)
    return Scene(time, sky, ground, obj, color, size, "left", (*pair(), rng.choice(ATTRIBUTES["size"])))


class Canvas:
    """Pillow's drawing in unit coordinates (0, 0 top left, 1, 1 bottom right) with one set of masks."""

    def __init__(self, pixels: int, image: Image.Image):
        from PIL import Image, ImageDraw

        self.n, self.image = pixels, image
        self.pen = ImageDraw.Draw(image)
        self.mask = Image.new("L", image.size)
        self.mark = ImageDraw.Draw(self.mask)

    def _all(self, shape: str, points, fill, edge=None, width=0.0):
        xy = [(x * self.n, y * self.n) for x, y in points]
        options = {"outline": edge, "width": max(1, round(width * self.n))} if edge else {}
        getattr(self.pen, shape)(xy, fill=fill, **options)
        getattr(self.mark, shape)(xy, fill=255)

    def poly(self, points, fill, edge=None, width=0.0):
        self._all("polygon", points, fill, edge, width)

    def oval(self, x, y, rx, ry, fill, edge=None, width=0.0):
        self._all("ellipse", [(x - rx, y - ry), (x + rx, y + ry)], fill, edge, width)

    def box(self, x0, y0, x1, y1, fill, edge=None, width=0.0):
        self._all("rectangle", [(x0, y0), (x1, y1)], fill, edge, width)


def shade(color, factor) -> tuple[int, int, int]:
    factor = factor if isinstance(factor, tuple) else (factor,) * 3
    return tuple(max(0, min(255, round(c * f))) for c, f in zip(color, factor))


def house(c, x, y, h, color, light):
    w, edge, lw = 0.42 * h, shade(color, OUTLINE), 0.035 * h
    c.box(x - w, y - 0.58 * h, x + w, y, color, edge, lw)
    c.poly([(x - 1.3 * w, y - 0.56 * h), (x, y - h), (x + 1.3 * w, y - 0.56 * h)], shade(color, 0.62), edge, lw)
    c.box(x - 0.16 * h, y - 0.34 * h, x + 0.02 * h, y, (92, 60, 40))
    c.box(x + 0.12 * h, y - 0.42 * h, x + 0.3 * h, y - 0.24 * h, (255, 240, 170))


def tree(c, x, y, h, color, light):
    edge, lw = shade(color, OUTLINE), 0.035 * h
    c.box(x - 0.075 * h, y - 0.4 * h, x + 0.075 * h, y, (110, 72, 44))
    for dx, dy, r in ((0, 0.66, 0.35), (-0.24, 0.54, 0.22), (0.24, 0.54, 0.22)):
        c.oval(x + dx * h, y - dy * h, r * h, r * h * 0.95, edge)
    for dx, dy, r in ((-0.24, 0.54, 0.22), (0.24, 0.54, 0.22), (0, 0.66, 0.35)):
        c.oval(x + dx * h, y - dy * h, r * h - lw, r * h * 0.95 - lw, color)


def boat(c, x, y, h, color, light):
    edge, lw = shade(color, OUTLINE), 0.035 * h
    c.box(x - 0.025 * h, y - h, x + 0.025 * h, y - 0.3 * h, (96, 66, 44))
    c.poly([(x + 0.06 * h, y - 0.97 * h), (x + 0.06 * h, y - 0.42 * h), (x + 0.46 * h, y - 0.42 * h)], color, edge, lw)
    c.poly([(x - 0.06 * h, y - 0.85 * h), (x - 0.06 * h, y - 0.42 * h), (x - 0.36 * h, y - 0.42 * h)], color, edge, lw)
    c.poly([(x - 0.55 * h, y - 0.34 * h), (x + 0.55 * h, y - 0.34 * h), (x + 0.36 * h, y), (x - 0.36 * h, y)],
           color, edge, lw)


def rocket(c, x, y, h, color, light):
    edge, lw = shade(color, OUTLINE), 0.035 * h
    c.poly([(x - 0.34 * h, y), (x - 0.14 * h, y - 0.42 * h), (x - 0.1 * h, y - 0.06 * h)], shade(color, 0.62))
    c.poly([(x + 0.34 * h, y), (x + 0.14 * h, y - 0.42 * h), (x + 0.1 * h, y - 0.06 * h)], shade(color, 0.62))
    c.poly([(x - 0.17 * h, y - 0.1 * h), (x - 0.2 * h, y - 0.45 * h), (x - 0.14 * h, y - 0.72 * h), (x, y - h),
            (x + 0.14 * h, y - 0.72 * h), (x + 0.2 * h, y - 0.45 * h), (x + 0.17 * h, y - 0.1 * h)], color, edge, lw)
    c.oval(x, y - 0.56 * h, 0.09 * h, 0.09 * h, (215, 240, 250), edge, 0.6 * lw)


def balloon(c, x, y, h, color, light):
    edge, lw, y = shade(color, OUTLINE), 0.035 * h, y - 0.1 * h
    c.poly([(x - 0.24 * h, y - 0.4 * h), (x + 0.24 * h, y - 0.4 * h), (x + 0.08 * h, y - 0.14 * h),
            (x - 0.08 * h, y - 0.14 * h)], edge)
    c.oval(x, y - 0.62 * h, 0.36 * h, 0.36 * h, color, edge, lw)
    c.oval(x, y - 0.62 * h, 0.13 * h, 0.34 * h, shade(color, 0.8))
    c.box(x - 0.1 * h, y - 0.14 * h, x + 0.1 * h, y + 0.02 * h, (128, 84, 48))


def mushroom(c, x, y, h, color, light):
    edge, lw = shade(color, OUTLINE), 0.035 * h
    c.poly([(x - 0.13 * h, y - 0.5 * h), (x + 0.13 * h, y - 0.5 * h), (x + 0.18 * h, y), (x - 0.18 * h, y)],
           (244, 228, 200), (176, 150, 120), 0.7 * lw)
    dome = [(x + 0.46 * h * np.cos(a), y - 0.44 * h - 0.54 * h * np.sin(a)) for a in np.linspace(0, np.pi, 24)]
    c.poly(dome, color, edge, lw)
    for dx, dy, r in ((-0.2, 0.64, 0.06), (0.06, 0.8, 0.07), (0.24, 0.58, 0.05)):
        c.oval(x + dx * h, y - dy * h, r * h, r * h, shade(color, 0.72) if min(color) > 200 else (252, 244, 232))


OBJECTS = {"house": house, "tree": tree, "boat": boat, "rocket": rocket, "balloon": balloon, "mushroom": mushroom}


def draw(scene: Scene, size: int = 32, rng: random.Random | None = None):
    """Draw a scene: (PIL picture RGB size×size, masks {"object": bool (size,size), "second": the same}).

    rng: jitter of place, scale, hue, horizon; None: the middle of every range.
    """
    from PIL import Image

    u = rng.uniform if rng else lambda low, high: (low + high) / 2
    n = 4 * size
    horizon = u(0.62, 0.72)
    light = shade((255, 255, 255), LIGHT[scene.time])
    light = tuple(value / 255 for value in light)
    image = _background(scene, n, horizon, u)
    things = [(scene.place, scene.object, scene.color, scene.size)]
    if scene.second:
        things.append(("right", scene.second[1], scene.second[0], scene.second[2]))
    middles = [PLACES[scale][ATTRIBUTES["place"].index(place)] + u(-0.045, 0.045) for place, _, _, scale in things]
    canvas, masks = Canvas(n, image), {}
    _sky(canvas, scene, middles, u)
    _ground(canvas, scene, horizon, light, u)
    for name, x, (place, obj, color, scale) in zip(("object", "second"), middles, things):
        canvas = Canvas(n, image)
        h = HEIGHTS[scale] * u(0.92, 1.08)
        y = horizon + u(0.12, 0.2) if scale == "large" else horizon + u(0.1, 0.2)
        tint = tuple(factor * (1 + (value - 1) * 0.18) for factor, value in zip((u(0.94, 1.06),) * 3, light))
        OBJECTS[obj](canvas, x, y, h, shade(RGB[color], tint), light)
        masks[name] = np.asarray(canvas.mask.resize((size, size), Image.BOX)) > 127
    return image.resize((size, size), Image.BOX), masks


def _background(scene: Scene, n: int, horizon: float, u):
    from PIL import Image

    top, low = (np.array(shade(c, u(0.92, 1.08)), dtype=float) for c in SKIES[scene.time])
    ramp = np.clip(np.linspace(0, 1 / horizon, n), 0, 1)[:, None]
    rows = (top + (low - top) * ramp).clip(0, 255)
    return Image.fromarray(np.repeat(rows[:, None].astype(np.uint8), n, 1))


def _sky(c: Canvas, scene: Scene, middles: list[float], u) -> None:
    free = [x for x in (0.12, 0.31, 0.5, 0.69, 0.88) if all(abs(x - middle) > 0.19 for middle in middles)]
    spot = free[int(u(0, len(free) - 1e-9))] + u(-0.05, 0.05)  # of sun and moon: not behind an object
    if scene.sky == "sun":
        x, y, r = spot, u(0.1, 0.19), u(0.085, 0.105)
        c.oval(x, y, 1.35 * r, 1.35 * r, (255, 214, 110))
        c.oval(x, y, r, r, (255, 240, 90))
    elif scene.sky == "moon":
        x, y, r = spot, u(0.11, 0.19), u(0.09, 0.11)
        behind = c.image.getpixel((min(c.n - 1, int(x * c.n)), int(y * c.n)))
        c.oval(x, y, r, r, (246, 246, 236))
        c.oval(x + 0.5 * r, y - 0.2 * r, 0.85 * r, 0.85 * r, behind)
    elif scene.sky == "stars":
        for i in range(9):
            x, y = (i % 5 + 0.5) / 5 + u(-0.07, 0.07) + 0.1 * (i // 5), 0.08 + 0.17 * (i // 5) + u(-0.04, 0.04)
            r = u(0.016, 0.026)
            c.poly([(x, y - 2 * r), (x + 0.6 * r, y - 0.6 * r), (x + 2 * r, y), (x + 0.6 * r, y + 0.6 * r),
                    (x, y + 2 * r), (x - 0.6 * r, y + 0.6 * r), (x - 2 * r, y), (x - 0.6 * r, y - 0.6 * r)],
                   (255, 250, 200))
    elif scene.sky == "clouds":
        light = {"day": 1.0, "sunset": (0.98, 0.85, 0.86), "night": (0.55, 0.57, 0.7)}[scene.time]
        white = shade((250, 250, 252), light)
        for i in range(3):
            x, y, r = (i + 0.5) / 3 + u(-0.08, 0.08), 0.12 + 0.07 * (i % 2) + u(-0.03, 0.03), u(0.05, 0.065)
            for dx, dy, k in ((-1.3, 0.2, 0.8), (0, -0.3, 1.15), (1.3, 0.2, 0.8), (0, 0.35, 1.0)):
                c.oval(x + dx * r, y + dy * r, 1.2 * k * r, 0.8 * k * r, white)


def _ground(c: Canvas, scene: Scene, horizon: float, light, u) -> None:
    base = shade(shade(GROUNDS[scene.ground], light), u(0.95, 1.05))
    bumps = {"grass": 0.02, "sand": 0.035, "snow": 0.03, "sea": 0.0}[scene.ground]
    phase, waves = u(0, 6.28), u(0.8, 1.4)
    xs = np.linspace(0, 1, 24)
    ys = horizon + bumps * np.sin(6.28 * waves * xs + phase)
    c.poly([(0, 1), *zip(xs, ys), (1, 1)], base)
    dark, pale = shade(base, 0.82), shade(base, 1.18)
    if scene.ground == "sea":
        for i in range(7):
            y, x = horizon + 0.04 + 0.05 * i + u(-0.01, 0.01), u(0, 0.8)
            c.box(x, y, x + u(0.12, 0.24), y + 0.014, pale)
            x = u(0, 0.8)
            c.box(x, y + 0.025, x + u(0.1, 0.2), y + 0.037, dark)
    elif scene.ground == "grass":
        for i in range(16):
            x, y = u(0, 1), u(horizon + 0.05, 1)
            c.poly([(x - 0.012, y), (x, y - 0.045), (x + 0.012, y)], dark if i % 2 else pale)
    else:
        for i in range(10 if scene.ground == "sand" else 4):
            x, y = u(0, 1), u(horizon + 0.06, 1)
            r = 0.009 if scene.ground == "sand" else 0.05
            color = dark if scene.ground == "sand" else shade(base, (0.93, 0.95, 0.99))
            c.oval(x, y, r, 0.35 * r if r > 0.01 else r, color)


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


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """What the scene shows, in words.

    Args:
        rng: None: the canonical wording that names every attribute; else one of many natural ones, of which two thirds
            name every attribute and the others leave some out.

    >>> caption(Scene("night", "stars", "snow", "house", "red", "large", "left"))
    'a large red house on the left, snow, night, stars'
    """
    def word(table, value, plain=0.5):
        return table[value][0] if rng is None or rng.random() < plain else rng.choice(table[value])

    share = 1.0 if rng is None else rng.random()
    keep = (lambda: True) if share > 0.35 else (lambda: rng.random() < 0.4) if share > 0.1 else (lambda: False)

    def thing(color, obj, size, place=None):
        words = [word(SIZE_WORDS, size)] if keep() else []
        article = "" if rng and rng.random() < 0.1 else "a "
        tail = [word(PLACE_WORDS, place)] if place else []
        if words == [] and color[0] == "o":
            article = article and "an "
        return article + " ".join([*words, color, obj, *tail])

    if scene.second:
        places = ("left", "right") if rng and rng.random() < 0.4 else (None, None)
        first = thing(scene.color, scene.object, scene.size, places[0])
        head = f"{first} and {thing(*scene.second, places[1])}"
    else:
        head = thing(scene.color, scene.object, scene.size, scene.place if keep() else None)
    rest = [word(table, value) for table, value in
            ((GROUND_WORDS, scene.ground), (TIME_WORDS, scene.time), (SKY_WORDS, scene.sky)) if keep()]
    if rng and rng.random() < 0.5:
        rng.shuffle(rest)
    if rng and rest and rng.random() < 0.15:
        return ", ".join([*rest, head])
    return ", ".join([head, *rest])


def labels(scene: Scene) -> dict[str, int]:
    """Index into ATTRIBUTES of each of the seven values."""
    return {name: values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()}


def render(n: int, size: int = 32, *, seed: int = 0, held_out: bool | None = False, second: float = 0.15,
           first: int = 0) -> tuple[Tensor, list[Scene]]:
    """Scenes number first … first + n − 1 of a seed: pictures (n,3,size,size) uint8, and what they show."""
    pictures, drawn = np.empty((n, size, size, 3), np.uint8), []
    for i in range(n):
        rng = random.Random(f"{seed} {first + i}")
        scene = sample(rng, held_out=held_out, second=second)
        pictures[i] = np.asarray(draw(scene, size, rng)[0])
        drawn.append(scene)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), drawn


def words() -> frozenset[str]:
    """Every word that a caption can contain, in lower case."""
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


def contact_sheet(pictures: list[Image.Image], columns: int, *, scale: int = 1) -> Image.Image:
    """Pictures of one size side by side, row after row, each enlarged `scale` times with hard pixels."""
    from PIL import Image

    w, h = (scale * side for side in pictures[0].size)
    sheet = Image.new("RGB", (w * min(columns, len(pictures)), h * -(-len(pictures) // columns)))
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((w, h), Image.NEAREST), (i % columns * w, i // columns * h))
    return sheet
