//! SIGINT and SIGTERM as a channel to wait on.

use crossbeam_channel::Receiver;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use std::convert::Infallible;
use std::{io, thread};

/// The **stop** signal: a channel on which nothing is sent. It is disconnected when it is time to stop.
pub type Stop = Receiver<Infallible>;

/// A stop signal that the first SIGINT or SIGTERM gives. The second one ends the process, as if it was not handled.
///
/// # Errors
/// When the system refuses the signal handlers or a thread.
pub fn stop_signal() -> io::Result<Stop> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let (running, stop) = crossbeam_channel::bounded(0);
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut signals = signals.forever();
        signals.next();
        log::info!("stopping: requests that have begun are answered; a second signal stops at once");
        drop(running);
        if let Some(second) = signals.next() {
            rpc_common::logging::flush();
            let _ = emulate_default_handler(second); // does not return
        }
    })?;
    Ok(stop)
}
