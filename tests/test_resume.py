"""Runs that are stopped, killed or short of disk: resumed = uninterrupted, to the last bit."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff.train.ema import EMA, power
from minidiff.train.resume import alone, save_checkpoint
from minidiff.train.trainer import Run, Terminated, train
from tests.toy import fit, loss, net, weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C as a terminal's programs know it: what a shell starts with & ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(last, number=signal.SIGINT):
    """The loss, until somebody presses Ctrl-C, or whatever the signal stands for."""
    def objective(model, step, share):
        if step == last:
            signal.raise_signal(number)
        return loss(model, step, share)

    return objective


def log(folder):
    rows = [json.loads(line) for line in (folder / "logs/toy.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("ema", [0.999, power(0.1)], ids=["warmed", "power"])
def test_resume_is_bit_identical(tmp_path, ema):
    whole = weights(fit(tmp_path / "whole", ema=ema))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", objective=interrupted(75), ema=ema)
    assert torch.equal(weights(fit(tmp_path / "cut", ema=ema, resume=True)), whole)


def test_resume_skips_a_damaged_checkpoint(tmp_path):
    whole = weights(fit(tmp_path / "whole"))
    fit(tmp_path / "cut", 120, seconds=1e-9)  # stops before the first step, at step 0
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", objective=interrupted(60), resume=True)
    newest = sorted((tmp_path / "cut/train/toy").glob("step-*"))[-1]
    data = bytearray((newest / "net.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "net.safetensors").write_bytes(bytes(data))
    assert torch.equal(weights(fit(tmp_path / "cut", resume=True)), whole)


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


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
@pytest.mark.parametrize("moment", ["the loss", "the average", "the optimizer"])
def test_a_step_is_made_whole_before_a_signal_stops_the_run(tmp_path, monkeypatch, number, kind, moment):
    whole, objective = weights(fit(tmp_path / "whole")), loss
    methods = {"the average": (EMA, "update"), "the optimizer": (torch.optim.AdamW, "step"), "the loss": (None, "")}
    of, name = methods[moment]
    with monkeypatch.context() as patch, pytest.raises(kind, match="toy stopped at step 64; --resume continues it"):
        if of:
            calls, method = [], getattr(of, name)
            patch.setattr(of, name, lambda *a, **k: (calls.append(0), len(calls) == 64 and signal.raise_signal(number),
                                                     method(*a, **k))[-1])
        else:
            objective = interrupted(63, number)
        fit(tmp_path / "cut", objective=objective)
    assert torch.equal(weights(fit(tmp_path / "cut", resume=True)), whole)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")             # also what a line is the mean of


def test_who_asks_twice_is_not_kept_waiting(tmp_path):
    def objective(model, step, share):
        for _ in range(2 * (step == 30)):
            signal.raise_signal(signal.SIGINT)
        return loss(model, step, share)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, objective=objective)
    assert not [*tmp_path.glob("train/toy/*")] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_not_finite_is_not_saved(tmp_path):
    def objective(model, step, share):
        return {"loss": interrupted(7)(model, step, share)["loss"] * (math.nan if step == 5 else 1)}

    with pytest.raises(ValueError, match="not finite at step 8"):
        fit(tmp_path, objective=objective)
    assert not [*tmp_path.glob("train/toy/step-*")]


@pytest.mark.parametrize("text", ["[]", "{}", "5", "[" * 10**5, '{"step": "9"}', "\udcff"])
def test_a_manifest_of_another_form_is_damaged(tmp_path, text):
    whole = weights(fit(tmp_path / "whole"))
    fit(tmp_path / "cut", seconds=1e-9)
    (tmp_path / "cut/train/toy/step-0000009").mkdir()
    (tmp_path / "cut/train/toy/step-0000009/manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert torch.equal(weights(fit(tmp_path / "cut", resume=True)), whole)


def test_a_log_that_was_cut_in_a_line_goes_on(tmp_path):
    fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", objective=interrupted(75))
    with (tmp_path / "cut/logs/toy.jsonl").open("a") as file:
        file.write('[]\n{"step": 100, "lo')
    fit(tmp_path / "cut", resume=True)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    module = net()
    state = module, EMA(module, 0.9), torch.optim.AdamW(module.parameters())
    for step in (9_999_998, 9_999_999, 10_000_000, 10_000_001):
        save_checkpoint(tmp_path, *state, {"step": step, "seconds": 0.0, "made": {}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10000000", "step-10000001"]


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    work = tmp_path / "new" / "train" / "toy"
    with alone(work):
        with pytest.raises(ValueError, match="another training is at work in .*toy; wait for it, or give another"):
            with alone(work):
                pass
    assert not [*tmp_path.iterdir()]                                    # nothing was made there
    with alone(work):
        fit(tmp_path / "new", 10)
    assert (work / "step-0000010").is_dir()


def test_what_the_bits_depend_on_is_said_when_it_changes(tmp_path):
    fit(tmp_path, 10)
    manifest = tmp_path / "train/toy/step-0000010/manifest.json"
    text = json.loads(manifest.read_text())
    text["how"] |= {"threads": 99, "precision": "fp16"}
    manifest.write_text(json.dumps(text))
    with pytest.warns(UserWarning, match=r"threads 99 \(now \d+\), precision fp16 \(now .*\): it goes on, but"):
        fit(tmp_path, 20, resume=True)


SHORT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
from minidiff import cli
from tests.toy import fit
cli.train = lambda recipe, **_: fit(sys.argv[1], int(sys.argv[2]), resume=True)
sys.exit(cli.main(["train", "toy"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
@pytest.mark.parametrize("room, file", [(2_000, "optimizer.pt"), (400, "net.safetensors"), (100, "toy.jsonl")])
def test_a_disk_that_is_full_is_one_sentence_and_costs_nothing(tmp_path, room, file):
    whole = weights(fit(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", objective=interrupted(49))
    done = subprocess.run([sys.executable, "-c", SHORT, str(tmp_path / "cut"), "120", str(room)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert file in done.stderr.splitlines()[-1] and "too large" in done.stderr
    assert not (tmp_path / "cut/train/toy/unfinished").exists()
    assert torch.equal(weights(fit(tmp_path / "cut", resume=True)), whole)
