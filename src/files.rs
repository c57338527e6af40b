//! The three formats that tensors come in, behind one face: `.pt`, `.safetensors`, `.npy`.
//!
//! A file is recognised by its content; one whose name ends in `.pt`, `.pth`, `.safetensors` or `.npy` must also be that. Opening reads headers alone; tensors are then read whole, or in rows
//! of their first dimension, so that activations larger than memory can be gone through.

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
use crate::magic::{self, Kind};
use crate::npy::NpyFile;
use crate::pt::{PathPart, PtFile, TensorRef};
use crate::raw::{open_file, read_at};
use crate::safetensors::SafetensorsFile;
use crate::tensor::{Tensor, row_major_strides};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// All of a file beside the tensors, such as a cfg or a log.
///
/// # Errors
/// A file that is not regular or has more than `limit` bytes.
pub fn read_beside(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open_file(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|e| Error::io("cannot read", e).in_file(path))?;
    match bytes.len() as u64 > limit {
        true => Err(Error::unsupported(format!("it has more bytes than the limit of {limit}")).in_file(path)),
        false => Ok(bytes),
    }
}

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// PyTorch's zip file.
    Pt,
    /// Hugging Face's safetensors.
    Safetensors,
    /// numpy's array file.
    Npy,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Pt => "pt",
            Format::Safetensors => "safetensors",
            Format::Npy => "npy",
        })
    }
}

/// What a file says of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Where it is: keys and positions in a `.pt` file, the one name in a `.safetensors` file, nothing in a `.npy` file.
    pub path: Vec<PathPart>,
    /// The path joined by dots.
    pub name: String,
    /// The elements' type.
    pub dtype: Dtype,
    /// The sizes.
    pub shape: Vec<usize>,
    /// The strides in elements, as they are in the file.
    pub strides: Vec<usize>,
}

/// An open file of one of the formats.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    tensors: Vec<TensorInfo>,
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Pt { file: PtFile<File>, refs: Vec<Arc<TensorRef>>, checksums: HashMap<Arc<TensorRef>, u32> },
    Safetensors(SafetensorsFile<File>),
    Npy(NpyFile<File>),
}

impl TensorFile {
    /// Opens a file and reads what it says of its tensors, not the tensors.
    ///
    /// # Errors
    /// A file of none of the formats, or one that breaks its format's rules.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let claim = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
        let claim = match claim.as_deref() {
            Some("pt" | "pth") => Some(Format::Pt),
            Some("safetensors") => Some(Format::Safetensors),
            Some("npy") => Some(Format::Npy),
            _ => None,
        };
        Self::from_file(open_file(path)?, claim)
            .map(|file| TensorFile { path: path.to_path_buf(), ..file })
            .map_err(|e| e.in_file(path))
    }

    fn from_file(mut file: File, claim: Option<Format>) -> Result<Self> {
        let head = read_at(&mut file, 0, magic::HEAD_BYTES)?;
        let found = match magic::kind(&head) {
            Kind::Zip => Ok(Format::Pt),
            Kind::Safetensors => Ok(Format::Safetensors),
            Kind::Npy => Ok(Format::Npy),
            Kind::Other(what) => Err(what.to_string()),
            Kind::Unknown => Err(format!("something that begins with {:02x?}", head.get(..8).unwrap_or(&head))),
        };
        let refuse = |what| Error::unsupported(format!("not a .pt, .safetensors or .npy file but {what}"));
        // Where the name makes a claim, the format's own reader says what is wrong with it.
        let (tensors, inner) = match claim.map_or(found, Ok).map_err(refuse)? {
            Format::Pt => {
                let file = PtFile::new(file)?;
                let tensors = file.tensors().iter().map(|entry| TensorInfo {
                    path: entry.path.clone(),
                    name: entry.name.clone(),
                    dtype: entry.tensor.dtype,
                    shape: entry.tensor.shape.clone(),
                    strides: entry.tensor.strides.clone(),
                });
                let refs = file.tensors().iter().map(|entry| entry.tensor.clone()).collect();
                (tensors.collect(), Inner::Pt { refs, file, checksums: HashMap::new() })
            }
            Format::Safetensors => {
                let file = SafetensorsFile::new(file)?;
                let tensors = file.tensors().iter().map(|entry| TensorInfo {
                    path: vec![PathPart::from(entry.name.as_str())],
                    name: entry.name.clone(),
                    dtype: entry.dtype,
                    shape: entry.shape.clone(),
                    strides: row_major_strides(&entry.shape),
                });
                (tensors.collect(), Inner::Safetensors(file))
            }
            Format::Npy => {
                let file = NpyFile::new(file)?;
                let (dtype, shape, strides) = (file.dtype(), file.shape().to_vec(), file.strides().to_vec());
                (vec![TensorInfo { path: Vec::new(), name: String::new(), dtype, shape, strides }], Inner::Npy(file))
            }
        };
        Ok(TensorFile { path: PathBuf::new(), tensors, inner })
    }

    /// The file's format.
    pub fn format(&self) -> Format {
        match self.inner {
            Inner::Pt { .. } => Format::Pt,
            Inner::Safetensors(_) => Format::Safetensors,
            Inner::Npy(_) => Format::Npy,
        }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says of its tensors.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The checkpoint, if it is one, for the plain values beside its tensors.
    pub fn as_pt(&self) -> Option<&PtFile<File>> {
        match &self.inner {
            Inner::Pt { file, .. } => Some(file),
            _ => None,
        }
    }

    /// The strings of a safetensors file's `__metadata__`; nothing in other formats.
    pub fn metadata(&self) -> &[(String, String)] {
        match &self.inner {
            Inner::Safetensors(file) => file.metadata(),
            _ => &[],
        }
    }

    /// The place of the tensor of this name in [`Self::tensors`].
    ///
    /// # Errors
    /// There is none, or several.
    pub fn index_of(&self, name: &str) -> Result<usize> {
        let mut found = self.tensors.iter().enumerate().filter(|(_, t)| t.name == name);
        match (found.next(), found.next()) {
            (Some((index, _)), None) => Ok(index),
            (first, _) => {
                let what = if first.is_some() { "more than one tensor has the name" } else { "there is no tensor" };
                Err(Error::format(format!("{what} {name:?}")).in_file(&self.path))
            }
        }
    }

    /// The tensor at this place in [`Self::tensors`]. In a `.pt` and a `.npy` file it keeps its strides.
    ///
    /// # Errors
    /// A checksum that does not match; a file that has changed.
    pub fn read(&mut self, index: usize) -> Result<Tensor> {
        self.with(index, |inner| match inner {
            Inner::Pt { file, refs, .. } => Some(file.read(refs.get(index)?)),
            Inner::Safetensors(file) => Some(file.read(index)),
            Inner::Npy(file) => Some(file.read()),
        })
    }

    /// Rows `rows` of its first dimension. Only their bytes are read, save that the first time a record of a `.pt` file is
    /// touched all of it is read for its checksum.
    ///
    /// # Errors
    /// As [`Self::read`]; rows that there are not; a deflated record is read in full each time.
    pub fn read_rows(&mut self, index: usize, rows: Range<usize>) -> Result<Tensor> {
        self.with(index, |inner| match inner {
            Inner::Pt { file, refs, .. } => Some(file.read_rows(refs.get(index)?, rows)),
            Inner::Safetensors(file) => Some(file.read_rows(index, rows)),
            Inner::Npy(file) => Some(file.read_rows(rows)),
        })
    }

    /// [`Self::read`] for whoever reads all tensors of a file and keeps them. Refuses where a file makes its reader work far
    /// beyond its size, since a small `.pt` file can give one storage a million names, and expand each.
    ///
    /// # Errors
    /// Those of [`Self::read`]; with this tensor, more than four times the bytes of all records of a `.pt` file, and 256 MiB.
    pub fn read_of_all(&mut self, index: usize) -> Result<Tensor> {
        self.with(index, |inner| match inner {
            Inner::Pt { file, refs, .. } => Some(file.check_work(refs.get(index)?)),
            _ => Some(Ok(())),
        })?;
        self.read(index)
    }

    /// The CRC-32 of its elements' little-endian bytes in row-major order.
    ///
    /// # Errors
    /// As [`Self::read`]; a file that would make its reader work far beyond its size.
    pub fn crc32(&mut self, index: usize) -> Result<u32> {
        self.with(index, |inner| match inner {
            Inner::Pt { file, refs, checksums } => {
                let tensor = refs.get(index)?;
                if let Some(&crc) = checksums.get(tensor) {
                    return Some(Ok(crc));
                }
                let crc = file.check_work(tensor).and_then(|()| file.crc32(tensor));
                if let Ok(crc) = crc {
                    checksums.insert(tensor.clone(), crc);
                }
                Some(crc)
            }
            Inner::Safetensors(file) => Some(file.crc32(index)),
            Inner::Npy(file) => Some(file.crc32()),
        })
    }

    /// Runs `f` on a tensor that is there, and says in errors which file and tensor it was.
    fn with<T>(&mut self, index: usize, f: impl FnOnce(&mut Inner) -> Option<Result<T>>) -> Result<T> {
        let count = self.tensors.len();
        let missing = || Err(Error::usage(format!("tensor {index} of {count}")));
        let result = if index < count { f(&mut self.inner).unwrap_or_else(missing) } else { missing() };
        result.map_err(|e| match self.tensors.get(index) {
            Some(info) if !info.name.is_empty() => e.at(&info.name).in_file(&self.path),
            _ => e.in_file(&self.path),
        })
    }
}
