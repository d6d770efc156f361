#!/usr/bin/env python3
"""Fixtures of tune-quant's encoders: what ggml's own quantiser, in C, makes of given values.

    generate_encoders.py [LIBRARY]

The library is any that exports `ggml_quantize_chunk`; without one it is the module inside the Python package
xllamacpp, pinned in ../e2e/requirements.txt. Writes into crates/tune-quant/tests/fixtures/:

    encode_edges.bin       blocks of 256 float32 values chosen for edge cases
    encode_edges_TYPE.bin  their bytes in that type
    encode_digests.json    SHA-256 of the bytes, type by type, of values that both sides draw from one generator

ggml compiles its quantiser without fused multiply-add on x86-64, so every build for it writes these bytes. Run this
on such a machine.
"""

import ctypes
import hashlib
import importlib.util
import json
import platform
import sys
from pathlib import Path

import numpy as np

from generate_quant import OUT, random_values

# name: GGUF number, values in a block, bytes of a block
TYPES = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "MXFP4": (39, 32, 17),
}
MANY = 256 * 200


def library(path):
    path = path or str(next(Path(importlib.util.find_spec("xllamacpp").origin).parent.glob("xllamacpp*.so")))
    lib = ctypes.PyDLL(path, mode=ctypes.RTLD_GLOBAL)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]
    return lib


def quantise(lib, name, values):
    """The bytes of `values`, taken as one row."""
    number, block_len, block_bytes = TYPES[name]
    values = np.ascontiguousarray(values, dtype="<f4").ravel()
    out = np.zeros(values.size // block_len * block_bytes, np.uint8)
    written = lib.ggml_quantize_chunk(number, values.ctypes.data, out.ctypes.data, 0, 1, values.size, None)
    assert written == out.size, (name, written, out.size)
    return out


def edge_blocks():
    """Zeros of both signs, constants, one-sided blocks, ties, outliers, sparse blocks, scales from denormal to huge,
    sub-blocks of very different scales, and magnitudes just below powers of two."""
    x = random_values(256)
    i = np.arange(256)
    spike = np.zeros(256)
    spike[7], spike[20], spike[130], spike[200] = 3.0, -3.0, 0.5, -1e-9
    one = np.zeros(256)
    one[77] = -0.3
    outlier = x.copy()
    outlier[31] = -500.0
    just_below = np.nextafter(2.0 ** (i // 32 - 4).astype(np.float32), np.float32(0)) * np.where(i % 3 == 1, -1, 1)
    with np.errstate(under="ignore"):
        blocks = [
            np.zeros(256), np.full(256, -0.0), np.full(256, 0.75), np.full(256, -2.5), np.abs(x), -np.abs(x) - 1,
            np.abs(x) + 3, spike, -spike, one, outlier, i - 128, i / 8, np.sign(x), np.where(i % 2 == 0, 1.0, -1.0),
            np.where(i % 16 == 5, x, 0), np.where(i // 32 % 2 == 0, x, 0), np.where(i < 16, x, 0), x**5,
            x * 2.0 ** (-i // 16), x * 2.0 ** (-3.0 * (i // 16)), x * 10.0 ** -(i % 32), just_below,
            *(x * scale for scale in (1e-3, 1e-6, 3e-8, 1e-12, 3e-15, 1e-16, 1e-30, 1e-37, 1e-38, 1e-42, 1e4)),
        ]
    return np.stack([np.asarray(block, dtype=np.float64).astype(np.float32) for block in blocks])


def samples():
    """The long inputs by name; every operation is exact or rounded once, so that another language gets the same."""
    uniform = random_values(MANY)
    draws = random_values(3 * MANY).reshape(MANY, 3)
    heavy = draws[:, 0] * draws[:, 1] * draws[:, 2]
    i = np.arange(MANY)
    scaled = heavy * np.exp2((i // 16 % 31 - 20).astype(np.float32))
    scaled[::97] *= np.float32(64)
    return {"uniform": uniform, "heavy": heavy, "scaled": scaled.astype(np.float32)}


def main():
    assert platform.machine() in ("x86_64", "AMD64"), "other builds of ggml may contract multiply and add"
    lib = library(sys.argv[1] if len(sys.argv) > 1 else None)
    edges = edge_blocks()
    (OUT / "encode_edges.bin").write_bytes(edges.astype("<f4").tobytes())
    digests = {name: {} for name in TYPES}
    for name in TYPES:
        (OUT / f"encode_edges_{name}.bin").write_bytes(quantise(lib, name, edges).tobytes())
        for sample, values in samples().items():
            digests[name][sample] = hashlib.sha256(quantise(lib, name, values).tobytes()).hexdigest()
    (OUT / "encode_digests.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
