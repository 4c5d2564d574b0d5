"""tutorials/cards/sweep.py: its variants are commands of distill.py; results and tables."""

import json
from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import torch

import dial
import distill
import sampler
import sweep
from conftest import TINY, refused, run_here
from convert_weights import UserError
from distill import Settings
from test_distill import generator, inputs, make_nets, training_step


@pytest.mark.parametrize("name", sweep.VARIANTS)
def test_every_variant_is_a_command(name):
    own, changes = sweep.VARIANTS[name]
    args = distill.parse_arguments([*own, "--seed", "1"])
    assert args.seed == 1 and callable(changes)


def result(name, seed, steps=4, **figures):
    return {"variant": name, "seed": seed, "steps": steps, "options": [],
            "score": {"joint": 0.5, "open": {"joint": 0.25}} | figures}


def test_the_table_has_means_and_half_ranges():
    results = [result("4 steps", seed, joint=joint) for seed, joint in enumerate((0.8, 0.9, 0.94))]
    lines = sweep.table([*results, result("1 step", 0, steps=1)]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 1 step | 1 | 1 | 0.500 (0.000) |  |  | 0.250")
    assert lines[3].startswith("| 4 steps | 4 | 3 | 0.880 (0.070) |")


def quick_teacher(folder):
    """The bundled teacher with one step without guidance as its default."""
    bundled = sweep.HERE / "teacher"
    folder.mkdir()
    for file in bundled.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((bundled / "config.json").read_text(encoding="utf-8"))
    config |= {"steps": 1, "guidance": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_variant_is_trained_and_scored(tmp_path):
    job = Namespace(out=str(tmp_path), held_out=sweep.HERE / "prompts_heldout.txt", count=3,
                    watch=2, score_steps=[1, 2], keep=False)
    options = ["--iterations", "2", "--batch-size", "8", "--sample-every", "1",
               "--teacher", str(quick_teacher(tmp_path / "teacher")),
               "--prompts", str(sweep.HERE / "prompts.txt")]
    first, second = sweep.run_variant("CA alone", 5, options, job)
    assert (first["steps"], second["steps"], second["seed"]) == (1, 2, 5)
    assert first["log"]["dm_rms"] == 0 < first["log"]["ca_rms"]          # without a shield
    score = second["score"]
    assert score["best_at"] in (1, 2) and 0 <= score["best"] <= 1 and 0 <= score["joint"] <= 1
    assert 0.5 < score["latent_std"] < 2 and score["megabytes"] > 5
    folder = tmp_path / "CA_alone-5"
    assert (folder / "log.jsonl").exists() and not (folder / "student").exists()


class DoneNow:
    """Stands for a pool of processes: runs each job at once."""

    def __init__(self, *_, **__):
        self.jobs = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, name, seed, options, job):
        self.jobs.append((name, seed))
        return Done(name, seed)


class Done:
    def __init__(self, name, seed):
        self.name, self.seed = name, seed

    def result(self):
        if self.name == "2 steps":
            raise ValueError("this run fails")
        return [result(self.name, self.seed)]


def test_a_sweep_goes_on_and_one_failure_does_not_end_it(tmp_path, monkeypatch):
    pools = []

    def make_pool(*arguments, **options):
        pools.append(DoneNow())
        return pools[-1]
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", make_pool)
    monkeypatch.setattr(sweep, "as_completed", list)
    run = partial(run_here, sweep.main, "--out", tmp_path / "sweep", "--only", "1 step", "2 steps",
                  "--seeds", 0, 1)
    first = run()
    assert first.returncode == 0 and "2 steps" in first.stderr and "this run fails" in first.stderr
    assert run().returncode == 0
    assert pools[0].jobs == [("1 step", 0), ("2 steps", 0), ("1 step", 1), ("2 steps", 1)]
    assert pools[1].jobs == [("2 steps", 0), ("2 steps", 1)]       # only what is missing
    lines = (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
    assert "| 1 step |" in (tmp_path / "sweep" / "table.md").read_text()
    assert refused(run("--iterations", 3), "other options")


@pytest.mark.parametrize("arguments, word", [
    (["--only", "no such variant"], "no such variant"), (["--iterations", "0"], "--iterations"),
    (["--seeds", "-1"], "--seeds"), (["--workers", "0"], "--workers")])
def test_wrong_options_are_refused(tmp_path, arguments, word):
    assert refused(run_here(sweep.main, "--out", tmp_path / "sweep", *arguments), word)
    assert not (tmp_path / "sweep").exists()


def test_the_data_space_loss_weighs_velocities():
    """|x_hat - x|^2 is (1 - tau)^2 times the squared error of the velocity."""
    nets, (text, _, noise) = make_nets(), inputs()
    x, t = noise.flip(0), torch.full((len(noise),), 0.75)
    loss = sweep.data_space(None, None)["fake_loss"](nets.fake, x, t, text, noise)
    wanted = 0.25 ** 2 * distill.fake_loss(nets.fake, x, t, text, noise)
    torch.testing.assert_close(loss, wanted)


def test_ca_between_limits_looks_there_only():
    seen = []

    def teacher(x, t, text):
        seen.append(t)
        return torch.zeros_like(x)
    nets = make_nets(**sweep.ca_between(0.7, 1.0, None, None))
    nets.teacher = teacher
    training_step(nets, *inputs(), Settings(), generator())
    _, cond, uncond = seen
    assert torch.equal(cond, uncond) and cond.min() >= 0.7 and cond.max() <= 1


# --- A student between two students -------------------------------------------------------------


def test_a_student_between_two():
    """Share 0 and 1 are the two students, and half is the mean of their weights."""
    low, high = sampler.load_pipeline(TINY), sampler.load_pipeline(TINY)
    for p in high.dit.parameters():
        p.data += 1
    half = dial.between(low, high, 0.5).dit.state_dict()
    for name, w in low.dit.state_dict().items():
        torch.testing.assert_close(half[name], w + 0.5)
        assert torch.equal(dial.between(low, high, 0.0).dit.state_dict()[name], w)


@pytest.mark.parametrize("change, words", [
    ({"shift": 9.0}, "shift"), ({"size": 64}, "size"), ({"vae": None}, "vae"),
    ({"text_encoder": None}, "text_encoder"), ({"tokenizer": None}, "tokenizer"), ({}, None)])
def test_the_dial_takes_students_of_one_teacher(change, words):
    """They may differ in the weights of the DiT only: all else would come from one of them."""
    low, high = sampler.load_pipeline(TINY), sampler.load_pipeline(TINY)
    for name in change.keys() & {"vae", "text_encoder"}:
        next(getattr(high, name).parameters()).data += 1
    if "tokenizer" in change:
        high.tokenizer.add_tokens(["new"])
    high = replace(high, **{name: value for name, value in change.items() if value})
    if words is None:
        next(high.dit.parameters()).data += 1
        dial.check_siblings(low, high)
    else:
        with pytest.raises(UserError, match=f"differ in {words}"):
            dial.check_siblings(low, high)


def test_the_dial_writes_one_student_and_over_nothing(tmp_path):
    run = partial(run_here, dial.main, "--low", TINY, "--high", TINY)
    assert refused(run("--out", tmp_path, "--share", 0.5), "exists already")
    assert refused(run("--out", tmp_path / "new", "--share", 0.2, 0.5), "one --share")
    assert not list(tmp_path.iterdir())
    assert run("--out", tmp_path / "new", "--share", 0.5).returncode == 0
    mean, low = (sampler.load_pipeline(path).dit.state_dict() for path in (tmp_path / "new", TINY))
    for name, w in low.items():
        torch.testing.assert_close(mean[name], w.bfloat16().float())
