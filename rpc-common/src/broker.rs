//! The way to the broker: a [`Link`] to it that no deadline has to wait for.
//!
//! amiquip's own `Connection::open` is not used: it sets no `TCP_NODELAY` (44 ms a call), hangs at a
//! silent peer, and prints passwords in its errors.

use crate::deadline::{in_background, Deadline, Expired, Phase, Watchdog};
use crate::exit::{in_words, Exit, ExitCode};
use crate::message::escape;
use crate::outbox::{Outbox, Publisher};
use crate::stream::{Stream, Transport, FRAME_MAX};
use crate::target::{Brokers, Target};
use crate::tls::TlsStream;
use amiquip::{
    Channel, Connection, ConnectionBlockedNotification, ConnectionTuning, ConsumerMessage, Delivery,
};
use backon::{BackoffBuilder, ExponentialBuilder};
use crossbeam_channel::{Receiver, RecvError, RecvTimeoutError};
use socket2::{SockRef, TcpKeepalive};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io, process};

/// How long closing may take before the socket is shut down instead; and at least, when time is up already.
const CLOSING: Duration = Duration::from_secs(1);
const HURRIED: Duration = Duration::from_millis(10);

/// How long a quiet TCP connection lives before the kernel asks whether the peer does.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How long a broker is tried while there are others.
const PATIENCE: Duration = Duration::from_secs(5);

/// After a pause and this, what was begun anew is taken to work.
const STABLE: Duration = Duration::from_secs(1);

/// The pauses before something that ended is begun anew: exponential, with jitter, for ever. They are short again when it
/// has worked for a while, so that what ends as soon as it begins is not begun in a loop without pauses.
pub struct Backoff {
    pauses: BackonPauses,
    /// When the latest pause ends.
    paused_until: Instant,
}

type BackonPauses = <ExponentialBuilder as BackoffBuilder>::Backoff;

impl Backoff {
    /// The first pause is a short one.
    #[must_use]
    #[allow(clippy::new_without_default)] // there is nothing to be default about
    pub fn new() -> Self {
        Backoff { pauses: pauses(), paused_until: Instant::now() }
    }

    /// How long to wait now: 100 ms to 2.5 s, and up to as much again.
    pub fn next_pause(&mut self) -> Duration {
        self.next_pause_at(Instant::now())
    }

    fn next_pause_at(&mut self, now: Instant) -> Duration {
        if now.saturating_duration_since(self.paused_until) >= STABLE {
            self.pauses = pauses();
        }
        let pause = self.pauses.next().unwrap_or(LONGEST_PAUSE); // there is always a next one
        self.paused_until = now + pause;
        pause
    }
}

const LONGEST_PAUSE: Duration = Duration::from_millis(2_500);

fn pauses() -> BackonPauses {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

/// A **link** is an open AMQP connection, and a handle on its socket that ends every wait on it.
pub struct Link {
    /// None once it is closed.
    connection: Option<Connection>,
    watchdog: Arc<Watchdog>,
    outbox: Arc<Outbox>,
    target: Target,
    /// When to have closed the connection, if somebody waits for that.
    close_by: Option<Instant>,
}

/// Opens a connection as `program` says it is: resolve, connect, TLS if the URL asks for it, handshake,
/// each in what is left of the deadline.
///
/// # Errors
/// Any [`Error`] but [`Error::Url`].
pub fn open(target: &Target, program: &str, deadline: &Deadline) -> Result<Link, Error> {
    let addresses = resolve(target, deadline)?;
    let stream = connect(target, &addresses, deadline)?;
    let watchdog = prepare(&stream).map_err(|error| unreachable(target, &error))?;
    let transport = secure(target, stream, &watchdog, deadline)?;
    let stream = Stream::new(transport).map_err(|error| unreachable(target, &error))?;
    let (greeted, outbox) = (stream.greeted(), stream.outbox());
    let opening = watchdog.guard(deadline, || {
        Connection::insecure_open_stream(
            stream,
            target.options().frame_max(FRAME_MAX).information(Some(information(program))),
            tuning(),
        )
    });
    match opening {
        Ok(Ok(connection)) => {
            let (connection, watchdog) = (Some(connection), watchdog.into());
            Ok(Link { connection, watchdog, outbox, target: target.clone(), close_by: None })
        }
        Ok(Err(error)) => Err(match Error::of(error, target) {
            Error::Lost { target, reason } | Error::ConnectionClosed { target, reason, .. } => {
                Error::Handshake { target, reason }
            }
            error => error,
        }),
        Err(Expired) => {
            let logs_in = greeted.load(Ordering::Relaxed);
            let phase = if logs_in { Phase::Login } else { Phase::Handshake };
            Err(Error::timed_out(phase, target, deadline))
        }
    }
}

/// Opens a connection to the first of these brokers that is to be had. Each but the last gets its share of
/// the time that is left, and no more than RabbitMQ needs to refuse a password.
///
/// # Errors
/// That of the last one, unless another one refused us.
pub fn open_any(brokers: &Brokers, program: &str, deadline: &Deadline) -> Result<Link, Error> {
    let (last, others) = brokers.split_last();
    let mut refusal = None;
    for (tried, target) in others.iter().enumerate() {
        match open(target, program, &deadline.share(others.len() - tried + 1, PATIENCE)) {
            Ok(link) => return Ok(link),
            Err(error) => {
                log::debug!("{error}; trying the next broker");
                if !error.is_transient() {
                    refusal = Some(error);
                }
            }
        }
    }
    open(last, program, deadline).map_err(|error| refusal.unwrap_or(error))
}

/// amiquip's, but a publish never waits for the broker to read: what can be unsent is bounded by the
/// calls in flight, or by the prefetch, and a broker that is blocked or frozen must not hold us up.
fn tuning() -> ConnectionTuning {
    ConnectionTuning::default().buffered_writes_high_water(usize::MAX)
}

/// Looks the host up in a thread of its own, because nothing can end `getaddrinfo`: at worst the
/// thread stays behind.
fn resolve(target: &Target, deadline: &Deadline) -> Result<Vec<SocketAddr>, Error> {
    if let Ok(address) = target.host.parse::<IpAddr>() {
        return Ok(vec![(address, target.port).into()]);
    }
    let name = (target.host.clone(), target.port);
    let addresses = in_background(move || name.to_socket_addrs().map(Vec::from_iter));
    let unknown = |reason| Error::Resolve { host: target.host.clone(), reason };
    match addresses.recv_deadline(deadline.instant()) {
        Ok(Ok(addresses)) if addresses.is_empty() => Err(unknown("no address".into())),
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(error)) => Err(unknown(in_words(&error))),
        Err(RecvTimeoutError::Timeout) => Err(Error::timed_out(Phase::Resolve, target, deadline)),
        Err(RecvTimeoutError::Disconnected) => Err(unknown("the look-up failed".into())),
    }
}

/// Connects to the first address that accepts; each gets its share of the time that is left.
fn connect(
    target: &Target,
    addresses: &[SocketAddr],
    deadline: &Deadline,
) -> Result<TcpStream, Error> {
    let mut failure = Error::timed_out(Phase::Connect, target, deadline);
    for (tried, address) in addresses.iter().enumerate() {
        let share = deadline.share(addresses.len() - tried, Duration::MAX).remaining();
        if share.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(address, share) {
            Ok(stream) => return Ok(stream),
            Err(_) if deadline.remaining().is_zero() => break,
            Err(error) => failure = unreachable(target, &error),
        }
    }
    Err(failure)
}

/// Sets the socket's options, and a watchdog over it.
fn prepare(stream: &TcpStream) -> io::Result<Watchdog> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
    Watchdog::new(stream.try_clone()?)
}

/// The TLS handshake, where the URL asks for it.
fn secure(
    target: &Target,
    stream: TcpStream,
    watchdog: &Watchdog,
    deadline: &Deadline,
) -> Result<Transport, Error> {
    let Some(files) = &target.tls else { return Ok(Transport::Plain(stream)) };
    let config = files.config()?;
    match watchdog.guard(deadline, || TlsStream::handshake(config, &target.host, stream)) {
        Ok(Ok(stream)) => Ok(Transport::Tls(Box::new(stream))),
        Ok(Err(error)) => Err(Error::Tls { target: target.to_string(), reason: in_words(&error) }),
        Err(Expired) => Err(Error::timed_out(Phase::Tls, target, deadline)),
    }
}

fn unreachable(target: &Target, error: &io::Error) -> Error {
    Error::Unreachable { target: target.to_string(), reason: in_words(error) }
}

/// Who we are in the broker's list of connections: amiquip lets us set no other client property.
fn information(program: &str) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "-".into());
    format!("{program} {} {} {}", env!("CARGO_PKG_VERSION"), host.trim(), process::id())
}

impl Link {
    /// The broker at the other end.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The watchdog over the socket, for whoever blocks on it elsewhere.
    #[must_use]
    pub fn watchdog(&self) -> Arc<Watchdog> {
        self.watchdog.clone()
    }

    /// Runs a blocking call of amiquip on this connection in what is left of the deadline.
    ///
    /// # Errors
    /// [`Error::TimedOut`] with the phase, after which the link is cut; else what the call says.
    pub fn within<T>(
        &mut self,
        deadline: &Deadline,
        phase: Phase,
        call: impl FnOnce(&mut Connection) -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        self.guarded(deadline, phase, |watchdog, connection| {
            watchdog.guard(deadline, || call(connection))
        })
    }

    /// The same, and passes on what comes meanwhile and may explain why the call takes so long.
    ///
    /// # Errors
    /// As [`Link::within`].
    pub fn within_listening<T, Notice: Send>(
        &mut self,
        deadline: &Deadline,
        phase: Phase,
        notices: &Receiver<Notice>,
        on_notice: impl FnMut(Notice) + Send,
        call: impl FnOnce(&mut Connection) -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        self.guarded(deadline, phase, |watchdog, connection| {
            watchdog.guard_listening(deadline, notices, on_notice, || call(connection))
        })
    }

    fn guarded<T>(
        &mut self,
        deadline: &Deadline,
        phase: Phase,
        call: impl FnOnce(&Watchdog, &mut Connection) -> Result<amiquip::Result<T>, Expired>,
    ) -> Result<T, Error> {
        let Some(connection) = &mut self.connection else {
            return Err(self.lost("it is closed"));
        };
        match call(&self.watchdog, connection) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.explain(error)),
            Err(Expired) => Err(Error::timed_out(phase, &self.target, deadline)),
        }
    }

    /// Opens a channel.
    ///
    /// # Errors
    /// As [`Link::within`].
    pub fn open_channel(&mut self, deadline: &Deadline) -> Result<Channel, Error> {
        self.within(deadline, Phase::Channel, |connection| connection.open_channel(None))
    }

    /// A short way to publish on a channel; see [`Publisher`] for when.
    #[must_use]
    pub fn publisher(&self, channel: &Channel) -> Publisher {
        Publisher::new(self.outbox.clone(), channel.channel_id())
    }

    /// Looks at a queue, by a passive declaration on a channel of its own: where there is none, the
    /// broker closes that channel.
    ///
    /// # Errors
    /// [`Error::ChannelClosed`] with [`NOT_FOUND`] where there is no such queue; else as
    /// [`Link::within`].
    pub fn look(&mut self, queue: &str, deadline: &Deadline) -> Result<Counts, Error> {
        self.within(deadline, Phase::Look, |connection| {
            let channel = connection.open_channel(None)?;
            let queue = channel.queue_declare_passive(queue)?; // whose answer always has both counts
            Ok(Counts {
                messages: queue.declared_message_count().unwrap_or_default(),
                consumers: queue.declared_consumer_count().unwrap_or_default(),
            })
        })
    }

    /// What the broker says of the connection as a whole. The receiver is disconnected when the
    /// connection ends, which makes it the one place to learn of that.
    ///
    /// # Errors
    /// As [`Link::within`].
    pub fn notices(
        &mut self,
        deadline: &Deadline,
    ) -> Result<Receiver<ConnectionBlockedNotification>, Error> {
        self.within(deadline, Phase::Channel, Connection::listen_for_connection_blocked)
    }

    /// The true cause of an error of amiquip's on this connection or one of its channels. Where the
    /// connection has ended only closing it tells.
    pub fn explain(&mut self, error: amiquip::Error) -> Error {
        let ended = matches!(
            error,
            amiquip::Error::EventLoopDropped
                | amiquip::Error::EventLoopClientDropped
                | amiquip::Error::ClientClosedConnection
        );
        match if ended { self.close() } else { Ok(()) } {
            Err(cause) => cause,
            Ok(()) => Error::of(error, &self.target),
        }
    }

    /// The error of a link that is of no use any more, for a reason that amiquip does not know.
    #[must_use]
    pub fn lost(&self, reason: &str) -> Error {
        Error::Lost { target: self.target.to_string(), reason: reason.into() }
    }

    /// Has [`Link::close`] cut the connection if its round trip takes longer than until this deadline, but no less than
    /// 10 ms: for whoever runs out of time. What was sent before is delivered all the same.
    pub fn close_by(&mut self, deadline: &Deadline) {
        self.close_by = Some(deadline.instant());
    }

    /// Closes the connection, in one round trip, or cuts it if that takes more than a second, or longer than
    /// [`Link::close_by`].
    ///
    /// # Errors
    /// What the broker said in the place of a farewell.
    pub fn close(&mut self) -> Result<(), Error> {
        let Some(connection) = self.connection.take() else {
            return Ok(());
        };
        let left = self.close_by.map(|at| at.saturating_duration_since(Instant::now()));
        let deadline = Deadline::after(left.map_or(CLOSING, |left| left.clamp(HURRIED, CLOSING)));
        let closed = self.watchdog.guard(&deadline, || connection.close());
        // However it ended: whoever still holds the socket must not keep the connection from ending.
        self.watchdog.shut_down();
        match closed {
            Ok(Err(error)) => Err(Error::of(error, &self.target)),
            Ok(Ok(())) | Err(Expired) => Ok(()),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

/// What a consumer got: a delivery, or none when the broker has cancelled the consumer, which it does
/// when the queue is deleted.
///
/// # Errors
/// How the channel or the connection ended.
pub fn delivery(got: Result<ConsumerMessage, RecvError>) -> amiquip::Result<Option<Delivery>> {
    match got {
        Ok(ConsumerMessage::Delivery(delivery)) => Ok(Some(delivery)),
        Ok(ConsumerMessage::ServerCancelled) => Ok(None),
        Ok(
            ConsumerMessage::ServerClosedChannel(error)
            | ConsumerMessage::ServerClosedConnection(error),
        ) => Err(error),
        Ok(ConsumerMessage::ClientCancelled | ConsumerMessage::ClientClosedChannel) => {
            Err(amiquip::Error::ClientClosedChannel)
        }
        Ok(ConsumerMessage::ClientClosedConnection) => Err(amiquip::Error::ClientClosedConnection),
        Err(RecvError) => Err(amiquip::Error::EventLoopDropped),
    }
}

/// A queue as it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Messages that wait to be delivered.
    pub messages: u32,
    /// Consumers, which are the workers of servers.
    pub consumers: u32,
}

/// Reply code of AMQP 0-9-1: an operator closes the connection, or the broker stops.
const CONNECTION_FORCED: u16 = 320;

/// Reply code of AMQP 0-9-1: there is no such queue.
pub const NOT_FOUND: u16 = 404;

/// What can go wrong between a program and the broker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The URL is wrong: nothing was tried.
    #[error("bad {origin}: {reason}")]
    Url {
        /// Where it stands, for messages: an option or a variable.
        origin: &'static str,
        /// What is wrong, without any part that can hold a password.
        reason: String,
    },
    /// A file that an option names is of no use: nothing was tried.
    #[error("{option} {file}: {reason}")]
    File {
        /// The option.
        option: &'static str,
        /// The file, fit to be printed.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The host has no address.
    #[error("cannot resolve '{host}': {reason}: is the host name right?")]
    Resolve {
        /// The host of the URL.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// No address accepted a connection.
    #[error("cannot reach {target}: {reason}: is RabbitMQ running there, or AMQP_URL to be set?")]
    Unreachable {
        /// Host and port.
        target: String,
        /// What the system said.
        reason: String,
    },
    /// The TLS handshake failed.
    #[error("no TLS with {target}: {reason}")]
    Tls {
        /// Host and port.
        target: String,
        /// What is wrong, and what can be done about it.
        reason: String,
    },
    /// There is no certificate that a broker's could be signed with.
    #[error("this system has no CA certificates: name one by --ca-file")]
    NoTrust,
    /// The AMQP handshake failed.
    #[error("no AMQP with {target}: {reason}")]
    Handshake {
        /// Host and port.
        target: String,
        /// What is wrong, and what can be done about it.
        reason: String,
    },
    /// The broker dropped the connection when it had seen who we are.
    #[error("{target} refused {who} right?")]
    Credentials {
        /// Host and port.
        target: String,
        /// Who we said we are, and what proves it.
        who: String,
    },
    /// The broker refused what we asked for: a vhost, a queue, a permission.
    #[error("{target} refused: {reason}{}", next_move(*.code))]
    Refused {
        /// Host and port.
        target: String,
        /// The AMQP reply code, such as 403.
        code: u16,
        /// What the broker said.
        reason: String,
    },
    /// The broker closed a channel for what was done on it.
    #[error("{target} closed the channel: {reason}")]
    ChannelClosed {
        /// Host and port.
        target: String,
        /// The AMQP reply code, such as 404 or 406.
        code: u16,
        /// What the broker said.
        reason: String,
    },
    /// The broker closed the connection, and said why.
    #[error("lost the connection to {target}: {reason}")]
    ConnectionClosed {
        /// Host and port.
        target: String,
        /// The AMQP reply code, such as 320 or 541.
        code: u16,
        /// What the broker said.
        reason: String,
    },
    /// The connection broke.
    #[error("lost the connection to {target}: {reason}")]
    Lost {
        /// Host and port.
        target: String,
        /// How it broke.
        reason: String,
    },
    /// The broker has no more channels for us on this connection.
    #[error("{target} allows no more channels: fewer --workers, or a larger channel_max there")]
    TooManyChannels {
        /// Host and port.
        target: String,
    },
    /// The deadline passed in a phase that blocks.
    #[error("{target} was not ready within {limit}: timed out in {phase}{}", hint(*.phase))]
    TimedOut {
        /// The phase that ran out of time.
        phase: Phase,
        /// Host and port.
        target: String,
        /// The limit.
        limit: String,
    },
}

/// Reply codes of AMQP 0-9-1 after which asking again cannot help: access-refused,
/// resource-locked, not-allowed.
const REFUSALS: [u16; 3] = [403, 405, 530];

/// RabbitMQ takes its time to refuse a password.
fn hint(phase: Phase) -> &'static str {
    if phase == Phase::Login {
        ": is the password right?"
    } else {
        ""
    }
}

/// What a user can do about a refusal.
fn next_move(code: u16) -> &'static str {
    match code {
        403 => ": may this user do that?",
        530 => ": is the vhost in the URL right, and open to this user?",
        _ => "",
    }
}

impl Error {
    /// What an error of amiquip's means, when it was met at `target`.
    #[must_use]
    pub fn of(error: amiquip::Error, target: &Target) -> Self {
        let (target, who) = (target.to_string(), target.who());
        let refused = |code| REFUSALS.contains(&code);
        match error {
            amiquip::Error::InvalidCredentials => Error::Credentials { target, who },
            amiquip::Error::ExhaustedChannelIds => Error::TooManyChannels { target },
            amiquip::Error::ServerClosedConnection { code, message }
            | amiquip::Error::ServerClosedChannel { code, message, .. }
                if refused(code) =>
            {
                Error::Refused { target, code, reason: escape(message.as_bytes()).to_string() }
            }
            amiquip::Error::ServerClosedChannel { code, message, .. } => Error::ChannelClosed {
                target,
                code,
                reason: escape(message.as_bytes()).to_string(),
            },
            amiquip::Error::ServerClosedConnection { code, message } => Error::ConnectionClosed {
                target,
                code,
                reason: escape(message.as_bytes()).to_string(),
            },
            amiquip::Error::UnexpectedSocketClose => {
                Error::Lost { target, reason: "the broker closed it".into() }
            }
            amiquip::Error::IoErrorReadingSocket { source }
            | amiquip::Error::IoErrorWritingSocket { source } => {
                Error::Lost { target, reason: escape(in_words(&source).as_bytes()).to_string() }
            }
            // Of amiquip's other errors none that we can meet holds a URL, but some hold a peer's words.
            other => {
                Error::Lost { target, reason: escape(other.to_string().as_bytes()).to_string() }
            }
        }
    }

    /// Whether the broker closed the channel or the connection for a message that was sent there: not for a permission
    /// that the user lacks, and not because an operator or its own end wanted it closed.
    #[must_use]
    pub fn is_about_message(&self) -> bool {
        match self {
            Error::ChannelClosed { .. } => true,
            Error::ConnectionClosed { code, .. } => *code != CONNECTION_FORCED,
            _ => false,
        }
    }

    fn timed_out(phase: Phase, target: &Target, deadline: &Deadline) -> Self {
        Error::TimedOut { phase, target: target.to_string(), limit: deadline.to_string() }
    }

    /// The same, saying where a bad URL stands.
    #[must_use]
    pub(crate) fn in_url(self, origin: &'static str) -> Self {
        match self {
            Error::Url { reason, .. } => Error::Url { origin, reason },
            error => error,
        }
    }

    /// Whether trying again may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        !matches!(self, Error::Url { .. } | Error::Credentials { .. } | Error::Refused { .. })
    }
}

impl Exit for Error {
    fn exit_code(&self) -> ExitCode {
        match self {
            Error::Url { .. } | Error::File { .. } => ExitCode::Usage,
            _ => ExitCode::Unreachable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_nothing_works_and_are_short_again_when_it_did() {
        let (mut backoff, begin) = (Backoff::new(), Instant::now());
        let mut now = begin;
        let pauses = [(); 8].map(|()| {
            let pause = backoff.next_pause_at(now);
            now += pause; // and it ends at once
            pause
        });
        assert!(pauses[0] >= Duration::from_millis(100) && pauses[0] <= Duration::from_millis(200));
        assert!(pauses[7] >= LONGEST_PAUSE && pauses[7] <= 2 * LONGEST_PAUSE, "{pauses:?}");
        assert!(backoff.next_pause_at(now + STABLE) <= Duration::from_millis(200));
    }
}
