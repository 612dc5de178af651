//! SIGINT and SIGTERM as a channel that everybody who waits can wait on.

use crossbeam_channel::Receiver;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use std::convert::Infallible;
use std::{io, thread};

/// The **stop** signal: a channel on which nothing is ever sent. Its end is the signal, and every
/// clone of it sees that.
pub type Stop = Receiver<Infallible>;

/// Turns the first SIGINT or SIGTERM into a stop; a second one ends the process at once, as it would
/// have without us.
///
/// # Errors
/// When the system refuses the signal handlers or a thread.
pub fn stop() -> io::Result<Stop> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let (stopping, stop) = crossbeam_channel::bounded(0);
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut signals = signals.forever();
        signals.next();
        log::info!("stopping: what has begun is answered first; a second signal stops at once");
        drop(stopping);
        if let Some(second) = signals.next() {
            let _ = emulate_default_handler(second); // does not return
        }
    })?;
    Ok(stop)
}
