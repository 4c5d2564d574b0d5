"""A small world with an exact teacher: a 2-D mixture of Gaussians, whose velocity is known in closed form.

Four classes of three Gaussians each; text is the class of each item, (B,), and -1 is no text. The notebooks draw with it, and
tests/test_distill_toy.py shows on it what each term of distill.py does, without a network to blame.
"""

import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import Discriminator, Players, Settings, backward_simulation, renoise, shift_time, training_step  # noqa: E402
from sampler import time_schedule  # noqa: E402

CLASSES, PARTS, SPREAD = 4, 3, 0.25
NULL = torch.tensor([-1])


def ring(count, radius):
    angle = torch.arange(count) * 2 * math.pi / count
    return radius * torch.stack((angle.cos(), angle.sin()), -1)


MEANS = (ring(CLASSES, 1.2)[:, None] + ring(PARTS, 0.5)).flatten(0, 1)         # (12, 2), class by class
OWNER = torch.arange(CLASSES * PARTS) // PARTS


def draw(text, g):
    means = MEANS[text * PARTS + torch.randint(PARTS, text.shape, generator=g)]
    return means + SPREAD * torch.randn(means.shape, generator=g)


def log_densities(x, t, text):
    """log p(x_t from Gaussian k) up to a constant, (B, 12): -inf for those of other classes than the text's."""
    var = (t * SPREAD) ** 2 + (1 - t) ** 2
    logits = -(x[:, None] - t[:, None, None] * MEANS).square().sum(-1) / (2 * var[:, None])
    return logits.masked_fill((text[:, None] >= 0) & (OWNER != text[:, None]), -math.inf)


def teacher(x, t, text):
    """E[data - noise | x_t = x]: in each Gaussian linear in x, and their mean by how likely x came from each."""
    slope = (t * SPREAD**2 - (1 - t)) / ((t * SPREAD) ** 2 + (1 - t) ** 2)        # cov(data - noise, x_t) / var(x_t)
    each = MEANS + slope[:, None, None] * (x[:, None] - t[:, None, None] * MEANS)                       # (B, 12, 2)
    return (log_densities(x, t, text).softmax(-1)[..., None] * each).sum(1)


def gaussian_velocity(x, t, text, means, owner, spread):
    """E[data - noise | x_t = x] of equal Gaussians around `means` (K, 2), of which text c has those with owner c; -1 has all."""
    at, time = t[:, None, None] * means, t[:, None]                                             # (B, K, 2)
    variance = (time * spread) ** 2 + (1 - time) ** 2
    weights = -(x[:, None] - at).square().sum(-1) / (2 * variance)
    weights = weights.masked_fill((text[:, None] >= 0) & (owner != text[:, None]), -math.inf).softmax(-1)
    slope = (time * spread**2 - (1 - time)) / variance
    return (weights[..., None] * (means + slope[..., None] * (x[:, None] - at))).sum(1)


class MLP(nn.Module):
    """Student, fake, and what the discriminator sees: 21,394 parameters."""

    def __init__(self, width=96):
        super().__init__()
        self.embed = nn.Embedding(CLASSES + 1, 16)
        self.body = nn.Sequential(nn.Linear(25, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 2)

    def features(self, x, t, text):
        waves = t[:, None] * torch.tensor([1.0, 2.0, 4.0]) * math.pi
        return self.body(torch.cat((x, t[:, None], waves.sin(), waves.cos(), self.embed(text.expand(len(x)) + 1)), -1))

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
        x, text = renoise(x, t, torch.randn(256, 2, generator=g)), text.where(torch.rand(256, generator=g) > 0.2, NULL)
        F.mse_loss(net(x, t, text), teacher(x, t, text)).backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return net.requires_grad_(False)


def train(start, count, seed=0, lr=1e-3, batch=128, fakes=1, **settings):
    """`count` iterations with rates that fall to 0 -> the student. `fakes`: one for all its steps, or as many as it has."""
    g, settings, nets = torch.Generator().manual_seed(seed), Settings(**settings), {"student": copy.deepcopy(start)}
    if settings.shield == "dm":
        nets["fake"] = nn.ModuleList(copy.deepcopy(start) for _ in range(fakes))
    if settings.shield == "gan":
        torch.manual_seed(seed)
        nets["discriminator"] = Discriminator(lambda x, t, text: start.features(x, t, text)[:, None], 96)
    optimizers = {f"{name}_optimizer": torch.optim.Adam(net.requires_grad_().parameters(), lr, (0.0, 0.999)) for name, net in nets.items()}
    players = Players(teacher, **nets, **optimizers, real=draw(torch.arange(4000) % CLASSES, g))
    if settings.shield == "dm":
        calls, times = [], time_schedule(settings.steps, settings.shift).tolist()             # the student's last call tells the step
        players.student = lambda x, t, text: calls.append(times.index(t[0].item())) or nets["student"](x, t, text)
        players.fake = lambda x, t, text: nets["fake"][calls[-1] % fakes](x, t, text)
    for i in range(count):
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr * (1 - i / count)
        training_step(players, torch.randint(CLASSES, (batch,), generator=g), NULL, torch.randn(batch, 2, generator=g), settings, g)
    return nets["student"].requires_grad_(False)


def mmd(a, b):
    """Squared maximum mean discrepancy, unbiased: about 0 for two draws of one distribution."""
    kernel = lambda a, b: sum(torch.exp(-torch.cdist(a, b).square() / (2 * s**2)) for s in (0.2, 0.5, 1.0)) / 3
    inside = lambda a: (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))
    return (inside(a) + inside(b) - 2 * kernel(a, b).mean()).item()


def judge(x, text):
    """-> accuracy of the best possible classifier, std over the data's, std inside a class over the data's, MMD inside classes."""
    real, ones = draw(text, torch.Generator().manual_seed(99)), torch.ones(len(x))
    guess = log_densities(x, ones, NULL.expand(len(x))).unflatten(1, (CLASSES, PARTS)).logsumexp(-1).argmax(-1)
    classes = [(x[text == c], real[text == c]) for c in range(CLASSES)]
    inside = sum((a.std(0) / b.std(0)).mean() for a, b in classes) / CLASSES
    return (guess == text).float().mean().item(), (x.std() / real.std()).item(), inside.item(), sum(mmd(a, b) for a, b in classes) / CLASSES


def outputs(student, steps):
    """The student's outputs of every step of a run, the last of which is the sample -> list of (2000, 2), text."""
    noise, text, times = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)), torch.arange(2000) % CLASSES, time_schedule(steps, 3.0)
    return [backward_simulation(student, noise, text, times, step)[0] for step in range(steps)], text
