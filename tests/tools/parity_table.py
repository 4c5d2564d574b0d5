"""Prints the distances to diffusers and transformers from the stored cases.

    python -m tests.tools.parity_table
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import sampler
from model import Text

DATA = Path(__file__).resolve().parent.parent / "data"


def distance(a, b):
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def network_rows(pipeline, golden, prompts):
    text = sampler.encode_prompts(pipeline, prompts)
    lengths = text.lengths.tolist()
    yield "text encoder, features", [
        distance(text.features[i, :n], golden[f"text.{i}.hidden"]) for i, n in enumerate(lengths)]

    x, t = golden["dit.x"], golden["dit.t"]
    features = [golden[f"text.{i}.hidden"] for i in range(3)]
    single = []
    for i, f in enumerate(features):
        v = pipeline.dit(x[i:i + 1], t[i:i + 1], Text(f[None], torch.tensor([len(f)])))
        single.append(distance(v[0], golden[f"dit.single.{i}"]))
    yield "DiT, one at a time", single
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    v = pipeline.dit(x, t, Text(padded, torch.tensor(lengths)))
    yield "DiT, ragged batch", [distance(v, golden["dit.batch"])]

    mean, logvar = pipeline.vae.moments(golden["vae.image"])
    yield "VAE, encoder", [distance(mean, golden["vae.mean"]),
                           distance(logvar, golden["vae.logvar"])]
    yield "VAE, decoder", [distance(pipeline.vae.decoder(x[:1]), golden["vae.decoded"])]


def run_row(pipeline, golden, run, prompts):
    """Name of a run, distances of its latents, largest difference of its images (gray levels)."""
    name = f"latents, {run['num_inference_steps']} steps, guidance {run['guidance_scale']:g}"
    if "cfg_truncation" in run:
        name += ", normalized and truncated"
    distances, levels = [], []
    for i in range(2):
        key = f"pipe.{run['name']}.{i}"
        options = dict(
            height=run["height"], width=run["width"], steps=run["num_inference_steps"],
            guidance=run["guidance_scale"], negative_prompt=run.get("negative_prompt", ""),
            noise=golden[f"{key}.noise"], cfg_normalization=run.get("cfg_normalization", False),
            cfg_truncation=run.get("cfg_truncation", 1.0))
        latents = sampler.generate(pipeline, prompts[i], output="latent", **options)
        image = sampler.generate(pipeline, prompts[i], output="tensor", **options)
        distances.append(distance(latents, golden[f"{key}.latents"]))
        levels.append(255 * float((image - golden[f"{key}.image"]).abs().max()))
    return name, distances, max(levels)


def main():
    golden = load_file(DATA / "golden.safetensors")
    settings = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
    pipeline = sampler.load_pipeline(DATA / "tiny")
    print("| stage | largest relative L2 distance |\n|---|---|")
    for name, distances in network_rows(pipeline, golden, settings["prompts"]):
        print(f"| {name} | {max(distances):.1e} |")
    levels = []
    for run in settings["runs"]:
        name, distances, level = run_row(pipeline, golden, run, settings["prompts"])
        print(f"| {name} | {max(distances):.1e} |")
        levels.append(level)
    print(f"| images of these runs | {max(levels):.4f} of 255 gray levels |")


if __name__ == "__main__":
    main()
