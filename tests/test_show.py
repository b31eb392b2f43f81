"""Pictures in notebooks: one bundle with alt text and a PNG, whatever is shown."""
import base64
import io
import re
from unittest.mock import MagicMock

import pytest
import torch

from minidiff.io.images import contact_sheet
from minidiff.teach import film, show, style
from minidiff.teach.film import as_film, encode
from minidiff.teach.show import _view, enlarged, packed, png


@pytest.fixture
def shown(monkeypatch):
    """The bundles that a cell displays."""
    bundles = []
    monkeypatch.setattr("IPython.get_ipython", MagicMock())  # as in a notebook
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def pixels(data: str):
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_a_picture_comes_with_its_description_as_html_and_as_png(shown):
    show(torch.rand(3, 8, 8), alt='a "red" house & <more>', width=64)
    (bundle,) = shown
    assert 'alt="a &quot;red&quot; house &amp; &lt;more&gt;"' in bundle["text/html"]
    assert 'width="64"' in bundle["text/html"] and "<script" not in bundle["text/html"]
    assert bundle["image/png"] in bundle["text/html"] and pixels(bundle["image/png"]).size == (32, 32)
    assert bundle["text/plain"] == 'a "red" house & <more>'


def test_a_heavy_picture_comes_in_two_light_forms(shown):
    from PIL import Image

    y, x = torch.meshgrid(*2 * [torch.linspace(0, 1, 256)], indexing="ij")
    picture = torch.stack([y, x, (40 * (x - 0.5) * (y - 0.5)).sin() / 2 + 0.5]) * 0.9
    picture += 0.05 * torch.rand(picture.shape, generator=torch.Generator().manual_seed(0))
    show(picture, alt="colours")
    exact, still = Image.open(io.BytesIO(png(picture))), shown[0]["image/png"]
    source = shown[0]["text/html"].split("data:image/webp;base64,")[1].split('"')[0]
    assert len(still) + len(source) < 0.6 * len(png(picture)) * 4 / 3
    for form, most in ((source, 6), (still, 12)):
        assert pixels(form).size == exact.size
        far = [abs(a - b) for a, b in zip(pixels(form).tobytes(), exact.tobytes())]
        assert sum(far) / len(far) < most


@pytest.mark.parametrize("columns, size", [(None, (38, 8)), (2, (18, 18))])
def test_several_pictures_stand_side_by_side(shown, columns, size):
    show(torch.rand(4, 3, 8, 8), alt="four", columns=columns)
    assert pixels(shown[0]["image/png"]).size == size


def test_a_figure_keeps_its_rare_colours():
    """A palette chosen by area alone has no yellow for the small bright top of a heat map under many white lines."""
    import matplotlib.pyplot as plt
    from PIL import Image

    fig, ax = plt.subplots(figsize=(7, 2.9))
    width = 0.02 + torch.linspace(0, 1, 250)
    heat = torch.exp(-torch.linspace(-3, 3, 300)[:, None] ** 2 / 2 / width) / width**0.25
    ax.imshow(heat.numpy(), aspect="auto", extent=(0, 1, -3, 3), interpolation="bilinear", cmap="viridis")
    walks = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)).cumsum(0) / 20
    ax.plot(torch.linspace(0, 1, 500), walks, color="white", linewidth=0.6)
    exact = png(fig)
    files = io.BytesIO(exact), io.BytesIO(packed(exact))
    wanted, got = (torch.tensor(list(Image.open(data).convert("RGB").tobytes())) for data in files)
    assert (got - wanted).abs().max() < 80


def test_values_outside_of_0_and_1_are_cut_off():
    from PIL import Image

    picture = Image.open(io.BytesIO(png(torch.tensor([-3.0, 0.5, 7.0]).view(3, 1, 1))))
    assert picture.getpixel((0, 0)) == (0, 128, 255)


def test_a_figure_is_shown_once_and_closed(shown):
    import matplotlib.pyplot as plt

    style()
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1])
    show(fig, alt="a line")
    assert not plt.fignum_exists(fig.number) and pixels(shown[0]["image/png"]).size == (220, 110)
    source = shown[0]["text/html"].split("data:image/webp;base64,")[1].split('"')[0]
    assert pixels(source).size == (440, 220) and 'width="220"' in shown[0]["text/html"]        # sharp on any screen


def test_a_film_moves_and_leaves_a_strip_of_named_frames(shown):
    from PIL import Image

    film([torch.full((3, 8, 8), i / 9) for i in range(10)], alt="it gets brighter")
    source = shown[0]["text/html"].split("base64,")[1].split('"')[0]
    moving = Image.open(io.BytesIO(base64.b64decode(source)))
    assert moving.n_frames == 10 and moving.size == (160, 178)           # eight pixels, enlarged, under a name
    strip = pixels(shown[0]["image/png"])
    assert strip.size == (3 * 160 + 8, 2 * 178 + 4)
    greys = [strip.getpixel((x + 80, y + 100))[0] for y in (0, 182) for x in (0, 164, 328)]
    assert greys == sorted(greys) and greys[0] == 0 and greys[-1] == 255
    for x, y in ((0, 0), (328, 182)):
        assert strip.crop((x, y, x + 160, y + 18)).convert("L").getextrema()[0] < 100      # there is its name


def test_names_stand_above_their_pictures(shown):
    show([torch_picture(0.5)] * 3, alt="three", names=["a", "b", "a very long name that has no room above its picture"])
    sheet = pixels(shown[0]["image/png"])
    assert sheet.size == (3 * 160 + 4, 178) and sheet.getpixel((80, 100)) == (128, 128, 128)
    first, second = (sheet.crop((x, 0, x + 160, 18)).tobytes() for x in (0, 162))
    assert first != second
    show(torch.zeros(2, 3, 200, 200), alt="two", names=["a", "b"], columns=1)
    assert pixels(shown[1]["image/png"]).size == (200, 2 * 218 + 2)
    for call in (lambda: show(torch.zeros(2, 3, 8, 8), alt="two", names=["a"]),
                 lambda: film([torch.zeros(3, 8, 8)] * 3, alt="x", names=["a"])):
        with pytest.raises(ValueError, match="but 1 names|there are 3 and 1"):
            call()


def test_rows_and_columns_have_names_and_each_row_is_a_picture(shown):
    show([torch_picture(k / 6) for k in range(6)], alt="six", rows=["above", "below"], names=["a", "b", "c"], width=300)
    text = shown[0]["text/html"]
    assert re.findall('alt="(.*?)"', text) == ["above", "below"] and 'role="group" aria-label="six"' in text
    first, second = (pixels(source) for source in re.findall('base64,(.*?)"', text))
    whole = pixels(shown[0]["image/png"])
    assert first.height == second.height + 18 and whole.size == (first.width, first.height + second.height)
    assert whole.crop((0, 0, first.width, first.height)).tobytes() == first.tobytes()
    greys = [second.getpixel((x, second.height // 2))[0] for x in (100, 180, 270)]
    assert greys == [round(255 * k / 6) for k in (3, 4, 5)]
    for more in ({"rows": ["a", "b", "c", "d"]}, {"rows": ["a", "b"], "names": ["c"]}, {"rows": []}):
        with pytest.raises(ValueError, match="there are 6 pictures, but"):
            show([torch_picture(0)] * 6, alt="x", **more)


def test_only_pictures_made_of_pixels_are_enlarged_as_pixels():
    from PIL import Image

    def colours(side, width):
        picture = Image.new("RGB", (side, side), "black")
        picture.paste("white", (0, 0, side // 2, side))
        return len(enlarged(picture, width, smooth=True).getcolors())

    assert colours(16, 100) == colours(64, 128) == colours(100, 400) == 2 and colours(128, 256) > 2
    assert enlarged(Image.new("RGB", (128, 128)), 256).width == 128       # a browser does that


def torch_picture(grey):
    from PIL import Image

    return Image.new("RGB", (8, 8), (round(255 * grey),) * 3)


@pytest.mark.parametrize("what, alt, words", [(torch.rand(3, 2, 2), " ", "alt is empty"), ([], "x", "no picture"),
                                             (torch.rand(1, 2, 2), "x", r"this one is \(1, 1, 2, 2\)"),
                                             (torch.full((3, 2, 2), 200, dtype=torch.uint8), "x", "torch.uint8"),
                                             ([torch.rand(3, 2, 2)], "x", "a PIL picture here, not a Tensor")])
def test_what_cannot_be_shown_is_refused(what, alt, words):
    with pytest.raises(ValueError, match=words):
        show(what, alt=alt)


def test_pictures_of_every_mode_are_shown_as_they_look():
    from PIL import Image

    deep = Image.frombytes("I;16", (2, 2), (90 * 257).to_bytes(2, "little") * 4)
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    for picture, color in ((deep, (90, 90, 90)), (clear, (255, 255, 255)), (Image.new("CMYK", (2, 2)), (255,) * 3)):
        assert contact_sheet([picture], 1).getpixel((0, 0)) == color
        for shown in (png(picture), png([picture, picture]), as_film([png(picture)])[0]):
            assert Image.open(io.BytesIO(shown)).convert("RGB").getpixel((0, 0)) == color
        assert encode([picture, picture], ".gif", seconds=1, hold=1)[:3] == b"GIF"


def test_pictures_of_several_sizes_are_not_shown_together():
    from PIL import Image

    pictures = [Image.new("RGB", (2, 2)), Image.new("RGB", (4, 2))]
    for together in (png, lambda pictures: encode(pictures, ".png", seconds=1, hold=1)):
        with pytest.raises(ValueError, match="of one size; these are 2×2, 4×2"):
            together(pictures)


def test_a_widget_of_ipywidgets_7_is_shown_with_the_picture_behind_it():
    """Colab's version has no _repr_mimebundle_."""
    class Old:
        model_id = "abc"

    shown, = _view(Old()).items()
    assert shown == ("application/vnd.jupyter.widget-view+json",
                     {"version_major": 2, "version_minor": 0, "model_id": "abc"})
