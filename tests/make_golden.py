"""Computes the reference cases with diffusers and transformers. Run by hand, in an environment of its own:

    pip install torch diffusers==0.42.1 transformers==5.23.0 accelerate
    python tests/make_golden.py tests/data/tiny tests/data/reference.safetensors
    python tests/make_golden.py tests/data/tiny golden.safetensors --rounded-frequencies

The first command makes reference.safetensors: what `ZImagePipeline.from_pretrained` computes in float32 from the tiny
random checkpoint. The second makes golden.safetensors (up to the last bits of float32): the same, except that the text
encoder was once cast to bfloat16 and back, weights and buffers. That changes no weight (they are stored in bfloat16) but rounds
the encoder's rotary frequencies, which transformers otherwise keeps in float32; features differ by 1e-4 to 4e-4. golden.safetensors
came first and is kept as an independent witness.

Inputs (latents, times, initial noise, the VAE's image) are taken from golden.safetensors, settings from cases.json. Keys:
text.{i}.ids/hidden; dit.x/t/single.{i}/batch; vae.image/mean/logvar/decoded; pipe.{run}.{i}.noise/latents/image;
img2img.{run}.{i}.latents, from the image img2img.image in [0, 1] with one generator an image, seeded by cases.json.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from safetensors.torch import load_file, save_file

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint")
parser.add_argument("out")
parser.add_argument("--rounded-frequencies", action="store_true")
args = parser.parse_args()

data = Path(__file__).parent / "data"
settings, inputs = json.loads((data / "cases.json").read_text()), load_file(data / "golden.safetensors")
pipe = ZImagePipeline.from_pretrained(args.checkpoint, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
if args.rounded_frequencies:
    pipe.text_encoder.to(torch.bfloat16).to(torch.float32)

out = {}
with torch.no_grad():
    # Lists are copied for every call: the pipelines write the chat template into the list they are given.
    hidden = pipe._encode_prompt(list(settings["prompts"]))
    for i, template in enumerate(settings["templated"]):
        out[f"text.{i}.ids"] = torch.tensor(pipe.tokenizer(template).input_ids)
        out[f"text.{i}.hidden"] = hidden[i].clone()

    # One frame each, (16, 1, h, w), as the pipeline hands them over. Like the given cases, from the given features.
    x, t = inputs["dit.x"], inputs["dit.t"]
    frames, given = [item.unsqueeze(1) for item in x], [inputs[f"text.{i}.hidden"] for i in range(len(x))]
    out["dit.x"], out["dit.t"] = x, t
    for i in range(len(x)):
        out[f"dit.single.{i}"] = pipe.transformer([frames[i]], t[i:i + 1], [given[i]], return_dict=False)[0][0].squeeze(1)
    out["dit.batch"] = torch.stack(pipe.transformer(frames, t, given, return_dict=False)[0]).squeeze(2)

    out["vae.image"] = inputs["vae.image"]
    posterior = pipe.vae.encode(inputs["vae.image"]).latent_dist
    out["vae.mean"], out["vae.logvar"] = posterior.mean, posterior.logvar
    out["vae.decoded"] = pipe.vae.decode(x[:1], return_dict=False)[0]

    for run in settings["runs"]:
        options = {key: value for key, value in run.items() if key != "name"}
        for i in range(2):
            key = f"pipe.{run['name']}.{i}"
            noise = out[f"{key}.noise"] = inputs[f"{key}.noise"]
            for kind, output in (("latents", "latent"), ("image", "pt")):
                out[f"{key}.{kind}"] = pipe([settings["prompts"][i]], latents=noise.clone(), output_type=output, **options).images

    if not args.rounded_frequencies:
        img2img = ZImageImg2ImgPipeline(**pipe.components)
        img2img.set_progress_bar_config(disable=True)
        image = out["img2img.image"] = (inputs["pipe.turbo8.0.image"] * 255).round() / 255
        for run in settings["img2img"]:
            options = {key: value for key, value in run.items() if key not in ("name", "seed")}
            for i in range(2):
                generator = torch.Generator().manual_seed(run["seed"] + i)
                out[f"img2img.{run['name']}.{i}.latents"] = img2img(
                    [settings["prompts"][i]], image=image, generator=generator, output_type="latent", **options).images

save_file({key: value.contiguous() for key, value in out.items()}, args.out)
print(f"wrote {len(out)} tensors to {args.out}")
for key in sorted(set(out) & set(inputs)):
    error = (out[key].double() - inputs[key].double()).norm() / inputs[key].double().norm()
    if error > 1e-6:
        print(f"  {key}: relative L2 distance to golden.safetensors {error:.1e}")
