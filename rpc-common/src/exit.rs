//! The exit codes: one documented type, from which `--help` and the README take theirs.

use clap::error::ErrorKind;
use std::fmt::{Display, Write as _};
use std::io::{self, Write as _};

/// An **exit code** is all that a shell script learns of how a run ended.
///
/// The codes are ordered: a run of many calls ends with the largest one of its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ExitCode {
    /// All went well.
    Success = 0,
    /// The server answered with an error, or with what is no answer.
    RemoteError = 1,
    /// What we were told is wrong: the command line, `AMQP_URL`, a line of standard input.
    Usage = 2,
    /// The broker was not reached or refused us.
    Unreachable = 3,
    /// The request queue does not exist.
    NoServer = 4,
    /// The deadline passed without an answer.
    NoAnswer = 5,
    /// Standard output could not be written.
    Output = 6,
    /// Ended by SIGINT.
    Interrupted = 130,
    /// The reader of standard output went away; what a shell makes of SIGPIPE.
    BrokenPipe = 141,
    /// Ended by SIGTERM.
    Terminated = 143,
}

/// The exit codes of rpc-client and their meaning.
pub const CLIENT: &[(ExitCode, &str)] = &[
    (ExitCode::Success, "every call was answered"),
    (ExitCode::RemoteError, "the server answered with an error, or with what is no answer"),
    (
        ExitCode::Usage,
        "the command line, a file it names, AMQP_URL, or a line of standard input is wrong",
    ),
    (ExitCode::Unreachable, "the broker was not reached or refused us: nothing was sent"),
    (ExitCode::NoServer, "nobody serves: the request queue does not exist, nothing ran"),
    (ExitCode::NoAnswer, "no answer before the deadline: it may or may not have run"),
    (ExitCode::Output, "an answer could not be written to standard output"),
    (ExitCode::Interrupted, "ended by SIGINT"),
    (ExitCode::BrokenPipe, "the reader of standard output went away (as SIGPIPE)"),
    (ExitCode::Terminated, "ended by SIGTERM"),
];

/// The exit codes of rpc-server and their meaning.
pub const SERVER: &[(ExitCode, &str)] = &[
    (ExitCode::Success, "stopped gracefully, by SIGINT or SIGTERM"),
    (ExitCode::Usage, "the command line, a file it names, or AMQP_URL is wrong"),
    (
        ExitCode::Unreachable,
        "trying again cannot help: credentials, vhost, permission, or a queue that cannot be had",
    ),
    (ExitCode::Interrupted, "ended at once by a second signal, SIGINT"),
    (ExitCode::Terminated, "ended at once by a second signal, SIGTERM"),
];

/// The trait by which an error says its own exit code.
pub trait Exit: std::error::Error {
    /// The code that a program ended by this error exits with.
    fn exit_code(&self) -> ExitCode;
}

/// Lays out [`CLIENT`] or [`SERVER`] for the end of `--help`.
#[must_use]
pub fn help(codes: &[(ExitCode, &str)]) -> String {
    let mut text = String::from("Exit codes:");
    for (code, meaning) in codes {
        let _ = write!(text, "\n  {:>3}  {meaning}", *code as u8);
    }
    text
}

/// Reads the command line. What is wrong with it is said in one line, like every other error; help is
/// printed as clap has it.
///
/// # Errors
/// The code to exit with at once, which for help is [`ExitCode::Success`].
pub fn parse_args<Cli: clap::Parser>() -> Result<Cli, ExitCode> {
    Cli::try_parse().map_err(|error| {
        let text = error.to_string();
        let is_help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
        match text.strip_prefix("error: ") {
            Some(text) if !is_help => {
                // Behind the first paragraph are tips and usage.
                let reason = text.split("\n\n").next().unwrap_or(text).trim_end();
                let reason = reason.lines().map(str::trim).collect::<Vec<_>>().join(" ");
                let reason = reason.replace("invalid digit found in string", "not a whole number");
                complain(Cli::command().get_name(), format_args!("{reason}: try --help"));
            }
            _ => drop(error.print()), // if nobody reads it, the exit code is left
        }
        if error.use_stderr() {
            ExitCode::Usage
        } else {
            ExitCode::Success
        }
    })
}

/// An error of the system as our messages have it, such as "connection refused": lowercase, without its
/// number, and without what the message says anyway.
#[must_use]
pub fn in_words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.trim_start_matches("failed to lookup address information: ");
    let text = text.split(" (os error").next().unwrap_or(text);
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

/// Says on standard error why a program, or a call, failed. If nobody reads it, the exit code is left.
pub fn complain(program: &str, error: impl Display) {
    let _ = writeln!(io::stderr(), "{program}: {error}");
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}
