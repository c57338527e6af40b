"""Times a crosscoder's training step in PyTorch, at the size of tests/cuda.rs's benchmark: the formulas of the original, dense,
with all its losses, autograd, gradient clipping, torch.optim.Adam, and the numbers that it logs. Prints a table. Given the
original's crosscoder.py, it times a step of the original's own class too (two models; einops needed).

    python tests/gpu/torch_step.py [D_IN,MODELS,DICT,BATCH,ACTIVE [crosscoder.py]]
"""

import pathlib
import sys
import time

import torch

D_IN, MODELS, DICT, BATCH, ACTIVE = map(int, (sys.argv[1] if len(sys.argv) > 1 else "2304,2,16384,4096,80").split(","))


def measure(run, runs=10):
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs


def case(name, dtype, tf32):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.manual_seed(0)
    on = {"device": "cuda", "dtype": dtype}
    w_enc = torch.nn.Parameter((torch.rand(MODELS, D_IN, DICT, **on) * 2 - 1) * 0.02)
    w_dec = torch.nn.Parameter((torch.rand(DICT, MODELS, D_IN, **on) * 2 - 1) * 0.02)
    b_enc = torch.nn.Parameter(torch.zeros(DICT, **on))
    b_dec = torch.nn.Parameter(torch.zeros(MODELS, D_IN, **on))
    params = [w_enc, w_dec, b_enc, b_dec]
    optimizer = torch.optim.Adam(params, lr=5e-5, betas=(0.9, 0.999))
    x = ((torch.rand(BATCH, MODELS, D_IN, device="cuda") * 2 - 1) * 1.7).to(dtype)

    def product():
        return torch.einsum("bmd,mdh->bh", x, w_enc)

    with torch.no_grad():
        largest = product()[0].float().sort(descending=True).values
        b_enc.fill_(-largest[ACTIVE].item())

    def step():
        acts = torch.relu(product() + b_enc)
        rec = torch.einsum("bh,hmd->bmd", acts, w_dec) + b_dec
        per_row = (rec.float() - x.float()).pow(2).sum(dim=(1, 2))
        l2 = per_row.mean()
        explained = [1 - per_row / (x - x.mean(0)).pow(2).sum(dim=(1, 2))]
        for m in range(MODELS):
            part, ours = x[:, m], rec[:, m]
            explained.append(1 - (ours - part).pow(2).sum(-1) / (part - part.mean(0)).pow(2).sum(-1))
        norms = w_dec.norm(dim=-1).sum(dim=-1)
        l1 = (acts * norms).sum(dim=-1).mean()
        l0 = (acts > 0).float().sum(-1).mean()
        loss = l2 + 0.1 * l1
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [v.item() for v in (loss, l2, l1, l0)] + [v.mean().item() for v in explained]

    with torch.no_grad():
        seconds = measure(product)
    rate = 2 * BATCH * MODELS * D_IN * DICT / seconds / 1e12
    print(f"| PyTorch {name} | {rate:.1f} | {measure(step) * 1e3:.3f} |", flush=True)


def original(name, dtype, tf32):
    """The step of the original's trainer.py on its own class."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from bench_against_original import import_original

    torch.backends.cuda.matmul.allow_tf32 = tf32
    cfg = {"dict_size": DICT, "d_in": D_IN, "enc_dtype": dtype, "seed": 49, "dec_init_norm": 0.08, "device": "cuda"}
    crosscoder = import_original(sys.argv[2]).CrossCoder(cfg)
    x = ((torch.rand(BATCH, MODELS, D_IN, device="cuda") * 2 - 1) * 1.7).to(crosscoder.W_enc.dtype)
    with torch.no_grad():
        crosscoder.b_enc.fill_(-crosscoder.encode(x)[0].float().sort(descending=True).values[ACTIVE].item())
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=5e-5, betas=(0.9, 0.999))

    def step():
        losses = crosscoder.get_losses(x)
        loss = losses.l2_loss + 0.1 * losses.l1_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [loss.item()] + [v.mean().item() for v in losses]

    print(f"| the original {name} | - | {measure(step) * 1e3:.3f} |", flush=True)


if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
print()
print("| | encoder's product, TFLOP/s | step, ms (the batch is on the device) |")
print("| --- | --- | --- |")
case("float32, TF32 off (the default)", torch.float32, False)
case("float32, TF32 on", torch.float32, True)
case("bfloat16", torch.bfloat16, False)
if len(sys.argv) > 2 and MODELS == 2:
    original("float32, TF32 off (the default)", "fp32", False)
    original("float32, TF32 on", "fp32", True)
    original("bfloat16", "bf16", False)
