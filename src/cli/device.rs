//! `--device`, the same for every verb that computes: from its value to a backend.

use crosscoder::CrossCoder;
use crosscoder::autodiff::Parameters;
use crosscoder::backend::{Backend, Picked};
use crosscoder::checkpoint::{self, Files};
use crosscoder::config::Config;
use crosscoder::dtype::Dtype;
use crosscoder::error::Result;
use crosscoder::tensor::Tensor;
use std::io::Write;

/// What verbs without a cfg of their own compute on unless `--device` is given. A checkpoint's cfg does not count: its `device`
/// says where it was trained.
pub(crate) const DEFAULT: &str = "cpu";

/// The backend for `device` in `dtype`. Where a GPU is asked for and there is none, stderr tells why in one line, and the
/// CPU is taken.
pub(crate) fn pick(device: &str, dtype: Dtype) -> Result<Picked> {
    let picked = crosscoder::backend::pick(device, dtype)?;
    if let Picked::Cpu(_, Some(why)) = &picked {
        let _ = writeln!(std::io::stderr(), "{why}");
    }
    Ok(picked)
}

/// A checkpoint on the host.
pub(crate) struct Checkpoint {
    cfg: Config,
    weights: Parameters<Tensor>,
    files: Files,
}

impl Checkpoint {
    /// Reads a checkpoint, and picks the backend for its dtype.
    pub(crate) fn read(files: &Files, device: &str) -> Result<(Self, Picked)> {
        let (cfg, weights) = checkpoint::read(files)?;
        let picked = pick(device, cfg.enc_dtype().map_err(|e| e.in_file(&files.cfg))?)?;
        Ok((Checkpoint { cfg, weights, files: files.clone() }, picked))
    }

    /// The crosscoder on this backend.
    pub(crate) fn on<B: Backend>(self, backend: B) -> Result<CrossCoder<B>> {
        CrossCoder::from_tensors(backend, self.cfg, self.weights).map_err(|e| self.files.blame(e))
    }
}

/// The value of an expression in which the backend that was picked has this name, whichever it is.
macro_rules! with_backend {
    ($picked:expr, |$backend:ident| $value:expr) => {
        match $picked {
            crosscoder::backend::Picked::Cpu($backend, _) => $value,
            #[cfg(feature = "cuda")]
            crosscoder::backend::Picked::Cuda($backend) => $value,
        }
    };
}
pub(crate) use with_backend;
