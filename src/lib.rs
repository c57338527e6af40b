//! Crosscoders, from scratch: sparse autoencoders that read the activations of two language models at once and find the
//! latents that the two share and those that only one has.
//!
//! # The model
//!
//! `x` [batch, n_models, d_in] holds one row of activations per token and model; `n_models` is 2 in the original.
//!
//! ```text
//! acts[b,h]  = relu(Σ_{m,d} x[b,m,d] · W_enc[m,d,h] + b_enc[h])            encode
//! rec[b,m,d] = Σ_h acts[b,h] · W_dec[h,m,d] + b_dec[m,d]                   decode
//! l2         = mean_b Σ_{m,d} (rec[b,m,d] - x[b,m,d])²                     get_losses
//! l1         = mean_b Σ_h acts[b,h] · Σ_m ‖W_dec[h,m]‖
//! l0         = mean_b |{h : acts[b,h] > 0}|
//! loss       = l2 + l1_coeff · l1                                          trained
//! ```
//!
//! The reference is the Python original, `crosscoder.py` of `ckkissane/crosscoder-model-diff-replication` at commit
//! `e221e8d`; names and order are its own. That this is the same mathematics is shown by [`golden`]: for each value, gradient
//! and trained weight, in fp32, fp16 and bf16, ours lies no further from the exact answer than the original's does.
//!
//! # Reading order
//!
//! [`autodiff`] (each formula of the loss, its gradient under it), [`CrossCoder`] (the class), [`backend`] (what the formulas
//! are made of), [`sparse`] (why the latents that are zero can be left out).
//!
//! # Features
//!
//! | feature | brings |
//! | --- | --- |
//! | `cli` (default) | the program `crosscoder`, with `hub` |
//! | `hub` | downloads from the Hugging Face hub, [`ureq`](https://docs.rs/ureq) and TLS |
//! | `cuda` | the backend for NVIDIA GPUs; in a crate that depends on this one it needs a CUDA toolkit to build, or the patch that the README names |
//!
//! Without default features this is the library on the CPU: `ndarray`, `half`, `zip`, `serde_json` and what they bring, of
//! which `crc32fast` and `zerocopy` are used here too.

pub mod activations;
pub mod analysis;
pub mod atomic;
pub mod autodiff;
pub mod backend;
pub mod batch_topk;
pub mod bench;
pub mod buffer;
pub mod checkpoint;
pub mod config;
mod crosscoder;
pub mod dtype;
pub mod error;
pub mod evaluation;
pub mod files;
pub mod golden;
#[cfg(feature = "hub")]
pub mod hub;
pub mod info;
pub mod init;
pub mod layouts;
mod magic;
pub mod normalisation;
pub mod npy;
pub mod optim;
pub mod pt;
mod raw;
pub mod report;
pub mod rng;
pub mod run;
pub mod safetensors;
pub mod sparse;
pub mod tensor;
mod threads;
pub mod trainer;

pub use config::Config;
pub use crosscoder::{CrossCoder, LossOutput};
pub use dtype::Dtype;
pub use error::{Error, ErrorKind, Result};
pub use tensor::{Tensor, Values};

/// The README's example, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
