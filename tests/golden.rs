//! Every golden case in fixtures/, by both judges, latents held both ways; and that the comparison can fail.

use crosscoder::backend::Cpu;
use crosscoder::golden::{Case, Outcome, Row};
use crosscoder::sparse::Path;
use crosscoder::{Dtype, Tensor, Values};
use std::path::PathBuf;

fn dirs() -> Vec<PathBuf> {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden");
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(fixtures).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.retain(|dir| dir.is_dir());
    dirs.sort();
    dirs
}

fn case(name: &str) -> Case {
    Case::load(&dirs().into_iter().find(|dir| dir.ends_with(name)).unwrap()).unwrap()
}

fn rows(case: &Case, path: Path) -> Vec<Row> {
    let dtype = case.cfg.enc_dtype().unwrap();
    let mut rows = case.compare(Cpu::<f32>::new(dtype).with_path(path)).unwrap();
    rows.extend(case.compare(Cpu::<f64>::new(dtype).with_path(path)).unwrap());
    rows
}

fn misses(case: &Case) -> Vec<String> {
    rows(case, Path::Auto)
        .iter()
        .filter(|r| r.pass() == Some(false))
        .map(|r| format!("{} {}", r.judge, r.key))
        .collect()
}

#[test]
fn every_key_of_every_case_is_no_further_from_the_truth_than_the_original() {
    let dirs = dirs();
    assert_eq!(dirs.len(), 7, "the cases in fixtures/golden");
    for dir in dirs {
        let case = Case::load(&dir).unwrap();
        for path in [Path::Auto, Path::Dense, Path::Sparse] {
            let rows = rows(&case, path);
            let compared = rows.iter().filter(|r| r.pass().is_some()).count();
            assert!(compared >= 28, "{}: {compared} comparisons", case.name);
            for row in rows {
                assert_eq!(row.pass(), Some(true), "{path:?} {row:?}");
            }
        }
    }
}

#[test]
fn the_claim_is_not_empty_the_original_errs() {
    // In bf16 the original's own errors are large: ours must be compared against something that is not 0.
    let rows = rows(&case("bf16-small"), Path::Auto);
    let gradients: Vec<&Row> = rows.iter().filter(|r| r.judge == "bf16" && r.key.starts_with("grad.")).collect();
    assert_eq!(gradients.len(), 4);
    for row in gradients {
        let Outcome::Compared { max, rms, .. } = &row.outcome else { panic!("{row:?}") };
        assert!(max.e_torch > 0.0 && rms.e_torch > 0.0 && max.e_ours > 0.0, "{row:?}");
    }
}

/// Replaces a key of a case by itself plus `by` times its largest magnitude in one element.
fn shift(case: &mut Case, key: &str, by: f64) {
    let tensor = &case.golden[key];
    let mut values = tensor.to_f64_vec();
    let largest = values.iter().fold(0f64, |a, v| a.max(v.abs()));
    let at = values.len() / 2;
    values[at] += by * largest;
    let shifted = Tensor::new(tensor.shape().to_vec(), Values::F64(values)).unwrap();
    case.golden.insert(key.to_owned(), shifted);
}

#[test]
fn a_wrong_value_is_a_miss() {
    for (name, by) in [("fp32-small", 1e-4), ("bf16-small", 1.0), ("fp16-small", 1.0)] {
        let mut case = case(name);
        assert!(misses(&case).is_empty());
        let dtype = case.cfg.enc_dtype().unwrap().enc_name().unwrap();
        for key in ["encode_no_relu", "decode", "l1_loss", "grad.W_enc", "grad.b_dec"] {
            shift(&mut case, &format!("exact.{key}"), by);
            shift(&mut case, key, by); // so that the original's own error stays what it was
            let misses = misses(&case);
            assert!(misses.contains(&format!("{dtype} {key}")) && misses.contains(&format!("f64 {key}")), "{misses:?}");
        }
    }
}

#[test]
fn an_error_of_rounding_size_is_a_miss_for_the_judge_alone() {
    let mut case = case("fp32-small");
    shift(&mut case, "exact.decode", 1e-8);
    assert_eq!(misses(&case), ["f64 decode"]);
}

#[test]
fn elements_that_are_not_finite_follow_the_rule() {
    let set = |case: &mut Case, key: &str, at: usize, value: f64| {
        let tensor = &case.golden[key];
        let mut values = tensor.to_f64_vec();
        values[at] = value;
        case.golden.insert(key.to_owned(), Tensor::new(tensor.shape().to_vec(), Values::F64(values)).unwrap());
    };
    // Both not finite: ours must be the same as one of them, and the judge's as exact.
    let mut both = case("fp32-small");
    set(&mut both, "decode", 3, f64::NAN);
    set(&mut both, "exact.decode", 3, f64::INFINITY);
    assert_eq!(misses(&both), ["fp32 decode", "f64 decode"]);
    let b_dec = both.weights.b_dec.to_f64_vec().into_iter().enumerate();
    let b_dec = b_dec.map(|(i, v)| if i == 3 { f32::NAN } else { v as f32 }).collect();
    both.weights.b_dec = Tensor::new(both.weights.b_dec.shape().to_vec(), Values::F32(b_dec)).unwrap();
    let width = both.weights.b_dec.shape().iter().product();
    for at in (3..both.golden["decode"].to_f64_vec().len()).step_by(width) {
        set(&mut both, "decode", at, f64::NAN);
        set(&mut both, "exact.decode", at, f64::INFINITY);
    }
    let missed = misses(&both);
    assert!(missed.contains(&"f64 decode".to_owned()), "{missed:?}");
    assert!(!missed.contains(&"fp32 decode".to_owned()), "{missed:?}");
    // Only the original overflowed: nothing to compare for us, but the judge must still meet the exact value.
    let mut torch = case("fp32-small");
    set(&mut torch, "decode", 3, f64::INFINITY);
    assert!(misses(&torch).is_empty());
    set(&mut torch, "exact.decode", 3, 7.0);
    assert_eq!(misses(&torch), ["f64 decode"]);
    // Only the exact value overflowed: not compared.
    let mut exact = case("fp32-small");
    set(&mut exact, "exact.decode", 3, f64::INFINITY);
    assert!(misses(&exact).is_empty());
}

#[test]
fn a_shape_that_differs_is_a_miss() {
    let mut case = case("fp32-small");
    let short = Tensor::new(vec![1], Values::F32(vec![0.0])).unwrap();
    case.golden.insert("encode".to_owned(), short);
    assert_eq!(misses(&case), ["fp32 encode", "f64 encode"]);
}

#[test]
fn a_backend_of_another_dtype_and_a_missing_twin_are_errors() {
    let mut case = case("fp32-small");
    let error = case.compare(Cpu::<f32>::new(Dtype::BF16)).unwrap_err();
    assert!(error.to_string().contains("float32"), "{error}");
    case.golden.remove("exact.decode");
    let error = case.compare(Cpu::<f32>::new(Dtype::F32)).unwrap_err();
    assert!(error.to_string().contains("exact.decode"), "{error}");
}

#[test]
fn three_models_compare_as_two_do() {
    // Made by fixtures/make_golden_models.py from the original with its two replaced by three.
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden-3/fp32-3-models");
    let case = Case::load(&dir).unwrap();
    for path in [Path::Auto, Path::Dense, Path::Sparse] {
        for row in rows(&case, path) {
            assert_eq!(row.pass(), Some(true), "{path:?} {row:?}");
        }
    }
    let keys: Vec<String> = rows(&case, Path::Auto).into_iter().map(|row| row.key).collect();
    for key in ["explained_variance_2", "grad.W_enc", "init.W_dec", "train.final.W_dec", "train.explained_variance_1"] {
        assert!(keys.iter().any(|k| k == key), "{key}");
    }
}
