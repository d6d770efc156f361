//! Every target, from the tiny models of `tests/parity`, read back and compared with a plain computation of W + s·B·A.

mod tiny;

use std::collections::BTreeMap;
use std::path::Path;

use tune_export::{
    ExportError, ExportEvent, ExportOptions, ExportReport, ExportRequest, ExportTarget, FileType, MergeRoute,
    OllamaBase, export,
};
use tune_formats::gguf::{GgufFile, Value};
use tune_formats::peft::{self, Adapter};
use tune_formats::provenance::Provenance;
use tune_formats::{BaseModel, FormatError, TensorProblem};

use tiny::{RANK, adapter, base, lora, models, tempdir};

const MODELS: [&str; 3] = ["llama-tied", "llama-llama3-rope", "llama-untied-bf16-sharded"];

#[test]
fn merged_gguf_holds_base_plus_update() {
    for model in MODELS {
        let dir = tempdir();
        let base = base(model);
        let adapter = adapter(&base.config);
        let out = dir.path().join("m.gguf");
        let report = run(&base, &adapter, ExportTarget::Gguf(FileType::F32), &out).expect(model);
        let retention = report.stored_update.expect("a merge");
        assert!((retention.kept - 1.0).abs() < 1e-3 && retention.error < 1e-3, "{model}: {retention:?}");

        let merged = tune_formats::open(&out).expect(model);
        assert_eq!(merged.weights.names(), base.weights.names(), "{model}");
        for name in base.weights.names() {
            assert_close(
                &format!("{model} {name}"),
                &values(&merged, &name),
                &wanted(&base, &adapter, &name),
                1e-6,
            );
        }
        assert_eq!(merged.special, base.special, "{model}");
        assert_eq!(merged.chat_template, base.chat_template, "{model}");
        assert_eq!(merged.config.rope_factors(), base.config.rope_factors(), "{model}");
    }
}

#[test]
fn a_gguf_base_keeps_its_metadata_and_its_quantised_blocks() {
    let dir = tempdir();
    let hf = base("llama-tied");
    let mut adapter = adapter(&hf.config);
    let first = dir.path().join("base.gguf");
    run(&hf, &adapter, ExportTarget::Gguf(FileType::Q8_0), &first).expect("exported");
    let base = tune_formats::open(&first).expect("opened");

    adapter.layers.retain(|name, _| name.ends_with("q_proj"));
    let second = dir.path().join("tuned.gguf");
    let options = ExportOptions { name: Some("tuned"), ..ExportOptions::default() };
    let request = ExportRequest {
        base: &base,
        adapter: &adapter,
        target: "gguf:q8_0".parse().unwrap(),
        out: &second,
        options,
    };
    export(&request, &mut |_| ()).expect("exported");

    let (old, new) = (GgufFile::open(&first).unwrap(), GgufFile::open(&second).unwrap());
    assert_eq!(new.metadata().string("general.name"), Some("tuned"));
    assert_eq!(new.metadata().string("general.base_model.0.name"), Some("llama-tied"));
    assert_eq!(new.metadata().unsigned("general.file_type"), Some(7));
    for (key, value) in old.metadata().iter().filter(|(key, _)| !key.starts_with("general.")) {
        assert_eq!(new.metadata().get(key), Some(value), "{key}");
    }
    for tensor in old.tensors() {
        let changed = tensor.name.contains("attn_q");
        let same = old.data(tensor).unwrap()[..] == new.data(new.tensor(&tensor.name).unwrap()).unwrap()[..];
        assert_eq!(same, !changed, "{}", tensor.name);
    }
    // A merge into the same 8-bit grid keeps an update of this size.
    let merged = tune_formats::open(&second).unwrap();
    for name in base.weights.names().iter().filter(|name| name.ends_with("q_proj.weight")) {
        assert_close(name, &values(&merged, name), &wanted(&base, &adapter, name), 4e-3);
    }
}

#[test]
fn gguf_adapter_over_the_base_equals_the_merged_file_row_by_row() {
    for (model, use_rslora) in MODELS.into_iter().flat_map(|model| [(model, true), (model, false)]) {
        let dir = tempdir();
        let base = base(model);
        let mut adapter = adapter(&base.config);
        adapter.config.use_rslora = use_rslora;
        adapter.config.provenance = Provenance { base_digest: Some("b".into()), ..Provenance::default() };
        // ranks of their own, on a layer whose rows are permuted and on one whose are not
        for name in ["self_attn.q_proj", "mlp.up_proj"] {
            let lora = adapter.layers.get_mut(&format!("model.layers.0.{name}")).expect(name);
            lora.r = 2;
            lora.a.to_mut().truncate(2 * lora.d_in);
            lora.b.to_mut().truncate(2 * lora.d_out);
        }
        let (lora_out, merged_out) = (dir.path().join("a.gguf"), dir.path().join("m.gguf"));
        run(&base, &adapter, ExportTarget::GgufLora, &lora_out).expect(model);
        run(&base, &adapter, ExportTarget::Gguf(FileType::F32), &merged_out).expect(model);
        let empty = Adapter { layers: BTreeMap::new(), ..adapter.clone() };
        let base_out = dir.path().join("b.gguf");
        run(&base, &empty, ExportTarget::Gguf(FileType::F32), &base_out).expect(model);

        let [lora, merged, plain] =
            [&lora_out, &merged_out, &base_out].map(|path| GgufFile::open(path).unwrap());
        assert_eq!(lora.metadata().string("general.type"), Some("adapter"));
        assert_eq!(lora.metadata().string("general.architecture"), Some("llama"));
        let Some(Value::F32(alpha)) = lora.metadata().get("adapter.lora.alpha") else { panic!("no alpha") };
        let expected = if use_rslora { 8.0 * 2.0 } else { 8.0 };
        assert!((alpha - expected).abs() < 1e-6, "alpha 8 and rank 4 give {alpha}");
        for file in [&lora, &merged] {
            assert_eq!(file.metadata().string("tune.base_digest"), Some("b"));
        }
        assert_eq!(lora.tensors().len(), 2 * adapter.layers.len());
        for tensor in plain.tensors().iter().filter(|tensor| tensor.dims.len() == 2) {
            let (w, want) = (tensor_values(&plain, &tensor.name), tensor_values(&merged, &tensor.name));
            let Some(a) = lora.tensor(&format!("{}.lora_a", tensor.name)) else {
                assert_eq!(w, want, "{}", tensor.name);
                continue;
            };
            let b = lora.tensor(&format!("{}.lora_b", tensor.name)).expect("a pair");
            let (d_in, d_out) = (tensor.dims[0], tensor.dims[1]);
            let r = if tensor.name == "blk.0.attn_q.weight" || tensor.name == "blk.0.ffn_up.weight" {
                2
            } else {
                RANK
            };
            assert_eq!((&a.dims[..], &b.dims[..]), (&[d_in, r][..], &[r, d_out][..]));
            let (a, b) = (tensor_values(&lora, &a.name), tensor_values(&lora, &b.name));
            // as a loader does it: one alpha, and the rank of the pair
            let got = plus_update(&w, alpha / r as f32, &a, &b, d_in);
            assert_close(&format!("{model} {}", tensor.name), &got, &want, 1e-6);
        }
    }
}

#[test]
fn safetensors_folder_opens_as_the_merged_model() {
    for (model, dtype) in MODELS.into_iter().zip(["F32", "F32", "BF16"]) {
        let dir = tempdir();
        let base = base(model);
        let adapter = adapter(&base.config);
        let out = dir.path().join("merged");
        let report = run(&base, &adapter, ExportTarget::Safetensors, &out).expect(model);
        assert_eq!((report.notes, report.modelfile), (vec![], None), "{model}");
        let merged = tune_formats::open(&out).expect(model);
        assert_eq!(merged.config, base.config, "{model}");
        assert_eq!(merged.special, base.special, "{model}");
        assert_eq!(merged.chat_template, base.chat_template, "{model}");
        let q = "model.layers.0.self_attn.q_proj.weight";
        assert_eq!(merged.weights.matrix(q).unwrap().type_name(), dtype, "{model}");
        let tolerance = if dtype == "BF16" { 4e-3 } else { 1e-6 };
        for name in base.weights.names() {
            let context = format!("{model} {name}");
            assert_close(&context, &values(&merged, &name), &wanted(&base, &adapter, &name), tolerance);
        }
        let error = run(&base, &adapter, ExportTarget::Safetensors, &out).expect_err("not empty");
        assert!(matches!(error, ExportError::InTheWay { .. }), "{error}");
    }
}

#[test]
fn safetensors_from_a_gguf_base_rebuilds_the_configuration() {
    let dir = tempdir();
    let hf = base("llama-llama3-rope");
    let adapter = adapter(&hf.config);
    let gguf = dir.path().join("base.gguf");
    run(&hf, &adapter, ExportTarget::Gguf(FileType::Q8_0), &gguf).expect("exported");
    let base = tune_formats::open(&gguf).expect("opened");
    // These factors are of no published Llama, so config.json cannot name them.
    let error =
        run(&base, &adapter, ExportTarget::Safetensors, &dir.path().join("x")).expect_err("rope factors");
    assert!(error.to_string().contains("rope_freqs.weight"), "{error}");

    let hf = tune_formats::open(&models().join("llama-tied")).expect("opened");
    let gguf = dir.path().join("tied.gguf");
    let tied = self::adapter(&hf.config);
    run(&hf, &tied, ExportTarget::Gguf(FileType::Q8_0), &gguf).expect("exported");
    let base = tune_formats::open(&gguf).expect("opened");
    let out = dir.path().join("folder");
    let tokenizer = std::fs::read_to_string(models().join("llama-tied/tokenizer.json")).expect("read");
    let options = ExportOptions { tokenizer_json: Some(&tokenizer), ..ExportOptions::default() };
    let adapter = tied;
    let target = ExportTarget::Safetensors;
    export(&ExportRequest { base: &base, adapter: &adapter, target, out: &out, options }, &mut |_| ())
        .expect("exported");
    let merged = tune_formats::open(&out).expect("opened");
    assert_eq!(merged.config, base.config);
    assert_eq!(merged.special, base.special);
    assert_eq!(merged.chat_template, base.chat_template);
    for name in base.weights.names() {
        assert_close(&name, &values(&merged, &name), &wanted(&base, &adapter, &name), 1e-3);
    }
}

#[test]
fn peft_folder_reads_back() {
    let dir = tempdir();
    let base = base("llama-tied");
    let adapter = adapter(&base.config);
    let out = dir.path().join("adapter");
    run(&base, &adapter, ExportTarget::Peft, &out).expect("exported");
    assert_eq!(peft::read(&out).expect("read"), adapter);
}

#[test]
fn a_head_trained_apart_from_its_embedding_is_untied() {
    let dir = tempdir();
    let base = base("llama-tied");
    let mut adapter = adapter(&base.config);
    let head = lora(7, base.config.vocab_size, base.config.hidden_size);
    adapter.layers = BTreeMap::from([("lm_head".to_owned(), head.clone())]);
    let out = dir.path().join("m.gguf");
    run(&base, &adapter, ExportTarget::Gguf(FileType::F32), &out).expect("exported");
    let merged = tune_formats::open(&out).expect("opened");
    assert!(!merged.config.tie_word_embeddings);
    let embedding = values(&base, "model.embed_tokens.weight");
    assert_close("embedding", &values(&merged, "model.embed_tokens.weight"), &embedding, 1e-9);
    let want = plus_update(&embedding, 2.0, &head.a.values(), &head.b.values(), head.d_in);
    assert_close("head", &values(&merged, "lm_head.weight"), &want, 1e-6);

    // llama.cpp would look for output.weight in the base, which has none.
    let error = run(&base, &adapter, ExportTarget::GgufLora, &dir.path().join("a.gguf")).expect_err("tied");
    let ExportError::NotAGgufAdapter { problems } = error else { panic!("{error}") };
    assert_eq!(problems.len(), 1);
    assert!(!dir.path().join("a.gguf").exists());
}

#[test]
fn what_cannot_be_exported_is_refused_and_leaves_nothing() {
    let base = base("llama-untied-bf16-sharded");
    let good = adapter(&base.config);
    let q = "model.layers.1.self_attn.q_proj";

    let mut other = good.clone();
    other.layers.insert(q.to_owned(), lora(1, 64, 32));
    refused(&base, &other, ExportTarget::GgufLora, |error| {
        let ExportError::Format(FormatError::OtherBase { problems, .. }) = error else { return false };
        problems.iter().any(|TensorProblem { name, .. }| name.contains(q))
    });

    let mut diverged = good.clone();
    diverged.layers.get_mut(q).unwrap().b.to_mut()[3] = f32::NAN;
    for target in [ExportTarget::GgufLora, ExportTarget::Gguf(FileType::F16), ExportTarget::Safetensors] {
        refused(&base, &diverged, target, |error| matches!(error, ExportError::NotFinite { .. }));
    }

    let mut large = good.clone();
    large.layers.get_mut(q).unwrap().b.to_mut()[3] = 1e9;
    for target in [ExportTarget::Gguf(FileType::F16), ExportTarget::Gguf(FileType::Q8_0)] {
        refused(
            &base,
            &large,
            target,
            |error| matches!(error, ExportError::NotFinite { help, .. } if help.contains("gguf:bf16")),
        );
    }
    run(&base, &large, ExportTarget::Gguf(FileType::BF16), &tempdir().path().join("m.gguf"))
        .expect("fits BF16");

    let mut silent = good.clone();
    silent.config.lora_alpha = 0.0;
    refused(&base, &silent, ExportTarget::GgufLora, |error| {
        matches!(error, ExportError::NotAGgufAdapter { .. })
    });

    let dir = tempdir();
    let gguf = dir.path().join("base.gguf");
    run(&base, &good, ExportTarget::Gguf(FileType::F16), &gguf).expect("exported");
    let opened = tune_formats::open(&gguf).expect("opened");
    let error = run(&opened, &good, ExportTarget::Gguf(FileType::F16), &gguf).expect_err("its own base");
    assert!(matches!(error, ExportError::OverwritesBase { .. }), "{error}");
}

#[test]
fn the_modelfile_has_what_ollama_needs() {
    let dir = tempdir();
    let base = base("llama-tied");
    let adapter = adapter(&base.config);
    let render = |messages: &[(&str, &str)], _: bool| {
        let mut text = String::new();
        for (role, content) in messages {
            text.extend(["<|im_start|>", role, "\n", content, "<|im_end|>\n"]);
        }
        Some(text + "<|im_start|>assistant\n")
    };
    let options = ExportOptions { render: Some(&render), ..ExportOptions::default() };
    let out = dir.path().join("m.gguf");
    let target = ExportTarget::Gguf(FileType::Q8_0);
    let request = ExportRequest { base: &base, adapter: &adapter, target, out: &out, options };
    let report = export(&request, &mut |_| ()).expect("exported");
    let path = report.modelfile.expect("beside a GGUF file");
    assert_eq!(path, dir.path().join("Modelfile"));
    let text = std::fs::read_to_string(&path).expect("read");
    for line in [
        "FROM ./m.gguf",
        "TEMPLATE \"\"\"{{ range .Messages }}<|im_start|>{{ .Role }}",
        "PARAMETER stop \"<|im_end|>\"",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is not in\n{text}");
    }

    // Beside an adapter, a model that Ollama has passes on what is the same there; another's Modelfile is left alone.
    let out = dir.path().join("a.gguf");
    let stop = ["<|im_end|>".to_owned(), "<|endoftext|>".to_owned()];
    let template = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n";
    let alike =
        OllamaBase { name: "smollm2:135m", template: Some(template), stop: &stop, ..OllamaBase::default() };
    let over = |ollama_base: OllamaBase<'_>| {
        let options = ExportOptions { ollama_base: Some(ollama_base), ..options };
        let request = ExportRequest { target: ExportTarget::GgufLora, out: &out, options, ..request };
        let report = export(&request, &mut |_| ()).expect("exported");
        assert_eq!(report.modelfile, Some(dir.path().join("a.gguf.Modelfile")));
        std::fs::read_to_string(report.modelfile.unwrap()).expect("read")
    };
    let text = over(alike);
    assert!(text.ends_with("FROM smollm2:135m\nADAPTER ./a.gguf\n"), "{text}");
    // What its base would render otherwise is set anew, and its stop tokens stay.
    let stop = ["<|eot|>".to_owned()];
    let text = over(OllamaBase { template: Some("{{ .Prompt }}"), stop: &stop, ..alike });
    assert!(text.contains("TEMPLATE \"\"\"{{ range .Messages }}"), "{text}");
    assert!(text.ends_with("PARAMETER stop \"<|im_end|>\"\nPARAMETER stop \"<|eot|>\"\n"), "{text}");
}

#[test]
fn progress_covers_every_tensor_twice() {
    let dir = tempdir();
    let base = base("llama-tied");
    let adapter = adapter(&base.config);
    let mut events = vec![];
    let out = dir.path().join("m.gguf");
    let target = ExportTarget::Gguf(FileType::F16);
    let options = ExportOptions::default();
    let request = ExportRequest { base: &base, adapter: &adapter, target, out: &out, options };
    let report = export(&request, &mut |event| events.push(event)).expect("exported");
    let n = report.tensors;
    assert_eq!(report.bytes, std::fs::metadata(&out).unwrap().len());
    let ExportEvent::Started { tensors, bytes } = events[0] else { panic!("{:?}", events[0]) };
    assert_eq!(tensors, n);
    assert!(
        bytes >= report.bytes && bytes < report.bytes + 64 * 1024,
        "{bytes} announced, {} written",
        report.bytes
    );
    assert_eq!(events.len(), 1 + 2 * n);
    assert_eq!(events[n], ExportEvent::Wrote { done: n, tensors: n });
    assert_eq!(events[2 * n], ExportEvent::Verified { done: n, tensors: n });
}

fn refused(
    base: &BaseModel,
    adapter: &Adapter,
    target: ExportTarget,
    expected: impl Fn(&ExportError) -> bool,
) {
    let dir = tempdir();
    let error = run(base, adapter, target, &dir.path().join("out")).expect_err("accepted");
    assert!(expected(&error), "{target}: {error:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{target} left something behind");
}

fn run(
    base: &BaseModel,
    adapter: &Adapter,
    target: ExportTarget,
    out: &Path,
) -> Result<ExportReport, ExportError> {
    let options = ExportOptions::default();
    export(&ExportRequest { base, adapter, target, out, options }, &mut |_| ())
}

/// What the merged tensor should hold.
fn wanted(base: &BaseModel, adapter: &Adapter, name: &str) -> Vec<f32> {
    let values = values(base, name);
    match name.strip_suffix(".weight").and_then(|module| adapter.layers.get(module)) {
        Some(lora) => plus_update(
            &values,
            adapter.config.scale_of(lora.r) as f32,
            &lora.a.values(),
            &lora.b.values(),
            lora.d_in,
        ),
        None => values,
    }
}

/// W + s·B·A in double precision.
fn plus_update(w: &[f32], scale: f32, a: &[f32], b: &[f32], d_in: usize) -> Vec<f32> {
    let rank = a.len() / d_in;
    let value = |i: usize| {
        let (row, col) = (i / d_in, i % d_in);
        let sum: f64 = (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * d_in + col])).sum();
        (f64::from(w[i]) + f64::from(scale) * sum) as f32
    };
    (0..w.len()).map(value).collect()
}

fn values(model: &BaseModel, name: &str) -> Vec<f32> {
    if model.weights.shape(name).expect(name).len() == 1 {
        return model.weights.vector(name).expect(name);
    }
    let matrix = model.weights.matrix(name).expect(name);
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    for (row, out) in values.chunks_exact_mut(matrix.cols()).enumerate() {
        matrix.decode_row(row, out);
    }
    values
}

fn tensor_values(file: &GgufFile, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).expect(name);
    let mut values = vec![0.0; tensor.elements()];
    tensor.block_type.decode(&file.data(tensor).expect(name), &mut values);
    values
}

fn assert_close(context: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{context}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "{context} value {i}: {got}, want {want}");
    }
}

/// Moments of inputs that lean on each other, for every layer that is asked for.
fn moments(base: &BaseModel) -> impl Fn(&str) -> Option<std::sync::Arc<tune_export::InputMoments>> + '_ {
    |module: &str| {
        let d_in = base.weights.shape(&format!("{module}.weight"))?[1];
        let sums =
            (0..d_in * d_in).map(|i| 100.0 * 0.9_f32.powi((i / d_in).abs_diff(i % d_in) as i32)).collect();
        Some(std::sync::Arc::new(tune_export::InputMoments { d_in, sums }))
    }
}

#[test]
fn routes_keep_the_grid_of_the_base_and_are_read_back() {
    let dir = tempdir();
    let hf = base("llama-tied");
    let mut adapter = adapter(&hf.config);
    // an update whose errors add up to a step somewhere in a row
    adapter.layers.values_mut().flat_map(|lora| lora.b.to_mut()).for_each(|b| *b *= 20.0);
    let empty = Adapter { layers: BTreeMap::new(), ..adapter.clone() };
    let first = dir.path().join("base.gguf");
    run(&hf, &empty, ExportTarget::Gguf(FileType::Q4_1), &first).expect("exported");
    let base = tune_formats::open(&first).expect("opened");
    let moments = moments(&base);
    for route in [MergeRoute::Rtn, MergeRoute::Gptq] {
        let out = dir.path().join(format!("{route}.gguf"));
        let target = ExportTarget::Gguf(FileType::Q4_1);
        let options = ExportOptions { route, activations: Some(&moments), ..ExportOptions::default() };
        export(&ExportRequest { base: &base, adapter: &adapter, target, out: &out, options }, &mut |_| ())
            .expect("exported and read back");
        let merged = tune_formats::open(&out).expect("opened");
        let mut changed = 0;
        for module in adapter.layers.keys() {
            let name = format!("{module}.weight");
            let [old, new] = [&base, &merged].map(|model| model.weights.matrix(&name).expect("a matrix"));
            for row in 0..old.rows() {
                let ((block_type, old), (new_type, new)) =
                    (old.row_blocks(row).unwrap(), new.row_blocks(row).unwrap());
                assert_eq!(block_type, new_type, "{route} {name}");
                changed += usize::from(old != new);
                if block_type == tune_quant::BlockType::Q4_1 {
                    for (old, new) in old.chunks_exact(20).zip(new.chunks_exact(20)) {
                        assert_eq!(old[..4], new[..4], "{route} {name}: scale and minimum");
                    }
                }
            }
        }
        // an update far below a step does not move the nearest code anywhere
        assert!(changed > 0 || route == MergeRoute::Rtn, "{route} changes codes");
    }
}

#[test]
fn a_judge_decides_before_the_file_gets_its_name() {
    let dir = tempdir();
    let base = base("llama-tied");
    let adapter = adapter(&base.config);
    let out = dir.path().join("m.gguf");
    let judge = |place: &Path| {
        assert!(place.is_file() && tune_formats::open(place).is_ok(), "the file is complete");
        Ok(vec!["answers like the base".to_owned()])
    };
    let target = ExportTarget::Gguf(FileType::Q8_0);
    let options = ExportOptions { judge: Some(&judge), ..ExportOptions::default() };
    let request = ExportRequest { base: &base, adapter: &adapter, target, out: &out, options };
    let error = export(&request, &mut |_| ()).expect_err("refused");
    assert!(error.is_verification() && error.to_string().contains("answers like the base"), "{error}");
    assert!(!out.exists());
    let options = ExportOptions { verification: tune_export::Verification::Warn, ..options };
    let report = export(&ExportRequest { options, ..request }, &mut |_| ()).expect("warned");
    assert!(report.notes.iter().any(|note| note.contains("answers like the base")) && out.exists());
}

#[test]
fn weights_of_an_export_are_checked_tensor_by_tensor() {
    let dir = tempdir();
    let base = base("llama-tied");
    let mut adapter = adapter(&base.config);
    let out = dir.path().join("m.gguf");
    run(&base, &adapter, ExportTarget::Gguf(FileType::Q8_0), &out).expect("exported");
    let merged = tune_formats::open(&out).expect("opened");
    let problems = |adapter: &Adapter| -> Vec<String> {
        let checks = tune_export::check_weights(&base, adapter, &merged, &mut |_, _| ()).expect("checked");
        checks.iter().filter_map(tune_export::WeightCheck::problem).collect()
    };
    assert_eq!(problems(&adapter), Vec::<String>::new());
    let (name, lora) = adapter.layers.iter_mut().next().expect("a layer");
    let name = name.clone();
    lora.b.to_mut().iter_mut().for_each(|b| *b *= 20.0);
    let found = problems(&adapter);
    assert!(found.len() == 1 && found[0].starts_with(&name), "{found:?}");
}
