//! The bytes of one file, from the hub to the disk: in as many pieces as the connection breaks into.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::http::{Class, Client, Content, Described, Failure};
use super::names::Hasher;
use super::{Event, cache};
use crate::error::{Error, Result};

/// Attempts in a row that may fail without bringing the file forward.
const ATTEMPTS: u32 = 6;
/// The same while the hub has not been reached at all: a missing network is no busy server.
const ATTEMPTS_UNREACHED: u32 = 3;
/// Time that may go by without bringing the file forward, and the longest `Retry-After` honoured.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of that, what is left to the last attempt.
const RESERVE: Duration = Duration::from_secs(15);
/// So many bytes in one attempt bring any file forward.
const PROGRESS_BYTES: u64 = 8 << 20;
/// A connection slower than this counts as silent.
const SLOWEST_BYTES_PER_S: u64 = 1024;
/// What TLS, chunks and gzip may add to the bytes of a file, besides half of them.
const FRAMING_BYTES: u64 = 1 << 20;

/// Decides whether to try again, and when.
pub(super) struct Patience {
    backoff: Duration,
    timeout: Duration,
    failures: u32,
    lost: Duration,
    reached: bool,
    /// A cached file is at hand: do not insist.
    hurry: bool,
}

impl Patience {
    pub(super) fn new(backoff: Duration, timeout: Duration, hurry: bool) -> Self {
        Patience { backoff, timeout, failures: 0, lost: Duration::ZERO, reached: false, hurry }
    }

    /// Counts attempts from here on; the time already lost stays lost.
    pub(super) fn reached(&mut self) {
        (self.failures, self.reached, self.hurry) = (0, true, false);
    }

    /// The time an attempt may take without bringing the file forward.
    pub(super) fn span(&self) -> Duration {
        let left = PATIENCE.saturating_sub(self.lost).max(self.timeout.min(RESERVE));
        self.timeout.saturating_mul(2).min(left)
    }

    /// The time to wait after an attempt failed that had brought nothing for the time `spent`, having `gained` so many
    /// bytes of `size`; or the error to end with, if there is no point in another.
    pub(super) fn wait(
        &mut self,
        failure: Failure,
        spent: Duration,
        gained: u64,
        size: u64,
    ) -> Result<(Duration, Error), Failure> {
        if failure.class != Class::Unreachable {
            self.reached = true;
        }
        if gained >= PROGRESS_BYTES.min(size / 32).max(1) {
            self.failures = 0;
        }
        if gained >= PROGRESS_BYTES {
            self.lost = Duration::ZERO;
        }
        self.failures = self.failures.saturating_add(1);
        // More than its span has passed only where this process was stopped.
        self.lost = self.lost.saturating_add(spent.min(self.span()));
        let allowed = match (self.hurry, self.reached) {
            (true, false) => 1,
            (true, true) => 2,
            (false, false) => ATTEMPTS_UNREACHED,
            (false, true) => ATTEMPTS,
        };
        let after = match failure.class {
            Class::Denied | Class::Final => return Err(failure),
            Class::Transient(after) => after,
            Class::Unreachable | Class::Restart | Class::Stale => None,
        };
        let give_up = |Failure { error, class }: Failure, why: String| Err(Failure { error: error.at(why), class });
        let doubled = self.backoff.saturating_mul(1 << self.failures.saturating_sub(1).min(4));
        // Up to a quarter more, so that many clients do not come back at once.
        let jitter =
            std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |t| f64::from(t.subsec_micros() % 1024) / 4096.0);
        let own = doubled.saturating_add(doubled.mul_f64(jitter));
        // A wait that the server names is not shortened; one of our own leaves time for the attempt.
        let (wait, reserve) = match after {
            Some(after) if after > PATIENCE => return give_up(failure, format!("told to wait {} s", after.as_secs())),
            Some(after) => (own.max(after), Duration::ZERO),
            None => (own, self.timeout.min(RESERVE)),
        };
        if self.failures >= allowed || self.lost.saturating_add(wait).saturating_add(reserve) > PATIENCE {
            return give_up(failure, format!("attempts: {}", self.failures));
        }
        self.lost = self.lost.saturating_add(wait);
        Ok((wait, failure.error))
    }
}

/// The beginning of a blob on disk, and the hash of it.
pub(super) struct Partial<'a> {
    file: File,
    path: PathBuf,
    hasher: Hasher,
    done: u64,
    described: &'a Described,
}

impl<'a> Partial<'a> {
    /// Opens what an earlier run has left, or an empty file. The caller holds the lock.
    pub(super) fn open(path: PathBuf, described: &'a Described) -> Result<Self> {
        let failed = |e| Error::io("cannot open", e).in_file(&path);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        let mut hasher = Hasher::new(&described.etag, described.size);
        let mut done = file.metadata().map_err(failed)?.len();
        if done > described.size {
            // Not the beginning of this file.
            file.set_len(0).map_err(failed)?;
            done = 0;
        }
        cache::read_all(&mut file, |bytes| hasher.update(bytes)).map_err(failed)?;
        Ok(Partial { file, path, hasher, done, described })
    }

    fn reset(&mut self) -> Result<()> {
        self.cut(0, Hasher::new(&self.described.etag, self.described.size))
    }

    /// Back to the first `done` bytes, which hash to `hasher`.
    fn cut(&mut self, done: u64, hasher: Hasher) -> Result<()> {
        let cut = self.file.set_len(done).and_then(|()| self.file.seek(SeekFrom::Start(done)));
        cut.map_err(|e| Error::io("cannot shorten", e).in_file(&self.path))?;
        (self.done, self.hasher) = (done, hasher);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| {
            let what = format!("cannot write {} bytes; {} are there for the next run", self.described.size, self.done);
            // A write may have been cut short: what counts is what was hashed.
            let _ = self.file.set_len(self.done);
            Error::io(what, e).in_file(&self.path)
        })?;
        self.hasher.update(bytes);
        self.done = self.done.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Verifies the whole and gives it its name.
    pub(super) fn finish(mut self, blob: &Path) -> Result<(), Failure> {
        let fresh = Hasher::new(&self.described.etag, self.described.size);
        if let Err(error) = std::mem::replace(&mut self.hasher, fresh).verify() {
            self.discard();
            return Err(Failure { error, class: Class::Stale });
        }
        let failed = |e| Error::io("cannot keep the file", e).in_file(blob);
        self.file.sync_data().map_err(failed)?;
        fs::rename(&self.path, blob).map_err(failed)?;
        blob.parent().map(cache::sync_folder);
        Ok(())
    }

    fn discard(self) {
        let _ = fs::remove_file(&self.path);
    }

    /// Leaves what is there to the next run, if it will look for it and there is something.
    pub(super) fn leave(self, shared: bool) {
        if !shared || self.done == 0 {
            self.discard();
        }
    }

    /// Fetches what is still missing.
    pub(super) fn fill(
        &mut self,
        client: &Client,
        patience: &mut Patience,
        file: &str,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Failure> {
        let size = self.described.size;
        // Only bytes never had before count as progress: a server that makes us begin again and again brings none.
        let mut most = self.done;
        report(Event::Bytes { file, done: self.done, total: size });
        while self.done < size {
            let mut since = Instant::now();
            let Err(failure) = self.pull(client, patience, &mut since, file, report) else { continue };
            let gained = self.done.saturating_sub(most);
            most = most.max(self.done);
            match failure.class {
                Class::Stale => return Err(failure),
                Class::Restart => self.reset()?,
                _ => {}
            }
            let (wait, error) = patience.wait(failure, since.elapsed(), gained, size)?;
            report(Event::Retry { file, wait, reason: &error });
            std::thread::sleep(wait);
        }
        Ok(())
    }

    /// One request for the rest of the file, which has brought next to nothing `since` then.
    fn pull(
        &mut self,
        client: &Client,
        patience: &Patience,
        since: &mut Instant,
        file: &str,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Failure> {
        let size = self.described.size;
        let span = patience.span();
        let content = client.open(&self.described.url, self.done, span)?;
        match content.part {
            // The server ignores ranges.
            None if self.done > 0 => self.reset()?,
            None => {}
            Some((first, _)) if first != self.done || content.gzip => {
                let what = format!("asked for byte {} and after, got byte {first} and after", self.done);
                return Err(Failure::new(Class::Restart, what));
            }
            Some((_, Some(total))) if total != size => {
                let what = format!("the file has {total} bytes where it lies; the hub says {size}");
                return Err(Failure::new(Class::Stale, what));
            }
            Some(_) => {}
        }
        let missing = size.saturating_sub(self.done);
        let Content { part, length, gzip, body } = content;
        // A part may end before the file does.
        if let (false, Some(length)) = (gzip, length)
            && (length > missing || length < missing && part.is_none())
        {
            let what = format!("the answer has {length} bytes; by the size that the hub says {missing} are missing");
            return Err(Failure::new(Class::Stale, what));
        }
        let body = body.into_reader();
        let body: Box<dyn Read> = if gzip { Box::new(flate2::read::MultiGzDecoder::new(body)) } else { Box::new(body) };
        let mut body = body.take(missing);
        let mut buffer = vec![0; cache::CHUNK];
        let before = (self.done, self.hasher.clone());
        // Only bytes of the file renew the time: a server can send framing and nothing else for ever.
        let floor = u128::from(SLOWEST_BYTES_PER_S).saturating_mul(span.as_millis()) / 1000;
        let mut in_span = 0_u64;
        let may_add = (missing / 2).saturating_add(FRAMING_BYTES);
        client.meter.start(Duration::ZERO, missing.saturating_add(may_add));
        while self.done < size {
            client.meter.renew(patience.timeout.min(span.saturating_sub(since.elapsed())));
            let count = match body.read(&mut buffer) {
                Ok(0) => {
                    return Err(Failure::transient(format!("the connection ended at byte {} of {size}", self.done)));
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let (what, class) = if client.meter.is_spent() {
                        let what = format!("over {may_add} bytes more than the {missing} that are missing");
                        (what, Class::Final)
                    } else if since.elapsed() >= span {
                        let what = format!("only {in_span} bytes in {:.1} s", since.elapsed().as_secs_f64());
                        (what, Class::Transient(None))
                    } else {
                        (format!("the connection broke at byte {} of {size}", self.done), Class::Transient(None))
                    };
                    if is_malformed(&error) {
                        // Not cut off but wrong: where the bytes end and the error begins, nobody knows.
                        self.cut(before.0, before.1)?;
                    }
                    let mut failure = Failure::new(class, what);
                    failure.error = failure.error.with_source(error);
                    return Err(failure);
                }
            };
            self.append(buffer.get(..count).unwrap_or_default())?;
            report(Event::Bytes { file, done: self.done, total: size });
            in_span = in_span.saturating_add(count as u64);
            if u128::from(in_span) >= floor {
                (*since, in_span) = (Instant::now(), 0);
            }
        }
        Ok(())
    }
}

/// Whether the body is not what HTTP or gzip allows, other than by its early end.
fn is_malformed(error: &io::Error) -> bool {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<ureq::Error>());
    matches!(cause, Some(ureq::Error::Protocol(_)))
        || matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput)
}
