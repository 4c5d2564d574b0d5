"""Compares with diffusers live, on fresh random weights of several shapes. Run by hand where diffusers is installed:

    python tests/compare_fresh.py [--seed 100]

Each checkpoint is saved by diffusers, loaded by both, and loaded once more by diffusers after a round trip through our
layout. Three prompts of different lengths are one ragged batch; printed are relative L2 distances of latents.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import convert_weights  # noqa: E402
import sampler  # noqa: E402

# dim, heads, axes, layers, refiners | text width, encoder layers, query heads, key heads, head width | VAE widths, blocks, groups | shift, shards
SHAPES = [(64, 2, [8, 12, 12], 2, 1, 48, 3, 6, 2, 8, (8, 16, 16), 1, 4, 6.0, "5GB"),
          (320, 5, [16, 24, 24], 4, 2, 64, 5, 4, 4, 32, (16, 16, 32, 32), 2, 8, 3.0, "1MB"),
          (96, 4, [8, 8, 8], 1, 3, 24, 2, 3, 1, 16, (8, 8), 1, 2, 1.0, "5GB")]
PROMPTS = ["a cat", "Neon sign “造相 Z-Image” at night, rain ⚡️ and many more words to make it longer", ""]


def random_checkpoint(folder, dim, heads, axes, layers, refiners, width, encoder_layers, queries, keys, head, channels, blocks, groups, shift, shards):
    levels = len(channels)
    parts = dict(
        transformer=ZImageTransformer2DModel(dim=dim, n_heads=heads, n_kv_heads=heads, axes_dims=axes, cap_feat_dim=width, n_layers=layers,
                                             n_refiner_layers=refiners),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(
            vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=encoder_layers, num_attention_heads=queries,
            num_key_value_heads=keys, head_dim=head, rope_theta=1e6, tie_word_embeddings=True)),
        vae=AutoencoderKL(
            block_out_channels=channels, layers_per_block=blocks, norm_num_groups=groups, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.5, shift_factor=0.1, down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels))
    with torch.no_grad():
        for name, p in (item for part in parts.values() for item in part.named_parameters()):
            p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
            if p.ndim == 1 and "norm" in name:
                p.add_(1)
    ZImagePipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
                   tokenizer=AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny/tokenizer")).save_pretrained(folder, max_shard_size=shards)


def diffusers_latents(folder, height, width, steps, guidance):
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(list(PROMPTS), height=height, width=width, num_inference_steps=steps, guidance_scale=guidance, negative_prompt=["ugly"] * 3,
                generator=[torch.Generator().manual_seed(i) for i in range(3)], output_type="latent").images


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=100)
    seed, distance = parser.parse_args().seed, lambda a, b: float((a - b).norm() / b.norm())
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(seed + number)
        with tempfile.TemporaryDirectory() as scratch:
            source, ours, back = (Path(scratch) / name for name in ("source", "ours", "back"))
            random_checkpoint(source, *shape)
            convert_weights.convert(source, ours)
            convert_weights.convert(ours, back, to="official")
            pipeline = sampler.load_pipeline(source)
            for rows, columns, steps, guidance in ((4, 6, 8, 0.0), (3, 3, 4, 3.0), (9, 5, 1, 0.0), (2, 2, 13, 1.5)):
                height, width = rows * pipeline.pixel_multiple, columns * pipeline.pixel_multiple
                theirs = diffusers_latents(source, height, width, steps, guidance)
                mine = sampler.generate(pipeline, PROMPTS, height, width, steps, guidance, "ugly", output="latent")
                same = torch.equal(diffusers_latents(back, height, width, steps, guidance), theirs)
                print(f"shape {number}, {width}x{height}, {steps} steps, guidance {guidance:g}: {distance(mine, theirs):.1e}; "
                      f"diffusers after the round trip: {'bit for bit the same' if same else 'DIFFERENT'}", flush=True)


if __name__ == "__main__":
    main()
