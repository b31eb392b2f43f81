"""The noise-aware classifier: its shape, its log-probabilities, and how well the shipped one reads noisy drawings."""
import pytest
import torch

from minidiff.data import scenes
from minidiff.io.weights import weights_dir
from minidiff.nets.classifier import Classifier, ClassifierConfig
from minidiff.schedule import SD, Level

TINY = ClassifierConfig(in_channels=3, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), num_classes=5,
                        block_out_channels=(8, 16), heads=2, norm_num_groups=4, cross_attention_dim=None)


@pytest.mark.quick
def test_log_prob_is_a_log_probability_whatever_the_coordinates():
    net, x = Classifier(TINY), torch.randn(5, 3, 16, 16)
    level = Level(300.0, 0.6, 0.8)
    every = torch.stack([net.log_prob(torch.full((5,), k))(x, level) for k in range(5)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(5))
    stretched = net.log_prob(torch.arange(5))(2 * x, Level(300.0, 1.2, 1.6))
    torch.testing.assert_close(stretched, every.diagonal())


@pytest.mark.quick
def test_time_and_every_parameter_matter():
    net, x = Classifier(TINY), torch.randn(2, 3, 16, 16)
    assert not torch.allclose(net(x, 10), net(x, 900))
    net(x, 500).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.quick
def test_it_is_saved_and_loaded(tmp_path):
    net, x = Classifier(TINY), torch.randn(2, 3, 16, 16)
    net.save_pretrained(tmp_path)
    torch.testing.assert_close(Classifier.from_pretrained(tmp_path)(x, 7), net(x, 7))


@torch.inference_mode()
def test_the_shipped_one_reads_fresh_drawings_and_noise_makes_it_unsure():
    net, g = Classifier.from_pretrained(weights_dir() / "classifier"), torch.Generator().manual_seed(0)
    pictures, drawn = scenes.render(600, 16, seed=5, second=0.0)
    x0, y = pictures / 127.5 - 1, torch.tensor([scenes.labels(scene)["object"] for scene in drawn])
    right = []
    for t in (0, 400, 999):
        alpha, sigma = (float(c) for c in SD(torch.tensor(t)))
        logits = net(alpha * x0 + sigma * torch.randn(x0.shape, generator=g), t)
        right.append((logits.argmax(1) == y).float().mean().item())
    assert right[0] > 0.85 > right[1] > right[2] > 0.1  # chance is 1/6
