//! The GPU backend: the shipped PTX, run through cust and the driver's interface by an interpreter, or on a real device with
//! `CROSSCODER_TEST_GPU=1`. `tests/gpu/run.sh` runs this program on such a machine, and its benchmark.

#![cfg(feature = "cuda")]

mod primitives;
mod standin;

use crosscoder::autodiff::{Parameters, Tape, Var};
use crosscoder::backend::cuda::{Cuda, Latents, Matrix, Product};
use crosscoder::backend::{AdamStep, Backend, Cpu, Write};
use crosscoder::golden::{Case, Outcome};
use crosscoder::sparse::Path;
use crosscoder::tensor::Values;
use crosscoder::{Dtype, Result};
use primitives::*;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];
const PATHS: [Path; 2] = [Path::Sparse, Path::Dense];

fn cuda(dtype: Dtype) -> Cuda {
    Cuda::new(0, dtype).unwrap_or_else(|e| panic!("{e}"))
}

/// The backends that compute in `dtype`: latents held both ways, float32 products made both ways; on a real device also with
/// the general modules alone, which may not be what it takes.
fn variants(dtype: Dtype) -> Vec<(String, Cuda)> {
    let be = cuda(dtype);
    let products = if dtype == Dtype::F32 { &[Product::Ffma, Product::Split][..] } else { &[Product::Auto] };
    let mut all = Vec::new();
    for (path, &product) in PATHS.iter().flat_map(|&path| products.iter().map(move |product| (path, product))) {
        let (name, be) = (format!("{dtype} {path:?} {product:?}"), be.clone().with_path(path).with_product(product));
        if standin::real_gpu() && product != Product::Ffma {
            all.push((format!("{name}, general"), be.clone().with_general_products()));
        }
        all.push((name, be));
    }
    all
}

/// Of these, in float32, two that have each way once.
fn two_variants(dtype: Dtype) -> Vec<(String, Cuda)> {
    let crossed = |name: &str| name.ends_with("Sparse Ffma") || name.contains("Dense Split") || name.contains("Auto");
    let found: Vec<_> = variants(dtype).into_iter().filter(|(name, _)| crossed(name)).collect();
    assert!(found.len() >= 2, "each way once");
    found
}

#[test]
fn primitives_agree_with_naive_loops() {
    if !standin::ready("primitives_agree_with_naive_loops") {
        return;
    }
    for dtype in DTYPES {
        for (_, be) in variants(dtype) {
            SHAPES.into_iter().for_each(|shape| check(&be, shape));
        }
    }
}

#[test]
fn adam_agrees_with_naive_loops() {
    if !standin::ready("adam_agrees_with_naive_loops") {
        return;
    }
    DTYPES.into_iter().for_each(|dtype| check_adam(&cuda(dtype)));
}

#[test]
fn a_nan_spreads_as_in_the_original() {
    if !standin::ready("a_nan_spreads_as_in_the_original") {
        return;
    }
    for path in PATHS {
        for product in [Product::Ffma, Product::Split] {
            check_nan(&cuda(Dtype::F32).with_path(path).with_product(product), path);
        }
    }
    // In the encoder: nan passes relu, and a split product leaves what is not finite to the other one.
    for product in [Product::Ffma, Product::Split] {
        let be = cuda(Dtype::F32).with_product(product);
        let (w, b) = (upload(&be, 2, 2, &[1.0, 0.0, 0.0, -1.0]), upload(&be, 1, 2, &[0.0, 0.0]));
        let (mut x, mut out) = <(_, <Cuda as Backend>::Latents)>::default();
        be.fill(2, 2, &[f32::INFINITY, 1.0, 2.0, f32::NEG_INFINITY], &mut x).unwrap();
        be.encode(&x, &w, &b, &mut out).unwrap();
        let out = dense(&be, &out);
        assert!(out[0] == f64::INFINITY && out[1].is_nan() && out[2].is_nan() && out[3] == f64::INFINITY, "{out:?}");
    }
}

/// Whether the processor has fused multiply-adds.
fn host_fuses() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    return cfg!(target_arch = "aarch64");
}

#[test]
fn elementwise_formulas_give_the_cpus_bits() {
    if !standin::ready("elementwise_formulas_give_the_cpus_bits") {
        return;
    }
    fn results<B: Backend<Scalar = f32>>(be: &B) -> Result<Vec<Vec<f64>>> {
        let (rows, models, d, mut rng) = (7, 2, 45, Rng(5));
        let n = rows * models * d;
        let mut numbers = |n: usize| rng.vec(n).iter().map(|v| (*v * 3.0) as f32).collect::<Vec<_>>();
        // All of a half type's subnormals and both overflows are met by rounding powers of two.
        let range: Vec<f32> = (-160..140).map(|e| 1.2345 * 2f64.powi(e) as f32).collect();
        let (mut x, mut y, mut out) = <(B::Matrix, B::Matrix, B::Matrix)>::default();
        be.fill(3, 100, &range, &mut x)?;
        let mut all = vec![values(be, &x)];
        be.fill(rows, models * d, &numbers(n), &mut x)?;
        be.fill(rows, models * d, &numbers(n), &mut y)?;
        be.squared_distances_grad(&x, &y, 0.1, &mut out)?;
        all.push(values(be, &out));
        let (mut norms, mut d_t) = <(B::Matrix, B::Matrix)>::default();
        let mut some_norms: Vec<f32> = numbers(rows * models).iter().map(|v| v.abs()).collect();
        some_norms[3] = 0.0;
        be.fill(rows, models, &some_norms, &mut norms)?;
        be.fill(1, rows, &numbers(rows), &mut d_t)?;
        for write in [Write::Set, Write::Add] {
            be.group_norms_grad(&x, &norms, &d_t, write, &mut out)?;
            all.push(values(be, &out));
        }
        let (mut acts, mut d_acts) = <(B::Latents, B::Latents)>::default();
        be.to_latents(&y, &mut acts)?;
        let mut t = B::Matrix::default();
        be.fill(1, models * d, &numbers(models * d), &mut t)?;
        be.weighted_sums_grad(&acts, &t, -0.3, &mut d_acts, &mut d_t)?;
        all.push(dense(be, &d_acts));
        let [mut p, mut m, mut v] = [0.5, 0.1, 0.01].map(|scale: f32| {
            let values = numbers(n).iter().map(|v| if scale < 0.1 { v.abs() } else { *v } * scale).collect();
            be.upload(rows, models * d, Values::F32(values)).unwrap()
        });
        let step = AdamStep {
            clip: 0.7,
            one_minus_beta1: 0.1,
            beta2: 0.999,
            one_minus_beta2: 0.001,
            step_size: 5e-4,
            bias_correction2_sqrt: 0.0316,
            eps: be.round(1e-8),
        };
        be.adam(&mut p, &x, &mut m, &mut v, &step)?;
        all.extend([&p, &m, &v].map(|m| values(be, m)));
        Ok(all)
    }
    for dtype in DTYPES {
        let ours = results(&cuda(dtype)).unwrap();
        let cpu = results(&Cpu::<f32>::new(dtype)).unwrap();
        let adam = ours.len() - 3;
        for (i, (ours, cpu)) in ours.iter().zip(&cpu).enumerate() {
            if i >= adam && dtype == Dtype::F32 && !host_fuses() {
                continue; // The CPU backend's sums are fused where the processor can; the GPU's always are.
            }
            let bits = |v: &[f64]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(ours), bits(cpu), "{dtype}, result {i}");
        }
    }
}

#[test]
fn golden_cases_pass() {
    if !standin::ready("golden_cases_pass") {
        return;
    }
    let fixtures = standin::root().join("fixtures/golden");
    let mut cases = 0;
    for entry in std::fs::read_dir(fixtures).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() {
            continue;
        }
        cases += 1;
        let case = Case::load(&dir).unwrap();
        for (name, be) in two_variants(case.cfg.enc_dtype().unwrap()) {
            let rows = case.compare(be).unwrap();
            let compared = rows.iter().filter(|r| r.pass().is_some()).count();
            assert!(compared >= 14, "{}: {compared} comparisons", case.name);
            let mut share = 0f64;
            for row in rows {
                assert_ne!(row.pass(), Some(false), "{name} {row:?}");
                if let Outcome::Compared { max, rms, .. } = &row.outcome {
                    share = share.max(max.share()).max(rms.share());
                }
            }
            println!("largest share of a tolerance: {share:.3} in {}, {name}", case.name);
        }
    }
    assert!(cases >= 7, "{cases} cases");
}

/// Training by the tape and Adam.
struct Training<B: Backend> {
    be: B,
    shape: [usize; 3],
    params: Parameters<B::Matrix>,
    grads: Parameters<B::Matrix>,
    m: Parameters<B::Matrix>,
    v: Parameters<B::Matrix>,
    tape: Tape<B>,
    rate: f32,
    steps: i32,
}

impl<B: Backend<Scalar = f32>> Training<B> {
    /// `shape`: d_hidden, n_models, d_in; `weights` in the layout of the backend.
    fn new(be: &B, shape @ [h, models, d]: [usize; 3], weights: Parameters<Vec<f32>>) -> Result<Self> {
        let sizes = [(h, models * d), (h, models * d), (1, h), (1, models * d)];
        let upload = |values: [Vec<f32>; 4]| -> Result<Parameters<B::Matrix>> {
            let mut each = sizes.iter().zip(values).map(|(&(rows, cols), v)| be.upload(rows, cols, Values::F32(v)));
            let mut next = || each.next().expect("four parameters");
            Ok(Parameters::from_each([next()?, next()?, next()?, next()?]))
        };
        let zeros = || upload(sizes.map(|(rows, cols)| vec![0.0; rows * cols]));
        let Parameters { w_enc, w_dec, b_enc, b_dec } = weights;
        Ok(Training {
            params: upload([w_enc, w_dec, b_enc, b_dec])?,
            grads: Parameters::default(),
            m: zeros()?,
            v: zeros()?,
            tape: Tape::new(be.clone()),
            be: be.clone(),
            shape,
            rate: 0.01,
            steps: 0,
        })
    }

    /// One step on a batch [batch, n_models, d_in]; the loss before it.
    fn step(&mut self, x: &[f32]) -> Result<f32> {
        let width = self.shape[1] * self.shape[2];
        self.tape.clear();
        let x = self.tape.input(x.len() / width, width, x)?;
        self.step_from(x)
    }

    /// The same of a batch that is on the device already.
    fn step_staged(&mut self, x: &mut B::Matrix) -> Result<f32> {
        self.tape.clear();
        let x = self.tape.staged(x)?;
        self.step_from(x)
    }

    fn step_from(&mut self, x: Var) -> Result<f32> {
        let Training { be, shape: [_, models, _], params, grads, m, v, tape, rate, steps } = self;
        let acts = tape.encode(params, x)?;
        let rec = tape.decode(params, acts)?;
        let l2 = tape.squared_error(rec, x)?;
        let t = tape.total_decoder_norm(params, *models)?;
        let l1 = tape.weighted_l1(acts, t)?;
        let loss = tape.add_scaled(l2, 0.1, l1)?;
        tape.backward(loss, params, grads)?;
        let mut squares = 0.0;
        for g in grads.each() {
            squares += be.norm(g)?.powi(2);
        }
        *steps += 1;
        let step = AdamStep {
            clip: (1.0 / (squares.sqrt() + 1e-6)).min(1.0),
            one_minus_beta1: 0.1,
            beta2: 0.999,
            one_minus_beta2: 0.001,
            step_size: *rate / (1.0 - 0.9f32.powi(*steps)),
            bias_correction2_sqrt: (1.0 - 0.999f32.powi(*steps)).sqrt(),
            eps: be.round(1e-8),
        };
        let moments = m.each_mut().into_iter().zip(v.each_mut());
        for ((p, g), (m, v)) in params.each_mut().into_iter().zip(grads.each()).zip(moments) {
            be.adam(p, g, m, v, &step)?;
        }
        Ok(tape.scalar(loss))
    }
}

/// A few training steps, each batch coming up beside the step before if `ahead`; the losses, and the parameters at the end.
fn train<B: Backend<Scalar = f32>>(be: &B, steps: usize, ahead: bool) -> (Vec<f32>, Vec<Vec<f64>>) {
    let ([batch, h, models, d], mut rng) = ([37, 150, 2, 20], Rng(17));
    let k = models * d;
    let mut scaled = |n, scale| rng.vec(n).into_iter().map(|v| (v * scale) as f32).collect::<Vec<_>>();
    let weights = Parameters {
        w_enc: scaled(h * k, 0.2),
        w_dec: scaled(h * k, 0.2),
        b_enc: scaled(h, 0.1),
        b_dec: scaled(k, 0.1),
    };
    let mut training = Training::new(be, [h, models, d], weights).unwrap();
    let batches: Vec<_> = (0..steps).map(|_| scaled(batch * k, 1.0)).collect();
    let (mut x, mut next) = <(B::Matrix, B::Matrix)>::default();
    let step = |(i, acts): (usize, &Vec<f32>)| {
        if !ahead {
            return training.step(acts).unwrap();
        }
        if i == 0 {
            be.fill(batch, k, acts, &mut x).unwrap();
        }
        let loss = std::thread::scope(|scope| {
            scope.spawn(|| batches.get(i + 1).map(|acts| be.fill(batch, k, acts, &mut next).unwrap()));
            training.step_staged(&mut x).unwrap()
        });
        std::mem::swap(&mut x, &mut next);
        loss
    };
    let losses = batches.iter().enumerate().map(step).collect();
    (losses, training.params.each().iter().map(|p| values(be, p)).collect())
}

#[test]
fn training_steps_agree_with_the_cpu_and_repeat_bit_for_bit() {
    if !standin::ready("training_steps_agree_with_the_cpu_and_repeat_bit_for_bit") {
        return;
    }
    for dtype in [Dtype::F32, Dtype::BF16] {
        let (cpu_losses, cpu_params) = train(&Cpu::<f32>::new(dtype), 5, false);
        for (name, be) in two_variants(dtype) {
            let (losses, params) = train(&be, 5, false);
            let tolerance = if dtype == Dtype::F32 { 1e-5 } else { 2e-2 };
            for (ours, cpu) in losses.iter().zip(&cpu_losses) {
                assert!((ours - cpu).abs() <= tolerance * cpu.abs(), "{name}: {losses:?}, on the CPU {cpu_losses:?}");
            }
            for (ours, cpu) in params.iter().flatten().zip(cpu_params.iter().flatten()) {
                assert!((ours - cpu).abs() <= f64::from(tolerance), "{name}: {ours}, on the CPU {cpu}");
            }
            assert_eq!(train(&be, 5, true), (losses, params), "{name}, a second time, batches coming up beside steps");
        }
    }
}

#[test]
fn split_products_err_no_more_than_float32() {
    if !standin::ready("split_products_err_no_more_than_float32") {
        return;
    }
    let shape @ [m, n, k] = [20, 33, 1000];
    let mut rng = Rng(23);
    let plain = (rng.vec(m * k), rng.vec(n * k));
    // Rows of very different sizes, some with one element far above the others, as activations have them.
    let scales: Vec<f64> = (0..m).map(|i| 2f64.powi(i as i32 * 6 - 60)).collect();
    let mut wild = (rng.vec(m * k), rng.vec(n * k));
    for (i, v) in wild.0.iter_mut().enumerate() {
        *v *= scales[i / k] * if i % 97 == 0 { 3000.0 } else { 1.0 };
    }
    for (what, (x, w)) in [("plain", plain), ("wild", wild)] {
        let be = cuda(Dtype::F32);
        let ffma = product_error(&be.clone().with_product(Product::Ffma), shape, &x, &w);
        let split = product_error(&be.with_product(Product::Split), shape, &x, &w);
        println!("{what}: largest error in units of 2^-24 · Σ |x| · |w|: ffma {ffma:.2}, split {split:.2}");
        assert!(split <= 2.0 * ffma.max(1.0), "{what}: ffma {ffma}, split {split}");
    }
}

/// The sum of `k` products, each factor being the sum of two numbers of type `half` and low · low being left out: by how many
/// `2^-24 · Σ |x| · |w|` it is off at most. The sums are exact, so that this is the error of the representation alone.
fn error_of_two(half: Dtype, k: usize, x: &[f64], w: &[f64]) -> f64 {
    let split = |row: &[f64]| -> Vec<[f64; 2]> {
        let largest = row.iter().fold(0f64, |a, v| a.max(v.abs()));
        // As `shift_of` in ptx/product.cu; bfloat16 has float32's range and needs no scale.
        let scale = if half == Dtype::F16 { 2f64.powi(14 - largest.log2().floor() as i32) } else { 1.0 };
        let parts = |v: &f64| {
            let v = f64::from(*v as f32) * scale;
            let high = f64::from(half.round(v as f32));
            [high / scale, f64::from(half.round((v - high) as f32)) / scale]
        };
        row.iter().map(parts).collect()
    };
    let mut worst = 0f64;
    for x in x.chunks(k) {
        let of_x = split(x);
        for w in w.chunks(k) {
            let (mut error, mut size) = (0.0, 0.0);
            for (((x, w), a), b) in x.iter().zip(w).zip(&of_x).zip(split(w)) {
                let exact = f64::from(*x as f32) * f64::from(*w as f32);
                error += a[0] * b[0] + a[0] * b[1] + a[1] * b[0] - exact;
                size += exact.abs();
            }
            worst = worst.max(error.abs() / (size * Dtype::F32.unit_roundoff()));
        }
    }
    worst
}

#[test]
fn two_float16_make_a_float32_and_two_bfloat16_do_not() {
    for k in [8, 100, 1000] {
        let mut rng = Rng(31);
        let (mut x, w) = (rng.vec(20 * k), rng.vec(33 * k));
        for far in [1.0, 3000.0] {
            x.iter_mut().step_by(97).for_each(|v| *v *= far);
            let [f16, bf16] = [Dtype::F16, Dtype::BF16].map(|half| error_of_two(half, k, &x, &w));
            println!(
                "{k} terms, some {far} times as large, in units of 2^-24 · Σ |x| · |w|: f16 {f16:.2}, bf16 {bf16:.2}"
            );
            // The golden cases allow 32 of the largest result in float32.
            assert!(f16 < 8.0 && bf16 > 4.0 * f16, "{k} {far}: f16 {f16}, bf16 {bf16}");
            assert!(k > 100 || far < 2.0 || bf16 > 32.0, "{k} {far}: bf16 {bf16}");
        }
    }
}

#[test]
fn copies_that_run_early_change_nothing() {
    if !standin::ready("copies_that_run_early_change_nothing") || standin::real_gpu() {
        return;
    }
    // The stand-in runs streams late. Here copies to the device run as early as their waits allow.
    let be = cuda(Dtype::F32);
    let late = train(&be, 4, true);
    standin::eager_copies(true);
    let early = train(&be, 4, true);
    standin::eager_copies(false);
    assert_eq!(late, early);
}

#[test]
fn batches_that_follow_each_other_do_not_mix() {
    if !standin::ready("batches_that_follow_each_other_do_not_mix") {
        return;
    }
    // More batches than there are places to wait in, and nobody waits in between.
    let be = cuda(Dtype::F32);
    for eager in [false, true] {
        if !standin::real_gpu() {
            standin::eager_copies(eager);
        }
        let batches: Vec<Vec<f32>> = (0..5).map(|i| (0..300).map(|j| (i * 1000 + j) as f32).collect()).collect();
        let mut matrices: Vec<<Cuda as Backend>::Matrix> = batches.iter().map(|_| Default::default()).collect();
        for (batch, m) in batches.iter().zip(&mut matrices) {
            be.fill(3, 100, batch, m).unwrap();
        }
        for (batch, m) in batches.iter().zip(&matrices) {
            let mut out = vec![0.0; 300];
            be.download(m, 0, &mut out).unwrap();
            assert_eq!(&out, batch, "copies run early: {eager}");
        }
    }
    if !standin::real_gpu() {
        standin::eager_copies(false);
    }
}

#[test]
fn a_batch_that_goes_up_in_pieces_arrives_whole() {
    if !standin::ready("a_batch_that_goes_up_in_pieces_arrives_whole") {
        return;
    }
    let [rows, cols] = [1234, 1001];
    let batch: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.7).sin()).collect();
    for dtype in DTYPES {
        let (be, mut x, mut back) = (cuda(dtype), Default::default(), vec![0.0; rows * cols]);
        be.fill(rows, cols, &batch, &mut x).unwrap();
        be.download(&x, 0, &mut back).unwrap();
        assert!(back.iter().zip(&batch).all(|(back, v)| *back == dtype.round(*v)), "{dtype}");
    }
}

#[test]
fn sizes_of_zero() {
    if !standin::ready("sizes_of_zero") {
        return;
    }
    for (name, be) in variants(Dtype::F32) {
        let (w, b) = (upload(&be, 5, 4, &[1.0; 20]), upload(&be, 1, 5, &[0.0; 5]));
        let (mut x, mut acts, mut rec) = <(_, <Cuda as Backend>::Latents, _)>::default();
        be.fill(0, 4, &[], &mut x).unwrap();
        be.encode(&x, &w, &b, &mut acts).unwrap();
        be.decode(&acts, &w, &upload(&be, 1, 4, &[0.0; 4]), &mut rec).unwrap();
        assert!(values(&be, &rec).is_empty() && dense(&be, &acts).is_empty(), "{name}");
        be.weight_grad(&acts, &x, Write::Set, &mut rec).unwrap();
        assert_eq!(values(&be, &rec), [0.0; 20], "{name}");
        assert!(be.active_counts(&acts).unwrap().is_empty(), "{name}");
    }
}

/// d_in, n_models, d_hidden, batch, active latents a row: the sizes of the public crosscoder for Gemma 2B, unless
/// `CROSSCODER_BENCHMARK=24,2,96,32,6` gives others, to try the benchmark out.
fn benchmark_sizes() -> [usize; 5] {
    let Ok(text) = std::env::var("CROSSCODER_BENCHMARK") else { return [2304, 2, 16384, 4096, 80] };
    let sizes: Vec<usize> = text.split(',').map(|n| n.parse().expect("five numbers")).collect();
    sizes.try_into().expect("five numbers")
}

/// The mean time of a run, in seconds, after a first one.
fn seconds(runs: u32, mut run: impl FnMut()) -> f64 {
    run();
    let start = std::time::Instant::now();
    (0..runs).for_each(|_| run());
    start.elapsed().as_secs_f64() / f64::from(runs)
}

/// Times on a real device: `CROSSCODER_TEST_GPU=1 cuda --ignored --nocapture benchmark` prints rows of two tables.
#[test]
#[ignore = "for a real device; takes minutes of memory traffic"]
fn benchmark() {
    if !standin::real_gpu() {
        eprintln!("NOT RUN: benchmark: CROSSCODER_TEST_GPU is not 1");
        return;
    }
    let [d, models, h, batch, active] = benchmark_sizes();
    let k = models * d;
    println!("device: {}", cuda(Dtype::F32).describe());
    println!("| dtype | latents | products | encoder's product, TFLOP/s | encode, ms | step, ms |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut rng = Rng(1);
    let mut numbers = |n: usize, scale: f64| rng.vec(n).iter().map(|v| (v * scale) as f32).collect::<Vec<f32>>();
    let (w_enc, w_dec) = (numbers(h * k, 0.02), numbers(h * k, 0.02));
    let batches = [numbers(batch * k, 1.7), numbers(batch * k, 1.7)];
    // Steps so small that the latents that are on stay the same.
    let training = |be: &Cuda| {
        let weights =
            Parameters { w_enc: w_enc.clone(), w_dec: w_dec.clone(), b_enc: vec![0.0; h], b_dec: vec![0.0; k] };
        Training { rate: 1e-9, ..Training::new(be, [h, models, d], weights).unwrap() }
    };
    // The pre-activations of the first row, descending: a bias of the negative n-th leaves some n latents on in each row.
    let ordered = |be: &Cuda, pre: &Matrix| {
        let mut row = vec![0.0; h];
        be.download(pre, 0, &mut row).unwrap();
        row.sort_unstable_by(|a: &f32, b| b.total_cmp(a));
        row
    };
    let with_bias = |be: &Cuda, bias: f32| be.upload(1, h, Values::F32(vec![bias; h])).unwrap();
    // The next batch comes up from the host beside a step, as in a run.
    let step = |training: &mut Training<Cuda>, runs: u32| {
        let (be, mut turn, mut x, mut next) = (training.be.clone(), 0, Matrix::default(), Matrix::default());
        be.fill(batch, k, &batches[0], &mut x).unwrap();
        let time = seconds(runs, || {
            turn += 1;
            std::thread::scope(|scope| {
                scope.spawn(|| be.fill(batch, k, &batches[turn % 2], &mut next).unwrap());
                training.step_staged(&mut x).unwrap();
            });
            std::mem::swap(&mut x, &mut next);
        });
        time * 1e3
    };
    let on = |be: &Cuda, acts: &Latents| be.active_counts(acts).unwrap().iter().sum::<f32>() / batch as f32;
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        for (name, be) in variants(dtype) {
            let dense = name.contains("Dense");
            let mut training = training(&be);
            let (mut x, mut pre, mut acts) = <(_, _, <Cuda as Backend>::Latents)>::default();
            be.fill(batch, k, &batches[0], &mut x).unwrap();
            let p = &mut training.params;
            be.linear(&x, &p.w_enc, &p.b_enc, &mut pre).unwrap();
            let mut row = vec![0.0; h];
            be.download(&pre, 0, &mut row).unwrap();
            // What is timed is right: some elements, in float64.
            for j in (0..h).step_by(1777) {
                let r = |v: f32| f64::from(dtype.round(v));
                let exact: f64 = (0..k).map(|l| r(batches[0][l]) * r(w_enc[j * k + l])).sum();
                let bound = 4.0 * dtype.unit_roundoff() * exact.abs() + 1e-5 * k as f64 * 0.02;
                assert!((f64::from(row[j]) - exact).abs() <= bound, "{name}: {}, exact {exact}", row[j]);
            }
            // As many latents on as real crosscoders have.
            p.b_enc = with_bias(&be, -ordered(&be, &pre)[active]);
            let mut one = [0.0];
            let product = seconds(10, || {
                be.linear(&x, &p.w_enc, &p.b_enc, &mut pre).unwrap();
                be.download(&pre, 0, &mut one).unwrap();
            });
            let encode = seconds(10, || {
                be.encode(&x, &p.w_enc, &p.b_enc, &mut acts).unwrap();
                be.active_counts(&acts).unwrap();
            });
            let mean = on(&be, &acts);
            assert!((mean - active as f32).abs() < active as f32, "{mean} latents on");
            // In float16 the first step of Adam makes every parameter nan: its eps is 0.
            let step = if dtype == Dtype::F16 { "-".into() } else { format!("{:.3}", step(&mut training, 20)) };
            println!(
                "| {dtype} | {} | {} | {:.1} | {:.3} | {step} |",
                if dense { "dense" } else { "support" },
                name.splitn(3, ' ').last().unwrap_or_default(),
                2.0 * (batch * k) as f64 * h as f64 / product / 1e12,
                encode * 1e3,
            );
        }
    }
    println!();
    println!("| latents on | their share | step, ms, by the support | step, ms, dense |");
    println!("| --- | --- | --- | --- |");
    for dtype in [Dtype::F32, Dtype::BF16] {
        let mut both = PATHS.map(|path| training(&cuda(dtype).with_path(path)));
        for factor in [2, 4, 8, 16, 32] {
            let mut mean = 0.0;
            let times = both.each_mut().map(|training| {
                let be = training.be.clone();
                let (mut x, mut pre, mut acts) = <(_, _, <Cuda as Backend>::Latents)>::default();
                be.fill(batch, k, &batches[0], &mut x).unwrap();
                be.linear(&x, &training.params.w_enc, &with_bias(&be, 0.0), &mut pre).unwrap();
                let at = (active * factor).min(h - 1);
                training.params.b_enc = with_bias(&be, -ordered(&be, &pre)[at]);
                be.encode(&x, &training.params.w_enc, &training.params.b_enc, &mut acts).unwrap();
                mean = on(&be, &acts);
                step(training, 5)
            });
            println!("| {mean:.0}, {dtype} | {:.3} | {:.3} | {:.3} |", mean / h as f32, times[0], times[1]);
        }
    }
    println!();
    println!("| m = n = k of a float32 product | by fused multiply-adds, ms | split, ms |");
    println!("| --- | --- | --- |");
    for n in [256, 512, 1024, 2048].into_iter().filter(|&n| n * n <= batch * k) {
        let times = [Product::Ffma, Product::Split].map(|product| {
            let be = cuda(Dtype::F32).with_product(product);
            let (mut x, mut out, mut one) = (Matrix::default(), Matrix::default(), [0.0]);
            be.fill(n, n, &batches[0][..n * n], &mut x).unwrap();
            let (w, b) = (&x, upload(&be, 1, n, &vec![0.0; n]));
            seconds(20, || {
                be.linear(&x, w, &b, &mut out).unwrap();
                be.download(&out, 0, &mut one).unwrap();
            })
        });
        println!("| {n} | {:.4} | {:.4} |", times[0] * 1e3, times[1] * 1e3);
    }
}
