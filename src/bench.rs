//! Measured speeds, each result checked: `crosscoder bench`.
//!
//! The inputs are made from a hash of their position, so that another program can make the same ones: weights and activations
//! are nearly normal, and all latents share one bias, chosen so that exactly `l0 · batch` latents of the batch are on.
//! A result is checked against float64 loops on a sample of its elements before its time is reported.

use crate::autodiff::{Parameters, Tape};
use crate::backend::{AdamStep, Backend, Scalar};
use crate::config::Config;
use crate::crosscoder::CrossCoder;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Tensor, Values};
use ndarray::ArrayView3;
use std::time::Instant;

/// A shape and a sparsity to measure at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    /// Width of one model's activations; there are two models.
    pub d_in: usize,
    /// Latents.
    pub dict_size: usize,
    /// Rows.
    pub batch: usize,
    /// The mean number of latents that are on in a row.
    pub l0: usize,
}

/// Small shapes, for a check that takes seconds.
pub const QUICK: [Case; 2] = [
    Case { d_in: 64, dict_size: 512, batch: 128, l0: 8 },
    Case { d_in: 64, dict_size: 512, batch: 128, l0: 256 },
];

/// The shapes of the README's table. Half of the latents are on at the start of training.
pub const CASES: [Case; 4] = [
    Case { d_in: 768, dict_size: 8192, batch: 1024, l0: 64 },
    Case { d_in: 768, dict_size: 8192, batch: 1024, l0: 4096 },
    Case { d_in: 2304, dict_size: 16384, batch: 1024, l0: 80 },
    Case { d_in: 2304, dict_size: 16384, batch: 1024, l0: 8192 },
];

/// One measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The backend's name, as the caller gave it.
    pub backend: String,
    /// The dtype of the weights.
    pub dtype: Dtype,
    /// What it was measured at; `batch` is the operation's own.
    pub case: Case,
    /// `encode`, `decode`, `get_losses`, `step` or `init`.
    pub op: &'static str,
    /// The shortest of several runs.
    pub seconds: f64,
    /// Bytes of weights, moments and activations that have to be read or written at least.
    pub bytes: f64,
    /// Floating-point operations of the dense formulas, whether they were carried out or not.
    pub flop: f64,
    /// A number of the result, to compare programs by: the mean of the activations or of the reconstruction's squares, the
    /// l2 loss, the loss before the step, the sum of the squares of the weights.
    pub value: f64,
}

/// The first line of the CSV.
pub const CSV_HEADER: &str = "machine,backend,dtype,d_in,dict_size,batch,l0,op,seconds,bytes_per_s,flop_per_s,value";

impl Row {
    /// A line of the CSV, without its end.
    pub fn csv(&self, machine: &str) -> String {
        let Case { d_in, dict_size, batch, l0 } = self.case;
        let Row { backend, op, seconds, bytes, flop, value, .. } = self;
        let dtype = self.dtype.enc_name().unwrap_or(self.dtype.name());
        let (bytes, flop) = (bytes / seconds, flop / seconds);
        format!(
            "{machine},{backend},{dtype},{d_in},{dict_size},{batch},{l0},{op},{seconds:.6},{bytes:.4e},{flop:.4e},{value:.9e}"
        )
    }
}

/// The processor's name as the system tells it, without commas.
pub fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or(std::env::consts::ARCH);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{} ({cores} cores)", model.trim_start_matches([' ', '\t', ':']).replace(',', " "))
}

/// Position `i` of the stream `seed`: the sum of the four bytes of a hash, less its mean, over its standard deviation.
///
/// The hash, modulo 2^32: `h = i · 0x9E3779B1 + seed · 0x85EBCA6B`, then `h ^= h >> 16, h *= 0x7FEB352D, h ^= h >> 15,
/// h *= 0x846CA68B, h ^= h >> 16`.
fn nearly_normal(i: usize, seed: u32) -> f32 {
    let mut h = (i as u32).wrapping_mul(0x9E37_79B1).wrapping_add(seed.wrapping_mul(0x85EB_CA6B));
    h = (h ^ (h >> 16)).wrapping_mul(0x7FEB_352D);
    h = (h ^ (h >> 15)).wrapping_mul(0x846C_A68B);
    h ^= h >> 16;
    let sum: i32 = h.to_le_bytes().iter().map(|&b| i32::from(b)).sum();
    (sum - 510) as f32 / 147.8
}

/// The activations of a case, [batch, 2, d_in] row-major.
fn activations(case: Case) -> Vec<f32> {
    (0..case.batch * 2 * case.d_in).map(|i| nearly_normal(i, 1)).collect()
}

/// The crosscoder of a case: `W_enc` and `W_dec` of equal values, as at initialisation, and the bias that leaves
/// `l0 · batch` latents on.
fn crosscoder<B: Backend>(backend: B, case: Case, x: &[B::Scalar]) -> Result<CrossCoder<B>> {
    let Case { d_in, dict_size: h, batch, l0 } = case;
    let (dtype, width) = (backend.dtype(), 2 * d_in);
    let mut cfg = Config::default();
    cfg.set("d_in", d_in);
    cfg.set("dict_size", h);
    cfg.set("batch_size", batch);
    cfg.set("enc_dtype", dtype.enc_name().unwrap_or_default());
    let scale = 0.08 / (d_in as f32).sqrt();
    let w: Vec<f32> = (0..h * width).map(|i| nearly_normal(i, 2) * scale).collect();
    let values = |v: Vec<f32>| Values::F32(v).cast(dtype);
    let make = |backend, bias: f32| {
        let weights = Parameters {
            w_enc: Tensor::new(vec![h, 2, d_in], values(w.clone())?)?.permuted(&[1, 2, 0]),
            w_dec: Tensor::new(vec![h, 2, d_in], values(w.clone())?)?,
            b_enc: Tensor::new(vec![h], values(vec![bias; h])?)?,
            b_dec: Tensor::new(vec![2, d_in], values(vec![0.0; width])?)?,
        };
        CrossCoder::from_tensors(backend, cfg.clone(), weights)
    };
    let mut pre = vec![B::Scalar::default(); batch * h];
    make(backend.clone(), 0.0)?.encode_into(x, false, &mut pre)?;
    let mut pre: Vec<f32> = pre.iter().map(|v| v.wide() as f32).collect();
    let (above, below, _) = pre.select_nth_unstable_by(l0 * batch - 1, |a, b| b.total_cmp(a));
    let _ = above;
    let bias = -*below;
    drop(pre);
    make(backend, bias)
}

/// Measures everything at one case, or the one operation `only`, handing each row to `sink`.
///
/// # Errors
/// A result that its check refuses, and errors of the device.
pub fn run<B: Backend>(
    backend: B,
    name: &str,
    case: Case,
    only: Option<&str>,
    sink: &mut dyn FnMut(Row),
) -> Result<()> {
    let wanted = |op| only.is_none_or(|only| only == op);
    let x: Vec<B::Scalar> = activations(case).into_iter().map(|v| B::Scalar::narrow(f64::from(v))).collect();
    let mut bench = Bench { crosscoder: crosscoder(backend, case, &x)?, x, name, case };
    for batch in [1, case.batch] {
        if wanted("encode") {
            sink(bench.encode(batch)?);
        }
        if wanted("decode") {
            sink(bench.decode(batch)?);
        }
    }
    if wanted("get_losses") {
        sink(bench.get_losses()?);
    }
    if wanted("step") {
        sink(bench.step()?);
    }
    Ok(())
}

struct Bench<'a, B: Backend> {
    crosscoder: CrossCoder<B>,
    x: Vec<B::Scalar>,
    name: &'a str,
    case: Case,
}

/// The shortest time of runs that take a second together, 2 at least and 20 at most; the first is not counted.
fn time(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    f()?;
    let (mut shortest, mut total, mut runs) = (f64::MAX, 0.0, 0);
    while runs < 2 || (total < 1.0 && runs < 20) {
        let start = Instant::now();
        f()?;
        let seconds = start.elapsed().as_secs_f64();
        (shortest, total, runs) = (shortest.min(seconds), total + seconds, runs + 1);
    }
    Ok(shortest)
}

impl<B: Backend> Bench<'_, B> {
    fn width(&self) -> usize {
        2 * self.case.d_in
    }

    fn row(&self, op: &'static str, batch: usize, seconds: f64, bytes: f64, products: f64, value: f64) -> Row {
        let Case { d_in, dict_size, .. } = self.case;
        Row {
            backend: self.name.to_owned(),
            dtype: self.crosscoder.dtype(),
            case: Case { batch, ..self.case },
            op,
            seconds,
            bytes,
            flop: products * 2.0 * (batch * dict_size * 2 * d_in) as f64,
            value,
        }
    }

    /// Bytes of one weight in the dtype, and of a batch of rows of `width` host numbers.
    fn bytes(&self, weights: f64, batch: usize, rows: usize) -> f64 {
        let weight = self.case.dict_size * self.width() * self.crosscoder.dtype().size_bytes();
        weights * weight as f64 + (batch * rows * size_of::<B::Scalar>()) as f64
    }

    /// A parameter on the host in float64.
    fn download(&self, m: &B::Matrix, at: usize, n: usize) -> Result<Vec<f64>> {
        let mut out = vec![B::Scalar::default(); n];
        self.crosscoder.backend.download(m, at, &mut out)?;
        Ok(out.iter().map(|v| v.wide()).collect())
    }

    /// Row `b` of x as the crosscoder sees it.
    fn x_row(&self, b: usize) -> Vec<f64> {
        let x = &self.x[b * self.width()..][..self.width()];
        x.iter().map(|v| f64::from(self.crosscoder.dtype().round(v.wide() as f32))).collect()
    }

    /// `x[b] · W_enc[h] + b_enc[h]` in float64, and an estimate of how far off a sum in float32, rounded twice, may be.
    fn pre_activation(&self, b: usize, h: usize) -> Result<(f64, f64)> {
        let p = &self.crosscoder.params;
        let w = self.download(&p.w_enc, h * self.width(), self.width())?;
        let bias = self.download(&p.b_enc, h, 1)?[0];
        let (x, u) = (self.x_row(b), self.crosscoder.dtype().unit_roundoff());
        let dot: f64 = x.iter().zip(&w).map(|(x, w)| x * w).sum();
        let size: f64 = x.iter().zip(&w).map(|(x, w)| (x * w).abs()).sum();
        Ok((dot + bias, 2.0 * u * (dot.abs() + bias.abs()) + 1e-6 * size))
    }

    fn encode(&self, batch: usize) -> Result<Row> {
        let h = self.case.dict_size;
        let x = &self.x[..batch * self.width()];
        let mut acts = vec![B::Scalar::default(); batch * h];
        let seconds = time(|| self.crosscoder.encode_into(x, true, &mut acts))?;
        for i in sample(batch * h) {
            let (exact, error) = self.pre_activation(i / h, i % h)?;
            check("encode", i, acts[i].wide(), exact.max(0.0), error)?;
        }
        let value = acts.iter().map(|a| a.wide()).sum::<f64>() / acts.len() as f64;
        Ok(self.row("encode", batch, seconds, self.bytes(1.0, batch, self.width() + h), 1.0, value))
    }

    fn decode(&self, batch: usize) -> Result<Row> {
        let (h, width) = (self.case.dict_size, self.width());
        let mut acts = vec![B::Scalar::default(); batch * h];
        self.crosscoder.encode_into(&self.x[..batch * width], true, &mut acts)?;
        let mut rec = vec![B::Scalar::default(); batch * width];
        let seconds = time(|| self.crosscoder.decode_into(&acts, &mut rec))?;
        let u = self.crosscoder.dtype().unit_roundoff();
        for i in sample(batch * width).into_iter().take(8) {
            let (b, k) = (i / width, i % width);
            let (mut exact, mut size) = (0.0, 0.0);
            for (h, a) in acts[b * h..(b + 1) * h].iter().map(|a| a.wide()).enumerate().filter(|(_, a)| *a != 0.0) {
                let term = a * self.download(&self.crosscoder.params.w_dec, h * width + k, 1)?[0];
                exact += term;
                size += term.abs();
            }
            check("decode", i, rec[i].wide(), exact, 2.0 * u * exact.abs() + 1e-6 * size)?;
        }
        let value = rec.iter().map(|v| v.wide().powi(2)).sum::<f64>() / rec.len() as f64;
        Ok(self.row("decode", batch, seconds, self.bytes(1.0, batch, width + h), 1.0, value))
    }

    fn get_losses(&self) -> Result<Row> {
        let batch = self.case.batch;
        let x = ArrayView3::from_shape((batch, 2, self.case.d_in), &self.x);
        let x = x.map_err(|e| Error::shape("x").with_source(e))?;
        let mut losses = None;
        let seconds = time(|| {
            losses = Some(self.crosscoder.get_losses(x)?);
            Ok(())
        })?;
        let losses = losses.expect("timed at least once");
        // The number of latents that are on is known; in half precision several share the last value.
        let l0 = self.case.l0 as f64;
        let ties = if self.crosscoder.dtype() == Dtype::F32 { 1.0 / batch as f64 } else { 0.05 * l0 };
        check("get_losses: l0", 0, losses.l0_loss, l0, ties)?;
        let rec = self.crosscoder.forward(x)?;
        let exact = rec.iter().zip(&self.x).map(|(r, x)| {
            (r.wide() - f64::from(self.crosscoder.dtype().round(x.wide() as f32))).powi(2)
        });
        let exact = exact.sum::<f64>() / batch as f64;
        check("get_losses: l2", 0, losses.l2_loss, exact, 1e-5 * exact)?;
        let bytes = self.bytes(3.0, batch, 2 * self.width());
        Ok(self.row("get_losses", batch, seconds, bytes, 2.0, losses.l2_loss))
    }

    /// Losses, gradients, norm, Adam: what the trainer does each step.
    fn step(&mut self) -> Result<Row> {
        let (batch, width) = (self.case.batch, self.width());
        let be = self.crosscoder.backend.clone();
        let zeros = |m: &B::Matrix| -> Result<B::Matrix> {
            use crate::backend::Shaped;
            let (rows, cols) = m.shape();
            be.upload(rows, cols, B::Scalar::wrap(vec![B::Scalar::default(); rows * cols]))
        };
        let moments = |p: &Parameters<B::Matrix>| -> Result<Parameters<B::Matrix>> {
            let [a, b, c, d] = p.each();
            Ok(Parameters::from_each([zeros(a)?, zeros(b)?, zeros(c)?, zeros(d)?]))
        };
        let (mut m, mut v) = (moments(&self.crosscoder.params)?, moments(&self.crosscoder.params)?);
        let mut tape = Tape::new(be.clone());
        let mut grads = Parameters::default();
        let n = B::Scalar::narrow;
        let (mut first_loss, mut steps) = (None, 0);
        let mut seconds = f64::MAX;
        let mut phases = [f64::MAX; 3];
        // A rate so small that the latents that are on stay the same.
        let lr = 1e-9;
        while steps < std::env::var("STEPS").map_or(4, |v| v.parse().unwrap()) {
            let start = Clock::now();
            let losses = self.crosscoder.losses_on(&mut tape, &self.x)?;
            let forward = start.elapsed().as_secs_f64();
            let loss = tape.add_scaled(losses.l2, 2.0, losses.l1)?;
            tape.backward(loss, &self.crosscoder.params, &mut grads)?;
            let backward = start.elapsed().as_secs_f64();
            let mut total = 0.0;
            for g in grads.each() {
                total += be.norm(g)?.wide().powi(2);
            }
            let beta = (0.9f64.powi(steps + 1), 0.999f64.powi(steps + 1));
            let step = AdamStep {
                clip: be.round(n((1.0 / (total.sqrt() + 1e-6)).min(1.0))),
                one_minus_beta1: n(0.1),
                beta2: n(0.999),
                one_minus_beta2: n(0.001),
                step_size: n(lr / (1.0 - beta.0)),
                bias_correction2_sqrt: n((1.0 - beta.1).sqrt()),
                eps: if be.dtype() == Dtype::F16 { n(1e-4) } else { n(1e-8) },
            };
            let parts = self.crosscoder.params.each_mut().into_iter().zip(grads.each());
            for (((p, g), m), v) in parts.zip(m.each_mut()).zip(v.each_mut()) {
                be.adam(p, g, m, v, &step)?;
            }
            let whole = start.elapsed().as_secs_f64();
            first_loss.get_or_insert(tape.scalar(loss).wide());
            if steps > 0 && whole < seconds {
                seconds = whole;
                phases = [forward, backward - forward, whole - backward];
            }
            steps += 1;
        }
        if std::env::var_os("PHASES").is_some() { eprintln!("forward {:.3} backward {:.3} adam {:.3}", phases[0], phases[1], phases[2]); }
        let _ = width;
        let bytes = self.bytes(10.0, batch, 4 * self.width());
        Ok(self.row("step", batch, seconds, bytes, 5.0, first_loss.unwrap_or_default()))
    }
}

/// Some twenty positions of `n`, spread by a fixed rule.
fn sample(n: usize) -> Vec<usize> {
    (0..20usize).map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) % n.max(1)).collect()
}

struct Clock(Instant, f64);
fn cpu() -> f64 { let s = std::fs::read_to_string("/proc/self/stat").unwrap(); let f: Vec<&str> = s.split(' ').collect(); (f[13].parse::<f64>().unwrap() + f[14].parse::<f64>().unwrap()) / 100.0 }
impl Clock { fn now() -> Self { Clock(Instant::now(), cpu()) } fn elapsed(&self) -> std::time::Duration { if std::env::var_os("CPU").is_some() { std::time::Duration::from_secs_f64((cpu() - self.1) / 2.0) } else { self.0.elapsed() } } }

fn check(what: &str, at: usize, ours: f64, exact: f64, error: f64) -> Result<()> {
    if (ours - exact).abs() <= error {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Format, format!("{what}: element {at} is {ours}; float64 gives {exact} ± {error:e}")))
}
