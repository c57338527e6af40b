#!/usr/bin/env python3
"""Downloads that are killed, crowded, sent away, refused, lied to: bytes come about once, and only right ones get a name.

    cargo build --release
    tests/reliability/downloads.py [kills changes together token busy wrong interchange] [--megabytes 600] [--megabytes-per-s 40]

The hub is a server of this script's own on localhost. Its files are made of a seed, it counts the bytes of bodies that it sends
and can be slow. Nothing may lie in the cache or beside it that has no business there.

kills        a download is killed (SIGKILL) at ten moments spread over it, then let end: right bytes, in all at most 1.1 times the file
changes      killed in its middle, whereupon the hub has another version: from 0 again, the new bytes
together     eight processes download one file at once: the same bytes, one transfer
token        the hub sends us to another origin for the bytes: no Authorization there
busy         503 and 429 with Retry-After first: six requests, each after its wait; 503 for ever: six attempts, an error within 65 s
wrong        a byte of the body is wrong, by SHA-256 or by git's id: an error, and no name
interchange  where huggingface_hub is installed: it finds what we downloaded, and we offline what it did, without a request
"""

import hashlib
import http.server
import importlib.util
import itertools
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time

import common

FILE, PIECE, WAIT = "w.pt", 1 << 16, 2
REPO, LOCKS = "cache/models--org--name", "cache/.locks/models--org--name"
THEIRS = """import sys, huggingface_hub as hub
print(hub.hf_hub_download("org/name", sys.argv[1], local_files_only=sys.argv[2] == "local"))
print(len(hub.scan_cache_dir().repos), len(hub.scan_cache_dir().warnings))"""


class Content:
    """A version of the file: bytes made of a seed, piece by piece, so that none are kept."""

    def __init__(self, seed, megabytes=1, git=False):
        self.commit, self.size, self.base = f"{seed:040x}", int(megabytes * 1e6), random.Random(seed).randbytes(PIECE)
        hasher = hashlib.sha1(b"blob %d\0" % self.size) if git else hashlib.sha256()
        for piece in self.pieces(0):
            hasher.update(piece)
        self.etag = hasher.hexdigest()

    def pieces(self, begin):
        while begin < self.size:
            number, offset = divmod(begin, PIECE)
            yield (struct.pack(">Q", number) + self.base[8:])[offset : offset + self.size - begin]
            begin += PIECE - offset

    def is_in(self, path):
        with open(path, "rb") as file:
            return all(file.read(len(piece)) == piece for piece in self.pieces(0)) and not file.read(1)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, content, at_store = self.server.hub, self.server.hub.content, self.server is self.server.hub.servers[1]
        hub.log.append((self.command, time.monotonic(), at_store, {k.lower(): v for k, v in self.headers.items()}))
        status, begin, etag = 200, 0, f'"{content.etag}"'
        more = {"X-Repo-Commit": content.commit, "ETag": etag, "X-Linked-Size": content.size}
        if refusal := next(hub.refusals.get(self.command, iter(())), None):
            status, more = refusal
        elif self.path != f"/org/name/resolve/main/{FILE}":
            status = 404
        elif hub.sends_away and not at_store:
            status, more = 302, {**more, "ETag": '"other"', "X-Linked-Etag": etag, "Location": hub.urls[1] + self.path}
        elif part := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, begin = 206, int(part[1])
            more["Content-Range"] = f"bytes {begin}-{content.size - 1}/{content.size}"
        self.send_response(status)
        for name, value in {**more, "Content-Length": content.size - begin if status in (200, 206) else 0}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if status in (200, 206) and self.command == "GET":
            # What lies in the system's buffers when a client is killed is lost to it, and counted.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
            with hub.transfer:
                self.send(hub, content, begin)

    do_HEAD = do_GET

    def send(self, hub, content, done):
        hub.begins.append(done)
        at = time.monotonic()
        for piece in content.pieces(done):
            if hub.spoils and done <= content.size // 2 < done + len(piece):
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            hub.sent, done, at = hub.sent + len(piece), done + len(piece), at + len(piece) / hub.rate
            self.wfile.write(piece)
            time.sleep(max(0, at - time.monotonic()))
        hub.ended = time.monotonic()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that goes away is what is being tried."""


class Hub:
    """The hub and, at a second port, the store it may send to; and the folder in which the program works."""

    def __init__(self, args, dir, content, rate=1e12, sends_away=False, spoils=False, refusals={}):
        self.program, self.dir, self.content, self.rate = args.program, dir / str(len(os.listdir(dir))), content, rate
        self.sends_away, self.spoils, self.refusals = sends_away, spoils, refusals
        self.log, self.begins, self.sent, self.ended, self.transfer = [], [], 0, 0, threading.Lock()
        self.dir.mkdir()
        self.servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.urls = [f"http://127.0.0.1:{server.server_port}" for server in self.servers]
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def start(self, *command, limit=600, **more):
        """Starts a download, with an environment of its own; it is killed after `limit` seconds."""
        env = {k: v for k, v in os.environ.items() if not re.match(r"HF_|HUGGING|.*_PROXY$", k, re.I)}
        env |= {"HF_ENDPOINT": self.urls[0], "HF_HUB_CACHE": self.dir / "cache", "HF_HOME": self.dir / "home", **more}
        command = command or (self.program, "download", "org/name", FILE)
        child = subprocess.Popen(command, env=env, cwd=self.dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        killer = threading.Timer(limit, child.kill)
        killer.daemon = True
        killer.start()
        return child

    def names(self, but="$"):
        names = (str(p.relative_to(self.dir)) for p in self.dir.rglob("*") if p.is_symlink() or not p.is_dir())
        return {name for name in names if not re.fullmatch(but, name)}

    def kill(self, child, sent, what):
        """Kills a download once the hub has sent so many bytes; the size of the beginning that it leaves."""
        before_end = rf"{LOCKS}/{self.content.etag}\.lock|{REPO}/blobs/{self.content.etag}\.\w+\.incomplete"
        others = set()
        while child.poll() is None and self.sent < sent:
            others |= self.names(before_end)
            time.sleep(0.005)
        child.kill()
        child.communicate()
        with self.transfer:  # the hub has noticed
            others |= self.names(before_end)
        size = sum(path.stat().st_size for path in self.dir.rglob("*.incomplete"))
        met = child.returncode == -9 and 0 < size < self.content.size
        common.check(met, f"{what}: in the transfer, and a beginning stays", (child.returncode, size))
        common.check(not others, f"{what}: no name before the end", others)
        return size

    def ends(self, child, what, may_stay=frozenset()):
        """A download must end well, with the bytes of the hub's file, and leave what belongs there."""
        out, err = child.communicate()
        etag, entry = self.content.etag, f"{REPO}/snapshots/{self.content.commit}/{FILE}"
        if common.check(child.returncode == 0 and out == f"{self.dir / entry}\n", f"{what}: ends well", (child.returncode, out, err)):
            common.check(self.content.is_in(self.dir / entry), f"{what}: the bytes are right")
        found, expected = self.names(), {f"{LOCKS}/{etag}.lock", f"{REPO}/blobs/{etag}", f"{REPO}/refs/main", entry}
        common.check(expected <= found <= expected | may_stay, f"{what}: nothing lacks, nothing is left over", found ^ expected)

    def fails(self, child, what, word):
        """A download must end with status 1 and an error that has the word, and leave nothing but the lock."""
        out, err = child.communicate()
        said = re.search(rf"^crosscoder: .*{word}", err, re.M) and "panicked" not in err
        common.check(child.returncode == 1 and said and not out, f"{what}: an error that says so", (child.returncode, out, err))
        common.check(not self.names(rf"{LOCKS}/\w+\.lock"), f"{what}: no name, nothing left over", self.names())


def kills(args, dir):
    hub, rng = Hub(args, dir, Content(1, args.megabytes), args.rate), random.Random(1)
    whole = hub.content.size
    sizes = [hub.kill(hub.start(), whole * (k + rng.uniform(0.2, 0.8)) / 10, f"kill {k + 1}") for k in range(10)]
    hub.ends(hub.start(), "after the kills")
    common.check(sizes == sorted(set(sizes)), "each run goes on where the last one was", sizes)
    common.check(whole <= hub.sent <= 1.1 * whole, "all transfers together are at most 1.1 times the file", hub.sent / whole)
    at = ", ".join(f"{size / 1e6:.0f}" for size in sizes)
    print(f"kills: with {at} of {whole / 1e6:.0f} MB there; {hub.sent / 1e6:.1f} MB sent in all, {hub.sent / whole:.4f} times the file", flush=True)
    (hub.dir / REPO / "blobs" / hub.content.etag).unlink(missing_ok=True)


def changes(args, dir):
    old, new = (Content(seed, args.megabytes / 6) for seed in (1, 2))
    hub = Hub(args, dir, old, args.rate)
    hub.kill(hub.start(), old.size / 2, "before the change")
    hub.content, sent, before = new, hub.sent, hub.names()
    # The beginning of the old version may stay, as huggingface_hub's does: another revision may have it.
    hub.ends(hub.start(), "changed after a kill", before)
    common.check(hub.begins == [0, 0] and hub.sent - sent == new.size, "changed after a kill: from 0", (hub.begins, hub.sent - sent))
    print(f"changes: {(hub.sent - sent) / new.size:.4f} times the new file", flush=True)


def together(args, dir):
    hub = Hub(args, dir, Content(3, 60), 20e6)
    for i, child in enumerate([hub.start() for _ in range(8)]):
        hub.ends(child, f"process {i + 1} of eight")
    asked = [at for method, at, *_ in hub.log if method == "HEAD"]
    common.check(len(asked) == 8 and max(asked) < hub.ended - 1, "all eight ask during the transfer", asked)
    common.check(hub.begins == [0] and hub.sent == hub.content.size, "one transfer", (hub.begins, hub.sent))
    print(f"together: 8 processes, {len(hub.begins)} transfer, {hub.sent / 1e6:.0f} MB", flush=True)


def token(args, dir):
    hub = Hub(args, dir, Content(4), sends_away=True)
    hub.ends(hub.start(HF_TOKEN="hf_secret"), "with a token")
    home, away = ([headers for *_, at_store, headers in hub.log if at_store == store] for store in (False, True))
    common.check(home and all(headers.get("authorization") == "Bearer hf_secret" for headers in home), "the hub gets the token", home)
    common.check(away and not any("authorization" in headers or "hf_secret" in str(headers) for headers in away), "the other origin does not", away)
    print(f"token: {len(home)} requests to the hub, {len(away)} to the other origin", flush=True)


def busy(args, dir):
    refusals = lambda: iter([(503, {"Retry-After": WAIT}), (429, {"Retry-After": WAIT})])
    hub = Hub(args, dir, Content(5), refusals={"HEAD": refusals(), "GET": refusals()})
    hub.ends(hub.start(), "busy at first")
    waits = [b[1] - a[1] for a, b in itertools.pairwise(hub.log) if a[0] == b[0]]
    common.check([line[0] for line in hub.log] == ["HEAD"] * 3 + ["GET"] * 3, "busy at first: six requests", hub.log)
    common.check(len(waits) == 4 and min(waits) >= WAIT, "busy at first: each after its wait", waits)
    print(f"busy: {len(hub.log)} requests, the least wait {min(waits, default=0):.2f} s", flush=True)
    hubs = {method: Hub(args, dir, Content(5), refusals={method: itertools.repeat((503, {}))}) for method in ("HEAD", "GET")}
    for method, hub, child in [(method, hub, hub.start(limit=65)) for method, hub in hubs.items()]:
        hub.fails(child, f"503 to {method} for ever", "503")
        times = [at for asked, at, *_ in hub.log if asked == method]
        common.check(1 < len(times) <= 6, f"503 to {method} for ever: at most six attempts", len(times))
        print(f"503 to {method} for ever: {len(times)} attempts in {max(times, default=0) - min(times, default=0):.1f} s", flush=True)


def wrong(args, dir):
    for git in (False, True):
        hub, what = Hub(args, dir, Content(6, git=git), spoils=True), f"wrong by {'git id' if git else 'SHA-256'}"
        hub.fails(hub.start(), what, "hash")
        common.check(hub.sent and hub.sent % hub.content.size == 0, f"{what}: of the right length", hub.sent)
        print(f"{what}: {len(hub.begins)} transfers", flush=True)


def interchange(args, dir):
    if not importlib.util.find_spec("huggingface_hub"):
        return print("not checked: huggingface_hub is not installed, so nothing is exchanged with it", flush=True)
    ours, theirs = (Hub(args, dir, Content(seed), sends_away=True) for seed in (7, 8))
    ours.ends(ours.start(), "for huggingface_hub")
    out, err = ours.start(sys.executable, "-c", THEIRS, FILE, "local").communicate()
    found = out.splitlines()
    common.check(found[1:] == ["1 0"] and ours.content.is_in(found[0]), "huggingface_hub finds our file, without a warning", (out, err))
    out, err = theirs.start(sys.executable, "-c", THEIRS, FILE, "hub").communicate()
    common.check(theirs.sent == theirs.content.size and out, "huggingface_hub downloads", (out, err))
    asked, child = len(theirs.log), theirs.start(HF_HUB_OFFLINE="1")
    out, err = child.communicate()
    common.check(child.returncode == 0 and theirs.content.is_in(out.strip()), "its file is found by us offline", (out, err))
    common.check(len(theirs.log) == asked, "without a request", theirs.log[asked:])
    print(f"interchange: repositories and warnings {found[1:]} for it; {len(theirs.log) - asked} requests by us", flush=True)


def main():
    p = common.parser(__doc__)
    parts = {f.__name__: f for f in (kills, changes, together, token, busy, wrong, interchange)}
    p.add_argument("parts", nargs="*", default=list(parts), metavar="|".join(parts))
    p.add_argument("--megabytes", type=float, default=600)
    p.add_argument("--megabytes-per-s", type=lambda text: float(text) * 1e6, default=40e6, dest="rate", metavar="N")
    args = p.parse_args()
    args.program = os.path.abspath(args.program)
    dir = common.folder(args).resolve()
    for part in args.parts:
        parts[part](args, dir)
    common.end()


main()
