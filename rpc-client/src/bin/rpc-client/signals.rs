//! SIGINT and SIGTERM where the system does not end the program by itself: in process 1 of a
//! container, and in a batch with a summary.

use rpc_common::exit::{end_by_signal, is_process_1};
use rpc_common::logging::start_of_line;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use std::io::{self, Write};
use std::thread;
use std::time::Duration;

/// Maximum time that the summary takes after a signal: the reader of the output may have stopped.
const SUMMARY_TIMEOUT: Duration = Duration::from_secs(1);

/// The **default action** of SIGINT and SIGTERM, which the system does not take for process 1: they
/// end the program. Elsewhere the system takes it.
pub(crate) struct DefaultAction(Option<Handle>);

impl DefaultAction {
    /// Takes the default action from now on.
    ///
    /// # Errors
    /// The system refuses the signal handlers or a thread.
    pub(crate) fn start() -> io::Result<Self> {
        if !is_process_1() {
            return Ok(DefaultAction(None));
        }
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let handle = signals.handle();
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                if let Some(signal) = signals.forever().next() {
                    // The progress line. If it fails, nobody sees it.
                    let _ = write!(io::stderr(), "{}", start_of_line());
                    end_by_signal(signal);
                }
            })?;
        Ok(DefaultAction(Some(handle)))
    }

    /// Calls `on_signal` in place of the default action, which follows a second later at the latest.
    ///
    /// # Errors
    /// The system refuses the signal handlers or a thread.
    pub(crate) fn precede(self, on_signal: impl FnOnce(i32) + Send + 'static) -> io::Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        if let DefaultAction(Some(default)) = self {
            default.close();
        }
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                if let Some(signal) = signals.forever().next() {
                    on_signal(signal);
                    thread::sleep(SUMMARY_TIMEOUT);
                    end_by_signal(signal);
                }
            })?;
        Ok(())
    }
}
