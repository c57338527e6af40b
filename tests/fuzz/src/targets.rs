//! The fuzz targets: one function for each reader of foreign bytes, from bytes to nothing, that panics where a promise is
//! broken. Beside "no panic" the promises are:
//!
//! - What a reader allocates is bounded by the bytes it was given (and, for a `.pt` file, by what its values say).
//! - The checksum that is told of a tensor is that of its elements; its rows, read alone, are rows of the whole.
//! - What was accepted can be written, our reader accepts that, finds the same in it, and writes the same bytes again.
//! - A refusal says something.
//! - What `info` tells of a file, and `convert` of what it leaves out, is told in bounded memory and does nothing to a terminal.
//!
//! `run.sh` runs them under libFuzzer, `tests/fuzz.rs` for a bounded number of seeded mutants.

use crate::counting::{Used, measure};
use crosscoder::autodiff::{PARAMETER_NAMES, Parameters};
use crosscoder::backend::Cpu;
use crosscoder::error::{Result, acts_on_a_terminal, printable};
use crosscoder::files::{TensorFile, TensorInfo};
use crosscoder::info::{Style, info};
use crosscoder::npy::{self, NpyFile};
use crosscoder::pt::{self, PathPart, PtFile, Save, TensorSource, Value, Writer};
use crosscoder::safetensors::{self, SafetensorsFile};
use crosscoder::tensor::{Tensor, element_count};
use crosscoder::{Config, CrossCoder, Dtype, Error, layouts, normalisation};
use std::collections::HashMap;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// What is done with a file's bytes; it panics where something is wrong.
pub(crate) type Target = fn(&[u8]);

/// The targets by name.
pub(crate) const ALL: [(&str, Target); 6] = [
    ("pt", pt),
    ("pickle", pickle),
    ("npy", npy),
    ("safetensors", safetensors),
    ("cfg", cfg),
    ("checkpoint", checkpoint),
];

/// A reader's buffer and the like, whatever the file's length.
const FIXED_BYTES: usize = 64 << 10;
/// The reader's buffer for what lies in records.
const PIECE_BYTES: usize = 256 << 10;
/// What reading a file's directory and pickle, and telling what they hold, may take beside the file, whatever they are.
const VALUES_BYTES: usize = 256 << 20;
/// So much of what is told of a file is looked at, if it does not hold more values than this.
const TOLD_BYTES: usize = 64 << 10;
const TOLD_VALUES: usize = 1 << 12;
/// Tensors beyond this many bytes are not read: a target is to be fast.
const READ_BYTES: usize = 64 << 10;

/// A whole `.pt` file as it is; where that is refused, the same with its checksums repaired (none written), so that the
/// pickle and the tensors are reached.
pub(crate) fn pt(data: &[u8]) {
    if pt_file(data, data.len()).is_err() {
        let mut repaired = data.to_vec();
        if without_checksums(&mut repaired) {
            let _refused_again = pt_file(&repaired, data.len());
        }
    }
}

/// A pickle in a good archive, with a few storages beside it.
pub(crate) fn pickle(data: &[u8]) {
    let _refused = pt_file(&archive_of(data), data.len());
}

fn pt_file(file: &[u8], bytes: usize) -> Result<()> {
    let (opened, used) = measure(|| PtFile::new(Cursor::new(file)));
    // Limits of the reader that hold whatever the file says: of its values' number and paths. See `pt::value`.
    assert!(used.peak <= VALUES_BYTES, "{bytes} bytes made the reader hold {} bytes", used.peak);
    let mut pt = match opened {
        Ok(pt) => pt,
        Err(e) => return Err(explained(e)),
    };
    let mut leaves = pt.tensors().len();
    pt.plain_values(|_, _| {
        leaves += 1;
        Ok(())
    })?;
    // A value takes a byte of the pickle at least, and some hundred in memory; deflate packs a thousand bytes into one.
    let unpacked = if deflated(file) { file.len().saturating_mul(1032) } else { file.len() };
    let allowed = (unpacked + leaves).saturating_mul(256).saturating_add(PIECE_BYTES + FIXED_BYTES);
    assert!(used.largest <= allowed, "{bytes} bytes, {leaves} values, and one allocation of {}", used.largest);
    if leaves <= TOLD_VALUES {
        told(&pt, file);
    }

    let tensors = pt.tensors().to_vec();
    let (mut read, mut left) = (HashMap::new(), READ_BYTES);
    for (index, entry) in tensors.iter().enumerate().take(64) {
        let tensor = &entry.tensor;
        let size = tensor.elements.saturating_mul(tensor.dtype.size_bytes());
        if size > left {
            continue;
        }
        left -= size;
        assert!(pt.find(&entry.path).is_ok(), "{:?} is not found", entry.path);
        let (crc, used) = measure(|| pt.crc32(tensor));
        bounded(used, file.len() + size, 4);
        let (whole, used) = measure(|| pt.read(tensor));
        bounded(used, file.len() + size, 4);
        // Both fail where a checksum does not match or a deflate stream is corrupt.
        assert_eq!(crc.is_ok(), whole.is_ok(), "{crc:?}, {:?}", whole.as_ref().err());
        let Ok(whole) = whole else { continue };
        assert_eq!((whole.dtype(), whole.shape()), (tensor.dtype, &tensor.shape[..]));
        // A bool's byte may be other than 0 and 1 in a file, and is not in memory.
        if tensor.dtype != Dtype::Bool {
            assert_eq!(crc.ok(), Some(crc32(&row_major(&whole))), "{}", entry.name);
        }
        if let Some(&rows) = tensor.shape.first() {
            check_rows(&whole, rows, |range| pt.read_rows(tensor, range));
            assert!(pt.read_rows(tensor, 0..rows.saturating_add(1)).is_err() || rows == usize::MAX);
        }
        read.insert(index, whole);
    }

    // Write what can be written, read it back, and write it again.
    let mut next = 0;
    let mut budget = 2000;
    let Some(plain) = Plain::of(pt.root(), &mut next, &read, 0, &mut budget) else { return Ok(()) };
    let written = plain.write();
    let mut again = PtFile::new(Cursor::new(&written[..])).expect("what we write is accepted");
    let mut reread = HashMap::new();
    for (index, entry) in again.tensors().to_vec().iter().enumerate() {
        reread.insert(index, again.read(&entry.tensor).expect("what we write is read"));
    }
    let (mut next, mut budget) = (0, usize::MAX);
    let same = Plain::of(again.root(), &mut next, &reread, 0, &mut budget).expect("it is no larger");
    assert_eq!(plain, same, "what was written is not what is read");
    assert!(same.write() == written, "the second writing differs from the first");
    Ok(())
}

/// What `info` and `convert` do with the values of a file that is accepted.
fn told(pt: &PtFile<Cursor<&[u8]>>, file: &[u8]) {
    let path = on_disk(file, "pt");
    // One way for each file, and the beginning of what is told: a target is to be fast.
    let all: usize = pt.tensors().iter().fold(0, |n, t| n.saturating_add(t.tensor.elements.saturating_mul(8)));
    match file.len() % 3 {
        0 if all <= READ_BYTES => {
            // With checksums it is all or nothing.
            let (answer, written, _) = tell(&path, Style::Json, true, TOLD_BYTES);
            assert!(
                answer.is_ok() || written == 0 || written > TOLD_BYTES,
                "told in part, and then refused: {answer:?}"
            );
        }
        n => {
            let style = if n == 1 { Style::Text } else { Style::Json };
            let (answer, written, _) = tell(&path, style, false, TOLD_BYTES);
            assert!(answer.is_ok() || written > TOLD_BYTES, "what was opened can be told: {answer:?}");
        }
    }
    let mut out = Told { bytes: 0, limit: TOLD_BYTES };
    let (_, used) = measure(|| {
        pt.plain_values(|path, _| write!(out, "{}, ", printable(&pt::dotted(path))).map_err(|e| Error::io("", e)))
    });
    assert!(used.peak <= VALUES_BYTES, "{} bytes made `convert` hold {}", file.len(), used.peak);
}

/// Has `info` tell what the file holds, up to a limit: its answer, the bytes that it wrote, and those that it held at most.
pub(crate) fn tell(path: &Path, style: Style, checksums: bool, limit: usize) -> (Result<()>, usize, usize) {
    let mut out = Told { bytes: 0, limit };
    let (answer, used) = measure(|| info(path, style, checksums, &mut out));
    assert!(used.peak <= VALUES_BYTES, "`info` held {} bytes for {answer:?}", used.peak);
    (answer.map_err(explained), out.bytes, used.peak)
}

/// Counts the bytes that it is given, which must be text that does nothing to a terminal, and takes no more once they pass the limit.
struct Told {
    bytes: usize,
    limit: usize,
}

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = std::str::from_utf8(bytes).expect("whole characters are written");
        assert!(!text.chars().any(|c| acts_on_a_terminal(c) && c != '\n' && c != '\t'), "{text:?} is written");
        self.bytes += bytes.len();
        match self.bytes > self.limit {
            true => Err(std::io::Error::other("enough was told")),
            false => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A file of this thread's own with these bytes, for what takes a path.
pub(crate) fn on_disk(bytes: &[u8], ending: &str) -> PathBuf {
    let name = format!("crosscoder-fuzz-{}-{:?}.{ending}", std::process::id(), std::thread::current().id());
    let path = std::env::temp_dir().join(name);
    std::fs::write(&path, bytes).expect("the folder for temporary files can be written to");
    path
}

/// An array file.
pub(crate) fn npy(data: &[u8]) {
    let (opened, used) = measure(|| NpyFile::new(Cursor::new(data)));
    bounded(used, data.len(), 16);
    let mut file = match opened {
        Ok(file) => file,
        Err(e) => return drop(explained(e)),
    };
    let (crc, used) = measure(|| file.crc32());
    bounded(used, data.len(), 4);
    let (whole, used) = measure(|| file.read());
    bounded(used, data.len(), 4);
    let whole = whole.expect("all elements are there");
    assert_eq!((whole.dtype(), whole.shape(), whole.strides()), (file.dtype(), file.shape(), file.strides()));
    if whole.dtype() != Dtype::Bool {
        assert_eq!(crc.expect("all elements are there"), crc32(&row_major(&whole)));
    }
    if let Some(&rows) = whole.shape().first()
        && whole.is_row_major()
    {
        check_rows(&whole, rows, |range| file.read_rows(range));
    }
    let written = npy::write(Vec::new(), &whole).expect("what was read can be written");
    let mut again = NpyFile::new(Cursor::new(&written[..])).expect("what we write is accepted");
    let same = again.read().expect("what we write is read");
    same_elements(&whole, &same);
    assert!(npy::write(Vec::new(), &same).expect("again") == written, "the second writing differs from the first");
}

/// A `.safetensors` file.
pub(crate) fn safetensors(data: &[u8]) {
    let (opened, used) = measure(|| SafetensorsFile::new(Cursor::new(data)));
    bounded(used, data.len(), 32);
    let mut file = match opened {
        Ok(file) => file,
        Err(e) => return drop(explained(e)),
    };
    let mut tensors = Vec::new();
    for index in 0..file.tensors().len() {
        let (crc, used) = measure(|| file.crc32(index));
        bounded(used, data.len(), 4);
        let (whole, used) = measure(|| file.read(index));
        bounded(used, data.len(), 4);
        let whole = whole.expect("all elements are there");
        let entry = file.tensors()[index].clone();
        assert_eq!((whole.dtype(), whole.shape()), (entry.dtype, &entry.shape[..]));
        if entry.dtype != Dtype::Bool {
            assert_eq!(crc.expect("all elements are there"), crc32(&row_major(&whole)), "{}", entry.name);
        }
        if let Some(&rows) = entry.shape.first() {
            check_rows(&whole, rows, |range| file.read_rows(index, range));
        }
        tensors.push((entry.name, whole));
    }
    assert!(file.read(tensors.len()).is_err());
    let metadata = file.metadata().to_vec();
    let write = |tensors: &[(String, Tensor)], metadata: &[(String, String)]| {
        let named: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t as &dyn TensorSource)).collect();
        safetensors::write(Vec::new(), &named, metadata).expect("what was read can be written")
    };
    let written = write(&tensors, &metadata);
    let mut again = SafetensorsFile::new(Cursor::new(&written[..])).expect("what we write is accepted");
    assert_eq!(again.metadata(), metadata);
    assert_eq!(again.tensors().len(), tensors.len());
    let mut reread = Vec::new();
    for index in 0..tensors.len() {
        let name = again.tensors()[index].name.clone();
        let same = again.read(index).expect("what we write is read");
        let (_, whole) = tensors.iter().find(|(n, _)| *n == name).expect("a name that was there");
        same_elements(whole, &same);
        reread.push((name, same));
    }
    assert!(write(&reread, &metadata) == written, "the second writing differs from the first");
}

/// A cfg; behind a NUL, if there is one, a key and a value for `set_text`, with `=` between.
pub(crate) fn cfg(data: &[u8]) {
    let (json, change) = match data.iter().position(|&b| b == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[][..]),
    };
    let (parsed, used) = measure(|| Config::from_json(json));
    bounded(used, json.len(), 512);
    let mut cfg = match parsed {
        Ok(cfg) => cfg,
        Err(e) => return drop(explained(e)),
    };
    written_as_read(&cfg);
    for key in cfg.keys().keys().cloned().collect::<Vec<_>>() {
        let number = cfg.number(&key);
        assert!(number.as_ref().is_ok_and(|n| n.is_finite()) || number.is_err());
        assert_eq!(cfg.size(&key).is_ok(), cfg.count(&key).is_ok_and(|n| n > 0));
        assert!(cfg.text(&key).is_err() || number.is_err());
    }
    let _typed = (cfg.d_in(), cfg.dict_size(), cfg.n_models(), cfg.enc_dtype(), cfg.seed());
    if let Some((key, text)) = std::str::from_utf8(change).ok().and_then(|c| c.split_once('=')) {
        let before = cfg.clone();
        match cfg.set_text(key, text) {
            Ok(()) => {
                assert!(cfg.get(key).is_some());
                written_as_read(&cfg);
            }
            Err(e) => {
                explained(e);
                assert_eq!(cfg, before, "a refused change changed something");
            }
        }
        cfg.remove(key);
        assert!(cfg.get(key).is_none());
    }
}

fn written_as_read(cfg: &Config) {
    let text = cfg.to_json();
    let again = Config::from_json(text.as_bytes()).expect("what we write is accepted");
    assert_eq!(&again, cfg);
    assert_eq!(again.to_json(), text);
    assert!(text.is_ascii(), "{text:?}");
}

/// A checkpoint in whatever layout: a cfg, a NUL, and the weights, in any of the formats.
pub(crate) fn checkpoint(data: &[u8]) {
    let Some(at) = data.iter().position(|&b| b == 0) else { return };
    let Ok(cfg) = Config::from_json(&data[..at]) else { return };
    let mut weights = data[at + 1..].to_vec();
    without_checksums(&mut weights);
    let path = on_disk(&weights, "checkpoint");
    let Ok(mut file) = TensorFile::open(&path) else { return };
    let size = |t: &TensorInfo| element_count(&t.shape).map_or(usize::MAX, |n| n.saturating_mul(t.dtype.size_bytes()));
    let bytes = file.tensors().iter().fold(0usize, |n, t| n.saturating_add(size(t)));
    if bytes > READ_BYTES {
        return;
    }
    let (read, used) = measure(|| layouts::read(&mut file, cfg, Path::new("cfg.json")));
    bounded(used, data.len() + bytes + PIECE_BYTES, 64);
    let (mut cfg, weights) = match read {
        Ok(read) => read,
        Err(e) => return drop(explained(e)),
    };
    written_as_read(&cfg);
    let file_of = |weights: &Parameters<Tensor>| {
        let [a, b, c, d] = weights.each().map(|t| t as &dyn TensorSource);
        let [w_enc, w_dec, b_enc, b_dec] = PARAMETER_NAMES;
        let named = [(w_enc, a), (w_dec, b), (b_enc, c), (b_dec, d)];
        pt::write_state_dict(Vec::new(), "0", &named).expect("what was read can be written")
    };
    let written = file_of(&weights);
    let mut again = PtFile::new(Cursor::new(&written[..])).expect("what we write is accepted");
    let tensors = again.tensors().to_vec();
    assert_eq!(tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), PARAMETER_NAMES);
    for (entry, whole) in tensors.iter().zip(weights.each()) {
        same_elements(whole, &again.read(&entry.tensor).expect("what we write is read"));
    }
    let (folded_cfg, folded) = (cfg.clone(), weights.clone());
    if let Err(e) = CrossCoder::from_tensors(Cpu::<f32>::new(Dtype::F32), cfg.clone(), weights) {
        explained(e);
    }
    cfg = folded_cfg;
    match normalisation::fold(&mut cfg, folded) {
        Ok(folded) => drop((file_of(&folded), written_as_read(&cfg))),
        Err(e) => drop(explained(e)),
    }
}

#[track_caller]
fn explained(e: Error) -> Error {
    assert!((8..4 << 20).contains(&e.to_string().len()), "{e:?}");
    e
}

/// What was allocated is bounded by the bytes that there are.
#[track_caller]
fn bounded(used: Used, bytes: usize, times: usize) {
    let limit = bytes.saturating_mul(times).saturating_add(FIXED_BYTES).saturating_add(PIECE_BYTES.min(bytes));
    assert!(used.peak <= limit, "{bytes} bytes, of which {limit} may be made, and {} were held", used.peak);
}

/// The first row, the last and all, read alone, are rows of the whole.
#[track_caller]
fn check_rows(whole: &Tensor, rows: usize, mut read: impl FnMut(std::ops::Range<usize>) -> Result<Tensor>) {
    let all = row_major(whole);
    let row_bytes = all.len().checked_div(rows).unwrap_or(0);
    for range in [0..rows.min(1), rows.saturating_sub(1)..rows, 0..rows, rows..rows] {
        let part = read(range.clone()).expect("these rows are there");
        assert_eq!(part.shape().first(), Some(&range.len()));
        let needed = &all[row_bytes * range.start..row_bytes * range.end];
        assert!(row_major(&part) == needed, "rows {range:?} of {:?}", whole.shape());
    }
}

#[track_caller]
fn same_elements(a: &Tensor, b: &Tensor) {
    assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()));
    assert!(row_major(a) == row_major(b), "the elements differ");
}

fn row_major(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = Vec::new();
    let collected = tensor.row_major_le_bytes(|piece| {
        bytes.extend_from_slice(piece);
        Ok::<_, Error>(())
    });
    collected.expect("a vector takes all");
    bytes
}

/// What a `.pt` file held, as far as it can be written; what cannot is None.
#[derive(Debug)]
enum Plain {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    List(Vec<Plain>),
    Tuple(Vec<Plain>),
    Dict(Vec<(PathPart, Plain)>),
    Tensor(Tensor),
}

impl PartialEq for Plain {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Plain::None, Plain::None) => true,
            (Plain::Bool(a), Plain::Bool(b)) => a == b,
            (Plain::Int(a), Plain::Int(b)) => a == b,
            (Plain::Float(a), Plain::Float(b)) => a.to_bits() == b.to_bits(),
            (Plain::Str(a), Plain::Str(b)) => a == b,
            (Plain::List(a), Plain::List(b)) | (Plain::Tuple(a), Plain::Tuple(b)) => a == b,
            (Plain::Dict(a), Plain::Dict(b)) => a == b,
            (Plain::Tensor(a), Plain::Tensor(b)) => {
                (a.dtype(), a.shape(), a.strides()) == (b.dtype(), b.shape(), b.strides())
                    && row_major(a) == row_major(b)
            }
            _ => false,
        }
    }
}

impl Plain {
    /// `next` counts the tensors, in the order in which `PtFile::tensors` has them. None where the budget is spent.
    fn of(
        value: Value<'_>,
        next: &mut usize,
        tensors: &HashMap<usize, Tensor>,
        depth: usize,
        budget: &mut usize,
    ) -> Option<Self> {
        *budget = budget.checked_sub(1)?;
        let mut items = |value: Value<'_>| -> Option<Vec<Plain>> {
            value.items().map(|item| Plain::of(item, next, tensors, depth + 1, budget)).collect()
        };
        Some(match value {
            // The writer's limit on depth is 400; and this function recurses.
            Value::List(_) | Value::Tuple(_) | Value::Dict(_) if depth > 90 => return None,
            Value::None | Value::Big(_) | Value::Bytes(_) | Value::Set(_) | Value::Opaque(_) => Plain::None,
            Value::Bool(b) => Plain::Bool(b),
            Value::Int(n) => Plain::Int(n),
            Value::Float(f) => Plain::Float(f),
            Value::Str(text) => Plain::Str(text.to_string()),
            Value::List(_) => Plain::List(items(value)?),
            Value::Tuple(_) => Plain::Tuple(items(value)?),
            Value::Dict(_) => {
                let mut entries: Vec<(PathPart, Plain)> = Vec::new();
                for (key, value) in value.entries() {
                    let value = Plain::of(value, next, tensors, depth + 1, budget)?;
                    // Keys that differ may have one spelling: 1.5 and "1.5".
                    match entries.iter_mut().find(|e| e.0 == key) {
                        Some(entry) => entry.1 = value,
                        None => entries.push((key, value)),
                    }
                }
                Plain::Dict(entries)
            }
            Value::Tensor(_) => {
                let index = *next;
                *next += 1;
                tensors.get(&index).map_or(Plain::None, |t| Plain::Tensor(t.clone()))
            }
        })
    }

    fn save(&self) -> Save<'_> {
        match self {
            Plain::None => Save::None,
            Plain::Bool(b) => Save::Bool(*b),
            Plain::Int(n) => Save::Int(*n),
            Plain::Float(f) => Save::Float(*f),
            Plain::Str(text) => Save::Str(text.clone()),
            Plain::List(items) => Save::List(items.iter().map(Plain::save).collect()),
            Plain::Tuple(items) => Save::Tuple(items.iter().map(Plain::save).collect()),
            Plain::Dict(entries) => Save::Dict(entries.iter().map(|(k, v)| (k.clone(), v.save())).collect()),
            Plain::Tensor(tensor) => Save::Tensor(tensor),
        }
    }

    fn write(&self) -> Vec<u8> {
        let writer = Writer::new(Vec::new(), "archive").expect("a good folder");
        writer.save(&self.save()).expect("what was read can be written")
    }
}

/// The CRC-32 of zip.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut c, mut bit) = (i as u32, 0);
            while bit < 8 {
                c = if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 };
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc: u32, &b| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ b)])
}

fn u16_at(file: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(file.get(at..at + 2)?.try_into().ok()?).into())
}

fn u32_at(file: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?)).ok()
}

/// The places of the directory's entries and of their local headers, as far as they can be followed.
fn entries(file: &[u8]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let Some(end) = file.windows(4).rposition(|w| w == b"PK\x05\x06") else { return found };
    let mut at = u32_at(file, end + 16).unwrap_or(usize::MAX);
    // The directory ends where the end records begin; so it is found, too, where bytes were put in or left out.
    if let Some(size) = u32_at(file, end + 12)
        && file.get(at..).is_none_or(|rest| !rest.starts_with(b"PK\x01\x02"))
    {
        at = end.saturating_sub(size);
    }
    while file.get(at..at.saturating_add(46)).is_some_and(|entry| entry.starts_with(b"PK\x01\x02")) {
        let lengths = [28, 30, 32].map(|field| u16_at(file, at + field).unwrap_or(0));
        found.push((at, u32_at(file, at + 42).unwrap_or(usize::MAX)));
        at += 46 + lengths.iter().sum::<usize>();
    }
    found
}

fn deflated(file: &[u8]) -> bool {
    entries(file).iter().any(|&(at, _)| u16_at(file, at + 10) == Some(8))
}

/// Writes 0, which stands for "no checksum", in directory, local headers and descriptors. Whether there was one.
fn without_checksums(file: &mut [u8]) -> bool {
    let mut changed = false;
    for (at, local) in entries(file) {
        let crc = file[at + 16..at + 20].to_vec();
        let [packed, name] = [u32_at(file, at + 20), u16_at(file, at + 28)].map(|n| n.unwrap_or(0));
        let mut places = vec![at + 16];
        if file.get(local..local.saturating_add(4)).is_some_and(|l| l == b"PK\x03\x04") {
            let data = local + 30 + name + u16_at(file, local + 28).unwrap_or(0);
            // A descriptor begins with its signature, or with the checksum.
            places.extend([local + 14, data.saturating_add(packed), data.saturating_add(packed).saturating_add(4)]);
        }
        for place in places {
            if let Some(field) = file.get_mut(place..place.saturating_add(4))
                && field == crc
            {
                changed |= crc != [0; 4];
                field.fill(0);
            }
        }
    }
    changed
}

/// A good archive around a pickle: ten storages of 512 bytes and one of none, then the pickle.
pub(crate) fn archive_of(pickle: &[u8]) -> Vec<u8> {
    const STORAGE_BYTES: usize = 512;
    /// The records before the pickle's, and the directory's entries for them.
    static BEFORE: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
        let [mut records, mut directory] = [Vec::new(), Vec::new()];
        let storage: Vec<u8> = (0..STORAGE_BYTES).map(|i| (i % 251) as u8).collect();
        for key in 0..11 {
            let data = if key < 10 { &storage[..] } else { &[] };
            append_record(&mut records, &mut directory, &format!("a/data/{key}"), data);
        }
        [records, directory]
    });
    let [mut file, mut directory] = BEFORE.clone();
    append_record(&mut file, &mut directory, "a/data.pkl", pickle);
    let start = file.len() as u32;
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0\x0c\0\x0c\0");
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0, 0]);
    file
}

/// A stored record without a checksum, and its entry.
fn append_record(file: &mut Vec<u8>, directory: &mut Vec<u8>, name: &str, data: &[u8]) {
    let at = (file.len() as u32).to_le_bytes();
    let size = (data.len() as u32).to_le_bytes();
    let name_bytes = (name.len() as u16).to_le_bytes();
    // Flags, method, time, date and checksum are 0.
    let header = [&[20, 0][..], &[0; 12], &size, &size, &name_bytes, &[0, 0]].concat();
    directory.extend([b"PK\x01\x02\x14\0", &header[..], &[0; 10], &at, name.as_bytes()].concat());
    file.extend([b"PK\x03\x04", &header[..], name.as_bytes(), data].concat());
}

/// The bytes of the pickle of an archive, if it is stored.
fn pickle_in(file: &[u8]) -> Option<&[u8]> {
    entries(file).into_iter().find_map(|(at, local)| {
        let name = file.get(at + 46..at + 46 + u16_at(file, at + 28)?)?;
        (name.ends_with(b"data.pkl") && u16_at(file, at + 10) == Some(0)).then_some(())?;
        let data = local + 30 + u16_at(file, local + 26)? + u16_at(file, local + 28)?;
        file.get(data..data.checked_add(u32_at(file, at + 24)?)?)
    })
}

/// The seeds of a target: what lies under `fixtures` for it, none longer than `longest`, in order.
pub(crate) fn seeds(target: &str, fixtures: &Path, longest: usize) -> Vec<Vec<u8>> {
    let endings: &[&str] = match target {
        "pt" | "pickle" => &["pt"],
        "npy" => &["npy"],
        "safetensors" => &["safetensors"],
        "checkpoint" => &["checkpoint", "pt", "safetensors"],
        _ => &["json"],
    };
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    let mut folders = vec![fixtures.to_path_buf()];
    let read = |path: &Path| std::fs::read(path).expect("a fixture can be read");
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the fixtures are there") {
            let path = entry.expect("the fixtures can be listed").path();
            let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            if path.is_dir() {
                folders.push(path);
            } else if endings.contains(&ending) && !path.ends_with("manifest.json") {
                match target {
                    "pickle" => seeds.extend(pickle_in(&read(&path)).map(<[u8]>::to_vec)),
                    "checkpoint" if ending != "checkpoint" => {
                        let cfg = ["config.json", "cfg.json", "0_cfg.json"].map(|name| path.with_file_name(name));
                        let cfg = cfg.iter().find(|path| path.is_file());
                        seeds.extend(cfg.map(|cfg| [read(cfg), vec![0], read(&path)].concat()));
                    }
                    _ => seeds.push(read(&path)),
                }
            }
        }
    }
    if target == "cfg" {
        let changes = ["lr=1e-3", "seed=.5", "new=[1, 2]", "enc_dtype=bf16"];
        seeds.extend(
            changes.map(|change| {
                [&br#"{"lr": 1, "seed": 2, "enc_dtype": "fp32"}"#[..], b"\0", change.as_bytes()].concat()
            }),
        );
        seeds.push(br#"{"a": [1e400, -0.0, 5e-324, 18446744073709551616, "\ud83d\ude00\u0000"], "a": null}"#.to_vec());
    }
    seeds.retain(|seed| seed.len() <= longest);
    seeds.sort();
    seeds.dedup();
    seeds
}
