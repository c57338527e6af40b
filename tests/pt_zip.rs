//! Archives that lie, each in one way, and archives that are only unusual.

mod common;
use common::*;

fn good() -> Vec<Record> {
    records(&dict(&w()))
}

/// The checkpoint with its storage's record changed.
fn storage_as(change: impl Fn(Record) -> Record) -> Vec<u8> {
    let mut all = good();
    all[2] = change(all[2].clone());
    zip(&all, |_| {})
}

fn all_as(change: impl Fn(Record) -> Record) -> Vec<u8> {
    let all: Vec<Record> = good().into_iter().map(change).collect();
    zip(&all, |_| {})
}

fn wide(numbers: &[u64]) -> Vec<u8> {
    let mut block = vec![1, 0];
    block.extend((numbers.len() as u16 * 8).to_le_bytes());
    numbers.iter().for_each(|n| block.extend(n.to_le_bytes()));
    block
}

#[test]
fn unusual_archives_are_read() {
    accepted("plain", &zip(&good(), |_| {}));
    for signed in [false, true] {
        for width in [false, true] {
            accepted("descriptor", &all_as(|r| r.described(signed, width)));
            accepted("deflated with descriptor", &all_as(|r| r.deflated().described(signed, width)));
        }
    }
    accepted("deflated", &all_as(Record::deflated));
    accepted("comment", &zip(&good(), |e| e.comment = b"a comment".to_vec()));
    accepted("longest comment", &zip(&good(), |e| e.comment = vec![b'c'; 65535]));
    accepted(
        "an end record's signature in the comment",
        &zip(&good(), |e| e.comment = b"PK\x05\x06 is how it begins".to_vec()),
    );
    accepted("zip64 end", &zip(&good(), |e| e.wide = true));
    accepted("zip64 end, ones", &zip(&good(), |e| (e.wide, e.ones) = (true, true)));
    accepted("zip64 end with more in it", &zip(&good(), |e| (e.wide, e.ones, e.extensible) = (true, true, vec![7; 9])));
    accepted("zip64 end with comment", &zip(&good(), |e| (e.wide, e.comment) = (true, b"x".to_vec())));
    accepted("utf-8 flag off", &all_as(|r| r.both(|h| h.flags = 0)));
    accepted("extra fields", &all_as(|r| r.both(|h| h.extra = b"UT\x05\0\x01\0\0\0\0ux\x02\0ab".to_vec())));
    accepted("extra field in one only", &storage_as(|r| r.with(|r| r.local.extra = b"FB\x03\0ZZZ".to_vec())));
    accepted("a torn extra field", &storage_as(|r| r.both(|h| h.extra = b"\0\0\0".to_vec())));
    accepted("a needless zip64 block", &storage_as(|r| r.both(|h| h.extra = wide(&[16, 16]))));
    accepted("gaps", &storage_as(|r| r.with(|r| r.gap = vec![0; 100])));
    accepted("any order", &{
        let mut all = good();
        all.reverse();
        zip(&all, |_| {})
    });
    accepted("further records and folders", &{
        let mut all = good();
        all.push(record("a/", b""));
        all.push(record("a/data/", b""));
        all.push(record("a/.data/serialization_id", b"123"));
        all.push(record("other/notes.txt", b"hello"));
        all.push(record("a/data.pkl.bak", b"not it"));
        all.push(record("A/Ähnlich", b"1"));
        all.push(record("a/ähnlich", b"only ASCII letters are folded"));
        zip(&all, |_| {})
    });
    accepted("fewest records", &{
        let mut all = good();
        all.remove(3);
        all.remove(1);
        zip(&all, |_| {})
    });
    for folder in ["пример", "a.b-c d", "重み", "..a", "a..b"] {
        let rename = |name: &[u8]| [folder.as_bytes(), &name[1..]].concat();
        accepted(folder, &all_as(|r| r.both(|h| h.name = rename(&h.name))));
    }
    accepted("no folder", &all_as(|r| r.both(|h| h.name = h.name[2..].to_vec())));
    accepted("no checksums", &all_as(|r| r.both(|h| h.crc = 0)));
    accepted("no checksums, descriptors", &all_as(|r| r.both(|h| h.crc = 0).described(true, false)));
    // All three numbers of an entry in a zip64 block, and of the local header.
    accepted(
        "zip64 entry",
        &storage_as(|r| {
            r.with(|r| {
                (r.entry.size, r.entry.packed) = (!0, !0);
                r.entry.extra = wide(&[16, 16]);
                (r.local.size, r.local.packed) = (!0, !0);
                r.local.extra = wide(&[16, 16]);
            })
        }),
    );
    accepted(
        "zip64 in a later block",
        &storage_as(|r| {
            r.with(|r| {
                r.entry.size = !0;
                r.entry.extra = [b"UT\x01\0x".to_vec(), wide(&[16])].concat();
            })
        }),
    );
    let offset = zip(&good()[..2], |_| {}).windows(4).position(|w| w == b"PK\x01\x02").unwrap() as u64;
    accepted(
        "zip64 offset",
        &storage_as(|r| {
            r.with(|r| {
                r.entry.offset = Some(!0);
                r.entry.extra = wide(&[offset]);
            })
        }),
    );
    accepted(
        "zip64 in a local header under a descriptor",
        &storage_as(|r| {
            r.described(true, true).with(|r| {
                (r.local.size, r.local.packed) = (!0, !0);
                r.local.extra = wide(&[0, 0]);
            })
        }),
    );
    accepted("a local header that lies, of a record that nobody reads", &{
        let mut all = good();
        all.push(record("a/extra", b"x").with(|r| r.local.name = b"a/EXTRA".to_vec()));
        zip(&all, |_| {})
    });
}

#[test]
fn local_headers_must_agree() {
    let word = &["contradicts"];
    refused("signature", &storage_as(|r| r.with(|r| r.local.signature = *b"PK\x03\x05")), word);
    refused("name", &storage_as(|r| r.with(|r| r.local.name = b"a/data/1".to_vec())), word);
    refused("case of the name", &storage_as(|r| r.with(|r| r.local.name = b"A/data/0".to_vec())), word);
    refused("method", &storage_as(|r| r.with(|r| r.local.method = 8)), word);
    refused("flags", &storage_as(|r| r.with(|r| r.local.flags = 0)), word);
    refused("size", &storage_as(|r| r.with(|r| r.local.size = 15)), word);
    refused("packed size", &storage_as(|r| r.with(|r| r.local.packed = 17)), word);
    refused("sizes of 0", &storage_as(|r| r.with(|r| (r.local.size, r.local.packed) = (0, 0))), word);
    refused("checksum", &storage_as(|r| r.with(|r| r.local.crc ^= 1)), &["checksum"]);
    refused("checksum of 0", &storage_as(|r| r.with(|r| r.local.crc = 0)), &["checksum"]);
    refused("checksum of 0 in the directory alone", &storage_as(|r| r.with(|r| r.entry.crc = 0)), &["checksum"]);
    refused(
        "zip64 sizes",
        &storage_as(|r| {
            r.with(|r| {
                (r.local.size, r.local.packed) = (!0, !0);
                r.local.extra = wide(&[16, 17]);
            })
        }),
        word,
    );
    refused("zip64 sizes missing", &storage_as(|r| r.with(|r| (r.local.size, r.local.packed) = (!0, !0))), word);
    for i in [0, 4, 8, 12] {
        refused("descriptor", &storage_as(|r| r.described(true, false).with(|r| r.after[i] ^= 1)), word);
    }
    refused("no descriptor", &storage_as(|r| r.described(true, false).with(|r| r.after.clear())), word);
    refused("half a descriptor", &storage_as(|r| r.described(true, false).with(|r| r.after.truncate(9))), word);
    refused(
        "a checksum in the local header that the descriptor replaces",
        &storage_as(|r| r.described(true, false).with(|r| r.local.crc = 77)),
        word,
    );
    refused(
        "the pickle's",
        &{
            let mut all = good();
            all[0].local.name = b"b/data.pkl".to_vec();
            zip(&all, |_| {})
        },
        word,
    );
}

#[test]
fn records_have_their_places() {
    refused(
        "record beyond the file",
        &storage_as(|r| r.with(|r| r.entry.offset = Some(1 << 30))),
        &["before the directory"],
    );
    refused(
        "record in the directory",
        &{
            let all = good();
            let directory = zip(&all, |_| {}).windows(4).position(|w| w == b"PK\x01\x02").unwrap() as u32;
            storage_as(|r| r.with(|r| r.entry.offset = Some(directory)))
        },
        &["before the directory"],
    );
    refused(
        "data runs into the directory",
        &{
            let mut all = good();
            let last = all.last_mut().unwrap();
            (last.local.size, last.local.packed, last.entry.size, last.entry.packed) = (9, 9, 9, 9);
            zip(&all, |_| {})
        },
        &["before the directory"],
    );
    refused(
        "two records in one place",
        &{
            let mut all = good();
            all[2].entry.offset = Some(0);
            zip(&all, |_| {})
        },
        &["overlap"],
    );
    refused(
        "data runs into the next record",
        &{
            let mut all = good();
            all[1] = all[1].clone().both(|h| (h.size, h.packed) = (7, 7));
            zip(&all, |_| {})
        },
        &["overlap"],
    );
    // A record within another's data, as an archive in an archive.
    refused(
        "nested",
        &{
            let inner = zip(&[record("x", b"12345")], |_| {});
            let mut all = good();
            all.push(record("a/inner", &inner));
            let at = zip(&all[..4], |_| {}).windows(4).position(|w| w == b"PK\x01\x02").unwrap() as u32;
            all.push(record("x", b"12345").with(|r| r.entry.offset = Some(at + 30 + 7)));
            zip(&all, |_| {})
        },
        &["overlap"],
    );
    refused(
        "a descriptor in the next record",
        &{
            let mut all = good();
            all[2] = all[2].clone().described(true, false);
            let cut = all[2].after.split_off(8);
            all[3].gap = vec![];
            let _ = cut;
            zip(&all, |_| {})
        },
        &["contradicts"],
    );
    refused(
        "first byte",
        &{
            let mut all = good();
            all[0].gap = b"#!/bin/sh\n".to_vec();
            zip(&all, |_| {})
        },
        &["not a .pt file"],
    );
}

#[test]
fn end_records_must_agree() {
    let word = &["end record", "directory", "zip64"];
    refused("too many entries", &zip(&good(), |e| e.entries += 1), word);
    refused("too few entries", &zip(&good(), |e| (e.here, e.entries) = (3, 3)), word);
    refused("entries on this disk", &zip(&good(), |e| e.here = 3), word);
    refused("disk", &zip(&good(), |e| e.disk = 1), word);
    refused("directory size", &zip(&good(), |e| e.size -= 1), word);
    refused("directory size beyond", &zip(&good(), |e| e.size += 1), word);
    refused("directory start", &zip(&good(), |e| e.start += 1), word);
    refused("directory start and size", &zip(&good(), |e| (e.start, e.size) = (e.start + 1, e.size - 1)), word);
    refused("directory start early", &zip(&good(), |e| (e.start, e.size) = (e.start - 1, e.size + 1)), word);
    refused("a gap before the end record", &zip(&good(), |e| e.gap = vec![0]), word);
    refused("a gap that the size covers", &zip(&good(), |e| (e.gap, e.size) = (vec![0; 3], e.size + 3)), word);
    refused("start that overflows", &zip(&good(), |e| (e.wide, e.ones, e.start) = (true, true, u64::MAX)), word);
    refused("size that overflows", &zip(&good(), |e| (e.wide, e.ones, e.size) = (true, true, u64::MAX)), word);
    refused(
        "a comment that is too short",
        &zip(&good(), |e| (e.comment, e.comment_length) = (b"abc".to_vec(), Some(2))),
        &["just its comment"],
    );
    refused(
        "a comment that is too long",
        &zip(&good(), |e| (e.comment, e.comment_length) = (b"abc".to_vec(), Some(4))),
        &["just its comment"],
    );
    refused("a byte after the end", &zip(&good(), |e| e.after = vec![0]), &["just its comment"]);
    refused(
        "zip64 disagrees on entries",
        &zip(&good(), |e| (e.wide, e.plain) = (true, Some([5, e.size as u32, e.start as u32]))),
        word,
    );
    refused(
        "zip64 disagrees on size",
        &zip(&good(), |e| (e.wide, e.plain) = (true, Some([4, 9, e.start as u32]))),
        word,
    );
    refused(
        "zip64 disagrees on start",
        &zip(&good(), |e| (e.wide, e.plain) = (true, Some([4, e.size as u32, 9]))),
        word,
    );
    refused("ones without zip64", &zip(&good(), |e| e.plain = Some([0xffff, !0, !0])), word);
    refused("several disks", &zip(&good(), |e| (e.wide, e.locator_disks) = (true, 2)), word);
    refused("zip64 wrong entries", &zip(&good(), |e| (e.wide, e.ones, e.entries, e.here) = (true, true, 9, 9)), word);
    refused("no entries", &zip(&[record("a", b"").with(|r| r.listed = false)], |_| {}), &["data.pkl"]);
    refused("disk of an entry", &storage_as(|r| r.with(|r| r.entry.disk = 1)), &["disk"]);
    refused("entry signature", &storage_as(|r| r.with(|r| r.entry.signature = *b"PK\x01\x03")), word);
    refused("zip64 block is missing", &storage_as(|r| r.with(|r| r.entry.size = !0)), &["zip64"]);
    refused(
        "zip64 block is short",
        &storage_as(|r| {
            r.with(|r| {
                (r.entry.size, r.entry.packed) = (!0, !0);
                r.entry.extra = wide(&[16]);
            })
        }),
        &["zip64"],
    );
    let file = zip(&good(), |_| {});
    for cut in 1..file.len() {
        assert!(read_all(&file[..cut]).is_err(), "cut to {cut}");
    }
}

#[test]
fn names_are_plain_and_unique() {
    for (name, word) in [
        (&b"../a"[..], "climb"),
        (b"a/../b", "climb"),
        (b"a/..", "climb"),
        (b"/a", "climb"),
        (b"a\\b", "backslash"),
        (b"a\0b", "NUL"),
        (b"", "empty"),
        (b"a/\xff", "UTF-8"),
        (b"a/\xc0\x80", "UTF-8"),
        (b"a/data/0", "duplicate"),
        (b"a/data.pkl", "duplicate"),
        (b"a/DATA/0", "are one name"),
        (b"A/data/0", "are one name"),
        (b"a/Data.pkl", "are one name"),
        (b"a/ByteOrder", "are one name"),
        (b"a/VERSION", "are one name"),
        (b"a/Constants.PKL", "spelled \"a/Constants.PKL\""),
        (b"b/Data.pkl", "two pickles"),
        (b"b/data.pkl", "two pickles"),
        (b"data.pkl", "two pickles"),
        (b"a/b/data.pkl", "two pickles"),
        (b"a/constants.pkl", "TorchScript"),
    ] {
        let mut all = good();
        all.push(record("x", b"yz").both(|h| h.name = name.to_vec()));
        refused(&String::from_utf8_lossy(name), &zip(&all, |_| {}), &[word]);
    }
    refused("no pickle", &zip(&good()[1..], |_| {}), &["data.pkl"]);
    // PyTorch reads these as what they are named but for the case.
    refused("another case", &all_as(|r| r.both(|h| h.name = h.name.to_ascii_uppercase())), &["data.pkl"]);
    for (index, name, data) in [
        (0, "a/Data.pkl", &dict(&w())[..]),
        (1, "a/BYTEORDER", b"big"),
        (1, "A/byteorder", b"big"),
        (2, "a/DATA/0", &floats()),
        (3, "a/Version", b"3\n"),
    ] {
        let mut all = good();
        all[index] = record(name, data);
        refused(name, &zip(&all, |_| {}), &[&format!("spelled {name:?}, in another case")]);
    }
    refused("npz", &zip(&[record("arr_0.npy", b"x")], |_| {}), &["npz"]);
}

#[test]
fn methods_and_flags() {
    for method in [1, 6, 9, 12, 14, 93, 95, 98, 99, 0xffff] {
        refused("method", &storage_as(|r| r.both(|h| h.method = method)), &["method"]);
    }
    for flag in [1, 1 << 6, 1 << 13] {
        refused("encrypted", &storage_as(|r| r.both(|h| h.flags |= flag)), &["encrypted"]);
    }
    refused("patch", &storage_as(|r| r.both(|h| h.flags |= 1 << 5)), &["patch"]);
    refused("stored with two sizes", &storage_as(|r| r.both(|h| h.size = 15)), &["stored"]);
    refused(
        "of a record that nobody reads",
        &{
            let mut all = good();
            all.push(record("a/x", b"").both(|h| h.method = 12));
            zip(&all, |_| {})
        },
        &["method"],
    );
}

#[test]
fn deflate_ends_where_it_must() {
    let deflated = |packed: Vec<u8>, size: u32| {
        storage_as(|r| {
            let mut r = r.both(|h| h.size = size);
            r.repack(packed.clone());
            r
        })
    };
    let honest = record("x", &floats()).deflated().data;
    accepted("honest", &deflated(honest.clone(), 16));
    // Two blocks, the second empty, with fixed codes: 3 bits of header, 7 of end, as zlib writes at a flush.
    let mut flushed = honest.clone();
    flushed[0] = 0;
    flushed.extend([3, 0]);
    accepted("an empty last block", &deflated(flushed.clone(), 16));
    let words = &["deflate"];
    let add = |tail: &[u8]| [honest.as_slice(), tail].concat();
    for tail in [&[0][..], &[3, 0], &[1, 2, 3, 4, 5, 6, 7, 8, 9]] {
        refused("bytes after the end", &deflated(add(tail), 16), words);
    }
    refused("many bytes after the end", &deflated(add(&[0xaa; 20_000]), 16), words);
    let cut = |n: usize| honest[..honest.len() - n].to_vec();
    refused("cut in the data", &deflated(cut(1), 16), &["deflate", "cannot read on"]);
    refused(
        "no last block",
        &deflated(
            {
                let mut open = honest.clone();
                open[0] = 0;
                open
            },
            16,
        ),
        words,
    );
    refused("last block cut", &deflated(flushed[..flushed.len() - 1].to_vec(), 16), words);
    refused("last block gone", &deflated(flushed[..flushed.len() - 2].to_vec(), 16), words);
    refused("longer than said", &deflated(honest.clone(), 15), &["record has 15", "deflate"]);
    refused("no packed bytes", &deflated(vec![], 16), &["deflate", "cannot read on"]);
    refused("no deflate", &deflated(vec![0xff; 30], 16), &["deflate", "cannot read on"]);
    refused(
        "one bit",
        &deflated(
            {
                let mut flipped = honest.clone();
                *flipped.last_mut().unwrap() ^= 1;
                flipped
            },
            16,
        ),
        &["checksum"],
    );
    // The sizes agree with the pickle, not with the stream.
    let five = dict(&rebuild(&storage("FloatStorage", "0", 5), 0, &[5], &[1]));
    let mut all = records(&five);
    all[2] = all[2].clone().both(|h| h.size = 20);
    all[2].repack(honest.clone());
    refused("shorter than said", &zip(&all, |_| {}), &["ends at byte 16"]);
    let three = dict(&rebuild(&storage("FloatStorage", "0", 3), 0, &[3], &[1]));
    let mut all = records(&three);
    all[2] = all[2].clone().both(|h| (h.size, h.crc) = (12, crc32(&floats()[..12])));
    all[2].repack(honest);
    refused("goes on beyond", &zip(&all, |_| {}), &["deflate"]);
    refused("a bomb", &storage_as(|r| r.deflated().both(|h| h.size = 17 << 20)), &["ratio"]);
    refused("a claim of 4 GiB", &storage_as(|r| r.deflated().both(|h| h.size = !0 - 1)), &["ratio"]);
}

#[test]
fn what_is_read_has_the_right_checksum() {
    refused("tensor", &storage_as(|r| r.with(|r| r.data[3] ^= 1)), &["checksum"]);
    refused("deflated tensor", &storage_as(|r| r.with(|r| r.data[3] ^= 1).deflated()), &["checksum"]);
    // The view reads the first element; the fault lies in the last.
    let pickle = dict(&rebuild(&storage("FloatStorage", "0", 4), 0, &[1], &[1]));
    let mut all = records(&pickle);
    all[2].data[15] ^= 1;
    refused("beside the view", &zip(&all, |_| {}), &["checksum"]);
    let mut all = records(&dict(&w()));
    all[0].data[5] ^= 1;
    refused("pickle", &zip(&all, |_| {}), &["checksum"]);
    let mut all = records(&dict(&w()));
    all[1].data[0] ^= 1;
    refused("byteorder", &zip(&all, |_| {}), &["checksum", "byteorder"]);
    let mut all = records(&dict(&w()));
    all[3].data[0] ^= 1;
    accepted("of a record that nobody reads", &zip(&all, |_| {}));
    let mut all = records(&dict(&w()));
    all[1] = record("a/byteorder", b"big");
    refused("big endian", &zip(&all, |_| {}), &["byteorder"]);
    all[1] = record("a/byteorder", b"little\n");
    refused("a third order", &zip(&all, |_| {}), &["byteorder"]);
}

#[test]
fn other_files_are_named() {
    for (file, word) in [
        (&b""[..], "empty"),
        (b"\x93NUMPY\x01\x00v\x00{", "numpy"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02", "legacy"),
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}", "legacy"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "Git LFS"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{\"a\":", "safetensors"),
        (b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "empty zip"),
        (b"PK\x03\x04", "truncated"),
        (b"hello world", "not a .pt file"),
    ] {
        refused(word, file, &[word]);
    }
}

#[test]
fn no_single_byte_gives_other_numbers() {
    let mut files = vec![zip(&good(), |e| e.comment = b"end".to_vec())];
    files.push(zip(&good(), |e| (e.wide, e.ones) = (true, true)));
    files.push(all_as(|r| r.deflated().described(true, true)));
    for file in files {
        let honest = read_all(&file).unwrap();
        for at in 0..file.len() {
            for change in [0x01u8, 0x80, 0xff, file[at]] {
                let mut bad = file.clone();
                bad[at] ^= change;
                if let Ok(crcs) = read_all(&bad) {
                    assert_eq!(crcs, honest, "byte {at} ^ {change:02x}");
                }
            }
        }
    }
}

#[test]
fn the_ratio_of_large_deflated_records_has_a_limit() {
    // Of a record that nobody reads, so that the claim alone decides.
    let claim = |packed: u32, size: u32| {
        let mut all = good();
        let mut extra = record("a/extra", b"").both(|h| h.size = size);
        extra.repack(vec![0; packed as usize]);
        all.push(extra);
        zip(&all, |_| {})
    };
    let past: u32 = (16 << 20) + 1;
    accepted("16 MiB at any ratio", &claim(2, 16 << 20));
    accepted("just 200 times", &claim(past.div_ceil(200), past));
    refused("more than 200 times", &claim(past.div_ceil(200) - 1, past), &["ratio"]);
    // No single one is large; all of them are.
    let claims = |packed: u32| {
        let mut all = good();
        for name in ["a/extra", "a/more"] {
            let mut extra = record(name, b"").both(|h| h.size = 10 << 20);
            extra.repack(vec![0; packed as usize]);
            all.push(extra);
        }
        zip(&all, |_| {})
    };
    let least = (10u32 << 20).div_ceil(200);
    accepted("together just 200 times", &claims(least));
    refused("together more than 200 times", &claims(least - 1), &["deflated from 20971520 to 104856 bytes", "ratio"]);
}

/// A deflated pickle costs its writer nothing, a stored one as many bytes as its reader.
#[test]
fn a_deflated_pickle_has_a_lower_limit_than_a_stored_one() {
    const LIMIT: usize = 32 << 20;
    let claim = |size: usize| {
        let mut all = good();
        all[0] = record("a/data.pkl", b"").both(|h| h.size = size as u32);
        all[0].repack(vec![0; size / 100]);
        zip(&all, |_| {})
    };
    refused("deflated, at the limit: not for its length", &claim(LIMIT), &["deflate"]);
    refused("deflated, above it", &claim(LIMIT + 1), &["a pickle of 33554433 bytes; the limit is 33554432"]);
    let long = [&b"B"[..], &(LIMIT as u32).to_le_bytes(), &vec![7; LIMIT], b"0"].concat();
    accepted("stored, above it", &pt(&root(&[long, w()].concat())));
}
