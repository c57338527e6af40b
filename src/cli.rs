//! The command line: one module a verb. The only code that prints, and the one place that picks a backend.
//!
//! Results go to stdout, progress and errors to stderr. Exit status 0, 1 on failure, 2 on wrong usage.

mod args;
mod bench;
mod convert;
mod device;
mod download;
mod encode;
mod eval;
mod golden;
mod info;
mod progress;
mod report;
mod train;

use crosscoder::error::{Error, ErrorKind, Result};
use std::io::Write;
use std::process::ExitCode;

const HELP: &str = "\
crosscoder VERB …

  train    [ACTS…]                  activations in, checkpoints out
  eval     CHECKPOINT ACTS…         the losses of the original, by name
  encode   CHECKPOINT ACTS… --out F latents, sparse
  report   CHECKPOINT [ACTS…]       the model diff as one HTML page
  golden   CASE…                    compare with the Python original
  info     FILE…                    what is in a .pt, .safetensors or .npy file
  convert  IN OUT                   between .pt and .safetensors, and between dtypes
  bench                             measured speeds, each result checked
  download [REPO [PATH…]]           from the Hugging Face hub, into its cache

`crosscoder VERB --help` tells more. Results go to stdout, progress to stderr. Exit status: 0, 1 on failure, 2 on wrong usage.
";

fn run() -> Result<ExitCode> {
    let mut parser = lexopt::Parser::from_env();
    match parser.next().map_err(args::usage)? {
        Some(lexopt::Arg::Value(verb)) => match verb.to_str() {
            Some("bench") => bench::run(&mut parser),
            Some("convert") => convert::run(&mut parser),
            Some("download") => download::run(&mut parser),
            Some("encode") => encode::run(&mut parser),
            Some("eval") => eval::run(&mut parser),
            Some("golden") => golden::run(&mut parser),
            Some("info") => info::run(&mut parser),
            Some("report") => report::run(&mut parser),
            Some("train") => train::run(&mut parser),
            Some("help") => args::help(HELP),
            _ => Err(Error::usage(format!("no verb '{}'; `crosscoder help` lists them", verb.display()))),
        },
        Some(lexopt::Arg::Long("help") | lexopt::Arg::Short('h')) => args::help(HELP),
        Some(lexopt::Arg::Long("version") | lexopt::Arg::Short('V')) => {
            args::help(concat!("crosscoder ", env!("CARGO_PKG_VERSION"), "\n"))
        }
        Some(other) => Err(args::usage(other.unexpected())),
        None => {
            let _ = write!(std::io::stderr(), "crosscoder: a verb is missing\n\n{HELP}");
            Ok(ExitCode::from(2))
        }
    }
}

/// Runs the program; the exit status.
pub(crate) fn main() -> ExitCode {
    match run() {
        Ok(status) => status,
        // Whoever read our output has had enough: `crosscoder info … | head`.
        Err(error) if args::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // In one piece: stderr has no buffer.
            let _ = std::io::stderr().write_all(format!("crosscoder: {error}\n").as_bytes());
            ExitCode::from(if error.kind() == ErrorKind::Usage { 2 } else { 1 })
        }
    }
}
