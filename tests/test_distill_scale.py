"""Distilling larger networks: adapters, less memory, several processes, cached text features."""

import copy
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import convert_weights
import sampler
import scale
from conftest import ROOT, TINY, refused, relative_error
from distill import proxy_loss
from model import Text
from scale import Adapters, AutocastNet, checkpoint_activations
from test_distill_run import Command

CPU = torch.device("cpu")


@pytest.fixture
def command(tmp_path):
    return Command(tmp_path)


@pytest.fixture
def dit():
    return sampler.load_pipeline(TINY).dit.requires_grad_(False)


@pytest.fixture
def batch(dit):
    """x, t, text of a ragged batch of three."""
    g = torch.Generator().manual_seed(0)
    text = Text(torch.randn(3, 7, dit.config.cap_feat_dim, generator=g),
                        torch.tensor([7, 4, 5]))
    x = torch.randn(3, dit.config.in_channels, 4, 4, generator=g)
    return x, torch.rand(3, generator=g), text


def gradients(net, parameters, batch):
    """Of a loss on the net's output."""
    loss = (net(*batch) * torch.linspace(-1, 1, batch[0].numel()).view_as(batch[0])).sum()
    return torch.autograd.grad(loss, parameters)


def test_the_mean_loss_is_over_all_items_and_times(dit, batch):
    """Texts of unlike number; a loss of the time alone is its mean over the times."""
    x, _, text = batch
    texts = [Text(text.features[:2], text.lengths[:2]), Text(text.features[2:], text.lengths[2:])]
    weight = torch.tensor([3.0, 1.0])          # by the number of items a call gets

    def loss(part, t, text, noise):
        assert noise.shape == part.shape and len(t) == len(part) == len(text.lengths)
        return weight[2 - len(part)] * t.mean()
    times = torch.tensor([0.1, 0.4, 0.9])
    assert scale.mean_loss(loss, x, texts, times) == pytest.approx(
        float(times.mean()) * (2 * 3 + 1) / 3, rel=1e-5)


# --- Adapters -----------------------------------------------------------------------------------


def test_the_teacher_is_bit_identical_with_adapters_in_it(dit, batch):
    before = dit(*batch)
    adapters = Adapters(dit, 3, ("student", "fake"))
    weights = adapters.weights("student")
    assert torch.equal(adapters.call(None, *batch), before)
    assert torch.equal(adapters.call("student", *batch), before)      # B is 0 at first
    optimizer = torch.optim.SGD(weights.values(), 0.1)
    for _ in range(2):
        loss = proxy_loss(adapters.call("student", *batch), torch.ones_like(batch[0]))
        optimizer.zero_grad()
        loss.backward()
        assert torch.equal(adapters.call(None, *batch), before)
        optimizer.step()
    assert torch.equal(adapters.call(None, *batch), before)
    assert torch.equal(adapters.call("fake", *batch), before)
    assert not torch.equal(adapters.call("student", *batch), before)


def test_only_the_adapters_of_one_set_learn(dit, batch):
    frozen = {name: p.clone() for name, p in dit.named_parameters()}
    adapters = Adapters(dit, 3, ("student", "fake"))
    fake = {name: p.clone() for name, p in adapters.weights("fake").items()}
    weights = adapters.weights("student")
    adapters.call("student", *batch).sum().backward()
    assert all(p.grad is not None for p in weights.values())
    assert all(p.grad is None for p in adapters.weights("fake").values())
    torch.optim.SGD(weights.values(), 0.1).step()
    state = dit.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    assert all(torch.equal(p, fake[name]) for name, p in adapters.weights("fake").items())


def test_all_linear_layers_of_the_blocks_have_adapters(dit):
    adapters = Adapters(dit, 2, ("student",))
    layer = {name.split(".", 2)[-1] for name in adapters.layers if name.startswith("layers.0.")}
    assert layer == {"attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out",
                     "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "modulation"}
    assert {name.split(".")[0] for name in adapters.layers} == {
        "layers", "noise_refiner", "context_refiner"}


def test_at_full_rank_a_step_is_that_of_the_whole_weights(dit, batch):
    """A is orthonormal, so W - lr g and W + B A with B = -lr g A^T are the same."""
    whole, layer = copy.deepcopy(dit), "layers.0.attention.to_q"
    weight = whole.get_submodule(layer).weight.requires_grad_()
    gradient, = gradients(whole, [weight], batch)
    adapters = Adapters(dit, weight.shape[1], ("student",))
    B = adapters.layers[layer].lora_B["student"]
    step, = gradients(lambda *batch: adapters.call("student", *batch), [B], batch)
    with torch.no_grad():
        B -= 0.1 * step
    merged = adapters.merged("student").get_submodule(layer).weight
    torch.testing.assert_close(merged, weight - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def change(adapters, name, seed=0):
    """Gives the matrices B of a set values, so that it does something."""
    g = torch.Generator().manual_seed(seed)
    for key, p in adapters.weights(name).items():
        if key.endswith("lora_B"):
            p.data = 0.1 * torch.randn(p.shape, generator=g)


def test_merged_weights_compute_the_same(dit, batch):
    adapters = Adapters(dit, 3, ("student",))
    change(adapters, "student")
    merged = adapters.merged("student")
    assert not any("lora" in name for name in merged.state_dict())
    assert relative_error(merged(*batch), adapters.call("student", *batch)) < 1e-5
    assert relative_error(merged(*batch), adapters.call(None, *batch)) > 1e-3


def test_the_lora_file_gives_the_same_student(dit, batch, tmp_path):
    adapters = Adapters(dit, 3, ("student",))
    change(adapters, "student")
    adapters.save("student", tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    stem = "diffusion_model.layers.0.attention.to_out.0"
    assert tensors[f"{stem}.lora_A.weight"].shape[0] == 3 and tensors[f"{stem}.alpha"] == 3
    again = convert_weights.load_dit(
        TINY / "transformer", adapters=[(tmp_path / "lora.safetensors", 1.0)])
    assert relative_error(again(*batch), adapters.call("student", *batch)) < 1e-5


def test_a_run_with_adapters(command, batch):
    result = command("--lora", 4, "--lr", 0.2, "--follow", 0.1)
    assert result.returncode == 0, result.stderr
    student = sampler.load_pipeline(command.out / "student").dit
    lora = convert_weights.load_dit(
        TINY / "transformer", adapters=[(command.out / "lora.safetensors", 1.0)])
    assert relative_error(student(*batch), lora(*batch)) < 2e-2        # the student is bfloat16
    teacher = sampler.load_pipeline(TINY).dit
    assert relative_error(student(*batch), teacher(*batch)) > 3e-2
    assert command.resume("--iterations", 3).returncode == 0


# --- Less memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_batch_in_parts_has_the_same_gradient(dit, batch, parts):
    dit.requires_grad_(True)
    parameters = [*dit.parameters()]
    whole, in_parts = (AutocastNet(dit, CPU, "float32", n) for n in (1, parts))
    torch.testing.assert_close(in_parts(*batch), whole(*batch), rtol=1e-4, atol=1e-5)
    weight = torch.linspace(-1, 1, batch[0].numel()).view_as(batch[0])
    grads = []
    for net in (whole, in_parts):
        dit.zero_grad()
        (net(*batch) * weight).sum().backward()
        grads.append([p.grad.clone() for p in parameters if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert in_parts.forwards == whole.forwards


def test_one_text_for_all_items_in_parts(dit, batch):
    x, t, text = batch
    one = Text(text.features[:1], text.lengths[:1])
    whole, in_parts = (AutocastNet(dit, CPU, "float32", n) for n in (1, 2))
    torch.testing.assert_close(in_parts(x, t, one), whole(x, t, one), rtol=1e-4, atol=1e-5)


def test_checkpointed_activations_have_the_same_gradient(dit, batch):
    dit.requires_grad_(True)
    parameters = [p for name, p in dit.named_parameters() if "pad_token" not in name]
    wanted = gradients(dit, parameters, batch)
    checkpoint_activations(dit)
    for a, b in zip(gradients(dit, parameters, batch), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointed_activations_use_the_adapters_of_the_forward_pass(dit, batch):
    """Between forward and backward pass another set is on: the second computation must not be."""
    adapters = Adapters(dit, 3, ("student", "fake"))
    change(adapters, "student", 1)
    change(adapters, "fake", 2)
    weights = [*adapters.weights("student").values()]
    wanted = torch.autograd.grad(adapters.call("student", *batch).square().sum(), weights)
    checkpoint_activations(dit, adapters.contexts)
    loss = adapters.call("student", *batch).square().sum()
    adapters.call("fake", *batch)
    with adapters.use("fake"):
        for a, b in zip(torch.autograd.grad(loss, weights), wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", ["a cat\na dog\n", "a cat\n"])      # with a mask, without
@pytest.mark.parametrize("options", [
    ["--accumulate", 2, "--checkpoint-activations"],
    ["--lora", 4, "--accumulate", 2, "--checkpoint-activations"]])
def test_less_memory_is_the_same_run(command, options, prompts):
    command.prompts.write_text(prompts)
    plain = [*options[:2]] if "--lora" in options else []
    assert command(*plain, "--warmup", 1).returncode == 0
    wanted = [line["loss"] for line in command.log()]
    assert command(*options, "--warmup", 1, "--overwrite").returncode == 0
    assert [line["loss"] for line in command.log()] == pytest.approx(wanted, rel=1e-4)


# --- Cached text features -----------------------------------------------------------------------


def test_cached_features_are_those_of_the_encoder(command, tmp_path):
    prompts, pipeline = scale.PromptFile(command.prompts), sampler.load_pipeline(TINY)
    cache = scale.FeatureCache(tmp_path / "cache", pipeline, prompts, scale.Processes(CPU))
    cached, direct = cache([2, 0]), sampler.encode_prompts(pipeline, [prompts[2], prompts[0]])
    assert torch.equal(cached.lengths, direct.lengths)
    for a, b, n in zip(cached.features, direct.features, direct.lengths, strict=True):
        torch.testing.assert_close(a[:n], b[:n], rtol=1e-4, atol=1e-5)
    assert cached.features.shape == direct.features.shape


@pytest.mark.slow
def test_a_cache_is_made_once_and_goes_on(command, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(scale.FeatureCache, "SIZE", 2)
    assert command("--cache-features", cache).returncode == 0
    files = sorted(cache.glob("*.safetensors"))
    assert len(files) == 2
    first = files[0].stat().st_mtime_ns
    files[1].unlink()                                        # as if interrupted
    assert command("--cache-features", cache, "--overwrite").returncode == 0
    assert files[1].exists() and files[0].stat().st_mtime_ns == first


def test_a_damaged_cache_is_one_sentence(command, tmp_path):
    cache = tmp_path / "cache"
    assert command("--cache-features", cache).returncode == 0
    path = cache / "000000.safetensors"
    whole, features = path.read_bytes(), load_file(path)
    damaged = {"cut": whole[:100], "empty": b"", "missing": save({"7": features["0"]}),
               "width": save({name: f[:, :-1].contiguous() for name, f in features.items()}),
               "nan": save({name: f * torch.nan for name, f in features.items()})}
    for damage, content in damaged.items():
        path.write_bytes(content)
        result = command("--cache-features", cache, "--overwrite")
        assert refused(result, "000000.safetensors", "damaged"), damage


def test_the_cache_of_other_prompts_is_refused(command, tmp_path):
    cache = tmp_path / "cache"
    assert command("--cache-features", cache).returncode == 0
    command.prompts.write_text("others\n")
    assert refused(command("--cache-features", cache, "--overwrite"), "--cache-features")


def test_a_cache_serves_every_dit_of_its_text_encoder(command, tmp_path):
    cache, other = tmp_path / "cache", shutil.copytree(TINY, tmp_path / "other")
    assert command("--cache-features", cache).returncode == 0
    path = next(other.glob("transformer/*.safetensors"))
    save_file({name: w * 1.01 for name, w in load_file(path).items()}, path)
    result = command("--cache-features", cache, "--overwrite", "--teacher", other)
    assert result.returncode == 0, result.stderr


def test_the_cache_of_another_text_encoder_is_refused(command, tmp_path):
    cache, other = tmp_path / "cache", shutil.copytree(TINY, tmp_path / "other")
    assert command("--cache-features", cache).returncode == 0
    path = next(other.glob("text_encoder/*.safetensors"))
    weights = load_file(path)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, path)
    result = command("--cache-features", cache, "--overwrite", "--teacher", other)
    assert refused(result, "--cache-features")


# --- Several processes --------------------------------------------------------------------------


def torchrun(command, *options, wait=True):
    """Starts a run of two processes on the CPU."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
             ROOT / "distill.py", *options]
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not wait:
        return process
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return output


def options_of(command, *more):
    return ["--teacher", TINY, "--prompts", command.prompts, "--out", command.out, "--size", 32,
            "--steps", 4, "--batch-size", 2, "--fake-updates", 1, "--log-every", 1, *more]


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    [], ["--lora", 4],
    ["--batch-size", 4, "--accumulate", 2, "--checkpoint-activations", "--steps", "2,1,4"]])
def test_two_processes_are_one(command, more):
    options = ["--iterations", 5, "--warmup", 1, *more]
    assert command(*options).returncode == 0
    alone = [line["loss"] for line in command.log()]
    student = load_file(command.out / "student" / "dit.safetensors")
    student = torch.cat([w.float().flatten() for w in student.values()])
    torchrun(command, *options_of(command, *options, "--overwrite"))
    assert [line["loss"] for line in command.log()] == pytest.approx(alone, rel=1e-4)
    both = load_file(command.out / "student" / "dit.safetensors")
    assert relative_error(torch.cat([w.float().flatten() for w in both.values()]), student) < 1e-3


@pytest.mark.slow
def test_what_one_process_refuses_ends_the_others_with_a_sentence(command):
    command.out.mkdir()
    (command.out / "thesis.txt").write_text("years of work")
    process = torchrun(command, *options_of(command, "--iterations", 1), wait=False)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "is no run of distill.py" in output and "another one has ended" in output
    assert "from_first" not in output                      # no traceback of ours


@pytest.mark.parametrize("networks", [scale.WholeNetworks, scale.LowRankNetworks])
def test_only_the_first_process_holds_the_whole_student(dit, networks):
    args = SimpleNamespace(lora=2, seed=0, checkpoint_activations=False, dtype="float32")
    learners = networks(dit, args, scale.Processes(CPU))
    assert isinstance(learners.plain(), type(dit))
    learners.processes.rank, learners.processes.count = 1, 2
    for net in learners.nets.values():                     # as if sharded
        if isinstance(net, type(dit)):
            net.state_dict = lambda: {"w": SimpleNamespace(full_tensor=lambda: torch.ones(2))}
    assert learners.plain() is None


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(command):
    assert command("--iterations", 4, "--constant-rate").returncode == 0
    wanted = [line["loss"] for line in command.log()]
    assert command("--iterations", 1, "--constant-rate", "--overwrite").returncode == 0
    torchrun(command, "--out", command.out, "--resume", "--iterations", 2)
    assert command.resume("--iterations", 4).returncode == 0
    assert [line["loss"] for line in command.log()] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_when_one_process_dies_the_others_end(command):
    process = torchrun(command, *options_of(command, "--iterations", 10000), wait=False)
    log = command.out / "log.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "another one has ended" in output


@pytest.mark.parametrize("ending, left", [
    (None, 1), (SystemExit(130), 1), (RuntimeError("gloo: closed"), 0), (KeyboardInterrupt(), 0)])
def test_processes_leave_their_group_before_python_ends(monkeypatch, ending, left):
    """Not where another one may be in the middle of a sum: leaving would wait for it."""
    calls, at_exit = [], []
    monkeypatch.setattr(scale.dist, "destroy_process_group", lambda: calls.append(1))
    monkeypatch.setattr(scale.atexit, "register", lambda *call: at_exit.append(call))
    monkeypatch.setattr(scale.Processes, "__init__", three_processes)
    with nullcontext() if ending is None else pytest.raises(BaseException), \
            scale.Processes(CPU).end_together():
        if ending:
            raise ending
    assert len(calls) == left
    assert at_exit == left * [(scale.end_process, getattr(ending, "code", 0))]


def test_a_batch_that_cannot_be_shared_is_refused(command, monkeypatch):
    monkeypatch.setattr(scale.Processes, "__init__", three_processes)
    assert refused(command(), "--batch-size", "3 processes")
    assert not command.out.exists()


def three_processes(self, device):
    self.device, self.rank, self.count = device, 0, 3


def test_draws_belong_to_the_item_not_to_the_process():
    """The shares of two processes, put together, are what one process draws."""
    shares = []
    for rank in range(2):
        processes = scale.Processes(CPU)
        processes.rank, processes.count = rank, 2
        g = torch.Generator().manual_seed(0)
        with processes.shared_draws():
            shares.append((torch.rand(2, 3, generator=g), torch.randn((3, 4), generator=g)))
    g = torch.Generator().manual_seed(0)
    assert torch.equal(torch.cat([u for u, _ in shares], 1), torch.rand(2, 6, generator=g))
    assert torch.equal(torch.cat([n for _, n in shares]), torch.randn(6, 4, generator=g))
    with processes.shared_draws():
        assert torch.rand(3).shape == (3,) and torch.randn((3, 4)).shape == (3, 4)


def test_the_command_that_samples_a_student_is_one_for_a_shell():
    prompt = """a cat's "HI" $HOME"""
    command = scale.sampling_command(prompt, "runs/my student")
    assert shlex.split(command) == ["python", "sampler.py", prompt, "--model", "runs/my student"]
