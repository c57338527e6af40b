//! numpy's `.npy`: one array, a header that is a Python dict literal, then the elements.
//!
//! Read and written: float16, float32, float64, the signed integers, uint8 and bool, little-endian, and bfloat16 as
//! ml_dtypes saves it (`<V2`). Arrays in Fortran order are read without a copy, with the strides that say so. The header is
//! taken by its grammar, never evaluated; object arrays (pickles) and structured types are refused.

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
use crate::pt::{TensorSource, is_row_major};
use crate::raw::{Block, length, read_at};
use crate::tensor::{MAX_DIMS, Tensor, element_count, row_major_strides};
use std::io::{Read, Seek, Write};
use std::ops::Range;

/// A header longer than this is refused; numpy itself stops at 10,000 bytes.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// The array's type as numpy spells it.
const DESCRIPTIONS: [(&str, Dtype); 10] = [
    ("<f8", Dtype::F64),
    ("<f4", Dtype::F32),
    ("<f2", Dtype::F16),
    ("<V2", Dtype::BF16),
    ("<i8", Dtype::I64),
    ("<i4", Dtype::I32),
    ("<i2", Dtype::I16),
    ("|i1", Dtype::I8),
    ("|u1", Dtype::U8),
    ("|b1", Dtype::Bool),
];

/// A `.npy` file whose header has been read.
#[derive(Debug)]
pub struct NpyFile<R> {
    reader: R,
    shape: Vec<usize>,
    strides: Vec<usize>,
    block: Block,
}

impl<R: Read + Seek> NpyFile<R> {
    /// Reads the header, not the array.
    ///
    /// # Errors
    /// Whatever is not exactly a `.npy` file of these types, with all its elements and nothing behind them.
    pub fn new(mut reader: R) -> Result<Self> {
        let length = length(&mut reader)?;
        let kind = magic::kind(&read_at(&mut reader, 0, magic::HEAD_BYTES)?);
        let head = read_at(&mut reader, 0, 12)?;
        if let magic::Kind::Other(what) = kind {
            return Err(Error::unsupported(format!("not a .npy file but {what}")));
        }
        if kind != magic::Kind::Npy {
            return Err(Error::format(format!(
                "not a .npy file: it must begin with 93 'NUMPY', and begins with {head:02x?}"
            )));
        }
        let (header_at, header_bytes) = match head.get(6..) {
            Some(&[1, 0, a, b, ..]) => (10u64, u64::from(u16::from_le_bytes([a, b]))),
            Some(&[2 | 3, 0, a, b, c, d]) => (12, u64::from(u32::from_le_bytes([a, b, c, d]))),
            Some(&[major, minor, ..]) => {
                return Err(Error::unsupported(format!("npy version {major}.{minor}; 1.0, 2.0 and 3.0 are read")));
            }
            _ => return Err(Error::format("truncated: the .npy header is not all there")),
        };
        let data_at = header_at.saturating_add(header_bytes);
        if data_at > length {
            return Err(Error::format(format!(
                "truncated: the header ends at byte {data_at}, the file at byte {length}"
            )));
        }
        if header_bytes > MAX_HEADER_BYTES {
            return Err(Error::unsupported(format!(
                "a header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}"
            )));
        }
        let header = read_at(&mut reader, header_at, usize::try_from(header_bytes).unwrap_or_default())?;
        let header = parse_header(&header).map_err(|e| e.at("npy header"))?;
        let Header { dtype, fortran, shape } = header;
        let elements = element_count(&shape).ok_or_else(|| Error::format(format!("shape {shape:?} overflows")))?;
        let bytes = (elements as u64).checked_mul(dtype.size_bytes() as u64);
        let end = bytes.and_then(|n| n.checked_add(data_at));
        if end != Some(length) {
            let needed = bytes.map_or("more than 2^64".into(), |n| n.to_string());
            return Err(Error::format(format!(
                "{dtype} {shape:?} needs {needed} bytes after the header, there are {}",
                length.saturating_sub(data_at)
            )));
        }
        let strides = match fortran {
            false => row_major_strides(&shape),
            true => {
                let mut reversed = shape.clone();
                reversed.reverse();
                let mut strides = row_major_strides(&reversed);
                strides.reverse();
                strides
            }
        };
        Ok(NpyFile { reader, shape, strides, block: Block { dtype, at: data_at, elements } })
    }

    /// The elements' type.
    pub fn dtype(&self) -> Dtype {
        self.block.dtype
    }

    /// The sizes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The strides in elements: row-major, or column-major for Fortran order.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// The array.
    ///
    /// # Errors
    /// A file that has changed.
    pub fn read(&mut self) -> Result<Tensor> {
        let values = self.block.read(&mut self.reader)?;
        Tensor::with_strides(self.shape.clone(), self.strides.clone(), values)
    }

    /// Rows `rows` of the first dimension, by reading just their bytes.
    ///
    /// # Errors
    /// Rows that the array does not have; Fortran order where it scatters a row over the file.
    pub fn read_rows(&mut self, rows: Range<usize>) -> Result<Tensor> {
        if !is_row_major(&self.shape, &self.strides) {
            return Err(Error::unsupported("rows of an array in Fortran order; save it in C order"));
        }
        let refuse = || Error::shape(format!("rows {rows:?} of an array of shape {:?}", self.shape));
        let mut shape = self.shape.clone();
        let first = shape.first_mut().ok_or_else(refuse)?;
        let part = self.block.rows(&rows, *first).ok_or_else(refuse)?;
        *first = rows.end.saturating_sub(rows.start);
        Tensor::new(shape, part.read(&mut self.reader)?)
    }

    /// The CRC-32 of the elements' little-endian bytes in row-major order.
    ///
    /// # Errors
    /// A file that has changed.
    pub fn crc32(&mut self) -> Result<u32> {
        if is_row_major(&self.shape, &self.strides) {
            return self.block.stream(&mut self.reader, &mut |_| Ok(()));
        }
        let mut crc = crc32fast::Hasher::new();
        self.read()?.row_major_le_bytes(|bytes| {
            crc.update(bytes);
            Ok::<_, Error>(())
        })?;
        Ok(crc.finalize())
    }
}

struct Header {
    dtype: Dtype,
    fortran: bool,
    shape: Vec<usize>,
}

/// `{'descr': '<f4', 'fortran_order': False, 'shape': (4, 2, 6), }` and white space.
fn parse_header(bytes: &[u8]) -> Result<Header> {
    let mut p = Literal { bytes, at: 0 };
    let (mut descr, mut fortran, mut shape) = (None, None, None);
    p.expect(b'{')?;
    while !p.found(b'}') {
        let key = p.string()?;
        p.expect(b':')?;
        let again = match key {
            "descr" => descr.replace(p.descr()?).is_some(),
            "fortran_order" => fortran.replace(p.bool()?).is_some(),
            "shape" => shape.replace(p.shape()?).is_some(),
            _ => return Err(p.wrong(&format!("descr, fortran_order or shape, not {key:?}"))),
        };
        if again {
            return Err(p.wrong(&format!("{key} once, not twice")));
        }
        if !p.found(b',') {
            p.expect(b'}')?;
            break;
        }
    }
    p.space();
    if p.at < bytes.len() {
        return Err(p.wrong("nothing but white space after the dict"));
    }
    match (descr, fortran, shape) {
        (Some(dtype), Some(fortran), Some(shape)) => Ok(Header { dtype, fortran, shape }),
        _ => Err(Error::format("descr, fortran_order and shape are all needed")),
    }
}

/// The few Python literals that a header is made of.
struct Literal<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Literal<'a> {
    fn wrong(&self, needed: &str) -> Error {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let shown = String::from_utf8_lossy(rest.get(..16).unwrap_or(rest));
        Error::format(format!("byte {}: {needed} is needed before {shown:?}", self.at))
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn step(&mut self) {
        self.at = self.at.saturating_add(1);
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\t' | b'\r')) {
            self.step();
        }
    }

    /// Takes this byte if it comes next.
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

    /// The bytes from here on for which `part` holds.
    fn run(&mut self, part: impl Fn(u8) -> bool) -> &'a str {
        let start = self.at;
        while self.peek().is_some_and(&part) {
            self.step();
        }
        self.bytes.get(start..self.at).and_then(|b| str::from_utf8(b).ok()).unwrap_or_default()
    }

    /// A string of printable ASCII without escapes, in either quotes.
    fn string(&mut self) -> Result<&'a str> {
        self.space();
        let quote = self.peek().filter(|q| matches!(q, b'\'' | b'"')).ok_or_else(|| self.wrong("a string"))?;
        self.step();
        let text = self.run(|b| b != quote && b != b'\\' && matches!(b, b' '..=b'~'));
        if self.peek() != Some(quote) {
            return Err(self.wrong("the string's closing quote"));
        }
        self.step();
        Ok(text)
    }

    fn descr(&mut self) -> Result<Dtype> {
        self.space();
        if matches!(self.peek(), Some(b'[' | b'(')) {
            return Err(Error::unsupported("descr is a structured dtype; only plain number types are read"));
        }
        let descr = self.string()?;
        let known = DESCRIPTIONS.iter().find(|d| d.0 == descr).map(|d| d.1);
        known.ok_or_else(|| {
            let hint = match descr.as_bytes() {
                [b'|' | b'<' | b'>' | b'=', b'O', ..] => " (an object array, a pickle)",
                [b'>', ..] => " (big-endian)",
                _ => "",
            };
            Error::unsupported(format!("dtype {descr:?}{hint}, which this crate does not carry"))
        })
    }

    fn bool(&mut self) -> Result<bool> {
        self.space();
        match self.run(|b| b.is_ascii_alphanumeric() || b == b'_') {
            "True" => Ok(true),
            "False" => Ok(false),
            _ => Err(self.wrong("True or False")),
        }
    }

    /// `()`, `(3,)`, `(3, 4)`, `(3, 4,)`
    fn shape(&mut self) -> Result<Vec<usize>> {
        let mut shape = Vec::new();
        self.expect(b'(')?;
        while !self.found(b')') {
            self.space();
            let digits = self.run(|b| b.is_ascii_alphanumeric() || b == b'_');
            let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
            let size = digits.parse().ok().filter(|_| plain).ok_or_else(|| self.wrong("a size, a decimal integer,"))?;
            shape.push(size);
            if !self.found(b',') {
                if shape.len() == 1 {
                    return Err(self.wrong("',' (one size alone is no tuple)"));
                }
                self.expect(b')')?;
                break;
            }
        }
        match shape.len() {
            0..=MAX_DIMS => Ok(shape),
            n => Err(Error::unsupported(format!("{n} dimensions; the limit is {MAX_DIMS}"))),
        }
    }
}

/// Writes an array as `numpy.save` does: version 1.0, C order, the data at a multiple of 64.
///
/// # Errors
/// More than 64 dimensions; the source's errors; the output's.
pub fn write<W: Write>(mut out: W, tensor: &dyn TensorSource) -> Result<W> {
    if tensor.shape().len() > MAX_DIMS {
        return Err(Error::usage(format!("{} dimensions; the limit is {MAX_DIMS}", tensor.shape().len())));
    }
    let dtype = tensor.dtype();
    let descr = DESCRIPTIONS.iter().find(|d| d.1 == dtype).map_or("", |d| d.0);
    let sizes: Vec<String> = tensor.shape().iter().map(usize::to_string).collect();
    let shape = match sizes.as_slice() {
        [one] => format!("({one},)"),
        sizes => format!("({})", sizes.join(", ")),
    };
    let dict = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    // Signature and length, the dict, spaces, a newline: a multiple of 64.
    let header_bytes = dict.len().saturating_add(11).next_multiple_of(64).saturating_sub(10);
    let length = u16::try_from(header_bytes).map_err(|_| Error::usage("too many dimensions for a .npy header"))?;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend(length.to_le_bytes());
    header.extend(dict.as_bytes());
    header.resize(header_bytes.saturating_add(9), b' ');
    header.push(b'\n');
    let failed = |e| Error::io("cannot write", e);
    out.write_all(&header).map_err(failed)?;
    let mut written = 0u64;
    tensor.row_major_le_bytes(&mut |bytes| {
        written = written.saturating_add(bytes.len() as u64);
        out.write_all(bytes).map_err(failed)
    })?;
    let needed = element_count(tensor.shape()).and_then(|n| (n as u64).checked_mul(dtype.size_bytes() as u64));
    if needed == Some(written) {
        return Ok(out);
    }
    let needed = needed.map_or("more than there can be".to_owned(), |n| n.to_string());
    Err(Error::usage(format!("{written} bytes were given, the shape {shape} needs {needed}")))
}
