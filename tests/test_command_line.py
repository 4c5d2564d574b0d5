"""sampler.py as a user runs it: the files it leaves, and one clear sentence for everything that can go wrong."""

import os
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

import convert_weights
import sampler

SMALL = ("--model", TINY, "--size", "48x32", "--steps", 2)


def sample(tmp_path, *arguments, **options):
    return run("sampler.py", *arguments, cwd=tmp_path, **options)


def test_pictures_names_and_text_chunks(tmp_path, pipeline):
    (tmp_path / "prompts.txt").write_text("造相 ⚡️\n\n  a dog \n", encoding="utf-8")
    result = sample(tmp_path, "a cat", "--prompts", "prompts.txt", "--num-images", 2, "--seed", 5, "--batch-size", 4, *SMALL,
                    "--guidance", 1.5, "--negative-prompt", "blurry", "--cfg-normalization", 0.5, "--cfg-truncation", 0.7, "--upscale", "none")
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
                              "guidance": "1.5", "shift": "3.0", "negative_prompt": "blurry", "cfg_normalization": "0.5",
                              "cfg_truncation": "0.7"}
        # The same as from the library, alone, within one grey level of rounding.
        alone = sampler.generate(pipeline, prompt, 32, 48, 2, 1.5, "blurry", seed=5 + i, cfg_normalization=0.5, cfg_truncation=0.7)[0]
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
    (["a cat", *SMALL, "--guidance", "nan"], ["guidance"]),
    (["a cat", *SMALL, "--cfg-normalization", "-1"], ["cfg-normalization"]),
    (["a cat", *SMALL, "--cfg-truncation", "nan"], ["cfg-truncation"]),
    (["a cat", *SMALL, "--strength", "inf"], ["strength"]),
    (["a cat", *SMALL, "--shift", "1e300"], ["shift"]),
    (["a cat", *SMALL, "--num-images", "1000000000000"], ["million"]),
    (["a cat", "--model", ""], ["not a model directory"]),
    (["a cat", "--model", "x" * 300], ["File name too long"]),
    (["a cat", *SMALL, "--device", "meta"], ["meta"]),
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


@pytest.mark.parametrize("fail, words", [
    (lambda *_: torch.empty(1 << 50), ["out of memory", "--offload", "--size"]),                             # what the allocator really raises
    (lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")), ["out of memory", "--offload", "--size"]),
    (lambda *_: (_ for _ in ()).throw(torch._inductor.exc.InductorError(RuntimeError("no C++ compiler"), None)), ["leave out --compile"]),
])
def test_out_of_memory_or_compiler(tmp_path, monkeypatch, fail, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampler.DiT, "forward", fail)
    assert refused(run_here(sampler.main, "a cat", *SMALL), *words)
    assert not list(tmp_path.iterdir())


def test_compile_and_offload_reach_the_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compiled, offloaded = [], []
    monkeypatch.setattr(sampler.DiT, "compile", lambda dit: compiled.append(dit))
    monkeypatch.setattr(sampler.torch.nn.Module, "to", lambda self, device: offloaded.append(type(self).__name__))
    assert run_here(sampler.main, "a cat", *SMALL).returncode == 0 and not compiled and not offloaded
    assert run_here(sampler.main, "a cat", *SMALL, "--compile", "--offload").returncode == 0
    assert len(compiled) == 1 and offloaded == ["TextEncoder"] * 2 + ["DiT"] * 2 + ["VAE"] * 2


def test_the_checkpoint_recommends(tmp_path, monkeypatch, pipeline):
    """Steps, guidance, shift and size come from the checkpoint where the command line is silent."""
    p = pipeline
    convert_weights.save_pipeline(tmp_path / "own", p.dit, p.text_encoder, p.vae, p.tokenizer, 2.5, steps=3, guidance=1.5, size=32)
    monkeypatch.chdir(tmp_path)
    assert run_here(sampler.main, "a cat", "--model", "own").returncode == 0
    text = Image.open("image.png").text
    assert {key: text[key] for key in ("steps", "guidance", "shift", "size", "model")} == {
        "steps": "3", "guidance": "1.5", "shift": "2.5", "size": "32x32", "model": "own"}
    assert run_here(sampler.main, "a cat", "--model", "own", "--guidance", 0, "--steps", 1).returncode == 0
    assert (Image.open("image-1.png").text["guidance"], Image.open("image-1.png").text["steps"]) == ("0.0", "1")


def test_device_and_type_by_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sampler.pick_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert sampler.pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert sampler.pick_device("auto") == torch.device("cpu")


def test_photos_are_turned_upright_and_deep_greys_kept(tmp_path):
    photo, exif = Image.new("RGB", (96, 64), "red"), Image.Exif()
    exif[0x0112] = 6                                                         # turned by a quarter
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert sampler.read_image(tmp_path / "photo.jpg").size == (64, 96)
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(tmp_path / "deep.png")
    assert sampler.read_image(tmp_path / "deep.png").getpixel((0, 0)) == (78, 78, 78)


def test_names_that_are_not_unicode(tmp_path):
    name = os.fsdecode(b"bad\xff.png")
    Image.new("RGB", (48, 32), "red").save(tmp_path / name)
    result = sample(tmp_path, "a cat", *SMALL, "--init-image", name, "--out", "造.png", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "造.png").exists()


def test_disk_full_leaves_nothing(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    assert refused(sample(tmp_path, "a cat", *SMALL, "--out", "cat.png", preexec_fn=limit), "cannot write", "cat.png")
    assert not list(tmp_path.iterdir())


def test_interrupt(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "sampler.py", "a cat", "--model", TINY, "--size", "64x64", "--steps", "1000000"],
                               cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a shell's background jobs ignore it
    seen = ""
    while "sampling" not in seen:
        chunk = process.stderr.read(1)
        assert chunk, seen                                                   # it ended before it began
        seen += chunk
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
