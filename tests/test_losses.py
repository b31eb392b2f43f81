"""Weights and the variational bound, against closed forms."""
import math

import pytest
import torch
from torch import nn

from minidiff import exact
from minidiff.data.toys import Mixture
from minidiff.grid import Grid, karras
from minidiff.measure.metrics import straightness
from minidiff.prediction import Pred, consistent, denoiser, moved, target
from minidiff.samplers import ddim
from minidiff.schedule import DDPM, EDM, SD, Discrete, Flow, Level, linear_betas
from minidiff.train import losses
from minidiff.train.trainer import learning_rate

MEAN, STD = 0.3, 0.5
GAUSS = Mixture(torch.ones(1), torch.tensor([[MEAN]]), STD)
SIGNS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)   # Gauss-Hermite, exact to degree 3


def chain(T, end=0.02):
    bars = torch.cumprod(1 - linear_betas(T, 1e-4, end).double(), 0).tolist()
    return Grid(Level(float(t), math.sqrt(bars[t]), math.sqrt(1 - bars[t])) for t in reversed(range(T)))


def bound(grid, variances):
    """The expected bound over data and noise, exactly: every term is quadratic in both."""
    x0, eps = MEAN + STD * SIGNS[:, :1], SIGNS[:, 1:]
    return losses.vlb(exact.denoiser(GAUSS), x0, grid, variances, noise=lambda like: eps).mean(1)


def optimal(grid):
    """The variance of p(x_nxt | x_now): the posterior's, and what is not known of x0 (Bao et al. 2022, 2201.06503)."""
    found = []
    for (_, a, s), (_, a1, s1) in zip(grid, [*grid[1:], Level(0.0, 1.0, 0.0)]):
        unknown = STD**2 * s * s / (a * a * STD**2 + s * s)
        r = s1 * a / (a1 * s)
        found.append(s1 * s1 * (1 - r * r) + (a1 * (1 - r * r)) ** 2 * unknown)
    return found


@pytest.mark.quick
def test_with_the_optimal_variance_the_bound_of_a_gaussian_is_its_entropy():
    """p is then the exact reverse chain, but for the start: it begins at N(0, 1), which x_T is not quite."""
    entropy = 0.5 * math.log(math.tau * math.e * STD**2)
    for T, end in ((50, 0.4), (1000, 0.02)):
        grid = chain(T, end)
        _, a, s = grid[0]
        var = a * a * STD**2 + s * s
        gap = 0.5 * (var + (a * MEAN) ** 2 - 1 - math.log(var))                          # KL(p(x_T) ‖ N(0, 1))
        assert bound(grid, optimal(grid)).sum().item() == pytest.approx(entropy + gap, abs=1e-10)


@pytest.mark.quick
def test_the_fixed_variances_leave_a_gap():
    grid = chain(1000)
    best, large, small = (bound(grid, v(grid)).sum() for v in (optimal, losses.fixed_large, losses.fixed_small))
    assert 1e-3 < large - best < 1e-2 and 0.5 < small - best < 1


@pytest.mark.quick
def test_the_posterior_is_the_product_of_two_gaussians():
    """Bayes: q(x_nxt | x_now, x0) ∝ q(x_now | x_nxt)·q(x_nxt | x0), by quadrature; also over several levels at once."""
    here, x, x0 = torch.linspace(-6, 6, 12001, dtype=torch.float64), 0.3, -0.8
    for now, nxt in ((DDPM(600), DDPM(599)), (DDPM(300), DDPM(150)), (DDPM(5), DDPM(0))):
        now, nxt = Level(1.0, *now), Level(0.0, *nxt)
        ratio = now.alpha / nxt.alpha
        beta = now.sigma**2 - (ratio * nxt.sigma) ** 2
        p = (-(x - ratio * here) ** 2 / (2 * beta) - (here - nxt.alpha * x0) ** 2 / (2 * nxt.sigma**2)).softmax(0)
        on_x, on_x0, variance = losses.posterior(now, nxt)
        mean = (p * here).sum()
        assert mean.item() == pytest.approx(on_x * x + on_x0 * x0, abs=1e-9)
        assert (p * (here - mean) ** 2).sum().item() == pytest.approx(variance, rel=1e-6)


@pytest.mark.quick
def test_each_term_is_a_kl_divergence():
    grid, x0 = chain(8, 0.4), torch.tensor([[0.7]], dtype=torch.float64)
    eps = torch.tensor([[0.4]], dtype=torch.float64)
    variances = losses.fixed_large(grid)
    terms = losses.vlb(exact.denoiser(GAUSS), x0, grid, variances, noise=lambda like: eps)[:, 0]
    now, nxt = grid[3], grid[4]
    x, guess = now.alpha * x0 + now.sigma * eps, exact.denoiser(GAUSS)(now.alpha * x0 + now.sigma * eps, now).x0
    beta = 1 - (now.alpha / nxt.alpha) ** 2

    def posterior_mean(x0):                                                                # DDPM, eq. 7
        return (nxt.alpha * beta * x0 + (now.alpha / nxt.alpha) * nxt.sigma**2 * x) / now.sigma**2

    normal = torch.distributions.Normal
    q = normal(posterior_mean(x0), math.sqrt(nxt.sigma**2 / now.sigma**2 * beta))
    truth = torch.distributions.kl_divergence(q, normal(posterior_mean(guess), math.sqrt(beta)))
    torch.testing.assert_close(terms[4], truth[0, 0])
    prior = torch.distributions.kl_divergence(normal(grid[0].alpha * x0, grid[0].sigma), normal(0.0, 1.0))
    torch.testing.assert_close(terms[0], prior[0, 0])
    guess = exact.denoiser(GAUSS)(grid[-1].alpha * x0 + grid[-1].sigma * eps, grid[-1]).x0
    torch.testing.assert_close(terms[-1], -normal(guess, math.sqrt(variances[-1])).log_prob(x0)[0, 0])


@pytest.mark.quick
def test_pictures_add_up_their_pixels():
    grid, x0 = chain(8, 0.4), torch.tensor([[0.7]], dtype=torch.float64)
    one, many = (losses.vlb(lambda x, level: (x / 2, None), part, grid, losses.fixed_small(grid), torch.ones_like)
                 for part in (x0, x0.expand(2, 12).view(2, 3, 2, 2)))
    torch.testing.assert_close(many, (12 * one).expand_as(many))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_the_implied_weight_is_the_ratio_of_two_losses(kind):
    x = torch.randn(3, 5, dtype=torch.float64)
    for t in (0, 400, 999):
        alpha, sigma = DDPM(t)
        eps, off = torch.randn_like(x), torch.randn_like(x)
        truth, guess = (target(kind, (x - sigma * e) / alpha, e, alpha, sigma) for e in (eps, off))
        torch.testing.assert_close((truth - guess).square().sum() / (eps - off).square().sum(),
                                   torch.tensor(losses.implied_weight(kind, alpha, sigma), dtype=torch.float64))


@pytest.mark.quick
def test_min_snr_weighs_every_kind_alike():
    alpha, sigma = (c.double() for c in Discrete(DDPM.alpha_bar)(torch.arange(1000)))
    snr = (alpha / sigma) ** 2
    for kind in ("eps", "x0", "v", "flow"):
        on_x0 = losses.min_snr(kind, alpha, sigma) * losses.implied_weight(kind, alpha, sigma) * snr
        torch.testing.assert_close(on_x0, snr.clamp(max=5.0))
    torch.testing.assert_close(losses.min_snr("v", alpha, sigma), snr.clamp(max=5.0) / (snr + 1))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_diffusion_loss_of_the_perfect_net_is_zero(kind):
    x0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in SD(t))
    perfect = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[kind]

    def model(x, t):
        torch.testing.assert_close(x, alpha * x0 + sigma * eps)
        return perfect

    torch.testing.assert_close(losses.diffusion(model, kind, SD, x0, t, eps), torch.zeros(3))


@pytest.mark.quick
def test_edm_loss_is_the_published_one():
    """λ(σ)·|D(x; σ) − x0|², D = c_skip·x + c_out·F(c_in·x; c_noise), λ = (σ² + d²)/(σ·d)² (2206.00364, table 1)."""
    torch.manual_seed(0)
    d, model = 0.5, nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)).double()

    def F(x, t):
        return model(torch.cat([x, t[:, None]], 1))

    x0, eps, t = torch.randn(64, 4).double(), torch.randn(64, 4).double(), losses.edm_times(torch.randn(64).double())
    sigma = (4 * t).exp()[:, None]
    c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
    c_in, c_noise, x = 1 / (sigma**2 + d**2).sqrt(), sigma.log()[:, 0] / 4, x0 + sigma * eps
    D = c_skip * x + c_out * F(c_in * x, c_noise)
    published = ((sigma**2 + d**2) / (sigma * d) ** 2 * (D - x0) ** 2).mean(1)
    ours = losses.diffusion(F, "edm", EDM(), x0, t, eps)
    # diffusion compares in float32
    torch.testing.assert_close(ours, published, atol=1e-6, rtol=1e-5)
    wanted, found = (torch.autograd.grad(loss.mean(), model.parameters()) for loss in (published, ours))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("kind, schedule, t", [
    ("edm", EDM(), 0.3), ("eps", EDM(), -0.2), ("v", EDM(), 0.1), ("flow", Flow(), 300.0), ("flow", SD, 400),
    ("edm", SD, 400), ("eps", Flow(), 700.0)])
def test_the_net_is_trained_on_what_the_denoiser_will_feed_it(kind, schedule, t):
    """And a net that answers the loss's target is split into the true x0 and eps."""
    x0, eps, seen = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), []
    alpha, sigma = schedule(t)

    def model(x, t):
        seen.append((x, float(torch.as_tensor(t).flatten()[0])))
        return torch.zeros_like(x)

    losses.diffusion(model, kind, schedule, x0, torch.tensor([t, t]), eps)
    denoiser(model, kind)(alpha * x0 + sigma * eps, Level(t, alpha, sigma))
    torch.testing.assert_close(seen[0], seen[1])
    k = moved(kind, alpha, sigma)
    perfect = target(kind, x0, eps, k * alpha, k * sigma)
    torch.testing.assert_close(losses.diffusion(lambda x, t: perfect, kind, schedule, x0, torch.tensor([t, t]), eps),
                               torch.zeros(2))
    found = denoiser(lambda x, t: perfect, kind)(alpha * x0 + sigma * eps, Level(t, alpha, sigma))
    torch.testing.assert_close(tuple(found), (x0, eps), atol=1e-4, rtol=1e-4)


def test_a_net_trained_with_the_edm_loss_draws_its_data():
    """A Gaussian of mean 1 and standard deviation ½ in each coordinate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def F(x, t):
        return model(torch.cat([x, torch.as_tensor(t).float().expand(len(x))[:, None]], 1))

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(800):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 800, 2e-3, warmup=20)
        x0, t = 1 + 0.5 * torch.randn(256, 2), losses.edm_times(torch.randn(256))
        loss = losses.diffusion(F, "edm", EDM(), x0, t, torch.randn(256, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    grid = Grid([*(Level(math.log(u) / 4, 1.0, u) for u in karras(30, 20.0, 0.01)), Level(0.0, 1.0, 0.0)], True)
    with torch.inference_mode():
        *_, last = ddim(denoiser(F, "edm"), grid.start(torch.randn(4000, 2)), grid)
    torch.testing.assert_close(last.x.mean(0), torch.ones(2), atol=0.1, rtol=0.0)
    torch.testing.assert_close(last.x.std(0), torch.full((2,), 0.5), atol=0.06, rtol=0.0)


@pytest.mark.quick
def test_kl_term_equals_torch_distributions():
    mean, logvar, x = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.zeros(2, 3, 6, 6)
    truth = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()),
                                              torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(losses.vae(x, x, mean, logvar, kl=1.0), truth)


@pytest.mark.quick
def test_contrastive_loss_is_low_for_matches_and_high_for_a_shuffle():
    v, scale = torch.eye(8), torch.tensor(3.0)
    assert losses.contrastive(v, v, scale) < 0.1 < 1.0 < losses.contrastive(v, v.roll(1, 0), scale)


PAIR = Mixture(torch.tensor([0.4, 0.6]).double(), torch.tensor([[-1.0, 0.3], [0.8, -0.2]]).double(), 0.2)
LEAST = 0.002


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heights(us):
    return [Level(0.0, 1.0, u) for u in us]


def test_the_consistency_loss_is_zero_for_the_exact_function_and_for_no_denoiser():
    """With the teacher's steps; they are so short that theirs is the only error."""
    truth, denoise = exact.consistency(PAIR, LEAST), exact.denoiser(PAIR)
    for far, near in ((2.0, 1.98), (0.5, 0.495), (0.1, 0.099)):
        now, nxt = heights((far, near))
        x = torch.tensor([[-1.0, 0.3], [0.8, -0.2]]).double().repeat(20, 1) + now.sigma * normal(40, 2)
        pred = losses.chord(denoise, x, now, nxt)
        torch.testing.assert_close(pred.x0 + now.sigma * pred.eps, x)
        found = losses.consistency(truth, pred, now, nxt)
        assert found.max() < 2e-4 and losses.consistency(denoise, pred, now, nxt).mean() > 20 * found.mean()


def test_consistency_training_has_the_same_gradient_as_distillation_in_the_mean():
    """E[eps | x] is the teacher's: with the squared distance and close levels the gradients agree (arXiv 2303.01469,
    theorem 2), here of a function that is linear in its parameters."""
    now, nxt = heights((0.7, 0.699))
    which = torch.multinomial(PAIR.weights, 400_000, replacement=True, generator=torch.Generator().manual_seed(1))
    x0 = PAIR.means[which] + PAIR.std * normal(400_000, 2, seed=2)
    data = Pred(x0, normal(400_000, 2, seed=3))
    x = data.x0 + now.sigma * data.eps
    weight = torch.eye(2).double().requires_grad_()

    def f(x, level):
        return Pred((x / (1 + level.sigma)).tanh() @ weight, x)

    def gradient(pred):
        squared = losses.consistency(f, pred, now, nxt) ** 2
        return torch.autograd.grad(squared.mean() / (2 * (now.sigma - nxt.sigma)), weight)[0]

    taught = gradient(exact.denoiser(PAIR)(x, now))
    torch.testing.assert_close(gradient(data), taught, atol=0.01, rtol=0.02)
    assert taught.abs().max() > 0.05


def test_without_the_boundary_a_function_that_is_always_zero_is_as_consistent():
    """And with it, it is not: at the last level f is x, which the levels before have to agree with."""
    zero = torch.zeros(1, 2).double()
    net = lambda x, t: 0 * x  # noqa: E731
    pred, total = Pred(normal(100, 2), normal(100, 2, seed=1)), {}
    for name, f in (("broken", lambda x, level: Pred(zero + net(x, 0), x)), ("whole", consistent(net, LEAST))):
        total[name] = sum(losses.consistency(f, pred, *heights(pair)).mean()
                          for pair in ((80.0, 40.0), (1.0, 0.5), (0.1, LEAST)))
    assert total["broken"] == 0 and total["whole"] > 0.3


def test_the_goal_of_the_consistency_loss_has_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    f = lambda x, level: Pred(weight * x, x)  # noqa: E731
    pred, (now, nxt) = Pred(torch.zeros(1, 1), torch.ones(1, 1)), heights((2.0, 1.0))
    found = torch.autograd.grad(losses.consistency(f, pred, now, nxt).sum(), weight)[0]
    assert found == 2                                                     # of |2w − 1|; with the goal's it would be 1
    assert losses.consistency(f, pred, now, nxt, goal=lambda x, level: Pred(2 * x, x)) == 0


def test_levels_may_differ_from_row_to_row():
    f = consistent(lambda x, t: torch.sin(x), LEAST)
    pred = Pred(normal(3, 2), normal(3, 2, seed=1))
    far, near = torch.tensor([[5.0], [1.0], [0.1]]).double(), torch.tensor([[4.0], [0.9], [0.05]]).double()
    rows = losses.consistency(f, pred, Level(0.0, 1.0, far), Level(0.0, 1.0, near), c=0.03)
    single = [losses.consistency(f, Pred(*(part[i:i + 1] for part in pred)), *heights((far[i].item(), near[i].item())),
                                 c=0.03) for i in range(3)]
    torch.testing.assert_close(rows, torch.cat(single))


def test_pseudo_huber_is_between_square_and_distance():
    a = torch.tensor([[3e-5, 4e-5], [300.0, 400.0]]).double()
    small, large = losses.pseudo_huber(a, torch.zeros_like(a), 0.03)
    assert small == pytest.approx(2.5e-9 / 0.06, rel=1e-4) and large == pytest.approx(500 - 0.03, rel=1e-6)


def test_the_latent_consistency_loss_is_that_of_the_published_script():
    """diffusers' train_lcm_distill_sd_wds.py, in its own order, with guidance in the teacher's step."""
    torch.manual_seed(0)
    student, teacher, alone = (nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)).double() for _ in range(3))

    def told(model):
        return lambda x, t: model(torch.cat([x, t[:, None] / 1000], 1))

    x0, eps, w = normal(6, 4), normal(6, 4, seed=1), 6.5
    start = torch.tensor([19, 39, 259, 499, 759, 999])
    end = (start - 20).clamp(min=0)
    alphas, sigmas = SD.alpha_bar.double().sqrt(), (1 - SD.alpha_bar.double()).sqrt()
    a, s, a1, s1 = alphas[start, None], sigmas[start, None], alphas[end, None], sigmas[end, None]
    x = a * x0 + s * eps

    def answer(x, t, a, s):
        scaled = 10 * t[:, None].double()
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return c_skip * x + c_out * (x - s * told(student)(x, t)) / a

    with torch.no_grad():
        given, without = told(teacher)(x, start), told(alone)(x, start)
        c, u = ((x - s * e) / a for e in (given, without))
        guided_x0, guided_eps = c + w * (c - u), given + w * (given - without)
        goal = answer(a1 * guided_x0 + s1 * guided_eps, end, a1, s1)
    truth = (((answer(x, start, a, s) - goal) ** 2 + 1e-6).sqrt() - 1e-3).mean(1)

    def guided(x, t):
        given, without = told(teacher)(x, t), told(alone)(x, t)
        return without + (w + 1) * (given - without)

    exactly = Discrete(SD.alpha_bar.double())
    found = losses.lcm(told(student), guided, "eps", exactly, x0, start, eps)
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)        # nets answer in float32
    wanted, got = (torch.autograd.grad(each.mean(), student.parameters()) for each in (truth, found))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_reflow_makes_paths_straight_and_no_longer():
    """Of two clusters and noise on a line: the field of pairs that met by chance bends; that of reflowed pairs, learned
    by a net, leads to nearly the same places on straighter ways (arXiv 2209.03003, theorems 3.5 and 3.7)."""
    from minidiff.grid import flow as straight

    line = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.1)
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    pair = losses.reflow_pairs(exact.denoiser(line), z, straight(200))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    model = lambda x, t: net(torch.cat([x, torch.as_tensor(t).float().expand(len(x))[:, None] / 1000], 1))  # noqa: E731
    for _ in range(600):
        rows = torch.randint(4000, (256,))
        loss = losses.diffusion(model, "flow", Flow(), pair.x0[rows], 1000 * torch.rand(256), z[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ways = {}
    with torch.no_grad():
        for name, denoise in (("before", exact.denoiser(line)), ("after", denoiser(model, "flow"))):
            ways[name] = list(ddim(denoise, z, straight(50)))
            ways[name, 1] = list(ddim(denoise, z, straight(1)))[-1].x
    bent = {name: straightness(ways[name]).mean() for name in ("before", "after")}
    assert bent["after"] < bent["before"] / 5
    for name in ("before", "after"):
        ways[name, "error"] = (ways[name, 1] - ways[name][-1].x).square().mean()
    assert ways["after", "error"] < ways["before", "error"] / 5
    cost = [(way[-1].x - z).square().mean() for way in (ways["before"], ways["after"])]
    chance = (pair.x0[torch.randperm(4000)] - z).square().mean()
    assert cost[1] < 1.05 * cost[0] < chance
