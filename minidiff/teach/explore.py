"""Explorers: a picture that follows sliders. Plain ipywidgets, which work offline in JupyterLab, VS Code and Colab."""
from __future__ import annotations

import asyncio
import html
import math
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from types import FunctionType
from typing import TYPE_CHECKING, Any

from minidiff.teach.film import as_film, thin
from minidiff.teach.show import labelled, opened, png, publish, small

if TYPE_CHECKING:
    from ipywidgets import ToggleButton

STORED = 9   # frames at most of the film that stands in for the widget
PAUSE = 0.05  # seconds between two pictures while a slider is dragged
# Where a widget lives, the film that is stored for it makes room.
LIVE = "<style>" + ",".join(f"{cell}:has(.minidiff-live) .minidiff-stored" for cell in (
    ".jp-OutputArea", ".cell_container", "#output-area")) + '{display:none}</style><span class="minidiff-live"></span>'


def explore(draw: Callable, alt: str, *, width: int | None = None, start: dict[str, Any] | None = None,
            place: tuple[str, str] | None = None, **controls: Iterable) -> None:
    """Show a picture with a control for each of its parameters; before it is run, a film over the last slider.

    Args:
        draw: called with one value per control, by name; returns anything that `minidiff.teach.show.show` takes. Each
            combination is drawn once, when it is first wanted, with the functions and variables of the notebook as they
            are now: a later cell that gives one of their names to something else changes nothing. What goes wrong in it
            is said in the picture's place.
        alt: what there is to see, in words.
        width: of the picture in the page, in pixels; None: its own.
        start: values to begin with; of controls that are not named, their first.
        place: two controls, across and down, which a click on the picture sets too: on the first axes of a figure, the
            first of several pictures.
        controls: name -> its values. Texts become a menu, numbers a slider; the last slider can play.

    Raises:
        ValueError: draw cannot be called, no control, a control without values, no alt text, a start that is no value
            of its control, a place that is not two controls.

    >>> from PIL import Image
    >>> explore(lambda red: Image.new("RGB", (8, 8), (red, 0, 0)), alt="a square of some red", red=range(0, 256, 51))
    a square of some red
    """
    if not callable(draw):
        raise ValueError(f"draw is {draw!r}; it must be a function of the controls, as in lambda t: frames[t]")
    values = {name: list(options) for name, options in controls.items()}
    if not values or not all(values.values()):
        raise ValueError("explore needs at least one control, and each control at least one value, as in t=range(10)")
    begin = {name: options[0] for name, options in values.items()} | (start or {})
    if wrong := [name for name, value in begin.items() if value not in values.get(name, ())]:
        raise ValueError(f"start has {wrong[0]}={begin[wrong[0]]!r}; that is not among the values of a control")
    if place is not None and (len(place) != 2 or not {*place} <= values.keys()):
        raise ValueError(f"place is {place!r}; it must be two controls, across and down, of {', '.join(values)}")

    draw = as_now(draw)
    areas: list[tuple[float, ...]] = []
    titled: set[bool] = set()

    @cache
    def picture(*chosen: Any) -> bytes:
        what = draw(**dict(zip(values, chosen)))
        titled.add(hasattr(what, "savefig"))                             # a figure says itself what it shows
        data = png(what, width=width, fast=True)
        if place and not areas:
            areas.append(area(what))
        return data

    *before, _ = begin.values()
    last = [*values.values()][-1]
    moments = [begin[[*values][-1]]] if _is_menu(last) else thin(last, STORED)
    stills = [picture(*before, value) for value in moments]
    if titled == {False}:
        stills = [png(labelled(opened(still), f"{[*values][-1]} = {value}"), fast=True)
                  for still, value in zip(stills, moments)]
    still = small(stills[-1])
    film, mime = as_film(stills if len(stills) > 1 else [still])
    publish(film, mime, alt, still, width, live=lambda: _widget(picture, values, alt, width, begin, place and (
        *place, *areas[0])))


def area(what: Any) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a figure's first axes, or of the first of several pictures, as shares.

    >>> from PIL import Image
    >>> area([Image.new("RGB", (8, 8))] * 2)
    (0.0, 0.0, 0.5, 1.0)
    """
    if hasattr(what, "savefig"):
        box = what.axes[0].get_position()                                # once drawn
        return box.x0, 1 - box.y1, box.x1, 1 - box.y0
    n = len(what) if isinstance(what, (list, tuple)) or getattr(what, "ndim", 0) == 4 else 1
    return 0.0, 0.0, 1.0 / n, 1.0


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


def _even(options: list) -> bool:
    """Whether these are numbers that rise in equal steps."""
    steps = [b - a for a, b in pairwise(options)]
    return len(options) > 1 and steps[0] > 0 and all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)


class Control:
    """A menu or slider over some values.

    Numbers in equal steps get a slider that tells screen readers its value; one over others knows only places.

    Args:
        name: what stands before it. options: the values. value: which to begin with.
    """

    def __init__(self, name: str, options: list, value: Any):
        import ipywidgets as w

        settings = {"description": name, "style": {"description_width": "initial"}}
        self.options, self.plain = options, not _is_menu(options) and _even(options)
        if self.plain:
            make = w.IntSlider if all(isinstance(each, int) for each in options) else w.FloatSlider
            self.widget = make(value, min=options[0], max=options[-1], step=options[1] - options[0], **settings)
            if make is w.FloatSlider:
                self.widget.readout_format = ".3g"
        elif _is_menu(options):
            self.widget = w.Dropdown(options=options, value=value, **settings)
        else:
            named = [(f"{each:.6g}", each) for each in options]
            self.widget = w.SelectionSlider(options=named, value=value, **settings)

    @property
    def index(self) -> int:
        """The place of its value among the options."""
        if self.plain:
            return round((self.widget.value - self.options[0]) / (self.options[1] - self.options[0]))
        return self.widget.index

    def choose(self, n: int) -> None:
        """Move it to option number n."""
        self.widget.value = self.options[n]

    @property
    def value(self) -> Any:
        """The option that is chosen."""
        return self.options[self.index]


def player(control: Control, seconds: float = 0.25) -> ToggleButton:
    """A button that moves a control on to its end, again and again, while it is pressed down."""
    import ipywidgets as w

    name = control.widget.description
    button = w.ToggleButton(description="play", icon="play", tooltip=f"play {name}", layout=w.Layout(width="6em"))

    async def run() -> None:
        while button.value:
            control.choose((control.index + 1) % len(control.options))
            await asyncio.sleep(seconds)

    def toggle(change: Any) -> None:
        button.icon = "pause" if change["new"] else "play"
        if change["new"]:
            tasks.append(asyncio.get_running_loop().create_task(run()))

    tasks: list[asyncio.Task] = []                                       # a task that nobody holds may vanish
    button.observe(toggle, "value")
    return button


def _widget(picture: Callable, values: dict[str, list], alt: str, width: int | None, begin: dict[str, Any],
            place: tuple | None = None):
    """The controls above the picture; moving one sets the picture's value."""
    import ipywidgets as w

    controls = {name: Control(name, options, begin[name]) for name, options in values.items()}
    image = w.Image(value=picture(*begin.values()), format="png")
    said = w.HTML()
    waiting: list[asyncio.TimerHandle] = []
    image.layout.max_width, image.layout.width = "100%", f"{width}px" if width else None
    image.layout.align_self = "flex-start"

    def redraw() -> None:
        waiting.clear()
        chosen = [control.value for control in controls.values()]
        now = ", ".join(f"{name} {value}" for name, value in zip(values, chosen))
        try:
            image.value, wrong = picture(*chosen), ""
        except Exception as error:                                       # a reader's own code: it may be anything
            wrong = html.escape(f"{now}: {type(error).__name__}: {error}")
        image.layout.display = "none" if wrong else None
        said.value = LIVE + (f'<pre role="alert" style="white-space:pre-wrap">{wrong}</pre>' if wrong else unseen(
            f"{alt} {now}", 'role="status" aria-live="polite"'))

    def soon(_: Any) -> None:
        """Redraw, but not for every pixel of a drag: the newest values count when the time has come."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:                                             # no kernel that draws later
            return redraw()
        if not waiting:
            waiting.append(loop.call_later(PAUSE, redraw))

    for control in controls.values():
        control.widget.observe(soon, "value")
    *rows, last = [control.widget for control in controls.values()]
    if not isinstance(last, w.Dropdown):
        last = w.HBox([player([*controls.values()][-1]), last])
    said.value = LIVE + unseen(alt)
    seen = _clickable(image, controls[place[0]], controls[place[1]], place[2:]) if place else image
    return w.VBox([*rows, last, said, seen])


def _clickable(image: Any, across: Control, down: Control, area: tuple[float, ...]):
    """A picture with unseen buttons over a part of it, one for each pair of values; keys have the sliders."""
    import ipywidgets as w

    left, top, right, bottom = (round(1000 * share) for share in area)
    layout, style = w.Layout(width="auto", height="auto", min_width="0", padding="0", margin="0"), w.ButtonStyle(
        button_color="transparent")

    def button(i: int, j: int) -> w.Button:
        one = w.Button(layout=layout, style=style, tabbable=False, tooltip=", ".join(
            f"{control.widget.description} {control.options[n]}" for control, n in ((across, i), (down, j))))
        one.on_click(lambda _: (across.choose(i), down.choose(j)))
        return one

    wide, high = len(across.options), len(down.options)
    over = w.GridBox([button(i, j) for j in range(high) for i in range(wide)], layout=w.Layout(
        grid_template_columns=f"repeat({wide}, 1fr)", grid_template_rows=f"repeat({high}, 1fr)", grid_area="2 / 2",
        overflow="hidden"))
    image.layout.grid_area, image.layout.align_self = "1 / 1 / 4 / 4", "flex-start"
    return w.GridBox([image, over], layout=w.Layout(
        grid_template_columns=f"{left}fr {right - left}fr {1000 - right}fr", align_self="flex-start",
        grid_template_rows=f"{top}fr {bottom - top}fr {1000 - bottom}fr", max_width="100%", overflow="hidden"))


def unseen(text: str, more: str = "") -> str:
    """A text for screen readers alone, as HTML.

    >>> unseen("a < b")[-16:]
    '>a &lt; b</span>'
    """
    return f'<span style="position:absolute;left:-9999px" {more}>{html.escape(text)}</span>'
