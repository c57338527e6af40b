//! The command line: verbs, and the only code that prints.

use crate::info::{Style, info};
use lexopt::prelude::*;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs the program with the process's arguments.
pub fn run() -> ExitCode {
    match verb() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("crosscoder: {e}");
            ExitCode::from(2)
        }
    }
}

fn verb() -> Result<ExitCode, lexopt::Error> {
    let mut arguments = lexopt::Parser::from_env();
    match arguments.next()? {
        Some(Value(verb)) if verb == "info" => info_verb(arguments),
        Some(argument) => Err(argument.unexpected()),
        None => Err("which verb? There is `info FILE… [--json] [--list]`".into()),
    }
}

/// `info FILE… [--json] [--list]`
fn info_verb(mut arguments: lexopt::Parser) -> Result<ExitCode, lexopt::Error> {
    let (mut files, mut style, mut checksums) = (Vec::new(), Style::Text, true);
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("json") => style = Style::Json,
            Long("list") => checksums = false,
            Value(file) => files.push(PathBuf::from(file)),
            other => return Err(other.unexpected()),
        }
    }
    if files.is_empty() {
        return Err("info of which file?".into());
    }
    let mut code = ExitCode::SUCCESS;
    for file in files {
        let printed = info(&file, style, checksums).and_then(|text| {
            let written = std::io::stdout().lock().write_all(text.as_bytes());
            written.map_err(|e| crate::Error::io("cannot write to standard output", e))
        });
        if let Err(e) = printed {
            eprintln!("crosscoder: {e}");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}
