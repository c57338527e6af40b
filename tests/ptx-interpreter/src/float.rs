//! Half precision, written from its definition.

/// 1 sign, 5 exponent (bias 15), 10 fraction bits.
pub(crate) fn f16_to_f32(v: u16) -> f32 {
    let (exponent, fraction) = ((v >> 10) & 31, f32::from(v & 0x3ff));
    let magnitude = match exponent {
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        0 => fraction * 2f32.powi(-24),
        _ => (1024.0 + fraction) * 2f32.powi(i32::from(exponent) - 25),
    };
    if v >> 15 == 1 { -magnitude } else { magnitude }
}

/// To nearest, ties to even.
pub(crate) fn f16_from_f32(v: f32) -> u16 {
    let sign = ((v.to_bits() >> 31) as u16) << 15;
    let magnitude = v.abs();
    if v.is_nan() {
        return 0x7fff;
    }
    if magnitude >= 65520.0 {
        return sign | 0x7c00;
    }
    // The unit in the last place of the result: 2^-24 for subnormals. Dividing by it is exact.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-14);
    let units = (f64::from(magnitude) * 2f64.powi(10 - exponent)).round_ties_even() as u16;
    // A fraction that rounds up to the next power of two carries into the exponent, as it should.
    sign | if units < 1024 { units } else { (((exponent + 15) as u16) << 10) + (units - 1024) }
}

/// The upper half of a float32, to nearest, ties to even.
pub(crate) fn bf16_from_f32(v: f32) -> u16 {
    if v.is_nan() {
        return 0x7fff;
    }
    let bits = v.to_bits();
    ((u64::from(bits) + 0x7fff + u64::from((bits >> 16) & 1)) >> 16) as u16
}

pub(crate) fn bf16_to_f32(v: u16) -> f32 {
    f32::from_bits(u32::from(v) << 16)
}

/// Toward zero, as tensor cores round their sums.
pub(crate) fn truncate(v: f64) -> f32 {
    let nearest = v as f32;
    if nearest.is_finite() && f64::from(nearest).abs() > v.abs() {
        return f32::from_bits(nearest.to_bits() - 1);
    }
    nearest
}
