//! A connection to the broker, on which every wait has a deadline.
//!
//! amiquip's own `Connection::open` is not used: it does not set `TCP_NODELAY` (44 ms a call), waits for ever for a
//! silent peer, and prints passwords in its errors.

mod channel;
mod deadline;
mod endpoint;
mod error;
mod frames;
mod retry;
pub mod sanitize;
mod socket;
mod stream;
mod tls;
mod writer;

pub use channel::{ChannelClosed, OpenChannel, Publisher};
pub use deadline::{run_in_background, Deadline, Watchdog};
pub(crate) use endpoint::Secret;
pub use endpoint::{start_at, start_at_random, Endpoint, DEFAULT_HEARTBEAT};
pub use error::{Error, ErrorKind, Reason, ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED};
pub use retry::Backoff;
pub use tls::TlsFiles;

use crate::text::{describe_io_error, escape};
use amiquip::{
    AmqpValue, Auth, ConnectionBlockedNotification, ConnectionOptions, ConnectionTuning, ConsumerMessage, Delivery,
};
use amq_protocol::protocol::connection::Close;
use channel::ConnectionState;
use crossbeam_channel::{Receiver, RecvError};
use frames::{FrameError, FrameInspector, FRAME_MAX};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, process, thread};
use stream::{Login, Stream};
use writer::FrameWriter;

/// How long closing waits for the broker before it shuts the socket down: at most, and at least.
const MAX_CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
const MIN_CLOSE_TIMEOUT: Duration = Duration::from_millis(10);

/// How long amiquip's I/O thread is waited for before we publish.
const MAX_HANDOVER: Duration = Duration::from_secs(1);

/// How long each of several brokers, or of several addresses of one, but the last is tried.
const MAX_ATTEMPT: Duration = Duration::from_secs(5);

/// A **connection** is an open AMQP connection whose calls have deadlines. It is closed when it is dropped.
pub struct Connection {
    /// `None` once it is closed.
    amqp: Option<amiquip::Connection>,
    /// The watchdog of the socket, for blocking calls on a channel from another thread.
    pub watchdog: Watchdog,
    /// Where it is connected.
    pub endpoint: Endpoint,
    writer: Arc<FrameWriter>,
    state: Arc<ConnectionState>,
}

/// The number of messages and consumers of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueStats {
    /// Messages that are ready for delivery.
    pub messages: u32,
    /// Consumers: the workers of all servers.
    pub consumers: u32,
}

impl Connection {
    /// Connects to an endpoint. `program` is the name that RabbitMQ shows in its list of connections.
    ///
    /// # Errors
    /// Those of connecting and logging in, and [`ErrorKind::TimedOut`].
    pub fn open(endpoint: &Endpoint, program: &str, deadline: &Deadline) -> Result<Self, Error> {
        let opened = Self::open_any_address(endpoint, program, deadline);
        opened.map_err(|kind| Error::new(&endpoint.broker, kind))
    }

    /// Connects to the first address of the endpoint's host that accepts us. The addresses divide the remaining time. One
    /// that refuses us speaks for all.
    fn open_any_address(endpoint: &Endpoint, program: &str, deadline: &Deadline) -> Result<Self, ErrorKind> {
        let options = endpoint.options()?;
        let addresses = socket::resolve(endpoint, deadline)?;
        let (last, others) = addresses.split_last().expect("there is an address");
        for (index, address) in others.iter().enumerate() {
            let share = deadline.split(addresses.len() - index, MAX_ATTEMPT);
            match Self::open_address(endpoint, *address, options.clone(), program, &share) {
                Err(kind) if !kind.is_permanent() => log::debug!("{address} {kind}; trying the next address"),
                result => return result,
            }
        }
        Self::open_address(endpoint, *last, options, program, deadline)
    }

    fn open_address(
        endpoint: &Endpoint,
        address: SocketAddr,
        options: ConnectionOptions<Auth>,
        program: &str,
        deadline: &Deadline,
    ) -> Result<Self, ErrorKind> {
        let (transport, watchdog) = socket::connect(endpoint, address, deadline)?;
        let state = Arc::new(ConnectionState::default());
        let user_timeout = Duration::from_secs(2 * u64::from(endpoint.heartbeat));
        let login = Login { connection_name: connection_name(program), user_timeout };
        let (stream, writer) = Stream::new(transport, FrameInspector::new(state.clone()), login)
            .map_err(|error| ErrorKind::ConnectionLost(describe_io_error(&error)))?;
        let begun = Instant::now();
        let handshake = watchdog.run_until(deadline, || {
            amiquip::Connection::insecure_open_stream(
                stream,
                options.frame_max(FRAME_MAX),
                // A publish must not wait for a broker that does not read. What is unsent is bounded by the calls in
                // flight, or by the prefetch.
                ConnectionTuning::default().buffered_writes_high_water(usize::MAX),
            )
        });
        let Some(amqp) = handshake else {
            let is_login = state.saw_frame.load(Ordering::Relaxed); // RabbitMQ sends a frame before we log in
            let step = if is_login { "logging in" } else { "waiting for the AMQP handshake" };
            return Err(ErrorKind::TimedOut(deadline.limit(), step));
        };
        let amqp = amqp.map_err(|error| handshake_error(endpoint, error, state.close.get()))?;
        let connection = Connection { amqp: Some(amqp), watchdog, writer, state, endpoint: endpoint.clone() };
        let (broker, version) = (connection.broker(), connection.broker_version());
        log::debug!("logged in to {broker}, {version}, after {:.1?}", begun.elapsed());
        Ok(connection)
    }

    /// Connects to the first endpoint that accepts us. The endpoints divide the remaining time.
    ///
    /// # Errors
    /// A permanent error if there was one, else that of the last endpoint, with those of the others.
    ///
    /// # Panics
    /// When there is no endpoint.
    pub fn open_any(endpoints: &[Endpoint], program: &str, deadline: &Deadline) -> Result<Self, Error> {
        let (last, others) = endpoints.split_last().expect("there is an endpoint");
        let (mut permanent, mut errors) = (None, Vec::new());
        for (index, endpoint) in others.iter().enumerate() {
            let share = deadline.split(endpoints.len() - index, MAX_ATTEMPT);
            match Connection::open(endpoint, program, &share) {
                Ok(connection) => return Ok(connection),
                Err(error) => {
                    log::debug!("{error}; trying the next broker");
                    errors.push(error.to_string());
                    permanent = Some(error).filter(Error::is_permanent).or(permanent);
                }
            }
        }
        Connection::open(last, program, deadline).map_err(|error| match (permanent, error) {
            (Some(permanent), _) => permanent,
            (None, Error { broker, kind: ErrorKind::NotConnected(reason) }) if !errors.is_empty() => {
                let reason = format!("{reason} (before that: {})", errors.join("; "));
                Error { broker, kind: ErrorKind::NotConnected(reason) }
            }
            (None, error) => error,
        })
    }

    /// Host and port of the broker, for messages.
    pub fn broker(&self) -> &str {
        &self.endpoint.broker
    }

    /// The broker's name for itself, such as `RabbitMQ 4.0.5`, safe to print.
    pub fn broker_version(&self) -> String {
        let property = |name| match self.amqp.as_ref()?.server_properties().get(name) {
            Some(AmqpValue::LongString(text)) => Some(escape(text.as_bytes()).to_string()),
            _ => None,
        };
        [property("product"), property("version")].into_iter().flatten().collect::<Vec<_>>().join(" ")
    }

    /// Runs a blocking call of amiquip on this connection. `step` says what it does, for the error that it timed out.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when the deadline passes; then the connection has ended. Else the call's error.
    pub fn call<T>(
        &mut self,
        deadline: &Deadline,
        step: &'static str,
        call: impl FnOnce(&mut amiquip::Connection) -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        let Some(amqp) = &mut self.amqp else {
            return Err(self.lost("it is closed"));
        };
        match self.watchdog.run_until(deadline, || call(amqp)) {
            Some(result) => result.map_err(|error| self.close_to_learn_cause(error)),
            None => Err(Error::new(self.broker(), ErrorKind::TimedOut(deadline.limit(), step))),
        }
    }

    /// Opens a channel. If more deliveries, returned messages or confirmations than `max_unread` wait on it to be taken, the
    /// broker has sent more than was asked for, and the connection ends.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn open_channel(&mut self, max_unread: usize, deadline: &Deadline) -> Result<(OpenChannel, Publisher), Error> {
        let (amqp, returns, confirms) = self.call(deadline, "opening a channel", |connection| {
            let channel = connection.open_channel(None)?;
            let returns = channel.listen_for_returns()?;
            let confirms = channel.listen_for_publisher_confirms()?;
            Ok((channel, returns, confirms))
        })?;
        let number = amqp.channel_id();
        // The clones serve only to count what is unread.
        let state = self.state.open(number, max_unread, returns.clone(), confirms.clone());
        let publisher = Publisher::new(self.writer.clone(), state.clone(), number);
        Ok((OpenChannel { amqp, returns, confirms, state }, publisher))
    }

    /// Puts the channel into confirm mode: the broker then numbers the messages that are published on it, from 1, and confirms or
    /// refuses each of them.
    ///
    /// amiquip does this, and its I/O thread handles what it is told in order. So when it has written this, it also knows who
    /// listens for returned and confirmed messages; until then it drops them, and a publisher does not go by way of that thread.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn enable_confirms(&mut self, channel: &OpenChannel, deadline: &Deadline) -> Result<(), Error> {
        let writes = |connection: &Self| connection.writer.amiquip_writes.load(Ordering::Acquire);
        let before = writes(self);
        self.call(deadline, "preparing the connection", |_| channel.amqp.enable_publisher_confirms_nowait())?;
        let limit = Instant::now() + deadline.remaining().min(MAX_HANDOVER);
        while writes(self) == before && Instant::now() < limit {
            thread::sleep(Duration::from_micros(10));
        }
        Ok(())
    }

    /// The numbers of a queue, by a passive declaration on a channel of its own: if there is no such queue, the broker
    /// closes that channel.
    ///
    /// # Errors
    /// [`ErrorKind::ChannelClosed`] with code 404 if there is no such queue; else as [`call`](Self::call).
    pub fn queue_stats(&mut self, queue: &str, deadline: &Deadline) -> Result<QueueStats, Error> {
        self.call(deadline, "looking at the queue", |amqp| {
            let channel = amqp.open_channel(None)?;
            let queue = channel.queue_declare_passive(queue)?;
            Ok(QueueStats {
                messages: queue.declared_message_count().unwrap_or_default(), // always there
                consumers: queue.declared_consumer_count().unwrap_or_default(),
            })
        })
    }

    /// Receives whether the broker blocks publishers. The receiver is disconnected when the connection ends, and is
    /// the one place to learn that.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn blocked_notifications(
        &mut self,
        deadline: &Deadline,
    ) -> Result<Receiver<ConnectionBlockedNotification>, Error> {
        self.call(deadline, "preparing the connection", amiquip::Connection::listen_for_connection_blocked)
    }

    /// What an error of amiquip on this connection or its channels means. If it says only that the connection has ended,
    /// this closes the connection for the cause.
    pub fn close_to_learn_cause(&mut self, error: amiquip::Error) -> Error {
        use amiquip::Error::{ClientClosedConnection, EventLoopClientDropped, EventLoopDropped};
        match error {
            EventLoopDropped | EventLoopClientDropped | ClientClosedConnection => self.close_ended(),
            error => Error::new(self.broker(), error.into()),
        }
    }

    /// Closes a connection that has ended. Returns the cause: amiquip tells it in answer to closing.
    pub fn close_ended(&mut self) -> Error {
        if self.watchdog.has_shut_down() {
            return Error::new(self.broker(), ErrorKind::Silent);
        }
        self.close().err().unwrap_or_else(|| self.lost("it has ended"))
    }

    /// The error of a connection that cannot be used any more, for a reason that amiquip does not know.
    pub fn lost(&self, reason: &str) -> Error {
        Error::new(self.broker(), ErrorKind::ConnectionLost(reason.into()))
    }

    /// Closes the connection in one round trip. Shuts it down if that takes longer than a second.
    ///
    /// # Errors
    /// What the broker answered in place of close-ok.
    pub fn close(&mut self) -> Result<(), Error> {
        self.close_by(&Deadline::after(MAX_CLOSE_TIMEOUT))
    }

    /// Closes the connection as [`close`](Self::close) does, but waits for the broker until the deadline: 10 ms at
    /// least, and a second at most. What was sent before is delivered all the same.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    pub fn close_by(&mut self, deadline: &Deadline) -> Result<(), Error> {
        let Some(amqp) = self.amqp.take() else { return Ok(()) };
        let timeout = close_timeout(deadline);
        let closed = self.watchdog.run_until(&Deadline::after(timeout), || amqp.close());
        // Other handles of the socket must not keep the connection open.
        self.watchdog.shut_down();
        closed.unwrap_or(Ok(())).map_err(|error| Error::new(self.broker(), error.into()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

/// How long closing a connection waits for the broker: until this deadline, but 10 ms at least and 1 s at most.
pub fn close_timeout(deadline: &Deadline) -> Duration {
    deadline.remaining().clamp(MIN_CLOSE_TIMEOUT, MAX_CLOSE_TIMEOUT)
}

/// What RabbitMQ shows in its list of connections: program, version, host and process id.
fn connection_name(program: &str) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "-".into());
    format!("{program} {} {} {}", env!("CARGO_PKG_VERSION"), host.trim(), process::id())
}

/// `close` is what the broker said if it closed the connection.
fn handshake_error(endpoint: &Endpoint, error: amiquip::Error, close: Option<&Close>) -> ErrorKind {
    if let amiquip::Error::IoErrorReadingSocket { source } = &error {
        match source.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(FrameError::NotAmqp) => return ErrorKind::NotConnected("is not an AMQP server".into()),
            Some(FrameError::Tls) => return ErrorKind::NotConnected("answered with TLS: use amqps://".into()),
            _ => {}
        }
    }
    let failed = |reason| ErrorKind::NotConnected(format!("failed the AMQP handshake: {reason}"));
    let error = match (error, close) {
        (error @ amiquip::Error::ServerClosedConnection { .. }, _) => error,
        // amiquip expects no close in answer to start-ok.
        (_, Some(close)) if close.reply_code == ACCESS_REFUSED => {
            return ErrorKind::Credentials(endpoint.describe_login());
        }
        (_, Some(Close { reply_code, reply_text, .. })) => {
            amiquip::Error::ServerClosedConnection { code: *reply_code, message: reply_text.clone() }
        }
        // Whatever ends a connection then is this error.
        (amiquip::Error::InvalidCredentials, None) => {
            return ErrorKind::NotConnected("closed the connection during the login: see the broker's log".into());
        }
        (error, None) => error,
    };
    match ErrorKind::from(error) {
        ErrorKind::ConnectionLost(reason) => failed(reason),
        ErrorKind::ConnectionClosed(reason) => failed(reason.text),
        kind => kind,
    }
}

/// The delivery in what a consumer has received; `None` if the broker has cancelled the consumer.
///
/// # Errors
/// How the channel or the connection ended.
pub fn delivery(received: Result<ConsumerMessage, RecvError>) -> amiquip::Result<Option<Delivery>> {
    match received {
        Ok(ConsumerMessage::Delivery(delivery)) => Ok(Some(delivery)),
        Ok(ConsumerMessage::ServerCancelled) => Ok(None),
        Ok(ConsumerMessage::ServerClosedChannel(error) | ConsumerMessage::ServerClosedConnection(error)) => Err(error),
        Ok(_) => Err(amiquip::Error::ClientClosedConnection), // by us: nothing is taken after that
        Err(RecvError) => Err(amiquip::Error::EventLoopDropped),
    }
}
