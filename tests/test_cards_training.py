"""Training of the cards model: every stage, resuming, workers, the loss, the optimizer."""

import copy
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import sampler
import train
from conftest import ROOT, TINY, refused, run_here
from files import alone_in

CARDS = ROOT / "tutorials" / "cards"

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")

SMALL = train.Recipe(**{**train.SMOKE, "drawings": 16, "vae_drawings": 16, "vae_steps": 4,
                        "vae_batch": 1, "steps": 5, "batch": 4, "probe_prompts": 0,
                        "report_prompts": 0})


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(*arguments):
    return subprocess.run([sys.executable, str(CARDS / "train.py"), *map(str, arguments)],
                          capture_output=True, text=True)


def drawn(recipe):
    drawings = train.Drawings(recipe, data.build_tokenizer())
    drawings.start(2)
    drawings.wait(recipe.drawings)
    return drawings


@pytest.fixture(scope="module")
def drawings():
    return drawn(SMALL)


@pytest.fixture(scope="module")
def teacher_inputs(drawings, tmp_path_factory):
    """What the teacher's stage starts from: a run's folder with a finished VAE, and the cards."""
    run = train.Run(str(tmp_path_factory.mktemp("cards")), torch.device("cpu"))
    vae = train.train_vae(SMALL, run, drawings)
    return vae, train.encode_cards(SMALL, run, vae, drawings)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(),
                                                 strict=True))


# --- Drawing ------------------------------------------------------------------------------------


def test_drawings_do_not_depend_on_who_draws_them(drawings):
    again = train.Drawings(SMALL, data.build_tokenizer())
    again.draw_chunks(0, 1)
    for name in ("pictures", "words", "ids", "lengths"):
        assert (getattr(drawings, name) == getattr(again, name)).all(), name
    assert len(np.unique(drawings.pictures.reshape(16, -1), axis=0)) == 16


def test_captions_are_whole_and_those_of_the_card(drawings):
    tokenizer = data.build_tokenizer()
    assert drawings.lengths.min() > 6 and drawings.lengths.max() <= train.MAX_TOKENS
    rng = np.random.default_rng((SMALL.seed, 1, 0))
    scene = data.random_scene(rng)
    for k in range(SMALL.captions):
        caption = data.caption(scene, rng)
        ids = drawings.ids[0, k, :drawings.lengths[0, k]].tolist()
        template = sampler.TEMPLATE.format(caption)
        assert ids == tokenizer.encode(template, add_special_tokens=False).ids
    assert (drawings.pictures[0] == data.draw(scene)).all()
    assert (drawings.words[0] == (data.text_region(scene, train.CELLS)[0] > 0)).all()


def test_a_smaller_world_is_drawn_tried_and_scored(monkeypatch, teacher_inputs):
    recipe = replace(SMALL, ladder=2, probe_prompts=6, report_prompts=6)
    world = data.upright(data.LADDER[2])
    scene = data.random_scene(np.random.default_rng(3), world=world)
    drawings = train.Drawings(recipe, data.build_tokenizer())
    drawings.draw(0, np.random.default_rng(3))
    assert (drawings.pictures[0] == data.draw(scene)).all()
    _, captions = train.test_cards(replace(recipe, vae_tests=20), torch.device("cpu"))
    assert all(data.shows(world, caption) for caption in captions)
    assert replace(recipe, upright=False).world() == data.LADDER[2]
    # The probe and the report want what this world has, and compare with its drawings.
    run, scored = train.Run("", torch.device("cpu")), []

    def score(images, prompts, real):
        scored.append((prompts, real))
        return {"joint": 1.0}
    monkeypatch.setattr(evaluate, "sample_images", lambda *_: torch.zeros(6, 3, 8, 8))
    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(evaluate, "write_json", lambda *_: None)
    monkeypatch.setattr(train, "save_grid", lambda *_: None)
    monkeypatch.setattr(train, "log", lambda *_, **more: None)
    model = train.Model(train.build(recipe, 600), teacher_inputs[0], None, recipe)
    train.probe(run, model, "samples.png")
    train.report(run, model)
    assert len(scored) == 13
    for prompts, real in scored:
        assert all(data.shows(world, prompt) for prompt in prompts)
        assert torch.equal(real, evaluate.drawings(prompts, 1, world))


def test_settings_may_be_given_in_parts(monkeypatch):
    monkeypatch.setattr(sys, "argv", "train.py --out x --set dim=64 seed=2 --set batch=8".split())
    recipe = train.recipe_from(train.arguments())
    assert (recipe.dim, recipe.seed, recipe.batch) == (64, 2, 8)


def test_a_run_belongs_to_its_step_of_the_ladder(tmp_path, train_here):
    assert train_here("--ladder", 2).returncode == 0
    assert train_here.calls[0][0].ladder == 2
    prompts = sampler.read_prompts(tmp_path / "run" / "prompts.txt")
    assert all(data.shows(data.LADDER[2], prompt) for prompt in prompts)
    assert train_here("--ladder", 2).returncode == 0                    # it goes on
    assert refused(train_here("--ladder", 3), "ladder=2")
    assert refused(train_here(), "ladder=2")
    assert refused(train_here("--ladder", 2, "--set", "upright=false"), "upright=true")
    assert sampler.read_prompts(tmp_path / "run" / "prompts.txt") == prompts
    assert len(train_here.calls) == 2


def test_a_failed_process_ends_the_waiting():
    class Broken(train.Drawings):
        def draw(self, i, rng):
            os._exit(1)
    drawings = Broken(SMALL, data.build_tokenizer())
    drawings.start(1)
    with pytest.raises(RuntimeError):
        drawings.wait(16)


@pytest.mark.parametrize("answers", [[True], [False, True, True]])
def test_a_signal_ends_the_waiting(monkeypatch, answers):
    """Also where the signal came to the processes that draw, and was noticed there first."""
    drawings = train.Drawings(SMALL, data.build_tokenizer())
    drawings.processes = [SimpleNamespace(exitcode=1)]
    answers = iter(answers)
    monkeypatch.setattr(train, "stopping", lambda: next(answers))
    with pytest.raises(KeyboardInterrupt):
        drawings.wait(16)


# --- VAE ----------------------------------------------------------------------------------------


def test_vae_has_the_shape_of_the_release_and_latents_of_unit_variance(teacher_inputs):
    vae, cards = teacher_inputs
    assert vae.config.downsampling == 8 and vae.config.latent_channels == 16
    assert cards.latents.shape == (16, 16, train.CELLS, train.CELLS)
    assert abs(cards.latents.float().std() - 1) < 0.05 and abs(cards.latents.float().mean()) < 0.05
    assert not any(p.requires_grad for p in vae.parameters())


def test_vae_loss_falls_and_counts_edges_more():
    torch.manual_seed(0)
    vae = train.VAE(train.vae_config())
    images = torch.zeros(2, 3, 32, 32)
    images[:, :, :, 16:] = 1
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    losses = []
    for step in range(12):
        loss = train.vae_loss(vae, images, train.seeded("cpu", step), 0.005)
        losses.append(loss.item())
        loss.backward()
        train.descend(list(vae.parameters()), [optimizer])
    assert losses[-1] < 0.8 * losses[0]


def test_crops_are_windows_of_the_images():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    windows = train.crop(images, train.seeded("cpu", 1), 4)
    for image, window in zip(images, windows, strict=True):
        y, x = divmod(int(window[0, 0, 0] - image[0, 0, 0]), 8)
        assert torch.equal(window, image[:, y:y + 4, x:x + 4])


def test_latents_belong_to_a_vae():
    vae = train.bundled_vae()
    path = train.cards_file("", SMALL, vae)
    assert path == train.cards_file("", SMALL, train.bundled_vae())
    next(vae.parameters()).view(-1)[0] += 1
    assert path != train.cards_file("", SMALL, vae)


# --- Teacher ------------------------------------------------------------------------------------


def test_muon_is_torch_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((24, 24), (24, 24), (48, 24), (24, 48))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    muons = (train.Muon(ours, lr=0.01),
             torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for muon in muons:
            muon.step()
    for p, q, s in zip(ours, theirs, start, strict=True):      # PyTorch's multiplies in bfloat16
        assert (p - q).norm() < 0.02 * (q - s).norm()


def test_every_matrix_has_one_optimizer():
    nets = train.build(SMALL, 50)
    owned = [id(p) for optimizer in train.optimizers(nets, SMALL)
             for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in nets.parameters())


@pytest.mark.parametrize("lengths", [(5, 20, 32), (33, 40, 40)])
def test_velocity_is_the_dit_of_the_encoded_caption(lengths):
    nets = train.build(SMALL, 50)
    for p in nets.parameters():                       # zeros at the start would hide a difference
        torch.nn.init.normal_(p, std=0.1)
    ids = torch.randint(50, (3, max(lengths)), generator=train.seeded("cpu", 1))
    lengths = torch.tensor(lengths)
    x = torch.randn(3, 16, 16, 16, generator=train.seeded("cpu", 2))
    t = torch.tensor([0.1, 0.5, 0.9])
    tokens = 32 if max(lengths) <= 32 else 64
    with torch.no_grad():
        expected = nets["dit"](x, t, nets["text_encoder"](ids, lengths))
        assert torch.allclose(train.velocity(nets, x, t, ids, lengths, tokens), expected, atol=1e-4)


def test_times_are_spread_over_the_distribution():
    t = train.random_times(1000, SMALL, train.seeded("cpu", 1))
    normal = torch.logit(t)
    assert abs(normal.mean() - SMALL.time_mean) < 0.02 and abs(normal.std() - SMALL.time_std) < 0.03
    assert (t > 0).all() and (t < 1).all() and torch.equal(t, t.sort().values)


def test_some_captions_are_empty(teacher_inputs):
    _, cards = teacher_inputs
    run = train.Run("", torch.device("cpu"))
    recipe = train.replace(SMALL, batch=2000)
    loss = train.FlowLoss(recipe, run, None, cards, [1, 2, 3])
    index, ids, lengths = loss.draw(train.seeded("cpu", 1))
    empty = lengths == 3
    assert 0.07 < empty.float().mean() < 0.13
    assert (ids[empty][:, :3] == torch.tensor([1, 2, 3])).all() and (ids[empty][:, 3:] == 0).all()
    for i in torch.nonzero(~empty)[:20, 0]:
        assert any(torch.equal(ids[i], caption.long()) for caption in cards.ids[index[i]])


def test_the_rate_warms_up_and_ends_at_zero():
    rates = [train.learning_rate(step, progress, SMALL)
             for step, progress in ((1, 0.0), (500, 0.1), (900, 0.5), (950, 0.75), (1000, 1.0))]
    assert rates == [0.01, 1, 1, 0.5, 0]


@pytest.mark.slow
def test_training_resumes(tmp_path, teacher_inputs, drawings):
    def run_to(name, *stops):
        for stop in stops:
            run = train.Run(str(tmp_path / name), torch.device("cpu"), stop_after=stop)
            os.makedirs(run.out, exist_ok=True)
            vae = train.train_vae(SMALL, run, drawings)
            tokenizer = data.build_tokenizer()
            model, complete = train.train_teacher(SMALL, run, tokenizer, teacher_inputs[0],
                                                  teacher_inputs[1])
        return vae, model.nets, complete

    whole_vae, whole, complete = run_to("whole", None)
    vae, nets, complete_too = run_to("resumed", 2, 3, None)
    assert complete and complete_too and equal(vae, whole_vae) and equal(nets, whole)
    assert not equal(nets, train.build(SMALL, data.build_tokenizer().get_vocab_size()))


def test_a_stage_is_as_long_as_its_time(tmp_path):
    run = train.Run(str(tmp_path), torch.device("cpu"))
    stage = train.Stage(run, "nothing", minutes=0.002, steps=0)
    progress = list(stage)
    assert stage.complete and progress == sorted(progress) and progress[-1] < 1
    assert stage.seconds() >= 0.12 and stage.step == len(progress)


def test_a_file_that_is_damaged_or_does_not_fit_is_refused(tmp_path):
    run = train.Run(str(tmp_path), torch.device("cpu"))
    vae = train.bundled_vae()
    stage = train.Stage(run, "teacher", 1, 1, nets=torch.nn.Linear(2, 2))
    stage.save()
    with pytest.raises(train.UserError, match="teacher.pt.*--set"):
        train.Stage(run, "teacher", 1, 1, nets=torch.nn.Linear(2, 3))
    whole = Path(stage.path).read_bytes()
    for path in (stage.path, tmp_path / "vae.pt", train.cards_file(run.out, SMALL, vae)):
        for content in (b"", b"no such file", whole[:len(whole) // 2]):
            Path(path).write_bytes(content)
            with pytest.raises(train.UserError, match=Path(path).name):
                train.Stage(run, "teacher", 1, 1)
                train.finished_vae(run)
                train.encode_cards(SMALL, run, vae, None)
        os.remove(path)


def test_the_log_is_json(tmp_path):
    train.log(train.Run(str(tmp_path), torch.device("cpu")), a=float("nan"), b=float("inf"), c=0.5)
    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": None, "c": 0.5}


# --- The command --------------------------------------------------------------------------------


@pytest.fixture
def train_here(tmp_path, monkeypatch):
    """Runs the command without its stages: what `work` would have done is in calls."""
    calls = []
    monkeypatch.setattr(train, "work", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(train.Drawings, "start", lambda *_: None)
    monkeypatch.setattr(train.Drawings, "wait", lambda *_: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*options):
        return run_here(train.main, "--out", tmp_path / "run", "--smoke", *options)
    run.calls = calls
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_folder_of_others_is_left_alone(tmp_path, train_here):
    folder = tmp_path / "run"
    folder.mkdir()
    assert train_here().returncode == 0                            # an empty one
    (folder / "cards-of-mine.pt").write_text("mine")
    with alone_in(folder):
        assert refused(train_here(), "another process")
    assert train_here().returncode == 0 and len(train_here.calls) == 2
    assert (folder / "cards-of-mine.pt").read_text() == "mine"
    for log in ("", '{"iteration": 1}\n', "3\n", "no JSON"):
        (folder / "log.jsonl").write_text(log)
        (folder / "tokenizer.json").write_text("mine")
        assert refused(train_here(), folder)
        assert (folder / "tokenizer.json").read_text() == "mine"
    assert len(train_here.calls) == 2


def test_a_mistake_is_said_once_and_ends_all_workers(monkeypatch, train_here):
    def work(recipe, run, *_):
        if run.rank == 1:
            raise train.UserError("said by the other")
        if run.rank == 2:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.pause()
        raise train.UserError("said by the first")
    monkeypatch.setattr(train, "work", work)
    assert train.assist(None, train.Run("", None, rank=1)) is None
    assert refused(train_here("--workers", 4), "said by the first")
    for process in multiprocessing.active_children():              # reaps what was killed
        process.join(10)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_smoke_run_with_two_workers(tmp_path):
    out = tmp_path / "run"
    options = ("--smoke", "--workers", 2, "--set", "drawings=64", "vae_steps=2", "vae_batch=1",
               "report_prompts=2", "probe_prompts=2")
    done = command("--out", out, *options)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"start", "vae", "teacher", "probe", "report"} <= {line["stage"] for line in log}
    rows = json.loads((out / "report.json").read_text())
    assert {row["prompts"] for row in rows} == {"open", "given"}
    assert {row["steps"] for row in rows} >= {1, 2}
    pipeline = sampler.load_pipeline(out / "teacher")
    assert (pipeline.size, pipeline.steps, pipeline.guidance) == (128, 2, 2.0)
    image, = sampler.generate(pipeline, "a panda on a red card")
    assert image.size == (128, 128)


def test_a_teacher_begins_with_the_weights_of_another(tmp_path, teacher_inputs):
    vae, cards = teacher_inputs
    bundled = str(CARDS / "teacher")
    recipe = replace(train.Recipe(), steps=1, warm_up=1000, muon_lr=1e-9, adam_lr=1e-9, batch=4,
                     probe_prompts=0, compile=False)
    run = train.Run(str(tmp_path), torch.device("cpu"), start=bundled)
    model, complete = train.train_teacher(recipe, run, data.build_tokenizer(), vae, cards)
    start = sampler.load_pipeline(bundled)
    assert complete
    for name, net in model.nets.items():
        for key, weight in getattr(start, name).state_dict().items():
            assert torch.allclose(net.state_dict()[key], weight, atol=1e-6), key


def test_a_start_may_know_other_tokens():
    """Embeddings go to the tokens of the same text, and a new token keeps its own."""
    tokenizer = data.build_tokenizer()
    model = sampler.load_pipeline(CARDS / "teacher")
    known = model.tokenizer.get_vocab()
    vocabulary = {token: row for row, token in enumerate([*reversed(tokenizer.get_vocab()), "new"])}
    nets = train.build(train.Recipe(), len(vocabulary))
    before = nets["text_encoder"].embed_tokens.weight.detach().clone()
    train.copy_weights(str(CARDS / "teacher"), nets, SimpleNamespace(get_vocab=lambda: vocabulary))
    after, start = nets["text_encoder"].embed_tokens.weight, model.text_encoder.embed_tokens.weight
    for token, row in vocabulary.items():
        expected = start[known[token]] if token in known else before[row]
        assert torch.allclose(after[row], expected), token


@pytest.mark.parametrize("wrong", [False, True])
def test_compiled_blocks_are_kept_only_with_the_same_gradients(
        tmp_path, monkeypatch, teacher_inputs, wrong):
    """In place of a compiler: a call that is the same, or one whose gradients are not."""
    def compile(block, **options):
        factor = 100.0 if wrong else 1.0

        def call(x, *rest):
            out = block.forward(x, *rest)
            return out.detach() + factor * (out - out.detach())
        block._compiled_call_impl = call
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    run = train.Run(str(tmp_path), torch.device("cpu"))
    nets = train.build(SMALL, data.build_tokenizer().get_vocab_size())
    before = copy.deepcopy(nets.state_dict())
    train.compile_blocks(run, nets, train.FlowLoss(SMALL, run, nets, teacher_inputs[1], [1, 2, 3]))
    for name, weight in nets.state_dict().items():
        assert torch.equal(weight, before[name]), name
    kept = [block._compiled_call_impl is not None for block in nets["dit"].layers]
    assert kept == [not wrong] * len(kept)
    assert all(p.grad is None for p in nets.parameters())


@pytest.mark.parametrize("options, words", [
    (["--start", "nowhere", "--set", "bundled_vae=true"], "nowhere"),
    (["--start", str(CARDS / "teacher"), "--smoke", "--set", "bundled_vae=true"], "sizes"),
    (["--start", str(TINY), "--set", "bundled_vae=true"], "tokens"),
    (["--start", "OTHER_VAE", "--set", "bundled_vae=true"], "another VAE"),
    (["--start", str(CARDS / "teacher")], "bundled_vae")])
def test_a_start_that_does_not_fit_is_refused_before_cards_are_drawn(
        tmp_path, monkeypatch, options, words):
    if options[1] == "OTHER_VAE":
        options = ["--start", str(shutil.copytree(CARDS / "teacher", tmp_path / "a")), *options[2:]]
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        config["vae"]["scaling_factor"] *= 2
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "run"), *options])
    with pytest.raises(train.UserError, match=words):
        train.main()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [
    ("--ladder", "1"), ("--out", ""), ("--start", ""), ("--stop-after", "-1"),
    ("--smoke", "--minutes", "5"), ("--set", "vae_steps=3", "--vae-minutes", "5"),
    ("--set", "no_such_number=3"), ("--set", "batch"), ("--workers", "0"),
    ("--workers", "5", "--smoke"), ("--minutes", "0"), ("--device", "cuda", "--workers", "2"),
    *(("--set", setting) for setting in (
        "dim=null", "dim=[1]", "dim=1e400", "dim=33", "dim=true", "dim=32.5", "seed=-1",
        "log_every=0", "record=true", "drawings=0", "captions=0", "ema=NaN", "compile=1",
        "ladder=1", "decay_from=1", "shift=1e8", "sample_steps=100000", "guidance=1e4", "ema=1.5",
        "drawings=1000000000"))])
def test_wrong_options_are_refused(tmp_path, monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "run"), *options])
    with pytest.raises(train.UserError):
        train.main()
    assert not (tmp_path / "run").exists()


def test_the_bundled_vae_keeps_words_readable():
    rng = np.random.default_rng(11)
    scenes = [data.random_scene(rng) for _ in range(6)]
    images = torch.from_numpy(np.stack([data.draw(scene) for scene in scenes]))
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        rebuilt, psnr = evaluate.reconstruct(train.bundled_vae(), images)
    captions = [data.caption(scene, rng, drop=0.0) for scene in scenes]
    assert psnr > 31
    assert evaluate.score(rebuilt, captions, workers=1)["joint"] == 1
