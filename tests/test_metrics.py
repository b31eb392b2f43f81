"""Distances between sets: against closed forms, loops and known overlaps."""
import pytest
import torch

from minidiff import exact
from minidiff.data.toys import Mixture
from minidiff.grid import Step, flow
from minidiff.measure import metrics
from minidiff.samplers import euler
from minidiff.schedule import Level

pytestmark = pytest.mark.quick


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_moments(x, mean, cov):
    """Rows whose sample mean and covariance are exactly these."""
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return mean + white @ torch.linalg.cholesky(cov).T


def test_the_frechet_distance_of_two_known_gaussians():
    a, b = torch.tensor([[2.0, 0.3], [0.3, 1.0]]).double(), torch.tensor([[1.0, -0.4], [-0.4, 0.5]]).double()
    m = torch.tensor([1.0, -2.0]).double()
    values = torch.linalg.eigvals(a @ b).real.sqrt().sum()                      # tr (AB)^½ by another way
    truth = (m.square().sum() + a.trace() + b.trace() - 2 * values).item()
    found = metrics.frechet(with_moments(normal(50, 2), torch.zeros(2), a), with_moments(normal(60, 2, seed=1), m, b))
    assert found == pytest.approx(truth, abs=1e-9)
    assert metrics.frechet(normal(50, 2), normal(50, 2)) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_has_a_bias_that_falls_with_n_and_the_kernel_distance_has_none():
    def mean(measure, n):
        return sum(measure(normal(n, 4, seed=2 * i), normal(n, 4, seed=2 * i + 1)) for i in range(100)) / 100

    assert 1.7 < mean(metrics.frechet, 50) / mean(metrics.frechet, 100) < 2.3
    shifted = metrics.kernel_distance(normal(500, 4), 0.5 + normal(500, 4, seed=1))
    assert abs(mean(metrics.kernel_distance, 50)) < 0.2 * shifted


def test_the_kernel_distance_equals_its_double_sum():
    a, b = normal(5, 3), normal(4, 3, seed=1)

    def k(x, y):
        return (x @ y / 3 + 1).item() ** 3

    same = [sum(k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
            for s in (a, b)]
    cross = sum(k(x, y) for x in a for y in b) / 20
    assert metrics.kernel_distance(a, b) == pytest.approx(sum(same) - 2 * cross)


def test_precision_and_recall_see_what_is_missing():
    two = torch.cat([normal(300, 2), 20 + normal(300, 2, seed=1)])
    one, wide = normal(300, 2, seed=2), torch.cat([two + 0.05 * normal(600, 2, seed=3), 100 + normal(600, 2, seed=4)])
    precision, recall = metrics.precision_recall(two, one)
    assert precision > 0.9 and 0.4 < recall < 0.6                                # one mode of two
    precision, recall = metrics.precision_recall(two, wide)
    assert 0.4 < precision < 0.6 and recall > 0.9                                # half of it is nowhere


def test_planted_copies_are_the_nearest():
    data, fresh = normal(100, 3, 4, 4), normal(20, 3, 4, 4, seed=1)
    fresh[7] = data[42]
    distance, which = metrics.nearest(fresh, data)
    assert distance.argmin() == 7 and distance[7] == 0 and which[7] == 42
    assert distance[:7].min() > 1


def test_the_interval_covers_the_mean_as_often_as_it_says():
    hits = 0
    for i in range(200):
        low, high = metrics.bootstrap(lambda x: x.mean().item(), normal(60, seed=i), n=100, seed=i)
        hits += low < 0 < high
    assert 0.88 < hits / 200 < 0.99


def test_what_is_left_of_the_frechet_distance_without_its_bias_is_nothing():
    pairs = [(normal(60, 4, seed=2 * i), normal(60, 4, seed=2 * i + 1)) for i in range(100)]
    biased, left = (sum(f(*pair) for pair in pairs) / 100 for f in (
        metrics.frechet, lambda a, b: metrics.without_bias(metrics.frechet, a, b)))
    assert abs(left) < biased / 8


def test_the_interval_of_a_measure_with_a_bias_is_that_of_the_same_sample_size():
    """Copies double the bias of a bootstrap sample, so that uncentred intervals would mostly miss."""
    pairs = [(normal(60, 2, seed=2 * i), 0.5 + normal(60, 2, seed=2 * i + 1)) for i in range(100)]
    mean = sum(metrics.frechet(*pair) for pair in pairs) / 100
    hits = sum(low < mean < high for low, high in (metrics.bootstrap(metrics.frechet, *pair, n=60) for pair in pairs))
    assert hits > 80


def test_compare_has_every_measure_with_its_interval():
    real, other, far = (normal(80, 3, seed=i) for i in range(3))
    near, off = metrics.compare(real, other, n=20), metrics.compare(real, far + 2, n=20)
    assert near["frechet"]["value"] == round(metrics.frechet(real, other), 4)
    assert all(row["low"] < row["value"] < row["high"] and row["n"] == 80 for row in off.values() if row["value"])
    assert all(off[name]["low"] > near[name]["high"] for name in ("frechet", "frechet_without_bias",
                                                                  "kernel_distance", "nearest"))
    assert all(off[name]["high"] < near[name]["low"] for name in ("precision", "recall"))


def test_paths_of_constant_speed_are_straight_and_a_corner_is_not():
    """Unequal steps; the corner's two halves have velocities (±1, 1) about a mean of (0, 1): 1."""
    sigmas = (1.0, 0.7, 0.5, 0.1, 0.0)
    line = [Step(Level(0.0, 1 - s, s), torch.tensor([[3.0 * s, 2.0]]).double(), None) for s in sigmas]
    corner = [Step(Level(0.0, 1 - s, s), torch.tensor([[abs(s - 0.5), s]]).double(), None) for s in sigmas]
    assert metrics.straightness(line).item() == pytest.approx(0, abs=1e-12)
    assert metrics.straightness(corner).item() == pytest.approx(1)


def test_a_gaussian_s_flow_bends_as_its_formula_says():
    """From N(0, 1) to N(0, s²) the state is z·√((1 − t)²s² + t²); its mean square speed beside that of the chord."""
    s, grid = 0.3, flow(2000)
    gauss = Mixture(torch.ones(1).double(), torch.zeros(1, 1).double(), s)
    steps = list(euler(exact.denoiser(gauss), torch.ones(1, 1).double(), grid))
    t = (torch.arange(20_000).double() + 0.5) / 20_000
    speed = ((1 + s * s) * t - s * s) / ((1 - t) ** 2 * s * s + t * t).sqrt()
    assert metrics.straightness(steps).item() == pytest.approx((speed - (1 - s)).square().mean().item(), rel=1e-2)
