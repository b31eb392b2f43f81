"""The studio: write a prompt, watch the picture come, take it back step by step, see where each word looks."""
from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.data.scenes import unknown_words
from minidiff.editing import look
from minidiff.nets.attention import watched
from minidiff.samplers import SAMPLERS, Step
from minidiff.teach.film import as_film, frame, thin
from minidiff.teach.show import png, publish
from minidiff.text import words

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.sd.pipeline import StableDiffusion

STORED = 8    # frames of the film that stands in for the widget
SIDE = 192    # of each picture, in pixels
NOBODY = "(no word)"


def studio(pipe: StableDiffusion, prompt: str, other: str = "", *, steps: int = 25) -> None:
    """A place to draw in: prompts, seed, sampler, steps and scale; the film while it is made; attention by word.

    Two prompts start from the same noise, one row each: the state, the guess, and, for a chosen word, where the U-Net
    looks at it (grey: nowhere). Before the widget runs, a film of the first drawing stands in its place.

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

    def picture(self, k: int, word: str = NOBODY) -> Image.Image:
        """Step number k: a row for each prompt, state and guess, and where a word is looked for."""
        from PIL import Image

        level, x, x0 = self.steps[k]
        rows = [frame(self.pipe, Step(level, x[i:i + 1], None if x0 is None else x0[i:i + 1]), SIDE)
                for i in range(len(x))]
        if word != NOBODY:
            rows = [self._beside(row, k, i, word) for i, row in enumerate(rows)]
        whole = Image.new("RGB", (rows[0].width, sum(row.height + 4 for row in rows) - 4), "white")
        for i, row in enumerate(rows):
            whole.paste(row, (0, i * (row.height + 4)))
        return whole

    @torch.inference_mode()
    def _beside(self, row: Image.Image, k: int, i: int, word: str) -> Image.Image:
        """A row with a third picture: the guess, grey where its prompt's word is not looked at."""
        from PIL import Image

        places = [place for each, at in words(self.pipe.text.tokenizers[0], self.prompts[i]) if each == word
                  for place in at]
        wide = Image.new("RGB", (row.width + SIDE + 8, row.height), "white")
        wide.paste(row, (0, 0))
        if k and places:
            seen = look(self.maps, places, tuple(self.steps[k].x.shape[2:]), i - len(self.prompts))
            call = max(0, round(k * len(seen) / (len(self.steps) - 1)) - 1)      # Heun has two calls a step
            share = seen[call].mean(0)                                          # (h, w), over the layers
            light = Image.fromarray((share / share.max() * 255).byte().cpu().numpy(), "L")
            side = (SIDE, row.height - 8)
            guess = row.crop((SIDE + 8, 0, 2 * SIDE + 8, row.height - 8))
            light = light.resize(side, Image.Resampling.BICUBIC)
            wide.paste(Image.composite(guess, Image.new("RGB", side, "#808080"), light), (2 * SIDE + 16, 0))
        return wide


def _widget(drawing: Drawing, alt: str):
    """The controls, a line for what is to be said, and the picture."""
    import ipywidgets as w

    wide, style = w.Layout(width="min(640px, 98%)"), {"description_width": "7em"}
    prompt, second = [*drawing.prompts, ""][:2]
    texts = {name: w.Text(value=value, description=label, layout=wide, style=style, continuous_update=False)
             for name, value, label in (("prompt", prompt, "prompt"), ("other", second, "second prompt"),
                                        ("negative", "", "negative"))}
    seed, steps = w.IntText(0, description="seed", style=style), w.IntSlider(
        len(drawing.steps) - 1, 1, 50, description="steps", style=style, continuous_update=False)
    scale = w.FloatSlider(7.5, min=1, max=15, step=0.5, description="guidance", style=style, continuous_update=False)
    sampler = w.Dropdown(options=[name for name in SAMPLERS if name != "lcm"],
                         description="sampler", style=style)
    draw, said = w.Button(description="draw", button_style="primary"), w.HTML()
    word = w.Dropdown(options=[NOBODY, *drawing.words], description="word", style=style)
    moment = w.IntSlider(len(drawing.steps) - 1, 0, len(drawing.steps) - 1, description="step", style=style)
    play = w.Play(value=moment.value, max=moment.max, interval=150, tooltip="play step")
    w.jslink((play, "value"), (moment, "value"))
    image = w.Image(format="png", value=png(drawing.picture(moment.value)))
    image.layout.max_width, image.layout.align_self = "100%", "flex-start"
    now = {"drawing": drawing}

    def see(_: Any) -> None:
        image.value = png(now["drawing"].picture(min(moment.value, len(now["drawing"].steps) - 1), word.value))

    def redraw(_: Any) -> None:
        prompts = [text.value for text in (texts["prompt"], texts["other"]) if text.value.strip()]
        draw.disabled = True
        try:
            new = Drawing(drawing.pipe, prompts, {
                "seed": seed.value, "steps": steps.value, "guidance_scale": scale.value, "sampler": sampler.value,
                "negative_prompt": texts["negative"].value or None})
            for k in new:
                said.value = f"step {k} of {steps.value}"
                image.value = png(new.picture(k))
        except ValueError as error:
            said.value = html.escape(str(error))
            return
        finally:
            draw.disabled = False
        now["drawing"] = new
        last, chosen = len(new.steps) - 1, word.value
        play.max = moment.max = last
        play.value = moment.value = last
        word.options = [NOBODY, *new.words]
        word.value = chosen if chosen in word.options else NOBODY
        unknown = {each for one in prompts for each in unknown_words(one)} if drawing.pipe.text.width == 128 else ()
        said.value = html.escape(f"never seen by mini-sd: {', '.join(sorted(unknown))}") if unknown else ""
        see(None)

    draw.on_click(redraw)
    for control in (moment, word):
        control.observe(see, "value")
    hidden = w.HTML(f'<span style="position:absolute;left:-9999px">{html.escape(alt)}</span>')
    return w.VBox([*texts.values(), w.HBox([seed, sampler]), w.HBox([steps, scale]), w.HBox([draw, said]),
                   w.HBox([play, moment, word]), hidden, image])
