"""Files that mean harm, or are merely broken: a corpus made on the fly, each with the call that opens it."""
import copy
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from minidiff.data.files import metadata
from minidiff.io.embeddings import load_embedding
from minidiff.io.images import open_image
from minidiff.io.info import describe
from minidiff.io.lora import load_lora
from minidiff.io.tokenizer import load_tokenizer
from minidiff.io.weights import load_state
from minidiff.nets.clip import CLIPText
from minidiff.nets.unet import UNet
from minidiff.nets.vae import VAE
from minidiff.sd.pipeline import StableDiffusion

Case = tuple[str, Path, Callable[[], object]]  # name, the file, what opens it
DEEP = "[" * 10**5
VALUES = [10**9, -1, 0, 2.5, 1e30, 10**40, True, None, "9", "\x1b[31m", [], [[1]], [10**7], {}, {"a": 1}, "x" * 10**5]


class Trap:
    """Leaves a file behind if a pickle is ever run."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def corpus(folder: Path, model: Path, trap: Path) -> Iterator[Case]:
    """Every case, its file made when it is asked for.

    Args:
        folder: an empty one. model: a small whole model in diffusers' layout. trap: what appears if a file's code runs.
    """
    yield from pictures(folder / "pictures")
    yield from weights(folder / "weights", trap)
    yield from loras(folder / "loras", model)
    yield from configs(folder / "configs", model)
    yield from tokenizers(folder / "tokenizers", model)
    yield from lists(folder / "lists")


def pictures(folder: Path) -> Iterator[Case]:
    folder.mkdir(parents=True)
    good = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(good, "PNG")
    whole = good.getvalue()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int, color: int = 2, data: bytes = b"") -> bytes:
        head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
        return whole[:8] + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")

    files = {"post.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print quit\n", "empty.png": b"",
             "row.png": png(1, 89_000_000), "column.png": png(89_000_000, 1), "square.png": png(2**31 - 1, 2**31 - 1),
             "none.png": png(0, 5), "much.png": png(9_000, 9_000, data=b"\0" * 10**6), "odd.png": png(5, 5, color=77),
             "half.png": whole[:len(whole) // 2], "page.png": b"<!doctype html><html>", "text.png": b"P5 9 9 255\n",
             "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "zip.png": b"PK\x03\x04" + bytes(99),
             "icns.png": b"icns" + bytes(99), "psd.png": b"8BPS\0\1" + bytes(99), "fits.png": b"SIMPLE  =" + bytes(99),
             "\x1b[31mred.png": b"no picture"}
    files |= {f"flip-{i}.png": whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:] for i in range(8, len(whole), 3)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        yield f"picture {name}", folder / name, lambda path=folder / name: open_image(path)
    for name, kind in (("a.gif", "GIF"), ("a.bmp", "BMP"), ("a.tif", "TIFF"), ("a.webp", "WEBP"), ("a.jpg", "JPEG")):
        good = io.BytesIO()
        Image.new("RGB", (40, 30), "red").save(good, kind)
        for share in (0.1, 0.5, 0.9):
            path = folder / f"{share}-{name}"
            path.write_bytes(good.getvalue()[:int(share * len(good.getvalue()))])
            yield f"picture {path.name}", path, lambda path=path: open_image(path)


def weights(folder: Path, trap: Path) -> Iterator[Case]:
    folder.mkdir(parents=True)
    one = torch.ones(2, 3)
    itself: dict = {}
    itself["state_dict"] = itself
    ring: list = []
    ring.append(ring)
    deep: dict = {"a": one}
    for _ in range(300):
        deep = {"model": deep}
    objects = {
        "itself": itself, "ring": {"state_dict": ring}, "deep": deep, "trap": {"a": one, "b": Trap(trap)},
        "trap-alone": Trap(trap), "sparse": {"a": one.to_sparse()}, "meta": {"a": torch.ones(9, device="meta")},
        "nested": {"a": torch.nested.nested_tensor([one[0], one[0, :2]])}, "names": {1: one, ("a",): one},
        "stride": {"a": torch.ones(1).expand(10**5, 10**6)}, "complex": {"a": one.cfloat()}, "int": {"a": one.int()},
        "quantised": {"a": torch.quantize_per_tensor(one, 0.1, 0, torch.qint8)}, "list": [one, one], "text": "hello",
        "float8": {"a": one.to(torch.float8_e4m3fn)}, "nan": {"a": one * torch.nan}, "none": {}, "number": 5,
        "words": {"string_to_param": {"*": torch.ones(1).expand(10**5, 10**6)}},
        "words-int": {"string_to_param": {"*": one.int()}}, "words-none": {"string_to_param": {}},
        "words-trap": {"string_to_param": {"*": Trap(trap)}, "name": "\x1b[2J"}, "empty-name": {"": one},
        "control": {"\x1b]0;title\x07": one}}
    for name, value in objects.items():
        for old in (False, True):
            path = folder / f"{name}-{'old' if old else 'zip'}.pt"
            try:
                torch.save(value, path, _use_new_zipfile_serialization=not old)
            except (RuntimeError, NotImplementedError):                  # the old format lacks some kinds of tensors
                continue
            for call in (describe, load_state, load_embedding, StableDiffusion.from_pretrained, VAE.from_pretrained):
                yield f"weights {path.name} {call.__qualname__}", path, lambda path=path, call=call: call(path)
    torch.save({"a": one}, folder / "good.pt")
    raw = (folder / "good.pt").read_bytes()
    packed = zipfile.ZipFile(folder / "packed.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(folder / "good.pt") as good, packed as to:
        for each in good.infolist():
            data = good.read(each)
            to.writestr(each.filename, data + bytes(10**9 if each.filename.endswith("data.pkl") else 0))
    memo = pickle.PROTO + b"\x02" + b"N" + b"r" + struct.pack("<I", 300_000_000) + b"."
    header = {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}
    many = {f"a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}

    def safe(head: object, size: int | None = None) -> bytes:
        text = head if isinstance(head, bytes) else json.dumps(head).encode()
        return struct.pack("<Q", len(text) if size is None else size) + text + bytes(8)

    files = {"memo.pt": memo, "memo.ckpt": memo, "huge.safetensors": safe(header), "many.safetensors": safe(many),
             "deep.safetensors": safe(DEEP.encode()), "long.safetensors": safe(b"{}", 2**62), "no.safetensors": b"",
             "list.safetensors": safe([]), "minus.safetensors": safe({"a": {"dtype": "F32", "shape": [-1],
                                                                              "data_offsets": [0, 4]}}),
             "over.safetensors": safe({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                                       "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
             "kind.safetensors": safe({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}),
             "notes.safetensors": safe({"__metadata__": {"lora_adapter_metadata": DEEP}}),
             "text.ckpt": b"hello", "pickle.ckpt": pickle.dumps(Trap(trap)),
             "loop.pt": b"\x80\x02" + b"(" * 10**6 + b"."}
    files |= {f"flip-{i}.pt": raw[:i] + bytes([raw[i] ^ 255]) + raw[i + 1:] for i in range(0, len(raw), 17)}
    files |= {f"cut-{i}.pt": raw[:i] for i in range(1, len(raw), 211)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name in [*files, "packed.pt"]:
        for call in (describe, load_state):
            yield f"weights {name} {call.__qualname__}", folder / name, lambda path=folder / name, call=call: call(path)


def loras(folder: Path, model: Path) -> Iterator[Case]:
    folder.mkdir(parents=True)
    pipe = StableDiffusion.from_pretrained(model, device="cpu")
    parts = {"unet": pipe.unet, "text_encoder": pipe.text.encoders[0]}
    name = "unet.conv_out"
    out, *inner = pipe.unet.conv_out.weight.shape
    pair = {f"{name}.lora_A.weight": torch.ones(2, *inner), f"{name}.lora_B.weight": torch.ones(out, 2, 1, 1)}
    patterns = [{"([a-z0-9_.]+)+!": 2}, {"(": 2}, [1], {"conv_out": [1]}]
    settings = [*[{"unet.alpha_pattern": pattern} for pattern in patterns], {"unet.lora_alpha": "x"},
                {"unet.lora_alpha": 1e400}, {"unet.lora_alpha": True}, {"unet.use_dora": True}, {"unet.peft_type": 5},
                {"unet.use_rslora": "no"}]
    for i, notes in enumerate([*map(json.dumps, settings), DEEP, "5", "[", "nan", "\x1b[31m"]):
        save_file(pair, folder / f"{i}.safetensors", {"lora_adapter_metadata": notes})
        yield f"lora {i}", folder / f"{i}.safetensors", lambda path=folder / f"{i}.safetensors": load_lora(path, parts)
    states = [{f"{name}.lora_A.weight": torch.ones(2, 3)}, {k: v * torch.inf for k, v in pair.items()}, {"lora": pair[
        f"{name}.lora_A.weight"]}, {k: v[..., 0] for k, v in pair.items()}, {**pair, f"{name}.alpha": torch.ones(5)}]
    for i, state in enumerate(states, 100):
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{i}.safetensors")
        yield f"lora {i}", folder / f"{i}.safetensors", lambda path=folder / f"{i}.safetensors": load_lora(path, parts)


def configs(folder: Path, model: Path) -> Iterator[Case]:
    """Each entry of each config with each odd value, and what is no config at all."""
    nets = {"unet": UNet, "vae": VAE, "text_encoder": CLIPText, "scheduler": None, "": None}
    for part, net in nets.items():
        name = {"scheduler": "scheduler_config.json", "": "model_index.json"}.get(part, "config.json")
        home = folder / (part or "whole")
        shutil.copytree(model / part if net else model, home)
        file = home / name if net or not part else home / part / name
        call = net.from_pretrained if net else StableDiffusion.from_pretrained
        true = json.loads(file.read_text())
        more = {"num_class_embeds": 1, "time_cond_proj_dim": 1, "trained_betas": None, "original_inference_steps": 1,
                "addition_embed_type": None, "force_upcast": True, "architectures": [], "solver_order": 1}
        odd = [{**copy.deepcopy(true), key: value} for key in {**true, **more} for value in VALUES]
        texts = [*map(json.dumps, odd), "", DEEP, "[]", "5", "null", '{"a": NaN}', '{"\\ud800": 1}', "\x1b[2J"]
        for i, text in enumerate(texts):
            file.write_text(text)
            yield f"config {part} {i} {text[-60:]}", file, lambda home=home, call=call: call(home)
            if part in ("unet", "") and i % 7 == 0:
                yield f"config {part} {i} info", file, lambda home=home: describe(home)
        file.write_text(json.dumps(true))


def tokenizers(folder: Path, model: Path) -> Iterator[Case]:
    home = folder / "tokenizer"
    shutil.copytree(model / "tokenizer", home)
    good = {path.name: path.read_text() for path in home.iterdir()}
    blow = {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 9}, "model": {
            "vocab": json.loads(good["vocab.json"]), "merges": []},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}}
    odd = {"vocab.json": ["", "[]", DEEP, '{"a": -1}', '{"a": 1e30}', '{"a": "b"}', '{"a": 4294967296}', '{"": 0}'],
           "merges.txt": ["a", "a b c", "x y\n" * 10, "\x1b[31m b", "a b\n" * 10**5],
           "special_tokens_map.json": ["5", DEEP, '{"pad_token": 5}', '{"eos_token": "\\u001b[2J"}'],
           "tokenizer_config.json": ["null", '{"model_max_length": 5}', '{"added_tokens_decoder": {"x": 1}}',
                                     '{"added_tokens_decoder": {"999999999": {"content": "b"}}}',
                                     '{"padding_side": "left"}', '{"additional_special_tokens": [5]}'],
           "added_tokens.json": ['{"a": -5}', "[]", '{"a": 1e99}', '{"": 600}'],
           "tokenizer.json": [json.dumps(blow), DEEP]}
    for name, texts in odd.items():
        for i, text in enumerate(texts):
            (home / name).write_text(text)
            if name == "tokenizer.json":
                (home / "vocab.json").unlink(missing_ok=True)
            yield f"tokenizer {name} {i}", home / name, lambda: load_tokenizer(home).encode("a" * 99 + "!").ids
            (home / name).unlink()
            for file, content in good.items():
                (home / file).write_text(content)


def lists(folder: Path) -> Iterator[Case]:
    folder.mkdir(parents=True)
    texts = ["", "{", DEEP, "5", '{"file_name": 5, "text": "a"}', '{"file_name": "../a.png", "text": "a"}',
             '{"file_name": "/etc/passwd", "text": "a"}', '{"file_name": "a.png", "text": "\\ud800"}',
             '{"file_name": "a\\u0000.png", "text": "a"}', '{"file_name": "\\u001b[2J.png", "text": "a"}', "\udcff"]
    for i, text in enumerate(texts):
        (folder / "metadata.jsonl").write_bytes(text.encode(errors="surrogateescape"))
        yield f"list {i}", folder / "metadata.jsonl", lambda: metadata(folder, 8)


