//! Bytes in files and in memory: a cursor that cannot leave them, and blocks moved by way of one small buffer.

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

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::tensor::Values;
use crc32fast::Hasher as Crc32;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};

/// Bytes moved at a time. A multiple of every element's size.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// Memory is touched so far ahead of being read into.
const TOUCHED_BYTES: usize = 4 << 20;

/// By so many threads at most.
const MOST_TOUCHING: usize = 8;

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

/// Opens a regular file. Others are refused before: opening a FIFO waits for whoever writes to it, and a device may have no end.
pub(crate) fn open_file(path: &Path) -> Result<File> {
    let cannot = |e| Error::io("cannot open", e).in_file(path);
    let kind = std::fs::metadata(path).map_err(cannot)?.file_type();
    match (kind.is_file(), kind.is_dir()) {
        (true, _) => File::open(path).map_err(cannot),
        (_, true) => Err(Error::format("a folder, not a file").in_file(path)),
        _ => Err(Error::format("no regular file but a device, a FIFO or a socket").in_file(path)),
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
    let room = usize::try_from(all.end.saturating_sub(all.start)).unwrap_or(usize::MAX).min(PIECE_BYTES);
    if buffer.len() < room {
        buffer.resize(room, 0);
    }
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
    Ok(crc.finalize())
}

/// The `count` elements that `reader` is at, read straight into their place, and the checksum of their bytes.
pub(crate) fn read_elements(mut reader: impl Read, dtype: Dtype, count: usize) -> Result<(Values, u32)> {
    let mut values = Values::try_zeroed(dtype, count)?;
    let Some(bytes) = values.as_mut_le_bytes() else {
        let mut values = Values::try_with_capacity(dtype, count)?;
        let bytes = (count as u64).saturating_mul(dtype.size_bytes() as u64);
        let crc = pump(reader, &mut Vec::new(), 0..bytes, &(0..bytes), &mut |bytes| {
            values.push_le_bytes(bytes);
            Ok(())
        })?;
        return Ok((values, crc));
    };
    let (mut crc, mut at, end) = (Crc32::new(), 0usize, bytes.len());
    let mut take = |piece: &mut [u8]| {
        let filled = fill(&mut reader, piece);
        let filled = filled.map_err(|e| Error::io(format!("cannot read on at byte {at} of {end}"), e))?;
        at = at.saturating_add(filled);
        crc.update(piece);
        match filled == piece.len() {
            true => Ok(()),
            false => Err(Error::format(format!("the data ends at byte {at}, {end} are needed"))),
        }
    };
    if end <= TOUCHED_BYTES {
        bytes.chunks_mut(PIECE_BYTES).try_for_each(take)?;
        return Ok((values, crc.finalize()));
    }
    // The system clears each page of new memory when it is first touched, which takes longer than to read the file: other
    // threads, some pieces ahead, have it done. Piece i comes from thread i modulo their number.
    let threads = crate::threads::available().min(MOST_TOUCHING);
    let mut shares: Vec<Vec<&mut [u8]>> = (0..threads).map(|_| Vec::new()).collect();
    for (i, piece) in bytes.chunks_mut(PIECE_BYTES).enumerate() {
        if let Some(share) = i.checked_rem(threads).and_then(|i| shares.get_mut(i)) {
            share.push(piece);
        }
    }
    std::thread::scope(|scope| {
        let mut touched: Vec<Receiver<&mut [u8]>> = Vec::new();
        for share in shares {
            let (sender, receiver) = sync_channel(TOUCHED_BYTES / PIECE_BYTES);
            touched.push(receiver);
            let touch = move || {
                share.into_iter().try_for_each(|piece| {
                    piece.fill(0);
                    sender.send(piece) // Fails where reading has failed.
                })
            };
            let thread = std::thread::Builder::new().spawn_scoped(scope, touch);
            thread.map_err(|e| Error::io("cannot start a thread", e))?;
        }
        touched.iter().cycle().map_while(|touched| touched.recv().ok()).try_for_each(&mut take)
    })?;
    if at < end {
        return Err(Error::format(format!("{at} of {end} bytes were read"))); // A thread of ours has ended early.
    }
    Ok((values, crc.finalize()))
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
        self.seek(reader)?;
        pump(reader, &mut Vec::new(), 0..bytes, &(0..bytes), sink)
    }

    /// The elements.
    pub(crate) fn read<R: Read + Seek>(self, reader: &mut R) -> Result<Values> {
        self.seek(reader)?;
        Ok(read_elements(reader, self.dtype, self.elements)?.0)
    }

    fn seek(self, reader: &mut impl Seek) -> Result<()> {
        let to = reader.seek(SeekFrom::Start(self.at));
        to.map(drop).map_err(|e| Error::io(format!("cannot seek to byte {}", self.at), e))
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
            assert_eq!(crc.unwrap(), crc32fast::hash(&bytes));
            assert_eq!(got, bytes[wanted.start as usize..wanted.end as usize]);
        }
        let cut = pump(&bytes[..10], &mut Vec::new(), 0..11, &(0..11), &mut |_| Ok(())).unwrap_err();
        assert!(cut.to_string().contains("ends at byte 10, 11 are needed"), "{cut}");
    }

    #[test]
    fn elements_are_read_in_place_whatever_their_number_and_type() {
        let bytes: Vec<u8> = (0..3 * TOUCHED_BYTES as u32).map(|i| (i % 251) as u8).collect();
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::I64, Dtype::U8, Dtype::Bool] {
            for len in [0, 8, PIECE_BYTES, PIECE_BYTES + 8, TOUCHED_BYTES, TOUCHED_BYTES + 8, bytes.len()] {
                let (count, bytes) = (len / dtype.size_bytes(), &bytes[..len]);
                let mut pushed = Values::with_capacity(dtype, count);
                pushed.push_le_bytes(bytes);
                let (values, crc) = read_elements(bytes, dtype, count).unwrap();
                let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                values.le_bytes(0, count, &mut ours);
                pushed.le_bytes(0, count, &mut theirs);
                assert!(ours == theirs && values.len() == count, "{len} bytes of {dtype}");
                assert_eq!(crc, crc32fast::hash(bytes), "{len} bytes of {dtype}");
                if len > 0 {
                    let error = read_elements(&bytes[1..], dtype, count).unwrap_err().to_string();
                    assert!(error.contains(&format!("ends at byte {}, {len} are needed", len - 1)), "{error}");
                }
            }
        }
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
