"""Weights laid out once per run for the CPU's matrix kernels (oneDNN), instead of anew in every call of a layer.

On small maps a convolution spends as long on reordering its weights as on multiplying, and a plain matrix product
leaves the widest vector instructions of some processors unused. On large maps neither matters, and the plain layers are
as fast or faster: 1.00 to 0.84 of the packed ones' time for convolutions of 32×32 positions and more on AVX2, and 0.88
of it for Stable Diffusion's whole U-Net on AMX. So a layer is packed by the size of what it is given.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nets.attention import Pointwise

POSITIONS = 1024  # of all maps of a batch, above which a layer stays plain: 2 maps of 16×16 gain, of 32×32 they lose
LARGEST = 2**20   # numbers in a weight; a net with a larger one stays plain, see `packed`
SMALLEST = 2**22  # products in a linear layer; below, calling the packed kernel costs more than it gains
OPS = ("_convolution_pointwise", "_linear_pointwise", "_reorder_convolution_weight", "_reorder_linear_weight")


@contextmanager
def packed(net: nn.Module) -> Iterator[None]:
    """Inside, the convolutions and linear layers of a float32 net on a CPU are faster, but have no gradients.

    The parameters stay as they are, and must not change until the end. For other devices and dtypes, or in a torch
    without oneDNN, nothing happens. Nor in a net with a weight of more than LARGEST numbers: that would be kept twice,
    and as packed layers return channels-last maps, plain convolutions would copy their weights in every call: it cost
    Stable Diffusion's U-Net 5 % on AVX2. The output is the same to rounding: tests/test_packed.py.

    >>> net, x = nn.Conv2d(4, 8, 3, padding=1), torch.ones(1, 4, 8, 8)
    >>> with torch.inference_mode(), packed(net):
    ...     y = net(x)
    >>> torch.allclose(y, net(x), atol=1e-5)
    True
    """
    layers = [m for m in net.modules() if type(m) in FAST and "forward" not in vars(m)] if available(net) else []
    if any(layer.weight.numel() > LARGEST for layer in layers):
        layers = []
    for layer in layers:
        layer.forward = FAST[type(layer)](layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def available(net: nn.Module) -> bool:
    """Whether all parameters are float32 on a CPU, without autocast, in a torch that has oneDNN's packed layers."""
    plain = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in net.parameters())
    plain = plain and not torch.is_autocast_enabled("cpu")
    return plain and torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in OPS)


def _conv(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    ops, weights = torch.ops.mkldnn, {}
    place = (layer.padding, layer.stride, layer.dilation, layer.groups)

    def forward(x: Tensor) -> Tensor:
        if len(x) * x[0, 0].numel() > POSITIONS:
            return type(layer).forward(layer, x)
        if x.shape not in weights:
            weights[x.shape] = ops._reorder_convolution_weight(layer.weight, *place, x.shape)
        return ops._convolution_pointwise(x, weights[x.shape], layer.bias, *place, "none", [], "")

    return forward


def _linear(layer: nn.Linear | Pointwise) -> Callable[[Tensor], Tensor]:
    ops, weights, weight = torch.ops.mkldnn, {}, layer.weight.flatten(1)

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows > POSITIONS or rows * weight.numel() < SMALLEST:
            return F.linear(x, weight, layer.bias)
        if rows not in weights:
            weights[rows] = ops._reorder_linear_weight(weight, rows)
        return ops._linear_pointwise(x, weights[rows], layer.bias, "none", [], "")

    return forward


FAST = {nn.Conv2d: _conv, nn.Linear: _linear, Pointwise: _linear}
