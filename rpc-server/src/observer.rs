//! The reports of a server to the program that it is in.

use rpc_common::connection::Error;
use rpc_common::message::{ErrorCode, Reply};
use std::time::Duration;

/// An **observer** is told what a server does, by several threads. A closure is an observer that is
/// told `on_ready` only.
pub trait Observer: Sync {
    /// The server consumes for the first time. Called once, before the first request is handled.
    fn on_ready(&self);

    /// The server consumes on a new connection to this broker.
    fn on_consuming(&self, _broker: &str) {}

    /// A worker begins to consume. Called on the worker's thread.
    fn on_consumer_started(&self) {}

    /// A worker no longer consumes. Called on the worker's thread. A worker that answers a request
    /// when its connection ends calls it after the request, and after `on_disconnected`.
    fn on_consumer_ended(&self) {}

    /// The server has no connection, because of this error, and tries again after a pause.
    fn on_disconnected(&self, _error: &Error) {}

    /// A request has begun.
    fn on_request(&self) {}

    /// A request that has begun ended after this time.
    fn on_outcome(&self, _outcome: &Outcome, _time: Duration) {}

    /// It is time to stop: the requests that have begun are answered.
    fn on_stopping(&self) {}

    /// Interval at which the server's loop calls `on_alive`; a loop that hangs does not. `None` is
    /// never.
    fn alive_interval(&self) -> Option<Duration> {
        None
    }

    /// The server's loop is alive.
    fn on_alive(&self) {}
}

impl<OnReady: Fn() + Sync> Observer for OnReady {
    fn on_ready(&self) {
        self();
    }
}

/// The **outcome** of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The function's answer was sent.
    Answered,
    /// An error with this code was sent.
    Failed(ErrorCode),
    /// The request was rejected: it has no `reply_to`, or the broker refuses its replies.
    Rejected,
    /// The broker delivers the request again.
    Requeued,
}

impl Outcome {
    pub(crate) fn of(reply: &Reply) -> Self {
        match reply {
            Ok(_) => Outcome::Answered,
            Err(failure) => Outcome::Failed(failure.code.clone()),
        }
    }

    /// The outcome in the log and in metrics: `ok`, an error code, `rejected` or `requeued`.
    pub fn as_str(&self) -> &str {
        match self {
            Outcome::Answered => "ok",
            Outcome::Failed(code) => code.as_str(),
            Outcome::Rejected => "rejected",
            Outcome::Requeued => "requeued",
        }
    }
}
