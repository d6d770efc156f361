#!/usr/bin/env python3
"""Writes a GGUF model as a Hugging Face directory of bfloat16 or float32 weights, which `tune` and PEFT both read.

    hf_model.py MODEL.gguf DIR [--dtype bfloat16|float32]

A step of its own, so that decoding the GGUF counts neither as a rival's start nor as its memory.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf, dtype = arguments.gguf, getattr(torch, arguments.dtype)

    decoded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    # transformers marks what came from a GGUF as quantised and does not save it; a model of its own carries no mark
    if hasattr(decoded.config, "quantization_config"):
        del decoded.config.quantization_config
    model = AutoModelForCausalLM.from_config(decoded.config, dtype=dtype)
    model.load_state_dict(decoded.state_dict())
    model.save_pretrained(arguments.directory)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if model.config.model_type == "llama" and model.config.vocab_size == 49152:
        # SmolLM2's tokenizer splits digits first, which transformers loses when it rebuilds it from a GGUF
        digits_first = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits_first)
    tokenizer.save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
