//! What the CPU kernels share: matrix products, buffers, vectorised loops, and access to flex tensors.
//!
//! Kernels work on plain slices. A loop written inside [`vectorised!`] is compiled once for the baseline of the
//! target and again for AVX2 and AVX-512, and the widest version that the processor has is chosen at run time.
//! No version uses fused multiply-add, so they all give the same bits. The exception is [`matvec`], whose loops are
//! written for each instruction set.

mod buffer;
mod flex;
mod instruction_set;
mod math;
mod matmul;
mod matvec;
mod panels;
mod prefetch;
mod team;

pub(crate) use buffer::{Buffer, SharedSlots, Unwritten, Value, as_slots, with_buffers, with_scratch};
pub(crate) use flex::{contiguous, from_values, values};
pub(crate) use instruction_set::InstructionSet;
pub(crate) use math::{
    LANES, add_lanes, dot, dot3, exp, exp_sum, exp2_for_bf16, max, scale_in_place, sum_of_exp,
};
pub(crate) use matmul::{Target, Threads, View, ViewMut, multiply, multiply_add};
pub(crate) use panels::{for_each_panel, panel_rows, times, times_transposed};
pub(crate) use prefetch::{prefetch, prefetch_part};
pub use team::on_pool;
pub(crate) use team::{for_each, map};

/// Compiles a function for the baseline, for AVX2 and for AVX-512, and calls the best one at run time.
macro_rules! vectorised {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    )+) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                match $crate::cpu::InstructionSet::best() {
                    // SAFETY: the processor has every feature that the function is compiled for.
                    #[allow(unsafe_code)]
                    $crate::cpu::InstructionSet::Avx512 | $crate::cpu::InstructionSet::Amx => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    $crate::cpu::InstructionSet::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::InstructionSet::Portable => {}
                }
            }
            portable($($arg),*)
        }
    )+};
}
pub(crate) use vectorised;
