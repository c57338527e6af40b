//! `crosscoder train`: activations in, a checkpoint out that the Python original loads.

use super::{args, device};
use crosscoder::activations::Activations;
use crosscoder::analysis::{DecoderNorms, Thresholds, activation_stats};
use crosscoder::atomic;
use crosscoder::backend::{Backend, Picked};
use crosscoder::buffer::HeldOut;
use crosscoder::checkpoint;
use crosscoder::config::Config;
use crosscoder::error::{Error, Result};
use crosscoder::evaluation::{Batches, Evaluation, dead, evaluate};
use crosscoder::normalisation::factors;
use crosscoder::pt::PtFile;
use crosscoder::report::{Report, TrainingLog};
use crosscoder::run::{self, Ended, Event, Run};
use serde_json::{Value, json};
use std::io::{Cursor, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

const HELP: &str = "\
crosscoder train [ACTS…] [--cfg FILE] [--KEY VALUE]… [--out DIR] [--resume]

Trains a crosscoder on activations and saves checkpoints that the Python original, which knows two models, loads.

ACTS: files (.pt, .npy, .safetensors) of shape [n, n_models, d_in], one after the other; or a file [n, d_in] for each
model, A's first; or a directory of such files, in the order of their names: 10.npy before 2.npy. Without ACTS it trains
on a small set of real activations built into the program.

  --cfg FILE         a cfg of the original (JSON); its keys replace the defaults. A checkpoint's has the factors that its rows
                     were multiplied with, normalisation_factor: leave them out to have them estimated from ACTS
  --KEY VALUE        any key of the cfg, e.g. --dict_size 4096 --l1_coeff 1; it replaces the file's
  --device D         cpu, cuda or cuda:N: the GPU, if there is one [the cfg's device; without a cfg cpu]
  --val-fraction F   the share of rows, evenly spread, that is never trained on [0.05; built-in set 0.1]
  --original-refresh the buffer reads nothing after its first fill, as it happens in the original
  --out DIR          where version_0, version_1, … are made [checkpoints]
  --resume           goes on with the newest version in DIR, bit for bit, on the same ACTS (of which shape, dtype and 64 rows
                     are compared)
  --keep-going-on-nan
                     goes on where a loss or gradient is not finite, as the original does, instead of stopping
  --threads N        threads [all cores]; the result does not depend on it
  --no-report        writes no report.html beside the checkpoints at the end
  --json             the result as one JSON object; a number that is not finite is null

Defaults are those of the original's train.py, smaller where the set is small: batch_size at most a tenth of the rows and
dict_size at most half of them and 8 · d_in, each a power of two; num_tokens at most 100 passes; buffer_mult such that the
buffer takes 256 MiB at most; lr larger where there are fewer steps, up to 1e-3; save_every at least ten times a run.

Ctrl-C and SIGTERM finish the step, save, and stop with status 130; a second one stops at once. Otherwise status 0, 1 on
failure, 2 on wrong usage.
";

/// The built-in set: fixtures/activations/README.md tells where it comes from, and its licences.
const BUILT_IN: &[u8] = include_bytes!("../../fixtures/activations/minilm-small.pt");

/// What is asked for, as it stands on the command line.
#[derive(Default)]
struct Asked {
    acts: Vec<PathBuf>,
    cfg: Option<PathBuf>,
    keys: Vec<(String, String)>,
    out: Option<PathBuf>,
    resume: bool,
    keep_going: bool,
    threads: Option<usize>,
    json: bool,
    no_report: bool,
}

pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let mut asked = Asked::default();
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("help") | Short('h') => return args::help(HELP),
            Long("cfg") => asked.cfg = Some(parser.value().map_err(args::usage)?.into()),
            Long("out") => asked.out = Some(parser.value().map_err(args::usage)?.into()),
            Long("resume") => asked.resume = true,
            Long("keep-going-on-nan") => asked.keep_going = true,
            Long("json") => asked.json = true,
            Long("no-report") => asked.no_report = true,
            Long("threads") => asked.threads = Some(args::positive(parser, "threads")?),
            Long("original-refresh") => asked.keys.push(("original_refresh".to_owned(), "true".to_owned())),
            Long(key) => {
                let key = key.replace('-', "_");
                asked.keys.push((key, args::text(parser)?));
            }
            Value(path) => asked.acts.push(path.into()),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    let stop = super::stop_on_signals()?;
    let acts = open(&asked)?;
    let out = asked.out.clone().unwrap_or_else(|| "checkpoints".into());
    let resumed = if asked.resume { Run::resume(&out)? } else { None };
    if asked.resume && resumed.is_none() {
        let _ = writeln!(std::io::stderr(), "{}: no run to go on with; a new one begins", out.display());
    }
    let cfg = match &resumed {
        Some(run) => {
            check_same(&asked, run.cfg())?;
            run.cfg().clone()
        }
        None => {
            // The file that most keys are from.
            let from = |e: Error| match &asked.cfg {
                Some(file) if asked.keys.is_empty() => e.in_file(file),
                Some(file) => e.at(format!("{} and options", file.display())),
                None => e,
            };
            let cfg = cfg(&asked, &acts).map_err(from)?;
            run::check(&cfg, &acts).map_err(from)?;
            if let Some(factors) = factors(&cfg)? {
                let what = "normalisation factors are the cfg's, not estimated from these rows";
                let _ = writeln!(std::io::stderr(), "{what}: {factors:?}");
            }
            cfg
        }
    };
    // `cuda:0`, as the original's cfgs say, means "if there is one".
    let picked = device::pick(cfg.text("device")?, cfg.enc_dtype()?)?;
    let run = match resumed {
        Some(run) => run,
        None => Run::create(&out, cfg)?,
    };
    if !run.is_locked() {
        let what = "has no locks on this file system: nothing keeps another run from training into it";
        let _ = writeln!(std::io::stderr(), "warning: {} {what}", out.display());
    }
    if run.lacks_log() {
        let _ = writeln!(
            std::io::stderr(),
            "warning: {} has no metrics.jsonl any more: another is begun",
            run.dir().display()
        );
    }
    let run = if asked.keep_going { run.keep_going() } else { run };
    match picked {
        Picked::Cpu(backend, _) => {
            let backend = asked.threads.map_or(backend.clone(), |n| backend.with_threads(n));
            train(run, backend, &acts, &stop, &asked)
        }
        #[cfg(feature = "cuda")]
        Picked::Cuda(backend) => train(run, backend, &acts, &stop, &asked),
    }
}

fn open(asked: &Asked) -> Result<Activations> {
    let acts = match &asked.acts[..] {
        [] => built_in()?,
        paths => Activations::open(paths)?,
    };
    Ok(if asked.keep_going { acts.unchecked() } else { acts })
}

fn built_in() -> Result<Activations> {
    const NAME: &str = "the built-in set";
    let mut file = PtFile::new(Cursor::new(BUILT_IN))?;
    let tensor = file.find(&[])?;
    Activations::from_tensor(NAME, file.read(&tensor)?)
}

/// The cfg of a new run: defaults, the file's keys, the command line's.
fn cfg(asked: &Asked, acts: &Activations) -> Result<Config> {
    let mut given = Config::from_json(b"{}")?;
    if let Some(path) = &asked.cfg {
        for (key, value) in checkpoint::read_cfg(path)?.keys() {
            given.set(key, value.clone());
        }
    }
    // A key of the command line has the type of the default.
    let mut typed = run::default_cfg(acts, &given)?;
    for (key, text) in &asked.keys {
        if typed.get(key).is_none() {
            return Err(Error::usage(format!(
                "--{key}: neither an option nor a key of the cfg; see crosscoder train --help"
            )));
        }
        typed.set_text(key, text)?;
        if let Some(value) = typed.get(key) {
            given.set(key, value.clone());
        }
    }
    if asked.acts.is_empty() {
        for (key, value) in run::built_in_keys() {
            if given.get(key).is_none() {
                given.set(key, value);
            }
        }
    }
    run::default_cfg(acts, &given)
}

/// A run that goes on has its cfg; what else is asked for must agree.
fn check_same(asked: &Asked, cfg: &Config) -> Result<()> {
    let mut wanted = cfg.clone();
    if let Some(path) = &asked.cfg {
        for (key, value) in checkpoint::read_cfg(path)?.keys() {
            wanted.set(key, value.clone());
        }
    }
    for (key, text) in &asked.keys {
        wanted.set_text(key, text)?;
    }
    for (key, value) in wanted.keys() {
        // 2 and 2.0 are one number; two integers that float64 does not tell apart are not.
        let is_float = |found: &Value| found.is_f64() || value.is_f64();
        let same = |found: &Value| found == value || is_float(found) && found.as_f64() == value.as_f64();
        if !cfg.get(key).is_some_and(same) {
            let before = cfg.get(key).map_or("not there".to_owned(), |v| v.to_string());
            return Err(Error::usage(format!(
                "--resume: cfg key {key:?} is {before} in this run, {value} is asked for"
            )));
        }
    }
    Ok(())
}

fn train<B: Backend<Scalar = f32>>(
    run: Run,
    backend: B,
    acts: &Activations,
    stop: &AtomicBool,
    asked: &Asked,
) -> Result<ExitCode> {
    let batch_size = run.cfg().size("batch_size")?;
    let mut progress = Progress::new(batch_size);
    let ended = run.train(backend, acts, stop, |event| progress.show(event));
    progress.clear();
    let ended = ended?;
    if !ended.finished {
        let at = match &ended.checkpoint {
            Some(path) => format!("saved {}", path.display()),
            None => "before the first checkpoint".to_owned(),
        };
        let _ = writeln!(std::io::stderr(), "stopped at step {}, {at}; --resume goes on", ended.step);
        return Ok(ExitCode::from(130));
    }
    report(&ended, acts, batch_size, asked)?;
    Ok(ExitCode::SUCCESS)
}

/// Batches that the evaluation at the end is limited to.
const EVALUATION_BATCHES: usize = 100;

/// Rows that the page shows for each latent.
const TOP_ROWS: usize = 5;

/// Evaluates the crosscoder and prints the result.
fn report<B: Backend>(ended: &Ended<B>, acts: &Activations, batch_size: usize, asked: &Asked) -> Result<()> {
    let crosscoder = &ended.crosscoder;
    let held_out = HeldOut::from_cfg(crosscoder.cfg())?;
    let factors = factors(crosscoder.cfg())?.unwrap_or_else(|| vec![1.0; acts.n_models()]);
    let limit = EVALUATION_BATCHES * batch_size;
    let validation = held_out.count(acts.rows()) > 0;
    let rows = (0..acts.rows()).filter(|&row| held_out.holds(row) == validation).take(limit);
    let batches = Batches::new(acts, rows, batch_size, &factors);
    let evaluation = evaluate(crosscoder, &batches)?;
    let all = 0..acts.rows().min(limit);
    let norms = DecoderNorms::of(crosscoder)?;
    let latents = Latents {
        rows: all.len(),
        dead: dead(crosscoder, &Batches::new(acts, all, batch_size, &factors))?,
        count: norms.d_hidden(),
        groups: (norms.n_models() == 2).then(|| norms.groups(&Thresholds::default())),
    };
    let weights = ended.checkpoint.as_deref().unwrap_or(Path::new(""));
    let rows = if validation { "validation" } else { "training" };
    let text = if asked.json {
        json_report(weights, ended.step, rows, &evaluation, &latents)
    } else {
        text_report(weights, ended.step, rows, &evaluation, &latents)
    };
    if asked.no_report {
        return args::print(&text);
    }
    // Whoever does not read to the end gets the page all the same.
    let page = weights.with_file_name(run::PAGE);
    let stats = activation_stats(crosscoder, &norms, &batches, TOP_ROWS, |_| {})?;
    let mut report = Report::new(crosscoder, norms)
        .with_source(weights.file_name().unwrap_or_default().to_string_lossy())
        .with_activations(stats, format!("{rows} rows"))
        .with_factors(factors);
    let log = weights.with_file_name("metrics.jsonl");
    if log.exists() {
        report = report.with_training(TrainingLog::read(&log)?);
    }
    let html = report.to_html();
    atomic::write(&page, |out| out.write_all(html.as_bytes()).map_err(|e| Error::io("cannot write", e)))?;
    args::print(&text)?;
    if !asked.json {
        args::print(&format!("model diff            {}\n", page.display()))?;
    }
    Ok(())
}

/// What is told of the latents.
struct Latents {
    /// The rows that were searched for dead ones.
    rows: usize,
    dead: usize,
    count: usize,
    groups: Option<[(&'static str, u64); 4]>,
}

fn json_report(weights: &Path, step: u64, rows: &str, evaluation: &Evaluation, latents: &Latents) -> String {
    let mut object = json!({
        "checkpoint": weights.display().to_string(),
        "step": step,
        "evaluated_on": rows,
        "rows": evaluation.rows,
    });
    for (name, value) in &evaluation.losses {
        object[name] = (*value).into();
    }
    object["latents"] = json!({"rows": latents.rows, "dead": latents.dead});
    for (name, size) in latents.groups.iter().flatten() {
        object["latents"][name] = (*size).into();
    }
    format!("{object}\n")
}

fn text_report(weights: &Path, step: u64, rows: &str, evaluation: &Evaluation, latents: &Latents) -> String {
    let mut text = format!("checkpoint            {} ({step} steps)\n", weights.display());
    text += &format!("evaluated on          {} {rows} rows\n", evaluation.rows);
    for (name, value) in &evaluation.losses {
        text += &format!("{name:<22}{value:.4}\n");
    }
    let Latents { rows, dead, count, groups } = latents;
    text += &format!("latents               {count}, {dead} of them dead on {rows} rows\n");
    if let Some(groups) = groups {
        let sizes: Vec<String> =
            groups.iter().filter(|(_, size)| *size > 0).map(|(name, size)| format!("{size} {name}")).collect();
        text += &format!("groups                {}\n", sizes.join(", "));
    }
    text
}

/// The line on stderr that follows the run, if stderr is a terminal.
struct Progress {
    terminal: bool,
    batch_size: usize,
    total: u64,
    begin: (Instant, u64),
    shown: Option<Instant>,
}

impl Progress {
    fn new(batch_size: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Progress { terminal, batch_size, total: 0, begin: (Instant::now(), 0), shown: None }
    }

    fn show(&mut self, event: Event<'_>) {
        const EVERY: Duration = Duration::from_millis(100);
        match event {
            Event::Begin { step, total_steps, .. } => {
                (self.begin, self.total) = ((Instant::now(), step), total_steps);
            }
            Event::Step { step, row } if self.terminal && self.shown.is_none_or(|at| at.elapsed() >= EVERY) => {
                self.shown = Some(Instant::now());
                let steps = (step - self.begin.1) as f64;
                let per_second = steps / self.begin.0.elapsed().as_secs_f64().max(1e-9);
                let left = super::progress::duration((self.total - step) as f64 / per_second);
                let line = format!(
                    "\r\x1b[Kstep {step}/{}  loss {:.4}  L0 {:.1}  explained variance {:.3}  {:.0} rows/s  {left} left",
                    self.total,
                    row.loss,
                    row.l0_loss,
                    row.explained_variance,
                    per_second * self.batch_size as f64,
                );
                let _ = std::io::stderr().write_all(line.as_bytes());
            }
            _ => {}
        }
    }

    fn clear(&self) {
        if self.terminal {
            let _ = std::io::stderr().write_all(b"\r\x1b[K");
        }
    }
}
