#!/usr/bin/env python3
"""Peak memory of `tune export` against the depth of the model: of the same width, with more and more blocks.

    export_depth.py TUNE [--blocks 8,16,32] [--targets gguf:q4_k_m,…] [--verify off|warn] [--merge gptq] [--stored f16]
                         [--rank 32] [--folder DIR]

The models are random Llamas (`tune bench make-model`), the adapters random LoRA factors on all linear layers, in a run with
a few rows of text for error feedback (`--merge gptq`). `--verify warn` judges each export as it is done by default. Prints the
most anonymous memory (RssAnon: heap and stacks, which a process really holds) and the most mapped pages of files (RssFile:
input and output, which the system takes back when it needs them) that were seen in /proc/PID/status, every two
milliseconds, in MiB. Linux only. Needs numpy and safetensors (tests/e2e/requirements.txt).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH, GATED, HEADS, KV_HEADS, VOCABULARY = 1024, 2816, 16, 4, 8192
KV_WIDTH = WIDTH // HEADS * KV_HEADS
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV_WIDTH, WIDTH),
    "self_attn.v_proj": (KV_WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (GATED, WIDTH),
    "mlp.up_proj": (GATED, WIDTH),
    "mlp.down_proj": (WIDTH, GATED),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tune", type=Path)
    parser.add_argument("--blocks", default="8,16,32")
    parser.add_argument("--targets", default="gguf:f16,gguf:q8_0,gguf:q4_k_m,safetensors,gguf-lora,peft")
    parser.add_argument("--type", default="q8_0", help="of the model")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--verify", default="off")
    parser.add_argument("--merge", default="refit")
    parser.add_argument("--stored", default="f32", choices=["f32", "f16"], help="type of the factors")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    depths = [int(blocks) for blocks in arguments.blocks.split(",")]
    found = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        for blocks in depths:
            model, run, out = folder / "model.gguf", folder / "run", folder / "out"
            make(arguments, model, run, blocks)
            for target in arguments.targets.split(","):
                call = [arguments.tune, "export", run, "--to", target, "--out", out / target[:4], "--merge", arguments.merge,
                        "--verify", arguments.verify, "--min-retention", "-9"]
                found[blocks, target] = peaks([str(part) for part in call])
                shutil.rmtree(out)
            model.unlink()
    heads = [f"{blocks} blocks: anonymous, mapped" for blocks in depths]
    print("| target | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for target in arguments.targets.split(","):
        cells = [f"{anonymous:.1f}, {mapped:.0f}" for anonymous, mapped in (found[blocks, target] for blocks in depths)]
        print(f"| `{target}` | " + " | ".join(cells) + " |")


def make(arguments, model, run, blocks):
    call = [arguments.tune, "bench", "make-model", "smollm2:135m", "--layers", blocks, "--d-model", WIDTH, "--d-ff", GATED,
            "--heads", HEADS, "--kv-heads", KV_HEADS, "--vocab", VOCABULARY, "--type", arguments.type, "--out", model]
    subprocess.run([str(part) for part in call], check=True, capture_output=True)
    adapter = run / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(blocks)
    rows = ["".join(chr(letter) for letter in draw.integers(97, 123, 1000)) for _ in range(4)]
    (run / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (run / "run.toml").write_text(f'version = 1\n[model]\nbase = "{model}"\n[adapter]\ntype = "lora"\n'
                                  f'[[data]]\npath = "{run / "rows.jsonl"}"\n[data_options]\nval_split = 0\n')
    tensors = {}
    for block in range(blocks):
        for name, (d_out, d_in) in LINEARS.items():
            for part, shape in [("A", (arguments.rank, d_in)), ("B", (d_out, arguments.rank))]:
                key = f"base_model.model.model.layers.{block}.{name}.lora_{part}.weight"
                tensors[key] = draw.standard_normal(shape, np.float32) * np.float32(0.01)
    if arguments.stored == "f16":
        tensors = {key: tensor.astype(np.float16) for key, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": arguments.rank, "lora_alpha": arguments.rank, "bias": "none",
              "target_modules": [name.split(".")[1] for name in LINEARS], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def peaks(call):
    """The most RssAnon and RssFile of a process, in MiB."""
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    most = {"RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in most:
                    most[key] = max(most[key], int(value.split()[0]) / 1024)
        except OSError:
            pass
        time.sleep(0.002)
    if process.returncode:
        sys.exit(f"{' '.join(call)}: {process.stderr.read().decode()}")
    return most["RssAnon"], most["RssFile"]


if __name__ == "__main__":
    main()
