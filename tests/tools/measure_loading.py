"""Peak memory and time of loading and converting a large checkpoint. Run by hand; needs 8 GB of disk:

    python tests/measure_loading.py

Makes a DiT of 2.5 GB in float32 in the official layout (three shards of random bits), then, each in a process of its own,
loads it as bfloat16 and converts it to our layout and back. The promise: peak resident memory at most
the loaded weights, the largest tensor and 1 GB.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY = ROOT / "tests" / "data" / "tiny"

import convert_weights  # noqa: E402
from model import DiTConfig  # noqa: E402

CONFIG = DiTConfig(dim=1920, n_heads=15, n_layers=12, n_refiner_layers=1, cap_feat_dim=32)


def make_checkpoint(folder):
    """The tiny checkpoint with a transformer of CONFIG in it. -> (bytes, bytes of the largest tensor)"""
    shutil.copytree(TINY, folder)
    shutil.rmtree(folder / "transformer")
    pieces = convert_weights.build_pieces("dit", CONFIG)
    (folder / "transformer").mkdir()
    convert_weights.write_json(folder / "transformer/config.json", convert_weights.official_config("dit", CONFIG))
    weight_map = {}
    for i in range(3):
        shard, name = pieces[i::3], f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        convert_weights.write_safetensors(folder / "transformer" / name, {p.official: (p.shape, torch.float32) for p in shard},
                                          ((p.official, 0, torch.randn(p.shape)) for p in shard))
        weight_map.update({p.official: name for p in shard})
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = [torch.Size(p.shape).numel() * 4 for p in pieces]
    return sum(sizes), max(sizes)


def peak_of(code):
    """Runs Python code in a process of its own -> (peak resident bytes, seconds)."""
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code + "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"],
                            cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    return int(result.stdout.split()[-1]) * 1024, time.perf_counter() - start


def main():
    with tempfile.TemporaryDirectory() as scratch:
        source, ours, official = (Path(scratch) / name for name in ("source", "ours", "official"))
        stored, largest = make_checkpoint(source)
        print(f"stored {stored / 1e9:.2f} GB in float32, largest tensor {largest / 1e9:.3f} GB")
        limit = {"import torch alone": None, "load as bfloat16": stored / 2 + largest + 1e9, "convert to ours": largest + 1e9,
                 "convert to ours as bfloat16": largest + 1e9, "convert to official": largest + 1e9}
        for what, code in {
            "import torch alone": "import convert_weights",
            "load as bfloat16": f"import torch, convert_weights as c; c.load_dit({str(source / 'transformer')!r}, dtype=torch.bfloat16)",
            "convert to ours": f"import convert_weights as c; c.convert({str(source)!r}, {str(ours)!r})",
            "convert to ours as bfloat16": f"import torch, convert_weights as c; c.convert({str(source)!r}, {str(ours) + '16'!r}, dtype=torch.bfloat16)",
            "convert to official": f"import convert_weights as c; c.convert({str(ours)!r}, {str(official)!r}, to='official')",
        }.items():
            peak, seconds = peak_of(code)
            promise = f", promised {limit[what] / 1e9:.2f} GB: {'kept' if peak <= limit[what] else 'BROKEN'}" if limit[what] else ""
            print(f"{what:30} peak {peak / 1e9:.2f} GB in {seconds:.0f} s{promise}")


if __name__ == "__main__":
    main()
