//! The weights of an export against those that base and adapter say, tensor by tensor.
//!
//! ```text
//! error = ‖stored − wanted‖ / ‖wanted‖        scale = ⟨stored, wanted⟩ / ⟨wanted, wanted⟩
//! ```
//!
//! Rounding gives each type an error of its own and leaves the scale near 1, whatever the route. A tensor that was
//! damaged, exchanged or scaled stands out in one of the two, and is named; logits alone would only say that
//! something is wrong. The limits lie well above what tuned models show: `docs/verify.md`.

use rayon::prelude::*;
use tune_formats::peft::Adapter;
use tune_formats::{BaseModel, FormatError};

use crate::ExportError;
use crate::merge::{self, Values};

/// The scale of a tensor may be off by this share of its type's largest error, and by a little more for short vectors.
const SCALE_SHARE: f64 = 0.5;

/// One tensor of an export.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightCheck {
    /// Hugging Face name.
    pub tensor: String,
    /// The type in which it is stored.
    pub stored_as: String,
    /// Error relative to what was meant.
    pub error: f64,
    /// Factor that the stored values have got; 1 is right.
    pub scale: f64,
    /// The largest error for this type.
    pub limit: f64,
}

impl WeightCheck {
    /// What is wrong with it, if anything.
    pub fn problem(&self) -> Option<String> {
        let Self { tensor, stored_as, error, scale, limit } = self;
        let scale_limit = SCALE_SHARE * limit + 1e-3;
        if !(error.is_finite() && *error <= *limit) {
            return Some(format!(
                "{tensor} ({stored_as}): differs from base and adapter by {:.2} % of its size, at most {:.2} % \
                 is rounding",
                100.0 * error,
                100.0 * limit
            ));
        }
        ((scale - 1.0).abs() > scale_limit).then(|| {
            format!(
                "{tensor} ({stored_as}): is {scale:.4} times what base and adapter say, at most {:.2} % off is \
                 rounding",
                100.0 * scale_limit
            )
        })
    }
}

/// Compares every tensor of `found` with what `base` and `adapter` say it should hold.
///
/// # Errors
/// Tensors that cannot be read, or an adapter of another base.
pub fn check_weights(
    base: &BaseModel,
    adapter: &Adapter,
    found: &BaseModel,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<WeightCheck>, ExportError> {
    let tensors = merge::tensors(base, adapter)?;
    let mut checks = Vec::with_capacity(tensors.len());
    for (done, tensor) in (1..).zip(&tensors) {
        let check = |stored_as: &str, sums: Sums| WeightCheck {
            tensor: tensor.name.clone(),
            stored_as: stored_as.to_owned(),
            error: sums.error(),
            scale: sums.scale(),
            limit: largest_error(stored_as),
        };
        let shape = found.weights.shape(&tensor.name);
        if shape.as_ref() != Some(&tensor.shape()) {
            let reason = format!("expected shape {:?}, found {shape:?}", tensor.shape());
            return Err(FormatError::Tensor { name: tensor.name.clone(), reason }.into());
        }
        checks.push(match &tensor.values {
            Values::Vector(wanted) => check("F32", Sums::of(wanted, &found.weights.vector(&tensor.name)?)),
            Values::Matrix(wanted) => {
                let stored = found.weights.matrix(&tensor.name)?;
                let (cols, wanted) = (wanted.cols(), wanted.read());
                let of_rows = |(mut a, mut b): (Vec<f32>, Vec<f32>), row: usize| {
                    a.resize(cols, 0.0);
                    b.resize(cols, 0.0);
                    wanted.merged_row(row, &mut a);
                    stored.decode_row(row, &mut b);
                    (Sums::of(&a, &b), (a, b))
                };
                let sums: Vec<Sums> = (0..stored.rows())
                    .into_par_iter()
                    .map_init(Default::default, |buffers, row| {
                        let (sums, used) = of_rows(std::mem::take(buffers), row);
                        *buffers = used;
                        sums
                    })
                    .collect();
                wanted.release();
                stored.release();
                check(stored.type_name(), sums.into_iter().fold(Sums::default(), Sums::plus))
            }
        });
        progress(done, tensors.len());
    }
    Ok(checks)
}

/// About twice the error that tuned models of SmolLM2 show by the worst route (`docs/verify.md`).
fn largest_error(stored_as: &str) -> f64 {
    match stored_as {
        "F32" => 1e-5,
        "F16" => 2e-3,
        "BF16" => 8e-3,
        "Q8_0" => 0.02,
        "Q6_K" => 0.05,
        "Q5_K" | "Q5_0" | "Q5_1" => 0.12,
        "Q4_K" | "Q4_0" | "Q4_1" | "IQ4_NL" | "MXFP4" => 0.25,
        "Q3_K" => 0.45,
        _ => 0.7,
    }
}

#[derive(Clone, Copy, Default)]
struct Sums {
    wanted_wanted: f64,
    stored_wanted: f64,
    error_error: f64,
}

impl Sums {
    fn of(wanted: &[f32], stored: &[f32]) -> Self {
        let mut sums = Self::default();
        for (&wanted, &stored) in wanted.iter().zip(stored) {
            let (wanted, stored) = (f64::from(wanted), f64::from(stored));
            sums.wanted_wanted += wanted * wanted;
            sums.stored_wanted += stored * wanted;
            sums.error_error += (stored - wanted) * (stored - wanted);
        }
        sums
    }

    fn plus(self, other: Self) -> Self {
        Self {
            wanted_wanted: self.wanted_wanted + other.wanted_wanted,
            stored_wanted: self.stored_wanted + other.stored_wanted,
            error_error: self.error_error + other.error_error,
        }
    }

    fn error(self) -> f64 {
        if self.error_error == 0.0 { 0.0 } else { (self.error_error / self.wanted_wanted).sqrt() }
    }

    fn scale(self) -> f64 {
        if self.wanted_wanted == 0.0 { 1.0 } else { self.stored_wanted / self.wanted_wanted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wanted: &[f32], stored: &[f32], stored_as: &str) -> Option<String> {
        let sums = Sums::of(wanted, stored);
        let (error, scale, limit) = (sums.error(), sums.scale(), largest_error(stored_as));
        let (tensor, stored_as) = ("q_proj".to_owned(), stored_as.to_owned());
        WeightCheck { tensor, stored_as, error, scale, limit }.problem()
    }

    #[test]
    fn rounding_passes_and_a_scaled_tensor_is_named() {
        let wanted: Vec<f32> = (0..256).map(|i| (i as f32 * 0.7).sin()).collect();
        let rounded: Vec<f32> = wanted.iter().map(|v| (v * 127.0).round() / 127.0).collect();
        assert_eq!(check(&wanted, &rounded, "Q8_0"), None);
        let scaled: Vec<f32> = rounded.iter().map(|v| v * 1.05).collect();
        let problem = check(&wanted, &scaled, "Q8_0").expect("found");
        assert!(problem.starts_with("q_proj (Q8_0): differs"), "{problem}");
        let problem = check(&wanted, &scaled.iter().map(|v| v * 1.1).collect::<Vec<_>>(), "Q4_0");
        assert!(problem.expect("found").contains("times what base and adapter say"));
        assert!(check(&wanted, &[f32::NAN; 256], "Q2_K").is_some());
    }
}
