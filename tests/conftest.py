"""One thread per process: results do not depend on the machine's cores, and parallel workers do not fight for them."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is first imported, and inherited by subprocesses
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download

import torch  # noqa: E402

torch.set_num_threads(1)
