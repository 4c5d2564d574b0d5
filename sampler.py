"""Prompt -> image: encode, time schedule, Euler steps, decode. This is all of the method.

    python sampler.py "a panda on a red card with the word LOVE"      the small bundled model
    python sampler.py "a cat" --model Tongyi-MAI/Z-Image-Turbo        the released weights

The functions stand in the order of their use; `generate` calls them. The box at the top of model.py
defines time, velocity and Euler step. Less memory and more speed: hardware.py.
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# OpenMP's threads spin while they wait, which on a busy machine costs several times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))       # until run_command
    if sys.stderr:
        print("loading ...", file=sys.stderr, flush=True)        # PyTorch alone takes seconds
import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps, PngImagePlugin
from tokenizers import Tokenizer
from tqdm import tqdm

import convert_weights
import formats
import hardware
from convert_weights import UserError, load_dit, load_text_encoder, load_vae, open_model
from files import new_file, rename_new
from hardware import find_device, keep_freed_memory, quantize  # noqa: F401  (our interface)
from model import PATCH, VAE, DiT, TextEncoder

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"   # Qwen3's, for one message
MAX_TOKENS = 512                                # of the templated prompt; the rest is cut off
MAX_CHARACTERS = 20_000                         # of a prompt; tokenizers can take minutes for more


@dataclass
class Pipeline:
    """All that `generate` needs: the networks, and the settings that the checkpoint recommends."""
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    dit: DiT
    vae: VAE
    shift: float                        # of the time schedule
    steps: int = 8                      # Euler steps; each is two evaluations with guidance
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
    FlowMatchEulerDiscreteScheduler: sigma -> s sigma / (1 + (s - 1) sigma). See tutorials/01.
    """
    sigma = torch.cat((torch.linspace(1, 1 / max(steps, 1), max(steps, 1)), torch.zeros(1)))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    # Rounded as in diffusers, by way of 1000 sigma: the network takes sines of 1000 t.
    times = (1000 - 1000 * sigma) / 1000
    if steps < 1 or not shift > 0 or not (times.diff() > 0).all() or times[0].abs() > 1e-3:
        raise UserError(f"there is no schedule of {steps} steps with a shift of {shift}")
    return times


@torch.no_grad()
def sample(net, noise, text, times, guidance=0.0, negative=None, cfg_normalization=False,
           cfg_truncation=1.0, guidance_every=1, callback=None):
    """Euler steps from `noise` (B, ...) at times[0] to data at times[-1], in float32.

    net: any (x, t, text) -> v. What a DiT computes from the text alone is computed once.
    guidance: the official pipeline's g, the paper's alpha - 1. At 0 or below there is none.
    cfg_normalization: see limit_norm. cfg_truncation: no guidance at times above it.
    guidance_every k: v - v_negative changes slowly, so compute it in every k-th step only.
    callback(i, x): called after step i. Explained in tutorials/01_flow_matching.ipynb.
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
        raise UserError(f"sampling in {dtype} gave numbers that are not finite: "
                        + formats.find_cause(pipeline, formats.advice_for(dtype)))
    images = torch.cat([pipeline.vae.decode(item[None]) for item in latents])
    if not images.isfinite().all():
        raise UserError("the decoded image is not finite: "
                        + formats.find_cause(pipeline, "the VAE's weights are too large"))
    return images.div(2).add(0.5).clamp(0, 1)


def generate(pipeline, prompts, height=None, width=None, steps=None, guidance=None,
             negative_prompt="", seed=0, noise=None, output="pil", shift=None, times=None,
             **sample_options):
    """Prompts (a string or a list of B) -> B images in one batch. None: as the model recommends.

    Image i depends on prompt i and on seed + i only, up to rounding.
    noise (B, C, h, w) takes the place of what the seeds draw, `times` that of steps and shift.
    output: "pil", a list; "tensor", (B, 3, H, W) in [0, 1]; "latent", (B, C, h, w).
    sample_options: the arguments of `sample` from cfg_normalization on.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    height, width = check_size(pipeline, height, width)
    check_request(pipeline, prompts, noise, (height, width), output, **sample_options)
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

    image: PIL, or (1 or B, 3, height, width) in [-1, 1]. As in the official
    ZImageImg2ImgPipeline, a seed draws the noise that samples the VAE's posterior, then the noise
    that is added. options: the other arguments of `generate`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    height, width = check_size(pipeline, height, width)
    check_request(pipeline, prompts, noise, (height, width), **options)
    times = recommended_times(pipeline, steps, shift)
    times = times[-1 - steps_left(len(times) - 1, strength):]
    vae_noise, drawn = latent_noise(pipeline, height, width, seed, len(prompts))
    latents = encode_image(pipeline, image, vae_noise)           # (B, C, h, w)
    noised = times[0] * latents + (1 - times[0]) * setting(noise, drawn).cpu()
    return generate(pipeline, prompts, height, width, noise=noised, times=times, **options)


# --- Called by the functions above --------------------------------------------------------------


def token_ids(tokenizer, prompt):
    """The prompt in its chat template -> a list of token ids. A longer prompt is cut to 512."""
    if not isinstance(prompt, str):
        raise UserError(f"a prompt should be a string, not {prompt!r}")
    beginning = prompt[:MAX_CHARACTERS]
    templated = TEMPLATE.format(beginning)
    try:
        encoded = formats.encode(tokenizer, templated)
    except (TypeError, UnicodeError):
        raise UserError(f"the prompt {beginning!r} is not valid Unicode text") from None
    except Exception as error:                # the library raises bare Exception
        raise UserError(f"the tokenizer cannot read {beginning[:80]!r}: {error}") from None
    ids = encoded.ids[:MAX_TOKENS]
    if len(encoded.ids) > MAX_TOKENS or beginning != prompt:
        end = encoded.offsets[len(ids) - 1][1]
        warnings.warn(f"a prompt of {len(prompt)} characters is cut to its first {len(ids)} "
                      f"tokens, after the words {templated[max(end - 40, 0):end]!r}", stacklevel=2)
    return ids


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


def check_request(pipeline, prompts, noise, size, output="pil", guidance_every=1, **_):
    """UserError for no prompt, an unknown output, guidance_every below 1, noise of a wrong shape.

    size: (height, width) of the picture. noise: (B, C, h, w), or None.
    """
    latent_size = [side // pipeline.vae.config.downsampling for side in size]
    shape = len(prompts), pipeline.dit.config.in_channels, *latent_size
    given = shape if noise is None else tuple(noise.shape)
    for is_wrong, problem in (
            (not prompts, "there is no prompt"),
            (output not in ("pil", "tensor", "latent"),
             f"output should be pil, tensor or latent, not {output!r}"),
            (guidance_every < 1, f"guidance_every should be 1 or more, not {guidance_every}"),
            (given[1:] != shape[1:] or len(prompts) not in (1, given[0]),
             f"the noise should have the shape {shape}, not {given}")):
        if is_wrong:
            raise UserError(problem)


def recommended_times(pipeline, steps=None, shift=None):
    """time_schedule with what the checkpoint recommends, and a warning for a distilled student."""
    steps = setting(steps, pipeline.steps)
    trained = pipeline.trained_steps or steps
    numbers = trained if isinstance(trained, (list, tuple)) else [trained]
    if not min(numbers) <= steps <= max(numbers):
        known = ", ".join(map(str, sorted(numbers)))
        warnings.warn(f"this model was distilled for {known} steps, not for {steps}", stacklevel=2)
    return time_schedule(steps, setting(shift, pipeline.shift))


def steps_left(steps, strength):
    """How many of the steps image to image takes: the last ones, as in the official pipeline."""
    left = steps - int(max(steps - min(steps * strength, steps), 0))
    if left < 1:
        raise UserError(f"strength {strength} leaves none of {steps} steps: raise one of them")
    return left


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
    height, width = [side * pipeline.vae.config.downsampling for side in noise.shape[-2:]]
    if isinstance(image, Image.Image):
        image = prepare_image(image, height, width)
    if image.shape[1:] != (3, height, width) or len(image) not in (1, len(noise)):
        raise UserError(f"the image should have the shape (1 or {len(noise)}, 3, {height}, "
                        f"{width}), not {tuple(image.shape)}")
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


# --- Loading ------------------------------------------------------------------------------------
#
# What is optional, to need less memory or time, is applied to the loaded networks: hardware.py.


def load_pipeline(path, device="cpu", dtype=torch.float32, adapters=(), keep=None,
                  quantize_layer=None, **parts):
    """Loads a checkpoint -> Pipeline. dtype: of text encoder and DiT; the VAE runs in float32.

    path: a directory of the official layout or ours, one file, a name on the hub, a StoredModel.
    parts: files that take the place of its "dit", "text_encoder", "vae", "tokenizer". adapters:
    (file, strength) pairs of LoRAs. keep, quantize_layer: see convert_weights.load.
    """
    is_open = isinstance(path, convert_weights.StoredModel)
    model = path if is_open else open_model(path, **parts)
    if model.shift_assumed:
        warnings.warn(f"no file says the shift of the schedule; {model.settings['shift']} is "
                      "assumed (--shift)", stacklevel=2)
    networks, how = model.networks, {"keep": keep, "quantize_layer": quantize_layer}
    return Pipeline(
        tokenizer=model.tokenizer,
        text_encoder=load_text_encoder(networks["text_encoder"], device, dtype, **how),
        dit=load_dit(networks["dit"], device, dtype, adapters=adapters, **how),
        vae=load_vae(networks["vae"], device, torch.float32),
        name=model.name, device=torch.device(device), **model.settings)


# --- Command line -------------------------------------------------------------------------------

BUNDLED = [Path(__file__).resolve().parent / "tutorials" / name
           for name in ("cards/student", "cards/teacher")]
DEFAULTS = {"seed": 0, "num_images": 1, "batch_size": 1, "negative_prompt": "", "strength": 0.6,
            "cfg_normalization": 0.0, "cfg_truncation": 1.0, "guidance_every": 1, "device": "auto",
            "upscale": "lanczos", "lora": []}
OF_GUIDANCE = "negative_prompt", "cfg_normalization", "cfg_truncation", "guidance_every"
# The options that a picture may name, for --like; make_record writes them.
RECORDED = {"seed", "size", "batch_size", "dtype", "upscale", "weights", "attention", "compile",
            "tile", "strength", "steps", "guidance", "shift", *OF_GUIDANCE}
# Options that name files. A picture records their names and fingerprints, for --like.
PARTS = "dit", "text_encoder", "vae", "tokenizer"
FILES = "model", *PARTS, "lora", "init_image"


def width_and_height(text):
    """An argparse type: "1280x720" -> (1280, 720)."""
    if not re.fullmatch(r"[0-9]{1,5}[xX][0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"should look like 1024x768, not {text!r}")
    return tuple(int(side) for side in text.lower().split("x"))


def png_name(text):
    """An argparse type: the name of a PNG file in a directory that can be written to."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"should be the name of a .png file, not {text!r}")
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
    add("--prompts", type=formats.path_name, metavar="FILE", help="more prompts, one a line, UTF-8")
    add("--model", type=formats.path_name, help="a directory, one file, or a name such as "
        "Tongyi-MAI/Z-Image-Turbo (default: the bundled model)")
    convert_weights.add_common_options(
        parser, "--dit", "--text-encoder", "--vae", "--tokenizer", "--lora", "--device", "--seed",
        lora=None, device=None, seed=None)
    add("--like", type=formats.path_name, metavar="PICTURE.png", help="take prompt and settings "
        "from a picture that this program made; other options win")
    add("--out", type=png_name, default="image.png", metavar="FILE.png", help="default image.png")
    add("--num-images", type=number(1, 10 ** 6, int), help="images of each prompt (default 1)")
    add("--batch-size", type=number(1, 1024, int), help="images computed at once (default 1)")
    add("--size", type=width_and_height, metavar="WxH", help="pixels, such as 1280x720; multiples "
        "of 16 (default: the model's own; 1024x1024 for Turbo)")
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
    add("--init-image", type=formats.path_name, metavar="FILE", help="start from this picture")
    add("--strength", type=number(0, 1, above=0), help="how far from it, up to 1 (default 0.6)")
    add("--dtype", choices=["bfloat16", "float32", "float16"],
        help="default: bfloat16; float32 on a CPU, unless the weights are int8 and the CPU "
        "is fast in bfloat16")
    add("--weights", choices=["int8", "fp8"], help="one byte for most weights, half the memory; "
        "int8 is also faster on CPUs with VNNI and without AMX")
    add("--offload", nargs="?", const="networks", choices=["networks", "blocks"],
        help="keep a network on the GPU only while it works; blocks: two blocks of it at a time")
    add("--tile", action=argparse.BooleanOptionalAction,
        help="VAE in tiles (default: above 2 megapixels, and with --offload blocks)")
    add("--attention", choices=[*hardware.ATTENTION], help="kernel of DiT and text encoder "
        "(default: what PyTorch picks)")
    add("--context-parallel", action="store_true", default=None,
        help="with torchrun: all processes compute each image together")
    add("--compile", action="store_true", help="a slow start, then faster steps", default=None)
    add("--upscale", choices=["none", "nearest", "lanczos"],
        help="how to enlarge pictures under 256 pixels (default lanczos; with a size: none)")
    add("--json", action="store_true", help="print a line of JSON for each picture", default=None)
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
    args.given = {name for name, value in vars(args).items() if value not in (None, [])}
    args.loop = "-" in args.prompt
    args.rank, args.world = hardware.torchrun_rank()
    if args.size:
        if args.height or args.width:
            raise UserError("--size says both sides: leave out --height and --width")
        args.width, args.height = args.size
    recorded = read_recorded(parser, args) if args.like else {}
    # A size that is given is that of the picture.
    as_asked = {"upscale": "none"} if args.width or args.height else {}
    for name, value in {**DEFAULTS, **recorded, **as_asked}.items():
        if getattr(args, name) in (None, []):
            setattr(args, name, value)
    if args.compile and args.offload == "blocks":
        raise UserError("--compile does not go with --offload blocks, which moves the weights")
    if "strength" in args.given and not args.init_image:
        raise UserError("--strength has no effect without --init-image")
    if args.model is None and not any(getattr(args, part) for part in PARTS):
        args.model = find_bundled()
    add_prompts(args)
    if args.context_parallel and (args.world == 1 or args.offload):
        raise UserError("--context-parallel needs torchrun, and does not go with --offload")
    # Which of the images are this process's: every WORLD-th batch, or all of them.
    args.rank_and_world = (0, 1) if args.context_parallel else (args.rank, args.world)
    return args


def add_prompts(args):
    """Completes args.prompt from --prompts. In a loop (args.loop) prompts come by and by."""
    if args.loop and (args.prompt != ["-"] or args.prompts or args.world > 1):
        raise UserError("- reads the prompts: leave out other prompts, --prompts and torchrun")
    if args.loop and sys.stdin is None:
        raise UserError("- reads prompts from standard input, which is closed")
    args.prompt = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not args.prompt:
        raise UserError("there is no prompt; give one in quotes, --prompts FILE, or - for a loop")
    images = 10 ** 6 if args.loop else len(args.prompt) * args.num_images
    if images > 10 ** 6:
        raise UserError("more than a million images are asked for")
    if args.seed + images > 2 ** 63:
        raise UserError(f"--seed should be at most {2 ** 63 - images} for so many images")


def read_recorded(parser, args):
    """What the picture `args.like` says of itself -> {name: value} of the options."""
    try:
        with Image.open(args.like) as image:
            text = dict(image.text)
        names = json.loads(text["options"])
        if not {*names} <= RECORDED:
            raise UserError(f"it names options that no picture has: {[*names]!r}"[:200])
        words = [word_of(name, text[name]) for name in names]
        known = vars(parser.parse_args([*words, f"--out={args.out}"]))
        known["width"], known["height"] = known.pop("size")
        known["prompt"] = [] if args.prompts else [text["prompt"]]
        recorded_files = json.loads(text["files"])
        if not recorded_files.keys() <= {*FILES}:
            raise UserError(f"it names files that no picture has: {[*recorded_files]!r}"[:200])
        for name, files in recorded_files.items():
            if getattr(args, name) or (args.model and name in PARTS):
                continue                      # a model that is given replaces all parts
            if name == "lora":
                strength = convert_weights.number(-100, 100)
                known[name] = [(find_file(args.like, name, file, mark), strength(str(number)))
                               for file, mark, number in files]
            else:
                [known[name]] = [find_file(args.like, name, file, mark) for file, mark in files]
    except UserError as error:
        raise UserError(f"{args.like}: {error}") from None
    except (OSError, NotImplementedError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {args.like}: {unreadable(error)}") from None
    except (*formats.JSON_FAULTS, SyntaxError, argparse.ArgumentTypeError):
        raise UserError(f"{args.like} does not say how this program made it") from None
    return {name: value for name, value in known.items() if value is not None}


def word_of(name, value):
    """An option as it stands on a command line."""
    option = f"--{name.replace('_', '-')}"
    flags = {"tile": {"True": "--tile", "False": "--no-tile"}, "compile": {"True": "--compile"}}
    return flags[name][value] if name in flags else f"{option}={value}"


def file_mark(path):
    """The name and the fingerprint of a file or model; of one on the hub the name alone."""
    if Path(path).exists():
        return Path(path).resolve().name, convert_weights.fingerprint(path)
    return str(path), None


def find_file(picture, option, name, digest):
    """The file or model that a picture was made with: here, beside the picture, or bundled."""
    if digest is None and formats.is_hub_name(name):
        return name
    for path in (Path(name), Path(picture).parent / name, *BUNDLED):
        if digest and path.exists() and file_mark(path)[1] == digest:
            return str(path)
    raise UserError(f"it was made with {name}, which is not here or has changed; name it with "
                    f"--{option.replace('_', '-')}")


def read_prompts(path):
    """The lines of a UTF-8 text file, without empty ones."""
    try:
        lines = Path(path).read_text(encoding="utf-8").replace("\ufeff", "").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the prompts in {path}: {reason}") from None
    return [line.strip() for line in lines if line.strip()]


def unreadable(error):
    """Why Pillow cannot read a picture."""
    if isinstance(error, Image.DecompressionBombError):
        return "it has more than 179 million pixels"
    return getattr(error, "strerror", None) or "it is not a picture, or damaged"


def read_image(path):
    """A picture file -> RGB: upright, on white where transparent, 16-bit grays kept."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # of very large pictures
            image = ImageOps.exif_transpose(Image.open(path))
        if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65535):
            raise UserError("its numbers are floating-point, or of 32 bits; save it with 8 or 16")
        if image.mode.startswith("I"):        # 16 bits, which Pillow would clip to 8
            gray = np.array(image).astype(np.int64)
            gray = gray >> 8 if image.mode != "I" or gray.max() > 255 else gray
            image = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
    except UserError as error:
        raise UserError(f"cannot read the image {path}: {error}") from None
    except Exception as error:                # what Pillow's many decoders raise
        raise UserError(f"cannot read the image {path}: {unreadable(error)}") from None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def fit_size(pipeline, image, height=None, width=None):
    """-> (height, width) with a picture's proportions and about the model's number of pixels.

    A side that is given stays, and the other one follows from the proportions.
    """
    multiple, limit = pipeline.pixel_multiple, min(pipeline.dit.config.axes_lens[1:])
    ratio, area = image.width / image.height, (pipeline.size / multiple) ** 2

    def nearest(side):
        return min(max(round(side), 1), limit)

    def misfit(shape):
        # Proportions count most; too many pixels cost more than too few. Rows x columns is free to
        # be up to a quarter above `area`, for the sake of the proportions.
        rows, columns = shape
        larger = math.log(rows * columns / area)
        return 2 * abs(math.log(columns / rows / ratio)) + abs(larger) + max(2 * larger, 0)

    if height or width:
        rows = height / multiple if height else nearest(width / multiple / ratio)
        columns = nearest(rows * ratio)
    else:
        rows, columns = min(((rows, nearest(min(rows * ratio, 1.25 * area / rows)))
                             for rows in range(1, limit + 1)), key=misfit)
    return setting(height, rows * multiple), setting(width, columns * multiple)


def enlarge(image, how):
    """Small pictures at a whole multiple of their size, 256 pixels or more on each side."""
    factor = 1 if how == "none" else -(-256 // min(image.size))
    size = [side * factor for side in image.size]
    return image if factor == 1 else image.resize(size, Image.Resampling[how.upper()])


def save_png(image, path, info, index=0):
    """Writes a PNG with text chunks to path-INDEX (for 0: path) or the next free name -> name."""
    text = PngImagePlugin.PngInfo()
    for key, value in info.items():           # file names need not be Unicode
        text.add_text(key, str(value).encode("utf-8", "replace").decode())
    with new_file(path) as part:
        image.save(part, format="PNG", pnginfo=text)
        for i in itertools.count(index):
            name = path.with_name(f"{path.stem}-{i}.png") if i else path
            with suppress(FileExistsError):
                rename_new(part, name)
                return name


def check_options_fit(args, device, dtype, model, keep):
    """UserError, with advice, if the run needs more memory than there is."""
    size = model.settings.get("size", 1024)
    pixels = setting(args.height, size) * setting(args.width, size)
    batch = min(args.batch_size, args.num_images * len(args.prompt))
    hardware.check_memory(model, device, (pixels, batch), hardware.Choice(
        dtype, args.weights, args.offload, keep, bool(args.lora), args.tile))


def build(args, device):
    """Loads the model and applies the options that change how it computes -> Pipeline.

    Also completes args.dtype; where the device lacks int8 products, args.weights may change.
    """
    model = open_model(args.model, **{part: getattr(args, part) for part in PARTS})
    if args.model and Path(args.model).is_file():         # the others were found beside it
        args.model = None
        for part in PARTS:
            setattr(args, part, str(model.files[part]))
    if args.shift:
        model = model._replace(shift_assumed=False)
    args.dtype, args.weights, keep = hardware.choose_numbers(
        model, device, args.dtype, args.weights)
    dtype = getattr(torch, args.dtype)
    check_options_fit(args, device, dtype, model, keep)
    home = "cpu" if args.offload else device
    pipeline = load_pipeline(
        model, home, dtype, args.lora, {name: hardware.KEEP[name] for name in keep},
        args.weights and partial(hardware.quantize_layer, kind=args.weights))
    pipeline.device = device
    for net in (pipeline.text_encoder, pipeline.dit, pipeline.vae):
        if device.type == "cpu":
            hardware.use_cpu_kernels(net)
        if args.attention:
            hardware.use_attention(net, args.attention)
    if args.tile is not False:
        hardware.use_tiles(pipeline.vae, above=0 if args.tile or args.offload == "blocks" else 2e6)
    hardware.place(pipeline, args.offload, args.context_parallel, args.compile)
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
    idle = [f"--{name.replace('_', '-')}" for name in OF_GUIDANCE if name in args.given]
    for applies, message in (
            (idle and guidance == 0, f"without --guidance there is no effect of {', '.join(idle)}"),
            (guidance == 0 and shift >= 6, f"a shift of {shift} is that of an undistilled model, "
             "which wants --guidance 3 to 5 and --steps 28 to 50"),
            (guidance > 0 and pipeline.guidance == 0 and shift < 6,
             "a distilled model, as this one seems to be, wants --guidance 0")):
        if applies:
            warnings.warn(message, stacklevel=2)


def make_record(args, pipeline, settings, size):
    """What a PNG says: all that changes a pixel, under the names of the options."""
    options = {"seed": 0, "size": size, "batch_size": args.batch_size, "dtype": args.dtype,
               "upscale": args.upscale, **settings}
    for name in ("weights", "attention", "compile"):
        if getattr(args, name):
            options[name] = getattr(args, name)
    if args.tile is not None or args.offload == "blocks":
        options["tile"] = args.tile is not False
    if args.init_image:
        options["strength"] = args.strength
    files = {name: getattr(args, name) for name in FILES if getattr(args, name)}
    entries = {name: value if name == "lora" else [(value,)] for name, value in files.items()}
    entries = {name: [(*file_mark(path), *more) for path, *more in value]
               for name, value in entries.items()}
    return {**options, "model": pipeline.name, "files": json.dumps(entries),
            "options": json.dumps([*options])}


def read_batches(args):
    """The batches of this process: (number of the first image, prompts)."""
    if args.loop:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        groups = ([line.strip()] * args.num_images for line in sys.stdin if line.strip())
    else:
        groups = [[prompt for prompt in args.prompt for _ in range(args.num_images)]]
    done, (rank, world) = 0, args.rank_and_world
    for prompts in groups:
        for first in range(rank * args.batch_size, len(prompts), world * args.batch_size):
            yield done + first, prompts[first:first + args.batch_size]
        done += len(prompts)


def draw(args, pipeline, record, function):
    """Draws and saves all pictures. In the loop a bad prompt is an error line, not the end.

    If one was bad, the exit code is 2 at the end of the loop.
    """
    failed = False
    count = len(args.prompt) * args.num_images
    steps = steps_left(record["steps"], record.get("strength", 1)) * -(-count // args.batch_size)
    with tqdm(total=None if args.loop else steps, unit="step", disable=args.rank > 0) as bar:
        def after_step(*_):
            bar.update(args.rank_and_world[1])

        for first, prompts in read_batches(args):
            bar.set_description("drawing" if args.loop else f"{first + 1} of {count}")
            start = time.perf_counter()
            try:
                images = function(pipeline, prompts, seed=args.seed + first, callback=after_step)
            except UserError as error:
                if not args.loop:
                    raise
                report(args, bar, {"prompt": prompts[0], "error": str(error)})
                failed = True
                continue
            seconds = round(time.perf_counter() - start, 2)
            if args.rank and args.context_parallel:
                images = ()                                      # the first process saves them
            for i, image in enumerate(images):
                entry = {"prompt": prompts[i], **record, "seed": args.seed + first + i,
                         "batch_size": len(prompts)}
                path = save_png(enlarge(image, args.upscale), args.out, entry, first + i)
                report(args, bar, {"path": str(path), "seconds": seconds, **entry})
    if failed:
        sys.exit(2)


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


@hardware.advise_on_errors(
    "--offload or --offload blocks (on a GPU), --weights int8 or fp8, a smaller --size, "
    "--batch-size 1 or --dtype bfloat16")
def main():
    """The command line."""
    args = parse_arguments()
    image = read_image(args.init_image) if args.init_image else None
    device = find_device(args.device)
    if args.offload and device.type == "cpu":
        warnings.warn("--offload has no effect on a CPU", stacklevel=2)
        args.offload = None
    keep_freed_memory()
    pipeline = build(args, device)
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
    if image and abs(math.log(image.width * height / (image.height * width))) > math.log(1.5):
        warnings.warn(f"--init-image of {image.width}x{image.height} is cropped to the proportions "
                      f"of {width}x{height}", stacklevel=2)
    function = partial(function, height=height, width=width, **settings)
    record = make_record(args, pipeline, settings, f"{width}x{height}")
    draw(args, pipeline, record, function)
    if args.context_parallel:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    convert_weights.run_command(main)
