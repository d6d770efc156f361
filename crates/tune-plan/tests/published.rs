//! The formulas against measurements that others have published.
//!
//! Nothing here is fitted to the figure that it is compared with. 16 bytes a logit of eager torch are counted from the
//! copies that it makes; 12 of compiled torch were assumed before comparing.

use proptest::prelude::*;
use tune_plan::{BaseType, Kept, Layout, Loss, Trainer, catalogue, find_in_catalogue, generic};

const GIB: f64 = (1u64 << 30) as f64;

fn layout(alias: &str) -> &'static Layout {
    &find_in_catalogue(alias).unwrap().layout
}

/// torchtune in its full 16-bit configuration: weights, gradients and both moments in bf16, fused attention.
fn torchtune() -> Trainer {
    Trainer {
        base: None,
        rank: 8,
        parameter_bytes: 2,
        gradient_bytes: 2,
        optimizer_32nds: 4 * 32,
        activation_bytes: 2,
        norms_keep_32_bits: false,
        kept: Kept::Everything,
        loss: Loss { chunk: 0, bytes_per_logit: 12, keeps_all: false },
        accumulates: false,
        steps_in_backward: false,
        overhead_permille: 0,
        runtime_bytes: 0,
    }
}

/// With its loss in 8 chunks of `tokens`, which keeps 16-bit logits of them all, and block checkpointing.
fn chunked(tokens: u64) -> Trainer {
    let loss = Loss { chunk: tokens / 8, bytes_per_logit: 12, keeps_all: true };
    Trainer { loss, kept: Kept::BlockInputs, ..torchtune() }
}

/// Compares a published peak with ours, in GiB; the error has to lie in the range, in per cent.
fn compare(
    what: &str,
    model: &str,
    trainer: &Trainer,
    (batch, length): (u64, u64),
    published: f64,
    range: std::ops::RangeInclusive<f64>,
) {
    let ours = generic(layout(model), trainer, length, batch).peak_bytes as f64 / GIB;
    let error = (ours / published - 1.0) * 100.0;
    assert!(range.contains(&error), "{what}: published {published} GiB, ours {ours:.1}, {error:+.1} %");
}

/// torchtune's memory ladder, Llama 3.2 3B, packed, 2 × 4096 tokens, one A100; each step added to the last.
#[test]
fn torchtune_3b_step_by_step() {
    let run = (2, 4096);
    let eager = Trainer {
        loss: Loss { chunk: 0, bytes_per_logit: 16, keeps_all: false },
        norms_keep_32_bits: true,
        ..torchtune()
    };
    compare("eager", "llama3.2:3b", &eager, run, 60.0, 0.0..=3.0);
    compare("compiled", "llama3.2:3b", &torchtune(), run, 51.0, 0.0..=3.0);
    let loss_in_chunks = Trainer { kept: Kept::Everything, ..chunked(8192) };
    compare("loss in chunks", "llama3.2:3b", &loss_in_chunks, run, 42.9, 0.0..=3.0);
    compare("checkpointing", "llama3.2:3b", &chunked(8192), run, 24.9, -3.0..=3.0);
    // Offloading keeps some inputs on the device, and the 8-bit optimizer has buffers of its own: both unstated.
    let last =
        Trainer { kept: Kept::Elsewhere, steps_in_backward: true, optimizer_32nds: 65, ..chunked(8192) };
    compare("offload, 8-bit AdamW, step in backward", "llama3.2:3b", &last, run, 17.6, -13.0..=0.0);
}

/// Adapters of rank 8 on all seven linear layers are assumed: the source does not say. Ours lies above, since it keeps
/// 16-bit logits of all chunks, which the recipes for adapters may not.
#[test]
fn torchtune_with_adapters() {
    let lora =
        |tokens, kept| Trainer { base: Some(BaseType::Bf16), accumulates: true, kept, ..chunked(tokens) };
    let qlora = |tokens, kept| Trainer { base: Some(BaseType::Nf4), ..lora(tokens, kept) };
    compare("3B LoRA", "llama3.2:3b", &lora(8192, Kept::Elsewhere), (2, 4096), 8.5, 0.0..=13.0);
    compare("3B QLoRA", "llama3.2:3b", &qlora(8192, Kept::Elsewhere), (2, 4096), 4.6, 0.0..=23.0);
    let run = (2, 2048);
    compare("8B LoRA", "llama3.1:8b", &lora(4096, Kept::BlockInputs), run, 16.2, 0.0..=11.0);
    compare("8B LoRA, offload", "llama3.1:8b", &lora(4096, Kept::Elsewhere), run, 16.2, 0.0..=5.0);
    compare("8B QLoRA", "llama3.1:8b", &qlora(4096, Kept::BlockInputs), run, 7.4, 0.0..=12.0);
    compare("8B QLoRA, offload", "llama3.1:8b", &qlora(4096, Kept::Elsewhere), run, 7.4, -4.0..=0.0);
}

/// Unsloth's table of contexts for Llama 3.1 8B, rank 32, under Hugging Face with flash attention: every row lies on one
/// line of 404.75 tokens a GB. Its slope is bytes a logit and block inputs: 17 to 19 bytes a logit, near the 16 that are
/// counted from torch's copies.
#[test]
fn the_slope_of_hugging_face() {
    let slope_published = GIB / 404.75;
    let at = |bytes_per_logit| {
        let loss = Loss { chunk: 0, bytes_per_logit, keeps_all: false };
        let trainer = Trainer { loss, overhead_permille: 0, ..Trainer::qlora(32) };
        let peak = |length| generic(layout("llama3.1:8b"), &trainer, length, 1).peak_bytes as f64;
        (peak(12_000) - peak(6_000)) / 6_000.0
    };
    assert!(at(17) < slope_published && slope_published < at(19), "{} {slope_published} {}", at(17), at(19));
}

/// First-generation Qwen, one A100, batch 1, flash attention, in GB by sequence length; LoRA of rank 64 in 16 bits over
/// all linear layers of a block. Plain decoders that are not in the catalogue.
#[test]
fn qwen_by_length() {
    let model = |layers: u64, d: u64, f: u64, heads: u64| -> Layout {
        let text = format!(
            "{{\"vocab_size\": 151936, \"hidden_size\": {d}, \"tied\": false, \"layers\": [{{\"count\": {layers}, \"mixer\": \
             {{\"attention\": {{\"heads\": {heads}, \"kv_heads\": {heads}, \"head_dim\": 128, \"with\": [\"qkv_bias\"]}}}}, \
             \"mlp\": {{\"width\": {f}}}}}]}}"
        );
        serde_json::from_str(&text).unwrap()
    };
    // One step at a time, so no gradients live with the loss; 16 bytes a logit.
    let loss = Loss { chunk: 0, bytes_per_logit: 16, keeps_all: false };
    let lora = Trainer { loss, accumulates: false, ..Trainer::lora(64) };
    let lengths = [256, 512, 1024, 2048, 4096, 8192];
    let rows = [
        ("7B LoRA", model(32, 4096, 11008, 32), [20.1, 20.4, 21.5, 23.8, 29.7, 36.6]),
        ("14B LoRA", model(40, 5120, 13696, 40), [34.6, 35.1, 35.3, 37.4, 42.5, 55.2]),
        ("1.8B LoRA", model(24, 2048, 5504, 16), [6.7, 7.4, 8.4, 11.0, 16.2, 21.8]),
    ];
    for (name, layout, published) in rows {
        for (length, published) in lengths.into_iter().zip(published) {
            let ours = generic(&layout, &lora, length, 1).peak_bytes as f64 / 1e9;
            let error = (ours / published - 1.0) * 100.0;
            // The constant of the smallest model is the driver's, which we take for half a GB; at 8192 tokens the
            // published curves bend down, which ours do not.
            let range = match (name, length) {
                ("1.8B LoRA", 2048 | 4096) => -5.0..=0.0,
                ("1.8B LoRA", 8192) => 0.0..=24.0,
                ("1.8B LoRA", _) => -14.0..=-6.0,
                ("7B LoRA", 8192) => 0.0..=15.0,
                ("7B LoRA", _) => -4.0..=3.5,
                _ => -1.0..=8.0,
            };
            assert!(
                range.contains(&error),
                "{name}, {length} tokens: {published}, ours {ours:.1}, {error:+.1} %"
            );
        }
    }
}

fn any_layout() -> impl Strategy<Value = &'static Layout> {
    (0..catalogue().len()).prop_map(|index| &catalogue()[index].layout)
}

fn any_trainer() -> impl Strategy<Value = Trainer> {
    let kept = prop_oneof![Just(Kept::Everything), Just(Kept::BlockInputs), Just(Kept::Elsewhere)];
    (0..3u8, 1..128u64, kept, any::<bool>(), any::<bool>(), any::<bool>(), 0..2048u64).prop_map(
        |(method, rank, kept, accumulates, steps_in_backward, norms_keep_32_bits, chunk)| {
            let trainer = match method {
                0 => Trainer::full(),
                1 => Trainer::lora(rank),
                _ => Trainer::qlora(rank),
            };
            let loss = Loss { chunk, ..trainer.loss };
            Trainer { kept, accumulates, steps_in_backward, norms_keep_32_bits, loss, ..trainer }
        },
    )
}

proptest! {
    #[test]
    fn more_never_needs_less(
        layout in any_layout(), trainer in any_trainer(), length in 1..9000u64, batch in 1..9u64, more in 1..4000u64,
    ) {
        let peak = |layout: &Layout, trainer: &Trainer, length, batch| {
            generic(layout, trainer, length, batch).peak_bytes
        };
        let base = peak(layout, &trainer, length, batch);
        prop_assert!(peak(layout, &trainer, length + more, batch) >= base);
        prop_assert!(peak(layout, &trainer, length, batch + 1) >= base);
        let wider = Trainer { rank: trainer.rank + more, ..trainer.clone() };
        prop_assert!(peak(layout, &wider, length, batch) >= base);
        let larger = Layout { vocab_size: layout.vocab_size + more, ..layout.clone() };
        prop_assert!(peak(&larger, &trainer, length, batch) >= base);
        let mut deeper = layout.clone();
        deeper.layers[0].count += 1;
        prop_assert!(peak(&deeper, &trainer, length, batch) >= base);
    }

    #[test]
    fn a_loss_in_chunks_never_needs_more(layout in any_layout(), trainer in any_trainer(), length in 1..9000u64) {
        let whole = Trainer { loss: Loss { chunk: 0, ..trainer.loss }, ..trainer.clone() };
        prop_assert!(
            generic(layout, &trainer, length, 1).peak_bytes <= generic(layout, &whole, length, 1).peak_bytes
        );
    }

    #[test]
    fn sixteen_bits_need_more_than_four(layout in any_layout(), length in 1..9000u64, rank in 1..128u64) {
        let peak = |trainer: &Trainer| generic(layout, trainer, length, 1).peak_bytes;
        prop_assert!(peak(&Trainer::qlora(rank)) < peak(&Trainer::lora(rank)));
    }
}

/// A model whose numbers overflow stays at the largest number.
#[test]
fn absurd_numbers_do_not_overflow() {
    let estimate = generic(layout("llama2:70b"), &Trainer::lora(u64::MAX), u64::MAX, u64::MAX);
    assert_eq!(estimate.peak_bytes, u64::MAX);
}
