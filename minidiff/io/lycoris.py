"""What a LoRA file can do to a weight: low rank, and the relatives that kohya's trainer, LyCORIS and PEFT write.

Each kind has `delta(weight)`, what it adds to a weight at full strength, float32. Formulas: LoRA (Hu et al. 2021,
arXiv 2106.09685), LoHa (FedPara, 2108.06098), LoKr (2212.10650), IA3 (2205.05638), DoRA (2402.09353); names of the
parts are those of LyCORIS' files (2309.14859).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Change(NamedTuple):
    """LoRA: factor·up·down, with factor = alpha/rank; of a convolution also with a core between (Tucker).

        Δ[o,i,p] = factor·Σ_ab up[o,a]·mid[a,b,p]·down[b,i]
    """

    down: Tensor                 # (rank, inputs), of a convolution (rank, inputs, k, k); with mid (rank, inputs, 1, 1)
    up: Tensor                   # (outputs, rank), or with (…, 1, 1)
    factor: float = 1.0
    mid: Tensor | None = None    # (rank, rank, k, k)

    def delta(self, like: Tensor) -> Tensor:
        """The change itself, float32, of the shape and on the device of `like`.

        >>> Change(torch.ones(1, 2), torch.ones(3, 1), 0.5).delta(torch.zeros(3, 2))[0]
        tensor([0.5000, 0.5000])
        """
        up, down = (_to(part, like).flatten(1) for part in (self.up, self.down))
        if self.mid is not None:
            return self.factor * torch.einsum("oa,abkl,bi->oikl", up, _to(self.mid, like), down)
        return self.factor * _shaped(up @ down, like)


class Hadamard(NamedTuple):
    """LoHa: factor·(a1·b1) ⊙ (a2·b2), each of low rank, their product up to rank²; with cores for convolutions.

    Args:
        a1, a2: (outputs, rank), with a core (rank, outputs). b1, b2: (rank, inputs·k·k), with a core (rank, inputs).
        core1, core2: (rank, rank, k, k), or None.
    """

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    factor: float = 1.0
    core1: Tensor | None = None
    core2: Tensor | None = None

    def delta(self, like: Tensor) -> Tensor:
        """As of `Change`.

        >>> Hadamard(*[torch.full((2, 2), 2.0)] * 4).delta(torch.zeros(2, 2))[0]
        tensor([64., 64.])
        """
        one, two = (_product(_to(a, like), _to(b, like), core)
                    for a, b, core in ((self.a1, self.b1, self.core1), (self.a2, self.b2, self.core2)))
        return self.factor * _shaped(one * two, like)


class Kronecker(NamedTuple):
    """LoKr: factor·kron(one, two); each is whole, or a product of two, `two` of a convolution also with a core.

    Args:
        one: its tensors: (w,) or (a, b). two: (w,), (a, b) or (a, b, core).
    """

    one: tuple[Tensor, ...]
    two: tuple[Tensor, ...]
    factor: float = 1.0

    def delta(self, like: Tensor) -> Tensor:
        """As of `Change`.

        >>> Kronecker((torch.eye(2),), (torch.ones(1, 3),)).delta(torch.zeros(2, 6))
        tensor([[1., 1., 1., 0., 0., 0.],
                [0., 0., 0., 1., 1., 1.]])
        """
        one, two = (_whole(parts, like) for parts in (self.one, self.two))
        if two.ndim == 4:
            one = one[..., None, None]
        return self.factor * _shaped(torch.kron(one, two.contiguous()), like)


class Scaled(NamedTuple):
    """IA3: the weight times a number for each of its outputs, or inputs."""

    weight: Tensor
    on_input: bool = False

    def delta(self, like: Tensor) -> Tensor:
        """As of `Change`.

        >>> Scaled(torch.tensor([1.0, 2.0])).delta(torch.ones(2, 3))[:, 0]
        tensor([1., 2.])
        """
        side = 1 if self.on_input else 0
        return like.float() * _to(self.weight, like).reshape([-1 if d == side else 1 for d in range(like.ndim)])


class Added(NamedTuple):
    """A difference of its own: of a weight (diff), a bias (diff_b), a norm's weight or bias (w_norm, b_norm)."""

    diff: Tensor

    def delta(self, like: Tensor) -> Tensor:
        """As of `Change`."""
        return _shaped(_to(self.diff, like), like)


class Rescaled(NamedTuple):
    """DoRA: the direction from another change, the length from a number for each output (or input):

        W' = magnitude · (W + Δ) / ‖W + Δ‖
    """

    change: Change | Hadamard | Kronecker
    magnitude: Tensor            # (out,), (out, 1[, 1, 1]), or as older files have it (1, in[, 1, 1])

    def delta(self, like: Tensor) -> Tensor:
        """As of `Change`.

        >>> Rescaled(Change(torch.zeros(1, 2), torch.zeros(2, 1)), torch.tensor([10.0, 5.0])).delta(
        ...     torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        tensor([[3., 4.],
                [0., 0.]])
        """
        whole, axis = like.float() + self.change.delta(like), 0 if len(self.magnitude) == len(like) else 1
        lengths = whole.transpose(0, axis).flatten(1).norm(dim=1)
        ratio = _to(self.magnitude, like).flatten() / (lengths + torch.finfo(like.dtype).eps)
        return whole * ratio.reshape([-1 if d == axis else 1 for d in range(like.ndim)]) - like.float()


DIFFERENCES = {"diff", "diff_b", "w_norm", "b_norm"}
Kind = Change | Hadamard | Kronecker | Scaled | Added | Rescaled


def fits(change: Kind, weight: Tensor) -> bool:
    """Whether it can be added to a weight of this shape; nothing is computed.

    >>> fits(Change(torch.ones(1, 2), torch.ones(3, 1)), torch.zeros(3, 2)), fits(Added(torch.ones(3)), torch.zeros(2))
    (True, False)
    """
    try:
        return change.delta(torch.empty_like(weight, device="meta")).shape == weight.shape
    except (RuntimeError, IndexError, ValueError):
        return False


def tensors(change: Kind) -> list[Tensor]:
    """All of its tensors.

    >>> len(tensors(Rescaled(Change(torch.ones(1, 2), torch.ones(3, 1)), torch.ones(3))))
    3
    """
    found = []
    for part in change:
        found += [part] if isinstance(part, Tensor) else tensors(part) if isinstance(part, tuple) else []
    return found


def strength(change: Kind) -> float:
    """Its factor, alpha/rank; 1 of a kind that has none.

    >>> half = Change(torch.ones(1, 2), torch.ones(3, 1), 0.5)
    >>> strength(Rescaled(half, torch.ones(3))), strength(Added(torch.ones(1)))
    (0.5, 1.0)
    """
    return strength(change.change) if isinstance(change, Rescaled) else getattr(change, "factor", 1.0)


def build(parts: dict[str, Tensor], factor: Callable[[int], float]) -> Kind | None:
    """The change that these parts of a file make, or None if one of them is missing.

    Args:
        parts: by the names of LyCORIS' files, "down", "up" and "mid" for those of a LoRA, without alpha.
        factor: rank -> alpha/rank; of 0, where nothing is of low rank, usually 1.

    >>> build({"hada_w1_a": torch.ones(2, 1)}, lambda rank: 1.0) is None
    True
    """
    rest = dict(parts)
    magnitude = rest.pop("dora_scale", None)
    change = None
    for make in (_lora, _loha, _lokr, _ia3, _diff):
        if (change := make(rest, factor)) is not None:
            break
    if change is None or magnitude is None:
        return change if magnitude is None else None
    return Rescaled(change, magnitude) if isinstance(change, Change | Hadamard | Kronecker) else None


def _lora(parts: dict[str, Tensor], factor: Callable[[int], float]) -> Change | None:
    if not {"down", "up"} <= parts.keys() <= {"down", "up", "mid"}:
        return None
    return Change(parts["down"], parts["up"], factor(len(parts["down"])), parts.get("mid"))


def _loha(parts: dict[str, Tensor], factor: Callable[[int], float]) -> Hadamard | None:
    need = [f"hada_w{i}_{half}" for i in (1, 2) for half in "ab"]
    if not {*need} <= parts.keys() <= {*need, "hada_t1", "hada_t2"} or ("hada_t1" in parts) != ("hada_t2" in parts):
        return None
    return Hadamard(*(parts[name] for name in need), factor(len(parts["hada_w1_b"])), parts.get("hada_t1"),
                    parts.get("hada_t2"))


def _lokr(parts: dict[str, Tensor], factor: Callable[[int], float]) -> Kronecker | None:
    names = {f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    if not parts.keys() <= names:
        return None
    halves = []
    for i in "12":
        whole, pair = f"lokr_w{i}", (f"lokr_w{i}_a", f"lokr_w{i}_b")
        core = ("lokr_t2",) if i == "2" and "lokr_t2" in parts else ()
        if whole in parts and not core and not {*pair} & parts.keys():
            halves.append((parts[whole],))
        elif {*pair, *core} <= parts.keys() and whole not in parts:
            halves.append(tuple(parts[name] for name in (*pair, *core)))
        else:
            return None
    ranks = [len(half[1]) for half in halves if len(half) > 1]
    return Kronecker(*halves, factor(ranks[0] if ranks else 0))


def _ia3(parts: dict[str, Tensor], factor: Callable[[int], float]) -> Scaled | None:
    if parts.keys() != {"weight", "on_input"} or parts["on_input"].numel() != 1:
        return None
    return Scaled(parts["weight"], bool(parts["on_input"]))


def _diff(parts: dict[str, Tensor], factor: Callable[[int], float]) -> Added | None:
    return Added(*parts.values()) if len(parts) == 1 and parts.keys() <= DIFFERENCES else None


def _to(part: Tensor, like: Tensor) -> Tensor:
    return part.to(like.device, torch.float32)


def _shaped(delta: Tensor, like: Tensor) -> Tensor:
    """With the sides of the inputs and of the kernel apart, those of the outputs as they are."""
    return delta.reshape(len(delta), *like.shape[1:])


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return a @ b
    return torch.einsum("ijkl,jr,ip->prkl", core.to(a), b, a)


def _whole(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    a, *rest = (_to(part, like) for part in parts)
    return _product(a, *rest, *[None] * (2 - len(rest))) if rest else a
