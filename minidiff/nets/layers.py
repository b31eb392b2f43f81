"""What all networks share: loading and saving, and the layers of Stable Diffusion's U-Net and VAE.

Attribute names are parameter names, and these are diffusers' (`time_emb_proj`, `conv_shortcut` …).
Maps are (B, C, H, W), tokens (B, N, C), the embedding of time and other vectors `emb` (B, E).
"""

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from minidiff.io import checkpoint
from minidiff.io.plain_text import read_json
from minidiff.io.weight_file import read_notes
from minidiff.io.weights import State, load_state, load_strict, save_state
from minidiff.io.write import write_atomic
from minidiff.nets.config import Config


class Net(nn.Module):
    """A network with a config, which can be read from a folder and written to one.

    Class attributes of a subclass: `Config`; `stem`, the weight file's name without its ending; and `part`, what the
    network is called in a whole model.
    """

    Config: ClassVar[type[Config]]
    stem: ClassVar[str] = "diffusion_pytorch_model"
    part: ClassVar[str] = ""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @classmethod
    def build(cls, config: Config) -> Self:
        """The network of a config, freshly initialized."""
        return cls(config)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, variant: str | None = None, config: str | Path | None = None,
                        device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Load a network, strictly, ready for inference.

        Args:
            source: a folder in diffusers' (transformers') layout, with `config.json` and weights; or a single file, of
                this network alone or of a whole model, in CompVis' naming or in diffusers'.
            variant: in a folder, the tag of the weight file, such as "fp16".
            config: for a file, the family that its numbers cannot tell, or a folder, see `minidiff.io.checkpoint`.
            device: where to; None: CPU.
            dtype: of the parameters; None: float32, whatever the file has.

        Raises:
            FileNotFoundError, ValueError: see `minidiff.io.weights`.

        >>> import tempfile; from minidiff.nets.vae import VAE, VAEConfig
        >>> tmp = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        >>> VAE(VAEConfig(block_out_channels=(8,), norm_num_groups=4)).save_pretrained(tmp.name)
        >>> VAE.from_pretrained(tmp.name).config.block_out_channels
        (8,)
        """
        if not Path(source).exists():
            raise FileNotFoundError(f"there is no {source}; give the folder of a {cls.__name__}"
                                    + ", or its file" * bool(cls.part))
        if not (cls.part and Path(source).is_file()):
            values = read_json(Path(source) / "config.json")
            return cls.from_state(values, load_state(source, cls.stem, variant), source, device=device, dtype=dtype)
        state = load_state(source)
        values = checkpoint.values(cls.part, config, state, source, read_notes(source))
        return cls.from_state(values, checkpoint.part(state, cls.part)[0], source, device=device, dtype=dtype)

    @classmethod
    def from_state(cls, values: dict[str, Any], state: State, source: str | Path, *,
                   device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Load a network from a parsed `config.json` and tensors by their names in a file, see `from_pretrained`.

        Raises:
            ValueError: a config, tensors or a dtype that do not fit.
        """
        if not (dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {dtype!r}; it must be a torch.dtype of real numbers, such as torch.float16")
        try:
            with torch.device("meta"), Blank(), _no_more_than(2 * len(state) + 1000):
                net = cls.build(cls.Config.from_dict(values))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        load_strict(net, net.renamed(state), source)
        return net.to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and safetensors weights that diffusers (transformers) loads.

        Args:
            folder: is made if need be; files of the same name are replaced, each all at once.
            dtype: of the numbers in the file; None: that of the parameters.
        """
        save_state({k: v.to(dtype) if dtype else v for k, v in self.state_dict().items()},
                   Path(folder) / f"{self.stem}.safetensors")
        write_atomic(Path(folder) / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def renamed(self, state: State) -> State:
        """The state with this network's names, where published files use others."""
        return state


@contextmanager
def _no_more_than(n: int) -> Iterator[None]:
    """ValueError as soon as a network gets more parameters: its config asks for far more than its file can hold."""
    made = itertools.count(1)

    def count(*_: object) -> None:
        if next(made) > n:
            raise ValueError(f"the config asks for more than {n:,} tensors, far more than the weight file holds")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


class Blank(TorchFunctionMode):
    """Parameters are left as they are: on the meta device torch's `normal_` would import its compiler, for a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def sinusoid(t: Tensor, dim: int, *, flip: bool = True, shift: float = 0.0) -> Tensor:
    """Sinusoidal embedding of a number (Vaswani et al., 1706.03762 §3.5; DDPM's variant).

        f_j = 10000^(−j/(dim/2 − shift)),  j = 0 … dim/2 − 1;  [cos(t·f), sin(t·f)]

    Args:
        t: (B,), any numbers; computed in float32.
        dim: even.
        flip: cosines first (Stable Diffusion); False: sines first.
        shift: 0 in Stable Diffusion, 1 in DDPM.

    Returns:
        (B, dim) float32.

    >>> sinusoid(torch.tensor([0.0]), 4)
    tensor([[1., 1., 0., 0.]])
    """
    half = dim // 2
    # multiplied first, divided then: at large t another order is another number
    f = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift))
    angle = t.float()[:, None] * f                                       # (B, dim/2)
    parts = (angle.cos(), angle.sin()) if flip else (angle.sin(), angle.cos())
    return torch.cat(parts, dim=-1)


class Embedding(nn.Module):
    """Linear, SiLU, Linear on a vector; with `cond`, a second vector is added in first (LCM's guidance weight).

    >>> Embedding(4, 16)(sinusoid(torch.tensor([500.0]), 4)).shape
    torch.Size([1, 16])
    """

    def __init__(self, inputs: int, emb: int, cond: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, emb)
        self.linear_2 = nn.Linear(emb, emb)
        if cond:
            self.cond_proj = nn.Linear(cond, inputs, bias=False)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """x (B,in), cond (B,cond) or None, to (B,out)."""
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Residual block (DDPM, 2006.11239 appendix B): x + conv(SiLU(GN(conv(SiLU(GN(x))) + proj(emb)))).

    Args:
        ch, out: channels in and out; a 1×1 convolution carries the shortcut where they differ.
        emb: width of the time embedding, None in the VAE. `forward` takes SiLU(emb), computed once for all blocks.

    >>> ResBlock(8, 12, emb=16, groups=4, eps=1e-5)(torch.ones(1, 8, 4, 4), torch.ones(1, 16)).shape
    torch.Size([1, 12, 4, 4])
    """

    def __init__(self, ch: int, out: int, emb: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, ch, eps)
        self.conv1 = nn.Conv2d(ch, out, 3, padding=1)
        if emb:
            self.time_emb_proj = nn.Linear(emb, out)
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(ch, out, 1) if ch != out else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x (B,in,H,W), emb (B,E) or None, to (B,out,H,W)."""
        h = self.conv1(silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def silu(x: Tensor) -> Tensor:
    """x·sigmoid(x), in place where no gradient is taken: for fresh tensors, such as a norm's output.

    >>> silu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.2689,  0.0000,  0.7311])
    """
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Downsample(nn.Module):
    """3×3 convolution with stride 2. Padding 1 all around (U-Net), or right and bottom only (VAE, padding 0).

    >>> Downsample(2)(torch.ones(1, 2, 8, 6)).shape
    torch.Size([1, 2, 4, 3])
    """

    def __init__(self, ch: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2, padding=padding)
        self.pad = not padding

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) to (B,C,H/2,W/2): odd sides are rounded up, with the VAE's padding down."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, twofold or to a given size, then a 3×3 convolution.

    >>> Upsample(2)(torch.ones(1, 2, 4, 3)).shape
    torch.Size([1, 2, 8, 6])
    """

    def __init__(self, ch: int):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B,C,H,W) to (B,C,2H,2W), or to (B,C,*size)."""
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, scale_factor=2.0))
        return self.conv(F.interpolate(x, size=size))
