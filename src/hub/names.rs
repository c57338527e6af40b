//! Everything that is told to us by name, checked before it becomes part of a path or an address.
//!
//! Repository, revision and file come from the caller, ETag and commit from a server. Each becomes a folder or a file
//! name in the cache, so each has a type here, and a value of that type cannot climb out of the cache.

use crate::error::{Error, ErrorKind, Result};

/// Whether `part` can be one component of a path everywhere: `[A-Za-z0-9._-]{1,128}`, not dots alone.
fn is_plain(part: &str) -> bool {
    (1..=128).contains(&part.len())
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !part.bytes().all(|b| b == b'.')
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Text of a server, made fit for a one-line message.
pub(super) fn printable(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).take(200).collect();
    if line.len() < text.len() {
        line.push('…');
    }
    line
}

/// `text` with everything but letters, digits and `-._~` percent-encoded, for one component of an address.
fn percent_encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// One file of one revision of one model repository.
#[derive(Clone)]
pub(super) struct Target {
    repo: String,
    file: String,
    revision: String,
}

impl Target {
    /// Refuses what the hub does not allow in a name, and what would leave the folder it belongs to.
    pub(super) fn new(repo: &str, file: &str, revision: &str) -> Result<Self> {
        let usage = |what: &str, name: &str| Err(Error::usage(format!("{what} '{}'", printable(name))));
        // The hub allows no "--" in a name; the cache needs that, for it writes '/' as "--".
        let is_name = |part: &str| is_plain(part) && !part.contains("--") && !part.contains("..");
        if repo.split('/').count() > 2 || !repo.split('/').all(is_name) {
            return usage("a repository is ORG/NAME of letters, digits, '-', '_' and '.'; not", repo);
        }
        if !revision.split('/').all(is_plain) {
            return usage("a revision is a branch, tag, refs/pr/N or commit; not", revision);
        }
        let is_part = |part: &str| {
            !part.is_empty()
                && !part.bytes().all(|b| b == b'.')
                && part.len() <= 255
                && !part.chars().any(|c| c.is_control() || c == '\\' || (cfg!(windows) && "<>:\"|?*".contains(c)))
        };
        if !file.split('/').all(is_part) {
            return usage("a file is a relative path inside the repository, without '.', '..' and '\\'; not", file);
        }
        Ok(Target { repo: repo.to_owned(), file: file.to_owned(), revision: revision.to_owned() })
    }

    pub(super) fn repo(&self) -> &str {
        &self.repo
    }

    pub(super) fn file(&self) -> &str {
        &self.file
    }

    pub(super) fn revision(&self) -> &str {
        &self.revision
    }

    /// The same file, of that commit.
    pub(super) fn pinned(&self, commit: &Commit) -> Target {
        Target { revision: commit.0.clone(), ..self.clone() }
    }

    /// The revision, if it is a full commit id and so can never mean another file.
    pub(super) fn commit(&self) -> Option<Commit> {
        Commit::parse(&self.revision)
    }

    /// `/ORG/NAME/resolve/REVISION/FILE`, percent-encoded; the slashes of a revision too.
    pub(super) fn address(&self) -> String {
        let file: Vec<String> = self.file.split('/').map(percent_encoded).collect();
        format!("/{}/resolve/{}/{}", self.repo, percent_encoded(&self.revision), file.join("/"))
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "hf://{}@{}/{}", self.repo, self.revision, self.file)
    }
}

/// A commit id: 40 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Commit(String);

impl Commit {
    pub(super) fn parse(text: &str) -> Option<Self> {
        is_hex(text, 40).then(|| Commit(text.to_ascii_lowercase()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The ETag of a file, which on the hub says what its bytes must hash to and names its blob in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Etag {
    /// 64 hexadecimal digits: the SHA-256 of a large file.
    Sha256(String),
    /// 40 hexadecimal digits: git's id of a small file, the SHA-1 of `blob SIZE\0` and the bytes.
    GitBlob(String),
}

impl Etag {
    /// Strips `W/` and the quotes. What is no hash is refused: its bytes could not be verified.
    pub(super) fn parse(header: &str) -> Result<Self> {
        let text = header.trim();
        let text = text.strip_prefix("W/").unwrap_or(text);
        let text = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text);
        if is_hex(text, 64) {
            Ok(Etag::Sha256(text.to_owned()))
        } else if is_hex(text, 40) {
            Ok(Etag::GitBlob(text.to_owned()))
        } else {
            let found = printable(header);
            Err(Error::new(
                ErrorKind::Network,
                format!("the ETag '{found}' is neither a SHA-256 nor a git blob id, so the file could not be verified"),
            ))
        }
    }

    /// The name of the blob.
    pub(super) fn name(&self) -> &str {
        match self {
            Etag::Sha256(hex) | Etag::GitBlob(hex) => hex,
        }
    }
}

/// Hashes the bytes of a file as its ETag wants them hashed.
#[derive(Clone)]
pub(super) struct Hasher {
    context: ring::digest::Context,
    etag: Etag,
}

impl Hasher {
    /// `size` is the length of the whole file, which a git blob id covers.
    pub(super) fn new(etag: &Etag, size: u64) -> Self {
        let context = match etag {
            Etag::Sha256(_) => ring::digest::Context::new(&ring::digest::SHA256),
            Etag::GitBlob(_) => {
                let mut context = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {size}\0").as_bytes());
                context
            }
        };
        Hasher { context, etag: etag.clone() }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    /// An error that shows both hashes unless the bytes hash to the ETag.
    pub(super) fn verify(self) -> Result<()> {
        let found: String = self.context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let (name, wanted) = match &self.etag {
            Etag::Sha256(hex) => ("SHA-256 hash", hex),
            Etag::GitBlob(hex) => ("git blob hash", hex),
        };
        if found.eq_ignore_ascii_case(wanted) {
            return Ok(());
        }
        let what = format!("corrupt: the {name} of the bytes is {found}; the hub's ETag needs {wanted}");
        Err(Error::new(ErrorKind::Network, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_climb_or_confuse_are_refused() {
        for file in ["", "/abs", "../x", "a/../x", "a//b", "./c", "a/.", "..\\x", "C:\\x", "a\0b", "x/", "...", "a\nb"]
        {
            assert!(Target::new("o/n", file, "main").is_err(), "file {file:?}");
        }
        for repo in ["", "..", "../..", "a/..", "a/b/c", "/a", "a/", "a--b", "a b", "o/n?x", "o/..n", "o\\n"] {
            assert!(Target::new(repo, "f", "main").is_err(), "repository {repo:?}");
        }
        for revision in ["", "..", "a/../b", "/main", "main/", "a b", "ma\\in", "a?b", &"a".repeat(129)] {
            assert!(Target::new("o/n", "f", revision).is_err(), "revision {revision:?}");
        }
        for (repo, file, revision) in [
            ("gpt2", "a b (1)+ü.json", "main"),
            ("o/n.v2", "blocks.14.hook_resid_pre/cfg.json", "refs/pr/1"),
            ("o/n_x-y", ".gitattributes", "v1.0"),
        ] {
            assert!(Target::new(repo, file, revision).is_ok(), "{repo} {file} {revision}");
        }
    }

    #[test]
    fn an_address_encodes_slashes_of_the_revision_only() {
        let target = Target::new("o/n", "sub/a b#?.pt", "refs/pr/1").unwrap();
        assert_eq!(target.address(), "/o/n/resolve/refs%2Fpr%2F1/sub/a%20b%23%3F.pt");
    }

    #[test]
    fn only_hashes_are_etags() {
        let sha1 = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391";
        assert_eq!(Etag::parse(&format!("W/\"{sha1}\"")).unwrap(), Etag::GitBlob(sha1.to_owned()));
        let sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Etag::parse(sha256).unwrap(), Etag::Sha256(sha256.to_owned()));
        for bad in ["", "\"\"", "..", "../../evil", "a/b", "/tmp/evil", "d41d8cd98f00b204e9800998ecf8427e"] {
            let message = Etag::parse(bad).unwrap_err().to_string();
            assert!(message.contains("ETag"), "{bad}: {message}");
        }
    }

    #[test]
    fn hashes_of_known_bytes() {
        // `git hash-object` and `sha256sum` of "hello\n".
        for (etag, right) in [
            ("ce013625030ba8dba906f756967f9e9ca394464a", true),
            ("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", true),
            ("5891B5B522D5DF086D0FF0B110FBD9D21BB4FC7163AF34D08286A2E846F6BE03", true),
            ("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be04", false),
        ] {
            let mut hasher = Hasher::new(&Etag::parse(etag).unwrap(), 6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            assert_eq!(hasher.verify().is_ok(), right, "{etag}");
        }
    }
}
