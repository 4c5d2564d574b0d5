"""Prints the README's table of distances to diffusers + transformers, from the stored reference cases:

    python tests/parity_table.py
"""

import json
import sys

import torch
from conftest import DATA, TINY, relative_error
from safetensors.torch import load_file

import sampler
from model import Text


@torch.no_grad()
def main():
    reference, settings = load_file(DATA / "reference.safetensors"), json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
    pipeline, rows = sampler.load_pipeline(TINY), {}
    text = sampler.encode_prompts(pipeline, settings["prompts"])
    rows["text encoder, features"] = [relative_error(text.features[i, :n], reference[f"text.{i}.hidden"]) for i, n in enumerate(text.lengths.tolist())]
    given = [load_file(DATA / "golden.safetensors")[f"text.{i}.hidden"] for i in range(3)]   # what the reference's DiT cases were fed
    x, t = reference["dit.x"], reference["dit.t"]
    rows["DiT, one at a time"] = [relative_error(pipeline.dit(x[i:i + 1], t[i:i + 1], Text(f[None], torch.tensor([len(f)])))[0],
                                                 reference[f"dit.single.{i}"]) for i, f in enumerate(given)]
    batch = Text(torch.nn.utils.rnn.pad_sequence(given, batch_first=True), torch.tensor([len(f) for f in given]))
    rows["DiT, ragged batch"] = [relative_error(pipeline.dit(x, t, batch), reference["dit.batch"])]
    vae = pipeline.vae
    rows["VAE, encoder"] = [relative_error(a, reference[f"vae.{name}"]) for a, name in zip(vae.moments(reference["vae.image"]), ("mean", "logvar"))]
    rows["VAE, decoder"] = [relative_error(vae.decoder(x[:1]), reference["vae.decoded"])]
    levels = []
    for run in settings["runs"]:
        row = rows[f"latents, {run['num_inference_steps']} steps, guidance {run['guidance_scale']:g}"
                   + (", normalised and truncated" if "cfg_truncation" in run else "")] = []
        for i in range(2):
            key = f"pipe.{run['name']}.{i}"
            latents, image = (sampler.generate(
                pipeline, settings["prompts"][i], run["height"], run["width"], run["num_inference_steps"], run["guidance_scale"],
                run.get("negative_prompt", ""), noise=reference[f"{key}.noise"], cfg_normalization=run.get("cfg_normalization", False),
                cfg_truncation=run.get("cfg_truncation", 1.0), output=output) for output in ("latent", "tensor"))
            row.append(relative_error(latents, reference[f"{key}.latents"]))
            levels.append(255 * float((image - reference[f"{key}.image"]).abs().max()))
    print("| stage | largest relative L2 distance |\n|---|---|")
    for name, errors in rows.items():
        print(f"| {name} | {max(errors):.1e} |")
    print(f"| images of these runs | {max(levels):.4f} of 255 grey levels |")


if __name__ == "__main__":
    sys.exit(main())
