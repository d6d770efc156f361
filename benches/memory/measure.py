#!/usr/bin/env python3
"""Predicted against measured peak memory: real runs of `tune train`, each in a process of its own.

    measure.py TUNE SMOLLM2.gguf [--folder DIR] [--only TEXT] [--markdown FILE]

Measured is VmHWM, which each process reads of itself at the end of its run: everything that was resident at any time,
mapped weights, program and libraries included. (What the kernel tells the one that waits for a process includes the
memory of the program that started it.) Predicted is what the plan said before the first step. A case is good within
5 % of the prediction and not above the verdict's bound. Exits with 1 if one is not.

Needs numpy and safetensors (tests/e2e/requirements.txt).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import CASES
from models import Models

# one part in twenty either way
CLOSE = 0.05


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tune", type=Path)
    parser.add_argument("smollm2", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tune-memory-models")
    parser.add_argument("--only", default="")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    models = Models(arguments.tune.resolve(), arguments.smollm2.resolve(), arguments.folder)
    rows, bad = [], 0
    for name, (model, kind, values) in CASES.items():
        if arguments.only not in name:
            continue
        plan, measured = run(models, model, kind, values)
        estimate = plan["estimate"]
        predicted, upper = estimate["peak_bytes"], estimate["upper_bytes"]
        off = measured / predicted - 1
        good = abs(off) <= CLOSE and measured <= upper
        bad += not good
        mib = [f"{number / 2**20:.1f}" for number in (predicted, measured, upper)]
        rows.append([name, *mib, f"{100 * off:+.1f} %", estimate["peak_phase"]])
        print(f"{'ok ' if good else 'BAD'} {name:<46} {mib[0]:>8} {mib[1]:>8} {mib[2]:>8} {100 * off:+6.1f} %  "
              f"{estimate['peak_phase']}", flush=True)
        if arguments.verbose:
            explain(plan)
    print(f"{len(rows)} cases, {bad} bad")
    if arguments.markdown:
        head = ["case", "predicted, MiB", "measured", "at most", "measured to predicted", "phase of the peak"]
        lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
        arguments.markdown.write_text("\n".join(lines) + "\n")
    return 1 if bad else 0


def run(models, model, kind, values):
    """The plan of a run, with what the run measured, and the peak as the kernel tells it."""
    path, vocab = models.path(model, kind), models.vocabulary(model)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = folder / "rows.jsonl"
        write_rows(data, vocab, values)
        recipe = folder / "case.toml"
        sections = {"model.base": str(path), **values}
        lines = ["version = 1", "[[data]]", f'path = "{data}"', 'format = "input-ids"', 'train_on = "all"']
        by_section = {}
        for key, value in sections.items():
            section, key = key.split(".")
            by_section.setdefault(section, []).append(f"{key} = {json.dumps(value)}")
        for section, keys in by_section.items():
            lines += [f"[{section}]", *keys]
        recipe.write_text("\n".join(lines) + "\n")
        out = folder / "run"
        command = [str(models.tune), "train", str(recipe), "--out", str(out), "--quiet"]
        environment = {**os.environ, "TUNE_NO_CACHE": "1"}
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode:
            sys.exit(f"{' '.join(command)} exits with {process.returncode}\n{recipe.read_text()}\n{process.stderr}")
        plan = json.loads((out / "plan.json").read_text())
        return plan, plan["measured"]["peak_bytes"]


def write_rows(path, vocab, values):
    """Rows of random ids: the longest as long as a sequence can be, the others of all lengths."""
    longest = values["data_options.sequence_len"]
    count = values["train.micro_batch_size"] * values["train.gradient_accumulation_steps"] * values["train.max_steps"]
    draw = random.Random(7)
    with path.open("w") as file:
        for number in range(3 * count):
            length = longest if number < 2 * values["train.micro_batch_size"] else draw.randint(longest // 8, longest)
            ids = [draw.randrange(3, vocab) for _ in range(length)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def explain(plan):
    for term in plan["estimate"]["terms"]:
        print(f"      {term['name']:<28} {term['bytes'] / 2**20:9.2f}   {term['formula']}")
    for phase in plan["estimate"]["phases"]:
        print(f"      {phase['name']:<28} {phase['bytes'] / 2**20:9.2f}")
    measured = plan.get("measured", {})
    for name, number in [("peak", measured.get("peak_bytes", 0)), *measured.get("block_bytes", {}).items()]:
        print(f"      measured {name:<19} {number / 2**20:9.2f}")


if __name__ == "__main__":
    sys.exit(main())
