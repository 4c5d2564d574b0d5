"""The shapes world: drawings, captions, the reader of pictures, training that resumes, the bundled teacher."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, run_here

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "tutorials" / "shapes"
sys.path[:0] = [str(SHAPES), str(ROOT)]

import convert_weights  # noqa: E402
import data             # noqa: E402
import evaluate         # noqa: E402
import sampler          # noqa: E402
import sweep            # noqa: E402
import train            # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")

PROMPTS = evaluate.read_prompts(SHAPES / "prompts_heldout.txt", 150)


@pytest.fixture(scope="module")
def drawn():
    return evaluate.drawings(PROMPTS, seed=5)                # (150, 3, 64, 64)


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are fastest on one thread, most of all while the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def joint(images):
    return evaluate.accuracy([evaluate.read(p) for p in evaluate.to_uint8(images)], PROMPTS)["joint"]


def blurred(images, radius):
    x = torch.arange(-3.0 * radius, 3 * radius + 1)
    line = torch.exp(-x.square() / (2 * radius ** 2))
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    padded = F.pad(images, (3 * radius,) * 4, mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(padded, kernel).view_as(images)


# --- data.py ------------------------------------------------------------------------------------------------


def test_data_is_deterministic():
    def world(seed):
        rng = np.random.default_rng(seed)
        scenes = [data.random_scene(rng) for _ in range(5)]
        return [data.caption(s, rng) for s in scenes], np.stack([data.draw(s) for s in scenes])
    (captions, pictures), (again, same), (other, _) = world(1), world(1), world(2)
    assert captions == again and captions != other
    assert pictures.shape == (5, 64, 64, 3) and pictures.dtype == np.uint8 and (pictures == same).all()


def test_shapes_stay_inside_the_picture():
    for shape, (column, row) in itertools.product(data.SHAPES, data.POSITIONS.values()):
        x, y = (32 + data.CELL * c + (c or 1) * data.JITTER for c in (column, row))
        mask = data.coverage(shape, x, y, data.SIZES["large"])
        assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) < 0.35, (shape, column, row)


def test_held_out_combinations_are_unseen():
    triples = [t for t in itertools.product(data.SHAPES, data.COLOURS, data.COLOURS) if t[1] != t[2]]
    unseen = [t for t in triples if data.held_out(*t)]
    assert len(triples) == 336 and len(unseen) == 56
    for i, j in ((0, 1), (0, 2), (1, 2)):                    # yet every pair of the three parts is seen
        assert {(t[i], t[j]) for t in triples} == {(t[i], t[j]) for t in triples if t not in unseen}
    rng = np.random.default_rng(0)
    assert not any(data.held_out(*data.random_scene(rng)[:3]) for _ in range(500))
    for name, wanted in (("prompts.txt", False), ("prompts_heldout.txt", True)):
        prompts = evaluate.read_prompts(SHAPES / name)
        assert len(set(prompts)) == len(prompts) == (1000 if wanted else 4000)
        assert sum(p.isascii() for p in prompts) == len(prompts) // 2
        asked = [data.parse(p) for p in prompts]
        assert all(data.held_out(a["shape"], a["colour"], a["background"]) == wanted for a in asked), name
    assert evaluate.read_prompts(SHAPES / "prompts_heldout.txt") == data.prompt_list(1000, seed=2, unseen=True)
    assert evaluate.read_prompts(SHAPES / "prompts.txt") == data.prompt_list(4000, seed=1, unseen=False)


def test_captions_and_attributes_agree():
    rng = np.random.default_rng(3)
    mentioned = dict.fromkeys(data.ATTRIBUTES, 0)
    for _ in range(2000):
        scene = data.random_scene(rng)
        asked = data.parse(data.caption(scene, rng))
        assert all(getattr(scene, a) == value for a, value in asked.items()), (scene, asked)
        for attribute in asked:
            mentioned[attribute] += 1
    assert mentioned["shape"] == mentioned["colour"] == 2000 and min(mentioned.values()) > 800
    assert data.parse("a small red circle on a blue background") == dict(size="small", colour="red", shape="circle", background="blue")
    assert data.parse("蓝色背景的左上角有一个红色的小圆环") == dict(
        size="small", colour="red", shape="ring", background="blue", position="top left")
    assert data.parse("nothing known") == {}


def test_scene_for_does_what_the_prompt_asks():
    rng = np.random.default_rng(4)
    for prompt in PROMPTS[:50]:
        scene = data.scene_for(prompt, rng)
        assert all(getattr(scene, a) == value for a, value in data.parse(prompt).items())


# --- evaluate.py --------------------------------------------------------------------------------------------


def test_reads_clean_drawings(drawn):
    row = evaluate.score(drawn, PROMPTS)
    assert min(row[a] for a in (*data.ATTRIBUTES, "joint", "joint_en", "joint_zh")) >= 0.99


def test_reads_slightly_damaged_drawings_and_fails_on_badly_damaged_ones(drawn):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(drawn.shape, generator=generator)
    by_blur = [joint(blurred(drawn, r)) for r in (1, 3, 8)]
    assert by_blur[0] >= 0.95 > 0.85 > by_blur[1] > 0.5 > by_blur[2]
    by_noise = [joint(drawn + s * noise) for s in (0.05, 0.3, 1.0)]
    assert by_noise[0] >= 0.95 > 0.7 > by_noise[1] and by_noise[2] < 0.05


def test_notices_a_shift(drawn):
    readings = [evaluate.read(p) for p in evaluate.to_uint8(drawn)]
    for reading, moved in zip(readings, evaluate.to_uint8(drawn.roll((5, 5), (2, 3)))):
        if reading["position"] == "centre":                  # others may leave the picture
            after = evaluate.read(moved)
            assert abs(after["x"] - reading["x"] - 5) < 0.3 and abs(after["y"] - reading["y"] - 5) < 0.3
    moved = evaluate.accuracy([evaluate.read(p) for p in evaluate.to_uint8(drawn.roll(-13, 2))], PROMPTS)
    assert moved["position"] < 0.5 and moved["colour"] > 0.9


def test_notices_other_colours(drawn):
    row = evaluate.score(drawn.flip(1), PROMPTS)             # red and blue change places
    assert row["shape"] >= 0.99 and row["position"] >= 0.99 and row["colour"] < 0.8 and row["background"] < 0.8
    assert joint((drawn * 0.9)) >= 0.99                      # a little paler is still the same colour


def test_noise_and_blank_pictures_are_near_chance():
    noise = torch.rand(len(PROMPTS), 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for images in (noise, torch.zeros_like(noise)):
        row = evaluate.score(images, PROMPTS)
        assert row["joint"] <= 0.01 and row["shape"] <= 1 / 6 + 0.05 and row["colour"] <= 1 / 8 + 0.12


def test_frechet_distance(drawn):
    a, b = evaluate.features(drawn), evaluate.features(evaluate.drawings(PROMPTS, seed=6))
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6)
    c = evaluate.features(blurred(drawn, 3))
    assert 0 < evaluate.frechet(b, a) < evaluate.frechet(c, a) < evaluate.frechet(evaluate.features(drawn * 0.5), a)
    # Two Gaussians in one dimension each: (difference of means)^2 + (difference of standard deviations)^2, over b's variance.
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(2))
    y = 2 * x + 1
    cov = torch.cov(x.double().T)
    mean = (y - x).double().mean(0).square().sum()
    assert evaluate.frechet(y, x) == pytest.approx(float((mean + cov.trace()) / cov.trace()), rel=1e-6)


def test_statistics(drawn):
    row = evaluate.statistics(drawn)
    assert row["out_of_range"] == 0 and 0.2 < row["saturation"] < 0.8
    assert evaluate.statistics(2 * drawn)["out_of_range"] > 0.2
    assert evaluate.statistics(drawn.mean(1, keepdim=True).expand(-1, 3, -1, -1))["saturation"] == 0


# --- train.py -----------------------------------------------------------------------------------------------


def run(*command):
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_smoke_run_makes_a_checkpoint_that_samples(tmp_path):
    run(SHAPES / "train.py", "--smoke", "--out", tmp_path, "--workers", 2)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log} == {"start", "vae", "teacher", "probe"} and "joint" in log[-1]
    assert {f.name for f in tmp_path.glob("*.png")} == {"vae.png", "samples_000003.png", "samples_000006.png"}
    image = sampler.generate(sampler.load_pipeline(tmp_path / "teacher"), ["a small red circle"], 64, 64, seed=0)
    assert len(image) == 1 and image[0].size == (64, 64)
    table = run(SHAPES / "evaluate.py", "--model", tmp_path / "teacher", "--steps", 1, 2, "--count", 8)
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows[0] == "drawings" and rows[1].startswith("VAE") and [row.split(", ")[1] for row in rows[2:]] == ["1 step", "2 steps"]


def test_training_resumes(tmp_path):
    """Stopped in the middle of each stage and continued, the run ends with the same weights."""
    recipe = train.Recipe(**train.SMOKE)
    weights = []
    for name, stops in (("whole", [None]), ("parts", [3, None])):
        out = str(tmp_path / name)
        os.makedirs(out)
        tokenizer = train.train_tokenizer(recipe.seed)
        for stop in stops:
            vae = train.train_vae(recipe, out, stop_after=stop)
        assert (vae is None) == (stop is not None)
        for stop in stops:
            nets = train.train_teacher(recipe, out, tokenizer, vae, stop_after=stop)
        weights.append({**vae.state_dict(), **nets.state_dict()})
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_wrong_arguments_end_in_one_sentence(tmp_path, capsys, monkeypatch):
    for module, *arguments in ((train, "--out", tmp_path, "--set", "no_such_number=3"), (train, "--out", tmp_path, "--workers", 5),
                               (evaluate, "--prompts", tmp_path / "missing.txt"), (evaluate, "--model", tmp_path / "missing")):
        monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            convert_weights.run_command(module.main)
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_tokenizer():
    tokenizer = train.train_tokenizer(0)
    ids = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert None not in ids and tokenizer.encode("<|im_start|>user\n").ids[0] == ids[1]
    for text in ("a small red circle", "蓝色背景上有一个红色的小圆形", "ünheard-of 🦊\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    prompts = [*evaluate.read_prompts(SHAPES / "prompts.txt"), *evaluate.read_prompts(SHAPES / "prompts_heldout.txt"), ""]
    assert int(train.tokenize(tokenizer, prompts)[1].max()) <= 32      # one block of caption tokens: no mask, no extra cost


# --- The bundled teacher ------------------------------------------------------------------------------------


def test_bundled_teacher():
    folder = SHAPES / "teacher"
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) + (folder / "tokenizer.json").stat().st_size <= 8e6
    pipeline = sampler.load_pipeline(folder)
    settings = json.loads((folder / "config.json").read_text())
    images = evaluate.sample_images(pipeline, PROMPTS[:16], settings["steps"], settings["guidance"])
    assert evaluate.score(images, PROMPTS[:16])["joint"] >= 0.75
    rebuilt, psnr = evaluate.reconstruct(pipeline.vae, evaluate.drawings(PROMPTS, seed=7))
    assert psnr >= 34 and joint(rebuilt) >= 0.99


def test_bundled_student():
    """What sampler.py takes where no model is named: right at its own few steps, without guidance."""
    assert sampler.pick_model(None) == SHAPES / "student"
    pipeline = sampler.load_pipeline(SHAPES / "student")
    assert (pipeline.steps, pipeline.trained_steps, pipeline.guidance) == (4, 4, 0.0)
    images = evaluate.sample_images(pipeline, PROMPTS[:16], pipeline.steps, pipeline.guidance)
    assert evaluate.score(images, PROMPTS[:16])["joint"] >= 0.75


def test_sweep_table(tmp_path):
    """Mean and half the range over seeds; best and last apart only where they differ; options that do not exist end the sweep at once."""
    row = dict.fromkeys(sweep.COLUMNS, 0.5)
    results = [{"name": "4 steps", "seed": seed, "best": row | {"iteration": 80, "joint": joint}, "last": row | {"iteration": last}}
               for seed, joint, last in ((0, 0.8, 120), (1, 0.9, 120))]
    lines = sweep.table(results).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [["| 4 steps, best", "80/80", "0.850 (0.050)"], ["| 4 steps, last", "120/120", "0.500 (0.000)"]]
    assert run_here(sweep.main, "--out", tmp_path, "--iteratoins", "3").returncode == 2
    (tmp_path / "results.jsonl").write_text(json.dumps(results[0] | {"options": ["--lr", "1"]}) + "\n")
    assert refused(run_here(sweep.main, "--out", tmp_path), "options")
