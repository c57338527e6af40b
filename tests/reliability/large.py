#!/usr/bin/env python3
"""Checkpoints of 604 MB and 4.5 GB, activations of 8 GB: how much memory and time they take.

    cargo build --release
    tests/reliability/large.py [checkpoints] [activations] [--dict-sizes 16384 122880] [--gigabytes 8] [--formats npy safetensors pt]

checkpoints  two models of d_in 2304 in float32: 16,384 latents are 604 MB, 122,880 are 4.5 GB (more than a zip without zip64
             holds). `info --list` takes at most 20 ms (the median of nine) and 32 MiB; `convert` from .pt to .pt, which loads and saves,
             at most the tensors and 64 MiB; what is saved is byte for byte what was loaded; `info` has the same checksums; torch, where
             it is installed, reads the same. Then a run of two steps on 604 MB: its saves may not add more than 64 MiB to the most it held before them.
activations  a .npy, .safetensors and .pt of 8 GB, sparse on disk: `info` with checksums, `eval`, and a training run that reads all
             over the set take at most 512 MiB each.

Needs Linux, three times the largest checkpoint as free disk, its size as memory; removes what it made.
"""

import array
import json
import os
import shutil
import statistics
import struct
import subprocess
import time
import zlib

import common

D_IN = 2304
CFG = {"seed": 49, "batch_size": 4096, "buffer_mult": 128, "lr": 5e-05, "num_tokens": 400000000, "l1_coeff": 2, "beta1": 0.9, "beta2": 0.999,
       "d_in": D_IN, "seq_len": 1024, "enc_dtype": "fp32", "device": "cpu", "log_every": 100, "save_every": 30000, "dec_init_norm": 0.08}


def safetensors(path, shapes, pieces):
    """A .safetensors of float32; what `pieces` does not write is a hole in the file."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        start = f.tell()
        f.truncate(start + at)
        for offset, data in pieces:
            f.seek(start + offset)
            f.write(data)


def checkpoint(dir, dict_size):
    """A checkpoint as .safetensors: numbers at the ends of each tensor, zeros between."""
    shapes = {"W_enc": [2, D_IN, dict_size], "W_dec": [dict_size, 2, D_IN], "b_enc": [dict_size], "b_dec": [2, D_IN]}
    some = array.array("f", [i / 7 for i in range(1, D_IN)]).tobytes()
    weight = 2 * D_IN * dict_size * 4
    total = 2 * weight + 4 * dict_size + 8 * D_IN
    pieces = [(0, some), (weight - len(some), some), (weight, some), (2 * weight, some), (total - len(some), some)]
    path = dir / "in.safetensors"
    safetensors(path, shapes, pieces)
    (dir / "in_cfg.json").write_text(json.dumps({**CFG, "dict_size": dict_size}))
    return path, total


def crcs(args, path):
    code, out, err, seconds, kib = common.peak(args, ["info", "--json", path])
    common.check(code == 0, f"info {path.name}", err)
    return {t["name"]: t["crc32"] for t in json.loads(out)["tensors"]}, seconds, kib


def read_with_torch(path):
    import torch

    found = {}
    for name, t in torch.load(path, weights_only=True, mmap=True).items():
        crc = 0
        for row in t if t.dim() > 1 and t.is_contiguous() else [t]:
            crc = zlib.crc32(row.contiguous().numpy(), crc)
        found[name] = f"{crc:08x}"
    return found


def checkpoints(args, dir, torch):
    for dict_size in args.dict_sizes:
        source, total = checkpoint(dir, dict_size)
        mib, size = total / 2**20, f"{total / 1e9:.3f} GB"
        one, two = dir / "one" / "out.pt", dir / "two" / "out.pt"
        for p in (one, two):
            p.parent.mkdir(exist_ok=True)
        code, _, err, seconds, kib = common.peak(args, ["convert", source, one, "--force"])
        common.check(code == 0, f"{size}: convert from .safetensors", err)
        print(f"{size}: .safetensors to .pt: {seconds:.1f} s, tensors + {kib / 1024 - mib:.1f} MiB")
        lists = [common.peak(args, ["info", "--list", one]) for _ in range(9)]
        milliseconds, most = 1000 * statistics.median(run[3] for run in lists), max(run[4] for run in lists) / 1024
        print(f"{size}: info --list: {milliseconds:.1f} ms, {most:.1f} MiB")
        common.check(all(run[0] == 0 for run in lists), f"{size}: listed")
        common.check(milliseconds <= 20, f"{size}: listed in 20 ms", milliseconds)
        common.check(most <= 32, f"{size}: listed in 32 MiB", most)
        code, _, err, seconds, kib = common.peak(args, ["convert", one, two, "--force"])
        extra = kib / 1024 - mib
        print(f"{size}: .pt to .pt: {seconds:.1f} s, tensors + {extra:.1f} MiB")
        common.check(code == 0, f"{size}: loaded and saved", err)
        common.check(extra <= 64, f"{size}: loaded and saved in the tensors + 64 MiB", extra)
        same = subprocess.run(["cmp", "-s", one, two]).returncode == 0
        common.check(same, f"{size}: saved byte for byte")
        two.unlink()
        expected, _, _ = crcs(args, source)
        common.check(len(expected) == 4, f"{size}: four tensors", expected)
        found, seconds, kib = crcs(args, one)
        print(f"{size}: info with checksums: {seconds:.1f} s, {kib / 1024:.1f} MiB")
        common.check(found == expected, f"{size}: the same tensors", (found, expected))
        common.check(one.stat().st_size < 2**32 or b"PK\x06\x06" in tail(one), f"{size}: zip64 where it must be")
        if torch:
            theirs = common.with_torch(read_with_torch, one)
            common.check(theirs == expected, f"{size}: torch reads the same", theirs)
        one.unlink()
        source.unlink()


def tail(path):
    with path.open("rb") as f:
        f.seek(-4096, os.SEEK_END)
        return f.read()


def saving(args, dir):
    """A run that saves 604 MB: the most memory before its first save, and after."""
    acts, out = dir / "acts.npy", dir / "out"
    common.activations(acts, 64, D_IN)
    keys = "--dict_size 16384 --batch_size 16 --buffer_mult 2 --num_tokens 64 --save_every 2 --log_every 1 --threads 1 --no-report --val-fraction 0"
    child = subprocess.Popen([args.program, "train", acts, "--out", out, *keys.split()], stdout=subprocess.DEVNULL)
    before = after = samples = 0
    while child.poll() is None:
        try:
            after = common.status(child.pid)[1]
            if not list(out.glob("version_0/.0.pt*")) and not list(out.glob("version_0/0*")):
                before = after
            else:
                samples += 1
        except (FileNotFoundError, KeyError, ProcessLookupError):
            pass
        time.sleep(0.005)
    extra = (after - before) / 1024
    print(f"0.604 GB: train: {before / 1024:.0f} MiB before the first save, {extra:.1f} MiB more in the end")
    common.check(child.returncode == 0, "train 0.604 GB")
    common.check(before and samples, "seen before the first save and in it", (before, samples))
    common.check(extra <= 64, "saving takes at most 64 MiB more", extra)
    shutil.rmtree(out)
    acts.unlink()


def crc_of_zeros(n):
    block, crc = bytes(1 << 26), 0
    for _ in range(n >> 26):
        crc = zlib.crc32(block, crc)
    return zlib.crc32(bytes(n & (1 << 26) - 1), crc)


def sparse_pt(path, shape):
    """A .pt with one tensor of zeros under the name `acts`, as torch.save writes it but with a hole for the data."""
    count = shape[0] * shape[1] * shape[2]
    number = lambda n: b"\x8a" + bytes([(n.bit_length() + 8) // 8]) + n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()
    strides = (shape[1] * shape[2], shape[2], 1)
    triple = lambda t: b"(" + b"".join(map(number, t)) + b"t"
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    pickle = b"\x80\x02}" + text("acts") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + triple(shape) + triple(strides)
    pickle += b"\x89ccollections\nOrderedDict\n)RtRs."
    with path.open("wb") as f:
        directory = b""
        for name, data, hole in (("acts/data.pkl", pickle, 0), ("acts/byteorder", b"little", 0), ("acts/data/0", b"", 4 * count), ("acts/version", b"3\n", 0)):
            at, size, crc = f.tell(), hole or len(data), crc_of_zeros(hole) if hole else zlib.crc32(data)
            wide = struct.pack("<HHQQ", 1, 16, size, size)
            fields = lambda s, extra: struct.pack("<HHHHHIIIHH", 45, 0x800, 0, 0, 33, crc, s, s, len(name), extra)
            f.write(b"PK\3\4" + fields(2**32 - 1, 20) + name.encode() + wide + data)
            f.truncate(f.tell() + hole)
            f.seek(hole, os.SEEK_CUR)
            wide = struct.pack("<HHQQQ", 1, 24, size, size, at)
            directory += b"PK\1\2" + struct.pack("<H", 45) + fields(2**32 - 1, 28) + struct.pack("<HHHII", 0, 0, 0, 0, 2**32 - 1) + name.encode() + wide
        at, end = f.tell(), f.tell() + len(directory)
        f.write(directory + b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 4, 4, len(directory), at))
        f.write(b"PK\6\7" + struct.pack("<IQI", 0, end, 1) + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 4, 4, len(directory), 2**32 - 1, 0))


def activations(args, dir):
    rows = int(args.gigabytes * 1e9) // (2 * D_IN * 4)
    cfg, out = dir / "given.json", dir / "out"
    cfg.write_text('{"normalisation_factor": [1.0, 1.0]}')
    small = "--dict_size 32 --batch_size 256 --save_every 1000 --log_every 50 --no-report --val-fraction 0"
    for suffix in args.formats:
        path = dir / f"large.{suffix}"
        if suffix == "npy":
            common.write_npy(path, (rows, 2, D_IN), [])
            os.truncate(path, path.stat().st_size + rows * 2 * D_IN * 4)
        elif suffix == "safetensors":
            safetensors(path, {"acts": [rows, 2, D_IN]}, [])
        else:
            sparse_pt(path, (rows, 2, D_IN))
        size = f"{path.stat().st_size / 1e9:.1f} GB .{suffix}"
        # A pass over a half of it: the shuffle buffer reads on all through the run.
        steps = rows // 256 // 2
        verbs = [["info", path], ["train", path, "--out", out, "--cfg", cfg, *small.split(), "--num_tokens", steps * 256], ["eval", out / "version_0", path, "--raw"]]
        for verb in verbs:
            code, _, err, seconds, kib = common.peak(args, verb, 7200)
            print(f"{size}: {verb[0]}: {seconds:.1f} s, {kib / 1024:.1f} MiB", flush=True)
            common.check(code == 0, f"{size}: {verb[0]}", err)
            common.check(kib <= 512 << 10, f"{size}: {verb[0]} in 512 MiB", kib >> 10)
        shutil.rmtree(out, ignore_errors=True)
        path.unlink()


def main():
    p = common.parser(__doc__)
    p.add_argument("parts", nargs="*", default=["checkpoints", "activations"], metavar="checkpoints|activations")
    p.add_argument("--dict-sizes", type=int, nargs="+", default=[16_384, 122_880])
    p.add_argument("--gigabytes", type=float, default=8)
    p.add_argument("--formats", nargs="+", choices=["npy", "safetensors", "pt"], default=["npy", "safetensors", "pt"])
    args = p.parse_args()
    dir, parts = common.folder(args), args.parts
    if "checkpoints" in parts:
        checkpoints(args, dir, common.has_torch())
        saving(args, dir)
    if "activations" in parts:
        activations(args, dir)
    common.end()


main()
