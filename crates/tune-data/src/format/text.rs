//! `{"text"}`: one plain document.

use super::{Object, Row, string};

pub(super) fn read(row: &Object) -> Result<Row, String> {
    let text = string(row, &["text"])?;
    if text.is_empty() {
        return Err("`text` is empty".to_owned());
    }
    Ok(Row::Text(text.to_owned()))
}
