"""What a distillation costs: memory and time, measured or computed.

    python -m tests.tools.measure_distillation overhead        an iteration against its passes alone
    python -m tests.tools.measure_distillation full            LoRA at the release's size, on a GPU
    python -m tests.tools.measure_distillation table           6B on 1, 8, 64 GPUs, computed

`full` builds random weights of the release's size on the GPU. It needs no files. It prints peak
memory and seconds an iteration at 512 and 1024 pixels, with and without --checkpoint-activations.
"""

import argparse
import gc
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import torch

import distill
import scale
from convert_weights import UserError, run_command
from model import DiT, DiTConfig, Text

GB = 1e9
SMALL = DiTConfig(dim=192, n_heads=6, n_layers=5, cap_feat_dim=96, axes_dims=(8, 12, 12))


def make_options(device, **changes):
    """What LowRankNetworks, WholeNetworks and AutocastNet want to know."""
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    options = {"lora": None, "seed": 0, "checkpoint_activations": False, "accumulate": 1,
               "dtype": dtype, "lr": 1e-5, "fake_lr": 1e-5}
    return SimpleNamespace(**options | changes)


def random_dit(config, device, dtype):
    """Random weights of a size at which activations stay finite, made where they will be."""
    with torch.device("meta"):
        dit = DiT(config)
    dit = dit.to_empty(device=device).to(dtype)
    for name, p in dit.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(p)
        else:
            torch.nn.init.normal_(p, std=0.02)
    return dit.eval()


def make_nets(dit, args, device):
    networks = scale.LowRankNetworks if args.lora else scale.WholeNetworks
    learners = networks(dit, args, scale.Processes(device))
    nets = {name: scale.AutocastNet(learners.nets[name], device, args.dtype, args.accumulate)
            for name in ("teacher", "student", "fake")}
    return distill.Nets(
        **nets, student_optimizer=scale.adam(learners.weights["student"], args.lr, 0.9),
        fake_optimizer=scale.adam(learners.weights["fake"], args.fake_lr, 0.0))


def make_batch(config, device, size, batch, tokens=64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, tokens, config.cap_feat_dim, generator=generator)
    noise = torch.randn(batch, config.in_channels, size // 8, size // 8, generator=generator)
    text = Text(features.to(device), torch.full((batch,), tokens, device=device))
    return text, Text(text.features[:1, :16], torch.tensor([16], device=device)), noise.to(device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function, device, repeats):
    """The median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


# --- The release's size on a GPU ----------------------------------------------------------------


def measure_full(args):
    device = torch.device("cpu" if args.trial else "cuda")
    config = SMALL if args.trial else DiTConfig(n_layers=args.layers)
    card = "CPU, a trial with small networks" if args.trial else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, LoRA {args.rank}, batch {args.batch}")
    print("| pixels | checkpointed activations | peak memory, GB | seconds an iteration |")
    print("|---|---|---|---|", flush=True)
    for checkpointed in (True, False):
        dit = random_dit(config, device, torch.float32 if args.trial else torch.bfloat16)
        options = make_options(device, lora=args.rank, checkpoint_activations=checkpointed)
        nets = make_nets(dit, options, device)
        for size in args.sizes:
            try:
                peak, times = measure_steps(nets, make_batch(config, device, size, args.batch),
                                            device, args.iterations)
                row = f"{peak:.1f} | {' '.join(f'{t:.2f}' for t in times)}"
            except torch.OutOfMemoryError:
                row = "out of memory |"
            print(f"| {size} | {'yes' if checkpointed else 'no'} | {row} |", flush=True)
        del nets, dit
        gc.collect()          # a network with adapters refers to itself


def measure_steps(nets, batch, device, iterations):
    """-> peak memory in GB (0 on a CPU), seconds of each iteration."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    generator, times = torch.Generator().manual_seed(0), []
    for _ in range(iterations):
        start = time.perf_counter()
        distill.training_step(nets, *batch, distill.Settings(), generator)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return (torch.cuda.max_memory_allocated() / GB if device.type == "cuda" else 0.0), times


# --- An iteration against its passes alone ------------------------------------------------------


def measure_overhead(args):
    """Networks of two sizes on the CPU, whole and with adapters; a process for each row."""
    print("| network | trained | batch | iteration, s | its passes alone, s | ratio | memory, GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    middle = DiTConfig(dim=768, n_heads=12, n_layers=8, cap_feat_dim=512, axes_dims=(16, 24, 24))
    for name, config, batch, size in (("small", SMALL, 16, 64), ("mid-sized", middle, 2, 256)):
        for rank in (None, 16):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                count, whole, alone, memory = process.submit(
                    iteration_cost, config, batch, size, rank, args.iterations).result()
            trained = f"LoRA {rank}" if rank else "whole"
            print(f"| {name}, {count / 1e6:.1f} M | {trained} | {batch} | {whole:.3f} | "
                  f"{alone:.3f} | {whole / alone:.2f} | {memory:.2f} |", flush=True)


def peak_memory():
    """Bytes of this process at its largest."""
    unit = 1 if sys.platform == "darwin" else 1024               # of ru_maxrss
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def iteration_cost(config, batch, size, rank, repeats):
    """-> parameters, seconds of an iteration and of its passes alone, GB above the imports."""
    device, before = torch.device("cpu"), peak_memory()
    torch.manual_seed(0)
    dit = random_dit(config, device, torch.float32)
    nets = make_nets(dit, make_options(device, lora=rank), device)
    text, null_text, noise = make_batch(config, device, size, batch)
    settings = distill.Settings(steps=1)                       # the same passes in each iteration
    t = torch.full((batch,), 0.5)

    def iteration():
        distill.training_step(
            nets, text, null_text, noise, settings, torch.Generator().manual_seed(0))

    def passes():
        """Those of Algorithm 1 at one step: four without gradients, three with."""
        with torch.no_grad():
            for one in (text, text, null_text):
                nets.teacher(noise, t, one)
            nets.fake(noise, t, text)
        for net in (nets.student, nets.fake, nets.fake):
            net(noise, t, text).sum().backward()

    whole = seconds_of(iteration, device, repeats)
    memory = (peak_memory() - before) / GB
    count = sum(p.numel() for p in dit.parameters())
    return count, whole, seconds_of(passes, device, repeats), memory


# --- 6B on several GPUs, computed ---------------------------------------------------------------


def parameters_of(config, rank):
    """Numbers of a DiT, and of one set of adapters in it, counted on the meta device."""
    with torch.device("meta"):
        dit = DiT(config)
    whole = sum(p.numel() for p in dit.parameters())
    linears = [layer for block in scale.blocks_of(dit) for layer in block.modules()
               if type(layer) is torch.nn.Linear]
    return whole, sum(rank * (layer.in_features + layer.out_features) for layer in linears)


def activations_of(config, pixels, checkpointed):
    """Bytes that one item's forward pass keeps for the backward pass, in bfloat16.

    Per token and block: 13 vectors of the width (norms, q, k, v, attention, gates, sums) and 4 of
    the feed-forward width; with checkpointed activations the block's input alone, and one block.
    """
    tokens = (pixels // 16) ** 2 + 96
    block = tokens * 2 * (13 * config.dim + 4 * int(config.dim / 3 * 8))
    blocks = config.n_layers + 2 * config.n_refiner_layers
    return blocks * tokens * 2 * config.dim + block if checkpointed else blocks * block


def print_table(args):
    config = DiTConfig()
    whole, adapters = parameters_of(config, args.rank)
    print(f"Computed, not measured: {whole / 1e9:.2f} billion parameters, LoRA {args.rank}: "
          f"{adapters / 1e6:.0f} million a set. GB a GPU, one image a GPU.")
    print("| | GPUs | weights | gradients | optimizers | activations 512 | 1024 | 1024, "
          "checkpointed | total at 1024, checkpointed |\n|" + "---|" * 9)
    for gpus in (1, 8, 64):
        rows = {
            # teacher, student, fake, average in float32; the student's gradient stays until its
            # next update; two optimizers
            "whole networks": (4 * whole * 4, 2 * whole * 4, 4 * whole * 4, gpus),
            # one teacher in bfloat16, three sets in float32; not sharded
            f"LoRA {args.rank}": (whole * 2 + 3 * adapters * 4, 2 * adapters * 4,
                                  4 * adapters * 4, 1)}
        for name, (weights, gradients, optimizers, shards) in rows.items():
            numbers = [n / shards / GB for n in (weights, gradients, optimizers)]
            memory = [activations_of(config, *case) / GB for case in (
                (512, False), (1024, False), (1024, True))]
            print(f"| {name} | {gpus} | " + " | ".join(
                f"{n:.1f}" for n in (*numbers, *memory, sum(numbers) + memory[2])) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["overhead", "full", "table"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="pixels")
    parser.add_argument("--layers", type=int, default=30, help="fewer: a trial on a small GPU")
    parser.add_argument("--trial", action="store_true", help="full: small networks on the CPU")
    args = parser.parse_args()
    if args.what == "full" and not (args.trial or torch.cuda.is_available()):
        raise UserError("full needs a GPU; --trial tries the script without one")
    {"overhead": measure_overhead, "full": measure_full, "table": print_table}[args.what](args)


if __name__ == "__main__":
    run_command(main)
