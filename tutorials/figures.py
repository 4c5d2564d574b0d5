"""How the notebooks draw: one style, one palette, and the few figures that more than one of them needs."""

import inspect
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Code

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials"), str(ROOT / "tutorials" / "shapes")]

# Okabe and Ito's palette, which stays apart for colour-blind readers.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#666666"
PALETTE = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY]

plt.rcParams.update({
    "figure.dpi": 80, "savefig.dpi": 80, "figure.constrained_layout.use": True, "font.size": 12, "axes.titlesize": 13, "axes.grid": True,
    "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 2,
    "axes.prop_cycle": plt.cycler(color=PALETTE)})


def source(*functions):
    """The project's own code of functions or classes, to be shown."""
    return Code("\n\n".join(inspect.getsource(function).rstrip() for function in functions), language="python")


def show_images(images, titles=None, columns=8, title=None, side=1.5):
    """Pictures in a grid: PIL images, or a tensor (B, 3, H, W) in [0, 1]."""
    if isinstance(images, torch.Tensor):
        images = images.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    rows = -(-len(images) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(side * columns, (side + (0.35 if titles else 0)) * rows + (0.5 if title else 0)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, images)):
        axis.imshow(image, interpolation="nearest")
        if titles:
            axis.set_title(titles[i], fontsize=9)
    if title:
        fig.suptitle(title)
    plt.show()


def scatter(axis, points, text=None, title=None, limit=2.6, size=4):
    """2-D points (B, 2), coloured by class (B,), on square axes."""
    axis.scatter(*points.T, s=size, alpha=0.5, linewidths=0, c=GREY if text is None else [PALETTE[int(i)] for i in text])
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title, xlabel="x", ylabel="y")
