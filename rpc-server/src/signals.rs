//! SIGINT, SIGTERM and SIGHUP as a channel to wait on.

use crossbeam_channel::Receiver;
use rpc_common::exit::{end_by_signal, is_ignored};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};

/// The **stop** signal: a channel on which nothing is sent. It is disconnected when it is time to
/// stop.
pub type Stop = Receiver<Infallible>;

/// Time in which signals of one stop count once.
const ONE_STOP: Duration = Duration::from_secs(1);

/// A stop signal that the first SIGINT, SIGTERM or SIGHUP gives. The second one ends the process, as
/// if it was not handled. SIGHUP is left alone if it is ignored now, as nohup(1) does it.
///
/// # Errors
/// If the system refuses the signal handlers or a thread.
pub fn stop_signal() -> io::Result<Stop> {
    stop_signal_with(|| {})
}

/// As [`stop_signal`], but calls `on_second` before the second signal ends the process.
///
/// # Errors
/// As [`stop_signal`].
pub fn stop_signal_with(on_second: impl FnOnce() + Send + 'static) -> io::Result<Stop> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    if !is_ignored(SIGHUP) {
        signals.add_signal(SIGHUP)?;
    }
    // If SIGCHLD is ignored, as some parents leave it, the kernel reaps programs before they can be
    // waited for.
    signal_hook::flag::register(SIGCHLD, Arc::default())?;
    let (running, stop) = crossbeam_channel::bounded(0);
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut signals = signals.forever();
            let Some(first) = signals.next() else { return };
            let begun = Instant::now();
            log::info!(
                "stopping: requests that have begun are answered; a second signal stops at once"
            );
            drop(running);
            let second = signals.find(|signal| !is_same_stop(first, *signal, begun.elapsed()));
            on_second();
            rpc_common::logging::flush();
            if let Some(signal) = second {
                end_by_signal(signal);
            }
        })?;
    Ok(stop)
}

/// Whether a signal this long after the first one is part of the same stop. timeout(1) sends its
/// signal to the process and again to its group. A shell whose terminal is closed repeats SIGHUP, and
/// systemd sends SIGTERM and SIGHUP to a login session that it ends.
fn is_same_stop(first: i32, signal: i32, elapsed: Duration) -> bool {
    elapsed < ONE_STOP && (signal == first || [first, signal].contains(&SIGHUP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_of_one_stop_count_once() {
        let soon = Duration::from_millis(1);
        assert!(is_same_stop(SIGTERM, SIGTERM, soon));
        assert!(is_same_stop(SIGTERM, SIGHUP, soon) && is_same_stop(SIGHUP, SIGTERM, soon));
        assert!(!is_same_stop(SIGTERM, SIGINT, soon));
        assert!(!is_same_stop(SIGTERM, SIGTERM, ONE_STOP));
        assert!(!is_same_stop(SIGHUP, SIGHUP, ONE_STOP));
    }
}
