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

use crosscoder::atomic;
use crosscoder::error::{Error, ErrorKind, Result};
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
            Some("convert") => tidied(convert::run, &mut parser),
            Some("download") => download::run(&mut parser),
            Some("encode") => tidied(encode::run, &mut parser),
            Some("eval") => eval::run(&mut parser),
            Some("golden") => golden::run(&mut parser),
            Some("info") => info::run(&mut parser),
            Some("report") => tidied(report::run, &mut parser),
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

/// Runs a verb that writes files. SIGINT and SIGTERM end it as they otherwise would, but for what it was writing, which is removed.
fn tidied(verb: fn(&mut lexopt::Parser) -> Result<ExitCode>, parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let stop = stop_on_signals()?;
    // Where no thread can be started, nothing can be written either.
    let _ = std::thread::Builder::new().spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
        atomic::exit(130)
    });
    verb(parser)
}

/// SIGINT and SIGTERM set the flag; another one while it is set ends the program at once.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The order matters: the first signal must not see the flag that it sets.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(|e| Error::io("cannot listen to signals", e))?;
    }
    Ok(stop)
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
