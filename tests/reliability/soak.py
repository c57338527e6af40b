#!/usr/bin/env python3
"""Trains for a long time and watches memory and open files: after the first minute neither may grow.

    cargo build --release
    tests/reliability/soak.py [--hours 2] [--steps 100000]

It trains on one thread, reads its set from a file again and again, logs and saves on the way (checkpoints older than the
newest three are removed here), until both time and steps are reached; then SIGTERM must save within 5 s. A line a minute tells
seconds, steps, KiB resident and open files. Time in which the whole script was suspended does not count.

Holds if the resident memory never exceeds its value after the first minute by more than 1 %, if the open files at the end
are as many as then, and if the newest checkpoint is read. Needs Linux's /proc.
"""

import json
import pathlib
import random
import re
import signal
import subprocess
import time

import common

INTERVAL = 1.0


def steps(version):
    """The step of the log's last line."""
    log = version / "metrics.jsonl"
    if not log.exists():
        return 0
    with log.open("rb") as f:
        f.seek(max(0, log.stat().st_size - 4096))
        lines = f.read().split(b"\n")
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def prune(version):
    """Removes all but the newest three checkpoints; how many there were in all."""
    numbers = sorted(int(p.stem) for p in version.glob("*.pt") if re.fullmatch(r"\d+", p.stem))
    for n in numbers[:-3]:
        (version / f"{n}.pt").unlink()
        (version / f"{n}_cfg.json").unlink()
    return numbers[-1] + 1 if numbers else 0


def sparse_activations(path, rows, d_in, features=128, on=3):
    """A .npy [rows, 2, d_in]: sums of a few directions, of which each model lacks every fourth. Most latents fall silent within
    the first minute, so that training passes through each way of holding them, dense to sparse, and has the memory for all."""
    rng = random.Random(1)
    direction = lambda: [rng.gauss(0, 1) for _ in range(d_in)]
    directions = [direction() + direction() if i % 4 < 2 else direction() + [0.0] * d_in for i in range(features)]
    directions[3::4] = [d[d_in:] + d[:d_in] for d in directions[3::4]]
    values = []
    for _ in range(rows):
        parts = [(rng.uniform(0.5, 1.5), d) for d in rng.sample(directions, on)]
        values += [rng.gauss(0, 0.1) + sum(s * d[i] for s, d in parts) for i in range(2 * d_in)]
    common.write_npy(path, (rows, 2, d_in), values)


def main():
    p = common.parser(__doc__)
    p.add_argument("--hours", type=float, default=2)
    p.add_argument("--steps", type=int, default=100_000)
    args = p.parse_args()
    dir = common.folder(args)
    acts, out = dir / "acts.npy", dir / "out"
    sparse_activations(acts, 20_000, 64)
    # At most 800 steps a second: l1_coeff rises over the first twentieth of them.
    tokens = int(max(args.hours * 3600 * 800, 2 * args.steps)) * 128
    keys = f"--dict_size 512 --batch_size 128 --buffer_mult 16 --num_tokens {tokens} --lr 0.001 --l1_coeff 4 --save_every 500 --log_every 50 --threads 1"
    log = (dir / "train.log").open("w")
    child = subprocess.Popen([args.program, "train", str(acts), "--out", str(out), *keys.split()], stdout=log, stderr=log)
    version, running, wall, last = out / "version_0", 0.0, time.monotonic(), time.monotonic()
    first, most, told, fds_seen = None, 0, -60.0, set()
    while child.poll() is None:
        time.sleep(INTERVAL)
        now = time.monotonic()
        # A long gap is one in which this script was suspended too.
        running += min(now - last, 5 * INTERVAL)
        last = now
        if child.poll() is not None:
            break
        rss, hwm, fds = common.status(child.pid)
        taken = steps(version)
        if running >= 60:
            first = first or (rss, fds)
            most = max(most, rss)
            fds_seen.add(fds)
        if running - told >= 60:
            told = running
            print(f"{running:7.0f} s  {taken:9} steps  {rss} KiB (most ever {hwm})  {fds} files  {prune(version)} saved", flush=True)
        if running >= args.hours * 3600 and taken >= args.steps:
            break
    if not common.check(child.poll() is None, "it trains until it is stopped", f"status {child.poll()}, see {log.name}"):
        common.end()
    rss, hwm, fds = common.status(child.pid)
    begin = time.monotonic()
    child.send_signal(signal.SIGTERM)
    code = child.wait(60)
    stopped = time.monotonic() - begin
    taken, saved = steps(version), prune(version)
    growth = (most / first[0] - 1) * 100 if first else 0.0
    print(
        f"{running:.0f} s running of {time.monotonic() - wall:.0f} s, {taken} steps, {saved} checkpoints, "
        f"{first} KiB and files after the first minute, most {most} KiB ({growth:+.2f} %), "
        f"last {rss} KiB, {fds} files, stopped in {stopped:.2f} s"
    )
    common.check(first, "it ran longer than a minute")
    common.check(taken >= args.steps, f"at least {args.steps} steps", taken)
    common.check(running >= args.hours * 3600, f"at least {args.hours} h", running)
    common.check(growth <= 1, "memory grows by at most 1 %", f"{growth:.2f} %")
    # A save holds a file open for a moment; what counts is what is left.
    common.check(first and fds <= first[1], "open files are constant", sorted(fds_seen))
    common.check(code == 130 and stopped < 5, "SIGTERM saves and stops within 5 s", (code, stopped))
    read = common.run(args, ["info", "--json", version / f"{saved - 1}.pt"])
    common.check(read.returncode == 0, "the newest checkpoint is read", read.stderr)
    common.end()


main()
