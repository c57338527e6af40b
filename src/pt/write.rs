//! The writer: what `torch.save` writes for the same values, byte for byte, in one pass and without a copy of a tensor.
//!
//! Records, their order, alignment and headers are those of PyTorch 2.15 (stored, data aligned to 64 bytes, sizes in a
//! descriptor behind the data, zip64 where a number needs it), and the pickle is what CPython's pickler makes of the values
//! in protocol 2. So files of the original and of this crate can be compared with `cmp`. There is no time, random number
//! or address in them: the same values give the same bytes.

use super::value::PathPart;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::tensor::{MAX_DIMS, Tensor, element_count, is_dense};
use crc32fast::Hasher as Crc32;
use std::collections::{HashMap, HashSet};
use std::io::Write;

/// Where the elements of a tensor to be saved come from.
pub trait TensorSource {
    /// The elements' type.
    fn dtype(&self) -> Dtype;
    /// The sizes.
    fn shape(&self) -> &[usize];
    /// The strides, which lay the shape out densely; they are kept in the file.
    fn strides(&self) -> &[usize];
    /// Hands the elements' little-endian bytes, in the order they lie in (that of the strides), to `sink` piece by piece.
    ///
    /// # Errors
    /// Those of `sink`, and the source's own.
    fn le_bytes(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;

    /// The same in row-major order, which formats without strides need.
    ///
    /// # Errors
    /// As [`Self::le_bytes`]. Unless it is overridden, strides that are not row-major.
    fn row_major_le_bytes(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match super::is_row_major(self.shape(), self.strides()) {
            true => self.le_bytes(sink),
            false => Err(Error::unsupported("this source cannot give its elements in row-major order")),
        }
    }
}

impl TensorSource for Tensor {
    fn dtype(&self) -> Dtype {
        Tensor::dtype(self)
    }

    fn shape(&self) -> &[usize] {
        Tensor::shape(self)
    }

    fn strides(&self) -> &[usize] {
        Tensor::strides(self)
    }

    fn le_bytes(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.values().each_le_bytes(sink)
    }

    fn row_major_le_bytes(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        Tensor::row_major_le_bytes(self, sink)
    }
}

/// A value to be saved.
#[derive(Clone)]
#[non_exhaustive]
pub enum Save<'a> {
    /// `None`
    None,
    /// `True`, `False`
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A string.
    Str(String),
    /// A list.
    List(Vec<Save<'a>>),
    /// A tuple.
    Tuple(Vec<Save<'a>>),
    /// A dict.
    Dict(Vec<(PathPart, Save<'a>)>),
    /// An OrderedDict.
    OrderedDict(Vec<(PathPart, Save<'a>)>),
    /// What `state_dict()` of a module without submodules returns: an OrderedDict with its attribute `_metadata`.
    StateDict(Vec<(PathPart, Save<'a>)>),
    /// A tensor.
    Tensor(&'a dyn TensorSource),
}

impl std::fmt::Debug for Save<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Save::None => f.write_str("None"),
            Save::Bool(b) => write!(f, "{b}"),
            Save::Int(n) => write!(f, "{n}"),
            Save::Float(x) => write!(f, "{x:?}"),
            Save::Str(text) => write!(f, "{text:?}"),
            Save::List(items) | Save::Tuple(items) => f.debug_list().entries(items).finish(),
            Save::Dict(entries) | Save::OrderedDict(entries) | Save::StateDict(entries) => {
                f.debug_map().entries(entries.iter().map(|(k, v)| (k, v))).finish()
            }
            Save::Tensor(tensor) => write!(f, "{} {:?}", tensor.dtype(), tensor.shape()),
        }
    }
}

/// Values nested deeper than this are not saved: PyTorch's own pickler could not either.
const MAX_DEPTH: usize = 400;
/// The pickler flushes the entries of a dict or list every thousand.
const BATCH: usize = 1000;
/// Data begins at a multiple of this.
const ALIGNMENT: u64 = 64;
/// Numbers from here on do not fit 32 bits (all ones stand for "see the zip64 block").
const WIDE: u64 = 0xffff_ffff;

/// Saves the tensors of a module, as `torch.save(module.state_dict(), path)` does. `folder` is the archive's folder, see
/// [`Writer::folder_for`].
///
/// # Errors
/// Two tensors of one name; those of [`Writer::save`].
pub fn write_state_dict<W: Write>(out: W, folder: &str, tensors: &[(&str, &dyn TensorSource)]) -> Result<W> {
    let mut names = HashSet::new();
    if let Some((name, _)) = tensors.iter().find(|(name, _)| !names.insert(*name)) {
        return Err(Error::usage(format!("two tensors have the name {name:?}")));
    }
    let entries = tensors.iter().map(|&(name, tensor)| (PathPart::from(name), Save::Tensor(tensor))).collect();
    Writer::new(out, folder)?.save(&Save::StateDict(entries))
}

/// Writes one `.pt` file to anything that takes bytes.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    folder: String,
    at: u64,
    records: Vec<Written>,
}

#[derive(Debug)]
struct Written {
    /// Without the folder.
    name: String,
    crc: u32,
    size: u64,
    header: u64,
}

impl<W: Write> Writer<W> {
    /// A writer of an archive whose records lie in this folder.
    ///
    /// # Errors
    /// A folder name that is empty, holds a slash, a backslash or NUL, is `..`, or has more than 1000 bytes.
    pub fn new(out: W, folder: &str) -> Result<Self> {
        if folder.is_empty() || folder.contains(['/', '\\', '\0']) || folder == ".." || folder.len() > 1000 {
            return Err(Error::usage(format!("{folder:?} cannot be the folder in a .pt file")));
        }
        Ok(Writer { out, folder: folder.to_string(), at: 0, records: Vec::new() })
    }

    /// The folder that `torch.save` uses in a file of this name: the name up to its last dot, `archive` where it is not
    /// ASCII.
    pub fn folder_for(path: &std::path::Path) -> String {
        let stem = path.file_name().and_then(|n| n.to_str()).filter(|n| n.is_ascii());
        let stem = stem.map(|n| n.rsplit_once('.').map_or(n, |(stem, _)| stem));
        match stem {
            Some(stem) if !["", ".."].contains(&stem) && !stem.contains('\\') && stem.len() <= 1000 => stem.to_string(),
            _ => "archive".to_string(),
        }
    }

    /// Writes the whole file and returns what it was written to, not flushed.
    ///
    /// # Errors
    /// A tensor whose strides have holes or whose source gives another number of bytes than its shape needs; values nested
    /// too deep; the errors of the output.
    pub fn save(mut self, root: &Save<'_>) -> Result<W> {
        let mut pickler =
            Pickler { out: b"\x80\x02".to_vec(), memo: HashMap::new(), remembered: 0, tensors: Vec::new() };
        pickler.value(root, 0)?;
        pickler.out.push(b'.');
        let Pickler { out: pickle, tensors, .. } = pickler;
        self.small("data.pkl", &pickle)?;
        self.small(".format_version", b"1")?;
        self.small(".storage_alignment", ALIGNMENT.to_string().as_bytes())?;
        self.small("byteorder", b"little")?;
        for (key, tensor) in tensors.iter().enumerate() {
            let bytes = tensor_bytes(*tensor)?;
            self.record(format!("data/{key}"), bytes, |sink| tensor.le_bytes(sink))?;
        }
        self.small("version", b"3\n")?;
        let id = serialization_id(&self.records);
        self.small(".data/serialization_id", id.as_bytes())?;
        self.directory()?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| Error::io(format!("cannot write at byte {}", self.at), e))?;
        self.at = self.at.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn small(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.record(name.to_string(), bytes.len() as u64, |sink| sink(bytes))
    }

    /// One record of `size` bytes, which `data` hands out.
    fn record(
        &mut self,
        name: String,
        size: u64,
        data: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let header_at = self.at;
        let full_name = format!("{}/{name}", self.folder);
        // A record that is long or lies far out has a zip64 block; for alignment, PyTorch counts the offset in it too.
        // (The size packed stays 0, as all that the descriptor repeats.)
        let mut numbers = Vec::new();
        if size >= WIDE {
            numbers.extend([size, 0]);
        }
        if header_at >= WIDE {
            numbers.push(header_at);
        }
        let wide = if numbers.is_empty() { Vec::new() } else { zip64_block(&numbers) };
        let fixed = 34u64.saturating_add(full_name.len() as u64).saturating_add(wide.len() as u64);
        let start = header_at.saturating_add(fixed);
        let padding = start.next_multiple_of(ALIGNMENT).saturating_sub(start);
        let padding = usize::try_from(padding).unwrap_or_default();

        let mut extra = wide;
        extra.extend(b"FB");
        extra.extend(u16_len(padding)?);
        extra.resize(extra.len().saturating_add(padding), b'Z');
        let mut header = b"PK\x03\x04".to_vec();
        // Version, flags, method; time, date, checksum and sizes stay 0.
        header.extend([0, 0, flags(size), 8, 0, 0]);
        header.extend([0; 16]);
        header.extend(u16_len(full_name.len())?);
        header.extend(u16_len(extra.len())?);
        header.extend(full_name.as_bytes());
        header.extend(extra);
        self.put(&header)?;

        let mut crc = Crc32::new();
        let data_at = self.at;
        data(&mut |bytes| {
            crc.update(bytes);
            self.put(bytes)
        })
        .map_err(|e| e.at(&name))?;
        let written = self.at.saturating_sub(data_at);
        if written != size {
            return Err(Error::usage(format!("{written} bytes were given, the shape needs {size}")).at(name));
        }
        let crc = crc.finalize();
        self.records.push(Written { name, crc, size, header: header_at });
        if size == 0 {
            return Ok(());
        }
        let mut descriptor = b"PK\x07\x08".to_vec();
        descriptor.extend(crc.to_le_bytes());
        match u32::try_from(size) {
            Ok(size) if header_at < WIDE && u64::from(size) < WIDE => {
                descriptor.extend([size.to_le_bytes(); 2].as_flattened())
            }
            _ => descriptor.extend([size.to_le_bytes(); 2].as_flattened()),
        }
        self.put(&descriptor)
    }

    fn directory(&mut self) -> Result<()> {
        let start = self.at;
        let records = std::mem::take(&mut self.records);
        for record in &records {
            let full_name = format!("{}/{}", self.folder, record.name);
            let mut numbers = Vec::new();
            if record.size >= WIDE {
                numbers.extend([record.size, record.size]);
            }
            if record.header >= WIDE {
                numbers.push(record.header);
            }
            let wide = if numbers.is_empty() { Vec::new() } else { zip64_block(&numbers) };
            let mut entry = b"PK\x01\x02".to_vec();
            entry.extend([0, 0, 0, 0, flags(record.size), 8, 0, 0, 0, 0, 0, 0]);
            entry.extend(record.crc.to_le_bytes());
            entry.extend([narrow(record.size); 2].as_flattened());
            entry.extend(u16_len(full_name.len())?);
            entry.extend(u16_len(wide.len())?);
            entry.extend([0; 10]);
            entry.extend(narrow(record.header));
            entry.extend(full_name.as_bytes());
            entry.extend(wide);
            self.put(&entry)?;
        }
        let (end64, count) = (self.at, records.len() as u64);
        let size = end64.saturating_sub(start);
        let mut end = b"PK\x06\x06".to_vec();
        end.extend(44u64.to_le_bytes());
        // Made by and needed versions, as PyTorch's zip library writes them; disks 0 and 0.
        end.extend([0x1e, 0x03, 0x2d, 0x00]);
        end.extend([0; 8]);
        end.extend([count.to_le_bytes(), count.to_le_bytes(), size.to_le_bytes(), start.to_le_bytes()].as_flattened());
        end.extend(b"PK\x06\x07\0\0\0\0");
        end.extend(end64.to_le_bytes());
        end.extend(1u32.to_le_bytes());
        end.extend(b"PK\x05\x06\0\0\0\0");
        end.extend([u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes(); 2].as_flattened());
        end.extend([narrow(size), narrow(start)].as_flattened());
        end.extend([0, 0]);
        self.put(&end)
    }
}

/// The low byte of a record's flags: sizes and checksum follow the data, but where there is none. (The high byte says that
/// names are UTF-8.)
fn flags(size: u64) -> u8 {
    if size == 0 { 0 } else { 8 }
}

/// The number in 4 bytes, all ones if it does not fit.
fn narrow(n: u64) -> [u8; 4] {
    u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes()
}

fn u16_len(n: usize) -> Result<[u8; 2]> {
    let n = u16::try_from(n).map_err(|_| Error::usage(format!("{n} bytes do not fit a zip header")))?;
    Ok(n.to_le_bytes())
}

/// At most three numbers.
fn zip64_block(numbers: &[u64]) -> Vec<u8> {
    let mut block = vec![1, 0];
    block.extend(u16::try_from(numbers.len().saturating_mul(8)).unwrap_or_default().to_le_bytes());
    numbers.iter().for_each(|n| block.extend(n.to_le_bytes()));
    block
}

/// The length of a tensor's storage.
fn tensor_bytes(tensor: &dyn TensorSource) -> Result<u64> {
    let (shape, strides) = (tensor.shape(), tensor.strides());
    if shape.len() > MAX_DIMS {
        return Err(Error::usage(format!("{} dimensions; the limit is {MAX_DIMS}", shape.len())));
    }
    if !is_dense(shape, strides) {
        return Err(Error::usage(format!("strides {strides:?} do not lay the shape {shape:?} out densely")));
    }
    let elements = element_count(shape).ok_or_else(|| Error::usage(format!("shape {shape:?} overflows")))? as u64;
    elements
        .checked_mul(tensor.dtype().size_bytes() as u64)
        .ok_or_else(|| Error::usage(format!("shape {shape:?} overflows")))
}

/// What the pickler has written before and may refer to.
#[derive(PartialEq, Eq, Hash)]
enum Memo {
    Str(String),
    Global(&'static str, &'static str),
}

struct Pickler<'a> {
    out: Vec<u8>,
    memo: HashMap<Memo, u32>,
    /// How many objects have been memoized: every one gets a number, as in CPython, though few are referred to.
    remembered: u32,
    tensors: Vec<&'a dyn TensorSource>,
}

impl<'a> Pickler<'a> {
    fn remember(&mut self) -> u32 {
        let n = self.remembered;
        match u8::try_from(n) {
            Ok(n) => self.out.extend([b'q', n]),
            Err(_) => {
                self.out.push(b'r');
                self.out.extend(n.to_le_bytes());
            }
        }
        self.remembered = n.saturating_add(1);
        n
    }

    /// Writes a reference to what was written before, if it was.
    fn recall(&mut self, memo: &Memo) -> bool {
        let Some(&n) = self.memo.get(memo) else { return false };
        match u8::try_from(n) {
            Ok(n) => self.out.extend([b'h', n]),
            Err(_) => {
                self.out.push(b'j');
                self.out.extend(n.to_le_bytes());
            }
        }
        true
    }

    fn string(&mut self, text: &str) -> Result<()> {
        let memo = Memo::Str(text.to_string());
        if !self.recall(&memo) {
            let length = u32::try_from(text.len()).map_err(|_| Error::usage("a string of 4 GiB or more"))?;
            self.out.push(b'X');
            self.out.extend(length.to_le_bytes());
            self.out.extend(text.as_bytes());
            let n = self.remember();
            self.memo.insert(memo, n);
        }
        Ok(())
    }

    fn global(&mut self, module: &'static str, name: &'static str) {
        let memo = Memo::Global(module, name);
        if !self.recall(&memo) {
            self.out.extend([b"c", module.as_bytes(), b"\n", name.as_bytes(), b"\n"].concat());
            let n = self.remember();
            self.memo.insert(memo, n);
        }
    }

    fn int(&mut self, value: i64) {
        if let Ok(n) = u8::try_from(value) {
            self.out.extend([b'K', n]);
        } else if let Ok(n) = u16::try_from(value) {
            self.out.push(b'M');
            self.out.extend(n.to_le_bytes());
        } else if let Ok(n) = i32::try_from(value) {
            self.out.push(b'J');
            self.out.extend(n.to_le_bytes());
        } else {
            // Two's complement without the bytes that only repeat the sign.
            let mut bytes = value.to_le_bytes().to_vec();
            let fill = if value < 0 { 0xff } else { 0 };
            while let [.., before, last] = bytes.as_slice()
                && *last == fill
                && (*before >= 0x80) == (value < 0)
            {
                bytes.pop();
            }
            self.out.extend([0x8a, u8::try_from(bytes.len()).unwrap_or(8)]);
            self.out.extend(bytes);
        }
    }

    fn ordered_dict(&mut self) {
        self.global("collections", "OrderedDict");
        self.out.extend(b")R");
        self.remember();
    }

    fn value(&mut self, value: &Save<'a>, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::usage(format!("values nest deeper than {MAX_DEPTH}")));
        }
        let depth = depth.saturating_add(1);
        match value {
            Save::None => self.out.push(b'N'),
            Save::Bool(true) => self.out.push(0x88),
            Save::Bool(false) => self.out.push(0x89),
            Save::Int(n) => self.int(*n),
            Save::Float(x) => {
                self.out.push(b'G');
                self.out.extend(x.to_be_bytes());
            }
            Save::Str(text) => self.string(text)?,
            Save::List(items) => {
                self.out.push(b']');
                self.remember();
                if let [item] = items.as_slice() {
                    self.value(item, depth)?;
                    self.out.push(b'a');
                    return Ok(());
                }
                for batch in items.chunks(BATCH) {
                    self.out.push(b'(');
                    batch.iter().try_for_each(|item| self.value(item, depth))?;
                    self.out.push(b'e');
                }
            }
            Save::Tuple(items) => match items.len() {
                0 => self.out.push(b')'),
                n @ 1..=3 => {
                    items.iter().try_for_each(|item| self.value(item, depth))?;
                    self.out.push(if n == 1 {
                        0x85
                    } else if n == 2 {
                        0x86
                    } else {
                        0x87
                    });
                    self.remember();
                }
                _ => {
                    self.out.push(b'(');
                    items.iter().try_for_each(|item| self.value(item, depth))?;
                    self.out.push(b't');
                    self.remember();
                }
            },
            Save::Dict(entries) => {
                self.out.push(b'}');
                self.remember();
                self.entries(entries, depth, true)?;
            }
            Save::OrderedDict(entries) => {
                self.ordered_dict();
                self.entries(entries, depth, false)?;
            }
            Save::StateDict(entries) => {
                self.ordered_dict();
                self.entries(entries, depth, false)?;
                // {'_metadata': OrderedDict({'': {'version': 1}})}
                self.out.push(b'}');
                self.remember();
                self.string("_metadata")?;
                self.ordered_dict();
                self.string("")?;
                self.out.push(b'}');
                self.remember();
                self.string("version")?;
                self.out.extend(b"K\x01sssb");
            }
            Save::Tensor(tensor) => self.tensor(*tensor)?,
        }
        Ok(())
    }

    /// The items of a dict. CPython has one way for plain dicts and one for everything else: they differ where one item is
    /// left for the last batch, and where none is.
    fn entries(&mut self, entries: &[(PathPart, Save<'a>)], depth: usize, plain: bool) -> Result<()> {
        for batch in entries.chunks(BATCH) {
            let single = batch.len() == 1 && (!plain || entries.len() == 1);
            if !single {
                self.out.push(b'(');
            }
            for (key, value) in batch {
                match key {
                    PathPart::Key(key) => self.string(key)?,
                    PathPart::Index(n) => self.int(*n),
                }
                self.value(value, depth)?;
            }
            self.out.push(if single { b's' } else { b'u' });
        }
        if plain && !entries.is_empty() && entries.len().is_multiple_of(BATCH) {
            self.out.extend(b"(u");
        }
        Ok(())
    }

    fn tensor(&mut self, tensor: &'a dyn TensorSource) -> Result<()> {
        let bytes = tensor_bytes(tensor)?;
        let elements = bytes.checked_div(tensor.dtype().size_bytes() as u64).unwrap_or(0);
        let storage = match tensor.dtype() {
            Dtype::F64 => "DoubleStorage",
            Dtype::F32 => "FloatStorage",
            Dtype::F16 => "HalfStorage",
            Dtype::BF16 => "BFloat16Storage",
            Dtype::I64 => "LongStorage",
            Dtype::I32 => "IntStorage",
            Dtype::I16 => "ShortStorage",
            Dtype::I8 => "CharStorage",
            Dtype::U8 => "ByteStorage",
            Dtype::Bool => "BoolStorage",
        };
        self.global("torch._utils", "_rebuild_tensor_v2");
        self.out.extend(b"((");
        self.string("storage")?;
        self.global("torch", storage);
        self.string(&self.tensors.len().to_string())?;
        self.string("cpu")?;
        self.int(signed(elements)?);
        self.out.push(b't');
        self.remember();
        self.out.push(b'Q');
        self.int(0);
        self.dims(tensor.shape())?;
        self.dims(tensor.strides())?;
        self.out.push(0x89);
        self.ordered_dict();
        self.out.push(b't');
        self.remember();
        self.out.push(b'R');
        self.remember();
        self.tensors.push(tensor);
        Ok(())
    }

    fn dims(&mut self, dims: &[usize]) -> Result<()> {
        let dims: Result<Vec<_>> = dims.iter().map(|&n| Ok(Save::Int(signed(n as u64)?))).collect();
        self.value(&Save::Tuple(dims?), 0)
    }
}

fn signed(n: u64) -> Result<i64> {
    i64::try_from(n).map_err(|_| Error::usage(format!("{n} does not fit 64 bits with a sign")))
}

/// PyTorch's id of a file: a hash of the records' names, then one of their checksums (save of those without data),
/// each in 20 decimal digits. The names
/// are taken in the order in which they would lie in the C++ library's `unordered_set`, which is what PyTorch iterates over.
fn serialization_id(records: &[Written]) -> String {
    let combine = |seed: u64, value: u64| {
        seed ^ value.wrapping_add(0x9e37_79b9).wrapping_add(seed.wrapping_shl(6)).wrapping_add(seed.wrapping_shr(2))
    };
    let hashes: Vec<u64> = records.iter().map(|r| murmur(r.name.as_bytes())).collect();
    let names = hash_set_order(&hashes).into_iter().fold(0, combine);
    let crcs = records.iter().filter(|r| r.size > 0).map(|r| u64::from(r.crc)).fold(0, combine);
    format!("{names:020}{crcs:020}")
}

/// The hashes in the order in which libstdc++'s `unordered_set` iterates after they were put in one by one: a new element
/// goes before the first of its bucket, or to the front of everything if the bucket is empty; when there are more elements
/// than buckets, there will be at least twice as many buckets, and all elements are put in anew in their present order.
fn hash_set_order(hashes: &[u64]) -> Vec<u64> {
    const BUCKETS: [u64; 18] = [
        13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172_933, 351_061, 712_697, 1_447_153,
        2_938_679,
    ];
    // A list of the elements, as the element after each; `first` is by bucket the element before its first.
    #[derive(Default)]
    struct List {
        front: Option<usize>,
        next: Vec<Option<usize>>,
        before: HashMap<u64, Option<usize>>,
    }
    impl List {
        fn put(&mut self, i: usize, hashes: &[u64], buckets: u64) {
            let bucket = |i: usize| hashes.get(i).map_or(0, |h| h.checked_rem(buckets).unwrap_or(0));
            let before = self.before.get(&bucket(i)).copied();
            let after = match before {
                Some(Some(before)) => self.next.get_mut(before).and_then(|next| next.replace(i)),
                Some(None) => self.front.replace(i),
                None => {
                    let after = self.front.replace(i);
                    self.before.insert(bucket(i), None);
                    if let Some(after) = after {
                        self.before.insert(bucket(after), Some(i));
                    }
                    after
                }
            };
            if let Some(next) = self.next.get_mut(i) {
                *next = after;
            }
        }

        fn order(&self) -> Vec<usize> {
            std::iter::successors(self.front, |&i| self.next.get(i).copied().flatten()).collect()
        }
    }
    let new_list = || List { next: vec![None; hashes.len()], ..List::default() };
    let mut sizes = BUCKETS.into_iter().peekable();
    let mut buckets = 1;
    let mut list = new_list();
    for i in 0..hashes.len() {
        if i as u64 >= buckets || i == 0 {
            buckets = sizes.next().unwrap_or(u64::from(u32::MAX));
            let order = list.order();
            list = new_list();
            order.into_iter().for_each(|j| list.put(j, hashes, buckets));
        }
        list.put(i, hashes, buckets);
    }
    list.order().into_iter().filter_map(|i| hashes.get(i).copied()).collect()
}

/// libstdc++'s hash of a string: MurmurHash2 for 64 bits with its seed.
fn murmur(bytes: &[u8]) -> u64 {
    const M: u64 = 0xc6a4_a793_5bd1_e995;
    let mix = |v: u64| v ^ v >> 47;
    let mut hash = 0xc70f_6907 ^ (bytes.len() as u64).wrapping_mul(M);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let word = mix(u64::from_le_bytes(*word).wrapping_mul(M)).wrapping_mul(M);
        hash = (hash ^ word).wrapping_mul(M);
    }
    if !rest.is_empty() {
        let word = rest.iter().rev().fold(0, |word: u64, &b| word << 8 | u64::from(b));
        hash = (hash ^ word).wrapping_mul(M);
    }
    mix(mix(hash).wrapping_mul(M))
}
