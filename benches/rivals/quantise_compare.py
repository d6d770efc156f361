#!/usr/bin/env python3
"""A model file made smaller by `tune`, by llama.cpp's own quantiser, and copied, in turns, as a table of ratios.

    quantise_compare.py MODEL.gguf LIBRARIES [--types q4_k_m,q8_0,…] [--rounds 3] [--threads N] [--ours FOLDER] [--out FILE]

MODEL.gguf: F32, F16 or BF16 weights. LIBRARIES: the folder that `tests/e2e/setup.sh --with-quantizer` prints. Ours are
`cargo build --release -p tune-export --examples`: `quantise`, without the pass that reads the file again, which llama.cpp's
has not, and `copy`, which reads the input and writes as many bytes as the result has: what memory and disk allow. All write
to the same folder and are measured as processes, start and all (of llama.cpp the call to its library alone, without
Python's start): wall time, and user and system time. `quantise` and `copy` wait until the file is on the disk, llama.cpp
does not; in a folder that is memory (--folder /dev/shm) that makes no difference.

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
PROGRAMS = ["ours", "copy", "llama.cpp"]
COLUMNS = ["type", "ours, s CPU", "llama.cpp", "ratio", "copy", "copy ÷ ours", "ours, s wall", "llama.cpp", "ratio", "copy",
           "copy ÷ ours", "ours, MiB", "llama.cpp"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("libraries", type=Path)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ours", type=Path, default=ROOT / "target/release/examples")
    parser.add_argument("--out", type=Path, default=Path("quantise.jsonl"))
    parser.add_argument("--folder", type=Path, help="where all write [default: a temporary folder]")
    arguments = parser.parse_args()

    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, arguments.out.open("a") as log:
        out = Path(folder) / "out.gguf"
        for kind in arguments.types.split(","):
            results = {}
            # once outside the rounds, for the size
            measured("ours", arguments, kind, out, 0)
            size = out.stat().st_size
            for round_ in range(arguments.rounds):
                for name in PROGRAMS if round_ % 2 == 0 else reversed(PROGRAMS):
                    result = measured(name, arguments, kind, out, size)
                    log.write(json.dumps({"type": kind, "program": name} | result) + "\n")
                    log.flush()
                    results.setdefault(name, []).append(result)
            best = {name: {key: min(r[key] for r in results[name]) for key in results[name][0]} for name in PROGRAMS}
            ours, copy, theirs = (best[name] for name in PROGRAMS)
            row = [kind]
            for key in ["cpu", "wall"]:
                row += [f"{ours[key]:.2f}", f"{theirs[key]:.2f}", f"{theirs[key] / ours[key]:.1f}"]
                row += [f"{copy[key]:.2f}", f"{copy[key] / ours[key]:.2f}"]
            row += [f"{ours['peak']:.0f}", f"{theirs['peak']:.0f}"]
            print("| " + " | ".join(row) + " |", flush=True)


def command(name, arguments, kind, out, size):
    if name == "ours":
        return [str(arguments.ours / "quantise"), str(arguments.model), kind, str(out)]
    if name == "copy":
        return [str(arguments.ours / "copy"), str(arguments.model), str(size), str(out)]
    script = ROOT / "tests/e2e/quantise.py"
    call = [sys.executable, str(script), str(arguments.libraries), str(arguments.model), str(out), kind]
    call += ["--threads", str(arguments.threads), "--times"]
    if kind == "mxfp4":
        call += ["--experts", r"^blk\.\d+\.(attn|ffn)_"]
    return call


def measured(name, arguments, kind, out, size):
    out.unlink(missing_ok=True)
    call = command(name, arguments, kind, out, size)
    environment = os.environ | {"RAYON_NUM_THREADS": str(arguments.threads)}
    quiet = os.open(os.devnull, os.O_WRONLY)
    reader, writer = os.pipe()
    start = time.monotonic()
    process = os.posix_spawnp(call[0], call, environment, file_actions=[
        (os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)])
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(process, 0)
    result = {"wall": time.monotonic() - start, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / 1024}
    os.close(quiet)
    if status != 0:
        sys.exit(f"{' '.join(call)}: status {status}")
    if name == "llama.cpp":
        result |= json.loads(said.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
