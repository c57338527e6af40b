//! `crosscoder golden`: compare with what the Python original computed.

use super::args;
use super::device::{self, with_backend};
use crosscoder::backend::Cpu;
use crosscoder::error::{Error, Result};
use crosscoder::golden::{Case, Outcome, Row};
use crosscoder::sparse;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HELP: &str = "\
crosscoder golden CASE… [--json] [--device D] [--path auto|dense|sparse]

Compares what this program computes with golden cases: directories that hold a checkpoint of the Python original
(0.pt, 0_cfg.json) and what the original computed from it (golden.pt). fixtures/make_golden.py makes one. A directory
of cases stands for all of them.

For each key: the error of the original and ours against the exact value (the larger of largest and RMS, relative to its
tolerance), the tolerance, the share of it that is used. `judge` is the dtype of the case, `f64` for the same formulas
without rounding (tolerance 1e-12 of the largest value), `bits` for keys compared bit for bit.

  --json       one object per key and line: case, key, judge, e_torch, e_ours, tolerance, share, pass, …
  --device D   cpu, cuda or cuda:N: the GPU, if there is one [cpu]; `f64` is always computed on the CPU
  --path PATH  how latents are held: by the faster way [auto], always dense, always sparse

Exit status 1 if any key misses. A case of many training steps can be unstable: there PyTorch with its rows permuted
misses train.* as well (the documentation of crosscoder::golden says why); take fewer steps, or another --seed.
";

pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let (mut dirs, mut json, mut path) = (Vec::<PathBuf>::new(), false, sparse::Path::Auto);
    let mut device = device::DEFAULT.to_owned();
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("json") => json = true,
            Long("device") => device = args::text(parser)?,
            Long("path") => path = args::path(parser)?,
            Long("help") | Short('h') => return args::help(HELP),
            Value(dir) => dirs.push(dir.into()),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    let dirs = expand(dirs)?;
    if !json {
        args::print(&format!(
            "{:<14} {:<28} {:<5} {:>9} {:>9} {:>9} {:>7}\n",
            "case", "key", "judge", "e_torch", "e_ours", "tolerance", "share"
        ))?;
    }
    let mut all = Vec::new();
    for dir in &dirs {
        let case = Case::load(dir)?;
        let dtype = case.cfg.enc_dtype()?;
        let mut rows = with_backend!(device::pick(&device, dtype)?, |backend| case.compare(backend.with_path(path)))?;
        rows.extend(case.compare(Cpu::<f64>::new(dtype).with_path(path))?);
        args::print(&rows.iter().map(if json { json_line } else { table_line }).collect::<String>())?;
        all.extend(rows);
    }
    if !json {
        args::print(&summary(&all, dirs.len()))?;
    }
    match all.iter().filter(|row| row.pass() == Some(false)).count() {
        0 => Ok(ExitCode::SUCCESS),
        missed => Err(Error::format(format!("{missed} of {} comparisons miss their tolerance", all.len()))),
    }
}

/// A directory of cases stands for all of them. Plain files are passed over with a word, so that `golden/*` works where a
/// README lies beside the cases.
fn expand(args: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let is_case = |dir: &Path| dir.join("golden.pt").is_file();
    let mut dirs = Vec::new();
    for arg in args {
        if arg.is_file() {
            let _ = writeln!(std::io::stderr(), "{}: passed over, a case is a directory", arg.display());
            continue;
        }
        let cannot = |e| Error::io("cannot list the folder", e).in_file(&arg);
        let mut cases = Vec::new();
        if !is_case(&arg) {
            for entry in std::fs::read_dir(&arg).map_err(cannot)? {
                cases.push(entry.map_err(cannot)?.path());
            }
            cases.retain(|dir| is_case(dir));
            cases.sort();
            if cases.is_empty() {
                return Err(Error::usage("no case here: needs golden.pt, 0.pt and 0_cfg.json").in_file(&arg));
            }
            dirs.extend(cases);
        } else {
            dirs.push(arg);
        }
    }
    if dirs.is_empty() {
        return Err(Error::usage("golden needs at least one CASE, a directory with 0.pt, 0_cfg.json and golden.pt"));
    }
    Ok(dirs)
}

/// For each judge: how many keys, how many missed, and the largest share of a tolerance that is used.
fn summary(rows: &[Row], cases: usize) -> String {
    let mut judges: Vec<&str> = rows.iter().map(|row| row.judge.as_str()).collect();
    judges.sort_unstable();
    judges.dedup();
    let mut out =
        format!("\n{:<5} {:>7} {:>7} {:>12} {:>7}  at\n", "judge", "passed", "missed", "not covered", "share");
    for judge in judges {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.judge == judge).collect();
        let count = |pass: Option<bool>| rows.iter().filter(|row| row.pass() == pass).count();
        let worst = rows.iter().max_by(|a, b| share(a).total_cmp(&share(b)));
        let at = worst.map_or(String::new(), |row| format!("{} {}", row.case, row.key));
        let (passed, missed, not_covered) = (count(Some(true)), count(Some(false)), count(None));
        let share = worst.map_or(0.0, |row| share(row));
        out += &format!("{judge:<5} {passed:>7} {missed:>7} {not_covered:>12} {share:>7.3}  {at}\n");
    }
    out + &format!("{cases} cases\n")
}

fn share(row: &Row) -> f64 {
    match &row.outcome {
        Outcome::Compared { max, rms, .. } => max.share().max(rms.share()),
        Outcome::NotCovered => 0.0,
    }
}

fn table_line(row: &Row) -> String {
    let head = format!("{:<14} {:<28} {:<5}", row.case, row.key, row.judge);
    match &row.outcome {
        Outcome::NotCovered => format!("{head} not covered\n"),
        Outcome::Compared { fault: Some(fault), .. } => format!("{head} MISS: {fault}\n"),
        Outcome::Compared { max, rms, fault: None } => {
            let worse = if rms.share() > max.share() { rms } else { max };
            let verdict = if row.pass() == Some(true) { "" } else { "  MISS" };
            format!(
                "{head} {:>9.2e} {:>9.2e} {:>9.2e} {:>7.3}{verdict}\n",
                worse.e_torch,
                worse.e_ours,
                worse.tolerance,
                worse.share()
            )
        }
    }
}

fn json_line(row: &Row) -> String {
    let mut object = serde_json::json!({"case": row.case, "key": row.key, "judge": row.judge});
    match &row.outcome {
        Outcome::NotCovered => object["pass"] = serde_json::Value::Null,
        Outcome::Compared { max, rms, fault } => {
            object["e_torch"] = max.e_torch.into();
            object["e_ours"] = max.e_ours.into();
            object["tolerance"] = max.tolerance.into();
            object["share"] = max.share().max(rms.share()).into();
            object["pass"] = (row.pass() == Some(true)).into();
            object["e_torch_rms"] = rms.e_torch.into();
            object["e_ours_rms"] = rms.e_ours.into();
            object["tolerance_rms"] = rms.tolerance.into();
            if let Some(fault) = fault {
                object["fault"] = fault.as_str().into();
            }
        }
    }
    format!("{object}\n")
}
