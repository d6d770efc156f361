//! The training runs of `tests/parity/peft`, and the same steps taken by `tune`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use safetensors::SafeTensors;
use serde::Deserialize;
use tune_data::MicroBatch;
use tune_formats::peft;
use tune_kernels::Arithmetic;
use tune_models::{Llama, Quantization};
use tune_train::{AdamW, AdamWConfig, clip_grad_norm, loss_and_gradients, parameters};

/// What PEFT did in `float32`.
#[derive(Deserialize)]
pub(crate) struct Run {
    optimizer: Optimizer,
    max_grad_norm: Option<f64>,
    /// Ten of them.
    pub(crate) steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Optimizer {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
pub(crate) struct Step {
    pub(crate) loss: f64,
    pub(crate) grad_norm: f64,
    trained_tokens: usize,
    micro_batches: Vec<Vec<Document>>,
}

#[derive(Deserialize)]
struct Document {
    input_ids: Vec<u32>,
    /// Not shifted: the label of a position is its own id, or -100.
    labels: Vec<i32>,
}

/// Tensors under their names in a PEFT file.
pub(crate) type Tensors = BTreeMap<String, Vec<f32>>;

/// What `tune` did with the steps of a run.
#[derive(PartialEq)]
pub(crate) struct Taken {
    pub(crate) losses: Vec<f64>,
    pub(crate) grad_norms: Vec<f64>,
    /// Of the first step, before clipping.
    pub(crate) gradients: Tensors,
    pub(crate) adapter: Tensors,
}

impl Run {
    pub(crate) fn read(name: &str) -> Self {
        let run: Self = serde_json::from_slice(&fs::read(folder(name).join("run.json")).expect("run.json"))
            .expect("valid");
        assert_eq!(run.steps.len(), 10);
        run
    }

    /// Trains the initial adapter; the last `kept_blocks` blocks keep their graph.
    pub(crate) fn take(&self, arithmetic: Arithmetic, kept_blocks: usize) -> Taken {
        let mut model = model(arithmetic);
        let config = AdamWConfig {
            beta1: self.optimizer.betas[0],
            beta2: self.optimizer.betas[1],
            epsilon: self.optimizer.eps,
            weight_decay: self.optimizer.weight_decay,
        };
        let mut adam = AdamW::new(config, parameters(&mut model).iter().map(|(_, parameter)| &**parameter));
        let (mut losses, mut grad_norms, mut gradients) = (Vec::new(), Vec::new(), None);
        for step in &self.steps {
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
            gradients.get_or_insert_with(|| named(&mut model, &sum));
            losses.push(loss);
            grad_norms.push(clip_grad_norm(&mut sum, self.max_grad_norm.unwrap_or(0.0)));
            let parameters = parameters(&mut model).into_iter().map(|(_, parameter)| parameter).collect();
            adam.step(self.optimizer.lr, parameters, sum);
        }
        let adapter: Vec<_> = parameters(&mut model).into_iter().map(|(_, p)| p.clone()).collect();
        let adapter = named(&mut model, &adapter);
        Taken { losses, grad_norms, gradients: gradients.expect("a first step"), adapter }
    }
}

/// Folder of a run.
pub(crate) fn folder(run: &str) -> PathBuf {
    fixtures().join("peft").join(run)
}

/// Reads a safetensors file of `float32`.
pub(crate) fn tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).expect("fixture tensors");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let values = |data: &[u8]| {
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
    };
    file.tensors().into_iter().map(|(name, view)| (name, values(view.data()))).collect()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity")
}

fn model(arithmetic: Arithmetic) -> Llama {
    let base = tune_formats::open(&fixtures().join("models/llama-tied")).expect("fixture model opens");
    let model = tune_models::load(&base, Quantization::Keep, &Device::flex()).expect("fixture model loads");
    let mut model = model.with_arithmetic(arithmetic);
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

fn named(model: &mut Llama, tensors: &[Tensor<2>]) -> Tensors {
    let names = parameters(model).into_iter().map(|(name, _)| format!("base_model.model.{name}"));
    names.zip(tensors).map(|(name, tensor)| (name, tensor.to_data().iter::<f32>().collect())).collect()
}
