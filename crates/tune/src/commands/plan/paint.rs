//! The answer as the terminal shows it.

use std::io::IsTerminal;

use owo_colors::{OwoColorize, Stream};
use tune_plan::picture::Part;
use tune_plan::{Answer, Style};

/// The text for standard output: as wide as the terminal, in colour where it has any and `NO_COLOR` is not set.
pub fn text(answer: &Answer, options: bool) -> String {
    let paint = |part: Part, text: &str| {
        let [red, green, blue] = part.colour();
        text.if_supports_color(Stream::Stdout, |text| text.truecolor(red, green, blue)).to_string()
    };
    answer.to_text(Style { width: width(), paint: &paint, options })
}

/// Columns of the terminal; 80 where there is none.
pub fn width() -> usize {
    if !std::io::stdout().is_terminal() {
        return Style::PLAIN.width;
    }
    terminal_size::terminal_size().map_or(Style::PLAIN.width, |(width, _)| usize::from(width.0))
}
