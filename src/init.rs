//! The weights of the original's `__init__`, bit for bit.
//!
//! The original draws `W_enc`, throws it away, draws `W_dec`, and makes `W_enc` a transposed copy of it. Here the first
//! draw is skipped by running the generator alone. The second is cut into runs of whole rows: whoever takes the next run
//! takes with it a copy of the generator and leaves the generator behind the run. So the threads share no more than the
//! twist, and any number of them gives the same bits.

use crate::autodiff::Parameters;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::rng::{BLOCK, Mt19937, Normal};
use crate::tensor::{Tensor, element_count};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use std::sync::{Mutex, PoisonError};

/// About how many weights a thread takes at a time.
const RUN: usize = 1 << 16;

/// The weights that `CrossCoder.__init__` makes from `seed`:
/// `W_dec = W / ‖W‖ · dec_init_norm` with `W` the second `normal_` after `torch.manual_seed(seed)` and the norm over
/// d_in, `W_enc[m,i,h] = W_dec[h,m,i]`, biases zero.
///
/// `W_enc` [n_models, d_in, d_hidden], lying as `W_dec` does; `W_dec` [d_hidden, n_models, d_in]; `b_enc` [d_hidden];
/// `b_dec` [n_models, d_in]; all in `dtype`. The draw is rounded to `dtype`, then the norm, the quotient, the product.
/// Original: `CrossCoder.__init__`, where n_models is 2.
///
/// # Errors
/// A seed that PyTorch refuses, a dtype other than float32, float16, bfloat16, a size of 0, sizes that memory cannot hold.
pub fn initial_weights(
    seed: i128,
    d_hidden: usize,
    n_models: usize,
    d_in: usize,
    dtype: Dtype,
    dec_init_norm: f64,
) -> Result<Parameters<Tensor>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let shape = [d_hidden, n_models, d_in];
    match dtype {
        Dtype::F32 => weights::<f32>(seed, shape, dec_init_norm, threads),
        Dtype::F16 => weights::<f16>(seed, shape, dec_init_norm, threads),
        Dtype::BF16 => weights::<bf16>(seed, shape, dec_init_norm, threads),
        _ => Err(Error::config(format!("weights in {dtype}: they must be float32, float16 or bfloat16"))),
    }
}

fn weights<T: Weight>(seed: i128, shape: [usize; 3], scale: f64, threads: usize) -> Result<Parameters<Tensor>> {
    let rng = Mt19937::new(seed)?;
    let [d_hidden, n_models, d_in] = shape;
    let too_large = || Error::config(format!("weights [{d_hidden}, {n_models}, {d_in}] do not fit in memory"));
    let n = element_count(&shape).filter(|n| n.checked_mul(2 * size_of::<T>()).is_some()).ok_or_else(too_large)?;
    if n == 0 {
        return Err(Error::config(format!("weights [{d_hidden}, {n_models}, {d_in}]: no size may be 0")));
    }
    let mut w_dec = zeros::<T>(n).ok_or_else(too_large)?;
    let mut w_enc = zeros::<T>(n).ok_or_else(too_large)?;
    fill(rng, &mut w_dec, &mut w_enc, d_in, scale as f32, threads);
    Ok(Parameters {
        w_enc: Tensor::new(shape.to_vec(), T::wrap(w_enc))?.permuted(&[1, 2, 0]),
        w_dec: Tensor::new(shape.to_vec(), T::wrap(w_dec))?,
        b_enc: Tensor::new(vec![d_hidden], T::wrap(vec![T::default(); d_hidden]))?,
        b_dec: Tensor::new(vec![n_models, d_in], T::wrap(vec![T::default(); n_models * d_in]))?,
    })
}

/// `n` zeros in memory that the system has not touched yet, or none if it has no room for them.
fn zeros<T: Weight>(n: usize) -> Option<Vec<T>> {
    // `vec![0; n]` takes zeroed pages as they are, but a refusal ends the process: hence the question before it.
    Vec::<T>::new().try_reserve_exact(n).ok()?;
    Some(T::zeros(n))
}

/// Fills both with the normalised second draw of `rng`.
fn fill<T: Weight>(mut rng: Mt19937, w_dec: &mut [T], w_enc: &mut [T], d_in: usize, scale: f32, threads: usize) {
    let n = w_dec.len();
    if n < BLOCK {
        rng.normal_fill(w_dec); // thrown away
        rng.normal_fill(w_dec);
        normalise(w_dec, d_in, scale);
        w_enc.copy_from_slice(w_dec);
        return;
    }
    rng.skip(Mt19937::normal_words::<T>(n));
    // Runs are whole rows and whole blocks; the last one takes the rest, thus never less than a block. A draw into such
    // a run is the draw's part there: only what lies behind the last whole block is drawn otherwise, and that is the
    // end of the last run.
    let unit = BLOCK * d_in;
    let run = unit.saturating_mul((RUN / unit).max(1));
    let runs = (n / run).max(1);
    let rest = Mutex::new((rng, w_dec, w_enc));
    let next = || {
        // Nothing below panics, and a run that was taken stays taken.
        let mut rest = rest.lock().unwrap_or_else(PoisonError::into_inner);
        let (rng, w_dec, w_enc) = &mut *rest;
        let left = w_dec.len();
        let len = if left / 2 < run { left } else { run };
        if len == 0 {
            return None;
        }
        let dec = w_dec.split_off_mut(..len)?;
        let enc = w_enc.split_off_mut(..len)?;
        let here = rng.clone();
        rng.skip(Mt19937::normal_words::<T>(len));
        Some((here, dec, enc))
    };
    let work = || {
        while let Some((mut rng, dec, enc)) = next() {
            rng.normal_fill(dec);
            normalise(dec, d_in, scale);
            enc.copy_from_slice(dec);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(runs) {
            scope.spawn(work);
        }
        work();
    });
}

/// `row = row / ‖row‖ · scale` for each row of d_in weights, rounded after the norm, the quotient and the product.
fn normalise<T: Weight>(rows: &mut [T], d_in: usize, scale: f32) {
    let mut wide = vec![0.0; d_in];
    let mut narrow = vec![T::default(); d_in];
    for row in rows.chunks_exact_mut(d_in) {
        T::widen_slice(row, &mut wide);
        let norm = T::DTYPE.round(if d_in == 1 { wide[0].abs() } else { T::sum_of_squares(&wide).sqrt() });
        wide.iter_mut().for_each(|w| *w /= norm);
        T::round_slice(&wide, &mut narrow);
        T::widen_slice(&narrow, &mut wide);
        wide.iter_mut().for_each(|w| *w *= scale);
        T::round_slice(&wide, row);
    }
}

/// A dtype of weights: PyTorch's `norm` over the last dimension adds the squares of each in another order.
trait Weight: Normal {
    fn zeros(n: usize) -> Vec<Self>;
    /// `Σ row²` in float32.
    fn sum_of_squares(row: &[f32]) -> f32;
}

/// The squares of groups of eight on eight sums, which are then added from left to right.
fn eight_lanes(groups: &[[f32; 8]]) -> f32 {
    let mut lanes = [0f32; 8];
    for group in groups {
        for (lane, x) in lanes.iter_mut().zip(group) {
            *lane += x * x;
        }
    }
    lanes.iter().fold(0.0, |sum, lane| sum + lane)
}

impl Weight for f32 {
    fn zeros(n: usize) -> Vec<Self> {
        vec![0.0; n]
    }

    /// Eight lanes, then the rest in order: four of them, if there are four, with two roundings each, others with one.
    fn sum_of_squares(row: &[f32]) -> f32 {
        let (groups, rest) = row.as_chunks::<8>();
        let (four, few) = rest.as_chunks::<4>();
        let sum = four.as_flattened().iter().fold(eight_lanes(groups), |sum, x| sum + x * x);
        few.iter().fold(sum, |sum, &x| x.mul_add(x, sum))
    }
}

impl Weight for f16 {
    fn zeros(n: usize) -> Vec<Self> {
        vec![0u16; n].reinterpret_into()
    }

    /// In order.
    fn sum_of_squares(row: &[f32]) -> f32 {
        row.iter().fold(0.0, |sum, x| sum + x * x)
    }
}

impl Weight for bf16 {
    fn zeros(n: usize) -> Vec<Self> {
        vec![0u16; n].reinterpret_into()
    }

    /// Eight lanes, two groups at a time, then the rest in order.
    fn sum_of_squares(row: &[f32]) -> f32 {
        let (whole, rest) = row.split_at(row.len() / 16 * 16);
        rest.iter().fold(eight_lanes(whole.as_chunks().0), |sum, x| sum + x * x)
    }
}
