//! One step of training: `trainer.py` of the original, name by name. What a run does around its steps (checkpoints,
//! resuming, logging) is told in [`crate::run`].

use crate::autodiff::{Parameters, Tape, mean};
use crate::backend::{Backend, Scalar, Shaped};
use crate::checkpoint::Source;
use crate::config::Config;
use crate::crosscoder::{CrossCoder, LossOutput, Losses, model_name};
use crate::error::{Error, ErrorKind, Result};
use crate::optim::{Adam, Clip, Moments, clip_grad_norm, first_not_finite};
use crate::tensor::Tensor;

/// The norm that gradients are clipped to. Original: `clip_grad_norm_(…, max_norm=1.0)`.
pub const MAX_GRAD_NORM: f64 = 1.0;

/// The learning rate and the l1 coefficient over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// `num_tokens // batch_size`
    pub total_steps: u64,
    /// cfg `lr`: the rate before the decay.
    pub lr: f64,
    /// cfg `l1_coeff`: the coefficient after the warm-up.
    pub l1_coeff: f64,
}

impl Schedule {
    /// The schedule that a cfg asks for.
    ///
    /// # Errors
    /// If `num_tokens`, `batch_size`, `lr` or `l1_coeff` is missing or no such number; an `lr` below 0, which PyTorch refuses too.
    pub fn from_cfg(cfg: &Config) -> Result<Self> {
        let total_steps = (cfg.count("num_tokens")? / cfg.size("batch_size")?) as u64;
        let lr = cfg.number("lr")?;
        if lr < 0.0 {
            return Err(Error::config(format!("cfg key \"lr\" needs a number of 0 or more, found {lr}")));
        }
        Ok(Schedule { total_steps, lr, l1_coeff: cfg.number("l1_coeff")? })
    }

    /// 1, then over the last fifth of the steps linearly down to 0. Original: `lr_lambda`.
    pub fn lr_lambda(&self, step: u64) -> f64 {
        let (step, total) = (step as f64, self.total_steps as f64);
        if step < 0.8 * total { 1.0 } else { 1.0 - (step - 0.8 * total) / (0.2 * total) }
    }

    /// The learning rate of this step (from 0): `lr · lr_lambda(step)`.
    pub fn lr(&self, step: u64) -> f64 {
        self.lr * self.lr_lambda(step)
    }

    /// Over the first twentieth of the steps linearly up from 0 to `l1_coeff`. Original: `get_l1_coeff`.
    pub fn l1_coeff(&self, step: u64) -> f64 {
        let (step, warm_up) = (step as f64, 0.05 * self.total_steps as f64);
        if step < warm_up { self.l1_coeff * step / warm_up } else { self.l1_coeff }
    }
}

/// `beta1` and `beta2`, from 0 to less than 1: PyTorch refuses others too.
pub(crate) fn betas(cfg: &Config) -> Result<[f64; 2]> {
    let beta = |key| match cfg.number(key)? {
        beta if (0.0..1.0).contains(&beta) => Ok(beta),
        beta => Err(Error::config(format!("cfg key {key:?} needs a number from 0 to less than 1, found {beta}"))),
    };
    Ok([beta("beta1")?, beta("beta2")?])
}

/// What a step logs. Original: `loss_dict`; `grad_norm` is what its `clip_grad_norm_` returns.
#[derive(Clone, Debug, PartialEq)]
pub struct LogRow {
    /// `l2_loss + l1_coeff · l1_loss`
    pub loss: f64,
    /// See [`LossOutput`].
    pub l2_loss: f64,
    /// See [`LossOutput`].
    pub l1_loss: f64,
    /// See [`LossOutput`].
    pub l0_loss: f64,
    /// The coefficient of this step.
    pub l1_coeff: f64,
    /// The rate of the **next** step: the original reads it after its scheduler has stepped.
    pub lr: f64,
    /// The mean over the batch.
    pub explained_variance: f64,
    /// The means over the batch for each model.
    pub explained_variance_per_model: Vec<f64>,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
}

impl LogRow {
    /// The original's names and values, in its order, without `grad_norm`, which it does not log.
    pub fn named(&self) -> Vec<(String, f64)> {
        let mut rows: Vec<(String, f64)> = [
            ("loss", self.loss),
            ("l2_loss", self.l2_loss),
            ("l1_loss", self.l1_loss),
            ("l0_loss", self.l0_loss),
            ("l1_coeff", self.l1_coeff),
            ("lr", self.lr),
            ("explained_variance", self.explained_variance),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let n = self.explained_variance_per_model.len();
        for (m, &value) in self.explained_variance_per_model.iter().enumerate() {
            rows.push((format!("explained_variance_{}", model_name(m, n)), value));
        }
        rows
    }
}

/// The first half of a step: the losses and the norm of their gradients, the parameters not yet changed.
#[derive(Clone, Debug)]
pub struct Gradients<S> {
    loss: f64,
    output: LossOutput,
    clip: Clip<S>,
}

/// A crosscoder in training, with its optimiser. Original: `class Trainer`, whose buffer is [`crate::buffer`] here.
pub struct Trainer<B: Backend> {
    crosscoder: CrossCoder<B>,
    pub(crate) optimizer: Adam<B>,
    schedule: Schedule,
    step_counter: u64,
    tape: Tape<B>,
    pub(crate) grads: Parameters<B::Matrix>,
}

impl<B: Backend> Trainer<B> {
    /// A trainer before its first step, after the crosscoder's cfg.
    ///
    /// # Errors
    /// A cfg that lacks a key that training needs (`num_tokens`, `batch_size`, `lr`, `l1_coeff`, `beta1`, `beta2`),
    /// or has one out of its range.
    pub fn new(crosscoder: CrossCoder<B>) -> Result<Self> {
        let cfg = crosscoder.cfg();
        let schedule = Schedule::from_cfg(cfg)?;
        let [beta1, beta2] = betas(cfg)?;
        let optimizer = Adam::new(&crosscoder.backend, &crosscoder.params, beta1, beta2)?;
        let tape = Tape::new(crosscoder.backend.clone());
        Ok(Trainer { crosscoder, optimizer, schedule, step_counter: 0, tape, grads: Parameters::default() })
    }

    /// The same trainer with the optimiser where it was after `steps` steps; the crosscoder is the one after these.
    ///
    /// # Errors
    /// Moments of other shapes than the parameters.
    pub fn resumed(mut self, steps: u64, moments: Moments<Tensor>) -> Result<Self> {
        let (backend, cfg) = (self.crosscoder.backend.clone(), self.crosscoder.cfg.clone());
        // A moment has the shape and layout of its parameter.
        let lying = |of| CrossCoder::from_tensors(backend.clone(), cfg.clone(), of).map(|c| c.params);
        self.optimizer.moments = Moments {
            exp_avg: lying(moments.exp_avg).map_err(|e| e.at("exp_avg"))?,
            exp_avg_sq: lying(moments.exp_avg_sq).map_err(|e| e.at("exp_avg_sq"))?,
        };
        self.optimizer.steps = steps;
        self.step_counter = steps;
        Ok(self)
    }

    /// The optimiser's moments, to go on later with [`Self::resumed`]: a copy.
    ///
    /// # Errors
    /// Those of the device.
    pub fn moments(&self) -> Result<Moments<Tensor>> {
        Ok(Moments {
            exp_avg: self.crosscoder.tensors_of(&self.optimizer.moments.exp_avg)?,
            exp_avg_sq: self.crosscoder.tensors_of(&self.optimizer.moments.exp_avg_sq)?,
        })
    }

    /// The same moments, `exp_avg` and `exp_avg_sq`, as something to be saved in pieces.
    pub(crate) fn moment_sources(&self) -> [[Source<'_, B>; 4]; 2] {
        let Moments { exp_avg, exp_avg_sq } = &self.optimizer.moments;
        [self.crosscoder.sources_of(exp_avg), self.crosscoder.sources_of(exp_avg_sq)]
    }

    /// The cfg that is saved with the crosscoder. The schedule stays as it was.
    pub fn cfg_mut(&mut self) -> &mut Config {
        self.crosscoder.cfg_mut()
    }

    /// The crosscoder as it is now.
    pub fn crosscoder(&self) -> &CrossCoder<B> {
        &self.crosscoder
    }

    /// The crosscoder, its training given up.
    pub fn into_crosscoder(self) -> CrossCoder<B> {
        self.crosscoder
    }

    /// Learning rate and l1 coefficient over the run.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The number of steps taken.
    pub fn step_counter(&self) -> u64 {
        self.step_counter
    }

    /// One step on a batch, `acts` row-major [batch, n_models, d_in], normalised already. Like the original it goes on where
    /// numbers are not finite; [`Self::check`] between the two halves tells. Original: `step`. Golden: `train.*`.
    ///
    /// # Errors
    /// Shapes that do not fit; a schedule of no steps; those of the device.
    pub fn step(&mut self, acts: &[B::Scalar]) -> Result<LogRow> {
        let gradients = self.backward(acts)?;
        self.update(gradients)
    }

    /// The first half of [`Self::step`]: `get_losses`, `loss.backward()` and the norm of `clip_grad_norm_`.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn backward(&mut self, acts: &[B::Scalar]) -> Result<Gradients<B::Scalar>> {
        let losses = self.crosscoder.losses_on(&mut self.tape, acts)?;
        self.gradients(losses)
    }

    /// [`Self::backward`] on a batch that [`Backend::fill`] made `x` of, on this crosscoder's backend; `x` is then what the last
    /// such batch was in, to be filled again. Where [`Backend::AHEAD`] holds, the next batch can so come up beside a step.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn backward_staged(&mut self, x: &mut B::Matrix) -> Result<Gradients<B::Scalar>> {
        let (shape, width) = (x.shape(), self.crosscoder.n_models() * self.crosscoder.d_in());
        if shape.1 != width {
            return Err(Error::shape(format!("a batch of rows of {}; they have n_models · d_in = {width}", shape.1)));
        }
        self.tape.clear();
        let x = self.tape.staged(x)?;
        let losses = self.crosscoder.losses_of(&mut self.tape, x)?;
        self.gradients(losses)
    }

    fn gradients(&mut self, losses: Losses) -> Result<Gradients<B::Scalar>> {
        if self.schedule.total_steps == 0 {
            return Err(Error::config("num_tokens is less than batch_size: there are no steps to take"));
        }
        let loss = self.tape.add_scaled(losses.l2, self.schedule.l1_coeff(self.step_counter), losses.l1)?;
        self.tape.backward(loss, &self.crosscoder.params, &mut self.grads)?;
        let clip = clip_grad_norm(&self.crosscoder.backend, &self.grads, MAX_GRAD_NORM)?;
        Ok(Gradients { loss: self.tape.scalar(loss).wide(), output: losses.output, clip })
    }

    /// The second half of [`Self::step`]: the gradients times their coefficient, `optimizer.step()`, `scheduler.step()`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn update(&mut self, gradients: Gradients<B::Scalar>) -> Result<LogRow> {
        let Gradients { loss, output, clip } = gradients;
        let step = self.step_counter;
        let be = &self.crosscoder.backend;
        let lr = self.schedule.lr(step);
        self.optimizer.step(be, &mut self.crosscoder.params, &self.grads, &clip, lr)?;
        self.step_counter += 1;
        // The original's means are tensors: of float32, and of the dtype.
        let rounded_mean = |per_row: &Vec<f64>| be.round(B::Scalar::narrow(mean(per_row))).wide();
        Ok(LogRow {
            loss,
            l2_loss: output.l2_loss,
            l1_loss: output.l1_loss,
            l0_loss: output.l0_loss,
            l1_coeff: self.schedule.l1_coeff(step),
            lr: self.schedule.lr(step + 1),
            explained_variance: B::Scalar::narrow(mean(&output.explained_variance)).wide(),
            explained_variance_per_model: output.explained_variance_per_model.iter().map(rounded_mean).collect(),
            grad_norm: clip.total_norm.wide(),
        })
    }

    /// Whether this step's losses and gradients are finite; if not, which number is not, and why as far as can be seen: a
    /// row of the batch, a parameter, or neither (an overflow on the way).
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`]; its message names step (from 0) and tensor. The row, where one is to blame, is the second.
    pub fn check(&self, gradients: &Gradients<B::Scalar>, acts: &[B::Scalar]) -> Result<(), (Error, Option<usize>)> {
        let (output, clip) = (&gradients.output, &gradients.clip);
        let losses = [("l2_loss", output.l2_loss), ("l1_loss", output.l1_loss), ("loss", gradients.loss)];
        let culprit = losses.iter().find(|(_, value)| !value.is_finite());
        let found = match (culprit, first_not_finite(&clip.norms)) {
            (Some((name, value)), _) => format!("{name} is {value}"),
            (None, Some(name)) => format!("the gradient of {name} is not finite"),
            (None, None) if !clip.total_norm.wide().is_finite() => "the norm of all gradients is not finite".to_owned(),
            (None, None) => return Ok(()),
        };
        let width = self.crosscoder.n_models() * self.crosscoder.d_in();
        let dtype = self.crosscoder.dtype();
        // A value is to blame if the dtype does not hold it, or float32, in which losses are sums, not its square.
        let is_bad = |v: B::Scalar| !v.rounded_to(dtype).wide().is_finite() || (v.wide().powi(2) as f32).is_infinite();
        let bad = acts.iter().position(|&v| is_bad(v));
        let (why, row) = match (bad, self.check_parameters()) {
            (Some(at), _) => {
                let (row, col) = (at / width, at % width);
                let (m, d) = (col / self.crosscoder.d_in(), col % self.crosscoder.d_in());
                let model = model_name(m, self.crosscoder.n_models());
                (format!("row {row} of the batch is {} in {dtype} at model {model}, {d}", acts[at].wide()), Some(row))
            }
            (None, Err(parameter)) => (format!("{parameter} after the step before"), None),
            (None, Ok(())) => (format!("batch and parameters are finite, so {dtype} overflowed"), None),
        };
        let what = format!("{found}: {why}");
        Err((Error::new(ErrorKind::NonFinite, what).at(format!("step {}", self.step_counter)), row))
    }

    /// Whether every parameter is finite. A checkpoint of parameters that are not would be worthless.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`] with the name of one that is not.
    pub fn check_parameters(&self) -> Result<()> {
        let mut norms = [B::Scalar::default(); 4];
        for (norm, param) in norms.iter_mut().zip(self.crosscoder.params.each()) {
            *norm = self.crosscoder.backend.norm(param)?;
        }
        match first_not_finite(&norms) {
            Some(name) => Err(Error::new(ErrorKind::NonFinite, format!("the norm of {name} is not finite"))),
            None => Ok(()),
        }
    }
}
