//! SIGINT and SIGTERM where the system does not end the program by itself: in process 1 of a
//! container, in a batch with a summary, and while a long record of output is written.

use rpc_common::exit::{end_by_signal, is_ignored, is_process_1};
use rpc_common::logging::start_of_line;
use rpc_common::stdio;
use rpc_common::sync::lock;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use std::io::{self, Write};
use std::sync::{mpsc, Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Maximum time that the summary, or the rest of a record, takes after a signal: the reader of the
/// output may have stopped.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(1);

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
        let mut signals = signals()?;
        let handle = signals.handle();
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                if let Some(signal) = signals.forever().next() {
                    // The progress line. If it fails, nobody sees it.
                    let _ = write!(stdio::stderr(), "{}", start_of_line());
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
        let (sender, receiver) = mpsc::channel::<Signals>();
        // Before the handlers: without this thread they would ignore the signals.
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let Ok(mut signals) = receiver.recv() else {
                    return;
                };
                if let Some(signal) = signals.forever().next() {
                    on_signal(signal);
                    thread::sleep(OUTPUT_TIMEOUT);
                    end_by_signal(signal);
                }
            })?;
        let signals = signals()?;
        if let DefaultAction(Some(default)) = self {
            default.close();
        }
        let _ = sender.send(signals); // the thread waits for it
        Ok(())
    }
}

/// SIGINT and SIGTERM, but not one that is ignored now: a shell without job control starts background
/// jobs so.
fn signals() -> io::Result<Signals> {
    let signals = [SIGINT, SIGTERM].into_iter();
    Signals::new(signals.filter(|signal| !is_ignored(*signal)))
}

/// **Postpones** the default action while a record of output is written, a second at most.
pub(crate) struct Postponement {
    /// `None` when it has been replaced, or if other code handles the signals.
    default_action: Option<DefaultAction>,
    output: Arc<Mutex<OutputState>>,
}

/// The state of standard output.
#[derive(Clone, Copy)]
enum OutputState {
    /// No record is being written.
    Idle,
    Writing,
    /// This signal ends the program when the record is written.
    Interrupted(i32),
}

impl Postponement {
    /// Postpones this default action. Nothing is done before the first record begins.
    pub(crate) fn of(default_action: Option<DefaultAction>) -> Self {
        Postponement {
            default_action,
            output: Arc::new(Mutex::new(OutputState::Idle)),
        }
    }

    /// A record begins, or goes on.
    pub(crate) fn begin(&mut self) {
        if let Some(default_action) = self.default_action.take() {
            let output = self.output.clone();
            // Without a thread the default action is taken at once.
            let _ = default_action.precede(move |signal| on_signal(&output, signal));
        }
        let mut state = lock(&self.output);
        if let OutputState::Idle = *state {
            *state = OutputState::Writing;
        }
    }

    /// The record is written. Ends the program if a signal has come meanwhile.
    pub(crate) fn end(&mut self) {
        let mut state = lock(&self.output);
        if let OutputState::Interrupted(signal) = *state {
            end_by_signal(signal);
        }
        *state = OutputState::Idle;
    }
}

fn on_signal(output: &Mutex<OutputState>, signal: i32) {
    let mut state = lock(output);
    match *state {
        OutputState::Idle => end_by_signal(signal),
        _ => *state = OutputState::Interrupted(signal),
    }
}
