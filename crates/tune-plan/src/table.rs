//! [`MemoryPlan`] as text for people.

use std::fmt;

use tune_recipe::Method;

use crate::estimate::{Basis, MemoryPlan, Term};
use crate::reference::billions;

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_reference(f)?;
        match self.estimate.basis {
            Basis::Detailed => self.write_estimate(f)?,
            Basis::Reference => {
                writeln!(f, "\nestimate    rough: only a size is known, so the reference figure stands in")?;
            }
        }
        self.write_verdict(f)
    }
}

impl MemoryPlan {
    fn write_reference(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = &self.reference;
        let counted = if r.nominal { "by its label" } else { "counted" };
        writeln!(
            f,
            "model       {}, {} parameters {counted}",
            self.model,
            format_parameters(self.parameters)
        )?;
        writeln!(f, "method      {}", method_name(self.method))?;
        let row = match r.method {
            Method::Full => "full fine-tuning in 16 bits".to_owned(),
            Method::Lora => "LoRA over 16 bits".to_owned(),
            Method::Qlora => format!("QLoRA over {} bits", r.bits),
        };
        writeln!(f, "\nreference   {} GB = {}, the rule of thumb for {row};", r.gb, r.formula)?;
        writeln!(f, "            it knows no batch, sequence length, rank or vocabulary")?;
        let (to_run, billions) = (format_bytes(r.inference_bytes), billions(r.parameters));
        writeln!(
            f,
            "            only to run the model: {to_run} = 1.2 · {} bits · {billions} billion",
            r.bits
        )
    }

    fn write_estimate(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let estimate = &self.estimate;
        writeln!(f, "\nestimate")?;
        let mut shown: Vec<&Term> = estimate.terms.iter().filter(|term| term.bytes > 0).collect();
        shown.sort_by_key(|term| std::cmp::Reverse(term.bytes));
        for Term { name, bytes, formula } in shown {
            writeln!(f, "  {name:<26}{:>9}   {formula}", format_bytes(*bytes))?;
        }
        writeln!(f, "\nphases      the peak is the largest of them; not all terms live at once")?;
        for phase in &estimate.phases {
            let moment = match phase.name {
                "load" => "reading the tokenizer",
                "loss" => "loss",
                "block" => "backward of a block",
                _ => "optimizer step",
            };
            let mark = if Some(phase.name) == estimate.peak_phase { "   peak" } else { "" };
            writeln!(f, "  {moment:<26}{:>9}{mark}", format_bytes(phase.bytes))?;
        }
        let up_to = format_bytes(estimate.upper_bytes);
        writeln!(f, "\nneeds       {}, at most {up_to}", format_bytes(estimate.peak_bytes))
    }

    fn write_verdict(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rough = if self.estimate.basis == Basis::Reference { " (rough)" } else { "" };
        match (self.budget_bytes, self.fits) {
            (Some(budget), Some(fits)) => {
                let verdict = if fits { "fits" } else { "does not fit" };
                writeln!(f, "may use     {}: {verdict}{rough}", format_bytes(budget))
            }
            _ => writeln!(f, "may use     unknown; give --device SIZE for a verdict"),
        }
    }
}

/// Bytes in decimal units with three figures: "612 MB", "5.20 GB".
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    // 999.5 would be printed as 1000.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = match value {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// A number of parameters as people say it: "134.5M", "7B", "6.74B".
pub fn format_parameters(parameters: u64) -> String {
    let (value, unit) = match parameters {
        p if p >= 999_950_000 => (p as f64 / 1e9, "B"),
        p => (p as f64 / 1e6, "M"),
    };
    let text = if unit == "B" { format!("{value:.2}") } else { format!("{value:.1}") };
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

fn method_name(method: Method) -> &'static str {
    match method {
        Method::Full => "full",
        Method::Lora => "lora",
        Method::Qlora => "qlora",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        let bytes: Vec<_> =
            [0, 999, 1000, 999_499, 999_500, 12_345_678, 5_200_000_000, u64::MAX].map(format_bytes).into();
        assert_eq!(bytes, ["0 B", "999 B", "1.00 kB", "999 kB", "1.00 MB", "12.3 MB", "5.20 GB", "18.4 EB"]);
        let counts =
            [134_515_008, 7_000_000_000, 6_738_415_616, 1_000_000_000, 999_949_999].map(format_parameters);
        assert_eq!(counts, ["134.5M", "7B", "6.74B", "1B", "999.9M"]);
    }
}
