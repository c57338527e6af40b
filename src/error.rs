//! One error type: what was being done, where, what was needed and what was found.

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

use std::fmt::{self, Write};
use std::path::Path;

/// What [`crate`] returns when something fails.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in classes a caller may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused: no such file, no space, no permission.
    Io,
    /// Bytes are not what their format requires: truncated, inconsistent, wrong checksum.
    Format,
    /// The input is well-formed and recognised, but this crate does not carry it (a legacy file, an unknown global).
    Unsupported,
    /// An array's shape does not fit.
    Shape,
    /// A configuration key is missing, ill-typed or out of range.
    Config,
    /// A number is NaN or infinite where it must not be.
    NonFinite,
    /// A server or the connection to it failed.
    Network,
    /// A server says that there is no such file.
    Absent,
    /// Another process holds the file or folder.
    Locked,
    /// The device (GPU, driver) failed or is not there.
    Device,
    /// The caller asked for something that contradicts itself.
    Usage,
}

/// An error that says where it happened, what was needed and what was found.
///
/// [`std::fmt::Display`] prints one line, outermost place first:
/// `0.pt: data.pkl, byte 118: global 'os.system' is not allowed`. What names in a file may do to a terminal is escaped, see
/// [`printable`].
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    /// Places, innermost first.
    places: Vec<String>,
    what: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of this kind; `what` says what was needed and what was found.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Error(Box::new(Inner { kind, places: Vec::new(), what: what.into(), source: None }))
    }

    /// [`ErrorKind::Format`].
    pub fn format(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Format, what)
    }

    /// [`ErrorKind::Unsupported`].
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, what)
    }

    /// [`ErrorKind::Shape`].
    pub fn shape(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Shape, what)
    }

    /// [`ErrorKind::Config`].
    pub fn config(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, what)
    }

    /// [`ErrorKind::Usage`].
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, what)
    }

    /// [`ErrorKind::Io`]: `what` was being done when the operating system answered `source`.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, what).with_source(source)
    }

    /// The same error with its cause.
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same error, one place further out: a file, an entry, a key. A place that is the outermost already is not said twice.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        let place = place.to_string();
        if self.0.places.last() != Some(&place) {
            self.0.places.push(place);
        }
        self
    }

    /// The same error in the file at `path`.
    pub fn in_file(self, path: &Path) -> Self {
        self.at(path.display())
    }

    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Printable(f);
        for place in self.0.places.iter().rev() {
            write!(out, "{place}: ")?;
        }
        write!(out, "{}", self.0.what)?;
        match &self.0.source {
            Some(source) => write!(out, ": {source}"),
            None => Ok(()),
        }
    }
}

/// Whether a terminal does more than show the character: control characters, separators of lines, and those that turn the
/// direction of writing, so that a name looks like another.
pub fn acts_on_a_terminal(c: char) -> bool {
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    turns || c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')
}

/// Text from a file for a terminal: what [acts on it](acts_on_a_terminal), newlines too, is escaped.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Writing to a string cannot fail.
    let _ = Printable(&mut out).write_str(text);
    out
}

struct Printable<W>(W);

impl<W: Write> Write for Printable<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match acts_on_a_terminal(c) {
            true => write!(self.0, "{}", c.escape_default()),
            false => self.0.write_char(c),
        })
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.source {
            Some(source) => Some(source.as_ref()),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_places_from_the_outside_in() {
        let io = std::io::Error::other("disk on fire");
        let error = Error::io("cannot read", io).at("data.pkl").in_file(Path::new("0.pt"));
        assert_eq!(error.to_string(), "0.pt: data.pkl: cannot read: disk on fire");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(std::error::Error::source(&error).is_some());
        assert_eq!(error.in_file(Path::new("0.pt")).to_string(), "0.pt: data.pkl: cannot read: disk on fire");
    }

    #[test]
    fn a_name_from_a_file_does_nothing_to_a_terminal() {
        let source = std::io::Error::other("a\u{9b}b");
        let error = Error::io("é 重み \u{1b}[31m\r\n\0", source).at("x\ty\u{7f}");
        assert_eq!(error.to_string(), "x\\ty\\u{7f}: é 重み \\u{1b}[31m\\r\\n\\u{0}: a\\u{9b}b");
        assert_eq!(printable("W\u{202e}cne\u{2028}\u{2066}e\u{301}"), "W\\u{202e}cne\\u{2028}\\u{2066}e\u{301}");
    }
}
