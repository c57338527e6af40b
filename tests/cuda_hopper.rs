//! The products for Hopper: `wgmma`, the copy engine, barriers with phases, in the interpreter as a device of compute
//! capability 9.0. On a real device (`CROSSCODER_TEST_GPU=1`) `tests/cuda.rs` runs them where there is such a device.

#![cfg(feature = "cuda")]

mod primitives;
mod standin;

use crosscoder::backend::cuda::{Cuda, Product};
use crosscoder::backend::{Backend, Write};
use crosscoder::golden::Case;
use crosscoder::sparse::Path;
use crosscoder::{Dtype, Values};
use primitives::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

const PTX: &str = include_str!("../ptx/hopper.ptx");

/// One test at a time, on a Hopper device: planted faults spoil the process's context.
fn alone(test: &str) -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if !standin::ready(test) || standin::real_gpu() {
        return None;
    }
    standin::device(1, 12000, 9, 0);
    Some(guard)
}

/// Three kinds of products, the float32 one split.
fn backends() -> [Cuda; 3] {
    [Dtype::F16, Dtype::BF16, Dtype::F32].map(|dtype| Cuda::new(0, dtype).unwrap().with_product(Product::Split))
}

#[test]
fn primitives_agree_with_naive_loops() {
    let Some(_guard) = alone("primitives_agree_with_naive_loops") else { return };
    for be in backends() {
        // Widths of a multiple of 8: one k, fewer than a tile, several stages' worth; a width that is none.
        for shape in [[1, 1, 1, 8], [16, 511, 1, 64], [130, 260, 2, 180], [5, 13, 2, 7]] {
            check(&be.clone().with_path(Path::Sparse), shape);
        }
        // In the dense products every size is a width. A box that lies outside, a tile that is not full.
        let dense = be.with_path(Path::Dense);
        [[70, 40, 2, 36], [136, 264, 2, 36], [8, 8, 1, 8]].into_iter().for_each(|shape| check(&dense, shape));
    }
}

#[test]
fn every_kernel_is_run() {
    let Some(_guard) = alone("every_kernel_is_run") else { return };
    // What the primitives' tests launch, on a device without and on one with the copy engine; widths that fit its boxes
    // and one that does not.
    for major in [8, 9] {
        standin::device(1, 12000, major, 0);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for (path, product) in [(Path::Sparse, Product::Ffma), (Path::Dense, Product::Split)] {
                let be = Cuda::new(0, dtype).unwrap().with_path(path).with_product(product);
                [[5, 13, 2, 7], [8, 24, 2, 8]].into_iter().for_each(|shape| check(&be, shape));
            }
            check_adam(&Cuda::new(0, dtype).unwrap());
        }
    }
    let ran = standin::kernels();
    let general =
        [include_str!("../ptx/rows.ptx"), include_str!("../ptx/latents.ptx"), include_str!("../ptx/product.ptx")];
    let names = |ptx: &'static str| ptx.split(".entry ").skip(1).map(|text| text.split_once('(').unwrap().0);
    let missing: Vec<&str> =
        general.into_iter().chain([PTX]).flat_map(names).filter(|name| !ran.iter().any(|r| r == name)).collect();
    assert!(missing.is_empty(), "kernels that no test runs: {missing:?}");
}

#[test]
fn an_older_driver_makes_the_general_products() {
    let Some(_guard) = alone("an_older_driver_makes_the_general_products") else { return };
    // CUDA 11.8 neither reads PTX 8.0 nor makes tensor maps.
    for (version, kernel) in [(11080, "product_nt_bf16"), (12000, "hopper_nt_bf16")] {
        standin::device(1, version, 9, 0);
        standin::kernels();
        check(&Cuda::new(0, Dtype::BF16).unwrap(), [3, 20, 2, 8]);
        let products: Vec<String> = standin::kernels().into_iter().filter(|name| name.contains("_nt_")).collect();
        assert_eq!(products, [kernel], "a driver of CUDA {version}");
    }
    let be = Cuda::new(0, Dtype::F32).unwrap().with_product(Product::Split).with_general_products();
    check(&be, [3, 20, 2, 8]);
    assert!(standin::kernels().iter().all(|name| !name.starts_with("hopper")));
}

#[test]
fn golden_cases_pass() {
    let Some(_guard) = alone("golden_cases_pass") else { return };
    let fixtures = standin::root().join("fixtures/golden");
    for name in ["fp32-small", "fp32-odd", "fp32-edge", "bf16-small", "fp16-small"] {
        let case = Case::load(&fixtures.join(name)).unwrap();
        let be = backends().into_iter().find(|be| Ok(be.dtype()) == case.cfg.enc_dtype().map_err(drop)).unwrap();
        for row in case.compare(be).unwrap() {
            assert_ne!(row.pass(), Some(false), "{row:?}");
        }
    }
}

#[test]
fn split_products_err_no_more_than_float32() {
    let Some(_guard) = alone("split_products_err_no_more_than_float32") else { return };
    let (shape @ [m, n, k], mut rng) = ([20, 33, 1000], Rng(23));
    let (x, w) = (rng.vec(m * k), rng.vec(n * k));
    let be = Cuda::new(0, Dtype::F32).unwrap();
    let ffma = product_error(&be.clone().with_product(Product::Ffma), shape, &x, &w);
    let split = product_error(&be.with_product(Product::Split), shape, &x, &w);
    println!("largest error in units of 2^-24 · Σ |x| · |w|: ffma {ffma:.2}, split {split:.2}");
    assert!(split <= 2.0 * ffma.max(1.0), "ffma {ffma}, split {split}");
}

/// The PTX of a kernel.
fn kernel(name: &str) -> &'static str {
    let text = &PTX[PTX.find(&format!(".entry {name}(")).unwrap()..];
    &text[..text.find("\n\n}\n").unwrap()]
}

/// A product of more steps than there are stages, the PTX of its kernel edited; what the interpreter says.
fn planted(name: &str, dtype: Dtype, edit: impl Fn(&str) -> String) -> String {
    let text = kernel(name);
    let edited = edit(text);
    assert_ne!(edited, text, "{name}: nothing was changed");
    standin::planted(text, &edited, || {
        let be = Cuda::new(0, dtype).unwrap().with_product(Product::Split);
        if name.contains("_tn_") {
            return of_weight_grad(&be.with_path(Path::Dense));
        }
        let ([batch, h, k], mut rng) = ([130, 40, 520], Rng(1));
        let w = be.upload(h, k, Values::F64(rng.vec(h * k))).unwrap();
        let (b, mut x, mut out) = (upload(&be, 1, h, &vec![0.0; h]), Default::default(), Default::default());
        be.fill(batch, k, &vec![1.0; batch * k], &mut x).unwrap();
        be.linear(&x, &w, &b, &mut out).unwrap();
        let error = be.norm(&out).err();
        error.map_or("nothing is wrong".to_owned(), |_| standin::fault())
    })
}

/// The product `tn` of that many steps; what the interpreter says.
fn of_weight_grad(be: &Cuda) -> String {
    let ([batch, h, k], mut rng) = ([520, 136, 40], Rng(1));
    let (mut x, mut acts, mut out) = <(_, <Cuda as Backend>::Latents, _)>::default();
    be.to_latents(&be.upload(batch, h, Values::F64(rng.vec(batch * h))).unwrap(), &mut acts).unwrap();
    be.fill(batch, k, &vec![1.0; batch * k], &mut x).unwrap();
    be.weight_grad(&acts, &x, Write::Set, &mut out).unwrap();
    be.norm(&out).err().map_or("nothing is wrong".to_owned(), |_| standin::fault())
}

#[test]
fn missing_synchronization_is_found() {
    let Some(_guard) = alone("missing_synchronization_is_found") else { return };
    for (name, dtype) in
        [("hopper_nt_bf16", Dtype::BF16), ("hopper_nt_split", Dtype::F32), ("hopper_tn_bf16", Dtype::BF16)]
    {
        // As it is, changed in a way that does not matter.
        assert_eq!(planted(name, dtype, |text| format!("{text}\n")), "nothing is wrong");
        // Each wait for a phase in turn ends at once: for the tiles that are read, for the stage that is overwritten.
        let waits = kernel(name).matches("mbarrier.try_wait").count();
        assert_eq!(waits, 2, "{name}: the producer's wait and the consumers'");
        for i in 0..waits {
            let fault = planted(name, dtype, |text| {
                let (at, _) = text.match_indices("mbarrier.try_wait").nth(i).unwrap();
                let end = at + text[at..].find(';').unwrap();
                format!("{}setp.eq.s32 over, 0, 0{}", &text[..at], &text[end..])
            });
            assert!(fault.contains("race in shared memory") || fault.contains("never written"), "{name} {i}: {fault}");
        }
        // Nobody says that a stage is free, or that a tile is expected.
        for what in ["mbarrier.arrive.shared::cta.b64 _", "mbarrier.arrive.expect_tx.shared::cta.b64 _"] {
            let fault = planted(name, dtype, |text| {
                let at = text.find(what).unwrap();
                let end = at + text[at..].find(';').unwrap() + 1;
                format!("{}{}", &text[..at], &text[end..])
            });
            assert!(fault.contains("all threads wait for each other") || fault.contains("race"), "{name}: {fault}");
        }
        // The sums are put where the other group still reads tiles.
        let fault = planted(name, dtype, |text| text.replacen("bar.sync 1, 256;", "", 1));
        assert!(fault.contains("race in shared memory"), "{name}: {fault}");
        // The products are not waited for before the stage is said to be free.
        let fault = planted(name, dtype, |text| text.replacen("wgmma.wait_group.sync.aligned 0;", "", 1));
        assert!(fault.contains("race in shared memory"), "{name}: {fault}");
    }
}
