//! The allocator of large blocks under a whole program. One test: the count is the process's.

use tune_memory::{Blocks, blocks_in_use, end_phase, phase_peaks, resident_bytes, return_free_memory};

#[global_allocator]
static BLOCKS: Blocks = Blocks;

const MIB: usize = 1 << 20;

fn filled(len: usize, value: u8) -> Vec<u8> {
    let block = vec![value; len];
    assert!(block.iter().all(|byte| *byte == value));
    block
}

/// Blocks of any order and size: what is in use is counted, what is kept is bounded by it, contents stay.
#[cfg(target_os = "linux")]
fn blocks_are_counted_kept_and_bounded() {
    let none = blocks_in_use();
    let (a, b) = (filled(3 * MIB, 1), filled(5 * MIB, 2));
    assert_eq!(blocks_in_use() - none, 8 * MIB as u64);
    drop(a);
    assert_eq!(blocks_in_use() - none, 5 * MIB as u64);
    end_phase("two");

    // The kept 3 MiB are taken by a part of them, and what is left of them grows.
    let before = resident_bytes().expect("known");
    let (c, d) = (filled(MIB, 3), filled(2 * MIB + 100, 4));
    assert!(c.iter().all(|byte| *byte == 3) && b.iter().all(|byte| *byte == 2) && d[2 * MIB + 99] == 4);
    let more = resident_bytes().expect("known").saturating_sub(before);
    assert!(more <= 300 << 10, "{more} more bytes are resident");

    // Zeroed memory is zero, fresh and kept, in full and in part.
    drop((b, d));
    for len in [MIB, 5 * MIB, 6 * MIB, 64 << 10, 7 * MIB + 5] {
        let zeros = vec![0u8; len];
        assert!(zeros.iter().all(|byte| *byte == 0), "{len}");
        drop(filled(len, 9));
    }

    // A vector that grows keeps its values and is one block.
    let mut grows: Vec<u64> = Vec::new();
    grows.extend(0..2_000_000);
    grows.shrink_to_fit();
    assert!(grows.iter().zip(0..).all(|(got, want)| *got == want));
    assert_eq!(blocks_in_use() - none, (16_000_000usize.next_multiple_of(4096) + MIB) as u64);
    drop(grows);

    // Hundreds of sizes one after the other and at once: resident memory does not go beyond the most in use.
    let most = 40 * MIB;
    drop(filled(most, 5));
    let before = resident_bytes().expect("known");
    for round in 0..50usize {
        let blocks: Vec<_> = (0..8).map(|i| filled(64 << 10 << ((i * 7 + round * 3) % 7), i as u8)).collect();
        assert!(blocks.iter().enumerate().all(|(i, block)| block.iter().all(|byte| *byte == i as u8)));
    }
    let now = resident_bytes().expect("known");
    assert!(now <= before + MIB as u64, "{now} after {before}");

    // What is kept goes back on request.
    return_free_memory();
    let kept = resident_bytes().expect("known");
    assert!(kept + 30 * MIB as u64 <= now, "{kept} of {now}");

    end_phase("many");
    drop(c);
    assert_eq!(blocks_in_use(), none);
    end_phase("two");
    let peaks = phase_peaks();
    assert_eq!(peaks.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["two", "many"]);
    assert_eq!(peaks[0].1 - none, 8 * MIB as u64);
    assert!(peaks[1].1 >= most as u64);
}

/// Several threads take and free blocks at once.
fn threads_do_not_share_blocks() {
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            scope.spawn(move || {
                for round in 0..200usize {
                    let mut blocks: Vec<_> =
                        (1..5).map(|i| filled((64 << 10) * i * (1 + round % 5), thread)).collect();
                    blocks.remove(round % 4);
                    assert!(blocks.iter().all(|block| block.iter().all(|byte| *byte == thread)));
                }
            });
        }
    });
}

#[test]
fn the_allocator_of_a_program() {
    #[cfg(target_os = "linux")]
    blocks_are_counted_kept_and_bounded();
    threads_do_not_share_blocks();
}
