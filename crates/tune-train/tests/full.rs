//! Gradients of all weights of a model: against differences of the loss, and the fast paths against the plain one.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use tune_data::MicroBatch;
use tune_kernels::Arithmetic;
use tune_models::{Llama, Quantization};
use tune_train::{GradientSum, loss_and_gradients, parameters};

/// A fixture model of which every weight is trained.
fn model(name: &str) -> Llama {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models").join(name);
    let base = tune_formats::open(&path).expect("fixture model opens");
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
            let mut moved = |by: f64| {
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
            assert!(relative < 2e-2, "{name}: relative error {relative}");
        }
        let (_, kept) = of(&fast, usize::MAX);
        assert!(got.iter().zip(&kept).all(|(a, b)| values(a) == values(b)), "blocks that keep their graph");
    }
}

#[test]
fn gradients_of_micro_batches_add_up() {
    for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
        let model = model("llama-tied").with_arithmetic(arithmetic);
        let mut sum = GradientSum::default();
        let mut apart = Vec::new();
        for seed in [3, 8] {
            sum.add(&model, &batch(seed), 0.1, 0, None);
            apart.push(loss_and_gradients(&model, &batch(seed), 0.1, 0, None).1);
        }
        for (i, sum) in sum.into_gradients().iter().enumerate() {
            let want = values(&(apart[0][i].clone() + apart[1][i].clone()));
            let difference: Vec<f32> = values(sum).iter().zip(&want).map(|(a, b)| a - b).collect();
            assert!(norm(&difference) <= 1e-5 * norm(&want), "parameter {i}");
        }
    }
}
