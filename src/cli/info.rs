//! `crosscoder info`: what is in a file of tensors.

use super::args;
use crosscoder::error::{Error, Result};
use crosscoder::info::{Style, info};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
crosscoder info FILE… [--json] [--list]

Lists the tensors of .pt, .safetensors and .npy files with path, dtype, shape, strides as stored and the CRC-32 of their
little-endian row-major bytes, and the plain values beside them. Nothing in a file is executed. A FILE may be one of the
Hugging Face hub, hf://OWNER/REPO[@REVISION]/PATH, which is downloaded into its cache.

  --json  one JSON object per file: file, format, tensors, values
  --list  reads no tensor, so there are no checksums: milliseconds for a file of any size

Exit status 1 if any file is refused.
";

pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let (mut files, mut style, mut checksums) = (Vec::<PathBuf>::new(), Style::Text, true);
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("json") => style = Style::Json,
            Long("list") => checksums = false,
            Long("help") | Short('h') => return args::help(HELP),
            Value(file) => files.push(file.into()),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    if files.is_empty() {
        return Err(Error::usage("info needs at least one FILE"));
    }
    let mut status = ExitCode::SUCCESS;
    for file in files {
        let local = match file.to_str().filter(|text| text.starts_with("hf://")) {
            Some(address) => super::download::file(address),
            None => Ok(file),
        };
        let mut out = BufWriter::new(std::io::stdout().lock());
        let told = local.and_then(|file| info(&file, style, checksums, &mut out));
        match told.and_then(|()| out.flush().map_err(|e| Error::io("cannot print", e))) {
            Ok(()) => {}
            Err(error) if args::is_broken_pipe(&error) => return Err(error),
            Err(error) => {
                let _ = std::io::stderr().write_all(format!("crosscoder: {error}\n").as_bytes());
                status = ExitCode::FAILURE;
            }
        }
    }
    Ok(status)
}
