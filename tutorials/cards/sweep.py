"""The claims of the paper on the cards: distils a student for each variant and seed, and scores it.

    python tutorials/cards/sweep.py --out runs/sweep --workers 2         goes on where it stopped
    python tutorials/cards/sweep.py --out runs/sweep --table             the table of all results
    python tutorials/cards/sweep.py --list                               the variants

Options of distill.py may follow, for every run: --iterations 300 --batch-size 32 --device cuda.
Without them a run is that of the bundled student, except that a variant without a number of steps
is trained for two. Each student is scored by evaluate.py's functions on held-out prompts, at one or
several numbers of steps. --out/results.jsonl has a line for each variant, seed and number of steps.
The table, also in --out/table.md, has the mean over seeds, and in brackets half the distance
between the lowest and the highest seed. "Best" is the best of all checkpoints (--sample-every),
each scored on a part of the prompts (--watch). The exit code is 1 if a run has failed. Ctrl-C or
SIGTERM keeps the runs that have ended.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import warnings
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing import Pipe, get_context, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # see sampler.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import data  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
import sampler  # noqa: E402
import scale  # noqa: E402
import shields  # noqa: E402
from convert_weights import Parser, UserError, number, open_model, run_command  # noqa: E402
from distill import cfg_augmentation, data_estimate, no_dm, renoise, time_schedule  # noqa: E402
from files import alone_in, write_whole  # noqa: E402
from formats import fingerprint, located  # noqa: E402

# --- What a variant changes beside options: (pipeline, args) -> arguments of distill.Run --------


def nothing(pipeline, args):
    return {}


def real_latents(pipeline, count=512):
    """Latents of drawings, for the shields that need real data."""
    images = evaluate.drawings(data.prompt_list(count, seed=3, held_out=False), seed=3)
    return evaluate.encode(pipeline.vae, images)


def mean_variance(pipeline, args):
    return {"dm": no_dm, "other_shield": shields.MeanVarianceShield(real_latents(pipeline))}


def gan(pipeline, args):
    """A discriminator on the features that half of the teacher's layers see."""
    torch.manual_seed(args.seed)
    dit = pipeline.dit
    features = shields.first_layers(dit, len(dit.layers) // 2 + 1)
    discriminator = shields.Discriminator(features, dit.config.dim // 4).to(pipeline.device)
    null_text = sampler.encode_prompts(pipeline, [""])
    return {"dm": no_dm, "other_shield": shields.GANShield(
        discriminator, real_latents(pipeline), null_text, shift=pipeline.shift, seed=args.seed)}


def ca_between(low, high, pipeline, args):
    """CA at re-noising times from `low` to `high` only, whatever the student's step.

    For the schedule "full", whose times t go from 0 to 1.
    """
    def ca(teacher, x, t, *others):
        return cfg_augmentation(teacher, x, low + (high - low) * t, *others)
    return {"ca": ca}


def ca_truncated(high, pipeline, args):
    """No CA at re-noising times above `high`, like cfg_truncation of sampler.sample."""
    def ca(teacher, x, t, *others):
        delta = cfg_augmentation(teacher, x, t, *others)
        return delta * distill.per_item(t <= high, x)
    return {"ca": ca}


def data_space(pipeline, args):
    """The fake's loss as in the paper: |x_hat - x|^2, which weighs velocities by (1 - tau)^2."""
    def loss(fake, x, t, text, noise):
        x = x.detach()
        return F.mse_loss(data_estimate(fake, renoise(x, t, noise), t, text), x)
    return {"fake_loss": loss}


def fresh_images(pipeline, args):
    """The fake learns on new images of the student in each of its updates, as in the paper."""
    generator = torch.Generator().manual_seed(args.seed)
    schedules, found = [time_schedule(n, pipeline.shift) for n in args.steps], {}

    def loss(fake, x, t, text, noise):
        times = schedules[0]
        if len(schedules) > 1:
            times = schedules[int(torch.randint(len(schedules), (), generator=generator))]
        step = int(torch.randint(len(times) - 1, (), generator=generator))
        start = distill.normal_like(x, generator)
        with torch.no_grad():
            x, _ = distill.backward_simulation(found["student"], start, text, times, step)
        return distill.fake_loss(fake, x, t, text, noise)

    def adjust(learners):
        found["student"] = scale.AutocastNet(
            learners.nets["student"], pipeline.device, args.dtype)
    return {"fake_loss": loss, "adjust": adjust}


def step_aware(pipeline, args):
    """A fake that knows which step of the student made its images."""
    def adjust(learners):
        net = learners.nets["fake"]
        width = net.t_embedder.mlp[-1].out_features
        aware = shields.StepAwareFake(net, width).to(pipeline.device)
        learners.nets["student"] = aware.watch(learners.nets["student"])
        learners.weights["fake"] |= {
            f"embedding.{name}": p for name, p in aware.embedding.named_parameters()}
    return {"adjust": adjust}


def renoised_states(pipeline, args):
    """z_t by estimates that are noised again, as in DMD2, instead of Euler steps."""
    generator = torch.Generator().manual_seed(args.seed)

    def sample(net, noise, text, times, *others):
        if others or len(times) == 1:          # pictures are sampled as always
            return sampler.sample(net, noise, text, times, *others)
        x = noise
        with torch.no_grad():
            for t, t_next in zip(times[:-1], times[1:], strict=True):
                x_hat = data_estimate(net, x, t.to(x).expand(len(x)), text)
                x = t_next * x_hat + (1 - t_next) * distill.normal_like(x, generator)
        return x
    distill.sample = sample
    return {}


# --- The variants -------------------------------------------------------------------------------

FULL = ["--schedule", "full"]
SLOW = ["--fake-lr", "1e-4", "--fake-updates", "1"]
LORA = ["--lr", "1e-3", "--fake-lr", "4e-3"]
VARIANTS = {
    "CA + DM": ([], nothing),                # what all others differ from, in one thing each
    # CA is the engine, and needs a shield.
    "DM alone": (["--alpha", "1"], nothing),
    "CA alone": (["--no-dm"], nothing),
    "CA + mean/variance": (["--no-dm"], mean_variance),
    "CA + GAN": (["--no-dm"], gan),
    "alpha 2": (["--alpha", "2"], nothing),
    "alpha 3": (["--alpha", "3"], nothing),
    "alpha 6": (["--alpha", "6"], nothing),
    "CA alone, constant rate": (["--no-dm", "--constant-rate"], nothing),
    "CA + DM, constant rate": (["--constant-rate"], nothing),
    # Where to renoise.
    "coupled": (["--schedule", "coupled"], nothing),
    "full": (FULL, nothing),
    "constrained": (["--schedule", "constrained"], nothing),
    "CA at tau 0 to .3": (FULL, partial(ca_between, 0.0, 0.3)),
    "CA at tau .3 to .7": (FULL, partial(ca_between, 0.3, 0.7)),
    "CA at tau .7 to 1": (FULL, partial(ca_between, 0.7, 1.0)),
    "no CA above tau .5": ([], partial(ca_truncated, 0.5)),
    # The student for one number of steps, and for any.
    "1 step": (["--steps", "1"], nothing),
    "2 steps": (["--steps", "2"], nothing),
    "4 steps": (["--steps", "4"], nothing),
    "8 steps": (["--steps", "8"], nothing),
    "any number of steps": (["--steps", "4,1,2,8"], nothing),
    "1 step, step-aware fake": (["--steps", "1"], step_aware),
    "2 steps, step-aware fake": (["--steps", "2"], step_aware),
    "any number, step-aware fake": (["--steps", "4,1,2,8"], step_aware),
    # Differences from the paper, and the fake that has to keep up.
    "1 fake update": (["--fake-updates", "1"], nothing),
    "5 fake updates": (["--fake-updates", "5"], nothing),
    "follow .05": (["--follow", "0.05"], nothing),
    "slow fake": (SLOW, nothing),
    "slow fake, follow .05": ([*SLOW, "--follow", "0.05"], nothing),
    "fake in data space": ([], data_space),
    "fake on new images": ([], fresh_images),
    "terms not normalized": (["--no-normalize"], nothing),
    "states noised again": ([], renoised_states),
    # Adapters against whole networks.
    "LoRA 4": (["--lora", "4", *LORA], nothing),
    "LoRA 16": (["--lora", "16", *LORA], nothing),
    "LoRA 64": (["--lora", "64", *LORA], nothing),
}
COLUMNS = {"joint": "joint", "best": "best", "best_at": "best at", "open": "open",
           "given": "given", "word": "word", "strict": "strict",
           "frechet": "Frechet", "std_ratio": "std ratio", "latent_std": "latent std",
           "minutes": "minutes", "megabytes": "MB"}


# --- One run ------------------------------------------------------------------------------------


def run_arguments(name, options):
    """The options of distill.py for a variant, completed as distill.main does -> a namespace."""
    own, _ = VARIANTS[name]
    args = distill.parse_arguments(["--steps", "2", "--sample-every", "50", *options, *own])
    args.teacher = str(located(args.teacher or distill.BUNDLED / "teacher"))
    args.prompts = args.prompts or str(distill.BUNDLED / "prompts.txt")
    args.device = sampler.find_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")
    return args


# Options of distill.py that a sweep has its own way for.
REFUSED = {"--seed": "--seeds has the seeds", "--size": "cards have one size",
           "--resume": "a sweep goes on where it stopped", "--overwrite": "name another --out"}


def check(job, options):
    """UserError now, and not in each run, where a run of a chosen variant would be refused."""
    for option in [word.partition("=")[0] for word in options]:
        if option in REFUSED:
            raise UserError(f"{option} is not for a sweep: {REFUSED[option]}")
    if not sampler.read_prompts(job.held_out):
        raise UserError(f"--held-out: there is no prompt in {job.held_out}")
    any_run = run_arguments("CA + DM", options)
    scale.PromptFile(any_run.prompts)
    teacher = open_model(any_run.teacher)
    for name in job.only or VARIANTS:
        try:
            check_run(name, options, teacher)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def check_run(name, options, teacher):
    args, (_, changes) = run_arguments(name, options), VARIANTS[name]
    distill.make_settings(args, argparse.Namespace(**teacher.settings))
    if args.accumulate > args.batch_size:
        raise UserError(f"--accumulate {args.accumulate} is more parts than --batch-size "
                        f"{args.batch_size} has images")
    if (args.lora or 0) > teacher.networks["dit"].config.dim:
        raise UserError(f"--lora {args.lora}: the rank of this teacher's weights is at most "
                        f"{teacher.networks['dit'].config.dim}")
    if args.lora and changes is step_aware:
        raise UserError("with --lora the fake is no network of its own, so it cannot know steps")


def inputs(job, options):
    """What results depend on beside options. Those of other files or numbers are not averaged."""
    return {"held_out": fingerprint(job.held_out), "count": job.count, "watch": job.watch,
            "score_steps": job.score_steps,
            "teacher and prompts": distill.fingerprints(run_arguments("CA + DM", options))}


def on_device(student):
    """The student with all networks on its device. distill.py leaves some of them on the CPU."""
    student.dit.to(student.device)
    student.text_encoder.to(student.device)
    return student


def joint_accuracy(student, prompts, steps):
    """Share of the prompts whose picture shows all that they name."""
    images = evaluate.sample_images(student, prompts, steps, 0.0)
    return evaluate.score(images, prompts, workers=1)["joint"]


def run_variant(name, seed, options, job):
    """Trains and scores one student -> a list of results, one for each number of steps.

    job: the namespace of this script's own options.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled|Mismatch dtype")
    folder = Path(job.out) / f"{name.replace(' ', '_').replace('/', '_')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)                 # of a run that was cut off
    folder.mkdir(parents=True)
    args, (_, changes) = run_arguments(name, options), VARIANTS[name]
    args.seed, args.out = seed, str(folder)
    dtype = getattr(torch, args.dtype if args.lora else "float32")
    pipeline = sampler.load_pipeline(args.teacher, args.device, dtype)
    settings, prompts = distill.make_settings(args, pipeline), scale.PromptFile(args.prompts)
    held_out = sampler.read_prompts(job.held_out)[:job.count]
    checkpoints = {}

    def watch(iteration, student):
        checkpoints[iteration] = joint_accuracy(
            on_device(student), held_out[:job.watch], args.steps[0])

    run = distill.Run(pipeline, prompts, settings, args, **changes(pipeline, args))
    distill.train(run, watch)
    student = on_device(run.averaged_student())
    log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    adapters, whole = folder / "lora.safetensors", folder / "student" / "dit.safetensors"
    best_at = max(checkpoints, key=checkpoints.get)
    about = {"minutes": json.loads(log[-1])["seconds"] / 60,
             "best": checkpoints[best_at], "best_at": best_at,
             "megabytes": (adapters if adapters.exists() else whole).stat().st_size / 1e6}
    results, real, depends_on = [], evaluate.drawings(held_out, 1), inputs(job, options)
    for steps in job.score_steps or sorted(set(args.steps)):
        latents = evaluate.sample_latents(student, held_out, steps, 0.0)
        images = evaluate.decode(student.vae, latents)
        row = evaluate.score(images, held_out, real, workers=1)
        row |= {"latent_std": float(latents.std()), **about}
        results.append({"variant": name, "seed": seed, "steps": steps, "options": options,
                        "inputs": depends_on, "log": json.loads(log[-1]), "score": row})
    for part in () if job.keep else ("checkpoints", "student"):
        shutil.rmtree(folder / part, ignore_errors=True)      # large, and no longer needed
    return results


# --- All runs -----------------------------------------------------------------------------------


def read_results(path):
    """The lines of results.jsonl. Half a line, of a process that was killed, has no newline."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        results = [json.loads(line) for line in lines if line.endswith("\n")]
        good = all({"variant", "seed", "steps", "score"} <= result.keys() for result in results)
    except (ValueError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path} is damaged: remove the lines that are no results of a run")
    return results


STOP = signal.SIGINT, signal.SIGTERM


def interrupt(*_):
    """Handler of both signals: ends the sweep.

    Later signals are ignored, so that nothing disturbs it while it ends the processes of the runs.
    """
    for caught in STOP:
        signal.signal(caught, lambda *_: None)
    raise KeyboardInterrupt


@contextmanager
def signals_blocked():
    """A process that starts in it sees no Ctrl-C and no SIGTERM: the sweep ends it."""
    if not hasattr(signal, "pthread_sigmask"):            # Windows
        yield
        return
    # Python unblocks both signals when it starts this helper, so it has to run before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def report(sender, *job):
    """In a process of its own: sends the results of a run, or why there are none."""
    try:
        sender.send(run_variant(*job))
    except UserError as error:
        sender.send(str(error))
    except Exception as error:    # one run that fails must not end the others
        sender.send(repr(error))


def outcome(receiver, process):
    """What a process that comes to its end has sent."""
    try:
        return receiver.recv()
    except (EOFError, OSError):                           # the system has killed it
        process.join()
        return (f"its process has ended with exit code {process.exitcode}; where memory is short, "
                "give fewer --workers")
    finally:
        process.join()


def run_all(jobs, workers):
    """Yields (job, its results or why there are none) when a run ends; `workers` are side by side.

    Each run has a process of its own, so one that the system kills ends no other.
    """
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job, (receiver, sender) = waiting.pop(0), Pipe(duplex=False)
                process = get_context("spawn").Process(target=report, args=(sender, *job))
                with signals_blocked():
                    process.start()
                    running[receiver] = job, process
                sender.close()
            for receiver in wait(running):
                job, process = running.pop(receiver)
                yield job, outcome(receiver, process)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def run_missing(args, options, path):
    """Runs what results.jsonl lacks, and adds it -> the number of runs that failed."""
    results, failed, wanted = read_results(path), 0, (options, inputs(args, options))
    for r in results:
        if (r.get("options"), r.get("inputs")) != wanted:
            raise UserError(f"{path} holds runs with other options, of another teacher or other "
                            "prompts, scored with another --held-out, --count, --watch or "
                            "--score-steps, or made before teachers were compared: name another "
                            "--out")
    done = {(r["variant"], r["seed"]) for r in results}
    jobs = [(name, seed, options, args) for seed in args.seeds for name in args.only or VARIANTS
            if (name, seed) not in done]
    for caught in STOP:
        signal.signal(caught, interrupt)
    with closing(run_all(jobs, args.workers)) as runs:
        for (name, seed, *_), found in runs:
            if isinstance(found, str):
                print(f"error: {name}, seed {seed}: {found}", file=sys.stderr)
                failed += 1
                continue
            results += found
            text = "".join(json.dumps(result) + "\n" for result in results)
            write_whole(path, lambda part, text=text: part.write_text(text, encoding="utf-8"))
    return failed


def table(results):
    """Results -> Markdown: the mean over seeds, and in brackets half of the range."""
    lines = ["| | steps | seeds | " + " | ".join(COLUMNS.values()) + " |",
             "|---" * (len(COLUMNS) + 3) + "|"]
    for name in VARIANTS:
        rows = [r for r in results if r["variant"] == name]
        for steps in sorted({r["steps"] for r in rows}):
            same = [r["score"] for r in rows if r["steps"] == steps]
            cells = []
            for column in COLUMNS:
                values = [v for score in same if (v := evaluate.figure(score, column)) is not None]
                if not values:
                    cells.append("")
                    continue
                mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
                digits = 3 if mean < 10 else 0
                cells.append(f"{mean:.{digits}f} ({spread:.{digits}f})")
            lines.append(f"| {name} | {steps} | {len(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments():
    parser = Parser(description=__doc__.splitlines()[0],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="runs/sweep", help="folder of the runs and of results.jsonl")
    add("--seeds", type=number(0, 10 ** 6, int), nargs="+", action="extend", metavar="S",
        help="(default: 0 1 2)")
    add("--only", nargs="+", action="extend", metavar="NAME", help="these variants alone")
    add("--workers", type=number(1, 256, int), default=1, help="runs side by side")
    add("--count", type=number(1, 10 ** 6, int), default=1000, help="held-out prompts to score on")
    add("--watch", type=number(1, 10 ** 6, int), default=200, metavar="N",
        help="prompts to score each checkpoint on")
    add("--held-out", default=str(HERE / "prompts_heldout.txt"), metavar="FILE")
    add("--score-steps", type=number(1, 1000, int), nargs="+", action="extend", metavar="N",
        help="numbers of steps to score at (default: those that were trained)")
    add("--keep", action="store_true", help="keep checkpoints and students")
    add("--table", action="store_true", help="print the table of the results there are")
    add("--list", action="store_true", help="print the variants")
    args, options = parser.parse_known_args()
    for name in args.only or ():
        if name not in VARIANTS:
            raise UserError(f"--only: there is no variant {name!r}; --list shows them")
    if args.table and (args.only or args.seeds or args.score_steps or options):
        raise UserError("--table shows all results: it goes without --only, --seeds, --score-steps "
                        "and options of a run")
    args.seeds = args.seeds or [0, 1, 2]
    distill.parse_arguments(options)          # a mistake ends here, not in a worker
    return args, options


def main():
    args, options = parse_arguments()
    path = Path(args.out) / "results.jsonl"
    if args.list:
        print("\n".join(f"{name:34} {' '.join(own)}" for name, (own, _) in VARIANTS.items()))
        return
    failed = 0
    if not args.table:
        check(args, options)
        with alone_in(path.parent):
            failed = run_missing(args, options, path)
    text = table(read_results(path))
    write_whole(path.parent / "table.md",
                lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
