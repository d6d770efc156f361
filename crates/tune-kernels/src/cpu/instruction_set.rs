//! The instructions that the kernels of this crate use, chosen when the program runs.

use std::sync::OnceLock;

/// From narrow to wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum InstructionSet {
    /// What the program was compiled for.
    Portable,
    /// AVX2, FMA and F16C, which came with it.
    Avx2,
    /// AVX-512 F, BW, DQ and VL as well.
    Avx512,
    /// Products of `bf16` as well, and of tiles of them (AMX).
    Amx,
}

impl InstructionSet {
    /// The widest that this processor has, or a narrower one that `TUNE_CPU` names (`portable`, `avx2`,
    /// `avx512`): to measure and to test what other processors run.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<InstructionSet> = OnceLock::new();
        *BEST.get_or_init(|| {
            let most = match std::env::var("TUNE_CPU").as_deref() {
                Ok("portable") => Self::Portable,
                Ok("avx2") => Self::Avx2,
                Ok("avx512") => Self::Avx512,
                _ => Self::Amx,
            };
            Self::widest().min(most)
        })
    }

    /// [`best`](Self::best) and all that are narrower, the widest first.
    #[cfg(test)]
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        [Self::Amx, Self::Avx512, Self::Avx2, Self::Portable].into_iter().filter(|set| *set <= Self::best())
    }

    fn widest() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            match (avx512, avx2) {
                (true, true) if is_x86_feature_detected!("avx512bf16") && amx::is_allowed() => Self::Amx,
                (true, true) => Self::Avx512,
                (false, true) => Self::Avx2,
                (_, false) => Self::Portable,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::Portable
    }
}

#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    /// Whether the processor multiplies tiles of `bf16`, and the system lets this process use them.
    pub(super) fn is_allowed() -> bool {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        let has_tiles = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES;
        has_tiles && is_granted()
    }

    /// Linux saves the tiles of a process only after it has been asked to, since a signal then needs more of the
    /// stack (Documentation/arch/x86/xstate.rst).
    #[cfg(target_os = "linux")]
    fn is_granted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: the request takes two numbers and touches no memory of this process.
        #[allow(unsafe_code)]
        unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn is_granted() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    /// Runs all other tests of this crate once more for each narrower set.
    #[test]
    fn every_instruction_set_passes_the_tests() {
        if std::env::var_os("TUNE_CPU").is_some() {
            return;
        }
        let tests = std::env::current_exe().expect("path of the tests");
        for narrower in ["avx512", "avx2", "portable"] {
            let run = std::process::Command::new(&tests).env("TUNE_CPU", narrower).output().expect("starts");
            assert!(run.status.success(), "{narrower}: {}", String::from_utf8_lossy(&run.stdout));
        }
    }
}
