"""How a scene is painted: sky, ground and objects in unit coordinates, so that any number of pixels will do.

(0, 0) is the top left corner, (1, 1) the bottom right; an object of height h stands with its foot at (x, y).
"""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Color = tuple[float, float, float]
Point = tuple[float, float]
Jitter = Callable[[float, float], float]  # (low, high) -> a number between the two

RGB = {"red": (222, 35, 38), "orange": (250, 135, 20), "yellow": (252, 222, 45), "green": (40, 165, 60),
       "blue": (35, 85, 225), "purple": (130, 45, 175), "pink": (255, 140, 190), "white": (248, 248, 248)}
SKIES = {"day": ((88, 172, 240), (190, 228, 250)), "sunset": ((120, 70, 140), (255, 160, 90)),
         "night": ((10, 14, 46), (40, 52, 110))}  # colour at the top, at the horizon
GROUNDS = {"grass": (96, 170, 66), "sand": (226, 196, 120), "snow": (238, 243, 250), "sea": (30, 105, 165)}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.95, 0.78, 0.68), "night": (0.42, 0.45, 0.62)}  # on the ground
CLOUDS = {"day": 1.0, "sunset": (0.98, 0.85, 0.86), "night": (0.55, 0.57, 0.7)}  # light on them
PLACES = {"small": (0.2, 0.5, 0.8), "large": (0.26, 0.5, 0.74)}  # centres of left, centre and right
HEIGHTS = {"small": 0.30, "large": 0.56}
OUTLINE = 0.55  # brightness of an object's edge
SAMPLES = 4     # per pixel and axis: the picture is painted larger and averaged


class Canvas:
    """Pillow's drawing in unit coordinates, on a picture of n×n samples, with a mask of what was drawn."""

    def __init__(self, n: int, image: Image.Image):
        from PIL import Image, ImageDraw

        self.n, self.image, self.mask = n, image, Image.new("L", image.size)
        self.pens = [(ImageDraw.Draw(image), False), (ImageDraw.Draw(self.mask), True)]

    def poly(self, points: Sequence[Point], fill: Color, edge: Color | None = None, width: float = 0.0) -> None:
        """A polygon; `edge`, if any, is a border of the given width inside it."""
        self._shape("polygon", points, fill, edge, width)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Color, edge: Color | None = None,
             width: float = 0.0) -> None:
        """An ellipse around (x, y)."""
        self._shape("ellipse", [(x - rx, y - ry), (x + rx, y + ry)], fill, edge, width)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Color, edge: Color | None = None,
            width: float = 0.0) -> None:
        """An upright rectangle."""
        self._shape("rectangle", [(x0, y0), (x1, y1)], fill, edge, width)

    def _shape(self, method: str, points, fill, edge, width) -> None:
        xy = [(x * self.n, y * self.n) for x, y in points]
        border = {"outline": edge, "width": max(1, round(width * self.n))} if edge else {}
        for pen, mask in self.pens:
            getattr(pen, method)(xy, fill=255) if mask else getattr(pen, method)(xy, fill=fill, **border)


def paint(scene: NamedTuple, size: int, u: Jitter) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """Paint a `scenes.Scene`: what `scenes.draw` returns, unchecked. Every jitter is one call of u."""
    from PIL import Image

    n = SAMPLES * size
    horizon = u(0.62, 0.72)
    light = tuple(value / 255 for value in shade((255, 255, 255), LIGHT[scene.time]))
    things = [(scene.place, scene.object, scene.color, scene.size)]
    if scene.second:
        color, obj, scale = scene.second
        things.append(("right", obj, color, scale))
    image = gradient(scene.time, n, horizon, u)
    middles = [PLACES[scale][("left", "centre", "right").index(place)] + u(-0.045, 0.045)
               for place, _, _, scale in things]
    canvas, masks = Canvas(n, image), {}
    sky(canvas, scene.sky, scene.time, middles, u)
    ground(canvas, scene.ground, horizon, light, u)
    for name, x, (_, obj, color, scale) in zip(("object", "second"), middles, things):
        canvas = Canvas(n, image)
        h = HEIGHTS[scale] * u(0.92, 1.08)
        y = horizon + (u(0.12, 0.2) if scale == "large" else u(0.1, 0.2))
        brightness = u(0.94, 1.06)
        tint = tuple(brightness * (1 + (value - 1) * 0.18) for value in light)  # 18 % of it, so that colours stay clear
        (OBJECTS | UNSEEN)[obj](canvas, x, y, h, shade(RGB[color], tint))
        masks[name] = np.asarray(canvas.mask.resize((size, size), Image.Resampling.BOX)) > 127
    return image.resize((size, size), Image.Resampling.BOX), masks


def crowd(size: int, rng: random.Random) -> tuple[Image.Image, dict[str, int]]:
    """A picture that no caption asks for, and what is in it: up to three objects, and suns and moons as there is room.

    A net that counts learns from it. They stand so far apart that each may be covered in part, none as a whole.

    >>> picture, counts = crowd(32, random.Random(1)); picture.size, counts
    ((32, 32), {'sun': 0, 'moon': 1, 'object': 2})
    """
    from PIL import Image

    u, n, time = rng.uniform, SAMPLES * size, rng.choice(list(SKIES))
    horizon, light = u(0.62, 0.72), tuple(value / 255 for value in shade((255, 255, 255), LIGHT[time]))
    empty = gradient(time, n, horizon, u)
    image = empty.copy()
    canvas = Canvas(n, image)
    sky(canvas, rng.choice(("stars", "clouds", "clear")), time, [], u)
    xs = apart([u(0.12, 0.88) for _ in range(rng.randrange(4))], 0.22)
    counts = {"sun": 0, "moon": 0, "object": len(xs)}
    for x in apart([*xs, *(u(0.06, 0.94) for _ in range(rng.randrange(7)))], 0.19)[len(xs):]:
        kind, y = rng.choice(("sun", "moon")), u(0.08, 0.25)
        sun(canvas, x, y, u) if kind == "sun" else moon(canvas, x, y, u, empty)
        counts[kind] += 1
    ground(canvas, rng.choice(list(GROUNDS)), horizon, light, u)
    for x in xs:
        tint = tuple(u(0.94, 1.06) * (1 + (value - 1) * 0.18) for value in light)
        scale = rng.choice(list(HEIGHTS))
        OBJECTS[rng.choice(list(OBJECTS))](canvas, x, horizon + u(0.1, 0.2), HEIGHTS[scale] * u(0.92, 1.08),
                                           shade(RGB[rng.choice(list(RGB))], tint))
    return image.resize((size, size), Image.Resampling.BOX), counts


def apart(xs: list[float], least: float) -> list[float]:
    """Those numbers that are at least so far from all that stand before them and are kept.

    >>> apart([0.1, 0.2, 0.5, 0.45], 0.2)
    [0.1, 0.5]
    """
    kept: list[float] = []
    for x in xs:
        kept += [x] if all(abs(x - before) >= least for before in kept) else []
    return kept


def shade(color: Color, factor: float | Color) -> tuple[int, int, int]:
    """A colour times a brightness, or times the colour of the light.

    >>> shade((200, 100, 50), 0.5), shade((200, 100, 50), (2.0, 1.0, 0.0))
    ((100, 50, 25), (255, 100, 0))
    """
    factor = factor if isinstance(factor, tuple) else (factor,) * 3
    return tuple(max(0, min(255, round(c * f))) for c, f in zip(color, factor))


def gradient(time: str, n: int, horizon: float, u: Jitter) -> Image.Image:
    """The empty sky: from the top colour to the horizon's."""
    from PIL import Image

    top, low = (np.array(shade(c, u(0.92, 1.08)), dtype=float) for c in SKIES[time])
    ramp = np.clip(np.linspace(0, 1 / horizon, n), 0, 1)[:, None]
    rows = (top + (low - top) * ramp).clip(0, 255)
    return Image.fromarray(np.repeat(rows[:, None].astype(np.uint8), n, 1))


def sky(c: Canvas, kind: str, time: str, middles: list[float], u: Jitter) -> None:
    """Sun, moon, stars or clouds; sun and moon where no object can hide them."""
    free = [x for x in (0.12, 0.31, 0.5, 0.69, 0.88) if all(abs(x - middle) > 0.19 for middle in middles)]
    spot = free[int(u(0, len(free) - 1e-9))] + u(-0.05, 0.05)
    if kind == "sun":
        sun(c, spot, u(0.1, 0.19), u)
    elif kind == "moon":
        moon(c, spot, u(0.11, 0.19), u, c.image)
    elif kind == "stars":
        for i in range(9):
            x, y = (i % 5 + 0.5) / 5 + u(-0.07, 0.07) + 0.1 * (i // 5), 0.08 + 0.17 * (i // 5) + u(-0.04, 0.04)
            r = u(0.016, 0.026)
            rays = ((0, -2), (0.6, -0.6), (2, 0), (0.6, 0.6), (0, 2), (-0.6, 0.6), (-2, 0), (-0.6, -0.6))
            c.poly([(x + dx * r, y + dy * r) for dx, dy in rays], (255, 250, 200))
    elif kind == "clouds":
        white = shade((250, 250, 252), CLOUDS[time])
        for i in range(3):
            x, y, r = (i + 0.5) / 3 + u(-0.08, 0.08), 0.12 + 0.07 * (i % 2) + u(-0.03, 0.03), u(0.05, 0.065)
            for dx, dy, k in ((-1.3, 0.2, 0.8), (0, -0.3, 1.15), (1.3, 0.2, 0.8), (0, 0.35, 1.0)):
                c.oval(x + dx * r, y + dy * r, 1.2 * k * r, 0.8 * k * r, white)


def sun(c: Canvas, x: float, y: float, u: Jitter) -> None:
    """A disc with a halo around (x, y)."""
    r = u(0.085, 0.105)
    c.oval(x, y, 1.35 * r, 1.35 * r, (255, 214, 110))
    c.oval(x, y, r, r, (255, 240, 90))


def moon(c: Canvas, x: float, y: float, u: Jitter, empty: Image.Image) -> None:
    """A crescent around (x, y): a disc, and on it another one in the colour of the `empty` sky."""
    r = u(0.09, 0.11)
    behind = empty.getpixel((min(c.n - 1, int(x * c.n)), int(y * c.n)))
    c.oval(x, y, r, r, (246, 246, 236))
    c.oval(x + 0.5 * r, y - 0.2 * r, 0.85 * r, 0.85 * r, behind)


def ground(c: Canvas, kind: str, horizon: float, light: Color, u: Jitter) -> None:
    """Hills (a straight line for the sea) in one colour, with waves, blades, grains or drifts on them."""
    base = shade(shade(GROUNDS[kind], light), u(0.95, 1.05))
    bumps = {"grass": 0.02, "sand": 0.035, "snow": 0.03, "sea": 0.0}[kind]
    phase, waves = u(0, 6.28), u(0.8, 1.4)
    xs = np.linspace(0, 1, 24)
    ys = horizon + bumps * np.sin(6.28 * waves * xs + phase)
    c.poly([(0, 1), *zip(xs, ys), (1, 1)], base)
    dark, pale = shade(base, 0.82), shade(base, 1.18)
    if kind == "sea":
        for i in range(7):
            y, x = horizon + 0.04 + 0.05 * i + u(-0.01, 0.01), u(0, 0.8)
            c.box(x, y, x + u(0.12, 0.24), y + 0.014, pale)
            x = u(0, 0.8)
            c.box(x, y + 0.025, x + u(0.1, 0.2), y + 0.037, dark)
    elif kind == "grass":
        for i in range(16):
            x, y = u(0, 1), u(horizon + 0.05, 1)
            c.poly([(x - 0.012, y), (x, y - 0.045), (x + 0.012, y)], dark if i % 2 else pale)
    elif kind == "sand":
        for _ in range(10):
            c.oval(u(0, 1), u(horizon + 0.06, 1), 0.009, 0.009, dark)
    else:
        for _ in range(4):
            c.oval(u(0, 1), u(horizon + 0.06, 1), 0.05, 0.35 * 0.05, shade(base, (0.93, 0.95, 0.99)))


def house(c: Canvas, x: float, y: float, h: float, color: Color) -> None:
    """Walls in the colour, a darker roof, a brown door and a lit window."""
    w, edge, lw = 0.42 * h, shade(color, OUTLINE), 0.035 * h
    c.box(x - w, y - 0.58 * h, x + w, y, color, edge, lw)
    c.poly([(x - 1.3 * w, y - 0.56 * h), (x, y - h), (x + 1.3 * w, y - 0.56 * h)], shade(color, 0.62), edge, lw)
    c.box(x - 0.16 * h, y - 0.34 * h, x + 0.02 * h, y, (92, 60, 40))
    c.box(x + 0.12 * h, y - 0.42 * h, x + 0.3 * h, y - 0.24 * h, (255, 240, 170))


def tree(c: Canvas, x: float, y: float, h: float, color: Color) -> None:
    """A crown of three discs in the colour on a brown trunk."""
    edge, lw = shade(color, OUTLINE), 0.035 * h
    c.box(x - 0.075 * h, y - 0.4 * h, x + 0.075 * h, y, (110, 72, 44))
    for dx, dy, r in ((0, 0.66, 0.35), (-0.24, 0.54, 0.22), (0.24, 0.54, 0.22)):
        c.oval(x + dx * h, y - dy * h, r * h, r * h * 0.95, edge)
    for dx, dy, r in ((-0.24, 0.54, 0.22), (0.24, 0.54, 0.22), (0, 0.66, 0.35)):
        c.oval(x + dx * h, y - dy * h, r * h - lw, r * h * 0.95 - lw, color)


def boat(c: Canvas, x: float, y: float, h: float, color: Color) -> None:
    """Hull and two sails in the colour, a brown mast."""
    edge, lw = shade(color, OUTLINE), 0.035 * h
    c.box(x - 0.025 * h, y - h, x + 0.025 * h, y - 0.3 * h, (96, 66, 44))
    c.poly([(x + 0.06 * h, y - 0.97 * h), (x + 0.06 * h, y - 0.42 * h), (x + 0.46 * h, y - 0.42 * h)], color, edge, lw)
    c.poly([(x - 0.06 * h, y - 0.85 * h), (x - 0.06 * h, y - 0.42 * h), (x - 0.36 * h, y - 0.42 * h)], color, edge, lw)
    c.poly([(x - 0.55 * h, y - 0.34 * h), (x + 0.55 * h, y - 0.34 * h), (x + 0.36 * h, y), (x - 0.36 * h, y)],
           color, edge, lw)


def rocket(c: Canvas, x: float, y: float, h: float, color: Color) -> None:
    """A pointed body in the colour, darker fins, a round window."""
    edge, lw = shade(color, OUTLINE), 0.035 * h
    for side in (-1, 1):
        c.poly([(x + side * 0.34 * h, y), (x + side * 0.14 * h, y - 0.42 * h), (x + side * 0.1 * h, y - 0.06 * h)],
               shade(color, 0.62))
    c.poly([(x - 0.17 * h, y - 0.1 * h), (x - 0.2 * h, y - 0.45 * h), (x - 0.14 * h, y - 0.72 * h), (x, y - h),
            (x + 0.14 * h, y - 0.72 * h), (x + 0.2 * h, y - 0.45 * h), (x + 0.17 * h, y - 0.1 * h)], color, edge, lw)
    c.oval(x, y - 0.56 * h, 0.09 * h, 0.09 * h, (215, 240, 250), edge, 0.6 * lw)


def balloon(c: Canvas, x: float, y: float, h: float, color: Color) -> None:
    """An envelope in the colour with a darker stripe, and a basket that hovers."""
    edge, lw, y = shade(color, OUTLINE), 0.035 * h, y - 0.1 * h
    c.poly([(x - 0.24 * h, y - 0.4 * h), (x + 0.24 * h, y - 0.4 * h), (x + 0.08 * h, y - 0.14 * h),
            (x - 0.08 * h, y - 0.14 * h)], edge)
    c.oval(x, y - 0.62 * h, 0.36 * h, 0.36 * h, color, edge, lw)
    c.oval(x, y - 0.62 * h, 0.13 * h, 0.34 * h, shade(color, 0.8))
    c.box(x - 0.1 * h, y - 0.14 * h, x + 0.1 * h, y + 0.02 * h, (128, 84, 48))


def mushroom(c: Canvas, x: float, y: float, h: float, color: Color) -> None:
    """A domed cap in the colour with spots, pale or, on a pale cap, dark; a pale stem."""
    edge, lw = shade(color, OUTLINE), 0.035 * h
    c.poly([(x - 0.13 * h, y - 0.5 * h), (x + 0.13 * h, y - 0.5 * h), (x + 0.18 * h, y), (x - 0.18 * h, y)],
           (244, 228, 200), (176, 150, 120), 0.7 * lw)
    dome = [(x + 0.46 * h * np.cos(a), y - 0.44 * h - 0.54 * h * np.sin(a)) for a in np.linspace(0, np.pi, 24)]
    c.poly(dome, color, edge, lw)
    for dx, dy, r in ((-0.2, 0.64, 0.06), (0.06, 0.8, 0.07), (0.24, 0.58, 0.05)):
        c.oval(x + dx * h, y - dy * h, r * h, r * h, shade(color, 0.72) if min(color) > 200 else (252, 244, 232))


def cat(c: Canvas, x: float, y: float, h: float, color: Color) -> None:
    """A cat that sits with its back to us: ears, a darker stripe down the back, a tail with a pale tip at its side."""
    edge, lw, dark = shade(color, OUTLINE), 0.035 * h, shade(color, 0.72)
    tail = [(x + (0.2 + 0.36 * np.sin(2.2 * k)) * h, y - (0.07 + 0.5 * k * k) * h) for k in np.linspace(0, 1, 20)]
    for rim, fill in ((0.085, edge), (0.05, color)):
        for tx, ty in tail:
            c.oval(tx, ty, rim * h, rim * h, fill)
    for tx, ty in tail[-4:]:
        c.oval(tx, ty, 0.05 * h, 0.05 * h, (250, 244, 232))
    c.oval(x, y - 0.28 * h, 0.32 * h, 0.29 * h, color, edge, lw)
    for side in (-1, 1):
        c.poly([(x + side * 0.26 * h, y - h), (x + side * 0.27 * h, y - 0.62 * h), (x + side * 0.02 * h, y - 0.8 * h)],
               color, edge, lw)
    c.oval(x, y - 0.66 * h, 0.27 * h, 0.22 * h, color, edge, lw)
    c.oval(x, y - 0.3 * h, 0.1 * h, 0.24 * h, dark)


OBJECTS = {"house": house, "tree": tree, "boat": boat, "rocket": rocket, "balloon": balloon, "mushroom": mushroom}
UNSEEN = {"cat": cat}  # in no scene: mini-sd has never been shown one
