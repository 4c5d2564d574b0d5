"""What is in a file: tensors, quantized or not; adapters; configurations; tokenizers.

A network is recognized here by one of its tensors and a prefix; convert_weights.py has the tables
of all names. The headers are read here, not by the safetensors package: a row range of a tensor is
mapped by itself, GGUF takes the same way, and a damaged file ends in one sentence.
"""

import argparse
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import struct
import warnings
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from model import VAE, DiT, DiTConfig, TextEncoder, TextEncoderConfig, VAEConfig

# A thread of tqdm redraws bars that stand still. It can crash Python 3.11 as a command ends.
tqdm.monitor_interval = 0

# --- Files: headers of safetensors and GGUF; tensors are mapped ---------------------------------

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.uint8,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U8")
PLAIN = (*FLOATS, "F8_E4M3", "F8_E5M2")                            # that are numbers as they stand

# GGUF's types by number: name, numbers in a block, bytes of a block. Its values: struct's letters.
GGUF_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}
GGUF_NOT_READ = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}
GGUF_VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}

NOT_A_MODEL = {       # how files begin that are taken for a checkpoint
    b"PK": "a zip or PyTorch pickle file, which can run code; get a .safetensors file",
    b"\x80": "a PyTorch pickle file, which can run code; get a .safetensors file",
    b"<": "a web page; download the file itself",
    b"version https://git-lfs": "a pointer of Git LFS; download the file itself",
}
ADVICE = "use the bfloat16 file of the same model; sampler.py --weights fp8 halves it when loading"
REFUSED = {           # names that tell formats and models that this project does not read
    r"\.(qweight|wscales|proj_down|smooth_factor)$|attention\.to_qkv\.":
        f"is quantized for nunchaku; {ADVICE}",
    r"\.(scale|zero_point|svd_up|svd_down)$": f"is quantized by SDNQ; {ADVICE}",
    r"\.(absmax|quant_map|SCB)$|\.quant_state\.": f"is quantized by bitsandbytes; {ADVICE}",
    r"\._(data|scale)$": f"is quantized by quanto; {ADVICE}",
    r"\.(scales|biases)$": f"is quantized for MLX; {ADVICE}",
    r"encoded_exponent|sign_mantissa": f"is compressed by DFloat11; {ADVICE}",
    r"pre_quant_scale$": f"is quantized with smoothed inputs; {ADVICE}",
    r"(^|\.)control_": "is a ControlNet, which this project does not run",
    r"siglip": "is Z-Image-Omni or Z-Image-Edit, which this project does not run",
    r"t_embedder_2\.": "is TwinFlow, which this project does not run",
    r"local_decoder\.|dec_net\.": "works on pixels, not latents, which this project does not run",
    r"clip_text_pooled_proj": "is NewBie, not Z-Image",
    r"visual\.": "is Qwen3-VL; Z-Image uses Qwen3-4B",
    r"quant_conv\.": "has the VAE of Stable Diffusion; Z-Image uses the one of Flux",
    r"^decoder\.layers\.": "is a TAESD preview decoder; Z-Image uses the VAE of Flux",
}

REFUSED_METADATA = {"mflux_version": "MLX", "quantization_level": "MLX"}


class Stored(NamedTuple):
    """A tensor in a file, as the header describes it, with what a quantized one needs besides."""
    file: Path
    name: str
    number_type: str  # in the file's own words: "BF16", "F8_E4M3", "Q4_K"
    shape: tuple
    start: int        # of its bytes in the file
    size: int         # number of bytes
    format: str = "plain"             # or "gguf", or one of ComfyUI's, see FORMATS
    scales: tuple = (None, None)      # Stored, of ComfyUI's formats
    group: int = 0                    # columns that are rotated together

    @property
    def dtype(self):
        """Of a converted copy: the stored one of 16 bits or more; bfloat16 for 8 bits and less."""
        return DTYPES[self.number_type] if self.number_type in FLOATS else torch.bfloat16


def read(stored, first=0, rows=None):
    """Rows of a stored tensor, mapped (None: all). Of quantized GGUF its bytes: (rows, bytes)."""
    dtype = DTYPES.get(stored.number_type)
    shape, start, size = stored.shape, stored.start, stored.size
    if dtype is None:
        dtype, shape = torch.uint8, (math.prod(shape[:-1]), size // max(math.prod(shape[:-1]), 1))
    if rows is not None and shape and rows != shape[0]:
        size = size // shape[0] * rows
        start, shape = start + size // rows * first, (rows, *shape[1:])
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    data = map_bytes(stored.file, start, size)
    if start % dtype.itemsize:                # not every program aligns
        data = data.clone()
    return data.view(dtype).view(shape)


def map_bytes(path, start, size):
    """Bytes of a file as a mapped uint8 tensor (size,).

    Writing to it copies a page and leaves the file as it is. Where the system does not promise
    memory for that, the mapping is read-only, and writing to it would end the process.
    """
    before = start % mmap.ALLOCATIONGRANULARITY
    place = {"length": before + size, "offset": start - before}
    try:
        with open(path, "rb") as file:
            try:
                data = mmap.mmap(file.fileno(), access=mmap.ACCESS_COPY, **place)
            except OSError:
                data = mmap.mmap(file.fileno(), access=mmap.ACCESS_READ, **place)
    except (OSError, ValueError) as error:    # ValueError: the file has become shorter
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8, count=size, offset=before)


def open_files(files):
    """The tensors of several files together: {name: Stored}, metadata."""
    tensors, metadata = {}, {}
    for path in files:
        found, more = read_header(path)
        for name in tensors.keys() & found.keys():
            raise UserError(f"{name} is in both {tensors[name].file} and {path}")
        tensors.update(found)
        metadata.update(more)
    return tensors, metadata


# What code raises that reads values out of a damaged file.
JSON_FAULTS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def read_header(path):
    """The header of a safetensors or GGUF file: {name: Stored}, metadata."""
    if not path.is_file():
        raise UserError(f"{path} is missing, or no file")
    with open(path, "rb") as file:
        beginning = file.read(32)
    reader = read_safetensors if beginning[8:9] == b"{" else None
    reader = read_gguf if beginning.startswith(b"GGUF") else reader
    try:
        if reader:
            return reader(path)
    except (*JSON_FAULTS, struct.error) as error:
        raise UserError(f"{path} is not complete, or damaged: {error}") from None
    for start, what in NOT_A_MODEL.items():
        if beginning.startswith(start):
            raise UserError(f"{path} is {what}")
    raise UserError(f"{path} is no complete safetensors or GGUF file")


def read_safetensors(path):
    """Length of the header (8 bytes), the header in JSON, tensors without gaps."""
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        file_size = file.seek(0, os.SEEK_END)
        if length > min(file_size - 8, 100_000_000):
            raise ValueError("the header is cut short")
        file.seek(8)
        header = json.loads(file.read(length), object_pairs_hook=unique)
    metadata = dict(header.pop("__metadata__", None) or {})
    tensors, end = {}, 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        number_type, shape = entry["dtype"], entry["shape"]
        first, last = entry["data_offsets"]
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2 ** 48 for n in [*shape, first]):
            raise ValueError(f"{name} has an impossible shape")
        size = last - first
        if number_type in DTYPES:
            size = math.prod(shape) * DTYPES[number_type].itemsize
        if 8 + length + first != end or last - first != size or size < 0:
            raise ValueError(f"{name} is not where it should be")
        tensors[name] = Stored(path, name, number_type, tuple(shape), end, size)
        end += size
    if end != file_size:
        raise ValueError(f"it has {file_size} bytes, and should have {end}")
    return tensors, metadata


def unique(pairs):
    """Pairs of name and value -> dict. ValueError where a name comes twice."""
    pairs = list(pairs)
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says twice: {some({n for n in names if names.count(n) > 1})}")
    return dict(pairs)


class GGUFReader:
    """Reads the values of a GGUF header, one after the other; struct.error where it ends."""

    def __init__(self, data):
        self.data, self.position = data, 4

    def take(self, form):
        value, = struct.unpack_from("<" + form, self.data, self.position)
        self.position += struct.calcsize("<" + form)
        return value

    def text(self):
        return self.take(f"{self.take('Q')}s").decode()

    def value(self, kind):
        """A value of GGUF's type `kind`. Arrays are passed over: they hold a vocabulary."""
        if kind == 8:
            return self.text()
        if kind != 9:
            return self.take(GGUF_VALUES[kind])
        kind, count = self.take("I"), self.take("Q")
        if kind != 8:
            self.position += count * struct.calcsize("<" + GGUF_VALUES[kind])
        for _ in range(count if kind == 8 else 0):
            self.text()
        return None


def read_gguf(path):
    """Counts; metadata (key, type, value); tensors (name, dims, type, offset); the data."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader, file_size = GGUFReader(data), len(data)
        version, tensors, values = reader.take("I"), reader.take("Q"), reader.take("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} of GGUF")
        metadata = unique((reader.text(), reader.value(reader.take("I"))) for _ in range(values))
        entries = unique(
            (reader.text(), ([reader.take("Q") for _ in range(min(reader.take("I"), 9))],
                             reader.take("I"), reader.take("Q"))) for _ in range(tensors))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    found = {}
    for name, (dims, number, offset) in entries.items():
        if number not in GGUF_TYPES:
            raise UserError(f"{path}: {name} is of GGUF's type "
                            f"{GGUF_NOT_READ.get(number, number)}; {ADVICE}")
        number_type, block, block_size = GGUF_TYPES[number]
        size = math.prod(dims) // block * block_size
        is_whole = not dims or dims[0] % block == 0
        if not is_whole or offset % alignment or start + offset + size > file_size:
            raise ValueError(f"{name} is not where it should be")
        form = "plain" if number_type in DTYPES else "gguf"
        found[name] = Stored(path, name, number_type, tuple(dims[::-1]), start + offset, size, form)
    architecture = metadata.get("general.architecture", ARCHITECTURES[0])
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path} holds a network of the architecture {architecture!r}; Z-Image has "
                        f"{' or '.join(ARCHITECTURES)}")
    places = sorted((stored.start, stored.start + stored.size) for stored in found.values())
    if any(end > start for (_, end), (start, _) in itertools.pairwise(places)):
        raise ValueError("tensors overlap")
    return found, metadata


def write_safetensors(path, plan, tensors, metadata=()):
    """Writes a safetensors file tensor by tensor, so that it is never in memory whole.

    plan: {name: (shape, dtype)}. tensors: (name, tensor) pairs; those of one name are its rows, in
    order. metadata: {name: text} for the header.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items() if kind != "F8_E8M0"}
    header, places, end = {"__metadata__": {"format": "pt", **dict(metadata)}}, {}, 0
    for name, (shape, dtype) in plan.items():
        places[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shape),
                        "data_offsets": [places[name], end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc=path.name,
                                        leave=False, delay=1) as bar:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, tensor in tensors:
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.seek(8 + len(header) + places[name])
            file.write(data.numpy())
            places[name] += len(data)
            bar.update(len(data))


# --- Quantized weights --------------------------------------------------------------------------

# ComfyUI's formats: the kind of the stored numbers. What stands beside L.weight, old and new.
FORMATS = {
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fn_rowwise": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int8_tensorwise": "I8", "int8_rowwise": "I8", "nvfp4": "U8", "mxfp8": "F8_E4M3",
}
# The types that each scale may have, where that is not one scale of plain numbers.
SCALE_TYPES = {"nvfp4": (("F8_E4M3", "U8"), FLOATS), "mxfp8": (("U8", "F8_E8M0"),)}
SCALES = {"weight_scale": 0, "scale_weight": 0, "weight_scale_2": 1}
BESIDE_A_WEIGHT = (*SCALES, "comfy_quant", "input_scale", "scale_input")
ROTATED = 256         # columns in a group of ComfyUI's int8 files
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def with_scales(tensors, metadata):
    """Puts what stands beside a weight into its Stored, and takes it out of the names."""
    text = metadata.get("_quantization_metadata", "{}")
    layers = parse_json(text, "the _quantization_metadata of a file").get("layers")
    layers = layers if isinstance(layers, dict) else {}
    weights = {}
    for name, stored in tensors.items():
        layer, _, key = name.rpartition(".")
        if key in BESIDE_A_WEIGHT and f"{layer}.weight" in tensors:
            continue
        options, scales = None, [None, None]
        if key == "weight":
            options = layers.get(layer, layers.get(stored.name.removesuffix(".weight")))
            for word, place in SCALES.items():
                scales[place] = tensors.get(f"{layer}.{word}", scales[place])
            if f"{layer}.comfy_quant" in tensors:
                text = read(tensors[f"{layer}.comfy_quant"]).flatten().view(torch.uint8)
                options = parse_json(bytes(text.tolist()), f"{stored.file}: {layer}.comfy_quant")
        weights[name] = with_format(stored._replace(scales=tuple(scales)), options)
    return weights


def with_format(stored, options):
    """Puts the format of a tensor into its Stored. options: ComfyUI's description, or None."""
    options = {"format": options} if isinstance(options, str) else options or {}
    if isinstance(options, dict) and isinstance(options.get("params"), dict):
        options = {**options, **options["params"]}            # an older spelling
    if not isinstance(options, dict):
        raise UserError(f"{stored.file}: {stored.name} is described by {options!r}")
    guess = {"I8": "int8_tensorwise", "F8_E5M2": "float8_e5m2"}
    guess = guess.get(stored.number_type, "float8_e4m3fn")
    form = str(options.get("format", stored.format if stored.scales[0] is None else guess))
    group = options.get("convrot_groupsize", ROTATED) if options.get("convrot") else 0
    if not fits_format(stored, form, group):
        raise UserError(f"{stored.file}: {stored.name} is of type {stored.number_type} and shape "
                        f"{list(stored.shape)} in the format {form!r} with "
                        f"{describe_scales(stored)}, which this project does not read; {ADVICE}")
    return stored._replace(format=form, group=group)


def describe_scales(stored):
    """The scales of a tensor in words, for an error."""
    given = [f"{scale.number_type} {list(scale.shape)}" for scale in stored.scales if scale]
    return f"scales {' and '.join(given)}" if given else "no scales"


def fits_format(stored, form, group):
    """Whether type, shape, scales and group of a tensor are those of its format."""
    scales = [scale for scale in stored.scales if scale is not None]
    allowed = SCALE_TYPES.get(form, (FLOATS,))
    if form in ("plain", "gguf"):
        return (form == "gguf" or stored.number_type in PLAIN) and not scales
    if FORMATS.get(form) != stored.number_type or len(stored.shape) != 2:
        return False
    if not stored.scales[0] or len(scales) != len(allowed):
        return False
    fits_group = type(group) is int and group in (0, 4, 16, 64, 256, 1024)
    if not fits_group or (group and stored.shape[1] % group):
        return False
    if form == "nvfp4" and math.prod(scales[1].shape) != 1:
        return False
    return all(s.number_type in types for s, types in zip(scales, allowed, strict=True))


def dequantize(stored, first, shape):
    """Rows `first`, first + 1, ... of a tensor in a file, as a tensor of `shape`.

    A plain one comes as it is stored, mapped; a quantized one in float32. The arithmetic and its
    order are those of ComfyUI and of the gguf package, bit for bit.
    """
    whole = math.prod(stored.shape) == math.prod(shape)
    numbers = read(stored, first, None if whole else shape[0])
    if stored.format == "gguf":
        numbers = dequantize_gguf(numbers, stored.number_type)
    elif stored.format == "nvfp4":            # two numbers a byte, the high half first
        numbers = E2M1[torch.stack((numbers >> 4, numbers & 15), -1).flatten(-2).long()]
        scale = tiled_scales(stored, first, numbers.shape, 16).view(torch.float8_e4m3fn).float()
        numbers = scale_groups(numbers, read(stored.scales[1]).float() * scale)
    elif stored.format == "mxfp8":            # the scales are exponents of two
        scale = tiled_scales(stored, first, numbers.shape, 32).float() - 127
        numbers = scale_groups(numbers.float(), scale.exp2())
    elif stored.format != "plain":
        numbers = numbers.float() * row_scales(stored, first, shape[0])
        numbers = rotate(numbers, hadamard(stored.group)) if stored.group else numbers
    if stored.format in PADDED:
        numbers = numbers[:shape[0], :shape[1]]
    return numbers.view(shape)


def quantize_rows(rows, dtype):
    """(rows, columns) -> the same in float8_e4m3fn or int8, and float32 scales (rows, 1)."""
    limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    rows = rows.float()
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / limit
    rows = rows / scale
    return (rows.round() if dtype == torch.int8 else rows).to(dtype), scale


def quantize_weight(weight, dtype):
    """(rows, columns) -> numbers in int8 or float8_e4m3fn, scales (rows, 1), columns in a group.

    int8 weights are rotated in these groups: see rotate.
    """
    group = rotation_group(weight.shape[1]) if dtype == torch.int8 else 0
    parts = []
    for rows in weight.split(256):            # few enough to stay in the processor's cache
        rotated = rotate(rows.float(), hadamard(group, rows.device)) if group else rows
        parts.append(quantize_rows(rotated, dtype))
    numbers, scales = zip(*parts, strict=True)
    return torch.cat(numbers), torch.cat(scales), group


def describe_int8(columns):
    """What ComfyUI's files say of a weight with so many columns from quantize_weight."""
    group = rotation_group(columns)
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    return {"format": "int8_tensorwise", **rotation}


@lru_cache
def hadamard(size, device=None):
    """An orthogonal matrix (size, size) of entries +-1/sqrt(size); size is a power of 4.

    It is symmetric, so it is its own inverse. It is the one of ComfyUI's "convrot" files.
    """
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, h4)
    return matrix.to(device)


def rotate(x, matrix):
    """Each run of n numbers of the last dimension of x times the Hadamard matrix (n, n).

    A product stays the same if input and weight are both rotated. A single large number is
    spread over its run, so that it no longer takes the int8 range from its neighbors.
    """
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix.to(x.dtype)).flatten(-2)


def rotation_group(columns):
    """The largest power of 4, at most 256, that divides the number of columns; 0 if none does."""
    return next((group for group in (256, 64, 16, 4) if columns % group == 0), 0)


def row_scales(stored, first, rows):
    """The scale of each row of a float8 or int8 weight: (rows, 1) float32. One may hold for all."""
    if stored.scales[0] is None:
        return torch.ones(rows, 1)
    scale = read(stored.scales[0]).float().view(-1, 1)
    if not is_finite(scale):
        raise UserError(f"{stored.file}: {stored.scales[0].name} is not finite; it is damaged")
    if len(scale) == 1:
        return scale.expand(rows, 1)
    if len(scale) != stored.shape[0]:
        raise UserError(f"{stored.file}: {stored.name} is scaled in blocks; {ADVICE}")
    return scale[first:first + rows]


def tiled_scales(stored, first, shape, group):
    """The bytes of the scales of nvfp4 and mxfp8, one for `group` columns: (rows, columns / group).

    They are stored for cuBLAS: padded to tiles of 128 x 4, in which scale (r, c) is number
    ((r % 32) * 4 + r // 32) * 4 + c.
    """
    down, across = -(-stored.shape[0] // 128), -(-shape[1] // (group * 4))
    scale = read(stored.scales[0]).view(torch.uint8)
    if scale.numel() != down * across * 512:
        raise UserError(f"{stored.file}: the scales of {stored.name} do not fit")
    scale = scale.view(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(down * 128, -1)
    return scale[first:first + shape[0], :shape[1] // group].contiguous()


def scale_groups(numbers, scale):
    """Multiplies runs of columns by their scale: (rows, n * group), (rows, n)."""
    return (numbers.unflatten(-1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def dequantize_gguf(data, kind):
    """Blocks of a GGUF tensor, uint8 (rows, bytes) -> float32 (rows, numbers)."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise UserError("a quantized GGUF file needs the gguf package: pip install gguf") from None
    return torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[kind]))


def layer_format(stored):
    """"fp8" or "int8" where a layer can use a weight as it is stored, or None."""
    if stored.number_type == "F8_E4M3" and stored.format != "mxfp8" and not stored.group:
        return "fp8"
    return "int8" if stored.number_type == "I8" else None


PADDED = {"nvfp4": 16, "mxfp8": 32}   # both sides of a weight, to a multiple of this


def is_table(name, stored):
    """Whether this is the text encoder's table of words, and not quantized."""
    return name == "model.embed_tokens.weight" and stored.number_type in FLOATS


def fits(stored, shape):
    """Whether a tensor has this shape, but for padding and dimensions of size 1."""
    given = stored.shape
    if stored.format == "nvfp4":
        given = (*given[:-1], 2 * given[-1])
    pad = PADDED.get(stored.format, 1)
    shape = [-(-n // pad) * pad for n in shape]
    return [n for n in given if n != 1] == [n for n in shape if n != 1]


# --- Adapters: LoRA, LoKr, LoHa -----------------------------------------------------------------

# How the keys end: pattern -> our name of the part. Before it come a prefix and a module.
ADAPTER_PARTS = {
    r"(\.lora_A|(\.lora_|[._]lora\.|\.lora_linear_layer\.)down)(\.default)?(\.weight)?$": ".A",
    r"(\.lora_B|(\.lora_|[._]lora\.|\.lora_linear_layer\.)up)(\.default)?(\.weight)?$": ".B",
}
ADAPTER_PREFIX = re.compile(
    r"^(base_model\.model\.)?(model\.diffusion_model\.|diffusion_model\.|transformer\."
    r"|lora_unet__?|lora_transformer_|lycoris_)?")
ADAPTER_KEY = re.compile(
    r"\.lora_|[._]lora\.|\.(lokr|hada)_|\.(dora_scale|b?oft_|lora_magnitude_vector)")
REFUSED_ADAPTERS = {
    r"dora_scale|lora_magnitude_vector": "is a DoRA; programs disagree about its meaning",
    r"\.b?oft_": "is of the OFT kind, which this project does not apply",
    r"\.(lokr|hada)_t[12]$|\.lora_mid": "is made for convolutions, which a DiT does not have",
    r"\.(diff|diff_b|set_weight|lora_B\.bias)$": "changes more than linear weights",
    r"^(text_encoders?\.|lora_te)": "changes the text encoder, which this project does not do",
}
# The parts that make an adapter of one module, beside alpha. _a and _b are multiplied.
ADAPTER_KINDS = [
    {"A", "B"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
]


def read_adapters(adapters, modules):
    """(file, strength) pairs -> {official name: [functions that read a change, see read_change]}.

    modules: {name of a module in such files: [(official name, shape) of the weights in it]}.
    """
    changes = {}
    for path, strength in adapters:
        for name, candidates in read_adapter(Path(path), strength, modules).items():
            changes.setdefault(name, []).append(partial(read_change, path, name, candidates))
    return changes


def read_adapter(path, strength, modules):
    """An adapter file -> {official name: [(scale, parts, first row, rows)]}.

    UserError for anything in the file that cannot be used. A list has two entries where the file
    has q alone and also q, k and v together; read_change compares them.
    """
    tensors, settings = open_adapter(path)
    changes = {}
    for stem, parts in parts_of_adapters(path, tensors, modules).items():
        names, shapes = zip(*modules[ADAPTER_PREFIX.sub("", stem)], strict=True)
        rows = [shape[0] for shape in shapes]
        check_adapter(f"{path}: {stem}", parts, (sum(rows), shapes[0][1]))
        scale = strength * adapter_scale(f"{path}: {stem}", parts, names[0], settings)
        for i, name in enumerate(names):
            entries = changes.setdefault(name, [])
            # A module of its own (one name) goes before one that stands for q, k and v.
            place = 0 if len(names) == 1 else len(entries)
            entries.insert(place, (scale, parts, sum(rows[:i]), rows[i]))
    return changes


def parts_of_adapters(path, tensors, modules):
    """The tensors of an adapter file, sorted: {prefix and module: {part: Stored}}."""
    found, strange = {}, []
    for name, stored in tensors.items():
        for pattern, reason in REFUSED_ADAPTERS.items():
            if re.search(pattern, name):
                raise UserError(f"{path} {reason} (it holds {name})")
        stem, _, part = rename(name, ADAPTER_PARTS).rpartition(".")
        if ADAPTER_PREFIX.sub("", stem) not in modules:
            strange.append(name)
        elif stored.number_type not in (PLAIN + INTEGERS if part == "alpha" else PLAIN):
            raise UserError(f"{path}: {name} has numbers of type {stored.number_type}, "
                            "which no adapter should have")
        parts = found.setdefault(stem, {})
        if part in parts:
            raise UserError(f"{path} says the same twice: {parts[part].name} and {name}")
        parts[part] = stored
    if strange or not found:
        fault = f"there is no place for {some(strange)}" if strange else "it holds no tensors"
        raise UserError(f"{path} is no adapter, or one for another model: {fault}")
    return found


def open_adapter(path):
    """The tensors of an adapter, a file or a folder of peft's, and peft's settings for it."""
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors, metadata = open_files([path])
    beside = path.parent / "adapter_config.json"
    if path.name == "adapter_model.safetensors" and beside.exists():
        settings = read_json(beside)
    else:                                     # diffusers writes them into the header
        text = metadata.get("lora_adapter_metadata", "{}")
        settings = {name.removeprefix("transformer."): value
                    for name, value in parse_json(text, f"{path}: lora_adapter_metadata").items()}
    check_peft(settings, path)
    return tensors, settings


# Settings of peft's LoraConfig that make an adapter more than B A.
NOT_PLAIN_LORA = ("use_dora", "bias", "lora_bias", "modules_to_save", "layer_replication",
                  "use_qalora", "alora_invocation_tokens", "trainable_token_indices",
                  "target_parameters", "arrow_config")
# Others change the weights below the adapter as well (PiSSA, OLoRA, LoftQ, CorDA).
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def check_peft(settings, path):
    """UserError where peft's settings are not those of a plain LoRA."""
    off = (None, False, "none", [], {})
    strange = [key for key in NOT_PLAIN_LORA if settings.get(key) not in off]
    if settings.get("init_lora_weights") not in PLAIN_STARTS:
        strange.append("init_lora_weights")
    if settings.get("use_rslora") not in (None, True, False):
        strange.append("use_rslora")
    if settings.get("peft_type", "LORA") != "LORA":
        strange.append("peft_type")
    if strange:
        values = ", ".join(f"{key} = {settings[key]!r}"[:200] for key in strange)
        raise UserError(f"{path}: of peft's adapters only the plain LoRA is supported; here "
                        f"{values}")


def adapter_scale(where, parts, official, settings):
    """alpha / rank; 1 where neither the file nor peft's settings have an alpha."""
    low = [parts[key] for key in ("A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in parts]
    if not low:                               # LoKr of two whole matrices: its alpha means nothing
        return 1.0
    rank = low[0].shape[0]
    patterns = settings.get("alpha_pattern") or {}
    alpha, root = settings.get("lora_alpha", rank), bool(settings.get("use_rslora"))
    try:
        module = official.removesuffix(".weight")
        found = [value for pattern, value in patterns.items()
                 if re.match(rf"(.*\.)?({pattern})$", module)]
        alpha = found[0] if found else alpha
    except (AttributeError, re.error) as error:
        raise UserError(f"{where}: alpha_pattern is {patterns!r}: {error}") from None
    if "alpha" in parts:
        numbers = read(parts["alpha"]).float().flatten().tolist()
        alpha, root = numbers[0] if numbers else None, False
    if not is_number(alpha):
        raise UserError(f"{where}: alpha is {alpha!r}, which is not a number")
    return alpha / (math.sqrt(rank) if root else rank)


def check_adapter(where, parts, shape):
    """UserError where the parts are not complete, or do not give a change of this shape."""
    kind = parts.keys() - {"alpha"}
    if kind not in ADAPTER_KINDS:
        raise UserError(f"{where} has only {some(parts.keys())}")
    given = adapter_shape({key: parts[key].shape for key in kind})
    if given != shape:
        raise UserError(f"{where} is made for another model: it gives {given or 'no matrix'}, the "
                        f"weight is {shape}")


def adapter_shape(shapes):
    """The shape of adapter_product, from those of the parts; None where they do not go together."""
    flat = {key: (shape[0], math.prod(shape[1:])) if shape else (0, 0)
            for key, shape in shapes.items()}
    if "A" in flat:
        flat = {"w_a": flat["B"], "w_b": flat["A"]}
    matrices = [flat[name] for name in sorted(flat) if name[-1] in "12"]
    for name in sorted(flat):
        if name.endswith("_a"):
            (rows, inner), (rank, columns) = flat[name], flat[f"{name[:-1]}b"]
            matrices.append((rows, columns) if inner == rank > 0 else (0, 0))
    if "hada_w1_a" in flat:
        return matrices[0] if matrices[0] == matrices[1] else None
    return tuple(map(math.prod, zip(*matrices, strict=True)))


def adapter_product(parts):
    """The change of a weight without its scale: B A, or the products of LoHa and LoKr (LyCORIS)."""
    if "A" in parts:
        return parts["B"] @ parts["A"]
    kind = "hada" if "hada_w1_a" in parts else "lokr"
    one, two = (parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]
                for name in (f"{kind}_w1", f"{kind}_w2"))
    return one * two if kind == "hada" else torch.kron(one, two)


def read_change(path, name, candidates):
    """The change of one weight: (scale, B, A), where the change is scale * B A.

    Of LoHa and LoKr, A is None and B is the whole product. Where a file says a change twice, as q
    and as qkv, it counts once.
    """
    changes = []
    for scale, parts, first, rows in candidates:
        tensors = {key: read(parts[key]).float().flatten(1) for key in parts if key != "alpha"}
        for key, tensor in tensors.items():
            if not is_finite(tensor):
                raise UserError(f"{path}: {parts[key].name} is not finite; it is damaged")
        if "A" in tensors:                    # the rows of B A are those of B
            changes.append((scale, tensors["B"][first:first + rows], tensors["A"]))
        else:
            changes.append((scale, adapter_product(tensors)[first:first + rows], None))
    if len(changes) > 1:
        one, *others = (scale * (b if a is None else b @ a) for scale, b, a in changes)
        if any((other - one).norm() > 0.02 * one.norm() for other in others):
            raise UserError(f"{path} says two different things about {name}")
    return changes[0]


def add_changes(weight, changes, dtype):
    """weight + the changes of adapters, added in float32, in `dtype`.

    A few rows at a time: they stay in the processor's cache, and in memory that is there already.
    """
    changes = [change() for change in changes]
    result = torch.empty(weight.shape, dtype=dtype)
    for first in range(0, len(weight), 256):
        rows = slice(first, first + 256)
        part = weight[rows].float()
        for scale, b, a in changes:
            if a is None:
                part = part.add(b[rows], alpha=scale)
            else:
                part = torch.addmm(part, b[rows], a, alpha=scale)
        result[rows] = part
    return result


# --- Configurations and tokenizers --------------------------------------------------------------

# What an official file must say, for model.py and sampler.py do only this; also what we write.
# The first key of a config.json says what it is and must be there.
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
    "tokenizer": {"add_prefix_space": False, "add_bos_token": False, "add_eos_token": False,
                  "split_special_tokens": False},
}
# The names of pipelines that sample these networks, so that model_index.json may have them.
PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
# Other classes in model_index.json that compute the same.
OTHER_CLASSES = {"tokenizer": ("Qwen2TokenizerFast", "PreTrainedTokenizerFast"),
                 "text_encoder": ("Qwen3Model",)}
# Keys that do not change a picture. There is a warning for every other key.
WITHOUT_EFFECT = set("""_diffusers_version _name_or_path architectures attention_dropout
    base_image_seq_len base_shift bos_token_id dtype eos_token_id force_upcast initializer_range
    max_image_seq_len max_position_embeddings max_shift max_window_layers pad_token_id sample_size
    sliding_window tie_word_embeddings time_shift_type torch_dtype transformers_version
    use_cache""".split())
# The same in a tokenizer_config.json: tokenizer.json says it all. The chat template is compared.
TOKENIZER_KEYS = set("""added_tokens_decoder additional_special_tokens backend bos_token
    chat_template clean_up_tokenization_spaces cls_token eos_token errors extra_special_tokens
    fix_mistral_regex is_local legacy local_files_only mask_token max_length model_input_names
    model_max_length model_specific_special_tokens name_or_path pad_to_multiple_of pad_token
    pad_token_type_id padding_side processor_class sep_token special_tokens_map_file stride
    tokenizer_class tokenizer_file truncation_side truncation_strategy unk_token
    use_default_system_prompt use_fast""".split())
# What the reference takes for a field that a config.json lacks, where that is not the release's.
REFERENCE_DEFAULTS = {
    "text_encoder": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
                     "num_key_value_heads": 32, "rope_theta": 1e4},
    "dit": {"axes_lens": [1024, 512, 512]},
    "vae": {"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4,
            "scaling_factor": 0.18215, "shift_factor": None},
}
# Three such widths give a tensor that can be described, if not held: below 2 ** 63 bytes.
LARGEST_INT = 2 ** 20
TYPES = {int: f"a whole number from 1 to {LARGEST_INT}", float: "a number",
         tuple: f"a list of whole numbers from 1 to {LARGEST_INT}"}
# What a checkpoint says about how it is sampled.
SETTINGS = {"shift": float, "steps": int, "guidance": float, "size": int, "trained_steps": int}
LARGEST = {"shift": 1e3, "steps": 10_000, "guidance": 1e3, "size": 2 ** 15, "trained_steps": 10_000}
CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NETWORKS = {
    "text_encoder": (TextEncoder, TextEncoderConfig),
    "dit": (DiT, DiTConfig),
    "vae": (VAE, VAEConfig),
}
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


def parse_config(kind, data, path, official):
    """A JSON object -> the network's configuration. UserError where there is no such network."""
    fields = {field.name: field.default for field in dataclasses.fields(NETWORKS[kind][1])}
    if not isinstance(data, dict):
        raise UserError(f"{path} has no section {kind}")
    if official:
        check_official(data, kind, path, {*fields, *derived_fields(kind, NETWORKS[kind][1]()),
                                          "layer_types", "rope_parameters", "rope_scaling"})
        data = {**fields, **REFERENCE_DEFAULTS[kind], **data, **rotary_theta(data, path)}
    elif data.keys() != fields.keys():        # ours are always written whole
        raise UserError(f"{path}: the section {kind} misses or does not know "
                        f"{some(fields.keys() ^ data.keys())}")
    for name, default in fields.items():
        good = has_type(data[name], type(default))
        if not good or ("layers" in name and data[name] > 1000):
            what = "from 1 to 1000" if "layers" in name else TYPES[type(default)]
            raise UserError(f"{path}: {name} should be {what}, not {data[name]!r}")
    config = NETWORKS[kind][1](**{name: type(default)(data[name])
                                  for name, default in fields.items()})
    if not is_possible(kind, config):
        raise UserError(f"{path} describes a network that cannot be built: its widths, heads and "
                        "groups do not divide each other")
    if official:
        check_values(data, derived_fields(kind, config), path)
    return config


def write_official_json(folder, configs, settings):
    """Writes the configurations of an official directory. configs: {kind: configuration}."""
    for kind, config in configs.items():
        data = {**REQUIRED[kind], **dataclasses.asdict(config), **derived_fields(kind, config)}
        if kind == "text_encoder":
            data |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
        write_json(folder / FOLDERS[kind] / "config.json", data)
    scheduler = {**REQUIRED["scheduler"], "shift": settings["shift"]}
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    more = {key: value for key, value in settings.items() if key != "shift"}
    if more:
        write_json(folder / SAMPLING_FILE, more)
    for name, content in OFFICIAL_JSON.items():
        write_json(folder / name, content)


def embedded_config(kind, metadata):
    """The configuration in the header of a file that this project wrote, or None."""
    text, where = metadata.get(f"z_image_{kind}"), f"z_image_{kind} in the header of a file"
    return parse_config(kind, parse_json(text, where), where, official=False) if text else None


def config_like(kind, like):
    """The configuration of another place; where there is none, the release's."""
    has_one = like is not None and (Path(like) / "config.json").exists()
    return read_config(kind, Path(like))[0] if has_one else NETWORKS[kind][1]()


def read_config(kind, folder):
    """config.json in a network's folder -> its configuration, and whether the layout is official.

    In our layout one file has the sections of all networks.
    """
    source = folder / "config.json"
    data = read_json(source)
    if NETWORKS.keys() & data.keys() or (folder / f"{kind}.safetensors").exists():
        return parse_config(kind, data.get(kind), source, official=False), False
    if "quantization_config" in data or (folder / "quantization_config.json").exists():
        raise UserError(f"{folder}: the weights are quantized (quantization_config); {ADVICE}")
    return parse_config(kind, data, source, official=True), True


def has_type(value, kind):
    """Whether a value from a JSON file can be an int from 1 on, a float, a tuple of such ints."""
    if kind is tuple:
        return isinstance(value, (list, tuple)) and value and all(has_type(n, int) for n in value)
    if kind is float:
        return is_number(value)
    return is_number(value) and isinstance(value, int) and 0 < value <= LARGEST_INT


def is_possible(kind, c):
    """Whether widths, heads and groups divide each other as model.py needs it."""
    if kind == "dit":
        return (len(c.axes_dims) == len(c.axes_lens) == 3 and not any(d % 2 for d in c.axes_dims)
                and sum(c.axes_dims) * c.n_heads == c.dim)
    if kind == "text_encoder":
        return c.num_attention_heads % c.num_key_value_heads == 0 and c.head_dim % 2 == 0
    return not any(width % c.norm_num_groups for width in c.block_out_channels)


def derived_fields(kind, config):
    """What else an official config.json says that follows from our fields."""
    if kind == "vae":
        levels = len(config.block_out_channels)
        return {"out_channels": config.in_channels,
                "down_block_types": ["DownEncoderBlock2D"] * levels,
                "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"n_kv_heads": config.n_heads} if kind == "dit" else {}


def rotary_theta(data, path):
    """Qwen's rotary embedding in its newer or older spelling -> {} or {"rope_theta": ...}."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1 or rope.keys() - known:
        raise UserError(f"{path}: only the plain rotary embedding is supported, not {rope!r}")
    layer_types = data.get("layer_types") or []
    if not isinstance(layer_types, list) or {*map(str, layer_types)} - {"full_attention"}:
        raise UserError(f"{path}: only full_attention is supported in layer_types")
    return {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}


def check_official(data, kind, path, known):
    """UserError where an official file is not of its kind; a warning for keys that nobody knows."""
    name = next(iter(REQUIRED[kind]))
    if name not in data and name in ("_class_name", "model_type"):
        raise UserError(f"{path} has no {name}, so it is not that of a {REQUIRED[kind][name]}")
    check_values(data, REQUIRED[kind], path)
    warn_of_unknown(data.keys() - REQUIRED[kind].keys() - known, path)


def check_model_index(path):
    """UserError where a directory is that of another pipeline."""
    index = read_json(path) if path.exists() else {}
    if index.get("_class_name", PIPELINES[0]) not in PIPELINES:
        raise UserError(f"{path}: _class_name is {index['_class_name']!r}; only "
                        f"{', '.join(PIPELINES)} are supported")
    usual = OFFICIAL_JSON["model_index.json"]
    warn_of_unknown(index.keys() - usual.keys(), path)
    for part in index.keys() & usual.keys() - {"_class_name"}:
        names = [usual[part][1], *OTHER_CLASSES.get(part, ())]
        if not isinstance(index[part], list) or index[part][-1:] not in [[name] for name in names]:
            raise UserError(f"{path}: {part} is {index[part]!r}; only {some(names)} is supported")


def warn_of_unknown(keys, path):
    for key in sorted(keys - WITHOUT_EFFECT):
        warnings.warn(f"{path}: {key} is not known, and ignored", stacklevel=2)


def check_values(data, required, path):
    for key, value in required.items():
        if data.get(key, value) != value:
            raise UserError(f"{path}: {key} is {data[key]!r}; only {value!r} is supported")


def check_settings(settings, path):
    """UserError where a setting is not known or out of range -> settings."""
    for key, value in settings.items():
        if key not in SETTINGS:
            raise UserError(f"{path}: {key} is not known")
        kind = SETTINGS[key]
        if key == "trained_steps" and isinstance(value, (list, tuple)):
            kind = tuple              # a student for several numbers of steps
        if not has_type(value, kind) or (kind is float and value < 0):
            raise UserError(f"{path}: {key} should be {TYPES[SETTINGS[key]]}, not {value!r}")
        if max(value if kind is tuple else [value]) > LARGEST[key]:
            raise UserError(f"{path}: {key} is {value!r}, which is above {LARGEST[key]}")
    return settings


@contextmanager
def panics_are_errors():
    """In it the tokenizers library's PanicException, which is no Exception, is a RuntimeError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeError(str(error)) from None


def encode(tokenizer, text, add_special_tokens=False):
    """tokenizer.encode; what goes wrong in it is an Exception."""
    with panics_are_errors():
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def read_tokenizer(path):
    """A tokenizer.json -> tokenizers.Tokenizer, as it stands there."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        text = path.read_text(encoding="utf-8")
        if re.search(r'"continuing_subword_prefix":\s*"[^"]', text):    # it may end the process
            raise UserError(f"{path} has a continuing_subword_prefix, which Z-Image's has not")
        with panics_are_errors():
            return Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:                # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer file: {error}") from None


def load_tokenizer(path):
    """A tokenizers.Tokenizer from a tokenizer.json, or from the folder it is in.

    The file remembers padding and truncation of the last call. They are not the model's.
    """
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    tokenizer = read_tokenizer(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(f"{path} has a dropout: a prompt would not always be the same tokens")
    texts = "<|im_start|>", "<|im_end|>", "<|im_start|>a cat<|im_end|>"
    try:
        whole, bare = ([encode(tokenizer, text, special).ids for text in texts]
                       for special in (True, False))
    except Exception as error:
        raise UserError(f"{path} cannot read a prompt: {error}") from None
    for token, ids in zip(texts[:2], bare, strict=False):     # of the chat template
        if len(ids) != 1:
            raise UserError(f"{path} does not know {token}, so it belongs to another model")
    if whole != bare:
        raise UserError(f"{path} adds tokens to each prompt (its post_processor), which Z-Image "
                        "was not trained with")
    check_added_tokens(tokenizer, path.parent / "tokenizer_config.json")
    return tokenizer


def save_tokenizer(tokenizer, path):
    """Writes a tokenizer.json. The library cannot: it takes only names that are UTF-8."""
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def check_added_tokens(tokenizer, path):
    """UserError where tokenizer_config.json adds tokens that tokenizer.json does not have."""
    config = read_json(path) if path.exists() else {}
    try:
        added = config.get("added_tokens_decoder") or {}
        wanted = [(entry["content"], int(number)) for number, entry in added.items()]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = config.get(key) or ()
            tokens = tokens.values() if isinstance(tokens, dict) else tokens
            wanted += [(t["content"] if isinstance(t, dict) else t, None) for t in tokens]
        found = [(token, number, tokenizer.token_to_id(token)) for token, number in wanted]
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UserError(f"{path} does not list its added tokens as transformers does") from None
    for token, number, known in found:
        if known is None or number not in (None, known):
            raise UserError(f"{path} adds the token {token!r}, which tokenizer.json does not have")


def check_chat_template(folder):
    """UserError where an official tokenizer is called in another way than sampler.py calls it."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    check_official(config, "tokenizer", path, TOKENIZER_KEYS)
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        path = folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8", errors="replace")
    if template is None:
        return
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # PyTorch brings it
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    case = {"messages": [{"role": "user", "content": "a cat"}], "add_generation_prompt": True,
            "enable_thinking": True}
    try:
        prompts = {environment.from_string(t).render(case) for t in (template, CHAT_TEMPLATE)}
    except Exception as error:                # a template is a program
        raise UserError(f"{path}: the chat template does not work: {error}") from None
    if len(prompts) > 1:
        raise UserError(f"{path}: the chat template is not Qwen3's, which Z-Image was trained with")


def check_together(tokenizer, text_encoder, dit, vae):
    """UserError where tokenizer and configurations do not belong together."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    problem = None
    if largest >= text_encoder.vocab_size:
        problem = f"the tokenizer's token {largest} is not among {text_encoder.vocab_size}"
    elif dit.cap_feat_dim != text_encoder.hidden_size:
        problem = "the DiT expects text features of another width"
    elif dit.in_channels != vae.latent_channels:
        problem = "DiT and VAE have different latent channels"
    elif dit.axes_lens[0] < 514:              # a caption of 512 tokens, the image behind it
        problem = "the DiT has no positions for 512 text tokens"
    if problem:
        raise UserError(f"the parts of the model do not belong together: {problem}")


# --- Models: which files belong together --------------------------------------------------------

FOLDERS = {"text_encoder": "text_encoder", "dit": "transformer", "vae": "vae"}
# A network is recognized by one of its tensors, behind one of these prefixes.
SIGNATURES = {
    "text_encoder": ("model.embed_tokens.weight", "embed_tokens.weight", "token_embd.weight"),
    "dit": ("cap_embedder.1.weight",),
    "vae": ("decoder.conv_in.weight",),
}
PREFIXES = {
    "text_encoder": ("", "text_encoders.qwen3_4b.transformer."),
    "dit": ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer."),
    "vae": ("", "vae.", "first_stage_model."),
}
ARCHITECTURES = ("qwen3", "lumina2", "pig", "cow")    # of GGUF files; not all name one
UNUSED_ENDINGS = ("scaled_fp8", "text_encoders.qwen3_4b.logit_scale")
USUAL_FILES = {"dit": "z_image_turbo_bf16.safetensors", "text_encoder": "qwen_3_4b.safetensors",
               "vae": "ae.safetensors", "tokenizer": "tokenizer.json"}
SAMPLING_FILE = "sampling.json"       # our settings in an official directory, beside the shift


def find_parts(path, named):
    """The parts of a model that are not named: {part: file or folder}, and its settings."""
    path = located(path, named)
    own = own_settings(path)
    if own is not None:
        return {**dict.fromkeys(NETWORKS, path), "tokenizer": path / "tokenizer.json"}, own
    if path.is_file() and path.stem in NETWORKS and own_settings(path.parent) is not None:
        raise UserError(f"{path} is one of the files of a model; give --model {path.parent}")
    if not (path / "transformer").is_dir() and not (path / "model_index.json").exists():
        return find_single_files(path, named), {}
    settings = official_settings(path)
    check_chat_template(path / "tokenizer")
    check_model_index(path / "model_index.json")
    places = {kind: path / folder for kind, folder in FOLDERS.items()}
    places["tokenizer"] = path / "tokenizer" / "tokenizer.json"
    return places, settings


def official_settings(path):
    """The settings of a model in the official layout: scheduler, and what a student adds."""
    source = path / "scheduler" / "scheduler_config.json"
    config = read_json(source)
    check_official(config, "scheduler", source, {"shift"})
    more = read_json(path / SAMPLING_FILE) if (path / SAMPLING_FILE).exists() else {}
    check_settings(more, path / SAMPLING_FILE)
    if "shift" in more:
        raise UserError(f"{path / SAMPLING_FILE}: the shift belongs into {source}")
    return check_settings({**more, "shift": config.get("shift")}, source)


def settings_of_dit(place):
    """The settings of the model that a DiT's file or folder is of; None where nothing says them."""
    folder = place if place.is_dir() else place.parent
    if place.is_dir() or place.stem == "dit":
        own = own_settings(folder)
        if own is not None:
            return own
    is_official = folder.name == "transformer" and (folder.parent / "scheduler").is_dir()
    return official_settings(folder.parent) if is_official else None


def own_settings(folder):
    """The settings in the config.json of a folder in our layout; None for any other path."""
    place = folder / "config.json"
    config = read_json(place) if place.exists() else {}
    if not (NETWORKS.keys() & config.keys() or (config and (folder / "dit.safetensors").exists())):
        return None
    settings = {key: config[key] for key in config.keys() - NETWORKS.keys()}
    return check_settings({"shift": None, **settings}, place)


def path_name(text):
    """An argparse type: the name of a file, a folder or a model; an empty one is a mistake."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def is_hub_name(path):
    return (re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)) is not None
            and not Path(path).exists())


def located(path, named=()):
    """A path as it is; for a name on the hub the folder that it is fetched to."""
    return download(str(path), named) if is_hub_name(path) else Path(path)


def find_single_files(path, named):
    """One file for each network, in a folder or beside a file.

    A network is recognized by names of tensors (SIGNATURES); names of files do not matter.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist, and is no model on the hub")
    folder = path if path.is_dir() else path.parent
    places = {}
    if path.is_file():
        places = dict.fromkeys(split_parts(*read_header(path), path), path)
    for kind, files in files_by_network(folder).items():
        if kind not in places and kind not in named:
            if len(files) > 1:
                raise UserError(f"{folder} has several files for the {kind}, name one of them: "
                                f"{some([file.name for file in files])}")
            places[kind] = files[0]
    for tokenizer in (folder / "tokenizer.json", folder / "tokenizer" / "tokenizer.json"):
        if tokenizer.exists():
            places.setdefault("tokenizer", tokenizer)
    if not places:
        raise UserError(f"{path} is not a model directory: it holds neither transformer/ (official "
                        "layout) nor dit.safetensors (ours) nor a file for each network")
    return places


def files_by_network(folder):
    """{kind: files in this folder that hold such a network}."""
    found = {}
    for file in weight_files(folder):
        with suppress(UserError):             # adapters and other models may lie there, too
            for kind in split_parts(*read_header(file), file):
                found.setdefault(kind, []).append(file)
    return found


def weight_files(folder):
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])


def left_out(path):
    """Why files_by_network could not take some files of a folder: said where a part is missing."""
    if path is None or not Path(path).exists():
        return ""
    faults, path = [], Path(path)
    for file in weight_files(path if path.is_dir() else path.parent):
        try:
            split_parts(*read_header(file), file)
        except UserError as error:
            faults.append(str(error))
    return "; not taken: " + "; ".join(faults[:3]) if faults else ""


def download(name, named):
    """Fetches the parts of a model on the hub that are not named -> its folder in the hub's cache.

    First what is small: the indices say which weights there are. Of variants one is fetched.
    The library honors HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME, and goes on where it was stopped.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    wanted = ["model_index.json", "scheduler/*.json", "config.json", SAMPLING_FILE,
              "tokenizer/*.j*", "tokenizer.json", *(f"{path}/*.json" for path in FOLDERS.values())]
    try:
        path = Path(snapshot_download(name, allow_patterns=wanted))
        try:
            listed = HfApi().list_repo_files(name)
        except Exception:                     # without a network the cache may have all
            listed = [file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")]
        weights = wanted_weights(path, listed, named)
        return Path(snapshot_download(name, allow_patterns=weights)) if weights else path
    except errors.GatedRepoError:
        reason = ("the hub asks for consent to this model's terms: give it on the model's page, "
                  "then log in with: hf auth login")
    except errors.RepositoryNotFoundError:
        reason = "there is no such directory, and no such model on the hub"
    except errors.LocalEntryNotFoundError:
        reason = "there is no such directory, and the hub cannot be reached"
    except UserError:
        raise
    except Exception as error:                # whatever the network libraries raise
        reason = f"the download was interrupted, call again to go on: {str(error)[:200]!r}"
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            reason = f"the download cannot be written: {error.strerror}"
    raise UserError(f"{name}: {reason}")


# Of the disk, not of the network. EDQUOT is not there on Windows.
DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
               getattr(errno, "EDQUOT", errno.ENOSPC)}


def wanted_weights(path, listed, named):
    """Of the files listed of a model, those of the networks that are not named.

    What the index names, or else a single file, as in shard_files. path: where the indices lie.
    """
    files = []
    for kind, folder in FOLDERS.items():
        if kind in named:
            continue
        if f"{kind}.safetensors" in listed:
            files.append(f"{kind}.safetensors")
        elif any((path / folder).glob("*.safetensors.index*.json")):
            files += [f"{folder}/{file.name}" for file in shard_files(path / folder)]
        else:
            found = [name for name in listed if re.fullmatch(rf"{folder}/[^/]*\.safetensors", name)]
            files += [f"{folder}/{file.name}" for file in chosen_weights(map(Path, found), folder)]
    return files


def split_parts(tensors, metadata, path):
    """The tensors of a file by network, without prefixes: {kind: {name: Stored}}.

    UserError for what belongs to none of the networks that are there, and for what is known but
    not read.
    """
    for key in metadata.keys() & REFUSED_METADATA.keys():
        raise UserError(f"{path} is made for {REFUSED_METADATA[key]} (its header has {key}); "
                        f"{ADVICE}")
    for name, pattern in itertools.product(tensors, REFUSED):
        if re.search(pattern, name):
            raise UserError(f"{path} {REFUSED[pattern]} (it holds {name})")
    prefixes = {kind: prefix for kind, signatures in SIGNATURES.items()
                for prefix in PREFIXES[kind] for name in signatures if prefix + name in tensors}
    parts, lost = {kind: {} for kind in prefixes}, []
    for name, stored in tensors.items():
        if ADAPTER_KEY.search(name):
            raise UserError(f"{path} is an adapter: give it by --lora (it holds {name})")
        owners = [kind for kind, prefix in prefixes.items() if name.startswith(prefix)]
        if owners and not name.endswith(UNUSED_ENDINGS):
            kind = max(owners, key=lambda kind: len(prefixes[kind]))
            parts[kind][name.removeprefix(prefixes[kind])] = stored
        elif not name.endswith(UNUSED_ENDINGS):
            lost.append(name)
    if parts and lost:
        raise UserError(f"{path} holds tensors of no network that is known: {some(lost)}")
    return parts


def component_files(kind, path):
    """The files of a network and its configuration; None where a file has none beside it."""
    if not path.is_dir():
        return [path], None
    config, official = read_config(kind, path)
    return shard_files(path) if official else [path / f"{kind}.safetensors"], config


def plain_first(paths):
    """Sorted, those without the name of a variant first."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def chosen_weights(files, folder):
    """Of the weight files in an official folder those to read: all shards, or one file.

    diffusers and transformers know them by their names. Another name is used if it is the only
    one, but for variants.
    """
    files = plain_first(files)
    official = [file for file in files
                if re.match(r"(diffusion_pytorch_)?model[.-]", file.name)]
    files = official or files
    if any("-of-" in file.name for file in files[:1]):
        return files
    if len({file.name.split(".")[0] for file in files}) > 1:
        raise UserError(f"{folder} has several files of weights, and only one can be meant: "
                        f"{some([file.name for file in files])}")
    return files[:1]


def shard_files(folder):
    """The weights of an official component: what its index names, or the only file.

    Names may have a variant: model.fp16.safetensors, model.safetensors.index.fp16.json. Plain names
    come first.
    """
    indices = plain_first(folder.glob("*.safetensors.index*.json"))
    if not indices:
        files = chosen_weights(folder.glob("*.safetensors"), folder)
        if not files:
            raise UserError(f"{folder} holds no .safetensors file: the weights are missing")
        return files
    weight_map = read_json(indices[0]).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for name in names or [None]:
        good = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not good or not name.endswith(".safetensors"):
            raise UserError(f"{indices[0]} names the shard {name!r}, which is not the name of a "
                            ".safetensors file in this directory")
    return [folder / name for name in sorted(set(names))]


# MD5 of the files of the Z-Image-Turbo release.
OFFICIAL_MD5 = dict(reversed(line.split()) for line in """
    5e3226ed72a9a4a080f2a4ca78b98ddc model_index.json
    ca682fcc6c5a94cf726b7187e64b9411 scheduler/scheduler_config.json
    1e97eb35d9d0b6aa60c58a8df8d7d99a text_encoder/config.json
    30b85686b9a9b002e012494fadc027cb text_encoder/model-00001-of-00003.safetensors
    e6a24ea164404a01ad2800dbae4e1a13 text_encoder/model-00002-of-00003.safetensors
    09e190ed15ff14795b6277e023cfcb2d text_encoder/model-00003-of-00003.safetensors
    589f5395156900f49d617aee8a8d8708 text_encoder/model.safetensors.index.json
    6423133b9cc1a2077b57822c30c211aa tokenizer/tokenizer.json
    b06e103ac555ec4b51266078b518c0f0 tokenizer/tokenizer_config.json
    baed87136fe5f848e24b072f99856cc3 transformer/config.json
    54889d0dd179b4fa2fd7bd0e487d856e transformer/diffusion_pytorch_model-00001-of-00003.safetensors
    fe81e804658d345323512c63224b0604 transformer/diffusion_pytorch_model-00002-of-00003.safetensors
    4e074e09129f98ad840414951f122feb transformer/diffusion_pytorch_model-00003-of-00003.safetensors
    76d788eb0d42c59cc8f8ec007db639aa transformer/diffusion_pytorch_model.safetensors.index.json
    ba9e2980c8630b4abccc643bc9f4a542 vae/config.json
    6f83de55cb720c7fae051b14528577bf vae/diffusion_pytorch_model.safetensors
""".strip().splitlines())


def check_release(path):
    """Compares a download with the release: [(file, "ok", "missing" or "wrong")]."""
    path, results = Path(path), []
    if not path.is_dir():
        raise UserError(f"{path} is not a directory")
    for name, expected in tqdm(OFFICIAL_MD5.items(), "reading", leave=False):
        state = "missing"
        if (path / name).is_file():
            md5 = hashlib.md5()
            with open(path / name, "rb") as file:
                while block := file.read(1 << 23):
                    md5.update(block)
            state = "ok" if md5.hexdigest() == expected else "wrong"
        results.append((name, state))
    return results


def fingerprint(path):
    """A hash of what is in a file, or in the model files (else all files) of a directory.

    Of weights above 64 MB only 1,024 evenly spaced blocks of 4 KB are read, so that 20 GB take a
    moment: other weights are noticed, a single changed number may not be. The place does not count.
    """
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    models = [file for file in files if file.suffix in (".safetensors", ".gguf", ".json")]
    digest = hashlib.sha256()
    try:
        for file in models or files:
            size = file.stat().st_size
            name = file.relative_to(path).as_posix()
            digest.update(f"{name} {size}\n".encode("utf-8", "surrogateescape"))
            is_sampled = size > 1 << 26 and file.suffix in (".safetensors", ".gguf")
            with open(file, "rb") as data:
                for i in range(1024 if is_sampled else 0):
                    data.seek((size - 4096) * i // 1023)
                    digest.update(data.read(4096))
                while not is_sampled and (block := data.read(1 << 23)):
                    digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()[:16]


# --- Small things ------------------------------------------------------------------------------


def rename(name, table):
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


class UserError(Exception):
    """A mistake that the user can mend, said in one sentence. It is printed; the exit code is 2."""


def is_finite(tensor):
    """Whether all numbers of a tensor are. If one is not, neither is their sum, which is fast."""
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def damaged_weights(module):
    """Names of weights that are not finite: what to blame where a network's output is not."""
    return [name for name, tensor in module.state_dict().items()
            if tensor.is_floating_point() and not is_finite(tensor)]


def advice_for(dtype):
    """What to do where sampling in this dtype, a name, gives numbers that are not finite."""
    too_large = "weights, or numbers in a config.json, are too large"
    return "use --dtype bfloat16 or float32" if dtype == "float16" else too_large


def find_cause(pipeline, otherwise):
    """Why numbers are not finite: the damaged weights, or if there are none, `otherwise`."""
    networks = {kind: getattr(pipeline, kind) for kind in NETWORKS}
    names = [f"{name} ({kind})" for kind, net in networks.items()
             for name in damaged_weights(net)]
    return f"damaged weights are to blame: {some(names)}" if names else otherwise


def is_number(value):
    """Whether a value from a JSON file is a number that float32 can hold; NaN is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def read_json(path):
    """The JSON object in a file. UserError where there is none."""
    try:
        return parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def write_json(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parse_json(text, where):
    """The JSON object in a text. UserError where there is none."""
    try:
        data = json.loads(text, object_pairs_hook=unique)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where} should hold a JSON object, not {type(data).__name__}")
    return data


def some(names, limit=8):
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:200] for name in sorted(names)[:limit]) + more
