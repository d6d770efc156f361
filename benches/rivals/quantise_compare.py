#!/usr/bin/env python3
"""A model file made smaller by `tune` and by llama.cpp's own quantiser, in turns, as a table of ratios.

    quantise_compare.py MODEL.gguf LIBRARIES [--types q4_k_m,q8_0,…] [--rounds 3] [--threads N] [--ours BIN] [--out FILE]

MODEL.gguf: F32, F16 or BF16 weights. LIBRARIES: the folder that `tests/e2e/setup.sh --with-quantizer` prints. Ours is
`cargo build --release -p tune-export --example quantise`, without the pass that reads the file again, which llama.cpp's
has not. Both write to the same folder and are measured as processes, start and all: wall time, and user and system time.
Rounds alternate their order. A ratio is that of the best times of each, which a busy machine disturbs the least; single
results go to --out as JSON lines. Peak memory is VmHWM, mapped pages of the input included.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TYPES = "f32,f16,bf16,q8_0,q6_k,q5_k_m,q5_k_s,q5_1,q5_0,q4_k_m,q4_k_s,q4_1,q4_0,q3_k_m,q2_k,iq4_nl,mxfp4"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("libraries", type=Path)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ours", type=Path, default=ROOT / "target/release/examples/quantise")
    parser.add_argument("--out", type=Path, default=Path("quantise.jsonl"))
    parser.add_argument("--folder", type=Path, help="where both write [default: a temporary folder]")
    arguments = parser.parse_args()

    print("| type | ours, s CPU | llama.cpp | CPU ratio | ours, s wall | llama.cpp | wall ratio | ours, MiB | llama.cpp |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, arguments.out.open("a") as log:
        for kind in arguments.types.split(","):
            best = {}
            for round_ in range(arguments.rounds):
                for name in ["ours", "llama.cpp"] if round_ % 2 == 0 else ["llama.cpp", "ours"]:
                    result = measured(command(name, arguments, kind, Path(folder) / "out.gguf"))
                    log.write(json.dumps({"type": kind, "program": name} | result) + "\n")
                    log.flush()
                    best.setdefault(name, []).append(result)
            ours, theirs = ({key: min(r[key] for r in best[name]) for key in ["cpu", "wall", "peak"]}
                            for name in ["ours", "llama.cpp"])
            print(f"| {kind} | {ours['cpu']:.2f} | {theirs['cpu']:.2f} | {theirs['cpu'] / ours['cpu']:.1f} "
                  f"| {ours['wall']:.2f} | {theirs['wall']:.2f} | {theirs['wall'] / ours['wall']:.1f} "
                  f"| {ours['peak']:.0f} | {theirs['peak']:.0f} |", flush=True)


def command(name, arguments, kind, out):
    out.unlink(missing_ok=True)
    if name == "ours":
        return [str(arguments.ours), str(arguments.model), kind, str(out)], arguments.threads
    script = ROOT / "tests/e2e/quantise.py"
    call = [sys.executable, str(script), str(arguments.libraries), str(arguments.model), str(out), kind]
    call += ["--threads", str(arguments.threads)]
    if kind == "mxfp4":
        call += ["--experts", r"^blk\.\d+\.(attn|ffn)_"]
    return call, arguments.threads


def measured(call_and_threads):
    call, threads = call_and_threads
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    quiet = os.open(os.devnull, os.O_WRONLY)
    start = time.monotonic()
    process = os.posix_spawnp(call[0], call, environment, file_actions=[
        (os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)])
    _, status, usage = os.wait4(process, 0)
    wall = time.monotonic() - start
    os.close(quiet)
    if status != 0:
        sys.exit(f"{' '.join(call)}: status {status}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / 1024}


if __name__ == "__main__":
    main()
