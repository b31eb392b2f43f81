"""Trainings stopped at random moments by Ctrl-C, SIGTERM and kill -9: all must end in the bits of one that was not.

    python tests/benchmarks/kills.py -n 50

Each run takes 800 steps of the toy network of the tests with a checkpoint every tenth of a second, is hit once, and
resumed. Prints for each signal how many weights and logs were equal. Exit code 1 if any was not.
"""
import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.toy import fit  # noqa: E402


def train(out: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = open(os.devnull, "w")
    tqdm.set_lock(threading.RLock())                                     # not the one that a killed run still holds
    with suppress(KeyboardInterrupt):
        fit(out, 800, save_every=0.1, resume=any(out.glob("train/toy/step-*")))


def start(out: Path) -> multiprocessing.Process:
    """A run in a process of its own, forked from this one: without the seconds that importing torch takes."""
    process = multiprocessing.get_context("fork").Process(target=train, args=[out])
    process.start()
    return process


def result(out: Path) -> tuple:
    """The weights as bytes, and the log without its times."""
    rows = [json.loads(line) for line in (out / "logs/toy.jsonl").read_text().splitlines()]
    logged = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return (out / "train/toy/step-0000800/ema.safetensors").read_bytes(), logged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=50, help="runs for each signal")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), 0
    torch.set_num_threads(1)                                             # a process with threads must not be forked
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        began = time.monotonic()
        start(whole).join()
        took, want = time.monotonic() - began, result(whole)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            hit = equal = 0
            for i in tqdm(range(args.n), number.name):
                out = Path(folder) / f"{number.name}-{i}"
                run = start(out)
                while not (out / "logs/toy.jsonl").is_file() and run.is_alive():
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.5 * took))
                hit += run.is_alive()
                with suppress(ProcessLookupError):                       # it was faster
                    os.kill(run.pid, number)
                run.join()
                while not (out / "train/toy/step-0000800/manifest.json").is_file():
                    start(out).join()
                equal += result(out) == want
            failed += args.n - equal
            print(f"{number.name}: {hit} of {args.n} were hit at work; {equal} of {args.n} equal, weights and log")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
