//! `torch.manual_seed`, `normal_` and `randperm` on the CPU, bit for bit.
//!
//! The generator is the mt19937 of 2002. `normal_` fills a tensor by Box and Muller's method in float32, sixteen values
//! from sixteen words, with the polynomials of the Cephes library for logarithm, sine and cosine. Where PyTorch's
//! x86-64 build multiplies and adds with one rounding, so does this file; where it rounds twice, so does this. Fewer
//! than sixteen values are drawn by another method, in float64.
//!
//! Left out: PyTorch's answer on processors without AVX2, which depends on the C library's `logf`, `cosf` and `sinf`.

use crate::error::{Error, Result};
use crate::tensor::Element;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Words in the generator's state, produced by one twist.
const STATE_WORDS: usize = 624;
/// `normal_` works in blocks of this many values.
pub(crate) const BLOCK: usize = 16;
/// Words turned to values at a time: a multiple of [`BLOCK`], small enough for the first-level cache.
const GROUP: usize = 512;

/// A float type that `normal_` fills tensors of.
pub trait Normal: Element {
    /// Whether a tail of fewer than sixteen values takes words that are then overwritten.
    const TAIL_IS_DRAWN_TWICE: bool;
    /// `to[i] = from[i]`, rounded to nearest even. As long as each other.
    fn round_slice(from: &[f32], to: &mut [Self]);
    /// `to[i] = from[i]`, exactly. As long as each other.
    fn widen_slice(from: &[Self], to: &mut [f32]);
}

impl Normal for f32 {
    const TAIL_IS_DRAWN_TWICE: bool = true;
    fn round_slice(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    fn widen_slice(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Normal for f16 {
    const TAIL_IS_DRAWN_TWICE: bool = false;
    fn round_slice(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
    fn widen_slice(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

impl Normal for bf16 {
    const TAIL_IS_DRAWN_TWICE: bool = false;
    fn round_slice(from: &[f32], to: &mut [Self]) {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = bf16::from_f32(from));
    }
    fn widen_slice(from: &[Self], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
    }
}

/// PyTorch's generator on the CPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Mt19937 {
    words: [u32; STATE_WORDS],
    /// How many of `words` are used.
    used: usize,
    /// The second value of a pair drawn by the method for fewer than sixteen.
    spare: Option<f64>,
}

/// All that a [`Mt19937`] remembers, for a resume state.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The 624 words of the last twist, untempered.
    pub words: Vec<u32>,
    /// How many of them are used, 0 to 624.
    pub used: usize,
    /// A normal value kept for the next draw of fewer than sixteen. PyTorch keeps it in its state too.
    pub spare: Option<f64>,
}

impl Mt19937 {
    /// `torch.manual_seed(seed)`: of the seed modulo 2^64 the low 32 bits count.
    ///
    /// # Errors
    /// A seed outside -2^63 … 2^64 - 1, which PyTorch refuses too.
    pub fn new(seed: i128) -> Result<Self> {
        if !(i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(&seed) {
            return Err(Error::config(format!("seed is {seed}; it must be in -2^63 … 2^64 - 1")));
        }
        let mut words = [0u32; STATE_WORDS];
        words[0] = seed as u32;
        for j in 1..STATE_WORDS {
            let before = words[j - 1];
            words[j] = (before ^ (before >> 30)).wrapping_mul(1_812_433_253).wrapping_add(j as u32);
        }
        Ok(Mt19937 { words, used: STATE_WORDS, spare: None })
    }

    /// What [`Self::from_state`] needs to go on from here.
    pub fn state(&self) -> State {
        State { words: self.words.to_vec(), used: self.used, spare: self.spare }
    }

    /// The generator whose [`Self::state`] this was.
    ///
    /// # Errors
    /// Not 624 words, or more than 624 of them used.
    pub fn from_state(state: &State) -> Result<Self> {
        let words = <[u32; STATE_WORDS]>::try_from(state.words.as_slice()).map_err(|_| {
            Error::format(format!("a generator's state has {} words; it must have {STATE_WORDS}", state.words.len()))
        })?;
        if state.used > STATE_WORDS {
            return Err(Error::format(format!("{} of a generator's {STATE_WORDS} words are used", state.used)));
        }
        Ok(Mt19937 { words, used: state.used, spare: state.spare })
    }

    /// The next 624 words.
    fn twist(&mut self) {
        const MIDDLE: usize = 397;
        let mix = |high: u32, low: u32| {
            let y = (high & 0x8000_0000) | (low & 0x7fff_ffff);
            (y >> 1) ^ ((y & 1).wrapping_neg() & 0x9908_b0df)
        };
        let w = &mut self.words;
        for j in 0..STATE_WORDS - MIDDLE {
            w[j] = w[j + MIDDLE] ^ mix(w[j], w[j + 1]);
        }
        for j in STATE_WORDS - MIDDLE..STATE_WORDS - 1 {
            w[j] = w[j + MIDDLE - STATE_WORDS] ^ mix(w[j], w[j + 1]);
        }
        w[STATE_WORDS - 1] = w[MIDDLE - 1] ^ mix(w[STATE_WORDS - 1], w[0]);
        self.used = 0;
    }

    /// The next word.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == STATE_WORDS {
            self.twist();
        }
        self.used += 1;
        temper(self.words[self.used - 1])
    }

    /// The next two words as one number, the first of them the upper half.
    pub fn next_u64(&mut self) -> u64 {
        let high = self.next_u32();
        u64::from(high) << 32 | u64::from(self.next_u32())
    }

    /// The next words.
    pub fn fill_u32(&mut self, mut out: &mut [u32]) {
        while !out.is_empty() {
            if self.used == STATE_WORDS {
                self.twist();
            }
            let count = out.len().min(STATE_WORDS - self.used);
            let (now, later) = out.split_at_mut(count);
            for (out, &word) in now.iter_mut().zip(&self.words[self.used..]) {
                *out = temper(word);
            }
            self.used += count;
            out = later;
        }
    }

    /// Goes on as if `count` words had been taken: only the twist runs, about half a nanosecond a word.
    pub fn skip(&mut self, mut count: u64) {
        loop {
            let left = (STATE_WORDS - self.used) as u64;
            if count <= left {
                self.used += count as usize; // at most 624
                return;
            }
            count -= left;
            self.twist();
        }
    }

    /// `tensor.normal_()`, mean 0 and deviation 1, on a tensor of `out`'s length; its shape does not matter.
    pub fn normal_fill<T: Normal>(&mut self, out: &mut [T]) {
        if out.len() < BLOCK {
            return self.normal_fill_few(out);
        }
        let mut words = [0; GROUP];
        let mut values = [0.0; GROUP];
        let tail = out.len() % BLOCK;
        let full = out.len() - tail;
        for out in out[..full].chunks_mut(GROUP) {
            self.fill_u32(&mut words[..out.len()]);
            box_muller(&words, &mut values);
            T::round_slice(&values[..out.len()], out);
        }
        if tail != 0 {
            // The last sixteen values, some of which are there already, are drawn as a block of their own.
            if T::TAIL_IS_DRAWN_TWICE {
                self.skip(tail as u64);
            }
            self.fill_u32(&mut words[..BLOCK]);
            box_muller(&words, &mut values);
            let last = out.len() - BLOCK;
            T::round_slice(&values[..BLOCK], &mut out[last..]);
        }
    }

    /// How many words [`Self::normal_fill`] takes for a tensor of `len` values. Of fewer than sixteen: if none is kept.
    pub fn normal_words<T: Normal>(len: usize) -> u64 {
        let (n, block) = (len as u64, BLOCK as u64);
        match (n < block, n % block) {
            (true, _) => n.div_ceil(2) * 4,
            (_, 0) => n,
            (_, tail) => n - tail + block + if T::TAIL_IS_DRAWN_TWICE { tail } else { 0 },
        }
    }

    /// Fewer than sixteen values: pairs `√(-2 ln(1 - b)) · (cos 2πa, sin 2πa)` in float64.
    fn normal_fill_few<T: Normal>(&mut self, out: &mut [T]) {
        for out in out {
            let value = self.spare.take().unwrap_or_else(|| {
                let a = self.uniform_f64();
                let b = self.uniform_f64();
                let radius = (-2.0 * (-b).ln_1p()).sqrt();
                let (sine, cosine) = (std::f64::consts::TAU * a).sin_cos();
                self.spare = Some(radius * sine);
                radius * cosine
            });
            // Rounded to float32 first, in every dtype.
            T::round_slice(&[(value + 0.0) as f32], std::slice::from_mut(out));
        }
    }

    /// 53 bits of two words, in [0, 1).
    fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() & ((1 << 53) - 1)) as f64 * 2f64.powi(-53)
    }

    /// `torch.randperm(n)`, of int64 as it is by default. Each place from the first to the last but one is exchanged
    /// with the one `word mod (places left)` further on. From 2^32 / 20 places it is another algorithm, on 64-bit words.
    pub fn randperm(&mut self, n: usize) -> Vec<usize> {
        const LONG: u64 = u32::MAX as u64 / 20;
        let mut perm: Vec<usize> = (0..n).collect();
        if (n as u64) < LONG {
            for i in 0..n.saturating_sub(1) {
                perm.swap(i, i + self.next_u32() as usize % (n - i));
            }
        } else {
            // Number i is put in one of the i + 1 places so far, and what was there comes last. Too long for a test of
            // every day; compared with PyTorch at 214,748,363 to 214,748,365, around the limit.
            for i in 0..n {
                perm.swap(i, (self.next_u64() % (i as u64 + 1)) as usize); // at most i
            }
        }
        perm
    }
}

/// The output function of mt19937.
#[inline]
fn temper(mut y: u32) -> u32 {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c_5680;
    y ^= (y << 15) & 0xefc6_0000;
    y ^ (y >> 18)
}

/// `a·b + c`, rounded to f64 and then to f32. In general that is not one rounding; on the arguments that [`radius`] and
/// [`cos_sin`] pass it is, for each of the 2^24 uniforms (the tests run them all). Unlike [`f32::mul_add`] it needs no
/// instruction beyond SSE2 to be fast.
#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    (f64::from(a) * f64::from(b) + f64::from(c)) as f32
}

/// Blocks of 16 words to blocks of 16 values: for i in 0..8, `u1 = 1 - u[i]`, `u2 = u[i + 8]`,
/// `out[i] = radius(u1) · cos(2π·u2)`, `out[i + 8] = radius(u1) · sin(2π·u2)`.
fn box_muller(words: &[u32; GROUP], out: &mut [f32; GROUP]) {
    const HALF: usize = BLOCK / 2;
    // Pairs side by side, so that the loop in the middle is long and the compiler makes vectors of it.
    let mut u1 = [0f32; GROUP / 2];
    let mut u2 = [0f32; GROUP / 2];
    let (blocks, _) = words.as_chunks::<BLOCK>();
    for (b, block) in blocks.iter().enumerate() {
        for i in 0..HALF {
            u1[HALF * b + i] = 1.0 - uniform(block[i]);
            u2[HALF * b + i] = uniform(block[HALF + i]);
        }
    }
    for (u1, u2) in u1.iter_mut().zip(&mut u2) {
        let radius = radius(*u1);
        let (cosine, sine) = cos_sin(*u2);
        // PyTorch multiplies by the deviation 1 and adds the mean 0: -0 becomes +0.
        *u1 = radius * cosine + 0.0;
        *u2 = radius * sine + 0.0;
    }
    let (blocks, _) = out.as_chunks_mut::<BLOCK>();
    for (b, block) in blocks.iter_mut().enumerate() {
        block[..HALF].copy_from_slice(&u1[HALF * b..][..HALF]);
        block[HALF..].copy_from_slice(&u2[HALF * b..][..HALF]);
    }
}

/// 24 bits of a word, in [0, 1).
#[inline(always)]
fn uniform(word: u32) -> f32 {
    (word & 0xff_ffff) as i32 as f32 * (1.0 / 16_777_216.0)
}

/// `√(-2 ln u1)` for u1 in [2^-24, 1], the logarithm as Cephes computes it.
#[inline(always)]
fn radius(u1: f32) -> f32 {
    const P: [u32; 9] = [
        0x3d90_21bb, // 7.0376836e-2
        0xbdeb_d1b8, // -1.1514610e-1
        0x3def_251a, // 1.1676998e-1
        0xbdfe_5d4f, // -1.2420141e-1
        0x3e11_e9bf, // 1.4249323e-1
        0xbe2a_ae50, // -1.6668057e-1
        0x3e4c_ceac, // 2.0000714e-1
        0xbe7f_fffc, // -2.4999994e-1
        0x3eaa_aaaa, // 3.3333331e-1
    ];
    const Q1: f32 = f32::from_bits(0xb95e_8083); // -2.1219444e-4
    const Q2: f32 = f32::from_bits(0x3f31_8000); // 0.693359375; Q1 + Q2 = ln 2, e times this one is exact
    const SQRT_HALF: f32 = f32::from_bits(0x3f35_04f3);
    // u1 = m · 2^e, m in [√½, √2), x = m - 1.
    let bits = u1.to_bits();
    let m = f32::from_bits((bits & 0x807f_ffff) | 0x3f00_0000);
    let low = m < SQRT_HALF;
    let e = ((bits >> 23) as i32 - 126) as f32 - if low { 1.0 } else { 0.0 };
    let x = (m - 1.0) + if low { m } else { 0.0 };
    let z = x * x;
    let mut y = f32::from_bits(P[0]);
    for p in &P[1..] {
        y = fma(y, x, f32::from_bits(*p));
    }
    y *= x;
    y = fma(y, z, e * Q1);
    y -= 0.5 * z;
    let log = e * Q2 + (x + y);
    (-2.0 * log).sqrt()
}

/// `(cos θ, sin θ)`, θ = 2π·u2, for u2 in [0, 1), as Cephes computes them.
#[inline(always)]
fn cos_sin(u2: f32) -> (f32, f32) {
    const TWO_PI: f32 = f32::from_bits(0x40c9_0fdb);
    const FOUR_OVER_PI: f32 = f32::from_bits(0x3fa2_f983);
    // Their sum is -π/4. The first two have so few bits that j times them is exact.
    const D1: f32 = f32::from_bits(0xbf49_0000);
    const D2: f32 = f32::from_bits(0xb97d_a000);
    const D3: f32 = f32::from_bits(0xb322_2169);
    const C: [u32; 3] = [0x37cc_f5ce, 0xbab6_061a, 0x3d2a_aaa5]; // 2.4433157e-5, -1.3887316e-3, 4.1666646e-2
    const S: [u32; 3] = [0xb94c_a1f9, 0x3c08_839e, 0xbe2a_aaa3]; // -1.9515296e-4, 8.3321612e-3, -1.6666655e-1
    let [c0, c1, c2] = C.map(f32::from_bits);
    let [s0, s1, s2] = S.map(f32::from_bits);
    // θ = x + j·π/4, j even, x in [-π/4, π/4].
    let theta = TWO_PI * u2;
    let eighths = theta * FOUR_OVER_PI;
    // (⌊eighths⌋ + 1) & !1, which is 0, 2, 4, 6 or 8, by comparisons: a cast to integers would not become vectors.
    let j = [1.0, 3.0, 5.0, 7.0].iter().fold(0, |j, &from| j + if eighths >= from { 2 } else { 0 });
    let y = j as f32;
    let x = fma(y, D3, (theta + y * D1) + y * D2);
    let z = x * x;
    let mut c = fma(fma(c0, z, c1), z, c2) * z;
    c = fma(c, z, -0.5 * z) + 1.0;
    let mut s = fma(fma(s0, z, s1), z, s2) * z;
    s = fma(s, x, x);
    // Quarter turns: (c, s), (-s, c), (-c, -s), (s, -c), and (c, s) again at j = 8.
    let (cosine, sine) = if j & 2 == 0 { (c, s) } else { (s, c) };
    let negative = |v: f32, bit: i32| f32::from_bits(v.to_bits() ^ ((bit & 4) << 29) as u32);
    (negative(cosine, j + 2), negative(sine, j))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of a section of the fixture.
    fn section(name: &str) -> impl Iterator<Item = &'static str> {
        let text = include_str!("../fixtures/torch_init.txt");
        let (_, text) = text.split_once(&format!("\n[{name}]\n")).unwrap();
        text.lines().take_while(|line| !line.is_empty())
    }

    /// What stands behind `key=` in a line.
    fn field(line: &'static str, key: &str) -> &'static str {
        line.split(' ').find_map(|part| part.strip_prefix(key)?.strip_prefix('=')).unwrap()
    }

    fn hex(text: &str) -> u32 {
        u32::from_str_radix(text, 16).unwrap()
    }

    fn fnv1a64(bytes: impl IntoIterator<Item = u8>) -> String {
        let start = 0xcbf2_9ce4_8422_2325u64;
        let hash = bytes.into_iter().fold(start, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
        format!("{hash:016x}")
    }

    #[test]
    fn words_are_torchs() {
        let mut seeds = 0;
        for line in section("words") {
            let rng = Mt19937::new(field(line, "seed").parse().unwrap()).unwrap();
            let mut first = [0; 4];
            rng.clone().fill_u32(&mut first);
            assert!(line.contains(&first.map(|w| format!("{w:08x}")).join(" ")), "{first:x?}: {line}");
            let mut skipped = rng.clone();
            skipped.skip(999);
            assert_eq!(skipped.next_u32(), hex(field(line, "w999")), "{line}");
            seeds += 1;
        }
        assert_eq!(seeds, 10);
    }

    #[test]
    fn skipping_and_filling_are_taking_one_by_one() {
        for count in [0, 1, 15, 623, 624, 625, 1247, 1248, 1249, 5000] {
            for before in [0, 1, 600, 624] {
                let mut taken = Mt19937::new(49).unwrap();
                for _ in 0..before {
                    taken.next_u32();
                }
                let (mut skipped, mut filled) = (taken.clone(), taken.clone());
                let words: Vec<u32> = (0..count).map(|_| taken.next_u32()).collect();
                skipped.skip(count as u64);
                let mut out = vec![0; count];
                filled.fill_u32(&mut out);
                assert_eq!(out, words);
                assert_eq!((skipped, filled), (taken.clone(), taken), "{count} after {before}");
            }
        }
    }

    #[test]
    fn seeds_outside_64_bits_are_refused() {
        for seed in [-(1 << 63) - 1, 1 << 64, i128::MAX, i128::MIN] {
            assert!(Mt19937::new(seed).unwrap_err().to_string().contains(&seed.to_string()));
        }
        // -2^63 and 2^64 - 1 are the last ones allowed; the low 32 bits of the first are 0.
        assert_eq!(Mt19937::new(-(1 << 63)).unwrap(), Mt19937::new(0).unwrap());
        assert_eq!(Mt19937::new((1 << 64) - 1).unwrap(), Mt19937::new(-1).unwrap());
    }

    #[test]
    fn a_state_goes_on_where_it_was_taken() {
        let mut rng = Mt19937::new(7).unwrap();
        rng.normal_fill(&mut [0f32; 701]);
        rng.normal_fill(&mut [0f32; 3]);
        let state = rng.state();
        let mut again = Mt19937::from_state(&state).unwrap();
        let (mut a, mut b) = ([0f32; 5], [0f32; 5]);
        rng.normal_fill(&mut a);
        again.normal_fill(&mut b);
        assert_eq!((a, rng), (b, again));
        assert!(Mt19937::from_state(&State { used: 625, ..state.clone() }).is_err());
        assert!(Mt19937::from_state(&State { words: vec![0; 623], ..state }).is_err());
    }

    /// The arithmetic of `normal_` on all its inputs: with them the draws of sixteen values and more are settled.
    #[test]
    fn radius_cosine_and_sine_of_every_uniform() {
        /// A uniform whose radius is 1.
        const UNIT: u32 = 6_601_320;
        let [mut r, mut c, mut s] = [(); 3].map(|()| Vec::with_capacity(1 << 24));
        let (mut words, mut values) = ([0; GROUP], [0.0; GROUP]);
        for k in (0..1 << 24).step_by(GROUP / 2) {
            for (b, block) in words.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                *block = std::array::from_fn(|i| if i < 8 { k + (8 * b + i) as u32 } else { 0 });
            }
            box_muller(&words, &mut values);
            values.as_chunks::<BLOCK>().0.iter().for_each(|block| r.extend_from_slice(&block[..8]));
            for block in words.as_chunks_mut::<BLOCK>().0 {
                *block = std::array::from_fn(|i| if i < 8 { UNIT } else { block[i - 8] });
            }
            box_muller(&words, &mut values);
            for block in values.as_chunks::<BLOCK>().0 {
                c.extend_from_slice(&block[..8]);
                s.extend_from_slice(&block[8..]);
            }
        }
        let mut compared = 0;
        for line in section("exact") {
            for (name, values) in [("R", &r), ("C", &c), ("S", &s)] {
                if line.starts_with("k=") {
                    let k: usize = field(line, "k").parse().unwrap();
                    assert_eq!(values[k].to_bits(), hex(field(line, name)), "{name}: {line}");
                    compared += 1;
                } else if line.starts_with(name) {
                    let bytes = values.iter().flat_map(|v| v.to_le_bytes());
                    assert_eq!(fnv1a64(bytes), field(line, "fnv1a64"), "{name}");
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 3 + 3 * 25);
    }

    #[test]
    fn permutations_are_torchs() {
        let mut lines = 0;
        for line in include_str!("../fixtures/torch_randperm.txt").lines().filter(|line| !line.starts_with('#')) {
            let mut rng = Mt19937::new(field(line, "seed").parse().unwrap()).unwrap();
            for (name, sum) in [("a", "a_fnv"), ("b", "b_fnv")] {
                let perm = rng.randperm(field(line, "n").parse().unwrap());
                let first: Vec<String> = perm.iter().take(8).map(usize::to_string).collect();
                assert_eq!(first.join(","), field(line, name), "{name}: {line}");
                assert_eq!(fnv1a64(perm.iter().flat_map(|&i| (i as u64).to_le_bytes())), field(line, sum), "{line}");
            }
            assert_eq!(rng.next_u32() & 0xff_ffff, hex(field(line, "word")), "{line}");
            lines += 1;
        }
        assert_eq!(lines, 48);
    }
}
