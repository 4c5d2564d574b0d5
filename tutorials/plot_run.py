"""One picture of a run of distill.py: training curves, and the same prompts as the student learns.

    python tutorials/plot_run.py runs/student [--out FILE.png]        default: runs/student/run.png
    python tutorials/plot_run.py runs/good runs/bad                   side by side: runs/runs.png

All of it is read from log.jsonl and samples/ of the run. With several runs each has a column, and
rows share an axis. tutorials/how_to_read_a_run.md says what to look for.
"""

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import CA, DM, FAKE, GREY, STUDENT  # isort: skip  (it asks for matplotlib)
from matplotlib.figure import Figure
from PIL import Image

from convert_weights import Parser, UserError, is_number, read_json, run_command
from files import write_whole
from formats import path_name
from sampler import read_image

STRIPS = 6                                                # rows of samples, at most
PANELS = [                                                # title, unit, {curve: name in the log}
    ("Losses", "mean square",
     {"student": "loss", "fake": "fake_loss", "the fake's floor": "fake_floor"}),
    ("The two terms", "rms", {"DM, the shield": "dm_rms", "CA, the spear": "ca_rms"}),
    ("Shield beside spear", "rms(DM) / rms(CA)", {"DM / CA": "dm_over_ca"}),
    ("Direction of DM and CA", "cosine", {"cosine": "cosine"}),
    ("Spread of the outputs", "std / reference std", {"student": "std_ratio"}),
    ("Saturation of the samples", "0 to 1", {"student": "saturation"})]
COLORS = {"dm_rms": DM, "ca_rms": CA, "fake_loss": FAKE, "fake_floor": GREY, "dm_over_ca": DM}
SIDE_BY_SIDE = [PANELS[1], ("The fake's loss", "mean square",
                            {"fake": "fake_loss", "its floor": "fake_floor"}), PANELS[4]]
NEEDED = ("iteration", "seconds", "lr")      # a line of skipped iterations has no losses


def read_log(path):
    """log.jsonl -> its lines as dicts. UserError names the first one that is not distill.py's."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from None
    if not lines:
        raise UserError(f"{path} is empty: the run has not logged anything yet")
    return [read_line(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]


def read_line(text, place):
    """One line of the log -> dict."""
    try:
        line = json.loads(text)
        good = all(map(is_number, [line[name] for name in NEEDED] + list(line.values())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise UserError(f"{place} is damaged, or not from distill.py")
    return line


def read_strips(folder, count=STRIPS):
    """`count` sample pictures of the run, first to last -> {iteration: the first row}."""
    files = sorted(file for file in (folder / "samples").glob("*.png") if file.stem.isdecimal())
    if not files:
        return {}
    chosen = {files[round(i * (len(files) - 1) / (count - 1))] for i in range(count)}
    config, strips = folder / "student" / "config.json", {}
    for file in sorted(chosen):
        image = read_image(file)
        if config.exists():                               # it knows how high a row is
            size = read_json(config).get("size")
            row = size + 2 if isinstance(size, int) and size > 0 else image.height
            image = image.crop((0, 0, image.width, min(row, image.height)))
        image.thumbnail((1600, 1600))
        strips[int(file.stem)] = image
    return strips


def draw_panel(axis, log, title, unit, names):
    """One panel of curves. A term that was left out of the run is 0, and is not drawn."""
    for label, name in names.items():
        points = [(line["iteration"], line[name]) for line in log if line.get(name)]
        if points:
            axis.plot(*zip(*points, strict=True), color=COLORS.get(name, STUDENT), label=label,
                      linestyle="--" if name == "fake_floor" else "-",
                      marker="." if len(points) < 20 and name != "fake_floor" else None)
    if title.startswith(("Spread", "Direction")):
        axis.axhline(title.startswith("Spread"), color=GREY, linestyle="--", linewidth=1.5)
    axis.set(title=title, xlabel="iteration", ylabel=unit)
    axis.locator_params("x", integer=True, nbins=5)
    if len(names) > 1 and axis.lines:
        axis.legend()


def plot_run(folder):
    """The folder of a run of distill.py -> Figure."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    log, strips = read_log(folder / "log.jsonl"), read_strips(folder)
    heights = [6.0]                                       # inches
    if strips:
        heights += [sum(11.7 * image.height / image.width + 0.35 for image in strips.values())]
    figure = Figure(figsize=(12, sum(heights)))
    parts = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    parts[0].suptitle(f"The run {name_of(folder)}", parse_math=False)
    for axis, panel in zip(parts[0].subplots(2, 3).flat, PANELS, strict=True):
        draw_panel(axis, log, *panel)
    if strips:
        axes = parts[1].subplots(len(strips), squeeze=False)[:, 0]
        for axis, (iteration, image) in zip(axes, strips.items(), strict=True):
            axis.imshow(image, interpolation="nearest" if image.height < 100 else None)
            axis.set(xticks=[], yticks=[], frame_on=False)
            axis.set_title(f"Samples after iteration {iteration}")
    return figure


def name_of(folder):
    """The name of a folder as text: it need not be Unicode."""
    return folder.resolve().name.encode("utf-8", "replace").decode()


def compare_runs(folders, count=4):
    """Several folders of runs -> Figure: a column each, panels above its last samples."""
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    figure = Figure(figsize=(2.6 * len(folders), 8.4))
    rows = len(SIDE_BY_SIDE) + 1
    axes = figure.subplots(rows, len(folders), squeeze=False, sharey="row")
    for column, (folder, log) in enumerate(zip(folders, logs, strict=True)):
        for axis, (title, unit, names) in zip(axes[:-1, column], SIDE_BY_SIDE, strict=True):
            draw_panel(axis, log, title, unit if column == 0 else "", names)
            if not title.startswith("Spread"):
                axis.set_yscale("log")
            if not axis.lines:
                axis.axis("off")
            if column and axis.get_legend():
                axis.get_legend().remove()
        title = f"{name_of(folder)}\n\n{SIDE_BY_SIDE[0][0]}"
        axes[0, column].set_title(title, parse_math=False)
        axis, strips = axes[-1, column], read_strips(folder, 2)
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.grid(False)
        if strips:
            image = list(strips.values())[-1]
            axis.imshow(image.crop((0, 0, min(image.width, count * image.height), image.height)))
            axis.set_title(f"Samples after {list(strips)[-1]} iterations")
    return figure


MARK = {"Source": "plot_run.py"}            # in its pictures, which it may draw again


def is_own(path):
    """Whether a file is a picture that this program has made."""
    with suppress(Exception), Image.open(path) as image:
        return image.text.items() >= MARK.items()
    return False


def main():
    """The command line."""
    parser = Parser(description="Draw the curves and the samples of runs of distill.py.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="what was --out of distill.py")
    parser.add_argument("--out", type=path_name, metavar="FILE.png",
                        help="default: run.png in RUN_DIR; of several, runs.png beside the first")
    args = parser.parse_args()
    first, several = Path(args.runs[0]), len(args.runs) > 1
    out = Path(args.out or (first.parent / "runs.png" if several else first / "run.png"))
    if out.suffix.lower() != ".png" or out.is_dir():      # never over a file of another kind
        raise UserError(f"--out should be the name of a .png file, not {out}")
    if out.exists() and not is_own(out):
        raise UserError(f"{out} is there already, and not marked as a picture of this program "
                        "(older ones are not): name another --out, or remove it")
    figure = compare_runs(args.runs) if several else plot_run(first)
    write_whole(out, lambda part: figure.savefig(part, format="png", dpi=100, metadata=MARK))
    print(out)


if __name__ == "__main__":
    run_command(main)
