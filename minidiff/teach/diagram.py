"""One drawing of the whole machine: text encoder, U-Net in a loop with the sampler, VAE decoder."""
from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from minidiff.teach.show import COLORS, png, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minidiff.sd.pipeline import StableDiffusion

PARTS = ("text encoder", "U-Net", "sampler", "VAE decoder")
BOXES = {  # part -> left, bottom, width, height, in tenths of the drawing's height
    "text encoder": (0.2, 7.0, 5.6, 2.4), "U-Net": (8.4, 3.3, 4.6, 3.4), "sampler": (16.2, 3.3, 4.6, 3.4),
    "VAE decoder": (24.2, 3.3, 4.8, 3.4)}
WIDE, HIGH = 34.0, 10.0
ALIVE = """<style>
.NAME { display: inline-block; max-width: 100%; background: white; color: black; line-height: 1.4; }
.NAME div { position: relative; width: fit-content; max-width: 100%; }
.NAME img { max-width: 100%; height: auto; display: block; }
.NAME button { position: absolute; background: none; border: none; padding: 0; border-radius: 8px; cursor: help; }
.NAME p { margin: 0; padding: 0 6px 6px; min-height: 2.8em; }
.NAME p + p { display: none; }
</style>"""


def diagram(pipe: StableDiffusion, *, steps: int = 25, lit: str = "") -> None:
    """Show how the parts of a model work together, with the shapes of what goes from one to the next.

    Args:
        pipe: whose shapes. steps: how often the loop goes round. lit: a part of PARTS to be lit up; "": none.

    Raises:
        ValueError: there is no such part.

    >>> import minidiff as md
    >>> diagram(md.StableDiffusion.from_pretrained("mini-sd"))
    A drawing of the machine. The text encoder turns the prompt into 77 vectors of 128 numbers, which the U-Net ...
    """
    n, c, h, w, high, wide = _shapes(pipe)
    alt = (f"A drawing of the machine. The text encoder turns the prompt into 77 vectors of {n} numbers, which the "
           f"U-Net looks at. {steps} times the U-Net estimates the noise in a state of {c}×{h}×{w} numbers, which is "
           "noise alone at first, and the sampler makes the next, cleaner state of it. The VAE decoder turns the last "
           f"one into a picture of {wide}×{high} pixels.")
    show(machine(pipe, steps=steps, lit=lit), alt=alt, width=790)


def machine(pipe: StableDiffusion, *, steps: int = 25, lit: str = "") -> Figure:
    """The figure that `diagram` shows.

    Raises:
        ValueError: there is no such part to be lit.

    >>> import minidiff as md
    >>> machine(md.StableDiffusion.from_pretrained("mini-sd"), lit="U-Net").get_size_inches().tolist()
    [8.5, 2.5]
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    if lit not in ("", *PARTS):
        raise ValueError(f"lit is {lit!r}; it must be one of {', '.join(PARTS)}")
    n, c, h, w, high, wide = _shapes(pipe)
    figure = Figure(figsize=(WIDE / 4, HIGH / 4), layout="none")                # whatever the look of other plots
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDE), ylim=(0, HIGH))
    ax.axis("off")

    def arrow(start: tuple, end: tuple, bend: float = 0.0, color: str = "#555555") -> None:
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, lw=1.4, color=color,
                                     connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0))

    def note(x: float, y: float, text: str, **more) -> None:
        ax.text(x, y, text, ha=more.pop("ha", "center"), va="center", fontsize=9, color="#333333", **more)

    for color, (part, (x, y, width, height)) in zip(COLORS, BOXES.items()):
        on = part == lit
        ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.4", edgecolor=color,
                                    facecolor=color if on else "white", lw=3 if on else 1.5))
        ax.text(x + width / 2, y + height / 2, part.replace(" ", "\n"), ha="center", va="center", fontsize=10,
                color="white" if on else "black", weight="bold")
    note(3.0, 5.9, "“a red house”")
    arrow((3.0, 6.25), (3.0, 6.95))
    arrow((5.85, 8.2), (10.7, 6.8), -0.35)
    note(9.8, 9.1, f"77 vectors of {n} numbers")
    note(3.4, 4.6, f"noise\n{c}×{h}×{w}")
    arrow((5.0, 4.6), (8.3, 4.6))
    arrow((13.1, 5.0), (16.1, 5.0))
    note(14.6, 5.9, f"its noise,\n{c}×{h}×{w}")
    arrow((18.5, 3.2), (10.7, 3.2), -0.5)
    note(14.6, 2.3, "a cleaner\nstate")
    note(14.6, 0.45, f"{steps} times round", weight="bold")
    arrow((20.9, 5.0), (24.1, 5.0))
    note(22.5, 5.9, "the last\nstate")
    arrow((29.1, 5.0), (30.4, 5.0))
    note(32.2, 5.0, f"picture\n{wide}×{high}\npixels")
    return figure


def alive(pipe: StableDiffusion, name: str) -> str:
    """The drawing as HTML for a widget: each part says what it does when it is pointed at, or reached by the Tab key.

    Args:
        name: a class of its own, for `light`.

    >>> import minidiff as md
    >>> alive(md.StableDiffusion.from_pretrained("mini-sd"), "one").count("<button")
    4
    """
    n, c, h, w, high, wide = _shapes(pipe)
    says = (f"reads a prompt once and makes 77 vectors of {n} numbers of it",
            "looks at the state, the time and the vectors, and estimates the noise in the state: in every step twice, "
            "with the prompt and without",
            "takes a part of that noise away, which makes the next, cleaner state",
            f"turns the last state, {c}×{h}×{w} numbers, into a picture of {wide}×{high} pixels, once")
    buttons = "".join(
        f'<button type="button" class="p{i}" aria-label="the {part} {said}" style="left:{100 * x / WIDE:.2f}%;top:'
        f'{100 * (HIGH - y - b) / HIGH:.2f}%;width:{100 * a / WIDE:.2f}%;height:{100 * b / HIGH:.2f}%"></button>'
        for i, ((part, (x, y, a, b)), said) in enumerate(zip(BOXES.items(), says)))
    texts = "".join(f'<p class="s{i}">The {part} {said}.</p>' for i, (part, said) in enumerate(zip(PARTS, says)))
    shown = "".join(f".NAME:has(.p{i}:is(:hover, :focus)) .s{i} {{ display: block }} "
                    f".NAME:has(.p{i}:is(:hover, :focus)) .s {{ display: none }}\n" for i in range(len(PARTS)))
    image = f'<img width="660" alt="" src="data:image/png;base64,{base64.b64encode(png(machine(pipe))).decode()}">'
    look = ALIVE.replace("</style>", f"{shown}</style>").replace("NAME", name)
    return (f'{look}<div class="{name}"><div>{image}{buttons}</div><p class="s">'
            f'The parts at work are lit up. Point at one, or press Tab.</p>{texts}</div>')


def light(name: str, parts: tuple[str, ...]) -> str:
    """HTML that lights up parts of the drawing of this name.

    >>> light("one", ("U-Net",))
    '<style>.one .p1 { box-shadow: 0 0 0 3px #D55E00, 0 0 16px 4px #D55E00 }</style>'
    """
    return "<style>" + " ".join(f".{name} .p{i} {{ box-shadow: 0 0 0 3px {color}, 0 0 16px 4px {color} }}"
                                for i, (part, color) in enumerate(zip(PARTS, COLORS)) if part in parts) + "</style>"


def _shapes(pipe: StableDiffusion) -> tuple[int, ...]:
    """Width of the context, channels, height and width of the latents, height and width of the picture."""
    return (pipe.text.width, pipe.vae.config.latent_channels, *pipe.unet.config.sides, *pipe.sides)
