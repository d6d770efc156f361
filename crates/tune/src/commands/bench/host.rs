//! What a measurement was made on and with.

use std::fmt;

use serde::Serialize;

/// The program and the machine, the same in every report.
#[derive(Serialize)]
pub struct Host {
    engine: &'static str,
    /// Of the program.
    pub version: &'static str,
    /// It was built from.
    pub commit: &'static str,
    /// What it runs on.
    pub machine: Machine,
    /// Threads that compute.
    pub threads: usize,
}

/// A processor.
#[derive(Serialize)]
pub struct Machine {
    /// Its own name.
    pub cpu: String,
    cores: usize,
    features: Vec<&'static str>,
}

impl Host {
    /// This program on this machine, computing with the threads of the global pool.
    pub fn new() -> Self {
        Self::with_threads(rayon::current_num_threads())
    }

    /// This program on this machine, computing with `threads` threads.
    pub fn with_threads(threads: usize) -> Self {
        Self {
            engine: "tune",
            version: env!("CARGO_PKG_VERSION"),
            commit: git_version::git_version!(
                args = ["--always", "--exclude=*", "--abbrev=12", "--dirty=-modified"],
                fallback = "unknown"
            ),
            machine: Machine { cpu: cpu(), cores: cores(), features: features() },
            threads,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, cores, features } = &self.machine;
        writeln!(f, "machine     {cpu}, {cores} cores ({})", features.join(" "))?;
        writeln!(
            f,
            "program     {} {} ({}), {} threads",
            self.engine, self.version, self.commit, self.threads
        )
    }
}

/// Logical processors that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The processor's own name on Linux, else its architecture.
fn cpu() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_string()
}

/// Instruction sets that decide which kernels run.
fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let known = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
    ];
    #[cfg(target_arch = "aarch64")]
    let known = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
        ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let known: [(&str, bool); 0] = [];
    known.into_iter().filter_map(|(name, there)| there.then_some(name)).collect()
}
