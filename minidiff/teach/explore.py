"""Explorers: a picture that follows sliders. Plain ipywidgets, which work offline in JupyterLab, VS Code and Colab."""
from __future__ import annotations

import asyncio
import html
from collections.abc import Callable, Iterable
from functools import cache
from types import FunctionType
from typing import Any

from minidiff.teach.film import as_film, thin
from minidiff.teach.show import png, publish, small

STORED = 12   # frames at most of the film that stands in for the widget
PAUSE = 0.05  # seconds between two pictures while a slider is dragged


def explore(draw: Callable, alt: str, *, width: int | None = None, **controls: Iterable) -> None:
    """Show a picture with a control for each of its parameters; before it is run, a film over the last slider.

    Args:
        draw: called with one value per control, by name; returns anything that `minidiff.teach.show.show` takes. Each
            combination is drawn once, when it is first wanted, with the functions and variables of the notebook as they
            are now: a later cell that gives one of their names to something else changes nothing. What goes wrong in it
            is said in the picture's place.
        alt: what there is to see, in words.
        width: of the picture in the page, in pixels; None: its own.
        controls: name -> its values. Texts become a menu, numbers a slider; the last slider can play.

    Raises:
        ValueError: draw cannot be called, no control, a control without values, no alt text.

    >>> from PIL import Image
    >>> explore(lambda red: Image.new("RGB", (8, 8), (red, 0, 0)), alt="a square of some red", red=range(0, 256, 51))
    a square of some red
    """
    if not callable(draw):
        raise ValueError(f"draw is {draw!r}; it must be a function of the controls, as in lambda t: frames[t]")
    values = {name: list(options) for name, options in controls.items()}
    if not values or not all(values.values()):
        raise ValueError("explore needs at least one control, and each control at least one value, as in t=range(10)")

    draw = as_now(draw)

    @cache
    def picture(*chosen: Any) -> bytes:
        return png(draw(**dict(zip(values, chosen))), fast=True)

    *others, last = values.values()
    moments = last[:1] if _is_menu(last) else thin(last, STORED)
    stills = [picture(*(options[0] for options in others), value) for value in moments]
    still = small(stills[-1])
    film, mime = as_film(stills if len(stills) > 1 else [still])
    publish(film, mime, alt, still, width, live=lambda: _widget(picture, values, alt, width))


def as_now(draw: Callable) -> Callable:
    """A function with the names it uses as they are now, and so for the functions beside it that it may call.

    >>> shade = 1
    >>> paint = lambda: shade
    >>> kept, shade = as_now(paint), 2
    >>> paint(), kept()
    (2, 1)
    """
    if not isinstance(draw, FunctionType):
        return draw
    beside = draw.__globals__
    kept = dict(beside)

    def again(f: FunctionType) -> FunctionType:
        copy = FunctionType(f.__code__, kept, f.__name__, f.__defaults__, f.__closure__)
        copy.__kwdefaults__ = f.__kwdefaults__
        copy.__dict__.update(f.__dict__)
        return copy

    kept |= {name: again(value) for name, value in beside.items()
             if isinstance(value, FunctionType) and value.__globals__ is beside}
    return again(draw)


def _is_menu(options: list) -> bool:
    return any(isinstance(value, (str, bool)) for value in options)


def _widget(picture: Callable, values: dict[str, list], alt: str, width: int | None):
    """The controls above the picture; moving one sets the picture's value."""
    import ipywidgets as widgets

    def control(name: str, options: list):
        settings = {"description": name, "style": {"description_width": "initial"}}
        if _is_menu(options):
            return widgets.Dropdown(options=options, **settings)
        labels = [(f"{value:.6g}", value) for value in options]
        return widgets.SelectionSlider(options=labels, **settings)

    sliders = [control(name, options) for name, options in values.items()]
    image = widgets.Image(value=picture(*(slider.value for slider in sliders)), format="png")
    said = widgets.HTML()
    waiting: list[asyncio.TimerHandle] = []
    image.layout.max_width, image.layout.width = "100%", f"{width}px" if width else None
    image.layout.align_self = "flex-start"

    def redraw() -> None:
        waiting.clear()
        chosen = [slider.value for slider in sliders]
        now = ", ".join(f"{name} {value}" for name, value in zip(values, chosen))
        try:
            image.value, wrong = picture(*chosen), ""
        except Exception as error:                                       # a reader's own code: it may be anything
            wrong = html.escape(f"{now}: {type(error).__name__}: {error}")
        image.layout.display = "none" if wrong else None
        said.value = f'<pre role="alert" style="white-space:pre-wrap">{wrong}</pre>' if wrong else unseen(
            f"{alt} {now}", 'role="status" aria-live="polite"')          # a slider tells its place, not its value

    def soon(_: Any) -> None:
        """Redraw, but not for every pixel of a drag: the newest values count when the time has come."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:                                             # no kernel that draws later
            return redraw()
        if not waiting:
            waiting.append(loop.call_later(PAUSE, redraw))

    for slider in sliders:
        slider.observe(soon, "value")
    *rows, last = sliders
    if isinstance(last, widgets.SelectionSlider):
        play = widgets.Play(max=len(last.options) - 1, interval=250, tooltip=f"play {last.description}")
        widgets.jslink((play, "value"), (last, "index"))
        last = widgets.HBox([play, last])
    said.value = unseen(alt)
    return widgets.VBox([*rows, last, said, image])


def unseen(text: str, more: str = "") -> str:
    """A text for screen readers alone, as HTML.

    >>> unseen("a < b")[-16:]
    '>a &lt; b</span>'
    """
    return f'<span style="position:absolute;left:-9999px" {more}>{html.escape(text)}</span>'
