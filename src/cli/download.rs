//! `crosscoder download`: files of the Hugging Face hub into its cache.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use super::args;
use super::progress::{Progress, Unit};
use crosscoder::checkpoint::Files;
use crosscoder::error::{Error, Result};
use crosscoder::hub::{Address, DEFAULT_PATH, DEFAULT_REPO, DEFAULT_REVISION, Event, Hub};

pub(crate) const HELP: &str = "\
crosscoder download [REPO [PATH...]] [--revision REV]
crosscoder download hf://OWNER/REPO[@REVISION][/PATH]...

Downloads into the Hugging Face cache and prints the local path of each file.

  REPO            ORG/NAME of a model repository [ckkissane/crosscoder-gemma-2-2b-model-diff]
  PATH            a file, or a folder that stands for the checkpoint in it, first the cfg, then the weights
                  [blocks.14.hook_resid_pre]
  --revision REV  branch, tag, refs/pr/N or commit id [main]

A PATH whose last name ends in an extension (letters and digits after the last dot, at most 11, not only digits) is a
file; any other, and any with a '/' at its end, is a folder; '.' is the top of the repository. A checkpoint is cfg.json
with cc_weights.pt, or config.json with model.safetensors, or another pair that `crosscoder convert` reads. A broken
download goes on where it was when the command is run again. Environment: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, as for huggingface_hub; a proxy speaks HTTP, not SOCKS.
";

/// Reads the arguments after the verb and does it.
pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let mut names = Vec::new();
    let mut revision = None;
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("revision") => revision = Some(args::text(parser)?),
            Long("help") | Short('h') => {
                return args::help(HELP);
            }
            Value(value) => names.push(args::utf8(value)?),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    let addresses = addresses(&names, revision)?;
    let hub = Hub::from_env()?;
    let mut shown = Shown::new();
    let mut progress = |event: Event<'_>| shown.show(event);
    let mut paths = Vec::new();
    // Files of one revision are of one commit; a checkpoint is by itself.
    let is_file = |address: &Address| is_file(&address.path);
    for together in
        addresses.chunk_by(|a, b| is_file(a) && is_file(b) && (&a.repo, &a.revision) == (&b.repo, &b.revision))
    {
        let Some(first) = together.first() else { continue };
        if is_file(first) {
            let files: Vec<&str> = together.iter().map(|address| address.path.as_str()).collect();
            paths.extend(hub.download_all(&first.repo, &files, &first.revision, &mut progress)?);
        } else {
            let Files { weights, cfg } = hub.checkpoint(first, &mut progress)?;
            paths.extend([cfg, weights]);
        }
    }
    drop(shown);
    for path in paths {
        args::print(&format!("{}\n", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What the arguments ask for: either addresses, or a repository and paths in it.
fn addresses(names: &[String], revision: Option<String>) -> Result<Vec<Address>> {
    let is_address = |name: &&String| name.starts_with("hf://");
    if names.iter().any(|name| is_address(&name)) {
        if let Some(other) = names.iter().find(|name| !is_address(name)) {
            return Err(Error::usage(format!("'{other}' stands beside an hf:// address, which holds its own path")));
        }
        if revision.is_some() {
            return Err(Error::usage("--revision stands beside an hf:// address; write hf://OWNER/REPO@REVISION/PATH"));
        }
        return names.iter().map(|name| Address::parse(name)).collect();
    }
    let default = [DEFAULT_REPO.to_owned(), DEFAULT_PATH.to_owned()];
    let [repo, path] = [names.first().unwrap_or(&default[0]), &default[1]];
    let paths = if names.len() > 1 { &names[1..] } else { std::slice::from_ref(path) };
    let revision = revision.unwrap_or_else(|| DEFAULT_REVISION.to_owned());
    let address = |path: &String| Address {
        repo: repo.clone(),
        revision: revision.clone(),
        path: if is_file(path) { path.clone() } else { Address::new(repo, path).path },
    };
    Ok(paths.iter().map(address).collect())
}

/// The checkpoint at an `hf://` address, downloaded.
pub(crate) fn checkpoint(address: &str) -> Result<Files> {
    let address = Address::parse(address)?;
    let mut shown = Shown::new();
    Hub::from_env()?.checkpoint(&address, &mut |event| shown.show(event))
}

/// The file at an `hf://` address, downloaded.
pub(crate) fn file(address: &str) -> Result<PathBuf> {
    let Address { repo, revision, path } = Address::parse(address)?;
    let mut shown = Shown::new();
    Hub::from_env()?.download(&repo, &path, &revision, &mut |event| shown.show(event))
}

/// Whether a PATH names a file, not a folder.
fn is_file(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let is_extension = |end: &str| {
        (1..=11).contains(&end.len())
            && end.bytes().all(|b| b.is_ascii_alphanumeric())
            && !end.bytes().all(|b| b.is_ascii_digit())
    };
    name.rsplit_once('.').is_some_and(|(_, end)| is_extension(end))
}

/// The progress line of the file at hand.
struct Shown {
    file: String,
    line: Option<Progress>,
}

impl Shown {
    fn new() -> Self {
        Shown { file: String::new(), line: None }
    }

    fn line(&mut self, file: &str) -> &mut Progress {
        if self.file != file {
            self.line = None;
            file.clone_into(&mut self.file);
        }
        self.line.get_or_insert_with(|| Progress::new(file, Unit::Bytes))
    }

    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Bytes { file, done, total } => self.line(file).set(done, total),
            Event::Retry { file, wait, reason } => {
                self.line(file).note(&format!("{reason}; trying again in {:.1} s", wait.as_secs_f64()));
            }
            Event::Waiting { file } => self.line(file).note(&format!("{file}: another process downloads it; waiting")),
            Event::Cached { file, reason } => {
                // What follows may not be the newest: said even where no progress is shown.
                let what = format!("warning: {file} is taken from the cache, for the hub cannot be asked: {reason}");
                let _ = writeln!(std::io::stderr(), "{what}");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_file_or_a_folder() {
        for file in ["0.pt", "a.b/config.json", "blocks.14.hook_resid_pre/cc_weights.pt", "x.safetensors", "../x.pt"] {
            assert!(is_file(file), "{file}");
        }
        for folder in ["blocks.14.hook_resid_pre", "blocks.14", "x.pt/", ".", "./", "/etc/passwd", ""] {
            assert!(!is_file(folder), "{folder}");
        }
    }

    #[test]
    fn what_is_asked_for() {
        let of = |names: &[&str], revision: Option<&str>| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            addresses(&names, revision.map(str::to_owned))
        };
        let shown = |names: &[&str], revision| -> Vec<String> {
            of(names, revision).unwrap().iter().map(ToString::to_string).collect()
        };
        assert_eq!(shown(&[], None), [format!("hf://{DEFAULT_REPO}@main/{DEFAULT_PATH}")]);
        assert_eq!(shown(&["o/n"], Some("v1")), [format!("hf://o/n@v1/{DEFAULT_PATH}")]);
        assert_eq!(
            shown(&["o/n", ".", "a/", "b.pt"], None),
            ["hf://o/n@main/", "hf://o/n@main/a", "hf://o/n@main/b.pt"]
        );
        assert_eq!(shown(&["hf://o/n@v1", "hf://p/m/b.pt"], None), ["hf://o/n@v1/", "hf://p/m@main/b.pt"]);
        for (names, revision) in [(&["hf://o/n", "b.pt"][..], None), (&["hf://o/n"], Some("v1")), (&["hf://o"], None)] {
            assert!(of(names, revision).is_err(), "{names:?}");
        }
    }
}
