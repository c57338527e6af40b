//! `crosscoder info`: what is in a file, with a checksum for each tensor.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use crate::error::{Result, printable};
use crate::files::TensorFile;
use crate::pt::{BigInt, PathPart, Value, dotted};
use std::fmt::Write;
use std::path::Path;

/// The form of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// One line a tensor or value, columns separated by tabs.
    Text,
    /// One JSON object, on one line.
    Json,
}

/// Describes the file at `path`: its tensors with dtype, shape, strides and, if `checksums`, the CRC-32 of their elements'
/// little-endian bytes in row-major order; then the plain values. Without checksums no tensor is read.
///
/// In JSON, integers have all their digits, infinities are `1e999` and `-1e999` (numbers, which readers take for infinite),
/// NaN is the string `"NaN"`. Values that are neither plain nor tensors (dtypes, devices, bytes) are under `opaque`.
///
/// # Errors
/// A file that cannot be opened or read, see [`TensorFile`].
pub fn info(path: &Path, style: Style, checksums: bool) -> Result<String> {
    let mut file = TensorFile::open(path)?;
    let mut crcs = Vec::new();
    if checksums {
        for index in 0..file.tensors().len() {
            crcs.push(file.crc32(index)?);
        }
    }
    match style {
        Style::Json => json(&file, &crcs),
        Style::Text => text(&file, &crcs),
    }
}

fn json(file: &TensorFile, crcs: &[u32]) -> Result<String> {
    let path = file.path().to_string_lossy();
    let mut out = format!("{{\"file\":{},\"format\":\"{}\",\"tensors\":[", quoted(&path), file.format());
    for (index, tensor) in file.tensors().iter().enumerate() {
        comma(&mut out, index == 0);
        push(&mut out, format_args!("{{\"path\":{},\"name\":{}", json_path(&tensor.path), quoted(&tensor.name)));
        push(&mut out, format_args!(",\"dtype\":\"{}\",\"shape\":{}", tensor.dtype, numbers(&tensor.shape)));
        push(&mut out, format_args!(",\"strides\":{}", numbers(&tensor.strides)));
        if let Some(crc) = crcs.get(index) {
            push(&mut out, format_args!(",\"crc32\":\"{crc:08x}\""));
        }
        out.push('}');
    }
    out.push_str("],\"values\":[");
    let (mut opaque, mut first) = (String::new(), true);
    if let Some(pt) = file.as_pt() {
        pt.plain_values(|path, value| {
            match json_value(value) {
                Ok(value) => {
                    comma(&mut out, first);
                    push(&mut out, format_args!("{{\"path\":{},\"value\":{value}}}", json_path(path)));
                    first = false;
                }
                Err(what) => {
                    let first = opaque.is_empty();
                    comma(&mut opaque, first);
                    push(&mut opaque, format_args!("{{\"path\":{},\"what\":{}}}", json_path(path), quoted(&what)));
                }
            }
            Ok(())
        })?;
    }
    push(&mut out, format_args!("],\"opaque\":[{opaque}]"));
    if !file.metadata().is_empty() {
        let pairs: Vec<String> = file.metadata().iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v))).collect();
        push(&mut out, format_args!(",\"metadata\":{{{}}}", pairs.join(",")));
    }
    out.push_str("}\n");
    Ok(out)
}

fn text(file: &TensorFile, crcs: &[u32]) -> Result<String> {
    let mut out = format!("{}\t{}\n", printable(&file.path().to_string_lossy()), file.format());
    for (index, tensor) in file.tensors().iter().enumerate() {
        let name = if tensor.path.is_empty() { "(the root)" } else { &tensor.name };
        push(&mut out, format_args!("{}\t{}\t{:?}", printable(name), tensor.dtype, tensor.shape));
        push(&mut out, format_args!("\tstrides {:?}", tensor.strides));
        if let Some(crc) = crcs.get(index) {
            push(&mut out, format_args!("\tcrc32 {crc:08x}"));
        }
        out.push('\n');
    }
    if let Some(pt) = file.as_pt() {
        pt.plain_values(|path, value| {
            let value = json_value(value).unwrap_or_else(|what| printable(&what));
            push(&mut out, format_args!("{}\t{value}\n", printable(&dotted(path))));
            Ok(())
        })?;
    }
    for (key, value) in file.metadata() {
        push(&mut out, format_args!("{}\t{}\n", printable(key), quoted(value)));
    }
    Ok(out)
}

fn push(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = out.write_fmt(text);
}

fn comma(out: &mut String, first: bool) {
    if !first {
        out.push(',');
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn numbers(list: &[usize]) -> String {
    let list: Vec<String> = list.iter().map(usize::to_string).collect();
    format!("[{}]", list.join(","))
}

fn json_path(path: &[PathPart]) -> String {
    let parts = path.iter().map(|part| match part {
        PathPart::Key(key) => quoted(key),
        PathPart::Index(n) => n.to_string(),
    });
    format!("[{}]", parts.collect::<Vec<_>>().join(","))
}

/// The value in JSON, or what it is if it has no such form.
fn json_value(value: Value<'_>) -> Result<String, String> {
    match value {
        Value::None => Ok("null".into()),
        Value::Bool(b) => Ok(b.to_string()),
        Value::Int(n) => Ok(n.to_string()),
        Value::Big(n) if n.le_bytes().len() <= BigInt::MAX_DECIMAL_BYTES => Ok(n.to_string()),
        Value::Big(n) => Err(format!("an integer of {} bytes", n.le_bytes().len())),
        Value::Float(f) if f.is_nan() => Ok("\"NaN\"".into()),
        Value::Float(f) if f.is_infinite() => Ok(if f > 0.0 { "1e999" } else { "-1e999" }.into()),
        // The shortest form that reads back as the same number; always with a point or an exponent.
        Value::Float(f) => Ok(format!("{f:?}")),
        Value::Str(text) => Ok(quoted(text)),
        Value::Bytes(bytes) => Err(format!("{} bytes", bytes.len())),
        Value::Opaque(what) => Err(what.to_string()),
        Value::Tensor(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::Set(_) => {
            Err("a container".into())
        }
    }
}
