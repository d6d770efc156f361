//! An [`Answer`] as text for people.

use std::fmt::Write as _;

use tune_recipe::Method;

use crate::advice::{Change, Limit, Room, Way};
use crate::answer::Answer;
use crate::estimate::Term;
use crate::memory::{Pool, is_on_host};
use crate::picture::{Bar, Part, bars};
use crate::reference::billions;

/// How the text looks.
#[derive(Clone, Copy)]
pub struct Style<'a> {
    /// Columns of the terminal.
    pub width: usize,
    /// Gives a stretch of a bar its colour.
    pub paint: &'a dyn Fn(Part, &str) -> String,
    /// Changes are options of `tune plan --model` instead of settings of a recipe.
    pub options: bool,
}

impl Style<'_> {
    /// No colour, 80 columns.
    pub const PLAIN: Self = Self { width: 80, paint: &|_, text| text.to_owned(), options: false };
}

/// Bars on a narrower terminal would say nothing.
const NARROWEST: usize = 48;

impl Answer {
    /// The whole answer.
    pub fn to_text(&self, style: Style<'_>) -> String {
        let mut text = String::new();
        self.write_reference(&mut text);
        if self.is_rough() {
            text.push_str("\nestimate    rough: only a size is known, so the reference figure stands in\n");
        } else {
            self.write_sides(&mut text);
            self.write_terms(&mut text, style.width);
            self.write_phases(&mut text, style);
        }
        self.write_disk(&mut text, style.width);
        self.write_verdict(&mut text);
        self.write_ways(&mut text, style);
        self.write_room(&mut text);
        text
    }

    fn write_reference(&self, text: &mut String) {
        let (plan, r) = (&self.plan, &self.plan.reference);
        let counted = if self.is_rough() { "by its label" } else { "counted" };
        line(
            text,
            &format!(
                "model       {}, {} parameters {counted}",
                plan.model,
                format_parameters(plan.parameters)
            ),
        );
        line(text, &format!("method      {}", method_name(plan.method)));
        let row = match r.method {
            Method::Full => "full fine-tuning in 16 bits".to_owned(),
            Method::Lora => "LoRA over 16 bits".to_owned(),
            Method::Qlora => format!("QLoRA over {} bits", r.bits),
        };
        line(text, &format!("\nreference   {} GB = {}, the rule of thumb for {row};", r.gb, r.formula));
        line(text, "            it knows no batch, sequence length, rank or vocabulary");
        let (to_run, billions) = (format_bytes(r.inference_bytes), billions(r.parameters));
        line(
            text,
            &format!(
                "            only to run the model: {to_run} = 1.2 · {} bits · {billions} billion",
                r.bits
            ),
        );
    }

    /// Reference and estimate side by side.
    fn write_sides(&self, text: &mut String) {
        let Some(gap) = &self.gap else { return };
        line(text, &format!("\n  {:<32}{:>11}{:>11}", "", "reference", "estimate"));
        for row in &gap.rows {
            let (reference, estimate) = (format_bytes(row.reference_bytes), format_bytes(row.estimate_bytes));
            line(text, &format!("  {:<32}{reference:>11}{estimate:>11}", row.name));
        }
        let (figure, peak) =
            (format!("{} GB", self.plan.reference.gb), format_bytes(self.plan.estimate.peak_bytes));
        line(text, &format!("  {:<32}{figure:>11}{peak:>11}", "together, at the peak"));
        let (amount, side) =
            (format_bytes(gap.bytes.unsigned_abs()), if gap.bytes < 0 { "below" } else { "above" });
        let causes = gap.causes.iter().filter(|cause| (cause.bytes < 0) == (gap.bytes < 0)).take(3);
        let causes: Vec<_> = causes
            .map(|cause| format!("{} {}", cause.name, format_bytes(cause.bytes.unsigned_abs())))
            .collect();
        line(text, &format!("  {amount} {side} the reference: {}", causes.join(", ")));
    }

    fn write_terms(&self, text: &mut String, width: usize) {
        let mut terms: Vec<&Term> = self.plan.estimate.terms.iter().filter(|term| term.bytes > 0).collect();
        terms.sort_by_key(|term| std::cmp::Reverse(term.bytes));
        let (host, device): (Vec<&Term>, Vec<&Term>) = match self.memory.pool {
            Pool::Shared => (Vec::new(), terms),
            Pool::Device => terms.into_iter().partition(|term| is_on_host(term)),
        };
        line(
            text,
            match self.memory.pool {
                Pool::Shared => "\nestimate    host and device are one memory",
                Pool::Device => "\nestimate    on the device",
            },
        );
        for term in &device {
            write_term(text, term, width);
        }
        if !host.is_empty() {
            line(text, "\n            on the host");
            for term in &host {
                write_term(text, term, width);
            }
        }
    }

    fn write_phases(&self, text: &mut String, style: Style<'_>) {
        let estimate = &self.plan.estimate;
        line(text, "\nphases      the peak is the largest of them; not all terms live at once");
        let bars = bars(&self.plan, self.memory.pool);
        for bar in &bars {
            let moment = bar.title();
            let is_peak = estimate.peak_phase.as_deref() == Some(&*bar.phase);
            let mark = if is_peak { "   peak" } else { "" };
            line(text, &format!("  {moment:<26}{:>9}{mark}", format_bytes(bar.bytes)));
        }
        self.write_bars(text, &bars, style);
        let peak = bars.iter().map(|bar| bar.bytes).max().unwrap_or(0);
        let needed = format_bytes(self.memory.needed_bytes);
        line(text, &format!("\nneeds       {}, at most {needed}", format_bytes(peak)));
    }

    fn write_bars(&self, text: &mut String, bars: &[Bar], style: Style<'_>) {
        if style.width < NARROWEST {
            return;
        }
        let budget = self.plan.budget_bytes;
        let most = bars.iter().map(|bar| bar.bytes).chain([self.memory.needed_bytes]).max().unwrap_or(0);
        let full = most.max(budget.unwrap_or(0)).max(1);
        let width = style.width.min(120) - 12;
        let scaled = |bytes: u64| (u128::from(bytes) * width as u128 / u128::from(full)) as usize;
        text.push('\n');
        for bar in bars {
            let mut drawn = 0;
            write!(text, "  {:<8}", bar.phase).ok();
            for (part, wide) in bar.columns(full, width) {
                drawn += wide;
                text.push_str(&(style.paint)(part, &part.letter().to_string().repeat(wide)));
            }
            let budget_at = budget.map(scaled);
            let rest: String = (drawn..=width)
                .map(|column| match budget_at {
                    Some(at) if at == column => '|',
                    Some(at) if at > column => '.',
                    _ => ' ',
                })
                .collect();
            line(text, rest.trim_end());
        }
        let mut legend: Vec<String> = Vec::new();
        for part in Part::ALL {
            if bars.iter().any(|bar| bar.parts.iter().any(|(p, _)| *p == part)) {
                legend.push(format!("{} {}", (style.paint)(part, &part.letter().to_string()), part.name()));
            }
        }
        if budget.is_some() {
            legend.push("| may use".into());
        }
        for words in wrap(&legend, style.width - 10) {
            line(text, &format!("          {words}"));
        }
    }

    fn write_disk(&self, text: &mut String, width: usize) {
        if self.disk.is_empty() {
            return;
        }
        line(text, &format!("\ndisk        {} for what the run writes", format_bytes(self.disk_bytes())));
        self.disk.iter().for_each(|term| write_term(text, term, width));
    }

    fn write_verdict(&self, text: &mut String) {
        let rough = if self.is_rough() { " (rough)" } else { "" };
        let (Some(budget), Some(margin)) = (self.plan.budget_bytes, self.margin_bytes) else {
            return line(text, "\nmay use     unknown; give --device SIZE for a verdict");
        };
        let whose = self.device.as_ref().map_or(String::new(), |device| format!(" of {device}"));
        let amount = format_bytes(margin.unsigned_abs());
        let verdict = match self.plan.fits {
            Some(true) => format!("fits, {amount} to spare"),
            _ => format!("does not fit, {amount} too much"),
        };
        line(text, &format!("\nmay use     {}{whose}: {verdict}{rough}", format_bytes(budget)));
        if self.memory.host_bytes > 0 {
            let host = format_bytes(self.memory.host_bytes);
            line(
                text,
                &format!("            and {host} of host memory; this version trains on the CPU alone"),
            );
        }
    }

    fn write_ways(&self, text: &mut String, style: Style<'_>) {
        if self.plan.fits != Some(false) || self.is_rough() {
            return;
        }
        let usable: Vec<(&Way, String)> =
            self.ways.iter().filter_map(|way| Some((way, way.line(style)?))).collect();
        let Some((first, others)) = usable.split_first() else {
            return line(text, "\nto fit      nothing that can be changed is enough: take a smaller model");
        };
        let show = |text: &mut String, (way, settings): &(&Way, String)| {
            line(text, &format!("  {settings}"));
            let costs: Vec<_> = way.changes.iter().map(Change::cost).collect();
            line(
                text,
                &format!("      then at most {}; {}", format_bytes(way.needed_bytes), costs.join(", ")),
            );
        };
        line(text, "\nto fit      with the least harm:");
        show(text, first);
        if !others.is_empty() {
            line(text, "            or one of these alone:");
            for way in others {
                show(text, way);
            }
        }
    }

    fn write_room(&self, text: &mut String) {
        if self.room.is_empty() {
            return;
        }
        line(text, "\nroom        each alone, with the others as they are");
        for Room { name, now, most, limit } in &self.room {
            let limit = match limit {
                Limit::Memory => "",
                Limit::Context => ", the longest context of the model",
                Limit::Option => ", and memory is not what ends it",
            };
            line(text, &format!("  {name:<18}{now:>9}  up to {most}{limit}"));
        }
    }
}

impl Way {
    /// What to paste: settings of a recipe, or options of the command.
    fn line(&self, style: Style<'_>) -> Option<String> {
        if style.options { self.options.clone() } else { Some(self.as_set()) }
    }
}

fn write_term(text: &mut String, Term { name, bytes, formula }: &Term, width: usize) {
    let start = format!("  {name:<26}{:>9}", format_bytes(*bytes));
    // On a narrow terminal a formula has its own line.
    if width < 60 {
        line(text, &start);
        line(text, &format!("      {formula}"));
    } else {
        line(text, &format!("{start}   {formula}"));
    }
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

/// Words with two spaces between them, in lines of at most `width` columns. Colours count as nothing.
fn wrap(words: &[String], width: usize) -> Vec<String> {
    let mut lines: Vec<(String, usize)> = Vec::new();
    for word in words {
        let long = visible(word);
        match lines.last_mut() {
            Some((line, at)) if *at + 2 + long <= width => {
                line.push_str("  ");
                line.push_str(word);
                *at += 2 + long;
            }
            _ => lines.push((word.clone(), long)),
        }
    }
    lines.into_iter().map(|(line, _)| line).collect()
}

/// Characters that are seen: all but escape sequences.
fn visible(text: &str) -> usize {
    let mut escaped = false;
    let seen = text.chars().filter(|c| {
        let was = escaped;
        escaped = *c == '\u{1b}' || escaped && *c != 'm';
        !was && !escaped
    });
    seen.count()
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
