//! Crosscoders, from scratch.

pub mod autodiff;
pub mod backend;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
mod crc32;
mod crosscoder;
pub mod dtype;
pub mod error;
pub mod files;
pub mod golden;
pub mod info;
mod magic;
pub mod npy;
pub mod pt;
mod raw;
pub mod safetensors;
pub mod sparse;
pub mod tensor;

pub use config::Config;
pub use crosscoder::{CrossCoder, LossOutput};
pub use dtype::Dtype;
pub use error::{Error, ErrorKind, Result};
pub use tensor::{Tensor, Values};
