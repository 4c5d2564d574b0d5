"""Captioned pictures of one flat shape on a plain background, drawn from a seed: the small world of this folder.

    scene = random_scene(rng)          what is in the picture: names (for the caption) and exact geometry
    draw(scene)                        (64, 64, 3) uint8
    caption(scene, rng)                "a small red circle on a blue background", or the same in Chinese
    parse(text)                        {"size": "small", "colour": "red", ...}: what a caption asks for

A sixth of all (shape, colour, background) combinations is held out: never in a training picture or training prompt,
so that accuracy on `prompts_heldout.txt` asks for things never seen together.

    python tutorials/shapes/data.py    writes prompts.txt and prompts_heldout.txt beside this file
"""

import os
from typing import NamedTuple

import numpy as np

SIDE = 64                                            # pixels of a picture's side
COLOURS = {                                          # far apart in RGB; black and white keep clear of 0 and 255
    "red": (220, 40, 45), "yellow": (250, 210, 50), "green": (40, 160, 75), "blue": (40, 85, 215),
    "purple": (135, 50, 175), "pink": (250, 140, 185), "white": (245, 245, 245), "black": (25, 25, 30)}
SIZES = {"small": 10.0, "large": 16.5}               # half the height, in pixels
POSITIONS = {                                        # (column, row) of the 3 x 3 cells, -1, 0 or 1
    "top left": (-1, -1), "top": (0, -1), "top right": (1, -1),
    "left": (-1, 0), "centre": (0, 0), "right": (1, 0),
    "bottom left": (-1, 1), "bottom": (0, 1), "bottom right": (1, 1)}
CELL = 13.0                                          # pixels between the centres of neighbouring cells
JITTER = 1.0                                         # each centre is moved by up to this many pixels, both ways
ATTRIBUTES = ("shape", "colour", "background", "size", "position")


# --- Drawing ------------------------------------------------------------------------------------------------


def polygon(corners):
    """Corners (K, 2), counter-clockwise or clockwise -> inside(u, v), by the even-odd rule."""
    corners = np.asarray(corners, np.float64)

    def inside(u, v):
        result = np.zeros(np.broadcast(u, v).shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0)):
            if y0 != y1:
                result ^= ((y0 > v) != (y1 > v)) & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
        return result
    return inside


def heart(u, v):
    """Two round lobes and a point, the classic sextic, scaled to height 2."""
    x, y = 1.17 * u, 0.12 - 1.11 * v
    return (x * x + y * y - 1) ** 3 - x * x * y * y * y < 0


STAR = [(r * np.sin(a), -r * np.cos(a)) for r, a in zip([1.08, 0.52] * 5, np.arange(10) * np.pi / 5)]

# inside(u, v) for coordinates in units of the shape's half height, v pointing down. Areas differ, outlines more.
SHAPES = {
    "circle": lambda u, v: u * u + v * v < 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.92,
    "triangle": polygon([(0, -1), (1.06, 0.9), (-1.06, 0.9)]),
    "star": polygon(STAR),
    "heart": heart,
    "ring": lambda u, v: (u * u + v * v < 1) & (u * u + v * v > 0.3),
}


def coverage(shape, x, y, radius, side=SIDE, oversample=4):
    """Share of each pixel that lies inside the shape, (side, side) float32 in [0, 1]. x, y, radius in pixels."""
    grid = (np.arange(side * oversample) + 0.5) / oversample
    inside = SHAPES[shape]((grid[None, :] - x) / radius, (grid[:, None] - y) / radius)
    return inside.reshape(side, oversample, side, oversample).mean((1, 3), dtype=np.float32)


def paint(mask, colour, background):
    """Coverage (..., H, W) and two RGB colours (..., 3) in 0 to 255 -> (..., H, W, 3) float, 0 to 255."""
    mask = mask[..., None]
    colour, background = (np.asarray(c, np.float32)[..., None, None, :] for c in (colour, background))
    return background + mask * (colour - background)


VALUES = {"shape": SHAPES, "colour": COLOURS, "background": COLOURS, "size": SIZES, "position": POSITIONS}


# --- Scenes -------------------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """One picture: five named attributes, and where exactly the shape lies (pixels)."""
    shape: str
    colour: str
    background: str
    size: str
    position: str
    x: float
    y: float
    radius: float


def held_out(shape, colour, background):
    """Whether this combination is kept out of training: one in six, spread so that every pair of the three is seen."""
    i, j, k = list(SHAPES).index(shape), list(COLOURS).index(colour), list(COLOURS).index(background)
    return (i + j + 4 * k) % 6 == 0


def random_scene(rng, unseen=False):
    """A scene drawn uniformly from the training combinations, or from the held-out ones. `rng`: numpy Generator."""
    while True:
        shape, colour, background = (str(rng.choice(list(names))) for names in (SHAPES, COLOURS, COLOURS))
        if colour != background and held_out(shape, colour, background) == unseen:
            break
    size, position = str(rng.choice(list(SIZES))), str(rng.choice(list(POSITIONS)))
    return place(shape, colour, background, size, position, rng)


def place(shape, colour, background, size, position, rng):
    """The five names -> Scene, with the centre moved a little."""
    column, row = POSITIONS[position]
    x, y = (SIDE / 2 + CELL * c + rng.uniform(-JITTER, JITTER) for c in (column, row))
    return Scene(shape, colour, background, size, position, x, y, SIZES[size])


def scene_for(prompt, rng):
    """A scene that does what the prompt asks for, the rest left to chance."""
    wanted = parse(prompt)
    while True:
        names = {a: wanted.get(a) or str(rng.choice(list(VALUES[a]))) for a in ATTRIBUTES}
        if names["colour"] != names["background"]:
            return place(**names, rng=rng)


def draw(scene):
    """Scene -> (64, 64, 3) uint8."""
    mask = coverage(scene.shape, scene.x, scene.y, scene.radius)
    return np.rint(paint(mask, COLOURS[scene.colour], COLOURS[scene.background])).astype(np.uint8)


# --- Captions -----------------------------------------------------------------------------------------------

CHINESE = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星", "heart": "爱心", "ring": "圆环",
    "red": "红色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "white": "白色", "black": "黑色",
    "small": "小", "large": "大",
    "top left": "左上角", "top": "上方", "top right": "右上角", "left": "左边", "centre": "中间", "right": "右边",
    "bottom left": "左下角", "bottom": "下方", "bottom right": "右下角"}

# {o} the object, {b} the background, {p} the position; a caption without one of them leaves it open.
ENGLISH_TEMPLATES = {
    "ob": ["{o} on {b} background", "{o} on {b} background", "a picture of {o} on {b} background", "{b} background with {o}"],
    "opb": ["{o} {p} on {b} background", "{o} {p}, {b} background", "{b} background with {o} {p}"],
    "op": ["{o} {p}", "a picture of {o} {p}"],
    "o": ["{o}", "a picture of {o}"]}
CHINESE_TEMPLATES = {
    "ob": ["{b}背景上有{o}", "{b}背景上的{o}", "{o}，{b}背景", "一张图：{b}背景，{o}"],
    "opb": ["{b}背景的{p}有{o}", "{o}在{p}，{b}背景", "{b}背景，{p}有{o}"],
    "op": ["{p}有{o}", "{o}在{p}"],
    "o": ["{o}", "一张图：{o}"]}
KINDS, KIND_SHARES = ("ob", "opb", "op", "o"), (0.45, 0.43, 0.07, 0.05)


def caption(scene, rng, language=None, kind=None):
    """A caption in "en" or "zh" (either where None). It always names shape and colour; size is left out a fifth of the time."""
    language = language or str(rng.choice(["en", "zh"]))
    kind = kind or str(rng.choice(KINDS, p=KIND_SHARES))
    size = scene.size if rng.random() < 0.8 else ""
    if language == "en":
        template = str(rng.choice(ENGLISH_TEMPLATES[kind]))
        words = " ".join(w for w in ("a", size, scene.colour, scene.shape) if w)
        p = scene.position
        p = {"left": "on the left", "right": "on the right", "centre": "in the centre"}.get(p, "at the " + p)
        return template.format(o=words, b="a " + scene.background, p=p)
    template = str(rng.choice(CHINESE_TEMPLATES[kind]))
    size = {"small": "小", "large": "大", "": ""}[size]
    words = f"一个{CHINESE[scene.colour]}的{size}{CHINESE[scene.shape]}"
    return template.format(o=words, b=CHINESE[scene.background], p=CHINESE[scene.position])


def parse(text):
    """What a caption asks for: {attribute: name}, only those it mentions. Words it does not know are passed over."""
    text = text.lower().replace("center", "centre")
    wanted = {}

    def take(attribute, names, suffix=""):
        nonlocal text
        # Longest word first ("top left" before "left"), and each word removed once understood.
        for word, name in sorted(names, key=lambda pair: -len(pair[0])):
            if word + suffix in text:
                text = text.replace(word + suffix, " ", 1)
                wanted[attribute] = name
                return

    def words(names):
        return [(n, n) for n in names] + [(CHINESE[n], n) for n in names]

    take("background", words(COLOURS), " background")
    if "background" not in wanted:
        take("background", words(COLOURS), "背景")
    take("colour", words(COLOURS))
    take("shape", words(SHAPES))
    take("position", words(POSITIONS))
    take("size", [(n, n) for n in SIZES] + [("big", "large"), ("小", "small"), ("大", "large")])
    return wanted


# --- Prompt lists -------------------------------------------------------------------------------------------


def prompt_list(count, seed, unseen):
    """`count` different prompts, every other one Chinese, all naming shape, colour and background."""
    rng, prompts = np.random.default_rng(seed), {}
    while len(prompts) < count:
        language = ("en", "zh")[len(prompts) % 2]
        kind = str(rng.choice(["ob", "opb"]))
        prompts[caption(random_scene(rng, unseen), rng, language, kind)] = None
    return list(prompts)


def write_lines(path, lines):
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    os.replace(path + ".part", path)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    write_lines(os.path.join(here, "prompts.txt"), prompt_list(4000, seed=1, unseen=False))
    write_lines(os.path.join(here, "prompts_heldout.txt"), prompt_list(1000, seed=2, unseen=True))
