//! What the verbs beside `train` do with their options and outputs.
#![cfg(feature = "cli")]

use crosscoder::files::TensorFile;
use crosscoder::{Config, CrossCoder, Tensor, Values, checkpoint, npy};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory of its own for a test, with a checkpoint `c` of d_in 4 and activations `a.npy` of `rows` rows.
fn folder(name: &str, rows: usize) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("crosscoder-cli-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(dir.join("c")).unwrap();
    let mut cfg = Config::default();
    cfg.set("d_in", 4);
    cfg.set("dict_size", 8);
    CrossCoder::new(cfg).unwrap().save(&checkpoint::numbered(&dir.join("c"), 0)).unwrap();
    save(&dir.join("a.npy"), &[rows, 2, 4]);
    dir
}

fn save(path: &Path, shape: &[usize]) {
    let values = (0..shape.iter().product()).map(|i: usize| (i * i % 1009) as f32 / 500.0 - 1.0).collect();
    npy::write(std::fs::File::create(path).unwrap(), &Tensor::new(shape.to_vec(), Values::F32(values)).unwrap())
        .unwrap();
}

/// Status, stdout, stderr.
fn run(dir: &Path, args: &str) -> (i32, String, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_crosscoder")).args(args.split(' ')).current_dir(dir).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn refused(dir: &Path, args: &str, say: &str) {
    let (status, _, stderr) = run(dir, args);
    assert!(status == 2 && stderr.contains(say), "{args}: {status} {stderr}");
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
#[cfg(unix)]
fn only_files_are_replaced() {
    let dir = folder("replaced", 8);
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, dir.join(name)).unwrap();
    assert!(Command::new("mkfifo").args([dir.join("pipe"), dir.join("pipe.pt")]).status().unwrap().success());
    std::fs::create_dir(dir.join("folder")).unwrap();
    std::fs::write(dir.join("file"), "old").unwrap();
    link("nowhere", "dangling");
    link("nowhere", "dangling.pt");
    link("pipe", "to-pipe");
    link("file", "to-file");
    let before = names(&dir);
    for name in ["pipe", "folder", "dangling", "to-pipe"] {
        for force in ["", " --force"] {
            refused(&dir, &format!("report c --out {name}{force}"), "it is not replaced");
        }
        refused(&dir, &format!("report c --svg folder --csv {name} --force"), "it is not replaced");
    }
    refused(&dir, "convert c pipe.pt --force", "it is not replaced");
    refused(&dir, "convert c dangling.pt --force", "it is not replaced");
    refused(&dir, "encode c a.npy --out dangling.pt", "is there already");
    refused(&dir, "encode c a.npy --out pipe.pt", "is there already");
    refused(&dir, "report c --csv to-file", "--force replaces it");
    assert_eq!((names(&dir), names(&dir.join("folder"))), (before, vec![]));
    // Of a link the file is replaced.
    assert_eq!(run(&dir, "report c --csv to-file --force").0, 0);
    assert!(dir.join("to-file").is_symlink());
    assert!(std::fs::read_to_string(dir.join("file")).unwrap().starts_with("latent,"));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn what_is_read_is_not_replaced() {
    let dir = folder("read", 8);
    let [pt, cfg] = ["c/0.pt", "c/0_cfg.json"].map(|name| dir.join(name));
    let mut factors = checkpoint::read_cfg(&cfg).unwrap();
    factors.set("normalisation_factor", vec![2.0, 3.0]);
    std::fs::write(&cfg, factors.to_json()).unwrap();
    let bytes = || [&pt, &cfg, &dir.join("a.npy")].map(|path| std::fs::read(path).unwrap());
    let before = bytes();
    // The cfg is that of both names; what it says would not hold for the weights that stay.
    for options in ["--fold", "--dtype bf16"] {
        refused(&dir, &format!("convert c c/0.safetensors {options} --force"), "c/0.pt would no longer fit its cfg");
    }
    refused(&dir, "report c a.npy --out a.npy --force", "a.npy: is read here; it is not replaced");
    std::fs::create_dir(dir.join("acts")).unwrap();
    save(&dir.join("acts/1.npy"), &[8, 2, 4]);
    refused(&dir, "report c acts --csv acts/1.npy --force", "acts/1.npy: is read here");
    save(&dir.join("acts/activation.svg"), &[8, 2, 4]);
    refused(&dir, "report c acts/activation.svg --svg acts --force", "acts/activation.svg: is read here");
    refused(&dir, "report c --json c/../c/0_cfg.json --force", "is read here");
    std::fs::write(dir.join("c/metrics.jsonl"), "{\"step\": 1, \"loss\": 2}\n").unwrap();
    refused(&dir, "report c --csv c/metrics.jsonl --force", "is read here");
    assert_eq!(bytes(), before);
    assert_eq!(run(&dir, "convert c c/0.safetensors --force").0, 0);
    assert_eq!(bytes(), before);
    // In place, both are new. The cfg is that of the other weights, too.
    refused(&dir, "convert c/0.pt c/0.pt --fold --force", "c/0.safetensors would no longer fit its cfg");
    std::fs::remove_file(dir.join("c/0.safetensors")).unwrap();
    let (status, _, stderr) = run(&dir, "convert c/0.pt c/0.pt --fold --force");
    assert_eq!(status, 0, "{stderr}");
    assert!(bytes()[0] != before[0] && bytes()[1] != before[1]);
    std::fs::remove_dir_all(&dir).unwrap();
}

/// Activations `a.npy` and a checkpoint that takes them times 0.5 and 4.
fn with_factors(name: &str) -> PathBuf {
    let dir = folder(name, 64);
    let cfg = dir.join("c/0_cfg.json");
    let mut factors = checkpoint::read_cfg(&cfg).unwrap();
    factors.set("normalisation_factor", vec![0.5, 4.0]);
    std::fs::write(&cfg, factors.to_json()).unwrap();
    dir
}

/// Copies the checkpoint to a folder under these names.
fn publish(dir: &Path, folder: &str, weights: &str, cfg: &str) {
    std::fs::create_dir(dir.join(folder)).unwrap();
    std::fs::copy(dir.join("c/0.pt"), dir.join(folder).join(weights)).unwrap();
    std::fs::copy(dir.join("c/0_cfg.json"), dir.join(folder).join(cfg)).unwrap();
}

#[test]
fn no_checkpoint_gets_the_cfg_of_another() {
    let dir = with_factors("cfgs");
    let eval = |of: &str| run(&dir, &format!("eval {of} a.npy"));
    let latents = |of: &str| {
        let _ = std::fs::remove_file(dir.join("l.pt"));
        let (status, _, stderr) = run(&dir, &format!("encode {of} a.npy --out l.pt"));
        assert_eq!(status, 0, "{stderr}");
        let mut file = TensorFile::open(dir.join("l.pt")).unwrap();
        let values = file.index_of("values").unwrap();
        file.read(values).unwrap().to_f64_vec()
    };
    let same = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    let before = latents("c");
    // OUT's cfg would come before that of the same name with another ending.
    publish(&dir, "m", "model.pt", "config.json");
    refused(&dir, "convert m m/model.safetensors --fold", "m/model.pt would no longer fit its cfg");
    refused(&dir, "convert c m/model.safetensors --dtype bf16", "m/model.pt would no longer fit its cfg");
    assert_eq!(names(&dir.join("m")), ["config.json", "model.pt"]);
    // Another checkpoint's, not IN's.
    publish(&dir, "o", "1.pt", "1_cfg.json");
    refused(&dir, "convert c o/1.safetensors --fold --force", "o/1.pt would no longer fit its cfg");
    // In place, and over a published one: its cfg is replaced, however the checkpoint is called.
    publish(&dir, "p", "cc_weights.pt", "cfg.json");
    assert_eq!(run(&dir, "convert p p/cc_weights.pt --fold --force").0, 0);
    publish(&dir, "q", "model.pt", "config.json");
    std::fs::write(dir.join("q/cfg.json"), "{}").unwrap();
    assert_eq!(run(&dir, "convert p q/model.pt --force").0, 0);
    assert_eq!(run(&dir, "convert p new.pt").0, 0);
    for (folder, weights) in [("p", "cc_weights.pt"), ("q", "model.pt")] {
        let [a, b] = [folder.to_owned(), format!("{folder}/{weights}")].map(|of| (eval(&of), latents(&of)));
        assert!(a == b && same(&a.1, &before), "{a:?} {b:?}");
    }
    assert_eq!((names(&dir.join("p")).len(), names(&dir.join("q")).len()), (2, 3));
    // A new folder's is found too.
    std::fs::create_dir(dir.join("n")).unwrap();
    assert_eq!(run(&dir, "convert p n/cc_weights.pt").0, 0);
    assert!(same(&latents("n"), &before) && same(&latents("n/cc_weights.pt"), &before));
    // Other weights of a cfg that several share.
    publish(&dir, "s", "cc_weights.pt", "cfg.json");
    std::fs::copy(dir.join("c/0.pt"), dir.join("s/other.pt")).unwrap();
    refused(&dir, "convert s s/cc_weights.pt --fold --force", "s/other.pt would no longer fit its cfg");
    // However they are spelled.
    for (from, to) in [("./s", "s/cc_weights.pt"), ("s", "./s/../s/cc_weights.pt"), (dir.to_str().unwrap(), "x")] {
        let (from, to) = if to == "x" { (format!("{from}/s"), "s/cc_weights.pt") } else { (from.to_owned(), to) };
        refused(&dir, &format!("convert {from} {to} --fold --force"), "other.pt would no longer fit its cfg");
    }
    assert!(same(&latents("s"), &before) && same(&latents("s/other.pt"), &before));
    // Weights without a cfg get none, neither those that stay nor those that are written; others are no weights.
    std::fs::create_dir(dir.join("w")).unwrap();
    std::fs::copy(dir.join("c/0.pt"), dir.join("w/z.pt")).unwrap();
    refused(&dir, "convert c w/z.safetensors --fold", "w/z.pt would no longer fit its cfg");
    assert_eq!(run(&dir, "convert w/z.pt w/y.safetensors").0, 0);
    refused(
        &dir,
        "convert w/z.pt c/0.safetensors",
        "c/0.safetensors: would be read with c/0_cfg.json, and IN has no cfg",
    );
    assert_eq!(run(&dir, "convert a.npy c/0.safetensors").0, 0);
    assert_eq!(run(&dir, "convert c c/0.safetensors --force").0, 0);
    std::fs::remove_file(dir.join("c/0.safetensors")).unwrap();
    // Of any ending; and what is not read otherwise may change.
    publish(&dir, "e", "1.pth", "1_cfg.json");
    refused(&dir, "convert c e/1.safetensors --fold --force", "e/1.pth would no longer fit its cfg");
    let told = std::fs::read_to_string(dir.join("e/1_cfg.json")).unwrap().replacen("{", "{\"a\": 1,", 1);
    std::fs::write(dir.join("e/1_cfg.json"), told).unwrap();
    assert_eq!(run(&dir, "convert c e/1.safetensors --force").0, 0);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("../c/0.pt", dir.join("o/link.pt")).unwrap();
        refused(&dir, "convert c o/link.pt --fold --force", "o/link.pt: is a link");
        std::os::unix::fs::symlink("1_cfg.json", dir.join("o/2_cfg.json")).unwrap();
        refused(&dir, "convert c o/2.pt --fold --force", "o/2_cfg.json: is a link");
        // IN may be a link to OUT: then that has a cfg of its own, and so has the link.
        publish(&dir, "l", "run.pt", "cfg.json");
        std::os::unix::fs::symlink("../l/run.pt", dir.join("o/in.pt")).unwrap();
        std::fs::copy(dir.join("c/0_cfg.json"), dir.join("o/in_cfg.json")).unwrap();
        assert_eq!(run(&dir, "convert o/in.pt l/run.pt --fold --force").0, 0);
        assert!(same(&latents("l/run.pt"), &before));
        std::os::unix::fs::symlink("run.pt", dir.join("l/latest.pt")).unwrap();
        std::fs::copy(dir.join("l/cfg.json"), dir.join("l/latest_cfg.json")).unwrap();
        refused(&dir, "convert c l/run.pt --force", "l/latest.pt would no longer fit its cfg");
        // A folder that somebody keeps locked does not hold it up.
        let locked = std::fs::File::open(dir.join("n")).unwrap();
        locked.lock().unwrap();
        assert_eq!(run(&dir, "convert c n/0.pt").0, 0);
        assert!(same(&latents("c"), &before) && same(&latents("o/1.pt"), &before));
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn what_is_folded_is_rounded_once_and_what_becomes_infinite_is_told() {
    let dir = with_factors("folded");
    assert_eq!(run(&dir, "convert c half.pt --dtype bf16").0, 0);
    let mut cfg = checkpoint::read_cfg(&dir.join("half_cfg.json")).unwrap();
    cfg.set("normalisation_factor", vec![1.7, 0.6]);
    std::fs::write(dir.join("half_cfg.json"), cfg.to_json()).unwrap();
    assert_eq!(run(&dir, "convert half.pt full.pt --fold --dtype fp32").0, 0);
    let read = |name: &str| checkpoint::read(&checkpoint::find(&dir.join(name)).unwrap()).unwrap().1.w_enc.to_f64_vec();
    let (half, full) = (read("half.pt"), read("full.pt"));
    let model = half.len() / 2;
    for (i, (half, full)) in half.iter().zip(&full).enumerate() {
        assert_eq!((half * [1.7, 0.6][i / model]) as f32, *full as f32);
    }
    cfg.set("normalisation_factor", vec![1e-38, 1.0]);
    std::fs::write(dir.join("half_cfg.json"), cfg.to_json()).unwrap();
    let (status, _, stderr) = run(&dir, "convert half.pt large.pt --fold --dtype fp16");
    assert!(status == 0 && stderr.contains("values too large for float16 are infinite"), "{stderr}");
    for none in [[1e-46, 1.0], [1.0, 1e-310]] {
        cfg.set("normalisation_factor", none.to_vec());
        std::fs::write(dir.join("half_cfg.json"), cfg.to_json()).unwrap();
        let (status, _, stderr) = run(&dir, "eval half.pt a.npy");
        assert!(status == 1 && stderr.contains("needs a list of positive numbers"), "{stderr}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_report_tells_what_rows_were_multiplied_with() {
    let dir = with_factors("scaled");
    for (option, factors, said) in [("", "[0.5,4.0]", true), (" --raw", "[1.0,1.0]", false)] {
        let (status, stdout, stderr) = run(&dir, &format!("report c a.npy --json - --out r.html --force{option}"));
        assert_eq!(status, 0, "{stderr}");
        let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(json["activations"]["factors"].to_string(), factors);
        assert_eq!(json["activations"]["source"], "a.npy");
        assert_eq!(std::fs::read_to_string(dir.join("r.html")).unwrap().contains("a.npy, times 0.5, 4"), said);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_latent_that_is_not_finite_is_an_error() {
    let dir = folder("infinite", 8);
    assert_eq!(run(&dir, "convert c h.pt --dtype fp16").0, 0);
    let mut values = vec![1.0; 3 * 2 * 4];
    values[2 * 4..2 * 2 * 4].fill(1e5);
    let rows = Tensor::new(vec![3, 2, 4], Values::F32(values)).unwrap();
    npy::write(std::fs::File::create(dir.join("large.npy")).unwrap(), &rows).unwrap();
    let (status, _, stderr) = run(&dir, "encode h.pt large.npy --out o.pt");
    assert!(status == 1 && stderr.contains("large.npy, row 1: latent "), "{stderr}");
    assert!(stderr.contains("computed in float16") && !dir.join("o.pt").exists(), "{stderr}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn all_outputs_or_none() {
    let dir = folder("outputs", 8);
    let before = names(&dir);
    refused(&dir, "report c --out r --csv ./r", "is the same file as");
    refused(&dir, "report c --out r --json c/../r --force", "is the same file as");
    refused(&dir, "report c --json j --out no/x.html", "there is no folder no");
    refused(&dir, "report c --json - --csv -", "may be -");
    refused(&dir, "encode c a.npy --out no/x.pt", "there is no folder no");
    refused(&dir, "encode c a.npy --out x.npy", "--out must be named .pt or .safetensors, found 'x.npy'");
    assert_eq!(names(&dir), before);
    // The names of charts are known when they are made. Of folders that were made for nothing none stays.
    refused(&dir, "report c --svg s --out ./s/cosine.svg", "is the same file as");
    assert_eq!(run(&dir, "report nowhere --svg s/t/u").0, 1);
    assert_eq!(names(&dir), before);
    let (status, stdout, stderr) = run(&dir, "report c --svg s --out s/o.html --csv - --json j.json");
    assert_eq!((status, stderr.lines().count(), stdout.lines().count()), (0, 5, 9), "{stderr}");
    assert_eq!(names(&dir.join("s")), ["cosine.svg", "decoder_norm.svg", "o.html", "relative_decoder_norm.svg"]);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn the_limit_of_rows_at_a_time_is_the_defaults() {
    let dir = folder("batch", 6000);
    let eval = |option: &str| run(&dir, &format!("eval c a.npy{option}")).1;
    let report = |option: &str| {
        let text = run(&dir, &format!("report c a.npy --json -{option}")).1;
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["activations"]["batch_size"].as_u64()
    };
    // The cfg says 4096: two batches of 3000.
    assert_eq!((eval(""), eval(" --batch-size 4096")), (eval(" --batch-size 3000"), eval(" --batch-size 3000")));
    assert_ne!(eval(" --batch-size 6000"), eval(" --batch-size 3000"), "about the mean of all rows");
    assert_eq!((report(""), report(" --batch-size 6000")), (Some(3000), Some(6000)));
    for verb in ["eval c a.npy", "report c a.npy", "encode c a.npy --out o.pt"] {
        refused(&dir, &format!("{verb} --batch-size 0"), "--batch-size needs 1 or more, found 0");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn messages_name_file_and_option() {
    let dir = folder("messages", 8);
    save(&dir.join("b.npy"), &[3, 3, 4]);
    let (status, _, stderr) = run(&dir, "eval c b.npy");
    let say = "b.npy, row 0: the activations are [n, 3, 4]; the crosscoder needs [n, 2, 4]";
    assert!(status == 1 && stderr.contains(say), "{stderr}");
    for option in ["--rows 3", "--top-rows 3", "--batch-size 3", "--raw"] {
        refused(&dir, &format!("report c {option}"), "is about ACTS, and there are none");
    }
    refused(&dir, "report c a.npy --rows -1", "--rows needs an integer of 0 or more, found '-1'");
    save(&dir.join("flat.npy"), &[3, 4]);
    let (_, _, stderr) = run(&dir, "eval c flat.npy");
    assert!(stderr.contains("flat.npy: has shape [3, 4]; activations are"), "{stderr}");
    let typed = std::fs::read_to_string(dir.join("c/0_cfg.json")).unwrap();
    std::fs::write(dir.join("c/0_cfg.json"), typed.replace("\"batch_size\": 4096", "\"batch_size\": \"x\"")).unwrap();
    let (status, _, stderr) = run(&dir, "eval c a.npy");
    assert!(status == 1 && stderr.contains("c/0_cfg.json: cfg key \"batch_size\" needs an integer"), "{stderr}");
    std::fs::write(dir.join("c/0_cfg.json"), typed).unwrap();
    // A factor that is no number, one too many: the cfg is named.
    let cfg = dir.join("c/0_cfg.json");
    for (factors, say) in
        [("[1, \"2\"]", "needs a list of positive numbers"), ("[1, 2, 3]", "has 3 factors for 2 models")]
    {
        let mut with = checkpoint::read_cfg(&cfg).unwrap();
        with.set("normalisation_factor", serde_json::from_str::<serde_json::Value>(factors).unwrap());
        std::fs::write(&cfg, with.to_json()).unwrap();
        for verb in ["eval c a.npy", "encode c a.npy --out o.pt", "report c a.npy"] {
            let (status, _, stderr) = run(&dir, verb);
            let say = format!("c/0_cfg.json: cfg key \"normalisation_factor\" {say}");
            assert!(status == 1 && stderr.contains(&say), "{verb}: {stderr}");
            if verb.starts_with("eval") {
                assert_eq!(run(&dir, &format!("{verb} --raw")).0, 0);
            }
        }
    }
    std::fs::create_dir_all(dir.join("runs/version_10")).unwrap();
    std::fs::create_dir(dir.join("runs/version_9")).unwrap();
    refused(&dir, "report runs", "runs: holds runs, not a checkpoint; the newest is runs/version_10");
    refused(&dir, "report c --name one --out n.html", "--name: the crosscoder reads 2 models, found 1 names");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
#[cfg(unix)]
fn a_signal_leaves_no_temporary_file() {
    let dir = folder("signal", 8);
    let elements = 1 << 26;
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({elements},), }}");
    let zeros = std::fs::File::create(dir.join("zeros.npy")).unwrap();
    (&zeros).write_all(&[b"\x93NUMPY\x01\0\x76\0", format!("{header:<117}\n").as_bytes()].concat()).unwrap();
    zeros.set_len(128 + 4 * elements).unwrap();
    let temporary = || names(&dir).iter().any(|name| name.ends_with(".crosscoder-tmp"));
    // In one of the tries the signal comes while the file is being written.
    let stopped = (0..20).any(|_| {
        let mut convert = Command::new(env!("CARGO_BIN_EXE_crosscoder"));
        let mut child = convert.args(["convert", "zeros.npy", "zeros.pt"]).current_dir(&dir).spawn().unwrap();
        while !temporary() && child.try_wait().unwrap().is_none() {}
        let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
        let status = child.wait().unwrap();
        let interrupted = std::os::unix::process::ExitStatusExt::signal(&status) == Some(15);
        assert!(!temporary() && (status.success() || interrupted), "{status:?}");
        let placed = std::fs::remove_file(dir.join("zeros.pt")).is_ok();
        assert!(placed || interrupted);
        !placed
    });
    assert!(stopped);
    // A shell has what it starts in the background of a script ignore SIGINT.
    let script = "trap '' INT; \"$@\" & p=$!; sleep 0.02; kill -INT $p; wait $p";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_crosscoder"), "convert", "zeros.npy", "zeros.pt"]);
    assert!(command.current_dir(&dir).status().unwrap().success());
    std::fs::remove_file(dir.join("zeros.pt")).unwrap();
    assert_eq!(names(&dir), ["a.npy", "c", "zeros.npy"]);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
#[cfg(unix)]
fn bench_writes_into_a_folder_of_its_own() {
    let dir = folder("bench", 8);
    std::fs::create_dir(dir.join("victim")).unwrap();
    // Links of names that can be guessed: the shell's number becomes the program's.
    let script = "ln -s victim crosscoder-bench-$$; ln -s victim crosscoder-bench-$$-0; exec \"$@\"";
    let bench = ["bench", "--case", "4,8,4,2", "--dtype", "fp32", "--op", "save"];
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_crosscoder")]).args(bench);
    let output = command.env("TMPDIR", &dir).current_dir(&dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains(",save,"), "it saved");
    assert_eq!(names(&dir.join("victim")), [""; 0]);
    let kept = names(&dir).into_iter().filter(|name| name.starts_with("crosscoder-bench-")).count();
    assert_eq!(kept, 2, "the links stay, its own folder does not");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_case_beyond_memory_is_refused() {
    let dir = std::env::temp_dir();
    for case in ["4,8,18446744073709551615,2", "4,8,9223372036854775808,2", "99999999999,99999999999,1,2"] {
        refused(&dir, &format!("bench --case={case} --dtype fp32 --op encode"), "GB of memory at least");
    }
    refused(&dir, "bench --case 4,8,x,2,2", "--case needs D_IN,DICT_SIZE,BATCH,L0");
}
