//! Hands that put `.pt` files together, right and wrong.
#![allow(dead_code, unreachable_pub)]

use crosscoder::pt::PtFile;
use std::io::Cursor;

/// The CRC-32 of zip, one bit at a time.
pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    })
}

/// A local header or a directory entry, field by field.
#[derive(Clone, Debug)]
pub struct Header {
    pub name: Vec<u8>,
    pub flags: u16,
    pub method: u16,
    pub crc: u32,
    pub packed: u32,
    pub size: u32,
    pub extra: Vec<u8>,
    pub disk: u16,
    /// Instead of where the record really is.
    pub offset: Option<u32>,
    pub signature: [u8; 4],
}

/// A record: what precedes it, its header, its bytes, what follows them, and its entry.
#[derive(Clone, Debug)]
pub struct Record {
    pub gap: Vec<u8>,
    pub local: Header,
    pub data: Vec<u8>,
    pub after: Vec<u8>,
    pub entry: Header,
    pub listed: bool,
}

pub fn record(name: &str, data: &[u8]) -> Record {
    let n = data.len() as u32;
    let local = Header {
        name: name.into(),
        flags: 0x800,
        method: 0,
        crc: crc32(data),
        packed: n,
        size: n,
        extra: vec![],
        disk: 0,
        offset: None,
        signature: *b"PK\x03\x04",
    };
    let entry = Header { signature: *b"PK\x01\x02", ..local.clone() };
    Record { gap: vec![], local, data: data.to_vec(), after: vec![], entry, listed: true }
}

impl Record {
    /// As deflate stored in blocks, which needs no compressor.
    pub fn deflated(mut self) -> Self {
        let mut packed = vec![];
        let blocks: Vec<&[u8]> = self.data.chunks(0xffff).collect();
        for (i, block) in blocks.iter().enumerate() {
            packed.push(u8::from(i + 1 == blocks.len()));
            packed.extend((block.len() as u16).to_le_bytes());
            packed.extend((!(block.len() as u16)).to_le_bytes());
            packed.extend_from_slice(block);
        }
        if blocks.is_empty() {
            packed = vec![3, 0];
        }
        self.repack(packed);
        self
    }

    /// These packed bytes instead.
    pub fn repack(&mut self, packed: Vec<u8>) {
        for header in [&mut self.local, &mut self.entry] {
            header.method = 8;
            header.packed = packed.len() as u32;
        }
        self.data = packed;
    }

    /// With a data descriptor: with signature or not, with sizes of 8 bytes or 4.
    pub fn described(mut self, signed: bool, wide: bool) -> Self {
        let (crc, packed, size) = (self.entry.crc, self.entry.packed, self.entry.size);
        self.after = if signed { b"PK\x07\x08".to_vec() } else { vec![] };
        self.after.extend(crc.to_le_bytes());
        for n in [packed, size] {
            if wide {
                self.after.extend(u64::from(n).to_le_bytes());
            } else {
                self.after.extend(n.to_le_bytes());
            }
        }
        self.entry.flags |= 8;
        self.local = Header { flags: self.entry.flags, crc: 0, packed: 0, size: 0, ..self.local };
        self
    }

    pub fn both(mut self, change: impl Fn(&mut Header)) -> Self {
        change(&mut self.local);
        change(&mut self.entry);
        self
    }

    pub fn with(mut self, change: impl FnOnce(&mut Record)) -> Self {
        change(&mut self);
        self
    }
}

/// The end records, before they are written.
#[derive(Clone, Debug)]
pub struct End {
    pub here: u64,
    pub entries: u64,
    pub size: u64,
    pub start: u64,
    pub disk: u16,
    pub comment: Vec<u8>,
    pub comment_length: Option<u16>,
    /// Between the directory and the end records.
    pub gap: Vec<u8>,
    /// Whether there are zip64 end records, and whether the plain one then holds all ones.
    pub wide: bool,
    pub ones: bool,
    /// The numbers in the plain record where they should differ: entries, size, start.
    pub plain: Option<[u32; 3]>,
    pub extensible: Vec<u8>,
    pub locator_disks: u32,
    pub after: Vec<u8>,
}

pub fn zip(records: &[Record], change: impl FnOnce(&mut End)) -> Vec<u8> {
    let mut out = vec![];
    let mut offsets = vec![];
    for r in records {
        out.extend(&r.gap);
        offsets.push(out.len() as u32);
        let h = &r.local;
        out.extend(h.signature);
        out.extend([20, 0]);
        for n in [h.flags, h.method, 0, 0] {
            out.extend(n.to_le_bytes());
        }
        for n in [h.crc, h.packed, h.size] {
            out.extend(n.to_le_bytes());
        }
        out.extend((h.name.len() as u16).to_le_bytes());
        out.extend((h.extra.len() as u16).to_le_bytes());
        out.extend(&h.name);
        out.extend(&h.extra);
        out.extend(&r.data);
        out.extend(&r.after);
    }
    let start = out.len() as u64;
    let mut entries = 0;
    for (r, offset) in records.iter().zip(offsets) {
        if !r.listed {
            continue;
        }
        entries += 1;
        let h = &r.entry;
        out.extend(h.signature);
        out.extend([20, 0, 20, 0]);
        for n in [h.flags, h.method, 0, 0] {
            out.extend(n.to_le_bytes());
        }
        for n in [h.crc, h.packed, h.size] {
            out.extend(n.to_le_bytes());
        }
        for n in [h.name.len() as u16, h.extra.len() as u16, 0, h.disk, 0] {
            out.extend(n.to_le_bytes());
        }
        out.extend([0; 4]);
        out.extend(h.offset.unwrap_or(offset).to_le_bytes());
        out.extend(&h.name);
        out.extend(&h.extra);
    }
    let mut end = End {
        here: entries,
        entries,
        size: out.len() as u64 - start,
        start,
        disk: 0,
        comment: vec![],
        comment_length: None,
        gap: vec![],
        wide: false,
        ones: false,
        plain: None,
        extensible: vec![],
        locator_disks: 1,
        after: vec![],
    };
    change(&mut end);
    out.extend(&end.gap);
    if end.wide {
        let at = out.len() as u64;
        out.extend(b"PK\x06\x06");
        out.extend((44 + end.extensible.len() as u64).to_le_bytes());
        out.extend([45, 0, 45, 0]);
        out.extend(u32::from(end.disk).to_le_bytes());
        out.extend(u32::from(end.disk).to_le_bytes());
        for n in [end.here, end.entries, end.size, end.start] {
            out.extend(n.to_le_bytes());
        }
        out.extend(&end.extensible);
        out.extend(b"PK\x06\x07\0\0\0\0");
        out.extend(at.to_le_bytes());
        out.extend(end.locator_disks.to_le_bytes());
    }
    let [entries, size, start] = end.plain.unwrap_or(match end.ones {
        true => [0xffff, !0, !0],
        false => [end.entries as u32, end.size as u32, end.start as u32],
    });
    out.extend(b"PK\x05\x06");
    out.extend(end.disk.to_le_bytes());
    out.extend(end.disk.to_le_bytes());
    let here = if end.ones || end.plain.is_some() { entries as u16 } else { end.here as u16 };
    out.extend(here.to_le_bytes());
    out.extend((entries as u16).to_le_bytes());
    out.extend(size.to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend(end.comment_length.unwrap_or(end.comment.len() as u16).to_le_bytes());
    out.extend(&end.comment);
    out.extend(&end.after);
    out
}

/// Pieces of pickles.
pub fn cat(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

pub fn s(text: &str) -> Vec<u8> {
    cat(&[b"X", &(text.len() as u32).to_le_bytes(), text.as_bytes()])
}

pub fn int(n: i64) -> Vec<u8> {
    cat(&[b"\x8a\x08", &n.to_le_bytes()])
}

pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    cat(&[b"(", &items.concat(), b"t"])
}

pub fn ints(numbers: &[i64]) -> Vec<u8> {
    tuple(&numbers.iter().map(|&n| int(n)).collect::<Vec<_>>())
}

pub const ORDERED: &[u8] = b"ccollections\nOrderedDict\n)R";

/// The storage under `key`, whose class is a name in module torch, with `count` elements.
pub fn storage(class: &str, key: &str, count: i64) -> Vec<u8> {
    let class = format!("ctorch\n{class}\n").into_bytes();
    cat(&[b"(", &s("storage"), &class, &s(key), &s("cpu"), &int(count), b"tQ"])
}

/// `_rebuild_tensor_v2` with these arguments.
pub fn rebuild(storage: &[u8], offset: i64, size: &[i64], stride: &[i64]) -> Vec<u8> {
    let call: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n(";
    cat(&[call, storage, &int(offset), &ints(size), &ints(stride), b"\x89", ORDERED, b"tR"])
}

/// `{'w': float32 [2, 2]}` on the storage `0` of four elements.
pub fn w() -> Vec<u8> {
    rebuild(&storage("FloatStorage", "0", 4), 0, &[2, 2], &[2, 1])
}

pub fn root(value: &[u8]) -> Vec<u8> {
    cat(&[b"\x80\x02", value, b"."])
}

pub fn dict(value: &[u8]) -> Vec<u8> {
    root(&cat(&[b"}", &s("w"), value, b"s"]))
}

pub fn floats() -> Vec<u8> {
    [1f32, 2.0, 3.0, 4.0].iter().flat_map(|f| f.to_le_bytes()).collect()
}

/// The records of a small checkpoint with this pickle.
pub fn records(pickle: &[u8]) -> Vec<Record> {
    vec![
        record("a/data.pkl", pickle),
        record("a/byteorder", b"little"),
        record("a/data/0", &floats()),
        record("a/version", b"3\n"),
    ]
}

/// A checkpoint with this pickle.
pub fn pt(pickle: &[u8]) -> Vec<u8> {
    zip(&records(pickle), |_| {})
}

/// Opens it and reads every tensor and checksum; returns the checksums.
pub fn read_all(file: &[u8]) -> crosscoder::Result<Vec<u32>> {
    let mut pt = PtFile::new(Cursor::new(file))?;
    let tensors = pt.tensors().to_vec();
    let mut crcs = vec![];
    for t in tensors {
        let crc = pt.crc32(&t.tensor)?;
        let tensor = pt.read(&t.tensor)?;
        let mut bytes = vec![];
        tensor.row_major_le_bytes(|b| {
            bytes.extend_from_slice(b);
            crosscoder::Result::Ok(())
        })?;
        assert_eq!(tensor.shape(), t.tensor.shape);
        assert_eq!(crc32(&bytes), crc, "{}", t.name);
        crcs.push(crc);
    }
    pt.plain_values(|_, _| Ok(()))?;
    Ok(crcs)
}

/// The file is refused, with one of these words.
#[track_caller]
pub fn refused(what: &str, file: &[u8], words: &[&str]) {
    match read_all(file) {
        Ok(crcs) => panic!("{what}: accepted with {} tensors", crcs.len()),
        Err(e) => {
            let text = e.to_string();
            assert!(words.iter().any(|w| text.contains(w)), "{what}: {text:?} has none of {words:?}");
        }
    }
}

/// The file is read, and has one tensor of the four floats.
#[track_caller]
pub fn accepted(what: &str, file: &[u8]) {
    match read_all(file) {
        Ok(crcs) => assert_eq!(crcs, [crc32(&floats())], "{what}"),
        Err(e) => panic!("{what}: {e}"),
    }
}
