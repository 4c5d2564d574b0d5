"""The mathematics of distill.py on small nets in float64, and its command line on a tiny teacher."""

import json

import pytest
import torch
from conftest import TINY, refused, run_here
from PIL import Image
from safetensors.torch import load_file

import distill
import sampler
from distill import (SCHEDULES, Discriminator, Players, Settings, backward_simulation, cfg_augmentation, data_estimate, discriminator_loss,
                     distribution_matching, generator_loss, join, mean_variance_kl, proxy_loss, renoise, sample_tau, shared_call,
                     shift_time, training_step)
from model import Text

B, D = 6, 5


class Net(torch.nn.Module):
    """A small nonlinear (x, t, text) -> v for points (B, D) and texts (B, 3); counts its calls and their batches."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Linear(D + 4, 16), torch.nn.Tanh(), torch.nn.Linear(16, D)).double()
        self.batches = []

    def forward(self, x, t, text):
        self.batches.append(len(x))
        return self.layers(torch.cat((x, t[:, None], text), 1))


@pytest.fixture
def draws():
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return {"x": normal(B, D), "t": torch.rand(B, generator=g, dtype=torch.float64), "noise": normal(B, D), "text": normal(B, 3),
            "null": normal(1, 3), "normal": normal}


@pytest.fixture
def nets():
    return Net(1), Net(2)


# --- The two terms ------------------------------------------------------------------------------------------


def test_renoise_and_data_estimate(draws):
    x, t, noise = draws["x"], draws["t"], draws["noise"]
    for i in range(B):
        torch.testing.assert_close(renoise(x, t, noise)[i], t[i] * x[i] + (1 - t[i]) * noise[i])
    # A net that knows the true velocity gives the data back from every time.
    exact = lambda x_t, t, text: x - noise
    torch.testing.assert_close(data_estimate(exact, renoise(x, t, noise), t, None), x)


@pytest.mark.parametrize("alpha", [1.0, 2.5, 8.0])
def test_sum_of_terms_is_dmd_with_guidance(nets, draws, alpha):
    """Eq. 6: at a shared time and noise, unnormalised, DM + CA is what everyone called DMD: guided real minus fake."""
    (teacher, fake), (x, t, noise, text, null) = nets, (draws[k] for k in ("x", "t", "noise", "text", "null"))
    x_t = renoise(x, t, noise)
    cond, uncond = data_estimate(teacher, x_t, t, text), data_estimate(teacher, x_t, t, null.expand(B, -1))
    dmd = uncond + alpha * (cond - uncond) - data_estimate(fake, x_t, t, text)
    dm = distribution_matching(teacher, fake, x, t, text, noise, normalise=False)
    ca = cfg_augmentation(teacher, x, t, text, null, alpha, noise, normalise=False)
    torch.testing.assert_close(dm + ca, dmd, rtol=1e-12, atol=1e-12)
    assert (dm.abs() > 1e-3).any() and (alpha == 1 or (ca.abs() > 1e-3).any())


def test_terms_that_vanish(nets, draws):
    (teacher, _), (x, t, noise, text, null) = nets, (draws[k] for k in ("x", "t", "noise", "text", "null"))
    for normalise in (True, False):
        assert (cfg_augmentation(teacher, x, t, text, null, 1.0, noise, normalise) == 0).all()
        assert (distribution_matching(teacher, teacher, x, t, text, noise, normalise) == 0).all()


def test_normaliser(nets, draws):
    """Each term is divided, item by item, by mean |x - x_hat(teacher, text)| at its own tau, and never by less than the floor."""
    (teacher, fake), (x, t, noise, text, null) = nets, (draws[k] for k in ("x", "t", "noise", "text", "null"))
    t = 0.8 * t                                              # the floor is not at work: that is for later
    scale = (x - data_estimate(teacher, renoise(x, t, noise), t, text)).abs().mean(1, keepdim=True)
    for term in (lambda **k: distribution_matching(teacher, fake, x, t, text, noise, **k),
                 lambda **k: cfg_augmentation(teacher, x, t, text, null, 3.0, noise, **k)):
        torch.testing.assert_close(term(normalise=True) * scale, term(normalise=False))
    assert scale.min() > 0.05
    torch.testing.assert_close(distill.normalised(x, x, x + 0.01), x / 0.05)
    assert distribution_matching(teacher, fake, x, torch.ones_like(t), text, noise).isfinite().all()     # where scale is 0


def test_shared_call_changes_nothing(nets, draws):
    (teacher, fake), (x, text, null, normal) = nets, (draws[k] for k in ("x", "text", "null", "normal"))
    tau_dm, tau_ca, noise_dm, noise_ca = draws["t"], draws["t"].flip(0), normal(B, D), normal(B, D)
    apart = distribution_matching(teacher, fake, x, tau_dm, text, noise_dm), cfg_augmentation(teacher, x, tau_ca, text, null, 3.0, noise_ca)
    teacher.batches.clear()
    for_dm, for_ca = shared_call(teacher, x, tau_dm, tau_ca, text, null, noise_dm, noise_ca)
    together = distribution_matching(for_dm, fake, x, tau_dm, text, noise_dm), cfg_augmentation(for_ca, x, tau_ca, text, null, 3.0, noise_ca)
    assert teacher.batches == [3 * B]
    for a, b in zip(apart, together):
        torch.testing.assert_close(a, b)


def test_proxy_loss_has_the_stated_gradient(draws):
    x, delta = draws["x"].requires_grad_(), draws["noise"]
    gradient, = torch.autograd.grad(proxy_loss(x, delta), x)
    torch.testing.assert_close(gradient, -delta / x.numel(), rtol=1e-12, atol=1e-15)


def test_a_step_along_it_moves_towards_the_teacher(draws):
    """A teacher whose data is one point, a fake that knows x: descending the proxy loss brings x nearer to that point."""
    x, t, noise, text = (draws[k] for k in ("x", "t", "noise", "text"))
    knows = lambda point: lambda x_t, t, text: (point - x_t) / (1 - t)[:, None]      # its data estimate is `point` from everywhere
    point = torch.full_like(x, 2.0)
    for normalise in (True, False):
        moved = x.clone().requires_grad_()
        proxy_loss(moved, distribution_matching(knows(point), knows(x), x, t, text, noise, normalise)).backward()
        before, after = (x - point).norm(dim=1), (moved.detach() - 0.1 * x.numel() * moved.grad - point).norm(dim=1)
        assert (after < before).all()


def test_join():
    a, b = torch.arange(6.).view(2, 3), torch.ones(1, 3)
    assert torch.equal(join(a, b, batch=2), torch.cat((a, b, b)))
    long, short = Text(torch.randn(2, 7, 4), torch.tensor([7, 5])), Text(torch.randn(1, 3, 4), torch.tensor([3]))
    both = join(long, short, batch=2)
    assert both.features.shape == (4, 7, 4) and both.lengths.tolist() == [7, 5, 3, 3]
    assert torch.equal(both.features[:2], long.features) and torch.equal(both.features[3, :3], short.features[0])
    assert (both.features[2:, 3:] == 0).all()


# --- The other shields --------------------------------------------------------------------------------------


def test_mean_variance_kl():
    """Equals Eq. 7 and PyTorch's KL of two Gaussians; 0, with no gradient, where every item has the wanted statistics."""
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64) + 1
    mean, var = 0.3, 1.7
    normal = torch.distributions.Normal
    wanted = [torch.distributions.kl_divergence(normal(i.mean(), i.std(correction=0)), normal(torch.tensor(mean), torch.tensor(var) ** 0.5)) for i in x]
    torch.testing.assert_close(mean_variance_kl(x, mean, var), torch.stack(wanted).mean(), rtol=1e-6, atol=0)
    items = x.flatten(1)
    at_target = ((items - items.mean(1, keepdim=True)) / items.std(1, correction=0, keepdim=True) * var ** 0.5 + mean).requires_grad_()
    loss = mean_variance_kl(at_target, mean, var)
    gradient, = torch.autograd.grad(loss, at_target)
    assert loss.abs() < 1e-12 and gradient.abs().max() < 1e-12


def test_gan_losses(nets, draws):
    """The two losses push the logits in opposite directions, R1 is 0 for a constant, and the frozen net stays out of it all."""
    frozen, (x, t, noise, null, normal) = nets[0].requires_grad_(False), (draws[k] for k in ("x", "t", "noise", "null", "normal"))
    judge = Discriminator(lambda x, t, text: frozen(x, t, text)[:, None], D).double()
    assert not any(p is q for p in judge.parameters() for q in frozen.parameters())
    real, x = normal(B, D) + 3, x.requires_grad_()
    generator_loss(judge, x, t, null, noise).backward()
    moved = x.detach() - 0.1 * x.grad / x.grad.abs().max()
    assert generator_loss(judge, moved, t, null, noise) < generator_loss(judge, x, t, null, noise)
    assert judge(renoise(moved, t, noise), t, null).mean() > judge(renoise(x, t, noise), t, null).mean()      # to look more real
    x.grad = None
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    times, losses = torch.full((B,), 0.9, dtype=torch.float64), []
    for _ in range(200):
        loss = discriminator_loss(judge, x, real, times, null, noise, r1=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0] and x.grad is None
    assert (judge(renoise(real, times, noise), times, null) > judge(renoise(x, times, noise), times, null)).all()
    with_r1 = lambda: discriminator_loss(judge, x, real, times, null, noise, torch.Generator().manual_seed(0), r1=1.0)
    assert with_r1() > losses[-1]
    for p in judge.parameters():
        torch.nn.init.zeros_(p)
    torch.testing.assert_close(with_r1(), 2 * torch.tensor(2.0).log().double())


# --- Times and trajectories ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tau_ranges(schedule, shift):
    steps, count = 4, 25_000
    for t in sampler.time_schedule(steps, shift)[:-1]:
        tau_dm, tau_ca = sample_tau(schedule, t.expand(count), shift, torch.Generator().manual_seed(1))
        low_dm, low_ca = {"coupled": (0, 0), "full": (0, 0), "constrained": (t, t), "hybrid": (0, t)}[schedule]
        for tau, low in ((tau_dm, low_dm), (tau_ca, low_ca)):
            assert (tau >= low).all() and (tau <= 1).all()
            # Uniform between the limits before the shift: mean and both ends.
            u, start = shift_time(tau.double(), 1 / shift), float(shift_time(torch.as_tensor(low).double(), 1 / shift))
            share = (u - start) / (1 - start)
            assert abs(share.mean() - 0.5) < 0.01 and share.min() < 0.001 and share.max() > 0.999
        assert torch.equal(tau_dm, tau_ca) == (schedule == "coupled")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shift_time_is_that_of_the_schedule(shift):
    u = torch.linspace(0, 1, 9)
    torch.testing.assert_close(shift_time(u, shift), sampler.time_schedule(8, shift), rtol=0, atol=1e-6)
    torch.testing.assert_close(shift_time(shift_time(u, shift), 1 / shift), u)


def test_backward_simulation_follows_the_sampler(draws):
    """State by state what sampler.sample runs: the output at step i, taken one Euler step on, is the state at step i + 1."""
    student, (noise, text) = Net(3), (draws[k] for k in ("noise", "text"))
    times, steps = sampler.time_schedule(4, 3.0), 4
    student.float()
    state, text = noise.float(), text.float()
    for i in range(steps):
        x, t = backward_simulation(student, noise.float(), text, times, i)
        assert (t == times[i]).all() and x.requires_grad
        v = (x - state) / (1 - times[i])
        state = (state + (times[i + 1] - times[i]) * v).detach()
        torch.testing.assert_close(state, sampler.sample(student, noise.float(), text, times[:i + 2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.detach(), sampler.sample(student, noise.float(), text, times), rtol=1e-4, atol=1e-5)   # the last output is the picture


def test_backward_simulation_has_gradient_in_the_last_call_only(draws):
    noise, text = draws["noise"].float(), draws["text"].float()
    times, student = sampler.time_schedule(4, 3.0), Net(3).float()
    x, _ = backward_simulation(student, noise, text, times, 3)
    x.sum().backward()
    alone = Net(3).float()
    z = sampler.sample(student, noise, text, times[:4])
    data_estimate(alone, z, times[3].expand(B), text).sum().backward()
    for p, q in zip(student.parameters(), alone.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


# --- One iteration ------------------------------------------------------------------------------------------


def players(**more):
    teacher, student, fake = (Net(i).float() for i in (1, 2, 3))
    cast = Players(teacher, student, torch.optim.Adam(student.parameters(), 1e-2), fake, torch.optim.Adam(fake.parameters(), 1e-2), **more)
    return cast, (teacher, student, fake)


def inputs():
    g = torch.Generator().manual_seed(5)
    return torch.randn(B, 3, generator=g), torch.zeros(1, 3), torch.randn(B, D, generator=g)


def weights(net):
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


class Recorder(torch.nn.Module):
    """Passes calls on to a net and keeps what it was asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x, t, text):
        self.calls.append((x.detach().clone(), t.clone(), text.clone()))
        return self.net(x, t, text)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_iteration_by_hand(schedule, normalise):
    """The student's gradient and what the fake is shown, recomputed from the formulas at the top of distill.py and the same draws."""
    text, null, noise = inputs()
    alpha, shift, steps = 3.0, 2.0, 3
    cast, (teacher, student, fake) = players()
    cast.fake = Recorder(fake)
    before = Net(2).float()                                  # the student as it was
    settings = Settings(steps=steps, alpha=alpha, schedule=schedule, shift=shift, normalise=normalise, fake_updates=1, clip=1e9)
    g = torch.Generator().manual_seed(3)
    figures = training_step(cast, text, null, noise, settings, torch.Generator().manual_seed(3))

    step, times = int(torch.randint(steps, (), generator=g)), sampler.time_schedule(steps, shift)
    z = sampler.sample(before, noise, text, times[:step + 1])
    t = times[step].expand(B)
    x = z + (1 - t[:, None]) * before(z, t, text)
    u_dm, u_ca = torch.rand(2, B, generator=g)
    start = shift_time(t, 1 / shift)
    shifted = lambda u: u / (u + shift * (1 - u))
    later = lambda u: shifted(start + (1 - start) * u)
    tau_dm, tau_ca = {"coupled": (shifted(u_dm), shifted(u_dm)), "full": (shifted(u_dm), shifted(u_ca)),
                      "constrained": (later(u_dm), later(u_ca)), "hybrid": (shifted(u_dm), later(u_ca))}[schedule]
    noise_dm = torch.randn(B, D, generator=g)
    noise_ca = noise_dm if schedule == "coupled" else torch.randn(B, D, generator=g)

    def estimate(net, tau, noise, text):
        tau = tau[:, None]
        x_tau = tau * x.detach() + (1 - tau) * noise
        return (x_tau + (1 - tau) * net(x_tau, tau[:, 0], text)).detach()
    old_fake = Net(3).float()
    real, imitated = estimate(teacher, tau_dm, noise_dm, text), estimate(old_fake, tau_dm, noise_dm, text)
    cond, uncond = estimate(teacher, tau_ca, noise_ca, text), estimate(teacher, tau_ca, noise_ca, null.expand(B, -1))
    scale = lambda e: (x.detach() - e).abs().mean(1, keepdim=True).clamp(min=0.05) if normalise else 1.0
    dm, ca = (real - imitated) / scale(real), (alpha - 1) * (cond - uncond) / scale(cond)
    wanted = torch.autograd.grad((-(dm + ca) / x.numel() * x).sum(), list(before.parameters()))
    for p, q in zip(student.parameters(), wanted):
        torch.testing.assert_close(p.grad, q, rtol=1e-3, atol=1e-6)
    assert figures["dm_rms"] == pytest.approx(dm.square().mean().sqrt().item(), rel=1e-4)
    assert figures["ca_rms"] == pytest.approx(ca.square().mean().sqrt().item(), rel=1e-4)

    # Two calls of the fake: the one above, and its own update, on the student's output at a time of the same range.
    (asked, *_), (x_tau, tau, shown) = cast.fake.calls
    torch.testing.assert_close(asked, tau_dm[:, None] * x.detach() + (1 - tau_dm[:, None]) * noise_dm)
    u = torch.rand(2, B, generator=g)[0]
    torch.testing.assert_close(tau, later(u) if schedule == "constrained" else shifted(u))
    torch.testing.assert_close(x_tau, tau[:, None] * x.detach() + (1 - tau[:, None]) * torch.randn(B, D, generator=g))
    assert torch.equal(shown, text)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_gradient_reaches_only_who_learns(schedule, alpha):
    text, null, noise = inputs()
    cast, (teacher, student, fake) = players()
    assert not distribution_matching(student, fake, noise.requires_grad_(), torch.rand(B), text, noise).requires_grad
    assert not cfg_augmentation(student, noise, torch.rand(B), text, null, alpha, noise).requires_grad
    noise = noise.detach()
    settings = Settings(steps=4, alpha=alpha, schedule=schedule, fake_updates=0)
    figures = training_step(cast, text, null, noise, settings, torch.Generator().manual_seed(0))
    assert all(p.grad is None for net in (teacher, fake) for p in net.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert figures["dm_rms"] > 0 and (figures["ca_rms"] > 0) == (alpha != 1)
    cast, (teacher, student, fake) = players()
    training_step(cast, text, null, noise, Settings(steps=4, fake_updates=3), torch.Generator().manual_seed(0), train_student=False)
    assert all(p.grad is None for net in (teacher, student) for p in net.parameters())
    assert all(p.grad is not None for p in fake.parameters())


def test_each_update_moves_its_own_network():
    text, null, noise = inputs()
    for train_student, updates in ((True, 0), (True, 2), (False, 2)):
        cast, nets = players()
        before = [weights(net) for net in nets]
        training_step(cast, text, null, noise, Settings(fake_updates=updates), torch.Generator().manual_seed(0), train_student)
        moved = [not torch.equal(weights(net), old) for net, old in zip(nets, before)]
        assert moved == [False, train_student, updates > 0]


def test_gan_shield_moves_student_and_discriminator():
    text, null, noise = inputs()
    frozen = Net(1).float().requires_grad_(False)
    judge = Discriminator(lambda x, t, text: frozen(x, t, text)[:, None], D)
    cast, (teacher, student, _) = players(discriminator=judge, discriminator_optimizer=torch.optim.Adam(judge.parameters(), 1e-2), real=torch.randn(9, D))
    cast.fake = None
    before = weights(student), weights(judge), weights(frozen)
    figures = training_step(cast, text, null, noise, Settings(shield="gan", alpha=1.0, shield_weight=1.0), torch.Generator().manual_seed(0))
    after = weights(student), weights(judge), weights(frozen)
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [False, False, True]
    assert "discriminator_loss" in figures and "fake_loss" not in figures


def test_update_clips():
    for clip, length in ((0.5, 0.5), (1e9, None)):
        net = Net(1)
        gradient = torch.autograd.grad(net.layers[0].weight.square().sum(), net.layers[0].weight)[0]
        distill.update(net.layers[0].weight.square().sum(), torch.optim.SGD(net.parameters(), 0.0), clip)
        assert net.layers[0].weight.grad.norm() == pytest.approx(length or gradient.norm().item(), rel=1e-4)
    assert gradient.norm() > 0.5


def test_update_forgets_gradient_left_by_others():
    """The student's GAN loss leaves gradient in the discriminator; its own step must not use it."""
    left, clean = Net(1), Net(1)
    for p in left.parameters():
        p.grad = torch.ones_like(p)
    for net in (left, clean):
        distill.update(net.layers[0].weight.square().sum(), torch.optim.SGD(net.parameters(), 0.1), clip=1e9)
    assert torch.equal(weights(left), weights(clean))


def test_meanvar_pulls_to_the_statistics_of_real_data():
    text, null, noise = inputs()
    real = 0.2 * torch.randn(500, D, generator=torch.Generator().manual_seed(1)) + 3
    cast, (_, student, _) = players(real=real)
    cast.fake = None
    for i in range(300):
        training_step(cast, text, null, noise, Settings(steps=1, shield="meanvar", alpha=1.0), torch.Generator().manual_seed(i))
    x = sampler.sample(student, noise, text, sampler.time_schedule(1, 3.0))
    assert abs(x.mean() - 3) < 0.05 and abs(x.std(1).mean() - 0.2) < 0.1


def test_same_generator_same_iteration():
    text, null, noise = inputs()
    results = []
    for seed in (0, 0, 1):
        cast, nets = players()
        results.append((training_step(cast, text, null, noise, Settings(steps=4), torch.Generator().manual_seed(seed)), weights(nets[1]), weights(nets[2])))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][2], results[1][2])
    assert results[0][0] != results[2][0]


def test_nothing_moves_on_a_loss_that_is_not_finite():
    text, null, noise = inputs()
    cast, (teacher, student, fake) = players()
    torch.nn.init.constant_(teacher.layers[2].bias, float("nan"))
    before = weights(student), weights(fake)
    with pytest.raises(FloatingPointError):
        training_step(cast, text, null, noise, Settings(), torch.Generator().manual_seed(0))
    assert torch.equal(weights(student), before[0]) and torch.equal(weights(fake), before[1])


# --- The command line ---------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """distill.py on the tiny teacher, two iterations at 32x32 unless told otherwise."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\n一只狐狸\n", encoding="utf-8")
    small = ["--teacher", TINY, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run", "--size", 32, "--iterations", 2,
             "--batch-size", 2, "--fake-updates", 1, "--log-every", 1]

    def call(*arguments):
        return run_here(distill.main, *small, *arguments)
    call.out = tmp_path / "run"
    return call


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tensors_of(out):
    return load_file(out / "student" / "dit.safetensors")


def test_a_run_leaves_all_it_promises(command):
    result = command("--steps", 4, "--sample-every", 1, "--warmup-fake", 1)
    assert result.returncode == 0, result.stderr
    assert "sampler.py" in result.stdout and str(command.out / "student") in result.stdout
    assert {f.name for f in command.out.iterdir()} == {"config.json", "log.jsonl", "samples", "student", "state.pt"}
    assert [f.name for f in sorted((command.out / "samples").iterdir())] == ["000001.png", "000002.png"]
    log = log_of(command.out)
    assert [line["iteration"] for line in log] == [1, 2]
    for name in ("loss", "fake_loss", "dm_rms", "ca_rms", "dm_over_ca", "cosine", "x_mean", "x_std", "std_ratio", "lr", "fake_lr", "seconds"):
        assert isinstance(log[-1][name], float), name
    config = json.loads((command.out / "config.json").read_text())
    assert config["settings"]["steps"] == 4 and config["settings"]["shift"] == 3.0 and config["options"]["dtype"] == "float32"

    student = sampler.load_pipeline(command.out / "student")
    assert (student.steps, student.trained_steps, student.guidance, student.size, student.shift) == (4, 4, 0.0, 32, 3.0)
    with pytest.warns(UserWarning, match="distilled to 4 steps"):
        sampler.generate(student, ["a cat"], steps=3, output="latent")


@pytest.mark.parametrize("shield", ["dm", "meanvar", "gan", "none"])
def test_every_shield_runs(command, shield, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 60), (90 * i, 40, 200)).save(tmp_path / "images" / f"{i}.png")
    images = ["--images", tmp_path / "images"] if shield in ("meanvar", "gan") else []
    result = command("--shield", shield, "--steps", 1, *images)
    assert result.returncode == 0, result.stderr
    log = log_of(command.out)
    assert ("fake_loss" in log[0]) == (shield == "dm") and ("discriminator_loss" in log[0]) == (shield == "gan")
    teacher = sampler.load_pipeline(TINY).dit.state_dict()
    assert any((tensors_of(command.out)[name].float() - value).abs().max() > 0 for name, value in teacher.items())


def test_resumed_is_the_same_run(command, monkeypatch, tmp_path):
    """Cut off after two iterations of four, then moved and resumed from elsewhere, the run goes on to the same end."""
    options = ["--iterations", 4, "--sample-every", 2, "--warmup-fake", 2, "--log-every", 3]
    assert command(*options).returncode == 0
    whole, log = torch.load(command.out / "state.pt"), log_of(command.out)
    step, calls = distill.training_step, []

    def cut_off(*arguments, **others):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*arguments, **others)
    monkeypatch.setattr(distill, "training_step", cut_off)
    assert command(*options, "--overwrite").returncode == 130
    assert torch.load(command.out / "state.pt")["progress"]["done"] == 2
    with open(command.out / "log.jsonl", "a") as file:
        file.write('{"iterat')                               # as a killed process leaves it
    moved = command.out.rename(tmp_path / "moved")
    monkeypatch.chdir(moved.parent)
    assert refused(run_here(distill.main, "--out", "moved", "--resume", "--alpha", 3), "--alpha", "2.0", "3.0")
    result = run_here(distill.main, "--out", "./moved/", "--resume")
    assert result.returncode == 0, result.stderr
    again = torch.load(moved / "state.pt")
    for name in ("student", "averaged", "fake"):
        assert all(torch.equal(whole[name][key], again[name][key]) for key in whole[name]), name
    for a, b in zip(log, log_of(moved), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    (moved / "state.pt").write_bytes(b"not a checkpoint")
    assert refused(run_here(distill.main, "--out", moved, "--resume"), "state.pt")


def test_numbers_of_a_run(command, monkeypatch):
    """Shift, averaged weights, rates, and the std that the outputs' is compared with, are what was asked for."""
    students = []
    step = distill.training_step
    monkeypatch.setattr(distill, "training_step", lambda players, *rest, **options: [
        step(players, *rest, **options), students.append([p.detach().clone() for p in players.student_optimizer.param_groups[0]["params"]])][0])
    result = command("--shift", 5, "--ema", 0.5, "--raw", "--schedule", "coupled", "--iterations", 3, "--lr", 1e-7, "--fake-lr", 3e-8, "--steps", 2)
    assert result.returncode == 0, result.stderr
    log, config = log_of(command.out), json.loads((command.out / "config.json").read_text())
    assert config["settings"] | {"shift": 5.0, "normalise": False, "schedule": "coupled", "steps": 2} == config["settings"]
    assert sampler.load_pipeline(command.out / "student").shift == 5.0
    assert [line["lr"] for line in log] == pytest.approx([1e-7 * i / distill.WARMUP for i in (1, 2, 3)]) and log[0]["fake_lr"] == 3e-8
    averaged = [p.clone() for p in sampler.load_pipeline(TINY).dit.parameters()]
    for i, student in enumerate(students):
        averaged = [torch.lerp(a, p, 1 - min(0.5, (i + 1) / (i + 10))) for a, p in zip(averaged, student)]
    state = torch.load(command.out / "state.pt")["averaged"]
    names = [name for name, _ in sampler.load_pipeline(TINY).dit.named_parameters()]
    for name, wanted in zip(names, averaged):
        torch.testing.assert_close(state[name], wanted)
    teacher = sampler.load_pipeline(TINY)
    teacher.size = 32
    wanted = torch.cat([sampler.generate(teacher, p, seed=s, output="latent") for p, s in ((["a cat", "a dog"], 0), (["一只狐狸"], 2))]).std()
    assert log[-1]["std_ratio"] == pytest.approx(log[-1]["x_std"] / wanted.item(), rel=1e-4)
    assert distill.learning_rate(390, distill.parse_arguments([])) == pytest.approx(2e-4 * 10 / 400)


def test_bfloat16_and_compile_run(command, monkeypatch):
    """bfloat16 matrix products give about the same first iteration; --compile compiles the three networks."""
    first = []
    for dtype, fast in (("float32", False), ("bfloat16", True), ("bfloat16", False)):
        monkeypatch.setattr(distill, "has_bfloat16_products", lambda: fast)
        result = command("--dtype", dtype, "--overwrite", "--iterations", 1)
        assert result.returncode == 0 and ("--dtype float32 takes a fraction" in result.stderr) == (dtype == "bfloat16" and not fast)
        first.append(log_of(command.out)[0])
    assert first[0]["ca_rms"] != first[1]["ca_rms"] and first[0]["ca_rms"] == pytest.approx(first[1]["ca_rms"], rel=0.1)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **options: compiled.append(options))
    assert command("--compile", "--overwrite", "--iterations", 1).returncode == 0
    assert compiled == [{"dynamic": True}] * 3


def test_what_is_there_is_kept(command, tmp_path):
    assert refused(command("--resume"), "no checkpoint")
    assert command().returncode == 0
    before = tensors_of(command.out)
    assert refused(command(), "--resume", "--overwrite")
    assert refused(command("--resume", "--overwrite"), "--resume", "--overwrite")
    assert all(torch.equal(before[name], value) for name, value in tensors_of(command.out).items())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert refused(command("--out", mine, "--overwrite"), "mine")
    (mine / "config.json").write_text('{"model": "mine"}')
    (mine / "log.jsonl").touch()
    assert refused(command("--out", mine, "--overwrite"), "mine")
    assert (mine / "thesis.txt").read_text() == "years of work" and (mine / "config.json").exists()
    (command.out / "state.pt").unlink()
    assert refused(command("--resume"), "--overwrite")
    assert command("--overwrite").returncode == 0


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(command, monkeypatch):
    step, calls = distill.training_step, []

    def fails_at_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise FloatingPointError("a loss or its gradient is not finite")
        return step(*arguments, **options)
    monkeypatch.setattr(distill, "training_step", fails_at_third)
    assert refused(command("--iterations", 4, "--sample-every", 2), "not finite", "iteration 3", command.out / "student")
    assert sampler.load_pipeline(command.out / "student").trained_steps == 4
    assert torch.load(command.out / "state.pt")["progress"]["done"] == 2


@pytest.mark.parametrize("arguments, words", [
    (["--steps", "0"], ["--steps"]), (["--alpha", "0.5"], ["--alpha"]), (["--alpha", "nan"], ["--alpha"]), (["--lr", "-1"], ["--lr"]),
    (["--ema", "2"], ["--ema"]), (["--seed", "-1"], ["--seed"]), (["--seed", 10 ** 14], ["--seed"]), (["--shift", "0"], ["shift"]),
    (["--shield", "none", "--warmup-fake", "5"], ["--warmup-fake"]), (["--size", "0"], ["--size"]),
    (["--size", "33"], ["multiple"]), (["--shield", "gan"], ["--images"]),
    (["--shield", "meanvar"], ["--images"]), (["--shield", "none", "--alpha", "1"], ["--alpha"]), (["--device", "nowhere"], ["--device"]),
    (["--prompts", "missing.txt"], ["missing.txt"]), (["--teacher", "missing"], ["missing"]),
    (["--shield", "gan", "--images", "missing"], ["missing"])])
def test_wrong_options_end_in_one_sentence(command, arguments, words):
    assert refused(command(*arguments), *words)
    assert not command.out.exists()


def test_a_teacher_of_ones_own_needs_prompts():
    assert refused(run_here(distill.main, "--teacher", TINY), "--prompts")
