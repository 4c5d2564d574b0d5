"""How the pages draw: one color per thing, and the figures that stand in files.

    python tutorials/figures.py --all            every figure of README and of the pages
    python tutorials/figures.py film iteration   some of them, by name
    python tutorials/figures.py --list           their names, and what each takes

Drawings are in diagrams.py, the film is in films.py. `pages` runs the notebooks, which draw their
own figures.
"""

import ast
import importlib.util
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # see sampler.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "tutorials" / "images"
WORLD = ROOT / "tutorials" / "cards"     # of the bundled teacher and student
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials"), str(WORLD)]

if importlib.util.find_spec("matplotlib") is None:
    print("error: this needs matplotlib: pip install -r tutorials/requirements.txt",
          file=sys.stderr)
    sys.exit(2)
import matplotlib  # noqa: E402

if __name__ == "__main__":
    matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib import font_manager  # noqa: E402

from convert_weights import Parser, UserError, run_command  # noqa: E402
from files import write_whole  # noqa: E402

# Okabe and Ito's palette, which stays apart for color-blind readers.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
SKY, YELLOW, GREY = "#56B4E9", "#F0E442", "#666666"
PALETTE = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY]

# One color per thing, in every figure and drawing.
TEACHER, STUDENT, FAKE, CA, DM, DATA = GREY, BLUE, PURPLE, ORANGE, GREEN, "#BBBBBB"
RIGHT, WRONG = "#7CB82F", RED                            # pictures, and samples off their arm
TEXT, IMAGE, TIME = "#8C5A3C", SKY, "#222222"            # tokens and what the time sets
CLASSES = ["#332288", "#88CCEE", "#999933", "#882255", "#DDCC77"]    # where classes need colors
# Fonts with Chinese characters. The first one that is installed is used.
CHINESE_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei"]

plt.rcParams.update({
    "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 10.5, "axes.grid": True, "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.linewidth": 2, "axes.prop_cycle": plt.cycler(color=PALETTE), "svg.hashsalt": "z"})


# --- For the pages --------------------------------------------------------------------------------


def source(*functions):
    """Functions of the project, to be shown: a link, the docstring as text, and the code."""
    from IPython.display import Markdown
    parts = []
    for function in map(inspect.unwrap, functions):      # decorated ones, too
        code = textwrap.dedent(inspect.getsource(function)).rstrip()
        docstring = ast.get_docstring(ast.parse(code).body[0], clean=False)
        if docstring:
            code = re.sub(r'\n +"""' + re.escape(docstring) + r'"""\n', "\n", code, count=1)
        path = Path(inspect.getsourcefile(function)).relative_to(ROOT)
        name = f"{path.stem}.{function.__name__}"
        words = inspect.cleandoc(docstring or "").replace("*", r"\*").replace("_", r"\_")
        words = [part if part.startswith(" ") else textwrap.fill(part, 86)
                 for part in words.split("\n\n")]
        parts.append(f"[{name}](../{path.as_posix()}#L{definition_line(function)})\n\n"
                     + "\n\n".join(words) + "\n\n"
                     f"```python\n{code}\n```")
    return Markdown("\n\n".join(parts))


def definition_line(function):
    """The line of `def` or `class`, decorators not counted."""
    lines, start = inspect.getsourcelines(inspect.unwrap(function))
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith(("def ", "class ")))
    return start + first


def result(name, value, within):
    """Prints a headline number, and how far another machine's may be from it; tests compare."""
    print(f"{name} {'.' * max(3, 52 - len(name))} {value:.3f}  (within {within:g})")


def check(name, mine, expected, within=1e-5):
    """Says whether what you worked out is what the code computes."""
    mine, expected = torch.as_tensor(mine).double(), torch.as_tensor(expected).double()
    difference = (mine - expected).abs().max().item()
    assert difference <= within, f"{name}: off by {difference:.3g}, more than {within:g}"
    print(f"{name}: right, to {difference:.1g}")


def clean(axis, title=None, limit=None):
    """An axis for a picture in the plane: square, no ticks."""
    axis.set(xticks=[], yticks=[], aspect="equal", title=title)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    if limit:
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit))


def draw_arms(axis, title=None, limit=3.2):
    """The pinwheel's arms in gray, where the data are."""
    from pinwheel import ARMS, arm
    u = torch.linspace(0, 1, 60)
    for c in range(ARMS):
        axis.plot(*arm(torch.full_like(u, c), u).T, color="#D4D4D4", lw=6, zorder=0,
                  solid_capstyle="round")
    clean(axis, title, limit)


def draw_samples(axis, x, text, color=STUDENT, title=None, count=600, size=4, limit=3.2):
    """Samples on the pinwheel; those off their own arm are red."""
    from pinwheel import is_off
    draw_arms(axis, title, limit)
    x, off = x[:count], is_off(x[:count], text[:count])
    for points, shade in ((x[~off], color), (x[off], WRONG)):
        axis.scatter(*points.T, s=size, color=shade, linewidths=0, alpha=0.75)


def show_images(images, titles=None, columns=8, title=None, side=1.4):
    """Pictures in a grid: PIL images, or a tensor (B, 3, H, W) in [0, 1]."""
    if isinstance(images, torch.Tensor):
        images = images.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    rows = -(-len(images) // columns)
    height = (side + (0.3 if titles else 0.05)) * rows + (0.4 if title else 0)
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(image, interpolation="nearest")
        if titles:
            axis.set_title(titles[i], fontsize=8)
    if title:
        figure.suptitle(title)
    plt.show()


# --- Pictures of the bundled models ---------------------------------------------------------------


def draw_pictures(pipeline, prompts, steps, guidance=0.0, seed=0, batch=20):
    """Pictures for prompts, (B, 3, H, W) in [0, 1]; the noise of prompt i is that of seed + i."""
    from sampler import generate
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # a student is asked for other steps, too
        for start in range(0, len(prompts), batch):
            parts.append(generate(pipeline, prompts[start:start + batch], steps=steps,
                                  guidance=guidance, seed=seed + start, output="tensor"))
    return torch.cat(parts)


def are_right(images, prompts):
    """Which pictures (B, 3, H, W) in [0, 1] show all that their prompt names -> list of bool."""
    import evaluate
    import reader
    readings = reader.read_all(evaluate.to_uint8(2 * images - 1), 1)
    shares = [evaluate.accuracy([reading], [prompt])["joint"]
              for reading, prompt in zip(readings, prompts, strict=True)]
    return [share == 1 for share in shares]


def is_open(prompt):
    """Whether a prompt leaves something large to the model, above all a place."""
    import evaluate
    return "open" in evaluate.groups_of(prompt)


def evaluations(steps, guidance):
    """Calls of the network for one image: guidance makes two in each step."""
    return steps * (2 if guidance else 1)


def compare(prompts, rows, seed=0, side=1.0, titles=None):
    """Same prompts and noise in every row -> Figure. rows: (name, pipeline, steps, guidance).

    The label gives the evaluations. A green frame and a tick: evaluate.py reads all that is asked.
    """
    figure, axes = plt.subplots(len(rows), len(prompts), squeeze=False, figsize=(
        2.0 + side * len(prompts), 0.6 + (side + 0.08) * len(rows)))
    for row, (name, pipeline, steps, guidance) in zip(axes, rows, strict=True):
        images = draw_pictures(pipeline, prompts, steps, guidance, seed)
        right = are_right(images, prompts)
        for axis, image, good in zip(row, images, right, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set(visible=True, color=RIGHT if good else WRONG, linewidth=2.5)
            axis.text(0.97, 0.04, "\N{CHECK MARK}" if good else "\N{MULTIPLICATION X}",
                      transform=axis.transAxes, ha="right", fontsize=9, color="white",
                      bbox={"color": RIGHT if good else WRONG, "pad": 1.2, "linewidth": 0})
        words = [f"{steps} guided step" if guidance else f"{steps} step",
                 f"{evaluations(steps, guidance)} evaluation"]
        words = [word if word.startswith("1 ") else word + "s" for word in words]
        row[0].set_ylabel("\n".join([name, *words, f"{sum(right)} of {len(prompts)} right"]),
                          rotation=0, ha="right", va="center", fontsize=8.5)
    for axis, title in zip(axes[0], titles or prompts, strict=True):
        set_prompt(axis, title)
    return figure


def set_prompt(axis, prompt, more=""):
    """A prompt as a title, Chinese ones in a font that has them; `more` on a line of its own."""
    fonts = [font for font in CHINESE_FONTS if font in font_manager.get_font_names()]
    width = 17 if prompt.isascii() else 9                # Chinese characters are twice as wide
    axis.set_title(textwrap.fill(prompt, width) + more, fontsize=6.5,
                   fontfamily=[*plt.rcParams["font.sans-serif"][:1], *fonts[:1]])


# --- The command ----------------------------------------------------------------------------------


def save(figure, name, palette=False, **options):
    """Writes the figure to images/. palette: in 256 colors, a third of the bytes."""
    if name.endswith(".svg"):
        options["metadata"] = {"Date": None}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=name[-3:], facecolor="white", **options)
    if palette:
        from PIL import Image
        image = Image.open(drawn).convert("RGB").quantize(256)
        drawn = io.BytesIO()
        image.save(drawn, format="PNG")
    write_whole(IMAGES / name, lambda part: part.write_bytes(drawn.getvalue()))
    plt.close(figure)


def call(command):
    """Runs a command of this repository. UserError if it fails, after what it has said itself."""
    ended = subprocess.run(command, cwd=ROOT)
    if ended.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {ended.returncode}")


def diagram(name):
    import diagrams
    save(getattr(diagrams, name)(), f"{name}.svg")


def open_prompts(count, english=True):
    """The first held-out prompts that leave something open: in English, or in Chinese."""
    from captions import language_of
    from sampler import read_prompts
    prompts = read_prompts(WORLD / "prompts_heldout.txt")
    wanted = str.isascii if english else lambda prompt: language_of(prompt) == "zh"
    return [prompt for prompt in prompts if wanted(prompt) and is_open(prompt)][:count]


def hero():
    """Both at one and four evaluations, the teacher at 32; seeds 0 to 9, nothing picked."""
    from sampler import load_pipeline
    torch.set_num_threads(1)
    teacher, student = load_pipeline(WORLD / "teacher"), load_pipeline(WORLD / "student")
    rows = [("teacher", teacher, 1, 0.0), ("student", student, 1, 0.0),
            ("teacher", teacher, 4, 0.0), ("student", student, 4, 0.0),
            ("teacher", teacher, 16, 2.0)]
    prompts = [*open_prompts(5), *open_prompts(5, english=False)]
    save(compare(prompts, rows), "hero.png", dpi=160)


def equal_calls():
    """Teacher and student at 1, 2, 4 and 8 evaluations, in both languages, nothing picked.

    The teacher is shown in the way that is right more often at that cost: with guidance at 8
    evaluations, without it below. Prints the prompts.
    """
    from sampler import load_pipeline
    torch.set_num_threads(1)
    teacher, student = load_pipeline(WORLD / "teacher"), load_pipeline(WORLD / "student")
    rows = []
    for calls in (1, 2, 4, 8):
        guided = calls == 8
        rows += [("teacher", teacher, calls // (1 + guided), 2.0 * guided),
                 ("student", student, calls, 0.0)]
    prompts = [*open_prompts(6), *open_prompts(6, english=False)]
    titles = [f"{i}" for i in range(1, len(prompts) + 1)]
    save(compare(prompts, rows, titles=titles), "equal_calls.png", dpi=110)
    lines = [f"{title}. {prompt}" for title, prompt in zip(titles, prompts, strict=True)]
    print("\n".join(lines))


def failures(count=400, columns=8):
    """What fails: all wrong pictures of the teacher, 16 guided steps, of the first `count` prompts.

    The last line of a title says what the reader finds wrong.
    """
    import data
    import evaluate
    import reader
    from sampler import load_pipeline, read_prompts
    prompts = read_prompts(WORLD / "prompts_heldout.txt")[:count]
    images = draw_pictures(load_pipeline(WORLD / "teacher"), prompts, 16, 2.0)
    wrong = []
    for i, reading in enumerate(reader.read_all(evaluate.to_uint8(2 * images - 1), 1)):
        hits = evaluate.judge(reading, data.parse(prompts[i]))
        names = [name for name, hit in hits.items() if not hit and name not in ("joint", "strict")]
        wrong += [(i, names)] if names else []
    rows = -(-len(wrong) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.75 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (i, names) in zip(axes.flat, wrong, strict=False):
        axis.imshow(images[i].permute(1, 2, 0).numpy())
        set_prompt(axis, prompts[i], f"\n[{', '.join(names)}]")
    save(figure, "failures.png", palette=True, dpi=128, bbox_inches="tight")
    print(f"{len(wrong)} of {count} pictures are wrong")


def sentences(columns=10):
    """The bundled student in four steps on cards/sentences.txt, seeds 0, 1, ..., not judged."""
    from sampler import load_pipeline, read_prompts
    torch.set_num_threads(1)
    prompts = read_prompts(WORLD / "sentences.txt")
    images = draw_pictures(load_pipeline(WORLD / "student"), prompts, 4, 0.0)
    rows = -(-len(prompts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns, 1.18 * rows))
    for i, (axis, image) in enumerate(zip(axes.flat, images, strict=True)):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(i + 1, fontsize=8, pad=2)
        axis.axis("off")
    save(figure, "sentences.png", palette=True, dpi=128)


def film():
    import films
    films.pinwheel_film(IMAGES)


def collapse():
    import films
    films.cards_film(IMAGES)


def observer():
    import films
    save(films.observer_figure(), "observer.png", palette=True, dpi=100)


def runs():
    import films
    save(films.read_runs(), "runs.png", dpi=90)


def pages():
    call([sys.executable, "tests/tools/execute_notebooks.py", "--write"])


FIGURES = {                                              # name: (how, what and how long)
    "iteration": (lambda: diagram("iteration"), "one iteration of the method; 1 s"),
    "networks": (lambda: diagram("networks"), "the three networks over time; 1 s"),
    "schedules": (lambda: diagram("schedules"), "where CA and DM look; 1 s"),
    "dit": (lambda: diagram("dit"), "prompt and latents become one sequence; 1 s"),
    "block": (lambda: diagram("block"), "one block of the DiT; 1 s"),
    "time_axis": (lambda: diagram("time_axis"), "the time axis; 1 s"),
    "rope": (lambda: diagram("rope"), "positions of tokens; 1 s"),
    "hero": (hero, "teacher and student at equal evaluations; 30 s; Chinese titles need a font"),
    "equal_calls": (equal_calls, "both at 1, 2, 4, 8 evaluations, with many prompts; 1 minute"),
    "sentences": (sentences, "thirty sentences that nobody trained on; 20 s"),
    "failures": (failures, "what the teacher gets wrong; 5 minutes; Chinese titles need a font"),
    "film": (film, "CA alone, DM alone, both, over 400 iterations, as GIF; 1 minute"),
    "collapse": (collapse, "CA alone falls apart on the cards, as GIF and strip; 20 minutes"),
    "observer": (observer, "what DM removes, on the cards; 6 minutes after the collapse"),
    "runs": (runs, "five runs of distill.py to read, side by side; 25 minutes"),
    "pages": (pages, "every notebook, from a clean kernel; 10 minutes")}


def main():
    parser = Parser(description="Draw the figures of README and pages again.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which figures; see --list")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--list", action="store_true", help="list the names and stop")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown or not (args.names or args.all or args.list):
        parser.error(f"there is no figure {unknown[0]}; --list names them" if unknown
                     else "name some figures, or give --all or --list")
    for name in FIGURES if args.all or args.list else args.names:
        if args.list:
            print(f"{name:12}{FIGURES[name][1]}")
            continue
        start = time.time()
        FIGURES[name][0]()
        print(f"{name:12}{time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run_command(main)
