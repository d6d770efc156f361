#!/usr/bin/env python3
"""llama.cpp's own server, from the Python package xllamacpp, with the arguments of `llama-server`.

    llama_server.py --model MODEL.gguf [--lora ADAPTER.gguf] --host 127.0.0.1 --port N [--ctx-size N] [--parallel N]

It serves until it is ended. F32 for keys and values, and no flash attention, as in `llama_cpp.py`.
"""

import argparse
import threading

import xllamacpp


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--lora")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--parallel", type=int, default=1)
    arguments = parser.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.hostnames = [arguments.host]
    params.port = arguments.port
    params.n_ctx = arguments.ctx_size
    params.n_parallel = arguments.parallel
    params.warmup = False
    params.cpuparams.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if arguments.lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(arguments.lora, 1.0)]
    server = xllamacpp.Server(params)  # noqa: F841: it serves as long as it lives
    threading.Event().wait()


if __name__ == "__main__":
    main()
