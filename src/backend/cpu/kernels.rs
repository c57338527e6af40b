//! Inner loops, and the only `unsafe` of the CPU: vector instructions that the processor is asked for at run time.
//!
//! Every function exists for each [`Level`] of instructions: portable code that any compiler vectorises, the same source
//! compiled for AVX2 and AVX-512, and by hand what compilers do not find (tiles of a product, transposing, bfloat16).
//!
//! **Order of sums.** A product's sum of `k` terms is cut into segments ([`segment_len`]); a segment's terms are added one
//! after the other with fused multiply-add (without it in portable code), then the segments in order. [`multiply`] and
//! [`segment_dots`] follow that order alike, so both give the same bits: the first where all products of many rows are
//! needed, the second for single ones.
#![allow(unsafe_code)]

use crate::backend::{AdamStep, Scalar};
use crate::dtype::Dtype;
use half::{bf16, f16};
use std::any::TypeId;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Floats in a vector of the widest kind; sums of rows have as many lanes at every level.
pub(super) const LANES: usize = 16;

/// The longest segment of a product's sum: with it, a panel of the left side fits into the first-level cache.
const MAX_SEGMENT: usize = 512;

/// Instructions that this processor has. A value exists only where they were found, which is what makes calls safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Level(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
enum Set {
    Portable,
    Avx2,
    Avx512,
    Avx512Bf16,
}

impl Level {
    /// All that this processor has, the plainest first.
    pub(super) fn available() -> &'static [Level] {
        static FOUND: OnceLock<Vec<Level>> = OnceLock::new();
        FOUND.get_or_init(|| {
            #[allow(unused_mut)]
            let mut found = vec![Level(Set::Portable)];
            #[cfg(target_arch = "x86_64")]
            {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("bmi1")
                    && is_x86_feature_detected!("popcnt");
                let avx512 = avx2
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq");
                let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
                for (has, set) in [(avx2, Set::Avx2), (avx512, Set::Avx512), (bf16, Set::Avx512Bf16)] {
                    if has {
                        found.push(Level(set));
                    }
                }
            }
            found
        })
    }

    /// The most capable.
    pub(super) fn best() -> Level {
        *Self::available().last().expect("the portable one is always there")
    }

    /// `portable`, `avx2+fma`, `avx512` or `avx512+bf16`.
    pub(super) fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            Set::Avx2 => "avx2+fma",
            Set::Avx512 => "avx512",
            Set::Avx512Bf16 => "avx512+bf16",
        }
    }

    /// Whether pairs of bfloat16 can be multiplied: [`multiply_pairs`].
    pub(super) fn has_pairs(self) -> bool {
        self.0 == Set::Avx512Bf16
    }

    /// Rows of the two sides of a tile of a product: (left, right).
    pub(super) fn tile<T: Scalar>(self) -> (usize, usize) {
        match self.0 {
            _ if !is::<T, f32>() => (4, 8),
            Set::Portable => (4, 8),
            Set::Avx2 => (6, 16),
            Set::Avx512 | Set::Avx512Bf16 => (14, 32),
        }
    }
}

/// Terms of a segment of a sum of `k` terms: a multiple of 16 segments, none longer than [`MAX_SEGMENT`].
pub(super) fn segment_len(k: usize) -> usize {
    k.div_ceil(LANES * segment_groups(k)).max(1)
}

/// Groups of 16 segments that a sum of `k` terms has.
pub(super) fn segment_groups(k: usize) -> usize {
    k.div_ceil(LANES * MAX_SEGMENT).max(1)
}

fn is<T: 'static, U: 'static>() -> bool {
    TypeId::of::<T>() == TypeId::of::<U>()
}

/// The same slice, if `T` is `U`.
fn same<T: 'static, U: 'static>(v: &[T]) -> Option<&[U]> {
    // SAFETY: the types are the same, as compared, so pointer, length and lifetime stay valid.
    is::<T, U>().then(|| unsafe { std::slice::from_raw_parts(v.as_ptr().cast(), v.len()) })
}

fn same_mut<T: 'static, U: 'static>(v: &mut [T]) -> Option<&mut [U]> {
    // SAFETY: as in `same`; the exclusive borrow is passed on.
    is::<T, U>().then(|| unsafe { std::slice::from_raw_parts_mut(v.as_mut_ptr().cast(), v.len()) })
}

/// `a · b + c`, fused where `FMA`.
#[inline(always)]
fn fma<T: Scalar, const FMA: bool>(a: T, b: T, c: T) -> T {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Whether portable code may fuse: where the compiler knows an instruction for it, and not a library call.
const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

/// Defines `name(level, …)` that runs `body::<…, FMA>(…)` compiled for the level's instructions.
macro_rules! at_each_level {
    ($(#[$doc:meta])* fn $name:ident<$T:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub(super) fn $name<$T: Scalar>(level: Level, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,bmi1,popcnt")]
                fn avx2<$T: Scalar>($($arg: $ty),*) $(-> $ret)? {
                    $body::<$T, true>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi1,popcnt")]
                fn avx512<$T: Scalar>($($arg: $ty),*) $(-> $ret)? {
                    $body::<$T, true>($($arg),*)
                }
                match level.0 {
                    // SAFETY: a `Level` is only made where the processor has its instructions.
                    Set::Avx2 => return unsafe { avx2::<$T>($($arg),*) },
                    // SAFETY: as above.
                    Set::Avx512 | Set::Avx512Bf16 => return unsafe { avx512::<$T>($($arg),*) },
                    Set::Portable => {}
                }
            }
            let _ = level;
            $body::<$T, FUSED>($($arg),*)
        }
    };
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

at_each_level! {
    /// `out[i] += v · row[i]`
    fn add_scaled<T>(out: &mut [T], v: T, row: &[T]) = add_scaled_body
}

#[inline(always)]
fn add_scaled_body<T: Scalar, const FMA: bool>(out: &mut [T], v: T, row: &[T]) {
    for (o, &r) in out.iter_mut().zip(row) {
        *o = fma::<T, FMA>(v, r, *o);
    }
}

at_each_level! {
    /// `Σ a[i] · b[i]` in 64 lanes.
    fn dot<T>(a: &[T], b: &[T]) -> T = dot_body
}

#[inline(always)]
fn dot_body<T: Scalar, const FMA: bool>(a: &[T], b: &[T]) -> T {
    fold::<T>(
        a,
        b,
        #[inline(always)]
        |acc, a, b| fma::<T, FMA>(a, b, acc),
    )
}

at_each_level! {
    /// `Σ a[i]²` in 64 lanes.
    fn sum_of_squares<T>(a: &[T]) -> T = sum_of_squares_body
}

#[inline(always)]
fn sum_of_squares_body<T: Scalar, const FMA: bool>(a: &[T]) -> T {
    fold::<T>(
        a,
        a,
        #[inline(always)]
        |acc, a, _| fma::<T, FMA>(a, a, acc),
    )
}

/// A sum over pairs in 64 lanes, element `i` in lane `i % 64`, the lanes then added in halves: one order at every level,
/// and an error that grows with n/64.
#[inline(always)]
pub(super) fn fold<T: Scalar>(a: &[T], b: &[T], add: impl Fn(T, T, T) -> T) -> T {
    const N: usize = 4 * LANES;
    let n = a.len().min(b.len());
    let mut lanes = [T::zero(); N];
    let ((a, a_rest), (b, b_rest)) = (a[..n].as_chunks::<N>(), b[..n].as_chunks::<N>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..N {
            lanes[i] = add(lanes[i], a[i], b[i]);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = add(*lane, a, b);
    }
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// One of the three roundings `r`, chosen outside of loops so that compilers vectorise them.
trait Rounding {
    fn r<T: Scalar>(v: T) -> T;
}

struct NoRounding;
struct ToBF16;
struct ToF16;

impl Rounding for NoRounding {
    #[inline(always)]
    fn r<T: Scalar>(v: T) -> T {
        v
    }
}

impl Rounding for ToBF16 {
    #[inline(always)]
    fn r<T: Scalar>(v: T) -> T {
        v.rounded_to(Dtype::BF16)
    }
}

impl Rounding for ToF16 {
    #[inline(always)]
    fn r<T: Scalar>(v: T) -> T {
        v.rounded_to(Dtype::F16)
    }
}

/// Calls a body with the rounding to `dtype`; float64, the judge, rounds nowhere.
macro_rules! with_rounding {
    ($dtype:expr, $T:ty, $body:ident::<$FMA:ident>($($arg:expr),*)) => {
        match $dtype {
            Dtype::BF16 if is::<$T, f32>() => $body::<$T, $FMA, ToBF16>($($arg),*),
            Dtype::F16 if is::<$T, f32>() => $body::<$T, $FMA, ToF16>($($arg),*),
            _ => $body::<$T, $FMA, NoRounding>($($arg),*),
        }
    };
}

at_each_level! {
    /// `v = r(v)`, or where there is a bias `r(r(v) + bias)`, or relu of that.
    fn finish<T>(row: &mut [T], bias: &[T], relu: bool, dtype: Dtype) = finish_any
}

#[inline(always)]
fn finish_any<T: Scalar, const FMA: bool>(row: &mut [T], bias: &[T], relu: bool, dtype: Dtype) {
    with_rounding!(dtype, T, finish_body::<FMA>(row, bias, relu));
}

#[inline(always)]
fn finish_body<T: Scalar, const FMA: bool, R: Rounding>(row: &mut [T], bias: &[T], relu: bool) {
    let zero = T::zero();
    if relu {
        for (v, &bias) in row.iter_mut().zip(bias) {
            let pre = R::r(R::r(*v) + bias);
            // nan <= 0 is false: relu passes nan on, as torch.relu does.
            *v = if pre <= zero { zero } else { pre };
        }
    } else {
        for (v, &bias) in row.iter_mut().zip(bias) {
            *v = R::r(R::r(*v) + bias);
        }
    }
}

at_each_level! {
    /// `v = r(v)`
    fn round<T>(values: &mut [T], dtype: Dtype) = round_any
}

#[inline(always)]
fn round_any<T: Scalar, const FMA: bool>(values: &mut [T], dtype: Dtype) {
    with_rounding!(dtype, T, round_body::<FMA>(values));
}

#[inline(always)]
fn round_body<T: Scalar, const FMA: bool, R: Rounding>(values: &mut [T]) {
    values.iter_mut().for_each(|v| *v = R::r(*v));
}

at_each_level! {
    /// `out = values`, exactly.
    fn widen_bf16<T>(values: &[bf16], out: &mut [T]) = widen_bf16_body
}

#[inline(always)]
fn widen_bf16_body<T: Scalar, const FMA: bool>(values: &[bf16], out: &mut [T]) {
    for (o, v) in out.iter_mut().zip(values) {
        *o = T::narrow(f64::from(f32::from_bits(u32::from(v.to_bits()) << 16)));
    }
}

at_each_level! {
    /// `out = values`, which are bfloat16 already.
    fn narrow_bf16<T>(values: &[T], out: &mut [bf16]) = narrow_bf16_body
}

#[inline(always)]
fn narrow_bf16_body<T: Scalar, const FMA: bool>(values: &[T], out: &mut [bf16]) {
    for (o, v) in out.iter_mut().zip(values) {
        *o = bf16::from_bits(((v.wide() as f32).to_bits() >> 16) as u16);
    }
}

at_each_level! {
    /// `out = values`, exactly.
    fn widen_f16<T>(values: &[f16], out: &mut [T]) = widen_f16_body
}

#[inline(always)]
fn widen_f16_body<T: Scalar, const FMA: bool>(values: &[f16], out: &mut [T]) {
    for (o, v) in out.iter_mut().zip(values) {
        let bits = u32::from(v.to_bits());
        // Exponent and fraction in the places of float32, the exponent 112 too small; the product also makes subnormals right.
        let finite = (f32::from_bits((bits & 0x7FFF) << 13) * 2f32.powi(112)).to_bits();
        let special = (bits & 0x7FFF) << 13 | 0x7F80_0000;
        let magnitude = if bits & 0x7C00 == 0x7C00 { special } else { finite };
        *o = T::narrow(f64::from(f32::from_bits(magnitude | (bits & 0x8000) << 16)));
    }
}

at_each_level! {
    /// `out = values`, which are float16 already.
    fn narrow_f16<T>(values: &[T], out: &mut [f16]) = narrow_f16_body
}

#[inline(always)]
fn narrow_f16_body<T: Scalar, const FMA: bool>(values: &[T], out: &mut [f16]) {
    for (o, v) in out.iter_mut().zip(values) {
        let bits = (v.wide() as f32).to_bits();
        let magnitude = bits & 0x7FFF_FFFF;
        // The inverse of widening: the exponent 112 smaller, which makes what is below 2^-14 subnormal.
        let finite = (f32::from_bits(magnitude) * 2f32.powi(-112)).to_bits() >> 13;
        let special = 0x7C00 | (magnitude >> 13 & 0x3FF);
        let magnitude = if magnitude >= 0x7F80_0000 { special } else { finite };
        *o = f16::from_bits((magnitude | bits >> 16 & 0x8000) as u16);
    }
}

at_each_level! {
    /// `out = r(value)`, or `out = r(out + r(value))` if `add`.
    fn write<T>(out: &mut [T], values: &[T], add: bool, dtype: Dtype) = write_any
}

#[inline(always)]
fn write_any<T: Scalar, const FMA: bool>(out: &mut [T], values: &[T], add: bool, dtype: Dtype) {
    with_rounding!(dtype, T, write_body::<FMA>(out, values, add));
}

#[inline(always)]
fn write_body<T: Scalar, const FMA: bool, R: Rounding>(out: &mut [T], values: &[T], add: bool) {
    if add {
        out.iter_mut().zip(values).for_each(|(o, &v)| *o = R::r(*o + R::r(v)));
    } else {
        out.iter_mut().zip(values).for_each(|(o, &v)| *o = R::r(v));
    }
}

at_each_level! {
    /// `Σ r(r(a - b)²)`, the lanes of [`fold`].
    fn squared_distance<T>(a: &[T], b: &[T], dtype: Dtype) -> T = squared_distance_any
}

#[inline(always)]
fn squared_distance_any<T: Scalar, const FMA: bool>(a: &[T], b: &[T], dtype: Dtype) -> T {
    with_rounding!(dtype, T, squared_distance_body::<FMA>(a, b))
}

#[inline(always)]
fn squared_distance_body<T: Scalar, const FMA: bool, R: Rounding>(a: &[T], b: &[T]) -> T {
    fold::<T>(
        a,
        b,
        #[inline(always)]
        |acc, a, b| {
            let difference = R::r(a - b);
            acc + R::r(difference * difference)
        },
    )
}

at_each_level! {
    /// `out = r(g · (2 · (a - b)))`
    fn squared_distance_grad<T>(a: &[T], b: &[T], g: T, out: &mut [T], dtype: Dtype) = squared_distance_grad_any
}

#[inline(always)]
fn squared_distance_grad_any<T: Scalar, const FMA: bool>(a: &[T], b: &[T], g: T, out: &mut [T], dtype: Dtype) {
    with_rounding!(dtype, T, squared_distance_grad_body::<FMA>(a, b, g, out));
}

#[inline(always)]
fn squared_distance_grad_body<T: Scalar, const FMA: bool, R: Rounding>(a: &[T], b: &[T], g: T, out: &mut [T]) {
    let two = T::one() + T::one();
    for ((o, &a), &b) in out.iter_mut().zip(a).zip(b) {
        *o = R::r(g * (two * (a - b)));
    }
}

at_each_level! {
    /// A row of [`crate::backend::Backend::weighted_sums_grad`]: `d_acts = r(g · t)` where `acts` let it through, `d_t += r(g · acts)`.
    fn weighted_grad<T>(acts: &[T], t: &[T], g: T, d_acts: &mut [T], d_t: &mut [T], dtype: Dtype) = weighted_grad_any
}

#[inline(always)]
fn weighted_grad_any<T: Scalar, const FMA: bool>(
    acts: &[T],
    t: &[T],
    g: T,
    d_acts: &mut [T],
    d_t: &mut [T],
    dtype: Dtype,
) {
    with_rounding!(dtype, T, weighted_grad_body::<FMA>(acts, t, g, d_acts, d_t));
}

#[inline(always)]
fn weighted_grad_body<T: Scalar, const FMA: bool, R: Rounding>(
    acts: &[T],
    t: &[T],
    g: T,
    d_acts: &mut [T],
    d_t: &mut [T],
) {
    for (((&a, &t), d_a), d_t) in acts.iter().zip(t).zip(d_acts).zip(d_t) {
        *d_a = if a <= T::zero() { T::zero() } else { R::r(g * t) };
        *d_t += R::r(g * a);
    }
}

at_each_level! {
    /// `out = r(r(r(w / norm) · g) …)` written as [`write()`] does; 0 where the norm is 0.
    fn unit_times<T>(w: &[T], norm: T, g: T, out: &mut [T], add: bool, dtype: Dtype) = unit_times_any
}

#[inline(always)]
fn unit_times_any<T: Scalar, const FMA: bool>(w: &[T], norm: T, g: T, out: &mut [T], add: bool, dtype: Dtype) {
    with_rounding!(dtype, T, unit_times_body::<FMA>(w, norm, g, out, add));
}

#[inline(always)]
fn unit_times_body<T: Scalar, const FMA: bool, R: Rounding>(w: &[T], norm: T, g: T, out: &mut [T], add: bool) {
    let zero = T::zero();
    for (o, &w) in out.iter_mut().zip(w) {
        let unit = if norm == zero { zero } else { R::r(w / norm) };
        let value = R::r(unit * g);
        *o = if add { R::r(*o + value) } else { value };
    }
}

at_each_level! {
    /// Whether all are finite.
    fn all_finite<T>(v: &[T]) -> bool = all_finite_body
}

#[inline(always)]
fn all_finite_body<T: Scalar, const FMA: bool>(v: &[T]) -> bool {
    // In pieces, so that the loop inside has no exit and is vectorised, but ends early. (No iterator's `all`: a closure that
    // is not inlined is compiled without the level's instructions.)
    let zero = T::zero();
    for v in v.chunks(1 << 12) {
        if fold::<T>(
            v,
            v,
            #[inline(always)]
            |acc, v, _| fma::<T, FMA>(v, zero, acc),
        ) != zero
        {
            return false;
        }
    }
    true
}

at_each_level! {
    /// See [`crate::backend::Backend::adam`]; one element after the other. In float32 the two moments' sums are fused with
    /// their products, where the processor can, as PyTorch does.
    fn adam<T>(p: &mut [T], g: &[T], m: &mut [T], v: &mut [T], step: &AdamStep<T>, dtype: Dtype) = adam_any
}

#[inline(always)]
fn adam_any<T: Scalar, const FMA: bool>(
    p: &mut [T],
    g: &[T],
    m: &mut [T],
    v: &mut [T],
    step: &AdamStep<T>,
    dtype: Dtype,
) {
    match dtype {
        Dtype::BF16 if is::<T, f32>() => adam_body::<T, false, ToBF16>(p, g, m, v, step),
        Dtype::F16 if is::<T, f32>() => adam_body::<T, false, ToF16>(p, g, m, v, step),
        _ => adam_body::<T, FMA, NoRounding>(p, g, m, v, step),
    }
}

#[inline(always)]
fn adam_body<T: Scalar, const FMA: bool, R: Rounding>(
    p: &mut [T],
    g: &[T],
    m: &mut [T],
    v: &mut [T],
    step: &AdamStep<T>,
) {
    let near_g = step.one_minus_beta1 >= T::narrow(0.5);
    let weight = if near_g { step.one_minus_beta1 - T::one() } else { step.one_minus_beta1 };
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = R::r(step.clip * g);
        *m = R::r(fma::<T, FMA>(weight, g - *m, if near_g { g } else { *m }));
        *v = R::r(fma::<T, FMA>(step.one_minus_beta2 * g, g, R::r(step.beta2 * *v)));
        let denom = R::r(R::r(R::r(v.sqrt()) / step.bias_correction2_sqrt) + step.eps);
        *p = R::r(*p - step.step_size * *m / denom);
    }
}

/// `out = Σ_e values[e] · y[rows[e]]`, y having rows of `out.len()` elements; terms in the order of e.
pub(super) fn gather_rows<T: Scalar>(level: Level, out: &mut [T], y: &[T], rows: &[u32], values: &[T]) {
    // Columns are added up in registers: eight of AVX-512, twelve of AVX2.
    match level.0 {
        Set::Avx512 | Set::Avx512Bf16 => gather_128(level, out, y, rows, values),
        Set::Avx2 | Set::Portable => gather_96(level, out, y, rows, values),
    }
}

at_each_level! { fn gather_128<T>(out: &mut [T], y: &[T], rows: &[u32], values: &[T]) = gather_body_128 }
at_each_level! { fn gather_96<T>(out: &mut [T], y: &[T], rows: &[u32], values: &[T]) = gather_body_96 }

#[inline(always)]
fn gather_body_128<T: Scalar, const FMA: bool>(out: &mut [T], y: &[T], rows: &[u32], values: &[T]) {
    gather_body::<T, FMA, 128>(out, y, rows, values);
}

#[inline(always)]
fn gather_body_96<T: Scalar, const FMA: bool>(out: &mut [T], y: &[T], rows: &[u32], values: &[T]) {
    gather_body::<T, FMA, 96>(out, y, rows, values);
}

#[inline(always)]
fn gather_body<T: Scalar, const FMA: bool, const N: usize>(out: &mut [T], y: &[T], rows: &[u32], values: &[T]) {
    let width = out.len();
    let terms = rows.iter().zip(values).map(|(&b, &v)| (b as usize * width, v));
    let mut acc = [T::zero(); N];
    if width < N {
        for (at, v) in terms {
            acc.iter_mut().zip(&y[at..at + width]).for_each(|(a, &y)| *a = fma::<T, FMA>(v, y, *a));
        }
        out.copy_from_slice(&acc[..width]);
        return;
    }
    // The last columns end with the row, and may be computed twice.
    for from in (0..width).step_by(N).map(|from| from.min(width - N)) {
        let mut acc = [T::zero(); N];
        for (at, v) in terms.clone() {
            let y = y[at + from..].first_chunk::<N>().expect("columns of a row");
            (0..N).for_each(|j| acc[j] = fma::<T, FMA>(v, y[j], acc[j]));
        }
        out[from..from + N].copy_from_slice(&acc);
    }
}

/// Columns that [`scatter_row`] is fastest at.
const PIECE: usize = 128;

at_each_level! {
    /// `out[rows[e]] += values[at[e]] · row`, out having rows of `row.len()` elements.
    fn scatter_row<T>(out: &mut [T], row: &[T], rows: &[u32], at: &[u32], values: &[T]) = scatter_row_body
}

#[inline(always)]
fn scatter_row_body<T: Scalar, const FMA: bool>(out: &mut [T], row: &[T], rows: &[u32], at: &[u32], values: &[T]) {
    let width = row.len();
    for (&b, &at) in rows.iter().zip(at) {
        let (out, v) = (&mut out[b as usize * width..][..width], values[at as usize]);
        match (<&mut [T; PIECE]>::try_from(&mut *out), <&[T; PIECE]>::try_from(row)) {
            (Ok(out), Ok(row)) => (0..PIECE).for_each(|j| out[j] = fma::<T, FMA>(v, row[j], out[j])),
            _ => out.iter_mut().zip(row).for_each(|(o, &r)| *o = fma::<T, FMA>(v, r, *o)),
        }
    }
}

/// Terms of a block of [`super::masked`]: a mask has a bit for each.
pub(super) const MASKED_TERMS: usize = 64;

/// Columns of a panel that a masked side is multiplied with: they are added up in twelve registers of AVX2 or six of AVX-512,
/// and 64 terms of them are 24 KiB.
pub(super) const MASKED_COLUMNS: usize = 96;

at_each_level! {
    /// A block of at most 64 terms, element (row, term) at `row · row_stride + term · term_stride` of `v`: for each row the mask
    /// of those that are not zero (nan is not), and for as many rows as there is room, 64 places each, their values in order.
    fn mask<T>(v: &[T], row_stride: usize, term_stride: usize, terms: usize, masks: &mut [u64], values: &mut [T]) = mask_body
}

#[inline(always)]
fn mask_body<T: Scalar, const FMA: bool>(
    v: &[T],
    row_stride: usize,
    term_stride: usize,
    terms: usize,
    masks: &mut [u64],
    values: &mut [T],
) {
    assert!(terms <= MASKED_TERMS);
    let mut values = values.as_chunks_mut::<MASKED_TERMS>().0.iter_mut();
    masks.fill(0);
    // 32 rows of 64 terms stay in the first-level cache.
    for (first, masks) in (0..).step_by(32).zip(masks.chunks_mut(32)) {
        if term_stride == 1 {
            for (mask, i) in masks.iter_mut().zip(first..) {
                for (t, &v) in v[i * row_stride..][..terms].iter().enumerate() {
                    *mask |= u64::from(v != T::zero()) << t;
                }
            }
        } else {
            assert_eq!(row_stride, 1, "the rows of a term are neighbours");
            for t in 0..terms {
                for (mask, &v) in masks.iter_mut().zip(&v[t * term_stride + first..]) {
                    *mask |= u64::from(v != T::zero()) << t;
                }
            }
        }
        for ((&mask, i), values) in masks.iter().zip(first..).zip(&mut values) {
            let mut left = mask;
            for value in &mut values[..mask.count_ones() as usize] {
                *value = v[i * row_stride + left.trailing_zeros() as usize * term_stride];
                left &= left.wrapping_sub(1);
            }
        }
    }
}

at_each_level! {
    /// `tile[i] += Σ_t v[i,t] · panel[t]` over the terms t that the mask of row i names, `values` being their v in order; one after
    /// the other from zero.
    fn add_masked<T>(masks: &[u64], values: &[T], panel: &[T], tile: &mut [T]) = add_masked_body
}

#[inline(always)]
fn add_masked_body<T: Scalar, const FMA: bool>(masks: &[u64], values: &[T], panel: &[T], tile: &mut [T]) {
    let (values, panel) = (values.as_chunks::<MASKED_TERMS>().0, panel.as_chunks::<MASKED_COLUMNS>().0);
    for ((&mask, values), out) in masks.iter().zip(values).zip(tile.as_chunks_mut::<MASKED_COLUMNS>().0) {
        let (mut acc, mut left) = ([T::zero(); MASKED_COLUMNS], mask);
        for &v in &values[..mask.count_ones() as usize] {
            let row = &panel[left.trailing_zeros() as usize];
            left &= left.wrapping_sub(1);
            (0..MASKED_COLUMNS).for_each(|j| acc[j] = fma::<T, FMA>(v, row[j], acc[j]));
        }
        out.iter_mut().zip(&acc).for_each(|(o, &a)| *o += a);
    }
}

/// Elements that share a scale in a [`super::sketch::Sketch`].
pub(super) const GROUP: usize = 64;

at_each_level! {
    /// `w' = scale · code` for each group of a row, code in -127 … 127; returns `[Σ w², Σ (w - w')²]`.
    fn sketch<T>(row: &[T], codes: &mut [i8], scales: &mut [T]) -> [T; 2] = sketch_body
}

#[inline(always)]
fn sketch_body<T: Scalar, const FMA: bool>(row: &[T], codes: &mut [i8], scales: &mut [T]) -> [T; 2] {
    let (zero, most) = (T::zero(), T::narrow(127.0));
    let mut sums = [[zero; GROUP]; 2];
    for ((w, codes), scale) in row.chunks(GROUP).zip(codes.chunks_mut(GROUP)).zip(scales) {
        // nan is no maximum here; it makes the error nan below.
        let largest = w.iter().fold(zero, |largest, w| if w.abs() > largest { w.abs() } else { largest });
        *scale = largest / most;
        let inverse = if largest > zero { most / largest } else { zero };
        for (i, (&w, code)) in w.iter().zip(codes).enumerate() {
            // Halves go to the even neighbour, by an addition that leaves no bits behind the point.
            let point = T::narrow(1.5 * 2f64.powi(if is::<T, f32>() { 23 } else { 52 }));
            let rounded = (w * inverse + point) - point;
            *code = rounded.wide() as i8;
            let error = fma::<T, FMA>(-T::narrow(f64::from(*code)), *scale, w);
            sums[0][i] = fma::<T, FMA>(w, w, sums[0][i]);
            sums[1][i] = fma::<T, FMA>(error, error, sums[1][i]);
        }
    }
    sums.map(|lanes| lanes.into_iter().sum())
}

at_each_level! {
    /// `Σ x[i] · scale · code[i]`, the lanes of [`fold`].
    fn sketch_dot<T>(x: &[T], codes: &[i8], scales: &[T]) -> T = sketch_dot_body
}

#[inline(always)]
fn sketch_dot_body<T: Scalar, const FMA: bool>(x: &[T], codes: &[i8], scales: &[T]) -> T {
    let mut lanes = [T::zero(); GROUP];
    let ((xs, x_rest), (groups, rest)) = (x.as_chunks::<GROUP>(), codes.as_chunks::<GROUP>());
    for ((x, codes), &scale) in xs.iter().zip(groups).zip(scales) {
        for i in 0..GROUP {
            lanes[i] = fma::<T, FMA>(x[i] * T::narrow(f64::from(codes[i])), scale, lanes[i]);
        }
    }
    if let Some(&scale) = scales.get(groups.len()) {
        for (lane, (&x, &code)) in lanes.iter_mut().zip(x_rest.iter().zip(rest)) {
            *lane = fma::<T, FMA>(x * T::narrow(f64::from(code)), scale, *lane);
        }
    }
    let mut half = GROUP / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

// ---------------------------------------------------------------------------------------------------------------------
// Products

/// A source of rows in whatever type they are stored.
#[derive(Clone, Copy)]
pub(super) enum Source<'a, T> {
    Full(&'a [T]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<T: Scalar> Source<'_, T> {
    fn len(&self) -> usize {
        match self {
            Source::Full(v) => v.len(),
            Source::F16(v) => v.len(),
            Source::BF16(v) => v.len(),
        }
    }

    #[inline(always)]
    fn get(&self, at: usize) -> T {
        match self {
            Source::Full(v) => v[at],
            Source::F16(v) => T::narrow(v[at].to_f64()),
            Source::BF16(v) => T::narrow(v[at].to_f64()),
        }
    }
}

/// One side of a product: element (row, term) lies at `row · row_stride + term · term_stride`.
#[derive(Clone, Copy)]
pub(super) struct Side<'a, T> {
    pub(super) source: Source<'a, T>,
    pub(super) rows: usize,
    pub(super) row_stride: usize,
    pub(super) term_stride: usize,
}

impl<T: Scalar> Side<'_, T> {
    /// Whether rows `rows` and terms `terms` lie inside of the source.
    fn holds(&self, rows: &std::ops::Range<usize>, terms: &std::ops::Range<usize>) -> bool {
        rows.is_empty()
            || terms.is_empty()
            || (rows.end - 1) * self.row_stride + (terms.end - 1) * self.term_stride < self.source.len()
    }
}

impl<T: Scalar> Source<'_, T> {
    /// Asks for these elements to be brought into the cache; nothing where the processor is not known to be helped by it.
    pub(super) fn prefetch(&self, range: std::ops::Range<usize>) {
        fn lines<E>(v: &[E], range: std::ops::Range<usize>) {
            v.get(range).into_iter().for_each(|v| v.iter().step_by(64 / size_of::<E>()).for_each(|at| prefetch(at)));
        }
        match self {
            Source::Full(v) => lines(v, range),
            Source::F16(v) => lines(v, range),
            Source::BF16(v) => lines(v, range),
        }
    }
}

/// Asks for the cache line at `at`, which may lie anywhere; nothing where the processor is not known to be helped by it.
#[inline(always)]
fn prefetch<E>(at: *const E) {
    // SAFETY: a prefetch of any address is no access, and SSE is part of x86-64.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Elements of `out` that [`pack`] fills.
pub(super) fn packed_len(width: usize, rows: usize, terms: usize) -> usize {
    rows.div_ceil(width) * width * terms
}

/// Lays rows out in panels of `width` rows, in a panel term by term: what [`multiply`] reads. Missing rows are zero.
pub(super) fn pack<T: Scalar>(
    level: Level,
    side: &Side<'_, T>,
    rows: std::ops::Range<usize>,
    terms: std::ops::Range<usize>,
    width: usize,
    out: &mut [T],
) {
    assert!(side.holds(&rows, &terms) && out.len() == packed_len(width, rows.len(), terms.len()));
    if terms.is_empty() {
        return;
    }
    for (p, panel) in out.chunks_exact_mut(width * terms.len()).enumerate() {
        let first = rows.start + p * width;
        let here = first..(first + width).min(rows.end);
        #[cfg(target_arch = "x86_64")]
        if let (Set::Avx512 | Set::Avx512Bf16, 1) = (level.0, side.term_stride) {
            let from = here.start * side.row_stride + terms.start;
            let panel = same_mut::<T, f32>(panel);
            let done = match (&side.source, panel) {
                (Source::Full(v), Some(panel)) => same::<T, f32>(v).map(|v| {
                    // SAFETY: the level has AVX-512; `holds` was asserted above.
                    unsafe { avx512::pack_f32(&v[from..], side.row_stride, here.len(), terms.len(), width, panel) }
                }),
                (Source::BF16(v), Some(panel)) => {
                    // SAFETY: as above.
                    unsafe { avx512::pack_bf16(&v[from..], side.row_stride, here.len(), terms.len(), width, panel) }
                    Some(())
                }
                _ => None,
            };
            if done.is_some() {
                continue;
            }
        }
        #[cfg(target_arch = "x86_64")]
        if level.0 == Set::Avx2
            && (side.term_stride, width % 8) == (1, 0)
            && let Source::Full(v) = &side.source
            && let (Some(v), Some(panel)) = (same::<T, f32>(v), same_mut::<T, f32>(panel))
        {
            let from = here.start * side.row_stride + terms.start;
            // SAFETY: the level has AVX2.
            unsafe { avx2::pack(&v[from..], side.row_stride, here.len(), terms.len(), width, panel) };
            continue;
        }
        let _ = level;
        if side.row_stride == 1 {
            for (t, group) in panel.chunks_exact_mut(width).enumerate() {
                let at = here.start + (terms.start + t) * side.term_stride;
                match &side.source {
                    Source::Full(v) => group[..here.len()].copy_from_slice(&v[at..at + here.len()]),
                    source => (0..here.len()).for_each(|i| group[i] = source.get(at + i)),
                }
                group[here.len()..].fill(T::zero());
            }
        } else {
            for i in 0..width {
                let at = (here.start + i) * side.row_stride + terms.start * side.term_stride;
                for t in 0..terms.len() {
                    panel[t * width + i] =
                        if i < here.len() { side.source.get(at + t * side.term_stride) } else { T::zero() };
                }
            }
        }
    }
}

/// `c[i·stride + j] += Σ_t left[i,t] · right[j,t]` for `i < rows`, `j < cols`: one segment of a product, the sides packed in
/// panels of [`Level::tile`] rows.
#[allow(clippy::too_many_arguments)]
pub(super) fn multiply<T: Scalar>(
    level: Level,
    terms: usize,
    left: &[T],
    right: &[T],
    c: &mut [T],
    rows: usize,
    cols: usize,
    stride: usize,
) {
    let (mr, nr) = level.tile::<T>();
    if rows == 0 || cols == 0 || terms == 0 {
        return;
    }
    assert!(left.len() == packed_len(mr, rows, terms) && right.len() == packed_len(nr, cols, terms));
    assert!(cols <= stride && (rows - 1) * stride + cols <= c.len());
    for (i, left) in left.chunks_exact(mr * terms).enumerate() {
        for (j, right) in right.chunks_exact(nr * terms).enumerate() {
            let (rows, cols) = ((rows - i * mr).min(mr), (cols - j * nr).min(nr));
            let c = &mut c[i * mr * stride + j * nr..];
            #[cfg(target_arch = "x86_64")]
            if let (Some(left), Some(right)) = (same::<T, f32>(left), same::<T, f32>(right)) {
                let c = same_mut::<T, f32>(c).expect("one type for all");
                match level.0 {
                    // SAFETY: the level has these instructions; panels are whole, and rows and columns lie inside of c, as
                    // asserted above.
                    Set::Avx512 | Set::Avx512Bf16 => unsafe { avx512::tile(left, right, c, rows, cols, stride) },
                    // SAFETY: as above.
                    Set::Avx2 => unsafe { avx2_tile(left, right, c, rows, cols, stride) },
                    Set::Portable => tile_body::<f32, FUSED, 4, 8>(left, right, c, rows, cols, stride),
                }
                continue;
            }
            tile_body::<T, FUSED, 4, 8>(left, right, c, rows, cols, stride);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2_tile(left: &[f32], right: &[f32], c: &mut [f32], rows: usize, cols: usize, stride: usize) {
    tile_body::<f32, true, 6, 16>(left, right, c, rows, cols, stride);
}

#[inline(always)]
fn tile_body<T: Scalar, const FMA: bool, const MR: usize, const NR: usize>(
    left: &[T],
    right: &[T],
    c: &mut [T],
    rows: usize,
    cols: usize,
    stride: usize,
) {
    // Whole tiles apart: there the sums stay in registers.
    if rows == MR && cols == NR {
        (0..MR).for_each(|i| prefetch(&c[i * stride]));
        let acc = tile_sums::<T, FMA, MR, NR>(left, right);
        for (i, acc) in acc.iter().enumerate() {
            let c = c[i * stride..].first_chunk_mut::<NR>().expect("a row of the tile");
            (0..NR).for_each(|j| c[j] += acc[j]);
        }
        return;
    }
    let acc = tile_sums::<T, FMA, MR, NR>(left, right);
    for (i, acc) in acc.iter().enumerate().take(rows) {
        c[i * stride..i * stride + cols].iter_mut().zip(acc).for_each(|(c, &a)| *c += a);
    }
}

#[inline(always)]
fn tile_sums<T: Scalar, const FMA: bool, const MR: usize, const NR: usize>(left: &[T], right: &[T]) -> [[T; NR]; MR] {
    let mut acc = [[T::zero(); NR]; MR];
    for (a, b) in left.as_chunks::<MR>().0.iter().zip(right.as_chunks::<NR>().0) {
        for i in 0..MR {
            for j in 0..NR {
                acc[i][j] = fma::<T, FMA>(a[i], b[j], acc[i][j]);
            }
        }
    }
    acc
}

/// A row laid out for [`segment_dots`]: 16 segments side by side, term by term; group after group of 16 segments. Terms
/// beyond the row are zero. `out` holds `16 · segment_len · segment_groups` elements.
pub(super) fn interleave<T: Scalar>(level: Level, row: &[T], out: &mut [T]) {
    let len = segment_len(row.len());
    assert_eq!(out.len(), interleaved_len(row.len()));
    #[cfg(target_arch = "x86_64")]
    if let (Set::Avx512 | Set::Avx512Bf16, Some(row)) = (level.0, same::<T, f32>(row)) {
        let out = same_mut::<T, f32>(out).expect("one type for both");
        // SAFETY: the level has AVX-512; the length of `out` was asserted.
        return unsafe { avx512::interleave(row, len, out) };
    }
    for (g, group) in out.chunks_exact_mut(LANES * len).enumerate() {
        #[cfg(target_arch = "x86_64")]
        if level.0 == Set::Avx2
            && let Some(segments) = row.get(g * LANES * len..(g + 1) * LANES * len)
            && let (Some(segments), Some(group)) = (same::<T, f32>(segments), same_mut::<T, f32>(group))
        {
            // SAFETY: the level has AVX2.
            unsafe { avx2::pack(segments, len, LANES, len, LANES, group) };
            continue;
        }
        let _ = level;
        for s in 0..LANES {
            for j in 0..len {
                group[j * LANES + s] = row.get((g * LANES + s) * len + j).copied().unwrap_or(T::zero());
            }
        }
    }
}

/// Elements of an interleaved row of `k` terms.
pub(super) fn interleaved_len(k: usize) -> usize {
    LANES * segment_len(k) * segment_groups(k)
}

/// `out[i] = Σ_t row[t] · others[i][t]`, bit for bit what [`multiply`] gives segment by segment from zero. All interleaved;
/// `len` is the segments' length.
pub(super) fn segment_dots<T: Scalar>(level: Level, len: usize, row: &[T], others: &[&[T]], out: &mut [T]) {
    for (others, out) in others.chunks(4).zip(out.chunks_mut(4)) {
        match (others, out) {
            (&[a, b, c, d], out) => out.copy_from_slice(&dots4(level, len, row, [a, b, c, d])),
            (&[a, b], out) => out.copy_from_slice(&dots2(level, len, row, [a, b])),
            (others, out) => {
                for (&a, out) in others.iter().zip(out) {
                    *out = dots1(level, len, row, [a])[0];
                }
            }
        }
    }
}

at_each_level! { fn dots4<T>(len: usize, row: &[T], others: [&[T]; 4]) -> [T; 4] = dots_body_4 }
at_each_level! { fn dots2<T>(len: usize, row: &[T], others: [&[T]; 2]) -> [T; 2] = dots_body_2 }
at_each_level! { fn dots1<T>(len: usize, row: &[T], others: [&[T]; 1]) -> [T; 1] = dots_body_1 }

/// Elements of 16 segments.
type Lanes<T> = [T; LANES];

#[inline(always)]
fn dots_body_4<T: Scalar, const FMA: bool>(len: usize, row: &[T], others: [&[T]; 4]) -> [T; 4] {
    dots_body(
        len,
        row,
        others,
        #[inline(always)]
        |row, [a, b, c, d]| {
            let mut acc = [[T::zero(); LANES]; 4];
            for ((((row, a), b), c), d) in row.iter().zip(a).zip(b).zip(c).zip(d) {
                add_lanes::<T, FMA>(&mut acc[0], row, a);
                add_lanes::<T, FMA>(&mut acc[1], row, b);
                add_lanes::<T, FMA>(&mut acc[2], row, c);
                add_lanes::<T, FMA>(&mut acc[3], row, d);
            }
            acc
        },
    )
}

#[inline(always)]
fn dots_body_2<T: Scalar, const FMA: bool>(len: usize, row: &[T], others: [&[T]; 2]) -> [T; 2] {
    dots_body(
        len,
        row,
        others,
        #[inline(always)]
        |row, [a, b]| {
            let mut acc = [[T::zero(); LANES]; 2];
            for ((row, a), b) in row.iter().zip(a).zip(b) {
                add_lanes::<T, FMA>(&mut acc[0], row, a);
                add_lanes::<T, FMA>(&mut acc[1], row, b);
            }
            acc
        },
    )
}

#[inline(always)]
fn dots_body_1<T: Scalar, const FMA: bool>(len: usize, row: &[T], others: [&[T]; 1]) -> [T; 1] {
    dots_body(
        len,
        row,
        others,
        #[inline(always)]
        |row, [a]| {
            let mut acc = [[T::zero(); LANES]];
            for (row, a) in row.iter().zip(a) {
                add_lanes::<T, FMA>(&mut acc[0], row, a);
            }
            acc
        },
    )
}

#[inline(always)]
fn add_lanes<T: Scalar, const FMA: bool>(acc: &mut Lanes<T>, row: &Lanes<T>, other: &Lanes<T>) {
    for s in 0..LANES {
        acc[s] = fma::<T, FMA>(other[s], row[s], acc[s]);
    }
}

/// `segments` adds up 16 of them side by side. It is written out for each number of rows: one loop over any number made a step with
/// a fifth of the latents on take 1.09 s instead of 1.00 s (`crosscoder bench --case 768,8192,1024,1638 --op step`, AVX2).
#[inline(always)]
fn dots_body<'a, T: Scalar, const N: usize>(
    len: usize,
    row: &'a [T],
    others: [&'a [T]; N],
    segments: impl Fn(&[Lanes<T>], [&[Lanes<T>]; N]) -> [Lanes<T>; N],
) -> [T; N] {
    let mut out = [T::zero(); N];
    let (row, others) = (row.as_chunks().0, others.map(|o| o.as_chunks().0));
    for from in (0..row.len()).step_by(len.max(1)) {
        let acc = segments(&row[from..from + len], others.map(|o| &o[from..from + len]));
        // Apart, or compilers give up vectors above for the sake of these few sums.
        add_segments(&acc, &mut out);
    }
    out
}

#[inline(never)]
fn add_segments<T: Scalar>(acc: &[Lanes<T>], out: &mut [T]) {
    for (out, acc) in out.iter_mut().zip(acc) {
        acc.iter().for_each(|&a| *out += a);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of pairs of bfloat16

/// Rows of the two sides of a tile of [`multiply_pairs`]: (left, right).
pub(super) const PAIR_TILE: (usize, usize) = (14, 32);

/// As [`pack`], in bfloat16, two neighbouring terms in 32 bits, the first in the lower half; rounded to nearest even where
/// the source is float32 (numbers below 2^-126 become 0). An odd last term is paired with 0. Either the terms of a row are
/// neighbours (`side.term_stride` is 1) or the rows of a term.
pub(super) fn pack_pairs<T: Scalar>(
    level: Level,
    side: &Side<'_, T>,
    rows: std::ops::Range<usize>,
    terms: std::ops::Range<usize>,
    width: usize,
    out: &mut [u32],
) {
    let pairs = terms.len().div_ceil(2);
    assert!(level.has_pairs() && side.holds(&rows, &terms));
    assert_eq!(out.len(), packed_len(width, rows.len(), pairs));
    if terms.is_empty() {
        return;
    }
    for (p, panel) in out.chunks_exact_mut(width * pairs).enumerate() {
        let first = rows.start + p * width;
        let here = first..(first + width).min(rows.end);
        if side.term_stride != 1 {
            assert_eq!(side.row_stride, 1, "the rows of a term are neighbours");
            for (t, group) in panel.chunks_exact_mut(width).enumerate() {
                let at =
                    |term: usize| (term < terms.len()).then(|| here.start + (terms.start + term) * side.term_stride);
                let even = at(2 * t).expect("a pair has a first term");
                match (&side.source, at(2 * t + 1)) {
                    (Source::Full(v), odd) => {
                        let v = same::<T, f32>(v).expect("pairs are made of float32");
                        let odd = odd.map(|odd| &v[odd..odd + here.len()]);
                        pair_up(level, &v[even..even + here.len()], odd.unwrap_or_default(), group);
                    }
                    (source, odd) => {
                        for i in 0..here.len() {
                            let bits = |at: usize| u32::from(bf16::from_f64(source.get(at + i).wide()).to_bits());
                            group[i] = bits(even) | odd.map_or(0, bits) << 16;
                        }
                    }
                }
                group[here.len()..].fill(0);
            }
            continue;
        }
        let from = here.start * side.row_stride + terms.start;
        #[cfg(target_arch = "x86_64")]
        match &side.source {
            // SAFETY: the level has AVX512-BF16 and the rows and terms lie inside of the source, as asserted.
            Source::BF16(v) => unsafe {
                avx512::pack_pairs_bf16(&v[from..], side.row_stride, here.len(), terms.len(), width, panel)
            },
            Source::Full(v) => {
                let v = same::<T, f32>(v).expect("pairs are made of float32");
                // SAFETY: as above.
                unsafe { avx512::pack_pairs_f32(&v[from..], side.row_stride, here.len(), terms.len(), width, panel) }
            }
            Source::F16(_) => unreachable!("float16 is not rounded to bfloat16"),
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (panel, here, from);
    }
}

/// `out[i]` is `even[i]` and, in the upper half, `odd[i]`, both rounded to bfloat16; an empty `odd` is zero.
fn pair_up(level: Level, even: &[f32], odd: &[f32], out: &mut [u32]) {
    fn bits(v: f32) -> u32 {
        u32::from(bf16::from_f32(v).to_bits())
    }
    let _ = level;
    for (i, (out, &even)) in out.iter_mut().zip(even).enumerate() {
        *out = bits(even) | odd.get(i).map_or(0, |&odd| bits(odd) << 16);
    }
}

/// As [`multiply`] on sides packed by [`pack_pairs`] for [`PAIR_TILE`]; sums are float32, numbers below 2^-126 count as 0.
#[allow(clippy::too_many_arguments)]
pub(super) fn multiply_pairs<T: Scalar>(
    level: Level,
    pairs: usize,
    left: &[u32],
    right: &[u32],
    c: &mut [T],
    rows: usize,
    cols: usize,
    stride: usize,
) {
    let (mr, nr) = PAIR_TILE;
    if rows == 0 || cols == 0 || pairs == 0 {
        return;
    }
    assert!(level.has_pairs() && cols <= stride && (rows - 1) * stride + cols <= c.len());
    assert!(left.len() == packed_len(mr, rows, pairs) && right.len() == packed_len(nr, cols, pairs));
    let c = same_mut::<T, f32>(c).expect("sums of pairs are float32");
    for (i, left) in left.chunks_exact(mr * pairs).enumerate() {
        for (j, right) in right.chunks_exact(nr * pairs).enumerate() {
            let (rows, cols) = ((rows - i * mr).min(mr), (cols - j * nr).min(nr));
            let c = &mut c[i * mr * stride + j * nr..];
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level has AVX512-BF16; panels are whole, rows and columns lie inside of c, as asserted.
            unsafe {
                avx512::tile_pairs(left, right, c, rows, cols, stride)
            };
            #[cfg(not(target_arch = "x86_64"))]
            let _ = (left, right, c, rows, cols);
        }
    }
}

/// `[Σ v², Σ (v - v')²]` where v' is v rounded as [`pack_pairs`] rounds it.
pub(super) fn rounding_squares<T: Scalar>(level: Level, row: &[T]) -> [f32; 2] {
    let row = same::<T, f32>(row).expect("pairs are made of float32");
    assert!(level.has_pairs());
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the level has AVX512-BF16.
    return unsafe { avx512::rounding_squares(row) };
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no level here has pairs: {} elements", row.len())
}

at_each_level! {
    /// Where `row[j] + thresholds[j] + x[0] · w0[j] + x[1] · w1[j]` is not below zero (nan is not), appends `(j, b)`.
    fn candidates<T>(
        b: u32,
        row: &[T],
        thresholds: &[T],
        x: [T; 2],
        w0: &[T],
        w1: &[T],
        out: &mut Vec<(u32, u32)>,
    ) = candidates_body
}

#[inline(always)]
fn candidates_body<T: Scalar, const FMA: bool>(
    b: u32,
    row: &[T],
    thresholds: &[T],
    x: [T; 2],
    w0: &[T],
    w1: &[T],
    out: &mut Vec<(u32, u32)>,
) {
    let n = row.len();
    let (thresholds, w0, w1) = (&thresholds[..n], &w0[..n], &w1[..n]);
    let mut flags = [false; LANES];
    for from in (0..n).step_by(LANES) {
        let len = LANES.min(n - from);
        for (i, flag) in flags[..len].iter_mut().enumerate() {
            let j = from + i;
            let highest = row[j] + thresholds[j] + fma::<T, FMA>(x[0], w0[j], x[1] * w1[j]);
            // One comparison, which nan passes.
            #[allow(clippy::neg_cmp_op_on_partial_ord)]
            let passes = !(highest < T::zero());
            *flag = passes;
        }
        if flags[..len].iter().fold(false, |any, &f| any | f) {
            out.extend((0..len).filter(|&i| flags[i]).map(|i| ((from + i) as u32, b)));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;

    /// A panel of `width` rows, a multiple of 8, term by term; row i begins at `v[i · stride]`.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn pack(v: &[f32], stride: usize, rows: usize, terms: usize, width: usize, panel: &mut [f32]) {
        let whole = terms - terms % 8;
        for i in (0..width).step_by(8) {
            let row = |u: usize| if i + u < rows { &v[(i + u) * stride..][..terms] } else { &[] };
            let eight: [&[f32]; 8] = std::array::from_fn(row);
            for t in (0..whole).step_by(8) {
                let mut block = [_mm256_setzero_ps(); 8];
                for (block, row) in block.iter_mut().zip(eight) {
                    if let Some(v) = row.get(t..t + 8) {
                        // SAFETY: eight elements.
                        *block = unsafe { _mm256_loadu_ps(v.as_ptr()) };
                    }
                }
                for (u, block) in transpose(block).into_iter().enumerate() {
                    let out = &mut panel[(t + u) * width + i..][..8];
                    // SAFETY: as above.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), block) };
                }
            }
            for t in whole..terms {
                for (u, row) in eight.iter().enumerate() {
                    panel[t * width + i + u] = row.get(t).copied().unwrap_or(0.0);
                }
            }
        }
    }

    /// Transposes 8 rows of 8 numbers.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn transpose(r: [__m256; 8]) -> [__m256; 8] {
        // By pairs of rows, by fours, by eights.
        let (mut t, mut u, mut out) = (r, r, r);
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..2 {
            for c in 0..2 {
                let (a, b) = (_mm256_castps_pd(t[4 * i + c]), _mm256_castps_pd(t[4 * i + 2 + c]));
                u[4 * i + 2 * c] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                u[4 * i + 2 * c + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
            }
        }
        for c in 0..4 {
            out[c] = _mm256_permute2f128_ps::<0x20>(u[c], u[4 + c]);
            out[4 + c] = _mm256_permute2f128_ps::<0x31>(u[c], u[4 + c]);
        }
        out
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::*;

    /// # Safety
    /// `left` is whole panels of 14, `right` of 32, equally many terms; `(rows - 1) · stride + cols <= c.len()`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub(super) unsafe fn tile(left: &[f32], right: &[f32], c: &mut [f32], rows: usize, cols: usize, stride: usize) {
        let mut acc = [[_mm512_setzero_ps(); 2]; 14];
        let (mut a, mut b) = (left.as_ptr(), right.as_ptr());
        for i in 0..rows {
            prefetch(c.as_ptr().wrapping_add(i * stride));
            prefetch(c.as_ptr().wrapping_add(i * stride + 16));
        }
        for _ in 0..left.len() / 14 {
            // SAFETY: a and b stay inside their panels, 14 and 32 elements a term.
            unsafe {
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for i in 0..14 {
                    let ai = _mm512_set1_ps(*a.add(i));
                    acc[i][0] = _mm512_fmadd_ps(ai, b0, acc[i][0]);
                    acc[i][1] = _mm512_fmadd_ps(ai, b1, acc[i][1]);
                }
                (a, b) = (a.add(14), b.add(32));
            }
        }
        // SAFETY: what this function's caller ensures.
        unsafe { add_tile(acc, c, rows, cols, stride) }
    }

    /// # Safety
    /// As [`tile`], in pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
    pub(super) unsafe fn tile_pairs(
        left: &[u32],
        right: &[u32],
        c: &mut [f32],
        rows: usize,
        cols: usize,
        stride: usize,
    ) {
        let mut acc = [[_mm512_setzero_ps(); 2]; 14];
        let (mut a, mut b) = (left.as_ptr(), right.as_ptr());
        for i in 0..rows {
            prefetch(c.as_ptr().wrapping_add(i * stride));
            prefetch(c.as_ptr().wrapping_add(i * stride + 16));
        }
        for _ in 0..left.len() / 14 {
            // SAFETY: a and b stay inside their panels, 14 and 32 elements a pair; the transmutes are between vectors of 512
            // bits without invalid values.
            unsafe {
                let b0: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.cast()));
                let b1: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.add(16).cast()));
                for i in 0..14 {
                    let ai: __m512bh = std::mem::transmute(_mm512_set1_epi32(*a.add(i) as i32));
                    acc[i][0] = _mm512_dpbf16_ps(acc[i][0], ai, b0);
                    acc[i][1] = _mm512_dpbf16_ps(acc[i][1], ai, b1);
                }
                (a, b) = (a.add(14), b.add(32));
            }
        }
        // SAFETY: what this function's caller ensures.
        unsafe { add_tile(acc, c, rows, cols, stride) }
    }

    /// # Safety
    /// `(rows - 1) · stride + cols <= c.len()`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    unsafe fn add_tile(acc: [[__m512; 2]; 14], c: &mut [f32], rows: usize, cols: usize, stride: usize) {
        let masks = [first(cols), first(cols.saturating_sub(16))];
        for i in 0..14 {
            if i < rows {
                for j in 0..2 {
                    let at = c.as_mut_ptr().wrapping_add(i * stride + 16 * j);
                    // SAFETY: masked to the columns inside of c.
                    unsafe {
                        let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[j], at), acc[i][j]);
                        _mm512_mask_storeu_ps(at, masks[j], sum);
                    }
                }
            }
        }
    }

    /// A mask of the first `n` lanes, all 16 if n is more.
    #[inline(always)]
    fn first(n: usize) -> __mmask16 {
        ((1u32 << n.min(16)) - 1) as u16
    }

    /// Transposes 16 rows of 16 numbers of 32 bits.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transpose(r: [__m512; 16]) -> [__m512; 16] {
        let (mut t, mut u) = (r, r);
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        // Now by fours of rows: u[4i + c] holds column c of each group of four columns, of rows 4i..4i + 4.
        for i in 0..4 {
            for c in 0..2 {
                let (a, b) = (_mm512_castps_pd(t[4 * i + c]), _mm512_castps_pd(t[4 * i + 2 + c]));
                u[4 * i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                u[4 * i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        let mut out = r;
        for c in 0..4 {
            let even_low = _mm512_shuffle_f32x4::<0b10_00_10_00>(u[c], u[4 + c]);
            let odd_low = _mm512_shuffle_f32x4::<0b11_01_11_01>(u[c], u[4 + c]);
            let even_high = _mm512_shuffle_f32x4::<0b10_00_10_00>(u[8 + c], u[12 + c]);
            let odd_high = _mm512_shuffle_f32x4::<0b11_01_11_01>(u[8 + c], u[12 + c]);
            out[c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(even_low, even_high);
            out[8 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(even_low, even_high);
            out[4 + c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd_low, odd_high);
            out[12 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd_low, odd_high);
        }
        out
    }

    /// Stores the transposed of `load(row, step)` for steps of 16 terms, `width` rows side by side.
    ///
    /// # Safety
    /// `panel` holds `width · terms` elements of 32 bits; `load(row, at)` may be called for `row < rows`, `at < terms`.
    #[inline(always)]
    unsafe fn pack_with(
        rows: usize,
        terms: usize,
        width: usize,
        panel: *mut f32,
        load: impl Fn(usize, usize) -> __m512,
    ) {
        for low in (0..width).step_by(16) {
            for at in (0..terms).step_by(16) {
                // SAFETY: this is inlined into functions that have AVX-512; stores are masked to the panel.
                unsafe {
                    let mut r = [_mm512_setzero_ps(); 16];
                    for (i, r) in r.iter_mut().enumerate() {
                        if low + i < rows {
                            *r = load(low + i, at);
                        }
                    }
                    for (t, r) in transpose(r).into_iter().enumerate() {
                        if at + t < terms {
                            _mm512_mask_storeu_ps(panel.add((at + t) * width + low), first(width - low), r);
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// `v` holds `terms` elements from each multiple of `stride` below `rows · stride`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub(super) unsafe fn pack_f32(
        v: &[f32],
        stride: usize,
        rows: usize,
        terms: usize,
        width: usize,
        panel: &mut [f32],
    ) {
        assert!(panel.len() == width * terms);
        let load = |row: usize, at: usize| {
            // SAFETY: masked to the row's terms.
            unsafe { _mm512_maskz_loadu_ps(first(terms - at), v.as_ptr().add(row * stride + at)) }
        };
        // SAFETY: the panel's length was asserted, the loads are the caller's promise.
        unsafe { pack_with(rows, terms, width, panel.as_mut_ptr(), load) }
    }

    /// # Safety
    /// As [`pack_f32`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub(super) unsafe fn pack_bf16(
        v: &[bf16],
        stride: usize,
        rows: usize,
        terms: usize,
        width: usize,
        panel: &mut [f32],
    ) {
        assert!(panel.len() == width * terms);
        let load = |row: usize, at: usize| {
            // SAFETY: masked to the row's terms.
            unsafe {
                let half = _mm256_maskz_loadu_epi16(first(terms - at), v.as_ptr().add(row * stride + at).cast());
                widen(half)
            }
        };
        // SAFETY: the panel's length was asserted, the loads are the caller's promise.
        unsafe { pack_with(rows, terms, width, panel.as_mut_ptr(), load) }
    }

    /// 16 bfloat16 as float32.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    fn widen(half: __m256i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
    }

    /// # Safety
    /// As [`pack_f32`]; `panel` holds `width · ⌈terms / 2⌉`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub(super) unsafe fn pack_pairs_bf16(
        v: &[bf16],
        stride: usize,
        rows: usize,
        terms: usize,
        width: usize,
        panel: &mut [u32],
    ) {
        let pairs = terms.div_ceil(2);
        assert!(panel.len() == width * pairs);
        let load = |row: usize, at: usize| {
            let left = (terms - 2 * at).min(32);
            let mask = ((1u64 << left) - 1) as u32;
            // SAFETY: masked to the row's terms.
            let pairs = unsafe { _mm512_maskz_loadu_epi16(mask, v.as_ptr().add(row * stride + 2 * at).cast()) };
            _mm512_castsi512_ps(pairs)
        };
        // SAFETY: the panel's length was asserted, the loads are the caller's promise.
        unsafe { pack_with(rows, pairs, width, panel.as_mut_ptr().cast(), load) }
    }

    /// # Safety
    /// As [`pack_pairs_bf16`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
    pub(super) unsafe fn pack_pairs_f32(
        v: &[f32],
        stride: usize,
        rows: usize,
        terms: usize,
        width: usize,
        panel: &mut [u32],
    ) {
        let pairs = terms.div_ceil(2);
        assert!(panel.len() == width * pairs);
        let load = |row: usize, at: usize| {
            // SAFETY: `two_vectors` masks to the row's terms; the transmute is between vectors of 512 bits.
            unsafe {
                let (low, high) = two_vectors(v.as_ptr().add(row * stride + 2 * at), terms - 2 * at);
                std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low))
            }
        };
        // SAFETY: the panel's length was asserted, the loads are the caller's promise.
        unsafe { pack_with(rows, pairs, width, panel.as_mut_ptr().cast(), load) }
    }

    /// The first 16 and the second 16 of `n` numbers, 0 beyond.
    ///
    /// # Safety
    /// `at` points to n numbers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn two_vectors(at: *const f32, n: usize) -> (__m512, __m512) {
        // SAFETY: masked to n numbers.
        unsafe {
            (
                _mm512_maskz_loadu_ps(first(n), at),
                _mm512_maskz_loadu_ps(first(n.saturating_sub(16)), at.wrapping_add(16)),
            )
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
    pub(super) fn rounding_squares(row: &[f32]) -> [f32; 2] {
        let mut sums = [[_mm512_setzero_ps(); 2]; 2];
        for at in (0..row.len()).step_by(32) {
            // SAFETY: `at` lies in the row, and the rest of the row is as long as said.
            let (low, high) = unsafe { two_vectors(row.as_ptr().add(at), row.len() - at) };
            // SAFETY: between vectors of 512 bits.
            let rounded: __m512i = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) };
            let halves = [_mm512_castsi512_si256(rounded), _mm512_extracti64x4_epi64::<1>(rounded)];
            for (i, v) in [low, high].into_iter().enumerate() {
                let error = _mm512_sub_ps(v, widen(halves[i]));
                sums[0][i] = _mm512_fmadd_ps(v, v, sums[0][i]);
                sums[1][i] = _mm512_fmadd_ps(error, error, sums[1][i]);
            }
        }
        let total = |s: [__m512; 2]| _mm512_reduce_add_ps(_mm512_add_ps(s[0], s[1]));
        [total(sums[0]), total(sums[1])]
    }

    /// See [`super::interleave`]: the rows that are transposed are the segments.
    ///
    /// # Safety
    /// `out` holds `16 · len` elements for each group of 16 segments of the row.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub(super) unsafe fn interleave(row: &[f32], len: usize, out: &mut [f32]) {
        for (g, group) in out.chunks_exact_mut(LANES * len).enumerate() {
            for at in (0..len).step_by(16) {
                let mut r = [_mm512_setzero_ps(); 16];
                let begin = g * LANES * len + at;
                if len - at >= 16 && begin + 15 * len + 16 <= row.len() {
                    for s in 0..16 {
                        // SAFETY: 16 elements from here on lie in the row, as just compared.
                        r[s] = unsafe { _mm512_loadu_ps(row.as_ptr().add(begin + s * len)) };
                        // What lies behind is mostly the next row to be laid out.
                        prefetch(row.as_ptr().wrapping_add(begin + s * len + row.len()));
                    }
                } else {
                    for s in 0..16 {
                        let start = begin + s * len;
                        let n = (len - at).min(row.len().saturating_sub(start));
                        // SAFETY: masked to the row.
                        r[s] = unsafe { _mm512_maskz_loadu_ps(first(n), row.as_ptr().wrapping_add(start)) };
                    }
                }
                for (t, r) in transpose(r).into_iter().enumerate().take(len - at) {
                    // SAFETY: (at + t) < len, 16 elements each.
                    unsafe { _mm512_storeu_ps(group.as_mut_ptr().add((at + t) * LANES), r) };
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Numbers in [-1, 1) from a linear congruential generator.
    pub(in crate::backend::cpu) fn numbers(n: usize, mut state: u64) -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn round(v: &[f32]) -> Vec<bf16> {
        v.iter().map(|&v| bf16::from_f32(v)).collect()
    }

    /// A whole product by segments, as the callers of `pack` and `multiply` do.
    fn product<T: Scalar>(level: Level, left: Side<'_, T>, right: Side<'_, T>, k: usize, segment: usize) -> Vec<T> {
        let (mr, nr) = level.tile::<T>();
        let mut c = vec![T::zero(); left.rows * right.rows];
        for from in (0..k).step_by(segment) {
            let terms = from..(from + segment).min(k);
            let mut a = vec![T::nan(); packed_len(mr, left.rows, terms.len())];
            let mut b = vec![T::nan(); packed_len(nr, right.rows, terms.len())];
            pack(level, &left, 0..left.rows, terms.clone(), mr, &mut a);
            pack(level, &right, 0..right.rows, terms.clone(), nr, &mut b);
            multiply(level, terms.len(), &a, &b, &mut c, left.rows, right.rows, right.rows);
        }
        c
    }

    const SIZES: [[usize; 3]; 12] = [
        [0, 3, 5],
        [1, 1, 1],
        [3, 0, 2],
        [2, 3, 0],
        [13, 31, 17],
        [14, 32, 16],
        [15, 33, 15],
        [7, 97, 101],
        [29, 65, 257],
        [5, 16, 8209],
        [28, 64, 512],
        [43, 7, 1023],
    ];

    #[test]
    fn products_are_the_naive_ones_at_every_level() {
        for &level in Level::available() {
            for [m, n, k] in SIZES {
                let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
                let naive: Vec<f64> = (0..m * n)
                    .map(|i| (0..k).map(|t| f64::from(x[i / n * k + t]) * f64::from(w[i % n * k + t])).sum())
                    .collect();
                let rows = |v| Side { source: Source::Full(v), rows: 0, row_stride: k, term_stride: 1 };
                let (left, right) = (Side { rows: m, ..rows(&x[..]) }, Side { rows: n, ..rows(&w[..]) });
                let ours = product(level, left, right, k, segment_len(k));
                for (ours, naive) in ours.iter().zip(&naive) {
                    let bound = 6e-8 * (segment_len(k) + 17) as f64 * k as f64 + 1e-30;
                    assert!((f64::from(*ours) - naive).abs() <= bound, "{} {m} {n} {k}", level.name());
                }
                // The same numbers lying the other way round, and as bfloat16, give the same bits.
                let turned: Vec<f32> = (0..n * k).map(|i| w[i % n.max(1) * k + i / n.max(1)]).collect();
                let turned = Side { source: Source::Full(&turned[..]), rows: n, row_stride: 1, term_stride: n };
                assert_eq!(ours, product(level, left, turned, k, segment_len(k)), "{} {m} {n} {k}", level.name());
                // Interleaved rows give the same bits.
                let interleaved = |v: &[f32]| -> Vec<Vec<f32>> {
                    let row = |v: &[f32]| {
                        let mut out = vec![f32::NAN; interleaved_len(k)];
                        interleave(level, v, &mut out);
                        out
                    };
                    if k == 0 { Vec::new() } else { v.chunks_exact(k).map(row).collect() }
                };
                let (xs, ws) = (interleaved(&x), interleaved(&w));
                for (j, row) in ws.iter().enumerate() {
                    let mut out = vec![0.0; m];
                    segment_dots(level, segment_len(k), row, &xs.iter().map(|x| &x[..]).collect::<Vec<_>>(), &mut out);
                    let column: Vec<f32> = (0..xs.len()).map(|i| ours[i * n + j]).collect();
                    assert_eq!(out[..xs.len()], column, "dots of {} {m} {n} {k}", level.name());
                }
                let half = round(&w);
                let exact: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
                let packed = Side { source: Source::BF16(&half), ..right };
                let full = Side { source: Source::Full(&exact[..]), ..right };
                assert_eq!(product(level, left, packed, k, 99), product(level, left, full, k, 99));
            }
            println!("products tested: {}", level.name());
        }
    }

    #[test]
    fn products_of_pairs_are_the_naive_ones() {
        let Some(&level) = Level::available().iter().find(|l| l.has_pairs()) else {
            println!("NOT tested: products of pairs of bfloat16; this processor has no AVX512-BF16");
            return;
        };
        let (mr, nr) = PAIR_TILE;
        for [m, n, k] in SIZES {
            let (x, w) = (numbers(m * k, 3), numbers(n * k, 4));
            let (xh, wh) = (round(&x), round(&w));
            let side = |source, rows| Side { source, rows, row_stride: k, term_stride: 1 };
            for (left, right) in [
                (side(Source::Full(&x[..]), m), side(Source::Full(&w[..]), n)),
                (side(Source::Full(&x[..]), m), side(Source::BF16(&wh[..]), n)),
            ] {
                let pairs = k.div_ceil(2);
                let (mut a, mut b) = (vec![7; packed_len(mr, m, pairs)], vec![7; packed_len(nr, n, pairs)]);
                pack_pairs(level, &left, 0..m, 0..k, mr, &mut a);
                pack_pairs(level, &right, 0..n, 0..k, nr, &mut b);
                let mut c = vec![0f32; m * n];
                multiply_pairs(level, pairs, &a, &b, &mut c, m, n, n);
                for i in 0..m * n {
                    let term = |t: usize| xh[i / n * k + t].to_f64() * wh[i % n * k + t].to_f64();
                    let naive: f64 = (0..k).map(term).sum();
                    assert!((f64::from(c[i]) - naive).abs() <= 2.4e-7 * (k * k) as f64 + 1e-30, "{m} {n} {k}");
                }
            }
            let [squares, errors] = rounding_squares(level, &x);
            let naive = |f: &dyn Fn(usize) -> f64| (0..x.len()).map(|i| f(i).powi(2)).sum::<f64>();
            let (s, e) = (naive(&|i| f64::from(x[i])), naive(&|i| f64::from(x[i]) - xh[i].to_f64()));
            assert!((f64::from(squares) - s).abs() <= 1e-4 * s && (f64::from(errors) - e).abs() <= 1e-4 * e);
        }
        println!("products of pairs tested: {}", level.name());
    }

    #[test]
    fn half_precision_is_widened_and_narrowed_exactly_at_every_level() {
        let b: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let f: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        for &level in Level::available() {
            let (mut wide, mut bs, mut fs) = (vec![0f32; 1 << 16], vec![bf16::ZERO; 1 << 16], vec![f16::ZERO; 1 << 16]);
            widen_bf16(level, &b, &mut wide);
            narrow_bf16(level, &wide, &mut bs);
            for i in 0..b.len() {
                assert!(wide[i] == b[i].to_f32() || b[i].is_nan() && wide[i].is_nan(), "{} {i}", level.name());
                assert!(bs[i] == b[i] || b[i].is_nan() && bs[i].is_nan(), "{} {i}", level.name());
            }
            widen_f16(level, &f, &mut wide);
            narrow_f16(level, &wide, &mut fs);
            for i in 0..f.len() {
                assert!(wide[i] == f[i].to_f32() || f[i].is_nan() && wide[i].is_nan(), "{} {i}", level.name());
                assert!(fs[i] == f[i] || f[i].is_nan() && fs[i].is_nan(), "{} {i}", level.name());
            }
            println!("half precision tested: {}", level.name());
        }
    }

    #[test]
    fn rows_are_the_naive_ones_at_every_level() {
        for &level in Level::available() {
            for n in [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 331, 4608] {
                let (a, b) = (numbers(n, 5), numbers(n, 6));
                let wide = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>();
                let exact = wide(&|i| f64::from(a[i]) * f64::from(b[i]));
                assert!((f64::from(dot(level, &a, &b)) - exact).abs() <= 1e-6 * n as f64, "dot {n} {}", level.name());
                let exact = wide(&|i| f64::from(a[i]).powi(2));
                let squares = f64::from(sum_of_squares(level, &a));
                assert!((squares - exact).abs() <= 1e-6 * n as f64, "squares {n} {}", level.name());
                let mut out = a.clone();
                add_scaled(level, &mut out, 0.37, &b);
                for i in 0..n {
                    assert!((out[i] - (a[i] + 0.37 * b[i])).abs() <= 2e-7, "add_scaled {n} {}", level.name());
                }
            }
            println!("rows tested: {}", level.name());
        }
    }

    /// Functions on rows of any length at every level against loops in float64; `r` is the identity in float32.
    #[test]
    fn elementwise_functions_are_the_naive_ones_at_every_level() {
        let close = |ours: &[f32], naive: &dyn Fn(usize) -> f64, what: &str, level: Level| {
            for (i, &o) in ours.iter().enumerate() {
                let n = naive(i);
                assert!((f64::from(o) - n).abs() <= 4e-6 * n.abs().max(1.0), "{what} {i} {}: {o}, {n}", level.name());
            }
        };
        let f32_ = Dtype::F32;
        for &level in Level::available() {
            for n in [0, 1, 15, 16, 17, 127, 128, 129, 300] {
                let (a, b, c) = (numbers(n, 7), numbers(n, 8), numbers(n, 9));
                let w = |v: &[f32], i: usize| f64::from(v[i]);
                let mut out = a.clone();
                finish(level, &mut out, &b, false, f32_);
                close(&out, &|i| w(&a, i) + w(&b, i), "finish", level);
                out.clone_from(&a);
                finish(level, &mut out, &b, true, f32_);
                close(&out, &|i| (w(&a, i) + w(&b, i)).max(0.0), "finish with relu", level);
                out.clone_from(&a);
                write(level, &mut out, &b, true, f32_);
                close(&out, &|i| w(&a, i) + w(&b, i), "write", level);
                squared_distance_grad(level, &a, &b, 0.3, &mut out, f32_);
                close(&out, &|i| 0.6 * (w(&a, i) - w(&b, i)), "squared_distance_grad", level);
                let sum: f64 = (0..n).map(|i| (w(&a, i) - w(&b, i)).powi(2)).sum();
                close(&[squared_distance(level, &a, &b, f32_)], &|_| sum, "squared_distance", level);
                unit_times(level, &a, 0.7, 0.4, &mut out, false, f32_);
                close(&out, &|i| w(&a, i) / 0.7 * 0.4, "unit_times", level);
                unit_times(level, &a, 0.0, 0.4, &mut out, false, f32_);
                assert!(out.iter().all(|&v| v == 0.0), "a norm of 0 gives 0");
                assert!(all_finite(level, &a));
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    for at in [0, n / 2, n.saturating_sub(1)] {
                        out.clone_from(&a);
                        if let Some(v) = out.get_mut(at) {
                            *v = bad;
                            assert!(!all_finite(level, &out), "{bad} at {at} of {n}, {}", level.name());
                        }
                    }
                }
                let step = AdamStep {
                    clip: 0.5,
                    one_minus_beta1: 0.25,
                    beta2: 0.75,
                    one_minus_beta2: 0.25,
                    step_size: 0.125,
                    bias_correction2_sqrt: 0.5,
                    eps: 1e-8,
                };
                let (mut p, mut m, v0) = (a.clone(), c.clone(), c.iter().map(|v| v.abs()).collect::<Vec<f32>>());
                let mut v = v0.clone();
                adam(level, &mut p, &b, &mut m, &mut v, &step, f32_);
                let nm = |i: usize| w(&c, i) + 0.25 * (0.5 * w(&b, i) - w(&c, i));
                let nv = |i: usize| 0.75 * w(&v0, i) + 0.25 * (0.5 * w(&b, i)).powi(2);
                close(&m, &nm, "adam, m", level);
                close(&v, &nv, "adam, v", level);
                close(&p, &|i| w(&a, i) - 0.125 * nm(i) / (nv(i).sqrt() / 0.5 + 1e-8), "adam, p", level);
            }
            println!("elementwise functions tested: {}", level.name());
        }
    }

    #[test]
    fn sketches_are_the_naive_ones_at_every_level() {
        for &level in Level::available() {
            for n in [1, 2, 63, 64, 65, 127, 128, 200, 4608] {
                let (w, x) = (numbers(n, 16), numbers(n, 17));
                let (mut codes, mut scales) = (vec![99i8; n], vec![f32::NAN; n.div_ceil(GROUP)]);
                let sums = sketch(level, &w, &mut codes, &mut scales);
                let meant = |i: usize| f64::from(scales[i / GROUP]) * f64::from(codes[i]);
                let (mut squares, mut errors, mut product) = (0.0, 0.0, 0.0);
                for i in 0..n {
                    let error = f64::from(w[i]) - meant(i);
                    assert!(error.abs() <= 0.5001 * f64::from(scales[i / GROUP]), "{n} {i} {}", level.name());
                    squares += f64::from(w[i]).powi(2);
                    errors += error.powi(2);
                    product += f64::from(x[i]) * meant(i);
                }
                for (ours, naive) in sums.into_iter().zip([squares, errors]) {
                    assert!((f64::from(ours) - naive).abs() <= 1e-4 * naive + 1e-12, "{n} {}", level.name());
                }
                let ours = f64::from(sketch_dot(level, &x, &codes, &scales));
                assert!((ours - product).abs() <= 1e-6 * n as f64, "{n} {}", level.name());
                let groups = w.chunks(GROUP).zip(&scales);
                assert!(groups.into_iter().all(|(w, s)| {
                    let largest = w.iter().fold(0f32, |m, w| m.max(w.abs()));
                    (largest / 127.0 - s).abs() <= 1e-6 * s
                }));
            }
            println!("sketches tested: {}", level.name());
        }
    }

    #[test]
    fn sparse_rows_are_the_naive_ones_at_every_level() {
        let (count, rows, values) = (9, [3u32, 0, 3, 8, 5], [0.5f32, -1.0, 0.25, 2.0, 0.125]);
        for &level in Level::available() {
            for width in [1, 7, 127, 128, 129, 256, 300] {
                let y = numbers(count * width, 10);
                for terms in 0..=rows.len() {
                    let mut out = vec![f32::NAN; width];
                    gather_rows(level, &mut out, &y, &rows[..terms], &values[..terms]);
                    for (j, &o) in out.iter().enumerate() {
                        let naive: f32 = (0..terms).map(|e| values[e] * y[rows[e] as usize * width + j]).sum();
                        assert!((o - naive).abs() <= 1e-6, "gather_rows {width} {terms} {}", level.name());
                    }
                }
                let (at, mut out) = ([4u32, 3, 2, 1, 0], y.clone());
                let row = numbers(width, 11);
                scatter_row(level, &mut out, &row, &rows, &at, &values);
                let mut naive = y.clone();
                for (e, &b) in rows.iter().enumerate() {
                    (0..width).for_each(|j| naive[b as usize * width + j] += values[at[e] as usize] * row[j]);
                }
                assert!(
                    out.iter().zip(&naive).all(|(o, n)| (o - n).abs() <= 1e-6),
                    "scatter_row {width} {}",
                    level.name()
                );
            }
            for n in [1, 15, 16, 17, 40] {
                let (row, t, w0, w1) = (numbers(n, 12), numbers(n, 13), numbers(n, 14), numbers(n, 15));
                let mut row = row;
                row[n / 2] = f32::NAN;
                let mut found = Vec::new();
                candidates(level, 6, &row, &t, [0.5, 0.25], &w0, &w1, &mut found);
                let possible = |j: &u32| {
                    let j = *j as usize;
                    let highest =
                        f64::from(row[j]) + f64::from(t[j]) + 0.5 * f64::from(w0[j]) + 0.25 * f64::from(w1[j]);
                    highest.is_nan() || highest >= 0.0
                };
                let naive: Vec<(u32, u32)> = (0..n as u32).filter(possible).map(|j| (j, 6)).collect();
                assert_eq!(found, naive, "candidates {n} {}", level.name());
            }
            println!("sparse rows tested: {}", level.name());
        }
    }
}
