#!/usr/bin/env python3
"""A Llama with random weights in the shape of a given one, as a Hugging Face folder.

    random_llama.py LIKE OUT KEY=VALUE ...

LIKE is a folder whose tokenizer and configuration are taken; the keys are those of config.json, such as
`num_hidden_layers=16`. Rows differ in scale, as those of trained models do.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def main():
    like, out = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((like / "config.json").read_text())
    config.update((key, json.loads(value)) for key, value in (pair.split("=") for pair in sys.argv[3:]))
    d_model, d_ff, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    config["head_dim"] = d_model // heads
    d_kv = config["head_dim"] * config["num_key_value_heads"]
    shutil.copytree(like, out, ignore=shutil.ignore_patterns("*.safetensors"))
    (out / "config.json").write_text(json.dumps(config))

    random = np.random.default_rng(1)

    def matrix(rows, cols):
        scale = 0.02 * np.exp(0.5 * random.standard_normal((rows, 1)))
        return (scale * random.standard_normal((rows, cols))).astype(np.float32)

    def norm():
        return np.ones(d_model, np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], d_model), "model.norm.weight": norm()}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], d_model)
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "input_layernorm": norm(), "post_attention_layernorm": norm(),
            "self_attn.q_proj": matrix(d_model, d_model), "self_attn.k_proj": matrix(d_kv, d_model),
            "self_attn.v_proj": matrix(d_kv, d_model), "self_attn.o_proj": matrix(d_model, d_model),
            "mlp.gate_proj": matrix(d_ff, d_model), "mlp.up_proj": matrix(d_ff, d_model),
            "mlp.down_proj": matrix(d_model, d_ff),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": values for name, values in parts.items()}
    save_file(tensors, out / "model.safetensors")


if __name__ == "__main__":
    main()
