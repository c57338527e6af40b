//! What a device must be able to do: some twenty primitives on matrices. The formulas of the model are made of them, once,
//! in [`crate::autodiff`] and [`crate::CrossCoder`]; a backend adds none of its own.
//!
//! **Layout.** Both weights lie as [d_hidden, width] with `width = n_models · d_in`, in memory as in the original's files
//! (`W_enc` [n_models, d_in, d_hidden] is saved as a transposed view of that). Activations lie as [batch, width]. Columns
//! of one model are neighbours: model `m` has the columns `m·d_in .. (m+1)·d_in`.
//!
//! **Rounding.** Below, `r(…)` rounds to the dtype of the backend, to nearest even, and stands exactly where PyTorch rounds
//! a result of that dtype; sums and products inside one `r` are carried out in float32 (with a fixed order of terms, so
//! that equal inputs give equal bits, with any number of threads). The judge [`Cpu<f64>`](cpu::Cpu) computes in float64
//! and rounds nowhere.
//!
//! **Latents.** After ReLU most latents are zero. [`Backend::Latents`] may therefore hold the *support* alone: the latents
//! that are not zero, with their values. Why that changes nothing is told in [`crate::sparse`]. Gradients of latents live
//! on the support of the latents.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod pick;

use crate::dtype::Dtype;
use crate::error::Result;
use crate::tensor::Values;
use std::ops::Range;

pub use cpu::Cpu;
pub use pick::{Picked, pick};

/// What the host computes in beside a backend: float32, or float64 for the judge.
pub trait Scalar: ndarray::NdFloat + std::iter::Sum + Default {
    /// From float64, rounded to nearest.
    fn narrow(v: f64) -> Self;
    /// To float64, exactly.
    fn wide(self) -> f64;
    /// `v` rounded to `dtype`; the judge's type leaves it.
    fn rounded_to(self, dtype: Dtype) -> Self;
    /// Wraps a vector of this type.
    fn wrap(values: Vec<Self>) -> Values;
    /// The elements in this type; moved, not copied, if they are of it.
    fn from_values(values: Values) -> Vec<Self>;
}

impl Scalar for f32 {
    fn narrow(v: f64) -> Self {
        v as f32
    }
    fn wide(self) -> f64 {
        f64::from(self)
    }
    #[inline]
    fn rounded_to(self, dtype: Dtype) -> Self {
        dtype.round(self)
    }
    fn wrap(values: Vec<Self>) -> Values {
        Values::F32(values)
    }
    fn from_values(values: Values) -> Vec<Self> {
        values.into_f32()
    }
}

impl Scalar for f64 {
    fn narrow(v: f64) -> Self {
        v
    }
    fn wide(self) -> f64 {
        self
    }
    #[inline]
    fn rounded_to(self, _: Dtype) -> Self {
        self
    }
    fn wrap(values: Vec<Self>) -> Values {
        Values::F64(values)
    }
    fn from_values(values: Values) -> Vec<Self> {
        match values {
            Values::F64(v) => v,
            other => other.to_f64(),
        }
    }
}

/// A two-dimensional array on a backend.
pub trait Shaped {
    /// Rows and columns.
    fn shape(&self) -> (usize, usize);
}

/// Latents on the host, without the zeros: row `b` has the entries `starts[b]..starts[b + 1]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Support<S> {
    /// [rows + 1]
    pub starts: Vec<usize>,
    /// The latent of each entry, ascending in a row.
    pub columns: Vec<u32>,
    /// The value of each entry.
    pub values: Vec<S>,
}

/// Whether an operation replaces its output or adds to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// `out = r(value)`
    Set,
    /// `out = r(out + r(value))`, as PyTorch accumulates a gradient
    Add,
}

/// In what precision a reduction works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Each elementwise step and the sum round to the dtype.
    Dtype,
    /// The operands are cast to float32 first, as the original's `.float()` does; nothing rounds to the dtype.
    F32,
}

/// A device. Shapes are given as [rows, columns]; an output is resized to its shape and keeps its memory between calls.
///
/// Every method may fail on a device that can (out of memory, lost); on the CPU none does. Shapes are the caller's duty:
/// [`crate::CrossCoder`] checks them, a mismatch here is a bug and panics.
pub trait Backend: Clone + Send + Sync {
    /// What the host computes in: float32 but for the judge.
    type Scalar: Scalar;
    /// A dense matrix on the device.
    type Matrix: Shaped + Default + Send + Sync;
    /// Latents [batch, d_hidden], or a gradient on their support.
    type Latents: Shaped + Default + Send + Sync;

    /// Whether the host is idle while this computes, so that it pays to [`Self::fill`] the next batch meanwhile.
    const AHEAD: bool = false;

    /// The type that `r` rounds to, and in which parameters are stored.
    fn dtype(&self) -> Dtype;

    /// `r(v)` for a number on the host.
    fn round(&self, v: Self::Scalar) -> Self::Scalar {
        v.rounded_to(self.dtype())
    }

    /// Moves parameters to the device: `rows · cols` values in row-major order, rounded to the dtype. Values that are in the
    /// dtype already are moved, not copied, where the device is the host.
    fn upload(&self, rows: usize, cols: usize, values: Values) -> Result<Self::Matrix>;

    /// `out = r(values)`, `values` [rows, cols] row-major: activations. Original: `x.to(self.dtype)`.
    fn fill(&self, rows: usize, cols: usize, values: &[Self::Scalar], out: &mut Self::Matrix) -> Result<()>;

    /// Copies the elements from row-major position `at` on into `out`.
    fn download(&self, m: &Self::Matrix, at: usize, out: &mut [Self::Scalar]) -> Result<()>;

    /// `out = r(r(x · wᵀ) + b)`. x [batch, width], w [d_hidden, width], b [1, d_hidden] → [batch, d_hidden].
    fn linear(&self, x: &Self::Matrix, w: &Self::Matrix, b: &Self::Matrix, out: &mut Self::Matrix) -> Result<()>;

    /// `out = relu(linear(x, w, b))`, where `relu(nan) = nan`. Shapes as [`Backend::linear`].
    fn encode(&self, x: &Self::Matrix, w: &Self::Matrix, b: &Self::Matrix, out: &mut Self::Latents) -> Result<()>;

    /// Latents from a dense [batch, d_hidden]: everything but zeros is support.
    fn to_latents(&self, dense: &Self::Matrix, out: &mut Self::Latents) -> Result<()>;

    /// Latents as a dense [batch, d_hidden].
    fn to_dense(&self, latents: &Self::Latents, out: &mut Self::Matrix) -> Result<()>;

    /// The support of latents on the host: everything but zeros, nan included. Sparse backends need no dense copy.
    fn support(&self, latents: &Self::Latents) -> Result<Support<Self::Scalar>> {
        let (rows, cols) = latents.shape();
        let mut dense = Self::Matrix::default();
        self.to_dense(latents, &mut dense)?;
        let mut out = Support { starts: vec![0], ..Support::default() };
        let mut row = vec![Self::Scalar::default(); cols];
        for b in 0..rows {
            self.download(&dense, b * cols, &mut row)?;
            for (h, &v) in row.iter().enumerate().filter(|(_, v)| **v != Self::Scalar::default()) {
                out.columns.push(h as u32);
                out.values.push(v);
            }
            out.starts.push(out.columns.len());
        }
        Ok(out)
    }

    /// Sets `acts[b,h]` to 0 where `r(acts[b,h] · factors[h]) <= threshold`; nan stays. acts [batch, d_hidden].
    ///
    /// By default the latents go through the host and are rounded to the dtype, which they are in already.
    fn keep_above(&self, acts: &mut Self::Latents, factors: &[Self::Scalar], threshold: Self::Scalar) -> Result<()> {
        let (rows, cols) = acts.shape();
        let mut dense = Self::Matrix::default();
        self.to_dense(acts, &mut dense)?;
        let mut values = vec![Self::Scalar::default(); rows * cols];
        self.download(&dense, 0, &mut values)?;
        cut(&mut values, factors, |v| self.round(v) <= threshold);
        self.fill(rows, cols, &values, &mut dense)?;
        self.to_latents(&dense, acts)
    }

    /// Copies latents to the host, dense, row-major [batch, d_hidden].
    fn download_latents(&self, latents: &Self::Latents, out: &mut [Self::Scalar]) -> Result<()> {
        let mut dense = Self::Matrix::default();
        self.to_dense(latents, &mut dense)?;
        self.download(&dense, 0, out)
    }

    /// `out = r(r(acts · w) + b)`. acts [batch, d_hidden], w [d_hidden, width], b [1, width] → [batch, width].
    fn decode(&self, acts: &Self::Latents, w: &Self::Matrix, b: &Self::Matrix, out: &mut Self::Matrix) -> Result<()>;

    /// The gradient of latents through a product with `w`, and through the relu they came out of: `r(d · wᵀ)` where
    /// `acts > 0` (or nan), nothing elsewhere. d [batch, width], w [d_hidden, width] → on the support of acts.
    fn latents_grad(
        &self,
        d: &Self::Matrix,
        w: &Self::Matrix,
        acts: &Self::Latents,
        write: Write,
        out: &mut Self::Latents,
    ) -> Result<()>;

    /// The gradient of a weight: `r(latentsᵀ · y)`. latents [batch, d_hidden], y [batch, width] → [d_hidden, width].
    fn weight_grad(
        &self,
        latents: &Self::Latents,
        y: &Self::Matrix,
        write: Write,
        out: &mut Self::Matrix,
    ) -> Result<()>;

    /// `out[h] = r(Σ_b latents[b,h])` → [1, d_hidden].
    fn latents_column_sums(&self, latents: &Self::Latents, out: &mut Self::Matrix) -> Result<()>;

    /// For each row `r(Σ_h r(acts[b,h] · t[h]))`. t [1, d_hidden].
    fn weighted_sums(&self, acts: &Self::Latents, t: &Self::Matrix) -> Result<Vec<Self::Scalar>>;

    /// The gradients of [`Backend::weighted_sums`] where each row's sum has the gradient `g`:
    /// `d_acts[b,h] = r(g · t[h])` on the support, `d_t[h] = r(Σ_b r(g · acts[b,h]))`.
    fn weighted_sums_grad(
        &self,
        acts: &Self::Latents,
        t: &Self::Matrix,
        g: Self::Scalar,
        d_acts: &mut Self::Latents,
        d_t: &mut Self::Matrix,
    ) -> Result<()>;

    /// For each row the number of latents above zero; nan is not.
    fn active_counts(&self, acts: &Self::Latents) -> Result<Vec<Self::Scalar>>;

    /// `out[k] = r(Σ_b m[b,k])` → [1, cols].
    fn column_sums(&self, m: &Self::Matrix, out: &mut Self::Matrix) -> Result<()>;

    /// `out[k] = r((Σ_b m[b,k]) / rows)` → [1, cols].
    fn column_means(&self, m: &Self::Matrix, out: &mut Self::Matrix) -> Result<()>;

    /// For each row of `a` the sum over the columns `cols` of `(a - b)²`; `b` has the shape of `a`, or one row for all.
    /// In [`Precision::Dtype`]: `r(Σ r(r(a - b)²))`.
    fn squared_distances(
        &self,
        a: &Self::Matrix,
        b: &Self::Matrix,
        cols: Range<usize>,
        precision: Precision,
    ) -> Result<Vec<Self::Scalar>>;

    /// The gradient of [`Backend::squared_distances`] in [`Precision::F32`] with respect to `a`, where each row's sum has the
    /// gradient `g`: `out = r(g · (2 · (a - b)))`, both of one shape.
    fn squared_distances_grad(
        &self,
        a: &Self::Matrix,
        b: &Self::Matrix,
        g: Self::Scalar,
        out: &mut Self::Matrix,
    ) -> Result<()>;

    /// The norms of `groups` equal parts of each row: `out[h,m] = r(√(Σ_d w[h,m,d]²))` → [rows, groups].
    fn group_norms(&self, w: &Self::Matrix, groups: usize, out: &mut Self::Matrix) -> Result<()>;

    /// `out[i] = r(Σ_j m[i,j])` → [1, rows].
    fn row_sums(&self, m: &Self::Matrix, out: &mut Self::Matrix) -> Result<()>;

    /// The gradient of a row's sum of [`Backend::group_norms`] `n`, `d_t` [1, rows] being the sums' gradient:
    /// `r(r(w[h,m,d] / n[h,m]) · d_t[h])`, and 0 where `n[h,m]` is 0. → the shape of `w`.
    fn group_norms_grad(
        &self,
        w: &Self::Matrix,
        norms: &Self::Matrix,
        d_t: &Self::Matrix,
        write: Write,
        out: &mut Self::Matrix,
    ) -> Result<()>;

    /// The gradient of the decoder through the norms of its rows and through the reconstruction: `group_norms_grad` set, then
    /// `weight_grad` added. For backends that do both in one pass over memory.
    fn decoder_grad(
        &self,
        acts: &Self::Latents,
        d_rec: &Self::Matrix,
        w: &Self::Matrix,
        norms: &Self::Matrix,
        d_t: &Self::Matrix,
        out: &mut Self::Matrix,
    ) -> Result<()> {
        self.group_norms_grad(w, norms, d_t, Write::Set, out)?;
        self.weight_grad(acts, d_rec, Write::Add, out)
    }

    /// `r(√(Σ m²))` over all elements.
    fn norm(&self, m: &Self::Matrix) -> Result<Self::Scalar>;

    /// One step of Adam on a parameter `p` with gradient `g` and moments `m`, `v`, all of one shape. With [`AdamStep`]'s names:
    ///
    /// ```text
    /// g' = r(clip · g)
    /// m  = r(m + (1 - beta1) · (g' - m)), or where 1 - beta1 ≥ 1/2, as in `lerp_`, r(g' + ((1 - beta1) - 1) · (g' - m))
    /// v  = r(r(beta2 · v) + (1 - beta2) · g' · g')
    /// p  = r(p - step_size · m / r(r(r(√v) / bias_correction2_sqrt) + eps))
    /// ```
    ///
    /// Original: `torch.optim.Adam` without weight decay, after `clip_grad_norm_`'s product with its coefficient.
    fn adam(
        &self,
        p: &mut Self::Matrix,
        g: &Self::Matrix,
        m: &mut Self::Matrix,
        v: &mut Self::Matrix,
        step: &AdamStep<Self::Scalar>,
    ) -> Result<()>;
}

/// Sets each value to 0 that `low` says is low once it is multiplied with its column's factor.
fn cut<S: Scalar>(values: &mut [S], factors: &[S], low: impl Fn(S) -> bool) {
    for row in values.chunks_exact_mut(factors.len().max(1)) {
        for (v, &factor) in row.iter_mut().zip(factors) {
            if low(*v * factor) {
                *v = S::default();
            }
        }
    }
}

/// The numbers of one step of [`Backend::adam`], the same for all parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep<S> {
    /// What `clip_grad_norm_` multiplies gradients with; 1 if the norm is small enough.
    pub clip: S,
    /// `1 - beta1`, formed in float64.
    pub one_minus_beta1: S,
    /// `beta2`
    pub beta2: S,
    /// `1 - beta2`, formed in float64.
    pub one_minus_beta2: S,
    /// `lr / (1 - beta1^step)`, formed in float64.
    pub step_size: S,
    /// `√(1 - beta2^step)`, formed in float64.
    pub bias_correction2_sqrt: S,
    /// 1e-8 by default, rounded to the dtype. In float16 it is 0, as in PyTorch: there a gradient of 0 makes a parameter nan.
    pub eps: S,
}
