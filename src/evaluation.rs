//! What a crosscoder is worth on a set of activations: its losses, and how many latents are dead.

use crate::activations::Activations;
use crate::autodiff::Tape;
use crate::backend::{Backend, Scalar};
use crate::crosscoder::{CrossCoder, model_name};
use crate::error::{Error, Result};
use crate::normalisation::scale_rows;
use std::ops::Range;

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

/// Rows of a set in batches of nearly equal size, each row scaled with its model's factor.
///
/// Explained variances compare a row with the mean of its batch, so a batch of one row makes them -inf: there is none but in a
/// set of one row, or where batches have at most one or, of an odd number of rows, two.
pub struct Batches<'a> {
    acts: &'a Activations,
    /// Rows that follow one another, as many together as do: a set may have more rows than memory has room for numbers.
    runs: Vec<Range<usize>>,
    batch_size: usize,
    factors: Vec<f32>,
}

impl<'a> Batches<'a> {
    /// These rows (ascending) of a set, at most `batch_size` at a time, times one factor per model.
    pub fn new(
        acts: &'a Activations,
        rows: impl IntoIterator<Item = usize>,
        batch_size: usize,
        factors: &[f64],
    ) -> Self {
        let mut runs = Vec::<Range<usize>>::new();
        for row in rows {
            match runs.last_mut() {
                Some(run) if run.end == row => run.end = row + 1,
                _ => runs.push(row..row + 1),
            }
        }
        Batches { acts, runs, batch_size: batch_size.max(1), factors: factors.iter().map(|&f| f as f32).collect() }
    }

    /// The numbers of the rows, in order.
    pub(crate) fn rows(&self) -> impl Iterator<Item = usize> {
        self.runs.iter().cloned().flatten()
    }

    /// How many rows they are.
    pub(crate) fn len(&self) -> usize {
        self.runs.iter().map(Range::len).sum()
    }

    /// Calls `f` with the values of each batch, row-major [rows, n_models, d_in].
    ///
    /// # Errors
    /// Another number of factors than models; those of `f` and of reading.
    pub fn for_each<S: Scalar>(&self, mut f: impl FnMut(&[S]) -> Result<()>) -> Result<()> {
        let (n_models, found) = (self.acts.n_models(), self.factors.len());
        if found != n_models {
            let last = model_name(n_models - 1, n_models);
            return Err(Error::shape(format!("{found} normalisation factors for the {n_models} models up to {last}")));
        }
        let (mut batch, mut piece) = (Vec::new(), Vec::new());
        let mut left = self.len();
        let (mut runs, mut run) = (self.runs.iter().cloned(), 0..0);
        for i in (1..=left.div_ceil(self.batch_size)).rev() {
            batch.clear();
            // Of those that are left, an equal share, rounded up.
            let mut rows = left.div_ceil(i);
            left -= rows;
            while rows > 0 {
                if run.is_empty() {
                    run = runs.next().unwrap_or_default();
                }
                let n = rows.min(run.len()).min(self.acts.rows_per_piece());
                self.acts.read_f32(run.start, n, &mut piece)?;
                batch.extend_from_slice(&piece);
                (run.start, rows) = (run.start + n, rows - n);
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
    let (width, rows) = (batches.acts.width(), batches.len());
    let mut tape = Tape::new(crosscoder.backend().clone());
    let mut losses: Vec<(String, f64)> = Vec::new();
    batches.for_each::<B::Scalar>(|x| {
        let output = crosscoder.losses_on(&mut tape, x)?.output;
        let weight = (x.len() / width) as f64 / rows as f64;
        for (i, (name, value)) in output.named().into_iter().enumerate() {
            match losses.get_mut(i) {
                Some((_, sum)) => *sum += weight * value,
                None => losses.push((name, weight * value)),
            }
        }
        Ok(())
    })?;
    Ok(Evaluation { rows, losses })
}

/// How many latents are above zero on none of these rows.
///
/// # Errors
/// As [`evaluate`].
pub fn dead<B: Backend>(crosscoder: &CrossCoder<B>, batches: &Batches<'_>) -> Result<usize> {
    check(crosscoder, batches)?;
    let (backend, width) = (crosscoder.backend(), batches.acts.width());
    let mut alive = vec![false; crosscoder.d_hidden()];
    let (mut x, mut acts, mut sums) = Default::default();
    let mut host = vec![B::Scalar::default(); crosscoder.d_hidden()];
    batches.for_each::<B::Scalar>(|values| {
        backend.fill(values.len() / width, width, values, &mut x)?;
        crosscoder.encode_on(&x, &mut acts)?;
        // Latents are 0 or more, or nan: a sum is 0 where all are.
        backend.latents_column_sums(&acts, &mut sums)?;
        backend.download(&sums, 0, &mut host)?;
        alive.iter_mut().zip(&host).for_each(|(alive, &sum)| *alive |= sum != B::Scalar::default());
        Ok(())
    })?;
    Ok(alive.into_iter().filter(|alive| !alive).count())
}

pub(crate) fn check<B: Backend>(crosscoder: &CrossCoder<B>, batches: &Batches<'_>) -> Result<()> {
    let acts = batches.acts;
    let (n_models, d_in) = (crosscoder.n_models(), crosscoder.d_in());
    if (acts.n_models(), acts.d_in()) != (n_models, d_in) {
        let found = format!("[n, {}, {}]", acts.n_models(), acts.d_in());
        let what = format!("the activations are {found}; the crosscoder needs [n, {n_models}, {d_in}]");
        return Err(Error::shape(what).at(acts.place(0)));
    }
    if batches.len() == 0 {
        return Err(Error::shape("no rows to evaluate on"));
    }
    Ok(())
}
