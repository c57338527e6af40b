//! The encoder: the one dense product, and the search for the few latents that it leaves above zero.
//!
//! The product [batch, d_hidden] is formed block by block of latents and never as a whole: of each block, what relu leaves
//! is kept while it lies in the cache.
//!
//! **Screening.** Where the processor multiplies pairs of bfloat16 (twice the rate of float32), float32 products are first
//! estimated in bfloat16, with a bound on the error of the estimate. Latents that are negative whatever the error are zero
//! after relu, and need nothing more. The others are computed in float32 one by one, in the order of terms of the tiled
//! product ([`kernels::segment_dots`]). So the result has the bits that it has without screening.
//!
//! The bound. Let x', w' be x and w rounded to bfloat16, s the sum as float32 carries it out and e the estimate, with errors
//! of rounding of at most γ · Σ|x·w| each (γ: [`roundings`]). By Cauchy and Schwarz
//!
//! ```text
//! |s - e| <= |Σ x·w - Σ x'·w'| + γ(‖x‖‖w‖ + ‖x'‖‖w'‖)
//!         <= ‖x‖ · ‖w - w'‖ + ‖x - x'‖ · ‖w'‖ + γ(‖x‖‖w‖ + ‖x'‖‖w'‖)
//! ```
//!
//! The latent `relu(s + b)` is zero if `e + b + bound < 0`.
//!
//! Of few rows of x the estimate is one of 8 bits an element, w' from a [`Sketch`] and x' = x: there it is memory that screening
//! saves.

use super::kernels::{self, segment_groups, segment_len};
use super::matrix::{Found, Latents, Matrix, not_zero};
use super::product::{BLOCK_ROWS, PAIR_SEGMENT, Packed, Resident};
use super::sketch::Sketch;
use super::{Cpu, view_mut};
use crate::backend::Scalar;
use crate::dtype::Dtype;
use crate::threads::{for_each, for_rows, pieces};
use ndarray::Axis;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Up to this many rows of x, single products are formed instead of tiles: below it, reading the weight is what takes time.
const FEW_ROWS: usize = 8;

/// Rows of x that are worked on at a time: their packed form, 19 MB for 1024 rows of 4608, should fit the last-level cache.
const BATCH_ROWS: usize = 1024;

/// Products of fewer terms or rows than this are not screened.
const SCREENED_TERMS: usize = 256;
const SCREENED_ROWS: usize = 64;

/// A block of which more than this share could be positive is multiplied as a whole. Measured (4608 terms, AVX-512) when single
/// products were no vectors yet and took some eight times as long as products in tiles: now a larger one may pay.
const SCREENED_SHARE: f64 = 0.06;

/// The same for few rows, where both take as long as reading the weights does.
const SKETCHED_SHARE: f64 = 0.5;

/// Weights of fewer elements are read as fast from the caches. (Tests are about small ones.)
const SKETCHED_ELEMENTS: usize = if cfg!(test) { 1 << 10 } else { 1 << 23 };

/// After a block that screening did not help, this many go without.
const UNSCREENED_BLOCKS: usize = 7;

/// Rows of x, and their forms that products need.
struct Rows<'a, T> {
    x: &'a Matrix<T>,
    w: &'a Matrix<T>,
    bias: &'a [T],
    /// The rows of x.
    range: Range<usize>,
    threads: usize,
    /// Packed for products that are not screened; made when first needed.
    packed: OnceLock<Packed<T>>,
    screen: Option<Screen<'a, T>>,
}

/// What products are estimated from.
enum Estimate<'a, T> {
    /// x in pairs of bfloat16.
    Pairs(Packed<T>),
    Sketch(&'a Sketch<T>),
}

/// What screening needs of x.
struct Screen<'a, T> {
    estimate: Estimate<'a, T>,
    /// Interleaved rows.
    rows: super::buffers::Buffer<T>,
    /// For each row of x at least ‖x‖ and ‖x - x'‖.
    norms: Vec<[f32; 2]>,
    /// The largest ‖x‖.
    largest: f32,
}

/// Working memory of a thread.
struct State<T> {
    tile: super::buffers::Buffer<T>,
    unscreened: usize,
}

/// γ: at most this many roundings of relative error 2^-24 touch a term, in the tiled sum and in the estimate (where a pair
/// may round four times, or each of 64 lanes), with some room.
fn roundings(k: usize) -> f32 {
    let segments = 16 * segment_groups(k) + k.div_ceil(PAIR_SEGMENT) + k.div_ceil(kernels::GROUP);
    (segment_len(k) + 2 * PAIR_SEGMENT.min(k) + segments + 16) as f32 * 2f32.powi(-24)
}

/// At least the norm of `k` numbers whose squares sum to `squares` in float32. Squares of numbers below 2^-60 may be lost.
pub(super) fn norm_bound(squares: f32, k: usize) -> f32 {
    squares.sqrt() * 1.001 + (k as f32).sqrt() * 2f32.powi(-60)
}

impl<T: Scalar> Cpu<T> {
    /// `out = r(r(x · wᵀ) + b)`, or relu of it, dense: [x.rows, w.rows].
    pub(super) fn linear_into(&self, x: &Matrix<T>, w: &Matrix<T>, bias: &[T], relu: bool, out: &mut [T]) {
        self.product_nt(x, w, out, |_, h, product, out| {
            kernels::finish(self.level(), product, &bias[h], relu, self.dtype);
            out.copy_from_slice(product);
        });
    }

    /// `x · wᵀ`, unrounded; `finish(b, h, product, out)` on each part `h` of a row b writes it to that part of out.
    pub(super) fn product_nt(
        &self,
        x: &Matrix<T>,
        w: &Matrix<T>,
        out: &mut [T],
        finish: impl Fn(usize, Range<usize>, &mut [T], &mut [T]) + Sync,
    ) {
        assert_eq!(x.cols, w.cols, "both have rows of one width");
        if x.rows * w.rows == 0 {
            return;
        }
        for range in pieces(0..x.rows, BATCH_ROWS) {
            let first = range.start;
            let out = &mut out[range.start * w.rows..range.end * w.rows];
            let rows = Rows::new(self, x, w, &[], range, false);
            let block = self.block(&rows);
            let mut out = view_mut(out, rows.range.len(), w.rows);
            let blocks = pieces(0..w.rows, block).zip(out.axis_chunks_iter_mut(Axis(1), block));
            for_each(
                rows.threads,
                blocks,
                || self.state(&rows, block),
                |state, (h, mut out)| {
                    let tile = &mut state.tile[..rows.range.len() * h.len()];
                    self.multiply(&rows, h.clone(), tile);
                    for (b, (mut out, tile)) in
                        out.rows_mut().into_iter().zip(tile.chunks_exact_mut(h.len())).enumerate()
                    {
                        let out = out.as_slice_mut().expect("a part of a row is contiguous");
                        finish(first + b, h.clone(), tile, out);
                    }
                },
            );
        }
    }

    /// `relu(linear(x, w, b))`, held as a support if it has at most `limit` entries: then returns true. Otherwise `out` is
    /// unspecified.
    pub(super) fn encode_sparse(
        &self,
        x: &Matrix<T>,
        w: &Matrix<T>,
        bias: &[T],
        limit: usize,
        out: &mut Latents<T>,
    ) -> bool {
        assert_eq!(x.cols, w.cols, "both have rows of one width");
        assert!(u32::try_from(w.rows).is_ok(), "more than 2^32 latents");
        out.begin_sparse(w.rows);
        let (active, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let mut found = std::mem::take(&mut out.found);
        for range in pieces(0..x.rows, BATCH_ROWS) {
            let rows = Rows::new(self, x, w, bias, range, true);
            let block = self.block(&rows);
            found.resize_with(w.rows.div_ceil(block), Found::default);
            let blocks = pieces(0..w.rows, block).zip(&mut found);
            for_each(
                rows.threads,
                blocks,
                || self.state(&rows, block),
                |state, (h, found)| {
                    let (n, seen) = (active.load(Relaxed), done.load(Relaxed));
                    // Too many already, or soon: half as many again as would be allowed so far.
                    let hopeless =
                        n > limit || (2 * n) as f64 * (x.rows * w.rows) as f64 > 3.0 * limit as f64 * seen as f64;
                    found.done = !(hopeless && seen > 0);
                    if found.done {
                        self.encode_block(&rows, state, h.clone(), found);
                        active.fetch_add(found.values.len(), Relaxed);
                        done.fetch_add(rows.range.len() * h.len(), Relaxed);
                    }
                },
            );
            if active.load(Relaxed) > limit || found.iter().any(|f| !f.done) {
                out.found = found;
                return false;
            }
            let mut at = vec![0; found.len()];
            for b in 0..rows.range.len() {
                for (found, at) in found.iter().zip(&mut at) {
                    let entries = *at..*at + found.counts[b] as usize;
                    *at = entries.end;
                    out.columns.extend_from_slice(&found.columns[entries.clone()]);
                    out.values.extend_from_slice(&found.values[entries]);
                }
                out.end_row();
            }
        }
        out.found = found;
        out.end_sparse();
        true
    }

    /// One block of latents, `h`.
    fn encode_block(&self, rows: &Rows<'_, T>, state: &mut State<T>, h: Range<usize>, found: &mut Found<T>) {
        let State { tile, unscreened } = state;
        let tile = &mut tile[..rows.range.len() * h.len()];
        let screened = match &rows.screen {
            Some(screen) if *unscreened == 0 => {
                let screened = self.screen_block(rows, screen, h.clone(), tile, &mut found.candidates);
                *unscreened = if screened { 0 } else { UNSCREENED_BLOCKS };
                screened
            }
            _ => {
                *unscreened = unscreened.saturating_sub(1);
                false
            }
        };
        if !screened {
            self.multiply(rows, h.clone(), tile);
        }
        found.counts.clear();
        found.columns.clear();
        found.values.clear();
        for row in tile.chunks_exact_mut(h.len()) {
            if !screened {
                kernels::finish(self.level(), row, &rows.bias[h.clone()], true, self.dtype);
            }
            let before = found.values.len();
            not_zero(row, |j, v| {
                found.columns.push((h.start + j) as u32);
                found.values.push(v);
            });
            found.counts.push((found.values.len() - before) as u32);
        }
    }

    /// Fills the tile with what relu leaves, by screening; false if too many latents could be positive: then the tile is
    /// unspecified.
    fn screen_block(
        &self,
        rows: &Rows<'_, T>,
        screen: &Screen<'_, T>,
        h: Range<usize>,
        tile: &mut [T],
        candidates: &mut Vec<(u32, u32)>,
    ) -> bool {
        let (k, n) = (rows.x.cols, h.len());
        let narrow = |v: f32| T::narrow(f64::from(v));
        let gamma = roundings(k);
        let share = match &screen.estimate {
            Estimate::Pairs(packed) => {
                packed.times(&self.shop, &rows.w.rows_side(), h.clone(), tile);
                SCREENED_SHARE
            }
            Estimate::Sketch(sketch) => {
                sketch.times(self, rows.x_rows(), h.clone(), tile);
                SKETCHED_SHARE
            }
        };
        let mut thresholds = [T::zero(); BLOCK_ROWS];
        let (mut w_errors, mut w_norms) = (thresholds, thresholds);
        let mut scratch = self.shop.scratch.take();
        for (j, h) in h.clone().enumerate() {
            let [norm, error] = match &screen.estimate {
                Estimate::Pairs(_) => {
                    let w = rows.w.rows(h..h + 1, &mut scratch);
                    kernels::rounding_squares(self.level(), w).map(|squares| norm_bound(squares, k))
                }
                Estimate::Sketch(sketch) => sketch.bounds(h),
            };
            let rounded = norm + error;
            // The sums stay far from overflow, or nothing is claimed.
            let claim = if rounded * screen.largest < 1e37 { 1.0 } else { f32::NAN };
            w_errors[j] = narrow(claim * (error + gamma * norm + 2.0 * gamma * rounded));
            w_norms[j] = narrow(rounded);
            let bias = rows.bias[h].wide() as f32;
            thresholds[j] = narrow(bias + bias.abs() * 2f32.powi(-20) + 2f32.powi(-90));
        }
        candidates.clear();
        let most = (share * tile.len() as f64) as usize;
        for (b, row) in tile.chunks_exact_mut(n).enumerate() {
            let x = screen.norms[b].map(narrow);
            kernels::candidates(self.level(), b as u32, row, &thresholds, x, &w_errors, &w_norms, candidates);
            if candidates.len() > most {
                return false;
            }
        }
        // By latent, so that each row of w is laid out once.
        candidates.sort_unstable();
        tile.fill(T::zero());
        let len = screen.rows.len() / rows.range.len();
        let mut row = self.shop.full.take(len);
        for same in candidates.chunk_by(|a, b| a.0 == b.0) {
            let (j, latent) = (same[0].0 as usize, h.start + same[0].0 as usize);
            kernels::interleave(self.level(), rows.w.rows(latent..latent + 1, &mut scratch), &mut row);
            for four in same.chunks(4) {
                let mut out = [T::zero(); 4];
                let others = [0, 1, 2, 3].map(|i| {
                    let b = four.get(i).map_or(0, |c| c.1 as usize);
                    &screen.rows[b * len..(b + 1) * len]
                });
                let out = &mut out[..four.len()];
                kernels::segment_dots(self.level(), segment_len(k), &row, &others[..four.len()], out);
                for (&(_, b), v) in four.iter().zip(out) {
                    let bias = &rows.bias[latent..latent + 1];
                    kernels::finish(self.level(), std::slice::from_mut(v), bias, true, self.dtype);
                    tile[b as usize * n + j] = *v;
                }
            }
        }
        true
    }

    /// `tile = x · w[h]ᵀ`, unrounded.
    fn multiply(&self, rows: &Rows<'_, T>, h: Range<usize>, tile: &mut [T]) {
        let (k, n) = (rows.x.cols, h.len());
        let pairs = self.in_pairs();
        if rows.range.len() > FEW_ROWS {
            let packed = rows.packed.get_or_init(|| rows.pack(self, 1));
            return packed.times(&self.shop, &rows.w.rows_side(), h, tile);
        }
        let mut scratch = self.shop.scratch.take();
        if pairs {
            for (j, h) in h.enumerate() {
                let w = rows.w.rows(h..h + 1, &mut scratch);
                for (i, b) in rows.range.clone().enumerate() {
                    tile[i * n + j] = kernels::dot(self.level(), &rows.x.full()[b * k..(b + 1) * k], w);
                }
            }
            return;
        }
        let len = kernels::interleaved_len(k);
        let mut x = self.shop.full.take(rows.range.len() * len);
        for (b, out) in rows.range.clone().zip(x.chunks_exact_mut(len)) {
            kernels::interleave(self.level(), &rows.x.full()[b * k..(b + 1) * k], out);
        }
        let mut row = self.shop.full.take(len);
        for (j, h) in h.enumerate() {
            kernels::interleave(self.level(), rows.w.rows(h..h + 1, &mut scratch), &mut row);
            let mut out = [T::zero(); FEW_ROWS];
            let mut others: [&[T]; FEW_ROWS] = [&[]; FEW_ROWS];
            others.iter_mut().zip(x.chunks_exact(len)).for_each(|(o, x)| *o = x);
            let m = rows.range.len();
            kernels::segment_dots(self.level(), segment_len(k), &row, &others[..m], &mut out[..m]);
            (0..m).for_each(|i| tile[i * n + j] = out[i]);
        }
    }

    /// Whether products are screened: in float32, where pairs of bfloat16 can be multiplied.
    fn screens(&self) -> bool {
        self.dtype == Dtype::F32 && self.level().has_pairs() && size_of::<T>() == size_of::<f32>()
    }

    /// Whether products of few rows are screened by sketches.
    fn sketches(&self) -> bool {
        self.dtype == Dtype::F32 && size_of::<T>() == size_of::<f32>()
    }

    fn block(&self, rows: &Rows<'_, T>) -> usize {
        self.shop.block_rows(rows.threads, rows.w.rows)
    }

    fn state(&self, rows: &Rows<'_, T>, block: usize) -> State<T> {
        State { tile: self.shop.full.take(rows.range.len() * block), unscreened: 0 }
    }
}

impl<'a, T: Scalar> Rows<'a, T> {
    fn new(
        cpu: &Cpu<T>,
        x: &'a Matrix<T>,
        w: &'a Matrix<T>,
        bias: &'a [T],
        range: Range<usize>,
        screened: bool,
    ) -> Self {
        let threads = cpu.threads_for(range.len() * w.rows * w.cols / 64);
        let mut rows = Rows { x, w, bias, range, threads, packed: OnceLock::new(), screen: None };
        let few = rows.range.len() <= FEW_ROWS;
        if screened && cpu.screens() && x.cols >= SCREENED_TERMS && rows.range.len() >= SCREENED_ROWS {
            rows.screen = Some(rows.screen(cpu));
        } else if few {
            let sketched = screened && cpu.sketches() && w.rows * w.cols >= SKETCHED_ELEMENTS;
            let sketch = if sketched { w.sketch(cpu) } else { None };
            rows.screen = sketch.map(|sketch| rows.sketched(cpu, sketch));
        } else {
            rows.packed = rows.pack(cpu, threads).into();
        }
        rows
    }

    fn x_rows(&self) -> &'a [T] {
        &self.x.full()[self.range.start * self.x.cols..self.range.end * self.x.cols]
    }

    fn side(&self) -> kernels::Side<'a, T> {
        let source = kernels::Source::Full(self.x_rows());
        kernels::Side { source, rows: self.range.len(), row_stride: self.x.cols, term_stride: 1 }
    }

    fn pack(&self, cpu: &Cpu<T>, threads: usize) -> Packed<T> {
        let k = self.x.cols;
        let segment = if cpu.in_pairs() { PAIR_SEGMENT } else { segment_len(k) };
        cpu.shop.pack(threads, &self.side(), Resident::Left, 0..k, segment, cpu.in_pairs())
    }

    /// Screening by pairs of bfloat16.
    fn screen(&self, cpu: &Cpu<T>) -> Screen<'a, T> {
        let k = self.x.cols;
        let packed = cpu.shop.pack(self.threads, &self.side(), Resident::Left, 0..k, PAIR_SEGMENT, true);
        self.screen_by(cpu, Estimate::Pairs(packed), |row| {
            kernels::rounding_squares(cpu.level(), row).map(|squares| norm_bound(squares, k))
        })
    }

    /// Screening by a sketch of w.
    fn sketched(&self, cpu: &Cpu<T>, sketch: &'a Sketch<T>) -> Screen<'a, T> {
        self.screen_by(cpu, Estimate::Sketch(sketch), |row| {
            [norm_bound(kernels::sum_of_squares(cpu.level(), row).wide() as f32, row.len()), 0.0]
        })
    }

    /// `norms` gives at least ‖x‖ and ‖x - x'‖ of a row.
    fn screen_by(&self, cpu: &Cpu<T>, estimate: Estimate<'a, T>, norms: impl Fn(&[T]) -> [f32; 2]) -> Screen<'a, T> {
        let k = self.x.cols;
        let len = kernels::interleaved_len(k);
        let mut rows = cpu.shop.full.take(self.range.len() * len);
        let row = |i: usize| &self.x_rows()[i * k..(i + 1) * k];
        for_rows(self.threads, &mut rows, len, 1, |first, out| {
            for (i, out) in out.chunks_exact_mut(len).enumerate() {
                kernels::interleave(cpu.level(), row(first + i), out);
            }
        });
        let norms: Vec<[f32; 2]> = (0..self.range.len()).map(|i| norms(row(i))).collect();
        let largest = norms.iter().fold(0f32, |largest, n| largest.max(n[0]));
        Screen { estimate, rows, norms, largest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::backend::cpu::kernels::Level;
    use crate::backend::cpu::kernels::tests::numbers;
    use crate::sparse::Path;
    use crate::tensor::Values;

    /// The bits of `encode` and how many there are, at this level and path.
    fn encode(level: Level, path: Path, x: &[f32], w: &[f32], b: &[f32]) -> Vec<u32> {
        let cpu = Cpu::<f32>::new(Dtype::F32).with_path(path).with_level(level).with_threads(2);
        let (h, k) = (b.len(), w.len() / b.len());
        let (mut xm, mut latents) = (Matrix::default(), Latents::default());
        cpu.fill(x.len() / k, k, x, &mut xm).unwrap();
        let wm = cpu.upload(h, k, Values::F32(w.to_vec())).unwrap();
        let bm = cpu.upload(1, h, Values::F32(b.to_vec())).unwrap();
        cpu.encode(&xm, &wm, &bm, &mut latents).unwrap();
        let mut out = vec![0.0; x.len() / k * h];
        cpu.download_latents(&latents, &mut out).unwrap();
        bits(&out)
    }

    /// Which nan it is, and the sign of a zero, are nobody's.
    fn bits(v: &[f32]) -> Vec<u32> {
        v.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { (v + 0.0).to_bits() }).collect()
    }

    /// With screening, without it, dense: one result, to the bit.
    fn assert_screening_changes_nothing(what: &str, x: &[f32], w: &[f32], b: &[f32]) {
        let dense = encode(Level::best(), Path::Dense, x, w, b);
        for &level in Level::available() {
            let own = encode(level, Path::Dense, x, w, b);
            assert_eq!(encode(level, Path::Sparse, x, w, b), own, "{what}: sparse, {}", level.name());
            if level != Level::available()[0] {
                assert_eq!(own, dense, "{what}: {} and {}", level.name(), Level::best().name());
            }
        }
        if !Level::best().has_pairs() {
            println!("NOT tested: screening; this processor has no AVX512-BF16");
        }
    }

    const BATCH: usize = 77;
    const HIDDEN: usize = 333;
    const TERMS: usize = 601;

    #[test]
    fn screening_changes_no_bit() {
        let (x, w) = (numbers(BATCH * TERMS, 1), numbers(HIDDEN * TERMS, 2));
        // Pre-activations have a deviation of 8. None, few, half, all are on.
        for bias in [-100.0, -20.0, -16.0, 0.0, 100.0] {
            assert_screening_changes_nothing(&format!("bias {bias}"), &x, &w, &[bias; HIDDEN]);
        }
    }

    #[test]
    fn screening_changes_no_bit_next_to_zero() {
        let (what, x, w, b) = numbers_on_the_edge();
        assert_screening_changes_nothing(what, &x, &w, &b);
    }

    /// Biases that put the pre-activation of one row in 77 exactly on zero or one place beside it, the others below: few enough to
    /// be screened, and what is on is so by the last bit.
    fn numbers_on_the_edge() -> Numbers {
        let (x, w) = (numbers(BATCH * TERMS, 3), numbers(HIDDEN * TERMS, 4));
        let pre = {
            let cpu = Cpu::<f32>::new(Dtype::F32);
            let mut m = Matrix::default();
            cpu.fill(BATCH, TERMS, &x, &mut m).unwrap();
            let wm = cpu.upload(HIDDEN, TERMS, Values::F32(w.clone())).unwrap();
            let mut out = vec![0.0; BATCH * HIDDEN];
            cpu.linear_into(&m, &wm, &[0.0; HIDDEN], false, &mut out);
            out
        };
        let b: Vec<f32> = (0..HIDDEN)
            .map(|h| {
                let bias = -(0..BATCH).map(|b| pre[b * HIDDEN + h]).fold(f32::NEG_INFINITY, f32::max);
                [bias, bias.next_up(), bias.next_down()][h % 3]
            })
            .collect();
        ("on the edge", x, w, b)
    }

    #[test]
    fn screening_changes_no_bit_of_extreme_numbers() {
        for (what, x, w, b) in extreme_numbers() {
            assert_screening_changes_nothing(what, &x, &w, &b);
        }
    }

    /// Encoded again and again until there is a sketch: one result, to the bit.
    #[test]
    fn a_sketch_changes_no_bit() {
        let (x, w) = (numbers(BATCH * TERMS, 1), numbers(HIDDEN * TERMS, 2));
        let plain =
            [-100.0, -20.0, -16.0, -8.0, 0.0, 100.0].map(|bias| ("bias", x.clone(), w.clone(), vec![bias; HIDDEN]));
        for (what, x, w, b) in plain.into_iter().chain(extreme_numbers()).chain([numbers_on_the_edge()]) {
            for &level in Level::available() {
                let cpu = Cpu::<f32>::new(Dtype::F32).with_level(level).with_threads(2);
                let wm = cpu.upload(HIDDEN, TERMS, Values::F32(w.clone())).unwrap();
                let bm = cpu.upload(1, HIDDEN, Values::F32(b.clone())).unwrap();
                let encode = |rows: Range<usize>| {
                    let (mut xm, mut latents) = (Matrix::default(), Latents::default());
                    cpu.fill(rows.len(), TERMS, &x[rows.start * TERMS..rows.end * TERMS], &mut xm).unwrap();
                    cpu.encode(&xm, &wm, &bm, &mut latents).unwrap();
                    let mut out = vec![0.0; rows.len() * HIDDEN];
                    cpu.download_latents(&latents, &mut out).unwrap();
                    bits(&out)
                };
                let all = encode(0..BATCH);
                let few: Vec<Range<usize>> = (0..BATCH).map(|b| b..(b + 1 + b % FEW_ROWS).min(BATCH)).collect();
                for rows in few {
                    let ours = encode(rows.clone());
                    assert_eq!(ours, all[rows.start * HIDDEN..rows.end * HIDDEN], "{what} {rows:?} {}", level.name());
                }
                assert!(wm.has_sketch());
            }
        }
    }

    #[test]
    fn a_sketch_goes_with_the_elements() {
        let cpu = Cpu::<f32>::new(Dtype::F32);
        let (mut xm, mut latents) = (Matrix::default(), Latents::default());
        cpu.fill(1, TERMS, &numbers(TERMS, 1), &mut xm).unwrap();
        let mut wm = cpu.upload(HIDDEN, TERMS, Values::F32(numbers(HIDDEN * TERMS, 2))).unwrap();
        let bm = cpu.upload(1, HIDDEN, Values::F32(vec![-16.0; HIDDEN])).unwrap();
        for _ in 0..3 {
            assert!(!wm.has_sketch());
            cpu.encode(&xm, &wm, &bm, &mut latents).unwrap();
        }
        assert!(wm.has_sketch());
        wm.full_mut(cpu.level())[0] = 1.0;
        assert!(!wm.has_sketch());
    }

    /// What it is, activations, weights, biases.
    type Numbers = (&'static str, Vec<f32>, Vec<f32>, Vec<f32>);

    fn extreme_numbers() -> Vec<Numbers> {
        let (mut x, mut w) = (numbers(BATCH * TERMS, 5), numbers(HIDDEN * TERMS, 6));
        let mut b = vec![-12.0; HIDDEN];
        // Columns as far apart as activations have them, and a row of each extreme.
        (0..BATCH).for_each(|i| x[i * TERMS + 7] *= 3000.0);
        x[..TERMS].iter_mut().for_each(|v| *v *= 1e30);
        x[TERMS..2 * TERMS].iter_mut().for_each(|v| *v *= 1e-30);
        x[2 * TERMS..3 * TERMS].iter_mut().for_each(|v| *v *= 1e-42);
        w[..TERMS].iter_mut().for_each(|v| *v *= 1e25);
        w[TERMS..2 * TERMS].iter_mut().for_each(|v| *v *= 1e-25);
        w[2 * TERMS..3 * TERMS].iter_mut().for_each(|v| *v *= 1e-44);
        w[3 * TERMS..4 * TERMS].fill(0.0);
        w[4 * TERMS..5 * TERMS].fill(3e38);
        (b[1], b[2], b[3]) = (-1e-24, 0.0, 0.0);
        (b[5], b[6], b[7]) = (-3e38, 1e-40, -1e-40);
        let finite = ("extreme", x.clone(), w.clone(), b.clone());
        (x[5 * TERMS], x[6 * TERMS + 1], x[8 * TERMS + 600]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        (w[9 * TERMS + 3], w[10 * TERMS], b[11], b[12]) = (f32::NAN, f32::NEG_INFINITY, f32::NAN, f32::INFINITY);
        b[13] = f32::NEG_INFINITY;
        vec![finite, ("not finite", x, w, b)]
    }

    #[test]
    fn rows_have_the_same_bits_in_any_batch() {
        let (x, w) = (numbers(BATCH * TERMS, 8), numbers(HIDDEN * TERMS, 9));
        let b = vec![-3.0; HIDDEN];
        let all = encode(Level::best(), Path::Auto, &x, &w, &b);
        for rows in [1, 2, FEW_ROWS, FEW_ROWS + 1, SCREENED_ROWS] {
            assert_eq!(encode(Level::best(), Path::Auto, &x[..rows * TERMS], &w, &b), all[..rows * HIDDEN], "{rows}");
        }
    }
}
