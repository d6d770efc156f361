//! Ten optimizer steps, equal to those of PEFT and torch in float32 from the same adapter and batches.
//!
//! Fixtures and tolerances: `tests/parity/README.md`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use safetensors::SafeTensors;
use serde::Deserialize;
use tune_data::MicroBatch;
use tune_formats::peft;
use tune_models::{Llama, Quantization};
use tune_train::{AdamW, AdamWConfig, clip_grad_norm, loss_and_gradients, parameters};

#[derive(Deserialize)]
struct Run {
    optimizer: Optimizer,
    max_grad_norm: Option<f64>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Optimizer {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct Step {
    loss: f64,
    grad_norm: f64,
    trained_tokens: usize,
    micro_batches: Vec<Vec<Document>>,
}

#[derive(Deserialize)]
struct Document {
    input_ids: Vec<u32>,
    /// Not shifted: the label of a position is its own id, or -100.
    labels: Vec<i32>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

fn model() -> Llama {
    let base = tune_formats::open(&fixtures().join("models/llama-tied")).expect("fixture model opens");
    let mut model =
        tune_models::load(&base, Quantization::Keep, &Device::flex()).expect("fixture model loads");
    let initial = peft::read(&fixtures().join("peft/initial")).expect("initial adapter");
    model.attach_weights(&initial, 0.0).expect("adapter fits");
    model
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

/// Tensors of a safetensors file under their PEFT names.
fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(path).expect("fixture tensors");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let values = |data: &[u8]| {
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
    };
    file.tensors().into_iter().map(|(name, view)| (name, values(view.data()))).collect()
}

fn values(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

fn assert_relative(what: &str, got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-4 * want.abs(), "{what}: got {got}, want {want}, tolerance 1e-4");
}

/// Compares every tensor, with a tolerance relative to its largest entry or absolute.
fn assert_tensors(what: &str, got: &[(String, Vec<f32>)], want: &BTreeMap<String, Vec<f32>>, relative: bool) {
    assert_eq!(got.len(), want.len(), "{what}: number of tensors");
    for (name, got) in got {
        let want = &want[&format!("base_model.model.{name}")];
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        let tolerance = if relative { 1e-4 * largest } else { 1e-4 };
        for (at, (g, w)) in got.iter().zip(want).enumerate() {
            assert!(
                (g - w).abs() <= tolerance,
                "{what} {name}[{at}]: got {g}, want {w}, tolerance {tolerance}"
            );
        }
    }
}

fn ten_steps(name: &str, kept_blocks: usize) {
    let folder = fixtures().join("peft").join(name);
    let run: Run =
        serde_json::from_slice(&fs::read(folder.join("run.json")).expect("run.json")).expect("valid");
    assert_eq!(run.steps.len(), 10);
    let mut model = model();
    let config = AdamWConfig {
        beta1: run.optimizer.betas[0],
        beta2: run.optimizer.betas[1],
        epsilon: run.optimizer.eps,
        weight_decay: run.optimizer.weight_decay,
    };
    let mut adam = AdamW::new(config, parameters(&mut model).iter().map(|(_, parameter)| &**parameter));

    for (number, step) in run.steps.iter().enumerate() {
        let scale = 1.0 / step.trained_tokens as f64;
        let (mut loss, mut sum) = (0.0, Vec::<Tensor<2>>::new());
        for documents in &step.micro_batches {
            let (part, gradients) =
                loss_and_gradients(&model, &micro_batch(documents), scale, kept_blocks, None);
            loss += part;
            if sum.is_empty() {
                sum = gradients;
            } else {
                sum.iter_mut().zip(gradients).for_each(|(total, g)| *total = total.clone() + g);
            }
        }
        assert_relative(&format!("loss of step {}", number + 1), loss, step.loss);
        if number == 0 {
            let names = parameters(&mut model).into_iter().map(|(name, _)| name);
            let named: Vec<_> = names.zip(sum.iter().map(values)).collect();
            assert_tensors("gradient", &named, &tensors(&folder.join("gradients.safetensors")), true);
        }
        let norm = clip_grad_norm(&mut sum, run.max_grad_norm.unwrap_or(0.0));
        assert_relative(&format!("gradient norm of step {}", number + 1), norm, step.grad_norm);
        let parameters = parameters(&mut model).into_iter().map(|(_, parameter)| parameter).collect();
        adam.step(run.optimizer.lr, parameters, sum);
    }

    let last: Vec<_> = parameters(&mut model).into_iter().map(|(name, p)| (name, values(p))).collect();
    assert_tensors("final", &last, &tensors(&folder.join("final/adapter_model.safetensors")), false);
}

#[test]
fn ten_plain_steps_equal_peft() {
    ten_steps("plain", 0);
}

#[test]
fn ten_clipped_accumulated_steps_equal_peft() {
    ten_steps("clipped", 0);
}

#[test]
fn however_many_blocks_keep_their_graph_the_steps_are_the_same() {
    for kept_blocks in [1, usize::MAX] {
        ten_steps("plain", kept_blocks);
    }
}
