"""A picture at the release's size on a CPU, from command to file, beside other programs.

    python -m tests.tools.measure_full SCRATCH [--steps 8] [--size 256] [--sparse]

Makes a checkpoint of random weights in SCRATCH (make_synthetic.py; 21 GB, none with --sparse: then
all weights are zero, and products take the same time), its int8 form (11 GB) and, for
stable-diffusion.cpp, ComfyUI's files (21 GB) and q8_0 GGUF files of these (11 GB). They are kept;
what a stopped run has left there has to be removed. Each case is a process of its own: seconds from
its start to its end, the seconds until the first step begins, those of a step, and the most memory
that it had at once. "own" is what the system cannot give back (RssAnon); "resident" also counts
pages of mapped files, which it can.

diffusers and stable-diffusion.cpp (stable-diffusion-cpp-python, built from source; gguf makes its
files) run if they are installed.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import formats
from tests.tools.measure_loading import make

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a panda on a red card with the word LOVE in white below it"
DIFFUSERS = """
import sys, time, torch, diffusers
folder, size, steps = sys.argv[1:]
pipeline = diffusers.ZImagePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
times = []
image = pipeline({prompt!r}, height=int(size), width=int(size), num_inference_steps=int(steps),
                 guidance_scale=0.0,
                 callback_on_step_end=lambda *a: times.append(time.perf_counter()) or {{}})
image.images[0].save("image.png")
print("step", (times[-1] - times[0]) / (len(times) - 1), times[0])
"""
STABLE_DIFFUSION_CPP = """
import os, sys, time
from stable_diffusion_cpp import StableDiffusion
folder, size, steps = sys.argv[1:]
model = StableDiffusion(
    diffusion_model_path=folder + "/z_image-q8_0.gguf", vae_path=folder + "/ae.safetensors",
    llm_path=folder + "/qwen_3_4b-q8_0.gguf", diffusion_flash_attn=True,
    n_threads=os.cpu_count())
times = []
images = model.generate_image(
    prompt={prompt!r}, width=int(size), height=int(size), sample_steps=int(steps), cfg_scale=1.0,
    progress_callback=lambda step, *_: times.append(time.perf_counter()))
images[0].save("image.png")
times = times[-int(steps):]
print("step", (times[-1] - times[0]) / (len(times) - 1), times[0])
"""
# sampler.py as it is, with the times of its steps.
OURS = """
import sys, time
sys.path.insert(0, {root!r})
import sampler
from convert_weights import run_command
times, sample = [], sampler.sample

def timed(*args, callback=None, **options):
    def after(i, x):
        times.append(time.perf_counter())
        if callback:
            callback(i, x)
    return sample(*args, callback=after, **options)

sampler.sample = timed
run_command(sampler.main)
print("step", (times[-1] - times[0]) / (len(times) - 1), times[0])
"""


def memory(pid):
    """GB of a process: what is its own, and all that is resident."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0, 0.0
    found = re.findall(r"(RssAnon|VmRSS):\s+(\d+) kB", text)
    found = {name: 1024 * int(kb) / 1e9 for name, kb in found}
    return found.get("RssAnon", 0.0), found.get("VmRSS", 0.0)


def run(name, code, arguments, folder):
    """Runs a case and prints its row."""
    start, highest = time.perf_counter(), (0.0, 0.0)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=folder,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment)
    output = []
    reader = threading.Thread(target=lambda: output.extend(process.communicate()))
    reader.start()
    while reader.is_alive():
        highest = tuple(map(max, highest, memory(process.pid)))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        lines = output[1].strip().splitlines() or [f"ended by signal {-process.returncode}"]
        print(f"| {name} | {lines[-1][:90]} | | | | |", flush=True)
        return
    step, first = map(float, re.search(r"^step (\S+) (\S+)", output[0], re.M).groups())
    ready = first - step - start               # the clock is the system's, the same for all
    print(f"| {name} | {seconds:.1f} | {ready:.1f} | {step:.2f} | {highest[0]:.1f} | "
          f"{highest[1]:.1f} |", flush=True)


def write_q8_0(source, target):
    """A GGUF file of a safetensors file: matrices of whole blocks in q8_0, the rest in float32."""
    import gguf
    from gguf.quants import quantize
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(target, source.stem)
    for name, stored in formats.read_safetensors(source)[0].items():
        is_matrix = len(stored.shape) == 2 and stored.shape[1] % 32 == 0
        weight = formats.read(stored).float().numpy()
        writer.add_tensor(name, quantize(weight, q8_0) if is_matrix else weight,
                          raw_dtype=q8_0 if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in the name")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps should be at least 2: a step is timed from one to the next")
    args.scratch.mkdir(parents=True, exist_ok=True)
    folder = args.scratch.absolute()
    official, int8, comfy = folder / "official", folder / "int8", folder / "comfy"
    sparse = ["--sparse"] if args.sparse else []
    has_cpp = all(map(importlib.util.find_spec, ("stable_diffusion_cpp", "gguf")))
    make(official, *sparse)
    if has_cpp:
        make(comfy, "--layout", "comfy", *sparse)
    if not int8.exists():
        subprocess.run([sys.executable, ROOT / "convert_weights.py", official, int8,
                        "--dtype", "int8"], check=True)
    for file in ("z_image", "qwen_3_4b") if has_cpp else ():
        target = comfy / f"{file}-q8_0.gguf"
        if not target.exists():
            write_q8_0(comfy / f"{file}.safetensors", target)
    ours, theirs = OURS.format(root=str(ROOT)), DIFFUSERS.format(prompt=PROMPT)
    cpp = STABLE_DIFFUSION_CPP.format(prompt=PROMPT)
    options = ["--device", "cpu", "--steps", args.steps, "--size", f"{args.size}x{args.size}"]
    cases = {
        "ours, int8": (ours, [PROMPT, "--model", int8, *options]),
        "ours, bfloat16": (ours, [PROMPT, "--model", official, *options, "--dtype", "bfloat16"]),
        "diffusers, bfloat16": (theirs, [official, args.size, args.steps]),
        "stable-diffusion.cpp, q8_0": (cpp, [comfy, args.size, args.steps])}
    print(f"{args.size}x{args.size}, {args.steps} steps\n| | seconds | to the first step | "
          "a step | own, GB | resident, GB |\n|---|---|---|---|---|---|", flush=True)
    for name, (code, arguments) in cases.items():
        if args.only in name:
            run(name, code, arguments, args.scratch)


if __name__ == "__main__":
    main()
