"""Explorers: the slider moves the picture, each picture is drawn once, and a film is stored for those who only read."""
import asyncio
import base64
import io
import re
from unittest.mock import MagicMock

import ipywidgets as widgets
import pytest
from PIL import Image

from minidiff.teach import explore
from minidiff.teach.explore import LIVE, PAUSE, Control, _widget, area, player
from minidiff.teach.show import LINE, png

CONTROLS = {"color": ["red", "blue"], "size": [4, 8, 12]}


@pytest.fixture
def shown(monkeypatch):
    """The bundles that a cell displays."""
    bundles = []
    monkeypatch.setattr("IPython.get_ipython", MagicMock())  # as in a notebook
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
    return bundles


@pytest.fixture
def drawn():
    """What was drawn, in order."""
    return []


@pytest.fixture
def draw(drawn):
    def draw(color, size):
        drawn.append((color, size))
        picture = Image.new("RGB", (16, 16), "white")
        picture.paste(color, (0, 0, size, size))
        return picture

    return draw


def live(shown):
    """The live widget that was displayed, its controls and its picture."""
    box = widgets.widget._instances[shown[1]["application/vnd.jupyter.widget-view+json"]["model_id"]]
    *controls, said, image = box.children
    assert said.value.startswith(LIVE)
    return controls, image


def test_moving_a_control_changes_the_picture(shown, draw):
    explore(draw, alt="a square", **CONTROLS)
    (menu, row), image = live(shown)
    play, slider = row.children
    assert image.value == png(draw("red", 4), fast=True)
    slider.value = 12
    assert image.value == png(draw("red", 12), fast=True)
    menu.value = "blue"
    assert image.value == png(draw("blue", 12), fast=True)
    assert isinstance(slider, widgets.IntSlider) and slider.step == 4 and slider.continuous_update
    assert play.tooltip == "play size"


def test_each_picture_is_drawn_once_and_only_when_wanted(shown, draw, drawn):
    explore(draw, alt="a square", **CONTROLS)
    assert drawn == [("red", 4), ("red", 8), ("red", 12)]  # the stored film
    (menu, row), _ = live(shown)
    for value in ("blue", "red", "blue"):
        menu.value = value
    row.children[1].value = 8
    assert drawn[3:] == [("blue", 4), ("blue", 8)]


def test_what_is_stored_is_a_film_over_the_last_control(shown, draw):
    explore(draw, alt="a square", width=200, **CONTROLS)
    (source,) = re.findall('alt="a square".*src="data:image/webp;base64,([^"]*)', shown[0]["text/html"])
    film = Image.open(io.BytesIO(base64.b64decode(source)))
    assert film.n_frames == 3 and film.size == (224, 224 + LINE)        # pixels stay squares, under the value
    still = Image.open(io.BytesIO(base64.b64decode(shown[0]["image/png"])))
    title = still.convert("L").crop((0, 0, still.width, LINE))
    assert title.getextrema()[0] < 128 and shown[0]["text/plain"] == "a square"  # letters: size = 12
    assert "Run this cell" in shown[0]["text/html"] and 'class="minidiff-stored"' in shown[0]["text/html"]
    assert not any("widget" in kind for kind in shown[0])               # what is saved shows without a kernel


def test_a_menu_alone_stores_a_still_picture(shown, draw, drawn):
    explore(draw, alt="a square", size=[8], color=["red", "blue"])
    assert "data:image/png" in shown[0]["text/html"] and drawn == [("red", 8)]
    (_, menu), image = live(shown)
    menu.value = "blue"
    assert image.value == png(draw("blue", 8), fast=True)


def test_a_long_control_is_stored_as_a_few_frames_and_drawn_when_wanted(shown):
    seen = []
    explore(lambda t: seen.append(t) or Image.new("RGB", (8, 8), (t, 0, 0)), alt="red", t=range(100))
    assert len(seen) == 9 and (seen[0], seen[-1]) == (0, 99)


def test_without_a_notebook_the_description_is_printed(draw, capsys):
    explore(draw, alt="a square", **CONTROLS)
    assert capsys.readouterr().out == "a square\n"


def test_play_goes_round_while_it_is_pressed():
    control = Control("t", [1, 2, 5], 2)
    button, seen = player(control, 0.01), []
    control.widget.observe(lambda change: seen.append(change["new"]), "value")

    async def press():
        button.value = True
        while len(seen) < 4:
            await asyncio.sleep(0.01)
        button.value = False
        await asyncio.sleep(0.05)

    asyncio.run(press())
    assert seen[:4] == [5, 1, 2, 5] and len(seen) <= 5 and button.icon == "play" and button.tooltip == "play t"


@pytest.mark.parametrize("options, kind", [
    (range(0, 1001, 50), widgets.IntSlider), ([k / 10 for k in range(1, 11)], widgets.FloatSlider),
    ([0, 0.5, 1, 2], widgets.SelectionSlider), ((999, 400, 10), widgets.SelectionSlider),
    ([7], widgets.SelectionSlider), (["a", 1], widgets.Dropdown)])
def test_a_slider_tells_its_value_where_its_values_are_even(options, kind):
    options = list(options)
    control = Control("t", options, options[0])
    assert type(control.widget) is kind
    for n, value in enumerate(options):
        control.choose(n)
        assert control.index == n and control.value == value            # its own value, not one that is nearly it
        if kind is not widgets.SelectionSlider:
            assert control.widget.value == pytest.approx(value) if kind is not widgets.Dropdown else value


def test_it_begins_where_it_is_told_to(shown, draw, drawn):
    explore(draw, alt="a square", start={"color": "blue", "size": 8}, **CONTROLS)
    assert drawn == [("blue", 4), ("blue", 8), ("blue", 12)]
    (menu, row), image = live(shown)
    assert menu.value == "blue" and row.children[1].value == 8 and image.value == png(draw("blue", 8), fast=True)


@pytest.mark.parametrize("more, words", [
    ({"start": {"size": 5}}, "size=5; that is not among"), ({"start": {"shape": 5}}, "shape=5; that is not among"),
    ({"place": ("size", "row")}, "place is .*it must be two controls, across and down, of color, size")])
def test_a_start_or_place_that_is_none_is_refused(draw, more, words):
    with pytest.raises(ValueError, match=words):
        explore(draw, alt="a square", **more, **CONTROLS)


def test_a_click_chooses_a_place(shown):
    explore(lambda column, row: Image.new("RGB", (30, 20), (100 * column, 200 * row, 0)), alt="a place",
            place=("column", "row"), column=range(3), row=range(2))
    (column, down), seen = live(shown)
    image, over = seen.children
    assert len(over.children) == 6 and not any(button.tabbable for button in over.children)
    assert over.children[5].tooltip == "column 2, row 1"
    over.children[5].click()
    assert (column.value, down.children[1].value) == (2, 1)
    assert Image.open(io.BytesIO(image.value)).getpixel((0, 0)) == (200, 200, 0)


def test_a_figure_without_axes_can_be_explored(shown):
    from matplotlib.figure import Figure

    explore(lambda t: Figure((1, 1)), alt="nothing", t=range(2))
    assert len(shown) == 2


def test_the_place_lies_on_the_first_axes_of_a_figure():
    import matplotlib.pyplot as plt

    fig, (left, _) = plt.subplots(1, 2, figsize=(4, 2))
    left.imshow([[0, 1], [2, 3]])
    png(fig, fast=True)
    x0, y0, x1, y1 = area(fig)
    assert 0 < x0 < x1 < 0.5 and 0 < y0 < y1 < 1 and (x1 - x0) * 4 == pytest.approx((y1 - y0) * 2)


@pytest.mark.parametrize("controls", [{}, {"t": []}, {"a": ["x"], "t": range(0)}])
def test_an_explorer_without_values_is_refused(draw, controls):
    with pytest.raises(ValueError, match="at least one value, as in t=range"):
        explore(draw, alt="a square", **controls)


def test_a_picture_in_place_of_a_function_is_refused():
    with pytest.raises(ValueError, match="draw is 'a picture'; it must be a function of the controls"):
        explore("a picture", alt="a square", **CONTROLS)


def test_an_explorer_without_a_description_is_refused(shown, draw):
    with pytest.raises(ValueError, match="alt is empty"):
        explore(draw, alt=" ", **CONTROLS)


def test_what_goes_wrong_is_said_in_the_pictures_place(shown):
    def draw(t):
        if t == 2:
            raise KeyError("no <such> level")
        return Image.new("RGB", (8, 8))

    box = _widget(lambda t: png(draw(t)), {"t": [1, 2, 3]}, "black", None, {"t": 1})
    row, said, image = box.children
    slider = row.children[1]
    slider.value = 2
    assert image.layout.display == "none" and "t 2: KeyError: &#x27;no &lt;such&gt; level&#x27;" in said.value
    assert 'role="alert"' in said.value
    slider.value = 3
    assert image.layout.display is None and "black t 3" in said.value and "aria-live" in said.value


def test_a_later_cell_cannot_break_an_explorer(shown):
    """Run All, then move the slider: what the cells above had defined counts, directly or through another function."""
    notebook = {"Image": Image, "explore": explore, "shade": 5}
    exec("def colour(t):\n    return (t, shade, 0)\n\n"
         "def draw(t):\n    return Image.new('RGB', (8, 8), colour(t))\n\n"
         "explore(draw, alt='a colour', t=range(3))", notebook)
    exec("colour, shade, draw = None, 'red', 3", notebook)
    (row,), image = live(shown)
    row.children[1].value = 2
    assert Image.open(io.BytesIO(image.value)).getpixel((0, 0)) == (2, 5, 0)


def test_a_drag_draws_where_it_stands_and_not_every_place_on_the_way():
    asked = []
    box = _widget(lambda t: asked.append(t) or b"", {"t": range(100)}, "x", None, {"t": 0})
    slider = box.children[0].children[1]

    async def drag():
        for t in range(1, 60):
            slider.value = t
        await asyncio.sleep(2 * PAUSE)
        slider.value = 70
        await asyncio.sleep(2 * PAUSE)

    asyncio.run(drag())
    assert asked == [0, 59, 70]
