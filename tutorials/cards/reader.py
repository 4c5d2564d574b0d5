"""Reads pictures of the cards world back, without a network: numpy and the two sheets alone.

    read(image)            {"thing": "panda", "card": "sea", "word": "LOVE", "ink": "white", ...}
    read_all(images)       the same for many pictures, on all cores

Things are found by squared error against every sprite at every place, size, tilt and mirroring, on
a coarse grid first. Cards are compared with the mean of drawn cards, inks with the color of what
is written. Characters are found by normalized correlation with every glyph, at every place that a
word of its length can take. What fits nothing is None; a character that fits no glyph is "?".
"""

import functools
import math
import multiprocessing
import os
import signal
from typing import NamedTuple

import numpy as np

import painting
import world

MIN_EXPLAINED = 0.40      # share of what is on the card that a thing's sprite must explain
MIN_SPRITE = 0.58         # correlation with a sprite below which there is no thing
MIN_GLYPH = 0.55          # correlation with a glyph below which a character cannot be read
STRICT_GLYPH = 0.80       # correlation above which a character counts as clean
MAX_INK = 75.0            # RGB distance to the nearest ink beyond which there is none
MAX_CARD = 3.0            # mean squared distance from a card's mean, in deviations, that is too far

# --- Things -------------------------------------------------------------------------------------

REACH = 38                # half of the window that holds the largest turned sprite
PAD = 12                  # pixels added round the picture, so that windows fit at its edges
POSES = [(size, tilt, mirrored) for size in world.PIXELS for tilt in world.TILTS
         for mirrored in (False, True)]
COARSE = [i for i, (_, tilt, _) in enumerate(POSES) if tilt in (-16, 0, 16)]


def shrink(planes, factor):
    """(..., H, W) -> (..., H / factor, W / factor): means of blocks."""
    *front, h, w = planes.shape
    return planes.reshape(*front, h // factor, factor, w // factor, factor).mean((-3, -1))


@functools.cache
def window_sprite(thing, size, tilt, mirrored):
    """A sprite in the middle of a window, (4, 76, 76), colors multiplied by alpha."""
    pixels = painting.sprite(thing, world.PIXELS[size], tilt)
    if mirrored:
        pixels = pixels[..., ::-1]
    window = np.zeros((4, 2 * REACH, 2 * REACH), np.float32)
    start = REACH - pixels.shape[1] // 2
    inside = slice(max(start, 0), min(start + pixels.shape[1], 2 * REACH))
    cut = slice(inside.start - start, inside.stop - start)
    window[:, inside, inside] = pixels[:, cut, cut]
    return window


class Bank(NamedTuple):
    """Sprites as rows of matrices, to meet many windows of a picture in one product."""
    colors: np.ndarray      # (n, 3 k k) colors times alpha
    alpha: np.ndarray       # (n, k k)
    energy: np.ndarray      # (n,) sum of colors squared times alpha
    mean: np.ndarray        # (n,) mean color over the sprite and the three channels
    deviation: np.ndarray   # (n,) root of the sum of squared differences from it


@functools.cache
def bank(things, poses, factor):
    windows = np.stack([shrink(window_sprite(thing, *POSES[pose]), factor)
                        for thing in things for pose in poses])
    colors, alpha = windows[:, :3], windows[:, 3:]
    energy = (colors ** 2 / np.maximum(alpha, 1e-3)).sum((1, 2, 3))
    weight = 3 * alpha.sum((1, 2, 3))
    mean = colors.sum((1, 2, 3)) / weight
    deviation = np.sqrt(np.maximum(energy - mean ** 2 * weight, 1e-6))
    count = len(windows)
    return Bank(colors.reshape(count, -1), alpha.reshape(count, -1), energy, mean, deviation)


def windows_of(planes, size, rows, columns):
    """Windows (size, size) of planes (C, H, W) starting at rows x columns -> (n, C, size, size)."""
    view = np.lib.stride_tricks.sliding_window_view(planes, (size, size), (1, 2))
    picked = view[:, rows[:, None], columns[None, :]]                  # (C, rows, columns, s, s)
    return picked.reshape(len(planes), -1, size, size).transpose(1, 0, 2, 3)


def fit(windows, ground, sprites):
    """Windows (n, 3, k, k) of the picture and of the bare ground -> three arrays (n, sprites).

    Each sprite's gain is the fall of the squared error, over the sprite's own pixels, where it
    takes the place of the bare ground. The share explained is the gain over all there is to
    explain in the window: 1 is the sprite and nothing else. Last the normalized correlation of
    window and sprite.
    """
    flat = windows.reshape(len(windows), -1)
    total = windows.sum(1).reshape(len(windows), -1) @ sprites.alpha.T
    square = (windows ** 2).sum(1).reshape(len(windows), -1) @ sprites.alpha.T
    product = flat @ sprites.colors.T
    difference = ((windows - ground) ** 2).sum(1).reshape(len(windows), -1)
    inside = difference @ sprites.alpha.T
    # Bright spots beside the sprite, as the moon, count no more than others.
    beside = np.minimum(difference, 60.0 ** 2)
    beside = beside.sum(1, keepdims=True) - beside @ sprites.alpha.T
    gain = inside - square + 2 * product - sprites.energy
    explained = gain / (inside + beside + 50 * sprites.alpha.shape[1])
    spread = np.sqrt(np.maximum(square - total ** 2 / (3 * sprites.alpha.sum(1)), 1e-6))
    spread = np.maximum(spread, 0.2 * sprites.deviation)
    correlation = (product - sprites.mean * total) / (sprites.deviation * spread)
    return gain, explained, correlation


def ground_of(planes):
    """What the card shows behind its things, guessed row by row from both edges: (3, H, W)."""
    left, right = np.median(planes[..., 1:6], -1), np.median(planes[..., -6:-1], -1)
    share = np.linspace(0, 1, planes.shape[-1], dtype=np.float32)
    return left[..., None] * (1 - share) + right[..., None] * share


class Found(NamedTuple):
    """A thing that was found: its name, center and size, and how well its sprite fits."""
    thing: str
    x: float
    y: float
    size: str
    correlation: float
    explained: float

    def fits(self):
        return self.explained >= MIN_EXPLAINED and self.correlation >= MIN_SPRITE


THING_ROWS = np.array([y for row in sorted(world.THING_ROW.values())
                       for y in range(row - 6, row + 7, 4)])


class Search:
    """All places for things in one picture, planes (3, 128, 128)."""

    def __init__(self, planes):
        padded = np.pad(planes, ((0, 0), (PAD, PAD), (PAD, PAD)), "edge")
        ground = np.pad(ground_of(planes), ((0, 0), (PAD, PAD), (PAD, PAD)), "edge")
        self.planes, self.ground = shrink(padded, 2), shrink(ground, 2)
        size = 2 * REACH // 4
        # A window that starts at cell k is centered at pixel 4 k + REACH - PAD.
        rows, columns = (THING_ROWS - REACH + PAD) // 4, np.arange(20)
        windows = windows_of(shrink(self.planes, 2), size, rows, columns)
        ground = windows_of(shrink(self.ground, 2), size, rows, columns)
        things = tuple(world.THINGS)
        _, explained, correlation = fit(windows, ground, bank(things, tuple(COARSE), 4))
        scores = explained + correlation
        scores = scores.reshape(len(rows), len(columns), len(things), len(COARSE)).max(-1)
        self.rows, self.columns = 4 * rows + REACH - PAD, 4 * columns + REACH - PAD
        self.scores = scores                                  # (rows, columns, things)

    def best(self, allowed):
        """The best thing among the allowed (rows, columns) places, looked at closely: Found."""
        scores = np.where(allowed[..., None], self.scores, -np.inf)
        candidates = np.argsort(-scores.max((0, 1)))[:3]
        found = [self.look(list(world.THINGS)[i], scores[..., i]) for i in candidates]
        return max(found, key=lambda thing: thing.explained + thing.correlation)

    def look(self, thing, scores):
        """The thing's exact place near its best coarse place -> Found."""
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        y, x = self.rows[row], self.columns[column]
        size = REACH
        near = np.arange(-2, 3)
        rows = np.clip((y - REACH + PAD) // 2 + near, 0, self.planes.shape[1] - size)
        columns = np.clip((x - REACH + PAD) // 2 + near, 0, self.planes.shape[2] - size)
        windows = windows_of(self.planes, size, rows, columns)
        ground = windows_of(self.ground, size, rows, columns)
        sprites = bank((thing,), tuple(range(len(POSES))), 2)
        gain, explained, correlation = fit(windows, ground, sprites)
        best = gain.argmax()
        place, pose = np.unravel_index(best, gain.shape)
        y, x = rows[place // len(near)], columns[place % len(near)]
        return Found(thing, int(2 * x + REACH - PAD), int(2 * y + REACH - PAD), POSES[pose][0],
                     float(correlation.flat[best]), float(explained.flat[best]))


def find_things(planes):
    """Planes (3, 128, 128) -> list of no, one or two Found, from left to right."""
    search = Search(planes)
    everywhere = np.ones((len(search.rows), len(search.columns)), bool)
    first = search.best(everywhere)
    if not first.fits():
        return []
    beside = (abs(search.rows - first.y) < 16)[:, None] & (abs(search.columns - first.x) > 46)[None]
    if not (search.scores[beside] > 0.7 * (MIN_EXPLAINED + MIN_SPRITE)).any():
        return [first]
    second = search.best(beside)
    found = [first, second] if second.fits() else [first]
    return sorted(found, key=lambda thing: thing.x)


# --- Cards --------------------------------------------------------------------------------------

CELLS = 32
DRAWN = 48                # drawings of each card, for its mean and deviation


@functools.cache
def card_models():
    """(cards, 3, 32, 32) means and variances of drawn cards."""
    means, variances = [], []
    for number, card in enumerate(world.CARDS):
        rng = np.random.default_rng(number)
        drawn = np.stack([shrink(painting.draw_card(card, rng), 4) for _ in range(DRAWN)])
        means.append(drawn.mean(0))
        variances.append(drawn.var(0) + 14.0 ** 2)
    return np.stack(means), np.stack(variances)


def free_cells(found, place):
    """Which of 32 x 32 cells show neither word nor thing."""
    free = np.ones((CELLS, CELLS), bool)
    row = world.WORD_ROW[place]
    free[max((row - 29) // 4, 0):(row + 29) // 4 + 1, 1:-1] = False
    for thing in found:
        reach = world.PIXELS[thing.size] * 0.62
        top, left = max(int((thing.y - reach) / 4), 0), max(int((thing.x - reach) / 4), 0)
        free[top:int((thing.y + reach) / 4) + 1, left:int((thing.x + reach) / 4) + 1] = False
    return free


def find_card(planes, free):
    """The card whose drawings fit best on the free cells, or None."""
    means, variances = card_models()
    squares = (shrink(planes, 4) - means) ** 2 / variances
    squares = np.minimum(squares, 16)                       # one strange cell decides nothing
    fits = (squares + np.log(variances))[..., free].mean((1, 2))
    best = int(fits.argmin())
    return world.CARDS[best] if squares[best][:, free].mean() < MAX_CARD else None


# --- Words --------------------------------------------------------------------------------------

BAND = 36                 # half of the rows that are searched for the word
LAYOUTS = [("latin", n) for n in world.LATIN_BOX] + [("hanzi", n) for n in world.HANZI_BOX]
ALPHABETS = {"latin": world.LETTERS + world.DIGITS, "hanzi": world.HANZI}
INK_RANGE = 140.0         # RGB distance from an ink at which a pixel counts as none of it


class Glyphs(NamedTuple):
    """The glyphs of one layout, font by font."""
    columns: np.ndarray     # of the characters' centers from the word's center
    height: int             # of the window round a character, in pixels
    width: int
    shift: int              # how far a word of this length may wander sideways


@functools.cache
def layout_of(script, length):
    word = ALPHABETS[script][0] * length
    columns, width, _ = painting.layout(word)
    height = painting.glyph(word[0], world.FONTS[0], *painting.layout(word)[1:]).shape[0]
    room = max((world.SIDE - painting.word_width(word)) // 2 - 4, 0)
    wide = round(world.HANZI_BOX[length][1] * 1.04) if script == "hanzi" else width
    return Glyphs(np.array(columns), (height + 3) // 4 * 4, (wide + 5) // 4 * 4,
                  min(room, world.JITTER["word"][0]) + 2)


@functools.cache
def glyph_bank(script, length, factor):
    """Normalized glyphs, (fonts, alphabet, h w): each has mean 0 and length 1."""
    layout = layout_of(script, length)
    word = ALPHABETS[script][0] * length
    rows = []
    for font in world.FONTS:
        for character in ALPHABETS[script]:
            mask = painting.glyph(character, font, *painting.layout(word)[1:])
            window = np.zeros((layout.height, layout.width), np.float32)
            # As painting.paste places it: the center is pixel n // 2.
            top = layout.height // 2 - mask.shape[0] // 2
            left = layout.width // 2 - mask.shape[1] // 2
            window[top:top + mask.shape[0], left:left + mask.shape[1]] = mask
            rows.append(shrink(window, factor).ravel())
    return normalized(np.stack(rows)).reshape(len(world.FONTS), len(ALPHABETS[script]), -1)


def normalized(rows, floor=0.0):
    """Rows with mean 0 and length 1; a row whose deviation is below `floor` gets shorter."""
    rows = rows - rows.mean(1, keepdims=True)
    length = np.sqrt((rows ** 2).sum(1, keepdims=True))
    return rows / np.maximum(length, floor * math.sqrt(rows.shape[1]) + 1e-6)


class Reading(NamedTuple):
    """A word that was read: how well it fits, and where."""
    fit: float
    word: str
    font: str
    x: int
    y: int
    correlations: tuple     # of the characters


def glyph_windows(ink, layout, centers, factor):
    """Windows of an ink map (H, W) at `factor` -> (centers, h w). Centers (n, 2) in pixels."""
    h, w = layout.height // factor, layout.width // factor
    view = np.lib.stride_tricks.sliding_window_view(ink, (h, w))
    rows = (centers[:, 0] - layout.height // 2) // factor
    columns = (centers[:, 1] - layout.width // 2) // factor
    rows, columns = rows.clip(0, view.shape[0] - 1), columns.clip(0, view.shape[1] - 1)
    return view[rows, columns].reshape(len(centers), -1)


def match(ink, script, length, places, factor):
    """Words of one layout at places (n, 2) -> for each font (mean fit, place, indices, fits)."""
    layout, glyphs = layout_of(script, length), glyph_bank(script, length, factor)
    centers = places[:, None] + np.stack((0 * layout.columns, layout.columns), 1)      # (n, L, 2)
    windows = normalized(glyph_windows(ink, layout, centers.reshape(-1, 2), factor), 0.08)
    fits = windows @ glyphs.reshape(-1, glyphs.shape[-1]).T
    fits = fits.reshape(len(places), length, *glyphs.shape[:2])            # (n, L, fonts, alphabet)
    best = fits.max(-1)
    for font in range(len(world.FONTS)):
        place = int(best[..., font].mean(1).argmax())
        yield (float(best[place, :, font].mean()), places[place],
               fits[place, :, font].argmax(-1), best[place, :, font])


@functools.cache
def shifts(reach_y, reach_x, step):
    """All shifts (n, 2) of up to so many pixels, `step` apart."""
    y, x = np.mgrid[-reach_y:reach_y + 1:step, -reach_x:reach_x + 1:step]
    return np.stack((y.ravel(), x.ravel()), 1)


MARGIN = 16               # of an ink map on every side, so that windows fit


def ink_maps(planes, place):
    """How much each pixel of the word's band is of each ink: the three maps of most contrast."""
    row = world.WORD_ROW[place]
    rows = np.clip(np.arange(row - BAND, row + BAND), 0, world.SIDE - 1)
    band = planes[:, rows]
    maps = []
    for color in world.INKS.values():
        distance = np.sqrt(((band - painting.as_planes(color)) ** 2).sum(0))
        maps.append((1 - distance / INK_RANGE).clip(0, 1))
    maps = sorted(maps, key=np.var, reverse=True)[:3]
    maps = [ink for ink in maps if ink.var() >= 0.3 * maps[0].var()]
    return [np.pad(ink, ((0, 0), (MARGIN, MARGIN))) for ink in maps]


def whole_fit(ink, word, font, y, x):
    """Correlation of the whole band with the word drawn at (y, x): what else is there counts."""
    drawn = np.zeros((1, world.SIDE, world.SIDE), np.float32)
    mask = painting.word_mask(word, font, painting.glyph)
    painting.paste(drawn, y + world.SIDE // 2 - BAND, x, mask, [1.0])
    drawn = drawn[0, world.SIDE // 2 - BAND:world.SIDE // 2 + BAND]
    pair = normalized(np.stack((drawn.ravel(), ink[:, MARGIN:-MARGIN].ravel())), 0.02)
    return float(pair[0] @ pair[1])


def find_word(planes, place):
    """The word above or below -> Reading, its place in pixels of the picture."""
    candidates, center = [], np.array((BAND, world.SIDE // 2 + MARGIN))
    for ink in ink_maps(planes, place):
        half = shrink(ink, 2)
        for script, length in LAYOUTS:
            places = center + shifts(2, layout_of(script, length).shift, 2)
            for font, (fit, where, _, _) in enumerate(match(half, script, length, places, 2)):
                candidates.append((fit, script, length, font, tuple(where), ink))
    candidates.sort(key=lambda candidate: candidate[0], reverse=True)
    readings = [look_closely(*candidate[1:]) for candidate in candidates[:4]]
    best = max(readings)
    return best._replace(x=best.x - MARGIN, y=best.y - BAND + world.WORD_ROW[place])


def look_closely(script, length, font, where, ink):
    """One candidate at full resolution -> Reading."""
    matches = list(match(ink, script, length, np.array(where) + shifts(2, 2, 1), 1))
    _, (y, x), indices, fits = matches[font]
    word = "".join(ALPHABETS[script][i] for i in indices)
    fit = whole_fit(ink, word, world.FONTS[font], int(y), int(x) - MARGIN)
    return Reading(fit, word, world.FONTS[font], int(x), int(y), tuple(float(f) for f in fits))


def find_ink(planes, reading):
    """The ink nearest to the mean color of what is written, or None."""
    mask = np.zeros((1, world.SIDE, world.SIDE), np.float32)
    painting.paste(mask, reading.y, reading.x,
               painting.word_mask(reading.word, reading.font, painting.glyph), [1.0])
    inside = mask[0] > 0.97
    if not inside.any():
        return None
    color = np.median(planes[:, inside], 1)
    distances = {name: np.linalg.norm(color - ink) for name, ink in world.INKS.items()}
    best = min(distances, key=distances.get)
    return best if distances[best] < MAX_INK else None


# --- Whole pictures -----------------------------------------------------------------------------


def read(image):
    """(128, 128, 3) picture, 0 to 255 -> {attribute: name or None}, and how it was read.

    "word" has "?" for a character that cannot be read. "strict" is True where every character is
    clean, "x" and "y" are the first thing's center (None without one), "correlations" those of the
    characters.
    """
    planes = np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1))
    found = find_things(planes)
    if found:
        place = "above" if found[0].y > world.SIDE / 2 else "below"
        reading = find_word(planes, place)
    else:
        readings = {place: find_word(planes, place) for place in world.PLACES}
        place = max(readings, key=lambda name: readings[name].fit)
        reading = readings[place]
    word = "".join(character if fit >= MIN_GLYPH else "?"
                   for character, fit in zip(reading.word, reading.correlations, strict=True))
    legible = word.count("?") < len(word)
    values = dict.fromkeys(world.ATTRIBUTES) | {
        "card": find_card(planes, free_cells(found, place)), "word": word,
        "ink": find_ink(planes, reading) if legible else None,
        "place": place if found or legible else None,
        "strict": min(reading.correlations) >= STRICT_GLYPH, "x": None, "y": None,
        "correlations": reading.correlations}
    if found:
        first = found[0]
        values |= {"thing": first.thing, "size": first.size, "x": first.x, "y": first.y}
    if len(found) == 1:
        distances = {side: abs(x - first.x) for side, x in world.SIDE_COLUMN.items()}
        values["side"] = min(distances, key=distances.get)
    if len(found) == 2:
        values["second"] = found[1].thing
    return values


def warm_up():
    """Makes the tables that all pictures share."""
    read(np.zeros((world.SIDE, world.SIDE, 3), np.uint8))
    for thing in world.THINGS:
        bank((thing,), tuple(range(len(POSES))), 2)


def as_worker():
    """A process that reads leaves Ctrl-C to its parent, which ends it by SIGTERM.

    So SIGTERM has no handler here: one in Python may miss it while the process waits for a lock.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def read_all(images, workers=None):
    """Pictures (B, 128, 128, 3), 0 to 255 -> list of what `read` returns."""
    workers = min(workers or os.cpu_count(), len(images) // 16)
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():     # as on Windows
        return [read(image) for image in images]
    warm_up()                              # children get the tables from their parent
    with multiprocessing.get_context("fork").Pool(workers, as_worker) as pool:
        return pool.map(read, images, chunksize=8)
