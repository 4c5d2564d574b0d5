"""The collapse of the spear as a film, on the pinwheel and on the cards, at a constant rate."""

import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import figures as fig
import plot_run
from convert_weights import write_whole
from figures import STUDENT
from pinwheel import TEXT, distill_pinwheel, fit_teacher, measure, samples

MOMENTS = [0, 2, 4, 6, 8, 10, 12, 14, 17, 20, 25, 30, 40, 50, 60, 80, 100, 130, 160, 200, 250, 320,
           400]
RUNS = {"CA alone (the spear)": {"shield": False}, "DM alone (the shield)": {"alpha": 1.0},
        "CA + DM": {}}


def run_films(teacher, count=400):
    """{name of a run: {iteration: samples}}."""
    films = {}
    for name, options in RUNS.items():
        frames = films[name] = {}

        def watch(i, average, frames=frames):
            if i in MOMENTS:
                frames[i] = samples(average, 2)

        distill_pinwheel(teacher, count=count, constant_rate=True, watch=watch, **options)
    return films


def draw_frame(films, i):
    """One frame of the film as an image of 720 x 264 pixels."""
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.64), dpi=100)
    for axis, (name, frames) in zip(axes, films.items(), strict=True):
        off = measure(frames[i])["off"]
        fig.draw_samples(axis, frames[i], TEXT, STUDENT, f"{name}\noff {off:.2f}", count=400)
    figure.suptitle(f"iteration {i}", x=0.01, ha="left", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    return Image.open(buffer).convert("RGB")


def pinwheel_film(folder):
    """Writes film.gif: the three runs side by side."""
    torch.set_num_threads(1)
    films = run_films(fit_teacher())
    images = [draw_frame(films, i).quantize(64) for i in MOMENTS]
    times = [1500] + [500] * (len(images) - 2) + [3000]
    folder.mkdir(exist_ok=True)
    write_whole(folder / "film.gif", lambda path: images[0].save(
        path, format="GIF", save_all=True, append_images=images[1:], duration=times, loop=0))


# --- The same on the cards ----------------------------------------------------------------------

CARD_RUNS = {"CA alone": ["--no-dm"], "CA + DM": []}


def run_cards(name, options, iterations, batch, every):
    """A run of distill.py in runs/NAME, unless it is there -> {iteration: first row of cards}."""
    out = fig.ROOT / "runs" / name
    if not (out / "student").exists():
        command = [sys.executable, str(fig.ROOT / "distill.py"), "--out", str(out), "--alpha", "4",
                   "--constant-rate", "--iterations", str(iterations), "--batch-size", str(batch),
                   "--sample-every", str(every), "--overwrite", *options]
        subprocess.run(command, check=True)
    return plot_run.read_strips(out, count=8)


def cards_film(folder, iterations=160, batch=8, every=20):
    """Writes collapse.png and collapse.gif: eight prompts while CA alone and CA + DM train."""
    strips = {name: run_cards("collapse-" + name.replace(" ", "").lower(), options, iterations,
                              batch, every) for name, options in CARD_RUNS.items()}
    figure, axes = plt.subplots(2, 1, figsize=(9, 9), squeeze=False)
    for axis, (name, rows) in zip(axes[:, 0], strips.items(), strict=True):
        height = next(iter(rows.values())).height
        axis.imshow(np.concatenate([np.asarray(row) for row in rows.values()]))
        axis.set(xticks=[], title=f"{name}: same prompts and noise after so many iterations",
                 yticks=[height * (i + 0.5) for i in range(len(rows))], yticklabels=list(rows))
        axis.grid(False)
    fig.save(figure, "collapse.png", dpi=120)
    frames = []
    for moment in strips["CA alone"]:
        pair = [np.asarray(rows[moment]) for rows in strips.values()]
        frames.append(Image.fromarray(np.concatenate(pair)).quantize(128))
    write_whole(folder / "collapse.gif", lambda path: frames[0].save(
        path, format="GIF", save_all=True, append_images=frames[1:], loop=0,
        duration=[900] * (len(frames) - 1) + [2500]))
