//! What a crosscoder is worth on a set of activations: its losses, which latents are alive, and whose they are.

use crate::activations::Activations;
use crate::autodiff::Tape;
use crate::backend::{Backend, Scalar};
use crate::crosscoder::{CrossCoder, model_name};
use crate::error::{Error, Result};
use crate::normalisation::scale_rows;

/// A latent whose relative norm in model B's decoder lies below this is model A's own, see [`Latents`].
pub const EXCLUSIVE_A: f64 = 0.3;

/// A latent whose relative norm in model B's decoder lies above this is model B's own, see [`Latents`].
pub const EXCLUSIVE_B: f64 = 0.7;

/// The losses of `get_losses` over a set, batch by batch, means weighted with the batches' rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// The number of rows.
    pub rows: usize,
    /// The names and means of [`LossOutput::named`](crate::LossOutput::named), in its order.
    pub losses: Vec<(String, f64)>,
}

impl Evaluation {
    /// A loss by its name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.losses.iter().find(|(n, _)| n == name).map(|&(_, value)| value)
    }
}

/// How many latents are alive, and whose they are: by `r = ‖W_dec[h,B]‖ / (‖W_dec[h,A]‖ + ‖W_dec[h,B]‖)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latents {
    /// The number of rows that activity was looked for in.
    pub rows: usize,
    /// Latents that were zero on each of these rows.
    pub dead: usize,
    /// Live latents with `EXCLUSIVE_A <= r <= EXCLUSIVE_B`.
    pub shared: usize,
    /// Live latents with `r < EXCLUSIVE_A`.
    pub exclusive_a: usize,
    /// Live latents with `r > EXCLUSIVE_B`.
    pub exclusive_b: usize,
}

/// Rows of a set in batches of nearly equal size, each row scaled with its model's factor.
///
/// Explained variances compare a row with the mean of its batch, so a batch of one leftover row would make them -inf.
pub struct Batches<'a> {
    acts: &'a Activations,
    pub(crate) rows: Vec<usize>,
    batch_size: usize,
    factors: Vec<f32>,
}

impl<'a> Batches<'a> {
    /// These rows (ascending) of a set, at most `batch_size` at a time, times one factor per model.
    pub fn new(acts: &'a Activations, rows: Vec<usize>, batch_size: usize, factors: &[f64]) -> Self {
        Batches { acts, rows, batch_size: batch_size.max(1), factors: factors.iter().map(|&f| f as f32).collect() }
    }

    /// Calls `f` with the values of each batch, row-major [rows, n_models, d_in].
    ///
    /// # Errors
    /// Those of `f` and of reading.
    pub fn for_each<S: Scalar>(&self, mut f: impl FnMut(&[S]) -> Result<()>) -> Result<()> {
        let (mut batch, mut piece) = (Vec::new(), Vec::new());
        let count = self.rows.len().div_ceil(self.batch_size).max(1);
        for rows in self.rows.chunks(self.rows.len().div_ceil(count).max(1)) {
            batch.clear();
            for run in rows.chunk_by(|a, b| a + 1 == *b) {
                for run in run.chunks(self.acts.rows_per_piece()) {
                    self.acts.read_f32(run[0], run.len(), &mut piece)?;
                    batch.extend_from_slice(&piece);
                }
            }
            scale_rows(&self.factors, self.acts.d_in(), &mut batch);
            let values: Vec<S> = batch.iter().map(|&v| S::narrow(f64::from(v))).collect();
            f(&values)?;
        }
        Ok(())
    }
}

/// The losses of a crosscoder on these rows.
///
/// # Errors
/// No rows, rows of another shape than the crosscoder's, those of reading.
pub fn evaluate<B: Backend>(crosscoder: &CrossCoder<B>, batches: &Batches<'_>) -> Result<Evaluation> {
    check(crosscoder, batches)?;
    let width = batches.acts.width();
    let mut tape = Tape::new(crosscoder.backend().clone());
    let mut losses: Vec<(String, f64)> = Vec::new();
    batches.for_each::<B::Scalar>(|x| {
        let output = crosscoder.losses_on(&mut tape, x)?.output;
        let weight = (x.len() / width) as f64 / batches.rows.len() as f64;
        for (i, (name, value)) in output.named().into_iter().enumerate() {
            match losses.get_mut(i) {
                Some((_, sum)) => *sum += weight * value,
                None => losses.push((name, weight * value)),
            }
        }
        Ok(())
    })?;
    Ok(Evaluation { rows: batches.rows.len(), losses })
}

/// Which latents of a crosscoder over two models are alive on these rows, and whose they are.
///
/// # Errors
/// As [`evaluate`]; another number of models than two.
pub fn latents<B: Backend>(crosscoder: &CrossCoder<B>, batches: &Batches<'_>) -> Result<Latents> {
    check(crosscoder, batches)?;
    if crosscoder.n_models() != 2 {
        let what =
            format!("shared and exclusive latents need two models, the crosscoder has {}", crosscoder.n_models());
        return Err(Error::shape(what));
    }
    let (backend, params, d_hidden) = (crosscoder.backend(), &crosscoder.params, crosscoder.d_hidden());
    let mut alive = vec![false; d_hidden];
    let (mut x, mut acts, mut sums) = Default::default();
    let mut host = vec![B::Scalar::default(); d_hidden];
    batches.for_each::<B::Scalar>(|values| {
        backend.fill(values.len() / batches.acts.width(), batches.acts.width(), values, &mut x)?;
        backend.encode(&x, &params.w_enc, &params.b_enc, &mut acts)?;
        // Latents are 0 or more: a sum is 0 where all are.
        backend.latents_column_sums(&acts, &mut sums)?;
        backend.download(&sums, 0, &mut host)?;
        alive.iter_mut().zip(&host).for_each(|(alive, sum)| *alive |= sum.wide() != 0.0);
        Ok(())
    })?;
    let mut norms = B::Matrix::default();
    backend.group_norms(&params.w_dec, 2, &mut norms)?;
    let mut host = vec![B::Scalar::default(); 2 * d_hidden];
    backend.download(&norms, 0, &mut host)?;
    let mut found = Latents { rows: batches.rows.len(), dead: 0, shared: 0, exclusive_a: 0, exclusive_b: 0 };
    for (alive, norms) in alive.into_iter().zip(host.chunks_exact(2)) {
        let (a, b) = (norms[0].wide(), norms[1].wide());
        let relative = if a + b > 0.0 { b / (a + b) } else { 0.5 };
        *match relative {
            _ if !alive => &mut found.dead,
            r if r < EXCLUSIVE_A => &mut found.exclusive_a,
            r if r > EXCLUSIVE_B => &mut found.exclusive_b,
            _ => &mut found.shared,
        } += 1;
    }
    Ok(found)
}

pub(crate) fn check<B: Backend>(crosscoder: &CrossCoder<B>, batches: &Batches<'_>) -> Result<()> {
    let acts = batches.acts;
    let (n_models, d_in) = (crosscoder.n_models(), crosscoder.d_in());
    if (acts.n_models(), acts.d_in()) != (n_models, d_in) {
        let found = format!("[n, {}, {}]", acts.n_models(), acts.d_in());
        return Err(Error::shape(format!("the activations are {found}; the crosscoder needs [n, {n_models}, {d_in}]")));
    }
    if batches.factors.len() != n_models {
        let last = model_name(n_models - 1, n_models);
        let found = batches.factors.len();
        return Err(Error::shape(format!("{found} normalisation factors for the {n_models} models up to {last}")));
    }
    if batches.rows.is_empty() {
        return Err(Error::shape("no rows to evaluate on"));
    }
    Ok(())
}
