//! Multiplying and adding with everything in registers: nothing on the machine can compute faster.
//!
//! Each loop keeps as many sums as the latency of the instruction times its ports asks for, and as fit in registers.
//! They begin with different values, or the compiler could compute one of them for all.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Short enough to fall between interruptions.
const SLICE: Duration = Duration::from_millis(10);
const SLICES: usize = 40;

/// A loop that only computes.
#[derive(Clone, Copy)]
pub struct Loop {
    /// What it repeats.
    pub instruction: &'static str,
    /// Floating-point operations of one round.
    flop: u64,
    /// Does so many rounds and returns a number that depends on all of them.
    run: fn(u64) -> f32,
}

impl Loop {
    /// The widest f32 multiply-add of this processor.
    pub fn f32() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self { instruction: "AVX-512 FMA", flop: x86::AVX512_FMA_FLOP, run: x86::avx512_fma };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self { instruction: "AVX2 FMA", flop: x86::AVX2_FMA_FLOP, run: x86::avx2_fma };
            }
        }
        Self { instruction: "compiled for the target", flop: PORTABLE_FLOP, run: portable }
    }

    /// The fastest bf16 product of this processor, where it has one.
    pub fn bf16() -> Option<Self> {
        Self::bf16_tiles().or_else(Self::bf16_dot_product)
    }

    /// The bf16 dot product, where the processor has one.
    pub fn bf16_dot_product() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
            return Some(Self {
                instruction: "AVX-512 BF16 dot product",
                flop: x86::AVX512_BF16_FLOP,
                run: x86::avx512_bf16,
            });
        }
        None
    }

    /// Products of tiles of bf16, where the processor has them and the system allows them.
    pub fn bf16_tiles() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if tune_kernels::bf16::has_tiles() {
            return Some(Self {
                instruction: "AMX BF16 tiles",
                flop: x86::AMX_BF16_FLOP,
                run: x86::amx_bf16,
            });
        }
        None
    }
}

/// 10⁹ floating-point operations a second of `threads` threads together: the sum of each one's best slice while all
/// of them run.
pub fn best_gflops(work: Loop, threads: usize) -> f64 {
    let rounds = rounds_of_a_slice(work);
    let together = Barrier::new(threads);
    let best = || {
        together.wait();
        let slices = (0..SLICES).map(|_| seconds(work, rounds));
        (work.flop * rounds) as f64 * 1e-9 / slices.fold(f64::INFINITY, f64::min)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(best)).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).sum()
    })
}

fn rounds_of_a_slice(work: Loop) -> u64 {
    let mut rounds = 1 << 10;
    loop {
        let seconds = seconds(work, rounds);
        if seconds >= SLICE.as_secs_f64() / 4.0 {
            return (rounds as f64 * SLICE.as_secs_f64() / seconds).ceil() as u64;
        }
        rounds *= 2;
    }
}

fn seconds(work: Loop, rounds: u64) -> f64 {
    let start = Instant::now();
    black_box((work.run)(black_box(rounds)));
    start.elapsed().as_secs_f64()
}

const PORTABLE_SUMS: usize = 48;
const PORTABLE_FLOP: u64 = PORTABLE_SUMS as u64 * 2;

/// Vectorised by the compiler for the baseline of the target; on aarch64 with NEON multiply-adds.
fn portable(rounds: u64) -> f32 {
    let (x, y) = (black_box(1.000_1_f32), black_box(0.999_9_f32));
    let mut sums: [f32; PORTABLE_SUMS] = std::array::from_fn(|i| i as f32);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                x.mul_add(y, *sum)
            } else {
                x * y + *sum
            };
        }
    }
    sums.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_cvtss_f32, _mm256_fmadd_ps, _mm256_set1_ps, _mm512_add_ps, _mm512_cvtne2ps_pbh,
        _mm512_cvtss_f32, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_set1_ps,
    };
    use std::hint::black_box;

    const AVX512_SUMS: usize = 16;
    const AVX2_SUMS: usize = 12;

    /// 16 lanes, a multiplication and an addition each.
    pub(super) const AVX512_FMA_FLOP: u64 = AVX512_SUMS as u64 * 16 * 2;
    /// 16 lanes, two multiplications and two additions each.
    pub(super) const AVX512_BF16_FLOP: u64 = AVX512_SUMS as u64 * 16 * 4;
    /// Four tiles of 16 × 16 sums, of 32 multiplications and additions each.
    pub(super) const AMX_BF16_FLOP: u64 = 4 * 16 * 16 * 32 * 2;
    /// 8 lanes, a multiplication and an addition each.
    pub(super) const AVX2_FMA_FLOP: u64 = AVX2_SUMS as u64 * 8 * 2;

    #[allow(unsafe_code)]
    pub(super) fn avx512_fma(rounds: u64) -> f32 {
        #[target_feature(enable = "avx512f")]
        fn run(rounds: u64) -> f32 {
            let (x, y) = (_mm512_set1_ps(black_box(1.000_1)), _mm512_set1_ps(black_box(0.999_9)));
            let mut sums: [_; AVX512_SUMS] = std::array::from_fn(|i| _mm512_set1_ps(i as f32));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(x, y, *sum);
                }
            }
            _mm512_cvtss_f32(sums.into_iter().fold(x, |all, sum| _mm512_add_ps(all, sum)))
        }
        // SAFETY: chosen only where the processor has AVX-512 F.
        unsafe { run(rounds) }
    }

    #[allow(unsafe_code)]
    pub(super) fn avx512_bf16(rounds: u64) -> f32 {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn run(rounds: u64) -> f32 {
            let (x, y) = (_mm512_set1_ps(black_box(1.000_1)), _mm512_set1_ps(black_box(0.999_9)));
            let (x16, y16) = (_mm512_cvtne2ps_pbh(x, x), _mm512_cvtne2ps_pbh(y, y));
            let mut sums: [_; AVX512_SUMS] = std::array::from_fn(|i| _mm512_set1_ps(i as f32));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, x16, y16);
                }
            }
            _mm512_cvtss_f32(sums.into_iter().fold(x, |all, sum| _mm512_add_ps(all, sum)))
        }
        // SAFETY: chosen only where the processor has AVX-512 F and AVX-512 BF16.
        unsafe { run(rounds) }
    }

    /// The first of all sums.
    #[allow(unsafe_code)]
    pub(super) fn amx_bf16(rounds: u64) -> f32 {
        /// The shapes of the tile registers, all of 16 rows of 64 bytes.
        #[repr(C, align(64))]
        struct Shapes([u8; 64]);

        let mut shapes = Shapes([0; 64]);
        shapes.0[0] = 1;
        for tile in 0..8 {
            shapes.0[16 + 2 * tile] = 64;
            shapes.0[48 + tile] = 16;
        }
        let factors = [0x3F80_3F80_u32; 256]; // ones
        let mut sums = [0.0_f32; 256];
        // SAFETY: chosen only where the processor and the system have tiles. The factors and the sums are 16 rows of
        // 64 bytes each; all registers that are written are named.
        unsafe {
            asm!(
                "ldtilecfg [{shapes}]",
                "tileloadd tmm4, [{factors} + {stride}]",
                "tileloadd tmm5, [{factors} + {stride}]",
                "tileloadd tmm6, [{factors} + {stride}]",
                "tileloadd tmm7, [{factors} + {stride}]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilestored [{sums} + {stride}], tmm0",
                "tilerelease",
                shapes = in(reg) &raw const shapes,
                factors = in(reg) factors.as_ptr(),
                sums = in(reg) sums.as_mut_ptr(),
                stride = in(reg) 64_usize,
                rounds = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        sums[0]
    }

    #[allow(unsafe_code)]
    pub(super) fn avx2_fma(rounds: u64) -> f32 {
        #[target_feature(enable = "avx2,fma")]
        fn run(rounds: u64) -> f32 {
            let (x, y) = (_mm256_set1_ps(black_box(1.000_1)), _mm256_set1_ps(black_box(0.999_9)));
            let mut sums: [_; AVX2_SUMS] = std::array::from_fn(|i| _mm256_set1_ps(i as f32));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(x, y, *sum);
                }
            }
            _mm256_cvtss_f32(sums.into_iter().fold(x, |all, sum| _mm256_add_ps(all, sum)))
        }
        // SAFETY: chosen only where the processor has AVX2 and FMA.
        unsafe { run(rounds) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sum grows by about 1 a round, or by 2 with the dot product of pairs: half of the operations counted for it.
    #[test]
    fn each_loop_adds_what_it_counts() {
        let rounds = 4096;
        let portable = Loop { instruction: "", flop: PORTABLE_FLOP, run: portable };
        assert_near((portable.run)(rounds), rounds * PORTABLE_FLOP / 2);
        let lanes = |work: Loop| if work.instruction.starts_with("AVX-512") { 16 } else { 8 };
        if let Some(work) = Loop::bf16_tiles() {
            // one element of the first of four tiles
            assert_near((work.run)(rounds), rounds * work.flop / 2 / 4 / 256);
        }
        for work in [Some(Loop::f32()), Loop::bf16_dot_product()].into_iter().flatten() {
            if work.instruction.starts_with("AVX") {
                // the first lane of all sums
                assert_near((work.run)(rounds), rounds * work.flop / 2 / lanes(work));
            }
        }
    }

    fn assert_near(got: f32, want: u64) {
        let want = want as f32;
        assert!((got - want).abs() < 0.02 * want, "got {got}, want {want}");
    }
}
