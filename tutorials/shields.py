"""Two other shields for the spear: a mean/variance KL and a GAN (Sec. 3.2 of the paper).

The paper's claim: CA needs some regularizer, and DM is one of several. Either of these takes DM's
place as `other_shield` of distill.Nets or distill.Run, with `dm=distill.no_dm` and no updates of
the fake.
Both need real data x (M, ...), which DM does not.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from distill import normal_like, renoise, shift_time, update
from model import DiT


def mean_variance_kl(x, mean, var):
    """KL of each item's numbers, taken as one Gaussian, from N(mean, var); averaged (Eq. 7).

    x (B, ...); mean and var: numbers, those of real items on average. 0 at the target.
    """
    x = x.flatten(1)
    mu = x.mean(1)                                              # (B,)
    sigma2 = x.var(1, correction=0).clamp(min=1e-6)             # (B,)
    return 0.5 * ((sigma2 + (mu - mean) ** 2) / var - 1 - (sigma2 / var).log()).mean()


class MeanVarianceShield:
    """mean_variance_kl with the statistics of real data (M, ...). It has nothing to learn."""

    def __init__(self, real, weight=2.0):
        self.mean = float(real.mean())
        self.var = float(real.flatten(1).var(1, correction=0).mean())
        self.weight = weight

    def loss(self, x):
        return self.weight * mean_variance_kl(x, self.mean, self.var)

    def update(self, x):
        pass


class Discriminator(nn.Module):
    """Whether noised x is real -> logits (B,), from what a frozen network sees in it.

    features(x, t, text) -> (B, width, ...). It sees every x with the empty prompt, because the
    real data come without prompts.
    """

    def __init__(self, features, width):
        super().__init__()
        # In a list, so that the frozen network is no part of this module.
        self.features = [features]
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, x, t, null_text):
        features = self.features[0](x, t, null_text).flatten(2)         # (B, width, N)
        return self.head(features.transpose(1, 2).float()).mean((1, 2))


def generator_loss(discriminator, x, t, null_text, noise):
    """softplus(-logit): the student's x should look real at time t. Gradient reaches x."""
    return F.softplus(-discriminator(renoise(x, t, noise), t, null_text)).mean()


def discriminator_loss(discriminator, x, real, t, null_text, noise, nudge, r1=0.01):
    """softplus(-logit) on real and softplus(logit) on x, plus R1 by a finite difference.

    Both are noised alike. R1 is ((D(real + nudge) - D(real)) / std(nudge))^2, `nudge` a little
    noise: it asks for logits that change slowly near real data.
    """
    real = renoise(real, t, noise)
    x = renoise(x.detach(), t, noise)
    on_real = discriminator(real, t, null_text)                         # (B,)
    on_nudged = discriminator(real + nudge, t, null_text)
    on_x = discriminator(x, t, null_text)
    penalty = ((on_nudged - on_real) / nudge.std()).square()
    return (F.softplus(-on_real) + F.softplus(on_x) + r1 * penalty).mean()


class GANShield:
    """A discriminator that learns to tell the student's x from real data, and the student's loss.

    real (M, ...); shift: of the times at which it looks; updates: of the discriminator for one of
    the student. With r1 at 1 it stayed at chance on small networks.
    """

    def __init__(self, discriminator, real, null_text, weight=0.3, lr=1e-3, shift=3.0, updates=2,
                 r1=0.01, seed=0):
        self.discriminator, self.real, self.null_text = discriminator, real, null_text
        self.weight, self.shift, self.updates, self.r1 = weight, shift, updates, r1
        self.optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr, betas=(0.0, 0.99), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.last_loss = 0.0

    def times(self, x):
        u = torch.rand(len(x), generator=self.generator, dtype=x.dtype)
        return shift_time(u, self.shift).to(x.device)

    def loss(self, x):
        noise = normal_like(x, self.generator)
        return self.weight * generator_loss(
            self.discriminator, x, self.times(x), self.null_text, noise)

    def update(self, x):
        for _ in range(self.updates):
            chosen = torch.randint(len(self.real), (len(x),), generator=self.generator)
            noise, nudge = normal_like(x, self.generator), 0.05 * normal_like(x, self.generator)
            loss = discriminator_loss(self.discriminator, x, self.real[chosen].to(x), self.times(x),
                                      self.null_text, noise, nudge, self.r1)
            update(loss, self.optimizer, clip=1.0)
            self.last_loss = loss.item()


class Tokens(nn.Module):
    """In place of a DiT's last layer: passes the image tokens on."""

    def forward(self, tokens, c):
        return tokens


def first_layers(dit, depth):
    """The same DiT, cut after `depth` joint layers: (x, t, text) -> features (B, dim / 4, h, w).

    It shares the tensors of `dit`, and is frozen.
    """
    with torch.device("meta"):
        cut = DiT(dataclasses.replace(dit.config, n_layers=depth))
    weights = dit.state_dict()
    cut.load_state_dict({name: weights[name] for name in cut.state_dict()}, assign=True)
    cut.final_layer = Tokens()
    return cut.requires_grad_(False)


class StepAwareFake(nn.Module):
    """A fake that knows which step of the student made its x: an embedding of that step's time.

    net: the fake, a DiT, whose time embedding gets the addition; `student` is wrapped so that the
    time of its last call is remembered. One fake for all steps knows only the mixture of their
    outputs, so single steps may wander (TDM and Phased DMD use the same cure).
    """

    def __init__(self, net, width, waves=8):
        super().__init__()
        self.net, self.step_time = net, None
        self.frequencies = torch.pi * 2.0 ** torch.arange(waves)
        self.embedding = nn.Linear(2 * waves, width)
        nn.init.zeros_(self.embedding.weight)
        nn.init.zeros_(self.embedding.bias)
        net.t_embedder.register_forward_hook(self.add)

    def add(self, module, inputs, c):
        """Adds the embedding of the student's time to the fake's own time embedding."""
        angles = self.step_time.float() * self.frequencies.to(c.device)
        waves = torch.cat((angles.sin(), angles.cos()))
        return c + self.embedding(waves).to(c.dtype)

    def forward(self, x, t, text):
        return self.net(x, t, text)

    def watch(self, student):
        """The student, whose calls tell this fake the time of the step."""
        def call(x, t, text):
            self.step_time = t[0].detach()
            return student(x, t, text)
        return call
