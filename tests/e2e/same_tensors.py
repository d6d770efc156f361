#!/usr/bin/env python3
"""Whether two GGUF files hold the same tensors: names, shapes, types and bytes. Their order and metadata may differ.

    same_tensors.py A.gguf B.gguf

Prints the number of tensors of each type. Exit code 0: the same. 1: every difference is named. 2: own trouble.
"""

import sys
from collections import Counter

from gguf import GGUFReader


def main():
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    a, b = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in sys.argv[1:])
    differences = [f"{name}: only in one of them" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        x, y = a[name], b[name]
        if list(x.shape) != list(y.shape):
            differences.append(f"{name}: shape {x.shape} and {y.shape}")
        elif x.tensor_type != y.tensor_type:
            differences.append(f"{name}: {x.tensor_type.name} and {y.tensor_type.name}")
        elif x.data.tobytes() != y.data.tobytes():
            unequal = int((x.data.view("u1") != y.data.view("u1")).sum())
            differences.append(f"{name}: {unequal} of {x.n_bytes} bytes of {x.tensor_type.name} differ")
    types = Counter(tensor.tensor_type.name for tensor in a.values())
    print(" ".join(f"{name} {count}" for name, count in types.most_common()))
    print("\n".join(differences) or "the same")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
