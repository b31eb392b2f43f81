"""Averages of weights: a constant net, the published decays, the width of a power average."""
import math

import pytest
import torch
from torch import nn

from minidiff.train.ema import EMA, constant, power, warmed


@pytest.mark.quick
def test_ema_of_a_constant_net_is_that_net_and_the_decay_rises():
    model = nn.Linear(2, 1)
    average = EMA(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average.net.weight.fill_(0.0)
    for _ in range(3):
        average.update(model)
    # 1 − Π d_n with d_n = (1 + n)/(10 + n): 1 − (1·2·3)/(10·11·12)
    torch.testing.assert_close(average.net.weight, torch.full((1, 2), 1 - 6 / 1320))


def profile(decay, n):
    """The weight of the start and of each of n updates in the average: net i is the i-th unit vector."""
    model = nn.Linear(n + 1, 1, bias=False).double()
    basis = torch.eye(n + 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(basis[:1])
        average = EMA(model, decay)
        for row in basis[1:]:
            model.weight.copy_(row[None])
            average.update(model)
    return average.net.weight[0]


@pytest.mark.quick
def test_the_constant_average_weighs_geometrically_and_keeps_the_start():
    wanted = torch.tensor([0.9**20, *(0.1 * 0.9 ** (20 - i) for i in range(1, 21))], dtype=torch.float64)
    torch.testing.assert_close(profile(constant(0.9), 20), wanted)


@pytest.mark.quick
@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_power_average_weighs_by_a_power_of_the_step_and_has_its_width(width):
    n = 2000
    weight, at = profile(power(width), n), torch.arange(n + 1, dtype=torch.float64) / n
    gamma = math.log(weight[n // 2:n // 2 + 2].sum() / weight[n // 4:n // 4 + 2].sum()) / math.log(2)
    torch.testing.assert_close(weight[1:], at[1:] ** (gamma + 1) - at[:-1] ** (gamma + 1), atol=1e-4, rtol=0.0)
    assert weight[0] == 0 and weight.sum().item() == pytest.approx(1)
    middle = (weight * at).sum()
    assert (weight * (at - middle) ** 2).sum().sqrt().item() == pytest.approx(width, rel=2e-3)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(width, rel=2e-3)


@pytest.mark.quick
def test_a_number_means_the_warmed_average_and_a_decay_that_is_none_is_rejected():
    assert torch.equal(profile(0.99, 15), profile(warmed(0.99), 15))
    for make, value in ((constant, 1.0), (warmed, -0.1), (power, 0.0), (power, 0.3)):
        with pytest.raises(ValueError, match="it must lie in"):
            make(value)
