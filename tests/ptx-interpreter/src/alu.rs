//! Arithmetic, logic, comparisons, conversions: one function for all 32 lanes per instruction.

use crate::float::{bf16_from_f32, f16_from_f32, f16_to_f32};
use crate::parse::{Kind, Ty};

/// A value for each thread of a warp. 32-bit values have zeros above.
pub(crate) type Lanes = [u64; 32];

/// The result from the sources.
pub(crate) type Alu = fn(&Lanes, &Lanes, &Lanes) -> Lanes;

/// A function on lanes from an expression of `a`, `b`, `c`.
macro_rules! each {
    (|$a:ident, $b:ident, $c:ident| $value:expr) => {
        Some(|a: &Lanes, b: &Lanes, c: &Lanes| {
            let mut out = [0u64; 32];
            for i in 0..32 {
                #[allow(unused_variables)]
                let ($a, $b, $c) = (a[i], b[i], c[i]);
                out[i] = $value;
            }
            out
        })
    };
}

fn f(v: u64) -> f32 {
    f32::from_bits(v as u32)
}

fn bits(v: f32) -> u64 {
    u64::from(v.to_bits())
}

/// The function of an instruction that has sources and one destination, if it is one of those in use.
pub(crate) fn alu(stem: &str, mods: &[&str], types: &[Ty]) -> Option<Alu> {
    let ty = *types.first()?;
    let has = |m: &str| mods.contains(&m);
    let int = ty.kind != Kind::Float && ty.kind != Kind::BFloat;
    match (stem, ty.bits) {
        ("mov" | "cvta", _) => each!(|a, b, c| a),
        ("add", 32) if int => each!(|a, b, c| u64::from((a as u32).wrapping_add(b as u32))),
        ("add", 64) if int => each!(|a, b, c| a.wrapping_add(b)),
        ("add", 16) if int => each!(|a, b, c| u64::from((a as u16).wrapping_add(b as u16))),
        ("sub", 32) if int => each!(|a, b, c| u64::from((a as u32).wrapping_sub(b as u32))),
        ("sub", 64) if int => each!(|a, b, c| a.wrapping_sub(b)),
        ("mul", 32) if int && has("wide") => match ty.kind {
            Kind::Signed => each!(|a, b, c| (i64::from(a as i32) * i64::from(b as i32)) as u64),
            _ => each!(|a, b, c| u64::from(a as u32) * u64::from(b as u32)),
        },
        ("mul", 16) if has("wide") && ty.kind == Kind::Unsigned => {
            each!(|a, b, c| u64::from(a as u16) * u64::from(b as u16))
        }
        ("mul", 32) if int && has("lo") => each!(|a, b, c| u64::from((a as u32).wrapping_mul(b as u32))),
        ("mul", 64) if int && has("lo") => each!(|a, b, c| a.wrapping_mul(b)),
        ("mul", 32) if int && has("hi") && ty.kind == Kind::Unsigned => {
            each!(|a, b, c| (u64::from(a as u32) * u64::from(b as u32)) >> 32)
        }
        ("mad", 32) if has("lo") => {
            each!(|a, b, c| u64::from((a as u32).wrapping_mul(b as u32).wrapping_add(c as u32)))
        }
        ("mad", 64) if has("lo") => each!(|a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        ("mad", 32) if has("wide") && ty.kind == Kind::Unsigned => {
            each!(|a, b, c| (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(c))
        }
        // Division by zero gives all ones on the device.
        ("div", 32) if ty.kind == Kind::Unsigned => {
            each!(|a, b, c| u64::from((a as u32).checked_div(b as u32).unwrap_or(u32::MAX)))
        }
        ("rem", 32) if ty.kind == Kind::Unsigned => {
            each!(|a, b, c| u64::from((a as u32).checked_rem(b as u32).unwrap_or(a as u32)))
        }
        ("div", 32) if ty.kind == Kind::Signed => {
            each!(|a, b, c| u64::from((a as i32).checked_div(b as i32).unwrap_or(-1) as u32))
        }
        ("min", 32 | 64) if ty.kind == Kind::Unsigned => each!(|a, b, c| a.min(b)),
        ("max", 32 | 64) if ty.kind == Kind::Unsigned => each!(|a, b, c| a.max(b)),
        ("min", 32) if ty.kind == Kind::Signed => each!(|a, b, c| u64::from((a as i32).min(b as i32) as u32)),
        ("max", 32) if ty.kind == Kind::Signed => each!(|a, b, c| u64::from((a as i32).max(b as i32) as u32)),
        ("neg", 32) if int => each!(|a, b, c| u64::from((a as u32).wrapping_neg())),
        ("neg", 64) if int => each!(|a, b, c| a.wrapping_neg()),
        ("not", 1) => each!(|a, b, c| u64::from(a == 0)),
        ("not", 16) => each!(|a, b, c| u64::from(!a as u16)),
        ("not", 32) => each!(|a, b, c| u64::from(!a as u32)),
        ("not", 64) => each!(|a, b, c| !a),
        ("and", _) => each!(|a, b, c| a & b),
        ("or", _) => each!(|a, b, c| a | b),
        ("xor", _) => each!(|a, b, c| a ^ b),
        ("shl", 32) => each!(|a, b, c| u64::from((a as u32).checked_shl(b as u32).unwrap_or(0))),
        ("shl", 64) => each!(|a, b, c| a.checked_shl(b as u32).unwrap_or(0)),
        ("shl", 16) => each!(|a, b, c| if b as u32 > 15 { 0 } else { (a << b) & 0xffff }),
        ("shr", 32) if ty.kind == Kind::Signed => {
            each!(|a, b, c| u64::from(((a as i32) >> (b as u32).min(31)) as u32))
        }
        ("shr", 32) => each!(|a, b, c| u64::from((a as u32).checked_shr(b as u32).unwrap_or(0))),
        ("shr", 16) if ty.kind != Kind::Signed => each!(|a, b, c| if b as u32 > 15 { 0 } else { a >> b }),
        ("shr", 64) if ty.kind != Kind::Signed => each!(|a, b, c| a.checked_shr(b as u32).unwrap_or(0)),
        ("popc", 32) => each!(|a, b, c| u64::from((a as u32).count_ones())),
        ("brev", 32) => each!(|a, b, c| u64::from((a as u32).reverse_bits())),
        ("clz", 32) => each!(|a, b, c| u64::from((a as u32).leading_zeros())),
        ("bfind", 32) if has("shiftamt") && ty.kind == Kind::Unsigned => {
            each!(|a, b, c| if a as u32 == 0 { 0xffff_ffff } else { u64::from((a as u32).leading_zeros()) })
        }
        ("selp", _) => each!(|a, b, c| if c != 0 { a } else { b }),
        ("setp", _) => setp(mods, ty),
        ("cvt", _) => cvt(mods, types),
        ("add", 32) => each!(|a, b, c| bits(f(a) + f(b))),
        ("sub", 32) => each!(|a, b, c| bits(f(a) - f(b))),
        ("mul", 32) => each!(|a, b, c| bits(f(a) * f(b))),
        ("div", 32) if has("rn") => each!(|a, b, c| bits(f(a) / f(b))),
        ("sqrt", 32) if has("rn") => each!(|a, b, c| bits(f(a).sqrt())),
        ("fma", 32) if has("rn") => Some(fma),
        ("neg", 32) => each!(|a, b, c| bits(-f(a))),
        ("abs", 32) if !int => each!(|a, b, c| bits(f(a).abs())),
        ("min", 32) => each!(|a, b, c| bits(f(a).min(f(b)))),
        ("max", 32) => each!(|a, b, c| bits(f(a).max(f(b)))),
        _ => None,
    }
}

fn fma(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the processor has the instruction.
        return unsafe { fma_in_hardware(a, b, c) };
    }
    fma_anywhere(a, b, c)
}

#[inline(always)]
fn fma_anywhere(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    let mut out = [0; 32];
    for i in 0..32 {
        out[i] = bits(f(a[i]).mul_add(f(b[i]), f(c[i])));
    }
    out
}

/// The same with the processor's instruction in place of a call of the C library.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "fma,avx2")]
fn fma_in_hardware(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    fma_anywhere(a, b, c)
}

/// Comparisons, optionally joined with a predicate.
fn setp(mods: &[&str], ty: Ty) -> Option<Alu> {
    macro_rules! joined {
        ($t:expr, $test:expr) => {
            match mods.get(1) {
                Some(&"and") => each!(|a, b, c| u64::from($test($t(a), $t(b)) && c != 0)),
                Some(&"or") => each!(|a, b, c| u64::from($test($t(a), $t(b)) || c != 0)),
                _ => each!(|a, b, c| u64::from($test($t(a), $t(b)))),
            }
        };
    }
    macro_rules! ordered {
        ($t:expr) => {
            match *mods.first()? {
                "eq" => joined!($t, |x, y| x == y),
                "ne" => joined!($t, |x, y| x != y),
                "lt" | "lo" => joined!($t, |x, y| x < y),
                "le" | "ls" => joined!($t, |x, y| x <= y),
                "gt" | "hi" => joined!($t, |x, y| x > y),
                "ge" | "hs" => joined!($t, |x, y| x >= y),
                _ => None,
            }
        };
    }
    match (ty.kind, ty.bits) {
        (Kind::Float, 32) => match *mods.first()? {
            "ne" => joined!(f, |x: f32, y: f32| x < y || x > y),
            "equ" => joined!(f, |x: f32, y: f32| !(x < y || x > y)),
            "neu" => joined!(f, |x: f32, y: f32| x != y),
            "ltu" => joined!(f, |x: f32, y: f32| x < y || x.is_nan() || y.is_nan()),
            "leu" => joined!(f, |x: f32, y: f32| x <= y || x.is_nan() || y.is_nan()),
            "gtu" => joined!(f, |x: f32, y: f32| x > y || x.is_nan() || y.is_nan()),
            "geu" => joined!(f, |x: f32, y: f32| x >= y || x.is_nan() || y.is_nan()),
            "nan" => joined!(f, |x: f32, y: f32| x.is_nan() || y.is_nan()),
            "num" => joined!(f, |x: f32, y: f32| !x.is_nan() && !y.is_nan()),
            _ => ordered!(f),
        },
        (Kind::Signed, 32) => ordered!(|v| v as i32),
        (Kind::Signed, 64) => ordered!(|v| v as i64),
        (Kind::Signed, 16) => ordered!(|v| v as i16),
        (Kind::Unsigned | Kind::Bits, 32) => ordered!(|v| v as u32),
        (Kind::Unsigned | Kind::Bits, 64) => ordered!(|v: u64| v),
        (Kind::Unsigned | Kind::Bits, 16) => ordered!(|v| v as u16),
        _ => None,
    }
}

fn cvt(mods: &[&str], types: &[Ty]) -> Option<Alu> {
    let &[to, from] = types else { return None };
    let nearest = mods.contains(&"rn");
    match ((to.kind, to.bits), (from.kind, from.bits)) {
        ((Kind::Float, 32), (Kind::Float, 16)) => each!(|a, b, c| bits(f16_to_f32(a as u16))),
        ((Kind::Float, 16), (Kind::Float, 32)) if nearest => each!(|a, b, c| u64::from(f16_from_f32(f(a)))),
        ((Kind::BFloat, 16), (Kind::Float, 32)) if nearest => each!(|a, b, c| u64::from(bf16_from_f32(f(a)))),
        ((Kind::Float, 32), (Kind::Unsigned, 32)) if nearest => each!(|a, b, c| bits(a as u32 as f32)),
        ((Kind::Float, 32), (Kind::Signed, 32)) if nearest => each!(|a, b, c| bits(a as i32 as f32)),
        ((Kind::Float | Kind::BFloat, _), _) | (_, (Kind::Float | Kind::BFloat, _)) => None,
        ((_, 16), (_, 32 | 64)) => each!(|a, b, c| a & 0xffff),
        ((_, 32), (_, 64)) => each!(|a, b, c| a & 0xffff_ffff),
        ((_, 64), (Kind::Signed, 32)) => each!(|a, b, c| i64::from(a as i32) as u64),
        ((_, 32 | 64), (Kind::Unsigned | Kind::Bits, 16)) => each!(|a, b, c| a & 0xffff),
        ((_, 64), (Kind::Unsigned | Kind::Bits, 32)) => each!(|a, b, c| a & 0xffff_ffff),
        _ => None,
    }
}
