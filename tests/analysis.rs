//! The numbers of analysis.py on the golden cases, as PyTorch computes them (fixtures/torch_analysis.py).

use crosscoder::CrossCoder;
use crosscoder::analysis::DecoderNorms;
use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn norms_relative_norms_and_cosines_are_those_of_torch() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let text = std::fs::read_to_string(fixtures.join("torch_analysis.txt")).unwrap();
    let mut cases: BTreeMap<&str, Vec<[f64; 4]>> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let numbers: Vec<f64> = words[2..].iter().map(|word| word.parse().unwrap()).collect();
        cases.entry(words[0]).or_default().push(numbers.try_into().unwrap());
    }
    assert_eq!(cases.len(), std::fs::read_dir(fixtures.join("golden")).unwrap().count(), "every golden case");
    for (case, expected) in cases {
        let crosscoder = CrossCoder::load(fixtures.join("golden").join(case)).unwrap();
        let norms = DecoderNorms::of(&crosscoder).unwrap();
        assert_eq!(norms.d_hidden(), expected.len(), "{case}");
        for (h, [a, b, relative, cosine]) in expected.into_iter().enumerate() {
            let defined = |v: Option<f64>| v.unwrap_or(f64::NAN);
            let ours =
                [norms.norms(h)[0], norms.norms(h)[1], defined(norms.relative_norm(h)), defined(norms.cosine(h))];
            for (ours, torch) in ours.into_iter().zip([a, b, relative, cosine]) {
                let same = (ours - torch).abs() <= 1e-14 * torch.abs().max(1e-2) || (ours.is_nan() && torch.is_nan());
                assert!(same, "{case}, latent {h}: {ours}, torch {torch}");
            }
        }
    }
}
