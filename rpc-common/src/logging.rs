//! The log of both programs: to standard error, without secrets.

use env_logger::Builder;
use log::{Level, LevelFilter};
use std::io::Write;
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
        self.builder(level).format_target(false).format_timestamp_millis().init();
    }

    /// Starts a log for somebody at a prompt: lines of the same form as the errors of `program`.
    pub fn start_for_prompt(&self, program: &'static str, level: LevelFilter) {
        self.builder(level)
            .format(move |line, record| match record.level() {
                Level::Warn => writeln!(line, "{program}: warning: {}", record.args()),
                _ => writeln!(line, "{program}: {}", record.args()),
            })
            .init();
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
