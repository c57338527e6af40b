//! Downloads against a hub on loopback that fails to order: each rule of the cache, of retries and of trust.

#![cfg(feature = "hub")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crosscoder::backend::Cpu;
use crosscoder::checkpoint::Files;
use crosscoder::hub::{Address, Event, Hub};
use crosscoder::{CrossCoder, ErrorKind};
#[cfg(feature = "cli")]
use crosscoder::{files::TensorFile, pt::TensorSource, safetensors};
use ring::digest;

const REPO: &str = "org/name";
const FOLDER: &str = "models--org--name";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SMALL: &str = "config.json";
const LARGE: &str = "sub/w.pt";
const LARGE_SIZE: usize = 300_123;

// ---- the stand-in hub ----

#[derive(Clone, Debug)]
struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    /// Arrived at the second origin, where the bytes of large files lie.
    cdn: bool,
    /// How many came before it with the same method to the same origin.
    nth: usize,
}

impl Request {
    /// The request for the bytes of a large file.
    fn is_bytes(&self) -> bool {
        self.cdn && self.method == "GET"
    }

    fn is_head(&self) -> bool {
        self.method == "HEAD"
    }
}

#[derive(Clone, Default)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Close the connection after so many bytes of the body.
    cut: Option<usize>,
    /// Say nothing for so long after that.
    silence: Duration,
    /// Send the body in pieces of ten bytes, with so long between them.
    drip: Option<Duration>,
    /// After the body send this for ever, with so long between the times.
    endless: Option<(Vec<u8>, Duration)>,
    /// Send no head: the body has it.
    headless: bool,
}

impl Answer {
    fn new(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let headers = headers.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Answer { status, headers, body: body.to_vec(), ..Answer::default() }
    }

    fn error(status: u16, code: &str) -> Self {
        Answer::new(status, &[("X-Error-Code", code)], b"no")
    }

    /// The header replaced, or removed by `None`.
    fn with(mut self, name: &str, value: Option<&str>) -> Self {
        self.headers.retain(|(k, _)| !k.eq_ignore_ascii_case(name));
        self.headers.extend(value.map(|value| (name.to_owned(), value.to_owned())));
        self
    }

    fn cut(mut self, at: usize) -> Self {
        self.cut = Some(at);
        self
    }

    fn corrupt(mut self) -> Self {
        let middle = self.body.len() / 2;
        self.body[middle] ^= 0x40;
        self
    }
}

type Behaviour = dyn Fn(&Request, Answer) -> Answer + Send + Sync;

struct Fake {
    endpoint: String,
    cdn: String,
    shared: Arc<Shared>,
}

struct Shared {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    log: Mutex<Vec<Request>>,
    sent: AtomicUsize,
    behaviour: Mutex<Arc<Behaviour>>,
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn git_blob(bytes: &[u8]) -> String {
    let whole = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &whole).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes that look random and are the same in every run.
fn large() -> Vec<u8> {
    let mut state = 7_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..LARGE_SIZE).map(|_| next()).collect()
}

fn small() -> Vec<u8> {
    b"{\"d_in\": 8}\n".to_vec()
}

impl Fake {
    /// A hub that does as it should.
    fn start() -> Self {
        let files = [(SMALL, small()), (LARGE, large()), ("empty.txt", Vec::new())];
        let shared = Arc::new(Shared {
            files: Mutex::new(files.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
            log: Mutex::default(),
            sent: AtomicUsize::new(0),
            behaviour: Mutex::new(Arc::new(|_: &Request, usual| usual)),
        });
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [endpoint, cdn] = [&listeners[0], &listeners[1]].map(|l| format!("http://{}", l.local_addr().unwrap()));
        for (listener, is_cdn) in listeners.into_iter().zip([false, true]) {
            let (shared, cdn) = (shared.clone(), cdn.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let (shared, cdn) = (shared.clone(), cdn.clone());
                    std::thread::spawn(move || shared.serve(stream.unwrap(), is_cdn, &cdn));
                }
            });
        }
        Fake { endpoint, cdn, shared }
    }

    /// A hub whose answers pass through `behaviour`.
    fn with(behaviour: impl Fn(&Request, Answer) -> Answer + Send + Sync + 'static) -> Self {
        let fake = Fake::start();
        fake.behave(behaviour);
        fake
    }

    fn behave(&self, behaviour: impl Fn(&Request, Answer) -> Answer + Send + Sync + 'static) {
        *self.shared.behaviour.lock().unwrap() = Arc::new(behaviour);
    }

    fn put(&self, file: &str, bytes: &[u8]) {
        self.shared.files.lock().unwrap().insert(file.to_owned(), bytes.to_vec());
    }

    fn log(&self) -> Vec<Request> {
        self.shared.log.lock().unwrap().clone()
    }

    fn forget(&self) {
        self.shared.log.lock().unwrap().clear();
        self.shared.sent.store(0, Ordering::SeqCst);
    }

    /// Bytes of bodies handed to the network.
    fn sent(&self) -> usize {
        self.shared.sent.load(Ordering::SeqCst)
    }

    fn count(&self, which: impl Fn(&Request) -> bool) -> usize {
        self.log().iter().filter(|request| which(request)).count()
    }

    fn hub(&self, cache: &Path) -> Hub {
        let hub = Hub::new(cache).unwrap().endpoint(&self.endpoint).unwrap();
        hub.backoff(Duration::from_millis(1)).timeout(Duration::from_secs(5))
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream, cdn: bool, cdn_address: &str) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let Some(first) = lines.next() else { return };
        let mut words = first.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let headers = lines
            .take_while(|line| !line.is_empty())
            .map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned())).unwrap())
            .collect();
        let request = {
            let mut log = self.log.lock().unwrap();
            let nth = log.iter().filter(|old| old.cdn == cdn && old.method == method).count();
            log.push(Request { method, path, headers, cdn, nth });
            log.last().unwrap().clone()
        };
        let usual = self.usual(&request, cdn_address);
        let behaviour = self.behaviour.lock().unwrap().clone();
        let answer = behaviour(&request, usual);
        let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", answer.status);
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        let framings = ["content-length", "transfer-encoding"];
        if !answer.headers.iter().any(|(k, _)| framings.contains(&k.to_lowercase().as_str())) {
            head += &format!("Content-Length: {}\r\n", answer.body.len());
        }
        let body = if request.is_head() { &[][..] } else { &answer.body[..answer.cut.unwrap_or(answer.body.len())] };
        self.sent.fetch_add(body.len(), Ordering::SeqCst);
        let head = if answer.headless { String::new() } else { head + "\r\n" };
        // The client may have hung up: its right.
        let sent = stream.write_all(head.as_bytes()).and_then(|()| match answer.drip {
            None => stream.write_all(body),
            Some(pause) => body.chunks(10).try_for_each(|piece| {
                std::thread::sleep(pause);
                stream.write_all(piece)
            }),
        });
        if let (Ok(()), Some((piece, pause))) = (sent, &answer.endless) {
            while stream.write_all(piece).is_ok() {
                self.sent.fetch_add(piece.len(), Ordering::SeqCst);
                std::thread::sleep(*pause);
            }
        }
        std::thread::sleep(answer.silence);
    }

    fn usual(&self, request: &Request, cdn_address: &str) -> Answer {
        let files = self.files.lock().unwrap();
        if let Some(file) = request.path.strip_prefix("/cdn/") {
            let Some(bytes) = files.get(file) else { return Answer::error(403, "") };
            let range = request.headers.get("range").map(|r| r.strip_prefix("bytes=").unwrap().trim_end_matches('-'));
            return match range.map(|from| from.parse::<usize>().unwrap()) {
                None => Answer::new(200, &[("ETag", "\"of the store\"")], bytes),
                Some(from) if from < bytes.len() => {
                    let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                    Answer::new(206, &[("Content-Range", &range)], &bytes[from..])
                }
                Some(_) => Answer::error(416, ""),
            };
        }
        let Some(rest) = request.path.strip_prefix("/org/name/resolve/") else {
            return Answer::error(401, "RepoNotFound");
        };
        let (revision, file) = rest.split_once('/').unwrap();
        if !["main", "v1", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
            return Answer::error(404, "RevisionNotFound");
        }
        let commit = ("X-Repo-Commit", COMMIT);
        let Some(bytes) = files.get(file) else {
            return Answer::error(404, "EntryNotFound").with("X-Repo-Commit", Some(COMMIT));
        };
        if !file.ends_with(".pt") {
            let (etag, size) = (format!("\"{}\"", git_blob(bytes)), bytes.len().to_string());
            return Answer::new(200, &[commit, ("ETag", &etag), ("Content-Length", &size)], bytes);
        }
        let (etag, size) = (format!("\"{}\"", sha256(bytes)), bytes.len().to_string());
        let there = format!("{cdn_address}/cdn/{file}");
        let own = ("ETag", "\"of the redirect\"");
        let headers = [commit, own, ("X-Linked-Etag", &etag), ("X-Linked-Size", &size), ("Location", &there)];
        Answer::new(302, &headers, b"Found")
    }
}

/// A folder of its own for each test, removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::SeqCst);
        let path = std::env::temp_dir().join(format!("crosscoder-hub-{}-{n}", std::process::id()));
        fs::create_dir_all(path.join("cache")).unwrap();
        Folder(path)
    }

    fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }

    fn repo(&self) -> PathBuf {
        self.cache().join(FOLDER)
    }

    /// Every file and link below, relative to the folder, sorted.
    fn tree(&self) -> Vec<String> {
        let (mut found, mut open) = (Vec::new(), vec![self.0.clone()]);
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    open.push(entry.path());
                } else {
                    found.push(entry.path().strip_prefix(&self.0).unwrap().display().to_string());
                }
            }
        }
        found.sort();
        found
    }

    /// Sizes of the beginnings of files that wait for their rest.
    fn partials(&self) -> Vec<usize> {
        let blobs = fs::read_dir(self.repo().join("blobs")).into_iter().flatten().map(Result::unwrap);
        blobs
            .filter(|e| e.file_name().to_string_lossy().ends_with(".incomplete"))
            .map(|e| e.metadata().unwrap().len() as usize)
            .collect()
    }

    /// Nothing is visible and nothing lies outside the cache.
    fn assert_nothing(&self) {
        for path in self.tree() {
            let is_ours = path.starts_with(&format!("cache/.locks/{FOLDER}/")) || path.contains("/blobs/");
            assert!(is_ours && !path.contains("snapshots"), "{path}");
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn quiet(_: Event<'_>) {}

/// Downloads the large file of `main`; the bytes must be right.
fn assert_large(fake: &Fake, folder: &Folder) {
    let path = fake.hub(&folder.cache()).download(REPO, LARGE, "main", &mut quiet).unwrap();
    assert!(fs::read(path).unwrap() == fake.shared.files.lock().unwrap()[LARGE], "the bytes differ");
    assert_eq!(folder.partials(), [0; 0], "a partial file is left");
}

/// Downloading that file of `main` fails; the message has each of the words.
fn assert_fails(fake: &Fake, folder: &Folder, file: &str, words: &[&str]) -> crosscoder::Error {
    let error = fake.hub(&folder.cache()).download(REPO, file, "main", &mut quiet).unwrap_err();
    let message = error.to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message} lacks one of {words:?}");
    assert!(message.starts_with("hf://org/name@main/"), "{message}");
    folder.assert_nothing();
    error
}

// ---- the cache ----

#[test]
fn a_download_leaves_the_standard_layout() {
    let (fake, folder) = (Fake::start(), Folder::new());
    let hub = fake.hub(&folder.cache());
    let snapshot = folder.repo().join("snapshots").join(COMMIT);
    for (file, bytes) in [(SMALL, small()), (LARGE, large()), ("empty.txt", Vec::new())] {
        let path = hub.download(REPO, file, "main", &mut quiet).unwrap();
        assert_eq!(path, snapshot.join(file));
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    let (a, b, c) = (git_blob(&small()), sha256(&large()), git_blob(b""));
    let mut wanted: Vec<String> = [&a, &b, &c]
        .iter()
        .flat_map(|etag| [format!("cache/.locks/{FOLDER}/{etag}.lock"), format!("cache/{FOLDER}/blobs/{etag}")])
        .chain([SMALL, LARGE, "empty.txt"].map(|file| format!("cache/{FOLDER}/snapshots/{COMMIT}/{file}")))
        .chain([format!("cache/{FOLDER}/refs/main")])
        .collect();
    wanted.sort();
    assert_eq!(folder.tree(), wanted);
    assert_eq!(fs::read(folder.repo().join("refs/main")).unwrap(), COMMIT.as_bytes(), "40 digits, no newline");
    #[cfg(unix)]
    {
        assert_eq!(fs::read_link(snapshot.join(SMALL)).unwrap(), Path::new(&format!("../../blobs/{a}")));
        assert_eq!(fs::read_link(snapshot.join(LARGE)).unwrap(), Path::new(&format!("../../../blobs/{b}")));
    }
}

#[test]
fn what_is_cached_is_not_transferred_again() {
    let (fake, folder) = (Fake::start(), Folder::new());
    assert_large(&fake, &folder);
    fake.forget();
    assert_large(&fake, &folder);
    assert_eq!((fake.log().len(), fake.count(Request::is_head)), (1, 1), "one question, no bytes");
    fake.forget();
    fake.hub(&folder.cache()).download(REPO, LARGE, COMMIT, &mut quiet).unwrap();
    assert_eq!(fake.log().len(), 0, "a commit never changes");
}

#[test]
fn revisions_have_their_references() {
    let (fake, folder) = (Fake::start(), Folder::new());
    for revision in ["v1", "refs/pr/1", COMMIT] {
        fake.hub(&folder.cache()).download(REPO, SMALL, revision, &mut quiet).unwrap();
    }
    let references: Vec<String> = folder.tree().into_iter().filter(|path| path.contains("/refs/")).collect();
    assert_eq!(references, [format!("cache/{FOLDER}/refs/refs/pr/1"), format!("cache/{FOLDER}/refs/v1")]);
    for revision in ["v1", "refs/pr/1", COMMIT] {
        fake.hub(&folder.cache()).offline(true).download(REPO, SMALL, revision, &mut quiet).unwrap();
    }
}

#[test]
fn the_beginning_of_a_commit_id_is_a_revision() {
    let fake = Fake::with(|request, usual| match request.path.as_str() {
        "/org/name/resolve/0123456/config.json" => {
            let etag = git_blob(&small());
            Answer::new(200, &[("X-Repo-Commit", COMMIT), ("ETag", &etag), ("Content-Length", "12")], &small())
        }
        _ => usual,
    });
    let folder = Folder::new();
    // What huggingface_hub notes of absent files does not hide one that has come.
    let absent = folder.repo().join(".no_exist").join(COMMIT);
    fs::create_dir_all(&absent).unwrap();
    fs::write(absent.join(SMALL), b"").unwrap();
    let path = fake.hub(&folder.cache()).download(REPO, SMALL, "0123456", &mut quiet).unwrap();
    assert_eq!(path, folder.repo().join("snapshots").join(COMMIT).join(SMALL));
    assert_eq!(fs::read(folder.repo().join("refs/0123456")).unwrap(), COMMIT.as_bytes());
    fake.hub(&folder.cache()).offline(true).download(REPO, SMALL, "0123456", &mut quiet).unwrap();
}

#[test]
fn names_with_spaces_and_signs_arrive() {
    let (fake, folder) = (Fake::start(), Folder::new());
    fake.put("a%20b/%C3%BC%2541%2B%23%3F%26..json", b"{}");
    let path = fake.hub(&folder.cache()).download(REPO, "a b/ü%41+#?&..json", "main", &mut quiet).unwrap();
    assert_eq!(path, folder.repo().join("snapshots").join(COMMIT).join("a b").join("ü%41+#?&..json"));
    assert_eq!(fs::read(&path).unwrap(), b"{}");
}

#[test]
fn offline_means_no_request() {
    let (fake, folder) = (Fake::start(), Folder::new());
    assert_large(&fake, &folder);
    fake.forget();
    let hub = fake.hub(&folder.cache()).offline(true);
    assert_eq!(fs::read(hub.download(REPO, LARGE, "main", &mut quiet).unwrap()).unwrap(), large());
    for (file, revision) in [(SMALL, "main"), (LARGE, "v1")] {
        let error = hub.download(REPO, file, revision, &mut quiet).unwrap_err();
        assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    }
    assert_eq!(fake.log().len(), 0);
}

#[cfg(unix)]
#[test]
fn a_reference_that_is_no_file_is_none() {
    let (fake, folder) = (Fake::start(), Folder::new());
    assert_large(&fake, &folder);
    let reference = folder.repo().join("refs/main");
    fs::remove_file(&reference).unwrap();
    // Opening it would wait for whoever writes to it.
    assert!(std::process::Command::new("mkfifo").arg(&reference).status().unwrap().success());
    let error = fake.hub(&folder.cache()).offline(true).download(REPO, LARGE, "main", &mut quiet).unwrap_err();
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_cache_of_huggingface_hub_is_read() {
    let (fake, folder) = (Fake::start(), Folder::new());
    let snapshot = folder.repo().join("snapshots").join(COMMIT).join("sub");
    for path in [&snapshot, &folder.repo().join("blobs"), &folder.repo().join("refs")] {
        fs::create_dir_all(path).unwrap();
    }
    fs::write(folder.repo().join("refs/main"), COMMIT).unwrap();
    fs::write(folder.repo().join("blobs").join(sha256(&large())), large()).unwrap();
    let aim = format!("../../../blobs/{}", sha256(&large()));
    std::os::unix::fs::symlink(aim, snapshot.join("w.pt")).unwrap();
    let path = fake.hub(&folder.cache()).offline(true).download(REPO, LARGE, "main", &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), large());
    assert_large(&fake, &folder);
    assert_eq!(fake.count(Request::is_bytes), 0);
}

#[test]
fn without_the_hub_the_cached_file_serves_and_says_so() {
    let (fake, folder) = (Fake::start(), Folder::new());
    assert_large(&fake, &folder);
    let dead = Hub::new(folder.cache()).unwrap().endpoint("http://127.0.0.1:9").unwrap();
    let mut said = Vec::new();
    let path = dead.download(REPO, LARGE, "main", &mut |event| said.push(format!("{event:?}"))).unwrap();
    assert_eq!(fs::read(path).unwrap(), large());
    assert!(said.len() == 1 && said[0].starts_with("Cached"), "{said:?}");
    // A busy hub and a lost token as well; a file that is gone is gone.
    for (status, code, serves) in [(503, "", true), (401, "GatedRepo", true), (404, "EntryNotFound", false)] {
        fake.behave(move |_, _| Answer::error(status, code));
        let result = fake.hub(&folder.cache()).download(REPO, LARGE, "main", &mut quiet);
        assert_eq!(result.is_ok(), serves, "{status} {code}");
    }
}

#[test]
fn blobs_and_entries_that_are_wrong_are_replaced() {
    let (fake, folder) = (Fake::start(), Folder::new());
    let blob = folder.repo().join("blobs").join(sha256(&large()));
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    for bad in [&large()[..1000], &vec![0; LARGE_SIZE]] {
        // A blob that no entry shows yet is hashed before one does.
        let _ = fs::remove_dir_all(folder.repo().join("snapshots"));
        fs::write(&blob, bad).unwrap();
        assert_large(&fake, &folder);
    }
    // An entry whose blob was cut, or is gone, is no entry.
    fs::write(&blob, b"cut").unwrap();
    assert_large(&fake, &folder);
    fs::remove_file(&blob).unwrap();
    assert_large(&fake, &folder);
    // A whole blob without an entry needs no transfer.
    fs::remove_dir_all(folder.repo().join("snapshots")).unwrap();
    fake.forget();
    assert_large(&fake, &folder);
    assert_eq!(fake.count(Request::is_bytes), 0);
}

#[test]
fn several_files_are_of_one_commit_and_noted_together() {
    let (fake, folder) = (Fake::start(), Folder::new());
    let hub = fake.hub(&folder.cache());
    let paths = hub.download_all(REPO, &[SMALL, LARGE], "main", &mut quiet).unwrap();
    assert_eq!(fs::read(&paths[1]).unwrap(), large());
    let asked: Vec<String> = fake.log().into_iter().filter(Request::is_head).map(|r| r.path).collect();
    assert_eq!(asked[1], format!("/org/name/resolve/{COMMIT}/{LARGE}"), "the second by the commit of the first");

    let folder = Folder::new();
    let hub = fake.hub(&folder.cache());
    hub.download_all(REPO, &[SMALL, "nope.pt"], "main", &mut quiet).unwrap_err();
    assert!(!folder.repo().join("refs/main").exists(), "offline use must not find half");
}

#[test]
fn eight_at_once_make_one_transfer() {
    let fake = Fake::with(|request, mut usual| {
        if request.is_bytes() {
            std::thread::sleep(Duration::from_millis(100));
        }
        usual.silence = Duration::from_millis(20);
        usual
    });
    let (folder, waited) = (Folder::new(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut progress = |event: Event<'_>| {
                    if matches!(event, Event::Waiting { .. }) {
                        waited.fetch_add(1, Ordering::SeqCst);
                    }
                };
                let path = fake.hub(&folder.cache()).download(REPO, LARGE, "main", &mut progress).unwrap();
                assert!(fs::read(path).unwrap() == large());
            });
        }
    });
    assert_eq!(fake.count(Request::is_bytes), 1);
    assert!(waited.load(Ordering::SeqCst) >= 1);
    assert_eq!(folder.partials(), [0; 0]);
}

// ---- what breaks off goes on ----

#[test]
fn broken_connections_are_resumed() {
    let fake = Fake::with(|request, usual| match request.nth {
        0..5 if request.is_bytes() => usual.cut(1000),
        _ => usual,
    });
    let folder = Folder::new();
    assert_large(&fake, &folder);
    assert_eq!(fake.sent(), LARGE_SIZE, "no byte twice");
    let ranges: Vec<Option<String>> =
        fake.log().iter().filter(|r| r.is_bytes()).map(|r| r.headers.get("range").cloned()).collect();
    assert_eq!(ranges[..3], [None, Some("bytes=1000-".into()), Some("bytes=2000-".into())]);
    assert_eq!(ranges.len(), 6);
}

#[test]
fn a_connection_that_always_breaks_is_good_enough_if_it_brings_the_file_forward() {
    let fake = Fake::with(
        |request, usual| if request.is_bytes() && usual.body.len() > 20_000 { usual.cut(20_000) } else { usual },
    );
    assert_large(&fake, &Folder::new());
    assert_eq!(fake.count(Request::is_bytes), LARGE_SIZE.div_ceil(20_000));
}

#[test]
fn a_connection_that_brings_next_to_nothing_is_left() {
    let fake = Fake::with(|request, usual| if request.is_bytes() { usual.cut(1000) } else { usual });
    let folder = Folder::new();
    assert_fails(&fake, &folder, LARGE, &["attempts: 6", "byte 6000 of 300123"]);
    assert_eq!(folder.partials(), [6000]);
}

#[test]
fn the_next_run_goes_on_where_the_last_one_ended() {
    let fake = Fake::with(|request, usual| match request.nth {
        0 if request.is_bytes() => usual.cut(200_000),
        _ if request.is_bytes() => usual.cut(0),
        _ => usual,
    });
    let folder = Folder::new();
    assert_fails(&fake, &folder, LARGE, &["attempts: 6", "byte 200000 of 300123"]);
    assert_eq!(folder.partials(), [200_000]);
    fake.behave(|_, usual| usual);
    let mut first = None;
    let mut progress = |event: Event<'_>| {
        if let Event::Bytes { done, total, .. } = event {
            first.get_or_insert((done, total));
        }
    };
    fake.hub(&folder.cache()).download(REPO, LARGE, "main", &mut progress).unwrap();
    assert_eq!(first, Some((200_000, LARGE_SIZE as u64)));
    assert_eq!(fake.sent(), LARGE_SIZE, "no byte twice");
    assert_large(&fake, &folder);
}

#[test]
fn another_version_begins_anew() {
    let fake = Fake::with(|request, usual| match request.nth {
        0 if request.is_bytes() => usual.cut(200_000),
        _ if request.is_bytes() => usual.cut(0),
        _ => usual,
    });
    let folder = Folder::new();
    assert_fails(&fake, &folder, LARGE, &[]);
    let mut changed = large();
    changed.reverse();
    fake.put(LARGE, &changed);
    fake.behave(|_, usual| usual);
    fake.forget();
    let path = fake.hub(&folder.cache()).download(REPO, LARGE, "main", &mut quiet).unwrap();
    assert!(fs::read(path).unwrap() == changed);
    assert_eq!(fake.sent(), LARGE_SIZE, "nothing of the old version was kept");
}

#[test]
fn a_file_that_changes_during_the_transfer_is_asked_for_again() {
    let fake = Fake::start();
    let shared = fake.shared.clone();
    // The first answer breaks off, then the store has another file of another length at that address.
    fake.behave(move |request, usual| {
        if request.is_bytes() && request.nth == 0 {
            shared.files.lock().unwrap().insert(LARGE.to_owned(), vec![5; 1000]);
            return usual.cut(500);
        }
        usual
    });
    let folder = Folder::new();
    assert_large(&fake, &folder);
}

#[test]
fn garbage_of_others_costs_one_transfer() {
    for length in [7_000, LARGE_SIZE, LARGE_SIZE + 1] {
        let (fake, folder) = (Fake::start(), Folder::new());
        let blobs = folder.repo().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.00000000.incomplete", sha256(&large()))), vec![9; length]).unwrap();
        assert_large(&fake, &folder);
        assert!(fake.sent() <= 2 * LARGE_SIZE, "{}", fake.sent());
        // What is too long is seen to be garbage at once, the rest by its hash.
        assert_eq!(fake.count(Request::is_head), if length > LARGE_SIZE { 1 } else { 2 });
    }
}

#[test]
fn servers_that_cannot_continue_a_file_send_it_whole() {
    type Fault = fn(Answer) -> Answer;
    let faults: [(&str, Fault, usize); 5] = [
        ("ignores the range", |_| Answer::new(200, &[], &large()), 1),
        ("416", |_| Answer::error(416, ""), 1),
        (
            "another range",
            |usual| {
                let body = large()[..usual.body.len()].to_vec();
                Answer { body, ..usual }.with("Content-Range", Some("bytes 0-200122/300123"))
            },
            1,
        ),
        ("no range", |usual| usual.with("Content-Range", None), 1),
        // Only the hash shows it; then the hub is asked again.
        ("lies", |usual| Answer { body: large()[..usual.body.len()].to_vec(), ..usual }, 2),
    ];
    for (name, fault, questions) in faults {
        let fake = Fake::with(move |request, usual| match request.nth {
            0 if request.is_bytes() => usual.cut(100_000),
            _ if request.is_bytes() && request.headers.contains_key("range") => fault(usual),
            _ => usual,
        });
        assert_large(&fake, &Folder::new());
        assert!(fake.count(Request::is_bytes) <= 3, "{name}");
        assert_eq!(fake.count(Request::is_head), questions, "{name}");
    }
    // A server that never can, and always breaks off, is left in the end.
    let fake = Fake::with(
        |request, usual| {
            if request.is_bytes() { Answer::new(200, &[], &large()).cut(100_000) } else { usual }
        },
    );
    assert_fails(&fake, &Folder::new(), LARGE, &["attempts: 6"]);
}

#[test]
fn a_part_may_end_early_and_must_be_of_the_same_file() {
    // Breaks off once, then comes in parts of 50,000 bytes.
    let fake = Fake::with(|request, usual| match request.nth {
        0 if request.is_bytes() => usual.cut(100_000),
        _ if request.is_bytes() => {
            let from = LARGE_SIZE - usual.body.len();
            let body = usual.body[..usual.body.len().min(50_000)].to_vec();
            let range = format!("bytes {from}-{}/{LARGE_SIZE}", from + body.len() - 1);
            Answer { body, ..usual }.with("Content-Range", Some(&range))
        }
        _ => usual,
    });
    assert_large(&fake, &Folder::new());
    assert_eq!((fake.sent(), fake.count(Request::is_head)), (LARGE_SIZE, 1));

    // A part of a file of another length: the hub is asked again.
    let fake = Fake::with(|request, usual| match request.nth {
        0 if request.is_bytes() => usual.cut(100_000),
        1 if request.is_bytes() => usual.with("Content-Range", Some("bytes 100000-300122/300124")),
        _ => usual,
    });
    assert_large(&fake, &Folder::new());
    assert_eq!(fake.count(Request::is_head), 2);
}

#[test]
fn malformed_answers_bring_nothing() {
    let chunked = |bytes: &[u8], end: &str| {
        let start = format!("{:x}\r\n", bytes.len());
        let body = [start.as_bytes(), bytes, b"\r\n", end.as_bytes()].concat();
        Answer::new(200, &[("Transfer-Encoding", "chunked")], &body)
    };
    let fine =
        Fake::with(move |request, usual| if request.is_bytes() { chunked(&large(), "0\r\n\r\n") } else { usual });
    assert_large(&fine, &Folder::new());

    // Two thirds of the rest at each attempt: with them six would do.
    let bad = move |usual: Answer| {
        let range = usual.headers.iter().find(|(k, _)| k == "Content-Range").cloned();
        let mut answer = chunked(&usual.body[..usual.body.len() * 2 / 3], "zz\r\n");
        answer.status = usual.status;
        answer.headers.extend(range);
        answer
    };
    let fake = Fake::with(move |request, usual| if request.is_bytes() { bad(usual) } else { usual });
    let folder = Folder::new();
    assert_fails(&fake, &folder, LARGE, &["attempts: 6"]);
    assert_eq!(folder.partials(), [0; 0]);
    fake.behave(move |request, usual| if request.is_bytes() && request.nth == 0 { bad(usual) } else { usual });
    fake.forget();
    assert_large(&fake, &folder);
}

#[test]
fn silence_is_a_broken_connection() {
    let fake = Fake::with(|request, mut usual| {
        if request.is_bytes() && request.nth == 0 {
            usual = usual.cut(150_000);
            usual.silence = Duration::from_secs(20);
        }
        usual
    });
    let (folder, start) = (Folder::new(), Instant::now());
    let hub = fake.hub(&folder.cache()).timeout(Duration::from_millis(300));
    assert!(fs::read(hub.download(REPO, LARGE, "main", &mut quiet).unwrap()).unwrap() == large());
    assert_eq!(fake.sent(), LARGE_SIZE);
    assert!(start.elapsed() < Duration::from_secs(5));

    // So is a trickle, 500 bytes a second.
    fake.behave(|request, mut usual| {
        usual.drip = (request.is_bytes() && request.nth == 0).then_some(Duration::from_millis(20));
        usual
    });
    fake.forget();
    let (folder, start) = (Folder::new(), Instant::now());
    let hub = fake.hub(&folder.cache()).timeout(Duration::from_millis(300));
    assert!(fs::read(hub.download(REPO, LARGE, "main", &mut quiet).unwrap()).unwrap() == large());
    assert!(start.elapsed() < Duration::from_secs(5));
}

/// Answers that never end and bring nothing, or next to nothing. Each is left in the time of silence, and after as many
/// bytes as the file may take: the rest, up to 10 MiB, is what two sockets hold.
#[test]
fn answers_that_bring_nothing_end() {
    let gzip = |bytes: &[u8]| {
        let mut out = Vec::new();
        flate2::read::GzEncoder::new(bytes, flate2::Compression::fast()).read_to_end(&mut out).unwrap();
        out
    };
    let member = gzip(b"");
    let members = member.repeat(5000);
    let [gzipped, chunked] = [("Content-Encoding", "gzip"), ("Transfer-Encoding", "chunked")];
    let close = ("Transfer-Encoding", "identity");
    let [fast, slow] = [Duration::ZERO, Duration::from_millis(5)];
    let extended = b"1;of eighteen bytes.\r\nA\r\n".repeat(1000);
    // Name, headers, start, what follows for ever, the time between, the end's message.
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [u8], &'a [u8], Duration, &'a str);
    let body: &[Case<'_>] = &[
        ("empty members", &[gzipped, close], b"", &members, fast, "bytes more than the 300123"),
        (
            "empty members, slowly",
            &[gzipped, chunked],
            b"",
            b"14\r\n\x1f\x8b\x08\0\0\0\0\0\0\xff\x03\0\0\0\0\0\0\0\0\0\r\n",
            slow,
            "attempts: 6",
        ),
        ("empty blocks", &[gzipped, close], &member[..10], &b"\0\0\0\xff\xff".repeat(9999), fast, "bytes more than"),
        ("empty blocks, slowly", &[gzipped, close], &member[..10], b"\0\0\0\xff\xff", slow, "attempts: 6"),
        ("the size of a chunk", &[chunked], b"", b"0", slow, "attempts: 6"),
        ("its extension", &[chunked], b"5;", b"x", slow, "attempts: 6"),
        ("extensions of single bytes", &[chunked], b"", &extended, fast, "bytes more than"),
    ];
    for &(name, headers, start, piece, pause, word) in body {
        let mut answer = Answer::new(200, headers, start);
        answer.endless = Some((piece.to_vec(), pause));
        let fake = Fake::with(move |request, usual| if request.is_bytes() { answer.clone() } else { usual });
        assert_ends(&fake, name, LARGE, word);
    }
    let early = "HTTP/1.1 103 x\r\n\r\n".repeat(1000);
    let header = format!("HTTP/1.1 200 x\r\nX-A: {}", "a".repeat(10));
    for (name, start, piece, pause, word) in [
        ("hints", "", early.as_str(), fast, "no answer"),
        ("hints, slowly", "", "HTTP/1.1 103 x\r\n\r\n", slow, "attempts: 6"),
        ("a header", header.as_str(), "a", slow, "attempts: 6"),
    ] {
        for bytes in [false, true] {
            let mut answer = Answer::new(0, &[], start.as_bytes());
            (answer.headless, answer.endless) = (true, Some((piece.as_bytes().to_vec(), pause)));
            let fake =
                Fake::with(move |request, usual| if request.is_bytes() == bytes { answer.clone() } else { usual });
            assert_ends(&fake, name, LARGE, word);
        }
    }
    // Ten redirects, each within the time a server may be silent, are one attempt.
    let fake = Fake::with(|request, usual| {
        if !request.is_bytes() {
            return usual;
        }
        std::thread::sleep(Duration::from_millis(150));
        Answer::new(302, &[("Location", &request.path)], b"")
    });
    assert_ends(&fake, "redirects", LARGE, "attempts: 6");
    assert!(fake.count(Request::is_bytes) <= 6 * 5, "{}", fake.count(Request::is_bytes));
}

/// The download fails in time and with few bytes, by a message that has the word.
fn assert_ends(fake: &Fake, name: &str, file: &str, word: &str) {
    let (folder, start) = (Folder::new(), Instant::now());
    let hub = fake.hub(&folder.cache()).timeout(Duration::from_millis(200));
    let error = hub.download(REPO, file, "main", &mut quiet).map(|_| ()).unwrap_err();
    let mut told = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        told += &format!(": {cause}");
        source = cause.source();
    }
    assert!(told.contains(word), "{name}: {told}");
    // Six attempts of twice 200 ms.
    assert!(start.elapsed() < Duration::from_secs(5), "{name}: {:?}", start.elapsed());
    assert!(fake.sent() < 12 << 20, "{name}: {} bytes", fake.sent());
    folder.assert_nothing();
}

// ---- busy servers ----

#[test]
fn busy_servers_are_asked_six_times() {
    for status in [429, 500, 502, 503, 504] {
        // Five failures of the hub and five of the store are survived.
        let fake = Fake::with(move |request, usual| if request.nth < 5 { Answer::error(status, "") } else { usual });
        assert_large(&fake, &Folder::new());
        fake.behave(move |_, _| Answer::error(status, ""));
        fake.forget();
        assert_fails(&fake, &Folder::new(), LARGE, &["attempts: 6", &status.to_string()]);
        assert_eq!(fake.log().len(), 6);
    }
}

#[test]
fn waits_double() {
    let fake = Fake::with(|_, _| Answer::error(503, ""));
    let (folder, mut waits) = (Folder::new(), Vec::new());
    let mut progress = |event: Event<'_>| {
        if let Event::Retry { wait, .. } = event {
            waits.push(wait.as_secs_f64() * 1e3);
        }
    };
    fake.hub(&folder.cache()).download(REPO, LARGE, "main", &mut progress).unwrap_err();
    for (wait, least) in waits.iter().zip([1.0, 2.0, 4.0, 8.0, 16.0]) {
        assert!((least..least * 1.26).contains(wait), "{waits:?}");
    }
    assert_eq!(waits.len(), 5);
}

#[test]
fn retry_after_is_honoured_up_to_a_minute() {
    let busy = |seconds: &'static str| move |_: &Request, _| Answer::error(429, "").with("Retry-After", Some(seconds));
    let fake = Fake::with(|request, usual| {
        if request.nth == 0 && request.cdn { Answer::error(429, "").with("Retry-After", Some("1")) } else { usual }
    });
    let (folder, start) = (Folder::new(), Instant::now());
    assert_large(&fake, &folder);
    assert!(start.elapsed() >= Duration::from_secs(1));

    // Until a date, by the server's own clock.
    fake.forget();
    fake.behave(|request, usual| {
        let [now, then] = ["Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:38 GMT"];
        let busy = Answer::error(503, "").with("Date", Some(now)).with("Retry-After", Some(then));
        if request.nth == 0 && request.cdn { busy } else { usual }
    });
    let start = Instant::now();
    assert_large(&fake, &Folder::new());
    assert!(start.elapsed() >= Duration::from_secs(1));

    fake.behave(busy("61"));
    let start = Instant::now();
    fake.forget();
    assert_fails(&fake, &Folder::new(), LARGE, &["told to wait 61 s", "429"]);
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(fake.log().len(), 1);
}

#[test]
fn an_expired_link_is_renewed() {
    let fake = Fake::with(|request, usual| match request.nth {
        0 if request.is_bytes() => usual.cut(100_000),
        1 if request.is_bytes() => Answer::error(403, ""),
        _ => usual,
    });
    assert_large(&fake, &Folder::new());
    assert_eq!((fake.count(Request::is_head), fake.sent() - b"no".len()), (2, LARGE_SIZE));
    fake.behave(|request, usual| if request.is_bytes() { Answer::error(403, "") } else { usual });
    assert_fails(&fake, &Folder::new(), LARGE, &["403", "expired"]);
}

#[test]
fn a_proxy_is_asked_for_the_addresses_of_its_scheme() {
    let (fake, folder) = (Fake::start(), Folder::new());
    let proxy = Fake::start();
    let hub = |vars: &[(&str, &str)]| {
        let vars: BTreeMap<String, String> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let hub = Hub::from_vars(move |name| vars.get(name).map(Into::into)).unwrap();
        hub.endpoint(&fake.endpoint).unwrap().backoff(Duration::from_millis(1))
    };
    let cache = folder.cache();
    let cache = ("HF_HUB_CACHE", cache.to_str().unwrap());
    let dead = "http://127.0.0.1:9";
    // The endpoint is http, so a proxy for https is not asked.
    for vars in [&[cache, ("HTTPS_PROXY", dead)][..], &[cache, ("HTTP_PROXY", dead), ("NO_PROXY", "127.0.0.0/8")]] {
        hub(vars).download(REPO, SMALL, "main", &mut quiet).unwrap();
        fs::remove_dir_all(folder.repo()).unwrap();
    }
    let told = |vars: &[(&str, &str)]| hub(vars).download(REPO, SMALL, "main", &mut quiet).unwrap_err().to_string();
    let error = told(&[cache, ("http_proxy", dead)]);
    assert!(error.contains("through the proxy 127.0.0.1:9"), "{error}");
    fake.forget();
    told(&[cache, ("ALL_PROXY", &proxy.endpoint)]);
    assert_eq!(proxy.log()[0].method, "CONNECT");
    let error = told(&[cache, ("ALL_PROXY", "ftp://127.0.0.1:9")]);
    assert!(error.contains("ALL_PROXY is no proxy that can be used"), "{error}");
    assert_eq!(fake.log().len(), 0, "the hub was asked past the proxy");
}

#[test]
fn nobody_at_home() {
    let folder = Folder::new();
    let hub = Hub::new(folder.cache()).unwrap().endpoint("http://127.0.0.1:9").unwrap();
    let error = hub.backoff(Duration::from_millis(1)).download(REPO, LARGE, "main", &mut quiet).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network);
    assert!(error.to_string().contains("attempts: 3: no answer from http://127.0.0.1:9"), "{error}");
    assert_eq!(folder.tree(), [""; 0]);
}

// ---- nothing is believed ----

#[test]
fn wrong_bytes_never_become_visible() {
    for file in [LARGE, SMALL] {
        let fake = Fake::with(|request, usual| if request.method == "GET" { usual.corrupt() } else { usual });
        let folder = Folder::new();
        assert_fails(&fake, &folder, file, &["corrupt", "hash"]);
        assert_eq!(folder.partials(), [0; 0], "wrong bytes are not kept");
        fake.behave(|_, usual| usual);
        fake.hub(&folder.cache()).download(REPO, file, "main", &mut quiet).unwrap();
    }
    let once =
        Fake::with(|request, usual| if request.is_bytes() && request.nth == 0 { usual.corrupt() } else { usual });
    assert_large(&once, &Folder::new());
}

#[test]
fn sizes_must_agree() {
    for size in ["300126", "300120", "0", "18446744073709551615"] {
        let fake = Fake::with(
            move |request, usual| {
                if request.is_head() { usual.with("X-Linked-Size", Some(size)) } else { usual }
            },
        );
        assert_fails(&fake, &Folder::new(), LARGE, &[]);
    }
    let page = Fake::with(
        |request, usual| {
            if request.is_bytes() { Answer::new(200, &[], b"<html>Sign in</html>") } else { usual }
        },
    );
    assert_fails(&page, &Folder::new(), LARGE, &["20 bytes"]);
}

#[test]
fn names_of_the_server_cannot_climb() {
    let long = "a".repeat(300);
    let climbing = ["../../../evil", "..", ".", "", "a/b", "/tmp/crosscoder-evil", "..\\evil", "abc", &long];
    for name in climbing {
        for header in ["X-Linked-Etag", "ETag", "X-Repo-Commit"] {
            let (name, file) = (name.to_owned(), if header == "ETag" { SMALL } else { LARGE });
            let fake = Fake::with(move |_, usual| usual.with(header, Some(&name)));
            let folder = Folder::new();
            assert_fails(&fake, &folder, file, &[if header == "X-Repo-Commit" { "commit" } else { "ETag" }]);
            assert_eq!(folder.tree(), [""; 0], "nothing at all was written");
        }
    }
}

#[test]
fn answers_that_lack_something_are_refused() {
    for (file, header, word) in [
        (LARGE, "X-Repo-Commit", "commit"),
        (LARGE, "X-Linked-Etag", "ETag"),
        (SMALL, "ETag", "ETag"),
        (LARGE, "X-Linked-Size", "size"),
        (LARGE, "Location", "Location"),
    ] {
        let fake = Fake::with(move |_, usual| usual.with(header, None));
        assert_fails(&fake, &Folder::new(), file, &[word]);
    }
}

#[test]
fn another_commit_than_the_one_asked_for_is_refused() {
    let other = "fedcba9876543210fedcba9876543210fedcba98";
    let fake = Fake::with(move |_, usual| usual.with("X-Repo-Commit", Some(other)));
    let folder = Folder::new();
    let error = fake.hub(&folder.cache()).download(REPO, LARGE, COMMIT, &mut quiet).unwrap_err().to_string();
    assert!(error.contains(other) && error.contains(COMMIT), "{error}");
    folder.assert_nothing();
    // Nor are two files of different commits taken together.
    fake.behave(
        move |request, usual| {
            if request.path.contains(LARGE) { usual.with("X-Repo-Commit", Some(other)) } else { usual }
        },
    );
    let error = fake.hub(&folder.cache()).download_all(REPO, &[SMALL, LARGE], "main", &mut quiet).unwrap_err();
    assert!(error.to_string().contains(other), "{error}");
    assert!(!folder.repo().join("refs/main").exists());
}

#[test]
fn names_of_the_caller_cannot_climb() {
    let (fake, folder) = (Fake::start(), Folder::new());
    for (repo, file, revision) in [
        ("../..", SMALL, "main"),
        ("/etc", SMALL, "main"),
        (REPO, "../../../etc/passwd", "main"),
        (REPO, "/etc/passwd", "main"),
        (REPO, SMALL, "../../main"),
    ] {
        let error = fake.hub(&folder.cache()).download(repo, file, revision, &mut quiet).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    }
    assert_eq!((fake.log().len(), folder.tree()), (0, Vec::new()));
}

#[test]
fn the_token_stays_at_home() {
    let fake = Fake::start();
    let (home, cdn) = (fake.endpoint.clone(), fake.cdn.clone());
    fake.behave(move |request, usual| match request.path.as_str() {
        // The store sends the client back to the hub, which sends it to the store again.
        "/cdn/sub/w.pt" => Answer::new(302, &[("Location", &format!("{home}/back"))], b""),
        "/back" => Answer::new(307, &[("Location", &format!("{cdn}/cdn/sub/w.pt?there"))], b""),
        "/cdn/sub/w.pt?there" => Answer::new(200, &[], &large()),
        _ => usual,
    });
    let folder = Folder::new();
    let hub = fake.hub(&folder.cache()).token("hf_secret").unwrap();
    assert!(fs::read(hub.download(REPO, LARGE, "main", &mut quiet).unwrap()).unwrap() == large());
    let seen: Vec<(String, bool)> =
        fake.log().into_iter().map(|r| (r.path, r.headers.values().any(|v| v.contains("hf_secret")))).collect();
    let wanted = [
        ("/org/name/resolve/main/sub/w.pt", true),
        ("/cdn/sub/w.pt", false),
        ("/back", false),
        ("/cdn/sub/w.pt?there", false),
    ];
    assert_eq!(seen, wanted.map(|(path, auth)| (path.to_owned(), auth)));
}

#[test]
fn redirects_within_the_hub_keep_the_token() {
    // As the real hub does for small files: a relative hop that has the headers, then the file.
    let fake = Fake::with(|request, usual| {
        if request.path != "/moved/config.json" {
            return Answer { status: 307, body: Vec::new(), ..usual }.with("Location", Some("/moved/config.json"));
        }
        if request.headers.get("authorization").map(String::as_str) != Some("Bearer hf_secret") {
            return Answer::error(401, "");
        }
        Answer::new(200, &[("Content-Length", "12")], &small())
    });
    let (folder, hop) = (Folder::new(), 307);
    fake.behave({
        let inner = fake.shared.behaviour.lock().unwrap().clone();
        move |request, usual| {
            let answer = inner(request, usual);
            // A redirect's own length is not that of the file.
            if answer.status == hop { answer.with("Content-Length", Some("0")) } else { answer }
        }
    });
    let hub = fake.hub(&folder.cache()).token("hf_secret").unwrap();
    assert_eq!(fs::read(hub.download(REPO, SMALL, "main", &mut quiet).unwrap()).unwrap(), small());
}

#[test]
fn the_etag_is_that_of_the_file_not_of_a_redirect_to_it() {
    let fake = Fake::with(|request, usual| {
        if request.path == "/org/name/resolve/main/config.json" {
            let there = format!("/org/name/resolve/{COMMIT}/config.json");
            return Answer::new(307, &[("Location", &there), ("ETag", "W/\"3c-of the redirect\"")], b"");
        }
        usual
    });
    let folder = Folder::new();
    let path = fake.hub(&folder.cache()).download(REPO, SMALL, "main", &mut quiet).unwrap();
    assert_eq!(fs::read(path).unwrap(), small());
}

#[test]
fn every_redirect_is_followed_and_its_address_may_hold_names() {
    for status in [301, 302, 303, 307, 308] {
        let fake = Fake::with(move |_, usual| if usual.status == 302 { Answer { status, ..usual } } else { usual });
        assert_large(&fake, &Folder::new());
    }
    let fake = Fake::start();
    let cdn = fake.cdn.clone();
    fake.behave(move |request, usual| match request.path.as_str() {
        "/cdn/%C3%BC%20w.pt?x=../y" => Answer::new(200, &[], &large()),
        _ => usual.with("Location", Some(&format!("{cdn}/cdn/ü w.pt?x=../y"))),
    });
    assert_large(&fake, &Folder::new());
}

#[test]
fn redirects_end() {
    let fake = Fake::with(|request, _| Answer::new(302, &[("Location", &request.path)], b""));
    assert_fails(&fake, &Folder::new(), LARGE, &["10 redirects"]);
    assert_eq!(fake.log().len(), 11);
    let fake = Fake::with(|_, usual| usual.with("Location", Some("file:///etc/passwd")));
    assert_fails(&fake, &Folder::new(), LARGE, &["redirect", "file:///etc/passwd"]);
}

#[test]
fn compressed_answers_are_unpacked_and_no_longer_than_the_file() {
    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        flate2::read::GzEncoder::new(bytes, flate2::Compression::fast()).read_to_end(&mut out).unwrap();
        out
    }
    for (file, bytes) in [(LARGE, large()), (SMALL, small())] {
        let body = gzip(&bytes);
        let fake = Fake::with(move |request, usual| {
            if request.method == "GET" && usual.status == 200 {
                return Answer::new(200, &[("Content-Encoding", "gzip")], &body);
            }
            usual
        });
        let folder = Folder::new();
        let path = fake.hub(&folder.cache()).download(REPO, file, "main", &mut quiet).unwrap();
        assert!(fs::read(path).unwrap() == bytes);
        assert!(fake.log().iter().all(|r| r.headers["accept-encoding"] == "identity"));
    }
    for (encoding, fine) in [("identity", true), ("br", false), ("gzip, gzip", false)] {
        let fake = Fake::with(
            move |request, usual| {
                if request.is_bytes() { usual.with("Content-Encoding", Some(encoding)) } else { usual }
            },
        );
        if fine {
            assert_large(&fake, &Folder::new());
        } else {
            assert_fails(&fake, &Folder::new(), LARGE, &["encoded as", encoding]);
        }
    }
    let bomb = gzip(&vec![0; 64 << 20]);
    let fake =
        Fake::with(
            move |request, usual| {
                if request.is_bytes() { Answer::new(200, &[("Content-Encoding", "gzip")], &bomb) } else { usual }
            },
        );
    let folder = Folder::new();
    let mut most = 0;
    let mut progress = |event: Event<'_>| {
        if let Event::Bytes { done, .. } = event {
            most = most.max(done);
        }
    };
    let error = fake.hub(&folder.cache()).download(REPO, LARGE, "main", &mut progress).unwrap_err();
    assert!(error.to_string().contains("hash"), "{error}");
    assert_eq!(most, LARGE_SIZE as u64);
}

// ---- what is wrong is said ----

#[test]
fn refusals_name_their_cause() {
    for (status, code, words) in [
        (401, "GatedRepo", &["gated", "HF_TOKEN"][..]),
        (403, "GatedRepo", &["gated", "HF_TOKEN"]),
        (401, "RepoNotFound", &["repository not found", "HF_TOKEN"]),
        (404, "RepoNotFound", &["repository not found"]),
        (404, "RevisionNotFound", &["no such revision", "main"]),
        (404, "EntryNotFound", &["no such file", SMALL]),
        (401, "", &["401"]),
        (403, "", &["403"]),
        (404, "", &["404"]),
        (418, "", &["418"]),
    ] {
        let fake = Fake::with(move |_, _| Answer::error(status, code).with("X-Error-Message", Some("as ordered")));
        let folder = Folder::new();
        let error = assert_fails(&fake, &folder, SMALL, words);
        let kind = if code == "EntryNotFound" { ErrorKind::Absent } else { ErrorKind::Network };
        assert_eq!(error.kind(), kind);
        assert_eq!((fake.log().len(), folder.tree()), (1, Vec::new()), "one request, no file: {error}");
    }
}

#[test]
fn errors_of_the_disk_name_the_path() {
    let (fake, folder) = (Fake::start(), Folder::new());
    let cache = folder.0.join("a file");
    fs::write(&cache, b"").unwrap();
    let error = fake.hub(&cache).download(REPO, LARGE, "main", &mut quiet).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("a file"), "{error}");
}

// ---- checkpoints ----

/// The files of a case of fixtures/layouts, put into a folder of the repository.
fn publish(fake: &Fake, case: &str, folder: &str) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/layouts").join(case);
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        fake.put(&format!("{folder}{name}"), &fs::read(entry.path()).unwrap());
    }
}

/// A hub with the original's layout, the fork's, a lone file with its cfg, and a folder without weights.
fn published() -> Fake {
    let fake = Fake::start();
    publish(&fake, "original", "blocks.14.hook_resid_pre/");
    publish(&fake, "fork-batchtopk-crosscoder", "");
    publish(&fake, "neel-4-layers", "neel/");
    fake.put("half/cfg.json", b"{}");
    fake
}

fn quiet_checkpoint(hub: &Hub, address: &str) -> crosscoder::Result<Files> {
    hub.checkpoint(&Address::parse(address)?, &mut quiet)
}

#[test]
fn a_checkpoint_is_found_by_the_names_that_layouts_have() {
    let (fake, folder) = (published(), Folder::new());
    let hub = fake.hub(&folder.cache());
    let snapshot = folder.repo().join("snapshots").join(COMMIT);
    for (address, weights, cfg, n_models) in [
        ("hf://org/name/blocks.14.hook_resid_pre", "blocks.14.hook_resid_pre/cc_weights.pt", "cfg.json", 2),
        ("hf://org/name@v1/blocks.14.hook_resid_pre/", "blocks.14.hook_resid_pre/cc_weights.pt", "cfg.json", 2),
        ("hf://org/name@refs/pr/1", "model.safetensors", "config.json", 2),
        ("hf://org/name/neel/1.pt", "neel/1.pt", "1_cfg.json", 4),
        ("hf://org/name/model.safetensors", "model.safetensors", "config.json", 2),
    ] {
        let files = quiet_checkpoint(&hub, address).unwrap();
        assert_eq!(files.weights, snapshot.join(weights), "{address}");
        assert_eq!(files.cfg, files.weights.with_file_name(cfg), "{address}");
        assert_eq!(CrossCoder::load_with(&files, Cpu::<f32>::new).unwrap().n_models(), n_models, "{address}");
    }
    // All of it again without the hub.
    let offline = fake.hub(&folder.cache()).offline(true);
    fake.forget();
    quiet_checkpoint(&offline, "hf://org/name/blocks.14.hook_resid_pre").unwrap();
    quiet_checkpoint(&offline, "hf://org/name@refs/pr/1").unwrap();
    let error = quiet_checkpoint(&offline, "hf://org/name/half").unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE") && fake.log().is_empty(), "{error}");
    // A name that cannot be is told as such.
    let error = quiet_checkpoint(&offline, "hf://a--b/c").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
}

#[test]
fn without_the_hub_a_cached_checkpoint_of_any_layout_serves() {
    let (fake, folder) = (published(), Folder::new());
    // The fork's names, which come after those of the original's layout.
    let files = quiet_checkpoint(&fake.hub(&folder.cache()), "hf://org/name").unwrap();
    let dead =
        Hub::new(folder.cache()).unwrap().endpoint("http://127.0.0.1:9").unwrap().backoff(Duration::from_millis(1));
    let busy = fake.hub(&folder.cache());
    fake.behave(|_, _| Answer::error(503, ""));
    for hub in [&dead, &busy] {
        let mut said = Vec::new();
        let mut progress = |event: Event<'_>| {
            if let Event::Cached { file, .. } = event {
                said.push(file.to_owned());
            }
        };
        assert_eq!(hub.checkpoint(&Address::parse("hf://org/name").unwrap(), &mut progress).unwrap(), files);
        assert_eq!(said, ["model.safetensors"], "said once that it may be old");
        // Another revision, another folder: nothing is cached, and the cause is told.
        for address in ["hf://org/name@v1", "hf://org/name/neel"] {
            let error = quiet_checkpoint(hub, address).unwrap_err().to_string();
            assert!(error.contains("attempts"), "{error}");
        }
    }
    // An answer that is wrong is not one that is missing.
    fake.behave(|_, usual| usual.with("ETag", Some("x")).with("X-Linked-Etag", Some("x")));
    fake.put("cfg.json", b"{}");
    assert!(quiet_checkpoint(&fake.hub(&folder.cache()), "hf://org/name").is_err());
}

#[test]
fn a_checkpoint_that_is_not_there_is_told_with_all_names() {
    let (fake, folder) = (published(), Folder::new());
    let hub = fake.hub(&folder.cache());
    for (address, words) in [
        (
            "hf://org/name/half",
            &["hf://org/name@main/half", "cc_weights.pt with cfg.json", "model.safetensors with config.json"][..],
        ),
        ("hf://org/name/neel/2.pt", &["2.pt with 2_cfg.json", "2.pt with config.json"]),
    ] {
        let error = quiet_checkpoint(&hub, address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Absent);
        assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
    }
    // What fails otherwise ends the search with its own words.
    fake.forget();
    let error = quiet_checkpoint(&hub, "hf://org/name@v9/half").unwrap_err();
    assert!(error.to_string().contains("no such revision"), "{error}");
    assert_eq!(fake.log().len(), 1);
    assert!(quiet_checkpoint(&hub, "hf://org/name/../x.pt").is_err());
}

/// The child of [`load_from_hf_takes_the_environment`]: alone it would ask the real hub.
#[test]
#[ignore = "run by load_from_hf_takes_the_environment"]
fn child_load_from_hf() {
    let crosscoder = CrossCoder::load_from_hf(REPO, crosscoder::hub::DEFAULT_PATH).unwrap();
    assert_eq!((crosscoder.n_models(), crosscoder.d_in(), crosscoder.d_hidden()), (2, 6, 20));
    assert!(CrossCoder::load_from_hf(REPO, "").unwrap().cfg().get("batch_topk_threshold").is_some());
}

#[test]
fn load_from_hf_takes_the_environment() {
    let (fake, folder) = (published(), Folder::new());
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_load_from_hf", "--ignored"])
        .envs([("HF_ENDPOINT", fake.endpoint.as_str()), ("HF_HUB_CACHE", folder.cache().to_str().unwrap())])
        .env_remove("HF_HUB_OFFLINE")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}");
    assert_eq!(fake.count(|request| request.is_bytes()), 1, "the weights of the original's layout");
}

#[cfg(feature = "cli")]
#[test]
fn verbs_take_an_address_for_their_checkpoint() {
    let (fake, folder) = (published(), Folder::new());
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/layouts");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_crosscoder"));
        command.env("HF_ENDPOINT", &fake.endpoint).env("HF_HUB_CACHE", folder.cache()).env_remove("HF_HUB_OFFLINE");
        command.args(args).current_dir(&folder.0).output().unwrap()
    };
    let succeeds = |args: &[&str]| {
        let output = run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for (case, address) in [
        ("original", "hf://org/name@v1/blocks.14.hook_resid_pre"),
        ("fork-batchtopk-crosscoder", "hf://org/name"),
        ("neel-4-layers", "hf://org/name@refs%2Fpr%2F1/neel/1.pt"),
    ] {
        let local = fixtures.join(case);
        let mut expected = TensorFile::open(local.join("expected.pt")).unwrap();
        let x = expected.read(expected.index_of("x").unwrap()).unwrap();
        let rows = fs::File::create(folder.0.join("x.safetensors")).unwrap();
        safetensors::write(rows, &[("x", &x as &dyn TensorSource)], &[]).unwrap();
        let local = local.to_str().unwrap();

        for verb in [&["eval", "--json"][..], &["report", "--csv", "-"]] {
            let with = |checkpoint| succeeds(&[verb, &[checkpoint, "x.safetensors"]].concat());
            let found = with(address);
            assert!(found.lines().count() > 0 && found == with(local), "{case} {verb:?}: {found}");
        }
        for verb in ["encode", "convert"] {
            let [here, there] = [format!("{case}-{verb}.pt"), format!("{case}-{verb}-hub.pt")];
            for (checkpoint, out) in [(local, &here), (address, &there)] {
                match verb {
                    "encode" => succeeds(&[verb, checkpoint, "x.safetensors", "--out", out]),
                    _ => succeeds(&[verb, checkpoint, out]),
                };
            }
            let tensors = |name: &str| {
                let mut file = TensorFile::open(folder.0.join(name)).unwrap();
                (0..file.tensors().len()).map(|i| file.crc32(i).unwrap()).collect::<Vec<_>>()
            };
            assert_eq!(tensors(&here), tensors(&there), "{case} {verb}");
        }
    }
    let listed = succeeds(&["info", "hf://org/name@v1/neel/1.pt"]);
    assert!(listed.contains("W_enc"), "{listed}");
    let downloaded = succeeds(&["download", "hf://org/name@v1", "hf://org/name/neel/1_cfg.json"]);
    let ends: Vec<&str> = downloaded.lines().map(|line| line.rsplit(COMMIT).next().unwrap()).collect();
    assert_eq!(ends, ["/config.json", "/model.safetensors", "/neel/1_cfg.json"]);
    assert_eq!(succeeds(&["download", REPO, ".", "neel/1_cfg.json"]), downloaded);
    let output = run(&["report", "hf://org/name/half"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("cc_weights.pt with cfg.json"), "{stderr}");
}
