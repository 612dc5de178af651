//! What each process of a program needs, and the failures that callers get.

use super::process::{Groups, Invocation};
use super::stop::StopReason;
use crate::handler::Caller;
use rpc_common::message::{ErrorCode, Failure, Reply};
use rpc_common::options::{parse_duration, parse_size, parse_timeout};
use rpc_common::text::{escape, format_duration};
use std::ffi::{CStr, CString, OsString};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

/// Maximum length in bytes of the sentence of a program that fails.
pub(super) const MAX_SENTENCE: usize = 4 << 10;

/// Which program to serve, and its limits.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "A program")]
pub struct ProgramOptions {
    /// Stop a run that takes longer
    #[arg(long, value_name = "DURATION", default_value = "25m", value_parser = parse_timeout, requires = "command")]
    pub time_limit: Duration,

    /// Send SIGKILL this long after SIGTERM
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration, requires = "command")]
    pub kill_after: Duration,

    /// Largest request; a larger one gets the error too-large: 512KiB, 8MiB
    #[arg(long, value_name = "SIZE", default_value = "8MiB", value_parser = parse_size, requires = "command")]
    pub max_request: usize,

    /// Largest reply; a larger one becomes the error too-large
    #[arg(long, value_name = "SIZE", default_value = "8MiB", value_parser = parse_size, requires = "command")]
    pub max_reply: usize,

    /// Content type of replies
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "application/octet-stream",
        requires = "command"
    )]
    #[arg(value_parser = rpc_common::options::parse_content_type)]
    pub content_type: String,

    /// Keep the program running: it handles one request after the other, as lines of JSON
    #[arg(long, requires = "command")]
    pub persistent: bool,

    /// End a persistent program after N replies, and start another one
    #[arg(long, value_name = "N", requires = "persistent")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub max_requests: Option<u64>,

    /// How long a persistent program may take to be ready
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = parse_timeout, requires = "persistent")]
    pub ready_timeout: Duration,

    /// Program to run for each request, with the request as its standard input, and its arguments
    #[arg(last = true, value_name = "PROGRAM")]
    pub command: Vec<OsString>,
}

/// What is called when something happens to the processes of a program, on any thread.
pub struct ProgramCallbacks {
    /// A process was stopped at a limit.
    pub on_stopped: Box<dyn Fn() + Send + Sync>,
    /// A process of a persistent program is started.
    pub on_start: Box<dyn Fn(StartReason) + Send + Sync>,
}

impl Default for ProgramCallbacks {
    fn default() -> Self {
        ProgramCallbacks {
            on_stopped: Box::new(|| {}),
            on_start: Box::new(|_| {}),
        }
    }
}

/// Why a process of a persistent program is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartReason {
    /// It is the first one of a worker.
    First,
    /// The one before could not be started, or was not ready in time.
    NotReady,
    /// The one before ended by itself.
    Exited,
    /// The one before was stopped at a limit.
    Stopped,
    /// The one before wrote something else than the reply.
    Disagreed,
    /// The one before had handled `--max-requests`.
    MaxRequests,
}

impl StartReason {
    /// All reasons.
    pub const ALL: [Self; 6] = [
        Self::First,
        Self::NotReady,
        Self::Exited,
        Self::Stopped,
        Self::Disagreed,
        Self::MaxRequests,
    ];

    /// The reason in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            StartReason::First => "first",
            StartReason::NotReady => "not-ready",
            StartReason::Exited => "exited",
            StartReason::Stopped => "stopped",
            StartReason::Disagreed => "disagreed",
            StartReason::MaxRequests => "max-requests",
        }
    }
}

/// What each process of a program needs.
pub(crate) struct Definition {
    pub(super) options: ProgramOptions,
    pub(super) path: PathBuf,
    pub(super) queue: String,
    /// The path, the arguments and the variables of the server's environment, as execve(2) takes
    /// them.
    pub(super) path_c: CString,
    pub(super) args: Vec<CString>,
    pub(super) environment: Vec<CString>,
    pub(super) groups: Arc<Groups>,
    pub(super) callbacks: ProgramCallbacks,
}

impl Definition {
    pub(super) fn invocation<'a>(&'a self, environment: &'a [&'a CStr]) -> Invocation<'a> {
        Invocation {
            path: &self.path_c,
            args: &self.args,
            environment,
        }
    }

    pub(super) fn command_line(&self) -> String {
        let words = self
            .options
            .command
            .iter()
            .map(|word| word.as_encoded_bytes());
        escape(&words.collect::<Vec<_>>().join(&b' ')).to_string()
    }

    /// The reply, unless it is too large.
    pub(super) fn check_size(&self, reply: Reply) -> Reply {
        match reply {
            Ok(answer) if answer.body.len() > self.options.max_reply => Err(self.reply_too_large()),
            reply => reply,
        }
    }

    pub(super) fn reply_too_large(&self) -> Failure {
        let message = format!(
            "the reply is too large: {} bytes are accepted here",
            self.options.max_reply
        );
        Failure::new(ErrorCode::TooLarge, message)
    }

    /// The failure of a program that was stopped. Of a server that stops, the request is given back.
    pub(super) fn stopped(&self, reason: StopReason, caller: &Caller) -> Failure {
        (self.callbacks.on_stopped)();
        let reason = match reason {
            StopReason::AtTimeLimit => format!(
                "it ran longer than {}",
                format_duration(self.options.time_limit)
            ),
            StopReason::AtDeadline => "the caller's deadline has passed".into(),
            StopReason::CallerGone => "its caller has gone".into(),
            StopReason::Cancelled | StopReason::NotNeeded => {
                caller.give_back();
                "the server stops".into() // the reply is dropped
            }
            StopReason::OutputTooLarge => return self.reply_too_large(),
        };
        // A caller that has gone gets no answer; the code is for the log and the metrics.
        Failure::new(
            ErrorCode::TimeLimit,
            format!("the program was stopped: {reason}"),
        )
    }
}

/// The caller's error for a program that failed. The exit codes with a meaning are those of
/// sysexits(3).
pub(super) fn failure(status: ExitStatus, output: Vec<u8>) -> Failure {
    let Some(exit_code) = status.code() else {
        let signal = status.to_string(); // such as "signal: 11 (SIGSEGV) (core dumped)"
        let signal = signal.strip_prefix("signal: ").unwrap_or(&signal);
        return Failure::new(
            ErrorCode::Failed,
            format!("the program was ended by signal {signal}"),
        );
    };
    let code = match exit_code {
        65 => ErrorCode::InvalidArgument,  // EX_DATAERR
        75 => ErrorCode::Unavailable,      // EX_TEMPFAIL
        77 => ErrorCode::PermissionDenied, // EX_NOPERM
        _ => ErrorCode::Failed,
    };
    let mut sentence = String::from_utf8(output).unwrap_or_default();
    let end = (0..=MAX_SENTENCE.min(sentence.len()))
        .rev()
        .find(|index| sentence.is_char_boundary(*index));
    sentence.truncate(end.unwrap_or_default());
    let message = match sentence.trim() {
        "" => format!("the program failed with exit code {exit_code}"),
        sentence => sentence.to_owned(),
    };
    Failure::new(code, message).with_exit_code(exit_code)
}
