"""Every file layout in and out: official release directories, our own layout, and the checks on both.

    python convert_weights.py SRC DST [--dtype bfloat16]    any layout -> ours
    python convert_weights.py SRC DST --to official         any layout -> a directory diffusers opens
    python convert_weights.py --check DIR                   MD5 of a downloaded Turbo release

Official layout (what diffusers' ZImagePipeline reads): transformer/, text_encoder/, vae/, each with its config.json
and one or several .safetensors; tokenizer/tokenizer.json; scheduler/scheduler_config.json.
Ours: config.json, dit.safetensors, text_encoder.safetensors, vae.safetensors, tokenizer.json in one directory.

A tensor is always moved piece by piece, a piece being one official tensor: it is either a whole tensor of ours or, where
ours stacks several (q, k, v; gate and up), some of its rows. So no more than one piece is in memory on the way,
whichever layouts lie at the two ends. Nothing is ever unpickled.
"""

import argparse
import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:           # Windows
    fcntl = None

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tqdm import tqdm

from model import VAE, DiT, DiTConfig, Linear, TextEncoder, TextEncoderConfig, VAEConfig, quantise


# --- The tables: all there is to know about the official layout ---------------------------------------------

NETWORKS = {"text_encoder": (TextEncoder, TextEncoderConfig), "dit": (DiT, DiTConfig), "vae": (VAE, VAEConfig)}
OFFICIAL_FILES = {"text_encoder": "text_encoder/model", "dit": "transformer/diffusion_pytorch_model",
                  "vae": "vae/diffusion_pytorch_model"}

# A part of our parameter names, and what official files call it; several names: stacked in ours, in that order.
NAMES = {
    "text_encoder": """
        self_attn.qkv.                  self_attn.q_proj. self_attn.k_proj. self_attn.v_proj.
        self_attn.out.                  self_attn.o_proj.
        self_attn.norm_q.               self_attn.q_norm.
        self_attn.norm_k.               self_attn.k_norm.
        mlp.w13.                        mlp.gate_proj. mlp.up_proj.
        mlp.w2.                         mlp.down_proj.""",
    "dit": """
        attention.qkv.                  attention.to_q. attention.to_k. attention.to_v.
        attention.out.                  attention.to_out.0.
        feed_forward.w13.               feed_forward.w1. feed_forward.w3.
        x_embedder.                     all_x_embedder.2-1.
        final_layer.modulation.         all_final_layer.2-1.adaLN_modulation.1.
        final_layer.linear.             all_final_layer.2-1.linear.
        .modulation.                    .adaLN_modulation.0.""",
    "vae": """
        mid_block.attention.qkv.        mid_block.attentions.0.to_q. mid_block.attentions.0.to_k. mid_block.attentions.0.to_v.
        mid_block.attention.out.        mid_block.attentions.0.to_out.0.
        mid_block.attention.group_norm. mid_block.attentions.0.group_norm.
        coder.norm_out.                 coder.conv_norm_out.
        encoder.levels.                 encoder.down_blocks.
        decoder.levels.                 decoder.up_blocks.
        .downsample.                    .downsamplers.0.conv.
        .upsample.                      .upsamplers.0.conv.""",
}

# What the official config.json says besides the fields of our configs. Read: the first key says what it is and must be
# there, and any value that differs is refused, since model.py builds only this. Written: as it stands.
FIXED = {
    "text_encoder": {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    "dit": {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1], "qk_norm": True},
    "vae": {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True,
            "use_quant_conv": False, "use_post_quant_conv": False, "latents_mean": None, "latents_std": None},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                  "use_dynamic_shifting": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
                  "use_beta_sigmas": False, "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False},
}

# The rest of an official directory: the same for every checkpoint.
CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
OFFICIAL_JSON = {
    "tokenizer/tokenizer_config.json": {
        "tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE, "model_max_length": 131072,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False},
    "model_index.json": {
        "_class_name": "ZImagePipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]},
}

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

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Piece(NamedTuple):
    """One official tensor and its place in ours: rows `start`.. of the tensor `ours`."""
    official: str
    ours: str
    start: int
    shape: tuple      # of the official tensor
    needed: bool      # false for what the release stores and the project does not run: kept on conversion, not loaded


class Entry(NamedTuple):
    """One tensor of a safetensors file."""
    file: Path
    name: str
    shape: tuple
    dtype: torch.dtype


class Stored(NamedTuple):
    """A network on disk: its configuration, and where its pieces are."""
    config: object
    official: bool    # the layout: an entry is one piece, or a tensor of ours it is some rows of
    pieces: dict      # Piece -> Entry, or None for a piece that is not stored and not needed


def build_pieces(network, config):
    """All pieces of a network ("dit", "text_encoder" or "vae"), derived from our module's own names and shapes."""
    module_type, _ = NETWORKS[network]
    with torch.device("meta"):
        needed = module_type(config).state_dict()
        tensors = needed
        if network == "text_encoder":  # the release also stores the language model's last layer and final norm
            whole = module_type(dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1))
            tensors = {**whole.state_dict(), "norm.weight": torch.empty(config.hidden_size)}
    pieces = []
    for ours, tensor in tensors.items():
        names = [ours]
        for part, *official_parts in map(str.split, NAMES[network].strip().splitlines()):
            if part in ours:
                names = [name.replace(part, official) for name in names for official in official_parts]
        rows = [tensor.shape[0] // len(names)] * len(names)
        if network == "text_encoder" and len(names) == 3:   # grouped-query attention: q is larger than k and v
            rows[1:] = [config.num_key_value_heads * config.head_dim] * 2
            rows[0] = tensor.shape[0] - sum(rows[1:])
        for i, name in enumerate(names):
            pieces.append(Piece(name, ours, sum(rows[:i]), (rows[i], *tensor.shape[1:]), ours in needed))
    return pieces


# --- Reading ------------------------------------------------------------------------------------------------



def parse_config(network, data, path, official=True):
    """The network's config dataclass from a JSON object. Fields it lacks take the release's values, as in diffusers."""
    if official:
        check_fixed(data, FIXED[network], path)
        for key in ("rope_parameters", "rope_scaling"):     # newer and older spelling in Qwen's config
            rope = data.get(key) or {}
            if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
                raise UserError(f"{path}: {key} is {rope!r}; only plain rotary embedding is supported")
            data = {**data, **rope}
    values = {}
    for field in dataclasses.fields(NETWORKS[network][1]):
        kind, value = type(field.default), data.get(field.name, field.default)
        good, wanted = RULES[kind]
        if not good(value):
            raise UserError(f"{path}: {field.name} should be {wanted}, not {value!r}")
        if "layers" in field.name and value > 1000:
            raise UserError(f"{path}: {field.name} is {value}, more than any network of this kind has")
        values[field.name] = kind(value)
    config = NETWORKS[network][1](**values)
    if official:
        check_fixed(data, derived_fields(network, config), path)
    return config


def derived_fields(network, config):
    """What else the official config.json says that follows from our fields."""
    if network != "vae":
        return {"n_kv_heads": config.n_heads} if network == "dit" else {}
    levels = len(config.block_out_channels)
    return {"out_channels": config.in_channels, "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels}


def official_config(network, config):
    """The official config.json of a network, as we write it."""
    unread = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True} if network == "text_encoder" else {}
    return {**FIXED[network], **dataclasses.asdict(config), **derived_fields(network, config), **unread}


def check_fixed(data, fixed, path):
    """UserError where `data` says otherwise than `fixed`, or does not say what it is."""
    for key, value in fixed.items():
        if key in ("_class_name", "model_type") and key not in data:
            raise UserError(f"{path} has no {key}, so it is not the config.json of a {value}")
        if data.get(key, value) != value:
            raise UserError(f"{path}: {key} is {data[key]!r}; only {value!r} is supported")


def shard_files(folder, stem):
    """The .safetensors files of an official component folder: one, or those its index lists."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return [folder / f"{stem}.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names the shard {name!r}, which is not the name of a .safetensors file in this directory")
    return [folder / name for name in sorted(set(weight_map.values()))]


def read_header(path):
    """{name: Entry} of a safetensors file, from its header alone."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing")
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: Entry(path, name, tuple(s.get_shape()), DTYPES[s.get_dtype()]) for name, s in slices.items()}
    except KeyError as error:
        raise UserError(f"{path} holds tensors of type {error.args[0]}; only {', '.join(DTYPES)} are supported") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from None


def open_network(network, path):
    """Finds a network on disk and checks every name and shape: -> Stored.

    `path` is a component's folder in the official layout, or a directory in ours. UserError names what is
    missing, unexpected or of the wrong shape.
    """
    path = Path(path)
    ours = path / f"{network}.safetensors"
    official = not ours.exists()
    if official:
        config = parse_config(network, read_json(path / "config.json"), path / "config.json")
        files = shard_files(path, OFFICIAL_FILES[network].split("/")[1])
    else:
        data = read_json(path / "config.json").get(network)
        if not isinstance(data, dict):
            raise UserError(f"{path / 'config.json'} has no section {network!r}")
        config, files = parse_config(network, data, path / "config.json", official=False), [ours]
    try:
        pieces = build_pieces(network, config)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path / 'config.json'} describes a network that cannot be built: {error}") from None

    found = {}
    for file in files:
        for name, entry in read_header(file).items():
            name = name.removeprefix("model.") if official and network == "text_encoder" else name
            if name in found:
                raise UserError(f"{name} is in both {found[name].file.name} and {file.name} of {path}")
            found[name] = entry
    found.pop("lm_head.weight", None)         # some exports repeat the embedding under this name
    stored_name = {piece: piece.official if official else piece.ours for piece in pieces}
    check_tensors(found, stored_name, f"the {network} in {path} does not fit its config.json")
    return Stored(config, official, {piece: found.get(name) for piece, name in stored_name.items()})


def check_tensors(found, stored_name, complaint):
    """Names and shapes both ways: `found` {name: Entry} against `stored_name` {piece: name}. UserError names all that is off."""
    shapes = {}                               # the pieces of one tensor add up
    for piece, name in stored_name.items():
        shapes[name] = (shapes.get(name, (0,))[0] + piece.shape[0], *piece.shape[1:])
    needed = {name for piece, name in stored_name.items() if piece.needed}
    if not needed >= set(found) & set(shapes):
        needed = set(shapes)                  # part of the unused layer is there, so all of it should be
    problems = {"missing": sorted(needed - set(found)), "unexpected": sorted(set(found) - set(shapes)),
                "of the wrong shape": [f"{name} {list(found[name].shape)} instead of {list(shapes[name])}"
                                       for name in sorted(set(found) & set(shapes)) if found[name].shape != shapes[name]]}
    some = lambda names: ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    if any(problems.values()):
        raise UserError(f"{complaint}: " + "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names))


def read_piece(stored, piece):
    """One official tensor, as stored. The file is opened anew, so that its pages do not stay mapped in memory."""
    entry, rows = stored.pieces[piece], slice(piece.start, piece.start + piece.shape[0])
    with safe_open(entry.file, "pt") as file:
        return file.get_tensor(entry.name) if stored.official else file.get_slice(entry.name)[rows]


def load(network, path, device="cpu", dtype=torch.float32, float8=False):
    """A network from disk, in eval mode; `float8`: its Linear weights in float8. Peak memory: the weights and one stored tensor."""
    stored = open_network(network, path)
    module_type, _ = NETWORKS[network]
    with torch.device("meta"):
        module = module_type(stored.config)
        for layer in module.modules():
            if float8 and isinstance(layer, Linear):
                layer.to_float8()
    kept = {name for name, t in module.state_dict().items() if t.dtype == torch.float8_e4m3fn or name.endswith(".scale")}
    weights = {name: torch.empty(t.shape, dtype=t.dtype if name in kept else dtype, device=device) for name, t in module.state_dict().items()}
    for piece in tqdm([p for p in stored.pieces if p.needed], desc=f"loading {network}", leave=False, delay=1):
        name, rows, tensor = piece.ours, slice(piece.start, piece.start + piece.shape[0]), read_piece(stored, piece)
        if name in kept:
            tensor, weights[name.replace(".weight", ".scale")][rows] = quantise(tensor.to(device))
        weights[name][rows].copy_(tensor)
    module.load_state_dict(weights, assign=True)
    return module.eval()


def load_dit(path, device="cpu", dtype=torch.float32, float8=False):
    """The DiT of a component folder (official: DIR/transformer) or of a directory in our layout; `float8`: its blocks' weights in float8."""
    return load("dit", path, device, dtype, float8)


def load_text_encoder(path, device="cpu", dtype=torch.float32):
    """The text encoder, likewise (official: DIR/text_encoder)."""
    return load("text_encoder", path, device, dtype)


def load_vae(path, device="cpu", dtype=torch.float32):
    """The VAE, likewise (official: DIR/vae)."""
    return load("vae", path, device, dtype)


class Checkpoint(NamedTuple):
    """Where the parts of a checkpoint directory are, and its sampling settings."""
    folders: dict      # network -> folder to load it from
    tokenizer: Path
    settings: dict     # "shift", and where known the "steps", "guidance", "size" (pixels) the model wants, and a student's "trained_steps"


def open_checkpoint(path):
    """Looks at a directory in either layout -> Checkpoint. UserError if it is neither."""
    path = Path(path)
    if (path / "dit.safetensors").exists():
        config = read_json(path / "config.json")
        settings = {key: config[key] for key in ("shift", "steps", "guidance", "size", "trained_steps") if key in config}
        folders, tokenizer, source = {name: path for name in NETWORKS}, path / "tokenizer.json", path / "config.json"
    elif (path / "transformer").is_dir():
        source = path / "scheduler" / "scheduler_config.json"
        config = read_json(source)
        check_fixed(config, FIXED["scheduler"], source)
        settings = {"shift": config.get("shift")}
        folders = {name: path / stem.split("/")[0] for name, stem in OFFICIAL_FILES.items()}
        tokenizer = path / "tokenizer" / "tokenizer.json"
    else:
        raise UserError(f"{path} is not a model directory: it holds neither transformer/ (official layout) nor dit.safetensors (ours)")
    for key, value in {"shift": None, **settings}.items():
        if not (is_positive_integer(value) if key in ("steps", "size", "trained_steps") else is_number(value) and value >= 0):
            raise UserError(f"{source}: {key} should be a number, not {value!r}")
    return Checkpoint(folders, tokenizer, settings)


def load_tokenizer(path):
    """A tokenizers.Tokenizer from a tokenizer.json."""
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:                # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer file: {error}") from None


# --- Writing ------------------------------------------------------------------------------------------------


def write_safetensors(path, tensors, parts):
    """Writes a safetensors file part by part, so that it never has to be in memory whole.

    tensors {name: (shape, dtype)}; parts: iterable of (name, first row, rows as a tensor).
    """
    header, places, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, (shape, dtype) in tensors.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        places[name], end = (end, size // shape[0], dtype), end + size
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, row, tensor in parts:
            offset, row_size, dtype = places[name]
            file.seek(8 + len(header) + offset + row * row_size)
            file.write(tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy())


def copy_network(network, stored, folder, to, dtype, bar):
    """Copies a network from disk to `folder` in the layout `to` ("ours" or "official"), in `dtype` or as stored."""
    prefix = "model." if network == "text_encoder" else ""
    target = lambda piece: prefix + piece.official if to == "official" else piece.ours
    # A checkpoint trained here lacks the text encoder's unused layer; official files get zeros for it.
    pieces = [piece for piece, entry in stored.pieces.items() if entry or to == "official"]
    any_entry = next(iter(stored.pieces.values()))

    tensors = {}                              # target name -> (shape, dtype); the pieces of one tensor add up
    for piece in pieces:
        (rows, *_), known = tensors.get(target(piece), ((0,), None))
        new = dtype or (stored.pieces[piece] or any_entry).dtype
        tensors[target(piece)] = (rows + piece.shape[0], *piece.shape[1:]), torch.promote_types(known or new, new)

    def parts():
        for piece in pieces:
            tensor = read_piece(stored, piece) if stored.pieces[piece] else torch.zeros(piece.shape)
            yield target(piece), piece.start if to == "ours" else 0, tensor
            bar.update(tensor.numel())

    file = folder / f"{OFFICIAL_FILES[network] if to == 'official' else network}.safetensors"
    file.parent.mkdir(exist_ok=True)
    write_safetensors(file, tensors, parts())


def write_json(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def convert(source, target, to="ours", dtype=None):
    """Converts a checkpoint directory of either layout; `dtype` None keeps each tensor's. The VAE is always kept as stored."""
    checkpoint = open_checkpoint(source)
    stored = {network: open_network(network, folder) for network, folder in checkpoint.folders.items()}
    load_tokenizer(checkpoint.tokenizer)
    total = sum(torch.Size(piece.shape).numel() for s in stored.values() for piece in s.pieces)
    with new_directory(target) as folder, tqdm(total=total, unit=" parameters", unit_scale=True) as bar:
        for network, s in stored.items():
            bar.set_description(network)
            copy_network(network, s, folder, to, None if network == "vae" else dtype, bar)
        if to == "ours":
            shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
            write_json(folder / "config.json", {**{network: dataclasses.asdict(s.config) for network, s in stored.items()},
                                                **checkpoint.settings})
            return
        for network, stem in OFFICIAL_FILES.items():
            write_json((folder / stem).with_name("config.json"), official_config(network, stored[network].config))
        write_json(folder / "scheduler/scheduler_config.json", {**FIXED["scheduler"], "shift": checkpoint.settings["shift"]})
        for name, content in OFFICIAL_JSON.items():
            write_json(folder / name, content)
        shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer/tokenizer.json")


def save_pipeline(path, dit, text_encoder, vae, tokenizer, shift, dtype=None, steps=None, guidance=None, size=None, **more):
    """Writes three modules and a tokenizers.Tokenizer in our layout, replacing a checkpoint already in `path`; the VAE in its own dtype.

    `settings`: the "steps", "guidance" and "size" (pixels) the model is meant to be sampled with; of a distilled
    student the "trained_steps".
    """
    settings = {"steps": steps, "guidance": guidance, "size": size, **more}
    settings = {name: value for name, value in settings.items() if value is not None}
    networks = {"dit": dit, "text_encoder": text_encoder, "vae": vae}
    with new_directory(path, replace=True) as folder:
        for network, module in networks.items():
            state = module.state_dict()
            write_safetensors(folder / f"{network}.safetensors", {name: (t.shape, t.dtype if network == "vae" or dtype is None else dtype) for name, t in state.items()},
                              ((name, 0, t) for name, t in state.items()))
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "config.json", {**{network: dataclasses.asdict(module.config) for network, module in networks.items()},
                                            "shift": shift, **settings})


# --- Checking a download ------------------------------------------------------------------------------------


def check_release(path):
    """Compares a Turbo release's files with the official MD5 list -> [(file, "ok" | "missing" | "wrong")]."""
    path, results = Path(path), []
    if not path.is_dir():
        raise UserError(f"{path} is not a directory")
    size = sum((path / name).stat().st_size for name in OFFICIAL_MD5 if (path / name).is_file())
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading") as bar:
        for name, expected in OFFICIAL_MD5.items():
            if not (path / name).is_file():
                results.append((name, "missing"))
                continue
            md5 = hashlib.md5()
            with open(path / name, "rb") as file:
                while block := file.read(1 << 23):
                    md5.update(block)
                    bar.update(len(block))
            results.append((name, "ok" if md5.hexdigest() == expected else "wrong"))
    return results


def main():
    parser = argparse.ArgumentParser(description="Convert Z-Image checkpoints between the official layout and ours, or check a download.", allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", nargs="?", help="a checkpoint directory, official or ours")
    parser.add_argument("target", metavar="DST", nargs="?", help="the directory to make")
    parser.add_argument("--to", choices=["ours", "official"], default="ours", help="layout of DST (default: ours)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of DiT and text encoder (default: as stored)")
    parser.add_argument("--check", metavar="DIR", help="compare a downloaded Turbo release with the official MD5 list")
    args = parser.parse_intermixed_args()       # options may stand between SRC and DST
    if args.check is not None:
        results = check_release(args.check)
        for name, state in results:
            print(f"{state:8} {name}")
        if bad := [f"{name} ({state})" for name, state in results if state != "ok"]:
            raise UserError(f"{len(bad)} of {len(results)} files differ from the release: {', '.join(bad)}")
        print("all files are those of the release")
    elif args.source and args.target:
        convert(args.source, args.target, args.to, args.dtype and getattr(torch, args.dtype))
        print(f"wrote {args.target}")
    else:
        parser.error("give SRC and DST, or --check DIR")


# --- Shared by all command lines ----------------------------------------------------------------------------


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


def is_positive_integer(value):
    return is_number(value) and isinstance(value, int) and 0 < value < 2 ** 31


def read_json(path):
    """The JSON object in a file. UserError where there is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
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


RULES = {int: (is_positive_integer, "a positive whole number"), float: (is_number, "a number"),
         tuple: (lambda v: isinstance(v, (list, tuple)) and v and all(map(is_positive_integer, v)), "a list of positive whole numbers")}


if __name__ == "__main__":
    run_command(main)
