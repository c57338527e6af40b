//! `--device cuda` of every verb that computes: the program runs the shipped PTX in the interpreter, and where there is no
//! GPU it says why and gives the CPU's results.

#![cfg(all(feature = "cuda", feature = "cli", unix))]

mod standin;

use crosscoder::{Tensor, Values, npy, pt};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const CASES: [&str; 3] = ["fp32-small", "bf16-small", "fp16-small"];

fn case(name: &str) -> String {
    standin::root().join("fixtures/golden").join(name).display().to_string()
}

/// A directory of its own for a test, empty.
fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("crosscoder-cuda-cli-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// The program with these arguments, its driver being the stand-in with a device as `STANDIN_DEVICE` describes it; without
/// one, whatever the machine has.
fn crosscoder(args: &[&str], device: Option<&str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_crosscoder"));
    command.args(args).env_remove("LD_LIBRARY_PATH");
    if let Some(device) = device {
        command.env("LD_LIBRARY_PATH", standin::folder()).env("STANDIN_DEVICE", device);
    }
    command
}

const AMPERE: &str = "1,12000,8,0";
const HOPPER: &str = "1,12000,9,0";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn done(output: Output) -> String {
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// What the program prints on the CPU, and on the stand-in's device, where one of `kernels` must have run and nothing is
/// said about the CPU.
fn both(args: &[&str], device: &str, kernels: &[&str]) -> [String; 2] {
    let cpu = done(crosscoder(args, None).output().unwrap());
    let log = std::env::temp_dir().join(format!("crosscoder-kernels-{}-{:p}", std::process::id(), &args));
    let on_gpu = [args, &["--device", "cuda"]].concat();
    let output = crosscoder(&on_gpu, Some(device)).env("STANDIN_KERNELS", &log).output().unwrap();
    assert!(!text(&output.stderr).contains("the CPU is used"), "{}", text(&output.stderr));
    let gpu = done(output);
    let ran = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(&log).unwrap();
    for kernel in kernels {
        assert!(ran.lines().any(|line| line == *kernel), "{args:?} did not run {kernel}, but {ran}");
    }
    [cpu, gpu]
}

/// The same keys; numbers that differ by no more than `share` of the larger one.
fn assert_close(path: &str, a: &Value, b: &Value, share: f64) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{path}");
            a.iter().for_each(|(key, v)| assert_close(&format!("{path}.{key}"), v, &b[key], share));
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{path}");
            a.iter().zip(b).enumerate().for_each(|(i, (a, b))| assert_close(&format!("{path}[{i}]"), a, b, share));
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() <= share * a.abs().max(b.abs()).max(1e-3), "{path}: {a} on the CPU, {b} on the GPU");
        }
        _ => assert_eq!(a, b, "{path}"),
    }
}

/// Activations that fit a golden case's checkpoint.
fn activations(dir: &Path, d_in: usize) -> String {
    let n = 40;
    let mut state = 5u64;
    let values = (0..n * 2 * d_in).map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    });
    let tensor = Tensor::new(vec![n, 2, d_in], Values::F32(values.collect())).unwrap();
    let path = dir.join(format!("acts-{d_in}.npy"));
    npy::write(std::fs::File::create(&path).unwrap(), &tensor).unwrap();
    path.display().to_string()
}

fn d_in(case: &str) -> usize {
    let cfg = std::fs::read(Path::new(case).join("0_cfg.json")).unwrap();
    serde_json::from_slice::<Value>(&cfg).unwrap()["d_in"].as_u64().unwrap() as usize
}

#[test]
fn golden_on_the_gpu() {
    if !standin::ready("golden_on_the_gpu") {
        return;
    }
    for (device, kernel) in [(AMPERE, "product_nt_bf16"), (HOPPER, "hopper_nt_bf16")] {
        let [cpu, gpu] = both(&["golden", &case("bf16-small"), "--json"], device, &[kernel, "adam_bf16"]);
        // Half precision sums in another way: the errors of the two are not the same.
        assert_ne!(cpu, gpu);
    }
    let [cpu, gpu] = both(&["golden", &case("fp32-small")], AMPERE, &["product_nt_f32"]);
    assert!(cpu.contains(" 0.") && gpu.contains("1 cases"), "{gpu}");
}

#[test]
fn eval_and_encode_on_the_gpu() {
    if !standin::ready("eval_and_encode_on_the_gpu") {
        return;
    }
    let dir = folder("eval");
    for name in CASES {
        let (case, suffix) = (case(name), &name[..name.len() - 6]);
        let suffix = if suffix == "fp32" {
            "f32"
        } else if suffix == "fp16" {
            "f16"
        } else {
            "bf16"
        };
        let (acts, share) = (activations(&dir, d_in(&case)), if suffix == "f32" { 1e-5 } else { 2e-2 });
        let kernel = format!("squared_distances_{suffix}");
        let [cpu, gpu] = both(&["eval", &case, &acts, "--json"], AMPERE, &[&kernel]);
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_close(name, &json(&cpu), &json(&gpu), share);

        let latents = |device: &str| {
            let out = dir.join(format!("{name}-{device}.pt"));
            let args =
                ["encode", &case, &acts, "--out", out.to_str().unwrap(), "--batch-size", "17", "--device", device];
            done(crosscoder(&args, Some(HOPPER)).output().unwrap());
            let mut file = pt::open(&out).unwrap();
            ["crow_indices", "col_indices", "values", "size"].map(|key| {
                let tensor = file.find(&[key.into()]).unwrap();
                file.read(&tensor).unwrap().to_f64_vec()
            })
        };
        let ([cpu_rows, cpu_columns, cpu_values, cpu_size], [rows, columns, values, size]) =
            (latents("cpu"), latents("cuda:0"));
        assert_eq!(cpu_size, size, "{name}");
        assert!(!values.is_empty(), "{name}: no latent is on");
        if suffix == "f32" {
            // No latent lies so close to 0 here that the order of a sum decides.
            assert_eq!((cpu_rows, cpu_columns), (rows, columns), "{name}");
            for (cpu, gpu) in cpu_values.iter().zip(&values) {
                assert!((cpu - gpu).abs() <= 1e-5, "{name}: {cpu} on the CPU, {gpu} on the GPU");
            }
        } else {
            let sums = [cpu_values.iter().sum::<f64>(), values.iter().sum::<f64>()];
            assert!((sums[0] - sums[1]).abs() <= share * sums[0], "{name}: {sums:?}");
        }
    }
}

#[test]
fn report_on_the_gpu() {
    if !standin::ready("report_on_the_gpu") {
        return;
    }
    let (dir, case) = (folder("report"), case("fp32-small"));
    let acts = activations(&dir, d_in(&case));
    let kernels = ["group_norms_f32", "product_nt_f32"];
    let [cpu, gpu] = both(&["report", &case, &acts, "--json", "-"], AMPERE, &kernels);
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_close("report", &json(&cpu), &json(&gpu), 1e-3);
    // Without activations nothing is left to be summed there.
    let [cpu, gpu] = both(&["report", &case, "--json", "-"], AMPERE, &[]);
    assert_eq!(cpu, gpu);
}

#[test]
fn bench_on_the_gpu() {
    if !standin::ready("bench_on_the_gpu") {
        return;
    }
    let args = ["bench", "--case", "24,96,32,6", "--device", "cuda"];
    let rows = done(crosscoder(&args, Some(AMPERE)).output().unwrap());
    // Nine rows for each dtype, in float16 without the step; the results were checked before they were printed.
    assert_eq!(
        rows.lines().filter(|row| row.contains(",cuda PTX interpreter compute capability 8.0,")).count(),
        26,
        "{rows}"
    );
    assert_eq!(rows.lines().count(), 27, "{rows}");
}

#[test]
fn train_on_the_gpu_and_report() {
    if !standin::ready("train_on_the_gpu_and_report") {
        return;
    }
    let dir = folder("train");
    let acts = activations(&dir, 12);
    let keys = "--dict_size 32 --batch_size 8 --num_tokens 160 --save_every 7 --lr 1e-3 --json --val-fraction 0.2";
    let train = |device: &str| {
        let out = dir.join(device);
        let mut args = vec!["train", &acts, "--out", out.to_str().unwrap(), "--device", device];
        args.extend(keys.split(' '));
        let result: Value = serde_json::from_str(&done(crosscoder(&args, Some(AMPERE)).output().unwrap())).unwrap();
        assert!(out.join("version_0/report.html").is_file(), "{device}");
        result
    };
    let (cpu, gpu) = (train("cpu"), train("cuda"));
    for key in ["l2_loss", "l1_loss", "explained_variance"] {
        assert_close(key, &cpu[key], &gpu[key], 1e-3);
    }
}

#[test]
fn without_a_gpu_the_cpus_results_and_why() {
    if !standin::ready("without_a_gpu_the_cpus_results_and_why") {
        return;
    }
    let (dir, case) = (folder("fallback"), case("fp32-small"));
    let acts = activations(&dir, d_in(&case));
    let mut reasons = vec![
        (Some("0,12000,8,0"), "cuda:0: no device; the CPU is used"),
        (
            Some("1,10020,8,0"),
            "cuda:0: driver too old for this module: rows needs a driver of CUDA 11.0, this one is of 10.2; the CPU is used",
        ),
        (
            Some("1,12000,7,5"),
            "cuda:0: PTX interpreter has compute capability 7.5; the kernels need 8.0; the CPU is used",
        ),
    ];
    let no_driver =
        !Command::new("ldconfig").arg("-p").output().is_ok_and(|o| text(&o.stdout).contains("libcuda.so.1"));
    if no_driver {
        reasons.push((None, "cuda:0: no NVIDIA driver; the CPU is used"));
    }
    for (device, why) in reasons {
        for args in [
            vec!["eval", &case, &acts],
            vec!["report", &case, &acts, "--json", "-"],
            vec!["golden", &case],
            vec!["encode", &case, &acts, "--out", dir.join("never").to_str().unwrap()],
        ] {
            let out = dir.join("latents.pt").display().to_string();
            let args: Vec<&str> = args.iter().map(|arg| if arg.ends_with("never") { &out } else { *arg }).collect();
            let cpu = done(crosscoder(&args, device).output().unwrap());
            let _ = std::fs::remove_file(&out);
            let output = crosscoder(&[&args[..], &["--device", "cuda"]].concat(), device).output().unwrap();
            let _ = std::fs::remove_file(&out);
            assert_eq!(text(&output.stderr).lines().next(), Some(why), "{args:?}");
            assert_eq!(done(output), cpu, "{args:?}");
        }
    }
    let wrong = crosscoder(&["eval", &case, &acts, "--device", "gpu"], None).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(text(&wrong.stderr).contains("it must be \"cpu\", \"cuda\" or \"cuda:N\""), "{}", text(&wrong.stderr));
}
