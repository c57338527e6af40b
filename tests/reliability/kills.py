#!/usr/bin/env python3
"""Kills `crosscoder train` (SIGKILL) again and again: nothing that is visible is ever broken, and what is resumed ends bit-equal.

    cargo build --release
    tests/reliability/kills.py [--kills 200] [--seed 1]

First a run that nothing disturbs. Then the same run, killed at random moments and resumed, half of the kills as soon as a file
is being written, or up to 3 ms later; when it reaches its end it is compared, file by file, and begun anew until all kills are
done. After each kill every checkpoint that is there must be, bit for bit, the one of the undisturbed run, cfg included, and be read by
`crosscoder info` and, where torch is installed, the newest by `torch.load(weights_only=True)`.
"""

import os
import random
import re
import shutil
import subprocess
import time

import common

KEYS = "--dict_size 128 --batch_size 64 --buffer_mult 8 --num_tokens 76800 --save_every 20 --log_every 7 --lr 1e-3 --threads 1 --no-report"


def is_writing(version):
    """Whether a temporary file is there."""
    try:
        with os.scandir(version) as entries:
            return any(entry.name.endswith(".crosscoder-tmp") for entry in entries)
    except FileNotFoundError:
        return False


def load(path):
    import torch

    return [(name, list(t.shape)) for name, t in torch.load(path, weights_only=True).items()]


def main():
    p = common.parser(__doc__)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    dir, rng, torch = common.folder(args), random.Random(args.seed), common.has_torch()
    common.activations(dir / "acts.npy", 2000, 16)
    command = lambda out: ["train", dir / "acts.npy", "--out", dir / out, "--resume", *KEYS.split()]
    shutil.rmtree(dir / "whole", ignore_errors=True)
    begin = time.monotonic()
    done = common.run(args, command("whole"))
    length = time.monotonic() - begin
    if not common.check(done.returncode == 0, "the undisturbed run", done.stderr):
        common.end()
    whole = common.contents(dir / "whole/version_0")
    out, version = dir / "killed", dir / "killed/version_0"
    shutil.rmtree(out, ignore_errors=True)
    kills = ends = broken_saves = checkpoints = 0
    while kills < args.kills or not ends:
        child = subprocess.Popen([args.program, *map(str, command("killed"))], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        into_save, until = kills % 2 == 1, time.monotonic() + rng.uniform(0, length / 6)
        while child.poll() is None and kills < args.kills:
            # A kill into a save waits for the first save after its moment.
            if time.monotonic() >= until and (not into_save or is_writing(version)):
                time.sleep(rng.uniform(0, 0.003) if into_save and rng.random() < 0.7 else 0)
                child.kill()
                break
        error = child.stderr.read().decode()
        if child.wait() == -9:
            kills += 1
            broken_saves += is_writing(version)
            found = common.contents(version) if version.exists() else {}
            numbered = {name: crc for name, crc in found.items() if re.fullmatch(r"\d+(\.pt|_cfg\.json)", name)}
            wrong = [name for name, crc in numbered.items() if whole.get(name) != crc]
            common.check(not wrong, f"kill {kills}: checkpoints are those of the undisturbed run", wrong)
            weights = sorted((int(name[:-3]) for name in numbered if name.endswith(".pt")))
            lonely = [n for n in weights if f"{n}_cfg.json" not in numbered]
            common.check(not lonely, f"kill {kills}: each checkpoint has its cfg", lonely)
            files = [version / f"{n}.pt" for n in weights] + [version / "resume.pt"] * ("resume.pt" in found)
            if files:
                read = common.run(args, ["info", "--json", *files])
                common.check(read.returncode == 0, f"kill {kills}: all files are read", read.stderr)
                checkpoints += len(weights)
            if torch and weights:
                names = [name for name, _ in common.with_torch(load, version / f"{weights[-1]}.pt")]
                common.check(names == ["W_enc", "W_dec", "b_enc", "b_dec"], f"kill {kills}: torch reads the newest", names)
            continue
        if not common.check(child.returncode == 0, "a run that is resumed ends well", error):
            common.end()
        found = common.contents(version)
        common.check(found == whole, "the resumed run is bit-equal", sorted(set(found.items()) ^ set(whole.items())))
        common.check(not (out / "version_1").exists(), "it stays one run")
        ends += 1
        shutil.rmtree(out)
    print(f"{kills} kills, {broken_saves} of them while a file was being written; {checkpoints} checkpoints looked at; {ends} runs came to their end")
    common.check(broken_saves >= args.kills / 4, "enough kills met a save", broken_saves)
    common.check(checkpoints, "checkpoints were looked at")
    common.end()


main()
