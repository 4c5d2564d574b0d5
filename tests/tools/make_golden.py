"""Computes tests/data/golden.safetensors with diffusers and transformers.

Run it by hand, in an environment of its own:

    pip install torch diffusers==0.42.1 transformers==5.23.0 accelerate
    python tests/tools/make_golden.py new.safetensors

It computes in float32 what `ZImagePipeline.from_pretrained` computes from tests/data/tiny. The
inputs (latents, times, initial noise, the image for the VAE) are those of the stored file, the
settings those of cases.json. At the end it prints every tensor that differs from the stored one.

    text.{i}.ids, text.{i}.hidden                token ids and features of prompt i
    dit.x, dit.t, dit.single.{i}, dit.batch      three latents and times, one by one and as a batch
    vae.image, vae.mean, vae.logvar, vae.decoded encoder and decoder
    pipe.{run}.{i}.noise, .latents, .image       text to image
    img2img.image, img2img.{run}.{i}.latents     image to image, a generator of its own per image
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parent.parent / "data"


def network_cases(pipe, settings, inputs):
    """Text encoder, DiT and VAE, each alone."""
    out = {key: inputs[key] for key in ("dit.x", "dit.t", "vae.image")}
    # The prompts are copied: the pipeline writes the chat template into the list it is given.
    hidden = pipe._encode_prompt(list(settings["prompts"]))
    for i, template in enumerate(settings["templated"]):
        out[f"text.{i}.ids"] = torch.tensor(pipe.tokenizer(template).input_ids)
        out[f"text.{i}.hidden"] = hidden[i].clone()

    x, t = inputs["dit.x"], inputs["dit.t"]
    frames = [item.unsqueeze(1) for item in x]                       # (16, 1, h, w): one frame each
    for i, frame in enumerate(frames):
        v = pipe.transformer([frame], t[i:i + 1], [hidden[i]], return_dict=False)[0][0]
        out[f"dit.single.{i}"] = v.squeeze(1)
    batch = pipe.transformer(frames, t, list(hidden), return_dict=False)[0]
    out["dit.batch"] = torch.stack(batch).squeeze(2)

    posterior = pipe.vae.encode(inputs["vae.image"]).latent_dist
    out["vae.mean"], out["vae.logvar"] = posterior.mean, posterior.logvar
    out["vae.decoded"] = pipe.vae.decode(x[:1], return_dict=False)[0]
    return out


def text_to_image_cases(pipe, settings, inputs):
    out = {}
    for run in settings["runs"]:
        options = {key: value for key, value in run.items() if key != "name"}
        for i in range(2):
            key = f"pipe.{run['name']}.{i}"
            noise = out[f"{key}.noise"] = inputs[f"{key}.noise"]
            for name, kind in (("latents", "latent"), ("image", "pt")):
                result = pipe([settings["prompts"][i]], latents=noise.clone(), output_type=kind,
                              **options)
                out[f"{key}.{name}"] = result.images
    return out


def image_to_image_cases(pipe, settings, inputs):
    pipe = ZImageImg2ImgPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    out = {"img2img.image": (inputs["pipe.turbo8.0.image"] * 255).round() / 255}
    for run in settings["img2img"]:
        options = {key: value for key, value in run.items() if key not in ("name", "seed")}
        for i in range(2):
            result = pipe([settings["prompts"][i]], image=out["img2img.image"],
                          generator=torch.Generator().manual_seed(run["seed"] + i),
                          output_type="latent", **options)
            out[f"img2img.{run['name']}.{i}.latents"] = result.images
    return out


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    args = parser.parse_args()
    settings = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
    inputs = load_file(DATA / "golden.safetensors")
    pipe = ZImagePipeline.from_pretrained(DATA / "tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    out = network_cases(pipe, settings, inputs)
    out |= text_to_image_cases(pipe, settings, inputs)
    out |= image_to_image_cases(pipe, settings, inputs)
    save_file({key: value.contiguous() for key, value in out.items()}, args.out)
    print(f"wrote {len(out)} tensors to {args.out}")
    for key in sorted(out):
        error = (out[key].double() - inputs[key].double()).norm() / inputs[key].double().norm()
        if error > 1e-6:
            print(f"  {key}: relative L2 distance to the stored case {error:.1e}")


if __name__ == "__main__":
    main()
