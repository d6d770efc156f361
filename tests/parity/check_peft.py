#!/usr/bin/env python3
"""Opens an adapter folder in PEFT over its base and compares logits with a file that `tune` wrote.

    check_peft.py --base DIR|FILE.gguf --adapter DIR --logits L.safetensors [--tolerance 1e-4]

The base is a Hugging Face directory, or a GGUF file, which transformers dequantises to float32. The logits file
(`tune logits`, ../e2e/README.md) holds the token ids too. Prints one JSON object; `adapter_effect` is the largest
change that the adapter makes to a logit. Exit code 1: logits differ by more than the tolerance (absolute), or the
adapter changes nothing, in which case equal logits would prove nothing. Exit code 2: something cannot be read, or
the adapter folder does not fit the base.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--adapter", required=True, type=Path)
    parser.add_argument("--logits", required=True, type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    ours = load_file(arguments.logits)
    names = sorted(name for name in ours if name.startswith("tokens_"))
    if not names:
        raise ValueError(f"{arguments.logits}: no tokens_0 in it")
    base = load_base(arguments.base)
    plain = {name: logits(base, ours[name]) for name in names}
    with warnings.catch_warnings(record=True) as caught:
        # without "always" a second warning of one kind would be lost
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    # PEFT only warns of keys that it misses or does not know
    complaints = [str(w.message) for w in caught if "adapter keys" in str(w.message) or "config keys" in str(w.message)]
    if complaints:
        raise ValueError(f"{arguments.adapter}: " + "; ".join(complaints))

    result = {"positions": 0, "max_abs": 0.0, "adapter_effect": 0.0, "worst": None}
    for name in names:
        want = logits(model, ours[name])
        got = ours[name.replace("tokens_", "logits_")].double()
        if got.shape != want.shape:
            raise ValueError(f"{name}: logits of shape {list(got.shape)}, PEFT gives {list(want.shape)}")
        difference = (got - want).abs().nan_to_num(float("inf"))
        result["positions"] += len(want)
        result["adapter_effect"] = max(result["adapter_effect"], (want - plain[name]).abs().max().item())
        if difference.max() >= result["max_abs"]:
            result["max_abs"] = difference.max().item()
            at = divmod(difference.argmax().item(), want.shape[1])
            result["worst"] = {"tensor": name, "position": at[0], "token": at[1]}
            result["worst"] |= {"want": want[at].item(), "got": got[at].item()}
    result["failed"] = [
        limit
        for limit, holds in {
            "max_abs": result["max_abs"] <= arguments.tolerance,
            "adapter_effect": result["adapter_effect"] > 10 * arguments.tolerance,
        }.items()
        if not holds
    ]
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def load_base(path):
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if where else path
    model = AutoModelForCausalLM.from_pretrained(
        folder, **where, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens.long()[None]).logits[0].double()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:  # every library here has its own: one line, and the code that means "not comparable"
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
