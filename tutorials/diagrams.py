"""The drawings of README and pages: `python tutorials/figures.py iteration` writes one."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

from figures import CA, DM, FAKE, IMAGE, STUDENT, TEACHER, TEXT, TIME

INK, PLAIN = "#222222", "#777777"                        # words and lines; what needs no color


def canvas(width, height, columns=100, rows=None):
    """A figure of so many inches whose axis counts in units of a hundredth of its width."""
    figure, axis = plt.subplots(figsize=(width, height))
    axis.set(xlim=(0, columns), ylim=(0, rows or columns * height / width))
    axis.axis("off")
    return figure, axis


def box(axis, x, y, width, height, words, color=INK, strength=0.1, size=9):
    """A rounded box around (x, y) with words."""
    for face, alpha in ((color, strength), ("none", 1.0)):
        axis.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, alpha=alpha,
                                      boxstyle="round,pad=0,rounding_size=0.8", facecolor=face,
                                      edgecolor=color, linewidth=1.4))
    axis.text(x, y, words, ha="center", va="center", fontsize=size, color=INK)


def arrow(axis, start, end, color=INK, style="-|>", width=1.4, dashed=False):
    axis.annotate("", end, start, arrowprops={
        "arrowstyle": style, "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0,
        "linestyle": "--" if dashed else "-", "mutation_scale": 12})


def label(axis, x, y, words, color=INK, size=9, weight="normal", ha="center"):
    axis.text(x, y, words, ha=ha, va="center", fontsize=size, color=color, fontweight=weight)


def iteration():
    """One iteration of Decoupled DMD, numbered as in notebook 4 and in the paper's Algorithm 1."""
    figure, axis = canvas(10, 5)
    label(axis, 5, 37.5, "1", size=11, weight="bold")
    box(axis, 5, 32, 9, 7, "noise, text")
    label(axis, 18, 37.5, "2", STUDENT, 11, "bold")
    box(axis, 18, 32, 10, 7, "student\n(learns)", STUDENT, 0.22)
    box(axis, 31, 32, 8, 6, "x = G(z$_t$)", STUDENT, 0.1)
    arrow(axis, (9.5, 32), (13, 32))
    arrow(axis, (23, 32), (27, 32))
    rows = ((42, CA, "3", "re-noise x to tau$_{CA}$\nin [t, 1]", "teacher, no text", TEACHER,
             "CA = (alpha - 1)\n× difference", "4  the spear"),
            (22, DM, "5", "re-noise x to tau$_{DM}$\nin [0, 1]", "fake, with text", FAKE,
             "DM = difference", "6  the shield"))
    for y, color, number, words, second, second_color, term, name in rows:
        label(axis, 45, y + 5, number, color, 11, "bold")
        box(axis, 45, y, 13, 6, words)
        arrow(axis, (35, 32 + (2 if y > 32 else -2)), (38.5, y), color)
        for dy, net, shade in ((3, "teacher, with text", TEACHER), (-3, second, second_color)):
            box(axis, 62, y + dy, 14, 4.6, net, shade, 0.22)
            arrow(axis, (51.5, y), (55, y + dy))
            arrow(axis, (69, y + dy), (73, y))
        label(axis, 80, y + 5.2, name, color, 11, "bold")
        box(axis, 80, y, 14, 6.5, term, color, 0.3)
        arrow(axis, (87, y), (93, 32 + (3.2 if y > 32 else -3.2)), color)
    label(axis, 97.7, 37.5, "7", size=11, weight="bold")
    box(axis, 94.5, 32, 9, 6, "CA + DM", INK, 0.08)
    arrow(axis, (90, 32), (35, 32), INK, width=2.4)
    label(axis, 62, 33.6, "the only gradient: proxy_loss(x, CA + DM).backward()")
    label(axis, 62, 30.4, "no gradient goes through teacher and fake", TEACHER, 8.5)
    axis.plot((1, 99), (14.5, 14.5), color="#BBBBBB", lw=1)
    label(axis, 12, 8, "then, twice:\nthe fake learns what\nthe student draws now", FAKE)
    label(axis, 64, 12.2, "8", FAKE, 11, "bold")
    arrow(axis, (31, 29), (31, 10.5), STUDENT, dashed=True)
    box(axis, 31, 8, 10, 5, "x, no gradient", STUDENT, 0.1)
    box(axis, 47, 8, 13, 5, "re-noise x\nto any time")
    box(axis, 64, 8, 12, 5, "fake (learns)", FAKE, 0.22)
    box(axis, 84, 8, 18, 5, "flow matching:\nvelocity x - noise", FAKE, 0.1)
    for start, end in ((36, 40.5), (53.5, 58), (70, 75)):
        arrow(axis, (start, 8), (end, 8))
    return figure


def networks():
    """Who is frozen, who learns, and who starts as whose copy."""
    figure, axis = canvas(10, 3.2)
    rows = ((26, TEACHER, "teacher", "frozen: it knows the data, with the faults of its training"),
            (16, STUDENT, "student", "learns: one update an iteration, along CA + DM"),
            (6, FAKE, "fake", "learns: two updates an iteration, on the student's outputs"))
    for y, color, name, words in rows:
        box(axis, 10, y, 14, 6, name, color, 0.22, size=11)
        axis.plot((24, 98), (y - 3, y - 3), color=color, lw=3)
        label(axis, 25, y + 0.4, words, ha="left", size=10)
        if name != "teacher":
            for x in range(30, 98, 8 if name == "student" else 4):
                axis.plot(x, y - 3, "o", color=color, ms=5)
    arrow(axis, (10, 23), (10, 19.2), TEACHER)
    label(axis, 11, 21, "copy", TEACHER, ha="left")
    arrow(axis, (1.2, 26), (2.8, 6), TEACHER)
    axis.plot((3, 1.2), (26, 26), color=TEACHER, lw=1.4)
    label(axis, 3, 11, "copy of the teacher, too", TEACHER, ha="left")
    label(axis, 96, 0.6, "training time", size=9)
    return figure


def schedules():
    """For a student's step at time t = 0.4: where CA may look, and where DM may look."""
    figure, axis = canvas(10, 3.6)
    names = (("coupled", 0, 0, "one tau for both (DMD)"), ("full", 0, 0, "each its own"),
             ("constrained", 1, 1, "each its own"), ("hybrid", 1, 0, "each its own (the method)"))
    start, end, t = 24, 72, 0.4
    for row, (name, ca, dm, words) in enumerate(names):
        y = 28 - 7 * row
        label(axis, 22, y, name, size=11, ha="right", weight="bold")
        for dy, color, low in ((1.2, CA, ca), (-1.2, DM, dm)):
            left = start + (end - start) * t * low
            axis.add_patch(Rectangle((left, y + dy - 0.9), end - left, 1.8, color=color))
        label(axis, 75, y, words, size=10, ha="left")
    middle = start + (end - start) * t
    axis.plot((middle, middle), (4, 31), color=STUDENT, lw=1.4, ls="--")
    label(axis, middle, 33, "t, the student's step", STUDENT)
    label(axis, start, 2, "tau = 0\nnoise", size=9)
    label(axis, end, 2, "tau = 1\ndata", size=9)
    label(axis, 92, 34, "CA", CA, 11, "bold")
    label(axis, 97, 34, "DM", DM, 11, "bold")
    return figure


def time_axis():
    """The time axis: noise 0, data 1, and what is decided where."""
    figure, axis = canvas(10, 1.5)
    start, end = 8, 92
    axis.annotate("", (end + 2, 8), (start, 8), arrowprops={"arrowstyle": "-|>", "lw": 2})
    for t in (0, 0.1, 0.25, 0.5):
        x = start + (end - start) * t
        axis.plot(x, 8, "o", color=STUDENT, ms=9)
        label(axis, x, 12, f"t = {t:g}", STUDENT)
    label(axis, end, 12, "t = 1")
    label(axis, start, 4, "noise")
    label(axis, end, 4, "data")
    label(axis, 22, 4, "what is large: layout, color", TEACHER)
    label(axis, 70, 4, "what is fine: edges, strokes", TEACHER)
    label(axis, 70, 12, "the four steps of a student, shift 3", STUDENT)
    return figure


def tokens(axis, x, y, count, color, size=2.0, gap=0.4, strength=0.45):
    """A row of tokens from (x, y) to the right -> where it ends."""
    for i in range(count):
        axis.add_patch(Rectangle((x + i * (size + gap), y - size / 2), size, size, facecolor=color,
                                 alpha=strength, edgecolor=color))
    return x + count * (size + gap)


def dit():
    """Prompt and latents become one sequence of tokens."""
    figure, axis = canvas(10, 4.2)
    box(axis, 10, 34, 17, 6, "prompt", TEXT)
    box(axis, 10, 10, 17, 6, "latents\n16 × 16 places", IMAGE)
    box(axis, 32, 34, 15, 6, "text encoder", TEXT)
    box(axis, 32, 10, 15, 6, "2 × 2 patches,\none linear layer", IMAGE)
    for y in (34, 10):
        arrow(axis, (18.5, y), (24.5, y))
        arrow(axis, (39.5, y), (43.5, y))
    end = tokens(axis, 44, 34, 8, TEXT)
    tokens(axis, end, 34, 3, "#999999", strength=0.2)
    label(axis, 57, 37.5, "tokens of the text and pads", size=8.5)
    tokens(axis, 44, 10, 11, IMAGE)
    label(axis, 57, 6.6, "64 tokens of the image", size=8.5)
    box(axis, 78, 34, 13, 6, "context refiner\n2 blocks", TEXT, 0.15)
    box(axis, 78, 10, 13, 6, "noise refiner\n2 blocks", IMAGE, 0.15)
    arrow(axis, (70.5, 34), (71.5, 34))
    arrow(axis, (70.5, 10), (71.5, 10))
    end = tokens(axis, 20, 22, 10, IMAGE)
    end = tokens(axis, end, 22, 6, TEXT)
    tokens(axis, end, 22, 2, "#999999", strength=0.2)
    label(axis, 41, 25.3, "one sequence: image first, then text", weight="bold")
    axis.plot((88, 88, 64), (34, 22, 22), color=INK, lw=1.4)
    axis.plot((84.5, 88), (34, 34), color=INK, lw=1.4)
    axis.plot((84.5, 88, 88), (10, 10, 22), color=INK, lw=1.4)
    arrow(axis, (66, 22), (64, 22))
    box(axis, 10, 22, 15, 6, "layers: every token\nsees every other", size=8.5)
    arrow(axis, (19.5, 22), (17.6, 22))
    label(axis, 50, 16.6, "full size: 32 to 512 tokens of text, 4,096 of a 1,024-pixel image, "
          "30 layers, width 3,840", TEACHER, 8.5)
    label(axis, 10, 17, "then: velocity\nof each patch", size=8.5)
    return figure


def block():
    """One block of the DiT: attention and feed-forward, gated by the time."""
    figure, axis = canvas(10, 2.9)
    for offset, words in ((0, "attention"), (46, "feed-forward")):
        x = 7 + offset
        for i, (name, color) in enumerate((("RMSNorm", PLAIN), ("× scale", TIME), (words, IMAGE),
                                           ("RMSNorm", PLAIN), ("× tanh gate", TIME))):
            box(axis, x + 8.2 * i, 12, 7.4, 5, name, color, 0.12, size=7.5)
            if i:
                arrow(axis, (x + 8.2 * i - 4.5, 12), (x + 8.2 * i - 3.7, 12))
        axis.plot((x - 5, x - 5, x + 38, x + 38), (12, 5, 5, 10.6), color=INK, lw=1.2)
        label(axis, x + 16, 3, "+ the input itself", size=8.5)
        label(axis, x + 38, 12, "+", size=16)
        arrow(axis, (x - 6, 12), (x - 3.8, 12))
        arrow(axis, (x + 36.5, 12), (x + 37, 12))
        for at in (8.2, 32.8):
            arrow(axis, (x + at, 21.5), (x + at, 14.6), TIME)
    label(axis, 50, 25, "time t → sines and cosines → two linear layers → scales and gates, "
          "the same for all tokens of an image", TIME, 9)
    axis.plot((15, 86), (21.5, 21.5), color=TIME, lw=1.4)
    arrow(axis, (50, 23.8), (50, 21.7), TIME)
    return figure


def rope():
    """Positions: the caption is a line, the image a sheet behind its end."""
    figure, axis = canvas(10, 3.4)
    for i in range(8):
        tokens(axis, 4 + 3.4 * i, 9.3, 1, TEXT, size=2.6)
        label(axis, 5.3 + 3.4 * i, 5.6, f"{i + 1}", size=8)
    label(axis, 17, 14, "text: (frame 1, 2, 3, … ; row 0; column 0)", TEXT, 9)
    for row in range(6):
        for column in range(6):
            axis.add_patch(Rectangle((36 + 3 * column + 0.8 * row, 22 - 3 * row), 2.4, 2.4,
                                     facecolor=IMAGE, alpha=0.4, edgecolor=IMAGE))
    label(axis, 48, 29, "image: (frame L + 1; row; column)", IMAGE, 9)
    label(axis, 48, 3, "L: tokens of the text, pads included", TEACHER, 8.5)
    widths = (("frame", 8, TEXT), ("row", 12, IMAGE), ("column", 12, IMAGE))
    x = 68
    for name, count, color in widths:
        axis.add_patch(Rectangle((x, 14), 0.9 * count, 4, facecolor=color, alpha=0.4,
                                 edgecolor=color))
        label(axis, x + 0.45 * count, 16, f"{count}", size=9)
        label(axis, x + 0.45 * count, 11.4, name, size=9)
        x += 0.9 * count + 0.3
    label(axis, 82, 22.5, "the 32 numbers of a head (full size: 128):\n"
          "each pair turns by position × frequency\nof its axis", size=8.5)
    return figure
