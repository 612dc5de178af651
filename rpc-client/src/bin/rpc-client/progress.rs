//! The progress line on a terminal, while calls take longer than a second. Nothing is shown in a
//! pipe, with `--quiet`, or by a background job.
//!
//! Not by a library: indicatif computes its rates with libm, which then is loaded in every call and
//! takes 0.6 MB.

use crate::cli::Cli;
use crate::input::Argument;
use rpc_common::logging::{is_in_foreground, is_interactive, start_of_line};
use rpc_common::stdio;
use rpc_common::sync::lock;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use terminal_size::{terminal_size_of, Width};

/// Time before the progress line is shown.
const DELAY: Duration = Duration::from_secs(1);

/// Interval at which the progress line is drawn again.
const INTERVAL: Duration = Duration::from_millis(200);

/// Width in columns of a terminal that does not say its width.
const DEFAULT_WIDTH: u16 = 80;

/// A line on standard error, if that is a terminal.
pub(crate) struct Progress(Arc<Mutex<ProgressLine>>);

struct ProgressLine {
    begun: Instant,
    done: u64,
    errors: u64,
    /// Of this many calls, if that is known.
    total: Option<u64>,
    /// The queue that a single call waits for.
    queue: Option<String>,
    is_shown: bool,
    is_finished: bool,
}

impl Progress {
    /// The line of one call: the time that it has waited. `None` where nothing is shown.
    pub(crate) fn of_single_call(cli: &Cli) -> Option<Self> {
        Self::start(cli, Some(cli.config.queue.clone()), None)
    }

    /// The line of a batch: calls done, of how many if that is known, their rate, errors, and the
    /// time left.
    pub(crate) fn of_batch(cli: &Cli) -> Option<Self> {
        Self::start(cli, None, count_calls(cli))
    }

    fn start(cli: &Cli, queue: Option<String>, total: Option<u64>) -> Option<Self> {
        if cli.output.quiet || !is_interactive() {
            return None;
        }
        let begun = Instant::now();
        let is_shown = false;
        let is_finished = false;
        let state = ProgressLine {
            begun,
            done: 0,
            errors: 0,
            total,
            queue,
            is_shown,
            is_finished,
        };
        let state = Arc::new(Mutex::new(state));
        let drawn = state.clone();
        let draw = move || {
            thread::sleep(DELAY);
            while lock(&drawn).draw() {
                thread::sleep(INTERVAL);
            }
        };
        // Without a thread no line is shown: the calls are more important.
        thread::Builder::new().spawn(draw).ok()?;
        Some(Progress(state))
    }

    pub(crate) fn count(&self, is_error: bool) {
        let mut state = lock(&self.0);
        state.done += 1;
        state.errors += u64::from(is_error);
    }

    /// Hides the progress line while `print` runs.
    pub(crate) fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        let mut state = lock(&self.0);
        let was_shown = state.is_shown;
        state.clear();
        let printed = print();
        // The answer to a single call may end without a newline: it would be cleared.
        if was_shown && state.queue.is_none() {
            state.draw();
        }
        printed
    }

    pub(crate) fn finish(&self) {
        let mut state = lock(&self.0);
        state.clear();
        state.is_finished = true;
    }
}

impl ProgressLine {
    /// Draws the line. Returns false at the end of the run.
    fn draw(&mut self) -> bool {
        if !self.is_finished && is_in_foreground() {
            let width =
                terminal_size_of(io::stderr()).map_or(DEFAULT_WIDTH, |(Width(width), _)| width);
            let line: String = self
                .line()
                .chars()
                .take(usize::from(width).saturating_sub(1))
                .collect();
            // If it fails, nobody sees it.
            let _ = write!(stdio::stderr(), "{}{line}", start_of_line());
            self.is_shown = true;
        }
        !self.is_finished
    }

    fn clear(&mut self) {
        if self.is_shown && is_in_foreground() {
            let _ = write!(stdio::stderr(), "{}", start_of_line());
        }
        self.is_shown = false;
    }

    #[allow(clippy::cast_precision_loss)] // it is shown rounded
    fn line(&self) -> String {
        let elapsed = self.begun.elapsed();
        if let Some(queue) = &self.queue {
            return format!(
                "waiting for an answer from '{queue}' … {}s",
                elapsed.as_secs()
            );
        }
        let rate = self.done as f64 / elapsed.as_secs_f64();
        let (of_total, time_left) = match self.total {
            Some(total) if self.done > 0 => {
                let left = total.saturating_sub(self.done) as f64 / rate;
                (format!("/{total}"), format!(", {left:.0}s left"))
            }
            Some(total) => (format!("/{total}"), String::new()),
            None => (String::new(), String::new()),
        };
        format!(
            "{}{of_total} calls, {rate:.0}/s, {} errors{time_left}",
            self.done, self.errors
        )
    }
}

/// Number of calls, if that is known before the input is read.
fn count_calls(cli: &Cli) -> Option<u64> {
    let input = &cli.input;
    let is_streamed = input.lines.is_some() || input.numbers.contains(&Argument::StandardInput);
    let count = input.numbers.len() + input.data.len();
    (!is_streamed).then_some((count as u64).saturating_mul(cli.repeat))
}
