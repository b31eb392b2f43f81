"""Explorers: a picture that follows sliders. Plain ipywidgets, which work offline in JupyterLab, VS Code and Colab."""
from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from minidiff.teach.film import as_film, thin
from minidiff.teach.show import png, publish

STORED = 12  # frames at most of the film that stands in for the widget


def explore(draw: Callable, alt: str, *, width: int | None = None, **controls: Iterable) -> None:
    """Show a picture with a control for each of its parameters; before it is run, a film over the last slider.

    Args:
        draw: called with one value per control, by name; returns anything that `minidiff.teach.show.show` takes. Each
            combination is drawn once, when it is first wanted.
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

    @cache
    def picture(*chosen: Any) -> bytes:
        return png(draw(**dict(zip(values, chosen))))

    *others, last = values.values()
    moments = last[:1] if _is_menu(last) else thin(last, STORED)
    stills = [picture(*(options[0] for options in others), value) for value in moments]
    film, mime = as_film(stills)
    publish(film, mime, alt, stills[-1], width, live=lambda: _widget(picture, values, alt, width))


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
        return widgets.SelectionSlider(options=labels, continuous_update=False, **settings)

    sliders = [control(name, options) for name, options in values.items()]
    image = widgets.Image(value=picture(*(slider.value for slider in sliders)), format="png")
    image.layout.max_width, image.layout.width = "100%", f"{width}px" if width else None
    image.layout.align_self = "flex-start"

    def redraw(_: Any) -> None:
        image.value = picture(*(slider.value for slider in sliders))

    for slider in sliders:
        slider.observe(redraw, "value")
    *rows, last = sliders
    if isinstance(last, widgets.SelectionSlider):
        play = widgets.Play(max=len(last.options) - 1, interval=250, tooltip=f"play {last.description}")
        widgets.jslink((play, "value"), (last, "index"))
        last = widgets.HBox([play, last])
    said = widgets.HTML(f'<span style="position:absolute;left:-9999px">{html.escape(alt)}</span>')  # to screen readers
    return widgets.VBox([*rows, last, said, image])
