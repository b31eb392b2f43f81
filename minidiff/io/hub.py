"""Where a model is: a path, what ships with the package, or a repository of the Hugging Face Hub in the local cache."""
from __future__ import annotations

import itertools
import re
from pathlib import Path

from minidiff.io.weights import weights_dir

SHIPPED = "mini-sd"
MODELS = (SHIPPED, "mini-sd-lcm")  # whole models that ship; the second draws in few steps
ADAPTERS = ("cat", "watercolour", "lcm")  # LoRAs, of the first also a textual inversion, that ship beside it
# of a repository: configs, tokenizers, and weights in the folders of the parts, but for those that nothing here reads
ENDINGS = (".safetensors", ".bin")
WANTED = ["*.json", "*.txt"]
UNWANTED = ["safety_checker/*", "image_encoder/*", "feature_extractor/*", "vae_1_0/*", "vae_encoder/*", "vae_decoder/*",
            "*onnx*", "*openvino*", "*.msgpack"]


def find(source: str | Path, variant: str | None = None, download: bool = False) -> Path:
    """The path of a model.

    Args:
        source: "mini-sd" or "mini-sd-lcm"; a folder or file; or a repository "owner/name", which is looked for in the
            cache where huggingface_hub puts what it fetches (HF_HUB_CACHE, HF_HOME).
        variant: of the weights to fetch, for the parts that have it.
        download: fetch what the cache lacks of a repository; without it the network is never used.

    Raises:
        FileNotFoundError: nothing is there, or it cannot be fetched; the message says where was looked.

    >>> find("mini-sd").name
    'mini-sd'
    """
    if source in MODELS:
        return weights_dir() / source
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.suffix in (".safetensors", ".ckpt"):
        raise FileNotFoundError(f"there is no model {source}; give a folder, a file, or one of {', '.join(MODELS)}, "
                                "which ship here")
    return _fetch(str(source), variant) if download else _cached(str(source))


def find_adapter(source: str | Path) -> Path:
    """The folder of a LoRA or textual inversion that ships for mini-sd, if `source` is its name, else the path itself.

    >>> find_adapter("cat").name, find_adapter("my/cat.safetensors").name
    ('cat', 'cat.safetensors')
    """
    path = Path(source)
    return weights_dir() / path.name if str(source) in ADAPTERS and not path.exists() else path


def _cached(name: str) -> Path:
    """The snapshot of a repository that is there already: the one that its `main` names."""
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no folder {name}, and no such repository in the cache "
                                f"{constants.HF_HUB_CACHE}; download=True would fetch it from "
                                "huggingface.co") from error


def _fetch(name: str, variant: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    tags, served = dict.fromkeys([f".{variant}" if variant else "", ""]), set()
    # a part without the variant is fetched without it, one without safetensors as .bin: so they are read
    for tag, ending in itertools.product(tags, ENDINGS):
        unwanted = UNWANTED + [f"{part}/*{end}" for part in served for end in ENDINGS]
        unwanted += [] if tag else ["*.fp16.*", "*.fp16-*", "*.non_ema.*", "*.non_ema-*"]
        weights = [f"*/*{tag}{ending}", f"*/*{tag}-*{ending}"]
        try:
            folder = Path(snapshot_download(name, allow_patterns=WANTED + weights, ignore_patterns=unwanted))
        except OSError as error:
            raise FileNotFoundError(f"{name} cannot be fetched from huggingface.co, and is not in the cache "
                                    f"{constants.HF_HUB_CACHE}: "
                                    f"{str(error).strip().splitlines()[0]}") from error
        weights = re.compile(rf"[^.]+{re.escape(tag)}(-[^.]*)?{re.escape(ending)}")
        served |= {path.parent.name for path in folder.glob("*/*") if weights.fullmatch(path.name)}
        networks = {path.parent.name for path in folder.glob("*/config.json")}
        if served and networks <= served:
            break
    return folder
