//! The CRC-32 of zip, computed while bytes pass: sixteen bytes a step by table.

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

/// `TABLES[0]` is the classic table of the reflected polynomial 0xedb88320; `TABLES[k][b]` is the remainder of byte `b`
/// followed by `k` zero bytes, so that sixteen look-ups that do not wait for one another replace sixteen that do.
static TABLES: [[u32; 256]; 16] = tables();

#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // Runs at compile time: a mistake would not build.
const fn tables() -> [[u32; 256]; 16] {
    let mut tables = [[0u32; 256]; 16];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut k = 1;
    while k < 16 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[k - 1][byte];
            tables[k][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        k += 1;
    }
    tables
}

/// A checksum in the making.
#[derive(Clone, Debug)]
pub(crate) struct Crc32(u32);

impl Default for Crc32 {
    fn default() -> Self {
        Self::new()
    }
}

impl Crc32 {
    /// The checksum of no bytes.
    pub(crate) fn new() -> Self {
        Crc32(!0)
    }

    /// Takes the next bytes in.
    #[allow(clippy::indexing_slicing)] // A byte indexes a table of 256, constants below 16 the rest.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        let mut crc = self.0;
        let (blocks, rest) = bytes.as_chunks::<16>();
        for block in blocks {
            let mut b = *block;
            for (byte, mixed) in b.iter_mut().zip(crc.to_le_bytes()) {
                *byte ^= mixed;
            }
            crc = TABLES[15][usize::from(b[0])]
                ^ TABLES[14][usize::from(b[1])]
                ^ TABLES[13][usize::from(b[2])]
                ^ TABLES[12][usize::from(b[3])]
                ^ TABLES[11][usize::from(b[4])]
                ^ TABLES[10][usize::from(b[5])]
                ^ TABLES[9][usize::from(b[6])]
                ^ TABLES[8][usize::from(b[7])]
                ^ TABLES[7][usize::from(b[8])]
                ^ TABLES[6][usize::from(b[9])]
                ^ TABLES[5][usize::from(b[10])]
                ^ TABLES[4][usize::from(b[11])]
                ^ TABLES[3][usize::from(b[12])]
                ^ TABLES[2][usize::from(b[13])]
                ^ TABLES[1][usize::from(b[14])]
                ^ TABLES[0][usize::from(b[15])];
        }
        for byte in rest {
            crc = crc >> 8 ^ TABLES[0][usize::from(crc.to_le_bytes()[0] ^ byte)];
        }
        self.0 = crc;
    }

    /// The checksum of all bytes taken in so far.
    pub(crate) fn value(&self) -> u32 {
        !self.0
    }
}

/// The checksum of `bytes`.
#[cfg(test)]
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = Crc32::new();
    crc.update(bytes);
    crc.value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_and_any_split() {
        assert_eq!(crc32(b""), 0);
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        let bytes: Vec<u8> = (0..1000u32).map(|i| ((i * i) >> 3) as u8).collect();
        let mut bitwise = !0u32;
        for &b in &bytes {
            bitwise ^= u32::from(b);
            for _ in 0..8 {
                bitwise = if bitwise & 1 == 1 { bitwise >> 1 ^ 0xedb8_8320 } else { bitwise >> 1 };
            }
        }
        assert_eq!(crc32(&bytes), !bitwise);
        for split in [0, 1, 15, 16, 17, 500, 999, 1000] {
            let mut crc = Crc32::new();
            crc.update(&bytes[..split]);
            crc.update(&bytes[split..]);
            assert_eq!(crc.value(), !bitwise, "split at {split}");
        }
    }
}
