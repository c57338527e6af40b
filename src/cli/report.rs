//! `crosscoder report`: the model diff as one HTML page.

use super::args;
use super::progress::{Progress, Unit};
use crosscoder::CrossCoder;
use crosscoder::activations::Activations;
use crosscoder::analysis::{ActivationPass, ActivationStats, DecoderNorms, Thresholds};
use crosscoder::atomic;
use crosscoder::backend::{Backend, Cpu};
use crosscoder::checkpoint::Files;
use crosscoder::error::{Error, Result};
use crosscoder::normalisation::{factors, scale_rows};
use crosscoder::report::{Report, TrainingLog};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HELP: &str = "\
crosscoder report CHECKPOINT [ACTS…] [--out F] [--csv F] [--json F] [--svg DIR] [--force] …

Writes what a crosscoder says about the difference of its models: decoder norms, relative decoder norms, the groups A only,
shared and B only, cosines of shared latents. From activations also losses, explained variance, L0, densities, the rows on
which each latent is strongest, and Latent Scaling (Minder et al. 2025), which tells exclusive latents from artifacts.

CHECKPOINT: a version directory, or a weights file with its cfg beside it. ACTS: files (.pt, .npy, .safetensors) of shape
[n, 2, d_in], or two files [n, d_in], model A's and model B's, or a directory of such files. Factors of normalisation in
the cfg are applied.

  --out F          the HTML page, one file [report.html, if nothing else is asked for]
  --json F         all numbers as one JSON object; - is stdout
  --csv F          the numbers of each latent, a line each; - is stdout
  --svg DIR        each chart as an SVG file
  --force          replaces files that are there
  --name NAME      the name of a model; once for each, A first [cfg model_names]
  --low R, --high R
                   A only is a relative decoder norm of at most [0.3], B only of at least [0.7]
  --top-rows K     how many rows are kept for each latent [5]
  --rows N         only the first N rows of the activations
  --batch N        rows at a time; explained variances refer to a batch's mean [cfg batch_size]
  --metrics F      the training log [metrics.jsonl beside the weights, if it is there]
  --threads N      threads [all cores]; the result does not depend on it
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
    batch: Option<usize>,
    metrics: Option<PathBuf>,
    threads: Option<usize>,
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
            Long("name") => asked.names.push(args::text(parser)?),
            Long("low") => asked.low = Some(args::number(parser, "low")?),
            Long("high") => asked.high = Some(args::number(parser, "high")?),
            Long("top-rows") => asked.top_rows = Some(args::number(parser, "top-rows")?),
            Long("rows") => asked.rows = Some(args::number(parser, "rows")?),
            Long("batch") => asked.batch = Some(args::number(parser, "batch")?),
            Long("threads") => asked.threads = Some(args::number(parser, "threads")?),
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
    for path in [&asked.out, &asked.json, &asked.csv].into_iter().flatten() {
        args::may_write(path, asked.force || is_stdout(path))?;
    }
    let files = args::checkpoint(&asked.paths[0])?;
    let crosscoder = CrossCoder::load_with(&files, |dtype| {
        let backend = Cpu::<f32>::new(dtype);
        asked.threads.map_or(backend.clone(), |n| backend.with_threads(n))
    })?;
    let report = report(&crosscoder, &files, &asked)?;
    write(&report, &asked)?;
    Ok(ExitCode::SUCCESS)
}

fn report<B: Backend<Scalar = f32>>(crosscoder: &CrossCoder<B>, files: &Files, asked: &Asked) -> Result<Report> {
    let thresholds = Thresholds::default();
    let thresholds = Thresholds::new(asked.low.unwrap_or(thresholds.low()), asked.high.unwrap_or(thresholds.high()))?;
    let norms = DecoderNorms::of(crosscoder)?;
    let mut report = Report::new(crosscoder, norms.clone())
        .with_source(files.weights.display().to_string())
        .with_thresholds(thresholds);
    if !asked.names.is_empty() {
        report = report.with_names(asked.names.clone())?;
    }
    if let Some(log) = training_log(files, asked)? {
        report = report.with_training(log);
    }
    let paths = &asked.paths[1..];
    if !paths.is_empty() {
        let acts = Activations::open(paths)?;
        let stats = stats(crosscoder, &norms, &acts, asked)?;
        let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        report = report.with_activations(stats, names.join(", "));
    }
    Ok(report)
}

fn training_log(files: &Files, asked: &Asked) -> Result<Option<TrainingLog>> {
    let beside = files.weights.with_file_name("metrics.jsonl");
    let path = match &asked.metrics {
        Some(path) => path,
        None if beside.is_file() => &beside,
        None => return Ok(None),
    };
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("cannot read", e).in_file(path))?;
    TrainingLog::from_jsonl(&text).map(Some).map_err(|e| e.in_file(path))
}

fn stats<B: Backend<Scalar = f32>>(
    crosscoder: &CrossCoder<B>,
    norms: &DecoderNorms,
    acts: &Activations,
    asked: &Asked,
) -> Result<ActivationStats> {
    let (n_models, d_in) = (crosscoder.n_models(), crosscoder.d_in());
    if (acts.n_models(), acts.d_in()) != (n_models, d_in) {
        let found = format!("[n, {}, {}]", acts.n_models(), acts.d_in());
        return Err(Error::shape(format!("the activations are {found}; the crosscoder needs [n, {n_models}, {d_in}]")));
    }
    let factors: Option<Vec<f32>> = factors(crosscoder.cfg())?.map(|f| f.iter().map(|&f| f as f32).collect());
    if let Some(found) = factors.as_ref().map(Vec::len).filter(|&n| n != n_models) {
        return Err(Error::shape(format!("{found} normalisation factors in the cfg; there are {n_models} models")));
    }
    let rows = asked.rows.unwrap_or(usize::MAX).min(acts.rows());
    let batch = asked.batch.or_else(|| crosscoder.cfg().size("batch_size").ok()).unwrap_or(4096).max(1);
    let mut pass = ActivationPass::new(crosscoder, norms, asked.top_rows.unwrap_or(5));
    if let Some(threads) = asked.threads {
        pass = pass.with_threads(threads);
    }
    let mut progress = Progress::new("activations", Unit::Bytes);
    let (mut piece, mut x) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < rows {
        let end = batch.min(rows - at) + at;
        x.clear();
        while at < end {
            let count = acts.rows_per_piece().min(end - at);
            acts.read_f32(at, count, &mut piece)?;
            x.extend_from_slice(&piece);
            at += count;
        }
        if let Some(factors) = &factors {
            scale_rows(factors, d_in, &mut x);
        }
        pass.add(&x)?;
        progress.set((at * acts.row_bytes()) as u64, (rows * acts.row_bytes()) as u64);
    }
    pass.finish()
}

fn write(report: &Report, asked: &Asked) -> Result<()> {
    let texts: [(&Option<PathBuf>, &dyn Fn() -> String); 3] =
        [(&asked.json, &|| report.to_json()), (&asked.csv, &|| report.to_csv()), (&asked.out, &|| report.to_html())];
    for (path, text) in texts {
        match path {
            Some(path) if is_stdout(path) => args::print(&text())?,
            Some(path) => write_file(path, &text())?,
            None => {}
        }
    }
    if let Some(folder) = &asked.svg {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("cannot create the folder", e).in_file(folder))?;
        for figure in report.figures() {
            let path = folder.join(format!("{}.svg", figure.name));
            args::may_write(&path, asked.force)?;
            write_file(&path, &figure.to_svg())?;
        }
    }
    Ok(())
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    atomic::write(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("cannot write", e)))?;
    let _ = writeln!(std::io::stderr(), "wrote {}", path.display());
    Ok(())
}

fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}
