"""Time against diffusers, in one run on the same random weights. Run by hand where diffusers is installed:

    python tests/bench_speed.py [--repeats 7] [--threads 2]

Per case the two are timed alternately and the medians and their ratio printed (above 1: we are faster). The DiT has 8 + 2 + 2 layers of
width 512 in float32, the text encoder 6 layers, the VAE the release's layout at a quarter of its width.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sampler  # noqa: E402


def reference_pipeline():
    torch.manual_seed(0)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny/tokenizer"),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(
            vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=7, num_attention_heads=8, num_key_value_heads=2,
            head_dim=64, rope_theta=1e6, tie_word_embeddings=True)),
        transformer=ZImageTransformer2DModel(dim=512, n_heads=8, n_kv_heads=8, n_layers=8, n_refiner_layers=2, axes_dims=[16, 24, 24], cap_feat_dim=512),
        vae=AutoencoderKL(
            block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=8, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        reference_pipeline().save_pretrained(folder)
        theirs, ours = ZImagePipeline.from_pretrained(folder, dtype=torch.float32), sampler.load_pipeline(folder)
    theirs.set_progress_bar_config(disable=True)
    long, short = "a red fox in the snow at dusk, " * 6, "a cat"
    print(f"torch {torch.__version__}, {args.threads} threads, {args.repeats} repeats; median seconds")
    for name, prompts, size, steps, guidance in [
            ("256 px, 8 steps, one prompt", [long], 256, 8, 0.0), ("256 px, 8 steps, guidance 4", [long], 256, 8, 4.0),
            ("256 px, 4 steps, 2 ragged prompts", [long, short], 256, 4, 0.0), ("512 px, 4 steps, one prompt", [long], 512, 4, 0.0)]:
        run = {
            "diffusers": lambda: theirs(list(prompts), height=size, width=size, num_inference_steps=steps, guidance_scale=guidance, generator=[
                torch.Generator().manual_seed(i) for i in range(len(prompts))], output_type="pt").images,
            "ours": lambda: sampler.generate(ours, prompts, size, size, steps, guidance, output="tensor")}
        difference = (run["diffusers"]() - run["ours"]()).abs().max() * 255  # warms both up
        times = {"diffusers": [], "ours": []}
        for _ in range(args.repeats):
            for which, function in run.items():
                start = time.perf_counter()
                function()
                times[which].append(time.perf_counter() - start)
        a, b = median(times["diffusers"]), median(times["ours"])
        print(f"{name:36} diffusers {a:6.2f}  ours {b:6.2f}  ratio {a / b:.2f}  (largest difference {difference:.3f} grey levels)", flush=True)


if __name__ == "__main__":
    main()
