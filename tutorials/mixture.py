"""A small world with an exact teacher: a 2-D mixture of Gaussians, its velocity in closed form.

Four classes of three Gaussians each; text is the class of each item, (B,), and -1 is no text.
Notebook 1 draws with it. tests/test_distill_toy.py shows on it what each term of distill.py does,
without a network to blame.
"""

import copy
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # see sampler.py
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import (
    Nets,
    Settings,
    backward_simulation,
    no_dm,
    renoise,
    shift_time,
    training_step,
)
from sampler import time_schedule

CLASSES, PARTS, SPREAD = 4, 3, 0.25
NULL = torch.tensor([-1])


def ring(count, radius):
    angle = torch.arange(count) * 2 * math.pi / count
    return radius * torch.stack((angle.cos(), angle.sin()), -1)


MEANS = (ring(CLASSES, 1.2)[:, None] + ring(PARTS, 0.5)).flatten(0, 1)     # (12, 2), by class
OWNER = torch.arange(CLASSES * PARTS) // PARTS


def draw(text, g):
    """One data point for each class of text (B,) -> (B, 2)."""
    means = MEANS[text * PARTS + torch.randint(PARTS, text.shape, generator=g)]
    return means + SPREAD * torch.randn(means.shape, generator=g)


# --- The exact velocity -------------------------------------------------------------------------


def log_densities(x, t, text, means=MEANS, owner=OWNER, spread=SPREAD):
    """log p(x_t from Gaussian k) + constant, (B, K): -inf for those of other classes than text."""
    time = t[:, None]
    variance = (time * spread) ** 2 + (1 - time) ** 2
    logits = -(x[:, None] - t[:, None, None] * means).square().sum(-1) / (2 * variance)
    return logits.masked_fill((text[:, None] >= 0) & (owner != text[:, None]), -math.inf)


def gaussian_velocity(x, t, text, means, owner, spread):
    """E[data - noise | x_t = x] of equal Gaussians around `means` (K, 2) of classes `owner` (K,).

    In each Gaussian it is linear in x. The Gaussians are weighted by how likely x came from each.
    """
    time = t[:, None]
    slope = (time * spread**2 - (1 - time)) / ((time * spread) ** 2 + (1 - time) ** 2)
    each = means + slope[..., None] * (x[:, None] - time[..., None] * means)           # (B, K, 2)
    weights = log_densities(x, t, text, means, owner, spread).softmax(-1)
    return (weights[..., None] * each).sum(1)


def teacher(x, t, text):
    """The exact velocity of the twelve Gaussians."""
    return gaussian_velocity(x, t, text, MEANS, OWNER, SPREAD)


# --- Networks -------------------------------------------------------------------------------------


class MLP(nn.Module):
    """A small velocity network on points: 21,394 parameters. Text -1 is none."""

    def __init__(self, classes=CLASSES, width=96):
        super().__init__()
        self.embed = nn.Embedding(classes + 1, 16)
        layers = [nn.Linear(25, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(width, 2)

    def features(self, x, t, text):
        waves = t[:, None] * torch.tensor([1.0, 2.0, 4.0]) * math.pi
        text = self.embed(text.expand(len(x)) + 1)
        return self.body(torch.cat((x, t[:, None], waves.sin(), waves.cos(), text), -1))

    def forward(self, x, t, text):
        return self.out(self.features(x, t, text))


def fit_teacher(count=800):
    """The teacher as an MLP, for student and fake to start from: seconds."""
    torch.manual_seed(0)
    g, net = torch.Generator().manual_seed(0), MLP()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for _ in range(count):
        text = torch.randint(CLASSES, (256,), generator=g)
        x, t = draw(text, g), shift_time(torch.rand(256, generator=g), 2.0)
        x = renoise(x, t, torch.randn(256, 2, generator=g))
        text = text.where(torch.rand(256, generator=g) > 0.2, NULL)
        loss = F.mse_loss(net(x, t, text), teacher(x, t, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


# --- Distillation ---------------------------------------------------------------------------------


class FakePerStep(nn.Module):
    """The fake of the step that the student has just taken: several nets behind one call."""

    def __init__(self, net, count, times):
        super().__init__()
        self.nets = nn.ModuleList(copy.deepcopy(net) for _ in range(count))
        self.times, self.step = times.tolist(), 0

    def watch(self, student):
        """The student, which now tells at each call which of its steps it takes."""
        def watched(x, t, text):
            self.step = self.times.index(t[0].item()) % len(self.nets)
            return student(x, t, text)
        return watched

    def forward(self, x, t, text):
        return self.nets[self.step](x, t, text)


def train(start, count, seed=0, lr=1e-3, batch=128, fakes=1, dm=True, shield=None, **settings):
    """`count` iterations of distill.training_step with rates that fall to 0 -> the student.

    fakes: one for all of the student's steps, or as many as it has. dm False: without DM. shield:
    another shield (tutorials/shields.py). settings: of distill.Settings.
    """
    g, settings = torch.Generator().manual_seed(seed), Settings(**settings)
    student = copy.deepcopy(start).requires_grad_(True)
    times = time_schedule(settings.steps, settings.shift)
    fake = FakePerStep(start, fakes, times).requires_grad_(True)
    if not dm:
        settings.fake_updates = 0
    optimizers = [torch.optim.Adam(net.parameters(), lr, (0.0, 0.999)) for net in (student, fake)]
    options = {} if dm else {"dm": no_dm}
    if shield is not None:
        options["other_shield"] = shield
    nets = Nets(teacher, fake.watch(student), fake, *optimizers, **options)
    for i in range(count):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * (1 - i / count)
        text = torch.randint(CLASSES, (batch,), generator=g)
        noise = torch.randn(batch, 2, generator=g)
        training_step(nets, text, NULL, noise, settings, g)
    return student.requires_grad_(False)


# --- Measures -------------------------------------------------------------------------------------


def sliced_distance(x, data, directions=32):
    """Sliced Wasserstein-1 distance of two clouds of as many points: how far points must move.

    Both are projected on many directions. Sorted, the n-th point of one goes to the n-th of the
    other.
    """
    angle = torch.arange(directions) * math.pi / directions
    axes = torch.stack((angle.cos(), angle.sin()))
    return ((x @ axes).sort(0).values - (data @ axes).sort(0).values).abs().mean().item()


def judge(x, text):
    """Samples (B, 2) -> accuracy, std, std inside a class, distance inside a class.

    Accuracy is that of the best possible classifier. Both stds are over those of the data. The
    distance is the sliced Wasserstein-1 distance to the data, averaged over classes.
    """
    real, ones = draw(text, torch.Generator().manual_seed(99)), torch.ones(len(x))
    logits = log_densities(x, ones, NULL.expand(len(x))).unflatten(1, (CLASSES, PARTS))
    accuracy = (logits.logsumexp(-1).argmax(-1) == text).float().mean().item()
    classes = [(x[text == c], real[text == c]) for c in range(CLASSES)]
    inside = sum((a.std(0) / b.std(0)).mean().item() for a, b in classes) / CLASSES
    distance = sum(sliced_distance(a, b) for a, b in classes) / CLASSES
    return accuracy, (x.std() / real.std()).item(), inside, distance


def outputs(student, steps):
    """The student's outputs of every step; the last are the samples -> list of (2000, 2), text."""
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    text, times = torch.arange(2000) % CLASSES, time_schedule(steps, 3.0)
    xs = [backward_simulation(student, noise, text, times, step)[0] for step in range(steps)]
    return xs, text
