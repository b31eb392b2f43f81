"""The studio: write a prompt, watch the picture come, take it back step by step, see where each word looks."""
from __future__ import annotations

import html
import math
import time
import uuid
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.data.scenes import unknown_words
from minidiff.editing import look
from minidiff.nets.attention import watched
from minidiff.samplers import SAMPLERS, Step
from minidiff.sd.pipeline import StableDiffusion
from minidiff.sd.settings import Settings
from minidiff.teach.diagram import alive, light
from minidiff.teach.explore import LIVE, Control, player, unseen
from minidiff.teach.film import as_film, thin
from minidiff.teach.show import COLORS, LINE, fitting, letters, png, publish
from minidiff.text import words

if TYPE_CHECKING:
    from PIL import Image

STORED = 8           # frames of the film that stands in for the widget
SIDE, LARGE = 192, 384  # of each picture, in pixels: stored, and live
GAP = 8              # pixels between two pictures
SHARE = 0.15         # of the time that drawing takes, for looking on
NOBODY = "(no word)"
OWN, QUICK = "this one", "mini-sd-lcm in 4 steps: a picture while you type"
PAIRS = (            # what two prompts from the same noise can show
    ("one word: the colour", "a large red house on the left, snow, night, stars",
     "a large blue house on the left, snow, night, stars"),
    ("one word: the object", "a yellow boat, sea, sunset", "a yellow balloon, sea, sunset"),
    ("the time of day", "a pink tree, grass, day, sun", "a pink tree, grass, night, moon"),
    ("the place", "a small rocket on the left, sand, day", "a small rocket on the right, sand, day"),
    ("never seen together", "a red rocket, snow, day", "a green rocket, snow, day"),
    ("two objects, their colours swapped", "a red house and a blue tree, grass, day",
     "a blue house and a red tree, grass, day"))


def studio(pipe: StableDiffusion, prompt: str, other: str = "", *, steps: int = 25) -> None:
    """A place to draw in: prompts, seed, sampler, steps and scale; the film while it is made; attention by word.

    Two prompts start from the same noise, one row each: the state, the guess, and, for a chosen word, where the U-Net
    looks at it (grey: nowhere). Below are a map of both ways from the noise and the machine, its parts at work lit up.
    Beside mini-sd the menu offers mini-sd-lcm, which is quick enough to draw while you type. Before the widget runs, a
    film of the first drawing stands in its place.

    Args:
        pipe: mini-sd or any other. prompt, other: to begin with; other may be empty. steps: to begin with.

    Raises:
        ValueError: an empty prompt, or settings that the pipeline refuses.

    >>> import minidiff as md
    >>> studio(md.StableDiffusion.from_pretrained("mini-sd"), "a red house, snow", steps=3)
    A picture comes out of noise: a red house, snow
    """
    drawing = Drawing(pipe, [each for each in (prompt, other) if each.strip()], {"steps": steps, "seed": 0})
    for _ in drawing:
        pass
    stills = [png(drawing.picture(k)) for k in thin(range(len(drawing.steps)), STORED)]
    alt = f"A picture comes out of noise: {' | '.join(drawing.prompts)}"
    publish(*as_film(stills), alt, stills[-1], None, live=lambda: _widget(drawing, alt))


class Drawing:
    """One run of one or two prompts from the same noise; to iterate it is to take its steps, once.

    Args:
        settings: of the pipeline's call: seed, steps, sampler, guidance_scale, negative_prompt.
    """

    def __init__(self, pipe: StableDiffusion, prompts: list[str], settings: dict[str, Any]):
        if not prompts:
            raise ValueError("there is no prompt; write what to draw")
        self.pipe, self.prompts = pipe, prompts
        shape = (1, pipe.vae.config.latent_channels, *pipe.unet.config.sides)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(settings["seed"]))
        self.run = pipe.stream(prompts, latents=z.repeat(len(prompts), 1, 1, 1), **settings)
        self.steps: list[Step] = []
        self.maps: dict[str, list[Tensor]] = {}
        self.words = {word: None for each in prompts for word, _ in words(pipe.text.tokenizers[0], each)
                      if word.isalnum()}                                 # in order, each once

    def __iter__(self) -> Iterator[int]:
        with watched(self.pipe.unet) as self.maps:
            for step in self.run:
                self.steps.append(step)
                yield len(self.steps) - 1

    @torch.inference_mode()
    def picture(self, k: int, word: str = NOBODY, side: int = SIDE) -> Image.Image:
        """Step number k: a row for each prompt, state and guess, and where a word is looked for, each with its name.

        Args:
            side: width of each picture, in pixels.
        """
        from PIL import Image, ImageDraw

        (_, alpha, sigma), x, x0 = self.steps[k]
        norm, n = math.hypot(alpha, sigma), len(x)
        seen = self.pipe.preview(torch.cat([x / norm, *([] if x0 is None else [x0])]))       # states, then guesses
        size = (side, round(side * seen[0].height / seen[0].width))
        seen = [each.resize(size, Image.Resampling.BICUBIC) for each in seen]
        guesses = seen[n:] or [Image.new("RGB", size, "#808080")] * n
        columns = {f"state after {k} of {len(self.steps) - 1} steps" if k else "noise": seen[:n],
                   "guess of the end": guesses}
        if word != NOBODY:
            columns[f"where “{word}” is looked at"] = [self._lit(guess, k, i, word) for i, guess in enumerate(guesses)]
        high, font = size[1] + LINE + GAP, letters(13)
        whole = Image.new("RGB", (len(columns) * (side + GAP) - GAP, LINE + n * high), "white")
        draw = ImageDraw.Draw(whole)
        for place, (name, pictures) in enumerate(columns.items()):
            left = place * (side + GAP)
            draw.text((left, 2), fitting(name, font, side), "black", font)
            for i, (prompt, picture) in enumerate(zip(self.prompts, pictures)):
                top = LINE + i * high
                whole.paste(picture, (left, top + LINE))
                if place == 0:
                    draw.text((0, top), fitting(prompt, font, whole.width), "#555555", font)
        bar = round(sigma / norm * (2 * side + GAP - 1))                       # as long as the noise in the state
        for i in range(n):
            draw.rectangle((0, LINE + (i + 1) * high - GAP + 2, bar, LINE + (i + 1) * high - 2), "#444444")
        return whole

    @cached_property
    def ways(self) -> tuple[Tensor, float]:
        """All states in the plane that holds most of their spread, once all are there.

        Returns:
            (steps + 1, prompts, 2), states at unit variance along their first two principal components; and the share
            of the spread that these hold.
        """
        states = torch.stack([step.x / math.hypot(*step.level[1:]) for step in self.steps]).flatten(2).double()
        points = (states - states.mean((0, 1))).flatten(0, 1)
        _, spread, axes = torch.linalg.svd(points, full_matrices=False)
        share = float((spread[:2] ** 2).sum() / (spread**2).sum())
        return (points @ axes[:2].T).unflatten(0, states.shape[:2]), share

    def path(self, k: int, side: int = LARGE) -> Image.Image:
        """A map of the `ways` of all states up to step k, a colour for each prompt."""
        from PIL import Image, ImageDraw

        plane, share = self.ways
        top = LINE * (len(self.prompts) + 1)
        low, high = plane.amin((0, 1)), plane.amax((0, 1))
        room = torch.tensor([2.0 * side - 60, 2.0 * (side - top) - 60])          # at twice the size, for smooth lines
        places = (plane - (low + high) / 2) * (room / (high - low)).min() + torch.tensor([side, side + top])
        whole = Image.new("RGB", (2 * side, 2 * side), "white")
        draw, font = ImageDraw.Draw(whole), letters(26)

        def line(number: int, text: str, color: str) -> None:
            draw.text((4, 2 * LINE * number), fitting(text, font, 2 * side - 8), color, font)

        def dot(x: float, y: float, r: int, color: str) -> None:
            draw.ellipse((x - r, y - r, x + r, y + r), color)

        line(0, f"the way of each state: {share:.0%} of its spread is in this plane", "black")
        for i, (prompt, color) in enumerate(zip(self.prompts, COLORS)):
            line(i + 1, prompt, color)
            way = [tuple(place) for place in places[:k + 1, i].tolist()]
            draw.line(way, color, 5)
            for place in way:
                dot(*place, 5, color)
            dot(*way[-1], 10, color)
        x, y = places[0, 0].tolist()
        dot(x, y, 10, "black")
        left = x > side                                                          # where there is room for a word
        draw.text((x - 14 if left else x + 14, y), "noise", "black", font, anchor="rm" if left else "lm")
        return whole.resize((side, side), Image.Resampling.LANCZOS)

    def _lit(self, guess: Image.Image, k: int, i: int, word: str) -> Image.Image:
        """The guess of prompt i, grey where its word is not looked at; all white if the prompt lacks the word."""
        from PIL import Image

        places = [place for each, at in words(self.pipe.text.tokenizers[0], self.prompts[i]) if each == word
                  for place in at]
        if not (k and places):
            return Image.new("RGB", guess.size, "white")
        seen = look(self.maps, places, tuple(self.steps[k].x.shape[2:]), i - len(self.prompts))
        call = max(0, round(k * len(seen) / (len(self.steps) - 1)) - 1)          # Heun has two calls a step
        share = seen[call].mean(0)                                              # (h, w), over the layers
        light = Image.fromarray((share / share.max() * 255).byte().cpu().numpy(), "L")
        light = light.resize(guess.size, Image.Resampling.BICUBIC)
        return Image.composite(guess, Image.new("RGB", guess.size, "#808080"), light)


def quick(pipe: StableDiffusion) -> bool:
    """Whether a model draws in few steps: a consistency model, which is told the guidance scale."""
    return bool(pipe.unet.config.time_cond_proj_dim)


def mini(pipe: StableDiffusion) -> bool:
    """Whether it has mini-sd's text encoder, and so its few words."""
    return pipe.text.width == 128


def of(pipe: StableDiffusion) -> list[str]:
    """The samplers to choose from."""
    return ["lcm"] if quick(pipe) else [name for name in SAMPLERS if name != "lcm"]


def _widget(drawing: Drawing, alt: str):
    """The controls, a line for what is to be said, and the picture."""
    import ipywidgets as w

    wide, style = w.Layout(width="min(640px, 98%)"), {"description_width": "8em"}
    prompt, second = [*drawing.prompts, ""][:2]
    texts = {name: w.Text(value=value, description=label, layout=wide, style=style,
                          continuous_update=quick(drawing.pipe))
             for name, value, label in (("prompt", prompt, "prompt"), ("other", second, "second prompt"),
                                        ("negative", "", "negative"))}
    pairs = w.Dropdown(options=[("(your own)", ()), *((name, pair) for name, *pair in PAIRS)], description="examples",
                       layout=wide, style=style)
    seed, steps = w.IntText(0, description="seed", style=style), w.IntSlider(
        len(drawing.steps) - 1, 1, 50, description="steps", style=style, continuous_update=False)
    scale = w.FloatSlider(drawing.pipe.settled(Settings()).guidance_scale, min=1, max=15, step=0.5,
                          description="guidance", style=style, continuous_update=False)
    sampler = w.Dropdown(options=of(drawing.pipe), description="sampler", style=style)
    models = {OWN: drawing.pipe}                                             # the quick one is loaded once asked for
    model = w.Dropdown(options=[OWN, QUICK] if mini(drawing.pipe) and not quick(drawing.pipe) else [OWN],
                       description="model", layout=wide, style=style)
    draw, said = w.Button(description="draw", button_style="primary"), w.HTML()
    word = w.Dropdown(options=[NOBODY, *drawing.words], description="word", style=style)
    narrow = w.Layout(width="3em")
    back, on = (w.Button(description=sign, tooltip=f"one step {way}", layout=narrow)
                for sign, way in (("◀", "back"), ("▶", "forward")))
    step = Control("step", list(range(len(drawing.steps))), len(drawing.steps) - 1)
    moment, play = step.widget, player(step, 0.15)
    moment.layout.width = "min(420px, 98%)"
    image, ways = w.Image(format="png"), w.Image(format="png")
    for each in (image, ways):
        each.layout.max_width, each.layout.align_self = "100%", "flex-start"
    name = f"machine-{uuid.uuid4().hex[:8]}"
    machine, lit, hidden = w.HTML(alive(drawing.pipe, name)), w.HTML(), w.HTML()
    now: dict[str, Any] = {"drawing": drawing, "busy": False}

    def at(k: int, last: int) -> None:
        lit.value = light(name, ("text encoder",) if k == 0 else ("U-Net", "sampler") if k < last else ("VAE decoder",))

    def see(_: Any) -> None:
        drawn = now["drawing"]
        k, last = min(moment.value, len(drawn.steps) - 1), len(drawn.steps) - 1
        image.value = png(drawn.picture(k, word.value, LARGE), fast=True)
        ways.value = png(drawn.path(k), fast=True)
        at(k, last)
        hidden.value = LIVE + unseen(f"{' | '.join(drawn.prompts)}: state and guess after {k} of {last} steps, and the "
                                     "way there", 'role="status" aria-live="polite"')

    def redraw(_: Any) -> None:
        if now["busy"]:                                                      # a control that redraw itself has moved
            return
        now["busy"] = draw.disabled = True
        prompts = [text.value for text in (texts["prompt"], texts["other"]) if text.value.strip()]
        began, spent = time.perf_counter(), 0.0
        try:
            new = Drawing(models[model.value], prompts, {
                "seed": seed.value, "steps": steps.value, "guidance_scale": scale.value, "sampler": sampler.value,
                "negative_prompt": texts["negative"].value or None})
            for k in new:
                before = time.perf_counter()
                at(k, steps.value)
                if spent <= SHARE * (before - began):                        # to look costs as much as to draw
                    said.value = f"step {k} of {steps.value}"
                    image.value = png(new.picture(k, side=LARGE), fast=True)
                    spent += time.perf_counter() - before
            now["drawing"] = new
            last, chosen = len(new.steps) - 1, word.value
            step.options = list(range(last + 1))
            moment.max = moment.value = last
            word.options = [NOBODY, *new.words]
            word.value = chosen if chosen in word.options else NOBODY
            unknown = {each for one in prompts for each in unknown_words(one)} if mini(drawing.pipe) else ()
            said.value = html.escape(f"never seen by mini-sd: {', '.join(sorted(unknown))}") if unknown else ""
            see(None)
        except ValueError as error:
            said.value = html.escape(str(error))
        finally:
            now["busy"] = draw.disabled = False

    def other_model(_: Any) -> None:
        now["busy"] = True
        if model.value not in models:
            models[QUICK] = StableDiffusion.from_pretrained(QUICK.split()[0], device=drawing.pipe.device)
        pipe = models[model.value]
        settled = pipe.settled(Settings())
        sampler.options, steps.value, scale.value = of(pipe), settled.steps, settled.guidance_scale
        for text in texts.values():
            text.continuous_update = quick(pipe)                             # with each letter, or with Enter
        now["busy"] = False
        redraw(None)

    def choose(change: Any) -> None:
        if change["new"]:
            now["busy"] = True
            texts["prompt"].value, texts["other"].value = change["new"]
            now["busy"] = False
            redraw(None)

    draw.on_click(redraw)
    pairs.observe(choose, "value")
    model.observe(other_model, "value")
    for control in (*texts.values(), seed, steps, scale, sampler):               # a text: once Enter is pressed
        control.observe(redraw, "value")
    for control in (moment, word):
        control.observe(see, "value")
    for button, way in ((back, -1), (on, 1)):
        button.on_click(lambda _, way=way: setattr(moment, "value", min(max(moment.value + way, 0), moment.max)))
    see(None)
    below = w.HBox([ways, w.VBox([machine, lit])], layout=w.Layout(flex_flow="row wrap", overflow="hidden"))
    return w.VBox([model, pairs, *texts.values(), w.HBox([seed, sampler]), w.HBox([steps, scale]), w.HBox([draw, said]),
                   w.HBox([play, back, moment, on]), word, hidden, image, below])
