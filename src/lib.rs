//! Crosscoders, from scratch.

pub mod autodiff;
pub mod backend;
pub mod config;
mod crosscoder;
pub mod dtype;
pub mod error;
pub mod golden;
#[cfg(feature = "hub")]
pub mod hub;
pub mod sparse;
pub mod tensor;

pub use config::Config;
pub use crosscoder::{CrossCoder, LossOutput};
pub use dtype::Dtype;
pub use error::{Error, ErrorKind, Result};
pub use tensor::{Tensor, Values};
