"""Trains the model of this folder from nothing: first the VAE, then text encoder and DiT.

    python tutorials/cards/train.py --out runs/cards --workers 2     2 1/2 hours on 2 CPU cores
    python tutorials/cards/train.py --out runs/cards --device cuda   8 minutes on a GPU
    python tutorials/cards/train.py --out runs/smoke --smoke         every stage, in a minute
    python tutorials/cards/train.py --out runs/small --workers 2 --ladder 3 \\
        --set bundled_vae=true batch=32 steps=7500       a smaller world in 75 minutes of 2 cores

The bundled teacher learned a smaller world for 300 minutes on two CPU cores, and then on a GPU in
three runs of a few minutes, each from the weights of the one before (--start): results.md has them.
From nothing in today's world, an hour of two cores is far too little: half of the things are right,
and hardly a word. The last command ends with half of the words right (results.md). Neither of the
first two has been run to its end.

1. Draw:      other processes draw cards with several captions each (data.py) into shared memory.
2. VAE:       it learns to compress the pictures to latents of a twelfth as many numbers.
3. Encode:    the latents of all cards are computed once.
4. Teacher:   text encoder and DiT learn by flow matching: the velocity from noise to latents.
5. Report:    how often pictures for unseen prompts show what was asked, in --out/report.json.

A stage lasts a given time. Its learning rate follows the clock, so that the stage ends with a rate
near zero on fast and slow machines alike. Stages and checkpoints are kept in --out: the same
command again goes on where a run was stopped. Every step draws its data and noise from a generator
seeded by (seed, step), so a stopped run that goes on is the same run, unless its loss has risen
(Guard). Ctrl-C or SIGTERM first saves and exports what was trained so far. `--out`/teacher is the
model so far, log.jsonl the log, samples_*.png pictures for unseen prompts. prompts.txt is for
distilling the teacher, prompts_heldout.txt for scoring (evaluate.py).
"""

import copy
import itertools
import json
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # see sampler.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]

import data  # noqa: E402
import evaluate  # noqa: E402
import sampler  # noqa: E402
from convert_weights import (  # noqa: E402
    Parser,
    UserError,
    number,
    open_model,
    run_command,
    save_pipeline,
)
from files import alone_in, write_whole  # noqa: E402
from formats import path_name  # noqa: E402
from hardware import CPU_HAS_BFLOAT16  # noqa: E402
from model import (  # noqa: E402
    VAE,
    Context,
    DiT,
    DiTConfig,
    Text,
    TextEncoder,
    TextEncoderConfig,
    VAEConfig,
    joint_positions,
)
from scale import FILE_FAULTS, blocks_of  # noqa: E402

# RMSNorm multiplies in float32 under autocast, on purpose.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")

CELLS = 16               # latents are 16 x 16, with 16 channels: 1/8 of the side, as in the release
MAX_TOKENS = 32          # of a caption with its chat template


@dataclass
class Recipe:
    """Every number of a run. These are for 2 CPU cores."""
    seed: int = 0
    ladder: int = 5               # the world: a step of LADDER in world.py
    upright: bool = True          # without its sizes and tilts: upright(LADDER[ladder])
    # Draw
    drawings: int = 32768
    captions: int = 8             # of each drawing
    # VAE
    vae_drawings: int = 8192      # the first ones
    vae_tests: int = 64           # others, to measure the reconstruction
    bundled_vae: bool = False     # take vae.safetensors and train none
    vae_minutes: float = 30.0
    vae_steps: int = 0            # if above 0, so many steps in place of a time
    vae_muon_lr: float = 8e-3     # kernels and matrices
    vae_adam_lr: float = 2e-3     # biases and norms
    vae_batch: int = 4            # pictures in a step
    # This share of the time sees crops of half the side, four times as many: fine detail is what
    # is hard to learn.
    vae_crops: float = 0.8
    kl_weight: float = 5e-3       # high for a VAE: latents that bear noise are easier to sample
    # Teacher
    minutes: float = 115.0
    steps: int = 0                # if above 0, so many steps in place of a time
    batch: int = 64               # over all workers
    muon_lr: float = 8e-3         # matrices inside blocks
    adam_lr: float = 2e-3         # everything else
    warm_up: int = 100            # steps
    decay_from: float = 0.5       # constant rate until this share of the time, then linear to zero
    ema: float = 0.998
    caption_drop: float = 0.1     # share of captions replaced by the empty one, for guidance
    word_weight: float = 2.0      # weight of the loss where the word is
    word_time: float = 0.2        # from this time on: earlier the noise hides where the word is
    # t = sigmoid(N(mean, std)): more often near noise, where most is decided.
    time_mean: float = -1.0
    time_std: float = 1.2
    long_every: int = 8           # each so many steps captions are padded to twice their length
    dim: int = 192
    layers: int = 6
    compile: bool = True          # the DiT's blocks: a fifth less time on a CPU
    record: bool = False          # a step's kernels as a CUDA graph: half the time on a GPU
    # Sampling defaults of the checkpoint, and probes
    shift: float = 3.0            # of the time schedule, as in the release
    sample_steps: int = 16
    guidance: float = 2.0
    probe_prompts: int = 64       # for the log
    report_prompts: int = 300     # for the report
    log_every: int = 50           # steps
    save_minutes: float = 10.0

    def world(self):
        world = data.LADDER[self.ladder]
        return data.upright(world) if self.upright else world


GPU = dict(drawings=64_000, vae_drawings=16384, vae_minutes=1.75, vae_batch=32, vae_crops=0.0,
           minutes=5.5, batch=256, muon_lr=6e-3, adam_lr=1e-3, ema=0.999, report_prompts=200,
           log_every=50, save_minutes=1.5,
           compile=False, record=True)             # compiled gradients are wrong: compile_blocks
SMOKE = dict(drawings=64, captions=2, vae_drawings=64, vae_tests=2, vae_steps=6, vae_batch=2,
             steps=6, batch=8, dim=32, layers=1, long_every=2, sample_steps=2, probe_prompts=4,
             report_prompts=4, log_every=2, compile=False)


def vae_config(scale=1.0, shift=0.0):
    # Four groups, so four channels or more in each: with one channel in a group, a group norm
    # would take away each channel's mean, and flat colors with it.
    return VAEConfig(latent_channels=16, block_out_channels=(16, 32, 48, 56), layers_per_block=1,
                     norm_num_groups=4, scaling_factor=scale, shift_factor=shift)


def encoder_config(vocabulary):
    # One layer, and the last one never runs: the encoder is only its embedding table. The DiT's
    # context refiner reads the letters' order instead.
    return TextEncoderConfig(vocab_size=vocabulary, hidden_size=96, intermediate_size=192,
                             num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                             head_dim=24)


def dit_config(recipe):
    return DiTConfig(in_channels=16, dim=recipe.dim, n_layers=recipe.layers, n_refiner_layers=2,
                     n_heads=max(recipe.dim // 32, 1), cap_feat_dim=96, axes_dims=(8, 12, 12),
                     axes_lens=(576, 64, 64))


# --- Teacher ------------------------------------------------------------------------------------


def build(recipe, vocabulary):
    """Text encoder and DiT at their start. Every block begins as the identity."""
    torch.manual_seed(recipe.seed)
    dit = DiT(dit_config(recipe))
    for block in [*dit.noise_refiner, *dit.layers]:
        torch.nn.init.zeros_(block.modulation.weight)
        torch.nn.init.zeros_(block.modulation.bias)
    torch.nn.init.zeros_(dit.final_layer.linear.weight)
    for token in (dit.x_pad_token, dit.cap_pad_token):
        torch.nn.init.normal_(token, std=0.02)
    encoder = TextEncoder(encoder_config(vocabulary))
    return torch.nn.ModuleDict({"text_encoder": encoder, "dit": dit})


def copy_weights(path, nets, tokenizer):
    """Begins with the weights of a model that check_start has found to fit.

    Tokens are known by their text. One that the model did not know keeps its random embedding, a
    row of the table (tokens, 96).
    """
    model = sampler.load_pipeline(path)
    nets["dit"].load_state_dict(model.dit.state_dict())
    weights, known = model.text_encoder.state_dict(), model.tokenizer.get_vocab()
    table = nets["text_encoder"].embed_tokens.weight.detach().clone()
    for token, row in tokenizer.get_vocab().items():
        if token in known:
            table[row] = weights["embed_tokens.weight"][known[token]]
    nets["text_encoder"].load_state_dict(weights | {"embed_tokens.weight": table})


def optimizers(nets, recipe):
    """Muon for the matrices inside blocks, AdamW for the rest."""
    inside, rest = [], []
    for name, p in nets.named_parameters():
        in_block = p.ndim == 2 and ("layers." in name or "refiner." in name)
        (inside if in_block and "modulation" not in name else rest).append(p)
    adam = torch.optim.AdamW(rest, recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(inside, recipe.muon_lr), adam]


def random_times(count, recipe, generator):
    """t = sigmoid(N(mean, std)), (B,), even over the quantiles: gradients are less noisy."""
    device = generator.device
    quantiles = torch.arange(count, device=device) + torch.rand(
        count, generator=generator, device=device)
    normal = torch.special.ndtri((quantiles / count).clamp(1e-4, 1 - 1e-4))
    return torch.sigmoid(recipe.time_mean + recipe.time_std * normal)


def velocity(nets, x, t, ids, lengths, tokens):
    """The DiT's velocity for captions that are all padded to `tokens` tokens.

    It equals nets["dit"](x, t, nets["text_encoder"](ids, lengths)), except that all captions share
    one padded length, so one table of rotary angles serves the batch and nothing is masked.
    """
    dit = nets["dit"]
    features = nets["text_encoder"].embed_tokens(F.pad(ids, (0, tokens - ids.shape[1])))
    caption = dit.caption_tokens(Text(features, lengths))        # (B, tokens, dim)
    rope = rotary_angles(dit, tokens, x.shape[-2:], x.device)
    caption_rope = tuple(part[:, -tokens:] for part in rope)
    for block in dit.context_refiner:
        caption = block(caption, caption_rope, None)
    return dit(x, t, Context(caption, rope, None, tuple(x.shape[-2:])))


_angles = {}


def rotary_angles(dit, tokens, size, device):
    key = tokens, size, device
    if key not in _angles:
        lengths = torch.tensor([tokens], device=device)
        _angles[key] = dit.rope(joint_positions(lengths, tokens, *size))
    return _angles[key]


class FlowLoss:
    """flow(step) -> squared error of the velocity for cards and captions that the step draws.

    The loss is heavier where the word is, from time `word_time` on. By then x_t
    shows where the word is, so the weight hardly moves the optimum.
    """

    def __init__(self, recipe, run, nets, cards, empty):
        self.recipe = recipe
        self.run = run
        self.nets = nets
        self.cards = cards
        self.count = recipe.batch // run.workers
        self.empty = F.pad(torch.tensor(empty, device=run.device), (0, MAX_TOKENS - len(empty)))
        self.empty_length = len(empty)

    def __call__(self, step):
        return self.loss(*self.batch(step))

    def backward(self, step):
        """Computes the gradients of a step -> its loss."""
        loss = self(step)
        loss.backward()
        return loss.detach()

    def batch(self, step):
        """What a step draws, as the arguments of `loss`: all that is random."""
        recipe, device = self.recipe, self.run.device
        generator = seeded(device, recipe.seed, 5, step, self.run.rank)
        index, ids, lengths = self.draw(generator)
        x1 = self.cards.latents[index].float()                   # (B, 16, 16, 16)
        noise = torch.randn(x1.shape, generator=generator, device=device)
        t = random_times(self.count, recipe, generator)
        at = t[:, None, None, None]
        x = at * x1 + (1 - at) * noise
        # Captions of over 32 tokens are padded to 64. Training has none; now and then it pads to
        # 64 all the same, so that sampling can.
        tokens = MAX_TOKENS * (1 if step % recipe.long_every else 2)
        heavy = self.cards.words[index] & (t > recipe.word_time)[:, None, None]
        weight = 1 + (recipe.word_weight - 1) * heavy.unsqueeze(1)
        return tokens, x, t, ids, lengths, x1 - noise, weight

    def loss(self, tokens, x, t, ids, lengths, target, weight):
        """Weighted mean squared error of the velocity.

        tokens: the captions' padded length. x (B, 16, 16, 16): noisy latents at times t (B,).
        ids (B, 32), lengths (B,): captions. target (B, 16, 16, 16): the velocity that is right.
        weight (B, 1, 16, 16).
        """
        with reduced_precision(x.device):
            v = velocity(self.nets, x, t, ids, lengths, tokens).float()
        return (weight * (v - target).square()).mean() / weight.mean()

    def draw(self, generator):
        """Random cards and one caption each, some of them empty -> index, ids, lengths."""
        cards, where = self.cards, {"generator": generator, "device": self.run.device}
        index = torch.randint(len(cards.latents), (self.count,), **where)
        which = torch.randint(cards.ids.shape[1], (self.count,), **where)
        dropped = torch.rand(self.count, **where) < self.recipe.caption_drop
        ids = torch.where(dropped[:, None], self.empty, cards.ids[index, which].long())
        lengths = cards.lengths[index, which].long().masked_fill(dropped, self.empty_length)
        return index, ids, lengths


class Recorded:
    """FlowLoss.backward for a GPU: a CUDA graph, captured once for each padded length.

    A step of so small a network is some thousand short kernels, and Python takes longer to launch
    them than they run. A graph launches them all at once; they are the same kernels. Its memory
    is its own: inputs are copied to where it reads, and each replay writes its gradients where
    the last one did. Two lengths are two graphs, with twice the memory.
    """

    def __init__(self, flow, parameters):
        self.flow = flow
        self.parameters = parameters
        self.graphs = {}

    def __call__(self, step):
        tokens, *inputs = self.flow.batch(step)
        if tokens not in self.graphs:
            self.graphs[tokens] = self.capture(tokens, inputs)
        graph, buffers, loss, grads = self.graphs[tokens]
        for buffer, values in zip(buffers, inputs, strict=True):
            buffer.copy_(values)
        graph.replay()
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad
        return loss.clone()

    def capture(self, tokens, inputs):
        """-> the graph, the buffers that it reads, and where it leaves loss and gradients."""
        buffers = [values.clone() for values in inputs]
        # What a first call sets up (workspaces of libraries, the table of rotary angles) has to be
        # there before the capture. PyTorch asks for another stream for that.
        side, stream = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.flow.loss(tokens, *buffers).backward()
        stream.wait_stream(side)
        for p in self.parameters:
            p.grad = None              # so that a replay writes gradients, and does not add them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.flow.loss(tokens, *buffers)
            loss.backward()
        return graph, buffers, loss.detach(), [p.grad for p in self.parameters]


def reduced_precision(device):
    """bfloat16 products where the device has fast ones."""
    fast = device.type == "cuda" or CPU_HAS_BFLOAT16
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def learning_rate(step, progress, recipe):
    """Share of the full rate: warm-up, constant, then linear to zero."""
    return min(1, step / recipe.warm_up, (1 - progress) / (1 - recipe.decay_from))


class Guard:
    """Against divergence: where the loss rises, back to the last good weights at half the rate.

    It is not kept in checkpoints: a run that goes on begins with a new one.
    """

    def __init__(self, parameters, tolerance=1.15):
        self.parameters = parameters
        self.tolerance = tolerance
        self.best = math.inf
        self.good = None
        self.factor = 1.0              # of all learning rates

    @torch.no_grad()
    def goes_back(self, loss):
        """`loss`: the mean of the last steps. Keeps the weights if it is good."""
        if not loss < self.tolerance * self.best and self.good:
            torch._foreach_copy_(self.parameters, self.good)
            self.factor *= 0.5
            return True
        if loss < self.best:
            self.best = loss
            self.good = [p.clone() for p in self.parameters]
        return False


def compile_blocks(run, nets, flow):
    """Compiles the DiT's blocks, and keeps that only where the gradients stay the same.

    Blocks of one kind share their compiled code. Where compiling fails or changes a gradient, the
    blocks stay as they are and the run goes on. (PyTorch 2.11 on an H200 in bfloat16: the loss is
    the same, and the gradients are hundreds of times too large.)
    """
    blocks, began = blocks_of(nets["dit"]), time.monotonic()
    weights = [p.detach().clone() for p in nets.parameters()]
    for p in nets.parameters():        # at its start a network has zeros, which stop gradients
        torch.nn.init.normal_(p, std=0.05)
    steps = (0, 1)                     # with long and with short captions
    try:
        expected = [gradients(nets, flow.backward, step) for step in steps]
        for block in blocks:
            block.compile(dynamic=False)
        compiled = [gradients(nets, flow.backward, step) for step in steps]
        difference = max(float((a - b).norm() / b.norm())
                         for a, b in zip(compiled, expected, strict=True))
        log(run, stage="compile", seconds=time.monotonic() - began, gradients_differ=difference)
        failed = not difference < 0.2              # rounding to bfloat16 makes .01 to .03
    except Exception as error:    # whatever a compiler may raise
        log(run, stage="compile", error=str(error)[:500])
        failed = True
    for block in blocks if agree(failed) else ():
        block._compiled_call_impl = None
    nets.zero_grad()
    with torch.no_grad():
        torch._foreach_copy_(list(nets.parameters()), weights)


def gradients(nets, backward, step):
    """The gradients of a step's loss as one vector. backward: as FlowLoss.backward."""
    nets.zero_grad()
    backward(step)
    return torch.cat([p.grad.flatten() for p in nets.parameters() if p.grad is not None])


class Model(NamedTuple):
    """What sampling needs: the running averages, and what they were trained with."""
    nets: torch.nn.ModuleDict
    vae: VAE
    tokenizer: Tokenizer
    recipe: Recipe

    def pipeline(self):
        device = next(self.vae.parameters()).device
        return sampler.Pipeline(self.tokenizer, self.nets["text_encoder"], self.nets["dit"],
                                self.vae, self.recipe.shift, size=data.SIDE, device=device)

    def export(self, path):
        """Writes a checkpoint that sampler.py reads, in bfloat16."""
        nets, recipe = copy.deepcopy(self.nets).cpu(), self.recipe
        vae = copy.deepcopy(self.vae).to("cpu", torch.bfloat16)
        save_pipeline(path, nets["dit"], nets["text_encoder"], vae, self.tokenizer, recipe.shift,
                      dtype=torch.bfloat16, steps=recipe.sample_steps, guidance=recipe.guidance,
                      size=data.SIDE)


def probe(run, model, name):
    """Scores on unseen prompts, and a grid of their pictures in --out/`name`."""
    recipe = model.recipe
    prompts = data.prompt_list(recipe.probe_prompts, seed=3, world=recipe.world())
    images = evaluate.sample_images(model.pipeline(), prompts, recipe.sample_steps,
                                    recipe.guidance)
    save_grid(os.path.join(run.out, name), images)
    row = evaluate.score(images, prompts, evaluate.drawings(prompts, 1, recipe.world()))
    return {key: value for key, value in row.items() if isinstance(value, float)}


def checkpoint(run, stage, model):
    """Keeps the teacher's state, exports the model, and tries it."""
    stage.save()
    if run.rank == 0:
        model.export(os.path.join(run.out, "teacher"))
        if model.recipe.probe_prompts:
            log(run, stage="probe", step=stage.step, seconds=stage.seconds(),
                **probe(run, model, f"samples_{stage.step:06d}.png"))


def train_teacher(recipe, run, tokenizer, vae, cards):
    """Trains text encoder and DiT -> (Model, whether the stage is complete).

    teacher.pt has the state. All workers take the same step, along the mean gradient.
    """
    nets = build(recipe, tokenizer.get_vocab_size())
    if run.start and not os.path.exists(os.path.join(run.out, "teacher.pt")):
        copy_weights(run.start, nets, tokenizer)
    nets.to(run.device)
    averaged = copy.deepcopy(nets).requires_grad_(False)
    muon, adam = optimizers(nets, recipe)
    stage = Stage(run, "teacher", recipe.minutes, recipe.steps, nets=nets, averaged=averaged,
                  muon=muon, adam=adam)
    model = Model(averaged, vae, tokenizer, recipe)
    parameters, weights = list(nets.parameters()), list(averaged.parameters())
    one_step = FlowLoss(recipe, run, nets, cards, token_ids(tokenizer, ""))
    if recipe.compile:
        compile_blocks(run, nets, one_step)
    backward = Recorded(one_step, parameters) if recipe.record else one_step.backward

    losses, guard = [], Guard(parameters)
    for progress in stage:
        rate = guard.factor * learning_rate(stage.step, progress, recipe)
        muon.param_groups[0]["lr"] = recipe.muon_lr * rate
        adam.param_groups[0]["lr"] = recipe.adam_lr * rate
        losses.append(backward(stage.step))
        descend(parameters, [muon, adam])
        with torch.no_grad():
            decay = min(recipe.ema, stage.step / (9 + stage.step))
            torch._foreach_lerp_(weights, parameters, 1 - decay)
        if len(losses) == recipe.log_every:
            mean = agree(torch.stack(losses).mean().item())
            log(run, stage="teacher", step=stage.step, seconds=stage.seconds(), loss=mean,
                rate=rate)
            losses = []
            if guard.goes_back(mean):
                log(run, stage="teacher", step=stage.step, back_to_loss=guard.best)
                muon.state.clear()
                adam.state.clear()
                averaged.load_state_dict(nets.state_dict())
        if stage.save_is_due(recipe.save_minutes):
            checkpoint(run, stage, model)
    if stage.step:
        checkpoint(run, stage, model)
    return model, stage.complete


# --- VAE ----------------------------------------------------------------------------------------


def crop(images, generator, side):
    """A window of side x side of each image (B, 3, H, W), anywhere."""
    room = images.shape[-1] - side + 1
    corners = torch.randint(room, (len(images), 2), generator=generator).tolist()
    windows = [image[:, y:y + side, x:x + side]
               for image, (y, x) in zip(images, corners, strict=True)]
    return torch.stack(windows)


def vae_loss(vae, images, noise_generator, kl_weight):
    """Absolute and squared error, heavier on edges; the error of the gradients; KL divergence."""
    on_gpu = images.device.type == "cuda"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=on_gpu):
        mean, logvar = (part.float() for part in vae.moments(images))
        noise = torch.randn(mean.shape, generator=noise_generator, device=mean.device)
        error = vae.decoder(mean + (0.5 * logvar).exp() * noise).float() - images
    gray = images.mean(1, keepdim=True)
    contrast = F.max_pool2d(gray, 3, 1, 1) + F.max_pool2d(-gray, 3, 1, 1)     # 0 to 2
    weight = 1 + 3 * (4 * contrast).clamp(max=1)
    error_loss = (weight * (error.abs() + error.square())).mean()
    gradient_loss = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error_loss + 0.5 * gradient_loss + kl_weight * kl


def image_batch(pictures, count, cropped, generator):
    """Images for one step: `count` whole ones, or four times as many crops of half the side."""
    index = torch.randint(len(pictures), (count * (4 if cropped else 1),), generator=generator)
    images = as_images(pictures[index.to(pictures.device)])
    return crop(images, generator, data.SIDE // 2) if cropped else images


def finished_vae(run):
    """The VAE in vae.pt if it is complete, else None."""
    path = os.path.join(run.out, "vae.pt")
    with reading(path):
        saved = torch.load(path, map_location=run.device) if os.path.exists(path) else {}
        if "scale_shift" not in saved:
            return None
        vae = VAE(vae_config(*saved["scale_shift"])).to(run.device)
        vae.load_state_dict(saved["vae"])
    return vae.eval().requires_grad_(False)


def bundled_vae(device="cpu"):
    """The VAE of vae.safetensors beside this file: trained by this script, 105 s on one H200."""
    path = os.path.join(HERE, "vae.safetensors")
    with safe_open(path, "pt") as file:
        numbers = file.metadata()
        weights = {name: file.get_tensor(name).float() for name in file.keys()}
    vae = VAE(vae_config(float(numbers["scaling_factor"]), float(numbers["shift_factor"])))
    vae.load_state_dict(weights)
    return vae.to(device).eval().requires_grad_(False)


def train_vae(recipe, run, drawings):
    """Trains the VAE -> the VAE, or None if the stage was stopped. vae.pt has its state."""
    if recipe.bundled_vae:
        return bundled_vae(run.device)
    if finished_vae(run) is not None:
        return finished_vae(run)
    torch.manual_seed(recipe.seed)
    vae = VAE(vae_config()).to(run.device)
    parameters = list(vae.parameters())
    # Muon for the kernels: after 150 steps the loss was .81, and 1.32 with AdamW alone.
    muon = Muon([p for p in parameters if p.ndim > 1], recipe.vae_muon_lr)
    adam = torch.optim.AdamW([p for p in parameters if p.ndim == 1], recipe.vae_adam_lr,
                             (0.9, 0.99), weight_decay=0.0)
    stage = Stage(run, "vae", recipe.vae_minutes, recipe.vae_steps, vae=vae, muon=muon, adam=adam)
    test, captions = test_cards(recipe, run.device)
    drawings.wait(recipe.vae_drawings)
    pictures = torch.from_numpy(drawings.pictures[:recipe.vae_drawings]).to(run.device)
    count = max(recipe.vae_batch // run.workers, 1)

    for progress in stage:
        generator = seeded("cpu", recipe.seed, 3, stage.step, run.rank)
        noise_generator = seeded(run.device, recipe.seed, 4, stage.step, run.rank)
        rate = min(1, stage.step / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        muon.param_groups[0]["lr"] = recipe.vae_muon_lr * rate
        adam.param_groups[0]["lr"] = recipe.vae_adam_lr * rate
        images = image_batch(pictures, count, progress < recipe.vae_crops, generator)
        loss = vae_loss(vae, images, noise_generator, recipe.kl_weight)
        loss.backward()
        descend(parameters, [muon, adam])
        if stage.step % (4 * recipe.log_every) == 0 and run.rank == 0:
            log(run, stage="vae", step=stage.step, seconds=stage.seconds(), loss=loss.item(),
                psnr=evaluate.reconstruct(vae, test)[1])
        if stage.save_is_due(recipe.save_minutes):
            stage.save()

    if not stage.complete:
        stage.save()
        return None
    with torch.no_grad():
        z = torch.cat([vae.moments(as_images(part))[0] for part in pictures[:512].split(64)])
    stage.save(scale_shift=(1 / z.std().item(), z.mean().item()))
    agree(0.0)                                                   # until the file is there
    vae = finished_vae(run)
    if run.rank == 0:
        images, psnr = evaluate.reconstruct(vae, test)
        log(run, stage="vae", step=stage.step, seconds=stage.seconds(), psnr=psnr,
            read_back=evaluate.score(images, captions, test.cpu())["joint"])
        pairs = torch.stack((test[:16].cpu(), images[:16]), 1).flatten(0, 1)
        save_grid(os.path.join(run.out, "vae.png"), pairs)
    return vae


# --- Encode -------------------------------------------------------------------------------------


class Cards(NamedTuple):
    """What the teacher learns from. N cards, K captions each."""
    latents: torch.Tensor    # (N, 16, 16, 16), float16
    words: torch.Tensor      # (N, 16, 16), true where the word is
    ids: torch.Tensor        # (N, K, 32), token ids of the captions, 0 after their end
    lengths: torch.Tensor    # (N, K)


def cards_file(folder, recipe, vae):
    """Where the latents are kept: other drawings, another world or VAE are another file."""
    code = zlib.crc32(repr((recipe.world(), data.vocabulary(), vae.config)).encode())
    for weight in vae.state_dict().values():
        code = zlib.crc32(weight.cpu().numpy(), code)
    return os.path.join(
        folder, f"cards-{recipe.seed}-{recipe.drawings}x{recipe.captions}-{code:08x}.pt")


@torch.no_grad()
def encode_cards(recipe, run, vae, drawings):
    """Latents of all drawings, computed once and kept in a file."""
    path = cards_file(run.out, recipe, vae)
    if run.rank == 0 and not os.path.exists(path):
        torch.set_num_threads(run.workers)                       # the others wait
        latents = []
        for start in range(0, recipe.drawings, 256):
            drawings.wait(start + 256)                           # on a GPU others are still drawn
            part = torch.from_numpy(drawings.pictures[start:start + 256]).to(run.device)
            latents.append(vae.encode(as_images(part)).half().cpu())
        rest = map(torch.from_numpy, (drawings.words, drawings.ids, drawings.lengths))
        cards = torch.cat(latents), *rest
        write_whole(path, lambda part: torch.save(cards, part))
        torch.set_num_threads(1)
    agree(0.0)                                                   # until the file is there
    with reading(path):
        cards = Cards(*torch.load(path, mmap=True))
    return cards if run.device.type == "cpu" else Cards(*(x.to(run.device) for x in cards))


# --- Report -------------------------------------------------------------------------------------


def report(run, model):
    """report.json: scores on unseen prompts by steps and guidance, open and given prompts apart.

    The open ones leave attributes out, as the captions of training do (some name all); the given
    ones name all. One step without guidance should be clearly worse on open prompts: that is what
    distillation has to win.
    """
    recipe, rows = model.recipe, []
    many, guidance = recipe.sample_steps, recipe.guidance
    count, world = recipe.report_prompts, recipe.world()
    prompts = {"open": data.prompt_list(count, seed=4, world=world),
               "given": data.prompt_list(count, seed=5, drop=0.0, world=world)}
    real = {kind: evaluate.drawings(prompts[kind], 1, world) for kind in prompts}
    settings = [(1, 0.0), (many, guidance), (4, guidance), (2, 0.0), (4, 0.0), (many, 0.0)]
    for (steps, strength), kind in itertools.product(settings, prompts):
        if stopping():
            return
        images = evaluate.sample_images(model.pipeline(), prompts[kind], steps, strength)
        row = {"prompts": kind, "steps": steps, "guidance": strength}
        rows.append(row | evaluate.score(images, prompts[kind], real[kind]))
        save_grid(os.path.join(run.out, f"{kind}_{steps}_{strength:g}.png"), images[:32])
        evaluate.write_json(os.path.join(run.out, "report.json"), rows)
        log(run, stage="report", **{k: v for k, v in rows[-1].items() if not isinstance(v, dict)})


# --- Drawing ------------------------------------------------------------------------------------


def shared(shape, dtype):
    """An array that this process shares with the processes that are forked from it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, size)
    except (OSError, OverflowError):
        raise UserError(f"--set drawings or captions: {size / 1e9:.0f} GB for {shape[0]} drawings "
                        "are more than this machine has") from None
    return np.frombuffer(memory, dtype).reshape(shape)


def token_ids(tokenizer, caption):
    return tokenizer.encode(sampler.TEMPLATE.format(caption), add_special_tokens=False).ids


class Drawings:
    """Cards with their captions, which other processes draw while this one goes on.

    Chunk k depends on (seed, k) alone, whoever draws it and when.
    """
    CHUNK = 64

    def __init__(self, recipe, tokenizer):
        self.recipe = recipe
        self.world = recipe.world()
        self.tokenizer = tokenizer
        count = recipe.drawings
        self.pictures = shared((count, data.SIDE, data.SIDE, 3), np.uint8)
        self.words = shared((count, CELLS, CELLS), np.bool_)      # where the word is
        self.ids = shared((count, recipe.captions, MAX_TOKENS), np.int16)
        self.lengths = shared((count, recipe.captions), np.int16)
        self.chunks = math.ceil(count / self.CHUNK)
        self.done = shared((self.chunks,), np.bool_)
        self.processes = []

    def start(self, processes):
        """Starts the processes that draw. Where a system has no fork, draws everything here."""
        if "fork" not in multiprocessing.get_all_start_methods():
            self.draw_chunks(0, 1)
            return
        for k in range(processes):
            process = multiprocessing.get_context("fork").Process(
                target=self.draw_in_background, args=(k, processes), daemon=True)
            process.start()
            self.processes.append(process)

    def draw_in_background(self, first, stride):
        os.nice(5)                                               # training comes first
        self.draw_chunks(first, stride)

    def draw_chunks(self, first, stride):
        for chunk in range(first, self.chunks, stride):
            rng = np.random.default_rng((self.recipe.seed, 1, chunk))
            stop = min((chunk + 1) * self.CHUNK, self.recipe.drawings)
            for i in range(chunk * self.CHUNK, stop):
                self.draw(i, rng)
            self.done[chunk] = True

    def draw(self, i, rng):
        scene = data.random_scene(rng, world=self.world)
        self.pictures[i] = data.draw(scene)
        self.words[i] = data.text_region(scene, CELLS)[0] > 0
        for k in range(self.recipe.captions):
            ids = [0] * (MAX_TOKENS + 1)
            while len(ids) > MAX_TOKENS:                          # the longest are left out
                ids = token_ids(self.tokenizer, data.caption(scene, rng))
            self.ids[i, k, :len(ids)] = ids
            self.lengths[i, k] = len(ids)

    def wait(self, count):
        """Returns when the first `count` cards are drawn.

        KeyboardInterrupt if the run is asked to stop, even when all are drawn: encoding stops, too.
        """
        chunks = self.done[:math.ceil(count / self.CHUNK)]
        while not stopping():
            if chunks.all():
                return
            failed = any(process.exitcode for process in self.processes)
            if failed and not stopping():                        # the signal may have ended it
                raise RuntimeError("a process that draws cards has failed")
            time.sleep(0.05)
        raise KeyboardInterrupt              # nothing to save here: each stage has saved its own


def as_images(pictures):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_cards(recipe, device):
    """Cards that training does not draw -> images (N, 3, H, W), and captions that name all."""
    rng = np.random.default_rng((recipe.seed, 2))
    scenes = [data.random_scene(rng, held_out=True, world=recipe.world())
              for _ in range(recipe.vae_tests)]
    pictures = torch.from_numpy(np.stack([data.draw(scene) for scene in scenes]))
    return as_images(pictures.to(device)), [data.caption(scene, rng, drop=0) for scene in scenes]


# --- Muon ---------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal; the same as torch.optim.Muon(adjust_lr_fn="match_rms_adamw").

    torch.optim.Muon treats one matrix at a time. Here matrices of one shape are stacked, which
    takes a tenth of the kernel launches. The kernel of a convolution counts as a matrix with a row
    for each output channel. Source: https://kellerjordan.github.io/posts/muon
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for shape, params in shapes.items():
                update = self.updates(params, group["momentum"])
                update = [part.view_as(p) for part, p in zip(update, params, strict=True)]
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(params, update, alpha=-rate)

    def updates(self, params, momentum):
        """Parameters of one shape -> their orthogonal updates, (count, rows, columns)."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        update = torch.stack(torch._foreach_lerp(grads, buffers, momentum))
        return shared_out(orthogonal, update.flatten(2))


def shared_out(function, rows):
    """function(rows), of which each worker computes its share. `function` treats rows apart."""
    if not dist.is_initialized():
        return function(rows)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    out = torch.zeros_like(rows)
    out[mine] = function(rows[mine])
    dist.all_reduce(out)
    return out


def orthogonal(matrices):
    """(count, rows, columns) -> roughly U V^T of each, by five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return (x.mT if tall else x).type_as(matrices).contiguous()


# --- Workers that share a batch -----------------------------------------------------------------


def agree(value):
    """Rank 0's value, for all workers."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return tensor.item()


def average_gradients(parameters):
    """Mean over the workers, as one flat vector."""
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    grads = flat.split([p.numel() for p in parameters])
    for p, grad in zip(parameters, grads, strict=True):
        p.grad.copy_(grad.view_as(p))


def descend(parameters, optimizers):
    """One step of the optimizers along the mean gradient of all workers, clipped to norm 1."""
    average_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# --- Stages of a run ----------------------------------------------------------------------------


class Run(NamedTuple):
    """Where and by how many a run is worked on."""
    out: str
    device: torch.device
    rank: int = 0
    workers: int = 1
    stop_after: int | None = None
    start: str | None = None           # a model whose weights the teacher begins with


_signals = []


def stopping():
    """Whether the run was asked to stop, by Ctrl-C or SIGTERM."""
    return bool(_signals)


def listen():
    """From here on the two signals are noted, and the stage that runs ends at its next step."""
    owner = os.getpid()

    def handle(number, frame):
        if os.getpid() == owner:
            _signals.append(number)
        elif number == signal.SIGTERM:                           # a process that was forked later
            os._exit(1)

    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, handle)


class Stage:
    """A stage of training: what it trains, its step and its time. They are kept in a file.

    `for progress in stage` counts stage.step from 1 and gives the progress, 0 to 1: by steps where
    their number is given, else by time. After the loop stage.complete says whether the stage
    came to its end or was stopped.
    """

    def __init__(self, run, name, minutes, steps, **parts):
        self.run = run
        self.path = os.path.join(run.out, name + ".pt")
        self.minutes = minutes
        self.steps = steps
        self.parts = parts                                       # modules and optimizers
        self.step, seconds = 0, 0.0
        if os.path.exists(self.path):
            with reading(self.path):
                saved = torch.load(self.path, map_location=run.device)
                self.step, seconds = saved["step"], saved["seconds"]
                for part, module in parts.items():
                    module.load_state_dict(saved[part])
        self.began = time.monotonic() - seconds
        self.saved_at = seconds
        self.complete = False

    def seconds(self):
        return time.monotonic() - self.began

    def progress(self):
        if stopping() or self.step >= (self.run.stop_after or math.inf):
            return math.inf
        return self.step / self.steps if self.steps else self.seconds() / (60 * self.minutes)

    def __iter__(self):
        while (progress := agree(self.progress())) < 1:
            self.step += 1
            yield progress
        self.complete = not math.isinf(progress)

    def save_is_due(self, minutes):
        return self.seconds() - self.saved_at > 60 * minutes

    def save(self, **more):
        self.saved_at = self.seconds()
        if self.run.rank == 0:
            state = {part: module.state_dict() for part, module in self.parts.items()}
            state |= {"step": self.step, "seconds": self.seconds()} | more
            write_whole(self.path, lambda part: torch.save(state, part))


def log(run, **values):
    """One line of JSON to the terminal and to log.jsonl."""
    if run.rank:
        return
    values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    line = json.dumps(evaluate.without_nan(values))
    print(line, flush=True)
    with open(os.path.join(run.out, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(line + "\n")


# --- Small things -------------------------------------------------------------------------------


@contextmanager
def reading(path):
    """UserError where a file of a run is damaged, or does not fit the run that goes on."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise                                 # the file is good
    except (EOFError, pickle.UnpicklingError, *FILE_FAULTS):
        raise UserError(f"{path} is damaged, or of a run with other numbers (--set): remove it, "
                        "or name another --out") from None


def save_grid(path, images, columns=8):
    """(B, 3, H, W) in [-1, 1] -> PNG."""
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)
    rows = [torch.cat(list(row), 1) for row in pixels.cpu().split(columns)]
    rows = [F.pad(row, (0, 0, 0, rows[0].shape[1] - row.shape[1]), value=255) for row in rows]
    grid = Image.fromarray(torch.cat(rows).numpy())
    write_whole(path, lambda part: grid.save(part, format="PNG"))


def seeded(device, *where):
    """A generator that depends on (seed, stage, step, worker) alone: a restart needs no state."""
    seed = int(np.random.default_rng(where).integers(2 ** 62))
    return torch.Generator(device).manual_seed(seed)


# --- Command line -------------------------------------------------------------------------------


def work(recipe, run, drawings, meeting):
    """All of one worker's stages after the drawing."""
    torch.set_num_threads(1)
    if run.rank:
        for which in (signal.SIGINT, signal.SIGTERM):            # rank 0 says when to stop
            signal.signal(which, signal.SIG_IGN)
    if run.workers > 1:
        dist.init_process_group("gloo", init_method="file://" + meeting, rank=run.rank,
                                world_size=run.workers)
    tokenizer = Tokenizer.from_file(os.path.join(run.out, "tokenizer.json"))
    vae = train_vae(recipe, run, drawings)
    if vae is not None:
        cards = encode_cards(recipe, run, vae, drawings)
        model, complete = train_teacher(recipe, run, tokenizer, vae, cards)
        if complete and run.rank == 0 and recipe.report_prompts:
            report(run, model)
    if run.workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def assist(*arguments):
    """work() in a process of rank 1 or more. It prints no UserError: rank 0 meets the same one."""
    with suppress(UserError):
        work(*arguments)


def arguments():
    parser = Parser(description="Train the cards model: VAE, then teacher.")
    parser.add_argument("--out", required=True, type=path_name,
                        help="folder; the same again continues a run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1,
                        help="CPU processes of one thread each, which share the batch")
    parser.add_argument("--ladder", type=int, choices=data.STEPS_WITH_WORDS,
                        help="how much of the world it learns: a step of world.LADDER (default: 5)")
    parser.add_argument("--minutes", type=float, help="time for the teacher")
    parser.add_argument("--vae-minutes", type=float, help="time for the VAE")
    parser.add_argument("--start", type=path_name, metavar="DIR",
                        help="begin with the weights of this teacher")
    parser.add_argument("--smoke", action="store_true", help="a tiny run of every stage")
    parser.add_argument("--stop-after", type=number(1, 10 ** 9, int), metavar="N",
                        help="stop each stage after this many steps, to continue later")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE",
                        help="other numbers of the recipe")
    return parser.parse_args()


def recipe_from(args):
    recipe = replace(Recipe(), **(GPU if args.device == "cuda" else {}))
    recipe = replace(recipe, **(SMOKE if args.smoke else {}))
    for name in ("ladder", "minutes", "vae_minutes"):
        if getattr(args, name) is not None:
            recipe = replace(recipe, **{name: getattr(args, name)})
    for setting in args.set:
        name, _, value = setting.partition("=")
        try:
            kind, value = type(getattr(recipe, name)), json.loads(value)
            if isinstance(value, bool) != (kind is bool) or not math.isfinite(value):
                raise ValueError
            if kind(value) != value:          # half a step
                raise ValueError
            value = kind(value)
        except (AttributeError, TypeError, ValueError, OverflowError):
            names = ", ".join(vars(recipe))
            raise UserError(f"--set {setting}: give NAME=NUMBER, with a name of {names}") from None
        recipe = replace(recipe, **{name: value})
    return recipe


# Numbers of a recipe that may be 0 or False; all others are above it, but for time_mean.
MAY_BE_ZERO = {"seed", "steps", "vae_steps", "vae_crops", "kl_weight", "decay_from",
               "caption_drop", "word_time", "guidance", "time_mean", "report_prompts",
               "probe_prompts", "bundled_vae", "compile", "record", "upright"}
# The largest values where 1e9 is too large: 1 for shares, else what a checkpoint may hold.
LARGEST = {**dict.fromkeys(("vae_crops", "ema", "caption_drop", "word_time"), 1), "shift": 1e3,
           "guidance": 1e3, "sample_steps": 10_000}


def check_numbers(recipe):
    for name, value in vars(recipe).items():
        good = value > 0 or name == "time_mean" or (value == 0 and name in MAY_BE_ZERO)
        if not good or value > LARGEST.get(name, 1e9):
            raise UserError(f"--set {name}={value}: it is out of range")
    sampler.time_schedule(recipe.sample_steps, recipe.shift)       # UserError if there is none
    if recipe.ladder not in data.STEPS_WITH_WORDS:
        raise UserError(f"--set ladder={recipe.ladder}: choose one of {data.STEPS_WITH_WORDS}")
    if recipe.dim % 32 or recipe.decay_from >= 1:
        raise UserError("--set: dim should be a multiple of 32, and decay_from below 1")


def check_start(args, recipe):
    """UserError now, and not when the cards are drawn, if --start is no teacher for this run."""
    if args.start and not recipe.bundled_vae:
        raise UserError("--start goes with --set bundled_vae=true: a teacher knows the latents of "
                        "its own VAE alone")
    if not args.start or os.path.exists(os.path.join(args.out, "teacher.pt")):
        return                         # a run that goes on has weights of its own
    model, tokens = open_model(args.start), data.build_tokenizer().get_vocab()
    known = model.tokenizer.get_vocab()
    shared_tokens = len(tokens.keys() & known.keys())
    if shared_tokens < 0.9 * len(tokens):          # of another world: little would be kept
        raise UserError(f"--start {args.start}: it knows {shared_tokens} of this world's "
                        f"{len(tokens)} tokens")
    if model.networks["vae"].config != bundled_vae().config:
        raise UserError(f"--start {args.start}: it has another VAE than vae.safetensors")
    configs = {"text_encoder": encoder_config(len(known)), "dit": dit_config(recipe)}
    for name, config in configs.items():
        if model.networks[name].config != config:
            raise UserError(f"--start {args.start}: its {name.replace('_', ' ')} has other sizes")


def check_times(args, recipe):
    for name, steps in (("minutes", "steps"), ("vae_minutes", "vae_steps")):
        if not getattr(recipe, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} should be above 0")
        if getattr(args, name) is not None and getattr(recipe, steps):
            raise UserError(f"--{name.replace('_', '-')} has no effect beside {steps}="
                            f"{getattr(recipe, steps)} (--set or --smoke)")


def check(args, recipe):
    if args.workers < 1 or recipe.batch % args.workers:
        raise UserError(f"--workers should divide the batch of {recipe.batch}, "
                        f"not be {args.workers}")
    if args.workers > 1 and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError("--workers above 1 needs a system that can fork processes, as Linux can")
    if args.device == "cuda" and args.workers > 1:
        raise UserError("--workers is for the CPU: a GPU is worked by one process")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    if recipe.record and args.device != "cuda":
        raise UserError("--set record=true is for --device cuda")
    check_times(args, recipe)
    check_numbers(recipe)
    check_start(args, recipe)
    if os.path.isdir(args.out) and os.listdir(args.out):
        check_run(args, recipe)


def check_run(args, recipe):
    """UserError if --out has something else in it than a run of this script in the same world."""
    begun, path = {}, os.path.join(args.out, "log.jsonl")
    with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        begun = json.loads(file.readline())
    if not isinstance(begun, dict) or begun.get("stage") != "start":
        raise UserError(f"--out {args.out} is not empty, and no run of train.py: name a new folder")
    for name, usual in (("ladder", 5), ("upright", True)):
        if begun.get(name, usual) != getattr(recipe, name):
            raise UserError(f"--out {args.out} learns another world ({name}="
                            f"{json.dumps(begun.get(name, usual))}): name a new folder")


def main():
    args = arguments()
    recipe = recipe_from(args)
    check(args, recipe)
    torch.set_num_threads(1)
    sampler.keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    tokenizer = data.build_tokenizer()
    drawings = Drawings(recipe, tokenizer)
    listen()
    with alone_in(Path(args.out)):
        train(args, recipe, tokenizer, drawings)


def train(args, recipe, tokenizer, drawings):
    """All stages, by args.workers processes."""
    run = Run(args.out, torch.device(args.device), 0, args.workers, args.stop_after, args.start)
    log(run, stage="start", torch=torch.__version__, workers=args.workers, **vars(recipe))
    write_whole(os.path.join(args.out, "tokenizer.json"), lambda part: tokenizer.save(str(part)))
    data.write_prompts(args.out, recipe.world())
    vae = bundled_vae() if recipe.bundled_vae else finished_vae(run)
    if vae is None or not os.path.exists(cards_file(args.out, recipe, vae)):
        on_gpu = args.device == "cuda"
        drawings.start(max(os.cpu_count() - 2, 1) if on_gpu else args.workers)
        if not on_gpu:
            drawings.wait(recipe.drawings)                       # before the workers are forked
    with tempfile.TemporaryDirectory() as folder:
        rest = drawings, os.path.join(folder, "meeting")
        others = [multiprocessing.get_context("fork").Process(
            target=assist, args=(recipe, run._replace(rank=rank), *rest), daemon=True)
            for rank in range(1, args.workers)]
        for process in others:
            process.start()
        try:
            work(recipe, run, *rest)
            for process in others:
                process.join()
        finally:
            for process in others:
                process.kill()         # they ignore SIGTERM, and would wait for this one


if __name__ == "__main__":
    run_command(main)
