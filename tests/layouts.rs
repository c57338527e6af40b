//! Layouts of published crosscoders, against what the code that they come from computes. `fixtures/make_layouts.py` tells how
//! the cases were made.

#[path = "fuzz/src/counting.rs"]
mod counting;

use counting::measure;
use crosscoder::autodiff::Parameters;
use crosscoder::backend::{Backend, Cpu, Scalar};
use crosscoder::batch_topk::{BatchTopK, CodeNormalization};
use crosscoder::checkpoint::{self, Files};
use crosscoder::files::TensorFile;
use crosscoder::normalisation;
use crosscoder::pt::TensorSource;
use crosscoder::sparse;
use crosscoder::{Config, CrossCoder, Dtype, ErrorKind, Tensor, Values, layouts, safetensors};
use ndarray::Array3;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/layouts")
}

/// A directory of its own for a test, removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("crosscoder-layouts-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Folder(dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A tensor of a case's `expected.pt`.
fn expected(case: &str, key: &str) -> Tensor {
    let mut file = TensorFile::open(fixtures().join(case).join("expected.pt")).unwrap();
    let index = file.index_of(key).unwrap();
    file.read(index).unwrap()
}

fn batch<S: Scalar>(tensor: &Tensor) -> Array3<S> {
    let &[n, m, d] = tensor.shape() else { panic!("x has three dimensions") };
    Array3::from_shape_vec((n, m, d), tensor.to_f64_vec().into_iter().map(S::narrow).collect()).unwrap()
}

fn wide<'a, S: Scalar>(values: impl IntoIterator<Item = &'a S>) -> Vec<f64> {
    values.into_iter().map(|v| v.wide()).collect()
}

fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |a, v| a.max(v.abs()))
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    largest(a.iter().zip(b).map(|(a, b)| a - b))
}

/// Ours is no further from the exact answer than theirs, by the golden rule's constants for float32, in each column by itself:
/// their sizes may differ by orders of magnitude. And the same latents are active.
fn compare<B: Backend>(case: &str, crosscoder: &CrossCoder<B>) {
    let x = batch::<B::Scalar>(&expected(case, "x"));
    let encoded = wide(&crosscoder.encode(x.view(), true).unwrap());
    let active = |values: &[f64]| values.iter().map(|v| *v > 0.0).collect::<Vec<_>>();
    assert_eq!(active(&encoded), active(&expected(case, "encode").to_f64_vec()), "{case}: other latents are active");
    let width = crosscoder.n_models() * crosscoder.d_in();
    let decoded = wide(&crosscoder.forward(x.view()).unwrap());
    for (key, ours, columns) in [("encode", encoded, crosscoder.d_hidden()), ("decode", decoded, width)] {
        let [theirs, exact] = [key.to_owned(), format!("exact.{key}")].map(|key| expected(case, &key).to_f64_vec());
        for k in 0..columns {
            let column = |all: &[f64]| all.iter().skip(k).step_by(columns).copied().collect::<Vec<_>>();
            let [ours, theirs, exact] = [&ours, &theirs, &exact].map(|all| column(all));
            let size = largest(exact.iter().copied());
            let (e_ours, e_theirs) = (difference(&ours, &exact), difference(&theirs, &exact));
            let bound = 8.0 * e_theirs + 32.0 * Dtype::F32.unit_roundoff() * size;
            assert!(e_ours <= bound, "{case} {key} {k}: {e_ours:e}, theirs {e_theirs:e}, bound {bound:e}");
        }
    }
}

/// The cases that are read, and whether something is folded into their weights.
const READ: [(&str, bool); 23] = [
    ("original", false),
    ("per-model-upper", false),
    ("per-model-lower", false),
    ("per-model-numbers", false),
    ("neel-4-layers", false),
    ("fork-plain-bf16", false),
    ("fork-normalised", true),
    ("fork-tiny-scale", true),
    ("fork-per-neuron-tiny-std", true),
    ("fork-trained", false),
    ("fork-no-threshold-yet", false),
    ("fork-batchtopk-crosscoder", true),
    ("fork-batchtopk-sae", true),
    ("fork-batchtopk-mixed", true),
    ("fork-batchtopk-none", true),
    ("fork-per-neuron-crosscoder", true),
    ("fork-per-neuron-batchtopk-none", true),
    ("fork-new-plain", false),
    ("fork-new-normalised", true),
    ("fork-new-batchtopk-crosscoder", true),
    ("fork-new-batchtopk-sae", true),
    ("fork-new-batchtopk-mixed", true),
    ("fork-new-batchtopk-none", true),
];

/// The cases that are recognised and refused, and what the error says.
const REFUSED: [(&str, &[&str]); 7] = [
    ("fork-batchtopk-decoupled", &["DECOUPLED"]),
    ("fork-encoder-layers", &["subset of layers", "1 of 2"]),
    ("fork-per-neuron-batchtopk-sae", &["normalised for each neuron", "SAE"]),
    ("sae", &["one model", "[20, 6]"]),
    ("sae-gated", &["gated", "r_mag"]),
    ("sae-jumprelu", &["JumpReLU", "[6, 20]"]),
    ("sae-batchtopk", &["BatchTopK", "one model"]),
];

#[test]
fn each_layout_computes_what_its_own_code_computes() {
    for (case, folded) in READ {
        let files = checkpoint::find(&fixtures().join(case)).unwrap();
        for path in [sparse::Path::Auto, sparse::Path::Dense, sparse::Path::Sparse] {
            // In float32, also where the weights are stored in half precision: so were the expected values computed.
            let backend = Cpu::<f32>::new(Dtype::F32).with_path(path);
            compare(case, &CrossCoder::load_files(backend, &files).unwrap());
            compare(case, &CrossCoder::load_files(Cpu::<f64>::new(Dtype::F32).with_path(path), &files).unwrap());
        }
        if !folded {
            // Without rounding, and without folded weights that were rounded once, it is the same function to the last bits.
            let judge = CrossCoder::load_files(Cpu::<f64>::new(Dtype::F32), &files).unwrap();
            let x = batch::<f64>(&expected(case, "x"));
            let ours = judge.forward(x.view()).unwrap();
            let exact = expected(case, "exact.decode").to_f64_vec();
            assert!(difference(&wide(&ours), &exact) <= 1e-12 * largest(exact.iter().copied()), "{case}");
        }
    }
    let dirs = std::fs::read_dir(fixtures()).unwrap().count();
    assert_eq!(dirs, READ.len() + REFUSED.len(), "every case is tested");
}

#[test]
fn what_is_not_supported_is_named() {
    for (case, words) in REFUSED {
        let error = CrossCoder::load(fixtures().join(case)).unwrap_err();
        let message = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{message}");
        assert!(words.iter().all(|word| message.contains(word)) && message.contains(case), "{message}");
    }
}

#[test]
fn the_cfg_tells_what_became_of_it() {
    let cfg = |case: &str| CrossCoder::load(fixtures().join(case)).unwrap().cfg().clone();
    let mixed = cfg("fork-batchtopk-mixed");
    assert_eq!(mixed.text("layout").unwrap(), "dictionary_learning");
    assert_eq!((mixed.d_in().unwrap(), mixed.dict_size().unwrap()), (6, 20));
    assert_eq!(mixed.count("batch_topk_k").unwrap(), 5);
    let batch_topk = BatchTopK::from_cfg(&mixed, 2).unwrap().unwrap();
    assert_eq!(batch_topk.code_normalization, CodeNormalization::Mixed { sae: 0.7, cc: 0.2 });
    let folded = mixed.get("folded_activation_normalisation").unwrap();
    let scales = folded["activation_global_scale"].as_array().unwrap();
    assert!(scales.len() == 2 && scales[0].as_f64().is_some_and(|s| s > 0.0 && s != 1.0), "{folded}");
    let divisors: Vec<f64> = scales.iter().map(|s| s.as_f64().unwrap() + 1e-8).collect();
    assert_eq!(batch_topk.norm_scales, Some(divisors), "what the decoder was divided by");
    assert_eq!(mixed.get("dictionary_learning").unwrap()["norm_init_scale"], 1.0, "the config is kept");
    // What the original needs to make a CrossCoder.
    for key in ["seed", "dec_init_norm", "device", "enc_dtype"] {
        assert!(mixed.get(key).is_some(), "{key}");
    }
    assert_eq!(cfg("fork-plain-bf16").enc_dtype().unwrap(), Dtype::BF16);
    assert_eq!(cfg("neel-4-layers").d_in().unwrap(), 6);
    assert_eq!(cfg("neel-4-layers").text("model_name").unwrap(), "gpt2-small");
    assert_eq!(cfg("per-model-upper").text("model_A").unwrap(), "a");
    assert!(cfg("original").get("layout").is_none());
}

#[test]
fn a_converted_checkpoint_is_the_same_crosscoder() {
    let folder = Folder::new("convert");
    for (case, _) in READ {
        let files = checkpoint::find(&fixtures().join(case)).unwrap();
        let (cfg, weights) = checkpoint::read(&files).unwrap();
        let dtype = cfg.enc_dtype().unwrap();
        let weights = checkpoint::cast(weights, dtype).unwrap();
        let x = batch::<f32>(&expected(case, "x"));
        let direct = CrossCoder::load(fixtures().join(case)).unwrap();
        for name in ["0.pt", "1.safetensors"] {
            let out = Files {
                weights: folder.0.join(name),
                cfg: folder.0.join(name.replace(".pt", "_cfg.json").replace(".safetensors", "_cfg.json")),
            };
            checkpoint::write(&out, &cfg, weights.each().map(|t| t as &dyn TensorSource)).unwrap();
            let again = CrossCoder::load(&out.weights).unwrap();
            assert_eq!(again.encode(x.view(), true).unwrap(), direct.encode(x.view(), true).unwrap(), "{case}");
            assert_eq!(again.forward(x.view()).unwrap(), direct.forward(x.view()).unwrap(), "{case}");
        }
    }
}

#[test]
fn a_cut_latent_is_one_that_is_not_active() {
    // One row, and the same crosscoder without a threshold, whose cut latents a bias keeps off: losses and gradients agree.
    let case = "fork-batchtopk-crosscoder";
    let (cfg, weights) = checkpoint::read(&checkpoint::find(&fixtures().join(case)).unwrap()).unwrap();
    let x = batch::<f32>(&expected(case, "x"));
    let x = x.slice(ndarray::s![2..3, .., ..]);
    for path in [sparse::Path::Dense, sparse::Path::Sparse] {
        let backend = Cpu::<f32>::new(Dtype::F32).with_path(path);
        let with = CrossCoder::from_tensors(backend.clone(), cfg.clone(), weights.clone()).unwrap();
        let acts = with.encode(x, true).unwrap();
        let pre = with.encode(x, false).unwrap();
        let cut: Vec<usize> = (0..20).filter(|&h| pre[[0, h]] > 0.0 && acts[[0, h]] == 0.0).collect();
        assert!(!cut.is_empty() && acts.iter().any(|&v| v > 0.0), "both kinds: {pre} {acts}");
        let mut off = weights.clone();
        let mut bias = off.b_enc.to_f64_vec();
        cut.iter().for_each(|&h| bias[h] = -1e6);
        off.b_enc = Tensor::new(vec![20], Values::F64(bias)).unwrap();
        let mut plain = Config::default();
        plain.set("d_in", 6);
        plain.set("dict_size", 20);
        let without = CrossCoder::from_tensors(backend, plain, off).unwrap();
        assert_eq!(without.encode(x, true).unwrap(), acts);
        assert_eq!(with.get_losses(x).unwrap(), without.get_losses(x).unwrap());
        let (loss, grads) = with.loss_and_grads(x, 2.0).unwrap();
        let (other_loss, other_grads) = without.loss_and_grads(x, 2.0).unwrap();
        assert_eq!(loss, other_loss);
        for (grad, other) in grads.each().iter().zip(other_grads.each()) {
            let values = |crosscoder: &CrossCoder, m| {
                let (rows, cols) = crosscoder::backend::Shaped::shape(m);
                let mut out = vec![0f32; rows * cols];
                crosscoder.backend().download(m, 0, &mut out).unwrap();
                out
            };
            assert_eq!(values(&with, grad), values(&without, other));
        }
    }
}

// ---- files made here ----

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn tensor(shape: &[usize]) -> Tensor {
    Tensor::new(shape.to_vec(), Values::F32(numbers(shape.iter().product(), shape.len() as u32))).unwrap()
}

fn scalar(v: f32) -> Tensor {
    Tensor::new(Vec::new(), Values::F32(vec![v])).unwrap()
}

fn save(folder: &Folder, config: &str, tensors: &[(&str, Tensor)]) {
    let named: Vec<(&str, &dyn TensorSource)> = tensors.iter().map(|(n, t)| (*n, t as &dyn TensorSource)).collect();
    let file = std::fs::File::create(folder.0.join("model.safetensors")).unwrap();
    safetensors::write(file, &named, &[]).unwrap();
    std::fs::write(folder.0.join("config.json"), config).unwrap();
}

fn fork(more: &[(&'static str, Tensor)]) -> Vec<(&'static str, Tensor)> {
    let mut tensors = vec![
        ("encoder.weight", tensor(&[2, 6, 20])),
        ("encoder.bias", tensor(&[20])),
        ("decoder.weight", tensor(&[2, 20, 6])),
        ("decoder.bias", tensor(&[2, 6])),
    ];
    tensors.extend(more.iter().cloned());
    tensors
}

fn refused(folder: &Folder, config: &str, tensors: &[(&str, Tensor)], words: &[&str]) {
    save(folder, config, tensors);
    let message = CrossCoder::load(&folder.0).map(|_| ()).expect_err(&format!("{words:?}")).to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message} lacks one of {words:?}");
}

#[test]
fn nothing_is_guessed_of_the_forks_files() {
    let folder = Folder::new("fork");
    let (k, threshold, id) = (("k", scalar(5.0)), ("threshold", scalar(0.5)), ("code_normalization_id", scalar(3.0)));
    let id_1 = ("code_normalization_id", scalar(1.0));
    save(&folder, "{}", &fork(&[]));
    assert_eq!(CrossCoder::load(&folder.0).unwrap().n_models(), 2);
    save(&folder, r#"{"code_normalization": "sae"}"#, &fork(&[k.clone(), threshold.clone()]));
    assert_eq!(CrossCoder::load(&folder.0).unwrap().cfg().text("code_normalization").unwrap(), "SAE");

    // As it was called before: by its trainer, and by its class.
    for said in [
        r#"{"trainer": {"sparsity_loss_type": "LossType.MIXED", "sparsity_loss_alpha_sae": 0.5, "sparsity_loss_alpha_cc": 2}}"#,
        r#"{"code_normalization": "MIXED", "sparsity_loss_alpha_sae": 0.5, "sparsity_loss_alpha_cc": 2.0}"#,
    ] {
        save(&folder, said, &fork(&[k.clone(), threshold.clone()]));
        let mixed = BatchTopK::from_cfg(CrossCoder::load(&folder.0).unwrap().cfg(), 2).unwrap().unwrap();
        assert_eq!(mixed.code_normalization, CodeNormalization::Mixed { sae: 0.5, cc: 2.0 });
    }
    let both = [k.clone(), threshold.clone()];
    refused(&folder, r#"{"sparsity_loss_type": "LossType.L0"}"#, &fork(&both), &["\"L0\" is none of CROSSCODER"]);
    refused(&folder, "{}", &fork(&both), &["config.json", "code_normalization_id", "CROSSCODER"]);
    refused(&folder, "{}", &fork(&[k.clone(), threshold.clone(), id]), &["code_normalization_alpha_sae"]);
    refused(&folder, "{}", &fork(std::slice::from_ref(&k)), &["TopK", "without a threshold"]);
    refused(&folder, "{}", &fork(std::slice::from_ref(&threshold)), &["without k"]);
    let each = ("threshold", tensor(&[20]));
    refused(&folder, "{}", &fork(&[k.clone(), each, id_1.clone()]), &["JumpReLU"]);
    let nan = ("threshold", scalar(f32::NAN));
    refused(&folder, "{}", &fork(&[k.clone(), nan, id_1.clone()]), &["not finite"]);
    let id_6 = ("code_normalization_id", scalar(6.0));
    refused(&folder, "{}", &fork(&[id_6]), &["code_normalization_id 6"]);
    refused(&folder, r#"{"code_normalization": "SAE"}"#, &fork(std::slice::from_ref(&id_1)), &["SAE", "CROSSCODER"]);
    refused(&folder, r#"{"num_layers": 3}"#, &fork(&[]), &["num_layers", "3", "2"]);
    refused(&folder, r#"{"encoder_layers": [1, 0]}"#, &fork(&[]), &["encoder_layers [1,0]"]);
    refused(&folder, r#"{"latent_processor": "f"}"#, &fork(&[]), &["latent_processor"]);
    refused(&folder, r#"{"trainer": {"dict_class": "GatedAutoEncoder"}}"#, &fork(&[]), &["GatedAutoEncoder"]);
    refused(&folder, r#"{"trainer": {"dict_class": "CrossCoder"}}"#, &fork(&[k, threshold, id_1]), &["CrossCoder"]);
    refused(&folder, "{}", &fork(&[("skip", tensor(&[2, 6]))]), &["\"skip\""]);
    refused(&folder, "{}", &fork(&[])[..3], &["decoder.bias is missing"]);
    let mut transposed = fork(&[]);
    transposed[2].1 = tensor(&[2, 6, 20]);
    refused(&folder, "{}", &transposed, &["decoder.weight is float32 [2, 6, 20]", "needs float32 [2, 20, 6]"]);
    let mut short = fork(&[]);
    short[1].1 = tensor(&[19]);
    refused(&folder, "{}", &short, &["encoder.bias is float32 [19]", "[20]"]);

    let mut integers = fork(&[]);
    for (_, tensor) in &mut integers {
        *tensor = Tensor::new(tensor.shape().to_vec(), Values::I32(vec![1; tensor.len()])).unwrap();
    }
    refused(&folder, "{}", &integers, &["int32", "floats"]);
    let full = |v: f32| Tensor::new(vec![2, 6], Values::F32(vec![v; 12])).unwrap();
    let (mean, std) = (("activation_mean", full(1.0)), ("activation_std", full(2.0)));
    refused(&folder, "{}", &fork(std::slice::from_ref(&mean)), &["activation_std"]);
    let one = ("activation_global_scale", scalar(1.0));
    refused(&folder, "{}", &fork(&[mean.clone(), std.clone(), one.clone()]), &["activation_global_scale is 1"]);
    let zero = ("activation_global_scale", scalar(0.0));
    refused(&folder, "{}", &fork(&[mean.clone(), std.clone(), zero]), &["activation_global_scale is [0"]);
    let list = |v: &[f32]| ("activation_global_scale", Tensor::new(vec![v.len()], Values::F32(v.to_vec())).unwrap());
    refused(&folder, "{}", &fork(&[mean.clone(), std.clone(), list(&[1.0; 2])]), &["activation_global_scale is 1"]);
    refused(&folder, "{}", &fork(&[mean.clone(), std.clone(), list(&[0.5; 3])]), &["has shape [3]", "[2]"]);
    refused(&folder, "{}", &fork(&[mean.clone(), std.clone(), list(&[0.5, f32::NAN])]), &["[0.5, NaN]"]);
    let partly =
        ("activation_std", Tensor::new(vec![2, 6], Values::F32([&[f32::NAN; 1][..], &[1.0; 11]].concat())).unwrap());
    refused(&folder, "{}", &fork(&[mean, partly, one.clone()]), &["not finite"]);
    let wrong = ("activation_mean", tensor(&[6]));
    refused(&folder, "{}", &fork(&[wrong, std, one]), &["activation_mean has shape [6]", "[2, 6]"]);
    let mut twice = fork(&[]);
    twice.push(("_orig_mod.encoder.bias", tensor(&[20])));
    refused(&folder, "{}", &twice, &["encoder.bias", "_orig_mod."]);
}

#[test]
fn nothing_is_guessed_of_separate_tensors() {
    let folder = Folder::new("separate");
    let model = |name: &str| {
        // Held, so that tools that look for lost memory pass over it.
        static HELD: std::sync::Mutex<Vec<&str>> = std::sync::Mutex::new(Vec::new());
        let leak = |stem: &str| -> &'static str {
            let name: &str = Box::leak(format!("{stem}_{name}").into_boxed_str());
            HELD.lock().unwrap().push(name);
            name
        };
        vec![(leak("W_enc"), tensor(&[6, 20])), (leak("W_dec"), tensor(&[20, 6])), (leak("b_dec"), tensor(&[6]))]
    };
    let all = |names: &[&str]| {
        let mut tensors: Vec<_> = names.iter().flat_map(|name| model(name)).collect();
        tensors.push(("b_enc", tensor(&[20])));
        tensors
    };
    save(&folder, "{}", &all(&["A", "C", "B"]));
    assert_eq!(CrossCoder::load(&folder.0).unwrap().n_models(), 3);
    let twelve: Vec<String> = (0..12).map(|m| m.to_string()).collect();
    save(&folder, "{}", &all(&twelve.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!(CrossCoder::load(&folder.0).unwrap().n_models(), 12);

    refused(&folder, "{}", &all(&["A", "C"]), &["a, c", "A, B"]);
    refused(&folder, "{}", &all(&["base", "chat"]), &["base, chat"]);
    refused(&folder, "{}", &all(&["1", "2"]), &["1, 2"]);
    let mut more = all(&["A", "B"]);
    more.push(("b_enc_A", tensor(&[20])));
    refused(&folder, "{}", &more, &["b_enc_A"]);
    let mut more = all(&["A", "B"]);
    more.push(("scale", tensor(&[2])));
    refused(&folder, "{}", &more, &["\"scale\""]);
    refused(&folder, "{}", &all(&["A", "B"])[..6], &["b_enc is missing"]);
    let mut less = all(&["A", "B"]);
    less.remove(4);
    refused(&folder, "{}", &less, &["W_dec", "W_dec_A", "one for each of a, b"]);
    let mut transposed = all(&["A", "B"]);
    (transposed[0].1, transposed[3].1) = (tensor(&[20, 6]), tensor(&[20, 6]));
    refused(&folder, "{}", &transposed, &["W_dec has shape"]);
    let mut differ = all(&["A", "B"]);
    differ[3].1 = tensor(&[5, 20]);
    refused(&folder, "{}", &differ, &["W_enc differ", "[6, 20]", "[5, 20]"]);
    refused(&folder, r#"{"d_in": 7}"#, &all(&["A", "B"]), &["d_in 7"]);
    refused(&folder, r#"{"activation_fn": "topk"}"#, &all(&["A", "B"]), &["activation_fn", "topk"]);
}

#[test]
fn models_that_differ_take_no_memory_for_all_of_them() {
    // As many models as letters, the first of 1 MiB, the others of 4 bytes: refused before they are put together.
    let folder = Folder::new("memory");
    let names: Vec<String> = (b'A'..=b'Z').map(|c| format!("W_enc_{}", char::from(c))).collect();
    let shape = |i: usize| if i == 0 { [512, 512] } else { [1, 1] };
    let kinds = ["W_dec", "b_dec"].map(|kind| names.iter().map(|n| n.replace("W_enc", kind)).collect::<Vec<_>>());
    let mut tensors: Vec<(&str, Tensor)> =
        names.iter().enumerate().map(|(i, name)| (name.as_str(), tensor(&shape(i)))).collect();
    tensors.extend(kinds.iter().flatten().map(|name| (name.as_str(), tensor(&[1, 1]))));
    tensors.push(("b_enc", tensor(&[1])));
    save(&folder, "{}", &tensors);
    let mut file = TensorFile::open(folder.0.join("model.safetensors")).unwrap();
    let (read, used) = measure(|| layouts::read(&mut file, Config::default(), "config.json".as_ref()));
    let message = read.unwrap_err().to_string();
    assert!(message.contains("W_enc differ: float32 [512, 512] and float32 [1, 1]"), "{message}");
    assert!(used.peak < 2 << 20 && used.largest < 2 << 20, "{used:?}");
}

#[test]
fn factors_are_folded_only_into_weights_that_fit() {
    let cfg = || {
        let text = br#"{"d_in": 6, "dict_size": 20, "enc_dtype": "fp32", "normalisation_factor": [2, 4]}"#;
        Config::from_json(text).unwrap()
    };
    let shapes = [&[2, 6, 20][..], &[20, 2, 6], &[20], &[2, 6]];
    let fold = |cfg: &mut Config, shapes: [&[usize]; 4]| {
        let [w_enc, w_dec, b_enc, b_dec] = shapes.map(tensor);
        normalisation::fold(cfg, Parameters { w_enc, w_dec, b_enc, b_dec })
    };
    assert!(fold(&mut cfg(), shapes).is_ok());
    // Too few dimensions, too many, none; another number of models, of latents; what the other three contradict.
    let odd: [&[usize]; 8] = [&[], &[2], &[20], &[6, 2], &[3, 6], &[2, 6, 20, 1], &[20, 3, 6], &[0, 6, 20]];
    for at in 0..shapes.len() {
        for shape in odd.into_iter().filter(|shape| *shape != shapes[at]) {
            let mut shapes = shapes;
            shapes[at] = shape;
            let mut cfg = cfg();
            let before = cfg.clone();
            let error = fold(&mut cfg, shapes).unwrap_err();
            let name = crosscoder::autodiff::PARAMETER_NAMES[at];
            let message = error.to_string();
            assert!(message.contains(name) && message.contains(&format!("{shape:?}")), "{message}");
            assert_eq!(cfg, before, "a refusal changes nothing");
        }
    }
    let mut three = cfg();
    three.set("normalisation_factor", vec![1.0, 2.0, 3.0]);
    let error = fold(&mut three, shapes).unwrap_err().to_string();
    assert!(error.contains("3 factors for 2 models"), "{error}");
}

#[test]
fn a_bad_key_is_told_in_the_cfg_and_a_bad_tensor_in_the_weights() {
    let folder = Folder::new("blame");
    let weights = || {
        let shapes = [("W_enc", &[2, 6, 20][..]), ("W_dec", &[20, 2, 6]), ("b_enc", &[20]), ("b_dec", &[2, 6])];
        shapes.map(|(name, shape)| (name, tensor(shape)))
    };
    let topk = r#""batch_topk_threshold": 1, "code_normalization": "NONE""#;
    for (keys, file, words) in [
        (r#""d_in": "6", "dict_size": 20"#.to_owned(), "config.json", "cfg key \"d_in\" needs an integer"),
        (r#""d_in": 6, "dict_size": 0"#.into(), "config.json", "cfg key \"dict_size\" needs an integer"),
        (
            format!(r#""d_in": 6, "dict_size": 20, {topk}, "decoder_norm_scales": [1]"#),
            "config.json",
            "cfg key \"decoder_norm_scales\" needs a list",
        ),
        (r#""d_in": 6, "dict_size": 21"#.into(), "model.safetensors", "W_enc has shape [2, 6, 20]"),
    ] {
        save(&folder, &format!(r#"{{"enc_dtype": "fp32", {keys}}}"#), &weights());
        let said = CrossCoder::load(&folder.0).unwrap_err().to_string();
        assert!(said.starts_with(&format!("{}: {words}", folder.0.join(file).display())), "{said}");
    }
}

#[test]
fn names_of_no_layout_and_a_missing_cfg_are_errors() {
    let folder = Folder::new("none");
    refused(&folder, "{}", &[("weight", tensor(&[2, 2]))], &["\"weight\"", "W_enc, W_dec, b_enc, b_dec"]);
    refused(&folder, "{}", &[("W_enc", tensor(&[2, 6, 20]))], &["W_dec is missing"]);
    refused(&folder, "{}", &[("W_enc", tensor(&[2, 6, 20])), ("threshold", tensor(&[20]))], &["JumpReLU crosscoder"]);
    refused(&folder, "{}", &[("W_enc", tensor(&[6, 20])), ("W_skip", tensor(&[6, 6]))], &["transcoder"]);
    let header = r#"{"W_enc":{"dtype":"F32","shape":[1,0],"data_offsets":[0,0]},
        "threshold":{"dtype":"F32","shape":[9223372036854775807,4,0],"data_offsets":[0,0]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    std::fs::write(folder.0.join("model.safetensors"), bytes).unwrap();
    let empty = CrossCoder::load(&folder.0).unwrap_err().to_string();
    assert!(empty.contains("JumpReLU"), "an empty tensor may have any sizes: {empty}");

    std::fs::remove_file(folder.0.join("config.json")).unwrap();
    let message = |path: &Path| CrossCoder::load(path).unwrap_err().to_string();
    for path in [folder.0.clone(), folder.0.join("model.safetensors")] {
        let file = message(&path);
        assert!(file.contains("none of model_cfg.json, config.json, cfg.json is beside it"), "{file}");
    }
    std::fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    let empty = message(&folder.0);
    for word in ["N_cfg.json", "cc_weights.pt with cfg.json", "model.safetensors with config.json"] {
        assert!(empty.contains(word), "{empty}");
    }
}

#[test]
fn a_threshold_is_checked_when_the_crosscoder_is_made() {
    let weights = || Parameters {
        w_enc: tensor(&[2, 6, 20]),
        w_dec: tensor(&[20, 2, 6]),
        b_enc: tensor(&[20]),
        b_dec: tensor(&[2, 6]),
    };
    let make = |more: &str| {
        let cfg = format!(r#"{{"d_in": 6, "dict_size": 20, "enc_dtype": "fp32"{more}}}"#);
        let cfg = Config::from_json(cfg.as_bytes()).unwrap();
        CrossCoder::<Cpu>::from_tensors(Cpu::new(Dtype::F32), cfg, weights())
    };
    let error = |more: &str| make(more).unwrap_err().to_string();
    assert!(make(r#", "batch_topk_threshold": 0.1, "code_normalization": "NONE""#).is_ok());
    assert!(error(r#", "batch_topk_threshold": "x""#).contains("a finite number"));
    assert!(error(r#", "batch_topk_threshold": 0.1"#).contains("code_normalization"));
    assert!(error(r#", "batch_topk_threshold": 0.1, "code_normalization": "DECOUPLED""#).contains("DECOUPLED"));
    assert!(error(r#", "batch_topk_threshold": 0.1, "code_normalization": "MIXED""#).contains("alpha_sae"));
    let with_scales = |scales: &str| {
        error(&format!(
            r#", "batch_topk_threshold": 0.1, "code_normalization": "SAE", "decoder_norm_scales": {scales}"#
        ))
    };
    for scales in ["[1]", "[1, 0]", "[1, -1]", "[1, \"x\"]", "2", "[1, 1, 1]"] {
        assert!(with_scales(scales).contains("a list of 2 positive numbers"), "{scales}");
    }
    assert!(make(r#", "n_models": 2"#).is_ok());
    assert!(error(r#", "n_models": 3"#).contains("n_models 3"));

    // nan is not cut: what is not known is not zero.
    let crosscoder = make(r#", "batch_topk_threshold": 0.1, "code_normalization": "CROSSCODER""#).unwrap();
    let mut x = Array3::from_shape_vec((2, 2, 6), numbers(24, 9)).unwrap();
    x[[1, 0, 0]] = f32::NAN;
    let acts = crosscoder.encode(x.view(), true).unwrap();
    assert!(acts.row(1).iter().all(|v| v.is_nan()) && acts.row(0).iter().all(|v| v.is_finite()));

    let mut cfg =
        Config::from_json(br#"{"d_in": 6, "dict_size": 20, "enc_dtype": "fp32", "seed": 1, "dec_init_norm": 0.1}"#)
            .unwrap();
    assert_eq!(CrossCoder::new(cfg.clone()).unwrap().n_models(), 2);
    cfg.set("n_models", 3);
    assert_eq!(CrossCoder::new(cfg).unwrap().n_models(), 3);
}

#[cfg(feature = "cli")]
mod convert {
    use super::*;
    use crosscoder::pt::{Save, Writer};
    use std::process::Command;

    fn convert(args: &[&std::ffi::OsStr]) -> (bool, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_crosscoder")).arg("convert").args(args).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    #[test]
    fn every_layout_becomes_the_originals() {
        let folder = Folder::new("cli");
        for (case, _) in READ {
            let out = folder.0.join(format!("{case}.pt"));
            let (ok, stderr) = convert(&[fixtures().join(case).as_ref(), out.as_ref()]);
            assert!(ok && stderr.is_empty(), "{case}: {stderr}");
            let mut file = TensorFile::open(&out).unwrap();
            let names: Vec<_> = file.tensors().iter().map(|t| t.name.clone()).collect();
            assert_eq!(names, ["W_enc", "W_dec", "b_enc", "b_dec"]);
            let w_enc = file.tensors()[0].clone();
            let (n, d) = (w_enc.shape[0], w_enc.shape[1]);
            assert_eq!(w_enc.strides, [d, 1, n * d], "as the original's lie");
            assert!(file.read(0).is_ok());
            let x = batch::<f32>(&expected(case, "x"));
            let [ours, direct] = [out, fixtures().join(case)].map(|path| CrossCoder::load(path).unwrap());
            assert_eq!(ours.forward(x.view()).unwrap(), direct.forward(x.view()).unwrap(), "{case}");
        }
        for (case, words) in REFUSED {
            let out = folder.0.join("refused.pt");
            let (ok, stderr) = convert(&[fixtures().join(case).as_ref(), out.as_ref()]);
            assert!(!ok && words.iter().all(|word| stderr.contains(word)) && !out.exists(), "{case}: {stderr}");
        }
    }

    #[test]
    fn what_is_left_out_is_named() {
        let folder = Folder::new("left-out");
        let files = checkpoint::numbered(&folder.0, 0);
        let (cfg, weights) = checkpoint::read(&checkpoint::find(&fixtures().join("original")).unwrap()).unwrap();
        std::fs::write(&files.cfg, cfg.to_json()).unwrap();
        let tensors = crosscoder::autodiff::PARAMETER_NAMES.into_iter().zip(weights.each());
        let mut entries: Vec<_> = tensors.map(|(name, tensor)| (name.into(), Save::Tensor(tensor))).collect();
        entries.extend([("epoch".into(), Save::Int(7)), ("é\u{1b}[31m\nfake: ok".into(), Save::Int(1))]);
        std::fs::write(&files.weights, Writer::new(Vec::new(), "0").unwrap().save(&Save::Dict(entries)).unwrap())
            .unwrap();
        let said = "plain values left out: epoch, é\\u{1b}[31m\\nfake: ok\n";
        let out = folder.0.join("out.pt");
        assert_eq!(convert(&[files.weights.as_ref(), out.as_ref()]), (true, said.to_owned()));
        let values = |weights: &Parameters<Tensor>| weights.each().map(Tensor::to_f64_vec);
        assert_eq!(values(&CrossCoder::load(&out).unwrap().to_tensors().unwrap()), values(&weights));

        let metadata = [("format".to_owned(), "pt".to_owned()), ("note\r".to_owned(), "x".to_owned())];
        let weight = tensor(&[2, 2]);
        let bytes = safetensors::write(Vec::new(), &[("weight", &weight as &dyn TensorSource)], &metadata).unwrap();
        let [with, kept] = ["with.safetensors", "kept.safetensors"].map(|name| folder.0.join(name));
        std::fs::write(&with, &bytes).unwrap();
        assert_eq!(convert(&[with.as_ref(), kept.as_ref()]), (true, String::new()));
        assert_eq!(std::fs::read(&kept).unwrap(), bytes, "metadata is kept where the format has it");
        let (ok, said) = convert(&[with.as_ref(), folder.0.join("none.pt").as_ref()]);
        assert_eq!((ok, said.as_str()), (true, "metadata left out: format, note\\r\n"));
    }

    #[test]
    fn what_a_cast_does_is_told() {
        let folder = Folder::new("cast");
        let (mut cfg, weights) = checkpoint::read(&checkpoint::find(&fixtures().join("original")).unwrap()).unwrap();
        cfg.set("enc_dtype", "bf16");
        let files = checkpoint::numbered(&folder.0, 0);
        checkpoint::write(&files, &cfg, weights.each().map(|t| t as &dyn TensorSource)).unwrap();
        let out = folder.0.join("out.pt");
        let said = "W_enc is float32, written as bfloat16: the cfg's enc_dtype; --dtype asks for another\n";
        assert_eq!(convert(&[folder.0.as_ref(), out.as_ref()]), (true, said.to_owned()));
        let asked = ["--force", "--dtype", "fp32"].map(std::ffi::OsStr::new);
        assert_eq!(convert(&[&[folder.0.as_ref(), out.as_ref()], &asked[..]].concat()), (true, String::new()));

        let large = Values::F32(vec![1e10, 70000.0, f32::NEG_INFINITY, f32::NAN]);
        let values = Tensor::new(vec![4], large).unwrap();
        let from = folder.0.join("large.safetensors");
        safetensors::write(std::fs::File::create(&from).unwrap(), &[("v", &values)], &[]).unwrap();
        let asked = ["--force", "--dtype", "fp16"].map(std::ffi::OsStr::new);
        let said = "v: 2 values too large for float16 are infinite\n";
        assert_eq!(convert(&[&[from.as_ref(), out.as_ref()], &asked[..]].concat()), (true, said.to_owned()));
        let mut weights = weights;
        weights.b_enc = Tensor::new(vec![20], Values::F32(vec![1e10; 20])).unwrap();
        checkpoint::write(&files, &cfg, weights.each().map(|t| t as &dyn TensorSource)).unwrap();
        let said = "b_enc: 20 values too large for float16 are infinite\n";
        assert_eq!(convert(&[&[folder.0.as_ref(), out.as_ref()], &asked[..]].concat()), (true, said.to_owned()));
    }

    #[cfg(unix)]
    #[test]
    fn names_need_not_be_utf_8() {
        use std::os::unix::ffi::OsStrExt;
        let folder = Folder::new("bytes");
        let out = folder.0.join(std::ffi::OsStr::from_bytes(b"\xff.x.pt"));
        let (ok, stderr) = convert(&[fixtures().join("original").as_ref(), out.as_ref()]);
        assert!(ok && CrossCoder::load(&out).is_ok(), "{stderr}");
    }

    #[test]
    fn a_folder_of_no_known_layout_is_told_by_its_tensors() {
        let folder = Folder::new("unknown");
        save(&folder, "{}", &[("weight", tensor(&[2, 2]))]);
        let (ok, stderr) = convert(&[folder.0.as_ref(), folder.0.join("out.pt").as_ref()]);
        assert!(!ok && stderr.contains("\"weight\"") && stderr.contains("W_enc, W_dec, b_enc, b_dec"), "{stderr}");
        // By its own name it is a file of tensors like any other.
        let (ok, stderr) = convert(&[folder.0.join("model.safetensors").as_ref(), folder.0.join("out.pt").as_ref()]);
        assert!(ok, "{stderr}");
    }

    #[test]
    fn factors_are_folded_once() {
        let folder = Folder::new("fold");
        let (mut cfg, weights) = checkpoint::read(&checkpoint::find(&fixtures().join("original")).unwrap()).unwrap();
        let factors = [0.25f32, 3.0];
        cfg.set("normalisation_factor", factors.map(f64::from).to_vec());
        let files = checkpoint::numbered(&folder.0, 0);
        checkpoint::write(&files, &cfg, weights.each().map(|t| t as &dyn TensorSource)).unwrap();
        let out = folder.0.join("folded.pt");
        let (ok, stderr) = convert(&[folder.0.as_ref(), out.as_ref(), "--fold".as_ref()]);
        assert!(ok, "{stderr}");
        let [before, after] = [&files.weights, &out].map(|path| CrossCoder::load(path).unwrap());
        let x = batch::<f32>(&expected("original", "x"));
        let mut scaled = x.clone();
        for (m, factor) in factors.into_iter().enumerate() {
            scaled.index_axis_mut(ndarray::Axis(1), m).mapv_inplace(|v| v * factor);
        }
        let [a, b] =
            [before.encode(scaled.view(), true), after.encode(x.view(), true)].map(|acts| wide(&acts.unwrap()));
        assert!(difference(&a, &b) <= 1e-5 * largest(a.iter().copied()), "the same latents");
        let mut rec = after.forward(x.view()).unwrap();
        for (m, factor) in factors.into_iter().enumerate() {
            rec.index_axis_mut(ndarray::Axis(1), m).mapv_inplace(|v| v * factor);
        }
        let theirs = before.forward(scaled.view()).unwrap();
        assert!(difference(&wide(&rec), &wide(&theirs)) <= 1e-5 * largest(wide(&theirs)), "in the units of x");

        // Weights that do not fit are neither folded nor converted.
        let odd = Folder::new("odd");
        save(
            &odd,
            r#"{"d_in": 6, "dict_size": 20, "enc_dtype": "fp32", "normalisation_factor": [1, 2]}"#,
            &[
                ("W_enc", tensor(&[3, 6, 20])),
                ("W_dec", tensor(&[20, 2, 6])),
                ("b_enc", tensor(&[20])),
                ("b_dec", tensor(&[2, 6])),
            ],
        );
        for args in [&[][..], &["--fold".as_ref()]] {
            let target = odd.0.join("o.pt");
            let (ok, stderr) = convert(&[&[odd.0.as_ref(), target.as_ref()], args].concat());
            assert!(!ok && stderr.contains("[20, 2, 6]") && !target.exists(), "{stderr}");
        }

        let (ok, stderr) = convert(&[out.as_ref(), folder.0.join("twice.pt").as_ref(), "--fold".as_ref()]);
        assert!(!ok && stderr.contains("folded into these weights already"), "{stderr}");
        let plain = fixtures().join("original");
        let (ok, stderr) = convert(&[plain.as_ref(), folder.0.join("none.pt").as_ref(), "--fold".as_ref()]);
        assert!(!ok && stderr.contains("nothing to fold"), "{stderr}");
        // A threshold goes on meaning the decoder norms that it was trained with.
        for kind in ["CROSSCODER", "SAE", "MIXED", "NONE"] {
            cfg.set("batch_topk_threshold", 1.0);
            cfg.set("code_normalization", kind);
            cfg.set("code_normalization_alpha_sae", 0.5);
            cfg.set("code_normalization_alpha_cc", 0.5);
            let files = checkpoint::numbered(&folder.0, 1);
            checkpoint::write(&files, &cfg, weights.each().map(|t| t as &dyn TensorSource)).unwrap();
            let (ok, stderr) = convert(&[folder.0.as_ref(), out.as_ref(), "--fold".as_ref(), "--force".as_ref()]);
            assert!(ok, "{stderr}");
            let [before, after] = [&files.weights, &out].map(|path| CrossCoder::load(path).unwrap());
            let [plain, a, b] =
                [before.encode(scaled.view(), false), before.encode(scaled.view(), true), after.encode(x.view(), true)]
                    .map(|acts| wide(&acts.unwrap()));
            assert!(difference(&a, &b) <= 1e-5 * largest(a.iter().copied()), "{kind}: the same latents");
            let cut = plain.iter().zip(&a).filter(|(plain, a)| **plain > 0.0 && **a == 0.0).count();
            assert!(cut > 0 && a.iter().any(|v| *v > 0.0), "{kind}: the threshold cuts some");
        }
    }
}
