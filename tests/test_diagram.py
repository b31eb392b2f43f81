"""The drawing of the machine: every part is in it, with the shapes of the model at hand."""
import pytest

import minidiff as md
from minidiff.teach.diagram import PARTS, diagram, machine

pytestmark = pytest.mark.quick


def texts(figure):
    return [text.get_text().replace("\n", " ") for ax in figure.axes for text in ax.texts]


def test_every_part_and_every_shape_is_written_and_nothing_lies_on_another(pipe):
    mini = md.StableDiffusion.from_pretrained("mini-sd", device="cpu")
    for model, shapes in ((mini, ("4×16×16", "128×128", "128 num")), (pipe, ("4×8×8", "32×32", "of 24 numbers"))):
        figure = machine(model, steps=7)
        found = texts(figure)
        assert set(PARTS) <= set(found) and "7 times round" in found
        assert all(any(shape in text for text in found) for shape in shapes)
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        whole = figure.bbox
        assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 for box in boxes)


@pytest.mark.parametrize("part", PARTS)
def test_one_part_is_lit(pipe, part):
    white = (1.0, 1.0, 1.0, 1.0)
    lit = [patch.get_facecolor() != white for patch in machine(pipe, lit=part).axes[0].patches[:len(PARTS)]]
    assert lit == [each == part for each in PARTS]


def test_a_part_that_there_is_not_is_named(pipe, capsys):
    with pytest.raises(ValueError, match="lit is 'brain'; it must be one of text encoder, U-Net, sampler, VAE decoder"):
        machine(pipe, lit="brain")
    diagram(pipe)
    assert "77 vectors of 24 numbers" in capsys.readouterr().out
