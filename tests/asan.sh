#!/usr/bin/env bash
# The library's tests under AddressSanitizer: accesses outside of what was allocated, after it was freed, and leaks, in the CPU
# kernels, which are `unsafe`, and in what the parsers depend on. `tests/asan.sh [more of cargo test's options]`.
# The standard library is not instrumented; what it allocates is seen. Linux on x86-64; the toolchain brings the runtime.
set -euo pipefail
cd "$(dirname "$0")/.."
unset CARGO_ENCODED_RUSTFLAGS # It would take the place of RUSTFLAGS.
# A stable compiler takes the flag only so.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address ${RUSTFLAGS-}"
# Where there is no memory, the allocator says so, as without the sanitizer.
export ASAN_OPTIONS="allocator_may_return_null=1:detect_stack_use_after_return=1:${ASAN_OPTIONS-}"
# With --target the flag is not that of build scripts; a folder of its own keeps the other builds.
options=(--no-default-features --target x86_64-unknown-linux-gnu --target-dir target/asan --lib --tests)
# Without the sanitizer all tests pass, too.
programs=$(cargo test "${options[@]}" --no-run "$@" 2>&1 | tee /dev/stderr | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
[ -n "$programs" ] || { echo "no test program was built" >&2 && exit 1; }
for program in $programs; do
  grep -q __asan_report "$program" || { echo "$program is not instrumented" >&2 && exit 1; }
done
exec cargo test "${options[@]}" "$@"
