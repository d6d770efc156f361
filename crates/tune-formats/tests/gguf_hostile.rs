//! GGUF files with mutated bytes: an error or a consistent file, never a panic and never an absurd allocation.

mod tiny;

use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use tune_formats::gguf::GgufFile;
use tune_formats::open;

static MODEL: LazyLock<Vec<u8>> = LazyLock::new(tiny::model_bytes);

/// One change to a file.
#[derive(Clone, Debug)]
enum Mutation {
    Overwrite(usize, Vec<u8>),
    Remove(usize, usize),
    Insert(usize, Vec<u8>),
    Truncate(usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    // Headers are short beside data: aim at them.
    let place = 0..MODEL.len().min(2500);
    let integer =
        prop_oneof![any::<u64>(), Just(u64::MAX), Just(i64::MAX as u64), Just(1_u64 << 32), 0_u64..100,];
    prop_oneof![
        (place.clone(), prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(at, with)| Mutation::Overwrite(at, with)),
        (place.clone(), integer).prop_map(|(at, with)| Mutation::Overwrite(at, with.to_le_bytes().into())),
        (place.clone(), 1..64_usize).prop_map(|(at, count)| Mutation::Remove(at, count)),
        (place, prop::collection::vec(any::<u8>(), 1..32)).prop_map(|(at, with)| Mutation::Insert(at, with)),
        (0..MODEL.len()).prop_map(Mutation::Truncate),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: Mutation) {
    match mutation {
        Mutation::Overwrite(at, with) => {
            for (offset, byte) in with.into_iter().enumerate() {
                if let Some(place) = bytes.get_mut(at + offset) {
                    *place = byte;
                }
            }
        }
        Mutation::Remove(at, count) => {
            let at = at.min(bytes.len());
            bytes.drain(at..bytes.len().min(at + count));
        }
        Mutation::Insert(at, with) => {
            let at = at.min(bytes.len());
            bytes.splice(at..at, with);
        }
        Mutation::Truncate(len) => bytes.truncate(len),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn mutated_files_never_panic(mutations in prop::collection::vec(mutation(), 1..4)) {
        let mut bytes = MODEL.clone();
        for mutation in mutations {
            mutate(&mut bytes, mutation);
        }
        let len = bytes.len();
        if let Ok(file) = GgufFile::from_bytes(Path::new("tiny.gguf"), bytes) {
            let total: usize = file.tensors().iter().map(|tensor| file.data(tensor).expect("inside").len()).sum();
            prop_assert!(total <= len);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn mutated_models_are_refused_or_whole(mutation in mutation()) {
        let mut bytes = MODEL.clone();
        mutate(&mut bytes, mutation);
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("tiny.gguf");
        std::fs::write(&path, bytes).expect("written");
        if let Ok(base) = open(&path) {
            let mut row = vec![0.0; 4 * tiny::D_FF];
            for name in base.weights.names() {
                if base.weights.shape(&name).expect("shape").len() == 1 {
                    base.weights.vector(&name).expect("vector");
                    continue;
                }
                let matrix = base.weights.matrix(&name).expect("matrix");
                row.resize(matrix.cols(), 0.0);
                (0..matrix.rows()).for_each(|r| matrix.decode_row(r, &mut row));
            }
        }
    }
}
