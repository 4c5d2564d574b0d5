"""sampler.py as a user runs it: the files it leaves, and one clear sentence for everything that can go wrong."""

import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, refused, run, run_here
from PIL import Image
from safetensors.torch import load_file, save_file

import sampler

SMALL = ("--model", TINY, "--size", "48x32", "--steps", 2)


def sample(tmp_path, *arguments, **options):
    return run("sampler.py", *arguments, cwd=tmp_path, **options)


def test_pictures_names_and_text_chunks(tmp_path, pipeline):
    (tmp_path / "prompts.txt").write_text("造相 ⚡️\n\n  a dog \n", encoding="utf-8")
    result = sample(tmp_path, "a cat", "--prompts", "prompts.txt", "--num-images", 2, "--seed", 5, "--batch-size", 4, *SMALL,
                    "--guidance", 1.5, "--negative-prompt", "blurry", "--upscale", "none")
    assert result.returncode == 0, result.stderr
    names = ["image.png"] + [f"image-{i}.png" for i in range(1, 6)]
    assert [line.split()[0] for line in result.stdout.splitlines()] == names
    assert all(line.endswith(" s)") for line in result.stdout.splitlines())
    assert "2/2" in result.stderr                                            # the progress bar over the steps
    assert {f.name for f in tmp_path.iterdir()} == {"prompts.txt", *names}
    prompts = ["a cat", "a cat", "造相 ⚡️", "造相 ⚡️", "a dog", "a dog"]
    for i, (name, prompt) in enumerate(zip(names, prompts)):
        image = Image.open(tmp_path / name)
        assert image.text == {"prompt": prompt, "seed": str(5 + i), "size": "48x32", "model": "tiny", "dtype": "float32", "steps": "2",
                              "guidance": "1.5", "shift": "3.0", "negative_prompt": "blurry"}
        # The same as from the library, alone, within one grey level of rounding.
        alone = sampler.generate(pipeline, prompt, 32, 48, 2, 1.5, "blurry", seed=5 + i)[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1


def test_nothing_is_overwritten_and_small_pictures_are_enlarged(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"mine")
    assert sample(tmp_path, "a cat", *SMALL, "--out", "cat.png").returncode == 0
    assert (tmp_path / "cat.png").read_bytes() == b"mine"
    assert Image.open(tmp_path / "cat-1.png").size == (48 * 8, 32 * 8)


def test_image_to_image(tmp_path):
    Image.new("RGB", (101, 70), "red").save(tmp_path / "red.jpg")
    result = sample(tmp_path, "a cat", "--model", TINY, "--steps", 4, "--init-image", "red.jpg", "--strength", 0.5, "--upscale", "none")
    assert result.returncode == 0, result.stderr
    image = Image.open(tmp_path / "image.png")
    assert image.size == (96, 64) and image.text["strength"] == "0.5" and image.text["init_image"] == "red.jpg"
    assert "2/2" in result.stderr                                            # half of the four steps


@pytest.mark.parametrize("arguments, words", [
    (["--model", TINY], ["there is no prompt"]),
    (["a cat", "--model", "nowhere"], ["nowhere", "is not a model directory"]),
    (["a cat", "--model", TINY, "--size", "100x64"], ["width should be a multiple of 16", "100", "96"]),
    (["a cat", "--model", TINY, "--height", "100000"], ["height", "8192"]),
    (["a cat", "--model", TINY, "--size", "big"], ["--size", "big"]),
    (["a cat", *SMALL, "--steps", "0"], ["--steps should be at least 1"]),
    (["a cat", *SMALL, "--num-images", "0"], ["--num-images"]),
    (["a cat", *SMALL, "--shift", "0"], ["shift"]),
    (["a cat", *SMALL, "--guidance", "-1"], ["guidance"]),
    (["a cat", *SMALL, "--seed", "-1"], ["--seed"]),
    (["--prompts", "nowhere.txt", *SMALL], ["nowhere.txt", "No such file"]),
    (["--prompts", "empty.txt", *SMALL], ["there is no prompt"]),
    (["--prompts", "latin1.txt", *SMALL], ["latin1.txt", "UTF-8"]),
    (["a cat", *SMALL, "--init-image", "nowhere.png"], ["nowhere.png", "No such file"]),
    (["a cat", *SMALL, "--init-image", "latin1.txt"], ["latin1.txt", "not a picture"]),
    (["a cat", *SMALL, "--init-image", "red.png", "--strength", "0"], ["strength"]),
    (["a cat", *SMALL, "--init-image", "red.png", "--strength", "1e-20"], ["strength 1e-20 leaves none of 2 steps"]),
    (["a cat", *SMALL, "--out", "cat.jpg"], ["--out", "cat.jpg"]),
    (["a cat", *SMALL, "--out", "nowhere/cat.png"], ["nowhere"]),
    (["a cat", *SMALL, "--device", "warp"], ["warp"]),
    pytest.param(["a cat", *SMALL, "--device", "cuda:63"], ["no device 'cuda:63'"], id="absent GPU"),
    (["a \udcff cat", *SMALL], ["not valid Unicode"]),
])
def test_mistakes(tmp_path, monkeypatch, arguments, words):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin1.txt").write_bytes("café\n".encode("latin-1"))
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    before = {f.name for f in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    assert refused(run_here(sampler.main, *arguments), *words)
    assert {f.name for f in tmp_path.iterdir()} == before


def test_long_prompt_is_cut_with_a_warning(tmp_path):
    result = sample(tmp_path, "word " * 600, *SMALL)
    assert result.returncode == 0 and result.stderr.startswith("warning: a prompt of") and "cut to 512" in result.stderr
    assert (tmp_path / "image.png").exists()


def test_float16_that_overflows_saves_nothing(tmp_path, checkpoint):
    shard = checkpoint / "transformer/diffusion_pytorch_model-00001-of-00005.safetensors"
    tensors = load_file(shard)
    tensors["all_final_layer.2-1.linear.weight"] *= 1e6
    save_file(tensors, shard)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ("a cat", "--model", checkpoint, "--size", "48x32", "--steps", 2)
    assert refused(sample(out, *arguments, "--dtype", "float16"), "not finite", "float16", "bfloat16")
    assert not list(out.iterdir())
    assert sample(out, *arguments, "--dtype", "bfloat16").returncode == 0


def test_out_of_memory(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    result = sample(tmp_path, "a cat", "--model", TINY, "--size", "8192x8192", "--init-image", "red.png", preexec_fn=limit)
    assert refused(result, "out of memory", "--offload", "--size")
    assert [f.name for f in tmp_path.iterdir()] == ["red.png"]


def test_unwritable_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, path, **_):
        open(path, "wb").write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(sampler.UserError, match="cannot write .*cat.png: No space left on device"):
        sampler.save_png(Image.new("RGB", (8, 8)), tmp_path / "cat.png", {})
    assert not list(tmp_path.iterdir())


def test_interrupt(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "sampler.py", "a cat", "--model", TINY, "--size", "64x64", "--steps", "1000000"],
                               cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "sampling" not in seen:
        seen += process.stderr.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in rest and "Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_text_on_every_option():
    text = run("sampler.py", "--help").stdout
    options = {word.rstrip(",") for word in text.split() if word.startswith("--")}
    for option in ("model height width size steps seed guidance negative-prompt shift dtype device compile offload out "
                   "batch-size prompts num-images init-image strength cfg-normalization cfg-truncation upscale").split():
        assert f"--{option}" in options


def test_offload_and_float_types(tmp_path):
    for dtype in ("bfloat16", "float32"):
        assert sample(tmp_path, "a cat", *SMALL, "--offload", "--dtype", dtype, "--out", f"{dtype}.png").returncode == 0
    a, b = (np.asarray(Image.open(tmp_path / f"{dtype}.png")).astype(int) for dtype in ("bfloat16", "float32"))
    assert 0 < np.abs(a - b).max() < 26 and torch.get_default_dtype() == torch.float32
