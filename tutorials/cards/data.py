"""Cards: a small world to distill on. A thing or two, and mostly a word, on a card or a landscape.

    scene = random_scene(rng)      what is in the picture, and where exactly
    draw(scene)                    (128, 128, 3) uint8
    caption(scene, rng)            `a panda by the sea with the word "LOVE" in white below it`
    parse(text)                    {"thing": "panda", "card": "sea", "word": "LOVE", ...}

Thing, card, word, ink and places are drawn independently. Only the ink is one that can be read on
the card, and only a single thing has a side. A caption leaves some of them out, and then any
picture that shows what is named is right. Tilt, mirroring, font and light are never
named. One in eight combinations of thing, card and ink is never in a training picture, nor is one
in eight words.

    python tutorials/cards/data.py     writes beside this file prompts.txt, to distil with, and
                                       prompts_heldout.txt, to score with (train.py writes those
                                       of its world into its --out folder)
"""

import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from captions import build_tokenizer, caption, language_of, parse, vocabulary
from painting import draw, layout, word_width
from world import (
    ATTRIBUTES,
    CARDS,
    COLORS,
    DIGITS,
    FONTS,
    HANZI,
    HANZI_WORDS,
    INKS,
    JITTER,
    LADDER,
    LANDSCAPES,
    LETTERS,
    PAIR_COLUMNS,
    PIXELS,
    PLACES,
    SIDE,
    SIDE_COLUMN,
    SIDES,
    SIZES,
    STEPS_WITH_WORDS,
    THING_ROW,
    THINGS,
    TILTS,
    UNSEEN_HANZI_WORDS,
    UNSEEN_WORDS,
    WORD_ROW,
    WORDS,
    WORLD,
    World,
    inks,
    pick,
    upright,
)

__all__ = [
    "ATTRIBUTES", "LADDER", "SIDE", "STEPS_WITH_WORDS", "WORLD", "Pose", "Scene", "World",
    "build_tokenizer", "caption", "draw", "is_held_out", "language_of", "parse", "prompt_list",
    "random_scene", "scene_for", "shows", "text_region", "upright", "vocabulary",
    "word_held_out", "write_prompts"]
HERE = os.path.dirname(os.path.abspath(__file__))

# --- What is held out ---------------------------------------------------------------------------


def combination_held_out(thing, card, ink):
    """Whether this combination is kept out of training: one in eight.

    Of the 560 pairs of thing and card 15 are never seen. They are on blue, purple and night, where
    only white and yellow can be read: both are held out together.
    """
    numbers = list(THINGS).index(thing), CARDS.index(card), list(INKS).index(ink)
    return (5 * numbers[0] + 3 * numbers[1] + 2 * numbers[2]) % 8 == 0


def word_held_out(word):
    """Whether this word is kept out of training: those listed, and one other string in eight."""
    if len(word) < 2 or word in WORDS or word in HANZI_WORDS:
        return False
    number = 7
    for character in word:
        number = (number * 131 + ord(character)) % 1_000_003
    return word in UNSEEN_WORDS or word in UNSEEN_HANZI_WORDS or number % 8 == 0


# --- Scenes -------------------------------------------------------------------------------------


class Pose(NamedTuple):
    """Where and how a thing lies: its center and size in pixels, its tilt in degrees."""
    x: int
    y: int
    size: int
    tilt: int
    mirrored: bool


class Scene(NamedTuple):
    """One picture. First what captions may name, then what they never do."""
    thing: str
    second: str | None          # a second thing, right of the first one
    card: str                      # a name of CARDS
    word: str                      # "": there is none, and ink, place, x and y mean nothing
    ink: str
    place: str                     # "above" or "below": the word, seen from the thing
    side: str | None            # of a single thing; None in a world where it does not vary
    size: str | None            # likewise
    poses: tuple                   # one Pose a thing
    x: int                         # center of the word
    y: int
    font: str
    seed: int                      # of the card's texture and light, or of the landscape


def wander(rng, kind, world):
    columns, rows = JITTER[kind]
    columns, rows = round(columns * world.jitter), round(rows * world.jitter)
    return int(rng.integers(-columns, columns + 1)), int(rng.integers(-rows, rows + 1))


def random_word(rng, unseen=False, world=WORLD):
    """A third from the lists of words, two thirds random strings, so that spelling is learned.

    `unseen`: a word that training never shows.
    """
    # Words of one character are never held out.
    letters, hanzi = (0 if unseen and n == 1 else n for n in (world.letters, world.hanzi))
    latin = letters and (not hanzi or rng.random() < 0.6)
    longest = letters if latin else hanzi
    if not longest:
        if unseen:
            raise ValueError("this world has no word that is held out")
        return ""
    lists = (UNSEEN_WORDS, UNSEEN_HANZI_WORDS) if unseen else (WORDS, HANZI_WORDS)
    while True:
        if rng.random() < 1 / 3:
            word = pick(rng, lists[0] if latin else lists[1])
        else:
            word = random_string(rng, latin, longest, world.digits)
        digits = any(c in DIGITS for c in word)
        if len(word) <= longest and (world.digits or not digits) and word_held_out(word) == unseen:
            return word


def random_string(rng, latin, longest, digits):
    # Longer words are rarer by themselves in the lists, and harder: they come more often here.
    shares = np.arange(1, longest + 1) ** 0.7
    length = int(rng.choice(longest, p=shares / shares.sum())) + 1
    alphabet = LETTERS if latin else HANZI
    if latin and digits and rng.random() < 0.25:
        alphabet = DIGITS if rng.random() < 0.6 else LETTERS + DIGITS
    return "".join(pick(rng, alphabet) for _ in range(length))


def random_scene(rng, held_out=False, unseen_words=False, world=WORLD):
    """A scene of the training distribution, or one that training never shows.

    rng: numpy Generator. held_out: with a combination of thing, card and ink out of the held-out
    ones. unseen_words: with a word out of the held-out ones.
    """
    if held_out:      # without a word there is no ink, and nothing of the card would be new
        world = replace(world, wordless=0.0)
    while True:
        scene = compose({}, rng, world, unseen_words)
        if is_held_out(scene) == held_out:
            return scene


def is_held_out(scene):
    """Whether training avoids the scene, for one of its things with this card and ink."""
    things = [thing for thing in (scene.thing, scene.second) if thing]
    return any(combination_held_out(thing, scene.card, scene.ink) for thing in things)


def scene_for(prompt, rng, world=WORLD):
    """A scene that shows what the prompt names, the rest left to chance.

    A caption without word, ink and place is nearly always that of a card without a word.
    """
    wanted = parse(prompt)
    if world.wordless and not wanted.keys() & {"word", "ink", "place"}:
        wanted["word"] = ""
    return compose(wanted, rng, world)


def shows(world, prompt):
    """Whether a world has everything that a prompt names."""
    wanted = parse(prompt)
    word = wanted.get("word", "")
    things = {wanted.get("thing"), wanted.get("second")} - {None}
    lacking = [
        len(word) > (world.letters if word.isascii() else world.hanzi),
        not world.digits and any(c in DIGITS for c in word),
        not world.letters + world.hanzi and not wanted.keys().isdisjoint(("ink", "place")),
        not world.landscapes and wanted.get("card") in LANDSCAPES,
        not world.two_things and "second" in wanted,
        not world.sides and "side" in wanted,
        not world.sizes and "size" in wanted,
        not things <= set(list(THINGS)[:world.things])]
    return not any(lacking)


def card_and_ink(card, ink, place, rng, world):
    """Draws whichever of the two is None, so that the ink can be read."""
    while card is None:
        card = pick(rng, list(LANDSCAPES if rng.random() < world.landscapes else COLORS))
        if ink is not None and ink not in inks(card, place):
            card = None
    return card, ink or pick(rng, inks(card, place))


def random_things(wanted, rng, world):
    """The one or two things of a picture -> (thing, second or None)."""
    things = list(THINGS)[:world.things]
    thing, second = wanted.get("thing"), wanted.get("second")
    if thing is None:
        thing = pick(rng, things)
        # A caption that names one thing means one. A side is that of a single thing.
        if "side" not in wanted and rng.random() < world.two_things:
            second = pick(rng, [name for name in things if name != thing])
    return thing, second


def compose(wanted, rng, world=WORLD, unseen_words=False):
    """Names that are wanted, {attribute: name} -> Scene with everything else drawn at random."""
    thing, second = random_things(wanted, rng, world)
    place = wanted.get("place") or pick(rng, list(PLACES))
    card, ink = card_and_ink(wanted.get("card"), wanted.get("ink"), place, rng, world)
    word = wanted.get("word")
    if word is None:
        # A prompt that names ink or place wants a word.
        free = not (unseen_words or "ink" in wanted or "place" in wanted)
        wordless = free and rng.random() < world.wordless
        word = "" if wordless else random_word(rng, unseen_words, world)
    size = wanted.get("size") or (pick(rng, list(SIZES)) if world.sizes else None)
    side, columns, kind = None, PAIR_COLUMNS, "pair"
    if second is None:
        side = wanted.get("side") or (pick(rng, list(SIDES)) if world.sides else None)
        columns = (SIDE_COLUMN[side or "center"],)
        kind = "small" if size == "small" else "thing"
    poses = tuple(random_pose(c, THING_ROW[place], size, kind, rng, world) for c in columns)
    dx, dy = wander(rng, "word", world)
    room = (SIDE - word_width(word)) // 2 - 4       # a long word stays clear of the edges
    dx = int(np.clip(dx, -room, room))
    font = pick(rng, FONTS) if world.fonts else FONTS[0]
    return Scene(thing, second, card, word, ink, place, side, size, poses, SIDE // 2 + dx,
                 WORD_ROW[place] + dy, font, int(rng.integers(2 ** 31)))


def random_pose(column, row, size, kind, rng, world):
    dx, dy = wander(rng, kind, world)
    tilt = pick(rng, TILTS) if world.tilts else 0
    mirrored = bool(rng.integers(2)) if world.mirrors else False
    return Pose(column + dx, row + dy, PIXELS[size or "big"], tilt, mirrored)


# --- For training: where to look ----------------------------------------------------------------


def text_region(scene, cells=16):
    """Which cells of a (cells, cells) grid show the word or a thing: two float32 masks, 0 or 1.

    For weighting a loss: 1 + a * word + b * thing.
    """
    word, thing = np.zeros((2, cells, cells), np.float32)
    step = SIDE / cells

    def mark(mask, y, x, height, width):
        top, left = max(int((y - height / 2) / step), 0), max(int((x - width / 2) / step), 0)
        bottom, right = int(np.ceil((y + height / 2) / step)), int(np.ceil((x + width / 2) / step))
        mask[top:bottom, left:right] = 1

    if scene.word:
        height = layout(scene.word)[2]
        mark(word, scene.y, scene.x, height, word_width(scene.word))
    for pose in scene.poses:
        mark(thing, pose.y, pose.x, pose.size, pose.size)
    return word, thing


# --- Prompt lists -------------------------------------------------------------------------------


def prompt_list(count, seed, held_out=True, unseen_words=None, drop=1 / 3, world=WORLD):
    """`count` different captions, every other one Chinese.

    unseen_words: True, False, or None for both in turn, two prompts of each; in a world without
    words of two characters all words are seen.
    """
    if unseen_words is None and max(world.letters, world.hanzi) < 2:
        unseen_words = False
    rng, prompts = np.random.default_rng(seed), {}
    while len(prompts) < count:
        unseen = len(prompts) // 2 % 2 == 1 if unseen_words is None else unseen_words
        scene = random_scene(rng, held_out, unseen, world)
        prompts[caption(scene, rng, ("en", "zh")[len(prompts) % 2], drop)] = None
    return list(prompts)


def write_prompts(folder, world=WORLD):
    """Writes prompts.txt, to distil with, and prompts_heldout.txt, to score with."""
    known = prompt_list(4000, 1, held_out=False, unseen_words=False, world=world)
    # A short caption can be in both lists: then it is no held-out one.
    new = prompt_list(1100, 2, world=world)
    new = [prompt for prompt in new if prompt not in known][:1000]
    lists = {"prompts.txt": known, "prompts_heldout.txt": new}
    for name, prompts in lists.items():
        path = os.path.join(folder, name)
        with open(path + ".part", "w", encoding="utf-8") as file:
            file.write("\n".join(prompts) + "\n")
        os.replace(path + ".part", path)


if __name__ == "__main__":
    write_prompts(HERE)
