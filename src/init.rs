//! The weights of the original's `__init__`, bit for bit.
//!
//! The original draws `W_enc`, throws it away, draws `W_dec`, and makes `W_enc` a transposed copy of it. Here the first
//! draw is skipped by running the generator alone. The second is cut into runs of whole rows: whoever takes the next
//! run takes with it a copy of the generator and leaves the generator behind the run. So the threads share no more than
//! the twist, and any number of them gives the same bits.

use crate::autodiff::Parameters;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::rng::{BLOCK, Mt19937, Normal};
use crate::tensor::{Tensor, element_count};
use crate::threads::{available, for_each};
use half::{bf16, f16};
use zerocopy::FromZeros;

/// About how many weights a thread takes at a time.
const RUN: usize = 1 << 16;

/// The weights that `CrossCoder.__init__` makes from `seed`:
/// `W_dec = W / ‖W‖ · dec_init_norm` with `W` the second `normal_` after `torch.manual_seed(seed)` and the norm over
/// d_in, `W_enc[m,i,h] = W_dec[h,m,i]`, biases zero.
///
/// `W_enc` `[n_models, d_in, d_hidden]`, lying as `W_dec` does; `W_dec` `[d_hidden, n_models, d_in]`; `b_enc`
/// `[d_hidden]`; `b_dec` `[n_models, d_in]`; all in `dtype`. The draw is rounded to `dtype`, then the norm, the
/// quotient, the product.
/// Original: `CrossCoder.__init__`, where n_models is 2.
///
/// # Errors
/// A seed that PyTorch refuses; a dtype other than float32, float16, bfloat16; a size of 0; sizes that memory cannot
/// hold.
pub fn initial_weights(
    seed: i128,
    d_hidden: usize,
    n_models: usize,
    d_in: usize,
    dtype: Dtype,
    dec_init_norm: f64,
) -> Result<Parameters<Tensor>> {
    let threads = available();
    let shape = [d_hidden, n_models, d_in];
    match dtype {
        Dtype::F32 => weights::<f32>(seed, shape, dec_init_norm, threads),
        Dtype::F16 => weights::<f16>(seed, shape, dec_init_norm, threads),
        Dtype::BF16 => weights::<bf16>(seed, shape, dec_init_norm, threads),
        _ => Err(Error::config(format!("weights in {dtype}: they must be float32, float16 or bfloat16"))),
    }
}

fn weights<T: Weight>(seed: i128, shape: [usize; 3], scale: f64, threads: usize) -> Result<Parameters<Tensor>> {
    let rng = Mt19937::new(seed)?;
    let [d_hidden, n_models, d_in] = shape;
    let too_large = || Error::config(format!("weights [{d_hidden}, {n_models}, {d_in}] do not fit in memory"));
    let n = element_count(&shape).filter(|n| n.checked_mul(2 * size_of::<T>()).is_some()).ok_or_else(too_large)?;
    if n == 0 {
        return Err(Error::config(format!("weights [{d_hidden}, {n_models}, {d_in}]: no size may be 0")));
    }
    let mut w_dec = T::new_vec_zeroed(n).map_err(|_| too_large())?;
    let mut w_enc = T::new_vec_zeroed(n).map_err(|_| too_large())?;
    fill(rng, &mut w_dec, &mut w_enc, d_in, scale as f32, threads);
    Ok(Parameters {
        w_enc: Tensor::new(shape.to_vec(), T::wrap(w_enc))?.permuted(&[1, 2, 0]),
        w_dec: Tensor::new(shape.to_vec(), T::wrap(w_dec))?,
        b_enc: Tensor::new(vec![d_hidden], T::wrap(vec![T::default(); d_hidden]))?,
        b_dec: Tensor::new(vec![n_models, d_in], T::wrap(vec![T::default(); n_models * d_in]))?,
    })
}

/// Fills both with the normalised second draw of `rng`.
fn fill<T: Weight>(mut rng: Mt19937, w_dec: &mut [T], w_enc: &mut [T], d_in: usize, scale: f32, threads: usize) {
    let n = w_dec.len();
    if n < BLOCK {
        rng.normal_fill(w_dec); // thrown away
        rng.normal_fill(w_dec);
        normalise(w_dec, d_in, scale);
        w_enc.copy_from_slice(w_dec);
        return;
    }
    rng.skip(Mt19937::normal_words::<T>(n));
    // Runs are whole rows and whole blocks; the last one takes the rest, thus never less than a block. A draw into such
    // a run is the draw's part there: only what lies behind the last whole block is drawn otherwise, and that is the
    // end of the last run.
    let unit = BLOCK * d_in;
    let run = unit.saturating_mul((RUN / unit).max(1));
    let runs = (n / run).max(1);
    let (mut w_dec, mut w_enc) = (w_dec, w_enc);
    let pieces = std::iter::from_fn(|| {
        let left = w_dec.len();
        let len = if left / 2 < run { left } else { run };
        if len == 0 {
            return None;
        }
        let dec = w_dec.split_off_mut(..len)?;
        let enc = w_enc.split_off_mut(..len)?;
        let here = rng.clone();
        rng.skip(Mt19937::normal_words::<T>(len));
        Some((here, dec, enc))
    });
    for_each(
        threads.min(runs),
        pieces,
        || (),
        |_, (mut rng, dec, enc)| {
            rng.normal_fill(dec);
            normalise(dec, d_in, scale);
            enc.copy_from_slice(dec);
        },
    );
}

/// `row = row / ‖row‖ · scale` for each row of d_in weights, rounded after the norm, the quotient and the product.
fn normalise<T: Weight>(rows: &mut [T], d_in: usize, scale: f32) {
    let mut wide = vec![0.0; d_in];
    let mut narrow = vec![T::default(); d_in];
    for row in rows.chunks_exact_mut(d_in) {
        T::widen_slice(row, &mut wide);
        let norm = norm::<T>(&wide);
        wide.iter_mut().for_each(|w| *w /= norm);
        T::round_slice(&wide, &mut narrow);
        T::widen_slice(&narrow, &mut wide);
        wide.iter_mut().for_each(|w| *w *= scale);
        T::round_slice(&wide, row);
    }
}

/// `‖row‖`, rounded to the dtype. Of a single weight PyTorch takes the magnitude and squares nothing.
fn norm<T: Weight>(row: &[f32]) -> f32 {
    match row {
        [weight] => weight.abs(),
        _ => T::DTYPE.round(T::sum_of_squares(row).sqrt()),
    }
}

/// A dtype of weights: PyTorch's `norm` over the last dimension adds the squares of each in another order.
trait Weight: Normal + FromZeros {
    /// `Σ row²` in float32.
    fn sum_of_squares(row: &[f32]) -> f32;
}

/// The squares of groups of eight on eight sums, which are then added from left to right.
fn eight_lanes(groups: &[[f32; 8]]) -> f32 {
    let mut lanes = [0f32; 8];
    for group in groups {
        for (lane, x) in lanes.iter_mut().zip(group) {
            *lane += x * x;
        }
    }
    lanes.iter().fold(0.0, |sum, lane| sum + lane)
}

impl Weight for f32 {
    /// Eight lanes, then the rest in order: four of them, if there are four, with two roundings each, others with one.
    fn sum_of_squares(row: &[f32]) -> f32 {
        let (groups, rest) = row.as_chunks::<8>();
        let (four, few) = rest.as_chunks::<4>();
        let sum = four.as_flattened().iter().fold(eight_lanes(groups), |sum, x| sum + x * x);
        few.iter().fold(sum, |sum, &x| x.mul_add(x, sum))
    }
}

impl Weight for f16 {
    /// In order.
    fn sum_of_squares(row: &[f32]) -> f32 {
        row.iter().fold(0.0, |sum, x| sum + x * x)
    }
}

impl Weight for bf16 {
    /// Eight lanes, two groups at a time, then the rest in order.
    fn sum_of_squares(row: &[f32]) -> f32 {
        let (whole, rest) = row.split_at(row.len() / 16 * 16);
        rest.iter().fold(eight_lanes(whole.as_chunks().0), |sum, x| sum + x * x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Values;

    fn field<'a>(line: &'a str, key: &str) -> &'a str {
        line.split(' ').find_map(|part| part.strip_prefix(key)?.strip_prefix('=')).unwrap()
    }

    fn number(line: &str, key: &str) -> usize {
        field(line, key).parse().unwrap()
    }

    fn bytes(values: &Values) -> Vec<u8> {
        let mut bytes = Vec::new();
        values.le_bytes(0, values.len(), &mut bytes);
        bytes
    }

    fn row_major_bytes(tensor: &Tensor) -> Vec<u8> {
        bytes(tensor.clone().into_row_major().values())
    }

    fn fnv1a64(bytes: &[u8]) -> String {
        let start = 0xcbf2_9ce4_8422_2325u64;
        let hash = bytes.iter().fold(start, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
        format!("{hash:016x}")
    }

    /// The first and last eight values as the fixture writes them, then the checksum of all.
    fn shown(bytes: &[u8], size: usize, first: usize, last: usize) -> String {
        let hex = |value: &[u8]| value.iter().rev().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut words: Vec<String> = bytes.chunks(size).map(hex).collect();
        if words.len() > first + last {
            words.splice(first..words.len() - last, ["..".to_owned()]);
        }
        format!("{} fnv={}", words.join(" "), fnv1a64(bytes))
    }

    fn dtype(line: &str) -> Dtype {
        match line.split(' ').find(|word| ["f32", "f16", "bf16"].contains(word)) {
            Some("f32") => Dtype::F32,
            Some("f16") => Dtype::F16,
            Some("bf16") => Dtype::BF16,
            _ => panic!("no dtype in {line}"),
        }
    }

    /// The two draws, the norms of the second, and the words that both took.
    fn draws<T: Weight>(seed: i128, d_hidden: usize, d_in: usize) -> ([Values; 3], u64) {
        let mut rng = Mt19937::new(seed).unwrap();
        let mut before = rng.clone();
        let [d1, d2] = [(); 2].map(|()| {
            let mut draw = vec![T::default(); d_hidden * 2 * d_in];
            rng.normal_fill(&mut draw);
            draw
        });
        let words = 2 * Mt19937::normal_words::<T>(d1.len());
        before.skip(words);
        assert_eq!(before, rng, "{words} words");
        let norms = d2.chunks(d_in).map(|row| {
            let mut wide = vec![0.0; d_in];
            T::widen_slice(row, &mut wide);
            let mut rounded = [T::default()];
            T::round_slice(&[norm::<T>(&wide)], &mut rounded);
            rounded[0]
        });
        ([T::wrap(d1), T::wrap(norms.collect()), T::wrap(d2)], words)
    }

    fn draws_in(dtype: Dtype, seed: i128, d_hidden: usize, d_in: usize) -> ([Values; 3], u64) {
        match dtype {
            Dtype::F32 => draws::<f32>(seed, d_hidden, d_in),
            Dtype::F16 => draws::<f16>(seed, d_hidden, d_in),
            _ => draws::<bf16>(seed, d_hidden, d_in),
        }
    }

    /// Every draw, norm and weight that the fixture holds or has a checksum of.
    #[test]
    fn weights_are_torchs() {
        let (mut cases, mut tails, mut scales) = (0, 0, 0);
        let text = include_str!("../fixtures/torch_init.txt");
        let (_, text) = text.split_once("\n[cases]\n").unwrap();
        let mut lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('['));
        while let Some(line) = lines.next() {
            if line.starts_with("case") {
                let (dtype, seed) = (dtype(line), field(line, "seed").parse().unwrap());
                let (d_hidden, d_in) = (number(line, "d_hidden"), number(line, "d_in"));
                let scale = field(line, "scale").parse().unwrap();
                let weights = initial_weights(seed, d_hidden, 2, d_in, dtype, scale).unwrap();
                let ([d1, norms, d2], words) = draws_in(dtype, seed, d_hidden, d_in);
                assert_eq!(words, number(line, "words") as u64, "{line}");
                let size = dtype.size_bytes();
                let expect = |key: &str, found: String, expected: Option<&str>| {
                    assert_eq!(Some(format!("  {key:3} {found}").as_str()), expected, "{line}");
                };
                expect("d1", shown(&bytes(&d1), size, 8, 8), lines.next());
                expect("d2", shown(&bytes(&d2), size, 8, 8), lines.next());
                expect("nr", shown(&bytes(&norms), size, 4, 0), lines.next());
                expect("w", shown(&bytes(weights.w_dec.values()), size, 8, 8), lines.next());
                expect("enc", format!("fnv={}", fnv1a64(&row_major_bytes(&weights.w_enc))), lines.next());
                cases += 1;
            } else if line.contains("d_in=") {
                let (dtype, d_in) = (dtype(line), number(line, "d_in"));
                let weights = initial_weights(11, 64, 2, d_in, dtype, 0.08).unwrap();
                let ([_, norms, d2], _) = draws_in(dtype, 11, 64, d_in);
                for (key, values) in [("d2", &d2), ("nr", &norms), ("w", weights.w_dec.values())] {
                    assert_eq!(fnv1a64(&bytes(values)), field(line, key), "{key}: {line}");
                }
                tails += 1;
            } else {
                let scale = field(line, "scale").parse().unwrap();
                let weights = initial_weights(49, 96, 2, 24, dtype(line), scale).unwrap();
                assert_eq!(fnv1a64(&bytes(weights.w_dec.values())), field(line, "w"), "{line}");
                scales += 1;
            }
        }
        assert_eq!((cases, tails, scales), (45, 126, 12));
    }

    #[test]
    fn shapes_and_layout_are_the_originals() {
        for n_models in [1, 2, 3] {
            let w = initial_weights(49, 5, n_models, 7, Dtype::BF16, 0.08).unwrap();
            assert_eq!(w.w_enc.shape(), [n_models, 7, 5]);
            assert_eq!(w.w_enc.strides(), [7, 1, n_models * 7]);
            assert_eq!(w.w_dec.shape(), [5, n_models, 7]);
            assert_eq!(w.w_enc.values(), w.w_dec.values());
            assert_eq!(w.b_enc, Tensor::new(vec![5], Values::BF16(vec![bf16::ZERO; 5])).unwrap());
            assert_eq!(w.b_dec, Tensor::new(vec![n_models, 7], Values::BF16(vec![bf16::ZERO; 7 * n_models])).unwrap());
        }
    }

    /// The draw depends on the number of weights alone, the norm on d_in alone: twelve rows of five for one model, six
    /// for two and four for three are the same weights.
    #[test]
    fn models_only_divide_the_rows() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for (rows, d_in) in [(12, 5), (6, 2), (6, 64)] {
                let weights = [1, 2, 3].map(|n_models| {
                    initial_weights(3, rows / n_models, n_models, d_in, dtype, 0.08).unwrap().w_dec.into_values()
                });
                assert!(weights.iter().all(|w| *w == weights[0]), "{rows} × {d_in} {dtype}");
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        // Odd sizes, the last run longer than the others, rows longer than a run, and all weights in one run.
        for shape in [[1021, 2, 203], [3, 1, 70_001], [40, 2, 4099], [33, 3, 1], [1, 1, 17]] {
            let one = weights::<f32>(7, shape, 0.08, 1).unwrap();
            for threads in [2, 3, 8] {
                let more = weights::<f32>(7, shape, 0.08, threads).unwrap();
                assert_eq!((more.w_dec, more.w_enc), (one.w_dec.clone(), one.w_enc.clone()), "{shape:?}");
            }
            // The same by the text of the original: two draws, then the rows.
            let mut rng = Mt19937::new(7).unwrap();
            let mut plain = vec![0f32; shape.iter().product()];
            rng.normal_fill(&mut plain);
            rng.normal_fill(&mut plain);
            normalise(&mut plain, shape[2], 0.08);
            assert_eq!(*one.w_dec.values(), Values::F32(plain), "{shape:?}");
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for (d_hidden, n_models, d_in) in
            [(0, 2, 4), (4, 0, 4), (4, 2, 0), (usize::MAX, 2, 2), (1 << 61, 1, 1), (1 << 31, 1 << 31, 1 << 31)]
        {
            let error = initial_weights(1, d_hidden, n_models, d_in, Dtype::F32, 0.08).unwrap_err();
            assert!(error.to_string().contains(&format!("[{d_hidden}, {n_models}, {d_in}]")), "{error}");
        }
        assert!(initial_weights(1 << 64, 4, 2, 4, Dtype::F32, 0.08).is_err());
        assert!(initial_weights(1, 4, 2, 4, Dtype::F64, 0.08).is_err());
    }
}
