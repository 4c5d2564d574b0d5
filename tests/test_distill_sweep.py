"""tutorials/cards/sweep.py: its variants are commands of distill.py; results and tables."""

import json
import multiprocessing
import os
import signal
from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import torch

import dial
import distill
import evaluate
import files
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


def stand_in(name, seed, options, job):
    """In place of run_variant. "2 steps" fails, "4 steps" is killed, "8 steps" stops the sweep."""
    if name == "2 steps":
        raise ValueError("this run fails\n")
    if name == "4 steps":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "8 steps":
        for number in (job.count, *sweep.STOP):           # Ctrl-C comes to all, and again
            os.kill(os.getpid(), number)
            os.kill(os.getppid(), number)
        signal.pause()
    return [result(name, seed) | {"options": options, "inputs": sweep.inputs(job, options)}]


@pytest.fixture
def sweep_here(tmp_path, monkeypatch):
    """Runs the command with stand_in. Its processes are forked, which takes no seconds."""
    monkeypatch.setattr(sweep, "get_context", lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr(sweep, "run_variant", stand_in)
    before = {number: signal.getsignal(number) for number in sweep.STOP}
    yield partial(run_here, sweep.main, "--out", tmp_path / "sweep")
    for number, handler in before.items():
        signal.signal(number, handler)


def seeds_done(tmp_path):
    lines = (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()
    return [(r["variant"], r["seed"]) for r in map(json.loads, lines)]


def test_a_sweep_goes_on_and_a_failure_does_not_end_it(tmp_path, sweep_here):
    run = partial(sweep_here, "--only", "2 steps", "4 steps", "1 step", "--seeds")
    first = run(0, 1, "--workers", 2)
    assert first.returncode == 1 and first.stderr.count("\n") == 4
    for words in ("2 steps, seed 0: ValueError", "2 steps, seed 1", "4 steps, seed 0: its process",
                  "4 steps, seed 1", "exit code -9"):
        assert f"{words}" in first.stderr
    assert sorted(seeds_done(tmp_path)) == [("1 step", 0), ("1 step", 1)]
    assert "| 1 step |" in (tmp_path / "sweep" / "table.md").read_text()
    again = run(1, 2)
    assert "seed 0" not in again.stderr                            # what was chosen
    assert sorted(seeds_done(tmp_path)) == [("1 step", 0), ("1 step", 1), ("1 step", 2)]
    assert sweep_here("--only", "1 step", "--seeds", 0, 1).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_and_keeps_what_is_done(tmp_path, sweep_here, number):
    """The run that goes on is ended by the sweep, and the next one does not begin."""
    done = sweep_here("--only", "1 step", "8 steps", "CA + DM", "--seeds", 0,
                      "--count", int(number))
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert seeds_done(tmp_path) == [("1 step", 0)]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("options", [
    ["--iterations", 3], ["--count", 7], ["--watch", 7], ["--score-steps", 7],
    ["--held-out", sweep.HERE / "prompts.txt"]])
def test_results_of_other_options_are_not_mixed(tmp_path, sweep_here, options):
    assert sweep_here("--only", "1 step", "--seeds", 0).returncode == 0
    assert refused(sweep_here("--only", "1 step", "--seeds", 1, *options), "name another --out")
    assert seeds_done(tmp_path) == [("1 step", 0)]


def test_results_of_another_teacher_are_not_mixed(tmp_path, sweep_here, monkeypatch):
    """Also where the options are the same: the bundled teacher may have been trained again."""
    run = partial(sweep_here, "--only", "1 step", "--seeds")
    assert run(0).returncode == 0
    before = distill.fingerprints
    monkeypatch.setattr(distill, "fingerprints", lambda args: ["another", before(args)[1]])
    assert refused(run(1), "another teacher")
    monkeypatch.undo()
    assert seeds_done(tmp_path) == [("1 step", 0)]


@pytest.mark.skipif(not files.fcntl, reason="this system locks no folders")
def test_two_sweeps_do_not_share_a_folder(tmp_path, sweep_here):
    """Each would run what the other runs, and both would write its results."""
    run = partial(sweep_here, "--only", "1 step", "--seeds", 0)
    with files.alone_in(tmp_path / "sweep"):
        assert refused(run(), tmp_path / "sweep", "another process")
    assert run().returncode == 0 and seeds_done(tmp_path) == [("1 step", 0)]


def test_half_a_line_is_no_result_and_other_damage_is_refused(tmp_path, sweep_here):
    run = partial(sweep_here, "--only", "1 step", "--seeds")
    assert run(0).returncode == 0
    path = tmp_path / "sweep" / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert sweep_here("--table").returncode == 0
    assert run(1).returncode == 0 and seeds_done(tmp_path) == [("1 step", 0), ("1 step", 1)]
    for text in ("{half\n", "[]\n", '{"variant": "1 step"}\n'):
        path.write_text(text + whole)
        assert refused(sweep_here("--table"), path, "damaged")


def test_the_table_reads_results_that_do_not_say_how_they_were_scored(tmp_path, sweep_here):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "results.jsonl").write_text(json.dumps(result("1 step", 0)) + "\n")
    assert "| 1 step | 4 | 1 |" in sweep_here("--table").stdout
    assert refused(sweep_here("--only", "1 step"), "name another --out")


OTHER_TEACHER = ["--prompts", str(sweep.HERE / "prompts.txt"), "--teacher"]


@pytest.mark.parametrize("arguments, word", [
    (["--only", "no such variant"], "no such variant"), (["--iterations", "0"], "--iterations"),
    (["--seeds", "-1"], "--seeds"), (["--workers", "0"], "--workers"),
    (["--only", "CA alone", "--warmup", "5"], "--warmup"), (["--held-out", "nofile"], "nofile"),
    (["--held-out", os.devnull], "--held-out"), (["--prompts", "nofile"], "nofile"),
    ([*OTHER_TEACHER, "nowhere"], "nowhere"), (["--device", "cuda:99"], "cuda:99"),
    (["--size", "64"], "--size"), (["--size=64"], "--size"), (["--resume"], "--resume"),
    (["--overwrite"], "--overwrite"), (["--seed", "3"], "--seed "),
    (["--accumulate", "17"], "--accumulate"), (["--lora", "193"], "--lora"),
    (["--only", "LoRA 64", *OTHER_TEACHER, str(TINY)], "error: LoRA 64: --lora 64"),
    (["--only", "1 step, step-aware fake", "--lora", "4"], "1 step, step-aware fake: with --lora"),
    (["--table", "--only", "1 step"], "--table"), (["--table", "--alpha", "2"], "--table")])
def test_wrong_options_are_refused(tmp_path, sweep_here, arguments, word):
    assert refused(sweep_here(*arguments), word)
    assert not (tmp_path / "sweep").exists()


def test_new_images_are_those_of_every_number_of_steps(monkeypatch):
    seen = []
    monkeypatch.setattr(distill, "backward_simulation",
                        lambda net, x, text, times, step: (seen.append(len(times) - 1), (x, x))[1])
    monkeypatch.setattr(distill, "fake_loss", lambda *_: None)
    monkeypatch.setattr(sweep.scale, "AutocastNet", lambda net, *_: net)
    pipeline, text = Namespace(shift=3.0, device="cpu"), None
    for steps in ([2], [1, 4]):
        parts = sweep.fresh_images(pipeline, Namespace(steps=steps, seed=0, dtype="float32"))
        parts["adjust"](Namespace(nets={"student": None}))
        for _ in range(12):
            parts["fake_loss"](None, torch.zeros(1, 1, 2, 2), None, text, None)
        assert set(seen) == set(steps)
        seen.clear()


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


def test_ca_truncated_leaves_out_late_times():
    nets, (text, null_text, x) = make_nets(), inputs()
    t = torch.linspace(0.2, 0.8, len(x))
    call = nets.teacher, x, t, text, null_text, 4.0, x.flip(0), True
    whole, part = distill.cfg_augmentation(*call), sweep.ca_truncated(0.5, None, None)["ca"](*call)
    early = t <= 0.5
    assert 0 < early.sum() < len(x) and whole[~early].any()
    assert torch.equal(part[early], whole[early]) and not part[~early].any()


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
    ({"steps": 1}, "steps"), ({"trained_steps": [1, 2]}, "trained_steps"),
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
    for options in (("--steps", 2), ("--count", 2), ("--seed", 0), ("--json", tmp_path / "x.json")):
        assert refused(run("--out", tmp_path / "new", "--share", 0.5, *options), options[0])
    assert refused(run("--out", ""), "--out")
    teacher = sweep.HERE / "teacher"
    assert refused(run_here(dial.main, "--low", teacher, "--high", teacher), "wants guidance")
    assert refused(run("--out", tmp_path, "--share", 0.5), "exists already")
    assert refused(run("--out", tmp_path / "new", "--share", 0.2, 0.5), "one --share")
    assert not list(tmp_path.iterdir())
    assert run("--out", tmp_path / "new", "--share", 0.5).returncode == 0
    mean, low = (sampler.load_pipeline(path).dit.state_dict() for path in (tmp_path / "new", TINY))
    for name, w in low.items():
        torch.testing.assert_close(mean[name], w.bfloat16().float())


def test_the_dial_prints_open_and_given_accuracy(tmp_path, monkeypatch):
    """The seed is that of the pictures and of the diversity. A group may have no prompts."""
    seeds, row = [], {name: 0.5 for name in dial.COLUMNS} | {"open": {"joint": 0.25}}

    def sample(student, prompts, steps, guidance, seed):
        seeds.append(seed)
        return torch.rand(2, 3, 8, 8)
    monkeypatch.setattr(evaluate, "sample_images", sample)
    monkeypatch.setattr(evaluate, "drawings", lambda prompts, *_: torch.rand(2, 3, 8, 8))
    monkeypatch.setattr(evaluate, "score", lambda *_: dict(row))
    monkeypatch.setattr(evaluate, "OPEN_PROMPTS", ["a fox"])
    out = tmp_path / "out.json"
    run = partial(run_here, dial.main, "--low", TINY, "--high", TINY, "--share", 0.5, "--seed", 7)
    done = run("--count", 2, "--json", out).stdout.splitlines()
    assert done[0].startswith("| share | joint | open | given |")
    assert done[2].startswith("| 0.5 | 0.500 | 0.250 | 0.500 |") and seeds == [7, 8]
    assert json.loads(out.read_text())["open"]["joint"] == 0.25
    del row["given"]
    assert "| 0.250 |  |" in run("--count", 1).stdout
    assert refused(run("--count", 1001), "--count 1001")
