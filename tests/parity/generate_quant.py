"""Fixtures of tune-quant: what the Python `gguf` package and a plain numpy NF4 compute.

    pip install gguf numpy torch && python tests/parity/generate_quant.py

Writes crates/tune-quant/tests/fixtures/:
    decode_{TYPE}.bin  blocks of random bytes with finite scales, then their values as f32
    encode_{TYPE}.bin  blocks of f32 values chosen for edge cases, then their bytes
    digests.json       SHA-256 over many more blocks, whose bytes both sides draw from the same generator
    nf4.json           NF4 with double quantisation of a deterministic vector
"""

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as T

OUT = Path(__file__).resolve().parents[2] / "crates/tune-quant/tests/fixtures"

# offsets of the high byte of every half (or of the exponent byte), whose bit 6 is cleared so that it is finite
FINITE = {
    T.F32: [3], T.F16: [1], T.BF16: [1],
    T.Q4_0: [1], T.Q4_1: [1, 3], T.Q5_0: [1], T.Q5_1: [1, 3], T.Q8_0: [1],
    T.Q2_K: [81, 83], T.Q3_K: [109], T.Q4_K: [1, 3], T.Q5_K: [1, 3], T.Q6_K: [209],
    T.IQ4_NL: [1], T.IQ4_XS: [1], T.MXFP4: [0],
}
ENCODED = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0]
DIGEST_BLOCKS = 400


def lcg(count):
    """The high 24 bits of each state of a linear congruential generator."""
    out, s = np.empty(count, dtype=np.uint32), 1
    for i in range(count):
        s = (1664525 * s + 1013904223) % 2**32
        out[i] = s >> 8
    return out


def random_values(count):
    return ((lcg(count).astype(np.float64) - 8388608) / 8388608).astype(np.float32)


def random_blocks(qtype, count):
    _, size = GGML_QUANT_SIZES[qtype]
    blocks = (lcg(count * size) >> 16).astype(np.uint8).reshape(count, size)
    for at in FINITE[qtype]:
        blocks[:, at] &= 0xBF
    return blocks


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def edge_values():
    """Blocks of 32: zeros, constants, one-sided, ties of magnitude, outliers, tiny and large scales.

    No block of negative zeros: the C library starts its search from +0, `gguf` from the first value.
    """
    x = random_values(32)
    spike = np.zeros(32, np.float32)
    spike[7], spike[20] = 3.0, -3.0
    outlier = x.copy()
    outlier[31] = -500.0
    blocks = [np.zeros(32), np.full(32, 0.75), np.full(32, -2.5), np.abs(x), -np.abs(x) - 1,
              spike, -spike, outlier, x * 1e-6, x * 3e-8, x * 1e-12, x * 1e4, np.arange(32) - 16, np.arange(32) / 8]
    return np.stack(blocks).astype(np.float32)


def nf4(values, codes, midpoints, dynamic_map):
    def absmax_of(blocks):
        return np.array([np.abs(b).max() for b in blocks], dtype=np.float32)

    def inverse(m):
        return np.float32(0) if m == 0 else np.float32(1) / m

    blocks = [values[i:i + 64] for i in range(0, len(values), 64)]
    absmax = absmax_of(blocks)
    q = np.concatenate([np.searchsorted(midpoints, b * inverse(m), side="left") for b, m in zip(blocks, absmax)])
    q = q.astype(np.uint8)
    padded = np.append(q, np.zeros(len(q) % 2, np.uint8))
    packed = padded[0::2] << 4 | padded[1::2]

    offset = np.float32(absmax.astype(np.float64).mean())
    nested = [(absmax - offset)[i:i + 256] for i in range(0, len(absmax), 256)]
    nested_absmax = absmax_of(nested)
    a = np.concatenate([np.abs((b * inverse(m))[:, None] - dynamic_map[None, :]).argmin(axis=1)
                        for b, m in zip(nested, nested_absmax)]).astype(np.uint8)
    restored = dynamic_map[a] * nested_absmax[np.arange(len(a)) // 256] + offset
    decoded = codes[q] * restored[np.arange(len(q)) // 64]
    return {
        "len": len(values), "offset": float(offset), "nested_absmax": [float(v) for v in nested_absmax],
        "packed_sha256": sha(packed), "absmax_codes_sha256": sha(a), "decoded_sha256": sha(decoded),
        "decoded_head": [float(v) for v in decoded[:8]], "dynamic_map": [float(v) for v in dynamic_map],
    }


def torch_dynamic_map():
    """The signed 8-bit map of bitsandbytes: per decade the midpoints of 2^i equal intervals of [0.1, 1]."""
    data = [0.0, 1.0]
    for i in range(7):
        b = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10 ** (i - 6) * ((b[:-1] + b[1:]) / 2)
        data += means.tolist() + (-means).tolist()
    return np.array(sorted(data), dtype=np.float32)


NF4_CODES = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=np.float32)
NF4_MIDPOINTS = np.array([
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967942, -0.23460741, -0.13791174, -0.04552500,
    0.03979015, 0.12025525, 0.20352125, 0.29201376, 0.38931254, 0.50166339, 0.64278692, 0.86147839], dtype=np.float32)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    digests = {}
    for qtype in FINITE:
        block_len, _ = GGML_QUANT_SIZES[qtype]
        blocks = random_blocks(qtype, DIGEST_BLOCKS)
        values = gguf.quants.dequantize(blocks, qtype).astype("<f4")
        assert np.isfinite(values).all(), qtype
        digests[f"decode_{qtype.name}"] = sha(values)
        kept = {1: 64, 32: 24, 256: 6}[block_len]
        (OUT / f"decode_{qtype.name}.bin").write_bytes(blocks[-kept:].tobytes() + values[-kept:].tobytes())
    for qtype in ENCODED:
        edges = edge_values()
        if qtype == T.Q8_0 or qtype.name.startswith("Q"):
            assert np.isfinite(gguf.quants.dequantize(gguf.quants.quantize(edges, qtype), qtype)).all(), qtype
        encoded = np.ascontiguousarray(gguf.quants.quantize(edges, qtype)).view(np.uint8)
        (OUT / f"encode_{qtype.name}.bin").write_bytes(edges.tobytes() + encoded.tobytes())
        many = random_values(32 * DIGEST_BLOCKS).reshape(DIGEST_BLOCKS, 32)
        digests[f"encode_{qtype.name}"] = sha(gguf.quants.quantize(many, qtype))
    (OUT / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")

    n = 64 * 600 + 37  # three nested blocks, a partial block, an odd count
    values = random_values(n) * (1 + (np.arange(n) // 64 % 7)).astype(np.float32)
    (OUT / "nf4.json").write_text(json.dumps(nf4(values, NF4_CODES, NF4_MIDPOINTS, torch_dynamic_map())) + "\n")


if __name__ == "__main__":
    main()
