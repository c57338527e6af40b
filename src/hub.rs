//! Files of the Hugging Face hub, in the cache that all its clients share.
//!
//! A download is two questions. The hub is asked what the file is (commit, size, hash), then whoever it names is asked
//! for the bytes. Nothing is believed: names are checked before they touch a path, the bytes are hashed before the file
//! becomes visible, and the token goes to the hub's own origin only. What breaks off goes on where it was, in the same
//! run or the next. The cache is that of `huggingface_hub`, which finds what we fetch as we find what it fetched.
//!
//! Left out: uploads, listings, data sets and spaces, Xet transfers (the hub serves the same files without), a record
//! of files known to be absent.
//!
//! Original: `CrossCoder.load_from_hf`, which calls `huggingface_hub.hf_hub_download`.

#![forbid(unsafe_code)]
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects
)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

mod cache;
mod checkpoint;
mod http;
mod meter;
mod names;
mod proxy;
mod transfer;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use cache::Repository;
use http::{Class, Client, Described, Failure, Url};
use names::{Commit, Target};
use proxy::Proxies;
use transfer::{Partial, Patience};

pub use checkpoint::Address;

/// The repository of `load_from_hf` unless told otherwise.
pub const DEFAULT_REPO: &str = "ckkissane/crosscoder-gemma-2-2b-model-diff";
/// The folder of `load_from_hf` unless told otherwise.
pub const DEFAULT_PATH: &str = "blocks.14.hook_resid_pre";
/// The branch every repository has.
pub const DEFAULT_REVISION: &str = "main";

/// Times the hub is asked again what a file is, when its bytes do not fit what it said.
const ROUNDS: u32 = 2;

/// What happens during a download.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// So many bytes of the file are on disk, those of earlier runs included. The first one tells where it starts.
    Bytes {
        /// Path in the repository.
        file: &'a str,
        /// Bytes on disk. Falls back to 0 where the server cannot continue a file.
        done: u64,
        /// Bytes of the whole file.
        total: u64,
    },
    /// An attempt failed; the next one follows after the wait.
    Retry {
        /// Path in the repository.
        file: &'a str,
        /// Time to the next attempt.
        wait: Duration,
        /// Why the last one failed.
        reason: &'a Error,
    },
    /// Another process downloads the same file: its end is awaited.
    Waiting {
        /// Path in the repository.
        file: &'a str,
    },
    /// The hub cannot be asked; the file is taken as the cache has it, which may be an older version.
    Cached {
        /// Path in the repository.
        file: &'a str,
        /// Why the hub cannot be asked.
        reason: &'a Error,
    },
}

/// A hub, and the cache on disk that belongs to it.
///
/// ```no_run
/// use crosscoder::hub::{self, Hub};
///
/// let hub = Hub::from_env()?;
/// let path = hub.download(hub::DEFAULT_REPO, "blocks.14.hook_resid_pre/cfg.json", "main", &mut |_| {})?;
/// println!("{}", std::fs::read_to_string(path).unwrap());
/// # Ok::<(), crosscoder::Error>(())
/// ```
pub struct Hub {
    endpoint: Url,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    proxies: Proxies,
    timeout: Duration,
    backoff: Duration,
}

impl Hub {
    /// `https://huggingface.co` with this cache folder, without a token or a proxy; no environment variable is read.
    pub fn new(cache: impl Into<PathBuf>) -> Result<Self> {
        Ok(Hub {
            endpoint: Url::parse("https://huggingface.co")?,
            cache: cache.into(),
            token: None,
            offline: false,
            proxies: Proxies::default(),
            timeout: Duration::from_secs(15),
            backoff: Duration::from_millis(500),
        })
    }

    /// As the environment has it, by the names and defaults of `huggingface_hub`.
    ///
    /// - cache: `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `$HF_HOME/hub`, where `HF_HOME` is by default
    ///   `$XDG_CACHE_HOME/huggingface`, else `~/.cache/huggingface`;
    /// - token: `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN`, else the content of the file `HF_TOKEN_PATH`, by default
    ///   `$HF_HOME/token`; none if `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set;
    /// - `HF_ENDPOINT`; `HF_HUB_OFFLINE`, else `TRANSFORMERS_OFFLINE`; a switch is set by `1`, `true`, `yes`, `on`;
    /// - a proxy by the scheme of each address: `HTTPS_PROXY`, `HTTP_PROXY`, else `ALL_PROXY`, unless `NO_PROXY` names
    ///   its host, domain or network. Proxies are spoken to by `http` or `https`; others are refused when needed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] if an address or the token cannot be one, or there is no home folder.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var_os(name))
    }

    /// [`Hub::from_env`] with the given variables in place of the environment's.
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let set = |name: &str| var(name).filter(|value| !value.is_empty());
        let user = set("HOME").map(PathBuf::from).or_else(std::env::home_dir);
        // "~/x" and "$X/y" come from configuration files, where no shell has replaced them.
        let path = |name: &str| {
            let value = set(name)?;
            let path = value.to_str().map_or_else(|| PathBuf::from(&value), |text| expanded(text, &var).into());
            match (path.strip_prefix("~"), &user) {
                (Ok(rest), Some(user)) => Some(user.join(rest)),
                _ => Some(path),
            }
        };
        let home = path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(user.as_ref()?.join(".cache").join("huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or_else(|| Error::usage("no home folder to keep downloads in; set HF_HUB_CACHE"))?;
        let mut hub = Hub::new(cache)?;
        hub.proxies = Proxies::from_vars(&var);
        if let Some(endpoint) = set("HF_ENDPOINT") {
            hub = hub.endpoint(&endpoint.to_string_lossy()).map_err(|error| error.at("HF_ENDPOINT"))?;
        }
        let is_on = |value: OsString| {
            matches!(value.to_string_lossy().to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
        };
        let names = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];
        if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(is_on) {
            // Public files are asked for without it, and a crosscoder's user names no other way.
        } else if let Some((name, token)) = names.iter().find_map(|name| Some((name, set(name)?))) {
            hub = hub.token(&token.to_string_lossy()).map_err(|error| error.at(name))?;
        } else if let Some(file) = path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")))
            && let Ok(token) = fs::read_to_string(&file)
        {
            hub = hub.token(&token).map_err(|error| error.in_file(&file))?;
        }
        Ok(hub.offline(set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE")).is_some_and(is_on)))
    }

    /// Another hub: `http` or `https`, a host, perhaps a path.
    pub fn endpoint(mut self, address: &str) -> Result<Self> {
        self.endpoint = Url::parse(address.trim_end_matches('/')).map_err(|error| Error::usage(error.to_string()))?;
        Ok(self)
    }

    /// The user's access token; an empty one is none.
    pub fn token(mut self, token: &str) -> Result<Self> {
        let token = token.trim();
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::usage("the access token has characters that no token has"));
        }
        self.token = (!token.is_empty()).then(|| token.to_owned());
        Ok(self)
    }

    /// Whether to do without the network.
    pub fn offline(mut self, offline: bool) -> Self {
        self.offline = offline;
        self
    }

    /// How long a server may be silent: while connecting, before it answers, between two pieces of the file. By default
    /// 15 s. A request with all its redirects has twice this time, as have 30 KiB of the file (1 KiB for each second).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The wait after a first failure, doubled after each further one. By default 0.5 s.
    pub fn backoff(mut self, first: Duration) -> Self {
        self.backoff = first;
        self
    }

    /// The cache folder.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Makes one file of a model repository available and returns its path in the cache.
    ///
    /// `repo` is `ORG/NAME`, `file` a path inside it, `revision` a branch, tag, `refs/pr/N` or commit id. A file that
    /// is in the cache is not transferred again; one of a commit id does not even need a question to the hub.
    ///
    /// Busy servers and broken connections are met with up to six attempts in a row, growing waits (or those of
    /// `Retry-After`, up to 60 s) and some 60 s of patience, both renewed as long as the file comes forward: by its own
    /// bytes, whatever else the server sends. An answer may have half the file's bytes and 1 MiB more than the file.
    /// If the hub cannot be reached, or does not let us in, the cached file is returned if there is one.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] for names that are none; [`ErrorKind::Absent`] if the repository has no such file;
    /// [`ErrorKind::Network`] if there is no such repository or revision, it is gated or private, the hub does not answer or says what cannot be, or the bytes do not hash to what it
    /// says; [`ErrorKind::Io`] for the disk. What was transferred before an error is kept for the next run, unless it is
    /// wrong.
    ///
    /// Original: `hf_hub_download(repo, file, revision=revision)`.
    pub fn download(
        &self,
        repo: &str,
        file: &str,
        revision: &str,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<PathBuf> {
        let mut paths = self.download_all(repo, &[file], revision, progress)?;
        paths.pop().ok_or_else(|| Error::usage("no file to download"))
    }

    /// Makes several files of one revision available; all are of the same commit, even if the branch moves meanwhile.
    ///
    /// The cache notes where the revision stands only when all files are there, so that offline use never finds half.
    /// Errors as [`Hub::download`].
    pub fn download_all(
        &self,
        repo: &str,
        files: &[&str],
        revision: &str,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<PathBuf>> {
        self.gather(repo, files, revision, progress).map_err(|failure| failure.error)
    }

    /// [`Hub::download_all`], whose failures tell what kind they are of.
    fn gather(
        &self,
        repo: &str,
        files: &[&str],
        revision: &str,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<PathBuf>, Failure> {
        // All names first: a wrong one should not cost a transfer.
        let targets: Vec<Target> = files.iter().map(|file| Target::new(repo, file, revision)).collect::<Result<_>>()?;
        let client = Client::new(&self.endpoint, self.token.clone(), self.timeout, self.proxies.clone());
        let mut commit: Option<Commit> = None;
        let mut paths = Vec::new();
        for target in &targets {
            let pinned = commit.as_ref().map_or_else(|| target.clone(), |commit| target.pinned(commit));
            let (at, path) = self
                .fetch(&client, &pinned, progress)
                .map_err(|failure| Failure { error: failure.error.at(target), class: failure.class })?;
            commit.get_or_insert(at);
            paths.push(path);
        }
        if let (Some(target), Some(commit), false) = (targets.first(), &commit, self.offline) {
            Repository::new(&self.cache, target).refer(target, commit)?;
        }
        Ok(paths)
    }

    fn fetch(
        &self,
        client: &Client,
        target: &Target,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<(Commit, PathBuf), Failure> {
        let repository = Repository::new(&self.cache, target);
        let cached = repository.lookup(target);
        if self.offline {
            let what = "not in the cache, and HF_HUB_OFFLINE forbids asking the hub";
            return cached.ok_or_else(|| Error::new(ErrorKind::Network, what).in_file(&self.cache).into());
        }
        // A commit never changes.
        if let (Some(_), Some(cached)) = (target.commit(), &cached) {
            return Ok(cached.clone());
        }
        let mut patience = Patience::new(self.backoff, self.timeout, cached.is_some());
        let mut superseded: Option<Described> = None;
        let mut rounds = 0_u32;
        loop {
            let described = match describe(client, target, &mut patience, report) {
                Ok(described) => described,
                Err(failure) => match cached {
                    Some(cached) if failure.class.is_no_answer() && rounds == 0 => {
                        report(Event::Cached { file: target.file(), reason: &failure.error });
                        return Ok(cached);
                    }
                    _ => return Err(failure),
                },
            };
            patience.reached();
            if let Some(old) = superseded.take_if(|old| old.etag != described.etag) {
                // The beginning of a file that the hub no longer has.
                if let Ok(Some(_lock)) = repository.lock(&old.etag, || {}) {
                    let _ = fs::remove_file(repository.partial(&old.etag, true));
                }
            }
            let start = Instant::now();
            match obtain(client, &repository, target, &described, &mut patience, report) {
                Ok(path) => return Ok((described.commit, path)),
                Err(failure) if failure.class == Class::Stale && rounds < ROUNDS => {
                    rounds = rounds.saturating_add(1);
                    let (wait, error) = patience.wait(failure, start.elapsed().min(self.timeout), 0, 0)?;
                    report(Event::Retry { file: target.file(), wait, reason: &error });
                    std::thread::sleep(wait);
                    superseded = Some(described);
                }
                Err(failure) => return Err(failure),
            }
        }
    }
}

/// `$NAME` and `${NAME}` replaced by the variables of these names, where there are such.
fn expanded(text: &str, var: impl Fn(&str) -> Option<OsString>) -> OsString {
    let mut out = OsString::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push(before);
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, behind) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, behind)) => (name, behind),
            None => after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len())),
        };
        match var(name).filter(|_| !name.is_empty()) {
            Some(value) => {
                out.push(value);
                rest = behind;
            }
            None => {
                out.push("$");
                rest = after;
            }
        }
    }
    out.push(rest);
    out
}

/// [`Client::describe`], until it succeeds or patience ends.
fn describe(
    client: &Client,
    target: &Target,
    patience: &mut Patience,
    report: &mut dyn FnMut(Event<'_>),
) -> Result<Described, Failure> {
    loop {
        let start = Instant::now();
        let failure = match client.describe(target, patience.span()) {
            Ok(described) => return Ok(described),
            Err(failure) => failure,
        };
        let (wait, error) = patience.wait(failure, start.elapsed(), 0, 0)?;
        report(Event::Retry { file: target.file(), wait, reason: &error });
        std::thread::sleep(wait);
    }
}

/// Brings the described file into the cache, unless it is there, and makes it visible.
fn obtain(
    client: &Client,
    repository: &Repository,
    target: &Target,
    described: &Described,
    patience: &mut Patience,
    report: &mut dyn FnMut(Event<'_>),
) -> Result<PathBuf, Failure> {
    let Described { commit, etag, size, .. } = described;
    let entry = || repository.entry(commit, target, Some(*size));
    if let Some(path) = entry() {
        return Ok(path);
    }
    let lock = repository.lock(etag, || report(Event::Waiting { file: target.file() }))?;
    // Another process may just have brought it.
    if let Some(path) = entry() {
        return Ok(path);
    }
    // Verified even if it is whole: whoever wrote it may not have looked.
    if !repository.has_blob(etag, *size) {
        let mut partial = Partial::open(repository.partial(etag, lock.is_some()), described)?;
        match partial.fill(client, patience, target.file(), report) {
            Ok(()) => partial.finish(&repository.blob(etag))?,
            Err(failure) => {
                partial.leave(lock.is_some());
                return Err(failure);
            }
        }
    }
    Ok(repository.publish(commit, target, etag)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(vars: &[(&str, &str)]) -> Result<Hub> {
        let vars: Vec<(String, String)> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Hub::from_vars(move |name| vars.iter().find(|(key, _)| key == name).map(|(_, value)| OsString::from(value)))
    }

    #[test]
    fn variables_give_the_cache_in_the_order_of_huggingface_hub() {
        for (vars, cache) in [
            (&[("HOME", "/h")][..], "/h/.cache/huggingface/hub"),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")], "/f/hub"),
            (&[("HOME", "/h"), ("HF_HOME", "~/f")], "/h/f/hub"),
            (&[("HOME", "/h"), ("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HOME", "/h"), ("HF_HUB_CACHE", "/new"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/new"),
            (&[("HOME", "/h"), ("HF_HUB_CACHE", "")], "/h/.cache/huggingface/hub"),
            (&[("HOME", "/h"), ("HF_HOME", "$HOME/f"), ("XDG_CACHE_HOME", "/x")], "/h/f/hub"),
            (&[("HOME", "/h"), ("HF_HUB_CACHE", "/a${HOME}b/$NONE/$/${/$HOME_X")], "/a/hb/$NONE/$/${/$HOME_X"),
        ] {
            assert_eq!(hub(vars).unwrap().cache(), Path::new(cache), "{vars:?}");
        }
    }

    #[test]
    fn variables_give_endpoint_token_and_offline() {
        let set = |name, value| hub(&[("HOME", "/nowhere"), (name, value)]);
        assert_eq!(set("HF_TOKEN", " hf_x\n").unwrap().token.as_deref(), Some("hf_x"));
        assert_eq!(set("HF_TOKEN", "").unwrap().token, None);
        assert_eq!(set("HF_TOKEN", "a\r\nb").map(|_| ()).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(set("HF_ENDPOINT", "https://hub.example/").unwrap().endpoint.origin().1, "hub.example");
        for bad in ["hub.example", "file:///x", "https://u@hub.example"] {
            assert_eq!(set("HF_ENDPOINT", bad).map(|_| ()).unwrap_err().kind(), ErrorKind::Usage, "{bad}");
        }
        assert_eq!(set("HUGGING_FACE_HUB_TOKEN", "hf_old").unwrap().token.as_deref(), Some("hf_old"));
        let both = [("HOME", "/nowhere"), ("HUGGING_FACE_HUB_TOKEN", "hf_old"), ("HF_TOKEN", "hf_new")];
        assert_eq!(hub(&both).unwrap().token.as_deref(), Some("hf_new"));
        let off = [("HOME", "/nowhere"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), ("HF_TOKEN", "hf_new")];
        assert_eq!(hub(&off).unwrap().token, None);
        assert!(set("TRANSFORMERS_OFFLINE", "1").unwrap().offline);
        let not = [("HOME", "/nowhere"), ("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")];
        assert!(!hub(&not).unwrap().offline);
        for (value, offline) in [("1", true), ("ON", true), ("0", false), ("", false)] {
            assert_eq!(set("HF_HUB_OFFLINE", value).unwrap().offline, offline, "{value:?}");
        }
    }

    #[test]
    fn the_token_file_is_read() {
        let folder = std::env::temp_dir().join(format!("crosscoder-hub-token-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("token"), "hf_file\n").unwrap();
        fs::write(folder.join("other"), "hf_other").unwrap();
        let (home, other) = (folder.display().to_string(), folder.join("other").display().to_string());
        assert_eq!(hub(&[("HF_HOME", &home)]).unwrap().token.as_deref(), Some("hf_file"));
        assert_eq!(hub(&[("HF_HOME", &home), ("HF_TOKEN", "hf_var")]).unwrap().token.as_deref(), Some("hf_var"));
        assert_eq!(hub(&[("HF_HOME", &home), ("HF_TOKEN_PATH", &other)]).unwrap().token.as_deref(), Some("hf_other"));
        fs::remove_dir_all(&folder).unwrap();
    }
}
