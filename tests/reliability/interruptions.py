#!/usr/bin/env python3
"""What happens to a run from outside: signals, a full disk, a second trainer, bad numbers, files that change while they are read.

    cargo build --release
    tests/reliability/interruptions.py [signals outputs pipes together numbers disk changes]

signals   SIGINT or SIGTERM at 40 random moments, from the start on: the step is finished, all is saved, status 130, within 5 s, also
          where a step takes long; what is resumed ends bit-equal to a run that nothing disturbed. A second SIGINT stops at once.
outputs   SIGINT or SIGTERM at 300 random moments of `convert --force` and `report --force`: all files are the old ones or all are the new ones,
          and there is no other; two converts to one name at once: weights and cfg are of the same.
pipes     a reader of stdout or stderr that goes away: no panic, status 0 or 1; training goes on.
together  eight trainers at once in one folder: one trains, seven refuse with status 1 and say why; no file is mixed.
numbers   NaN and infinities in a row, for each model: training stops with the row, the model, the element and, after the first
          checkpoint, the step named, and saves the steps before, or leaves the last checkpoint; rows so large that the loss overflows: no
          parameter that is saved is other than finite.
disk      files limited to 1, 2, 3, … KiB, and a small tmpfs where it may be mounted: status 1, one line; what is there is whole;
          with space again the run ends bit-equal.
changes   activations or checkpoints that are cut short, emptied, replaced or overwritten while they are read: an error, no signal.
"""

import array
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
import zipfile

import common

KEYS = "--dict_size 128 --batch_size 64 --buffer_mult 8 --num_tokens 76800 --save_every 20 --log_every 7 --lr 1e-3 --threads 1 --no-report"
PIPE = 4096
LONG = KEYS.replace("76800", "76800000")


class Trial:
    """A set, an undisturbed run on it, and the means to begin others."""

    def __init__(self, args, dir):
        self.args, self.dir, self.acts = args, dir, dir / "acts.npy"
        common.activations(self.acts, 2000, 16)
        self.given = dir / "given.json"
        self.given.write_text('{"normalisation_factor": [1.0, 1.0]}')
        done = common.run(args, self.command("whole"))
        common.check(done.returncode == 0 and done.stdout, "the undisturbed run", done.stderr)
        self.whole = common.contents(dir / "whole/version_0")

    def command(self, out, keys=KEYS, acts=None):
        return ["train", acts or self.acts, "--out", self.dir / out, "--resume", *keys.split()]

    def begin(self, out, keys=KEYS, acts=None, fresh=True, **more):
        if fresh:
            shutil.rmtree(self.dir / out, ignore_errors=True)
        command = [self.args.program, *map(str, self.command(out, keys, acts))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
        return subprocess.Popen(command, **pipes)

    def wait_for_checkpoint(self, child, out, number=0):
        while child.poll() is None and not (self.dir / out / f"version_0/{number}.pt").exists():
            time.sleep(0.002)

    def whole_so_far(self, out, what):
        """Whether each checkpoint that is there is the undisturbed run's, and all files are read."""
        version = self.dir / out / "version_0"
        found = common.contents(version) if version.exists() else {}
        wrong = [n for n, crc in found.items() if re.fullmatch(r"\d+(\.pt|_cfg\.json)", n) and self.whole.get(n) != crc]
        common.check(not wrong, f"{what}: checkpoints are whole", wrong)
        self.readable(out, what)

    def readable(self, out, what):
        files = sorted((self.dir / out).glob("version_0/*.pt"))
        if files:
            read = common.run(self.args, ["info", "--json", *files])
            common.check(read.returncode == 0, f"{what}: all files are read", read.stderr)

    def ends_whole(self, out, what, keys=KEYS):
        child = self.begin(out, keys, fresh=False)
        error = child.communicate()[1]
        common.check(child.returncode == 0, f"{what}: goes on", error)
        found = common.contents(self.dir / out / "version_0")
        common.check(found == self.whole, f"{what}: ends bit-equal", sorted(set(found.items()) ^ set(self.whole.items())))


def told(error):
    return bool(re.search(r"^crosscoder: .+", error, re.M)) and "panicked" not in error


def signals(trial):
    rng, slowest, at = random.Random(1), 0.0, []
    for k in range(40):
        child, kind = trial.begin("stopped"), rng.choice([signal.SIGINT, signal.SIGTERM])
        time.sleep(rng.uniform(0, 0.05) if k % 4 == 0 else rng.uniform(0.02, 0.5))
        begin = time.monotonic()
        child.send_signal(kind)
        error = child.communicate()[1]
        slowest = max(slowest, time.monotonic() - begin)
        # Before the program listens, a signal ends it as it ends any program.
        common.check(child.returncode in (130, 0, -kind), f"signal {k}: status", (child.returncode, error))
        if child.returncode == 130:
            at.append(int(re.search(r"stopped at step (\d+)", error)[1]))
        trial.readable("stopped", f"signal {k}")
        trial.ends_whole("stopped", f"signal {k}")
    print(f"signals: stopped within {slowest:.2f} s, at steps {sorted(at)}")
    common.check(len(at) >= 10, "signals: enough met a run", at)
    common.check(slowest < 5, "signals: within 5 s", slowest)
    heavy_acts = trial.dir / "heavy.npy"
    common.activations(heavy_acts, 2000, 512)
    heavy = "--dict_size 8192 --batch_size 1024 --buffer_mult 2 --num_tokens 1024000 --save_every 1 --log_every 1 --threads 1 --no-report"
    child = trial.begin("heavy", heavy, heavy_acts)
    trial.wait_for_checkpoint(child, "heavy")
    begin = time.monotonic()
    child.send_signal(signal.SIGTERM)
    error, seconds = child.communicate()[1], time.monotonic() - begin
    print(f"signals: a step of 1024 rows, d_in 512, dict_size 8192: stopped after {seconds:.2f} s")
    common.check(child.returncode == 130 and seconds < 5, "heavy: stops within 5 s", (child.returncode, seconds, error))
    trial.readable("heavy", "heavy")
    child = trial.begin("heavy", heavy, heavy_acts)
    trial.wait_for_checkpoint(child, "heavy")
    child.send_signal(signal.SIGINT)
    time.sleep(0.02)
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    child.communicate()
    seconds = time.monotonic() - begin
    print(f"signals: a second SIGINT: stopped after {seconds:.3f} s")
    common.check(child.returncode == 130 and seconds < 0.5, "a second SIGINT stops at once", (child.returncode, seconds))
    trial.readable("heavy", "a second SIGINT")
    shutil.rmtree(trial.dir / "heavy")
    heavy_acts.unlink()


def outputs(trial):
    rng, folder = random.Random(2), trial.dir / "outputs"
    weights = trial.dir / "whole/version_0/0.pt"
    convert, half = ["convert", weights, "out.pt", "--force"], ["--dtype", "fp16"]
    report = ["report", weights, "--out", "r.html", "--json", "r.json", "--csv", "r.csv", "--force"]

    def fresh(files=()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in dict(files).items():
            (folder / name).write_bytes(content)

    def found():
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    def made(command):
        fresh()
        done = common.run(trial.args, command, cwd=folder)
        common.check(done.returncode == 0, f"{command[0]}, undisturbed", done.stderr)
        return found()

    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    pair, half_pair, page = made(convert), made(convert + half), made(report)
    for command, old, new in ((convert, half_pair, pair), (report, dict.fromkeys(page, b"old"), page)):
        met, ends = 0, {True: 0, False: 0}
        for k in range(150):
            fresh(old)
            kind = rng.choice([signal.SIGINT, signal.SIGTERM])
            child = subprocess.Popen([trial.args.program, *map(str, command)], **quiet)
            time.sleep(rng.uniform(0, 0.04))
            child.send_signal(kind)
            status, files = child.wait(), found()
            common.check(status in (0, -kind), f"{command[0]}, signal {k}: status", status)
            common.check(files in (old, new), f"{command[0]}, signal {k}: all or none", sorted(files))
            if status:
                met += 1
                ends[files == new] += 1
        print(f"outputs: {command[0]} ended by {met} of 150 signals, {ends[False]} before and {ends[True]} after its files were placed")
        common.check(met >= 20, f"{command[0]}: enough met it", met)
    met = {True: 0, False: 0}
    for k in range(100):
        fresh()
        children = [subprocess.Popen([trial.args.program, *map(str, convert + more)], **quiet) for more in ([], half)]
        statuses, files = [child.wait() for child in children], found()
        common.check(statuses == [0, 0] and files in (pair, half_pair), f"two converts {k}", (statuses, sorted(files)))
        met[files == pair] += 1
    print(f"outputs: of 100 two converts at once, {met[True]} ended with the first's pair, {met[False]} with the second's")


def pipes(trial):
    version = trial.dir / "whole/version_0"
    child = trial.begin("pipe", KEYS.replace(" --no-report", ""))
    child.stdout.close()
    text, status = child.stderr.read(), child.wait()
    common.check(status in (0, 1) and "panicked" not in text, "train with stdout closed", (status, text))
    found = {n: crc for n, crc in common.contents(trial.dir / "pipe/version_0").items() if n != "report.html"}
    common.check(found == trial.whole, "train with stdout closed ends bit-equal")
    # Commands that write to stderr, with success and without.
    for verb in (["report", version, "--out", trial.dir / "pipe.html", "--force"], ["info", trial.dir / "nowhere.pt"]):
        read, closed = os.pipe()
        os.close(read)
        done, child = common.run(trial.args, verb), subprocess.Popen([trial.args.program, *map(str, verb)], stderr=closed)
        os.close(closed)
        common.check(done.stderr and child.wait() == done.returncode, f"{verb[0]} with stderr closed", (child.returncode, done))
    files = sorted(version.glob("*.pt")) * 300
    for verb in (["info", *files], ["info", "--json", *files], ["report", version, "--json", "-"]):
        # More than the pipe holds, so that the rest is written to a reader that has gone.
        size = len(common.run(trial.args, verb).stdout)
        common.check(size > 2 * PIPE, f"{verb[0]}: enough to write", size)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pipesize": PIPE, "text": True}
        child = subprocess.Popen([trial.args.program, *map(str, verb)], **pipes)
        os.read(child.stdout.fileno(), 1)
        child.stdout.close()
        error = child.stderr.read()
        common.check(child.wait() in (0, 1) and "panicked" not in error, f"{verb[0]} | head -c 1", (child.returncode, error))


def together(trial):
    turned_away = 0
    for _ in range(10):
        shutil.rmtree(trial.dir / "together", ignore_errors=True)
        children = [trial.begin("together", fresh=False) for _ in range(8)]
        ends = [(child.communicate()[1], child.returncode) for child in children]
        trained = [e for e, status in ends if status == 0]
        refused = [e for e, status in ends if status == 1 and "another run is training into this directory" in e]
        turned_away += len(refused)
        # One that comes after the first has ended finds all done, and succeeds too.
        common.check(trained and len(trained) + len(refused) == 8, "eight at once", ends)
        found = common.contents(trial.dir / "together/version_0")
        common.check(found == trial.whole and not (trial.dir / "together/version_1").exists(), "eight at once: bit-equal")
    common.check(turned_away, "eight at once: some met another")
    child = trial.begin("together", LONG)
    trial.wait_for_checkpoint(child, "together")
    begin = time.monotonic()
    second = common.run(trial.args, trial.command("together", LONG))
    seconds = time.monotonic() - begin
    common.check(second.returncode == 1 and seconds < 1, "the second refuses at once", (second.returncode, seconds))
    child.kill()
    child.communicate()
    third = trial.begin("together", LONG, fresh=False)
    trial.wait_for_checkpoint(third, "together", 5)
    common.check(third.poll() is None, "a killed run's folder is free")
    third.kill()
    third.communicate()


def finite(path):
    """Whether all float32 numbers of a checkpoint's four weights are finite."""
    with zipfile.ZipFile(path) as z:
        weights = [array.array("f", z.read(name)) for name in z.namelist() if re.search(r"/data/\d+$", name)]
    return len(weights) == 4 and all(w and all(map(math.isfinite, w)) for w in weights)


def numbers(trial):
    rng = random.Random(2)
    good = trial.acts.read_bytes()
    start, saved = len(good) - 2000 * 32 * 4, [0, 0]
    for k in range(60):
        row, column = (rng.randrange(2000), rng.randrange(32)) if k % 3 else (rng.randrange(600, 2000), rng.randrange(32))
        value, say = rng.choice([(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "-inf")])
        bad, path = bytearray(good), trial.dir / "poisoned.npy"
        struct.pack_into("<f", bad, start + 4 * (row * 32 + column), value)
        path.write_bytes(bad)
        # Their estimate reads every row; where factors are given, it is a step that meets the bad one.
        factors = f"--cfg {trial.given} " * (k % 2)
        child = trial.begin("poisoned", f"{factors}--val-fraction 0 {KEYS.replace('save_every 20', 'save_every 5')}", path)
        error = child.communicate()[1]
        where = f"poisoned.npy, row {row}: model {'AB'[column // 16]}, element {column % 16}: {say} is not finite"
        common.check(child.returncode == 1 and where in error and told(error), f"a row with {say}", error)
        weights = sorted((trial.dir / "poisoned/version_0").glob("[0-9]*.pt"), key=lambda p: int(p.stem))
        if weights:
            saved[0] += 1
            common.check(re.search(r"step \d+: cannot read the next batch", error), "the step is named", error)
            common.check(weights[-1].name in error, "the newest checkpoint is named", error)
            common.check(all(map(finite, weights)), "checkpoints are finite")
        trial.readable("poisoned", "a poisoned row")
    # Factors are given, as their estimate would make such a row ordinary, and all others nothing.
    for k in range(20):
        row, bad = rng.randrange(600, 2000), bytearray(good)
        struct.pack_into("<f", bad, start + 4 * row * 32, rng.choice([3e38, -3e38, 1e30]))
        path = trial.dir / "poisoned.npy"
        path.write_bytes(bad)
        child = trial.begin("poisoned", f"--cfg {trial.given} --val-fraction 0 {KEYS}", path)
        error = child.communicate()[1]
        named = re.search(r"step \d+", error) and re.search(r"loss|W_enc|W_dec|b_enc|b_dec|gradient", error)
        common.check(child.returncode == 1 and told(error) and named, "a row that overflows: step and tensor are named", error)
        common.check(f"poisoned.npy, row {row}: step" in error, "a row that overflows: the row is named", error)
        weights = sorted((trial.dir / "poisoned/version_0").glob("[0-9]*.pt"))
        saved[1] += len(weights)
        common.check(all(map(finite, weights)), "a row that overflows: checkpoints are finite")
        trial.readable("poisoned", "a row that overflows")
    common.check(all(saved), "some runs had saved before their bad row", saved)


def disk(trial):
    names, size = trial.whole, sum(p.stat().st_size for p in (trial.dir / "whole/version_0").iterdir())
    largest = max(p.stat().st_size for p in (trial.dir / "whole/version_0").iterdir())
    ends = {0: 0, 1: 0}
    for kib in range(1, (largest >> 8), 5):
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, kib << 10))
        # Python ignores SIGXFSZ, and so does the program then: it sees an error of the system call.
        child = trial.begin("full", preexec_fn=limit, restore_signals=False)
        error = child.communicate()[1]
        common.check(child.returncode in ends and (child.returncode == 0 or told(error)), f"files of {kib} KiB at most", error)
        ends[child.returncode] = ends.get(child.returncode, 0) + 1
        trial.whole_so_far("full", f"files of {kib} KiB at most")
        left = [p.name for p in (trial.dir / "full").rglob("*.crosscoder-tmp")]
        common.check(not left, f"files of {kib} KiB at most: no temporary file", left)
        trial.ends_whole("full", f"files of {kib} KiB at most")
    print(f"disk: files limited: {ends[1]} times an error, {ends[0]} times enough")
    common.check(ends[0] and ends[1], "files limited: both were met", ends)
    # The signal that a limit sends if nobody ignores it kills like any other.
    child = trial.begin("full", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2)))
    child.communicate()
    common.check(child.returncode == -signal.SIGXFSZ, "killed by the limit", child.returncode)
    trial.whole_so_far("full", "killed by the limit")
    trial.ends_whole("full", "killed by the limit")
    small = trial.dir / "small"
    small.mkdir(exist_ok=True)
    ends = {0: 0, 1: 0}
    for kib in range(64, (size >> 10) + 600, max(64, size >> 14)):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", small], capture_output=True)
        if mounted.returncode:
            print("not checked: a tmpfs may not be mounted here")
            return
        try:
            child = trial.begin("small/out")
            error = child.communicate()[1]
            common.check(child.returncode in ends and (child.returncode == 0 or told(error)), f"a disk of {kib} KiB", error)
            ends[child.returncode] = ends.get(child.returncode, 0) + 1
            trial.whole_so_far("small/out", f"a disk of {kib} KiB")
            subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
            trial.ends_whole("small/out", f"a disk of {kib} KiB")
        finally:
            subprocess.run(["umount", small], check=True)
    print(f"disk: a small one: {ends[1]} times full, {ends[0]} times enough")
    common.check(ends[0] and ends[1], "a small disk: both were met", ends)


def large_npy(path, rows):
    """A set of zeros, sparse on disk."""
    common.write_npy(path, (rows, 2, 512), [])
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size + rows * 4096)


def changes(trial):
    path, other = trial.dir / "large.npy", trial.dir / "other.npy"
    rows = 2_000_000
    keys = f"--cfg {trial.given} --dict_size 64 --batch_size 512 --buffer_mult 4 --num_tokens 51200000 --save_every 5 --log_every 100 --threads 1 --no-report --val-fraction 0"

    def cut(p):
        os.truncate(p, p.stat().st_size // 2)

    def empty(p):
        os.truncate(p, 0)

    def replace(p):
        large_npy(other, rows)
        os.replace(other, p)

    def append(p):
        with p.open("ab") as f:
            f.write(b"more")

    def touch(p):
        with p.open("r+b") as f:
            f.seek(p.stat().st_size - 4)
            f.write(b"\1\2\3\4")

    def remove(p):
        p.unlink()

    for change in (cut, empty, replace, append, touch, remove):
        large_npy(path, rows)
        child = trial.begin("changes", keys, path)
        trial.wait_for_checkpoint(child, "changes")
        begin = time.monotonic()
        change(path)
        error = child.communicate()[1]
        what = f"train, {change.__name__}"
        common.check(child.returncode == 1 and told(error) and "large.npy" in error, what, (child.returncode, error))
        common.check(time.monotonic() - begin < 5, f"{what}: soon", time.monotonic() - begin)
        trial.readable("changes", what)
    if not common.check((trial.dir / "changes/version_0/0.pt").exists(), "a checkpoint to read with"):
        return
    for verb in ("info", "encode", "eval"):
        for change in (cut, empty):
            large_npy(path, rows)
            weights = trial.dir / "changes/version_0"
            out = trial.dir / "latents.pt"
            out.unlink(missing_ok=True)
            commands = {"info": ["info", path], "encode": ["encode", weights, path, "--out", out], "eval": ["eval", weights, path]}
            child = subprocess.Popen([trial.args.program, *map(str, commands[verb])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            time.sleep(0.15)
            if not common.check(child.poll() is None, f"{verb} still reads", child.returncode):
                continue
            change(path)
            error = child.communicate()[1]
            common.check(child.returncode == 1 and told(error) and "large.npy" in error, f"{verb}, {change.__name__}", (child.returncode, error))
            common.check(not out.exists(), f"{verb}, {change.__name__}: nothing is written")
    path.unlink(missing_ok=True)


def main():
    p = common.parser(__doc__)
    parts = {f.__name__: f for f in (signals, outputs, pipes, together, numbers, disk, changes)}
    p.add_argument("parts", nargs="*", default=list(parts), metavar="|".join(parts))
    args = p.parse_args()
    args.program = os.path.abspath(args.program)
    dir = common.folder(args)
    trial = Trial(args, dir)
    for name in args.parts:
        before = common.passed, len(common.failures)
        parts[name](trial)
        print(f"{name}: {common.passed - before[0]} passed, {len(common.failures) - before[1]} failed", flush=True)
    common.end()


main()
