//! Whole runs over the tiny fixture model: what they write, that they learn, and that they resume bit for bit.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use tune_data::{BatchOptions, Batcher, Sample};
use tune_formats::{BaseModel, peft};
use tune_memory::peak_resident_bytes;
use tune_recipe::RunSpec;
use tune_train::{Event, Finish, MemoryLimit, RunFolder, Setup, StepMetrics, TrainError, checkpoint, sft};

fn base() -> BaseModel {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models/llama-tied");
    tune_formats::open(&path).expect("fixture model opens")
}

/// A recipe with `changes` to its sections.
fn spec(changes: &[&str]) -> RunSpec {
    let recipe = r#"
        version = 1
        [model]
        base = "fixture"
        [adapter]
        type = "lora"
        r = 4
        lora_dropout = 0.1
        [[data]]
        path = "rows.jsonl"
        [data_options]
        sequence_len = 48
        [train]
        max_steps = 12
        micro_batch_size = 1
        effective_batch_size = 2
        learning_rate = 5e-3
        seed = 5
        [checkpoint]
        save_steps = 4
        [eval]
        eval_steps = 3
    "#;
    let overrides: Vec<_> = changes.iter().map(|change| tune_recipe::Override::set(*change)).collect();
    tune_recipe::parse("test.toml", recipe, &overrides).expect("valid recipe")
}

/// Rows that count upwards from different ids: easy to learn, impossible to guess.
fn rows(count: u32) -> Vec<Sample> {
    let row = |n: u32| {
        let ids: Vec<u32> = (0..8 + n % 9).map(|i| 10 + (n * 7 + i * 3) % 300).collect();
        let trained = ids.iter().enumerate().map(|(at, _)| at > 2).collect();
        Sample::new(ids, trained)
    };
    (0..count).map(row).collect()
}

fn batcher(spec: &RunSpec, samples: Vec<Sample>) -> Batcher {
    let options = BatchOptions {
        sequence_len: spec.data_options.sequence_len,
        micro_batch_size: spec.train.micro_batch_size,
        packing: spec.data_options.packing,
        shuffle: spec.train.shuffle,
        seed: spec.train.seed,
    };
    Batcher::new(samples, options).expect("short rows")
}

struct Run {
    finish: Finish,
    steps: Vec<StepMetrics>,
    /// Times that more memory was used than allowed.
    warnings: usize,
}

/// Trains in `folder`; stops as by Ctrl-C once `stop_after` steps are taken.
fn train(
    spec: &RunSpec,
    folder: &RunFolder,
    resume_from: Option<PathBuf>,
    stop_after: Option<usize>,
) -> Result<Run, TrainError> {
    train_and(spec, folder, resume_from, stop_after, &mut |_| ())
}

/// As [`train`], and does something after each step.
fn train_and(
    spec: &RunSpec,
    folder: &RunFolder,
    resume_from: Option<PathBuf>,
    stop_after: Option<usize>,
    after_step: &mut dyn FnMut(usize),
) -> Result<Run, TrainError> {
    let stop = AtomicBool::new(stop_after == Some(0));
    train_within(spec, folder, resume_from, None, &stop, &mut |step| {
        stop.store(stop_after == Some(step), Ordering::Relaxed);
        after_step(step);
    })
}

/// Trains in `folder` within a limit and tells of every step.
fn train_within(
    spec: &RunSpec,
    folder: &RunFolder,
    resume_from: Option<PathBuf>,
    memory_limit: Option<MemoryLimit>,
    stop: &AtomicBool,
    on_step: &mut dyn FnMut(usize),
) -> Result<Run, TrainError> {
    let setup = Setup {
        spec,
        base: &base(),
        train: batcher(spec, rows(24)),
        validation: batcher(spec, rows(4)),
        folder: folder.clone(),
        plan: "{}".into(),
        kept_blocks: 0,
        resume_from,
        stop,
        memory_limit,
    };
    let (mut steps, mut warnings) = (Vec::new(), 0);
    let outcome = sft(&setup, &mut |event| match event {
        Event::Step(metrics) => {
            on_step(metrics.step);
            steps.push(metrics);
        }
        Event::OverBudget { peak_bytes, budget_bytes } => {
            assert!(peak_bytes > budget_bytes);
            warnings += 1;
        }
        _ => {}
    })?;
    Ok(Run { finish: outcome.finish, steps, warnings })
}

fn folder(root: &Path, name: &str) -> RunFolder {
    RunFolder::new(root.join(name))
}

fn adapter_bytes(folder: &RunFolder) -> Vec<u8> {
    fs::read(folder.adapter().join("adapter_model.safetensors")).expect("trained adapter")
}

/// What must repeat: everything but times and memory.
fn course(steps: &[StepMetrics]) -> Vec<(usize, u64, u64, Option<u64>)> {
    steps
        .iter()
        .map(|m| (m.step, m.loss.to_bits(), m.grad_norm.to_bits(), m.val_loss.map(f64::to_bits)))
        .collect()
}

#[test]
fn a_run_learns_and_writes_its_folder() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let folder = folder(dir.path(), "run");
    let run = train(&spec(&["train.max_steps=40"]), &folder, None, None).expect("trains");
    assert_eq!(run.finish, Finish::Completed);
    let (first, last) = (run.steps[0].loss, run.steps[39].loss);
    assert!(last < 0.7 * first, "loss went from {first} to {last}");
    let before = run.steps[0].val_loss_before.expect("validated before the first step");
    assert!(before > 1.2 * run.steps[39].val_loss.expect("and after the last"), "{before}");
    assert!(run.steps[1..].iter().all(|m| m.val_loss_before.is_none()));
    let validated = |m: &&StepMetrics| m.val_loss.is_some();
    assert_eq!(run.steps.iter().filter(validated).count(), 14); // every third and the last

    assert_eq!(course(&folder.read_metrics().expect("metrics")), course(&run.steps));
    let adapter = peft::read(&folder.adapter()).expect("PEFT folder");
    assert_eq!(adapter.layers.len(), 21);
    assert_eq!(adapter.config.provenance.base_digest, Some(base().digest().expect("digest")));
    let kept = fs::read_dir(folder.checkpoints()).expect("checkpoints").count();
    assert_eq!(kept, 2, "save_total_limit");
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_does_not() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let run = |name: &str, seed: &str| {
        let folder = folder(dir.path(), name);
        let run = train(&spec(&[seed, "train.max_steps=4"]), &folder, None, None).expect("trains");
        (course(&run.steps), adapter_bytes(&folder))
    };
    assert_eq!(run("a", "train.seed=1"), run("b", "train.seed=1"));
    assert_ne!(run("c", "train.seed=1").0, run("d", "train.seed=2").0);
}

#[test]
fn an_interrupted_run_goes_on_as_if_it_had_never_stopped() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let whole = folder(dir.path(), "whole");
    let uninterrupted = train(&spec(&[]), &whole, None, None).expect("trains");

    let parts = folder(dir.path(), "parts");
    let first = train(&spec(&[]), &parts, None, Some(5)).expect("stops");
    assert_eq!((first.finish, first.steps.len()), (Finish::Interrupted, 5));
    assert!(!parts.is_finished());
    let second = train(&spec(&[]), &parts, checkpoint::newest(&parts), Some(7)).expect("stops again");
    assert_eq!(second.steps[0].step, 6);
    let third = train(&spec(&[]), &parts, checkpoint::newest(&parts), None).expect("finishes");
    assert_eq!(third.finish, Finish::Completed);

    assert_eq!(course(&parts.read_metrics().expect("metrics")), course(&uninterrupted.steps));
    assert!(adapter_bytes(&parts) == adapter_bytes(&whole), "the adapters differ");
}

/// Memory beyond the budget stops a run after a whole step, with a checkpoint from which it goes on; where it is only to
/// warn, it says so once.
#[test]
fn a_run_beyond_its_memory_saves_and_stops() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let whole = folder(dir.path(), "whole");
    let uninterrupted = train(&spec(&[]), &whole, None, None).expect("trains");

    let limit = |stops| {
        let now = peak_resident_bytes().expect("known on this system");
        Some(MemoryLimit { bytes: now + (64 << 20), stops })
    };
    let mut ballast = Vec::new();
    let mut grow_at_5 = |step| {
        if step == 5 {
            let now = peak_resident_bytes().expect("known") as usize;
            ballast.push(vec![1u8; now + (80 << 20)]);
        }
    };
    let (parts, go_on) = (folder(dir.path(), "parts"), AtomicBool::new(false));
    let first = train_within(&spec(&[]), &parts, None, limit(true), &go_on, &mut grow_at_5).expect("stops");
    assert!(matches!(first.finish, Finish::OverBudget { .. }), "{:?}", first.finish);
    assert_eq!((first.steps.len(), first.warnings), (5, 1));
    let newest = checkpoint::newest(&parts).expect("saved");
    assert!(newest.ends_with("step-000005"));

    // With more to use it goes on, as if it had never stopped.
    let rest = train(&spec(&[]), &parts, Some(newest), None).expect("finishes");
    assert_eq!(rest.finish, Finish::Completed);
    assert_eq!(course(&parts.read_metrics().expect("metrics")), course(&uninterrupted.steps));
    assert!(adapter_bytes(&parts) == adapter_bytes(&whole), "the adapters differ");

    // A limit that is already crossed: nothing is trained and nothing is written over.
    let crossed = Some(MemoryLimit { bytes: 1, stops: true });
    let none = folder(dir.path(), "none");
    let run = train_within(&spec(&[]), &none, None, crossed, &go_on, &mut |_| ()).expect("stops");
    assert!(matches!(run.finish, Finish::OverBudget { .. }) && run.steps.is_empty());
    assert_eq!(checkpoint::newest(&none), None);

    let warned = folder(dir.path(), "warned");
    let only_warn = Some(MemoryLimit { bytes: 1, stops: false });
    let run = train_within(&spec(&[]), &warned, None, only_warn, &go_on, &mut |_| ()).expect("trains");
    assert_eq!((run.finish, run.warnings), (Finish::Completed, 1));
    assert_eq!(course(&run.steps), course(&uninterrupted.steps));
}

/// A micro-batch of a large model takes minutes: nobody should have to wait for its end.
#[test]
fn a_run_stops_in_the_middle_of_a_micro_batch() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let whole = folder(dir.path(), "whole");
    let uninterrupted = train(&spec(&[]), &whole, None, None).expect("trains");

    let parts = folder(dir.path(), "parts");
    let spec = spec(&[]);
    let stop = AtomicBool::new(false);
    let setup = Setup {
        spec: &spec,
        base: &base(),
        train: batcher(&spec, rows(24)),
        validation: batcher(&spec, rows(4)),
        folder: parts.clone(),
        plan: "{}".into(),
        kept_blocks: 0,
        resume_from: None,
        stop: &stop,
        memory_limit: None,
    };
    let mut shares = Vec::new();
    let outcome = sft(&setup, &mut |event| {
        if let Event::Progress { step: 3, share } = event {
            shares.push(share);
            stop.store(share > 0.7, Ordering::Relaxed);
        }
    });
    let outcome = outcome.expect("stops");
    assert_eq!((outcome.finish, outcome.steps), (Finish::Interrupted, 2));
    assert!(shares.is_sorted() && shares.len() > 4 && *shares.last().expect("some") < 0.9, "{shares:?}");
    train(&spec, &parts, checkpoint::newest(&parts), None).expect("finishes");
    assert_eq!(course(&parts.read_metrics().expect("metrics")), course(&uninterrupted.steps));
    assert!(adapter_bytes(&parts) == adapter_bytes(&whole), "the adapters differ");
}

#[test]
fn the_shares_of_a_step_add_up_to_one() {
    let dir = tempfile::tempdir().expect("temporary folder");
    for (kept_blocks, layers) in [(0, "all"), (1, "1-2"), (9, "all")] {
        let spec = spec(&["train.max_steps=1", &format!("adapter.layers={layers}")]);
        let stop = AtomicBool::new(false);
        let setup = Setup {
            spec: &spec,
            base: &base(),
            train: batcher(&spec, rows(24)),
            validation: batcher(&spec, Vec::new()),
            folder: folder(dir.path(), &format!("kept-{kept_blocks}")),
            plan: "{}".into(),
            kept_blocks,
            resume_from: None,
            stop: &stop,
            memory_limit: None,
        };
        let mut last = 0.0;
        sft(&setup, &mut |event| {
            if let Event::Progress { share, .. } = event {
                last = share;
            }
        })
        .expect("trains");
        assert!((last - 1.0).abs() < 1e-9, "{kept_blocks} kept blocks, layers {layers}: {last}");
    }
}

#[test]
fn short_moments_sums_and_inputs_learn_and_resume_bit_for_bit() {
    let changes = [
        "adapter.type=full",
        "train.learning_rate=1e-3",
        "train.optimizer=adamw_8bit",
        "train.gradient_dtype=bf16",
        "train.block_input_dtype=bf16",
        "train.max_steps=20",
    ];
    let spec = spec(&changes);
    let dir = tempfile::tempdir().expect("temporary folder");
    let whole = folder(dir.path(), "whole");
    let all = train(&spec, &whole, None, None).expect("trains").steps;
    assert!(all[19].loss < 0.7 * all[0].loss, "loss went from {} to {}", all[0].loss, all[19].loss);

    let parts = folder(dir.path(), "parts");
    train(&spec, &parts, None, Some(5)).expect("stops");
    let newest = checkpoint::newest(&parts).expect("a checkpoint");
    let bytes = fs::read(newest.join("optimizer.safetensors")).expect("optimizer state");
    let stored = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
    let dtype = |name: &str| stored.tensor(name).expect("there").dtype();
    assert_eq!(dtype("model.embed_tokens.weight.m"), safetensors::Dtype::U8);
    assert_eq!(dtype("model.embed_tokens.weight.v.absmax"), safetensors::Dtype::F32);
    assert_eq!(dtype("model.norm.weight.v"), safetensors::Dtype::F32);
    train(&spec, &parts, Some(newest), None).expect("finishes");
    assert_eq!(course(&parts.read_metrics().expect("metrics")), course(&all));
    assert!(weight_bytes(&parts) == weight_bytes(&whole), "the weights differ");
}

#[test]
fn a_killed_run_repeats_the_steps_after_its_last_checkpoint() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let whole = folder(dir.path(), "whole");
    let uninterrupted = train(&spec(&[]), &whole, None, None).expect("trains");

    // What a kill after step 10 leaves: metrics of ten steps, checkpoints of 4 and 8, half of another.
    let killed = folder(dir.path(), "killed");
    train(&spec(&[]), &killed, None, Some(10)).expect("stops");
    fs::remove_dir_all(killed.checkpoints().join("step-000010")).expect("not saved by a kill");
    fs::create_dir_all(killed.checkpoints().join("step-000010.partial")).expect("half a checkpoint");
    let newest = checkpoint::newest(&killed).expect("a checkpoint");
    assert!(newest.ends_with("step-000008"));
    let rest = train(&spec(&[]), &killed, Some(newest), None).expect("finishes");
    assert_eq!(rest.steps[0].step, 9);
    assert_eq!(course(&killed.read_metrics().expect("metrics")), course(&uninterrupted.steps));
    assert!(adapter_bytes(&killed) == adapter_bytes(&whole), "the adapters differ");
}

#[test]
fn a_finished_run_is_not_trained_again() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let folder = folder(dir.path(), "run");
    train(&spec(&[]), &folder, None, None).expect("trains");
    let before = adapter_bytes(&folder);
    let again = train(&spec(&[]), &folder, checkpoint::newest(&folder), None).expect("nothing to do");
    assert_eq!((again.finish, again.steps.len()), (Finish::Completed, 0));
    assert!(adapter_bytes(&folder) == before);
}

/// Names the folder in which the second process of the next test trains; without it that has nothing to do.
const FULL_DISK: &str = "TUNE_TEST_FULL_DISK";

#[test]
fn second_process_on_a_full_disk() {
    let Some(disk) = std::env::var_os(FULL_DISK).map(PathBuf::from) else { return };
    let folder = folder(&disk, "run");
    let filler = disk.join("filler");
    let fill = &mut |step| {
        if step == 7 {
            let mut file = fs::File::create(&filler).expect("created");
            while file.write_all(&[0; 4096]).is_ok() {}
        }
    };
    let error = train_and(&spec(&[]), &folder, None, None, fill).err().expect("no room for a checkpoint");
    let TrainError::NotSaved { step: 8, kept: Some(kept), .. } = &error else { panic!("{error}") };
    assert!(kept.ends_with("step-000004"), "{error}");
    let text = error.to_string();
    assert!(text.contains("no space left") && text.ends_with("step-000004 is kept"), "{text}");
    assert_eq!(fs::read_dir(folder.checkpoints()).expect("listed").count(), 1, "half a checkpoint is left");

    fs::remove_file(&filler).expect("space is freed");
    let rest = train(&spec(&[]), &folder, checkpoint::newest(&folder), None).expect("goes on");
    assert_eq!(rest.steps.first().map(|m| m.step), Some(5));
    assert!(folder.is_finished());
    println!("\nwent on");
}

/// On a file system of its own, where the system grants a test the namespaces for it.
#[test]
fn a_disk_that_fills_up_keeps_the_last_checkpoint() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let on_disk = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
        command.arg("mount -t tmpfs -o size=4m none \"$0\" && exec \"$@\"").arg(dir.path()).args(arguments);
        command.env(FULL_DISK, dir.path()).output()
    };
    if !on_disk(&["true"]).is_ok_and(|output| output.status.success()) {
        eprintln!("not tested: this system lets no test mount a file system");
        return;
    }
    let test = std::env::current_exe().expect("this test");
    let test = test.to_str().expect("a path in UTF-8");
    let output =
        on_disk(&[test, "--exact", "second_process_on_a_full_disk", "--nocapture"]).expect("started");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("\nwent on\n"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn other_settings_do_not_mix_with_a_checkpoint() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let folder = folder(dir.path(), "run");
    train(&spec(&[]), &folder, None, Some(4)).expect("stops");
    let changed = spec(&["train.learning_rate=1e-3", "adapter.lora_dropout=0.0"]);
    let error = train(&changed, &folder, checkpoint::newest(&folder), None).err().expect("refused");
    let TrainError::OtherRun { differences, .. } = error else { panic!("unexpected error: {error}") };
    assert_eq!(differences.len(), 2, "{differences:?}");
    assert!(
        differences[0].contains("adapter.lora_dropout") && differences[1].contains("train.learning_rate")
    );
    let kept = tune_recipe::load(&folder.recipe(), &[]).expect("the earlier recipe");
    assert!((kept.train.learning_rate - 5e-3).abs() < 1e-12, "the refused run has overwritten run.toml");
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let folder = folder(dir.path(), "run");
    train(&spec(&[]), &folder, None, Some(4)).expect("stops");
    let newest = checkpoint::newest(&folder).expect("a checkpoint");
    fs::write(newest.join("optimizer.safetensors"), b"torn").expect("damaged");
    let error = train(&spec(&[]), &folder, Some(newest), None).err().expect("refused");
    assert!(matches!(error, TrainError::Checkpoint { .. }), "{error}");
}

#[test]
fn an_initial_adapter_is_where_training_starts() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let first = folder(dir.path(), "first");
    let run = train(&spec(&["train.max_steps=30"]), &first, None, None).expect("trains");
    let start = format!("adapter.init_adapter={:?}", first.adapter().display().to_string());
    let second = folder(dir.path(), "second");
    let more = train(&spec(&[&start, "train.max_steps=2"]), &second, None, None).expect("trains on");
    assert!(more.steps[0].loss < 0.9 * run.steps[0].loss);
    let mismatch = train(&spec(&[&start, "adapter.r=8"]), &folder(dir.path(), "third"), None, None);
    assert!(matches!(mismatch.err(), Some(TrainError::InitialAdapter { .. })));
}

#[test]
fn early_stopping_waits_as_long_as_it_is_told() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let folder = folder(dir.path(), "run");
    // A learning rate of nothing: validation never improves after the first time.
    let stuck = ["eval.early_stopping_patience=2", "train.learning_rate=1e-30", "eval.eval_steps=1"];
    let run = train(&spec(&stuck), &folder, None, None).expect("stops early");
    assert_eq!(run.steps.len(), 3);
    assert!(folder.is_finished());
}

#[test]
fn sixteen_micro_batches_of_one_equal_one_of_sixteen() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let losses = |name: &str, size: &str, packing: &str| {
        let changes = [
            size,
            packing,
            "train.effective_batch_size=16",
            "train.shuffle=false",
            "adapter.lora_dropout=0.0",
            "train.max_steps=3",
        ];
        let run = train(&spec(&changes), &folder(dir.path(), name), None, None).expect("trains");
        run.steps.iter().map(|m| m.loss).collect::<Vec<_>>()
    };
    let together = losses("together", "train.micro_batch_size=16", "data_options.packing=false");
    let one_by_one = losses("alone", "train.micro_batch_size=1", "data_options.packing=false");
    for (a, b) in together.iter().zip(&one_by_one) {
        assert!((a - b).abs() < 1e-5 * a, "{together:?} against {one_by_one:?}");
    }
}

/// The weights in the last checkpoint.
fn weight_bytes(folder: &RunFolder) -> Vec<u8> {
    let newest = checkpoint::newest(folder).expect("a checkpoint");
    fs::read(newest.join("weights.safetensors")).expect("trained weights")
}

#[test]
fn a_run_of_all_weights_learns_and_goes_on_as_if_it_had_never_stopped() {
    for dtype in ["model.dtype=f32", "model.dtype=bf16"] {
        let spec = |steps| spec(&["adapter.type=full", "train.learning_rate=1e-3", dtype, steps]);
        let dir = tempfile::tempdir().expect("temporary folder");
        let whole = folder(dir.path(), "whole");
        let all = train(&spec("train.max_steps=20"), &whole, None, None).expect("trains").steps;
        assert!(all[19].loss < 0.7 * all[0].loss, "loss went from {} to {}", all[0].loss, all[19].loss);

        let parts = folder(dir.path(), "parts");
        let spec = spec("train.max_steps=20");
        train(&spec, &parts, None, Some(5)).expect("stops");
        let rest = train(&spec, &parts, checkpoint::newest(&parts), None).expect("finishes");
        assert_eq!(rest.steps[0].step, 6);
        assert_eq!(course(&parts.read_metrics().expect("metrics")), course(&all));
        assert!(weight_bytes(&parts) == weight_bytes(&whole), "the weights differ");
    }
}
