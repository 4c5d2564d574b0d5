"""The three networks of Z-Image-Turbo: text encoder (Qwen3), diffusion transformer (S3-DiT), autoencoder (the Flux VAE).

    prompt ids --TextEncoder--> features --+
                                           +--> DiT, once per step --> latents --VAE.decode--> image
    Gaussian noise ------------------------+

Plain modules: nothing here knows about files (convert_weights.py) or sampling (sampler.py).

+-- The convention, used everywhere in this project ---------------------------------------------------------+
|  time            t = 0 is pure noise, t = 1 is clean data            x_t = t * data + (1 - t) * noise      |
|  network         v = net(x_t, t, text)  estimates the velocity       dx_t / dt = data - noise              |
|  data estimate   x_hat = x_t + (1 - t) * v                           noise estimate   x_t - t * v          |
|  Euler step      x += (t_next - t) * v                                                                     |
|  (diffusers: sigma = 1 - t, network called with 1 - sigma, output negated. The same thing, twice flipped.) |
+------------------------------------------------------------------------------------------------------------+

Shapes at line ends: B batch, L text tokens, D features, C latent channels, h w latent height and width,
N image tokens, M caption tokens (both with their padding), S = N + M, H heads, d head width, p patch side.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Text(NamedTuple):
    """Encoded prompts: what the DiT is told about the wanted image."""
    features: Tensor  # (B, L, D), padded on the right
    lengths: Tensor   # (B,) integers, real rows of each item


class Context(NamedTuple):
    """All the DiT computes from text and image size alone: made once by `DiT.prepare`, reused at every step."""
    caption: Tensor       # (B, M, dim) refined caption tokens
    rope: Tensor          # (B, N + M, 1, d / 2, 2) cos and sin: image tokens first, then caption tokens
    mask: Tensor | None   # (B, 1, 1, N + M), true = attend; None where nothing needs masking


# --- Parts used by more than one network --------------------------------------------------------------------


def rotate_pairs(x, rope):
    """Rotary embedding of neighbouring pairs (2i, 2i + 1), the DiT's: each pair a complex number times exp(i * angle)."""
    pairs = x.unflatten(-1, (-1, 2))                                            # (B, S, H, d/2, 2)
    if torch.compiler.is_compiling():                        # compilers fuse real numbers and know no complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)).flatten(-2)


def rotate_halves(x, rope):
    """Rotary embedding of pairs (i, i + d/2), Qwen's."""
    (a, b), (cos, sin) = x.chunk(2, -1), rope.unbind(-1)                        # (B, S, H, d/2), (B, S, 1, d/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)                # (B, S, H, d)


def plain_cpu(x):
    """Whether x is on a CPU with nobody looking on: no gradient, no autocast, no compiler. There we may pick kernels ourselves."""
    return x.is_cpu and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def has_bfloat16_products():
    """Whether PyTorch multiplies bfloat16 matrices on this CPU with more than a plain loop: on x86 it takes AVX-512."""
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(x, weight):
    """x W^T, on a CPU by the fastest way there is, which is not always F.linear's."""
    if plain_cpu(x):
        if x.dtype == torch.bfloat16 and not has_bfloat16_products():
            return product(x.float(), weight.float()).bfloat16()
        if x.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            # oneDNN, which torch.compile uses, too: twice as fast as MKL, F.linear's choice, on AMD processors.
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def attend(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(d)) v, all (B, H, S, d); mask true = attend.

    PyTorch's fused kernel for CPUs multiplies bfloat16 as slowly as float32. Matrix products do not, so there they are
    spelt out, for as many heads at a time as have about two million scores, which stay in the cache.
    """
    if causal or q.dtype != torch.bfloat16 or not (plain_cpu(q) and has_bfloat16_products()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    out = torch.empty_like(q)
    at_once = max(1, 2_000_000 // (len(q) * q.shape[2] * k.shape[2]))
    for q, k, v, o in zip(*(tensor.split(at_once, 1) for tensor in (q * q.shape[-1] ** -0.5, k, v, out))):
        scores = q @ k.transpose(-1, -2)                                        # (B, some H, S, S)
        if mask is not None:
            scores.masked_fill_(~mask, -math.inf)
        o.copy_(torch.softmax(scores, -1, out=scores) @ v)
    return out


def quantise(weight):
    """(rows, columns) -> the same in float8_e4m3, each row divided by its scale, and the scales (rows, 1) float32."""
    limit = torch.finfo(torch.float8_e4m3fn).max                                # 448
    scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / limit
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def has_float8_products(device):
    """Whether the device multiplies float8 matrices with a scale per row: NVIDIA GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Linear(nn.Linear):
    """x W^T, without bias. After `to_float8`, W has half the size of bfloat16, with a scale for each of its rows."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)
        self.register_buffer("scale", None)                  # (d_out, 1), of a float8 weight

    def to_float8(self):
        weight, self.scale = quantise(self.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        if self.scale is not None:
            if has_float8_products(x.device) and not (self.in_features % 16 or self.out_features % 16):
                rows, scale = quantise(x.flatten(0, -2))                        # activations, too
                y = torch._scaled_mm(rows, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=x.dtype)
                return y.unflatten(0, x.shape[:-1])
            return product(x, self.weight.to(x.dtype)) * self.scale.flatten().to(x.dtype)
        return product(x, self.weight)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), with w1 and w3 stacked into one matrix."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w13 = Linear(dim, 2 * hidden)
        self.w2 = Linear(hidden, dim)

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, -1)                  # (B, S, hidden) each
        return self.w2(F.silu(gate) * up)                    # (B, S, dim)


class Attention(nn.Module):
    """Attention with RMS-normalised queries and keys, q, k, v stacked into one matrix.

    `kv_heads` < `heads` is grouped-query attention: that many queries in a row share one key and value.
    """

    def __init__(self, dim, heads, kv_heads, head_dim, eps, rotate):
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
        self.heads, self.kv_heads, self.head_dim, self.eps, self.rotate = heads, kv_heads, head_dim, eps, rotate
        self.qkv = Linear(dim, (heads + 2 * kv_heads) * head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps)
        self.norm_k = nn.RMSNorm(head_dim, eps)
        self.out = Linear(heads * head_dim, dim)

    def forward(self, x, rope, mask=None, causal=False):
        h, kv = self.heads, self.kv_heads
        qk, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split((h + kv, kv), 2)          # (B, S, H, d)
        scale = torch.cat((self.norm_q.weight.expand(h, -1), self.norm_k.weight.expand(kv, -1)))
        qk = self.rotate(F.rms_norm(qk.float(), qk.shape[-1:], eps=self.eps) * scale, rope).type_as(v)   # both in one go
        q, k, v = (part.transpose(1, 2) for part in (*qk.split((h, kv), 2), v))                # (B, H, S, d)
        if h > kv:
            k, v = k.repeat_interleave(h // kv, 1), v.repeat_interleave(h // kv, 1)
        return self.out(attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))              # (B, S, dim)


# --- Text encoder: Qwen3, all but its last layer ------------------------------------------------------------


@dataclass
class TextEncoderConfig:
    """Field names and defaults: text_encoder/config.json of the release (Qwen3-4B)."""
    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728     # SwiGLU width
    num_hidden_layers: int = 36       # of the language model; the last one is never needed here
    num_attention_heads: int = 32
    num_key_value_heads: int = 8      # grouped-query attention
    head_dim: int = 128               # not hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6


class TextEncoderLayer(nn.Module):
    """Pre-norm decoder layer of Qwen3."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
                                   c.rms_norm_eps, rotate_halves)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)

    def forward(self, x, rope):
        x = x + self.self_attn(self.input_layernorm(x), rope, causal=True)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextEncoder(nn.Module):
    """Qwen3 up to the second-last layer's output: the features Z-Image was trained on (no final norm, no head).

    forward(ids (B, L) integers padded on the right, lengths (B,)) -> Text. Rows past an item's length are zero.
    Causal attention needs no mask for padding on the right: a real token never looks at what comes after it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextEncoderLayer(config) for _ in range(config.num_hidden_layers - 1))

    def frequencies(self):
        """Rotary frequencies theta^(-2i/d), (d/2,) float32 whatever the weights' dtype: transformers keeps them so, too."""
        d = self.config.head_dim
        return self.config.rope_theta ** (-torch.arange(0, d, 2, device="cpu") / d)

    def forward(self, ids, lengths):
        x = self.embed_tokens(ids)                                              # (B, L, D)
        positions = torch.arange(ids.shape[1], device=ids.device)
        angles = positions[:, None, None] * self.frequencies().to(x.device)     # (L, 1, d/2), float32
        rope = torch.stack((angles.cos(), angles.sin()), -1)
        for layer in self.layers:
            x = layer(x, rope)
        return Text(x.masked_fill((positions >= lengths[:, None]).unsqueeze(-1), 0), lengths)


# --- DiT: the single-stream diffusion transformer, S3-DiT ---------------------------------------------------


@dataclass
class DiTConfig:
    """Field names and defaults: transformer/config.json of the release."""
    in_channels: int = 16             # of the latents
    dim: int = 3840
    n_layers: int = 30                # over image and caption tokens together
    n_refiner_layers: int = 2         # over each of the two alone, before that
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560          # the text encoder's hidden size
    rope_theta: float = 256.0
    axes_dims: tuple = (32, 48, 48)   # parts of a head turned by (frame, row, column); their sum is the head's width
    axes_lens: tuple = (1536, 512, 512)  # positions each axis has room for
    t_scale: float = 1000.0           # the sinusoidal embedding sees t_scale * t


PATCH = 2         # a token is a patch of 2x2 latent pixels
PAD_TO = 32       # both token sequences are padded to a multiple of this, with learned tokens
TIME_DIM = 256    # width of the time embedding (less where dim is smaller)
QK_NORM_EPS = 1e-5


def round_up(n, multiple=PAD_TO):
    return -(-n // multiple) * multiple


def patchify(x):
    """(B, C, h, w) -> (B, h/p * w/p, p * p * C): a token is a patch's numbers, channel fastest."""
    x = x.unflatten(2, (-1, PATCH)).unflatten(-1, (-1, PATCH))                  # (B, C, h/p, p, w/p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens, h, w):
    """The inverse of patchify: (B, h/p * w/p, p * p * C) -> (B, C, h, w)."""
    tokens = tokens.unflatten(1, (h // PATCH, w // PATCH)).unflatten(-1, (PATCH, PATCH, -1))   # (B, h/p, w/p, p, p, C)
    return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, min(dim, 256)): sinusoids of t_scale * t, then two linear layers."""

    def __init__(self, config):
        super().__init__()
        self.t_scale = config.t_scale
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, min(config.dim, TIME_DIM)))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = self.t_scale * t.float()[:, None] * frequencies                # (B, 128)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1).to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """Transformer block with norms before and after attention and SwiGLU. `c` (B, min(dim, 256)) is the time embedding:

        x += tanh(gate) * norm2(f(norm1(x) * (1 + scale)))      f: attention, then SwiGLU

    The context refiner's blocks do not know the time: no scales, no gates.
    """

    def __init__(self, config, modulated=True):
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.attention = Attention(dim, config.n_heads, config.n_heads, dim // config.n_heads, QK_NORM_EPS, rotate_pairs)
        self.feed_forward = SwiGLU(dim, int(dim / 3 * 8))
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.modulation = nn.Linear(min(dim, TIME_DIM), 4 * dim) if modulated else None

    def forward(self, x, rope, mask=None, c=None):
        if self.modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, mask))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale_a, gate_a, scale_f, gate_f = self.modulation(c).unsqueeze(1).chunk(4, -1)        # (B, 1, dim) each
        a = self.attention(self.attention_norm1(x) * (1 + scale_a), rope, mask)                # (B, S, dim)
        x = torch.addcmul(x, gate_a.tanh(), self.attention_norm2(a))
        f = self.feed_forward(self.ffn_norm1(x) * (1 + scale_f))                               # (B, S, dim)
        return torch.addcmul(x, gate_f.tanh(), self.ffn_norm2(f))                              # x + tanh(gate) * norm(f)


class FinalLayer(nn.Module):
    """LayerNorm, scaled by the time embedding, then each token to its patch's numbers."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(min(config.dim, TIME_DIM), config.dim)
        self.linear = nn.Linear(config.dim, PATCH ** 2 * config.in_channels)

    def forward(self, x, c):
        return self.linear(self.norm(x) * (1 + self.modulation(F.silu(c)).unsqueeze(1)))       # (B, N, p*p*C)


class DiT(nn.Module):
    """S3-DiT (diffusers: ZImageTransformer2DModel): one stream of image tokens followed by caption tokens.

    forward(x (B, C, h, w), t (B,), text) -> v, shaped and typed like x. h and w are multiples of the patch side.
    `text` is a Text, or a Context from `prepare` where the same text serves many steps; a batch of one is
    stretched over x's batch.
    """

    def __init__(self, config):
        super().__init__()
        dims, lens = config.axes_dims, config.axes_lens
        if len(dims) != 3 or len(lens) != 3 or any(d % 2 for d in dims) or sum(dims) * config.n_heads != config.dim:
            raise ValueError("axes_dims and axes_lens are three numbers each, axes_dims even, with sum(axes_dims) * n_heads = dim")
        self.config = config
        self.x_embedder = nn.Linear(PATCH ** 2 * config.in_channels, config.dim)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(config.cap_feat_dim, config.norm_eps),
                                          nn.Linear(config.cap_feat_dim, config.dim))
        self.t_embedder = TimestepEmbedder(config)
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)

    def rope(self, positions):
        """cos and sin of the rotary angles for positions (B, S, 3) = (frame, row, column)."""
        angles = []
        for axis, (d, length) in enumerate(zip(self.config.axes_dims, self.config.axes_lens)):
            # The official table: float64 on the CPU (some devices have none), then rounded to float32.
            frequencies = self.config.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d)
            table = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies).float()
            angles.append(table.to(positions.device)[positions[..., axis]])     # (B, S, d/2)
        angles = torch.cat(angles, -1).unsqueeze(2)                             # (B, S, 1, head_dim/2)
        return torch.stack((angles.cos(), angles.sin()), -1)                    # (B, S, 1, head_dim/2, 2)

    def prepare(self, text, h, w):
        """Text and latent size -> Context: caption tokens through the context refiner, rope tables, mask.

        Two kinds of padding. Each caption is padded to a multiple of 32 with the learned `cap_pad_token`, and the
        network attends to those tokens: they are part of what it learned. What a ragged batch needs beyond that
        to be rectangular is masked.
        """
        features, lengths = text
        rows, columns = h // PATCH, w // PATCH
        device, n, m = features.device, rows * columns, round_up(features.shape[1])
        padded = round_up(lengths)                                              # (B,)
        index = torch.arange(m, device=device)

        caption = self.cap_embedder(features.to(self.cap_pad_token.dtype))      # (B, L, dim)
        caption = F.pad(caption, (0, 0, 0, m - caption.shape[1]))               # (B, M, dim)
        caption = torch.where((index < lengths[:, None]).unsqueeze(-1), caption, self.cap_pad_token)

        # Positions (frame, row, column): caption token k at (1 + k, 0, 0), image tokens in the frame after the
        # padded caption, image pad tokens at (0, 0, 0).
        at = torch.zeros(len(features), round_up(n) + m, 3, dtype=torch.long, device=device)   # (B, S, 3)
        at[:, :n, 0] = 1 + padded[:, None]
        at[:, :n, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
        at[:, :n, 2] = torch.arange(columns, device=device).repeat(rows)
        at[:, round_up(n):, 0] = 1 + index
        rope = self.rope(at)

        # A mask keeps the fastest attention kernels away: only a ragged batch gets one. To see which it is means
        # reading numbers back from the device, cheap here, once per prompt. A compiled graph cannot branch on
        # them and always masks; compile the steps and call prepare outside to keep the fast kernels.
        mask = None
        if torch.compiler.is_compiling() or bool((padded < m).any()):
            mask = F.pad(index < padded[:, None], (round_up(n), 0), value=True)[:, None, None]  # (B, 1, 1, S)
        for block in self.context_refiner:
            caption = block(caption, rope[:, -m:], None if mask is None else mask[..., -m:])
        return Context(caption, rope, mask)

    def features(self, x, t, text, depth=None):
        """Image tokens (B, N, dim) after the first `depth` joint layers (None: all), and the time embedding."""
        b, _, h, w = x.shape
        caption, rope, mask = text if isinstance(text, Context) else self.prepare(text, h, w)
        c = self.t_embedder(t)                                                  # (B, min(dim, 256))

        image = self.x_embedder(patchify(x).to(self.x_embedder.weight.dtype))               # (B, N, dim)
        n, padding = image.shape[1], -image.shape[1] % PAD_TO
        image = torch.cat((image, self.x_pad_token.expand(b, padding, -1)), 1)                 # (B, N padded, dim)
        for block in self.noise_refiner:
            image = block(image, rope[:, :n + padding], c=c)

        z = torch.cat((image, caption.expand(b, -1, -1)), 1)                                   # (B, S, dim)
        for block in self.layers[:depth]:
            z = block(z, rope, mask, c)
        return z[:, :n], c

    def forward(self, x, t, text):
        tokens, c = self.features(x, t, text)
        return unpatchify(self.final_layer(tokens, c), *x.shape[-2:]).type_as(x)            # (B, C, h, w)


# --- VAE: image <-> latents, the Flux autoencoder -----------------------------------------------------------


@dataclass
class VAEConfig:
    """Field names and defaults: vae/config.json of the release. Its weights are kept in float32."""
    in_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple = (128, 256, 512, 512)  # one level each; every level but the last halves the size
    layers_per_block: int = 2         # residual blocks a level in the encoder; the decoder has one more
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611    # the DiT's latents are (z - shift) * scale
    shift_factor: float = 0.1159

    @property
    def downsampling(self):
        """Image pixels per latent pixel, along one side: 8 for the release."""
        return 2 ** (len(self.block_out_channels) - 1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose mean and variance (B, groups, 1) the tiles of one image can share: see in_tiles."""
    tiles = None      # inside in_tiles: (pixels, mean, variance) of each tile so far
    shared = None     # mean and variance to use, from an earlier pass
    core = None       # the part of this tile that no other covers: (first row, last, first column, last) as shares of the height and width

    def forward(self, x):
        if self.tiles is None:
            return super().forward(x)
        grouped, (h, w) = x.unflatten(1, (self.num_groups, -1)), x.shape[-2:]   # (B, groups, C/groups, h, w)
        top, bottom, left, right = (round(share * side) for share, side in zip(self.core, (h, h, w, w)))
        core = grouped[..., top:bottom, left:right].flatten(2)
        variance, mean = torch.var_mean(core, -1, correction=0, keepdim=True)
        self.tiles.append((core.shape[-1], mean, variance))
        mean, variance = self.shared or (mean, variance)
        x = ((grouped.flatten(2) - mean) * (variance + self.eps).rsqrt()).view_as(x)
        return x * self.weight[:, None, None] + self.bias[:, None, None]

    def share(self):
        """The mean and variance of all tiles together."""
        pixels = sum(n for n, _, _ in self.tiles)
        mean = sum(n * m for n, m, _ in self.tiles) / pixels
        self.shared = mean, sum(n * (v + (m - mean) ** 2) for n, m, v in self.tiles) / pixels
        self.tiles = []


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))        # (B, c_out, h, w)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all pixels, in the middle of encoder and decoder."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)                  # (B, h*w, C)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, -1)                    # (B, 1, h*w, C) each
        tokens = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))   # (B, h*w, C)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attention = SpatialAttention(channels, groups)

    def forward(self, x):
        return self.resnets[1](self.attention(self.resnets[0](x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then (`resample`) a convolution that halves or doubles the size."""

    def __init__(self, c_in, c_out, layers, groups, resample):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        self.downsample = nn.Conv2d(c_out, c_out, 3, stride=2) if resample == "down" else None
        self.upsample = nn.Conv2d(c_out, c_out, 3, padding=1) if resample == "up" else None

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(F.pad(x, (0, 1, 0, 1)))      # padded right and below only, as the release was trained
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """image (B, 3, 8h, 8w) -> mean and log variance of z, stacked: (B, 2C, h, w)."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, config.layers_per_block, groups, "down" if i < len(channels) - 1 else None)
            for i, c in enumerate(channels))
        self.mid_block = MidBlock(channels[-1], groups)
        self.norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x, tile=None):
        fine = nn.Sequential(self.conv_in, *self.levels[:-1])                   # down to the latents' size
        x = in_tiles(fine, x, tile, down=2 ** (len(self.levels) - 1)) if tile else fine(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(self.levels[-1](x)))))


class Decoder(nn.Module):
    """z (B, C, h, w) -> image (B, 3, 8h, 8w): the encoder turned round, with one more residual block a level."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.levels = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, config.layers_per_block + 1, groups, "up" if i < len(channels) - 1 else None)
            for i, c in enumerate(channels))
        self.norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], config.in_channels, 3, padding=1)

    def forward(self, z, tile=None):
        x = self.mid_block(self.conv_in(z))
        fine = nn.Sequential(*self.levels, self.norm_out, nn.SiLU(), self.conv_out)
        return in_tiles(fine, x, tile, up=2 ** (len(self.levels) - 1)) if tile else fine(x)


HALO = 8          # latent pixels around a tile: more than its part of the network looks sideways
PASSES = 2        # one more than there are norms would be exact; two leave no seam and a little difference in tone


def in_tiles(layers, x, tile, down=1, up=1):
    """layers(x), worked out tile by tile: x (B, C, h, w) -> (B, C', h * up / down, w * up / down). Memory does not grow with x.

    `tile` is in latent pixels; `down` pixels of x and `up` of the result lie along one of them. Neighbours that a convolution looks at are
    computed along and cut off. What depends on the whole image are the group norms' statistics: a first pass gathers them from
    all tiles, the next works with their means.
    """
    norms = [module for module in layers.modules() if isinstance(module, GroupNorm)]
    rows, columns = x.shape[-2] // down, x.shape[-1] // down
    def cut(start, length):                                  # -> first and last latent pixel of a tile, and of it with its halo
        return start, min(start + tile, length), max(start - HALO, 0), min(start + tile + HALO, length)

    try:
        for norm in norms:
            norm.tiles = []
        for _ in range(PASSES if max(rows, columns) > tile else 1):
            bands = []
            for top, bottom, above, below in (cut(i, rows) for i in range(0, rows, tile)):
                band = []
                for left, right, before, after in (cut(j, columns) for j in range(0, columns, tile)):
                    for norm in norms:
                        h, w = below - above, after - before
                        norm.core = (top - above) / h, (bottom - above) / h, (left - before) / w, (right - before) / w
                    part = layers(x[..., above * down:below * down, before * down:after * down])
                    band.append(part[..., (top - above) * up:(bottom - above) * up, (left - before) * up:(right - before) * up])
                bands.append(torch.cat(band, -1))
            for norm in norms:
                norm.share()
    finally:
        for norm in norms:
            norm.tiles = norm.shared = None
    return torch.cat(bands, -2)


class VAE(nn.Module):
    """AutoencoderKL without quant convolutions. Images are (B, 3, H, W) in [-1, 1], latents (B, C, H/8, W/8).

    Latents on the outside are what the DiT works on: (z - shift_factor) * scaling_factor, about unit variance.
    `tile`: side in latent pixels of the tiles to work in, for images that are large for the memory there is; None: all at once.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def moments(self, image, tile=None):
        """image -> mean and log variance of z, before shift and scale, each (B, C, h, w)."""
        mean, logvar = self.encoder(image, tile).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image, noise=None, tile=None):
        """image -> latents: of the posterior's mean, or of a sample from it where `noise` (B, C, h, w) is given."""
        z, logvar = self.moments(image, tile)
        if noise is not None:
            z = z + (0.5 * logvar).exp() * noise
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents, tile=None):
        """latents -> image, nominally in [-1, 1]; the network may overshoot a little."""
        return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor, tile)
