//! What moves on a terminal while calls take longer than a second. Nothing is shown in a pipe or with `--quiet`.

use crate::cli::Cli;
use crate::input::Argument;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use rpc_common::logging::is_interactive;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// After how long the line is shown, and how often it is drawn again.
const DELAY: Duration = Duration::from_secs(1);
const INTERVAL: Duration = Duration::from_millis(200);

/// A line on standard error, if that is a terminal.
#[derive(Clone)]
pub(crate) struct Progress {
    bar: ProgressBar,
    errors: Arc<AtomicU64>,
}

impl Progress {
    /// The line of one call: how long it has waited. None where nothing is shown.
    pub(crate) fn of_one_call(cli: &Cli) -> Option<Self> {
        let text = format!("waiting for an answer from '{}' …", cli.config.queue);
        let show = move |state: &ProgressState, line: &mut dyn Write| {
            let _ = write!(line, "{text} {}s", state.elapsed().as_secs()); // cannot fail: it is in memory
        };
        Self::start(cli, show)
    }

    /// The line of a batch: calls done, of how many if that is known, their rate, errors, and the time left.
    pub(crate) fn of_batch(cli: &Cli) -> Option<Self> {
        let errors = Arc::new(AtomicU64::new(0));
        let (counted, total) = (errors.clone(), count_calls(cli));
        let show = move |state: &ProgressState, line: &mut dyn Write| {
            let (done, rate, errors) = (state.pos(), state.per_sec(), counted.load(Ordering::Relaxed));
            let of_total = total.map_or_else(String::new, |total| format!("/{total}"));
            let _ = write!(line, "{done}{of_total} calls, {rate:.0}/s, {errors} errors");
            if let Some(left) = total.map(|total| total.saturating_sub(done)).filter(|_| rate >= 1.0) {
                #[allow(clippy::cast_precision_loss)] // it is shown in seconds
                let _ = write!(line, ", {:.0}s left", left as f64 / rate);
            }
        };
        Self::start(cli, show).map(|progress| Progress { errors, ..progress })
    }

    fn start(cli: &Cli, show: impl Fn(&ProgressState, &mut dyn Write) + Clone + Send + Sync + 'static) -> Option<Self> {
        if cli.output.quiet || !is_interactive() {
            return None;
        }
        let style = ProgressStyle::with_template("{line}").expect("it is well formed");
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        bar.set_style(style.with_key("line", show));
        let shown = bar.clone();
        thread::spawn(move || {
            thread::sleep(DELAY);
            if !shown.is_finished() {
                shown.set_draw_target(ProgressDrawTarget::stderr());
                shown.enable_steady_tick(INTERVAL);
            }
        });
        Some(Progress { bar, errors: Arc::default() })
    }

    pub(crate) fn count(&self, is_error: bool) {
        self.errors.fetch_add(is_error.into(), Ordering::Relaxed);
        self.bar.inc(1);
    }

    /// Prints something else: the line is away meanwhile.
    pub(crate) fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// How many calls there are, if that is known before the input is read.
fn count_calls(cli: &Cli) -> Option<u64> {
    let input = &cli.input;
    let is_streamed = input.lines.is_some() || input.numbers.contains(&Argument::StandardInput);
    let count = input.numbers.len() + input.data.len();
    (!is_streamed).then_some(count as u64 * cli.repeat)
}
