"""The hints of the shipped ControlNets: thin edges of known shapes, silhouettes, pictures of every sort, agreement."""
import math

import pytest
import torch

from minidiff.data import hints, scenes

pytestmark = pytest.mark.quick


def disc(radius: float, n: int = 64, shift: float = 0.0) -> torch.Tensor:
    """(1,3,n,n): a white disc on black, anti-aliased."""
    at = torch.arange(n) - (n - 1) / 2
    far = ((at[:, None] - shift) ** 2 + at[None] ** 2).sqrt()
    return (radius + 0.5 - far).clamp(0, 1)[None, None].expand(1, 3, n, n)


def test_the_edge_of_a_disc_is_a_thin_circle_at_its_radius():
    edge = hints.edges(disc(20.0))[0, 0]
    rows, cols = edge.nonzero().T
    far = ((rows - 31.5) ** 2 + (cols - 31.5) ** 2).sqrt()
    assert (far - 20).abs().max() < 1.5
    assert 0.8 * 2 * math.pi * 20 < len(rows) < 1.4 * 2 * math.pi * 20              # one pixel wide, without gaps
    angles = torch.atan2(rows - 31.5, cols - 31.5).sort().values
    assert angles.diff().max() < 0.12


def test_edges_are_found_in_any_channel_and_not_below_the_least():
    red = disc(20.0) * torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert torch.equal(hints.edges(red), hints.edges(disc(20.0)))
    assert not hints.edges(0.1 * disc(20.0)).any() and hints.edges(0.2 * disc(20.0)).any()
    assert not hints.edges(torch.full((1, 3, 16, 16), 0.7)).any()


def test_edges_move_with_the_picture_and_do_not_see_its_sign():
    picture = scenes.render(2, 64, seed=3)[0].float() / 255
    moved = hints.edges(picture.roll(5, -1))
    assert torch.equal(moved[..., 8:-8], hints.edges(picture).roll(5, -1)[..., 8:-8])
    assert hints.overlap(hints.edges(1 - picture), hints.edges(picture)).min() > 0.99


def test_silhouettes_are_the_masks_of_the_same_drawings():
    pictures, _ = scenes.render(6, 64, seed=9)
    masks = hints.silhouettes(torch.arange(6), 64, seed=9)
    assert masks.shape == (6, 3, 64, 64) and set(masks.unique().tolist()) == {0.0, 1.0}
    edges = hints.edges(pictures.float() / 255)
    border = hints.edges(masks)
    assert hints.overlap(border, edges * torch.nn.functional.max_pool2d(border, 5, 1, 2)).min() > 0.5


def test_overlap_is_one_for_the_same_and_falls_with_distance():
    ring = hints.edges(disc(20.0))
    shares = [hints.overlap(ring, hints.edges(disc(20.0, shift=k))).item() for k in (0, 1, 3, 8)]
    assert shares[0] == 1.0 and shares[1] > 0.9 and shares[1] > shares[2] > shares[3]
    nothing = torch.zeros_like(ring)
    assert hints.overlap(nothing, nothing).item() == 1.0 and hints.overlap(nothing, ring).item() == 0.0


@pytest.mark.parametrize("picture, kind, said", [
    (disc(8.0), "edges", "white lines on black"), (1 - disc(8.0), "edges", "dark lines on white"),
    (disc(8.0), "masks", "white areas on black"), (1 - disc(8.0), "masks", "dark areas on white"),
    (scenes.render(1, 64)[0].float() / 255, "edges", "a picture, its edges"),
    (0.3 * disc(8.0), "edges", "white lines on black")])
def test_a_picture_of_any_sort_becomes_white_on_black(picture, kind, said):
    hint, phrase = hints.read(picture, kind)
    assert phrase.startswith(said) and hint.shape == picture.shape and 0 < hint.mean() < 0.5
    assert set(hint.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("picture, kind, said", [
    (torch.zeros(1, 3, 16, 16), "edges", "it is one colour"), (torch.ones(1, 3, 16, 16), "masks", "it is one colour"),
    (scenes.render(1, 64)[0].float() / 255, "masks", "has colours"), (disc(8.0), "depth", "there are edges, masks")])
def test_what_cannot_be_a_hint_is_said(picture, kind, said):
    with pytest.raises(ValueError, match=said):
        hints.read(picture, kind)
