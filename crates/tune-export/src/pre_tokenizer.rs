//! Which of llama.cpp's built-in pre-tokenizers a byte-level BPE tokenizer uses: `tokenizer.ggml.pre`.
//!
//! llama.cpp's converter encodes one fixed text and looks the SHA-256 of the ids, written as a Python list, up in a
//! table. Tokenizers with another vocabulary have other digests, so those that the table lacks are told by the
//! regular expressions they split with.

use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

/// The text that llama.cpp's converter encodes.
const CHECK_TEXT: &str = "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\u{1f680} (normal) \
    \u{1f636}\u{200d}\u{1f32b}\u{fe0f} (multiple emojis concatenated) \u{2705} \u{1f999}\u{1f999} 3 33 333 3333 \
    33333 333333 3333333 33333333 3.3 3..3 3...3 \
    \u{1780}\u{17b6}\u{1793}\u{17cb}\u{178f}\u{17c2}\u{1796}\u{17b7}\u{179f}\u{17c1}\u{179f}\u{17a2}\u{17b6}\u{1785}\
    \u{1f601} ?\u{6211}\u{60f3}\u{5728}apple\u{5de5}\u{4f5c}1314151\u{5929}\u{ff5e} ------======= \
    \u{43d}\u{435}\u{449}\u{43e} \u{43d}\u{430} \u{411}\u{44a}\u{43b}\u{433}\u{430}\u{440}\u{441}\u{43a}\u{438} \
    ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, \
    'D you like some tea? We'Ve a'lL";

/// `digest name`, one a line.
const BY_DIGEST: &str = include_str!("pre_tokenizers.txt");

/// SHA-256 over the concatenated regular expressions, and the name for tokenizers that look a whole pre-token up
/// before merging (`ignore_merges`) and for those that do not.
const BY_REGEX: [(&str, &str, &str); 7] = [
    ("d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f", "llama-bpe", "smaug-bpe"),
    ("1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e", "qwen2", "qwen2"),
    ("00431aed57e696b747435f734d1e3b9b1bfd931a121fb5cac7129e97c181e9ba", "qwen35", "qwen35"),
    ("03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02", "deepseek-llm", "deepseek-llm"),
    ("21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e", "deepseek-coder", "deepseek-coder"),
    ("2d1b8dc11e89af71459b36004f698ab3693f59fd84f63e8ec2b49564ab857420", "gpt-4o", "gpt-4o"),
    ("1d64a9a8eaf9f1bd80331984d81fdd514e7feafe8df83a525dd31472f275699a", "tekken", "tekken"),
];

/// The name of the pre-tokenizer, or the digest that is in no table.
pub(crate) fn name(tokenizer: &Tokenizer, tokenizer_json: &Value) -> Result<&'static str, String> {
    let digest = match tokenizer.encode(CHECK_TEXT, true) {
        Ok(encoding) => sha256(&format!("{:?}", encoding.get_ids())),
        Err(error) => return Err(error.to_string()),
    };
    by_digest(&digest).or_else(|| by_pre_tokenizer(tokenizer_json)).ok_or(digest)
}

fn by_digest(digest: &str) -> Option<&'static str> {
    BY_DIGEST.lines().find_map(|line| line.strip_prefix(digest)).map(str::trim_start)
}

fn by_pre_tokenizer(tokenizer_json: &Value) -> Option<&'static str> {
    let pre_tokenizer = &tokenizer_json["pre_tokenizer"];
    let steps = match pre_tokenizer["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![pre_tokenizer],
    };
    let kinds: Vec<&str> = steps.iter().filter_map(|step| step["type"].as_str()).collect();
    let gpt2_regex = steps.last()?["use_regex"].as_bool().unwrap_or(true);
    match kinds[..] {
        ["Digits", "ByteLevel"] if gpt2_regex && steps[0]["individual_digits"] == true => Some("smollm"),
        ["ByteLevel"] if gpt2_regex => Some("gpt-2"),
        [.., "ByteLevel"] if !gpt2_regex => {
            let regexes: String = steps.iter().filter_map(|step| step["pattern"]["Regex"].as_str()).collect();
            let ignore_merges = tokenizer_json["model"]["ignore_merges"] == true;
            let (_, with, without) = BY_REGEX.into_iter().find(|(digest, ..)| *digest == sha256(&regexes))?;
            Some(if ignore_merges { with } else { without })
        }
        _ => None,
    }
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn check_text_is_the_converters() {
        assert_eq!((CHECK_TEXT.chars().count(), CHECK_TEXT.len()), (350, 431));
        assert_eq!(sha256(CHECK_TEXT), "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da");
    }

    #[test]
    fn digests_and_regexes_are_found() {
        assert_eq!(
            by_digest("855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"),
            Some("smollm")
        );
        assert_eq!(by_digest("00"), None);
        let llama3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| \
            ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
        let tokenizer = |ignore_merges| {
            json!({"model": {"ignore_merges": ignore_merges}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": llama3}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}})
        };
        assert_eq!(by_pre_tokenizer(&tokenizer(true)), Some("llama-bpe"));
        assert_eq!(by_pre_tokenizer(&tokenizer(false)), Some("smaug-bpe"));
        assert_eq!(by_pre_tokenizer(&json!({"pre_tokenizer": {"type": "Whitespace"}})), None);
    }
}
