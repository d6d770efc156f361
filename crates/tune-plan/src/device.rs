//! Devices to plan for: how much memory each has, and how much of it a run may use.
//!
//! ```text
//! card      total - max(0.6 GiB, 3 %)  without a display
//!           total - max(1.2 GiB, 8 %)  with one
//!           total - max(1.5 GiB, 10 %) under Windows
//! Apple     min(working set, total - 2.5 GiB), working set = 2/3 of up to 32 GiB, 3/4 of more
//! CPU       min(0.9 · available, available - 1.5 GiB), available = total - max(2.5 GiB, 10 %)
//! a size    all of it: whoever writes a size has done the subtraction
//! ```
//!
//! These rules are for devices that cannot be asked. Of this machine the program asks the system instead: it makes its
//! [`Device`] with [`Device::measured`]. Sizes and names stand in `devices.toml`.

use std::fmt;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use thiserror::Error;

const GIB: u64 = 1 << 30;

/// A device with its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// For people: `RTX 4060`, `M3 Max, 36 GiB`, `this machine`.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Its memory; shared with everything else on CPU and unified devices.
    pub total_bytes: u64,
    /// What a run may use of it.
    pub usable_bytes: u64,
    /// The largest single allocation that its backend makes.
    pub largest_allocation_bytes: u64,
    /// How `usable_bytes` comes about.
    pub rule: String,
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A processor with its main memory: what this version computes on.
    Cpu,
    /// A card of NVIDIA.
    Cuda,
    /// A card of AMD.
    Hip,
    /// Another card.
    Vulkan,
    /// Memory that processor and graphics share, as Apple builds it.
    Unified,
    /// Only a size is known.
    Size,
}

/// What `--device` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// This machine, to be asked by the caller.
    Auto,
    /// A known device.
    Known(Device),
}

/// A name that is no device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is neither a device nor a size")]
pub struct UnknownDevice {
    /// What was written.
    pub text: String,
    /// Names that look like it, the most similar first.
    pub similar: Vec<String>,
}

impl UnknownDevice {
    /// What to write instead.
    pub fn help(&self) -> String {
        let examples = "write for example rtx4060, m3-max-36, cpu-16, 8GiB, or auto for this machine";
        match &self.similar[..] {
            [] => examples.to_owned(),
            similar => format!("did you mean {}? Or {examples}", similar.join(", ")),
        }
    }
}

/// What takes memory on a card beside the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Surroundings {
    Headless,
    Display,
    Windows,
}

/// Reads the value of `--device`: `auto`, a card (`rtx4060`, `RTX 4060`, `4060`, with `-headless`, `-display` or
/// `-windows` for what else is on it), an Apple chip with its memory (`m3-max-36`), another processor with its memory
/// (`cpu-16`), `ryzen-ai-max-128`, `gb10`, or a size (`8GiB`, `8GB`).
///
/// # Errors
/// Anything else, with similar names.
pub fn parse_device(text: &str) -> Result<DeviceChoice, UnknownDevice> {
    let key = normalised(text);
    if key == "auto" {
        return Ok(DeviceChoice::Auto);
    }
    let known = card(&key).or_else(|| apple(&key)).or_else(|| shared(&key)).or_else(|| size(text));
    known
        .map(DeviceChoice::Known)
        .ok_or_else(|| UnknownDevice { text: text.to_owned(), similar: similar(&key) })
}

/// Every card, chip and size that [`parse_device`] knows by name, as it is written there.
pub fn device_names() -> Vec<String> {
    let cards = FILE.card.iter().flat_map(|cards| &cards.names);
    let written = cards.map(|name| name.to_lowercase().replace(' ', "-").replacen("x-", "x", 1));
    let apple = FILE.apple.iter().flat_map(|apple| {
        let chip = apple.chip.to_lowercase().replace(' ', "-");
        apple.gib.iter().map(move |gib| format!("{chip}-{gib}"))
    });
    let shared = ["cpu-8", "cpu-16", "cpu-32", "cpu-64", "ryzen-ai-max-128", "gb10"].map(String::from);
    written.chain(apple).chain(shared).collect()
}

impl Device {
    /// A machine that was asked: its processor with so much memory, of which so much may be used.
    pub fn measured(total_bytes: u64, usable_bytes: u64) -> Self {
        Self {
            name: "this machine".into(),
            kind: DeviceKind::Cpu,
            total_bytes,
            usable_bytes,
            largest_allocation_bytes: usable_bytes,
            rule: "0.9 of what is available now, without the last 1.5 GiB".into(),
        }
    }

    /// Memory of so many bytes, all of it for the run.
    pub fn of_size(bytes: u64) -> Self {
        Self {
            name: crate::format_bytes(bytes),
            kind: DeviceKind::Size,
            total_bytes: bytes,
            usable_bytes: bytes,
            largest_allocation_bytes: bytes,
            rule: "the size as given".into(),
        }
    }

    /// The memory of a run on a processor with `total` bytes of main memory.
    fn cpu(name: String, total: u64) -> Self {
        let available = total.saturating_sub((5 * GIB / 2).max(total / 10));
        Self {
            name,
            kind: DeviceKind::Cpu,
            total_bytes: total,
            usable_bytes: (available / 10 * 9).min(available.saturating_sub(3 * GIB / 2)),
            largest_allocation_bytes: total,
            rule: "the system keeps 2.5 GiB or 10 %, the run leaves 1.5 GiB or 10 % of the rest".into(),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn card(key: &str) -> Option<Device> {
    let suffixes = [
        ("headless", Surroundings::Headless),
        ("display", Surroundings::Display),
        ("windows", Surroundings::Windows),
    ];
    let (key, written) = suffixes
        .into_iter()
        .find_map(|(suffix, kind)| key.strip_suffix(suffix).map(|key| (key, Some(kind))))
        .unwrap_or((key, None));
    let (cards, name) = FILE.card.iter().find_map(|cards| {
        let matches = |name: &&String| {
            let full = normalised(name);
            full == key || without_brand(&full) == key || full.strip_suffix("gb") == Some(key)
        };
        cards.names.iter().find(matches).map(|name| (cards, name))
    })?;
    let total = cards.gib * GIB;
    let surroundings = written.unwrap_or(match cards.headless {
        true => Surroundings::Headless,
        false => Surroundings::Display,
    });
    let (least, hundredths, rule) = match surroundings {
        Surroundings::Headless => (6 * GIB / 10, 3, "without a display: all but 3 %, at least 0.6 GiB"),
        Surroundings::Display => (12 * GIB / 10, 8, "with a display: all but 8 %, at least 1.2 GiB"),
        Surroundings::Windows => (15 * GIB / 10, 10, "under Windows: all but 10 %, at least 1.5 GiB"),
    };
    Some(Device {
        name: name.clone(),
        kind: cards.backend,
        total_bytes: total,
        usable_bytes: total - least.max(total * hundredths / 100),
        // CubeCL's pools give out at most a quarter of the memory at once.
        largest_allocation_bytes: total / 4,
        rule: rule.into(),
    })
}

/// `m3max36`: any chip with any size, sold or not.
fn apple(key: &str) -> Option<Device> {
    let key = key.strip_prefix("apple").unwrap_or(key);
    let with_unit = key.strip_suffix("gib").or_else(|| key.strip_suffix("gb")).unwrap_or(key);
    let (chip, rest) = FILE
        .apple
        .iter()
        .filter_map(|apple| Some((&apple.chip, with_unit.strip_prefix(&normalised(&apple.chip))?)))
        .min_by_key(|(_, rest)| rest.len())?;
    let gib = gib(rest)?;
    let total = gib * GIB;
    Some(Device {
        name: format!("{chip}, {gib} GiB"),
        kind: DeviceKind::Unified,
        total_bytes: total,
        usable_bytes: working_set(total).min(total.saturating_sub(5 * GIB / 2)),
        // A buffer is bound with 32-bit sizes.
        largest_allocation_bytes: (total / 2).min(4 * GIB - 1),
        rule: "two thirds of up to 32 GiB, three quarters of more, and 2.5 GiB for the system".into(),
    })
}

/// What Metal lets a program keep in use, where it cannot be asked. Newer systems allow more.
fn working_set(total: u64) -> u64 {
    if total <= 32 * GIB { total / 3 * 2 } else { total / 4 * 3 }
}

fn shared(key: &str) -> Option<Device> {
    let key = key.strip_suffix("gib").or_else(|| key.strip_suffix("gb")).unwrap_or(key);
    if let Some(rest) = key.strip_prefix("cpu") {
        let gib = gib(rest)?;
        return Some(Device::cpu(format!("a processor with {gib} GiB"), gib * GIB));
    }
    if let Some(rest) = key.strip_prefix("ryzenaimax") {
        let gib = if rest.is_empty() { 128 } else { gib(rest)? };
        let total = gib * GIB;
        return Some(Device {
            name: format!("Ryzen AI Max, {gib} GiB"),
            kind: DeviceKind::Unified,
            total_bytes: total,
            usable_bytes: total / 4 * 3,
            largest_allocation_bytes: total / 4,
            rule: "three quarters: what Windows lets the graphics have".into(),
        });
    }
    let total = 128 * GIB;
    matches!(key, "gb10" | "dgxspark").then(|| Device {
        name: "GB10, 128 GiB".into(),
        kind: DeviceKind::Unified,
        usable_bytes: Device::cpu(String::new(), total).usable_bytes,
        total_bytes: total,
        largest_allocation_bytes: total / 4,
        rule: "as of main memory".into(),
    })
}

fn size(text: &str) -> Option<Device> {
    tune_recipe::parse_bytes(text).map(Device::of_size)
}

/// Whole GiB, at most a million.
fn gib(text: &str) -> Option<u64> {
    (text.len() <= 6).then(|| text.parse().ok()).flatten().filter(|gib| *gib > 0)
}

/// Lower case, only letters, digits and dots.
fn normalised(name: &str) -> String {
    let kept = |c: &char| c.is_ascii_alphanumeric() || *c == '.';
    let name: String = name.to_ascii_lowercase().chars().filter(kept).collect();
    ["nvidia", "geforce", "amd", "intel"]
        .iter()
        .fold(name, |name, maker| name.strip_prefix(maker).map(str::to_owned).unwrap_or(name))
}

/// `rtx4060` → `4060`. What is left must still say which card it is.
fn without_brand(name: &str) -> &str {
    ["rtx", "gtx", "rx", "arc"]
        .iter()
        .find_map(|brand| name.strip_prefix(brand))
        .filter(|rest| rest.len() > 3)
        .unwrap_or(name)
}

/// At most three names like this one.
fn similar(key: &str) -> Vec<String> {
    let mut scored: Vec<(f64, String)> = device_names()
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&normalised(&name), key), name))
        .filter(|(score, _)| *score > 0.85)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    card: Vec<Cards>,
    apple: Vec<AppleChip>,
    #[cfg_attr(not(test), allow(dead_code))]
    working_set: Vec<WorkingSet>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cards {
    gib: u64,
    backend: DeviceKind,
    #[serde(default)]
    headless: bool,
    names: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AppleChip {
    chip: String,
    gib: Vec<u64>,
}

/// Kept to check the rule by.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(not(test), allow(dead_code))]
struct WorkingSet {
    gib: u64,
    older: u64,
    newer: u64,
}

/// The embedded text is part of the program, and the tests below read it: a fault cannot reach a user.
#[allow(clippy::expect_used)]
static FILE: LazyLock<File> = LazyLock::new(|| {
    toml::from_str(include_str!("../devices.toml")).expect("the embedded devices are valid")
});

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn device(text: &str) -> Device {
        match parse_device(text) {
            Ok(DeviceChoice::Known(device)) => device,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn a_card_in_every_spelling() {
        for spelling in ["rtx4060", "RTX 4060", "rtx-4060", "4060", "NVIDIA GeForce RTX 4060", "rtx_4060"] {
            assert_eq!(device(spelling).name, "RTX 4060", "{spelling}");
        }
        assert_eq!(device("rtx4060ti-16").name, "RTX 4060 Ti 16GB");
        assert_eq!(device("4060 ti 16gb").total_bytes, 16 << 30);
        assert_eq!(device("4060ti").total_bytes, 8 << 30);
        assert_eq!(device("rtx3080-12gb").total_bytes, 12 << 30);
        assert_eq!(device("7900xtx").kind, DeviceKind::Hip);
        assert_eq!(device("a100").total_bytes, 40 << 30);
        assert_eq!(device("a100-80").total_bytes, 80 << 30);
        assert_eq!(device("arc b580").kind, DeviceKind::Vulkan);
    }

    #[test]
    fn every_name_is_found_by_itself() {
        let mut seen = BTreeSet::new();
        for name in device_names() {
            device(&name);
            assert!(seen.insert(normalised(&name)), "{name} stands twice");
        }
        for cards in &FILE.card {
            for name in &cards.names {
                assert_eq!(device(name).total_bytes, cards.gib << 30, "{name}");
            }
        }
        for sold in &FILE.apple {
            for gib in &sold.gib {
                assert_eq!(device(&format!("{} {gib}", sold.chip)).total_bytes, gib << 30);
            }
        }
    }

    #[test]
    fn what_is_usable_of_a_card() {
        let usable = |text| device(text).usable_bytes as f64 / GIB as f64;
        assert!((usable("rtx4060-headless") - 7.4).abs() < 0.001);
        assert!((usable("rtx4060") - 6.8).abs() < 0.001);
        assert!((usable("rtx4060:windows") - 6.5).abs() < 0.001);
        assert!((usable("rtx4090") - 24.0 * 0.92).abs() < 0.001);
        assert!((usable("h100") - 80.0 * 0.97).abs() < 0.001, "a card of a server shows no picture");
        assert!((usable("h100-windows") - 72.0).abs() < 0.001);
        assert_eq!(device("rtx4060").largest_allocation_bytes, 2 << 30);
    }

    #[test]
    fn what_is_usable_of_an_apple() {
        let m3 = device("m3-max-36");
        assert_eq!((m3.kind, m3.usable_bytes), (DeviceKind::Unified, 27 << 30));
        assert_eq!(device("M3 Max 36GB"), m3);
        assert_eq!(device("m1-8").name, "M1, 8 GiB");
        assert_eq!(device("m4 pro 24").usable_bytes, 16 << 30);
        // 8 GiB: 5.33 by the working set, 5.5 by what the system keeps.
        assert_eq!(device("m1-8").usable_bytes, (8 << 30) / 3 * 2);
    }

    #[test]
    fn the_rule_for_apple_never_exceeds_what_systems_allow() {
        for set in &FILE.working_set {
            let hundredths = working_set(set.gib << 30) * 100 / GIB;
            assert!(hundredths <= set.older + 1, "{} GiB", set.gib);
            assert!(set.newer == 0 || set.newer > set.older, "{} GiB", set.gib);
        }
    }

    #[test]
    fn processors_and_sizes() {
        assert_eq!(device("8GiB").usable_bytes, 8 << 30);
        assert_eq!(device("8GB").usable_bytes, 8_000_000_000);
        assert_eq!(device("cpu-8").usable_bytes, 4 << 30);
        assert_eq!(device("cpu 64GB").usable_bytes, (64 * GIB - 64 * GIB / 10) / 10 * 9);
        assert_eq!(device("gb10").total_bytes, 128 << 30);
        assert_eq!(device("ryzen-ai-max-128").usable_bytes, 96 << 30);
        assert_eq!(parse_device("auto"), Ok(DeviceChoice::Auto));
        for name in device_names() {
            let device = device(&name);
            assert!(device.usable_bytes > 0 && device.usable_bytes < device.total_bytes, "{name}");
        }
    }

    #[test]
    fn a_typo_finds_its_neighbours() {
        let similar = |text: &str| parse_device(text).expect_err("no device").similar;
        assert_eq!(similar("rtx4061")[0], "rtx4060");
        assert!(similar("m3-mx-36").contains(&"m3-max-36".to_owned()));
        assert!(similar("big").is_empty());
        for nothing in ["", "m3", "m3-max", "m3-max-0", "cpu", "rtx", "ti", "m3-max-99999999"] {
            assert!(parse_device(nothing).is_err(), "{nothing:?}");
        }
    }
}
