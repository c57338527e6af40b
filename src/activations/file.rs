//! One tensor of a file as rows, read in pieces.

use super::check_shape;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::files::TensorFile;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

/// The one tensor of a file, of which rows are read.
#[derive(Debug)]
pub(super) struct RowFile {
    path: PathBuf,
    shape: Vec<usize>,
    dtype: Dtype,
    stamp: Stamp,
    /// Opened when rows are read.
    file: Mutex<Option<TensorFile>>,
}

/// What shows that a file is another one than before.
#[derive(Clone, Debug, PartialEq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(path: &Path) -> Result<Self> {
        let found = std::fs::metadata(path).map_err(|e| Error::io("cannot look at the file", e).in_file(path))?;
        Ok(Stamp { bytes: found.len(), modified: found.modified().ok() })
    }
}

impl RowFile {
    /// Looks at a file that holds one tensor that can be activations; reads its header and closes it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let stamp = Stamp::of(path)?;
        let file = TensorFile::open(path)?;
        let [tensor] = file.tensors() else {
            let names: Vec<&str> = file.tensors().iter().take(5).map(|t| t.name.as_str()).collect();
            let what = format!(
                "holds {} tensors ({} …); a file of activations holds one",
                file.tensors().len(),
                names.join(", ")
            );
            return Err(Error::format(what).in_file(path));
        };
        check_shape(&tensor.shape, tensor.dtype).map_err(|e| e.in_file(path))?;
        let (shape, dtype) = (tensor.shape.clone(), tensor.dtype);
        Ok(RowFile { path: path.to_owned(), shape, dtype, stamp, file: Mutex::default() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What messages call it.
    pub(super) fn name(&self) -> String {
        self.path.display().to_string()
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Appends the bytes of `count` rows from row `at` on, little-endian and row-major.
    pub(super) fn read(&self, at: usize, count: usize, out: &mut Vec<u8>) -> Result<()> {
        let now = Stamp::of(&self.path)?;
        if now != self.stamp {
            let (before, now) = (self.stamp.bytes, now.bytes);
            let what = format!("has changed since it was opened ({before} bytes then, {now} now)");
            return Err(Error::format(what).in_file(&self.path));
        }
        // Whoever panicked while reading left the file at some position, which the next read sets anew.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match &mut *file {
            Some(file) => file,
            closed => closed.insert(TensorFile::open(&self.path)?),
        };
        let rows = file.read_rows(0, at..at.saturating_add(count))?;
        rows.row_major_le_bytes(|bytes| {
            out.extend_from_slice(bytes);
            Ok::<_, Error>(())
        })
    }

    /// Closes the file until rows are read again.
    pub(super) fn close(&self) {
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
