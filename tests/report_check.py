#!/usr/bin/env python3
"""Recomputes with PyTorch every number that a report has. Not part of `cargo test`.

    crosscoder report CHECKPOINT ACTS... --json report.json --csv report.csv --out report.html
    tests/report_check.py report.json CHECKPOINT ACTS... [--csv report.csv] [--html report.html] [--low R] [--high R]

CHECKPOINT: a directory with N.pt and N_cfg.json, or a weights file (.pt) with its cfg beside it. ACTS: .pt, .npy or
.safetensors. The model is written here a second time, after the Python original, and runs in the dtype of the cfg; sums over
rows are float64. What depends on the weights alone must agree to 1e-12. What depends on activations agrees to the rounding of
the dtype, of each sum's largest terms; whether a latent fires may differ on rows on which it lies within rounding of zero.
The page's summary, losses and table of latents are compared with the JSON, to the digits that they show.

Needs torch and numpy.
"""

import argparse
import base64
import html
import json
import math
import pathlib
import re
import struct
import sys

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
failures = checked = 0


def check(what, holds, found=""):
    global failures, checked
    checked += 1
    if not holds:
        failures += 1
        print(f"FAIL {what} {found}")


def close(what, ours, theirs, tolerance):
    """Arrays, undefined as nan; `tolerance` is absolute."""
    ours = np.array([math.nan if v is None else v for v in np.atleast_1d(np.array(ours, dtype=object)).ravel()], dtype=float)
    theirs = np.atleast_1d(np.asarray(theirs, dtype=float)).ravel()
    tolerance = np.broadcast_to(np.asarray(tolerance, dtype=float), theirs.shape)
    theirs = np.where(np.isfinite(theirs), theirs, math.nan)
    if ours.shape != theirs.shape:
        return check(what, False, f"{ours.shape} {theirs.shape}")
    undefined = np.isnan(ours) != np.isnan(theirs)
    off = np.abs(ours - theirs)
    bad = undefined | (off > tolerance)
    worst = np.nanargmax(np.where(bad, np.where(np.isnan(off), np.inf, off), -1)) if bad.any() else 0
    check(what, not bad.any(), bad.any() and f"{bad.sum()} of {bad.size}, e.g. [{worst}]: {ours[worst]} here {theirs[worst]}")


def load(path):
    path = pathlib.Path(path)
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    if path.suffix == ".safetensors":
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        out = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                flat = torch.frombuffer(bytearray(raw[8 + size + start : 8 + size + end]), dtype=kinds[entry["dtype"]])
                out[name] = flat.reshape(entry["shape"])
        return out
    return torch.load(path, weights_only=True, map_location="cpu")


def tensor(path):
    value = load(path)
    if isinstance(value, dict):
        value = next(iter(value.values()))
    return value


def activations(paths):
    files = []
    for path in map(pathlib.Path, paths):
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    parts = [tensor(path) for path in files]
    return torch.stack(parts, 1) if parts[0].ndim == 2 else torch.cat(parts)


def histogram(what, ours, values, low, high):
    """Bins as documented; values within rounding of an edge may lie on either side."""
    counts = np.array(ours["counts"])
    bins = len(counts)
    check(f"{what}: range", math.isclose(ours["low"], low, abs_tol=1e-12) and math.isclose(ours["high"], high, abs_tol=1e-12))
    values = np.asarray(values, dtype=float)
    inside = values[(values >= low) & (values <= high)]
    place = (inside - low) / (high - low) * bins
    theirs = np.bincount(np.minimum(place.astype(int), bins - 1), minlength=bins) if len(inside) else np.zeros(bins, int)
    doubtful = (np.abs(place - np.round(place)) < 1e-6).sum() + (np.abs(values - low) < 1e-6).sum() + (np.abs(values - high) < 1e-6).sum()
    off = np.abs(counts - theirs).sum() + abs(ours["outside"] - (len(values) - len(inside)))
    check(what, off <= 2 * doubtful * (off > 0), f"{off} counts differ, {doubtful} values lie at edges")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("acts", nargs="*")
    parser.add_argument("--csv", type=pathlib.Path)
    parser.add_argument("--html", type=pathlib.Path)
    parser.add_argument("--low", type=float, default=0.3)
    parser.add_argument("--high", type=float, default=0.7)
    args = parser.parse_args()
    report = json.loads(args.report.read_text())

    weights = args.checkpoint
    if weights.is_dir():
        weights = max(weights.glob("[0-9]*.pt"), key=lambda p: int(p.stem) if p.stem.isdigit() else -1)
    cfg_path = weights.with_name(weights.stem + "_cfg.json")
    cfg = json.loads((cfg_path if cfg_path.exists() else weights.with_name("cfg.json")).read_text())
    dtype = DTYPES[cfg["enc_dtype"]]
    p = {name: t.to(dtype) for name, t in load(weights).items()}
    d_hidden, n, d_in = p["W_dec"].shape
    check("cfg", report["cfg"] == cfg)
    check("sizes", (report["dict_size"], report["n_models"], report["d_in"]) == (d_hidden, n, d_in))
    letters = ["A", "B"] if n == 2 else [str(m) for m in range(n)]
    latents, histograms = report["latents"], report["histograms"]

    # The weights alone.
    w_dec = p["W_dec"].double().numpy()
    norms = np.sqrt((w_dec**2).sum(-1))  # [d_hidden, n]
    longest = np.max(norms[np.isfinite(norms)], initial=0.0)
    with np.errstate(all="ignore"):
        relative = norms / norms.sum(-1, keepdims=True)
        cosine = (w_dec[:, 0] * w_dec[:, -1]).sum(-1) / (norms[:, 0] * norms[:, -1])
    for m, letter in enumerate(letters):
        close(f"decoder_norm_{letter}", latents[f"decoder_norm_{letter}"], norms[:, m], 1e-12 * longest)
        top = histograms[f"decoder_norm_{letter}"]["high"]
        check(f"histogram decoder_norm_{letter}: covers", top >= longest)
        histogram(f"histogram decoder_norm_{letter}", histograms[f"decoder_norm_{letter}"], norms[:, m], 0.0, top)
    if n == 2:
        check("thresholds", report["thresholds"] == [args.low, args.high])
        r = relative[:, 1]
        close("relative_decoder_norm", latents["relative_decoder_norm"], r, 1e-12)
        close("cosine", latents["cosine"], cosine, 1e-10)
        near = np.minimum(abs(r - args.low), abs(r - args.high)) < 1e-12
        groups = np.where(np.isnan(r), "no direction", np.where(r <= args.low, "A only", np.where(r >= args.high, "B only", "shared")))
        differ = (groups != np.array(latents["group"])) & ~near
        check("group", not differ.any(), differ.sum())
        groups = np.array(latents["group"])
        sizes = {name: int((groups == name).sum()) for name in ["A only", "shared", "B only", "no direction"]}
        check("groups", report["groups"] == sizes, sizes)
        # As analysis.py has it, in the dtype: the same but for rounding.
        eps = torch.finfo(dtype).eps
        theirs = p["W_dec"].norm(dim=-1)
        theirs = (theirs[:, 1] / theirs.sum(-1)).double().numpy()
        # The dtype's norms may overflow or vanish.
        theirs = np.where(np.isfinite(theirs), theirs, r)
        close("relative_decoder_norm, analysis.py in the dtype", latents["relative_decoder_norm"], theirs, 4 * eps)
        histogram("histogram relative_decoder_norm", histograms["relative_decoder_norm"], r[~np.isnan(r)], 0.0, 1.0)
        shared = cosine[groups == "shared"]
        histogram("histogram cosine_of_shared", histograms["cosine_of_shared"], np.clip(shared, -1, 1), -1.0, 1.0)
    elif n > 2:
        for m in range(n):
            close(f"relative_decoder_norm_{m}", latents[f"relative_decoder_norm_{m}"], relative[:, m], 1e-12)
            histogram(f"histogram relative_decoder_norm_{m}", histograms[f"relative_decoder_norm_{m}"], relative[~np.isnan(relative[:, m]), m], 0.0, 1.0)

    check("training is there if its log is", ("training" in report) == weights.with_name("metrics.jsonl").exists())
    if "training" in report:
        steps, curves = [], {}
        for line in weights.with_name("metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            while steps and steps[-1] >= row["step"]:
                steps.pop()
                [c.pop() for c in curves.values()]
            steps.append(row["step"])
            for key in {key for key, value in row.items() if value is not None} - curves.keys() - {"step"}:
                curves[key] = [math.nan] * (len(steps) - 1)
            for key, values in curves.items():
                value = row.get(key)
                values.append(math.nan if value is None else value)
        close("training step", report["training"]["step"], steps, 0)
        for key, values in curves.items():
            close(f"training {key}", report["training"][key], values, 1e-15 * np.nanmax(np.abs([0, *values])))

    if args.acts:
        activation_numbers(report, cfg, p, dtype, args.acts, norms, w_dec, letters)
    else:
        check("no activations", "activations" not in report)

    if args.csv:
        lines = args.csv.read_text().splitlines()
        header = lines[0].split(",")
        check("csv header", header == ["latent", *latents])
        check("csv lines", len(lines) == d_hidden + 1)
        for c, key in enumerate(header[1:], 1):
            column = [line.split(",")[c] for line in lines[1:]]
            if key == "group":
                same = column == latents[key]
            elif key.startswith("top_"):
                same = all([float(t) for t in text.split()] == values for text, values in zip(column, latents[key]))
            else:
                same = all((text == "") if v is None else float(text) == v for text, v in zip(column, latents[key]))
            check(f"csv {key}", same)

    if args.html:
        page_numbers(report, args.html.read_text(), letters)

    print(f"{checked} checks, {failures} failures")
    sys.exit(1 if failures else 0)


def page_numbers(report, page, letters):
    """What the page shows is what the JSON has."""
    content = page[page.index("</header>") :]
    latents, seen, count = report["latents"], report.get("activations"), report["dict_size"]
    of = lambda key: np.array([math.nan if v is None else v for v in latents[key]], dtype=float)

    def shown(text):
        text = text.strip().replace(",", "").replace("\u221e", "inf")
        return math.nan if text == "\u2013" or text.endswith("inf") else float(text)  # JSON has null for both

    def same(what, text, value, digits=4):
        """`text` is `value` to as many significant digits; an integer is exact."""
        value = math.nan if value is None or not math.isfinite(value) else value
        unit = 0.0 if value == 0 or math.isnan(value) else 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
        ours = shown(text)
        check(f"page: {what}", (math.isnan(ours) and math.isnan(value)) or abs(ours - value) <= 0.500001 * unit, (text, value))

    tiles = {html.unescape(what): re.sub("<small>.*", "", number) for what, number in re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", content)}
    median = lambda values: float(np.median(values[~np.isnan(values)])) if (~np.isnan(values)).any() else math.nan
    expected = {"Activations' width d_in": report["d_in"]}
    expected |= {f"Mean decoder norm {letter}": np.mean(of(f"decoder_norm_{letter}")) for letter in letters}
    if "groups" in report:
        sizes, group = report["groups"], np.array(latents["group"])
        low, high = report["thresholds"]
        expected |= {f"A only (\u2264 {low:g})": sizes["A only"], "Shared": sizes["shared"], f"B only (\u2265 {high:g})": sizes["B only"]}
        expected |= {"No direction": sizes["no direction"]} if sizes["no direction"] else {}
        expected["Median cosine of shared"] = median(of("cosine")[group == "shared"])
        for name in ["A only", "B only"]:
            scaled = seen and any(g == name and beta is not None for g, beta in zip(group, latents["beta_error_A"]))
            check(f"page: median nu of {name} is there", bool(scaled) == (f"Median \u03bd of {name}" in tiles))
            if f"Median \u03bd of {name}" in tiles:
                texts = tiles.pop(f"Median \u03bd of {name}").split("/")
                for text, key in zip(texts, ["nu_reconstruction", "nu_error"]):
                    same(f"median {key} of {name}", text, median(of(key)[group == name]))
    if seen:
        expected |= {"Rows of activations": seen["rows"], "Explained variance": seen["explained_variance_of_all_rows"], "Dead latents": seen["dead"]}
        expected |= {f"Explained variance {l}": v for l, v in zip(letters, seen["explained_variance_of_all_rows_per_model"])}
    check("page: tiles", tiles.keys() == expected.keys(), tiles.keys() ^ expected.keys())
    for what in tiles.keys() & expected.keys():
        whole = isinstance(expected[what], int)
        same(what, tiles[what], expected[what], 20 if whole else 4)
    if seen:
        for name, value in seen["losses"].items():
            found = re.search(f"<code>{name}</code></th><td>(.*?)</td>", content)
            if found:
                same(name, found[1], value)
            else:
                check(f"page: {name} is there", False)

    # The table: 16 significant bits of each number, see src/report/page.rs.
    block = json.loads(re.search('<script id="data" type="application/json">(.*?)</script>', page)[1])
    data, at = base64.b64decode(block["data"]), 0
    check("page: latents", block["n"] == count)
    keys = ["group", "relative_decoder_norm"] if "groups" in report else []
    keys += [f"decoder_norm_{letter}" for letter in letters]
    keys += ["cosine"] if len(letters) == 2 else [f"relative_decoder_norm_{m}" for m in letters if len(letters) > 2]
    keys += ["density", "mean_when_active", "max"] if seen else []
    keys += ["nu_reconstruction", "nu_error"] if seen and len(letters) == 2 else []
    columns = [c for c in block["columns"] if c["type"] in ("group", "f24")]
    check("page: columns", len(columns) == len(keys), (len(columns), keys))
    for key, column in zip(keys, columns):
        size = count * (1 if column["type"] == "group" else 3)
        part, at = np.frombuffer(data[at : at + size], np.uint8), at + size
        if key == "group":
            check("page: column group", [block["groups"][g] for g in part] == latents[key])
            continue
        words = np.zeros((count, 4), np.uint8)
        words[:, 1:] = part.reshape(count, 3)
        close(f"page: column {key}", list(words.reshape(-1).view("<f4").astype(float)), of(key), 2.0**-16 * (1 + 2**-8) * np.abs(np.nan_to_num(of(key))) + 1e-38)
    rows = [c for c in block["columns"] if c["type"] == "rows"]
    check("page: strongest rows are there", len(rows) == bool(seen and any(latents["top_rows"])), len(rows))
    for column in rows:
        size, width = column["bytes"], column["count"] * column["bytes"]
        for h, top in enumerate(latents["top_rows"]):
            part = data[at + h * width : at + (h + 1) * width]
            ours = [int.from_bytes(part[k : k + size], "little") for k in range(0, width, size)]
            if [row for row in ours if row != 256**size - 1] != top:
                check(f"page: strongest rows of latent {h}", False, (ours, top))
                break
        at += count * width
    check("page: block", at == len(data))


def activation_numbers(report, cfg, p, dtype, paths, norms, w_dec, letters):
    latents, histograms, seen = report["latents"], report["histograms"], report["activations"]
    d_hidden, n, d_in = w_dec.shape
    x_all = activations(paths)[: seen["rows"]].float()
    if "normalisation_factor" in cfg:
        x_all = x_all * torch.tensor(cfg["normalisation_factor"], dtype=torch.float32)[None, :, None]
    rows, batch_size = len(x_all), seen["batch_size"]
    check("rows", seen["rows"] == rows, rows)
    check("batches", seen["batches"] == -(-rows // batch_size))
    eps = torch.finfo(dtype).eps
    strongest = np.where(norms[:, -1] >= norms[:, 0], n - 1, 0) if n == 2 else (n - 1 - np.argmax(norms[:, ::-1], 1))
    direction = w_dec[np.arange(d_hidden), strongest]  # [d_hidden, d_in]

    losses, fired, low, high = {}, np.zeros(d_hidden, int), np.zeros(d_hidden, int), np.zeros(d_hidden, int)
    total, squares, largest = np.zeros(d_hidden), np.zeros(d_hidden), np.zeros(d_hidden)
    products = np.zeros((2, n, d_hidden))
    size = np.zeros((n, d_hidden))  # of the products' terms
    of_rows, errors, mean = [], np.zeros(n), x_all.to(dtype).double().mean(0).numpy()
    variances, wide_acts = np.zeros(n), []
    l0_low, l0_high = [], []
    for x in x_all.split(batch_size):
        x = x.to(dtype)
        pre = torch.einsum("bnd,ndh->bh", x, p["W_enc"])
        acts = torch.relu(pre + p["b_enc"])
        rec = torch.einsum("bh,hnd->bnd", acts, p["W_dec"]) + p["b_dec"]
        # get_losses of the original
        squared = (rec.float() - x.float()).pow(2).sum((1, 2))
        variance = (x - x.mean(0)).pow(2).sum((1, 2))
        out = {
            "l2_loss": squared.mean(),
            "l1_loss": (acts * p["W_dec"].norm(dim=-1).sum(-1)).sum(-1).mean(0),
            "l0_loss": (acts > 0).float().sum(-1).mean(),
            "explained_variance": (1 - squared / variance).mean(),
        }
        for m, letter in enumerate(letters):
            per_row = (rec[:, m] - x[:, m]).pow(2).sum(-1) / (x[:, m] - x[:, m].mean(0)).pow(2).sum(-1)
            out[f"explained_variance_{letter}"] = (1 - per_row).float().mean()
        for key, value in out.items():
            losses[key] = losses.get(key, 0.0) + value.double().item() * len(x) / rows

        exact = torch.einsum("bnd,ndh->bh", x.double(), p["W_enc"].double()) + p["b_enc"].double()
        # The rounding of a sum: of its terms' size.
        terms = torch.einsum("bnd,ndh->bh", x.double().abs(), p["W_enc"].double().abs()) + p["b_enc"].double().abs()
        slack = eps * (exact.abs() + p["b_enc"].double().abs()) + 2**-20 * terms
        low += (exact > slack).sum(0).numpy()
        high += (exact > -slack).sum(0).numpy()
        l0_low.append((exact > slack).sum(1).numpy())
        l0_high.append((exact > -slack).sum(1).numpy())
        f, r, w = acts.double().numpy(), rec.double().numpy(), x.double().numpy()
        fired += (f > 0).sum(0)
        total += f.sum(0)
        squares += (f**2).sum(0)
        largest = np.fmax(largest, np.where(np.isnan(f), 0, f).max(0))  # nan is not active
        wide_acts.append(f)
        for m in range(n):
            products[0, m] += np.einsum("bh,bh->h", f, r[:, m] @ direction.T)
            products[1, m] += np.einsum("bh,bh->h", f, w[:, m] @ direction.T)
            size[m] += np.einsum("bh,bh->h", f, (abs(r[:, m]) + abs(w[:, m])) @ abs(direction).T)
            errors[m] += ((r[:, m] - w[:, m]) ** 2).sum()
            variances[m] += ((w[:, m] - mean[m]) ** 2).sum()
    acts = np.concatenate(wide_acts)

    for key, value in losses.items():
        close(f"losses {key}", seen["losses"][key], value, (1e-5 if dtype == torch.float32 else 2 * eps) * max(1.0, abs(value)))
    check("losses names", seen["losses"].keys() == losses.keys())
    relative = 1e-5 if dtype == torch.float32 else 2 * eps
    value = 1 - errors.sum() / variances.sum()
    close("explained_variance_of_all_rows", seen["explained_variance_of_all_rows"], value, relative * max(1.0, abs(value)))
    value = 1 - errors / variances
    close("explained_variance_of_all_rows_per_model", seen["explained_variance_of_all_rows_per_model"], value, relative * np.maximum(1.0, abs(value)))

    ours = np.array(latents["fired"])
    bad = (ours < low) | (ours > high)
    check("fired", not bad.any(), f"{bad.sum()} latents")
    check("fired: most latents as in torch", (ours == fired).mean() > 0.5, (ours == fired).mean())
    print(f"     {int((ours != fired).sum())} latents fire on another number of rows than in torch, within rounding of zero")
    close("density", latents["density"], ours / rows, 1e-15)
    check("dead", seen["dead"] == int((ours == 0).sum()))
    # What an activation's rounding can be.
    step = (4 * eps * largest + 2**-18 * (abs(p["W_enc"].double()).sum((0, 1)).numpy() * float(x_all.abs().max()))) if dtype == torch.float32 else 4 * eps * largest
    step = np.maximum(step, 1e-30)
    with np.errstate(all="ignore"):
        same = ours == fired
        mean_active = np.where(ours == 0, math.nan, np.where(same, total / fired, [math.nan if v is None else v for v in latents["mean_when_active"]]))
        close("mean_when_active", latents["mean_when_active"], mean_active, step)
        close("max", latents["max"], largest, step)
    for h in range(d_hidden):
        top_rows, top_acts = latents["top_rows"][h], latents["top_activations"][h]
        order = np.sort(acts[:, h])[::-1][: len(top_rows)]
        good = len(set(top_rows)) == len(top_rows) and (np.abs(acts[top_rows, h] - top_acts) <= step[h]).all() and (np.abs(order - top_acts) <= step[h]).all()
        good = good and top_acts == sorted(top_acts, reverse=True)
        if not good:
            check(f"top rows of latent {h}", False, (top_rows, top_acts))
            break
    else:
        check("top rows", True)

    # beta = Σ f ⟨d, y⟩ / (‖d‖² Σ f²), see src/analysis.rs.
    with np.errstate(all="ignore"):
        scale = 1 / ((direction**2).sum(-1) * squares)
        scale = np.where(np.isfinite(scale) & (ours > 0), scale, math.nan)
        along = np.einsum("hd,hmd->mh", direction, w_dec)
        beta_r = products[0] * scale
        beta_e = (products[1] - products[0] + squares * along) * scale
        # Relative rounding of f and rec, of the terms' size.
        tolerance = (1e-4 if dtype == torch.float32 else 4 * eps) * (size * scale + np.abs(along) * squares * scale)
        for m, letter in enumerate(letters):
            t = np.where(np.isnan(tolerance[m]), 0, tolerance[m]) + 1e-9
            close(f"beta_reconstruction_{letter}", latents[f"beta_reconstruction_{letter}"], np.where(ours == fired, beta_r[m], [math.nan if v is None else v for v in latents[f"beta_reconstruction_{letter}"]]), t)
            close(f"beta_error_{letter}", latents[f"beta_error_{letter}"], np.where(ours == fired, beta_e[m], [math.nan if v is None else v for v in latents[f"beta_error_{letter}"]]), t)
        if n == 2:
            nothing = math.nan
            of = lambda key: np.array([nothing if v is None else v for v in latents[key]])
            pick = lambda a, b, s: np.where(strongest == s, a, b)
            for name in ["reconstruction", "error"]:
                a, b = of(f"beta_{name}_A"), of(f"beta_{name}_B")
                nu = pick(a, b, 1) / pick(b, a, 1)
                close(f"nu_{name}", latents[f"nu_{name}"], nu, 1e-12 * np.maximum(1, np.nan_to_num(np.abs(nu), posinf=0)))
                groups, nu = np.array(latents["group"]), of(f"nu_{name}")
                for group in ["A only", "shared", "B only"]:
                    values = nu[(groups == group) & ~np.isnan(nu)]
                    histogram(f"histogram nu_{name}_of_{group}", histograms[f"nu_{name}_of_{group.replace(' ', '_')}"], values, -0.5, 1.5)
    for key in ["mean_when_active", "max"]:
        check(f"histogram log10_{key}: is there", (f"log10_{key}" in histograms) == bool(ours.any()))
        if f"log10_{key}" in histograms:
            h = histograms[f"log10_{key}"]
            values = np.array([v for v, count in zip(latents[key], ours) if count and v is not None], dtype=float)
            check(f"histogram log10_{key}: covers", h["outside"] == 0 and len(h["counts"]) == 20 * (h["high"] - h["low"]))
            histogram(f"histogram log10_{key}", h, np.log10(values), h["low"], h["high"])
    decades = max(1, math.ceil(math.log10(rows)))
    histogram("histogram log10_density", histograms["log10_density"], np.log10(ours[ours > 0] / rows), -decades, 0)
    l0 = np.array(seen["l0"])
    check("l0: rows", l0.sum() == rows)
    lowest, highest = np.sort(np.concatenate(l0_low)), np.sort(np.concatenate(l0_high))
    each = np.repeat(np.arange(len(l0)), l0)
    check("l0", (each >= lowest).all() and (each <= highest).all())
    check("l0: mean", math.isclose(each.mean(), ours.sum() / rows, rel_tol=1e-12))
    h = histograms["l0"]
    histogram("histogram l0", h, each + 0.0, 0.0, h["high"])


if __name__ == "__main__":
    main()
