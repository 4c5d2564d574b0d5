"""Prompt -> image: load, encode, time schedule, Euler loop, decode; and the command line.

    python sampler.py "a small red circle on a blue background"          the small model of this repository
    python sampler.py "a cat" --model DIR                                Z-Image-Turbo, downloaded to DIR

The functions in the order they are used; `generate` calls them all. Time, velocity and the Euler step: the box at the
top of model.py. `guidance` is the official pipeline's g: v + g (v - v_negative), the paper's alpha - 1; 0 is off.
"""

import argparse
import ctypes
import itertools
import math
import os
import re
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from convert_weights import UserError, load_dit, load_text_encoder, load_tokenizer, load_vae, open_checkpoint, open_network, run_command
from model import PATCH, VAE, DiT, TextEncoder

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"   # Qwen3's chat template, one user message
MAX_TOKENS = 512                                                       # with the template; the rest is cut
TILE = 64                                                              # side of the VAE's tiles in latent pixels: 512 pixels
ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
             "math": SDPBackend.MATH}
BUNDLED = [Path(__file__).parent / "tutorials" / "shapes" / name for name in ("student", "teacher")]


@dataclass
class Pipeline:
    """A loaded checkpoint: all `generate` needs."""
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    dit: DiT
    vae: VAE
    shift: float            # of the time schedule, from the checkpoint
    steps: int = 8          # what the model is meant to be sampled with
    guidance: float = 0.0
    size: int = 1024        # pixels
    trained_steps: int | None = None   # of a distilled student: the only number of steps it knows
    name: str = ""
    device: torch.device = torch.device("cpu")
    offload: str | None = None         # "networks" stay on the CPU and visit the device to work; or their "blocks" do, one by one
    tile: bool | None = None           # whether the VAE works in tiles; None: for images above 2 megapixels
    attention: str | None = None       # the DiT's attention kernel, of ATTENTION; None: what PyTorch picks

    @property
    def pixel_multiple(self):
        """Height and width must be multiples of this: the VAE's downsampling times the patch side; 16 for the release."""
        return PATCH * self.vae.config.downsampling


def load_pipeline(path, device="cpu", dtype=torch.float32, offload=None, weights=None):
    """Loads a checkpoint directory, official layout or ours. `dtype` is that of text encoder and DiT; the VAE runs in float32.

    weights "fp8": those of the DiT's blocks in float8. offload: None, "networks" or "blocks", as in Pipeline.
    """
    if offload not in (None, "networks", "blocks") or weights not in (None, "fp8"):
        raise UserError(f'offload should be None, "networks" or "blocks", not {offload!r}; weights None or "fp8", not {weights!r}')
    checkpoint, device = open_checkpoint(path), torch.device(device)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    text_encoder, dit, vae = (open_network(name, checkpoint.folders[name]).config for name in ("text_encoder", "dit", "vae"))
    for what, fits in {                       # all from the configs, before any weight is read
            "the tokenizer has more tokens than the text encoder": tokenizer.get_vocab_size() <= text_encoder.vocab_size,
            "the DiT wants text features of another width": dit.cap_feat_dim == text_encoder.hidden_size,
            "DiT and VAE have different latent channels": dit.in_channels == vae.latent_channels,
            f"the DiT has no room for {MAX_TOKENS} text tokens": dit.axes_lens[0] >= MAX_TOKENS + 2}.items():
        if not fits:
            raise UserError(f"the parts of {path} do not belong together: {what}")
    home = torch.device("cpu") if offload else device
    pipeline = Pipeline(
        tokenizer=tokenizer,
        text_encoder=load_text_encoder(checkpoint.folders["text_encoder"], home, dtype),
        dit=load_dit(checkpoint.folders["dit"], home, dtype, weights == "fp8"),
        vae=load_vae(checkpoint.folders["vae"], home, torch.float32),
        name=Path(path).resolve().name, device=device, offload=offload, **checkpoint.settings)
    if offload == "blocks":
        stream_blocks(pipeline)
    return pipeline


class BlockStream:
    """Keeps the weights of `blocks`, modules called one after the other, in host memory, and at most two blocks' on the device.

    While one block computes, the next one's weights are copied; on a GPU on a stream of its own, which `pin` (page-locked
    host memory) lets run beside the computation.
    """

    def __init__(self, blocks, device, pin=False):
        self.device, self.copying = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self.tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
        for tensor in itertools.chain(*self.tensors):
            tensor.data = tensor.data.pin_memory() if pin and self.copying else tensor.data
        self.host = [[tensor.data for tensor in tensors] for tensors in self.tensors]
        self.here = {}        # block -> its weights on the device
        self.done = None      # event: the last block lent has been computed
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self.lend(i))
            block.register_forward_hook(lambda *_, i=i: self.take_back(i), always_call=True)

    def copy(self, i):
        with torch.cuda.stream(self.copying):                                   # on a CPU: does nothing
            self.here[i] = [tensor.to(self.device, non_blocking=True, copy=True) for tensor in self.host[i]]

    def lend(self, i):
        if i not in self.here:
            self.copy(i)
        if self.copying:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        for tensor, weights in zip(self.tensors[i], self.here[i]):
            tensor.data = weights

    def take_back(self, i):
        """Block i is on its way: wait for the one before it, so that its memory can go to the one after."""
        for tensor, weights in zip(self.tensors[i], self.host[i]):
            tensor.data = weights
        if self.done:
            self.done.synchronize()
        self.here.pop(i - 1, None)
        self.done = torch.cuda.current_stream(self.device).record_event() if self.copying else None
        if i + 1 < len(self.host):
            self.copy(i + 1)
        else:
            if self.done:
                self.done.synchronize()
            self.here.clear()


def stream_blocks(pipeline):
    """Streams encoder layers and DiT blocks. The rest goes to the device, but for the word embeddings: few of their rows are ever needed."""
    encoder, dit, device = pipeline.text_encoder, pipeline.dit, pipeline.device
    once, often = [[*encoder.layers], [*dit.context_refiner]], [*dit.noise_refiner, *dit.layers]
    away = {id(tensor) for part in (*itertools.chain(*once), *often, encoder.embed_tokens) for tensor in (*part.parameters(), *part.buffers())}
    for tensor in itertools.chain(encoder.parameters(), dit.parameters()):
        if id(tensor) not in away:
            tensor.data = tensor.data.to(device)
    encoder.embed_tokens.register_forward_pre_hook(lambda _, ids: ids[0].cpu())
    encoder.embed_tokens.register_forward_hook(lambda _, ids, features: features.to(device))
    for blocks in once:
        BlockStream(blocks, device)
    BlockStream(often, device, pin=True)


@contextmanager
def at_work(pipeline, network):
    """Where networks are offloaded, `network` is on the device inside the block, and back on the CPU after it."""
    visits = pipeline.offload == "networks" or pipeline.offload == "blocks" and network is pipeline.vae
    try:
        if visits:
            network.to(pipeline.device)
        yield network
    finally:
        if visits:
            network.to("cpu")


def token_ids(tokenizer, prompt):
    """The prompt in its chat template -> token ids, not cut."""
    try:
        return tokenizer.encode(TEMPLATE.format(prompt), add_special_tokens=False).ids
    except (TypeError, UnicodeError):
        raise UserError(f"the prompt {prompt!r} is not valid Unicode text") from None


@torch.no_grad()
def encode_prompts(pipeline, prompts):
    """Prompts (list of B strings) -> Text, features (B, L, D), L the longest. Prompts over 512 tokens are cut, with a warning."""
    ids = []
    for prompt in prompts:
        tokens = token_ids(pipeline.tokenizer, prompt)
        if len(tokens) > MAX_TOKENS:
            warnings.warn(f"a prompt of {len(tokens)} tokens is cut to {MAX_TOKENS}: {prompt[:40]!r}...")
        ids.append(torch.tensor(tokens[:MAX_TOKENS]))
    lengths = torch.tensor([len(i) for i in ids])
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)                # (B, L)
    with at_work(pipeline, pipeline.text_encoder) as encoder:
        return encoder(ids.to(pipeline.device), lengths.to(pipeline.device))


def time_schedule(steps, shift):
    """Times of an N-step run, (N + 1,) float32, rising from 0 (noise) to 1 (data).

    The uniform grid t = i/N, with noise levels sigma = 1 - t shifted towards noise:
    sigma -> s sigma / (1 + (s - 1) sigma), which keeps 0 and 1 (FlowMatchEulerDiscreteScheduler, static shift s).
    """
    if steps < 1:
        raise UserError(f"steps should be at least 1, not {steps}")
    if not 0 < shift < math.inf:
        raise UserError(f"shift should be above 0, not {shift}")
    sigma = torch.cat((torch.linspace(1, 1 / steps, steps), torch.zeros(1)))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    # Rounded as diffusers rounds, in float32 by way of "timesteps" 1000 sigma: the network multiplies t by 1000 before
    # taking sines of it, so that one last bit here is a thousand there.
    times = (1000 - 1000 * sigma) / 1000
    if not (times.diff() > 0).all():
        raise UserError(f"a shift of {shift} is too extreme for {steps} steps")
    return times


def guided_velocity(net, x, t, text, negative, guidance, cfg_normalization=False):
    """Classifier-free guidance, v + g (v - v_negative), (B, C, h, w) float32.

    cfg_normalization c (True is 1) limits each image's L2 norm to c times that of v, as the official pipeline does.
    """
    v = net(x, t, text).float()
    guided = v + guidance * (v - net(x, t, negative).float())
    if cfg_normalization:
        norm, limit = guided.flatten(1).norm(dim=1), v.flatten(1).norm(dim=1) * float(cfg_normalization)
        guided = guided * (limit / norm.clamp(min=1e-12)).clamp(max=1).view(-1, *[1] * (x.ndim - 1))
    return guided


@torch.no_grad()
def sample(net, noise, text, times, guidance=0.0, negative=None, cfg_normalization=False, cfg_truncation=1.0, progress=False):
    """The Euler loop: noise at times[0] -> data at times[-1], float32, shaped like `noise` (B, ...).

    `net` is any (x, t, text) -> v. What a DiT computes from the text alone is computed once. Guidance 0 neither
    needs nor runs `negative`; above it is on while t <= cfg_truncation.
    """
    if guidance > 0 and negative is None:
        raise ValueError("guidance needs `negative`, the encoded negative prompt")
    if hasattr(net, "prepare"):
        text = net.prepare(text, *noise.shape[-2:])
        negative = net.prepare(negative, *noise.shape[-2:]) if guidance > 0 else None
    x, times = noise.float(), times.tolist()
    for t, t_next in zip(tqdm(times[:-1], desc="sampling", unit="step", disable=not progress), times[1:]):
        at = torch.full((len(x),), t, device=x.device)
        if guidance > 0 and t <= cfg_truncation:
            v = guided_velocity(net, x, at, text, negative, guidance, cfg_normalization)
        else:
            v = net(x, at, text).float()
        x = x + (t_next - t) * v
    return x


def image_noise(shape, seeds):
    """One draw of Gaussian noise (B, C, h, w) per seed, on the CPU, so that a seed means the same picture on every device.

    -> (first, second): text to image uses the first; image to image samples the VAE with the first, then starts from
    the second, as the official pipelines do with one generator an image.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return tuple(torch.cat([torch.randn(1, *shape, generator=g) for g in generators]) for _ in range(2))


def prepare_image(image, height, width):
    """A PIL image -> (1, 3, height, width) in [-1, 1], cropped to the shape's proportions and resized."""
    image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def check_size(pipeline, height, width):
    multiple = pipeline.pixel_multiple
    limit = min(pipeline.dit.config.axes_lens[1:]) * multiple
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple or value > limit:
            near = min(max(round(value / multiple), 1) * multiple, limit)
            raise UserError(f"{name} should be a multiple of {multiple} up to {limit}, not {value}; the nearest is {near}")


@torch.no_grad()
def generate(pipeline, prompts, height=None, width=None, steps=None, guidance=None, negative_prompt="", seed=0, noise=None,
             output="pil", shift=None, cfg_normalization=False, cfg_truncation=1.0, init_image=None, strength=0.6, progress=False):
    """Prompts (a string or a list of B) -> B images, all in one batch; image i depends on prompt i and seed + i only.

    None: what the checkpoint recommends. noise (B, C, h, w) replaces the seeds' draw. output: "pil", a list;
    "tensor", (B, 3, height, width) in [0, 1]; "latent", (B, C, h, w). init_image (PIL, or (1 or B, 3, height, width)
    in [-1, 1]): start from it, after the first (1 - strength) of the steps (official: ZImageImg2ImgPipeline).
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    steps, shift = (pipeline.steps if steps is None else steps), (pipeline.shift if shift is None else shift)
    guidance = pipeline.guidance if guidance is None else guidance
    height, width = height or pipeline.size, width or pipeline.size
    check_size(pipeline, height, width)
    if steps != (pipeline.trained_steps or steps):
        warnings.warn(f"this model was distilled to {pipeline.trained_steps} steps and knows the times of those alone; {steps} steps give worse pictures")
    if not prompts:
        raise UserError("there is no prompt")
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance should be 0 or above, not {guidance}")
    times = time_schedule(steps, shift)
    in_tiles = pipeline.offload == "blocks" or height * width > 2e6 if pipeline.tile is None else pipeline.tile
    tile = TILE if in_tiles else None

    shape = pipeline.dit.config.in_channels, *(side // pipeline.vae.config.downsampling for side in (height, width))
    first, second = image_noise(shape, range(seed, seed + len(prompts)))
    if init_image is None:
        x = first if noise is None else noise
    else:
        if not 0 < strength <= 1:
            raise UserError(f"strength should be above 0 and at most 1, not {strength}")
        times = times[int(max(steps - min(steps * strength, steps), 0)):]       # the official pipeline's cut
        if len(times) < 2:
            raise UserError(f"strength {strength} leaves none of {steps} steps; raise one of them")
        image = prepare_image(init_image, height, width) if isinstance(init_image, Image.Image) else init_image
        with at_work(pipeline, pipeline.vae) as vae:                            # one at a time: activations are large
            latents = torch.cat([vae.encode(image[i % len(image)][None].to(pipeline.device), first[i:i + 1].to(pipeline.device), tile).cpu()
                                 for i in range(len(prompts))])
        x = times[0] * latents + (1 - times[0]) * (second if noise is None else noise.cpu())

    text = encode_prompts(pipeline, prompts if len(set(prompts)) > 1 else prompts[:1])
    negative = encode_prompts(pipeline, [negative_prompt]) if guidance > 0 else None
    with at_work(pipeline, pipeline.dit) as dit, sdpa_kernel(ATTENTION[pipeline.attention]) if pipeline.attention else nullcontext():
        latents = sample(dit, x.to(pipeline.device), text, times, guidance, negative, cfg_normalization, cfg_truncation, progress)
    if not latents.isfinite().all():
        dtype = str(dit.x_embedder.weight.dtype).removeprefix("torch.")
        raise UserError(f"the latents are not finite, so there is no image: this network overflows in {dtype}"
                        + ("; use --dtype bfloat16 or float32" if dtype == "float16" else " or its weights are damaged"))
    if output == "latent":
        return latents
    with at_work(pipeline, pipeline.vae) as vae:                                # one at a time: full-size pictures are large
        images = torch.cat([vae.decode(x[None], tile) for x in latents])
    if not images.isfinite().all():
        raise UserError("the decoded image is not finite, so there is no image: the weights of the VAE are damaged")
    images = images.div(2).add(0.5).clamp(0, 1)
    if output == "tensor":
        return images
    return [Image.fromarray(i) for i in images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


# --- Command line -------------------------------------------------------------------------------------------


def save_png(image, path, info):
    """Writes a PNG with text chunks under `path`, or path-1, path-2, ... if that is taken. Whole or not at all. -> path used."""
    text = PngInfo()
    for key, value in info.items():
        text.add_text(key, str(value).encode("utf-8", "replace").decode())       # file names need not be Unicode
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        image.save(part, format="PNG", pnginfo=text)
        for name in itertools.chain([path], (path.with_name(f"{path.stem}-{i}.png") for i in itertools.count(1))):
            try:
                open(name, "x").close()                                         # fails where the name is taken
            except FileExistsError:
                continue
            os.replace(part, name)
            return name
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def enlarge(image, how):
    """Shows small pictures at a whole multiple of their size, at least 256 pixels on the shorter side."""
    factor = 1 if how == "none" else -(-256 // min(image.size))
    if factor == 1:
        return image
    return image.resize([side * factor for side in image.size], Image.Resampling[how.upper()])


def read_prompts(path):
    """The lines of a UTF-8 text file, without empty ones."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None


def read_image(path):
    """A picture file, upright."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I;16"):     # 16-bit grey, which Pillow would clip
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:                # what the many decoders raise
        raise UserError(f"cannot read the image {path}: {getattr(error, 'strerror', None) or 'it is not a picture, or damaged'}") from None


def pick_device(name):
    """"auto", "cuda", "cuda:1", "mps", "cpu" -> torch.device; UserError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"there is no device {name!r} on this machine for this PyTorch; use --device cpu, or leave it out") from None
    return device


def keep_freed_memory():
    """Tell glibc, Linux's usual C library, to keep the large blocks a network frees for its next step: the system would fill them with zeros again."""
    with suppress(AttributeError, OSError, TypeError):        # another C library
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 2**30), mallopt(trim_threshold, 2**30)


def pick_model(path):
    if path is not None:
        return Path(path)
    for folder in BUNDLED:
        if (folder / "config.json").exists():
            return folder
    raise UserError("no bundled model is here; name a checkpoint directory with --model DIR")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description="Prompt to image with Z-Image-Turbo, or with the small bundled model.", allow_abbrev=False)
    add = parser.add_argument
    add("prompt", nargs="*", help="one or several prompts, each in quotes")
    add("--prompts", metavar="FILE", help="more prompts, one a line, UTF-8")
    add("--model", metavar="DIR", help="a checkpoint directory, official layout or ours (default: the bundled model)")
    add("--out", metavar="FILE.png", default="image.png", help="default image.png; image-1.png and so on where that is taken")
    add("--num-images", type=int, default=1, help="images of each prompt (default 1)")
    add("--batch-size", type=int, default=1, help="images computed at once (default 1)")
    add("--height", type=int, help="pixels (default: the model's own size)")
    add("--width", type=int)
    add("--size", metavar="WxH", help="both at once, such as 1280x720")
    add("--steps", type=int, help="network evaluations (default: the model's own, 8 for Turbo)")
    add("--seed", type=int, default=0, help="image i of a run uses seed + i (default 0)")
    add("--guidance", type=float, help="0 is off; the official pipeline's guidance_scale, alpha - 1 in the paper (default: the model's own)")
    add("--negative-prompt", default="", help="what guidance leads away from (default: the empty prompt)")
    add("--cfg-normalization", type=float, default=0.0, metavar="C", help="limit the guided velocity's norm to C times the plain one's")
    add("--cfg-truncation", type=float, default=1.0, metavar="T", help="no guidance once t is above T")
    add("--shift", type=float, help="of the time schedule (default: the checkpoint's)")
    add("--init-image", metavar="FILE", help="image to image: start from this picture")
    add("--strength", type=float, default=0.6, help="how far to go from it, above 0 to 1 (default 0.6)")
    add("--dtype", choices=["bfloat16", "float32", "float16"], help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--compile", action="store_true", help="torch.compile the DiT: slower start, faster steps")
    add("--offload", nargs="?", const="networks", choices=["networks", "blocks"],
        help="keep each network on the device only while it works; blocks: each block of one, which needs least memory")
    add("--weights", choices=["fp8"], help="hold the weights of the DiT's blocks in float8, half of bfloat16's memory")
    add("--tile", action=argparse.BooleanOptionalAction, help="decode in tiles (default: above 2 megapixels, and with --offload blocks)")
    add("--attention", choices=[*ATTENTION], help="the DiT's attention kernel (default: what PyTorch picks)")
    add("--upscale", choices=["none", "nearest", "lanczos"], default="lanczos", help="how to enlarge pictures under 256 pixels (default lanczos)")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for i, argument in enumerate(arguments):  # "--offload" may stand before a prompt
        if argument == "--offload" and arguments[i + 1:i + 2] not in (["networks"], ["blocks"]):
            arguments[i] = "--offload=networks"
    args = parser.parse_intermixed_args(arguments)
    if args.offload == "blocks" and args.compile:
        raise UserError("--compile does not go with --offload blocks, which moves weights at every block")
    if args.size:
        try:
            args.width, args.height = map(int, args.size.lower().split("x"))
        except ValueError:
            raise UserError(f"--size should look like 1024x768, not {args.size!r}") from None
    for name in ("num_images", "batch_size", "steps", "height", "width"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} should be at least 1, not {getattr(args, name)}")
    for name, low, high in (("guidance", 0, math.inf), ("cfg_normalization", 0, math.inf), ("cfg_truncation", -math.inf, math.inf),
                            ("shift", 0, math.inf), ("strength", 0, 1)):
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} should be a number from {low} to {high}, not {value}")
    if not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed should be between 0 and 2^63 - 1, not {args.seed}")
    args.prompt += read_prompts(args.prompts) if args.prompts else []
    if len(args.prompt) * args.num_images > 10 ** 6:
        raise UserError("more than a million images are asked for")
    if not args.prompt:
        raise UserError("there is no prompt; give one in quotes, or --prompts FILE with one a line")
    args.out = Path(args.out)
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        raise UserError(f"--out should be the name of a .png file, not {args.out}")
    if not args.out.parent.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise UserError(f"--out: {args.out.parent} is not a directory that can be written to")
    return args


@contextmanager
def explained(advice):
    """Turns what PyTorch raises for lack of memory, of a compiler or of a kernel into advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"torch.compile does not work here, leave out --compile: {str(error).splitlines()[0]}") from None
        if "No viable backend for scaled_dot_product_attention" in str(error):
            raise UserError("the chosen attention kernel cannot run here; leave out --attention") from None
        lack = "out of memory|allocate memory|not enough memory|Invalid buffer size|ALLOC_FAILED"
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not re.search(lack, str(error)):
            raise
        raise UserError(f"out of memory; try {advice}") from None


@explained("--offload or --offload blocks (on a GPU), --weights fp8, a smaller --size, --batch-size 1 or --dtype bfloat16")
def main():
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    args = parse_arguments()
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    init_image = read_image(args.init_image) if args.init_image is not None else None
    pipeline = load_pipeline(pick_model(args.model), device, dtype, args.offload, args.weights)
    pipeline.tile, pipeline.attention = args.tile, args.attention
    keep_freed_memory()
    if init_image and not (args.height or args.width):
        args.width, args.height = (max(side // pipeline.pixel_multiple, 1) * pipeline.pixel_multiple for side in init_image.size)
    if device.type == "cpu" and sum(p.numel() for p in pipeline.dit.parameters()) < 50e6:
        torch.set_num_threads(1)              # threads gain a small network nothing and, on a busy machine, cost it much
    if args.compile:
        pipeline.dit.compile()
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    chosen = lambda name: getattr(pipeline, name) if getattr(args, name) is None else getattr(args, name)
    settings = {"steps": chosen("steps"), "guidance": chosen("guidance"), "shift": chosen("shift"), "negative_prompt": args.negative_prompt,
                "cfg_normalization": args.cfg_normalization, "cfg_truncation": args.cfg_truncation}
    height, width = args.height or pipeline.size, args.width or pipeline.size
    start = time.perf_counter()
    for first in range(0, len(prompts), args.batch_size):
        batch, seed = prompts[first:first + args.batch_size], args.seed + first
        images = generate(pipeline, batch, height, width, seed=seed, init_image=init_image, strength=args.strength, progress=True, **settings)
        for i, (prompt, image) in enumerate(zip(batch, images)):
            info = {"prompt": prompt, "seed": seed + i, "size": f"{width}x{height}", "model": pipeline.name,
                    "dtype": str(dtype).removeprefix("torch."), **settings}
            if init_image:
                info.update(init_image=Path(args.init_image).name, strength=args.strength)
            path = save_png(enlarge(image, args.upscale), args.out, info)
            print(f"{path}  ({time.perf_counter() - start:.1f} s)")
            start = time.perf_counter()


if __name__ == "__main__":
    run_command(main)
