//! The log of both programs: to standard error, without secrets, and without floods.

use crate::message::escape;
use env_logger::Builder;
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::collections::HashMap;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{panic, thread};

/// Sends panics to the log. amiquip's thread may panic when both ends close at once; that is no news,
/// for its connection's error says more.
pub fn log_panics() {
    panic::set_hook(Box::new(|panic| {
        let level = match thread::current().name() {
            Some("amiquip-io") => Level::Debug,
            _ => Level::Error,
        };
        log::log!(level, "{panic}");
    }));
}

/// The options of both programs that say how much is logged.
#[derive(Clone, Debug, clap::Args)]
pub struct LogOptions {
    /// More log on standard error; twice for still more; RUST_LOG rules over it
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl LogOptions {
    /// Starts a log for an operator: with the time and the level of each line.
    pub fn start_for_operator(&self, level: LevelFilter) {
        start(self.builder(level).format_target(false).format_timestamp_millis());
    }

    /// Starts a log for somebody at a prompt: lines of the same form as the errors of `program`.
    pub fn start_for_prompt(&self, program: &'static str, level: LevelFilter) {
        start(self.builder(level).format(move |line, record| match record.level() {
            Level::Warn => writeln!(line, "{program}: warning: {}", record.args()),
            _ => writeln!(line, "{program}: {}", record.args()),
        }));
    }

    fn builder(&self, level: LevelFilter) -> Builder {
        let steps = usize::from(self.verbose);
        let level = LevelFilter::iter().nth(level as usize + steps).unwrap_or(LevelFilter::Trace);
        let mut builder = Builder::new();
        builder
            .filter_level(level)
            .filter_module("amiquip", LevelFilter::Off) // its warnings say our errors a second time
            .filter_module("mio", LevelFilter::Off)
            .parse_default_env()
            // At debug its handshake logs the password, so that no RUST_LOG may have it.
            .filter_module("amiquip::io_loop::handshake_state", LevelFilter::Info);
        builder
    }
}

fn start(builder: &mut Builder) {
    let log = builder.build();
    log::set_max_level(log.filter());
    let log = LimitedLog { log, limiter: Mutex::default() };
    log::set_boxed_logger(Box::new(log)).expect("a program starts its log once");
}

/// How many lines from one place in the source are logged in each period, and then only counted. This is for lines of an
/// INFO level and above; who asks for more gets all of it.
const MOST_LINES: u64 = 5;
const PERIOD: Duration = Duration::from_secs(60);

/// A log that no peer can flood.
struct LimitedLog<L> {
    log: L,
    limiter: Mutex<Limiter>,
}

impl<L: Log> LimitedLog<L> {
    fn limiter(&self) -> MutexGuard<'_, Limiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log_limited(&self, record: &Record) {
        if record.level() > Level::Info || self.limiter().admit(record, Instant::now()) {
            self.log.log(record);
        }
    }

    /// Logs how many lines were not logged in periods that are over.
    fn log_counts(&self) {
        let counts = self.limiter().take_counts(Instant::now());
        for Lines { level, target, count, latest, .. } in counts {
            let args = format_args!("{count} more like this were not logged: {latest}");
            self.log.log(&Record::builder().level(level).target(&target).args(args).build());
        }
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
        self.log_counts();
        if record.target().starts_with("rpc_") {
            return self.log_limited(record);
        }
        // amiquip logs what came from the wire as it is.
        let escaped = escape(record.args().to_string().as_bytes()).to_string();
        let mut copy = Record::builder();
        copy.metadata(record.metadata().clone()).line(record.line());
        copy.module_path(record.module_path());
        self.log_limited(&copy.args(format_args!("{escaped}")).build());
    }

    fn flush(&self) {
        self.log_counts();
        self.log.flush();
    }
}

/// A place in the source: a module and a line.
type Place = (String, Option<u32>);

/// Counts the lines of each place.
#[derive(Default)]
struct Limiter(HashMap<Place, Lines>);

/// The lines of a place in its current period.
struct Lines {
    level: Level,
    target: String,
    since: Instant,
    /// How many there were; when it is taken, how many were not logged.
    count: u64,
    /// The latest of those that were not logged.
    latest: String,
}

impl Limiter {
    /// Whether one more line is to be logged.
    fn admit(&mut self, line: &Record, now: Instant) -> bool {
        let place = (line.module_path().unwrap_or_default().to_owned(), line.line());
        let lines = self.0.entry(place).or_insert_with(|| Lines {
            level: line.level(),
            target: line.target().to_owned(),
            since: now,
            count: 0,
            latest: String::new(),
        });
        if lines.count <= MOST_LINES && now.duration_since(lines.since) >= PERIOD {
            (lines.since, lines.count) = (now, 0);
        }
        lines.count += 1;
        if lines.count > MOST_LINES {
            lines.latest = line.args().to_string();
        }
        lines.count <= MOST_LINES
    }

    /// Takes the counts of the lines that were not logged in periods that are over.
    fn take_counts(&mut self, now: Instant) -> Vec<Lines> {
        let is_over =
            |lines: &Lines| lines.count > MOST_LINES && now.duration_since(lines.since) >= PERIOD;
        let over = self.0.extract_if(|_, lines| is_over(lines));
        over.map(|(_, lines)| Lines { count: lines.count - MOST_LINES, ..lines }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps the lines that it gets.
    #[derive(Default)]
    struct Kept(Mutex<Vec<String>>);

    impl Log for Kept {
        fn enabled(&self, _: &Metadata) -> bool {
            true
        }

        fn log(&self, record: &Record) {
            self.0.lock().unwrap().push(record.args().to_string());
        }

        fn flush(&self) {}
    }

    #[test]
    fn what_amiquip_logs_is_escaped_and_floods_end() {
        let log = LimitedLog { log: Kept::default(), limiter: Mutex::default() };
        let say = |target, level| {
            let args = format_args!("\x1b[2J");
            log.log(&Record::builder().target(target).level(level).args(args).build());
        };
        say("amiquip::io_loop", Level::Debug);
        (0..9).for_each(|_| say("rpc_common::broker", Level::Warn));
        (0..9).for_each(|_| say("rpc_common::broker", Level::Debug));
        let kept = log.log.0.lock().unwrap();
        assert_eq!(kept[0], r"\u{1b}[2J");
        assert_eq!(kept.len(), 1 + 5 + 9);
    }

    #[test]
    fn five_lines_a_minute_from_a_place_are_logged_and_the_rest_is_counted() {
        let (mut limiter, begin) = (Limiter::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut admit = |place, text: &str, now| {
            let args = format_args!("{text}");
            let record = Record::builder().line(Some(place)).args(args).build();
            limiter.admit(&record, now)
        };
        assert_eq!((0..100).filter(|_| admit(1, "lost", at(0))).count(), 5);
        assert!(admit(2, "another place", at(1)));
        assert!(limiter.take_counts(at(59)).is_empty(), "the period is not over");
        let counts = limiter.take_counts(at(60));
        assert_eq!(
            counts.iter().map(|lines| (lines.count, &*lines.latest)).collect::<Vec<_>>(),
            [(95, "lost")]
        );
        let mut admit = |now| limiter.admit(&Record::builder().line(Some(1)).build(), now);
        assert!(admit(at(61)), "a new period");
        assert!(limiter.take_counts(at(200)).is_empty());
    }
}
