//! Crosscoders, from scratch.

pub mod dtype;
pub mod error;
pub mod tensor;

pub use dtype::Dtype;
pub use error::{Error, ErrorKind, Result};
pub use tensor::{Tensor, Values};
