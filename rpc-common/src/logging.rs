//! The log of both programs: on standard error, without passwords, and limited in rate. What it
//! leaves out is counted.

use crate::background_writer::BackgroundWriter;
use crate::log_limits::{Dropped, Line, QueueShare, RateLimiter, Repetitions, Source, Suppressed};
use crate::stdio;
use crate::sync::lock;
use crate::text::{escape, escape_up_to};
use env_logger::{Builder, Target};
use log::kv::Key;
use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Condvar, Mutex};
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
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start_for_operator(&self, level: LevelFilter) -> io::Result<()> {
        let writer = BackgroundWriter::start(stdio::stderr())?;
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
        start(&mut builder, Some(writer))
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
        builder.target(Target::Pipe(Box::new(stdio::stderr())));
        builder.format(move |line, record| match record.level() {
            Level::Warn => writeln!(line, "{clear}{program}: warning: {}", record.args()),
            _ => writeln!(line, "{clear}{program}: {}", record.args()),
        });
        // Without a writer no thread is started.
        let _ = start(&mut builder, None);
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
            // password. Its errors repeat ours.
            .filter_module("amiquip::io_loop::handshake_state", LevelFilter::Off);
        builder
    }
}

/// The start of a line on standard error: on a terminal, it replaces a line that shows
/// progress.
pub fn start_of_line() -> &'static str {
    if is_interactive() && is_in_foreground() {
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

/// Whether this process may draw on the terminal of its standard error. A background job would draw
/// over the shell's prompt, or be stopped (`stty tostop`).
pub fn is_in_foreground() -> bool {
    tcgetpgrp(io::stderr()).map_or(true, |foreground| foreground == getpgrp())
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

fn start(builder: &mut Builder, writer: Option<BackgroundWriter>) -> io::Result<()> {
    let log = builder.build();
    log::set_max_level(log.filter());
    let is_for_operator = writer.is_some();
    let log = Arc::new(LimitedLog::new(log, writer));
    if is_for_operator {
        let log = log.clone();
        thread::Builder::new()
            .name("log".into())
            .spawn(move || log.report_when_due())?;
    }
    log::set_boxed_logger(Box::new(log)).expect("a program starts its log once");
    Ok(())
}

/// Logs panics. Those below amiquip are logged at debug level, because the connection's error says
/// more: its thread panics when both sides close at once, and a timer without a thread.
pub fn log_panics() {
    panic::set_hook(Box::new(|panic| {
        let is_amiquips = thread::current().name() == Some("amiquip-io");
        let is_timers = panic.to_string().contains("failed to spawn thread");
        let level = if is_amiquips || is_timers {
            Level::Debug
        } else {
            Level::Error
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

/// Key of the outcome of a request, in a line about that request. The rate of such lines is limited
/// for each outcome.
pub const OUTCOME_KEY: &str = "outcome";

/// Maximum number of lines that wait for the reader. The rest of the queue is for the counts of
/// dropped lines.
const MAX_WAITING: usize = BackgroundWriter::CAPACITY - 100;

/// Maximum number of lines in the queue when a served program's line is added: the program cannot
/// displace the server's own lines.
const MAX_WAITING_FOR_PROGRAM: usize = BackgroundWriter::CAPACITY / 2;

/// Interval at which pending counts are looked at.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// A log that a peer cannot flood: it limits the rate of each call site, and counts a line that is
/// repeated. And a log that does not wait for its reader: lines are dropped and counted.
struct LimitedLog<L> {
    log: L,
    /// The writer of the log, if it has a thread of its own.
    writer: Option<BackgroundWriter>,
    limits: Mutex<Limits>,
    /// Notified when the first count is pending.
    is_pending: Condvar,
}

struct Limits {
    rate: RateLimiter,
    own_lines: QueueShare,
    program_lines: QueueShare,
}

impl Limits {
    /// Whether there are counts that were not logged.
    fn is_pending(&self) -> bool {
        self.own_lines.has_dropped()
            || self.program_lines.has_dropped()
            || self.rate.has_suppressed()
    }
}

impl<L: Log> LimitedLog<L> {
    fn new(log: L, writer: Option<BackgroundWriter>) -> Self {
        let repetitions = match writer {
            Some(_) => Repetitions::Counted,
            None => Repetitions::Logged,
        };
        LimitedLog {
            log,
            writer,
            limits: Mutex::new(Limits {
                rate: RateLimiter::new(repetitions),
                own_lines: QueueShare::new(MAX_WAITING),
                program_lines: QueueShare::new(MAX_WAITING_FOR_PROGRAM),
            }),
            is_pending: Condvar::new(),
        }
    }

    /// Logs counts when they are due, also if no other line is logged. Does not return.
    fn report_when_due(&self) {
        loop {
            let limits = lock(&self.limits);
            drop(
                self.is_pending
                    .wait_while(limits, |limits| !limits.is_pending()),
            );
            thread::sleep(REPORT_INTERVAL);
            self.report(Instant::now());
        }
    }

    /// Logs the counts that are due.
    fn report(&self, now: Instant) {
        let mut limits = lock(&self.limits);
        let suppressed = limits.rate.end_windows(now);
        self.log_suppressed(&mut limits, suppressed);
        self.end_gaps(&mut limits);
    }

    /// Logs how many lines each window suppressed.
    fn log_suppressed(&self, limits: &mut Limits, windows: Vec<Suppressed>) {
        for suppressed in windows {
            let line = Line {
                level: suppressed.level,
                target: &suppressed.target,
                text: &suppressed.message(),
            };
            self.add(limits, line);
        }
    }

    /// Adds a line to the queue to the reader, or drops and counts it.
    fn add(&self, limits: &mut Limits, line: Line) {
        self.end_gaps(limits);
        let waiting = self.waiting();
        let share = match line.target {
            PROGRAM_TARGET => &mut limits.program_lines,
            _ => &mut limits.own_lines,
        };
        if share.admit(line.target, waiting) {
            self.write(line);
        }
    }

    /// Logs how many lines were dropped, if the reader has gone on since.
    fn end_gaps(&self, limits: &mut Limits) {
        let waiting = self.waiting();
        self.log_dropped("lines", limits.own_lines.end_gap(waiting));
        self.log_dropped("lines of programs", limits.program_lines.end_gap(waiting));
    }

    fn log_dropped(&self, what: &str, dropped: Option<Dropped>) {
        if let Some(Dropped { target, count }) = dropped {
            self.write(Line {
                level: Level::Warn,
                target: &target,
                text: &format!("dropped {count} {what}: the reader of the log was too slow"),
            });
        }
    }

    fn write(&self, line: Line) {
        let Line {
            level,
            target,
            text,
        } = line;
        let mut record = Record::builder();
        record.level(level).target(target);
        self.log.log(&record.args(format_args!("{text}")).build());
    }

    /// The number of lines that wait for the reader.
    fn waiting(&self) -> usize {
        self.writer.as_ref().map_or(0, BackgroundWriter::waiting)
    }
}

impl<L: Log> Log for LimitedLog<L> {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.log.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Before the lock: this may panic, and a panic is logged.
        let text = record.args().to_string();
        let is_program = record.target() == PROGRAM_TARGET;
        let text = if is_program || record.target().starts_with("rpc_") {
            text
        } else {
            // amiquip logs text from the wire without escaping it.
            escape(text.as_bytes()).to_string()
        };
        let line = Line {
            level: record.level(),
            target: record.target(),
            text: &text,
        };
        // DEBUG and TRACE lines are not limited: the user asked for them.
        let source = (!is_program && record.level() <= Level::Info).then(|| source(record));
        let now = Instant::now();
        // Until the lines are logged, in the order in which they were counted.
        let mut limits = lock(&self.limits);
        let was_pending = limits.is_pending();
        let is_allowed = source.is_none_or(|source| {
            let (is_allowed, suppressed) = limits.rate.count(source, line, now);
            self.log_suppressed(&mut limits, suppressed);
            is_allowed
        });
        if is_allowed {
            self.add(&mut limits, line);
        }
        if !was_pending && limits.is_pending() {
            self.is_pending.notify_one();
        }
    }

    fn flush(&self) {
        let mut limits = lock(&self.limits);
        let suppressed = limits.rate.end_all();
        self.log_suppressed(&mut limits, suppressed);
        self.log_dropped("lines", limits.own_lines.take_dropped());
        self.log_dropped("lines of programs", limits.program_lines.take_dropped());
        drop(limits);
        self.log.flush();
        if let Some(writer) = &self.writer {
            writer.flush();
        }
    }
}

/// The source of a line whose rate is limited.
fn source(record: &Record) -> Source {
    let outcome = record.key_values().get(Key::from_str(OUTCOME_KEY));
    match outcome {
        Some(outcome) => Source::Request(outcome.to_string()),
        None => Source::CallSite(record.module_path_static(), record.line(), record.level()),
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
        let log = LimitedLog::new(StoringLog::default(), None);
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
        let log = LimitedLog::new(StoringLog::default(), None);
        (1..=7).for_each(|n| log_line(&log, "rpc_common", Level::Info, &format!("lost {n}")));
        log.flush();
        log.flush();
        let lines = log.log.0.lock().unwrap();
        assert_eq!(lines[5..], ["suppressed 2 similar lines; the last: lost 7"]);
    }

    #[test]
    fn a_count_is_logged_when_its_window_ends() {
        let log = LimitedLog::new(StoringLog::default(), None);
        let log_failure = |n| {
            log.log(
                &Record::builder()
                    .target("rpc_server")
                    .level(Level::Warn)
                    .key_values(&[(OUTCOME_KEY, "failed")])
                    .args(format_args!("request[{n}]: failed"))
                    .build(),
            );
        };
        (1..=150).for_each(log_failure);
        log.report(Instant::now() + Duration::from_secs(60));
        let lines = log.log.0.lock().unwrap();
        assert_eq!(lines.len(), 101);
        assert_eq!(
            lines[100],
            "suppressed 50 similar lines (failed); the last: request[150]: failed"
        );
    }

    #[test]
    fn a_line_that_is_repeated_is_counted_until_another_one_is_logged() {
        let log = LimitedLog::new(StoringLog::default(), None);
        lock(&log.limits).rate = RateLimiter::new(Repetitions::Counted);
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
}
