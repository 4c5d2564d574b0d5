"""Every file layout in and out: tables of names, one way to load, adapters, conversion.

    python convert_weights.py SRC DST                  any checkpoint -> the layout of this project
    python convert_weights.py SRC DST --to official    -> a directory that diffusers opens
    python convert_weights.py SRC DST --to comfy       -> one file a network, for ComfyUI
    python convert_weights.py --check DIR              MD5 of a downloaded Turbo release

SRC is a directory, a name on the hub (owner/name) or one file. "Official" names are those of the
release, as diffusers' ZImagePipeline reads them. Every format takes the same way:

    for each official tensor: rows of a tensor in a file -> dequantized -> + adapters -> cast

What has to be computed is computed one tensor at a time. What has not is mapped: on a CPU a tensor
that is stored in the wanted dtype is a view of its file and takes no memory of its own. Replacing
a file (renaming another over it, as this project does) does not change a network that is loaded
from it. Writing into the file does change the network, and cutting it short ends the process.
Nothing is ever unpickled, and a file is used whole or refused.
"""

import argparse
import dataclasses
import glob
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import secrets
import shutil
import struct
import sys
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from tokenizers import Tokenizer
from tqdm import tqdm

from model import VAE, DiT, DiTConfig, TextEncoder, TextEncoderConfig, VAEConfig

try:
    import fcntl
except ImportError:           # Windows
    fcntl = None


# --- Names: which official tensor is which of ours, and of the other programs -------------------

NETWORKS = {
    "text_encoder": (TextEncoder, TextEncoderConfig),
    "dit": (DiT, DiTConfig),
    "vae": (VAE, VAEConfig),
}

# Ours -> official. Regular expressions, applied one after the other; all other names are equal.
OFFICIAL_NAMES = {
    "text_encoder": {
        r"^": "model.",
        r"self_attn\.to_([qkv])": r"self_attn.\1_proj",
        r"self_attn\.to_out": "self_attn.o_proj",
        r"self_attn\.norm_([qk])": r"self_attn.\1_norm",
        r"mlp\.w1": "mlp.gate_proj",
        r"mlp\.w2": "mlp.down_proj",
        r"mlp\.w3": "mlp.up_proj",
    },
    "dit": {
        r"^x_embedder": "all_x_embedder.2-1",                 # 2-1: patches of 2x2 pixels, 1 frame
        r"^final_layer\.modulation": "final_layer.adaLN_modulation.1",
        r"^final_layer": "all_final_layer.2-1",
        r"\.modulation": ".adaLN_modulation.0",
        r"attention\.to_out": "attention.to_out.0",
    },
    "vae": {
        r"attention\.to_out": "attention.to_out.0",
        r"mid_block\.attention": "mid_block.attentions.0",
        r"(down_blocks\.\d+)\.resample": r"\1.downsamplers.0",
        r"(up_blocks\.\d+)\.resample": r"\1.upsamplers.0",
    },
}

# Official -> ComfyUI (also GGUF and stable-diffusion.cpp). The VAE has the names of Flux's authors.
COMFY_NAMES = {
    "text_encoder": {},
    "dit": {
        r"^all_(x_embedder|final_layer)\.2-1": r"\1",
        r"attention\.to_[qkv]": "attention.qkv",              # stacked in this order
        r"attention\.to_out\.0": "attention.out",
        r"attention\.norm_([qk])": r"attention.\1_norm",
    },
    "vae": {
        r"(down|up)_blocks\.(\d+)\.resnets": r"\1.\2.block",
        r"(down|up)_blocks\.(\d+)\.\w+samplers\.0": r"\1.\2.\1sample",
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
        r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
        r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
        r"conv_shortcut": "nin_shortcut",
        r"conv_norm_out": "norm_out",
    },
}

# Official -> llama.cpp, whose GGUF files hold the text encoder.
LLAMA_NAMES = {
    r"^model\.embed_tokens": "token_embd",
    r"^model\.norm": "output_norm",
    r"^model\.layers": "blk",
    r"self_attn\.([qkv])_proj": r"attn_\1",
    r"self_attn\.([qk])_norm": r"attn_\1_norm",
    r"self_attn\.o_proj": "attn_output",
    r"input_layernorm": "attn_norm",
    r"post_attention_layernorm": "ffn_norm",
    r"mlp\.(gate|up|down)_proj": r"ffn_\1",
}

# A file of one network, or of several, is known by these names behind one of these prefixes.
SIGNATURES = {
    "dit": ("cap_embedder.1.weight",),
    "text_encoder": ("model.embed_tokens.weight", "embed_tokens.weight", "token_embd.weight"),
    "vae": ("decoder.conv_in.weight",),
}
PREFIXES = {
    "dit": ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer."),
    "text_encoder": ("", "text_encoders.qwen3_4b.transformer."),
    "vae": ("", "vae.", "first_stage_model."),
}

# The only tensors that may be left out: unused by the release, or said twice.
UNUSED = {
    "dit": ("norm_final.weight",),                            # a leftover of Lumina, often junk
    "text_encoder": ("lm_head.weight", "model.lm_head.weight", "output.weight"),
    "vae": (),
}
UNUSED_KEYS = ("scaled_fp8", "text_encoders.qwen3_4b.logit_scale")


def rename(name, table):
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def comfy_name(kind, config, official):
    """The name of an official tensor in ComfyUI's files; q, k, v have one name in common."""
    name = rename(official, COMFY_NAMES[kind])
    if kind == "vae":                                         # Flux counts the decoder's levels down
        last = len(config.block_out_channels) - 1
        name = re.sub(r"\bup\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
    return name


def expected_tensors(kind, config):
    """{official name: (our name, shape, whether it is needed)} of a network, from our module.

    Not needed are the language model's last layer and final norm. The release stores them, nobody
    runs them; they are kept on conversion.
    """
    whole = config
    if kind == "text_encoder":
        whole = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1)
    needed = build(kind, config).state_dict()
    tensors = dict(build(kind, whole).state_dict())
    if kind == "text_encoder":
        tensors["norm.weight"] = torch.empty(config.hidden_size, device="meta")
    return {rename(ours, OFFICIAL_NAMES[kind]): (ours, tuple(tensor.shape), ours in needed)
            for ours, tensor in tensors.items()}


# --- Load: the one way from a file to a network -------------------------------------------------


class Piece(NamedTuple):
    """Where an official tensor is: rows `first`, first + 1, ... of a weight in a file."""
    weight: "Weight"
    first: int
    shape: tuple
    ours: str         # our name
    needed: bool      # by our network


class Network(NamedTuple):
    """A network on disk, all names and shapes checked. None of its numbers is read yet."""
    kind: str         # "text_encoder", "dit" or "vae"
    config: object
    pieces: dict      # official name -> Piece
    path: Path
    metadata: dict    # of the file's header


def official_tensors(network, adapters=()):
    """Yields (official name, tensor), one at a time, the adapters' changes added in float32.

    A tensor in a plain format is a view of the mapped file. adapters: (file, strength) pairs.
    """
    changes = read_adapters(network, adapters)
    for name, piece in network.pieces.items():
        tensor = dequantize(piece.weight, piece.first, piece.shape)
        for change in changes.get(name, ()):
            tensor = tensor.float() + change()
        yield name, tensor


def load(kind, path, device="cpu", dtype=torch.float32, like=None, adapters=(), keep=None):
    """A network from disk, in eval mode.

    path: the folder of an official component, a directory in our layout, a file, or a Network.
    dtype: of all weights; None: the one that most of them are stored in.
    like: a folder whose config.json describes the network, for files that have none (default:
        the release's values).
    adapters: (file, strength) pairs of LoRAs and the like, merged into a DiT.
    keep: {"fp8", "int8", "int8_convrot": bind}. A linear layer stored in such a format is not
        dequantized: bind(linear, weight, scale) gets weight (out, in), scale (out, 1) float32.
        The layers of int8_convrot are rotated in groups of 256.
    Where a dtype changes, peak memory is the weights and one tensor. On a CPU nothing is copied
    where it does not; the head of this file says what that means.
    """
    network = open_network(kind, path, like)
    module = build(kind, network.config)
    kept = kept_weights(network, module, keep or {}, adapters, device)
    dtype = dtype or common_dtype(network)
    small = sum(math.prod(piece.shape) for piece in network.pieces.values()) < 500_000_000
    weights = {}
    rest = network._replace(pieces={
        name: piece for name, piece in network.pieces.items() if piece.needed and name not in kept})
    steps = tqdm(official_tensors(rest, adapters), f"loading {kind}", len(rest.pieces),
                 leave=False, delay=1)
    for name, tensor in steps:
        tensor = tensor.to(device, dtype)
        if small and not tensor.isfinite().all():
            raise UserError(f"{network.path}: {name} is not finite in {dtype}: a damaged file")
        weights[network.pieces[name].ours] = tensor
    module.load_state_dict(weights, strict=False, assign=True)    # the kept layers are there
    return module.eval()


def load_dit(path, device="cpu", dtype=torch.float32, like=None, adapters=(), keep=None):
    """The DiT of DIR/transformer, of a directory in our layout, or of a file; see `load`."""
    return load("dit", path, device, dtype, like, adapters, keep)


def load_text_encoder(path, device="cpu", dtype=torch.float32, like=None, keep=None):
    """The text encoder, likewise."""
    return load("text_encoder", path, device, dtype, like, keep=keep)


def load_vae(path, device="cpu", dtype=torch.float32, like=None):
    """The VAE, likewise."""
    return load("vae", path, device, dtype, like)


def build(kind, config):
    """An empty network on the meta device.

    Without initialization: on this device there is nothing to fill, but nn.Embedding would import
    PyTorch's compiler for it, which takes a second.
    """
    reset, nn.Embedding.reset_parameters = nn.Embedding.reset_parameters, lambda self: None
    try:
        with torch.device("meta"):
            return NETWORKS[kind][0](config)
    finally:
        nn.Embedding.reset_parameters = reset


def kept_weights(network, module, keep, adapters, device):
    """Binds the layers that `keep` wants as they are stored -> the official names of their weights.

    A layer that an adapter changes has to be dequantized.
    """
    changed = read_adapters(network, adapters) if keep else {}
    kept = set()
    for name, piece in network.pieces.items():
        bind = keep.get(stored_format(piece.weight))
        if bind and piece.needed and name not in changed and QUANTIZED.search(name):
            linear = module.get_submodule(piece.ours.removesuffix(".weight"))
            rows = piece.shape[0]
            weight = read(piece.weight.tensor, piece.first, rows)
            scale = row_scales(piece.weight, piece.first, rows)
            bind(linear, weight.to(device), scale.to(device))
            kept.add(name)
    return kept


def common_dtype(network):
    """The dtype that most numbers of a network are stored in; bfloat16 where they are quantized."""
    count = {}
    for piece in network.pieces.values():
        dtype = stored_dtype(piece.weight)
        count[dtype] = count.get(dtype, 0) + math.prod(piece.shape)
    return max(count, key=count.get)


def damaged_weights(module):
    """The names of weights that are not finite: what to blame where a network's output is not."""
    return [name for name, tensor in module.state_dict().items()
            if tensor.dtype in FLOATS and not tensor.isfinite().all()]


def open_network(kind, path, like=None):
    """Finds a network on disk and checks every name and every shape -> Network.

    UserError names what is missing, unexpected or of the wrong shape.
    """
    if isinstance(path, Network):
        return path
    path = Path(path)
    files, config = component_files(kind, path)
    tensors, metadata = open_files(files)
    parts = split_parts(tensors, path)
    if kind not in parts:
        found = " and ".join(parts) or "none of the three networks"
        raise UserError(f"{path} holds no {kind}, but {found}")
    config = config or embedded_config(kind, metadata) or config_like(kind, like)
    weights = gather_weights(parts[kind], metadata, path)
    expected = expected_tensors(kind, config)
    pieces, used = {}, set()
    for official, (ours, shape, needed) in expected.items():
        name, first = find_weight(kind, config, weights, official, ours, shape[0])
        if name in weights:
            pieces[official] = Piece(weights[name], first, shape, ours, needed)
            used.add(name)
    check_names(kind, path, expected, pieces, set(weights) - used - set(UNUSED[kind]))
    check_shapes(path, pieces)
    return Network(kind, config, pieces, path, metadata)


def find_weight(kind, config, weights, official, ours, rows):
    """What a file calls an official tensor, and the first of its rows: (name, row)."""
    comfy = comfy_name(kind, config, official)
    names = [official, ours, official.removeprefix("model."), rename(official, LLAMA_NAMES)]
    for name in names:
        if name in weights:
            return name, 0
    stacked = re.search(r"attention\.to_([qkv])", official) if kind == "dit" else None
    place = "qkv".index(stacked[1]) if stacked else 0
    if f"{comfy}.1" in weights:               # stable-diffusion.cpp: three tensors of one name
        return comfy + ("", ".1", ".2")[place], 0
    return comfy, place * rows


def check_names(kind, path, expected, pieces, unexpected):
    """UserError where tensors are missing or unexpected."""
    needed = {name for name, (_, _, needed) in expected.items() if needed}
    if set(pieces) - needed:                  # part of the unused layer is there: all should be
        needed = set(expected)
    missing = needed - set(pieces)
    if missing or unexpected:
        lists = {"missing": missing, "unexpected": unexpected}
        raise UserError(f"{path} does not hold the {kind} that its configuration describes: "
                        + "; ".join(f"{word}: {some(names)}" for word, names in lists.items()
                                    if names))


def check_shapes(path, pieces):
    """UserError where a tensor has another shape than the network, or than its pieces together."""
    rows = {}
    for piece in pieces.values():
        key = piece.weight.tensor
        rows[key] = rows.get(key, 0) + piece.shape[0]
    wrong = [f"{name} {list(piece.weight.tensor.shape)} instead of {list(piece.shape)}"
             for name, piece in pieces.items()
             if not fits(piece.weight, (rows[piece.weight.tensor], *piece.shape[1:]))]
    if wrong:
        raise UserError(f"{path} was made for another model, or is damaged; of the wrong shape: "
                        + some(wrong))


def some(names, limit=8):
    """The first of some names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(sorted(names)[:limit]) + (f" and {more} more" if more > 0 else "")


# --- Files: safetensors and GGUF, their headers read and their tensors mapped -------------------

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "F8_E8M0": torch.uint8, "BOOL": torch.bool,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# GGUF's types by number: name, numbers in a block, bytes of a block.
GGUF_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}
GGUF_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
               12: "d"}

NOT_A_MODEL = (       # how files begin that people take for a checkpoint
    (b"PK", "a zip or PyTorch pickle file, which can run code; get a .safetensors file"),
    (b"\x80", "a PyTorch pickle file, which can run code; get a .safetensors file"),
    (b"<", "a web page; download the file itself"),
    (b"version https://git-lfs", "a pointer of Git LFS; download the file itself"),
)
ADVICE = "use the bfloat16 file of the same model; sampler.py --weights fp8 halves it when loading"
REFUSED = {           # names that tell formats and models that this project does not read
    r"\.(qweight|wscales|proj_down|smooth_factor)$|attention\.to_qkv\.":
        f"is quantized for nunchaku; {ADVICE}",
    r"\.(zero_point|svd_up|svd_down)$": f"is quantized by SDNQ; {ADVICE}",
    r"\.(absmax|quant_map|SCB)$|\.quant_state\.": f"is quantized by bitsandbytes; {ADVICE}",
    r"\._(data|scale)$": f"is quantized by quanto; {ADVICE}",
    r"\.(scales|biases)$": f"is quantized for MLX; {ADVICE}",
    r"encoded_exponent|sign_mantissa": f"is compressed by DFloat11; {ADVICE}",
    r"pre_quant_scale$": f"is quantized with smoothed inputs; {ADVICE}",
    r"^control_": "is a ControlNet, which this project does not run",
    r"siglip": "is Z-Image-Omni or Z-Image-Edit, which this project does not run",
    r"t_embedder_2\.": "is TwinFlow, which this project does not run",
    r"local_decoder\.|dec_net\.": "works on pixels instead of latents; this project does not run it",
    r"clip_text_pooled_proj": "is NewBie, not Z-Image",
    r"visual\.": "is Qwen3-VL; Z-Image uses Qwen3-4B",
    r"quant_conv\.": "holds the VAE of Stable Diffusion; Z-Image uses the one of Flux",
    r"^decoder\.layers\.": "is a TAESD preview decoder; Z-Image uses the VAE of Flux",
}


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""
    file: Path
    name: str
    kind: str         # of numbers, in the file's own words: "BF16", "F8_E4M3", "Q4_K"
    shape: tuple
    start: int        # of its bytes in the file
    size: int         # number of bytes


def read(stored, first=0, rows=None):
    """Rows of a stored tensor (all: None), mapped. Of a quantized GGUF tensor: its bytes (rows, n)."""
    dtype = DTYPES.get(stored.kind, torch.uint8)
    shape = stored.shape
    if stored.kind not in DTYPES:             # blocks of numbers, along a row
        count = math.prod(shape[:-1])
        shape = (count, stored.size // max(count, 1))
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    start, size = stored.start, stored.size
    if rows is not None and shape and rows != shape[0]:
        row_size = size // shape[0]
        start, size, shape = start + first * row_size, rows * row_size, (rows, *shape[1:])
    data = map_bytes(stored.file, start, size)
    if start % dtype.itemsize:                # some writers align nothing
        data = data.clone()
    return data.view(dtype).view(shape)


def map_bytes(path, start, size):
    """Bytes of a file as a mapped uint8 tensor (size,).

    Private: writing to the tensor copies a page and leaves the file as it is. Where the system
    does not promise that much memory, the mapping is read-only, and writing ends the process.
    """
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        with open(path, "rb") as file:
            place = {"length": before + size, "offset": start - before}
            try:
                data = mmap.mmap(file.fileno(), access=mmap.ACCESS_COPY, **place)
            except OSError:
                data = mmap.mmap(file.fileno(), access=mmap.ACCESS_READ, **place)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8, count=size, offset=before)


def open_files(files):
    """The tensors of several files together -> ({name: Stored}, metadata)."""
    tensors, metadata = {}, {}
    for path in files:
        found, more = read_header(path)
        for name in tensors.keys() & found.keys():
            raise UserError(f"{name} is in both {tensors[name].file} and {path}")
        tensors.update(found)
        metadata.update(more)
    return tensors, metadata


def read_header(path):
    """The header of a safetensors or GGUF file -> ({name: Stored}, metadata)."""
    if not path.is_file():
        raise UserError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    with open(path, "rb") as file:
        start = file.read(32)
        size = file.seek(0, os.SEEK_END)
    try:
        if start[:4] == b"GGUF":
            return read_gguf_header(path, size)
        if start[8:9] == b"{":
            return read_safetensors_header(path, size)
    except (ValueError, LookupError, TypeError, RecursionError, ArithmeticError,
            struct.error) as error:
        kind = "GGUF" if start[:4] == b"GGUF" else "safetensors"
        raise UserError(f"{path} is not a complete {kind} file: {error}") from None
    for beginning, what in NOT_A_MODEL:
        if start.startswith(beginning):
            raise UserError(f"{path} is {what}")
    raise UserError(f"{path} is not a complete safetensors or GGUF file")


def read_safetensors_header(path, size):
    """Layout: length of the header (8 bytes), the header in JSON, the tensors without gaps."""
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, 100_000_000):
            raise ValueError("its header is cut short")
        header = json.loads(file.read(length), object_pairs_hook=without_duplicates)
    metadata = dict(header.pop("__metadata__", None) or {})
    tensors, end = {}, 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2 ** 48 for n in (*shape, first, last)):
            raise ValueError(f"{name} has a shape or place that is not possible")
        wanted = math.prod(shape) * DTYPES[kind].itemsize if kind in DTYPES else last - first
        if 8 + length + first != end or last - first != wanted:
            raise ValueError(f"{name} is not where its shape puts it")
        tensors[name] = Stored(path, name, kind, shape, end, wanted)
        end += wanted
    if end != size:
        raise ValueError(f"it has {size} bytes instead of {end}")
    return tensors, metadata


def without_duplicates(pairs):
    """A JSON object in which no key stands twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def read_gguf_header(path, size):
    """Layout: counts; metadata (key, type, value); tensors (name, dims, type, offset); the data."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position = 4

        def take(form):
            nonlocal position
            value, = struct.unpack_from("<" + form, data, position)
            position += struct.calcsize("<" + form)
            return value

        def text():
            length = take("Q")
            return take(f"{min(length, size)}s").decode()

        def value(kind):
            nonlocal position
            if kind == 8:
                return text()
            if kind != 9:
                return take(GGUF_VALUES[kind])
            kind, count = take("I"), take("Q")
            if kind == 8:                     # a vocabulary; every string takes 8 bytes at least
                return [text() for _ in range(min(count, size // 8 + 1))]
            position += count * struct.calcsize("<" + GGUF_VALUES[kind])
            return None

        version, tensor_count, value_count = take("I"), take("Q"), take("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        metadata = without_duplicates([(text(), value(take("I"))) for _ in range(value_count)])
        entries = [(text(), tuple(take("Q") for _ in range(min(take("I"), 8))), take("I"), take("Q"))
                   for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-position // alignment) * alignment

    tensors = {}
    for name, dims, number, offset in entries:
        if number not in GGUF_TYPES:
            raise UserError(f"{path}: {name} is of GGUF type {number}; {ADVICE}")
        kind, block, block_size = GGUF_TYPES[number]
        length = math.prod(dims) // block * block_size
        if dims and dims[0] % block or start + offset + length > size:
            raise ValueError(f"{name} reaches beyond its end")
        tensors[name] = Stored(path, name, kind, dims[::-1], start + offset, length)
    if len(tensors) < len(entries):
        raise ValueError("a name stands in it twice")
    return tensors, metadata


def split_parts(tensors, path):
    """The tensors of a file by network, without prefixes: {kind: {name: Stored}}.

    Everything has to belong to a network that is there.
    """
    refuse_known(tensors, path)
    prefixes = {}
    for kind, signatures in SIGNATURES.items():
        for prefix in PREFIXES[kind]:
            if any(prefix + signature in tensors for signature in signatures):
                prefixes[kind] = prefix
    parts = {kind: {} for kind in prefixes}
    lost = []
    for name, stored in tensors.items():
        fitting = [kind for kind, prefix in prefixes.items() if name.startswith(prefix)]
        if name.endswith(UNUSED_KEYS):
            continue
        if not fitting:
            lost.append(name)
            continue
        kind = max(fitting, key=lambda kind: len(prefixes[kind]))
        parts[kind][name.removeprefix(prefixes[kind])] = stored
    if parts and lost:
        raise UserError(f"{path} holds tensors of no known network: {some(lost)}")
    return parts


def refuse_known(tensors, path):
    """UserError for adapters and for formats and models that are known, but not read."""
    for name in tensors:
        for pattern, what in REFUSED.items():
            if re.search(pattern, name):
                raise UserError(f"{path} {what} (it holds {name})")
        if ADAPTER_KEY.search(name):
            raise UserError(f"{path} is an adapter, not a model: give it by --lora (it holds {name})")


# --- Quantized weights --------------------------------------------------------------------------


class Weight(NamedTuple):
    """A weight in a file: its tensor and, where it is quantized, its format and scales."""
    tensor: Stored
    format: str       # "plain", a format of ComfyUI, or "gguf"
    scales: dict      # "scale", "scale_2" -> Stored
    group: int        # columns that are rotated together; 0: none


# What stands beside L.weight in ComfyUI's files, old and new, and what it is here.
BESIDE_A_WEIGHT = {
    "weight_scale": "scale", "scale_weight": "scale", "weight_scale_2": "scale_2",
    "comfy_quant": "format", "input_scale": None, "scale_input": None,
}
FORMATS = {           # ComfyUI's name -> the type of the stored numbers
    "float8_e4m3fn": ("F8_E4M3",), "float8_e4m3fn_rowwise": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",), "int8_tensorwise": ("I8",), "int8_rowwise": ("I8",),
    "nvfp4": ("U8",), "mxfp8": ("F8_E4M3",),
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ROTATED = 256         # columns in a group of ComfyUI's int8 files


def gather_weights(tensors, metadata, path):
    """{name: Stored} -> {name: Weight}: each weight with what stands beside it."""
    layers = read_quantization_metadata(metadata, path)
    beside = {}
    for name, stored in tensors.items():
        layer, _, key = name.rpartition(".")
        if key in BESIDE_A_WEIGHT and f"{layer}.weight" in tensors:
            beside.setdefault(f"{layer}.weight", {})[BESIDE_A_WEIGHT[key]] = stored
    weights = {}
    for name, stored in tensors.items():
        layer, _, key = name.rpartition(".")
        if key not in BESIDE_A_WEIGHT or f"{layer}.weight" not in tensors:
            description = None
            if key == "weight":
                description = layers.get(layer, layers.get(stored.name.removesuffix(".weight")))
            weights[name] = make_weight(stored, beside.get(name, {}), description)
    return weights


def read_quantization_metadata(metadata, path):
    """{layer: format or {"format": ...}} from the header of a file, where it has that."""
    try:
        return dict(json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {}))
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: its _quantization_metadata is damaged") from None


def read_format(stored):
    """The JSON object in a tensor of bytes."""
    try:
        return dict(json.loads(bytes(read(stored).flatten().tolist())))
    except (ValueError, TypeError):
        raise UserError(f"{stored.file}: {stored.name} is not a JSON object") from None


def make_weight(stored, beside, description):
    """A Weight, after a look at whether its format is one that `dequantize` knows."""
    if "format" in beside:
        description = read_format(beside["format"])
    if isinstance(description, str):
        description = {"format": description}
    options = {**(description or {}), **(description or {}).get("params", {})}
    scales = {key: beside[key] for key in ("scale", "scale_2") if key in beside}
    name, kind = options.get("format"), stored.kind
    if name is None:
        name = "plain"
        if kind not in DTYPES:
            name = "gguf"
        elif scales:
            name = {"I8": "int8_tensorwise", "F8_E5M2": "float8_e5m2"}.get(kind, "float8_e4m3fn")
    elif kind not in FORMATS.get(name, ()):
        raise UserError(f"{stored.file}: {stored.name} is of the format {name!r} in {kind}; {ADVICE}")
    if name == "plain" and kind not in PLAIN:
        raise UserError(f"{stored.file}: {stored.name} is of type {kind} without a scale; {ADVICE}")
    group = options.get("convrot_groupsize", ROTATED) if options.get("convrot") else 0
    return Weight(stored, name, scales, group)


def dequantize(weight, first, shape):
    """Rows `first`, first + 1, ... of a weight, as a tensor of `shape`.

    A plain weight comes as it is stored, mapped; a quantized one in float32. The arithmetic and
    its order are those of ComfyUI and of gguf, bit for bit.
    """
    rows = None if math.prod(weight.tensor.shape) == math.prod(shape) else shape[0]
    numbers = read(weight.tensor, first, rows)
    if weight.format == "plain":
        return numbers.view(shape)
    if weight.format == "gguf":
        return dequantize_gguf(numbers, weight.tensor.kind).view(shape)
    if weight.format == "nvfp4":              # two numbers a byte, the high half first
        codes = torch.stack((numbers >> 4, numbers & 15), -1).flatten(-2)
        scale = tiled_scales(weight, first, codes.shape, 16, torch.float8_e4m3fn).float()
        scale = read(weight.scales["scale_2"]).float() * scale
        return scale_groups(E2M1[codes.long()], scale)[:shape[0], :shape[1]]
    if weight.format == "mxfp8":              # the scales are exponents of two
        scale = tiled_scales(weight, first, numbers.shape, 32, torch.uint8).float() - 127
        return scale_groups(numbers.float(), scale.exp2())[:shape[0], :shape[1]]
    numbers = numbers.float() * row_scales(weight, first, shape[0])
    if weight.group:
        numbers = rotate(numbers, weight.group)
    return numbers.view(shape)


def row_scales(weight, first, rows):
    """The scale of each row of a float8 or int8 weight, (rows, 1) float32: stored once or per row."""
    if "scale" not in weight.scales:
        return torch.ones(rows, 1)
    scale = read(weight.scales["scale"]).float().flatten()
    if len(scale) == 1:
        return scale.expand(rows, 1)
    if len(scale) != weight.tensor.shape[0]:
        raise UserError(f"{weight.tensor.file}: {weight.tensor.name} has neither one scale nor one "
                        f"for each row; {ADVICE}")
    return scale[first:first + rows, None]


def rotate(weight, group):
    """Multiplies each run of `group` columns by the Hadamard matrix of that size, its own inverse.

    Outliers are spread over a group before it is rounded to int8 ("convrot" in ComfyUI).
    """
    four = torch.tensor([[1., 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, four)
    return (weight.unflatten(-1, (-1, group)) @ (matrix / group ** 0.5)).flatten(-2)


def tiled_scales(weight, first, shape, group, dtype):
    """The scales of nvfp4 and mxfp8, one for `group` columns, (rows, columns / group) in `dtype`.

    They are stored for cuBLAS: padded to tiles of 128 x 4, in which scale (r, c) is number
    ((r % 32) * 4 + r // 32) * 4 + c.
    """
    scale = read(weight.scales["scale"]).view(dtype)
    rows, columns = weight.tensor.shape[0], shape[1] // group
    down, across = -(-rows // 128), -(-columns // 4)
    if scale.numel() != down * across * 512:
        raise UserError(f"{weight.tensor.file}: the scales of {weight.tensor.name} do not fit it")
    scale = scale.view(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(down * 128, -1)
    return scale[first:first + shape[0], :columns]


def scale_groups(numbers, scale):
    """Multiplies runs of columns by their scales: (rows, n * group), (rows, n) -> (rows, n * group)."""
    return (numbers.unflatten(-1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def dequantize_gguf(data, kind):
    """Blocks of a GGUF tensor, uint8 (rows, bytes) -> float32 (rows, numbers), by the gguf package."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise UserError("a quantized GGUF file needs the package gguf: pip install gguf") from None
    with np.errstate(all="ignore"):           # a damaged file is found by its numbers, not by warnings
        return torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[kind]))


def stored_format(weight):
    """"fp8", "int8" or "int8_convrot" where a weight can be used as it is stored, else None."""
    if weight.tensor.kind == "F8_E4M3" and weight.format != "mxfp8":
        return "fp8"
    if weight.tensor.kind == "I8" and weight.group in (0, ROTATED):
        return "int8_convrot" if weight.group else "int8"
    return None


def fits(weight, shape):
    """Whether a weight, without padding and dimensions of size 1, has this shape."""
    stored = weight.tensor.shape
    pad = {"nvfp4": 16, "mxfp8": 32}.get(weight.format)
    if pad:
        stored = (*stored[:-1], stored[-1] * (2 if weight.format == "nvfp4" else 1))
        shape = tuple(-(-n // pad) * pad for n in shape)
    return [n for n in stored if n != 1] == [n for n in shape if n != 1]


# --- Adapters: LoRA, LoKr, LoHa -----------------------------------------------------------------

# How keys end: (pattern, our name of the part). What comes before is a prefix and a module.
ADAPTER_PARTS = {
    r"(\.lora_A|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)(\.default)?(\.weight)?$": ".A",
    r"(\.lora_B|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)(\.default)?(\.weight)?$": ".B",
}
ADAPTER_KEY = re.compile(
    r"\.lora_|[._]lora\.|\.(lokr|hada)_w|\.(dora_scale|oft_|boft_|lora_magnitude_vector)")
ADAPTER_PREFIX = re.compile(
    r"^(base_model\.model\.)?(model\.diffusion_model\.|diffusion_model\.|transformer\."
    r"|lora_unet__?|lora_transformer_|lycoris_)?")
REFUSED_ADAPTERS = {
    r"dora_scale|lora_magnitude_vector": "is a DoRA; programs disagree about what it means",
    r"\.b?oft_": "is of the OFT kind, which this project does not apply",
    r"\.(lokr|hada)_t[12]$|\.lora_mid": "is made for convolutions, which a DiT does not have",
    r"\.(diff|diff_b|set_weight|reshape_weight|lora_B\.bias)$": "changes more than linear weights",
    r"^(text_encoders?\.|lora_te)": "changes the text encoder, which this project does not do",
}
ADAPTER_KINDS = (
    {"A", "B"},
    *({*w1, *w2} for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
      for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
)


def read_adapters(network, adapters):
    """(file, strength) pairs -> {official name: [functions that give its change, float32]}."""
    changes = {}
    for path, strength in adapters:
        for name, change in read_adapter(network, Path(path), strength).items():
            changes.setdefault(name, []).append(change)
    return changes


def read_adapter(network, path, strength):
    """One adapter file -> {official name: function that gives its change}. All of it, or UserError."""
    if network.kind != "dit":
        raise UserError(f"{path}: adapters of the {network.kind} are not supported")
    tensors, settings = open_adapter(path)
    modules = linear_modules(network)
    groups, strange = {}, []                  # prefix and module -> {part: Stored}
    for name, stored in tensors.items():
        for pattern, what in REFUSED_ADAPTERS.items():
            if re.search(pattern, name):
                raise UserError(f"{path} {what} (it holds {name})")
        stem, _, part = rename(name, ADAPTER_PARTS).rpartition(".")
        if ADAPTER_PREFIX.sub("", stem) not in modules or stored.kind not in PLAIN:
            strange.append(name)
        groups.setdefault(stem, {})[part] = stored
    if strange:
        raise UserError(f"{path} was made for another model, or holds more than an adapter; "
                        f"this project cannot use {some(strange)}")
    changes = {}
    for stem, parts in groups.items():
        module = ADAPTER_PREFIX.sub("", stem)
        scale = strength * adapter_scale(path, stem, parts, modules[module][0], settings)
        rows = [network.pieces[official].shape[0] for official in modules[module]]
        columns = network.pieces[modules[module][0]].shape[1]
        check_adapter(path, stem, parts, (sum(rows), columns))
        for i, official in enumerate(modules[module]):
            change = partial(adapter_change, parts, scale, sum(rows[:i]), rows[i])
            changes.setdefault(official, []).append((len(rows), change))
    return {official: partial(the_change, path, official, sorted(found, key=itemgetter(0)))
            for official, found in changes.items()}


def open_adapter(path):
    """The tensors of an adapter file, or of a folder as peft writes it, and peft's settings."""
    folder = path if path.is_dir() else path.parent
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors, metadata = open_files([path])
    if path.name == "adapter_model.safetensors" and (folder / "adapter_config.json").exists():
        settings = read_json(folder / "adapter_config.json")
    else:                                     # diffusers writes the settings into the header
        try:
            settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            settings = {name.removeprefix("transformer."): settings[name] for name in settings}
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path}: its lora_adapter_metadata is damaged") from None
    if settings.get("use_dora") or settings.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path} is not a plain LoRA, which alone is supported in peft's format")
    return tensors, settings


def adapter_scale(path, stem, parts, official, settings):
    """alpha / rank. Without alpha 1, unless peft's settings have one."""
    small = next((parts[key] for key in ("A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
                  if key in parts), None)
    if small is None or not small.shape or small.shape[0] == 0:   # LoKr in two whole matrices
        return 1.0
    rank = small.shape[0]
    if "alpha" in parts:
        alpha = read(parts["alpha"]).float()
        if alpha.numel() != 1 or not alpha.isfinite().all():
            raise UserError(f"{path}: {stem}.alpha is not a number")
        return float(alpha) / rank
    alpha = settings.get("lora_alpha", rank)
    module = official.removesuffix(".weight")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    if not is_number(alpha):
        raise UserError(f"{path}: the alpha of {stem} is {alpha!r}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def check_adapter(path, stem, parts, shape):
    """UserError where a module's parts are incomplete or have another shape than its weight."""
    kind = parts.keys() - {"alpha"}
    if kind not in ADAPTER_KINDS:
        raise UserError(f"{path}: of {stem} there is only {some(kind) or 'alpha'}")
    try:
        with torch.device("meta"):
            given = tuple(adapter_product(
                {key: torch.empty(parts[key].shape).flatten(1) for key in kind}).shape)
    except (RuntimeError, IndexError):
        given = "of shapes that do not go together"
    if given != shape:
        raise UserError(f"{path} was made for another model: {stem} is {given}, and the network "
                        f"has {shape}")


def adapter_product(parts):
    """The change of a weight before its scale: LoRA, LoHa, LoKr (LyCORIS' names of the parts)."""
    if "A" in parts:
        return parts["B"] @ parts["A"]
    if "hada_w1_a" in parts:
        first, second = ((parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"]) for i in (1, 2))
        return first * second
    factors = [parts[f"lokr_w{i}"] if f"lokr_w{i}" in parts
               else parts[f"lokr_w{i}_a"] @ parts[f"lokr_w{i}_b"] for i in (1, 2)]
    return torch.kron(*factors)


def adapter_change(parts, scale, first, rows):
    """Rows of the change, float32."""
    parts = {key: read(stored).float().flatten(1) for key, stored in parts.items()
             if key != "alpha"}
    if "B" in parts:
        parts["B"] = parts["B"][first:first + rows]
        return scale * adapter_product(parts)
    return scale * adapter_product(parts)[first:first + rows]


def the_change(path, official, found):
    """The change of one weight. Some files say it twice, for q and for qkv: it counts once."""
    change, *others = (compute() for _, compute in found)
    for other in others:
        if (other - change).norm() > 0.02 * change.norm():
            raise UserError(f"{path} says two different things about {official}")
    return change


def linear_modules(network):
    """{name of a module in adapters: the official weights it stands for}.

    Dotted or flattened, in official or in ComfyUI's names; attention.qkv stands for three.
    """
    modules = {}
    for official, piece in network.pieces.items():
        if official.endswith(".weight") and len(piece.shape) == 2:
            module = official.removesuffix(".weight")
            dotted = {module, comfy_name("dit", network.config, module)}
            for name in dotted | {name.replace(".", "_") for name in dotted}:
                modules.setdefault(name, []).append(official)
    return modules


# --- Configurations and checkpoints -------------------------------------------------------------

# Official config.json: what must be so, because model.py builds only this. The first key says what
# the file is and must be there. Written out as it stands.
REQUIRED = {
    "text_encoder": {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False,
                     "use_sliding_window": False},
    "dit": {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2],
            "all_f_patch_size": [1], "qk_norm": True, "siglip_feat_dim": None},
    "vae": {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True,
            "use_quant_conv": False, "use_post_quant_conv": False, "latents_mean": None,
            "latents_std": None},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                  "use_dynamic_shifting": False, "use_karras_sigmas": False,
                  "use_exponential_sigmas": False, "use_beta_sigmas": False,
                  "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False},
    "tokenizer": {"add_prefix_space": False, "add_bos_token": False,
                  "split_special_tokens": False},
}
# What says nothing about the picture. Any other key is warned about.
WITHOUT_EFFECT = {
    "text_encoder": """architectures attention_dropout bos_token_id dtype eos_token_id
        initializer_range max_position_embeddings max_window_layers pad_token_id sliding_window
        tie_word_embeddings torch_dtype transformers_version use_cache _name_or_path
        rope_parameters rope_scaling layer_types""",
    "dit": "_diffusers_version _name_or_path",
    "vae": "_diffusers_version _name_or_path force_upcast sample_size",
    "scheduler": """shift _diffusers_version base_image_seq_len base_shift max_image_seq_len
        max_shift time_shift_type""",
}
# What the reference's classes take for a field that an official config.json lacks; where they take
# the release's values, our dataclasses say so.
REFERENCE_DEFAULTS = {
    "text_encoder": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
                     "num_key_value_heads": 32, "rope_theta": 10000.0},
    "dit": {"axes_lens": [1024, 512, 512]},
    "vae": {"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4,
            "scaling_factor": 0.18215, "shift_factor": None},
}
FIELD_TYPES = {
    int: "a whole number from 1 to 2^31",
    float: "a number",
    tuple: "a list of whole numbers from 1 to 2^31",
}
# What a checkpoint knows of how it is sampled: field -> type.
SETTINGS = {"shift": float, "steps": int, "guidance": float, "size": int, "trained_steps": int}


def has_type(value, kind):
    """Whether a value from a JSON file can be a field of this type."""
    if kind is tuple:
        return isinstance(value, (list, tuple)) and value and all(has_type(n, int) for n in value)
    return is_number(value) and (kind is float or isinstance(value, int) and 0 < value < 2 ** 31)


def parse_config(kind, data, path, official):
    """A JSON object -> the network's configuration. UserError for what the network cannot be."""
    fields = {field.name: field for field in dataclasses.fields(NETWORKS[kind][1])}
    if official:
        data = read_official_config(kind, data, path)
    for key in sorted(data.keys() ^ fields.keys()) if not official else ():
        what = "misses" if key in fields else "does not know"
        raise UserError(f"{path}: the section {kind} {what} {key}")
    values = {}
    for name, field in fields.items():
        value = data.get(name, field.default)
        if not has_type(value, type(field.default)):
            raise UserError(f"{path}: {name} should be {FIELD_TYPES[type(field.default)]}, "
                            f"not {value!r}")
        if "layers" in name and value > 1000:
            raise UserError(f"{path}: {name} is {value}, more than any network of this kind has")
        values[name] = type(field.default)(value)
    config = NETWORKS[kind][1](**values)
    check_config(kind, config, path)
    if official:
        check_required(data, derived_fields(kind, config), path)
    return config


def read_official_config(kind, data, path):
    """The object of an official config.json, checked, with the reference's defaults."""
    if "quantization_config" in data:
        raise UserError(f"{path}: the weights are quantized (quantization_config); {ADVICE}")
    check_required(data, REQUIRED[kind], path)
    known = {*REQUIRED[kind], *WITHOUT_EFFECT[kind].split(), *REFERENCE_DEFAULTS[kind],
             *(field.name for field in dataclasses.fields(NETWORKS[kind][1])),
             *derived_fields(kind, NETWORKS[kind][1]())}
    warn_of_unknown(data, known, path)
    if any(layer != "full_attention" for layer in data.get("layer_types") or ()):
        raise UserError(f"{path}: layer_types should all be full_attention")
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}   # older, newer spelling
    if not isinstance(rope, dict):
        raise UserError(f"{path}: the rotary embedding is described by {rope!r}")
    style = rope.get("rope_type", rope.get("type", "default"))
    if style != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{path}: the rotary embedding is {rope!r}; only the plain one is supported")
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return {**REFERENCE_DEFAULTS[kind], **data, **theta}


def check_config(kind, config, path):
    """UserError where the numbers do not go together."""
    if kind == "dit":
        dims, lens = config.axes_dims, config.axes_lens
        good = (len(dims) == len(lens) == 3 and not any(d % 2 for d in dims)
                and sum(dims) * config.n_heads == config.dim)
        rule = ("axes_dims and axes_lens are three numbers each, axes_dims even, with "
                "sum(axes_dims) * n_heads = dim")
    elif kind == "text_encoder":
        good = (config.num_attention_heads % config.num_key_value_heads == 0
                and config.head_dim % 2 == 0)
        rule = "num_key_value_heads divides num_attention_heads, and head_dim is even"
    else:
        good = not any(c % config.norm_num_groups for c in config.block_out_channels)
        rule = "norm_num_groups divides all block_out_channels"
    if not good:
        raise UserError(f"{path} describes a network that cannot be built: it needs that {rule}")


def derived_fields(kind, config):
    """What else an official config.json says that follows from our fields."""
    if kind == "dit":
        return {"n_kv_heads": config.n_heads}
    if kind == "text_encoder":
        return {}
    levels = len(config.block_out_channels)
    return {"out_channels": config.in_channels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels}


def check_required(data, required, path):
    """UserError where `data` says otherwise than `required`, or does not say what it is."""
    for key, value in required.items():
        if key in ("_class_name", "model_type") and key not in data:
            raise UserError(f"{path} has no {key}, so it is not the configuration of a {value}")
        if data.get(key, value) != value:
            raise UserError(f"{path}: {key} is {data[key]!r}; only {value!r} is supported")


def warn_of_unknown(data, known, path):
    for key in data.keys() - known:
        warnings.warn(f"{path}: the key {key!r} is not known, and ignored", stacklevel=2)


def component_files(kind, path):
    """A component's folder, a directory in our layout, or a file -> (its files, configuration).

    The configuration of a file is None: it has none, or holds it in its header.
    """
    if not path.is_dir():
        return [path], None
    config = read_json(path / "config.json")
    if (path / f"{kind}.safetensors").exists():
        section = config.get(kind)
        if not isinstance(section, dict):
            raise UserError(f"{path / 'config.json'} has no section {kind!r}")
        return ([path / f"{kind}.safetensors"],
                parse_config(kind, section, path / "config.json", official=False))
    if (path / "quantization_config.json").exists():
        raise UserError(f"{path}: the weights are quantized (quantization_config.json); {ADVICE}")
    return shard_files(path), parse_config(kind, config, path / "config.json", official=True)


def shard_files(folder):
    """The weights of an official component: the files that its index names, or the only ones.

    Names may hold a variant: model.fp16.safetensors, model.safetensors.index.fp16.json.
    """
    indices = sorted(folder.glob("*.safetensors.index*.json"), key=lambda path: len(path.name))
    if not indices:
        files = sorted(folder.glob("*.safetensors"), key=lambda path: len(path.name))
        if not files:
            raise UserError(f"{folder} holds no .safetensors file; the weights are missing")
        return files[:1] if "-of-" not in files[0].name else files
    weight_map = read_json(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{indices[0]} has no weight_map")
    for name in weight_map.values():
        good = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not good or not name.endswith(".safetensors"):
            raise UserError(f"{indices[0]} names the shard {name!r}, which is not the name of a "
                            ".safetensors file in this directory")
    return [folder / name for name in sorted(set(weight_map.values()))]


def embedded_config(kind, metadata):
    """The configuration in the header of a file that this project wrote (--to comfy), or None."""
    text = metadata.get(f"z_image_{kind}")
    where = f"z_image_{kind} in the header of the file"
    return None if text is None else parse_config(kind, parse_json(text, where), where, False)


def config_like(kind, like):
    """The configuration of another checkpoint's component; without one, the release's."""
    if like is None:
        return NETWORKS[kind][1]()
    return like.config if isinstance(like, Network) else component_files(kind, Path(like))[1]


SAMPLING_FILE = "sampling.json"   # in an official directory: what diffusers has no place for
CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
FOLDERS = {"text_encoder": "text_encoder", "dit": "transformer", "vae": "vae"}
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
RELEASE = "Tongyi-MAI/Z-Image-Turbo"
RELEASE_SHIFT = 3.0


class Checkpoint(NamedTuple):
    """All parts of a model on disk, checked one by one and against each other."""
    networks: dict        # kind -> Network, for load_dit and its siblings
    tokenizer: Tokenizer
    settings: dict        # "shift" and, where known, steps, guidance, size (pixels), trained_steps
    shift_assumed: bool   # no file says the shift of the schedule
    files: dict           # "dit", "text_encoder", "vae", "tokenizer" -> the path of each


def open_checkpoint(path=None, dit=None, text_encoder=None, vae=None, tokenizer=None):
    """Looks at a model -> Checkpoint.

    path: a directory in the official layout or in ours, a folder with one file for each part, a
    file, or a name on the hub; a part that is named beside it replaces the one in it.
    """
    named = {"dit": dit, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    named = {part: Path(place) for part, place in named.items() if place is not None}
    places, settings = find_parts(path, named) if path is not None else ({}, {})
    files = {**places, **named}
    missing = [part for part in (*NETWORKS, "tokenizer") if part not in files]
    if missing:
        options = " ".join(f"--{part.replace('_', '-')} FILE" for part in missing)
        given = files.get("dit", "FILE")
        raise UserError(
            f"{path or 'the model'} lacks {', '.join(missing)}. Put them beside it, or give "
            f"{options}. With --model {RELEASE} --dit {given} the missing parts are fetched")
    networks = {kind: open_network(kind, files[kind], places.get(kind)) for kind in NETWORKS}
    embedded = networks["dit"].metadata.get("z_image_settings")
    if embedded is not None and not settings:
        settings = check_settings(parse_json(embedded, files["dit"]), files["dit"])
    checkpoint = Checkpoint(networks, load_tokenizer(files["tokenizer"]),
                            {"shift": RELEASE_SHIFT, **settings}, "shift" not in settings, files)
    check_parts(checkpoint)
    return checkpoint


def find_parts(path, named):
    """The parts of a checkpoint -> ({part: its file or folder}, settings)."""
    if re.fullmatch(HUB_NAME, str(path)) and not Path(path).exists():
        path = download(str(path), named)
    path = Path(path)
    if (path / "dit.safetensors").exists() and (path / "config.json").exists():
        config = read_json(path / "config.json")
        for key in sorted(config.keys() - NETWORKS.keys() - SETTINGS.keys()):
            raise UserError(f"{path / 'config.json'}: the key {key!r} is not known")
        settings = {key: config[key] for key in SETTINGS if key in config}
        places = {**dict.fromkeys(NETWORKS, path), "tokenizer": path / "tokenizer.json"}
        return places, check_settings({"shift": None, **settings}, path / "config.json")
    if (path / "transformer").is_dir() or (path / "model_index.json").exists():
        source = path / "scheduler" / "scheduler_config.json"
        config = read_json(source)
        check_required(config, REQUIRED["scheduler"], source)
        warn_of_unknown(
            config, {*REQUIRED["scheduler"], *WITHOUT_EFFECT["scheduler"].split()}, source)
        settings = {"shift": config.get("shift")}
        if (path / SAMPLING_FILE).exists():
            settings = {**read_json(path / SAMPLING_FILE), **settings}
        check_tokenizer_config(path / "tokenizer")
        places = {kind: path / folder for kind, folder in FOLDERS.items()}
        places["tokenizer"] = path / "tokenizer" / "tokenizer.json"
        return places, check_settings(settings, source)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    return find_single_files(path, named), {}


def find_single_files(path, named):
    """One file for each network, in a folder or beside a file, known by their keys."""
    folder = path if path.is_dir() else path.parent
    places = {}
    if path.is_file():
        places = dict.fromkeys(split_parts(read_header(path)[0], path), path)
    beside = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        with suppress(UserError):             # adapters and other models may lie there, too
            for kind in split_parts(read_header(file)[0], file):
                beside.setdefault(kind, []).append(file)
    for kind in beside.keys() - places.keys() - named.keys():
        if len(beside[kind]) > 1:
            raise UserError(f"{folder} holds several files for the {kind}: "
                            f"{some([file.name for file in beside[kind]])}; name one of them")
        places[kind] = beside[kind][0]
    for tokenizer in (folder / "tokenizer.json", folder / "tokenizer" / "tokenizer.json"):
        if tokenizer.exists():
            places.setdefault("tokenizer", tokenizer)
    if not places:
        raise UserError(f"{path} is not a model directory: it holds neither transformer/ (official "
                        "layout) nor dit.safetensors (ours) nor a file for each network")
    return places


def download(name, named):
    """Fetches what is needed of a model on the hub -> its folder in the cache.

    huggingface_hub honors HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME, and goes on where it stopped.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["model_index.json", SAMPLING_FILE, "scheduler/*.json", "config.json"]
    if "tokenizer" not in named:
        wanted += ["tokenizer/*", "tokenizer.json"]
    for kind in NETWORKS.keys() - named.keys():
        wanted += [f"{FOLDERS[kind]}/*.json", f"{FOLDERS[kind]}/*.safetensors", f"{kind}.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except RepositoryNotFoundError:
        reason = "there is no directory and no model on the hub of that name"
    except LocalEntryNotFoundError:
        reason = "it is not on this machine yet, and the hub cannot be reached"
    except Exception as error:                # whatever the network libraries raise
        reason = f"the download failed, call again to go on: {str(error).splitlines()[0][:200]}"
    raise UserError(f"{name}: {reason}")


def check_settings(settings, path):
    """The settings of a checkpoint, or UserError."""
    for key, value in settings.items():
        kind = SETTINGS.get(key)
        if key == "trained_steps" and isinstance(value, (list, tuple)):      # several numbers
            kind = tuple
        if kind is None or not has_type(value, kind) or (kind is float and value < 0):
            wanted = FIELD_TYPES[kind] if kind else "left out: it is not known"
            raise UserError(f"{path}: {key} should be {wanted}, not {value!r}")
    return settings


def load_tokenizer(path):
    """A tokenizers.Tokenizer from a tokenizer.json or a folder with one.

    What the file says about the last call (padding, truncation) is not the model's, and cleared.
    """
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:                # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer file: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for token in SPECIAL_TOKENS:
        if len(tokenizer.encode(token, add_special_tokens=False).ids) != 1:
            raise UserError(f"{path} does not know {token}; it is the tokenizer of another model")
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(f"{path}: dropout would give other tokens every time")
    return tokenizer


def check_tokenizer_config(folder):
    """UserError where an official tokenizer is used otherwise than sampler.py uses it."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    check_required(config, REQUIRED["tokenizer"], path)
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        path = folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8")
    if template is not None and render_chat(template, path) != render_chat(CHAT_TEMPLATE, path):
        raise UserError(f"{path}: the chat template differs from Qwen3's, for which this model and "
                        "sampler.py are made")


def render_chat(template, path):
    """One message in a chat template, as the official pipeline renders it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment      # PyTorch depends on it
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": "a cat"}]
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, enable_thinking=True)
    except Exception as error:                # a template is a program
        raise UserError(f"{path}: the chat template is damaged: {error}") from None


def check_parts(checkpoint):
    """UserError where parts do not belong together. Nothing but headers has been read by now."""
    configs = {kind: network.config for kind, network in checkpoint.networks.items()}
    largest = max(checkpoint.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    encoder, dit, vae = configs["text_encoder"], configs["dit"], configs["vae"]
    for what, good in {
        "the tokenizer has more tokens than the text encoder": largest < encoder.vocab_size,
        "the DiT wants text features of another width": dit.cap_feat_dim == encoder.hidden_size,
        "DiT and VAE have different latent channels": dit.in_channels == vae.latent_channels,
    }.items():
        if not good:
            raise UserError(f"the parts of the model do not belong together: {what} "
                            f"({', '.join(map(str, dict.fromkeys(checkpoint.files.values())))})")


# --- Convert ------------------------------------------------------------------------------------

# The rest of an official directory: the same for every checkpoint.
OFFICIAL_JSON = {
    "tokenizer/tokenizer_config.json": {
        "tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE,
        "model_max_length": 131072, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "add_bos_token": False},
    "model_index.json": {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"]},
}
TARGETS = {           # layout -> the file of each network
    "ours": {kind: f"{kind}.safetensors" for kind in NETWORKS},
    "official": {"text_encoder": "text_encoder/model.safetensors",
                 "dit": "transformer/diffusion_pytorch_model.safetensors",
                 "vae": "vae/diffusion_pytorch_model.safetensors"},
    "comfy": {"text_encoder": "qwen_3_4b.safetensors", "dit": "z_image.safetensors",
              "vae": "ae.safetensors"},
}
# The linear layers that int8 is for: those of all blocks, without those that read the time.
QUANTIZED = re.compile(r"\.\d+\.(attention|feed_forward|self_attn|mlp)\.(?!.*norm).*\.weight$")
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.float64: "F64", torch.int8: "I8", torch.uint8: "U8"}


def convert(source, target, to="ours", dtype=None, adapters=(), **parts):
    """Converts a model to a directory in the layout "ours", "official" or "comfy".

    dtype: of DiT and text encoder; None: each tensor's (bfloat16 where it is quantized); "int8":
    ComfyUI's int8 with a scale per row for the linear layers of the blocks. The VAE stays as it is.
    adapters: (file, strength) pairs, merged into the DiT. parts: as in open_checkpoint.
    """
    if dtype == "int8" and to == "official":
        raise UserError("the official layout has no int8; take --to comfy, or ours")
    checkpoint = open_checkpoint(source, **parts)
    networks = checkpoint.networks
    total = sum(math.prod(piece.shape) for network in networks.values()
                for piece in network.pieces.values())
    with new_directory(target) as folder, tqdm(total=total, unit="", unit_scale=True) as bar:
        for kind, network in networks.items():
            bar.set_description(kind)
            metadata = {}
            if to == "comfy":
                metadata = {f"z_image_{kind}": json.dumps(dataclasses.asdict(network.config))}
                if kind == "dit" and not checkpoint.shift_assumed:
                    metadata["z_image_settings"] = json.dumps(checkpoint.settings)
            file = folder / TARGETS[to][kind]
            file.parent.mkdir(exist_ok=True)
            write_network(network, file, to, None if kind == "vae" else dtype,
                          adapters if kind == "dit" else (), metadata, bar)
        write_rest(folder, to, checkpoint)


def write_rest(folder, to, checkpoint):
    """Configurations and tokenizer of a converted checkpoint."""
    configs = {kind: network.config for kind, network in checkpoint.networks.items()}
    settings = checkpoint.settings
    tokenizer = folder / ("tokenizer/tokenizer.json" if to == "official" else "tokenizer.json")
    if to == "ours":
        sections = {kind: dataclasses.asdict(config) for kind, config in configs.items()}
        write_json(folder / "config.json", {**sections, **settings})
    if to == "official":
        for kind, config in configs.items():
            write_json(folder / FOLDERS[kind] / "config.json", official_config(kind, config))
        write_json(folder / "scheduler/scheduler_config.json",
                   {**REQUIRED["scheduler"], "shift": settings["shift"]})
        more = {key: value for key, value in settings.items() if key != "shift"}
        if more:
            write_json(folder / SAMPLING_FILE, more)
        for name, content in OFFICIAL_JSON.items():
            write_json(folder / name, content)
    checkpoint.tokenizer.save(str(tokenizer))


def official_config(kind, config):
    """The official config.json of a network, as we write it."""
    more = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    return {**REQUIRED[kind], **dataclasses.asdict(config), **derived_fields(kind, config),
            **(more if kind == "text_encoder" else {})}


def target_tensors(network, to, dtype, official_tensors):
    """(official name, tensor) pairs -> the (name, tensor) pairs to write in their place."""
    expected = expected_tensors(network.kind, network.config)
    types = target_types(network, expected, to, None if dtype == "int8" else dtype)
    for official, tensor in official_tensors:
        name = target_name(network, expected, to, official)
        if dtype == "int8" and QUANTIZED.search(official):
            numbers, scale = quantize_int8(tensor)
            yield name, numbers
            yield name.removesuffix(".weight") + ".weight_scale", scale
        else:
            yield name, tensor.to(types[name])


def write_network(network, path, to, dtype=None, adapters=(), metadata=None, bar=None):
    """Writes a network in another layout. The last layer that a student lacks is filled with zeros."""
    expected = expected_tensors(network.kind, network.config)
    there = [name for name in expected if name in network.pieces or to != "ours"]
    empty = [(name, torch.empty(expected[name][1], device="meta")) for name in there]
    zeros = ((name, torch.zeros(expected[name][1])) for name in there
             if name not in network.pieces)
    tensors = itertools.chain(official_tensors(network, adapters), zeros)
    header = list(target_tensors(network, to, dtype, empty))
    layers = {name.removesuffix(".weight_scale"): {"format": "int8_tensorwise"}
              for name, _ in header if name.endswith(".weight_scale")}
    if layers:
        metadata = {**(metadata or {}), "_quantization_metadata": json.dumps({"layers": layers})}
    write_safetensors(path, header, target_tensors(network, to, dtype, tensors), metadata, bar)


def target_name(network, expected, to, official):
    """The name of an official tensor in the layout to write."""
    if to == "ours":
        return expected[official][0]
    return comfy_name(network.kind, network.config, official) if to == "comfy" else official


def stored_dtype(weight):
    """The dtype to write a weight in that was read from a file: bfloat16 if it was quantized."""
    dtype = DTYPES.get(weight.tensor.kind)
    return dtype if dtype in FLOATS else torch.bfloat16


def target_types(network, expected, to, dtype):
    """{name in the file to write: dtype}; stacked tensors take the widest of theirs."""
    types = {}
    for official in expected:
        piece = network.pieces.get(official)
        own = stored_dtype(piece.weight) if piece else common_dtype(network)
        name = target_name(network, expected, to, official)
        types[name] = dtype or torch.promote_types(types.get(name, own), own)
    return types


def quantize_int8(weight):
    """(rows, columns) -> int8 of the same shape, and scales (rows, 1) float32: ComfyUI's rule."""
    scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (weight.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def write_safetensors(path, header, tensors, metadata=None, bar=None):
    """Writes (name, tensor) pairs as they come, so that the file is never in memory whole.

    header: such pairs with tensors that may lie on the meta device. Pairs of one name are stacked.
    """
    shapes = {}
    for name, tensor in header:
        rows = shapes[name][0][0] if name in shapes else 0
        shape = (rows + tensor.shape[0], *tensor.shape[1:]) if tensor.shape else ()
        shapes[name] = shape, tensor.dtype
    entries, places, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, {}, 0
    for name, (shape, dtype) in shapes.items():
        places[name], start = end, end
        end += math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape),
                         "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.seek(8 + len(text) + places[name])
            file.write(data.numpy())
            places[name] += len(data)
            if bar is not None:
                bar.update(tensor.numel())


def write_json(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def save_pipeline(path, dit, text_encoder, vae, tokenizer, shift, dtype=None, steps=None,
                  guidance=None, size=None, **more):
    """Writes three modules and a tokenizers.Tokenizer in our layout, in the place of an older one.

    dtype: of DiT and text encoder (None: their own; the VAE always keeps its own). steps, guidance
    and size (pixels) are those that the model is meant to be sampled with; `more` may give
    trained_steps, the number of steps (or a list of them) that a student was distilled for.
    """
    networks = {"dit": dit, "text_encoder": text_encoder, "vae": vae}
    settings = {"shift": shift, "steps": steps, "guidance": guidance, "size": size, **more}
    settings = {key: value for key, value in settings.items() if value is not None}
    with new_directory(path, replace=True) as folder:
        for kind, module in networks.items():
            state = [(name, tensor if kind == "vae" or dtype is None else tensor.to(dtype))
                     for name, tensor in module.state_dict().items()]
            write_safetensors(folder / f"{kind}.safetensors", state, state)
        tokenizer.save(str(folder / "tokenizer.json"))
        sections = {kind: dataclasses.asdict(net.config) for kind, net in networks.items()}
        write_json(folder / "config.json", {**sections, **check_settings(settings, path)})


# --- Command line -------------------------------------------------------------------------------

# MD5 of the files of the Z-Image-Turbo release.
OFFICIAL_MD5 = {
    "model_index.json": "5e3226ed72a9a4a080f2a4ca78b98ddc",
    "scheduler/scheduler_config.json": "ca682fcc6c5a94cf726b7187e64b9411",
    "text_encoder/config.json": "1e97eb35d9d0b6aa60c58a8df8d7d99a",
    "text_encoder/model-00001-of-00003.safetensors": "30b85686b9a9b002e012494fadc027cb",
    "text_encoder/model-00002-of-00003.safetensors": "e6a24ea164404a01ad2800dbae4e1a13",
    "text_encoder/model-00003-of-00003.safetensors": "09e190ed15ff14795b6277e023cfcb2d",
    "text_encoder/model.safetensors.index.json": "589f5395156900f49d617aee8a8d8708",
    "tokenizer/tokenizer.json": "6423133b9cc1a2077b57822c30c211aa",
    "tokenizer/tokenizer_config.json": "b06e103ac555ec4b51266078b518c0f0",
    "transformer/config.json": "baed87136fe5f848e24b072f99856cc3",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": "54889d0dd179b4fa2fd7bd0e487d856e",
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors": "fe81e804658d345323512c63224b0604",
    "transformer/diffusion_pytorch_model-00003-of-00003.safetensors": "4e074e09129f98ad840414951f122feb",
    "transformer/diffusion_pytorch_model.safetensors.index.json": "76d788eb0d42c59cc8f8ec007db639aa",
    "vae/config.json": "ba9e2980c8630b4abccc643bc9f4a542",
    "vae/diffusion_pytorch_model.safetensors": "6f83de55cb720c7fae051b14528577bf",
}


def check_release(path):
    """Compares the files of a Turbo release with OFFICIAL_MD5 -> [(file, "ok", "missing", "wrong")]."""
    path, results = Path(path), []
    if not path.is_dir():
        raise UserError(f"{path} is not a directory")
    for name, expected in tqdm(OFFICIAL_MD5.items(), "reading"):
        if not (path / name).is_file():
            results.append((name, "missing"))
            continue
        md5 = hashlib.md5()
        with open(path / name, "rb") as file:
            while block := file.read(1 << 23):
                md5.update(block)
        results.append((name, "ok" if md5.hexdigest() == expected else "wrong"))
    return results


def main():
    parser = Parser(description="Convert a Z-Image model to another layout, or check a download.")
    add = parser.add_argument
    add("source", metavar="SRC", nargs="?", help="a directory, a hub name (owner/name), or a file")
    add("target", metavar="DST", nargs="?", help="the directory to make")
    add("--to", choices=[*TARGETS], default="ours", help="layout of DST (default: ours)")
    add("--dtype", choices=["bfloat16", "float16", "float32", "int8"],
        help="of DiT and text encoder (default: as stored)")
    add("--check", metavar="DIR", help="compare a downloaded Turbo release with its MD5 list")
    add_common_options(parser, "--dit", "--text-encoder", "--vae", "--tokenizer", "--lora")
    args = parser.parse_intermixed_args()     # options may stand between SRC and DST
    if args.check is not None:
        results = check_release(args.check)
        for name, state in results:
            print(f"{state:8} {name}")
        if bad := [f"{name} ({state})" for name, state in results if state != "ok"]:
            raise UserError(f"{len(bad)} of {len(results)} files differ from the release: "
                            f"{', '.join(bad)}")
        print("all files are those of the release")
        return
    if not args.source or not args.target:
        raise UserError("give SRC and DST, or --check DIR")
    dtype = args.dtype if args.dtype in (None, "int8") else getattr(torch, args.dtype)
    convert(args.source, args.target, args.to, dtype, args.lora, dit=args.dit,
            text_encoder=args.text_encoder, vae=args.vae, tokenizer=args.tokenizer)
    print(f"wrote {args.target}")


# --- Shared by all command lines ----------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend, said in one sentence. It is printed; the exit code is 2."""


def run_command(main):
    """Runs a command line: a UserError is one line and exit code 2, Ctrl-C is exit code 130."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:        # the user closed it; progress bars still write to it
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            # A name that the terminal cannot show must not end the run.
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:                  # no permission, a name too long, a device that is gone
        place = error.filename or "input or output"
        print(f"error: {place}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, so that a wrong option ends in one sentence."""

    def __init__(self, *args, allow_abbrev=False, **options):
        super().__init__(*args, allow_abbrev=allow_abbrev, **options)

    def error(self, message):
        raise UserError(message)


def number(low=-math.inf, high=math.inf, kind=float, above=None):
    """An argparse type: a finite number from `low` to `high`; `above`: larger than this."""
    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}") from None
        good = low <= value <= high and math.isfinite(value)
        if not good or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(f"should be {wanted}, not {text}")
        return value

    name = "whole number" if kind is int else "number"
    limits = [f"above {above}"] if above is not None else []
    if low > -math.inf and above is None:
        limits.append(f"at least {low}")
    if high < math.inf:
        limits.append(f"at most {high}")
    wanted = " and ".join(limits) or "finite"
    return parse


def add_common_options(parser, *names, **defaults):
    """Adds options that several scripts have, such as "--seed"; `defaults`: other default values."""
    for name in names:
        option = dict(COMMON_OPTIONS[name])
        default = defaults.get(name.strip("-").replace("-", "_"), option.get("default"))
        parser.add_argument(name, **{**option, "default": default})


def adapter(text):
    """An argparse type: FILE or FILE:STRENGTH -> (file, strength). A drive letter is no file."""
    file, colon, strength = text.rpartition(":")
    if not colon or re.fullmatch(r"[A-Za-z]", file) or Path(text).exists():
        return text, 1.0
    return file, number(-100, 100)(strength)


COMMON_OPTIONS = {
    "--dit": {"metavar": "FILE", "help": "take the DiT from this file or component folder"},
    "--text-encoder": {"metavar": "FILE", "help": "take the text encoder from there"},
    "--vae": {"metavar": "FILE", "help": "take the VAE from there"},
    "--tokenizer": {"metavar": "FILE", "help": "take the tokenizer from this tokenizer.json"},
    "--lora": {"metavar": "FILE[:STRENGTH]", "action": "append", "type": adapter, "default": [],
               "help": "add a LoRA, LoKr or LoHa to the DiT (repeatable; strength 1 if not given)"},
    "--device": {"default": "auto",
                 "help": "cuda, mps or cpu (default: the first of them that is there)"},
    "--seed": {"type": number(0, 2 ** 63 - 1, int), "default": 0, "metavar": "N",
               "help": "whole number (default: 0)"},
}


def is_number(value):
    """Whether a value from a JSON file is a number that float32 can hold; NaN is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def read_json(path):
    """The JSON object in a file. UserError where there is none."""
    try:
        return parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def parse_json(text, path):
    """The JSON object in a text that comes from `path`."""
    try:
        data = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(data).__name__}")
    return data


def hold(path):
    """Locks a file or directory -> descriptor; None where another process holds it.

    The system drops the lock when the process ends, however it ends. So a temporary file that
    can be locked was left by a dead process, whatever that process's number was.
    """
    if fcntl is None:                         # Windows: nothing is ever taken for dead
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove(path):
    """Removes a file or directory, as far as that goes."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def temporary(folder, prefix, make):
    """A new path folder/prefix..., made by make(path), removed at the end unless it was renamed.

    What dead processes left under such names is removed first.
    """
    for old in folder.glob(f"{glob.escape(prefix)}*"):
        descriptor = hold(old)
        if descriptor is not None:
            remove(old)
            os.close(descriptor)
    path = folder / f"{prefix}{secrets.token_hex(4)}"
    make(path)
    descriptor = hold(path)
    try:
        yield path
    finally:
        remove(path)
        if descriptor is not None:
            os.close(descriptor)


def write_whole(path, write):
    """Calls write(part) with a name beside `path`, then renames: the old file or the new one is there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path.parent, f"{path.name}.part-", Path.touch) as part:
            write(part)
            os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {path}: {reason}") from None


@contextmanager
def new_directory(path, replace=False):
    """A directory to write in; its files come to lie in `path` when the block ends without an error.

    `path` must be new or empty. With `replace` it may hold files; those of the same names are
    replaced, one after the other. After an error nothing is left.
    """
    path = Path(path)
    parts = path.glob(".part-*") if path.is_dir() else []
    if path.exists() and not (path.is_dir() and (replace or set(path.iterdir()) <= set(parts))):
        raise UserError(f"{path} exists already; name a new directory, or remove it first")
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            # Inside `path`: on the same file system, whatever is mounted where.
            with temporary(path, ".part-", Path.mkdir) as part:
                yield part
                for file in part.iterdir():
                    os.replace(file, path / file.name)
        finally:
            if made and not any(path.iterdir()):
                path.rmdir()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


SAMPLES, SAMPLE_BYTES = 1024, 4096


def fingerprint(path):
    """A hash of what a file, or the model files (else all files) of a directory, say: 16 hex digits.

    Of a file above 64 MB only 1,024 evenly spaced blocks of 4 KB are read, so that 20 GB take
    a moment: other weights are noticed, a single changed number may not be. The place and the
    name of `path` do not count.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        model = [file for file in files if file.suffix in (".safetensors", ".json", ".gguf")]
        files = model or files
    digest = hashlib.sha256()
    try:
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path).as_posix()} {size}\n".encode())
            with open(file, "rb") as data:
                if size <= 1 << 26:
                    digest.update(data.read())
                    continue
                for i in range(SAMPLES):
                    data.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                    digest.update(data.read(SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    run_command(main)
