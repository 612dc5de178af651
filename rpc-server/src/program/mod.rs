//! A program as the function: from a request to a reply, without AMQP.

mod children;
mod executable;
mod pipes;
mod process;
mod run;
mod run_log;
mod stop;

pub use children::reap_orphans_during;

use crate::handler::Caller;
use executable::{check_executable, find_executable};
use process::{Groups, Invocation};
use rpc_common::message::{Answer, ErrorCode, Failure, Reply, Request};
use rpc_common::options::{parse_duration, parse_size, parse_timeout};
use rpc_common::text::{describe_io_error, escape, format_duration};
use run::{run_command, Ended};
use std::env;
use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use stop::{Limits, StopReason};

/// Maximum size in bytes of a variable of the program's environment.
const MAX_VALUE: usize = 4 << 10;

/// Maximum length in bytes of the sentence of a program that fails.
const MAX_SENTENCE: usize = 4 << 10;

/// Variables of the server's environment that the program does not get, beside those that begin
/// with RPC_: the URL may have a password, and systemd would take the program's notifications for
/// those of the server.
const HIDDEN: [&str; 4] = ["AMQP_URL", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

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

    /// Program to run for each request, with the request as its standard input, and its arguments
    #[arg(last = true, value_name = "PROGRAM")]
    pub command: Vec<OsString>,
}

/// A **program** that is served.
pub struct Program {
    options: ProgramOptions,
    path: PathBuf,
    queue: String,
    /// The path, the arguments and the variables of the server's environment, as execve(2) takes
    /// them.
    path_c: CString,
    args: Vec<CString>,
    environment: Vec<CString>,
    groups: Arc<Groups>,
    on_stopped: Box<dyn Fn() + Send + Sync>,
}

impl Program {
    /// Looks the program up on `PATH`. `None` if the options name none.
    ///
    /// # Errors
    /// The reason why the program cannot be run, for a message.
    pub fn find(options: &ProgramOptions, queue: &str) -> Result<Option<Self>, String> {
        let Some(name) = options.command.first() else {
            return Ok(None);
        };
        let path = find_executable(name).map_err(|reason| {
            format!("cannot run '{}': {reason}", escape(name.as_encoded_bytes()))
        })?;
        let is_hidden = |name: &OsString| {
            HIDDEN.iter().any(|hidden| name == hidden)
                || name.as_encoded_bytes().starts_with(b"RPC_")
        };
        let c_string = |text: &OsString| {
            CString::new(text.as_encoded_bytes()).map_err(|error| error.to_string())
        };
        let environment = env::vars_os()
            .filter(|(name, _)| !is_hidden(name))
            .map(|(name, value)| c_string(&variable(name, &value)));
        Ok(Some(Program {
            path_c: c_string(&path.clone().into_os_string())?,
            args: options
                .command
                .iter()
                .map(c_string)
                .collect::<Result<_, _>>()?,
            environment: environment.collect::<Result<_, _>>()?,
            options: options.clone(),
            path,
            queue: queue.into(),
            groups: Arc::default(),
            on_stopped: Box::new(|| {}),
        }))
    }

    /// Calls `on_stopped` for each run that is stopped at a limit.
    pub fn set_stop_callback(&mut self, on_stopped: impl Fn() + Send + Sync + 'static) {
        self.on_stopped = Box::new(on_stopped);
    }

    /// The path of the program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The program and its arguments, safe to print.
    pub fn command_line(&self) -> String {
        let words = self
            .options
            .command
            .iter()
            .map(|word| word.as_encoded_bytes());
        escape(&words.collect::<Vec<_>>().join(&b' ')).to_string()
    }

    /// Runs the program for a request.
    ///
    /// # Errors
    /// The failure that the caller gets.
    pub fn run(&self, request: &Request, caller: &Caller) -> Reply {
        let size = request.body.len();
        let limit = self.options.max_request;
        if size > limit {
            let message =
                format!("the request of {size} bytes is too large: {limit} are accepted here");
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
        let limits = Limits {
            time: self.options.time_limit,
            deadline: request.deadline_ms.and_then(instant_of),
            kill_after: self.options.kill_after,
            may_answer_late: false,
            // The text of a program that fails may be longer than its reply.
            output: self.options.max_reply.max(MAX_SENTENCE),
            caller,
        };
        let id = request.log_id();
        let variables = environment(request, &self.queue);
        let all = self.environment.iter().chain(&variables);
        let invocation = Invocation {
            path: &self.path_c,
            args: &self.args,
            environment: &all.map(CString::as_c_str).collect::<Vec<&CStr>>(),
        };
        let ended = run_command(&invocation, request.body, &id, &limits, &self.groups);
        match ended.map_err(|error| self.not_started(&error))? {
            Ended::Exited(status, output) if !status.success() => Err(failure(status, output)),
            Ended::Exited(_, output) if output.len() <= self.options.max_reply => {
                let content_type = self.options.content_type.clone();
                Ok(Answer::new(output).with_content_type(content_type))
            }
            Ended::Exited(..) | Ended::OutputTooLarge => Err(self.reply_too_large()),
            Ended::Stopped(why) => {
                if why == StopReason::Cancelled {
                    caller.give_back();
                }
                (self.on_stopped)();
                Err(self.stop_failure(why))
            }
        }
    }

    /// Kills all runs. None begins from now on.
    pub fn kill_all(&self) {
        self.groups.kill_all();
    }

    /// Checks whether the program can be started.
    ///
    /// # Errors
    /// The reason why it cannot.
    pub fn check(&self) -> Result<(), String> {
        check_executable(&self.path)
    }

    fn not_started(&self, error: &io::Error) -> Failure {
        let path = escape(self.path.as_os_str().as_encoded_bytes());
        log::warn!("cannot start {path}: {}", describe_io_error(error));
        match error.kind() {
            io::ErrorKind::ArgumentListTooLong => Failure::new(
                ErrorCode::TooLarge,
                "the properties and headers of the request are too large",
            ),
            _ => Failure::new(
                ErrorCode::Unavailable,
                "the program cannot be started at the moment",
            ),
        }
    }

    fn reply_too_large(&self) -> Failure {
        let message = format!(
            "the reply is too large: {} bytes are accepted here",
            self.options.max_reply
        );
        Failure::new(ErrorCode::TooLarge, message)
    }

    fn stop_failure(&self, reason: StopReason) -> Failure {
        let reason = match reason {
            StopReason::AtTimeLimit => format!(
                "it ran longer than {}",
                format_duration(self.options.time_limit)
            ),
            StopReason::AtDeadline => "the caller's deadline has passed".into(),
            StopReason::CallerGone => "its caller has gone".into(),
            StopReason::Cancelled => "the server stops".into(), // the reply is dropped
            StopReason::OutputTooLarge => return self.reply_too_large(),
        };
        // A caller that has gone gets no answer; the code is for the log and the metrics.
        Failure::new(
            ErrorCode::TimeLimit,
            format!("the program was stopped: {reason}"),
        )
    }
}

/// The instant of a Unix time in milliseconds, if an [`Instant`] can be so far away.
fn instant_of(unix_ms: i64) -> Option<Instant> {
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms.try_into().ok()?))?;
    Instant::now().checked_add(time.duration_since(SystemTime::now()).unwrap_or_default())
}

/// A variable as execve(2) takes it.
fn variable(name: OsString, value: &OsString) -> OsString {
    let mut variable = name;
    variable.push("=");
    variable.push(value);
    variable
}

/// The variables that describe a request to the program. Values that an environment cannot hold, or
/// that are too long, are left out.
fn environment(request: &Request, queue: &str) -> Vec<CString> {
    let details = &request.details;
    let deadline = request.deadline_ms.map(|deadline| deadline.to_string());
    let properties = [
        ("QUEUE", Some(queue.as_bytes())),
        ("CORRELATION_ID", request.correlation_id),
        ("MESSAGE_ID", details.message_id),
        ("TYPE", details.message_type),
        ("APP_ID", details.app_id),
        ("USER_ID", details.user_id),
        ("CONTENT_TYPE", request.content_type),
        ("CONTENT_ENCODING", details.content_encoding),
        (
            "REDELIVERED",
            Some(if request.is_redelivered { b"1" } else { b"0" }),
        ),
        ("DEADLINE_MS", deadline.as_deref().map(str::as_bytes)),
    ];
    let properties = properties
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?.to_vec())));
    let is_plain = |name: &str| {
        name.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
    };
    let headers = request
        .text_headers()
        .filter(|(name, _)| !name.is_empty() && is_plain(name));
    let headers = headers.map(|(name, value)| {
        (
            format!("HEADER_{}", name.to_uppercase().replace('-', "_")),
            value.into_bytes(),
        )
    });
    properties
        .chain(headers)
        .filter(|(_, value)| value.len() <= MAX_VALUE && !value.contains(&0))
        .map(|(name, value)| {
            let name = OsString::from(format!("RPC_REQUEST_{name}"));
            variable(name, &OsString::from_vec(value))
        })
        .filter_map(|variable| CString::new(variable.into_vec()).ok())
        .collect()
}

/// The caller's error for a program that failed. The exit codes with a meaning are those of
/// sysexits(3).
fn failure(status: ExitStatus, output: Vec<u8>) -> Failure {
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
