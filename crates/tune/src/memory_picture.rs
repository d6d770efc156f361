//! The phases of a plan as stacked bars beside what the run may use: `tune plan --svg`.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use tune_plan::picture::{Bar, Part, bars};
use tune_plan::{Answer, format_bytes};

const WIDTH: i32 = 960;
/// Left and right end of the bars.
const LEFT: i32 = 176;
const RIGHT: i32 = WIDTH - 96;
const TOP: i32 = 112;
const BAR: i32 = 34;
const GAP: i32 = 20;
/// Between the bars and the first row of the legend, and from row to row.
const LEGEND: i32 = 62;
const ROW: i32 = 26;
/// Entries of a row.
const COLUMNS: i32 = 3;
const INK: RGBColor = RGBColor(0x22, 0x26, 0x2e);
const FADED: RGBColor = RGBColor(0x6b, 0x72, 0x80);
const RULE: RGBColor = RGBColor(0xd9, 0xdc, 0xe3);
const LIMIT: RGBColor = RGBColor(0xb0, 0x1e, 0x2e);

/// The picture as SVG text; `None` where there are no phases to draw.
pub fn svg(answer: &Answer) -> Option<String> {
    let bars = bars(&answer.plan, answer.memory.pool);
    let most = bars.iter().map(|bar| bar.bytes).max()?.max(answer.memory.needed_bytes);
    let full = most.max(answer.plan.budget_bytes.unwrap_or(0)).max(1);
    let mut text = String::new();
    draw(&mut text, answer, &bars, full).ok()?;
    Some(text)
}

fn draw(
    text: &mut String,
    answer: &Answer,
    bars: &[Bar],
    full: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    let used: Vec<Part> = Part::ALL
        .into_iter()
        .filter(|part| bars.iter().any(|bar| bar.parts.iter().any(|(p, _)| p == part)))
        .collect();
    let bottom = TOP + bars.len() as i32 * (BAR + GAP) - GAP;
    let height = bottom + LEGEND + (used.len() as i32 + COLUMNS - 1) / COLUMNS * ROW;
    let area = SVGBackend::with_string(text, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let at = |bytes: u64| LEFT + (i128::from(bytes) * i128::from(RIGHT - LEFT) / i128::from(full)) as i32;
    let write = |words: &str, place: (i32, i32), size: i32, colour: &RGBColor, to: HPos| {
        let style = ("sans-serif", size).into_font().color(colour).pos(Pos::new(to, VPos::Center));
        area.draw(&Text::new(words.to_owned(), place, style))
    };

    write(&answer.plan.model, (32, 36), 22, &INK, HPos::Left)?;
    write(&verdict(answer), (32, 66), 15, &FADED, HPos::Left)?;

    // Scale first, so that the bars lie over its lines.
    let step = step_of(full);
    for mark in (0..).map(|n| n * step).take_while(|mark| *mark <= full) {
        let x = at(mark);
        area.draw(&PathElement::new([(x, TOP - 10), (x, bottom + 10)], RULE))?;
        write(&format_bytes(mark), (x, bottom + 24), 12, &FADED, HPos::Center)?;
    }

    for (i, bar) in (0..).zip(bars) {
        let (top, middle) = (TOP + i * (BAR + GAP), TOP + i * (BAR + GAP) + BAR / 2);
        let is_peak = answer.plan.estimate.peak_phase.as_deref() == Some(&*bar.phase);
        write(bar.title(), (LEFT - 14, middle), 14, if is_peak { &INK } else { &FADED }, HPos::Right)?;
        let mut sum = 0u64;
        for (part, bytes) in &bar.parts {
            let (from, to) = (at(sum), at(sum.saturating_add(*bytes)));
            sum = sum.saturating_add(*bytes);
            if to > from {
                area.draw(&Rectangle::new([(from, top), (to, top + BAR)], colour(*part).filled()))?;
                // A hair of white between two parts, where both are wide enough for it.
                if to - from > 3 {
                    area.draw(&PathElement::new([(to, top), (to, top + BAR)], WHITE))?;
                }
            }
        }
        let words = format_bytes(bar.bytes);
        write(&words, (at(sum) + 8, middle), 13, if is_peak { &INK } else { &FADED }, HPos::Left)?;
    }

    if let Some(budget) = answer.plan.budget_bytes {
        let x = at(budget);
        area.draw(&PathElement::new([(x, TOP - 16), (x, bottom + 10)], LIMIT.stroke_width(2)))?;
        write(&format!("may use {}", format_bytes(budget)), (x, TOP - 26), 12, &LIMIT, HPos::Right)?;
    }

    let peak = bars.iter().find(|bar| answer.plan.estimate.peak_phase.as_deref() == Some(&*bar.phase));
    for (i, part) in (0..).zip(used) {
        let (x, y) = (32 + i % COLUMNS * 302, bottom + LEGEND + i / COLUMNS * ROW);
        area.draw(&Rectangle::new([(x, y - 7), (x + 14, y + 7)], colour(part).filled()))?;
        write(part.name(), (x + 24, y), 13, &INK, HPos::Left)?;
        let bytes =
            peak.and_then(|bar| bar.parts.iter().find(|(p, _)| *p == part)).map_or(0, |(_, bytes)| *bytes);
        let words = if bytes == 0 { "not at the peak".into() } else { format_bytes(bytes) };
        write(&words, (x + 262, y), 13, &FADED, HPos::Right)?;
    }
    area.present()?;
    Ok(())
}

/// One line below the name.
fn verdict(answer: &Answer) -> String {
    let needed = format!("at most {}", format_bytes(answer.memory.needed_bytes));
    let whose = answer.device.as_ref().map_or(String::new(), |device| format!(" of {device}"));
    match (answer.plan.budget_bytes, answer.plan.fits) {
        (Some(budget), Some(fits)) => {
            let verdict = if fits { "fits" } else { "does not fit" };
            format!("needs {needed} and may use {}{whose}: {verdict}", format_bytes(budget))
        }
        _ => format!("needs {needed}"),
    }
}

fn colour(part: Part) -> RGBColor {
    let [red, green, blue] = part.colour();
    RGBColor(red, green, blue)
}

/// A round step that gives four to eight marks.
fn step_of(full: u64) -> u64 {
    let mut step = 1u64;
    loop {
        for factor in [1, 2, 5] {
            let candidate = step.saturating_mul(factor);
            if full / candidate.max(1) <= 8 {
                return candidate.max(1);
            }
        }
        step = step.saturating_mul(10);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_few() {
        for full in [1, 9, 1000, 8_589_934_592, 123_456_789_012, u64::MAX] {
            let step = step_of(full);
            assert!(full / step <= 8, "{full}");
            assert!(full < 4 || full / step >= 3, "{full} in {step}");
        }
    }
}
