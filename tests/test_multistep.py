"""Multistep samplers: their weights, and the order that these give."""

import math

import numpy as np
import pytest
import torch

from minidiff import multistep
from minidiff.grid import Grid
from minidiff.multistep import lagrange_integrals
from minidiff.prediction import oracle
from minidiff.schedule import SD, Level
from minidiff.sd.scheduler import from_diffusers, preset
from tests.exact import GAUSSIAN, TWO
from tests.test_samplers import X, curved, last, order

pytestmark = pytest.mark.quick


def test_lagrange_integrals_are_those_of_numpys_polynomials():
    for nodes in ([1.0], [1.0, 2.0], [0.5, 1.1, 2.0], [0.4, 0.9, 1.7, 3.1]):
        exact = []
        for node in nodes:
            others = [m for m in nodes if m != node]
            whole = np.polynomial.Polynomial.fromroots(others).integ() if others else np.polynomial.Polynomial([0, 1])
            exact.append((whole(0.1) - whole(0.4)) / math.prod(node - m for m in others))
        assert lagrange_integrals(nodes, 0.4, 0.1) == pytest.approx(exact, rel=1e-10)


def test_lms_weights_are_the_published_ones():
    us = [level.sigma for level in preset("sd-lms", 10)]
    published = [[-6.774762], [-4.001029, 0.770321], [-2.32607, 0.727107, -0.091905],
                 [-1.439761, 0.58957, -0.125674, 0.007719]]
    for i, weights in enumerate(published):
        assert lagrange_integrals(us[i::-1], us[i], us[i + 1]) == pytest.approx(weights, abs=2e-6)


@pytest.mark.parametrize("terms", [0, 5, 3.0, "3", True])
def test_lms_takes_one_to_four_terms(terms):
    with pytest.raises(ValueError, match=f"order is {terms}; linear multistep takes 1 to 4"):
        last(multistep.lms, curved, X, preset("sd-lms", 10), order=terms)


@pytest.mark.parametrize("n, lowered", [(10, True), (14, True), (15, False), (20, False)])
def test_the_last_dpmpp_step_is_of_order_one_below_fifteen_steps_of_the_full_grid(n, lowered):
    config = {"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min"}
    levels = from_diffusers(config, n, SD)[n // 2:]
    low, high = (last(multistep.dpmpp_2m, TWO.denoise, X, levels, lower_order_final=flag) for flag in (True, False))
    assert torch.equal(low, high) != lowered


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["Gaussian", "mixture"])
@pytest.mark.parametrize("terms, low, high", [(1, 0.9, 1.1), (2, 1.9, 2.2), (3, 1.9, 2.2), (4, 1.9, 2.2)])
def test_lms_has_order_two_after_its_euler_start_whatever_its_terms(terms, low, high, data):
    assert low < order(multistep.lms, data, "VE", n=160, order=terms) < high


def test_plms_asks_nothing_about_the_data_themselves():
    grid = Grid([Level(2.0, 0.5, 0.5), Level(1.0, 0.5, 0.5), Level(0.0, 1.0, 0.0)])  # the first step is of no size
    assert last(multistep.plms, oracle(3.0), torch.tensor(1.0), grid) == 3


@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["Gaussian", "mixture"])
def test_plms_has_order_two(data):
    assert order(multistep.plms, data, "VE", n=320) == pytest.approx(2, abs=0.1)


def test_the_last_unipc_step_of_order_one_makes_the_order_two():
    assert order(multistep.unipc, TWO, "VP") == pytest.approx(2, abs=0.1)
