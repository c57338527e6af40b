//! The GPU backend: the shipped PTX, run through cust and the driver's interface by an interpreter, or on a real device with
//! `CROSSCODER_TEST_GPU=1`.

#![cfg(feature = "cuda")]

mod primitives;
mod standin;

use crosscoder::Dtype;
use crosscoder::backend::cuda::{Cuda, Product};
use crosscoder::sparse::Path;
use primitives::*;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

fn cuda(dtype: Dtype) -> Cuda {
    Cuda::new(0, dtype).unwrap_or_else(|e| panic!("{e}; the interpreter says: {}", standin::fault()))
}

#[test]
fn primitives_agree_with_naive_loops() {
    if !standin::ready("primitives_agree_with_naive_loops") {
        return;
    }
    for dtype in DTYPES {
        let be = cuda(dtype);
        for path in [Path::Sparse, Path::Dense] {
            for shape in SHAPES {
                check(&be.clone().with_path(path), shape);
            }
        }
    }
}
