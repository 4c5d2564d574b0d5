"""Distils a DDPM, which predicts the noise (epsilon) at steps k, not a velocity at times t.

    python tutorials/another_teacher.py                  half a minute of one core. It prints

    calls   accuracy   std     std inside a class   distance to the data (mixture.judge)
    teacher, 1   0.598 2.770 4.453 1.674
    teacher, 50  0.967 0.975 0.924 0.057
    student, 1   0.965 1.041 0.963 0.082
"""
import copy
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # see sampler.py
import torch

import mixture  # it puts the repository on the path
from distill import Nets, Settings, renoise, training_step
from sampler import sample, time_schedule

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)      # DDPM: z = a x + s noise


def as_velocity(ddpm):
    """epsilon at z = a x + s noise -> v at x_t = t x + (1 - t) noise: z at another scale."""
    def net(x_t, t, text):
        scale = (t ** 2 + (1 - t) ** 2).sqrt()           # x_t = scale z, and a = t / scale
        k = torch.searchsorted(-ALPHA_BAR, -(t / scale) ** 2).clamp(max=999)
        a, s = ALPHA_BAR[k, None].sqrt(), (1 - ALPHA_BAR[k, None]).sqrt()
        x_hat = (x_t / scale[:, None] - s * ddpm(x_t / scale[:, None], k / 1000, text)) / a
        # DDPM clamps, too: at t = 0 a is tiny.
        return (x_hat.clamp(-3, 3) - x_t) / (1 - t[:, None]).clamp(min=1e-3)
    return net


def fit(target, steps=2000):
    """An MLP trained by squared error. target(x, u, text, noise) -> (input, its time, wanted)."""
    net, g = mixture.MLP(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - i / steps)
        text, u = torch.randint(4, (256,), generator=g), torch.rand(256, generator=g)
        x, noise = mixture.draw(text, g), torch.randn(256, 2, generator=g)
        text = text.where(torch.rand(256, generator=g) > 0.2, mixture.NULL)
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
# Student and fake predict velocities: they begin as an imitation of the teacher.
student = fit(lambda x, t, text, noise: (
    renoise(x, t, noise), t, teacher(renoise(x, t, noise), t, text)))
fake, g = copy.deepcopy(student), torch.Generator().manual_seed(0)
optimizers = [torch.optim.Adam(net.parameters(), 1e-3, (0.0, 0.99)) for net in (student, fake)]
nets, settings = Nets(teacher, student, fake, *optimizers), Settings(steps=1, alpha=1.1, shift=1.0)
for i in range(500):
    optimizers[0].param_groups[0]["lr"] = 1e-3 * (1 - i / 500)
    text, noise = torch.randint(4, (256,), generator=g), torch.randn(256, 2, generator=g)
    training_step(nets, text, mixture.NULL, noise, settings, g)
text = torch.arange(2000) % 4
print("calls   accuracy   std     std inside a class   distance to the data (mixture.judge)")
for net, steps in ((teacher, 1), (teacher, 50), (student, 1)):
    noise = torch.randn(2000, 2, generator=g)
    figures = mixture.judge(sample(net, noise, text, time_schedule(steps, 1.0)), text)
    name = "teacher" if net is teacher else "student"
    print(f"{name}, {steps:<3}", *(f"{n:.3f}" for n in figures))
