//! The log of both programs: on standard error, without passwords, and limited in rate.

use crate::background_writer::BackgroundWriter;
use crate::sync::lock;
use crate::text::{escape, escape_up_to};
use env_logger::{Builder, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use std::{env, panic, thread};

/// The options of both programs for the log.
#[derive(Clone, Debug, clap::Args)]
pub struct LogOptions {
    /// More log; RUST_LOG overrides it
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl LogOptions {
    /// Starts a log for an operator: each line has a time and a level; in systemd's journal a
    /// priority, see sd-daemon(3). Whoever logs does not wait for its reader.
    pub fn start_for_operator(&self, level: LevelFilter) {
        let writer = BackgroundWriter::start(io::stderr());
        let mut builder = self.builder(level);
        builder
            .format_target(false)
            .format_timestamp_millis()
            .target(Target::Pipe(Box::new(writer.clone())));
        if is_journal() {
            builder.format(|line, record| {
                writeln!(line, "<{}>{}", priority(record.level()), record.args())
            });
        }
        start(&mut builder, Some(writer));
    }

    /// Starts a log for a user at a prompt: the lines look like the errors of `program`. With
    /// `--verbose` it is at debug level at least.
    pub fn start_for_prompt(&self, program: &'static str, level: LevelFilter) {
        let mut builder = self.builder(if self.verbose > 0 {
            LevelFilter::Info
        } else {
            level
        });
        let clear = start_of_line();
        builder.format(move |line, record| match record.level() {
            Level::Warn => writeln!(line, "{clear}{program}: warning: {}", record.args()),
            _ => writeln!(line, "{clear}{program}: {}", record.args()),
        });
        start(&mut builder, None);
    }

    fn builder(&self, level: LevelFilter) -> Builder {
        let index = level as usize + usize::from(self.verbose);
        let mut builder = Builder::new();
        builder
            .filter_level(LevelFilter::iter().nth(index).unwrap_or(LevelFilter::Trace))
            .filter_module("amiquip", LevelFilter::Off) // its warnings repeat our errors
            .filter_module("mio", LevelFilter::Off)
            .parse_default_env()
            // After RUST_LOG, which must not enable it: at debug level the handshake logs the
            // password.
            .filter_module("amiquip::io_loop::handshake_state", LevelFilter::Info);
        builder
    }
}

/// The start of a line on standard error: on a terminal, it replaces a line that shows
/// progress.
pub fn start_of_line() -> &'static str {
    if is_interactive() {
        "\r\x1b[K" // to the first column, and clear the line
    } else {
        ""
    }
}

/// Whether standard error is a terminal on which a line can be drawn again.
pub fn is_interactive() -> bool {
    let is_dumb = env::var_os("TERM").is_none_or(|name| name.is_empty() || name == "dumb");
    !is_dumb && io::stderr().is_terminal()
}

/// Whether standard error is a stream to systemd's journal, which adds the time. See JOURNAL_STREAM
/// in systemd.exec(5).
pub fn is_journal() -> bool {
    let stderr = io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|stderr| File::from(stderr).metadata());
    let stream = stderr.map(|stderr| format!("{}:{}", stderr.dev(), stderr.ino()));
    stream
        .is_ok_and(|stream| env::var_os("JOURNAL_STREAM").is_some_and(|journal| journal == *stream))
}

/// The priority of a line in the journal, as in syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        _ => 7,
    }
}

fn start(builder: &mut Builder, writer: Option<BackgroundWriter>) {
    let log = builder.build();
    log::set_max_level(log.filter());
    let limiter = RateLimiter {
        counts_repetitions: writer.is_some(),
        ..RateLimiter::default()
    };
    let log = RateLimitedLog {
        log,
        writer,
        limiter: Mutex::new(limiter),
    };
    log::set_boxed_logger(Box::new(log)).expect("a program starts its log once");
}

/// Logs panics. A panic of amiquip's thread is logged at debug level: it occurs when both sides
/// close at once, and the connection's error says more.
pub fn log_panics() {
    panic::set_hook(Box::new(|panic| {
        let level = match thread::current().name() {
            Some("amiquip-io") => Level::Debug,
            _ => Level::Error,
        };
        log::log!(level, "{}", describe_panic(&panic.to_string()));
    }));
}

/// Maximum length in bytes of a panic's text that is logged.
const MAX_PANIC: usize = 1_000;

/// The text of a panic as one line, escaped: its message may contain what came from the wire.
fn describe_panic(text: &str) -> String {
    escape_up_to(MAX_PANIC, text.replace('\n', " ").as_bytes()).to_string()
}

/// Logs the counts of suppressed lines that are still pending, and waits until the log is written,
/// a second at most. Call it before the program ends.
pub fn flush() {
    log::logger().flush();
}

/// Target of the lines that a served program wrote. Their rate is limited for each run.
pub const PROGRAM_TARGET: &str = "program";

/// Maximum number of lines that a call site logs in each window. (DEBUG and TRACE lines are not
/// limited: the user asked for them.)
const MAX_LINES: u64 = 5;

/// Length of a window.
const WINDOW_LENGTH: Duration = Duration::from_secs(60);

/// Time for which a repeated line, with no other line between, is counted before it is logged
/// again.
const REPETITION_LENGTH: Duration = Duration::from_secs(300);

/// A log that a peer cannot flood: it limits the rate of each call site, and counts a line that is
/// repeated.
struct RateLimitedLog<L> {
    log: L,
    /// The writer of the log, if it has a thread of its own.
    writer: Option<BackgroundWriter>,
    limiter: Mutex<RateLimiter>,
}

impl<L: Log> RateLimitedLog<L> {
    fn limiter(&self) -> MutexGuard<'_, RateLimiter> {
        lock(&self.limiter)
    }

    fn log_limited(&self, record: &Record) {
        if record.level() > Level::Info {
            return self.log.log(record);
        }
        let text = record.args().to_string();
        let now = Instant::now();
        // Until the lines are logged, in the order in which they were counted.
        let mut limiter = self.limiter();
        self.log_suppressed(limiter.end_windows(Some(&text), now));
        if limiter.allow(record, text, now) {
            self.log.log(record);
        }
    }

    /// Logs how many lines each window suppressed.
    fn log_suppressed(&self, windows: Vec<Window>) {
        for Window {
            level,
            target,
            lines,
            last,
            ..
        } in windows
        {
            self.log.log(
                &Record::builder()
                    .level(level)
                    .target(&target)
                    .args(format_args!(
                        "suppressed {} similar lines; the last: {last}",
                        lines - MAX_LINES
                    ))
                    .build(),
            );
        }
    }
}

impl<L: Log> Log for RateLimitedLog<L> {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.log.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        if record.target() == PROGRAM_TARGET {
            return self.log.log(record);
        }
        if record.target().starts_with("rpc_") {
            return self.log_limited(record);
        }
        // amiquip logs text from the wire without escaping it.
        let message = escape(record.args().to_string().as_bytes()).to_string();
        let mut escaped = Record::builder();
        escaped
            .metadata(record.metadata().clone())
            .line(record.line());
        escaped.module_path_static(record.module_path_static());
        self.log_limited(&escaped.args(format_args!("{message}")).build());
    }

    fn flush(&self) {
        self.log_suppressed(self.limiter().end_windows(None, Instant::now()));
        self.log.flush();
        if let Some(writer) = &self.writer {
            writer.flush();
        }
    }
}

/// A place in the source that logs, a module and a line, and at what level.
type CallSite = (Option<&'static str>, Option<u32>, Level);

/// A fixed-window rate limiter, with a window for each call site, and one for a line that is
/// repeated.
#[derive(Default)]
struct RateLimiter {
    call_sites: HashMap<CallSite, Window>,
    /// For an operator; whoever waits at a prompt sees that something happens.
    counts_repetitions: bool,
    /// Since the latest line was logged.
    repetition: Option<Window>,
}

/// A **window** counts lines, the suppressed ones included: those of one call site, or those that
/// are the same.
struct Window {
    level: Level,
    target: String,
    start: Instant,
    lines: u64,
    last: String,
}

impl RateLimiter {
    /// Counts a line, and returns whether it may be logged. Called after `end_windows`: a
    /// repetition is one of this line.
    fn allow(&mut self, record: &Record, text: String, now: Instant) -> bool {
        let level = record.level();
        let target = record.target();
        let call_site = (record.module_path_static(), record.line(), level);
        let new = |lines, last| Window {
            level,
            target: target.into(),
            start: now,
            lines,
            last,
        };
        let window = match &mut self.repetition {
            Some(repetition) => repetition,
            None => self
                .call_sites
                .entry(call_site)
                .or_insert_with(|| new(0, String::new())),
        };
        window.lines += 1;
        if window.lines > MAX_LINES {
            window.last = text;
            return false;
        }
        self.repetition = self.counts_repetitions.then(|| new(MAX_LINES, text));
        true
    }

    /// Ends the windows that are over when the line `next` comes, or all, and returns those that
    /// suppressed lines.
    fn end_windows(&mut self, next: Option<&str>, now: Instant) -> Vec<Window> {
        let is_over =
            |window: &Window, length| next.is_none() || now.duration_since(window.start) >= length;
        let ends =
            |window: &mut Window| next != Some(&*window.last) || is_over(window, REPETITION_LENGTH);
        let repetition = self.repetition.take_if(ends).into_iter();
        let ended = self
            .call_sites
            .extract_if(|_, window| is_over(window, WINDOW_LENGTH))
            .map(|(_, window)| window);
        repetition
            .chain(ended)
            .filter(|window| window.lines > MAX_LINES)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stores the lines that it gets.
    #[derive(Default)]
    struct StoringLog(Mutex<Vec<String>>);

    impl Log for StoringLog {
        fn enabled(&self, _: &Metadata) -> bool {
            true
        }

        fn log(&self, record: &Record) {
            self.0.lock().unwrap().push(record.args().to_string());
        }

        fn flush(&self) {}
    }

    fn log_line(log: &dyn Log, target: &str, level: Level, message: &str) {
        log.log(
            &Record::builder()
                .target(target)
                .level(level)
                .args(format_args!("{message}"))
                .build(),
        );
    }

    #[test]
    fn amiquips_lines_are_escaped_and_floods_are_limited() {
        let log = RateLimitedLog {
            log: StoringLog::default(),
            writer: None,
            limiter: Mutex::default(),
        };
        log_line(&log, "amiquip::io_loop", Level::Debug, "\x1b[2J");
        (0..9).for_each(|n| {
            log_line(
                &log,
                "rpc_common::connection",
                Level::Warn,
                &format!("lost {n}"),
            );
        });
        (0..9).for_each(|_| log_line(&log, "rpc_common::connection", Level::Debug, "lost"));
        let lines = log.log.0.lock().unwrap();
        assert_eq!(lines[0], r"\u{1b}[2J");
        assert_eq!(lines.len(), 1 + 5 + 9);
    }

    #[test]
    fn a_panic_is_one_escaped_line() {
        let text = describe_panic("panicked at src/a.rs:1:\n\x1b[2J");
        assert_eq!(text, r"panicked at src/a.rs:1: \u{1b}[2J");
    }

    #[test]
    fn flush_logs_the_counts_that_are_pending_once() {
        let log = RateLimitedLog {
            log: StoringLog::default(),
            writer: None,
            limiter: Mutex::default(),
        };
        (1..=7).for_each(|n| log_line(&log, "rpc_common", Level::Info, &format!("lost {n}")));
        log.flush();
        log.flush();
        let lines = log.log.0.lock().unwrap();
        assert_eq!(lines[5..], ["suppressed 2 similar lines; the last: lost 7"]);
    }

    #[test]
    fn a_line_that_is_repeated_is_counted_until_another_one_is_logged() {
        let limiter = Mutex::new(RateLimiter {
            counts_repetitions: true,
            ..RateLimiter::default()
        });
        let log = RateLimitedLog {
            log: StoringLog::default(),
            writer: None,
            limiter,
        };
        for line in ["lost", "lost", "lost", "connected", "lost"] {
            log_line(&log, "rpc_common", Level::Warn, line);
            log_line(&log, "rpc_common", Level::Debug, "trying");
        }
        let lines = log.log.0.lock().unwrap();
        let lines: Vec<_> = lines.iter().filter(|line| *line != "trying").collect();
        assert_eq!(
            lines,
            [
                "lost",
                "suppressed 2 similar lines; the last: lost",
                "connected",
                "lost"
            ]
        );
    }

    /// Counts a line of this call site; returns whether it is logged, and what was suppressed
    /// before.
    fn count(
        limiter: &mut RateLimiter,
        line: u32,
        text: &str,
        now: Instant,
    ) -> (bool, Vec<(u64, String)>) {
        let ended = limiter.end_windows(Some(text), now);
        let ended = ended
            .into_iter()
            .map(|window| (window.lines - MAX_LINES, window.last))
            .collect();
        (
            limiter.allow(
                &Record::builder().line(Some(line)).build(),
                text.into(),
                now,
            ),
            ended,
        )
    }

    #[test]
    fn a_line_that_is_repeated_is_logged_again_after_five_minutes() {
        let mut limiter = RateLimiter {
            counts_repetitions: true,
            ..RateLimiter::default()
        };
        let start = Instant::now();
        let mut lost_at = |seconds| {
            count(
                &mut limiter,
                1,
                "lost",
                start + Duration::from_secs(seconds),
            )
        };
        assert_eq!(lost_at(0), (true, vec![]));
        for seconds in 1..300 {
            assert_eq!(lost_at(seconds), (false, vec![]));
        }
        assert_eq!(lost_at(300), (true, vec![(299, "lost".into())]));
        assert_eq!(lost_at(301), (false, vec![]));
    }

    #[test]
    fn a_call_site_logs_five_lines_a_minute_and_the_others_are_counted() {
        let mut limiter = RateLimiter::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let logged = (0..100)
            .filter(|n| count(&mut limiter, 1, &format!("lost {n}"), at(0)).0)
            .count();
        assert_eq!(logged, 5);
        assert_eq!(
            count(&mut limiter, 2, "found", at(1)),
            (true, vec![]),
            "another call site"
        );
        assert_eq!(count(&mut limiter, 1, "lost 100", at(59)), (false, vec![]));
        assert_eq!(
            count(&mut limiter, 1, "lost 101", at(60)),
            (true, vec![(96, "lost 100".into())])
        );
        assert_eq!(
            count(&mut limiter, 1, "lost 102", at(200)),
            (true, vec![]),
            "a new window"
        );
    }
}
