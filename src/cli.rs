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
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
    let came = Arc::new(AtomicUsize::new(0));
    let watched = Arc::clone(&came);
    let watch = move || loop {
        match watched.load(Ordering::Relaxed) as i32 {
            0 => std::thread::sleep(Duration::from_millis(10)),
            signal => {
                let _held = atomic::abandon();
                let _ = signal_hook::low_level::emulate_default_handler(signal);
                std::process::exit(128 + signal);
            }
        }
    };
    // Where no thread can be started, nothing can be written either.
    if std::thread::Builder::new().spawn(watch).is_ok() {
        for signal in signals() {
            signal_hook::flag::register_usize(signal, Arc::clone(&came), signal as usize).map_err(deaf)?;
        }
    }
    verb(parser)
}

/// SIGINT and SIGTERM, but what this process is to ignore: a shell starts `crosscoder … &` in a script so. Only Linux tells.
fn signals() -> impl Iterator<Item = i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    let ignored = ignored.unwrap_or(0);
    [SIGINT, SIGTERM].into_iter().filter(move |signal| ignored >> (signal - 1) & 1 == 0)
}

fn deaf(e: std::io::Error) -> Error {
    Error::io("cannot listen to signals", e)
}

/// SIGINT and SIGTERM set the flag, also where they were to be ignored; another one while it is set ends the program at once.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The order matters: the first signal must not see the flag that it sets.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(deaf)?;
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
