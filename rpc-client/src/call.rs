//! A call: its request, its outcome and its errors.

use rpc_common::connection::{Error as ConnectionError, ErrorKind, Phase, QueueStats};
use rpc_common::message::{parse_expired_message, Answer, ErrorCode, Failure};
use rpc_common::text::{escape_up_to, format_duration};
use std::fmt::{self, Display};
use std::time::Duration;
use uuid::Uuid;

/// A **request** is what a call sends.
///
/// ```
/// let request = rpc_client::Request { context: 1, body: b"30".to_vec() };
/// assert_eq!(request.body, b"30");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request<T> {
    /// Value of the caller that comes back with the outcome; not sent.
    pub context: T,
    /// The argument of the function.
    pub body: Vec<u8>,
}

/// An **outcome** is how a call ended.
#[derive(Debug)]
pub struct Outcome<T> {
    /// The request, as it was given.
    pub request: Request<T>,
    /// The correlation id of the call.
    pub correlation_id: Uuid,
    /// From the first publish to the end of the call; `None` if nothing was published.
    pub latency: Option<Duration>,
    /// The answer, or why there is none.
    pub result: Result<Answer, Error>,
}

/// Maximum length in bytes of a server's error that is shown.
const MAX_SENTENCE: usize = 4 << 10;

/// The error of a call without an answer. Not `non_exhaustive`: a program that maps errors to exit
/// codes shall not compile without the code of a new one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The broker was not reached, or refused us: the request was not sent, or was refused.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The broker refused us after the request was sent: the function may or may not have run.
    #[error(transparent)]
    RefusedAfterSend(ConnectionError),
    /// The request queue does not exist: nothing ran.
    #[error("no queue '{queue}' on {address}: is rpc-server running?")]
    NoQueue {
        /// The request queue.
        queue: String,
        /// Host and port of the broker.
        address: String,
    },
    /// The request queue has no consumers, and [`Config::no_wait`](crate::Config::no_wait) is set:
    /// nothing ran.
    #[error("no server is consuming '{queue}' on {address}: nothing ran")]
    NoConsumers {
        /// The request queue.
        queue: String,
        /// Host and port of the broker.
        address: String,
    },
    /// The request queue is full, and refuses requests (`overflow=reject-publish`): nothing ran.
    #[error("queue '{queue}' on {address} is full: nothing ran")]
    QueueFull {
        /// The request queue.
        queue: String,
        /// Host and port of the broker.
        address: String,
    },
    /// The broker refused the request because of its size (`max_message_size`): nothing ran.
    #[error("the request of {size} bytes is too large for {address}: {reason}")]
    TooLarge {
        /// The size of the request's body in bytes.
        size: usize,
        /// Host and port of the broker.
        address: String,
        /// The broker's sentence.
        reason: String,
    },
    /// The deadline passed: the function may or may not have run.
    #[error("no answer from '{queue}' on {address} within {}: {cause}{}", format_duration(*.limit), explain_ahead(*.ahead))]
    NoAnswer {
        /// The request queue.
        queue: String,
        /// Host and port of the broker.
        address: String,
        /// The call's timeout.
        limit: Duration,
        /// The known cause.
        cause: NoAnswerCause,
        /// Number of calls of this run that were in flight before this one, if any was answered
        /// while it waited.
        ahead: usize,
    },
    /// The server answered with an error.
    #[error("{}", escape_up_to(MAX_SENTENCE, .0.message.as_bytes()))]
    Failed(Failure),
}

/// Calls of one run wait for each other.
fn explain_ahead(ahead: usize) -> String {
    match ahead {
        0 => String::new(),
        1 => "; 1 call of this run was ahead of it: lower --in-flight, or raise --timeout".into(),
        ahead => format!(
            "; {ahead} calls of this run were ahead of it: lower --in-flight, or raise --timeout"
        ),
    }
}

impl Error {
    /// The server's error. A request that has expired there before its deadline here shows that the
    /// clocks differ.
    pub(crate) fn failed(mut failure: Failure, time_left: Duration) -> Self {
        if failure.code == ErrorCode::Expired && time_left >= Duration::from_secs(1) {
            let message = &failure.message;
            let (at_least, late) = match parse_expired_message(message) {
                Some(late) => ("", late),
                None => ("at least ", Duration::ZERO),
            };
            let ahead = format_duration(Duration::from_secs((late + time_left).as_secs()));
            failure.message = format!(
                "{message}: the server's clock is {at_least}{ahead} ahead of this machine's"
            );
        }
        Error::Failed(failure)
    }
}

/// The known cause of a missing answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoAnswerCause {
    /// Nothing but the silence.
    #[default]
    Unknown,
    /// The latest `queue_stats` of the request queue.
    Queue(QueueStats),
    /// The request queue did not exist at the latest `queue_stats`.
    QueueMissing,
    /// A server got the request after the deadline, and did not run it.
    Expired,
    /// A reply without the call's id has come, and was discarded.
    ReplyDiscarded,
    /// The broker has not answered while this was done.
    Waiting(Phase),
    /// The broker blocks publishers, for this reason: it is short of memory or disk space.
    Blocked(String),
    /// The connection was lost, in this way.
    Disconnected(String),
}

impl NoAnswerCause {
    /// The known cause after the connection was lost. A timeout adds nothing where the cause is
    /// known already.
    pub(crate) fn after(self, error: &ConnectionError) -> Self {
        use NoAnswerCause::{Blocked, Disconnected, Queue, QueueMissing, Waiting};
        match (&error.kind, self) {
            (ErrorKind::TimedOut { .. }, known @ (Blocked(_) | Queue(_) | QueueMissing)) => known,
            (ErrorKind::TimedOut { phase, .. }, _) => Waiting(*phase),
            _ => Disconnected(error.to_string()),
        }
    }
}

impl Display for NoAnswerCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages = |count: &u32| match count {
            1 => "1 message is".to_owned(),
            count => format!("{count} messages are"),
        };
        match self {
            NoAnswerCause::Unknown => f.write_str("no server, or all are busy"),
            NoAnswerCause::Queue(QueueStats {
                consumers: 0,
                messages: count,
            }) => {
                write!(f, "no server is consuming, {} waiting", messages(count))
            }
            NoAnswerCause::Queue(QueueStats { messages: 0, .. }) => {
                f.write_str("a server took it but has not answered")
            }
            NoAnswerCause::Queue(QueueStats {
                messages: count, ..
            }) => {
                write!(f, "all servers are busy, {} waiting", messages(count))
            }
            NoAnswerCause::QueueMissing => {
                f.write_str("the queue does not exist, or its node is down")
            }
            NoAnswerCause::Expired => {
                f.write_str("a server got it after the deadline, and did not run it")
            }
            NoAnswerCause::ReplyDiscarded => {
                f.write_str("a reply without this call's id was discarded: does the server copy correlation_id?")
            }
            NoAnswerCause::Waiting(phase) => write!(f, "timed out while {phase}"),
            NoAnswerCause::Blocked(reason) => write!(f, "the broker blocks publishers: {reason}"),
            NoAnswerCause::Disconnected(reason) => f.write_str(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(kind: ErrorKind) -> ConnectionError {
        ConnectionError::new("rabbit:5672", kind)
    }

    #[test]
    fn what_is_known_of_a_missing_answer_is_the_best_explanation() {
        let timeout = lost(ErrorKind::TimedOut {
            limit: Duration::from_secs(1),
            phase: Phase::StartingConsumer,
        });
        let reset = lost(ErrorKind::ConnectionLost("reset".into()));
        let blocked = || NoAnswerCause::Blocked("low on memory".into());
        for (cause, error, expected) in [
            (
                NoAnswerCause::Unknown,
                &timeout,
                "timed out while starting a consumer",
            ),
            (
                blocked(),
                &timeout,
                "the broker blocks publishers: low on memory",
            ),
            (blocked(), &reset, "rabbit:5672 was disconnected: reset"),
        ] {
            assert_eq!(cause.after(error).to_string(), expected);
        }
    }

    #[test]
    fn the_state_of_the_queue_is_told_in_words() {
        for (consumers, messages, expected) in [
            (0, 1, "no server is consuming, 1 message is waiting"),
            (0, 2, "no server is consuming, 2 messages are waiting"),
            (1, 0, "a server took it but has not answered"),
            (3, 7, "all servers are busy, 7 messages are waiting"),
        ] {
            let cause = NoAnswerCause::Queue(QueueStats {
                messages,
                consumers,
            });
            assert_eq!(cause.to_string(), expected);
        }
    }

    #[test]
    fn a_request_that_expires_too_early_shows_that_the_clocks_differ() {
        let failure = |code| Failure::new(code, "expired: 5s late");
        let explained =
            |code, seconds| Error::failed(failure(code), Duration::from_secs(seconds)).to_string();
        assert_eq!(
            explained(ErrorCode::Expired, 25),
            "expired: 5s late: the server's clock is at least 25s ahead of this machine's"
        );
        let ours = "expired: 59m 50s 999ms after the deadline, by the server's clock";
        let failure = Failure::new(ErrorCode::Expired, ours);
        assert_eq!(
            Error::failed(failure, Duration::from_millis(9_500)).to_string(),
            format!("{ours}: the server's clock is 1h ahead of this machine's")
        );
        assert_eq!(explained(ErrorCode::Expired, 0), "expired: 5s late");
        assert_eq!(explained(ErrorCode::Internal, 25), "expired: 5s late");
    }
}
