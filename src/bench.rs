//! Measured speeds, each result checked: `crosscoder bench`.
//!
//! The inputs are made from a hash of their position, so that another program can make the same ones: weights and activations
//! are nearly normal, and all latents share one bias, chosen so that exactly `l0 · batch` latents of the batch are on.
//! A result is checked against float64 loops on a sample of its elements before its time is reported.

use crate::autodiff::Parameters;
use crate::backend::{Backend, Scalar};
use crate::checkpoint;
use crate::config::Config;
use crate::crosscoder::CrossCoder;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Tensor, Values};
use crate::threads::{available, beside};
use crate::trainer::Trainer;
use ndarray::ArrayView3;
use std::path::PathBuf;
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
pub const QUICK: [Case; 2] =
    [Case { d_in: 64, dict_size: 512, batch: 128, l0: 8 }, Case { d_in: 64, dict_size: 512, batch: 128, l0: 256 }];

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
    /// One of [`OPS`].
    pub op: &'static str,
    /// The shortest of several runs.
    pub seconds: f64,
    /// Bytes of weights, moments and activations that have to be read or written at least.
    pub bytes: f64,
    /// Floating-point operations of the dense formulas, whether they were carried out or not.
    pub flop: f64,
    /// A number of the result, to compare programs by: the mean of the activations or of the reconstruction's squares, the
    /// l2 loss, the loss before the first step; 0 where there is none.
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
    let cores = available();
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
    cfg.set("dec_init_norm", 0.08);
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
    // The largest that is off, of all in descending order, becomes 0.
    let (_, largest_off, _) = pre.select_nth_unstable_by(l0 * batch, |a, b| b.total_cmp(a));
    let bias = -*largest_off;
    drop(pre);
    make(backend, bias)
}

/// The operations of [`run`], in its order. `init`, `save` and `load` do not depend on batch and l0; `step` is left out in
/// float16, where the original's first step makes every parameter nan.
pub const OPS: [&str; 7] = ["init", "encode", "decode", "get_losses", "save", "load", "step"];

/// Measures everything at one case, or the one operation `only`, handing each row to `sink`.
///
/// # Errors
/// A result that its check refuses; errors of the device; no room for a checkpoint among the system's temporary files; a case
/// that memory cannot hold.
pub fn run<B: Backend>(
    backend: B,
    name: &str,
    case: Case,
    only: Option<&str>,
    sink: &mut dyn FnMut(Row) -> Result<()>,
) -> Result<()> {
    let Case { d_in, dict_size, batch, l0 } = case;
    if d_in == 0 || l0 == 0 || batch == 0 || l0 >= dict_size {
        return Err(Error::usage(format!("{case:?}: no size may be 0, and l0 is below dict_size")));
    }
    check_memory(case)?;
    let wanted = |op| only.is_none_or(|only| only == op);
    let float16 = backend.dtype() == Dtype::F16;
    let x: Vec<B::Scalar> = activations(case).into_iter().map(|v| B::Scalar::narrow(f64::from(v))).collect();
    let bench = Bench { crosscoder: crosscoder(backend, case, &x)?, x, name, case };
    if wanted("init") {
        sink(bench.init()?)?;
    }
    for batch in [1, batch] {
        if wanted("encode") {
            sink(bench.encode(batch)?)?;
        }
        if wanted("decode") {
            sink(bench.decode(batch)?)?;
        }
    }
    if wanted("get_losses") {
        sink(bench.get_losses()?)?;
    }
    if wanted("save") || wanted("load") {
        for row in bench.save_and_load()?.into_iter().filter(|row| wanted(row.op)) {
            sink(row)?;
        }
    }
    if wanted("step") && !float16 {
        sink(bench.step()?)?;
    }
    Ok(())
}

/// Refuses what would end in an allocation that fails: more than the system says is available, or than can be addressed.
fn check_memory(case: Case) -> Result<()> {
    let [d_in, h, batch] = [case.d_in, case.dict_size, case.batch].map(|n| n as f64);
    // What is held at the least: activations, latents, and the weights three times.
    let needed = 4.0 * (batch * (2.0 * d_in + h) + 3.0 * h * 2.0 * d_in);
    let available = available_bytes().unwrap_or(isize::MAX as f64);
    if needed < available {
        return Ok(());
    }
    let [needed, available] = [needed, available].map(|bytes| bytes / 1e9);
    Err(Error::usage(format!("{case:?} needs {needed:.1} GB of memory at least; {available:.1} GB are available")))
}

/// What Linux says that programs may take without swapping.
fn available_bytes() -> Option<f64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok().map(|kib: f64| 1024.0 * kib)
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

    /// How far two roundings to the dtype may move `v`.
    fn roundings(&self, v: f64) -> f64 {
        let subnormal = if self.crosscoder.dtype() == Dtype::F16 { 2f64.powi(-24) } else { 0.0 };
        2.0 * self.crosscoder.dtype().unit_roundoff() * v.abs() + subnormal
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
        let x = self.x_row(b);
        let dot: f64 = x.iter().zip(&w).map(|(x, w)| x * w).sum();
        let size: f64 = x.iter().zip(&w).map(|(x, w)| (x * w).abs()).sum();
        Ok((dot + bias, self.roundings(dot) + self.roundings(bias) + 1e-6 * size))
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
        for i in sample(batch * width).into_iter().take(8) {
            let (b, k) = (i / width, i % width);
            let (mut exact, mut size) = (0.0, 0.0);
            for (h, a) in acts[b * h..(b + 1) * h].iter().map(|a| a.wide()).enumerate().filter(|(_, a)| *a != 0.0) {
                let term = a * self.download(&self.crosscoder.params.w_dec, h * width + k, 1)?[0];
                exact += term;
                size += term.abs();
            }
            check("decode", i, rec[i].wide(), exact, self.roundings(exact) + 1e-6 * size)?;
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
        let exact = rec
            .iter()
            .zip(&self.x)
            .map(|(r, x)| (r.wide() - f64::from(self.crosscoder.dtype().round(x.wide() as f32))).powi(2));
        let exact = exact.sum::<f64>() / batch as f64;
        check("get_losses: l2", 0, losses.l2_loss, exact, 1e-5 * exact)?;
        let bytes = self.bytes(3.0, batch, 2 * self.width());
        Ok(self.row("get_losses", batch, seconds, bytes, 2.0, losses.l2_loss))
    }

    /// The weights of a seed, as the original makes them.
    fn init(&self) -> Result<Row> {
        let make = || CrossCoder::new_on(self.crosscoder.backend.clone(), self.crosscoder.cfg.clone());
        let seconds = time(|| make().map(drop))?;
        let (made, d_in) = (make()?, self.case.d_in);
        for part in sample(2 * self.case.dict_size) {
            let w = self.download(&made.params.w_dec, part * d_in, d_in)?;
            let error = 4.0 * made.dtype().unit_roundoff();
            check("init: norm", part, w.iter().map(|w| w * w).sum::<f64>().sqrt() / 0.08, 1.0, error)?;
            if self.download(&made.params.w_enc, part * d_in, d_in)? != w {
                return Err(Error::format(format!("init: W_enc is not W_dec at {part}")));
            }
        }
        Ok(self.row("init", 1, seconds, self.bytes(2.0, 0, 0), 0.0, 0.0))
    }

    /// A checkpoint among the temporary files, which the system may keep in memory: what is timed is the work, not the disk.
    fn save_and_load(&self) -> Result<[Row; 2]> {
        let dir = new_folder()?;
        let files = checkpoint::numbered(&dir, 0);
        let work = || -> Result<[f64; 2]> {
            let save = time(|| self.crosscoder.save(&files))?;
            let mut loaded = None;
            let load = time(|| {
                loaded = None; // Freed first, as a program's second load would not be.
                loaded = Some(CrossCoder::load_files(self.crosscoder.backend.clone(), &files)?);
                Ok(())
            })?;
            let loaded = loaded.expect("timed at least once");
            for at in sample(self.case.dict_size * self.width()) {
                let [ours, theirs] = [&loaded.params, &self.crosscoder.params].map(|p| self.download(&p.w_enc, at, 1));
                check("load", at, ours?[0], theirs?[0], 0.0)?;
            }
            Ok([save, load])
        };
        let result = work();
        let _ = std::fs::remove_dir_all(&dir);
        let [save, load] = result?;
        let row = |op, seconds| self.row(op, 1, seconds, self.bytes(2.0, 0, 0), 0.0, 0.0);
        Ok([row("save", save), row("load", load)])
    }

    /// A step of the trainer: losses, gradients, their norm, Adam. Its rate is so small that the latents that are on stay the
    /// same; the value is `l2 + 2 · l1` before the first step.
    fn step(self) -> Result<Row> {
        let (batch, h, width) = (self.case.batch, self.case.dict_size, self.width());
        let Bench { mut crosscoder, x, name, case } = self;
        for (key, value) in [("lr", 1e-9), ("l1_coeff", 2.0)] {
            crosscoder.cfg_mut().set(key, value);
        }
        // Step 0 has the l1 coefficient 0, those up to 0.8 · 1000 are alike.
        crosscoder.cfg_mut().set("num_tokens", 1000 * batch);
        let mut trainer = Trainer::new(crosscoder)?;
        let mut value = None;
        // As a run does: the next batch comes up beside a step.
        let (be, mut staged, mut next) =
            (trainer.crosscoder().backend().clone(), B::Matrix::default(), B::Matrix::default());
        be.fill(batch, width, &x, &mut staged)?;
        let seconds = time(|| {
            let row = if B::AHEAD {
                let step = || trainer.backward_staged(&mut staged).and_then(|gradients| trainer.update(gradients));
                let (row, filled) = beside(step, || be.fill(batch, width, &x, &mut next));
                filled?;
                std::mem::swap(&mut staged, &mut next);
                row?
            } else {
                trainer.step(&x)?
            };
            value.get_or_insert(row.l2_loss + 2.0 * row.l1_loss);
            Ok(())
        })?;
        // The gradients as they are now against loops over latents and reconstruction, which have checks of their own.
        trainer.backward(&x)?;
        let l1_coeff = trainer.schedule().l1_coeff(trainer.step_counter());
        let grads = std::mem::take(&mut trainer.grads);
        let bench = Bench { crosscoder: trainer.into_crosscoder(), x, name, case };
        let mut acts = vec![B::Scalar::default(); batch * h];
        bench.crosscoder.encode_into(&bench.x, true, &mut acts)?;
        let mut rec = vec![B::Scalar::default(); batch * width];
        bench.crosscoder.decode_into(&acts, &mut rec)?;
        let x: Vec<Vec<f64>> = (0..batch).map(|b| bench.x_row(b)).collect();
        let d_rec = |b: usize, k: usize| 2.0 * (rec[b * width + k].wide() - x[b][k]) / batch as f64;
        let u = bench.crosscoder.dtype().unit_roundoff();
        for at in sample(h * width).into_iter().take(6) {
            let (h_, k) = (at / width, at % width);
            let w = bench.download(&bench.crosscoder.params.w_dec, h_ * width, width)?;
            let norms: Vec<f64> = w.chunks(case.d_in).map(|w| w.iter().map(|w| w * w).sum::<f64>().sqrt()).collect();
            let (t, g) = (norms.iter().sum::<f64>(), l1_coeff / batch as f64);
            let on = (0..batch).map(|b| (b, acts[b * h + h_].wide())).filter(|(_, a)| *a > 0.0);
            let (mut d_dec, mut d_enc, mut size_dec, mut size_enc) = (0.0, 0.0, 0.0, 0.0);
            for (b, a) in on {
                let by_norm = g * a * w[k] / norms[k / case.d_in];
                d_dec += a * d_rec(b, k) + by_norm;
                size_dec += (a * d_rec(b, k)).abs() + by_norm.abs();
                let terms = (0..width).map(|k| d_rec(b, k) * w[k]);
                let (sum, size) = terms.fold((g * t, g * t), |(sum, size), v| (sum + v, size + v.abs()));
                d_enc += sum * x[b][k];
                size_enc += size * x[b][k].abs();
            }
            let ours = |m| bench.download(m, at, 1).map(|v| v[0]);
            check("step: d_W_dec", at, ours(&grads.w_dec)?, d_dec, (8.0 * u + 2e-5) * size_dec)?;
            check("step: d_W_enc", at, ours(&grads.w_enc)?, d_enc, (8.0 * u + 2e-5) * size_enc)?;
        }
        // Weights are read three times and written once, of two moments each is read and written.
        let bytes = bench.bytes(16.0, batch, 4 * width);
        Ok(bench.row("step", batch, seconds, bytes, 5.0, value.unwrap_or_default()))
    }
}

/// A folder among the temporary files that nobody else has: what is there already, be it a link, is left alone.
fn new_folder() -> Result<PathBuf> {
    let mut n = 0u32;
    loop {
        let dir = std::env::temp_dir().join(format!("crosscoder-bench-{}-{n}", std::process::id()));
        match std::fs::create_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => n += 1,
            Err(e) => return Err(Error::io("cannot make a folder", e).in_file(&dir)),
            Ok(()) => return Ok(dir),
        }
    }
}

/// Some twenty positions of `n`, spread by a fixed rule.
fn sample(n: usize) -> Vec<usize> {
    (0..20usize).map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) % n.max(1)).collect()
}

fn check(what: &str, at: usize, ours: f64, exact: f64, error: f64) -> Result<()> {
    if (ours - exact).abs() <= error {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Format, format!("{what}: element {at} is {ours}; float64 gives {exact} ± {error:e}")))
}
