#!/usr/bin/env python3
"""Real steps of models of the true Llama shapes, within the memory that the table of docs/memory-table.md promises.

    measure.py TUNE --folder DIR [--only 7b] [--steps 2]

Makes each model (random weights; 4 to 18 GB on disk, kept in DIR), trains with the promise as the run's budget and
`on_exceed = "fit"`, so that `tune` chooses what it takes to keep it, and prints a row: planned, VmHWM, and the whole file
with the most anonymous memory that the process ever had (read every half second). A row is good when the run ends
well and the larger of both is within the promise. Exits with 1 if one is not. GB are 10^9 bytes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

# name: shape, type, method, promise in GB
ROWS = {
    "7b": ("llama2:7b", "q4_0", "qlora", 5),
    "13b": ("llama2:13b", "q4_0", "qlora", 9),
    "30b": ("llama:30b", "q4_0", "qlora", 20),
    "7b-lora": ("llama2:7b", "bf16", "lora", 15),
}
HERE = Path(__file__).resolve().parent
GB = 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tune", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", choices=ROWS, action="append")
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    log = (HERE.parents[1] / "docs" / "LOG.md").read_text()
    (arguments.folder / "text.jsonl").write_text(json.dumps({"text": log[:20_000]}) + "\n")
    recipe = shutil.copy(HERE / "recipe.toml", arguments.folder)
    print("| | promise | planned | at most | `VmHWM` | file + anonymous | changed to fit | losses of the steps |\n"
          "|---|---|---|---|---|---|---|---|", flush=True)
    good = [measure(arguments, name, recipe) for name in arguments.only or ROWS]
    return 0 if all(good) else 1


def measure(arguments, name, recipe):
    shape, kind, method, promise = ROWS[name]
    tune = str(arguments.tune.resolve())
    model = arguments.folder / f"{shape.replace(':', '-')}.{kind}.gguf"
    if not model.exists():
        subprocess.run([tune, "bench", "make-model", shape, "--type", kind, "--out", str(model)],
                       check=True, stdout=subprocess.DEVNULL)
    out = arguments.folder / f"run-{name}"
    values = {"model.base": f'"{model}"', "adapter.type": f'"{method}"', "memory.budget": f'"{promise} GB"',
              "train.max_steps": arguments.steps}
    command = [tune, "train", recipe, "--out", str(out), "--resume", "never", "--quiet"]
    for key, value in values.items():
        command += ["--set", f"{key}={value}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    anonymous = 0
    while process.poll() is None:
        anonymous = max(anonymous, status(process.pid, "RssAnon"))
        time.sleep(0.5)
    if process.returncode:
        print(f"| {name} | exit {process.returncode}: {process.stderr.read().strip()} |", flush=True)
        return False
    plan = json.loads((out / "plan.json").read_text())
    estimate, resident = plan["estimate"], plan["measured"]["peak_bytes"]
    whole = model.stat().st_size + anonymous
    fitted = plan.get("fitted") or []
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    figures = [estimate["peak_bytes"], estimate["upper_bytes"], resident, whole]
    cells = [name, str(promise), *(f"{figure / GB:.2f}" for figure in figures), f"{json.dumps(fitted)}",
             ", ".join(f"{loss:.3f}" for loss in losses)]
    print(f"| {' | '.join(cells)} |", flush=True)
    return max(resident, whole) <= promise * GB


def status(pid, field):
    """A line of the process's status in bytes; 0 once it has gone."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    os.environ["TUNE_NO_CACHE"] = "1"
    sys.exit(main())
