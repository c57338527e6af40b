//! Matrices and latents in the host's memory.

use crate::backend::{Scalar, Shaped};
use crate::dtype::Dtype;
use crate::tensor::Values;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::OnceLock;

/// A dense row-major matrix. Parameters in float16 and bfloat16 are stored in these types; everything else is stored in
/// `T`, its values rounded to the dtype.
#[derive(Clone, Debug, Default)]
pub struct Matrix<T> {
    pub(super) rows: usize,
    pub(super) cols: usize,
    store: Store<T>,
    /// Whether all elements are finite; computed when asked for, forgotten when elements change.
    finite: OnceLock<bool>,
}

#[derive(Clone, Debug)]
enum Store<T> {
    Full(Vec<T>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
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
        Matrix { rows, cols, store, finite: OnceLock::new() }
    }

    /// All elements, to be written: resized to [rows, cols], contents unspecified, stored in `T`.
    pub(super) fn overwrite(&mut self, rows: usize, cols: usize) -> &mut [T] {
        (self.rows, self.cols) = (rows, cols);
        if !matches!(self.store, Store::Full(_)) {
            self.store = Store::default();
        }
        self.finite = OnceLock::new();
        match &mut self.store {
            Store::Full(v) => {
                v.resize(rows * cols, T::zero());
                v
            }
            _ => unreachable!("made full above"),
        }
    }

    /// All elements; only for matrices that are stored in `T`, which are all but half-precision parameters.
    pub(super) fn full(&self) -> &[T] {
        match &self.store {
            Store::Full(v) => v,
            _ => panic!("a parameter stored in half precision is read through rows()"),
        }
    }

    /// The rows `range`, in `T`: borrowed if they are stored so, unpacked into `scratch` otherwise.
    pub(super) fn rows<'a>(&'a self, range: Range<usize>, scratch: &'a mut Vec<T>) -> &'a [T] {
        let range = range.start * self.cols..range.end * self.cols;
        match &self.store {
            Store::Full(v) => &v[range],
            Store::F16(v) => unpack(&v[range], scratch, |e| e.to_f32()),
            Store::BF16(v) => unpack(&v[range], scratch, |e| e.to_f32()),
        }
    }

    /// Copies elements from row-major position `at` on.
    pub(super) fn read(&self, at: usize, out: &mut [T]) {
        let range = at..at + out.len();
        match &self.store {
            Store::Full(v) => out.copy_from_slice(&v[range]),
            Store::F16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, e)| *o = T::narrow(e.to_f64())),
            Store::BF16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, e)| *o = T::narrow(e.to_f64())),
        }
    }

    /// Pieces of `rows` rows each, to be changed in place.
    pub(super) fn row_pieces(&mut self, rows: usize) -> impl Iterator<Item = Piece<'_, T>> {
        self.finite = OnceLock::new();
        let len = (rows * self.cols).max(1);
        let pieces: Vec<Piece<'_, T>> = match &mut self.store {
            Store::Full(v) => v.chunks_mut(len).map(Piece::Full).collect(),
            Store::F16(v) => v.chunks_mut(len).map(Piece::F16).collect(),
            Store::BF16(v) => v.chunks_mut(len).map(Piece::BF16).collect(),
        };
        pieces.into_iter()
    }

    /// Whether every element is finite.
    pub(super) fn is_finite(&self) -> bool {
        *self.finite.get_or_init(|| match &self.store {
            Store::Full(v) => v.iter().all(|e| e.is_finite()),
            Store::F16(v) => v.iter().all(|e| e.is_finite()),
            Store::BF16(v) => v.iter().all(|e| e.is_finite()),
        })
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
                unpack(&v[range.clone()], scratch, |e| e.to_f32());
                f(scratch);
                v[range].iter_mut().zip(scratch).for_each(|(o, e)| *o = f16::from_f32(e.wide() as f32));
            }
            Piece::BF16(v) => {
                unpack(&v[range.clone()], scratch, |e| e.to_f32());
                f(scratch);
                v[range].iter_mut().zip(scratch).for_each(|(o, e)| *o = bf16::from_f32(e.wide() as f32));
            }
        }
    }
}

fn unpack<'a, T: Scalar, E: Copy>(packed: &[E], scratch: &'a mut Vec<T>, f: impl Fn(E) -> f32) -> &'a [T] {
    scratch.clear();
    scratch.extend(packed.iter().map(|&e| T::narrow(f64::from(f(e)))));
    scratch
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
}

impl<T> Shaped for Latents<T> {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

impl<T: Scalar> Latents<T> {
    /// Keeps of the dense [rows, cols] what is not zero (nan is kept).
    pub(super) fn set_sparse(&mut self, rows: usize, cols: usize, dense: &[T]) {
        assert!(u32::try_from(cols).is_ok(), "more than 2^32 latents");
        (self.rows, self.cols, self.sparse) = (rows, cols, true);
        self.starts.clear();
        self.columns.clear();
        self.values.clear();
        self.starts.push(0);
        for row in 0..rows {
            for (h, &v) in dense[row * cols..(row + 1) * cols].iter().enumerate() {
                if v != T::zero() {
                    self.columns.push(h as u32);
                    self.values.push(v);
                }
            }
            self.starts.push(self.columns.len());
        }
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
        self.values.resize(other.values.len(), T::zero());
        &mut self.values
    }

    /// The entries of row `b`: columns and values. Only if sparse.
    pub(super) fn entries(&self, b: usize) -> impl Iterator<Item = (usize, T)> {
        let range = self.starts[b]..self.starts[b + 1];
        self.columns[range.clone()].iter().zip(&self.values[range]).map(|(&h, &v)| (h as usize, v))
    }

    /// Calls `f(h, value)` for each value of row `b` in ascending `h`: the entries, or all where it is dense.
    pub(super) fn for_row(&self, b: usize, mut f: impl FnMut(usize, T)) {
        if self.sparse {
            self.entries(b).for_each(|(h, v)| f(h, v));
        } else {
            self.values[b * self.cols..(b + 1) * self.cols].iter().enumerate().for_each(|(h, &v)| f(h, v));
        }
    }

    /// Whether every value that is held is finite.
    pub(super) fn is_finite(&self) -> bool {
        self.values.iter().all(|v| v.is_finite())
    }
}
