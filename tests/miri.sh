#!/usr/bin/env bash
# The readers of foreign bytes under Miri: undefined behaviour in what they depend on, since they have no `unsafe` of their own.
# `tests/miri.sh [mutants for each target]`, 20 by default. Needs `rustup toolchain install nightly --component miri --component rust-src`.
# Miri is some hundred times slower than the processor: hence these tests and not all, and few mutants. Where a record is unpacked it
# reports zlib-rs, see RESULTS.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export MIRIFLAGS="-Zmiri-disable-isolation ${MIRIFLAGS-}" CROSSCODER_FUZZ_EXECUTIONS=${1:-20}
miri() { cargo +nightly miri test --no-default-features --target-dir target/miri "$@"; }
miri --lib -- pt:: npy:: safetensors:: raw:: magic:: files:: layouts:: config:: tensor:: error:: --skip raw::tests::elements --skip raw::tests::pieces
miri --test fuzz -- --skip little_costs_little
