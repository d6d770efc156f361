#!/usr/bin/env python3
"""Copies a GGUF file with every tensor as float32, by the reference decoder of the Python package gguf.

    dequantise.py IN.gguf OUT.gguf

Why: over quantised weights llama.cpp rounds the activations to 8 bits inside its matrix products. That moves
SmolLM2's logits by up to 1.4, as much as a fault in a decoder or an exporter would. Over the float32 copy it
computes exactly what the file says, so a comparison with it can be a thousand times tighter.
"""

import sys

import gguf
import numpy as np


def main(source, target):
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        # the writer adds the header's own fields and the architecture itself
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = int(gguf.LlamaFileType.ALL_F32) if field.name == "general.file_type" else field.contents()
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=item)
    for tensor in reader.tensors:
        shape = tensor.shape.tolist()[::-1]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * tensor.n_elements)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(values.astype(np.float32).reshape(tensor.shape.tolist()[::-1]))
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: dequantise.py IN.gguf OUT.gguf", file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], sys.argv[2])
