"""Scores checkpoints of the cards world: what was asked for against what is read in the pictures.

    python tutorials/cards/evaluate.py                                 the bundled checkpoints
    python tutorials/cards/evaluate.py --model DIR --steps 1 4 16 --guidance 0 2 --json OUT

Accuracies count, of the prompts that name an attribute, the share whose picture shows it; `joint`
wants everything that the prompt names. `strict` wants the word right and every glyph of it clean.
`frechet` is the Frechet distance between features of the pictures and of drawings for the same
prompts, divided by the drawings' total variance: 0 is the same distribution, 1 is as far as the
drawings spread. Features are mean colors and fixed random filters, never trained. `std_ratio`
and `saturation` compare contrast and color with those of the drawings, and `diversity` how far the
pictures of one prompt differ: 1 is as in the drawings. A model that learned a lower step of the
ladder (train.py --ladder 3) is scored with the same --ladder.
Every figure is given again for `unseen_words` (the word is held out of training), `latin_words`
(capitals and digits), `hanzi_words`, `en`, `zh` (the prompt's language: English prompts name
Chinese words, too), `open` (place, card or ink is left to the model) and `given` (all three
are named).
"""

import argparse
import json
import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # see sampler.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")     # pictures are read on all cores, one each

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]

import data  # noqa: E402
import reader  # noqa: E402
import sampler  # noqa: E402
from convert_weights import Parser, UserError, number, run_command  # noqa: E402
from files import write_whole  # noqa: E402
from formats import path_name  # noqa: E402

GROUPS = ("unseen_words", "latin_words", "hanzi_words", "en", "zh", "open", "given")
FIGURES = ("joint", "thing", "second", "card", "ink", "place", "side", "size", "word", "characters",
           "strict", "frechet", "std_ratio", "saturation")

# --- Right or wrong -----------------------------------------------------------------------------


def judge(reading, wanted):
    """What was read and what a prompt names -> {attribute: right or not}, and "joint", "strict".

    A prompt that names one thing wants no second one; the order of two things is free. One that
    names no word is content with any word, or none.
    """
    hits = {a: reading[a] == name for a, name in wanted.items() if a not in ("thing", "second")}
    shown = {reading["thing"], reading["second"]} - {None}
    named = {wanted.get("thing"), wanted.get("second")} - {None}
    if "second" in wanted:
        hits |= {"thing": wanted["thing"] in shown, "second": wanted["second"] in shown}
    elif named:
        hits["thing"] = shown == named
    if hits:
        hits["joint"] = all(hits.values())
    if "word" in wanted:
        hits["strict"] = hits["word"] and reading["strict"]
    return hits


def right_characters(read, wanted):
    """Characters right in their place, and how many there are: of the longer of the two words."""
    return sum(a == b for a, b in zip(read, wanted, strict=False)), max(len(read), len(wanted))


def accuracy(readings, prompts):
    """{attribute, "characters", "joint" or "strict": share right}; nan where no prompt names it."""
    counts = {name: [] for name in (*data.ATTRIBUTES, "joint", "strict")}
    characters = np.zeros(2)
    for reading, prompt in zip(readings, prompts, strict=True):
        wanted = data.parse(prompt)
        for name, hit in judge(reading, wanted).items():
            counts[name].append(hit)
        if "word" in wanted:
            characters += right_characters(reading["word"], wanted["word"])
    shares = {name: float(np.mean(hits)) if hits else float("nan") for name, hits in counts.items()}
    share = float(characters[0] / characters[1]) if characters[1] else float("nan")
    return shares | {"characters": share}


def groups_of(prompt):
    """The names of GROUPS that a prompt belongs to."""
    wanted = data.parse(prompt)
    missing = [a for a in ("place", "card", "ink") if a not in wanted]
    word = wanted.get("word", "")
    script = "latin_words" if word.isascii() else "hanzi_words"
    return {data.language_of(prompt),
            "open" if missing else "given",
            script if word else "",
            "unseen_words" if data.word_held_out(word) else ""} - {""}


# --- Distributions ------------------------------------------------------------------------------


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def features(images):
    """(B, 3, H, W) in [-1, 1] -> (B, 144), fixed features.

    Mean colors of a 4 x 4 grid (48), and of each quarter the mean response of 24 random 5 x 5
    filters that see no flat color (96), at half the resolution, after ReLU and scaled to weigh
    about as much.
    """
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(24, 3, 5, 5, generator=generator)
    filters -= filters.mean((2, 3), keepdim=True)
    parts = []
    for part in images.split(100):
        pixels = part.float().cpu().clamp(-1, 1)
        outlines = F.relu(F.conv2d(F.avg_pool2d(pixels, 2), filters))
        parts.append(torch.cat((F.adaptive_avg_pool2d(pixels, 4).flatten(1),
                                2 * F.adaptive_avg_pool2d(outlines, 2).flatten(1)), 1))
    return torch.cat(parts)


def frechet(a, b):
    """Features (N, D) and (M, D) -> Frechet distance of their Gaussians, over b's total variance.

    |mean_a - mean_b|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2); nan for fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_b)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance / cov_b.trace())


def saturation(images):
    """Mean difference between the strongest and the weakest channel, 0 to 1."""
    clipped = images.float().clamp(-1, 1)
    return float((clipped.amax(1) - clipped.amin(1)).mean() / 2)


def drawings(prompts, seed, world=data.WORLD):
    """One drawing for each prompt, (B, 3, 128, 128) in [-1, 1]: what a perfect model samples."""
    rng = np.random.default_rng(seed)
    pictures = np.stack([data.draw(data.scene_for(prompt, rng, world)) for prompt in prompts])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def score(images, prompts, real=None, workers=None):
    """Pictures (B, 3, 128, 128) in [-1, 1], unclamped, and their prompts -> {figure: value}.

    Each of GROUPS that has prompts is a dictionary of the same figures. real: drawings for the same
    prompts to compare with, made when it is None. workers: processes that read pictures.
    """
    real = drawings(prompts, 1) if real is None else real
    readings = reader.read_all(to_uint8(images), workers)
    rows = {"images": images.float().cpu(), "real": real, "features": features(images),
            "real_features": features(real)}
    row = figures(readings, prompts, rows, list(range(len(prompts))))
    groups = [groups_of(prompt) for prompt in prompts]
    for name in GROUPS:
        chosen = [i for i, group in enumerate(groups) if name in group]
        if chosen:
            row[name] = figures(readings, prompts, rows, chosen)
    return row


def figure(row, name):
    """A figure of what `score` gives, or None; of one of GROUPS its joint accuracy."""
    value = row.get(name)
    return value.get("joint") if isinstance(value, dict) else value


def figures(readings, prompts, rows, chosen):
    """All figures over the chosen prompts."""
    images, real = rows["images"][chosen], rows["real"][chosen]
    row = accuracy([readings[i] for i in chosen], [prompts[i] for i in chosen])
    return {"count": len(chosen)} | row | {
        "frechet": frechet(rows["features"][chosen], rows["real_features"][chosen]),
        "std_ratio": float(images.std() / real.std()),
        "saturation": saturation(images) / saturation(real)}


# --- Sampling -----------------------------------------------------------------------------------


RESTART_TIME = 0.2       # the layout stays, and what the word looks like is drawn again
RESTART_SEEDS = 10 ** 9  # seeds of the next round of noise: no other prompt has them


@torch.no_grad()
def sample_latents(pipeline, prompts, steps, guidance, seed=0, batch=20, restarts=0, **options):
    """Prompts -> latents (B, C, h, w). The noise of prompt i is that of seed + i, as in sampler.

    UserError for latents that are not finite.
    restarts: how often the result is noised again, to RESTART_TIME or just after it, and goes
    through the rest of the schedule once more (Restart sampling, arXiv 2306.14878).
    options: of sampler.sample.
    """
    latents, device = [], next(pipeline.dit.parameters()).device
    times = sampler.time_schedule(steps, pipeline.shift)
    again = times[times >= RESTART_TIME]
    negative = sampler.encode_prompts(pipeline, [""]) if guidance else None
    title = f"{steps} steps, guidance {guidance:g}"
    for start in tqdm(range(0, len(prompts), batch), title, leave=False, disable=None):
        part = prompts[start:start + batch]
        text = sampler.encode_prompts(pipeline, part)
        x = 0                                  # times[0] is 0: the first round begins with noise
        for i in range(restarts + 1):
            noise, _ = sampler.latent_noise(pipeline, data.SIDE, data.SIDE,
                                            seed + start + i * RESTART_SEEDS, len(part))
            way = again if i else times
            x = sampler.sample(pipeline.dit, way[0] * x + (1 - way[0]) * noise.to(device), text,
                               way, guidance=guidance, negative=negative, **options)
        latents.append(x)
    latents = torch.cat(latents)
    if not latents.isfinite().all():
        raise UserError("sampling gave numbers that are not finite: the model is damaged, or was "
                        "trained too fast")
    return latents


@torch.no_grad()
def decode(vae, latents, batch=5):
    """Latents -> unclamped pictures (B, 3, 128, 128) on the CPU."""
    weights = next(vae.parameters())
    images = [vae.decode(part.to(weights)).float().cpu() for part in latents.split(batch)]
    return torch.cat(images)


@torch.no_grad()
def encode(vae, images, batch=20):
    """Pictures (B, 3, 128, 128) in [-1, 1] -> latents (B, C, h, w)."""
    weights = next(vae.parameters())
    return torch.cat([vae.encode(part.to(weights)) for part in images.split(batch)])


def sample_images(pipeline, prompts, steps, guidance, seed=0, **options):
    """Prompts -> unclamped pictures (B, 3, 128, 128) on the CPU; the noise is sample_latents'."""
    return decode(pipeline.vae, sample_latents(pipeline, prompts, steps, guidance, seed, **options))


def reconstruct(vae, images):
    """Pictures (B, 3, H, W) in [-1, 1] -> unclamped reconstructions, and their mean PSNR in dB."""
    out = decode(vae, encode(vae, images))
    error = (out.clamp(-1, 1) - images.cpu()).square().mean((1, 2, 3)).clamp(min=1e-10)
    return out, float((10 * torch.log10(4 / error)).mean())


OPEN_PROMPTS = ("a panda with the word LOVE", 'the word "HI" above a rocket', "海边有一只小狗",
                "红色的“福”", "a cat on a blue card", "夜空下，写着“快乐”")
DIVERSITY_SEEDS = 16


def spread(images):
    """Root mean square distance of pictures (B, 3, H, W) in [-1, 1] from their mean picture."""
    clipped = images.float().clamp(-1, 1)
    return float((clipped - clipped.mean(0)).square().mean().sqrt())


def diversity(pipeline, steps, guidance, seed=0, world=data.WORLD, **options):
    """How far pictures of one prompt differ, over a few open prompts: 1 is as in the drawings.

    The prompts are those of OPEN_PROMPTS that the world shows, so compare within one world only.
    The noise is that of the seeds from seed + 1 on, and the drawings are those of seed + 1.
    """
    ratios = []
    for prompt in OPEN_PROMPTS:
        if not data.shows(world, prompt):
            continue
        prompts = [prompt] * DIVERSITY_SEEDS
        images = sample_images(pipeline, prompts, steps, guidance, seed + 1, **options)
        ratios.append(spread(images) / spread(drawings(prompts, seed + 1, world)))
    return float(np.mean(ratios))


# --- Command line -------------------------------------------------------------------------------


def json_name(path):
    """An argparse type: where a file can be written. To find out after an hour would be late.

    A file that is there already has to be one of this program.
    """
    folder = os.path.dirname(path) or "."
    if not path or os.path.isdir(path) or not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{path!r} is a folder, or lies in none")
    is_file = os.path.isfile(path)
    if (is_file or not os.path.exists(path)) and not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{folder} is no directory that can be written to")
    if is_file and not holds_results(path):
        raise argparse.ArgumentTypeError(f"{path} exists and holds no results of this program")
    return path


def holds_results(path):
    """Whether a file is empty or one that write_json has written."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        rows = json.loads(text or "[]")
    except (OSError, ValueError):
        return False
    rows = rows if isinstance(rows, list) else [rows]
    return all(isinstance(row, dict) and "joint" in row for row in rows)


def arguments():
    parser = Parser(description="Score cards checkpoints; print a markdown table.")
    folders = [os.path.join(HERE, name) for name in ("teacher", "student")]
    bundled = [folder for folder in folders if os.path.exists(folder)]
    parser.add_argument("--model", nargs="+", action="extend", metavar="DIR",
                        help="one or several checkpoint folders (default: the bundled ones)")
    parser.add_argument("--steps", type=number(1, 1000, int), nargs="+", action="extend",
                        metavar="N",
                        help="one or several numbers of steps (default: the checkpoint's)")
    parser.add_argument("--guidance", type=number(0, 100), nargs="+", action="extend", metavar="G",
                        help="one or several: v + g (v - v_negative) (default: the checkpoint's)")
    parser.add_argument("--guidance-every", type=number(1, 1000, int), default=1, metavar="K",
                        help="compute v - v_negative in every K-th step only (default: 1)")
    parser.add_argument("--cfg-truncation", type=number(0, 1), default=1.0, metavar="T",
                        help="no guidance once t is above T (default: 1)")
    parser.add_argument("--restarts", type=number(0, 100, int), default=0, metavar="K",
                        help=f"noise the result again, to t = {RESTART_TIME}, and sample on from "
                             "there, K times (default: 0)")
    parser.add_argument("--weights", choices=["fp8", "int8"], help="one byte for each weight")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cuda, mps or cpu")
    parser.add_argument("--ladder", type=int, choices=data.STEPS_WITH_WORDS, default=5,
                        help="the step of world.LADDER that the model has learned (default: 5)")
    parser.add_argument("--count", type=number(1, 10 ** 6, int), default=200, metavar="K",
                        help="number of prompts (default: 200)")
    parser.add_argument("--seed", type=number(0, 10 ** 9, int), default=0, metavar="S",
                        help="of noise, drawings, and prompts without a file (default: 0)")
    parser.add_argument("--prompts", type=path_name, metavar="FILE",
                        help="one prompt a line; the first K (default: K held-out prompts)")
    parser.add_argument("--json", type=json_name, metavar="OUT",
                        help="write all figures to this file")
    args = parser.parse_args()
    args.model = args.model or bundled
    return args


def prompts_for(args, world):
    if args.prompts is None:
        return data.prompt_list(args.count, seed=[args.seed, 2], world=world)
    prompts = sampler.read_prompts(args.prompts)[:args.count]
    if not prompts:
        raise UserError(f"{args.prompts} has no prompts in it")
    return prompts


def table_row(name, row):
    values = [row.get(figure, float("nan")) for figure in (*FIGURES, "diversity")]
    return f"| {name} | " + " | ".join("" if np.isnan(v) else f"{v:.3f}" for v in values) + " |"


def print_rows(name, row):
    print(table_row(name, row))
    for group in GROUPS:
        if group in row:
            title = f"- {group.replace('_', ' ')} ({row[group]['count']})"
            print(table_row(title, row[group]), flush=True)


def without_nan(value):
    """nan and inf are no JSON: null takes their place."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_json(path, rows):
    """One run is one object; several are a list."""
    rows = [without_nan(row) for row in rows]
    text = json.dumps(rows[0] if len(rows) == 1 else rows, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def runs(args, pipelines):
    for model, pipeline in zip(args.model, pipelines, strict=True):
        for steps in args.steps or [pipeline.steps]:
            for guidance in [pipeline.guidance] if args.guidance is None else args.guidance:
                yield model, pipeline, steps, guidance


def check_runs(args, pipelines):
    """UserError, before an hour of work, for a model of another size and for idle options."""
    for pipeline in pipelines:
        sampler.check_size(pipeline, data.SIDE, data.SIDE)
    for _, pipeline, steps, _ in runs(args, pipelines):
        times = sampler.time_schedule(steps, pipeline.shift)
        if args.restarts and times[-2] < RESTART_TIME:
            raise UserError(f"--restarts {args.restarts} has no effect with --steps {steps}: no "
                            f"step begins at {RESTART_TIME} or later")
    guided = any(guidance for *_, guidance in runs(args, pipelines))
    if not guided and (args.guidance_every > 1 or args.cfg_truncation < 1):
        raise UserError("without --guidance there is no effect of --guidance-every and of "
                        "--cfg-truncation")


def end_by_exception(*_):
    """Handler of SIGTERM: processes that read pictures end with this one."""
    sys.exit(143)


def main():
    signal.signal(signal.SIGTERM, end_by_exception)
    args = arguments()
    if not args.model:
        raise UserError("no checkpoint is bundled; name one with --model")
    world = data.upright(data.LADDER[args.ladder])
    prompts = prompts_for(args, world)
    device = sampler.find_device(args.device)
    pipelines = [sampler.load_pipeline(model, device) for model in args.model]
    check_runs(args, pipelines)
    for pipeline in pipelines if args.weights else ():
        sampler.quantize(pipeline.dit, args.weights)
        sampler.quantize(pipeline.text_encoder, args.weights)
    options = {"guidance_every": args.guidance_every, "cfg_truncation": args.cfg_truncation,
               "restarts": args.restarts}
    real = drawings(prompts, args.seed + 1, world)
    print("| | " + " | ".join((*FIGURES, "diversity")) + " |\n|" + "---|" * (len(FIGURES) + 2))
    row = score(drawings(prompts, args.seed + 2, world), prompts, real) | {"diversity": 1.0}
    print(table_row("drawings", row))
    rebuilt, decibels = reconstruct(pipelines[0].vae, real)
    print(table_row(f"VAE, {decibels:.1f} dB", score(rebuilt, prompts, real)), flush=True)
    rows = []
    for model, pipeline, steps, guidance in runs(args, pipelines):
        images = sample_images(pipeline, prompts, steps, guidance, args.seed, **options)
        row = {"model": model, "steps": steps, "guidance": guidance, "seed": args.seed,
               "ladder": args.ladder, "weights": args.weights, **options}
        row |= score(images, prompts, real)
        row["diversity"] = diversity(pipeline, steps, guidance, args.seed, world, **options)
        print_rows(f"{os.path.relpath(model)}, {steps} steps, guidance {guidance:g}", row)
        rows.append(row)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    run_command(main)
