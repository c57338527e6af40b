//! PyTorch's `.pt` files: named host tensors and the plain values beside them, read and written.
//!
//! A `.pt` file is a zip archive ([`container`](self)) that holds a pickle, which names tensors and says how each lies in a
//! storage, and the storages, raw. Reading happens in two steps: [`PtFile::new`] reads the directory and the pickle, checks
//! every number in them against the file, and so knows all tensors without having read one; [`PtFile::read`] then moves one
//! tensor's bytes from the file into its vector, by way of a small buffer, and compares the record's checksum.
//!
//! Left out: what `torch.save` wrote before release 1.6, TorchScript, sparse and quantized tensors, complex numbers. Nothing
//! in a file is ever called: see [`pickle`](self) for what is understood.

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

mod container;
mod pickle;
mod value;
mod write;

pub use pickle::TensorRef;
pub use value::{BigInt, Entries, Items, PathPart, Value, dotted};
pub use write::{Save, TensorSource, Writer, write_state_dict};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::raw::open_file;
use crate::tensor::{Positions, Tensor, Values, is_dense, row_major_strides};
use container::{Container, spelled};
use crc32fast::Hasher as Crc32;
use std::fs::File;
use std::io::{Read, Seek};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use value::{Tree, short};

/// A pickle longer than this is refused. It is read into memory; that of a checkpoint with 10,000 tensors has 1 MB.
const PICKLE_BYTES: u64 = 256 << 20;
/// The same for a deflated one, whose length costs its writer nothing.
const DEFLATED_PICKLE_BYTES: u64 = 32 << 20;

/// A tensor's place among the values, and where its elements lie.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorEntry {
    /// The way from the root: keys of dicts, positions in lists and tuples.
    pub path: Vec<PathPart>,
    /// The path joined by dots. Two paths may give one name.
    pub name: String,
    /// Type, shape, and place.
    pub tensor: Arc<TensorRef>,
}

/// A checkpoint: its values are in memory, its tensors in the file.
#[derive(Debug)]
pub struct PtFile<R> {
    container: Container<R>,
    tree: Tree,
    tensors: Vec<TensorEntry>,
}

/// Opens the checkpoint at `path`.
///
/// # Errors
/// Those of [`PtFile::new`], and of opening the file.
pub fn open(path: impl AsRef<Path>) -> Result<PtFile<File>> {
    let path = path.as_ref();
    let file = open_file(path)?;
    PtFile::new(file).map_err(|e| e.in_file(path))
}

impl<R: Read + Seek> PtFile<R> {
    /// Reads the directory and the pickle, not the tensors.
    ///
    /// # Errors
    /// Whatever is not exactly a checkpoint that this crate carries; the message says what the file is instead, or which
    /// record, which byte of it, what was needed there and what was found.
    pub fn new(reader: R) -> Result<Self> {
        let mut container = Container::open(reader)?;
        let pickle = find_pickle(&container)?;
        let record = container.record(pickle)?;
        let (name, size) = (record.name.clone(), record.size);
        let folder = name.strip_suffix("data.pkl").unwrap_or_default().to_string();
        // Not read, and yet PyTorch would read it whatever its case.
        container.find(&format!("{folder}version"))?;
        if container.find(&format!("{folder}constants.pkl"))?.is_some() {
            return Err(Error::unsupported(
                "a TorchScript archive (it has constants.pkl); save the module's state_dict() with torch.save",
            ));
        }
        if let Some(index) = container.find(&format!("{folder}byteorder"))? {
            let order = container.read_all(index, 64)?;
            if order != b"little" {
                let order = String::from_utf8_lossy(&order).into_owned();
                let what = format!("byteorder is {order:?}; only little-endian storages are read");
                return Err(Error::unsupported(what).at(format!("{folder}byteorder")));
            }
        }
        let limit = if container.is_stored(pickle) { PICKLE_BYTES } else { DEFLATED_PICKLE_BYTES };
        if size > limit {
            return Err(Error::unsupported(format!("a pickle of {size} bytes; the limit is {limit}")).at(name));
        }
        let bytes = container.read_all(pickle, limit)?;
        let find = |key: &str| {
            let name = format!("{folder}data/{key}");
            let missing =
                || Error::format(format!("storage {:?} is missing: there is no record {:?}", short(key), short(&name)));
            let index = container.find(&name)?.filter(|_| !key.ends_with('/')).ok_or_else(missing)?;
            Ok((index, container.record(index)?.size))
        };
        let (nodes, root) = pickle::parse(bytes, &find).map_err(|e| e.at(&name))?;
        let tree = Tree::new(nodes, root);
        // Once for the limits, which a hostile file passes after a million tensors, and once to keep them.
        tree.walk(|_, _| Ok(())).map_err(|e| e.at(&name))?;
        let mut tensors = Vec::new();
        let walked = tree.walk(|path, value| {
            if let Value::Tensor(tensor) = value {
                tensors.push(TensorEntry { path: path.to_vec(), name: dotted(path), tensor: tensor.clone() });
            }
            Ok(())
        });
        walked.map_err(|e| e.at(&name))?;
        Ok(PtFile { container, tree, tensors })
    }

    /// The root of all values: a dict in most checkpoints.
    pub fn root(&self) -> Value<'_> {
        self.tree.root()
    }

    /// Every tensor, in the order of a walk from the root. One that is referred to twice is there twice.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The tensor at this path.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, path: &[PathPart]) -> Result<Arc<TensorRef>> {
        let entry = self.tensors.iter().find(|t| t.path == path);
        entry.map(|t| t.tensor.clone()).ok_or_else(|| Error::format(format!("there is no tensor {:?}", dotted(path))))
    }

    /// Calls `visit` with path and value of everything that is neither tensor nor a container of something with a path: of
    /// plain values, of sets as a whole, and of dicts, lists and tuples that are empty.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn plain_values<'a>(&'a self, mut visit: impl FnMut(&[PathPart], Value<'a>) -> Result<()>) -> Result<()> {
        self.tree.walk(|path, value| match value {
            Value::Tensor(_) => Ok(()),
            value => visit(path, value),
        })
    }

    /// Reads one tensor. Where the view is a dense block of the storage, whatever the order of its dimensions, the elements
    /// are moved once and keep their strides; other views are gathered into row-major order.
    ///
    /// # Errors
    /// A checksum that does not match, a file that has changed.
    pub fn read(&mut self, tensor: &TensorRef) -> Result<Tensor> {
        if is_dense(&tensor.shape, &tensor.strides) {
            let values = self.read_block(tensor, tensor.offset, tensor.elements, tensor.dtype)?;
            return Tensor::with_strides(tensor.shape.clone(), tensor.strides.clone(), values);
        }
        let block = self.read_block(tensor, tensor.offset, tensor.span(), tensor.dtype)?;
        self.container.work = self.container.work.saturating_add(tensor.bytes());
        let values = block.gather(Positions::new(&tensor.shape, &tensor.strides));
        Tensor::new(tensor.shape.clone(), values)
    }

    /// Reads rows `rows` of the first dimension. Of a stored record, once its checksum has been compared, only the bytes
    /// that these rows span are read.
    ///
    /// # Errors
    /// As [`PtFile::read`]; rows that the tensor does not have.
    pub fn read_rows(&mut self, tensor: &TensorRef, rows: Range<usize>) -> Result<Tensor> {
        self.read(&slice_rows(tensor, rows)?)
    }

    /// The CRC-32 of the elements' little-endian bytes in row-major order. A tensor that lies so is not held in memory.
    ///
    /// # Errors
    /// As [`PtFile::read`].
    pub fn crc32(&mut self, tensor: &TensorRef) -> Result<u32> {
        if tensor.elements == 0 {
            return Ok(0);
        }
        let mut crc = Crc32::new();
        if is_row_major(&tensor.shape, &tensor.strides) {
            let range = byte_range(tensor, tensor.offset, tensor.elements)?;
            // Where the tensor is all of its record, the record's own checksum, computed in any case, is the answer.
            let whole = range == (0..tensor.storage_bytes) && !self.container.is_verified(tensor.record);
            let record = self.container.stream(tensor.record, range, &mut |bytes| {
                if !whole {
                    crc.update(bytes);
                }
                Ok(())
            })?;
            return Ok(record.filter(|_| whole).unwrap_or(crc.finalize()));
        }
        // The byte of a bool may be other than 0 and 1 in a file; the checksum is of the bytes.
        let dtype = if tensor.dtype == Dtype::Bool { Dtype::U8 } else { tensor.dtype };
        let block = self.read_block(tensor, tensor.offset, tensor.span(), dtype)?;
        self.container.work = self.container.work.saturating_add((tensor.elements as u64).saturating_mul(2));
        let mut positions = Positions::new(&tensor.shape, &tensor.strides);
        let mut piece = Vec::new();
        loop {
            piece.clear();
            block.gather_le_bytes(positions.by_ref().take(8 << 10), &mut piece);
            if piece.is_empty() {
                return Ok(crc.finalize());
            }
            crc.update(&piece);
        }
    }

    /// Refuses to read a tensor when what was read, unpacked and gathered so far, and what the tensor takes, is far more than
    /// the file holds: a small file can name a million views of one deflated record, and expand each.
    ///
    /// # Errors
    /// More than four times all records and 256 MiB.
    pub(crate) fn check_work(&self, tensor: &TensorRef) -> Result<()> {
        let (held, work) = (self.container.held, self.container.work.saturating_add(tensor.bytes()));
        let limit = held.saturating_mul(4).saturating_add(256 << 20);
        match work > limit {
            true => Err(Error::format(format!(
                "{work} bytes are read and made for the tensors up to this one, and all records together have {held}: the limit is \
                 {limit}"
            ))),
            false => Ok(()),
        }
    }

    /// `count` elements from position `from` of the tensor's storage, in the order they lie in. Both have been checked
    /// against the storage when the pickle was read.
    fn read_block(&mut self, tensor: &TensorRef, from: usize, count: usize, dtype: Dtype) -> Result<Values> {
        if count == 0 {
            return Ok(Values::with_capacity(dtype, 0));
        }
        let (stored, range) = (self.container.is_stored(tensor.record), byte_range(tensor, from, count)?);
        if stored && range == (0..tensor.storage_bytes) {
            return self.container.read_elements(tensor.record, dtype, count);
        }
        // The bytes of a stored record are in the file; what a deflated one claims to be is not allocated before it comes.
        let mut values = Values::try_with_capacity(dtype, if stored { count } else { 0 })?;
        self.container.stream(tensor.record, range, &mut |bytes| {
            values.push_le_bytes(bytes);
            Ok(())
        })?;
        match values.len() == count {
            true => Ok(values),
            false => Err(Error::format(format!("{} elements were read, {count} needed", values.len()))),
        }
    }
}

/// The bytes of `count` elements from position `from` of the tensor's storage.
fn byte_range(tensor: &TensorRef, from: usize, count: usize) -> Result<Range<u64>> {
    let size = tensor.dtype.size_bytes() as u64;
    let start = (from as u64).checked_mul(size);
    let end = (count as u64).checked_mul(size).and_then(|n| n.checked_add(start?));
    match (start, end) {
        _ if count == 0 => Ok(0..0),
        (Some(start), Some(end)) => Ok(start..end),
        _ => Err(Error::format("the position of an element overflows")),
    }
}

/// The view of some rows of the first dimension.
fn slice_rows(tensor: &TensorRef, rows: Range<usize>) -> Result<TensorRef> {
    let refuse = || Error::shape(format!("rows {rows:?} of a tensor of shape {:?}", tensor.shape));
    let (&count, &stride) = tensor.shape.first().zip(tensor.strides.first()).ok_or_else(refuse)?;
    if rows.start > rows.end || rows.end > count {
        return Err(refuse());
    }
    let taken = rows.end.saturating_sub(rows.start);
    let mut part = tensor.clone();
    if let Some(size) = part.shape.first_mut() {
        *size = taken;
    }
    // A whole number of elements in each row, by the tensor's own count.
    part.elements = tensor.elements.checked_div(count).unwrap_or(0).saturating_mul(taken);
    if part.elements > 0 {
        part.offset = rows.start.checked_mul(stride).and_then(|n| n.checked_add(tensor.offset)).ok_or_else(refuse)?;
    }
    Ok(part)
}

/// Whether the elements lie in row-major order without holes.
pub(crate) fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    let row_major = row_major_strides(shape);
    let mut dims = shape.iter().zip(strides).zip(&row_major);
    shape.contains(&0) || dims.all(|((&size, stride), needed)| size == 1 || stride == needed)
}

/// The one record that is named `data.pkl`, in whatever folder.
fn find_pickle<R>(container: &Container<R>) -> Result<usize> {
    const NAME: &str = "data.pkl";
    let names = || container.records.iter().map(|r| (r.name.as_str(), r.name.rsplit('/').next().unwrap_or_default()));
    let mut pickles = names().enumerate().filter(|(_, (_, last))| last.eq_ignore_ascii_case(NAME));
    match (pickles.next(), pickles.next()) {
        (Some((_, (name, last))), None) if last != NAME => Err(spelled(NAME, name)),
        (Some((index, _)), None) => Ok(index),
        (Some((_, (first, _))), Some((_, (second, _)))) => {
            Err(Error::format(format!("two pickles: {first:?} and {second:?}")))
        }
        (None, _) if names().any(|(name, _)| name.ends_with(".npy")) => {
            Err(Error::unsupported("not a .pt file of torch.save but numpy's .npz: a zip archive of .npy files"))
        }
        (None, _) => Err(Error::unsupported("a zip archive without a record data.pkl: not a .pt file of torch.save")),
    }
}
