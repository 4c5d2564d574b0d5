"""Prompt -> image: encode, time schedule, Euler steps, decode. This is all of the method.

    python sampler.py "a small red circle on a blue background"       the small bundled model
    python sampler.py "a cat" --model Tongyi-MAI/Z-Image-Turbo        the released weights

The functions stand in the order of their use; `generate` calls them. The box at the top of model.py
defines time, velocity and Euler step. What is optional stands below a line that says so.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

# OpenMP's threads spin while they wait, which on a busy machine costs several times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
try:
    if __name__ == "__main__" and sys.stderr:
        print("loading ...", file=sys.stderr, flush=True)        # PyTorch alone takes seconds
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from PIL import Image, ImageOps, PngImagePlugin
    from tokenizers import Tokenizer
    from tqdm import tqdm
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)

import convert_weights
from convert_weights import UserError, load_dit, load_text_encoder, load_vae, open_checkpoint
from model import PATCH, VAE, Attention, Decoder, DiT, Encoder, TextEncoder

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"   # Qwen3's, for one message
MAX_TOKENS = 512                                # of the templated prompt; the rest is cut off


@dataclass
class Pipeline:
    """All that `generate` needs: the networks, and the settings that the checkpoint recommends."""
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    dit: DiT
    vae: VAE
    shift: float                        # of the time schedule
    steps: int = 8                      # network evaluations for one image
    guidance: float = 0.0
    size: int = 1024                    # side of a square image in pixels
    trained_steps: int | list | None = None        # what a student was distilled for
    name: str = ""
    device: torch.device = torch.device("cpu")

    @property
    def pixel_multiple(self):
        """Height and width are multiples of this: 16 for the release."""
        return PATCH * self.vae.config.downsampling


@torch.no_grad()
def encode_prompts(pipeline, prompts):
    """Prompts (a list of B strings) -> Text with features (B, L, D), L tokens in the longest."""
    ids = [torch.tensor(token_ids(pipeline.tokenizer, prompt)) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in ids])
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)       # (B, L)
    return pipeline.text_encoder(ids.to(pipeline.device), lengths.to(pipeline.device))


def time_schedule(steps, shift):
    """Times of a run of N steps, (N + 1,) float32, rising from 0 (noise) to 1 (data).

    The noise levels sigma = 1 - t of a uniform grid are shifted towards noise, as by diffusers'
    FlowMatchEulerDiscreteScheduler: sigma -> s sigma / (1 + (s - 1) sigma).
    """
    sigma = torch.cat((torch.linspace(1, 1 / max(steps, 1), steps), torch.zeros(1)))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    # Rounded as in diffusers, by way of 1000 sigma: the network takes sines of 1000 t.
    times = (1000 - 1000 * sigma) / 1000
    if steps < 1 or not shift > 0 or not (times.diff() > 0).all():
        raise UserError(f"there is no schedule of {steps} steps with a shift of {shift}")
    return times


@torch.no_grad()
def sample(net, noise, text, times, guidance=0.0, negative=None, cfg_normalization=False,
           cfg_truncation=1.0, guidance_every=1, callback=None):
    """Euler steps from `noise` (B, ...) at times[0] to data at times[-1], in float32.

    net: any (x, t, text) -> v. What a DiT computes from the text alone is computed once.
    guidance: the official pipeline's g, the paper's alpha - 1. At 0 `negative` is not needed.
    cfg_normalization: see limit_norm. cfg_truncation: no guidance at times above it.
    guidance_every k: v - v_negative changes slowly, so compute it in every k-th step only.
    callback(i, x): called after step i.
    """
    if guidance > 0 and negative is None:
        raise ValueError("guidance needs `negative`, the encoded negative prompt")
    if hasattr(net, "prepare"):
        text = net.prepare(text, *noise.shape[-2:])
        negative = net.prepare(negative, *noise.shape[-2:]) if guidance > 0 else None
    x = noise.float()
    times = times.tolist()
    for i in range(len(times) - 1):
        t = torch.full((len(x),), times[i], device=x.device)
        v = net(x, t, text).float()
        if guidance > 0 and times[i] <= cfg_truncation:
            if i % guidance_every == 0:
                difference = v - net(x, t, negative).float()
            guided = v + guidance * difference
            v = limit_norm(guided, v, cfg_normalization) if cfg_normalization else guided
        x = x + (times[i + 1] - times[i]) * v
        if callback:
            callback(i, x)
    return x


def limit_norm(guided, v, factor):
    """`guided` with each item's L2 norm at most `factor` times that of v (True is 1)."""
    norm = guided.flatten(1).norm(dim=1).clamp(min=1e-12)        # (B,)
    limit = float(factor) * v.flatten(1).norm(dim=1)
    return guided * (limit / norm).clamp(max=1).view(-1, *[1] * (v.ndim - 1))


@torch.no_grad()
def decode(pipeline, latents):
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], one at a time to save memory."""
    if not latents.isfinite().all():
        dtype = str(pipeline.dit.x_embedder.weight.dtype).removeprefix("torch.")
        raise UserError(f"sampling in {dtype} gave numbers that are not finite: use --dtype "
                        "bfloat16 or float32; if that does not help, the weights are damaged")
    images = torch.cat([pipeline.vae.decode(item[None]) for item in latents])
    if not images.isfinite().all():
        raise UserError("the decoded image is not finite: the weights of the VAE are damaged")
    return images.div(2).add(0.5).clamp(0, 1)


def generate(pipeline, prompts, height=None, width=None, steps=None, guidance=None,
             negative_prompt="", seed=0, noise=None, output="pil", shift=None, times=None,
             **sample_options):
    """Prompts (a string or a list of B) -> B images in one batch. None: as the model recommends.

    Image i depends on prompt i and on seed + i only, up to rounding.
    noise (B, C, h, w): takes the place of what the seeds draw. times: of `steps` and `shift`.
    output: "pil", a list; "tensor", (B, 3, H, W) in [0, 1]; "latent", (B, C, h, w).
    sample_options: the arguments of `sample` from cfg_normalization on.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    height, width = check_size(pipeline, height, width)
    times = recommended_times(pipeline, steps, shift) if times is None else times
    guidance = setting(guidance, pipeline.guidance)
    if noise is None:
        noise, _ = latent_noise(pipeline, height, width, seed, len(prompts))
    text = encode_prompts(pipeline, prompts if len(set(prompts)) > 1 else prompts[:1])
    negative = encode_prompts(pipeline, [negative_prompt]) if guidance > 0 else None
    latents = sample(pipeline.dit, noise.to(pipeline.device), text, times, guidance, negative,
                     **sample_options)
    return latents if output == "latent" else to_output(decode(pipeline, latents), output)


def image_to_image(pipeline, prompts, image, strength=0.6, height=None, width=None, steps=None,
                   seed=0, noise=None, shift=None, **options):
    """`generate` from noised images instead of noise, after the first (1 - strength) of the steps.

    image: PIL, or (1 or B, 3, H, W) in [-1, 1]. As in the official ZImageImg2ImgPipeline, a seed
    draws the noise that samples the VAE's posterior, then the noise that is added.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    height, width = check_size(pipeline, height, width)
    times = recommended_times(pipeline, steps, shift)
    steps = len(times) - 1
    times = times[int(max(steps - min(steps * strength, steps), 0)):]
    if len(times) < 2:
        raise UserError(f"strength {strength} leaves none of {steps} steps: raise one of them")
    vae_noise, drawn = latent_noise(pipeline, height, width, seed, len(prompts))
    latents = encode_image(pipeline, image, vae_noise)           # (B, C, h, w)
    noise = drawn if noise is None else noise.cpu()
    noised = times[0] * latents + (1 - times[0]) * noise
    return generate(pipeline, prompts, height, width, noise=noised, times=times, **options)


# --- Called by the functions above --------------------------------------------------------------


def token_ids(tokenizer, prompt):
    """The prompt in its chat template -> a list of token ids. A longer prompt is cut to 512."""
    templated = TEMPLATE.format(prompt)
    try:
        encoded = tokenizer.encode(templated, add_special_tokens=False)
    except (TypeError, UnicodeError):
        raise UserError(f"the prompt {prompt!r} is not valid Unicode text") from None
    if len(encoded.ids) > MAX_TOKENS:
        end = encoded.offsets[MAX_TOKENS - 1][1]
        warnings.warn(f"a prompt of {len(encoded.ids)} tokens is cut to {MAX_TOKENS}, after the "
                      f"words {templated[max(end - 40, 0):end]!r}", stacklevel=2)
    return encoded.ids[:MAX_TOKENS]


def setting(value, default):
    """`value`, or `default` if it is None."""
    return default if value is None else value


def check_size(pipeline, height=None, width=None):
    """-> (height, width) in pixels, the model's own size where one is None. Checks both."""
    sides = setting(height, pipeline.size), setting(width, pipeline.size)
    multiple = pipeline.pixel_multiple
    limit = multiple * min(pipeline.dit.config.axes_lens[1:])
    for name, side in zip(("height", "width"), sides, strict=True):
        if side < multiple or side % multiple or side > limit:
            near = min(max(round(side / multiple), 1) * multiple, limit)
            raise UserError(f"{name} should be a multiple of {multiple} up to {limit}, not {side}; "
                            f"the nearest is {near}")
    return sides


def recommended_times(pipeline, steps=None, shift=None):
    """time_schedule with what the checkpoint recommends, and a warning for a distilled student."""
    steps = setting(steps, pipeline.steps)
    trained = pipeline.trained_steps or steps
    if steps not in (trained if isinstance(trained, (list, tuple)) else [trained]):
        warnings.warn(f"this model was distilled for {trained} steps; fewer steps than that give "
                      f"worse images, more give similar ones", stacklevel=2)
    return time_schedule(steps, setting(shift, pipeline.shift))


def latent_noise(pipeline, height, width, seed, batch):
    """Two draws of Gaussian noise, each (B, C, h, w): item i's come from the seed `seed` + i.

    They are drawn on the CPU: the same seed gives the same noise on every device.
    """
    factor = pipeline.vae.config.downsampling
    shape = 1, pipeline.dit.config.in_channels, height // factor, width // factor
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    return [torch.cat([torch.randn(shape, generator=g) for g in generators]) for _ in range(2)]


def prepare_image(image, height, width):
    """A PIL image -> (1, 3, height, width) in [-1, 1], cropped to these proportions and resized."""
    image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


@torch.no_grad()
def encode_image(pipeline, image, noise):
    """One or B images -> latents (B, C, h, w) on the CPU; `noise` samples the VAE's posterior."""
    if isinstance(image, Image.Image):
        factor = pipeline.vae.config.downsampling
        image = prepare_image(image, noise.shape[-2] * factor, noise.shape[-1] * factor)
    images = image.expand(len(noise), -1, -1, -1).to(pipeline.device)
    noise = noise.to(pipeline.device)
    # One at a time: the activations of the VAE are large.
    latents = [pipeline.vae.encode(images[i:i + 1], noise[i:i + 1]) for i in range(len(noise))]
    return torch.cat(latents).cpu()


def to_output(images, output):
    """Images (B, 3, H, W) in [0, 1] as they are ("tensor"), or as PIL images ("pil")."""
    if output == "tensor":
        return images
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(item) for item in pixels]


def guided_velocity(net, x, t, text, negative, guidance, cfg_normalization=False):
    """The velocity with guidance at x (B, ...) and times t (B,), as `sample` has it in one step."""
    v = net(x, t, text).float()
    guided = v + guidance * (v - net(x, t, negative).float())
    return limit_norm(guided, v, cfg_normalization) if cfg_normalization else guided


def load_pipeline(path, device="cpu", dtype=torch.float32, adapters=(), keep=None, **parts):
    """Loads a checkpoint -> Pipeline. dtype: of text encoder and DiT; the VAE runs in float32.

    path: a directory of the official layout or ours, one file, or a name on the hub. parts: files
    that take the place of its "dit", "text_encoder", "vae", "tokenizer". adapters: (file,
    strength) pairs of LoRAs. keep: formats to keep as they are stored, such as KEEP below.
    """
    checkpoint = open_checkpoint(path, **parts)
    networks = checkpoint.networks
    if checkpoint.shift_assumed:
        warnings.warn(f"no file says the shift of the schedule; {checkpoint.settings['shift']} is "
                      "assumed (--shift)", stacklevel=2)
    return Pipeline(
        tokenizer=checkpoint.tokenizer,
        text_encoder=load_text_encoder(networks["text_encoder"], device, dtype, keep=keep),
        dit=load_dit(networks["dit"], device, dtype, adapters=adapters, keep=keep),
        vae=load_vae(networks["vae"], device, torch.float32),
        name=Path(path).resolve().name,
        device=torch.device(device),
        **checkpoint.settings,
    )


def quantize_rows(weight, dtype):
    """(rows, columns) -> the same in float8_e4m3fn or int8, and float32 scales (rows, 1)."""
    limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    weight = weight.float()
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / limit
    rows = weight / scale
    return (rows.round() if dtype == torch.int8 else rows).to(dtype), scale


@lru_cache
def hadamard(size, device, dtype):
    """An orthogonal matrix (size, size) of entries +-1/sqrt(size); size is a power of 4.

    It is symmetric, so it is its own inverse. It is the one of ComfyUI's "convrot" files.
    """
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, h4)
    return matrix.to(device, dtype)


def rotate(x, group):
    """Each run of `group` numbers of the last dimension of x times the Hadamard matrix.

    A product stays the same if input and weight are both rotated. A single large number is
    spread over its group, so that it no longer takes the int8 range from its neighbors.
    """
    if group == 1:
        return x
    return (x.unflatten(-1, (-1, group)) @ hadamard(group, x.device, x.dtype)).flatten(-2)


def rotation_group(columns):
    """The largest power of 4, at most 256, that divides the number of columns."""
    return next(group for group in (256, 64, 16, 4, 1) if columns % group == 0)


# --- Optional: less memory, more speed ----------------------------------------------------------
#
# Each of these is applied to a network that is built already, in this order: quantize,
# use_cpu_kernels, use_tiles, TakeTurns or stream_blocks, dit.compile(). A layer gets another class
# that keeps its tensors; hooks decide where the tensors lie.


def has_bfloat16_products():
    """True if this CPU has bfloat16 matrix instructions. On x86 these are AVX-512 BF16 and AMX."""
    return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()


def has_products(dtype, device):
    """True if the device multiplies float8 (NVIDIA from Hopper on) or int8 matrices.

    int8: NVIDIA from Ampere on, CPUs with AVX-512 VNNI or AMX. Elsewhere torch._int_mm is a plain
    loop, measured 50 times slower than float32.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return capability >= ((8, 0) if dtype == torch.int8 else (9, 0))
    is_vnni_supported = getattr(torch.cpu, "_is_vnni_supported", bool)
    return device.type == "cpu" and dtype == torch.int8 and is_vnni_supported()


class QuantizedLinear(nn.Linear):
    """x W^T with W = weight * scale: a byte for each weight, a float32 scale for each row."""
    group = 1         # of the rotation that the weight has and x needs; 1: none

    def forward(self, x):
        x = rotate(x, self.group)
        aligned = self.in_features % 16 == 0 and self.out_features % 16 == 0
        if aligned and has_products(self.weight.dtype, x.device):
            rows, row_scale = quantize_rows(x.flatten(0, -2), self.weight.dtype)
            return self.product(rows, row_scale, x.dtype).unflatten(0, x.shape[:-1])
        # In floating point. A CPU without bfloat16 instructions is 16 times as fast in float32.
        slow = x.is_cpu and x.dtype == torch.bfloat16 and not has_bfloat16_products()
        dtype = torch.float32 if slow else x.dtype
        y = F.linear(x.to(dtype), self.weight.to(dtype)) * self.scale.flatten().to(dtype)
        return y.to(x.dtype)


class Float8Linear(QuantizedLinear):
    """float8_e4m3 weights; where the device can multiply them, inputs are rounded to it, too."""

    def product(self, rows, row_scale, dtype):
        return torch._scaled_mm(rows, self.weight.t(), row_scale, self.scale.t(), out_dtype=dtype)


class Int8Linear(QuantizedLinear):
    """int8 weights; inputs are rounded to int8 with a scale per token, so the product is integer.

    PyTorch's fused kernel, onednn.qlinear_pointwise, takes one scale for all tokens. Some tokens
    of a text have values a hundred times larger than others, so that does not do.
    """

    def product(self, rows, row_scale, dtype):
        padding = max(32 - len(rows), 0)      # a GPU wants more than 16 rows
        y = torch._int_mm(F.pad(rows, (0, 0, 0, padding)), self.weight.t())[:len(rows)]
        return (y * row_scale).mul_(self.scale.flatten()).to(dtype)


def bind(layer_type, linear, weight, scale, group=1):
    """Makes a built nn.Linear a quantized layer over these tensors, which may be mapped."""
    linear.weight = nn.Parameter(weight, requires_grad=False)
    scale = scale.float().reshape(-1, 1).expand(linear.out_features, 1).contiguous()
    linear.register_buffer("scale", scale)
    linear.group = group
    linear.__class__ = layer_type


# Formats that a file may hold and a network may keep: name -> bind(linear, weight, scale).
KEEP = {"fp8": partial(bind, Float8Linear), "int8": partial(bind, Int8Linear),
        "int8_convrot": partial(bind, Int8Linear, group=256)}


def quantize(net, kind, device=None):
    """Turns linear layers without bias into "fp8" or "int8", one by one and in place -> net.

    These are the layers of the blocks and nearly all weights. Those with a bias embed time and
    caption, and are sensitive. device: quantize there, and leave the layer there. The peak of
    memory is the quantized network and one tensor, if the network was mapped.
    """
    for layer in net.modules():
        if type(layer) is nn.Linear and layer.bias is None:
            weight = layer.weight.detach().to(device).float()
            if kind == "fp8":
                bind(Float8Linear, layer, *quantize_rows(weight, torch.float8_e4m3fn))
            else:
                group = rotation_group(layer.in_features)
                bind(Int8Linear, layer, *quantize_rows(rotate(weight, group), torch.int8), group)
    return net


class CPULinear(nn.Linear):
    """nn.Linear on a CPU, by the kernel that is fastest there.

    float32: oneDNN, 1.1 to 1.7 times as fast as PyTorch's own choice on AMD processors. bfloat16
    without such instructions: a product in float32, 16 times as fast.
    """

    def forward(self, x):
        # oneDNN's operation has no backward, and compilers choose kernels themselves.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        if x.dtype == torch.float32:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


class Bfloat16Attention(Attention):
    """Attention in bfloat16 as two matrix products.

    PyTorch's fused attention does not use a CPU's bfloat16 instructions; its matrix products do.
    A few heads at a time, so that their scores (about two million) stay in the cache.
    """

    @staticmethod
    def attend(q, k, v, attn_mask=None, is_causal=False):
        if is_causal or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        out = torch.empty_like(q)
        q = q * q.shape[-1] ** -0.5
        heads = max(1, 2_000_000 // (len(q) * q.shape[2] * k.shape[2]))
        for first in range(0, q.shape[1], heads):
            some = slice(first, first + heads)
            scores = q[:, some] @ k[:, some].transpose(-1, -2)       # (B, some H, S, S)
            if attn_mask is not None:
                scores.masked_fill_(~attn_mask, -math.inf)
            out[:, some] = torch.softmax(scores, -1, out=scores) @ v[:, some]
        return out


def use_cpu_kernels(net):
    """Gives the layers of a network on a CPU the classes that are faster there -> net."""
    bfloat16_is_fast = has_bfloat16_products()
    has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for layer in net.modules():
        if type(layer) is Attention and bfloat16_is_fast:
            if layer.to_q.weight.dtype == torch.bfloat16:
                layer.__class__ = Bfloat16Attention
        elif type(layer) is nn.Linear:
            dtype = layer.weight.dtype
            # Small products are up to 10 % slower through oneDNN.
            is_large = layer.weight.numel() >= 2 ** 20
            if dtype == torch.float32 and is_large and has_onednn:
                layer.__class__ = CPULinear
            if dtype == torch.bfloat16 and not bfloat16_is_fast:
                layer.__class__ = CPULinear
    return net


def tensors_of(*modules):
    """Parameters and buffers of all the modules."""
    return [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]


class TakeTurns:
    """Of these networks only the one that computes is on the device; the others are on the host.

    The host keeps its tensors, mapped or not: unloading a network only drops the copy.
    """

    def __init__(self, networks, device):
        self.device = device
        self.loaded = None
        self.host = {net: [(t, t.data) for t in tensors_of(net)] for net in networks}
        for net in networks:
            for part in net.children():       # `prepare` and `decode` call a part, not the network
                part.register_forward_pre_hook(partial(self.load, net))

    def load(self, net, *_):
        if self.loaded is not net:
            for tensor, host in self.host.get(self.loaded, ()):
                tensor.data = host
            for tensor, host in self.host[net]:
                tensor.data = host.to(self.device)
            self.loaded = net


class BlockStream:
    """Of blocks that are called one after the other, at most two have their weights on the device.

        computing                 block 0     block 1     block 2   ...
        copying      block 0      block 1     block 2     block 3   ...

    On a GPU the copies run on a stream of their own, beside the computation if `pin`, which
    copies the weights to page-locked host memory.
    """

    def __init__(self, blocks, device, pin=False):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.tensors = [tensors_of(block) for block in blocks]
        self.host = [[tensor.data for tensor in tensors] for tensors in self.tensors]
        if pin and self.stream:
            self.host = [[host.pin_memory() for host in block] for block in self.host]
        self.loaded = {}                      # index of a block -> its weights on the device
        self.finished = None                  # event: the block before this one is computed
        for i, block in enumerate(blocks):
            self.bind(i, self.host[i])
            block.register_forward_pre_hook(partial(self.before, i))
            block.register_forward_hook(partial(self.after, i), always_call=True)

    def load(self, i):
        with torch.cuda.stream(self.stream):  # does nothing without a GPU
            self.loaded[i] = [host.to(self.device, non_blocking=True, copy=True)
                              for host in self.host[i]]

    def bind(self, i, weights):
        for tensor, weight in zip(self.tensors[i], weights, strict=True):
            tensor.data = weight

    def before(self, i, *_):
        if i not in self.loaded:              # the first block
            self.load(i)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.bind(i, self.loaded[i])

    def after(self, i, *_):
        """Block i is queued. Once block i - 1 is computed, its memory is free for block i + 1."""
        self.bind(i, self.host[i])
        if self.finished:
            self.finished.synchronize()
        self.loaded.pop(i - 1, None)
        if self.stream:
            self.finished = torch.cuda.current_stream(self.device).record_event()
        if i + 1 < len(self.host):
            self.load(i + 1)
        else:
            self.loaded.clear()


def stream_blocks(pipeline):
    """Streams the blocks of text encoder and DiT; the VAE is loaded when it is first used.

    The rest goes to the device, except the word embeddings: few of their rows are ever used.
    """
    encoder, dit, device = pipeline.text_encoder, pipeline.dit, pipeline.device
    stacks = [encoder.layers, dit.context_refiner, [*dit.noise_refiner, *dit.layers]]
    on_host = tensors_of(encoder.embed_tokens, *itertools.chain(*stacks))
    on_host = {id(tensor) for tensor in on_host}
    for tensor in tensors_of(encoder, dit):
        if id(tensor) not in on_host:
            tensor.data = tensor.data.to(device)
    encoder.embed_tokens.register_forward_pre_hook(lambda _, ids: ids[0].cpu())
    encoder.embed_tokens.register_forward_hook(lambda _, ids, features: features.to(device))
    for blocks in stacks:
        BlockStream([*blocks], device, pin=blocks is stacks[-1])
    TakeTurns([pipeline.vae], device)


HALO = 8          # latent pixels around a tile: wider than the layers computed in tiles look aside
PASSES = 2        # as many as there are norms would be exact; with two there is no seam


class TileNorm:
    """Stands in for a GroupNorm's forward while an image is computed tile by tile.

    Mean and variance belong to the whole image. Each pass collects them from all tiles; `share`
    averages them for the next pass.
    """

    def __init__(self, norm):
        self.norm = norm
        self.seen = []                        # (pixels, mean, variance) of each tile of this pass
        self.shared = None                    # mean and variance of the last pass
        self.core = self.side = None          # (rows, columns) without halo; latent rows with it

    def __call__(self, x):
        scale = x.shape[-2] // self.side                         # pixels of x per latent pixel
        rows, columns = (slice(scale * side.start, scale * side.stop) for side in self.core)
        grouped = x.unflatten(1, (self.norm.num_groups, -1))     # (B, groups, C/groups, h, w)
        core = grouped[..., rows, columns].flatten(2)
        variance, mean = torch.var_mean(core, -1, correction=0, keepdim=True)
        self.seen.append((core.shape[-1], mean, variance))
        mean, variance = self.shared or (mean, variance)
        x = ((grouped.flatten(2) - mean) * (variance + self.norm.eps).rsqrt()).view_as(x)
        return x * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]

    def share(self):
        pixels = sum(n for n, _, _ in self.seen)
        mean = sum(n * m for n, m, _ in self.seen) / pixels
        self.shared = mean, sum(n * (v + (m - mean) ** 2) for n, m, v in self.seen) / pixels
        self.seen = []


def spans(length, tile):
    """Tiles along one side: (the tile, the tile with its halo, the tile within its halo)."""
    for start in range(0, length, tile):
        stop, first = min(start + tile, length), max(start - HALO, 0)
        yield (slice(start, stop), slice(first, min(stop + HALO, length)),
               slice(start - first, stop - first))


def scaled(side, factor):
    """A slice in latent pixels -> in pixels."""
    return slice(side.start * factor, side.stop * factor)


def in_tiles(layers, x, tile, down=1, up=1):
    """layers(x), computed tile by tile: (B, C, h, w) -> (B, C', h * up / down, w * up / down).

    tile: in latent pixels; `down` pixels of x and `up` of the result lie along one of them. The
    memory for activations does not grow with x.
    """
    height, width = x.shape[-2] // down, x.shape[-1] // down     # in latent pixels
    tiles = list(itertools.product(spans(height, tile), spans(width, tile)))
    norms = [TileNorm(module) for module in layers.modules() if isinstance(module, nn.GroupNorm)]
    out = None
    try:
        for norm in norms:
            norm.norm.forward = norm          # hides the method of the class
        for _ in range(PASSES if len(tiles) > 1 else 1):
            for (rows, rows_halo, rows_core), (columns, columns_halo, columns_core) in tiles:
                for norm in norms:
                    norm.core = rows_core, columns_core
                    norm.side = rows_halo.stop - rows_halo.start
                part = layers(x[..., scaled(rows_halo, down), scaled(columns_halo, down)])
                if out is None:
                    out = part.new_empty(*part.shape[:2], height * up, width * up)
                out[..., scaled(rows, up), scaled(columns, up)] = part[
                    ..., scaled(rows_core, up), scaled(columns_core, up)]
            for norm in norms:
                norm.share()
    finally:
        for norm in norms:
            del norm.norm.forward
    return out


class TiledEncoder(Encoder):
    """The VAE's encoder, in tiles down to the size of the latents."""

    def forward(self, image):
        if image.shape[-2] * image.shape[-1] <= self.above:
            return super().forward(image)
        fine = nn.Sequential(self.conv_in, *self.down_blocks[:-1])
        x = self.down_blocks[-1](in_tiles(fine, image, self.tile, down=self.factor))
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class TiledDecoder(Decoder):
    """The VAE's decoder, in tiles from the size of the latents on."""

    def forward(self, z):
        if z.shape[-2] * z.shape[-1] * self.factor ** 2 <= self.above:
            return super().forward(z)
        fine = nn.Sequential(*self.up_blocks, self.conv_norm_out, nn.SiLU(), self.conv_out)
        return in_tiles(fine, self.mid_block(self.conv_in(z)), self.tile, up=self.factor)


def use_tiles(vae, tile=64, above=2e6):
    """Lets the VAE work in tiles (side in latent pixels) on images of more than `above` pixels."""
    vae.encoder.__class__, vae.decoder.__class__ = TiledEncoder, TiledDecoder
    for part in (vae.encoder, vae.decoder):
        part.tile, part.above, part.factor = tile, above, vae.config.downsampling


# --- Command line -------------------------------------------------------------------------------

BUNDLED = [Path(__file__).resolve().parent / "tutorials" / name
           for name in ("cards/student", "cards/teacher", "shapes/student", "shapes/teacher")]
SDPBackend = nn.attention.SDPBackend
ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
DEFAULTS = {"seed": 0, "num_images": 1, "batch_size": 1, "negative_prompt": "", "strength": 0.6,
            "cfg_normalization": 0.0, "cfg_truncation": 1.0, "guidance_every": 1, "device": "auto",
            "upscale": "lanczos", "out": Path("image.png"), "lora": []}
OF_GUIDANCE = "negative_prompt", "cfg_normalization", "cfg_truncation", "guidance_every"
# Options that name files. A picture records their names and fingerprints, for --like.
FILES = "model", "dit", "text_encoder", "vae", "tokenizer", "lora", "init_image"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # torchrun


def width_and_height(text):
    """An argparse type: "1280x720" -> (1280, 720)."""
    if not re.fullmatch(r"[0-9]{1,5}[xX][0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"should look like 1024x768, not {text!r}")
    return tuple(int(side) for side in text.lower().split("x"))


def png_name(text):
    """An argparse type: the name of a PNG file in a directory that can be written to."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"should be the name of a .png file, not {text}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path.parent} is no directory that can be written to")
    return path


def make_parser():
    """All options. Those that are not given are None, so that --like can tell; see DEFAULTS."""
    parser = convert_weights.Parser(
        description="Prompt to image with Z-Image-Turbo or the small bundled model.")
    add = parser.add_argument
    number = convert_weights.number
    add("prompt", nargs="*", help="prompts, each in quotes; - alone reads them from standard "
        "input, one a line, and prints the path of each picture as it is done")
    add("--prompts", metavar="FILE", help="more prompts, one a line, UTF-8")
    add("--model", help="a directory, one file, or a name such as Tongyi-MAI/Z-Image-Turbo "
        "(default: the bundled model)")
    convert_weights.add_common_options(
        parser, "--dit", "--text-encoder", "--vae", "--tokenizer", "--lora", "--device", "--seed",
        lora=None, device=None, seed=None)
    add("--like", metavar="PICTURE.png", help="take prompt and settings from a picture that this "
        "program made; other options win")
    add("--out", type=png_name, metavar="FILE.png", help="default image.png, or image-1.png ...")
    add("--num-images", type=number(1, 10 ** 6, int), help="images of each prompt (default 1)")
    add("--batch-size", type=number(1, 1024, int), help="images computed at once (default 1)")
    add("--size", type=width_and_height, metavar="WxH", help="pixels, such as 1280x720; multiples "
        "of 16, of 8 for the bundled model (default: the model's own; 1024x1024 for Turbo)")
    add("--height", type=number(1, 99999, int), help="instead of --size")
    add("--width", type=number(1, 99999, int), help="instead of --size")
    add("--steps", type=number(1, 10000, int), help="default: the model's own; 8 for Turbo")
    add("--guidance", type=number(0, 1000), help="guidance_scale of the official pipeline, alpha "
        "- 1 of the paper; 0 is off (default: the model's own; 0 for Turbo)")
    add("--negative-prompt", help="what guidance leads away from (default: the empty prompt)")
    add("--cfg-normalization", type=number(0, 1000), metavar="C",
        help="limit the norm of the guided velocity to C times the plain one's (default: off)")
    add("--cfg-truncation", type=number(0, 1), metavar="T", help="no guidance once t is above T")
    add("--guidance-every", type=number(1, 100, int), metavar="K",
        help="compute guidance in every K-th step only; 2 saves a quarter of the calls (default 1)")
    add("--shift", type=number(0, 1000, above=0), help="of the schedule (default: the model's own)")
    add("--init-image", metavar="FILE", help="image to image: start from this picture")
    add("--strength", type=number(0, 1, above=0), help="how far from it, up to 1 (default 0.6)")
    add("--dtype", choices=["bfloat16", "float32", "float16"],
        help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--weights", choices=["int8", "fp8"], help="one byte for most weights; int8 is faster on "
        "many CPUs and GPUs, fp8 on GPUs from Hopper on")
    add("--offload", nargs="?", const="networks", choices=["networks", "blocks"],
        help="keep a network on the GPU only while it works; blocks: two blocks of it at a time")
    add("--tile", action=argparse.BooleanOptionalAction,
        help="VAE in tiles (default: above 2 megapixels, and with --offload blocks)")
    add("--attention", choices=[*ATTENTION], help="the kernel (default: what PyTorch picks)")
    add("--compile", action="store_true", help="a slow start, then faster steps", default=None)
    add("--upscale", choices=["none", "nearest", "lanczos"],
        help="how to enlarge pictures under 256 pixels (default lanczos)")
    add("--json", action="store_true", help="print a line of JSON for each picture")
    return parser


def split_offload(arguments):
    """argparse would take a prompt after a bare --offload for its value; a typo is no prompt."""
    arguments = list(arguments)
    for i, value in enumerate(arguments[1:]):
        if arguments[i] == "--offload" and value not in ("networks", "blocks"):
            if not re.search(r"\s|^-", value):
                raise UserError(f"--offload takes networks or blocks, not {value!r}; a prompt of "
                                "one word should stand before it")
            arguments[i] = "--offload=networks"
    return arguments


def parse_arguments(arguments=None):
    """The command line -> a namespace. UserError names the option that is wrong."""
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_intermixed_args(split_offload(arguments))
    args.given = {name for name, value in vars(args).items() if value not in (None, [], False)}
    if args.size:
        if args.height or args.width:
            raise UserError("--size says both sides: leave out --height and --width")
        args.width, args.height = args.size
    if args.compile and args.offload == "blocks":
        raise UserError("--compile does not go with --offload blocks, which moves the weights")
    recorded = read_recorded(parser, args) if args.like else {}
    for name, value in {**DEFAULTS, **recorded}.items():
        if getattr(args, name) in (None, []):
            setattr(args, name, value)
    if "strength" in args.given and not args.init_image:
        raise UserError("--strength has no effect without --init-image")
    add_prompts(args)
    return args


def add_prompts(args):
    """Completes args.prompt from --prompts, and says in args.loop whether they come by and by."""
    args.loop = args.prompt == ["-"]
    if args.loop and (args.prompts or WORLD > 1):
        raise UserError("- reads the prompts: leave out --prompts and torchrun")
    args.prompt = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not args.prompt:
        raise UserError("there is no prompt; give one in quotes, --prompts FILE, or - for a loop")
    if len(args.prompt) * args.num_images > 10 ** 6:
        raise UserError("more than a million images are asked for")


def read_recorded(parser, args):
    """What the picture `args.like` says of itself -> {name: value} of the options."""
    try:
        with Image.open(args.like) as image:
            text = dict(image.text)
        files = json.loads(text["files"])
        words = [f"--{key.replace('_', '-')}={text[key]}" for key in json.loads(text["options"])]
    except OSError as error:
        raise UserError(f"cannot read {args.like}: {error.strerror or error}") from None
    except (AttributeError, KeyError, ValueError, SyntaxError):
        raise UserError(f"{args.like} does not say how this program made it") from None
    words = [word.replace("=True", "").replace("--tile=False", "--no-tile") for word in words]
    try:
        known = vars(parser.parse_args(words))
    except UserError as error:
        raise UserError(f"{args.like}: {error}") from None
    known["width"], known["height"] = known.pop("size")
    if not args.prompts:
        known["prompt"] = [text["prompt"]]
    for name, entries in files.items():
        if getattr(args, name) in (None, []):
            found = [(find_file(args.like, name, *entry[:2]), *entry[2:]) for entry in entries]
            known[name] = found if name == "lora" else found[0][0]
    return {name: value for name, value in known.items() if value not in (None, [], False)}


def fingerprint(path):
    """convert_weights.fingerprint; None for the name of a model on the hub."""
    return convert_weights.fingerprint(path) if Path(path).exists() else None


def find_file(picture, option, name, digest):
    """The file or model that a picture was made with: here, beside the picture, or bundled."""
    for path in (Path(name), Path(picture).parent / name, *BUNDLED):
        if path.exists() and fingerprint(path) == digest:
            return str(path)
    if digest is None:                        # a hub name
        return name
    raise UserError(f"{picture} was made with {name}, which is not here or has changed; name it "
                    f"with --{option.replace('_', '-')}")


def read_prompts(path):
    """The lines of a UTF-8 text file, without empty ones."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the prompts in {path}: {reason}") from None
    return [line.strip() for line in lines if line.strip()]


def read_image(path):
    """A picture file -> RGB: upright, on white where transparent, 16-bit greys kept."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # of very large pictures
            image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):        # 16 bits, which Pillow would clip to 8
            gray = np.array(image).astype(np.int64)
            gray = gray >> 8 if gray.max() > 255 else gray
            image = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
    except Exception as error:                # what Pillow's many decoders raise
        reason = getattr(error, "strerror", None) or "it is not a picture, or damaged"
        raise UserError(f"cannot read the image {path}: {reason}") from None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def fit_size(pipeline, image, height, width):
    """-> (height, width): given sides stay, the others follow from the picture's proportions.

    If neither is given, the number of pixels is about the model's own.
    """
    multiple, limit = pipeline.pixel_multiple, min(pipeline.dit.config.axes_lens[1:])
    ratio, area = image.width / image.height, (pipeline.size / multiple) ** 2
    rows = math.sqrt(area / ratio)
    rows = height / multiple if height else width / multiple / ratio if width else rows
    return (setting(height, min(max(round(rows), 1), limit) * multiple),
            setting(width, min(max(round(rows * ratio), 1), limit) * multiple))


def enlarge(image, how):
    """Shows small pictures at a whole multiple of their size, 256 pixels or more on each side."""
    factor = 1 if how == "none" else -(-256 // min(image.size))
    size = [side * factor for side in image.size]
    return image if factor == 1 else image.resize(size, Image.Resampling[how.upper()])


def save_png(image, path, info, index=0):
    """Writes a PNG with text chunks to path-INDEX (for 0: path) or the next free name -> name."""
    text = PngImagePlugin.PngInfo()
    for key, value in info.items():           # file names need not be Unicode
        text.add_text(key, str(value).encode("utf-8", "replace").decode())
    for i in itertools.count(index):
        name = path.with_name(f"{path.stem}-{i}.png") if i else path
        with suppress(FileExistsError):
            name.open("x").close()
            break
    try:
        convert_weights.write_whole(name, lambda part: image.save(part, format="PNG", pnginfo=text))
    except BaseException:
        name.unlink()
        raise
    return name


def find_device(name):
    """"auto", "cuda", "cuda:1", "mps", "cpu" -> torch.device. UserError if it is not there."""
    if name == "auto":
        found = "mps" if torch.backends.mps.is_available() else "cpu"
        found = "cuda" if torch.cuda.is_available() else found
        if found == "cuda" and WORLD > 1:
            found = f"cuda:{os.environ['LOCAL_RANK']}"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"there is no device {name!r} on this machine for this PyTorch; use "
                        "--device cpu, or leave it out") from None
    return device


def keep_freed_memory():
    """Asks Linux's C library to keep large freed blocks.

    It would return them to the system, which fills them with zeros before the next step.
    """
    import ctypes

    with suppress(AttributeError, OSError, TypeError):           # another C library
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 2 ** 30)
        mallopt(trim_threshold, 2 ** 30)


@contextmanager
def advise_on_errors(advice):
    """Turns what PyTorch raises for lack of memory, of a compiler or of a kernel into advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError("torch.compile does not work here, leave out --compile: "
                            + str(error).splitlines()[0]) from None
        if "No viable backend for scaled_dot_product_attention" in str(error):
            raise UserError("--attention: this kernel does not run here; leave it out") from None
        lack = "out of memory|allocate memory|not enough memory|Invalid buffer size|ALLOC_FAILED"
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(lack, str(error)):
            raise UserError(f"out of memory; try {advice}") from None
        raise


def build(args, device, dtype):
    """Loads the model and applies the options that change how it computes -> Pipeline."""
    home = "cpu" if args.offload or args.weights else device
    pipeline = load_pipeline(args.model or find_bundled(), home, dtype)
    pipeline.device = device
    networks = pipeline.text_encoder, pipeline.dit, pipeline.vae
    for net in networks[:2] if args.weights else ():
        quantize(net, args.weights, home if args.offload else device)
    for net in networks if device.type == "cpu" else ():
        use_cpu_kernels(net)
    if args.tile is not False:
        use_tiles(pipeline.vae, above=0 if args.tile or args.offload == "blocks" else 2e6)
    if args.offload == "blocks":
        stream_blocks(pipeline)
    elif args.offload:
        TakeTurns(networks, device)
    else:
        for net in networks:
            net.to(device)
    if args.compile:
        pipeline.dit.compile()
    if device.type == "cpu" and sum(p.numel() for p in pipeline.dit.parameters()) < 50e6:
        torch.set_num_threads(1)              # more gain a small network nothing
    return pipeline


def find_bundled():
    """The folder of the first bundled model."""
    for folder in BUNDLED:
        if (folder / "config.json").exists():
            return folder
    raise UserError("no bundled model is here; name a checkpoint with --model")


def warn_of_options(args, pipeline, settings):
    """Warns of options that change nothing here, and of settings that do not suit the model."""
    guidance, shift = settings["guidance"], settings["shift"]
    device = pipeline.device
    idle = [f"--{name.replace('_', '-')}" for name in OF_GUIDANCE if name in args.given]
    for applies, message in (
            (idle and guidance == 0, f"without --guidance there is no effect of {', '.join(idle)}"),
            (args.offload and device.type == "cpu", "--offload has no effect on a CPU"),
            (args.weights == "int8" and not has_products(torch.int8, device),
             "this device has no int8 products: --weights int8 saves memory but not time"),
            (guidance == 0 and shift >= 6, f"a shift of {shift} is that of an undistilled model, "
             "which wants --guidance 3 to 5 and --steps 28 to 50"),
            (guidance > 0 and pipeline.guidance == 0 and shift < 6,
             "a distilled model, as this one seems to be, wants --guidance 0")):
        if applies:
            warnings.warn(message, stacklevel=2)


def make_record(args, pipeline, dtype, settings, size):
    """What a PNG says: all that changes a pixel, under the names of the options."""
    options = {"size": size, "dtype": dtype, "upscale": args.upscale, **settings}
    for name in ("weights", "attention", "compile"):
        if getattr(args, name):
            options[name] = getattr(args, name)
    if args.tile is not None or args.offload == "blocks":
        options["tile"] = args.tile is not False
    if args.init_image:
        options["strength"] = args.strength
    files = {name: getattr(args, name) for name in FILES if getattr(args, name)}
    files.setdefault("model", find_bundled())
    entries = {name: value if name == "lora" else [(value,)] for name, value in files.items()}
    entries = {name: [(Path(path).name, fingerprint(path), *more) for path, *more in value]
               for name, value in entries.items()}
    return {**options, "model": pipeline.name, "files": json.dumps(entries),
            "options": json.dumps([*options])}


def read_batches(args):
    """The batches of this process: (number of the first image, prompts)."""
    if args.loop:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        groups = ([line.strip()] * args.num_images for line in sys.stdin if line.strip())
    else:
        groups = [[prompt for prompt in args.prompt for _ in range(args.num_images)]]
    done = 0
    for prompts in groups:
        for first in range(RANK * args.batch_size, len(prompts), WORLD * args.batch_size):
            yield done + first, prompts[first:first + args.batch_size]
        done += len(prompts)


def draw(args, pipeline, record, function):
    """Draws and saves all pictures. In the loop a bad prompt is an error line, not the end."""
    count = len(args.prompt) * args.num_images
    steps = None if args.loop else record["steps"] * -(-count // args.batch_size)
    with tqdm(total=steps, unit="step", disable=RANK > 0) as bar:
        def after_step(*_):
            bar.update(WORLD)

        for first, prompts in read_batches(args):
            bar.set_description("drawing" if args.loop else f"{first + 1} of {count}")
            start = time.perf_counter()
            try:
                images = function(pipeline, prompts, seed=args.seed + first, callback=after_step)
            except UserError as error:
                if not args.loop:
                    raise
                report(args, bar, {"prompt": prompts[0], "error": str(error)})
                continue
            seconds = round(time.perf_counter() - start, 2)
            for i, image in enumerate(images):
                entry = {"prompt": prompts[i], "seed": args.seed + first + i, **record}
                path = save_png(enlarge(image, args.upscale), args.out, entry, first + i)
                report(args, bar, {"path": str(path), "seconds": seconds, **entry})


def report(args, bar, entry):
    """Prints what became of a prompt: a path, a line of JSON, or an error."""
    bar.clear()
    if "error" in entry:
        print(f"error: {entry['error']}", file=sys.stderr)
    if args.json:
        print(json.dumps(entry), flush=True)
    elif "path" in entry:
        seconds = "" if args.loop else f"  ({entry['seconds']:.1f} s)"
        print(f"{entry['path']}{seconds}", flush=True)


@advise_on_errors("--offload or --offload blocks (on a GPU), --weights int8 or fp8, a smaller "
                  "--size, --batch-size 1 or --dtype bfloat16")
def main():
    """The command line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    args = parse_arguments()
    image = read_image(args.init_image) if args.init_image else None
    device = find_device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    keep_freed_memory()
    pipeline = build(args, device, getattr(torch, dtype))
    settings = {name: setting(getattr(args, name), getattr(pipeline, name))
                for name in ("steps", "guidance", "shift")}
    settings.update({name: getattr(args, name) for name in OF_GUIDANCE})
    warn_of_options(args, pipeline, settings)
    height, width = args.height, args.width
    function = generate
    if image:
        height, width = fit_size(pipeline, image, height, width)
        function = partial(image_to_image, image=image, strength=args.strength)
    height, width = check_size(pipeline, height, width)
    function = partial(function, height=height, width=width, **settings)
    record = make_record(args, pipeline, dtype, settings, f"{width}x{height}")
    kernel = ATTENTION.get(args.attention)
    with nn.attention.sdpa_kernel(kernel) if kernel else nullcontext():
        draw(args, pipeline, record, function)


if __name__ == "__main__":
    convert_weights.run_command(main)
