//! Files that appear whole or not at all: written beside their place, synced to disk, then renamed over it.
//!
//! Order of durability: data to disk, rename, folder to disk. A crash, a full disk or a kill at any moment leaves the old
//! file, or the new one; what may be left over is a temporary file, which [`remove_leftovers`] knows by its name.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

/// What stands in the names of temporary files: `.0.pt.4711-0.crosscoder-tmp`.
const SUFFIX: &str = ".crosscoder-tmp";

/// So much of a file's own name stands there, too.
const STEM_BYTES: usize = 180;

/// The temporary files of this process.
static TEMPORARIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Held while files that belong together are put into their places.
static PLACING: Mutex<()> = Mutex::new(());

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the temporary files of this process, for one that is about to end, and waits until those that are being put into their
/// places are there. Until what is returned is dropped, no other is made or placed.
pub fn abandon() -> impl Sized {
    let placing = held(&PLACING);
    let files = held(&TEMPORARIES);
    files.iter().for_each(|path| drop(std::fs::remove_file(path)));
    (placing, files)
}

/// A file that is written and synced, but not yet in its place. Dropped, it is removed.
#[derive(Debug)]
pub struct Staged {
    temporary: PathBuf,
    path: PathBuf,
    placed: bool,
    /// Locked until it is in its place, so that [`remove_leftovers`] of another process leaves it alone.
    file: File,
}

/// Bytes are handed to the system in pieces of this size.
const PIECE_BYTES: usize = 1 << 20;

/// So many pieces may wait for being written.
const WAITING: usize = 4;

/// After so many pieces the disk is told to begin, so that little is left to wait for in the end.
const SYNCED_PIECES: usize = 64;

/// What a file's content is written to. Another thread hands it to the system, which takes as long as computing the content
/// and its checksums does.
#[derive(Debug)]
pub struct Output {
    piece: Vec<u8>,
    full: SyncSender<Vec<u8>>,
    /// Pieces that were written.
    empty: Receiver<Vec<u8>>,
}

fn pass_on(to: &SyncSender<Vec<u8>>, piece: Vec<u8>) -> io::Result<()> {
    // Where the other thread has failed, its error is the one that is reported.
    to.send(piece).map_err(|_| io::Error::other("an earlier write failed"))
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() >= PIECE_BYTES {
            let next = self.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(PIECE_BYTES));
            pass_on(&self.full, std::mem::replace(&mut self.piece, next))?;
        }
        let n = bytes.len().min(PIECE_BYTES.saturating_sub(self.piece.len()));
        self.piece.extend_from_slice(bytes.get(..n).unwrap_or_default());
        Ok(n)
    }

    /// Nothing: a file that is not finished is nobody's.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a thread returned; its panic goes on here.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Lets `content` write into `file`.
fn fill(mut file: &File, content: impl FnOnce(&mut Output) -> Result<()>) -> Result<()> {
    let (full, fulls) = sync_channel::<Vec<u8>>(WAITING);
    let (empties, empty) = channel();
    std::thread::scope(|scope| {
        let start = std::thread::Builder::new;
        let writing = start().spawn_scoped(scope, move || {
            let (many, manys) = channel();
            let syncing = start().spawn_scoped(scope, move || manys.into_iter().try_for_each(|()| file.sync_data()))?;
            for (i, mut piece) in fulls.into_iter().enumerate() {
                file.write_all(&piece)?;
                piece.clear();
                let _ = empties.send(piece); // Nobody needs the last ones.
                if i % SYNCED_PIECES == SYNCED_PIECES - 1 {
                    let _ = many.send(()); // Where syncing has failed, it is told below.
                }
            }
            drop(many);
            joined(syncing)
        });
        let writing = writing.map_err(|e| Error::io("cannot start a thread", e))?;
        let mut out = Output { piece: Vec::with_capacity(PIECE_BYTES), full, empty };
        let result = content(&mut out);
        let Output { piece, full, .. } = out;
        let last = pass_on(&full, piece);
        drop(full);
        joined(writing).map_err(|e| Error::io("cannot write", e))?;
        result?;
        last.map_err(|e| Error::io("cannot write", e))
    })
}

/// Writes a file beside `path` (beside what it leads to, if it is a link) and syncs it. It has the permissions of a file that
/// is there.
///
/// # Errors
/// What `content` returns; a folder that cannot be written to, a full disk. No temporary file is left then.
pub fn stage(path: &Path, content: impl FnOnce(&mut Output) -> Result<()>) -> Result<Staged> {
    let cannot = |e| Error::io("cannot write", e).in_file(path);
    // A link stays, and what it leads to is replaced.
    let place = if path.is_symlink() { path.canonicalize().map_err(cannot)? } else { path.to_owned() };
    let temporary = temporary_for(&place)?;
    let mut ours = held(&TEMPORARIES);
    let file = File::create_new(&temporary).map_err(cannot)?;
    ours.push(temporary.clone());
    drop(ours);
    // Where a file system has no locks or permissions, it goes without. (Elsewhere than on Unix, a lock keeps readers away too.)
    if cfg!(unix) {
        let _ = file.try_lock();
    }
    if let Ok(old) = place.metadata() {
        let _ = file.set_permissions(old.permissions());
    }
    let staged = Staged { temporary, path: place, placed: false, file };
    fill(&staged.file, content).map_err(|e| e.in_file(path))?;
    staged.file.sync_all().map_err(cannot)?;
    Ok(staged)
}

impl Staged {
    /// Renames the file into its place, over what is there, and syncs the folder.
    ///
    /// # Errors
    /// If the rename fails; the old file is still there then.
    pub fn place(self) -> Result<()> {
        let _placing = held(&PLACING);
        self.place_held()
    }

    /// [`Self::place`], while [`PLACING`] is held.
    fn place_held(mut self) -> Result<()> {
        self.rename()?;
        sync_folder(&self.path)
    }

    fn rename(&mut self) -> Result<()> {
        let cannot = |e| Error::io("cannot move the finished file into its place", e).in_file(&self.path);
        std::fs::rename(&self.temporary, &self.path).map_err(cannot)?;
        self.placed = true;
        Ok(())
    }
}

/// Places files one after the other; a process that [abandons](abandon) its files waits for all. `placed` hears of each.
///
/// # Errors
/// As [`Staged::place`]; those before are in their places then.
pub fn place_all<T>(files: impl IntoIterator<Item = (T, Staged)>, mut placed: impl FnMut(T)) -> Result<()> {
    let _placing = held(&PLACING);
    files.into_iter().try_for_each(|(what, file)| file.place_held().map(|()| placed(what)))
}

/// Places two files that belong together, the small one first. Whoever reads them meanwhile, or after a kill, finds the old pair,
/// the new one, or no second file: where the small one changes, the old second one is renamed to `NAME.old` before. If the
/// second cannot be placed, what was there is put back. Of two processes that place pairs in a folder, one waits for the other.
///
/// # Errors
/// As [`Staged::place`]; both old files are still there then, or, if the last sync failed, both new ones.
pub fn place_both(small: Staged, mut second: Staged) -> Result<()> {
    let _locked = lock(folder_of(&second.path));
    let _placing = held(&PLACING);
    let path = small.path.clone();
    let before = match std::fs::read(&path) {
        Ok(bytes) => Some(bytes),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(Error::io("cannot read", e).in_file(&path)),
    };
    let after = std::fs::read(&small.temporary).map_err(|e| Error::io("cannot read", e).in_file(&path))?;
    let old = if before.as_ref() == Some(&after) { None } else { set_aside(&second.path)? };
    let synced = if old.is_some() { sync_folder(&second.path) } else { Ok(()) };
    if let Err(e) = synced.and_then(|()| small.place_held()).and_then(|()| second.rename()) {
        // Its bytes may be the ones that are missing on a full disk.
        let to = second.path.clone();
        drop(second);
        // What went wrong first is what is told.
        let _ = match before {
            Some(bytes) => stage(&path, |out| out.write_all(&bytes).map_err(|e| Error::io("cannot write", e)))
                .and_then(Staged::place_held),
            None => std::fs::remove_file(&path).map_err(|e| Error::io("cannot remove", e)),
        };
        if let Some(old) = old {
            let _ = std::fs::rename(old, &to);
            let _ = sync_folder(&to);
        }
        return Err(e);
    }
    let synced = sync_folder(&second.path);
    if let Some(old) = old {
        // The new pair is there, so that it does no harm if it stays.
        let _ = std::fs::remove_file(old);
    }
    synced
}

/// The folder, locked against other processes that place pairs in it, which takes no time. Where the file system has no locks, or
/// somebody else keeps it locked, it goes without.
fn lock(folder: &Path) -> Option<File> {
    let folder = File::open(folder).ok()?;
    for _ in 0..200 {
        match folder.try_lock() {
            Ok(()) => return Some(folder),
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            Err(TryLockError::Error(_)) => break,
        }
    }
    None
}

/// Renames a file, if it is there, to `NAME.old`, or `NAME.old-2` …: a name that is seen, and that nobody cleans up, should this
/// process be killed before what follows.
fn set_aside(path: &Path) -> Result<Option<PathBuf>> {
    if !path.symlink_metadata().is_ok_and(|there| !there.is_dir()) {
        return Ok(None);
    }
    let named = |end: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    let mut aside = named(".old");
    let mut n = 1u32;
    while aside.symlink_metadata().is_ok() {
        n = n.saturating_add(1);
        aside = named(&format!(".old-{n}"));
    }
    std::fs::rename(path, &aside).map_err(|e| Error::io("cannot move it out of the way", e).in_file(path))?;
    Ok(Some(aside))
}

/// A name beside `path` that no other file has. One process's number may be that of another that was killed: in a container they
/// all begin with the same.
fn temporary_for(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| Error::usage("a file needs a name").in_file(path))?;
    // A name may have 255 bytes; so many are left beside the numbers. It is for people: what tells names apart are these.
    let name = name.to_string_lossy();
    let stem = (0..=STEM_BYTES).rev().find_map(|n| name.get(..n)).unwrap_or_default();
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{stem}.{}-{count}{SUFFIX}", std::process::id()));
        if temporary.symlink_metadata().is_err() {
            return Ok(temporary);
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        held(&TEMPORARIES).retain(|path| *path != self.temporary);
        if !self.placed {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// [`stage`] and [`Staged::place`]: writes the file at `path`, whole or not at all.
///
/// # Errors
/// As theirs.
pub fn write(path: &Path, content: impl FnOnce(&mut Output) -> Result<()>) -> Result<()> {
    stage(path, content)?.place()
}

/// Makes a folder, and those above it that are missing, such that they outlive a power failure.
///
/// # Errors
/// If one cannot be made or what it is made in cannot be synced.
pub fn create_folders(folder: &Path) -> Result<()> {
    let cannot = |e| Error::io("cannot create the directory", e).in_file(folder);
    match std::fs::create_dir(folder) {
        Ok(()) => sync_folder(folder),
        Err(_) if folder.is_dir() => Ok(()),
        Err(e) => match folder.parent() {
            Some(parent) if e.kind() == std::io::ErrorKind::NotFound && parent != Path::new("") => {
                create_folders(parent)?;
                create_folders(folder)
            }
            _ => Err(cannot(e)),
        },
    }
}

/// The folder that a file is in or will be.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

/// Syncs the folder that holds `path`, so that what was renamed or made in it outlives a power failure.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = folder_of(path);
    // Only Unix lets a folder be opened and synced.
    if cfg!(unix) {
        match File::open(folder).and_then(|f| f.sync_all()) {
            // Some file systems cannot sync a folder, and say so with EINVAL.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {}
            synced => synced.map_err(|e| Error::io("cannot sync the folder", e).in_file(folder))?,
        }
    }
    Ok(())
}

/// Removes temporary files that a killed process left in `folder`; where the file system has locks, not those that another
/// process is writing.
///
/// # Errors
/// If the folder cannot be listed or a leftover cannot be removed.
pub fn remove_leftovers(folder: &Path) -> Result<()> {
    let cannot = |e| Error::io("cannot clean up", e).in_file(folder);
    for entry in std::fs::read_dir(folder).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let is_file = entry.file_type().map_err(cannot)?.is_file();
        if !is_leftover(&entry.file_name()) || is_file && is_locked(&entry.path()) {
            continue;
        }
        match std::fs::remove_file(entry.path()) {
            // It was put into its place meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(|e| Error::io("cannot remove a leftover", e).in_file(&entry.path()))?,
        }
    }
    Ok(())
}

fn is_locked(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

fn is_leftover(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with('.') && name.ends_with(SUFFIX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("crosscoder-atomic-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = folder("failed");
        let path = folder.join("a.txt");
        write(&path, |w| w.write_all(b"old").map_err(|e| Error::io("x", e))).unwrap();
        let error = write(&path, |w| {
            w.write_all(b"half of the new").map_err(|e| Error::io("x", e))?;
            Err(Error::format("no more"))
        });
        assert!(error.unwrap_err().to_string().ends_with("a.txt: no more"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&folder), ["a.txt"]);
        write(&path, |w| w.write_all(b"new").map_err(|e| Error::io("x", e))).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        let long = "é".repeat(127);
        write(&folder.join(&long), |w| w.write_all(b"new").map_err(|e| Error::io("x", e))).unwrap();
        assert_eq!(names(&folder), ["a.txt", &long]);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    #[cfg(unix)]
    fn a_link_stays_and_its_file_is_replaced() {
        let folder = folder("link");
        let new = |name: &str| write(&folder.join(name), |w| w.write_all(b"new").map_err(|e| Error::io("x", e)));
        std::fs::create_dir(folder.join("far")).unwrap();
        std::fs::write(folder.join("far/a"), b"old").unwrap();
        std::os::unix::fs::symlink("far/a", folder.join("link")).unwrap();
        std::os::unix::fs::symlink("nowhere", folder.join("dangling")).unwrap();
        new("link").unwrap();
        assert!(folder.join("link").is_symlink());
        assert_eq!(std::fs::read(folder.join("far/a")).unwrap(), b"new");
        let error = new("dangling").unwrap_err().to_string();
        assert!(error.contains("dangling: cannot write"), "{error}");
        assert_eq!(
            (names(&folder), names(&folder.join("far"))),
            (vec!["dangling".into(), "far".into(), "link".into()], vec!["a".into()])
        );
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    #[cfg(unix)]
    fn what_is_being_written_is_no_leftover() {
        let folder = folder("leftovers");
        let path = folder.join("a.txt");
        let staged = stage(&path, |w| w.write_all(b"new").map_err(|e| Error::io("x", e))).unwrap();
        std::fs::write(folder.join(".b.txt.1-0.crosscoder-tmp"), "").unwrap();
        remove_leftovers(&folder).unwrap();
        staged.place().unwrap();
        assert_eq!(names(&folder), ["a.txt"]);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    #[cfg(unix)]
    fn permissions_stay() {
        use std::os::unix::fs::PermissionsExt;
        let folder = folder("permissions");
        let path = folder.join("a.txt");
        let new = || write(&path, |w| w.write_all(b"new").map_err(|e| Error::io("x", e))).unwrap();
        new();
        for mode in [0o600, 0o644, 0o440] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            new();
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, mode);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn folders_are_made_by_several_at_once() {
        let folder = folder("at-once");
        for round in 0..50 {
            let deep = folder.join(format!("{round}/a/b/c"));
            std::thread::scope(|scope| {
                let threads = [0; 4].map(|_| scope.spawn(|| create_folders(&deep)));
                threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
            });
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn two_files_are_placed_together_or_not_at_all() {
        let folder = folder("both");
        let new =
            |name: &str| stage(&folder.join(name), |w| w.write_all(b"new").map_err(|e| Error::io("x", e))).unwrap();
        // A folder with something in it cannot be renamed over.
        let blocked = folder.join("blocked");
        std::fs::create_dir_all(blocked.join("inside")).unwrap();
        std::fs::write(folder.join("a.json"), b"old").unwrap();
        assert!(place_both(new("a.json"), new("blocked")).is_err());
        assert!(place_both(new("b.json"), new("blocked")).is_err());
        assert_eq!(std::fs::read(folder.join("a.json")).unwrap(), b"old");
        assert_eq!(names(&folder), ["a.json", "blocked"]);
        std::fs::remove_dir_all(&blocked).unwrap();
        place_both(new("a.json"), new("blocked")).unwrap();
        assert_eq!(std::fs::read(folder.join("a.json")).unwrap(), b"new");
        assert_eq!(std::fs::read(blocked).unwrap(), b"new");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_pair_that_cannot_be_replaced_stays() {
        let folder = folder("stays");
        let [small, second] = ["a.json", "a.pt"].map(|name| folder.join(name));
        let staged =
            |path: &Path, text: &[u8]| stage(path, |w| w.write_all(text).map_err(|e| Error::io("x", e))).unwrap();
        for old in [&b"old"[..], b"new"] {
            std::fs::write(&small, old).unwrap();
            std::fs::write(&second, b"old").unwrap();
            let gone = staged(&second, b"new");
            std::fs::remove_file(&gone.temporary).unwrap();
            assert!(place_both(staged(&small, b"new"), gone).is_err());
            assert_eq!([&small, &second].map(|path| std::fs::read(path).unwrap()), [old, b"old"]);
            assert_eq!(names(&folder), ["a.json", "a.pt"]);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_reader_never_sees_files_of_two_pairs() {
        let folder = folder("pairs");
        let [small, second] = ["a.json", "a.pt"].map(|name| folder.join(name));
        let place = |n: u32| {
            let staged = |path: &Path| stage(path, |w| write!(w, "{n}").map_err(|e| Error::io("x", e))).unwrap();
            place_both(staged(&small), staged(&second)).unwrap();
        };
        place(0);
        let done = std::sync::atomic::AtomicBool::new(false);
        let read = |path: &Path| std::fs::read_to_string(path).ok();
        let (mut pairs, mut without) = (0, 0);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                (1..=200).for_each(place);
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) && !writer.is_finished() {
                // Numbers rise: what lay there before and after the other was read lay there all the time.
                match (read(&second), read(&small), read(&second)) {
                    (Some(a), b, Some(c)) if a == c => {
                        assert_eq!(b, Some(a));
                        pairs += 1;
                    }
                    (None, ..) => without += 1,
                    _ => {}
                }
            }
        });
        println!("{pairs} whole pairs, {without} times no second file");
        assert!(pairs > 0);
        assert_eq!(names(&folder), ["a.json", "a.pt"]);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn folders_are_made_with_those_above_them() {
        let folder = folder("folders");
        for _ in 0..2 {
            create_folders(&folder.join("a/b/c")).unwrap();
        }
        assert!(folder.join("a/b/c").is_dir());
        std::fs::write(folder.join("file"), b"").unwrap();
        for path in ["file", "file/below"] {
            let error = create_folders(&folder.join(path)).unwrap_err().to_string();
            assert!(error.contains(path) && error.contains("cannot create the directory"), "{error}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_was_staged_and_not_placed_is_gone() {
        let folder = folder("staged");
        let staged = stage(&folder.join("a"), |_| Ok(())).unwrap();
        assert_eq!(names(&folder).len(), 1);
        assert!(is_leftover(OsStr::new(&names(&folder)[0])));
        drop(staged);
        assert!(names(&folder).is_empty());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn leftovers_of_a_process_with_the_same_number_are_in_nobodys_way() {
        let folder = folder("number");
        let path = folder.join("a");
        let staged = stage(&path, |_| Ok(())).unwrap();
        let name = staged.temporary.file_name().unwrap().to_str().unwrap().to_string();
        let (start, n) = name.strip_suffix(SUFFIX).unwrap().rsplit_once('-').unwrap();
        let n: u64 = n.parse().unwrap();
        (n + 1..n + 100).for_each(|n| std::fs::write(folder.join(format!("{start}-{n}{SUFFIX}")), b"left").unwrap());
        write(&path, |w| w.write_all(b"new").map_err(|e| Error::io("x", e))).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        drop(staged);
        assert_eq!(names(&folder).len(), 100);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn leftovers_of_a_killed_process_are_removed_and_nothing_else() {
        let folder = folder("leftovers");
        for name in [".0.pt.1-0.crosscoder-tmp", "0.pt", ".hidden", "x.crosscoder-tmp"] {
            std::fs::write(folder.join(name), b"").unwrap();
        }
        remove_leftovers(&folder).unwrap();
        assert_eq!(names(&folder), [".hidden", "0.pt", "x.crosscoder-tmp"]);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error_that_names_the_file() {
        let error = write(Path::new("/nowhere/at/all/a.txt"), |_| Ok(())).unwrap_err().to_string();
        assert!(error.starts_with("/nowhere/at/all/a.txt: cannot write"), "{error}");
    }
}
