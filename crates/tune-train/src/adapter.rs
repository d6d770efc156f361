//! The adapters of a run: put in place, listed as parameters, and taken out as a PEFT adapter.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;
use tune_adapters::{LINEARS, LoraConfig, Targets};
use tune_formats::provenance::Provenance;
use tune_formats::{BaseModel, ModelConfig, peft};
use tune_models::{Llama, ModelError};
use tune_recipe::{Layers, RunSpec, TargetModules};

use crate::TrainError;

/// Puts the adapters of the recipe beside the model's linear layers: fresh, or those of `init_adapter`.
pub(crate) fn adapt(model: &mut Llama, spec: &RunSpec, base: &BaseModel) -> Result<(), TrainError> {
    if let Some(path) = &spec.adapter.init_adapter {
        let initial = peft::read(path)?;
        initial.check_base(base)?;
        agree(&initial, spec, &targets(model, spec)?, model.blocks().len())?;
        model.attach_weights(&initial, spec.adapter.lora_dropout)?;
        return Ok(());
    }
    let targets = targets(model, spec)?;
    let config = LoraConfig {
        rank: spec.adapter.r,
        alpha: spec.adapter.lora_alpha,
        use_rslora: spec.adapter.use_rslora,
        dropout: spec.adapter.lora_dropout,
    };
    model.attach(&config, &targets, spec.train.seed);
    Ok(())
}

/// The linear layers that the recipe names.
fn targets(model: &Llama, spec: &RunSpec) -> Result<Targets, TrainError> {
    let modules = match &spec.adapter.target_modules {
        TargetModules::AllLinear => vec!["all-linear".to_string()],
        TargetModules::Names(names) => names.clone(),
    };
    let layers = match &spec.adapter.layers {
        Layers::All => None,
        Layers::Only(layers) => Some(layers.as_slice()),
    };
    Ok(Targets::new(&modules, layers, model.blocks().len()).map_err(ModelError::from)?)
}

/// The recipe's rank, scale and targets hold for the whole run, so those of an initial adapter must be the same.
fn agree(
    initial: &peft::Adapter,
    spec: &RunSpec,
    targets: &Targets,
    n_layers: usize,
) -> Result<(), TrainError> {
    let adapter = &spec.adapter;
    let wanted: BTreeSet<String> = (0..n_layers)
        .flat_map(|layer| LINEARS.iter().map(move |name| (layer, *name)))
        .filter(|(layer, name)| targets.contains(*layer, name))
        .map(|(layer, name)| ModelConfig::linear_path(layer, name))
        .collect();
    let there: BTreeSet<String> = initial.layers.keys().cloned().collect();
    let (initial, layers) = (&initial.config, &initial.layers);
    let mut differences = Vec::new();
    if initial.r != adapter.r {
        differences.push(format!("r: {} there, {} in the recipe", initial.r, adapter.r));
    }
    if (initial.lora_alpha - adapter.lora_alpha).abs() > f64::EPSILON {
        differences
            .push(format!("lora_alpha: {} there, {} in the recipe", initial.lora_alpha, adapter.lora_alpha));
    }
    if initial.use_rslora != adapter.use_rslora {
        differences
            .push(format!("use_rslora: {} there, {} in the recipe", initial.use_rslora, adapter.use_rslora));
    }
    if wanted != there {
        differences.push(format!(
            "target_modules and layers: {} linear layers there, {} in the recipe",
            layers.len(),
            wanted.len()
        ));
    }
    if differences.is_empty() { Ok(()) } else { Err(TrainError::InitialAdapter { differences }) }
}

/// Every trained parameter under its name in a safetensors file, in the order of the gradients.
pub fn parameters(model: &mut Llama) -> Vec<(String, &mut Tensor<2>)> {
    model.parameters_mut().into_iter().map(|parameter| (parameter.name, parameter.tensor)).collect()
}

/// The adapters as a PEFT folder holds them.
pub(crate) fn trained_adapter(model: &mut Llama, spec: &RunSpec, provenance: Provenance) -> peft::Adapter {
    let values = |tensor: &Tensor<2>| tensor.to_data().iter::<f32>().collect::<Vec<f32>>();
    let device = model.device().clone();
    let layers: BTreeMap<String, peft::LoraWeights> = model
        .adapters_mut()
        .into_iter()
        .map(|slot| {
            let (r, d_in, d_out) = (slot.adapter.rank(), slot.adapter.a.cols(), slot.adapter.b.rows());
            let (a, b) = slot.adapter.factors(&device);
            let (a, b) = (values(&a), values(&b));
            (slot.path, peft::LoraWeights { r, d_in, d_out, a: a.into(), b: b.into() })
        })
        .collect();
    let target_modules: BTreeSet<String> =
        layers.keys().filter_map(|path| path.rsplit('.').next()).map(String::from).collect();
    let config = peft::AdapterConfig {
        base_model_name_or_path: Some(spec.model.base.clone()),
        provenance,
        r: spec.adapter.r,
        lora_alpha: spec.adapter.lora_alpha,
        lora_dropout: spec.adapter.lora_dropout,
        target_modules: target_modules.into_iter().collect(),
        use_rslora: spec.adapter.use_rslora,
        layers_to_transform: match &spec.adapter.layers {
            Layers::All => None,
            Layers::Only(layers) => Some(layers.clone()),
        },
    };
    peft::Adapter { config, layers }
}
