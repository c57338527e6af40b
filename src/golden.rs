//! Golden comparison: what this crate computes beside what the Python original computed and what is true.
//!
//! A case is a checkpoint of the original, what the original computed from it (`KEY`), and the same formulas carried out
//! in float64 (`exact.KEY`). The claim that is tested: **no further from the true answer than the original itself is**.
//! With `e_torch` from `KEY - exact.KEY`, `e_ours` from `ours - exact.KEY` and `S` from `exact.KEY`,
//!
//! ```text
//! e_ours <= k · e_torch + c · u · S + f
//! ```
//!
//! must hold twice: with each of the three as the largest magnitude, and with each as the root mean square. `u` is the
//! unit roundoff of the case's dtype. The judge [`Cpu<f64>`](crate::backend::Cpu) must meet `exact.KEY` to 1e-12 · S, which
//! tells formulas from rounding. `init.*` is compared bit for bit.
//!
//! | keys | fp32: k, c | fp16, bf16: k, c | f |
//! | --- | --- | --- | --- |
//! | `train.lr`, `train.l1_coeff` | 1e-12 · S | 1e-12 · S | 0 |
//! | `l0_loss`, `train.l0_loss` | 8, 32 | 4, 2 | 1 / batch: one sign of one pre-activation |
//! | `*explained_variance*` | 8, 256 | 4, 2 | 0 |
//! | every other | 8, 32 | 4, 2 | 0 |
//!
//! For explained variances `S` is at least 1; they err most where a row lies close to the batch mean, hence their larger `c`.
//!
//! Elements that are not finite: where `KEY` and `exact.KEY` both are not, ours is the same as one of them, the judge's as
//! `exact.KEY`; where one of the two is, the element is not compared, but for the judge's with a finite `exact.KEY`; where both
//! are finite, ours is finite.
//!
//! A case can be no test of training: where rounding decides the sign of one pre-activation, a step goes one way or the other, and
//! whoever adds up in another order, be it PyTorch with the rows permuted, ends up further away than any honest tolerance. Many
//! steps, a large `lr` and a large dictionary make that likely. It shows in `train.*`, `train.final.*` above all.

use crate::autodiff::{PARAMETER_NAMES, Parameters};
use crate::backend::{Backend, Scalar};
use crate::checkpoint;
use crate::config::Config;
use crate::crosscoder::CrossCoder;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::files::TensorFile;
use crate::init::initial_weights;
use crate::tensor::Tensor;
use crate::trainer::Trainer;
use ndarray::Array3;
use std::collections::BTreeMap;
use std::path::Path;

/// One golden case in memory.
#[derive(Clone, Debug)]
pub struct Case {
    /// The case's name: its directory's.
    pub name: String,
    /// `0_cfg.json`
    pub cfg: Config,
    /// `0.pt`
    pub weights: Parameters<Tensor>,
    /// `golden.pt`: the keys and their `exact.` twins.
    pub golden: BTreeMap<String, Tensor>,
}

/// How one key compares. Errors are against `exact.KEY`; `max` is the largest magnitude, `rms` the root mean square.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The case's name.
    pub case: String,
    /// The key.
    pub key: String,
    /// Who computed ours: the dtype of the case (`fp32`, `fp16`, `bf16`), `f64` for the judge without rounding, `bits` for
    /// keys that are compared bit for bit.
    pub judge: String,
    /// What came out.
    pub outcome: Outcome,
}

/// See [`Row`].
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The key was compared.
    Compared {
        /// By largest magnitude. For `bits`: the number of elements that differ, of none allowed.
        max: Measure,
        /// By root mean square.
        rms: Measure,
        /// Why it missed, where that is not a tolerance: an element that is not finite, a shape.
        fault: Option<String>,
    },
    /// This crate does not compute the key yet.
    NotCovered,
}

/// The three numbers of one measure.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measure {
    /// The original's error.
    pub e_torch: f64,
    /// Ours.
    pub e_ours: f64,
    /// What ours may be.
    pub tolerance: f64,
}

impl Measure {
    /// The share of the tolerance that is used; above 1 is a miss.
    pub fn share(&self) -> f64 {
        match self.e_ours {
            0.0 => 0.0,
            e => (e / self.tolerance).min(f64::MAX),
        }
    }
}

impl Row {
    /// Whether the key passes; none if it is not covered.
    pub fn pass(&self) -> Option<bool> {
        match &self.outcome {
            Outcome::Compared { max, rms, fault } => {
                Some(fault.is_none() && max.e_ours <= max.tolerance && rms.e_ours <= rms.tolerance)
            }
            Outcome::NotCovered => None,
        }
    }
}

/// `k`, `c`, `f` of the rule for a key, as in the module's table; `None` where the tolerance is 1e-12 · S alone.
fn tolerance(key: &str, dtype: Dtype, batch: usize) -> Option<(f64, f64, f64)> {
    let half = dtype != Dtype::F32;
    match key {
        "train.lr" | "train.l1_coeff" => None,
        "l0_loss" | "train.l0_loss" => {
            Some((if half { 4.0 } else { 8.0 }, if half { 2.0 } else { 32.0 }, 1.0 / batch as f64))
        }
        _ if half => Some((4.0, 2.0, 0.0)),
        _ if key.contains("explained_variance") => Some((8.0, 256.0, 0.0)),
        _ => Some((8.0, 32.0, 0.0)),
    }
}

/// What this crate computes for one key.
struct Ours {
    key: String,
    values: Vec<f64>,
}

/// Computes every key of the case that this crate covers, on this backend.
fn compute<B: Backend>(case: &Case, backend: B) -> Result<Vec<Ours>> {
    let mut ours: Vec<Ours> = Vec::new();
    let mut put = |key: &str, values: Vec<f64>| ours.push(Ours { key: key.to_owned(), values });
    let wide = |values: &[B::Scalar]| values.iter().map(|v| v.wide()).collect::<Vec<f64>>();

    let crosscoder = CrossCoder::from_tensors(backend, case.cfg.clone(), case.weights.clone())?;
    let x = batch::<B>(case.tensor("x")?)?;
    put("encode", wide(crosscoder.encode(x.view(), true)?.as_slice().unwrap_or_default()));
    put("encode_no_relu", wide(crosscoder.encode(x.view(), false)?.as_slice().unwrap_or_default()));
    put("decode", wide(crosscoder.forward(x.view())?.as_slice().unwrap_or_default()));
    let losses = crosscoder.get_losses(x.view())?;
    put("l2_loss", vec![losses.l2_loss]);
    put("l1_loss", vec![losses.l1_loss]);
    put("l0_loss", vec![losses.l0_loss]);
    put("explained_variance", losses.explained_variance);
    let n_models = crosscoder.n_models();
    for (m, per_row) in losses.explained_variance_per_model.into_iter().enumerate() {
        put(&format!("explained_variance_{}", crate::crosscoder::model_name(m, n_models)), per_row);
    }
    if let Some(l1_coeff) = case.golden.get("l1_coeff").and_then(|t| t.values().get_f64(0)) {
        let (loss, grads) = crosscoder.loss_and_grads(x.view(), l1_coeff)?;
        put("loss", vec![loss.wide()]);
        for (name, tensor) in PARAMETER_NAMES.iter().zip(crosscoder.tensors_of(&grads)?.each()) {
            put(&format!("grad.{name}"), tensor.to_f64_vec());
        }
    }
    if case.golden.contains_key("train.x") {
        train(case, crosscoder.backend().clone(), &mut put)?;
    }
    Ok(ours)
}

/// The training keys: the steps that take the batches of `train.x`, from a fresh crosscoder. The judge starts from the
/// stored `init.*`, as the twins do, and from our own where the case leaves one out.
fn train<B: Backend>(case: &Case, backend: B, put: &mut impl FnMut(&str, Vec<f64>)) -> Result<()> {
    let mut weights = case.fresh()?;
    if is_judge::<B>() {
        for (weight, name) in weights.each_mut().into_iter().zip(PARAMETER_NAMES) {
            if let Some(stored) = case.golden.get(&format!("init.{name}")) {
                *weight = stored.clone();
            }
        }
    }
    let x = case.tensor("train.x")?;
    let &[steps, batch, n_models, d_in] = x.shape() else {
        return Err(Error::shape(format!(
            "train.x has shape {:?}; it needs [steps, batch, n_models, d_in]",
            x.shape()
        )));
    };
    let values: Vec<B::Scalar> = x.to_f64_vec().into_iter().map(B::Scalar::narrow).collect();
    let mut trainer = Trainer::new(CrossCoder::from_tensors(backend, case.cfg.clone(), weights)?)?;
    let needed = (trainer.crosscoder().n_models(), trainer.crosscoder().d_in());
    if (n_models, d_in) != needed {
        return Err(Error::shape(format!("train.x has rows of shape {:?}; they are {needed:?}", (n_models, d_in))));
    }
    let mut columns: Vec<(String, Vec<f64>)> = Vec::new();
    for acts in values.chunks_exact((batch * n_models * d_in).max(1)).take(steps) {
        let row = trainer.step(acts)?;
        let grad_norm = ("grad_norm".to_owned(), row.grad_norm);
        for (i, (name, value)) in row.named().into_iter().chain([grad_norm]).enumerate() {
            match columns.get_mut(i) {
                Some((_, column)) => column.push(value),
                None => columns.push((name, vec![value])),
            }
        }
    }
    for (name, column) in columns {
        put(&format!("train.{name}"), column);
    }
    for (name, tensor) in PARAMETER_NAMES.iter().zip(trainer.crosscoder().to_tensors()?.each()) {
        put(&format!("train.final.{name}"), tensor.to_f64_vec());
    }
    Ok(())
}

/// A float32 tensor [batch, n_models, d_in] as the host's array.
fn batch<B: Backend>(tensor: &Tensor) -> Result<Array3<B::Scalar>> {
    let &[n, m, d] = tensor.shape() else {
        return Err(Error::shape(format!("x has shape {:?}; it needs [batch, n_models, d_in]", tensor.shape())));
    };
    let values = tensor.to_f64_vec().into_iter().map(B::Scalar::narrow).collect();
    Array3::from_shape_vec((n, m, d), values).map_err(|e| Error::shape("x").with_source(e))
}

impl Case {
    /// Reads a case from its directory: `0.pt`, `0_cfg.json`, `golden.pt`.
    ///
    /// # Errors
    /// A file that is missing or damaged, or a `golden.pt` that is no dict of tensors.
    pub fn load(dir: &Path) -> Result<Self> {
        let (cfg, weights) = checkpoint::read(&checkpoint::numbered(dir, 0))?;
        let path = dir.join("golden.pt");
        let mut file = TensorFile::open(&path)?;
        let mut golden = BTreeMap::new();
        for (index, entry) in file.tensors().to_vec().into_iter().enumerate() {
            golden.insert(entry.name, file.read_of_all(index)?);
        }
        let name = dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy().into_owned();
        Ok(Case { name, cfg, weights, golden })
    }

    fn tensor(&self, key: &str) -> Result<&Tensor> {
        self.golden.get(key).ok_or_else(|| Error::format(format!("golden.pt has no key {key:?}")).at(&self.name))
    }

    /// The keys that are compared: all but the inputs and the twins.
    fn keys(&self) -> impl Iterator<Item = &String> {
        let input = |key: &str| matches!(key, "x" | "l1_coeff" | "train.x") || key.starts_with("exact.");
        self.golden.keys().filter(move |key| !input(key))
    }

    /// Compares every key on `backend`, which computes in the case's dtype or is the judge without rounding.
    ///
    /// # Errors
    /// A case that lacks `x` or a twin, or whose parts contradict each other.
    pub fn compare<B: Backend>(&self, backend: B) -> Result<Vec<Row>> {
        let dtype = self.cfg.enc_dtype()?;
        if backend.dtype() != dtype {
            return Err(Error::usage(format!("the case is in {dtype}, the backend in {}", backend.dtype())));
        }
        let judge = if is_judge::<B>() { "f64" } else { dtype.enc_name().unwrap_or_default() };
        let ours = compute(self, backend).map_err(|e| e.at(&self.name))?;
        let mut rows = if is_judge::<B>() { Vec::new() } else { self.compare_init()? };
        for key in self.keys().filter(|key| !key.starts_with("init.")) {
            let row = |outcome| Row { case: self.name.clone(), key: key.clone(), judge: judge.to_owned(), outcome };
            let Some(ours) = ours.iter().find(|ours| &ours.key == key) else {
                rows.push(row(Outcome::NotCovered));
                continue;
            };
            let (torch, exact) = (self.tensor(key)?, self.tensor(&format!("exact.{key}"))?);
            let batch = self.batch_size(key)?;
            rows.push(row(outcome(key, ours, torch, exact, is_judge::<B>(), dtype, batch)));
        }
        if self.keys().next().is_none() {
            return Err(Error::format("golden.pt holds nothing to compare with").at(&self.name));
        }
        Ok(rows)
    }

    /// `init.*`, bit for bit.
    fn compare_init(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        if !self.golden.keys().any(|key| key.starts_with("init.")) {
            return Ok(rows);
        }
        let ours = self.fresh().map_err(|e| e.at(&self.name))?;
        for key in self.golden.keys().filter(|key| key.starts_with("init.")) {
            let row = |outcome| Row { case: self.name.clone(), key: key.clone(), judge: "bits".to_owned(), outcome };
            let at = PARAMETER_NAMES.iter().position(|name| key.strip_prefix("init.") == Some(name));
            let (Some(at), torch) = (at, self.tensor(key)?) else {
                rows.push(row(Outcome::NotCovered));
                continue;
            };
            let ours = ours.each()[at];
            let alike = (ours.shape(), ours.dtype()) == (torch.shape(), torch.dtype());
            let fault = (!alike).then(|| {
                format!(
                    "ours is {} {:?}, the original's {} {:?}",
                    ours.dtype(),
                    ours.shape(),
                    torch.dtype(),
                    torch.shape()
                )
            });
            // Every value of these types is exact in float64; the sign of zero and nan count as bits.
            let differ = |(a, b): &(f64, f64)| a.to_bits() != b.to_bits();
            let different = ours.to_f64_vec().into_iter().zip(torch.to_f64_vec()).filter(differ).count();
            let count = Measure { e_torch: 0.0, e_ours: different as f64, tolerance: 0.0 };
            rows.push(row(Outcome::Compared { max: count, rms: count, fault }));
        }
        Ok(rows)
    }

    /// The weights of a fresh `CrossCoder(cfg)` for as many models as the case has.
    fn fresh(&self) -> Result<Parameters<Tensor>> {
        let (cfg, n_models) = (&self.cfg, self.weights.w_enc.shape().first().copied().unwrap_or(0));
        let (dtype, norm) = (cfg.enc_dtype()?, cfg.number("dec_init_norm")?);
        initial_weights(cfg.seed()?, cfg.dict_size()?, n_models, cfg.d_in()?, dtype, norm)
    }

    fn batch_size(&self, key: &str) -> Result<usize> {
        let (input, axis) = if key.starts_with("train.") { ("train.x", 1) } else { ("x", 0) };
        let shape = self.tensor(input)?.shape();
        shape.get(axis).copied().ok_or_else(|| Error::shape(format!("{input} has shape {shape:?}")).at(&self.name))
    }
}

fn is_judge<B: Backend>() -> bool {
    B::Scalar::narrow(1.0 + f64::EPSILON).wide() != 1.0
}

fn outcome(key: &str, ours: &Ours, torch: &Tensor, exact: &Tensor, judge: bool, dtype: Dtype, batch: usize) -> Outcome {
    let (torch, exact) = (torch.to_f64_vec(), exact.to_f64_vec());
    let failed =
        |fault: String| Outcome::Compared { max: Measure::default(), rms: Measure::default(), fault: Some(fault) };
    if ours.values.len() != torch.len() || exact.len() != torch.len() {
        let (o, t, e) = (ours.values.len(), torch.len(), exact.len());
        return failed(format!("{o} elements are ours, {t} the original's, {e} exact"));
    }
    let (mut max, mut rms) = ([0f64; 3], [0f64; 3]);
    let mut count = 0usize;
    for (i, ((&ours, &torch), &exact)) in ours.values.iter().zip(&torch).zip(&exact).enumerate() {
        let is = |other: f64| ours == other || (ours.is_nan() && other.is_nan());
        let same = is(exact) || (!judge && is(torch));
        match (torch.is_finite(), exact.is_finite()) {
            (false, false) if !same => {
                return failed(format!("element {i} is {ours}, exact {exact}, the original's {torch}"));
            }
            (false, false) => continue,
            (true, false) => continue,
            // The original overflowed: its error says nothing, but the judge knows no overflow.
            (false, true) if !judge => continue,
            _ => {}
        }
        if !ours.is_finite() {
            return failed(format!("element {i} is {ours}, exact {exact}, the original's {torch}"));
        }
        let e_torch = if torch.is_finite() { torch - exact } else { 0.0 };
        for (j, v) in [e_torch, ours - exact, exact].into_iter().enumerate() {
            max[j] = max[j].max(v.abs());
            rms[j] += v * v;
        }
        count += 1;
    }
    let rms = rms.map(|sum| (sum / count.max(1) as f64).sqrt());
    let measure = |[e_torch, e_ours, size]: [f64; 3]| {
        let size = if key.contains("explained_variance") { size.max(1.0) } else { size };
        let tolerance = match tolerance(key, dtype, batch) {
            Some((k, c, f)) if !judge => k * e_torch + c * dtype.unit_roundoff() * size + f,
            _ => 1e-12 * size,
        };
        Measure { e_torch, e_ours, tolerance }
    };
    Outcome::Compared { max: measure(max), rms: measure(rms), fault: None }
}
