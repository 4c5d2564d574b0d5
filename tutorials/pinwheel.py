"""The pinwheel: five thin spiral arms in 2-D, a teacher trained on them, and a distillation loop.

A prompt is the number of an arm, 0 to 4, as a tensor (B,); -1 is no prompt. The teacher is a small
network that has learned the arms from samples, with faults, as every trained network has. So
guidance has something to mend.
Notebooks 3, 4 and 5 use it; notebook 4 writes the loop of `distill_pinwheel` out line by line.

    python tutorials/pinwheel.py --seeds 0 1 2      every sampler in one table; 3 minutes of a core
"""

import copy
import math
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # see sampler.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from convert_weights import Parser, number, run_command  # noqa: E402
from distill import (  # noqa: E402
    backward_simulation,
    cfg_augmentation,
    distribution_matching,
    fake_loss,
    proxy_loss,
    renoise,
    shift_time,
)
from mixture import MLP, sliced_distance  # noqa: E402
from sampler import sample, time_schedule  # noqa: E402

ARMS, WIDTH = 5, 0.06
NULL = torch.tensor([-1])


def arm(c, u):
    """The middle line of arm c (B,) at u (B,), 0 the inner end, 1 the outer one -> (B, 2)."""
    radius, angle = 0.5 + 1.4 * u, 2 * math.pi * c / ARMS + 2.5 * u
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


def draw(text, g):
    """One data point for each prompt (B,) -> (B, 2): roughly even along the arm, a little wide."""
    u = torch.rand(text.shape, generator=g).sqrt()
    return arm(text.float(), u) + WIDTH * torch.randn(*text.shape, 2, generator=g)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- Measures: what a reader sees in the picture ------------------------------------------------

COUNT = 2000
TEXT = torch.arange(COUNT) % ARMS
NOISE = torch.randn(COUNT, 2, generator=seeded(1))
DATA = draw(TEXT, seeded(99))


def is_off(x, text):
    """Which samples (B, 2) are over three widths from the middle line of their own arm -> bool."""
    u = torch.linspace(0, 1, 200).expand(ARMS, -1)
    lines = arm(torch.arange(ARMS).float()[:, None], u)
    return (x[:, None] - lines[text]).norm(dim=-1).amin(1) > 3 * WIDTH


def covered(x, text, radius=0.12):
    """Share of the data points that have a sample of their own arm within `radius`."""
    near = [torch.cdist(DATA[TEXT == c], x[text == c]).amin(1) < radius for c in range(ARMS)]
    return torch.cat(near).float().mean().item()


def measure(x, text=TEXT):
    """The four numbers of a cloud of samples (2000, 2) -> dict."""
    distances = [sliced_distance(x[text == c], DATA[TEXT == c]) for c in range(ARMS)]
    return {"off": is_off(x, text).float().mean().item(), "covered": covered(x, text),
            "W1": sum(distances) / ARMS, "std": (x.std() / DATA.std()).item()}


def samples(net, steps, guidance=0.0):
    """2,000 samples of a net from the same noise every time -> (2000, 2)."""
    return sample(net, NOISE, TEXT, time_schedule(steps, 1.0), guidance, NULL)


# --- The teacher ---------------------------------------------------------------------------------


def fit_teacher(seed=0, count=800, batch=256):
    """Flow matching on samples of the arms; 15 % of the prompts are left out, for guidance."""
    torch.manual_seed(seed)
    g, net = seeded(seed), MLP(ARMS, 64)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for _ in range(count):
        text = torch.randint(ARMS, (batch,), generator=g)
        x, noise = draw(text, g), torch.randn(batch, 2, generator=g)
        t = shift_time(torch.rand(batch, generator=g), 2.0)
        text = text.where(torch.rand(batch, generator=g) > 0.15, NULL)
        loss = F.mse_loss(net(renoise(x, t, noise), t, text), x - noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


# --- Distillation --------------------------------------------------------------------------------


def uniform(low, g):
    """One time in [low, 1] for each item of low (B,)."""
    return low + (1 - low) * torch.rand(low.shape, generator=g)


def coupled(t, g):
    """-> (tau_dm, tau_ca) for outputs made at times t (B,): one draw for both, from all times."""
    tau = uniform(0 * t, g)
    return tau, tau


def full(t, g):
    """Two draws, both from all times."""
    return uniform(0 * t, g), uniform(0 * t, g)


def constrained(t, g):
    """Two draws, both after t."""
    return uniform(t, g), uniform(t, g)


def hybrid(t, g):
    """DM looks everywhere, CA only after t."""
    return uniform(0 * t, g), uniform(t, g)


def other_shields(teacher, seed=0):
    """The paper's two other shields for this world, which need real data: {name: shield}."""
    from shields import Discriminator, GANShield, MeanVarianceShield

    def features(x, t, text):
        return teacher.features(x, t, text)[..., None]

    torch.manual_seed(seed)
    gan = GANShield(Discriminator(features, 64), DATA, NULL, weight=1.0, shift=1.0, seed=seed)
    return {"GAN": gan, "mean/variance": MeanVarianceShield(DATA)}


def update(loss, optimizer, clip=1.0):
    """One step of an optimizer, with the norm of the gradient limited."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()


def learner(net):
    """A copy of a net that can be trained, and its optimizer."""
    net = copy.deepcopy(net).requires_grad_(True)
    return net, torch.optim.Adam(net.parameters(), 1e-3, betas=(0.0, 0.999))


def average_into(average, net, keep):
    """The running average of a net's weights moves (1 - keep) of the way to them."""
    with torch.no_grad():
        for mean, value in zip(average.parameters(), net.parameters(), strict=True):
            mean.lerp_(value, 1 - keep)


def distill_pinwheel(teacher, alpha=2.0, shield=True, schedule=hybrid, count=400, seed=0,
                     constant_rate=False, watch=None, start=None):
    """CA + DM on the pinwheel -> a student of two steps, with averaged weights.

    alpha 1 leaves CA out. shield: True is DM, False is none, or one of tutorials/shields.py.
    schedule(t, g) -> (tau_dm, tau_ca).
    watch(iteration, average): called before every iteration and at the end. start: the net that
    student and fakes start from, if not the teacher. Each of the two steps has a fake of its own.
    """
    steps = 2
    g, times = seeded(seed), time_schedule(steps, 1.0)
    student, optimizer = learner(start or teacher)
    fakes = [learner(start or teacher) for _ in range(steps)]
    average = copy.deepcopy(student).requires_grad_(False)
    for i in range(count):
        if watch:
            watch(i, average)
        rate = 1e-3 if constant_rate else 1e-3 * (1 - i / count)
        for each in (optimizer, *(fake_optimizer for _, fake_optimizer in fakes)):
            each.param_groups[0]["lr"] = rate
        text, noise = torch.randint(ARMS, (128,), generator=g), torch.randn(4, 128, 2, generator=g)
        step = int(torch.randint(steps, (), generator=g))
        fake, fake_optimizer = fakes[step]
        x, t = backward_simulation(student, noise[0], text, times, step)
        tau_dm, tau_ca = schedule(t, g)
        delta = torch.zeros_like(x)
        if shield is True:
            delta = delta + distribution_matching(teacher, fake, x, tau_dm, text, noise[1])
        if alpha != 1:
            delta = delta + cfg_augmentation(teacher, x, tau_ca, text, NULL, alpha, noise[2])
        other = hasattr(shield, "loss")
        update(proxy_loss(x, delta) + (shield.loss(x) if other else 0), optimizer)
        if other:
            shield.update(x.detach())
        for _ in range(2 if shield is True else 0):
            tau = torch.rand(128, generator=g)
            update(fake_loss(fake, x, tau, text, torch.randn(128, 2, generator=g)), fake_optimizer)
        average_into(average, student, min(0.98, (1 + i) / (10 + i)))
    if watch:
        watch(count, average)
    return average


# --- The command: every sampler of the pages in one table -----------------------------------------


def all_clouds(seed):
    """{name: samples (2000, 2)} of a teacher and its students, all made from this seed."""
    teacher = fit_teacher(seed)
    clouds = {"teacher, 50 steps": samples(teacher, 50),
              "teacher, 50 guided steps": samples(teacher, 50, 1.0),
              "teacher, 2 steps": samples(teacher, 2),
              "teacher, 2 guided steps": samples(teacher, 2, 1.0)}
    runs = {"CA + DM": {}, "DM alone": {"alpha": 1.0}, "CA alone": {"shield": False}}
    runs |= {f"CA + {name}": {"shield": shield}
             for name, shield in other_shields(teacher, seed).items()}
    runs |= {f"CA + DM, {f.__name__}": {"schedule": f} for f in (coupled, full, constrained)}
    for name, options in runs.items():
        clouds[f"student, {name}"] = samples(distill_pinwheel(teacher, seed=seed, **options), 2)
    return clouds


def main():
    parser = Parser(description="Every sampler of the pinwheel, in one table.")
    parser.add_argument("--seeds", type=number(0, 10 ** 6, int), nargs="+", default=[0],
                        metavar="N")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    rows = [{name: measure(x) for name, x in all_clouds(seed).items()} for seed in seeds]
    print("| seeds " + ", ".join(map(str, seeds)) + " | off | covered | W1 | std |")
    print("|---|---|---|---|---|")
    for name in rows[0]:
        cells = [" / ".join(f"{row[name][key]:.2f}" for row in rows) for key in rows[0][name]]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_command(main)
