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

use crate::error::{Error, Result, acts_on_a_terminal, printable};
use crate::files::TensorFile;
use crate::pt::{BigInt, PathPart, Value, dotted};
use std::io::{self, Write};
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
/// little-endian bytes in row-major order; then the plain values. Without checksums no tensor is read. Nothing is written
/// before the file has been read; then the answer goes to `out` piece by piece, since a file may refer to one string often.
///
/// In JSON, integers have all their digits, infinities are `1e999` and `-1e999` (numbers, which readers take for infinite),
/// NaN is the string `"NaN"`. Values that are neither plain nor tensors (dtypes, devices, bytes, sets, what is empty) are under
/// `opaque`. What could act on a terminal is escaped.
///
/// # Errors
/// A file that cannot be opened or read, see [`TensorFile`]; those of `out`.
pub fn info(path: &Path, style: Style, checksums: bool, out: &mut dyn Write) -> Result<()> {
    let mut file = TensorFile::open(path)?;
    let mut crcs = Vec::new();
    if checksums {
        for index in 0..file.tensors().len() {
            crcs.push(file.crc32(index)?);
        }
    }
    match style {
        Style::Json => json(&file, &crcs, out),
        Style::Text => text(&file, &crcs, out),
    }
}

fn json(file: &TensorFile, crcs: &[u32], out: &mut dyn Write) -> Result<()> {
    let head = |out: &mut dyn Write| {
        out.write_all(b"{\"file\":")?;
        quote(&file.path().to_string_lossy(), out)?;
        write!(out, ",\"format\":\"{}\",\"tensors\":[", file.format())?;
        for (index, tensor) in file.tensors().iter().enumerate() {
            out.write_all(if index == 0 { b"{\"path\":" } else { b",{\"path\":" })?;
            json_path(&tensor.path, out)?;
            out.write_all(b",\"name\":")?;
            quote(&tensor.name, out)?;
            write!(out, ",\"dtype\":\"{}\",\"shape\":{}", tensor.dtype, numbers(&tensor.shape))?;
            write!(out, ",\"strides\":{}", numbers(&tensor.strides))?;
            if let Some(crc) = crcs.get(index) {
                write!(out, ",\"crc32\":\"{crc:08x}\"")?;
            }
            out.write_all(b"}")?;
        }
        out.write_all(b"],\"values\":[")
    };
    head(out).map_err(failed)?;
    json_values(file, "value", out)?;
    out.write_all(b"],\"opaque\":[").map_err(failed)?;
    json_values(file, "what", out)?;
    let tail = |out: &mut dyn Write| {
        out.write_all(b"]")?;
        for (index, (key, value)) in file.metadata().iter().enumerate() {
            out.write_all(if index == 0 { b",\"metadata\":{" } else { b"," })?;
            quote(key, out)?;
            out.write_all(b":")?;
            quote(value, out)?;
        }
        out.write_all(if file.metadata().is_empty() { b"}\n" } else { b"}}\n" })
    };
    tail(out).map_err(failed)
}

/// The values that have a form in JSON, where `kind` is `value`; the others, where it is `what`.
fn json_values(file: &TensorFile, kind: &str, out: &mut dyn Write) -> Result<()> {
    let mut first = true;
    let Some(pt) = file.as_pt() else { return Ok(()) };
    pt.plain_values(|path, value| {
        let what = opaque(value);
        if what.is_some() != (kind == "what") {
            return Ok(());
        }
        let mut entry = || {
            out.write_all(if std::mem::take(&mut first) { b"{\"path\":" } else { b",{\"path\":" })?;
            json_path(path, out)?;
            write!(out, ",\"{kind}\":")?;
            match &what {
                Some(what) => quote(what, out)?,
                None => json_value(value, out)?,
            }
            out.write_all(b"}")
        };
        entry().map_err(failed)
    })
}

fn text(file: &TensorFile, crcs: &[u32], out: &mut dyn Write) -> Result<()> {
    let name = |path: &[PathPart]| if path.is_empty() { "(the root)".into() } else { printable(&dotted(path)) };
    let tensors = |out: &mut dyn Write| {
        writeln!(out, "{}\t{}", printable(&file.path().to_string_lossy()), file.format())?;
        for (index, tensor) in file.tensors().iter().enumerate() {
            write!(out, "{}\t{}\t{:?}", name(&tensor.path), tensor.dtype, tensor.shape)?;
            write!(out, "\tstrides {:?}", tensor.strides)?;
            if let Some(crc) = crcs.get(index) {
                write!(out, "\tcrc32 {crc:08x}")?;
            }
            writeln!(out)?;
        }
        Ok(())
    };
    tensors(out).map_err(failed)?;
    if let Some(pt) = file.as_pt() {
        pt.plain_values(|path, value| {
            let mut line = || {
                write!(out, "{}\t", name(path))?;
                match opaque(value) {
                    Some(what) => out.write_all(printable(&what).as_bytes())?,
                    None => json_value(value, out)?,
                }
                writeln!(out)
            };
            line().map_err(failed)
        })?;
    }
    let metadata = |out: &mut dyn Write| {
        for (key, value) in file.metadata() {
            write!(out, "{}\t", printable(key))?;
            quote(value, out)?;
            writeln!(out)?;
        }
        Ok(())
    };
    metadata(out).map_err(failed)
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot print", error)
}

/// Writes a string of JSON, what could act on a terminal escaped too.
fn quote(text: &str, out: &mut dyn Write) -> io::Result<()> {
    let escaped = |c: char| matches!(c, '"' | '\\') || acts_on_a_terminal(c);
    out.write_all(b"\"")?;
    let mut rest = text;
    while let Some((end, c)) = rest.char_indices().find(|&(_, c)| escaped(c)) {
        let (plain, from) = rest.split_at(end);
        out.write_all(plain.as_bytes())?;
        match c {
            '"' => out.write_all(b"\\\"")?,
            '\\' => out.write_all(b"\\\\")?,
            '\n' => out.write_all(b"\\n")?,
            '\r' => out.write_all(b"\\r")?,
            '\t' => out.write_all(b"\\t")?,
            // None of them lies beyond 16 bits.
            c => write!(out, "\\u{:04x}", u32::from(c))?,
        }
        rest = from.strip_prefix(c).unwrap_or_default();
    }
    out.write_all(rest.as_bytes())?;
    out.write_all(b"\"")
}

fn numbers(list: &[usize]) -> String {
    let list: Vec<String> = list.iter().map(usize::to_string).collect();
    format!("[{}]", list.join(","))
}

fn json_path(path: &[PathPart], out: &mut dyn Write) -> io::Result<()> {
    out.write_all(b"[")?;
    for (index, part) in path.iter().enumerate() {
        out.write_all(if index == 0 { b"" } else { b"," })?;
        match part {
            PathPart::Key(key) => quote(key, out)?,
            PathPart::Index(n) => write!(out, "{n}")?,
        }
    }
    out.write_all(b"]")
}

/// What the value is, if it has no form in JSON.
fn opaque(value: Value<'_>) -> Option<String> {
    let held = |what: &str, len: usize| match len {
        0 => format!("an empty {what}"),
        len => format!("a {what} of {len}"),
    };
    match value {
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Str(_) => None,
        Value::Big(n) if n.le_bytes().len() <= BigInt::MAX_DECIMAL_BYTES => None,
        Value::Big(n) => Some(format!("an integer of {} bytes", n.le_bytes().len())),
        Value::Bytes(bytes) => Some(format!("{} bytes", bytes.len())),
        Value::Opaque(what) => Some(what.to_string()),
        Value::List(items) => Some(held("list", items.len())),
        Value::Tuple(items) => Some(held("tuple", items.len())),
        Value::Dict(entries) => Some(held("dict", entries.len())),
        Value::Set(items) => Some(held("set", items.len())),
        Value::Tensor(_) => Some("a tensor".into()),
    }
}

/// Writes a value that has a form in JSON.
fn json_value(value: Value<'_>, out: &mut dyn Write) -> io::Result<()> {
    match value {
        Value::Bool(b) => write!(out, "{b}"),
        Value::Int(n) => write!(out, "{n}"),
        Value::Big(n) => write!(out, "{n}"),
        Value::Float(f) if f.is_nan() => out.write_all(b"\"NaN\""),
        Value::Float(f) if f.is_infinite() => out.write_all(if f > 0.0 { b"1e999" } else { b"-1e999" }),
        // The shortest form that reads back as the same number; always with a point or an exponent.
        Value::Float(f) => write!(out, "{f:?}"),
        Value::Str(text) => quote(text, out),
        _ => out.write_all(b"null"),
    }
}
