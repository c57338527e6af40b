//! `crosscoder download`: files of the Hugging Face hub into its cache.

use std::io::Write;
use std::process::ExitCode;

use super::args;
use super::progress::{Progress, Unit};
use crosscoder::checkpoint::Files;
use crosscoder::error::Result;
use crosscoder::hub::{Address, CFG_FILE, DEFAULT_PATH, DEFAULT_REPO, DEFAULT_REVISION, Event, Hub, WEIGHTS_FILE};

pub(crate) const HELP: &str = "\
crosscoder download [REPO [PATH...]] [--revision REV]

Downloads into the Hugging Face cache and prints the local path of each file.

  REPO            ORG/NAME of a model repository [ckkissane/crosscoder-gemma-2-2b-model-diff]
  PATH            a file, or a folder that stands for cfg.json and cc_weights.pt in it [blocks.14.hook_resid_pre]
  --revision REV  branch, tag, refs/pr/N or commit id [main]

A PATH whose last name ends in an extension (letters and digits after the last dot, at most 11, not only digits) is a
file; any other, and any with a '/' at its end, is a folder; '.' is the top of the repository. A broken download goes
on where it was when the command is run again. Environment: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HTTPS_PROXY, as for huggingface_hub.
";

/// Reads the arguments after the verb and does it.
pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let mut names = Vec::new();
    let mut revision = DEFAULT_REVISION.to_owned();
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("revision") => revision = args::text(parser)?,
            Long("help") | Short('h') => {
                return args::help(HELP);
            }
            Value(value) => names.push(args::utf8(value)?),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    let mut names = names.into_iter();
    let repo = names.next().unwrap_or_else(|| DEFAULT_REPO.to_owned());
    let mut files: Vec<String> = names.flat_map(|path| expand(&path)).collect();
    if files.is_empty() {
        files = expand(DEFAULT_PATH);
    }
    let files: Vec<&str> = files.iter().map(String::as_str).collect();

    let mut shown = Shown { file: String::new(), line: None };
    let paths = Hub::from_env()?.download_all(&repo, &files, &revision, &mut |event| shown.show(event));
    drop(shown);
    for path in paths? {
        args::print(&format!("{}\n", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The checkpoint at an `hf://` address, downloaded.
pub(crate) fn checkpoint(address: &str) -> Result<Files> {
    let address = Address::parse(address)?;
    let mut shown = Shown { file: String::new(), line: None };
    Hub::from_env()?.checkpoint(&address, &mut |event| shown.show(event))
}

/// The files that a PATH stands for.
fn expand(path: &str) -> Vec<String> {
    let name = path.rsplit('/').next().unwrap_or_default();
    let is_extension = |end: &str| {
        (1..=11).contains(&end.len())
            && end.bytes().all(|b| b.is_ascii_alphanumeric())
            && !end.bytes().all(|b| b.is_ascii_digit())
    };
    if name.rsplit_once('.').is_some_and(|(_, end)| is_extension(end)) {
        return vec![path.to_owned()];
    }
    let folder = match path.strip_suffix('/').unwrap_or(path) {
        "." => String::new(),
        folder => format!("{folder}/"),
    };
    [CFG_FILE, WEIGHTS_FILE].map(|file| format!("{folder}{file}")).to_vec()
}

/// The progress line of the file at hand.
struct Shown {
    file: String,
    line: Option<Progress>,
}

impl Shown {
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
            assert_eq!(expand(file), [file]);
        }
        for (path, folder) in [
            ("blocks.14.hook_resid_pre", "blocks.14.hook_resid_pre/"),
            ("blocks.14", "blocks.14/"),
            ("x.pt/", "x.pt/"),
            (".", ""),
            ("./", ""),
            ("/etc/passwd", "/etc/passwd/"),
        ] {
            assert_eq!(expand(path), [format!("{folder}cfg.json"), format!("{folder}cc_weights.pt")], "{path}");
        }
    }
}
