"""Times the original in PyTorch and this crate in turn, on equal inputs on one machine, and prints the ratios.

    python tests/bench_against_original.py --original crosscoder.py --ours target/release/crosscoder \
        [--case 2304,16384,1024,80]… [--dtype fp32] [--threads 2] [--rounds 3] [--only step,encode] \
        [--run acts.pt --steps 300]

`--original` is the file `crosscoder.py` of ckkissane/crosscoder-model-diff-replication; it needs torch, einops and tqdm here. What
it imports beside them (`utils` with plotly, transformer_lens and others) is replaced by empty modules. `--ours` is the
program, called as `OURS bench --case CASE --dtype DTYPE --op OP`, or any that prints the same CSV.

Both make the inputs from the same hash (`src/bench.rs` describes it) and choose the bias that leaves l0 · batch latents on;
each prints a number of its result, and a difference of more than 1e-3 (fp32) or 5e-2 (half precision) of it is an error.
Of each operation the shortest time of all rounds counts. Peak memory is that of a process that makes training steps only.

With `--run` a whole training run is timed instead, from initialisation on the activations in a file (one tensor [n, 2, d_in]):
the original's own Trainer (`trainer.py` beside crosscoder.py; its Buffer, which runs language models, replaced by batches of
normalised rows, shuffled anew at each pass) from its making to its last checkpoint, and `OURS train` as a process, from
start to end. The case gives dict_size and batch size. Both end with l2 losses within 5 % of each other, or it is an error.
"""

import argparse, csv, io, json, os, resource, subprocess, sys, tempfile, time, types


def import_original(path):
    import einops, torch
    from pathlib import Path

    utils = types.ModuleType("utils")
    utils.__dict__.update(torch=torch, einops=einops, json=json, Path=Path)
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = None
    sys.modules.update(utils=utils, huggingface_hub=hub)
    module = types.ModuleType("original")
    exec(compile(open(path).read(), path, "exec"), module.__dict__)
    return module


def nearly_normal(n, seed):
    """`src/bench.rs`: nearly_normal at positions 0..n."""
    import numpy as np

    out = np.empty(n, dtype=np.float32)
    for start in range(0, n, 1 << 22):
        end = min(n, start + (1 << 22))
        with np.errstate(over="ignore"):
            h = np.arange(start, end, dtype=np.uint32) * np.uint32(0x9E3779B1)
            h += np.uint32((seed * 0x85EBCA6B) & 0xFFFFFFFF)
            h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
            h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
        h ^= h >> np.uint32(16)
        out[start:end] = (h.view(np.uint8).reshape(-1, 4).astype(np.int32).sum(1) - 510).astype(np.float32)
    out /= np.float32(147.8)
    return out


def shortest(f, runs, seconds=1.0):
    f()
    times = []
    while len(times) < 2 or (sum(times) < seconds and len(times) < runs):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def original(args):
    """Runs in a process of its own: prints rows `op,batch,seconds,value`, and the peak memory."""
    import numpy as np, torch

    torch.set_num_threads(args.threads)
    module = import_original(args.original)
    d_in, dict_size, batch, l0 = map(int, args.case[0].split(","))
    cfg = dict(
        seed=0, d_in=d_in, dict_size=dict_size, enc_dtype=args.dtype, dec_init_norm=0.08, device="cpu", batch_size=batch
    )
    only = args.only.split(",")
    if "init" in only:
        print(f"init,1,{shortest(lambda: module.CrossCoder(cfg), 3)},0", flush=True)
        if only == ["init"]:
            return
    crosscoder = module.CrossCoder(cfg)
    x = torch.from_numpy(nearly_normal(batch * 2 * d_in, 1)).reshape(batch, 2, d_in)
    with torch.no_grad():
        scale = np.float32(0.08) / np.sqrt(np.float32(d_in))
        w = torch.from_numpy(nearly_normal(dict_size * 2 * d_in, 2) * scale).reshape(dict_size, 2, d_in)
        crosscoder.W_dec.copy_(w)
        crosscoder.W_enc.copy_(w.permute(1, 2, 0))
        del w
        x = x.to(crosscoder.dtype)
        pre = crosscoder.encode(x, apply_relu=False).float().flatten()
        crosscoder.b_enc.fill_(-pre.kthvalue(pre.numel() - l0 * batch).values)
        del pre

    def row(op, batch, f, value, runs=20):
        seconds = shortest(f, runs)
        print(f"{op},{batch},{seconds},{value()}", flush=True)

    for n in (1, batch):
        with torch.no_grad():
            if "encode" in only:
                row("encode", n, lambda: crosscoder.encode(x[:n]), lambda: crosscoder.encode(x[:n]).double().mean().item())
            if "decode" in only:
                acts = crosscoder.encode(x[:n])
                mean = lambda: crosscoder.decode(acts).double().pow(2).mean().item()
                row("decode", n, lambda: crosscoder.decode(acts), mean)
                del acts
    if "get_losses" in only:
        with torch.no_grad():
            row("get_losses", batch, lambda: crosscoder.get_losses(x), lambda: crosscoder.get_losses(x).l2_loss.item())
    if "save" in only or "load" in only:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "0.pt")
            row("save", 1, lambda: torch.save(crosscoder.state_dict(), path), lambda: 0, 3)
            row("load", 1, lambda: crosscoder.load_state_dict(torch.load(path)), lambda: 0, 3)
    if "step" in only:
        optimizer = torch.optim.Adam(crosscoder.parameters(), lr=1e-9, betas=(0.9, 0.999))
        first = []

        def step():
            losses = crosscoder.get_losses(x)
            loss = losses.l2_loss + 2.0 * losses.l1_loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            first.append(loss.item())

        row("step", batch, step, lambda: first[0], 3)
        print(f"memory,{batch},{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},0", flush=True)


RUN_CFG = {"lr": 1e-3, "l1_coeff": 2, "beta1": 0.9, "beta2": 0.999, "seed": 49, "dec_init_norm": 0.08, "model_batch_size": 4}


def run_cfg(args):
    _, dict_size, batch, _ = map(int, args.case[0].split(","))
    return RUN_CFG | {"dict_size": dict_size, "batch_size": batch, "num_tokens": batch * args.steps, "enc_dtype": args.dtype}


def original_run(args):
    """A whole run of the original's Trainer: prints `run,batch,seconds,the last step's l2 loss`."""
    import torch

    torch.set_num_threads(args.threads)
    folder = os.path.dirname(os.path.abspath(args.original))
    module = import_original(args.original)
    acts = torch.load(args.run, weights_only=True).to(torch.float32)
    cfg = run_cfg(args) | {"d_in": acts.shape[-1], "device": "cpu", "log_every": 100, "save_every": args.steps + 1}
    cfg |= {"wandb_project": "", "wandb_entity": ""}
    generator = torch.Generator().manual_seed(cfg["seed"])

    class Rows:
        def __init__(self, cfg, *_):
            self.acts = acts * (cfg["d_in"] ** 0.5 / acts.norm(dim=-1).mean(0))[None, :, None]
            self.order = torch.empty(0, dtype=torch.long)

        def next(self):
            if len(self.order) < cfg["batch_size"]:
                self.order = torch.randperm(len(self.acts), generator=generator)
            now, self.order = self.order.split([cfg["batch_size"], len(self.order) - cfg["batch_size"]])
            return self.acts[now]

    for name, members in {
        "crosscoder": {"CrossCoder": module.CrossCoder},
        "buffer": {"Buffer": Rows},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(members)
    sys.modules["utils"].wandb = types.SimpleNamespace(init=lambda **_: None, log=lambda *_, **__: None)
    trainer = types.ModuleType("trainer")
    path = os.path.join(folder, "trainer.py")
    exec(compile(open(path).read(), path, "exec"), trainer.__dict__)
    trainer.print = lambda *_: None
    trainer.tqdm = types.SimpleNamespace(trange=range)
    with tempfile.TemporaryDirectory() as out:
        import pathlib

        module.SAVE_DIR = pathlib.Path(out)
        start = time.perf_counter()
        run = trainer.Trainer(cfg, None, None, None)
        run.crosscoder.save_dir = pathlib.Path(out)
        step, last = run.step, {}
        run.step = lambda: last.update(step()) or last
        run.train()
        print(f"run,{cfg['batch_size']},{time.perf_counter() - start},{last['l2_loss']}", flush=True)


def our_run(args, env):
    """(seconds, the last logged l2 loss) of `OURS train` with the same cfg."""
    with tempfile.TemporaryDirectory() as out:
        command = [args.ours, "train", args.run, "--out", out, "--no-report", "--log_every", str(args.steps - 1)]
        command += ["--save_every", str(args.steps + 1), "--val-fraction", "0"]
        command += [part for key, value in run_cfg(args).items() for part in (f"--{key}", str(value))]
        start = time.perf_counter()
        rows_of(command, env)
        seconds = time.perf_counter() - start
        with open(os.path.join(out, "version_0", "metrics.jsonl")) as log:
            return seconds, json.loads(log.readlines()[-1])["l2_loss"]


def rows_of(command, env):
    """(stdout, peak memory in bytes) of a child."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return out, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", required=True)
    parser.add_argument("--ours")
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="step,encode,decode,get_losses")
    parser.add_argument("--run", metavar="ACTS", help="time a whole run on these activations")
    parser.add_argument("--steps", type=int, default=300, help="of such a run")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return original_run(args) if args.run else original(args)
    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads))
    print("dtype,d_in,dict_size,batch,l0,op,original_s,ours_s,times_faster,value_original,value_ours")
    if args.run:
        args.case = args.case[:1] or ["0,4096,1024,0"]
        child = [sys.executable, __file__, "--child", "--original", args.original, "--case", args.case[0], "--run", args.run]
        child += ["--dtype", args.dtype, "--threads", str(args.threads), "--steps", str(args.steps)]
        theirs = [tuple(map(float, rows_of(child, env)[0].splitlines()[-1].split(",")[2:])) for _ in range(args.rounds)]
        ours = [our_run(args, env) for _ in range(args.rounds)]
        (their_s, their_l2), (our_s, our_l2) = min(theirs), min(ours)
        _, dict_size, batch, _ = args.case[0].split(",")
        print(f"{args.dtype},,{dict_size},{batch},,run of {args.steps} steps,{their_s:.6g},{our_s:.6g},{their_s / our_s:.2f}", end="")
        print(f",{their_l2:.6g},{our_l2:.6g}")
        if abs(their_l2 - our_l2) > 0.05 * their_l2:
            sys.exit("run: the losses differ")
        return
    for case in args.case or ["768,8192,1024,64", "2304,16384,1024,80", "2304,16384,1024,8192"]:
        best = {}
        for _ in range(args.rounds):
            for op in args.only.split(","):
                command = [sys.executable, __file__, "--child", "--original", args.original, "--case", case]
                command += ["--dtype", args.dtype, "--threads", str(args.threads), "--only", op]
                theirs, _ = rows_of(command, env)
                ours, peak = rows_of([args.ours, "bench", "--case", case, "--dtype", args.dtype, "--op", op], env)
                measured = [(0, *line.split(",")) for line in theirs.split()]
                for r in csv.DictReader(io.StringIO(ours)):
                    measured.append((1, r["op"], r["batch"], r["seconds"], r["value"]))
                if op == "step":
                    measured.append((1, "memory", case.split(",")[2], peak, 0))
                for who, op_, n, seconds, value in measured:
                    seen = best.setdefault((op_, int(n)), [None, None])
                    if seen[who] is None or float(seconds) < seen[who][0]:
                        seen[who] = (float(seconds), float(value))
        d_in, dict_size, _, l0 = case.split(",")
        for (op, n), (theirs, ours) in best.items():
            if theirs is None or ours is None:
                continue
            ratio = theirs[0] / ours[0]
            print(f"{args.dtype},{d_in},{dict_size},{n},{l0},{op},{theirs[0]:.6g},{ours[0]:.6g},{ratio:.2f}", end="")
            print(f",{theirs[1]:.6g},{ours[1]:.6g}", flush=True)
            tolerance = 1e-3 if args.dtype == "fp32" else 5e-2
            if op != "memory" and abs(theirs[1] - ours[1]) > tolerance * abs(theirs[1]):
                sys.exit(f"{op}: the results differ")


if __name__ == "__main__":
    main()
