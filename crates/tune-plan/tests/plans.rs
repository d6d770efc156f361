//! Plans of known models, and what must hold for every plan.

use proptest::prelude::*;
use tune_plan::advice::Question;
use tune_plan::memory::Pool;
use tune_plan::{
    Answer, Calibration, DataFacts, FLEX, MemoryPlan, PlanInput, Style, estimate, find_in_catalogue,
    from_shape, reference, rough,
};
use tune_recipe::{Dtype, Layers, Method, Optimizer, TargetModules};

fn input(alias: &str, method: Method) -> PlanInput {
    let model = find_in_catalogue(alias).unwrap();
    let shape = model.shape().unwrap();
    PlanInput {
        gradient_accumulation_steps: 16,
        ..PlanInput::of(model.name.clone(), shape, from_shape(&shape, method), method)
    }
}

fn text(input: PlanInput) -> String {
    Answer::to(&Question::about(input, Pool::Shared), None, Vec::new()).to_text(Style::PLAIN)
}

fn bytes(plan: &MemoryPlan, term: &str) -> u64 {
    plan.estimate.terms.iter().find(|t| t.name == term).unwrap_or_else(|| panic!("no term {term}")).bytes
}

#[test]
fn a_small_model_over_its_whole_table() {
    let plan = PlanInput { budget_bytes: Some(4_000_000_000), ..input("smollm2:135m", Method::Qlora) };
    insta::assert_snapshot!(text(plan));
}

#[test]
fn an_8b_model_that_does_not_fit() {
    let plan = PlanInput { budget_bytes: Some(8_000_000_000), ..input("llama3.1:8b", Method::Qlora) };
    insta::assert_snapshot!(text(plan));
}

#[test]
fn only_a_size() {
    let reference = reference::reference(Method::Qlora, 4, 7_000_000_000, true);
    let plan = rough("7b".into(), reference, Some(4_500_000_000));
    insta::assert_snapshot!(Answer::of(plan, Pool::Shared).to_text(Style::PLAIN));
}

#[test]
fn the_json_interface() {
    let plan = estimate(&PlanInput { budget_bytes: Some(8 << 30), ..input("llama2:7b", Method::Qlora) });
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["reference"]["gb"], 5);
    assert_eq!(json["reference"]["formula"], "ceil(0.65 · 6.738)");
    assert_eq!(json["method"], "qlora");
    assert!(json["estimate"]["peak_bytes"].as_u64().unwrap() > 4_000_000_000);
    assert!(json["estimate"]["terms"][0]["name"].is_string());
    assert_eq!(json["estimate"]["basis"], "detailed");
    assert_eq!(json["fits"], true);
    let rough = rough("7b".into(), reference::reference(Method::Qlora, 4, 7_000_000_000, true), None);
    let json = serde_json::to_value(&rough).unwrap();
    assert_eq!(
        (&json["reference"]["gb"], &json["estimate"]["peak_bytes"]),
        (&5.into(), &5_000_000_000u64.into())
    );
    assert!(json["fits"].is_null());
}

#[test]
fn exact_terms_are_exact() {
    let plan = estimate(&input("llama3.1:8b", Method::Qlora));
    let trained = 2_621_440 * 16;
    assert_eq!(plan.estimate.trainable_parameters, Some(trained));
    assert_eq!(bytes(&plan, "adapters"), 4 * trained);
    assert_eq!(bytes(&plan, "optimizer state"), 8 * trained);
    assert_eq!(bytes(&plan, "gradients"), 4 * trained);
    assert_eq!(bytes(&plan, "block inputs"), 32 * 2048 * 4096 * 4);
    // 6.98 B linears in NF4 with double quantisation, 2 × 525 M in 16 bits, norms in 32.
    let nf4 = 6_979_321_856 / 2 + 6_979_321_856 / 64 + 4 * (6_979_321_856 / 64 / 256 + 1);
    assert_eq!(bytes(&plan, "base weights"), nf4 + 2 * 2 * 525_336_576 + 4 * 266_240);
}

/// Every term whose bytes can be counted, by hand, for SmolLM2-135M: d 576, f 1536, 9 and 3 heads of 64, 30 blocks.
#[test]
fn counted_terms_are_equal_to_a_count_by_hand() {
    let bf16 = PlanInput { dtype: Dtype::Bf16, sequence_len: 512, ..input("smollm2:135m", Method::Qlora) };
    let plan = estimate(&bf16);
    let trained = 305_280 * 16;
    assert_eq!(bytes(&plan, "gradients of a block"), 4 * trained / 30);
    assert_eq!(bytes(&plan, "rotary table"), 512 * 64 * 4);
    assert_eq!(bytes(&plan, "hidden states of the loss"), 4 * 512 * 576 * 4);
    // 256 positions at a time: two bytes a logit, and a maximum and a sum for each 32.
    assert_eq!(bytes(&plan, "logits"), 256 * (49_152 * 2 + 49_152 / 32 * 8));
    // x̂ twice, q, k, v, o, gate and up in 16 bits, seven x Aᵀ of 16; 9 heads and two norms in 32.
    let saved = 2 * (2 * 576 + 2 * 576 + 2 * 192 + 2 * 1536 + 7 * 16) + 4 * (9 + 2);
    assert_eq!(bytes(&plan, "block activations"), 512 * saved);
    // dy and its rounded copy; silu(gate) ⊙ up again, d gate and d up.
    assert_eq!(bytes(&plan, "block gradients"), 512 * (4 * 576 + 2 * 576 + 2 * 3 * 1536));
    // Two threads: sums of 160 columns of the gradient of gate's and up's input, for which 3072 rows of weights are more than
    // this processor packs at once; packed weights; keys twice and values, gradients of keys and values in parts.
    let tile = 512 * 160 * 4 + ((384 + 24) << 10);
    assert_eq!(bytes(&plan, "task buffers"), 2 * (tile + 512 * 64 * 6 + 256 * 64 * 8));
    // One with tiles for bf16 packs them all, so 128 rows at a time have sums, of up to 320 columns.
    let with_tiles = Calibration { packed_bytes: 1 << 20, ..bf16.calibration };
    let tile = 128 * 320 * 4 + ((1024 + 24) << 10);
    assert_eq!(
        bytes(&estimate(&PlanInput { calibration: with_tiles, ..bf16.clone() }), "task buffers"),
        2 * (tile + 512 * 64 * 6 + 256 * 64 * 8)
    );

    let f32 = estimate(&PlanInput { dtype: Dtype::F32, ..bf16.clone() });
    assert_eq!(bytes(&f32, "logits"), 128 * 49_152 * 4);

    let short = estimate(&PlanInput {
        optimizer: Optimizer::Adamw8bit,
        gradient_dtype: Dtype::Bf16,
        block_input_dtype: Dtype::Bf16,
        ..bf16.clone()
    });
    // B of k and v has 3072 values, too few for 8 bits
    let small = 30 * 2 * 192 * 16;
    let large = trained - small;
    assert_eq!(bytes(&short, "optimizer state"), 2 * (large + 4 * large / 256 + 4 * small));
    assert_eq!(bytes(&short, "gradients"), 2 * trained);
    assert_eq!(bytes(&short, "block inputs"), 30 * 512 * 576 * 2);

    // What is known of the rows counts instead of what could be.
    let data = DataFacts { rows: 10, row_tokens: 3000, longest: 400, tokens: 400, targets: 100 };
    let known = estimate(&PlanInput { data: Some(data), ..bf16.clone() });
    assert_eq!(bytes(&known, "rows"), 10 * 96 + 3000 * 5);
    assert_eq!(bytes(&known, "block inputs"), 30 * 400 * 576 * 4);
    assert_eq!(bytes(&known, "hidden states of the loss"), (400 + 3 * 100) * 576 * 4);
    assert_eq!(bytes(&known, "logits"), 100 * (49_152 * 2 + 49_152 / 32 * 8));

    // All weights: three more matrices for each, the head's gradient beside them.
    let full = estimate(&PlanInput { method: Method::Full, ..bf16 });
    assert_eq!(bytes(&full, "weights"), 4 * 134_515_008);
    assert_eq!(bytes(&full, "optimizer state"), 8 * 134_515_008);
    assert_eq!(bytes(&full, "gradient of the head"), 4 * 28_311_552);
    assert_eq!(bytes(&full, "transposed logits"), 256 * 49_152 * 2);
}

/// Without accumulation the gradients of the upper blocks come while the inputs of the lower ones go.
#[test]
fn gradients_and_block_inputs_share_their_room_without_accumulation() {
    let once = PlanInput { gradient_accumulation_steps: 1, ..input("smollm2:135m", Method::Qlora) };
    let plan = estimate(&once);
    let block = plan.estimate.phases.iter().find(|phase| phase.name == "block").unwrap();
    assert!(
        block.terms.iter().any(|term| term == "block inputs")
            && !block.terms.iter().any(|term| term == "gradients")
    );
    let more = estimate(&PlanInput { gradient_accumulation_steps: 2, ..once });
    let block = more.estimate.phases.iter().find(|phase| phase.name == "block").unwrap();
    assert!(
        block.terms.iter().any(|term| term == "block inputs")
            && block.terms.iter().any(|term| term == "gradients")
    );
}

#[test]
fn a_large_vocabulary_is_most_while_it_is_read() {
    let mut small = input("smollm2:135m", Method::Lora);
    small.shape.num_hidden_layers = 1;
    small.shape.hidden_size = 32;
    small.shape.vocab_size = 1_000_000;
    small.weights.held = 1_000_000;
    small.sequence_len = 8;
    small.weights.has_json_tokenizer = true;
    let plan = estimate(&small);
    assert_eq!(plan.estimate.peak_phase.as_deref(), Some("load"));
    assert_eq!(bytes(&plan, "tokenizer while read"), 1_000_000 * FLEX.bytes_per_entry_of_json);
}

#[test]
fn adapters_on_the_upper_blocks_only_need_less() {
    let all = estimate(&input("smollm2:135m", Method::Qlora));
    let upper =
        PlanInput { layers: Layers::Only((22..30).collect()), ..input("smollm2:135m", Method::Qlora) };
    let upper = estimate(&upper);
    assert_eq!(bytes(&upper, "block inputs") * 30, bytes(&all, "block inputs") * 8);
    assert_eq!(bytes(&upper, "adapters") * 30, bytes(&all, "adapters") * 8);
    let attention = PlanInput {
        target_modules: TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]),
        ..input("smollm2:135m", Method::Qlora)
    };
    assert!(bytes(&estimate(&attention), "block activations") < bytes(&all, "block activations"));
}

fn any_input() -> impl Strategy<Value = PlanInput> {
    let models = tune_plan::catalogue()
        .iter()
        .filter(|model| model.shape().is_some())
        .map(|model| model.alias.as_str())
        .collect::<Vec<_>>();
    let method = prop_oneof![Just(Method::Lora), Just(Method::Qlora), Just(Method::Full)];
    (prop::sample::select(models), method, 1..256u64, 1..8192u64, 1..64u64, 1..64u64, 0..40u64, any::<bool>())
        .prop_map(
            |(
                alias,
                method,
                rank,
                sequence_len,
                micro_batch_size,
                gradient_accumulation_steps,
                kept_blocks,
                bf16,
            )| {
                PlanInput {
                    rank,
                    sequence_len,
                    micro_batch_size,
                    gradient_accumulation_steps,
                    kept_blocks,
                    dtype: if bf16 { Dtype::Bf16 } else { Dtype::F32 },
                    ..input(alias, method)
                }
            },
        )
}

proptest! {
    /// More of anything never needs less memory.
    #[test]
    fn the_peak_is_monotonic(small in any_input(), more in 1..100u64) {
        let peak = |input: &PlanInput| estimate(input).estimate.peak_bytes;
        let before = peak(&small);
        let mut larger = Vec::new();
        let mut change = |change: &dyn Fn(&mut PlanInput)| {
            let mut input = small.clone();
            change(&mut input);
            larger.push(input);
        };
        change(&|i| i.rank += more);
        change(&|i| i.sequence_len += more);
        change(&|i| i.micro_batch_size += more);
        // The first kept block costs what one that is made again does, and the last saves all inputs.
        change(&|i| {
            if i.kept_blocks > 0 && i.kept_blocks + more < i.shape.num_hidden_layers {
                i.kept_blocks += more;
            }
        });
        change(&|i| i.dropout |= i.method != Method::Full);
        change(&|i| i.gradient_accumulation_steps += more);
        change(&|i| i.shape.vocab_size += more * 1000);
        change(&|i| i.shape.num_hidden_layers += more);
        change(&|i| i.weights.held += more * 1_000_000);
        for input in larger {
            prop_assert!(peak(&input) >= before, "{input:?}");
        }
    }

    /// The range contains the estimate, the phases contain the peak, and the verdict follows the range.
    #[test]
    fn a_plan_agrees_with_itself(input in any_input(), budget in 1..200_000_000_000u64) {
        let plan = estimate(&PlanInput { budget_bytes: Some(budget), ..input });
        let e = &plan.estimate;
        prop_assert!(e.upper_bytes >= e.peak_bytes);
        prop_assert_eq!(e.phases.iter().map(|p| p.bytes).max(), Some(e.peak_bytes));
        prop_assert_eq!(plan.fits, Some(e.upper_bytes <= budget));
        for phase in &e.phases {
            let sum: u64 = phase.terms.iter().map(|name| bytes(&plan, name)).sum();
            prop_assert!(phase.bytes >= sum);
        }
    }

    /// Absurd numbers stop at the largest one.
    #[test]
    fn nothing_overflows(sequence_len: u64, micro_batch_size: u64) {
        let plan = estimate(&PlanInput { sequence_len, micro_batch_size, ..input("smollm2:135m", Method::Lora) });
        prop_assert!(plan.estimate.peak_bytes > 0);
    }
}

/// Blocks with dropout compute in 32 bits and keep two values for each input of an adapter.
#[test]
fn dropout_needs_several_times_the_activations() {
    let plain = PlanInput { dtype: Dtype::Bf16, kept_blocks: 30, ..input("smollm2:135m", Method::Qlora) };
    let dropout = PlanInput { dropout: true, ..plain.clone() };
    let activations = |input: &PlanInput| bytes(&estimate(input), "activations");
    assert!(activations(&dropout) > 5 * activations(&plain));
    let in_f32 = PlanInput { dtype: Dtype::F32, ..dropout.clone() };
    assert_eq!(activations(&in_f32), activations(&dropout));
    // the loss stays in 16 bits, so threads keep buffers for both
    let buffers = |input: &PlanInput| bytes(&estimate(input), "task buffers");
    assert_eq!(buffers(&dropout), buffers(&plain) + buffers(&in_f32));
}

#[test]
fn checkpointing_saves_memory_in_every_catalogue_model() {
    for model in tune_plan::catalogue().iter().filter(|model| model.shape().is_some()) {
        let with = input(&model.alias, Method::Qlora);
        let without = PlanInput { kept_blocks: u64::MAX, ..with.clone() };
        let (with, without) = (estimate(&with).estimate.peak_bytes, estimate(&without).estimate.peak_bytes);
        assert!(with < without, "{}", model.alias);
    }
}
