//! Exit codes: one documented type, printed by `--help` and repeated in the documentation.

use crate::connection::{Error, ErrorKind};
use crate::logging;
use crate::stdio;
use crate::text::mask_passwords;
use signal_hook::low_level::{self, emulate_default_handler};
use std::fmt::Display;
use std::io::Write;
use std::{fs, process};

/// An **exit code** tells a script how a program ended.
///
/// The codes are ordered: a run with many calls ends with the largest code of its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ExitCode {
    /// Every call was answered, or the server was stopped gracefully.
    Success = 0,
    /// The server answered with an error, or with something that is not an answer.
    RemoteError = 1,
    /// The command line, a file that it names, the environment, or a line of input is invalid.
    Usage = 2,
    /// The client did not reach the broker, or was refused. The server was refused, and retrying
    /// cannot help.
    Unreachable = 3,
    /// The request queue did not accept the request.
    NotAccepted = 4,
    /// The deadline passed before the answer arrived.
    NoAnswer = 5,
    /// An answer, or the help, could not be written to standard output.
    Output = 6,
    /// Ended by SIGHUP.
    HungUp = 129,
    /// Ended by SIGINT.
    Interrupted = 130,
    /// The reader of standard output has closed it; 141 is what a shell reports for SIGPIPE.
    BrokenPipe = 141,
    /// Ended by SIGTERM.
    Terminated = 143,
}

/// Exit codes of rpc-client and their meaning.
pub const CLIENT_EXIT_CODES: &[(ExitCode, &str)] = &[
    (ExitCode::Success, "every call was answered"),
    (ExitCode::RemoteError, "the server answered with an error, or with something that is not an answer"),
    (ExitCode::Usage, "the command line, a file that it names, AMQP_URL, or a line of standard input is invalid"),
    (ExitCode::Unreachable, "the broker was not reached or refused us: nothing was sent"),
    (
        ExitCode::NotAccepted,
        "not accepted: the request queue does not exist, is full, or (--no-wait) has no consumers; nothing ran",
    ),
    (ExitCode::NoAnswer, "no answer before the deadline: it may or may not have run"),
    (ExitCode::Output, "an answer could not be written to standard output"),
    (ExitCode::Interrupted, "ended by SIGINT"),
    (ExitCode::BrokenPipe, "the reader of standard output went away (as SIGPIPE)"),
    (ExitCode::Terminated, "ended by SIGTERM"),
];

/// Exit codes of rpc-server and their meaning.
pub const SERVER_EXIT_CODES: &[(ExitCode, &str)] = &[
    (ExitCode::Success, "stopped gracefully by SIGINT, SIGTERM or SIGHUP"),
    (ExitCode::Usage, "the command line, a file that it names, or AMQP_URL is invalid"),
    (
        ExitCode::Unreachable,
        "retrying cannot help: credentials (refused twice), vhost, permission, or the queue cannot be used or declared",
    ),
    (ExitCode::Output, "the help or the version could not be written to standard output"),
    (ExitCode::HungUp, "ended at once by a second signal, SIGHUP"),
    (ExitCode::Interrupted, "ended at once by a second signal, SIGINT"),
    (ExitCode::Terminated, "ended at once by a second signal, SIGTERM"),
];

/// Width of the help in columns.
const HELP_WIDTH: usize = 80;

/// Formats a table of exit codes for the end of `--help`.
pub fn exit_codes_help(codes: &[(ExitCode, &str)]) -> String {
    let mut help = "Exit codes:".to_owned();
    for (code, meaning) in codes {
        let mut line = format!("  {:>3} ", *code as u8);
        for word in meaning.split(' ') {
            if line.len() + 1 + word.len() > HELP_WIDTH {
                help.extend(["\n", &line]);
                line = " ".repeat(6);
            }
            line.extend([" ", word]);
        }
        help.extend(["\n", &line]);
    }
    help
}

/// Prints a message of a program, such as why it failed, on standard error: in systemd's journal as
/// an error.
pub fn print_message(program: &str, message: impl Display) {
    // A URL may stand where it does not belong, such as `rpc-client amqp://me:secret@host 30`.
    let priority = if logging::is_journal() { "<3>" } else { "" };
    let message = message.to_string();
    let message = mask_passwords(&message);
    // If standard error is closed, the exit code still reports the failure.
    let _ = writeln!(stdio::stderr(), "{priority}{program}: {message}");
}

/// Whether this process is the first one of a container (or of the machine). Signals have no default
/// action for process 1, and it adopts the processes whose parents have ended.
pub fn is_process_1() -> bool {
    process::id() == 1
}

/// Whether this process ignores the signal.
pub fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}

/// Ends this process as if the signal was not handled. As process 1, which a signal without a handler
/// does not end, it exits with what a shell reports for the signal.
pub fn end_by_signal(signal: i32) -> ! {
    if !is_process_1() {
        let _ = emulate_default_handler(signal); // returns only if the signal ends no process
    }
    low_level::exit(128 + signal)
}

/// The exit code of a program that an error of the connection ends.
impl From<&Error> for ExitCode {
    fn from(error: &Error) -> Self {
        match error.kind {
            ErrorKind::Configuration(_) | ErrorKind::NoThread(_) => ExitCode::Usage,
            _ => ExitCode::Unreachable,
        }
    }
}

impl From<ExitCode> for process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}
