#!/usr/bin/env python3
"""Ten thousand tensors in a file, ten thousand files in a folder, a thousand versions and checkpoints: time must grow in proportion.

    cargo build --release
    tests/reliability/many.py [tensors] [files] [versions] [--times 5]

Each is done with a quarter first, then in full; processor time beyond that of a start (the least of several) may grow by at most 8
times; were it a square's, it would by 16. Every run may have 64 open files at most (the limit is set).

tensors   `info`, `convert` both ways, with 2,500 and 10,000 tensors
files     `info` of 2,500 and 10,000 files in one call; `train` and `eval` on a folder of as many shards
versions  `train` into a folder that holds 250 and 1,000 versions; a run that saves 250 and 1,000 times
"""

import json
import os
import resource
import shutil
import struct

import common

FEW, MANY, FACTOR = 2_500, 10_000, 8
KEYS = "--dict_size 16 --batch_size 16 --buffer_mult 4 --log_every 1000 --threads 1 --no-report".split()


def limit():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def least(args, command, before=lambda: None, **more):
    """The least processor time of several runs, in seconds."""
    best = float("inf")
    for _ in range(args.times):
        before()
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = common.run(args, command, preexec_fn=limit, **more)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        common.check(done.returncode == 0, f"{command[0]} ends well", done.stderr[-300:])
        best = min(best, end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime)
    return best


def compare(args, what, few, many, before=lambda: None, counts=(FEW, MANY), **more):
    start = least(args, ["help"])
    a, b = least(args, few, before, **more) - start, least(args, many, before, **more) - start
    print(f"{what}: {counts[0]:,} in {a:.3f} s, {counts[1]:,} in {b:.3f} s", flush=True)
    common.check(b <= FACTOR * max(a, 0.01), f"{what}: in proportion", (a, b))


def tensors(args, dir):
    paths = {}
    for count in (FEW, MANY):
        header, data = {}, bytearray()
        for i in range(count):
            header[f"layer.{i}.weight"] = {"dtype": "F32", "shape": [4, 4], "data_offsets": [len(data), len(data) + 64]}
            data += struct.pack("<16f", *range(i, i + 16))
        text = json.dumps(header).encode()
        paths[count] = dir / f"{count}.safetensors"
        paths[count].write_bytes(struct.pack("<Q", len(text)) + text + data)
    pt = {count: dir / f"{count}.pt" for count in paths}
    back = {count: dir / f"{count}-back.safetensors" for count in paths}
    compare(args, "info .safetensors, tensors", ["info", paths[FEW]], ["info", paths[MANY]])
    compare(args, ".safetensors to .pt, tensors", *(["convert", paths[n], pt[n], "--force"] for n in (FEW, MANY)))
    compare(args, "info .pt, tensors", ["info", pt[FEW]], ["info", pt[MANY]])
    compare(args, ".pt to .safetensors, tensors", *(["convert", pt[n], back[n], "--force"] for n in (FEW, MANY)))
    crcs = lambda p: sorted((t["name"], t["crc32"]) for t in json.loads(common.run(args, ["info", "--json", p]).stdout)["tensors"])
    found = crcs(paths[MANY])
    common.check(len(found) == MANY and crcs(back[MANY]) == found == crcs(pt[MANY]), "10,000 tensors go round")


def files(args, dir):
    folders = {count: dir / f"shards-{count}" for count in (FEW, MANY)}
    for count, folder in folders.items():
        folder.mkdir(exist_ok=True)
        for i in range(count):
            common.write_npy(folder / f"{i:05}.npy", (4, 2, 8), [(i * 7 + j * 13) % 101 / 50 - 1 for j in range(64)])
    # Relative names, as ten thousand long ones may exceed what a command may take.
    names = {count: [f"{i:05}.npy" for i in range(count)] for count in folders}
    compare(args, "info, files", ["info", *names[FEW]], ["info", *names[MANY]], cwd=folders[MANY])
    out = dir / "out"
    train = lambda n: ["train", folders[n], "--out", out, *KEYS, "--num_tokens", 4 * n, "--save_every", 100_000]
    compare(args, "train, shards", train(FEW), train(MANY), lambda: shutil.rmtree(out, ignore_errors=True))
    compare(args, "eval, shards", *(["eval", out / "version_0", folders[n]] for n in (FEW, MANY)))
    for folder in (*folders.values(), out):
        shutil.rmtree(folder)


def versions(args, dir):
    acts = dir / "acts.npy"
    common.activations(acts, 400, 8)
    counts, out = (250, 1_000), {250: dir / "out-250", 1_000: dir / "out-1000"}
    common.run(args, ["train", acts, "--out", dir / "one", *KEYS, "--num_tokens", 160, "--save_every", 5])
    for count, folder in out.items():
        for k in range(count):
            shutil.copytree(dir / "one/version_0", folder / f"version_{k}")

    def again():
        for count, folder in out.items():
            for extra in list(folder.glob("version_*")):
                if int(extra.name[8:]) >= count:
                    shutil.rmtree(extra)

    command = lambda n: ["train", acts, "--out", out[n], *KEYS, "--num_tokens", 160, "--save_every", 5]
    compare(args, "train beside versions", command(250), command(1_000), again, counts)
    again()
    common.check(common.run(args, command(1_000)).returncode == 0 and (out[1_000] / "version_1000/1.pt").exists(), "the next is version_1000")
    saved = dir / "saved"
    command = lambda n: ["train", acts, "--out", saved, *KEYS, "--num_tokens", 16 * n, "--save_every", 1]
    compare(args, "checkpoints of a run", command(250), command(1_000), lambda: shutil.rmtree(saved, ignore_errors=True), counts)
    common.check((saved / "version_0/999.pt").exists(), "1,000 checkpoints")
    resumed = common.run(args, [*map(str, command(1_000)), "--resume"])
    common.check(resumed.returncode == 0, "resumed with 1,000 checkpoints", resumed.stderr)


def main():
    p = common.parser(__doc__)
    parts = {f.__name__: f for f in (tensors, files, versions)}
    p.add_argument("parts", nargs="*", default=list(parts), metavar="|".join(parts))
    p.add_argument("--times", type=int, default=5)
    args = p.parse_args()
    args.program = os.path.abspath(args.program)
    dir = common.folder(args)
    for part in args.parts:
        parts[part](args, dir)
    common.end()


main()
