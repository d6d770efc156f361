#!/usr/bin/env python3
"""Perplexity of GGUF files over token sequences, by a real llama.cpp: one process for all files.

    perplexity.py --tokens T.json FILE.gguf ... [--threads N]

Every token but the first of a sequence is predicted from those before it. Prints one JSON object, FILE: perplexity.
Exit codes as llama_cpp.py has them.
"""

import argparse
import json
import sys

import numpy as np

from llama_cpp import Engine, EngineError, read_sequences


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tokens", required=True, help="JSON: an array of arrays of token ids")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    sequences = read_sequences(arguments.tokens)
    result = {}
    for file in arguments.files:
        engine = Engine(file)
        losses = [loss for logits, tokens in zip(engine.logits(sequences, threads=arguments.threads), sequences)
                  for loss in token_losses(logits, tokens)]
        engine.close()
        result[file] = float(np.exp(np.mean(losses)))
    print(json.dumps(result))


def token_losses(logits, tokens):
    predicting = logits[:-1].astype(np.float64)
    predicting -= predicting.max(axis=1, keepdims=True)
    right = predicting[np.arange(len(tokens) - 1), tokens[1:]]
    return np.log(np.exp(predicting).sum(axis=1)) - right


if __name__ == "__main__":
    try:
        main()
    except EngineError as error:
        sys.exit(f"error: {error}")
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
