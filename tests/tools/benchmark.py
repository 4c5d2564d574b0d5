"""Time against diffusers, on the same random weights, in one run; without diffusers, ours alone.

    python -m tests.tools.benchmark                     bundled model and a mid-sized one: minutes
    python -m tests.tools.benchmark --size full         the release's sizes at 256x256: 45 GB
    python -m tests.tools.benchmark --size full --device cuda --pixels 1024
    python -m tests.tools.benchmark --size mid wide     int8 on a CPU: "wide" is the release's
                                                        width with few blocks

The sides run alternately; figures are medians, and "ratio" is theirs over ours: above 1 we are
faster. "Difference" is the relative L2 distance of the two results. The rows "int8" and "fp8" are
ours after sampler.quantize. benchmark_gpu.py has more rows for GPUs; measure_commands.py runs whole
commands.
"""

import argparse
import copy
import importlib.util
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import hardware
import sampler
from convert_weights import NETWORKS, expected_tensors
from formats import CHAT_TEMPLATE, load_tokenizer
from model import DiTConfig, TextEncoderConfig, VAEConfig

DATA = Path(__file__).resolve().parent.parent / "data"
CAPTION = "a panda on a red card with the word LOVE in white below it"
MID = {
    "text_encoder": TextEncoderConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=7,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64),
    "dit": DiTConfig(dim=1024, n_heads=8, n_layers=12, cap_feat_dim=512),
    "vae": VAEConfig(block_out_channels=(32, 64, 128, 128), norm_num_groups=8),
}
FULL = {"text_encoder": TextEncoderConfig(), "dit": DiTConfig(), "vae": VAEConfig()}
WIDE = MID | {"dit": DiTConfig(n_layers=2, n_refiner_layers=1, cap_feat_dim=512)}
CONFIGS = {"mid": MID, "wide": WIDE, "full": FULL}
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None


# --- The two sides --------------------------------------------------------------------------------


@torch.no_grad()
def build(kind, config, device, dtype):
    """One of our networks with random weights, made on the device."""
    with torch.device("meta"):
        module = NETWORKS[kind][0](config)
    module = module.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def our_pipeline(size, pixels, device, dtype):
    if size == "bundled":
        pipeline = sampler.load_pipeline(sampler.find_bundled(), device, dtype)
    else:
        networks = {kind: build(kind, config, device, torch.float32 if kind == "vae" else dtype)
                    for kind, config in CONFIGS[size].items()}
        tokenizer = load_tokenizer(DATA / "tiny" / "tokenizer" / "tokenizer.json")
        pipeline = sampler.Pipeline(tokenizer, **networks, shift=3.0, size=pixels, device=device)
    if device.type == "cpu":
        for net in (pipeline.text_encoder, pipeline.dit, pipeline.vae):
            hardware.use_cpu_kernels(net)
    return pipeline


def diffusers_networks(ours, dtype):
    """diffusers' and transformers' networks of the same sizes, with other random weights."""
    import diffusers
    import transformers

    e, d, v = ours.text_encoder.config, ours.dit.config, ours.vae.config
    levels = len(v.block_out_channels)
    with ours.device:
        text_encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=e.vocab_size, hidden_size=e.hidden_size,
            intermediate_size=e.intermediate_size, num_hidden_layers=e.num_hidden_layers,
            num_attention_heads=e.num_attention_heads, num_key_value_heads=e.num_key_value_heads,
            head_dim=e.head_dim, rope_theta=e.rope_theta, rms_norm_eps=e.rms_norm_eps,
            tie_word_embeddings=True, dtype=dtype))
        dit = diffusers.ZImageTransformer2DModel(
            in_channels=d.in_channels, dim=d.dim, n_layers=d.n_layers,
            n_refiner_layers=d.n_refiner_layers, n_heads=d.n_heads, n_kv_heads=d.n_heads,
            norm_eps=d.norm_eps, cap_feat_dim=d.cap_feat_dim, rope_theta=d.rope_theta,
            t_scale=d.t_scale, axes_dims=list(d.axes_dims), axes_lens=list(d.axes_lens))
        vae = diffusers.AutoencoderKL(
            block_out_channels=v.block_out_channels, layers_per_block=v.layers_per_block,
            norm_num_groups=v.norm_num_groups, latent_channels=v.latent_channels,
            scaling_factor=v.scaling_factor, shift_factor=v.shift_factor, use_quant_conv=False,
            use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels)
    return {"text_encoder": text_encoder, "dit": dit, "vae": vae}


def diffusers_pipeline(ours, dtype):
    """diffusers' pipeline with our weights."""
    import diffusers
    import transformers

    networks = diffusers_networks(ours, dtype)
    for kind, theirs in networks.items():
        theirs.to(torch.float32 if kind == "vae" else dtype).eval().requires_grad_(False)
        module = getattr(ours, kind)
        state = module.state_dict()
        names = expected_tensors(kind, module.config).items()
        state = {name: state[place] for name, (place, _, needed) in names if needed}
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        # The pipeline does not use the language model's last layer and final norm.
        last = f"model.layers.{len(ours.text_encoder.layers)}.", "model.norm.", "lm_head."
        assert not unexpected, unexpected
        assert all(kind == "text_encoder" and name.startswith(last) for name in missing)
    with tempfile.TemporaryDirectory() as folder:
        ours.tokenizer.save(f"{folder}/tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=ours.shift)
    pipeline = diffusers.ZImagePipeline(
        scheduler, networks["vae"], networks["text_encoder"], tokenizer, networks["dit"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- Measuring ------------------------------------------------------------------------------------


def clock(function, device):
    """Returns the result and the seconds it took."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@torch.no_grad()
def race(functions, repeats, device):
    """{name: function} -> {name: (result, median seconds)}; they run alternately."""
    results = {name: clock(function, device)[0] for name, function in functions.items()}
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(clock(function, device)[1])
    return {name: (results[name], median(seconds[name])) for name in functions}


def print_row(what, raced):
    """Ours beside each of the others."""
    ours, seconds = raced.pop("ours")
    if not raced:
        print(f"| {what} | {seconds:.4g} s | | | | |", flush=True)
    for name, (result, other) in raced.items():
        difference = float((result.double() - ours.double()).norm() / ours.double().norm())
        print(f"| {what} | {seconds:.4g} s | {name} {other:.4g} s | {other / seconds:.2f} | "
              f"{difference:.1e} |", flush=True)


def forward_functions(ours, theirs, dtype):
    """One call of the DiT by each side, and by ours with one byte for each weight."""
    device, text = ours.device, sampler.encode_prompts(ours, [CAPTION])
    noise, _ = sampler.latent_noise(ours, ours.size, ours.size, 1, 1)
    x, t = noise.to(device), torch.full((1,), 0.3, device=device)
    features = text.features[0, :text.lengths[0]]

    def of(dit):
        context = dit.prepare(text, *x.shape[-2:])
        return lambda: dit(x, t, context)

    functions = {"ours": of(ours.dit)}
    if theirs:
        functions["diffusers"] = lambda: theirs.transformer(
            [x[0, :, None].to(dtype)], t.to(dtype), [features], return_dict=False)[0][0][None, :, 0]
    for kind in ("int8", "fp8"):
        if sum(p.numel() for p in ours.dit.parameters()) < 1e9:      # else memory is short
            plain = copy.deepcopy(ours.dit)
            for layer in plain.modules():
                if type(layer) is sampler.hardware.CPULinear:
                    layer.__class__ = torch.nn.Linear
            functions[kind] = of(sampler.quantize(plain, kind))
    return functions


def compare(size, pixels, device, dtype, repeats):
    ours = our_pipeline(size, pixels, device, dtype)
    theirs = diffusers_pipeline(ours, dtype) if HAS_DIFFUSERS else None
    pixels, steps, vae = ours.size, ours.steps, ours.vae.config
    parameters = sum(p.numel() for p in ours.dit.parameters())
    print(f"\n**{size}**, DiT of {parameters / 1e6:.3g} M parameters, {pixels}x{pixels}, "
          f"{str(dtype)[6:]}, {device}\n\n| | ours | other | ratio | difference |\n"
          "|---|---|---|---|---|", flush=True)
    print_row("DiT, one forward", race(forward_functions(ours, theirs, dtype), repeats, device))

    latents, _ = sampler.latent_noise(ours, pixels, pixels, 1, 1)
    latents = latents.to(device)
    decoders = {"ours": lambda: ours.vae.decode(latents)}
    pictures = {"ours": lambda: sampler.generate(ours, CAPTION, steps=steps, guidance=0.0,
                                                 output="tensor")}
    if theirs:
        decoders["diffusers"] = lambda: theirs.vae.decode(
            latents / vae.scaling_factor + vae.shift_factor, return_dict=False)[0]
        pictures["diffusers"] = lambda: theirs(
            [CAPTION], height=pixels, width=pixels, num_inference_steps=steps, guidance_scale=0.0,
            generator=[torch.Generator().manual_seed(0)], output_type="pt").images
    print_row("VAE, decode", race(decoders, repeats, device))
    print_row(f"whole pipeline, {steps} steps", race(pictures, repeats, device))


def main():
    parser = argparse.ArgumentParser(description="Time against diffusers.")
    parser.add_argument("--size", choices=["bundled", *CONFIGS], nargs="+",
                        default=["bundled", "mid"])
    parser.add_argument("--pixels", type=int,
                        help="side, but for bundled (default: mid 512, wide and full 256)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+",
                        help="default: both on a CPU, bfloat16 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampler.keep_freed_memory()               # as sampler.py does; it serves both sides
    device = sampler.find_device(args.device)
    print(f"torch {torch.__version__}, {args.threads} threads, int8 products: "
          f"{sampler.hardware.has_products(torch.int8, device)}")
    both = ["float32", "bfloat16"] if device.type == "cpu" else ["bfloat16"]
    for size in args.size:
        for dtype in args.dtype or both:
            pixels = args.pixels or (512 if size == "mid" else 256)
            compare(size, pixels, device, getattr(torch, dtype), args.repeats)


if __name__ == "__main__":
    main()
