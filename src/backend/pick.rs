//! From a device's name to a backend, with the CPU as fallback.

use super::Cpu;
#[cfg(feature = "cuda")]
use super::cuda::Cuda;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// What [`pick`] found.
#[derive(Clone)]
pub enum Picked {
    /// The CPU; where a GPU was asked for, one line that says why it is not used.
    Cpu(Cpu, Option<String>),
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(Cuda),
}

/// The backend for `cpu`, `cuda` or `cuda:N`, in `dtype`: what `--device` and a cfg's `device` mean. A GPU means "if
/// there is one": where there is none the CPU is picked, and the reason is given in one line (`cuda:0: no NVIDIA
/// driver; the CPU is used`).
///
/// # Errors
/// Any other name.
///
/// # Panics
/// If `dtype` is not a float type that a crosscoder can have.
pub fn pick(device: &str, dtype: Dtype) -> Result<Picked> {
    let unknown = || Error::usage(format!("device {device:?}; it must be \"cpu\", \"cuda\" or \"cuda:N\""));
    let ordinal = match device.split_once(':') {
        None if device == "cpu" => return Ok(Picked::Cpu(Cpu::new(dtype), None)),
        None if device == "cuda" => 0,
        Some(("cuda", n)) if !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()) => {
            n.parse::<usize>().map_err(|_| unknown())?
        }
        _ => return Err(unknown()),
    };
    Ok(gpu(ordinal, dtype)
        .unwrap_or_else(|why| Picked::Cpu(Cpu::new(dtype), Some(format!("cuda:{ordinal}: {why}; the CPU is used")))))
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: usize, dtype: Dtype) -> Result<Picked> {
    Cuda::new(ordinal, dtype).map(Picked::Cuda)
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize, _: Dtype) -> Result<Picked> {
    Err(Error::unsupported("this program was built without the feature `cuda`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert!(matches!(pick("cpu", Dtype::F32), Ok(Picked::Cpu(_, None))));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:+1", "cpu:0", "cuda:99999999999999999999999"] {
            let error = pick(wrong, Dtype::F32).err().expect(wrong);
            assert_eq!(error.kind(), crate::ErrorKind::Usage, "{wrong}");
        }
    }

    #[test]
    fn a_gpu_that_is_not_there_is_told_of_in_one_line() {
        // No machine has a device of this number; many have none at all.
        match pick("cuda:4000000", Dtype::BF16).unwrap() {
            Picked::Cpu(_, Some(why)) => {
                assert!(why.starts_with("cuda:4000000: ") && why.ends_with("; the CPU is used"), "{why}");
                assert!(!why.contains('\n'), "{why}");
            }
            _ => panic!("a GPU of this number"),
        }
    }
}
