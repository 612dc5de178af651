//! SIGINT and SIGTERM as a channel to wait on.

use crossbeam_channel::Receiver;
use rpc_common::exit::end_by_signal;
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};

/// The **stop** signal: a channel on which nothing is sent. It is disconnected when it is time to
/// stop.
pub type Stop = Receiver<Infallible>;

/// Time in which the same signal counts once.
const SAME_SIGNAL: Duration = Duration::from_secs(1);

/// A stop signal that the first SIGINT or SIGTERM gives. The second one ends the process, as if it
/// was not handled.
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
    // If SIGCHLD is ignored, as some parents leave it, the kernel reaps programs before they can be
    // waited for.
    signal_hook::flag::register(SIGCHLD, Arc::default())?;
    let (running, stop) = crossbeam_channel::bounded(0);
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut signals = signals.forever();
            let first = signals.next();
            let begun = Instant::now();
            log::info!(
                "stopping: requests that have begun are answered; a second signal stops at once"
            );
            drop(running);
            // timeout(1) sends its signal to the process and again to its group.
            let second =
                signals.find(|signal| Some(*signal) != first || begun.elapsed() >= SAME_SIGNAL);
            on_second();
            rpc_common::logging::flush();
            if let Some(signal) = second {
                end_by_signal(signal);
            }
        })?;
    Ok(stop)
}
