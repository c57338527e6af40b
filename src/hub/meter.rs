//! What a server may take: every read from a socket is measured here, below TLS, headers, chunks and compression.
//!
//! A timeout for each read does not end an answer that trickles, nor one of bytes that bring nothing: an endless header,
//! chunk sizes, empty members of gzip. Hence an allowance of time and bytes, which only the bytes of a file renew.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io};

use ureq::unversioned::transport::{
    Buffers, ConnectProxyConnector, ConnectionDetails, Connector, Either, NextTimeout, RustlsConnector, TcpConnector,
    Transport,
};

/// The allowance of the answer at hand.
pub(super) struct Meter(Mutex<Allowance>);

struct Allowance {
    since: Instant,
    time: Duration,
    bytes: u64,
}

impl Meter {
    pub(super) fn new() -> Self {
        Meter(Mutex::new(Allowance { since: Instant::now(), time: Duration::ZERO, bytes: 0 }))
    }

    fn allowance(&self) -> MutexGuard<'_, Allowance> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on so much time and so many bytes.
    pub(super) fn start(&self, time: Duration, bytes: u64) {
        *self.allowance() = Allowance { since: Instant::now(), time, bytes };
    }

    /// From now on so much time, the bytes as they are.
    pub(super) fn renew(&self, time: Duration) {
        let mut allowance = self.allowance();
        (allowance.since, allowance.time) = (Instant::now(), time);
    }

    /// Whether all bytes have come.
    pub(super) fn is_spent(&self) -> bool {
        self.allowance().bytes == 0
    }
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Meter")
    }
}

/// As ureq's own, with measured sockets: through a proxy if there is one, with TLS if the address says so.
pub(super) fn connector(meter: &Arc<Meter>) -> impl Connector {
    let sockets = Sockets { tcp: TcpConnector::default(), meter: meter.clone() };
    ().chain(ConnectProxyConnector::default()).chain(sockets).chain(RustlsConnector::default())
}

#[derive(Debug)]
struct Sockets {
    tcp: TcpConnector,
    meter: Arc<Meter>,
}

impl<In: Transport> Connector<In> for Sockets {
    type Out = Either<In, Measured>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        // Through a proxy: the socket to it has been here already.
        if let Some(tunnel) = chained {
            return Ok(Some(Either::A(tunnel)));
        }
        let socket = Connector::<()>::connect(&self.tcp, details, None)?;
        Ok(socket.map(|socket| Either::B(Measured { socket: Box::new(socket), meter: self.meter.clone() })))
    }
}

#[derive(Debug)]
struct Measured {
    socket: Box<dyn Transport>,
    meter: Arc<Meter>,
}

impl Transport for Measured {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.socket.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.socket.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, mut timeout: NextTimeout) -> Result<bool, ureq::Error> {
        if self.meter.is_spent() {
            let what = "the server sends more than an answer may have";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what).into());
        }
        let left = {
            let allowance = self.meter.allowance();
            allowance.time.saturating_sub(allowance.since.elapsed())
        };
        if left < *timeout.after {
            (timeout.after, timeout.reason) = (left.into(), ureq::Timeout::PerRead);
        }
        let before = self.socket.buffers().input().len();
        let is_open = self.socket.await_input(timeout)?;
        let count = self.socket.buffers().input().len().saturating_sub(before);
        let mut allowance = self.meter.allowance();
        allowance.bytes = allowance.bytes.saturating_sub(count as u64);
        Ok(is_open)
    }

    fn is_open(&mut self) -> bool {
        self.socket.is_open()
    }
}
