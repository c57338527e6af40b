//! Element types, and the only function that rounds to them.

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

use crate::error::{Error, Result};

/// The type of a tensor's elements. `float32`, `float16` and `bfloat16` are those a crosscoder can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// float64
    F64,
    /// float32, `fp32` in a cfg
    F32,
    /// float16, `fp16` in a cfg
    F16,
    /// bfloat16, `bf16` in a cfg
    BF16,
    /// int64
    I64,
    /// int32
    I32,
    /// int16
    I16,
    /// int8
    I8,
    /// uint8
    U8,
    /// bool, one byte, 0 or 1
    Bool,
}

impl Dtype {
    /// Every type, widest float first.
    pub const ALL: [Dtype; 10] = [
        Dtype::F64,
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::I64,
        Dtype::I32,
        Dtype::I16,
        Dtype::I8,
        Dtype::U8,
        Dtype::Bool,
    ];

    /// PyTorch's name without `torch.`: `float32`, `bfloat16`, `int64`, …
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "float64",
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            Dtype::I64 => "int64",
            Dtype::I32 => "int32",
            Dtype::I16 => "int16",
            Dtype::I8 => "int8",
            Dtype::U8 => "uint8",
            Dtype::Bool => "bool",
        }
    }

    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }

    /// The spelling of `enc_dtype` in a cfg; none for types a crosscoder cannot have. Original: `DTYPES`.
    pub fn enc_name(self) -> Option<&'static str> {
        match self {
            Dtype::F32 => Some("fp32"),
            Dtype::F16 => Some("fp16"),
            Dtype::BF16 => Some("bf16"),
            _ => None,
        }
    }

    /// The type that a cfg's `enc_dtype` names. Original: `DTYPES`.
    ///
    /// # Errors
    /// Any other spelling than `fp32`, `fp16`, `bf16`.
    pub fn from_enc_name(name: &str) -> Result<Self> {
        match name {
            "fp32" => Ok(Dtype::F32),
            "fp16" => Ok(Dtype::F16),
            "bf16" => Ok(Dtype::BF16),
            _ => Err(Error::config(format!("enc_dtype is {name:?}; it must be \"fp32\", \"fp16\" or \"bf16\""))),
        }
    }

    /// `v` rounded to nearest, ties to even, to this float type, as `tensor.to(dtype)` rounds. Overflow gives infinity,
    /// float16 subnormals are kept. Types of 32 bits and more, and integers, leave `v` as it is.
    #[inline]
    pub fn round(self, v: f32) -> f32 {
        match self {
            Dtype::F16 => round_to_f16(v),
            Dtype::BF16 => round_to_bf16(v),
            _ => v,
        }
    }

    /// The unit roundoff: 2^-24, 2^-11, 2^-8 for float32, float16, bfloat16 (and 2^-53 for float64).
    ///
    /// # Panics
    /// For integers, which do not round.
    #[allow(clippy::panic)] // As documented; no file's dtype comes here.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            Dtype::F64 => f64::EPSILON / 2.0,
            Dtype::F32 => f64::from(f32::EPSILON) / 2.0,
            Dtype::F16 => 2f64.powi(-11),
            Dtype::BF16 => 2f64.powi(-8),
            _ => panic!("{self} does not round"),
        }
    }
}

// The two roundings without branches or calls, so that loops over them are vectorised; `half`, whose results they have,
// asks the processor for its features at each element.

const INFINITY: u32 = 0x7F80_0000;
const QUIET: u32 = 0x0040_0000;

/// The bits of |v|, and the bit of its sign.
#[inline(always)]
fn magnitude(v: f32) -> (u32, u32) {
    (v.to_bits() & 0x7FFF_FFFF, v.to_bits() & 0x8000_0000)
}

#[inline(always)]
#[allow(clippy::arithmetic_side_effects)] // `bits` is below 2^31: the sum fits.
fn round_to_bf16(v: f32) -> f32 {
    let (bits, sign) = magnitude(v);
    // Half of the last place is added, less one if the place before is even; a carry into the exponent is right.
    let rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF_0000;
    let nan = (bits & 0xFFFF_0000) | QUIET;
    f32::from_bits(if bits > INFINITY { nan } else { rounded } | sign)
}

#[inline(always)]
#[allow(clippy::arithmetic_side_effects)] // `bits` is below 2^31: the sum fits.
fn round_to_f16(v: f32) -> f32 {
    const SMALLEST_NORMAL: u32 = 0x3880_0000; // 2^-14
    const OVERFLOW: u32 = 0x477F_F000; // 65520: halfway from the largest, 65504, to 2^16
    let (bits, sign) = magnitude(v);
    let rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFF_E000;
    let rounded = if bits >= OVERFLOW { INFINITY } else { rounded };
    let nan = (bits & 0xFFFF_E000) | QUIET;
    // In [1/2, 1) the last place of float32 is 2^-24, the smallest float16.
    let small = ((f32::from_bits(bits) + 0.5) - 0.5).to_bits();
    let rounded = if bits < SMALLEST_NORMAL { small } else { rounded };
    f32::from_bits(if bits > INFINITY { nan } else { rounded } | sign)
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_nearest_even() {
        // 1 + 2^-8 lies halfway between 1 and 1 + 2^-7: the even neighbour is 1. 1 + 3·2^-8 goes up.
        assert_eq!(Dtype::BF16.round(1.0 + 0.00390625), 1.0);
        assert_eq!(Dtype::BF16.round(1.0 + 3.0 * 0.00390625), 1.015625);
        assert_eq!(Dtype::F16.round(2049.0), 2048.0);
        assert_eq!(Dtype::F16.round(65520.0), f32::INFINITY);
        assert_eq!(Dtype::F16.round(2f32.powi(-24)), 2f32.powi(-24));
        assert_eq!(Dtype::F32.round(0.1), 0.1);
        assert!(Dtype::BF16.round(f32::NAN).is_nan());
    }

    #[test]
    fn rounds_as_half_does() {
        use half::{bf16, f16};
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0xFFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xB000, 0xFFFF] {
                let v = f32::from_bits(u32::from(upper) << 16 | lower);
                let (f, b) = (f16::from_f32(v).to_f32(), bf16::from_f32(v).to_f32());
                assert_eq!(Dtype::F16.round(v).to_bits(), f.to_bits(), "{v:e} in float16");
                assert_eq!(Dtype::BF16.round(v).to_bits(), b.to_bits(), "{v:e} in bfloat16");
            }
        }
    }

    #[test]
    fn enc_names_round_trip() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            assert_eq!(Dtype::from_enc_name(dtype.enc_name().unwrap()).unwrap(), dtype);
        }
        assert!(Dtype::from_enc_name("float32").unwrap_err().to_string().contains("float32"));
    }
}
