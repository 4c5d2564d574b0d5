"""The three networks of Z-Image-Turbo: text encoder, diffusion transformer (DiT), and VAE.

    prompt ids --TextEncoder--> features --+
                                           +--> DiT, once per step --> latents --VAE.decode--> image
    Gaussian noise ------------------------+

The text encoder is Qwen3, the diffusion transformer is called S3-DiT, the VAE is that of Flux.
This file holds the networks and nothing else. convert_weights.py and formats.py read files,
sampler.py samples, hardware.py saves memory and time.

+-- The convention of this project ---------------------------------------------------------------+
|  time            t = 0 is pure noise, t = 1 is clean data     x_t = t * data + (1 - t) * noise  |
|  network         v = net(x_t, t, text) estimates the velocity        dx_t / dt = data - noise   |
|  data estimate   x_hat = x_t + (1 - t) * v                    noise estimate  x_t - t * v       |
|  Euler step      x += (t_next - t) * v                                                          |
|  diffusers uses sigma = 1 - t, calls the network with 1 - sigma and negates its output.         |
|  Both conventions describe the same path.                                                       |
+-------------------------------------------------------------------------------------------------+

Shapes stand at line ends:
    B batch            L text tokens       D text features     C latent channels
    h w latent size    N image tokens      M caption tokens    S = N + M joint tokens
    H heads            d width of a head   p side of a patch   (N and M include their padding)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Text(NamedTuple):
    """Encoded prompts, the condition of the DiT."""
    features: Tensor  # (B, L, D), padded on the right
    lengths: Tensor   # (B,) integers: the real rows of each item


class Context(NamedTuple):
    """What depends only on the text and the image size.

    `DiT.prepare` computes it once per prompt; every sampling step uses it.
    """
    caption: Tensor               # (B, M, dim) refined caption tokens
    rope: tuple[Tensor, Tensor]   # cos and sin, each (B, N + M, 1, d / 2): image, then caption
    mask: Tensor | None           # (B, 1, 1, N + M), true = attend; None: nothing is masked
    size: tuple[int, int]         # h and w of the latents that the positions are for


# --- Parts of both transformers -----------------------------------------------------------------


def rotate_pairs(x, rope):
    """Rotary embedding of neighboring pairs (2i, 2i + 1), as the DiT uses it. x: (B, S, H, d)."""
    cos, sin = rope                                              # (B, S, 1, d/2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)           # (B, S, H, d/2)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return rotated.flatten(-2).type_as(x)                        # (B, S, H, d)


def rotate_halves(x, rope):
    """Rotary embedding of the pairs (i, i + d/2), as Qwen3 uses it. x: (B, S, H, d)."""
    cos, sin = rope                                              # (S, 1, d/2)
    a, b = x.float().chunk(2, -1)                                # (B, S, H, d/2)
    rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return rotated.type_as(x)                                    # (B, S, H, d)


class SwiGLU(nn.Module):
    """Feed-forward network w2(silu(w1 x) * w3 x): w1 is the gate, w3 the up projection."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))          # (B, S, dim)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalized queries and keys and a rotary embedding.

    With `kv_heads` < `heads` it is grouped-query attention: heads / kv_heads queries share one
    key and one value. `rotate` is rotate_pairs or rotate_halves.
    """

    # A class attribute, so that hardware.use_cpu_kernels can replace the kernel in a subclass.
    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, dim, heads, kv_heads, head_dim, eps, rotate):
        super().__init__()
        self.head_dim = head_dim
        self.queries_per_key = heads // kv_heads
        self.rotate = rotate
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps)
        self.norm_k = nn.RMSNorm(head_dim, eps)

    def forward(self, x, rope, mask=None, is_causal=False):
        q = self.to_q(x).unflatten(-1, (-1, self.head_dim))      # (B, S, H, d)
        k = self.to_k(x).unflatten(-1, (-1, self.head_dim))      # (B, S, kv heads, d)
        v = self.to_v(x).unflatten(-1, (-1, self.head_dim))      # (B, S, kv heads, d)
        q = self.rotate(self.norm_q(q), rope)
        k = self.rotate(self.norm_k(k), rope)
        if self.queries_per_key > 1:
            k = k.repeat_interleave(self.queries_per_key, 2)     # (B, S, H, d)
            v = v.repeat_interleave(self.queries_per_key, 2)     # (B, S, H, d)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)    # (B, H, S, d)
        out = self.attend(q, k, v, attn_mask=mask, is_causal=is_causal)      # (B, H, S, d)
        return self.to_out(out.transpose(1, 2).flatten(2))                   # (B, S, dim)


# --- Text encoder: Qwen3 without its last layer -------------------------------------------------


@dataclass
class TextEncoderConfig:
    """Field names and defaults as in text_encoder/config.json of the release (Qwen3-4B)."""
    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728     # hidden width of SwiGLU
    num_hidden_layers: int = 36       # of the language model; its last layer is never needed here
    num_attention_heads: int = 32
    num_key_value_heads: int = 8      # grouped-query attention
    head_dim: int = 128               # not hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6


class TextEncoderLayer(nn.Module):
    """Decoder layer of Qwen3: causal attention and SwiGLU, each with a norm before it."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads,
                                   c.head_dim, c.rms_norm_eps, rotate_halves)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)

    def forward(self, x, rope):
        x = x + self.self_attn(self.input_layernorm(x), rope, is_causal=True)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextEncoder(nn.Module):
    """Qwen3 without its last layer, final norm and head.

    Z-Image was trained on the output of the layer before the last one.
    """

    def __init__(self, config):
        super().__init__()
        layers = config.num_hidden_layers - 1
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextEncoderLayer(config) for _ in range(layers))

    def rope(self, positions):
        """cos and sin of the rotary angles, each (L, 1, d/2), for positions (L,).

        The frequencies theta^(-2i/d) are computed in float32 for every dtype of the weights, as in
        transformers. They are computed on the CPU: devices differ in the last bit of a power.
        """
        d = self.config.head_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, d, 2, device="cpu") / d)
        angles = positions[:, None, None] * frequencies.to(positions.device)
        return angles.cos(), angles.sin()

    def forward(self, ids, lengths):
        """ids (B, L) integers, padded on the right; lengths (B,) -> Text.

        Padding on the right needs no mask: with causal attention a token never sees what follows
        it. Rows past an item's length are set to zero.
        """
        x = self.embed_tokens(ids)                               # (B, L, D)
        positions = torch.arange(ids.shape[1], device=ids.device)
        rope = self.rope(positions)
        for layer in self.layers:
            x = layer(x, rope)
        is_padding = positions >= lengths[:, None]               # (B, L)
        return Text(x.masked_fill(is_padding.unsqueeze(-1), 0), lengths)


# --- DiT: the single-stream diffusion transformer, S3-DiT ---------------------------------------


@dataclass
class DiTConfig:
    """Field names and defaults as in transformer/config.json of the release."""
    in_channels: int = 16             # of the latents
    dim: int = 3840
    n_layers: int = 30                # over image and caption tokens together
    n_refiner_layers: int = 2         # over each of the two alone, before that
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560          # the text encoder's hidden_size
    rope_theta: float = 256.0
    axes_dims: tuple = (32, 48, 48)   # parts of a head for (frame, row, column); sum: dim / n_heads
    axes_lens: tuple = (1536, 512, 512)   # number of positions on each axis
    t_scale: float = 1000.0           # the sinusoidal embedding gets t_scale * t


PATCH = 2         # a token is a patch of 2x2 latent pixels
PAD_TO = 32       # both token sequences are padded to a multiple of this, with learned tokens
TIME_DIM = 256    # width of the time embedding; dim, where dim is smaller
QK_NORM_EPS = 1e-5


def round_up(n, multiple=PAD_TO):
    """The next multiple at or above n: an integer or a tensor of integers."""
    return -(-n // multiple) * multiple


def patchify(x):
    """(B, C, h, w) -> (B, h/p * w/p, p * p * C): one token per patch, channel fastest."""
    x = x.unflatten(2, (-1, PATCH)).unflatten(-1, (-1, PATCH))   # (B, C, h/p, p, w/p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)                              # (B, h/p, w/p, p, p, C)
    return x.flatten(3).flatten(1, 2)


def unpatchify(tokens, h, w):
    """(B, h/p * w/p, p * p * C) -> (B, C, h, w): the inverse of patchify."""
    x = tokens.unflatten(1, (h // PATCH, w // PATCH))            # (B, h/p, w/p, p * p * C)
    x = x.unflatten(-1, (PATCH, PATCH, -1))                      # (B, h/p, w/p, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)                              # (B, C, h/p, p, w/p, p)
    return x.flatten(4).flatten(2, 3)


def joint_positions(lengths, m, h, w):
    """Positions (frame, row, column) of all tokens, image first: (B, N + m, 3).

        caption tokens   (1, 0, 0)  (2, 0, 0)  ...  (k, 0, 0)     k: its length with padding
        image tokens     (k + 1, 0, 0)  (k + 1, 0, 1)  ...        one frame, after the caption
                         (k + 1, 1, 0)  (k + 1, 1, 1)  ...
        image padding    (0, 0, 0)

    The caption runs along the frame axis like time in a video, then the image. See tutorials/02.
    lengths (B,): caption lengths without padding. m: caption tokens in the batch, with padding.
    """
    device = lengths.device
    rows, columns = h // PATCH, w // PATCH
    patches = rows * columns
    n = round_up(patches)                                        # image tokens with padding
    positions = torch.zeros(len(lengths), n + m, 3, dtype=torch.long, device=device)
    positions[:, :patches, 0] = 1 + round_up(lengths)[:, None]
    positions[:, :patches, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
    positions[:, :patches, 2] = torch.arange(columns, device=device).repeat(rows)
    positions[:, n:, 0] = 1 + torch.arange(m, device=device)
    return positions


def joint_mask(lengths, n, m):
    """True where a token may be attended to: (B, 1, 1, n + m), or None if all may be.

    Captions and images are padded to multiples of 32 with learned tokens, and the network attends
    to these: it was trained so. Shorter captions of a batch are padded further to the longest one.
    The network must not see this second padding, so it is masked.

    Fast attention kernels take no mask, so it is left out where no item needs one. Testing for
    this reads a number back from the device. That is cheap here: it happens once per prompt.
    A compiled graph cannot branch on such a number and always gets the mask.
    """
    padded = round_up(lengths)                                   # (B,)
    if not torch.compiler.is_compiling() and bool((padded == m).all()):
        return None
    is_visible = torch.arange(m, device=lengths.device) < padded[:, None]    # (B, m)
    return F.pad(is_visible, (n, 0), value=True)[:, None, None]  # (B, 1, 1, n + m)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, min(dim, 256)): sinusoids of t_scale * t, then two linear layers."""

    def __init__(self, config):
        super().__init__()
        self.t_scale = config.t_scale
        last = nn.Linear(1024, min(config.dim, TIME_DIM))
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), last)

    def forward(self, t):
        exponents = torch.arange(128, device=t.device) / 128
        frequencies = torch.exp(-math.log(10000) * exponents)
        angles = self.t_scale * t.float()[:, None] * frequencies         # (B, 128)
        sinusoids = torch.cat((angles.cos(), angles.sin()), -1)          # (B, 256)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """Transformer block with a norm before and after attention and feed-forward network.

        x += norm2(f(norm1(x)))          f: attention, then SwiGLU

    In this form it refines the caption, which does not depend on the time.
    """

    def __init__(self, config):
        super().__init__()
        dim, eps, heads = config.dim, config.norm_eps, config.n_heads
        self.attention = Attention(dim, heads, heads, dim // heads, QK_NORM_EPS, rotate_pairs)
        self.feed_forward = SwiGLU(dim, int(dim / 3 * 8))
        self.attention_norm1 = nn.RMSNorm(dim, eps)
        self.attention_norm2 = nn.RMSNorm(dim, eps)
        self.ffn_norm1 = nn.RMSNorm(dim, eps)
        self.ffn_norm2 = nn.RMSNorm(dim, eps)

    def forward(self, x, rope, mask=None):
        attended = self.attention(self.attention_norm1(x), rope, mask)
        x = x + self.attention_norm2(attended)
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class ModulatedBlock(Block):
    """The same block, told the time: c (B, min(dim, 256)) gives scales and gates. See tutorials/02.

        x += tanh(gate) * norm2(f(norm1(x) * (1 + scale)))
    """

    def __init__(self, config):
        super().__init__(config)
        self.modulation = nn.Linear(min(config.dim, TIME_DIM), 4 * config.dim)

    def forward(self, x, rope, mask, c):
        modulation = self.modulation(c).unsqueeze(1)                             # (B, 1, 4 dim)
        scale_a, gate_a, scale_f, gate_f = modulation.chunk(4, -1)               # (B, 1, dim) each
        attended = self.attention(self.attention_norm1(x) * (1 + scale_a), rope, mask)
        x = x + gate_a.tanh() * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x) * (1 + scale_f))
        return x + gate_f.tanh() * self.ffn_norm2(fed)                           # (B, S, dim)


class FinalLayer(nn.Module):
    """LayerNorm scaled by the time embedding, then a linear layer from token to patch."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(min(config.dim, TIME_DIM), config.dim)
        self.linear = nn.Linear(config.dim, PATCH ** 2 * config.in_channels)

    def forward(self, x, c):
        scale = 1 + self.modulation(F.silu(c)).unsqueeze(1)      # (B, 1, dim)
        return self.linear(self.norm(x) * scale)                 # (B, N, p * p * C)


class DiT(nn.Module):
    """S3-DiT: one stream of image tokens followed by caption tokens.

    It is diffusers' ZImageTransformer2DModel, with our time and sign. See tutorials/02.
    """

    def __init__(self, config):
        super().__init__()
        refiners = range(config.n_refiner_layers)
        self.config = config
        self.x_embedder = nn.Linear(PATCH ** 2 * config.in_channels, config.dim)
        norm = nn.RMSNorm(config.cap_feat_dim, config.norm_eps)
        self.cap_embedder = nn.Sequential(norm, nn.Linear(config.cap_feat_dim, config.dim))
        self.t_embedder = TimestepEmbedder(config)
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.noise_refiner = nn.ModuleList(ModulatedBlock(config) for _ in refiners)
        self.context_refiner = nn.ModuleList(Block(config) for _ in refiners)
        self.layers = nn.ModuleList(ModulatedBlock(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)

    def rope(self, positions):
        """cos and sin of the rotary angles, each (B, S, 1, d/2), d = head_dim, for (B, S, 3).

        Each axis turns its own part of a head. As in the official code the angles are computed in
        float64 and rounded to float32; on the CPU, because some devices have no float64.
        """
        angles = []
        for axis, part in enumerate(self.config.axes_dims):
            exponents = torch.arange(0, part, 2, dtype=torch.float64, device="cpu") / part
            places = torch.arange(self.config.axes_lens[axis], dtype=torch.float64, device="cpu")
            table = torch.outer(places, self.config.rope_theta ** -exponents).float()
            angles.append(table.to(positions.device)[positions[..., axis]])      # (B, S, part/2)
        angles = torch.cat(angles, -1).unsqueeze(2)              # (B, S, 1, d/2)
        return angles.cos(), angles.sin()

    def caption_tokens(self, text):
        """Text -> (B, M, dim): embedded captions, filled up with the learned pad token."""
        features, lengths = text
        m = round_up(features.shape[1])
        tokens = self.cap_embedder(features.to(self.cap_pad_token.dtype))        # (B, L, dim)
        tokens = F.pad(tokens, (0, 0, 0, m - tokens.shape[1]))                   # (B, M, dim)
        is_real = torch.arange(m, device=lengths.device) < lengths[:, None]      # (B, M)
        return torch.where(is_real.unsqueeze(-1), tokens, self.cap_pad_token)

    def prepare(self, text, h, w):
        """Text and latent size -> Context, for all steps of a prompt at this size."""
        caption = self.caption_tokens(text)                      # (B, M, dim)
        m = caption.shape[1]
        cos, sin = self.rope(joint_positions(text.lengths, m, h, w))             # (B, S, 1, d/2)
        mask = joint_mask(text.lengths, cos.shape[1] - m, m)     # (B, 1, 1, S) or None
        caption_rope = cos[:, -m:], sin[:, -m:]
        caption_mask = None if mask is None else mask[..., -m:]
        for block in self.context_refiner:
            caption = block(caption, caption_rope, caption_mask)
        return Context(caption, (cos, sin), mask, (h, w))

    def forward(self, x, t, text):
        """Velocity v = data - noise at noisy latents x.

        x: (B, C, h, w), h and w multiples of the patch side. t: (B,) in [0, 1], 0 is noise.
        text: a Text, or a Context of `prepare`; a text of batch 1 is used for every item of x.
        Returns v with the shape and the dtype of x.
        """
        b, _, h, w = x.shape
        context = text if isinstance(text, Context) else self.prepare(text, h, w)
        assert context.size == (h, w), "the Context was prepared for latents of another size"
        c = self.t_embedder(t)                                   # (B, min(dim, 256))

        image = self.x_embedder(patchify(x).to(self.x_embedder.weight.dtype))    # (B, h/p*w/p, dim)
        patches = image.shape[1]
        n = round_up(patches)
        padding = self.x_pad_token.expand(b, n - patches, -1)
        image = torch.cat((image, padding), 1)                   # (B, N, dim)
        cos, sin = context.rope
        for block in self.noise_refiner:
            image = block(image, (cos[:, :n], sin[:, :n]), None, c)

        z = torch.cat((image, context.caption.expand(b, -1, -1)), 1)             # (B, S, dim)
        for block in self.layers:
            z = block(z, context.rope, context.mask, c)
        v = self.final_layer(z[:, :patches], c)                  # (B, h/p*w/p, p * p * C)
        return unpatchify(v, h, w).type_as(x)                    # (B, C, h, w)


# --- VAE: image <-> latents, the autoencoder of Flux --------------------------------------------


@dataclass
class VAEConfig:
    """Field names and defaults as in vae/config.json of the release. Its weights are float32."""
    in_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple = (128, 256, 512, 512)   # a level each; all but the last halve size
    layers_per_block: int = 2         # residual blocks a level in the encoder; decoder: one more
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611    # latents of the DiT are (z - shift) * scale
    shift_factor: float = 0.1159

    @property
    def downsampling(self):
        """Image pixels per latent pixel, along one side: 8 for the release."""
        return 2 ** (len(self.block_out_channels) - 1)


NORM_EPS = 1e-6   # of all group norms


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    Where the number of channels changes, the shortcut is a 1x1 convolution.
    """

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, NORM_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, NORM_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity()
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.conv_shortcut(x) + residual                  # (B, c_out, h, w)


class SpatialAttention(nn.Module):
    """Self-attention with one head over all pixels."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x):
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)   # (B, h * w, C)
        pixels = pixels.unsqueeze(1)                             # (B, 1 head, h * w, C)
        q, k, v = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        attended = self.to_out(attended).transpose(1, 2)         # (B, C, h * w)
        return x + attended.unflatten(2, x.shape[2:])            # (B, C, h, w)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the size of the latents."""

    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attention = SpatialAttention(channels, groups)

    def forward(self, x):
        return self.resnets[1](self.attention(self.resnets[0](x)))


class Downsample(nn.Module):
    """A convolution of stride 2. Padded on the right and below only: the release was trained so."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel twice along both sides, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then the change to the next resolution.

    `resample` is Downsample, Upsample, or (at the last level) nn.Identity.
    """

    def __init__(self, c_in, c_out, layers, groups, resample):
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.resnets = nn.ModuleList(map(ResnetBlock, widths[:-1], widths[1:], [groups] * layers))
        self.resample = resample(c_out)

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        return self.resample(x)


def make_levels(channels, layers, groups, resample):
    """One Level for each entry of channels; all but the last change the resolution."""
    levels = nn.ModuleList()
    for i, width in enumerate(channels):
        is_last = i == len(channels) - 1
        previous = channels[max(i - 1, 0)]
        levels.append(Level(previous, width, layers, groups, nn.Identity if is_last else resample))
    return levels


class Encoder(nn.Module):
    """Image (B, 3, 8h, 8w) -> mean and log variance of z, stacked: (B, 2C, h, w)."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        layers = config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = make_levels(channels, layers, groups, Downsample)
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """z (B, C, h, w) -> image (B, 3, 8h, 8w): the mirrored encoder with one more block a level."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        layers = config.layers_per_block + 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = make_levels(channels, layers, groups, Upsample)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.in_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """AutoencoderKL of diffusers, without quant convolutions (Z-Image has none).

    Images are (B, 3, H, W) in [-1, 1]. Latents are what the DiT works on: (B, C, H/8, W/8), shifted
    and scaled to about unit variance. z is the same before shift and scale.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image):
        """Image -> mean and log variance of z, each (B, C, h, w)."""
        mean, logvar = self.encoder(image).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image, noise=None):
        """Image -> latents (B, C, h, w).

        Without noise they are those of the posterior's mean; with noise (B, C, h, w), those of a
        sample of the posterior.
        """
        z, logvar = self.moments(image)
        if noise is not None:
            z = z + (0.5 * logvar).exp() * noise
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents):
        """Latents -> image, nominally in [-1, 1]. The network may leave this range a little."""
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(z)
