"""The models that memory is measured with: SmolLM2 in several types and small random Llamas, made once and kept.

The types of SmolLM2 are made by `tune export` itself, from a PEFT folder whose update is zero. Random Llamas have the
tokenizer of SmolLM2, cut or extended to their vocabulary.
"""

import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

# name: vocabulary, width, gated width, blocks, heads, key and value heads, tied head
SHAPES = {
    "v2k": (2_048, 256, 768, 6, 4, 2, True),
    "v2k-wide": (2_048, 768, 2_048, 4, 12, 4, True),
    "v32k": (32_000, 512, 1_408, 8, 8, 4, True),
    "v32k-untied": (32_000, 512, 1_408, 8, 8, 8, False),
    "v50k": (49_152, 256, 1_024, 8, 4, 2, True),
    "v100k": (100_352, 256, 768, 4, 4, 1, True),
    "v150k": (151_936, 256, 704, 4, 4, 2, True),
}


class Models:
    """Files of models by name, `smollm2` or one of SHAPES, and type: `file`, `f32`, or what `gguf:TYPE` knows."""

    def __init__(self, tune, smollm2, folder):
        self.tune, self.smollm2, self.folder = tune, Path(smollm2), Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name, kind):
        if name == "smollm2" and kind == "file":
            return self.smollm2
        if kind == "f32":
            return self.made(self.folder / name, lambda out: self.random(name, out))
        if kind == "safetensors":
            return self.made(self.folder / f"{name}-hf", lambda out: self.export(name, kind, out))
        make = self.export if name == "smollm2" else self.random_gguf
        return self.made(self.folder / f"{name}.{kind}.gguf", lambda out: make(name, kind, out))

    def vocabulary(self, name):
        return SHAPES[name][0] if name in SHAPES else 49_152

    def made(self, path, make):
        if not path.exists():
            # in the same folder, so that a name never holds half a model; with the extension, which tune goes by
            partial = path.with_name(f"partial-{path.name}")
            make(partial)
            partial.rename(path)
        return path

    def export(self, name, kind, out):
        adapter = self.made(self.folder / "zero-adapter", zero_adapter)
        target = kind if kind == "safetensors" else f"gguf:{kind}"
        command = [self.tune, "export", adapter, "--base", self.path(name, "file"), "--to", target, "--out", out, "--verify", "off"]
        subprocess.run([str(part) for part in command], check=True)

    def random_gguf(self, name, kind, out):
        """Random blocks of one type; the embedding and a head of its own in Q8_0, unless the type is of 16 bits."""
        vocab, d_model, d_ff, blocks, heads, kv_heads, tied = SHAPES[name]
        tokenizer = resized(json.loads((self.path("smollm2", "safetensors") / "tokenizer.json").read_text()), vocab)
        writer = gguf.GGUFWriter(out, "llama")
        writer.add_name(name)
        writer.add_context_length(4096)
        writer.add_embedding_length(d_model)
        writer.add_block_count(blocks)
        writer.add_feed_forward_length(d_ff)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_rope_dimension_count(d_model // heads)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(vocab)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        special = {added["content"] for added in tokenizer["added_tokens"]}
        tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        random = np.random.default_rng(1)

        def matrix(name, rows, cols, kind=kind):
            if kind == "f16":
                values = (0.02 * random.standard_normal((rows, cols), dtype=np.float32)).astype(np.float16)
                return writer.add_tensor(name, values)
            blocks = random_blocks(random, kind, rows, cols)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])

        def norm(name):
            writer.add_tensor(name, np.ones(d_model, np.float32))

        d_kv, outside = d_model // heads * kv_heads, "f16" if kind == "f16" else "q8_0"
        matrix("token_embd.weight", vocab, d_model, outside)
        if not tied:
            matrix("output.weight", vocab, d_model, outside)
        norm("output_norm.weight")
        for layer in range(blocks):
            norm(f"blk.{layer}.attn_norm.weight")
            norm(f"blk.{layer}.ffn_norm.weight")
            for part, rows, cols in [
                ("attn_q", d_model, d_model), ("attn_k", d_kv, d_model), ("attn_v", d_kv, d_model),
                ("attn_output", d_model, d_model), ("ffn_gate", d_ff, d_model), ("ffn_up", d_ff, d_model),
                ("ffn_down", d_model, d_ff),
            ]:
                # a row of a K-quant is whole super-blocks
                fits = kind != "q4_k" or cols % 256 == 0
                matrix(f"blk.{layer}.{part}.weight", rows, cols, kind if fits else "q4_0")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def random(self, name, out):
        vocab, d_model, d_ff, blocks, heads, kv_heads, tied = SHAPES[name]
        out.mkdir()
        tokenizer = json.loads((self.path("smollm2", "safetensors") / "tokenizer.json").read_text())
        (out / "tokenizer.json").write_text(json.dumps(resized(tokenizer, vocab)))
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": d_model,
            "intermediate_size": d_ff, "num_hidden_layers": blocks, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": d_model // heads, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": 4096, "tie_word_embeddings": tied, "hidden_act": "silu",
            "bos_token_id": 1, "eos_token_id": 2,
        }
        (out / "config.json").write_text(json.dumps(config))
        random = np.random.default_rng(1)

        def matrix(rows, cols):
            return (0.02 * random.standard_normal((rows, cols), dtype=np.float32))

        d_kv, ones = d_model // heads * kv_heads, np.ones(d_model, np.float32)
        tensors = {"model.embed_tokens.weight": matrix(vocab, d_model), "model.norm.weight": ones}
        if not tied:
            tensors["lm_head.weight"] = matrix(vocab, d_model)
        for layer in range(blocks):
            parts = {
                "input_layernorm": ones, "post_attention_layernorm": ones,
                "self_attn.q_proj": matrix(d_model, d_model), "self_attn.k_proj": matrix(d_kv, d_model),
                "self_attn.v_proj": matrix(d_kv, d_model), "self_attn.o_proj": matrix(d_model, d_model),
                "mlp.gate_proj": matrix(d_ff, d_model), "mlp.up_proj": matrix(d_ff, d_model),
                "mlp.down_proj": matrix(d_model, d_ff),
            }
            tensors |= {f"model.layers.{layer}.{part}.weight": values for part, values in parts.items()}
        save_file(tensors, out / "model.safetensors")


def random_blocks(random, kind, rows, cols):
    """Rows of random codes whose scales give values like those of a model."""
    values, size = {"q8_0": (32, 34), "q4_0": (32, 18), "q4_k": (256, 144)}[kind]
    blocks = random.integers(0, 256, (rows, cols // values, size), dtype=np.uint8)
    scale = {"q8_0": 0.02 / 74, "q4_0": 0.02 / 4.6, "q4_k": 0.02 / 150}[kind]
    blocks[..., :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    if kind == "q4_k":
        blocks[..., 2:4] = np.frombuffer(np.float16(7.5 * scale).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def zero_adapter(out, d_model=576):
    """A PEFT folder of rank 1 on one layer, whose update is zero."""
    out.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj"], "layers_to_transform": [0], "base_model_name_or_path": "none",
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{path}.lora_A.weight": np.zeros((1, d_model), np.float32),
               f"{path}.lora_B.weight": np.zeros((d_model, 1), np.float32)}, out / "adapter_model.safetensors")


def resized(tokenizer, vocab):
    """The same byte-level BPE with `vocab` entries: the merges from some point on left out, or more of them made from
    pairs of entries that there are."""
    model = tokenizer["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    entries = sorted(model["vocab"], key=model["vocab"].get)
    merged = {left + right for left, right in merges}
    kept = [entry for entry in entries if entry not in merged]
    known = set(kept)
    chosen = []
    for left, right in merges:
        if len(kept) >= vocab:
            break
        if left in known and right in known and left + right not in known:
            kept.append(left + right)
            known.add(left + right)
            chosen.append([left, right])
    words = [entry for entry in entries if entry in known and entry.isalpha()]
    for left in words[:2000]:
        for right in words[200:2000]:
            if len(kept) >= vocab:
                break
            if left + right not in known:
                kept.append(left + right)
                known.add(left + right)
                chosen.append([left, right])
    if len(kept) != vocab:
        raise SystemExit(f"{len(kept)} entries instead of {vocab}")
    ids = {entry: number for number, entry in enumerate(kept)}
    model["vocab"], model["merges"] = ids, chosen
    for added in tokenizer.get("added_tokens", []):
        added["id"] = ids[added["content"]]
    return tokenizer

