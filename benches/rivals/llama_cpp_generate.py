#!/usr/bin/env python3
"""Prompt processing and decoding by llama.cpp, measured as `tune bench generate` measures its own.

    llama_cpp_generate.py --model MODEL.gguf --tokens T.json --new-tokens N [--runs N] [--threads N]

T.json: what `tune bench generate --write-tokens` wrote; the first document is the prompt. The context is llama.cpp's
default: keys and values in float16, flash attention where it helps. Prints one JSON object.
"""

import argparse
import ctypes
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

# the engine's default: threads wait for each other awake, which is fastest where nothing else runs
os.environ.setdefault("OMP_WAIT_POLICY", "active")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "e2e"))

import llama_cpp
import measure
import numpy as np


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    prompt = llama_cpp.read_sequences(arguments.tokens)[0]

    engine = llama_cpp.Engine(arguments.model)
    context = open_context(engine, len(prompt) + arguments.new_tokens, arguments.threads)
    runs = [generate(engine, context, prompt, arguments.new_tokens) for _ in range(arguments.runs + 1)][1:]
    prompt_rate, prompt_cpu_rate = measure.median_rates(len(prompt), [prompt for prompt, _ in runs])
    # the first new token belongs to the prompt
    decode_rate, decode_cpu_rate = measure.median_rates(arguments.new_tokens - 1, [decode for _, decode in runs])
    measure.report(
        engine="llama.cpp",
        bench="generate",
        versions={"xllamacpp": version("xllamacpp")},
        threads=arguments.threads,
        prompt_tokens=len(prompt),
        new_tokens=arguments.new_tokens,
        runs=arguments.runs,
        prompt_tokens_per_second=prompt_rate,
        prompt_tokens_per_cpu_second=prompt_cpu_rate,
        decode_tokens_per_second=decode_rate,
        decode_tokens_per_cpu_second=decode_cpu_rate,
        peak_rss_bytes=measure.peak_rss_bytes(),
    )


def open_context(engine, tokens, threads):
    params = engine.lib.llama_context_default_params()
    params.n_ctx = -(-tokens // 256) * 256
    params.n_threads = params.n_threads_batch = threads
    context = engine.lib.llama_init_from_model(engine.model, params)
    if not context:
        raise engine.error("llama.cpp opens no context")
    if (got := engine.lib.llama_n_threads(context)) != threads:
        raise RuntimeError(f"asked for {threads} threads, llama.cpp took {got}")
    return context


def generate(engine, context, prompt, new_tokens):
    """Greedy; returns wall and processor time of the prompt with its first new token, and of the others."""
    lib = engine.lib
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    batch = lib.llama_batch_init(max(len(prompt), 1), 0, 1)
    watch = measure.Watch()
    next_token = decode(engine, context, batch, prompt, 0)
    prompt_time = watch.lap()
    for position in range(len(prompt), len(prompt) + new_tokens - 1):
        next_token = decode(engine, context, batch, [next_token], position)
    decode_time = watch.lap()
    lib.llama_batch_free(batch)
    return prompt_time, decode_time


def decode(engine, context, batch, tokens, position):
    """The most likely token after `tokens`, in batches of what the context takes at once."""
    size = engine.lib.llama_n_batch(context)
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        batch.n_tokens = len(chunk)
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i] = token, position + start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = start + i == len(tokens) - 1
        status = engine.lib.llama_decode(context, batch)
        if status != 0:
            raise engine.error(f"llama_decode returned {status} at position {position + start}")
    row = engine.lib.llama_get_logits_ith(context, -1)
    return int(np.argmax(np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (engine.vocab_size,))))


if __name__ == "__main__":
    main()
