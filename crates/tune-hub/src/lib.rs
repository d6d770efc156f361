//! Model reference to local files: directory, GGUF, Hugging Face Hub, Ollama store, wheel mirror.
