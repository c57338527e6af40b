//! `resume.pt`: what a checkpoint lacks to go on from it.
//!
//! A dict of tensors, like any `.pt` that this crate writes: `meta` holds JSON text as bytes, `exp_avg.W_enc`, … and
//! `exp_avg_sq.W_enc`, … Adam's moments in the parameters' shapes and dtype, `weights.W_enc`, … the parameters where the run
//! was stopped between regular checkpoints, `buffer.rows` the set's row at each position
//! of the shuffle buffer, `rng.words` the generator. The rows themselves are not saved; they are read again.

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
use crate::atomic;
use crate::autodiff::{PARAMETER_NAMES, Parameters};
use crate::buffer::BufferState;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::TensorFile;
use crate::optim::Moments;
use crate::pt::{PathPart, Save, TensorSource, Writer};
use crate::rng::{self, Mt19937};
use crate::tensor::{Tensor, Values};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// A `meta` longer than this is refused: it holds a cfg and some numbers.
const META_BYTES: usize = 1 << 20;

/// What a run has come to.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) cfg: Config,
    /// Steps taken.
    pub(super) step: u64,
    /// The number of the checkpoint after these steps.
    pub(super) checkpoint: Option<usize>,
    /// The length of the log then.
    pub(super) metrics_bytes: u64,
    /// Whether the run was stopped here, between its regular checkpoints. Then the parameters are in the state too, and the
    /// next checkpoint takes this one's number.
    pub(super) interim: bool,
    /// Whether all steps are taken; then moments and buffer are left out.
    pub(super) finished: bool,
    pub(super) data: Option<Data>,
    pub(super) buffer: Option<BufferState>,
    pub(super) moments: Option<Moments<Tensor>>,
    /// Of an interim state.
    pub(super) weights: Option<Parameters<Tensor>>,
}

/// What [`State::write`] takes from the trainer, in pieces.
pub(super) struct Sources<'a> {
    pub(super) exp_avg: [&'a dyn TensorSource; 4],
    pub(super) exp_avg_sq: [&'a dyn TensorSource; 4],
    /// For an interim state.
    pub(super) weights: Option<[&'a dyn TensorSource; 4]>,
}

/// What tells one set of activations from another.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Data {
    rows: usize,
    n_models: usize,
    d_in: usize,
    dtype: String,
    /// FNV-1a over some rows spread over the set.
    hash: u64,
}

impl Data {
    pub(super) fn of(acts: &Activations) -> Result<Self> {
        const ROWS: usize = 64;
        let (mut hash, mut bytes) = (0xcbf2_9ce4_8422_2325u64, Vec::new());
        for i in 0..ROWS.min(acts.rows()) {
            // The first and the last row, and others at equal distances.
            let (last, gaps) = (acts.rows().saturating_sub(1), ROWS.min(acts.rows()).saturating_sub(1));
            let row = i.saturating_mul(last).checked_div(gaps).unwrap_or(0);
            acts.read(row, 1, &mut bytes)?;
            hash = bytes.iter().fold(hash, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        }
        let dtype = acts.dtype().name().to_owned();
        Ok(Data { rows: acts.rows(), n_models: acts.n_models(), d_in: acts.d_in(), dtype, hash })
    }

    fn show(&self) -> String {
        format!("{} [{}, {}, {}], hash {:016x}", self.dtype, self.rows, self.n_models, self.d_in, self.hash)
    }
}

impl State {
    /// A run before its first step.
    pub(super) fn new(cfg: Config) -> Self {
        State {
            cfg,
            step: 0,
            checkpoint: None,
            metrics_bytes: 0,
            interim: false,
            finished: false,
            data: None,
            buffer: None,
            moments: None,
            weights: None,
        }
    }

    /// Notes the data of a new run; refuses other data than those the run had.
    pub(super) fn check_data(&mut self, data: Data) -> Result<()> {
        if let Some(before) = &self.data
            && *before != data
        {
            let what = format!("the run was on other activations: {}, now {}", before.show(), data.show());
            return Err(Error::usage(what));
        }
        self.data = Some(data);
        Ok(())
    }

    /// Writes the state with what the trainer has, in the order of [`PARAMETER_NAMES`] each; whole or not at all.
    #[allow(clippy::indexing_slicing)] // Of a JSON object: a key that is not there is made.
    pub(super) fn write(&self, path: &Path, sources: Option<Sources<'_>>) -> Result<()> {
        let mut meta = json!({
            "format": 1,
            "step": self.step,
            "checkpoint": self.checkpoint,
            "metrics_bytes": self.metrics_bytes,
            "interim": self.interim,
            "finished": self.finished,
            "cfg": self.cfg.keys(),
        });
        if let Some(data) = &self.data {
            meta["data"] = json!([data.rows, data.n_models, data.d_in, data.dtype, data.hash]);
        }
        let mut own = Vec::new();
        if let Some(buffer) = &self.buffer {
            let rng = buffer.rng.state();
            meta["buffer"] = json!([buffer.pointer, buffer.next_row, rng.used]);
            own.push(("buffer.rows", vector(Values::I64(buffer.rows.iter().map(|&r| r as i64).collect()))?));
            own.push(("rng.words", vector(Values::I64(rng.words.iter().map(|&w| i64::from(w)).collect()))?));
        }
        own.insert(0, ("meta", vector(Values::U8(meta.to_string().into_bytes()))?));
        let mut entries: Vec<(PathPart, Save<'_>)> =
            own.iter().map(|(name, tensor)| (PathPart::from(*name), Save::Tensor(tensor))).collect();
        if let Some(Sources { exp_avg, exp_avg_sq, weights }) = sources {
            let groups = [("exp_avg", Some(exp_avg)), ("exp_avg_sq", Some(exp_avg_sq)), ("weights", weights)];
            for (which, group) in groups.into_iter().filter_map(|(which, group)| Some((which, group?))) {
                for (name, source) in PARAMETER_NAMES.iter().zip(group) {
                    entries.push((PathPart::from(format!("{which}.{name}").as_str()), Save::Tensor(source)));
                }
            }
        }
        let folder = Writer::<Vec<u8>>::folder_for(path);
        atomic::write(path, |out| Writer::new(out, &folder)?.save(&Save::Dict(entries)).map(drop))
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        let mut file = TensorFile::open(path)?;
        let mut tensors = BTreeMap::new();
        for (index, entry) in file.tensors().to_vec().into_iter().enumerate() {
            tensors.insert(entry.name, file.read_of_all(index)?);
        }
        Self::from_tensors(tensors).map_err(|e| e.in_file(path))
    }

    #[allow(clippy::indexing_slicing)] // Of a JSON value that is only read: what is not there is null.
    fn from_tensors(mut tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let damaged = |what: &str| Error::format(format!("is no state of a run: {what}"));
        let meta = match tensors.remove("meta").map(Tensor::into_values) {
            Some(Values::U8(bytes)) if bytes.len() > META_BYTES => {
                return Err(damaged(&format!("meta has {} bytes; the limit is {META_BYTES}", bytes.len())));
            }
            Some(Values::U8(bytes)) => {
                serde_json::from_slice::<Value>(&bytes).map_err(|_| damaged("meta is no JSON"))?
            }
            _ => return Err(damaged("it has no meta")),
        };
        if meta["format"] != 1 {
            return Err(Error::unsupported(format!("format {}; this version reads 1", meta["format"])));
        }
        let number = |value: &Value, what: &str| value.as_u64().ok_or_else(|| damaged(what));
        let mut state = State::new(Config::from_json(meta["cfg"].to_string().as_bytes())?);
        state.step = number(&meta["step"], "step")?;
        state.metrics_bytes = number(&meta["metrics_bytes"], "metrics_bytes")?;
        state.checkpoint = meta["checkpoint"].as_u64().map(|k| k as usize);
        state.interim = meta["interim"] == true;
        state.finished = meta["finished"] == true;
        if let Some([rows, n_models, d_in, dtype, hash]) = meta["data"].as_array().map(Vec::as_slice) {
            state.data = Some(Data {
                rows: number(rows, "data")? as usize,
                n_models: number(n_models, "data")? as usize,
                d_in: number(d_in, "data")? as usize,
                dtype: dtype.as_str().ok_or_else(|| damaged("data"))?.to_owned(),
                hash: number(hash, "data")?,
            });
        }
        let begun = state.step > 0 || state.finished;
        if begun != state.checkpoint.is_some() || begun && state.data.is_none() {
            return Err(damaged(
                "steps without a checkpoint or the activations they were taken on, or a checkpoint without",
            ));
        }
        let mut integers = |name: &str| match tensors.remove(name).map(Tensor::into_values) {
            Some(Values::I64(values)) => Ok(values),
            _ => Err(damaged(&format!("{name} is missing or no int64"))),
        };
        if let Some([pointer, next_row, used]) = meta["buffer"].as_array().map(Vec::as_slice) {
            let words = integers("rng.words")?.into_iter().map(|w| w as u32).collect();
            let rng = rng::State { words, used: number(used, "generator")? as usize, spare: None };
            state.buffer = Some(BufferState {
                rows: integers("buffer.rows")?.into_iter().map(|r| r as u64).collect(),
                pointer: number(pointer, "buffer")? as usize,
                next_row: number(next_row, "buffer")? as usize,
                rng: Mt19937::from_state(&rng)?,
            });
        }
        let mut four = |which: &str| -> Result<Parameters<Tensor>> {
            let mut take = |name: &str| {
                let name = format!("{which}.{name}");
                tensors.remove(&name).ok_or_else(|| damaged(&format!("{name} is missing")))
            };
            let [a, b, c, d] = PARAMETER_NAMES;
            Ok(Parameters::from_each([take(a)?, take(b)?, take(c)?, take(d)?]))
        };
        if state.checkpoint.is_some() && !state.finished {
            state.moments = Some(Moments { exp_avg: four("exp_avg")?, exp_avg_sq: four("exp_avg_sq")? });
            if state.interim {
                state.weights = Some(four("weights")?);
            }
            if state.buffer.is_none() {
                return Err(damaged("the buffer is missing"));
            }
        }
        Ok(state)
    }
}

fn vector(values: Values) -> Result<Tensor> {
    Tensor::new(vec![values.len()], values)
}
