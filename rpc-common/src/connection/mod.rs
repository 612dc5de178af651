//! A connection to the broker, on which every wait has a deadline.
//!
//! Read in this order: [`Endpoint`] is where the broker is; `socket` the way there; `link` owns the
//! socket, and `inbox` has what arrives; `channel` publishes. amiquip does what is synchronous and
//! rare, behind a socketpair.

mod amiquip_stream;
mod backoff;
mod channel;
mod deadline;
mod demux;
mod endpoint;
mod error;
mod frames;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz_check;
mod inbox;
mod link;
mod methods;
mod option_file;
mod phase;
mod queue_stats;
mod reply_codes;
mod sentences;
mod socket;
mod tls;
mod wake;
mod writer;

pub use backoff::{pauses, Backoff};
pub use channel::{ChannelInbox, Driving, HeaderTooLarge, OpenChannel, Publisher};
pub use deadline::{run_in_background, Deadline};
pub use demux::Notification;
use endpoint::Login;
pub(crate) use endpoint::Secret;
pub use endpoint::{start_at, start_at_random, Endpoint, DEFAULT_HEARTBEAT};
pub use error::{Error, ErrorKind, Reason};
pub use inbox::{Arrived, Confirmation, Delivery, Message, Returned};
pub use link::Link;
pub(crate) use option_file::OptionFile;
pub use phase::Phase;
pub use queue_stats::QueueStats;
pub use reply_codes::{ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED};
pub use sentences::{Difference, Meaning};
pub use tls::TlsFiles;
pub use wake::Waker;

use crate::text::escape;
use amiquip::{AmqpValue, ConnectionTuning};
use demux::End;
use frames::{FrameError, FRAME_MAX};
use rustix::io::Errno;
use std::net::SocketAddr;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io, process};

/// Maximum time that closing waits for the broker before the socket is shut down.
const MAX_CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Minimum time that closing waits for the broker before the socket is shut down.
const MIN_CLOSE_TIMEOUT: Duration = Duration::from_millis(10);

/// Timeout of each of several brokers, or of several addresses of one, but the last.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// A **connection** is an open AMQP connection whose calls have deadlines. It is closed when it is
/// dropped.
pub struct Connection {
    /// `None` once the connection is closed.
    amqp: Option<amiquip::Connection>,
    /// The endpoint of the broker.
    pub endpoint: Endpoint,
    link: Arc<Link>,
}

/// Who drives the [`Link`] of a connection.
pub enum Owner<'a> {
    /// A standby thread, and in its place a worker that waits, see [`Driving`].
    Standby,
    /// The event loop that receives the link when the socket is connected; there may be several
    /// attempts. The waker ends its wait.
    EventLoop(Waker, &'a dyn Fn(&Arc<Link>)),
}

impl Connection {
    /// Connects to an endpoint. `program` is the name that RabbitMQ shows in its list of
    /// connections.
    ///
    /// # Errors
    /// Those of connecting and logging in, and [`ErrorKind::TimedOut`].
    pub fn open(
        endpoint: &Endpoint,
        program: &str,
        deadline: &Deadline,
        owner: &Owner,
    ) -> Result<Self, Error> {
        let opened = Self::open_any_address(endpoint, program, deadline, owner);
        opened.map_err(|kind| Error::new(&endpoint.address, kind))
    }

    /// Connects to the first address of the endpoint's host that accepts us. The addresses divide
    /// the remaining time. One that refuses us speaks for all.
    fn open_any_address(
        endpoint: &Endpoint,
        program: &str,
        deadline: &Deadline,
        owner: &Owner,
    ) -> Result<Self, ErrorKind> {
        // Before a socket is connected: the broker does not wait long for the handshake.
        let login = endpoint.read_login(deadline)?;
        let addresses = socket::resolve(endpoint, deadline)?;
        let (last, others) = addresses.split_last().expect("there is an address");
        for (index, address) in others.iter().enumerate() {
            let share = deadline.split(addresses.len() - index, ATTEMPT_TIMEOUT);
            match Self::open_address(endpoint, *address, &login, program, &share, owner) {
                Err(kind) if !kind.is_permanent() => {
                    log::debug!("{address} {kind}; trying the next address");
                }
                result => return result,
            }
        }
        Self::open_address(endpoint, *last, &login, program, deadline, owner)
    }

    fn open_address(
        endpoint: &Endpoint,
        address: SocketAddr,
        login: &Login,
        program: &str,
        deadline: &Deadline,
        owner: &Owner,
    ) -> Result<Self, ErrorKind> {
        let transport = socket::connect(endpoint, address, login.tls.as_ref(), deadline)?;
        let no_resources = |error: io::Error| ErrorKind::of_system(&error, ErrorKind::NotConnected);
        let waker = match owner {
            Owner::Standby => Waker::new().map_err(no_resources)?,
            Owner::EventLoop(waker, _) => waker.clone(),
        };
        let name = connection_name(program);
        let (link, stream) =
            Link::new(transport, name, endpoint.heartbeat, waker).map_err(no_resources)?;
        match owner {
            Owner::Standby => link.start_standby()?,
            Owner::EventLoop(_, take_link) => take_link(&link),
        }
        let begun = Instant::now();
        let handshake = link.run_blocking_until(deadline, || {
            let options = login.options.clone().frame_max(FRAME_MAX);
            let tuning = ConnectionTuning::default();
            // The timer of mio-extras, below amiquip, panics if the system refuses a thread.
            panic::catch_unwind(AssertUnwindSafe(|| {
                amiquip::Connection::insecure_open_stream(stream, options, tuning)
            }))
        });
        let Some(amqp) = handshake else {
            // RabbitMQ sends a frame before we log in.
            let is_login = link.saw_frame.load(Ordering::Relaxed);
            let phase = if is_login {
                Phase::LoggingIn
            } else {
                Phase::AmqpHandshake
            };
            return Err(deadline.timed_out(phase));
        };
        let amqp = match amqp {
            Ok(amqp) => amqp.map_err(|error| handshake_error(endpoint, error, &link)),
            Err(_) => Err(ErrorKind::no_thread(&Errno::AGAIN.into())),
        };
        let amqp = amqp.inspect_err(|_| link.shut_down())?;
        let connection = Connection {
            amqp: Some(amqp),
            endpoint: endpoint.clone(),
            link,
        };
        let address = connection.address();
        let version = connection.broker_version();
        log::debug!(
            "logged in to {address}, {version}, after {:.1?}",
            begun.elapsed()
        );
        Ok(connection)
    }

    /// Connects to the first endpoint that accepts us. The endpoints divide the remaining time.
    ///
    /// # Errors
    /// A permanent error if there was one, else that of the last endpoint, with those of the
    /// others.
    ///
    /// # Panics
    /// If there is no endpoint.
    pub fn open_any(
        endpoints: &[Endpoint],
        program: &str,
        deadline: &Deadline,
        owner: &Owner,
    ) -> Result<Self, Error> {
        let (last, others) = endpoints.split_last().expect("there is an endpoint");
        let mut permanent = None;
        let mut errors = Vec::new();
        for (index, endpoint) in others.iter().enumerate() {
            let share = deadline.split(endpoints.len() - index, ATTEMPT_TIMEOUT);
            match Connection::open(endpoint, program, &share, owner) {
                Ok(connection) => return Ok(connection),
                Err(error) => {
                    log::debug!("{error}; trying the next broker");
                    errors.push(error.to_string());
                    permanent = Some(error).filter(Error::is_permanent).or(permanent);
                }
            }
        }
        Connection::open(last, program, deadline, owner).map_err(|error| match (permanent, error) {
            (Some(permanent), _) => permanent,
            (
                None,
                Error {
                    address,
                    kind: ErrorKind::NotConnected(reason),
                },
            ) if !errors.is_empty() => {
                let reason = format!("{reason} (before that: {})", errors.join("; "));
                Error {
                    address,
                    kind: ErrorKind::NotConnected(reason),
                }
            }
            (None, error) => error,
        })
    }

    /// Host and port of the broker, for messages.
    pub fn address(&self) -> &str {
        &self.endpoint.address
    }

    /// The broker's name for itself, such as `RabbitMQ 4.0.5`, safe to print.
    pub fn broker_version(&self) -> String {
        let properties = [
            self.server_property("product"),
            self.server_property("version"),
        ];
        let words = properties.into_iter().flatten();
        let words = words.map(|text| escape(text.as_bytes()).to_string());
        words.collect::<Vec<_>>().join(" ")
    }

    /// Whether the broker is RabbitMQ 4 or later: the tutorial of its time declares a quorum queue.
    pub fn is_rabbitmq_4(&self) -> bool {
        let [product, version] = ["product", "version"].map(|name| self.server_property(name));
        is_rabbitmq_4(product, version)
    }

    fn server_property(&self, name: &str) -> Option<&str> {
        match self.amqp.as_ref()?.server_properties().get(name) {
            Some(AmqpValue::LongString(text)) => Some(text),
            _ => None,
        }
    }

    /// The link, to learn how the connection ended, and to end it.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Runs a blocking call of amiquip on this connection. `phase` is for the error that it
    /// timed out.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when the deadline passes; then the connection has ended. Else the
    /// call's error.
    pub fn run_blocking<T>(
        &mut self,
        deadline: &Deadline,
        phase: Phase,
        call: impl FnOnce(&mut amiquip::Connection) -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        let Some(amqp) = &mut self.amqp else {
            return Err(self.cause());
        };
        let result = self.link.run_blocking(deadline, phase, || call(amqp));
        result.map_err(|kind| Error::new(self.address(), kind))
    }

    /// Opens a channel. If more messages or confirmations than `max_unread` wait on it to be taken,
    /// the broker has sent more than was asked for, and the connection ends.
    ///
    /// # Errors
    /// As [`run_blocking`](Self::run_blocking).
    pub fn open_channel(
        &mut self,
        max_unread: usize,
        deadline: &Deadline,
    ) -> Result<(OpenChannel, Publisher), Error> {
        let amqp = self.run_blocking(deadline, Phase::OpeningChannel, |connection| {
            connection.open_channel(None)
        })?;
        Ok(OpenChannel::new(
            self.link.clone(),
            self.address(),
            amqp,
            max_unread,
        ))
    }

    /// The numbers of a queue, by a passive declaration on a channel of its own: if there is no
    /// such queue, the broker closes that channel.
    ///
    /// # Errors
    /// [`ErrorKind::ChannelClosed`] with code 404 if there is no such queue; else as
    /// [`run_blocking`](Self::run_blocking).
    pub fn queue_stats(&mut self, queue: &str, deadline: &Deadline) -> Result<QueueStats, Error> {
        self.run_blocking(deadline, Phase::QueueStats, |amqp| {
            QueueStats::ask(&amqp.open_channel(None)?, queue)
        })
    }

    /// The end of the connection.
    pub fn cause(&self) -> Error {
        let cause = self
            .link
            .cause()
            .unwrap_or_else(|| ErrorKind::ConnectionLost("it is closed".into()));
        Error::new(self.address(), cause)
    }

    /// Closes the connection in one round trip. Shuts it down if that takes longer than a second.
    ///
    /// # Errors
    /// The broker's answer, if it is not close-ok.
    pub fn close(&mut self) -> Result<(), Error> {
        self.close_by(&Deadline::after(MAX_CLOSE_TIMEOUT))
    }

    /// Closes the connection as [`close`](Self::close) does, but waits for the broker until the
    /// deadline: 10 ms at least, and a second at most. What was sent before is delivered all the
    /// same.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    pub fn close_by(&mut self, deadline: &Deadline) -> Result<(), Error> {
        let Some(amqp) = self.amqp.take() else {
            return Ok(());
        };
        let timeout = Deadline::after(close_timeout(deadline));
        let closed = self
            .link
            .run_blocking(&timeout, Phase::ClosingConnection, || amqp.close());
        self.link.shut_down();
        match closed {
            Ok(()) | Err(ErrorKind::TimedOut { .. }) => Ok(()),
            Err(kind) => Err(Error::new(self.address(), kind)),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

/// Maximum time that closing a connection waits for the broker: until this deadline, but 10 ms at
/// least and 1 s at most.
pub fn close_timeout(deadline: &Deadline) -> Duration {
    deadline
        .remaining()
        .clamp(MIN_CLOSE_TIMEOUT, MAX_CLOSE_TIMEOUT)
}

/// The connection's name in RabbitMQ's list: program, version, host and process id.
fn connection_name(program: &str) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "-".into());
    format!(
        "{program} {} {} {}",
        env!("CARGO_PKG_VERSION"),
        host.trim(),
        process::id()
    )
}

fn handshake_error(endpoint: &Endpoint, error: amiquip::Error, link: &Link) -> ErrorKind {
    let kind = match (link.ended(), error) {
        (Some(End::Frame(FrameError::NotAmqp)), _) => {
            return ErrorKind::NotConnected("is not an AMQP server".into());
        }
        (Some(End::Frame(FrameError::Tls)), _) => {
            return ErrorKind::NotConnected("answered with TLS: use amqps://".into());
        }
        (
            Some(End::Closed {
                code: ACCESS_REFUSED,
                ..
            }),
            _,
        ) if !link.is_logged_in() => {
            return ErrorKind::Credentials(endpoint.describe_login());
        }
        (Some(End::Eof | End::Io(_)), amiquip::Error::InvalidCredentials) => {
            return ErrorKind::NotConnected(
                "closed the connection during the login: see the broker's log".into(),
            );
        }
        // The login was sent, and amiquip does not know the answer.
        (None | Some(End::Amiquip | End::Local), amiquip::Error::InvalidCredentials) => {
            ErrorKind::ConnectionLost(
                "the login was answered by a challenge, or by another method that is not supported: enable PLAIN at the broker".into(),
            )
        }
        (None | Some(End::Amiquip | End::Local), error) => error.into(),
        (Some(end), _) => end.into(),
    };
    let failed = |reason| ErrorKind::NotConnected(format!("failed the AMQP handshake: {reason}"));
    match kind {
        ErrorKind::ConnectionLost(reason) => failed(reason),
        ErrorKind::ConnectionClosed(reason) => failed(reason.text),
        kind => kind,
    }
}

/// Whether the product is RabbitMQ, and the major number of its version, such as `4.0.5` or
/// `4.2.0-beta.1`, is 4 or more.
fn is_rabbitmq_4(product: Option<&str>, version: Option<&str>) -> bool {
    let major = version.and_then(|version| version.split('.').next()?.parse::<u32>().ok());
    product == Some("RabbitMQ") && major.is_some_and(|major| major >= 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_and_the_major_number_of_its_version_decide() {
        for (product, version, expected) in [
            (Some("RabbitMQ"), Some("4.0.5"), true),
            (Some("RabbitMQ"), Some("4.2.0-beta.1"), true),
            (Some("RabbitMQ"), Some("10.1"), true),
            (Some("RabbitMQ"), Some("3.13.7"), false),
            (Some("RabbitMQ"), Some(""), false),
            (Some("RabbitMQ"), Some("four"), false),
            (Some("RabbitMQ"), None, false),
            (Some("LavinMQ"), Some("4.0.5"), false),
            (None, Some("4.0.5"), false),
        ] {
            assert_eq!(
                is_rabbitmq_4(product, version),
                expected,
                "{product:?} {version:?}"
            );
        }
    }
}
