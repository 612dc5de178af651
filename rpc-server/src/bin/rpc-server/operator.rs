//! The reports to the operator: the server's first line on standard output, its statistics, and
//! systemd's notifications.

use crate::statistics::Statistics;
use rpc_common::background_writer::BackgroundWriter;
use rpc_common::connection::Error;
use rpc_server::{Observer, Outcome};
use sd_notify::NotifyState::{self, Ready, Status, Stopping, Watchdog};
use std::env;
use std::time::{Duration, Instant};

/// Reports to the operator.
pub(crate) struct Operator<'a> {
    pub(crate) stdout: &'a BackgroundWriter,
    pub(crate) statistics: &'a Statistics,
    /// Interval at which the metrics must learn that the server's loop is alive.
    pub(crate) live_interval: Option<Duration>,
}

impl Observer for Operator<'_> {
    fn on_ready(&self) {
        self.stdout.write_line(" [x] Awaiting RPC requests".into());
        notify(&[Ready]);
    }

    fn on_consuming(&self, address: &str) {
        self.statistics.on_connected();
        notify(&[Status(&format!("connected to {address}"))]);
    }

    fn on_consumer_started(&self) {
        self.statistics.consumers.on_started();
    }

    fn on_consumer_ended(&self) {
        self.statistics.consumers.on_ended();
    }

    fn on_disconnected(&self, error: &Error) {
        self.statistics.on_disconnected();
        let address = error.address.as_deref().unwrap_or("a broker");
        notify(&[Status(&format!("waiting for {address}: {error}"))]);
    }

    fn on_request(&self) {
        self.statistics.in_flight.inc();
    }

    fn on_outcome(&self, outcome: &Outcome, time: Duration) {
        self.statistics.on_outcome(outcome.as_str(), time);
    }

    fn on_stopping(&self) {
        self.statistics.on_stopping(Instant::now());
        notify(&[
            Stopping,
            Status("stopping: requests that have begun are answered"),
        ]);
    }

    fn alive_interval(&self) -> Option<Duration> {
        [watchdog_interval(), self.live_interval]
            .into_iter()
            .flatten()
            .min()
    }

    fn on_alive(&self) {
        self.statistics.on_alive(Instant::now());
        if watchdog_interval().is_some() {
            notify(&[Watchdog]);
        }
    }
}

/// Interval at which systemd must learn that the server's loop is alive.
fn watchdog_interval() -> Option<Duration> {
    let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero())?;
    env::var_os("NOTIFY_SOCKET").map(|_| limit / 2)
}

/// Tells systemd, if it has started this process with a socket for that.
fn notify(states: &[NotifyState]) {
    // If this fails, systemd notices the missing READY or WATCHDOG.
    let _ = sd_notify::notify(states);
}
