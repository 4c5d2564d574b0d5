"""From a laptop to a cluster: what a run of distill.py adds around the method.

training_step knows nothing of this file. Each part is applied to built networks from outside:

    AutocastNet              matrix products in bfloat16, a batch in pieces
    checkpoint_activations   less memory for the backward pass
    Adapters                 student and fake as low-rank adapters of one frozen teacher (LoRA)
    Processes, SharedDraws   several processes, weights in shards (torchrun, fully_shard)
    PromptFile, FeatureCache prompts of any number, encoded once
    save_checkpoint          a run that is killed goes on where it was

tutorials/from_laptop_to_cluster.md has the commands.
"""

import atexit
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.checkpoint import noop_context_fn
from tqdm import tqdm

import convert_weights
from convert_weights import UserError
from files import (
    PART,
    alone_in,
    drop_what_cannot_be_written,
    new_name,
    temporary,
    write_whole,
)
from hardware import torchrun_rank
from model import DiT, Text
from sampler import BUNDLED, encode_prompts

# --- Number format and memory ---------------------------------------------------------------------


class AutocastNet:
    """(x, t, text) -> v of a network with matrix products in `dtype`; counts the items that pass.

    With parts > 1 a batch goes through in so many pieces, each computed again in the backward
    pass. Memory is then that of one piece. The gradient of the weights is that of the whole batch;
    none reaches x.
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
            call = partial(recomputed, self.net, use_reentrant=True)
            x = x.detach().requires_grad_()    # the reentrant kind needs an input with gradient
        with self.autocast():
            return torch.cat([*map(call, x.chunk(self.parts), t.chunk(self.parts), texts)])


def blocks_of(dit):
    return [*dit.noise_refiner, *dit.context_refiner, *dit.layers]


def checkpoint_activations(dit, contexts=noop_context_fn):
    """Keeps only the inputs of blocks for the backward pass, which computes the rest again."""
    for block in blocks_of(dit):
        block.forward = partial(recomputed, block.forward, use_reentrant=False, context_fn=contexts)


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
        """A plain DiT on the CPU with the weights W + B A: a GPU may have no room for a second."""
        state = {key: w.cpu() for key, w in self.dit.state_dict().items() if ".lora_" not in key}
        for key, layer in self.layers.items():
            w = layer.weight + layer.lora_B[name] @ layer.lora_A[name]
            state[f"{key}.weight"] = w.to(layer.weight.dtype).cpu()
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


class Processes:
    """The processes of torchrun, of which each takes its share of every batch. Usually one."""

    def __init__(self, device):
        self.device = device
        self.rank, self.count = torchrun_rank()
        if self.count > 1 and device.type == "cuda":
            torch.cuda.set_device(device)     # fully_shard and nccl take the current device
        if self.count > 1 and not dist.is_initialized():
            # The default is minutes. A process may wait longer: until the others have encoded
            # their prompts, or until the first one has written the student.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=2))

    def share(self, x):
        """This process's part of a batch (B, ...)."""
        return x.chunk(self.count)[self.rank]

    def shared_draws(self):
        return SharedDraws(self) if self.count > 1 else nullcontext()

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

    @contextmanager
    def end_together(self):
        """Where another process has ended, this one ends with a sentence.

        It leaves the group at the end of the block and after SystemExit. After an error it does
        not: another process may be in the middle of a sum, and leaving would wait for it.
        """
        try:
            yield
            self.leave(0)
        except SystemExit as end:              # SIGINT or SIGTERM
            self.leave(end.code)
            raise
        except RuntimeError as error:
            told = isinstance(error, dist.DistError) or re.search("gloo|NCCL", str(error))
            if self.count == 1 or not told:
                raise
            raise UserError(f"process {self.rank} ends, for another one has ended or cannot be "
                            f"reached: {first_line(error)[:200]}") from None

    def leave(self, code):
        """Leaves the group, and lets the process end with `code` before Python takes itself apart.

        Threads of PyTorch that still hold tensors would abort it then, after all is done. See
        https://github.com/pytorch/pytorch/issues/190489.
        """
        if self.count > 1:
            dist.destroy_process_group()
            atexit.register(end_process, code)

    def average_gradient(self, p):
        dist.all_reduce(p.grad.div_(self.count))

    def shard(self, dit, dtype):
        """fully_shard, block by block: float32 weights and sums, products in `dtype`."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, None, False)
        for part in (*blocks_of(dit), dit):
            fully_shard(part.to(self.device, torch.float32), mp_policy=policy)


def end_process(code):
    """Ends the process without taking Python apart."""
    drop_what_cannot_be_written()
    os._exit(code)


class SharedDraws(TorchFunctionMode):
    """As a context: random numbers belong to an item of the batch, not to a process.

    In it, torch.rand(..., B) and torch.randn((B, ...)) draw for the batch of all processes and
    return this process's share; other functions draw as always. So the functions of distill.py
    need not know of processes.
    """

    def __init__(self, processes):
        super().__init__()
        self.processes = processes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        count, own_part = self.processes.count, self.processes.share
        if function is torch.rand:
            draws = function(*args[:-1], args[-1] * count, **kwargs)
            return own_part(draws.movedim(-1, 0)).movedim(0, -1)
        if function is torch.randn:
            return own_part(function(args[0][0] * count, *args[0][1:], **kwargs))
        return function(*args, **kwargs)


# --- What a run trains ----------------------------------------------------------------------------

LEARNERS = ("student", "fake", "averaged")


class WholeNetworks:
    """Student, fake and the student's average as copies of the teacher."""

    def __init__(self, teacher, args, processes):
        self.nets, self.processes = {"teacher": teacher.requires_grad_(False)}, processes
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
        """The average as a DiT that is not sharded, on the first process; None on the others.

        All processes have to call this.
        """
        net, state = self.nets["averaged"], {}
        if self.processes.count == 1:
            return net
        for name, shard in net.state_dict().items():
            w = shard.full_tensor()            # all processes take part
            if self.processes.rank == 0:
                state[name] = w.cpu()
        return plain_dit(net.config, state) if state else None


class LowRankNetworks:
    """Student, fake and the student's average as sets of adapters in the teacher itself."""

    def __init__(self, teacher, args, processes):
        self.adapters = Adapters(teacher, args.lora, LEARNERS, args.seed)
        if args.checkpoint_activations:
            checkpoint_activations(teacher, self.adapters.contexts)
        self.nets = {name: partial(self.adapters.call, name) for name in LEARNERS}
        self.nets["teacher"] = partial(self.adapters.call, None)
        self.weights = {name: self.adapters.weights(name) for name in LEARNERS}
        self.processes = processes
        for name, weights in self.weights.items():
            for p in weights.values():
                p.requires_grad_(name != "averaged")
                if processes.count > 1 and p.requires_grad:
                    p.register_post_accumulate_grad_hook(processes.average_gradient)

    def plain(self):
        """The average as a DiT without adapters, on the first process; None on the others."""
        return self.adapters.merged("averaged") if self.processes.rank == 0 else None


def adam(weights, lr, momentum):
    """AdamW with its state made at once, so that every checkpoint has the same tensors."""
    optimizer = torch.optim.AdamW(weights.values(), lr, betas=(momentum, 0.99), weight_decay=0.0)
    for p in weights.values():
        state = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **state}
    return optimizer


@torch.no_grad()
def mean_loss(loss, latents, texts, times):
    """loss(x, t, text, noise), averaged over latents (N, ...) with their texts, and over times.

    With the teacher's flow loss on the teacher's own latents this is the loss that the fake would
    have if student and teacher made the same distribution.
    """
    generator, losses = torch.Generator().manual_seed(0), []
    for t in times:
        parts = latents.split([len(text.lengths) for text in texts])
        for x, text in zip(parts, texts, strict=True):
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            losses.append(loss(x, t.to(x.device).expand(len(x)), text, noise) * len(x))
    return float(torch.stack(losses).sum() / (len(times) * len(latents)))


@torch.no_grad()
def interpolate(weights, targets, fraction):
    """Moves `weights` by this fraction of the way to `targets`, in place."""
    for name, target in targets.items():
        weights[name].lerp_(target.detach(), fraction)


# --- Prompts --------------------------------------------------------------------------------------


class PromptsChangedError(UserError):
    """A PromptFile is not what it was."""


class PromptFile:
    """The lines of a UTF-8 text file that are not empty, read one at a time: it may be large.

    Reading a prompt from a file that was changed or removed meanwhile is a PromptsChangedError.
    """

    def __init__(self, path):
        self.path, self.starts, position = path, [], 0
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"--prompts {path} is no file, and prompts are read again and again")
        try:
            with open(path, "rb") as file:
                self.state = self.state_of(file)
                for line in file:
                    if b"\r" in line.rstrip(b"\r\n"):
                        raise UserError(f"--prompts {path}: end its lines by newlines, not by "
                                        "carriage returns alone")
                    if self.text(line):
                        self.starts.append(position)
                    position += len(line)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"cannot read the prompts in {path}: {reason}") from None
        if not self.starts:
            raise UserError(f"--prompts: there is no prompt in {path}")
        self.fingerprint = convert_weights.fingerprint(path)
        self.first = self[0]

    def __len__(self):
        return len(self.starts)

    @staticmethod
    def text(line):
        """A line in bytes -> the prompt as sampler.read_prompts reads it."""
        return line.decode().replace("\ufeff", "").strip()

    @staticmethod
    def state_of(file):
        """What changes when somebody edits the file: its size and the time of the last write."""
        status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns

    def __getitem__(self, i):
        with suppress(OSError, UserError), open(self.path, "rb") as file:
            state = self.state_of(file)
            if state != self.state and convert_weights.fingerprint(self.path) == self.fingerprint:
                self.state = state             # it was written again as it was
            if state == self.state:
                file.seek(self.starts[i])
                return self.text(file.readline())
        raise PromptsChangedError(f"the prompts in {self.path} were changed or removed during the "
                                  "run; put them back and go on with --resume")


def encoder_key(pipeline):
    """A hash of the tokenizer and of the text encoder: names, shapes, dtypes, some numbers.

    At most 4,096 evenly spaced numbers of each weight are hashed, so that it takes a moment.
    Another encoder gives another hash; if a single number differs, the hash may be the same.
    """
    digest = hashlib.sha256(pipeline.tokenizer.to_str().encode())
    for name, w in pipeline.text_encoder.state_dict().items():
        some = w.flatten()[::math.ceil(w.numel() / 4096)]
        digest.update(f"{name} {tuple(w.shape)} {w.dtype} {some.tolist()}".encode())
    return digest.hexdigest()[:16]


class FeatureCache:
    """The text features of all prompts in safetensors files, encoded once.

    A cache of another text encoder, tokenizer or prompt file, or of another dtype, is refused.
    """
    SIZE = 256                   # prompts a file

    def __init__(self, folder, pipeline, prompts, processes):
        self.folder, self.device, note = Path(folder), pipeline.device, Path(folder) / "cache.json"
        self.width = pipeline.text_encoder.config.hidden_size
        key = [prompts.fingerprint, encoder_key(pipeline)]
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--cache-features {folder} is a file; name a folder")
        if processes.rank == 0 and not note.exists():
            write_whole(note, lambda part: part.write_text(json.dumps({"key": key})))
        processes.from_first()
        if convert_weights.read_json(note).get("key") != key:
            raise UserError(f"--cache-features: {folder} is of another text encoder, prompt file "
                            "or --dtype; name another directory")
        starts = range(0, len(prompts), self.SIZE)[processes.rank::processes.count]
        for start in tqdm([i for i in starts if not self.file(i).exists()], "encoding prompts"):
            items = range(start, min(start + self.SIZE, len(prompts)))
            text = encode_prompts(pipeline, [prompts[i] for i in items])
            features = {str(i): f[:n].contiguous() for i, f, n in zip(items, *text, strict=True)}
            write_whole(self.file(start), partial(save_file, features))
        processes.from_first()

    def file(self, i):
        return self.folder / f"{i // self.SIZE:06d}.safetensors"

    def read(self, i):
        """The features of prompt i, (L, D)."""
        try:
            with safe_open(self.file(i), "pt") as file:
                features = file.get_tensor(str(i))
            if features.shape[1:] != (self.width,) or not features.isfinite().all():
                raise ValueError(f"wrong features of prompt {i}")
        except FILE_FAULTS as error:
            raise UserError(f"{self.file(i)} is damaged ({first_line(error)}); remove it, and its "
                            "prompts are encoded again") from None
        return features

    def __call__(self, items):
        features = [self.read(i) for i in items]
        lengths = torch.tensor([len(f) for f in features], device=self.device)
        return Text(nn.utils.rnn.pad_sequence(features, batch_first=True).to(self.device), lengths)


# --- Checkpoints ----------------------------------------------------------------------------------

FILE_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError,
               RuntimeError, SafetensorError, dcp.api.CheckpointException)


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""
    warmed: int = 0          # iterations of the warm-up
    done: int = 0            # iterations of the student
    skipped: int = 0         # iterations whose gradient was not finite
    in_a_row: int = 0        # skipped ones since the last good iteration
    seconds: float = 0.0
    saturation: float = 0.0  # of the newest sample pictures; 0: there are none yet
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


def checkpoints(folder):
    """The checkpoints in a folder, the newest at the end. Other names are the user's own."""
    return sorted(path for path in folder.glob("*") if re.fullmatch("[0-9]{8,}", path.name))


def save_checkpoint(folder, tensors, progress, keep, processes):
    """Tensors in safetensors files, Progress in JSON: nothing in them is ever unpickled.

    Written beside its place and renamed; the newest `keep` stay. A checkpoint of this iteration
    that is there already stays, too. All processes have to call this.
    """
    first = processes.rank == 0
    target = folder / f"{progress.warmed + progress.done:08d}"
    folder.mkdir(exist_ok=True)
    if processes.from_first(target.exists()):
        return
    try:
        place = temporary(folder, Path.mkdir)
        with place if first else nullcontext() as made:
            part = processes.from_first(made)
            writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
            if first:
                (part / "progress.json").write_text(json.dumps(asdict(progress)))
                os.replace(part, target)
    except FILE_FAULTS as error:
        raise UserError(f"cannot write {target}: {first_line(error)}") from None
    for old in checkpoints(folder)[:-keep] if first else ():
        # Renamed first: a process that is killed here leaves no half checkpoint under such a name.
        gone = folder / new_name()
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def without_log():
    """PyTorch logs the traceback of a damaged checkpoint, beside raising it."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


def load_checkpoint(out, tensors, processes):
    """Reads the newest checkpoint of the run in `out` into `tensors` -> Progress.

    Lines of log.jsonl that are newer are cut off. Without a checkpoint a run stands at 0.
    """
    folders, log, lines = checkpoints(out / "checkpoints"), out / "log.jsonl", []
    progress = Progress()
    # A picture is written just before its checkpoint, so two pictures mean that there was one.
    pictures = [path for path in (out / "samples").glob("*")
                if re.fullmatch(OLD_FOLDERS["samples"], path.name)]
    if not folders and len(pictures) > 1:
        raise UserError(f"the checkpoints of {out} are gone, so it cannot go on: begin the run "
                        "again by --overwrite")
    try:
        if folders:
            with without_log():
                dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folders[-1])))
            progress = read_progress(folders[-1] / "progress.json")
            text = log.read_text(encoding="utf-8") if log.exists() else ""
            lines = text.splitlines(keepends=True)
        # A killed process can leave half a line: it does not end in a newline.
        lines = [line for line in lines if line.endswith("\n")
                 and json.loads(line)["iteration"] <= progress.done]
    except FILE_FAULTS as error:
        advice = ("remove the damaged one: without this checkpoint the run goes on from the one "
                  "before, without the log it begins a new log")
        if len(folders) == 1:
            advice = ("if it is the log, remove it, and the run begins a new one; if it is the "
                      "checkpoint, there is no other: begin again by --overwrite")
        raise UserError(f"{folders[-1]} or {log} is damaged ({first_line(error)}); {advice}"
                        ) from None
    if processes.rank == 0 and log.exists():
        write_whole(log, lambda part: part.write_text("".join(lines)))
    return progress


def read_progress(path):
    """progress.json -> Progress. ValueError or TypeError where it is damaged."""
    progress = Progress(**convert_weights.read_json(path))
    for name, default in asdict(Progress()).items():
        value = getattr(progress, name)
        numbers = [value] if name != "recent" else [n for line in value for n in line.values()]
        good = type(value) is type(default) and all(type(n) in (int, float) for n in numbers)
        if not good or not all(math.isfinite(n) for n in numbers):
            raise ValueError(f"{name} is {value!r}")
    counts = progress.warmed, progress.done, progress.skipped, progress.in_a_row
    if min(counts) < 0 or progress.warmed + progress.done != int(path.parent.name):
        raise ValueError(f"iteration {progress.done} is not that of {path.parent.name}")
    if len({tuple(line) for line in progress.recent}) > 1:
        raise ValueError("recent has lines of different kinds")
    return progress


def first_line(error):
    """What an error says; of those that several processes raised together, the first."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return str(error).strip().split("\n")[0]


# --- The folder of a run --------------------------------------------------------------------------


def read_run(out):
    """The config.json of a run, or None if `out` is not the folder of one."""
    try:
        config = convert_weights.read_json(out / "config.json")
    except UserError:
        return None
    return config if config.get("made_by") == "distill.py" else None


def sampling_command(prompt, student):
    """The command line that samples a student."""
    return shlex.join(["python", "sampler.py", prompt, "--model", student])


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


# What --overwrite removes: folder -> the names in it that are a run's own. Others are the user's.
OLD_FOLDERS = {"checkpoints": "[0-9]{8,}", "samples": r"[0-9]{6,}\.png",
               "student": r"(config|tokenizer)\.json|(dit|text_encoder|vae)\.safetensors"}
OLD_FILES = "lora.safetensors", "log.jsonl"     # config.json marks a run; it is replaced


def check_folder(args):
    """UserError where args.out cannot be the folder of a run with these options."""
    out = Path(args.out)
    names = (*OLD_FOLDERS, *OLD_FILES, "config.json") if args.overwrite else ()
    removed = [(out / name).resolve() for name in names]
    for name in ("teacher", "prompts", "cache_features"):
        default = BUNDLED[1] if name == "teacher" else os.devnull
        place = Path(getattr(args, name) or default).resolve()
        option = f"--{name.replace('_', '-')} {place}"
        if any(old in (place, *place.parents) for old in removed):
            raise UserError(f"--overwrite would remove {option}: take another --out")
    teacher = Path(args.teacher or BUNDLED[1]).resolve()
    if teacher in out.resolve().parents:
        raise UserError(f"--out {out} lies in --teacher {teacher}: take another --out")
    cache = Path(args.cache_features or os.devnull).resolve()
    if teacher in (cache, *cache.parents):     # with a file more it would be another teacher
        raise UserError(f"--cache-features {cache} lies in --teacher {teacher}: take another "
                        "folder")
    if not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        if read_run(out) is None:
            raise UserError(f"--out {out} exists and is no run of distill.py: name a new directory")
        if not args.overwrite:
            raise UserError(f"there is a run in {out}: go on with it by --resume, remove it by "
                            "--overwrite, or give another --out")


def write_config(out, config):
    """Writes config.json: how to repeat the run. It also marks the folder as that of a run."""
    text = json.dumps(config, indent=1)
    write_whole(out / "config.json", lambda part: part.write_text(text))


@contextmanager
def folder_of_run(args, config, processes):
    """A context in which no other run can use args.out. It removes nothing that was there.

    A new folder gets a config.json, which goes again if the run is refused before begin_run.
    UserError: see check_folder.
    """
    with ExitStack() as stack:
        if processes.rank == 0:
            out = Path(args.out)
            check_folder(args)
            was_there = out.exists()
            stack.enter_context(alone_in(out))
            if read_run(out) is None:
                write_config(out, config)
                stack.push(partial(remove_refused, out, was_there))
        processes.from_first()
        yield


def remove_refused(out, was_there, kind, *_):
    """After an error before begin_run, which makes log.jsonl: removes the config.json again.

    The folder goes, too, if it was made for this run. Nothing goes if something else is in it, such
    as cached features, or if the process was asked to end (`kind` is then no Exception).
    """
    if kind and issubclass(kind, Exception) and [p.name for p in out.iterdir()] == ["config.json"]:
        (out / "config.json").unlink()
        if not was_there:
            out.rmdir()


@contextmanager
def saved_if_prompts_change(run):
    """A context that saves a run of one process when its prompts are changed under it."""
    try:
        yield
    except PromptsChangedError:
        if run.processes.count == 1:           # several do not notice it in the same iteration
            run.save_checkpoint()
        raise


def remove_run(out):
    """Removes what runs have written in a folder, and what a killed one has left half-written."""
    for name, pattern in OLD_FOLDERS.items():
        for path in (out / name).glob("*"):
            if re.fullmatch(pattern, path.name) or PART.fullmatch(path.name):
                is_folder = path.is_dir() and not path.is_symlink()
                remove = shutil.rmtree if is_folder else os.remove
                remove(path)
        with suppress(OSError):                # files of the user are in it, or it is not there
            (out / name).rmdir()
    for name in OLD_FILES:
        (out / name).unlink(missing_ok=True)


def begin_run(args, config, processes):
    """Writes config.json and makes log.jsonl; with --overwrite the old run is removed first.

    It is called when nothing can be refused any more: until then the old run is still whole.
    """
    if processes.rank == 0:
        out = Path(args.out)
        if args.overwrite:
            remove_run(out)
        write_config(out, config)
        (out / "log.jsonl").touch()
    processes.from_first()


def picture_grid(images, columns=8):
    """(B, 3, H, W) in [0, 1] -> a picture with `columns` of them in a row, and lines between."""
    images = F.pad(images, (1, 1, 1, 1), value=0.5)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=0.5)
    rows = [torch.cat([*row], 2) for row in images.split(columns)]            # (3, H + 2, width)
    return Image.fromarray((torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte().cpu().numpy())
