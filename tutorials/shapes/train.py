"""Trains the small model of this folder from nothing: tokenizer, VAE, then text encoder and DiT together.

    python tutorials/shapes/train.py --out runs/shapes --workers 2        an hour and a half on 2 CPU cores
    python tutorials/shapes/train.py --out runs/smoke --smoke             every stage, tiny, under a minute

Each stage leaves a file in --out and is skipped or continued when the command is given again; a run that was killed
and continued is the same run, because every step draws its data and noise from a generator seeded by (seed, step).
`log.jsonl` gets one line each few steps, `samples_*.png` show held-out prompts, `--out`/teacher is the checkpoint.
"""

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]

import data      # noqa: E402
import evaluate  # noqa: E402
import sampler   # noqa: E402
from convert_weights import UserError, run_command, save_pipeline  # noqa: E402
from distill import picture_grid, save_whole  # noqa: E402
from model import VAE, DiT, DiTConfig, TextEncoder, TextEncoderConfig, VAEConfig, has_bfloat16_products  # noqa: E402

warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")   # RMSNorm under autocast, on purpose


@dataclass
class Recipe:
    """Every number of a run."""
    seed: int = 0
    vae_drawings: int = 6144
    vae_steps: int = 3000
    vae_lr: float = 2e-3
    vae_crops: float = 0.6        # the first part of the steps sees 32x32 crops round the shape: more edges a second
    kl_weight: float = 1.5e-2     # high for a VAE: latents that stand noise of half their size are easier to sample
    drawings: int = 32768         # latents precomputed for the teacher
    teacher_steps: int = 8000
    batch: int = 64               # over all workers
    muon_lr: float = 8e-3         # matrices inside blocks
    adam_lr: float = 2e-3         # everything else
    decay_from: float = 0.5       # constant rate until this share of the steps, then linearly to zero
    ema: float = 0.998
    caption_drop: float = 0.1     # share of captions replaced by the empty prompt, for guidance
    caption_swap: float = 0.1     # share replaced by another picture's: as on the web, and what guidance then mends
    time_mean: float = -1.2       # t = sigmoid(N(mean, std)): more often near noise, where the caption decides
    time_std: float = 1.2
    train_encoder: bool = False   # the text encoder stays at its random start: learned faster than a trained one
    shift: float = 3.0            # of the sampling schedule, as in the release
    probe_steps: int = 12         # the sampler's, for the figures in the log
    probe_guidance: float = 3.0
    probe_prompts: int = 64
    steps: int = 16               # the checkpoint's defaults: best by evaluate.py once trained, written into its config
    guidance: float = 2.0
    dim: int = 160
    layers: int = 5
    log_every: int = 50
    save_every: int = 500


SMOKE = dict(vae_drawings=64, vae_steps=6, drawings=64, teacher_steps=6, batch=8, probe_steps=2, probe_prompts=4, steps=2,
             dim=32, layers=1, log_every=2, save_every=3)


def vae_config(scale=1.0, shift=0.0):
    # At least four channels a group: with one, GroupNorm takes away each channel's mean, and flat colours with it.
    return VAEConfig(latent_channels=4, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=4,
                     scaling_factor=scale, shift_factor=shift)


def encoder_config(vocab_size):
    return TextEncoderConfig(vocab_size=vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def dit_config(recipe):
    heads = max(recipe.dim // 32, 1)
    return DiTConfig(in_channels=4, dim=recipe.dim, n_layers=recipe.layers, n_refiner_layers=1, n_heads=heads,
                     cap_feat_dim=64, axes_dims=(8, 12, 12), axes_lens=(576, 64, 64))


# --- Small things -------------------------------------------------------------------------------------------


def save(path, value):
    """torch.save beside the file, then renamed: a killed run leaves the previous file whole."""
    save_whole(Path(path), lambda part: torch.save(value, part))


def log(out, **values):
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
    print(line, flush=True)
    with open(os.path.join(out, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(line + "\n")


def save_grid(path, images, scale=2):
    """(B, 3, H, W) in [-1, 1] -> PNG with 8 pictures a row."""
    grid = picture_grid(images.div(2).add(0.5).clamp(0, 1))
    save_whole(Path(path), lambda part: grid.resize([scale * side for side in grid.size], 0).save(part, format="PNG"))


def random_step(seed, *where):
    """Generators (torch, numpy) that depend on the seed and the place in the run alone: nothing to store for a restart."""
    rng = np.random.default_rng([seed, *where])
    return torch.Generator().manual_seed(int(rng.integers(2 ** 62))), rng


# --- Tokenizer ----------------------------------------------------------------------------------------------


def train_tokenizer(seed):
    """Byte-level BPE on captions of training scenes, with the special tokens and the chat template of the release."""
    rng = np.random.default_rng([seed, 1])
    captions = [data.caption(data.random_scene(rng), rng) for _ in range(4000)]
    tokenizer = Tokenizer(models.BPE())
    # Chinese has no spaces: without this split the merges run across words, and colour and shape share tokens.
    words = "|".join(sorted(data.CHINESE.values(), key=len, reverse=True)) + r"|背景|\p{Han}"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*captions, *["user\n", "assistant\n"] * 200], trainer)
    return tokenizer


# --- VAE ----------------------------------------------------------------------------------------------------


def vae_pool(count, seed):
    """Scenes, their masks (count, 64, 64), and the two colours (count, 2, 3) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    scenes = [data.random_scene(rng) for _ in range(count)]
    masks = torch.from_numpy(np.stack([data.coverage(s.shape, s.x, s.y, s.radius) for s in scenes]))
    colours = torch.tensor([(data.COLOURS[s.colour], data.COLOURS[s.background]) for s in scenes]) / 127.5 - 1
    return scenes, masks, colours


def paint(masks, colours):
    """Masks (B, H, W) and colours (B, 2, 3) of shape and background -> (B, 3, H, W)."""
    shape, background = colours[..., None, None].unbind(1)
    return background + masks[:, None] * (shape - background)


def crop(masks, scenes, rng, side=32):
    """A side x side window of each mask, near its shape."""
    corners = [[int(np.clip(np.rint(c - side / 2 + rng.uniform(-12, 12)), 0, data.SIDE - side)) for c in (s.y, s.x)] for s in scenes]
    return torch.stack([m[y:y + side, x:x + side] for m, (y, x) in zip(masks, corners)])


def vae_loss(vae, images, masks, noise_generator, kl_weight):
    """Absolute and squared error, four times as heavy on outlines, plus the error of the gradients, plus KL."""
    mean, logvar = vae.moments(images)
    noise = torch.randn(mean.shape, generator=noise_generator)
    error = vae.decoder(mean + (0.5 * logvar).exp() * noise) - images                          # (B, 3, H, W)
    edges = F.max_pool2d(masks[:, None], 3, 1, 1) + F.max_pool2d(-masks[:, None], 3, 1, 1) > 0
    error_loss = ((1 + 3 * edges) * (error.abs() + error.square())).mean()
    gradient_loss = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error_loss + 0.5 * gradient_loss + kl_weight * kl


def train_vae(recipe, out, stop_after=None):
    """out/vae.pt: weights, latents scaled to unit variance by the config's scalar shift and scale."""
    path = os.path.join(out, "vae.pt")
    torch.manual_seed(recipe.seed)
    vae = VAE(vae_config())
    optimizer = torch.optim.AdamW(vae.parameters(), recipe.vae_lr, betas=(0.9, 0.99), weight_decay=0.01)
    start, seconds = 0, 0.0
    if os.path.exists(path):
        saved = torch.load(path)
        if saved["done"]:
            vae = VAE(vae_config(*saved["scale_shift"]))
            vae.load_state_dict(saved["vae"])
            return vae.eval()
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        start, seconds = saved["step"], saved["seconds"]
    scenes, masks, colours = vae_pool(recipe.vae_drawings, [recipe.seed, 2])
    _, test_masks, test_colours = vae_pool(64, [recipe.seed, 3])
    test = paint(test_masks, test_colours)

    began = time.time() - seconds
    for step in range(start, min(recipe.vae_steps, stop_after or recipe.vae_steps)):
        progress = step / recipe.vae_steps
        generator, rng = random_step(recipe.seed, 4, step)
        cropped = progress < recipe.vae_crops
        index = rng.integers(len(masks), size=32 if cropped else 12)
        batch = crop(masks[index], [scenes[i] for i in index], rng) if cropped else masks[index]
        for group in optimizer.param_groups:
            group["lr"] = recipe.vae_lr * min(1, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        loss = vae_loss(vae, paint(batch, colours[index]), batch, generator, recipe.kl_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % recipe.log_every == 0:
            psnr = evaluate.reconstruct(vae, test)[1] if (step + 1) % (4 * recipe.log_every) == 0 else None
            log(out, stage="vae", step=step + 1, seconds=time.time() - began, loss=loss.item(), **({"psnr": psnr} if psnr else {}))
        if (step + 1) % recipe.save_every == 0:
            save(path, dict(done=False, step=step + 1, seconds=time.time() - began, vae=vae.state_dict(), optimizer=optimizer.state_dict()))
    if stop_after and stop_after < recipe.vae_steps:
        return None

    with torch.no_grad():
        z = vae.moments(paint(masks[:512], colours[:512]))[0]
    scale_shift = (1 / z.std().item(), z.mean().item())
    save(path, dict(done=True, scale_shift=scale_shift, vae=vae.state_dict()))
    save_grid(os.path.join(out, "vae.png"), torch.stack((test[:32], evaluate.reconstruct(vae, test)[0][:32]), 1).flatten(0, 1))
    return train_vae(recipe, out)


# --- Teacher ------------------------------------------------------------------------------------------------


def teacher_drawings(recipe, vae, out):
    """Scenes and their latents (count, 4, 16, 16), float16, computed once and kept in out/latents.pt."""
    path, rng = os.path.join(out, "latents.pt"), np.random.default_rng([recipe.seed, 5])
    scenes = [data.random_scene(rng) for _ in range(recipe.drawings)]
    if not os.path.exists(path):
        latents = []
        for start in range(0, len(scenes), 256):
            pictures = torch.from_numpy(np.stack([data.draw(s) for s in scenes[start:start + 256]]))
            with torch.no_grad():
                latents.append(vae.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).half())
        save(path, torch.cat(latents))
    return scenes, torch.load(path, mmap=True)


def build(recipe, tokenizer):
    """Text encoder and DiT at their start: PyTorch's defaults, except that every block begins as the identity."""
    torch.manual_seed(recipe.seed)
    nets = torch.nn.ModuleDict({"text_encoder": TextEncoder(encoder_config(tokenizer.get_vocab_size())), "dit": DiT(dit_config(recipe))})
    dit = nets["dit"]
    for block in [*dit.noise_refiner, *dit.layers]:
        torch.nn.init.zeros_(block.modulation.weight)
        torch.nn.init.zeros_(block.modulation.bias)
    torch.nn.init.zeros_(dit.final_layer.linear.weight)
    for token in (dit.x_pad_token, dit.cap_pad_token):
        torch.nn.init.normal_(token, std=0.02)
    nets["text_encoder"].requires_grad_(recipe.train_encoder)
    return nets


def optimizers(nets, recipe):
    """Muon for the matrices inside blocks, AdamW for the rest: learns several times faster than AdamW alone here."""
    inside = {n: p for n, p in nets.named_parameters()
              if p.requires_grad and p.ndim == 2 and ("layers." in n or "refiner." in n) and "modulation" not in n}
    rest = [p for n, p in nets.named_parameters() if p.requires_grad and n not in inside]
    return [torch.optim.Muon(list(inside.values()), recipe.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def tokenize(tokenizer, captions):
    """Captions -> ids (B, L) padded on the right, lengths (B,): the template of sampler.encode_prompts."""
    encoded = [sampler.token_ids(tokenizer, c) for c in captions]
    longest = max(map(len, encoded))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in encoded]), torch.tensor(list(map(len, encoded)))


def random_caption(scenes, i, recipe, rng):
    """A new caption for scene i; sometimes none, sometimes one that belongs to another scene."""
    chance = rng.random()
    if chance < recipe.caption_drop:
        return ""
    if chance < recipe.caption_drop + recipe.caption_swap:
        i = rng.integers(len(scenes))
    return data.caption(scenes[i], rng)


def flow_loss(nets, tokenizer, scenes, latents, recipe, count, step, rank):
    """Mean squared error of the velocity for `count` drawings, each at its own time, with its own new caption."""
    generator, rng = random_step(recipe.seed, 6, step, rank)
    index = rng.integers(len(scenes), size=count)
    captions = [random_caption(scenes, i, recipe, rng) for i in index]
    x1 = latents[index].float()                                                                # (B, 4, 16, 16)
    noise = torch.randn(x1.shape, generator=generator)
    # Times of a batch are spread evenly over the distribution's quantiles: less noise in the gradient.
    quantile = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    normal = math.sqrt(2) * torch.erfinv((2 * quantile - 1).clamp(-0.9999, 0.9999))
    t = torch.sigmoid(recipe.time_mean + recipe.time_std * normal)
    x = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * noise
    # On a CPU the plain attention kernel's backward is several times faster in bfloat16 than the fused one's.
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16_products()), sdpa_kernel(SDPBackend.MATH):
        v = nets["dit"](x, t, nets["text_encoder"](*tokenize(tokenizer, captions)))
    return F.mse_loss(v.float(), x1 - noise)


def average_gradients(parameters):
    """Mean over the workers, as one flat vector."""
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def learning_rate(step, recipe):
    """Share of the full rate: 100 steps of warm-up, constant, then linearly to zero."""
    remaining = (recipe.teacher_steps - step) / ((1 - recipe.decay_from) * recipe.teacher_steps)
    return min(1, (step + 1) / 100, remaining)


def probe(nets, vae, tokenizer, recipe, out, name):
    """Accuracy of the averaged weights on held-out prompts, and a grid of their pictures."""
    pipeline = sampler.Pipeline(tokenizer, nets["text_encoder"], nets["dit"], vae, recipe.shift, size=data.SIDE)
    prompts = data.prompt_list(recipe.probe_prompts, seed=3, unseen=True)
    images = evaluate.sample_images(pipeline, prompts, recipe.probe_steps, recipe.probe_guidance)
    save_grid(os.path.join(out, name), images)
    row = evaluate.score(images, prompts)
    return {k: row[k] for k in ("joint", "shape", "colour", "background", "size", "position")}


def train_teacher(recipe, out, tokenizer, vae, rank=0, workers=1, stop_after=None):
    """out/teacher.pt: text encoder and DiT, with their running averages. Every worker steps on the same mean gradient."""
    path = os.path.join(out, "teacher.pt")
    scenes, latents = teacher_drawings(recipe, vae, out)
    nets = build(recipe, tokenizer)
    averaged, optims, start, seconds = copy.deepcopy(nets).requires_grad_(False), optimizers(nets, recipe), 0, 0.0
    if os.path.exists(path):
        saved = torch.load(path)
        nets.load_state_dict(saved["nets"])
        averaged.load_state_dict(saved["averaged"])
        for optimizer, state in zip(optims, saved["optimizers"]):
            optimizer.load_state_dict(state)
        start, seconds = saved["step"], saved["seconds"]
    parameters = [p for p in nets.parameters() if p.requires_grad]

    began, losses = time.time() - seconds, []
    for step in range(start, min(recipe.teacher_steps, stop_after or recipe.teacher_steps)):
        for optimizer, rate in zip(optims, (recipe.muon_lr, recipe.adam_lr)):
            optimizer.param_groups[0]["lr"] = rate * learning_rate(step, recipe)
        loss = flow_loss(nets, tokenizer, scenes, latents, recipe, recipe.batch // workers, step, rank)
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            decay = min(recipe.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averaged.parameters()), list(nets.parameters()), 1 - decay)
        losses.append(loss.item())
        if rank == 0 and (step + 1) % recipe.log_every == 0:
            log(out, stage="teacher", step=step + 1, seconds=time.time() - began, loss=float(np.mean(losses)))
            losses = []
        if rank == 0 and ((step + 1) % recipe.save_every == 0 or step + 1 == recipe.teacher_steps):
            save(path, dict(step=step + 1, seconds=time.time() - began, nets=nets.state_dict(), averaged=averaged.state_dict(),
                            optimizers=[o.state_dict() for o in optims]))
            figures = probe(averaged, vae, tokenizer, recipe, out, f"samples_{step + 1:06d}.png")
            log(out, stage="probe", step=step + 1, seconds=time.time() - began, **figures)
    return averaged


def worker(rank, workers, recipe, out, meeting, stop_after):
    """One process of a data-parallel run, one thread each: on a CPU two of these beat one process with two threads."""
    torch.set_num_threads(1), sampler.keep_freed_memory()
    if workers > 1:
        dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=workers)
    tokenizer, vae = Tokenizer.from_file(os.path.join(out, "tokenizer.json")), train_vae(recipe, out)
    averaged = train_teacher(recipe, out, tokenizer, vae, rank, workers, stop_after)
    if rank == 0 and not stop_after:
        save_pipeline(
            os.path.join(out, "teacher"), averaged["dit"], averaged["text_encoder"], vae, tokenizer, recipe.shift,
            dtype=torch.bfloat16, steps=recipe.steps, guidance=recipe.guidance, size=data.SIDE)
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


# --- Command line -------------------------------------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(description="Train the shapes model: tokenizer, VAE, teacher.")
    parser.add_argument("--out", required=True, help="folder for everything; give it again to continue a run")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each, sharing the batch")
    parser.add_argument("--smoke", action="store_true", help="a tiny run of every stage, under a minute")
    parser.add_argument("--stop-after", type=int, help="stop each training stage after this many steps, to continue later")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other numbers for the recipe")
    return parser.parse_args()


def recipe_from(args):
    recipe = replace(Recipe(), **(SMOKE if args.smoke else {}))
    for setting in args.set:
        name, _, value = setting.partition("=")
        try:
            recipe = replace(recipe, **{name: type(getattr(recipe, name))(json.loads(value))})
        except (AttributeError, ValueError):
            raise UserError(f"--set {setting}: give NAME=NUMBER with a name out of {', '.join(vars(recipe))}") from None
    return recipe


def main():
    args = arguments()
    recipe = recipe_from(args)
    if args.workers < 1 or recipe.batch % args.workers:
        raise UserError(f"--workers should divide the batch of {recipe.batch}, not be {args.workers}")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {args.out}: {error.strerror}") from None
    torch.set_num_threads(1), sampler.keep_freed_memory()
    log(args.out, stage="start", torch=torch.__version__, workers=args.workers, **vars(recipe))
    path = os.path.join(args.out, "tokenizer.json")
    if not os.path.exists(path):
        train_tokenizer(recipe.seed).save(path)
    vae = train_vae(recipe, args.out, args.stop_after)
    if vae is None:
        return
    teacher_drawings(recipe, vae, args.out)
    with tempfile.TemporaryDirectory() as folder:
        job = (args.workers, recipe, args.out, os.path.join(folder, "meeting"), args.stop_after)
        if args.workers == 1:
            worker(0, *job)
        else:
            torch.multiprocessing.spawn(worker, job, args.workers)


if __name__ == "__main__":
    run_command(main)
