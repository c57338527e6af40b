//! Products with a side of which a good part is zero, in as many terms as are not.
//!
//! At the start of training half of the latents are on: too many for lists of them, but a product that leaves the others out
//! needs half of the multiplications. Terms go in blocks of 64: a mask says which of them a row has, and their values follow
//! one another. A row of the product is added up in registers, each term reading a row of a panel of the other side that stays
//! in the first-level cache; processors load from there as fast as they multiply and add.
//!
//! The gradient of the latents is needed where they are on. There single products are formed, of rows that lie interleaved, in
//! the order of the product by tiles, which they equal to the bit ([`kernels::segment_dots`]).
//!
//! **Order of sums.** In the other products the terms of a block one after the other, then the blocks in order.

use super::kernels::{self, MASKED_COLUMNS, MASKED_TERMS};
use super::matrix::{Latents, Matrix};
use super::{Cpu, LATENT_TERMS, view_mut};
use crate::backend::Scalar;
use crate::sparse::Path;
use crate::threads::{for_each, for_rows, pieces};
use ndarray::Axis;

/// Latents are multiplied through masks where at most this share of them is not zero. With AVX2, two cores, `crosscoder bench --case
/// 768,8192,1024,L0 --op decode` took 0.307 s, dense 0.439 s, where half of them were; 0.412 s and 0.429 s at a share of 0.73.
const MASKED_SHARE: f64 = 0.75;

/// The latents' gradient is computed product by product where at most this share of them is not zero. With AVX2, two cores, `crosscoder
/// bench --case 768,8192,1024,L0 --op step` took 1.00 s so and 1.20 s by tiles where a fifth of them were, 1.58 s and 1.59 s where
/// half were.
const SUPPORT_SHARE: f64 = 0.5;

/// Rows of the reconstruction's gradient that stay in the second-level cache meanwhile.
const SUPPORT_BYTES: usize = 256 << 10;

/// Rows of a product that are formed at a time: 96 columns of 1024 are 384 KiB, and the weight is read once for them.
const TILE_ROWS: usize = 1024;

impl<T: Scalar> Cpu<T> {
    /// Whether latents that are held dense are multiplied through masks, where that is exact.
    pub(super) fn masks(&self, latents: &Latents<T>) -> bool {
        self.at_most(MASKED_SHARE, latents)
    }

    /// Whether their gradient is computed on the support alone.
    pub(super) fn masks_grad(&self, latents: &Latents<T>) -> bool {
        self.at_most(SUPPORT_SHARE, latents)
    }

    /// Pairs of bfloat16 are as fast without.
    fn at_most(&self, share: f64, latents: &Latents<T>) -> bool {
        self.path == Path::Auto
            && !latents.sparse
            && latents.rows > 0
            && !self.in_pairs()
            && self.count_active(&latents.values) as f64 <= share * latents.values.len() as f64
    }

    /// `acts · w`, unrounded. acts [rows, w.rows] dense → [rows, w.cols].
    pub(super) fn decode_masked(&self, acts: &Latents<T>, w: &Matrix<T>, out: &mut [T]) {
        let (rows, terms, cols) = (acts.rows, w.rows, w.cols);
        if rows * cols == 0 {
            return;
        }
        let threads = self.threads_for(rows * terms);
        out.fill(T::zero());
        let blocks = LATENT_TERMS.min(terms).div_ceil(MASKED_TERMS);
        let tile_rows = TILE_ROWS.min(rows);
        let mut masks = self.shop.masks.take(blocks * tile_rows);
        let mut values = self.shop.full.take(blocks * tile_rows * MASKED_TERMS);
        let tiles = pieces(0..rows, TILE_ROWS).zip(out.chunks_mut(TILE_ROWS * cols));
        for (range, out) in tiles {
            let n = range.len();
            for some in pieces(0..terms, LATENT_TERMS) {
                let blocks = pieces(some, MASKED_TERMS);
                let parts = masks.chunks_mut(n).zip(values.chunks_mut(n * MASKED_TERMS));
                for_each(
                    threads,
                    blocks.clone().zip(parts),
                    || (),
                    |_, (h, (masks, values))| {
                        let acts = &acts.values[range.start * terms + h.start..];
                        kernels::mask(self.level(), acts, terms, 1, h.len(), masks, values);
                    },
                );
                let state =
                    || (self.shop.full.take(MASKED_TERMS * MASKED_COLUMNS), self.shop.full.take(n * MASKED_COLUMNS));
                let mut out = view_mut(out, n, cols);
                let columns = pieces(0..cols, MASKED_COLUMNS).zip(out.axis_chunks_iter_mut(Axis(1), MASKED_COLUMNS));
                for_each(threads, columns, state, |(panel, tile), (range, mut out)| {
                    tile.fill(T::zero());
                    let parts = masks.chunks(n).zip(values.chunks(n * MASKED_TERMS));
                    for (h, (masks, values)) in blocks.clone().zip(parts) {
                        let panel = &mut panel[..h.len() * MASKED_COLUMNS];
                        kernels::pack(self.level(), &w.columns_side(), range.clone(), h, MASKED_COLUMNS, panel);
                        kernels::add_masked(self.level(), masks, values, panel, tile);
                    }
                    for (mut out, tile) in out.rows_mut().into_iter().zip(tile.chunks_exact(MASKED_COLUMNS)) {
                        out.iter_mut().zip(tile).for_each(|(o, &t)| *o += t);
                    }
                });
            }
        }
    }

    /// `d · wᵀ` where acts, dense, are above zero, and zero elsewhere; the bits of the product by tiles.
    pub(super) fn latents_grad_masked(
        &self,
        d: &Matrix<T>,
        w: &Matrix<T>,
        acts: &Latents<T>,
        add: bool,
        out: &mut [T],
    ) {
        let (rows, cols, terms) = (acts.rows, acts.cols, w.cols);
        if rows * cols == 0 {
            return;
        }
        let (len, threads) = (kernels::interleaved_len(terms), self.threads_for(rows * cols));
        let mut ds = self.shop.full.take(rows * len);
        for_rows(threads, &mut ds, len, 1, |first, out| {
            for (d, out) in d.full()[first * terms..].chunks_exact(terms.max(1)).zip(out.chunks_exact_mut(len)) {
                kernels::interleave(self.level(), d, out);
            }
        });
        let tile_rows = (SUPPORT_BYTES / (len * size_of::<T>()).max(1)).clamp(16, MASKED_TERMS);
        let block = self.shop.block_rows(threads, cols);
        let state = || (self.shop.full.take(block * len), self.shop.masks.take(block), self.shop.scratch.take());
        let mut out = view_mut(out, rows, cols);
        let blocks = pieces(0..cols, block).zip(out.axis_chunks_iter_mut(Axis(1), block));
        for_each(threads, blocks, state, |(ws, masks, scratch), (range, mut out)| {
            let n = range.len();
            for (h, w_row) in range.clone().zip(ws.chunks_exact_mut(len)) {
                kernels::interleave(self.level(), w.rows(h..h + 1, scratch), w_row);
            }
            for tile in pieces(0..rows, tile_rows) {
                let acts = &acts.values[tile.start * cols + range.start..];
                let masks = &mut masks[..n];
                kernels::mask(self.level(), acts, 1, cols, tile.len(), masks, &mut []);
                for (b, acts) in tile.clone().zip(acts.chunks(cols)) {
                    let mut out = out.row_mut(b);
                    out.iter_mut()
                        .zip(acts)
                        .for_each(|(o, &a)| *o = if !add || a <= T::zero() { T::zero() } else { *o });
                }
                for (j, (&mask, w_row)) in masks.iter().zip(ws.chunks_exact(len)).enumerate() {
                    let (mut on, mut left) = ([0; MASKED_TERMS], mask);
                    let on = &mut on[..mask.count_ones() as usize];
                    for t in &mut *on {
                        *t = left.trailing_zeros() as usize;
                        left &= left.wrapping_sub(1);
                    }
                    for on in on.chunks(4) {
                        let row = |i: usize| &ds[(tile.start + on[i.min(on.len() - 1)]) * len..][..len];
                        let mut products = [T::zero(); 4];
                        let (ds, products) = (&[0, 1, 2, 3].map(row)[..on.len()], &mut products[..on.len()]);
                        kernels::segment_dots(self.level(), kernels::segment_len(terms), w_row, ds, products);
                        for (&t, product) in on.iter().zip(products) {
                            // Below zero is no support.
                            if acts[t * cols + j] <= T::zero() {
                                continue;
                            }
                            let o = &mut out[[tile.start + t, j]];
                            *o = self.r(*o + self.r(*product));
                        }
                    }
                }
            }
        });
    }

    /// `latentsᵀ · y`, written into rows of `out`. latents [y.rows, rows] dense → [rows, y.cols].
    pub(super) fn weight_grad_masked(&self, latents: &Latents<T>, y: &Matrix<T>, add: bool, out: &mut [T]) {
        let (rows, terms, cols) = (latents.cols, y.rows, y.cols);
        if rows * cols == 0 {
            return;
        }
        let threads = self.threads_for(rows * cols);
        let panel_len = terms * MASKED_COLUMNS;
        let mut panels = self.shop.full.take(cols.div_ceil(MASKED_COLUMNS) * panel_len);
        let columns = pieces(0..cols, MASKED_COLUMNS);
        for_each(
            threads,
            columns.clone().zip(panels.chunks_mut(panel_len)),
            || (),
            |_, (range, panel)| {
                kernels::pack(self.level(), &y.columns_side(), range, 0..terms, MASKED_COLUMNS, panel);
            },
        );
        let block = self.shop.block_rows(threads, rows);
        let blocks = pieces(0..terms, MASKED_TERMS);
        let state = || {
            let count = blocks.clone().count() * block;
            (
                self.shop.masks.take(count),
                self.shop.full.take(count * MASKED_TERMS),
                self.shop.full.take(block * MASKED_COLUMNS),
            )
        };
        let work = pieces(0..rows, block).zip(out.chunks_mut(block * cols));
        for_each(threads, work, state, |(masks, values, tile), (range, out)| {
            let n = range.len();
            let tile = &mut tile[..n * MASKED_COLUMNS];
            let parts = masks.chunks_mut(n).zip(values.chunks_mut(n * MASKED_TERMS));
            for (b, (masks, values)) in blocks.clone().zip(parts) {
                let latents = &latents.values[b.start * rows + range.start..];
                kernels::mask(self.level(), latents, 1, rows, b.len(), masks, values);
            }
            for (columns, panel) in columns.clone().zip(panels.chunks(panel_len)) {
                tile.fill(T::zero());
                let parts = masks.chunks(n).zip(values.chunks(n * MASKED_TERMS));
                for (panel, (masks, values)) in panel.chunks(MASKED_TERMS * MASKED_COLUMNS).zip(parts) {
                    kernels::add_masked(self.level(), masks, values, panel, tile);
                }
                for (out, tile) in out.chunks_exact_mut(cols).zip(tile.chunks_exact(MASKED_COLUMNS)) {
                    let out = &mut out[columns.clone()];
                    kernels::write(self.level(), out, &tile[..out.len()], add, self.dtype);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::kernels::Level;
    use crate::backend::cpu::kernels::tests::numbers;
    use crate::backend::{Backend, Write};
    use crate::dtype::Dtype;

    fn cpu(level: Level, threads: usize) -> Cpu<f32> {
        Cpu::new(Dtype::F32).with_level(level).with_threads(threads)
    }

    fn matrix(cpu: &Cpu<f32>, rows: usize, cols: usize, values: &[f32]) -> Matrix<f32> {
        let mut out = Matrix::default();
        cpu.fill(rows, cols, values, &mut out).unwrap();
        out
    }

    /// Half of the latents on, in some rows and columns all or none.
    fn latents(batch: usize, latents: usize) -> Vec<f32> {
        let on = |i: usize, v: f32| match (i / latents % 5, i % latents % 7) {
            (3, _) | (_, 3) => 0.0,
            (4, _) | (_, 4) => v.abs() + 0.1,
            _ => v.max(0.0),
        };
        numbers(batch * latents, 1).into_iter().enumerate().map(|(i, v)| on(i, v)).collect()
    }

    /// Around the blocks of terms, the panels of columns, the tiles of rows.
    const SIZES: [[usize; 3]; 7] =
        [[1, 1, 1], [3, 63, 95], [64, 64, 96], [65, 97, 97], [130, 257, 100], [7, 4161, 5], [1030, 31, 193]];

    #[test]
    fn products_are_the_naive_ones_at_every_level() {
        for &level in Level::available() {
            for [batch, hidden, cols] in SIZES {
                let (a, w) = (latents(batch, hidden), numbers(hidden * cols, 2));
                let (y, before) = (numbers(batch * cols, 3), numbers(hidden * cols, 4));
                let mut bits = Vec::new();
                for threads in [1, 2, 3, 7] {
                    let cpu = cpu(level, threads);
                    let mut acts = Latents::default();
                    acts.overwrite_dense(batch, hidden).copy_from_slice(&a);
                    assert!(cpu.masks(&acts) || hidden == 1);
                    let (mut rec, bias) = (Matrix::default(), matrix(&cpu, 1, cols, &vec![0.0; cols]));
                    cpu.decode(&acts, &matrix(&cpu, hidden, cols, &w), &bias, &mut rec).unwrap();
                    let mut d_w = [Matrix::default(), matrix(&cpu, hidden, cols, &before)];
                    for (d_w, write) in d_w.iter_mut().zip([Write::Set, Write::Add]) {
                        cpu.weight_grad(&acts, &matrix(&cpu, batch, cols, &y), write, d_w).unwrap();
                    }
                    bits.push([rec.full(), d_w[0].full(), d_w[1].full()].map(<[f32]>::to_vec));
                }
                assert!(bits.iter().all(|b| b == &bits[0]), "threads, {} {batch} {hidden} {cols}", level.name());
                let close = |ours: &[f32], what: &str, terms: usize, naive: &dyn Fn(usize, usize) -> f64| {
                    for (i, &o) in ours.iter().enumerate() {
                        let (error, bound) = ((f64::from(o) - naive(i / cols, i % cols)).abs(), 1e-5 * terms as f64);
                        assert!(error <= bound, "{what} {i}: {error}; {} {batch} {hidden} {cols}", level.name());
                    }
                };
                let term = |a: f32, b: f32| f64::from(a) * f64::from(b);
                close(&bits[0][0], "decode", hidden, &|b, k| {
                    (0..hidden).map(|h| term(a[b * hidden + h], w[h * cols + k])).sum()
                });
                let grad = |h, k| (0..batch).map(|b| term(a[b * hidden + h], y[b * cols + k])).sum::<f64>();
                close(&bits[0][1], "weight_grad", batch, &grad);
                close(&bits[0][2], "weight_grad added", batch, &|h, k| f64::from(before[h * cols + k]) + grad(h, k));
            }
            println!("masked products tested: {}", level.name());
        }
    }

    #[test]
    fn the_latents_gradient_has_the_bits_of_the_dense_product() {
        for &level in Level::available() {
            for [batch, hidden, terms] in SIZES.into_iter().chain([[70, 300, 1536], [19, 40, 4608], [9, 33, 8200]]) {
                let (mut a, w) = (latents(batch, hidden), numbers(hidden * terms, 2));
                // A third of the others off, some below zero, one not a number.
                a.iter_mut().step_by(3).for_each(|a| *a = 0.0);
                a.iter_mut().step_by(11).for_each(|a| *a = -1.0);
                a[batch * hidden / 2] = f32::NAN;
                let (d, before) = (numbers(batch * terms, 3), numbers(batch * hidden, 4));
                let grads = |path: Path, threads: usize| {
                    let cpu = cpu(level, threads).with_path(path);
                    let (mut acts, mut out) = (Latents::default(), [Latents::default(), Latents::default()]);
                    acts.overwrite_dense(batch, hidden).copy_from_slice(&a);
                    assert!(cpu.masks_grad(&acts) == (path == Path::Auto) || batch * hidden < 9);
                    out[1].overwrite_dense(batch, hidden).copy_from_slice(&before);
                    for (out, write) in out.iter_mut().zip([Write::Set, Write::Add]) {
                        let (d, w) = (matrix(&cpu, batch, terms, &d), matrix(&cpu, hidden, terms, &w));
                        cpu.latents_grad(&d, &w, &acts, write, out).unwrap();
                    }
                    out.map(|o| o.values.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
                };
                let dense = grads(Path::Dense, 1);
                for threads in [1, 2, 3] {
                    assert!(grads(Path::Auto, threads) == dense, "{} {batch} {hidden} {terms}", level.name());
                }
            }
            println!("the latents' gradient on the support tested: {}", level.name());
        }
    }

    #[test]
    fn latents_that_are_nearly_all_on_are_multiplied_dense() {
        let cpu = cpu(Level::best(), 2);
        let mut acts = Latents::default();
        for (on, masks) in [(75, true), (76, false), (100, false)] {
            let values: Vec<f32> = (0..100).map(|i| f32::from(u8::from(i < on))).collect();
            acts.overwrite_dense(4, 25).copy_from_slice(&values);
            assert_eq!(cpu.masks(&acts), masks, "{on} %");
        }
    }

    /// A latent that is off passes on what is not finite: 0 · inf is nan.
    #[test]
    fn what_is_not_finite_is_not_skipped() {
        let (batch, hidden, cols) = (9, 130, 3);
        let cpu = cpu(Level::best(), 2);
        let mut acts = Latents::default();
        acts.overwrite_dense(batch, hidden).copy_from_slice(&latents(batch, hidden));
        let (mut w, mut y) = (numbers(hidden * cols, 2), numbers(batch * cols, 3));
        (w[3 * cols], y[3 * cols]) = (f32::INFINITY, f32::NAN);
        let (mut rec, mut d_w) = (Matrix::default(), Matrix::default());
        let bias = matrix(&cpu, 1, cols, &[0.0; 3]);
        cpu.decode(&acts, &matrix(&cpu, hidden, cols, &w), &bias, &mut rec).unwrap();
        assert!(rec.full().iter().enumerate().all(|(i, v)| v.is_nan() == (i % cols == 0)));
        cpu.weight_grad(&acts, &matrix(&cpu, batch, cols, &y), Write::Set, &mut d_w).unwrap();
        assert!(d_w.full().iter().enumerate().all(|(i, v)| v.is_nan() == (i % cols == 0)));
    }
}
