"""Makes checkpoints of the release's sizes with random numbers: 20 GB in bfloat16.

    python -m tests.tools.make_synthetic DIR                    official layout, shards of 4 GB
    python -m tests.tools.make_synthetic DIR --layout comfy     one file for each network
    python -m tests.tools.make_synthetic DIR --sparse           files without content: no disk space
    python -m tests.tools.make_synthetic DIR --lora 32          DIR/lora.safetensors of rank 32

The pictures are noise, but names, shapes, types and sizes are those of Z-Image-Turbo in bfloat16.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch

import convert_weights
import formats
from convert_weights import NETWORKS

ROOT = Path(__file__).resolve().parents[2]
SHARD = 4e9
BUFFER = 1 << 26              # random numbers, used again and again


def numbers(shape, dtype, buffer):
    """Small random numbers; a fresh place in the buffer for each tensor."""
    count = math.prod(shape)
    start = int(torch.randint(BUFFER // 2, ()))
    parts = [buffer[start:]] + [buffer] * (count // BUFFER + 1)
    return torch.cat(parts)[:count].view(shape).to(dtype)


def write(path, plan, sparse, buffer):
    """A safetensors file of a plan {name: (shape, dtype)}; norms are 1."""
    if sparse:
        formats.write_safetensors(path, plan, [])
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in plan.values())
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size + size)
        return
    tensors = ((name, torch.ones(shape, dtype=dtype) if "norm" in name and "weight" in name
                else numbers(shape, dtype, buffer)) for name, (shape, dtype) in plan.items())
    formats.write_safetensors(path, plan, tensors)


def plans(kind, layout):
    """The files of a network: [plan]."""
    config = NETWORKS[kind][1]()
    dtype = torch.float32 if kind == "vae" else torch.bfloat16
    expected = convert_weights.expected_tensors(kind, config)
    network = convert_weights.StoredNetwork(kind, config, {
        name: convert_weights.Piece(formats.Stored(None, name, "F32", shape, 0, 0), 0, *rest)
        for name, (ours, shape, needed) in expected.items() for rest in [(shape, ours, needed)]},
        None, {})
    _, plan = convert_weights.plan_network(network, layout, dtype)
    files, size = [{}], 0
    for name, (shape, dtype) in plan.items():
        if layout == "official" and size > SHARD:
            files.append({})
            size = 0
        files[-1][name] = shape, dtype
        size += math.prod(shape) * dtype.itemsize
    return files


def make_checkpoint(folder, layout="official", sparse=False):
    """Writes a checkpoint of the release's sizes."""
    buffer = torch.randn(BUFFER if not sparse else 1).mul(0.02).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    for kind in NETWORKS:
        file = folder / convert_weights.TARGETS[layout][kind]
        file.parent.mkdir(exist_ok=True)
        files = plans(kind, layout)
        names = [f"{file.stem}-{i + 1:05d}-of-{len(files):05d}.safetensors"
                 for i in range(len(files))] if len(files) > 1 else [file.name]
        for name, plan in zip(names, files, strict=True):
            write(file.parent / name, plan, sparse, buffer)
        if len(files) > 1:
            weight_map = {key: name for name, plan in zip(names, files, strict=True)
                          for key in plan}
            index = {"metadata": {}, "weight_map": weight_map}
            (file.parent / f"{file.stem}.safetensors.index.json").write_text(json.dumps(index))
    write_rest(folder, layout)


def write_rest(folder, layout):
    """Configurations of the release, and the tokenizer of the tests' checkpoint."""
    tokenizer = ROOT / "tests/data/tiny/tokenizer/tokenizer.json"
    if layout != "official":
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        return
    configs = {kind: config() for kind, (_, config) in NETWORKS.items()}
    formats.write_official_json(folder, configs, {"shift": 3.0})
    shutil.copyfile(tokenizer, folder / "tokenizer/tokenizer.json")


def make_lora(path, rank):
    """A LoRA on all linear layers of all blocks, in bfloat16, as ai-toolkit names it."""
    tensors = {}
    expected = convert_weights.expected_tensors("dit", NETWORKS["dit"][1]())
    for name, (_, shape, _) in expected.items():
        if convert_weights.QUANTIZED.search(name) or "adaLN_modulation.0.weight" in name:
            stem = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, shape[1]).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = 0.01 * torch.randn(shape[0], rank).bfloat16()
    plan = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    formats.write_safetensors(path, plan, tensors.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=["official", "comfy"], default="official")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--lora", type=int, metavar="RANK")
    args = parser.parse_args()
    if args.lora is not None and (args.lora < 1 or args.sparse or args.layout != "official"):
        parser.error("--lora is a rank from 1 on, and goes without --layout and --sparse")
    torch.manual_seed(0)
    if args.lora:
        args.folder.mkdir(parents=True, exist_ok=True)
        make_lora(args.folder / "lora.safetensors", args.lora)
    else:
        make_checkpoint(args.folder, args.layout, args.sparse)


if __name__ == "__main__":
    main()
