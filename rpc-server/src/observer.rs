//! What a program that serves learns of its server.

use rpc_common::connection::Error;
use rpc_common::message::ErrorCode;
use std::fmt::{self, Display};
use std::time::Duration;

/// An **observer** is told what a server does, by several threads. A closure is an observer that is told `on_ready` only.
pub trait Observer: Sync {
    /// The server consumes for the first time. Called once, before the first request is handled.
    fn on_ready(&self);

    /// The server consumes on a new connection to this broker.
    fn on_connected(&self, _broker: &str) {}

    /// The server has no connection, because of this error, and tries again after a pause.
    fn on_disconnected(&self, _error: &Error) {}

    /// A request has begun.
    fn on_request(&self) {}

    /// A request that has begun ended like this, after this time.
    fn on_outcome(&self, _outcome: &Outcome, _time: Duration) {}

    /// It is time to stop: the requests that have begun are answered.
    fn on_stopping(&self) {}

    /// How often the server's loop calls `on_alive`; a loop that hangs does not. `None` is never.
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
pub enum Outcome {
    /// It was answered.
    Served,
    /// It was answered with an error.
    Failed(ErrorCode),
    /// It, or its answer, cannot be sent on: it was rejected.
    Rejected,
    /// The channel ended before it was acknowledged: the broker delivers it again.
    Requeued,
}

impl Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Outcome::Served => "ok",
            Outcome::Failed(code) => code.as_str(),
            Outcome::Rejected => "rejected",
            Outcome::Requeued => "requeued",
        })
    }
}
