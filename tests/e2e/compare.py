#!/usr/bin/env python3
"""Compares two logits files position by position; exit code 1 where they differ by more than allowed.

    compare.py WANT.safetensors GOT.safetensors [--min-top1 0.99] [--max-kl 1e-3] [--max-abs 1e-4]

Prints one JSON object: `positions`, `top1` (share of positions with the same most likely token), `mean_kl` and
`max_kl` (KL(want ‖ got) of the softmax distributions, in nats), `max_abs` and `mean_abs` (differences of logits),
`worst` (the position of `max_abs`), `failed` (the limits that do not hold). Exit code 2: not comparable.
"""

import argparse
import json
import sys

import numpy as np
from safetensors import SafetensorError, safe_open


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("want")
    parser.add_argument("got")
    parser.add_argument("--min-top1", type=float)
    parser.add_argument("--max-kl", type=float, help="limit of the mean KL divergence")
    parser.add_argument("--max-abs", type=float, help="limit of the largest difference of two logits")
    arguments = parser.parse_args()

    result = compare(arguments.want, arguments.got)
    limits = {
        "top1": arguments.min_top1 is None or result["top1"] >= arguments.min_top1,
        "mean_kl": arguments.max_kl is None or result["mean_kl"] <= arguments.max_kl,
        "max_abs": arguments.max_abs is None or result["max_abs"] <= arguments.max_abs,
    }
    result["failed"] = [name for name, holds in limits.items() if not holds]
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def compare(want_path, got_path):
    kl, same, abs_sum, abs_max, worst = [], 0, 0.0, -1.0, None
    with safe_open(want_path, "np") as want_file, safe_open(got_path, "np") as got_file:
        names = sorted(name for name in want_file.keys() if name.startswith("tokens_"))
        if not names:
            raise ValueError(f"{want_path}: no tokens_0 in it")
        missing = sorted(set(want_file.keys()) ^ set(got_file.keys()))
        if missing:
            raise ValueError(f"only one of the files has {', '.join(missing)}")
        for tokens_name in names:
            name = tokens_name.replace("tokens_", "logits_")
            if not np.array_equal(want_file.get_tensor(tokens_name), got_file.get_tensor(tokens_name)):
                raise ValueError(f"{tokens_name}: the files hold different tokens")
            want_all, got_all = want_file.get_slice(name), got_file.get_slice(name)
            if want_all.get_shape() != got_all.get_shape():
                raise ValueError(f"{name}: {want_all.get_shape()} against {got_all.get_shape()}")
            # some rows at a time: a vocabulary of 49,152 in float64 is 0.4 MB a row
            rows = want_all.get_shape()[0]
            for start in range(0, rows, 32):
                end = min(start + 32, rows)
                want = want_all[start:end].astype(np.float64)
                got = got_all[start:end].astype(np.float64)
                if not (np.isfinite(want).all() and np.isfinite(got).all()):
                    raise ValueError(f"{name}: logits that are not finite from position {start} on")
                log_p, log_q = log_softmax(want), log_softmax(got)
                kl.extend((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
                same += int((want.argmax(axis=1) == got.argmax(axis=1)).sum())
                difference = np.abs(want - got)
                abs_sum += difference.mean(axis=1).sum()
                if difference.max() > abs_max:
                    abs_max = float(difference.max())
                    row, token = np.unravel_index(difference.argmax(), difference.shape)
                    worst = {
                        "tensor": name,
                        "position": start + int(row),
                        "token": int(token),
                        "want": float(want[row, token]),
                        "got": float(got[row, token]),
                    }
    return {
        "positions": len(kl),
        "top1": same / len(kl),
        "mean_kl": float(np.mean(kl)),
        "max_kl": float(np.max(kl)),
        "max_abs": abs_max,
        "mean_abs": abs_sum / len(kl),
        "worst": worst,
    }


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
