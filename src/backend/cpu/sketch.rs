//! A float32 weight in 8 bits an element, for screening few rows of activations.
//!
//! `encode` of one row reads every weight once: memory is what it waits for. The sketch is a quarter of that memory, and
//! tells of nearly all latents that they are below zero whatever was lost ([`super::encode`]); the weights of the others
//! are then read. Elements lie in groups of [`GROUP`] with a scale each: `w' = scale · code`, `code` in -127 … 127.

use super::Cpu;
use super::kernels::{self, GROUP};
use super::matrix::Matrix;
use crate::backend::Scalar;
use crate::threads::{for_each, pieces};
use std::ops::Range;

/// Rows that a thread takes at a time.
const ROWS: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct Sketch<T> {
    cols: usize,
    codes: Vec<i8>,
    /// For each row those of its groups.
    scales: Vec<T>,
    /// For each row w at least `‖w‖` and `‖w - w'‖`.
    bounds: Vec<[f32; 2]>,
}

impl<T: Scalar> Sketch<T> {
    pub(super) fn new(cpu: &Cpu<T>, w: &Matrix<T>) -> Self {
        let (rows, cols) = (w.rows, w.cols);
        let groups = cols.div_ceil(GROUP);
        let mut sketch = Sketch {
            cols,
            codes: vec![0; rows * cols],
            scales: vec![T::zero(); rows * groups],
            bounds: vec![[0.0; 2]; rows],
        };
        let parts = sketch.codes.chunks_mut((ROWS * cols).max(1)).zip(sketch.scales.chunks_mut((ROWS * groups).max(1)));
        let parts = pieces(0..rows, ROWS).zip(parts.zip(sketch.bounds.chunks_mut(ROWS)));
        let scratch = || cpu.shop.scratch.take();
        for_each(cpu.threads_for(rows * cols), parts, scratch, |scratch, (range, ((codes, scales), bounds))| {
            for (i, h) in range.enumerate() {
                let row = w.rows(h..h + 1, scratch);
                let (codes, scales) = (&mut codes[i * cols..][..cols], &mut scales[i * groups..][..groups]);
                let [squares, errors] = kernels::sketch(cpu.level(), row, codes, scales);
                bounds[i] = [squares, errors].map(|s| super::encode::norm_bound(s.wide() as f32, cols));
            }
        });
        sketch
    }

    /// `tile[b,j] = x[b] · w'[h + j]`, about; `x` rows of the sketch's width.
    pub(super) fn times(&self, cpu: &Cpu<T>, x: &[T], h: Range<usize>, tile: &mut [T]) {
        let (cols, groups, n) = (self.cols, self.cols.div_ceil(GROUP), h.len());
        for (j, h) in h.enumerate() {
            let (codes, scales) = (&self.codes[h * cols..][..cols], &self.scales[h * groups..][..groups]);
            for (b, x) in x.chunks_exact(cols).enumerate() {
                tile[b * n + j] = kernels::sketch_dot(cpu.level(), x, codes, scales);
            }
        }
    }

    /// At least `‖w‖` and `‖w - w'‖` of row `h`.
    pub(super) fn bounds(&self, h: usize) -> [f32; 2] {
        self.bounds[h]
    }
}
