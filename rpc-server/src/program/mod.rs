//! A program as the function: from a request to a reply, without AMQP.

mod children;
mod definition;
mod executable;
mod persistent;
mod pipes;
mod process;
mod run;
mod run_log;
mod stop;

pub use children::reap_orphans_during;
pub use definition::{ProgramCallbacks, ProgramOptions, StartReason};

use crate::handler::{Caller, Handler};
use crate::signals::Stop;
use crossbeam_channel::RecvTimeoutError;
use definition::{failure, Definition, MAX_SENTENCE};
use executable::{check_executable, find_executable};
use persistent::Processes;
use rpc_common::connection::Backoff;
use rpc_common::message::{Answer, ErrorCode, Failure, Reply, Request};
use rpc_common::sync::lock;
use rpc_common::text::{describe_io_error, escape};
use run::{run_command, Ended};
use std::env;
use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use stop::Limits;

/// Maximum size in bytes of a variable of the program's environment.
const MAX_VALUE: usize = 4 << 10;

/// Number of bytes by which a line of a persistent program may be longer than the escaped reply.
const MAX_LINE_EXTRA: usize = 64 << 10;

/// Variables of the server's environment that the program does not get, beside those that begin
/// with RPC_: the URL may have a password, and systemd would take the program's notifications for
/// those of the server.
const HIDDEN: [&str; 4] = ["AMQP_URL", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

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
