"""A training step of the cards' teacher: eager, replayed as a CUDA graph, and compiled.

    python -m tests.tools.measure_training --device cuda       two minutes on an H200
    python -m tests.tools.measure_training --batch 8           without a GPU: eager and compiled

A row has how far the gradients lie from the eager ones (the norm of the difference over their norm,
with short and with long captions), and the median time of a step with both optimizers.
"""

import copy
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace

import torch

import sampler
from convert_weights import Parser, number, run_command
from distill import BUNDLED
from scale import blocks_of

sys.path.insert(0, str(BUNDLED))
import data
import train

STEPS = (1, 8)                 # of the draws; captions are padded to 32 and to 64 tokens


def setting(device, batch, folder):
    """The bundled teacher with a batch of cards to learn -> nets, FlowLoss, recipe."""
    recipe = replace(train.Recipe(), **train.GPU)
    recipe = replace(recipe, bundled_vae=True, drawings=256, batch=batch)
    run = train.Run(folder, torch.device(device), start=str(BUNDLED / "teacher"))
    tokenizer = data.build_tokenizer()
    drawings = train.Drawings(recipe, tokenizer)
    drawings.draw_chunks(0, 1)
    cards = train.encode_cards(recipe, run, train.bundled_vae(device), drawings)
    nets = train.build(recipe, tokenizer.get_vocab_size())
    train.copy_weights(run.start, nets, tokenizer)
    empty = train.token_ids(tokenizer, "")
    return nets.to(device), train.FlowLoss(recipe, run, nets, cards, empty), recipe


def step_time(backward, nets, recipe, steps):
    """Median milliseconds of a step. The weights are afterwards what they were."""
    weights = copy.deepcopy(nets.state_dict())
    optimizers = train.optimizers(nets, replace(recipe, muon_lr=1e-9, adam_lr=1e-9))
    times = []
    for step in range(steps + 3):
        began = time.perf_counter()
        loss = backward(step)
        train.descend(list(nets.parameters()), optimizers)
        loss.item()                                              # waits for the GPU
        times.append(1000 * (time.perf_counter() - began))
    nets.load_state_dict(weights)
    return statistics.median(times[3:])


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=number(1, 10 ** 4, int), default=256)
    parser.add_argument("--steps", type=number(1, 10 ** 4, int), default=20, help="to time")
    args = parser.parse_args()
    sampler.find_device(args.device)               # says so if there is no such device
    warnings.filterwarnings("ignore", "Mismatch dtype")
    with tempfile.TemporaryDirectory() as folder:
        nets, flow, recipe = setting(args.device, args.batch, folder)
        expected = [train.gradients(nets, flow.backward, step) for step in STEPS]
        print(f"batch {args.batch} on {args.device}, PyTorch {torch.__version__}\n\n"
              "| | gradients, short | gradients, long | ms a step |\n|---|---|---|---|")

        def row(name, backward):
            far = [float((train.gradients(nets, backward, step) - wanted).norm() / wanted.norm())
                   for step, wanted in zip(STEPS, expected, strict=True)]
            took = step_time(backward, nets, recipe, args.steps)
            print(f"| {name} | {far[0]:.1e} | {far[1]:.1e} | {took:.1f} |", flush=True)

        def replayed():
            return train.Recorded(flow, list(nets.parameters()))

        row("eager", flow.backward)
        if args.device == "cuda":
            row("CUDA graph", replayed())
        for block in blocks_of(nets["dit"]):
            block.compile(dynamic=False)
        row("compiled", flow.backward)
        if args.device == "cuda":
            row("compiled, CUDA graph", replayed())


if __name__ == "__main__":
    run_command(main)
