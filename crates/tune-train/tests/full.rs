//! Training of all weights of a model: gradients against differences of the loss and against the plain path, and ten
//! steps against torch.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use serde::Deserialize;
use tune_data::MicroBatch;
use tune_kernels::Arithmetic;
use tune_models::{Llama, Quantization};
use tune_train::{AdamW, AdamWConfig, GradientSum, Pass, clip_grad_norm, loss_and_gradients, parameters};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

/// A fixture model of which every weight is trained.
fn model(name: &str) -> Llama {
    let base = tune_formats::open(&fixtures().join("models").join(name)).expect("fixture model opens");
    let mut model =
        tune_models::load(&base, Quantization::Keep, &Device::flex()).expect("fixture model loads");
    model.unfreeze();
    model
}

/// Two documents, some of whose tokens occur twice.
fn batch(seed: u32) -> MicroBatch {
    let ids: Vec<u32> = (0..40).map(|i| 10 + (seed + i * i * 7) % 90).collect();
    let targets =
        ids.iter().enumerate().map(|(i, id)| if i % 4 == 0 { -100 } else { (*id as i32 * 3) % 200 });
    MicroBatch { targets: targets.collect(), input_ids: ids, documents: vec![0..25, 25..40] }
}

fn values(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
}

#[test]
fn every_parameter_has_the_gradient_that_the_loss_shows() {
    for name in ["llama-tied", "llama-untied-bf16-sharded"] {
        let mut model = model(name);
        let batch = batch(3);
        let loss = |model: &Llama| loss_and_gradients(model, &batch, 1.0, 0, None).0;
        let (_, gradients) = loss_and_gradients(&model, &batch, 1.0, usize::MAX, None);
        let names: Vec<String> = parameters(&mut model).into_iter().map(|(name, _)| name).collect();
        assert_eq!(gradients.len(), names.len());
        assert_eq!(names.iter().any(|name| name == "lm_head.weight"), name != "llama-tied");
        for (at, (name, gradient)) in names.iter().zip(&gradients).enumerate() {
            let gradient = values(gradient);
            let size = norm(&gradient);
            let moved = |by: f64| {
                let mut model = model.clone();
                let parameter = parameters(&mut model).remove(at).1;
                let step = gradient.iter().map(|g| (by * f64::from(*g) / size) as f32);
                let step = TensorData::new(step.collect::<Vec<f32>>(), parameter.dims());
                *parameter = parameter.clone() + Tensor::from_data(step, &parameter.device());
                loss(&model)
            };
            let slope = (moved(0.01) - moved(-0.01)) / 0.02;
            assert!(
                (slope - size).abs() < 0.02 * size,
                "{name}: the loss rises by {slope}, its gradient is {size}"
            );
        }
    }
}

/// How far a gradient of torch's own bfloat16 lies from that of its float32, on this model and batch.
const OF_TORCH: f64 = 0.062;

#[test]
fn arithmetic_in_bf16_gives_the_same_gradients_but_for_rounding() {
    for name in ["llama-tied", "llama-untied-bf16-sharded"] {
        let mut model = model(name);
        let names: Vec<String> = parameters(&mut model).into_iter().map(|(name, _)| name).collect();
        let of = |model: &Llama, kept| loss_and_gradients(model, &batch(3), 0.1, kept, None);
        let (want_loss, want) = of(&model, 0);
        let fast = model.with_arithmetic(Arithmetic::Bf16);
        let (loss, got) = of(&fast, 0);
        assert!((loss - want_loss).abs() < 5e-3 * want_loss, "{loss}, in f32 {want_loss}");
        for ((name, got), want) in names.iter().zip(&got).zip(&want) {
            let (got, want) = (values(got), values(want));
            let difference: Vec<f32> = got.iter().zip(&want).map(|(a, b)| a - b).collect();
            let relative = norm(&difference) / norm(&want);
            assert!(relative < OF_TORCH, "{name}: relative error {relative}");
        }
        let (_, kept) = of(&fast, usize::MAX);
        assert!(got.iter().zip(&kept).all(|(a, b)| values(a) == values(b)), "blocks that keep their graph");
    }
}

/// A `bf16` is at most 0.2 % off: the input of each block, and each sum. Where the factors of products are rounded as
/// well, other inputs are rounded to other factors.
#[test]
fn inputs_and_sums_in_16_bits_move_gradients_by_less_than_a_percent() {
    for (arithmetic, most) in [(Arithmetic::F32, 0.005), (Arithmetic::Bf16, 0.01)] {
        let model = model("llama-untied-bf16-sharded").with_arithmetic(arithmetic);
        let of = |pass: Pass| {
            let mut sum = GradientSum::default();
            let loss = sum.add(&model, &batch(3), &pass, &mut |_| ControlFlow::Continue(())).expect("a loss");
            let gradients: Vec<f32> = sum
                .into_gradients()
                .iter()
                .flat_map(|gradient| gradient.to_data().iter::<f32>().collect::<Vec<_>>())
                .collect();
            (loss, gradients)
        };
        let plain = Pass::new(0.1, 0);
        let (want_loss, want) = of(plain);
        for short in [
            Pass { block_input_dtype: FloatDType::BF16, ..plain },
            Pass { gradient_dtype: FloatDType::BF16, ..plain },
        ] {
            let (loss, got) = of(short);
            assert_eq!(loss.to_bits(), want_loss.to_bits(), "{short:?}");
            let difference: Vec<f32> = got.iter().zip(&want).map(|(a, b)| a - b).collect();
            let relative = norm(&difference) / norm(&want);
            assert!(relative > 0.0 && relative < most, "{arithmetic:?} {short:?}: relative error {relative}");
        }
    }
}

#[test]
fn gradients_of_micro_batches_add_up() {
    for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
        let model = model("llama-tied").with_arithmetic(arithmetic);
        let mut sum = GradientSum::default();
        let mut apart = Vec::new();
        for seed in [3, 8] {
            sum.add(&model, &batch(seed), &Pass::new(0.1, 0), &mut |_| ControlFlow::Continue(()))
                .expect("a loss");
            apart.push(loss_and_gradients(&model, &batch(seed), 0.1, 0, None).1);
        }
        for (i, sum) in sum.into_gradients().iter().enumerate() {
            let want = values(&(apart[0][i].clone() + apart[1][i].clone()));
            let difference: Vec<f32> = values(sum).iter().zip(&want).map(|(a, b)| a - b).collect();
            assert!(norm(&difference) <= 1e-5 * norm(&want), "parameter {i}");
        }
    }
}

#[derive(Deserialize)]
struct Torch {
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    first_gradients: BTreeMap<String, f64>,
    changes: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct Batches {
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    trained_tokens: usize,
    micro_batches: Vec<Vec<Document>>,
}

#[derive(Deserialize)]
struct Document {
    input_ids: Vec<u32>,
    /// Not shifted: the label of a position is its own id, or -100.
    labels: Vec<i32>,
}

fn micro_batch(documents: &[Document]) -> MicroBatch {
    let mut batch = MicroBatch { input_ids: Vec::new(), targets: Vec::new(), documents: Vec::new() };
    for document in documents {
        let start = batch.input_ids.len();
        batch.input_ids.extend(&document.input_ids);
        batch.targets.extend(document.labels.iter().skip(1).chain([&-100]));
        batch.documents.push(start..batch.input_ids.len());
    }
    batch
}

fn assert_relative(what: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * want.abs(), "{what}: got {got}, want {want}");
}

#[test]
fn ten_clipped_accumulated_steps_equal_torch() {
    let read = |path: &str| fs::read(fixtures().join(path)).expect("fixture");
    let want: Torch = serde_json::from_slice(&read("full/run.json")).expect("valid");
    let batches: Batches = serde_json::from_slice(&read("peft/clipped/run.json")).expect("valid");
    let mut model = model("llama-tied");
    let start: Vec<Vec<f32>> = parameters(&mut model).into_iter().map(|(_, p)| values(p)).collect();
    let names: Vec<String> = parameters(&mut model).into_iter().map(|(name, _)| name).collect();
    let vectors = model.parameters_mut().iter().map(|parameter| parameter.is_vector).collect();
    let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    let mut adam =
        AdamW::new(config, parameters(&mut model).iter().map(|(_, p)| &**p)).without_decay_of(vectors);

    for (number, step) in batches.steps.iter().enumerate() {
        let mut sum = GradientSum::default();
        let scale = 1.0 / step.trained_tokens as f64;
        let mut add = |part| {
            sum.add(&model, &micro_batch(part), &Pass::new(scale, 0), &mut |_| ControlFlow::Continue(()))
        };
        let loss: f64 = step.micro_batches.iter().map(|part| add(part).expect("a loss")).sum();
        let mut gradients = sum.into_gradients();
        assert_relative(&format!("loss of step {}", number + 1), loss, want.losses[number], 1e-4);
        if number == 0 {
            assert_eq!(want.first_gradients.len(), names.len());
            for (name, gradient) in names.iter().zip(&gradients) {
                assert_relative(name, norm(&values(gradient)), want.first_gradients[name], 1e-4);
            }
        }
        let size = clip_grad_norm(&mut gradients, 1.0);
        assert_relative(
            &format!("gradient norm of step {}", number + 1),
            size,
            want.grad_norms[number],
            1e-3,
        );
        adam.step(1e-3, parameters(&mut model).into_iter().map(|(_, p)| p).collect(), gradients);
    }
    for ((name, parameter), start) in parameters(&mut model).into_iter().zip(&start) {
        let change: Vec<f32> = values(parameter).iter().zip(start).map(|(now, start)| now - start).collect();
        assert_relative(&format!("change of {name}"), norm(&change), want.changes[&name], 1e-3);
    }
}
