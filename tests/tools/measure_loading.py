"""Seconds and memory of loading and converting checkpoints of the release's sizes.

    python tests/tools/measure_loading.py SCRATCH [--sparse] [--diffusers]

Makes them in SCRATCH first (make_synthetic.py; 41 GB, none with --sparse) and keeps them. Each case
runs in a process of its own. Own memory is what the system cannot give back (RssAnon, highest
value), mapped is what it can (RssFile, at the end).
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Prefix of every case. The time of imports does not count.
START = """
import pathlib, sys, threading, time
import torch
sys.path.append({root!r})
{imports}
start, highest = time.perf_counter(), 0

def status(name):
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1e6

def watch():
    global highest
    while True:
        highest = max(highest, status("RssAnon"))
        time.sleep(0.02)

before = status("RssAnon")
threading.Thread(target=watch, daemon=True).start()
"""
END = """
seconds = time.perf_counter() - start
print(f"{seconds:8.2f} s   own {max(highest, status('RssAnon')) - before:6.2f} GB"
      f"   mapped {status('RssFile'):6.2f} GB")
"""
LOAD = "nets = [{calls}]\n"


def run(name, code):
    """Runs a case in a process of its own."""
    imports = "import hardware, convert_weights as c"
    if "diffusers" in name:
        imports = "from diffusers import ZImagePipeline, ZImageTransformer2DModel"
    command = [sys.executable, "-c", START.format(root=str(ROOT), imports=imports) + code + END]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    print(f"{name:58}{lines[-1] if lines else result.returncode}", flush=True)


def make(folder, *options):
    if not folder.exists():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tests.tools.make_synthetic", folder.absolute(),
                        *options],
                       check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        print(f"made {folder} in {time.perf_counter() - start:.0f} s", flush=True)


def cases(official, comfy, lora, scratch, with_diffusers):
    """(name, code) of everything that is measured."""
    bfloat16 = "dtype=torch.bfloat16"
    encoder = f"c.load_text_encoder({str(official / 'text_encoder')!r}, {bfloat16})"
    dit = f"c.load_dit({str(official / 'transformer')!r}, {bfloat16})"
    vae = f"c.load_vae({str(official / 'vae')!r})"
    single = f"c.load_dit({str(comfy / 'z_image.safetensors')!r}, {bfloat16}"
    yield "official directory, bfloat16", LOAD.format(calls=", ".join([encoder, dit, vae]))
    yield "DiT of the official directory", LOAD.format(calls=dit)
    yield "DiT in one file, ComfyUI's names", LOAD.format(calls=single + ")")
    adapters = f", adapters=[({str(lora)!r}, 1.0)])"
    yield "the same with a LoRA of rank 32 on all blocks", LOAD.format(calls=single + adapters)
    yield "the same quantized to int8 while it is read", LOAD.format(
        calls=single.replace(bfloat16, "quantize_layer=lambda *a: hardware.quantize_layer("
                             "*a, 'int8')") + ")")
    yield "text encoder as float32", LOAD.format(calls=encoder.replace("bfloat16", "float32"))
    yield "DiT to int8 on disk (convert)", (
        f"net = c.open_network('dit', {str(official / 'transformer')!r})\n"
        f"c.write_network(net, pathlib.Path({str(scratch / 'int8.safetensors')!r}), 'ours', {{}}, "
        f"'int8')\n")
    if with_diffusers:
        yield "diffusers: transformer, bfloat16", (
            f"net = ZImageTransformer2DModel.from_pretrained({str(official / 'transformer')!r}, "
            "torch_dtype=torch.bfloat16)\n")
        yield "diffusers: the whole pipeline, bfloat16", (
            f"net = ZImagePipeline.from_pretrained({str(official)!r}, "
            "torch_dtype=torch.bfloat16)\n")
        yield "diffusers: DiT in one file", (
            f"net = ZImageTransformer2DModel.from_single_file("
            f"{str(comfy / 'z_image.safetensors')!r}, config={str(official)!r}, "
            "subfolder='transformer', torch_dtype=torch.bfloat16)\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--diffusers", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in the name")
    args = parser.parse_args()
    sparse = ["--sparse"] if args.sparse else []
    official, comfy, lora = (args.scratch / name for name in ("official", "comfy", "lora"))
    make(official, *sparse)
    make(comfy, "--layout", "comfy", *sparse)
    make(lora, "--lora", "32")
    adapter = lora / "lora.safetensors"
    for name, code in cases(official, comfy, adapter, args.scratch, args.diffusers):
        if args.only in name:
            run(name, code)
    (args.scratch / "int8.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
