//! What running a model takes, without training it: the founding formulas, and beside them what the model really keeps.
//!
//! ```text
//! M_model = P · Z · 1.2                        P parameters of Z bytes
//! M_KV    = 2 · C · T · L · (N / g) · D · Z    C conversations of T tokens, L blocks, N / g key-value heads of width D
//! M_total = M_model + M_KV
//! ```
//!
//! The estimate takes the bytes of the weights from the header of a file, or the bits that files of the format have; the
//! cache block by block ([`Layout::cache_bytes`]); and the scratch of an engine that reads 512 tokens at once. Where only
//! a size is known, the cache is that of the plain model next in size, and the founding total decides.

use std::fmt;

use serde::Serialize;

use crate::cache_type::CacheType;
use crate::estimate::product;
use crate::reference::{billions, kv_cache_bytes, model_bytes};
use crate::{Basis, CatalogueModel, Layout, Quant, Term, catalogue, format_bytes, format_parameters};

/// Tokens that an engine reads at once.
const READ_AT_ONCE: u64 = 512;

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct InferenceInput {
    /// What the model is called.
    pub model: String,
    /// Its parameters.
    pub parameters: u64,
    /// What is known of it.
    pub known: KnownModel,
    /// Format of the weights; of a file only its founding bits count.
    pub quant: Quant,
    /// Tokens of a conversation.
    pub context: u64,
    /// Conversations at once.
    pub users: u64,
    /// Type of the cache.
    pub cache: CacheType,
    /// Bytes that may be used, if that is known.
    pub budget_bytes: Option<u64>,
}

/// What is known of a model that is to run.
#[derive(Clone, Debug, PartialEq)]
pub enum KnownModel {
    /// The header of its file: bytes of the weights as stored, and dimensions.
    File {
        /// Bytes of the weights.
        weights: u64,
        /// Its dimensions.
        layout: Layout,
    },
    /// Its published dimensions.
    Dimensions(Layout),
    /// Only a size.
    Size,
}

/// The answer. Its JSON form is a stable interface and shares its names with a plan of training.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InferencePlan {
    /// What the model is called.
    pub model: String,
    /// Its parameters.
    pub parameters: u64,
    /// `inference`.
    pub method: &'static str,
    /// Format of the weights, as asked.
    pub quant: &'static str,
    /// Tokens of a conversation.
    pub context: u64,
    /// Conversations at once.
    pub users: u64,
    /// Type of the cache.
    pub kv_cache: CacheType,
    /// The founding formulas.
    pub reference: InferenceReference,
    /// The count.
    pub estimate: InferenceEstimate,
    /// Bytes that may be used, if that is known.
    pub budget_bytes: Option<u64>,
    /// Whether it fits; unknown without a budget.
    pub fits: Option<bool>,
}

/// The founding formulas with what they were given.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InferenceReference {
    /// The total in GB.
    pub gb: f64,
    /// `P · Z · 1.2`.
    pub model_bytes: u64,
    /// With its numbers.
    pub model_formula: String,
    /// `2 · C · T · L · (N / g) · D · Z`.
    pub kv_cache_bytes: u64,
    /// With its numbers.
    pub kv_cache_formula: String,
    /// Whose dimensions the cache has, where only a size is known.
    pub kv_cache_as_of: Option<String>,
    /// Both.
    pub total_bytes: u64,
}

/// The count, term by term.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InferenceEstimate {
    /// `detailed`, or `reference` where only a size is known.
    pub basis: Basis,
    /// All terms.
    pub peak_bytes: u64,
    /// Upper end of the range; the verdict compares this one.
    pub upper_bytes: u64,
    /// The parts.
    pub terms: Vec<Term>,
}

/// Counts what running a model takes.
pub fn inference(input: &InferenceInput) -> InferencePlan {
    let reference = founding(input);
    let estimate = match &input.known {
        KnownModel::Size => InferenceEstimate {
            basis: Basis::Reference,
            peak_bytes: reference.total_bytes,
            upper_bytes: reference.total_bytes,
            terms: Vec::new(),
        },
        KnownModel::File { weights, layout } => {
            counted(input, layout, *weights, "as stored in the file".into(), 0)
        }
        KnownModel::Dimensions(layout) => {
            let formula = format!(
                "{} billion × {} bits, as files of {} have",
                billions(input.parameters),
                input.quant.file_bits as f64 / 1e4,
                input.quant.name
            );
            // Mixtures of types differ between models.
            counted(input, layout, input.quant.bytes(input.parameters), formula, 30)
        }
    };
    InferencePlan {
        model: input.model.clone(),
        parameters: input.parameters,
        method: "inference",
        quant: input.quant.name,
        context: input.context,
        users: input.users,
        kv_cache: input.cache,
        fits: input.budget_bytes.map(|budget| estimate.upper_bytes <= budget),
        reference,
        estimate,
        budget_bytes: input.budget_bytes,
    }
}

/// The plain model of the catalogue whose size is next to this one, among those whose queries share keys and values, as
/// those of nearly all newer models do.
pub fn next_in_size(parameters: u64) -> Option<&'static CatalogueModel> {
    let grouped = |model: &&CatalogueModel| {
        model.shape().is_some_and(|shape| shape.num_key_value_heads < shape.num_attention_heads)
    };
    catalogue::catalogue()
        .iter()
        .filter(grouped)
        .min_by_key(|model| model.layout.parameters().abs_diff(parameters))
}

fn founding(input: &InferenceInput) -> InferenceReference {
    let (dimensions, as_of) = match &input.known {
        KnownModel::File { layout, .. } | KnownModel::Dimensions(layout) => {
            (layout.stated_cache_dimensions(), None)
        }
        KnownModel::Size => {
            let next = next_in_size(input.parameters);
            let dimensions = next.map(|model| model.layout.stated_cache_dimensions());
            (dimensions.unwrap_or_default(), next.map(|model| model.name.clone()))
        }
    };
    let (layers, kv_heads, head_dim) = dimensions;
    let elements = kv_cache_bytes(input.users, input.context, layers, kv_heads, head_dim, 1);
    let kv_cache = input.cache.bytes(elements);
    let model = model_bytes(input.parameters, input.quant.bits);
    let total = model.saturating_add(kv_cache);
    let bytes = input.cache.bytes(32) as f64 / 32.0;
    InferenceReference {
        gb: (total as f64 / 1e7).round() / 100.0,
        model_bytes: model,
        model_formula: format!("1.2 · {} bits · {} billion", input.quant.bits, billions(input.parameters)),
        kv_cache_bytes: kv_cache,
        kv_cache_formula: format!(
            "2 · {} · {} · {layers} · {kv_heads} · {head_dim} · {bytes} bytes",
            input.users, input.context
        ),
        kv_cache_as_of: as_of,
        total_bytes: total,
    }
}

fn counted(
    input: &InferenceInput,
    layout: &Layout,
    weights: u64,
    formula: String,
    weights_margin_permille: u64,
) -> InferenceEstimate {
    let cache = input.users.saturating_mul(layout.cache_bytes(input.context, input.cache));
    let read = READ_AT_ONCE.min(input.context);
    let scratch = product(&[read, 4, layout.vocab_size.saturating_add(8 * layout.hidden_size)]);
    let terms = vec![
        Term { name: "weights".into(), bytes: weights, formula },
        Term {
            name: "cache".into(),
            bytes: cache,
            formula: format!(
                "{} × {} tokens in {}, block by block",
                input.users,
                input.context,
                input.cache.name()
            ),
        },
        Term {
            name: "scratch".into(),
            bytes: scratch,
            formula: format!(
                "{read} tokens at once: logits of {} and the widths of a block",
                layout.vocab_size
            ),
        },
    ];
    let peak = terms.iter().fold(0, |sum: u64, term| sum.saturating_add(term.bytes));
    // The cache is exact; engines differ in their scratch.
    let margin = weights / 1000 * weights_margin_permille + scratch / 2;
    InferenceEstimate {
        basis: Basis::Detailed,
        peak_bytes: peak,
        upper_bytes: peak.saturating_add(margin),
        terms,
    }
}

impl fmt::Display for InferencePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = &self.reference;
        let counted = match self.estimate.basis {
            Basis::Detailed => "counted",
            Basis::Reference => "by its label",
        };
        writeln!(
            f,
            "model       {}, {} parameters {counted}",
            self.model,
            format_parameters(self.parameters)
        )?;
        let users = if self.users == 1 { "conversation" } else { "conversations" };
        writeln!(
            f,
            "method      inference in {}: {} {users} of {} tokens, cache in {}",
            self.quant,
            self.users,
            self.context,
            self.kv_cache.name()
        )?;
        writeln!(f, "\nreference   {}, the founding rules of thumb", format_bytes(r.total_bytes))?;
        writeln!(
            f,
            "  {:<26}{:>9}   {}",
            "weights and a fifth",
            format_bytes(r.model_bytes),
            r.model_formula
        )?;
        writeln!(f, "  {:<26}{:>9}   {}", "cache", format_bytes(r.kv_cache_bytes), r.kv_cache_formula)?;
        if let Some(model) = &r.kv_cache_as_of {
            writeln!(f, "            the cache is that of {model}, the plain model next in size")?;
        }
        match self.estimate.basis {
            Basis::Reference => {
                writeln!(f, "\nestimate    rough: only a size is known, so the reference figure stands in")?;
            }
            Basis::Detailed => {
                writeln!(f, "\nestimate")?;
                for Term { name, bytes, formula } in &self.estimate.terms {
                    writeln!(f, "  {name:<26}{:>9}   {formula}", format_bytes(*bytes))?;
                }
                let up_to = format_bytes(self.estimate.upper_bytes);
                writeln!(f, "\nneeds       {}, at most {up_to}", format_bytes(self.estimate.peak_bytes))?;
            }
        }
        let rough = if self.estimate.basis == Basis::Reference { " (rough)" } else { "" };
        match (self.budget_bytes, self.fits) {
            (Some(budget), Some(fits)) => {
                let verdict = if fits { "fits" } else { "does not fit" };
                writeln!(f, "may use     {}: {verdict}{rough}", format_bytes(budget))
            }
            _ => writeln!(f, "may use     unknown; give --device for a verdict"),
        }
    }
}
