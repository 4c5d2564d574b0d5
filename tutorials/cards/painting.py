"""Draws the scenes of the cards world: things and glyphs from two sheets, cards from nothing.

A picture is three planes, (3, 128, 128) float32, 0 to 255, until it is done: numpy's loops run
along the last axis, and are several times slower over three values than over 128.
"""

import functools
import os

import numpy as np
from PIL import Image, ImageFilter

from world import (
    CAP,
    CHARACTERS,
    COLORS,
    DIGITS,
    FONTS,
    GLYPH,
    HANZI_BOX,
    INKS,
    LATIN_BOX,
    SHEET_COLUMNS,
    SIDE,
    SPRITE,
    THINGS,
)

HERE = os.path.dirname(os.path.abspath(__file__))

# --- Tiles of the two sheets --------------------------------------------------------------------


@functools.cache
def sheet(name, mode):
    with Image.open(os.path.join(HERE, name)) as picture:
        return picture.convert(mode)


def tile(picture, number, side):
    row, column = divmod(number, SHEET_COLUMNS)
    return picture.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


def scaled(plane, size):
    """(H, W) float32 -> resized to size (width, height) by Lanczos, clipped to 0 to 255."""
    return np.asarray(Image.fromarray(plane).resize(size, Image.LANCZOS)).clip(0, 255)


@functools.cache
def sprite(thing, size, tilt=0):
    """A thing of `size` pixels, turned by `tilt` degrees: (4, n, n) float32, n odd.

    Red, green and blue are 0 to 255, multiplied by alpha; the fourth plane is alpha, 0 to 1.
    """
    pixels = np.asarray(tile(sheet("things.png", "RGBA"), list(THINGS).index(thing), SPRITE))
    pixels = np.pad(pixels.astype(np.float32), ((12, 12), (12, 12), (0, 0)))
    pixels[..., :3] *= pixels[..., 3:] / 255
    planes = [Image.fromarray(plane) for plane in np.moveaxis(pixels, -1, 0)]
    side = round(size * (SPRITE + 24) / SPRITE) | 1
    planes = [plane.rotate(tilt, Image.BICUBIC) for plane in planes]
    planes = np.stack([scaled(np.asarray(plane), (side, side)) for plane in planes])
    planes[:3] = np.minimum(planes[:3], planes[3])         # no brighter than its share of light
    planes[3] /= 255
    used = np.flatnonzero(planes[3].max(0) + planes[3].max(1) > 0.01)
    margin = min(used[0], side - 1 - used[-1])
    return np.ascontiguousarray(planes[:, margin:side - margin, margin:side - margin])


def blurred(mask, radius, margin):
    """Mask (H, W) in 0 to 1 -> the same, padded and smoothed."""
    image = Image.fromarray((np.pad(mask, margin) * 255).round().astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


SHADOW_MARGIN = 6


@functools.cache
def sprite_shadow(thing, size, tilt):
    """What the card's brightness is multiplied by, (n + 12, n + 12)."""
    return 1 - 0.34 * blurred(sprite(thing, size, tilt)[3], 2.5, SHADOW_MARGIN)


def layout(word):
    """Word -> (x of each character's center from the word's center, greatest width, height)."""
    pitch, width, height = (LATIN_BOX if word.isascii() else HANZI_BOX)[len(word)]
    columns = [round(pitch * (i - (len(word) - 1) / 2)) for i in range(len(word))]
    return columns, width, height


def word_width(word):
    """Pixels from the left edge of a word to its right edge, at most."""
    if not word:
        return 0
    columns, width, _ = layout(word)
    return columns[-1] - columns[0] + width


@functools.cache
def glyph(character, font, width, height):
    """Mask of one character, (n, m) float32 in 0 to 1.

    A capital's height is `height`, and it is squeezed to `width` if it is wider. Digits stay
    narrower: a 0 as wide as an O could not be told from it.
    """
    number = FONTS.index(font) * len(CHARACTERS) + CHARACTERS.index(character)
    mask = np.asarray(tile(sheet("glyphs.png", "L"), number, GLYPH), np.float32)
    scale = height / (CAP if character.isascii() else GLYPH - 2)
    columns = np.flatnonzero(mask.max(0))
    inner = mask[:, columns[0]:columns[-1] + 1] if character.isascii() else mask
    wanted = round(inner.shape[1] * scale)
    if character.isascii():
        wanted = min(wanted, round(0.8 * width) if character in DIGITS else width)
    return scaled(inner, (wanted, round(GLYPH * scale))) / np.float32(255)


@functools.cache
def glyph_halo(character, font, width, height):
    """The soft shadow that parts a glyph from what lies under it, in 0 to 1."""
    return blurred(glyph(character, font, width, height), 2.2, SHADOW_MARGIN)


# --- Cards --------------------------------------------------------------------------------------

ROWS = np.arange(SIDE, dtype=np.float32)[:, None]
COLUMNS = np.arange(SIDE, dtype=np.float32)[None, :]


@functools.cache
def noise_field():
    """Smooth noise, (512, 512), mean 0 and standard deviation 1: cards show windows of it."""
    rng = np.random.default_rng(5)
    total = np.zeros((512, 512), np.float32)
    for cells, weight in ((40, 1.0), (100, 0.6), (256, 0.35)):
        coarse = rng.normal(size=(cells, cells)).astype(np.float32)
        total += weight * np.asarray(Image.fromarray(coarse).resize((512, 512), Image.BICUBIC))
    return (total - total.mean()) / total.std()


@functools.cache
def rim():
    """The darker edge of a plain card, a factor (128, 128)."""
    rows, columns = np.minimum(ROWS, SIDE - 1 - ROWS), np.minimum(COLUMNS, SIDE - 1 - COLUMNS)
    edge = np.minimum(rows, columns)
    return (1 - 0.16 * np.exp(-edge / 2.5)).astype(np.float32)


def plain_card(color, rng):
    """Colored paper: soft mottling, light from one side, a darker rim."""
    row, column = rng.integers(0, 512 - SIDE, 2)
    angle = rng.uniform(0, 2 * np.pi)
    light = 0.05 / SIDE * (np.sin(angle) * (ROWS - SIDE / 2) + np.cos(angle) * (COLUMNS - SIDE / 2))
    paper = 0.010 * noise_field()[row:row + SIDE, column:column + SIDE]
    paper += light
    paper += rng.uniform(0.97, 1.02)
    paper *= rim()
    return paper * as_planes(COLORS[color])


def as_planes(color):
    """A color (3,) -> (3, 1, 1) float32, to broadcast over (3, H, W)."""
    return np.float32(color)[:, None, None]


def gradient(top, bottom, rows=SIDE):
    """Colors from top to bottom, (3, rows, 1)."""
    share = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    return as_planes(top) + share * (as_planes(bottom) - as_planes(top))


def sky(top, bottom):
    return np.repeat(gradient(top, bottom), SIDE, 2)


def blend(area, mask, color):
    """In place: `area` (3, h, w) stays where mask (h, w) is 0, and is `color` where it is 1."""
    area += mask * (color - area)


def ridge(image, rng, base, height, near, far):
    """Hills, dunes or waves from `base` +- `height` down: colors `near` the top and `far` below."""
    waves = rng.uniform(0.6, 1.0, 2)[:, None] * np.sin(
        COLUMNS * rng.uniform((0.03, 0.06), (0.05, 0.09))[:, None] + rng.uniform(0, 6.28, (2, 1)))
    line = (base - height * (waves[0] + 0.4 * waves[1])).astype(np.float32)
    start = max(int(line.min()) - 1, 0)
    mask = (ROWS[start:] - line).clip(0, 1)
    blend(image[:, start:], mask, gradient(near, far, SIDE - start))


def window(y, x, shape):
    """A tile (h, w) centered at (y, x) -> slices of the planes, and of the tile: what is inside."""
    top, left = int(y) - shape[0] // 2, int(x) - shape[1] // 2
    a, b = max(-top, 0), max(-left, 0)
    c, d = max(min(SIDE - top, shape[0]), a), max(min(SIDE - left, shape[1]), b)
    return np.s_[:, top + a:top + c, left + b:left + d], np.s_[..., a:c, b:d]


def paste(image, y, x, mask, color):
    """Color through a mask (h, w) centered at (y, x)."""
    area, cut = window(y, x, mask.shape)
    blend(image[area], mask[cut], as_planes(color))


@functools.cache
def disc(radius, soft=1.0):
    """A round mask; `soft` is the width of its edge in pixels."""
    reach = int(radius + soft) + 1
    grid = np.arange(-reach, reach + 1, dtype=np.float32)
    distance = np.hypot(grid[:, None], grid)
    return ((radius - distance) / soft + 0.5).clip(0, 1).astype(np.float32)


@functools.cache
def cloud(number):
    """One of eight cloud shapes, a mask (28, 60)."""
    rng, mask = np.random.default_rng(number), np.zeros((28, 60), np.float32)
    y, x = np.mgrid[:28, :60].astype(np.float32)
    for column in np.linspace(14, 46, 5):
        radius = 10.5 - 0.24 * abs(column - 30) + rng.uniform(-2, 2)
        distance = np.hypot(x - column - rng.uniform(-2, 2), y - 21 + 0.55 * radius)
        mask = np.maximum(mask, ((radius - distance) / 1.5 + 0.5).clip(0, 1))
    return mask * (22.5 - y).clip(0, 1)


def clouds(image, rng, count, rows, strength=0.85):
    for _ in range(count):
        mask = cloud(int(rng.integers(8)))[:, ::rng.choice((-1, 1))]
        y, x = rng.uniform(*rows), rng.uniform(0, SIDE)
        paste(image, y, x, mask * (strength * rng.uniform(0.8, 1)), (255, 255, 255))


@functools.cache
def dot_field(number, count, radius):
    """Stars or snowflakes of different strength all over, a mask (128, 128)."""
    rng, field = np.random.default_rng(number), np.zeros((1, SIDE, SIDE), np.float32)
    for y, x, share in rng.random((count, 3)):
        paste(field, y * SIDE, x * SIDE, disc(radius, 1.4) * np.float32(0.4 + 0.6 * share), [1.0])
    return field[0]


def dots(image, rng, count, radius, color):
    """One of sixteen fields of dots, moved round the edges."""
    field = dot_field(int(rng.integers(16)), count, radius)
    rows, columns = ((np.arange(SIDE) + shift) % SIDE for shift in rng.integers(0, SIDE, 2))
    blend(image, field[rows[:, None], columns], as_planes(color))


def draw_sky(rng):
    image = sky((70, 142, 232), (178, 220, 250))
    clouds(image, rng, int(rng.integers(3, 6)), (12, 120))
    return image


def draw_sea(rng):
    image = sky((252, 176, 112), (255, 226, 178))
    horizon = int(rng.integers(60, 76))
    y, x = horizon - rng.uniform(2, 22), rng.uniform(16, 112)
    paste(image, y, x, disc(20, 26) * np.float32(0.5), (255, 244, 214))
    paste(image, y, x, disc(11), (255, 246, 222))
    image[:, horizon:] = gradient((44, 142, 170), (16, 78, 124), SIDE - horizon)
    for share, column, length in rng.random((14, 3)):
        row = horizon + 2 + int(share ** 1.3 * (SIDE - horizon - 4))
        left = int(column * SIDE - 10)
        image[:, row, max(left, 0):left + 8 + int(length * 14)] += 26
    return image


def draw_hills(rng):
    image = sky((128, 196, 246), (222, 240, 252))
    clouds(image, rng, int(rng.integers(1, 4)), (8, 50))
    base = rng.uniform(58, 72)
    ridge(image, rng, base, 7, (150, 200, 130), (110, 172, 96))
    ridge(image, rng, base + 16, 7, (104, 172, 92), (76, 146, 74))
    ridge(image, rng, base + 34, 6, (66, 138, 70), (44, 108, 56))
    return image


def draw_night(rng):
    image = sky((18, 20, 62), (58, 52, 116))
    dots(image, rng, 30, 0.7, (255, 250, 230))
    y, x = rng.uniform(54, 68), rng.uniform(14, 114)      # not under the word
    paste(image, y, x, disc(16, 20) * np.float32(0.25), (200, 200, 240))
    paste(image, y, x, disc(9), (252, 240, 200))
    ridge(image, rng, rng.uniform(106, 116), 5, (26, 24, 58), (16, 16, 40))
    return image


@functools.cache
def fir():
    """A small fir tree, a mask (22, 15)."""
    y, x = np.mgrid[:22, :15].astype(np.float32)
    width = np.where(y < 20, (y % 7) * 0.55 + y * 0.17, 1.0)
    return (width + 0.5 - abs(x - 7)).clip(0, 1)


def draw_snow(rng):
    image = sky((146, 178, 220), (226, 236, 248))
    base = rng.uniform(62, 74)
    ridge(image, rng, base, 6, (214, 226, 242), (232, 240, 250))
    for share in rng.random(int(rng.integers(2, 6))):
        paste(image, base + 4 + 8 * rng.random(), share * SIDE, fir(), (86, 128, 128))
    ridge(image, rng, base + 20, 5, (250, 252, 255), (228, 236, 248))
    dots(image, rng, 24, 1.2, (255, 255, 255))
    return image


def draw_desert(rng):
    image = sky((246, 134, 104), (255, 208, 150))
    base = rng.uniform(62, 76)
    y, x = base - rng.uniform(14, 40), rng.uniform(16, 112)
    paste(image, y, x, disc(10), (250, 98, 66))
    ridge(image, rng, base, 6, (240, 178, 104), (222, 150, 80))
    ridge(image, rng, base + 22, 7, (226, 156, 84), (196, 120, 62))
    return image


LANDSCAPE_PAINTERS = {"sky": draw_sky, "sea": draw_sea, "hills": draw_hills, "night": draw_night,
                  "snow": draw_snow, "desert": draw_desert}


# --- Drawing ------------------------------------------------------------------------------------


def draw_thing(image, thing, pose):
    pixels = sprite(thing, pose.size, pose.tilt)
    shadow = sprite_shadow(thing, pose.size, pose.tilt)
    if pose.mirrored:
        pixels, shadow = pixels[..., ::-1], shadow[:, ::-1]
    area, cut = window(pose.y + 2, pose.x + 1, shadow.shape)
    image[area] *= shadow[cut]
    area, cut = window(pose.y, pose.x, pixels.shape[1:])
    image[area] *= 1 - pixels[cut][3]
    image[area] += pixels[cut][:3]


def word_mask(word, font, make):
    """The word's glyphs or halos side by side, a mask (h, w) in 0 to 1."""
    columns, width, height = layout(word)
    masks = [make(character, font, width, height) for character in word]
    center = width // 2 + SHADOW_MARGIN + 4 + max(-columns[0], columns[-1])
    total = np.zeros((masks[0].shape[0], 2 * center), np.float32)
    for mask, column in zip(masks, columns, strict=True):
        left = center + column - mask.shape[1] // 2
        area = total[:, left:left + mask.shape[1]]
        np.maximum(area, mask, out=area)
    return total


def draw_word(image, word, ink, font, y, x):
    light = np.mean(INKS[ink]) > 130
    # A soft halo parts the ink from what lies under it: dark around light inks, and the reverse.
    halo, strength = ((20, 20, 30), 0.5) if light else ((255, 252, 245), 0.4)
    mask = np.float32(strength) * word_mask(word, font, glyph_halo)
    paste(image, y + int(light), x, mask, halo)          # a dark halo lies one pixel lower
    paste(image, y, x, word_mask(word, font, glyph), INKS[ink])


def draw_card(card, rng):
    """A card with nothing on it yet, (3, 128, 128) float32, 0 to 255."""
    return plain_card(card, rng) if card in COLORS else LANDSCAPE_PAINTERS[card](rng)


def draw(scene):
    """Scene -> (128, 128, 3) uint8. The same scene always gives the same picture."""
    image = draw_card(scene.card, np.random.default_rng(scene.seed))
    for thing, pose in zip((scene.thing, scene.second), scene.poses, strict=False):
        draw_thing(image, thing, pose)
    if scene.word:
        draw_word(image, scene.word, scene.ink, scene.font, scene.y, scene.x)
    return np.ascontiguousarray(np.rint(image.clip(0, 255)).astype(np.uint8).transpose(1, 2, 0))
