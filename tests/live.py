"""How much memory a computation holds at its peak, seen on the meta device: no numbers, no time, any size."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are still alive; `peak` is the most there were at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch imports its compiler, for seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in before | self.known.keys():
                size = t.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                self.known[key] = size
                weakref.finalize(t.untyped_storage(), self.freed, key)
        return out

    def freed(self, key):
        self.now -= self.known.pop(key, 0)
