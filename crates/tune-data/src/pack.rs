//! Filling rows of bounded length: first-fit decreasing within windows of the drawn order.

/// Samples that are packed together; longer windows fill better but follow the drawn order less.
const WINDOW: usize = 1024;

/// Rows of positions whose lengths add up to at most `capacity` each. Every position of `order` is in one row.
///
/// A sample longer than `capacity` gets a row of its own.
pub(crate) fn pack(order: &[usize], len: impl Fn(usize) -> usize, capacity: usize) -> Vec<Vec<usize>> {
    let mut rows = Vec::new();
    for window in order.chunks(WINDOW) {
        let mut longest_first = window.to_vec();
        // stable: equal lengths keep the drawn order
        longest_first.sort_by_key(|&index| std::cmp::Reverse(len(index)));
        let mut filled: Vec<(usize, Vec<usize>)> = Vec::new();
        for index in longest_first {
            let len = len(index);
            match filled.iter_mut().find(|(used, _)| used + len <= capacity) {
                Some((used, row)) => {
                    *used += len;
                    row.push(index);
                }
                None => filled.push((len, vec![index])),
            }
        }
        rows.extend(filled.into_iter().map(|(_, row)| row));
    }
    rows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_are_filled_tightly() {
        let lengths = [7, 3, 5, 5, 9, 1];
        assert_eq!(pack(&[0, 1, 2, 3, 4, 5], |i| lengths[i], 10), [vec![4, 5], vec![0, 1], vec![2, 3]]);
    }

    proptest! {
        #[test]
        fn every_sample_is_in_one_row_that_fits(lengths in proptest::collection::vec(1usize..=64, 0..3000)) {
            let order: Vec<usize> = (0..lengths.len()).rev().collect();
            let rows = pack(&order, |i| lengths[i], 64);
            for row in &rows {
                prop_assert!(row.iter().map(|&i| lengths[i]).sum::<usize>() <= 64);
            }
            let mut all = rows.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            // no two rows of one window that would fit into one
            let total: usize = lengths.iter().sum();
            prop_assert!(rows.len() <= total.div_ceil(32) + lengths.len().div_ceil(WINDOW));
        }
    }
}
