"""Distils a DDPM, a teacher that is not of this repository: it predicts the noise epsilon.

    python tutorials/another_teacher.py              a pinwheel of five arms; prints a table
"""
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distill import Nets, Settings, renoise, training_step  # noqa: E402
from sampler import sample, time_schedule  # noqa: E402

NONE, ALPHA_BAR = torch.tensor([5]), torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)


def pinwheel(text, g):
    """Points (B, 2) on the arms `text` (B,)."""
    x = torch.randn(len(text), 2, generator=g) * torch.tensor([0.3, 0.06]) + torch.tensor([1.0, 0])
    angle = text * 2 * torch.pi / 5 + 0.35 * x[:, 0].exp()
    return 1.5 * torch.view_as_real(torch.view_as_complex(x) * torch.polar(torch.ones(1), angle))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t, text):
        arm = nn.functional.one_hot(text.expand(len(x)), 6)
        waves = t[:, None] * torch.pi * 2.0 ** torch.arange(4)
        return self.layers(torch.cat((x, waves.sin(), waves.cos(), arm), 1))


def as_velocity(ddpm):
    """epsilon at z = a x + s noise -> v at x_t = t x + (1 - t) noise, which is z at another scale."""
    def net(x_t, t, text):
        scale = (t ** 2 + (1 - t) ** 2).sqrt()           # x_t = scale z, and a = t / scale
        k = torch.searchsorted(-ALPHA_BAR, -(t / scale) ** 2).clamp(max=999)
        a, s, z = ALPHA_BAR[k, None].sqrt(), (1 - ALPHA_BAR[k, None]).sqrt(), x_t / scale[:, None]
        x_hat = (z - s * ddpm(z, k / 1000, text)) / a
        return (x_hat.clamp(-4, 4) - x_t) / (1 - t[:, None]).clamp(min=1e-3)   # clamp: as DDPM does
    return net


def fit(net, target, steps=3000):
    """target(x, t, text, noise) -> the net's input, its time, what it should say."""
    optimizer, g = torch.optim.Adam(net.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / steps)
        arm, t = torch.randint(5, (512,), generator=g), torch.rand(512, generator=g)
        text = arm.where(torch.rand(512, generator=g) > 0.15, NONE)
        z, t, wanted = target(pinwheel(arm, g), t, text, torch.randn(512, 2, generator=g))
        optimizer.zero_grad()
        (net(z, t, text) - wanted).square().mean().backward()
        optimizer.step()
    return net


def noised(x, t, text, noise):
    k = (t * 1000).long()
    a, s = ALPHA_BAR[k, None].sqrt(), (1 - ALPHA_BAR[k, None]).sqrt()
    return a * x + s * noise, k / 1000, noise


def report(name, net, steps, guidance=0.0):
    g, text = torch.Generator().manual_seed(1), torch.arange(2000) % 5
    x = sample(net, torch.randn(2000, 2, generator=g), text, time_schedule(steps, 1.0), guidance, NONE)
    real, distance = pinwheel(text, g), 0.0
    nearest = torch.cdist(x, real).argmin(1) % 5
    for arm in range(5):                                 # energy distance inside each arm
        a, b = x[text == arm], real[text == arm]
        distance += 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    print(f"| {name} | {steps} | {(nearest == text).float().mean():.3f} | {distance / 5:.4f} |")


def main():
    torch.set_num_threads(1)
    teacher = as_velocity(fit(MLP(), noised).requires_grad_(False))
    print("| | calls | right arm | energy distance |\n|---|---|---|---|")
    # Student and fake say velocities, so they start as an imitation of the teacher.
    start = fit(MLP(), lambda x, t, text, noise: (
        renoise(x, t, noise), t, teacher(renoise(x, t, noise), t, text)))
    student, fake, g = copy.deepcopy(start), copy.deepcopy(start), torch.Generator().manual_seed(0)
    adam = [torch.optim.Adam(net.parameters(), 1e-3, (0.0, 0.99)) for net in (student, fake)]
    nets, settings = Nets(teacher, student, fake, *adam), Settings(steps=2, alpha=1.2, shift=1.0)
    for i in range(1000):
        adam[0].param_groups[0]["lr"] = 1e-3 * (1 - i / 1000)
        text, noise = torch.randint(5, (256,), generator=g), torch.randn(256, 2, generator=g)
        training_step(nets, text, NONE, noise, settings, g)
    for steps in (1, 2, 4, 50):
        report("teacher", teacher, steps)
    for steps in (1, 2):
        report("student", student.requires_grad_(False), steps)


main()
