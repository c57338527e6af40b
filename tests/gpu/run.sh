#!/bin/sh
# Runs the GPU backend's tests and benchmark on a machine with an NVIDIA GPU, and PyTorch beside it if it is there, and writes
# ptx/RESULTS.md. The machine needs neither Rust nor a CUDA toolkit.
#
# Where there is Rust (the same operating system and an equal or older C library):
#
#   cargo test --release --features cuda --test cuda --no-run      # prints where the program is: target/release/deps/cuda-…
#
# On the GPU machine, in a copy of the repository:
#
#   tests/gpu/run.sh PROGRAM [PYTHON]
#
# PROGRAM is that test program; PYTHON one that has torch, by default python3. Exit 1 if a test failed.
set -eu
program=${1:?the test program, built by: cargo test --release --features cuda --test cuda --no-run}
python=${2:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)
results=$root/ptx/RESULTS.md
export CROSSCODER_TEST_GPU=1 CROSSCODER_REQUIRE_CUDA=1 CROSSCODER_ROOT="$root"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Golden cases and every primitive against naive loops. One thread: the tests share the device.
status=0
"$program" --test-threads=1 > "$scratch/tests" 2>&1 || status=1
cat "$scratch/tests"
"$program" --ignored --nocapture --test-threads=1 benchmark > "$scratch/benchmark" 2>&1 || status=1
cat "$scratch/benchmark"
"$python" "$root/tests/gpu/torch_step.py" > "$scratch/torch" 2>&1 || echo "PyTorch: not measured" >> "$scratch/torch"
cat "$scratch/torch"

{
    echo "# Measured on a GPU"
    echo
    echo "Written by \`tests/gpu/run.sh\` on $(date -u +%Y-%m-%d)."
    echo
    grep '^device:' "$scratch/benchmark" || true
    echo
    nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader 2> /dev/null || true
    echo
    echo "## Tests"
    echo
    echo '```'
    grep -E '^test |^NOT RUN|panicked|^largest|^plain|^wild' "$scratch/tests" || true
    echo '```'
    echo
    echo "## Benchmark"
    echo
    echo "d_in 2304, 2 models, dict 16384, batch 4096, some 80 latents on; a step is forward, backward, clipping and Adam, with"
    echo "the batch's way up. Each row's product is checked against float64 where it is timed."
    echo
    grep '^|' "$scratch/benchmark" || true
    grep panicked "$scratch/benchmark" || true
    echo
    echo "## PyTorch on the same device"
    echo
    cat "$scratch/torch"
} > "$results"
echo "written: $results"
exit $status
