//! The cache on disk, as `huggingface_hub` keeps it.
//!
//! ```text
//! .locks/models--ORG--NAME/ETAG.lock                 empty, held with flock while its blob is written
//! models--ORG--NAME/blobs/ETAG                       the bytes of one file
//! models--ORG--NAME/blobs/ETAG.XXXXXXXX.incomplete   the beginning of them
//! models--ORG--NAME/refs/REVISION                    the commit a branch or tag stood at, 40 digits, no newline
//! models--ORG--NAME/snapshots/COMMIT/path/of/file    a relative symlink to the blob
//! ```
//!
//! A snapshot entry appears only after its blob is whole and verified, so whatever is visible is right. Files with a
//! temporary name lie in `blobs/`, where no reader of the cache looks for entries.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::names::{Commit, Etag, Hasher, Target};
use crate::error::{Error, Result};
use crate::files::read_beside;

/// A reference is 40 hexadecimal digits; others are not looked at further.
const REFERENCE_BYTES: u64 = 1 << 10;

/// Bytes read or written at once.
pub(super) const CHUNK: usize = 256 * 1024;

/// The folder of one repository in the cache.
pub(super) struct Repository {
    folder: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub(super) fn new(cache: &Path, target: &Target) -> Self {
        let name = format!("models--{}", target.repo().replace('/', "--"));
        Repository { folder: cache.join(&name), locks: cache.join(".locks").join(&name) }
    }

    fn pointer(&self, commit: &Commit, target: &Target) -> PathBuf {
        let mut path = self.folder.join("snapshots").join(commit.as_str());
        path.extend(target.file().split('/'));
        path
    }

    fn blobs(&self) -> PathBuf {
        self.folder.join("blobs")
    }

    pub(super) fn blob(&self, etag: &Etag) -> PathBuf {
        self.blobs().join(etag.name())
    }

    /// Where the beginning of a blob lies until it is whole. The name does not change, so the next run goes on there;
    /// where there are no locks, each process has its own.
    pub(super) fn partial(&self, etag: &Etag, locked: bool) -> PathBuf {
        let writer = if locked { 0 } else { std::process::id() };
        self.blobs().join(format!("{}.{writer:08x}.incomplete", etag.name()))
    }

    fn reference(&self, target: &Target) -> PathBuf {
        let mut path = self.folder.join("refs");
        path.extend(target.revision().split('/'));
        path
    }

    /// The file of that commit, if it is here; with a `size`, only if it has that size.
    pub(super) fn entry(&self, commit: &Commit, target: &Target, size: Option<u64>) -> Option<PathBuf> {
        let path = self.pointer(commit, target);
        let found = fs::metadata(&path).ok()?;
        (found.is_file() && size.is_none_or(|size| size == found.len())).then_some(path)
    }

    /// The file as of the last time its revision was asked for, without the hub.
    pub(super) fn lookup(&self, target: &Target) -> Option<(Commit, PathBuf)> {
        let commit = match target.commit() {
            Some(commit) => commit,
            None => {
                let bytes = read_beside(&self.reference(target), REFERENCE_BYTES).ok()?;
                Commit::parse(str::from_utf8(&bytes).ok()?.trim())?
            }
        };
        let path = self.entry(&commit, target, None)?;
        Some((commit, path))
    }

    /// Makes the folders and takes the lock of a blob; `waiting` is called if another process holds it.
    ///
    /// `None` where there are no locks (some network file systems): they spare transfers, while the bytes are right by
    /// their hash. The lock file stays: removing it would let two processes lock two different files of one name.
    pub(super) fn lock(&self, etag: &Etag, waiting: impl FnOnce()) -> Result<Option<File>> {
        // snapshots/ too: a repository without it counts as damaged.
        for folder in [&self.locks, &self.blobs(), &self.folder.join("snapshots")] {
            fs::create_dir_all(folder).map_err(|e| Error::io("cannot make the folder", e).in_file(folder))?;
        }
        let path = self.locks.join(format!("{}.lock", etag.name()));
        let file = match OpenOptions::new().create_new(true).append(true).open(&path) {
            Ok(file) => {
                // So that others of the group can take it, whatever the umask.
                #[cfg(unix)]
                let _ = fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o664));
                Ok(file)
            }
            // One that another user made can be taken all the same.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => match OpenOptions::new().append(true).open(&path) {
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => File::open(&path),
                opened => opened,
            },
            Err(e) => Err(e),
        };
        let file = file.map_err(|e| Error::io("cannot open the lock", e).in_file(&path))?;
        let is_held = loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(fs::TryLockError::WouldBlock) => break true,
                Err(fs::TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(fs::TryLockError::Error(_)) => break false,
            }
        };
        if !is_held {
            return Ok(None);
        }
        waiting();
        loop {
            match file.lock() {
                Ok(()) => return Ok(Some(file)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Ok(None),
            }
        }
    }

    /// Whether the blob is here, whole and right.
    pub(super) fn has_blob(&self, etag: &Etag, size: u64) -> bool {
        let path = self.blob(etag);
        let check = || -> io::Result<bool> {
            if fs::metadata(&path)?.len() != size {
                return Ok(false);
            }
            let mut hasher = Hasher::new(etag, size);
            read_all(&mut File::open(&path)?, |bytes| hasher.update(bytes))?;
            Ok(hasher.verify().is_ok())
        };
        check().unwrap_or(false)
    }

    /// Makes the verified blob visible as the file of that commit.
    pub(super) fn publish(&self, commit: &Commit, target: &Target, etag: &Etag) -> Result<PathBuf> {
        let (blob, path) = (self.blob(etag), self.pointer(commit, target));
        let failed = |e| Error::io("cannot write the snapshot entry", e).in_file(&path);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(failed)?;
        // From snapshots/COMMIT/, and one folder more for each in the name.
        let up = target.file().split('/').count().saturating_add(1);
        let mut aim: PathBuf = std::iter::repeat_n("..", up).collect();
        aim.extend(["blobs", etag.name()]);
        let made = match symlink(&aim, &path) {
            // It dangles, or is not of the right size: replaced in one step.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let temporary = self.temporary();
                symlink(&aim, &temporary).and_then(|()| fs::rename(&temporary, &path))
            }
            made => made,
        };
        match made {
            // No symlinks here (FAT; Windows without the right to make them): the file itself becomes the entry.
            Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) => {
                fs::rename(&blob, &path).map_err(failed)?;
            }
            made => made.map_err(failed)?,
        }
        sync_folder(folder);
        Ok(path)
    }

    /// Notes at which commit the target's revision stands; not in a cache that is for reading only.
    pub(super) fn refer(&self, target: &Target, commit: &Commit) -> Result<()> {
        let path = self.reference(target);
        if target.commit().is_some() || fs::read(&path).is_ok_and(|old| old == commit.as_str().as_bytes()) {
            return Ok(());
        }
        let temporary = self.temporary();
        path.parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&temporary, commit.as_str()))
            .and_then(|()| fs::rename(&temporary, &path))
            .or_else(|e| {
                let _ = fs::remove_file(&temporary);
                match e.kind() {
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Ok(()),
                    _ => Err(Error::io("cannot note the commit", e).in_file(&path)),
                }
            })
    }

    /// A name in `blobs/` that no other process or thread uses.
    fn temporary(&self) -> PathBuf {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        self.blobs().join(format!("temporary-{count}.{:08x}.incomplete", std::process::id()))
    }
}

/// Hands all that is left in `file` to `take`, piece by piece.
pub(super) fn read_all(file: &mut File, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => take(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Makes a rename in that folder last; where folders cannot be opened, the system sees to it.
pub(super) fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

#[cfg(unix)]
fn symlink(aim: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(aim, path)
}

#[cfg(windows)]
fn symlink(aim: &Path, path: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(aim, path)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
