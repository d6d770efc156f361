#!/usr/bin/env python3
"""Makes the fixtures that hold what the real SmolLM2-135M-Instruct computes.

    python tests/parity/generate_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf     # a minute

Writes `tokenizer/smollm2.json`, `smollm2/` and `../e2e/text.tokens.json`. Token ids come from transformers (through
the tokenizer that it rebuilds from the GGUF, its digit split repaired) and from llama.cpp, and have to agree. README.md describes the files.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
E2E = HERE.parent / "e2e"
sys.path.insert(0, str(E2E))
import llama_cpp

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIECES = [
    "Hello, world!  Two  spaces",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "naïve café 12345.678 日本 🦙\t\n\n  x",
    " leading and trailing ",
    "\n\n\n",
    "I'm, you'RE, we'll; 'tis",
    "x=1;y=22;z=333 ½ ² Ⅻ",
    "👩‍💻 cafe\u0301",
    "a<|endoftext|>b<|im_start",
]
LOGIT_POSITIONS = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    gguf = parser.parse_args().gguf
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"error: {gguf} has SHA-256 {digest}, expected {SHA256}")
    torch.set_num_threads(1)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the model's own tokenizer.json splits digits first; transformers loses that when it rebuilds from a GGUF,
    # and would join the blank and the fraction of " ½"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine = llama_cpp.Engine(gguf)
    make_token_ids(tokenizer, engine)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    make_top_logits(model, json.loads((E2E / "text.tokens.json").read_text())[0][:LOGIT_POSITIONS])


def make_token_ids(tokenizer, engine):
    mixed = (HERE / "tokenizer" / "mixed.txt").read_bytes().decode()
    fixture = {
        "model_sha256": SHA256,
        "text": "mixed.txt",
        "with_special": agreed_ids(tokenizer, engine, mixed, special=True),
        "as_text": agreed_ids(tokenizer, engine, mixed, special=False),
        "pieces": [{"text": t, "with_special": agreed_ids(tokenizer, engine, t, special=True)} for t in PIECES],
    }
    write_json(HERE / "tokenizer" / "smollm2.json", fixture)
    text = agreed_ids(tokenizer, engine, (E2E / "text.txt").read_bytes().decode(), special=True)
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    write_json(E2E / "text.tokens.json", [text, agreed_ids(tokenizer, engine, chat, special=True)])
    print(f"mixed.txt: {len(fixture['with_special'])} ids; text.txt: {len(text)} ids")


def agreed_ids(tokenizer, engine, text, special):
    tokenizer.backend_tokenizer.encode_special_tokens = not special
    ours = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    theirs = engine.tokenize(text, parse_special=special)
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        sys.exit(f"error: transformers and llama.cpp differ at token {at}: {ours[at:at + 5]}, {theirs[at:at + 5]}")
    return ours


def make_top_logits(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    values, ids = logits.topk(16, dim=-1)
    folder = HERE / "smollm2"
    folder.mkdir(exist_ok=True)
    tensors = {
        "tokens_0": torch.tensor(tokens, dtype=torch.int32),
        "top_ids_0": ids.int().contiguous(),
        "top_logits_0": values.contiguous(),
        "logsumexp_0": logits.logsumexp(dim=-1),
    }
    save_file(tensors, folder / "top16.safetensors", metadata={"format": "tune-top-logits/1"})
    write_json(folder / "tokens.json", [tokens])
    print(f"last position: {ids[-1, :3].tolist()} {[round(x, 4) for x in values[-1, :3].tolist()]}")


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
