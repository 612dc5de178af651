//! The errors of a connection.

use super::phase::Phase;
use super::reply_codes::{
    ACCESS_REFUSED, CONNECTION_FORCED, NOT_ALLOWED, NOT_FOUND, PRECONDITION_FAILED, RESOURCE_LOCKED,
};
use super::sentences::{Difference, Meaning};
use crate::text::{describe_io_error, escape, escape_up_to, format_duration};
use rustix::io::Errno;
use std::fmt::{self, Display};
use std::io;
use std::path::Path;
use std::time::Duration;
use thiserror::Error;

/// An **error** of a connection, and the address of its broker.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct Error {
    /// Host and port. `None` if the configuration is wrong before there is a broker to connect to.
    pub address: Option<String>,
    /// The kind of the error.
    pub kind: ErrorKind,
}

/// The kind of an error. As text it is the second half of a sentence about the broker. What the
/// broker said is escaped.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The command line, the environment, or a file that they name is wrong. The text has no part
    /// of a URL that can hold a password.
    #[error("{0}")]
    Configuration(String),
    /// The system has no CA certificate that a broker's certificate could be signed with.
    #[error("this system has no CA certificates: specify one with --ca-file")]
    NoCaCertificates,
    /// The system refused a thread, for this reason: a limit of processes.
    #[error("the system provides no thread: {0}: raise the limit of processes (ulimit -u)")]
    NoThread(String),
    /// The system opens no further file, which this text says: a limit of open files.
    #[error("{0}")]
    TooManyFiles(String),
    /// There is no way to the broker, or no broker that speaks AMQP or TLS as we do.
    #[error("{0}")]
    NotConnected(String),
    /// The broker refused this login.
    #[error("refused {0}")]
    Credentials(String),
    /// The broker refused an operation: reply codes 403, 405 and 530.
    #[error("refused: {}{}", .0.text, .0.hint())]
    Refused(Reason),
    /// The broker closed a channel because of a method or a message on it.
    #[error("closed the channel: {}", .0.text)]
    ChannelClosed(Reason),
    /// The request queue of this name is a stream.
    #[error("has queue '{0}' as a stream, which delivers every request to every worker: use a classic or a quorum queue")]
    StreamQueue(String),
    /// The broker cancelled a consumer.
    #[error("cancelled the consumer")]
    ConsumerCancelled,
    /// The queue has ready messages but delivers none to this idle consumer.
    #[error("delivers no request to this consumer, though some are waiting: consuming again")]
    ConsumerForgotten,
    /// The broker closed the connection.
    #[error("closed the connection: {}", .0.text)]
    ConnectionClosed(Reason),
    /// The connection broke, for this reason.
    #[error("was disconnected: {0}")]
    ConnectionLost(String),
    /// The broker sent nothing for two heartbeat intervals, or did not answer a call in time.
    #[error("no longer answers")]
    Silent,
    /// The broker allows no more channels on this connection.
    #[error("allows no more channels: reduce --workers, or raise the broker's channel_max")]
    TooManyChannels,
    /// A deadline passed.
    #[error("timed out after {} while {phase}", format_duration(*.limit))]
    TimedOut {
        /// The limit that the deadline was made from.
        limit: Duration,
        /// The phase that did not end.
        phase: Phase,
    },
}

/// Maximum size of a broker's sentence in bytes: a short string of AMQP 0-9-1.
const MAX_REPLY_TEXT: usize = 255;

/// The broker's reason to close a channel or a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The reply code.
    pub code: u16,
    /// The broker's sentence.
    pub text: String,
}

impl Reason {
    fn new(code: u16, text: &[u8]) -> Self {
        Reason {
            code,
            text: escape_up_to(MAX_REPLY_TEXT, text).to_string(),
        }
    }

    /// The meaning of the broker's sentence. `None` if the reply code says it all.
    pub fn meaning(&self) -> Option<Meaning> {
        Meaning::of(self.code, &self.text)
    }

    /// The difference between the queue that exists and its declaration, if that is the reason.
    pub fn difference(&self) -> Option<Difference> {
        Difference::of(self.code, &self.text)
    }

    fn hint(&self) -> &'static str {
        match self.code {
            ACCESS_REFUSED => ": the user lacks this permission",
            PRECONDITION_FAILED => {
                ": use --queue-type auto to use the queue as it is, or delete it"
            }
            NOT_ALLOWED => ": is the vhost in the URL right, and may this user access it?",
            _ => "",
        }
    }
}

impl Error {
    /// An error of the broker at `address`, host and port.
    pub fn new(address: &str, kind: ErrorKind) -> Self {
        Error {
            address: Some(address.into()),
            kind,
        }
    }

    /// An error of the configuration, before there is a broker to connect to.
    pub fn configuration(kind: ErrorKind) -> Self {
        Error {
            address: None,
            kind,
        }
    }

    /// Whether retrying cannot help.
    pub fn is_permanent(&self) -> bool {
        self.kind.is_permanent()
    }

    /// Whether the connection has ended with this error.
    pub fn ends_connection(&self) -> bool {
        use ErrorKind::{ConnectionClosed, ConnectionLost, Silent, TimedOut};
        matches!(
            self.kind,
            ConnectionClosed(_) | ConnectionLost(_) | Silent | TimedOut { .. }
        )
    }

    /// The meaning of the broker's sentence, if the broker closed the channel or the connection.
    pub fn meaning(&self) -> Option<Meaning> {
        match &self.kind {
            ErrorKind::Refused(reason)
            | ErrorKind::ChannelClosed(reason)
            | ErrorKind::ConnectionClosed(reason) => reason.meaning(),
            _ => None,
        }
    }

    /// Whether there is no such queue.
    pub fn is_not_found(&self) -> bool {
        matches!(&self.kind, ErrorKind::ChannelClosed(reason) if reason.code == NOT_FOUND)
    }

    /// Whether the queue exists, and is exclusive to another connection.
    pub fn is_exclusive(&self) -> bool {
        match &self.kind {
            ErrorKind::ChannelClosed(reason) | ErrorKind::Refused(reason) => {
                reason.code == RESOURCE_LOCKED
            }
            _ => false,
        }
    }

    /// Whether the broker did not answer. Then another one is tried first.
    pub fn is_silence(&self) -> bool {
        matches!(self.kind, ErrorKind::Silent | ErrorKind::TimedOut { .. })
    }

    /// Whether the broker closed the channel or the connection because of a message that was sent
    /// on it, and not because of a missing permission, an operator, or its own shutdown.
    pub fn is_caused_by_message(&self) -> bool {
        match &self.kind {
            ErrorKind::ChannelClosed(_) => true,
            ErrorKind::ConnectionClosed(reason) => reason.code != CONNECTION_FORCED,
            _ => false,
        }
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.kind, &self.address) {
            (ErrorKind::Configuration(_) | ErrorKind::NoCaCertificates, _) | (_, None) => {}
            (ErrorKind::NoThread(_) | ErrorKind::TooManyFiles(_), Some(address)) => {
                write!(f, "cannot connect to {address}: ")?;
            }
            (_, Some(address)) => write!(f, "{address} ")?,
        }
        self.kind.fmt(f)
    }
}

impl ErrorKind {
    /// The system refused a thread, for this reason.
    pub fn no_thread(reason: &io::Error) -> Self {
        ErrorKind::NoThread(describe_io_error(reason))
    }

    /// The kind of an error of the system: [`ErrorKind::TooManyFiles`], or else that of `otherwise`.
    pub(crate) fn of_system(error: &io::Error, otherwise: impl FnOnce(String) -> Self) -> Self {
        let reason = describe_io_error(error);
        match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE) => ErrorKind::TooManyFiles(reason),
            _ => otherwise(reason),
        }
    }

    pub(crate) fn is_permanent(&self) -> bool {
        use ErrorKind::{Credentials, NoThread, Refused, StreamQueue};
        matches!(
            self,
            Credentials(_) | NoThread(_) | Refused(_) | StreamQueue(_)
        )
    }

    pub(crate) fn bad_url(source_name: &str, reason: &str) -> Self {
        ErrorKind::Configuration(format!("bad {source_name}: {reason}"))
    }

    pub(crate) fn bad_file(option: &str, file: &Path, reason: &str) -> Self {
        let file = escape(file.as_os_str().as_encoded_bytes());
        ErrorKind::Configuration(format!("{option} {file}: {reason}"))
    }
}

impl ErrorKind {
    /// The broker closed the connection: `connection.close`.
    pub(crate) fn connection_closed(code: u16, text: &[u8]) -> Self {
        let reason = Reason::new(code, text);
        match code {
            // Retrying helps: a connection may end.
            NOT_ALLOWED if reason.meaning() == Some(Meaning::ConnectionLimit) => {
                ErrorKind::ConnectionClosed(reason)
            }
            ACCESS_REFUSED | RESOURCE_LOCKED | NOT_ALLOWED => ErrorKind::Refused(reason),
            _ => ErrorKind::ConnectionClosed(reason),
        }
    }

    /// The broker closed a channel: `channel.close`.
    pub(crate) fn channel_closed(code: u16, text: &[u8]) -> Self {
        let reason = Reason::new(code, text);
        match code {
            ACCESS_REFUSED | RESOURCE_LOCKED | NOT_ALLOWED => ErrorKind::Refused(reason),
            _ => ErrorKind::ChannelClosed(reason),
        }
    }
}

/// Translates an error of amiquip. None of those that can occur here contains a URL.
impl From<amiquip::Error> for ErrorKind {
    fn from(error: amiquip::Error) -> Self {
        use amiquip::Error as Amiquip;
        match error {
            Amiquip::ForkFailed { source } => ErrorKind::no_thread(&source),
            Amiquip::CreatePollHandle { source } => {
                ErrorKind::of_system(&source, ErrorKind::ConnectionLost)
            }
            Amiquip::ExhaustedChannelIds => ErrorKind::TooManyChannels,
            Amiquip::ServerClosedChannel { code, message, .. } => {
                ErrorKind::channel_closed(code, message.as_bytes())
            }
            other => ErrorKind::ConnectionLost(escape(other.to_string().as_bytes()).to_string()),
        }
    }
}
