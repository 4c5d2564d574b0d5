"""Damages model files at random, and checks what loading makes of them.

    python -m tests.tools.fuzz_files [--cases 300] [--seed 0]

Good: one sentence (UserError), or a network that differs from the original in numbers only, because
only numbers were damaged. Bad: any other exception, a hang, or other numbers after damage to names,
shapes or places. The files are the tiny checkpoint as one safetensors file, in shards with an
index, an adapter, an int8 file, two GGUF files (if the gguf package is there), tokenizers and
configurations. Some cases draw a picture by sampler.py's command line.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import convert_weights
import formats
import sampler

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
TINY = DATA / "tiny"
SECONDS = 30                  # for one case; a hang is more


class Hang(BaseException):
    """A BaseException, so that no `except Exception` of the program hides it."""


def stop(*arguments):
    raise Hang


# --- Damages: (bytes, random generator) -> what was done, bytes, whether only numbers changed -----


def flip_header(data, random_):
    i = random_.randrange(min(header_size(data), len(data)))
    return f"bit of byte {i}", flip(data, i, random_), False


def flip_body(data, random_):
    i = random_.randrange(min(header_size(data), len(data) - 1), len(data))
    return f"bit of byte {i}", flip(data, i, random_), True


def flip(data, i, random_):
    return data[:i] + bytes([data[i] ^ (1 << random_.randrange(8))]) + data[i + 1:]


def header_size(data):
    if data[:4] == b"GGUF":
        return GGUF_HEADERS[len(data)]
    return 8 + struct.unpack("<Q", data[:8])[0]


GGUF_HEADERS = {}             # size of the file -> of its header


def truncate(data, random_):
    end = random_.choice([random_.randrange(len(data)), random_.randrange(200), len(data) - 1])
    return f"cut to {end} bytes", data[:end], False


def lengthen(data, random_):
    return "longer", data + random_.randbytes(random_.randrange(1, 100)), False


def zeros(data, random_):
    start = random_.randrange(len(data))
    count = random_.randrange(1, 4096)
    only_numbers = start >= header_size(data)
    return f"zeros from {start}", data[:start] + bytes(count) + data[start + count:], only_numbers


def length_of_header(data, random_):
    value = random_.choice([0, 1, 2 ** 63, 2 ** 64 - 1, len(data), len(data) - 8,
                            random_.randrange(2 ** 32)])
    return f"header of {value} bytes", struct.pack("<Q", value) + data[8:], False


def with_header(change):
    """A damage of a safetensors header, given as change(header, name of a tensor, generator)."""
    def damage(data, random_):
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + size])
        name = random_.choice([name for name in header if name != "__metadata__"])
        text = change(header, name, random_)
        text = (json.dumps(header) if text is None else text).encode()
        only_numbers = change is lie_about_dtype
        what = f"{change.__name__} {name}"
        return what, struct.pack("<Q", len(text)) + text + data[8 + size:], only_numbers
    damage.__name__ = change.__name__
    return damage


def move_tensor(header, name, random_):
    step = random_.choice([-2, 2, -10 ** 6, 10 ** 12, 1])
    header[name]["data_offsets"] = [n + step for n in header[name]["data_offsets"]]


def overlap(header, name, random_):
    header[name]["data_offsets"][0] = 0


def swap_ends(header, name, random_):
    header[name]["data_offsets"].reverse()


def strange_places(header, name, random_):
    header[name]["data_offsets"] = random_.choice(
        [[], [0], [0, 1, 2], "ab", None, [0.5, 2], [{}, []]])


def strange_shape(header, name, random_):
    header[name]["shape"] = random_.choice([[], [-1, 3], [0], [2 ** 62, 4], [1] * 100, "48", None,
                                            [True], [1.5], header[name]["shape"][::-1] + [1]])


def lie_about_dtype(header, name, random_):
    header[name]["dtype"] = random_.choice(["F16", "BF16", "F32", "I8", "U8", "F8_E4M3", "F4", "",
                                            7, None, "BOOL"])


def rename_tensor(header, name, random_):
    header[random_.choice(["", "x", name + "x", "model." + name, "a" * 5000])] = header.pop(name)


def drop_tensor(header, name, random_):
    del header[name]


def strange_entry(header, name, random_):
    header[name] = random_.choice([None, 7, [], "x", {}, {"dtype": "F32"}])


def strange_metadata(header, name, random_):
    header["__metadata__"] = random_.choice(
        [7, [], "x", {"format": 7}, {"_quantization_metadata": "{"}, {"z_image_dit": "[]"},
         {"z_image_settings": "{"}, {"lora_adapter_metadata": "[1]"},
         {"_quantization_metadata": '{"layers": {"layers.0.attention.qkv": {"format": "nvfp4"}}}'}])


def name_twice(header, name, random_):
    text = json.dumps(header)
    return text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"


def many_tensors(header, name, random_):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header.update({f"many.{i}": entry for i in range(20_000)})


def deep_json(header, name, random_):
    return "[" * 100_000


BYTES = [flip_header, flip_header, flip_body, truncate, lengthen, zeros]
HEADERS = [with_header(change) for change in (
    move_tensor, overlap, swap_ends, strange_places, strange_shape, lie_about_dtype, rename_tensor,
    drop_tensor, strange_entry, strange_metadata, name_twice, many_tensors, deep_json)]


# --- Damages of a GGUF header ---------------------------------------------------------------------


def with_gguf_header(change):
    """A damage of a GGUF header, given as change(list of tensors, list of pairs, generator).

    A tensor is [name, dims, type, offset]; a pair is (key, the bytes of its type and value). The
    tensors' bytes stay as they are.
    """
    def damage(data, random_):
        pairs, tensors, end = parse_gguf(data)
        change(tensors, pairs, random_)
        header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
        for key, value in pairs:
            header += gguf_text(key) + value
        for name, dims, number, offset in tensors:
            header += gguf_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            header += struct.pack("<IQ", number, offset)
        start = -(-end // 32) * 32
        header += bytes(-len(header) % 32)
        # The bytes of a tensor do not say whose they are: other types and places, other numbers.
        only_numbers = change in (gguf_type, gguf_swap)
        return change.__name__, header + data[start:], only_numbers
    damage.__name__ = change.__name__
    return damage


def gguf_text(text):
    text = text.encode()
    return struct.pack("<Q", len(text)) + text


def parse_gguf(data):
    """The pairs and tensors of a GGUF header, see with_gguf_header, and where it ends."""
    reader = formats.GGUFReader(data)
    _, tensors, values = reader.take("I"), reader.take("Q"), reader.take("Q")
    pairs, found = [], []
    for _ in range(values):
        key, start = reader.text(), reader.position
        reader.value(reader.take("I"))
        pairs.append((key, data[start:reader.position]))
    for _ in range(tensors):
        name = reader.text()
        dims = [reader.take("Q") for _ in range(reader.take("I"))]
        found.append([name, dims, reader.take("I"), reader.take("Q")])
    return pairs, found, reader.position


def gguf_moves_tensor(tensors, pairs, random_):
    random_.choice(tensors)[3] += random_.choice([1, 32, 10 ** 6, 2 ** 62])


def gguf_overlap(tensors, pairs, random_):
    one, other = random_.sample([tensor for tensor in tensors if tensor[1]], 2)
    one[3] = other[3]


def gguf_swap(tensors, pairs, random_):
    """Two tensors' places. Sizes that differ make gaps and overlaps."""
    one, other = random_.sample(tensors, 2)
    while one[1] == other[1]:
        one, other = random_.sample(tensors, 2)
    one[3], other[3] = other[3], one[3]


def gguf_type(tensors, pairs, random_):
    tensor = random_.choice(tensors)
    tensor[2] = random_.choice([n for n in (0, 1, 2, 8, 14, 16, 30, 39, 99, 2 ** 32 - 1)
                                if n != tensor[2]])


def gguf_dims(tensors, pairs, random_):
    tensor = random_.choice(tensors)
    tensor[1] = random_.choice([[], [0], [2 ** 63, 2], [1] * 20, tensor[1] + [2], tensor[1][::-1]])


def gguf_name_twice(tensors, pairs, random_):
    tensors.append(list(random_.choice(tensors)))


def gguf_renames(tensors, pairs, random_):
    random_.choice(tensors)[0] = random_.choice(["", "x", "a" * 5000, "model.x"])


def gguf_drops(tensors, pairs, random_):
    tensors.remove(random_.choice(tensors))


def gguf_pair(tensors, pairs, random_):
    """Keys that come twice, types that do not exist, lengths too large, strange alignments."""
    text, number, alignment = struct.pack("<IQ", 8, 2 ** 60), 4, "general.alignment"
    pairs.append(random_.choice([
        ("x", struct.pack("<I", 77)), ("x", text), ("x", struct.pack("<IIQ", 9, 4, 2 ** 60)),
        ("x", struct.pack("<IIQ", 9, 8, 2 ** 60)), ("x", struct.pack("<IIQ", 9, 9, 3)),
        (alignment, struct.pack("<II", number, 0)), (alignment, struct.pack("<If", 6, 0.5)),
        (alignment, struct.pack("<I", 8) + gguf_text("32")),
        ("general.architecture", struct.pack("<I", 8) + gguf_text("llama")),
        ("general.architecture", struct.pack("<II", number, 7))]))
    if random_.random() < 0.3:
        pairs.append(pairs[-1])


GGUF = [with_gguf_header(change) for change in (
    gguf_moves_tensor, gguf_overlap, gguf_swap, gguf_type, gguf_dims, gguf_name_twice,
    gguf_renames, gguf_drops, gguf_pair)]


# --- Damages of JSON files ------------------------------------------------------------------------


def json_values(data, random_):
    """Another value, or none, at a place somewhere in a JSON file."""
    tree = json.loads(data)
    node, key = tree, None
    while True:
        keys = list(node) if isinstance(node, dict) else [*range(len(node))]
        if not keys:
            break
        parent, key = node, random_.choice(keys)
        node = parent[key]
        if not isinstance(node, (dict, list)) or random_.random() < 0.3:
            break
    if key is not None and random_.random() < 0.2:
        del parent[key]
    elif key is not None:
        parent[key] = random_.choice([None, -1, 0, 7, 10 ** 400, 0.5, "", "x", [], {}, [[]], True,
                                      float("nan"), {"x": [1]}])
    return f"value at {key}", json.dumps(tree).encode(), True


def damage_text(data, random_):
    i = random_.randrange(len(data))
    return f"bit of byte {i}", flip(data, i, random_), True


def no_object(data, random_):
    return "no object", random_.choice([b"", b"[]", b"3", b"null", b"\xff", b"[" * 10 ** 5]), True


def cut_text(data, random_):
    return "cut", data[:random_.randrange(len(data))], True


TEXTS = [json_values, json_values, damage_text, cut_text, no_object]


# --- What is damaged, and how it is loaded --------------------------------------------------------


def load_dit(file):
    return convert_weights.load_dit(file, like=TINY / "transformer")


def load_with_adapter(file):
    return convert_weights.load_dit(TINY / "transformer", adapters=[(file, 1.0)])


def load_encoder(file):
    return convert_weights.load_text_encoder(file, like=TINY / "text_encoder")


def load_all(folder):
    """All networks of a checkpoint, as one module."""
    checkpoint = convert_weights.open_model(folder)
    return torch.nn.ModuleDict({kind: convert_weights.load(kind, network)
                                for kind, network in checkpoint.networks.items()})


def draw(folder):
    """A picture by the command line, in this process -> a module that holds it.

    UserError for exit code 2 and a sentence. Other ends are faults.
    """
    out = folder / "image.png"
    out.unlink(missing_ok=True)
    error, words = io.StringIO(), ["a cat", "--size", "32x32", "--steps", "1", "--upscale", "none"]
    argv = ["sampler.py", *words, "--model", str(folder), "--out", str(out)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(error), \
            contextlib.redirect_stdout(io.StringIO()):
        try:
            convert_weights.run_command(sampler.main)
        except SystemExit as end:
            lines = [line for line in error.getvalue().splitlines() if line.startswith("error: ")]
            assert end.code == 2 and len(lines) == 1, error.getvalue()
            raise convert_weights.UserError(lines[0]) from None
        finally:
            left = [path.name for path in folder.glob(".part-*")]
            assert not left, left
    module = torch.nn.Module()
    module.register_buffer("pixels", torch.from_numpy(np.array(Image.open(out))))
    return module


def make_files(folder):
    """The files to damage: (files, of which one at a time; function that loads one; damages)."""
    convert_weights.convert(TINY, folder / "comfy", to="comfy")
    shutil.copytree(TINY / "transformer", folder / "transformer")
    files, shards = DATA / "formats", folder / "transformer"
    lora = shutil.copy(files / "lora/kohya_split_alpha.safetensors", folder / "lora.safetensors")
    fp8 = shutil.copy(files / "comfy_quantized/dit_int8_convrot.safetensors", folder / "int8")
    dit = shutil.copy(files / "gguf/dit_q8_0_sdcpp.gguf", folder / "dit.gguf")
    encoder = shutil.copy(files / "gguf/text_encoder_q8_0_llamacpp.gguf", folder / "te.gguf")
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    whole = [*BYTES, length_of_header, *HEADERS]
    texts = shutil.copytree(TINY, folder / "texts")
    drawn = shutil.copytree(TINY, folder / "drawn")
    jsons = [texts / name for name in (
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "model_index.json",
        "transformer/config.json", "text_encoder/config.json", "vae/config.json",
        "scheduler/scheduler_config.json")]
    found = [
        ([folder / "comfy/z_image.safetensors"], load_dit, whole),
        ([shards / "diffusion_pytorch_model-00002-of-00005.safetensors"],
         lambda file: load_dit(file.parent), whole),
        ([index], lambda file: load_dit(file.parent), INDICES),
        ([lora], load_with_adapter, whole),
        ([fp8], load_dit, whole),
        (jsons, lambda file: load_all(texts), TEXTS),
        ([drawn / "vae/diffusion_pytorch_model.safetensors"], lambda file: draw(drawn), whole),
        ([drawn / "tokenizer/tokenizer.json", drawn / "transformer/config.json"],
         lambda file: draw(drawn), TEXTS),
    ]
    if importlib.util.find_spec("gguf"):
        found += [([dit], load_dit, [*BYTES, *GGUF]), ([encoder], load_encoder, [*BYTES, *GGUF])]
    return found


def index_of_many(data, random_):
    entries = {f"tensor.{i}": f"shard-{i % 1000}.safetensors" for i in range(100_000)}
    return "100,000 entries", json.dumps({"weight_map": entries}).encode(), False


def index_to_elsewhere(data, random_):
    place = random_.choice(["../x.safetensors", "/etc/passwd", "loop.safetensors", "", 7, None])
    weights = json.loads(data)
    weights["weight_map"][random_.choice(list(weights["weight_map"]))] = place
    return f"shard {place}", json.dumps(weights).encode(), False


def damage_index(data, random_):
    i = random_.randrange(len(data))
    return f"bit of byte {i}", flip(data, i, random_), False


INDICES = [index_of_many, index_to_elsewhere, damage_index, truncate]


def outcome(file, load, expected, only_numbers):
    """"error" or "loaded", or a sentence about what went wrong."""
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = load(file).state_dict()
    except convert_weights.UserError as error:
        is_sentence = len(str(error)) < 3000 and "\n" not in str(error)[:-1]
        return "error" if is_sentence else f"too long a sentence: {str(error)[:300]}"
    except Hang:
        return "it hangs"
    except KeyboardInterrupt:
        raise
    except BaseException as error:            # a panic of the tokenizers package is no Exception
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    same = state.keys() == expected.keys() and all(
        torch.equal(tensor, expected[name]) for name, tensor in state.items())
    return "loaded" if same or only_numbers else "silently other numbers"


def run(cases, seed, say=print):
    """Runs `cases` damages -> (how many ended in an error, how many loaded, list of faults)."""
    counts, faults = {"error": 0, "loaded": 0}, []
    with tempfile.TemporaryDirectory() as scratch:
        files = make_files(Path(scratch))
        (Path(scratch) / "transformer/loop.safetensors").symlink_to("loop.safetensors")
        expected = {}
        for i in range(cases):
            random_ = random.Random(f"{seed} {i}")
            places, load, damages = files[i % len(files)]
            file = Path(random_.choice(places))
            if i < len(files):
                if file.suffix == ".gguf":
                    tensors = formats.read_header(file)[0].values()
                    start = min(stored.start for stored in tensors)
                    GGUF_HEADERS[file.stat().st_size] = start
                expected[i] = load(file).state_dict()
            data = file.read_bytes()
            damage = random_.choice(damages)
            what, damaged, only_numbers = damage(data, random_)
            replace(file, damaged)
            result = outcome(file, load, expected[i % len(files)], only_numbers)
            replace(file, data)
            if result in counts:
                counts[result] += 1
            else:
                faults.append(f"case {i}: {file.name}, {what}: {result}")
                say(faults[-1])
    return counts["error"], counts["loaded"], faults


def replace(file, data):
    """A new file in the place of the old one: networks may be mapped to that."""
    file.unlink()
    file.write_bytes(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    errors, loaded, faults = run(args.cases, args.seed)
    print(f"{args.cases} cases: {errors} refused, {loaded} loaded, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
