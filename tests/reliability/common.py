"""What the scripts of this folder share: the program, small sets of activations, checks that are counted."""

import argparse
import array
import concurrent.futures
import importlib.util
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
passed, failures = 0, []
# A shell has what it starts in the background ignore SIGINT, and what that starts does too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def parser(doc):
    """Arguments that every script takes."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "target/release/crosscoder"
    p.add_argument("--program", default=str(default), help=f"the crosscoder to try [{default.relative_to(ROOT)}]")
    p.add_argument("--dir", help="where to work [a temporary folder, removed at the end]")
    return p


def folder(args):
    """The folder to work in; kept if it was asked for by name."""
    if args.dir:
        pathlib.Path(args.dir).mkdir(parents=True, exist_ok=True)
        return pathlib.Path(args.dir)
    keep = tempfile.TemporaryDirectory(prefix="crosscoder-")
    folder.keep = keep  # lives as long as the script
    return pathlib.Path(keep.name)


def check(holds, what, found=""):
    """Counts a check and tells one that fails."""
    global passed
    if holds:
        passed += 1
    else:
        failures.append(what)
        print(f"FAIL {what} {found}", flush=True)
    return bool(holds)


def end():
    """The last line of each script, and its exit status."""
    if hasattr(with_torch, "worker"):
        with_torch.worker.shutdown()
    check(passed, "anything was checked")
    print(f"{passed} passed, {len(failures)} failed")
    sys.exit(bool(failures))


def run(args, command, **more):
    """Runs the program; its output is text."""
    return subprocess.run([args.program, *map(str, command)], capture_output=True, text=True, errors="replace", **more)


def write_npy(path, shape, values):
    """A .npy of float32."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    data = array.array("f", values)
    if sys.byteorder == "big":
        data.byteswap()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data.tobytes())


def activations(path, rows, d_in, seed=1):
    """A .npy [rows, 2, d_in] of normal values in which model B is near model A."""
    rng = random.Random(seed)
    values = []
    for _ in range(rows):
        a = [rng.gauss(0, 1) for _ in range(d_in)]
        values += a + [x + rng.gauss(0, 0.3) for x in a]
    write_npy(path, (rows, 2, d_in), values)


def contents(path):
    """Name and CRC-32 of each file in a folder."""
    return {p.name: zlib.crc32(p.read_bytes()) for p in sorted(path.iterdir()) if p.is_file()}


def has_torch():
    """Whether PyTorch is there; that it is not is told."""
    if importlib.util.find_spec("torch"):
        return True
    print("not checked: torch is not installed, so nothing is compared with PyTorch", flush=True)
    return False


def with_torch(function, *values):
    """Calls a function that imports torch in a process of its own, lest its memory be taken for the program's."""
    if not hasattr(with_torch, "worker"):
        with_torch.worker = concurrent.futures.ProcessPoolExecutor(1)
    return with_torch.worker.submit(function, *values).result()


def status(pid):
    """VmRSS and VmHWM in KiB and the number of open files of a process."""
    fields = {}
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.split()
    return int(fields["VmRSS"][0]), int(fields["VmHWM"][0]), len(os.listdir(f"/proc/{pid}/fd"))


def peak(args, command, limit=600, **more):
    """Runs the program; exit status, output, seconds, and the most memory it held in KiB, as the system counts it.

    After `limit` seconds it is killed, and its status is -9.
    """
    begin = time.monotonic()
    child = subprocess.Popen([args.program, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
    said = {}
    readers = [threading.Thread(target=lambda f=f: said.update({f: f.read()})) for f in (child.stdout, child.stderr)]
    for reader in readers:
        reader.start()
    killer = threading.Timer(limit, child.kill)
    killer.start()
    _, code, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(code)
    killer.cancel()
    seconds = time.monotonic() - begin
    for reader in readers:
        reader.join()
    out, err = (said[f].decode(errors="replace") for f in (child.stdout, child.stderr))
    return child.returncode, out, err, seconds, usage.ru_maxrss
