//! `.safetensors`: a length, a JSON header that gives each tensor's type, shape and range of bytes, then the bytes.
//!
//! The header is read by a parser of exactly what it may hold, because a general one hides what matters: that a name comes
//! twice. Names are unique, ranges cover the data without holes or overlaps to the last byte, and each is as long as its
//! shape needs.

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

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::magic;
use crate::pt::TensorSource;
use crate::raw::{Block, length, read_at};
use crate::tensor::{MAX_DIMS, Tensor, element_count};
use std::collections::HashSet;
use std::io::{Read, Seek, Write};
use std::ops::Range;

/// The format's own limit on the header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The types in the order in which the reference library writes them.
const DTYPES: [(&str, Dtype); 10] = [
    ("I64", Dtype::I64),
    ("F64", Dtype::F64),
    ("F32", Dtype::F32),
    ("I32", Dtype::I32),
    ("BF16", Dtype::BF16),
    ("F16", Dtype::F16),
    ("I16", Dtype::I16),
    ("I8", Dtype::I8),
    ("U8", Dtype::U8),
    ("BOOL", Dtype::Bool),
];

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct SafetensorsEntry {
    /// The name.
    pub name: String,
    /// The elements' type.
    pub dtype: Dtype,
    /// The sizes. The elements lie in row-major order.
    pub shape: Vec<usize>,
    block: Block,
}

/// A `.safetensors` file whose header has been read.
#[derive(Debug)]
pub struct SafetensorsFile<R> {
    reader: R,
    tensors: Vec<SafetensorsEntry>,
    metadata: Vec<(String, String)>,
}

impl<R: Read + Seek> SafetensorsFile<R> {
    /// Reads the header, not the tensors.
    ///
    /// # Errors
    /// Whatever is not exactly a `.safetensors` file, and dtypes that this crate does not carry.
    pub fn new(mut reader: R) -> Result<Self> {
        let length = length(&mut reader)?;
        let head = read_at(&mut reader, 0, 8)?;
        let header_bytes = <[u8; 8]>::try_from(head).map(u64::from_le_bytes);
        let header_bytes =
            header_bytes.map_err(|_| Error::format(format!("{length} bytes are no safetensors file")))?;
        if let magic::Kind::Other(what) = magic::kind(&read_at(&mut reader, 0, magic::HEAD_BYTES)?) {
            return Err(Error::unsupported(format!("not a safetensors file but {what}")));
        }
        if header_bytes > MAX_HEADER_BYTES {
            return Err(Error::format(format!(
                "safetensors header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}"
            )));
        }
        let data_at = header_bytes.saturating_add(8);
        if data_at > length {
            return Err(Error::format(format!(
                "truncated: the header ends at byte {data_at}, the file at byte {length}"
            )));
        }
        let header = read_at(&mut reader, 8, usize::try_from(header_bytes).unwrap_or_default())?;
        let header =
            str::from_utf8(&header).map_err(|e| Error::format(format!("the safetensors header is not UTF-8: {e}")))?;
        let (tensors, metadata) = parse_header(header, data_at, length).map_err(|e| e.at("safetensors header"))?;
        Ok(SafetensorsFile { reader, tensors, metadata })
    }

    /// The tensors in the order of the header.
    pub fn tensors(&self) -> &[SafetensorsEntry] {
        &self.tensors
    }

    /// The strings of `__metadata__`, in their order.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    fn entry(&self, index: usize) -> Result<&SafetensorsEntry> {
        let count = self.tensors.len();
        self.tensors.get(index).ok_or_else(|| Error::usage(format!("tensor {index} of {count}")))
    }

    /// The tensor at this place in [`Self::tensors`].
    ///
    /// # Errors
    /// There is none; a file that has changed.
    pub fn read(&mut self, index: usize) -> Result<Tensor> {
        let SafetensorsEntry { shape, block, .. } = self.entry(index)?.clone();
        Tensor::new(shape, block.read(&mut self.reader)?)
    }

    /// Rows `rows` of its first dimension, by reading just their bytes.
    ///
    /// # Errors
    /// As [`Self::read`]; rows that the tensor does not have.
    pub fn read_rows(&mut self, index: usize, rows: Range<usize>) -> Result<Tensor> {
        let SafetensorsEntry { name, mut shape, block, .. } = self.entry(index)?.clone();
        let refuse = Error::shape(format!("{name}: rows {rows:?} of a tensor of shape {shape:?}"));
        let part = shape.first_mut().and_then(|first| {
            let part = block.rows(&rows, *first);
            *first = rows.end.saturating_sub(rows.start);
            part
        });
        Tensor::new(shape, part.ok_or(refuse)?.read(&mut self.reader)?)
    }

    /// The CRC-32 of its elements' little-endian bytes in row-major order.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn crc32(&mut self, index: usize) -> Result<u32> {
        let block = self.entry(index)?.block;
        block.stream(&mut self.reader, &mut |_| Ok(()))
    }
}

/// The tensors and the metadata.
type Header = (Vec<SafetensorsEntry>, Vec<(String, String)>);

fn parse_header(text: &str, data_at: u64, length: u64) -> Result<Header> {
    let data_bytes = length.saturating_sub(data_at);
    let mut json = Json { text: text.as_bytes(), at: 0 };
    let (mut tensors, mut metadata) = (Vec::new(), Vec::new());
    if json.peek() != Some(b'{') {
        return Err(json.wrong("'{' as the first byte"));
    }
    let mut names = HashSet::new();
    // Of each tensor its range of bytes and its place among the tensors.
    let mut ranges: Vec<(u64, u64, usize)> = Vec::new();
    json.object(|json, name| {
        if !names.insert(name.clone()) {
            return Err(Error::format(format!("duplicate name {name:?}")));
        }
        if name == "__metadata__" {
            let mut keys = HashSet::new();
            return json.object(|json, key| {
                if !keys.insert(key.clone()) {
                    return Err(Error::format(format!("duplicate key {key:?} in __metadata__")));
                }
                let value = json.string()?;
                metadata.push((key, value));
                Ok(())
            });
        }
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        json.object(|json, key| {
            let again = match key.as_str() {
                "dtype" => dtype.replace(json.string()?).is_some(),
                "shape" => shape.replace(json.integers()?).is_some(),
                "data_offsets" => offsets.replace(json.integers()?).is_some(),
                _ => return Err(json.wrong(&format!("dtype, shape or data_offsets, not {key:?},"))),
            };
            match again {
                true => Err(Error::format(format!("duplicate key {key:?}"))),
                false => Ok(()),
            }
        })
        .and_then(|()| {
            let missing = || Error::format("dtype, shape and data_offsets are all needed");
            let (dtype, shape, offsets) =
                (dtype.ok_or_else(missing)?, shape.ok_or_else(missing)?, offsets.ok_or_else(missing)?);
            let known = DTYPES.iter().find(|d| d.0 == dtype).map(|d| d.1);
            let dtype =
                known.ok_or_else(|| Error::unsupported(format!("dtype {dtype:?}, which this crate does not carry")))?;
            if shape.len() > MAX_DIMS {
                return Err(Error::unsupported(format!("{} dimensions; the limit is {MAX_DIMS}", shape.len())));
            }
            let overflow = || Error::format(format!("shape {shape:?} overflows"));
            let sizes: Vec<usize> =
                shape.iter().map(|&n| usize::try_from(n)).collect::<Result<_, _>>().map_err(|_| overflow())?;
            let elements = element_count(&sizes).ok_or_else(overflow)?;
            let needed = (elements as u64).checked_mul(dtype.size_bytes() as u64).ok_or_else(overflow)?;
            let &[start, end] = offsets.as_slice() else {
                return Err(Error::format(format!("data_offsets {offsets:?} are not two numbers")));
            };
            if end.checked_sub(start) != Some(needed) {
                return Err(Error::format(format!(
                    "{dtype} {sizes:?} needs {needed} bytes, data_offsets are {start} to {end}"
                )));
            }
            if end > data_bytes {
                return Err(Error::format(format!("the data ends at byte {end} of {data_bytes} that there are")));
            }
            ranges.push((start, end, tensors.len()));
            let block = Block { dtype, at: data_at.saturating_add(start), elements };
            tensors.push(SafetensorsEntry { name: name.clone(), dtype, shape: sizes, block });
            Ok(())
        })
        .map_err(|e| e.at(&name))
    })?;
    json.space();
    if json.at < text.len() {
        return Err(json.wrong("nothing but white space after the object"));
    }
    ranges.sort_unstable();
    let mut covered = 0;
    for (start, end, index) in ranges {
        if start != covered {
            let what = if start > covered { "a hole" } else { "an overlap" };
            let name = tensors.get(index).map_or("", |t| t.name.as_str());
            return Err(Error::format(format!(
                "{what}: {name:?} begins at byte {start} of the data, {covered} are covered before"
            )));
        }
        covered = end;
    }
    if covered != data_bytes {
        return Err(Error::format(format!("the tensors cover {covered} bytes of data, there are {data_bytes}")));
    }
    Ok((tensors, metadata))
}

/// The part of JSON that a header is made of.
struct Json<'a> {
    text: &'a [u8],
    at: usize,
}

impl Json<'_> {
    fn wrong(&self, needed: &str) -> Error {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let shown = String::from_utf8_lossy(rest.get(..16).unwrap_or(rest));
        Error::format(format!("byte {}: {needed} is needed before {shown:?}", self.at))
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn step(&mut self) {
        self.at = self.at.saturating_add(1);
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\t' | b'\r')) {
            self.step();
        }
    }

    fn found(&mut self, byte: u8) -> bool {
        self.space();
        let found = self.peek() == Some(byte);
        if found {
            self.step();
        }
        found
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        match self.found(byte) {
            true => Ok(()),
            false => Err(self.wrong(&format!("{:?}", char::from(byte)))),
        }
    }

    /// `{"key": …, …}`; `entry` reads what follows each colon.
    fn object(&mut self, mut entry: impl FnMut(&mut Self, String) -> Result<()>) -> Result<()> {
        self.expect(b'{')?;
        if self.found(b'}') {
            return Ok(());
        }
        loop {
            let key = self.string()?;
            self.expect(b':')?;
            entry(self, key)?;
            if !self.found(b',') {
                return self.expect(b'}');
            }
        }
    }

    /// `[0, 12, …]`
    fn integers(&mut self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        self.expect(b'[')?;
        if self.found(b']') {
            return Ok(numbers);
        }
        loop {
            self.space();
            let start = self.at;
            while self.peek().is_some_and(|b| b.is_ascii_digit()) {
                self.step();
            }
            let digits = self.text.get(start..self.at).and_then(|d| str::from_utf8(d).ok()).unwrap_or_default();
            let number = digits.parse().ok().filter(|_| digits == "0" || !digits.starts_with('0'));
            numbers.push(number.ok_or_else(|| self.wrong("an integer of 64 bits, not negative,"))?);
            if !self.found(b',') {
                self.expect(b']')?;
                return Ok(numbers);
            }
        }
    }

    fn string(&mut self) -> Result<String> {
        self.expect(b'"')?;
        let start = self.at;
        let mut escaped = false;
        loop {
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    self.step();
                    self.step();
                }
                Some(0x20..) => self.step(),
                _ => return Err(self.wrong("the string's closing quote")),
            }
        }
        let inner = self.text.get(start..self.at).and_then(|s| str::from_utf8(s).ok()).unwrap_or_default();
        self.step();
        if !escaped {
            return Ok(inner.to_string());
        }
        serde_json::from_str(&format!("\"{inner}\""))
            .map_err(|e| self.wrong("a string with proper escapes").with_source(e))
    }
}

/// Writes tensors and metadata, as the reference library lays them out: the larger types first, those of one type by their
/// names. The same tensors give the same bytes.
///
/// # Errors
/// A name that comes twice or is `__metadata__`; a tensor of more than 64 dimensions; one whose source cannot give row-major order or gives another number
/// of bytes than its shape needs; the output's errors.
pub fn write<W: Write>(mut out: W, tensors: &[(&str, &dyn TensorSource)], metadata: &[(String, String)]) -> Result<W> {
    let mut order = tensors.to_vec();
    let place = |dtype: Dtype| DTYPES.iter().position(|d| d.1 == dtype);
    order.sort_by(|a, b| (place(a.1.dtype()), a.0).cmp(&(place(b.1.dtype()), b.0)));
    let text = |s: &str| serde_json::Value::from(s).to_string();
    let mut header = String::from("{");
    // Looked at with each entry: a name has six times its length where all of it must be escaped.
    let mut add = |name: &str, what: &str| {
        header.push_str(if header.len() > 1 { "," } else { "" });
        [&text(name), ":", what].iter().for_each(|piece| header.push_str(piece));
        match header.len() as u64 > MAX_HEADER_BYTES {
            true => Err(Error::usage(format!("the header has more bytes than the limit of {MAX_HEADER_BYTES}"))),
            false => Ok(()),
        }
    };
    let mut names = HashSet::new();
    if !metadata.is_empty() {
        let mut keys = HashSet::new();
        if let Some((key, _)) = metadata.iter().find(|(key, _)| !keys.insert(key)) {
            return Err(Error::usage(format!("metadata {key:?} comes twice")));
        }
        let pairs: Vec<String> = metadata.iter().map(|(k, v)| format!("{}:{}", text(k), text(v))).collect();
        add("__metadata__", &format!("{{{}}}", pairs.join(",")))?;
    }
    let mut at = 0u64;
    for &(name, tensor) in &order {
        if name == "__metadata__" || !names.insert(name) {
            return Err(Error::usage(format!("{name:?} cannot be the name of a tensor, or comes twice")));
        }
        let dtype = DTYPES.iter().find(|d| d.1 == tensor.dtype()).map_or("", |d| d.0);
        let end = bytes_of(tensor).and_then(|n| n.checked_add(at));
        let end = end.ok_or_else(|| Error::usage(format!("{name}: shape {:?} overflows", tensor.shape())))?;
        if tensor.shape().len() > MAX_DIMS {
            let dimensions = tensor.shape().len();
            return Err(Error::usage(format!("{name}: {dimensions} dimensions; the limit is {MAX_DIMS}")));
        }
        let sizes: Vec<String> = tensor.shape().iter().map(usize::to_string).collect();
        let what = format!("{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{at},{end}]}}", sizes.join(","));
        add(name, &what)?;
        at = end;
    }
    header.push('}');
    let mut header = header.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() as u64 > MAX_HEADER_BYTES {
        return Err(Error::usage(format!("a header of {} bytes; the limit is {MAX_HEADER_BYTES}", header.len())));
    }
    let failed = |e| Error::io("cannot write", e);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(&header).map_err(failed)?;
    for (name, tensor) in order {
        let mut written = 0u64;
        let streamed = tensor.row_major_le_bytes(&mut |bytes| {
            written = written.saturating_add(bytes.len() as u64);
            out.write_all(bytes).map_err(failed)
        });
        streamed.map_err(|e| e.at(name))?;
        if bytes_of(tensor) != Some(written) {
            return Err(Error::usage(format!(
                "{name}: {written} bytes were given, the shape {:?} needs others",
                tensor.shape()
            )));
        }
    }
    Ok(out)
}

fn bytes_of(tensor: &dyn TensorSource) -> Option<u64> {
    (element_count(tensor.shape())? as u64).checked_mul(tensor.dtype().size_bytes() as u64)
}
