//! A run of training that cannot be lost: `Trainer.train` of the original, with checkpoints, resuming and a log.
//!
//! ```text
//! OUT/.lock                    held while a run writes here; a second run refuses
//! OUT/version_K/0.pt           the first checkpoint, as the original writes it …
//! OUT/version_K/0_cfg.json     … with its cfg
//! OUT/version_K/1.pt …         the next, every `save_every` steps and at the end
//! OUT/version_K/metrics.jsonl  a line every `log_every` steps, by the original's names
//! OUT/version_K/resume.pt      what a checkpoint lacks to go on from it: moments, generator, buffer, position of the log
//! ```
//!
//! **Order.** Each file is written under another name, synced, renamed, and the directory synced. The checkpoint comes
//! first, then the log is synced, then `resume.pt` replaces the one before. So at any moment `resume.pt` tells of a
//! checkpoint that is whole, and a run that goes on from it writes what an unbroken run would have written, bit for bit:
//! the log is cut back to where it was, and a checkpoint that came after is written again. Whoever is killed before the
//! first checkpoint begins anew. What a crash leaves under other names is removed at the next start.
//!
//! A run that is stopped between two regular checkpoints saves one too, as the original does. When it goes on, the next
//! regular one takes its number; so it ends with the files of a run that was never stopped. `resume.pt` holds the
//! parameters as well then, and needs no checkpoint that may be replaced.
//!
//! **Departures from the original**
//!
//! - It stops at the first step whose loss or gradient is not finite, before the step changes a parameter, and writes no
//!   checkpoint of parameters that are not finite. [`Run::keep_going`] goes on as the original does.
//! - At the end the original saves once more even if it has just saved. Here a step has one checkpoint.
//! - The log is a file, not wandb; its `step` is the original's: the number of steps taken.

use crate::activations::Activations;
use crate::atomic;
use crate::backend::Backend;
use crate::batch_topk::THRESHOLD_KEY;
use crate::buffer::{Buffer, HeldOut, ORIGINAL_REFRESH_KEY, Sizes, VAL_FRACTION_KEY};
use crate::checkpoint::{self, Source};
use crate::config::Config;
use crate::crosscoder::CrossCoder;
use crate::error::{Error, ErrorKind, Result};
use crate::init::initial_weights;
use crate::normalisation::{FOLDED_KEY, estimate, factors, set_factors};
use crate::pt::TensorSource;
use crate::threads::beside;
use crate::trainer::{LogRow, Schedule, Trainer, betas};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

mod state;

use state::{Data, Sources, State};

/// What a run tells while it goes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The run begins at this step, in this directory.
    Begin {
        /// `OUT/version_K`
        dir: &'a Path,
        /// Steps taken before, by the run that is resumed.
        step: u64,
        /// Steps in all.
        total_steps: u64,
    },
    /// A step was taken.
    Step {
        /// Steps taken.
        step: u64,
        /// What it logs.
        row: &'a LogRow,
    },
    /// A checkpoint was saved.
    Saved {
        /// The file of its weights.
        weights: &'a Path,
        /// Steps taken.
        step: u64,
    },
}

/// How a run ended.
pub struct Ended<B: Backend> {
    /// The crosscoder after the last step.
    pub crosscoder: CrossCoder<B>,
    /// The newest checkpoint's weights; none if the run was stopped before its first step.
    pub checkpoint: Option<PathBuf>,
    /// Steps taken.
    pub step: u64,
    /// Whether all steps are taken; otherwise `stop` was set.
    pub finished: bool,
}

/// What a run's state is called.
const RESUME: &str = "resume.pt";

/// What a run's log is called.
const METRICS: &str = "metrics.jsonl";

/// The page that the program writes there at the end.
pub const PAGE: &str = "report.html";

/// A run in its directory, held against others.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    state: State,
    keep_going: bool,
    lock: Lock,
}

impl Run {
    /// A new run in `out/version_K`, K one more than the largest there. Original: `create_save_dir`.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another run holds `out`; a directory that cannot be written.
    pub fn create(out: &Path, cfg: Config) -> Result<Self> {
        let lock = Lock::take(out)?;
        let dir = match newest(out)? {
            // A run was killed before its state was there.
            Some(dir) if is_empty(&dir)? => dir,
            _ => checkpoint::create_save_dir(out)?,
        };
        let state = State::new(cfg);
        state.write(&dir.join(RESUME), None)?;
        Ok(Run { dir, state, keep_going: false, lock })
    }

    /// The newest run in `out`, to go on with; none if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another run holds `out`; a version without a `resume.pt`, or with a damaged one.
    pub fn resume(out: &Path) -> Result<Option<Self>> {
        let lock = Lock::take(out)?;
        let Some(dir) = newest(out)? else { return Ok(None) };
        if is_empty(&dir)? {
            return Ok(None);
        }
        let cannot = |e| Error::io("cannot list the folder", e).in_file(&dir);
        for entry in std::fs::read_dir(&dir).map_err(cannot)? {
            let name = entry.map_err(cannot)?.file_name();
            let numbered = name.as_encoded_bytes().first().is_some_and(u8::is_ascii_digit);
            if numbered || [RESUME, METRICS, PAGE].iter().any(|ours| name == *ours) {
                refuse_irregular(&dir.join(name))?;
            }
        }
        let path = dir.join(RESUME);
        if !path.exists() {
            return Err(Error::usage(format!("holds no {RESUME}: nothing says how to go on")).in_file(&dir));
        }
        let state = State::read(&path)?;
        Ok(Some(Run { dir, state, keep_going: false, lock }))
    }

    /// The same run; it goes on where loss or gradient is not finite, as the original does.
    pub fn keep_going(self) -> Self {
        Run { keep_going: true, ..self }
    }

    /// The cfg: for a run that goes on, the one it began with.
    pub fn cfg(&self) -> &Config {
        &self.state.cfg
    }

    /// Whether other runs are kept away from the directory. Some file systems have no locks.
    pub fn is_locked(&self) -> bool {
        self.lock.locked
    }

    /// Whether the log of a run that goes on is gone, and another is begun.
    pub fn lacks_log(&self) -> bool {
        !self.state.finished && self.state.metrics_bytes > 0 && !self.dir.join(METRICS).exists()
    }

    /// `out/version_K`
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Trains until all steps are taken or `stop` is set; either way it saves. `watch` hears of each step.
    /// Original: `train`.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`] for the first loss or gradient that is not finite, with step, tensor and row; activations
    /// other than those the run began with; what cannot be read or written. The newest checkpoint stays whole, and the
    /// message names it.
    pub fn train<B: Backend<Scalar = f32>>(
        mut self,
        backend: B,
        acts: &Activations,
        stop: &AtomicBool,
        mut watch: impl FnMut(Event<'_>),
    ) -> Result<Ended<B>> {
        match self.steps(backend, acts, stop, &mut watch) {
            Ok(crosscoder) => Ok(Ended {
                crosscoder,
                checkpoint: self.newest(),
                step: self.state.step,
                finished: self.state.finished,
            }),
            Err(e) => Err(match self.newest() {
                Some(path) => {
                    e.at(format!("stopped; the newest checkpoint is {} (step {})", path.display(), self.state.step))
                }
                None => e.at("stopped before the first checkpoint"),
            }),
        }
    }

    /// The newest checkpoint's weights.
    fn newest(&self) -> Option<PathBuf> {
        self.state.checkpoint.map(|k| checkpoint::numbered(&self.dir, k).weights)
    }

    fn steps<B: Backend<Scalar = f32>>(
        &mut self,
        backend: B,
        acts: &Activations,
        stop: &AtomicBool,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<CrossCoder<B>> {
        let cfg = self.state.cfg.clone();
        let (log_every, save_every) = (cfg.size("log_every")? as u64, cfg.size("save_every")? as u64);
        if cfg.enc_dtype()? != backend.dtype() {
            return Err(Error::usage(format!(
                "the run is in {}, the backend in {}",
                cfg.enc_dtype()?,
                backend.dtype()
            )));
        }
        let mut trainer = self.trainer(backend, acts)?;
        self.state.check_data(Data::of(acts)?)?;
        if self.state.finished {
            return Ok(trainer.into_crosscoder());
        }
        let factors = match factors(&cfg)? {
            Some(factors) => factors,
            None => match estimate(acts, HeldOut::from_cfg(&cfg)?, cfg.size("batch_size")?, stop)? {
                Some(factors) => factors,
                None => return Ok(trainer.into_crosscoder()),
            },
        };
        set_factors(&mut self.state.cfg, &factors);
        set_factors(trainer.cfg_mut(), &factors);
        let mut buffer = Buffer::from_cfg(acts, &cfg, &factors)?;
        if let Some(state) = self.state.buffer.take()
            && !buffer.restore(state, stop).map_err(|e| e.in_file(&self.dir.join(RESUME)))?
        {
            return Ok(trainer.into_crosscoder());
        }
        // That a checkpoint can be written is seen before steps are taken.
        drop(atomic::stage(&self.dir.join(RESUME), |_| Ok(()))?);
        let mut log = Log::open(&self.dir.join(METRICS), self.state.metrics_bytes)?;
        let total_steps = trainer.schedule().total_steps;
        watch(Event::Begin { dir: &self.dir, step: self.state.step, total_steps });

        let (be, keep_going) = (trainer.crosscoder().backend().clone(), self.keep_going);
        let (mut batch, mut next) = (Batch::<B>::default(), Batch::<B>::default());
        // What became of reading the next batch, where that was done beside a step.
        let mut read = None;
        while trainer.step_counter() < total_steps && (read.is_some() || !stop.load(Ordering::Relaxed)) {
            let i = trainer.step_counter();
            match read.take().unwrap_or_else(|| next.read(&mut buffer, &be, stop)) {
                Ok(true) => std::mem::swap(&mut batch, &mut next),
                Ok(false) => break,
                Err(e) if e.kind() == ErrorKind::Device => return Err(e),
                Err(e) => {
                    // The steps taken so far are good: they are saved before the error is told.
                    self.save(&trainer, &buffer, &mut log, watch)?;
                    return Err(e.at(format!("step {i}: cannot read the next batch")));
                }
            }
            let mut step = || {
                let gradients = match B::AHEAD {
                    true => trainer.backward_staged(&mut batch.on_device)?,
                    false => trainer.backward(&batch.acts)?,
                };
                if !keep_going {
                    trainer.check(&gradients, &batch.acts).map_err(|(e, row)| {
                        let row = row.and_then(|row| batch.rows.get(row));
                        row.map(|&row| acts.place(row as usize)).into_iter().fold(e, Error::at)
                    })?;
                }
                trainer.update(gradients)
            };
            // Where a checkpoint comes next, the buffer stays as it is after this batch.
            let save = (i + 1).is_multiple_of(save_every) || i + 1 == total_steps;
            let row = if B::AHEAD && !save && !stop.load(Ordering::Relaxed) {
                let (row, ahead) = beside(step, || next.read(&mut buffer, &be, stop));
                read = Some(ahead);
                row?
            } else {
                step()?
            };
            if i.is_multiple_of(log_every) {
                log.write(i + 1, &row)?;
            }
            watch(Event::Step { step: i + 1, row: &row });
            if save {
                self.save(&trainer, &buffer, &mut log, watch)?;
            }
        }
        self.save(&trainer, &buffer, &mut log, watch)?;
        Ok(trainer.into_crosscoder())
    }

    /// The trainer where the state left it.
    fn trainer<B: Backend<Scalar = f32>>(&mut self, backend: B, acts: &Activations) -> Result<Trainer<B>> {
        let cfg = &self.state.cfg;
        // A process that finds this out later is ended by the system, without a word. A device holds the rest itself.
        check_memory(cfg, acts, if B::AHEAD { 1 } else { 4 })?;
        let Some(number) = self.state.checkpoint else {
            let sizes = (cfg.dict_size()?, acts.n_models(), acts.d_in());
            if sizes.2 != cfg.d_in()? {
                return Err(Error::shape(format!("the activations have d_in {}, the cfg {}", sizes.2, cfg.d_in()?)));
            }
            let norm = cfg.number("dec_init_norm")?;
            let weights = initial_weights(cfg.seed()?, sizes.0, sizes.1, sizes.2, cfg.enc_dtype()?, norm)?;
            return Trainer::new(CrossCoder::from_tensors(backend, cfg.clone(), weights)?);
        };
        let weights = match self.state.weights.take() {
            Some(weights) => weights,
            None => {
                let files = checkpoint::numbered(&self.dir, number);
                let (found, weights) = checkpoint::read(&files)?;
                check_cfg(cfg, &found).map_err(|e| e.in_file(&files.cfg))?;
                weights
            }
        };
        let trainer = Trainer::new(CrossCoder::from_tensors(backend, cfg.clone(), weights)?)?;
        let total_steps = trainer.schedule().total_steps;
        let resume = self.dir.join(RESUME);
        if self.state.step > total_steps || self.state.finished != (self.state.step == total_steps) {
            let said = if self.state.finished { "over" } else { "not over" };
            let what = format!("is of a run that is {said} at step {} of {total_steps}", self.state.step);
            return Err(Error::format(what).in_file(&resume));
        }
        let interim = !self.state.finished && !self.state.step.is_multiple_of(cfg.size("save_every")? as u64);
        if self.state.interim != interim {
            let said = if self.state.interim { "interim" } else { "regular" };
            let what =
                format!("is of a run whose checkpoint at step {} is {said}; save_every says no", self.state.step);
            return Err(Error::format(what).in_file(&resume));
        }
        match self.state.moments.take() {
            Some(moments) => trainer.resumed(self.state.step, moments).map_err(|e| e.in_file(&resume)),
            None => Ok(trainer),
        }
    }

    /// Saves a checkpoint and then the state that goes with it, unless that was done at this step.
    fn save<B: Backend<Scalar = f32>>(
        &mut self,
        trainer: &Trainer<B>,
        buffer: &Buffer<'_>,
        log: &mut Log,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        let step = trainer.step_counter();
        let finished = step == trainer.schedule().total_steps;
        // A run of no steps has its initial weights to save.
        if step == self.state.step && finished == self.state.finished {
            return Ok(());
        }
        let saving = |e: Error| e.at(format!("step {step}: cannot save"));
        if !self.keep_going {
            trainer.check_parameters().map_err(saving)?;
        }
        let number = match self.state.checkpoint {
            Some(k) if self.state.interim => k,
            Some(k) => k.checked_add(1).ok_or_else(|| saving(Error::format("no number is left for a checkpoint")))?,
            None => 0,
        };
        let files = checkpoint::numbered(&self.dir, number);
        self.lock.check().map_err(saving)?;
        trainer.crosscoder().save(&files).map_err(saving)?;
        let interim = !finished && !step.is_multiple_of(self.state.cfg.size("save_every")? as u64);
        let mut state = State {
            step,
            checkpoint: Some(number),
            metrics_bytes: log.sync().map_err(saving)?,
            interim,
            finished,
            data: self.state.data.clone(),
            buffer: (!finished).then(|| buffer.state()),
            ..State::new(self.state.cfg.clone())
        };
        let [exp_avg, exp_avg_sq] = trainer.moment_sources();
        let weights = trainer.crosscoder().sources_of(&trainer.crosscoder().params);
        let sources = Sources {
            exp_avg: dynamic(&exp_avg),
            exp_avg_sq: dynamic(&exp_avg_sq),
            weights: interim.then(|| dynamic(&weights)),
        };
        state.write(&self.dir.join(RESUME), (!finished).then_some(sources)).map_err(saving)?;
        // What is written need not stay in memory.
        state.buffer = None;
        self.state = state;
        watch(Event::Saved { weights: &files.weights, step });
        Ok(())
    }
}

/// That memory holds W_enc and W_dec `copies` times: with their gradients and both moments, four.
fn check_memory(cfg: &Config, acts: &Activations, copies: usize) -> Result<()> {
    let (d_hidden, n_models, d_in) = (cfg.dict_size()?, acts.n_models(), acts.d_in());
    let elements = [2, n_models, d_in, copies].iter().fold(d_hidden, |n, &m| n.saturating_mul(m));
    // Otherwise the compiler takes an allocation that nobody uses for one that succeeds.
    let mut room = std::hint::black_box(Vec::<f32>::new());
    room.try_reserve_exact(elements).map_err(|e| {
        let bytes = elements.saturating_mul(size_of::<f32>());
        let what = format!("training weights [{d_hidden}, {n_models}, {d_in}] needs {bytes} bytes of memory at least");
        Error::config(what).with_source(e)
    })
}

/// A batch, and where it comes from.
struct Batch<B: Backend> {
    /// Row-major [batch_size, n_models, d_in].
    acts: Vec<f32>,
    /// The same on the device, where [`Backend::AHEAD`] holds.
    on_device: B::Matrix,
    /// The set's rows.
    rows: Vec<u64>,
}

impl<B: Backend> Default for Batch<B> {
    fn default() -> Self {
        Batch { acts: Vec::new(), on_device: B::Matrix::default(), rows: Vec::new() }
    }
}

impl<B: Backend<Scalar = f32>> Batch<B> {
    /// As [`Buffer::next`]; where that pays, brought to the device.
    fn read(&mut self, buffer: &mut Buffer<'_>, be: &B, stop: &AtomicBool) -> Result<bool> {
        if !buffer.next(&mut self.acts, stop)? {
            return Ok(false);
        }
        self.rows.clear();
        self.rows.extend_from_slice(buffer.last_rows());
        if B::AHEAD {
            let rows = self.rows.len();
            be.fill(rows, self.acts.len() / rows.max(1), &self.acts, &mut self.on_device)?;
        }
        Ok(true)
    }
}

/// The cfg of a run on these activations: the original's `default_cfg`, smaller where the set is small, under the keys of
/// `given`. With n rows to train on:
///
/// | key | default |
/// | --- | --- |
/// | `batch_size` | 4096, at most n / 10 |
/// | `dict_size` | 16384, at most 8 · d_in (Gemma 2 2B, d_in 2304: 16384) and n / 2 |
/// | `num_tokens` | 400,000,000, at most 100 n |
/// | `lr` | 5e-5 for the original's 97,656 steps; times 97,656 / steps for fewer, at most 1e-3 |
/// | `buffer_mult` | 128, at most what makes a buffer of 256 MiB, at least 2 |
/// | `log_every` | 100, at most a hundredth of the steps |
/// | `save_every` | 30,000, at most a tenth of the steps, rounded up |
/// | `d_in` | that of the activations |
/// | `val_fraction` | 0.05 |
///
/// Sizes are rounded down to a power of two. `model_name` and `hook_point` are unknown, `device` is the CPU.
///
/// # Errors
/// A key of `given` that is ill-typed; a `d_in` that is not that of the activations.
pub fn default_cfg(acts: &Activations, given: &Config) -> Result<Config> {
    const BUFFER_BYTES: usize = 256 << 20;
    let mut cfg = Config::default();
    cfg.set("device", "cpu");
    cfg.set("model_name", "unknown");
    cfg.set("hook_point", "unknown");
    cfg.set("d_in", acts.d_in());
    cfg.set(VAL_FRACTION_KEY, 0.05);
    cfg.set(ORIGINAL_REFRESH_KEY, false);
    for (key, value) in given.keys() {
        cfg.set(key, value.clone());
    }
    if cfg.d_in()? != acts.d_in() {
        return Err(Error::shape(format!("cfg key \"d_in\" is {}; the activations have {}", cfg.d_in()?, acts.d_in())));
    }
    let n = acts.rows() - HeldOut::from_cfg(&cfg)?.count(acts.rows());
    let power_of_two = |n: usize| 1usize << n.max(1).ilog2();
    let mut at_most = |key: &str, limit: usize| -> Result<usize> {
        let value = cfg.size(key)?;
        if given.get(key).is_some() || value <= limit {
            return Ok(value);
        }
        cfg.set(key, limit);
        Ok(limit)
    };
    let batch_size = at_most("batch_size", power_of_two(n / 10))?;
    at_most("dict_size", power_of_two(acts.d_in().saturating_mul(8).min(n / 2)))?;
    let num_tokens = at_most("num_tokens", n.saturating_mul(100))?;
    at_most("buffer_mult", (BUFFER_BYTES / batch_size.saturating_mul(acts.row_bytes()).max(1)).max(2))?;
    let steps = (num_tokens / batch_size).max(1);
    at_most("log_every", (steps / 100).max(1))?;
    at_most("save_every", steps.div_ceil(10))?;
    if given.get("lr").is_none() {
        let lr = cfg.number("lr")?;
        let original_steps = 400_000_000.0 / 4096.0;
        cfg.set("lr", (lr * (original_steps / steps as f64).max(1.0)).min(1e-3));
    }
    Ok(cfg)
}

/// What the program's built-in set of 1,536 rows asks for beyond [`default_cfg`]: 40 passes, some ten seconds on two cores,
/// that end near an L0 of 24 and an explained variance of 0.72 on the rows held out. With an `l1_coeff` of 2 it is 11 and 0.66.
pub fn built_in_keys() -> Vec<(&'static str, serde_json::Value)> {
    vec![
        ("model_name", "all-MiniLM-L6-v2".into()),
        ("hook_point", "hidden_states[4]".into()),
        (VAL_FRACTION_KEY, 0.1.into()),
        ("num_tokens", 55_296.into()),
        ("lr", 2e-3.into()),
        ("l1_coeff", 1.into()),
    ]
}

/// Whether a run with this cfg can begin on these activations: checks what it would refuse after its directory is made.
///
/// # Errors
/// A key that is missing, ill-typed or out of range; a batch that the rows do not fill; factors for other models.
pub fn check(cfg: &Config, acts: &Activations) -> Result<()> {
    Schedule::from_cfg(cfg)?;
    betas(cfg)?;
    Sizes::from_cfg(acts, cfg)?;
    for key in ["dict_size", "log_every", "save_every"] {
        cfg.size(key)?;
    }
    // A run learns no threshold, and its weights are not folded.
    for key in [FOLDED_KEY, THRESHOLD_KEY] {
        if cfg.get(key).is_some() {
            return Err(Error::config("is of a crosscoder that is trained already; a run begins without it").at(key));
        }
    }
    cfg.seed()?;
    cfg.enc_dtype()?;
    cfg.number("dec_init_norm")?;
    let n_models = match factors(cfg)? {
        Some(factors) => factors.len(),
        None if cfg.get("n_models").is_some() => cfg.n_models()?,
        None => acts.n_models(),
    };
    if (n_models, cfg.d_in()?) != (acts.n_models(), acts.d_in()) {
        let what = format!("the cfg is for {n_models} models of d_in {}; the activations are", cfg.d_in()?);
        return Err(Error::shape(format!("{what} [n, {}, {}]", acts.n_models(), acts.d_in())).at(acts.place(0)));
    }
    check_memory(cfg, acts, if cfg.text("device").is_ok_and(|device| device == "cpu") { 4 } else { 1 })
}

/// A run goes on with the cfg that it began with. One that was changed beside a checkpoint would not be what it was trained with.
fn check_cfg(ours: &Config, found: &Config) -> Result<()> {
    let show = |cfg: &Config, key: &str| cfg.get(key).map_or("not there".to_owned(), |value| value.to_string());
    for key in ours.keys().keys().chain(found.keys().keys()) {
        let (needed, found) = (show(ours, key), show(found, key));
        if needed != found {
            return Err(Error::config(format!("is {found}; the run goes on with {needed}, see {RESUME}")).at(key));
        }
    }
    Ok(())
}

fn dynamic<'a, B: Backend>(sources: &'a [Source<'_, B>; 4]) -> [&'a dyn TensorSource; 4] {
    sources.each_ref().map(|source| source as &dyn TensorSource)
}

/// A run writes files of its own: not what a link in its directory leads to, nor where opening waits for another process.
fn refuse_irregular(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(there) if !there.is_file() => {
            let what = match there.is_symlink() {
                true => "a link",
                false => "no regular file",
            };
            Err(Error::usage(format!("is {what}; a run writes here, into files of its own")).in_file(path))
        }
        _ => Ok(()),
    }
}

/// The newest version directory, freed from what a crash has left there.
fn newest(out: &Path) -> Result<Option<PathBuf>> {
    let versions = checkpoint::versions(out)?.into_iter().rev();
    let newest = versions.map(|version| checkpoint::version_dir(out, version)).find(|dir| dir.is_dir());
    let Some(dir) = newest else { return Ok(None) };
    atomic::remove_leftovers(&dir)?;
    Ok(Some(dir))
}

fn is_empty(dir: &Path) -> Result<bool> {
    let mut entries = std::fs::read_dir(dir).map_err(|e| Error::io("cannot list the folder", e).in_file(dir))?;
    Ok(entries.next().is_none())
}

/// A file that is locked as long as this lives.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    file: File,
    locked: bool,
}

impl Lock {
    fn take(out: &Path) -> Result<Self> {
        atomic::create_folders(out)?;
        let path = out.join(".lock");
        refuse_irregular(&path)?;
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(|e| Error::io("cannot open for writing", e).in_file(&path))?;
        Self::of(path, file)
    }

    fn of(path: PathBuf, file: File) -> Result<Self> {
        match file.try_lock() {
            Ok(()) => Ok(Lock { path, file, locked: true }),
            Err(TryLockError::WouldBlock) => {
                let what = "another run is training into this directory; wait for it, stop it, or choose another";
                Err(Error::new(ErrorKind::Locked, what).in_file(path.parent().unwrap_or(&path)))
            }
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {
                Ok(Lock { path, file, locked: false })
            }
            Err(TryLockError::Error(e)) => Err(Error::io("cannot lock", e).in_file(&path)),
        }
    }

    /// That the directory's lock is still the one that was taken. A directory that was moved or emptied is nobody's or another
    /// run's: where the file is gone nobody has come since, and it is made and locked again.
    fn check(&mut self) -> Result<()> {
        if !self.path.exists() {
            let new = File::create_new(&self.path);
            let new = new.map_err(|e| Error::io("cannot make it again", e).in_file(&self.path))?;
            *self = Self::of(self.path.clone(), new)?;
        }
        match is_same(&self.file, &self.path) {
            true => Ok(()),
            false => {
                let what = "is another file than this run had locked: another run may be training into this directory";
                Err(Error::new(ErrorKind::Locked, what).in_file(&self.path))
            }
        }
    }
}

/// Whether the open file is the one at `path`.
#[cfg(unix)]
fn is_same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |metadata: std::io::Result<std::fs::Metadata>| metadata.ok().map(|m| (m.dev(), m.ino()));
    id(file.metadata()) == id(path.metadata())
}

/// Elsewhere an open file is not moved or removed.
#[cfg(not(unix))]
fn is_same(_: &File, _: &Path) -> bool {
    true
}

/// The lines of `metrics.jsonl`.
struct Log {
    path: PathBuf,
    file: std::io::BufWriter<File>,
    bytes: u64,
}

impl Log {
    /// Opens the log and cuts it back to its first `bytes`. One that is gone begins anew: a run does not need it.
    fn open(path: &Path, bytes: u64) -> Result<Self> {
        let io = |e| Error::io("cannot open for writing", e).in_file(path);
        let bytes = if path.exists() { bytes } else { 0 };
        let found = path.metadata().map_or(0, |metadata| metadata.len());
        if found < bytes {
            let what = format!("has {found} bytes; the run had written {bytes}; without the file, another is begun");
            return Err(Error::format(what).in_file(path));
        }
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(io)?;
        file.set_len(bytes).map_err(io)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(bytes)).map_err(io)?;
        Ok(Log { path: path.to_owned(), file: std::io::BufWriter::new(file), bytes })
    }

    /// A line: `step`, then the names and values of [`LogRow::named`], a number that is not finite as null.
    fn write(&mut self, step: u64, row: &LogRow) -> Result<()> {
        let mut object = serde_json::Map::new();
        object.insert("step".to_owned(), step.into());
        for (name, value) in row.named() {
            object.insert(name, value.into());
        }
        let line = format!("{}\n", serde_json::Value::Object(object));
        self.bytes += line.len() as u64;
        // Flushed, so that others can follow; synced with each checkpoint.
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.flush());
        written.map_err(|e| Error::io("cannot write", e).in_file(&self.path))
    }

    /// Brings the log to the disk; its length.
    fn sync(&mut self) -> Result<u64> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|e| Error::io("cannot write", e).in_file(&self.path))?;
        Ok(self.bytes)
    }
}
