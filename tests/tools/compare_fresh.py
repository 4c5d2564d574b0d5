"""Compares with diffusers live, on fresh random weights of several shapes.

    python -m tests.tools.compare_fresh [--seed 100]           needs diffusers and transformers

Each checkpoint is saved by diffusers and opened by both, then opened once more by diffusers after a
round trip through our layout. Three prompts of different lengths are one ragged batch. Printed are
relative L2 distances of latents.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import convert_weights
import sampler

TOKENIZER = Path(__file__).resolve().parent.parent / "data" / "tiny" / "tokenizer"
PROMPTS = ["a cat", "Neon sign “造相 Z-Image” at night, rain and many more words, to be long", ""]
RUNS = [(4, 6, 8, 0.0), (3, 3, 4, 3.0), (9, 5, 1, 0.0), (2, 2, 13, 1.5)]  # h, w, steps, guidance


class Shape(NamedTuple):
    """The sizes of one random checkpoint."""
    dim: int
    heads: int
    axes: list
    layers: int
    refiners: int
    text_width: int
    text_layers: int
    queries: int
    keys: int
    head_dim: int
    channels: tuple
    blocks: int
    groups: int
    shift: float
    shard: str


SHAPES = [
    Shape(64, 2, [8, 12, 12], 2, 1, 48, 3, 6, 2, 8, (8, 16, 16), 1, 4, 6.0, "5GB"),
    Shape(320, 5, [16, 24, 24], 4, 2, 64, 5, 4, 4, 32, (16, 16, 32, 32), 2, 8, 3.0, "1MB"),
    Shape(96, 4, [8, 8, 8], 1, 3, 24, 2, 3, 1, 16, (8, 8), 1, 2, 1.0, "5GB"),
]


def build(s):
    """diffusers' networks with random weights."""
    transformer = ZImageTransformer2DModel(
        dim=s.dim, n_heads=s.heads, n_kv_heads=s.heads, axes_dims=s.axes, n_layers=s.layers,
        n_refiner_layers=s.refiners, cap_feat_dim=s.text_width)
    text_encoder = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=512, hidden_size=s.text_width, intermediate_size=2 * s.text_width,
        num_hidden_layers=s.text_layers, num_attention_heads=s.queries,
        num_key_value_heads=s.keys, head_dim=s.head_dim, rope_theta=1e6,
        tie_word_embeddings=True))
    levels = len(s.channels)
    vae = AutoencoderKL(
        block_out_channels=s.channels, layers_per_block=s.blocks, norm_num_groups=s.groups,
        latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5,
        shift_factor=0.1, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels)
    return {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}


@torch.no_grad()
def randomize(network):
    """Weights of a size that keeps activations near 1; norms near 1."""
    for name, p in network.named_parameters():
        p.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        if p.ndim == 1 and "norm" in name:
            p.add_(1)


def save_checkpoint(folder, shape):
    parts = build(shape)
    for network in parts.values():
        randomize(network)
    pipeline = ZImagePipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=shape.shift),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER))
    pipeline.save_pretrained(folder, max_shard_size=shape.shard)


def diffusers_latents(folder, height, width, steps, guidance):
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipe(list(PROMPTS), height=height, width=width, num_inference_steps=steps,
                guidance_scale=guidance, negative_prompt=["ugly"] * len(PROMPTS),
                generator=generators, output_type="latent").images


def compare(number, shape, folder):
    source, ours, back = (folder / name for name in ("source", "ours", "back"))
    save_checkpoint(source, shape)
    convert_weights.convert(source, ours)
    convert_weights.convert(ours, back, to="official")
    pipeline = sampler.load_pipeline(source)
    for rows, columns, steps, guidance in RUNS:
        height, width = rows * pipeline.pixel_multiple, columns * pipeline.pixel_multiple
        theirs = diffusers_latents(source, height, width, steps, guidance)
        mine = sampler.generate(pipeline, PROMPTS, height, width, steps, guidance, "ugly",
                                output="latent")
        again = diffusers_latents(back, height, width, steps, guidance)
        same = "bit for bit the same" if torch.equal(again, theirs) else "DIFFERENT"
        distance = float((mine - theirs).norm() / theirs.norm())
        print(f"shape {number}, {width}x{height}, {steps} steps, guidance {guidance:g}: "
              f"{distance:.1e}; diffusers after the round trip: {same}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=100)
    seed = parser.parse_args().seed
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(seed + number)
        with tempfile.TemporaryDirectory() as scratch:
            compare(number, shape, Path(scratch))


if __name__ == "__main__":
    main()
