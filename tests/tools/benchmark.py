"""Time and memory against diffusers, on the same random weights, in one run. Run by hand; without diffusers, our side alone.

    python tests/benchmark.py                                  the bundled model, then a middle-sized one, on a CPU: some minutes
    python tests/benchmark.py --size full --device cuda        the release's sizes at 1024x1024: both sides, eager and compiled, every attention kernel
    python tests/benchmark.py --memory --device cuda           the release's sizes: peak memory and time of each way to save memory

Both sides are timed alternately; the figures are medians, and "ratio" is theirs over ours: above 1 we are faster. "Difference" is
the relative L2 distance of the two results. TFLOP/s counts the blocks' matrix products and attention; its share is of the fastest
2048 x 2048 (GPU: 8192 x 8192) product measured in the same run.
"""

import argparse
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sampler  # noqa: E402
from convert_weights import CHAT_TEMPLATE, NETWORKS, build_pieces  # noqa: E402
from model import DiT, DiTConfig, Linear, TextEncoderConfig, VAEConfig  # noqa: E402

with suppress(ImportError):
    import diffusers
    import transformers
    transformers.logging.set_verbosity_error(), diffusers.logging.set_verbosity_error()

MODEL = ROOT / "tutorials" / "shapes" / "student"
CAPTION = "a small white heart on a red background"
CONFIGS = {
    "mid": (TextEncoderConfig(vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=7, num_attention_heads=8,
                              num_key_value_heads=2, head_dim=64),
            DiTConfig(dim=1024, n_heads=8, n_layers=12, cap_feat_dim=512), VAEConfig(block_out_channels=(32, 64, 128, 128), norm_num_groups=8), 512),
    "full": (TextEncoderConfig(), DiTConfig(), VAEConfig(), 1024)}


# --- The two sides ------------------------------------------------------------------------------------------


@torch.no_grad()
def build(network, config, device, dtype):
    """One of our networks with random weights, made on the device."""
    with torch.device("meta"):
        module = NETWORKS[network][0](config)
    module = module.to_empty(device=device).to(dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def pipeline_of(size, device, dtype):
    if size == "tiny":
        return sampler.load_pipeline(MODEL, device, dtype)
    encoder, dit, vae, pixels = CONFIGS[size]
    return sampler.Pipeline(
        sampler.load_tokenizer(ROOT / "tests/data/tiny/tokenizer/tokenizer.json"), build("text_encoder", encoder, device, dtype),
        build("dit", dit, device, dtype), build("vae", vae, device, torch.float32), shift=3.0, size=pixels, device=torch.device(device))


def official_weights(network, module):
    """Our weights under the names, and in the pieces, of the official files."""
    state = module.state_dict()
    return {p.official: state[p.ours][p.start:p.start + p.shape[0]] for p in build_pieces(network, module.config) if p.needed}


def reference_of(ours, dtype):
    """diffusers' pipeline with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        ours.tokenizer.save(str(tokenizer))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    e, d, v, device = ours.text_encoder.config, ours.dit.config, ours.vae.config, ours.device
    with device:
        encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=e.vocab_size, hidden_size=e.hidden_size, intermediate_size=e.intermediate_size, num_hidden_layers=e.num_hidden_layers,
            num_attention_heads=e.num_attention_heads, num_key_value_heads=e.num_key_value_heads, head_dim=e.head_dim, rope_theta=e.rope_theta,
            rms_norm_eps=e.rms_norm_eps, tie_word_embeddings=True, dtype=dtype))
        dit = diffusers.ZImageTransformer2DModel(
            in_channels=d.in_channels, dim=d.dim, n_layers=d.n_layers, n_refiner_layers=d.n_refiner_layers, n_heads=d.n_heads, n_kv_heads=d.n_heads,
            norm_eps=d.norm_eps, cap_feat_dim=d.cap_feat_dim, rope_theta=d.rope_theta, t_scale=d.t_scale, axes_dims=list(d.axes_dims), axes_lens=list(d.axes_lens))
        levels = len(v.block_out_channels)
        vae = diffusers.AutoencoderKL(
            block_out_channels=v.block_out_channels, layers_per_block=v.layers_per_block, norm_num_groups=v.norm_num_groups,
            latent_channels=v.latent_channels, scaling_factor=v.scaling_factor, shift_factor=v.shift_factor, use_quant_conv=False, use_post_quant_conv=False,
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    for network, theirs in (("text_encoder", encoder), ("dit", dit), ("vae", vae)):
        theirs = theirs.to(torch.float32 if network == "vae" else dtype).eval().requires_grad_(False)
        missing, unexpected = (theirs.model if network == "text_encoder" else theirs).load_state_dict(
            official_weights(network, getattr(ours, network)), strict=False)
        spare = (f"layers.{e.num_hidden_layers - 1}.", "norm.")          # of the language model; the pipeline does not use their result
        assert not unexpected and all(network == "text_encoder" and name.startswith(spare) for name in missing), (missing, unexpected)
    pipeline = diffusers.ZImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=ours.shift), vae, encoder, tokenizer, dit)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- Measuring ----------------------------------------------------------------------------------------------


def clock(function, device):
    """-> result, seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@torch.no_grad()
def race(functions, repeats, device):
    """{name: function} -> {name: (result, first seconds, median of the later ones, peak GiB on a GPU)}, run alternately."""
    first, times, results, peaks = {}, {name: [] for name in functions}, {}, {}
    for name, function in functions.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        results[name], first[name] = clock(function, device)
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(clock(function, device)[1])
    return {name: (results[name], first[name], median(times[name]), peaks[name]) for name in functions}


def flops(dit, n, m):
    """Of one forward: matrix products and attention of all blocks over n image and m caption tokens. (The context refiner runs once a prompt.)"""
    weights = lambda blocks: sum(layer.weight.numel() for block in blocks for layer in block.modules() if isinstance(layer, Linear))
    d, s, refiner, layers = dit.config.dim, n + m, dit.noise_refiner, dit.layers
    return 2 * (n * weights(refiner) + s * weights(layers)) + 4 * d * (n * n * len(refiner) + s * s * len(layers))


@torch.no_grad()
def matmul_ceiling(device, dtype):
    """FLOP/s of one large product."""
    side = 8192 if device.type == "cuda" else 2048
    layer, x = Linear(side, side).to(device, dtype), torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(clock(lambda: layer(x), device)[1] for _ in range(10))


def line(what, raced, note=""):
    (ours, _, seconds, peak), theirs = raced["ours"], raced.get("diffusers")
    cells = [what, f"{seconds:.4g} s", "", "", "", note]
    if theirs:
        difference = float((ours.double() - theirs[0].double()).norm() / theirs[0].double().norm())
        cells[2:5] = f"{theirs[2]:.4g} s", f"{theirs[2] / seconds:.2f}", f"{difference:.1e}"
    if peak:
        cells.append(f"{peak:.1f} GiB" + (f", {theirs[3]:.1f}" if theirs else ""))
    print("| " + " | ".join(cells) + " |", flush=True)


@torch.no_grad()
def compare(size, device, dtype, repeats, batches, compiled):
    ours = pipeline_of(size, device, dtype)
    theirs = reference_of(ours, dtype) if "diffusers" in globals() else None
    sides = lambda **functions: {name: f for name, f in functions.items() if f and (name == "ours" or theirs)}
    pixels, steps, vae = ours.size, 4 if size == "tiny" else 8, ours.vae.config
    ceiling = matmul_ceiling(device, dtype)
    n_dit = sum(p.numel() for p in ours.dit.parameters())
    print(f"\n**{size}**, {n_dit / 1e6:.3g} M parameters in the DiT, {pixels}x{pixels}, {str(dtype)[6:]}, {device}; product ceiling {ceiling / 1e12:.3g} TFLOP/s\n")
    print("| | ours | diffusers | ratio | difference | TFLOP/s |" + (" peak, ours and theirs |" if device.type == "cuda" else ""))
    print("|---|---|---|---|---|---|" + ("---|" if device.type == "cuda" else ""), flush=True)

    def forward_functions(batch):
        text = sampler.encode_prompts(ours, [CAPTION])
        side, g = pixels // vae.downsampling, torch.Generator().manual_seed(1)
        x, t = torch.randn(batch, vae.latent_channels, side, side, generator=g).to(device), torch.full((batch,), 0.3, device=device)
        features = text.features[0, :text.lengths[0]]
        context = ours.dit.prepare(text, side, side)
        work = batch * flops(ours.dit, x[0, 0].numel() // 4, context.caption.shape[1])
        return work, sides(ours=lambda: ours.dit(x, t, context), diffusers=lambda: torch.stack(
            theirs.transformer([i[:, None].to(dtype) for i in x], t.to(dtype), [features] * batch, return_dict=False)[0])[:, :, 0].float())

    def pipeline_functions():
        generators = lambda: [torch.Generator().manual_seed(0)]
        return sides(ours=lambda: sampler.generate(ours, CAPTION, steps=steps, guidance=0.0, output="tensor"), diffusers=lambda: theirs(
            [CAPTION], height=pixels, width=pixels, num_inference_steps=steps, guidance_scale=0.0, generator=generators(), output_type="pt").images)

    for batch in batches:
        work, functions = forward_functions(batch)
        raced = race(functions, repeats, device)
        line(f"DiT, one forward, batch {batch}", raced, f"{work / raced['ours'][2] / 1e12:.3g} ({work / raced['ours'][2] / ceiling:.0%})")
    latents = torch.randn(1, vae.latent_channels, pixels // vae.downsampling, pixels // vae.downsampling, generator=torch.Generator().manual_seed(1)).to(device)
    ids = torch.tensor([sampler.token_ids(ours.tokenizer, CAPTION)], device=device)
    lengths = torch.tensor([ids.shape[1]], device=device)
    line(f"text encoder, {ids.shape[1]} tokens", race(sides(
        ours=lambda: ours.text_encoder(ids, lengths).features,
        diffusers=lambda: theirs.text_encoder(ids, output_hidden_states=True).hidden_states[-2]), repeats, device))
    line("VAE, decode", race(sides(
        ours=lambda: ours.vae.decode(latents),
        diffusers=lambda: theirs.vae.decode(latents / vae.scaling_factor + vae.shift_factor, return_dict=False)[0]), repeats, device))
    line(f"whole pipeline, {steps} steps", race(pipeline_functions(), min(repeats, 2) if size == "mid" else repeats, device))
    if device.type == "cuda":
        work, functions = forward_functions(1)
        for name, backend in sampler.ATTENTION.items():
            with suppress(RuntimeError), sampler.sdpa_kernel(backend):
                line(f"DiT, one forward, {name} attention", race({"ours": functions["ours"]}, repeats, device))
        with no_sync():
            sampler.sample(ours.dit, latents, sampler.encode_prompts(ours, [CAPTION]), sampler.time_schedule(steps, 3.0))
        print("\nThe loop over steps waits for the GPU nowhere.")
    if compiled:
        ours.dit.compile()
        if theirs:
            theirs.transformer.compile()
        raced = race(pipeline_functions(), repeats, device)
        line(f"compiled: whole pipeline, {steps} steps", raced, "first call " + ", ".join(f"{name} {r[1]:.0f} s" for name, r in raced.items()))


@contextmanager
def no_sync():
    """An error where the host waits for the GPU, but for the one read `DiT.prepare` does, once a prompt."""
    prepare = DiT.prepare

    def allowed(self, *args):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return prepare(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("error")
    DiT.prepare = allowed
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        DiT.prepare = prepare


@torch.no_grad()
def memory(size, device, dtype, repeats):
    """Peak memory and time of a whole picture, for each way to save memory."""
    print(f"\n**{size}**, {str(dtype)[6:]}, {torch.cuda.get_device_name(device)}\n\n| | peak | seconds | first picture |\n|---|---|---|---|")
    for weights in (None, "fp8"):
        for offload in (None, "networks", "blocks"):
            ours = pipeline_of(size, device, dtype)
            for layer in ours.dit.modules():
                if weights and isinstance(layer, Linear):
                    layer.to_float8()
            ours.offload = offload
            if offload:
                for network in (ours.text_encoder, ours.dit, ours.vae):
                    network.to("cpu")
            if offload == "blocks":
                sampler.stream_blocks(ours)
            torch.cuda.empty_cache()
            _, first, seconds, peak = race({"": lambda: sampler.generate(ours, CAPTION, steps=8, guidance=0.0, output="tensor")}, repeats, device)[""]
            print(f"| {f'--offload {offload}' if offload else 'all on the GPU'}{', --weights fp8' if weights else ''} | {peak:.2f} GiB | {seconds:.2f} | {first:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Time and memory against diffusers.")
    parser.add_argument("--size", choices=["tiny", "mid", "full"], nargs="+", default=["tiny", "mid"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", help="default: both on a CPU, bfloat16 on a GPU")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 on a CPU, 1 and 4 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also compiled (default: on a GPU)")
    parser.add_argument("--memory", action="store_true", help="peak memory of the ways to save it, in place of the comparison (GPU)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampler.keep_freed_memory()               # as sampler.py itself does; it serves both sides
    device = sampler.pick_device(args.device)
    gpu = device.type == "cuda"
    print(f"torch {torch.__version__}, " + (torch.cuda.get_device_name(device) if gpu else f"{args.threads} threads")
          + (f", diffusers {diffusers.__version__}" if "diffusers" in globals() else ", diffusers is not installed"))
    for size in args.size if not args.memory else ["full"]:
        for dtype in args.dtype or (["bfloat16"] if gpu else ["float32", "bfloat16"]):
            if args.memory:
                memory(size, device, getattr(torch, dtype), args.repeats)
            else:
                compare(size, device, getattr(torch, dtype), args.repeats, args.batch or ([1, 4] if gpu else [1]), gpu if args.compile is None else args.compile)


if __name__ == "__main__":
    main()
