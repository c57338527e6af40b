//! One target under libFuzzer: `CROSSCODER_FUZZ=pickle crosscoder-fuzz corpus/pickle …`. With `CROSSCODER_FUZZ=seeds:pickle:FOLDER`
//! the seeds of a target are written to a folder instead.
#![no_main]

mod counting;
mod targets;

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use std::sync::OnceLock;

static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("CROSSCODER_FUZZ").unwrap_or_default();
        let (name, folder) = match name.strip_prefix("seeds:").and_then(|rest| rest.split_once(':')) {
            Some((name, folder)) => (name, Some(folder)),
            None => (name.as_str(), None),
        };
        let target = targets::ALL.into_iter().find(|t| t.0 == name).expect("CROSSCODER_FUZZ is the name of a target").1;
        if let Some(folder) = folder {
            let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
            for (i, seed) in targets::seeds(name, &fixtures, 1 << 16).iter().enumerate() {
                std::fs::write(Path::new(folder).join(format!("seed-{i:04}")), seed).expect("the folder can be written to");
            }
            std::process::exit(0);
        }
        TARGET.get_or_init(|| target);
    },
    |data: &[u8]| {
        if let Some(target) = TARGET.get() {
            target(data);
        }
    }
);
