//! A tensor on the host: shape, dtype, values, and the order its values lie in.
//!
//! Values lie densely, each element once, in an order that a permutation of the dimensions describes. That is all a
//! crosscoder needs (`W_enc` lies transposed in files and stays so in memory, uncopied); general views with holes or
//! overlaps exist in files only and are gathered when read.

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
use crate::error::{Error, ErrorKind, Result};
use half::{bf16, f16};
use zerocopy::{FromZeros, IntoBytes};

/// Bytes are handed out in pieces of at most this size.
const PIECE_BYTES: usize = 64 << 10;

/// A Rust type that is the element of a [`Values`] variant, and its little-endian bytes.
pub trait Element: Copy + Default + PartialEq + Send + Sync + 'static {
    /// The dtype this type holds.
    const DTYPE: Dtype;
    /// Wraps a vector.
    fn wrap(values: Vec<Self>) -> Values;
    /// The vector, if the variant is this type's.
    fn unwrap(values: &Values) -> Option<&[Self]>;
}

macro_rules! values {
    ($($variant:ident $ty:ty, $size:literal, $to_f64:expr, $from:expr, $to:expr;)*) => {
        /// The elements of a tensor, in the order they lie in memory.
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub enum Values {
            $(
                #[doc = concat!("Elements of type `", stringify!($ty), "`.")]
                $variant(Vec<$ty>),
            )*
        }

        $(impl Element for $ty {
            const DTYPE: Dtype = Dtype::$variant;
            fn wrap(values: Vec<Self>) -> Values {
                Values::$variant(values)
            }
            fn unwrap(values: &Values) -> Option<&[Self]> {
                match values {
                    Values::$variant(v) => Some(v),
                    _ => None,
                }
            }
        })*

        impl Values {
            /// No elements yet, room for `capacity`.
            pub fn with_capacity(dtype: Dtype, capacity: usize) -> Self {
                match dtype {
                    $(Dtype::$variant => Values::$variant(Vec::with_capacity(capacity)),)*
                }
            }

            /// No elements yet, room for exactly `capacity`, in one allocation.
            ///
            /// # Errors
            /// There is not enough memory.
            pub fn try_with_capacity(dtype: Dtype, capacity: usize) -> Result<Self> {
                let refuse = |e: std::collections::TryReserveError| {
                    Error::new(ErrorKind::Io, format!("no memory for {capacity} elements of {dtype}")).with_source(e)
                };
                match dtype {
                    $(Dtype::$variant => {
                        let mut values = Vec::new();
                        values.try_reserve_exact(capacity).map_err(refuse)?;
                        Ok(Values::$variant(values))
                    })*
                }
            }

            /// `count` zeros, in memory that the system has not touched yet.
            ///
            /// # Errors
            /// There is not enough memory.
            pub fn try_zeroed(dtype: Dtype, count: usize) -> Result<Self> {
                let refuse =
                    |_| Error::new(ErrorKind::Io, format!("no memory for {count} elements of {dtype}"));
                match dtype {
                    $(Dtype::$variant => {
                        Ok(Values::$variant(<$ty>::new_vec_zeroed(count).map_err(refuse)?))
                    })*
                }
            }

            /// The elements' type.
            pub fn dtype(&self) -> Dtype {
                match self {
                    $(Values::$variant(_) => Dtype::$variant,)*
                }
            }

            /// The number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Values::$variant(v) => v.len(),)*
                }
            }

            /// Appends the elements that `bytes` holds, little-endian; bytes beyond the last whole element are ignored.
            /// A bool is true where its byte is not 0.
            pub fn push_le_bytes(&mut self, bytes: &[u8]) {
                match self {
                    $(Values::$variant(v) => {
                        let (elements, _) = bytes.as_chunks::<$size>();
                        v.extend(elements.iter().map(|&b| ($from)(b)));
                    })*
                }
            }

            /// Appends the bytes of `count` elements from position `at`, little-endian, to `out`; fewer at the end.
            pub fn le_bytes(&self, at: usize, count: usize, out: &mut Vec<u8>) {
                match self {
                    $(Values::$variant(v) => {
                        let slice = v.get(at..).unwrap_or_default();
                        let slice = slice.get(..count).unwrap_or(slice);
                        out.extend(slice.iter().flat_map(|&e| ($to)(e)));
                    })*
                }
            }

            /// Appends the bytes of the elements at these positions, little-endian, to `out`.
            ///
            /// # Panics
            /// If a position lies outside.
            #[allow(clippy::indexing_slicing)] // As documented; a reader has compared the last position with its storage.
            pub fn gather_le_bytes(&self, positions: impl Iterator<Item = usize>, out: &mut Vec<u8>) {
                match self {
                    $(Values::$variant(v) => positions.for_each(|at| out.extend(($to)(v[at]))),)*
                }
            }

            /// The elements at these positions, in that order.
            ///
            /// # Panics
            /// If a position lies outside.
            #[allow(clippy::indexing_slicing)] // As above.
            pub fn gather(&self, positions: impl Iterator<Item = usize>) -> Self {
                match self {
                    $(Values::$variant(v) => Values::$variant(positions.map(|at| v[at]).collect()),)*
                }
            }

            /// The elements' memory.
            fn memory(&self) -> &[u8] {
                match self {
                    $(Values::$variant(v) => v.as_bytes(),)*
                }
            }

            /// The element at `at` as a number; integers beyond 2^53 round.
            pub fn get_f64(&self, at: usize) -> Option<f64> {
                match self {
                    $(Values::$variant(v) => v.get(at).map(|&e| ($to_f64)(e)),)*
                }
            }
        }
    };
}

values! {
    F64 f64, 8, |e: f64| e, f64::from_le_bytes, f64::to_le_bytes;
    F32 f32, 4, f64::from, f32::from_le_bytes, f32::to_le_bytes;
    F16 f16, 2, f16::to_f64, f16::from_le_bytes, f16::to_le_bytes;
    BF16 bf16, 2, bf16::to_f64, bf16::from_le_bytes, bf16::to_le_bytes;
    I64 i64, 8, |e: i64| e as f64, i64::from_le_bytes, i64::to_le_bytes;
    I32 i32, 4, f64::from, i32::from_le_bytes, i32::to_le_bytes;
    I16 i16, 2, f64::from, i16::from_le_bytes, i16::to_le_bytes;
    I8 i8, 1, f64::from, i8::from_le_bytes, i8::to_le_bytes;
    U8 u8, 1, f64::from, u8::from_le_bytes, u8::to_le_bytes;
    Bool bool, 1, |e: bool| f64::from(u8::from(e)), |b: [u8; 1]| b[0] != 0, |e: bool| [u8::from(e)];
}

impl Values {
    /// Hands the elements' little-endian bytes to `sink`, piece by piece.
    ///
    /// # Errors
    /// Those of `sink`.
    pub fn each_le_bytes<E>(&self, mut sink: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        if cfg!(target_endian = "little") {
            return self.memory().chunks(PIECE_BYTES).try_for_each(sink);
        }
        let mut bytes = Vec::with_capacity(PIECE_BYTES);
        let piece = piece_elements(self.dtype());
        for at in (0..self.len()).step_by(piece) {
            bytes.clear();
            self.le_bytes(at, piece, &mut bytes);
            sink(&bytes)?;
        }
        Ok(())
    }

    /// The elements' memory, to be written, where that is their little-endian bytes. Not of bools: not every byte is one.
    pub(crate) fn as_mut_le_bytes(&mut self) -> Option<&mut [u8]> {
        if cfg!(target_endian = "big") {
            return None;
        }
        match self {
            Values::F64(v) => Some(v.as_mut_bytes()),
            Values::F32(v) => Some(v.as_mut_bytes()),
            Values::F16(v) => Some(v.as_mut_bytes()),
            Values::BF16(v) => Some(v.as_mut_bytes()),
            Values::I64(v) => Some(v.as_mut_bytes()),
            Values::I32(v) => Some(v.as_mut_bytes()),
            Values::I16(v) => Some(v.as_mut_bytes()),
            Values::I8(v) => Some(v.as_mut_bytes()),
            Values::U8(v) => Some(v.as_mut_bytes()),
            Values::Bool(_) => None,
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as float32, each rounded to nearest even; moved, not copied, if they are float32 already.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Values::F32(v) => v,
            Values::F16(v) => v.into_iter().map(f16::to_f32).collect(),
            Values::BF16(v) => v.into_iter().map(bf16::to_f32).collect(),
            other => (0..other.len()).filter_map(|i| other.get_f64(i)).map(|e| e as f32).collect(),
        }
    }

    /// The elements as float64.
    pub fn to_f64(&self) -> Vec<f64> {
        (0..self.len()).filter_map(|i| self.get_f64(i)).collect()
    }

    /// The elements in a float type, rounded to nearest even, float64 to half precision by way of float32, as PyTorch does; moved,
    /// not copied, if they are of that type already.
    ///
    /// # Errors
    /// An integer type.
    pub fn cast(self, dtype: Dtype) -> Result<Self> {
        if self.dtype() == dtype {
            return Ok(self);
        }
        match dtype {
            Dtype::F64 => Ok(Values::F64(self.to_f64())),
            Dtype::F32 => Ok(Values::F32(self.into_f32())),
            // `f16::from_f64` and `bf16::from_f64` truncate first; through f32 is how PyTorch casts float64.
            Dtype::F16 => Ok(Values::F16(self.into_f32().into_iter().map(f16::from_f32).collect())),
            Dtype::BF16 => Ok(Values::BF16(self.into_f32().into_iter().map(bf16::from_f32).collect())),
            _ => Err(Error::unsupported(format!("cast to {dtype}: only float types can be cast to"))),
        }
    }
}

/// NumPy and PyTorch have no more dimensions.
pub(crate) const MAX_DIMS: usize = 64;

/// The elements of a piece. No size is 0.
fn piece_elements(dtype: Dtype) -> usize {
    PIECE_BYTES.checked_div(dtype.size_bytes()).unwrap_or(PIECE_BYTES)
}

/// The number of elements of a shape, or none if it passes `usize`.
pub fn element_count(shape: &[usize]) -> Option<usize> {
    // A zero anywhere makes the tensor empty, however large the other sizes are.
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size))
}

/// The strides of a tensor that lies in row-major order, in elements, as PyTorch counts them (a size of 0 counts as 1).
pub fn row_major_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    let mut next = 1usize;
    for (stride, &size) in strides.iter_mut().zip(shape).rev() {
        *stride = next;
        next = next.saturating_mul(size.max(1));
    }
    strides
}

/// A tensor on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    strides: Vec<usize>,
    values: Values,
}

impl Tensor {
    /// A tensor whose `values` lie in row-major order.
    ///
    /// # Errors
    /// If the shape does not have as many elements as there are values.
    pub fn new(shape: Vec<usize>, values: Values) -> Result<Self> {
        let strides = row_major_strides(&shape);
        Self::with_strides(shape, strides, values)
    }

    /// A tensor whose element `[i, j, …]` is `values[i·strides[0] + j·strides[1] + …]`.
    ///
    /// # Errors
    /// If the shape does not have as many elements as there are values, or the strides do not visit each value exactly
    /// once.
    pub fn with_strides(shape: Vec<usize>, strides: Vec<usize>, values: Values) -> Result<Self> {
        if element_count(&shape) != Some(values.len()) {
            return Err(Error::shape(format!("{} values cannot have the shape {shape:?}", values.len())));
        }
        if !is_dense(&shape, &strides) {
            return Err(Error::shape(format!("strides {strides:?} do not lay the shape {shape:?} out densely")));
        }
        Ok(Tensor { shape, strides, values })
    }

    /// The sizes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The distance of neighbours in each dimension, in elements of [`Self::values`].
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// The elements' type.
    pub fn dtype(&self) -> Dtype {
        self.values.dtype()
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The elements in the order they lie in memory; row-major only if [`Self::is_row_major`].
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// The elements in the order they lie in memory, without a copy.
    pub fn into_values(self) -> Values {
        self.values
    }

    /// The elements in `dtype`, rounded to nearest even, in the order they lie in.
    ///
    /// # Errors
    /// Integers.
    pub fn cast(self, dtype: Dtype) -> Result<Self> {
        if !matches!(self.dtype(), Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::unsupported(format!("cast from {} to {dtype}: only floats are cast", self.dtype())));
        }
        let Tensor { shape, strides, values } = self;
        Tensor::with_strides(shape, strides, values.cast(dtype)?)
    }

    /// Whether the elements lie in row-major order.
    pub fn is_row_major(&self) -> bool {
        let row_major = row_major_strides(&self.shape);
        let mut dims = self.shape.iter().zip(&self.strides).zip(&row_major);
        self.is_empty() || dims.all(|((&size, stride), needed)| size == 1 || stride == needed)
    }

    /// The same tensor lying in row-major order; a copy only if it does not already.
    pub fn into_row_major(self) -> Self {
        if self.is_row_major() {
            let strides = row_major_strides(&self.shape);
            return Tensor { strides, ..self };
        }
        let values = self.values.gather(Positions::new(&self.shape, &self.strides));
        Tensor { strides: row_major_strides(&self.shape), values, shape: self.shape }
    }

    /// The same elements with the dimensions reordered: dimension `i` of the result is dimension `axes[i]` of this one.
    /// Nothing is copied.
    ///
    /// # Panics
    /// If `axes` is not a permutation of the dimensions.
    #[allow(clippy::indexing_slicing)] // As documented: `axes` comes from code, never from a file.
    pub fn permuted(self, axes: &[usize]) -> Self {
        let mut seen = axes.to_vec();
        seen.sort_unstable();
        assert!(
            seen.iter().copied().eq(0..self.shape.len()),
            "{axes:?} does not permute {} dimensions",
            self.shape.len()
        );
        Tensor {
            shape: axes.iter().map(|&a| self.shape[a]).collect(),
            strides: axes.iter().map(|&a| self.strides[a]).collect(),
            values: self.values,
        }
    }

    /// The elements in row-major order as float64.
    pub fn to_f64_vec(&self) -> Vec<f64> {
        if self.is_row_major() {
            return self.values.to_f64();
        }
        Positions::new(&self.shape, &self.strides).filter_map(|at| self.values.get_f64(at)).collect()
    }

    /// Hands the elements' little-endian bytes in row-major order to `sink`, piece by piece.
    ///
    /// # Errors
    /// The first error of `sink`.
    pub fn row_major_le_bytes<E>(&self, mut sink: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        if self.is_row_major() {
            return self.values.each_le_bytes(sink);
        }
        let mut bytes = Vec::with_capacity(PIECE_BYTES);
        let mut positions = Positions::new(&self.shape, &self.strides);
        loop {
            bytes.clear();
            self.values.gather_le_bytes(positions.by_ref().take(piece_elements(self.dtype())), &mut bytes);
            if bytes.is_empty() {
                return Ok(());
            }
            sink(&bytes)?;
        }
    }
}

/// Whether strides visit each of the shape's elements exactly once, with no holes: some order of the dimensions makes
/// them row-major strides.
pub fn is_dense(shape: &[usize], strides: &[usize]) -> bool {
    if shape.len() != strides.len() {
        return false;
    }
    if shape.contains(&0) {
        return true;
    }
    let mut dims: Vec<(usize, usize)> =
        strides.iter().copied().zip(shape.iter().copied()).filter(|d| d.1 != 1).collect();
    dims.sort_unstable();
    let mut expected = Some(1usize);
    dims.iter().all(|&(stride, size)| {
        let fits = expected == Some(stride);
        expected = expected.and_then(|e| e.checked_mul(size));
        fits
    })
}

/// The positions of a strided tensor's elements, in row-major order of its indices.
#[derive(Clone, Debug)]
pub struct Positions<'a> {
    shape: &'a [usize],
    strides: &'a [usize],
    index: Vec<usize>,
    at: usize,
    left: usize,
}

impl<'a> Positions<'a> {
    /// Starts at element `[0, 0, …]`, position 0. The caller has checked that the last position fits a `usize`.
    ///
    /// # Panics
    /// If shape and strides differ in length or the shape has more elements than `usize` counts.
    #[allow(clippy::expect_used)] // As documented; a reader has counted the elements.
    pub fn new(shape: &'a [usize], strides: &'a [usize]) -> Self {
        assert_eq!(shape.len(), strides.len(), "as many strides as sizes");
        let left = element_count(shape).expect("the caller has counted the elements");
        Positions { shape, strides, index: vec![0; shape.len()], at: 0, left }
    }
}

impl Iterator for Positions<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        let at = self.at;
        for ((index, &size), &stride) in self.index.iter_mut().zip(self.shape).zip(self.strides).rev() {
            let next = index.saturating_add(1);
            if next < size {
                *index = next;
                self.at = self.at.saturating_add(stride);
                break;
            }
            // Back to the dimension's first: `index` is its last.
            self.at = self.at.saturating_sub(stride.saturating_mul(*index));
            *index = 0;
        }
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_order_the_elements() {
        // [2, 3, 5] lying as [5, 2, 3], as W_enc does.
        let lying: Vec<f32> = (0..30).map(|i| i as f32).collect();
        let tensor = Tensor::with_strides(vec![2, 3, 5], vec![3, 1, 6], Values::F32(lying)).unwrap();
        let row_major = tensor.to_f64_vec();
        for m in 0..2 {
            for d in 0..3 {
                for h in 0..5 {
                    assert_eq!(row_major[(m * 3 + d) * 5 + h], ((h * 2 + m) * 3 + d) as f64);
                }
            }
        }
        let mut bytes = Vec::new();
        tensor
            .row_major_le_bytes(|b| {
                bytes.extend_from_slice(b);
                Ok::<_, ()>(())
            })
            .unwrap();
        let copy = tensor.clone().into_row_major();
        let mut again = Vec::new();
        copy.row_major_le_bytes(|b| {
            again.extend_from_slice(b);
            Ok::<_, ()>(())
        })
        .unwrap();
        assert_eq!(bytes, again);
        assert_eq!(copy.strides(), [15, 5, 1]);
        assert_eq!(tensor.permuted(&[2, 0, 1]).strides(), [6, 3, 1]);
    }

    #[test]
    fn dense_means_each_value_once() {
        assert!(is_dense(&[2, 3, 5], &[3, 1, 6]));
        assert!(is_dense(&[], &[]));
        assert!(is_dense(&[1, 4], &[77, 1]));
        assert!(is_dense(&[0, 4], &[0, 9]));
        assert!(!is_dense(&[2, 3], &[1, 1]));
        assert!(!is_dense(&[2, 3], &[4, 1]));
        assert!(!is_dense(&[4], &[0]));
        assert!(!is_dense(&[4], &[1, 1]));
    }

    #[test]
    fn bytes_round_trip_in_every_dtype() {
        for dtype in Dtype::ALL {
            let mut values = Values::with_capacity(dtype, 4);
            let bytes: Vec<u8> = (0..4 * dtype.size_bytes()).map(|i| u8::from(i % 3 == 0)).collect();
            values.push_le_bytes(&bytes);
            assert_eq!((values.len(), values.dtype()), (4, dtype));
            let mut out = Vec::new();
            values.le_bytes(0, 99, &mut out);
            assert_eq!(out, bytes, "{dtype}");
            out.clear();
            values.le_bytes(3, 1, &mut out);
            assert_eq!(out, bytes[3 * dtype.size_bytes()..]);
        }
    }

    #[test]
    fn an_empty_shape_may_have_huge_other_sizes() {
        assert_eq!(element_count(&[usize::MAX, 0, usize::MAX]), Some(0));
        assert_eq!(element_count(&[usize::MAX, 2]), None);
        assert_eq!(element_count(&[]), Some(1));
    }
}
