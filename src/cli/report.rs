//! `crosscoder report`: the model diff as one HTML page.

use super::device::with_backend;
use super::progress::{Progress, Unit};
use super::{args, device, eval};
use crosscoder::CrossCoder;
use crosscoder::activations::Activations;
use crosscoder::analysis::{ActivationStats, DecoderNorms, Thresholds, activation_stats};
use crosscoder::atomic;
use crosscoder::backend::Backend;
use crosscoder::checkpoint::Files;
use crosscoder::error::{Error, Result};
use crosscoder::evaluation::Batches;
use crosscoder::report::{MAX_NAMES, Report, TrainingLog};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HELP: &str = "\
crosscoder report CHECKPOINT [ACTS…] [--out F] [--csv F] [--json F] [--svg DIR] [--force] …

Writes what a crosscoder says about the difference of its models: decoder norms, relative decoder norms, the groups A
only, shared and B only, cosines of shared latents. From activations also losses, explained variance, L0, densities, the
rows on which each latent is strongest, and Latent Scaling (Minder et al. 2025), which tells exclusive latents from
artifacts of the l1 penalty.

CHECKPOINT: a version directory (its newest checkpoint), a weights file with its cfg beside it, a folder with both, or
hf://OWNER/REPO[@REVISION][/PATH].
ACTS: files (.pt, .npy, .safetensors) of shape [n, n_models, d_in], or a file [n, d_in] for each model, A's first, or a
directory of them, in the order of their names: 10.npy before 2.npy.

Rows are multiplied with the normalisation factors that the checkpoint was trained with, if its cfg has them.

  --out F         the HTML page, one file [report.html, if nothing else is asked for]
  --json F        all numbers as one JSON object; - is stdout
  --csv F         the numbers of each latent, a line each; - is stdout
  --svg DIR       each chart as an SVG file
  --force         replaces files that are there (of a link the file that it leads to), never anything else
  --name NAME     the name of a model; once for each, A first [the cfg's model_names]
  --low R, --high R
                  A only is a relative decoder norm of at most [0.3], B only of at least [0.7]
  --top-rows K    how many rows are kept for each latent [5]
  --rows N        only the first N rows
  --batch-size N  rows at a time, at most [the cfg's batch_size, at most 4096]. Explained variances compare rows with
                  the mean of their batch, and so depend on it
  --device D      cpu, cuda or cuda:N: the GPU, if there is one [cpu]
  --raw           takes the rows as they are
  --metrics F     the training log [metrics.jsonl beside the weights, if it is there]; of names other than the original's the
                  first 64 are taken
";

/// What is asked for, as it stands on the command line.
#[derive(Default)]
struct Asked {
    paths: Vec<PathBuf>,
    out: Option<PathBuf>,
    json: Option<PathBuf>,
    csv: Option<PathBuf>,
    svg: Option<PathBuf>,
    force: bool,
    names: Vec<String>,
    low: Option<f64>,
    high: Option<f64>,
    top_rows: Option<usize>,
    rows: Option<usize>,
    batch_size: Option<usize>,
    device: Option<String>,
    raw: bool,
    metrics: Option<PathBuf>,
}

impl Asked {
    /// The files that are named on the command line.
    fn files(&self) -> impl Iterator<Item = &Path> {
        [&self.json, &self.csv, &self.out].into_iter().flatten().map(PathBuf::as_path).filter(|path| !is_stdout(path))
    }
}

pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let mut asked = Asked::default();
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("out") => asked.out = Some(args::file(parser)?),
            Long("json") => asked.json = Some(args::file(parser)?),
            Long("csv") => asked.csv = Some(args::file(parser)?),
            Long("svg") => asked.svg = Some(args::file(parser)?),
            Long("metrics") => asked.metrics = Some(args::file(parser)?),
            Long("force") => asked.force = true,
            Long("raw") => asked.raw = true,
            Long("name") => asked.names.push(args::text(parser)?),
            Long("low") => asked.low = Some(args::number(parser, "low")?),
            Long("high") => asked.high = Some(args::number(parser, "high")?),
            Long("top-rows") => asked.top_rows = Some(args::count(parser, "top-rows")?),
            Long("rows") => asked.rows = Some(args::count(parser, "rows")?),
            Long("batch-size") => asked.batch_size = Some(args::positive(parser, "batch-size")?),
            Long("device") => asked.device = Some(args::text(parser)?),
            Long("help") | Short('h') => return args::help(HELP),
            Value(path) => asked.paths.push(path.into()),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    if asked.paths.is_empty() {
        return Err(Error::usage("report needs a CHECKPOINT"));
    }
    if asked.out.is_none() && asked.json.is_none() && asked.csv.is_none() && asked.svg.is_none() {
        asked.out = Some("report.html".into());
    }
    if [&asked.out, &asked.json, &asked.csv].into_iter().flatten().filter(|path| is_stdout(path)).count() > 1 {
        return Err(Error::usage("one of --out, --json and --csv may be -"));
    }
    // The folder for charts comes first, as other files may be asked for in it.
    let is_new = |folder: &&Path| *folder != Path::new("") && !folder.exists();
    let made: Vec<&Path> = asked.svg.iter().flat_map(|folder| folder.ancestors().take_while(is_new)).collect();
    if let Some(folder) = &asked.svg {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot create the folder", e).in_file(folder))?;
    }
    make(&asked).inspect_err(|_| {
        // None of those that were made for nothing stays, the innermost first; one with something in it does.
        let _ = made.iter().try_for_each(std::fs::remove_dir);
    })?;
    Ok(ExitCode::SUCCESS)
}

fn make(asked: &Asked) -> Result<()> {
    args::may_write_all(asked.files(), asked.force)?;
    let of_acts = [
        ("--rows", asked.rows.is_some()),
        ("--top-rows", asked.top_rows.is_some()),
        ("--batch-size", asked.batch_size.is_some()),
        ("--raw", asked.raw),
    ];
    if let (Some((option, _)), [_]) = (of_acts.iter().find(|(_, given)| *given), &asked.paths[..]) {
        return Err(Error::usage(format!("{option} is about ACTS, and there are none")));
    }
    let files = args::checkpoint(&asked.paths[0])?;
    let log = beside(&files);
    let inputs = [&files.weights, &files.cfg, &log].into_iter().chain(&asked.paths[1..]).chain(&asked.metrics);
    let mut inputs: Vec<PathBuf> = inputs.cloned().collect();
    args::keep(&inputs, asked.files())?;
    let (checkpoint, picked) = device::Checkpoint::read(&files, asked.device.as_deref().unwrap_or(device::DEFAULT))?;
    let report = with_backend!(picked, |backend| report(&checkpoint.on(backend)?, &files, asked, &mut inputs))?;
    write(&report, asked, &inputs)
}

/// The report; `inputs` gets the files of activations that it is made of.
fn report<B: Backend>(
    crosscoder: &CrossCoder<B>,
    files: &Files,
    asked: &Asked,
    inputs: &mut Vec<PathBuf>,
) -> Result<Report> {
    let thresholds = Thresholds::default();
    let thresholds = Thresholds::new(asked.low.unwrap_or(thresholds.low()), asked.high.unwrap_or(thresholds.high()))?;
    let norms = DecoderNorms::of(crosscoder)?;
    let mut report = Report::new(crosscoder, norms.clone())
        .with_source(files.weights.display().to_string())
        .with_thresholds(thresholds);
    if !asked.names.is_empty() {
        report = report.with_names(asked.names.clone()).map_err(|e| e.at("--name"))?;
    }
    if let Some(log) = training_log(files, asked)? {
        report = report.with_training(log);
    }
    let paths = &asked.paths[1..];
    if !paths.is_empty() {
        let acts = Activations::open(paths)?;
        inputs.extend(acts.files().map(Path::to_owned));
        args::keep(&*inputs, asked.files())?;
        let factors = eval::factors(crosscoder, files, asked.raw)?;
        let stats = stats(crosscoder, files, &factors, &norms, &acts, asked)?;
        let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        report = report.with_activations(stats, names.join(", ")).with_factors(factors);
    }
    Ok(report)
}

/// Where the log of the run that made a checkpoint lies, if it is there.
fn beside(files: &Files) -> PathBuf {
    files.weights.with_file_name("metrics.jsonl")
}

fn training_log(files: &Files, asked: &Asked) -> Result<Option<TrainingLog>> {
    let beside = beside(files);
    let path = match &asked.metrics {
        Some(path) => path,
        None if beside.is_file() => &beside,
        None => return Ok(None),
    };
    let log = TrainingLog::read(path)?;
    if log.left_out > 0 {
        let _ = writeln!(std::io::stderr(), "{}: {} names beyond {MAX_NAMES} left out", path.display(), log.left_out);
    }
    Ok(Some(log))
}

fn stats<B: Backend>(
    crosscoder: &CrossCoder<B>,
    files: &Files,
    factors: &[f64],
    norms: &DecoderNorms,
    acts: &Activations,
    asked: &Asked,
) -> Result<ActivationStats> {
    let batch_size = asked.batch_size.map_or_else(|| eval::default_batch_size(crosscoder, files), Ok)?;
    let rows = asked.rows.unwrap_or(usize::MAX).min(acts.rows());
    let batches = Batches::new(acts, 0..rows, batch_size, factors);
    let mut progress = Progress::new("activations", Unit::Bytes);
    let bytes = |rows: usize| (rows * acts.row_bytes()) as u64;
    activation_stats(crosscoder, norms, &batches, asked.top_rows.unwrap_or(5), |done| {
        progress.set(bytes(done), bytes(rows));
    })
}

fn write(report: &Report, asked: &Asked, inputs: &[PathBuf]) -> Result<()> {
    let mut charts = Vec::new();
    if let Some(folder) = &asked.svg {
        charts.extend(report.figures().into_iter().map(|f| (folder.join(format!("{}.svg", f.name)), f)));
    }
    let outputs = || asked.files().chain(charts.iter().map(|(path, _)| path.as_path()));
    args::may_write_all(outputs(), asked.force)?;
    args::keep(inputs, outputs())?;
    let texts: [(&Option<PathBuf>, &dyn Fn() -> String); 3] =
        [(&asked.json, &|| report.to_json()), (&asked.csv, &|| report.to_csv()), (&asked.out, &|| report.to_html())];
    // All are written before the first is put into its place.
    let mut staged = Vec::new();
    let mut stage = |path: &Path, text: String| -> Result<()> {
        let file = atomic::stage(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("cannot write", e)))?;
        staged.push((path.to_owned(), file));
        Ok(())
    };
    let mut printed = None;
    for (path, text) in texts.into_iter().filter_map(|(path, text)| Some((path.as_ref()?, text))) {
        if is_stdout(path) {
            printed = Some(text());
        } else {
            stage(path, text())?;
        }
    }
    charts.iter().try_for_each(|(path, figure)| stage(path, figure.to_svg()))?;
    let mut wrote = String::new();
    let placed = atomic::place_all(staged, |path: PathBuf| wrote += &format!("wrote {}\n", path.display()));
    let _ = std::io::stderr().write_all(wrote.as_bytes());
    placed?;
    printed.map_or(Ok(()), |text| args::print(&text))
}

fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}
