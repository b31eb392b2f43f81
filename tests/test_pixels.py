"""The shipped pixel model: it draws what looks like drawings to the reader."""
import torch
import torch.nn.functional as F

from minidiff.data import scenes
from minidiff.io.weights import weights_dir
from minidiff.measure.metrics import kernel_distance
from minidiff.nets.reader import Reader
from minidiff.nets.unet import UNet
from minidiff.prediction import denoiser
from minidiff.samplers import ddim
from minidiff.schedule import SD
from minidiff.sd.scheduler import preset
from minidiff.train import losses


def drawings(n, seed):
    return scenes.render(n, 16, seed=seed, second=0.0)[0].float() / 127.5 - 1


@torch.inference_mode()
def test_its_samples_are_nearer_to_drawings_than_slightly_blurred_drawings_are():
    net, reader = UNet.from_pretrained(weights_dir() / "pixels"), Reader.from_pretrained(weights_dir() / "reader")
    z = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    *_, last = ddim(denoiser(net, "eps"), z, preset("sd-ddpm", 25))
    real, blurred = drawings(400, 5), F.avg_pool2d(drawings(96, 6), 3, 1, 1, count_include_pad=False)
    own, baseline = (kernel_distance(reader.features(real), reader.features(x)) for x in (last.x.clamp(-1, 1), blurred))
    assert own < baseline / 4


@torch.inference_mode()
def test_its_loss_on_fresh_drawings_is_that_of_its_training():
    net, x0, g = UNet.from_pretrained(weights_dir() / "pixels"), drawings(500, 7), torch.Generator().manual_seed(0)
    t, eps = torch.randint(1000, (500,), generator=g), torch.randn(x0.shape, generator=g)
    each = losses.diffusion(net, "eps", SD, x0, t, eps)
    assert each.mean() < 0.03  # the log ends at 0.021; a net that answers 0 has 1
