//! Trained adapter and base to GGUF, safetensors, PEFT and Modelfile, one tensor at a time.
