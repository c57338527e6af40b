//! The CPU backend as a whole: losses and gradients the sparse way and the dense way, on any number of threads.

use crosscoder::autodiff::Parameters;
use crosscoder::backend::{Backend, Cpu, Scalar, Shaped};
use crosscoder::sparse::Path;
use crosscoder::{Config, CrossCoder, Dtype, Tensor, Values};
use ndarray::Array3;

const D_IN: usize = 151;
const HIDDEN: usize = 331;
/// So many that the operations, from 65,536 elements on, are given to more than one thread.
const BATCH: usize = 257;

fn numbers(n: usize, mut state: u64) -> Vec<f64> {
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn crosscoder<T: Scalar>(backend: Cpu<T>, bias: f64) -> CrossCoder<Cpu<T>> {
    let dtype = backend.dtype();
    let mut cfg = Config::default();
    cfg.set("d_in", D_IN);
    cfg.set("dict_size", HIDDEN);
    cfg.set("enc_dtype", dtype.enc_name().unwrap());
    let tensor = |shape: &[usize], values: Vec<f64>| Tensor::new(shape.to_vec(), Values::F64(values)).unwrap();
    let weights = Parameters {
        w_enc: tensor(&[2, D_IN, HIDDEN], numbers(2 * D_IN * HIDDEN, 1)),
        w_dec: tensor(&[HIDDEN, 2, D_IN], numbers(2 * D_IN * HIDDEN, 2)),
        b_enc: tensor(&[HIDDEN], vec![bias; HIDDEN]),
        b_dec: tensor(&[2, D_IN], numbers(2 * D_IN, 3)),
    };
    CrossCoder::from_tensors(backend, cfg, weights).unwrap()
}

fn x<T: Scalar>() -> Array3<T> {
    let values = numbers(BATCH * 2 * D_IN, 4).into_iter().map(T::narrow).collect();
    Array3::from_shape_vec((BATCH, 2, D_IN), values).unwrap()
}

/// Loss and gradients, one vector each.
fn gradients<T: Scalar>(backend: Cpu<T>, bias: f64) -> Vec<Vec<f64>> {
    let crosscoder = crosscoder(backend, bias);
    let (loss, grads) = crosscoder.loss_and_grads(x::<T>().view(), 0.7).unwrap();
    let download = |m| {
        let (rows, cols) = Shaped::shape(m);
        let mut out = vec![T::default(); rows * cols];
        crosscoder.backend().download(m, 0, &mut out).unwrap();
        out.into_iter().map(|v| v.wide()).collect()
    };
    std::iter::once(vec![loss.wide()]).chain(grads.each().into_iter().map(download)).collect()
}

/// Biases with which none, some in a hundred, half, all of the latents are on.
const BIASES: [f64; 4] = [-200.0, -15.0, 0.0, 200.0];

#[test]
fn sparse_equals_dense_in_float64() {
    for bias in BIASES {
        let dense = gradients(Cpu::<f64>::new(Dtype::F32).with_path(Path::Dense), bias);
        for path in [Path::Sparse, Path::Auto] {
            let sparse = gradients(Cpu::<f64>::new(Dtype::F32).with_path(path), bias);
            for (i, (dense, sparse)) in dense.iter().zip(&sparse).enumerate() {
                let size = dense.iter().fold(0f64, |size, v| size.max(v.abs()));
                for (d, s) in dense.iter().zip(sparse) {
                    assert!((d - s).abs() <= 1e-12 * size, "bias {bias}, {path:?}, {i}: {d} and {s} of {size}");
                }
            }
        }
    }
}

#[test]
fn gradients_do_not_depend_on_the_threads() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        for bias in BIASES {
            let one = gradients(Cpu::<f32>::new(dtype).with_threads(1), bias);
            for threads in [2, 3, 8] {
                assert_eq!(
                    gradients(Cpu::<f32>::new(dtype).with_threads(threads), bias),
                    one,
                    "{dtype} {bias} {threads}"
                );
            }
        }
    }
}

#[test]
fn a_gradient_kept_by_its_factors_is_read_added_to_and_summed_like_any_other() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let be = Cpu::<f32>::new(dtype).with_path(Path::Sparse);
        let (rows, h, k) = (9, 23, 31);
        let narrow = |v: Vec<f64>| v.into_iter().map(|v| v as f32).collect::<Vec<f32>>();
        let (mut dense, mut latents, mut y) = Default::default();
        let sparse = numbers(rows * h, 5).into_iter().map(|v| if v > 0.7 { v } else { 0.0 }).collect();
        be.fill(rows, h, &narrow(sparse), &mut dense).unwrap();
        be.to_latents(&dense, &mut latents).unwrap();
        be.fill(rows, k, &narrow(numbers(rows * k, 6)), &mut y).unwrap();
        let read = |m: &<Cpu as Backend>::Matrix, at: usize, n: usize| {
            let mut out = vec![0.0; n];
            be.download(m, at, &mut out).unwrap();
            out
        };
        // Set, it is kept by its factors; added to zeros, it is stored.
        let (mut kept, mut stored) = <(<Cpu as Backend>::Matrix, _)>::default();
        be.fill(h, k, &vec![0.0; h * k], &mut stored).unwrap();
        be.weight_grad(&latents, &y, crosscoder::backend::Write::Set, &mut kept).unwrap();
        be.weight_grad(&latents, &y, crosscoder::backend::Write::Add, &mut stored).unwrap();
        let all = read(&stored, 0, h * k);
        assert_eq!(read(&kept, 0, h * k), all, "{dtype}");
        assert_eq!(read(&kept, 5 * k + 7, 3 * k + 1), all[5 * k + 7..8 * k + 8], "{dtype}");
        assert_eq!(be.norm(&kept).unwrap(), be.norm(&stored).unwrap(), "{dtype}");
        be.weight_grad(&latents, &y, crosscoder::backend::Write::Add, &mut kept).unwrap();
        be.weight_grad(&latents, &y, crosscoder::backend::Write::Add, &mut stored).unwrap();
        assert_eq!(read(&kept, 0, h * k), read(&stored, 0, h * k), "{dtype}");
        assert_eq!(be.norm(&kept).unwrap(), be.norm(&stored).unwrap(), "{dtype}, after both changed");
    }
}
