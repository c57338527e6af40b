//! Every primitive of a backend against loops that a reader verifies at a glance, at awkward sizes.

#![allow(dead_code, unreachable_pub)] // Each test program uses a part of this.

use crosscoder::Dtype;
use crosscoder::backend::{AdamStep, Backend, Precision, Scalar, Shaped, Write};
use crosscoder::sparse::Path;
use crosscoder::tensor::Values;

/// A linear congruential generator: numbers in [-1, 1), half of them negative.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    }

    pub fn vec(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.next()).collect()
    }

    /// Values of which about one in eight is positive, the others 0.
    pub fn sparse(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| if self.next() > 0.75 { self.next().abs() } else { 0.0 }).collect()
    }
}

/// batch, d_hidden, n_models, d_in.
pub const SHAPES: [[usize; 4]; 8] = [
    [1, 1, 1, 1],
    [1, 7, 2, 3],
    [2, 16, 2, 8],
    [5, 13, 2, 7],
    [3, 257, 2, 31],
    [33, 300, 3, 5],
    [16, 511, 1, 64],
    [64, 521, 2, 37],
];

pub fn upload<B: Backend>(be: &B, rows: usize, cols: usize, v: &[f64]) -> B::Matrix {
    be.upload(rows, cols, Values::F64(v.to_vec())).unwrap()
}

pub fn latents<B: Backend>(be: &B, rows: usize, cols: usize, v: &[f64]) -> B::Latents {
    let (mut dense, mut out) = <(B::Matrix, B::Latents)>::default();
    be.fill(rows, cols, &v.iter().map(|&v| B::Scalar::narrow(v)).collect::<Vec<_>>(), &mut dense).unwrap();
    be.to_latents(&dense, &mut out).unwrap();
    out
}

pub fn values<B: Backend>(be: &B, m: &B::Matrix) -> Vec<f64> {
    let (rows, cols) = m.shape();
    let mut out = vec![B::Scalar::default(); rows * cols];
    be.download(m, 0, &mut out).unwrap();
    out.iter().map(|v| v.wide()).collect()
}

pub fn dense<B: Backend>(be: &B, l: &B::Latents) -> Vec<f64> {
    let mut out = B::Matrix::default();
    be.to_dense(l, &mut out).unwrap();
    values(be, &out)
}

/// Ours is within `ulps` units in the last place of the largest value, of the dtype that `be` rounds to.
pub fn assert_close<B: Backend>(be: &B, what: &str, ours: &[f64], naive: &[f64], terms: usize) {
    assert_eq!(ours.len(), naive.len(), "{what}");
    let judge = B::Scalar::narrow(1.0 + f64::EPSILON).wide() != 1.0;
    // A sum of n terms errs by at most n·u times the sum of magnitudes, which is below n here; then one rounding.
    let u = if judge { Dtype::F64.unit_roundoff() } else { Dtype::F32.unit_roundoff() };
    let rounding = if judge { 0.0 } else { 3.0 * be.dtype().unit_roundoff() };
    let size = naive.iter().fold(1.0f64, |a, v| a.max(v.abs()));
    let bound = (terms * terms) as f64 * u + rounding * size + 4.0 * u * size;
    for (i, (o, n)) in ours.iter().zip(naive).enumerate() {
        assert!((o - n).abs() <= bound, "{what}: element {i} of {} is {o}, naive {n}, bound {bound:e}", ours.len());
    }
}

/// What the backend sees of values: rounded to its dtype.
pub fn cast<B: Backend>(be: &B, v: Vec<f64>) -> Vec<f64> {
    v.into_iter().map(|v| f64::from(be.dtype().round(v as f32))).collect()
}

pub fn check<B: Backend>(be: &B, [batch, h, models, d]: [usize; 4]) {
    let (k, mut rng) = (models * d, Rng(7 + (batch * h * d) as u64));
    let x = cast(be, rng.vec(batch * k));
    let w = cast(be, rng.vec(h * k));
    let b = cast(be, rng.vec(h));
    let c = cast(be, rng.vec(k));
    let a = cast(be, rng.sparse(batch * h));
    let t = cast(be, rng.vec(h));
    let (xm, wm, bm, cm) = (upload(be, batch, k, &x), upload(be, h, k, &w), upload(be, 1, h, &b), upload(be, 1, k, &c));
    let xm = {
        let mut m = B::Matrix::default();
        be.fill(batch, k, &x.iter().map(|&v| B::Scalar::narrow(v)).collect::<Vec<_>>(), &mut m).unwrap();
        drop(xm);
        m
    };
    let (al, tm) = (latents(be, batch, h, &a), {
        let mut m = B::Matrix::default();
        be.fill(1, h, &t.iter().map(|&v| B::Scalar::narrow(v)).collect::<Vec<_>>(), &mut m).unwrap();
        m
    });
    assert_eq!(dense(be, &al), a, "to_latents and to_dense");

    let support = be.support(&al).unwrap();
    let listed: Vec<(u32, f64)> =
        support.columns.iter().copied().zip(support.values.iter().map(|v| v.wide())).collect();
    let naive: Vec<(u32, f64)> =
        a.iter().enumerate().filter(|(_, v)| **v != 0.0).map(|(i, &v)| ((i % h) as u32, v)).collect();
    let starts: Vec<usize> = (0..=batch).map(|i| a[..i * h].iter().filter(|v| **v != 0.0).count()).collect();
    assert_eq!((support.starts, listed), (starts, naive), "support");

    // Factors that are powers of two make exact products: both cut the same.
    let factors: Vec<f64> = (0..h).map(|i| [0.5, 1.0, 2.0][i % 3]).collect();
    let mut cut = latents(be, batch, h, &a);
    be.keep_above(
        &mut cut,
        &factors.iter().map(|&v| B::Scalar::narrow(v)).collect::<Vec<_>>(),
        B::Scalar::narrow(0.25),
    )
    .unwrap();
    let kept = |(i, &v): (usize, &f64)| if v * factors[i % h] > 0.25 { v } else { 0.0 };
    assert_eq!(dense(be, &cut), a.iter().enumerate().map(kept).collect::<Vec<_>>(), "keep_above");
    let (mut out, mut lat) = <(B::Matrix, B::Latents)>::default();

    let mut pre = vec![0.0; batch * h];
    for i in 0..batch {
        for j in 0..h {
            pre[i * h + j] = (0..k).map(|l| x[i * k + l] * w[j * k + l]).sum::<f64>() + b[j];
        }
    }
    be.linear(&xm, &wm, &bm, &mut out).unwrap();
    assert_close(be, "linear", &values(be, &out), &pre, k + 1);
    let linear = values(be, &out);
    be.encode(&xm, &wm, &bm, &mut lat).unwrap();
    let acts: Vec<f64> = linear.iter().map(|v| v.max(0.0)).collect();
    assert_eq!(dense(be, &lat), acts, "encode is relu of linear, to the bit");
    let counts: Vec<f64> = be.active_counts(&lat).unwrap().iter().map(|v| v.wide()).collect();
    let naive: Vec<f64> = acts.chunks(h).map(|row| row.iter().filter(|&&v| v > 0.0).count() as f64).collect();
    assert_eq!(counts, naive, "active_counts");

    let mut rec = vec![0.0; batch * k];
    for i in 0..batch {
        for l in 0..k {
            rec[i * k + l] = (0..h).map(|j| a[i * h + j] * w[j * k + l]).sum::<f64>() + c[l];
        }
    }
    be.decode(&al, &wm, &cm, &mut out).unwrap();
    assert_close(be, "decode", &values(be, &out), &rec, h + 1);

    let mut d_acts = vec![0.0; batch * h];
    for i in 0..batch {
        for j in 0..h {
            if a[i * h + j] > 0.0 {
                d_acts[i * h + j] = (0..k).map(|l| x[i * k + l] * w[j * k + l]).sum::<f64>();
            }
        }
    }
    be.latents_grad(&xm, &wm, &al, Write::Set, &mut lat).unwrap();
    assert_close(be, "latents_grad", &dense(be, &lat), &d_acts, k);
    be.latents_grad(&xm, &wm, &al, Write::Add, &mut lat).unwrap();
    let twice: Vec<f64> = d_acts.iter().map(|v| 2.0 * v).collect();
    assert_close(be, "latents_grad, added", &dense(be, &lat), &twice, 2 * k);

    let mut d_w = vec![0.0; h * k];
    for j in 0..h {
        for l in 0..k {
            d_w[j * k + l] = (0..batch).map(|i| a[i * h + j] * x[i * k + l]).sum::<f64>();
        }
    }
    be.weight_grad(&al, &xm, Write::Set, &mut out).unwrap();
    assert_close(be, "weight_grad", &values(be, &out), &d_w, batch);
    be.weight_grad(&al, &xm, Write::Add, &mut out).unwrap();
    assert_close(
        be,
        "weight_grad, added",
        &values(be, &out),
        &d_w.iter().map(|v| 2.0 * v).collect::<Vec<_>>(),
        2 * batch,
    );

    let sums: Vec<f64> = (0..h).map(|j| (0..batch).map(|i| a[i * h + j]).sum()).collect();
    be.latents_column_sums(&al, &mut out).unwrap();
    assert_close(be, "latents_column_sums", &values(be, &out), &sums, batch);
    let sums: Vec<f64> = (0..k).map(|l| (0..batch).map(|i| x[i * k + l]).sum()).collect();
    be.column_sums(&xm, &mut out).unwrap();
    assert_close(be, "column_sums", &values(be, &out), &sums, batch);
    be.column_means(&xm, &mut out).unwrap();
    let means: Vec<f64> = sums.iter().map(|s| s / batch as f64).collect();
    assert_close(be, "column_means", &values(be, &out), &means, batch);

    let l1: Vec<f64> = (0..batch).map(|i| (0..h).map(|j| a[i * h + j] * t[j]).sum()).collect();
    let ours: Vec<f64> = be.weighted_sums(&al, &tm).unwrap().iter().map(|v| v.wide()).collect();
    let roundings = if be.dtype() == Dtype::F32 { 1 } else { 1 + h }; // each product rounds to the dtype
    let half_terms = (roundings as f64 * be.dtype().unit_roundoff() / Dtype::F32.unit_roundoff()).sqrt() as usize;
    assert_close(be, "weighted_sums", &ours, &l1, h + half_terms);
    let g = 0.375;
    let mut d_t = B::Matrix::default();
    be.weighted_sums_grad(&al, &tm, B::Scalar::narrow(g), &mut lat, &mut d_t).unwrap();
    let naive: Vec<f64> = (0..batch * h).map(|i| if a[i] > 0.0 { g * t[i % h] } else { 0.0 }).collect();
    assert_close(be, "weighted_sums_grad, acts", &dense(be, &lat), &naive, 1);
    let naive: Vec<f64> = (0..h).map(|j| (0..batch).map(|i| g * a[i * h + j]).sum()).collect();
    let half_terms = (batch as f64 * be.dtype().unit_roundoff() / Dtype::F32.unit_roundoff()).sqrt() as usize;
    assert_close(be, "weighted_sums_grad, t", &values(be, &d_t), &naive, batch + half_terms);

    let half = d..k; // the columns of all models but the first
    let naive: Vec<f64> = (0..batch).map(|i| half.clone().map(|l| (x[i * k + l] - c[l]).powi(2)).sum()).collect();
    let mut row = B::Matrix::default();
    be.fill(1, k, &c.iter().map(|&v| B::Scalar::narrow(v)).collect::<Vec<_>>(), &mut row).unwrap();
    for precision in [Precision::F32, Precision::Dtype] {
        let ours = be.squared_distances(&xm, &row, half.clone(), precision).unwrap();
        let ours: Vec<f64> = ours.iter().map(|v| v.wide()).collect();
        let rounded = if precision == Precision::F32 { 0 } else { k };
        let half_terms =
            (4.0 * rounded as f64 * be.dtype().unit_roundoff() / Dtype::F32.unit_roundoff()).sqrt() as usize;
        assert_close(be, "squared_distances", &ours, &naive, 2 * k + half_terms);
    }
    let mut other = B::Matrix::default();
    let y = cast(be, rng.vec(batch * k));
    be.fill(batch, k, &y.iter().map(|&v| B::Scalar::narrow(v)).collect::<Vec<_>>(), &mut other).unwrap();
    be.squared_distances_grad(&xm, &other, B::Scalar::narrow(0.25), &mut out).unwrap();
    let naive: Vec<f64> = x.iter().zip(&y).map(|(x, y)| 0.5 * (x - y)).collect();
    assert_close(be, "squared_distances_grad", &values(be, &out), &naive, 1);

    let norms: Vec<f64> = w.chunks(d).map(|part| part.iter().map(|v| v * v).sum::<f64>().sqrt()).collect();
    let mut norm = B::Matrix::default();
    be.group_norms(&wm, models, &mut norm).unwrap();
    assert_eq!(norm.shape(), (h, models));
    assert_close(be, "group_norms", &values(be, &norm), &norms, d);
    be.row_sums(&norm, &mut out).unwrap();
    let totals: Vec<f64> = norms.chunks(models).map(|n| n.iter().sum()).collect();
    assert_close(be, "row_sums", &values(be, &out), &totals, d + models + 64);
    be.group_norms_grad(&wm, &norm, &tm, Write::Set, &mut out).unwrap();
    let naive: Vec<f64> = (0..h * k)
        .map(|i| {
            let n = norms[i / d];
            if n == 0.0 { 0.0 } else { w[i] / n * t[i / k] }
        })
        .collect();
    assert_close(be, "group_norms_grad", &values(be, &out), &naive, 2);
    let total: f64 = w.iter().map(|v| v * v).sum::<f64>().sqrt();
    assert_close(be, "norm", &[be.norm(&wm).unwrap().wide()], &[total], h + k);
}

pub fn check_adam<B: Backend>(be: &B) {
    for weight in [0.25, 0.75] {
        check_adam_with(be, weight);
    }
    // What is left of the moment is what the gradient is, be the moment ever so large.
    let n = B::Scalar::narrow;
    let step = AdamStep { one_minus_beta1: n(1.0), ..adam_step(be) };
    let (mut m, mut v, mut p) =
        (upload(be, 1, 2, &[2e4, -2e4]), upload(be, 1, 2, &[1.0; 2]), upload(be, 1, 2, &[0.0; 2]));
    let mut g = B::Matrix::default();
    be.fill(1, 2, &[n(0.001953125), n(0.0)], &mut g).unwrap();
    be.adam(&mut p, &g, &mut m, &mut v, &step).unwrap();
    assert_eq!(values(be, &m), [0.0009765625, 0.0]);
}

fn adam_step<B: Backend>(be: &B) -> AdamStep<B::Scalar> {
    let n = B::Scalar::narrow;
    AdamStep {
        clip: n(0.5),
        one_minus_beta1: n(0.25),
        beta2: n(0.75),
        one_minus_beta2: n(0.25),
        step_size: n(0.125),
        bias_correction2_sqrt: n(0.5),
        eps: be.round(n(1e-8)),
    }
}

fn check_adam_with<B: Backend>(be: &B, weight: f64) {
    let (rows, cols, mut rng) = (37, 129, Rng(3));
    let n = rows * cols;
    let (p, g) = (cast(be, rng.vec(n)), cast(be, rng.vec(n)));
    let (m, v) = (cast(be, rng.vec(n)), cast(be, rng.vec(n)).into_iter().map(f64::abs).collect::<Vec<_>>());
    let (mut pm, mut mm, mut vm) = (upload(be, rows, cols, &p), upload(be, rows, cols, &m), upload(be, rows, cols, &v));
    let mut gm = B::Matrix::default();
    be.fill(rows, cols, &g.iter().map(|&v| B::Scalar::narrow(v)).collect::<Vec<_>>(), &mut gm).unwrap();
    let step = AdamStep { one_minus_beta1: B::Scalar::narrow(weight), ..adam_step(be) };
    be.adam(&mut pm, &gm, &mut mm, &mut vm, &step).unwrap();
    let (mut np, mut nm, mut nv) = (vec![], vec![], vec![]);
    for i in 0..p.len() {
        let g = 0.5 * g[i];
        nm.push(m[i] + weight * (g - m[i]));
        nv.push(0.75 * v[i] + 0.25 * g * g);
        np.push(p[i] - 0.125 * nm[i] / (nv[i].sqrt() / 0.5 + 1e-8));
    }
    assert_close(be, "adam, m", &values(be, &mm), &nm, 2);
    assert_close(be, "adam, v", &values(be, &vm), &nv, 2);
    assert_close(be, "adam, p", &values(be, &pm), &np, 4);
}

/// 0 · nan and 0 · inf are nan: a decoder row that is not finite spoils every row, active or not.
pub fn check_nan<B: Backend<Scalar = f32>>(be: &B, path: Path) {
    let (h, k) = (40, 3);
    let mut w = vec![1.0; h * k];
    w[5 * k + 1] = f64::INFINITY;
    let (wm, cm) = (upload(be, h, k, &w), upload(be, 1, k, &[0.0; 3]));
    let mut a = vec![0.0; h];
    a[7] = 2.0;
    let acts = latents(be, 1, h, &a);
    let mut out = B::Matrix::default();
    be.decode(&acts, &wm, &cm, &mut out).unwrap();
    let out = values(be, &out);
    assert!(out[1].is_nan() && out[0] == 2.0 && out[2] == 2.0, "{path:?} {out:?}");
    // A gradient that is not finite reaches every row of the weight gradient.
    let mut y = B::Matrix::default();
    be.fill(1, k, &[1.0, f32::NAN, 1.0], &mut y).unwrap();
    let mut grad = B::Matrix::default();
    be.weight_grad(&acts, &y, Write::Set, &mut grad).unwrap();
    let grad = values(be, &grad);
    assert!((0..h).all(|j| grad[j * k + 1].is_nan()) && grad[0] == 0.0 && grad[7 * k] == 2.0, "{path:?}");
    // An infinite weight of a latent that is off makes the weighted sum nan.
    let mut t = B::Matrix::default();
    let mut weights = vec![1.0f32; h];
    weights[3] = f32::INFINITY;
    be.fill(1, h, &weights, &mut t).unwrap();
    assert!(be.weighted_sums(&acts, &t).unwrap()[0].is_nan(), "{path:?}");
}

/// By how many `2^-24 · Σ |x| · |w|` the largest error of a product goes beyond the true one.
pub fn product_error<B: Backend>(be: &B, [m, n, k]: [usize; 3], x: &[f64], w: &[f64]) -> f64 {
    let (xm, wm) = (upload(be, m, k, x), upload(be, n, k, w));
    let (bias, mut out) = (upload(be, 1, n, &vec![0.0; n]), Default::default());
    be.linear(&xm, &wm, &bias, &mut out).unwrap();
    let ours = values(be, &out);
    let mut worst = 0f64;
    for i in 0..m {
        for j in 0..n {
            let terms = || (0..k).map(|l| f64::from(x[i * k + l] as f32) * f64::from(w[j * k + l] as f32));
            let size: f64 = terms().map(f64::abs).sum();
            worst = worst.max((ours[i * n + j] - terms().sum::<f64>()).abs() / (size * Dtype::F32.unit_roundoff()));
        }
    }
    worst
}
