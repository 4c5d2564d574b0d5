"""Sentences about the scenes of the cards world, in English and Chinese.

    caption(scene, rng)    writes one, leaving some of it out
    parse(text)            what a sentence names, also one that a user wrote
    build_tokenizer()      the tokens that the model reads
"""

import re

from world import (
    ATTRIBUTES,
    CHARACTERS,
    CHINESE_COLORS,
    COLORS,
    DIGITS,
    HANZI,
    HANZI_BOX,
    INKS,
    LANDSCAPES,
    LATIN_BOX,
    LETTERS,
    PLACES,
    SIDES,
    SIZES,
    THINGS,
    pick,
)

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
        text, opening, end = reworded(english(names, rng), rng), pick(rng, ENGLISH_OPENINGS), "."
    else:
        text, opening, end = reworded(chinese(names, rng), rng), pick(rng, CHINESE_OPENINGS), "。"
    if rng.random() < 0.06 and len(names) < 5 and text.startswith(("a ", "an ", "一")):
        text = opening + text
    return text + (end if rng.random() < 0.06 else "")


# Synonyms, used now and then: users do not know the words of THINGS and COLORS.
SYNONYMS = {
    "big": ("large", "huge"), "small": ("little", "tiny"), "below": ("under", "beneath"),
    "above": ("over", "on top of"), "card": ("background",),
    "with the word": ("that says", "saying", "with the text"),
    "in the middle": ("in the center",), "by the sea": ("at the beach", "by the ocean"),
    "at night": ("in the night sky", "under the stars"),
    "under a blue sky": ("in the sky", "in the blue sky"), "in the snow": ("in winter",),
    "in green hills": ("in the mountains", "in the hills"),
    "rabbit": ("bunny",), "cat": ("kitten",), "dog": ("puppy",), "hamburger": ("burger",),
    "sailboat": ("boat",), "gift": ("present",), "rocket": ("spaceship",), "dinosaur": ("dino",),
    "写着": ("写有", "写", "说"), "卡片": ("背景",),
    "上面": ("上方", "上边"), "下面": ("下方", "下边"),
    "小小的": ("很小的",), "大大的": ("很大的", "巨大的"), "中间": ("中央",), "左边": ("左侧",),
    "右边": ("右侧",), "海边": ("海滩上", "大海前"), "夜空下": ("夜晚", "星空下"),
    "雪地里": ("雪地上",), "蓝天下": ("天空下",), "青山前": ("山坡上",), "沙漠里": ("沙漠中",),
    "猫咪": ("猫", "小猫"), "小狗": ("狗",), "小猪": ("猪",), "兔子": ("小兔",), "汽车": ("车",),
    "帆船": ("船", "小船"), "雨伞": ("伞",), "汉堡": ("汉堡包",)}
ENGLISH_OPENINGS = ("a picture of ", "draw ", "a photo of ")
CHINESE_OPENINGS = ("画", "请画")


def alternatives(words):
    """A regular expression for any of the words, the longest that fits."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


SYNONYM = re.compile(rf"\b(?:{alternatives(w for w in SYNONYMS if w.isascii())})\b|"
                     rf"(?:{alternatives(w for w in SYNONYMS if not w.isascii())})")


def reworded(text, rng):
    """The text with one word in eight that has synonyms replaced by one of them."""
    return SYNONYM.sub(lambda found: pick(rng, SYNONYMS[found[0]]) if rng.random() < 1 / 8
                       else found[0], text)


def article(words):
    vowel = words[0] in "aeiou" and not words.startswith("uni")      # a unicorn
    return ("an " if vowel else "a ") + words


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
        noun = "character"
        if word in LETTERS or word in DIGITS:
            noun = "letter" if word in LETTERS else "number"
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
        # 红色卡片上一只熊猫: people also leave out 有.
        thing = here + ("" if here and kind == 1 and rng.random() < 0.2 else "有") + thing
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
# Users write their own sentences, so this takes more than the captions above.

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


_LATIN_NAMES = alternatives(name for name in NAMES if name.isascii())
_CHINESE_NAMES = alternatives(name for name in NAMES if not name.isascii())
THING = re.compile(rf"\b({_LATIN_NAMES})(?:e?s)?\b|({_CHINESE_NAMES})")
COLOR_WORDS = {name: name for name in CHINESE_COLORS} | {
    word: name for name, long in CHINESE_COLORS.items() for word in (long, long[0])}
COLOR_WORDS |= {"粉红色": "pink", "粉红": "pink"}
# English names only as whole words: there is a red in colored, covered and tired.
_LATIN_COLORS = alternatives(name for name in COLOR_WORDS if name.isascii())
_CHINESE_COLORS = alternatives(name for name in COLOR_WORDS if not name.isascii())
_COLOR = rf"(?:(?<![a-z])(?:{_LATIN_COLORS})(?![a-z])|{_CHINESE_COLORS})"
CARD = re.compile(rf"(?:\bon )?(?:\b(?:a|an|the) )?({_COLOR})(?:[ -]colou?red)?"
                  r"(?: paper| post| greeting)? "
                  rf"(?:card|background|paper)s?\b|({_COLOR})的?(?:贺|纸|明信)?(?:卡片|卡|背景|底|纸)(?:上面?)?")
_PREPOSITION = r"(?:\b(?:in front of|under|in|at|by|on|near|over) )?(?:\b(?:a|an|the) )?"
LANDSCAPE_WORDS = {                # in this order: a night sky is no blue sky
    "night": r"\b(?:night sky|night|starry sky|stars)\b|夜空下?|夜晚|夜里|晚上|星空下?",
    "snow": r"\b(?:snow|snowy \w+|winter)\b|雪地[里上]?|雪中|雪景",
    "sea": r"\b(?:sea|seaside|ocean|beach|shore)\b|海边|海滩上?|大海[前边]?|(?<!上)海",
    "desert": r"\b(?:sand )?(?:desert|dunes)\b|沙漠[里中]?",
    "hills": r"\b(?:green )?(?:hills?|mountains?|meadow)\b|青山前?|山坡上?|山前|群山",
    "sky": r"\b(?:blue )?(?:sky|clouds)\b|蓝天下?|天空下?|天上"}
ABOVE = r"\babove\b|\bover\b|\bat the top\b|\bon top(?: of)?\b|上面|上方|上边|顶部|之上"
BELOW = r"\bbelow\b|\bunder\b|\bunderneath\b|\bbeneath\b|\bat the bottom\b|下面|下方|下边|底部|之下"
MARK = "§"                         # stands for the word, once that has been taken out


# Chinese phrases that are no words to write: those of captions, and others like them.
KNOWN = re.compile(alternatives((
    *CHINESE_COLORS.values(), *PLACES.values(), *SIDES.values(), *SIZES.values(), "卡片", "正中",
    *(phrase for _, phrase in LANDSCAPES.values()), "星空", "大海", "大号", "小号", "雪景", "雪中",
    *(word for key, words in SYNONYMS.items() for word in words if key != "写着"
      and not word.isascii()))))
# The article of `A panda ...` is no word; the letter of `A in red above a panda` is one.
FIRST_ARTICLE = r"^\s*A (?=[A-Z]?[a-z])(?!(?:in|and|above|below|at|on|under|by)\b)"


def spellable(word):
    boxes = LATIN_BOX if word.isascii() else HANZI_BOX
    return len(word) in boxes and all(character in CHARACTERS for character in word)


def cover(pattern, text, letter):
    """The text with a letter in place of each character that the pattern matches."""
    return pattern.sub(lambda match: letter * len(match[0]), text)


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
        covered = cover(KNOWN, cover(THING, text, "T"), "#")
        announced = rf"(?:(?<=[写着说有是的字和词了方面，, #])|^)([{HANZI}]{{1,3}})(?![{HANZI}T的])"
        runs = list(re.finditer(announced, covered))
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
    covered = cover(THING, text, "T")                     # 海龟 is a turtle, and no sea
    for name, words in LANDSCAPE_WORDS.items():
        found = re.search(f"{_PREPOSITION}(?:{words})", covered)
        if found:
            return name, text[:found.start()] + " " + text[found.end():]
    return None, text


def find_place(text):
    """The word's place seen from the thing, "above", "below" or None."""
    found = re.search(f"({ABOVE})|({BELOW})", text)
    if not found:
        return None
    above = found[1] is not None
    # `a panda above the word X` and “X”下面是熊猫 tell where the thing is.
    noun = r"(?:word|letter|number|character|text)"
    turned = re.search(r"\b(?:above|over|on top of|below|under|underneath|beneath) (?:(?:the|a) )?"
                       rf"(?:{_COLOR} )?(?:{noun} )?{MARK}", text)
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
    """What a caption asks for, {attribute: name}: only what it names.

    Words that are not known are passed over.
    """
    text = re.sub("[“”„「」『』《》]", '"', text).replace("‘", "'").replace("’", "'")
    word, text = take_word(text)
    card, text = take_card(text.lower())
    things = [NAMES[found[1] or found[2]] for found in THING.finditer(text)]
    things = list(dict.fromkeys(things))[:2]
    if len(things) == 2 and re.search(r"(?:\bright\b|右).*(?:\bleft\b|左)", text):
        things.reverse()
    # `a red apple` says nothing about the ink.
    text = re.sub(rf"{_COLOR}[ 的]?(?={THING.pattern})", " ", text)
    place = find_place(text)
    text = THING.sub("T", text)
    ink = re.search(_COLOR, text)
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
CHINESE_PIECES = """
卡片 卡片上 背景上 写着 一张 上面 下面 上方 下方 左边 右边 中间 小小的 大大的 有 在 是 的 和 字
一只 一个 一辆 一艘 一把 一座 一朵 ， 。 “ ”
""".split()
TEMPLATE_PIECES = ["user\n", "assistant\n"]       # of the chat template
SPECIAL_PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary():
    """All pieces of captions that are one token each.

    Every capital, every digit and every Chinese character that words are made of is among them.
    """
    others = [word for words in SYNONYMS.values() for phrase in words for word in phrase.split()]
    openings = " ".join((*ENGLISH_OPENINGS, *CHINESE_OPENINGS)).split()
    pieces = [*TEMPLATE_PIECES, *CHARACTERS, *ENGLISH_PIECES, *THINGS, *COLORS, *INKS,
              *CHINESE_PIECES, *CHINESE_COLORS.values(),
              *(name for name, _ in THINGS.values()),
              *(phrase for _, phrase in LANDSCAPES.values()), *others, *openings]
    return list(dict.fromkeys(pieces))


def build_tokenizer():
    """A tokenizers.Tokenizer: one token for each piece of the vocabulary, bytes for the rest.

    Spaces only separate. A capital letter before small ones is read as a small one: `Panda` is
    `panda`. Letters in quotation marks are read as capitals: `"love"` is `"LOVE"`. Unknown words
    fall into letters.
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
    rules = [(f"{letter}(?=[a-z])", letter.lower()) for letter in LETTERS]
    rules.append((FIRST_ARTICLE.replace(r"^\s*", r"(?<=user\n)"), "a "))
    # The rest of the text holds one quotation mark, or three: the letter stands inside of two.
    inside = r'(?=[A-Za-z ]*(?:”|"[^"]*(?:"[^"]*"[^"]*)*$))'
    rules += [(letter.lower() + inside, letter) for letter in LETTERS]
    rules = [normalizers.Replace(Regex(pattern), text) for pattern, text in rules]
    tokenizer.normalizer = normalizers.Sequence(rules)
    words = alternatives(piece for piece in pieces if len(piece) > 1 and not piece.isascii())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Split(Regex(rf"user\n|assistant\n|{words}|[a-z]+|[\s\S]"), "isolated"),
        to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_PIECES)
    return tokenizer
