"""Decoupled DMD: distils a many-step teacher into a few-step student, from prompts alone.

    python distill.py                                            the bundled teacher: half an hour
    python distill.py --teacher DIR --prompts FILE --out DIR     any other teacher

"Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield" (2511.22677).
Three networks, each a callable (x, t, text) -> v as in model.py. All start as the same weights:

    teacher   frozen; knows the data        student   G, the few-step generator
    fake      keeps learning the student's outputs

The student's output x = G(z_t) is re-noised to a time tau. The estimates x_hat of the data from
there say where to push x. The push has two terms, each with its own tau and noise (Eq. 6, 8):

    Delta_DM = x_hat(teacher, tau_dm, text) - x_hat(fake, tau_dm, text)                 the shield
    Delta_CA = (alpha - 1) (x_hat(teacher, tau_ca, text) - x_hat(teacher, tau_ca, ""))  the spear

alpha is the guidance scale; the guidance of sampler.py is alpha - 1. What differs from Algorithm 1:
  - The fake learns velocities: the paper's loss |x_hat - x|^2 divided by (1 - tau)^2.
  - It learns on the images made before the student's update; the paper makes new ones.
Where the paper says nothing: z_t comes from Euler steps; a batch trains one step; each term is
divided by mean |x - x_hat(teacher, text)| of its item; the fake learns five times as fast, without
momentum; the student's rate falls to 0. Running averages of the student's weights are saved.
"""

import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # see sampler.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import convert_weights
import formats
import hardware
import sampler
import scale
from convert_weights import Parser, UserError, fingerprint, number, run_command
from files import write_whole
from sampler import encode_prompts, sample, time_schedule

# --- The two terms --------------------------------------------------------------------------------


def per_item(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...) item by item."""
    return t.view(-1, *[1] * (x.ndim - 1))


def renoise(x, t, noise):
    """Data x at time t: x_t = t x + (1 - t) noise."""
    return per_item(t, x) * x + (1 - per_item(t, x)) * noise


def data_estimate(net, x_t, t, text):
    """The net's estimate of the clean data behind x_t at time t: x_hat = x_t + (1 - t) v."""
    return x_t + (1 - per_item(t, x_t)) * net(x_t, t, text)


def normalized(delta, x, x_hat, floor=0.05):
    """Divides delta by mean |x - x_hat| of its item, at least `floor` (DMD, 2311.18828, Eq. 8).

    Both shrink as tau goes to 1. `floor`: no division by next to nothing. See tutorials/03.
    """
    return delta / per_item((x - x_hat).abs().flatten(1).mean(1).clamp(min=floor), x)


@torch.no_grad()
def distribution_matching(teacher, fake, x, t, text, noise, normalize=True):
    """Delta_DM (B, ...), the shield: from the student's distribution to the data's (Eq. 6).

    x: the student's outputs; t: tau_dm (B,); normalize=False: the bare difference. No gradient.
    See tutorials/03.
    """
    x_t = renoise(x, t, noise)
    x_hat_real = data_estimate(teacher, x_t, t, text)
    delta = x_hat_real - data_estimate(fake, x_t, t, text)
    return normalized(delta, x, x_hat_real) if normalize else delta


@torch.no_grad()
def cfg_augmentation(teacher, x, t, text, null_text, alpha, noise, normalize=True):
    """Delta_CA (B, ...), the spear: what the text changes in the teacher's estimate (Eq. 6).

    t: tau_ca (B,); null_text: the empty prompt, of batch 1 or B. No gradient. See tutorials/03.
    """
    x_t = renoise(x, t, noise)
    cond = data_estimate(teacher, x_t, t, text)
    delta = (alpha - 1) * (cond - data_estimate(teacher, x_t, t, null_text))
    return normalized(delta, x, cond) if normalize else delta


def proxy_loss(x, delta):
    """1/2 mean |x - stop_grad(x + delta)|^2, of gradient -delta / x.numel(). See tutorials/03."""
    return 0.5 * (x - (x + delta).detach()).square().mean()


def fake_loss(fake, x, t, text, noise):
    """Flow matching on x, without gradient to it: mean |v - (x - noise)|^2. See tutorials/03."""
    return F.mse_loss(fake(renoise(x.detach(), t, noise), t, text), x.detach() - noise)


# --- Times, and what the student is given ---------------------------------------------------------


def shift_time(u, shift):
    """The shift of sampler.time_schedule for any times u. Shift 1 / s undoes shift s."""
    return u / (u + shift * (1 - u))


# Lowest (tau_dm, tau_ca) in units of the student's time t. "coupled" is DMD: one tau for both.
SCHEDULES = {"coupled": (0, 0), "full": (0, 0), "constrained": (1, 1), "hybrid": (0, 1)}


def sample_tau(schedule, t, shift=1.0, generator=None):
    """Re-noising times (tau_dm, tau_ca), (B,) each, for the student's times t (Sec. 4.3).

    Each is uniform from its unshifted lowest value to 1, and then shifted. See tutorials/05.
    """
    draws = torch.rand(2, len(t), generator=generator, dtype=t.dtype).to(t.device)
    if schedule == "coupled":
        draws[1] = draws[0]
    low = torch.tensor(SCHEDULES[schedule], dtype=t.dtype, device=t.device)[:, None] * t    # (2, B)
    start = shift_time(low, 1 / shift)
    tau = shift_time(start + (1 - start) * draws, shift)
    return tau.maximum(low).unbind()                       # rounding could end just below `low`


def backward_simulation(student, noise, text, times, step):
    """The student's output x = G(z_t) at t = times[step] -> x (B, ...), t (B,). See tutorials/04.

    z_t is where sampler.sample takes the noise by then. Gradient: through the last call only.
    """
    z = sample(student, noise, text, times[:step + 1])
    t = times[step].to(noise).expand(len(noise))
    return data_estimate(student, z, t, text), t


# --- One iteration: Algorithm 1 -------------------------------------------------------------------


@dataclass
class Settings:
    """Numbers and choices of one iteration."""
    steps: int = 4               # of the student's schedule
    alpha: float = 4.0           # guidance scale of the spear; 1 is none
    schedule: str = "hybrid"     # of the re-noising times, a key of SCHEDULES
    fake_schedule: str = "full"  # of the fake's times: all of 0 to 1 before the shift (paper)
    shift: float = 3.0           # of the student's times and of every re-noising time
    normalize: bool = True       # divide each term by the teacher's mean error |x - x_hat|
    fake_updates: int = 2        # for one update of the student
    clip: float = 1.0            # largest norm of a gradient


def training_step(nets, text, null_text, noise, settings, generator=None):
    """One iteration: an update of the student from `noise` (B, ...), then those of the fake.

    nets: Nets, below. `generator` makes all draws. -> metrics {name: number}. See tutorials/04.
    """
    s = settings
    times = time_schedule(s.steps, s.shift)
    step = int(torch.randint(s.steps, (), generator=generator))
    x, t = backward_simulation(nets.student, noise, text, times, step)

    tau_dm, tau_ca = sample_tau(s.schedule, t, s.shift, generator)
    noise_dm = normal_like(x, generator)
    noise_ca = noise_dm if s.schedule == "coupled" else normal_like(x, generator)
    dm = nets.dm(nets.teacher, nets.fake, x, tau_dm, text, noise_dm, s.normalize)
    ca = nets.ca(nets.teacher, x, tau_ca, text, null_text, s.alpha, noise_ca, s.normalize)
    loss = proxy_loss(x, dm + ca) + nets.other_shield.loss(x)
    update(loss, nets.student_optimizer, s.clip)

    nets.other_shield.update(x.detach())
    losses = train_fake(nets, x, t, text, s, generator)
    return {"loss": loss.item(), **losses, **term_metrics(x, dm, ca)}


def train_fake(nets, x, t, text, settings, generator=None):
    """The fake's updates of one iteration on the student's outputs x -> {"fake_loss": the last}."""
    losses = {}
    for _ in range(settings.fake_updates):
        tau, _ = sample_tau(settings.fake_schedule, t, settings.shift, generator)
        loss = nets.fake_loss(nets.fake, x, tau, text, normal_like(x, generator))
        update(loss, nets.fake_optimizer, settings.clip)
        losses["fake_loss"] = loss.item()
    return losses


# --- The parts of an iteration --------------------------------------------------------------------


class NoOtherShield:
    """A shield beside DM or in its place: here none. tutorials/shields.py has two."""

    def loss(self, x):
        return 0.0

    def update(self, x):
        pass


@dataclass
class Nets:
    """The networks, their optimizers, and the functions that an ablation replaces."""
    teacher: Callable
    student: Callable
    fake: Callable
    student_optimizer: torch.optim.Optimizer
    fake_optimizer: torch.optim.Optimizer
    dm: Callable = distribution_matching
    ca: Callable = cfg_augmentation
    fake_loss: Callable = fake_loss
    other_shield: NoOtherShield = field(default_factory=NoOtherShield)


def no_dm(teacher, fake, x, *_):
    """In place of distribution_matching: the spear alone."""
    return torch.zeros_like(x)


def normal_like(x, generator=None):
    """Gaussian noise like x, drawn on the CPU: a seed gives the same noise on every device."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def update(loss, optimizer, clip):
    """One optimizer step. FloatingPointError, and no step, if the gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not math.isfinite(norm):
        raise FloatingPointError("a loss or its gradient is not finite")
    optimizer.step()


@torch.no_grad()
def term_metrics(x, dm, ca):
    """The spread of the outputs, and the size and the angle of the two terms."""
    return {"x_mean": x.mean().item(), "x_std": x.std().item(),
            "dm_rms": dm.square().mean().sqrt().item(), "ca_rms": ca.square().mean().sqrt().item(),
            "cosine": F.cosine_similarity(dm.flatten(), ca.flatten(), dim=0).item()}


def warm_up(nets, text, noise, settings, generator=None):
    """The fake's updates of one iteration without an update of the student."""
    times = time_schedule(settings.steps, settings.shift)
    step = int(torch.randint(settings.steps, (), generator=generator))
    with torch.no_grad():
        x, t = backward_simulation(nets.student, noise, text, times, step)
    return train_fake(nets, x, t, text, settings, generator)


# --- The run --------------------------------------------------------------------------------------

RAMP = 20              # updates in which the student's learning rate would rise to --lr
MAX_SKIPPED = 10       # iterations in a row without a finite gradient that end a run


class Run:
    """A distillation in the folder args.out: log.jsonl, samples/, student/, checkpoints/.

    adjust(learners) may change what is trained before the optimizers are made; parts: fields of
    Nets that an ablation replaces. tutorials/cards/sweep.py uses both.
    """

    def __init__(self, pipeline, prompts, settings, args, adjust=None, **parts):
        self.pipeline, self.prompts, self.settings, self.args = pipeline, prompts, settings, args
        self.out, self.processes = Path(args.out), scale.Processes(pipeline.device)
        self.null_text = encode_prompts(pipeline, [""])
        first = range(min(16, len(prompts)))
        self.shown = [self.encode(first[i:i + args.batch_size]) for i in first[::args.batch_size]]
        self.text_of = self.encode
        if args.cache_features:
            self.text_of = scale.FeatureCache(
                args.cache_features, pipeline, prompts, self.processes)
            pipeline.text_encoder.cpu()        # frees the GPU; nothing more is encoded
        networks = scale.LowRankNetworks if args.lora else scale.WholeNetworks
        self.learners = networks(pipeline.dit, args, self.processes)
        if adjust:
            adjust(self.learners)
        nets = {name: scale.AutocastNet(net, pipeline.device, args.dtype, args.accumulate)
                for name, net in self.learners.nets.items()}
        self.averaged, self.counted = nets.pop("averaged"), tuple(nets.values())
        # Momentum for the student's noisy gradient; none for the fake, which must follow quickly.
        weights = self.learners.weights
        nets["student_optimizer"] = scale.adam(weights["student"], args.lr, 0.9)
        nets["fake_optimizer"] = scale.adam(weights["fake"], args.fake_lr, 0.0)
        if args.no_dm:
            nets["dm"] = no_dm
        self.nets = Nets(**{**nets, **parts})
        side = pipeline.size // pipeline.vae.config.downsampling
        self.shape = (pipeline.dit.config.in_channels, side, side)
        times = time_schedule(pipeline.steps, pipeline.shift)
        reference = self.sample(self.nets.teacher, times, pipeline.guidance)
        self.reference_std = float(reference.std())
        all_times = shift_time(torch.arange(0.05, 1, 0.1), settings.shift)
        self.fake_floor = scale.mean_loss(
            partial(self.nets.fake_loss, self.nets.teacher), reference, self.shown, all_times)
        self.progress = scale.Progress()
        if not args.overwrite:                 # begin_run will remove the old checkpoints
            self.progress = scale.load_checkpoint(self.out, self.tensors(), self.processes)
        if self.progress.done > args.iterations:
            raise UserError(f"--iterations {args.iterations}: the run in {args.out} has done "
                            f"{self.progress.done} already; give at least so many")

    def encode(self, items):
        return encode_prompts(self.pipeline, [self.prompts[i] for i in items])

    def batch(self, i):
        """Iteration i: this process's text and noise, the Settings, the generator of its draws.

        Each iteration has a generator of its own, so a resumed run is the run that never stopped.
        """
        seed, size = 10 ** 6 * self.args.seed + i, self.args.batch_size
        generator = torch.Generator().manual_seed(seed)
        items = torch.randint(len(self.prompts), (size,), generator=generator)
        noise = torch.randn(size, *self.shape, generator=generator)
        settings = replace(self.settings, steps=random.Random(seed).choice(self.args.steps))
        text = self.text_of(self.processes.share(items).tolist())
        return text, self.processes.share(noise).to(self.pipeline.device), settings, generator

    def warm_up_once(self, i):
        """The fake alone learns what the student makes at the start."""
        self.attempt(warm_up, *self.batch(i))
        self.progress.warmed = i + 1

    def attempt(self, step, *arguments):
        """step(nets, *arguments) -> its metrics; None, and counted, if a gradient is not finite.

        UserError after MAX_SKIPPED of these in a row.
        """
        p = self.progress
        try:
            with self.processes.shared_draws():
                metrics = step(self.nets, *arguments)
        except FloatingPointError:
            p.skipped, p.in_a_row = p.skipped + 1, p.in_a_row + 1
            if p.in_a_row >= MAX_SKIPPED:
                raise UserError(
                    f"{MAX_SKIPPED} iterations in a row gave no finite gradient: try a smaller "
                    "--lr or --alpha; the last good checkpoint, if there is one, is in "
                    f"{self.out}/checkpoints") from None
            return None
        p.in_a_row = 0
        return metrics

    def iterate(self, i):
        """training_step, then the student's average, unless a gradient was not finite."""
        args, weights = self.args, self.learners.weights
        text, noise, settings, generator = self.batch(args.warmup + i)
        for group in self.nets.student_optimizer.param_groups:
            group["lr"] = learning_rate(i, args)
        for net in self.counted:
            net.forwards = net.backwards = 0
        self.progress.done = i + 1
        metrics = self.attempt(training_step, text, self.null_text, noise, settings, generator)
        if metrics is None:
            return
        # A short memory at first, so that the initial weights are soon forgotten.
        decay = min(args.ema, (i + 1) / (i + 10))
        scale.interpolate(weights["averaged"], weights["student"], 1 - decay)
        if args.follow:
            scale.interpolate(weights["fake"], weights["student"], args.follow)
        for name in ("forwards", "backwards"):
            metrics[name] = sum(getattr(net, name) for net in self.counted) / len(noise)
        self.progress.recent.append(self.processes.mean(metrics))

    @torch.no_grad()
    def sample(self, net, times, guidance=0.0):
        """Latents of the first prompts; image i starts from the noise of seed i."""
        latents = []
        for text in self.shown:
            seeds = range(len(latents), len(latents) + len(text.lengths))
            noise = torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(s))
                                 for s in seeds]).to(self.pipeline.device)
            latents += sample(net, noise, text, times, guidance, self.null_text)
        return torch.stack(latents)

    def averaged_student(self):
        """The averaged student as a Pipeline. All processes have to call this.

        With adapters or shards its DiT is a copy on the CPU, and None on all processes but the
        first. Otherwise it is the network that training goes on with.
        """
        steps = self.args.steps
        return replace(self.pipeline, dit=self.learners.plain(), shift=self.settings.shift,
                       steps=steps[0], guidance=0.0, trained_steps=steps if steps[1:] else steps[0])

    @torch.no_grad()
    def save_student(self):
        """samples/ and student/; each file is written beside its place and renamed."""
        latents = self.sample(self.averaged, time_schedule(self.args.steps[0], self.settings.shift))
        student, p = self.averaged_student(), self.progress
        if self.processes.rank > 0:
            return
        images = sampler.decode(student, latents)
        p.saturation = float((images.amax(1) - images.amin(1)).mean())
        picture = partial(scale.picture_grid(images).save, format="PNG")
        write_whole(self.out / "samples" / f"{p.done:06d}.png", picture)
        convert_weights.save_pipeline(
            self.out / "student", student.dit, student.text_encoder, student.vae,
            student.tokenizer, student.shift, dtype=torch.bfloat16, steps=student.steps,
            guidance=0.0, size=student.size, trained_steps=student.trained_steps)
        if self.args.lora:
            self.learners.adapters.save("averaged", self.out / "lora.safetensors")

    def tensors(self):
        """What a checkpoint holds: {name: tensor} of weights and of the optimizers' state."""
        tensors, nets = {}, self.nets
        optimizers = {"student": nets.student_optimizer, "fake": nets.fake_optimizer}
        for who, weights in self.learners.weights.items():
            for name, p in weights.items():
                tensors[f"{who}.{name}"] = p.detach()
                state = optimizers[who].state[p] if who in optimizers else {}
                tensors |= {f"{who}.{name}.{key}": value for key, value in state.items()}
        return tensors

    def save_checkpoint(self):
        place = self.out / "checkpoints"
        scale.save_checkpoint(place, self.tensors(), self.progress, self.args.keep, self.processes)

    def log(self):
        """A line of log.jsonl: means over the iterations since the last line."""
        p, line = self.progress, {}
        for name in p.recent[0] if p.recent else ():
            line[name] = sum(metrics[name] for metrics in p.recent) / len(p.recent)
        if p.recent:
            line["std_ratio"] = line["x_std"] / self.reference_std
        if line.get("ca_rms"):                 # 0 where --alpha is 1
            line["dm_over_ca"] = line["dm_rms"] / line["ca_rms"]
        line |= {"skipped": p.skipped, "seconds": p.seconds, "fake_floor": self.fake_floor,
                 "fake_lr": self.args.fake_lr, "lr": learning_rate(p.done - 1, self.args)}
        if p.saturation:
            line["saturation"] = p.saturation
        line = {name: float(f"{value:.6g}") for name, value in line.items()}
        p.recent = []
        if self.processes.rank == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": p.done, **line}) + "\n")

    def end_if_asked(self, signal_number):
        """Saves a checkpoint and ends the process, if a signal came to any of the processes."""
        asked = self.processes.mean(
            {"any": signal_number > 0, "int": signal_number == signal.SIGINT})
        if asked["any"]:
            self.save_checkpoint()
            print(f"saved after iteration {self.progress.done}; --resume goes on", file=sys.stderr)
            raise SystemExit(130 if asked["int"] else 0)


def learning_rate(i, args):
    """The student's rate in update i: the smaller of a rise over RAMP updates and a fall to 0."""
    fall = 1 if args.constant_rate else 1 - i / args.iterations
    return args.lr * max(min((i + 1) / RAMP, fall), 0)


def train(run, callback=None):
    """Distils, from where the Run stands to args.iterations, and saves on the way.

    SIGINT and SIGTERM save a checkpoint and end the process, with exit codes 130 and 0.
    callback(iteration, student): after each checkpoint; its time is not counted. The student is
    Run.averaged_student().
    """
    args, p, began = run.args, run.progress, time.perf_counter() - run.progress.seconds
    missing = range(p.done, args.iterations)
    bar = tqdm(desc="distilling", total=args.warmup + args.iterations, initial=p.warmed + p.done,
               disable=run.processes.rank > 0)
    # On a CPU the plain attention kernel's backward is faster than the fused kernel's. It is chosen
    # for both passes: --checkpoint-activations computes blocks again in the backward pass.
    is_cpu = run.pipeline.device.type == "cpu"
    kernel = sdpa_kernel(SDPBackend.MATH) if is_cpu else nullcontext()
    with scale.StopSignals() as stop, scale.saved_if_prompts_change(run), bar, kernel:
        for i in range(p.warmed, args.warmup):
            run.warm_up_once(i)
            bar.update()
            run.end_if_asked(stop.number)
        for i in missing:
            run.iterate(i)
            bar.update()
            p.seconds = time.perf_counter() - began
            last = p.done == args.iterations
            is_due = (p.done % args.sample_every == 0 and not p.in_a_row) or last
            if is_due:
                run.save_student()
            if p.done % args.log_every == 0 or last:
                run.log()
            if is_due:
                run.save_checkpoint()          # after the line that belongs to it
            if is_due and callback:
                paused = time.perf_counter()
                callback(p.done, run.averaged_student())
                began += time.perf_counter() - paused
            run.end_if_asked(stop.number)
        if not missing:                        # the run had ended; its student may be gone
            run.save_student()


# --- Command line ---------------------------------------------------------------------------------

BUNDLED = Path(__file__).resolve().parent / "tutorials" / "cards"
MAY_CHANGE = {"out", "teacher", "prompts", "cache_features", "iterations", "sample_every", "keep",
              "log_every", "device", "accumulate", "checkpoint_activations", "resume", "overwrite"}


def step_numbers(text):
    """An argparse type: "4,1,2,8" -> [4, 1, 2, 8]."""
    return [number(1, 10000, int)(part) for part in text.split(",")]


def parse_arguments(arguments=None):
    """The command line -> a namespace. UserError names the option that is wrong."""
    whole, usual = partial(number, kind=int), Settings()
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    for name, kind, default, metavar, text in [
            ("teacher", model_name, None, "DIR", "an undistilled model (default: the bundled one)"),
            ("prompts", absolute, None, "FILE", "one prompt a line (default: the bundled ones)"),
            ("out", formats.path_name, "runs/distil", "DIR", "directory of the run"),
            ("steps", step_numbers, "4,1,2,8", "N[,N...]", "steps of the student; of several one "
             "is drawn in each iteration, and the first is its default for sampling"),
            ("alpha", number(1, 100), usual.alpha, "A", "guidance scale of CA; 1: no CA"),
            ("shift", number(above=0, high=1e3), None, "S", "time shift (default: the teacher's)"),
            ("size", whole(1, 2 ** 15), None, "PIXELS", "of a side (default: the teacher's)"),
            ("iterations", whole(1, 10 ** 8), 300, "N", "updates of the student"),
            ("batch-size", whole(1, 10 ** 5), 16, "N", "prompts in an iteration"),
            ("fake-updates", whole(1, 1000), usual.fake_updates, "N", "the fake's updates in each"),
            ("warmup", whole(0, 10 ** 8), 0, "N", "iterations of the fake alone before the first"),
            ("lr", number(0, 100), 2e-4, "R", "the student's learning rate"),
            ("fake-lr", number(0, 100), 1e-3, "R", "the fake's learning rate"),
            ("ema", number(0, 1), 0.98, "E", "share of the average that an update keeps"),
            ("follow", number(0, 1), 0.0, "F", "pull the fake by this share to the student (IDA)"),
            ("lora", whole(1, 10 ** 5), None, "RANK", "train adapters in one shared teacher"),
            ("accumulate", whole(1, 10 ** 4), 1, "K", "compute each batch in K parts"),
            ("cache-features", absolute, None, "DIR", "encode all prompts once, into it"),
            ("seed", whole(0, 10 ** 12), 0, "N", "seed of all draws"),
            ("sample-every", whole(1, 10 ** 8), 100, "N", "iterations between checkpoints"),
            ("keep", whole(1, 10 ** 5), 2, "N", "checkpoints that are kept"),
            ("log-every", whole(1, 10 ** 8), 10, "N", "iterations in one line of log.jsonl"),
            ("device", str, "auto", "NAME", "cuda, mps or cpu")]:
        shown = "" if default is None else " (default: %(default)s)"
        add(f"--{name}", type=kind, default=default, metavar=metavar, help=text + shown)
    for name, text in [("no-dm", "the spear alone: without distribution matching"),
                       ("no-normalize", "terms as they are, not divided by the teacher's error"),
                       ("constant-rate", "the learning rate does not fall (shows the collapse)"),
                       ("checkpoint-activations", "less memory, a third more computation"),
                       ("resume", "go on with the run in --out, with its options"),
                       ("overwrite", "remove the run in --out and begin again")]:
        add(f"--{name}", action="store_true", help=text)
    add("--schedule", choices=list(SCHEDULES), default=usual.schedule,
        help="of re-noising times (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of matrix products (default: float32 on a CPU, bfloat16 elsewhere)")
    args = parser.parse_args(arguments)
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it: give one of them")
    if args.no_dm and (args.alpha == 1 or args.warmup or args.follow):
        raise UserError("--no-dm leaves CA alone, without a fake: it goes with an --alpha above 1, "
                        "and not with --warmup or --follow")
    for name in ("fake_lr", "fake_updates") if args.no_dm else ():
        if getattr(args, name) != parser.get_default(name):
            warnings.warn(f"--no-dm trains no fake: --{name.replace('_', '-')} has no effect",
                          stacklevel=1)
    if args.teacher and not args.prompts and not args.resume:
        raise UserError("a teacher of your own needs prompts: give --prompts FILE, one a line")
    return args


def absolute(path):
    """An argparse type: a path that stays right in another directory."""
    return str(Path(formats.path_name(path)).absolute())


def model_name(path):
    """An argparse type: an absolute path, or a name on the hub."""
    return path if formats.is_hub_name(path) else absolute(path)


def make_settings(args, pipeline):
    """The Settings of a run; a shift that is not given is the teacher's."""
    shift = pipeline.shift if args.shift is None else args.shift
    for steps in args.steps:
        time_schedule(steps, shift)            # UserError if the shift is too extreme
    return Settings(
        steps=args.steps[0], alpha=args.alpha, schedule=args.schedule, shift=shift,
        normalize=not args.no_normalize, fake_updates=0 if args.no_dm else args.fake_updates)


def resumed_arguments(args, given):
    """The options of the run in args.out, and over them those that are given now."""
    out = Path(args.out)
    config = scale.read_run(out)
    if config is None:
        raise UserError(f"--resume: there is no run in {out}")
    words = config.get("arguments")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{out}/config.json is damaged: it has no list of arguments")
    before, args = parse_arguments(words), parse_arguments([*words, *given])
    args.teacher = args.teacher and str(formats.located(args.teacher))
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and value != getattr(before, name):
            raise UserError(
                f"--resume: --{name.replace('_', '-')} was {getattr(before, name)} in {out}, not "
                f"{value}; leave it out to go on, or begin a run in another --out")
    for name in ("teacher", "prompts"):
        if not Path(getattr(args, name) or out).exists():
            raise UserError(f"--resume: {getattr(args, name)} is gone; if moved, give --{name}")
    if config.get("fingerprints") != fingerprints(args):
        raise UserError(f"--resume: the teacher or the prompts of {out} are others now; name those "
                        "of the run, wherever they are, or begin a run in another --out")
    return args


def fingerprints(args):
    """What the teacher and the prompts are, wherever they lie."""
    files = args.teacher or BUNDLED / "teacher", args.prompts or BUNDLED / "prompts.txt"
    return [fingerprint(file) for file in files]


@hardware.advise_on_errors("a smaller --batch-size or --size, --accumulate, "
                           "--checkpoint-activations or --lora")
def main():
    """The command line."""
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    warnings.filterwarnings("ignore", "torch.distributed is disabled|FSDP2-wrapped module")
    args = parse_arguments()
    if args.resume:
        args = resumed_arguments(args, sys.argv[1:])
    args.teacher = args.teacher and str(formats.located(args.teacher))
    device = sampler.find_device(args.device)
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    sampler.keep_freed_memory()
    prompts = scale.PromptFile(args.prompts or BUNDLED / "prompts.txt")
    processes = scale.Processes(device)
    share, rest = divmod(args.batch_size, processes.count)
    if rest:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared equally by "
                        f"{processes.count} processes")
    if args.accumulate > share:
        raise UserError(f"--accumulate {args.accumulate} is more parts than a process has images: "
                        f"{share} of --batch-size {args.batch_size}")
    # Weights that are trained whole are float32, and the teacher is like them.
    dtype = getattr(torch, args.dtype if args.lora or processes.count > 1 else "float32")
    pipeline = sampler.load_pipeline(args.teacher or BUNDLED / "teacher", device, dtype)
    if (args.lora or 0) > pipeline.dit.config.dim:
        raise UserError(f"--lora {args.lora}: the rank of these weights is at most "
                        f"{pipeline.dit.config.dim}; without --lora they are trained whole")
    pipeline.size = args.size or pipeline.size
    sampler.check_size(pipeline, pipeline.size, pipeline.size)
    if pipeline.trained_steps:
        warnings.warn("the teacher was distilled already: guidance changes it little, so CA has "
                      "little effect", stacklevel=1)
    settings = make_settings(args, pipeline)
    config = {"made_by": "distill.py", "torch": torch.__version__,
              "fingerprints": fingerprints(args), "arguments": scale.as_arguments(args)}
    # Before training there is nothing to save: SIGTERM only ends the process. It ends by an
    # exception, so temporary files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with processes.end_together(), scale.folder_of_run(args, config, processes):
        run = Run(pipeline, prompts, settings, args)
        scale.begin_run(args, config, processes)
        train(run)
    if processes.rank == 0:
        student = str(Path(args.out) / "student")
        print(f"the student is in {student}; to sample it:\n"
              f"    {scale.sampling_command(prompts.first, student)}")


if __name__ == "__main__":
    run_command(main)
