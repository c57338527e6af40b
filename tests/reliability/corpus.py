#!/usr/bin/env python3
"""Judges `crosscoder info` on the corpora of good and hostile files, and what `crosscoder convert` makes of the good ones.

    cargo build --release
    tests/reliability/corpus.py [DIR...]

DIR: folders with a manifest.json, as fixtures/pt-corpus/README.md describes it [fixtures/pt-corpus fixtures/act-corpus]. For each file,
on its own: good ones are read, with exactly the manifest's tensors and values; bad ones are refused with status 1 and a line that names the
file and has one of the manifest's words; those that may be either are refused, or read right. No canary, no child, no socket,
no file opened for writing (by strace, where it is installed); the most memory and time that any took is told, and is at most
256 MiB and 5 s (or what the manifest allows).

Each good file is then converted to .pt and .safetensors, and what was made is converted once more: the same tensors by name, the
second byte-identical to the first, and, where torch is installed, read by `torch.load(weights_only=True)`, or by safetensors,
with the same tensors. A file whose tensors have the same name once it is joined by dots must be refused.
"""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import zlib

import common

# What strace does not know on this machine it passes over.
CALLS = "trace=execve,execveat,clone,clone3,socket,connect,openat" + "".join(
    f",?{call}"
    for call in "fork vfork open openat2 creat truncate unlink unlinkat rmdir rename renameat renameat2 mkdir mkdirat link linkat symlink "
    "symlinkat chmod fchmodat".split()
)


def tensors(answer, field):
    return sorted(json.dumps([t[field], t["dtype"], t["shape"], t["crc32"]]) for t in answer["tensors"])


def judge(args, case, path, work, worst):
    """info on one file."""
    name, limit = case["file"], max(5, case.get("max_seconds", 0))
    code, out, err, seconds, kib = common.peak(args, ["info", "--json", path], limit, cwd=work)
    worst.append((seconds, kib, name))
    common.check(code in (0, 1) and "panicked" not in err, f"{name}: ends cleanly", (code, err))
    common.check(kib <= 256 << 10, f"{name}: memory", f"{kib >> 10} MiB")
    common.check(seconds < limit, f"{name}: time", f"{seconds:.1f} s")
    common.check(not list(work.iterdir()), f"{name}: makes no file", list(work.iterdir()))
    if case["expect"] != "either":
        common.check((code == 0) == (case["expect"] == "accept"), f"{name}: {case['expect']}", err or out[:200])
    if code == 0:
        answer = json.loads(out)
        if "tensors" in case:
            common.check(tensors(answer, "path") == tensors(case, "path"), f"{name}: tensors", out[:400])
        values = {json.dumps(v["path"]): v["value"] for v in answer["values"]}
        for value in case.get("values", []):
            found = values.get(json.dumps(value["path"]), "absent")
            common.check(found == value["value"] and type(found) is type(value["value"]), f"{name}: {value['path']}", found)
    else:
        lines = err.splitlines()
        common.check(len(lines) == 1 and lines[0].startswith(f"crosscoder: {path}: "), f"{name}: one line that names it", err)
        words = case.get("say", []) if case["expect"] == "reject" else []
        common.check(not words or any(w.lower() in err.lower() for w in words), f"{name}: says one of {words}", err)


def trace(args, path, work):
    """The calls that reach out of the process."""
    log = work.parent / "strace.log"
    log.unlink(missing_ok=True)
    command = ["strace", "-f", "-qq", "-o", log, "-e", CALLS, args.program, "info", "--json", path]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace")
    lines, bad = log.read_text(errors="replace").splitlines() if log.exists() else [], []
    # What it does for sure: it starts, and opens the file.
    seen = lines and "execve(" in lines[0] and (not path.is_file() or any(f'"{path}", O_RDONLY' in line for line in lines))
    common.check(done.returncode in (0, 1) and seen, f"{path.name}: its calls are seen", (done.returncode, done.stderr, lines))
    for line in lines[1:]:  # the first starts the program itself
        if "openat(" not in line or re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND", line):
            bad.append(line)
    common.check(not bad, f"{path.name}: no call that reaches out", bad)


def convert(args, case, path, dir, torch):
    """The good file, written by us, written by us again, read by others."""
    expected = tensors(case, "name")
    names = [t["name"] or "tensor" for t in case["tensors"]]
    for suffix in (".pt", ".safetensors"):
        # The same name in two folders: a .pt names its own folder after the file.
        first, second = dir / "first" / f"out{suffix}", dir / "second" / f"out{suffix}"
        for p in (first, second):
            shutil.rmtree(p.parent, ignore_errors=True)
            p.parent.mkdir()
        done = common.run(args, ["convert", path, first])
        if len(set(names)) < len(names):
            common.check(done.returncode == 1 and "two tensors have the name" in done.stderr, f"{case['file']}: names collide", done.stderr)
            continue
        if not common.check(done.returncode == 0, f"{case['file']} to {suffix}", done.stderr):
            continue
        read = common.run(args, ["info", "--json", first])
        if common.check(read.returncode == 0, f"{case['file']} to {suffix}: our own rules", read.stderr):
            named = [{**t, "name": t["name"] or "tensor"} for t in case["tensors"]]
            found = tensors(json.loads(read.stdout), "name")
            common.check(found == tensors({"tensors": named}, "name"), f"{case['file']} to {suffix}: the same tensors", (found, expected))
        again = common.run(args, ["convert", first, second])
        common.check(again.returncode == 0 and first.read_bytes() == second.read_bytes(), f"{case['file']} to {suffix}: rewritten byte for byte", again.stderr)
        if torch and (suffix == ".pt" or importlib.util.find_spec("safetensors")):
            theirs = common.with_torch(read_with_torch, first)
            ours = sorted([t["name"] or "tensor", t["dtype"], t["shape"], t["crc32"]] for t in case["tensors"])
            common.check(theirs == ours, f"{case['file']} to {suffix}: torch reads the same", (theirs, ours))


def read_with_torch(path):
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    found = []
    for name, t in state.items():
        raw = torch.cat([t.reshape(-1)]).view(torch.uint8) if t.numel() else torch.empty(0, dtype=torch.uint8)
        found.append([name, str(t.dtype)[6:], list(t.shape), f"{zlib.crc32(bytes(raw.tolist())):08x}"])
    return sorted(found)


def main():
    p = common.parser(__doc__)
    p.add_argument("corpora", nargs="*", default=[common.ROOT / "fixtures/pt-corpus", common.ROOT / "fixtures/act-corpus"])
    args = p.parse_args()
    args.program = os.path.abspath(args.program)
    dir, torch, worst = common.folder(args), common.has_torch(), []
    work = dir / "work"
    work.mkdir(exist_ok=True)
    if torch and not importlib.util.find_spec("safetensors"):
        print("not checked: safetensors is not installed, so what we write for it is not read with it")
    strace = shutil.which("strace")
    if not strace:
        print("not checked: strace is not installed, so system calls are not looked at")
    for corpus in map(pathlib.Path, args.corpora):
        corpus = corpus.resolve()
        before, cases = len(common.failures), json.loads((corpus / "manifest.json").read_text())["cases"]
        good = 0
        for case in cases:
            judge(args, case, corpus / case["file"], work, worst)
            if strace:
                trace(args, corpus / case["file"], work)
            if case["expect"] == "accept":
                good += 1
                convert(args, case, corpus / case["file"], dir, torch)
        print(f"{corpus.name}: {len(cases)} files, {good} good ones rewritten, {len(common.failures) - before} failures", flush=True)
    seconds, _, slowest = max(worst)
    kib, largest = max((kib, name) for _, kib, name in worst)
    print(f"slowest {seconds:.2f} s ({slowest}), largest {kib / 1024:.1f} MiB ({largest})")
    common.end()


main()
