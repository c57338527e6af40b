//! One line on stderr that shows how far something is: share, amount, rate, time left.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Repaints are at least so far apart.
const REPAINT: Duration = Duration::from_millis(100);
const BAR_CELLS: u64 = 24;

/// A progress line; silent unless stderr is a terminal.
pub(crate) struct Progress {
    visible: bool,
    label: String,
    unit: Unit,
    start: Instant,
    /// Where the count stood at the start: what earlier runs did says nothing of the rate.
    first: Option<u64>,
    painted: Option<Instant>,
}

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Shown as B, kB, MB, GB.
    Bytes,
}

impl Progress {
    pub(crate) fn new(label: &str, unit: Unit) -> Self {
        Progress {
            visible: std::io::stderr().is_terminal(),
            label: label.to_owned(),
            unit,
            start: Instant::now(),
            first: None,
            painted: None,
        }
    }

    /// Shows that `done` of `total` are done; cheap to call often.
    pub(crate) fn set(&mut self, done: u64, total: u64) {
        let first = *self.first.get_or_insert(done);
        let is_due = self.painted.is_none_or(|at| at.elapsed() >= REPAINT) || done == total;
        if self.visible && is_due {
            self.painted = Some(Instant::now());
            let line = line(&self.label, self.unit, done, total, done.saturating_sub(first), self.start.elapsed());
            let _ = write!(std::io::stderr(), "\r{line}\x1b[K");
        }
    }

    /// A message on a line of its own; the progress line moves below it.
    pub(crate) fn note(&mut self, message: &str) {
        if self.visible {
            let _ = writeln!(std::io::stderr(), "\r{message}\x1b[K");
            self.painted = None;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.painted.is_some() {
            let _ = writeln!(std::io::stderr());
        }
    }
}

/// `cc_weights.pt [########        ]  33 %  200 MB of 604 MB  50.1 MB/s  8 s left`; `new` were done in `time`.
fn line(label: &str, unit: Unit, done: u64, total: u64, new: u64, time: Duration) -> String {
    let share = |of: u64| if total == 0 { of } else { (u128::from(of) * u128::from(done) / u128::from(total)) as u64 };
    let cells = share(BAR_CELLS).min(BAR_CELLS) as usize;
    let bar = format!("{}{}", "#".repeat(cells), " ".repeat(BAR_CELLS as usize - cells));
    let mut line =
        format!("{label} [{bar}] {:3} %  {} of {}", share(100).min(100), amount(unit, done), amount(unit, total));
    let seconds = time.as_secs_f64();
    if new > 0 && seconds > 0.5 {
        let rate = new as f64 / seconds;
        line += &format!("  {}/s", amount(unit, rate as u64));
        if done < total {
            line += &format!("  {} left", duration((total - done) as f64 / rate));
        }
    }
    line
}

/// Three digits and a decimal unit.
fn amount(unit: Unit, count: u64) -> String {
    match unit {
        Unit::Bytes => {
            let mut value = count as f64;
            let mut names = ["B", "kB", "MB", "GB", "TB"].into_iter();
            let mut name = names.next().unwrap_or_default();
            while value >= 999.5 {
                let Some(next) = names.next() else { break };
                value /= 1000.0;
                name = next;
            }
            let decimals = if name == "B" || value >= 99.95 { 0 } else { 1 };
            format!("{value:.decimals$} {name}")
        }
    }
}

/// Seconds in words.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.ceil().min(1e9) as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let at = |done, total, new, s| line("w.pt", Unit::Bytes, done, total, new, Duration::from_secs(s));
        assert_eq!(at(0, 604_000_000, 0, 0), "w.pt [                        ]   0 %  0 B of 604 MB");
        assert_eq!(
            at(302_000_000, 604_000_000, 100_000_000, 4),
            "w.pt [############            ]  50 %  302 MB of 604 MB  25.0 MB/s  13 s left"
        );
        assert_eq!(at(2_000, 2_000, 2_000, 1), "w.pt [########################] 100 %  2.0 kB of 2.0 kB  2.0 kB/s");
        assert_eq!(at(0, 0, 0, 0), "w.pt [########################] 100 %  0 B of 0 B");
        assert_eq!(at(u64::MAX, u64::MAX, 0, 1).matches('#').count(), 24);
    }

    #[test]
    fn amounts_and_durations() {
        let bytes = |count| amount(Unit::Bytes, count);
        assert_eq!([bytes(999), bytes(1_000), bytes(99_960), bytes(999_499)], ["999 B", "1.0 kB", "100 kB", "999 kB"]);
        assert_eq!([bytes(999_500), bytes(4_500_000_000)], ["1.0 MB", "4.5 GB"]);
        assert_eq!([duration(0.2), duration(61.0), duration(7321.0)], ["1 s", "1 min 01 s", "2 h 02 min"]);
    }
}
