//! `{"input_ids", "labels"?, "attention_mask"?}`: rows that were tokenised elsewhere.

use serde_json::Value;

use super::{Object, Row, list};
use crate::Sample;

/// The label of a token without loss, as in torch.
const IGNORED: i64 = -100;

pub(super) fn read(row: &Object) -> Result<Row, String> {
    let ids = list(row, &["input_ids"])?;
    if ids.is_empty() {
        return Err("`input_ids` is empty".to_owned());
    }
    let ids: Vec<u32> = ids.iter().enumerate().map(|(i, id)| token(i, id)).collect::<Result<_, _>>()?;
    let labels = optional(row, "labels", ids.len())?;
    let attended = optional(row, "attention_mask", ids.len())?;
    let mut kept = Vec::with_capacity(ids.len());
    let mut trained = Vec::with_capacity(ids.len());
    for (i, &id) in ids.iter().enumerate() {
        let label = labels.map_or(Ok(i64::from(id)), |labels| integer("labels", i, &labels[i]))?;
        if label != IGNORED && label != i64::from(id) {
            return Err(format!("labels[{i}] is {label}, expected -100 or input_ids[{i}] = {id}"));
        }
        // what is not attended to is padding
        if attended.map_or(Ok(1), |mask| integer("attention_mask", i, &mask[i]))? != 0 {
            kept.push(id);
            trained.push(label != IGNORED);
        }
    }
    Ok(Row::Tokens(Sample::new(kept, trained)))
}

fn token(index: usize, value: &Value) -> Result<u32, String> {
    value
        .as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| format!("input_ids[{index}] is {value}, expected a token id"))
}

fn integer(name: &str, index: usize, value: &Value) -> Result<i64, String> {
    value.as_i64().ok_or_else(|| format!("{name}[{index}] is {value}, expected an integer"))
}

fn optional<'a>(row: &'a Object, key: &str, len: usize) -> Result<Option<&'a [Value]>, String> {
    if row.get(key).is_none_or(Value::is_null) {
        return Ok(None);
    }
    let values = list(row, &[key])?;
    if values.len() == len {
        Ok(Some(values))
    } else {
        Err(format!("{} {key} for {len} input_ids", values.len()))
    }
}
