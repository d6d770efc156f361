//! JSONL to packed, masked token batches: chat template, tokenizer, loss mask, packing.
