"""The cards world in numbers and names: what there is, how much of it varies, and where it lies."""

from dataclasses import dataclass, replace

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
    jitter: float = 1.0            # how far things and words wander: factor of JITTER
    wordless: float = 0.15         # share of pictures without a word; held-out ones have words


# Worlds of growing difficulty. train.py --ladder 2 learns upright(LADDER[2]): a low step shows
# soon whether a model learns at all. Step 1 has no words, and so nothing that can be held out.
LADDER = {
    1: World(letters=0, hanzi=0, landscapes=0, two_things=0, sides=False, sizes=False, tilts=False,
             fonts=False),
    2: World(letters=1, hanzi=1, digits=False, landscapes=0, two_things=0, sizes=False),
    3: World(letters=3, hanzi=2, digits=False, landscapes=0, two_things=0),
    4: World(two_things=0),
    5: World()}


def upright(world):
    """The same world with upright things of one size; things and words wander half as far.

    In the whole of step 5 a teacher wrote words correctly after minutes on a GPU, but its things
    stayed blurred (results.md, part 3).
    """
    return replace(world, sizes=False, tilts=False, jitter=0.5)


WORLD = upright(LADDER[5])         # of the bundled models
STEPS_WITH_WORDS = tuple(LADDER)[1:]

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
    ("sky", "above"): ("white", "yellow", "black", "red"),
    ("sky", "below"): ("black", "red", "blue"),
    ("sea", "above"): ("black", "red", "blue", "green"), ("sea", "below"): ("white", "yellow"),
    ("hills", "above"): ("black", "red", "blue"), ("hills", "below"): ("white", "yellow", "black"),
    ("night", "above"): ("white", "yellow"), ("night", "below"): ("white", "yellow"),
    ("snow", "above"): ("black", "red", "blue", "green"),
    ("snow", "below"): ("black", "red", "blue", "green"),
    ("desert", "above"): ("white", "black", "blue"),
    ("desert", "below"): ("white", "black", "blue")}

# Places, in pixels. The word fills one end of the card, the things the other.
WORD_ROW = {"above": 29, "below": 99}
THING_ROW = {"above": 92, "below": 36}          # by the place of the *word*
SIDE_COLUMN = {"left": 38, "center": 64, "right": 90}
PAIR_COLUMNS = (33, 95)
PIXELS = {"small": 44, "big": 58}               # of the thing's longer side
# How far each wanders from its place: columns and rows, both ways.
JITTER = {"word": (7, 2), "thing": (5, 2), "small": (6, 5), "pair": (2, 2)}
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
福 爱 好 笑 山 水 春 夏 秋 冬 梦 美 茶 喜 吉 龙 马 牛 羊 鱼 花 月 星 云 雨 雪 风 火 木 心 家 人
你好 快乐 新年 平安 加油 发财 大吉 山水 春天 秋天 冬天 爱心 生日 早安 晚安 大家 美好 花草 星星
天地 中国 东西 南北 大鱼 好梦 好茶 美梦 春雨 雪花 风雨 火星 木马 牛年 龙年 马年 家人 心爱 你我
大山 小雨 喜乐 新年好 中国年 好心人 大好人 大笑""".split()
UNSEEN_HANZI_WORDS = """
夏天 水火 早春 人生 安心 茶花 梦中 山花 日月 天天 喜爱 年年 好运 北风 星云 小龙 大雪 快马
美人 风水 喜福年 中国人 春秋冬 日月星 好天地 小心火""".split()


def inks(card, place):
    """Inks in which a word above or below can be read on this card."""
    return CARD_INKS[card] if card in COLORS else CARD_INKS[card, place]


def pick(rng, names):
    """One of a sequence, each equally likely."""
    return names[int(rng.integers(len(names)))]
