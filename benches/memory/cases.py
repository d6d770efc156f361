"""What is measured: a case is a model, its type, and what a recipe says."""

# name: model, type, values of the recipe beside the defaults below
DEFAULTS = {
    "adapter.type": "qlora", "adapter.r": 16, "data_options.sequence_len": 512, "data_options.packing": False,
    "data_options.val_split": 0.0, "train.micro_batch_size": 1, "train.gradient_accumulation_steps": 2,
    "train.max_steps": 2, "train.gradient_checkpointing": True, "checkpoint.save_steps": 0,
}


def case(model, kind, **values):
    return model, kind, {**DEFAULTS, **{key.replace("__", "."): value for key, value in values.items()}}


def smollm2(kind, **values):
    return case("smollm2", kind, **{"model__dtype": "bf16", "data_options__sequence_len": 256, **values})


CASES = {
    # SmolLM2-135M: the published 4-bit file, and what `tune export` makes of it
    "smollm2 Q4_1, 512 tokens": smollm2("file", data_options__sequence_len=512),
    "smollm2 Q4_1, f32": smollm2("file", model__dtype="f32"),
    "smollm2 Q4_1, r 64": smollm2("file", adapter__r=64),
    "smollm2 Q4_1, all blocks kept": smollm2("file", train__gradient_checkpointing=False),
    "smollm2 Q4_1, some blocks kept": smollm2("file", train__gradient_checkpointing="auto", memory__budget="300 MiB"),
    "smollm2 Q4_1, packed to 512": smollm2("file", data_options__packing=True, data_options__sequence_len=512),
    "smollm2 Q4_1, batch 4 of 128, validation": smollm2(
        "file", train__micro_batch_size=4, data_options__sequence_len=128, data_options__val_split=0.2),
    "smollm2 Q4_1, one micro-batch a step": smollm2("file", train__gradient_accumulation_steps=1),
    "smollm2 Q4_1, q and v, r 4": smollm2("file", adapter__target_modules=["q_proj", "v_proj"], adapter__r=4),
    "smollm2 Q4_1, dropout": smollm2("file", adapter__lora_dropout=0.1, data_options__sequence_len=128),
    "smollm2 Q8_0": smollm2("q8_0"),
    "smollm2 Q4_0, r 8": smollm2("q4_0", adapter__r=8),
    "smollm2 BF16, LoRA": smollm2("bf16", adapter__type="lora"),
    "smollm2 F16, LoRA, f32": smollm2("f16", model__dtype="f32", adapter__type="lora", data_options__sequence_len=128),
    "smollm2 BF16 as NF4": smollm2("bf16"),
    "smollm2 BF16, full": smollm2("bf16", adapter__type="full"),
    # small random Llamas, vocabularies of 2,048 to 151,936
    "2k vocabulary Q4_K": case("v2k", "q4_k", model__dtype="bf16", data_options__sequence_len=1024, train__micro_batch_size=2),
    "2k vocabulary Q4_K, f32, all blocks kept": case(
        "v2k", "q4_k", model__dtype="f32", train__gradient_checkpointing=False, data_options__sequence_len=1024),
    "2k vocabulary, wide, F16, LoRA": case("v2k-wide", "f16", model__dtype="bf16", adapter__type="lora", data_options__sequence_len=2048),
    "2k vocabulary, wide, full, f32": case("v2k-wide", "f32", model__dtype="f32", adapter__type="full"),
    "32k vocabulary Q4_K, all blocks kept": case("v32k", "q4_k", model__dtype="bf16", train__gradient_checkpointing=False),
    "32k vocabulary as NF4, r 128": case("v32k", "f16", model__dtype="bf16", adapter__r=128),
    "32k vocabulary, untied, Q8_0": case("v32k-untied", "q8_0", model__dtype="bf16", data_options__sequence_len=2048),
    "32k vocabulary, untied, full": case("v32k-untied", "f32", model__dtype="bf16", adapter__type="full"),
    "50k vocabulary Q4_0, packed": case("v50k", "q4_0", model__dtype="bf16", data_options__packing=True, data_options__sequence_len=2048),
    "100k vocabulary Q4_K": case("v100k", "q4_k", model__dtype="bf16"),
    "100k vocabulary, F16, LoRA, f32": case("v100k", "f16", model__dtype="f32", adapter__type="lora"),
    "150k vocabulary Q4_0": case("v150k", "q4_0", model__dtype="bf16", data_options__sequence_len=1024),
    "150k vocabulary Q8_0, f32": case("v150k", "q8_0", model__dtype="f32"),
    "150k vocabulary as NF4, batch 4": case("v150k", "f16", model__dtype="bf16", train__micro_batch_size=4),
}
