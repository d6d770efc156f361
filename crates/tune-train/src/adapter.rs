//! The adapters of a run: put in place, listed as parameters, and taken out as a PEFT adapter.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use tune_adapters::{LoraConfig, Targets};
use tune_formats::peft;
use tune_models::{Llama, ModelError};
use tune_recipe::{Layers, RunSpec, TargetModules};

use crate::TrainError;

/// Puts the adapters of the recipe beside the model's linear layers: fresh, or those of `init_adapter`.
pub fn adapt(model: &mut Llama, spec: &RunSpec) -> Result<(), TrainError> {
    if let Some(path) = &spec.adapter.init_adapter {
        model.attach_weights(&peft::read(path)?, spec.adapter.lora_dropout)?;
        return Ok(());
    }
    let modules = match &spec.adapter.target_modules {
        TargetModules::AllLinear => vec!["all-linear".to_string()],
        TargetModules::Names(names) => names.clone(),
    };
    let layers = match &spec.adapter.layers {
        Layers::All => None,
        Layers::Only(layers) => Some(layers.as_slice()),
    };
    let targets = Targets::new(&modules, layers, model.blocks().len()).map_err(ModelError::from)?;
    let config = LoraConfig {
        rank: spec.adapter.r,
        alpha: spec.adapter.lora_alpha,
        use_rslora: spec.adapter.use_rslora,
        dropout: spec.adapter.lora_dropout,
    };
    model.attach(&config, &targets, spec.train.seed);
    Ok(())
}

/// Every trained parameter under its name in a PEFT file, in the order of the gradients.
pub fn parameters(model: &mut Llama) -> Vec<(String, &mut Tensor<2>)> {
    model
        .adapters_mut()
        .into_iter()
        .flat_map(|slot| {
            let name = |part| format!("{}.{part}.weight", slot.path);
            [(name("lora_A"), &mut slot.adapter.a), (name("lora_B"), &mut slot.adapter.b)]
        })
        .collect()
}

/// The adapters as a PEFT folder holds them.
fn trained_adapter(setup: &Setup<'_>, model: &mut Llama) -> Result<peft::Adapter, TrainError> {
    let spec = &setup.spec.adapter;
    let values = |tensor: &Tensor<2>| tensor.to_data().iter::<f32>().collect::<Vec<f32>>();
    let layers: BTreeMap<String, peft::LoraWeights> = model
        .adapters_mut()
        .into_iter()
        .map(|slot| {
            let ([r, d_in], [d_out, _]) = (slot.adapter.a.dims(), slot.adapter.b.dims());
            let (a, b) = (values(&slot.adapter.a), values(&slot.adapter.b));
            (slot.path, peft::LoraWeights { r, d_in, d_out, a, b })
        })
        .collect();
    todo_config(spec, layers)
}
