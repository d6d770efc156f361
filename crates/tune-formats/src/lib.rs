//! Bytes on disk to typed values and back: GGUF, safetensors, PEFT adapters, Modelfile.
