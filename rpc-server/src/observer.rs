//! What a program that serves learns of its server.

use rpc_common::connection::Error;
use std::time::Duration;

/// An **observer** is told what a server does, by several threads. A closure is an observer that is
/// told `on_ready` only.
pub trait Observer: Sync {
    /// The server consumes for the first time. Called once, before the first request is handled.
    fn on_ready(&self);

    /// The server consumes on a new connection to this broker.
    fn on_connected(&self, _broker: &str) {}

    /// The server has no connection, because of this error, and tries again after a pause.
    fn on_disconnected(&self, _error: &Error) {}

    /// A request has begun.
    fn on_request(&self) {}

    /// A request that has begun ended after this time. The outcome is `ok` or an error code,
    /// `rejected`, or `requeued` if the broker delivers it again.
    fn on_outcome(&self, _outcome: &str, _time: Duration) {}

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
