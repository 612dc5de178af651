//! The phases of a connection that have a deadline.

use std::fmt::{self, Display};

/// A **phase** is a step that must end by a deadline. As text it completes "timed out while …".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// DNS.
    ResolvingHostName,
    /// The TCP handshake.
    OpeningTcpConnection,
    /// The TLS handshake.
    TlsHandshake,
    /// The broker's first frame.
    AmqpHandshake,
    /// The rest of the AMQP handshake: SASL, tune and open.
    LoggingIn,
    /// `channel.open`.
    OpeningChannel,
    /// `channel.close`.
    ClosingChannel,
    /// `connection.close`.
    ClosingConnection,
    /// A passive declaration.
    QueueStats,
    /// `queue.declare` of a queue that does not exist.
    DeclaringQueue,
    /// `queue.declare` of a queue that exists.
    CheckingQueueType,
    /// `basic.qos` and `basic.consume`.
    StartingConsumer,
    /// `basic.cancel`.
    CancellingConsumer,
    /// A reply to a redelivered request, until the broker has taken or refused it.
    PublishingReply,
}

impl Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::ResolvingHostName => "resolving the host name",
            Phase::OpeningTcpConnection => "opening the TCP connection",
            Phase::TlsHandshake => "waiting for the TLS handshake",
            Phase::AmqpHandshake => "waiting for the AMQP handshake",
            Phase::LoggingIn => "logging in",
            Phase::OpeningChannel => "opening a channel",
            Phase::ClosingChannel => "closing a channel",
            Phase::ClosingConnection => "closing the connection",
            Phase::QueueStats => "looking at the queue",
            Phase::DeclaringQueue => "declaring a queue",
            Phase::CheckingQueueType => "checking the type of a queue",
            Phase::StartingConsumer => "starting a consumer",
            Phase::CancellingConsumer => "cancelling a consumer",
            Phase::PublishingReply => "publishing a reply",
        })
    }
}
