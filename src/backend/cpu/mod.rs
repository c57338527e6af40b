//! The CPU: dense products by `ndarray`, sparse ones by loops over the support.
//!
//! `Cpu<f32>` computes in float32 and rounds to the dtype; `Cpu<f64>` is the same source in float64 and rounds nowhere.

mod matrix;
mod threads;

pub use matrix::{Latents, Matrix};

use super::{AdamStep, Backend, Precision, Scalar, Shaped, Support, Write};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::sparse::Path;
use crate::tensor::Values;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul};
use std::marker::PhantomData;
use std::ops::Range;
use threads::{for_rows, split};

/// Latents are held as a support where at most this share of them is not zero.
const SPARSE_SHARE: f64 = 0.1;

/// Rows of a weight that a dense product unpacks at a time: 256 rows of 4608 float32 are 4.5 MiB.
const WEIGHT_ROWS: usize = 256;

/// Operations on fewer elements than this run on one thread: starting one costs some 20 µs.
const PARALLEL_ELEMENTS: usize = 1 << 16;

/// Elements that Adam updates at a time, unpacked if they are stored in half precision.
const ADAM_ELEMENTS: usize = 4096;

/// The CPU backend; `T` is f32, or f64 for the judge.
#[derive(Clone, Debug)]
pub struct Cpu<T = f32> {
    dtype: Dtype,
    path: Path,
    threads: usize,
    scalar: PhantomData<T>,
}

impl<T: Scalar> Cpu<T> {
    /// A backend that stores and rounds in `dtype`, on all cores.
    ///
    /// # Panics
    /// If `dtype` is not a float type that a crosscoder can have.
    pub fn new(dtype: Dtype) -> Self {
        assert!(dtype.enc_name().is_some(), "a crosscoder cannot have the type {dtype}");
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Cpu { dtype, path: Path::Auto, threads, scalar: PhantomData }
    }

    /// The same backend, holding latents this way.
    pub fn with_path(self, path: Path) -> Self {
        Cpu { path, ..self }
    }

    /// The same backend on this many threads. Results do not depend on it.
    pub fn with_threads(self, threads: usize) -> Self {
        Cpu { threads: threads.max(1), ..self }
    }

    fn r(&self, v: T) -> T {
        v.rounded_to(self.dtype)
    }

    /// Threads for an operation on this many elements.
    fn threads_for(&self, elements: usize) -> usize {
        if elements < PARALLEL_ELEMENTS { 1 } else { self.threads }
    }

    /// `out = x · wᵀ`, unrounded; then `finish(b, h0, row)` on each piece `row` of row b that begins at column h0.
    /// x [n, k], w [m, k] → [n, m].
    fn product_nt(&self, x: &Matrix<T>, w: &Matrix<T>, out: &mut [T], finish: impl Fn(usize, usize, &mut [T]) + Sync) {
        let (n, m) = (x.rows, w.rows);
        assert_eq!(x.cols, w.cols, "both have rows of one width");
        let x_view = view(x.full(), x.rows, x.cols);
        let mut out = view_mut(out, n, m);
        let work = |range: Range<usize>, mut out: ArrayViewMut2<T>| {
            let mut scratch = Vec::new();
            for (rows, mut out) in split_rows(range, WEIGHT_ROWS).zip(out.axis_chunks_iter_mut(Axis(1), WEIGHT_ROWS)) {
                let w_view = view(w.rows(rows.clone(), &mut scratch), rows.len(), w.cols);
                general_mat_mul(T::one(), &x_view, &w_view.t(), T::zero(), &mut out);
                for (b, mut row) in out.rows_mut().into_iter().enumerate() {
                    finish(b, rows.start, row.as_slice_mut().expect("rows are contiguous"));
                }
            }
        };
        let threads = self.threads_for(n * m * w.cols / 64);
        let per_thread = m.div_ceil(threads).max(1);
        if threads == 1 || m <= per_thread {
            return work(0..m, out);
        }
        std::thread::scope(|scope| {
            for (range, piece) in split(m, threads).zip(out.axis_chunks_iter_mut(Axis(1), per_thread)) {
                let work = &work;
                scope.spawn(move || work(range, piece));
            }
        });
    }

    /// `linear` into a dense [batch, d_hidden], `last` applied to each rounded element.
    fn linear_into(&self, x: &Matrix<T>, w: &Matrix<T>, b: &Matrix<T>, out: &mut [T], last: impl Fn(T) -> T + Sync) {
        let mut bias = vec![T::zero(); b.cols];
        b.read(0, &mut bias);
        self.product_nt(x, w, out, |_, h0, row| {
            for (v, &bias) in row.iter_mut().zip(&bias[h0..]) {
                *v = last(self.r(self.r(*v) + bias));
            }
        });
    }

    /// `m[row] += Σ_h acts[row,h] · w[h]` over all latents, unrounded.
    fn decode_dense(&self, acts: &Latents<T>, w: &Matrix<T>, out: &mut [T]) {
        let dense = self.dense(acts);
        for_rows(self.threads_for(acts.rows * w.rows), out, w.cols, 1, |b0, out| {
            let rows = out.len().checked_div(w.cols).unwrap_or(0);
            let acts = view(&dense, acts.rows, acts.cols);
            let acts = acts.slice(ndarray::s![b0..b0 + rows, ..]);
            let mut out = view_mut(out, rows, w.cols);
            let mut scratch = Vec::new();
            for block in split_rows(0..w.rows, WEIGHT_ROWS) {
                let w_view = view(w.rows(block.clone(), &mut scratch), block.len(), w.cols);
                let beta = if block.start == 0 { T::zero() } else { T::one() };
                general_mat_mul(T::one(), &acts.slice(ndarray::s![.., block]), &w_view, beta, &mut out);
            }
        });
    }

    fn dense<'a>(&self, latents: &'a Latents<T>) -> std::borrow::Cow<'a, [T]> {
        if !latents.sparse {
            return (&latents.values).into();
        }
        let mut dense = vec![T::zero(); latents.rows * latents.cols];
        for b in 0..latents.rows {
            latents.for_row(b, |h, v| dense[b * latents.cols + h] = v);
        }
        dense.into()
    }

    /// `out = r(value)` or `out = r(out + r(value))`.
    fn write(&self, out: &mut T, value: T, write: Write) {
        *out = match write {
            Write::Set => self.r(value),
            Write::Add => self.r(*out + self.r(value)),
        };
    }

    /// Whether the support alone may stand for dense latents; see [`crate::sparse`].
    fn hold_sparse(&self, dense: &[T]) -> bool {
        match self.path {
            Path::Dense => false,
            Path::Sparse => true,
            Path::Auto => {
                let active = dense.iter().filter(|&&v| v != T::zero()).count();
                active as f64 <= SPARSE_SHARE * dense.len() as f64
            }
        }
    }
}

/// Sum with 16 lanes: the error of a sum of n grows with n/16.
fn sum<T: Scalar>(values: impl ExactSizeIterator<Item = T>) -> T {
    let mut lanes = [T::zero(); 16];
    for (i, v) in values.enumerate() {
        lanes[i % 16] += v;
    }
    let mut step = 8;
    while step > 0 {
        for i in 0..step {
            lanes[i] += lanes[i + step];
        }
        step /= 2;
    }
    lanes[0]
}

fn view<T>(slice: &[T], rows: usize, cols: usize) -> ArrayView2<'_, T> {
    ArrayView2::from_shape((rows, cols), slice).expect("as many elements as the shape has")
}

fn view_mut<T>(slice: &mut [T], rows: usize, cols: usize) -> ArrayViewMut2<'_, T> {
    ArrayViewMut2::from_shape((rows, cols), slice).expect("as many elements as the shape has")
}

/// `range` in pieces of `step`.
fn split_rows(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(step).map(move |start| start..(start + step).min(range.end))
}

impl<T: Scalar> Backend for Cpu<T> {
    type Scalar = T;
    type Matrix = Matrix<T>;
    type Latents = Latents<T>;

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn upload(&self, rows: usize, cols: usize, values: Values) -> Result<Matrix<T>> {
        Ok(Matrix::from_values(rows, cols, values, self.dtype))
    }

    fn fill(&self, rows: usize, cols: usize, values: &[T], out: &mut Matrix<T>) -> Result<()> {
        // The judge casts what enters, too; only what it computes is not rounded.
        let dtype = self.dtype;
        for (o, &v) in out.overwrite(rows, cols).iter_mut().zip(values) {
            *o = T::narrow(f64::from(dtype.round(v.wide() as f32)));
        }
        Ok(())
    }

    fn download(&self, m: &Matrix<T>, at: usize, out: &mut [T]) -> Result<()> {
        m.read(at, out);
        Ok(())
    }

    fn linear(&self, x: &Matrix<T>, w: &Matrix<T>, b: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        self.linear_into(x, w, b, out.overwrite(x.rows, w.rows), |v| v);
        Ok(())
    }

    fn encode(&self, x: &Matrix<T>, w: &Matrix<T>, b: &Matrix<T>, out: &mut Latents<T>) -> Result<()> {
        let zero = T::zero();
        // nan <= 0 is false: relu passes nan on, as torch.relu does.
        let dense = out.overwrite_dense(x.rows, w.rows);
        self.linear_into(x, w, b, dense, |v| if v <= zero { zero } else { v });
        if self.hold_sparse(dense) {
            let dense = std::mem::take(&mut out.values);
            out.set_sparse(x.rows, w.rows, &dense);
        }
        Ok(())
    }

    fn to_latents(&self, dense: &Matrix<T>, out: &mut Latents<T>) -> Result<()> {
        if self.hold_sparse(dense.full()) {
            out.set_sparse(dense.rows, dense.cols, dense.full());
        } else {
            out.overwrite_dense(dense.rows, dense.cols).copy_from_slice(dense.full());
        }
        Ok(())
    }

    fn to_dense(&self, latents: &Latents<T>, out: &mut Matrix<T>) -> Result<()> {
        out.overwrite(latents.rows, latents.cols).copy_from_slice(&self.dense(latents));
        Ok(())
    }

    fn support(&self, latents: &Latents<T>) -> Result<Support<T>> {
        let mut sparse = Latents::default();
        if !latents.sparse {
            sparse.set_sparse(latents.rows, latents.cols, &latents.values);
        }
        let of = if latents.sparse { latents } else { &sparse };
        Ok(Support { starts: of.starts.clone(), columns: of.columns.clone(), values: of.values.clone() })
    }

    fn keep_above(&self, acts: &mut Latents<T>, factors: &[T], threshold: T) -> Result<()> {
        let (rows, cols) = acts.shape();
        let mut dense = self.dense(acts).into_owned();
        super::cut(&mut dense, factors, |v| self.r(v) <= threshold);
        if self.hold_sparse(&dense) {
            acts.set_sparse(rows, cols, &dense);
        } else {
            acts.overwrite_dense(rows, cols).copy_from_slice(&dense);
        }
        Ok(())
    }

    fn decode(&self, acts: &Latents<T>, w: &Matrix<T>, b: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        assert_eq!(acts.cols, w.rows, "as many latents as the decoder has");
        let cols = w.cols;
        let mut bias = vec![T::zero(); cols];
        b.read(0, &mut bias);
        let out = out.overwrite(acts.rows, cols);
        let sparse = acts.sparse && w.is_finite();
        if !sparse {
            self.decode_dense(acts, w, out);
        }
        for_rows(self.threads_for(acts.values.len().max(acts.rows) * cols), out, cols, 1, |b0, out| {
            let mut scratch = Vec::new();
            for (i, row) in out.chunks_exact_mut(cols.max(1)).enumerate() {
                if sparse {
                    row.fill(T::zero());
                    for (h, v) in acts.entries(b0 + i) {
                        let w = w.rows(h..h + 1, &mut scratch);
                        row.iter_mut().zip(w).for_each(|(o, &w)| *o += v * w);
                    }
                }
                row.iter_mut().zip(&bias).for_each(|(o, &b)| *o = self.r(self.r(*o) + b));
            }
        });
        Ok(())
    }

    fn latents_grad(
        &self,
        d: &Matrix<T>,
        w: &Matrix<T>,
        acts: &Latents<T>,
        write: Write,
        out: &mut Latents<T>,
    ) -> Result<()> {
        assert_eq!((d.rows, d.cols, acts.cols), (acts.rows, w.cols, w.rows), "shapes of a product d · wᵀ");
        if write == Write::Set {
            out.like(acts);
        }
        let zero = T::zero();
        if !acts.sparse {
            let mut product = vec![zero; acts.rows * acts.cols];
            self.product_nt(d, w, &mut product, |_, _, _| {});
            for ((o, &p), &a) in out.values.iter_mut().zip(&product).zip(&acts.values) {
                if a <= zero {
                    *o = zero;
                } else {
                    self.write(o, p, write);
                }
            }
            return Ok(());
        }
        // Entries of a thread's rows are neighbours: cut `values` where rows begin.
        let threads = self.threads_for(acts.values.len() * w.cols);
        std::thread::scope(|scope| {
            let mut rest = &mut out.values[..];
            for rows in split(acts.rows, threads) {
                let entries = acts.starts[rows.end] - acts.starts[rows.start];
                let (mine, others) = rest.split_at_mut(entries);
                rest = others;
                let work = move || {
                    let mut scratch = Vec::new();
                    let mut mine = mine.iter_mut();
                    for b in rows {
                        let d = &d.full()[b * d.cols..(b + 1) * d.cols];
                        for ((h, _), o) in acts.entries(b).zip(&mut mine) {
                            let w = w.rows(h..h + 1, &mut scratch);
                            self.write(o, sum(d.iter().zip(w).map(|(&d, &w)| d * w)), write);
                        }
                    }
                };
                if threads == 1 { work() } else { drop(scope.spawn(work)) }
            }
        });
        Ok(())
    }

    fn weight_grad(&self, latents: &Latents<T>, y: &Matrix<T>, write: Write, out: &mut Matrix<T>) -> Result<()> {
        assert_eq!(latents.rows, y.rows, "as many rows of latents as of y");
        let (rows, cols) = (latents.cols, y.cols);
        if write == Write::Set {
            out.overwrite(rows, cols);
        }
        assert_eq!(out.shape(), (rows, cols));
        let out = out.overwrite(rows, cols);
        let sparse = latents.sparse && y.is_finite() && latents.is_finite();
        let dense = if sparse { Default::default() } else { self.dense(latents) };
        // The entries by column instead of by row: (row, value) of column h at starts[h]..starts[h + 1], rows ascending.
        let mut starts = vec![0usize; rows + 1];
        let mut by_column = vec![(0u32, T::zero()); if sparse { latents.values.len() } else { 0 }];
        if sparse {
            latents.columns.iter().for_each(|&h| starts[h as usize + 1] += 1);
            (0..rows).for_each(|h| starts[h + 1] += starts[h]);
            let mut next = starts.clone();
            for b in 0..latents.rows {
                for (h, v) in latents.entries(b) {
                    by_column[next[h]] = (b as u32, v);
                    next[h] += 1;
                }
            }
        }
        for_rows(self.threads_for(rows * cols), out, cols, 1, |h0, out| {
            if sparse {
                let mut product = vec![T::zero(); cols];
                for (i, out) in out.chunks_exact_mut(cols.max(1)).enumerate() {
                    product.fill(T::zero());
                    for &(b, v) in &by_column[starts[h0 + i]..starts[h0 + i + 1]] {
                        let y = &y.full()[b as usize * cols..(b as usize + 1) * cols];
                        product.iter_mut().zip(y).for_each(|(p, &y)| *p += v * y);
                    }
                    out.iter_mut().zip(&product).for_each(|(o, &p)| self.write(o, p, write));
                }
                return;
            }
            let latents = view(&dense, latents.rows, latents.cols);
            let mut product = vec![T::zero(); WEIGHT_ROWS * cols];
            for (i, out) in out.chunks_mut((WEIGHT_ROWS * cols).max(1)).enumerate() {
                let n = out.len().checked_div(cols).unwrap_or(0);
                let h = h0 + i * WEIGHT_ROWS;
                let block = latents.slice(ndarray::s![.., h..h + n]);
                let product = &mut product[..n * cols];
                let y = view(y.full(), y.rows, y.cols);
                general_mat_mul(T::one(), &block.t(), &y, T::zero(), &mut view_mut(product, n, cols));
                out.iter_mut().zip(product).for_each(|(o, p)| self.write(o, *p, write));
            }
        });
        Ok(())
    }

    fn latents_column_sums(&self, latents: &Latents<T>, out: &mut Matrix<T>) -> Result<()> {
        let out = out.overwrite(1, latents.cols);
        out.fill(T::zero());
        for b in 0..latents.rows {
            latents.for_row(b, |h, v| out[h] += v);
        }
        out.iter_mut().for_each(|v| *v = self.r(*v));
        Ok(())
    }

    fn weighted_sums(&self, acts: &Latents<T>, t: &Matrix<T>) -> Result<Vec<T>> {
        let weights = t.full();
        // A zero latent times a weight that is not finite is nan: then every latent counts.
        let dense = (acts.sparse && !t.is_finite()).then(|| self.dense(acts));
        Ok((0..acts.rows)
            .map(|b| {
                let mut products = Vec::new();
                match &dense {
                    None => acts.for_row(b, |h, a| products.push(self.r(a * weights[h]))),
                    Some(dense) => products
                        .extend(dense[b * acts.cols..].iter().zip(weights).map(|(&a, &weight)| self.r(a * weight))),
                }
                self.r(sum(products.into_iter()))
            })
            .collect())
    }

    fn weighted_sums_grad(
        &self,
        acts: &Latents<T>,
        t: &Matrix<T>,
        g: T,
        d_acts: &mut Latents<T>,
        d_t: &mut Matrix<T>,
    ) -> Result<()> {
        let t = t.full();
        let d_t = d_t.overwrite(1, acts.cols);
        d_t.fill(T::zero());
        let d_values = d_acts.like(acts);
        let mut i = 0;
        for b in 0..acts.rows {
            acts.for_row(b, |h, a| {
                // Outside of the support relu stops the gradient.
                d_values[i] = if a <= T::zero() { T::zero() } else { self.r(g * t[h]) };
                d_t[h] += self.r(g * a);
                i += 1;
            });
        }
        d_t.iter_mut().for_each(|v| *v = self.r(*v));
        Ok(())
    }

    fn active_counts(&self, acts: &Latents<T>) -> Result<Vec<T>> {
        Ok((0..acts.rows)
            .map(|b| {
                let mut count = 0usize;
                acts.for_row(b, |_, a| count += usize::from(a > T::zero()));
                T::narrow(count as f64)
            })
            .collect())
    }

    fn column_sums(&self, m: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        let out = out.overwrite(1, m.cols);
        out.fill(T::zero());
        for row in m.full().chunks_exact(m.cols.max(1)) {
            out.iter_mut().zip(row).for_each(|(o, &v)| *o += v);
        }
        out.iter_mut().for_each(|v| *v = self.r(*v));
        Ok(())
    }

    fn column_means(&self, m: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        let n = T::narrow(m.rows as f64);
        let out = out.overwrite(1, m.cols);
        out.fill(T::zero());
        for row in m.full().chunks_exact(m.cols.max(1)) {
            out.iter_mut().zip(row).for_each(|(o, &v)| *o += v);
        }
        out.iter_mut().for_each(|v| *v = self.r(*v / n));
        Ok(())
    }

    fn squared_distances(
        &self,
        a: &Matrix<T>,
        b: &Matrix<T>,
        cols: Range<usize>,
        precision: Precision,
    ) -> Result<Vec<T>> {
        assert!(a.cols == b.cols && (b.rows == a.rows || b.rows == 1), "b has the shape of a, or one row");
        let r = |v: T| if precision == Precision::Dtype { self.r(v) } else { v };
        Ok((0..a.rows)
            .map(|i| {
                let a = &a.full()[i * a.cols..][cols.clone()];
                let b = &b.full()[if b.rows == 1 { 0 } else { i } * b.cols..][cols.clone()];
                r(sum(a.iter().zip(b).map(|(&a, &b)| {
                    let diff = r(a - b);
                    r(diff * diff)
                })))
            })
            .collect())
    }

    fn squared_distances_grad(&self, a: &Matrix<T>, b: &Matrix<T>, g: T, out: &mut Matrix<T>) -> Result<()> {
        let two = T::narrow(2.0);
        let out = out.overwrite(a.rows, a.cols);
        for ((o, &a), &b) in out.iter_mut().zip(a.full()).zip(b.full()) {
            *o = self.r(g * (two * (a - b)));
        }
        Ok(())
    }

    fn group_norms(&self, w: &Matrix<T>, groups: usize, out: &mut Matrix<T>) -> Result<()> {
        let d = w.cols / groups;
        let out = out.overwrite(w.rows, groups);
        for_rows(self.threads_for(w.rows * w.cols), out, groups, 1, |h0, out| {
            let mut scratch = Vec::new();
            for (i, norms) in out.chunks_exact_mut(groups).enumerate() {
                let row = w.rows(h0 + i..h0 + i + 1, &mut scratch);
                for (norm, part) in norms.iter_mut().zip(row.chunks_exact(d)) {
                    *norm = self.r(sum(part.iter().map(|&v| v * v)).sqrt());
                }
            }
        });
        Ok(())
    }

    fn row_sums(&self, m: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        let out = out.overwrite(1, m.rows);
        for (o, row) in out.iter_mut().zip(m.full().chunks_exact(m.cols.max(1))) {
            *o = self.r(sum(row.iter().copied()));
        }
        Ok(())
    }

    fn group_norms_grad(
        &self,
        w: &Matrix<T>,
        norms: &Matrix<T>,
        d_t: &Matrix<T>,
        write: Write,
        out: &mut Matrix<T>,
    ) -> Result<()> {
        let (groups, cols) = (norms.cols, w.cols);
        let d = cols / groups;
        let out = out.overwrite(w.rows, cols);
        for_rows(self.threads_for(w.rows * cols), out, cols, 1, |h0, out| {
            let mut scratch = Vec::new();
            for (i, out) in out.chunks_exact_mut(cols).enumerate() {
                let h = h0 + i;
                let row = w.rows(h..h + 1, &mut scratch);
                let g = d_t.full()[h];
                for m in 0..groups {
                    let norm = norms.full()[h * groups + m];
                    for (o, &w) in out[m * d..(m + 1) * d].iter_mut().zip(&row[m * d..]) {
                        let unit = if norm == T::zero() { T::zero() } else { self.r(w / norm) };
                        self.write(o, unit * g, write);
                    }
                }
            }
        });
        Ok(())
    }

    fn norm(&self, m: &Matrix<T>) -> Result<T> {
        // One partial sum a row, so that the order of terms does not depend on the threads.
        let mut rows = vec![T::zero(); m.rows];
        for_rows(self.threads_for(m.rows * m.cols), &mut rows, 1, 1, |h0, rows| {
            let mut scratch = Vec::new();
            for (i, out) in rows.iter_mut().enumerate() {
                *out = sum(m.rows(h0 + i..h0 + i + 1, &mut scratch).iter().map(|&v| v * v));
            }
        });
        let total: f64 = rows.iter().map(|v| v.wide()).sum();
        Ok(self.r(T::narrow(total.sqrt())))
    }

    fn adam(
        &self,
        p: &mut Matrix<T>,
        g: &Matrix<T>,
        m: &mut Matrix<T>,
        v: &mut Matrix<T>,
        step: &AdamStep<T>,
    ) -> Result<()> {
        let update = |p: &mut [T], g: &[T], m: &mut [T], v: &mut [T]| {
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let g = self.r(step.clip * g);
                *m = self.r(*m + step.one_minus_beta1 * (g - *m));
                *v = self.r(self.r(step.beta2 * *v) + step.one_minus_beta2 * g * g);
                let denom = self.r(self.r(self.r(v.sqrt()) / step.bias_correction2_sqrt) + step.eps);
                *p = self.r(*p - step.step_size * *m / denom);
            }
        };
        let threads = self.threads_for(p.rows * p.cols);
        let rows = p.rows.div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let pieces = p.row_pieces(rows).zip(m.row_pieces(rows)).zip(v.row_pieces(rows));
            for (((mut p, mut m), mut v), g) in pieces.zip(g.full().chunks((rows * g.cols).max(1))) {
                let update = &update;
                let mut work = move || {
                    let mut scratch = [vec![], vec![], vec![]];
                    for (i, g) in g.chunks(ADAM_ELEMENTS).enumerate() {
                        let [sp, sm, sv] = &mut scratch;
                        let range = i * ADAM_ELEMENTS..i * ADAM_ELEMENTS + g.len();
                        p.edit(range.clone(), sp, |p| {
                            m.edit(range.clone(), sm, |m| v.edit(range.clone(), sv, |v| update(p, g, m, v)))
                        });
                    }
                };
                if threads == 1 { work() } else { drop(scope.spawn(work)) }
            }
        });
        Ok(())
    }
}
