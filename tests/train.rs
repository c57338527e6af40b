//! Training as an embedding user meets it: schedule, buffer, resuming, bad numbers, what is left on the disk.

use crosscoder::activations::Activations;
use crosscoder::analysis::{DecoderNorms, Thresholds, activation_stats};
use crosscoder::autodiff::Parameters;
use crosscoder::backend::{Backend, Cpu};
use crosscoder::buffer::{Buffer, HeldOut, Refresh};
use crosscoder::checkpoint;
use crosscoder::evaluation::{Batches, dead, evaluate};
use crosscoder::files::TensorFile;
use crosscoder::init::initial_weights;
use crosscoder::normalisation::{estimate, factors, fold, set_factors};
use crosscoder::optim::{Adam, clip_grad_norm};
use crosscoder::pt::{TensorSource, write_state_dict};
use crosscoder::rng::Mt19937;
use crosscoder::run::{Ended, Event, Run};
use crosscoder::trainer::{Schedule, Trainer};
use crosscoder::{Config, CrossCoder, Dtype, ErrorKind, Tensor, Values};
use ndarray::ArrayView3;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

static NEVER: AtomicBool = AtomicBool::new(false);

/// A directory of its own for a test, empty.
fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("crosscoder-train-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    dir
}

/// Rows that a few directions make up, so that there is something to learn.
fn rows(n: usize, d_in: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut number = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let directions: Vec<f32> = (0..8 * 2 * d_in).map(|_| number()).collect();
    let mut out = Vec::with_capacity(n * 2 * d_in);
    for _ in 0..n {
        let weights: Vec<f32> = (0..8).map(|_| (number() * 3.0).max(0.0)).collect();
        for k in 0..2 * d_in {
            let sum: f32 = (0..8).map(|j| weights[j] * directions[j * 2 * d_in + k]).sum();
            out.push(sum + 0.05 * number());
        }
    }
    out
}

fn activations(n: usize, d_in: usize) -> Activations {
    let values = Values::F32(rows(n, d_in)).cast(Dtype::BF16).unwrap();
    Activations::from_tensor("rows in memory", Tensor::new(vec![n, 2, d_in], values).unwrap()).unwrap()
}

fn cfg(keys: &[(&str, serde_json::Value)]) -> Config {
    let mut cfg = Config::default();
    let own = [
        ("d_in", 6.into()),
        ("dict_size", 24.into()),
        ("batch_size", 16.into()),
        ("buffer_mult", 4.into()),
        ("num_tokens", (16 * 40).into()),
        ("lr", 1e-2.into()),
        ("log_every", 3.into()),
        ("save_every", 9.into()),
        ("device", "cpu".into()),
    ];
    for (key, value) in own.iter().chain(keys) {
        cfg.set(key, value.clone());
    }
    cfg
}

fn backend(run: &Run) -> Cpu {
    Cpu::new(run.cfg().enc_dtype().unwrap())
}

/// Trains to the end, or until `stop_at` steps are taken.
fn train(run: Run, acts: &Activations, stop_at: u64) -> crosscoder::Result<Ended<Cpu>> {
    let backend = backend(&run);
    let stop = AtomicBool::new(false);
    run.train(backend, acts, &stop, |event| {
        if let Event::Step { step, .. } = event {
            stop.store(step >= stop_at, Ordering::Relaxed);
        }
    })
}

/// Name and bytes of each file in a directory.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[test]
fn the_schedule_is_the_originals() {
    let cfg = cfg(&[("num_tokens", 1607.into()), ("l1_coeff", 2.into()), ("lr", 0.5.into())]);
    let schedule = Schedule::from_cfg(&cfg).unwrap();
    assert_eq!(schedule.total_steps, 100);
    // Warm-up over 5 of 100 steps, decay over the last 20.
    assert_eq!([0, 1, 4, 5, 99].map(|s| schedule.l1_coeff(s)), [0.0, 0.4, 1.6, 2.0, 2.0]);
    assert_eq!([0, 79, 80].map(|s| schedule.lr(s)), [0.5, 0.5, 0.5]);
    for (step, lr) in [(81, 0.475), (90, 0.25), (100, 0.0)] {
        assert!((schedule.lr(step) - lr).abs() < 1e-15, "{step}");
    }
}

#[test]
fn a_run_learns_and_tells_what_it_learnt() {
    let (acts, out) = (activations(400, 6), folder("learns"));
    let ended = train(
        Run::create(&out, cfg(&[("num_tokens", 16_000.into()), ("l1_coeff", 0.1.into())])).unwrap(),
        &acts,
        u64::MAX,
    )
    .unwrap();
    assert!(ended.finished);
    assert_eq!(ended.step, 1000);
    let crosscoder = &ended.crosscoder;
    let factors = factors(crosscoder.cfg()).unwrap().unwrap();
    let batches = Batches::new(&acts, 0..400, 64, &factors);
    let evaluation = evaluate(crosscoder, &batches).unwrap();
    assert_eq!(evaluation.rows, 400);
    assert!(evaluation.get("explained_variance").unwrap() > 0.8, "{evaluation:?}");
    // Dead latents and groups are those of the model diff.
    let norms = DecoderNorms::of(crosscoder).unwrap();
    let stats = activation_stats(crosscoder, &norms, &batches, 0, |_| {}).unwrap();
    assert_eq!(dead(crosscoder, &batches).unwrap() as u64, stats.dead());
    assert_eq!(norms.groups(&Thresholds::default()).iter().map(|(_, size)| size).sum::<u64>(), 24);
    // The log has a line every three steps, by the original's names in its order.
    let log = std::fs::read_to_string(out.join("version_0/metrics.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 334);
    let first: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    let names: Vec<&str> = first.as_object().unwrap().keys().map(String::as_str).collect();
    let originals = ["loss", "l2_loss", "l1_loss", "l0_loss", "l1_coeff", "lr", "explained_variance"];
    assert_eq!(names[0], "step");
    assert_eq!(names[1..8], originals);
    assert_eq!(names[8..], ["explained_variance_A", "explained_variance_B"]);
    assert_eq!(first["step"], 1);
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn a_run_stopped_anywhere_goes_on_bit_for_bit() {
    for (dtype, refresh) in [("fp32", false), ("bf16", false), ("fp32", true)] {
        let keys = [("enc_dtype", dtype.into()), ("original_refresh", refresh.into()), ("val_fraction", 0.1.into())];
        let acts = activations(150, 6);
        let (whole, parts) = (folder("whole"), folder("parts"));
        train(Run::create(&whole, cfg(&keys)).unwrap(), &acts, u64::MAX).unwrap();
        let mut run = Run::create(&parts, cfg(&keys)).unwrap();
        // What is saved where a part ends is replaced by the next regular checkpoint.
        for stop_at in [1, 2, 9, 17, 30, u64::MAX] {
            let ended = train(run, &acts, stop_at).unwrap();
            assert_eq!(ended.step, stop_at.min(40));
            if ended.finished {
                break;
            }
            run = Run::resume(&parts).unwrap().unwrap();
        }
        let (whole_files, part_files) = (files(&whole.join("version_0")), files(&parts.join("version_0")));
        assert_eq!(whole_files.keys().collect::<Vec<_>>(), part_files.keys().collect::<Vec<_>>());
        for (name, bytes) in &whole_files {
            assert!(part_files[name] == *bytes, "{dtype}: {name} differs");
        }
        assert_eq!(whole_files.len(), 5 * 2 + 2, "{:?}", whole_files.keys());
        for out in [whole, parts] {
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn a_run_without_its_log_begins_another() {
    let acts = activations(150, 6);
    let (whole, parts) = (folder("whole-log"), folder("parts-log"));
    train(Run::create(&whole, cfg(&[])).unwrap(), &acts, u64::MAX).unwrap();
    train(Run::create(&parts, cfg(&[])).unwrap(), &acts, 17).unwrap();
    let log = parts.join("version_0/metrics.jsonl");
    std::fs::write(&log, "{").unwrap();
    let error = train(Run::resume(&parts).unwrap().unwrap(), &acts, u64::MAX).err().unwrap().to_string();
    assert!(error.contains("metrics.jsonl: has 1 bytes; the run had written "), "{error}");
    std::fs::remove_file(&log).unwrap();
    let run = Run::resume(&parts).unwrap().unwrap();
    assert!(run.lacks_log());
    train(run, &acts, u64::MAX).unwrap();
    assert!(!Run::resume(&parts).unwrap().unwrap().lacks_log());
    let [whole_files, mut part_files] = [&whole, &parts].map(|out| files(&out.join("version_0")));
    let ours = part_files.insert("metrics.jsonl".into(), whole_files["metrics.jsonl"].clone()).unwrap();
    assert!(!ours.is_empty() && whole_files["metrics.jsonl"].ends_with(&ours));
    // The state tells the length of the log.
    let [whole_state, part_state] = [&whole_files, &part_files].map(|files| files["resume.pt"].len());
    assert_eq!(whole_state, part_state);
    part_files.insert("resume.pt".into(), whole_files["resume.pt"].clone());
    assert!(whole_files == part_files);
    for out in [whole, parts] {
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_run_does_not_depend_on_the_threads() {
    // Large enough that the backend uses more than one.
    let acts = activations(600, 64);
    let keys =
        [("d_in", 64.into()), ("dict_size", 640.into()), ("batch_size", 128.into()), ("num_tokens", 1024.into())];
    let mut found = Vec::new();
    for threads in [1, 2, 3, 7] {
        let out = folder(&format!("threads-{threads}"));
        let run = Run::create(&out, cfg(&keys)).unwrap();
        let backend = backend(&run).with_threads(threads);
        run.train(backend, &acts, &NEVER, |_| ()).unwrap();
        found.push(files(&out.join("version_0")));
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert!(found.iter().all(|files| *files == found[0]));
}

#[test]
fn the_second_run_in_a_directory_refuses() {
    let (acts, out) = (activations(100, 6), folder("two"));
    let first = Run::create(&out, cfg(&[])).unwrap();
    for second in [Run::create(&out, cfg(&[])).map(|_| ()), Run::resume(&out).map(|_| ())] {
        let error = second.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("another run"), "{error}");
    }
    train(first, &acts, u64::MAX).unwrap();
    // Its end gives the directory back.
    assert!(Run::resume(&out).unwrap().is_some());
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn a_poisoned_row_stops_the_run_and_is_named() {
    let mut values = rows(200, 6);
    values[137 * 12 + 8] = f32::NAN;
    let tensor = Tensor::new(vec![200, 2, 6], Values::F32(values)).unwrap();
    let out = folder("poisoned");
    let acts = Activations::from_tensor("rows in memory", tensor).unwrap();
    let error = train(Run::create(&out, cfg(&[])).unwrap(), &acts, u64::MAX).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NonFinite);
    let message = error.to_string();
    assert!(message.contains("rows in memory, row 137: model B, element 2: NaN is not finite"), "{message}");
    // Handed out unchecked, it is the step that finds it, and names the row of the set all the same. Factors are given,
    // as their estimate would be nan.
    let acts = acts.unchecked();
    let error =
        train(Run::create(&out, cfg(&[("normalisation_factor", vec![1.0, 1.0].into())])).unwrap(), &acts, u64::MAX);
    let message = error.err().unwrap().to_string();
    assert!(message.contains("rows in memory, row 137: step ") && message.contains("l2_loss is NaN"), "{message}");
    // So it does where a value is finite and its square is not.
    let mut values = rows(200, 6);
    values[137 * 12 + 2] = -3e38;
    let tensor = Tensor::new(vec![200, 2, 6], Values::F32(values)).unwrap();
    let acts = Activations::from_tensor("rows in memory", tensor).unwrap();
    let error =
        train(Run::create(&out, cfg(&[("normalisation_factor", vec![1.0, 1.0].into())])).unwrap(), &acts, u64::MAX);
    let message = error.err().unwrap().to_string();
    assert!(message.contains("rows in memory, row 137: step ") && message.contains("at model A, 2"), "{message}");
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn numbers_that_overflow_stop_the_run_and_leave_the_last_checkpoint() {
    // In float16 Adam's eps is 0, so the first step makes parameters nan; the second finds out.
    let (acts, out) = (activations(100, 6), folder("overflow"));
    let keys = [("enc_dtype", "fp16".into()), ("save_every", 1.into())];
    let error = train(Run::create(&out, cfg(&keys)).unwrap(), &acts, u64::MAX).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NonFinite);
    let message = error.to_string();
    assert!(message.contains("cannot save") && message.contains("is not finite"), "{message}");
    assert!(!out.join("version_0/0.pt").exists());
    // A learning rate that throws bfloat16 out of its range, after good checkpoints.
    let keys = [("enc_dtype", "bf16".into()), ("save_every", 1.into()), ("lr", 1e10.into())];
    let error = train(Run::create(&out, cfg(&keys)).unwrap(), &acts, u64::MAX).err().unwrap();
    let message = error.to_string();
    assert!(message.contains("version_1/0.pt (step 1)") && message.contains("step 1: "), "{message}");
    let weights = files(&out.join("version_1"))["0.pt"].clone();
    // Told to go on, it does as the original does.
    let run = Run::resume(&out).unwrap().unwrap().keep_going();
    assert!(train(run, &acts, u64::MAX).unwrap().finished);
    assert_eq!(files(&out.join("version_1"))["0.pt"], weights);
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn other_activations_or_sizes_are_refused_when_a_run_goes_on() {
    let (acts, out) = (activations(150, 6), folder("other"));
    train(Run::create(&out, cfg(&[])).unwrap(), &acts, 5).unwrap();
    // A run that is over is not evaluated on another set either.
    for stop_at in [5, u64::MAX] {
        train(Run::resume(&out).unwrap().unwrap(), &acts, stop_at).unwrap();
        for other in [activations(151, 6), activations(150, 7)] {
            let error = train(Run::resume(&out).unwrap().unwrap(), &other, u64::MAX).err().unwrap();
            assert!(error.to_string().contains("other activations"), "{error}");
        }
    }
    let error = train(Run::create(&out, cfg(&[])).unwrap(), &activations(150, 7), u64::MAX).err().unwrap();
    assert!(error.to_string().contains("the activations have d_in 7, the cfg 6"), "{error}");
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn a_cfg_that_was_changed_beside_its_checkpoint_is_refused() {
    let (acts, out) = (activations(150, 6), folder("changed"));
    // A regular checkpoint, whose parameters are not in the state.
    train(Run::create(&out, cfg(&[])).unwrap(), &acts, 9).unwrap();
    let path = out.join("version_0/0_cfg.json");
    let mut changed = checkpoint::read_cfg(&path).unwrap();
    changed.set("lr", 0.5);
    std::fs::write(&path, changed.to_json()).unwrap();
    let error = train(Run::resume(&out).unwrap().unwrap(), &acts, u64::MAX).err().unwrap().to_string();
    assert!(error.contains("0_cfg.json") && error.contains("lr") && error.contains("is 0.5; the run"), "{error}");
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
#[cfg(unix)]
fn a_run_writes_nothing_into_a_directory_that_is_not_its_own_any_more() {
    let (acts, whole) = (activations(150, 6), folder("undisturbed"));
    train(Run::create(&whole, cfg(&[])).unwrap(), &acts, u64::MAX).unwrap();
    // Trains, and does something after step 12.
    let disturbed = |out: &Path, disturb: &mut dyn FnMut()| {
        let run = Run::create(out, cfg(&[])).unwrap();
        let backend = backend(&run);
        run.train(backend, &acts, &NEVER, |event| {
            if matches!(event, Event::Step { step: 12, .. }) {
                disturb();
            }
        })
    };
    let (out, moved) = (folder("taken"), folder("moved"));
    let mut other = None;
    let ended = disturbed(&out, &mut || {
        std::fs::rename(&out, &moved).unwrap();
        other = Some((Run::create(&out, cfg(&[])).unwrap(), files(&out.join("version_0"))));
    });
    let error = ended.err().unwrap();
    assert!(error.kind() == ErrorKind::Locked && error.to_string().contains("step 18: cannot save"), "{error}");
    assert_eq!(files(&out.join("version_0")), other.unwrap().1);
    assert!(moved.join("version_0/0.pt").exists());
    // Where the lock was removed and nobody has come, it is taken again.
    std::fs::remove_dir_all(&out).unwrap();
    disturbed(&out, &mut || std::fs::remove_file(out.join(".lock")).unwrap()).unwrap();
    assert!(out.join(".lock").exists());
    assert_eq!(files(&out.join("version_0")), files(&whole.join("version_0")));
    for out in [out, moved, whole] {
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
#[cfg(unix)]
fn a_run_that_was_handed_over_writes_through_no_link() {
    let (acts, out) = (activations(150, 6), folder("links"));
    let dir = train(Run::create(&out, cfg(&[])).unwrap(), &acts, 9).unwrap().checkpoint.unwrap();
    let dir = dir.parent().unwrap();
    let precious = out.join("precious");
    for name in ["metrics.jsonl", "resume.pt", "0.pt", "0_cfg.json", "1.pt", "1_cfg.json", "report.html", "../.lock"] {
        let (path, aside) = (dir.join(name), out.join("aside"));
        let kept = std::fs::rename(&path, &aside).is_ok();
        match kept {
            true => std::fs::copy(&aside, &precious).map(drop).unwrap(),
            false => std::fs::write(&precious, "precious").unwrap(),
        }
        let before = std::fs::read(&precious).unwrap();
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        let said = Run::resume(&out).map(|run| train(run.unwrap(), &acts, u64::MAX)).err().unwrap().to_string();
        assert!(
            said.contains(name.trim_start_matches("../")) && said.contains("is a link; a run writes here"),
            "{said}"
        );
        assert_eq!(std::fs::read(&precious).unwrap(), before);
        std::fs::remove_file(&path).unwrap();
        if kept {
            std::fs::rename(&aside, &path).unwrap();
        }
    }
    std::fs::create_dir(dir.join("1_cfg.json")).unwrap();
    let said = Run::resume(&out).unwrap_err().to_string();
    assert!(said.contains("1_cfg.json: is no regular file"), "{said}");
    std::fs::remove_dir(dir.join("1_cfg.json")).unwrap();
    // A link of the user's own is nobody's business.
    std::os::unix::fs::symlink("0.pt", dir.join("latest.pt")).unwrap();
    assert!(train(Run::resume(&out).unwrap().unwrap(), &acts, u64::MAX).unwrap().finished);
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn a_state_of_a_mebibyte_of_text_is_none() {
    let out = folder("meta");
    let dir = Run::create(&out, cfg(&[])).unwrap().dir().to_owned();
    let state = |bytes: usize| {
        let mut text = br#"{"format":2}"#.to_vec();
        text.resize(bytes, b' ');
        let meta = Tensor::new(vec![bytes], Values::U8(text)).unwrap();
        std::fs::write(dir.join("resume.pt"), write_state_dict(Vec::new(), "resume", &[("meta", &meta)]).unwrap())
            .unwrap();
        Run::resume(&out).unwrap_err().to_string()
    };
    assert!(state(1 << 20).contains("format 2; this version reads 1"));
    assert!(
        state((1 << 20) + 1).contains("resume.pt: is no state of a run: meta has 1048577 bytes; the limit is 1048576")
    );
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn a_state_that_contradicts_itself_is_none() {
    let (acts, out) = (activations(150, 6), folder("contradicts"));
    let run = Run::create(&out, cfg(&[])).unwrap();
    let path = run.dir().join("resume.pt");
    train(run, &acts, 17).unwrap();
    let mut file = TensorFile::open(&path).unwrap();
    let names: Vec<String> = file.tensors().iter().map(|t| t.name.clone()).collect();
    let tensors: Vec<Tensor> = (0..names.len()).map(|i| file.read(i).unwrap()).collect();
    let Values::U8(meta) = tensors[0].values() else { panic!("{names:?}") };
    let meta = String::from_utf8(meta.clone()).unwrap();
    for (now, then, say) in [
        ("\"step\":17", "\"step\":41", "is of a run that is not over at step 41 of 40"),
        ("\"step\":17", "\"step\":40", "is of a run that is not over at step 40 of 40"),
        ("\"finished\":false", "\"finished\":true", "is of a run that is over at step 17 of 40"),
        ("\"checkpoint\":1", "\"checkpoint\":null", "is no state of a run: steps without a checkpoint"),
        ("\"data\":", "\"date\":", "is no state of a run: steps without a checkpoint"),
        ("\"step\":17", "\"step\":0", "is no state of a run: steps without a checkpoint"),
        ("\"interim\":true", "\"interim\":false", "is of a run whose checkpoint at step 17 is regular"),
        ("\"step\":17", "\"step\":17", ""),
    ] {
        assert!(meta.contains(now), "{meta}");
        let meta = meta.replace(now, then).into_bytes();
        let meta = Tensor::new(vec![meta.len()], Values::U8(meta)).unwrap();
        let tensors = std::iter::once(&meta).chain(&tensors[1..]);
        let named: Vec<(&str, &dyn TensorSource)> =
            names.iter().map(String::as_str).zip(tensors.map(|t| t as &dyn TensorSource)).collect();
        std::fs::write(&path, write_state_dict(Vec::new(), "resume", &named).unwrap()).unwrap();
        let ended = Run::resume(&out).and_then(|run| train(run.unwrap(), &acts, 17));
        match ended.err().map(|e| e.to_string()) {
            Some(error) => assert!(!say.is_empty() && error.contains(&format!("resume.pt: {say}")), "{error}"),
            None => assert_eq!(say, ""),
        }
    }
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn a_checkpoint_that_cannot_be_written_is_told_and_the_last_one_stays() {
    let (acts, out) = (activations(150, 6), folder("unwritable"));
    let run = Run::create(&out, cfg(&[])).unwrap();
    let dir = run.dir().to_owned();
    // What stands in the way of the second checkpoint is a directory of its name; that stops even the superuser.
    std::fs::create_dir_all(dir.join("1.pt/in the way")).unwrap();
    let message = train(run, &acts, u64::MAX).err().unwrap().to_string();
    assert!(message.contains("version_0/0.pt (step 9)") && message.contains("step 18: cannot save"), "{message}");
    assert!(std::fs::read_dir(&dir).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().contains("tmp")));
    std::fs::remove_dir_all(dir.join("1.pt")).unwrap();
    // Nothing is lost: it goes on from the first.
    let whole = folder("written");
    train(Run::create(&whole, cfg(&[])).unwrap(), &acts, u64::MAX).unwrap();
    train(Run::resume(&out).unwrap().unwrap(), &acts, u64::MAX).unwrap();
    assert_eq!(files(&dir), files(&whole.join("version_0")));
    for out in [out, whole] {
        std::fs::remove_dir_all(&out).unwrap();
    }
}

/// The rows that a buffer hands out, recognised by their first value, batch after batch.
fn handed_out(
    acts: &Activations,
    held_out: f64,
    refresh: Refresh,
    buffer_rows: usize,
    batches: usize,
) -> Vec<Vec<usize>> {
    let held_out = HeldOut::new(held_out).unwrap();
    let rng = Mt19937::new(3).unwrap();
    let mut buffer = Buffer::new(acts, held_out, refresh, 4, buffer_rows, &[2.0, 0.5], rng).unwrap();
    let mut batch = Vec::new();
    (0..batches)
        .map(|_| {
            assert!(buffer.next(&mut batch, &NEVER).unwrap());
            let rows = batch.chunks_exact(2).enumerate().map(|(i, row)| {
                // The factors have been applied, one per model.
                assert_eq!(row[1], -row[0] / 4.0);
                assert_eq!(buffer.last_rows()[i], (row[0] / 2.0) as u64);
                (row[0] / 2.0) as usize
            });
            rows.collect()
        })
        .collect()
}

/// Row i is [i, -i].
fn counting(n: usize) -> Activations {
    let values = (0..n).flat_map(|i| [i as f32, -(i as f32)]).collect();
    Activations::from_tensor("rows", Tensor::new(vec![n, 2, 1], Values::F32(values)).unwrap()).unwrap()
}

#[test]
fn a_large_batch_is_made_on_several_threads() {
    let (rows, width) = (2000, 200);
    let value = |row: usize, i: usize| (row * width + i) as f32 % 251.0;
    let values = (0..rows * width).map(|at| value(at / width, at % width)).collect();
    let tensor = Tensor::new(vec![rows, 2, width / 2], Values::F32(values)).unwrap();
    let acts = Activations::from_tensor("rows", tensor).unwrap();
    let rng = Mt19937::new(3).unwrap();
    let mut buffer = Buffer::new(&acts, HeldOut::default(), Refresh::ReadOn, 1500, 2000, &[2.0, 0.5], rng).unwrap();
    let mut batch = vec![7.0; 3];
    assert!(buffer.next(&mut batch, &NEVER).unwrap());
    assert_eq!(batch.len(), 1500 * width);
    for (row, &of_set) in batch.chunks_exact(width).zip(buffer.last_rows()) {
        for (i, v) in row.iter().enumerate() {
            assert_eq!(*v, value(of_set as usize, i) * if i < width / 2 { 2.0 } else { 0.5 });
        }
    }
}

#[test]
fn the_buffer_is_the_originals_but_reads_on() {
    let acts = counting(100);
    for (refresh, held_out) in [(Refresh::ReadOn, 0.0), (Refresh::Original, 0.0), (Refresh::ReadOn, 0.25)] {
        // The original's code, over row numbers.
        let held = HeldOut::new(held_out).unwrap();
        let train: Vec<usize> = (0..100).filter(|&row| !held.holds(row)).collect();
        let mut next = 0;
        let mut read = |n: usize| -> Vec<usize> {
            let rows = (next..next + n).map(|i| train[i % train.len()]).collect();
            next += n;
            rows
        };
        let mut rng = Mt19937::new(3).unwrap();
        let mut shuffle = |buffer: &Vec<usize>| rng.randperm(buffer.len()).into_iter().map(|i| buffer[i]).collect();
        let mut buffer: Vec<usize> = shuffle(&read(30));
        let (mut pointer, mut expected) = (0, Vec::new());
        for _ in 0..50 {
            expected.push(buffer[pointer..pointer + 4].to_vec());
            pointer += 4;
            if pointer > buffer.len() / 2 - 4 {
                if refresh == Refresh::ReadOn {
                    buffer.splice(..15, read(15));
                }
                buffer = shuffle(&buffer);
                pointer = 0;
            }
        }
        assert_eq!(handed_out(&acts, held_out, refresh, 30, 50), expected, "{refresh:?}, {held_out}");
    }
}

#[test]
fn rows_held_out_are_never_handed_out_and_all_others_are() {
    let acts = counting(57);
    let held = HeldOut::new(0.2).unwrap();
    assert_eq!((0..57).filter(|&row| held.holds(row)).count(), held.count(57));
    assert_eq!(held.count(57), 11);
    for buffer_rows in [8, 20, 500] {
        let mut seen = vec![0; 57];
        handed_out(&acts, 0.2, Refresh::ReadOn, buffer_rows, 400).concat().into_iter().for_each(|row| seen[row] += 1);
        for (row, &count) in seen.iter().enumerate() {
            assert_eq!(count == 0, held.holds(row), "row {row} in a buffer of {buffer_rows}");
        }
    }
    for bad in [-0.1, 1.0, f64::NAN] {
        assert!(HeldOut::new(bad).is_err());
    }
}

#[test]
fn a_batch_larger_than_the_buffer_is_refused() {
    let error = Buffer::from_cfg(&counting(10), &cfg(&[]), &[1.0, 1.0]).unwrap_err().to_string();
    assert!(error.contains("batch_size is 16; it must be from 1 to 10"), "{error}");
}

#[test]
fn factors_give_a_mean_norm_of_the_root_of_d_in_and_fold_once() {
    let acts = activations(90, 6);
    let found = estimate(&acts, HeldOut::default(), 64, &NEVER).unwrap().unwrap();
    let mut x = Vec::new();
    acts.read_f32(0, 90, &mut x).unwrap();
    for m in 0..2 {
        let norms = x.chunks_exact(12).map(|row| row[m * 6..][..6].iter().map(|v| v * v).sum::<f32>().sqrt());
        assert!((found[m] * f64::from(norms.sum::<f32>()) / 90.0 - 6f64.sqrt()).abs() < 1e-5);
    }
    let mut cfg = cfg(&[]);
    let weights = initial_weights(49, 24, 2, 6, Dtype::F32, 0.08).unwrap();
    assert!(fold(&mut cfg, weights.clone()).unwrap_err().to_string().contains("nothing to fold"));
    set_factors(&mut cfg, &found);
    let plain = CrossCoder::from_tensors(Cpu::<f32>::new(Dtype::F32), cfg.clone(), weights.clone()).unwrap();
    let folded = fold(&mut cfg, weights).unwrap();
    assert_eq!(factors(&cfg).unwrap(), None);
    assert!(fold(&mut cfg.clone(), folded.clone()).unwrap_err().to_string().contains("folded"));
    let folded = CrossCoder::from_tensors(Cpu::<f32>::new(Dtype::F32), cfg, folded).unwrap();
    // The folded one takes x where the other takes factor · x, and reconstructs x.
    let scaled: Vec<f32> = x.iter().enumerate().map(|(i, v)| v * found[i / 6 % 2] as f32).collect();
    let view = |values| ArrayView3::from_shape((90, 2, 6), values).unwrap();
    let (a, b) = (plain.encode(view(&scaled), true).unwrap(), folded.encode(view(&x), true).unwrap());
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
    let (a, b) = (plain.forward(view(&scaled)).unwrap(), folded.forward(view(&x)).unwrap());
    let close = a.iter().zip(&b).enumerate().all(|(i, (a, b))| (a - b * found[i / 6 % 2] as f32).abs() < 1e-5);
    assert!(close);
}

#[test]
fn a_model_of_zeros_has_no_factor() {
    let tensor = Tensor::new(vec![4, 2, 1], Values::F32([1.0, 0.0].repeat(4))).unwrap();
    let acts = Activations::from_tensor("rows", tensor).unwrap();
    let error = estimate(&acts, HeldOut::default(), 4, &NEVER).unwrap_err().to_string();
    assert!(error.contains("model B's rows have a mean norm of 0"), "{error}");
}

#[test]
fn rows_that_are_not_finite_are_left_out_of_the_factors() {
    let values = vec![3.0, 1.0, f32::NAN, 1.0, 5.0, f32::INFINITY, 5.0, 1.0];
    let tensor = Tensor::new(vec![4, 2, 1], Values::F32(values)).unwrap();
    let acts = Activations::from_tensor("rows", tensor).unwrap();
    let error = estimate(&acts, HeldOut::default(), 4, &NEVER).unwrap_err().to_string();
    assert!(error.contains("rows, row 1: model A, element 0: NaN is not finite"), "{error}");
    let factors = estimate(&acts.unchecked(), HeldOut::default(), 4, &NEVER).unwrap().unwrap();
    assert_eq!(factors, [0.25, 1.0], "1 / the mean of 3 and 5, of 1 and 1");
}

#[test]
fn rows_too_small_for_a_factor_in_float32_are_refused() {
    let tensor = Tensor::new(vec![4, 2, 1], Values::F32(vec![1e-44; 8])).unwrap();
    let acts = Activations::from_tensor("rows", tensor).unwrap();
    let error = estimate(&acts, HeldOut::default(), 4, &NEVER).unwrap_err().to_string();
    assert!(error.contains("model A's rows have a mean norm of 0.0000"), "{error}");
}

#[test]
fn an_evaluation_takes_the_rows_that_it_is_given() {
    let acts = counting(20);
    for rows in [vec![], vec![7], vec![0, 1, 2, 9, 11, 12, 13, 14, 19], (3..17).collect()] {
        for batch_size in [1, 2, 3, 30] {
            let mut found = Vec::new();
            let batches = Batches::new(&acts, rows.iter().copied(), batch_size, &[1.0, 2.0]);
            let note = |x: &[f32]| {
                found.extend_from_slice(x);
                Ok(())
            };
            batches.for_each(note).unwrap();
            assert_eq!(found, rows.iter().flat_map(|&i| [i as f32, -2.0 * i as f32]).collect::<Vec<_>>());
        }
    }
}

#[test]
fn an_evaluation_has_no_batch_of_one_leftover_row() {
    for (rows, batch_size, sizes) in
        [(13, 4, &[4, 3, 3, 3][..]), (12, 4, &[4; 3]), (5, 2, &[2, 2, 1]), (5, 8, &[5]), (1, 4, &[1]), (0, 4, &[])]
    {
        let acts = counting(rows.max(1));
        let mut found = Vec::new();
        let batches = Batches::new(&acts, 0..rows, batch_size, &[1.0, 1.0]);
        let note = |x: &[f32]| {
            found.push(x.len() / acts.width());
            Ok(())
        };
        batches.for_each(note).unwrap();
        assert_eq!(found, sizes);
        for factors in [&[][..], &[1.0], &[1.0; 3]] {
            let error = Batches::new(&acts, [0], 4, factors).for_each::<f32>(|_| Ok(())).unwrap_err();
            assert!(error.to_string().contains("factors for the 2 models"), "{error}");
        }
    }
}

#[test]
fn a_buffer_restored_in_vain_or_from_a_fresh_state_is_as_it_should_be() {
    let acts = counting(40);
    let new = || {
        Buffer::new(&acts, HeldOut::default(), Refresh::ReadOn, 4, 16, &[1.0, 1.0], Mt19937::new(1).unwrap()).unwrap()
    };
    let next = |buffer: &mut Buffer<'_>| {
        let mut batch = Vec::new();
        assert!(buffer.next(&mut batch, &NEVER).unwrap());
        batch
    };
    let (mut used, mut fresh) = (new(), new());
    next(&mut used);
    let state = used.state();
    // Stopped while it reads: nothing is changed.
    let mut stopped = new();
    assert!(!stopped.restore(state, &AtomicBool::new(true)).unwrap());
    assert!(used.restore(fresh.state(), &NEVER).unwrap());
    let batch = next(&mut fresh);
    assert_eq!(next(&mut stopped), batch);
    assert_eq!(next(&mut used), batch);
}

#[test]
fn a_backend_of_another_dtype_is_what_the_cfg_says_or_is_refused() {
    let (acts, out) = (activations(150, 6), folder("dtype"));
    let error = Run::create(&out, cfg(&[])).unwrap().train(Cpu::new(Dtype::BF16), &acts, &NEVER, |_| ()).err().unwrap();
    assert!(error.to_string().contains("the run is in float32, the backend in bfloat16"), "{error}");
    train(Run::create(&out, cfg(&[])).unwrap(), &acts, 9).unwrap();
    let files = checkpoint::numbered(&out.join("version_1"), 0);
    let narrow = CrossCoder::<Cpu>::load_files(Cpu::new(Dtype::BF16), &files).unwrap();
    assert_eq!(narrow.cfg().enc_dtype().unwrap(), Dtype::BF16);
    let one = checkpoint::Files { cfg: files.weights.clone(), ..files };
    assert!(narrow.save(&one).unwrap_err().to_string().contains("both weights and cfg"));
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn no_step_is_taken_where_there_is_none() {
    let cfg = cfg(&[("num_tokens", 3.into())]);
    let mut trainer = Trainer::new(CrossCoder::new(cfg).unwrap()).unwrap();
    let error = trainer.step(&[0.0; 12]).unwrap_err().to_string();
    assert!(error.contains("no steps to take"), "{error}");
}

#[test]
fn what_adam_and_the_clip_add_is_rounded_to_the_dtype() {
    // As PyTorch rounds a number that is added to a tensor. For these gradients it makes a difference.
    let r = |x: f32| half::bf16::from_f32(x).to_f32();
    let backend = Cpu::<f32>::new(Dtype::BF16);
    let mut differ = 0;
    for i in 0..200u16 {
        let g = half::bf16::from_bits(0x3380 + i); // From 6e-8 on.
        let matrix = |values: Vec<half::bf16>| backend.upload(1, values.len(), Values::BF16(values)).unwrap();
        let four = |v: half::bf16| Parameters::from_each([0; 4].map(|_| matrix(vec![v])));
        let (mut params, grads) = (four(half::bf16::ZERO), four(g));
        let clip = clip_grad_norm(&backend, &grads, 1.0).unwrap();
        let total = r((4.0 * f64::from(g.to_f32()).powi(2)).sqrt() as f32);
        assert_eq!(clip.coef, r(1.0 / r(total + r(1e-6))).min(1.0));
        let mut adam = Adam::new(&backend, &params, 0.9, 0.999).unwrap();
        adam.step(&backend, &mut params, &grads, &clip, 1e-3).unwrap();
        let mut found = [0f32];
        backend.download(&params.b_dec, 0, &mut found).unwrap();
        let g = r(clip.coef * g.to_f32());
        let m = r((1.0 - 0.9f64) as f32 * g);
        let v = r((1.0 - 0.999f64) as f32 * g * g);
        let p = |eps: f32| {
            let denominator = r(r(r(v.sqrt()) / (1.0 - 0.999f64).sqrt() as f32) + eps);
            r(0.0 - (1e-3 / (1.0 - 0.9f64)) as f32 * m / denominator)
        };
        assert_eq!(found[0], p(r(1e-8)));
        differ += usize::from(p(r(1e-8)) != p(1e-8));
    }
    assert!(differ > 0, "the gradients show nothing");
}

#[test]
fn gradients_are_central_differences() {
    // In float64, for every element of every parameter, in a model whose pre-activations stay away from 0.
    let (d_in, d_hidden, batch) = (3, 7, 5);
    let weights = initial_weights(49, d_hidden, 2, d_in, Dtype::F32, 0.8).unwrap();
    let x: Vec<f64> = rows(batch, d_in).into_iter().map(f64::from).collect();
    let x = ArrayView3::from_shape((batch, 2, d_in), &x).unwrap();
    let cfg = cfg(&[("d_in", d_in.into()), ("dict_size", d_hidden.into())]);
    let with = |weights| CrossCoder::from_tensors(Cpu::<f64>::new(Dtype::F32), cfg.clone(), weights).unwrap();
    // Element `at` of a parameter changed; the judge takes what is a float32.
    let changed = |which: usize, at: usize, by: f32| {
        let mut weights = weights.clone();
        let tensor = &mut *weights.each_mut()[which];
        let mut values = tensor.values().clone().into_f32();
        values[at] += by;
        let value = f64::from(values[at]);
        *tensor =
            Tensor::with_strides(tensor.shape().to_vec(), tensor.strides().to_vec(), Values::F32(values)).unwrap();
        (value, with(weights).loss_and_grads(x, 0.7).unwrap().0)
    };
    let crosscoder = with(weights.clone());
    let pre = crosscoder.encode(x, false).unwrap();
    assert!(pre.iter().all(|v| v.abs() > 1e-3), "a pre-activation near 0: choose another seed");
    assert!(pre.iter().any(|v| *v > 0.0) && pre.iter().any(|v| *v < 0.0));
    let (_, grads) = crosscoder.loss_and_grads(x, 0.7).unwrap();
    for (which, name) in ["W_enc", "W_dec", "b_enc", "b_dec"].into_iter().enumerate() {
        let tensor = weights.each()[which].clone();
        let mut analytic = vec![0.0; tensor.len()];
        crosscoder::backend::Backend::download(crosscoder.backend(), grads.each()[which], 0, &mut analytic).unwrap();
        for at in 0..tensor.len() {
            let [(up, loss_up), (down, loss_down)] = [1.0, -1.0].map(|sign| changed(which, at, sign / 4096.0));
            let numeric = (loss_up - loss_down) / (up - down);
            let error = (numeric - analytic[at]).abs();
            assert!(
                error <= 1e-7 * (1.0 + numeric.abs()),
                "{name}[{at}]: {numeric} by differences, {} by rule",
                analytic[at]
            );
        }
    }
}

#[test]
fn a_trainer_steps_without_a_run() {
    let crosscoder = CrossCoder::from_tensors(
        Cpu::<f32>::new(Dtype::F32),
        cfg(&[]),
        initial_weights(49, 24, 2, 6, Dtype::F32, 0.08).unwrap(),
    );
    let mut trainer = Trainer::new(crosscoder.unwrap()).unwrap();
    let batch = rows(16, 6);
    let first = trainer.step(&batch).unwrap();
    assert_eq!((trainer.step_counter(), first.l1_coeff), (1, 0.0));
    assert!(trainer.step(&batch[..13]).is_err());
    assert_eq!(trainer.step_counter(), 1);
    let last = (1..40).map(|_| trainer.step(&batch).unwrap()).last().unwrap();
    assert!(last.l2_loss < 0.7 * first.l2_loss, "{} {}", first.l2_loss, last.l2_loss);
    assert_eq!(last.lr, trainer.schedule().lr(40));
}
