//! A persistent program: each worker has a process that handles one request after the other.
//!
//! A **supervisor** is a thread that keeps one process running: it starts the process, waits until
//! the program is ready, reads its standard error, and starts the next process when this one has
//! ended. Meanwhile the process is idle, or in the hands of a worker, who gives it back: to the
//! idle ones, or to the supervisor if it must end.

mod lines;
mod process;

use super::definition::{failure, Definition, StartReason};
use super::pipes::wait_ready;
use super::process::Process;
use super::stop::{Limits, Stage, StopReason};
use crate::handler::Caller;
use crate::signals::Stop;
use crossbeam_channel::{bounded, select_biased, unbounded, Receiver, Sender};
use process::{Exchanged, NotReady, PersistentProcess, FAR};
use rpc_common::connection::pauses as growing_pauses;
use rpc_common::message::{ErrorCode, Failure, Reply, Request};
use rpc_common::sync::lock;
use rpc_common::text::{describe_io_error, format_duration};
use rustix::event::{eventfd, EventfdFlags, PollFlags};
use std::collections::HashSet;
use std::ffi::CString;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A process that ends earlier than this without a request has failed to start.
const MIN_IDLE: Duration = Duration::from_secs(1);

/// Interval at which a request that waits for a process looks whether the server gives it up.
const CANCEL_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The processes of a persistent program.
pub(super) struct Processes {
    shared: Arc<Shared>,
    supervisors: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    definition: Arc<Definition>,
    idle: Mutex<Idle>,
    /// Gets a message when a new process is ready. Others may have taken it since.
    is_ready: (Sender<()>, Receiver<()>),
    /// For each supervisor.
    posts: Vec<Post>,
    end: Mutex<Option<End>>,
}

/// The processes that are in nobody's hands.
#[derive(Default)]
struct Idle {
    /// The latest last.
    processes: Vec<PersistentProcess>,
    /// The numbers of the processes that have exited in the hands of a worker.
    exited: HashSet<usize>,
}

/// What a supervisor is told.
struct Post {
    /// Readable when there is something to do.
    wake: OwnedFd,
    to_end: Mutex<Option<ToEnd>>,
}

/// A process that must end, and why the next one is started.
struct ToEnd {
    process: PersistentProcess,
    reason: StartReason,
    stage: Stage,
}

/// The server needs no processes any more.
#[derive(Clone, Copy)]
struct End {
    /// Processes that have not ended then are killed.
    kill_at: Option<Instant>,
}

impl Processes {
    /// Starts the processes for `count` workers, and waits until all are ready. `None` if it is
    /// time to stop first.
    ///
    /// # Errors
    /// Why one is not ready, for a message.
    pub(super) fn start(
        definition: &Arc<Definition>,
        count: usize,
        stop: &Stop,
    ) -> Result<Option<Self>, String> {
        let no_file = |error: rustix::io::Errno| describe_io_error(&error.into());
        let post = |_| {
            Ok(Post {
                wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
                to_end: Mutex::new(None),
            })
        };
        let shared = Arc::new(Shared {
            definition: definition.clone(),
            idle: Mutex::default(),
            is_ready: bounded(count),
            posts: (0..count)
                .map(post)
                .collect::<Result<_, _>>()
                .map_err(no_file)?,
            end: Mutex::new(None),
        });
        let (reports, first_reports) = unbounded();
        let processes = Processes {
            shared: shared.clone(),
            supervisors: Mutex::default(),
        };
        for number in 0..count {
            let supervisor = Supervisor {
                shared: shared.clone(),
                number,
                report: Some(reports.clone()),
            };
            let thread = thread::Builder::new().name("supervisor".into());
            let started = thread.spawn(move || supervisor.run());
            lock(&processes.supervisors).push(started.map_err(|error| {
                let reason = describe_io_error(&error);
                format!("cannot start a thread: {reason}: raise the limit of processes (ulimit -u)")
            })?);
        }
        for _ in 0..count {
            select_biased! {
                recv(stop) -> _ => return Ok(None),
                recv(first_reports) -> report => {
                    report.expect("each supervisor reports once")?;
                }
            }
        }
        Ok(Some(processes))
    }

    /// Whether a process is ready for a request.
    ///
    /// Each worker has one process in hand at most. So one that has none finds one, if each worker's
    /// process is ready.
    pub(super) fn is_ready(&self) -> bool {
        !lock(&self.shared.idle).processes.is_empty()
    }

    /// Waits until a process is ready for a request, or it is time to stop.
    pub(super) fn wait_until_ready(&self, stop: &Stop) {
        while !self.is_ready() {
            select_biased! {
                recv(stop) -> _ => return,
                recv(self.shared.is_ready.1) -> _ => {}
            }
        }
    }

    /// Has a process handle a request.
    ///
    /// # Errors
    /// The failure that the caller gets.
    pub(super) fn handle(&self, request: &Request, caller: &Caller, limits: &Limits) -> Reply {
        let shared = &self.shared;
        let definition = &shared.definition;
        let mut is_first = true;
        loop {
            let mut process = shared.take(caller, limits)?;
            let content_type = &definition.options.content_type;
            let exchanged = process.exchange(request, content_type, limits);
            let (reply, reason) = match exchanged {
                Err(error) => {
                    log::warn!(
                        "the end of a program is unknown: {}",
                        describe_io_error(&error)
                    );
                    (Err(disagreed()), StartReason::Exited)
                }
                Ok(Exchanged::Answered(reply)) => {
                    shared.give_back(process);
                    return definition.check_size(reply);
                }
                Ok(Exchanged::AnsweredLate(why)) => {
                    shared.give_back(process);
                    return Err(definition.stopped(why, caller));
                }
                Ok(Exchanged::Stopped(why)) => {
                    (Err(definition.stopped(why, caller)), StartReason::Stopped)
                }
                Ok(Exchanged::Exited(status)) if status.success() => {
                    (Err(not_answered()), StartReason::Exited)
                }
                Ok(Exchanged::Exited(status)) => {
                    (Err(failure(status, Vec::new())), StartReason::Exited)
                }
                Ok(Exchanged::NotTaken(reason)) if is_first => {
                    is_first = false;
                    shared.end(process, reason, kill());
                    continue;
                }
                Ok(Exchanged::NotTaken(reason)) => (Err(not_answered()), reason),
                Ok(Exchanged::Disagreed) => (Err(disagreed()), StartReason::Disagreed),
            };
            shared.end(process, reason, kill());
            return reply;
        }
    }

    /// Ends all processes, which are idle: closes their standard input, and waits. Those that have
    /// not ended at `kill_at` are killed.
    pub(super) fn end(&self, kill_at: Option<Instant>) {
        *lock(&self.shared.end) = Some(End { kill_at });
        self.shared.posts.iter().for_each(Post::wake);
        for supervisor in mem::take(&mut *lock(&self.supervisors)) {
            let _ = supervisor.join(); // a panic is in the log
        }
    }
}

impl Drop for Processes {
    /// Ends the processes after an error.
    fn drop(&mut self) {
        self.end(None);
    }
}

/// The stage of a process that is killed at once.
fn kill() -> Stage {
    Stage::killed(StopReason::NotNeeded, Instant::now())
}

fn not_answered() -> Failure {
    Failure::new(ErrorCode::Failed, "the program ended before it answered")
}

fn disagreed() -> Failure {
    let message = "internal error: the program did not answer as it should, see the server's log";
    Failure::new(ErrorCode::Internal, message)
}

impl Shared {
    /// Takes a process that is ready. Waits for one: another worker may have been faster.
    fn take(&self, caller: &Caller, limits: &Limits) -> Result<PersistentProcess, Failure> {
        let timeout = self.definition.options.ready_timeout;
        let until = Instant::now().checked_add(timeout);
        let until = until.into_iter().chain(limits.deadline).min();
        loop {
            let idle = lock(&self.idle).processes.pop();
            if let Some(process) = idle {
                return Ok(process);
            }
            if caller.is_cancelled() {
                return Err(self.definition.stopped(StopReason::Cancelled, caller));
            }
            if until.is_some_and(|until| until <= Instant::now()) {
                return Err(Failure::new(
                    ErrorCode::Unavailable,
                    "the program is not ready at the moment",
                ));
            }
            let _ = self.is_ready.1.recv_timeout(CANCEL_CHECK_INTERVAL);
        }
    }

    /// Gives a process back that has answered.
    fn give_back(&self, mut process: PersistentProcess) {
        if process.has_stray_output() {
            return self.end(process, StartReason::Disagreed, kill());
        }
        if process.requests >= self.max_requests(&process) {
            return self.end(process, StartReason::MaxRequests, self.ending());
        }
        let mut idle = lock(&self.idle);
        if !idle.exited.contains(&process.number) {
            idle.processes.push(process);
            return;
        }
        drop(idle);
        self.end(process, StartReason::Exited, kill());
    }

    /// The stage of a process that gets no further request.
    fn ending(&self) -> Stage {
        let kill_after = self.definition.options.kill_after;
        Stage::ending(StopReason::NotNeeded, Instant::now(), kill_after)
    }

    /// The requests after which a process ends. The first processes of the workers end one after
    /// the other.
    fn max_requests(&self, process: &PersistentProcess) -> u64 {
        let Some(max) = self.definition.options.max_requests else {
            return u64::MAX;
        };
        if process.is_first {
            share(max, process.number, self.posts.len())
        } else {
            max
        }
    }

    /// Has its supervisor end a process.
    fn end(&self, process: PersistentProcess, reason: StartReason, stage: Stage) {
        let post = &self.posts[process.number];
        *lock(&post.to_end) = Some(ToEnd {
            process,
            reason,
            stage,
        });
        post.wake();
    }

    fn take_idle(&self, number: usize) -> Option<PersistentProcess> {
        let idle = &mut lock(&self.idle).processes;
        let index = idle.iter().position(|process| process.number == number)?;
        Some(idle.remove(index))
    }
}

/// The part of `max` after which the first process of this worker of `count` ends.
fn share(max: u64, number: usize, count: usize) -> u64 {
    let (number, count) = (number as u128 + 1, count as u128);
    u64::try_from((u128::from(max) * number).div_ceil(count)).unwrap_or(max)
}

impl Post {
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()); // it may be readable already
    }

    fn clear(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}

/// Keeps one process running.
struct Supervisor {
    shared: Arc<Shared>,
    number: usize,
    /// Where the first start is reported.
    report: Option<Sender<Result<(), String>>>,
}

impl Supervisor {
    fn run(mut self) {
        let mut reason = StartReason::First;
        let mut pauses = growing_pauses();
        while self.is_needed() {
            let started = self.start(reason);
            if let Some(report) = self.report.take() {
                let result = started.as_ref().map(drop).map_err(Clone::clone);
                let _ = report.send(result); // fails if it is time to stop
                if started.is_err() {
                    return;
                }
            }
            let why;
            match started {
                Ok(process) => {
                    let begun = Instant::now();
                    let ended = self.watch(process);
                    reason = ended.reason;
                    if ended.requests > 0 || begun.elapsed() >= MIN_IDLE {
                        pauses = growing_pauses();
                        continue;
                    }
                    why = "it ended without a request".to_owned();
                }
                Err(error) => {
                    reason = StartReason::NotReady;
                    why = error;
                }
            }
            if self.is_needed() {
                let pause = pauses.next().unwrap_or_default(); // there is always a next one
                let program = self.shared.definition.command_line();
                log::warn!("'{program}': {why}; starting it again in {pause:.1?}");
                self.wait(None, None, Instant::now() + pause);
            }
        }
    }

    fn is_needed(&self) -> bool {
        lock(&self.shared.end).is_none()
    }

    fn post(&self) -> &Post {
        &self.shared.posts[self.number]
    }

    /// Starts a process, and waits until it is ready.
    ///
    /// # Errors
    /// Why it is not ready, for the log.
    fn start(&self, reason: StartReason) -> Result<PersistentProcess, String> {
        let definition = &self.shared.definition;
        (definition.callbacks.on_start)(reason);
        lock(&self.shared.idle).exited.remove(&self.number);
        let environment = definition.environment.iter().map(CString::as_c_str);
        let environment = environment.collect::<Vec<_>>();
        let invocation = definition.invocation(&environment);
        let started = Process::start(&invocation, &definition.groups);
        let (process, pipes) = started.map_err(|error| describe_io_error(&error))?;
        let is_first = reason == StartReason::First;
        let mut process = PersistentProcess::new(self.number, is_first, process, pipes);
        let timeout = definition.options.ready_timeout;
        let until = Instant::now() + timeout;
        match process.wait_until_ready(until, self.post().wake.as_fd()) {
            Ok(()) => Ok(process),
            Err(NotReady::Interrupted) => {
                self.stop(process, self.shared.ending());
                Err("it is no longer needed".into())
            }
            Err(NotReady::Late) => Err(format!(
                "it was not ready within {}: does it print {{\"ready\":true}}, and flush its standard output?",
                format_duration(timeout)
            )),
            Err(NotReady::Because(reason)) => Err(reason),
        }
    }

    /// Offers a process to the workers, until it has ended.
    fn watch(&self, process: PersistentProcess) -> Ended {
        let shared = &self.shared;
        let stderr = process.stderr.clone();
        let exit = process.process.exit_fd().clone();
        lock(&shared.idle).processes.push(process);
        let _ = shared.is_ready.0.try_send(()); // others wake the waiting workers if it is full
        let mut has_exited = false;
        let mut has_stderr = true;
        loop {
            let [exits, logs, is_woken] = self.wait(
                Some(exit.as_fd()).filter(|_| !has_exited),
                Some(stderr.pipe.as_fd()).filter(|_| has_stderr),
                Instant::now() + FAR,
            );
            if logs {
                has_stderr = stderr.read();
            }
            if exits {
                has_exited = true;
                if let Some(process) = self.take_exited() {
                    log::info!(
                        "'{}' has ended without a request; starting it again",
                        shared.definition.command_line()
                    );
                    return self.end(process, StartReason::Exited, kill());
                }
            }
            if is_woken {
                self.post().clear();
                let to_end = lock(&self.post().to_end).take();
                if let Some(to_end) = to_end {
                    return self.end(to_end.process, to_end.reason, to_end.stage);
                }
                if let Some(process) = shared.take_idle(self.number) {
                    return self.end(process, StartReason::Exited, shared.ending());
                }
            }
        }
    }

    /// The process has exited: takes it if it is idle. Else its worker gives it back.
    fn take_exited(&self) -> Option<PersistentProcess> {
        let idle = &mut *lock(&self.shared.idle);
        let mut processes = idle.processes.iter();
        let index = processes.position(|process| process.number == self.number);
        if index.is_none() {
            idle.exited.insert(self.number);
        }
        index.map(|index| idle.processes.remove(index))
    }

    fn end(&self, process: PersistentProcess, reason: StartReason, stage: Stage) -> Ended {
        let requests = process.requests;
        self.stop(process, stage);
        Ended { reason, requests }
    }

    fn stop(&self, process: PersistentProcess, stage: Stage) {
        let kill_after = self.shared.definition.options.kill_after;
        let end = *lock(&self.shared.end);
        process.stop(stage, kill_after, end.and_then(|end| end.kill_at));
    }

    /// Waits until one of the files is readable, or there is something to do, or until `until`.
    fn wait(
        &self,
        exit: Option<BorrowedFd>,
        stderr: Option<BorrowedFd>,
        until: Instant,
    ) -> [bool; 3] {
        let files = [exit, stderr, Some(self.post().wake.as_fd())];
        wait_ready(files.map(|fd| Some((fd?, PollFlags::IN))), until)
    }
}

/// How a process that was ready has ended.
struct Ended {
    /// Why the next one is started.
    reason: StartReason,
    /// Number of its requests.
    requests: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_processes_end_one_after_the_other() {
        assert_eq!(
            [0, 1, 2, 3].map(|number| share(100, number, 4)),
            [25, 50, 75, 100]
        );
        assert_eq!([0, 1, 2].map(|number| share(2, number, 3)), [1, 2, 2]);
        assert_eq!(share(u64::MAX, 0, 1), u64::MAX);
    }
}
