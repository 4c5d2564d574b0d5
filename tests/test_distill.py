"""The mathematics of distill.py on small networks in float64: the terms, the times, one iteration.

The command line and the run: test_distill_run.py; adapters, processes: test_distill_scale.py.
"""

import pytest
import torch

import distill
import sampler
from distill import (
    SCHEDULES,
    Nets,
    Settings,
    backward_simulation,
    cfg_augmentation,
    data_estimate,
    distribution_matching,
    no_dm,
    proxy_loss,
    renoise,
    sample_tau,
    shift_time,
    training_step,
    warm_up,
)

B, D = 6, 5


class Net(torch.nn.Module):
    """A small nonlinear (x, t, text) -> v for points (B, D) and texts (B or 1, 3)."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(D + 4, 16), torch.nn.Tanh(), torch.nn.Linear(16, D)).double()

    def forward(self, x, t, text):
        return self.layers(torch.cat((x, t[:, None], text.expand(len(x), -1)), 1))


class Recorder(torch.nn.Module):
    """Passes calls on to a net and keeps what it was asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x, t, text):
        self.calls.append((x.detach().clone(), t.clone(), text.clone()))
        return self.net(x, t, text)


class KnowsOnePoint:
    """A net whose data estimate is `point` from everywhere."""

    def __init__(self, point):
        self.point = point

    def __call__(self, x_t, t, text):
        return (self.point - x_t) / (1 - t)[:, None]


@pytest.fixture
def draws():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    return {"x": normal(B, D), "t": torch.rand(B, generator=g, dtype=torch.float64),
            "noise": normal(B, D), "text": normal(B, 3), "null": normal(1, 3)}


@pytest.fixture
def pair():
    return Net(1), Net(2)


# --- The two terms ------------------------------------------------------------------------------


def test_renoise(draws):
    x, t, noise = draws["x"], draws["t"], draws["noise"]
    for i in range(B):
        torch.testing.assert_close(renoise(x, t, noise)[i], t[i] * x[i] + (1 - t[i]) * noise[i])


def test_data_estimate_of_the_true_velocity_is_the_data(draws):
    x, t, noise = draws["x"], draws["t"], draws["noise"]

    def exact(x_t, t, text):
        return x - noise
    torch.testing.assert_close(data_estimate(exact, renoise(x, t, noise), t, None), x)


@pytest.mark.parametrize("alpha", [1.0, 2.5, 8.0])
def test_sum_of_terms_is_dmd_with_guidance(pair, draws, alpha):
    """Eq. 6: at one tau and noise, not normalized, DM + CA is DMD: guided real minus fake."""
    (teacher, fake), (x, t, noise) = pair, (draws[k] for k in ("x", "t", "noise"))
    text, null = draws["text"], draws["null"]
    x_t = renoise(x, t, noise)
    cond, uncond = data_estimate(teacher, x_t, t, text), data_estimate(teacher, x_t, t, null)
    dmd = uncond + alpha * (cond - uncond) - data_estimate(fake, x_t, t, text)
    dm = distribution_matching(teacher, fake, x, t, text, noise, normalize=False)
    ca = cfg_augmentation(teacher, x, t, text, null, alpha, noise, normalize=False)
    torch.testing.assert_close(dm + ca, dmd, rtol=1e-12, atol=1e-12)
    assert (dm.abs() > 1e-3).any() and (alpha == 1 or (ca.abs() > 1e-3).any())


@pytest.mark.parametrize("normalize", [True, False])
def test_terms_that_vanish(pair, draws, normalize):
    teacher, (x, t, noise, text) = pair[0], (draws[k] for k in ("x", "t", "noise", "text"))
    ca = cfg_augmentation(teacher, x, t, text, draws["null"], 1.0, noise, normalize)
    dm = distribution_matching(teacher, teacher, x, t, text, noise, normalize)
    assert (ca == 0).all() and (dm == 0).all()


def test_each_term_is_divided_by_the_error_of_its_own_estimate(pair, draws):
    (teacher, fake), (x, noise, text) = pair, (draws[k] for k in ("x", "noise", "text"))
    t = 0.8 * draws["t"]                                     # the floor is not reached
    estimate = data_estimate(teacher, renoise(x, t, noise), t, text)
    scale = (x - estimate).abs().mean(1, keepdim=True)
    assert scale.min() > 0.05
    dm = [distribution_matching(teacher, fake, x, t, text, noise, normalize)
          for normalize in (True, False)]
    ca = [cfg_augmentation(teacher, x, t, text, draws["null"], 3.0, noise, normalize)
          for normalize in (True, False)]
    torch.testing.assert_close(dm[0] * scale, dm[1])
    torch.testing.assert_close(ca[0] * scale, ca[1])


def test_the_normalizer_has_a_floor(pair, draws):
    x, noise, text = (draws[k] for k in ("x", "noise", "text"))
    torch.testing.assert_close(distill.normalized(x, x, x + 0.01), x / 0.05)
    at_the_data = torch.ones(B, dtype=torch.float64)         # there the scale is 0
    assert distribution_matching(*pair, x, at_the_data, text, noise).isfinite().all()


def test_proxy_loss_has_the_stated_gradient(draws):
    x, delta = draws["x"].requires_grad_(), draws["noise"]
    gradient, = torch.autograd.grad(proxy_loss(x, delta), x)
    torch.testing.assert_close(gradient, -delta / x.numel(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_step_along_dm_moves_towards_the_teacher(draws, normalize):
    """The teacher's data is one point, and the fake knows x."""
    x, t, noise, text = (draws[k] for k in ("x", "t", "noise", "text"))
    point = torch.full_like(x, 2.0)
    moved = x.clone().requires_grad_()
    dm = distribution_matching(KnowsOnePoint(point), KnowsOnePoint(x), x, t, text, noise, normalize)
    proxy_loss(moved, dm).backward()
    after = moved.detach() - 0.1 * x.numel() * moved.grad
    assert ((after - point).norm(dim=1) < (x - point).norm(dim=1)).all()


def test_a_wrong_sign_moves_away(draws):
    x, t, noise, text = (draws[k] for k in ("x", "t", "noise", "text"))
    point = torch.full_like(x, 2.0)
    dm = distribution_matching(KnowsOnePoint(x), KnowsOnePoint(point), x, t, text, noise, False)
    assert ((x + 0.1 * dm - point).norm(dim=1) > (x - point).norm(dim=1)).all()


def test_fake_loss_is_flow_matching_without_gradient_to_x(pair, draws):
    x, t, noise, text = (draws[k] for k in ("x", "t", "noise", "text"))
    x = x.requires_grad_()
    loss = distill.fake_loss(pair[1], x, t, text, noise)
    v = pair[1](renoise(x, t, noise), t, text)
    torch.testing.assert_close(loss, (v - (x - noise)).square().mean())
    loss.backward()
    assert x.grad is None and all(p.grad is not None for p in pair[1].parameters())


# --- Times and trajectories ---------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("schedule, lows", [
    ("coupled", (0, 0)), ("full", (0, 0)), ("constrained", (1, 1)), ("hybrid", (0, 1))])
def test_tau_is_uniform_before_the_shift(schedule, lows, shift):
    for t in sampler.time_schedule(4, shift)[:-1]:
        taus = sample_tau(schedule, t.expand(25_000), shift, torch.Generator().manual_seed(1))
        for tau, low in zip(taus, lows, strict=True):
            assert (tau >= low * t).all() and (tau <= 1).all()
            u, start = shift_time(tau.double(), 1 / shift), shift_time(low * t.double(), 1 / shift)
            share = (u - start) / (1 - start)
            assert abs(share.mean() - 0.5) < 0.01 and share.min() < 0.001 and share.max() > 0.999
        assert torch.equal(*taus) == (schedule == "coupled")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shift_time_is_that_of_the_schedule(shift):
    u = torch.linspace(0, 1, 9)
    times = sampler.time_schedule(8, shift)
    torch.testing.assert_close(shift_time(u, shift), times, rtol=0, atol=1e-6)
    torch.testing.assert_close(shift_time(times, 1 / shift), u)


def test_backward_simulation_follows_the_sampler(draws):
    """The output at step i, taken one Euler step on, is the sampler's state at step i + 1."""
    student, noise, text = Net(3).float(), draws["noise"].float(), draws["text"].float()
    times, state = sampler.time_schedule(4, 3.0), noise
    for i in range(4):
        x, t = backward_simulation(student, noise, text, times, i)
        assert (t == times[i]).all() and x.requires_grad
        v = (x - state) / (1 - times[i])
        state = (state + (times[i + 1] - times[i]) * v).detach()
        wanted = sampler.sample(student, noise, text, times[:i + 2])
        torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.detach(), wanted, rtol=1e-4, atol=1e-5)     # the picture


def test_backward_simulation_has_gradient_in_the_last_call_only(draws):
    noise, text = draws["noise"].float(), draws["text"].float()
    times, student, alone = sampler.time_schedule(4, 3.0), Net(3).float(), Net(3).float()
    x, _ = backward_simulation(student, noise, text, times, 3)
    x.sum().backward()
    z = sampler.sample(student, noise, text, times[:4])
    data_estimate(alone, z, times[3].expand(B), text).sum().backward()
    for p, q in zip(student.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# --- One iteration ------------------------------------------------------------------------------


def make_nets(**more):
    teacher, student, fake = (Net(i).float() for i in (1, 2, 3))
    optimizers = {"student_optimizer": torch.optim.Adam(student.parameters(), 1e-2),
                  "fake_optimizer": torch.optim.Adam(fake.parameters(), 1e-2)}
    return Nets(teacher, student, fake, **optimizers, **more)


def inputs():
    g = torch.Generator().manual_seed(5)
    text, noise = torch.randn(B, 3, generator=g), torch.randn(B, D, generator=g)
    return text, torch.zeros(1, 3), noise


def weights(net):
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class ByHand:
    """An iteration from the formulas of the paper and the same draws, in the pinned order.

    The order is: the step; tau for DM and CA; noise for DM; noise for CA (none if coupled); then
    for each update of the fake: two uniform numbers, of which it uses the first; noise.
    """

    def __init__(self, settings, student, seed):
        self.s, g = settings, torch.Generator().manual_seed(seed)
        text, null, noise = inputs()
        step = int(torch.randint(settings.steps, (), generator=g))
        times = sampler.time_schedule(settings.steps, settings.shift)
        z = sampler.sample(student, noise, text, times[:step + 1])
        self.t = times[step].expand(B)
        self.x = z + (1 - self.t[:, None]) * student(z, self.t, text)
        u_dm, u_ca = torch.rand(2, B, generator=g)
        self.tau_dm = self.after_t(u_dm) if settings.schedule == "constrained" else self.shift(u_dm)
        self.tau_ca = {"coupled": self.tau_dm, "full": self.shift(u_ca)}.get(
            settings.schedule, self.after_t(u_ca))
        self.noise_dm = torch.randn(B, D, generator=g)
        self.noise_ca = self.noise_dm
        if settings.schedule != "coupled":
            self.noise_ca = torch.randn(B, D, generator=g)
        self.tau_fake = self.shift(torch.rand(2, B, generator=g)[0])
        self.noise_fake = torch.randn(B, D, generator=g)

    def shift(self, u):
        return u / (u + self.s.shift * (1 - u))

    def after_t(self, u):
        start = self.t / (self.t + (1 - self.t) / self.s.shift)
        return self.shift(start + (1 - start) * u)

    def noised(self, tau, noise):
        return tau[:, None] * self.x.detach() + (1 - tau[:, None]) * noise

    def estimate(self, net, tau, noise, text):
        x_tau = self.noised(tau, noise)
        return (x_tau + (1 - tau[:, None]) * net(x_tau, tau, text)).detach()

    def scale(self, estimate):
        if not self.s.normalize:
            return 1.0
        return (self.x.detach() - estimate).abs().mean(1, keepdim=True).clamp(min=0.05)

    def terms(self, teacher, fake):
        text, null, _ = inputs()
        real = self.estimate(teacher, self.tau_dm, self.noise_dm, text)
        dm = (real - self.estimate(fake, self.tau_dm, self.noise_dm, text)) / self.scale(real)
        cond = self.estimate(teacher, self.tau_ca, self.noise_ca, text)
        uncond = self.estimate(teacher, self.tau_ca, self.noise_ca, null)
        return dm, (self.s.alpha - 1) * (cond - uncond) / self.scale(cond)


@pytest.fixture(params=[(schedule, normalize) for schedule in SCHEDULES
                        for normalize in (True, False)])
def iteration(request):
    schedule, normalize = request.param
    settings = Settings(steps=3, alpha=3.0, schedule=schedule, shift=2.0, normalize=normalize,
                        fake_updates=1, clip=1e9)
    nets = make_nets()
    nets.fake = Recorder(nets.fake)
    before = Net(2).float()                                  # the student as it was
    metrics = training_step(nets, *inputs(), settings, generator(3))
    return nets, metrics, ByHand(settings, before, 3), before


def test_the_students_gradient_is_that_of_the_formulas(iteration):
    nets, _, by_hand, before = iteration
    dm, ca = by_hand.terms(nets.teacher, Net(3).float())
    loss = (-(dm + ca) / by_hand.x.numel() * by_hand.x).sum()
    wanted = torch.autograd.grad(loss, list(before.parameters()))
    for p, q in zip(nets.student.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, q, rtol=1e-3, atol=1e-6)


def test_the_metrics_are_the_sizes_and_the_angle_of_the_terms(iteration):
    nets, metrics, by_hand, _ = iteration
    dm, ca = by_hand.terms(nets.teacher, Net(3).float())
    cosine = (dm * ca).sum() / (dm.norm() * ca.norm())
    assert metrics["dm_rms"] == pytest.approx(dm.square().mean().sqrt().item(), rel=1e-4)
    assert metrics["ca_rms"] == pytest.approx(ca.square().mean().sqrt().item(), rel=1e-4)
    assert metrics["cosine"] == pytest.approx(cosine.item(), rel=1e-3, abs=1e-5)
    assert metrics["x_std"] == pytest.approx(by_hand.x.std().item(), rel=1e-4)


def test_the_fake_is_asked_where_dm_is_and_learns_on_uniform_times(iteration):
    nets, _, by_hand, _ = iteration
    (asked, *_), (x_tau, tau, text) = nets.fake.calls
    torch.testing.assert_close(asked, by_hand.noised(by_hand.tau_dm, by_hand.noise_dm))
    torch.testing.assert_close(tau, by_hand.tau_fake)
    torch.testing.assert_close(x_tau, by_hand.noised(by_hand.tau_fake, by_hand.noise_fake))
    assert torch.equal(text, inputs()[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_gradient_reaches_the_student_only(schedule, alpha):
    nets = make_nets()
    settings = Settings(alpha=alpha, schedule=schedule, fake_updates=0)
    metrics = training_step(nets, *inputs(), settings, generator())
    frozen = [*nets.teacher.parameters(), *nets.fake.parameters()]
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in nets.student.parameters())
    assert metrics["dm_rms"] > 0 and (metrics["ca_rms"] > 0) == (alpha != 1)


@pytest.mark.parametrize("updates", [0, 2])
def test_each_update_moves_its_own_network(updates):
    nets = make_nets()
    before = [weights(net) for net in (nets.teacher, nets.student, nets.fake)]
    training_step(nets, *inputs(), Settings(fake_updates=updates), generator())
    moved = [not torch.equal(weights(net), old) for net, old in
             zip((nets.teacher, nets.student, nets.fake), before, strict=True)]
    assert moved == [False, True, updates > 0]


def test_the_warm_up_moves_the_fake_only():
    nets, (text, _, noise) = make_nets(), inputs()
    before = [weights(net) for net in (nets.teacher, nets.student, nets.fake)]
    losses = warm_up(nets, text, noise, Settings(fake_updates=3), generator())
    moved = [not torch.equal(weights(net), old) for net, old in
             zip((nets.teacher, nets.student, nets.fake), before, strict=True)]
    assert moved == [False, False, True] and losses["fake_loss"] > 0
    assert all(p.grad is None for p in nets.student.parameters())


def test_no_dm_leaves_the_spear_alone():
    nets = make_nets(dm=no_dm)
    metrics = training_step(nets, *inputs(), Settings(fake_updates=0), generator())
    assert metrics["dm_rms"] == 0 and metrics["ca_rms"] > 0 and "fake_loss" not in metrics


class Pull:
    """A shield that pulls x towards 1 and counts its updates."""
    updates = 0

    def loss(self, x):
        return 1000 * (x - 1).square().mean()

    def update(self, x):
        assert not x.requires_grad
        self.updates += 1


def test_a_shield_adds_its_loss_and_is_updated():
    nets = make_nets(other_shield=Pull())
    plain = training_step(make_nets(), *inputs(), Settings(), generator())
    shielded = training_step(nets, *inputs(), Settings(), generator())
    assert shielded["loss"] > plain["loss"] + 100 and nets.other_shield.updates == 1


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_update_clips(clip):
    weight = Net(1).layers[0].weight
    gradient, = torch.autograd.grad(weight.square().sum(), weight)
    distill.update(weight.square().sum(), torch.optim.SGD([weight], 0.0), clip)
    assert gradient.norm() > 0.5
    assert weight.grad.norm() == pytest.approx(min(clip, gradient.norm().item()), rel=1e-4)


def test_update_forgets_gradient_left_by_others():
    left, clean = Net(1), Net(1)
    for p in left.parameters():
        p.grad = torch.ones_like(p)
    for net in (left, clean):
        loss = net.layers[0].weight.square().sum()
        distill.update(loss, torch.optim.SGD(net.parameters(), 0.1), clip=1e9)
    assert torch.equal(weights(left), weights(clean))


def test_same_generator_same_iteration():
    runs = []
    for seed in (0, 0, 1):
        nets = make_nets()
        metrics = training_step(nets, *inputs(), Settings(), generator(seed))
        runs.append((metrics, weights(nets.student), weights(nets.fake)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1]) and torch.equal(runs[0][2], runs[1][2])


def test_nothing_moves_on_a_gradient_that_is_not_finite():
    nets = make_nets()
    torch.nn.init.constant_(nets.teacher.layers[2].bias, float("nan"))
    before = weights(nets.student), weights(nets.fake)
    with pytest.raises(FloatingPointError):
        training_step(nets, *inputs(), Settings(), generator())
    assert torch.equal(weights(nets.student), before[0])
    assert torch.equal(weights(nets.fake), before[1])
