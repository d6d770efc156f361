//! Size labels: "7b", "1.7B", "135m".

/// Parameters of a size label, or `None` when `text` is something else. The label counts as exact: "7b" is
/// 7,000,000,000, whatever a model sold under that label really has.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let (number, scale) = match text.strip_suffix('b') {
        Some(number) => (number, 1_000_000_000u64),
        None => (text.strip_suffix('m')?, 1_000_000),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |s: &str| !s.is_empty() && s.len() <= 6 && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let fraction_scale = 10u64.pow(fraction.len() as u32);
    let parameters =
        whole.parse::<u64>().ok()? * scale + fraction.parse::<u64>().ok()? * scale / fraction_scale;
    (parameters > 0).then_some(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_exact() {
        assert_eq!(parse_size("7b"), Some(7_000_000_000));
        assert_eq!(parse_size("1.7B"), Some(1_700_000_000));
        assert_eq!(parse_size("135m"), Some(135_000_000));
        for other in
            ["", "b", "7", "7bb", "-7b", "1e3b", ".5b", "7.b", "smollm2:135m", "0b", "9999999b", "1.2.3b"]
        {
            assert_eq!(parse_size(other), None, "{other:?}");
        }
    }
}
