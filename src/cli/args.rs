//! What the verbs share: reading arguments, printing results.

use super::download;
use crosscoder::atomic::folder_of;
use crosscoder::checkpoint::{self, Files, is_safetensors};
use crosscoder::error::{Error, Result};
use crosscoder::sparse;
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// lexopt's error as ours.
pub(crate) fn usage(error: lexopt::Error) -> Error {
    Error::usage(error.to_string())
}

/// The value of an option, as text.
pub(crate) fn text(parser: &mut lexopt::Parser) -> Result<String> {
    utf8(parser.value().map_err(usage)?)
}

/// The value of an option, as a path.
pub(crate) fn file(parser: &mut lexopt::Parser) -> Result<PathBuf> {
    parser.value().map(PathBuf::from).map_err(usage)
}

/// An argument that must be text.
pub(crate) fn utf8(value: OsString) -> Result<String> {
    value.into_string().map_err(|value| Error::usage(format!("'{}' is not UTF-8", value.display())))
}

/// The value of an option that is a number.
pub(crate) fn number<T: std::str::FromStr>(parser: &mut lexopt::Parser, option: &str) -> Result<T> {
    let text = text(parser)?;
    text.parse().map_err(|_| Error::usage(format!("--{option} needs a number, found '{text}'")))
}

/// The value of an option that is an integer of 0 or more.
pub(crate) fn count(parser: &mut lexopt::Parser, option: &str) -> Result<usize> {
    let text = text(parser)?;
    text.parse().map_err(|_| Error::usage(format!("--{option} needs an integer of 0 or more, found '{text}'")))
}

/// The value of an option that is an integer of 1 or more.
pub(crate) fn positive(parser: &mut lexopt::Parser, option: &str) -> Result<usize> {
    match number(parser, option)? {
        0 => Err(Error::usage(format!("--{option} needs 1 or more, found 0"))),
        n => Ok(n),
    }
}

/// The value of `--path`.
pub(crate) fn path(parser: &mut lexopt::Parser) -> Result<sparse::Path> {
    match text(parser)?.as_str() {
        "auto" => Ok(sparse::Path::Auto),
        "dense" => Ok(sparse::Path::Dense),
        "sparse" => Ok(sparse::Path::Sparse),
        other => Err(Error::usage(format!("--path needs auto, dense or sparse, found '{other}'"))),
    }
}

/// The files of CHECKPOINT: those on this machine, or those of `hf://OWNER/REPO[@REVISION][/PATH]`, downloaded.
pub(crate) fn checkpoint(text: &Path) -> Result<Files> {
    match text.to_str().filter(|text| text.starts_with("hf://")) {
        Some(address) => download::checkpoint(address),
        None => checkpoint::find(text),
    }
}

/// CHECKPOINT and ACTS… of a verb.
pub(crate) fn checkpoint_and_acts<'a>(verb: &str, paths: &'a [PathBuf]) -> Result<(&'a PathBuf, &'a [PathBuf])> {
    match paths.split_first() {
        Some((checkpoint, acts)) if !acts.is_empty() => Ok((checkpoint, acts)),
        _ => Err(Error::usage(format!("{verb} needs CHECKPOINT and ACTS…"))),
    }
}

/// Prints results.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("cannot print", e))
}

/// Prints help, with success.
pub(crate) fn help(text: &str) -> Result<ExitCode> {
    print(text).map(|()| ExitCode::SUCCESS)
}

/// Whether `path` may be written. Nothing is overwritten unasked, and nothing but files and links to files at all.
pub(crate) fn may_write(path: &Path, force: bool) -> Result<()> {
    let folder = folder_of(path);
    if !folder.is_dir() {
        return Err(Error::usage(format!("cannot be written: there is no folder {}", folder.display())).in_file(path));
    }
    // Of a link itself, for one that leads nowhere is there too.
    let what = match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(_) if path.is_file() && force => return Ok(()),
        Ok(_) if path.is_file() => "is there already; --force replaces it",
        Ok(there) if there.is_symlink() => "is a link to what is no file or not there; it is not replaced",
        Ok(_) => "is there and no file; it is not replaced",
    };
    Err(Error::usage(what).in_file(path))
}

/// [`may_write`] of each, of which no two may be the same file.
pub(crate) fn may_write_all<'a>(paths: impl IntoIterator<Item = &'a Path>, force: bool) -> Result<()> {
    let mut places = HashMap::new();
    for path in paths {
        may_write(path, force)?;
        if let Some(other) = places.insert(place(path), path) {
            return Err(Error::usage(format!("is the same file as {}", other.display())).in_file(path));
        }
    }
    Ok(())
}

/// Where a file lies or will: `a`, `./a` and a link to it are one.
pub(crate) fn place(path: &Path) -> PathBuf {
    let there = || folder_of(path).canonicalize().map(|folder| folder.join(path.file_name().unwrap_or_default()));
    path.canonicalize().or_else(|_| there()).unwrap_or_else(|_| path.to_owned())
}

/// That no output is an input.
pub(crate) fn keep<'a>(inputs: &[PathBuf], outputs: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    let kept: HashSet<PathBuf> = inputs.iter().map(|path| place(path)).collect();
    match outputs.into_iter().find(|path| kept.contains(&place(path))) {
        Some(path) => Err(Error::usage("is read here; it is not replaced").in_file(path)),
        None => Ok(()),
    }
}

/// Whether `path` is named for one of the two formats of tensors that are written.
pub(crate) fn named_for_tensors(what: &str, path: &Path) -> Result<()> {
    if is_safetensors(path) || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("pt")) {
        return Ok(());
    }
    Err(Error::usage(format!("{what} must be named .pt or .safetensors, found '{}'", path.display())))
}

/// Whether printing failed because nobody reads any more.
pub(crate) fn is_broken_pipe(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|e| e.downcast_ref::<std::io::Error>());
    source.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
