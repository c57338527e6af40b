//! Requests to the hub and to where it redirects; the token goes to the hub's own origin only.

use std::sync::Arc;
use std::time::Duration;

use ureq::config::Config;
use ureq::http::header::{self, HeaderMap};
use ureq::http::{Method, Request, Response, Uri};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use super::meter::{self, Meter};
use super::names::{Commit, Etag, Target, printable};
use super::proxy::Proxies;
use crate::error::{Error, ErrorKind, Result};

/// Redirects followed for one request.
const MAX_HOPS: usize = 10;
/// Bytes that a request may bring before the body it is about, over all redirects: handshakes and headers, of which an
/// honest one has some KB, and what is read ahead (128 KiB).
const OPENING_BYTES: u64 = 1 << 20;

/// A failed request: what to report, and whether another attempt could end better.
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) class: Class,
}

/// What can be done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The connection broke or the server is busy: try again, not before the given time if the server named one.
    Transient(Option<Duration>),
    /// No connection at all.
    Unreachable,
    /// The server wants another token, or none will do.
    Denied,
    /// The server cannot go on from where we are: take the file from its beginning.
    Restart,
    /// What the server said of the file no longer holds (expired link, other size, other bytes): ask it again.
    Stale,
    /// Nothing.
    Final,
}

impl Class {
    /// Whether the hub said nothing of the file, so that an older version may serve.
    pub(super) fn is_no_answer(self) -> bool {
        matches!(self, Class::Transient(_) | Class::Unreachable | Class::Denied)
    }
}

impl Failure {
    pub(super) fn new(class: Class, what: impl Into<String>) -> Self {
        Failure { error: Error::new(ErrorKind::Network, what), class }
    }

    pub(super) fn transient(what: impl Into<String>) -> Self {
        Self::new(Class::Transient(None), what)
    }
}

/// Errors of the file system, of names and of the caller: no attempt could end better.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, class: Class::Final }
    }
}

/// An absolute `http` or `https` address.
#[derive(Clone, Debug)]
pub(super) struct Url(Uri);

impl Url {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let refuse = |why: &str| Error::new(ErrorKind::Network, format!("{why}: '{}'", printable(text)));
        let uri: Uri = text.parse().map_err(|_| refuse("not an address"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(refuse("not an http or https address"));
        }
        // `http://hub@elsewhere` looks like the hub and is not.
        if uri.authority().is_none_or(|a| a.as_str().contains('@')) || uri.host().is_none_or(str::is_empty) {
            return Err(refuse("not an address of a host"));
        }
        Ok(Url(uri))
    }

    /// Scheme, host and port: who it is that receives a request.
    pub(super) fn origin(&self) -> (bool, String, u16) {
        let https = self.0.scheme_str() == Some("https");
        let port = self.0.port_u16().unwrap_or(if https { 443 } else { 80 });
        (https, self.0.host().unwrap_or_default().to_ascii_lowercase(), port)
    }

    fn base(&self) -> String {
        let authority = self.0.authority().map(|a| a.as_str()).unwrap_or_default();
        format!("{}://{authority}", self.0.scheme_str().unwrap_or("https"))
    }

    /// Where a `Location` header leads from here. Never from https to http.
    fn join(&self, location: &str) -> Result<Self> {
        let path = self.0.path();
        let next = if location.starts_with("//") {
            Url::parse(&format!("{}:{location}", self.0.scheme_str().unwrap_or("https")))
        } else if location.starts_with('/') {
            Url::parse(&format!("{}{}", self.base(), without_dots(location)))
        } else if location.starts_with('?') {
            Url::parse(&format!("{}{path}{location}", self.base()))
        } else if location.split(['/', '?']).next().is_some_and(|first| first.contains(':')) {
            Url::parse(location)
        } else {
            let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
            Url::parse(&format!("{}{}", self.base(), without_dots(&format!("{folder}/{location}"))))
        };
        let next = next.map_err(|error| error.at("redirect"))?;
        if self.origin().0 && !next.origin().0 {
            let what = format!("redirect from https to http, '{}', is not followed", printable(location));
            return Err(Error::new(ErrorKind::Network, what));
        }
        Ok(next)
    }
}

/// A path, perhaps with a query, without its components `.` and `..`.
fn without_dots(path: &str) -> String {
    let (path, query) = path.split_at(path.find(['?', '#']).unwrap_or(path.len()));
    let mut kept: Vec<&str> = Vec::new();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    for part in &parts {
        match *part {
            "." => {}
            ".." => drop(kept.pop()),
            part => kept.push(part),
        }
    }
    let end = if matches!(parts.last(), Some(&("." | ".."))) && !kept.is_empty() { "/" } else { "" };
    format!("/{}{end}{query}", kept.join("/"))
}

/// What the hub says of a file.
pub(super) struct Described {
    pub(super) commit: Commit,
    pub(super) etag: Etag,
    pub(super) size: u64,
    /// Where the bytes are: at the hub, or at the first other origin it redirects to.
    pub(super) url: Url,
}

/// An open answer with the bytes of a file.
pub(super) struct Content {
    /// The byte of the file that the answer begins with, and the bytes of the whole file if it says so; if it is a part.
    pub(super) part: Option<(u64, Option<u64>)>,
    /// `Content-Length`.
    pub(super) length: Option<u64>,
    pub(super) gzip: bool,
    pub(super) body: ureq::Body,
}

/// One hub, reached in one way.
pub(super) struct Client {
    agent: ureq::Agent,
    /// What the answer at hand may still take; this client has one at a time.
    pub(super) meter: Arc<Meter>,
    endpoint: String,
    home: (bool, String, u16),
    token: Option<String>,
    proxies: Proxies,
}

/// Looks names up as ureq does, which panics where the thread cannot be started that it does it in.
#[derive(Debug)]
struct Lookup;

impl Resolver for Lookup {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let (found, answer) = std::sync::mpsc::sync_channel(1);
        let (uri, config) = (uri.clone(), config.clone());
        // Without a timeout ureq starts none.
        let look = move || drop(found.send(DefaultResolver::default().resolve(&uri, &config, NextTimeout::default())));
        std::thread::Builder::new().spawn(look)?;
        answer.recv_timeout(*timeout.after).unwrap_or(Err(ureq::Error::Timeout(timeout.reason)))
    }
}

impl Client {
    pub(super) fn new(endpoint: &Url, token: Option<String>, timeout: Duration, proxies: Proxies) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here, where the origin is checked at every hop.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // Each request has its own.
            .proxy(None)
            .user_agent(concat!("crosscoder/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(timeout))
            .timeout_connect(Some(timeout))
            .timeout_send_request(Some(timeout))
            .timeout_recv_response(Some(timeout))
            // A pooled connection that the server has closed meanwhile looks like a fault of the server.
            .max_idle_connections(0)
            .build();
        let endpoint_text = endpoint.0.to_string();
        let meter = Arc::new(Meter::new());
        Client {
            agent: ureq::Agent::with_parts(config, meter::connector(&meter), Lookup),
            meter,
            endpoint: endpoint_text.trim_end_matches('/').to_owned(),
            home: endpoint.origin(),
            token,
            proxies,
        }
    }

    fn send(&self, method: Method, url: &Url, at_home: bool, from: u64) -> Result<Response<ureq::Body>, Failure> {
        let mut request = Request::builder().method(method).uri(url.0.clone());
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        if let (true, Some(token)) = (at_home, &self.token) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let mut request = request.body(()).map_err(|e| Failure::new(Class::Final, e.to_string()))?;
        let mut through = String::new();
        if let Some(proxy) = self.proxies.of(url)? {
            through = format!(" through the proxy {}:{}", proxy.host(), proxy.port());
            request = self.agent.configure_request(request).proxy(Some(proxy.clone())).build();
        }
        self.agent.run(request).map_err(|error| {
            use std::io::ErrorKind as Io;
            use ureq::Timeout::{Connect, Resolve};
            let class = match &error {
                ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => Class::Unreachable,
                ureq::Error::Timeout(Connect | Resolve) => Class::Unreachable,
                ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => Class::Transient(None),
                ureq::Error::Io(e) => match e.kind() {
                    // The connection was there.
                    Io::ConnectionReset | Io::ConnectionAborted | Io::BrokenPipe => Class::Transient(None),
                    Io::UnexpectedEof | Io::TimedOut | Io::WouldBlock | Io::Interrupted => Class::Transient(None),
                    // A certificate that does not hold, for one.
                    Io::InvalidData => Class::Final,
                    // Refused, no route, no such name (which has no kind of its own).
                    _ => Class::Unreachable,
                },
                _ => Class::Final,
            };
            let error =
                Error::new(ErrorKind::Network, format!("no answer from {}{through}", url.base())).with_source(error);
            Failure { error, class }
        })
    }

    /// Asks the hub for commit, ETag, size and place of a file, without its bytes. All hops together have this `time`.
    ///
    /// Redirects within the hub are followed. The commit is that of the first answer that has one: where the file
    /// really lies (a store of blobs), nothing is known of commits. `X-Linked-Etag` and `X-Linked-Size` are those of
    /// the file; `ETag` and `Content-Length` only where the answer is the file, and a redirect's `ETag` where no later
    /// answer has one.
    pub(super) fn describe(&self, target: &Target, time: Duration) -> Result<Described, Failure> {
        let mut url = Url::parse(&format!("{}{}", self.endpoint, target.address()))?;
        let (mut commit, mut linked_etag, mut etag, mut size) = (None, None, None, None);
        self.meter.start(time, OPENING_BYTES);
        for _ in 0..=MAX_HOPS {
            let response = self.send(Method::HEAD, &url, true, 0)?;
            let headers = response.headers();
            let redirect = redirect(&response, &url)?;
            if redirect.is_none() && !response.status().is_success() {
                return Err(self.refusal(&response, true));
            }
            commit = commit.or_else(|| text(headers, "x-repo-commit"));
            linked_etag = linked_etag.or_else(|| text(headers, "x-linked-etag"));
            etag = text(headers, "etag").or(etag);
            size = size.or_else(|| number(headers, "x-linked-size"));
            match redirect {
                Some(next) if next.origin() == self.home => {
                    url = next;
                    continue;
                }
                Some(next) => url = next,
                None if encoding(headers) == Encoding::None => {
                    size = size.or_else(|| number(headers, "content-length"))
                }
                None => {}
            }
            let lacks = |name: &str| Failure::new(Class::Final, format!("the hub's answer has no {name}"));
            let commit = commit.ok_or_else(|| lacks("commit (X-Repo-Commit)"))?;
            let commit = Commit::parse(&commit).ok_or_else(|| {
                Failure::new(Class::Final, format!("the hub's commit '{}' is not 40 hex digits", printable(&commit)))
            })?;
            if let Some(asked) = target.commit().filter(|asked| *asked != commit) {
                let what = format!("the hub's answer is of commit {}, not of {}", commit.as_str(), asked.as_str());
                return Err(Failure::new(Class::Final, what));
            }
            let etag = Etag::parse(&linked_etag.or(etag).ok_or_else(|| lacks("ETag"))?)?;
            let size = size.ok_or_else(|| lacks("size (X-Linked-Size or Content-Length)"))?;
            return Ok(Described { commit, etag, size, url });
        }
        Err(too_many_hops())
    }

    /// Opens the file at `url` from byte `from` on. All hops together have this `time`.
    pub(super) fn open(&self, url: &Url, from: u64, time: Duration) -> Result<Content, Failure> {
        self.meter.start(time, OPENING_BYTES);
        let mut url = url.clone();
        let mut at_home = true;
        for _ in 0..=MAX_HOPS {
            // Once away, the token stays at home, even if a later hop leads back.
            at_home = at_home && url.origin() == self.home;
            let response = self.send(Method::GET, &url, at_home, from)?;
            if let Some(next) = redirect(&response, &url)? {
                url = next;
                continue;
            }
            let headers = response.headers();
            let part = match response.status().as_u16() {
                200 => None,
                206 => match text(headers, "content-range").as_deref().and_then(first_and_total) {
                    Some(part) => Some(part),
                    None => return Err(Failure::new(Class::Restart, "an answer 206 without a readable Content-Range")),
                },
                _ => return Err(self.refusal(&response, at_home)),
            };
            let gzip = match encoding(headers) {
                Encoding::None => false,
                Encoding::Gzip => true,
                Encoding::Other(name) => {
                    let what = format!("the answer is encoded as '{}', which nobody asked for", printable(&name));
                    return Err(Failure::new(Class::Final, what));
                }
            };
            let length = number(headers, "content-length");
            return Ok(Content { part, length, gzip, body: response.into_body() });
        }
        Err(too_many_hops())
    }

    /// The error for an answer that is neither a success nor a redirect.
    fn refusal(&self, response: &Response<ureq::Body>, at_home: bool) -> Failure {
        let headers = response.headers();
        let status = response.status().as_u16();
        let who = if at_home { "the hub" } else { "the file's host" };
        let said = text(headers, "x-error-message").map(|m| format!(" ({})", printable(&m))).unwrap_or_default();
        let token = match self.token {
            Some(_) => "the token (HF_TOKEN) does not allow it",
            None => "if it is private, set HF_TOKEN",
        };
        let code = text(headers, "x-error-code");
        if (status, code.as_deref()) == (404, Some("EntryNotFound")) {
            let error = Error::new(ErrorKind::Absent, "no such file in the repository");
            return Failure { error, class: Class::Final };
        }
        let (class, what) = match (status, code.as_deref()) {
            (429 | 408 | 500..=599, _) => {
                let after = retry_after(headers);
                (Class::Transient(after), format!("{who} answers {status}{said}"))
            }
            (416, _) => (Class::Restart, format!("{who} answers 416 to a request for the rest of the file{said}")),
            (401..=404 | 410, _) if !at_home => {
                (Class::Stale, format!("{who} answers {status}{said}; its link may have expired"))
            }
            (401 | 403, Some("GatedRepo")) => {
                let remedy = match self.token {
                    Some(_) => "ask for it on the repository's page; the account of HF_TOKEN has none",
                    None => "ask for it on the repository's page, then set HF_TOKEN",
                };
                (Class::Denied, format!("access is gated{said}: {remedy}"))
            }
            (404, Some("RevisionNotFound")) => (Class::Final, "no such revision in the repository".to_owned()),
            (401, _) => (Class::Denied, format!("repository not found (401){said}; {token}")),
            (404, Some("RepoNotFound")) => (Class::Denied, format!("repository not found{said}; {token}")),
            (403, _) => (Class::Denied, format!("{who} answers 403, forbidden{said}; {token}")),
            (404, _) => (Class::Final, format!("{who} answers 404, not found{said}")),
            _ => (Class::Final, format!("{who} answers {status}{said}")),
        };
        Failure::new(class, what)
    }
}

fn too_many_hops() -> Failure {
    Failure::new(Class::Final, format!("more than {MAX_HOPS} redirects"))
}

/// Where the answer redirects to, if it does.
fn redirect(response: &Response<ureq::Body>, from: &Url) -> Result<Option<Url>, Failure> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    // Names of files stand in it, and not every server encodes them.
    let encoded = |value: &header::HeaderValue| -> String {
        let graphic =
            |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte).into() } else { format!("%{byte:02X}") };
        value.as_bytes().iter().map(graphic).collect()
    };
    match response.headers().get(header::LOCATION).map(encoded) {
        Some(location) => Ok(Some(from.join(&location)?)),
        None => Err(Failure::new(Class::Final, "a redirect to nowhere (no Location)")),
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

#[derive(Debug, PartialEq, Eq)]
enum Encoding {
    None,
    Gzip,
    Other(String),
}

fn encoding(headers: &HeaderMap) -> Encoding {
    let name = text(headers, "content-encoding").unwrap_or_default();
    match name.trim().to_ascii_lowercase().as_str() {
        "" | "identity" => Encoding::None,
        "gzip" | "x-gzip" => Encoding::Gzip,
        other => Encoding::Other(other.to_owned()),
    }
}

/// The wait that the server asks for, in seconds or until a date, which its own clock is compared with.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    if let Some(seconds) = number(headers, "retry-after") {
        return Some(Duration::from_secs(seconds));
    }
    let until = http_date(&text(headers, "retry-after")?)?;
    let now = text(headers, "date")
        .and_then(|date| http_date(&date))
        .or_else(|| Some(std::time::SystemTime::UNIX_EPOCH.elapsed().ok()?.as_secs()))?;
    Some(Duration::from_secs(until.saturating_sub(now)))
}

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT`, the one form of dates that HTTP still writes.
fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.trim().split(' ').skip(1);
    let day: u64 = words.next()?.parse().ok().filter(|day| (1..=31).contains(day))?;
    let name = words.next()?;
    let month = u64::try_from(MONTHS.iter().position(|month| *month == name)?).ok()?;
    let year: u64 = words.next()?.parse().ok().filter(|year| (1970..=9999).contains(year))?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<u64>().ok().filter(|part| *part <= 60));
    let [hours, minutes, seconds] = [clock.next()??, clock.next()??, clock.next()??];
    // Years from March, so that a leap day is the last: the days before a month follow one formula.
    let (year, month) =
        if month < 2 { (year.checked_sub(1)?, month.checked_add(10)?) } else { (year, month.checked_sub(2)?) };
    let leap_days = (year / 4).checked_sub(year / 100)?.checked_add(year / 400)?;
    let before = month.checked_mul(153)?.checked_add(2)? / 5;
    let days = year.checked_mul(365)?.checked_add(leap_days)?.checked_add(before)?.checked_add(day)?;
    // 719469 is what this gives for 1 January 1970.
    let seconds_of_day = hours.checked_mul(3600)?.checked_add(minutes.checked_mul(60)?)?.checked_add(seconds)?;
    days.checked_sub(719_469)?.checked_mul(86_400)?.checked_add(seconds_of_day)
}

/// FIRST and, unless it is `*`, TOTAL of `bytes FIRST-LAST/TOTAL`.
fn first_and_total(header: &str) -> Option<(u64, Option<u64>)> {
    let (first, rest) = header.trim().strip_prefix("bytes ")?.split_once('-')?;
    let total = rest.split_once('/').and_then(|(_, total)| total.trim().parse().ok());
    Some((first.trim().parse().ok()?, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_the_header_says() {
        let from = Url::parse("https://hub.example:8443/a/b/c?x=1").unwrap();
        for (location, there) in [
            ("/d?y=2", "https://hub.example:8443/d?y=2"),
            ("d", "https://hub.example:8443/a/b/d"),
            ("?y=2", "https://hub.example:8443/a/b/c?y=2"),
            ("//cdn.example/d", "https://cdn.example/d"),
            ("https://cdn.example/d?u=http://x", "https://cdn.example/d?u=http://x"),
            ("../d", "https://hub.example:8443/a/d"),
            ("./d?y=../z", "https://hub.example:8443/a/b/d?y=../z"),
            ("../../../../d", "https://hub.example:8443/d"),
            ("/../a/./b/../d", "https://hub.example:8443/a/d"),
            ("..", "https://hub.example:8443/a/"),
            ("/", "https://hub.example:8443/"),
        ] {
            assert_eq!(from.join(location).unwrap().0.to_string(), there, "{location}");
        }
        for bad in
            ["http://cdn.example/", "file:///etc/passwd", "data:x", "https://hub.example@evil/", "https://", "//"]
        {
            let joined = from.join(bad);
            assert!(joined.is_err(), "{bad}: {joined:?}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |text: &str| Url::parse(text).unwrap().origin();
        assert_eq!(origin("https://Hub.example/a"), origin("https://hub.example:443/b"));
        assert_ne!(origin("https://hub.example"), origin("http://hub.example"));
        assert_ne!(origin("https://hub.example"), origin("https://hub.example:444"));
        assert_ne!(origin("https://hub.example"), origin("https://hub.example.evil"));
    }

    #[test]
    fn content_ranges() {
        assert_eq!(first_and_total("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(first_and_total("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes", "bytes */10", "bytes 5/10", "bytes x-9/10", "bytes 99999999999999999999-/1"] {
            assert_eq!(first_and_total(bad), None, "{bad}");
        }
    }

    #[test]
    fn dates() {
        // By `date -u -d TEXT +%s`.
        for (text, seconds) in [
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(784_111_777)),
            ("Tue, 29 Feb 2000 23:59:60 GMT", Some(951_868_800)),
            ("Wed, 01 Mar 2000 00:00:00 GMT", Some(951_868_800)),
            ("Fri, 31 Dec 2100 12:00:00 GMT", Some(4_133_937_600)),
            ("Sunday, 06-Nov-94 08:49:37 GMT", None),
            ("Sun, 06 Nov 1994", None),
            ("Sun, 99 Nov 1994 08:49:37 GMT", None),
            ("Sun, 06 Nov 99999999999999999999 08:49:37 GMT", None),
            ("", None),
        ] {
            assert_eq!(http_date(text), seconds, "{text}");
        }
        let headers = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            let value = |text| header::HeaderValue::from_static(text);
            pairs.iter().map(|(k, v)| (header::HeaderName::from_static(k), value(v))).collect()
        };
        let [at, later] = ["Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:57 GMT"];
        assert_eq!(retry_after(&headers(&[("retry-after", later), ("date", at)])), Some(Duration::from_secs(20)));
        assert_eq!(retry_after(&headers(&[("retry-after", at), ("date", later)])), Some(Duration::ZERO));
        assert_eq!(retry_after(&headers(&[("retry-after", at)])), Some(Duration::ZERO), "long ago");
        assert_eq!(retry_after(&headers(&[("retry-after", "7")])), Some(Duration::from_secs(7)));
        for bad in ["-1", "1.5", "soon", "18446744073709551616"] {
            assert_eq!(retry_after(&headers(&[("retry-after", bad)])), None, "{bad}");
        }
    }
}
