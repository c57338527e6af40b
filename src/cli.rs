//! The command line: one module a verb.

mod download;
mod progress;

use std::io::Write;

use crosscoder::error::{Error, ErrorKind, Result};

fn run() -> Result<()> {
    let mut parser = lexopt::Parser::from_env();
    match parser.next().map_err(|e| Error::usage(e.to_string()))? {
        Some(lexopt::Arg::Value(verb)) if verb == "download" => download::run(&mut parser),
        _ => Err(Error::usage(download::HELP)),
    }
}

/// Runs the program; the exit status.
pub(crate) fn main() -> std::process::ExitCode {
    let Err(error) = run() else { return std::process::ExitCode::SUCCESS };
    let _ = writeln!(std::io::stderr(), "crosscoder: {error}");
    std::process::ExitCode::from(if error.kind() == ErrorKind::Usage { 2 } else { 1 })
}
