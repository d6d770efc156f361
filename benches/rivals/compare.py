#!/usr/bin/env python3
"""`tune` and its rivals on the same model, text and shapes, one after the other, as a table of ratios.

    compare.py train    --tune BIN --gguf G --bf16 DIR [--f32 DIR] [--shapes 1x512,…] [--entries NAME,…] [--rounds N]
    compare.py generate --tune BIN --gguf G [--prompts 128,512,…] [--rounds N]
    compare.py tokenize --tune BIN --gguf G --bf16 DIR [--rounds N]

DIR: what hf_model.py made of the GGUF. Rounds alternate their order, and a ratio is the median of the rounds' own
ratios, so a machine that is slow for a while is slow for both. A lock keeps a second comparison waiting. Every single
result goes to --out as a line of JSON, the tables in Markdown to standard output.
"""

import argparse
import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Types of the base and what is changed from PEFT's defaults, which are attention by SDPA and float32 adapters.
PEFT_ENTRIES = {
    "peft-bf16": ("bf16", ["--mode", "bf16"]),
    "peft-bf16-eager": ("bf16", ["--mode", "bf16", "--attention", "eager"]),
    "peft-bf16-adapters": ("bf16", ["--mode", "bf16", "--adapter-dtype", "base"]),
    "peft-bf16-adapters-eager": ("bf16", ["--mode", "bf16", "--adapter-dtype", "base", "--attention", "eager"]),
    "peft-bf16-checkpointing": ("bf16", ["--mode", "bf16-checkpointing"]),
    "peft-f32": ("f32", ["--mode", "f32"]),
    "peft-f32-eager": ("f32", ["--mode", "f32", "--attention", "eager"]),
    "peft-nf4": ("bf16", ["--mode", "nf4"]),
    "peft-full-bf16": ("bf16", ["--mode", "full-bf16"]),
}
TUNE_ENTRIES = {
    "tune-qlora": ("gguf", ["--method", "qlora"]),
    "tune-lora-bf16": ("bf16", ["--method", "lora"]),
    "tune-lora-f32": ("f32", ["--method", "lora", "--dtype", "f32"]),
    "tune-full-bf16": ("bf16", ["--method", "full"]),
}
USUAL_ENTRIES = ["tune-qlora", "tune-lora-bf16", *[name for name in PEFT_ENTRIES if name.startswith("peft-bf16")]]


def main():
    arguments = parse()
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(arguments.lock, "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments.log = stack.enter_context(open(arguments.out, "a"))
        {"train": train, "generate": generate, "tokenize": tokenize}[arguments.command](arguments)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tune", type=Path, default=ROOT / "target/release/tune", help="the binary, a release build")
    common.add_argument("--gguf", type=Path, required=True)
    common.add_argument("--rounds", type=int, default=3)
    common.add_argument("--threads", type=int, default=os.cpu_count())
    common.add_argument("--out", type=Path, default=Path("rivals.jsonl"), help="raw results are added to this file")
    common.add_argument("--lock", type=Path, default=Path(tempfile.gettempdir()) / "tune-rivals.lock")
    train = commands.add_parser("train", parents=[common], help="optimizer steps")
    train.add_argument("--bf16", type=Path)
    train.add_argument("--f32", type=Path)
    train.add_argument("--shapes", type=listed, default=["1x512", "4x256", "1x1024", "1x2048"])
    train.add_argument("--entries", type=listed, default=USUAL_ENTRIES, help=", ".join(TUNE_ENTRIES | PEFT_ENTRIES))
    train.add_argument("--steps", type=int, default=5)
    train.add_argument("--warmup", type=int, default=2)
    train.add_argument("--text", type=Path, help="text to train on; tune's own source when absent")
    train.add_argument("--checkpointing", default="auto", help="of tune")
    generate = commands.add_parser("generate", parents=[common], help="prompt and decoding, against llama.cpp")
    generate.add_argument("--prompts", type=listed, default=["512"])
    generate.add_argument("--new-tokens", type=int, default=64)
    tokenize = commands.add_parser("tokenize", parents=[common], help="JSONL to tokens, against datasets.map")
    tokenize.add_argument("--bf16", type=Path, required=True)
    tokenize.add_argument("--copies", type=int, default=8, help="how often the sources of the repository are repeated")
    arguments = parser.parse_args()
    if arguments.command == "train":
        check_entries(parser, arguments)
    return arguments


def listed(text):
    return text.split(",")


def check_entries(parser, arguments):
    known = TUNE_ENTRIES | PEFT_ENTRIES
    for name in arguments.entries:
        if name not in known:
            parser.error(f"{name} is none of {', '.join(known)}")
        if getattr(arguments, known[name][0]) is None:
            parser.error(f"{name} needs --{known[name][0]}")
    # the first run of a shape writes the tokens that the others read
    arguments.entries.sort(key=lambda name: name not in TUNE_ENTRIES)
    if arguments.entries[0] not in TUNE_ENTRIES:
        parser.error(f"one of {', '.join(TUNE_ENTRIES)} has to take part")


def train(arguments):
    peak = register_peak(arguments)
    for shape in arguments.shapes:
        batch, seq = shape.split("x")
        tokens, shared = {}, ["--batch", batch, "--steps", arguments.steps, "--warmup", arguments.warmup]
        shared += ["--threads", arguments.threads]

        def run(name):
            if name in PEFT_ENTRIES:
                base, options = PEFT_ENTRIES[name]
                command = [sys.executable, HERE / "peft_train.py", *options, "--tokens", next(iter(tokens.values()))]
                return measured([*command, "--model", getattr(arguments, base), *shared])
            base, options = TUNE_ENTRIES[name]
            tokens[name] = arguments.folder / f"{shape}-{name}.json"
            command = [arguments.tune, "bench", "train", *options, "--seq", seq, "--write-tokens", tokens[name], "--json"]
            command += ["--checkpointing", arguments.checkpointing]
            command += ["--text", arguments.text] if arguments.text else []
            result = measured([*command, "--model", getattr(arguments, base), *shared])
            if len({path.read_bytes() for path in tokens.values()}) != 1:
                raise SystemExit(f"error: {name} makes other tokens of the text than {arguments.entries[0]}")
            return result

        rounds = rounds_of(arguments, arguments.entries, run, {"shape": shape})
        print_training(shape, rounds, peak)


def print_training(shape, rounds, peak):
    names = list(rounds[0])
    rivals = [name for name in names if name in PEFT_ENTRIES] or names[:1]
    fastest = max(rivals, key=lambda name: middle(rounds, name, "tokens_per_second"))
    work = next(result["flop_per_token"] for result in rounds[0].values() if "flop_per_token" in result)
    print(f"\n### {shape}\n")
    print(f"Ratios to {fastest}. 100 % of the peak: {peak:.0f} GFLOP/s.\n")
    print("| | tokens/s | per CPU-second | of the peak | peak RSS, MiB | speed ratio | CPU ratio | memory ratio | loss, first → last |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        speed = middle(rounds, name, "tokens_per_second")
        # the count of operations is that of adapters over frozen weights
        share = "–" if "full" in name else f"{100 * work * speed * 1e-9 / peak:.0f} %"
        result = rounds[-1][name]
        cells = [
            name,
            f"{speed:.0f}",
            f"{middle(rounds, name, 'tokens_per_cpu_second'):.0f}",
            share,
            f"{middle(rounds, name, 'peak_rss_bytes') / 2**20:.0f}",
            f"{ratio(rounds, name, fastest, 'tokens_per_second'):.2f}",
            f"{ratio(rounds, name, fastest, 'tokens_per_cpu_second'):.2f}",
            f"{ratio(rounds, name, fastest, 'peak_rss_bytes'):.2f}",
            f"{result['first_loss']:.3f} → {result['last_loss']:.3f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def generate(arguments):
    print("\n| prompt + new | | prompt tokens/s | ratio | new tokens/s | ratio | peak RSS, MiB |\n|---|---|---|---|---|---|---|")
    for length in arguments.prompts:
        tokens = arguments.folder / f"{length}.json"
        shared = ["--model", arguments.gguf, "--new-tokens", arguments.new_tokens, "--threads", arguments.threads]
        commands = {
            "tune": [arguments.tune, "bench", "generate", "--prompt-tokens", length, "--write-tokens", tokens, "--json"],
            "llama.cpp": [sys.executable, HERE / "llama_cpp_generate.py", "--tokens", tokens],
        }
        shape = f"{length} + {arguments.new_tokens}"
        rounds = rounds_of(arguments, list(commands), lambda name: measured(commands[name] + shared), {"shape": shape})
        for name in commands:
            cells = [shape, name]
            for field in ["prompt_tokens_per_second", "decode_tokens_per_second"]:
                cells += [f"{middle(rounds, name, field):.1f}", f"{ratio(rounds, name, 'llama.cpp', field):.2f}"]
            print(f"| {' | '.join(cells)} | {middle(rounds, name, 'peak_rss_bytes') / 2**20:.0f} |", flush=True)


def tokenize(arguments):
    rows, recipe = arguments.folder / "rows.jsonl", arguments.folder / "recipe.toml"
    write_rows(rows, arguments.copies)
    recipe.write_text(
        f"version = 1\n[model]\nbase = {json.dumps(str(arguments.gguf.resolve()))}\n[[data]]\npath = {json.dumps(str(rows))}\n"
        'format = "text"\n[data_options]\nsequence_len = 8192\nval_split = 0.0\n'
    )

    def run(name):
        if name == "tune":
            results = []
            for _ in range(2):
                start = time.perf_counter()
                result = measured([arguments.tune, "data", recipe, "--samples", 0, "--json"])
                results.append((time.perf_counter() - start, result))
            [(seconds, result), (cached_seconds, _)] = results
            return {"seconds": seconds, "cached_seconds": cached_seconds, "tokens": result["tokens"]}
        cache = tempfile.mkdtemp(dir=arguments.folder)
        command = [sys.executable, HERE / "tokenize_rows.py", "--model", arguments.bf16, "--rows", rows]
        return measured([*command, "--cache", cache, "--processes", arguments.threads])

    rounds = rounds_of(arguments, ["tune", "datasets"], run, {"rows_bytes": rows.stat().st_size})
    print("\n| | tokens | seconds | again, from the cache | speed ratio |\n|---|---|---|---|---|")
    for name in ["tune", "datasets"]:
        seconds, cached = middle(rounds, name, "seconds"), middle(rounds, name, "cached_seconds")
        speed = ratio(rounds, "datasets", name, "seconds")
        print(f"| {name} | {rounds[0][name]['tokens']} | {seconds:.2f} | {cached:.2f} | {speed:.1f} |")


def write_rows(path, copies):
    """The sources and texts of the repository in rows of about 2,000 characters."""
    files = sorted(file for kind in ["rs", "md", "py"] for file in ROOT.glob(f"*/**/*.{kind}") if "target" not in file.parts)
    with open(path, "w") as out:
        for copy in range(copies):
            for file in files:
                text = file.read_text()
                for start in range(0, len(text), 2000):
                    out.write(json.dumps({"text": f"{copy}\n{text[start : start + 2000]}"}) + "\n")


def rounds_of(arguments, names, run, labels):
    rounds = []
    for number in range(arguments.rounds):
        results = {}
        for name in names if number % 2 == 0 else reversed(names):
            load = os.getloadavg()[0]
            results[name] = run(name)
            line = {"entry": name, "round": number, "load_before": load, **labels, **results[name]}
            print(json.dumps(line), file=arguments.log, flush=True)
            print(f"{time.strftime('%H:%M:%S')} {labels} {name}", file=sys.stderr)
        rounds.append({name: results[name] for name in names})
    return rounds


def register_peak(arguments):
    """bf16 dot products of all cores with everything in registers, or f32 where there are none."""
    result = measured([arguments.tune, "bench", "peak", "--json"])
    print(json.dumps({"entry": "peak", **result}), file=arguments.log, flush=True)
    print(f"machine: {json.dumps(result['machine'])}, commit {result['commit']}")
    return (result["bf16"] or result["f32"])["all_cores_gflops"]


def measured(command):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))} exits with {process.returncode}\n{process.stderr[-2000:]}")
    # libraries may print lines of their own before the result
    return json.loads(process.stdout[process.stdout.index("{") :])


def middle(rounds, name, field):
    return statistics.median(results[name][field] for results in rounds)


def ratio(rounds, name, other, field):
    return statistics.median(results[name][field] / results[other][field] for results in rounds)


if __name__ == "__main__":
    main()
