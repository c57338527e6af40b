//! What a crosscoder says about the difference of its models: `analysis.py` of the original, and beyond.
//!
//! Everything here is computed in float64 from the weights and activations as they are stored, in whatever dtype that
//! is. (The original computes norms in the dtype: in bfloat16 they carry three digits.) Rows of `W_dec` are read from
//! the backend a few at a time, so that a large decoder is not copied.
//!
//! 1. [`DecoderNorms`] from the weights alone: decoder norms, relative decoder norms, the three [`Group`]s, cosines.
//! 2. [`ActivationPass`] from activations, in one pass: losses, explained variance, L0, how often and how strongly each
//!    latent fires and on which rows, and Latent Scaling.
//!
//! **Undefined is not zero.** A latent with a zero decoder vector has no cosine, one with two has no relative norm, one
//! that never fires has no mean activation. Such numbers are `None` here, never nan.
//!
//! # Latent Scaling
//!
//! An l1 penalty can make a latent look exclusive to one model that is not: the weaker decoder vector shrinks to zero
//! though the other model has the concept too, or the concept is split between two latents. Latent Scaling (Minder et
//! al. 2025, arXiv 2504.02922) asks how much of a latent there is in what each model computes. Let `f[b]` be the
//! activation of latent `j` on row `b`, `d[m]` `[d_in]` its decoder vector in model `m`, `s` the model in which it is
//! longest, and `y[b]` `[d_in]` a target for model `m`:
//!
//! ```text
//! reconstruction   y[b] = rec[b,m]
//! error            y[b] = x[b,m] - (rec[b,m] - f[b] · d[m])      the error that is left without latent j
//! beta = argmin_beta Σ_b ‖beta · f[b] · d[s] - y[b]‖²
//! ```
//!
//! The sum is a parabola in beta with its minimum at
//!
//! ```text
//! beta = Σ_b f[b] · ⟨d[s], y[b]⟩ / (‖d[s]‖² · Σ_b f[b]²)
//! ```
//!
//! in which only rows on which the latent fires have a term. With `R[m] = Σ_b f[b] · ⟨d[s], rec[b,m]⟩`,
//! `X[m] = Σ_b f[b] · ⟨d[s], x[b,m]⟩` and `F = Σ_b f[b]²`, all from one pass,
//!
//! ```text
//! beta_reconstruction[m] = R[m] / (‖d[s]‖² · F)
//! beta_error[m]          = (X[m] - R[m] + F · ⟨d[s], d[m]⟩) / (‖d[s]‖² · F)
//! ```
//!
//! `R` and `X` come from `Σ_b f[b] · rec[b,m]` `[d_in]`, multiplied with `d[s]` once per batch. For two models, `o`
//! being the one that is not `s`, `nu_reconstruction = beta_reconstruction[o] / beta_reconstruction[s]`, and `nu_error`
//! likewise: about 0 if the other model lacks the latent, about 1 if it has as much of it. A large `nu_error` of an
//! exclusive latent tells of shrinkage, a large `nu_reconstruction` of a split.

use crate::autodiff::Tape;
use crate::backend::{Backend, Scalar, Support};
use crate::crosscoder::CrossCoder;
use crate::error::{Error, Result};
use crate::evaluation::{Batches, check};
use ndarray::Array2;
use ndarray::linalg::general_mat_mul;
use std::ops::Range;

/// Rows of `W_dec` that are read at a time; rows of a batch that a product of dense latents takes at a time.
const ROWS: usize = 256;

/// A latent that fires on more than this share of a batch's rows is dense.
const DENSE_SHARE: f64 = 0.2;

/// Bins of the histogram of relative decoder norms. Original: `nbins=200`.
///
/// plotly takes `nbins` as an upper limit and chooses a round width from the range of the data: 0.005, ours, if the
/// relative norms span more than 0.4. Ours are always 200 over [0, 1].
pub const RELATIVE_NORM_BINS: usize = 200;

/// Bins of the histogram of cosines. Original: `nbins=100`, of which plotly makes a width of 0.02 if the cosines span
/// more than 1 and less otherwise; ours are always 100 over [-1, 1].
pub const COSINE_BINS: usize = 100;

/// To which model a latent belongs, by its relative decoder norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// At or below the lower threshold: only model A has it.
    AOnly,
    /// Between the thresholds.
    Shared,
    /// At or above the upper threshold: only model B has it.
    BOnly,
}

/// `A only`, `shared`, `B only`; `no direction` for none.
pub fn group_name(group: Option<Group>) -> &'static str {
    match group {
        Some(Group::AOnly) => "A only",
        Some(Group::Shared) => "shared",
        Some(Group::BOnly) => "B only",
        None => "no direction",
    }
}

/// Where relative decoder norms part the groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    low: f64,
    high: f64,
}

impl Default for Thresholds {
    /// The original's 0.3 and 0.7.
    fn default() -> Self {
        Thresholds { low: 0.3, high: 0.7 }
    }
}

impl Thresholds {
    /// # Errors
    /// Unless `0 <= low < high <= 1`.
    pub fn new(low: f64, high: f64) -> Result<Self> {
        if 0.0 <= low && low < high && high <= 1.0 {
            return Ok(Thresholds { low, high });
        }
        Err(Error::usage(format!("thresholds need 0 <= low < high <= 1, found {low} and {high}")))
    }

    /// At or below it a latent is A only.
    pub fn low(&self) -> f64 {
        self.low
    }

    /// At or above it a latent is B only.
    pub fn high(&self) -> f64 {
        self.high
    }

    /// The group of a relative decoder norm. Shared is `low < r < high`, as in the original.
    pub fn group(&self, relative_norm: f64) -> Group {
        match relative_norm {
            r if r <= self.low => Group::AOnly,
            r if r >= self.high => Group::BOnly,
            _ => Group::Shared,
        }
    }
}

/// Lengths and directions of the decoder vectors `W_dec[h,m,:]`. Methods that take a latent `h` or a model `m` panic, as indexing
/// does, where there is no such one.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderNorms {
    n_models: usize,
    /// `‖W_dec[h,m]‖`, [d_hidden, n_models].
    norms: Vec<f64>,
    /// `⟨W_dec[h,s], W_dec[h,m]⟩`, `s` being [`DecoderNorms::strongest`], [d_hidden, n_models].
    with_strongest: Vec<f64>,
}

impl DecoderNorms {
    /// Those of a crosscoder's stored weights.
    ///
    /// # Errors
    /// Only if the device fails.
    pub fn of<B: Backend>(crosscoder: &CrossCoder<B>) -> Result<Self> {
        let n_models = crosscoder.n_models();
        let mut out = DecoderNorms { n_models, norms: Vec::new(), with_strongest: Vec::new() };
        each_decoder_row(crosscoder, 0..crosscoder.d_hidden(), |h, row| {
            let vectors: Vec<&[f64]> = row.chunks_exact(crosscoder.d_in()).collect();
            out.norms.extend(vectors.iter().map(|d| dot(d, d).sqrt()));
            let strongest = vectors[out.strongest(h)];
            out.with_strongest.extend(vectors.iter().map(|d| dot(strongest, d)));
        })?;
        Ok(out)
    }

    /// Panics unless these have the crosscoder's number of models and latents.
    pub(crate) fn assert_of<B: Backend>(&self, crosscoder: &CrossCoder<B>) {
        let of = (crosscoder.n_models(), crosscoder.d_hidden());
        assert_eq!((self.n_models, self.d_hidden()), of, "the norms are of another crosscoder");
    }

    /// The number of models.
    pub fn n_models(&self) -> usize {
        self.n_models
    }

    /// The number of latents.
    pub fn d_hidden(&self) -> usize {
        self.norms.len() / self.n_models
    }

    /// `‖W_dec[h,m]‖` for each model. Original: `norms`.
    pub fn norms(&self, h: usize) -> &[f64] {
        &self.norms[h * self.n_models..(h + 1) * self.n_models]
    }

    /// The model in which the latent's decoder vector is longest; of equals the last.
    pub fn strongest(&self, h: usize) -> usize {
        let norms = self.norms(h);
        (0..self.n_models).fold(0, |best, m| if norms[m] >= norms[best] { m } else { best })
    }

    /// `norms[m] / Σ_m norms`, none if that is 0/0 or not finite. Of two models, model 1's is *the* relative decoder
    /// norm: 0 where only A has the latent, 1 where only B has it. Original: `relative_norms`.
    pub fn relative(&self, h: usize, m: usize) -> Option<f64> {
        let norms = self.norms(h);
        finite(norms.iter().sum()).and_then(|sum| finite(norms[m] / sum))
    }

    /// Of two models the relative decoder norm `‖W_dec[h,1]‖ / (‖W_dec[h,0]‖ + ‖W_dec[h,1]‖)`; none for any other
    /// number.
    pub fn relative_norm(&self, h: usize) -> Option<f64> {
        if self.n_models == 2 { self.relative(h, 1) } else { None }
    }

    /// Of two models the group.
    pub fn group(&self, h: usize, thresholds: &Thresholds) -> Option<Group> {
        self.relative_norm(h).map(|r| thresholds.group(r))
    }

    /// How many latents each group has, by its name; `no direction` are those that have no relative decoder norm. All
    /// latents count, also those that never fire, as in the original.
    pub fn groups(&self, thresholds: &Thresholds) -> [(&'static str, u64); 4] {
        let all: Vec<Option<Group>> = (0..self.d_hidden()).map(|h| self.group(h, thresholds)).collect();
        let size = |group| all.iter().filter(|g| **g == group).count() as u64;
        [Some(Group::AOnly), Some(Group::Shared), Some(Group::BOnly), None].map(|g| (group_name(g), size(g)))
    }

    /// Of two models `⟨W_dec[h,0], W_dec[h,1]⟩ / (‖W_dec[h,0]‖ · ‖W_dec[h,1]‖)`, none if one of them is zero. Original:
    /// `cosine_sims`, there for shared latents.
    pub fn cosine(&self, h: usize) -> Option<f64> {
        if self.n_models != 2 {
            return None;
        }
        let norms = self.norms(h);
        let other = 1 - self.strongest(h);
        // Rounding may leave the quotient of parallel vectors an ulp outside.
        finite(self.with_strongest[h * 2 + other] / (norms[0] * norms[1])).map(|c| c.clamp(-1.0, 1.0))
    }
}

/// A row on which a latent fires.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TopRow {
    /// The row's number: from 0 over all batches, or what [`ActivationPass::add_numbered`] was given.
    pub row: u64,
    /// The latent's activation there.
    pub act: f64,
}

/// The numbers of one latent over all rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LatentStats {
    /// On how many rows it is above zero. Never: it is dead, on this data.
    pub fired: u64,
    /// The sum of its activations.
    pub sum: f64,
    /// `Σ_b f[b]²`
    pub sum_squares: f64,
    /// Its largest activation; 0 if it never fires.
    pub max: f64,
    /// The rows on which it is strongest, strongest first, of equals the first.
    pub top: Vec<TopRow>,
}

impl LatentStats {
    /// The mean over the rows on which it fires.
    pub fn mean_when_active(&self) -> Option<f64> {
        finite(self.sum / self.fired as f64)
    }
}

/// Latent Scaling of one latent, see the [module](self).
#[derive(Clone, Debug, PartialEq)]
pub struct LatentScaling {
    /// The model `s` whose decoder vector is scaled: the longest.
    pub direction: usize,
    /// For each model how much of the latent is in its reconstruction.
    pub beta_reconstruction: Vec<f64>,
    /// For each model how much of the latent is in its error without the latent.
    pub beta_error: Vec<f64>,
}

impl LatentScaling {
    /// Of two models `beta_reconstruction` of the other over that of [`Self::direction`].
    pub fn nu_reconstruction(&self) -> Option<f64> {
        self.ratio(&self.beta_reconstruction)
    }

    /// Of two models `beta_error` of the other over that of [`Self::direction`].
    pub fn nu_error(&self) -> Option<f64> {
        self.ratio(&self.beta_error)
    }

    fn ratio(&self, beta: &[f64]) -> Option<f64> {
        if beta.len() == 2 { finite(beta[1 - self.direction] / beta[self.direction]) } else { None }
    }
}

/// What [`ActivationPass`] finds.
#[derive(Clone, Debug, PartialEq)]
pub struct ActivationStats {
    /// The number of rows.
    pub rows: u64,
    /// The number of batches; the losses' explained variances refer to each batch's mean, so they depend on it a
    /// little.
    pub batches: u64,
    /// The rows of the first batch.
    pub batch_size: u64,
    /// [`crate::LossOutput::named`], the mean over rows.
    pub losses: Vec<(String, f64)>,
    /// `1 - Σ_b ‖rec[b] - x[b]‖² / Σ_b ‖x[b] - mean‖²` over all rows and models, the mean being that of all rows.
    pub explained_variance: f64,
    /// The same for each model alone.
    pub explained_variance_per_model: Vec<f64>,
    /// `l0[k]` rows have exactly k latents above zero.
    pub l0: Vec<u64>,
    /// For each latent.
    pub latents: Vec<LatentStats>,
    n_models: usize,
    /// `R` and `X` of the module's text, [d_hidden, 2, n_models].
    products: Vec<f64>,
}

impl ActivationStats {
    /// The share of rows on which the latent fires.
    ///
    /// # Panics
    /// If there is no latent `h`.
    pub fn density(&self, h: usize) -> f64 {
        self.latents[h].fired as f64 / self.rows as f64
    }

    /// The number of latents that fire on no row.
    pub fn dead(&self) -> u64 {
        self.latents.iter().filter(|l| l.fired == 0).count() as u64
    }

    /// Latent Scaling of a latent; none if it never fires or has no decoder vector. `norms` are those of the same
    /// weights.
    ///
    /// # Panics
    /// If `norms` or the statistics have no latent `h`.
    pub fn scaling(&self, norms: &DecoderNorms, h: usize) -> Option<LatentScaling> {
        let n = self.n_models;
        let direction = norms.strongest(h);
        let squares = self.latents[h].sum_squares;
        let scale = finite(1.0 / (norms.norms(h)[direction].powi(2) * squares))?;
        let (r, x) = self.products[h * 2 * n..(h + 1) * 2 * n].split_at(n);
        let with_strongest = &norms.with_strongest[h * n..(h + 1) * n];
        let error = |m: usize| (x[m] - r[m] + squares * with_strongest[m]) * scale;
        Some(LatentScaling {
            direction,
            beta_reconstruction: r.iter().map(|r| r * scale).collect(),
            beta_error: (0..n).map(error).collect(),
        })
    }
}

/// [`ActivationPass`] over rows of a set: what the report shows. [`TopRow::row`] is the row's number in the set.
///
/// `progress` is told after each batch how many rows are done.
///
/// # Errors
/// No rows, rows of another shape than the crosscoder's, those of reading.
///
/// # Panics
/// As [`ActivationPass::new`].
pub fn activation_stats<B: Backend>(
    crosscoder: &CrossCoder<B>,
    norms: &DecoderNorms,
    batches: &Batches<'_>,
    top_rows: usize,
    mut progress: impl FnMut(usize),
) -> Result<ActivationStats> {
    check(crosscoder, batches)?;
    let width = crosscoder.n_models() * crosscoder.d_in();
    let mut pass = ActivationPass::new(crosscoder, norms, top_rows);
    let (mut rows, mut done) = (batches.rows(), 0);
    batches.for_each::<B::Scalar>(|x| {
        let numbers: Vec<u64> = rows.by_ref().take(x.len() / width).map(|row| row as u64).collect();
        pass.add_numbered(x, &numbers)?;
        done += numbers.len();
        progress(done);
        Ok(())
    })?;
    pass.finish()
}

/// One pass over batches of activations.
pub struct ActivationPass<'a, B: Backend> {
    crosscoder: &'a CrossCoder<B>,
    norms: &'a DecoderNorms,
    top_rows: usize,
    tape: Tape<B>,
    stats: ActivationStats,
    /// `Σ_b ‖rec[b,m] - x[b,m]‖²` for each model.
    squared_errors: Vec<f64>,
    /// The first row, a shift that keeps variances accurate where means are large, [width].
    first: Vec<f64>,
    /// `Σ_b (x[b] - first)` and `Σ_b (x[b] - first)²`, [width].
    sums: Vec<f64>,
    squares: Vec<f64>,
}

impl<'a, B: Backend> ActivationPass<'a, B> {
    /// A pass that keeps for each latent the `top_rows` rows on which it is strongest. `norms` are the crosscoder's.
    ///
    /// # Panics
    /// If `norms` have another number of latents or models.
    pub fn new(crosscoder: &'a CrossCoder<B>, norms: &'a DecoderNorms, top_rows: usize) -> Self {
        let (n_models, d_hidden) = (crosscoder.n_models(), crosscoder.d_hidden());
        let width = n_models * crosscoder.d_in();
        norms.assert_of(crosscoder);
        let stats = ActivationStats {
            rows: 0,
            batches: 0,
            batch_size: 0,
            losses: Vec::new(),
            explained_variance: 0.0,
            explained_variance_per_model: Vec::new(),
            l0: Vec::new(),
            latents: vec![LatentStats::default(); d_hidden],
            n_models,
            products: vec![0.0; d_hidden * 2 * n_models],
        };
        ActivationPass {
            crosscoder,
            norms,
            top_rows,
            tape: Tape::new(crosscoder.backend().clone()),
            stats,
            squared_errors: vec![0.0; n_models],
            first: Vec::new(),
            sums: vec![0.0; width],
            squares: vec![0.0; width],
        }
    }

    /// Takes in a batch `x`, row-major [batch, n_models, d_in]. An empty one changes nothing.
    ///
    /// # Errors
    /// A length that is no multiple of a row's.
    pub fn add(&mut self, x: &[B::Scalar]) -> Result<()> {
        let first = self.stats.rows;
        let batch = (x.len() / self.sums.len()) as u64;
        self.add_numbered(x, &(first..first + batch).collect::<Vec<_>>())
    }

    /// [`Self::add`] where the rows have these numbers: a part of a larger set.
    ///
    /// # Errors
    /// As [`Self::add`]; another number of numbers than of rows.
    pub fn add_numbered(&mut self, x: &[B::Scalar], numbers: &[u64]) -> Result<()> {
        if numbers.len() != x.len() / self.sums.len() {
            let rows = x.len() / self.sums.len();
            return Err(Error::shape(format!("{} numbers for {rows} rows", numbers.len())));
        }
        if x.is_empty() {
            return Ok(());
        }
        let backend = self.crosscoder.backend();
        let losses = self.crosscoder.losses_on(&mut self.tape, x)?;
        let read = |m: &B::Matrix| {
            let mut out = vec![B::Scalar::default(); x.len()];
            backend.download(m, 0, &mut out).map(|()| out)
        };
        let (x, rec) = (read(self.tape.matrix(losses.x))?, read(self.tape.matrix(losses.x_reconstruct))?);
        let support = backend.support(self.tape.latents(losses.acts))?;
        let rows = x.len() / self.sums.len();

        let named = losses.output.named();
        if self.stats.losses.is_empty() {
            self.stats.losses = named.iter().map(|(name, _)| (name.clone(), 0.0)).collect();
        }
        for (sum, (_, value)) in self.stats.losses.iter_mut().zip(named) {
            sum.1 += value * rows as f64;
        }
        self.add_variances(&x, &rec);
        self.add_l0(&support);
        self.add_latents(&support, numbers, &x, &rec)?;
        self.stats.rows += rows as u64;
        self.stats.batches += 1;
        self.stats.batch_size = if self.stats.batches == 1 { rows as u64 } else { self.stats.batch_size };
        Ok(())
    }

    fn add_variances(&mut self, x: &[B::Scalar], rec: &[B::Scalar]) {
        let (width, d_in) = (self.sums.len(), self.crosscoder.d_in());
        if self.first.is_empty() {
            self.first = x[..width].iter().map(|v| v.wide()).collect();
        }
        for (x, rec) in x.chunks_exact(width).zip(rec.chunks_exact(width)) {
            for (k, (x, rec)) in x.iter().zip(rec).enumerate() {
                let (x, rec) = (x.wide(), rec.wide());
                self.squared_errors[k / d_in] += (rec - x).powi(2);
                let centred = x - self.first[k];
                self.sums[k] += centred;
                self.squares[k] += centred.powi(2);
            }
        }
    }

    fn add_l0(&mut self, support: &Support<B::Scalar>) {
        for range in support.starts.windows(2).map(|w| w[0]..w[1]) {
            let l0 = support.values[range].iter().filter(|act| is_active(**act)).count();
            if self.stats.l0.len() <= l0 {
                self.stats.l0.resize(l0 + 1, 0);
            }
            self.stats.l0[l0] += 1;
        }
    }

    /// Adds the batch's share of each latent's numbers, of `R` and of `X`.
    fn add_latents(
        &mut self,
        support: &Support<B::Scalar>,
        numbers: &[u64],
        x: &[B::Scalar],
        rec: &[B::Scalar],
    ) -> Result<()> {
        let (crosscoder, norms, top_rows) = (self.crosscoder, self.norms, self.top_rows);
        let (d_hidden, d_in, n) = (crosscoder.d_hidden(), crosscoder.d_in(), crosscoder.n_models());
        let width = n * d_in;
        let sums = Sums::new(ByLatent::of(support, d_hidden), x, rec, width);
        // Each latent belongs to one thread: results do not depend on how many there are.
        let threads = crate::threads::available();
        let per_thread = d_hidden.div_ceil(threads).max(1);
        let (latents, products) = (&mut self.stats.latents, &mut self.stats.products);
        let parts = latents.chunks_mut(per_thread).zip(products.chunks_mut(per_thread * 2 * n));
        let work = |first: usize, latents: &mut [LatentStats], products: &mut [f64]| {
            for (h, latent) in (first..).zip(&mut *latents) {
                let (rows, acts) = sums.acts.of_latent(h);
                for (&b, &act) in rows.iter().zip(acts).filter(|(_, act)| is_active(**act)) {
                    latent.add(TopRow { row: numbers[b as usize], act: act.wide() }, top_rows);
                }
            }
            let end = first + latents.len();
            let mut alone = vec![0.0; 2 * width];
            for start in (first..end).step_by(ROWS) {
                let block = start..(start + ROWS).min(end);
                let (dense, of_dense) = sums.dense(block.clone());
                each_decoder_row(crosscoder, block, |h, decoder| {
                    if sums.acts.of_latent(h).0.is_empty() {
                        return;
                    }
                    let of_latent = match dense.binary_search(&h) {
                        Ok(i) => of_dense.row(i).to_slice().expect("rows are contiguous"),
                        Err(_) => {
                            sums.sparse(h, &mut alone);
                            &alone
                        }
                    };
                    // ⟨d[s], Σ f · rec[m]⟩ for each model m, then the same of x.
                    let strongest = &decoder[norms.strongest(h) * d_in..][..d_in];
                    let products = &mut products[(h - first) * 2 * n..][..2 * n];
                    let sums = of_latent.chunks_exact(d_in);
                    products.iter_mut().zip(sums).for_each(|(product, sum)| *product += dot(strongest, sum));
                })?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let work = &work;
            let parts = parts.enumerate();
            let start = |(i, (l, p))| {
                let thread = std::thread::Builder::new().spawn_scoped(scope, move || work(i * per_thread, l, p));
                thread.map_err(|e| Error::io("cannot start a thread", e))
            };
            let threads = parts.map(start).collect::<Result<Vec<_>>>()?;
            threads.into_iter().try_for_each(|t| t.join().expect("no thread panics"))
        })
    }

    /// The numbers of all rows.
    ///
    /// # Errors
    /// If there was no row, of which no mean exists.
    pub fn finish(mut self) -> Result<ActivationStats> {
        let rows = self.stats.rows as f64;
        if self.stats.rows == 0 {
            return Err(Error::shape("the activations have no rows; the report's numbers are means over at least one"));
        }
        self.stats.losses.iter_mut().for_each(|(_, sum)| *sum /= rows);
        let d_in = self.crosscoder.d_in();
        let variances: Vec<f64> = self
            .sums
            .chunks_exact(d_in)
            .zip(self.squares.chunks_exact(d_in))
            .map(|(sums, squares)| squares.iter().sum::<f64>() - dot(sums, sums) / rows)
            .collect();
        let errors = &self.squared_errors;
        self.stats.explained_variance = 1.0 - errors.iter().sum::<f64>() / variances.iter().sum::<f64>();
        self.stats.explained_variance_per_model = errors.iter().zip(&variances).map(|(e, v)| 1.0 - e / v).collect();
        Ok(self.stats)
    }
}

impl LatentStats {
    fn add(&mut self, at: TopRow, top_rows: usize) {
        self.fired += 1;
        self.sum += at.act;
        self.sum_squares += at.act.powi(2);
        self.max = self.max.max(at.act);
        if self.top.len() < top_rows || self.top.last().is_some_and(|last| at.act > last.act) {
            let place = self.top.partition_point(|t| t.act >= at.act);
            self.top.insert(place, at);
            self.top.truncate(top_rows);
        }
    }
}

/// Above zero; nan is not.
fn is_active<S: Scalar>(act: S) -> bool {
    act > S::default()
}

/// The entries of a support ordered by latent, rows ascending.
struct ByLatent<S> {
    /// Latent `h` has the entries `starts[h]..starts[h + 1]`.
    starts: Vec<usize>,
    rows: Vec<u32>,
    values: Vec<S>,
}

impl<S: Scalar> ByLatent<S> {
    fn of(support: &Support<S>, d_hidden: usize) -> Self {
        let mut starts = vec![0; d_hidden + 1];
        support.columns.iter().for_each(|&h| starts[h as usize + 1] += 1);
        for h in 0..d_hidden {
            starts[h + 1] += starts[h];
        }
        let mut next = starts.clone();
        let entries = support.columns.len();
        let (mut rows, mut values) = (vec![0; entries], vec![S::default(); entries]);
        for (b, range) in support.starts.windows(2).map(|w| w[0]..w[1]).enumerate() {
            for e in range {
                let place = &mut next[support.columns[e] as usize];
                (rows[*place], values[*place]) = (b as u32, support.values[e]);
                *place += 1;
            }
        }
        ByLatent { starts, rows, values }
    }

    /// Rows and values of a latent.
    fn of_latent(&self, h: usize) -> (&[u32], &[S]) {
        let range = self.starts[h]..self.starts[h + 1];
        (&self.rows[range.clone()], &self.values[range])
    }
}

/// `Σ_b f[b] · (rec[b], x[b])` [2 · width] of each latent of a batch, in float64.
///
/// A latent that fires on few rows adds those rows up. The many of a crosscoder whose latents are dense share a product
/// of matrices, in which the rows on which a latent is zero add zeros; so only if all of `rec` and `x` is finite.
struct Sums<'a, S> {
    acts: ByLatent<S>,
    x: &'a [S],
    rec: &'a [S],
    width: usize,
    finite: bool,
}

impl<'a, S: Scalar> Sums<'a, S> {
    fn new(acts: ByLatent<S>, x: &'a [S], rec: &'a [S], width: usize) -> Self {
        let finite = x.iter().chain(rec).all(|v| v.is_finite());
        Sums { acts, x, rec, width, finite }
    }

    fn batch(&self) -> usize {
        self.x.len() / self.width
    }

    /// Which latents of a block are dense, and their sums, [latents, 2 · width].
    fn dense(&self, block: Range<usize>) -> (Vec<usize>, Array2<f64>) {
        let least = (DENSE_SHARE * self.batch() as f64) as usize;
        let is_dense = |h: &usize| self.finite && self.acts.of_latent(*h).0.len() > least;
        let dense: Vec<usize> = block.filter(is_dense).collect();
        let mut sums = Array2::zeros((dense.len(), 2 * self.width));
        if dense.is_empty() {
            return (dense, sums);
        }
        for start in (0..self.batch()).step_by(ROWS) {
            let rows = start..(start + ROWS).min(self.batch());
            let mut f = Array2::zeros((dense.len(), rows.len()));
            for (mut f, &h) in f.rows_mut().into_iter().zip(&dense) {
                let (of, values) = self.acts.of_latent(h);
                let entries =
                    of.partition_point(|&b| (b as usize) < start)..of.partition_point(|&b| (b as usize) < rows.end);
                of[entries.clone()].iter().zip(&values[entries]).for_each(|(&b, v)| f[b as usize - start] = v.wide());
            }
            let y = Array2::from_shape_fn((rows.len(), 2 * self.width), |(b, k)| {
                let at = (start + b) * self.width;
                if k < self.width { self.rec[at + k].wide() } else { self.x[at + k - self.width].wide() }
            });
            general_mat_mul(1.0, &f, &y, 1.0, &mut sums);
        }
        (dense, sums)
    }

    /// The sums of a latent by itself, into `out` [2 · width].
    fn sparse(&self, h: usize, out: &mut [f64]) {
        out.fill(0.0);
        let (of_rec, of_x) = out.split_at_mut(self.width);
        let (rows, values) = self.acts.of_latent(h);
        for (&b, f) in rows.iter().zip(values) {
            let (f, row) = (f.wide(), b as usize * self.width..(b as usize + 1) * self.width);
            of_rec.iter_mut().zip(&self.rec[row.clone()]).for_each(|(sum, v)| *sum += f * v.wide());
            of_x.iter_mut().zip(&self.x[row]).for_each(|(sum, v)| *sum += f * v.wide());
        }
    }
}

/// Counts in bins of equal width.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// The lower edge of the first bin.
    pub low: f64,
    /// The upper edge of the last bin.
    pub high: f64,
    /// Bin `i` counts `low + i·w <= v < low + (i+1)·w`, `w = (high - low) / bins`; the last one its upper edge, too.
    pub counts: Vec<u64>,
    /// How many values lie outside.
    pub outside: u64,
}

impl Histogram {
    /// Counts `values` in `bins` bins over [low, high]: bin `⌊(v - low) / (high - low) · bins⌋`.
    pub fn new(low: f64, high: f64, bins: usize, values: impl IntoIterator<Item = f64>) -> Self {
        let mut out = Histogram { low, high, counts: vec![0; bins], outside: 0 };
        for v in values {
            if v >= low && v <= high && bins > 0 {
                let bin = ((v - low) / (high - low) * bins as f64) as usize;
                out.counts[bin.min(bins - 1)] += 1;
            } else {
                out.outside += 1;
            }
        }
        out
    }

    /// The edges of a bin.
    pub fn edges(&self, bin: usize) -> (f64, f64) {
        let width = (self.high - self.low) / self.counts.len() as f64;
        (self.low + bin as f64 * width, self.low + (bin + 1) as f64 * width)
    }

    /// The number of values inside.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Calls `f(h, W_dec[h])` for each latent, the row [n_models · d_in] in float64.
fn each_decoder_row<B: Backend>(
    crosscoder: &CrossCoder<B>,
    latents: Range<usize>,
    mut f: impl FnMut(usize, &[f64]),
) -> Result<()> {
    let width = crosscoder.n_models() * crosscoder.d_in();
    let mut rows = vec![B::Scalar::default(); ROWS * width];
    let mut wide = vec![0.0; width];
    for start in latents.clone().step_by(ROWS) {
        let end = (start + ROWS).min(latents.end);
        let rows = &mut rows[..(end - start) * width];
        crosscoder.backend().download(&crosscoder.params.w_dec, start * width, rows)?;
        for (h, row) in (start..end).zip(rows.chunks_exact(width)) {
            wide.iter_mut().zip(row).for_each(|(o, v)| *o = v.wide());
            f(h, &wide);
        }
    }
    Ok(())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn finite(v: f64) -> Option<f64> {
    v.is_finite().then_some(v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autodiff::Parameters;
    use crate::backend::Cpu;
    use crate::config::Config;
    use crate::dtype::Dtype;
    use crate::tensor::{Tensor, Values};

    fn cfg(d_in: usize, dict_size: usize) -> Config {
        let mut cfg = Config::default();
        cfg.set("d_in", d_in);
        cfg.set("dict_size", dict_size);
        cfg
    }

    fn tensor(shape: &[usize], values: Vec<f32>) -> Tensor {
        Tensor::new(shape.to_vec(), Values::F32(values)).unwrap()
    }

    /// Numbers in [-1, 1), from a linear congruence.
    struct Noise(u64);

    impl Noise {
        fn take(&mut self, n: usize) -> Vec<f32> {
            let mut next = || {
                self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..n).map(|_| next()).collect()
        }
    }

    fn noisy<T: Scalar>(dtype: Dtype, n_models: usize, d_in: usize, d_hidden: usize) -> CrossCoder<Cpu<T>> {
        let mut noise = Noise(7);
        let mut w_dec = noise.take(d_hidden * n_models * d_in);
        w_dec[..d_in].fill(0.0); // latent 0 is not in model 0
        w_dec[n_models * d_in..2 * n_models * d_in].fill(0.0); // latent 1 is in none
        let mut b_enc = noise.take(d_hidden);
        b_enc[2] = -1e3; // latent 2 never fires
        let weights = Parameters {
            w_enc: tensor(&[n_models, d_in, d_hidden], noise.take(n_models * d_in * d_hidden)),
            w_dec: tensor(&[d_hidden, n_models, d_in], w_dec),
            b_enc: tensor(&[d_hidden], b_enc),
            b_dec: tensor(&[n_models, d_in], noise.take(n_models * d_in)),
        };
        CrossCoder::from_tensors(Cpu::new(dtype), cfg(d_in, d_hidden), weights).unwrap()
    }

    /// d_in 2, five latents whose decoder vectors are easy; W_enc copies the first column of model A into every latent.
    fn by_hand() -> CrossCoder {
        #[rustfmt::skip]
        let w_dec = vec![
            3.0, 4.0,   0.0, 0.0, // A only: norms 5, 0
            0.0, 2.0,   2.0, 0.0, // shared, orthogonal
            1.0, 0.0,  -9.0, 0.0, // B only: 1, 9; opposite
            0.0, 0.0,   0.0, 0.0, // in neither
            0.6, 0.8,   1.2, 1.6, // shared: 1, 2; parallel
        ];
        let mut w_enc = vec![0.0; 2 * 2 * 5];
        w_enc[..5].fill(1.0);
        let weights = Parameters {
            w_enc: tensor(&[2, 2, 5], w_enc),
            w_dec: tensor(&[5, 2, 2], w_dec),
            b_enc: tensor(&[5], vec![0.0, -1.0, -2.0, 0.0, -100.0]),
            b_dec: tensor(&[2, 2], vec![0.0; 4]),
        };
        CrossCoder::from_tensors(Cpu::new(Dtype::F32), cfg(2, 5), weights).unwrap()
    }

    #[test]
    fn norms_groups_and_cosines_of_easy_vectors() {
        let norms = DecoderNorms::of(&by_hand()).unwrap();
        let thresholds = Thresholds::default();
        assert_eq!([0, 1, 2, 3].map(|h| norms.norms(h).to_vec()), [[5.0, 0.0], [2.0, 2.0], [1.0, 9.0], [0.0, 0.0]]);
        assert_eq!([0, 1, 2, 3].map(|h| norms.relative_norm(h)), [Some(0.0), Some(0.5), Some(0.9), None]);
        assert_eq!([0, 1, 2, 3].map(|h| norms.cosine(h)), [None, Some(0.0), Some(-1.0), None]);
        let groups = [Some(Group::AOnly), Some(Group::Shared), Some(Group::BOnly), None, Some(Group::Shared)];
        assert_eq!([0, 1, 2, 3, 4].map(|h| norms.group(h, &thresholds)), groups);
        assert!((norms.cosine(4).unwrap() - 1.0).abs() < 1e-7);
        assert!((norms.relative_norm(4).unwrap() - 2.0 / 3.0).abs() < 1e-7);
        assert_eq!([0, 1, 2].map(|h| norms.strongest(h)), [0, 1, 1]);
    }

    #[test]
    fn shared_is_strictly_between_the_thresholds() {
        let thresholds = Thresholds::new(0.25, 0.75).unwrap();
        let groups = [0.25, 0.2500001, 0.7499999, 0.75].map(|r| thresholds.group(r));
        assert_eq!(groups, [Group::AOnly, Group::Shared, Group::Shared, Group::BOnly]);
        for (low, high) in [(0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (f64::NAN, 0.5)] {
            assert!(Thresholds::new(low, high).is_err());
        }
    }

    #[test]
    fn any_number_of_models_has_relative_norms_and_only_two_have_groups() {
        let norms = DecoderNorms::of(&noisy::<f32>(Dtype::F32, 3, 4, 6)).unwrap();
        let sum: f64 = (0..3).map(|m| norms.relative(4, m).unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-12);
        assert_eq!(norms.relative(1, 0), None);
        assert_eq!(
            (norms.relative_norm(4), norms.cosine(4), norms.group(4, &Thresholds::default())),
            (None, None, None)
        );
    }

    #[test]
    fn statistics_of_easy_rows() {
        let crosscoder = by_hand();
        let norms = DecoderNorms::of(&crosscoder).unwrap();
        let mut pass = ActivationPass::new(&crosscoder, &norms, 2);
        // Activations of the latents: rows (1, 0, 0, 1, 0), (3, 2, 1, 3, 0), none, (3, 2, 1, 3, 0).
        pass.add(&[1.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 1.0]).unwrap();
        pass.add(&[]).unwrap();
        pass.add(&[-1.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 1.0]).unwrap();
        let stats = pass.finish().unwrap();
        assert_eq!((stats.rows, stats.batches, stats.dead()), (4, 2, 1));
        assert_eq!(stats.l0, [1, 0, 1, 0, 2]);
        assert_eq!([0, 1, 2, 4].map(|h| stats.density(h)), [0.75, 0.5, 0.5, 0.0]);
        let first = &stats.latents[0];
        assert_eq!((first.max, first.sum, first.sum_squares), (3.0, 7.0, 19.0));
        assert_eq!(first.top, [TopRow { row: 1, act: 3.0 }, TopRow { row: 3, act: 3.0 }]);
        assert_eq!((stats.latents[4].mean_when_active(), stats.latents[4].top.len()), (None, 0));
        // Rows of rec: (3, 4, 0, 0), (10, 16, -5, 0), 0, (10, 16, -5, 0); errors of A 4+16, 49+256, 1, 49+256; of B 0,
        // 26, 0, 26. Variances: A 20 - 36/4 = 11 around the mean 1.5; B 2 - 4/4 = 1.
        assert_eq!(stats.explained_variance_per_model, [1.0 - 631.0 / 11.0, 1.0 - 52.0]);
        assert_eq!(stats.explained_variance, 1.0 - 683.0 / 12.0);
        assert_eq!(stats.losses[0], ("l2_loss".to_owned(), 683.0 / 4.0));
        assert_eq!(stats.losses[2], ("l0_loss".to_owned(), 10.0 / 4.0));
        // Latent 0, direction A (3, 4): F = 19, ‖d‖² = 25.
        // R_A = 1·(9 + 16) + 2·3·(30 + 64) = 589, R_B = 2·3·(-15) = -90; X_A = 3 + 2·3·9 = 57, X_B = 2·3·4 = 24.
        let scaling = stats.scaling(&norms, 0).unwrap();
        assert_eq!(scaling.direction, 0);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(scaling.beta_reconstruction[0], 589.0 / 475.0);
        close(scaling.beta_reconstruction[1], -90.0 / 475.0);
        close(scaling.beta_error[0], (57.0 - 589.0 + 475.0) / 475.0);
        close(scaling.beta_error[1], (24.0 + 90.0) / 475.0);
        close(scaling.nu_reconstruction().unwrap(), -90.0 / 589.0);
        close(scaling.nu_error().unwrap(), 114.0 / -57.0);
        assert_eq!(stats.scaling(&norms, 3), None, "no decoder vector");
        assert_eq!(stats.scaling(&norms, 4), None, "never fires");
    }

    #[test]
    fn no_rows_have_no_means() {
        let crosscoder = by_hand();
        let norms = DecoderNorms::of(&crosscoder).unwrap();
        assert!(ActivationPass::new(&crosscoder, &norms, 1).finish().is_err());
        assert!(ActivationPass::new(&crosscoder, &norms, 1).add(&[1.0; 3]).is_err());
    }

    /// The targets of the module's text, formed for **all** rows and columns, and their least-squares factors by the
    /// normal equation, which a step to either side makes worse.
    fn brute_force<T: Scalar>(crosscoder: &CrossCoder<Cpu<T>>, x: &[T]) {
        let (n, d_in, d_hidden) = (crosscoder.n_models(), crosscoder.d_in(), crosscoder.d_hidden());
        let width = n * d_in;
        let batch = x.len() / width;
        let norms = DecoderNorms::of(crosscoder).unwrap();
        let mut pass = ActivationPass::new(crosscoder, &norms, 3);
        for piece in x.chunks(5 * width) {
            pass.add(piece).unwrap();
        }
        let stats = pass.finish().unwrap();

        let (mut acts, mut rec) = (vec![T::default(); batch * d_hidden], vec![T::default(); x.len()]);
        crosscoder.encode_into(x, true, &mut acts).unwrap();
        crosscoder.forward_into(x, &mut rec).unwrap();
        let w_dec = crosscoder.to_tensors().unwrap().w_dec.to_f64_vec();
        let mut checked = 0;
        for h in 0..d_hidden {
            let Some(scaling) = stats.scaling(&norms, h) else { continue };
            let vector = |m: usize| &w_dec[(h * n + m) * d_in..(h * n + m + 1) * d_in];
            for m in 0..n {
                // All (b,d): the column a of the least-squares problem a · beta ≈ y, and y.
                let problem = |error: bool| -> Vec<(f64, f64)> {
                    let at = (0..batch).flat_map(|b| (0..d_in).map(move |d| (b, d)));
                    at.map(|(b, d)| {
                        let f = acts[b * d_hidden + h].wide();
                        let at = b * width + m * d_in + d;
                        let without = rec[at].wide() - f * vector(m)[d];
                        let x = x[at].rounded_to(crosscoder.dtype()).wide();
                        let y = if error { x - without } else { rec[at].wide() };
                        (f * vector(scaling.direction)[d], y)
                    })
                    .collect()
                };
                for (beta, error) in [(scaling.beta_reconstruction[m], false), (scaling.beta_error[m], true)] {
                    let problem = problem(error);
                    let sum = |f: fn(&(f64, f64)) -> f64| problem.iter().map(f).sum::<f64>();
                    let minimum = sum(|(a, y)| a * y) / sum(|(a, _)| a * a);
                    assert!(
                        (beta - minimum).abs() < 1e-10 * (1.0 + beta.abs()),
                        "latent {h} model {m}: {beta} {minimum}"
                    );
                    let cost = |beta: f64| problem.iter().map(|(a, y)| (beta * a - y).powi(2)).sum::<f64>();
                    let step = 1e-2 * (1.0 + beta.abs());
                    assert!(cost(beta + step) > cost(beta) && cost(beta - step) > cost(beta));
                    checked += 1;
                }
            }
        }
        assert!(checked >= 2 * n * (d_hidden - 3), "most latents fire, {checked} factors checked");
    }

    #[test]
    fn latent_scaling_is_the_least_squares_solution() {
        let x = Noise(3).take(23 * 2 * 4);
        let wide: Vec<f64> = x.iter().map(|&v| v.into()).collect();
        brute_force(&noisy::<f64>(Dtype::F32, 2, 4, 12), &wide);
        brute_force(&noisy::<f32>(Dtype::F32, 2, 4, 12), &x);
        brute_force(&noisy::<f32>(Dtype::BF16, 2, 4, 12), &x);
        brute_force(&noisy::<f32>(Dtype::F32, 3, 4, 9), &Noise(4).take(11 * 3 * 4));
    }

    #[test]
    fn an_exclusive_latent_has_nu_zero_and_a_copied_one_nu_one() {
        // x is made of latent 0 (A only, along column 0) and of latent 1 (equal in both, along column 1), exactly
        // reconstructed.
        let w_enc = vec![1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        let weights = Parameters {
            w_enc: tensor(&[2, 2, 2], w_enc),
            w_dec: tensor(&[2, 2, 2], vec![1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]),
            b_enc: tensor(&[2], vec![0.0; 2]),
            b_dec: tensor(&[2, 2], vec![0.0; 4]),
        };
        let crosscoder: CrossCoder = CrossCoder::from_tensors(Cpu::new(Dtype::F32), cfg(2, 2), weights).unwrap();
        let norms = DecoderNorms::of(&crosscoder).unwrap();
        let mut pass = ActivationPass::new(&crosscoder, &norms, 0);
        pass.add(&[2.0, 3.0, 0.0, 3.0, 1.0, 5.0, 0.0, 5.0]).unwrap();
        let stats = pass.finish().unwrap();
        let nu = |h: usize| stats.scaling(&norms, h).map(|s| (s.nu_reconstruction(), s.nu_error())).unwrap();
        assert_eq!(nu(0), (Some(0.0), Some(0.0)));
        assert_eq!(nu(1), (Some(1.0), Some(1.0)));
        assert_eq!(stats.explained_variance, 1.0);
    }

    #[test]
    fn every_backend_and_path_gives_the_same_support() {
        use crate::sparse::Path;
        let x = Noise(9).take(6 * 2 * 4);
        let supports = [Path::Dense, Path::Sparse].map(|path| {
            let backend = Cpu::<f32>::new(Dtype::F32).with_path(path);
            let crosscoder = noisy::<f32>(Dtype::F32, 2, 4, 12);
            let mut input = Default::default();
            backend.fill(6, 8, &x, &mut input).unwrap();
            let mut acts = Default::default();
            backend.encode(&input, &crosscoder.params.w_enc, &crosscoder.params.b_enc, &mut acts).unwrap();
            backend.support(&acts).unwrap()
        });
        assert_eq!(supports[0], supports[1]);
        assert!(supports[0].values.iter().all(|&v| v > 0.0) && supports[0].starts.len() == 7);
    }

    #[test]
    fn bins_are_half_open_and_the_last_is_closed() {
        let values = [0.0, 0.24, 0.25, 0.5, 0.99, 1.0, -0.01, 1.01, f64::NAN];
        let histogram = Histogram::new(0.0, 1.0, 4, values);
        assert_eq!((histogram.counts.as_slice(), histogram.outside), (&[2, 1, 1, 2][..], 3));
        assert_eq!((histogram.edges(1), histogram.total()), ((0.25, 0.5), 6));
    }
}
