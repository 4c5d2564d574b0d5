"""Every file layout in and out: tables of names, one way to load, adapters, conversion.

    python convert_weights.py SRC DST                  any model -> the layout of this project
    python convert_weights.py SRC DST --to official    -> a directory that diffusers opens
    python convert_weights.py SRC DST --to comfy       -> one file for each network, for ComfyUI
    python convert_weights.py --check DIR              MD5 of a downloaded Turbo release

SRC is a directory, a name on the hub (owner/name) or a file. "Official" are the names of the
release, as diffusers' ZImagePipeline reads them. All formats take the same way:

    for each official tensor: rows of a tensor in a file -> dequantized -> + adapters -> cast

What has to be computed is computed one tensor at a time. The rest is mapped: on a CPU, a tensor
that is stored in the wanted dtype is a view of its file and takes no memory of its own. Replacing
the file (renaming another over it, as this project does) does not change a network that is loaded
from it. Writing into the file does change the network, and cutting it short ends the process.
Nothing is ever unpickled. A file is used whole or refused.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # see sampler.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
import torch
import torch.nn as nn
from tokenizers import Tokenizer
from tqdm import tqdm

import formats
from files import drop_what_cannot_be_written, end, new_directory
from formats import (  # noqa: F401
    NETWORKS,
    UserError,
    fingerprint,
    is_number,
    read_json,
    rename,
    write_json,
)

# --- Names: which official tensor is which of ours, and of other programs -----------------------

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

# Official -> ComfyUI, also stable-diffusion.cpp. Its VAE has the names of Flux's authors.
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

# The linear layers whose weights may stay quantized: those of the blocks, without the time's.
QUANTIZED = re.compile(r"\.\d+\.(attention|feed_forward|self_attn|mlp)\.(?!.*norm).*\.weight$")
# The only tensors that are left out: a leftover of Lumina, the tied head.
UNUSED = ("norm_final.weight", "lm_head.weight", "model.lm_head.weight", "output.weight")


def comfy_name(kind, config, official):
    """The name of an official tensor in ComfyUI's files. q, k and v have one name in common."""
    name = rename(official, COMFY_NAMES[kind])
    if kind == "vae":                         # Flux counts the levels of the decoder down
        last = len(config.block_out_channels) - 1
        name = re.sub(r"\bup\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
    return name


def spellings(kind, config, official, ours):
    """Yields what files call an official tensor, and its place among those stacked there."""
    yield official, 0
    yield ours, 0
    yield official.removeprefix("model."), 0
    yield rename(official, LLAMA_NAMES), 0
    comfy = comfy_name(kind, config, official)
    stacked = re.search(r"attention\.to_([qkv])", official) if kind == "dit" else None
    place = "qkv".index(stacked[1]) if stacked else 0
    if place:                                 # stable-diffusion.cpp may keep them apart so
        yield f"{comfy}.{place}", 0
    yield comfy, place


def expected_tensors(kind, config):
    """{official name: (our name, shape, whether it is needed)}, from our module.

    Not needed are the language model's last layer and final norm: stored, converted, never run.
    """
    needed = empty_network(kind, config).state_dict()
    tensors = needed
    if kind == "text_encoder":
        whole = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1)
        norm = torch.empty(config.hidden_size, device="meta")
        tensors = {**empty_network(kind, whole).state_dict(), "norm.weight": norm}
    return {rename(ours, OFFICIAL_NAMES[kind]): (ours, tuple(tensor.shape), ours in needed)
            for ours, tensor in tensors.items()}


# --- Load: the one way from a file to a network -------------------------------------------------


class Piece(NamedTuple):
    """Where an official tensor is: rows `first`, first + 1, ... of a tensor in a file."""
    stored: formats.Stored
    first: int
    shape: tuple
    ours: str         # our name
    needed: bool      # by our network


class StoredNetwork(NamedTuple):
    """A network on disk, its names and shapes checked. None of its numbers is read yet."""
    kind: str         # "text_encoder", "dit" or "vae"
    config: object
    pieces: dict      # official name -> Piece
    path: Path
    metadata: dict    # of the file's header


def official_tensors(network, adapters=(), dtype=torch.float32):
    """Yields (official name, tensor), one at a time: stored, dequantized, changed by adapters.

    A plain tensor is a view of the mapped file, in its dtype. A dequantized one is float32. What
    adapters change is computed in float32, and cast to `dtype`.
    """
    changes = formats.read_adapters(adapters, linear_modules(network))
    for name, piece in network.pieces.items():
        tensor = formats.dequantize(piece.stored, piece.first, piece.shape)
        if piece.stored.format != "plain":
            check_finite(network, name, tensor)
        if name in changes:
            base, tensor = tensor, formats.add_changes(tensor, changes[name], dtype)
            check_finite(network, name, tensor, base)
        yield name, tensor


# A mapped tensor of more numbers is not looked at: that would read all of the file.
SMALL = 2 ** 20


def check_finite(network, name, tensor, source=None):
    """UserError where a tensor is not finite. `source`: what it was before a cast or adapters."""
    if not formats.is_finite(tensor):
        is_large = source is not None and formats.is_finite(source)
        raise UserError(f"{network.path}: {name} is not finite in {tensor.dtype}; it is "
                        + ("too large for that, so use another --dtype" if is_large else "damaged"))


def load(kind, path, device="cpu", dtype=torch.float32, like=None, adapters=(), keep=None,
         quantize_layer=None):
    """A network from disk, in eval mode.

    path: the folder of an official component, a directory in our layout, a file, a StoredNetwork.
    dtype: of all weights; None: the one that most of them are stored in.
    like: a folder whose config.json holds for files that have none (None: the release's values).
    adapters: (file, strength) pairs: LoRA, LoKr, LoHa for a DiT, merged into its weights.
    keep: {"fp8": bind, "int8": bind}, one of them or both. A linear layer of the blocks that is
        stored in this format stays so: bind(linear, weight, scale, group) gets weight (out, in) as
        it is stored, scale (out, 1) float32, and the columns in a group of formats.rotate, or 0.
        "table": called with the text encoder's table of words, whose dtype stays, too.
    quantize_layer: called as quantize_layer(linear, weight) for the linear layers of the blocks
        that `keep` does not take; weight (out, in) is on `device`.
    A network of which nothing has to be cast is mapped, see the head of this file. Otherwise the
    peak of memory is the weights and one tensor.
    """
    network = open_network(kind, path, like)
    module = empty_network(kind, network.config)
    network = bind_kept_layers(network, module, keep or {}, adapters, device)
    dtype = dtype or common_dtype(network)
    weights = {}
    steps = tqdm(official_tensors(network, adapters, dtype), f"loading {kind}", len(network.pieces),
                 leave=False, delay=1)
    for name, stored in steps:
        ours = network.pieces[name].ours
        if quantize_layer and QUANTIZED.search(name):
            check_finite(network, name, stored)
            linear = module.get_submodule(ours.removesuffix(".weight"))
            quantize_layer(linear, stored.to(device))
            continue
        keeps_own = keep and "table" in keep and formats.is_table(name, network.pieces[name].stored)
        tensor = stored.to(device, stored.dtype if keeps_own else dtype)
        if keeps_own:
            keep["table"](module.get_submodule(ours.removesuffix(".weight")))
        if tensor is not stored or tensor.numel() < SMALL:
            check_finite(network, name, tensor, stored)
        weights[ours] = tensor
    module.load_state_dict(weights, strict=False, assign=True)    # but for what is bound already
    return module.eval()


load_text_encoder = partial(load, "text_encoder")
load_dit = partial(load, "dit")
load_vae = partial(load, "vae")


def empty_network(kind, config):
    """A network on the meta device, where weights have shapes and no numbers.

    nn.Embedding would import PyTorch's compiler for that, which takes a second.
    """
    resets = {layer: layer.reset_parameters for layer in (nn.Embedding, nn.Linear, nn.Conv2d)}
    try:
        for layer in resets:
            layer.reset_parameters = lambda self: None
        with torch.device("meta"):
            return NETWORKS[kind][0](config)
    finally:
        for layer, reset in resets.items():
            layer.reset_parameters = reset


def bind_kept_layers(network, module, keep, adapters, device):
    """Binds the layers that `keep` wants as they are stored -> the rest, to be loaded.

    A layer that an adapter changes has to be dequantized.
    """
    changed = formats.read_adapters(adapters, linear_modules(network)) if keep else {}
    rest = {}
    for name, piece in network.pieces.items():
        bind = keep.get(formats.layer_format(piece.stored)) if QUANTIZED.search(name) else None
        if bind and piece.needed and name not in changed:
            weight = formats.read(piece.stored, piece.first, piece.shape[0])
            scale = formats.row_scales(piece.stored, piece.first, piece.shape[0])
            linear = module.get_submodule(piece.ours.removesuffix(".weight"))
            bind(linear, weight.to(device), scale.to(device), piece.stored.group)
        elif piece.needed:
            rest[name] = piece
    return network._replace(pieces=rest)


def common_dtype(network):
    """The dtype that most numbers are stored in; bfloat16 where they are quantized."""
    count = {}
    for piece in network.pieces.values():
        dtype = piece.stored.dtype
        count[dtype] = count.get(dtype, 0) + math.prod(piece.shape)
    return max(count, key=count.get, default=torch.bfloat16)


def open_network(kind, path, like=None):
    """Finds a network on disk, and checks every name and shape -> StoredNetwork.

    UserError says what is missing, unexpected or of the wrong shape.
    """
    if isinstance(path, StoredNetwork):
        return path
    files, config = formats.component_files(kind, Path(path))
    tensors, metadata = formats.open_files(files)
    parts = formats.split_parts(tensors, metadata, path)
    if parts and kind not in parts:
        raise UserError(f"{path} holds no {kind}, but {' and '.join(parts)}")
    stored = formats.with_scales(parts.get(kind, tensors), metadata)
    config = config or formats.embedded_config(kind, metadata) or formats.config_like(kind, like)
    expected = expected_tensors(kind, config)
    pieces, used = {}, set(UNUSED)
    for official, (ours, shape, needed) in expected.items():
        for name, place in spellings(kind, config, official, ours):
            if name in stored:
                pieces[official] = Piece(stored[name], place * shape[0], shape, ours, needed)
                used.add(name)
                break
    check_pieces(path, expected, pieces, stored.keys() - used)
    return StoredNetwork(kind, config, pieces, Path(path), metadata)


def check_pieces(path, expected, pieces, unexpected):
    """UserError where tensors are missing, unexpected or of another shape than expected."""
    needed = {name for name, (_, _, needed) in expected.items() if needed}
    if not needed >= pieces.keys():           # part of the unused layer is there, so all should be
        needed = expected.keys()
    rows = {}                                 # of the official tensors that are stacked in one
    for piece in pieces.values():
        key = piece.stored.file, piece.stored.name
        rows[key] = rows.get(key, 0) + piece.shape[0]
    problems = {"missing": needed - pieces.keys(), "unexpected": unexpected, "of a wrong shape": [
        f"{name} {list(piece.stored.shape)} instead of {list(piece.shape)}"
        for name, piece in pieces.items()
        if not formats.fits(
            piece.stored, (rows[piece.stored.file, piece.stored.name], *piece.shape[1:]))]}
    if any(problems.values()):
        raise UserError(
            f"{path} was made for another model, or its configuration was: "
            + "; ".join(f"{what}: {formats.some(names)}"
                        for what, names in problems.items() if names))


def linear_modules(network):
    """{name of a module in adapters: [(official name, shape) of the weights it stands for]}.

    Dotted or flattened, in official names or in ComfyUI's; attention.qkv stands for three.
    """
    modules = {}
    for official, piece in network.pieces.items() if network.kind == "dit" else ():
        if official.endswith(".weight") and len(piece.shape) == 2:
            module = official.removesuffix(".weight")
            dotted = {module, comfy_name("dit", network.config, module)}
            for name in dotted | {name.replace(".", "_") for name in dotted}:
                modules.setdefault(name, []).append((official, piece.shape))
    return modules


# --- All parts of a model -----------------------------------------------------------------------

RELEASE, RELEASE_SHIFT = "Tongyi-MAI/Z-Image-Turbo", 3.0


class StoredModel(NamedTuple):
    """All parts of a model on disk, checked each and against each other."""
    networks: dict        # "dit", "text_encoder", "vae" -> StoredNetwork, for load_dit and so on
    tokenizer: Tokenizer
    settings: dict        # "shift"; where known "steps", "guidance", "size", "trained_steps"
    shift_assumed: bool   # no file says the schedule's shift
    files: dict           # "dit", "text_encoder", "vae", "tokenizer" -> Path
    name: str             # of the file, directory or model on the hub


def open_model(path=None, **named):
    """Looks at a model on disk or on the hub -> StoredModel.

    path: a directory in the official layout or in ours, a folder with one file for each part, a
    file, or a hub name. named: dit, text_encoder, vae, tokenizer, in the place of those of `path`.
    """
    named = {part: Path(place) for part, place in named.items() if place is not None}
    places, settings = formats.find_parts(path, named) if path is not None else ({}, {})
    files = {**places, **named}
    settings = (formats.settings_of_dit(named["dit"]) if "dit" in named else None) or settings
    missing = [part for part in (*NETWORKS, "tokenizer") if part not in files]
    if missing:
        usual = {part: formats.USUAL_FILES[part] for part in missing}
        raise UserError(
            f"{path or 'this'} lacks {', '.join(missing)}: add {as_options(usual)}, or put these "
            f"beside the file of --model; to fetch what is missing, give --model {RELEASE} "
            + as_options(files) + formats.left_out(path))
    networks = {kind: open_network(kind, files[kind], places.get(kind)) for kind in NETWORKS}
    text = networks["dit"].metadata.get("z_image_settings")
    if text:
        settings = formats.check_settings(formats.parse_json(text, files["dit"]), files["dit"])
    tokenizer = formats.load_tokenizer(files["tokenizer"])
    formats.check_together(tokenizer, *(networks[kind].config for kind in NETWORKS))
    return StoredModel(networks, tokenizer, {"shift": RELEASE_SHIFT, **settings},
                      "shift" not in settings, files, Path(path or files["dit"]).resolve().name)


def as_options(files):
    """{part: file} as on a command line."""
    return " ".join(f"--{part.replace('_', '-')} {shlex.quote(str(file))}"
                    for part, file in files.items())


# --- Convert ------------------------------------------------------------------------------------

TARGETS = {           # layout -> the file of each network
    "ours": {kind: f"{kind}.safetensors" for kind in NETWORKS},
    "official": {"text_encoder": "text_encoder/model.safetensors",
                 "dit": "transformer/diffusion_pytorch_model.safetensors",
                 "vae": "vae/diffusion_pytorch_model.safetensors"},
    "comfy": {"text_encoder": "qwen_3_4b.safetensors", "dit": "z_image.safetensors",
              "vae": "ae.safetensors"},
}


def convert(source, target, to="ours", dtype=None, adapters=(), **named):
    """Converts a model to a directory in the layout "ours", "official" or "comfy".

    dtype: of DiT and text encoder. None: each tensor's own, bfloat16 where it is quantized. "int8":
    ComfyUI's int8 with a scale per row for the linear layers of the blocks. The VAE stays as it is.
    adapters: (file, strength) pairs, merged into the DiT. named: as in open_model.
    """
    if dtype == "int8" and to == "official":
        raise UserError("the official layout has no int8; take --to comfy or --to ours")
    model = open_model(source, **named)
    if model.shift_assumed and to != "comfy":
        warnings.warn(f"no file of {source} says the shift of the schedule; {RELEASE_SHIFT}, that "
                      f"of Turbo, is written into {target}", stacklevel=2)
    configs = {kind: dataclasses.asdict(model.networks[kind].config) for kind in NETWORKS}
    with new_directory(target) as folder:
        for kind, network in model.networks.items():
            metadata = {f"z_image_{kind}": json.dumps(configs[kind])} if to == "comfy" else {}
            if metadata and kind == "dit" and not model.shift_assumed:
                metadata["z_image_settings"] = json.dumps(model.settings)
            own = {"dtype": dtype} if kind != "vae" else {}
            merged = {"adapters": adapters} if kind == "dit" else {}
            write_network(network, folder / TARGETS[to][kind], to, metadata, **own, **merged)
        if to == "ours":
            write_json(folder / "config.json", {**configs, **model.settings})
        if to == "official":
            configs = {kind: network.config for kind, network in model.networks.items()}
            formats.write_official_json(folder, configs, model.settings)
        tokenizer = "tokenizer/tokenizer.json" if to == "official" else "tokenizer.json"
        formats.save_tokenizer(model.tokenizer, folder / tokenizer)


def write_network(network, path, to, metadata, dtype=None, adapters=()):
    """Writes a network in another layout. Zeros stand for the last layer, which students lack."""
    names, plan = plan_network(network, to, dtype)
    expected = expected_tensors(network.kind, network.config)
    layers = {name.removesuffix(".weight"): formats.describe_int8(shape[1])
              for name, (shape, stored_as) in plan.items() if stored_as == torch.int8}
    if layers:
        metadata = {**metadata, "_quantization_metadata": json.dumps({"layers": layers})}

    def tensors():
        zeros = ((name, torch.zeros(expected[name][1])) for name in names if name not in stored)
        for official, tensor in itertools.chain(official_tensors(network, adapters), zeros):
            name = names[official]
            if plan[name][1] == torch.int8:
                check_finite(network, official, tensor)
                numbers, scale, _ = formats.quantize_weight(tensor, torch.int8)
                yield scale_name(name), scale
                yield name, numbers
            else:
                cast = tensor.to(plan[name][1])
                check_finite(network, official, cast, tensor)
                yield name, cast

    stored = network.pieces
    path.parent.mkdir(exist_ok=True)
    formats.write_safetensors(path, plan, tensors(), metadata)


def plan_network(network, to, dtype):
    """What to write: {official name: name in the file}, {name in the file: (shape, dtype)}."""
    names, plan = {}, {}
    for official, (ours, shape, _) in expected_tensors(network.kind, network.config).items():
        piece = network.pieces.get(official)
        if piece is None and to == "ours":
            continue
        comfy = comfy_name(network.kind, network.config, official)
        name = {"ours": ours, "official": official, "comfy": comfy}[to]
        names[official] = name
        own = piece.stored.dtype if piece else common_dtype(network)
        if dtype == "int8" and QUANTIZED.search(official):
            own = torch.int8
            add_rows(plan, scale_name(name), (shape[0], 1), torch.float32)
        elif isinstance(dtype, torch.dtype):
            own = dtype
        if ".attn_1." in name and len(shape) == 2:            # Flux has convolutions there
            shape = (*shape, 1, 1)  # noqa: PLW2901
        add_rows(plan, name, shape, own)
    return names, plan


def scale_name(name):
    return name.removesuffix(".weight") + ".weight_scale"


def add_rows(plan, name, shape, dtype):
    """Puts a tensor, or more rows of it (ComfyUI's q, k, v), into a plan; the widest dtype wins."""
    if name in plan:
        (rows, *_), other = plan[name]
        shape, dtype = (rows + shape[0], *shape[1:]), torch.promote_types(dtype, other)
    plan[name] = shape, dtype


def save_pipeline(  # noqa: PLR0913
        path, dit, text_encoder, vae, tokenizer, shift, dtype=None, steps=None, guidance=None,
        size=None, **more):
    """Writes three modules and a tokenizers.Tokenizer in our layout, over an older one in `path`.

    dtype: of DiT and text encoder (None: their own; the VAE always keeps its own). steps, guidance,
    size (pixels): what the model is meant to be sampled with. more: trained_steps, the number of
    steps (or a list of them) that a student was distilled for.
    """
    networks = {"text_encoder": text_encoder, "dit": dit, "vae": vae}
    settings = {"shift": shift, "steps": steps, "guidance": guidance, "size": size, **more}
    settings = {key: value for key, value in settings.items() if value is not None}
    sections = {kind: dataclasses.asdict(module.config) for kind, module in networks.items()}
    with new_directory(path, replace=True) as folder:
        for kind, module in networks.items():
            state = module.state_dict()
            if any(tensor.dtype.itemsize == 1 for tensor in state.values()):
                raise UserError(f"the {kind} is quantized; save it as it was before quantize")
            if dtype is not None and kind != "vae":
                state = {name: tensor.to(dtype) for name, tensor in state.items()}
            plan = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
            formats.write_safetensors(folder / f"{kind}.safetensors", plan, state.items())
        formats.save_tokenizer(tokenizer, folder / "tokenizer.json")
        write_json(folder / "config.json", {**sections, **formats.check_settings(settings, path)})


# --- Command line -------------------------------------------------------------------------------

def main():
    parser = Parser(description="Convert a Z-Image model to another layout, or check a download.")
    add = parser.add_argument
    add("source", metavar="SRC", nargs="?", type=formats.path_name,
        help="a directory, a hub name (owner/name), or a file")
    add("target", metavar="DST", nargs="?", type=formats.path_name, help="the directory to make")
    add("--to", choices=[*TARGETS], default="ours", help="layout of DST (default: ours)")
    add("--dtype", choices=["bfloat16", "float16", "float32", "int8"],
        help="of DiT and text encoder (default: as stored; bfloat16 where that is quantized)")
    add("--check", type=formats.path_name, metavar="DIR",
        help="compare a downloaded Turbo release with its MD5 list")
    add_common_options(parser, "--dit", "--text-encoder", "--vae", "--tokenizer", "--lora")
    args = parser.parse_intermixed_args()     # options may stand between SRC and DST
    if args.check is not None:
        others = {**vars(args), "check": None}
        if others != vars(parser.parse_args([])):
            parser.error("--check DIR goes alone")
        results = formats.check_release(args.check)
        print("\n".join(f"{state:8} {name}" for name, state in results))
        if wrong := [f"{name} ({state})" for name, state in results if state != "ok"]:
            raise UserError(f"{len(wrong)} of {len(results)} files differ from the release: "
                            f"{', '.join(wrong)}")
        print("all files are those of the release")
    elif args.target:
        dtype = args.dtype if args.dtype in (None, "int8") else getattr(torch, args.dtype)
        convert(args.source, args.target, args.to, dtype, args.lora, dit=args.dit,
                text_encoder=args.text_encoder, vae=args.vae, tokenizer=args.tokenizer)
        print(f"wrote {args.target}")
    else:
        parser.error("give SRC and DST, or --check DIR alone")


# --- Shared by all command lines ----------------------------------------------------------------


def run_command(main):
    """Runs a command line: a UserError is one line and exit code 2, Ctrl-C is exit code 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", sys.stderr)
    gc.freeze()    # what was imported stays; to search it for garbage takes .2 s each time
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  (the user closed it)
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):    # a name that a terminal cannot show ends nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()                    # a full disk is an error while it can be said
    except UserError as error:
        end(f"error: {error}", 2)
    except OSError as error:                  # no permission, a name too long, a device is gone
        named = f"{error.filename}: " if error.filename else ""
        end(f"error: {named}{error.strerror or error}", 2)
    except KeyboardInterrupt:
        end("interrupted; nothing half-written is left", 130)
    finally:
        drop_what_cannot_be_written()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, so that a wrong option ends in one sentence."""

    def __init__(self, *args, allow_abbrev=False, **options):
        super().__init__(*args, allow_abbrev=allow_abbrev, **options)

    def error(self, message):
        raise UserError(message)


def number(low=-math.inf, high=math.inf, kind=float, above=None):
    """An argparse type: a finite number from `low` to `high`; `above`: larger than this."""
    least = f"at least {low}" if above is None else f"above {above}"
    what = "whole number" if kind is int else "number"

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None
        good = low <= value <= high and math.isfinite(value)
        if not good or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(
                f"should be a {what}, {least} and at most {high}, not {text}")
        return value
    return parse


def adapter(text):
    """An argparse type: FILE or FILE:STRENGTH -> (file, strength). C: is a drive."""
    file, _, strength = text.rpartition(":")
    if not file or re.fullmatch(r"[A-Za-z]", file) or Path(text).exists():
        return formats.path_name(text), 1.0
    return file, number(-100, 100)(strength)


COMMON_OPTIONS = {
    "--dit": {"metavar": "FILE", "help": "take the DiT from this file or folder"},
    "--text-encoder": {"metavar": "FILE", "help": "take the text encoder from there"},
    "--vae": {"metavar": "FILE", "help": "take the VAE from there"},
    "--tokenizer": {"metavar": "FILE", "help": "take the tokenizer from this tokenizer.json"},
    "--lora": {"metavar": "FILE[:STRENGTH]", "action": "append", "type": adapter, "default": [],
               "help": "merge a LoRA, LoKr or LoHa into the DiT (repeatable; strength: 1)"},
    "--device": {"default": "auto",
                 "help": "cuda, mps or cpu (default: the first of them that is there)"},
    "--seed": {"type": number(0, 2 ** 63 - 1, int), "default": 0, "metavar": "N",
               "help": "whole number (default: 0)"},
}


def add_common_options(parser, *names, **defaults):
    """Adds options that several scripts have; `defaults` replace default values."""
    for name in names:
        option = {"type": formats.path_name, **COMMON_OPTIONS[name]}
        key = name.strip("-").replace("-", "_")
        if key in defaults:
            option["default"] = defaults[key]
        parser.add_argument(name, **option)


if __name__ == "__main__":
    run_command(main)
