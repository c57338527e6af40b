//! `crosscoder eval`: the original's losses over a file of rows.

use super::args;
use super::device::{self, with_backend};
use crosscoder::CrossCoder;
use crosscoder::activations::Activations;
use crosscoder::backend::Backend;
use crosscoder::checkpoint::Files;
use crosscoder::error::{Error, Result};
use crosscoder::evaluation::{Batches, evaluate};
use crosscoder::normalisation::{self, FACTOR_KEY};
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
crosscoder eval CHECKPOINT ACTS… [--batch-size N] [--device D] [--raw] [--json]

The losses of the original's get_losses over activations, by name: means over all rows, batch by batch.

CHECKPOINT: a version directory (its newest checkpoint), a weights file with its cfg beside it, a folder with both, or
hf://OWNER/REPO[@REVISION][/PATH].
ACTS: files (.pt, .npy, .safetensors) of shape [n, n_models, d_in], or a file [n, d_in] for each model, A's first, or a
directory of them, in the order of their names: 10.npy before 2.npy.

Rows are multiplied with the normalisation factors that the checkpoint was trained with, if its cfg has them.

  --batch-size N  rows at a time, at most [the cfg's batch_size, at most 4096]. Explained variances compare rows with the
                  mean of their batch, and so depend on it
  --device D      cpu, cuda or cuda:N: the GPU, if there is one [cpu]
  --raw           takes the rows as they are
  --json          one object; a number that is not finite is null
";

pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let (mut paths, mut batch_size, mut raw, mut json) = (Vec::<PathBuf>::new(), None, false, false);
    let mut device = device::DEFAULT.to_owned();
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("batch-size") => batch_size = Some(args::positive(parser, "batch-size")?),
            Long("device") => device = args::text(parser)?,
            Long("raw") => raw = true,
            Long("json") => json = true,
            Long("help") | Short('h') => return args::help(HELP),
            Value(path) => paths.push(path.into()),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    let (checkpoint, acts) = args::checkpoint_and_acts("eval", &paths)?;
    let files = args::checkpoint(checkpoint)?;
    let (checkpoint, picked) = device::Checkpoint::read(&files, &device)?;
    let acts = Activations::open(acts)?;
    let evaluation = with_backend!(picked, |backend| {
        let crosscoder = checkpoint.on(backend)?;
        let factors = factors(&crosscoder, &files, raw)?;
        let batch_size = batch_size.map_or_else(|| default_batch_size(&crosscoder, &files), Ok)?;
        evaluate(&crosscoder, &Batches::new(&acts, 0..acts.rows(), batch_size, &factors))?
    });
    if json {
        let mut object = serde_json::json!({"rows": evaluation.rows});
        for (name, value) in &evaluation.losses {
            object[name] = (*value).into();
        }
        args::print(&format!("{object}\n"))?;
    } else {
        let lines: String = evaluation.losses.iter().map(|(name, value)| format!("{name}\t{value}\n")).collect();
        args::print(&format!("rows\t{}\n{lines}", evaluation.rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Rows at a time where `--batch-size` is not given.
pub(crate) fn default_batch_size<B: Backend>(crosscoder: &CrossCoder<B>, files: &Files) -> Result<usize> {
    const MOST: usize = 4096;
    match crosscoder.cfg().get("batch_size") {
        None | Some(serde_json::Value::Null) => Ok(MOST),
        Some(_) => match crosscoder.cfg().size("batch_size") {
            Ok(size) => Ok(size.min(MOST)),
            Err(e) => Err(e.in_file(&files.cfg).at("without --batch-size")),
        },
    }
}

/// One factor for each model: those of the checkpoint, or 1.
pub(crate) fn factors<B: Backend>(crosscoder: &CrossCoder<B>, files: &Files, raw: bool) -> Result<Vec<f64>> {
    let saved = if raw { None } else { normalisation::factors(crosscoder.cfg()).map_err(|e| e.in_file(&files.cfg))? };
    let n_models = crosscoder.n_models();
    let factors = saved.unwrap_or_else(|| vec![1.0; n_models]);
    if factors.len() != n_models {
        let what = format!("cfg key {FACTOR_KEY:?} has {} factors for {n_models} models", factors.len());
        return Err(Error::config(what).in_file(&files.cfg));
    }
    Ok(factors)
}
