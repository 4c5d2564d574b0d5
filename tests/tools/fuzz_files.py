"""Damages model files at random, and checks what loading makes of them.

    python tests/tools/fuzz_files.py [--cases 300] [--seed 0]

Good: one sentence (UserError), or a network that differs from the original in numbers only, because
only numbers were damaged. Bad: any other exception, a hang, or other numbers after damage to names,
shapes or places. The files are the tiny checkpoint as one safetensors file, in shards with an
index, an adapter, and two GGUF files.
"""

import argparse
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

import convert_weights  # noqa: E402
import formats  # noqa: E402

DATA = ROOT / "tests" / "data"
TINY = DATA / "tiny"
SECONDS = 30                  # for one case; a hang is more


class Hang(Exception):
    pass


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


# --- What is damaged, and how it is loaded --------------------------------------------------------


def load_dit(file):
    return convert_weights.load_dit(file, like=TINY / "transformer")


def load_with_adapter(file):
    return convert_weights.load_dit(TINY / "transformer", adapters=[(file, 1.0)])


def load_encoder(file):
    return convert_weights.load_text_encoder(file, like=TINY / "text_encoder")


def make_files(folder):
    """The files to damage: (file, function that loads it, damages)."""
    convert_weights.convert(TINY, folder / "comfy", to="comfy")
    shutil.copytree(TINY / "transformer", folder / "transformer")
    files, shards = DATA / "formats", folder / "transformer"
    lora = shutil.copy(files / "lora/kohya_split_alpha.safetensors", folder / "lora.safetensors")
    fp8 = shutil.copy(files / "comfy_quantized/dit_int8_convrot.safetensors", folder / "int8")
    dit = shutil.copy(files / "gguf/dit_q8_0_sdcpp.gguf", folder / "dit.gguf")
    encoder = shutil.copy(files / "gguf/text_encoder_q8_0_llamacpp.gguf", folder / "te.gguf")
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    whole = [*BYTES, length_of_header, *HEADERS]
    return [
        (folder / "comfy/z_image.safetensors", load_dit, whole),
        (shards / "diffusion_pytorch_model-00002-of-00005.safetensors",
         lambda file: load_dit(file.parent), whole),
        (index, lambda file: load_dit(file.parent), INDICES),
        (lora, load_with_adapter, whole),
        (fp8, load_dit, whole),
        (dit, load_dit, BYTES),
        (encoder, load_encoder, BYTES),
    ]


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
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    same = all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
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
            file, load, damages = files[i % len(files)]
            file = Path(file)
            if file not in expected:
                if file.suffix == ".gguf":
                    tensors = formats.read_header(file)[0].values()
                    start = min(stored.start for stored in tensors)
                    GGUF_HEADERS[file.stat().st_size] = start
                expected[file] = load(file).state_dict()
            data = file.read_bytes()
            damage = damages[(i // len(files)) % len(damages)]
            what, damaged, only_numbers = damage(data, random_)
            replace(file, damaged)
            result = outcome(file, load, expected[file], only_numbers)
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
