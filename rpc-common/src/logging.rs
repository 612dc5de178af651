//! The log of both programs: on standard error, without passwords, and limited in rate.

use crate::background_writer::BackgroundWriter;
use crate::sync::lock;
use crate::text::escape;
use env_logger::{Builder, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
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
    /// Starts a log for an operator: each line has a time and a level. Whoever logs does not wait for its reader.
    pub fn start_for_operator(&self, level: LevelFilter) {
        let writer = BackgroundWriter::start(io::stderr());
        let mut builder = self.builder(level);
        builder.format_target(false).format_timestamp_millis().target(Target::Pipe(Box::new(writer.clone())));
        start(&mut builder, Some(writer));
    }

    /// Starts a log for a user at a prompt: the lines look like the errors of `program`. With `--verbose` it is at debug level
    /// at least.
    pub fn start_for_prompt(&self, program: &'static str, level: LevelFilter) {
        let mut builder = self.builder(if self.verbose > 0 { LevelFilter::Info } else { level });
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
            // After RUST_LOG, which must not enable it: at debug level the handshake logs the password.
            .filter_module("amiquip::io_loop::handshake_state", LevelFilter::Info);
        builder
    }
}

/// What a line on standard error begins with: on a terminal, it replaces a line that shows progress.
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

fn start(builder: &mut Builder, writer: Option<BackgroundWriter>) {
    let log = builder.build();
    log::set_max_level(log.filter());
    let log = RateLimitedLog { log, writer, limiter: Mutex::default() };
    log::set_boxed_logger(Box::new(log)).expect("a program starts its log once");
}

/// Logs panics. A panic of amiquip's thread is logged at debug level: it occurs when both sides close at once, and the
/// connection's error says more.
pub fn log_panics() {
    panic::set_hook(Box::new(|panic| {
        let level = match thread::current().name() {
            Some("amiquip-io") => Level::Debug,
            _ => Level::Error,
        };
        log::log!(level, "{panic}");
    }));
}

/// Logs the counts of suppressed lines that are still pending, and waits until the log is written, a second at most. Call it
/// before the program ends.
pub fn flush() {
    log::logger().flush();
}

/// The target of lines that a served program wrote. Their rate is limited for each run.
pub const PROGRAM_TARGET: &str = "program";

/// The number of lines that a call site may log in each window. DEBUG and TRACE lines are not limited: the user asked
/// for them.
const MAX_LINES: u64 = 5;
const WINDOW_LENGTH: Duration = Duration::from_secs(60);

/// A log that a peer cannot flood: it limits the rate of each call site.
struct RateLimitedLog<L> {
    log: L,
    /// What `log` writes to, if that is a thread of its own.
    writer: Option<BackgroundWriter>,
    limiter: Mutex<RateLimiter>,
}

impl<L: Log> RateLimitedLog<L> {
    fn limiter(&self) -> MutexGuard<'_, RateLimiter> {
        lock(&self.limiter)
    }

    fn log_limited(&self, record: &Record) {
        if record.level() > Level::Info || self.limiter().allow(record, Instant::now()) {
            self.log.log(record);
        }
    }

    /// Ends the windows that are at least `min_age` old, and logs how many lines each suppressed.
    fn end_windows(&self, min_age: Duration) {
        let ended = self.limiter().end_windows(Instant::now(), min_age);
        for Window { level, target, lines, last_suppressed, .. } in ended {
            let suppressed = lines - MAX_LINES;
            let args = format_args!("suppressed {suppressed} similar lines; the last: {last_suppressed}");
            self.log.log(&Record::builder().level(level).target(&target).args(args).build());
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
        self.end_windows(WINDOW_LENGTH);
        if record.target().starts_with("rpc_") {
            return self.log_limited(record);
        }
        // amiquip logs text from the wire without escaping it.
        let message = escape(record.args().to_string().as_bytes()).to_string();
        let mut escaped = Record::builder();
        escaped.metadata(record.metadata().clone()).line(record.line());
        escaped.module_path_static(record.module_path_static());
        self.log_limited(&escaped.args(format_args!("{message}")).build());
    }

    fn flush(&self) {
        self.end_windows(Duration::ZERO);
        self.log.flush();
        if let Some(writer) = &self.writer {
            writer.flush();
        }
    }
}

/// A place in the source that logs: a module and a line.
type CallSite = (Option<&'static str>, Option<u32>);

/// A fixed-window rate limiter, with a window for each call site.
#[derive(Default)]
struct RateLimiter(HashMap<CallSite, Window>);

/// A **window** counts the lines of one call site, the suppressed ones included.
struct Window {
    level: Level,
    target: String,
    start: Instant,
    lines: u64,
    last_suppressed: String,
}

impl RateLimiter {
    /// Counts a line, and returns whether it may be logged.
    fn allow(&mut self, record: &Record, now: Instant) -> bool {
        let call_site = (record.module_path_static(), record.line());
        let window = self.0.entry(call_site).or_insert_with(|| Window {
            level: record.level(),
            target: record.target().to_owned(),
            start: now,
            lines: 0,
            last_suppressed: String::new(),
        });
        window.lines += 1;
        if window.lines <= MAX_LINES {
            return true;
        }
        window.last_suppressed = record.args().to_string();
        false
    }

    /// Ends the windows that are at least `min_age` old, and returns those that suppressed lines.
    fn end_windows(&mut self, now: Instant, min_age: Duration) -> Vec<Window> {
        let ended = self.0.extract_if(|_, window| now.duration_since(window.start) >= min_age);
        ended.map(|(_, window)| window).filter(|window| window.lines > MAX_LINES).collect()
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
        let args = format_args!("{message}");
        log.log(&Record::builder().target(target).level(level).args(args).build());
    }

    #[test]
    fn amiquips_lines_are_escaped_and_floods_are_limited() {
        let log = RateLimitedLog { log: StoringLog::default(), writer: None, limiter: Mutex::default() };
        log_line(&log, "amiquip::io_loop", Level::Debug, "\x1b[2J");
        (0..9).for_each(|_| log_line(&log, "rpc_common::connection", Level::Warn, "lost"));
        (0..9).for_each(|_| log_line(&log, "rpc_common::connection", Level::Debug, "lost"));
        let lines = log.log.0.lock().unwrap();
        assert_eq!(lines[0], r"\u{1b}[2J");
        assert_eq!(lines.len(), 1 + 5 + 9);
    }

    #[test]
    fn flush_logs_the_counts_that_are_pending_once() {
        let log = RateLimitedLog { log: StoringLog::default(), writer: None, limiter: Mutex::default() };
        (1..=7).for_each(|n| log_line(&log, "rpc_common", Level::Info, &format!("lost {n}")));
        log.flush();
        log.flush();
        let lines = log.log.0.lock().unwrap();
        assert_eq!(lines[5..], ["suppressed 2 similar lines; the last: lost 7"]);
    }

    #[test]
    fn a_call_site_logs_five_lines_a_minute_and_the_others_are_counted() {
        let (mut limiter, start) = (RateLimiter::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut allow = |line, now| {
            let args = format_args!("lost");
            limiter.allow(&Record::builder().line(Some(line)).args(args).build(), now)
        };
        assert_eq!((0..100).filter(|_| allow(1, at(0))).count(), 5);
        assert!(allow(2, at(1)), "another call site");
        assert!(limiter.end_windows(at(59), WINDOW_LENGTH).is_empty());
        let ended = limiter.end_windows(at(60), WINDOW_LENGTH);
        let counts: Vec<_> = ended.iter().map(|window| (window.lines, &*window.last_suppressed)).collect();
        assert_eq!(counts, [(100, "lost")]);
        let mut allow = |now| limiter.allow(&Record::builder().line(Some(1)).build(), now);
        assert!(allow(at(61)), "a new window");
        assert!(limiter.end_windows(at(200), WINDOW_LENGTH).is_empty());
    }
}
