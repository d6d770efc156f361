#!/usr/bin/env python3
"""A real llama.cpp as the judge: logits at every position, and token ids, of a GGUF file.

    llama_cpp.py logits MODEL.gguf --tokens T.json --out L.safetensors [--lora ADAPTER.gguf[=SCALE]]
    llama_cpp.py tokenize MODEL.gguf --text FILE [--as-text]          # ids as JSON on standard output

The engine is the one inside the Python package xllamacpp, called through its exported C functions. Logits are
computed with a float32 key-value cache and without flash attention: with llama.cpp's defaults they differ by
about 0.02 from a plain float32 forward, which would hide real faults. README.md describes the files.
Exit code 0: written. 1: llama.cpp refused the model, the adapter or the tokens. 2: this script's own trouble.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import re
import sys
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path

# before the engine's OpenMP starts: threads that wait must not burn the cores that others compute on
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from safetensors.numpy import save_file

GGML_TYPE_F32, GGML_TYPE_F16 = 0, 1
FLASH_ATTENTION_AUTO, FLASH_ATTENTION_OFF = -1, 0


class ModelParams(Structure):
    """Only passed through, so its fields do not matter; larger than the real one, which is harmless by value."""

    _fields_ = [("opaque", c_int8 * 256)]


class ContextParams(Structure):
    """`llama_context_params` of the pinned llama.cpp; `check_layout` compares it with the library's defaults."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("context_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attention", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_attn_fast_slow", c_float * 4),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_threshold", c_float),
        ("eval_callback", c_void_p),
        ("eval_callback_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("rest", c_int8 * 256),
    ]


class Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

SIGNATURES = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), ctypes.c_size_t, POINTER(c_float)]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}


class EngineError(Exception):
    """llama.cpp said no; its own last lines are part of the message."""


class Engine:
    """One GGUF model in llama.cpp."""

    def __init__(self, path):
        self.log = []
        self.lib = load_library()
        # kept on self: the library calls it for as long as it lives
        self.log_callback = LogCallback(lambda level, text, _: self.log.append(text.decode("utf-8", "replace")))
        self.lib.llama_log_set(self.log_callback, None)
        check_layout(self.lib.llama_context_default_params())
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(os.fsencode(path), self.lib.llama_model_default_params())
        if not self.model:
            raise self.error(f"{path}: llama.cpp does not load this model")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text, parse_special):
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 16))()
        n = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), False, parse_special)
        if n < 0:
            raise self.error("llama.cpp does not tokenise the text")
        return ids[:n]

    def logits(self, sequences, loras=(), threads=1):
        """One float32 array [n, vocab] for each list of token ids."""
        context = self.open_context(max(map(len, sequences)), threads)
        self.set_adapters(context, loras)
        try:
            return [self.sequence_logits(context, tokens) for tokens in sequences]
        finally:
            self.lib.llama_free(context)

    def open_context(self, longest, threads):
        params = self.lib.llama_context_default_params()
        params.n_ctx = -(-longest // 256) * 256
        params.n_batch = params.n_ubatch = min(params.n_ctx, 512)
        params.n_outputs_max = params.n_outputs_max_per_seq = params.n_batch
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = GGML_TYPE_F32
        params.flash_attention = FLASH_ATTENTION_OFF
        self.log.clear()
        context = self.lib.llama_init_from_model(self.model, params)
        if not context:
            raise self.error("llama.cpp opens no context")
        for name in ["n_ctx", "n_batch", "n_ubatch", "n_threads"]:
            got = getattr(self.lib, f"llama_{name}")(context)
            if got != getattr(params, name):
                raise RuntimeError(f"asked for {name} = {getattr(params, name)}, llama.cpp took {got}")
        # these two have no function that tells, but the log does
        log = "".join(self.log)
        for pattern in [r"K \(f32\)", r"V \(f32\)", r"flash_attn\s*= disabled"]:
            if not re.search(pattern, log):
                raise RuntimeError(f"no {pattern!r} in what llama.cpp says of its context:\n{log}")
        return context

    def set_adapters(self, context, loras):
        if not loras:
            return
        handles = (c_void_p * len(loras))()
        for i, (path, _) in enumerate(loras):
            handles[i] = self.lib.llama_adapter_lora_init(self.model, os.fsencode(path))
            if not handles[i]:
                raise self.error(f"{path}: llama.cpp does not load this adapter")
        scales = (c_float * len(loras))(*[scale for _, scale in loras])
        if self.lib.llama_set_adapters_lora(context, handles, len(loras), scales) != 0:
            raise self.error("llama.cpp does not apply the adapter")

    def sequence_logits(self, context, tokens):
        outside = [t for t in tokens if not 0 <= t < self.vocab_size]
        if outside:
            raise EngineError(f"token ids outside 0..{self.vocab_size}: {outside[:10]}")
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        size = self.lib.llama_n_batch(context)
        batch = self.lib.llama_batch_init(size, 0, 1)
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            status = self.lib.llama_decode(context, batch)
            if status != 0:
                raise self.error(f"llama_decode returned {status} at position {start}")
            for i in range(len(chunk)):
                row = self.lib.llama_get_logits_ith(context, i)
                out[start + i] = np.ctypeslib.as_array(row, (self.vocab_size,))
        self.lib.llama_batch_free(batch)
        if not np.isfinite(out).all():
            raise EngineError(f"{(~np.isfinite(out)).sum()} of {out.size} logits are not finite")
        return out

    def close(self):
        self.lib.llama_model_free(self.model)

    def error(self, message):
        return EngineError("\n".join([message, *"".join(self.log).strip().splitlines()[-6:]]))


def load_library():
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        raise RuntimeError("the Python package xllamacpp is missing; run tests/e2e/setup.sh")
    [path] = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def check_layout(defaults):
    """Structures go by value, so a changed layout must stop us here and not surface as wrong logits."""
    got = [
        defaults.n_ctx, defaults.n_batch, defaults.n_ubatch, defaults.n_seq_max,
        defaults.n_threads == defaults.n_threads_batch > 0,
        defaults.context_type, defaults.rope_scaling_type, defaults.pooling_type, defaults.attention_type,
        defaults.flash_attention, list(defaults.yarn_ext_attn_fast_slow), defaults.defrag_threshold,
        defaults.eval_callback, defaults.type_k, defaults.type_v,
    ]  # fmt: skip
    want = [
        512, 2048, 512, 1, True, 0, -1, -1, -1,
        FLASH_ATTENTION_AUTO, [-1.0] * 4, -1.0,
        None, GGML_TYPE_F16, GGML_TYPE_F16,
    ]  # fmt: skip
    if got != want:
        raise RuntimeError(f"this xllamacpp lays llama_context_params out differently: {got}, expected {want}")


def read_sequences(path):
    sequences = json.loads(Path(path).read_text())
    ids_only = isinstance(sequences, list) and all(
        isinstance(s, list) and s and all(type(t) is int for t in s) for s in sequences
    )
    if not ids_only or not sequences:
        raise ValueError(f"{path}: expected a JSON array of non-empty arrays of token ids")
    return sequences


def parse_lora(text):
    path, _, scale = text.partition("=")
    return path, float(scale) if scale else 1.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    logits = commands.add_parser("logits", help="logits at every position of token sequences")
    logits.add_argument("model")
    logits.add_argument("--tokens", required=True, help="JSON: an array of arrays of token ids")
    logits.add_argument("--out", required=True, help="safetensors file to write")
    logits.add_argument("--lora", action="append", default=[], type=parse_lora, metavar="GGUF[=SCALE]")
    logits.add_argument("--threads", type=int, default=2)
    tokenize = commands.add_parser("tokenize", help="token ids of a text, without BOS")
    tokenize.add_argument("model")
    tokenize.add_argument("--text", required=True, help="UTF-8 file, taken byte for byte")
    tokenize.add_argument("--as-text", action="store_true", help="spell special tokens out")
    arguments = parser.parse_args()

    engine = Engine(arguments.model)
    if arguments.command == "tokenize":
        text = Path(arguments.text).read_bytes().decode()
        print(json.dumps(engine.tokenize(text, parse_special=not arguments.as_text)))
    else:
        sequences = read_sequences(arguments.tokens)
        tensors = {}
        for i, array in enumerate(engine.logits(sequences, arguments.lora, arguments.threads)):
            tensors[f"tokens_{i}"] = np.asarray(sequences[i], np.int32)
            tensors[f"logits_{i}"] = array
        save_file(tensors, arguments.out, metadata={"format": "tune-logits/1"})
    engine.close()


if __name__ == "__main__":
    try:
        main()
    except EngineError as error:
        sys.exit(f"error: {error}")
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
