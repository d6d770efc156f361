//! `loss.svg`: training and validation loss by step.

use std::ops::Range;

use plotters::prelude::*;
use tune_train::StepMetrics;

const SIZE: (u32, u32) = (800, 480);
/// Half-life of the smoothed curve, as a share of the run.
const SMOOTHING: f64 = 0.04;

/// The picture as SVG text; `None` when there is nothing to draw.
pub fn svg(metrics: &[StepMetrics]) -> Option<String> {
    let last = metrics.last()?.step;
    let losses = || {
        metrics
            .iter()
            .flat_map(|m| [Some(m.loss), m.val_loss, m.val_loss_before])
            .flatten()
            .filter(|l| l.is_finite())
    };
    let (low, high) = losses().fold((f64::MAX, f64::MIN), |(low, high), l| (low.min(l), high.max(l)));
    if low > high {
        return None;
    }
    let margin = ((high - low) * 0.05).max(0.01);
    let mut text = String::new();
    draw(&mut text, metrics, 0..last + 1, (low - margin).max(0.0)..high + margin).ok()?;
    Some(text)
}

fn draw(
    text: &mut String,
    metrics: &[StepMetrics],
    steps: Range<usize>,
    losses: Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(steps, losses)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .draw()?;

    let points = || metrics.iter().map(|m| (m.step, m.loss));
    chart.draw_series(LineSeries::new(points(), BLUE.mix(0.3)))?;
    chart
        .draw_series(LineSeries::new(smoothed(points()), BLUE.stroke_width(2)))?
        .label("training")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLUE.stroke_width(2)));
    let before = metrics.first().and_then(|m| Some((m.step - 1, m.val_loss_before?)));
    let after = metrics.iter().filter_map(|m| Some((m.step, m.val_loss?)));
    let validation: Vec<_> = before.into_iter().chain(after).collect();
    if !validation.is_empty() {
        chart
            .draw_series(LineSeries::new(validation.iter().copied(), RED.stroke_width(2)))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], RED.stroke_width(2)));
        chart.draw_series(validation.iter().map(|point| Circle::new(*point, 3, RED.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    area.present()?;
    Ok(())
}

/// Exponential moving average, corrected for its start.
fn smoothed(points: impl ExactSizeIterator<Item = (usize, f64)>) -> Vec<(usize, f64)> {
    let half_life = (points.len() as f64 * SMOOTHING).max(1.0);
    let keep = 0.5f64.powf(1.0 / half_life);
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .map(|(step, loss)| {
            sum = sum * keep + loss;
            weight = weight * keep + 1.0;
            (step, sum / weight)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: usize, loss: f64, val_loss: Option<f64>) -> StepMetrics {
        StepMetrics {
            step,
            epoch: 0.0,
            loss,
            learning_rate: 0.0,
            grad_norm: 0.0,
            tokens: 1,
            trained_tokens: 1,
            tokens_per_second: 1.0,
            peak_memory_bytes: None,
            elapsed_s: 0.0,
            val_loss,
            val_loss_before: None,
        }
    }

    #[test]
    fn both_curves_are_drawn_and_named() {
        let run = [metrics(1, 3.0, None), metrics(2, 2.0, Some(2.5)), metrics(3, 1.5, Some(2.0))];
        let svg = svg(&run).expect("a picture");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for name in ["training", "validation", "step"] {
            assert!(svg.contains(name), "no {name} in the picture");
        }
        assert!(svg.matches("<polyline").count() >= 3);
    }

    #[test]
    fn nothing_finite_gives_no_picture() {
        assert_eq!(svg(&[]), None);
        assert_eq!(svg(&[metrics(1, f64::NAN, None)]), None);
    }

    #[test]
    fn smoothing_keeps_a_constant_and_follows_a_step() {
        let constant = smoothed((0..50).map(|step| (step, 2.0)));
        assert!(constant.iter().all(|(_, loss)| (loss - 2.0).abs() < 1e-12));
        let step = smoothed((0..50).map(|step| (step, if step < 25 { 1.0 } else { 0.0 })));
        assert!(step[26].1 > 0.1 && step[49].1 < 0.1);
    }
}
