"""Guidance kept: a student between two students, and what that does to accuracy and diversity.

    python tutorials/cards/dial.py --low runs/alpha1/student --high runs/alpha4/student
    python tutorials/cards/dial.py --low ... --high ... --share 0.5 --out runs/half

Two students that start from the same teacher, one with a small alpha and one with a large one, stay
close enough that weights between theirs make a student, too. Its guidance is then between theirs,
and sampling costs no more. The share is how far it lies from --low (0) to --high (1). The columns
are figures of evaluate.py. `open` is the joint accuracy of prompts that leave place, card or ink
open, and `given` of those that name all three.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # see sampler.py
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until run_command
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import evaluate  # noqa: E402
import sampler  # noqa: E402
from convert_weights import (  # noqa: E402
    Parser,
    UserError,
    empty_network,
    number,
    run_command,
    save_pipeline,
)
from formats import path_name  # noqa: E402

DEFAULTS = {"steps": 4, "count": 200, "seed": 0}          # of scoring
COLUMNS = ("joint", "open", "given", "strict", "frechet", "saturation", "diversity")


def between(low, high, share):
    """Two Pipelines of one architecture -> a Pipeline with the DiT's weights between theirs."""
    a, b = low.dit.state_dict(), high.dit.state_dict()
    dit = empty_network("dit", low.dit.config)
    weights = {name: torch.lerp(w.float(), b[name].float(), share) for name, w in a.items()}
    dit.load_state_dict(weights, assign=True)
    return replace(low, dit=dit.eval().requires_grad_(False))


def check_siblings(low, high):
    """UserError where two students differ in more than the weights of the DiT, or are none."""
    if low.guidance or high.guidance:
        raise UserError("--low and --high should be students: one of them is a model that wants "
                        "guidance")
    different = [name for name in ("shift", "size", "steps", "trained_steps")
                 if getattr(low, name) != getattr(high, name)]
    if low.dit.config != high.dit.config:
        different.append("dit")
    for name in ("text_encoder", "vae"):
        a, b = getattr(low, name), getattr(high, name)
        states = a.state_dict(), b.state_dict()
        same = a.config == b.config and states[0].keys() == states[1].keys()
        if not same or not all(torch.equal(states[0][key], states[1][key]) for key in states[0]):
            different.append(name)
    if low.tokenizer.to_str() != high.tokenizer.to_str():
        different.append("tokenizer")
    if different:
        raise UserError("--low and --high do not go together: they differ in "
                        + ", ".join(different))


def parse_arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--low", required=True, metavar="DIR", help="the student with the smaller alpha")
    add("--high", required=True, metavar="DIR", help="the student with the larger alpha")
    add("--share", type=number(0, 1), nargs="+", action="extend", metavar="F",
        help="one or several (default: 0 0.25 0.5 0.75 1)")
    add("--steps", type=number(1, 1000, int), metavar="N", help="of scoring (default: 4)")
    add("--count", type=number(1, 10 ** 6, int), metavar="K",
        help="held-out prompts to score on (default: 200)")
    add("--seed", type=number(0, 10 ** 6, int), metavar="S", help="of scoring (default: 0)")
    add("--json", type=evaluate.json_name, metavar="OUT", help="write all figures to this file")
    add("--out", type=path_name, metavar="DIR",
        help="write the student of --share F to this new directory, and score nothing")
    args = parser.parse_args()
    args.share = args.share or [0, 0.25, 0.5, 0.75, 1]
    scoring = [f"--{name}" for name in ("json", *DEFAULTS) if getattr(args, name) is not None]
    if args.out and (len(args.share) != 1 or scoring):
        raise UserError("--out writes one student and scores nothing: it goes with one --share"
                        + (f", and without {' and '.join(scoring)}" if scoring else ""))
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main():
    signal.signal(signal.SIGTERM, evaluate.end_by_exception)
    args = parse_arguments()
    if args.out and Path(args.out).exists():
        raise UserError(f"{args.out} exists already; name a new directory")
    prompts = sampler.read_prompts(HERE / "prompts_heldout.txt")
    if args.count > len(prompts):
        raise UserError(f"--count {args.count}: there are {len(prompts)} held-out prompts")
    low, high = sampler.load_pipeline(args.low), sampler.load_pipeline(args.high)
    check_siblings(low, high)
    sampler.check_size(low, evaluate.data.SIDE, evaluate.data.SIDE)
    if args.out:
        student = between(low, high, args.share[0])
        save_pipeline(Path(args.out), student.dit, student.text_encoder, student.vae,
                      student.tokenizer, student.shift, dtype=torch.bfloat16, steps=student.steps,
                      guidance=0.0, size=student.size, trained_steps=student.trained_steps)
        print(f"wrote {args.out}")
        return
    prompts = prompts[:args.count]
    real, rows = evaluate.drawings(prompts, 1), []
    print(f"| share | {' | '.join(COLUMNS)} |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for share in args.share:
        student = between(low, high, share)
        images = evaluate.sample_images(student, prompts, args.steps, 0.0, args.seed)
        row = evaluate.score(images, prompts, real)
        diversity = evaluate.diversity(student, args.steps, 0.0, args.seed)
        row |= {"share": share, "diversity": diversity}
        figures = [evaluate.figure(row, name) for name in COLUMNS]
        cells = " | ".join("" if value is None else f"{value:.3f}" for value in figures)
        print(f"| {share:g} | {cells} |", flush=True)
        rows.append(row)
    if args.json:
        evaluate.write_json(args.json, rows)


if __name__ == "__main__":
    run_command(main)
