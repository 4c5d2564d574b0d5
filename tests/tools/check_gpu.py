"""The paths of sampler.py and distill.py that a device decides on, on a GPU and on the CPU.

    python -m tests.tools.check_gpu --out DIR                     a minute on a GPU
    python -m tests.tools.check_gpu --out DIR --device cpu        tries the script without one

Both command lines run in this process with the bundled models; the CPU computes in float32. A row
is a set of options. Of a picture it has the largest and the mean difference from the CPU's, in gray
levels of 255; of a distillation the largest relative difference from the losses on the CPU. A fault
is a row, too.
"""

import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import distill
import sampler
from convert_weights import Parser, run_command

PROMPTS = ["a panda on a red card with the word LOVE in white below it",
           "雪地里，一只狐狸，写着“福”"]
PLAIN = ["--dtype", "float32"]
TEACHER = ["--model", str(distill.BUNDLED / "teacher"), "--steps", "4", "--guidance", "2"]
SHORT = ["--iterations", "4", "--batch-size", "4", "--log-every", "1", "--overwrite"]
# Options that every row and its reference have, and rows of further options. START is a picture,
# ADAPTER the LoRA file of the last distillation.
PICTURES = [([], [
    "--dtype float32", "", "--dtype float16", "--batch-size 2", "--weights int8", "--weights fp8",
    "--offload networks --dtype float32", "--offload blocks --dtype float32",
    "--offload blocks --weights int8", "--tile --dtype float32", "--attention math",
    "--attention flash", "--attention efficient", "--attention cudnn", "--compile",
    "--compile --weights int8", "--compile --weights fp8"]),
    (TEACHER, ["--dtype float32", "", "--guidance-every 2"]),
    ([*TEACHER, "--negative-prompt", "red"], ["--dtype float32"]),
    (["--init-image", "START", "--strength", "0.6"], ["--dtype float32", "", "--weights int8"]),
    (["--lora", "ADAPTER"], ["--dtype float32", "", "--weights int8", "--offload blocks"])]
RUNS = [(SHORT, [
    "--dtype float32", "", "--accumulate 2 --dtype float32",
    "--checkpoint-activations --dtype float32", "--cache-features CACHE --dtype float32"]),
    ([*SHORT, "--lora", "8"], ["--dtype float32", "", "--checkpoint-activations"])]


def run(module, arguments):
    """A command line in this process -> seconds."""
    began, sys.argv = time.perf_counter(), [module.__name__ + ".py", *arguments]
    module.main()
    return time.perf_counter() - began


def pictures(folder, name, options):
    """The two prompts' pictures -> (2, H, W, 3), and seconds."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=name) as place:
        seconds = run(sampler, [*PROMPTS, "--upscale", "none", "--out", f"{place}/a.png",
                                *options])
        images = [Image.open(f"{place}/{file}") for file in ("a.png", "a-1.png")]
        return np.stack([np.asarray(image, dtype=float) for image in images]), seconds


def losses(folder, name, options):
    """The losses of a short distillation -> (iterations, 2), and seconds."""
    seconds = run(distill, ["--out", f"{folder}/{name}", *options])
    lines = (folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    return np.array([[line["loss"], line["fake_loss"]] for line in lines]), seconds


def compare(function, folder, device, groups):
    """-> for each row of options: the options, what was found, seconds, the reference."""
    files = {"CACHE": folder / "cache", "START": folder / "start.png",
             "ADAPTER": folder / "reference" / "lora.safetensors"}
    for shared, rows in groups:
        common = [str(files.get(word, word)) for word in shared]
        try:
            reference, _ = function(folder, "reference", [*common, "--device", "cpu", *PLAIN])
        except Exception as error:            # whatever it is: the other rows go on
            traceback.print_exc()
            yield f"reference of {' '.join(common)}", error, None, None
            continue
        for i, row in enumerate(rows):
            words = [str(files.get(word, word)) for word in row.split()]
            try:
                found, seconds = function(
                    folder, f"row-{i}", [*common, *words, "--device", device])
                found - reference             # of the same shape?
                yield row, found, seconds, reference
            except Exception as error:
                traceback.print_exc()
                yield row, error, None, None


def print_rows(title, unit, function, measure, *arguments):
    print(f"\n{title}\n| options | {unit} | seconds |\n|---|---|---|", flush=True)
    for row, found, seconds, reference in compare(function, *arguments):
        if reference is None:
            text = f"{type(found).__name__}: {' '.join(str(found).split())[:90]} |"
        else:
            text = f"{measure(np.abs(found - reference), reference)} | {seconds:.1f}"
        print(f"| `{row or 'none'}` | {text} |", flush=True)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="a folder for pictures and runs")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    device = sampler.find_device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}")
    print_rows("Distillations", "largest relative difference of losses", losses,
               lambda difference, reference: f"{(difference / np.abs(reference)).max():.1e}",
               args.out, args.device, RUNS)
    run(sampler, [PROMPTS[0], "--upscale", "none", "--out", str(args.out / "start.png")])
    print_rows("Pictures", "largest, mean difference in gray levels", pictures,
               lambda difference, _: f"{difference.max():.0f}, {difference.mean():.4f}",
               args.out, args.device, PICTURES)


if __name__ == "__main__":
    run_command(main)
