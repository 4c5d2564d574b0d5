"""Films and long figures: the collapse on pinwheel and cards, the observer, five runs to read."""

import copy
import io
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw

import figures as fig
import plot_run
from distill import data_estimate, fake_loss, renoise, shift_time
from figures import STUDENT
from files import write_whole
from pinwheel import TEXT, distill_pinwheel, fit_teacher, measure, samples, update
from sampler import (
    encode_prompts,
    latent_noise,
    load_pipeline,
    read_prompts,
    sample,
    time_schedule,
)

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


def run_cards(name, options):
    """A run of distill.py in runs/figures/NAME, unless it is there, finished -> its folder."""
    out = fig.ROOT / "runs" / "figures" / name
    finished = out / "finished.txt"            # with the options of the run that has ended
    if not finished.exists() or finished.read_text() != options:
        finished.unlink(missing_ok=True)
        command = [sys.executable, str(fig.ROOT / "distill.py"), "--out", str(out), "--overwrite"]
        fig.call(command + options.split())
        finished.write_text(options)
    return out


COLLAPSE = ("--steps 4 --alpha 4 --constant-rate --iterations 160 --batch-size 8 --sample-every 20 "
            "--keep 1")
CARD_RUNS = {"CA alone": f"{COLLAPSE} --no-dm", "CA + DM": COLLAPSE}


def cards_film(folder):
    """Writes collapse.png and collapse.gif: eight prompts while CA alone and CA + DM train."""
    strips = {name: plot_run.read_strips(
        run_cards("collapse-" + name.replace(" ", "").lower(), options), count=8)
        for name, options in CARD_RUNS.items()}
    figure, axes = plt.subplots(2, 1, figsize=(9, 9), squeeze=False)
    for axis, (name, rows) in zip(axes[:, 0], strips.items(), strict=True):
        height = next(iter(rows.values())).height
        axis.imshow(np.concatenate([np.asarray(row) for row in rows.values()]))
        axis.set(xticks=[], title=f"{name}: same prompts and noise after so many iterations",
                 yticks=[height * (i + 0.5) for i in range(len(rows))], yticklabels=list(rows))
        axis.grid(False)
    fig.save(figure, "collapse.png", palette=True, dpi=120)
    frames = []
    for moment in strips["CA alone"]:
        pair = [titled(rows[moment], f"{name}, {moment} iterations")
                for name, rows in strips.items()]
        frames.append(Image.fromarray(np.concatenate(pair)).quantize(128))
    write_whole(folder / "collapse.gif", lambda path: frames[0].save(
        path, format="GIF", save_all=True, append_images=frames[1:], loop=0,
        duration=[900] * (len(frames) - 1) + [2500]))


def titled(strip, title, height=18):
    """A row of pictures with a line of text above it."""
    image = Image.new("RGB", (strip.width, strip.height + height), "white")
    image.paste(strip, (0, height))
    ImageDraw.Draw(image).text((4, 3), title, fill="black")
    return image


# --- One good run and four bad ones -------------------------------------------------------------

SHORT_RUN = ("--steps 2 --alpha 2 --constant-rate --lr 1e-3 --iterations 60 --batch-size 8 "
             "--log-every 5")
READ_RUNS = {"good": "", "rate_too_high": "--lr 1e-2", "fake_too_slow": "--fake-lr 1e-5",
             "alpha_too_large": "--alpha 12", "no_shield": "--no-dm"}


def read_runs():
    """The five runs, side by side -> Figure."""
    return plot_run.compare_runs([run_cards(name, f"{SHORT_RUN} {options}")
                                  for name, options in READ_RUNS.items()])


# --- The observer on the bundled world ----------------------------------------------------------


def observer_figure(count=6, taus=(0.25, 0.5, 0.75), iterations=150):
    """Outputs of a student spoiled by CA alone, and what teacher and fake take them for -> Figure.

    The student is that of the collapse. A copy of the teacher learns its outputs and does nothing
    else: it observes.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    spoiled = load_pipeline(run_cards("collapse-caalone", CARD_RUNS["CA alone"]) / "student")
    teacher = load_pipeline(fig.WORLD / "teacher")
    fake = copy.deepcopy(teacher.dit).requires_grad_(True)
    optimizer = torch.optim.Adam(fake.parameters(), 1e-3, (0.0, 0.99))
    prompts = read_prompts(fig.WORLD / "prompts.txt")
    times, side = time_schedule(4, teacher.shift), teacher.size
    for i in range(iterations):
        some = [prompts[(16 * i + k) % len(prompts)] for k in range(16)]
        text = encode_prompts(teacher, some)
        with torch.no_grad():
            x = sample(spoiled.dit, latent_noise(teacher, side, side, 16 * i, 16)[0], text, times)
        tau = shift_time(torch.rand(16), teacher.shift)
        update(fake_loss(fake, x, tau, text, torch.randn_like(x)), optimizer)
    shown = fig.open_prompts(count)
    with torch.no_grad():
        text = encode_prompts(teacher, shown)
        noise = latent_noise(teacher, side, side, 0, count)[0]
        x = sample(spoiled.dit, noise, text, times)
        rows = {"the student's outputs": x}
        for tau in taus:
            t = torch.full((count,), tau)
            x_t = renoise(x, t, latent_noise(teacher, side, side, 100, count)[0])
            for name, net in (("teacher", teacher.dit), ("fake", fake)):
                rows[f"{name}, tau {tau}"] = data_estimate(net, x_t, t, text)
        images = {name: teacher.vae.decode(x).clamp(-1, 1) / 2 + 0.5 for name, x in rows.items()}
    figure, axes = plt.subplots(len(rows), count, figsize=(1.4 * count + 1.5, 1.4 * len(rows)))
    for row, (name, pictures) in zip(axes, images.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure
