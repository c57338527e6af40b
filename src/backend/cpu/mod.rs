//! The CPU: one dense product, `encode`; everything after it by loops over the support, or where many latents are on, dense but
//! for the zeros (`masked`).
//!
//! `Cpu<f32>` computes in float32 and rounds to the dtype; `Cpu<f64>` is the same source in float64 and rounds nowhere.
//! The inner loops are in `kernels`, the tiling of dense products in `product`, the encoder in `encode`.

mod buffers;
mod encode;
mod kernels;
mod masked;
mod matrix;
mod product;
mod sketch;

pub use matrix::{Latents, Matrix};

use super::{AdamStep, Backend, Precision, Scalar, Shaped, Support, Write};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::sparse::Path;
use crate::tensor::Values;
use crate::threads::{available, for_each, for_rows, pieces};
use kernels::{Level, Source};
use ndarray::{ArrayViewMut2, Axis};
use product::{Resident, Workshop};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// Latents are held as a support where at most this share of them is not zero; the other way they are multiplied through masks
/// ([`masked`]). Measured with AVX2, two cores, `crosscoder bench --case …,L0 --op step`, this way and the other: at 768, 8192, 1024
/// 0.68 s and 0.78 s where 4 % are on, 0.91 s and 0.86 s where 8 % are; at 2304, 16384, 1024 3.2 s and 3.3 s at 2 %, 5.3 s and 4.4 s
/// at 4 %.
const SPARSE_SHARE: f64 = 0.04;

/// The same where the other way is products of pairs of bfloat16.
const SPARSE_SHARE_PAIRS: f64 = 0.1;

/// Operations on fewer elements than this run on one thread: starting one costs some 20 µs.
const PARALLEL_ELEMENTS: usize = 1 << 16;

/// Elements that Adam updates at a time, unpacked if they are stored in half precision.
const ADAM_ELEMENTS: usize = 4096;

/// Rows of a matrix that a thread takes at a time.
const ROWS: usize = 16;

/// Columns of a matrix that a thread takes at a time: 2 KiB of a row.
const COLUMNS: usize = 512;

/// Up to this many rows of latents, decoding goes row by row.
const FEW_ROWS: usize = 8;

/// How many rows ahead parts of rows are asked for.
const AHEAD: usize = 8;

/// Terms of a dense product over latents that are packed at a time: 4096 for 1024 rows are 16 MiB.
const LATENT_TERMS: usize = 4096;

/// The CPU backend; `T` is f32, or f64 for the judge.
#[derive(Clone, Debug)]
pub struct Cpu<T = f32> {
    dtype: Dtype,
    path: Path,
    threads: usize,
    shop: Workshop<T>,
    scalar: PhantomData<T>,
}

impl<T: Scalar> Cpu<T> {
    /// A backend that stores and rounds in `dtype`, on all cores.
    ///
    /// # Panics
    /// If `dtype` is not a float type that a crosscoder can have.
    pub fn new(dtype: Dtype) -> Self {
        assert!(dtype.enc_name().is_some(), "a crosscoder cannot have the type {dtype}");
        let threads = available();
        Cpu { dtype, path: Path::Auto, threads, shop: Workshop::default(), scalar: PhantomData }
    }

    /// The same backend, holding latents this way.
    pub fn with_path(self, path: Path) -> Self {
        Cpu { path, ..self }
    }

    /// The same backend on this many threads. Results do not depend on it.
    pub fn with_threads(self, threads: usize) -> Self {
        Cpu { threads: threads.max(1), ..self }
    }

    /// The vector instructions in use: `portable`, `avx2+fma`, `avx512` or `avx512+bf16`.
    pub fn instructions(&self) -> &'static str {
        self.shop.level.name()
    }

    #[cfg(test)]
    fn with_level(mut self, level: Level) -> Self {
        self.shop.level = level;
        self
    }

    fn r(&self, v: T) -> T {
        v.rounded_to(self.dtype)
    }

    fn level(&self) -> Level {
        self.shop.level
    }

    /// Threads for an operation on this many elements.
    fn threads_for(&self, elements: usize) -> usize {
        if elements < PARALLEL_ELEMENTS { 1 } else { self.threads }
    }

    /// Whether products of these operands are carried out in pairs of bfloat16, which then lose nothing but subnormals: all their
    /// elements are bfloat16, as everything is that was rounded to the dtype.
    fn in_pairs(&self) -> bool {
        self.dtype == Dtype::BF16 && self.level().has_pairs() && self.r(T::narrow(1.0 + 2f64.powi(-20))) == T::one()
    }

    /// The segment of products that follow no other order.
    fn segment(&self) -> usize {
        if self.in_pairs() { product::PAIR_SEGMENT } else { product::SEGMENT }
    }

    /// `m = Σ_h acts[row,h] · w[h]` over all latents, unrounded.
    fn decode_dense(&self, acts: &Latents<T>, w: &Matrix<T>, out: &mut [T]) {
        let (rows, cols) = (acts.rows, w.cols);
        if rows * cols == 0 {
            return;
        }
        let dense = self.dense(acts);
        let acts = kernels::Side { source: Source::Full(&dense), rows, row_stride: w.rows, term_stride: 1 };
        let threads = self.threads_for(rows * w.rows);
        let block = self.shop.block_rows(threads, cols);
        out.fill(T::zero());
        for terms in pieces(0..w.rows, LATENT_TERMS) {
            let packed = self.shop.pack(threads, &acts, Resident::Left, terms, self.segment(), self.in_pairs());
            let mut out = view_mut(out, rows, cols);
            let blocks = pieces(0..cols, block).zip(out.axis_chunks_iter_mut(Axis(1), block));
            for_each(
                threads,
                blocks,
                || self.shop.full.take(rows * block),
                |tile, (range, mut out)| {
                    let tile = &mut tile[..rows * range.len()];
                    packed.times(&self.shop, &w.columns_side(), range.clone(), tile);
                    for (mut out, tile) in out.rows_mut().into_iter().zip(tile.chunks_exact(range.len())) {
                        out.iter_mut().zip(tile).for_each(|(o, &t)| *o += t);
                    }
                },
            );
        }
    }

    /// `m = Σ_{h in S(row)} acts[row,h] · w[h]`, unrounded; then rounded with the bias.
    ///
    /// Column by column of the latents, so that `w` is read once, into a tile of `out` that stays in the second-level cache.
    fn decode_sparse(&self, acts: &Latents<T>, w: &Matrix<T>, bias: &[T], out: &mut [T]) {
        let (rows, cols) = (acts.rows, w.cols);
        if rows * cols == 0 {
            return;
        }
        let threads = self.threads_for(acts.values.len().max(rows) * cols);
        // 128 columns of 1024 rows are 512 KiB.
        let block = 128;
        let mut out = view_mut(out, rows, cols);
        let blocks = pieces(0..cols, block).zip(out.axis_chunks_iter_mut(Axis(1), block));
        let state = || (self.shop.full.take(rows * block), self.shop.scratch.take());
        for_each(threads, blocks, state, |(tile, scratch), (range, mut out)| {
            let tile = &mut tile[..rows * range.len()];
            tile.fill(T::zero());
            let by = &acts.by_column;
            for h in 0..acts.cols {
                let entries = by.starts[h]..by.starts[h + 1];
                // Parts of rows lie too far apart for the processor to foresee: without this, 2.6 times slower.
                let next = (h + AHEAD) * cols;
                w.source().prefetch(next + range.start..next + range.end);
                if !entries.is_empty() {
                    let w = w.part(h * cols + range.start..h * cols + range.end, scratch);
                    let (rows, at) = (&by.rows[entries.clone()], &by.at[entries]);
                    kernels::scatter_row(self.level(), tile, w, rows, at, &acts.values);
                }
            }
            for (mut out, tile) in out.rows_mut().into_iter().zip(tile.chunks_exact_mut(range.len())) {
                kernels::finish(self.level(), tile, &bias[range.clone()], false, self.dtype);
                out.as_slice_mut().expect("a part of a row is contiguous").copy_from_slice(tile);
            }
        });
    }

    fn dense<'a>(&self, latents: &'a Latents<T>) -> std::borrow::Cow<'a, [T]> {
        if !latents.sparse {
            return (&latents.values).into();
        }
        let mut dense = vec![T::zero(); latents.rows * latents.cols];
        for b in 0..latents.rows {
            latents.entries(b).for_each(|(h, v)| dense[b * latents.cols + h] = v);
        }
        dense.into()
    }

    /// Entries that latents of this shape may have to be held as a support.
    fn sparse_limit(&self, rows: usize, cols: usize) -> usize {
        let limit = match self.path {
            Path::Dense => return 0,
            Path::Sparse => rows.saturating_mul(cols),
            Path::Auto => {
                let share = if self.in_pairs() { SPARSE_SHARE_PAIRS } else { SPARSE_SHARE };
                (share * rows as f64 * cols as f64) as usize
            }
        };
        limit.min(u32::MAX as usize)
    }

    /// Whether the support alone may stand for dense latents; see [`crate::sparse`].
    fn hold_sparse(&self, rows: usize, cols: usize, dense: &[T]) -> bool {
        self.path != Path::Dense && self.count_active(dense) <= self.sparse_limit(rows, cols)
    }

    /// How many are not zero.
    fn count_active(&self, dense: &[T]) -> usize {
        let active = AtomicUsize::new(0);
        let count = |_: &mut (), dense: &[T]| {
            let here = dense.iter().map(|&v| u32::from(v != T::zero())).sum::<u32>();
            active.fetch_add(here as usize, Relaxed);
        };
        for_each(self.threads_for(dense.len()), dense.chunks(1 << 16), || (), count);
        active.into_inner()
    }

    /// `latentsᵀ · y` where the support may stand for the latents, unrounded: calls `finish(out, i, product, scratch)` for row i
    /// of each [`ROWS`] rows, to which belongs one item of `out`.
    fn weight_grad_sparse<P: Send>(
        &self,
        latents: &Latents<T>,
        y: &Matrix<T>,
        out: impl Iterator<Item = P> + Send,
        finish: impl Fn(&mut P, usize, &mut [T], &mut Vec<T>) + Sync,
    ) {
        let (rows, cols) = (latents.cols, y.cols);
        let by = &latents.by_column;
        let mut factors = self.shop.full.take(by.at.len());
        factors.iter_mut().zip(&by.at).for_each(|(f, &at)| *f = latents.values[at as usize]);
        let blocks = pieces(0..rows, ROWS).zip(out);
        let state = || (self.shop.full.take(cols), self.shop.scratch.take());
        for_each(self.threads_for(rows * cols), blocks, state, |(product, scratch), (range, mut out)| {
            for (i, h) in range.enumerate() {
                let entries = by.starts[h]..by.starts[h + 1];
                let (terms, factors) = (&by.rows[entries.clone()], &factors[entries]);
                kernels::gather_rows(self.level(), product, y.full(), terms, factors);
                finish(&mut out, i, product, scratch);
            }
        });
    }

    /// `latentsᵀ · y` by dense products, written into rows of `out`.
    fn weight_grad_dense(&self, latents: &Latents<T>, y: &Matrix<T>, add: bool, out: &mut [T]) {
        let (rows, cols) = (latents.cols, y.cols);
        if rows * cols == 0 {
            return;
        }
        let threads = self.threads_for(rows * cols);
        let dense = self.dense(latents);
        let latents = kernels::Side { source: Source::Full(&dense), rows, row_stride: 1, term_stride: rows };
        let packed =
            self.shop.pack(threads, &y.columns_side(), Resident::Right, 0..y.rows, self.segment(), self.in_pairs());
        let block = self.shop.block_rows(threads, rows);
        let blocks = pieces(0..rows, block).zip(out.chunks_mut(block * cols));
        for_each(
            threads,
            blocks,
            || self.shop.full.take(block * cols),
            |tile, (range, out)| {
                let tile = &mut tile[..range.len() * cols];
                packed.times(&self.shop, &latents, range, tile);
                kernels::write(self.level(), out, tile, add, self.dtype);
            },
        );
    }

    /// Row `h` of [`Backend::group_norms_grad`].
    #[allow(clippy::too_many_arguments)]
    fn unit_rows(
        &self,
        w: &Matrix<T>,
        norms: &Matrix<T>,
        d_t: &Matrix<T>,
        h: usize,
        groups: usize,
        out: &mut [T],
        add: bool,
        scratch: &mut Vec<T>,
    ) {
        let (d, g) = (w.cols / groups, d_t.full()[h]);
        let norms = &norms.full()[h * groups..(h + 1) * groups];
        let parts = w.rows(h..h + 1, scratch).chunks_exact(d).zip(out.chunks_exact_mut(d));
        for ((w, out), &norm) in parts.zip(norms) {
            kernels::unit_times(self.level(), w, norm, g, out, add, self.dtype);
        }
    }

    /// `out[k] = Σ_b m[b,k]`, m having rows as long as `out`.
    fn add_rows(&self, m: &[T], out: &mut [T]) {
        let cols = out.len();
        let blocks = pieces(0..cols, COLUMNS).zip(out.chunks_mut(COLUMNS));
        for_each(
            self.threads_for(m.len()),
            blocks,
            || (),
            |_, (range, out)| {
                out.fill(T::zero());
                for row in m.chunks_exact(cols) {
                    kernels::add_scaled(self.level(), out, T::one(), &row[range.clone()]);
                }
            },
        );
    }

    /// `f(b)` for each row b of latents.
    fn for_latents(&self, latents: &Latents<T>, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let mut out = vec![T::zero(); latents.rows];
        for_rows(self.threads_for(latents.values.len()), &mut out, 1, 1, |first, out| {
            out.iter_mut().enumerate().for_each(|(i, o)| *o = f(first + i));
        });
        out
    }

    /// The sum over rows of the rows' sums of squares, each kept apart so that the order of terms does not depend on threads.
    fn total(&self, rows: &[T]) -> f64 {
        rows.iter().map(|v| v.wide()).sum::<f64>().sqrt()
    }
}

/// Sum with 16 lanes: the error of a sum of n grows with n/16.
fn sum<T: Scalar>(values: impl Iterator<Item = T>) -> T {
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

fn view_mut<T>(slice: &mut [T], rows: usize, cols: usize) -> ArrayViewMut2<'_, T> {
    ArrayViewMut2::from_shape((rows, cols), slice).expect("as many elements as the shape has")
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
        let (dtype, level) = (self.dtype, self.level());
        let judge = T::narrow(1.0 + f64::EPSILON) != T::one();
        let out = out.overwrite(rows, cols);
        for_rows(self.threads_for(rows * cols), out, cols, 1, |first, out| {
            let values = &values[first * cols..][..out.len()];
            if judge {
                out.iter_mut().zip(values).for_each(|(o, v)| *o = T::narrow(f64::from(dtype.round(v.wide() as f32))));
            } else {
                kernels::write(level, out, values, false, dtype);
            }
        });
        Ok(())
    }

    fn download(&self, m: &Matrix<T>, at: usize, out: &mut [T]) -> Result<()> {
        m.read(at, out);
        Ok(())
    }

    fn linear(&self, x: &Matrix<T>, w: &Matrix<T>, b: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        let mut scratch = self.shop.scratch.take();
        self.linear_into(x, w, b.rows(0..1, &mut scratch), false, out.overwrite(x.rows, w.rows));
        Ok(())
    }

    fn encode(&self, x: &Matrix<T>, w: &Matrix<T>, b: &Matrix<T>, out: &mut Latents<T>) -> Result<()> {
        let (limit, mut scratch) = (self.sparse_limit(x.rows, w.rows), self.shop.scratch.take());
        let bias = b.rows(0..1, &mut scratch);
        // Latents that were dense the last time mostly are so again; if they are not, that is seen below, in the same bits.
        let was_dense = !out.sparse && out.shape() == (x.rows, w.rows);
        if self.path != Path::Dense && !was_dense && self.encode_sparse(x, w, bias, limit, out) {
            return Ok(());
        }
        let dense = out.overwrite_dense(x.rows, w.rows);
        self.linear_into(x, w, bias, true, dense);
        if self.hold_sparse(x.rows, w.rows, dense) {
            let dense = std::mem::take(&mut out.values);
            out.set_sparse(x.rows, w.rows, &dense);
        }
        Ok(())
    }

    fn to_latents(&self, dense: &Matrix<T>, out: &mut Latents<T>) -> Result<()> {
        if self.hold_sparse(dense.rows, dense.cols, dense.full()) {
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
        if self.hold_sparse(rows, cols, &dense) {
            acts.set_sparse(rows, cols, &dense);
        } else {
            acts.overwrite_dense(rows, cols).copy_from_slice(&dense);
        }
        Ok(())
    }

    fn download_latents(&self, latents: &Latents<T>, out: &mut [T]) -> Result<()> {
        if !latents.sparse {
            out.copy_from_slice(&latents.values);
            return Ok(());
        }
        for_rows(self.threads_for(out.len()), out, latents.cols, 1, |first, out| {
            out.fill(T::zero());
            for (b, out) in (first..).zip(out.chunks_exact_mut(latents.cols)) {
                latents.entries(b).for_each(|(h, v)| out[h] = v);
            }
        });
        Ok(())
    }

    fn decode(&self, acts: &Latents<T>, w: &Matrix<T>, b: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        assert_eq!(acts.cols, w.rows, "as many latents as the decoder has");
        let mut scratch = self.shop.scratch.take();
        let (cols, bias) = (w.cols, b.rows(0..1, &mut scratch));
        let out = out.overwrite(acts.rows, cols);
        if !(acts.sparse && w.is_finite()) {
            if self.masks(acts) && w.is_finite() {
                self.decode_masked(acts, w, out);
            } else {
                self.decode_dense(acts, w, out);
            }
            for_rows(self.threads_for(out.len()), out, cols, 1, |_, out| {
                for row in out.chunks_exact_mut(cols) {
                    kernels::finish(self.level(), row, bias, false, self.dtype);
                }
            });
        } else if acts.rows <= FEW_ROWS {
            let mut scratch = self.shop.scratch.take();
            for (b, row) in out.chunks_exact_mut(cols.max(1)).enumerate() {
                row.fill(T::zero());
                for (h, v) in acts.entries(b) {
                    kernels::add_scaled(self.level(), row, v, w.rows(h..h + 1, &mut scratch));
                }
                kernels::finish(self.level(), row, bias, false, self.dtype);
            }
        } else {
            self.decode_sparse(acts, w, bias, out);
        }
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
        let (level, add, cols) = (self.level(), write == Write::Add, acts.cols);
        if self.masks_grad(acts) {
            self.latents_grad_masked(d, w, acts, add, &mut out.values);
            return Ok(());
        }
        if !acts.sparse {
            self.product_nt(d, w, &mut out.values, |b, h, product, out| {
                kernels::write(level, out, product, add, self.dtype);
                let acts = &acts.values[b * cols..][h];
                // Written in any case, which compilers make vectors of.
                out.iter_mut().zip(acts).for_each(|(o, &a)| *o = if a <= T::zero() { T::zero() } else { *o });
            });
            return Ok(());
        }
        // Column by column of the latents, so that w is read once; a thread's entries are neighbours in that order.
        let by = &acts.by_column;
        let mut products = self.shop.full.take(by.at.len());
        let mut rest = &mut products[..];
        let blocks = pieces(0..cols, ROWS).map(|range| {
            let (mine, others) = std::mem::take(&mut rest).split_at_mut(by.starts[range.end] - by.starts[range.start]);
            rest = others;
            (range, mine)
        });
        for_each(
            self.threads_for(by.at.len() * w.cols),
            blocks,
            || self.shop.scratch.take(),
            |scratch, (range, products)| {
                let first = by.starts[range.start];
                for h in range {
                    let entries = by.starts[h]..by.starts[h + 1];
                    if !entries.is_empty() {
                        let w = w.rows(h..h + 1, scratch);
                        for (&b, o) in by.rows[entries.clone()].iter().zip(&mut products[entries.start - first..]) {
                            *o = kernels::dot(level, &d.full()[b as usize * d.cols..][..d.cols], w);
                        }
                    }
                }
            },
        );
        for (&at, &product) in by.at.iter().zip(&products[..]) {
            let o = &mut out.values[at as usize];
            *o = if add { self.r(*o + self.r(product)) } else { self.r(product) };
        }
        Ok(())
    }

    fn weight_grad(&self, latents: &Latents<T>, y: &Matrix<T>, write: Write, out: &mut Matrix<T>) -> Result<()> {
        assert_eq!(latents.rows, y.rows, "as many rows of latents as of y");
        let (rows, cols) = (latents.cols, y.cols);
        let sparse = latents.sparse && y.is_finite() && latents.is_finite();
        match write {
            Write::Set if sparse => {
                let (pending, by) = (out.overwrite_pending(rows, cols), &latents.by_column);
                pending.starts.clone_from(&by.starts);
                pending.terms.clone_from(&by.rows);
                pending.factors.clear();
                pending.factors.extend(by.at.iter().map(|&at| latents.values[at as usize]));
                pending.y.resize(y.full().len(), T::zero());
                for_rows(self.threads_for(y.full().len()), &mut pending.y, cols, 1, |first, part| {
                    part.copy_from_slice(&y.full()[first * cols..][..part.len()]);
                });
                pending.dtype = Some(self.dtype);
            }
            Write::Add if sparse => {
                assert_eq!(out.shape(), (rows, cols));
                let out = out.full_mut(self.level()).chunks_mut((ROWS * cols).max(1));
                self.weight_grad_sparse(latents, y, out, |out, i, product, _| {
                    let out = &mut out[i * cols..][..cols];
                    kernels::write(self.level(), out, product, true, self.dtype);
                });
            }
            _ => {
                let add = write == Write::Add;
                assert!(!add || out.shape() == (rows, cols));
                let out = if add { out.full_mut(self.level()) } else { out.overwrite(rows, cols) };
                if self.masks(latents) && y.is_finite() {
                    self.weight_grad_masked(latents, y, add, out);
                } else {
                    self.weight_grad_dense(latents, y, add, out);
                }
            }
        }
        Ok(())
    }

    fn decoder_grad(
        &self,
        acts: &Latents<T>,
        d_rec: &Matrix<T>,
        w: &Matrix<T>,
        norms: &Matrix<T>,
        d_t: &Matrix<T>,
        out: &mut Matrix<T>,
    ) -> Result<()> {
        if !(acts.sparse && d_rec.is_finite() && acts.is_finite()) {
            self.group_norms_grad(w, norms, d_t, Write::Set, out)?;
            return self.weight_grad(acts, d_rec, Write::Add, out);
        }
        // One pass over memory: both terms and the sum of squares of a row while it lies in the cache.
        let (rows, cols, groups) = (w.rows, w.cols, norms.cols);
        let mut squares = self.shop.full.take(rows);
        let parts = out.overwrite(rows, cols).chunks_mut((ROWS * cols).max(1)).zip(squares.chunks_mut(ROWS));
        let parts = parts.enumerate();
        self.weight_grad_sparse(acts, d_rec, parts, |(part, (out, squares)), i, product, scratch| {
            let h = *part * ROWS + i;
            let out = &mut out[i * cols..][..cols];
            self.unit_rows(w, norms, d_t, h, groups, out, false, scratch);
            kernels::write(self.level(), out, product, true, self.dtype);
            squares[i] = kernels::sum_of_squares(self.level(), out);
        });
        let norm = self.total(&squares);
        out.set_norm(norm);
        Ok(())
    }

    fn latents_column_sums(&self, latents: &Latents<T>, out: &mut Matrix<T>) -> Result<()> {
        let out = out.overwrite(1, latents.cols);
        if latents.sparse {
            out.fill(T::zero());
            for b in 0..latents.rows {
                latents.entries(b).for_each(|(h, v)| out[h] += v);
            }
        } else {
            self.add_rows(&latents.values, out);
        }
        out.iter_mut().for_each(|v| *v = self.r(*v));
        Ok(())
    }

    fn weighted_sums(&self, acts: &Latents<T>, t: &Matrix<T>) -> Result<Vec<T>> {
        let weights = t.full();
        // A zero latent times a weight that is not finite is nan: then every latent counts.
        let dense = (acts.sparse && !t.is_finite()).then(|| self.dense(acts));
        let dense = dense.as_deref().or((!acts.sparse).then_some(&acts.values));
        Ok(self.for_latents(acts, |b| {
            self.r(match dense {
                None => sum(acts.entries(b).map(|(h, a)| self.r(a * weights[h]))),
                Some(dense) => sum(dense[b * acts.cols..].iter().zip(weights).map(|(&a, &weight)| self.r(a * weight))),
            })
        }))
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
        if acts.sparse {
            let entries = acts.columns.iter().zip(&acts.values);
            for (d, (&h, &a)) in d_values.iter_mut().zip(entries) {
                // Outside of the support relu stops the gradient.
                *d = if a <= T::zero() { T::zero() } else { self.r(g * t[h as usize]) };
                d_t[h as usize] += self.r(g * a);
            }
        } else {
            let mut d_values = view_mut(d_values, acts.rows, acts.cols);
            let blocks = pieces(0..acts.cols, COLUMNS).zip(d_values.axis_chunks_iter_mut(Axis(1), COLUMNS));
            let blocks = blocks.zip(d_t.chunks_mut(COLUMNS));
            for_each(
                self.threads_for(acts.values.len()),
                blocks,
                || (),
                |_, ((range, mut d_acts), d_t)| {
                    for (b, mut d_acts) in d_acts.rows_mut().into_iter().enumerate() {
                        let d_acts = d_acts.as_slice_mut().expect("a part of a row is contiguous");
                        let acts = &acts.values[b * acts.cols..][range.clone()];
                        kernels::weighted_grad(self.level(), acts, &t[range.clone()], g, d_acts, d_t, self.dtype);
                    }
                },
            );
        }
        d_t.iter_mut().for_each(|v| *v = self.r(*v));
        Ok(())
    }

    fn active_counts(&self, acts: &Latents<T>) -> Result<Vec<T>> {
        Ok(self.for_latents(acts, |b| T::narrow(acts.row(b).iter().filter(|a| **a > T::zero()).count() as f64)))
    }

    fn column_sums(&self, m: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        let out = out.overwrite(1, m.cols);
        self.add_rows(m.full(), out);
        kernels::round(self.level(), out, self.dtype);
        Ok(())
    }

    fn column_means(&self, m: &Matrix<T>, out: &mut Matrix<T>) -> Result<()> {
        let n = T::narrow(m.rows as f64);
        let out = out.overwrite(1, m.cols);
        self.add_rows(m.full(), out);
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
        let dtype = if precision == Precision::Dtype { self.dtype } else { Dtype::F32 };
        let mut out = vec![T::zero(); a.rows];
        for_rows(self.threads_for(a.rows * cols.len()), &mut out, 1, 1, |first, out| {
            for (i, out) in (first..).zip(out) {
                let a = &a.full()[i * a.cols..][cols.clone()];
                let b = &b.full()[if b.rows == 1 { 0 } else { i } * b.cols..][cols.clone()];
                let sum = kernels::squared_distance(self.level(), a, b, dtype);
                *out = if precision == Precision::Dtype { self.r(sum) } else { sum };
            }
        });
        Ok(out)
    }

    fn squared_distances_grad(&self, a: &Matrix<T>, b: &Matrix<T>, g: T, out: &mut Matrix<T>) -> Result<()> {
        let cols = a.cols;
        for_rows(self.threads_for(a.rows * cols), out.overwrite(a.rows, cols), cols, 1, |first, out| {
            let part = first * cols..first * cols + out.len();
            kernels::squared_distance_grad(self.level(), &a.full()[part.clone()], &b.full()[part], g, out, self.dtype);
        });
        Ok(())
    }

    fn group_norms(&self, w: &Matrix<T>, groups: usize, out: &mut Matrix<T>) -> Result<()> {
        let d = w.cols / groups;
        let out = out.overwrite(w.rows, groups).chunks_mut((ROWS * groups).max(1));
        let blocks = pieces(0..w.rows, ROWS).zip(out);
        for_each(
            self.threads_for(w.rows * w.cols),
            blocks,
            || self.shop.scratch.take(),
            |scratch, (range, out)| {
                for (h, norms) in range.zip(out.chunks_exact_mut(groups)) {
                    let row = w.rows(h..h + 1, scratch);
                    for (norm, part) in norms.iter_mut().zip(row.chunks_exact(d)) {
                        *norm = self.r(kernels::sum_of_squares(self.level(), part).sqrt());
                    }
                }
            },
        );
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
        let (groups, cols, add) = (norms.cols, w.cols, write == Write::Add);
        let out = if add { out.full_mut(self.level()) } else { out.overwrite(w.rows, cols) };
        assert_eq!(out.len(), w.rows * cols);
        for_rows(self.threads_for(w.rows * cols), out, cols, 1, |h0, out| {
            let mut scratch = self.shop.scratch.take();
            for (i, out) in out.chunks_exact_mut(cols).enumerate() {
                self.unit_rows(w, norms, d_t, h0 + i, groups, out, add, &mut scratch);
            }
        });
        Ok(())
    }

    fn norm(&self, m: &Matrix<T>) -> Result<T> {
        let norm = m.norm_or(|| {
            let mut rows = self.shop.full.take(m.rows);
            let blocks = pieces(0..m.rows, ROWS).zip(rows.chunks_mut(ROWS));
            for_each(
                self.threads_for(m.rows * m.cols),
                blocks,
                || self.shop.scratch.take(),
                |scratch, (range, rows)| {
                    for (h, out) in range.zip(rows) {
                        *out = kernels::sum_of_squares(self.level(), m.rows(h..h + 1, scratch));
                    }
                },
            );
            self.total(&rows)
        });
        Ok(self.r(T::narrow(norm)))
    }

    fn adam(
        &self,
        p: &mut Matrix<T>,
        g: &Matrix<T>,
        m: &mut Matrix<T>,
        v: &mut Matrix<T>,
        step: &AdamStep<T>,
    ) -> Result<()> {
        let (level, dtype, cols) = (self.level(), self.dtype, p.cols);
        let at_once = (ADAM_ELEMENTS / cols.max(1)).max(1);
        let finite = AtomicBool::new(true);
        let threads = self.threads_for(p.rows * cols);
        let blocks = pieces(0..p.rows, ROWS).zip(p.pieces(ROWS)).zip(m.pieces(ROWS)).zip(v.pieces(ROWS));
        let state = || [(); 4].map(|()| self.shop.scratch.take());
        for_each(threads, blocks, state, |[sg, sp, sm, sv], (((range, mut p), mut m), mut v)| {
            for rows in pieces(range.clone(), at_once) {
                let (first, g) = ((rows.start - range.start) * cols, g.rows(rows, sg));
                for part in pieces(0..g.len(), ADAM_ELEMENTS) {
                    let (g, part) = (&g[part.clone()], first + part.start..first + part.end);
                    p.edit(part.clone(), sp, |p| {
                        m.edit(part.clone(), sm, |m| {
                            v.edit(part, sv, |v| kernels::adam(level, p, g, m, v, step, dtype))
                        });
                        if !kernels::all_finite(level, p) {
                            finite.store(false, Relaxed);
                        }
                    });
                }
            }
        });
        p.set_finite(finite.into_inner());
        Ok(())
    }
}
