#!/usr/bin/env python3
"""Tokenising a JSONL file of {"text"} rows with datasets.map and the fast tokenizer on all cores.

    tokenize_rows.py --model DIR --rows ROWS.jsonl --cache DIR [--processes N]

Once from nothing and once more from the cache that the first left. Prints one JSON object; `seconds` counts from the
JSONL file to tokens in the data set, without the start of Python; `process_seconds` with it.
"""

import argparse
import os
import time
from pathlib import Path

import datasets
from transformers import AutoTokenizer

import measure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a directory with tokenizer.json")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="an empty directory")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    start = time.perf_counter()
    rows = tokenised(arguments, tokenizer)
    seconds, process_seconds = time.perf_counter() - start, measure.age()
    start = time.perf_counter()
    tokenised(arguments, tokenizer)
    cached_seconds = time.perf_counter() - start
    measure.report(
        engine="datasets",
        bench="tokenize",
        versions={"datasets": datasets.__version__},
        threads=arguments.processes,
        rows=len(rows),
        tokens=sum(map(len, rows["input_ids"])),
        seconds=seconds,
        process_seconds=process_seconds,
        cached_seconds=cached_seconds,
    )


def tokenised(arguments, tokenizer):
    rows = datasets.load_dataset("json", data_files=str(arguments.rows), split="train", cache_dir=str(arguments.cache))
    return rows.map(
        lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=arguments.processes,
        remove_columns=["text"],
    )


if __name__ == "__main__":
    main()
