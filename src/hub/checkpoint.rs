//! Checkpoints on the hub: which files of a repository they are. Original: `load_from_hf`.

use super::cache::Repository;
use super::names::Target;
use super::{DEFAULT_REVISION, Event, Hub};
use crate::checkpoint::{FOLDER_NAMES, Files, cfg_names};
use crate::crosscoder::CrossCoder;
use crate::error::{Error, ErrorKind, Result};
use std::path::PathBuf;

/// A place in a repository: `hf://OWNER/REPO[@REVISION][/PATH]`. A slash in the revision is written `%2F`, save in `refs/pr/N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `OWNER/REPO`
    pub repo: String,
    /// A branch, tag, `refs/pr/N` or commit id.
    pub revision: String,
    /// A weights file, or the folder of a checkpoint; empty for the top of the repository.
    pub path: String,
}

impl Address {
    /// This path of the repository's main branch; with a '/' at its end it is a folder, whatever its name.
    pub fn new(repo: &str, path: &str) -> Self {
        let is_folder = path.ends_with('/');
        let path = path.trim_end_matches('/');
        let mut path = if path == "." { String::new() } else { path.to_owned() };
        if is_folder && is_weights(&path) {
            path.push('/');
        }
        Address { repo: repo.to_owned(), revision: DEFAULT_REVISION.to_owned(), path }
    }

    /// Reads an address. Its parts are checked when they are used.
    ///
    /// # Errors
    /// Text of another form.
    pub fn parse(text: &str) -> Result<Self> {
        let needs = || Error::usage(format!("needs hf://OWNER/REPO[@REVISION][/PATH], found '{text}'"));
        let rest = text.strip_prefix("hf://").ok_or_else(needs)?;
        let (owner, rest) = rest.split_once('/').ok_or_else(needs)?;
        let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (name, revision, path) = match name.split_once('@') {
            None => (name, DEFAULT_REVISION.to_owned(), path),
            Some((name, "refs")) => {
                let mut parts = path.splitn(3, '/');
                match (parts.next(), parts.next()) {
                    (Some("pr"), Some(n)) => (name, format!("refs/pr/{n}"), parts.next().unwrap_or_default()),
                    _ => return Err(needs()),
                }
            }
            Some((name, revision)) => (name, revision.replace("%2F", "/").replace("%2f", "/"), path),
        };
        if owner.is_empty() || name.is_empty() || revision.is_empty() {
            return Err(needs());
        }
        Ok(Address { revision, ..Address::new(&format!("{owner}/{name}"), path) })
    }
}

/// Whether the name is that of a weights file.
fn is_weights(path: &str) -> bool {
    [".pt", ".pth", ".safetensors"].iter().any(|end| path.ends_with(end))
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "hf://{}@{}/{}", self.repo, self.revision, self.path)
    }
}

impl Hub {
    /// Makes the checkpoint at an address available and returns where its files lie in the cache. A folder is looked through for
    /// the pairs of [`FOLDER_NAMES`], a weights file has its cfg beside it as [`crate::checkpoint::find`] says. If the hub cannot
    /// be reached, or does not let us in, the first pair that is in the cache is returned.
    ///
    /// # Errors
    /// As [`Hub::download`]; if there is no checkpoint, [`ErrorKind::Absent`] with all names that were looked for.
    pub fn checkpoint(&self, address: &Address, progress: &mut dyn FnMut(Event<'_>)) -> Result<Files> {
        let is_weights = is_weights(&address.path);
        let (folder, name) = match address.path.rsplit_once('/') {
            _ if !is_weights => (address.path.trim_end_matches('/'), ""),
            Some((folder, name)) => (folder, name),
            None => ("", address.path.as_str()),
        };
        let pairs: Vec<[String; 2]> = if is_weights {
            let cfgs = cfg_names(name.as_ref());
            cfgs.map(|cfg| [name.to_owned(), cfg.to_string_lossy().into_owned()]).to_vec()
        } else {
            FOLDER_NAMES.map(|pair| pair.map(str::to_owned)).to_vec()
        };
        let full = |name: &String| if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        for [weights, cfg] in &pairs {
            // The small file first: without it the large one is of no use.
            let names = [full(cfg), full(weights)];
            match self.gather(&address.repo, &names.each_ref().map(String::as_str), &address.revision, progress) {
                Ok(paths) => {
                    let [cfg, weights] = <[_; 2]>::try_from(paths).unwrap_or_default();
                    return Ok(Files { weights, cfg });
                }
                // Offline, a file that is not in the cache is a matter of the network; a wrong name is not.
                Err(failure)
                    if failure.error.kind() == ErrorKind::Absent
                        || self.offline && failure.error.kind() == ErrorKind::Network => {}
                Err(failure) => {
                    for [weights, cfg] in pairs.iter().filter(|_| failure.class.is_no_answer()) {
                        let [weights, cfg] = [weights, cfg].map(full);
                        if let (Some(w), Some(c)) = (self.cached(address, &weights)?, self.cached(address, &cfg)?) {
                            progress(Event::Cached { file: &weights, reason: &failure.error });
                            return Ok(Files { weights: w, cfg: c });
                        }
                    }
                    return Err(failure.error);
                }
            }
        }
        let names: Vec<String> = pairs.iter().map(|[weights, cfg]| format!("{weights} with {cfg}")).collect();
        let place = if self.offline { "in the cache (HF_HUB_OFFLINE is set)" } else { "here" };
        let what = format!("no checkpoint {place}: looked for {}", names.join(", "));
        Err(Error::new(ErrorKind::Absent, what).at(address))
    }

    fn cached(&self, address: &Address, file: &str) -> Result<Option<PathBuf>> {
        let target = Target::new(&address.repo, file, &address.revision)?;
        Ok(Repository::new(&self.cache, &target).lookup(&target).map(|(_, path)| path))
    }
}

impl CrossCoder {
    /// Downloads a checkpoint into the Hugging Face cache, unless it is there, and loads it: `path` is a folder of the
    /// repository, or a weights file. What a folder may hold is told at [`Hub::checkpoint`], which layouts in [`crate::layouts`].
    /// The original's defaults are [`DEFAULT_REPO`](super::DEFAULT_REPO) and [`DEFAULT_PATH`](super::DEFAULT_PATH).
    ///
    /// ```no_run
    /// use crosscoder::{CrossCoder, hub};
    ///
    /// let crosscoder = CrossCoder::load_from_hf(hub::DEFAULT_REPO, hub::DEFAULT_PATH)?;
    /// # Ok::<(), crosscoder::Error>(())
    /// ```
    ///
    /// Original: `load_from_hf`. For progress, another revision, cache or backend: [`Hub::checkpoint`], then
    /// [`CrossCoder::load_with`].
    ///
    /// # Errors
    /// As [`Hub::checkpoint`] and [`CrossCoder::load`].
    pub fn load_from_hf(repo: &str, path: &str) -> Result<Self> {
        let files = Hub::from_env()?.checkpoint(&Address::new(repo, path), &mut |_| {})?;
        Self::load_with(&files, crate::backend::Cpu::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, repo, revision, path) in [
            ("hf://o/r", "o/r", "main", ""),
            ("hf://o/r/", "o/r", "main", ""),
            ("hf://o/r/blocks.14.hook_resid_pre", "o/r", "main", "blocks.14.hook_resid_pre"),
            ("hf://o/r/a/b/1.pt", "o/r", "main", "a/b/1.pt"),
            ("hf://o/r@v1/a/", "o/r", "v1", "a"),
            ("hf://o/r/a.pt/", "o/r", "main", "a.pt/"),
            ("hf://o/r@refs/pr/3/a/b", "o/r", "refs/pr/3", "a/b"),
            ("hf://o/r@refs%2Fpr%2F3/a", "o/r", "refs/pr/3", "a"),
        ] {
            let (repo, revision, path) = (repo.to_owned(), revision.to_owned(), path.to_owned());
            assert_eq!(Address::parse(text).unwrap(), Address { repo, revision, path }, "{text}");
        }
        for bad in ["o/r", "hf://", "hf://o", "hf:///r", "hf://o/", "hf://o/@v1", "hf://o/r@", "hf://o/r@refs/x/1"] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Address::new("o/r", "."), Address::parse("hf://o/r").unwrap());
    }
}
