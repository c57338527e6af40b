//! What goes wrong on a device: faults planted in the shipped PTX, which the interpreter must find (a test of the
//! tests), and failures of the device, which must become errors. One test program of its own: a fault spoils the whole
//! process's context.

#![cfg(feature = "cuda")]

mod primitives;
mod standin;

use crosscoder::activations::Activations;
use crosscoder::backend::cuda::{Cuda, Product};
use crosscoder::backend::{Backend, Picked, pick};
use crosscoder::run::{self, Ended, Event};
use crosscoder::sparse::Path;
use crosscoder::trainer::Trainer;
use crosscoder::{Config, CrossCoder, Dtype, ErrorKind, Result, Tensor, Values};
use primitives::*;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

const PTX: [&str; 3] =
    [include_str!("../ptx/rows.ptx"), include_str!("../ptx/latents.ptx"), include_str!("../ptx/product.ptx")];

/// One test at a time: they share the device.
fn alone(test: &str) -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    (standin::ready(test) && !standin::real_gpu()).then_some(guard)
}

/// The PTX of a kernel.
fn kernel(name: &str) -> &'static str {
    let header = format!(".entry {name}(");
    let module = PTX.iter().find(|ptx| ptx.contains(&header)).unwrap_or_else(|| panic!("no kernel {name}"));
    let text = &module[module.find(&header).unwrap()..];
    &text[..text.find("\n\n}\n").unwrap()]
}

/// Each `what` of a kernel in turn replaced by `with`: what the interpreter says about `run` then, or nothing.
fn plant_each(name: &str, what: &str, with: &str, run: Run) -> Vec<Option<String>> {
    let text = kernel(name);
    run().unwrap_or_else(|e| panic!("{name} as it is: {e}"));
    let places: Vec<usize> = text.match_indices(what).map(|(i, _)| i).collect();
    assert!(!places.is_empty(), "{name} has no {what:?}");
    let plant = |at: &usize| {
        let planted = format!("{}{with}{}", &text[..*at], &text[*at + what.len()..]);
        standin::planted(text, &planted, || run().is_err().then(standin::fault))
    };
    places.iter().map(plant).collect()
}

/// A product whose loop over k turns several times and whose rows can be copied 16 bytes at a time.
fn encode(dtype: Dtype, product: Product) -> Result<()> {
    let be = Cuda::new(0, dtype)?.with_product(product);
    let ([batch, h, k], mut rng) = ([70, 40, 144], Rng(1));
    let w = be.upload(h, k, Values::F64(rng.vec(h * k)))?;
    let (b, mut x, mut out) = (be.upload(1, h, Values::F64(rng.vec(h)))?, Default::default(), Default::default());
    be.fill(batch, k, &rng.vec(batch * k).iter().map(|v| *v as f32).collect::<Vec<_>>(), &mut x)?;
    be.linear(&x, &w, &b, &mut out)?;
    be.norm(&out).map(drop)
}

/// A run of kernels.
type Run = fn() -> Result<()>;

fn encode_f32() -> Result<()> {
    encode(Dtype::F32, Product::Ffma)
}

fn encode_split() -> Result<()> {
    encode(Dtype::F32, Product::Split)
}

fn column_sums() -> Result<()> {
    let (be, mut out) = (Cuda::new(0, Dtype::F32)?, Default::default());
    be.column_sums(&upload(&be, 3, 3, &[1.0; 9]), &mut out)?;
    be.norm(&out).map(drop)
}

fn encode_f16() -> Result<()> {
    encode(Dtype::F16, Product::Auto)
}

/// Compaction of rows of more words than a block has threads, and sums of more entries than that.
fn decode() -> Result<()> {
    decode_wide(9)
}

fn decode_wide(k: usize) -> Result<()> {
    let be = Cuda::new(0, Dtype::F32)?.with_path(Path::Sparse);
    let ([batch, h], mut rng) = ([2, 4600], Rng(1));
    let (mut x, mut acts, mut rec) = <(_, <Cuda as Backend>::Latents, _)>::default();
    be.fill(batch, h, &rng.sparse(batch * h).iter().map(|v| *v as f32).collect::<Vec<_>>(), &mut x)?;
    be.to_latents(&x, &mut acts)?;
    let (w, c) = (be.upload(h, k, Values::F64(rng.vec(h * k)))?, be.upload(1, k, Values::F64(rng.vec(k)))?);
    be.decode(&acts, &w, &c, &mut rec)?;
    be.active_counts(&acts).map(drop)
}

#[test]
fn a_missing_barrier_is_found() {
    let Some(_guard) = alone("a_missing_barrier_is_found") else { return };
    let mut found = 0;
    // The last number: barriers that the kernel could do without. block_sum's second one lets a block call it again,
    // which these kernels do not; product_nt_f32's last one guards the sums' memory after the last half is stored.
    let kernels: [(&str, Run, usize); 7] = [
        ("product_nt_f32", encode_f32, 1),
        ("product_nt_f16", encode_f16, 0),
        ("product_nt_split", encode_split, 0),
        ("split_rows", encode_split, 0),
        ("gather_f32", decode, 0),
        ("support_fill_f32", decode, 0),
        ("norm_parts_f32", encode_f32, 1),
    ];
    for (name, run, spare) in kernels {
        let faults = plant_each(name, "bar.sync \t0;", "", run);
        let missed = faults.iter().filter(|f| f.is_none()).count();
        assert_eq!(missed, spare, "{name}: {faults:?}");
        for fault in faults.into_iter().flatten() {
            assert!(fault.starts_with(name) && fault.contains("shared memory"), "{name}: {fault}");
            found += 1;
        }
    }
    println!("{found} missing barriers found");
}

#[test]
fn an_asynchronous_copy_that_is_not_waited_for_is_found() {
    let Some(_guard) = alone("an_asynchronous_copy_that_is_not_waited_for_is_found") else { return };
    let kernels: [(&str, Run, u32); 2] = [("product_nt_f16", encode_f16, 2), ("product_nt_split", encode_split, 1)];
    for (name, run, groups) in kernels {
        let (wait, longer) = (format!("cp.async.wait_group {groups};"), format!("cp.async.wait_group {};", groups + 1));
        for fault in plant_each(name, &wait, &longer, run) {
            assert!(fault.as_deref().is_some_and(|f| f.contains("shared memory")), "{name}: {fault:?}");
        }
    }
}

#[test]
fn an_access_out_of_bounds_is_found() {
    let Some(_guard) = alone("an_access_out_of_bounds_is_found") else { return };
    // The bound `k < cols` of a kernel, off by one: the last block reads one element too many.
    let faults = plant_each("column_total_f32", "setp.ge.u32", "setp.gt.u32", column_sums);
    assert!(faults[0].as_deref().is_some_and(|f| f.contains("global memory out of bounds: 4 bytes")), "{faults:?}");
    // A copy to shared memory, behind its end.
    let text = kernel("product_nt_f16");
    let start = text.find("cp.async.cg.shared.global [").unwrap();
    let copy = &text[start..start + text[start..].find(']').unwrap()];
    let faults = plant_each("product_nt_f16", copy, &format!("{copy}+80000"), encode_f16);
    assert!(faults[0].as_deref().is_some_and(|f| f.contains("shared memory out of bounds: 16 bytes")), "{faults:?}");
}

#[test]
fn an_access_that_is_not_aligned_is_found() {
    let Some(_guard) = alone("an_access_that_is_not_aligned_is_found") else { return };
    // Each load of 16 bytes in turn is made four bytes further on: a row of the decoder, a tile in shared memory.
    let kernels: [(&str, &str, Run); 2] =
        [("gather_f32", "ld.global.nc.v4", || decode_wide(12)), ("product_nt_f32", "ld.shared.v4", encode_f32)];
    for (name, load, run) in kernels {
        let text = kernel(name);
        let end = |at: usize| at + text[at..].find(']').unwrap();
        let mut found = 0;
        for load in
            text.match_indices(load).map(|(at, _)| &text[at..end(at)]).filter(|load| !load.contains('+')).take(8)
        {
            // Loads that this run does not come to stay unseen.
            for fault in plant_each(name, load, &format!("{load}+4"), run).into_iter().flatten() {
                assert!(fault.contains("not aligned"), "{name}: {fault}");
                found += 1;
            }
        }
        assert!(found > 0, "{name}: none is found");
    }
}

#[test]
fn shared_memory_that_was_never_written_is_found() {
    let Some(_guard) = alone("shared_memory_that_was_never_written_is_found") else { return };
    // Each write of a warp's part of a sum in turn is left out.
    let text = kernel("norm_parts_f32");
    let at = text.find("st.shared").unwrap();
    let write = &text[at..at + text[at..].find(';').unwrap() + 1];
    let faults = plant_each("norm_parts_f32", write, "", encode_f32);
    assert!(faults[0].as_deref().is_some_and(|f| f.contains("never written")), "{faults:?}");
}

#[test]
fn after_a_fault_every_call_is_an_error_and_a_new_context_works() {
    let Some(_guard) = alone("after_a_fault_every_call_is_an_error_and_a_new_context_works") else { return };
    let text = kernel("column_total_f32");
    let planted = text.replacen("setp.ge.u32", "setp.gt.u32", 1);
    let be = standin::planted(text, &planted, || Cuda::new(0, Dtype::F32).unwrap());
    let kept = upload(&be, 2, 2, &[1.0; 4]);
    let mut m = Default::default();
    be.column_sums(&kept, &mut m).unwrap(); // Begun; nobody has waited yet.
    let mut out = [0.0; 4];
    for _ in 0..2 {
        let error = be.download(&kept, 0, &mut out).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("700"), "{error}");
        assert!(be.norm(&kept).is_err() && be.upload(1, 1, Values::F32(vec![1.0])).is_err());
    }
    drop((m, kept, be)); // The last user of the context.
    let be = Cuda::new(0, Dtype::F32).unwrap();
    assert_eq!(be.norm(&upload(&be, 2, 2, &[1.0; 4])).unwrap(), 2.0);
}

#[test]
fn out_of_memory_is_an_error_after_which_work_goes_on() {
    let Some(_guard) = alone("out_of_memory_is_an_error_after_which_work_goes_on") else { return };
    let be = Cuda::new(0, Dtype::F32).unwrap();
    standin::memory(1 << 20);
    let m = upload(&be, 100, 1000, &vec![1.0; 100_000]);
    let error = be.upload(200, 1000, Values::F32(vec![1.0; 200_000])).err().expect("0.8 MB of 0.6");
    assert_eq!(error.kind(), ErrorKind::Device);
    let text = error.to_string();
    assert!(text.contains("out of memory: 800000 bytes needed, 648576 of 1048576 free"), "{text}");
    assert_eq!(be.norm(&m).unwrap(), 100_000f32.sqrt());
    drop(m); // Its memory is kept for others, and given back when they need another size.
    let other = be.upload(200, 1000, Values::F32(vec![1.0; 200_000])).unwrap();
    assert_eq!(be.norm(&other).unwrap(), 200_000f32.sqrt());
    standin::memory(usize::MAX);
}

#[test]
fn a_lost_device_is_an_error() {
    let Some(_guard) = alone("a_lost_device_is_an_error") else { return };
    let be = Cuda::new(0, Dtype::BF16).unwrap();
    let m = upload(&be, 2, 2, &[1.0; 4]);
    standin::lose(46); // cudaErrorDevicesUnavailable: a code that cust does not know.
    let error = be.norm(&m).unwrap_err();
    assert!(error.to_string().contains("(999); the device or its driver may be lost"), "{error}");
    standin::lose(0);
}

fn cfg(dtype: Dtype) -> Config {
    let mut cfg = Config::default();
    let sizes = [("d_in", 20), ("dict_size", 150), ("batch_size", 37), ("buffer_mult", 4), ("num_tokens", 37 * 10)];
    sizes.into_iter().for_each(|(key, value)| cfg.set(key, value));
    [("log_every", 3), ("save_every", 4)].into_iter().for_each(|(key, value)| cfg.set(key, value));
    cfg.set("lr", 1e-3);
    cfg.set("enc_dtype", dtype.enc_name().unwrap());
    cfg
}

#[test]
fn a_step_brings_one_batch_up_and_numbers_down() {
    let Some(_guard) = alone("a_step_brings_one_batch_up_and_numbers_down") else { return };
    let (batch, width, mut rng) = (37, 40, Rng(9));
    for dtype in [Dtype::F32, Dtype::BF16] {
        for path in [Path::Sparse, Path::Dense] {
            let be = Cuda::new(0, dtype).unwrap().with_path(path);
            let mut trainer = Trainer::new(CrossCoder::new_on(be.clone(), cfg(dtype)).unwrap()).unwrap();
            let x: Vec<f32> = rng.vec(batch * width).iter().map(|v| *v as f32).collect();
            trainer.step(&x).unwrap();
            standin::counts();
            trainer.step(&x).unwrap();
            let counts = standin::counts();
            // In the dtype, from pinned memory, on a stream of its own.
            assert_eq!(
                (counts.ups, counts.up_bytes),
                (1, (batch * width * dtype.size_bytes()) as u64),
                "{dtype} {path:?}"
            );
            assert_eq!((counts.pageable_ups, counts.ups_in_turn), (0, 0), "{dtype} {path:?}");
            // Down come at most twelve numbers for each row, two for each norm of a gradient, and the support's size: a
            // twelfth of one weight.
            assert!(counts.down_bytes <= 4 * (12 * batch as u64 + 8 + 1), "{dtype} {path:?}: {counts:?}");
            println!("{dtype} {path:?}: {counts:?}");
            // Nobody waits for a batch on its way up.
            be.fill(batch, width, &x, &mut Default::default()).unwrap();
            assert_eq!((standin::counts().waits, standin::counts().downs), (0, 0), "{dtype} {path:?}");
        }
    }
}

/// A directory of its own for a test, empty.
fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("crosscoder-cuda-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    dir
}

/// Name and bytes of each file of a run.
fn files(out: &std::path::Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(out.join("version_0")).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[test]
fn a_run_whose_device_fails_keeps_its_checkpoint_and_goes_on() {
    let Some(_guard) = alone("a_run_whose_device_fails_keeps_its_checkpoint_and_goes_on") else { return };
    static NEVER: AtomicBool = AtomicBool::new(false);
    let rows: Vec<f32> = Rng(3).vec(200 * 40).iter().map(|v| *v as f32).collect();
    let acts = Activations::from_tensor("rows", Tensor::new(vec![200, 2, 20], Values::F32(rows)).unwrap()).unwrap();
    let train = |run: run::Run, watch: &mut dyn FnMut(Event<'_>)| -> Result<Ended<Cuda>> {
        // The support has another size in each step, and needs new memory.
        run.train(Cuda::new(0, Dtype::F32)?.with_path(Path::Sparse), &acts, &NEVER, watch)
    };
    let whole = folder("whole");
    train(run::Run::create(&whole, cfg(Dtype::F32)).unwrap(), &mut |_| {}).unwrap();
    // What the device does in step 7 of 10, checkpoints being saved each 4, and what the error says.
    let failures: [(&str, &str, fn()); 6] = [
        ("illegal-access", "(700); the device cannot be used again", || standin::fail_after(5, 700)),
        ("in-the-backward-pass", "(700)", || standin::fail_after(25, 700)),
        ("launch-failed", "(719); the device cannot be used again", || standin::fail_after(9, 719)),
        ("ecc", "(214)", || standin::lose(214)),
        ("lost", "(999); the device or its driver may be lost", || standin::lose(46)),
        ("out-of-memory", "out of memory", || standin::memory(1)),
    ];
    for (name, said, fail) in failures {
        let out = folder(name);
        let error = train(run::Run::create(&out, cfg(Dtype::F32)).unwrap(), &mut |event| {
            if let Event::Step { step: 6, .. } = event {
                fail();
            }
        });
        standin::memory(usize::MAX);
        let error = error.err().unwrap_or_else(|| panic!("{name}: the run went through"));
        let text = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Device, "{name}: {text}");
        assert!(text.contains(said), "{name}: {text}");
        assert!(text.contains("the newest checkpoint is") && text.contains("(step 4)"), "{name}: {text}");
        CrossCoder::load(out.join("version_0")).unwrap_or_else(|e| panic!("{name}: {e}"));
        let ended =
            train(run::Run::resume(&out).unwrap().unwrap(), &mut |_| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(ended.finished && files(&out) == files(&whole), "{name}: the run that went on ends elsewhere");
        std::fs::remove_dir_all(out).unwrap();
    }
    std::fs::remove_dir_all(whole).unwrap();
}

#[test]
fn why_there_is_no_gpu() {
    let Some(_guard) = alone("why_there_is_no_gpu") else { return };
    let cases = [
        ((0, 12000, 8, 0), "no device"),
        ((1, 10020, 8, 0), "driver too old for this module: rows needs a driver of CUDA 11.0, this one is of 10.2"),
        ((1, 12000, 7, 5), "PTX interpreter has compute capability 7.5; the kernels need 8.0"),
    ];
    for ((devices, version, major, minor), why) in cases {
        standin::device(devices, version, major, minor);
        let error = Cuda::new(0, Dtype::F32).err().unwrap_or_else(|| panic!("{why}"));
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Device, why));
        let Picked::Cpu(_, Some(line)) = pick("cuda", Dtype::F32).unwrap() else { panic!("a GPU that {why}") };
        assert_eq!(line, format!("cuda:0: {why}; the CPU is used"));
    }
    standin::device(1, 12000, 8, 0);
    let error = Cuda::new(1, Dtype::F32).err().unwrap().to_string();
    assert_eq!(error, "no device 1; there are 1, counted from 0");
    let Picked::Cuda(be) = pick("cuda:0", Dtype::F32).unwrap() else { panic!("the stand-in is not picked") };
    assert_eq!(be.describe(), "PTX interpreter, compute capability 8.0");
}
