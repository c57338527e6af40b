//! Every primitive of the CPU backend against naive loops, dense and sparse.

mod primitives;

use crosscoder::Dtype;
use crosscoder::backend::{Backend, Cpu, Scalar, Write};
use crosscoder::sparse::Path;
use primitives::*;

#[test]
fn primitives_agree_with_naive_loops() {
    for path in [Path::Auto, Path::Dense, Path::Sparse] {
        for shape in SHAPES {
            check(&Cpu::<f64>::new(Dtype::F32).with_path(path), shape);
            for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
                check(&Cpu::<f32>::new(dtype).with_path(path), shape);
            }
        }
    }
}

#[test]
fn adam_agrees_with_naive_loops() {
    check_adam(&Cpu::<f64>::new(Dtype::F32));
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        check_adam(&Cpu::<f32>::new(dtype));
    }
}

#[test]
fn zeros_skipped_or_not_a_nan_spreads_as_in_the_original() {
    for path in [Path::Auto, Path::Dense, Path::Sparse] {
        check_nan(&Cpu::<f32>::new(Dtype::F32).with_path(path), path);
    }
}

#[test]
fn results_do_not_depend_on_the_threads() {
    let mut rng = Rng(11);
    // So many that every operation, from 65,536 elements on, is given to more than one.
    let [batch, h, k] = [260, 700, 300];
    let (x, w, b) = (rng.vec(batch * k), rng.vec(h * k), rng.vec(h));
    let mut seen: Option<[Vec<f64>; 4]> = None;
    for threads in [1, 2, 3, 7] {
        let be = Cpu::<f32>::new(Dtype::F32).with_threads(threads);
        let (wm, bm, cm) = (upload(&be, h, k, &w), upload(&be, 1, h, &b), upload(&be, 1, k, &vec![0.0; k]));
        let (mut xm, mut acts, mut rec, mut d, mut grad) = Default::default();
        be.fill(batch, k, &x.iter().map(|&v| v as f32).collect::<Vec<_>>(), &mut xm).unwrap();
        be.encode(&xm, &wm, &bm, &mut acts).unwrap();
        be.decode(&acts, &wm, &cm, &mut rec).unwrap();
        be.latents_grad(&rec, &wm, &acts, Write::Set, &mut d).unwrap();
        be.weight_grad(&d, &xm, Write::Set, &mut grad).unwrap();
        let norm = vec![be.norm(&grad).unwrap().wide()];
        let all = [values(&be, &rec), dense(&be, &d), values(&be, &grad), norm];
        assert_eq!(seen.get_or_insert(all.clone()), &all, "{threads} threads");
    }
}
