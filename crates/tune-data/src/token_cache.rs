//! Tokenised rows, kept between runs.
//!
//! An entry is named after everything that its tokens depend on: the tokenizer, the template, the options, the bytes of
//! the data files, and the program itself. It is a file of its SHA-256 and of safetensors, and holds the user's data:
//! only the user can read it. A file that is damaged counts as absent. Nothing here is ever an error: rows that cannot
//! be kept are tokenised again.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::NamedTempFile;

use crate::fingerprint::{Fingerprint, sha256};
use crate::load::{read, tokenise};
use crate::{ChatTemplate, DataError, DataSource, Dataset, LoadOptions, Origin, Report, Sample, Tokenizer};

/// What all entries may hold together, in bytes: about two hundred million tokens.
const LIMIT: u64 = 1 << 30;

/// Length of the checksum in front of an entry.
const CHECKSUM: usize = 32;

/// A folder of tokenised rows. Beyond 1 GiB, entries that were not used for the longest time are removed.
#[derive(Clone, Debug)]
pub struct TokenCache {
    folder: PathBuf,
    limit: u64,
}

impl TokenCache {
    /// A cache in `folder`, which is made when it is first needed and should hold nothing else.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), limit: LIMIT }
    }

    /// [`crate::load`], without its work where the same was loaded before.
    ///
    /// # Errors
    /// Those of [`crate::load`].
    pub fn load(
        &self,
        sources: &[DataSource],
        options: &LoadOptions,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        model: &str,
    ) -> Result<Dataset, DataError> {
        let contents = read(sources)?;
        let Some(key) = key(sources, &contents, options, tokenizer, template) else {
            return tokenise(sources, contents, options, tokenizer, template, model);
        };
        if let Some(dataset) = self.get(&key, sources) {
            return Ok(dataset);
        }
        let dataset = tokenise(sources, contents, options, tokenizer, template, model)?;
        // a full disk or a folder that cannot be written costs the next run some time, nothing else
        let _ = self.put(&key, &dataset);
        Ok(dataset)
    }

    fn get(&self, key: &str, sources: &[DataSource]) -> Option<Dataset> {
        let path = self.path(key);
        let bytes = fs::read(&path).ok()?;
        let dataset = decoded(&bytes, sources)?;
        // entries are removed by the time of their last use; without the right to say so they go earlier
        let _ =
            File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(dataset)
    }

    fn put(&self, key: &str, dataset: &Dataset) -> io::Result<()> {
        let bytes = encoded(dataset)?;
        let size = (bytes.len() + CHECKSUM) as u64;
        if size > self.limit {
            return Ok(());
        }
        make_private_folder(&self.folder)?;
        self.make_room(size)?;
        // only the user can read a temporary file
        let mut file = NamedTempFile::new_in(&self.folder)?;
        file.write_all(&sha256(&bytes))?;
        file.write_all(&bytes)?;
        file.as_file().sync_all()?;
        file.persist(self.path(key))?;
        Ok(())
    }

    /// Removes the entries of the longest disuse until `size` more bytes are within the limit.
    fn make_room(&self, size: u64) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_file() {
                files.push((metadata.modified()?, entry.path(), metadata.len()));
            }
        }
        files.sort_unstable();
        let mut total: u64 = files.iter().map(|(.., len)| len).sum();
        for (_, path, len) in files {
            if total + size <= self.limit {
                break;
            }
            fs::remove_file(path)?;
            total -= len;
        }
        Ok(())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.tokens"))
    }
}

/// Everything that the tokens depend on; `None` where that is not known.
fn key(
    sources: &[DataSource],
    contents: &[Vec<u8>],
    options: &LoadOptions,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Option<String> {
    let template = match template {
        Some(template) => Some(template.fingerprint()?),
        None => None,
    };
    // another build may render, mask or cut differently
    let program = std::env::current_exe().and_then(fs::metadata).ok()?;
    let mut print = Fingerprint::new();
    print.value(&(env!("CARGO_PKG_VERSION"), program.len(), program.modified().ok()?));
    print.part(&tokenizer.fingerprint()).value(&template).value(options);
    for (DataSource { path: _, format, train_on }, bytes) in sources.iter().zip(contents) {
        print.value(&(format, train_on)).part(bytes);
    }
    Some(print.finish().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A folder that only the user can look into.
fn make_private_folder(folder: &Path) -> io::Result<()> {
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// Samples end to end: ids and mask of all tokens; length, file and line of each sample; lengths of the rows.
fn encoded(dataset: &Dataset) -> io::Result<Vec<u8>> {
    let Dataset { samples, origins, report } = dataset;
    let ids: Vec<_> =
        samples.iter().flat_map(|sample| &sample.input_ids).map(|id| id.to_le_bytes()).collect();
    let trained: Vec<u8> =
        samples.iter().flat_map(|sample| &sample.trained).map(|on| u8::from(*on)).collect();
    let numbers = |numbers: &mut dyn Iterator<Item = usize>| -> Vec<_> {
        numbers.map(|number| (number as u64).to_le_bytes()).collect()
    };
    let lengths = numbers(&mut samples.iter().map(Sample::len));
    let files = numbers(&mut origins.iter().map(|origin| origin.source));
    let lines = numbers(&mut origins.iter().map(|origin| origin.line));
    let row_counts = numbers(&mut report.sources.iter().map(|source| source.lengths.len()));
    let rows = numbers(&mut report.sources.iter().flat_map(|source| source.lengths.iter().copied()));
    let tensors = [
        ("ids", Dtype::U32, ids.len(), ids.as_flattened()),
        ("trained", Dtype::U8, trained.len(), &trained),
        ("lengths", Dtype::U64, lengths.len(), lengths.as_flattened()),
        ("files", Dtype::U64, files.len(), files.as_flattened()),
        ("lines", Dtype::U64, lines.len(), lines.as_flattened()),
        ("row_counts", Dtype::U64, row_counts.len(), row_counts.as_flattened()),
        ("rows", Dtype::U64, rows.len(), rows.as_flattened()),
    ];
    let tensors: Result<Vec<_>, _> = tensors
        .into_iter()
        .map(|(name, dtype, len, bytes)| Ok((name, TensorView::new(dtype, vec![len], bytes)?)))
        .collect();
    let report = serde_json::to_string(report)?;
    tensors
        .and_then(|tensors| {
            safetensors::serialize(tensors, Some(HashMap::from([("report".to_owned(), report)])))
        })
        .map_err(io::Error::other)
}

/// `None` for a damaged file. The files of the report are those of `sources`.
fn decoded(bytes: &[u8], sources: &[DataSource]) -> Option<Dataset> {
    let (checksum, bytes) = bytes.split_at_checked(CHECKSUM)?;
    if sha256(bytes) != checksum {
        return None;
    }
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    let mut report: Report = serde_json::from_str(header.metadata().as_ref()?.get("report")?).ok()?;
    let tensors = SafeTensors::deserialize(bytes).ok()?;
    let numbers = |name| {
        let (numbers, _) = tensors.tensor(name).ok()?.data().as_chunks();
        Some(numbers.iter().map(|number| u64::from_le_bytes(*number) as usize))
    };
    let (ids, _) = tensors.tensor("ids").ok()?.data().as_chunks();
    let mut ids = ids.iter().map(|id| u32::from_le_bytes(*id));
    let trained = tensors.tensor("trained").ok()?;
    let mut trained = trained.data().iter().map(|on| *on == 1);
    let mut sample = |len| Sample {
        input_ids: ids.by_ref().take(len).collect(),
        trained: trained.by_ref().take(len).collect(),
    };
    let samples: Vec<Sample> = numbers("lengths")?.map(&mut sample).collect();
    let origins: Vec<_> =
        numbers("files")?.zip(numbers("lines")?).map(|(source, line)| Origin { source, line }).collect();
    let mut rows = numbers("rows")?;
    let mut row_counts = numbers("row_counts")?;
    for (report, source) in report.sources.iter_mut().zip(sources) {
        report.path.clone_from(&source.path);
        report.lengths = rows.by_ref().take(row_counts.next()?).collect();
    }
    Some(Dataset { samples, origins, report })
}

#[cfg(test)]
mod tests {
    use tune_formats::{SpecialTokens, TokenizerFiles};

    use super::*;
    use crate::{Clock, Overlong, TrainOn};

    const OPTIONS: LoadOptions = LoadOptions { sequence_len: 64, overlong: Overlong::Split, vocab_size: 320 };

    fn tokenizer(model: &str) -> Tokenizer {
        let tokenizer_json = "../../tests/parity/models/llama-tied/tokenizer.json".into();
        let special = SpecialTokens {
            bos: Some(1),
            eos: Some(2),
            pad: Some(2),
            eot: Some(2),
            eos_ids: vec![2],
            add_bos: false,
        };
        let files = TokenizerFiles::Json { tokenizer_json, tokenizer_config: None };
        Tokenizer::new(&files, &special, model).unwrap()
    }

    fn source(folder: &Path, name: &str, rows: &[&str]) -> DataSource {
        let path = folder.join(name);
        let rows = rows.iter().map(|text| serde_json::json!({ "text": text }).to_string() + "\n");
        fs::write(&path, rows.collect::<String>()).unwrap();
        DataSource { path, format: None, train_on: TrainOn::Assistant }
    }

    fn entries(cache: &TokenCache) -> Vec<PathBuf> {
        let entries = fs::read_dir(&cache.folder).into_iter().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort_unstable();
        paths
    }

    #[test]
    fn a_second_load_is_answered_from_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let cache = TokenCache::new(folder.path().join("a/tokens"));
        let long = "a long row ".repeat(100);
        let sources = [
            source(folder.path(), "a.jsonl", &["one", "two", &long]),
            source(folder.path(), "b.jsonl", &["日本 👋"]),
        ];
        let tokenizer = tokenizer("tiny");
        let load = || cache.load(&sources, &OPTIONS, &tokenizer, None, "tiny").unwrap();
        let plain = crate::load(&sources, &OPTIONS, &tokenizer, None, "tiny").unwrap();
        assert_eq!(load(), plain);
        assert_eq!(load(), plain);

        // whatever the entry says is taken: rows are not tokenised
        let [entry] = entries(&cache).try_into().unwrap();
        let mut other = plain.clone();
        other.samples[0].input_ids[0] += 1;
        cache.put(entry.file_stem().unwrap().to_str().unwrap(), &other).unwrap();
        assert_eq!(load(), other);

        // the same rows elsewhere are the same entry, under the name of their own file
        let moved = [source(folder.path(), "c.jsonl", &["one", "two", &long]), sources[1].clone()];
        let moved = cache.load(&moved, &OPTIONS, &tokenizer, None, "tiny").unwrap();
        assert_eq!(moved.samples, other.samples);
        assert_eq!(moved.report.sources[0].path, folder.path().join("c.jsonl"));
    }

    #[test]
    fn whatever_changes_tokens_is_another_entry() {
        fn of(
            sources: &[DataSource],
            options: &LoadOptions,
            tokenizer: &Tokenizer,
            template: Option<&ChatTemplate>,
        ) -> Option<String> {
            key(sources, &read(sources).unwrap(), options, tokenizer, template)
        }

        let folder = tempfile::tempdir().unwrap();
        let sources =
            [source(folder.path(), "a.jsonl", &["one"]), source(folder.path(), "b.jsonl", &["two"])];
        let tiny = tokenizer("tiny");
        let template = |source, clock| ChatTemplate::new(source, &tiny, clock).unwrap();
        let same = of(&sources, &OPTIONS, &tiny, None).unwrap();
        assert_eq!(of(&sources, &OPTIONS, &tokenizer("tiny"), None).unwrap(), same);
        let swapped = [sources[1].clone(), sources[0].clone()];
        let format = [DataSource { train_on: TrainOn::All, ..sources[0].clone() }, sources[1].clone()];
        let joined = [source(folder.path(), "c.jsonl", &["one", "two"])];
        let keys = [
            same,
            of(&swapped, &OPTIONS, &tiny, None).unwrap(),
            of(&sources[..1], &OPTIONS, &tiny, None).unwrap(),
            of(&format, &OPTIONS, &tiny, None).unwrap(),
            of(&joined, &OPTIONS, &tiny, None).unwrap(),
            of(&sources, &LoadOptions { sequence_len: 65, ..OPTIONS }, &tiny, None).unwrap(),
            of(&sources, &LoadOptions { overlong: Overlong::Drop, ..OPTIONS }, &tiny, None).unwrap(),
            of(&sources, &OPTIONS, &tokenizer("other"), None).unwrap(),
            of(&sources, &OPTIONS, &tiny, Some(&template("a", Clock::Fixed))).unwrap(),
            of(&sources, &OPTIONS, &tiny, Some(&template("b", Clock::Fixed))).unwrap(),
        ];
        let mut distinct = keys.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), keys.len());
        assert!(of(&sources, &OPTIONS, &tiny, Some(&template("a", Clock::Now))).is_none());
    }

    #[test]
    fn a_damaged_entry_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = TokenCache::new(folder.path().join("tokens"));
        let sources = [source(folder.path(), "a.jsonl", &["one", "two"])];
        let tokenizer = tokenizer("tiny");
        let load = || cache.load(&sources, &OPTIONS, &tokenizer, None, "tiny").unwrap();
        let plain = load();
        let [entry] = entries(&cache).try_into().unwrap();
        let good = fs::read(&entry).unwrap();
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for bad in [&[], &good[..CHECKSUM], &good[..good.len() - 1], &flipped] {
            fs::write(&entry, bad).unwrap();
            assert_eq!(load(), plain);
            assert_eq!(fs::read(&entry).unwrap(), good);
        }
        // a checksum that is right, over what is no entry
        fs::write(&entry, [&sha256(b"{}")[..], b"{}"].concat()).unwrap();
        assert_eq!(load(), plain);
    }

    #[test]
    #[cfg(unix)]
    fn only_the_user_can_read_an_entry() {
        use std::os::unix::fs::PermissionsExt as _;

        let folder = tempfile::tempdir().unwrap();
        let cache = TokenCache::new(folder.path().join("tokens"));
        let sources = [source(folder.path(), "a.jsonl", &["private"])];
        cache.load(&sources, &OPTIONS, &tokenizer("tiny"), None, "tiny").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&entries(&cache)[0]), 0o600);
        assert_eq!(mode(&cache.folder), 0o700);
    }

    #[test]
    fn entries_out_of_use_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let mut cache = TokenCache::new(folder.path().join("tokens"));
        let tokenizer = tokenizer("tiny");
        let load = |cache: &TokenCache, text| {
            let sources = [source(folder.path(), "a.jsonl", &[text])];
            cache.load(&sources, &OPTIONS, &tokenizer, None, "tiny").unwrap();
        };
        load(&cache, "a");
        let first = entries(&cache);
        cache.limit = 2 * fs::metadata(&first[0]).unwrap().len();
        load(&cache, "b");
        let both = entries(&cache);
        assert_eq!(both.len(), 2);
        // used again, so that the other one goes
        for entry in &both {
            File::options().append(true).open(entry).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        }
        load(&cache, "a");
        load(&cache, "c");
        let left = entries(&cache);
        assert!(left.len() == 2 && left.contains(&first[0]));

        cache.limit = 10;
        load(&cache, "d");
        assert_eq!(entries(&cache), left, "what is larger than the limit is not kept");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let sources = [source(folder.path(), "a.jsonl", &["one"])];
        let cache = TokenCache::new(sources[0].path.join("tokens"));
        let tokenizer = tokenizer("tiny");
        let dataset = cache.load(&sources, &OPTIONS, &tokenizer, None, "tiny").unwrap();
        assert_eq!(dataset.report.rows(), 1);
    }
}
