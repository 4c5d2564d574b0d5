"""Speed and memory of the full-size networks on one GPU, with random weights built on the GPU.

    python -m tests.tools.benchmark_gpu --out results.jsonl

Every row is printed as one line of JSON as soon as it is measured: seconds (median of three runs),
peak memory in GB. Random weights take the same time as trained ones. Needs about 40 GB.
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import sampler
from hardware import QUANTIZED_DTYPES
from model import VAE, DiT, DiTConfig, Text, TextEncoder, TextEncoderConfig, VAEConfig

STEPS = 8


def build(network, config, dtype):
    """A network with random weights, built on the GPU in its final dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return network(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def median_seconds(function, runs=3):
    seconds = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class Report:
    """Prints each row, and appends it to a file."""

    def __init__(self, path):
        self.path = path

    def row(self, name, first=None, **values):
        values = {"name": name, "first_seconds": first, **values,
                  "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v
                           for k, v in values.items() if v is not None})
        print(line, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        torch.cuda.reset_peak_memory_stats()


def sampling_seconds(net, dit, text, side):
    """Seconds of 8 Euler steps at side x side pixels: first run, then median of three."""
    noise = torch.randn(1, 16, side // 8, side // 8, device="cuda")
    times = sampler.time_schedule(STEPS, 3.0).to("cuda")

    def run():
        context = dit.prepare(text, side // 8, side // 8)
        x = noise
        for i in range(STEPS):
            x = x + (times[i + 1] - times[i]) * net(x, times[i].expand(1), context)
        return x

    first = median_seconds(run, runs=1)
    return first, median_seconds(run)


def try_row(report, name, function):
    """One row, or the reason why there is none: the other rows go on."""
    try:
        first, seconds = function()
        report.row(name, first=first, seconds=seconds)
    except Exception as error:
        report.row(name, error=f"{type(error).__name__}: {str(error)[:200]}")


def encoder_row(report):
    """Returns a random Text of 60 tokens for the DiT."""
    encoder = build(TextEncoder, TextEncoderConfig(), torch.bfloat16)
    ids = torch.randint(1000, (1, 60), device="cuda")
    lengths = torch.tensor([60], device="cuda")
    first = median_seconds(lambda: encoder(ids, lengths), runs=1)
    seconds = median_seconds(lambda: encoder(ids, lengths))
    report.row("text encoder, 60 tokens", first=first, seconds=seconds)
    features = torch.randn(1, 60, DiTConfig().cap_feat_dim, device="cuda", dtype=torch.bfloat16)
    return Text(features, lengths)


def vae_row(report):
    vae = build(VAE, VAEConfig(), torch.float32)
    latents = torch.randn(1, 16, 128, 128, device="cuda")
    first = median_seconds(lambda: vae.decode(latents), runs=1)
    seconds = median_seconds(lambda: vae.decode(latents))
    report.row("VAE decoder, 1024x1024, float32", first=first, seconds=seconds)


def dit_rows(report, text, weights, sides):
    """The DiT in one number format: 8 steps, with both attention kernels, then compiled."""
    dit = build(DiT, DiTConfig(), torch.bfloat16)
    if weights != "bfloat16":
        sampler.quantize(dit, weights)
    for side in sides:
        try_row(report, f"{weights}, {side}x{side}",
                lambda side=side: sampling_seconds(dit, dit, text, side))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        try_row(report, f"{weights}, cuDNN attention, {sides[0]}x{sides[0]}",
                lambda: sampling_seconds(dit, dit, text, sides[0]))
        torch.compiler.reset()
        compiled = torch.compile(dit, fullgraph=True)
        try_row(report, f"{weights}, cuDNN attention, compiled, {sides[0]}x{sides[0]}",
                lambda: sampling_seconds(compiled, dit, text, sides[0]))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="benchmark_gpu.jsonl")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 512])
    formats = ["bfloat16", *QUANTIZED_DTYPES]
    parser.add_argument("--weights", nargs="+", choices=formats, default=formats)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU, and PyTorch finds none")
    report = Report(args.out)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    text = encoder_row(report)
    vae_row(report)
    for weights in args.weights:
        dit_rows(report, text, weights, args.sides if weights == "bfloat16" else args.sides[:1])


if __name__ == "__main__":
    main()
