#!/usr/bin/env python3
"""Rows to token ids, text and chat: this project against datasets.map with the fast tokenizer on all cores.

    cargo build --release -p tune-data --example tokenize
    tokenize_compare.py --example target/release/examples/tokenize --gguf G --model DIR [--rounds N] [--megabytes M]

DIR holds G's tokenizer as tokenizer.json (hf_model.py writes one). The rows are the sources and texts of this repository.
`datasets` is timed from a loaded data set to its tokens; the example from JSONL to tokens with their loss mask, and its
processor time is that of its whole process. Both sides alternate; the ratio is the median of the rounds' own ratios. The
ids must be the same, or there is no table. Tokens kept from an earlier run are used by neither.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--example", type=Path, default=ROOT / "target/release/examples/tokenize")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--rival", nargs=2, metavar=("KIND", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rival:
        return rival(arguments.model, *arguments.rival)
    print("| rows | tokens | tune s (CPU s) | datasets.map s (CPU s) | ratio (CPU) |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind, rows in {"text": text_rows, "chat": chat_rows}.items():
            path = Path(folder) / f"{kind}.jsonl"
            write(path, rows(), arguments.megabytes * 10**6)
            compare(arguments, kind, path)


def compare(arguments, kind, path):
    commands = {
        "tune": [arguments.example, arguments.gguf, path],
        "datasets": [sys.executable, __file__, "--gguf", arguments.gguf, "--model", arguments.model, "--rival", kind, path],
    }
    rounds = []
    for number in range(arguments.rounds):
        names = list(commands) if number % 2 == 0 else reversed(commands)
        rounds.append({name: measured(commands[name]) for name in names})
    tokens = {(result["tokens"], result["digest"]) for results in rounds for result in results.values()}
    if len(tokens) != 1:
        sys.exit(f"{kind}: the ids differ: {tokens}")
    seconds, cpu = ({name: statistics.median(r[name][key] for r in rounds) for name in commands} for key in ("seconds", "cpu"))
    ratio = [statistics.median(r["datasets"][key] / r["tune"][key] for r in rounds) for key in ("seconds", "cpu")]
    cells = [f"{seconds[name]:.2f} ({cpu[name]:.2f})" for name in commands]
    print(f"| {kind} | {tokens.pop()[0]} | {cells[0]} | {cells[1]} | {ratio[0]:.1f} ({ratio[1]:.1f}) |", flush=True)


def measured(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": result.get("tokenise_s"), "cpu": whole} | result


def rival(model, kind, path):
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def text(batch):
        return {"input_ids": tokenizer(batch["text"])["input_ids"]}

    def chat(batch):
        return {"input_ids": [tokenizer.apply_chat_template(row, return_dict=False) for row in batch["messages"]]}

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
        start, before = time.perf_counter(), cpu_time()
        rows = rows.map({"text": text, "chat": chat}[kind], batched=True, num_proc=os.cpu_count(), remove_columns=rows.column_names)
        seconds, cpu = time.perf_counter() - start, cpu_time() - before
        # the end of the document, which training adds
        end = [tokenizer.eos_token_id] if kind == "text" else []
        tokens = digest = 0
        for ids in rows["input_ids"]:
            ids = ids + end
            tokens += len(ids)
            for token in ids:
                digest = (digest * 1_000_003 + token + 1) % 2**64
    print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": tokens, "digest": f"{digest:016x}"}))


def cpu_time():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def parts():
    """The repository's texts, about 2,000 characters each."""
    files = sorted(file for kind in ["rs", "md", "py"] for file in ROOT.glob(f"*/**/*.{kind}") if "target" not in file.parts)
    for text in (file.read_text() for file in files):
        yield from (text[start : start + 2000] for start in range(0, len(text), 2000))


def text_rows():
    return [{"text": part} for part in parts()]


def chat_rows():
    """The first lines of a part as the question, the rest as the answer."""
    halves = ((part[:200].strip(), part[200:].strip()) for part in parts())
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in halves
        if question and answer
    ]


def write(path, rows, size):
    with open(path, "w") as out:
        while out.tell() < size:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
