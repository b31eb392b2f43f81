"""One training loop for every recipe, on accelerate: resumable bit for bit, averaged, logged, with pictures."""
from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.device import default_device, find_device
from minidiff.io.weights import load_state, save_state
from minidiff.sd.settings import SEEDS
from minidiff.train.ema import EMA
from minidiff.values import number, whole


@dataclass(frozen=True)
class Run:
    """Where and how long to train; the options of `python -m minidiff train`.

    Args:
        out: the folder of the model; the run's own files go to out/train/NAME, its log to out/logs/NAME.jsonl.
        steps: optimizer steps in all (also when resumed).
        seconds: stop earlier, after so much time in this process; the checkpoint continues with `resume`.
        device: None means cuda, else mps, else cpu.
        threads: torch threads; None leaves them alone.
        resume: continue from the newest whole checkpoint.
        save_every: seconds between checkpoints (and sample pictures).
        seed: of weights, data order and noise, below 2³².
        made: what else the result depends on, by name: numbers, or digests under names such as "another vocabulary";
            checkpoints keep it, and a run resumes only with the same.

    Raises:
        ValueError: a value out of range, or a device that is not here.

    >>> Run(Path("runs/mini-sd"), steps=0)
    Traceback (most recent call last):
    ValueError: steps is 0; training takes at least 1 step, and a whole number of them
    """

    out: Path
    steps: int
    seconds: float | None = None
    device: str | None = None
    threads: int | None = None
    resume: bool = False
    save_every: float = 120.0
    seed: int = 0
    made: dict[str, int | str] = field(default_factory=dict)

    def __post_init__(self):
        text = f"steps is {self.steps}; training takes at least 1 step, and a whole number of them"
        object.__setattr__(self, "steps", whole("steps", self.steps, 1, 10**9, text))
        object.__setattr__(self, "seed", whole("seed", self.seed, 0, SEEDS - 1))
        if self.seconds is not None and not number("seconds", self.seconds) > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be positive")
        if self.threads is not None:
            object.__setattr__(self, "threads", whole("threads", self.threads, 1, 4096))
        if self.device is not None:
            find_device(self.device)


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on these numbers alone, so that step n draws the same noise in every run.

    >>> torch.equal(torch.randn(2, generator=generator(0, 7)), torch.randn(2, generator=generator(0, 7)))
    True
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def digest(*folders: Path) -> str:
    """sha256 of the names and contents of the files in folders."""
    whole = hashlib.sha256()
    for file in sorted(file for folder in folders for file in folder.glob("*") if file.is_file()):
        whole.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def batch_indices(n: int, batch: int, step: int, seed: int = 0) -> Tensor:
    """Which of n examples step number `step` sees: every epoch is a fresh permutation, the odd rest is dropped.

    Args:
        n: number of examples, at least `batch`.

    Returns:
        (batch,) int64.

    Raises:
        ValueError: there are fewer examples than that.

    >>> seen = torch.cat([batch_indices(6, 2, step) for step in range(3)]); seen.sort().values.tolist()
    [0, 1, 2, 3, 4, 5]
    """
    if n < batch:
        raise ValueError(f"{n} examples are fewer than one batch of {batch}; training needs at least one batch")
    epoch, place = divmod(step, n // batch)
    return torch.randperm(n, generator=generator(seed, epoch))[place * batch:(place + 1) * batch]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200, decay: float = 0.3) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero over the last share `decay` of the steps.

    >>> [learning_rate(step, 1000, 1.0) for step in (99, 500, 850)]
    [0.5, 1.0, 0.5]
    """
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def precision(device: str) -> str:
    """"bf16" where it is fast (CUDA, CPUs with AVX512-BF16), else "no": on AVX2 it is 130 times slower."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # torch has no public name for it
    return "bf16" if device == "cuda" or (device == "cpu" and native()) else "no"


class Objective(nn.Module):
    """The loss as a module around the net, so that accelerate's autocast and data parallelism cover all of it."""

    def __init__(self, net: nn.Module, loss: Callable):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, step: int, share: slice) -> dict[str, Tensor]:
        """What the loss says of this share of a step's batch."""
        return self.loss(self.net, step, share)


def train(name: str, net: nn.Module, loss: Callable[[nn.Module, int, slice], dict[str, Tensor]], run: Run, *,
          batch: int, lr: float, ema: float | Callable[[int], float] = 0.999, weight_decay: float = 0.01,
          clip: float = 1.0, sample: Callable | None = None) -> nn.Module:
    """Minimise loss(net, step, share)["loss"] with AdamW and return the averaged net.

    Everything random is a function of (seed, step), so net, average, optimizer and step number are the whole state:
    a killed run that resumes ends in the same bits (test_resume_is_bit_identical) for the same number of threads.

    Args:
        name: of the recipe: names the log and the run's folder.
        loss: called with the net, the step number and this process's slice of the batch; returns a dictionary of
            scalars, of which "loss" is minimised and all are logged.
        batch: examples per step over all processes. lr: peak learning rate. clip: largest gradient norm.
        ema: decay of the average, or a function updates so far -> decay, as those of `minidiff.train.ema`.
        sample: averaged net -> PIL picture, drawn at every checkpoint.

    Raises:
        ValueError: what `check` and `resume` say; the loss became NaN or infinite.
        KeyboardInterrupt: passed on after a checkpoint is written.
    """
    from accelerate import Accelerator
    from tqdm import tqdm

    if run.threads:
        torch.set_num_threads(run.threads)
    device = run.device or default_device()
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision(device))
    work, log_path = Path(run.out) / "train" / name, Path(run.out) / "logs" / f"{name}.jsonl"
    check(name, run)
    average = EMA(net.to(accelerator.device), ema)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    step, spent = resume(work, net, average, optimizer) if run.resume else (0, 0.0)
    main = accelerator.is_main_process
    if main:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        keep = log_path.read_text(errors="replace").splitlines() if run.resume and log_path.is_file() else []
        log_path.write_text("".join(f"{line}\n" for line in keep if _logged(line) <= step))  # later steps run again
    objective, optimizer = accelerator.prepare(Objective(net, loss), optimizer)
    size = batch // accelerator.num_processes
    share = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    began = saved = time.monotonic()
    sums: dict[str, Tensor] = {}
    summed = 0
    bar = tqdm(total=run.steps, initial=step, desc=name, unit="step", disable=not main, mininterval=0.5)

    def checkpoint() -> None:
        if main:
            save_checkpoint(work, net, average, optimizer, step, spent + time.monotonic() - began, run.made)
            if sample:
                (work / "samples").mkdir(exist_ok=True)
                sample(average.net).save(work / "samples" / f"{step:07d}.png")

    try:
        while step < run.steps and (run.seconds is None or time.monotonic() - began < run.seconds):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run.steps, lr)
            values = objective(step, share)
            accelerator.backward(values["loss"])
            norm = accelerator.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(net)
            step, summed = step + 1, summed + 1
            for key, value in {**values, "grad_norm": norm}.items():
                sums[key] = sums.get(key, 0.0) + value.detach()    # tensors: to read one is to wait for the device
            bar.update()
            if step % 50 == 0 or step == run.steps:
                means = accelerator.reduce({key: value / summed for key, value in sums.items()}, "mean")
                row = {key: round(float(value), 6) for key, value in means.items()}
                sums, summed = {}, 0
                if not all(map(torch.isfinite, map(torch.tensor, row.values()))):  # before a checkpoint is made of it
                    raise ValueError(f"{name}: the loss is not finite at step {step} ({row}); "
                                     "another learning rate or other data may help, the same steps again do not")
                if main:
                    seconds = round(spent + time.monotonic() - began, 1)
                    with log_path.open("a") as log:
                        log.write(json.dumps({"step": step, "images": step * batch, "seconds": seconds, **row}) + "\n")
                    bar.set_postfix(loss=f"{row['loss']:.4f}")
                if time.monotonic() - saved > run.save_every:
                    checkpoint()
                    saved = time.monotonic()
        checkpoint()
    except KeyboardInterrupt:
        checkpoint()
        raise KeyboardInterrupt(f"{name} stopped at step {step}; --resume continues it") from None
    finally:
        bar.close()
    return average.net


def _logged(line: str) -> float:
    """The step of a line of a log; of a line that was never finished, infinity."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def check(name: str, run: Run) -> None:
    """ValueError unless a run may begin, or, if it is to resume, go on as what it was.

    Raises:
        ValueError: a run would be overwritten; there is nothing to resume; or it was made with other settings or data.
    """
    work = Path(run.out) / "train" / name
    if not run.resume:
        if any(work.glob("step-*")):
            raise ValueError(f"{work} holds a run already; --resume continues it, another --out keeps it")
        return
    _, manifest = next(_manifests(work))
    for what, then in manifest.get("made", {}).items():
        if (now := run.made.get(what, then)) != then:
            made = what if isinstance(then, str) else f"{what} {then}, not {now}"
            raise ValueError(f"the run was made with {made}: {work} resumes only with the options and files that it "
                             "was made with; for others give another --out")


def _manifests(work: Path) -> Iterator[tuple[Path, dict]]:
    """The checkpoints whose manifest can be read, the newest first.

    Raises:
        ValueError: once there are no more: so who finds what he looks for never sees it.
    """
    folders = sorted(work.glob("step-*"), reverse=True)
    for folder in folders:
        try:
            yield folder, json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError):
            continue
    raise ValueError(f"nothing to resume: no whole checkpoint in {work}; "
                     + ("they are damaged: give another --out" if folders else "start without --resume"))


def save_checkpoint(work: Path, net: nn.Module, average: EMA, optimizer: torch.optim.Optimizer, step: int,
                    seconds: float, made: dict[str, int | str]) -> Path:
    """Write work/step-N with net, average, optimizer and, last, a manifest of their sha256; keep the newest two.

    The folder is written under a temporary name and renamed once it is whole, so a kill at any moment leaves the
    checkpoint before it in force.
    """
    work.mkdir(parents=True, exist_ok=True)
    final, part = work / f"step-{step:07d}", work / "unfinished"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_state(net.state_dict(), part / "net.safetensors")
    save_state(average.net.state_dict(), part / "ema.safetensors")
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(part.iterdir())}
    manifest = {"step": step, "updates": average.updates, "seconds": seconds, "made": made, "sha256": files}
    with (part / "manifest.json").open("w") as file:
        file.write(json.dumps(manifest, indent=1))
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in sorted(work.glob("step-*"))[:-2]:
        shutil.rmtree(old)
    return final


def resume(work: Path, net: nn.Module, average: EMA, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load the newest checkpoint whose sha256 sums agree. Returns (step, seconds trained so far).

    Raises:
        ValueError: there is none, or it is of a network of another shape.
    """
    for folder, manifest in _manifests(work):                # which ends with an error
        try:
            intact = all(hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
                         for file, digest in manifest["sha256"].items())
        except (OSError, KeyError):
            continue
        if intact:
            state, wanted = load_state(folder / "net.safetensors"), net.state_dict()
            then, now = ({(key, tensor.shape) for key, tensor in each.items()} for each in (state, wanted))
            if changed := sorted(then ^ now):
                raise ValueError(f"the run was made with a network of another shape, in {changed[0][0]}: {work} "
                                 "resumes only with the options that it was made with, such as --size and --init")
            net.load_state_dict(state)  # copied in place: the optimizer holds these
            average.net.load_state_dict(load_state(folder / "ema.safetensors"))
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            average.updates = manifest["updates"]
            return manifest["step"], manifest["seconds"]
