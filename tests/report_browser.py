#!/usr/bin/env python3
"""Tries a report in a real browser. Not part of `cargo test`.

    crosscoder report CHECKPOINT [ACTS...] --out report.html --json report.json
    tests/report_browser.py report.html report.json [--chromium PROGRAM] [--screenshots DIR]

Checks against the JSON, at three widths, light and dark: the page asks for nothing but itself and logs no error; nothing is
wider than the window; text has a contrast of 4.5 or more; every column sorts both ways, by mouse and by keyboard, and says
so in aria-sort; the filters leave the right latents, also together; the table scrolls to its last row; controls and
charts have names; print shows rows. Needs Chromium, and Python's standard library alone.
"""

import argparse
import base64
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
]


class Browser:
    """Chromium's debugging protocol over two pipes."""

    def __init__(self, program):
        self.folder = tempfile.TemporaryDirectory()
        (read_3, self.to), (self.of, write_4) = os.pipe(), os.pipe()

        def pipes():
            a, b = os.dup(read_3), os.dup(write_4)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"],
            preexec_fn=pipes, close_fds=False, stderr=subprocess.DEVNULL,
        )
        os.close(read_3)
        os.close(write_4)
        self.buffer, self.last, self.events, self.session = b"", 0, [], None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t for t in targets if t["type"] == "page")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Network", "Log"]:
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.of, 1 << 20)
            if not piece:
                raise SystemExit("the browser has gone")
            self.buffer += piece
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **params):
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise SystemExit(f"{expression}\n{answer['exceptionDetails']}")
        return answer["result"].get("value")

    def key(self, key, code):
        text = {"Enter": "\r", "Space": " "}.get(key)
        extra = {"text": text} if text else {}
        for kind in ["keyDown", "keyUp"]:
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      **(extra if kind == "keyDown" else {}))

    def click(self, selector):
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', inline: 'center'}})")
        x, y = self.js(
            f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ["mousePressed", "mouseReleased"]:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self):
        self.process.terminate()
        self.process.wait()


FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"

# Text and the background behind it, wherever text stands.
CONTRAST = """(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const worst = {ratio: 21};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || !e.getClientRects().length || ['SCRIPT', 'STYLE', 'title', 'desc'].includes(e.tagName)) continue;
    const style = getComputedStyle(e), ink = light(parse(e instanceof SVGElement ? style.fill : style.color));
    const paper = light(behind(e)), ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < worst.ratio) Object.assign(worst, {ratio, text: text.slice(0, 40)});
  }
  return worst;
})()"""

SHOWN = """[...document.querySelectorAll('#latents tbody tr:not(.pad)')].map(r => [+r.getAttribute('aria-rowindex') - 2, +r.cells[0].textContent])"""

# The page's columns and the JSON's names.
KEYS = {
    "Latent": None, "Group": "group", "Relative norm": "relative_decoder_norm", "Norm A": "decoder_norm_A",
    "Norm B": "decoder_norm_B", "Cosine": "cosine", "Density": "density", "Mean act": "mean_when_active", "Max act": "max",
    "ν rec": "nu_reconstruction", "ν error": "nu_error",
}
GROUPS = ["A only", "shared", "B only", "no direction"]

failures = 0


def check(what, holds, found=""):
    global failures
    if not holds:
        failures += 1
    if not holds or VERBOSE:
        print(f"{'ok  ' if holds else 'FAIL'} {what} {found if not holds else ''}")


def rounded(v):
    """The page's 16 significant bits: the upper three bytes of a float32, half way to even."""
    import struct

    try:
        bits = struct.unpack("<I", struct.pack("<f", v))[0]
    except OverflowError:
        return math.inf if v > 0 else -math.inf
    bits = (bits + 0x7F + (bits >> 8 & 1)) & 0xFFFFFF00
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("json", type=pathlib.Path)
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--screenshots", type=pathlib.Path)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    global VERBOSE
    VERBOSE = args.verbose
    report = json.loads(args.json.read_text())
    n = report["dict_size"]
    browser = Browser(args.chromium)

    for width, height in [(390, 844), (820, 1180), (1440, 900)]:
        for scheme in ["light", "dark"]:
            at = f"{width} {scheme}:"
            browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
            browser.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.events.clear()
            browser.call("Page.navigate", url=args.page.resolve().as_uri())
            browser.js("new Promise(done => { const wait = () => document.documentElement?.dataset.ready ? done() : setTimeout(wait, 20); wait(); })")
            browser.js(FRAMES)
            ready = browser.js("document.documentElement.dataset.ready")
            print(f"{at} ready after {ready} ms")
            urls = {e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"}
            check(f"{at} only the page is asked for", urls == {args.page.resolve().as_uri()}, urls)
            bad = [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")]
            check(f"{at} no message", not bad, bad)
            wide = browser.js("document.documentElement.scrollWidth")
            check(f"{at} nothing is wider than the window", wide <= width, wide)
            worst = browser.js(CONTRAST)
            check(f"{at} contrast", "text" in worst and worst["ratio"] >= 4.5, worst)
            rows = browser.js(SHOWN)
            check(f"{at} rows are drawn, but not all", 10 < len(rows) < 80 or len(rows) == n, len(rows))
            if args.screenshots:
                args.screenshots.mkdir(parents=True, exist_ok=True)
                shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True)
                (args.screenshots / f"{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))

    browser.events.clear()
    browser.js("console.log('seen?')")
    check("messages are seen", any(e["method"] == "Runtime.consoleAPICalled" for e in browser.events), browser.events)

    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    for role in ["button", "textbox", "combobox", "image", "columnheader", "region"]:
        nodes = [t for t in tree if t.get("role", {}).get("value") == role and not t.get("ignored")]
        nameless = [t for t in nodes if not t.get("name", {}).get("value")]
        check(f"each {role} has a name", nodes and not nameless, nameless)

    labels = browser.js("[...document.querySelectorAll('#latents thead th')].map(th => th.textContent)")
    values = {}
    for c, label in enumerate(labels):
        key = KEYS.get(label)
        column = report["latents"].get(key) if key else None
        if label == "Latent":
            column = list(range(n))
        if column is None:
            continue
        if label == "Group":
            column = [GROUPS.index(g) for g in column]
        elif label != "Latent":
            column = [None if v is None else rounded(v) for v in column]
        values[c] = column
    check("the table has the JSON's columns", len(values) == sum(1 for label in labels if label in KEYS), labels)
    if report["n_models"] == 2:
        check("each column is known", not set(labels) - KEYS.keys() - {"Strongest rows"}, labels)

    def expected(column, down, of):
        defined = sorted((i for i in of if column[i] is not None), key=lambda i: (-column[i] if down else column[i], i))
        return defined + [i for i in of if column[i] is None]

    def visible(order, what):
        browser.js(FRAMES)
        rows = browser.js(SHOWN)
        check(what, [h for _, h in rows] == [order[r] for r, _ in rows if r < len(order)] and bool(rows) == bool(order), rows[:5])
        said = browser.js("document.getElementById('said').textContent")
        check(f"{what}: the count is said", said.startswith(f"{len(order):,} "), said)

    # How long a click takes, to the next frame that shows its result.
    def took(action):
        return browser.js(f"(async () => {{ const t = performance.now(); {action}; await {FRAMES}; return Math.round(performance.now() - t); }})()")

    print("sort by each column, ms: ", [took(f"document.querySelector('#latents thead th:nth-child({c + 1}) button').click()") for c in values])
    print("filter by a limit, ms: ", took("low.value = '0'; low.dispatchEvent(new Event('input', {bubbles: true}))"))
    print("reset, ms: ", took("document.querySelector('#filters button[type=reset]').click()"))
    browser.click("#latents thead th:nth-child(1) button")

    everything = list(range(n))
    for c, column in values.items():
        head = f"#latents thead th:nth-child({c + 1})"
        for turn in range(2):
            if turn == 0:
                browser.click(f"{head} button")
            else:
                browser.js(f"document.querySelector('{head} button').focus()")
                browser.key("Enter", 13)
            sort = browser.js(f"document.querySelector('{head}').getAttribute('aria-sort')")
            others = browser.js("document.querySelectorAll('#latents th[aria-sort=ascending],#latents th[aria-sort=descending]').length")
            check(f"{labels[c]}: aria-sort", sort in ("ascending", "descending") and others == 1, (sort, others))
            visible(expected(column, sort == "descending", everything), f"{labels[c]}: {sort}")

    def choose(element, value):
        browser.js(f"(() => {{ const e = document.getElementById('{element}'); e.focus(); e.value = {json.dumps(value)}; "
                   "e.dispatchEvent(new Event('input', {bubbles: true})); })()")

    last = max(values)
    order_by = values[last]
    down = browser.js(f"document.querySelector('#latents thead th:nth-child({last + 1})').getAttribute('aria-sort')") == "descending"
    group_at = labels.index("Group") if "Group" in labels else None
    members = everything
    if group_at is not None:
        for g in range(4):
            choose("group", str(g))
            members = [i for i in everything if values[group_at][i] == g]
            visible(expected(order_by, down, members), f"filter: {GROUPS[g]}")
        choose("group", "1")
        members = [i for i in everything if values[group_at][i] == 1]
    limited = next(c for c in values if labels[c] not in ("Latent", "Group"))
    known = sorted(v for v in values[limited] if v is not None)
    low, high = known[len(known) // 3], known[2 * len(known) // 3]
    choose("column", str(limited))
    choose("low", repr(low))
    choose("high", repr(high))
    both = [i for i in members if values[limited][i] is not None and low <= values[limited][i] <= high]
    visible(expected(order_by, down, both), "filter: group and limits")
    choose("low", "abc")
    check("filter: a limit that is no number is marked", browser.js("document.getElementById('low').getAttribute('aria-invalid')") == "true")
    browser.click("#filters button[type=reset]")
    browser.js("new Promise(done => setTimeout(done, 50))")
    visible(expected(order_by, down, everything), "filter: reset")
    choose("number", f"{n - 1}, 2")
    visible(expected(order_by, down, sorted({2, n - 1})), "filter: latents by number")
    browser.click("#filters button[type=reset]")
    browser.js("new Promise(done => setTimeout(done, 50))")

    browser.js("document.getElementById('scroll').focus()")
    browser.key("End", 35)
    browser.js("new Promise(done => setTimeout(done, 600))")
    rows = browser.js(SHOWN)
    order = expected(order_by, down, everything)
    check("the table scrolls to its end by keyboard", rows and rows[-1] == [n - 1, order[-1]], rows[-1:])
    inside = browser.js("(() => { const b = document.getElementById('scroll').getBoundingClientRect(), r = [...document.querySelectorAll('#latents tbody tr:not(.pad)')].at(-1).getBoundingClientRect(); return Math.abs(r.bottom - b.bottom); })()")
    check("its last row is in sight", inside < 20, inside)

    browser.js("dispatchEvent(new Event('beforeprint'))")
    rows = browser.js(SHOWN)
    check("print has the first rows", [r for r, _ in rows] == list(range(min(n, 100))), len(rows))
    pdf = browser.call("Page.printToPDF", printBackground=False)["data"]
    if args.screenshots:
        (args.screenshots / "print.pdf").write_bytes(base64.b64decode(pdf))
    browser.js("dispatchEvent(new Event('afterprint'))")

    browser.close()
    print(f"{failures} failures" if failures else "all hold")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
