//! Which linear layers carry an adapter: PEFT's `target_modules` and `layers_to_transform`.

use std::collections::BTreeSet;

use miette::Diagnostic;
use thiserror::Error;

/// The linear layers of a block that an adapter can sit beside, in the order in which a block applies them.
pub const LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A choice of linear layers that the model does not have.
#[derive(Debug, Error, Diagnostic, PartialEq, Eq)]
pub enum TargetError {
    /// Names that are no linear layer.
    #[error("unknown target modules: {}", names.join(", "))]
    #[diagnostic(help("use \"all-linear\", or some of: {}", LINEARS.join(", ")))]
    UnknownModules {
        /// All unknown names.
        names: Vec<String>,
    },
    /// Layer numbers beyond the last block.
    #[error("layers {layers:?} do not exist: the model has {n_layers} layers, numbered from 0")]
    #[diagnostic(help("use layers = \"all\", or numbers below {n_layers}"))]
    UnknownLayers {
        /// All numbers out of range.
        layers: Vec<usize>,
        /// Blocks of the model.
        n_layers: usize,
    },
    /// Nothing would be trained.
    #[error("no layer is adapted: target_modules or layers is empty")]
    #[diagnostic(help("use target_modules = \"all-linear\" and layers = \"all\""))]
    Empty,
}

/// The chosen linear layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets {
    modules: BTreeSet<&'static str>,
    layers: BTreeSet<usize>,
}

impl Targets {
    /// `modules`: names out of [`LINEARS`], or the single word `all-linear`; `layers`: block numbers, or
    /// `None` for all `n_layers`.
    pub fn new(modules: &[String], layers: Option<&[usize]>, n_layers: usize) -> Result<Self, TargetError> {
        let all = modules.iter().any(|m| m == "all-linear");
        let known = |name: &String| LINEARS.into_iter().find(|linear| linear == name);
        let unknown: Vec<_> =
            modules.iter().filter(|m| *m != "all-linear" && known(m).is_none()).cloned().collect();
        if !unknown.is_empty() {
            return Err(TargetError::UnknownModules { names: unknown });
        }
        let beyond: Vec<_> = layers.unwrap_or_default().iter().copied().filter(|l| *l >= n_layers).collect();
        if !beyond.is_empty() {
            return Err(TargetError::UnknownLayers { layers: beyond, n_layers });
        }
        let modules: BTreeSet<_> =
            if all { LINEARS.into() } else { modules.iter().filter_map(known).collect() };
        let layers: BTreeSet<_> =
            layers.map_or_else(|| (0..n_layers).collect(), |l| l.iter().copied().collect());
        if modules.is_empty() || layers.is_empty() {
            return Err(TargetError::Empty);
        }
        Ok(Self { modules, layers })
    }

    /// Whether `module` of block `layer` carries an adapter.
    pub fn contains(&self, layer: usize, module: &str) -> bool {
        self.layers.contains(&layer) && self.modules.contains(module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn all_linear_selects_every_linear_of_every_layer() {
        let targets = Targets::new(&names(&["all-linear"]), None, 3).expect("valid");
        assert!(LINEARS.iter().all(|m| (0..3).all(|layer| targets.contains(layer, m))));
    }

    #[test]
    fn a_choice_selects_only_itself() {
        let targets = Targets::new(&names(&["q_proj", "v_proj"]), Some(&[1]), 3).expect("valid");
        assert!(targets.contains(1, "q_proj") && targets.contains(1, "v_proj"));
        assert!(!targets.contains(0, "q_proj") && !targets.contains(1, "k_proj"));
    }

    #[test]
    fn all_unknown_names_and_layers_are_reported_at_once() {
        let unknown = Targets::new(&names(&["q_proj", "qproj", "mlp"]), None, 3);
        assert_eq!(unknown, Err(TargetError::UnknownModules { names: names(&["qproj", "mlp"]) }));
        let beyond = Targets::new(&names(&["q_proj"]), Some(&[0, 3, 9]), 3);
        assert_eq!(beyond, Err(TargetError::UnknownLayers { layers: vec![3, 9], n_layers: 3 }));
        assert_eq!(Targets::new(&[], None, 3), Err(TargetError::Empty));
    }
}
