#!/usr/bin/env python3
"""How far bf16 takes the adapter gradients of a real model from float32: in `tune`, and in PEFT and torch.

    cargo build --release --workspace --example gradients
    python tests/parity/real_gradients.py SmolLM2-135M-Instruct.Q4_1.gguf target/release/examples/gradients

One document, the first 512 ids of ../e2e/text.tokens.json; a random adapter as PEFT makes it, r 16, all seven linears,
with B not zero. PEFT runs in float32 and in the bf16 modes of generate.py. Prints a Markdown table: of each pair of
runs the difference of the losses, and of the relative errors |got - want| / |want| of the 420 gradients the median,
the worst, and that of all gradients as one vector. Needs 4 GB of memory; a few minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from generate import BF16_MODES, LINEARS

TOKENS = Path(__file__).parent.parent / "e2e" / "text.tokens.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("example", type=Path, help="the built example `gradients` of tune-train")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokens = json.loads(TOKENS.read_text())[0][: arguments.length]
        (folder / "tokens.json").write_text(json.dumps([tokens]))
        make_adapter(arguments.gguf, folder / "adapter")
        runs = {f"tune {dtype}": ours(arguments, folder, dtype) for dtype in ["f32", "bf16"]}
        runs["torch f32"] = torchs(arguments.gguf, folder, tokens, torch.float32, autocast=False)
        for mode, (base_dtype, autocast) in BF16_MODES.items():
            runs[f"torch bf16 {mode}"] = torchs(arguments.gguf, folder, tokens, base_dtype, autocast)

    print("| compared | loss | median | worst | all | least cosine |\n|---|---|---|---|---|---|")
    pairs = [("tune f32", "torch f32"), ("tune bf16", "tune f32"), ("tune bf16", "torch f32")]
    for got, want in pairs + [(f"torch bf16 {mode}", "torch f32") for mode in BF16_MODES]:
        print(compared(got, want, runs[got], runs[want]))


def make_adapter(gguf, folder):
    torch.manual_seed(7)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(load(gguf, torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.01)
    model.save_pretrained(folder)


def load(gguf, dtype):
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype).eval()


def ours(arguments, folder, dtype):
    out = folder / f"tune-{dtype}.safetensors"
    command = [arguments.example, arguments.gguf, folder / "adapter", folder / "tokens.json", dtype, out]
    subprocess.run(command, check=True, env={**os.environ, "RAYON_NUM_THREADS": str(arguments.threads)})
    return load_file(out)


def torchs(gguf, folder, tokens, base_dtype, autocast):
    model = PeftModel.from_pretrained(load(gguf, base_dtype), folder / "adapter", is_trainable=True)
    ids = torch.tensor([tokens])
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name.replace(".default", ""): p.grad for name, p in trained.items()}
    return {"loss": loss.detach().reshape(1), **gradients}


def compared(got_name, want_name, got, want):
    names = sorted(name for name in want if name != "loss")
    if names != sorted(name for name in got if name != "loss"):
        sys.exit(f"error: {got_name} and {want_name} have gradients of different names")
    errors, cosines, difference, square = [], [], 0.0, 0.0
    for name in names:
        a, b = got[name].double().flatten(), want[name].double().flatten()
        errors.append(((a - b).norm() / b.norm()).item())
        cosines.append((a @ b / (a.norm() * b.norm())).item())
        difference += (a - b).square().sum().item()
        square += b.square().sum().item()
    errors.sort()
    loss = got["loss"].item() - want["loss"].item()
    every = (difference / square) ** 0.5
    median = errors[len(errors) // 2]
    return (
        f"| {got_name} — {want_name} | {loss:+.1e} of {want['loss'].item():.3f} | {median:.2e} | {errors[-1]:.2e} "
        f"| {every:.2e} | {min(cosines):.6f} |"
    )


if __name__ == "__main__":
    main()
