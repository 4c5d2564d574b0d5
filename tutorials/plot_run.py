"""One picture of a run of distill.py: its training curves, and the same prompts drawn as the student learns.

    python tutorials/plot_run.py runs/student [--out FILE.png]        default: runs/student/run.png

All of it is read from log.jsonl (distill.log_line says what a line holds) and samples/ of the run.
"""

import argparse
import json
from pathlib import Path

from figures import BLUE, GREY, ORANGE, RED                   # it also puts the repository on the path
from matplotlib.figure import Figure
from convert_weights import UserError, is_number, read_json, run_command
from distill import save_whole
from sampler import read_image

STRIPS = 6                                                    # rows of samples, at most
PANELS = [                                                    # title, what the axis measures, {curve: name in the log}
    ("Losses", "mean square", {"student": "loss", "fake": "fake_loss", "discriminator": "discriminator_loss"}),
    ("The two terms", "rms", {"DM, the shield": "dm_rms", "CA, the spear": "ca_rms"}),
    ("Shield beside spear", "rms(DM) / rms(CA)", {"DM / CA": "dm_over_ca"}),
    ("Direction of DM and CA", "cosine", {"cosine": "cosine"}),
    ("Spread of the outputs", "std / reference std", {"student": "std_ratio"}),
    ("Learning rates", "rate", {"student": "lr", "fake or discriminator": "fake_lr"})]
NEEDED = ("iteration", "loss", "dm_rms", "ca_rms", "cosine", "std_ratio", "lr")


def read_log(path):
    """log.jsonl -> its lines as dicts. UserError names the first line that is not one of distill.py's."""
    try:
        lines, log = path.read_text(encoding="utf-8").splitlines(), []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
    for number, line in enumerate(lines, 1):
        try:
            log.append(json.loads(line))
            if not all(map(is_number, [log[-1][name] for name in NEEDED] + list(log[-1].values()))):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: line {number} is damaged, or not from distill.py") from None
    if not log:
        raise UserError(f"{path} is empty: the run has not logged anything yet")
    return log


def read_strips(folder):
    """Sample pictures of the run, the first, the last and some between -> {iteration: the first row of the grid}."""
    files, strips = sorted(file for file in (folder / "samples").glob("*.png") if file.stem.isdecimal()), {}
    for file in sorted({files[round(i * (len(files) - 1) / (STRIPS - 1))] for i in range(STRIPS)}) if files else ():
        strips[int(file.stem)] = image = read_image(file)
        if (folder / "student" / "config.json").exists():     # it knows how high a row is
            row = read_json(folder / "student" / "config.json").get("size", image.height) + 2
            strips[int(file.stem)] = image = image.crop((0, 0, image.width, min(row, image.height)))
        image.thumbnail((1600, 1600))
    return strips


def plot_run(folder):
    """The folder of a run of distill.py -> Figure."""
    if not (folder := Path(folder)).is_dir():
        raise UserError(f"there is no folder {folder}")
    log, strips = read_log(folder / "log.jsonl"), read_strips(folder)
    heights = [6, sum(11.7 * strip.height / strip.width + 0.35 for strip in strips.values())][:1 + bool(strips)]     # inches
    figure = Figure(figsize=(12, sum(heights)))
    parts = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    parts[0].suptitle(f"The run {folder.resolve().name}")
    for axis, (title, unit, curves) in zip(parts[0].subplots(2, 3).flat, PANELS):
        for (label, name), colour in zip(curves.items(), (BLUE, ORANGE, RED)):
            points = [(line["iteration"], line[name]) for line in log if line.get(name)]       # a term that is left out is 0
            if points:
                axis.plot(*zip(*points), color=colour, label=label, marker="." if len(points) < 20 else None)
        if title.startswith(("Spread", "Direction")):
            axis.axhline(title.startswith("Spread"), color=GREY, linestyle="--", linewidth=1.5)
        axis.set(title=title, xlabel="iteration", ylabel=unit, yscale="log" if unit == "rate" else "linear")
        axis.locator_params("x", integer=True, nbins=5)
        if len(curves) > 1 and axis.lines:
            axis.legend()
    for axis, (iteration, strip) in zip(parts[1].subplots(len(strips), squeeze=False)[:, 0] if strips else (), strips.items()):
        axis.imshow(strip, interpolation="nearest" if strip.height < 100 else None)
        axis.set(xticks=[], yticks=[], frame_on=False, title=f"Samples after iteration {iteration}")
    return figure


def main():
    parser = argparse.ArgumentParser(description="Draw the curves and the samples of a run of distill.py.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN_DIR", help="what was --out of distill.py")
    parser.add_argument("--out", metavar="FILE.png", help="default: run.png in RUN_DIR")
    args = parser.parse_args()
    out = Path(args.out or Path(args.run) / "run.png")
    if out.suffix.lower() != ".png" or out.is_dir():          # never over a file of another kind
        raise UserError(f"--out should be the name of a .png file, not {out}")
    save_whole(out, lambda part, figure=plot_run(args.run): figure.savefig(part, format="png", dpi=100))
    print(out)


if __name__ == "__main__":
    run_command(main)
