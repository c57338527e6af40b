#!/usr/bin/env python3
"""Breaks good files at random and watches how `crosscoder info --json` ends: it must refuse cleanly or read what is there.

    cargo build --release
    tests/reliability/storm.py [--count 20000] [--seeds 1 2 3 4 5] [--keep DIR]

The good files are those that the manifests of fixtures/pt-corpus and fixtures/act-corpus accept. Of the mutants of a .pt, half
have bytes of the file changed, removed, added, swapped or repeated, and checksums stay as they are: what is read must be exactly
the original's tensors. The other half have the pickle changed, and every size and checksum made right again: whatever is read,
PyTorch must read the same where it reads the file at all (not checked without torch). Of .npy and .safetensors, which have no
checksum, the accepted are compared with a reader of ten lines here.

Files are given to the program two hundred at a time; whichever lot does not end well is tried again one by one. Bad endings:
crash (a signal, status 100 or above, a panic), hang (longer than 5 s), memory (more than 256 MiB), wrong (other tensors),
mute (refused without a line that names the file), wrote (a file was made). Offenders are kept in DIR.
"""

import collections
import io
import json
import os
import random
import re
import resource
import struct
import warnings
import zipfile
import zlib

import common

LOT, SECONDS, MIB = 200, 5, 256
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NAMES = dict(zip(SIZES, "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()))
NUMPY = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8", "|u1": "U8", "|b1": "BOOL"}


def good_files():
    """Each good file: name, bytes, the manifest's tensors, and the records of a zip."""
    for corpus in ("pt-corpus", "act-corpus"):
        folder = common.ROOT / "fixtures" / corpus
        for case in json.loads((folder / "manifest.json").read_text())["cases"]:
            if case["expect"] != "accept" or case["bytes"] > 60_000:
                continue
            data, records = (folder / case["file"]).read_bytes(), None
            if case["file"].endswith(".pt"):
                archive = zipfile.ZipFile(io.BytesIO(data))
                if any(info.file_size and not info.CRC for info in archive.infolist()):
                    continue  # it has no checksums, so a change of its numbers cannot be seen
                records = [(info.filename, archive.read(info)) for info in archive.infolist()]
            yield case, data, records


def archive(records):
    """A zip with nothing compressed and all numbers right."""
    body, directory = bytearray(), bytearray()
    for name, data in records:
        fields = struct.pack("<HHHHHIIIHH", 20, 0x800, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name.encode()), 0)
        directory += b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\3\4" + fields + name.encode() + data
    return bytes(body + directory) + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, len(records), len(records), len(directory), len(body), 0)


def mutate(rng, data):
    """One to six changes, each small, each of a kind drawn anew."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        some = rng.choice((1, 1, 2, 4, 8, 40))
        kind = rng.randrange(9)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + some]
        elif kind == 3:
            data[at:at] = rng.randbytes(some)
        elif kind == 4:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + some * 5]
        elif kind == 5:
            other = rng.randrange(len(data) + 1)
            piece = data[other : other + some]
            data[at : at + len(piece)] = piece
        elif kind == 6:
            number = rng.choice((0, 1, 2, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)))
            width = rng.choice((2, 4, 8))
            data[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif kind == 7:
            # A digit: sizes in headers are decimal.
            digits = [m.start() for m in re.finditer(rb"\d", data[at : at + 200])]
            if digits:
                data[at + rng.choice(digits)] = rng.choice(b"0123456789-. e")
        else:
            del data[at:]
    return bytes(data)


def reference(name, data):
    """(dtype, shape, CRC-32) of each tensor of a .safetensors, or of a .npy of version 1 to 3 in C order; None where unsure."""
    if name.endswith(".safetensors"):
        (size,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        piece = lambda t: data[8 + size + t["data_offsets"][0] : 8 + size + t["data_offsets"][1]]
        return sorted((NAMES[t["dtype"]], t["shape"], zlib.crc32(piece(t))) for t in header.values())
    wide = data[6] > 1
    (size,) = struct.unpack_from("<I" if wide else "<H", data, 8)
    start = 8 + (4 if wide else 2) + size
    header = data[8:start].decode("latin-1")
    descr, shape = re.search(r"descr': *'([^']*)'", header), re.search(r"shape': *\(([\d, ]*)\)", header)
    if not descr or not shape or "order': False" not in header or descr[1] not in NUMPY:
        return None
    shape = [int(n) for n in shape[1].replace(" ", "").split(",") if n]
    count = SIZES[NUMPY[descr[1]]]
    for n in shape:
        count *= n
    return [(NAMES[NUMPY[descr[1]]], shape, zlib.crc32(data[start : start + count]))]


class Mutant:
    def __init__(self, rng, good, index):
        case, data, records = good
        self.origin, self.expected = case["file"], None
        self.name = f"{index}{os.path.splitext(case['file'])[1]}"
        self.repaired = bool(records) and index % 2 == 1
        if self.repaired:
            self.data = archive([(n, mutate(rng, d) if n.endswith("data.pkl") else d) for n, d in records])
        else:
            self.data = mutate(rng, data)
            if records:
                self.expected = sorted((t["dtype"], t["shape"], t["crc32"]) for t in case["tensors"])

    def judge(self, answer, errors, torch):
        """'accepted', 'refused', or a bad ending and why."""
        if answer is None:
            named = any(line.startswith(f"crosscoder: {self.name}: ") for line in errors)
            return ("refused", "") if named else ("mute", "no line names it")
        found = sorted((t["dtype"], t["shape"], t["crc32"]) for t in answer["tensors"])
        expected = self.expected
        if expected is None and not self.name.endswith(".pt"):
            known = reference(self.name, self.data)
            expected = known and sorted((dtype, shape, f"{crc:08x}") for dtype, shape, crc in known)
        if self.repaired and torch:
            expected = common.with_torch(read_with_torch, self.data)
        if expected is not None and found != expected:
            return "wrong", f"{found} for {expected}"
        return "accepted", ""


def read_with_torch(data):
    """What PyTorch reads, or None if it does not."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        root = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:
        return None
    found, pending, visits = [], [root], 0
    while pending:
        x, visits = pending.pop(), visits + 1
        if visits > 10_000:
            return None
        if isinstance(x, torch.Tensor):
            if x.numel() > 1 << 20 or x.is_sparse or x.device.type != "cpu" or x.is_conj() or x.is_neg():
                return None
            raw = torch.cat([x.detach().reshape(-1)]).view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)
            found.append((str(x.dtype)[6:], list(x.shape), f"{zlib.crc32(bytes(raw.tolist())):08x}"))
        elif isinstance(x, dict):
            pending += x.values()
        elif isinstance(x, (list, tuple, set)):
            pending += x
    return sorted(found)


def limits():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def read(args, lot, work, limit):
    """Runs the program on a lot: answers by name, lines of stderr, and how it ended badly, if it did."""
    for old in work.iterdir():
        old.unlink()
    for mutant in lot:
        (work / mutant.name).write_bytes(mutant.data)
    names = [mutant.name for mutant in lot]
    code, out, err, seconds, kib = common.peak(args, ["info", "--json", *names], limit, cwd=work, preexec_fn=limits)
    bad = None
    if code == -9 and seconds >= limit:
        bad = "hang", f"{seconds:.1f} s"
    elif code not in (0, 1) or "panicked" in err:
        bad = "crash", f"status {code}: {err.strip()[-200:]}"
    elif kib > MIB << 10:
        bad = "memory", f"{kib >> 10} MiB"
    elif sorted(p.name for p in work.iterdir()) != sorted(names):
        bad = "wrote", f"{sorted(p.name for p in work.iterdir() if p.name not in names)}"
    answers = {}
    if not bad:
        answers = {answer["file"]: answer for answer in map(json.loads, out.splitlines())}
    return answers, err.splitlines(), bad, seconds, kib


def main():
    p = common.parser(__doc__)
    p.add_argument("--count", type=int, default=20_000)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    p.add_argument("--keep")
    args = p.parse_args()
    args.program = os.path.abspath(args.program)
    work = common.folder(args) / "storm"
    work.mkdir(exist_ok=True)
    torch, pool = common.has_torch(), list(good_files())
    most_kib = most_seconds = 0
    for seed in args.seeds:
        rng, tally = random.Random(seed), collections.Counter()
        for first in range(0, args.count, LOT):
            lot = [Mutant(rng, rng.choice(pool), index) for index in range(first, min(first + LOT, args.count))]
            answers, errors, bad, seconds, kib = read(args, lot, work, 60)
            most_kib, most_seconds = max(most_kib, kib), max(most_seconds, seconds)
            for mutant in lot:
                if bad:
                    answers, errors, why, _, _ = read(args, [mutant], work, SECONDS)
                    verdict = why or mutant.judge(answers.get(mutant.name), errors, torch)
                else:
                    verdict = mutant.judge(answers.get(mutant.name), errors, torch)
                tally[verdict[0]] += 1
                what = f"seed {seed}, mutant {mutant.name} of {mutant.origin}: {verdict[0]}"
                if not common.check(verdict[0] in ("accepted", "refused"), what, verdict[1]) and args.keep:
                    os.makedirs(args.keep, exist_ok=True)
                    with open(os.path.join(args.keep, f"{verdict[0]}-{seed}-{mutant.origin}-{mutant.name}"), "wb") as f:
                        f.write(mutant.data)
        print(f"seed {seed}: {dict(tally)}", flush=True)
        common.check(tally["accepted"] and tally["refused"], f"seed {seed}: some are read, some refused", tally)
    print(f"a lot of {LOT} took {most_seconds:.2f} s and {most_kib >> 10} MiB at most")
    common.end()


main()
