"""Makes things.png and glyphs.png, the two sheets that painting.py draws with.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    apt-get download fonts-noto-cjk && dpkg -x fonts-noto-cjk_*.deb noto
    python tutorials/cards/make_sheets.py --sprites package/assets \\
        --fonts noto/usr/share/fonts/opentype/noto

The sheets are committed: nobody needs this script in order to draw. Sources and licenses stand in
NOTICE.txt.
"""

import os
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE))]

import world  # noqa: E402
from convert_weights import Parser, run_command  # noqa: E402
from files import write_whole  # noqa: E402

CODES = {                                  # Unicode code points: the names of the package's files
    "panda": "1f43c", "rabbit": "1f430", "cat": "1f431", "dog": "1f436", "fox": "1f98a",
    "frog": "1f438", "tiger": "1f42f", "pig": "1f437", "koala": "1f428", "penguin": "1f427",
    "owl": "1f989", "octopus": "1f419", "turtle": "1f422", "whale": "1f433", "unicorn": "1f984",
    "bee": "1f41d", "butterfly": "1f98b", "dinosaur": "1f996", "apple": "1f34e", "banana": "1f34c",
    "strawberry": "1f353", "watermelon": "1f349", "hamburger": "1f354", "pizza": "1f355",
    "cake": "1f382", "donut": "1f369", "mushroom": "1f344", "car": "1f697", "rocket": "1f680",
    "guitar": "1f3b8", "balloon": "1f388", "crown": "1f451", "gift": "1f381", "robot": "1f916",
    "sunflower": "1f33b", "lantern": "1f3ee", "umbrella": "2602-fe0f", "house": "1f3e0",
    "sailboat": "26f5", "cactus": "1f335"}
FONTS = {"sans": "NotoSansCJK-Bold.ttc", "serif": "NotoSerifCJK-Bold.ttc"}
SIMPLIFIED = 2                             # the face of a .ttc that draws Simplified Chinese
LEVELS = 16                                # gray levels of a glyph's edge: enough once it is scaled


def thing(path):
    """One sprite, trimmed to what is visible, centered in a square of world.SPRITE pixels, RGBA."""
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Colors are multiplied by alpha before scaling: otherwise dark fringes appear.
    pixels = np.asarray(square, np.float32)
    alpha = pixels[..., 3:] / 255
    planes = np.concatenate((pixels[..., :3] * alpha, pixels[..., 3:]), -1)
    size = (world.SPRITE, world.SPRITE)
    planes = [Image.fromarray(plane) for plane in np.moveaxis(planes, -1, 0)]
    # Filters that overshoot would leave bright dashes along the edges.
    small = np.stack([plane.resize(size, Image.HAMMING) for plane in planes], -1)
    small[..., :3] /= np.maximum(small[..., 3:] / 255, 1 / 255)
    small[small[..., 3] < 6] = 0
    return Image.fromarray(small.clip(0, 255).round().astype(np.uint8))


def shape(character, font):
    """Mask of one character, cut to what is black."""
    mask = Image.new("L", (1000, 1000))
    ImageDraw.Draw(mask).text((500, 500), character, 255, font=font, anchor="mm")
    return mask.crop(mask.getbbox())


def latin(character, font):
    """A capital or digit -> mask, all of one height, however wide or deep the font draws it."""
    tile = shape(character, font)
    height = world.CAP
    if tile.height > 1.06 * shape("H", font).height:           # a tail, as of Q
        height = round(1.1 * world.CAP)
    width = min(round(tile.width * height / tile.height), world.GLYPH - 2)
    cell = Image.new("L", (world.GLYPH, world.GLYPH))
    place = ((world.GLYPH - width) // 2, (world.GLYPH - world.CAP) // 2)
    cell.paste(tile.resize((width, height), Image.LANCZOS), place)
    return cell


def hanzi(character, font):
    """A Chinese character -> mask in the middle of its cell, at the font's own scale."""
    tile = shape(character, font)
    scale = (world.GLYPH - 2) / max(HANZI_FACE, tile.width, tile.height)
    size = (round(tile.width * scale), round(tile.height * scale))
    cell = Image.new("L", (world.GLYPH, world.GLYPH))
    place = ((world.GLYPH - size[0]) // 2, (world.GLYPH - size[1]) // 2)
    cell.paste(tile.resize(size, Image.LANCZOS), place)
    return cell


def glyph(character, font):
    """Mask of one character in a cell of world.GLYPH pixels, with LEVELS levels of gray."""
    cell = latin(character, font) if character.isascii() else hanzi(character, font)
    return cell.point(lambda value: round(value / 255 * (LEVELS - 1)) * 255 // (LEVELS - 1))


POINTS = 400                               # glyphs are drawn large, then scaled down
HANZI_FACE = 0.90 * POINTS                 # height of a full Chinese character


def sheet(tiles, columns, mode):
    """Equal square tiles -> one picture, row by row."""
    side = tiles[0].width
    picture = Image.new(mode, (columns * side, -(-len(tiles) // columns) * side))
    for i, tile in enumerate(tiles):
        picture.paste(tile, (i % columns * side, i // columns * side))
    return picture


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--sprites", required=True, metavar="DIR", help="the package's assets/")
    parser.add_argument("--fonts", required=True, metavar="DIR", help="folder of the two fonts")
    args = parser.parse_args()
    things = [thing(os.path.join(args.sprites, CODES[name] + ".webp")) for name in world.THINGS]
    glyphs = []
    for name in world.FONTS:
        font = ImageFont.truetype(os.path.join(args.fonts, FONTS[name]), POINTS, index=SIMPLIFIED)
        glyphs += [glyph(character, font) for character in world.CHARACTERS]
    sheets = {"things.png": sheet(things, world.SHEET_COLUMNS, "RGBA"),
              "glyphs.png": sheet(glyphs, world.SHEET_COLUMNS, "L").quantize(LEVELS)}
    for name, picture in sheets.items():
        write_whole(os.path.join(HERE, name), lambda part, picture=picture: picture.save(
            part, format="PNG", optimize=True))


if __name__ == "__main__":
    run_command(main)
