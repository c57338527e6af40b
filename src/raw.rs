//! Bytes in files and in memory: a cursor that cannot leave them, and blocks moved by way of one small buffer.

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

use crate::crc32::Crc32;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::tensor::Values;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

/// Bytes moved at a time. A multiple of every element's size.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// Bytes, and how far they have been read.
#[derive(Clone, Debug)]
pub(crate) struct Bytes<'a> {
    rest: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    pub(crate) fn new(all: &'a [u8]) -> Self {
        Bytes { rest: all, at: 0 }
    }

    /// How many bytes have been read.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// How many bytes are left.
    pub(crate) fn left(&self) -> usize {
        self.rest.len()
    }

    /// The next `n` bytes, if there are as many.
    pub(crate) fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n)?;
        self.rest = rest;
        self.at = self.at.saturating_add(n);
        Some(head)
    }

    /// The next `N` bytes, if there are as many.
    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// The bytes before the next newline, which is taken too.
    pub(crate) fn line(&mut self) -> Option<&'a [u8]> {
        let n = self.rest.iter().position(|&b| b == b'\n')?;
        let line = self.take(n)?;
        self.take(1)?;
        Some(line)
    }
}

/// Fills as much of `buffer` as there are bytes.
pub(crate) fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0usize;
    while let Some(room) = buffer.get_mut(filled..)
        && !room.is_empty()
    {
        match reader.read(room) {
            Ok(0) => break,
            Ok(n) => filled = filled.saturating_add(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// Up to `n` bytes from `at`, fewer at the end of the file. `n` is small or known to lie in the file.
pub(crate) fn read_at<R: Read + Seek>(reader: &mut R, at: u64, n: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; n];
    let read = reader.seek(SeekFrom::Start(at)).and_then(|_| fill(reader, &mut bytes));
    let filled = read.map_err(|e| Error::io(format!("cannot read {n} bytes at byte {at}"), e))?;
    bytes.truncate(filled);
    Ok(bytes)
}

/// The file's length.
pub(crate) fn length(reader: &mut impl Seek) -> Result<u64> {
    reader.seek(SeekFrom::End(0)).map_err(|e| Error::io("cannot find the file's length", e))
}

/// Reads what lies at positions `all.start` to `all.end` of something, where `reader` is at the first, and hands the part in
/// `wanted` to `sink`, in pieces that begin at multiples of [`PIECE_BYTES`] from `all.start`. Returns the checksum of all.
pub(crate) fn pump(
    mut reader: impl Read,
    buffer: &mut Vec<u8>,
    all: Range<u64>,
    wanted: &Range<u64>,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<u32> {
    buffer.resize(PIECE_BYTES, 0);
    let mut crc = Crc32::new();
    let (mut at, end) = (all.start, all.end);
    while at < end {
        let left = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(PIECE_BYTES);
        let room = buffer.get_mut(..left).unwrap_or_default();
        let filled =
            fill(&mut reader, room).map_err(|e| Error::io(format!("cannot read on at byte {at} of {end}"), e))?;
        let next = at.saturating_add(filled as u64);
        if filled < left {
            return Err(Error::format(format!("the data ends at byte {next}, {end} are needed")));
        }
        crc.update(room);
        let from = wanted.start.max(at).saturating_sub(at);
        let to = wanted.end.min(next).saturating_sub(at);
        if from < to
            && let (Ok(from), Ok(to)) = (usize::try_from(from), usize::try_from(to))
            && let Some(part) = room.get(from..to)
        {
            sink(part)?;
        }
        at = next;
    }
    Ok(crc.value())
}

/// Elements that lie in a file as they are, one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) dtype: Dtype,
    /// The first element's byte.
    pub(crate) at: u64,
    /// The number of elements. The caller has seen that they lie in the file.
    pub(crate) elements: usize,
}

impl Block {
    /// The part of it that is `rows` of `count` rows of equal length.
    pub(crate) fn rows(self, rows: &Range<usize>, count: usize) -> Option<Self> {
        let taken = rows.end.checked_sub(rows.start).filter(|_| rows.end <= count)?;
        let each = self.elements.checked_div(count).unwrap_or(0);
        let skipped = (each.checked_mul(rows.start)? as u64).checked_mul(self.dtype.size_bytes() as u64)?;
        Some(Block { at: self.at.checked_add(skipped)?, elements: each.checked_mul(taken)?, ..self })
    }

    /// Hands the bytes to `sink`; returns their checksum.
    pub(crate) fn stream<R: Read + Seek>(
        self,
        reader: &mut R,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<u32> {
        let bytes = (self.elements as u64).saturating_mul(self.dtype.size_bytes() as u64);
        reader.seek(SeekFrom::Start(self.at)).map_err(|e| Error::io(format!("cannot seek to byte {}", self.at), e))?;
        pump(reader, &mut Vec::new(), 0..bytes, &(0..bytes), sink)
    }

    /// The elements.
    pub(crate) fn read<R: Read + Seek>(self, reader: &mut R) -> Result<Values> {
        let mut values = Values::try_with_capacity(self.dtype, self.elements)?;
        self.stream(reader, &mut |bytes| {
            values.push_le_bytes(bytes);
            Ok(())
        })?;
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_stays_inside() {
        let mut b = Bytes::new(b"\x01\x02\x03ab\ncd");
        assert_eq!(b.u32(), Some(0x6103_0201));
        assert_eq!((b.at(), b.left()), (4, 4));
        assert_eq!(b.u64(), None);
        assert_eq!(b.line(), Some(&b"b"[..]));
        assert_eq!(b.line(), None);
        assert_eq!(b.take(3), None);
        assert_eq!(b.u16(), Some(u16::from_le_bytes(*b"cd")));
        assert_eq!((b.take(0), b.take(1)), (Some(&b""[..]), None));
    }

    #[test]
    fn pieces_meet_at_any_length() {
        let bytes: Vec<u8> = (0..600_000u32).map(|i| (i % 251) as u8).collect();
        for wanted in [0..600_000, 1..2, 262_143..262_145, 599_999..600_000, 5..5] {
            let mut got = Vec::new();
            let crc = pump(&bytes[..], &mut Vec::new(), 0..600_000, &wanted, &mut |b| {
                got.extend_from_slice(b);
                Ok(())
            });
            assert_eq!(crc.unwrap(), crate::crc32::crc32(&bytes));
            assert_eq!(got, bytes[wanted.start as usize..wanted.end as usize]);
        }
        let cut = pump(&bytes[..10], &mut Vec::new(), 0..11, &(0..11), &mut |_| Ok(())).unwrap_err();
        assert!(cut.to_string().contains("ends at byte 10, 11 are needed"), "{cut}");
    }

    #[test]
    fn rows_of_a_block() {
        let block = Block { dtype: Dtype::F32, at: 100, elements: 12 };
        let part = block.rows(&(1..3), 4).unwrap();
        assert_eq!((part.at, part.elements), (112, 6));
        assert!(block.rows(&(1..5), 4).is_none());
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = 3..1;
        assert!(block.rows(&backwards, 4).is_none());
        assert_eq!(Block { elements: 0, ..block }.rows(&(0..0), 0).unwrap().elements, 0);
    }
}
