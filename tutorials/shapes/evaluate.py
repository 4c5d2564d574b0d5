"""Reads pictures of the shapes world back, without a network, and scores checkpoints by it.

    python tutorials/shapes/evaluate.py                                                 teacher and student side by side
    python tutorials/shapes/evaluate.py --model tutorials/shapes/teacher --steps 1 4 16 --guidance 0 3

Accuracy counts, of the prompts that mention an attribute, the share whose picture shows it; `joint` wants everything
the prompt mentions at once. A shape that fits no template, or a picture without two colours, is wrong in every part
it cannot be read in. FD is the Frechet distance between features of sampled pictures and of drawings for the same
prompts, divided by the drawings' total feature variance: 0 is the same distribution, 1 is as far as the spread of the
real ones. The features are those of `features` below: mean colours and random, seeded filters, never trained.
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]

import data                                           # noqa: E402
import sampler                                        # noqa: E402
from convert_weights import UserError, run_command    # noqa: E402

MIN_IOU = 0.8            # below this no template fits: the shape counts as unreadable
MIN_CONTRAST = 40.0      # RGB distance between shape and background below which there is no shape
SIZE_BORDER = 13.0       # pixels: geometric mean of the two half heights, small and large
OUT_OF_RANGE = 1.05      # |value| of a decoded picture above this is counted as out of range


# --- Reading one picture ------------------------------------------------------------------------------------


def nearest_colour(rgb):
    return min(data.COLOURS, key=lambda name: np.linalg.norm(rgb - np.array(data.COLOURS[name])))


def template_moments():
    """For each shape of radius 1: area, and centroid relative to its centre."""
    moments, scale = {}, 24.0
    for shape in data.SHAPES:
        mask = data.coverage(shape, 32, 32, scale)
        grid, area = np.arange(64) + 0.5, mask.sum()
        x, y = (mask.sum(0) * grid).sum() / area, (mask.sum(1) * grid).sum() / area
        moments[shape] = area / scale ** 2, (x - 32) / scale, (y - 32) / scale
    return moments


MOMENTS = template_moments()


def segment(rgb):
    """(H, W, 3) in 0 to 255 -> share of each pixel that is shape (H, W), shape's colour, background's colour.

    The background is what the border mostly shows; the shape is what differs most from it.
    """
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    background = np.median(border, 0)
    distance = np.linalg.norm(rgb - background, axis=-1)
    peak = np.sort(distance, None)[-100:].mean()             # the smallest shape has some 160 pixels
    colour = np.median(rgb[distance >= 0.8 * peak], 0)
    axis = colour - background
    share = (rgb - background) @ axis / max(axis @ axis, 1.0)
    return np.clip((share - 0.2) / 0.6, 0, 1), colour, background   # a little noise is neither shape nor hole


def fit(mask):
    """Share of shape (H, W) -> best (iou, shape, x, y, radius). Centre and radius by moments, then each template compared."""
    grid, area = np.arange(len(mask)) + 0.5, max(mask.sum(), 1e-6)
    cx, cy = (mask.sum(0) * grid).sum() / area, (mask.sum(1) * grid).sum() / area
    fits = []
    for shape, (unit_area, dx, dy) in MOMENTS.items():
        radius = np.sqrt(area / unit_area)
        x, y = cx - dx * radius, cy - dy * radius
        template = data.coverage(shape, x, y, max(radius, 0.1), len(mask), oversample=2)
        fits.append((np.minimum(mask, template).sum() / np.maximum(mask, template).sum(), shape, x, y, radius))
    return max(fits)


def read(image):
    """(H, W, 3) picture, 0 to 255 -> {"shape": ..., ..., "iou", "x", "y"}; an attribute that cannot be read is None."""
    mask, colour, background = segment(np.asarray(image, np.float64))
    reading = dict.fromkeys(data.ATTRIBUTES) | {"background": nearest_colour(background), "iou": 0.0, "x": None, "y": None}
    if np.linalg.norm(colour - background) < MIN_CONTRAST:
        return reading
    iou, shape, x, y, radius = fit(mask)
    reading |= {"colour": nearest_colour(colour), "iou": iou, "x": x, "y": y}
    column, row = (int(np.clip(np.rint((c - data.SIDE / 2) / data.CELL), -1, 1)) for c in (x, y))
    reading["position"] = next(n for n, cell in data.POSITIONS.items() if cell == (column, row))
    reading["size"] = "small" if radius < SIZE_BORDER else "large"
    if iou >= MIN_IOU:
        reading["shape"] = shape
    return reading


# --- Scores over many pictures ------------------------------------------------------------------------------


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def accuracy(readings, prompts):
    """{attribute or "joint": share right}, each over the prompts that mention it."""
    right = {a: [] for a in (*data.ATTRIBUTES, "joint")}
    for reading, prompt in zip(readings, prompts):
        hits = {a: reading[a] == value for a, value in data.parse(prompt).items()}
        for attribute, hit in hits.items():
            right[attribute].append(hit)
        if hits:
            right["joint"].append(all(hits.values()))
    return {a: float(np.mean(hits)) if hits else float("nan") for a, hits in right.items()}


@torch.no_grad()
def features(images):
    """(B, 3, H, W) in [-1, 1] -> (B, 144): mean colours of a 4 x 4 grid (48), and of each quarter the mean response of
    24 random 5 x 5 filters that see no flat colour (96), after ReLU and scaled to weigh about as much."""
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(24, 3, 5, 5, generator=generator)
    filters -= filters.mean((2, 3), keepdim=True)
    images = images.float().cpu()
    outlines = F.adaptive_avg_pool2d(F.relu(F.conv2d(images, filters)), 2)
    return torch.cat((F.adaptive_avg_pool2d(images, 4).flatten(1), 2 * outlines.flatten(1)), 1)


def frechet(a, b):
    """Features (N, D) and (M, D) -> Frechet distance of their Gaussians, divided by the trace of b's covariance.

    |mean_a - mean_b|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2)
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_b)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance / cov_b.trace())


def statistics(images):
    """Unclamped pictures (B, 3, H, W) -> mean saturation (max - min channel, 0 to 1), pixel std, share out of range."""
    clipped = images.clamp(-1, 1)
    return {"saturation": float((clipped.amax(1) - clipped.amin(1)).mean() / 2), "pixel_std": float(images.std()),
            "out_of_range": float((images.abs() > OUT_OF_RANGE).float().mean())}


def drawings(prompts, seed):
    """One drawing for each prompt, (B, 3, 64, 64) in [-1, 1]: what a perfect model would sample."""
    rng = np.random.default_rng(seed)
    pictures = np.stack([data.draw(data.scene_for(p, rng)) for p in prompts])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def score(images, prompts, real=None):
    """Unclamped pictures (B, 3, 64, 64) and their prompts -> all figures of one row, and the same accuracy by language."""
    readings = [read(picture) for picture in to_uint8(images)]
    row = accuracy(readings, prompts) | statistics(images)
    for language in ("en", "zh"):
        chosen = [i for i, p in enumerate(prompts) if p.isascii() == (language == "en")]
        part = accuracy([readings[i] for i in chosen], [prompts[i] for i in chosen])
        row |= {f"joint_{language}": part["joint"], f"shape_{language}": part["shape"]}
    if real is not None:
        row["fd"] = frechet(features(images.clamp(-1, 1)), features(real))
    return row


# --- Sampling -----------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_latents(pipeline, prompts, steps, guidance, seed=0, batch=100):
    """Prompts -> latents (B, C, h, w). The noise of prompt i depends on seed, i and batch alone."""
    latents, device = [], next(pipeline.dit.parameters()).device
    channels, side = pipeline.dit.config.in_channels, data.SIDE // pipeline.vae.config.downsampling
    times, generator = sampler.time_schedule(steps, pipeline.shift), torch.Generator().manual_seed(seed)
    negative = sampler.encode_prompts(pipeline, [""]) if guidance else None
    for start in tqdm(range(0, len(prompts), batch), f"{steps} steps, guidance {guidance:g}", leave=False, disable=None):
        part = prompts[start:start + batch]
        noise = torch.randn(len(part), channels, side, side, generator=generator).to(device)
        text = sampler.encode_prompts(pipeline, part)
        latents.append(sampler.sample(pipeline.dit, noise, text, times, guidance=guidance, negative=negative))
    return torch.cat(latents)


@torch.no_grad()
def decode(vae, latents, batch=10):
    """Latents -> unclamped pictures (B, 3, 64, 64) on the CPU."""
    return torch.cat([vae.decode(part.to(next(vae.parameters()).dtype)).float().cpu() for part in latents.split(batch)])


@torch.no_grad()
def encode(vae, images, batch=10):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> latents (B, C, h, w)."""
    return torch.cat([vae.encode(part.to(next(vae.parameters()))) for part in images.split(batch)])


def sample_images(pipeline, prompts, steps, guidance, seed=0, batch=100):
    """Prompts -> unclamped pictures (B, 3, 64, 64) on the CPU, from the noise of sample_latents."""
    return decode(pipeline.vae, sample_latents(pipeline, prompts, steps, guidance, seed, batch))


def diversity(pipeline, steps, guidance, seeds=16, drawn=False):
    """How different the pictures of one prompt are between seeds, over a few prompts that leave the position open:
    spread (std, pixels) of the shape's centre, and root mean square pixel difference from the prompt's mean picture."""
    spreads, differences = [], []
    for prompt in DIVERSITY_PROMPTS:
        images = drawings([prompt] * seeds, 0) if drawn else sample_images(pipeline, [prompt] * seeds, steps, guidance, seed=1)
        centres = [(r["x"], r["y"]) for r in map(read, to_uint8(images)) if r["x"] is not None]
        spreads.append(np.std(centres, 0).mean() if len(centres) > 1 else 0.0)
        differences.append(float((images.clamp(-1, 1) - images.clamp(-1, 1).mean(0)).square().mean().sqrt()))
    return {"centre_spread": float(np.mean(spreads)), "seed_difference": float(np.mean(differences))}


DIVERSITY_PROMPTS = ["a small red circle on a blue background", "a large yellow star on a black background",
                     "绿色背景上有一个白色的小爱心", "粉色背景上有一个紫色的大正方形"]


def reconstruct(vae, images):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> unclamped reconstructions, and PSNR in dB averaged over pictures."""
    out = decode(vae, encode(vae, images))
    error = (out.clamp(-1, 1) - images).square().mean((1, 2, 3)).clamp(min=1e-10)
    return out, float((10 * torch.log10(4 / error)).mean())


# --- Command line -------------------------------------------------------------------------------------------

COLUMNS = {"joint": "joint", "joint_en": "English", "joint_zh": "Chinese", "shape": "shape", "colour": "colour",
           "background": "backgr.", "size": "size", "position": "position", "fd": "FD", "saturation": "saturation",
           "pixel_std": "std", "out_of_range": "out of range", "centre_spread": "centre spread", "seed_difference": "seeds differ"}


def table_row(name, row):
    return f"| {name} | " + " | ".join(f"{row[c]:.3f}" if c in row else "" for c in COLUMNS) + " |"


def arguments():
    parser = argparse.ArgumentParser(description="Score shapes checkpoints; prints a markdown table.")
    bundled = [folder for folder in (os.path.join(HERE, name) for name in ("teacher", "student")) if os.path.exists(folder)]
    parser.add_argument("--model", nargs="+", default=bundled, metavar="DIR", help="one or several checkpoint folders (default: the bundled ones)")
    parser.add_argument("--steps", type=int, nargs="+", help="one or several numbers of steps; default: the checkpoint's")
    parser.add_argument("--guidance", type=float, nargs="+", help="one or several: v = v_pos + g (v_pos - v_neg); default: the checkpoint's")
    parser.add_argument("--prompts", default=os.path.join(HERE, "prompts_heldout.txt"), help="file, one prompt a line")
    parser.add_argument("--count", type=int, default=1000, help="use the first so many prompts")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_prompts(path, count=None):
    """The first `count` lines of a file that are not empty."""
    prompts = sampler.read_prompts(path)[:count]
    if not prompts:
        raise UserError(f"{path} has no prompts in it")
    return prompts


def main():
    args = arguments()
    prompts = read_prompts(args.prompts, args.count)
    pipelines = [sampler.load_pipeline(model) for model in args.model]
    real = drawings(prompts, args.seed + 1)
    print("| | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    print(table_row("drawings", score(drawings(prompts, args.seed + 2), prompts, real) | diversity(None, 0, 0, drawn=True)))
    rebuilt, psnr = reconstruct(pipelines[0].vae, real)
    print(table_row(f"VAE, {psnr:.1f} dB", score(rebuilt, prompts, real)), flush=True)
    for model, pipeline in zip(args.model, pipelines):
        for steps in args.steps or [pipeline.steps]:
            for guidance in [pipeline.guidance] if args.guidance is None else args.guidance:
                images = sample_images(pipeline, prompts, steps, guidance, args.seed)
                row = score(images, prompts, real) | diversity(pipeline, steps, guidance)
                print(table_row(f"{os.path.relpath(model)}, {steps} step{'s' * (steps > 1)}, guidance {guidance:g}", row), flush=True)


if __name__ == "__main__":
    run_command(main)
