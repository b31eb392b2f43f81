"""The net of patches and the losses it serves: perceptual distance, hinge, adaptive weight."""
import numpy as np
import pytest
import torch

from minidiff.data import scenes
from minidiff.io.weights import weights_dir
from minidiff.nets.patches import Patches, PatchesConfig
from minidiff.train import losses
from minidiff.train.pictures import from_bytes

pytestmark = pytest.mark.quick


def net(**options) -> Patches:
    torch.manual_seed(0)
    return Patches(PatchesConfig(block_out_channels=(8, 16), **options))


def test_an_answer_without_norms_sees_its_own_patch_alone():
    critic = net(in_channels=1)
    critic.norms = torch.nn.ModuleList([torch.nn.Identity()])
    image = torch.zeros(1, 1, 32, 32, requires_grad=True)
    critic(image)[0][0, 0, 3, 3].backward()
    rows = image.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert rows.min() == 4 * 3 - 3 and rows.max() == 4 * 3 + 6  # ten pixels: kernel 4, stride 2, twice


def test_the_perceptual_distance_is_zero_for_the_same_picture_symmetric_and_blind_to_the_scale_of_maps():
    a, b = torch.rand(2, 4, 3, 16, 16)
    maps, others = net()(a)[1], net()(b)[1]
    assert losses.perceptual(maps, maps) == 0
    torch.testing.assert_close(losses.perceptual(maps, others), losses.perceptual(others, maps))
    torch.testing.assert_close(losses.perceptual([7 * m for m in maps], others), losses.perceptual(maps, others))
    assert losses.perceptual(maps, others) > 0.01


def test_the_perceptual_distance_is_the_published_formula():
    maps, others = torch.rand(2, 1, 3, 2, 2, dtype=torch.float64)
    each = [(maps[0, :, i, j] / maps[0, :, i, j].norm() - others[0, :, i, j] / others[0, :, i, j].norm()).square().sum()
            for i in range(2) for j in range(2)]
    torch.testing.assert_close(losses.perceptual([maps], [others]), torch.stack(each).mean())


def test_hinge_stops_pulling_on_answers_that_are_right_by_more_than_one():
    real, fake = torch.tensor([0.5, 3.0], requires_grad=True), torch.tensor([0.5, -3.0], requires_grad=True)
    losses.hinge(real, fake).backward()
    assert real.grad.tolist() == [-0.25, 0.0] and fake.grad.tolist() == [0.25, 0.0]


def test_the_adaptive_weight_makes_both_gradients_by_the_last_layer_equally_long():
    last = torch.randn(3, 3, requires_grad=True)
    reconstruction, adversarial = (last @ torch.randn(3, 5)).square().mean(), (5 * last @ torch.randn(3)).sum()
    weight = losses.adaptive_weight(reconstruction, adversarial, last)
    (g,), (h,) = (torch.autograd.grad(loss, last) for loss in (reconstruction, weight * adversarial))
    torch.testing.assert_close(g.norm(), h.norm())
    assert not weight.requires_grad


def test_the_shipped_net_tells_a_shifted_picture_from_a_repainted_one():
    eye = Patches.from_pretrained(weights_dir() / "perceptual")
    scene = scenes.Scene("day", "sun", "grass", "house", "red", "large", "centre")
    house, blue, tree = (from_bytes(torch.tensor(np.array(scenes.draw(each, 128)[0])).permute(2, 0, 1)[None])
                         for each in (scene, scene._replace(color="blue"), scene._replace(object="tree")))
    shifted = house.roll(1, 3)
    near, *far = (losses.perceptual(eye(house)[1], eye(other)[1]) for other in (shifted, blue, tree))
    assert near < min(far)
