"""What one byte for each weight costs in accuracy, and what rotating the columns of int8 buys.

    python -m tests.tools.measure_quantization               layers, and the bundled student

Layers: the relative error of x W^T where weights and inputs are rounded. Weights of trained
networks are no Gaussian noise: some entries, rows and columns are much larger than the others, and
so are a few channels of the inputs. The student: the relative error of one call of the DiT, how far
the pictures move, and the share of pictures that are right. (Its text features come from before the
first layer, so they stay as they are.)
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributions import StudentT

import formats
import hardware
import sampler
from convert_weights import Parser, number, run_command
from tests.tools.parity_table import distance

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tutorials" / "cards"))
import evaluate  # noqa: E402

STUDENT = ROOT / "tutorials" / "cards" / "student"
HELD_OUT = ROOT / "tutorials" / "cards" / "prompts_heldout.txt"
FORMATS = {"float8": ("fp8", True), "int8": ("int8", False), "int8, rotated": ("int8", True)}


def quantize(module, name):
    """A copy of a module in one of FORMATS."""
    kind, is_rotated = FORMATS[name]
    group_of = formats.rotation_group
    if not is_rotated:
        formats.rotation_group = lambda columns: 0
    try:
        return hardware.quantize(copy.deepcopy(module), kind)
    finally:
        formats.rotation_group = group_of


# --- Layers -------------------------------------------------------------------------------------


def weights(kind, rows, columns):
    w = torch.randn(rows, columns)
    if kind == "heavy tails":                 # Student's t: some entries are far out
        w = StudentT(3.0).sample((rows, columns))
    if kind == "unequal rows":
        w = w * torch.randn(rows, 1).exp()
    if kind == "unequal columns":
        w = w * torch.randn(columns).exp()
    return w


def inputs(kind, tokens, columns):
    x = torch.randn(tokens, columns)
    if kind == "large channels":              # a few channels are large in every token
        x[:, torch.randperm(columns)[:columns // 256]] *= 30
    if kind == "large tokens":
        x = x * torch.randn(tokens, 1).exp()
    return x


def layer_rows(tokens=320, columns=3840, rows=1024):
    """One row for each kind of weights and inputs: errors in the three formats."""
    cases = [("Gaussian", "Gaussian"), ("heavy tails", "Gaussian"), ("unequal rows", "Gaussian"),
             ("unequal columns", "Gaussian"), ("Gaussian", "large channels"),
             ("Gaussian", "large tokens"), ("heavy tails", "large channels")]
    for of_weights, of_inputs in cases:
        layer = torch.nn.Linear(columns, rows, bias=False)
        layer.weight.data = weights(of_weights, rows, columns) * columns ** -0.5
        x = inputs(of_inputs, tokens, columns)
        expected = layer(x)
        small = [quantize(torch.nn.Sequential(layer), name)(x) for name in FORMATS]
        yield f"weights {of_weights}, inputs {of_inputs}", [
            distance(y, expected) for y in small]


# --- The bundled student ------------------------------------------------------------------------


def student_rows(count):
    """Rows of velocities, pixels and accuracy of the student, for the three formats."""
    exact = sampler.load_pipeline(str(STUDENT), torch.device("cpu"))
    small = [replace(exact, dit=quantize(exact.dit, name)) for name in FORMATS]
    prompts = sampler.read_prompts(HELD_OUT)[:count]
    text = sampler.encode_prompts(exact, prompts[:32])
    x, t = torch.randn(32, 16, 16, 16), torch.linspace(0, 0.9, 32)
    v = exact.dit(x, t, text)
    yield "student, one call of the DiT", [distance(net.dit(x, t, text), v) for net in small]
    pictures = [evaluate.sample_images(net, prompts, 4, 0.0) for net in (exact, *small)]
    yield "student, gray levels of 255", [
        float((images - pictures[0]).abs().mean()) * 127.5 for images in pictures[1:]]
    right = [evaluate.score(images, prompts)["joint"] for images in pictures]
    yield f"student, joint in 4 steps ({right[0]:.3f} in float32)", right[1:]


@torch.no_grad()
def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=number(32, 10 ** 6, int), default=200, help="prompts")
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| | " + " | ".join(FORMATS) + " |\n|---" + "|---" * len(FORMATS) + "|")
    for rows in (layer_rows(), student_rows(args.count)):
        for name, values in rows:
            cells = " | ".join(f"{value:.4f}" for value in values)
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    run_command(main)
