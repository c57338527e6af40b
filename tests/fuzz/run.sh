#!/usr/bin/env bash
# Fuzzes one target under libFuzzer, on a stable toolchain: `tests/fuzz/run.sh TARGET SECONDS [more of libFuzzer's options]`.
# Targets: pt, pickle, npy, safetensors, cfg, checkpoint. Needs a C++ compiler, which builds libFuzzer. What is found lies in artifacts/.
set -euo pipefail
cd "$(dirname "$0")"
target=$1 seconds=$2
shift 2
# What rustc does for `-Z sanitizer=fuzzer`, if it had that: counters for each edge, and comparisons.
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
  -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"
# With --target the flags are not those of build scripts.
# The file that the target `checkpoint` writes is best in memory: TMPDIR=/dev/shm.
host=$(rustc -vV | sed -n 's/^host: //p')
cargo build --release --target "$host"
program=target/$host/release/crosscoder-fuzz
corpus=corpus/$target
mkdir -p "$corpus" "artifacts/$target"
CROSSCODER_FUZZ=seeds:$target:$corpus "$program"
CROSSCODER_FUZZ=$target exec "$program" "$corpus" -max_total_time="$seconds" -artifact_prefix="artifacts/$target/" \
  -timeout=5 -rss_limit_mb=1024 -max_len=65536 -print_final_stats=1 "$@"
