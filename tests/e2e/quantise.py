#!/usr/bin/env python3
"""What llama.cpp's own quantiser makes of a GGUF file: the function behind `llama-quantize`.

    quantise.py LIBRARIES IN.gguf OUT.gguf TYPE [--threads N] [--experts PATTERN] [--times]

LIBRARIES is the folder that `setup.sh --with-quantizer` prints. TYPE is written as after `tune export --to gguf:`.
The input is taken as it is, quantised tensors too. `--experts` names, as a regular expression, tensors that MXFP4 is
meant for; llama.cpp itself gives it only to the experts of a mixture. `--times` prints the seconds of the call as JSON.
Exit code 0: written. 1: llama.cpp refused. 2: this script's own trouble.
"""

import argparse
import ctypes
import json
import sys
import time
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int, c_int32, c_uint32, c_void_p
from pathlib import Path

FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_m": 12, "q4_k_s": 14,
    "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "bf16": 32, "mxfp4": 38,
}
GGML_TYPE_MXFP4 = 39


class TensorType(Structure):
    _fields_ = [("pattern", c_char_p), ("type", c_int)]


class QuantizeParams(Structure):
    """`llama_model_quantize_params` of the pinned llama.cpp; `check_layout` compares it with the defaults."""

    _fields_ = [
        ("n_threads", c_int32),
        ("file_type", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("keep_split", c_bool),
        ("dry_run", c_bool),
        ("imatrix", c_void_p),
        ("kv_overrides", c_void_p),
        ("tensor_types", POINTER(TensorType)),
        ("prune_layers", c_void_p),
    ]


class Padded(Structure):
    """Room for a structure that has grown."""

    _fields_ = [("known", QuantizeParams), ("more", c_uint32 * 32)]


def check_layout(params):
    flags = [params.allow_requantize, params.quantize_output_tensor, params.only_copy, params.pure, params.keep_split]
    pointers = [params.imatrix, params.kv_overrides, params.tensor_types, params.prune_layers]
    if (
        (params.n_threads, params.file_type) != (0, FILE_TYPES["q8_0"])
        or params.output_tensor_type != params.token_embedding_type
        or flags != [False, True, False, False, False]
        or any(pointers)
    ):
        sys.exit("llama_model_quantize_params has changed")


def load(folder):
    """The parts of llama.cpp in the order in which they need each other."""
    last = None
    for pattern in ("libggml-base*.so", "libggml.*so", "libllama.*so"):
        found = sorted(Path(folder).glob(pattern))
        if not found:
            print(f"error: no {pattern} in {folder}", file=sys.stderr)
            sys.exit(2)
        last = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    last.llama_model_quantize_default_params.restype = Padded
    last.llama_model_quantize.argtypes = [c_char_p, c_char_p, POINTER(Padded)]
    last.llama_model_quantize.restype = c_uint32
    return last


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("libraries")
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("type", choices=FILE_TYPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts")
    parser.add_argument("--times", action="store_true")
    args = parser.parse_args()

    llama = load(args.libraries)
    params = llama.llama_model_quantize_default_params()
    check_layout(params.known)
    params.known.n_threads = args.threads
    params.known.file_type = FILE_TYPES[args.type]
    params.known.allow_requantize = True
    if args.experts:
        overrides = (TensorType * 2)(TensorType(args.experts.encode(), GGML_TYPE_MXFP4), TensorType(None, 0))
        params.known.tensor_types = overrides
    wall, cpu = time.monotonic(), time.process_time()
    failed = llama.llama_model_quantize(args.source.encode(), args.out.encode(), byref(params))
    if args.times:
        print(json.dumps({"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
