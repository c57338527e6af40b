//! What a file is, by its first bytes.

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

/// The formats that a reader meets, of which it reads three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A zip archive that begins with a record.
    Zip,
    Npy,
    Safetensors,
    /// Something else, named.
    Other(&'static str),
    /// Nothing that is known here.
    Unknown,
}

/// As many first bytes as [`kind`] looks at.
pub(crate) const HEAD_BYTES: usize = 512;

/// The number that `torch.save` wrote first before zip files (release 1.6), pickled.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19";

/// What the file is that begins with `head`.
pub(crate) fn kind(head: &[u8]) -> Kind {
    let other = [
        (&b""[..], "an empty file"),
        (b"PK\x05\x06", "an empty zip archive"),
        (b"PK\x07\x08", "a piece of a split zip archive"),
        (b"\x1f\x8b", "a gzip file; unpack it first"),
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
        (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
        (b"BZh", "a bzip2 file; unpack it first"),
        (b"\xfd7zXZ\0", "an xz file; unpack it first"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"GGUF", "a GGUF file"),
        (b"<", "a page of HTML or XML"),
    ];
    if head.is_empty() {
        return Kind::Other("an empty file");
    }
    if head.starts_with(b"PK\x03\x04") {
        return Kind::Zip;
    }
    if head.starts_with(b"\x93NUMPY") {
        return Kind::Npy;
    }
    // The length of the header, then the header, a JSON object. Before the others: a length may begin with any byte, and
    // none of them has zeros in the sixth to eighth byte and `{` in the ninth. A length beyond 2^40 is a chance `{`.
    if let Some((length, rest)) = head.split_first_chunk::<8>()
        && rest.first() == Some(&b'{')
        && u64::from_le_bytes(*length) < 1 << 40
    {
        return Kind::Safetensors;
    }
    if head.get(..64.min(head.len())).is_some_and(|h| h.windows(LEGACY_MAGIC.len()).any(|w| w == LEGACY_MAGIC)) {
        return Kind::Other(
            "the legacy stream that torch.save wrote before release 1.6; load it in PyTorch and save it anew",
        );
    }
    if head.get(257..262) == Some(b"ustar") {
        return Kind::Other("a tar archive, perhaps the legacy form of torch.save before release 0.1.10");
    }
    if head.first() == Some(&0x80) && matches!(head.get(1), Some(2..=5)) {
        return Kind::Other("a bare pickle, perhaps a legacy form of torch.save; load it in Python and save it anew");
    }
    if let Some((_, what)) = other.iter().find(|(start, _)| !start.is_empty() && head.starts_with(start)) {
        return Kind::Other(what);
    }
    Kind::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_files_apart() {
        assert_eq!(kind(b"PK\x03\x04rest"), Kind::Zip);
        assert_eq!(kind(b"\x93NUMPY\x01\x00"), Kind::Npy);
        assert_eq!(kind(b"\x10\0\0\0\0\0\0\0{\"a\""), Kind::Safetensors);
        assert_eq!(kind(b"<\0\0\0\0\0\0\0{\"a\""), Kind::Safetensors);
        assert_eq!(kind(b"hello"), Kind::Unknown);
        let mut tar = vec![b'x'; 512];
        tar[257..262].copy_from_slice(b"ustar");
        for (head, word) in [
            (&b""[..], "empty"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
            (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "legacy stream"),
            (b"\x80\x04\x95\x0e\0\0\0\0\0\0\0\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "legacy stream"),
            (b"\x80\x02}q\0.", "legacy"),
            (b"<!DOCTYPE html>", "HTML"),
            (&tar, "legacy"),
        ] {
            let Kind::Other(what) = kind(head) else { panic!("{head:?}") };
            assert!(what.contains(word), "{what}");
        }
    }
}
