"""What a network is made of: its modules with shapes, parameters, operations and memory, without computing anything."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """A module of a network.

    Attributes:
        name: in its parent. kind: its class. shape: of what it returns, the last of several; () of mere lists.
        parameters: numbers in it, its parts included. flops: of one call, a multiplication and an addition counting as
            two. children: its parts.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int
    children: tuple[Part, ...]


@torch.no_grad()
def anatomy(net: nn.Module, *inputs: Any, **cond: Any) -> Part:
    """The tree of a network's modules, for one call of it.

    A copy of the network on the meta device is called, where tensors have a shape but no numbers: nothing is computed,
    and 860 million parameters take no memory.

    Args:
        inputs, cond: of the call; of tensors only the shape counts.

    >>> tree = anatomy(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(1, 3, 16, 16))
    >>> tree.parameters, tree.flops == 2 * 3 * 3 * 3 * 8 * 16 * 16, tree.children[0].shape
    (224, True, (1, 8, 16, 16))
    """
    from torch.utils.flop_counter import FlopCounterMode

    net = copy.deepcopy(net, {id(t): t.to("meta") for t in (*net.parameters(), *net.buffers())})
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, out: object) -> None:
        while isinstance(out, (list, tuple)) and out:
            out = out[-1]
        if isinstance(out, Tensor):
            shapes[name] = tuple(out.shape)

    for name, module in net.named_modules():
        module.register_forward_hook(lambda module, inputs, out, name=name: note(name, out))
    inputs, cond = ([x.to("meta") if isinstance(x, Tensor) else x for x in inputs],
                    {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in cond.items()})
    with FlopCounterMode(display=False) as counter:
        net(*inputs, **cond)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    top = type(net).__name__

    def part(name: str, module: nn.Module) -> Part:
        children = [part(f"{name}.{child}" if name else child, inner) for child, inner in module.named_children()]
        called = counts.get(f"{top}.{name}" if name else top, 0)         # not so lists, and what other methods use
        flops = called if name in shapes else sum(child.flops for child in children)
        return Part(name.rpartition(".")[2] or top, type(module).__name__, shapes.get(name, ()),
                    sum(p.numel() for p in module.parameters()), flops, tuple(children))

    return part("", net)


def walk(part: Part, depth: int = 0) -> Iterator[tuple[int, Part]]:
    """Every part of a tree with its depth, from the top.

    >>> leaf = Part("0", "ReLU", (), 0, 0, ())
    >>> [(depth, each.name) for depth, each in walk(Part("net", "Sequential", (), 0, 0, (leaf,)))]
    [(0, 'net'), (1, '0')]
    """
    yield depth, part
    for child in part.children:
        yield from walk(child, depth + 1)
