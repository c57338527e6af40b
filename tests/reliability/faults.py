#!/usr/bin/env python3
"""Lets the N-th system call fail, for every N: what was there stays whole, the error is clean, the next start cleans up.

    cargo build --release
    tests/reliability/faults.py [--calls write,fsync,rename,open,ftruncate,mkdir] [--errors ENOSPC,EIO,EINTR] [--only train]

A small library that the program is made to load (LD_PRELOAD) lets the first, the second, … call of a kind fail with an error,
counted over all threads, until a run makes no more of them; `fsync` includes fdatasync. (`--calls thread`: the start of a thread fails with EAGAIN.) The runs: `train`, a
new run that saves three times; `resume`, the rest of a run that was stopped; `convert --force` and `report --force` over older
files; `encode`; `download`, of a small file and one of 300 kB, from a stand-in for the hub on this machine. A run may succeed (after EINTR, or where the call does not matter): then all its files must be those of an
undisturbed run. Or it fails, with status 1 and a message: then

- train, resume: each checkpoint that is there is bit for bit the undisturbed run's, with its cfg; the same command with
  `--resume` ends with all the files of the undisturbed run, bit for bit, and no other;
- download: each file of the cache is not there or whole (but for an .incomplete that the next run goes on with), and the same
  command then ends with the whole cache;
- convert: weights and cfg are both the old ones or both the new ones; report and encode: each file is the old one (or is not
  there) or the new one; no temporary file stays.

With `--errors KILL` the call is where the process is killed (SIGKILL): then temporary files may stay, and of a pair that convert
replaces the old weights may have the name NAME.old, but weights never stand beside the other pair's cfg.

At the end the order of durability, from strace's log of all calls: data are synced before they are renamed into their place, folders after a
rename or a new folder in them, before the next rename; the cfg is in its place before the weights, both before `resume.pt`.

Each run must have made calls of the kinds that it needs, or nothing has been tried. Needs Linux, a C compiler (cc) and strace.
"""

import collections
import errno
import hashlib
import http.server
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import common

LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_long calls;
static const char *kind;
static long nth;
static int error;

__attribute__((constructor)) static void begin(void) {
    kind = getenv("FAULT_CALL"), nth = atol(getenv("FAULT_N")), error = atoi(getenv("FAULT_ERRNO"));
}

static int fails(const char *call) {
    if (!kind || strcmp(kind, call) || atomic_fetch_add(&calls, 1) + 1 != nth) return 0;
    syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, getenv("FAULT_MARK"), O_CREAT | O_WRONLY, 0600));
    if (!error) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        return fails("open") ? -1 : REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
ssize_t write(int f, const void *b, size_t n) { return fails("write") ? -1 : REAL(write)(f, b, n); }
int fsync(int f) { return fails("fsync") ? -1 : REAL(fsync)(f); }
int fdatasync(int f) { return fails("fsync") ? -1 : REAL(fdatasync)(f); }
int rename(const char *a, const char *b) { return fails("rename") ? -1 : REAL(rename)(a, b); }
int ftruncate64(int f, off64_t n) { return fails("ftruncate") ? -1 : REAL(ftruncate64)(f, n); }
int mkdir(const char *p, mode_t m) { return fails("mkdir") ? -1 : REAL(mkdir)(p, m); }
int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *x) {
    return fails("thread") ? error : REAL(pthread_create)(t, a, f, x);
}
"""

KEYS = "--dict_size 8 --batch_size 16 --buffer_mult 4 --num_tokens 320 --save_every 8 --log_every 4 --lr 1e-3 --threads 1"


def tree(dir):
    """Every file below a folder with its bytes, but for locks."""
    paths = [p for p in sorted(dir.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(dir)): p.read_bytes() for p in paths}


COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL, LARGE = b'{"small": true}', bytes(range(256)) * 1172


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub: a small file with git's id as its ETag, and a large one with its SHA-256."""

    protocol_version = "HTTP/1.1"
    FILES = {"cfg.json": (SMALL, hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()), "w.bin": (LARGE, hashlib.sha256(LARGE).hexdigest())}

    def do_GET(self):
        data, etag = self.FILES[self.path.rsplit("/", 1)[1]]
        begun = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        rest = data[int(begun[1]) :] if begun else data
        self.send_response(206 if begun else 200)
        if begun:
            self.send_header("Content-Range", f"bytes {begun[1]}-{len(data) - 1}/{len(data)}")
        for name, value in {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(rest)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(rest)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that goes away is what is being tried."""


class Verb:
    """A command, what is there before it, and what may be there after it failed; `again` if the same command must then succeed."""

    def __init__(self, args, dir, name, before, command, groups=None, again=False):
        self.args, self.dir, self.name, self.command, self.groups, self.again = args, dir, name, command, groups, again
        self.before = dir / f"{name}-before"
        self.before.mkdir()
        before(self.before)
        self.old = tree(self.before)
        work = self.start()
        done = common.run(args, command(work))
        self.ok = common.check(done.returncode == 0, f"{name}: undisturbed", done.stderr)
        self.new = tree(work)
        common.check(self.new != self.old, f"{name}: changes something")

    def start(self):
        """A folder as it is before the command."""
        work = self.dir / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.before, work)
        return work

    def judge(self, work, status, error):
        """What is wrong, if anything, once a disturbed run has ended."""
        if status == 0:
            return [] if tree(work) == self.new else ["success, but other files"]
        killed = status == -signal.SIGKILL
        wrong = [] if status == 1 or killed else [f"status {status}"]
        if not killed and not re.search(r"^crosscoder: .", error, re.M) or "panicked" in error:
            wrong.append(f"said {error!r}")
        found = tree(work)
        if self.groups is None:
            for name, data in found.items():
                if re.search(r"/\d+(\.pt|_cfg\.json)$", name) and data != self.new[name]:
                    wrong.append(f"{name} is neither absent nor whole")
                if re.search(r"/\d+\.pt$", name) and name.replace(".pt", "_cfg.json") not in found:
                    wrong.append(f"{name} has no cfg")
            for name, data in self.old.items():
                if re.search(r"/\d+\.pt$", name) and name not in found:
                    wrong.append(f"{name} is gone")
            again = common.run(self.args, [*self.command(work), *([] if "--resume" in self.command(work) else ["--resume"])])
            if again.returncode != 0:
                wrong.append(f"does not go on: {again.stderr}")
            elif tree(work) != self.new:
                wrong.append(f"goes on to other files: {sorted(n for n in tree(work).keys() | self.new.keys() if tree(work).get(n) != self.new.get(n))}")
            return wrong
        for group in self.groups:
            state = [found.get(name) for name in group]
            whole = [[files.get(name) for name in group] for files in (self.old, self.new)]
            aside = killed and len(group) == 2 and state[0] is None and found.get(f"{group[0]}.old") == whole[0][0]
            if state not in whole and not (aside and state[1] in [None, whole[0][1], whole[1][1]]):
                wrong.append(f"{' and '.join(group)}: neither the old nor the new")
        # For the next start to remove, or to go on with.
        may_stay = (*[".crosscoder-tmp", ".old"] * killed, *[".incomplete"] * self.again)
        strangers = {name for name in found.keys() - self.new.keys() - self.old.keys() if not name.endswith(may_stay)}
        wrong += [f"left {name}" for name in sorted(strangers)]
        if self.again:
            done = common.run(self.args, self.command(work))
            # What a killed process was about to rename stays, as huggingface_hub's does.
            found = {name: data for name, data in tree(work).items() if not killed or not name.endswith(".incomplete")}
            if done.returncode != 0 or found != self.new:
                wrong.append(f"again: {done.stderr!r}, other files {sorted(found.keys() ^ self.new.keys())}")
        return wrong


def verbs(args, dir):
    acts = dir / "acts.npy"
    common.activations(acts, 300, 4)
    train = lambda work: ["train", acts, "--out", work / "out", *KEYS.split()]
    made = dir / "made"
    made.mkdir()
    done = common.run(args, train(made))
    common.check(done.returncode == 0, "a checkpoint to work with", done.stderr)
    version = made / "out/version_0"

    def stopped(work):
        """A run that was stopped in its middle, between two regular checkpoints; each read is slowed down to that end."""
        slowly = ["strace", "-D", "-f", "-o", "/dev/null", "-e", "trace=read", "-e", "inject=read:delay_enter=5000"]
        child = subprocess.Popen([*slowly, args.program, *map(str, train(work))], stderr=subprocess.DEVNULL)
        while child.poll() is None and not (work / "out/version_0/0.pt").exists():
            time.sleep(0.001)
        child.send_signal(signal.SIGTERM)
        common.check(child.wait() == 130, "a run that is stopped", child.returncode)

    yield Verb(args, dir, "train", lambda work: None, train)
    yield Verb(args, dir, "resume", stopped, lambda work: [*train(work), "--resume"])

    def converted(work):
        shutil.copy(version / "0.pt", work / "out.pt")
        shutil.copy(version / "0_cfg.json", work / "out_cfg.json")

    convert = lambda work: ["convert", version / "2.pt", work / "out.pt", "--dtype", "bf16", "--force"]
    yield Verb(args, dir, "convert", converted, convert, [["out.pt", "out_cfg.json"]])
    yield Verb(args, dir, "encode", lambda work: None, lambda work: ["encode", version, acts, "--out", work / "latents.pt"], [["latents.pt"]])

    def reported(work):
        for name in ("a.html", "a.json", "a.csv"):
            (work / name).write_bytes(b"old " + name.encode())

    report = lambda work: ["report", version, acts, "--force", "--out", work / "a.html", "--json", work / "a.json", "--csv", work / "a.csv"]
    server = Server(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_CACHE=str(dir / "work/cache"))
    files = [f"cache/models--org--name/{name}" for name in ("refs/main", *(f"blobs/{etag}" for _, etag in Hub.FILES.values()))]
    files += [f"cache/models--org--name/snapshots/{COMMIT}/{name}" for name in Hub.FILES]
    download = lambda work: ["download", "org/name", *Hub.FILES]
    yield Verb(args, dir, "download", lambda work: None, download, [[name] for name in files], again=True)
    yield Verb(args, dir, "report", reported, report, [["a.html"], ["a.json"], ["a.csv"]])


def inject(args, verb, library, call, error, n):
    """Runs a command whose n-th call fails; the folder, status, stderr and whether there was an n-th."""
    work, mark = verb.start(), library.with_suffix(".mark")
    mark.unlink(missing_ok=True)
    number = 0 if error == "KILL" else getattr(errno, error)
    fault = {"LD_PRELOAD": library, "FAULT_CALL": call, "FAULT_N": str(n), "FAULT_ERRNO": str(number), "FAULT_MARK": mark}
    done = common.run(args, verb.command(work), env={**os.environ, **fault})
    return work, done.returncode, done.stderr, mark.exists()


def lines(log):
    """The calls of strace's log; one that another thread interrupted is put together again."""
    begun = {}
    for line in log.read_text(errors="replace").splitlines():
        pid, _, call = line.partition(" ")
        if call.endswith("<unfinished ...>"):
            begun[pid] = call.removesuffix("<unfinished ...>")
        elif "resumed>" in call:
            yield begun.pop(pid, "") + call.split("resumed>", 1)[1]
        else:
            yield call.strip()


CALL = re.compile(r"^ *(\w+)\((.*)\) += (-?\d+)")


def order(args, verb, log):
    """The order of durability in one run."""
    work = verb.start()
    trace = "trace=write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,openat,close,mkdir"
    log.unlink(missing_ok=True)
    done = subprocess.run(["strace", "-f", "-qq", "-s", "4096", "-o", log, "-e", trace, args.program, *map(str, verb.command(work))], capture_output=True)
    if not common.check(done.returncode == 0 and log.exists(), f"{verb.name}: its calls are seen", done.stderr):
        return
    open_files, dirty, folders, renames = {}, set(), set(), 0
    places = []
    for line in lines(log):
        match = CALL.match(line)
        if not match or int(match[3]) < 0:
            continue
        call, text, result = match[1], match[2], match[3]
        names = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
        number = text.split(",")[0]
        if call == "openat":
            open_files[result] = names[0]
            if "O_CREAT" in text:
                dirty.add(names[0])
        elif call == "close":
            open_files.pop(number, None)
        elif call in ("write", "pwrite64") and number not in ("1", "2"):
            dirty.add(open_files.get(number, number))
        elif call in ("fsync", "fdatasync"):
            dirty.discard(open_files.get(number))
            folders.discard(open_files.get(number))
        elif call == "mkdir":
            folders.add(os.path.dirname(names[0]))
        elif call.startswith("rename"):
            renames += 1
            old, new = names[0], names[1]
            places.append(new)
            common.check(old not in dirty, f"{verb.name}: synced before it is renamed", new)
            common.check(not folders, f"{verb.name}: folders are synced before the next rename, to {os.path.basename(new)}", folders)
            if os.path.basename(new) == "resume.pt":
                common.check(not any(name.endswith("metrics.jsonl") for name in dirty), f"{verb.name}: the log is synced before resume.pt")
            folders.add(os.path.dirname(new))
    common.check(not folders, f"{verb.name}: all folders are synced at the end", folders)
    last = [re.sub(r"\d+", "N", os.path.basename(p)) for p in places if not p.endswith("report.html")]
    common.check(renames >= len(verb.groups or [[]]), f"{verb.name}: its renames are seen", places)
    if verb.groups is None:
        saves = last[1:] if verb.name == "train" else last
        common.check(saves and len(saves) % 3 == 0 and saves == ["N_cfg.json", "N.pt", "resume.pt"] * (len(saves) // 3), f"{verb.name}: cfg, weights, resume.pt", saves)
    if verb.name == "convert":
        common.check(last == ["out.pt.old", "out_cfg.json", "out.pt"], "convert: old weights away, cfg, weights", last)
    print(f"{verb.name}: {renames} renames in order", flush=True)


def certain(verb, call):
    """Whether a run makes such a call for sure. `train` makes all."""
    return verb.name == "train" or call in ("write", "fsync", "open", "rename")


def main():
    p = common.parser(__doc__)
    p.add_argument("--calls", default="write,fsync,rename,open,ftruncate,mkdir")
    p.add_argument("--errors", default="ENOSPC,EIO,EINTR")
    p.add_argument("--only", default="train,resume,convert,encode,download,report")
    args = p.parse_args()
    args.program = os.path.abspath(args.program)
    dir = common.folder(args)
    for old in dir.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    library = dir / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, "-xc", "-", "-ldl"], input=LIBRARY, text=True, check=True)
    wanted = args.only.split(",")
    for verb in verbs(args, dir):
        if verb.name not in wanted or not verb.ok:
            continue
        wanted.remove(verb.name)
        for call in args.calls.split(","):
            for error in ["EAGAIN"] if call == "thread" else args.errors.split(","):
                n, ends = 1, collections.Counter()
                while True:
                    work, status, said, injected = inject(args, verb, library, call, error, n)
                    if not injected:
                        break
                    ends["went on" if status == 0 else "told"] += 1
                    wrong = verb.judge(work, status, said)
                    common.check(not wrong, f"{verb.name}: {call} {n} fails with {error}", f"{'; '.join(wrong)} [{said.strip()[-200:]}]")
                    n += 1
                common.check(n > 1 or not certain(verb, call), f"{verb.name}: {call} {error}: tried")
                if n > 1:
                    print(f"{verb.name}: {call} {error}: {n - 1} tried, {dict(ends)}", flush=True)
        if verb.name == "download":
            continue  # a cache, which nobody relies on after a power failure
        order(args, verb, dir / "strace.log")
    common.check(not wanted, "each run that is asked for is tried", wanted)
    common.end()


main()
