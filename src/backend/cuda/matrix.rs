//! Matrices and latents in the device's memory.

use super::driver::{Arg, Buffer};
use crate::backend::Shaped;
use std::sync::{Arc, OnceLock};

/// A dense row-major matrix whose elements are stored in the backend's dtype.
#[derive(Default)]
pub struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// None before the first use.
    pub(super) data: Option<Buffer>,
    /// A word that is not 0 if an element is not finite; made when asked for, forgotten when elements change.
    pub(super) nonfinite: OnceLock<Buffer>,
}

impl Matrix {
    pub(super) fn arg(&self) -> Arg {
        self.data.as_ref().into()
    }
}

impl Shaped for Matrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

/// Latents [rows, cols], or a gradient on the support of latents, which share it.
#[derive(Default)]
pub struct Latents {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// None where all values are held.
    pub(super) support: Option<Arc<Support>>,
    /// The entries' values, or all, row-major.
    pub(super) values: Option<Buffer>,
}

/// Which latents are held; see `ptx/latents.cu`.
pub(super) struct Support {
    pub(super) entries: usize,
    /// [rows + 1], then [entries]
    pub(super) starts: Buffer,
    pub(super) columns: Buffer,
    /// [cols + 1], then [entries] twice
    pub(super) col_starts: Buffer,
    pub(super) col_rows: Buffer,
    pub(super) col_entries: Buffer,
}

impl Latents {
    pub(super) fn values(&self) -> Arg {
        self.values.as_ref().into()
    }

    /// `starts` and `columns`, null where all values are held.
    pub(super) fn by_row(&self) -> [Arg; 2] {
        match &self.support {
            Some(support) => [(&support.starts).into(), (&support.columns).into()],
            None => [Arg::NULL; 2],
        }
    }
}

impl Shaped for Latents {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}
