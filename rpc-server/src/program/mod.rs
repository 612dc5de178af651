//! A program as the function: from a request to a reply, without AMQP.

mod children;
mod executable;
mod persistent;
mod pipes;
mod process;
mod run;
mod run_log;
mod stop;

pub use children::reap_orphans_during;
pub use persistent::StartReason;

use crate::handler::{Caller, Handler};
use crate::signals::Stop;
use crossbeam_channel::RecvTimeoutError;
use executable::{check_executable, find_executable};
use persistent::Processes;
use process::{Groups, Invocation};
use rpc_common::connection::Backoff;
use rpc_common::message::{Answer, ErrorCode, Failure, Reply, Request};
use rpc_common::options::{parse_duration, parse_size, parse_timeout};
use rpc_common::sync::lock;
use rpc_common::text::{describe_io_error, escape, format_duration};
use run::{run_command, Ended};
use std::env;
use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use stop::{Limits, StopReason};

/// Maximum size in bytes of a variable of the program's environment.
const MAX_VALUE: usize = 4 << 10;

/// Number of bytes by which a line of a persistent program may be longer than the escaped reply.
const MAX_LINE_EXTRA: usize = 64 << 10;

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

/// A **program** that is served: run once for each request, or persistent.
pub struct Program {
    definition: Arc<Definition>,
    /// The processes of a persistent program, once it was [started](Self::start).
    processes: OnceLock<Processes>,
    /// Whether the program cannot be run at the moment.
    is_unavailable: AtomicBool,
    /// The pauses while it is unavailable. Locked by the worker that waits for all.
    pauses: Mutex<Backoff>,
}

/// What each process of a program needs.
pub(crate) struct Definition {
    options: ProgramOptions,
    path: PathBuf,
    queue: String,
    /// The path, the arguments and the variables of the server's environment, as execve(2) takes
    /// them.
    path_c: CString,
    args: Vec<CString>,
    environment: Vec<CString>,
    groups: Arc<Groups>,
    callbacks: ProgramCallbacks,
}

impl Program {
    /// Looks the program up on `PATH`. `None` if the options name none.
    ///
    /// # Errors
    /// The reason why the program cannot be run, for a message.
    pub fn find(
        options: &ProgramOptions,
        queue: &str,
        callbacks: ProgramCallbacks,
    ) -> Result<Option<Self>, String> {
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
        let mut environment = env::vars_os()
            .filter(|(name, _)| !is_hidden(name))
            .map(|(name, value)| c_string(&variable(name, &value)))
            .collect::<Result<Vec<_>, _>>()?;
        if options.persistent {
            let queue = variable("RPC_REQUEST_QUEUE".into(), &queue.into());
            environment.push(c_string(&queue)?);
            environment.push(c"RPC_PERSISTENT=1".into());
        }
        let definition = Definition {
            path_c: c_string(&path.clone().into_os_string())?,
            args: options
                .command
                .iter()
                .map(c_string)
                .collect::<Result<_, _>>()?,
            environment,
            options: options.clone(),
            path,
            queue: queue.into(),
            groups: Arc::default(),
            callbacks,
        };
        Ok(Some(Program {
            definition: Arc::new(definition),
            processes: OnceLock::new(),
            is_unavailable: AtomicBool::new(false),
            pauses: Mutex::new(Backoff::new(Instant::now())),
        }))
    }

    /// Starts the processes of a persistent program, one for each of `workers`, and waits until all
    /// are ready. Returns false if it is time to stop first. Of another program this does nothing.
    ///
    /// # Errors
    /// Why the program is not ready, for a message.
    pub fn start(&self, workers: usize, stop: &Stop) -> Result<bool, String> {
        if !self.definition.options.persistent {
            return Ok(true);
        }
        let started = Processes::start(&self.definition, workers, stop);
        let started =
            started.map_err(|reason| format!("cannot run '{}': {reason}", self.command_line()))?;
        Ok(match started {
            Some(processes) => self.processes.set(processes).is_ok(),
            None => false,
        })
    }

    /// Ends the processes of a persistent program, and waits for their end. Those that have not
    /// ended at `kill_at` are killed.
    pub fn end(&self, kill_at: Option<Instant>) {
        if let Some(processes) = self.processes.get() {
            processes.end(kill_at);
        }
    }

    /// The path of the program.
    pub fn path(&self) -> &Path {
        &self.definition.path
    }

    /// The program and its arguments, safe to print.
    pub fn command_line(&self) -> String {
        self.definition.command_line()
    }

    /// Kills all processes. None begins from now on.
    pub fn kill_all(&self) {
        self.definition.groups.kill_all();
    }

    fn run(&self, request: &Request, limits: &Limits) -> Reply {
        let definition = &self.definition;
        let variables = environment(request, &definition.queue);
        let all = definition.environment.iter().chain(&variables);
        let environment = all.map(CString::as_c_str).collect::<Vec<&CStr>>();
        let invocation = definition.invocation(&environment);
        let id = request.log_id();
        let ended = run_command(&invocation, request.body, &id, limits, &definition.groups);
        match ended.map_err(|error| self.not_started(&error))? {
            Ended::Exited(status, output) if !status.success() => Err(failure(status, output)),
            Ended::Exited(_, output) => {
                let content_type = definition.options.content_type.clone();
                definition.check_size(Ok(Answer::new(output).with_content_type(content_type)))
            }
            Ended::OutputTooLarge => Err(definition.reply_too_large()),
            Ended::Stopped(why) => Err(definition.stopped(why, limits.caller)),
        }
    }

    fn not_started(&self, error: &io::Error) -> Failure {
        let path = escape(self.path().as_os_str().as_encoded_bytes());
        log::warn!("cannot start {path}: {}", describe_io_error(error));
        if error.kind() == io::ErrorKind::ArgumentListTooLong {
            let message = "the properties and headers of the request are too large";
            return Failure::new(ErrorCode::TooLarge, message);
        }
        self.is_unavailable.store(true, Ordering::Relaxed);
        Failure::new(
            ErrorCode::Unavailable,
            "the program cannot be started at the moment",
        )
    }

    /// Pauses, longer each time, until the program can be started, or until it is time to stop. The
    /// other workers wait for the one that does this.
    fn wait_until_available(&self, stop: &Stop) {
        let mut pauses = lock(&self.pauses);
        while self.is_unavailable.load(Ordering::Relaxed) {
            let pause = pauses.next_pause(Instant::now());
            log::warn!("the function is unavailable: taking no request for {pause:.1?}");
            if stop.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
            match check_executable(self.path()) {
                Ok(()) => self.is_unavailable.store(false, Ordering::Relaxed),
                Err(reason) => log::warn!("the function cannot run: {reason}"),
            }
        }
    }
}

impl Handler for Program {
    fn handle(&self, request: &Request, caller: &Caller) -> Reply {
        let options = &self.definition.options;
        let size = request.body.len();
        let limit = options.max_request;
        if size > limit {
            let message =
                format!("the request of {size} bytes is too large: {limit} are accepted here");
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
        let limits = Limits {
            time: options.time_limit,
            deadline: request.deadline_ms.and_then(instant_of),
            kill_after: options.kill_after,
            may_answer_late: options.persistent,
            output: if options.persistent {
                // A byte may be escaped as \u0000.
                options
                    .max_reply
                    .saturating_mul(6)
                    .saturating_add(MAX_LINE_EXTRA)
            } else {
                // The text of a program that fails may be longer than its reply.
                options.max_reply.max(MAX_SENTENCE)
            },
            caller,
        };
        match self.processes.get() {
            Some(processes) => processes.handle(request, caller, &limits),
            None => self.run(request, &limits),
        }
    }

    fn is_ready(&self) -> bool {
        match self.processes.get() {
            Some(processes) => processes.is_ready(),
            None => !self.is_unavailable.load(Ordering::Relaxed),
        }
    }

    fn wait_until_ready(&self, stop: &Stop) {
        match self.processes.get() {
            Some(processes) => processes.wait_until_ready(stop),
            None => self.wait_until_available(stop),
        }
    }
}

impl Definition {
    fn invocation<'a>(&'a self, environment: &'a [&'a CStr]) -> Invocation<'a> {
        Invocation {
            path: &self.path_c,
            args: &self.args,
            environment,
        }
    }

    fn command_line(&self) -> String {
        let words = self
            .options
            .command
            .iter()
            .map(|word| word.as_encoded_bytes());
        escape(&words.collect::<Vec<_>>().join(&b' ')).to_string()
    }

    /// The reply, unless it is too large.
    fn check_size(&self, reply: Reply) -> Reply {
        match reply {
            Ok(answer) if answer.body.len() > self.options.max_reply => Err(self.reply_too_large()),
            reply => reply,
        }
    }

    fn reply_too_large(&self) -> Failure {
        let message = format!(
            "the reply is too large: {} bytes are accepted here",
            self.options.max_reply
        );
        Failure::new(ErrorCode::TooLarge, message)
    }

    /// The failure of a program that was stopped. Of a server that stops, the request is given back.
    fn stopped(&self, reason: StopReason, caller: &Caller) -> Failure {
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
