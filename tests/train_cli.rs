//! `crosscoder train` as a user and as a hostile machine meet it: kills, signals, bad files, two at once.
#![cfg(feature = "cli")]

use crosscoder::pt::write_state_dict;
use crosscoder::{CrossCoder, Tensor, Values, npy, safetensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A directory of its own for a test, empty.
fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("crosscoder-train-cli-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn crosscoder<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_crosscoder"));
    command.arg("train").args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> Output {
    crosscoder(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Numbers from a fixed seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    let mut numbers = Numbers(seed);
    let values = (0..shape.iter().product()).map(|_| numbers.next()).collect();
    Tensor::new(shape.to_vec(), Values::F32(values)).unwrap()
}

fn save_npy(path: &Path, tensor: &Tensor) {
    npy::write(std::fs::File::create(path).unwrap(), tensor).unwrap();
}

/// Name and bytes of each file in a directory.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A set and the arguments of a run on it that takes a second or so.
fn small_run(dir: &Path, out: &Path) -> Vec<String> {
    let acts = dir.join("acts.npy");
    if !acts.exists() {
        save_npy(&acts, &tensor(&[2000, 2, 16], 1));
    }
    let keys =
        "--dict_size 128 --batch_size 64 --buffer_mult 8 --num_tokens 76800 --save_every 20 --log_every 7 --lr 1e-3";
    let mut args: Vec<String> = keys.split(' ').map(str::to_owned).collect();
    args.extend([text(&acts), "--out".to_owned(), text(out)]);
    args
}

fn assert_same_files(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bytes) in &a {
        assert!(b[name] == *bytes, "{name} differs");
    }
}

#[test]
fn killed_twenty_times_it_ends_as_if_it_never_was() {
    let dir = folder("killed");
    let (whole, killed) = (dir.join("whole"), dir.join("killed"));
    let begin = Instant::now();
    let output = crosscoder(&small_run(&dir, &whole)).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let whole_time = begin.elapsed();

    let mut args = small_run(&dir, &killed);
    args.push("--resume".to_owned());
    let (mut kills, mut loads, mut starts, mut numbers) = (0, 0, 0, Numbers(7));
    loop {
        starts += 1;
        assert!(starts < 500, "it never gets further");
        let mut child = crosscoder(&args).spawn().unwrap();
        if kills < 20 {
            // Within a twelfth of the time that all of it takes: some die before they begin, some while they save.
            std::thread::sleep(whole_time.mul_f32((numbers.next() + 1.0) / 24.0));
            if child.try_wait().unwrap().is_none() {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                // Whatever is there is whole.
                let version = killed.join("version_0");
                if version.join("0.pt").exists() {
                    CrossCoder::load(&version).unwrap();
                    loads += 1;
                }
                continue;
            }
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        if kills >= 20 {
            break;
        }
        // It finished before it was killed often enough: once more from the start.
        std::fs::remove_dir_all(&killed).unwrap();
    }
    assert!(loads > 0, "no kill left a checkpoint; the test proves less");
    assert_same_files(&whole.join("version_0"), &killed.join("version_0"));
    assert!(!killed.join("version_1").exists());
    std::fs::remove_dir_all(&dir).unwrap();
}

/// Waits until a run has saved its first checkpoint.
fn wait_for_checkpoint(child: &mut Child, out: &Path) {
    let begin = Instant::now();
    while !out.join("version_0/0.pt").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before its first checkpoint");
        assert!(begin.elapsed() < Duration::from_secs(60), "no checkpoint after a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[cfg(unix)]
fn a_signal_saves_and_stops_and_the_run_goes_on() {
    let dir = folder("signal");
    let whole = dir.join("whole");
    let output = crosscoder(&small_run(&dir, &whole)).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    for signal in ["-INT", "-TERM"] {
        let out = dir.join(signal);
        let mut args = small_run(&dir, &out);
        let mut child = crosscoder(&args).spawn().unwrap();
        wait_for_checkpoint(&mut child, &out);
        let begin = Instant::now();
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        assert!(stderr(&output).contains("--resume goes on"), "{}", stderr(&output));
        CrossCoder::load(out.join("version_0")).unwrap();
        args.push("--resume".to_owned());
        let output = crosscoder(&args).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_same_files(&whole.join("version_0"), &out.join("version_0"));
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_second_trainer_in_the_directory_refuses() {
    let dir = folder("second");
    let out = dir.join("out");
    let args = small_run(&dir, &out);
    let mut first = crosscoder(&args).spawn().unwrap();
    wait_for_checkpoint(&mut first, &out);
    let second = crosscoder(&args).output().unwrap();
    assert!(first.try_wait().unwrap().is_none(), "the first was over already; the test proves nothing");
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("another run"), "{}", stderr(&second));
    assert!(first.wait_with_output().unwrap().status.success());
    assert!(!out.join("version_1").exists());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn the_built_in_set_trains_and_the_result_is_told() {
    let dir = folder("built-in");
    let args = ["--out", &text(&dir), "--dict_size", "64", "--num_tokens", "2560"];
    let output = run(&[&args[..], &["--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "", "progress is for terminals");
    let result: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((&result["step"], &result["rows"]), (&20.into(), &153.into()), "{result}");
    assert_eq!(result["latents"]["rows"], 1536);
    let groups = ["A only", "shared", "B only", "no direction"].map(|name| result["latents"][name].as_u64().unwrap());
    assert_eq!(groups.iter().sum::<u64>(), 64);
    assert!(result["explained_variance"].as_f64().unwrap() > 0.1, "{result}");
    let crosscoder = CrossCoder::load(dir.join("version_0")).unwrap();
    assert_eq!(crosscoder.cfg().text("device").unwrap(), "cpu");
    assert_eq!(crosscoder.cfg().keys()["normalisation_factor"].as_array().unwrap().len(), 2);
    // A finished run is told again, and nothing else happens.
    let again = run(&[&args[..], &["--json", "--resume"]].concat());
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(stdout(&again), stdout(&output));
    // In words, in the next version.
    let words = run(&args);
    assert!(stdout(&words).contains("version_1") && stdout(&words).contains("shared"), "{}", stdout(&words));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn the_same_rows_from_any_kind_of_file_give_the_same_weights() {
    let dir = folder("kinds");
    let all = tensor(&[300, 2, 8], 3);
    let values = all.values().clone().into_f32();
    let part = |name: &str, rows: std::ops::Range<usize>| {
        let slice = values[rows.start * 16..rows.end * 16].to_vec();
        let part = Tensor::new(vec![rows.len(), 2, 8], Values::F32(slice)).unwrap();
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = std::fs::File::create(&path).unwrap();
        match path.extension().and_then(|e| e.to_str()) {
            Some("npy") => drop(npy::write(file, &part).unwrap()),
            Some("pt") => drop(write_state_dict(file, "part", &[("acts", &part)]).unwrap()),
            _ => drop(safetensors::write(file, &[("acts", &part)], &[]).unwrap()),
        }
        text(&path)
    };
    let model = |name: &str, m: usize| {
        let values = values.chunks_exact(8).skip(m).step_by(2).flatten().copied().collect();
        save_npy(&dir.join(name), &Tensor::new(vec![300, 8], Values::F32(values)).unwrap());
        text(&dir.join(name))
    };
    let kinds = [
        vec![part("all.npy", 0..300)],
        vec![part("all.pt", 0..300)],
        vec![part("all.safetensors", 0..300)],
        vec![part("one.npy", 0..100), part("two.pt", 100..101), part("three.safetensors", 101..300)],
        vec![model("a.npy", 0), model("b.npy", 1)],
        vec![text(&dir.join("shards"))],
    ];
    part("shards/0.npy", 0..7);
    part("shards/1.safetensors", 7..200);
    part("shards/2.npy", 200..300);
    std::fs::write(dir.join("shards/notes.txt"), "no activations").unwrap();
    let mut found = Vec::new();
    for (i, kind) in kinds.into_iter().enumerate() {
        let out = text(&dir.join(format!("out-{i}")));
        let keys = ["--dict_size", "16", "--batch_size", "10", "--num_tokens", "300", "--out", &out];
        let args: Vec<&str> = kind.iter().map(String::as_str).chain(keys).collect();
        let output = run(&args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        let mut files = files(&Path::new(&out).join("version_0"));
        files.remove("resume.pt");
        found.push(files);
    }
    for (i, files) in found.iter().enumerate() {
        assert!(*files == found[0], "kind {i}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn three_models_are_trained_evaluated_encoded_and_reported() {
    let dir = folder("three");
    let all = tensor(&[300, 3, 8], 3);
    let values = all.values().clone().into_f32();
    save_npy(&dir.join("all.npy"), &all);
    let each = (0..3).map(|m| {
        let values = values.chunks_exact(8).skip(m).step_by(3).flatten().copied().collect();
        save_npy(&dir.join(format!("{m}.npy")), &Tensor::new(vec![300, 8], Values::F32(values)).unwrap());
        text(&dir.join(format!("{m}.npy")))
    });
    let (all, each) = (vec![text(&dir.join("all.npy"))], each.collect::<Vec<_>>());
    let mut found = Vec::new();
    for (i, acts) in [&all, &each].into_iter().enumerate() {
        let out = text(&dir.join(format!("out-{i}")));
        let keys = ["--dict_size", "16", "--batch_size", "10", "--num_tokens", "300", "--out", &out];
        let output = run(&acts.iter().map(String::as_str).chain(keys).collect::<Vec<_>>());
        assert!(output.status.success(), "{acts:?}: {}", stderr(&output));
        let mut files = files(&Path::new(&out).join("version_0"));
        files.remove("resume.pt");
        found.push(files);
    }
    assert!(found[0] == found[1], "one file, or one for each model");
    let checkpoint = text(&dir.join("out-0/version_0"));
    for verb in [&["eval"][..], &["encode", "--out", &text(&dir.join("latents.pt"))], &["report", "--csv", "-"]] {
        let verb_with = |acts: &[String]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_crosscoder"));
            let output = command.args(verb).arg(&checkpoint).args(acts).output().unwrap();
            assert!(output.status.success(), "{verb:?}: {}", stderr(&output));
            let _ = std::fs::remove_file(dir.join("latents.pt"));
            stdout(&output)
        };
        let printed = verb_with(&each);
        assert_eq!(printed, verb_with(&all), "{verb:?}");
        let model_2 = ["explained_variance_2", "decoder_norm_2"].iter().any(|name| printed.contains(name));
        assert!(model_2 || verb[0] == "encode", "{printed}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn bad_activations_are_told_before_the_first_step() {
    let dir = folder("bad");
    let good = dir.join("good.npy");
    save_npy(&good, &tensor(&[300, 2, 8], 3));
    let save = |name: &str, shape: &[usize]| {
        save_npy(&dir.join(name), &tensor(shape, 5));
        text(&dir.join(name))
    };
    let bytes = std::fs::read(&good).unwrap();
    std::fs::write(dir.join("short.npy"), &bytes[..bytes.len() - 1]).unwrap();
    std::fs::write(dir.join("words.npy"), "not an array at all").unwrap();
    let integers = Tensor::new(vec![4, 2, 3], Values::I32(vec![1; 24])).unwrap();
    safetensors::write(std::fs::File::create(dir.join("ints.safetensors")).unwrap(), &[("x", &integers)], &[]).unwrap();
    let two = tensor(&[3, 2, 8], 1);
    let two_file = std::fs::File::create(dir.join("two.safetensors")).unwrap();
    safetensors::write(two_file, &[("x", &two), ("y", &two)], &[]).unwrap();
    let mut poisoned = tensor(&[300, 2, 8], 3).into_values().into_f32();
    poisoned[16 * 123 + 9] = f32::INFINITY;
    save_npy(&dir.join("poisoned.npy"), &Tensor::new(vec![300, 2, 8], Values::F32(poisoned)).unwrap());
    std::fs::create_dir(dir.join("empty")).unwrap();
    let in_dir = |name: &str| text(&dir.join(name));
    let good = text(&good);
    for (acts, say) in [
        (vec![in_dir("nowhere.npy")], "nowhere.npy: "),
        (vec![in_dir("short.npy")], "short.npy: "),
        (vec![in_dir("words.npy")], "words.npy: "),
        (vec![in_dir("ints.safetensors")], "activations are floats"),
        (vec![in_dir("two.safetensors")], "holds 2 tensors (x, y"),
        (vec![in_dir("empty")], "holds no .pt, .npy or .safetensors file"),
        (vec![save("four.npy", &[3, 2, 2, 2])], "has shape [3, 2, 2, 2]"),
        (vec![save("none.npy", &[0, 2, 8])], "has no rows"),
        (vec![save("alone.npy", &[30, 8])], "alone.npy: has shape [30, 8]"),
        (vec![save("a.npy", &[30, 8]), save("b.npy", &[31, 8])], "they must be equal"),
        (vec![good.clone(), save("wide.npy", &[30, 2, 9])], "all parts must be alike"),
        (vec![good.clone(), save("flat.npy", &[30, 8])], "flat.npy: has shape [30, 8]"),
        (vec![in_dir("poisoned.npy")], "poisoned.npy, row 123: model B, element 1: inf is not finite"),
        (vec![good.clone(), "--d_in".to_owned(), "9".to_owned()], "cfg key \"d_in\" is 9; the activations have 8"),
        (vec![good.clone(), "--batch_size".to_owned(), "400".to_owned()], "batch_size is 400"),
    ] {
        let out = in_dir("out");
        let args: Vec<&str> = acts.iter().map(String::as_str).chain(["--out", &out]).collect();
        let output = run(&args);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{args:?}: {:?}", output.status);
        assert!(stderr(&output).contains(say), "{args:?}: {}", stderr(&output));
        assert!(!Path::new(&out).join("version_0/0.pt").exists(), "{args:?}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn wrong_usage_has_status_2() {
    let dir = folder("usage");
    let out = text(&dir);
    for (args, say) in [
        (&["--learning_rate", "1"][..], "--learning_rate: neither an option nor a key of the cfg"),
        (&["--lr"], "--lr"),
        (&["--threads", "many"], "--threads needs a number"),
        (&["--threads", "0"], "--threads needs 1 or more"),
        (&["--val-fraction", "1.5"], "it must be from 0 to less than 1"),
    ] {
        let output = run(&[&["--out", &out], args].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(say), "{args:?}: {}", stderr(&output));
    }
    let output = run(&["--device", "tpu", "--out", &out]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stdout(&run(&["--help"])).contains("--keep-going-on-nan"));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_cfg_that_cannot_be_trained_is_told_before_a_folder_is_made() {
    let dir = folder("cfg");
    let (acts, out) = (dir.join("acts.npy"), dir.join("out"));
    save_npy(&acts, &tensor(&[30, 2, 4], 1));
    for (key, value, say) in [
        ("lr", "-1", "cfg key \"lr\" needs a number of 0 or more, found -1"),
        ("beta1", "1", "cfg key \"beta1\" needs a number from 0 to less than 1, found 1"),
        ("beta2", "-0.5", "cfg key \"beta2\" needs a number from 0 to less than 1, found -0.5"),
        ("seed", "1.5", "\"seed\" needs an integer"),
        ("batch_size", "400", "batch_size is 400; it must be from 1 to 29"),
        ("enc_dtype", "fp8", "fp8"),
        ("device", "tpu", "tpu"),
    ] {
        let output = run(&[&text(&acts), "--out", &text(&out), &format!("--{key}"), value]);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{key}: {:?}", output.status);
        assert!(stderr(&output).contains(say), "{key}: {}", stderr(&output));
        assert!(!out.exists(), "{key}");
    }
    std::fs::write(dir.join("three.json"), "{\"normalisation_factor\": [1, 2, 3]}").unwrap();
    let output = run(&[&text(&acts), "--out", &text(&out), "--cfg", &text(&dir.join("three.json"))]);
    assert!(stderr(&output).contains("acts.npy, row 0: the cfg is for 3 models of d_in 4"), "{}", stderr(&output));
    assert!(!out.exists());
    for key in ["folded_normalisation_factor", "batch_topk_threshold"] {
        std::fs::write(dir.join("trained.json"), format!("{{\"{key}\": 0.5}}")).unwrap();
        let output = run(&[&text(&acts), "--out", &text(&out), "--cfg", &text(&dir.join("trained.json"))]);
        let say = format!("{key}: is of a crosscoder that is trained already");
        assert!(stderr(&output).contains(&say), "{}", stderr(&output));
        assert!(!out.exists());
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_run_of_no_steps_saves_its_initial_weights() {
    let dir = folder("no-steps");
    let (acts, out) = (dir.join("acts.npy"), dir.join("out"));
    save_npy(&acts, &tensor(&[30, 2, 4], 1));
    let args = [&text(&acts), "--out", &text(&out), "--batch_size", "3", "--num_tokens", "2", "--dict_size", "8"];
    let output = run(&args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("0.pt (0 steps)"), "{}", stdout(&output));
    let saved = CrossCoder::load(out.join("version_0")).unwrap();
    let initial = CrossCoder::new(saved.cfg().clone()).unwrap();
    let bits = |crosscoder: CrossCoder| crosscoder.to_tensors().unwrap().each().map(|t| t.to_f64_vec());
    assert_eq!(bits(saved), bits(initial));
    let again = run(&[&args[..], &["--resume"]].concat());
    assert_eq!((again.status.code(), stdout(&again)), (Some(0), stdout(&output)), "{}", stderr(&again));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn above_the_largest_version_is_none() {
    let dir = folder("largest");
    let largest = dir.join(format!("version_{}", usize::MAX));
    std::fs::create_dir(&largest).unwrap();
    std::fs::write(largest.join("x"), "").unwrap();
    // Files that are named so are none, and what is to go on says so.
    std::fs::write(dir.join("version_9"), "").unwrap();
    let output = run(&["--out", &text(&dir), "--resume"]);
    assert!(stderr(&output).contains("holds no resume.pt"), "{}", stderr(&output));
    let output = run(&["--out", &text(&dir)]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("no version above version_"), "{}", stderr(&output));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_place_that_cannot_be_written_is_told_before_training() {
    let dir = folder("unwritable");
    // A file where the directory should be: that stops the superuser too.
    std::fs::write(dir.join("file"), "").unwrap();
    let output = run(&["--out", &text(&dir.join("file/out"))]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot create the directory"), "{}", stderr(&output));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn what_a_run_takes_over_or_does_not_find_is_told() {
    let dir = folder("told");
    let (acts, out) = (dir.join("acts.npy"), dir.join("out"));
    save_npy(&acts, &tensor(&[30, 2, 4], 1));
    let (acts, dir_out) = (text(&acts), text(&out));
    let args = [&acts, "--out", &dir_out, "--batch_size", "3", "--num_tokens", "6", "--dict_size", "8", "--resume"];
    let say = "no run to go on with; a new one begins";
    assert!(stderr(&run(&args)).contains(say));
    assert_eq!(stderr(&run(&args)), "");
    // The cfg of a checkpoint holds its factors.
    let again = run(&[&acts, "--out", &dir_out, "--cfg", &text(&out.join("version_0/0_cfg.json"))]);
    assert_eq!(again.status.code(), Some(0));
    let say = "normalisation factors are the cfg's, not estimated from these rows: [";
    assert!(stderr(&again).starts_with(say), "{}", stderr(&again));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
#[cfg(unix)]
fn a_log_that_is_gone_is_told() {
    let dir = folder("gone");
    let out = dir.join("out");
    let mut args = small_run(&dir, &out);
    let mut child = crosscoder(&args).spawn().unwrap();
    wait_for_checkpoint(&mut child, &out);
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    std::fs::remove_file(out.join("version_0/metrics.jsonl")).unwrap();
    args.push("--resume".to_owned());
    for say in ["version_0 has no metrics.jsonl any more: another is begun", ""] {
        let output = crosscoder(&args).output().unwrap();
        assert!(output.status.success() && stderr(&output).contains(say), "{}", stderr(&output));
        assert_eq!(stderr(&output).is_empty(), say.is_empty());
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn whoever_stops_reading_finds_the_page_all_the_same() {
    let out = folder("page");
    let mut child = crosscoder(&["--out", &text(&out), "--num_tokens", "1280", "--dict_size", "32"]).spawn().unwrap();
    drop(child.stdout.take());
    child.wait().unwrap();
    assert!(out.join("version_0/report.html").exists());
    std::fs::remove_dir_all(&out).unwrap();
}

#[test]
fn a_run_that_goes_on_keeps_its_cfg() {
    let dir = folder("keeps");
    let out = text(&dir);
    let first = ["--out", &out, "--dict_size", "32", "--num_tokens", "1280", "--seed", "9007199254740992"];
    assert!(run(&first).status.success());
    for (more, status) in [
        (&["--dict_size", "32"][..], 0),
        (&["--l1_coeff", "1.0"], 0),
        (&["--seed", "9007199254740992"], 0),
        (&["--seed", "9007199254740993"], 2),
        (&["--dict_size", "64"], 2),
        (&["--nothing", "1"], 2),
    ] {
        let output = run(&[&["--out", &out, "--resume"], more].concat());
        assert_eq!(output.status.code(), Some(status), "{more:?}: {}", stderr(&output));
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_run_beyond_memory_is_refused() {
    let dir = folder("memory");
    let acts = dir.join("acts.npy");
    save_npy(&acts, &tensor(&[30, 2, 4], 1));
    for dict_size in [1u64 << 45, 1 << 58, 1 << 62] {
        let args = [&text(&acts), "--out", &text(&dir), "--batch_size", "3", "--dict_size", &dict_size.to_string()];
        let output = run(&args);
        let say = format!("training weights [{dict_size}, 2, 4] needs ");
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(&say), "{}", stderr(&output));
        assert!(!dir.join("version_0").exists());
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_file_that_changes_while_it_is_read_stops_the_run() {
    let dir = folder("changes");
    let out = dir.join("out");
    let args = small_run(&dir, &out);
    let mut child = crosscoder(&args).spawn().unwrap();
    wait_for_checkpoint(&mut child, &out);
    let acts = dir.join("acts.npy");
    let file = std::fs::OpenOptions::new().write(true).open(&acts).unwrap();
    file.set_len(std::fs::metadata(&acts).unwrap().len() / 2).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let message = stderr(&output);
    assert!(message.contains("acts.npy") && message.contains("has changed since it was opened"), "{message}");
    assert!(message.contains("the newest checkpoint is"), "{message}");
    CrossCoder::load(out.join("version_0")).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
}
