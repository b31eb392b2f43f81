"""The network for points in the plane: it is told the time, and learns."""
import pytest
import torch

from minidiff.data import toys
from minidiff.nets.mlp import MLP, MLPConfig
from minidiff.schedule import DDPM
from minidiff.train import losses

pytestmark = pytest.mark.quick


def test_one_time_for_all_equals_the_same_time_for_each():
    net, x = MLP(MLPConfig(ch=16)), torch.randn(4, 2)
    torch.testing.assert_close(net(x, 300), net(x, torch.full((4,), 300)))
    assert not torch.allclose(net(x, 300), net(x, 700))


def test_it_comes_back_from_a_file(tmp_path):
    net, x = MLP(MLPConfig(dim=3, ch=16, layers=2)), torch.randn(4, 3)
    net.save_pretrained(tmp_path)
    torch.testing.assert_close(MLP.from_pretrained(tmp_path)(x, 5), net(x, 5))


def test_a_short_training_beats_the_trivial_predictor():
    torch.manual_seed(0)
    net, x0 = MLP(MLPConfig(ch=64)), toys.sample("ring", 512)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    seen = []
    for _ in range(300):
        t, eps = torch.randint(1000, (512,)), torch.randn(512, 2)
        loss = losses.diffusion(net, "eps", DDPM, x0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert sum(seen[-50:]) / 50 < 0.7
