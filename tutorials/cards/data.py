"""Cards: a small world to distill on. A picture of a thing, and a word written on it.

    scene = random_scene(rng)      what is in the picture, and where exactly
    draw(scene)                    (128, 128, 3) uint8
    caption(scene, rng)            `a panda by the sea with the word "LOVE" in white below it`
    parse(text)                    {"thing": "panda", "card": "sea", "word": "LOVE", ...}

Thing, card, word, ink and places are independent of each other. A caption leaves some of them out,
and then any picture that shows what is named is right. Tilt, mirroring, font and light are never
named. One in eight combinations of thing, card and ink is never in a training picture, nor is one
in eight words.

    python tutorials/cards/data.py         writes prompts_heldout.txt beside this file
"""

import functools
import os
import re
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageFilter

HERE = os.path.dirname(os.path.abspath(__file__))

# --- The world: its numbers and names -----------------------------------------------------------

SIDE = 128                         # pixels of a picture's side
SPRITE, GLYPH = 64, 56             # pixels of a tile in things.png and glyphs.png
CAP = 46                           # height of capitals and digits in their tiles
SHEET_COLUMNS = 10                 # tiles in a row of either sheet


@dataclass(frozen=True)
class World:
    """How much varies. A lower step of the ladder turns some of it off."""
    things: int = 40               # how many of THINGS appear
    letters: int = 5               # longest word of capitals and digits; 0: no words of them
    hanzi: int = 3                 # longest Chinese word; 0: no Chinese words
    digits: bool = True
    landscapes: float = 0.45       # share of pictures with a landscape in place of a plain card
    two_things: float = 0.2        # share of pictures with two things, left and right
    sides: bool = True             # a single thing may also stand left or right
    sizes: bool = True             # things may be small
    tilts: bool = True
    mirrors: bool = True
    fonts: bool = True             # both fonts, or "sans" alone
    jitter: float = 1.0            # how far places wander, of JITTER


LADDER = {
    1: World(letters=0, hanzi=0, landscapes=0, two_things=0, sides=False, sizes=False, tilts=False,
             fonts=False),
    2: World(letters=1, hanzi=1, digits=False, landscapes=0, two_things=0, sizes=False),
    3: World(letters=3, hanzi=2, digits=False, landscapes=0, two_things=0),
    4: World(two_things=0),
    5: World()}
WORLD = LADDER[5]

THINGS = {                         # name: (Chinese name, its measure word)
    "panda": ("熊猫", "只"), "rabbit": ("兔子", "只"), "cat": ("猫咪", "只"), "dog": ("小狗", "只"),
    "fox": ("狐狸", "只"), "frog": ("青蛙", "只"), "tiger": ("老虎", "只"), "pig": ("小猪", "只"),
    "koala": ("考拉", "只"), "penguin": ("企鹅", "只"), "owl": ("猫头鹰", "只"),
    "octopus": ("章鱼", "只"), "turtle": ("乌龟", "只"), "whale": ("鲸鱼", "只"),
    "unicorn": ("独角兽", "只"), "bee": ("蜜蜂", "只"), "butterfly": ("蝴蝶", "只"),
    "dinosaur": ("恐龙", "只"), "apple": ("苹果", "个"), "banana": ("香蕉", "个"),
    "strawberry": ("草莓", "个"), "watermelon": ("西瓜", "个"), "hamburger": ("汉堡", "个"),
    "pizza": ("披萨", "个"), "cake": ("蛋糕", "个"), "donut": ("甜甜圈", "个"),
    "mushroom": ("蘑菇", "个"), "car": ("汽车", "辆"), "rocket": ("火箭", "个"),
    "guitar": ("吉他", "把"), "balloon": ("气球", "个"), "crown": ("皇冠", "个"),
    "gift": ("礼物", "个"), "robot": ("机器人", "个"), "sunflower": ("向日葵", "朵"),
    "lantern": ("灯笼", "个"), "umbrella": ("雨伞", "把"), "house": ("房子", "座"),
    "sailboat": ("帆船", "艘"), "cactus": ("仙人掌", "个")}
COLORS = {                         # plain cards
    "red": (206, 52, 48), "orange": (240, 142, 52), "yellow": (250, 214, 84),
    "green": (84, 168, 90), "blue": (62, 112, 204), "purple": (132, 82, 182),
    "pink": (248, 172, 194), "white": (244, 242, 236)}
INKS = {"white": (255, 255, 255), "black": (30, 28, 34), "red": (204, 20, 36),
        "blue": (24, 56, 186), "yellow": (255, 226, 40), "green": (16, 112, 60)}
CHINESE_COLORS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "white": "白色", "black": "黑色"}
LANDSCAPES = {                     # name: (English phrase, Chinese phrase)
    "sky": ("under a blue sky", "蓝天下"), "sea": ("by the sea", "海边"),
    "hills": ("in green hills", "青山前"), "night": ("at night", "夜空下"),
    "snow": ("in the snow", "雪地里"), "desert": ("in the desert", "沙漠里")}
CARDS = (*COLORS, *LANDSCAPES)
FONTS = ("sans", "serif")
PLACES = {"above": "上面", "below": "下面"}                # of the word, seen from the thing
SIDES = {"left": "左边", "center": "中间", "right": "右边"}   # of a single thing
SIZES = {"small": "小小的", "big": "大大的"}
ATTRIBUTES = ("thing", "second", "card", "word", "ink", "place", "side", "size")

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
HANZI = ("福爱好笑山水春夏秋冬天地日月星云雨雪风花草木火人心你我大小中国家生"
         "快乐新年喜吉安平发财梦美茶鱼龙马牛羊东西南北早晚加油运")
CHARACTERS = LETTERS + DIGITS + HANZI

# Inks that can be read on each card; on a landscape, above and below differ.
CARD_INKS = {
    "red": ("white", "yellow", "black"), "orange": ("white", "black", "blue"),
    "yellow": ("black", "red", "blue", "green"), "green": ("white", "yellow", "black"),
    "blue": ("white", "yellow"), "purple": ("white", "yellow"),
    "pink": ("white", "black", "red", "blue", "green"),
    "white": ("black", "red", "blue", "green"),
    ("sky", "above"): ("white", "yellow", "black", "red"), ("sky", "below"): ("black", "red", "blue"),
    ("sea", "above"): ("black", "red", "blue", "green"), ("sea", "below"): ("white", "yellow"),
    ("hills", "above"): ("black", "red", "blue"), ("hills", "below"): ("white", "yellow", "black"),
    ("night", "above"): ("white", "yellow"), ("night", "below"): ("white", "yellow"),
    ("snow", "above"): ("black", "red", "blue", "green"),
    ("snow", "below"): ("black", "red", "blue", "green"),
    ("desert", "above"): ("white", "black", "blue"), ("desert", "below"): ("white", "black", "blue")}

# Places, in pixels. The word fills one end of the card, the things the other.
WORD_ROW = {"above": 29, "below": 99}
THING_ROW = {"above": 92, "below": 36}          # by the place of the *word*
SIDE_COLUMN = {"left": 38, "center": 64, "right": 90}
PAIR_COLUMNS = (33, 95)
PIXELS = {"small": 44, "big": 58}               # of the thing's longer side
JITTER = {"word": (7, 2), "thing": (5, 2), "small": (6, 5), "pair": (2, 2)}   # columns, rows, both ways
TILTS = (-16, -8, 0, 8, 16)                     # degrees
# By the number of characters: pitch, greatest width and greatest height of a glyph.
LATIN_BOX = {1: (0, 48, 48), 2: (44, 41, 46), 3: (37, 35, 43), 4: (29, 27, 40), 5: (23.5, 22, 36)}
HANZI_BOX = {1: (0, 52, 52), 2: (48, 46, 46), 3: (39, 38, 38)}

WORDS = """
A I B C X Y Z V W O U HI GO UP OK NO ME WE US MY BE SO IF AM PM TV A1 B2 X9 Q7 MR
CAT DOG SUN JOY HAT BOX RED TEA FUN YES HEY WOW BIG SKY SEA ART MAP PIE JAM EGG BEE OWL FOX COW
PIG HUG KEY TOY CUP BUS CAR JET ZOO ICE HOT NEW MOM DAD BOY KID YOU OUR ONE TWO TEN MAX LEO ZOE
TOM BEN EVA SAM KIM TOP WIN 123 365 007 100 99 42 LOVE HOPE LUCK STAR MOON SNOW FIRE WIND RAIN
TREE ROSE HOME FOOD CAKE FISH BIRD BEAR LION DUCK FROG GOOD NICE COOL BEST WISH LIFE TIME HERO
KING PLAY SING JUMP ZOOM QUIZ JAZZ BLUE PINK GOLD OPEN SALE FREE 2024 2025 2026 1001 HELLO WORLD
HAPPY SMILE DREAM PARTY MUSIC PEACE HEART SUNNY APPLE LEMON BREAD WATER RIVER OCEAN EARTH LIGHT
MAGIC LUCKY SWEET SUPER PIZZA TIGER PANDA ROBOT QUEEN HOUSE GREEN WHITE BLACK THANK GREAT CANDY
EARLY NIGHT STORY 12345 BRAVO""".split()
UNSEEN_WORDS = """
LUV BAT PEN SIX WEB JOB NUT RAY FLY GEM VIP AXE HOP ZAP KIT DEW OAK PA DO BY 88 365D WARM FAST
KIND SAND LEAF NEWS GIRL BABY WOLF CHEF TAXI 2030 HONEY BEACH CLOUD SPACE TRAIN JUICE FUNNY ZEBRA
SHINE PIANO QUICK BRAVE""".split()
HANZI_WORDS = """
福 爱 好 笑 山 水 春 夏 秋 冬 梦 美 茶 喜 吉 龙 马 牛 羊 鱼 花 月 星 云 雨 雪 风 火 木 心 家 人 你好 快乐 新年
平安 加油 发财 大吉 山水 春天 秋天 冬天 爱心 生日 早安 晚安 大家 美好 花草 星星 天地 中国 东西 南北
大鱼 好梦 好茶 美梦 春雨 雪花 风雨 火星 木马 牛年 龙年 马年 家人 心爱 你我 大山 小雨 喜乐 新年好 中国年
好心人 大好人 大笑""".split()
UNSEEN_HANZI_WORDS = """
夏天 水火 早春 人生 安心 茶花 梦中 山花 日月 天天 喜爱 年年 好运 北风 星云 小龙 大雪 快马 美人 风水 家乐福
中国人 春秋冬 日月星 好天地 小心火""".split()

# --- What is held out ---------------------------------------------------------------------------


def combination_held_out(thing, card, ink):
    """Whether this combination is kept out of training: one in eight, every pair is seen."""
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
    second: Optional[str]          # a second thing, right of the first one
    card: str                      # a name of CARDS
    word: str
    ink: str
    place: str                     # "above" or "below": the word, seen from the thing
    side: Optional[str]            # of a single thing
    size: str
    poses: tuple                   # one Pose a thing
    x: int                         # center of the word
    y: int
    font: str
    seed: int                      # of the card's texture and light, or of the landscape


def pick(rng, names):
    return names[int(rng.integers(len(names)))]


def wander(rng, kind, world):
    columns, rows = JITTER[kind]
    columns, rows = round(columns * world.jitter), round(rows * world.jitter)
    return int(rng.integers(-columns, columns + 1)), int(rng.integers(-rows, rows + 1))


def random_word(rng, unseen=False, world=WORLD):
    """A third from the lists of words, two thirds random strings, so that spelling is learned.

    `unseen`: a word that training never shows.
    """
    latin = world.letters and (not world.hanzi or rng.random() < 0.6)
    longest = world.letters if latin else world.hanzi
    if not longest:
        return ""
    if unseen and longest == 1:
        raise ValueError("words of one character are never held out")
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

    `held_out`: a combination of thing, card and ink out of the held-out ones. `unseen_words`: a word out of the held-out ones. rng: numpy Generator.
    """
    while True:
        scene = compose({}, rng, world, unseen_words)
        if is_held_out(scene) == held_out:
            return scene


def is_held_out(scene):
    """Whether training avoids the scene, for one of its things with this card and ink."""
    things = [thing for thing in (scene.thing, scene.second) if thing]
    return any(combination_held_out(thing, scene.card, scene.ink) for thing in things)


def scene_for(prompt, rng, world=WORLD):
    """A scene that shows what the prompt names, the rest left to chance."""
    return compose(parse(prompt), rng, world)


def inks(card, place):
    """Inks in which a word above or below can be read on this card."""
    return CARD_INKS[card] if card in COLORS else CARD_INKS[card, place]


def card_and_ink(card, ink, place, rng, world):
    """Draws whichever of the two is None, so that the ink can be read. Two names stay as they are."""
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
        word = random_word(rng, unseen_words, world)
    size = wanted.get("size") or (pick(rng, list(SIZES)) if world.sizes else "big")
    side, columns, kind = None, PAIR_COLUMNS, "pair"
    if second is None:
        side = wanted.get("side") or (pick(rng, list(SIDES)) if world.sides else "center")
        columns, kind = (SIDE_COLUMN[side],), "small" if size == "small" else "thing"
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
    return Pose(column + dx, row + dy, PIXELS[size], tilt, mirrored)


# --- Tiles of the two sheets --------------------------------------------------------------------


@functools.cache
def sheet(name, mode):
    with Image.open(os.path.join(HERE, name)) as picture:
        return picture.convert(mode)


def tile(picture, number, side):
    row, column = divmod(number, SHEET_COLUMNS)
    return picture.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


def scaled(plane, size):
    """(H, W) float32 -> size (width, height) by area and cubic filters, 0 to 255."""
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
    edge = np.minimum.reduce(np.broadcast_arrays(COLUMNS, ROWS, SIDE - 1 - COLUMNS, SIDE - 1 - ROWS))
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
    return paper * planes(COLORS[color])


# A picture is three planes, (3, 128, 128) float32, 0 to 255, until it is done: numpy's loops run
# along the last axis, and are several times slower over three values than over 128.


def planes(color):
    """A color (3) -> (3, 1, 1) float32, to go with planes."""
    return np.float32(color)[:, None, None]


def gradient(top, bottom, rows=SIDE):
    """Colors from top to bottom, (3, rows, 1)."""
    share = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    return planes(top) + share * (planes(bottom) - planes(top))


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
    blend(image[area], mask[cut], planes(color))


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
    rows, columns = (np.arange(SIDE) + shift & SIDE - 1 for shift in rng.integers(0, SIDE, 2))
    blend(image, field[rows[:, None], columns], planes(color))


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
    y, x = rng.uniform(14, 66), rng.uniform(14, 114)
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
    paste(image, y, x, disc(10), (255, 238, 190))
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
    paste(image, y + light, x, mask, halo)
    paste(image, y, x, word_mask(word, font, glyph), INKS[ink])


def draw_card(card, rng):
    """A card with nothing on it yet, (3, 128, 128) float32, 0 to 255."""
    return plain_card(card, rng) if card in COLORS else LANDSCAPE_PAINTERS[card](rng)


def draw(scene):
    """Scene -> (128, 128, 3) uint8. The same scene always gives the same picture."""
    image = draw_card(scene.card, np.random.default_rng(scene.seed))
    for thing, pose in zip((scene.thing, scene.second), scene.poses):
        draw_thing(image, thing, pose)
    if scene.word:
        draw_word(image, scene.word, scene.ink, scene.font, scene.y, scene.x)
    return np.ascontiguousarray(np.rint(image.clip(0, 255)).astype(np.uint8).transpose(1, 2, 0))


# --- Captions -----------------------------------------------------------------------------------


def named(scene, rng, drop):
    """What a caption of the scene names, {attribute: name}; each is left out with chance `drop`."""
    names = {a: getattr(scene, a) for a in ATTRIBUTES if getattr(scene, a)}
    chances = {"thing": drop / 4, "word": drop / 5, "second": 0.0}
    names = {a: name for a, name in names.items() if rng.random() >= chances.get(a, drop)}
    if "thing" not in names and "word" not in names:
        names |= {"thing": scene.thing, "word": scene.word}
    if scene.second and "thing" in names:
        names["second"] = scene.second
    if "thing" not in names:
        # Side and size are those of a thing.
        names = {a: name for a, name in names.items() if a not in ("second", "side", "size")}
    if not scene.word:
        names = {a: name for a, name in names.items() if a not in ("word", "ink", "place")}
    return names


def caption(scene, rng, language=None, drop=1 / 3):
    """One sentence about the scene in "en" or "zh" (None: either), with a share left out.

    `drop` is the chance to leave out card, ink, place, side or size, each; the thing is left out a
    quarter as often, the word a fifth as often. 0: names everything.
    """
    names = named(scene, rng, drop)
    if (language or pick(rng, ("en", "zh"))) == "en":
        return english(names, rng) + ("." if rng.random() < 0.06 else "")
    return chinese(names, rng) + ("。" if rng.random() < 0.06 else "")


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def join(*parts):
    return " ".join(part for part in parts if part)


def english_thing(names):
    """`a small panda on the left`, `a panda and a fox`, or nothing."""
    if "thing" not in names:
        return ""
    things = [join(names.get("size"), names["thing"])]
    if "second" in names:
        things.append(names["second"])
    side = {"left": "on the left", "right": "on the right", "center": "in the middle"}
    return join(" and ".join(map(article, things)), side.get(names.get("side")))


def english_word(names, rng, ink_first):
    """`the white word "LOVE"`, `LOVE`, `the letter A in blue`, or nothing."""
    ink = names.get("ink")
    if "word" not in names:
        if ink is None and "place" not in names:
            return ""
        return join("a", ink, "word") if ink_first else join("a word", ink and "in " + ink)
    word = names["word"]
    noun = "word"
    if len(word) == 1:
        noun = "letter" if word in LETTERS else "number" if word in DIGITS else "character"
    quoted = f'"{word}"' if rng.random() < 0.55 else word
    if ink_first and ink:
        return f"the {ink} {noun} {quoted}"
    plain = quoted if rng.random() < 0.4 else f"the {noun} {quoted}"
    return join(plain, ink and "in " + ink)


def english_card(names):
    """`on a red card`, `by the sea`, or nothing."""
    card = names.get("card")
    if card in COLORS:
        return f"on {article(card)} card"
    return LANDSCAPES[card][0] if card else ""


def english(names, rng):
    kind = int(rng.integers(4))
    thing, card = english_thing(names), english_card(names)
    word = english_word(names, rng, ink_first=kind == 1)
    place, it = names.get("place"), "them" if "second" in names else "it"
    if not thing:
        end = {"above": "at the top", "below": "at the bottom", None: ""}[place]
        if names.get("card") in COLORS and kind < 2:
            return join(article(names["card"]), "card with", word, end)
        return join(word, end, card)
    if not word:
        return join(thing, card)
    where = join(place, place and it)
    if kind == 0:
        return join(thing, card, "with", word, where)
    if kind == 1 and names.get("card") in COLORS:
        return join(article(names["card"]), "card with", thing, "and", word, where)
    if kind == 2:
        return join(word, place or "and", thing, card)
    written = "written" if where and rng.random() < 0.5 else ""
    return join(join(thing, card) + ",", word, written, where)


def chinese_thing(names, counted):
    """`一只小小的熊猫`, `熊猫和狐狸`, or nothing."""
    if "thing" not in names:
        return ""
    name, measure = THINGS[names["thing"]]
    text = ("一" + measure if counted else "") + SIZES.get(names.get("size"), "") + name
    if "second" in names:
        name, measure = THINGS[names["second"]]
        text += "和" + ("一" + measure if counted else "") + name
    return text


def chinese_word(names, rng):
    """`白色的“福”`, `福`, or nothing."""
    ink = CHINESE_COLORS[names["ink"]] + "的" if "ink" in names else ""
    if "word" not in names:
        return ink + "字" if ink or "place" in names else ""
    return ink + (f"“{names['word']}”" if rng.random() < 0.6 else names["word"])


def chinese_card(names, rng):
    """`红色卡片`, `海边`, or nothing."""
    card = names.get("card")
    if card in COLORS:
        return ("一张" if rng.random() < 0.2 else "") + CHINESE_COLORS[card] + "卡片"
    return LANDSCAPES[card][1] if card else ""


def chinese(names, rng):
    kind = int(rng.integers(4))
    card, word = chinese_card(names, rng), chinese_word(names, rng)
    thing = chinese_thing(names, counted=kind == 1 or rng.random() < 0.3)
    place, side = PLACES.get(names.get("place"), ""), SIDES.get(names.get("side"), "")
    if not thing:
        place = {"above": "上方", "below": "下方", None: ""}[names.get("place")]
        parts = [card, f"{place}写着{word}"] if kind < 2 else [f"{place}{word}", card]
        return "，".join(part for part in parts if part)
    if side or kind == 1:
        # 左边有一只熊猫; 海边有一只熊猫; 红色卡片上有一只熊猫
        here = side or (card and (card + "上" if names["card"] in COLORS else card))
        thing = f"{here}有{thing}"
        card = card if side else ""
    if not word:
        parts = [card, thing]
    elif kind == 2 and place and not side:
        parts = [f"{word}在{thing}{place}", card]
    elif kind == 3 and not side:
        parts = [card and card + "，", thing, f"和{word}" if not place else f"，{place}是{word}"]
        return "".join(parts)
    elif kind == 0 and not side:
        parts = [card, f"{thing}{place}写着{word}"]
    else:
        parts = [card, thing, f"{place}写着{word}"]
    return "，".join(part for part in parts if part)


# --- Understanding a caption --------------------------------------------------------------------
# Independent of how captions are written above, for users write their own.

ALIASES = {                        # further names of things
    "bunny": "rabbit", "kitten": "cat", "kitty": "cat", "puppy": "dog", "piglet": "pig",
    "tortoise": "turtle", "dino": "dinosaur", "burger": "hamburger", "doughnut": "donut",
    "automobile": "car", "spaceship": "rocket", "present": "gift", "boat": "sailboat",
    "home": "house", "strawberries": "strawberry", "butterflies": "butterfly",
    "bumblebee": "bee", "小猫": "cat", "猫": "cat", "小兔": "rabbit", "兔": "rabbit", "狗": "dog",
    "猪": "pig", "虎": "tiger", "小汽车": "car", "车": "car", "海龟": "turtle", "伞": "umbrella",
    "小船": "sailboat", "船": "sailboat", "汉堡包": "hamburger", "比萨": "pizza",
    "房屋": "house", "小屋": "house", "王冠": "crown"}
NAMES = ALIASES | {name: name for name in THINGS} | {THINGS[name][0]: name for name in THINGS}


def alternatives(words):
    """A regular expression for any of the words, the longest that fits."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


_LATIN_NAMES = alternatives(name for name in NAMES if name.isascii())
_CHINESE_NAMES = alternatives(name for name in NAMES if not name.isascii())
THING = re.compile(rf"\b({_LATIN_NAMES})(?:e?s)?\b|({_CHINESE_NAMES})")
COLOR_WORDS = {name: name for name in CHINESE_COLORS} | {
    word: name for name, long in CHINESE_COLORS.items() for word in (long, long[0])}
COLOR_WORDS |= {"粉红色": "pink", "粉红": "pink"}
_COLOR = alternatives(COLOR_WORDS)
CARD = re.compile(rf"(?:\bon )?(?:\b(?:a|an|the) )?({_COLOR})(?:[ -]colou?red)?(?: paper| post| greeting)? "
                  rf"(?:card|background|paper)s?\b|({_COLOR})的?(?:贺|纸|明信)?(?:卡片|卡|背景|底|纸)(?:上面?)?")
_PREPOSITION = r"(?:\b(?:in front of|under|in|at|by|on|near|over) )?(?:\b(?:a|an|the) )?"
LANDSCAPE_WORDS = {                # in this order: a night sky is no blue sky
    "night": r"(?:night sky|night|starry sky|stars)\b|夜空下?|夜晚|夜里|晚上|星空下?",
    "snow": r"(?:snow|snowy \w+|winter)\b|雪地里?|雪地上?|雪中|雪景",
    "sea": r"(?:sea|seaside|ocean|beach|shore)\b|海边|海滩|大海[前边]?|海",
    "desert": r"(?:sand )?(?:desert|dunes)\b|沙漠[里中]?",
    "hills": r"(?:green )?(?:hills?|mountains?|meadow)\b|青山前?|山坡上?|山前|群山",
    "sky": r"(?:blue )?(?:sky|clouds)\b|蓝天下?|天空下?|天上"}
ABOVE = r"\babove\b|\bover\b|\bat the top\b|\bon top\b|上面|上方|上边|顶部|之上"
BELOW = r"\bbelow\b|\bunder\b|\bunderneath\b|\bbeneath\b|\bat the bottom\b|下面|下方|下边|底部|之下"
MARK = "§"                         # stands for the word, once that has been taken out


# The article of `A panda ...` is no word; the letter of `A in red above a panda` is one.
FIRST_ARTICLE = r"^\s*A (?=[a-z])(?!(?:in|and|above|below|at|on|under|by)\b)"


def spellable(word):
    boxes = LATIN_BOX if word.isascii() else HANZI_BOX
    return len(word) in boxes and all(character in CHARACTERS for character in word)


def take_word(text):
    """Text -> (the word that should be written or None, the text with MARK in its place)."""
    quoted = re.search(r'"\s*([^"]+?)\s*"', text) or re.search(r"(?<!\w)'([^']+)'(?!\w)", text)
    if quoted:
        word = quoted[1].upper()
        text = text[:quoted.start()] + MARK + text[quoted.end():]
        return (word if spellable(word) else None), text
    text = re.sub(FIRST_ARTICLE, "a ", text)
    runs = list(re.finditer(r"(?<![A-Za-z0-9])[A-Z0-9]{1,5}(?![A-Za-z0-9])", text))
    if not runs:
        # Known names are covered first: what is left of Chinese text after a word that announces
        # writing is what should be written.
        covered = THING.sub(lambda match: "T" * len(match[0]), text)
        for known in (*CHINESE_COLORS.values(), *PLACES.values(), *SIDES.values(), *SIZES.values(),
                      *(phrase for _, phrase in LANDSCAPES.values()), "卡片"):
            covered = covered.replace(known, "#" * len(known))
        runs = list(re.finditer(rf"(?:(?<=[写着是的字和词了方面，, #])|^)([{HANZI}]{{1,3}})(?![{HANZI}T的])", covered))
    if not runs:
        return None, text
    run = max(runs, key=lambda match: len(match[0]))
    return text[run.start():run.end()], text[:run.start()] + MARK + text[run.end():]


def take_card(text):
    """Text -> (card or None, the text without it)."""
    found = CARD.search(text)
    if found:
        name = COLOR_WORDS[found[1] or found[2]]
        return (name if name in COLORS else None), text[:found.start()] + " " + text[found.end():]
    for name, words in LANDSCAPE_WORDS.items():
        found = re.search(f"{_PREPOSITION}(?:{words})", text)
        if found:
            return name, text[:found.start()] + " " + text[found.end():]
    return None, text


def find_place(text):
    """The word's place seen from the thing, "above", "below" or None."""
    found = re.search(f"({ABOVE})|({BELOW})", text)
    if not found:
        return None
    above = found[1] is not None
    # `a panda above the word X` and “X”下面是熊猫 tell the thing's place: the word's is the other.
    noun = r"(?:word|letter|number|character|text)"
    turned = re.search(rf"\b(?:above|over|below|under|underneath|beneath) (?:(?:the|a|an) )?"
                       rf"(?:(?:{_COLOR}) )?(?:{noun} )?{MARK}", text)
    turned = turned or re.search(rf"{MARK}的?(?:{ABOVE}|{BELOW})", text)
    return "above" if above != bool(turned) else "below"


def find_side(text):
    for side, words in (("left", r"\bleft\b|左"), ("right", r"\bright\b|右"),
                        ("center", r"\bmiddle\b|\bcent(?:er|re)\b|中间|中央|正中")):
        if re.search(words, text):
            return side
    return None


def find_size(text):
    """From the text with T in place of things."""
    if re.search(r"\b(?:small|little|tiny)\b|小小的|小号|很小|小的?T", text):
        return "small"
    if re.search(r"\b(?:big|large|huge|giant)\b|大大的|大号|很大|巨大|大的?T", text):
        return "big"
    return None


def parse(text):
    """What a caption asks for, {attribute: name}: only what it names. Unknown words are passed over."""
    text = re.sub("[“”„「」『』《》]", '"', text).replace("‘", "'").replace("’", "'")
    word, text = take_word(text)
    card, text = take_card(text.lower())
    things = [NAMES[found[1] or found[2]] for found in THING.finditer(text)]
    things = list(dict.fromkeys(things))[:2]
    if len(things) == 2 and re.search(r"(?:\bright\b|右).*(?:\bleft\b|左)", text):
        things.reverse()
    # `a red apple` says nothing about the ink.
    text = re.sub(rf"(?:{_COLOR})[ 的]?(?={THING.pattern})", " ", text)
    place = find_place(text)
    text = THING.sub("T", text)
    ink = re.search(rf"\b({_COLOR})\b|({_COLOR})", text)
    ink = COLOR_WORDS[ink[0]] if ink else None
    values = {"thing": things[0] if things else None, "second": things[1] if things[1:] else None,
              "card": card, "word": word, "ink": ink if ink in INKS else None, "place": place,
              "side": find_side(text) if len(things) == 1 else None, "size": find_size(text)}
    return {attribute: name for attribute, name in values.items() if name}


def language_of(prompt):
    """"en" for prompts with a lower-case Latin letter, else "zh"."""
    return "en" if re.search("[a-z]", prompt) else "zh"


# --- Tokens -------------------------------------------------------------------------------------

ENGLISH_PIECES = """
a an the and in on with at by under it them card word letter number character written
above below left right middle top bottom small big blue green sky sea hills night snow desert
""".split()
CHINESE_PIECES = ("卡片 卡片上 写着 一张 上面 下面 上方 下方 左边 右边 中间 小小的 大大的 有 在 是 的 和 字 "
                  "一只 一个 一辆 一艘 一把 一座 一朵 ， 。 “ ”").split()
TEMPLATE_PIECES = ["user\n", "assistant\n"]       # of the chat template
SPECIAL_PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary():
    """All pieces of captions that are one token each. Capitals, digits and single Hanzi among them."""
    pieces = [*TEMPLATE_PIECES, *CHARACTERS, *ENGLISH_PIECES, *THINGS, *COLORS, *INKS,
              *CHINESE_PIECES, *CHINESE_COLORS.values(),
              *(name for name, _ in THINGS.values()), *(phrase for _, phrase in LANDSCAPES.values())]
    return list(dict.fromkeys(pieces))


def build_tokenizer():
    """A tokenizers.Tokenizer: one token for each piece of the vocabulary, bytes for the rest.

    Spaces only separate. A capital letter before small ones is read as a small one, so `Panda` is
    `panda`; unknown words fall into letters: `love` becomes l, o, v, e.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = vocabulary()
    encoded = [to_bytes.pre_tokenize_str(piece)[0][0] for piece in pieces]
    tokens = list(dict.fromkeys([*SPECIAL_PIECES, *encoded, *alphabet]))
    ids = {token: number for number, token in enumerate(tokens)}
    # No merges: a piece that is in the vocabulary is one token, any other falls into its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    lower = [normalizers.Replace(Regex(rf"(?<=user\n){FIRST_ARTICLE[4:]}"), "a ")]
    lower += [normalizers.Replace(Regex(rf"{letter}(?=[a-z])"), letter.lower()) for letter in LETTERS]
    tokenizer.normalizer = normalizers.Sequence(lower)
    words = alternatives(piece for piece in pieces if len(piece) > 1 and not piece.isascii())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Split(Regex(rf"user\n|assistant\n|{words}|[a-z]+|[\s\S]"), "isolated"),
        to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_PIECES)
    return tokenizer


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


def crop_centre(scene, rng):
    """A point (row, column) to cut a training crop around: mostly a character, else a thing."""
    chance = rng.random()
    if scene.word and chance < 0.6:
        columns, _, height = layout(scene.word)
        column = scene.x + pick(rng, columns)
        return scene.y + int(rng.integers(-height // 3, height // 3 + 1)), column
    if chance < 0.9:
        pose = pick(rng, scene.poses)
        reach = pose.size // 3
        dy, dx = rng.integers(-reach, reach + 1, 2)
        return pose.y + int(dy), pose.x + int(dx)
    row, column = rng.integers(0, SIDE, 2)
    return int(row), int(column)


# --- Prompt lists -------------------------------------------------------------------------------


def prompt_list(count, seed, held_out=True, unseen_words=None, drop=1 / 3, world=WORLD):
    """`count` different captions, every other one Chinese.

    unseen_words: True, False, or None for both in turn, two prompts of each.
    """
    rng, prompts = np.random.default_rng(seed), {}
    while len(prompts) < count:
        unseen = len(prompts) // 2 % 2 == 1 if unseen_words is None else unseen_words
        scene = random_scene(rng, held_out, unseen, world)
        prompts[caption(scene, rng, ("en", "zh")[len(prompts) % 2], drop)] = None
    return list(prompts)


def main():
    path = os.path.join(HERE, "prompts_heldout.txt")
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.write("\n".join(prompt_list(1000, seed=2)) + "\n")
    os.replace(path + ".part", path)


if __name__ == "__main__":
    main()
