"""sampler.py as people use it: the pictures it leaves, one clear sentence for what goes wrong."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import convert_weights
import files
import hardware
import sampler
from conftest import ROOT, TINY, Failing, Recorder, refused, run, run_here
from convert_weights import UserError
from model import Attention

SMALL = ("--model", TINY, "--size", "48x32", "--steps", 2)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw(*arguments):
    """Runs sampler.py in this process; it must succeed."""
    result = run_here(sampler.main, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def same_pixels(a, b):
    return Image.open(a).size == Image.open(b).size and np.array_equal(pixels(a), pixels(b))


@pytest.fixture
def own(tmp_path, pipeline):
    """A small model that recommends its settings."""
    path = tmp_path / "own"
    convert_weights.save_pipeline(
        path, pipeline.dit, pipeline.text_encoder, pipeline.vae, pipeline.tokenizer, 2.5,
        steps=3, guidance=1.5, size=64)
    return path


# --- Pictures -------------------------------------------------------------------------------------


def test_pictures_and_names(tmp_path, pipeline):
    (tmp_path / "prompts.txt").write_text("造相 ⚡️\n\n  a dog \n", encoding="utf-8")
    options = dict(steps=2, guidance=1.5, negative_prompt="blurry", cfg_normalization=0.5,
                   cfg_truncation=0.7)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    result = run("sampler.py", "a cat", "--prompts", "prompts.txt", "--num-images", 2, "--seed", 5,
                 "--batch-size", 4, *SMALL, *words, "--upscale", "none", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names = ["image.png"] + [f"image-{i}.png" for i in range(1, 6)]
    assert [line.split()[0] for line in result.stdout.splitlines()] == names
    assert all(line.endswith(" s)") for line in result.stdout.splitlines())
    assert {f.name for f in tmp_path.iterdir()} == {"prompts.txt", *names}
    prompts = ["a cat", "a cat", "造相 ⚡️", "造相 ⚡️", "a dog", "a dog"]
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        text = Image.open(name).text
        assert (text["prompt"], text["seed"]) == (prompt, str(5 + i))
        assert {key: text[key] for key in options} == {k: str(v) for k, v in options.items()}
        alone = sampler.generate(pipeline, prompt, 32, 48, seed=5 + i, **options)[0]
        assert np.abs(pixels(name) - np.asarray(alone)).max() <= 1   # up to rounding


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"mine")
    draw("a cat", *SMALL, "--out", "cat.png")
    assert (tmp_path / "cat.png").read_bytes() == b"mine"
    assert (tmp_path / "cat-1.png").exists()


def test_the_default_name_is_checked_before_drawing(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert refused(run_here(sampler.main, "a cat", *SMALL), "--out", "written to")


@pytest.mark.parametrize("words, size", [
    ([], (256, 256)), (["--upscale", "none"], (64, 64)), (["--size", "48x32"], (48, 32)),
    (["--width", 32], (32, 64)), (["--size", "48x32", "--upscale", "nearest"], (384, 256))])
def test_small_pictures_are_enlarged(own, words, size):
    """Unless their size was asked for; --like does what was done."""
    draw("a cat", "--model", own, *words)
    draw("--like", "image.png", "--model", own)
    assert Image.open("image.png").size == size
    assert same_pixels("image.png", "image-1.png")


class NoLinks:
    """A file system without hard links."""

    def __call__(self, *arguments):
        raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("has_links", [True, False])
def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch, has_links):
    """The names of pictures are taken when these are whole, so a kill leaves none of 0 bytes."""
    if not has_links:
        monkeypatch.setattr(os, "link", NoLinks())
    image = Image.new("RGB", (8, 8))
    (tmp_path / files.new_name()).write_bytes(b"half")
    save = Image.Image.save

    def stop(self, part, **options):
        save(self, part, **options)
        assert [*tmp_path.iterdir()] == [part]                   # the dead one's is gone
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", stop)
        sampler.save_png(image, tmp_path / "a.png", {})
    assert not [*tmp_path.iterdir()]
    for name in ("a.png", "a-1.png", "a-2.png"):
        assert sampler.save_png(image, tmp_path / "a.png", {"seed": 1}) == tmp_path / name
        assert Image.open(tmp_path / name).text == {"seed": "1"}
    assert sampler.save_png(image, tmp_path / "a.png", {}, 7) == tmp_path / "a-7.png"
    assert len([*tmp_path.iterdir()]) == 4


def test_a_picture_that_cannot_be_renamed_leaves_no_empty_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", NoLinks())
    monkeypatch.setattr(os, "replace", Failing(OSError(5, "Input/output error")))
    with pytest.raises(UserError, match="Input/output"):
        sampler.save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {})
    assert not [*tmp_path.iterdir()]


FULL = """
import sys
sys.path.insert(0, {root!r})
import convert_weights
def main():
    print("much" * 5000)
    raise {error}
convert_weights.run_command(main)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("stream, error, code, sentence", [
    ("stdout", "SystemExit(0)", 2, "error: No space left on device\n"),
    ("stderr", "convert_weights.UserError('no')", 2, None),
    ("stderr", "KeyboardInterrupt", 130, None)])
def test_output_that_cannot_be_written_is_one_error(stream, error, code, sentence):
    """And not what Python says of it at its end, with exit code 120."""
    # Without a buffer Python writes at once: most users have one.
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    source = FULL.format(root=str(ROOT), error=error)
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | {stream: full}
        command = [sys.executable, "-c", source]
        ended = subprocess.run(command, env=environment, text=True, **streams)
    assert ended.returncode == code
    assert sentence is None or ended.stderr == sentence


@pytest.mark.parametrize("error, sentence", [
    (OSError(28, "No space left on device"), "error: No space left on device\n"),
    (OSError(28, "No space left on device", "a.txt"), "error: a.txt: No space left on device\n"),
    (OSError("strange"), "error: strange\n")])
def test_an_error_of_the_system_names_what_it_knows(error, sentence):
    result = run_here(Failing(error))
    assert refused(result) and result.stderr == sentence


def test_the_checkpoint_recommends(own):
    """Steps, guidance, shift and size come from the model where the command line is silent."""
    draw("a cat", "--model", own)
    text = Image.open("image.png").text
    expected = {"steps": "3", "guidance": "1.5", "shift": "2.5", "size": "64x64", "model": "own"}
    assert {key: text[key] for key in expected} == expected
    draw("a cat", "--model", own, "--guidance", 0, "--steps", 1)
    text = Image.open("image-1.png").text
    assert (text["guidance"], text["steps"]) == ("0.0", "1")


def test_progress_of_many_prompts():
    result = draw("a cat", "a dog", "a fox", *SMALL, "--batch-size", 2)
    assert "1 of 3" in result.stderr
    assert "3 of 3" in result.stderr
    assert "4/4" in result.stderr                                # two batches of two steps


def test_json_lines():
    result = draw("a cat", "a dog", *SMALL, "--json", "--seed", 7)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == ["image.png", "image-1.png"]
    assert [line["seed"] for line in lines] == [7, 8]
    assert [line["prompt"] for line in lines] == ["a cat", "a dog"]
    assert all(line["seconds"] >= 0 and line["steps"] == 2 for line in lines)


def test_options_and_prompts_may_alternate():
    draw("--offload", "a cat", *SMALL, "a dog")
    assert len([*sampler.Path().glob("image*.png")]) == 2


# --- The prompt loop ------------------------------------------------------------------------------


def feed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


@pytest.mark.parametrize("data, paths, errors", [
    (b"a cat\na dog\n", ["image.png", "image-1.png"], 0),
    ("造相 ⚡️\n\n \na dog".encode(), ["image.png", "image-1.png"], 0),      # no newline at the end
    (b"\xff\xfe\na cat\n", ["image-1.png"], 1),
    (b"\xef\xbb\xbfa cat\n", ["image.png"], 0),                    # some Windows shells send it
    (b"", [], 0)])
def test_prompt_loop(monkeypatch, data, paths, errors):
    feed(monkeypatch, data)
    result = run_here(sampler.main, "-", *SMALL)
    assert result.stdout.splitlines() == paths
    assert result.stderr.count("error: ") == errors
    assert result.returncode == (2 if errors else 0)


def test_prompt_loop_seeds_and_json(monkeypatch):
    feed(monkeypatch, b"a cat\na dog\n")
    result = draw("-", *SMALL, "--json", "--num-images", 2, "--seed", 3)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("a cat", 3), ("a cat", 4), ("a dog", 5), ("a dog", 6)]


def test_a_bad_line_is_answered_in_json(monkeypatch):
    feed(monkeypatch, b"\xff\na cat\n")
    result = run_here(sampler.main, "-", *SMALL, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert "Unicode" in lines[0]["error"]
    assert lines[1]["path"] == "image-1.png"


def test_the_loop_answers_before_the_next_line_comes(tmp_path):
    """A program that waits for each path before it sends the next prompt."""
    command = [sys.executable, ROOT / "sampler.py", "-", *map(str, SMALL)]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as process:
        for i, prompt in enumerate(["a cat", "a dog", "a fox"]):
            process.stdin.write(prompt + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == ("image.png\n" if i == 0 else f"image-{i}.png\n")
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait(60) == 0


def test_the_loop_without_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)                      # as after 0<&-
    refused(run_here(sampler.main, "-", *SMALL), "standard input")


@pytest.mark.parametrize("arguments", [
    ["-", "--prompts", "prompts.txt"], ["-", "a cat"], ["-", "-"]])
def test_the_loop_takes_no_other_prompts(tmp_path, monkeypatch, arguments):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    feed(monkeypatch, b"a cat\n")
    refused(run_here(sampler.main, *arguments, *SMALL), "-")
    assert not [*tmp_path.glob("*.png")]


# --- What the PNG says reproduces the picture -----------------------------------------------------


@pytest.mark.parametrize("options", [
    [], ["--weights", "fp8"], ["--weights", "int8"], ["--tile"], ["--no-tile"],
    ["--dtype", "bfloat16"], ["--upscale", "nearest"], ["--upscale", "none", "--seed", 123],
    ["--guidance", 2, "--negative-prompt=--a=True\nc", "--guidance-every", 2],
    ["--guidance", 2, "--cfg-normalization", 0.5, "--cfg-truncation", 0.7],
    ["--shift", 1.7, "--attention", "math"],
    ["--init-image", "start.png", "--strength", 0.5],
    ["--init-image", "start.png", "--weights", "int8", "--tile", "--guidance", 1]])
def test_like_makes_the_same_picture(options):
    Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 20).save("start.png")
    draw("-- a \"cat\", 造相", *SMALL, *options, "--out", "first.png")
    draw("--like", "first.png", "--out", "second.png", "--model", TINY)
    assert same_pixels("first.png", "second.png")
    assert Image.open("first.png").text == Image.open("second.png").text


def test_like_and_the_other_options():
    draw("a cat", *SMALL, "--seed", 5, "--guidance", 2)
    draw("a dog", "--like", "image.png", "--model", TINY, "--seed", 6, "--width", 32)
    text = Image.open("image-1.png").text
    expected = {"prompt": "a dog", "seed": "6", "size": "32x32", "guidance": "2.0", "steps": "2"}
    assert {key: text[key] for key in expected} == expected


PARTS = ("--dit", TINY / "transformer", "--text-encoder", TINY / "text_encoder", "--vae",
         TINY / "vae", "--tokenizer", TINY / "tokenizer/tokenizer.json")


def test_parts_without_a_model():
    """No part comes from the bundled model, and --like finds them again."""
    assert sampler.parse_arguments(["a cat", "--vae", "x"]).model is None
    words = ("--size", "48x32", "--steps", 2)
    result = draw("a cat", *PARTS, *words, "--shift", 3)
    assert "warning" not in result.stderr
    draw("a cat", *SMALL)
    assert same_pixels("image.png", "image-1.png")
    result = draw("a cat", *PARTS, *words)
    assert "warning" not in result.stderr             # the scheduler beside it says the shift
    Path("parts").mkdir()
    os.rename("image.png", "parts/image.png")
    files = json.loads(Image.open("parts/image.png").text["files"])
    assert files.keys() == {"dit", "text_encoder", "vae", "tokenizer"}
    shutil.copytree(TINY, "parts", dirs_exist_ok=True)
    shutil.copy(TINY / "tokenizer/tokenizer.json", "parts")
    draw("--like", "parts/image.png", "--out", "again.png")
    assert same_pixels("parts/image.png", "again.png")
    text = Image.open("again.png").text
    assert text["model"] == "transformer" and json.loads(text["files"]) == files


def test_a_model_that_is_given_replaces_the_recorded_parts(tmp_path, own):
    """Those that --dit and the others named, and those that lay beside a single file."""
    convert_weights.convert(TINY, tmp_path / "comfy", to="comfy")
    file = tmp_path / "comfy/z_image.safetensors"
    draw("a cat", *PARTS, "--size", "48x32", "--steps", 2, "--out", "parts.png")
    draw("a cat", "--model", file, "--size", "48x32", "--steps", 2, "--out", "file.png")
    for name in ("parts.png", "file.png"):
        draw("--like", name, "--model", own, "--out", f"own-{name}")
        assert json.loads(Image.open(f"own-{name}").text["files"]).keys() == {"model"}
    draw("--like", "file.png", "--model", file, "--out", "again.png")
    assert same_pixels("file.png", "again.png")
    draw("--like", "file.png", "--model", file, "--vae", TINY / "vae", "--out", "again-2.png")
    assert json.loads(Image.open("again-2.png").text["files"])["vae"][0][0] == "vae"


def test_a_single_file_part_has_the_releases_size(tmp_path):
    """Without --model a file that has no configuration is of the release, not of the student."""
    convert_weights.convert(TINY, tmp_path / "comfy", to="comfy")
    tensors = load_file(tmp_path / "comfy/z_image.safetensors")
    save_file(tensors, tmp_path / "dit.safetensors")             # without our header
    result = run_here(sampler.main, "a cat", *PARTS[2:], "--dit", "dit.safetensors")
    refused(result, "dit.safetensors", "instead of [3840, 2560]")


def test_the_number_of_pictures_at_once_is_recorded():
    """It changes bfloat16's rounding."""
    draw("a cat", *SMALL, "--num-images", 3, "--batch-size", 2)
    names = ("image.png", "image-1.png", "image-2.png")
    assert [Image.open(name).text["batch_size"] for name in names] == ["2", "2", "1"]
    draw("--like", "image.png", "--model", TINY)
    assert Image.open("image-3.png").text["batch_size"] == "1"


def test_like_finds_the_bundled_model():
    draw("a red card with the word HI")
    draw("--like", "image.png")
    assert same_pixels("image.png", "image-1.png")


def test_like_finds_files_beside_the_picture(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    shutil.copytree(TINY, folder / "model")
    Image.new("RGB", (48, 32), "red").save(folder / "red.png")
    draw("a cat", "--model", folder / "model", "--steps", 2, "--size", "48x32",
         "--init-image", folder / "red.png", "--out", folder / "a.png")
    draw("--like", folder / "a.png", "--out", "b.png")
    assert same_pixels(folder / "a.png", "b.png")
    Image.new("RGB", (48, 32), "blue").save(folder / "red.png")
    refused(run_here(sampler.main, "--like", folder / "a.png"), "red.png", "--init-image")
    shutil.rmtree(folder / "model")
    refused(run_here(sampler.main, "--like", folder / "a.png"), "model", "--model")


def png_with(text):
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    return info


GOOD = {"prompt": "a cat", "seed": "1", "size": "48x32", "steps": "2", "files": "{}",
        "options": '["size", "steps"]'}


@pytest.mark.parametrize("text", [
    {}, {**GOOD, "steps": "1e9"}, {**GOOD, "size": "big"}, {**GOOD, "files": "{"},
    {**GOOD, "options": '["unknown"]', "unknown": "1"}, {**GOOD, "options": '["out"]', "out": "x"},
    {**GOOD, "files": '{"model": 3}'}, {**GOOD, "options": "3"},
    {**GOOD, "files": '{"prompt": [["x.png", null]]}'},
    {**GOOD, "files": '{"out": [["x.png", null]]}'}, {**GOOD, "files": "[]"},
    {**GOOD, "files": '{"lora": [["other.png", null]]}'},
    {**GOOD, "files": '{"lora": [["owner/name", null, "x"]]}'},
    {**GOOD, "files": '{"lora": [["owner/name", null]]}'},
    {**GOOD, "files": '{"lora": [["owner/name", null, 1.0, 2.0]]}'},
    {**GOOD, "files": '{"model": [["owner/name", null], ["owner/name", null]]}'},
    {**GOOD, "files": '{"vae": [["/etc/passwd", null]]}'},
    {**GOOD, "options": '["num_images"]', "num_images": "3"},
    {**GOOD, "options": '["prompts"]', "prompts": "/etc/passwd"},
    {**GOOD, "options": '["device"]', "device": "cpu"},
    {key: value for key, value in GOOD.items() if key != "prompt"}])
def test_like_with_other_pictures(text):
    Image.new("RGB", (8, 8)).save("other.png", pnginfo=png_with(text))
    refused(run_here(sampler.main, "--like", "other.png"), "other.png")


def test_like_does_not_get_around_a_contradiction():
    text = {**GOOD, "compile": "True", "options": '["size", "steps", "compile"]'}
    Image.new("RGB", (8, 8)).save("other.png", pnginfo=png_with(text))
    result = run_here(sampler.main, "--like", "other.png", "--offload", "blocks")
    refused(result, "--compile", "--offload")


def test_like_of_a_picture_with_the_largest_seed():
    draw("a cat", "a dog", *SMALL, "--seed", 2 ** 63 - 2)
    assert Image.open("image-1.png").text["seed"] == str(2 ** 63 - 1)
    draw("--like", "image-1.png", "--model", TINY)
    assert same_pixels("image-1.png", "image-2.png")
    result = run_here(sampler.main, "a cat", "a dog", *SMALL, "--seed", 2 ** 63 - 1)
    refused(result, "--seed", 2 ** 63 - 2)


def test_like_of_a_picture_whose_prompt_is_a_dash(tmp_path, monkeypatch):
    """A dash reads prompts from standard input on the command line alone."""
    (tmp_path / "prompts.txt").write_text("-\n")
    feed(monkeypatch, b"a dog\n")
    draw("--prompts", tmp_path / "prompts.txt", *SMALL)
    draw("--like", "image.png", "--model", TINY)
    assert same_pixels("image.png", "image-1.png")
    assert Image.open("image-1.png").text["prompt"] == "-"


def test_like_knows_the_files_that_were_found_beside_the_model(tmp_path):
    folder = tmp_path / "comfy"
    convert_weights.convert(TINY, folder, to="comfy")
    draw("a cat", "--model", folder / "z_image.safetensors", "--steps", 2, "--size", "48x32",
         "--out", folder / "a.png")
    draw("--like", folder / "a.png", "--out", "b.png")
    assert same_pixels(folder / "a.png", "b.png")
    weights = load_file(folder / "ae.safetensors")
    save_file({name: 1.1 * w for name, w in weights.items()}, folder / "ae.safetensors")
    refused(run_here(sampler.main, "--like", folder / "a.png"), "ae.safetensors", "--vae")


def test_a_very_large_picture_is_called_so(monkeypatch):
    draw("a cat", *SMALL)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(run_here(sampler.main, "--like", "image.png"), "million pixels")
    refused(run_here(sampler.main, "a cat", "--init-image", "image.png", *SMALL), "million pixels")


@pytest.mark.parametrize("size, is_said", [((960, 640), False), ((4000, 10), True)])
def test_a_picture_that_loses_much_is_said_to_be_cropped(monkeypatch, size, is_said):
    """Before the first step, which is as far as this test goes."""
    monkeypatch.setattr(sampler, "image_to_image", Failing(UserError("far enough")))
    Image.new("RGB", size, "red").save("start.png")
    result = run_here(sampler.main, "a cat", "--model", TINY, "--init-image", "start.png")
    assert "far enough" in result.stderr and ("cropped" in result.stderr) == is_said


def test_pictures_of_other_numbers_are_refused():
    Image.new("F", (48, 32), 0.5).save("float.tiff")
    refused(run_here(sampler.main, "a cat", "--init-image", "float.tiff", *SMALL), "floating-point")
    Image.new("I", (48, 32), 70000).save("large.tiff")
    refused(run_here(sampler.main, "a cat", "--init-image", "large.tiff", *SMALL), "32 bits")


def test_like_takes_names_that_begin_with_a_dash():
    draw("a cat", *SMALL)
    draw("--like", "image.png", "--model", TINY, "--out=-a.png")
    assert same_pixels("image.png", "-a.png")


@pytest.mark.parametrize("strength", ["1e400", "NaN", "101", "1" + 400 * "0"])
def test_like_with_a_strength_that_no_option_takes(strength, monkeypatch):
    files = f'{{"lora": [["a.safetensors", "x", {strength}]]}}'
    monkeypatch.setattr(sampler, "find_file", lambda *_: "a.safetensors")
    Image.new("RGB", (8, 8)).save("other.png", pnginfo=png_with({**GOOD, "files": files}))
    assert refused(run_here(sampler.main, "--like", "other.png"), "other.png")


@pytest.mark.parametrize("rank, world", [("1", "1"), ("abc", "2"), ("0", "0"), ("-1", "2")])
def test_an_environment_that_is_not_torchrun_s(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    refused(run_here(sampler.main, "a cat", *SMALL), "RANK", "torchrun")


def test_a_number_of_processes_without_torchrun(monkeypatch):
    """Other launchers set WORLD_SIZE; a part of the images would be drawn, and none missed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(run_here(sampler.main, "a cat", *SMALL), "LOCAL_RANK", "unset WORLD_SIZE")


def test_a_tokenizer_that_fails_ends_in_one_sentence(pipeline):
    """tokenizers raises a bare Exception, for instance for an unknown token without a name."""
    class Unknown:
        def encode(self, text, **options):
            raise Exception("WordLevel error: Missing [UNK] token from the vocabulary")
    with pytest.raises(UserError, match="the tokenizer cannot read 'a cat'.*UNK"):
        sampler.token_ids(Unknown(), "a cat")


@pytest.mark.parametrize("name", ["nowhere.png", "a.jpg", "text.png", "."])
def test_like_with_files_that_are_no_png(tmp_path, name):
    Image.new("RGB", (8, 8)).save("a.jpg")
    (tmp_path / "text.png").write_text("a cat")
    refused(run_here(sampler.main, "--like", name), name)


# --- Image to image -------------------------------------------------------------------------------


@pytest.mark.parametrize("size, given, expected", [
    ((4032, 3024), [], (64, 48)),            # near 64 * 64 pixels, multiples of 16
    ((3024, 4032), [], (48, 64)),
    ((500, 300), [], (80, 48)),
    ((256, 256), [], (64, 64)),              # the model's own picture, enlarged
    ((7, 7), [], (64, 64)),
    ((1000, 10), [], (320, 16)),             # as far as the number of pixels allows
    ((101, 70), ["--size", "32x48"], (32, 48)),
    ((100, 50), ["--width", 64], (64, 32)),
    ((100, 50), ["--height", 64], (128, 64))])
def test_size_of_an_init_image(own, size, given, expected):
    Image.new("RGB", size, "red").save("red.png")
    draw("a cat", "--model", own, "--steps", 2, "--init-image", "red.png", *given,
         "--upscale", "none")
    assert Image.open("image.png").size == expected


def rotated_photo():
    exif = Image.Exif()
    exif[0x0112] = 6                                             # turned by a quarter
    image = Image.new("RGB", (96, 64), "red")
    image.paste("blue", (0, 0, 96, 8))                           # at the top; upright: at the right
    image.save("input.png", exif=exif)


def transparent(mode):
    image = Image.new(mode, (64, 64), (255, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.save("input.png")


def palette_with_transparency():
    image = Image.new("P", (64, 64), 3)
    image.putpalette([255, 0, 0] * 256)
    image.save("input.png", transparency=3)


def sixteen_bits(value):
    Image.fromarray(np.full((64, 64), value, np.uint16)).save("input.png")


def thirty_two_bits(value):
    Image.fromarray(np.full((64, 64), value, np.int32)).save("input.png", "TIFF")


@pytest.mark.parametrize("make, size, color", [
    (rotated_photo, (64, 96), (255, 0, 0)),
    (lambda: transparent("RGBA"), (64, 64), (255, 255, 255)),
    (lambda: transparent("LA"), (64, 64), (255, 255, 255)),
    (palette_with_transparency, (64, 64), (255, 255, 255)),
    (lambda: sixteen_bits(20000), (64, 64), (78, 78, 78)),
    (lambda: sixteen_bits(65535), (64, 64), (255, 255, 255)),
    (lambda: sixteen_bits(200), (64, 64), (0, 0, 0)),              # nearly black, not gray
    (lambda: thirty_two_bits(200), (64, 64), (200, 200, 200)),
    (lambda: thirty_two_bits(20000), (64, 64), (78, 78, 78)),
    (lambda: Image.new("L", (64, 64), 100).save("input.png"), (64, 64), (100, 100, 100)),
    (lambda: Image.new("1", (64, 64), 1).save("input.png"), (64, 64), (255, 255, 255)),
    (lambda: Image.new("CMYK", (64, 64), 0).save("input.png", "JPEG"), (64, 64), (255, 255, 255))])
def test_pictures_of_every_kind(make, size, color):
    make()
    image = sampler.read_image("input.png")
    assert (image.mode, image.size) == ("RGB", size)
    assert np.abs(np.subtract(image.getpixel((8, 48)), color)).max() <= 2


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin1.txt").write_bytes("café\n".encode("latin-1"))
    Image.new("RGB", (48, 32), "red").save("red.png")
    return {f.name for f in tmp_path.iterdir()}


@pytest.mark.parametrize("arguments, words", [
    (["--model", TINY], ["prompt"]),
    (["a cat", "--model", "nowhere"], ["nowhere"]),
    (["a cat", "--model", ""], []),
    (["a cat", "--model", "x" * 300], []),
    (["a cat", "--model", TINY, "--size", "100x64"], ["width", "16", "100", "96"]),
    (["a cat", "--model", TINY, "--height", "99984"], ["height", "8192"]),
    (["a cat", "--model", TINY, "--size", "big"], ["--size", "big"]),
    (["a cat", "--model", TINY, "--size", "48x"], ["--size"]),
    (["a cat", "--model", TINY, "--size", "-48x32"], ["--size"]),
    (["a cat", "--prompts", "nowhere.txt", *SMALL], ["nowhere.txt"]),
    (["--prompts", "empty.txt", *SMALL], ["prompt"]),
    (["--prompts", "latin1.txt", *SMALL], ["latin1.txt", "UTF-8"]),
    (["a cat", *SMALL, "--init-image", "nowhere.png"], ["nowhere.png"]),
    (["a cat", *SMALL, "--init-image", "latin1.txt"], ["latin1.txt"]),
    (["a cat", *SMALL, "--init-image", "."], []),
    (["a cat", *SMALL, "--init-image", "red.png", "--strength", "1e-20"], ["strength", "1e-20"]),
    (["a cat", *SMALL, "--out", "cat.jpg"], ["--out", "cat.jpg"]),
    (["a cat", *SMALL, "--out", "nowhere/cat.png"], ["nowhere"]),
    (["a cat", *SMALL, "--device", "warp"], ["warp"]),
    (["a cat", *SMALL, "--device", "meta"], ["meta"]),
    (["a cat", *SMALL, "--device", "cuda:63"], ["cuda:63"]),
    (["a cat", *SMALL, "--dtype", "int8"], ["--dtype"]),
    (["a cat", *SMALL, "--num-images", "1000000", "a dog"], ["million"]),
    (["a \udcff cat", *SMALL], ["Unicode"]),
    (["a cat", *SMALL, "--lora", "nowhere.safetensors"], ["nowhere.safetensors"]),
    (["a cat", *SMALL, "--dit", "nowhere.safetensors"], ["nowhere.safetensors"]),
    (["a cat", *SMALL, "--unknown"], ["--unknown"]),
])
def test_mistakes(tmp_path, inputs, arguments, words):
    refused(run_here(sampler.main, *arguments), *words)
    assert {f.name for f in tmp_path.iterdir()} == inputs


@pytest.mark.parametrize("option, values", [
    ("--steps", ["0", "-1", "3000000000", "2.5", "nan", "", "1e3"]),
    ("--num-images", ["0", "1000000000000", "x"]),
    ("--batch-size", ["0", "100000", "1.5"]),
    ("--height", ["0", "-16", "100000000000"]),
    ("--width", ["0", "1e3"]),
    ("--seed", ["-1", "9223372036854775808", "1.5", "x"]),
    ("--guidance", ["-1", "nan", "inf", "1e300", "x"]),
    ("--cfg-normalization", ["-1", "inf"]),
    ("--cfg-truncation", ["nan", "-0.1", "2"]),
    ("--guidance-every", ["0", "1.5", "1000"]),
    ("--shift", ["0", "-3", "nan", "1e300"]),
    ("--strength", ["0", "-1", "1.1", "inf"])])
def test_numbers_out_of_range(inputs, option, values):
    for value in values:
        refused(run_here(sampler.main, "a cat", "--model", TINY, f"{option}={value}"), option)


@pytest.mark.parametrize("option", [
    "--prompts", "--model", "--like", "--init-image", "--lora", "--dit", "--tokenizer", "--out"])
def test_an_empty_name_is_refused(option):
    """It comes from a variable of the shell that is not set."""
    refused(run_here(sampler.main, "a cat", f"{option}="), option)


@pytest.mark.parametrize("arguments, words", [
    (["--strength", 0.5], ["--strength", "--init-image"]),
    (["--size", "48x32", "--height", 32], ["--size", "--height"]),
    (["--size", "48x32", "--width", 48], ["--size"]),
    (["--compile", "--offload", "blocks"], ["--compile", "--offload"]),
    (["--offload", "block"], ["--offload", "block"]),
    (["--offload", "Blocks"], ["--offload"]),
    (["--offload", "none"], ["--offload"]),
    (["--offload=gpu"], ["--offload"])])
def test_options_that_contradict(tmp_path, arguments, words):
    refused(run_here(sampler.main, "a cat", "--model", TINY, *arguments), *words)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("options, words", [
    (["--negative-prompt", "ugly"], ["--negative-prompt", "--guidance"]),
    (["--cfg-normalization", 0.5], ["--cfg-normalization"]),
    (["--cfg-truncation", 0.5, "--guidance-every", 2], ["--cfg-truncation", "--guidance-every"]),
    (["--offload"], ["--offload", "CPU"]),
    (["--shift", 6], ["undistilled", "--guidance 3 to 5"]),
    (["--guidance", 2], ["distilled", "--guidance 0"])])
def test_options_without_effect_and_hints(options, words):
    result = draw("a cat", *SMALL, *options)
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1, result.stderr
    assert all(word in warned[0] for word in words)


@pytest.mark.parametrize("options", [
    [], ["--guidance", 2, "--shift", 6, "--negative-prompt", "ugly"], ["--weights", "fp8"]])
def test_no_warning_without_a_reason(options):
    assert "warning" not in draw("a cat", *SMALL, *options).stderr


@pytest.mark.parametrize("has_int8, has_bfloat16, dtype, expected", [
    (True, True, [], ("bfloat16", "Int8Linear", 0)),
    (True, True, ["--dtype", "float32"], ("float32", "Int8Linear", 0)),
    (True, False, [], ("float32", "Int8Linear", 0)),
    (False, True, [], ("bfloat16", "Linear", 1)),
    (False, True, ["--dtype", "float32"], ("float32", "Int8Linear", 1)),
    (False, False, [], ("float32", "Int8Linear", 1))])
@pytest.mark.parametrize("is_stored", [False, True])
def test_int8_and_what_a_cpu_multiplies(
        tmp_path, monkeypatch, has_int8, has_bfloat16, dtype, expected, is_stored):
    """Beside int8 weights bfloat16 is the default, for an int8 file as for --weights int8.

    Where there are no int8 products it takes their place, with one warning. --like repeats it all.
    """
    monkeypatch.setattr(hardware, "CPU_HAS_INT8", has_int8)
    monkeypatch.setattr(hardware, "CPU_HAS_BFLOAT16", has_bfloat16)
    words = ["--weights", "int8"]
    if is_stored:
        convert_weights.convert(TINY, tmp_path / "int8", dtype="int8")
        words = ["--model", tmp_path / "int8"]
    calls = Recorder(sampler.generate)
    monkeypatch.setattr(sampler, "generate", calls)
    result = draw("a cat", *SMALL, *words, *dtype)
    text, pipeline = Image.open("image.png").text, calls.calls[0][0]
    layer = type(pipeline.dit.layers[0].feed_forward.w1).__name__
    layer = "Linear" if layer == "CPULinear" else layer
    assert (text["dtype"], layer, result.stderr.count("warning: ")) == expected
    assert text.get("weights") == ("int8" if layer == "Int8Linear" and not is_stored else None)
    draw("--like", "image.png", "--model", tmp_path / "int8" if is_stored else TINY)
    assert same_pixels("image.png", "image-1.png")
    assert Image.open("image-1.png").text == text


def test_long_prompt_is_cut_with_a_warning():
    result = draw(" ".join(f"w{i}" for i in range(600)), *SMALL)
    assert "first 512 tokens" in result.stderr
    assert sampler.Path("image.png").exists()


def test_float16_that_overflows_saves_nothing(tmp_path, checkpoint):
    shard = checkpoint / "transformer/diffusion_pytorch_model-00001-of-00005.safetensors"
    tensors = load_file(shard)
    tensors["all_final_layer.2-1.linear.weight"] *= 1e5
    save_file(tensors, shard)
    arguments = ("a cat", "--model", checkpoint, "--size", "48x32", "--steps", 2)
    refused(run_here(sampler.main, *arguments, "--dtype", "float16"), "float16", "bfloat16")
    assert not [*tmp_path.glob("*.png")]
    draw(*arguments, "--dtype", "bfloat16")


def test_damaged_weights_are_to_blame(tmp_path, checkpoint, monkeypatch):
    """Large weights are mapped and not read when loading; they are looked at afterwards."""
    monkeypatch.setattr(convert_weights, "SMALL", 0)
    shard = checkpoint / "transformer/diffusion_pytorch_model-00001-of-00005.safetensors"
    before = load_file(shard)
    name = "all_final_layer.2-1.linear.weight"
    broken = before[name].clone()
    broken[0, 0] = torch.nan
    save_file({**before, name: broken}, shard)
    arguments = ("a cat", "--model", checkpoint, "--size", "48x32", "--steps", 2)
    result = run_here(sampler.main, *arguments, "--dtype", "bfloat16")
    refused(result, "damaged", "final_layer.linear.weight (dit)")
    shutil.copytree(TINY / "transformer", checkpoint / "transformer", dirs_exist_ok=True)
    file = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][1] = torch.inf
    save_file(tensors, file)
    refused(run_here(sampler.main, *arguments), "damaged", "decoder.conv_out.bias (vae)")
    assert not [*tmp_path.glob("*.png")]


def ask_for_too_much(x, t, text):
    """What the allocator really raises."""
    return torch.empty(1 << 50)


@pytest.mark.parametrize("forward, words", [
    (ask_for_too_much, ["out of memory", "--offload", "--size"]),
    (Failing(torch.OutOfMemoryError("CUDA out of memory.")), ["out of memory", "--offload"]),
    (Failing(MemoryError()), ["out of memory", "--weights"]),
    (Failing(RuntimeError("No viable backend for scaled_dot_product_attention was found.")),
     ["--attention"]),
    (Failing(RuntimeError("No available kernel. Aborting execution.")), ["--attention"])])
def test_out_of_memory_and_kernels(tmp_path, monkeypatch, forward, words):
    monkeypatch.setattr(sampler.DiT, "forward", lambda self, *arguments: forward(*arguments))
    refused(run_here(sampler.main, "a cat", *SMALL), *words)
    assert not [*tmp_path.iterdir()]


def test_no_compiler(monkeypatch):
    import torch._inductor.exc
    error = torch._inductor.exc.InductorError(RuntimeError("no C++ compiler"), None)
    monkeypatch.setattr(sampler.DiT, "forward", Failing(error))
    refused(run_here(sampler.main, "a cat", *SMALL), "--compile")


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(sampler.DiT, "forward", Failing(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_here(sampler.main, "a cat", *SMALL)


# --- Options reach the networks -------------------------------------------------------------------


def test_the_kernel_is_that_of_dit_and_text_encoder(monkeypatch):
    """The VAE's attention is too wide for most kernels, and keeps the choice of all."""
    seen, attention = {"blocks": [], "vae": []}, F.scaled_dot_product_attention

    def attend(where, *arguments, **options):
        seen[where].append(torch.nn.attention._cur_sdpa_kernel_backends())
        return attention(*arguments, **options)

    monkeypatch.setattr(Attention, "attend", staticmethod(partial(attend, "blocks")))
    monkeypatch.setattr(F, "scaled_dot_product_attention", partial(attend, "vae"))
    Image.new("RGB", (48, 32), "red").save("red.png")
    draw("a cat", *SMALL, "--init-image", "red.png", "--attention", "math")
    assert seen["blocks"] and all(kernels == [torch.nn.attention.SDPBackend.MATH]
                                  for kernels in seen["blocks"])
    assert seen["vae"] and all(len(kernels) > 2 for kernels in seen["vae"])


def test_a_kernel_that_a_cpu_lacks_is_refused():
    refused(run_here(sampler.main, "a cat", *SMALL, "--attention", "cudnn"), "--attention")


def test_compile_reaches_the_dit(monkeypatch):
    calls = Recorder(lambda dit: None)
    monkeypatch.setattr(sampler.DiT, "compile", lambda dit: calls(dit.config))
    draw("a cat", *SMALL)
    assert not calls.calls
    draw("a cat", *SMALL, "--compile")
    assert len(calls.calls) == 1


def arguments_of(*words):
    return sampler.parse_arguments([str(word) for word in ("a cat", *SMALL, *words)])


@pytest.mark.parametrize("words, encoder, decoder", [
    ([], "Linear", "TiledDecoder"), (["--no-tile"], "Linear", "Decoder"),
    (["--weights", "int8"], "Int8Linear", "TiledDecoder"),
    (["--weights", "fp8", "--tile"], "Float8Linear", "TiledDecoder")])
def test_build(words, encoder, decoder):
    pipeline = sampler.build(arguments_of(*words), torch.device("cpu"))
    for net in (pipeline.text_encoder.layers[0].mlp, pipeline.dit.layers[0].feed_forward):
        assert type(net.w1).__name__ == encoder
    assert type(pipeline.vae.decoder).__name__ == decoder
    assert type(pipeline.dit.x_embedder).__name__ == "Linear"


@pytest.mark.parametrize("words, above", [([], 2e6), (["--tile"], 0), (["--offload", "blocks"], 0)])
def test_when_the_vae_works_in_tiles(monkeypatch, words, above):
    monkeypatch.setattr(hardware, "stream_blocks", lambda pipeline: None)
    pipeline = sampler.build(arguments_of(*words), torch.device("cpu"))
    assert pipeline.vae.decoder.above == above


def test_device_by_default(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert sampler.find_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name, expected", [
    ("auto", "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch, name, expected):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(shape))
    assert sampler.find_device(name) == torch.device(expected)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(monkeypatch, name):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", Failing(RuntimeError("invalid device ordinal")))
    with pytest.raises(UserError, match="no device 'cuda:3'.*a process for each GPU"):
        sampler.find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        sampler.find_device("cuda")


def test_a_lora_changes_the_picture_and_is_recorded(tmp_path, pipeline):
    shape = pipeline.dit.layers[0].attention.to_q.weight.shape
    prefix = "diffusion_model.layers.0.attention.to_q"
    save_file({f"{prefix}.lora_A.weight": torch.randn(2, shape[1]),
               f"{prefix}.lora_B.weight": torch.randn(shape[0], 2)}, tmp_path / "a.safetensors")
    draw("a cat", *SMALL)
    draw("a cat", *SMALL, "--lora", "a.safetensors:0.5")
    assert not same_pixels("image.png", "image-1.png")
    draw("--like", "image-1.png", "--model", TINY)
    assert same_pixels("image-1.png", "image-2.png")
    draw("a cat", *SMALL, "--lora", "a.safetensors:0")
    assert same_pixels("image.png", "image-3.png")


# --- Several processes ----------------------------------------------------------------------------


def test_processes_share_the_images_out(monkeypatch):
    prompts = [f"prompt {i}" for i in range(5)]
    draw(*prompts, *SMALL, "--out", "one.png")
    for rank in (1, 0, 2):                                       # in any order
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 3)):
            monkeypatch.setenv(name, str(value))
        result = draw(*prompts, *SMALL, "--out", "many.png")
        assert len(result.stdout.splitlines()) == (2 if rank < 2 else 1)
        assert ("step" in result.stderr) == (rank == 0)          # one progress bar
    for i in range(5):
        name = f"-{i}.png" if i else ".png"
        assert same_pixels(f"one{name}", f"many{name}")
        assert Image.open(f"many{name}").text["prompt"] == f"prompt {i}"


@pytest.mark.slow
def test_torchrun(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fox\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               ROOT / "sampler.py", "--prompts", "prompts.txt", *map(str, SMALL)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert {f.name for f in tmp_path.glob("*.png")} == {"image.png", "image-1.png", "image-2.png"}
    assert sorted(line.split()[0] for line in result.stdout.splitlines()) == [
        "image-1.png", "image-2.png", "image.png"]


@pytest.mark.slow
def test_torchrun_with_one_image(tmp_path):
    """--context-parallel: both processes compute the same picture, and one of them saves it."""
    draw("a cat", "a dog", *SMALL, "--out", "one.png")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               ROOT / "sampler.py", "a cat", "a dog", *map(str, SMALL), "--context-parallel",
               "--out", "two.png"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert {f.name for f in tmp_path.glob("two*.png")} == {"two.png", "two-1.png"}
    for name in (".png", "-1.png"):
        assert np.abs(pixels(f"one{name}") - pixels(f"two{name}")).max() <= 1
    refused(run_here(sampler.main, "a cat", *SMALL, "--context-parallel"), "torchrun")


# --- The process and its surroundings -------------------------------------------------------------


@pytest.mark.parametrize("script", ["sampler.py", "distill.py", "convert_weights.py"])
def test_threads_do_not_spin(script, tmp_path):
    """OpenMP reads its environment when torch is loaded; what the user says stays."""
    (tmp_path / "torch.py").write_text("import os\nprint(os.environ['OMP_WAIT_POLICY'])\n"
                                       "raise SystemExit(0)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment.pop("OMP_WAIT_POLICY", None)
        if given:
            environment["OMP_WAIT_POLICY"] = given
        assert run(script, "--help", env=environment).stdout == f"{expected}\n"


@pytest.mark.parametrize("script, module", [
    ("sampler.py", "torch"), ("sampler.py", "numpy"), ("sampler.py", "tokenizers"),
    ("distill.py", "torch"), ("convert_weights.py", "torch")])
def test_interrupt_while_modules_are_imported(tmp_path, script, module):
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)\n")
    result = run(script, "a cat", env={**os.environ, "PYTHONPATH": str(tmp_path)},
                 preexec_fn=accept_interrupts)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def accept_interrupts():
    """A shell's background jobs ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_interrupt_while_drawing(tmp_path):
    command = [sys.executable, ROOT / "sampler.py", "a cat", "--model", TINY, "--size", "64x64",
               "--steps", "10000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          preexec_fn=accept_interrupts) as process:
        seen = process.stderr.readline()
        assert seen == "loading ...\n"                           # at once, before torch is there
        while "1 of 1" not in seen:
            chunk = process.stderr.read(1)
            assert chunk, seen                                   # it ended before it began
            seen += chunk
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "0<&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    words = " ".join(map(str, SMALL))
    command = f"{sys.executable} {ROOT}/sampler.py 'a cat' {words} {closed}"
    result = subprocess.run(command, shell=True, cwd=tmp_path, stdout=subprocess.PIPE, timeout=120)
    assert result.returncode == 0
    assert (tmp_path / "image.png").exists()
    assert b"loading" not in result.stdout


def test_a_linked_script_finds_the_bundled_model(tmp_path):
    (tmp_path / "draw").symlink_to(ROOT / "sampler.py")
    result = subprocess.run([sys.executable, tmp_path / "draw", "a red card"],
                            cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "image.png").exists()


def test_names_that_are_not_unicode(tmp_path):
    name = os.fsdecode(b"bad\xff.png")
    Image.new("RGB", (48, 32), "red").save(tmp_path / name)
    result = run("sampler.py", "a cat", *SMALL, "--init-image", name, "--out", "造.png",
                 cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "造.png").exists()


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_disk_full_leaves_nothing(tmp_path):
    result = run("sampler.py", "a cat", *SMALL, "--out", "cat.png", cwd=tmp_path,
                 preexec_fn=limit_file_size)
    refused(result, "cannot write", "cat.png")
    assert not [*tmp_path.iterdir()]


def test_help_names_every_option_with_its_default():
    text = " ".join(run("sampler.py", "--help").stdout.split())
    for option in sampler.make_parser()._actions:
        assert not option.option_strings or option.option_strings[-1] in text
    for words in ("multiples of 16", "default 1)", "default 0.6", "default image.png",
                  "default lanczos", "float32 on a CPU"):
        assert words in text, words
