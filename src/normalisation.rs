//! One factor per model that gives activations a mean norm of √d_in, saved with the model, foldable into its weights.
//!
//! ```text
//! factor[m] = √d_in / mean_b ‖x[b,m]‖          x'[b,m] = factor[m] · x[b,m]
//! ```
//!
//! The crosscoder is trained on x'. Folding gives one that takes x and reconstructs x, with the same latents:
//!
//! ```text
//! W_enc'[m] = factor[m] · W_enc[m]     W_dec'[:,m] = W_dec[:,m] / factor[m]     b_dec'[m] = b_dec[m] / factor[m]
//! ```
//!
//! Its losses are no longer those of the training: squared errors and decoder norms are in the units of x.

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

use crate::activations::Activations;
use crate::autodiff::Parameters;
use crate::batch_topk::BatchTopK;
use crate::buffer::HeldOut;
use crate::config::Config;
use crate::crosscoder::{checked_shape, model_name};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::tensor::{Positions, Tensor, Values, element_count};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};

/// The extra cfg key that holds the factors, one per model. The original ignores it. Its `Buffer` has the same name.
pub const FACTOR_KEY: &str = "normalisation_factor";

/// The cfg key that holds the factors once they are folded into the weights, instead of [`FACTOR_KEY`].
pub const FOLDED_KEY: &str = "folded_normalisation_factor";

/// Batches whose norms are averaged. Original: `n_batches_for_norm_estimate`.
pub const ESTIMATE_BATCHES: usize = 100;

/// The factors of a set: `√d_in / mean norm` for each model, over the first [`ESTIMATE_BATCHES`] · `batch_size` rows to train
/// on, or all of them if there are fewer. The original takes the first 100 · `model_batch_size` sequences, BOS included;
/// by its defaults that is the same number of tokens. Rows that are not finite, which only a set that is
/// [unchecked](Activations::unchecked) hands out, are left out. None if `stop` was set meanwhile.
///
/// Original: `estimate_norm_scaling_factor`.
///
/// # Errors
/// Those of [`Activations::read`]; a model whose rows are all zero.
pub fn estimate(
    acts: &Activations,
    held_out: HeldOut,
    batch_size: usize,
    stop: &AtomicBool,
) -> Result<Option<Vec<f64>>> {
    let wanted = batch_size.saturating_mul(ESTIMATE_BATCHES);
    let mut sums = vec![0f64; acts.n_models()];
    let (mut count, mut at) = (0usize, 0usize);
    let mut piece = Vec::new();
    while count < wanted && at < acts.rows() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let n = acts.rows_per_piece().min(acts.rows().saturating_sub(at));
        acts.read_f32(at, n, &mut piece)?;
        for (i, row) in piece.chunks_exact(acts.width()).enumerate() {
            if count == wanted || held_out.holds(at.saturating_add(i)) || !row.iter().all(|v| v.is_finite()) {
                continue;
            }
            for (sum, x) in sums.iter_mut().zip(row.chunks_exact(acts.d_in())) {
                *sum += x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
            }
            count = count.saturating_add(1);
        }
        at = at.saturating_add(n);
    }
    if count == 0 {
        return Err(Error::shape("no row to train on is finite").at(acts.place(0)));
    }
    let factor = |(m, sum): (usize, f64)| {
        let factor = (acts.d_in() as f64).sqrt() / (sum / count as f64);
        // Rows are multiplied in float32.
        if !(factor as f32).is_finite() || factor as f32 == 0.0 {
            let model = model_name(m, acts.n_models());
            let what = format!("from here on model {model}'s rows have a mean norm of {}", sum / count as f64);
            return Err(Error::shape(what).at(acts.place(0)));
        }
        Ok(factor)
    };
    sums.into_iter().enumerate().map(factor).collect::<Result<Vec<_>>>().map(Some)
}

/// `x[b,m,d] · factor[m]` in place; `rows` is row-major [batch, n_models, d_in] and `factors` has a factor per model.
pub fn scale_rows(factors: &[f32], d_in: usize, rows: &mut [f32]) {
    for row in rows.chunks_exact_mut(d_in.saturating_mul(factors.len()).max(1)) {
        for (x, &factor) in row.chunks_exact_mut(d_in.max(1)).zip(factors) {
            x.iter_mut().for_each(|v| *v *= factor);
        }
    }
}

/// The factors saved with a model, if it has any and they are not folded.
///
/// # Errors
/// A key that holds no list of positive numbers.
pub fn factors(cfg: &Config) -> Result<Option<Vec<f64>>> {
    let Some(value) = cfg.get(FACTOR_KEY) else { return Ok(None) };
    // Rows are multiplied in float32.
    let positive = |v: &Value| v.as_f64().filter(|&f| (f as f32).is_finite() && f as f32 > 0.0);
    let numbers = value.as_array().map(|list| list.iter().map(positive));
    match numbers.and_then(|numbers| numbers.collect::<Option<Vec<f64>>>()) {
        Some(factors) => Ok(Some(factors)),
        None => Err(Error::config(format!("cfg key {FACTOR_KEY:?} needs a list of positive numbers, found {value}"))),
    }
}

/// Saves the factors with a model.
pub fn set_factors(cfg: &mut Config, factors: &[f64]) {
    cfg.set(FACTOR_KEY, factors.to_vec());
}

/// [`fold_as`] in the weights' dtype.
///
/// # Errors
/// As there.
pub fn fold(cfg: &mut Config, weights: Parameters<Tensor>) -> Result<Parameters<Tensor>> {
    let dtype = weights.w_enc.dtype();
    fold_as(cfg, weights, dtype)
}

/// Folds the factors of the cfg into the weights, formulas above, computed in float64 and cast to `dtype`. The cfg
/// then has the factors under [`FOLDED_KEY`], so that they cannot be folded twice; a threshold goes on meaning the decoder
/// norms that it was trained with, see [`crate::batch_topk`].
///
/// # Errors
/// A cfg without factors, one whose factors are folded already, another number of factors than models; weights that contradict
/// the cfg.
pub fn fold_as(cfg: &mut Config, weights: Parameters<Tensor>, dtype: Dtype) -> Result<Parameters<Tensor>> {
    if cfg.get(FOLDED_KEY).is_some() {
        return Err(Error::usage(format!(
            "the factors are folded into these weights already (cfg key {FOLDED_KEY:?})"
        )));
    }
    let Some(factors) = factors(cfg)? else {
        return Err(Error::usage(format!("the cfg has no {FACTOR_KEY:?}: there is nothing to fold")));
    };
    let [n_models, ..] = checked_shape(cfg, &weights)?;
    if factors.len() != n_models {
        return Err(Error::shape(format!(
            "cfg key {FACTOR_KEY:?} has {} factors for {n_models} models",
            factors.len()
        )));
    }
    let folded = Parameters {
        w_enc: per_model("W_enc", weights.w_enc, 0, &factors, dtype, |v, factor| v * factor)?,
        w_dec: per_model("W_dec", weights.w_dec, 1, &factors, dtype, |v, factor| v / factor)?,
        b_enc: weights.b_enc.cast(dtype)?,
        b_dec: per_model("b_dec", weights.b_dec, 0, &factors, dtype, |v, factor| v / factor)?,
    };
    if let Some(batch_topk) = BatchTopK::from_cfg(cfg, n_models)? {
        batch_topk.for_divided_decoder(&factors).set_in(cfg);
    }
    cfg.remove(FACTOR_KEY);
    cfg.set(FOLDED_KEY, Value::from(factors));
    Ok(folded)
}

/// `f(v, factors[m])` for every element v, m its index in dimension `axis`; the layout stays.
fn per_model(
    name: &str,
    tensor: Tensor,
    axis: usize,
    factors: &[f64],
    dtype: Dtype,
    f: impl Fn(f64, f64) -> f64,
) -> Result<Tensor> {
    let (shape, strides) = (tensor.shape().to_vec(), tensor.strides().to_vec());
    let inner = match shape.get(axis..) {
        Some([models, inner @ ..]) if *models == factors.len() => element_count(inner).unwrap_or(0),
        _ => {
            let what = format!("{name} has shape {shape:?}; its dimension {axis} needs size {}", factors.len());
            return Err(Error::shape(what));
        }
    };
    let mut values = tensor.values().to_f64();
    // In row-major order: each factor for `inner` elements, all over again for each index before `axis`.
    let all = factors.iter().flat_map(|&factor| std::iter::repeat_n(factor, inner)).cycle();
    for (at, factor) in Positions::new(&shape, &strides).zip(all) {
        if let Some(v) = values.get_mut(at) {
            *v = f(*v, factor);
        }
    }
    Tensor::with_strides(shape, strides, Values::F64(values).cast(dtype)?)
}
