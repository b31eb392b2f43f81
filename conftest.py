"""How tests, doctests and notebooks run: one thread a process, or as many as OMP_NUM_THREADS says; no download.

Results then do not depend on the machine's cores, and parallel workers do not fight for them.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is first imported, and inherited by subprocesses
os.environ["HF_HUB_OFFLINE"] = "1"
