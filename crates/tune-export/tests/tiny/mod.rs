//! The tiny models of `tests/parity`, and adapters for them.
#![allow(dead_code, unreachable_pub)] // each test takes what it needs

use std::collections::BTreeMap;
use std::path::PathBuf;

use tune_formats::peft::{Adapter, AdapterConfig, LoraWeights};
use tune_formats::{BaseModel, ModelConfig};

pub const RANK: usize = 4;

pub fn models() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models")
}

pub fn base(model: &str) -> BaseModel {
    tune_formats::open(&models().join(model)).unwrap_or_else(|error| panic!("{model}: {error}"))
}

/// An adapter of all linear layers whose updates are a few percent of the weights.
pub fn adapter(config: &ModelConfig) -> Adapter {
    let mut layers = BTreeMap::new();
    for layer in 0..config.num_hidden_layers {
        for (i, (name, d_out, d_in)) in config.block_linears().into_iter().enumerate() {
            layers.insert(ModelConfig::linear_path(layer, name), lora(7 * layer + i, d_out, d_in));
        }
    }
    let config = AdapterConfig { r: RANK, lora_alpha: 8.0, ..AdapterConfig::default() };
    let target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    Adapter {
        config: AdapterConfig { target_modules: target_modules.map(str::to_owned).into(), ..config },
        layers,
    }
}

pub fn lora(seed: usize, d_out: usize, d_in: usize) -> LoraWeights {
    let wave = |n: usize, step: f32| {
        (0..n).map(|i| 0.02 * ((i + 13 * seed) as f32 * step).sin()).collect::<Vec<f32>>()
    };
    LoraWeights { r: RANK, d_in, d_out, a: wave(RANK * d_in, 0.7).into(), b: wave(d_out * RANK, 1.3).into() }
}

pub fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary directory")
}
