//! Activations: rows [n, n_models, d_in] read in pieces, so that a set far larger than memory trains.
//!
//! A set is a list of parts that follow one another: files, shards of a directory, or a tensor in memory. A part is one file
//! [n, n_models, d_in], or one file [n, d_in] for each model. Rows are handed out as little-endian bytes in the set's
//! dtype, row-major. Files are read, never mapped: one that is truncated or changed while it is read is an error.

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

use crate::crosscoder::model_name;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Tensor, Values};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

mod file;

use file::RowFile;

/// Rows that are read at a time are limited to this many bytes, or to one row.
const PIECE_BYTES: usize = 4 << 20;

/// A set of paired activations [n, n_models, d_in].
#[derive(Debug)]
pub struct Activations {
    parts: Vec<Part>,
    n_models: usize,
    d_in: usize,
    dtype: Dtype,
    rows: usize,
    /// Whether a value that is not finite is an error.
    check: bool,
    /// The part that was read last, the only one whose files are open: a directory may hold more than a process may open.
    last: Mutex<usize>,
}

#[derive(Debug)]
struct Part {
    /// What messages call it.
    name: String,
    /// The set's row that is the part's first.
    first: usize,
    rows: usize,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// [n, n_models, d_in], little-endian.
    Memory(Vec<u8>),
    /// One of [n, n_models, d_in], or one of [n, d_in] for each model.
    Files(Vec<RowFile>),
}

/// Shape and dtype of a part.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kind {
    n_models: usize,
    d_in: usize,
    dtype: Dtype,
}

impl Activations {
    /// Opens a set: one file or several of shape [n, n_models, d_in], whose rows follow one another; or two files of shape
    /// [n, d_in] or more, one for each model; or one directory, whose `.pt`, `.npy` and `.safetensors` files are taken in
    /// the order of their names. Only headers are read.
    ///
    /// # Errors
    /// Files that are not there, not of these formats, of another shape, of no float dtype, or that do not fit each other.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let files: Vec<PathBuf> = match paths {
            [one] if one.as_ref().is_dir() => shards(one.as_ref())?,
            _ => paths.iter().map(|p| p.as_ref().to_owned()).collect(),
        };
        let mut opened = files.iter().map(|path| RowFile::open(path)).collect::<Result<Vec<_>>>()?;
        if opened.is_empty() {
            return Err(Error::usage("no activations: no file given"));
        }
        let flat = opened.iter().filter(|f| f.shape().len() == 2).count();
        let parts = match (flat, opened.len()) {
            (0, _) => {
                let part = |f: RowFile| match *f.shape() {
                    [rows, n_models, d_in] => Ok((f.name(), rows, kind_of(&f, n_models, d_in), Source::Files(vec![f]))),
                    _ => Err(Error::shape(format!("has shape {:?}", f.shape())).at(f.name())),
                };
                opened.into_iter().map(part).collect::<Result<_>>()?
            }
            (flat, n_models) if flat == n_models && n_models > 1 => {
                let Some((a, [rows, d_in])) =
                    opened.first().and_then(|a| Some((a, <[usize; 2]>::try_from(a.shape()).ok()?)))
                else {
                    return Err(Error::usage("no activations: no file given"));
                };
                if let Some(b) = opened.iter().find(|b| (a.shape(), a.dtype()) != (b.shape(), b.dtype())) {
                    let [one, other] = [a, b].map(|f| format!("{} {:?}", f.dtype(), f.shape()));
                    return Err(Error::shape(format!("one model's is {one}, another's {other}; they must be equal"))
                        .at(format!("{} and {}", a.name(), b.name())));
                }
                let name = opened.iter().map(RowFile::name).collect::<Vec<_>>().join(" and ");
                let kind = kind_of(a, n_models, d_in);
                vec![(name, rows, kind, Source::Files(std::mem::take(&mut opened)))]
            }
            _ => {
                let odd = opened.iter().find(|f| f.shape().len() == 2);
                let (odd, found) = odd.map(|f| (f.name(), f.shape().to_vec())).unwrap_or_default();
                let what = format!(
                    "has shape {found:?}; activations are files [n, n_models, d_in], or one file [n, d_in] for each \
                     of two models or more"
                );
                return Err(Error::shape(what).at(odd));
            }
        };
        Self::of_parts(parts)
    }

    /// A set in memory: `tensor` [n, n_models, d_in] of a float dtype.
    ///
    /// # Errors
    /// Another shape, an integer dtype.
    pub fn from_tensor(name: &str, tensor: Tensor) -> Result<Self> {
        check_shape(tensor.shape(), tensor.dtype()).map_err(|e| e.at(name))?;
        let &[rows, n_models, d_in] = tensor.shape() else {
            let what = format!("has shape {:?}; activations are [n, n_models, d_in]", tensor.shape());
            return Err(Error::shape(what).at(name));
        };
        let dtype = tensor.dtype();
        let mut bytes = Vec::with_capacity(tensor.len().saturating_mul(dtype.size_bytes()));
        tensor.row_major_le_bytes(|piece| {
            bytes.extend_from_slice(piece);
            Ok::<_, Error>(())
        })?;
        Self::of_parts(vec![(name.to_owned(), rows, Kind { n_models, d_in, dtype }, Source::Memory(bytes))])
    }

    fn of_parts(found: Vec<(String, usize, Kind, Source)>) -> Result<Self> {
        let first = found.first().ok_or_else(|| Error::usage("no activations"))?;
        let (first_name, kind) = (first.0.clone(), first.2);
        let (mut parts, mut total) = (Vec::new(), 0usize);
        for (name, rows, other, source) in found {
            if other != kind {
                let show = |k: Kind| format!("{} [n, {}, {}]", k.dtype, k.n_models, k.d_in);
                let what = format!("is {}; {first_name} is {}; all parts must be alike", show(other), show(kind));
                return Err(Error::shape(what).at(name));
            }
            parts.push(Part { name, first: total, rows, source });
            total = total.checked_add(rows).ok_or_else(|| Error::shape("more rows than can be counted"))?;
        }
        if total == 0 {
            return Err(Error::shape("has no rows").at(first_name));
        }
        let Kind { n_models, d_in, dtype } = kind;
        Ok(Activations { parts, n_models, d_in, dtype, rows: total, check: true, last: Mutex::new(0) })
    }

    /// The same set; values that are not finite are handed out instead of being an error.
    pub fn unchecked(self) -> Self {
        Activations { check: false, ..self }
    }

    /// The number of rows, n.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of models.
    pub fn n_models(&self) -> usize {
        self.n_models
    }

    /// The width of one model's activations.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// The type in which rows are stored and handed out.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Values in a row, `n_models · d_in`.
    pub fn width(&self) -> usize {
        // A row is in memory or in a file: neither product overflows.
        self.n_models.saturating_mul(self.d_in)
    }

    /// The files that rows are read from; none for a set in memory.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let files = self.parts.iter().flat_map(|part| match &part.source {
            Source::Files(files) => files.as_slice(),
            Source::Memory(_) => &[],
        });
        files.map(RowFile::path)
    }

    /// Bytes of a row as it is handed out.
    pub fn row_bytes(&self) -> usize {
        self.width().saturating_mul(self.dtype.size_bytes())
    }

    /// How many rows to read at a time: some megabytes.
    pub fn rows_per_piece(&self) -> usize {
        PIECE_BYTES.checked_div(self.row_bytes()).unwrap_or(1).max(1)
    }

    /// Where a row of the set lies: the file's name and the row in it.
    pub fn place(&self, row: usize) -> String {
        match self.part_of(row).and_then(|i| self.parts.get(i)) {
            Some(part) => format!("{}, row {}", part.name, row.saturating_sub(part.first)),
            None => format!("row {row}"),
        }
    }

    /// The position of the part that holds a row.
    fn part_of(&self, row: usize) -> Option<usize> {
        let after = self.parts.partition_point(|part| part.first <= row);
        let index = after.checked_sub(1)?;
        let part = self.parts.get(index)?;
        (row.checked_sub(part.first)? < part.rows).then_some(index)
    }

    /// The bytes of `count` rows from row `at` on, in `out` instead of what it held.
    ///
    /// # Errors
    /// Rows that are not there; a file that cannot be read or has changed since it was opened; a value that is not finite.
    pub fn read(&self, at: usize, count: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        if at.checked_add(count).is_none_or(|end| end > self.rows) {
            return Err(Error::shape(format!("rows {at}..{at}+{count} asked of a set of {}", self.rows)));
        }
        out.reserve(count.saturating_mul(self.row_bytes()));
        let (mut row, end) = (at, at.saturating_add(count));
        while row < end {
            let found = self.part_of(row).and_then(|index| Some((index, self.parts.get(index)?)));
            let (index, part) = found.ok_or_else(|| Error::shape(format!("no part holds row {row}")))?;
            let last = std::mem::replace(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner), index);
            if last != index {
                self.parts.get(last).into_iter().for_each(Part::close);
            }
            let from = row.saturating_sub(part.first);
            let n = end.saturating_sub(row).min(part.rows.saturating_sub(from));
            part.read(from, n, self.row_bytes(), out).map_err(|e| e.at(&part.name))?;
            row = row.saturating_add(n);
        }
        if self.check {
            self.check_finite(at, out)?;
        }
        Ok(())
    }

    /// Reads `count` rows from row `at` on as float32 into `out` instead of what it held.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_f32(&self, at: usize, count: usize, out: &mut Vec<f32>) -> Result<()> {
        let mut bytes = Vec::new();
        self.read(at, count, &mut bytes)?;
        out.clear();
        append_f32(self.dtype, &bytes, out);
        Ok(())
    }

    fn check_finite(&self, at: usize, bytes: &[u8]) -> Result<()> {
        let Some(index) = first_not_finite(self.dtype, bytes) else { return Ok(()) };
        // The number `index` in base width, and its last digit in base d_in; neither is 0.
        let digits = |n: usize, base: usize| (n.checked_div(base).unwrap_or(0), n.checked_rem(base).unwrap_or(0));
        let (row, col) = digits(index, self.width());
        let (model, element) = digits(col, self.d_in);
        let mut value = Values::with_capacity(self.dtype, 1);
        value.push_le_bytes(bytes.chunks_exact(self.dtype.size_bytes()).nth(index).unwrap_or_default());
        let (model, value) = (model_name(model, self.n_models), value.to_f64().first().copied().unwrap_or(f64::NAN));
        let not = if value.is_finite() { "finite in float32, which rows are computed in" } else { "finite" };
        let what = format!("model {model}, element {element}: {value:?} is not {not}");
        let row = at.saturating_add(row);
        Err(Error::new(ErrorKind::NonFinite, what).at(self.place(row)))
    }
}

impl Part {
    fn close(&self) {
        if let Source::Files(files) = &self.source {
            files.iter().for_each(RowFile::close);
        }
    }

    fn read(&self, at: usize, count: usize, row_bytes: usize, out: &mut Vec<u8>) -> Result<()> {
        match &self.source {
            Source::Memory(bytes) => {
                let range = at.saturating_mul(row_bytes)..at.saturating_add(count).saturating_mul(row_bytes);
                out.extend_from_slice(bytes.get(range).ok_or_else(|| Error::shape("these rows are not there"))?);
            }
            Source::Files(files) if files.len() == 1 => files.iter().try_for_each(|one| one.read(at, count, out))?,
            Source::Files(files) => {
                let piece = row_bytes.checked_div(files.len()).unwrap_or(0);
                let mut rows: Vec<Vec<u8>> = vec![Vec::new(); files.len()];
                for (rows, file) in rows.iter_mut().zip(files) {
                    file.read(at, count, rows)?;
                }
                let mut rows: Vec<_> = rows.iter().map(|rows| rows.chunks_exact(piece.max(1))).collect();
                for _ in 0..count {
                    rows.iter_mut().filter_map(Iterator::next).for_each(|row| out.extend_from_slice(row));
                }
            }
        }
        Ok(())
    }
}

fn kind_of(file: &RowFile, n_models: usize, d_in: usize) -> Kind {
    Kind { n_models, d_in, dtype: file.dtype() }
}

/// Whether this can be activations: two or three sizes, none but the first 0, a float dtype.
fn check_shape(shape: &[usize], dtype: Dtype) -> Result<()> {
    if !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(Error::unsupported(format!("has dtype {dtype}; activations are floats")));
    }
    if !matches!(shape.len(), 2 | 3) || shape.iter().skip(1).any(|&size| size == 0) {
        let what = format!("has shape {shape:?}; activations are [n, n_models, d_in], or [n, d_in] for each model");
        return Err(Error::shape(what));
    }
    Ok(())
}

/// The activation files of a directory in the order of their names.
fn shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = |e| Error::io("cannot list the directory", e).in_file(dir);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let ending = path.extension().map(|e| e.to_ascii_lowercase());
        if !ending.is_some_and(|e| e == "pt" || e == "npy" || e == "safetensors") {
            continue;
        }
        // One that cannot be looked at, a link that leads nowhere, is not left out: its rows would be missing.
        let about = path.metadata().map_err(|e| Error::io("cannot look at it", e).in_file(&path))?;
        if !about.is_dir() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::usage("the directory holds no .pt, .npy or .safetensors file").in_file(dir));
    }
    files.sort();
    Ok(files)
}

/// Appends the elements that `bytes` holds as float32.
pub(crate) fn append_f32(dtype: Dtype, bytes: &[u8], out: &mut Vec<f32>) {
    let mut values = Values::with_capacity(dtype, bytes.len().checked_div(dtype.size_bytes()).unwrap_or(0));
    values.push_le_bytes(bytes);
    match values {
        Values::F32(v) if out.is_empty() => *out = v,
        values => out.extend(values.into_f32()),
    }
}

/// The first element that is inf or nan, its exponent all ones, or becomes inf as float32.
fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    // The high bytes of an element hold its sign and exponent.
    let high = |size: usize, mask: u16| {
        bytes
            .chunks_exact(size)
            .position(|e| e.last_chunk().is_some_and(|&high| u16::from_le_bytes(high) & mask == mask))
    };
    match dtype {
        Dtype::F16 => high(2, 0x7c00),
        Dtype::BF16 => high(2, 0x7f80),
        Dtype::F64 => bytes.as_chunks().0.iter().position(|&e| !(f64::from_le_bytes(e) as f32).is_finite()),
        _ => high(4, 0x7f80),
    }
}
