//! The real SmolLM2-135M-Instruct.Q4_1.gguf, where the environment variable `TUNE_TEST_GGUF` names it.

use std::path::PathBuf;

use tune_formats::gguf::Value;
use tune_formats::{Source, TokenType, TokenizerFiles, open};
use tune_quant::BlockType;

#[test]
#[allow(clippy::print_stderr, reason = "a skipped test must be seen")]
fn the_real_file() {
    let Some(path) = std::env::var_os("TUNE_TEST_GGUF").map(PathBuf::from) else {
        eprintln!("SKIPPED: set TUNE_TEST_GGUF to the path of SmolLM2-135M-Instruct.Q4_1.gguf");
        return;
    };
    let base = open(&path).expect("opened");
    let Source::Gguf(file) = &base.source else { panic!("not GGUF") };
    assert_eq!((file.tensors().len(), file.metadata().len()), (272, 33));
    assert_eq!(base.name, "Smollm2 135M 8k Lc100K Mix1 Ep2");
    assert_eq!(file.metadata().get("general.file_type"), Some(&Value::U32(3)));
    assert_eq!(file.metadata().iter().last().expect("keys").0, "general.quantization_version");

    let bytes_of = |kind| {
        let of_kind = file.tensors().iter().filter(|tensor| tensor.block_type == kind);
        let sizes = of_kind.map(tune_formats::gguf::TensorInfo::byte_len).collect::<Vec<_>>();
        (sizes.len(), sizes.iter().sum::<usize>())
    };
    assert_eq!(bytes_of(BlockType::Q4_1), (210, 66_355_200));
    assert_eq!(bytes_of(BlockType::Q8_0), (1, 30_081_024));
    assert_eq!(bytes_of(BlockType::F32), (61, 140_544));
    let parameters: usize = file.tensors().iter().map(tune_formats::gguf::TensorInfo::elements).sum();
    assert_eq!(parameters, 134_515_008);

    let config = &base.config;
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (49_152, 576, 1536));
    assert_eq!(
        (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads),
        (30, 9, 3)
    );
    assert_eq!((config.head_dim, config.max_position_embeddings), (64, 8192));
    assert_eq!(
        (config.rope_theta.to_bits(), config.rms_norm_eps.to_bits()),
        (1e5_f64.to_bits(), 1e-5_f64.to_bits())
    );
    assert!(config.tie_word_embeddings && config.rope_scaling.is_none() && !config.attention_bias);

    let TokenizerFiles::Gguf(tokenizer) = &base.tokenizer else { panic!("not from GGUF") };
    assert_eq!((tokenizer.model.as_str(), tokenizer.pre.as_deref()), ("gpt2", Some("smollm")));
    assert_eq!((tokenizer.tokens.len(), tokenizer.merges.len(), tokenizer.scores.len()), (49_152, 48_900, 0));
    assert_eq!(tokenizer.token_types.iter().filter(|kind| **kind == TokenType::Control).count(), 17);
    let special = &base.special;
    assert_eq!((special.bos, special.eos, special.pad, special.eot), (Some(1), Some(2), Some(2), Some(2)));
    assert_eq!((special.eos_ids.as_slice(), special.add_bos), (&[0, 2][..], false));
    assert_eq!(base.chat_template.as_deref().map(|template| template.chars().count()), Some(368));

    assert_eq!(base.weights.names().len(), 272);
    let q = base.weights.matrix("model.layers.29.self_attn.q_proj.weight").expect("q");
    let mut row = vec![0.0; 576];
    q.decode_row(575, &mut row);
    assert!(row.iter().all(|value| value.is_finite()) && row.iter().any(|value| *value != 0.0));
    assert_eq!(base.digest().expect("digest"), open(&path).expect("opened").digest().expect("digest"));
}
