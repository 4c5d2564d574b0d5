"""Distils a DDPM, a teacher that says the noise (epsilon) at steps k, not a velocity at times t.

    python tutorials/another_teacher.py             a minute; prints what its last lines say
"""
import copy

import torch
from mixture import CLASSES, MLP, NULL, draw, judge

from distill import Nets, Settings, renoise, training_step
from sampler import sample, time_schedule

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)      # DDPM: z = a x + s noise


def as_velocity(ddpm):
    """epsilon at z = a x + s noise -> v at x_t = t x + (1 - t) noise: z at another scale."""
    def net(x_t, t, text):
        scale = (t ** 2 + (1 - t) ** 2).sqrt()           # x_t = scale z, and a = t / scale
        k = torch.searchsorted(-ALPHA_BAR, -(t / scale) ** 2).clamp(max=999)
        a, s = ALPHA_BAR[k, None].sqrt(), (1 - ALPHA_BAR[k, None]).sqrt()
        z = x_t / scale[:, None]
        x_hat = ((z - s * ddpm(z, k / 1000, text)) / a).clamp(-3, 3)    # as DDPM does: a may be tiny
        return (x_hat - x_t) / (1 - t[:, None]).clamp(min=1e-3)
    return net


def fit(target, steps=2000):
    """An MLP that learns `target`(x, u, text, noise) -> input, its time, wanted; u is uniform."""
    net, g = MLP(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - i / steps)
        text, u = torch.randint(CLASSES, (256,), generator=g), torch.rand(256, generator=g)
        x, noise = draw(text, g), torch.randn(256, 2, generator=g)
        text = text.where(torch.rand(256, generator=g) > 0.2, NULL)
        inputs, time, wanted = target(x, u, text, noise)
        optimizer.zero_grad()
        (net(inputs, time, text) - wanted).square().mean().backward()
        optimizer.step()
    return net


def ddpm_target(x, u, text, noise):
    k = (1000 * u).long()
    return ALPHA_BAR[k, None].sqrt() * x + (1 - ALPHA_BAR[k, None]).sqrt() * noise, k / 1000, noise


torch.manual_seed(0)
teacher = as_velocity(fit(ddpm_target).requires_grad_(False))
# Student and fake say velocities: they begin as an imitation of the teacher.
student = fit(lambda x, t, text, noise: (
    renoise(x, t, noise), t, teacher(renoise(x, t, noise), t, text)))
fake, g = copy.deepcopy(student), torch.Generator().manual_seed(0)
optimizers = [torch.optim.Adam(net.parameters(), 1e-3, (0.0, 0.99)) for net in (student, fake)]
nets, settings = Nets(teacher, student, fake, *optimizers), Settings(steps=2, alpha=1.2, shift=1.0)
for i in range(500):
    optimizers[0].param_groups[0]["lr"] = 1e-3 * (1 - i / 500)
    text, noise = torch.randint(CLASSES, (256,), generator=g), torch.randn(256, 2, generator=g)
    training_step(nets, text, NULL, noise, settings, g)
for name, net, steps in (("teacher", teacher, 2), ("teacher", teacher, 50), ("student", student, 2)):
    text, noise = torch.arange(2000) % CLASSES, torch.randn(2000, 2, generator=g)
    with torch.no_grad():
        accuracy, _, inside, distance = judge(
            sample(net, noise, text, time_schedule(steps, 1.0)), text)
    print(f"{name}, {steps:2} calls: accuracy {accuracy:.3f}, spread in a class {inside:.2f}, "
          f"distance to the data {distance:.3f}")
