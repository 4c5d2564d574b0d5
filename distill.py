"""Decoupled DMD: distils a many-step teacher into a few-step student, from prompts alone.

    python distill.py                                            the bundled teacher, on a laptop
    python distill.py --teacher DIR --prompts FILE --out DIR     any other teacher

"Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield" (2511.22677).
Three networks, each a callable (x, t, text) -> v as in model.py. All start as the same weights:

    teacher   frozen; knows the data        student   G, the few-step generator
    fake      keeps learning the student's outputs

The student's output x = G(z_t) is re-noised to a time tau. The estimates x_hat of the data from
there say where to push x. The push has two terms, each with its own tau and noise (Eq. 6, 8):

    Delta_DM = x_hat(teacher, tau_dm, text) - x_hat(fake, tau_dm, text)                 the shield
    Delta_CA = (alpha - 1) (x_hat(teacher, tau_ca, text) - x_hat(teacher, tau_ca, ""))  the spear

Differences from the paper's Algorithm 1 (the guidance of sampler.py is alpha - 1):
  - The fake learns velocities: the paper's loss |x_hat - x|^2 divided by (1 - tau)^2.
  - It learns on the images made before the student's update; the paper makes new ones each time.
  - z_t comes from the Euler steps of sampler.py. The paper leaves open how z_t is made.
  - Each term is divided by mean |x - x_hat(teacher, text)| of its item, and the loss weight
    lambda is 1. The paper names no normalizer and no lambda.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # see sampler.py
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, noop_context_fn
from tqdm import tqdm

import convert_weights
import sampler
from convert_weights import Parser, UserError, fingerprint, number, run_command, write_whole
from model import DiT, Text
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
    """Delta over mean |x - x_hat| of its item (Eq. 8 of DMD): both shrink as tau goes to 1."""
    return delta / per_item((x - x_hat).abs().flatten(1).mean(1).clamp(min=floor), x)


@torch.no_grad()
def distribution_matching(teacher, fake, x, t, text, noise, normalize=True):
    """Delta_DM (B, ...), the shield: from the student's distribution to the data's (Eq. 6).

    x: the student's outputs; t: tau_dm (B,); normalize=False: the bare difference. No gradient.
    """
    x_t = renoise(x, t, noise)
    x_hat_real = data_estimate(teacher, x_t, t, text)
    delta = x_hat_real - data_estimate(fake, x_t, t, text)
    return normalized(delta, x, x_hat_real) if normalize else delta


@torch.no_grad()
def cfg_augmentation(teacher, x, t, text, null_text, alpha, noise, normalize=True):
    """Delta_CA (B, ...), the spear: what the text changes in the teacher's estimate (Eq. 6).

    t: tau_ca (B,); null_text: the empty prompt, of batch 1 or B; alpha 1 gives 0. No gradient.
    """
    x_t = renoise(x, t, noise)
    cond = data_estimate(teacher, x_t, t, text)
    delta = (alpha - 1) * (cond - data_estimate(teacher, x_t, t, null_text))
    return normalized(delta, x, cond) if normalize else delta


def proxy_loss(x, delta):
    """1/2 mean |x - stop_grad(x + delta)|^2; its gradient with respect to x: -delta / x.numel()."""
    return 0.5 * (x - (x + delta).detach()).square().mean()


def fake_loss(fake, x, t, text, noise):
    """Flow matching on the student's outputs x: mean |v - (x - noise)|^2. No gradient to x."""
    return F.mse_loss(fake(renoise(x.detach(), t, noise), t, text), x.detach() - noise)


# --- Times, and what the student is given ---------------------------------------------------------


def shift_time(u, shift):
    """The shift of sampler.time_schedule for any times u. Shift 1 / s undoes shift s."""
    return u / (u + shift * (1 - u))


# Lowest tau_dm and tau_ca in units of the student's time t. "coupled" is DMD: one tau for both.
SCHEDULES = {"coupled": (0, 0), "full": (0, 0), "constrained": (1, 1), "hybrid": (0, 1)}


def sample_tau(schedule, t, shift=1.0, generator=None):
    """Re-noising times (tau_dm, tau_ca), (B,) each, for the student's times t (Sec. 4.3).

    Each is uniform from its lowest value to 1 before the shift, which is applied afterwards.
    """
    draws = torch.rand(2, len(t), generator=generator, dtype=t.dtype).to(t.device)
    if schedule == "coupled":
        draws[1] = draws[0]
    low = torch.tensor(SCHEDULES[schedule], dtype=t.dtype, device=t.device)[:, None] * t    # (2, B)
    start = shift_time(low, 1 / shift)
    tau = shift_time(start + (1 - start) * draws, shift)
    return tau.maximum(low).unbind()                       # rounding could end just below `low`


def backward_simulation(student, noise, text, times, step):
    """The student's output x = G(z_t) at t = times[step] -> x (B, ...), t (B,).

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
    alpha: float = 2.0           # guidance scale of the spear; 1 is none
    schedule: str = "hybrid"     # of the re-noising times, a key of SCHEDULES
    fake_schedule: str = "full"  # of the fake's own times: U(0, 1), as in the paper
    shift: float = 3.0           # of the student's times and of every re-noising time
    normalize: bool = True       # each term by its size
    fake_updates: int = 2        # for one update of the student
    clip: float = 1.0            # largest norm of a gradient


def training_step(nets, text, null_text, noise, settings, generator=None):
    """One iteration: an update of the student from `noise` (B, ...), then those of the fake.

    nets: Nets, below. `generator` makes all draws. -> metrics {name: number}
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
    loss = proxy_loss(x, dm + ca) + nets.shield.loss(x)
    update(loss, nets.student_optimizer, s.clip)

    nets.shield.update(x.detach())
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


class NoShield:
    """A regularizer of the student beside DM: none. tutorials/shields.py has two."""

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
    shield: NoShield = field(default_factory=NoShield)


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
    norm = nn.utils.clip_grad_norm_(parameters, clip)
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


# --- Optional: applied to built networks from outside ---------------------------------------------
#
# Number format, less memory, low-rank adapters, several processes. training_step knows none of it.


class AutocastNet:
    """(x, t, text) -> v of a network with matrix products in `dtype`; counts the items that pass.

    With parts > 1 a batch goes through in so many pieces, each computed again in the backward
    pass. Memory is then that of one piece, and the gradient is that of the whole batch.
    """

    def __init__(self, net, device, dtype, parts=1):
        self.net, self.parts = net, parts
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, dtype == "bfloat16")
        self.forwards = self.backwards = 0

    def __call__(self, x, t, text):
        self.forwards += len(x)
        self.backwards += len(x) * torch.is_grad_enabled()
        call, texts = self.net, [text] * self.parts
        if len(text.lengths) > 1:
            texts = map(Text, *(tensor.chunk(self.parts) for tensor in text))
        if torch.is_grad_enabled() and self.parts > 1:
            call = partial(checkpoint, self.net, use_reentrant=True)
            x = x.detach().requires_grad_()    # a reentrant checkpoint needs an input with gradient
        with self.autocast():
            return torch.cat([*map(call, x.chunk(self.parts), t.chunk(self.parts), texts)])


def blocks_of(dit):
    return [*dit.noise_refiner, *dit.context_refiner, *dit.layers]


def checkpoint_activations(dit, contexts=noop_context_fn):
    """Keeps only the inputs of blocks for the backward pass, which computes the rest again."""
    for block in blocks_of(dit):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def plain_dit(config, state):
    """A frozen DiT with these tensors."""
    with torch.device("meta"):
        dit = DiT(config)
    dit.load_state_dict(state, assign=True)
    return dit.requires_grad_(False).eval()


class AdapterLinear(nn.Linear):
    """A frozen linear layer and its low-rank adapters: W x + B A x for the one that is on."""

    def forward(self, x):
        y, name = super().forward(x), self.adapters.on
        if name is None:
            return y
        return y + F.linear(F.linear(x, self.lora_A[name]), self.lora_B[name])


class Adapters:
    """Sets of low-rank adapters (LoRA) in the blocks of one frozen DiT; at most one set is on."""

    def __init__(self, dit, rank, names, seed=0):
        self.dit, self.rank, self.on = dit.requires_grad_(False), rank, None
        generator = torch.Generator().manual_seed(seed)
        blocks = {id(layer) for block in blocks_of(dit) for layer in block.modules()}
        self.layers = {name: layer for name, layer in dit.named_modules()
                       if id(layer) in blocks and type(layer) is nn.Linear}
        for layer in self.layers.values():
            # Orthonormal rows: at full rank a gradient step on B is that step on the weight.
            A = nn.init.orthogonal_(torch.empty(rank, layer.in_features), generator=generator)
            A = A.to(layer.weight.device)
            B = A.new_zeros(layer.out_features, rank)
            layer.lora_A = nn.ParameterDict({name: A.clone() for name in names})
            layer.lora_B = nn.ParameterDict({name: B.clone() for name in names})
            layer.adapters, layer.__class__ = self, AdapterLinear

    @contextmanager
    def use(self, name):
        """A context in which the set `name` is on (None: none)."""
        before, self.on = self.on, name
        try:
            yield
        finally:
            self.on = before

    def call(self, name, x, t, text):
        """The velocity with the set `name` on."""
        with self.use(name):
            return self.dit(x, t, text)

    def contexts(self):
        """For checkpoint_activations: the second computation uses the set that is on now."""
        return nullcontext(), self.use(self.on)

    def weights(self, name):
        return {f"{key}.{matrix}": getattr(layer, matrix)[name]
                for key, layer in self.layers.items() for matrix in ("lora_A", "lora_B")}

    @torch.no_grad()
    def merged(self, name):
        """A plain DiT with the weights W + B A."""
        state = {key: w for key, w in self.dit.state_dict().items() if ".lora_" not in key}
        for key, layer in self.layers.items():
            w = layer.weight + layer.lora_B[name] @ layer.lora_A[name]
            state[f"{key}.weight"] = w.to(layer.weight.dtype)
        return plain_dit(self.dit.config, state)

    def save(self, name, path):
        """Writes a LoRA file: "diffusion_model.", official names, alpha equal to the rank."""
        tensors = {}
        for key, layer in self.layers.items():
            stem = convert_weights.rename(key, convert_weights.OFFICIAL_NAMES["dit"])
            for matrix in ("lora_A", "lora_B"):
                w = getattr(layer, matrix)[name].detach().cpu()
                tensors[f"diffusion_model.{stem}.{matrix}.weight"] = w
            tensors[f"diffusion_model.{stem}.alpha"] = torch.tensor(float(self.rank))
        write_whole(path, partial(save_file, tensors))


class Processes(TorchFunctionMode):
    """The processes of torchrun, of which each takes its share of every batch. Usually one.

    As a context: torch.rand (..., B) and torch.randn (B, ...) draw the whole batch and return
    this process's share. So random numbers belong to an item of the batch, not to a process.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def share(self, x):
        return x.chunk(self.count)[self.rank]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.rand:
            draws = function(*args[:-1], args[-1] * self.count, **kwargs)
            return self.share(draws.movedim(-1, 0)).movedim(0, -1)
        if function is torch.randn:
            return self.share(function(args[0][0] * self.count, *args[0][1:], **kwargs))
        return function(*args, **(kwargs or {}))

    def mean(self, metrics):
        """{name: number}, averaged over processes."""
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        if self.count > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return dict(zip(metrics, (values / self.count).tolist(), strict=True))

    def from_first(self, value=None):
        """What the first process has. It returns when all processes have come here."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, device=self.device)
            dist.barrier()
        return values[0]

    def average_gradient(self, p):
        dist.all_reduce(p.grad.div_(self.count))

    def shard(self, dit, dtype):
        """fully_shard, block by block: float32 weights and sums, products in `dtype`."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, None, False)
        for part in (*blocks_of(dit), dit):
            fully_shard(part.to(self.device, torch.float32), mp_policy=policy)


# --- What a run trains ----------------------------------------------------------------------------

LEARNERS = ("student", "fake", "averaged")


class WholeNetworks:
    """Student, fake and the student's average as copies of the teacher."""

    def __init__(self, teacher, args, processes):
        self.nets = {"teacher": teacher.requires_grad_(False)}
        for name in LEARNERS:
            state = teacher.state_dict()
            if processes.count == 1:           # sharding makes copies anyway
                state = {key: w.to(torch.float32, copy=True) for key, w in state.items()}
            self.nets[name] = plain_dit(teacher.config, state).requires_grad_(name != "averaged")
            if args.checkpoint_activations:
                checkpoint_activations(self.nets[name])
        if processes.count > 1:
            for net in self.nets.values():
                processes.shard(net, args.dtype)
        self.weights = {name: dict(self.nets[name].named_parameters()) for name in LEARNERS}

    def plain(self):
        """The average as a DiT that is not sharded. All processes have to call this."""
        net = self.nets["averaged"]
        if not hasattr(net, "unshard"):
            return net
        state = {name: w.full_tensor().cpu() for name, w in net.state_dict().items()}
        return plain_dit(net.config, state)


class LowRankNetworks:
    """Student, fake and the student's average as sets of adapters in the teacher itself."""

    def __init__(self, teacher, args, processes):
        self.adapters = Adapters(teacher, args.lora, LEARNERS, args.seed)
        if args.checkpoint_activations:
            checkpoint_activations(teacher, self.adapters.contexts)
        self.nets = {name: partial(self.adapters.call, name) for name in LEARNERS}
        self.nets["teacher"] = partial(self.adapters.call, None)
        self.weights = {name: self.adapters.weights(name) for name in LEARNERS}
        self.plain = partial(self.adapters.merged, "averaged")
        for name, weights in self.weights.items():
            for p in weights.values():
                p.requires_grad_(name != "averaged")
                if processes.count > 1 and p.requires_grad:
                    p.register_post_accumulate_grad_hook(processes.average_gradient)


def adam(weights, lr, momentum):
    """AdamW with its state made at once, so that every checkpoint has the same tensors."""
    optimizer = torch.optim.AdamW(weights.values(), lr, betas=(momentum, 0.99), weight_decay=0.0)
    for p in weights.values():
        state = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **state}
    return optimizer


@torch.no_grad()
def interpolate(weights, targets, share):
    """Moves `weights` by this share of the way to `targets`, in place."""
    for name, target in targets.items():
        weights[name].lerp_(target.detach(), share)


# --- Prompts --------------------------------------------------------------------------------------


class PromptFile:
    """The lines of a UTF-8 text file that are not empty, read one at a time: it may be large."""

    def __init__(self, path):
        self.path, self.starts, position = path, [], 0
        try:
            with open(path, "rb") as file:
                for line in file:
                    if line.decode("utf-8-sig").strip():
                        self.starts.append(position)
                    position += len(line)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"cannot read the prompts in {path}: {reason}") from None
        if not self.starts:
            raise UserError(f"--prompts: there is no prompt in {path}")

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            return file.readline().decode("utf-8-sig").strip()


class FeatureCache:
    """The text features of all prompts in safetensors files, encoded once.

    `key` says of which text encoder, tokenizer and prompts; a cache of others is refused.
    """
    SIZE = 256                   # prompts a file

    def __init__(self, folder, pipeline, prompts, key, processes):
        self.folder, self.device, note = Path(folder), pipeline.device, Path(folder) / "cache.json"
        if processes.rank == 0 and not note.exists():
            write_whole(note, lambda part: part.write_text(json.dumps({"key": key})))
        processes.from_first()
        if convert_weights.read_json(note).get("key") != key:
            raise UserError(f"--cache-features: {folder} is of another text encoder, tokenizer or "
                            "prompt file; name another directory")
        starts = range(0, len(prompts), self.SIZE)[processes.rank::processes.count]
        for start in tqdm([i for i in starts if not self.file(i).exists()], "encoding prompts"):
            items = range(start, min(start + self.SIZE, len(prompts)))
            text = encode_prompts(pipeline, [prompts[i] for i in items])
            features = {str(i): f[:n].contiguous() for i, f, n in zip(items, *text, strict=True)}
            write_whole(self.file(start), partial(save_file, features))
        processes.from_first()

    def file(self, i):
        return self.folder / f"{i // self.SIZE:06d}.safetensors"

    def __call__(self, items):
        features = []
        for i in items:
            with safe_open(self.file(i), "pt") as file:
                features.append(file.get_tensor(str(i)))
        lengths = torch.tensor([len(f) for f in features], device=self.device)
        return Text(nn.utils.rnn.pad_sequence(features, batch_first=True).to(self.device), lengths)


# --- The run --------------------------------------------------------------------------------------

WARMUP = 20            # updates over which the student's learning rate rises
MAX_SKIPPED = 10       # iterations in a row without a finite gradient that end a run
FILE_FAULTS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError,
               dcp.api.CheckpointException)


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""
    warmed: int = 0          # iterations of the warm-up
    done: int = 0            # iterations of the student
    skipped: int = 0         # of them, those whose gradient was not finite
    in_a_row: int = 0        # of those, the newest without another between them
    seconds: float = 0.0
    saturation: float = 0.0  # of the newest sample pictures
    recent: list = field(default_factory=list)     # metrics since the last line of the log


class StopSignals:
    """A context in which SIGINT and SIGTERM only set `number`; a second one interrupts at once."""

    def __enter__(self):
        self.number = 0
        self.before = {n: signal.signal(n, self) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, number, frame):
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *_):
        for n, handler in self.before.items():
            signal.signal(n, handler)


class Run:
    """A distillation in the folder args.out: log.jsonl, samples/, student/, checkpoints/.

    adjust(learners) may change what is trained before the optimizers are made; parts: fields of
    Nets that an ablation replaces. tutorials/cards/sweep.py uses both.
    """

    def __init__(self, pipeline, prompts, settings, args, adjust=None, **parts):
        self.pipeline, self.prompts, self.settings, self.args = pipeline, prompts, settings, args
        self.out, self.processes = Path(args.out), Processes(pipeline.device)
        self.draws = self.processes if self.processes.count > 1 else nullcontext()
        self.null_text, first = encode_prompts(pipeline, [""]), range(min(16, len(prompts)))
        self.shown = [self.encode(first[i:i + args.batch_size]) for i in first[::args.batch_size]]
        self.texts = self.encode
        if args.cache_features:
            self.texts = FeatureCache(
                args.cache_features, pipeline, prompts, fingerprints(args)[1:], self.processes)
        networks = LowRankNetworks if args.lora else WholeNetworks
        self.learners = networks(pipeline.dit, args, self.processes)
        if adjust:
            adjust(self.learners)
        nets = {name: AutocastNet(net, pipeline.device, args.dtype, args.accumulate)
                for name, net in self.learners.nets.items()}
        self.averaged, self.counted = nets.pop("averaged"), nets.values()
        # The student uses momentum because its gradient is noisy. The fake uses none because it
        # must follow the student quickly.
        weights = self.learners.weights
        nets["student_optimizer"] = adam(weights["student"], args.lr, 0.9)
        nets["fake_optimizer"] = adam(weights["fake"], args.fake_lr, 0.0)
        self.nets = Nets(**nets | ({"dm": no_dm} if args.no_dm else {}) | parts)
        side = pipeline.size // pipeline.vae.config.downsampling
        self.shape = (pipeline.dit.config.in_channels, side, side)
        times = time_schedule(pipeline.steps, pipeline.shift)
        self.reference_std = float(self.sample(self.nets.teacher, times, pipeline.guidance).std())
        self.progress = self.load()

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
        text = self.texts(self.processes.share(items).tolist())
        return text, self.processes.share(noise).to(self.pipeline.device), settings, generator

    def warm_up(self, i):
        """The fake alone learns what the student makes at the start."""
        text, noise, settings, generator = self.batch(i)
        with self.draws:
            warm_up(self.nets, text, noise, settings, generator)
        self.progress.warmed = i + 1

    def iterate(self, i):
        """training_step, then the student's average; without effect if a gradient is not finite."""
        args, p, weights = self.args, self.progress, self.learners.weights
        text, noise, settings, generator = self.batch(args.warmup + i)
        for group in self.nets.student_optimizer.param_groups:
            group["lr"] = learning_rate(i, args)
        for net in self.counted:
            net.forwards = net.backwards = 0
        p.done = i + 1
        try:
            with self.draws:
                metrics = training_step(
                    self.nets, text, self.null_text, noise, settings, generator)
        except FloatingPointError:
            p.skipped, p.in_a_row = p.skipped + 1, p.in_a_row + 1
            return
        p.in_a_row = 0
        interpolate(weights["averaged"], weights["student"], 1 - min(args.ema, (i + 1) / (i + 10)))
        if args.follow:
            interpolate(weights["fake"], weights["student"], args.follow)
        metrics["forwards"] = sum(net.forwards for net in self.counted) / len(noise)
        metrics["backwards"] = sum(net.backwards for net in self.counted) / len(noise)
        p.recent.append(self.processes.mean(metrics))

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

    def student(self):
        """The averaged student as a Pipeline. All processes have to call this."""
        steps = self.args.steps
        return replace(self.pipeline, dit=self.learners.plain(), shift=self.settings.shift,
                       steps=steps[0], guidance=0.0, trained_steps=steps if steps[1:] else steps[0])

    @torch.no_grad()
    def save(self):
        """samples/, student/, then the checkpoint; each is written beside its place and renamed."""
        latents = self.sample(self.averaged, time_schedule(self.args.steps[0], self.settings.shift))
        student, p = self.student(), self.progress
        if self.processes.rank == 0:
            images = sampler.decode(student, latents)
            p.saturation = float((images.amax(1) - images.amin(1)).mean())
            picture = partial(picture_grid(images).save, format="PNG")
            write_whole(self.out / "samples" / f"{p.done:06d}.png", picture)
            convert_weights.save_pipeline(
                self.out / "student", student.dit, student.text_encoder, student.vae,
                student.tokenizer, student.shift, dtype=torch.bfloat16, steps=student.steps,
                guidance=0.0, size=student.size, trained_steps=student.trained_steps)
            if self.args.lora:
                self.learners.adapters.save("averaged", self.out / "lora.safetensors")
        self.save_checkpoint()
        return student

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
        """Tensors in safetensors files, Progress in JSON: nothing in them is ever unpickled."""
        folder, p, first = self.out / "checkpoints", self.progress, self.processes.rank == 0
        target = folder / f"{p.warmed + p.done:08d}"
        folder.mkdir(exist_ok=True)
        try:
            place = convert_weights.temporary(folder, ".part-", Path.mkdir)
            with place if first else nullcontext() as made:
                part = self.processes.from_first(made)
                writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
                dcp.save(self.tensors(), storage_writer=writer)
                if first and not target.exists():
                    (part / "progress.json").write_text(json.dumps(asdict(p)))
                    os.replace(part, target)
        except FILE_FAULTS as error:
            raise UserError(f"cannot write {target}: {first_line(error)}") from None
        for old in sorted(folder.glob("[0-9]*"))[:-self.args.keep] if first else ():
            shutil.rmtree(old)

    def load(self):
        """The newest checkpoint -> Progress; of a new run its start. The log is cut back to it."""
        folders = sorted((self.out / "checkpoints").glob("[0-9]*"))
        if not folders:
            return Progress()
        try:
            reader = dcp.HuggingFaceStorageReader(str(folders[-1]))
            dcp.load(self.tensors(), storage_reader=reader)
            progress = Progress(**convert_weights.read_json(folders[-1] / "progress.json"))
            for name, value in asdict(Progress()).items():
                if type(getattr(progress, name)) is not type(value):
                    raise ValueError(f"{name} is {getattr(progress, name)!r}")
            lines = (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            # A killed process can leave half a line: it does not end in a newline.
            lines = [line for line in lines if line.endswith("\n")
                     and json.loads(line)["iteration"] <= progress.done]
        except FILE_FAULTS as error:
            raise UserError(f"{folders[-1]}, or log.jsonl, is damaged ({first_line(error)}); "
                            "remove it to go on from the checkpoint before it") from None
        if self.processes.rank == 0:
            write_whole(self.out / "log.jsonl", lambda part: part.write_text("".join(lines)))
        return progress

    def log(self):
        """A line of log.jsonl: means over the iterations since the last line."""
        p, line = self.progress, {}
        for name in p.recent[0] if p.recent else ():
            line[name] = sum(metrics[name] for metrics in p.recent) / len(p.recent)
        if p.recent:
            line["dm_over_ca"] = line["dm_rms"] / max(line["ca_rms"], 1e-12)
            line["std_ratio"] = line["x_std"] / self.reference_std
        line |= {"saturation": p.saturation, "skipped": p.skipped, "seconds": p.seconds,
                 "lr": learning_rate(p.done - 1, self.args), "fake_lr": self.args.fake_lr}
        line = {name: float(f"{value:.6g}") for name, value in line.items()}
        p.recent = []
        if self.processes.rank == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": p.done, **line}) + "\n")

    def end_if_asked(self, number):
        """Ends the process after a signal, or after too many iterations without effect."""
        number = max(self.processes.mean({"signal": number}).values()) * self.processes.count
        if self.progress.in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"{MAX_SKIPPED} iterations in a row gave no finite gradient: try a smaller --lr or "
                f"--alpha; the last good checkpoint, if there is one, is in {self.out}/checkpoints")
        if number:
            self.save_checkpoint()
            print(f"saved after iteration {self.progress.done}; --resume goes on", file=sys.stderr)
            raise SystemExit(130 if number == signal.SIGINT else 0)


def first_line(error):
    return str(error).strip().split("\n")[0]


def learning_rate(i, args):
    """The student's rate in update i (from 0): up over WARMUP updates, then linearly to 0."""
    fall = 1 if args.constant_rate else 1 - i / args.iterations
    return args.lr * max(min((i + 1) / WARMUP, fall), 0)


def picture_grid(images, columns=8):
    """(B, 3, H, W) in [0, 1] -> a picture with `columns` of them in a row, and lines between."""
    images = F.pad(images, (1, 1, 1, 1), value=0.5)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=0.5)
    rows = [torch.cat([*row], 2) for row in images.split(columns)]            # (3, H + 2, width)
    return Image.fromarray((torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte().cpu().numpy())


def train(pipeline, prompts, settings, args, callback=None, **changes):
    """Distils -> the student as a Pipeline, with the running average of its weights.

    It goes on from the newest checkpoint in args.out. SIGINT and SIGTERM save a checkpoint and
    end the process, with exit codes 130 and 0. callback(iteration, student): at checkpoints.
    changes: see Run.
    """
    run = Run(pipeline, prompts, settings, args, **changes)
    p, began, student = run.progress, time.perf_counter() - run.progress.seconds, run.student()
    bar = tqdm(desc="distilling", total=args.warmup + args.iterations, initial=p.warmed + p.done,
               disable=run.processes.rank > 0)
    # On a CPU the plain attention kernel's backward is faster than the fused kernel's. It is chosen
    # for forward and backward passes together, because checkpoints compute again in the latter.
    kernel = sdpa_kernel(SDPBackend.MATH) if pipeline.device.type == "cpu" else nullcontext()
    with StopSignals() as stop, bar, kernel:
        for i in range(p.warmed, args.warmup):
            run.warm_up(i)
            bar.update()
            run.end_if_asked(stop.number)
        for i in range(p.done, args.iterations):
            run.iterate(i)
            bar.update()
            p.seconds = time.perf_counter() - began
            last = p.done == args.iterations
            if p.done % args.log_every == 0 or last:
                run.log()
            if (p.done % args.sample_every == 0 and not p.in_a_row) or last:
                student = run.save()
                if callback:
                    callback(p.done, student)
            run.end_if_asked(stop.number)
    return student


# --- Command line ---------------------------------------------------------------------------------

BUNDLED = Path(__file__).resolve().parent / "tutorials" / "shapes"
MAY_CHANGE = {"out", "teacher", "prompts", "cache_features", "iterations", "sample_every", "keep",
              "log_every", "device", "accumulate", "checkpoint_activations", "resume", "overwrite"}


def step_numbers(text):
    """An argparse type: "4,1,2,8" -> [4, 1, 2, 8]."""
    return [number(1, 10000, int)(part) for part in text.split(",")]


def parse_arguments(arguments=None):
    """The command line -> a namespace. UserError names the option that is wrong."""
    whole, some = partial(number, kind=int), Settings()
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    for name, kind, default, metavar, text in [
            ("teacher", absolute, None, "DIR", "an undistilled model (default: the bundled one)"),
            ("prompts", absolute, None, "FILE", "one prompt a line (default: the bundled ones)"),
            ("out", str, "runs/distil", "DIR", "directory of the run"),
            ("steps", step_numbers, [some.steps], "N[,N...]", "of the student; of several numbers "
             "one is drawn in each iteration, and the first is its default for sampling"),
            ("alpha", number(1, 100), some.alpha, "A", "guidance scale of CA; 1: no CA"),
            ("shift", number(above=0, high=1e3), None, "S", "of times (default: the teacher's)"),
            ("size", whole(1, 2 ** 15), None, "PIXELS", "of a side (default: the teacher's)"),
            ("iterations", whole(1, 10 ** 8), 400, "N", "updates of the student"),
            ("batch-size", whole(1, 10 ** 5), 16, "N", "of all processes together"),
            ("fake-updates", whole(1, 1000), some.fake_updates, "N", "for one of the student"),
            ("warmup", whole(0, 10 ** 8), 0, "N", "iterations of the fake alone before the first"),
            ("lr", number(0, 100), 2e-4, "R", "the student's learning rate"),
            ("fake-lr", number(0, 100), 1e-3, "R", "the fake's learning rate"),
            ("ema", number(0, 1), 0.98, "E", "share of the average that an update keeps"),
            ("follow", number(0, 1), 0.0, "F", "pull the fake by this share to the student (IDA)"),
            ("lora", whole(1, 10 ** 5), None, "RANK", "train low-rank adapters in one teacher"),
            ("accumulate", whole(1, 10 ** 4), 1, "K", "compute each batch in K parts"),
            ("cache-features", absolute, None, "DIR", "encode all prompts once, into it"),
            ("seed", whole(0, 10 ** 12), 0, "N", "of all draws"),
            ("sample-every", whole(1, 10 ** 8), 100, "N", "iterations between checkpoints"),
            ("keep", whole(1, 10 ** 5), 2, "N", "checkpoints that are kept"),
            ("log-every", whole(1, 10 ** 8), 10, "N", "iterations in one line of log.jsonl"),
            ("device", str, "auto", "NAME", "cuda, mps or cpu")]:
        shown = "" if default is None else " (default: %(default)s)"
        add(f"--{name}", type=kind, default=default, metavar=metavar, help=text + shown)
    for name, text in [("no-dm", "the spear alone: without distribution matching"),
                       ("no-normalize", "terms as they are, not divided by their size"),
                       ("constant-rate", "the learning rate does not fall (shows the collapse)"),
                       ("checkpoint-activations", "less memory, a third more computation"),
                       ("resume", "go on with the run in --out, with its options"),
                       ("overwrite", "remove the run in --out and begin again")]:
        add(f"--{name}", action="store_true", help=text)
    add("--schedule", choices=list(SCHEDULES), default=some.schedule, help="of re-noising times")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of matrix products (default: float32 on a CPU, bfloat16 elsewhere)")
    args = parser.parse_args(arguments)
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it: give one of them")
    if args.no_dm and (args.alpha == 1 or args.warmup or args.follow):
        raise UserError("--no-dm leaves CA alone, without a fake: it goes with an --alpha above 1, "
                        "and not with --warmup or --follow")
    if args.teacher and not args.prompts and not args.resume:
        raise UserError("a teacher of your own needs prompts: give --prompts FILE, one a line")
    return args


def absolute(path):
    """An argparse type: a path that stays right when a run goes on from another directory."""
    return str(Path(path).absolute())


def make_settings(args, pipeline):
    """The Settings of a run; a shift that is not given is the teacher's."""
    shift = pipeline.shift if args.shift is None else args.shift
    for steps in args.steps:
        time_schedule(steps, shift)            # UserError if the shift is too extreme
    return Settings(
        steps=args.steps[0], alpha=args.alpha, schedule=args.schedule, shift=shift,
        normalize=not args.no_normalize, fake_updates=0 if args.no_dm else args.fake_updates)


def as_arguments(args):
    """The namespace as a command line, which parse_arguments reads again."""
    words = []
    for name, value in vars(args).items():
        if value is True and name not in ("resume", "overwrite"):
            words.append(f"--{name.replace('_', '-')}")
        elif not isinstance(value, bool) and value is not None and name != "out":
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name.replace('_', '-')}={text}")
    return words


def resumed_arguments(args, given):
    """The options of the run in args.out, and over them those that are given now."""
    out = Path(args.out)
    if (out / "state.pt").exists():
        raise UserError(f"--resume: {out}/state.pt is from an older distill.py: begin a new run")
    config = read_run(out)
    if config is None or not any((out / "checkpoints").glob("[0-9]*")):
        raise UserError(f"--resume: there is no checkpoint of a run in {out}")
    words = config.get("arguments")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{out}/config.json is damaged: it has no list of arguments")
    before, args = parse_arguments(words), parse_arguments([*words, *given])
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and value != getattr(before, name):
            raise UserError(
                f"--resume: --{name.replace('_', '-')} was {getattr(before, name)} in {out}, not "
                f"{value}; leave it out to go on, or begin a run in another --out")
    if config.get("fingerprints") != fingerprints(args):
        raise UserError(f"--resume: the teacher or the prompts of {out} are others now; name those "
                        "of the run, wherever they are, or begin a run in another --out")
    return args


def read_run(out):
    """The config.json of a run, or None if `out` is not the folder of one."""
    try:
        config = convert_weights.read_json(out / "config.json")
    except UserError:
        return None
    return config if config.get("made_by") == "distill.py" else None


def fingerprints(args):
    """What the teacher and the prompts are, wherever they lie."""
    files = args.teacher or BUNDLED / "teacher", args.prompts or BUNDLED / "prompts.txt"
    return [fingerprint(file) for file in files]


def prepare_folder(args):
    """Makes args.out the folder of this run, and writes down how to repeat it."""
    out = Path(args.out)
    if not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        if read_run(out) is None:
            raise UserError(f"--out {out} exists and is no run of distill.py: name a new directory")
        if not args.overwrite:
            raise UserError(f"there is a run in {out}: go on with it by --resume, remove it by "
                            "--overwrite, or give another --out")
        for name in ("checkpoints", "samples", "student"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("lora.safetensors", "log.jsonl", "config.json"):
            (out / name).unlink(missing_ok=True)
    config = {"made_by": "distill.py", "torch": torch.__version__,
              "fingerprints": fingerprints(args), "arguments": as_arguments(args)}
    write_whole(out / "config.json", lambda part: part.write_text(json.dumps(config, indent=1)))
    (out / "log.jsonl").touch()


@sampler.advise_on_errors("a smaller --batch-size or --size, --accumulate, "
                          "--checkpoint-activations or --lora")
def main():
    """The command line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    warnings.filterwarnings("ignore", "torch.distributed is disabled|FSDP2-wrapped module")
    args = parse_arguments()
    if args.resume:
        args = resumed_arguments(args, sys.argv[1:])
    device = sampler.find_device(args.device)
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    sampler.keep_freed_memory()
    prompts = PromptFile(args.prompts or BUNDLED / "prompts.txt")
    processes = Processes(device)
    if args.batch_size % processes.count:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared equally by "
                        f"{processes.count} processes")
    # Weights that are trained whole are float32, and the teacher is like them.
    dtype = getattr(torch, args.dtype if args.lora or processes.count > 1 else "float32")
    pipeline = sampler.load_pipeline(args.teacher or BUNDLED / "teacher", device, dtype)
    pipeline.size = args.size or pipeline.size
    sampler.check_size(pipeline, pipeline.size, pipeline.size)
    if pipeline.trained_steps:
        warnings.warn("the teacher was distilled already: guidance changes it little, so CA has "
                      "little effect", stacklevel=1)
    settings = make_settings(args, pipeline)
    if processes.rank == 0:
        prepare_folder(args)
    processes.from_first()
    train(pipeline, prompts, settings, args)
    if processes.rank == 0:
        student = str(Path(args.out) / "student")
        print(f"the student is in {student}; to sample it:\n"
              f"    python sampler.py {prompts[0]!r} --model {student!r}")


if __name__ == "__main__":
    run_command(main)
