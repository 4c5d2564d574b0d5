"""Less memory, more speed: what is applied from outside to networks that are built already.

    quantize           one byte for each weight of the blocks, float8 or int8
    use_cpu_kernels    products and attention by the kernels that are fastest on a CPU
    use_attention      attention by the kernel that the user names
    use_tiles          the VAE tile by tile
    TakeTurns          of several networks only the one that computes is on the device
    stream_blocks      of a network only the block that computes, and the next one

None is needed. Those that are wanted are applied in this order, and dit.compile() last. A layer
gets another class that keeps its tensors; hooks decide where the tensors lie.
"""

import ctypes
import itertools
import math
import os
import re
import warnings
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from convert_weights import QUANTIZED, UserError
from formats import hadamard, is_table, layer_format, quantize_rows, quantize_weight, rotate
from model import Attention, Decoder, Encoder

CPUINFO = "/proc/cpuinfo"


def is_intel():
    """Whether an x86 processor is one of Intel's, by what Linux or Windows say."""
    said = os.environ.get("PROCESSOR_IDENTIFIER", "")
    with suppress(OSError), open(CPUINFO, encoding="utf-8") as file:
        said += file.read(100)
    return "GenuineIntel" in said


# On x86, bfloat16 matrix instructions are AVX-512 BF16 and AMX; int8, VNNI and AMX. Where a CPU
# lacks them, bfloat16 products are 16 times slower than float32, and int8 ones slow or not exact.
# Intel's CPUs with AVX-512 BF16 have AMX as well (all but Cooper Lake), but a virtual machine may
# hide it. What is left is slower than float32 (tutorials/real_weights.md). So bfloat16 counts on
# Intel's CPUs only with AMX.
CPU_HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
CPU_HAS_BFLOAT16 = (getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()
                    and (CPU_HAS_AMX or not is_intel()))
HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
CPU_HAS_INT8 = (getattr(torch.cpu, "_is_vnni_supported", bool)()      # of AVX-512
                or getattr(torch.cpu, "get_capabilities", dict)().get("avx_vnni", False))


@lru_cache
def multiplies_float8(device):
    """Whether a GPU multiplies float8 with a scale for each row. A small product is tried.

    Older cards do not, and neither does PyTorch for Windows or for some cards of AMD.
    """
    try:
        ones = torch.ones(32, 32, device=device)
        rows, scale = ones.to(torch.float8_e4m3fn), ones[:, :1].contiguous()
        y = torch._scaled_mm(rows, rows.t(), scale, scale.t(), out_dtype=torch.bfloat16)
        return bool((y == 32).all())
    except (RuntimeError, TypeError, ValueError):
        return False


# torch.compile calls it once and takes the answer as a constant.
@torch.compiler.assume_constant_result
def has_products(dtype, device):
    """True if the device multiplies matrices of this dtype, float8 or int8."""
    if device.type == "cuda":
        if dtype == torch.int8:               # NVIDIA from Ampere on
            return torch.cuda.get_device_capability(device) >= (8, 0)
        return multiplies_float8(device)
    return device.type == "cpu" and dtype == torch.int8 and CPU_HAS_INT8


def choose_numbers(model, device, dtype, weights):
    """Chooses dtype and weights -> dtype, weights, what stays as it is stored: names of KEEP.

    dtype, weights: from the command line, or None. With int8 weights a CPU takes bfloat16 if it is
    fast in bfloat16; if it does not multiply int8, bfloat16 also replaces the int8 weights.
    `--like` passes the dtype and weights that a picture has recorded: the choice must be the same.
    UserError: fp8 on Apple's GPUs.
    """
    if weights == "fp8" and device.type == "mps":
        raise UserError("--weights fp8: Apple's GPUs have no float8; take --weights int8")
    pieces = [network.pieces.values() for network in model.networks.values()]
    is_stored = any(layer_format(piece.stored) == "int8" for piece in itertools.chain(*pieces))
    is_int8, keep = is_stored or weights == "int8", {weights, "int8"} - {None}
    takes_bfloat16 = device.type != "cpu" or (is_int8 and CPU_HAS_BFLOAT16)
    chosen = dtype or ("bfloat16" if takes_bfloat16 else "float32")
    if chosen == "float32" and device.type != "mps":      # which does not know all types of tables
        keep |= {"table"}
    if is_int8 and not has_products(torch.int8, device):
        # bfloat16 without --weights int8 is also what a picture records after a replacement.
        may_replace = dtype is None or (dtype == "bfloat16" and weights != "int8")
        if device.type == "cpu" and CPU_HAS_BFLOAT16 and may_replace:
            warnings.warn("this device has no int8 products: bfloat16 is used instead",
                          stacklevel=2)
            return chosen, None if weights == "int8" else weights, keep - {"int8"}
        warnings.warn("this device has no int8 products: int8 weights save memory but not time",
                      stacklevel=2)
    return chosen, weights, keep


# --- One byte for each weight -------------------------------------------------------------------


class QuantizedLinear(nn.Linear):
    """x W^T with W = weight * scale: a byte for each weight, a float32 scale for each row."""

    def forward(self, x):
        if self.rotation is not None:         # the weight is rotated, so x has to be
            x = rotate(x, self.rotation)
        aligned = self.in_features % 16 == 0 and self.out_features % 16 == 0
        if (aligned or not x.is_cuda) and has_products(self.weight.dtype, x.device):
            rows, row_scale = quantize_rows(x.flatten(0, -2), self.weight.dtype)
            return self.product(rows, row_scale, x.dtype).unflatten(0, x.shape[:-1])
        is_slow = x.is_cpu and x.dtype == torch.bfloat16 and not CPU_HAS_BFLOAT16
        dtype = torch.float32 if is_slow else x.dtype
        product = float32_product if x.is_cpu and dtype == torch.float32 else F.linear
        y = product(x.to(dtype), self.weight.to(dtype)) * self.scale.flatten().to(dtype)
        return y.to(x.dtype)


class Float8Linear(QuantizedLinear):
    """float8_e4m3 weights; where the device can multiply them, inputs are rounded to it, too."""

    def product(self, rows, row_scale, dtype):
        # With a scale for each row, bfloat16 is the only result that every card gives.
        y = torch._scaled_mm(rows, self.weight.t(), row_scale, self.scale.t(),
                             out_dtype=torch.bfloat16)
        return y.to(dtype)


class Int8Linear(QuantizedLinear):
    """int8 weights; inputs are rounded to int8 with a scale per token, so the product is integer.

    PyTorch has a fused kernel, onednn.qlinear_pointwise. It wants weights in an order of its own:
    a second copy in memory, made at each start. Here a mapped file's weights are used as they are.
    """

    def product(self, rows, row_scale, dtype):
        padding = max(32 - len(rows), 0)      # a GPU wants more than 16 rows
        y = torch._int_mm(F.pad(rows, (0, 0, 0, padding)), self.weight.t())[:len(rows)]
        return (y * row_scale).mul_(self.scale.flatten()).to(dtype)


def bind(linear, weight, scale, group=0):
    """Makes a built nn.Linear a quantized layer over these tensors, which may be mapped.

    weight: (out, in) float8_e4m3fn or int8. scale: a number, or one for each row. group: columns
    that are rotated together (formats.rotate), or 0.
    """
    linear.weight = nn.Parameter(weight, requires_grad=False)
    scale = scale.float().reshape(-1, 1).expand(linear.out_features, 1).contiguous()
    linear.register_buffer("scale", scale)
    # hadamard() gives one tensor for all layers. detach() makes a tensor object for this layer,
    # with the same memory, because offloading replaces the .data of a layer's tensors.
    rotation = hadamard(group, weight.device).detach() if group else None
    linear.register_buffer("rotation", rotation, persistent=False)
    linear.__class__ = Int8Linear if weight.dtype == torch.int8 else Float8Linear


def cast_rows(embedding):
    """Lets a table of words stay as it is stored, where everything else is float32.

    Few of its rows are used. They are cast when they are, which changes no number.
    """
    embedding.register_forward_hook(lambda _, ids, rows: rows.float())


# What is done to a layer that stays as it is stored; see `keep` of convert_weights.load.
KEEP = {"fp8": bind, "int8": bind, "table": cast_rows}


QUANTIZED_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def quantize_layer(linear, weight, kind):
    """Makes an nn.Linear a layer in "fp8" or "int8" with this weight (out, in), on its device."""
    bind(linear, *quantize_weight(weight, QUANTIZED_DTYPES[kind]))


def quantize(net, kind, device=None):
    """Turns linear layers without bias into "fp8" or "int8", one by one and in place -> net.

    These are the layers of the blocks and nearly all weights. Those with a bias embed time and
    caption, and are sensitive. device: quantize there, and leave the layer there.
    """
    for layer in net.modules():
        if type(layer) is nn.Linear and layer.bias is None:
            quantize_layer(layer, layer.weight.detach().to(device), kind)
    return net


# --- Kernels for CPUs ---------------------------------------------------------------------------


def float32_product(x, weight, bias=None):
    """x W^T + b by oneDNN: 1.1 to 1.7 times as fast as PyTorch's own choice on AMD processors."""
    # This operation has no backward, and compilers choose kernels themselves.
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not HAS_ONEDNN:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class CPULinear(nn.Linear):
    """nn.Linear on a CPU in float32, also for bfloat16 where float32 is faster."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.float()
        return float32_product(x.float(), self.weight.float(), bias).to(x.dtype)


class Bfloat16Attention(Attention):
    """Attention in bfloat16 as two matrix products.

    PyTorch's fused attention uses a CPU's bfloat16 instructions only with AMX, where it is faster
    than this. Its matrix products always use them. A few heads at a time, so that their scores
    (about two million) stay in the cache.
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
    for layer in net.modules():
        if type(layer) is Attention and CPU_HAS_BFLOAT16 and not CPU_HAS_AMX:
            if layer.to_q.weight.dtype == torch.bfloat16:
                layer.__class__ = Bfloat16Attention
        elif type(layer) is nn.Linear:
            dtype = layer.weight.dtype
            # Small products are up to 10 % slower through oneDNN.
            is_large = layer.weight.numel() >= 2 ** 20
            if dtype == torch.float32 and is_large and HAS_ONEDNN:
                layer.__class__ = CPULinear
            if dtype == torch.bfloat16 and not CPU_HAS_BFLOAT16:
                layer.__class__ = CPULinear
    return net


# --- Kernels for attention ----------------------------------------------------------------------

ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def attend_by(kernel, attend, q, k, v, **options):
    """`attend` with one of PyTorch's kernels. RuntimeError where that kernel does not run."""
    with sdpa_kernel(kernel):
        return attend(q, k, v, **options)


def use_attention(net, name):
    """Lets the blocks of text encoder and DiT attend by one of PyTorch's kernels -> net.

    The VAE stays as it is: its one head, as wide as its channels, is too wide for most kernels.
    """
    for layer in net.modules():
        if isinstance(layer, Bfloat16Attention):       # which asks PyTorch for no kernel
            layer.__class__ = Attention
        if isinstance(layer, Attention):
            layer.attend = partial(attend_by, ATTENTION[name], layer.attend)
    return net


# --- Where the tensors lie ----------------------------------------------------------------------


def tensors_of(*modules):
    """Parameters and buffers of all the modules."""
    return [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]


class TakeTurns:
    """Of these networks only the one that computes is on the device; the others are on the host.

    Hooks of the networks do it, and keep this object alive.
    The host keeps its tensors, mapped or not: unloading a network only drops the copy.
    """

    def __init__(self, networks, device):
        self.device = device
        self.current = None                   # the network that is on the device
        self.host = {net: [(t, t.data) for t in tensors_of(net)] for net in networks}
        for net in networks:
            for part in net.children():       # `prepare` and `decode` call a part, not the network
                part.register_forward_pre_hook(partial(self.to_device, net))

    def to_device(self, net, *_):
        if self.current is not net:
            for tensor, host in self.host.get(self.current, ()):
                tensor.data = host
            for tensor, host in self.host[net]:
                tensor.data = host.to(self.device, copy=True)
            self.current = net


class BlockStream:
    """Of blocks that are called one after the other, at most two have their weights on the device.

        computing                 block 0     block 1     block 2   ...
        copying      block 0      block 1     block 2     block 3   ...

    On a GPU the copies run on a stream of their own. With `pin` the weights are first copied to
    page-locked host memory; only from there do copies and computation overlap.
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
            self.point_at(i, self.host[i])
            block.register_forward_pre_hook(partial(self.before, i))
            block.register_forward_hook(partial(self.after, i), always_call=True)

    def to_device(self, i):
        with torch.cuda.stream(self.stream):  # does nothing without a GPU
            self.loaded[i] = [host.to(self.device, non_blocking=True, copy=True)
                              for host in self.host[i]]

    def point_at(self, i, weights):
        for tensor, weight in zip(self.tensors[i], weights, strict=True):
            tensor.data = weight

    def before(self, i, *_):
        if i not in self.loaded:              # the first block
            if self.stream:                   # its memory may be the last block's, still computed
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
            self.to_device(i)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.point_at(i, self.loaded[i])

    def after(self, i, *_):
        """Called when block i is queued, not computed. Frees block i - 1, copies block i + 1."""
        self.point_at(i, self.host[i])
        if self.finished:
            self.finished.synchronize()
        self.loaded.pop(i - 1, None)
        if self.stream:
            self.finished = torch.cuda.current_stream(self.device).record_event()
        if i + 1 < len(self.host):
            self.to_device(i + 1)
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


# --- One image on several devices ---------------------------------------------------------------


def gather(x, dim):
    """The shares of all processes, one after the other along a dimension."""
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x.contiguous())
    return torch.cat(shares, dim)


class SplitTokens(nn.Module):
    """Blocks of a DiT of which each process computes an equal share of the tokens.

    All but attention treats every token alone. Attention takes the keys and values of all
    processes, so that each of its queries sees all tokens.
    """

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        for block in blocks:
            block.attention.attend = partial(self.attend, block.attention.attend)

    def own_part(self, x):
        """This process's part of x (B, S, ...), padded so that all parts have the same length."""
        length = -(-self.length // dist.get_world_size())
        first = dist.get_rank() * length
        padding = length * dist.get_world_size() - self.length
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))[:, first:first + length]

    def attend(self, attend, q, k, v, **options):
        k, v = gather(torch.stack((k, v)), 3)[..., :self.length, :]          # (B, H, S, d)
        return attend(q, k, v, **options)

    def forward(self, x, rope, mask, c):
        self.length = x.shape[1]
        cos, sin = rope
        x, rope = self.own_part(x), (self.own_part(cos), self.own_part(sin))
        for block in self.blocks:
            x = block(x, rope, mask, c)
        return gather(x, 1)[:, :self.length]                     # (B, S, dim)


def split_tokens(dit):
    """Lets all processes of the default group compute a DiT's every call together.

    The heads stay whole: 30 of them do not divide by 4. What does not see the image (the context
    refiner) is computed by every process.
    """
    dit.noise_refiner = nn.ModuleList([SplitTokens(dit.noise_refiner)])
    dit.layers = nn.ModuleList([SplitTokens(dit.layers)])


def place(pipeline, offload=None, in_parallel=False, compiles=False):
    """Moves the networks to where they compute.

    offload: None, "networks" or "blocks". in_parallel: all processes of torchrun compute each image
    together. compiles: torch.compile for the DiT.
    """
    networks, device = (pipeline.text_encoder, pipeline.dit, pipeline.vae), pipeline.device
    if offload == "blocks":
        stream_blocks(pipeline)
    elif offload:
        TakeTurns(networks, device)
    else:
        for net in networks:
            net.to(device)
    if in_parallel:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        split_tokens(pipeline.dit)
    if compiles:
        pipeline.dit.compile()


# --- The VAE in tiles ---------------------------------------------------------------------------

# Latent pixels around a tile. A pixel of the encoder depends on 4.5 of them beyond the tile, one of
# the decoder on 12.25; but what lies beyond 8 changes less than rounding does.
HALO = 8
PASSES = 2        # as many as there are norms would be exact; with two there is no seam


class TileNorm:
    """Stands in for a GroupNorm's forward while an image is computed tile by tile.

    Mean and variance belong to the whole image. Each pass collects them from all tiles; `end_pass`
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

    def end_pass(self):
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
                norm.end_pass()
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


# --- Devices and their errors -------------------------------------------------------------------


def find_device(name):
    """"auto", "cuda", "cuda:1", "mps", "cpu" -> torch.device. UserError if it is not there."""
    found, advice = name, "use --device cpu, or leave it out"
    if name == "auto":
        found = "mps" if torch.backends.mps.is_available() else "cpu"
        found = "cuda" if torch.cuda.is_available() else found
    if found == "cuda" and "LOCAL_RANK" in os.environ:           # torchrun: a GPU for each process
        found = f"cuda:{os.environ['LOCAL_RANK']}"
        advice = "start a process for each GPU" if torch.cuda.is_available() else advice
    try:
        device = torch.device(found)
        if name != "auto" or device.index:
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"there is no device {found!r} on this machine for this PyTorch; {advice}"
                        ) from None
    return device


def torchrun_rank():
    """(number of this process, number of processes) as torchrun says; (0, 1) without it."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {world} in the environment: torchrun "
                        "sets both; without it, unset them")
    if int(world) > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world} in the environment, and LOCAL_RANK is not there: "
                        "torchrun sets both; without it, unset WORLD_SIZE")
    return int(rank), int(world)


def keep_freed_memory():
    """Asks Linux's C library to keep large freed blocks.

    It would return them to the system, which fills them with zeros before the next step.
    """
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
        # PyTorch's messages on a CPU and on CUDA. First, because a compiler's error may quote them.
        if re.search("No viable backend for scaled_dot|No available kernel", str(error)):
            raise UserError("--attention: this kernel does not run here; leave it out") from None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError("torch.compile does not work here, leave out --compile: "
                            + str(error).splitlines()[0]) from None
        lack = "out of memory|allocate memory|not enough memory|Invalid buffer size|ALLOC_FAILED"
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(lack, str(error)):
            raise UserError(f"out of memory; try {advice}") from None
        raise


# --- Does it fit? -------------------------------------------------------------------------------


def free_memory(device):
    """Free bytes of a GPU, or of a Linux machine's main memory and swap; None if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text() if device.type == "cpu" else ""
        found = re.findall(r"^(?:MemAvailable|SwapFree): *(\d+) kB", text, re.M)
        return 1024 * sum(map(int, found)) or None
    return None


class Choice(NamedTuple):
    """What decides how much memory a run needs: the options, and what follows from them."""
    dtype: torch.dtype            # of text encoder and DiT; the VAE's is float32
    weights: str | None = None    # "int8" or "fp8": those of the blocks take one byte each
    offload: str | None = None
    keep: tuple = ("int8", "table")   # what stays as it is stored
    is_merged: bool = False       # adapters change the DiT
    tile: bool | None = None      # the VAE in tiles; None: where the picture is large
    is_mapped: bool = False       # on a CPU: what is neither cast nor changed stays in its file


def weight_bytes(network, choice):
    """Bytes of a network's weights in memory."""
    size, on_device = 0, not choice.is_mapped or (choice.is_merged and network.kind == "dit")
    dtype = torch.float32 if network.kind == "vae" else choice.dtype
    # A layer that an adapter changes is not kept. Here that may be any layer.
    keep = () if choice.is_merged and network.kind == "dit" else choice.keep
    for name, piece in network.pieces.items():
        is_block = QUANTIZED.search(name)
        is_kept = is_block and layer_format(piece.stored) in keep
        is_small = is_kept or (is_block and choice.weights)
        keeps_own = "table" in choice.keep and is_table(name, piece.stored)
        own = piece.stored.dtype if keeps_own else dtype
        is_same = not is_small and piece.stored.format == "plain" and piece.stored.dtype == own
        if piece.needed and (on_device or not (is_kept or is_same)):
            size += math.prod(piece.shape) * (1 if is_small else own.itemsize)
    return size


def memory_needed(networks, size, choice):
    """An estimate of the bytes that a run needs on its device, beside what is mapped.

    networks: of a StoredModel. size: (pixels of an image, images of a batch). The activations of
    the release take about 0.6 GB for each megapixel in the DiT, 5 GB in the VAE, which decodes
    one image at a time, and at most 2 GB there in tiles.
    """
    pixels, batch = size
    encoder, dit, vae = (weight_bytes(networks[kind], choice)
                         for kind in ("text_encoder", "dit", "vae"))
    dit_work = 600 * pixels * batch * networks["dit"].config.dim / 3840
    vae_work = 5000 * pixels * networks["vae"].config.block_out_channels[0] / 128
    in_tiles = choice.tile
    if in_tiles is None:
        in_tiles = choice.offload == "blocks" or pixels > 2e6
    if in_tiles:
        vae_work = min(vae_work, 2e9)
    if choice.offload == "blocks":            # about two blocks of 34, and what is in no block
        encoder, dit = encoder / 10, dit / 10
    if choice.offload:
        return max(encoder, dit + dit_work, vae + vae_work)
    return encoder + dit + vae + max(dit_work, vae_work)


def check_memory(checkpoint, device, size, choice):
    """Compares what a run needs with what is free, before anything is loaded.

    UserError if it needs more than is free, with the options that make it fit. On a CPU, weights
    that are used as they are stored are mapped: the system reads them again when memory is short.
    """
    free, networks = free_memory(device), checkpoint.networks
    choice = choice._replace(is_mapped=device.type == "cpu")
    needed = memory_needed(networks, size, choice)
    if free is None or needed <= free:
        return
    tile, int8, bfloat16 = {"tile": True}, {"weights": "int8"}, {"dtype": torch.bfloat16}
    networks_in_turn, blocks_in_turn = {"offload": "networks"}, {"offload": "blocks"}
    options = {"--tile": tile, "--offload": networks_in_turn, "--weights int8": int8,
               "--weights int8 --offload": int8 | networks_in_turn,
               "--offload blocks": blocks_in_turn,
               "--weights int8 --offload blocks": int8 | blocks_in_turn}
    if choice.is_mapped:
        options = {"--tile": tile, "--dtype bfloat16": bfloat16, "--weights int8": int8,
                   "--dtype bfloat16 --weights int8": bfloat16 | int8}
    fitting = []
    for words, option in options.items():
        need = memory_needed(networks, size, choice._replace(**option))
        if need <= free:
            fitting.append(f"{words} needs {need / 1e9:.1f}")
    raise UserError(f"this needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free: "
                    + (", ".join(fitting) or "no option makes it fit; use a smaller --size"))
