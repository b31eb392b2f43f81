"""The training loop: resumed = uninterrupted, checkpoints that survive a kill, averages, losses, data order."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff.grid import Grid, karras
from minidiff.io.weights import load_state
from minidiff.prediction import denoiser, moved, target
from minidiff.samplers import ddim
from minidiff.schedule import EDM, SD, Flow, Level
from minidiff.train import losses, trainer
from minidiff.train.ema import EMA, constant, power, warmed
from minidiff.train.trainer import Run, batch_indices, generator, learning_rate, train

ROOT = Path(__file__).resolve().parents[1]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss(model, step, share):
    x = torch.randn(16, 4, generator=generator(0, step))[share]
    return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}


def fit(out, steps=120, objective=loss, ema=0.999, **options):
    return train("toy", net(), objective, Run(out, steps, device="cpu", **options), batch=16, lr=1e-2, ema=ema)


def weights(module):
    return torch.cat([p.flatten() for p in module.parameters()])


def test_training_beats_the_trivial_predictor(tmp_path):
    average = fit(tmp_path, 600)
    x = torch.randn(256, 4, generator=generator(1))
    assert (average(x) - x.sum(1, keepdim=True)).square().mean() < 0.3 * x.sum(1).var()


@pytest.mark.parametrize("ema", [0.999, power(0.1)], ids=["warmed", "power"])
def test_resume_is_bit_identical(tmp_path, ema):
    whole = weights(fit(tmp_path / "whole", ema=ema))

    def killed(model, step, share):
        if step == 75:
            raise KeyboardInterrupt
        return loss(model, step, share)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", objective=killed, ema=ema)
    assert torch.equal(weights(fit(tmp_path / "cut", ema=ema, resume=True)), whole)


def test_resume_skips_a_damaged_checkpoint(tmp_path):
    whole = weights(fit(tmp_path / "whole"))
    fit(tmp_path / "cut", 120, seconds=1e-9)  # stops before the first step, at step 0

    def killed(model, step, share):
        if step == 60:
            raise KeyboardInterrupt
        return loss(model, step, share)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", objective=killed, resume=True)
    newest = sorted((tmp_path / "cut/train/toy").glob("step-*"))[-1]
    data = bytearray((newest / "net.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "net.safetensors").write_bytes(bytes(data))
    assert torch.equal(weights(fit(tmp_path / "cut", resume=True)), whole)


SCRIPT = """
import sys
from pathlib import Path
from minidiff.train import trainer
from tests.test_train import fit
trainer.precision = lambda device: "no"
fit(Path(sys.argv[1]), 60)
"""


def test_two_processes_take_the_steps_of_one(tmp_path, monkeypatch):
    """Each process has half of every batch; the gradients are averaged. In float32, also where bf16 is native."""
    monkeypatch.setattr(trainer, "precision", lambda device: "no")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run([*command, str(tmp_path / "script.py"), str(tmp_path / "two")],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    fit(tmp_path / "one", 60)
    one, two = (load_state(tmp_path / name / "train/toy/step-0000060/ema.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0.0)  # half a batch alone is 1e-2 away
    logs = [json.loads((tmp_path / name / "logs/toy.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)  # the mean over the processes


def test_resume_without_a_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        fit(tmp_path, resume=True)


def test_a_run_of_which_no_checkpoint_is_whole_says_so(tmp_path):
    fit(tmp_path, 10)
    for name in ("net.safetensors", "manifest.json"):
        (tmp_path / "train/toy/step-0000010" / name).write_bytes(b"")
        with pytest.raises(ValueError, match="no whole checkpoint in .*toy; they are damaged: give another --out"):
            fit(tmp_path, 20, resume=True)


def test_a_network_of_another_shape_does_not_resume(tmp_path):
    fit(tmp_path, 10)
    other = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 1))
    with pytest.raises(ValueError, match="made with a network of another shape, in 0.bias: .* --size and --init"):
        train("toy", other, loss, Run(tmp_path, 20, device="cpu", resume=True), batch=16, lr=1e-2)


def test_what_a_run_is_made_with_is_kept_and_compared(tmp_path):
    fit(tmp_path, 10, made={"size": 16, "another vocabulary": "abc"})
    for made, said in (({"size": 32}, "size 16, not 32"), ({"another vocabulary": "x"}, "another vocabulary")):
        with pytest.raises(ValueError, match=f"the run was made with {said}: .*toy resumes only with"):
            fit(tmp_path, 20, resume=True, made=made)
    fit(tmp_path, 20, resume=True, made={"size": 16, "another vocabulary": "abc"})


def test_a_run_is_never_overwritten(tmp_path):
    fit(tmp_path, 10)
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        fit(tmp_path, 10)


def test_log_has_one_line_per_fifty_steps_also_after_a_resume(tmp_path):
    fit(tmp_path, 120, seconds=1e-9)
    fit(tmp_path, 120, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "logs/toy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 120]
    assert rows[-1]["images"] == 120 * 16 and rows[-1]["loss"] < rows[0]["loss"]


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="not finite at step 50"):
        fit(tmp_path, objective=lambda model, step, share: {"loss": model(torch.ones(1, 4)).sum() * math.inf})


@pytest.mark.parametrize("options, sentence", [({"steps": 0}, "at least 1 step"),
                                               ({"steps": 5, "seconds": 0.0}, "must be positive")])
def test_run_rejects(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Run(tmp_path, **options)


@pytest.mark.quick
def test_every_epoch_sees_every_example_once_in_a_new_order():
    epochs = [torch.cat([batch_indices(12, 4, step) for step in range(3 * e, 3 * e + 3)]) for e in range(2)]
    assert all(torch.equal(epoch.sort().values, torch.arange(12)) for epoch in epochs)
    assert not torch.equal(*epochs)
    with pytest.raises(ValueError, match="fewer than one batch"):
        batch_indices(3, 4, 0)


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


@pytest.mark.quick
def test_learning_rate_warms_up_holds_and_decays_to_zero():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 0.01 and max(rates) == 2.0 == rates[500] and rates[-1] < 0.01


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
