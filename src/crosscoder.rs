//! The crosscoder: `crosscoder.py` of the original, name by name.

use crate::autodiff::{Parameters, Tape, Var, mean};
use crate::backend::{Backend, Cpu, Precision, Scalar, Shaped};
use crate::batch_topk::BatchTopK;
use crate::config::Config;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, Values};
use ndarray::{Array2, Array3, ArrayView2, ArrayView3};

/// What [`CrossCoder::get_losses`] returns. Original: `LossOutput`.
///
/// Numbers are those of the original's types (float32, or the dtype), widened without loss.
#[derive(Clone, Debug, PartialEq)]
pub struct LossOutput {
    /// `mean_b Σ_{m,d} (rec - x)²`, float32.
    pub l2_loss: f64,
    /// `mean_b Σ_h acts[b,h] · Σ_m ‖W_dec[h,m]‖`, in the dtype.
    pub l1_loss: f64,
    /// The mean number of latents above zero, float32.
    pub l0_loss: f64,
    /// For each row `1 - Σ (rec - x)² / Σ (x - mean)²` over both models, the mean being the batch's; float32.
    pub explained_variance: Vec<f64>,
    /// The same for each model alone, in the dtype. Two models are A and B.
    pub explained_variance_per_model: Vec<Vec<f64>>,
}

impl LossOutput {
    /// The names and values of the original's `LossOutput` as its trainer logs them: explained variances as means over
    /// the batch; `explained_variance_A`, `_B` for two models, `_0`, `_1`, … for any other number.
    pub fn named(&self) -> Vec<(String, f64)> {
        let mut rows = vec![
            ("l2_loss".to_owned(), self.l2_loss),
            ("l1_loss".to_owned(), self.l1_loss),
            ("l0_loss".to_owned(), self.l0_loss),
            ("explained_variance".to_owned(), mean(&self.explained_variance)),
        ];
        let n = self.explained_variance_per_model.len();
        for (m, per_row) in self.explained_variance_per_model.iter().enumerate() {
            rows.push((format!("explained_variance_{}", model_name(m, n)), mean(per_row)));
        }
        rows
    }
}

/// `A`, `B` for two models, `0`, `1`, … otherwise.
pub(crate) fn model_name(m: usize, n_models: usize) -> String {
    match (n_models, m) {
        (2, 0) => "A".to_owned(),
        (2, 1) => "B".to_owned(),
        _ => m.to_string(),
    }
}

/// `n_models`, `d_in`, `d_hidden` of weights that fit each other and the cfg.
///
/// # Errors
/// Shapes that contradict each other or the cfg's `d_in`, `dict_size` and, if it is there, `n_models`; integer weights.
pub(crate) fn checked_shape(cfg: &Config, weights: &Parameters<Tensor>) -> Result<[usize; 3]> {
    let (d_in, d_hidden) = (cfg.d_in()?, cfg.dict_size()?);
    let n_models = match weights.w_enc.shape() {
        &[n_models, _, _] if n_models > 0 => n_models,
        shape => {
            return Err(Error::shape(format!("W_enc has shape {shape:?}; it needs [n_models, d_in, dict_size]")));
        }
    };
    if cfg.get("n_models").is_some() && cfg.n_models()? != n_models {
        let found = format!("W_enc has shape {:?}; the cfg has n_models {}", weights.w_enc.shape(), cfg.n_models()?);
        return Err(Error::shape(found));
    }
    let needed = [vec![n_models, d_in, d_hidden], vec![d_hidden, n_models, d_in], vec![d_hidden], vec![n_models, d_in]];
    for ((tensor, needed), name) in weights.each().iter().zip(&needed).zip(crate::autodiff::PARAMETER_NAMES) {
        if tensor.shape() != needed {
            return Err(Error::shape(format!(
                "{name} has shape {:?}; the cfg (d_in {d_in}, dict_size {d_hidden}) needs {needed:?}",
                tensor.shape()
            )));
        }
        if !matches!(tensor.dtype(), Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::unsupported(format!("{name} has dtype {}; weights are floats", tensor.dtype())));
        }
    }
    Ok([n_models, d_in, d_hidden])
}

/// The terms of the loss on a tape, and what the log shows.
pub(crate) struct Losses {
    /// [batch, n_models · d_in], in the dtype.
    pub(crate) x: Var,
    /// [batch, d_hidden]
    pub(crate) acts: Var,
    /// [batch, n_models · d_in]
    pub(crate) x_reconstruct: Var,
    pub(crate) l2: Var,
    pub(crate) l1: Var,
    pub(crate) output: LossOutput,
}

/// A crosscoder on a backend. Original: `class CrossCoder`.
///
/// All methods that compute take `&self`; a value can be shared between threads.
#[derive(Clone, Debug)]
pub struct CrossCoder<B: Backend = Cpu> {
    pub(crate) backend: B,
    pub(crate) cfg: Config,
    pub(crate) params: Parameters<B::Matrix>,
    /// What latents must exceed, if the cfg says so. The original has none.
    batch_topk: Option<BatchTopK>,
    n_models: usize,
    d_in: usize,
    d_hidden: usize,
}

impl<B: Backend> CrossCoder<B> {
    /// A crosscoder with these weights: `W_enc` [n_models, d_in, d_hidden], `W_dec` [d_hidden, n_models, d_in], `b_enc`
    /// \[d_hidden\], `b_dec` [n_models, d_in], cast to the backend's dtype. No value is copied that already lies right: `W_enc`
    /// as [d_hidden, n_models, d_in], which is how the original lays it out, in the backend's dtype. A cfg with another `enc_dtype`
    /// gets the backend's.
    ///
    /// # Errors
    /// Shapes that contradict each other or the cfg's `d_in`, `dict_size` and, if it is there, `n_models`; integer weights; a
    /// cfg with a threshold that [`BatchTopK::from_cfg`] refuses.
    pub fn from_tensors(backend: B, mut cfg: Config, weights: Parameters<Tensor>) -> Result<Self> {
        let [n_models, d_in, d_hidden] = checked_shape(&cfg, &weights)?;
        let width = n_models * d_in;
        let lying = |t: Tensor| t.into_row_major().into_values();
        let params = Parameters {
            w_enc: backend.upload(d_hidden, width, lying(weights.w_enc.permuted(&[2, 0, 1])))?,
            w_dec: backend.upload(d_hidden, width, lying(weights.w_dec))?,
            b_enc: backend.upload(1, d_hidden, lying(weights.b_enc))?,
            b_dec: backend.upload(1, width, lying(weights.b_dec))?,
        };
        let batch_topk = BatchTopK::from_cfg(&cfg, n_models)?;
        if let (Ok(dtype), Some(name)) = (cfg.enc_dtype(), backend.dtype().enc_name())
            && dtype != backend.dtype()
        {
            cfg.set("enc_dtype", name);
        }
        Ok(CrossCoder { backend, cfg, params, batch_topk, n_models, d_in, d_hidden })
    }

    /// The number of models whose activations are read; 2 in the original.
    pub fn n_models(&self) -> usize {
        self.n_models
    }

    /// The width of one model's activations.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// The number of latents. Original: `d_hidden`, in the cfg `dict_size`.
    pub fn d_hidden(&self) -> usize {
        self.d_hidden
    }

    /// The type of the parameters.
    pub fn dtype(&self) -> Dtype {
        self.backend.dtype()
    }

    /// The cfg, with keys that this crate does not know kept.
    pub fn cfg(&self) -> &Config {
        &self.cfg
    }

    /// The cfg, to add or change keys that are saved with the model. Those that say what is computed were read when it was made.
    pub fn cfg_mut(&mut self) -> &mut Config {
        &mut self.cfg
    }

    /// The backend that holds the parameters.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Pre-activations or activations of the latents, `r(r(x · W_enc) + b_enc)`, with relu unless `apply_relu` is false.
    /// Where the cfg has a threshold (see [`crate::batch_topk`]), activations that do not exceed it are 0.
    ///
    /// x [batch, n_models, d_in], cast to the dtype → [batch, d_hidden]. Original: `encode`. Golden: `encode`,
    /// `encode_no_relu`.
    ///
    /// # Errors
    /// x of another shape.
    pub fn encode(&self, x: ArrayView3<'_, B::Scalar>, apply_relu: bool) -> Result<Array2<B::Scalar>> {
        let (batch, rows) = (x.dim().0, self.rows_of(x)?);
        let mut out = vec![B::Scalar::default(); batch * self.d_hidden];
        self.encode_into(&rows, apply_relu, &mut out)?;
        Ok(Array2::from_shape_vec((batch, self.d_hidden), out).expect("as many elements as the shape has"))
    }

    /// [`Self::encode`] from and into plain row-major slices: x [batch · n_models · d_in] → out [batch · d_hidden].
    ///
    /// # Errors
    /// Lengths that do not fit each other.
    pub fn encode_into(&self, x: &[B::Scalar], apply_relu: bool, out: &mut [B::Scalar]) -> Result<()> {
        let batch = self.batch_of("x", x.len(), self.n_models * self.d_in)?;
        self.check_len("out", out.len(), batch, self.d_hidden)?;
        let x = self.upload_x(batch, x)?;
        if apply_relu {
            let mut acts = B::Latents::default();
            self.encode_on(&x, &mut acts)?;
            self.backend.download_latents(&acts, out)
        } else {
            let mut dense = B::Matrix::default();
            self.backend.linear(&x, &self.params.w_enc, &self.params.b_enc, &mut dense)?;
            self.backend.download(&dense, 0, out)
        }
    }

    /// [`Self::encode`] on the backend, with relu.
    pub(crate) fn encode_on(&self, x: &B::Matrix, acts: &mut B::Latents) -> Result<()> {
        self.backend.encode(x, &self.params.w_enc, &self.params.b_enc, acts)?;
        match &self.batch_topk {
            Some(batch_topk) => batch_topk.cut(&self.backend, &self.params.w_dec, self.n_models, acts),
            None => Ok(()),
        }
    }

    /// The reconstruction `r(r(acts · W_dec) + b_dec)`. acts [batch, d_hidden], cast to the dtype → [batch, n_models, d_in].
    ///
    /// Original: `decode`. Golden: `decode`.
    ///
    /// # Errors
    /// acts of another shape.
    pub fn decode(&self, acts: ArrayView2<'_, B::Scalar>) -> Result<Array3<B::Scalar>> {
        let (batch, latents) = acts.dim();
        if latents != self.d_hidden {
            return Err(Error::shape(format!(
                "acts has shape [{batch}, {latents}]; it needs [batch, {}]",
                self.d_hidden
            )));
        }
        let acts: Vec<B::Scalar> = acts.iter().copied().collect();
        let mut out = vec![B::Scalar::default(); batch * self.n_models * self.d_in];
        self.decode_into(&acts, &mut out)?;
        Ok(self.array3(batch, out))
    }

    /// [`Self::decode`] from and into plain row-major slices: acts [batch · d_hidden] → out [batch · n_models · d_in].
    ///
    /// # Errors
    /// Lengths that do not fit each other.
    pub fn decode_into(&self, acts: &[B::Scalar], out: &mut [B::Scalar]) -> Result<()> {
        let batch = self.batch_of("acts", acts.len(), self.d_hidden)?;
        self.check_len("out", out.len(), batch, self.n_models * self.d_in)?;
        let (mut dense, mut latents, mut rec) = Default::default();
        self.backend.fill(batch, self.d_hidden, acts, &mut dense)?;
        self.backend.to_latents(&dense, &mut latents)?;
        self.backend.decode(&latents, &self.params.w_dec, &self.params.b_dec, &mut rec)?;
        self.backend.download(&rec, 0, out)
    }

    /// `decode(encode(x))`: x and the result [batch, n_models, d_in]. Original: `forward`. Golden: `decode`.
    ///
    /// # Errors
    /// x of another shape.
    pub fn forward(&self, x: ArrayView3<'_, B::Scalar>) -> Result<Array3<B::Scalar>> {
        let (batch, rows) = (x.dim().0, self.rows_of(x)?);
        let mut out = vec![B::Scalar::default(); batch * self.n_models * self.d_in];
        self.forward_into(&rows, &mut out)?;
        Ok(self.array3(batch, out))
    }

    /// [`Self::forward`] from and into plain row-major slices of batch · n_models · d_in.
    ///
    /// # Errors
    /// Lengths that do not fit each other.
    pub fn forward_into(&self, x: &[B::Scalar], out: &mut [B::Scalar]) -> Result<()> {
        let width = self.n_models * self.d_in;
        let batch = self.batch_of("x", x.len(), width)?;
        self.check_len("out", out.len(), batch, width)?;
        let x = self.upload_x(batch, x)?;
        let (mut acts, mut rec) = Default::default();
        self.encode_on(&x, &mut acts)?;
        self.backend.decode(&acts, &self.params.w_dec, &self.params.b_dec, &mut rec)?;
        self.backend.download(&rec, 0, out)
    }

    /// The losses of a batch x [batch, n_models, d_in]. Original: `get_losses`. Golden: `l2_loss`, `l1_loss`, `l0_loss`,
    /// `explained_variance`, `explained_variance_A`, `explained_variance_B`.
    ///
    /// # Errors
    /// x of another shape, or an empty batch, of which no mean exists.
    pub fn get_losses(&self, x: ArrayView3<'_, B::Scalar>) -> Result<LossOutput> {
        Ok(self.losses_on(&mut Tape::new(self.backend.clone()), &self.rows_of(x)?)?.output)
    }

    /// The loss and its gradients with respect to the parameters, each in the layout of [`crate::backend`].
    /// Original: `loss = l2_loss + l1_coeff * l1_loss; loss.backward()`. Golden: `loss`, `grad.*`.
    ///
    /// # Errors
    /// As [`Self::get_losses`].
    pub fn loss_and_grads(
        &self,
        x: ArrayView3<'_, B::Scalar>,
        l1_coeff: f64,
    ) -> Result<(B::Scalar, Parameters<B::Matrix>)> {
        let mut tape = Tape::new(self.backend.clone());
        let losses = self.losses_on(&mut tape, &self.rows_of(x)?)?;
        let loss = tape.add_scaled(losses.l2, l1_coeff, losses.l1)?;
        let mut grads = Parameters::default();
        tape.backward(loss, &self.params, &mut grads)?;
        Ok((tape.scalar(loss), grads))
    }

    /// The terms of the loss, once for evaluation and training. `x` is row-major [batch, n_models, d_in].
    pub(crate) fn losses_on(&self, tape: &mut Tape<B>, x: &[B::Scalar]) -> Result<Losses> {
        let width = self.n_models * self.d_in;
        let batch = self.batch_of("x", x.len(), width)?;
        tape.clear();
        let x = tape.input(batch, width, x)?;
        self.losses_of(tape, x)
    }

    /// The same of a batch on the tape, with which it begins.
    pub(crate) fn losses_of(&self, tape: &mut Tape<B>, x: Var) -> Result<Losses> {
        let (be, width) = (&self.backend, self.n_models * self.d_in);
        if tape.matrix(x).shape().0 == 0 {
            return Err(Error::shape("x has no rows; the losses are means over at least one"));
        }
        let acts = tape.encode(&self.params, x)?;
        if let Some(batch_topk) = &self.batch_topk {
            tape.cut(acts, |be, acts| batch_topk.cut(be, &self.params.w_dec, self.n_models, acts))?;
        }
        // acts: [batch, d_hidden]
        let x_reconstruct = tape.decode(&self.params, acts)?;
        let l2 = tape.squared_error(x_reconstruct, x)?;
        let total_decoder_norm = tape.total_decoder_norm(&self.params, self.n_models)?;
        let l1 = tape.weighted_l1(acts, total_decoder_norm)?;

        let (x_var, rec, x) = (x, tape.matrix(x_reconstruct), tape.matrix(x));
        let mut x_mean = B::Matrix::default();
        be.column_means(x, &mut x_mean)?;
        let l2_per_row = be.squared_distances(rec, x, 0..width, Precision::F32)?;
        let total_variance = be.squared_distances(x, &x_mean, 0..width, Precision::Dtype)?;
        let one_minus = |l2: &B::Scalar, variance: &B::Scalar| B::Scalar::narrow(1.0) - *l2 / *variance;
        let explained_variance =
            l2_per_row.iter().zip(&total_variance).map(|(l2, v)| one_minus(l2, v).wide()).collect();
        let mut explained_variance_per_model = Vec::new();
        for m in 0..self.n_models {
            let cols = m * self.d_in..(m + 1) * self.d_in;
            let l2 = be.squared_distances(rec, x, cols.clone(), Precision::Dtype)?;
            let variance = be.squared_distances(x, &x_mean, cols, Precision::Dtype)?;
            let one = B::Scalar::narrow(1.0);
            let per_row = l2.iter().zip(&variance).map(|(&l2, &v)| be.round(one - be.round(l2 / v)).wide());
            explained_variance_per_model.push(per_row.collect());
        }
        let l0_loss = mean(&be.active_counts(tape.latents(acts))?).wide();
        let output = LossOutput {
            l2_loss: tape.scalar(l2).wide(),
            l1_loss: tape.scalar(l1).wide(),
            l0_loss,
            explained_variance,
            explained_variance_per_model,
        };
        Ok(Losses { x: x_var, acts, x_reconstruct, l2, l1, output })
    }

    /// The parameters as tensors on the host, in the dtype and the original's shapes and strides: a copy.
    pub fn to_tensors(&self) -> Result<Parameters<Tensor>> {
        self.tensors_of(&self.params)
    }

    /// Anything that has the parameters' shapes, as tensors in the original's shapes and strides.
    pub(crate) fn tensors_of(&self, of: &Parameters<B::Matrix>) -> Result<Parameters<Tensor>> {
        let (h, m, d) = (self.d_hidden, self.n_models, self.d_in);
        let tensor = |matrix: &B::Matrix, shape: Vec<usize>| {
            let mut values = vec![B::Scalar::default(); shape.iter().product()];
            self.backend.download(matrix, 0, &mut values)?;
            Tensor::new(shape, self.to_dtype(values)?)
        };
        Ok(Parameters {
            w_enc: tensor(&of.w_enc, vec![h, m, d])?.permuted(&[1, 2, 0]),
            w_dec: tensor(&of.w_dec, vec![h, m, d])?,
            b_enc: tensor(&of.b_enc, vec![h])?,
            b_dec: tensor(&of.b_dec, vec![m, d])?,
        })
    }

    /// Host values in the dtype; the judge's stay as they are.
    fn to_dtype(&self, values: Vec<B::Scalar>) -> Result<Values> {
        let values = B::Scalar::wrap(values);
        if values.dtype() == Dtype::F64 { Ok(values) } else { values.cast(self.dtype()) }
    }

    fn upload_x(&self, batch: usize, x: &[B::Scalar]) -> Result<B::Matrix> {
        let mut out = B::Matrix::default();
        self.backend.fill(batch, self.n_models * self.d_in, x, &mut out)?;
        Ok(out)
    }

    /// The rows of x, if its shape is [batch, n_models, d_in].
    fn rows_of<'a>(&self, x: ArrayView3<'a, B::Scalar>) -> Result<std::borrow::Cow<'a, [B::Scalar]>> {
        let (batch, models, d_in) = x.dim();
        if (models, d_in) != (self.n_models, self.d_in) {
            return Err(Error::shape(format!(
                "x has shape [{batch}, {models}, {d_in}]; it needs [batch, {}, {}]",
                self.n_models, self.d_in
            )));
        }
        Ok(match x.to_slice() {
            Some(slice) => slice.into(),
            None => x.iter().copied().collect(),
        })
    }

    fn batch_of(&self, name: &str, len: usize, row: usize) -> Result<usize> {
        if !len.is_multiple_of(row) {
            return Err(Error::shape(format!("{name} has {len} elements; it needs a multiple of {row}, the row's")));
        }
        Ok(len / row)
    }

    fn check_len(&self, name: &str, len: usize, batch: usize, row: usize) -> Result<()> {
        if len != batch * row {
            return Err(Error::shape(format!("{name} has {len} elements; {batch} rows of {row} need {}", batch * row)));
        }
        Ok(())
    }

    fn array3(&self, batch: usize, values: Vec<B::Scalar>) -> Array3<B::Scalar> {
        let shape = (batch, self.n_models, self.d_in);
        Array3::from_shape_vec(shape, values).expect("as many elements as the shape has")
    }
}
