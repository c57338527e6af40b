//! Matrices and latents in the host's memory.

use super::Cpu;
use super::kernels::{self, Level, Side, Source};
use super::sketch::Sketch;
use crate::backend::{Scalar, Shaped};
use crate::dtype::Dtype;
use crate::tensor::Values;
use half::{bf16, f16};
use std::ops::Range;
use std::slice::ChunksMut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// A dense row-major matrix. Parameters in float16 and bfloat16 are stored in these types; everything else is stored in
/// `T`, its values rounded to the dtype. The gradient of a weight may be kept as the sparse product that it is.
#[derive(Clone, Debug, Default)]
pub struct Matrix<T> {
    pub(super) rows: usize,
    pub(super) cols: usize,
    store: Store<T>,
    /// Whether all elements are finite, and their norm before it is rounded: computed when asked for, or by the way;
    /// forgotten when elements change.
    finite: OnceLock<bool>,
    norm: OnceLock<f64>,
    sketch: Sketched<T>,
}

/// A sketch, made when the same elements are screened for few rows again and again.
#[derive(Debug)]
struct Sketched<T> {
    wishes: AtomicU8,
    sketch: OnceLock<Sketch<T>>,
}

impl<T> Default for Sketched<T> {
    fn default() -> Self {
        Sketched { wishes: AtomicU8::new(0), sketch: OnceLock::new() }
    }
}

impl<T> Clone for Sketched<T> {
    /// A copy begins without.
    fn clone(&self) -> Self {
        Sketched::default()
    }
}

/// So many times the elements themselves are read before a sketch of them is made, which takes about as long as twice more.
const WISHES: u8 = 2;

#[derive(Clone, Debug)]
enum Store<T> {
    Full(Vec<T>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    Pending(Pending<T>),
}

/// `latentsᵀ · y` by its factors: some 20 MB where the product has 300. Rows are computed each time they are read, which is
/// as fast as reading them from memory, there being few terms.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending<T> {
    /// Row h of the product has the terms `starts[h]..starts[h + 1]`.
    pub(super) starts: Vec<usize>,
    /// The row of y of each term.
    pub(super) terms: Vec<u32>,
    /// What it is multiplied with.
    pub(super) factors: Vec<T>,
    pub(super) y: Vec<T>,
    /// What each element is rounded to.
    pub(super) dtype: Option<Dtype>,
}

impl<T: Scalar> Pending<T> {
    /// Row `h` of the product, rounded.
    pub(super) fn row(&self, level: Level, h: usize, out: &mut [T]) {
        let terms = self.starts[h]..self.starts[h + 1];
        kernels::gather_rows(level, out, &self.y, &self.terms[terms.clone()], &self.factors[terms]);
        if let Some(dtype @ (Dtype::F16 | Dtype::BF16)) = self.dtype {
            kernels::round(level, out, dtype);
        }
    }
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Store::Full(Vec::new())
    }
}

impl<T> Shaped for Matrix<T> {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

impl<T: Scalar> Matrix<T> {
    /// Values in `dtype`, moved where the store can hold them as they are.
    pub(super) fn from_values(rows: usize, cols: usize, values: Values, dtype: Dtype) -> Self {
        assert_eq!(values.len(), rows * cols, "as many values as the shape has");
        let judge = T::narrow(1.0 + 2f64.powi(-40)).wide() != 1.0; // T is float64
        let store = match (values, dtype) {
            (Values::F16(v), Dtype::F16) if !judge => Store::F16(v),
            (Values::BF16(v), Dtype::BF16) if !judge => Store::BF16(v),
            // What enters is cast to the dtype first, in the judge too: it judges from the same stored values.
            (values, dtype) if values.dtype() != dtype => {
                let cast = values.cast(dtype).expect("a backend's dtype is a float type");
                return Self::from_values(rows, cols, cast, dtype);
            }
            (values, _) => Store::Full(T::from_values(values)),
        };
        Matrix { rows, cols, store, ..Self::default() }
    }

    /// What was known of the elements is forgotten.
    fn forget(&mut self) {
        (self.finite, self.norm) = Default::default();
        self.sketch = Sketched::default();
    }

    #[cfg(test)]
    pub(super) fn has_sketch(&self) -> bool {
        self.sketch.sketch.get().is_some()
    }

    /// The sketch of these elements, once it was asked for often enough.
    pub(super) fn sketch(&self, cpu: &Cpu<T>) -> Option<&Sketch<T>> {
        let Sketched { wishes, sketch } = &self.sketch;
        if sketch.get().is_none() && wishes.fetch_add(1, Relaxed) < WISHES {
            return None;
        }
        Some(sketch.get_or_init(|| Sketch::new(cpu, self)))
    }

    /// All elements, to be written: resized to [rows, cols], contents unspecified, stored in `T`.
    pub(super) fn overwrite(&mut self, rows: usize, cols: usize) -> &mut [T] {
        (self.rows, self.cols) = (rows, cols);
        if !matches!(self.store, Store::Full(_)) {
            self.store = Store::default();
        }
        self.forget();
        match &mut self.store {
            Store::Full(v) => {
                v.resize(rows * cols, T::zero());
                v
            }
            _ => unreachable!("made full above"),
        }
    }

    /// A product to be written by its factors, [rows, cols].
    pub(super) fn overwrite_pending(&mut self, rows: usize, cols: usize) -> &mut Pending<T> {
        (self.rows, self.cols) = (rows, cols);
        if !matches!(self.store, Store::Pending(_)) {
            self.store = Store::Pending(Pending::default());
        }
        self.forget();
        match &mut self.store {
            Store::Pending(p) => p,
            _ => unreachable!("made pending above"),
        }
    }

    /// All elements, to be added to: a product by its factors is computed.
    pub(super) fn full_mut(&mut self, level: Level) -> &mut [T] {
        if let Store::Pending(pending) = &self.store {
            let mut full = vec![T::zero(); self.rows * self.cols];
            full.chunks_exact_mut(self.cols.max(1)).enumerate().for_each(|(h, row)| pending.row(level, h, row));
            self.store = Store::Full(full);
        }
        self.forget();
        match &mut self.store {
            Store::Full(v) => v,
            _ => panic!("a parameter stored in half precision is changed through pieces()"),
        }
    }

    /// All elements; only for matrices that are stored in `T`: neither half-precision parameters nor products by factors.
    pub(super) fn full(&self) -> &[T] {
        match &self.store {
            Store::Full(v) => v,
            _ => panic!("a parameter stored in half precision is read through rows()"),
        }
    }

    /// All elements as they are stored.
    pub(super) fn source(&self) -> Source<'_, T> {
        match &self.store {
            Store::Full(v) => Source::Full(v),
            Store::F16(v) => Source::F16(v),
            Store::BF16(v) => Source::BF16(v),
            Store::Pending(_) => panic!("a gradient by its factors is read through rows()"),
        }
    }

    /// The rows as one side of a product over the columns.
    pub(super) fn rows_side(&self) -> Side<'_, T> {
        Side { source: self.source(), rows: self.rows, row_stride: self.cols, term_stride: 1 }
    }

    /// The columns as one side of a product over the rows.
    pub(super) fn columns_side(&self) -> Side<'_, T> {
        Side { source: self.source(), rows: self.cols, row_stride: 1, term_stride: self.cols }
    }

    /// The rows `range`, in `T`: borrowed if they are stored so, put into `scratch` otherwise.
    pub(super) fn rows<'a>(&'a self, range: Range<usize>, scratch: &'a mut Vec<T>) -> &'a [T] {
        let elements = range.start * self.cols..range.end * self.cols;
        match &self.store {
            Store::Full(v) => &v[elements],
            Store::Pending(pending) => {
                scratch.clear();
                scratch.resize(elements.len(), T::zero());
                for (h, row) in range.zip(scratch.chunks_exact_mut(self.cols.max(1))) {
                    pending.row(Level::best(), h, row);
                }
                scratch
            }
            _ => self.part(elements, scratch),
        }
    }

    /// The elements `range`, in `T`: borrowed if they are stored so, unpacked into `scratch` otherwise.
    pub(super) fn part<'a>(&'a self, range: Range<usize>, scratch: &'a mut Vec<T>) -> &'a [T] {
        match &self.store {
            Store::Full(v) => &v[range],
            Store::F16(v) => unpack(&v[range], scratch, kernels::widen_f16),
            Store::BF16(v) => unpack(&v[range], scratch, kernels::widen_bf16),
            Store::Pending(_) => panic!("a gradient by its factors is read through rows()"),
        }
    }

    /// Copies elements from row-major position `at` on.
    pub(super) fn read(&self, at: usize, out: &mut [T]) {
        let range = at..at + out.len();
        match &self.store {
            Store::Full(v) => out.copy_from_slice(&v[range]),
            Store::F16(v) => kernels::widen_f16(Level::best(), &v[range], out),
            Store::BF16(v) => kernels::widen_bf16(Level::best(), &v[range], out),
            Store::Pending(pending) => {
                let (mut row, mut done) = (vec![T::zero(); self.cols], 0);
                while done < out.len() {
                    let (h, from) = ((at + done) / self.cols, (at + done) % self.cols);
                    pending.row(Level::best(), h, &mut row);
                    let n = (self.cols - from).min(out.len() - done);
                    out[done..done + n].copy_from_slice(&row[from..from + n]);
                    done += n;
                }
            }
        }
    }

    /// Pieces of `rows` rows each, to be changed in place.
    pub(super) fn pieces(&mut self, rows: usize) -> Pieces<'_, T> {
        self.forget();
        let len = (rows * self.cols).max(1);
        match &mut self.store {
            Store::Full(v) => Pieces::Full(v.chunks_mut(len)),
            Store::F16(v) => Pieces::F16(v.chunks_mut(len)),
            Store::BF16(v) => Pieces::BF16(v.chunks_mut(len)),
            Store::Pending(_) => panic!("a gradient by its factors is not changed in place"),
        }
    }

    /// Whether every element is finite.
    pub(super) fn is_finite(&self) -> bool {
        *self.finite.get_or_init(|| match &self.store {
            Store::Full(v) => kernels::all_finite(Level::best(), v),
            Store::F16(v) => v.iter().all(|e| e.is_finite()),
            Store::BF16(v) => v.iter().all(|e| e.is_finite()),
            Store::Pending(_) => true, // Made of finite factors alone; a sum that overflows is seen by the norm.
        })
    }

    /// Says what is known about the elements just written.
    pub(super) fn set_finite(&mut self, finite: bool) {
        self.finite = finite.into();
    }

    /// The norm if it was computed since the elements changed, else computed by `f`.
    pub(super) fn norm_or(&self, f: impl FnOnce() -> f64) -> f64 {
        *self.norm.get_or_init(f)
    }

    /// See [`Self::set_finite`].
    pub(super) fn set_norm(&mut self, norm: f64) {
        self.norm = norm.into();
    }
}

/// See [`Matrix::pieces`].
pub(super) enum Pieces<'a, T> {
    Full(ChunksMut<'a, T>),
    F16(ChunksMut<'a, f16>),
    BF16(ChunksMut<'a, bf16>),
}

impl<'a, T> Iterator for Pieces<'a, T> {
    type Item = Piece<'a, T>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Pieces::Full(v) => v.next().map(Piece::Full),
            Pieces::F16(v) => v.next().map(Piece::F16),
            Pieces::BF16(v) => v.next().map(Piece::BF16),
        }
    }
}

/// Elements to be changed in place, in whatever type they are stored.
pub(super) enum Piece<'a, T> {
    Full(&'a mut [T]),
    F16(&'a mut [f16]),
    BF16(&'a mut [bf16]),
}

impl<T: Scalar> Piece<'_, T> {
    /// Lets `f` change the elements `range`; what it leaves in half precision must be rounded already.
    pub(super) fn edit(&mut self, range: Range<usize>, scratch: &mut Vec<T>, f: impl FnOnce(&mut [T])) {
        match self {
            Piece::Full(v) => f(&mut v[range]),
            Piece::F16(v) => {
                unpack(&v[range.clone()], scratch, kernels::widen_f16);
                f(scratch);
                kernels::narrow_f16(Level::best(), scratch, &mut v[range]);
            }
            Piece::BF16(v) => {
                unpack(&v[range.clone()], scratch, kernels::widen_bf16);
                f(scratch);
                kernels::narrow_bf16(Level::best(), scratch, &mut v[range]);
            }
        }
    }
}

fn unpack<'a, T: Scalar, E>(packed: &[E], scratch: &'a mut Vec<T>, widen: fn(Level, &[E], &mut [T])) -> &'a mut [T] {
    scratch.resize(packed.len(), T::zero());
    widen(Level::best(), packed, scratch);
    scratch
}

/// Calls `f(i, value)` for each value that is not zero; nan is not. Made for values that are mostly zero: whole vectors of
/// zeros cost one comparison.
pub(super) fn not_zero<T: Scalar>(values: &[T], mut f: impl FnMut(usize, T)) {
    for (i, piece) in values.chunks(16).enumerate() {
        if piece.iter().fold(false, |any, &v| any | (v != T::zero())) {
            for (j, &v) in piece.iter().enumerate().filter(|(_, v)| **v != T::zero()) {
                f(16 * i + j, v);
            }
        }
    }
}

/// Latents [rows, cols], or a gradient on the support of latents.
#[derive(Clone, Debug, Default)]
pub struct Latents<T> {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Whether only the support is held.
    pub(super) sparse: bool,
    /// Sparse: row `b` has the entries `starts[b]..starts[b + 1]`. Dense: empty.
    pub(super) starts: Vec<usize>,
    /// Sparse: the column of each entry, ascending in a row. Dense: empty.
    pub(super) columns: Vec<u32>,
    /// Sparse: the value of each entry. Dense: all of them, row-major.
    pub(super) values: Vec<T>,
    /// Sparse: the same entries by column.
    pub(super) by_column: ByColumn,
    /// Working memory of the encoder.
    pub(super) found: Vec<Found<T>>,
}

/// What the encoder found in a block of columns, by rows.
#[derive(Clone, Debug, Default)]
pub(super) struct Found<T> {
    pub(super) done: bool,
    /// How many in each row.
    pub(super) counts: Vec<u32>,
    pub(super) columns: Vec<u32>,
    pub(super) values: Vec<T>,
    /// What screening leaves to be computed: column in the block, row.
    pub(super) candidates: Vec<(u32, u32)>,
}

/// Entries by column: those of column `h` are `starts[h]..starts[h + 1]`, their rows ascending.
#[derive(Clone, Debug, Default)]
pub(super) struct ByColumn {
    pub(super) starts: Vec<usize>,
    /// The row of each.
    pub(super) rows: Vec<u32>,
    /// Where its value lies among the values by row.
    pub(super) at: Vec<u32>,
}

impl<T> Shaped for Latents<T> {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

impl<T: Scalar> Latents<T> {
    /// No entries in no rows yet, of `cols` columns.
    pub(super) fn begin_sparse(&mut self, cols: usize) {
        (self.rows, self.cols, self.sparse) = (0, cols, true);
        self.starts.clear();
        self.columns.clear();
        self.values.clear();
        self.starts.push(0);
    }

    /// Ends a row: the entries pushed since the last one are its.
    pub(super) fn end_row(&mut self) {
        self.rows += 1;
        self.starts.push(self.columns.len());
    }

    /// Sorts the entries by column, by counting.
    pub(super) fn end_sparse(&mut self) {
        let by = &mut self.by_column;
        by.starts.clear();
        by.starts.resize(self.cols + 1, 0);
        by.rows.resize(self.columns.len(), 0);
        by.at.resize(self.columns.len(), 0);
        // Where each column ends; then, filling from behind, where it begins.
        self.columns.iter().for_each(|&h| by.starts[h as usize] += 1);
        let mut end = 0;
        by.starts.iter_mut().for_each(|s| {
            end += *s;
            *s = end;
        });
        for b in (0..self.rows).rev() {
            for at in (self.starts[b]..self.starts[b + 1]).rev() {
                let next = &mut by.starts[self.columns[at] as usize];
                *next -= 1;
                (by.rows[*next], by.at[*next]) = (b as u32, at as u32);
            }
        }
    }

    /// Keeps of the dense [rows, cols] what is not zero (nan is kept).
    pub(super) fn set_sparse(&mut self, rows: usize, cols: usize, dense: &[T]) {
        self.begin_sparse(cols);
        for row in 0..rows {
            not_zero(&dense[row * cols..(row + 1) * cols], |h, v| {
                self.columns.push(h as u32);
                self.values.push(v);
            });
            self.end_row();
        }
        self.end_sparse();
    }

    /// All values dense, to be written.
    pub(super) fn overwrite_dense(&mut self, rows: usize, cols: usize) -> &mut [T] {
        (self.rows, self.cols, self.sparse) = (rows, cols, false);
        self.starts.clear();
        self.columns.clear();
        self.values.resize(rows * cols, T::zero());
        &mut self.values
    }

    /// Takes the shape and the support of `other`; values unspecified.
    pub(super) fn like(&mut self, other: &Self) -> &mut [T] {
        (self.rows, self.cols, self.sparse) = (other.rows, other.cols, other.sparse);
        self.starts.clone_from(&other.starts);
        self.columns.clone_from(&other.columns);
        self.by_column.starts.clone_from(&other.by_column.starts);
        self.by_column.rows.clone_from(&other.by_column.rows);
        self.by_column.at.clone_from(&other.by_column.at);
        self.values.resize(other.values.len(), T::zero());
        &mut self.values
    }

    /// The entries of row `b`: columns and values. Only if sparse.
    pub(super) fn entries(&self, b: usize) -> impl Iterator<Item = (usize, T)> {
        let range = self.starts[b]..self.starts[b + 1];
        self.columns[range.clone()].iter().zip(&self.values[range]).map(|(&h, &v)| (h as usize, v))
    }

    /// The values of row `b`: the entries', or all where it is dense.
    pub(super) fn row(&self, b: usize) -> &[T] {
        let range = if self.sparse { self.starts[b]..self.starts[b + 1] } else { b * self.cols..(b + 1) * self.cols };
        &self.values[range]
    }

    /// Whether every value that is held is finite.
    pub(super) fn is_finite(&self) -> bool {
        kernels::all_finite(Level::best(), &self.values)
    }
}
