#!/bin/sh
# Runs the GPU backend's golden cases, tests and benchmark on a machine with an NVIDIA GPU, and PyTorch beside it if it is
# there, and writes ptx/RESULTS.md. The machine needs neither Rust nor a CUDA toolkit nor a network.
#
# Build where there is Rust (the two programs open the driver at run time, so they must be dynamic: no musl; they need a C
# library as new as what they were built with uses: built on Debian 12, glibc 2.34, as `objdump -T` tells):
#
#   cargo build --release --features cuda
#   cargo test --release --features cuda --test cuda --no-run      # prints the program's name: target/release/deps/cuda-…
#   mkdir gpu && cp target/release/crosscoder gpu/ && cp target/release/deps/cuda-… gpu/cuda-tests
#
# On the GPU machine, in a copy of the repository:
#
#   tests/gpu/run.sh gpu [PYTHON]
#
# PYTHON is one that has torch, by default python3. It takes some three minutes, each part has a limit, all of them ten. What
# is measured is printed and written at once, what is worth most first: whoever loses the machine keeps what was done.
#
#   RESULTS=F                        writes there instead of ptx/RESULTS.md
#   ORIGINAL=crosscoder.py           times the original's own class too
#   CROSSCODER_BENCHMARK=24,2,96,32,6   other sizes (d_in, models, dict, batch, latents on): to try the script out
#
# Exit status 1 if a golden case or a test failed.
set -u
programs=$(cd "${1:?the folder with crosscoder and cuda-tests; see the head of this script}" && pwd)
python=${2:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)
results=${RESULTS:-$root/ptx/RESULTS.md}
sizes=${CROSSCODER_BENCHMARK:-2304,2,16384,4096,80}
export CROSSCODER_TEST_GPU=1 CROSSCODER_REQUIRE_CUDA=1 CROSSCODER_ROOT="$root"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The driver compiles the kernels once, not once a process.
export CUDA_CACHE_PATH="$scratch/cache"
status=0

say() {
    printf '%s\n' "$@" | tee -a "$results"
}

# part SECONDS FILE COMMAND…: runs it, its output into FILE; says what became of it, and how long it took.
part() {
    limit=$1 file=$2 start=$(date +%s)
    shift 2
    timeout "$limit" "$@" > "$file" 2> "$file.err"
    rc=$?
    [ $rc -ne 124 ] || echo "stopped after $limit s" >> "$file.err"
    echo "-- exit status $rc after $(($(date +%s) - start)) s: $*"
    return $rc
}

# The last words of a part that failed.
failed() {
    status=1
    say '' '```' "$(tail -n 20 "$1" "$1.err")" '```'
}

: > "$results"
say '# Measured on a GPU' '' "Written by \`tests/gpu/run.sh\` on $(date -u '+%Y-%m-%d %H:%M') UTC." ''
say "$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv 2> /dev/null ||
    echo 'no nvidia-smi')"

say '' '## Golden cases' '' '`crosscoder golden fixtures/golden --device cuda`; `f64` is the CPU.'
if part 60 "$scratch/golden" "$programs/crosscoder" golden "$root/fixtures/golden" --device cuda &&
    ! grep 'the CPU is used' "$scratch/golden.err"; then
    say '' '```' "$(grep MISS "$scratch/golden")" "$(tail -n 6 "$scratch/golden")" '```'
else
    failed "$scratch/golden"
fi

say '' '## Benchmark' '' \
    "d_in, models, dict, batch, latents on: $sizes. A step is forward, backward, clipping and Adam, with the batch's way up from" \
    "the host. Each row's product is checked against float64 where it is timed. \`general\`: without Hopper's own products." ''
part 120 "$scratch/benchmark" "$programs/cuda-tests" --ignored --nocapture --test-threads=1 benchmark || failed "$scratch/benchmark"
say "$(grep -o 'device: .*' "$scratch/benchmark")" '' "$(sed -n '/^$/p; /^|/p' "$scratch/benchmark" | cat -s)"

say '' '## PyTorch on the same device' ''
part 120 "$scratch/torch" "$python" "$root/tests/gpu/torch_step.py" "$sizes" ${ORIGINAL:+"$ORIGINAL"} ||
    echo "PyTorch: not measured: $(tail -n 1 "$scratch/torch.err")" >> "$scratch/torch"
say "$(cat "$scratch/torch")"

say '' '## Against the targets' ''
cat "$scratch/torch" "$scratch/benchmark" | awk -F'|' '
    function number(text) { gsub(/[^0-9.]/, "", text); return text + 0 }
    function least(old, new) { return old == 0 || new < old ? new : old }
    /^\| the original float32, TF32 off/ { torch32 = number($4) }
    /^\| the original bfloat16/ { torch16 = number($4) }
    /^\| PyTorch float32, TF32 off/ { torch32 = number($4) }
    /^\| PyTorch float32, TF32 on/ { tf32 = number($4) }
    /^\| PyTorch bfloat16/ { cublas = number($3); torch16 = number($4) }
    /^\| float32 / {
        ours32 = least(ours32, number($7))
        if ($3 ~ /dense/) dense32 = least(dense32, number($7))
    }
    /^\| bfloat16 / {
        ours16 = least(ours16, number($7))
        if ($3 ~ /dense/) dense16 = least(dense16, number($7))
        if ($4 ~ /general/) { if (number($5) > general) general = number($5) } else if (number($5) > own) own = number($5)
    }
    END {
        if (torch32 && ours32) printf "- step in float32: %.2f times as fast as PyTorch (target 5), %.2f times with TF32 on\n", torch32 / ours32, tf32 / ours32
        if (torch16 && ours16) printf "- step in bfloat16: %.2f times as fast as PyTorch (target 2)\n", torch16 / ours16
        if (torch32 && dense32) printf "- the same with dense latents, as at the start of training: %.2f times\n", torch32 / dense32
        if (torch16 && dense16) printf "- and in bfloat16: %.2f times\n", torch16 / dense16
        if (cublas && own) printf "- encoder in bfloat16: %.0f %% of the rate of PyTorch (target 70)\n", 100 * own / cublas
        if (cublas && general) printf "- the same without wgmma: %.0f %% (target 55)\n", 100 * general / cublas
    }' > "$scratch/targets"
say "$(cat "$scratch/targets")"

say '' '## Tests' '' 'Every primitive against naive loops, golden cases, training steps, on the device.' '' '```'
part 150 "$scratch/tests" "$programs/cuda-tests" --nocapture --test-threads=1 || status=1
say "$(grep -hE '^test |^NOT RUN|panicked|assertion|^largest|^plain|^wild|^test result' "$scratch/tests" "$scratch/tests.err")" '```'

say '' '## The program' ''
set -- $(echo "$sizes" | tr ',' ' ')
for dtype in fp32 bf16; do
    part 40 "$scratch/bench" "$programs/crosscoder" bench --device cuda --case "$1,$3,$4,$5" --dtype $dtype --op step ||
        failed "$scratch/bench"
    say "    $(tail -n 1 "$scratch/bench")"
done
(cd "$scratch" && part 40 "$scratch/train" "$programs/crosscoder" train --device cuda --out run) || failed "$scratch/train"
say '' '`crosscoder train --device cuda` on the built-in set:' '' '```' "$(cat "$scratch/train" "$scratch/train.err")" '```'
echo "written: $results; exit status $status"
exit $status
