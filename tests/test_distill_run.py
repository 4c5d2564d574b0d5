"""A run of distill.py on the tiny teacher: what it leaves, how it goes on, how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import distill
import files
import formats
import sampler
import scale
from conftest import ROOT, TINY, Failing, Recorder, refused, run_here


class Command:
    """distill.py on the tiny teacher: two iterations at 32x32, unless told otherwise."""

    def __init__(self, folder):
        self.out, self.prompts = folder / "run", folder / "prompts.txt"
        self.prompts.write_text("a cat\na dog\n\n一只狐狸\n", encoding="utf-8")

    def __call__(self, *arguments):
        return run_here(
            distill.main, "--teacher", TINY, "--prompts", self.prompts, "--out", self.out,
            "--size", 32, "--steps", 4, "--iterations", 2, "--batch-size", 2, "--fake-updates", 1,
            "--log-every", 1, *arguments)

    def resume(self, *arguments):
        return run_here(distill.main, "--out", self.out, "--resume", *arguments)

    def log(self):
        lines = (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def log_without_seconds(self):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in self.log()]

    def checkpoints(self):
        return sorted(folder.name for folder in (self.out / "checkpoints").iterdir())

    def tensors(self):
        newest = self.out / "checkpoints" / self.checkpoints()[-1]
        tensors = load_file(next(newest.glob("*.safetensors")))
        return {name: tensor.clone() for name, tensor in tensors.items()}   # not views of the file


@pytest.fixture
def command(tmp_path):
    return Command(tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run of two iterations and two checkpoints, made once."""
    command = Command(tmp_path_factory.mktemp("finished"))
    assert command("--sample-every", 1, "--constant-rate").returncode == 0
    return command.out


@pytest.fixture
def finished(finished_run, command):
    """A copy of it, to damage or to go on with."""
    shutil.copytree(finished_run, command.out)
    path = command.out / "config.json"
    config = path.read_text().replace(str(finished_run.parent), str(command.out.parent))
    path.write_text(config)
    return command


class OnCall:
    """Stands for distill.training_step; does something else in the calls with these numbers."""

    def __init__(self, numbers, action):
        self.numbers, self.action, self.count = numbers, action, 0
        self.step = distill.training_step

    def __call__(self, *arguments):
        self.count += 1
        if self.count in self.numbers:
            self.action()
        return self.step(*arguments)


def not_finite():
    raise FloatingPointError("a loss or its gradient is not finite")


def kill():
    raise MemoryError("as if killed")


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- What a run leaves --------------------------------------------------------------------------


def test_a_run_leaves_all_it_promises(command):
    result = command("--sample-every", 1, "--warmup", 1)
    assert result.returncode == 0, result.stderr
    assert "sampler.py" in result.stdout and str(command.out / "student") in result.stdout
    assert {f.name for f in command.out.iterdir()} == {
        "config.json", "log.jsonl", "samples", "student", "checkpoints"}
    assert sorted(f.name for f in (command.out / "samples").iterdir()) == [
        "000001.png", "000002.png"]
    assert command.checkpoints() == ["00000002", "00000003"]       # the warm-up counts
    student = sampler.load_pipeline(command.out / "student")
    assert (student.steps, student.trained_steps, student.guidance) == (4, 4, 0.0)
    assert (student.size, student.shift) == (32, 3.0)


def test_the_log_tells_a_good_run_from_a_bad_one(command):
    assert command().returncode == 0
    assert [line["iteration"] for line in command.log()] == [1, 2]
    for name in ("loss", "fake_loss", "dm_rms", "ca_rms", "dm_over_ca", "cosine", "x_mean", "x_std",
                 "std_ratio", "saturation", "fake_floor", "forwards", "backwards", "skipped", "lr",
                 "fake_lr", "seconds"):
        assert isinstance(command.log()[-1][name], float), name


def test_the_log_has_the_saturation_of_its_own_pictures(command):
    assert command("--iterations", 3, "--sample-every", 2, "--keep", 9).returncode == 0
    logged = {line["iteration"]: line.get("saturation") for line in command.log()}
    assert logged[1] is None                               # there were no pictures yet
    for name in command.checkpoints():
        progress = json.loads((command.out / "checkpoints" / name / "progress.json").read_text())
        assert logged[int(name)] == pytest.approx(progress["saturation"], rel=1e-5)


def test_without_a_spear_there_is_no_ratio_to_it(command):
    assert command("--alpha", 1).returncode == 0
    assert command.log()[-1]["ca_rms"] == 0 and "dm_over_ca" not in command.log()[-1]


def test_the_log_counts_the_passes_of_the_algorithm(command, monkeypatch):
    """Student: step + 1; teacher: one for DM, two for CA; fake: one for DM, one an update."""
    recorder = Recorder(distill.backward_simulation)
    monkeypatch.setattr(distill, "backward_simulation", recorder)
    assert command("--fake-updates", 3).returncode == 0
    for line, (*_, step) in zip(command.log(), recorder.calls, strict=True):
        assert line["forwards"] == (step + 1) + 3 + 1 + 3 and line["backwards"] == 1 + 3


def test_rates_rise_and_fall(command):
    assert command("--lr", 1e-7, "--fake-lr", 3e-8, "--iterations", 3).returncode == 0
    assert [line["lr"] for line in command.log()] == pytest.approx(
        [1e-7 * i / distill.RAMP for i in (1, 2, 3)])
    assert command.log()[0]["fake_lr"] == 3e-8
    args = distill.parse_arguments([])
    assert args.iterations == 300 and args.steps == [4, 1, 2, 8]
    assert distill.learning_rate(290, args) == pytest.approx(2e-4 * 10 / 300)
    args.constant_rate = True
    assert distill.learning_rate(290, args) == 2e-4


def test_the_student_is_the_average_of_its_weights(command):
    """After one iteration with --ema .5 the average has moved by 1 - min(.5, 1 / 10) = .9."""
    assert command("--ema", 0.5, "--iterations", 1, "--lr", 1e-2).returncode == 0
    state, teacher = command.tensors(), sampler.load_pipeline(TINY).dit.state_dict()
    student = load_file(command.out / "student" / "dit.safetensors")
    moved = 0
    for name, start in teacher.items():
        wanted = torch.lerp(start, state[f"student.{name}"], 0.9)
        torch.testing.assert_close(state[f"averaged.{name}"], wanted)
        assert torch.equal(student[name], wanted.to(torch.bfloat16))
        moved += not torch.equal(start, wanted)
    assert moved > 10


def test_std_ratio_compares_with_the_teachers_pictures(command):
    assert command().returncode == 0
    teacher, wanted = sampler.load_pipeline(TINY), []
    for prompt, seed in (("a cat", 0), ("a dog", 1), ("一只狐狸", 2)):
        wanted.append(sampler.generate(teacher, prompt, 32, 32, seed=seed, output="latent"))
    line = command.log()[-1]
    ratio = line["x_std"] / torch.cat(wanted).std().item()
    assert line["std_ratio"] == pytest.approx(ratio, rel=1e-3)


def test_a_student_of_several_numbers_of_steps(command, monkeypatch):
    recorder = Recorder(distill.training_step)
    monkeypatch.setattr(distill, "training_step", recorder)
    assert command("--steps", "2,1,8", "--iterations", 12).returncode == 0
    drawn = {arguments[4].steps for arguments in recorder.calls}
    assert drawn == {1, 2, 8}
    student = sampler.load_pipeline(command.out / "student")
    assert student.steps == 2 and list(student.trained_steps) == [2, 1, 8]


def test_follow_pulls_the_fake_to_the_student(command):
    """--follow 1 makes the fake the student; the fake's own optimizer goes on."""
    assert command("--follow", 1, "--lr", 1e-3).returncode == 0
    state = command.tensors()
    names = [name for name in state if name.startswith("student.") and "exp_avg" not in name
             and not name.endswith(".step")]
    assert len(names) > 10
    for name in names:
        assert torch.equal(state[name], state[name.replace("student.", "fake.", 1)]), name


def test_no_dm_trains_no_fake(command):
    result = command("--no-dm", "--fake-updates", 5)
    assert result.returncode == 0 and "--fake-updates" in result.stderr
    assert all("fake_loss" not in line and line["dm_rms"] == 0 for line in command.log())
    state, teacher = command.tensors(), sampler.load_pipeline(TINY).dit.state_dict()
    assert all(torch.equal(state[f"fake.{name}"], value) for name, value in teacher.items())


def test_a_prompt_file_is_read_line_by_line(tmp_path):
    lines = [f"prompt {i} 猫" for i in range(5000)]
    path = tmp_path / "many.txt"
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n  \n", encoding="utf-8")
    prompts = scale.PromptFile(path)
    assert len(prompts) == 5000 and [prompts[i] for i in (0, 17, 4999)] == [
        lines[i] for i in (0, 17, 4999)]
    assert max(len(str(value)) for value in vars(prompts).values()) < 10 * 5000   # places only


# --- Going on -----------------------------------------------------------------------------------


def test_a_resumed_run_is_the_run_that_never_stopped(command, monkeypatch, tmp_path):
    """Cut off in the fourth iteration of five, moved, and resumed from another directory."""
    options = ["--iterations", 5, "--sample-every", 2, "--warmup", 2, "--log-every", 3]
    assert command(*options).returncode == 0
    whole, log = command.tensors(), command.log_without_seconds()
    with monkeypatch.context() as patch:
        patch.setattr(distill, "training_step", OnCall([4], kill))
        assert command(*options, "--overwrite").returncode == 2
    assert command.checkpoints()[-1] == "00000004"
    with open(command.out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iterat')                               # as a killed process leaves it
    command.out = command.out.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    command.out = "../moved"
    assert command.resume().returncode == 0
    command.out = tmp_path / "moved"
    assert same_tensors(whole, command.tensors())
    assert command.log_without_seconds() == log


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(command, monkeypatch, number, code):
    options = ["--iterations", 4, "--log-every", 3]
    assert command(*options).returncode == 0
    whole, log = command.tensors(), command.log_without_seconds()
    with monkeypatch.context() as patch:
        patch.setattr(distill, "training_step", OnCall([2], lambda: os.kill(os.getpid(), number)))
        result = command(*options, "--overwrite")
    assert result.returncode == code and "--resume" in result.stderr
    assert command.checkpoints() == ["00000002"]
    assert command.resume().returncode == 0
    assert same_tensors(whole, command.tensors())
    # The last pictures are those of the end, so only their figure differs before.
    assert command.log_without_seconds()[-1] == log[-1]


def test_a_signal_in_the_warm_up_saves_too(command, monkeypatch):
    with monkeypatch.context() as patch:
        step = Recorder(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(distill, "warm_up", step)
        assert command("--warmup", 3).returncode == 0
    assert command.checkpoints() == ["00000001"]
    assert command.resume().returncode == 0 and len(command.log()) == 2


@pytest.mark.slow
def test_the_last_checkpoints_are_kept(command):
    assert command("--iterations", 5, "--sample-every", 1, "--keep", 3).returncode == 0
    assert command.checkpoints() == ["00000003", "00000004", "00000005"]


def test_a_run_that_ends_before_its_first_checkpoint_begins_again(command, monkeypatch):
    assert command("--constant-rate").returncode == 0
    wanted = command.log_without_seconds()
    with monkeypatch.context() as patch:
        patch.setattr(distill, "training_step", OnCall([2], kill))
        assert command("--constant-rate", "--overwrite").returncode == 2
    assert len(command.log()) == 1 and not (command.out / "checkpoints").exists()
    assert command.resume().returncode == 0
    assert command.log_without_seconds() == wanted


def test_a_signal_before_the_first_iteration_ends_the_run(command, monkeypatch):
    ask = Recorder(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(scale, "mean_loss", ask)
    assert command().returncode == 0 and len(ask.calls) == 1
    monkeypatch.undo()
    assert command.resume().returncode == 0 and len(command.log()) == 2


def test_a_run_cannot_be_made_shorter(finished):
    before = (finished.out / "config.json").read_text()
    assert refused(finished.resume("--iterations", 1), "--iterations 1", "2 already")
    assert (finished.out / "config.json").read_text() == before


def test_a_checkpoint_is_written_once(finished, monkeypatch):
    save = Recorder(lambda *_, **__: None)
    monkeypatch.setattr(scale.dcp, "save", save)
    assert finished.resume().returncode == 0 and not save.calls


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(finished):
    assert finished.resume("--iterations", 4).returncode == 0
    assert [line["iteration"] for line in finished.log()] == [1, 2, 3, 4]
    assert finished.resume().returncode == 0 and len(finished.log()) == 4


def test_another_run_is_refused(finished):
    assert refused(finished.resume("--alpha", 3), "--alpha", "4.0", "3.0")
    assert refused(finished.resume("--steps", "1,2"), "--steps")
    finished.prompts.write_text("other prompts\n", encoding="utf-8")
    assert refused(finished.resume(), "prompts")


def test_teacher_and_prompts_may_lie_elsewhere(finished, tmp_path):
    moved = finished.prompts.rename(tmp_path / "moved.txt")
    teacher = shutil.copytree(TINY, tmp_path / "teacher")
    result = finished.resume("--iterations", 3, "--prompts", moved, "--teacher", teacher)
    assert result.returncode == 0, result.stderr
    assert finished.resume("--iterations", 4).returncode == 0       # it remembers the new place


def test_a_run_goes_on_with_its_teacher_from_the_hub(finished, monkeypatch):
    monkeypatch.setattr(formats, "download", lambda name, named: TINY)
    result = finished.resume("--iterations", 3, "--teacher", "tiny/model")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["teacher", "prompts"])
def test_what_has_moved_is_asked_for_by_its_option(finished, tmp_path, name):
    config = finished.out / "config.json"
    place = {"teacher": str(TINY), "prompts": str(finished.prompts)}[name]
    config.write_text(config.read_text().replace(place, str(tmp_path / "gone")))
    assert refused(finished.resume("--iterations", 3), "gone", f"--{name}")


@pytest.mark.parametrize("numbers, code", [
    ([signal.SIGINT, signal.SIGINT], 130), ([signal.SIGTERM, signal.SIGTERM], 0),
    ([0, signal.SIGINT], 130), ([signal.SIGTERM, 0], 0)])
def test_a_signal_at_any_process_ends_all(numbers, code, tmp_path):
    """Each process has its own number; the mean over processes is the same for all."""
    class Two(distill.Run):
        def __init__(self):
            self.progress, self.saved = scale.Progress(), 0
            self.processes = SimpleNamespace(mean=self.mean)

        def mean(self, mine):
            number = numbers[1]
            other = {"any": number > 0, "int": number == signal.SIGINT}
            return {name: (mine[name] + other[name]) / 2 for name in mine}

        def save_checkpoint(self):
            self.saved += 1

    run = Two()
    with pytest.raises(SystemExit) as end:
        run.end_if_asked(numbers[0])
    assert end.value.code == code and run.saved == 1


def test_a_hub_name_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert distill.model_name("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert distill.model_name("owner/name") == str(tmp_path / "owner" / "name")


def test_a_new_folder_for_features_is_no_hub_name(tmp_path, monkeypatch):
    """A relative name would be another folder when the run is resumed from elsewhere."""
    monkeypatch.chdir(tmp_path)
    args = distill.parse_arguments(["--cache-features", "runs/features"])
    assert args.cache_features == str(tmp_path / "runs" / "features")


def test_leftovers_of_a_dead_process_are_removed(finished):
    (finished.out / "checkpoints" / files.new_name()).mkdir()
    assert finished.resume("--iterations", 3).returncode == 0
    assert not list(finished.out.rglob("*.part*"))


def damage_bytes(path):
    path.write_bytes(path.read_bytes()[:200])


def drop_tensors(path):
    path.write_bytes((TINY / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())


@pytest.mark.parametrize("name, content", [
    ("progress.json", b""), ("progress.json", b"[]"), ("progress.json", b'{"done": 1, "else": 2}'),
    ("progress.json", b'{"done": "3"}'), ("progress.json", b'{"done": NaN}'),
    ("progress.json", b'{"recent": 5}'), ("progress.json", b'{"done": 2, "recent": [1]}'),
    ("progress.json", b'{"done": 2, "recent": [{"loss": "x"}]}'),
    ("progress.json", b'{"done": 2, "recent": [{"loss": 1.0}, {"other": 1.0}]}'),
    ("progress.json", b'{"done": 1000000000}'), ("progress.json", b'{"done": -2}'),
    ("progress.json", b'{"done": 1%s}' % (400 * b"0")),
    ("progress.json", b'{"done": 2, "seconds": NaN}'), ("*.safetensors", b"not a checkpoint"),
    ("*.safetensors", b""), ("../../log.jsonl", b"\xff\xfe"), ("../../log.jsonl", b"[1]\n"),
    ("../../log.jsonl", b'{"iteration": null}\n'), ("../../config.json", b"{}"),
    ("../../config.json", b'{"made_by": "distill.py"}'),
    ("../../config.json", b'{"made_by": "distill.py", "arguments": [1]}'),
    ("../../config.json", b'{"made_by": "distill.py", "arguments": ["--lr=null"]}')])
def test_damaged_files_end_in_one_sentence(finished, name, content):
    newest = finished.out / "checkpoints" / finished.checkpoints()[-1]
    path = newest / name if ".." in name else next(newest.glob(name))
    path.write_bytes(content)
    assert refused(finished.resume("--iterations", 3))


def test_a_checkpoint_of_another_network_is_refused(finished):
    newest = finished.out / "checkpoints" / finished.checkpoints()[-1]
    drop_tensors(next(newest.glob("*.safetensors")))
    assert refused(finished.resume("--iterations", 3), newest)


def test_a_checkpoint_that_was_cut_off_is_one_sentence(finished):
    """In a process of its own: PyTorch would log a traceback there."""
    weights = next((finished.out / "checkpoints" / "00000002").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    command = [sys.executable, ROOT / "distill.py", "--out", finished.out, "--resume"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert refused(result, "00000002", "damaged") and len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_can_be_removed(finished):
    whole = finished.tensors()
    damage_bytes(next((finished.out / "checkpoints" / "00000002").glob("*.safetensors")))
    assert refused(finished.resume(), "00000002")
    shutil.rmtree(finished.out / "checkpoints" / "00000002")
    assert finished.resume().returncode == 0 and same_tensors(whole, finished.tensors())


@pytest.mark.parametrize("name", ["0-notes.txt", "00000001-good", "00000003.old", "1-notes.txt"])
def test_only_eight_digits_are_a_checkpoint(finished, name):
    own = finished.out / "checkpoints" / name
    if name.endswith(".txt"):
        own.write_text("mine")
    else:
        shutil.copytree(finished.out / "checkpoints" / "00000001", own)
    assert finished.resume("--iterations", 3, "--keep", 1).returncode == 0
    assert finished.checkpoints() == sorted(["00000003", name])
    assert finished.log()[-1]["iteration"] == 3


def test_a_student_that_is_missing_is_written_from_the_checkpoint(finished):
    before = (finished.out / "student" / "dit.safetensors").read_bytes()
    shutil.rmtree(finished.out / "student")
    result = finished.resume()
    assert result.returncode == 0 and "student" in result.stdout
    assert (finished.out / "student" / "dit.safetensors").read_bytes() == before


def test_two_runs_in_one_folder(finished):
    with files.alone_in(finished.out):
        assert refused(finished.resume("--iterations", 3), "another process")
        assert refused(finished("--overwrite"), "another process")
    assert finished.checkpoints() == ["00000001", "00000002"]
    assert finished.resume("--iterations", 3).returncode == 0


def test_overwriting_does_not_remove_what_the_run_needs(finished):
    student = finished.out / "student"
    before = {path: path.read_bytes() for path in student.iterdir()}
    result = run_here(distill.main, "--teacher", student, "--prompts", finished.prompts,
                      "--out", finished.out, "--overwrite")
    assert refused(result, "--teacher", "--out")
    prompts = shutil.copy(finished.prompts, finished.out / "samples" / "prompts.txt")
    assert refused(finished("--overwrite", "--prompts", prompts), "--prompts", "--out")
    cache = finished.out / "student" / "cache"
    assert refused(finished("--overwrite", "--cache-features", cache), "--cache-features", "--out")
    assert {path: path.read_bytes() for path in student.iterdir()} == before
    assert finished.resume("--iterations", 3).returncode == 0


def test_a_run_inside_its_teacher(command, checkpoint):
    """The teacher would not be the same any more, so that the run could not go on."""
    command.out = checkpoint / "run"
    assert refused(command("--teacher", checkpoint), "--teacher", "--out")
    assert not command.out.exists()


def test_a_run_inside_the_bundled_teacher(command, monkeypatch, tmp_path):
    bundled = shutil.copytree(TINY, tmp_path / "teacher")
    monkeypatch.setattr(scale, "BUNDLED", [None, bundled])
    result = run_here(distill.main, "--prompts", command.prompts, "--out", bundled / "run")
    assert refused(result, "--out", "run") and not (bundled / "run").exists()


def test_a_refused_run_leaves_nothing(command, finished_run, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    assert refused(command("--cache-features", note), "--cache-features", "note.txt is a file")
    assert not command.out.exists() and note.read_text() == "mine"
    command.out.mkdir()                                   # the user's own folder stays
    assert refused(command("--cache-features", note), "--cache-features")
    assert command.out.is_dir() and not list(command.out.iterdir())


def test_overwrite_keeps_what_no_run_has_written(finished):
    mine = [finished.out / name for name in ("notes.txt", "samples/mine.png", "student/notes.txt",
                                             "checkpoints/best/x")]
    mine[-1].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    assert finished("--overwrite", "--iterations", 1).returncode == 0
    assert all(path.read_text() == "mine" for path in mine)
    assert finished.checkpoints() == ["00000001", "best"] and len(finished.log()) == 1


def test_what_remove_run_removes(tmp_path):
    """Whole names of a run, what a killed one left, and links, but not what they point to."""
    far = tmp_path / "far"
    far.mkdir()
    (far / "weights").write_text("mine")
    run = tmp_path / "run"
    for name in ("checkpoints", "samples", "student"):
        (run / name).mkdir(parents=True)
    (run / "checkpoints" / "00000100").symlink_to(far)
    (run / "checkpoints" / "00000200").mkdir()
    for name in (".part-0123abcd.new", "000100.png", "000100.png.txt"):
        (run / "samples" / name).write_text("x")
    (run / "log.jsonl").write_text("x")
    scale.remove_run(run)
    assert (far / "weights").read_text() == "mine"
    assert [path.relative_to(run).as_posix() for path in run.rglob("*")] == [
        "samples", "samples/000100.png.txt"]


def test_a_refused_run_keeps_its_features(command, monkeypatch):
    """They lie in --out, and took long to compute: the next command uses them."""
    cache = command.out / "features"
    monkeypatch.setattr(scale, "mean_loss", Failing(formats.UserError("too little memory")))
    assert refused(command("--cache-features", cache), "memory")
    monkeypatch.undo()
    assert command("--cache-features", cache, "--overwrite").returncode == 0


def test_what_is_there_is_kept(command, tmp_path):
    assert refused(command.resume(), "there is no run")
    assert command().returncode == 0
    before = command.tensors()
    assert refused(command(), "--resume", "--overwrite")
    assert refused(command.resume("--overwrite"), "--resume", "--overwrite")
    assert same_tensors(before, command.tensors())
    assert command("--overwrite", "--iterations", 1).returncode == 0 and len(command.log()) == 1


def test_overwrite_removes_nothing_before_all_is_checked(finished, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "cache.json").write_text('{"key": "another"}')
    before, log = finished.tensors(), finished.log()
    assert refused(finished("--overwrite", "--cache-features", cache), "--cache-features")
    assert same_tensors(before, finished.tensors()) and finished.log() == log


@pytest.mark.parametrize("config", [None, '{"model": "mine"}'])
def test_folders_of_others_are_never_removed(command, tmp_path, config):
    command.out = tmp_path / "mine"
    command.out.mkdir()
    (command.out / "thesis.txt").write_text("years of work")
    if config:
        (command.out / "config.json").write_text(config)
    assert refused(command("--overwrite"), "mine")
    assert (command.out / "thesis.txt").read_text() == "years of work"


# --- Going wrong --------------------------------------------------------------------------------


def test_iterations_that_are_not_finite_are_skipped_and_counted(command, monkeypatch):
    monkeypatch.setattr(distill, "training_step", OnCall([2, 3], not_finite))
    assert command("--iterations", 4).returncode == 0
    assert [line["skipped"] for line in command.log()] == [0, 1, 2, 2]
    assert ["loss" in line for line in command.log()] == [True, False, False, True]


def test_ten_in_a_row_end_the_run_with_the_last_good_checkpoint(command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(distill, "training_step", OnCall(range(4, 100), not_finite))
        result = command("--iterations", 40, "--sample-every", 3)
    assert refused(result, "--lr", "checkpoints")
    good = command.out / "checkpoints" / "00000003"
    assert good.exists()
    assert sampler.load_pipeline(command.out / "student").trained_steps == 4


def test_a_warm_up_that_diverges_ends_the_run(command, monkeypatch):
    monkeypatch.setattr(distill, "warm_up", Recorder(lambda *_: not_finite()))
    assert refused(command("--warmup", 20), "--lr")
    assert not list((command.out / "checkpoints").glob("*"))


def test_a_full_disk_is_one_sentence(command, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(scale.dcp, "save", full)
    assert refused(command(), "No space left")
    assert not list((command.out / "checkpoints").iterdir())


@pytest.mark.parametrize("arguments, words", [
    (["--steps", "0"], ["--steps"]), (["--steps", "1,x"], ["--steps"]),
    (["--steps", "3000000000"], ["--steps"]), (["--alpha", "0.5"], ["--alpha"]),
    (["--alpha", "nan"], ["--alpha"]), (["--lr", "-1"], ["--lr"]), (["--lr", "1e300"], ["--lr"]),
    (["--ema", "2"], ["--ema"]), (["--seed", "-1"], ["--seed"]), (["--seed", 10 ** 14], ["--seed"]),
    (["--shift", "0"], ["--shift"]), (["--size", "0"], ["--size"]),
    (["--size", "33"], ["multiple"]),
    (["--batch-size", 10 ** 20], ["--batch-size"]), (["--follow", "1.5"], ["--follow"]),
    (["--lora", "65"], ["--lora 65", "at most"]), (["--accumulate", "3"], ["--accumulate 3"]),
    (["--lora", "0"], ["--lora"]), (["--accumulate", "0"], ["--accumulate"]),
    (["--out", ""], ["--out"]), (["--teacher", ""], ["--teacher"]),
    (["--no-dm", "--warmup", "5"], ["--no-dm"]), (["--no-dm", "--alpha", "1"], ["--alpha"]),
    (["--no-dm", "--follow", "0.1"], ["--follow"]), (["--device", "nowhere"], ["nowhere"]),
    (["--prompts", "missing.txt"], ["missing.txt"]), (["--teacher", "missing"], ["missing"])])
def test_wrong_options_end_in_one_sentence(command, arguments, words):
    assert refused(command(*arguments), *words)
    assert not command.out.exists()


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xff\xfe\x00"])
def test_useless_prompt_files_are_refused(command, content):
    command.prompts.write_bytes(content)
    assert refused(command(), "prompts.txt")


def test_prompts_that_change_during_a_run_are_refused(command):
    prompts = scale.PromptFile(command.prompts)
    assert prompts[1] == "a dog"
    command.prompts.write_text("one line more\n" + command.prompts.read_text())
    with pytest.raises(formats.UserError, match="changed"):
        prompts[1]
    command.prompts.unlink()
    with pytest.raises(formats.UserError, match="removed"):
        prompts[1]


def test_prompts_that_were_written_again_as_they_were(command):
    prompts = scale.PromptFile(command.prompts)
    os.utime(command.prompts, (1, 1))
    assert prompts[1] == "a dog"


def test_a_run_whose_prompts_change_is_saved_and_goes_on(command, monkeypatch):
    options = ["--iterations", 4, "--warmup", 1, "--constant-rate"]
    assert command(*options).returncode == 0
    wanted, before = command.log_without_seconds(), command.prompts.read_text()
    monkeypatch.setattr(distill, "training_step",
                        OnCall({2}, lambda: command.prompts.write_text("another\n")))
    assert refused(command(*options, "--overwrite"), "changed", "--resume")
    monkeypatch.undo()
    assert command.checkpoints() == ["00000003"]       # warm-up and two iterations
    command.prompts.write_text(before)
    assert command.resume().returncode == 0
    assert command.log_without_seconds() == wanted


def test_prompts_are_read_as_sampler_reads_them(tmp_path):
    """A mark of byte order may stand anywhere, where files were joined."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n\ufeffa dog \n\ufeff\n狐狸".encode())
    prompts = scale.PromptFile(path)
    assert [prompts[i] for i in range(len(prompts))] == sampler.read_prompts(path)
    assert sampler.read_prompts(path) == ["a cat", "a dog", "狐狸"]
    path.write_bytes(b"a cat\ra dog\r")
    with pytest.raises(scale.UserError, match="carriage returns"):
        scale.PromptFile(path)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(finished):
    before = (finished.out / "log.jsonl").read_bytes()
    shutil.rmtree(finished.out / "checkpoints")
    assert refused(finished.resume("--iterations", 3), "checkpoints", "--overwrite")
    assert (finished.out / "log.jsonl").read_bytes() == before


def test_advice_names_only_what_helps(finished):
    first, newest = sorted((finished.out / "checkpoints").iterdir())
    shutil.rmtree(first)
    drop_tensors(next(newest.glob("*.safetensors")))
    result = finished.resume("--iterations", 3)
    assert refused(result, "there is no other") and "the one before" not in result.stderr


def test_a_cache_in_the_teacher_is_refused(command, tmp_path):
    """It would be another teacher then, and the run could not go on."""
    teacher = shutil.copytree(TINY, tmp_path / "teacher")
    for folder in (teacher, teacher / "features"):
        assert refused(command("--teacher", teacher, "--cache-features", folder), "lies in")
        assert not (teacher / "features").exists() and not command.out.exists()


def test_prompts_from_a_pipe_are_refused(command):
    command.prompts.unlink()
    os.mkfifo(command.prompts)
    assert refused(command(), "--prompts", "no file") and not command.out.exists()
    command.prompts.unlink()
    command.prompts.mkdir()
    assert refused(command(), "--prompts", "no file")


def test_a_teacher_of_ones_own_needs_prompts():
    assert refused(run_here(distill.main, "--teacher", TINY), "--prompts")


@pytest.mark.slow
def test_a_distilled_teacher_is_warned_about(command):
    assert command().returncode == 0
    result = run_here(
        distill.main, "--teacher", command.out / "student", "--prompts", command.prompts,
        "--out", command.out.parent / "second", "--iterations", 1, "--batch-size", 2)
    assert result.returncode == 0 and "distilled already" in result.stderr
