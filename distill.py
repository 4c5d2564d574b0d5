"""Decoupled DMD: turns a many-step teacher into a few-step student. It needs the teacher and prompts, no images.

    python distill.py                                                    the bundled teacher -> a student, on a laptop
    python distill.py --teacher DIR --prompts FILE --steps 4 --out DIR   any other teacher

Source: "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield", arXiv 2511.22677.
Three networks, each a callable (x, t, text) -> v as in the box at the top of model.py:

    teacher   frozen; knows where the data is
    student   G, the few-step generator; starts as a copy of the teacher
    fake      starts as a copy of the teacher too, then keeps learning where the student's outputs are

The student's output x = G(z_t) is re-noised to a time tau, and the estimates x_hat of the data made from there say where
to push it. The push has two terms, each with its own tau and noise (Eq. 6 and 8, in data space):

    Delta    = Delta_DM + Delta_CA
    Delta_DM = x_hat(teacher, tau_dm, text) - x_hat(fake, tau_dm, text)                       the shield: distribution matching
    Delta_CA = (alpha - 1) (x_hat(teacher, tau_ca, text) - x_hat(teacher, tau_ca, no text))   the spear: CFG augmentation

alpha is the paper's guidance scale; the guidance of sampler.py and of the official pipeline is alpha - 1.
Scores are the same thing in other units: score = (tau x_hat - x_tau) / (1 - tau)^2.

Shapes: x, noise (B, ...), any number of dimensions; times (B,); text a model.Text, or for toys a tensor (B, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Text
from sampler import sample, time_schedule

# --- The two terms ------------------------------------------------------------------------------------------


def over(t, x):
    """(B,) -> (B, 1, ..., 1), to multiply x item by item."""
    return t.view(-1, *[1] * (x.ndim - 1))


def renoise(x, t, noise):
    """Data x at time t: t x + (1 - t) noise."""
    return over(t, x) * x + (1 - over(t, x)) * noise


def data_estimate(net, x, t, text):
    """Where the net takes x at time t to come from: x_hat = x + (1 - t) v."""
    return x + (1 - over(t, x)) * net(x, t, text)


def normalised(delta, x, estimate, floor=0.05):
    """Each item of delta in units of mean |x - estimate|: differences of estimates shrink as tau goes to 1, and so do these."""
    return delta / over((x - estimate).abs().flatten(1).mean(1).clamp(min=floor), x)


def join(*texts, batch):
    """Texts one after the other in one batch, each stretched to `batch` where it is of batch 1."""
    if not isinstance(texts[0], Text):
        return torch.cat([text.expand(batch, *text.shape[1:]) for text in texts])
    longest = max(text.features.shape[1] for text in texts)
    features = [F.pad(text.features, (0, 0, 0, longest - text.features.shape[1])).expand(batch, -1, -1) for text in texts]
    return Text(torch.cat(features), torch.cat([text.lengths.expand(batch) for text in texts]))


@torch.no_grad()
def distribution_matching(teacher, fake, x, t, text, noise, normalise=True):
    """The shield, Delta_DM (B, ...): from where the student's outputs are to where the data is (Eq. 6, first term).

    x: the student's outputs; t: tau_dm; normalise False: the bare difference of estimates. No gradient.
    """
    x_t = renoise(x, t, noise)
    real, imitated = data_estimate(teacher, x_t, t, text), data_estimate(fake, x_t, t, text)
    return normalised(real - imitated, x, real) if normalise else real - imitated


@torch.no_grad()
def cfg_augmentation(teacher, x, t, text, null_text, alpha, noise, normalise=True):
    """The spear, Delta_CA (B, ...): along what the text changes in the teacher's estimate (Eq. 6, second term).

    t: tau_ca; null_text: the empty prompt, of batch 1 or B; alpha 1: exactly 0. The fake has no part in it. No gradient.
    """
    x_t = renoise(x, t, noise)
    cond, uncond = data_estimate(teacher, torch.cat((x_t, x_t)), torch.cat((t, t)), join(text, null_text, batch=len(x))).chunk(2)
    delta = (alpha - 1) * (cond - uncond)
    return normalised(delta, x, cond) if normalise else delta


@torch.no_grad()
def shared_call(teacher, x, tau_dm, tau_ca, text, null_text, noise_dm, noise_ca):
    """The teacher's three passes for both terms in one call -> two nets that know the answers, one for each term."""
    x_dm, x_ca = renoise(x, tau_dm, noise_dm), renoise(x, tau_ca, noise_ca)
    v = teacher(torch.cat((x_dm, x_ca, x_ca)), torch.cat((tau_dm, tau_ca, tau_ca)), join(text, text, null_text, batch=len(x)))
    return lambda *_: v[:len(x)], lambda *_: v[len(x):]


def proxy_loss(x, delta):
    """A number whose gradient with respect to x is -delta / x.numel(): 1/2 mean |x - stop_grad(x + delta)|^2."""
    return 0.5 * (x - (x + delta).detach()).square().mean()


def fake_loss(fake, x, t, text, noise):
    """Flow matching on the student's outputs, so that the fake comes to know them as the teacher knows data. No gradient to x."""
    x = x.detach()
    return F.mse_loss(fake(renoise(x, t, noise), t, text), x - noise)


# --- Times, and what the student is given ---------------------------------------------------------------------


def shift_time(u, shift):
    """sampler.time_schedule's shift for any time u: towards noise where shift > 1, with 0 and 1 kept. 1 / shift undoes it."""
    return u / (u + shift * (1 - u))


SCHEDULES = {                                 # (lowest tau_dm, lowest tau_ca): 0, or "t", that of the student's step
    "coupled": (0, 0), "full": (0, 0), "constrained": ("t", "t"), "hybrid": (0, "t")}


def sample_tau(schedule, t, shift=1.0, generator=None):
    """-> (tau_dm, tau_ca), (B,) each, for students' steps at times t. Uniform before the shift, which then is applied.

    coupled: one tau for both in [0, 1], the original DMD; full: each its own in [0, 1]; constrained: each its own in [t, 1];
    hybrid, the paper's: tau_ca in [t, 1], where what the student still has to make is; tau_dm in [0, 1].
    """
    draws = torch.rand(2, len(t), generator=generator, dtype=t.dtype).to(t.device)
    if schedule == "coupled":
        draws[1] = draws[0]
    taus = []
    for lowest, draw in zip(SCHEDULES[schedule], draws):
        low = t if lowest == "t" else torch.zeros_like(t)
        start = shift_time(low, 1 / shift)
        taus.append(shift_time(start + (1 - start) * draw, shift).maximum(low))     # rounding could end just below
    return taus


def backward_simulation(student, noise, text, times, step):
    """-> (x, t): the student's output x = G(z_t) at times[step], with z_t from its own earlier steps, as sampler.sample runs it.

    Only the last call of the student carries gradient.
    """
    z = sample(student, noise, text, times[:step + 1])
    t = times[step].to(noise).expand(len(noise))
    return data_estimate(student, z, t, text), t


# --- One training iteration (Algorithm 1) ---------------------------------------------------------------------


@dataclass
class Settings:
    """What one iteration depends on."""
    steps: int = 2               # of the student
    alpha: float = 3.0           # guidance scale of the spear; 1 is none
    shield: str = "dm"           # dm, meanvar, gan or none
    shield_weight: float = 1.0   # of meanvar and gan
    schedule: str = "hybrid"     # where to re-noise: a key of SCHEDULES
    shift: float = 3.0           # of the student's schedule and of every tau
    normalise: bool = True       # each term per item, or raw
    fake_updates: int = 5        # for one update of the student
    clip: float = 1.0            # largest norm of a gradient


@dataclass
class Players:
    """Who takes part: networks, each that learns with its optimizer, and what the two other shields know of real data."""
    teacher: Callable
    student: Callable
    student_optimizer: torch.optim.Optimizer
    fake: Callable | None = None
    fake_optimizer: torch.optim.Optimizer | None = None
    discriminator: Callable | None = None
    discriminator_optimizer: torch.optim.Optimizer | None = None
    real: Tensor | None = None   # (M, ...) real data, for meanvar and gan


def update(loss, optimizer, clip):
    """One step of an optimizer. FloatingPointError, and no step, where the loss or its gradient is not finite."""
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    if not (loss + norm).isfinite():
        raise FloatingPointError("a loss or its gradient is not finite")
    optimizer.step()
    optimizer.zero_grad()


def training_step(players, text, null_text, noise, settings, generator=None, train_student=True):
    """One update of the student from `noise` (B, ...), then those of fake and discriminator -> {name: number} for the log.

    train_student False: the others only learn what the student makes now. Every draw is made on the CPU by `generator`.
    """
    p, s, times = players, settings, time_schedule(settings.steps, settings.shift)
    fresh = lambda: torch.randn(noise.shape, generator=generator, dtype=noise.dtype).to(noise.device)
    any_time = lambda: shift_time(torch.rand(len(noise), generator=generator, dtype=noise.dtype), s.shift).to(noise.device)

    with torch.set_grad_enabled(train_student):
        x, t = backward_simulation(p.student, noise, text, times, step=int(torch.randint(s.steps, (), generator=generator)))
    figures = {"x_mean": x.mean(), "x_std": x.std()}

    if train_student:
        tau_dm, tau_ca = sample_tau(s.schedule, t, s.shift, generator)
        noise_dm = fresh()
        noise_ca = noise_dm if s.schedule == "coupled" else fresh()
        dm, ca, teacher_dm, teacher_ca = torch.zeros_like(x), torch.zeros_like(x), p.teacher, p.teacher
        if s.shield == "dm" and s.alpha != 1:
            teacher_dm, teacher_ca = shared_call(p.teacher, x, tau_dm, tau_ca, text, null_text, noise_dm, noise_ca)
        if s.shield == "dm":
            dm = distribution_matching(teacher_dm, p.fake, x, tau_dm, text, noise_dm, s.normalise)
        if s.alpha != 1:
            ca = cfg_augmentation(teacher_ca, x, tau_ca, text, null_text, s.alpha, noise_ca, s.normalise)
        loss = proxy_loss(x, dm + ca)
        if s.shield == "meanvar":
            loss = loss + s.shield_weight * mean_variance_kl(x, p.real.mean(), p.real.var())
        if s.shield == "gan":
            loss = loss + s.shield_weight * generator_loss(p.discriminator, x, any_time(), null_text, fresh())
        update(loss, p.student_optimizer, s.clip)
        figures |= {"loss": loss, "dm_rms": dm.square().mean().sqrt(), "ca_rms": ca.square().mean().sqrt(),
                    "cosine": F.cosine_similarity(dm.flatten(), ca.flatten(), dim=0)}

    x = x.detach()
    for _ in range(s.fake_updates if p.fake is not None else 0):
        figures["fake_loss"] = fake_loss(p.fake, x, any_time(), text, fresh())
        update(figures["fake_loss"], p.fake_optimizer, s.clip)
    if s.shield == "gan":
        real = p.real[torch.randint(len(p.real), (len(x),), generator=generator)]
        figures["discriminator_loss"] = discriminator_loss(p.discriminator, x, real, any_time(), null_text, fresh(), generator)
        update(figures["discriminator_loss"], p.discriminator_optimizer, s.clip)
    return {name: value.item() for name, value in figures.items()}


# --- Other shields: the paper's point is that the spear needs one, not this one -----------------------------


def mean_variance_kl(x, mean, var):
    """KL of each item's numbers, taken as one Gaussian, from N(mean, var), averaged over items (Eq. 7): 0 at the target."""
    x = x.flatten(1)
    mu, sigma2 = x.mean(1), x.var(1, correction=0)                              # (B,)
    return 0.5 * ((sigma2 + (mu - mean) ** 2) / var - 1 - (sigma2 / var).log()).mean()


class Discriminator(nn.Module):
    """Whether noised x is real, from what another net sees in it: features (B, S, width) -> logits (B,).

    `features` is a callable (x, t, text) -> (B, S, width) of a frozen net (for a DiT: `dit_features`); it sees every x with
    the empty prompt, because the real pictures come without prompts.
    """

    def __init__(self, features, width):
        super().__init__()
        self.features = [features]            # in a list, so that the frozen net is no part of this module
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, x, t, null_text):
        return self.head(self.features[0](x, t, join(null_text, batch=len(x)))).mean((1, 2))


def generator_loss(discriminator, x, t, null_text, noise):
    """The GAN shield: the student is to look real at time t, softplus(-logit). The gradient goes through the features to x."""
    return F.softplus(-discriminator(renoise(x, t, noise), t, null_text)).mean()


def discriminator_loss(discriminator, x, real, t, null_text, noise, generator=None, r1=1.0, sigma=0.01):
    """Its own update: softplus(-logit) on real, softplus(logit) on x, both noised alike, and R1 by finite difference:
    how much the logits of real pictures change with a little noise, ((D(real + sigma n) - D(real)) / sigma)^2."""
    real, x = renoise(real, t, noise), renoise(x.detach(), t, noise)
    nudge = sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    on_real, on_nudged, on_x = (discriminator(part, t, null_text) for part in (real, real + nudge, x))   # (B,) each
    return (F.softplus(-on_real) + F.softplus(on_x) + r1 * ((on_nudged - on_real) / sigma).square()).mean()
