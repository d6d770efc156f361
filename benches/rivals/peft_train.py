#!/usr/bin/env python3
"""Training steps of PEFT and torch on the CPU, measured as `tune bench train` measures its own.

    peft_train.py --model DIR --tokens T.json --mode MODE --batch B --steps N --warmup N [--threads N]

DIR: a Hugging Face directory in the type of the mode (hf_model.py makes one). T.json: what `tune bench train
--write-tokens` wrote, one list of ids per document; step i takes documents i B … (i + 1) B. Adapters, optimizer and
clipping are those of `tune`: rank 16, alpha 32, all seven linear layers, AdamW at a constant 2e-4 (full: 2e-5), weight
decay 0.01, global norm 1. Prints one JSON object.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

if "nf4" not in sys.argv:
    # PEFT imports it wherever it is installed, and the other modes should pay neither its time nor its memory
    sys.modules["bitsandbytes"] = None

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import measure

MODES = ["bf16", "f32", "bf16-checkpointing", "full-bf16", "nf4"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--mode", choices=MODES, default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--adapter-dtype", choices=["float32", "base"], default="float32", help="PEFT's default is float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(42)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")

    documents = json.loads(arguments.tokens.read_text())
    steps = arguments.warmup + arguments.steps
    if len(documents) < steps * arguments.batch or len({len(d) for d in documents}) != 1:
        parser.error(f"{arguments.tokens}: expected {steps * arguments.batch} documents of one length")
    tokens = torch.tensor(documents[: steps * arguments.batch]).view(steps, arguments.batch, -1)

    model = load(arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learning_rate = 2e-5 if arguments.mode == "full-bf16" else 2e-4
    # fused, as the Trainer of transformers takes it
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, fused=True)

    seconds_to_first_step = measure.age()
    losses, laps, watch = [], [], measure.Watch()
    for ids in tokens:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        laps.append(watch.lap())
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"error: the loss is not finite: {losses}")

    per_step = arguments.batch * tokens.shape[2]
    tokens_per_second, tokens_per_cpu_second = measure.median_rates(per_step, laps[arguments.warmup :])
    measure.report(
        engine="peft",
        bench="train",
        mode=arguments.mode,
        versions={name: version(name) for name in ["torch", "transformers", "peft"]},
        attention=arguments.attention,
        adapter_dtype=arguments.adapter_dtype,
        threads=arguments.threads,
        batch=arguments.batch,
        seq=tokens.shape[2],
        steps=arguments.steps,
        warmup=arguments.warmup,
        tokens_per_second=tokens_per_second,
        tokens_per_cpu_second=tokens_per_cpu_second,
        peak_rss_bytes=measure.peak_rss_bytes(),
        first_loss=losses[0],
        last_loss=losses[-1],
        seconds_to_first_step=seconds_to_first_step,
        step_seconds=[wall for wall, _ in laps],
    )


def load(arguments):
    options = {"dtype": torch.float32 if arguments.mode == "f32" else torch.bfloat16}
    if arguments.mode == "nf4":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, attn_implementation=arguments.attention, use_cache=False, **options
    )
    model.train()
    if arguments.mode == "full-bf16":
        return model
    if arguments.mode == "bf16-checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=arguments.adapter_dtype == "float32")


def version(package):
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
