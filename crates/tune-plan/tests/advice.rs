//! What advice must hold for every run: it fits, it is the least that does, and it is read back as it was written.

use proptest::prelude::*;
use tune_plan::advice::{Change, Limit, Question};
use tune_plan::gap::Gap;
use tune_plan::memory::Pool;
use tune_plan::picture::bars;
use tune_plan::{Answer, PlanInput, Shape, Style, estimate, find_in_catalogue, from_shape, in_bits};
use tune_recipe::{Dtype, Method};

fn question(alias: &str, method: Method, budget: u64) -> Question {
    let model = find_in_catalogue(alias).expect("in the catalogue");
    let shape = model.shape().expect("a plain decoder");
    let input = PlanInput {
        micro_batch_size: 4,
        gradient_accumulation_steps: 4,
        dtype: Dtype::Bf16,
        kept_blocks: shape.num_hidden_layers,
        budget_bytes: Some(budget),
        ..PlanInput::of(model.name.clone(), shape, from_shape(&shape, method), method)
    };
    Question {
        four_bit: Some(in_bits(&shape, 4)),
        context: Some(model.context),
        layers_may_change: true,
        model_may_change: true,
        ..Question::about(input, Pool::Shared)
    }
}

const GIB: u64 = 1 << 30;

#[test]
fn what_changes_no_result_comes_first() {
    // An 8B model with all activations kept needs far more than 12 GiB; without them it fits.
    let question = question("llama3.1:8b", Method::Qlora, 12 * GIB);
    let ways = question.ways();
    assert_eq!(ways[0].changes[0], Change::GradientCheckpointing, "{ways:?}");
    let harmless =
        |change: &Change| matches!(change, Change::GradientCheckpointing | Change::MicroBatch { .. });
    assert!(ways[0].changes.iter().all(harmless), "{ways:?}");
    assert_eq!(ways[0].settings[0], "train.gradient_checkpointing=true");
    assert!(ways.iter().all(|way| way.needed_bytes <= 12 * GIB));
}

#[test]
fn the_effective_batch_and_the_scale_stay() {
    let mut question = question("smollm2:135m", Method::Qlora, GIB / 3);
    question.lora_alpha = Some(64.0);
    for way in question.ways() {
        for change in &way.changes {
            match change {
                Change::MicroBatch { micro_batch_size, gradient_accumulation_steps } => {
                    assert_eq!(micro_batch_size * gradient_accumulation_steps, 16);
                }
                Change::Rank { r, lora_alpha } => assert_eq!(*lora_alpha, Some(4.0 * *r as f64)),
                _ => {}
            }
        }
    }
}

#[test]
fn nothing_is_changed_that_need_not_be() {
    for budget in [GIB / 4, GIB / 2, GIB, 2 * GIB, 4 * GIB, 6 * GIB] {
        for (alias, method) in
            [("smollm2:135m", Method::Qlora), ("llama3.2:1b", Method::Lora), ("smollm2:360m", Method::Full)]
        {
            let question = question(alias, method, budget);
            let Some(way) = question.ways().into_iter().next() else { continue };
            for i in 0..way.changes.len() {
                let mut fewer = way.changes.clone();
                fewer.remove(i);
                let left_out = question.with(&fewer).plan();
                assert_eq!(left_out.fits, Some(false), "{alias} in {budget}: {:?} without {i}", way.changes);
            }
        }
    }
}

#[test]
fn a_run_that_fits_hears_how_far_it_can_grow() {
    let question = question("smollm2:135m", Method::Qlora, 64 * GIB);
    assert!(question.ways().is_empty());
    let room = question.room();
    let names: Vec<_> = room.iter().map(|room| room.name.as_str()).collect();
    assert_eq!(names, ["sequence_len", "micro_batch_size", "r"]);
    assert_eq!((room[0].most, room[0].limit), (8192, Limit::Context));
    assert_eq!((room[2].most, room[2].limit), (4096, Limit::Option));
    let mut grown = question.clone();
    grown.input.micro_batch_size = room[1].most;
    assert_eq!(grown.plan().fits, Some(true));
    grown.input.micro_batch_size += 1;
    assert_eq!((grown.plan().fits, room[1].limit), (Some(false), Limit::Memory));
}

#[test]
fn a_card_holds_what_is_not_on_the_host() {
    let shared = question("llama3.1:8b", Method::Qlora, 8 * GIB);
    let card = Question { pool: Pool::Device, ..shared.clone() };
    let (shared, card) = (Answer::to(&shared, None, Vec::new()), Answer::to(&card, None, Vec::new()));
    assert_eq!(shared.memory.host_bytes, 0);
    assert!(card.memory.host_bytes > 0);
    // a margin of 5 % for all of it, where the processor's is only for what is not exact
    let on_card = card.plan.estimate.peak_bytes - card.memory.host_bytes;
    assert_eq!(card.memory.needed_bytes, on_card + on_card / 20);
    assert!(card.to_text(Style::PLAIN).contains("on the host"));
}

/// Any question, with numbers that people would write and some that they would not.
fn any_question() -> impl Strategy<Value = Question> {
    let models = vec!["smollm2:135m", "llama3.2:1b", "llama2:7b", "qwen2.5:0.5b", "llama2:70b"];
    let method = prop_oneof![Just(Method::Lora), Just(Method::Qlora), Just(Method::Full)];
    let sizes = (1..300u64, 1..40_000u64, 1..65u64, 1..65u64, 0..90u64);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (prop::sample::select(models), method, sizes, flags, 20_000_000..200_000_000_000u64).prop_map(
        |(alias, method, (rank, sequence_len, micro, accumulation, kept), flags, budget)| {
            let mut question = question(alias, method, budget);
            let input = &mut question.input;
            (input.rank, input.sequence_len, input.micro_batch_size) = (rank, sequence_len, micro);
            (input.gradient_accumulation_steps, input.kept_blocks) = (accumulation, kept);
            let (bf16, dropout, keeps_what_fits, model_may_change, card) = flags;
            input.dtype = if bf16 { Dtype::Bf16 } else { Dtype::F32 };
            input.dropout = dropout && method != Method::Full;
            Question {
                keeps_what_fits,
                model_may_change,
                pool: if card { Pool::Device } else { Pool::Shared },
                ..question
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is advised fits when it is counted again, and advice comes exactly when it is needed.
    #[test]
    fn advice_always_fits(question in any_question()) {
        let fits = question.plan().fits;
        let (ways, room) = (question.ways(), question.room());
        prop_assert!(fits == Some(false) || ways.is_empty());
        prop_assert_eq!(fits == Some(true), !room.is_empty());
        for way in &ways {
            let plan = question.with(&way.changes).plan();
            prop_assert_eq!(plan.fits, Some(true), "{:?}", way);
            prop_assert!(way.needed_bytes <= question.input.budget_bytes.unwrap());
        }
        for room in &room {
            prop_assert!(room.most >= room.now);
        }
    }

    /// JSON gives back the same answer; text, bars and gap agree with it at any width.
    #[test]
    fn answers_round_trip_and_print(question in any_question(), width in 0..200usize) {
        let answer = Answer::to(&question, Some("a device".into()), Vec::new());
        let json = serde_json::to_string(&answer).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Answer>(&json).unwrap(), &answer);
        let text = answer.to_text(Style { width, ..Style::PLAIN });
        prop_assert!(text.contains("may use"));
        let gap = Gap::of(&answer.plan).unwrap();
        prop_assert_eq!(gap.causes.iter().map(|cause| cause.bytes).sum::<i64>(), gap.bytes);
        let estimated: u64 = gap.rows.iter().map(|row| row.estimate_bytes).sum();
        prop_assert_eq!(estimated, answer.plan.estimate.peak_bytes);
        for bar in bars(&answer.plan, question.pool) {
            prop_assert_eq!(bar.parts.iter().map(|(_, bytes)| bytes).sum::<u64>(), bar.bytes);
        }
    }

    /// Numbers that no model has stop at the largest one.
    #[test]
    fn nothing_overflows(
        dims in prop::array::uniform7(any::<u32>()),
        sequence_len: u64, micro_batch_size: u64, accumulation: u64, rank: u64, budget: u64, tied: bool
    ) {
        let [vocab, d, f, layers, heads, kv_heads, head_dim] = dims.map(u64::from);
        let shape = Shape {
            vocab_size: vocab, hidden_size: d, intermediate_size: f, num_hidden_layers: layers,
            num_attention_heads: heads, num_key_value_heads: kv_heads, head_dim, tied,
            attention_bias: true, qk_norm: true,
        };
        for method in [Method::Full, Method::Lora, Method::Qlora] {
            let mut question = question("smollm2:135m", method, budget.max(1));
            question.input = PlanInput {
                shape, weights: from_shape(&shape, method), sequence_len, micro_batch_size, rank,
                gradient_accumulation_steps: accumulation, kept_blocks: layers / 2, ..question.input
            };
            let plan = estimate(&question.input);
            prop_assert!(plan.estimate.upper_bytes >= plan.estimate.peak_bytes);
            prop_assert!(Gap::of(&plan).is_some());
            let text = Answer::of(plan, Pool::Shared).to_text(Style::PLAIN);
            prop_assert!(!text.is_empty());
        }
    }
}
