"""Decoupled DMD: turns a many-step teacher into a few-step student. It needs the teacher and prompts, no images.

    python distill.py                                                    the bundled teacher -> a student, on a laptop
    python distill.py --teacher DIR --prompts FILE --steps 4 --out DIR   any other teacher

Source: "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield", arXiv 2511.22677.
Three networks, each a callable (x, t, text) -> v as in the box at the top of model.py:

    teacher   frozen; knows where the data is
    student   G, the few-step generator; starts as a copy of the teacher
    fake      starts as a copy of the teacher too, then keeps learning where the student's outputs are

The student's output x = G(z_t) is re-noised to a time tau, and the estimates x_hat of the data made from there say where
to push it. The push has two terms, each with its own tau and noise (Eq. 6 and 8, in data space):

    Delta    = Delta_DM + Delta_CA
    Delta_DM = x_hat(teacher, tau_dm, text) - x_hat(fake, tau_dm, text)                       the shield: distribution matching
    Delta_CA = (alpha - 1) (x_hat(teacher, tau_ca, text) - x_hat(teacher, tau_ca, no text))   the spear: CFG augmentation

alpha is the paper's guidance scale; the guidance of sampler.py and of the official pipeline is alpha - 1.
Scores are the same thing in other units: score = (tau x_hat - x_tau) / (1 - tau)^2.

Shapes: x, noise (B, ...), any number of dimensions; times (B,); text a model.Text, or for toys a tensor (B, ...).
"""

import argparse
import copy
import json
import math
import os
import pickle
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from convert_weights import UserError, read_json, run_command, save_pipeline
from model import Text, has_bfloat16_products
from sampler import (check_size, encode_prompts, explained, generate, keep_freed_memory, load_pipeline, pick_device, prepare_image, read_image, read_prompts,
                     sample, time_schedule)

# --- The two terms ------------------------------------------------------------------------------------------


def over(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x item by item."""
    return t.view(-1, *[1] * (x.ndim - 1))


def renoise(x, t, noise):
    """Data x at time t: t x + (1 - t) noise."""
    return over(t, x) * x + (1 - over(t, x)) * noise


def data_estimate(net, x, t, text):
    """Where the net takes x at time t to come from: x_hat = x + (1 - t) v."""
    return x + (1 - over(t, x)) * net(x, t, text)


def normalised(delta, x, estimate, floor=0.05):
    """Each item of delta in units of mean |x - estimate|: differences of estimates shrink as tau goes to 1, and so do these."""
    return delta / over((x - estimate).abs().flatten(1).mean(1).clamp(min=floor), x)


@torch.no_grad()
def distribution_matching(teacher, fake, x, t, text, noise, normalise=True):
    """The shield, Delta_DM (B, ...): from where the student's outputs are to where the data is (Eq. 6, first term).

    x: the student's outputs; t: tau_dm; normalise False: the bare difference of estimates. No gradient.
    """
    x_t = renoise(x, t, noise)
    real, imitated = data_estimate(teacher, x_t, t, text), data_estimate(fake, x_t, t, text)
    return normalised(real - imitated, x, real) if normalise else real - imitated


@torch.no_grad()
def cfg_augmentation(teacher, x, t, text, null_text, alpha, noise, normalise=True):
    """The spear, Delta_CA (B, ...): along what the text changes in the teacher's estimate (Eq. 6, second term).

    t: tau_ca; null_text: the empty prompt, of batch 1 or B; alpha 1: exactly 0. The fake has no part in it. No gradient.
    """
    x_t = renoise(x, t, noise)
    cond, uncond = data_estimate(teacher, torch.cat((x_t, x_t)), torch.cat((t, t)), join(text, null_text, batch=len(x))).chunk(2)
    delta = (alpha - 1) * (cond - uncond)
    return normalised(delta, x, cond) if normalise else delta


@torch.no_grad()
def shared_call(teacher, x, tau_dm, tau_ca, text, null_text, noise_dm, noise_ca):
    """The teacher's three passes for both terms in one call -> two nets that know the answers, one for each term, which must
    then be given this very x, tau and noise."""
    x_dm, x_ca = renoise(x, tau_dm, noise_dm), renoise(x, tau_ca, noise_ca)
    v = teacher(torch.cat((x_dm, x_ca, x_ca)), torch.cat((tau_dm, tau_ca, tau_ca)), join(text, text, null_text, batch=len(x)))
    return lambda *_: v[:len(x)], lambda *_: v[len(x):]


def proxy_loss(x, delta):
    """A number whose gradient with respect to x is -delta / x.numel(): 1/2 mean |x - stop_grad(x + delta)|^2."""
    return 0.5 * (x - (x + delta).detach()).square().mean()


def fake_loss(fake, x, t, text, noise):
    """Flow matching on the student's outputs, so that the fake comes to know them as the teacher knows data. No gradient to x."""
    x = x.detach()
    return F.mse_loss(fake(renoise(x, t, noise), t, text), x - noise)


# --- Times, and what the student is given ---------------------------------------------------------------------


def shift_time(u, shift):
    """sampler.time_schedule's shift for any time u: towards noise where shift > 1, with 0 and 1 kept. 1 / shift undoes it."""
    return u / (u + shift * (1 - u))


SCHEDULES = {                                 # (lowest tau_dm, lowest tau_ca): 0, or "t", that of the student's step
    "coupled": (0, 0), "full": (0, 0), "constrained": ("t", "t"), "hybrid": (0, "t")}


def sample_tau(schedule, t, shift=1.0, generator=None):
    """-> (tau_dm, tau_ca), (B,) each, for students' steps at times t. Uniform before the shift, which then is applied.

    coupled: one tau for both in [0, 1], the original DMD; full: each its own in [0, 1]; constrained: each its own in [t, 1];
    hybrid, the paper's: tau_ca in [t, 1], where what the student still has to make is; tau_dm in [0, 1].
    """
    draws = torch.rand(2, len(t), generator=generator, dtype=t.dtype).to(t.device)
    if schedule == "coupled":
        draws[1] = draws[0]
    taus = []
    for lowest, draw in zip(SCHEDULES[schedule], draws):
        low = t if lowest == "t" else torch.zeros_like(t)
        start = shift_time(low, 1 / shift)
        taus.append(shift_time(start + (1 - start) * draw, shift).maximum(low))     # rounding could end just below
    return taus


def backward_simulation(student, noise, text, times, step):
    """-> (x, t): the student's output x = G(z_t) at t = times[step]; z_t is where sampler.sample takes it by then. Gradient: last call only."""
    z = sample(student, noise, text, times[:step + 1])
    t = times[step].to(noise).expand(len(noise))
    return data_estimate(student, z, t, text), t


# --- One training iteration (Algorithm 1) ---------------------------------------------------------------------


def training_step(players, text, null_text, noise, settings, generator=None, train_student=True):
    """One update of the student from `noise` (B, ...), then those of fake or discriminator -> {name: number} for the log.

    train_student False: the others only learn what the student makes now. Every draw is made on the CPU by `generator`.
    The fake learns at the times at which DM asks it; the paper has U(0, 1) for it, the same for all schedules but "constrained".
    """
    p, s, times = players, settings, time_schedule(settings.steps, settings.shift)
    fresh = lambda: torch.randn(noise.shape, generator=generator, dtype=noise.dtype).to(noise.device)
    any_time = lambda: shift_time(torch.rand(len(noise), generator=generator, dtype=noise.dtype), s.shift).to(noise.device)

    with torch.set_grad_enabled(train_student):
        x, t = backward_simulation(p.student, noise, text, times, step=int(torch.randint(s.steps, (), generator=generator)))
    figures = {"x_mean": x.mean(), "x_std": x.std()}

    if train_student:
        tau_dm, tau_ca = sample_tau(s.schedule, t, s.shift, generator)
        noise_dm = fresh()
        noise_ca = noise_dm if s.schedule == "coupled" else fresh()
        dm, ca = torch.zeros_like(x), torch.zeros_like(x)
        for_dm = for_ca = p.teacher
        if s.shield == "dm" and s.alpha != 1:
            for_dm, for_ca = shared_call(p.teacher, x, tau_dm, tau_ca, text, null_text, noise_dm, noise_ca)
        if s.shield == "dm":
            dm = distribution_matching(for_dm, p.fake, x, tau_dm, text, noise_dm, s.normalise)
        if s.alpha != 1:
            ca = cfg_augmentation(for_ca, x, tau_ca, text, null_text, s.alpha, noise_ca, s.normalise)
        loss = proxy_loss(x, dm + ca)
        if s.shield == "meanvar":
            loss = loss + s.weight() * mean_variance_kl(x, *p.real_statistics)
        if s.shield == "gan":
            loss = loss + s.weight() * generator_loss(p.discriminator, x, any_time(), null_text, fresh())
        update(loss, p.student_optimizer, s.clip)
        figures |= {"loss": loss, "dm_rms": dm.square().mean().sqrt(), "ca_rms": ca.square().mean().sqrt(),
                    "cosine": F.cosine_similarity(dm.flatten(), ca.flatten(), dim=0)}

    for _ in range(s.fake_updates):
        if p.fake is not None:
            tau, _ = sample_tau(s.schedule, t, s.shift, generator)              # where DM will ask it
            figures["fake_loss"] = fake_loss(p.fake, x, tau, text, fresh())
            update(figures["fake_loss"], p.fake_optimizer, s.clip)
        if p.discriminator is not None:
            real = p.real[torch.randint(len(p.real), (len(x),), generator=generator)]
            figures["discriminator_loss"] = discriminator_loss(p.discriminator, x, real, any_time(), null_text, fresh(), generator, s.r1)
            update(figures["discriminator_loss"], p.discriminator_optimizer, s.clip)
    return {name: value.item() for name, value in figures.items()}


# --- What an iteration is given, and its small parts --------------------------------------------------------


@dataclass
class Settings:
    """What one iteration depends on."""
    steps: int = 4               # of the student
    alpha: float = 2.0           # guidance scale of the spear; 1 is none
    shield: str = "dm"           # dm, meanvar, gan or none
    shield_weight: float | None = None   # of meanvar and gan; None: SHIELD_WEIGHT
    r1: float = 0.01             # gradient penalty of the discriminator; with 1 it stayed at chance here
    schedule: str = "hybrid"     # where to re-noise: a key of SCHEDULES
    shift: float = 3.0           # of the student's schedule and of every tau
    normalise: bool = True       # each term per item, or raw
    fake_updates: int = 2        # or the discriminator's, for one update of the student
    clip: float = 1.0            # largest norm of a gradient

    def weight(self):
        return SHIELD_WEIGHT[self.shield] if self.shield_weight is None else self.shield_weight


SHIELD_WEIGHT = {"dm": 1.0, "meanvar": 2.0, "gan": 0.3, "none": 0.0}


@dataclass
class Players:
    """Who takes part: networks, each that learns with its optimizer, and what the two other shields know of real data."""
    teacher: Callable
    student: Callable
    student_optimizer: torch.optim.Optimizer
    fake: Callable | None = None
    fake_optimizer: torch.optim.Optimizer | None = None
    discriminator: Callable | None = None
    discriminator_optimizer: torch.optim.Optimizer | None = None
    real: Tensor | None = None   # (M, ...) real data, for meanvar and gan

    def __post_init__(self):
        if self.real is not None:             # mean, and variance inside an item
            self.real_statistics = self.real.mean(), self.real.flatten(1).var(1, correction=0).mean()


def update(loss, optimizer, clip):
    """One step of an optimizer. FloatingPointError, and no step, where the loss or its gradient is not finite."""
    optimizer.zero_grad()                     # first: a student's loss leaves gradient in the discriminator it went through
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    if not (loss + norm).isfinite():
        raise FloatingPointError("a loss or its gradient is not finite")
    optimizer.step()


def join(*texts, batch):
    """Texts one after the other in one batch, each stretched to `batch` where it is of batch 1."""
    if not isinstance(texts[0], Text):
        return torch.cat([text.expand(batch, *text.shape[1:]) for text in texts])
    longest = max(text.features.shape[1] for text in texts)
    features = [F.pad(text.features, (0, 0, 0, longest - text.features.shape[1])).expand(batch, -1, -1) for text in texts]
    return Text(torch.cat(features), torch.cat([text.lengths.expand(batch) for text in texts]))


# --- Other shields: the paper's point is that the spear needs one, not this one -----------------------------


def mean_variance_kl(x, mean, var):
    """KL of each item's numbers, taken as one Gaussian, from N(mean, var), averaged over items (Eq. 7): 0 at the target.

    mean, var: numbers, those of real items on average.
    """
    x = x.flatten(1)
    mu, sigma2 = x.mean(1), x.var(1, correction=0).clamp(min=1e-6)              # (B,)
    return 0.5 * ((sigma2 + (mu - mean) ** 2) / var - 1 - (sigma2 / var).log()).mean()


class Discriminator(nn.Module):
    """Whether noised x is real, from what another net sees in it: features (B, S, width) -> logits (B,).

    `features` is a callable (x, t, text) -> (B, S, width) of a frozen net (model.DiT.features); it sees every x with the
    empty prompt, because the real pictures come without prompts.
    """

    def __init__(self, features, width):
        super().__init__()
        self.features = [features]            # in a list, so that the frozen net is no part of this module
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, x, t, null_text):
        return self.head(self.features[0](x, t, join(null_text, batch=len(x)))).mean((1, 2))


def generator_loss(discriminator, x, t, null_text, noise):
    """The GAN shield: the student is to look real at time t, softplus(-logit). The gradient goes through the features to x."""
    return F.softplus(-discriminator(renoise(x, t, noise), t, null_text)).mean()


def discriminator_loss(discriminator, x, real, t, null_text, noise, generator=None, r1=0.01, sigma=0.05):
    """Its own update: softplus(-logit) on real, softplus(logit) on x, both noised alike, and R1 by finite difference:
    how much the logits of real pictures change with a little noise, ((D(real + sigma n) - D(real)) / sigma)^2."""
    real, x = renoise(real, t, noise), renoise(x.detach(), t, noise)
    nudge = sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    on_real, on_nudged, on_x = (discriminator(part, t, null_text) for part in (real, real + nudge, x))   # (B,) each
    return (F.softplus(-on_real) + F.softplus(on_x) + r1 * ((on_nudged - on_real) / sigma).square()).mean()


# --- A run --------------------------------------------------------------------------------------------------


WARMUP = 20              # updates over which the student's rate rises
BUNDLED = Path(__file__).parent / "tutorials" / "shapes"


def working_in(net, device, dtype):
    """(x, t, text) -> what the net gives, its matrix products in `dtype` under autocast; its weights stay in float32."""
    # On a CPU the plain attention kernel's backward is faster than the fused one's.
    kernel = nullcontext if device.type != "cpu" else lambda: sdpa_kernel(SDPBackend.MATH)

    def call(x, t, text):                     # autocast keeps its copies of weights until it ends: a call, not a run
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"), kernel():
            return net(x, t, text)
    return call


def adam(net, lr, momentum=0.0):
    """AdamW: with momentum for the student, whose directions are noisy, without for those who have to follow it at once."""
    return torch.optim.AdamW(net.parameters(), lr, betas=(momentum, 0.99), weight_decay=0.0)


def make_players(pipeline, settings, args, real=None):
    """-> (Players, {name: module or optimizer}): who takes part, and all of it that changes and is saved."""
    teacher = pipeline.dit.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    saved = {"student": student, "student_optimizer": adam(student, args.lr, momentum=0.9), "averaged": copy.deepcopy(teacher)}
    work = lambda net: working_in(net, pipeline.device, args.dtype)
    players = Players(work(teacher), work(student), saved["student_optimizer"], real=real)
    if settings.shield == "dm":
        fake = saved["fake"] = copy.deepcopy(student)
        players.fake, players.fake_optimizer = work(fake), adam(fake, args.fake_lr)
        saved["fake_optimizer"] = players.fake_optimizer
    if settings.shield == "gan":
        middle = len(teacher.layers) // 2 + 1
        features = work(lambda x, t, text: teacher.features(x, t, text, middle)[0])
        players.discriminator = saved["discriminator"] = Discriminator(features, teacher.config.dim).to(pipeline.device)
        players.discriminator_optimizer = saved["discriminator_optimizer"] = adam(players.discriminator, args.fake_lr)
    if args.compile:                          # dynamic: batches of B, 2B and 3B, captions of any length
        for net in {teacher, student, saved.get("fake", student)}:
            net.compile(dynamic=True)
    return players, saved


def distil(pipeline, prompts, settings, args, real=None, watch=None):
    """Runs the iterations that args asks for -> the student as a Pipeline, with the running average of its weights.

    Leaves log.jsonl, samples/, student/ and state.pt in args.out, an existing folder, and goes on from a state.pt that is there.
    real (M, C, h, w): latents of real pictures. watch(iteration, averaged) is called at every checkpoint.
    """
    out, saved_at = Path(args.out), 0
    players, saved = make_players(pipeline, settings, args, real)
    averaged = replace(pipeline, dit=saved["averaged"], shift=settings.shift, steps=settings.steps, trained_steps=settings.steps, guidance=0.0)
    progress = {"done": -args.warmup_fake, "seconds": 0.0, "recent": []}       # done: updates of the student; warm-up counts up to 0
    if (out / "state.pt").exists():
        progress = read_checkpoint(out, saved)
        saved_at = progress["done"]
    began = time.perf_counter() - progress["seconds"]

    null_text, shown = encode_prompts(pipeline, [""]), prompts[:16]
    shape = pipeline.dit.config.in_channels, *[pipeline.size // pipeline.vae.config.downsampling] * 2
    target_std = float((draw(pipeline, shown, args.batch_size, "latent") if real is None else real).std())
    with tqdm(initial=progress["done"] + args.warmup_fake, total=args.warmup_fake + args.iterations, desc="distilling", unit="it") as bar:
        for i in range(progress["done"], args.iterations):
            # Every draw of an iteration comes from a generator of its own: a run that goes on is the run that never stopped.
            generator = torch.Generator().manual_seed(10 ** 6 * args.seed + args.warmup_fake + i)
            text = encode_prompts(pipeline, [prompts[j] for j in torch.randint(len(prompts), (args.batch_size,), generator=generator)])
            noise = torch.randn(args.batch_size, *shape, generator=generator).to(pipeline.device)
            rate = players.student_optimizer.param_groups[0]["lr"] = learning_rate(i, args)
            try:
                figures = training_step(players, text, null_text, noise, settings, generator, train_student=i >= 0)
            except FloatingPointError as error:
                kept = f"{out / 'student'} is the student after {saved_at}" if saved_at else "there is no checkpoint yet"
                raise UserError(f"{error} in iteration {i + 1}; {kept}; try a smaller --lr or --alpha") from None
            bar.update()
            if i < 0:
                continue
            done, keep = i + 1, min(args.ema, (i + 1) / (i + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(saved["averaged"].parameters()), list(saved["student"].parameters()), 1 - keep)
            progress = {"done": done, "seconds": time.perf_counter() - began, "recent": [*progress["recent"], figures]}
            if done % args.log_every == 0 or done == args.iterations:
                line = log_line(progress, target_std, rate, args)
                with open(out / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                bar.set_postfix_str(f"loss {line['loss']:.3f}, std ratio {line['std_ratio']:.2f}")
                progress["recent"] = []
            if done % args.sample_every == 0 or done == args.iterations:
                write_checkpoint(out, averaged, saved, progress, draw(averaged, shown, args.batch_size, "tensor"))
                saved_at = done
                if watch:
                    watch(done, averaged)
    return averaged


def learning_rate(i, args):
    """Of the student's update i, from 0: linearly up over WARMUP updates, linearly down to 0 over all of them; the lower of the two."""
    return args.lr * max(min((i + 1) / WARMUP, 1 - i / args.iterations), 0)


def draw(pipeline, prompts, batch, output):
    """generate, with the model's own settings and image i from seed i, `batch` at a time."""
    return torch.cat([generate(pipeline, prompts[i:i + batch], seed=i, output=output) for i in range(0, len(prompts), batch)])


def log_line(progress, target_std, rate, args):
    """Means over the iterations since the last line; how large DM is beside CA; the outputs' std over that of teacher or data."""
    recent = progress["recent"]
    line = {name: sum(figures[name] for figures in recent) / len(recent) for name in recent[0]}
    if line["ca_rms"]:
        line["dm_over_ca"] = line["dm_rms"] / line["ca_rms"]
    line |= {"std_ratio": line["x_std"] / target_std, "lr": rate, "fake_lr": args.fake_lr, "seconds": progress["seconds"]}
    return {"iteration": progress["done"], **{name: float(f"{value:.6g}") for name, value in line.items()}}


def write_checkpoint(out, averaged, saved, progress, images):
    """samples/, student/, then state.pt, each whole or not at all."""
    save_whole(out / "samples" / f"{progress['done']:06d}.png", lambda part: picture_grid(images).save(part, format="PNG"))
    save_pipeline(out / "student", averaged.dit, averaged.text_encoder, averaged.vae, averaged.tokenizer, averaged.shift,
                  steps=averaged.steps, guidance=0.0, size=averaged.size, trained_steps=averaged.steps)
    state = {name: part.state_dict() for name, part in saved.items()} | {"progress": progress}
    save_whole(out / "state.pt", lambda part: torch.save(state, part))


def read_checkpoint(out, saved):
    """Puts state.pt into modules and optimizers, takes lines after it out of log.jsonl -> progress."""
    try:
        state = torch.load(out / "state.pt", map_location="cpu")
        for name, part in saved.items():
            part.load_state_dict(state[name])
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError):
        raise UserError(f"{out / 'state.pt'} is damaged, or of another kind of run; begin again with --overwrite") from None
    matches = re.finditer(r'^{"iteration": (\d+),.*\n', (out / "log.jsonl").read_text(encoding="utf-8"), re.M)     # a line cut short is none
    lines = [match[0] for match in matches if int(match[1]) <= state["progress"]["done"]]
    save_whole(out / "log.jsonl", lambda part: part.write_text("".join(lines), encoding="utf-8"))
    return state["progress"]


def picture_grid(images, columns=8):
    """(B, 3, H, W) in [0, 1] -> a picture with `columns` of them in a row."""
    rows = [torch.cat(list(row), 2) for row in F.pad(images, (1, 1, 1, 1), value=0.5).split(columns)]     # (3, H + 2, columns (W + 2))
    rows = [F.pad(row, (0, rows[0].shape[2] - row.shape[2]), value=0.5) for row in rows]
    return Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).mul(255).round().byte().cpu().numpy())


def save_whole(path, write):
    """write(part), then renamed to `path`: whatever happens, the old file or the new one is there."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or 'is the disk full?'}") from None


# --- Command line -------------------------------------------------------------------------------------------


def encode_images(pipeline, folder):
    """The pictures in a folder, cropped and resized to the pipeline's size -> latents (M, C, h, w)."""
    try:
        files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    except OSError as error:
        raise UserError(f"--images {folder}: {error.strerror}") from None
    if not files:
        raise UserError(f"--images {folder}: there is no picture in it")
    with torch.no_grad():
        return torch.cat([pipeline.vae.encode(prepare_image(read_image(file), pipeline.size, pipeline.size).to(pipeline.device))
                          for file in tqdm(files, "encoding images", leave=False)])


RUN_FILES = ("log.jsonl", "samples", "student", "state.pt", "config.json")       # the last one says that it is a run
FREE = ("out", "iterations", "sample_every", "log_every", "device", "compile")     # what --resume may change


def parse_arguments(arguments=None, defaults=()):
    """`defaults`: {option: value} that take the place of those below."""
    parser = argparse.ArgumentParser(description="Distil a few-step student from a many-step teacher with Decoupled DMD.", allow_abbrev=False)
    add, usual = parser.add_argument, Settings()
    add("--teacher", metavar="DIR", default=str(BUNDLED / "teacher"), help="checkpoint directory, official layout or ours, of an undistilled "
        "model (default: the bundled one)")
    add("--prompts", metavar="FILE", help="one prompt a line, UTF-8 (default: those of the bundled teacher)")
    add("--out", metavar="DIR", default="runs/distil", help="a new directory for all that the run leaves (default %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out, with its options")
    add("--overwrite", action="store_true", help="remove the run in --out and start again")
    add("--steps", type=int, default=usual.steps, help="of the student: 1, 2, 4, 8 (default %(default)s)")
    add("--alpha", type=float, default=usual.alpha, help="guidance scale of the CA term, the spear; 1 is none (default %(default)s)")
    add("--shield", choices=list(SHIELD_WEIGHT), default=usual.shield, help="what holds the spear in check (default %(default)s)")
    add("--shield-weight", type=float, help="of meanvar and gan (default: 2 and 0.3)")
    add("--schedule", choices=list(SCHEDULES), default=usual.schedule, help="which times the two terms re-noise to (default %(default)s)")
    add("--raw", action="store_true", help="terms as they are, not normalised item by item")
    add("--images", metavar="DIR", help="real pictures; the shields meanvar and gan need them")
    add("--shift", type=float, help="of the student's times and of every re-noising time (default: the teacher's)")
    add("--size", type=int, metavar="PIXELS", help="height and width to distil at (default: the teacher's own)")
    add("--iterations", type=int, default=400, help="updates of the student (default %(default)s)")
    add("--batch-size", type=int, default=16, help="default %(default)s")
    add("--fake-updates", type=int, default=usual.fake_updates, help="of fake or discriminator, for one of the student (default %(default)s)")
    add("--warmup-fake", type=int, default=0, metavar="N", help="iterations before the first update of the student (default %(default)s)")
    add("--lr", type=float, default=2e-4, help="the student's learning rate (default %(default)s)")
    add("--fake-lr", type=float, default=1e-3, help="that of the fake, or of the discriminator (default %(default)s)")
    add("--ema", type=float, default=0.98, help="how much of the average of the student's weights an update keeps (default %(default)s)")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--sample-every", type=int, default=100, metavar="N", help="iterations between checkpoints with sample pictures (default %(default)s)")
    add("--log-every", type=int, default=10, metavar="N", help="iterations averaged in one line of log.jsonl (default %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], help="of matrix products; weights are float32 (default: float32 on a CPU, bfloat16 elsewhere)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks: many minutes before the first "
        "iteration (default: no)")
    parser.set_defaults(**dict(defaults))
    args = parser.parse_args(arguments)
    for name in ("teacher", "prompts", "images"):             # a run may be resumed from elsewhere
        if getattr(args, name) is not None:
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    return args


def check(args):
    """UserError for options that make no sense."""
    whole = {"steps": 1, "iterations": 1, "batch_size": 1, "fake_updates": 1, "warmup_fake": 0, "sample_every": 1, "log_every": 1, "size": 1}
    for name, low in whole.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} should be at least {low}, not {getattr(args, name)}")
    for name, low, high in (("alpha", 1, math.inf), ("shield_weight", 0, math.inf), ("shift", 0, math.inf), ("lr", 0, math.inf),
                            ("fake_lr", 0, math.inf), ("ema", 0, 1), ("seed", 0, 10 ** 12)):
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} should be a number from {low} to {high}, not {value}")
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it: give one of them")
    if args.shield == "none" and args.alpha == 1:
        raise UserError("--shield none with --alpha 1 leaves nothing to learn from: give one of the two terms")
    if args.shield in ("none", "meanvar") and args.warmup_fake:
        raise UserError(f"--shield {args.shield} has no fake to warm up: leave out --warmup-fake")
    if args.shield in ("meanvar", "gan") and args.images is None:
        raise UserError(f"--shield {args.shield} needs real pictures: give a folder with --images DIR, or take --shield dm, which needs none")
    if args.prompts is None and Path(args.teacher) != (BUNDLED / "teacher").resolve():
        raise UserError("a teacher of your own needs prompts of its own: give --prompts FILE, one prompt a line")


def settings_of(args, pipeline):
    """-> Settings; a shift that args leaves open is the teacher's."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    settings = Settings(**given | {"shift": pipeline.shift if args.shift is None else args.shift, "normalise": not args.raw})
    time_schedule(settings.steps, settings.shift)             # UserError for a shift too extreme
    return settings


def read_config(out):
    """The config.json of a run, or None where `out` is not the folder of one."""
    try:
        config = read_json(out / "config.json")
    except UserError:
        return None
    return config if config.get("made_by") == "distill.py" else None


def resumed(args):
    """The options of the run in args.out, and over them those given now. UserError where they would make it another run."""
    out = Path(args.out)
    config = read_config(out)
    if config is None or not (out / "state.pt").exists():
        raise UserError(f"--resume: there is no checkpoint of a run in {out}" + ("; begin again with --overwrite" if config else ""))
    args = parse_arguments(defaults={name: value for name, value in config["options"].items() if name != "out"})
    for name, value in config["options"].items():
        if name not in FREE and getattr(args, name) != value:
            raise UserError(f"--resume: --{name.replace('_', '-')} was {value} in {out}, not {getattr(args, name)}; "
                            "leave it out to go on, or begin a run in another --out")
    return args


def prepare_folder(args, settings):
    """Makes args.out the folder of this run, and writes down how to repeat it."""
    out = Path(args.out)
    if not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        if read_config(out) is None:
            raise UserError(f"--out {out} exists and is not a run of distill.py; name a new directory")
        if not args.overwrite:
            go_on = "go on with it by --resume, " if (out / "state.pt").exists() else ""
            raise UserError(f"there is a run in {out} already: {go_on}remove it by --overwrite, or give another --out")
        for name in RUN_FILES:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    options = {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")}
    config = {"made_by": "distill.py", "torch": torch.__version__, "options": options, "settings": asdict(settings)}
    save_whole(out / "config.json", lambda part: part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))
    (out / "log.jsonl").touch()


@explained("a smaller --batch-size or --size, or --dtype bfloat16")
def main():
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")     # RMSNorm under autocast, on purpose
    args = parse_arguments()
    if args.resume:
        args = resumed(args)
    check(args)
    device = pick_device(args.device)
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if device.type == "cpu" and args.dtype == "bfloat16" and not has_bfloat16_products():
        warnings.warn("this processor multiplies bfloat16 slowly: --dtype float32 takes a fraction of the time")
    prompts = read_prompts(args.prompts or BUNDLED / "prompts.txt")
    if not prompts:
        raise UserError(f"there is no prompt in {args.prompts}")
    pipeline = load_pipeline(args.teacher, device)
    pipeline.size = args.size or pipeline.size
    check_size(pipeline, pipeline.size, pipeline.size)
    if pipeline.trained_steps:
        warnings.warn(f"the teacher is itself a student of {pipeline.trained_steps} steps: its guidance is spent, and CA has nothing to work with")
    keep_freed_memory()
    settings = settings_of(args, pipeline)
    real = encode_images(pipeline, args.images) if args.images else None
    prepare_folder(args, settings)
    distil(pipeline, prompts, settings, args, real)
    student = shlex.quote(str(Path(args.out) / "student"))
    print(f"the student is in {student}, beside it samples and log. To sample it:\n"
          f"    python sampler.py {shlex.quote(prompts[0])} --model {student}")
    if args.prompts is None:
        print(f"To score it beside its teacher on prompts neither has seen:\n"
              f"    python tutorials/shapes/evaluate.py --model tutorials/shapes/teacher {student}")


if __name__ == "__main__":
    run_command(main)
