"""The other shields of tutorials/shields.py: their mathematics, and their place in an iteration."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import sampler
import shields
from conftest import TINY, relative_error
from distill import Settings, no_dm, renoise, training_step
from model import Text
from test_distill import D, Net, generator, inputs, make_nets, weights

B = 6


@pytest.fixture
def draws():
    g = torch.Generator().manual_seed(0)
    names = ("x", "noise", "nudge", "real")
    draws = {name: torch.randn(B, D, generator=g, dtype=torch.float64) for name in names}
    return draws | {"t": torch.full((B,), 0.9, dtype=torch.float64),
                    "null": torch.zeros(1, 3, dtype=torch.float64)}


def discriminator(seed=1):
    """On the outputs of a frozen net, as features (B, D, 1)."""
    torch.manual_seed(seed)
    frozen = Net(seed).requires_grad_(False)

    def features(x, t, text):
        return frozen(x, t, text)[:, :, None]
    return shields.Discriminator(features, D), frozen


# --- Mean and variance --------------------------------------------------------------------------


def test_mean_variance_kl_is_the_kl_of_two_gaussians():
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64) + 1
    target = Normal(torch.tensor(0.3), torch.tensor(1.7) ** 0.5)
    wanted = [kl_divergence(Normal(i.mean(), i.std(correction=0)), target) for i in x]
    loss = shields.mean_variance_kl(x, 0.3, 1.7)
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), rtol=1e-6, atol=0)


def test_mean_variance_kl_is_zero_and_flat_at_the_target():
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True) * 1.7 ** 0.5 + 0.3
    x.requires_grad_()
    loss = shields.mean_variance_kl(x, 0.3, 1.7)
    gradient, = torch.autograd.grad(loss, x)
    assert loss.abs() < 1e-12 and gradient.abs().max() < 1e-12


def test_it_pulls_the_student_to_the_statistics_of_real_data():
    real = 0.2 * torch.randn(500, D, generator=generator(1)) + 3
    nets = make_nets(dm=no_dm, other_shield=shields.MeanVarianceShield(real))
    for i in range(300):
        training_step(nets, *inputs(), Settings(steps=1, alpha=1.0, fake_updates=0), generator(i))
    text, _, noise = inputs()
    x = sampler.sample(nets.student, noise, text, sampler.time_schedule(1, 3.0))
    assert abs(x.mean() - 3) < 0.05 and abs(x.std(1).mean() - 0.2) < 0.1


# --- GAN ----------------------------------------------------------------------------------------


def test_a_step_along_the_generators_loss_looks_more_real(draws):
    judge, _ = discriminator()
    judge, x = judge.double(), draws["x"].requires_grad_()
    t, null, noise = draws["t"], draws["null"], draws["noise"]
    shields.generator_loss(Float(judge), x, t, null, noise).backward()
    moved = x.detach() - 0.1 * x.grad / x.grad.abs().max()
    logits = [Float(judge)(renoise(points, t, noise), t, null).mean() for points in (moved, x)]
    assert logits[0] > logits[1]


class Float:
    """A discriminator in float32 on inputs in float64."""

    def __init__(self, judge):
        self.judge = judge.float()

    def __call__(self, x, t, null_text):
        return self.judge(x, t, null_text)


def test_the_discriminator_learns_to_tell_real_from_x(draws):
    judge, frozen = discriminator()
    before = weights(frozen)
    x, t, null, noise = (draws[name] for name in ("x", "t", "null", "noise"))
    x, real, losses = x.requires_grad_(), draws["real"] + 3, []
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    for _ in range(200):
        loss = shields.discriminator_loss(judge, x, real, t, null, noise, draws["nudge"], r1=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0] and x.grad is None
    on_real, on_x = (judge(renoise(points, t, noise), t, null) for points in (real, x))
    assert (on_real > on_x).all() and torch.equal(weights(frozen), before)


def test_r1_is_the_squared_slope_at_real_data(draws):
    judge, _ = discriminator()
    real, t, null, noise = (draws[name] for name in ("real", "t", "null", "noise"))
    nudge = 0.05 * draws["nudge"]
    plain, with_r1 = (shields.discriminator_loss(judge, draws["x"], real, t, null, noise, nudge, r1)
                      for r1 in (0.0, 2.0))
    x_t = renoise(real, t, noise)
    slope = (judge(x_t + nudge, t, null) - judge(x_t, t, null)) / nudge.std()
    torch.testing.assert_close(with_r1 - plain, 2 * slope.square().mean(), rtol=1e-4, atol=1e-6)


def test_a_discriminator_at_chance_has_twice_the_loss_of_a_coin(draws):
    judge, _ = discriminator()
    for p in judge.parameters():
        torch.nn.init.zeros_(p)
    loss = shields.discriminator_loss(judge, draws["x"], draws["real"], draws["t"], draws["null"],
                                      draws["noise"], draws["nudge"], r1=1.0)
    assert loss.item() == pytest.approx(2 * torch.tensor(2.0).log().item())


def test_the_gan_shield_moves_student_and_discriminator():
    judge, frozen = discriminator()
    frozen.float()
    shield = shields.GANShield(judge, torch.randn(9, D), torch.zeros(1, 3), weight=1.0)
    nets = make_nets(dm=no_dm, other_shield=shield)
    before = weights(nets.student), weights(judge), weights(frozen)
    training_step(nets, *inputs(), Settings(alpha=1.0, fake_updates=0), generator())
    after = weights(nets.student), weights(judge), weights(frozen)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [True, True, False] and shield.last_loss > 0


# --- On a DiT -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit():
    return sampler.load_pipeline(TINY).dit.requires_grad_(False)


@pytest.fixture
def batch(dit):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, dit.config.cap_feat_dim, generator=g)
    x = torch.randn(2, dit.config.in_channels, 4, 4, generator=g)
    return x, torch.rand(2, generator=g), Text(features, torch.tensor([5, 5]))


def test_the_first_layers_share_the_tensors_of_the_dit(dit, batch):
    cut = shields.first_layers(dit, 2)
    assert len(cut.layers) == 2
    weight = dit.layers[1].attention.to_q.weight
    assert cut.layers[1].attention.to_q.weight.data_ptr() == weight.data_ptr()
    x, t, text = batch
    features = cut(x.requires_grad_(), t, text)
    assert features.shape == (2, dit.config.dim // 4, 4, 4)
    features.sum().backward()
    assert x.grad.abs().max() > 0


def test_all_layers_and_the_last_one_are_the_dit(dit, batch):
    """Tokens of the whole stack, through the last layer by hand, are the velocity."""
    cut, caught = shields.first_layers(dit, len(dit.layers)), []
    cut.final_layer.register_forward_hook(lambda _, inputs, __: caught.append(inputs))
    cut(*batch)
    tokens, c = caught[0]
    by_hand = dit.final_layer(tokens, c)
    caught.clear()
    handle = dit.final_layer.register_forward_hook(lambda *_: caught.append(_[2]))
    dit(*batch)
    handle.remove()
    assert relative_error(by_hand, caught[0]) < 1e-6


def test_a_step_aware_fake_starts_as_the_fake_and_learns_the_step(batch):
    dit = sampler.load_pipeline(TINY).dit.requires_grad_(False)
    wanted = dit(*batch)
    aware = shields.StepAwareFake(dit, dit.t_embedder.mlp[-1].out_features)
    student = aware.watch(lambda x, t, text: x)
    student(batch[0], torch.full((2,), 0.25), None)
    assert torch.equal(aware(*batch), wanted)                # the embedding starts at zero
    torch.nn.init.normal_(aware.embedding.weight)
    outputs = []
    for t in (0.25, 0.25, 0.5):
        student(batch[0], torch.full((2,), t), None)
        outputs.append(aware(*batch))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    outputs[2].sum().backward()
    assert aware.embedding.weight.grad.abs().max() > 0
