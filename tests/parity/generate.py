#!/usr/bin/env python3
"""Makes the tiny models, their logits and the PEFT training run that the Rust parity tests compare with.

    python tests/parity/generate.py            # rewrites tests/parity/{models,logits,peft} in seconds

Everything is random from fixed seeds and computed by transformers, PEFT and torch in float32 on one thread. The
training run is repeated in bfloat16, for how far that takes torch from its own float32.
README.md beside this file describes the files. It is run by hand when a fixture has to change, never by a test.
"""

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
CORPUS = HERE.parent / "e2e" / "text.txt"
FOLDERS = ["models", "logits", "peft"]
VOCAB = 320
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DOCUMENT_LENGTHS = [1, 7, 33]
LOGITS_METADATA = {"format": "tune-logits/1"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for folder in FOLDERS:
        shutil.rmtree(HERE / folder, ignore_errors=True)
    tokenizer = train_tokenizer()
    make_models(tokenizer)
    make_peft_runs(tokenizer)
    total = sum(f.stat().st_size for d in FOLDERS for f in (HERE / d).rglob("*") if f.is_file())
    print(f"{total / 1e6:.2f} MB written")


# ---- tokenizer -----------------------------------------------------------------------------------------------


def train_tokenizer():
    """A byte-level BPE with SmolLM2's pre-tokenizer (single digits, then GPT-2's pattern) and special ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(CORPUS)], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        chat_template=CHAT_TEMPLATE,
    )


# ---- models and their logits -----------------------------------------------------------------------------------


def make_models(tokenizer):
    common = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    # grouped-query attention, the head tied to the embedding, one file of float32
    tied = LlamaConfig(
        **common,
        num_hidden_layers=3,
        num_key_value_heads=2,
        intermediate_size=160,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    # llama3 frequency scaling, with wavelengths on all three sides of its limits (16 and 64 positions), one
    # key-value head, and a head_dim that is not hidden_size / heads
    llama3 = LlamaConfig(
        **common,
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=128,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    # a head of its own, no grouping, stored as bfloat16 in several files with an index
    untied = LlamaConfig(
        **common,
        num_hidden_layers=2,
        num_key_value_heads=4,
        intermediate_size=160,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    make_model("llama-tied", tied, tokenizer, seed=1)
    make_model("llama-llama3-rope", llama3, tokenizer, seed=2, old_style_config=True)
    make_model("llama-untied-bf16-sharded", untied, tokenizer, seed=3, dtype=torch.bfloat16, shard="100KB")


def make_model(name, config, tokenizer, seed, dtype=torch.float32, shard="5GB", old_style_config=False):
    folder = HERE / "models" / name
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(1.0 + 0.2 * noise)
            elif "embed_tokens" in key or "lm_head" in key:
                weight.copy_(0.3 * noise)
            else:
                # wide enough that attention is far from uniform and every layer moves the logits
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if old_style_config:
        rewrite_config_as_transformers_4(folder)
        inline_chat_template(folder)

    model = load_model(folder)
    tensors, separate = {}, []
    generator = torch.Generator().manual_seed(100 + seed)
    documents = [torch.randint(3, VOCAB, (n,), generator=generator) for n in DOCUMENT_LENGTHS]
    with torch.no_grad():
        for i, tokens in enumerate(documents):
            logits = model(tokens[None]).logits[0]
            tensors[f"tokens_{i}"] = tokens.int()
            tensors[f"logits_{i}"] = logits
            separate.append(logits)
        packed = packed_logits(model, documents)
        exact = [copy.deepcopy(model).double()(tokens[None]).logits[0] for tokens in documents]
    separate, exact = torch.cat(separate), torch.cat(exact)
    assert (packed - separate).abs().max() < 2e-5, "packing must not change a document"
    tensors["tokens_packed"] = torch.cat(documents).int()
    tensors["logits_packed"] = packed
    (HERE / "logits").mkdir(exist_ok=True)
    save_file(contiguous(tensors), HERE / "logits" / f"{name}.safetensors", metadata=LOGITS_METADATA)
    noise = (separate.double() - exact).abs().max()
    print(f"{name}: logits within ±{separate.abs().max():.2f}, float32 against float64 {noise:.1e}")


def load_model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def packed_logits(model, documents):
    """All documents on one token axis: positions restart, attention stays inside each document."""
    tokens = torch.cat(documents)
    owner = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    visible = (owner[:, None] == owner[None, :]) & torch.ones(len(tokens), len(tokens)).tril().bool()
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    return model(tokens[None], attention_mask=mask, position_ids=positions[None]).logits[0]


def rewrite_config_as_transformers_4(folder):
    """`rope_theta` and `rope_scaling` at the top level, as in nearly every checkpoint on the Hub."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.45.0"
    path.write_text(json.dumps(config, indent=2) + "\n")


def inline_chat_template(folder):
    """The template inside tokenizer_config.json, where transformers 4 kept it."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    path.write_text(json.dumps(config, indent=2) + "\n")


# ---- PEFT training runs ----------------------------------------------------------------------------------------

OPTIMIZER = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
# What "bf16" means to users of PEFT: type of the base, and whether the forward pass runs under autocast. Adapters
# are float32 in each, PEFT's default.
BF16_MODES = {
    # from_pretrained(dtype=bfloat16) and a loop of one's own: products of the base in bfloat16, of adapters in float32
    "default": (torch.bfloat16, False),
    # the same base under the Trainer's bf16=True: all products in bfloat16
    "autocast": (torch.bfloat16, True),
    # a base loaded in float32 under bf16=True: residual stream and norms are float32, all products bfloat16
    "autocast-over-f32": (torch.float32, True),
}


def make_peft_runs(tokenizer):
    base_folder = HERE / "models" / "llama-tied"
    base = load_model(base_folder)
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    save_adapter(model, HERE / "peft" / "initial")

    ids = tokenizer(CORPUS.read_text())["input_ids"]
    train_run("plain", base_folder, plain_steps(ids), max_grad_norm=None)
    train_run("clipped", base_folder, accumulated_steps(ids), max_grad_norm=1.0)


def plain_steps(ids):
    """One micro-batch of three documents a step; five different batches, twice over."""
    lengths = [(9, 17, 24), (2, 31, 12), (20, 20, 20), (40, 5, 8), (13, 27, 3)]
    batches, at = [], 0
    for trio in lengths:
        batch = []
        for i, n in enumerate(trio):
            batch.append(document(ids[at : at + n], untrained_prefix=n // 3, untrained_suffix=i))
            at += n
        batches.append([batch])
    return batches * 2


def accumulated_steps(ids):
    """Two micro-batches a step with very different counts of trained tokens, one document with none."""
    steps, at = [], 500
    for step in range(10):
        micro_batches = []
        for lengths, prefix in [((30, 6 + step), 2), ((8, 11), 7)]:
            batch = []
            for n in lengths:
                batch.append(document(ids[at : at + n], untrained_prefix=prefix, untrained_suffix=0))
                at += n
            micro_batches.append(batch)
        micro_batches[1].append(document(ids[at : at + 5], untrained_prefix=5, untrained_suffix=0))
        at += 5
        steps.append(micro_batches)
        at -= 40
    return steps


def document(ids, untrained_prefix, untrained_suffix):
    labels = list(ids)
    labels[:untrained_prefix] = [-100] * untrained_prefix
    if untrained_suffix:
        labels[-untrained_suffix:] = [-100] * untrained_suffix
    return {"input_ids": list(ids), "labels": labels}


def train_run(name, base_folder, steps, max_grad_norm):
    folder = HERE / "peft" / name
    run = train(float_model(base_folder, torch.float32), steps, max_grad_norm)
    exact = train(float_model(base_folder, torch.float64), steps, max_grad_norm)
    save_adapter(run["model"], folder / "final")
    save_file(contiguous(run["gradients"]), folder / "gradients.safetensors")

    final, final_exact = (get_peft_model_state_dict(r["model"]) for r in (run, exact))
    noise = {
        "loss_relative": max(abs(a - b) / abs(b) for a, b in zip(run["losses"], exact["losses"], strict=True)),
        "gradient_of_tensor_maximum": max(of_maximum(g, exact["gradients"][k]) for k, g in run["gradients"].items()),
        "final_adapter_absolute": max((w - final_exact[k]).abs().max().item() for k, w in final.items()),
    }
    if max_grad_norm is not None:
        assert all(norm > max_grad_norm for norm in run["grad_norms"]), "clipping must act in every step"
    assert run["losses"][-1] < run["losses"][0]
    record = {
        "base": "../../models/llama-tied",
        "initial_adapter": "../initial",
        "optimizer": {"name": "AdamW", **OPTIMIZER, "schedule": "constant"},
        "max_grad_norm": max_grad_norm,
        "loss": "sum of cross-entropy over the step's trained tokens / their number",
        "float32_against_float64": noise,
        "steps": [
            {"loss": loss, "grad_norm": norm, "trained_tokens": trained_tokens(step), "micro_batches": step}
            for loss, norm, step in zip(run["losses"], run["grad_norms"], steps, strict=True)
        ],
    }
    (folder / "run.json").write_text(json.dumps(record) + "\n")
    print(f"{name}: losses {[round(x, 4) for x in run['losses']]}, norms {[round(x, 2) for x in run['grad_norms']]}")
    print("  float32 against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in noise.items()))
    bf16_runs(folder, base_folder, steps, max_grad_norm, run)


def bf16_runs(folder, base_folder, steps, max_grad_norm, want):
    """The run in each bfloat16 mode, and its distances from the run in float32."""
    record = {}
    for mode, (base_dtype, autocast) in BF16_MODES.items():
        got = train(bf16_model(base_folder, base_dtype), steps, max_grad_norm, autocast)
        adapter, wanted = (get_peft_model_state_dict(r["model"]) for r in (got, want))
        initial = load_file(HERE / "peft" / "initial" / "adapter_model.safetensors")
        gradients = {k: distance(got["gradients"][k], g) for k, g in want["gradients"].items()}
        record[mode] = {
            "losses": got["losses"],
            "grad_norms": got["grad_norms"],
            "gradients": gradients,
            "all_gradients": distance(flat(got["gradients"]), flat(want["gradients"])),
            "adapter_movement": distance(flat(adapter) - flat(initial), flat(wanted) - flat(initial)),
        }
        relative = sorted(d["relative_rms"] for d in gradients.values())
        print(
            f"  bf16 {mode}: losses within {largest_difference(got['losses'], want['losses']):.1e}, gradients "
            f"median {relative[len(relative) // 2]:.1e}, worst {relative[-1]:.1e}"
        )
    (folder / "bf16.json").write_text(json.dumps(record) + "\n")


def float_model(base_folder, dtype):
    """Base and adapter in `dtype`, float32 or float64."""
    base = load_model(base_folder).to(dtype)
    return PeftModel.from_pretrained(base, HERE / "peft" / "initial", is_trainable=True).to(dtype)


def bf16_model(base_folder, base_dtype):
    """The base as `from_pretrained(dtype=…)` loads it, with transformers' default attention; adapters in float32."""
    base = LlamaForCausalLM.from_pretrained(base_folder, dtype=base_dtype).eval()
    return PeftModel.from_pretrained(base, HERE / "peft" / "initial", is_trainable=True)


def train(model, steps, max_grad_norm, autocast=False):
    """PEFT + transformers' own loss + torch's AdamW, padded batches as the Trainer feeds them."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), **OPTIMIZER)
    losses, norms, gradients = [], [], None
    for step in steps:
        optimizer.zero_grad()
        total, count = 0.0, trained_tokens(step)
        for micro_batch in step:
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                output = model(**padded(micro_batch), num_items_in_batch=torch.tensor(count))
            output.loss.backward()
            total += output.loss.item()
        if gradients is None:
            gradients = {n.replace(".default", ""): p.grad.clone() for n, p in parameters.items()}
        limit = float("inf") if max_grad_norm is None else max_grad_norm
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), limit).item())
        optimizer.step()
        losses.append(total)
    return {"model": model, "losses": losses, "grad_norms": norms, "gradients": gradients}


def padded(micro_batch):
    width = max(len(d["input_ids"]) for d in micro_batch)

    def rows(key, fill):
        return torch.tensor([d[key] + [fill] * (width - len(d[key])) for d in micro_batch])

    mask = torch.tensor([[1] * len(d["input_ids"]) + [0] * (width - len(d["input_ids"])) for d in micro_batch])
    return {"input_ids": rows("input_ids", 2), "labels": rows("labels", -100), "attention_mask": mask}


def trained_tokens(step):
    """Labels that have a token before them to be predicted from: the first label of a document never counts."""
    return sum(label != -100 for micro_batch in step for d in micro_batch for label in d["labels"][1:])


def save_adapter(model, folder):
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "llama-tied"
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def of_maximum(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def distance(got, want):
    """|got - want| / |want| and the cosine of the angle between them, to five digits."""
    got, want = got.double().flatten(), want.double().flatten()
    relative, cosine = (got - want).norm() / want.norm(), got @ want / (got.norm() * want.norm())
    return {"relative_rms": float(f"{relative:.4e}"), "cosine": round(cosine.item(), 7)}


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def largest_difference(got, want):
    return max(abs(a - b) for a, b in zip(got, want, strict=True))


def contiguous(tensors):
    return {name: t.detach().contiguous().clone() for name, t in tensors.items()}


if __name__ == "__main__":
    main()
