//! The process of a persistent program, and one request to it.

use super::lines;
use crate::program::definition::StartReason;
use crate::program::pipes::{is_not_ready, wait_ready, READ_SIZE};
use crate::program::process::{Pipes, Process};
use crate::program::run_log::RunLog;
use crate::program::stop::{Limits, Stage, StopReason, Watch};
use rpc_common::message::{Reply, Request};
use rpc_common::sync::lock;
use rpc_common::text::{describe_io_error, escape_up_to};
use rustix::buffer::spare_capacity;
use rustix::event::PollFlags;
use rustix::io::{ioctl_fionread, Errno};
use rustix::process::Signal;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Size in bytes of a pipe: what a program can have written before its reply.
const PIPE_SIZE: usize = 64 << 10;

/// Maximum length in bytes of the first line.
const MAX_FIRST_LINE: usize = 64 << 10;

/// Duration of a wait without a limit.
pub(super) const FAR: Duration = Duration::from_secs(3_600);

/// Maximum length in bytes of a line of output in the log.
const MAX_SHOWN: usize = 200;

/// The standard error of a process, which its supervisor reads at all times, and a worker while it
/// waits for a reply.
pub(super) struct Stderr {
    pub(super) pipe: File,
    log: Mutex<RunLog>,
}

impl Stderr {
    /// Logs what can be read without waiting. Returns false at the end.
    pub(super) fn read(&self) -> bool {
        let mut log = lock(&self.log); // while reading, too: lines stay in their order
        let mut buffer = [0; READ_SIZE];
        for _ in 0..PIPE_SIZE / READ_SIZE {
            match (&self.pipe).read(&mut buffer) {
                Ok(len @ 1..) => log.add(&buffer[..len]),
                Err(error) if is_not_ready(&error) => break,
                _ => return false,
            }
        }
        true
    }

    /// Logs what comes next with this id.
    fn begin(&self, id: &str) {
        let mut log = lock(&self.log);
        log.finish();
        *log = RunLog::new(id);
    }
}

/// The output of a process that no request has taken.
#[derive(Default)]
pub(super) struct Output {
    bytes: Vec<u8>,
    /// Number of bytes that have no newline.
    searched: usize,
}

impl Output {
    /// Takes a line, without its newline. Leaves out blank ones.
    pub(super) fn next_line(&mut self) -> Option<Vec<u8>> {
        loop {
            let found = self.bytes[self.searched..]
                .iter()
                .position(|byte| *byte == b'\n');
            let Some(index) = found else {
                self.searched = self.bytes.len();
                return None;
            };
            let rest = self.bytes.split_off(self.searched + index + 1);
            let mut line = mem::replace(&mut self.bytes, rest);
            self.searched = 0;
            line.pop();
            if !line.trim_ascii().is_empty() {
                return Some(line);
            }
        }
    }

    pub(super) fn is_blank(&self) -> bool {
        self.bytes.trim_ascii().is_empty()
    }
}

/// A process of a persistent program: it starts, or is ready for a request, or has one in hand.
pub(super) struct PersistentProcess {
    /// The number of its supervisor.
    pub(super) number: usize,
    pub(super) process: Process,
    /// `None` when the program no longer reads it, or needs no more.
    stdin: Option<File>,
    /// `None` at its end.
    stdout: Option<File>,
    pub(super) stderr: Arc<Stderr>,
    has_stderr: bool,
    output: Output,
    /// The log's id of lines that belong to no request.
    idle_id: String,
    /// Number of requests that were sent.
    pub(super) requests: u64,
    /// Whether it is the first process of its supervisor.
    pub(super) is_first: bool,
}

/// Why a process is not ready.
pub(super) enum NotReady {
    /// The supervisor has something else to do.
    Interrupted,
    /// It takes too long.
    Late,
    /// Another reason, for the log.
    Because(String),
}

/// How an exchange with a process ended.
pub(super) enum Exchanged {
    /// With the reply. The process can take another request.
    Answered(Reply),
    /// At a limit, but with a reply. The process can take another request.
    AnsweredLate(StopReason),
    /// The process was stopped, or cannot be killed.
    Stopped(StopReason),
    /// The process has ended by itself.
    Exited(ExitStatus),
    /// The process has not taken the request, and can take no other.
    NotTaken(StartReason),
    /// The process has written something else than the reply. It must be killed.
    Disagreed,
}

impl PersistentProcess {
    pub(super) fn new(number: usize, is_first: bool, process: Process, pipes: Pipes) -> Self {
        let idle_id = format!("process {}", process.number());
        PersistentProcess {
            number,
            stdin: Some(pipes.stdin),
            stdout: Some(pipes.stdout),
            stderr: Arc::new(Stderr {
                log: Mutex::new(RunLog::new(&idle_id)),
                pipe: pipes.stderr,
            }),
            has_stderr: true,
            output: Output::default(),
            process,
            idle_id,
            requests: 0,
            is_first,
        }
    }

    /// Waits for the first line, until `until`, or until `interruption` is readable.
    pub(super) fn wait_until_ready(
        &mut self,
        until: Instant,
        interruption: BorrowedFd,
    ) -> Result<(), NotReady> {
        loop {
            let [has_exited, .., is_interrupted] = self.wait(false, Some(interruption), until);
            if is_interrupted {
                return Err(NotReady::Interrupted);
            }
            self.read_output(MAX_FIRST_LINE);
            if let Some(line) = self.output.next_line() {
                return if lines::is_ready_line(&line) {
                    Ok(())
                } else {
                    let line = escape_up_to(MAX_SHOWN, &line);
                    let reason = format!("its first line is '{line}', not {{\"ready\":true}}");
                    Err(NotReady::Because(reason))
                };
            }
            if has_exited {
                let status = self.end().map_or_else(
                    |error| describe_io_error(&error),
                    |status| status.to_string(),
                );
                let reason = format!("it ended before it was ready: {status}");
                return Err(NotReady::Because(reason));
            }
            if self.output.bytes.len() > MAX_FIRST_LINE {
                return Err(NotReady::Because("its first line is too long".into()));
            }
            if until <= Instant::now() {
                return Err(NotReady::Late);
            }
        }
    }

    /// Sends a request to the program, and waits for the reply.
    ///
    /// # Errors
    /// The system does not tell how the process ended.
    pub(super) fn exchange(
        &mut self,
        request: &Request,
        content_type: &str,
        limits: &Limits,
    ) -> io::Result<Exchanged> {
        self.read_output(READ_SIZE);
        if self.has_stray_output() {
            return Ok(Exchanged::NotTaken(StartReason::Disagreed));
        }
        self.requests += 1;
        let line = lines::request_line(self.requests, request);
        self.stderr.begin(&request.log_id());
        let exchanged = self.send_and_wait(&line, content_type, limits);
        self.stderr.begin(&self.idle_id);
        exchanged
    }

    /// Whether output was read that is the reply to no request. Logs the start of it.
    pub(super) fn has_stray_output(&mut self) -> bool {
        if self.output.is_blank() {
            return false;
        }
        let all = mem::take(&mut self.output).bytes;
        let line = all.trim_ascii_start().split(|byte| *byte == b'\n').next();
        log_disagreement(line.unwrap_or_default(), "there was no request");
        true
    }

    fn send_and_wait(
        &mut self,
        line: &[u8],
        content_type: &str,
        limits: &Limits,
    ) -> io::Result<Exchanged> {
        let mut watch = Watch::new(limits, Instant::now());
        let mut unwritten = self.write(line);
        loop {
            let [has_exited, can_write, ..] =
                self.wait(!unwritten.is_empty(), watch.cancelled(), watch.next_timer());
            if can_write {
                unwritten = self.write(unwritten);
            }
            // All that was written before the exit.
            self.read_output(limits.output);
            if !watch.has_time() {
                self.output = Output::default();
            } else if let Some(line) = self.output.next_line() {
                return Ok(self.exchanged(&line, content_type, watch.stop_reason()));
            }
            if has_exited {
                return self.exited(line.len(), unwritten.len(), limits, watch.stop_reason());
            }
            if self.stdin.is_none() && watch.stop_reason().is_none() {
                return Ok(Exchanged::NotTaken(StartReason::Exited));
            }
            let size = self.output.bytes.len();
            if let Err(why) = watch.on_timers(Instant::now(), size, &self.process) {
                self.process.leave_alone();
                return Ok(Exchanged::Stopped(why));
            }
        }
    }

    /// Waits until the process has exited, can take input, or has written something; or until
    /// another file is readable; but no longer than `until`. Says which, with the other file last.
    fn wait(&mut self, writes: bool, other: Option<BorrowedFd>, until: Instant) -> [bool; 5] {
        let readable = |fd| (fd, PollFlags::IN);
        let stdin = self.stdin.as_ref().filter(|_| writes);
        let stderr = Some(self.stderr.pipe.as_fd()).filter(|_| self.has_stderr);
        let ready = wait_ready(
            [
                Some(readable(self.process.exit_fd().as_fd())),
                stdin.map(|pipe| (pipe.as_fd(), PollFlags::OUT)),
                self.stdout.as_ref().map(|pipe| readable(pipe.as_fd())),
                stderr.map(readable),
                other.map(readable),
            ],
            until,
        );
        if ready[3] {
            self.has_stderr = self.stderr.read();
        }
        ready
    }

    /// Writes what the pipe takes, and returns the rest. Closes the pipe if the program no longer
    /// reads it.
    fn write<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let Some(stdin) = &mut self.stdin else {
            return bytes;
        };
        match stdin.write(bytes) {
            Ok(written) => &bytes[written..],
            Err(error) if is_not_ready(&error) => bytes,
            Err(_) => {
                self.stdin = None;
                bytes
            }
        }
    }

    /// Reads what there is, up to about `limit` bytes of output.
    fn read_output(&mut self, limit: usize) {
        let bytes = &mut self.output.bytes;
        while let Some(pipe) = self.stdout.as_ref().filter(|_| bytes.len() <= limit) {
            bytes.reserve(READ_SIZE);
            let room = bytes.capacity() - bytes.len();
            match rustix::io::read(pipe, spare_capacity(bytes)) {
                Ok(1..) if bytes.len() == bytes.capacity() => {}
                Ok(len) if len > 0 && len < room => return, // all that there is
                Err(Errno::AGAIN | Errno::INTR) => return,
                _ => self.stdout = None,
            }
        }
    }

    fn exchanged(
        &self,
        line: &[u8],
        content_type: &str,
        stop_reason: Option<StopReason>,
    ) -> Exchanged {
        match (
            lines::parse_reply(line, self.requests, content_type),
            stop_reason,
        ) {
            (Ok(reply), None) => Exchanged::Answered(reply),
            (Ok(_), Some(why)) => Exchanged::AnsweredLate(why),
            (Err(reason), _) => {
                log_disagreement(line, &reason);
                Exchanged::Disagreed
            }
        }
    }

    /// The end of an exchange in which the process has exited.
    fn exited(
        &mut self,
        sent: usize,
        unwritten: usize,
        limits: &Limits,
        stop_reason: Option<StopReason>,
    ) -> io::Result<Exchanged> {
        let stdin = self.stdin.as_ref();
        let unread = stdin.map_or(0, |pipe| ioctl_fionread(pipe).unwrap_or_default());
        let status = self.end()?;
        let is_taken = unwritten == 0 && unread < sent as u64;
        Ok(match stop_reason {
            Some(why) => Exchanged::Stopped(why),
            None if self.output.bytes.len() > limits.output => {
                Exchanged::Stopped(StopReason::OutputTooLarge)
            }
            None if self.output.is_blank() && (status.success() || !is_taken) => {
                Exchanged::NotTaken(StartReason::Exited)
            }
            None => Exchanged::Exited(status),
        })
    }

    /// Kills what is left of the group of a process that has exited, logs the rest of its standard
    /// error, and reaps it.
    pub(super) fn end(&mut self) -> io::Result<ExitStatus> {
        self.process.signal(Signal::KILL);
        self.stderr.read();
        lock(&self.stderr.log).finish();
        self.process.reap()
    }

    /// Closes the standard input of a process that takes no further request, and waits until it has
    /// exited, through the stages of a stop that begin with `stage`. It is killed at `kill_at`.
    pub(super) fn stop(mut self, stage: Stage, kill_after: Duration, kill_at: Option<Instant>) {
        self.stdin = None;
        if self.process.is_released() {
            return; // it has exited in the hands of a worker
        }
        let mut current = stage;
        current.begin(stage, &self.process);
        loop {
            let kill_at = kill_at.filter(|_| !current.is_killed());
            let timers = current.timer().into_iter().chain(kill_at);
            let until = timers.min().unwrap_or_else(|| Instant::now() + FAR);
            let [has_exited, ..] = self.wait(false, None, until);
            self.read_output(READ_SIZE);
            self.output = Output::default();
            if has_exited {
                let ended = self.end().map_or_else(
                    |error| describe_io_error(&error),
                    |status| status.to_string(),
                );
                return log::debug!("program[{}]: {ended}", self.idle_id);
            }
            let now = Instant::now();
            if kill_at.is_some_and(|at| at <= now) {
                current.begin(Stage::killed(StopReason::NotNeeded, now), &self.process);
            }
            if current.on_timer(now, kill_after, &self.process).is_err() {
                return self.process.leave_alone();
            }
        }
    }
}

/// Logs that the program and the server disagree.
fn log_disagreement(line: &[u8], reason: &str) {
    let line = escape_up_to(MAX_SHOWN, line);
    log::warn!(
        "a line on standard output that is no reply: '{line}': {reason}; print to standard error instead"
    );
}
