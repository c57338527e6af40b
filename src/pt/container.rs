//! The zip archive under a `.pt` file: its directory, checked in full, and its records, streamed.
//!
//! Readers of zip files disagree on files that contradict themselves (two records of one name, a local header that
//! differs from the directory, records that overlap), so a file can be one thing to the one who checks it and another to
//! the one who loads it. Here the directory rules, and whatever contradicts it is refused. PyTorch finds records by name
//! without regard to the case of ASCII letters: names that only so differ are refused, too. Stored records are read from
//! their place in the file; deflated ones are decoded by the `zip` crate, one record at a time. Every byte that is handed
//! out has passed the record's checksum in the end, or the call fails.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::magic;
use crate::raw::{Bytes, length, pump, read_at, read_elements};
use crate::tensor::Values;
use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

/// A deflated record that claims to be larger than this ...
const BOMB_BYTES: u64 = 16 << 20;
/// ... and so many times its packed size is refused; so are all of them together. Deflate reaches 1032, weights do not reach 10.
const BOMB_RATIO: u64 = 200;
/// A directory larger than this is refused: it is held in memory, and 1,000,000 records fit.
const DIRECTORY_BYTES: u64 = 128 << 20;

/// Headers are read by so many bytes at a time.
const WINDOW_BYTES: usize = 4 << 10;

const LOCAL_BYTES: u64 = 30;
const END_BYTES: usize = 22;
const LOCATOR_BYTES: u64 = 20;
const END64_BYTES: u64 = 56;

/// Flag bits: encrypted, sizes follow the data, patched data, strong encryption, masked headers.
const ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;
const DESCRIPTOR: u16 = 1 << 3;
const PATCHED: u16 = 1 << 5;

const STORED: u16 = 0;
const DEFLATED: u16 = 8;

/// One record of the archive, as the directory has it.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) name: String,
    flags: u16,
    method: u16,
    crc: u32,
    packed: u64,
    /// Bytes of the record's data, unpacked.
    pub(crate) size: u64,
    header: u64,
    /// Where the data begins, or how the record's local header contradicts the directory.
    data: Result<u64, String>,
    /// Whether the checksum has been found right (or none was written).
    verified: bool,
}

/// An archive whose directory has been checked.
pub(crate) struct Container<R> {
    reader: R,
    pub(crate) records: Vec<Record>,
    /// The bytes of all records, unpacked.
    pub(crate) held: u64,
    /// By names in lower case.
    by_name: HashMap<String, usize>,
    buffer: Vec<u8>,
    /// Bytes that were read or unpacked so far: what a hostile file made its reader do.
    pub(crate) work: u64,
}

impl<R> std::fmt::Debug for Container<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container").field("records", &self.records).finish_non_exhaustive()
    }
}

impl<R: Read + Seek> Container<R> {
    /// Reads and checks the directory.
    pub(crate) fn open(mut reader: R) -> Result<Self> {
        let length = length(&mut reader)?;
        let head = read_at(&mut reader, 0, magic::HEAD_BYTES)?;
        match magic::kind(&head) {
            magic::Kind::Zip => {}
            magic::Kind::Npy => return Err(not_zip("a numpy array (.npy)")),
            magic::Kind::Safetensors => return Err(not_zip("a safetensors file")),
            magic::Kind::Other(what) => return Err(not_zip(what)),
            magic::Kind::Unknown => {
                return Err(Error::format(format!(
                    "not a .pt file: it must begin with a zip record, `PK\\x03\\x04`, and begins with {:02x?}",
                    head.get(..4).unwrap_or(&head)
                )));
            }
        }
        let end = End::find(&mut reader, length)?;
        let mut records = read_directory(&mut reader, &end)?;
        let mut by_name = HashMap::with_capacity(records.len());
        for (index, record) in records.iter().enumerate() {
            let name = &record.name;
            let before = by_name.insert(name.to_ascii_lowercase(), index).and_then(|i| records.get(i));
            if let Some(before) = before {
                return Err(Error::format(match before.name == *name {
                    true => format!("duplicate record: the name {name:?} is there twice"),
                    false => format!("duplicate record: to PyTorch, {name:?} and {:?} are one name", before.name),
                }));
            }
        }
        let sum = |bytes: fn(&Record) -> u64| {
            let deflated = records.iter().filter(|r| r.method == DEFLATED);
            deflated.fold(0u64, |n, r| n.saturating_add(bytes(r)))
        };
        let (size, packed) = (sum(|r| r.size), sum(|r| r.packed));
        if is_bomb(size, packed) {
            return Err(Error::format(format!(
                "its records are deflated from {size} to {packed} bytes, a ratio above the limit of {BOMB_RATIO} for large files"
            )));
        }
        check_places(&mut reader, &mut records, end.directory.start)?;
        let held = records.iter().fold(0u64, |n, r| n.saturating_add(r.size));
        Ok(Container { reader, records, held, by_name, buffer: Vec::new(), work: 0 })
    }

    /// The record of this name, if there is one. One that has it in another case is what PyTorch would find.
    pub(crate) fn find(&self, name: &str) -> Result<Option<usize>> {
        let Some(&index) = self.by_name.get(&name.to_ascii_lowercase()) else { return Ok(None) };
        match self.records.get(index) {
            Some(record) if record.name != name => Err(spelled(name, &record.name)),
            _ => Ok(Some(index)),
        }
    }

    /// The record itself, if its local header agrees with the directory.
    pub(crate) fn record(&self, index: usize) -> Result<&Record> {
        let record = self.records.get(index).ok_or_else(|| Error::usage(format!("there is no record {index}")))?;
        match &record.data {
            Ok(_) => Ok(record),
            Err(fault) => {
                Err(Error::format(format!("the local header contradicts the directory: {fault}")).at(&record.name))
            }
        }
    }

    /// Whether the record's bytes lie in the file as they are.
    pub(crate) fn is_stored(&self, index: usize) -> bool {
        self.records.get(index).is_some_and(|r| r.method == STORED)
    }

    /// Whether the record has been read in full and its checksum been right.
    pub(crate) fn is_verified(&self, index: usize) -> bool {
        self.records.get(index).is_some_and(|r| r.verified)
    }

    /// Hands the record's bytes in `range` to `sink`, in pieces that are whole multiples of 8 bytes but for the last. The
    /// whole record is read and its checksum compared, unless it is stored and that has been done before. The result is the
    /// checksum of the whole record where it was computed.
    pub(crate) fn stream(
        &mut self,
        index: usize,
        range: Range<u64>,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Option<u32>> {
        let record = self.record(index)?;
        let (name, method, verified) = (record.name.clone(), record.method, record.verified);
        let (packed, size) = (record.packed, record.size);
        let data = record.data.as_ref().copied().unwrap_or_default();
        if range.start > range.end || range.end > size {
            return Err(Error::format(format!("bytes {range:?} were asked for, it has {size}")).at(name));
        }
        let partial = verified && method == STORED;
        let (from, count) = match partial {
            true => (data.checked_add(range.start), range.end.saturating_sub(range.start)),
            false => (Some(data), packed),
        };
        let reader = &mut self.reader;
        let seek = from.map(|from| reader.seek(SeekFrom::Start(from)));
        seek.transpose().map_err(|e| Error::io("cannot seek", e).at(&name))?;
        self.work = self.work.saturating_add(if partial { count } else { size });

        let result = if method == STORED {
            let start = if partial { range.start } else { 0 };
            let reader = reader.take(count);
            pump(reader, &mut self.buffer, start..start.saturating_add(count), &range, sink)
        } else {
            let mut packed = Packed::new(reader, packed);
            unpack(&mut packed, &mut self.buffer, size, &range, sink)
        };
        let crc = result.map_err(|e| e.at(&name))?;
        match partial {
            true => Ok(None),
            false => self.verify(index, crc).map(Some),
        }
    }

    /// All of a stored record as `count` elements, which are read straight into their place.
    pub(crate) fn read_elements(&mut self, index: usize, dtype: Dtype, count: usize) -> Result<Values> {
        let record = self.record(index)?;
        let (name, size) = (record.name.clone(), record.size);
        let data = record.data.as_ref().copied().unwrap_or_default();
        if record.method != STORED || (count as u64).checked_mul(dtype.size_bytes() as u64) != Some(size) {
            return Err(Error::usage(format!("not stored as {count} elements of {dtype}")).at(name));
        }
        self.reader.seek(SeekFrom::Start(data)).map_err(|e| Error::io("cannot seek", e).at(&name))?;
        self.work = self.work.saturating_add(size);
        let (values, crc) = read_elements(&mut self.reader, dtype, count).map_err(|e| e.at(name))?;
        self.verify(index, crc)?;
        Ok(values)
    }

    /// Compares the checksum of a record that was read in full.
    fn verify(&mut self, index: usize, crc: u32) -> Result<u32> {
        if let Some(record) = self.records.get_mut(index) {
            // 0 here and (they agree) everywhere else: no checksum was written.
            if record.crc != 0 && record.crc != crc {
                let what = format!("checksum (CRC-32) is {crc:08x}, the directory has {:08x}", record.crc);
                return Err(Error::format(what).at(&record.name));
            }
            record.verified = true;
        }
        Ok(crc)
    }

    /// The whole record, of at most `limit` bytes.
    pub(crate) fn read_all(&mut self, index: usize, limit: u64) -> Result<Vec<u8>> {
        let record = self.record(index)?;
        let size = record.size;
        if size > limit {
            return Err(Error::unsupported(format!("{size} bytes; the limit is {limit}")).at(&record.name));
        }
        let mut bytes = Vec::new();
        self.stream(index, 0..size, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    }
}

/// A record that PyTorch takes for `needed`, and is named otherwise.
pub(crate) fn spelled(needed: &str, found: &str) -> Error {
    Error::format(format!("the record {needed:?} is spelled {found:?}, in another case"))
}

fn not_zip(what: &str) -> Error {
    Error::unsupported(format!("not a .pt file of torch.save but {what}"))
}

/// A deflated record as the `zip` crate reads one from a stream: a local header, made up here, and the packed bytes.
struct Packed<'a, R> {
    header: io::Cursor<[u8; 30]>,
    reader: &'a mut R,
    left: u64,
    /// Set when a byte beyond the last was asked for: the decoder has consumed all of them.
    exhausted: std::rc::Rc<Cell<bool>>,
    packed: u64,
}

impl<'a, R: Read> Packed<'a, R> {
    fn new(reader: &'a mut R, packed: u64) -> Self {
        let mut header = [0; 30];
        // Signature, version 2.0, flags, method; the rest, among it the lengths of name and extra field, stays 0.
        for (to, from) in header.iter_mut().zip(*b"PK\x03\x04\x14\0\x08\0\x08\0") {
            *to = from;
        }
        Packed { header: io::Cursor::new(header), reader, left: packed, exhausted: Default::default(), packed }
    }
}

impl<R: Read> Read for Packed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.header.read(buffer)?;
        if n > 0 || buffer.is_empty() {
            return Ok(n);
        }
        if self.left == 0 {
            self.exhausted.set(true);
            return Ok(0);
        }
        let n = (&mut *self.reader).take(self.left).read(buffer)?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends inside the record"));
        }
        self.left = self.left.saturating_sub(n as u64);
        Ok(n)
    }
}

/// Unpacks a deflated record that must be `size` bytes and end with its last packed byte. Returns its checksum.
fn unpack<R: Read>(
    packed: &mut Packed<'_, R>,
    buffer: &mut Vec<u8>,
    size: u64,
    range: &Range<u64>,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<u32> {
    let corrupt = |e: &dyn std::fmt::Display| Error::format(format!("corrupt deflate stream: {e}"));
    let (exhausted, packed_bytes) = (packed.exhausted.clone(), packed.packed);
    // One more than there are, so that the decoder's wish for a byte beyond the last reaches `Packed::read`.
    let options = zip::ZipReadOptions::new()
        .override_compressed_size(packed_bytes.saturating_add(1))
        .override_uncompressed_size(size)
        .ignore_crc32(true);
    let file = zip::read::read_zipfile_from_stream_with_options(packed, options).map_err(|e| corrupt(&e))?;
    let mut file = file.ok_or_else(|| corrupt(&"no record"))?;
    let crc = pump(&mut file, buffer, 0..size, range, sink)?;
    // The first read may be what makes the decoder see the end; the second then finds its input used up, or does not.
    for _ in 0..2 {
        match file.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(corrupt(&format_args!("it goes on beyond the {size} bytes that the directory says"))),
            Err(e) => return Err(corrupt(&e)),
        }
    }
    match exhausted.get() {
        true => Ok(crc),
        false => Err(corrupt(&format_args!("it ends before the last of its {packed_bytes} packed bytes"))),
    }
}

/// What the end records say.
struct End {
    directory: Range<u64>,
    entries: u64,
}

impl End {
    fn find<R: Read + Seek>(reader: &mut R, length: u64) -> Result<Self> {
        // 22 bytes and a comment of at most 65,535, which ends the file.
        let tail_bytes = length.min(u64::from(u16::MAX).saturating_add(END_BYTES as u64));
        let tail_at = length.saturating_sub(tail_bytes);
        let tail = read_at(reader, tail_at, usize::try_from(tail_bytes).unwrap_or(usize::MAX))?;
        let found = (0..=tail.len().saturating_sub(END_BYTES)).rev().find_map(|i| {
            let mut b = Bytes::new(tail.get(i..)?);
            (b.take(4)? == b"PK\x05\x06").then_some(())?;
            let fields = (b.u16()?, b.u16()?, b.u16()?, b.u16()?, b.u32()?, b.u32()?);
            let comment = b.u16()?;
            (usize::from(comment) == b.left()).then_some((i as u64, fields))
        });
        let Some((i, (disk, directory_disk, here, entries, size, start))) = found else {
            return Err(Error::format("truncated or not a zip archive: no end record is followed by just its comment"));
        };
        let end_at = tail_at.saturating_add(i);
        let locator = match end_at.checked_sub(LOCATOR_BYTES) {
            Some(at) => Some((at, read_at(reader, at, 20)?)).filter(|(_, bytes)| bytes.starts_with(b"PK\x06\x07")),
            None => None,
        };
        let wrong = |what: String| Error::format(format!("zip end record: {what}"));
        let (records_end, disks, here64, entries64, size64, start64) = match locator {
            None => (end_at, (0, 0), here.into(), entries.into(), size.into(), start.into()),
            Some((locator_at, bytes)) => {
                let end64 = End64::read(reader, locator_at, &bytes)
                    .ok_or_else(|| wrong("the zip64 records are damaged".into()))?;
                (end64.at, end64.disks, end64.here, end64.entries, end64.size, end64.start)
            }
        };
        // The plain record holds the same numbers, or all ones where zip64 replaces them.
        let agree = |small: u64, ones: u64, large: u64| small == large || (small == ones && records_end != end_at);
        for (what, small, ones, large) in [
            ("this disk", disk.into(), 0xffff, u64::from(disks.0)),
            ("the directory's disk", directory_disk.into(), 0xffff, disks.1.into()),
            ("records on this disk", here.into(), 0xffff, here64),
            ("records", entries.into(), 0xffff, entries64),
            ("size of the directory", size.into(), 0xffff_ffff, size64),
            ("start of the directory", start.into(), 0xffff_ffff, start64),
        ] {
            if !agree(small, ones, large) {
                return Err(wrong(format!("{what} is {small}, in the zip64 record {large}")));
            }
        }
        if disks != (0, 0) {
            return Err(wrong(format!("disks {disks:?}; an archive on several disks is not read")));
        }
        if here64 != entries64 {
            return Err(wrong(format!(
                "{here64} of {entries64} records are on this disk; an archive on several disks is not read"
            )));
        }
        if start64.checked_add(size64) != Some(records_end) {
            return Err(wrong(format!(
                "a directory of {size64} bytes at byte {start64} must end where the end records begin, at byte {records_end}"
            )));
        }
        if size64 > DIRECTORY_BYTES {
            return Err(wrong(format!("a directory of {size64} bytes; the limit is {DIRECTORY_BYTES}")));
        }
        Ok(End { directory: start64..records_end, entries: entries64 })
    }
}

/// The zip64 end record.
struct End64 {
    at: u64,
    disks: (u32, u32),
    here: u64,
    entries: u64,
    size: u64,
    start: u64,
}

impl End64 {
    fn read<R: Read + Seek>(reader: &mut R, locator_at: u64, locator: &[u8]) -> Option<Self> {
        let mut b = Bytes::new(locator.get(4..)?);
        let (disk, at, disks) = (b.u32()?, b.u64()?, b.u32()?);
        (disk == 0 && disks <= 1).then_some(())?;
        // It must end where the locator begins, so nothing lies between the two.
        let length = locator_at.checked_sub(at).filter(|&n| n >= END64_BYTES)?;
        let bytes = read_at(reader, at, 56).ok()?;
        let mut b = Bytes::new(&bytes);
        (b.take(4)? == b"PK\x06\x06").then_some(())?;
        (b.u64()?.checked_add(12)? == length).then_some(())?;
        let _versions = b.u32()?;
        Some(End64 {
            at,
            disks: (b.u32()?, b.u32()?),
            here: b.u64()?,
            entries: b.u64()?,
            size: b.u64()?,
            start: b.u64()?,
        })
    }
}

/// The block with this id in an extra field. Where the field is damaged, what follows the damage is not looked at.
fn extra_block(extra: &[u8], id: u16) -> Option<&[u8]> {
    let mut b = Bytes::new(extra);
    loop {
        let (this, length) = (b.u16()?, b.u16()?);
        let block = b.take(length.into())?;
        if this == id {
            return Some(block);
        }
    }
}

fn read_directory<R: Read + Seek>(reader: &mut R, end: &End) -> Result<Vec<Record>> {
    let size = end.directory.end.saturating_sub(end.directory.start);
    let bytes = read_at(reader, end.directory.start, usize::try_from(size).unwrap_or(usize::MAX))?;
    let mut b = Bytes::new(&bytes);
    let mut records = Vec::new();
    while b.left() > 0 {
        let at = end.directory.start.saturating_add(b.at() as u64);
        records.push(read_entry(&mut b).map_err(|e| e.at(format!("zip directory, byte {at}")))?);
    }
    if records.len() as u64 != end.entries {
        let (found, said) = (records.len(), end.entries);
        return Err(Error::format(format!("the directory has {found} records, the end record says {said}")));
    }
    Ok(records)
}

fn read_entry(b: &mut Bytes<'_>) -> Result<Record> {
    let cut = || Error::format("the entry is cut off");
    if b.take(4) != Some(b"PK\x01\x02") {
        return Err(Error::format("no directory entry begins here"));
    }
    let _versions = b.u32().ok_or_else(cut)?;
    let mut next16 = || b.u16().ok_or_else(cut);
    let (flags, method, _time, _date) = (next16()?, next16()?, next16()?, next16()?);
    let mut next32 = || b.u32().ok_or_else(cut);
    let (crc, packed32, size32) = (next32()?, next32()?, next32()?);
    let mut next16 = || b.u16().ok_or_else(cut);
    let (name_bytes, extra_bytes, comment_bytes, disk, _attributes) =
        (next16()?, next16()?, next16()?, next16()?, next16()?);
    let _attributes = b.u32().ok_or_else(cut)?;
    let header32 = b.u32().ok_or_else(cut)?;
    let name = b.take(name_bytes.into()).ok_or_else(cut)?;
    let extra = b.take(extra_bytes.into()).ok_or_else(cut)?;
    let _comment = b.take(comment_bytes.into()).ok_or_else(cut)?;

    let name = str::from_utf8(name)
        .map_err(|_| Error::format(format!("the name {:?} is not UTF-8", String::from_utf8_lossy(name))))?
        .to_string();
    if name.is_empty()
        || name.starts_with('/')
        || name.contains(['\0', '\\'])
        || name.split('/').any(|part| part == "..")
    {
        return Err(Error::format(format!(
            "the name {name:?} is empty, climbs out of the archive or holds NUL or a backslash"
        )));
    }
    let wrong = |what: String| Error::format(what).at(&name);

    // All ones in a field: the zip64 block has the number, in this order.
    let mut wide = Bytes::new(extra_block(extra, 1).unwrap_or_default());
    let mut widen = |small: u32| match small {
        u32::MAX => {
            wide.u64().ok_or_else(|| wrong("a size or offset is said to be in a zip64 block and is not".into()))
        }
        small => Ok(u64::from(small)),
    };
    let (size, packed, header) = (widen(size32)?, widen(packed32)?, widen(header32)?);
    let disk = match disk {
        u16::MAX => wide.u32().unwrap_or(u32::MAX),
        disk => disk.into(),
    };
    if disk != 0 {
        return Err(wrong(format!("it begins on disk {disk}; an archive on several disks is not read")));
    }
    if flags & ENCRYPTED != 0 {
        return Err(Error::unsupported(format!("encrypted (flags {flags:04x})")).at(&name));
    }
    if flags & PATCHED != 0 {
        return Err(Error::unsupported(format!("patched data (flags {flags:04x})")).at(&name));
    }
    match method {
        STORED if packed != size => {
            return Err(wrong(format!("stored, and yet {packed} bytes packed are {size} unpacked")));
        }
        DEFLATED if is_bomb(size, packed) => {
            return Err(wrong(format!(
                "deflated from {size} to {packed} bytes, a ratio above the limit of {BOMB_RATIO} for large records"
            )));
        }
        STORED | DEFLATED => {}
        _ => {
            let what = format!("compression method {method}; only stored (0) and deflate (8) are read");
            return Err(Error::unsupported(what).at(&name));
        }
    }
    Ok(Record { name, flags, method, crc, packed, size, header, data: Ok(0), verified: false })
}

fn is_bomb(size: u64, packed: u64) -> bool {
    size > BOMB_BYTES && packed.saturating_mul(BOMB_RATIO) < size
}

/// Reads every local header, compares it with the directory, and checks that records overlap neither each other nor the
/// directory.
fn check_places<R: Read + Seek>(reader: &mut R, records: &mut [Record], directory_at: u64) -> Result<()> {
    let mut order: Vec<usize> = (0..records.len()).collect();
    order.sort_by_key(|&i| records.get(i).map(|r| r.header));
    let mut free_from = 0;
    let mut window = Window { reader, at: 0, bytes: Vec::new() };
    for i in order {
        let Some(record) = records.get_mut(i) else { continue };
        let outside =
            || Error::format(format!("it does not lie before the directory, which begins at byte {directory_at}"));
        if record.header < free_from {
            let what = format!(
                "it begins at byte {} and overlaps the record before it, which ends at {free_from}",
                record.header
            );
            return Err(Error::format(what).at(&record.name));
        }
        let room = directory_at.saturating_sub(record.header);
        let local = window.get(record.header, usize::try_from(room.min(LOCAL_BYTES)).unwrap_or_default())?;
        let Some(local) = Local::parse(local) else {
            if room < LOCAL_BYTES {
                return Err(outside().at(&record.name));
            }
            // Of a record that nobody reads, only the place matters; who reads it is told.
            record.data = Err("it has no local header".into());
            let end = LOCAL_BYTES.checked_add(record.name.len() as u64).and_then(|n| n.checked_add(record.packed));
            free_from = end
                .and_then(|n| record.header.checked_add(n))
                .filter(|&n| n <= directory_at)
                .ok_or_else(|| outside().at(&record.name))?;
            continue;
        };
        let variable = usize::from(local.name_bytes).saturating_add(local.extra_bytes.into());
        let name_at = record.header.saturating_add(LOCAL_BYTES);
        let data = name_at.saturating_add(variable as u64);
        let end =
            data.checked_add(record.packed).filter(|&n| n <= directory_at).ok_or_else(|| outside().at(&record.name))?;
        let variable = window.get(name_at, variable)?;
        let (name, extra) = variable.split_at_checked(local.name_bytes.into()).unwrap_or_default();

        let mut fault = local.contradicts(record, name, extra);
        free_from = end;
        if record.flags & DESCRIPTOR != 0 {
            let room = directory_at.saturating_sub(end).min(24);
            let after = window.get(end, usize::try_from(room).unwrap_or_default())?;
            match descriptor_bytes(record, after) {
                Some(n) => free_from = end.saturating_add(n),
                None => {
                    fault = fault
                        .or(Some("no data descriptor with its checksum (CRC-32) and sizes follows the data".into()))
                }
            }
        }
        record.data = fault.map_or(Ok(data), Err);
    }
    Ok(())
}

/// A few KiB of the file: the headers of small records lie close together.
struct Window<'a, R> {
    reader: &'a mut R,
    at: u64,
    bytes: Vec<u8>,
}

impl<R: Read + Seek> Window<'_, R> {
    /// `n` bytes from `at`, fewer at the end of the file.
    fn get(&mut self, at: u64, n: usize) -> Result<&[u8]> {
        let inside = |window: &Self| {
            let skip = usize::try_from(at.checked_sub(window.at)?).ok()?;
            let range = skip..skip.checked_add(n)?;
            window.bytes.get(range.clone()).map(|_| range)
        };
        let range = match inside(self) {
            Some(range) => range,
            None => {
                self.bytes = read_at(self.reader, at, n.max(WINDOW_BYTES))?;
                self.at = at;
                0..n.min(self.bytes.len())
            }
        };
        Ok(self.bytes.get(range).unwrap_or_default())
    }
}

/// The fixed part of a local header.
struct Local {
    flags: u16,
    method: u16,
    crc: u32,
    packed: u32,
    size: u32,
    name_bytes: u16,
    extra_bytes: u16,
}

impl Local {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut b = Bytes::new(bytes);
        (b.take(4)? == b"PK\x03\x04").then_some(())?;
        let _version = b.u16()?;
        let (flags, method) = (b.u16()?, b.u16()?);
        let _time_and_date = b.u32()?;
        let (crc, packed, size) = (b.u32()?, b.u32()?, b.u32()?);
        Some(Local { flags, method, crc, packed, size, name_bytes: b.u16()?, extra_bytes: b.u16()? })
    }

    /// How this header, with its name and extra field, differs from the directory's entry, if it does.
    fn contradicts(&self, record: &Record, name: &[u8], extra: &[u8]) -> Option<String> {
        if name != record.name.as_bytes() {
            return Some(format!("its name is {:?}", String::from_utf8_lossy(name)));
        }
        if (self.flags, self.method) != (record.flags, record.method) {
            let (flags, method) = (record.flags, record.method);
            return Some(format!("flags {:04x} and method {}, not {flags:04x} and {method}", self.flags, self.method));
        }
        let mut wide = Bytes::new(extra_block(extra, 1).unwrap_or_default());
        let mut widen = |small: u32| match small {
            u32::MAX => wide.u64().unwrap_or(u64::from(u32::MAX)),
            small => u64::from(small),
        };
        let (size, packed) = (widen(self.size), widen(self.packed));
        // With a data descriptor the three may be 0 here.
        let empty = record.flags & DESCRIPTOR != 0;
        let agree = |here: u64, there: u64| here == there || (empty && here == 0);
        if !agree(size, record.size) || !agree(packed, record.packed) {
            return Some(format!("{size} bytes packed to {packed}, not {} to {}", record.size, record.packed));
        }
        if !agree(self.crc.into(), record.crc.into()) {
            return Some(format!("checksum (CRC-32) {:08x}, not {:08x}", self.crc, record.crc));
        }
        None
    }
}

/// The length of the data descriptor of this record that `after` begins with: with or without signature, with sizes of 4
/// or 8 bytes.
fn descriptor_bytes(record: &Record, after: &[u8]) -> Option<u64> {
    [(true, false), (true, true), (false, false), (false, true)].into_iter().find_map(|(signed, wide)| {
        let mut b = Bytes::new(after);
        if signed {
            (b.take(4)? == b"PK\x07\x08").then_some(())?;
        }
        let crc = b.u32()?;
        let (packed, size) = match wide {
            true => (b.u64()?, b.u64()?),
            false => (b.u32()?.into(), b.u32()?.into()),
        };
        ((crc, packed, size) == (record.crc, record.packed, record.size)).then_some(b.at() as u64)
    })
}
