"""Decoupled DMD on a 2-D mixture of Gaussians: what each term does, without a network to blame.

The mixture, its exact teacher and the training are in tutorials/mixture.py. "Distance" is the
sliced Wasserstein-1 distance inside the classes.
"""

import pytest
import torch

from distill import NoOtherShield, renoise
from mixture import (
    CLASSES,
    NULL,
    draw,
    fit_teacher,
    judge,
    log_densities,
    outputs,
    teacher,
    train,
)

MANY = 200_000


def posterior_mean(x, t, text, g):
    """E[data - noise | x_t = x] for one x and class, by weighting random draws."""
    source = text.expand(MANY)
    if text < 0:
        source = torch.randint(CLASSES, (MANY,), generator=g)
    if t <= 0.7:                       # draw data; the noise follows from x_t
        data = draw(source, g)
        noise = (x - t * data) / (1 - t)
        weight = (-noise.square().sum(-1) / 2).softmax(0)
    else:                              # draw noise; the data follow
        noise = torch.randn(MANY, 2, generator=g)
        data = (x - (1 - t) * noise) / t
        weight = log_densities(data, torch.ones(MANY), text.expand(MANY)).logsumexp(-1).softmax(0)
    return (weight[:, None] * (data - noise)).sum(0)


@pytest.mark.parametrize("t", [0.0, 0.02, 0.3, 0.7, 0.98, 1.0])
@pytest.mark.parametrize("conditional", [True, False])
def test_the_teacher_is_the_posterior_mean(t, conditional):
    g = torch.Generator().manual_seed(0)
    text = torch.arange(4) if conditional else NULL.expand(4)
    times = torch.full((4,), t)
    x = renoise(draw(torch.arange(4), g), times, torch.randn(4, 2, generator=g))
    velocities = teacher(x, times, text)
    for i in range(4):
        expected = posterior_mean(x[i], t, text[i], g)
        torch.testing.assert_close(velocities[i], expected, atol=0.03, rtol=0.01)


@pytest.fixture(scope="module")
def start():
    return fit_teacher()


def samples_of(start, count, steps=1, **settings):
    """judge of the samples of a student, and of the outputs of all its steps together.

    The latter are what one fake for all steps sees.
    """
    xs, text = outputs(train(start, count, steps=steps, **settings), steps)
    turn = torch.arange(len(text)) // CLASSES % steps
    mixed = torch.stack(xs)[turn, torch.arange(len(text))]
    return judge(xs[-1], text), judge(mixed, text)


def test_distribution_matching_alone_is_faithful(start):
    (accuracy, std, inside, distance), _ = samples_of(start, 400, alpha=1.0)
    assert accuracy > 0.9
    assert abs(std - 1) < 0.1
    assert abs(inside - 1) < 0.15
    assert distance < 0.1


def test_the_spear_alone_explodes(start):
    (accuracy, std, *_), _ = samples_of(start, 100, alpha=3.0, dm=False)
    assert accuracy > 0.98
    assert std > 10


def test_the_spear_with_distribution_matching_is_bounded_and_sharper(start):
    (accuracy, std, inside, _), _ = samples_of(start, 250, alpha=3.0)
    assert accuracy > 0.99
    assert 1 < std < 3
    assert inside < 0.7


def test_another_shield_holds_the_spear(start):
    """DM or another one: what train passes on to Nets is asked in every iteration."""
    calls = []

    class Watched(NoOtherShield):
        def update(self, x):
            calls.append(x.shape)
    train(start, 3, alpha=3.0, dm=False, shield=Watched())
    assert calls == [(128, 2)] * 3


# Two steps: one fake for all steps knows the mixture of their outputs and nothing more. Once the
# mixture is right, distribution matching is zero: one step may make what the other leaves out. In
# that direction nothing pulls the student back, so it wanders. With a fake for each step it does
# not.


@pytest.mark.slow
def test_two_steps_with_one_fake_are_right_in_the_mixture(start):
    samples, mixed = samples_of(start, 400, steps=2, alpha=1.0)
    assert mixed[0] > 0.9
    assert abs(mixed[1] - 1) < 0.1
    assert samples[3] > 1.3 * mixed[3]         # the wandering


@pytest.mark.slow
def test_two_steps_with_a_fake_each_are_faithful(start):
    shared, _ = samples_of(start, 400, steps=2, alpha=1.0)
    samples, mixed = samples_of(start, 400, steps=2, alpha=1.0, fakes=2)
    for accuracy, std, inside, _ in (samples, mixed):
        assert accuracy > 0.9
        assert abs(std - 1) < 0.1
        assert abs(inside - 1) < 0.15
    assert samples[3] < shared[3]
