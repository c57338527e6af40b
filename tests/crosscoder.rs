//! The class as an embedding user meets it: shapes, errors, slices, threads.

use crosscoder::autodiff::Parameters;
use crosscoder::backend::Cpu;
use crosscoder::{Config, CrossCoder, Dtype, ErrorKind, Tensor, Values};
use ndarray::{Array2, Array3, s};

fn cfg(d_in: usize, dict_size: usize) -> Config {
    let mut cfg = Config::default();
    cfg.set("d_in", d_in);
    cfg.set("dict_size", dict_size);
    cfg
}

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn tensor(shape: &[usize], seed: u32) -> Tensor {
    Tensor::new(shape.to_vec(), Values::F32(numbers(shape.iter().product(), seed))).unwrap()
}

fn weights(n_models: usize, d_in: usize, d_hidden: usize) -> Parameters<Tensor> {
    Parameters {
        w_enc: tensor(&[n_models, d_in, d_hidden], 1),
        w_dec: tensor(&[d_hidden, n_models, d_in], 2),
        b_enc: tensor(&[d_hidden], 3),
        b_dec: tensor(&[n_models, d_in], 4),
    }
}

fn crosscoder(n_models: usize, d_in: usize, d_hidden: usize) -> CrossCoder {
    CrossCoder::from_tensors(Cpu::new(Dtype::F32), cfg(d_in, d_hidden), weights(n_models, d_in, d_hidden)).unwrap()
}

fn x(batch: usize, n_models: usize, d_in: usize) -> Array3<f32> {
    Array3::from_shape_vec((batch, n_models, d_in), numbers(batch * n_models * d_in, 5)).unwrap()
}

#[test]
fn the_formulas_element_by_element() {
    // W_enc is indexed as the original's einsum has it: the row-major tensor [n_models, d_in, d_hidden].
    for (n_models, d_in, d_hidden, batch) in [(2, 5, 11, 4), (1, 3, 7, 1), (3, 4, 6, 2)] {
        let (cc, w, x) =
            (crosscoder(n_models, d_in, d_hidden), weights(n_models, d_in, d_hidden), x(batch, n_models, d_in));
        let [w_enc, w_dec, b_enc, b_dec] = w.each().map(|t| t.to_f64_vec());
        let acts = cc.encode(x.view(), true).unwrap();
        let rec = cc.forward(x.view()).unwrap();
        for b in 0..batch {
            let mut by_hand = vec![0.0; d_hidden];
            for h in 0..d_hidden {
                let mut sum = b_enc[h];
                for m in 0..n_models {
                    for d in 0..d_in {
                        sum += f64::from(x[[b, m, d]]) * w_enc[(m * d_in + d) * d_hidden + h];
                    }
                }
                by_hand[h] = sum.max(0.0);
                assert!((by_hand[h] - f64::from(acts[[b, h]])).abs() < 1e-5);
            }
            for m in 0..n_models {
                for d in 0..d_in {
                    let sum: f64 = (0..d_hidden).map(|h| by_hand[h] * w_dec[(h * n_models + m) * d_in + d]).sum();
                    assert!((sum + b_dec[m * d_in + d] - f64::from(rec[[b, m, d]])).abs() < 1e-5);
                }
            }
        }
        assert_eq!(cc.decode(acts.view()).unwrap(), rec);
    }
}

#[test]
fn slices_and_views_give_the_same() {
    let (cc, x) = (crosscoder(2, 6, 20), x(8, 2, 6));
    let acts = cc.encode(x.view(), true).unwrap();
    let mut out = vec![f32::NAN; 8 * 20];
    cc.encode_into(x.as_slice().unwrap(), true, &mut out).unwrap();
    assert_eq!(acts.as_slice().unwrap(), out);
    let mut rec = vec![f32::NAN; 8 * 12];
    cc.decode_into(&out, &mut rec).unwrap();
    assert_eq!(cc.forward(x.view()).unwrap().as_slice().unwrap(), rec);
    cc.forward_into(x.as_slice().unwrap(), &mut out[..8 * 12]).unwrap();
    assert_eq!(rec, out[..8 * 12]);
    // A view that is not contiguous: every other row.
    let half = cc.encode(x.slice(s![..;2, .., ..]), true).unwrap();
    assert_eq!(half, acts.slice(s![..;2, ..]));
    // A batch row alone gives what it gives in the batch.
    let one = cc.encode(x.slice(s![3..4, .., ..]), true).unwrap();
    assert_eq!(one.row(0), acts.row(3));
}

#[test]
fn pre_activations_are_what_relu_cuts() {
    let (cc, x) = (crosscoder(2, 6, 20), x(8, 2, 6));
    let pre = cc.encode(x.view(), false).unwrap();
    assert!(pre.iter().any(|&v| v < 0.0));
    assert_eq!(pre.mapv(|v| v.max(0.0)), cc.encode(x.view(), true).unwrap());
}

#[test]
fn a_wrong_shape_is_an_error_that_names_both() {
    let cc = crosscoder(2, 6, 20);
    let message = |e: crosscoder::Error| {
        assert_eq!(e.kind(), ErrorKind::Shape);
        e.to_string()
    };
    assert_eq!(
        message(cc.encode(x(3, 2, 5).view(), true).unwrap_err()),
        "x has shape [3, 2, 5]; it needs [batch, 2, 6]"
    );
    assert_eq!(message(cc.get_losses(x(3, 1, 6).view()).unwrap_err()), "x has shape [3, 1, 6]; it needs [batch, 2, 6]");
    let acts = Array2::zeros((3, 21));
    assert_eq!(message(cc.decode(acts.view()).unwrap_err()), "acts has shape [3, 21]; it needs [batch, 20]");
    assert!(message(cc.encode_into(&[0.0; 13], true, &mut []).unwrap_err()).contains("multiple of 12"));
    assert!(message(cc.encode_into(&[0.0; 12], true, &mut [0.0; 19]).unwrap_err()).contains("need 20"));
    assert!(message(cc.get_losses(x(0, 2, 6).view()).unwrap_err()).contains("no rows"));
    // An empty batch has no mean, but an encoding.
    assert_eq!(cc.encode(x(0, 2, 6).view(), true).unwrap().dim(), (0, 20));
    assert_eq!(cc.forward(x(0, 2, 6).view()).unwrap().dim(), (0, 2, 6));
}

#[test]
fn weights_that_contradict_the_cfg_are_refused() {
    let build = |cfg, w| CrossCoder::from_tensors(Cpu::<f32>::new(Dtype::F32), cfg, w).unwrap_err().to_string();
    let error = build(cfg(6, 21), weights(2, 6, 20));
    assert_eq!(error, "W_enc has shape [2, 6, 20]; the cfg (d_in 6, dict_size 21) needs [2, 6, 21]");
    let mut w = weights(2, 6, 20);
    w.b_dec = tensor(&[3, 6], 1);
    assert_eq!(build(cfg(6, 20), w), "b_dec has shape [3, 6]; the cfg (d_in 6, dict_size 20) needs [2, 6]");
    let mut w = weights(2, 6, 20);
    w.b_enc = Tensor::new(vec![20], Values::I32(vec![0; 20])).unwrap();
    assert!(build(cfg(6, 20), w).contains("int32"));
    let mut w = weights(2, 6, 20);
    w.w_enc = tensor(&[6, 40], 1);
    assert!(build(cfg(6, 20), w).contains("[n_models, d_in, dict_size]"));
}

#[test]
fn losses_of_one_row_and_of_equal_rows_are_those_of_the_original() {
    // The variance of one row around its own mean is 0: 1 - l2 / 0 is -inf, as in PyTorch.
    let cc = crosscoder(2, 6, 20);
    let one = cc.get_losses(x(1, 2, 6).view()).unwrap();
    assert_eq!(one.explained_variance, [f64::NEG_INFINITY]);
    assert_eq!(one.explained_variance_per_model, [[f64::NEG_INFINITY], [f64::NEG_INFINITY]]);
    assert!(one.l2_loss.is_finite());
    // A perfect reconstruction of a constant batch: 1 - 0 / 0 is nan.
    let zero = |shape: &[usize]| Tensor::new(shape.to_vec(), Values::F32(vec![0.0; shape.iter().product()])).unwrap();
    let mut w = weights(2, 6, 20);
    (w.w_dec, w.b_dec) = (zero(&[20, 2, 6]), zero(&[2, 6]));
    let cc = CrossCoder::<Cpu>::from_tensors(Cpu::new(Dtype::F32), cfg(6, 20), w).unwrap();
    let losses = cc.get_losses(Array3::zeros((4, 2, 6)).view()).unwrap();
    assert!(losses.explained_variance.iter().all(|v| v.is_nan()));
    assert_eq!((losses.l2_loss, losses.l1_loss), (0.0, 0.0));
}

#[test]
fn nan_in_one_row_stays_in_that_row() {
    let (cc, mut x) = (crosscoder(2, 6, 20), x(4, 2, 6));
    let clean = cc.forward(x.view()).unwrap();
    x[[2, 1, 3]] = f32::NAN;
    let acts = cc.encode(x.view(), true).unwrap();
    let rec = cc.forward(x.view()).unwrap();
    for b in 0..4 {
        assert_eq!(acts.row(b).iter().all(|v| v.is_nan()), b == 2);
        if b != 2 {
            assert_eq!(rec.slice(s![b, .., ..]), clean.slice(s![b, .., ..]));
        }
    }
    let losses = cc.get_losses(x.view()).unwrap();
    assert!(losses.l2_loss.is_nan() && losses.l1_loss.is_nan());
    assert!(losses.l0_loss < 20.0, "nan is not above zero");
}

#[test]
fn names_follow_the_number_of_models() {
    let names = |n| -> Vec<String> {
        let losses = crosscoder(n, 3, 5).get_losses(x(4, n, 3).view()).unwrap();
        losses.named().into_iter().skip(4).map(|(name, _)| name).collect()
    };
    assert_eq!(names(2), ["explained_variance_A", "explained_variance_B"]);
    assert_eq!(names(3), ["explained_variance_0", "explained_variance_1", "explained_variance_2"]);
}

#[test]
fn one_value_serves_many_threads() {
    let (cc, x) = (crosscoder(2, 6, 20), x(8, 2, 6));
    let alone = cc.forward(x.view()).unwrap();
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| cc.forward(x.view()).unwrap())).collect();
        for run in runs {
            assert_eq!(run.join().unwrap(), alone);
        }
    });
}

/// One latent or one input wide, a product has one term, exact in float32: what is left is where values round.
#[test]
fn half_types_round_after_the_product_and_after_the_bias() {
    for dtype in [Dtype::BF16, Dtype::F16] {
        let r = |v: f32| dtype.round(v);
        let values = |n: usize, seed: u32| numbers(n, seed).into_iter().map(r).collect::<Vec<f32>>();
        let of = |shape: &[usize], v: &[f32]| Tensor::new(shape.to_vec(), Values::F32(v.to_vec())).unwrap();
        let (d_hidden, batch) = (50, 20);
        let (w_enc, w_dec, b_enc, b_dec) =
            (values(d_hidden, 1), values(d_hidden, 2), values(d_hidden, 3), values(1, 4));
        let mut cfg = cfg(1, d_hidden);
        cfg.set("enc_dtype", dtype.enc_name().unwrap());
        let weights = Parameters {
            w_enc: of(&[1, 1, d_hidden], &w_enc),
            w_dec: of(&[d_hidden, 1, 1], &w_dec),
            b_enc: of(&[d_hidden], &b_enc),
            b_dec: of(&[1, 1], &b_dec),
        };
        let cc = CrossCoder::<Cpu>::from_tensors(Cpu::new(dtype), cfg, weights).unwrap();
        let x = Array3::from_shape_vec((batch, 1, 1), values(batch, 5)).unwrap();
        let pre = cc.encode(x.view(), false).unwrap();
        let mut rounded_twice = 0;
        for b in 0..batch {
            for h in 0..d_hidden {
                let product = x[[b, 0, 0]] * w_enc[h];
                assert_eq!(pre[[b, h]], r(r(product) + b_enc[h]), "{dtype} encode [{b}, {h}]");
                rounded_twice += usize::from(r(r(product) + b_enc[h]) != r(product + b_enc[h]));
            }
        }
        assert!(rounded_twice > 0, "no value tells one rounding from two");
        for h in 0..d_hidden {
            let mut acts = Array2::<f32>::zeros((1, d_hidden));
            acts[[0, h]] = r(0.7);
            let rec = cc.decode(acts.view()).unwrap()[[0, 0, 0]];
            assert_eq!(rec, r(r(r(0.7) * w_dec[h]) + b_dec[0]), "{dtype} decode of latent {h}");
        }
        // Whatever is in the dtype is a value of the dtype.
        let losses = cc.get_losses(x.view()).unwrap();
        let in_dtype = losses.explained_variance_per_model.iter().flatten().chain([&losses.l1_loss]);
        for &v in in_dtype {
            assert_eq!(f64::from(r(v as f32)), v, "{dtype}");
        }
        assert!(losses.explained_variance.iter().any(|&v| f64::from(r(v as f32)) != v), "float32 is not rounded");
    }
}
