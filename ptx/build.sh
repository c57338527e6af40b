#!/bin/sh
# Builds the .ptx files from the .cu files, or checks them.
#
#   ptx/build.sh          writes ptx/*.ptx
#   ptx/build.sh check    builds elsewhere and compares byte for byte; assembles with the newest and with old ptxas; fails on
#                         a difference, a register spill or local memory
#
# The compilers come from PyPI, at exact versions, into $PTX_TOOLS (by default target/ptx-tools), once. Needs python3.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
tools=${PTX_TOOLS:-$here/../target/ptx-tools}
general="rows latents product"
hopper="hopper"

if [ ! -x "$tools/ready" ]; then
    mkdir -p "$tools"
    python3 -m venv "$tools/venv"
    pip() { "$tools/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
    pip --target "$tools/cu13" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
        nvidia-cuda-runtime==13.0.96
    pip --target "$tools/cu11" nvidia-cuda-nvcc-cu11==11.8.89
    pip --target "$tools/cu12" nvidia-cuda-nvcc-cu12==12.0.140
    printf '#!/bin/sh\n' > "$tools/ready" && chmod +x "$tools/ready"
fi
nvcc="$tools/cu13/nvidia/cu13/bin/nvcc"
new="$tools/cu13/nvidia/cu13/bin/ptxas"
cu11="$tools/cu11/nvidia/cuda_nvcc/bin/ptxas"
cu12="$tools/cu12/nvidia/cuda_nvcc/bin/ptxas"
chmod +x "$nvcc" "$new" "$cu11" "$cu12" "$tools"/cu13/nvidia/cu13/bin/* "$tools"/cu13/nvidia/cu13/nvvm/bin/* 2> /dev/null || true

# build NAME VIRTUAL_ARCHITECTURE PTX_VERSION OUTPUT: the header states the oldest PTX that has all instructions in use,
# which ptxas of that time confirms below.
build() {
    "$nvcc" -ptx -std=c++17 -O3 -fmad=false -arch="$2" -o "$4" "$here/$1.cu"
    sed -i "s/^\.version .*/.version $3/; s/^\.target .*/.target sm_${2#compute_}/" "$4"
}

# assemble PTXAS ARCHITECTURE FILE
assemble() {
    said=$("$1" -v -arch="$2" -o "$scratch/cubin" "$3" 2>&1) || { echo "$said"; echo "$1 refuses $3"; exit 1; }
    if echo "$said" | grep -E 'C75[0-9][0-9]|[1-9][0-9]* bytes (stack frame|spill)'; then
        echo "$3 for $2: a spill, or wgmma or setmaxnreg not as written"
        exit 1
    fi
    # A multiprocessor has 65536 for all threads.
    most=$(echo "$said" | sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' | sort -n | tail -n 1)
    release=$("$1" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
    echo "ptxas $release, $2, $(basename "$3"): at most $most registers a thread"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case ${1:-} in
"") to=$here ;;
check) to=$scratch ;;
*) echo "usage: ptx/build.sh [check]" >&2; exit 2 ;;
esac
for name in $general; do
    build "$name" compute_80 7.0 "$to/$name.ptx"
done
for name in $hopper; do
    build "$name" compute_90a 8.0 "$to/$name.ptx"
done
[ "$to" = "$scratch" ] || exit 0

for name in $general $hopper; do
    cmp "$here/$name.ptx" "$to/$name.ptx" || { echo "ptx/$name.ptx is not what ptx/$name.cu gives; run ptx/build.sh"; exit 1; }
done
for name in $general; do
    assemble "$cu11" sm_80 "$here/$name.ptx"
    assemble "$new" sm_80 "$here/$name.ptx"
    assemble "$new" sm_90 "$here/$name.ptx"
done
for name in $hopper; do
    assemble "$cu12" sm_90a "$here/$name.ptx"
    assemble "$new" sm_90a "$here/$name.ptx"
done
echo "ptx: sources and PTX agree; assembled by ptxas 11.8, 12.0 and 13.0 without spills"
