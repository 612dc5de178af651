//! A run of a program: a process group that gets the input, is stopped in time, and leaves nothing
//! behind.
//!
//! A pidfd shows that the program has exited. The program is reaped last: until then its process
//! id, which is also that of its group, belongs to nobody else.

use super::pipes::{is_not_ready, read, wait_ready};
use super::process::{Groups, Invocation, Pipes, Process};
use super::run_log::RunLog;
use super::stop::{Limits, StopReason, Watch};
use rustix::event::PollFlags;
use rustix::process::Signal;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::os::fd::AsFd;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum time in which output is read after the program has exited: a process outside its group
/// may hold the pipes open.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(1);

/// The end of a run.
pub(crate) enum Ended {
    /// By itself, with this status and standard output.
    Exited(ExitStatus, Vec<u8>),
    /// By itself, with more output than the limit, before it could be stopped.
    OutputTooLarge,
    /// At one of its limits.
    Stopped(StopReason),
}

/// Runs a command with this input. Its standard error goes to the log, with `id`.
///
/// # Errors
/// The reason why the program could not be started.
pub(crate) fn run_command(
    command: &Invocation,
    input: &[u8],
    id: &str,
    limits: &Limits,
    groups: &Arc<Groups>,
) -> io::Result<Ended> {
    let begun = Instant::now();
    let (process, pipes) = Process::start(command, groups)?;
    let mut run = Run::new(process, pipes, input, id, limits);
    match run.wait_for_exit() {
        Ok(()) => {
            run.finish_output();
            let status = run.process.reap()?;
            log_end(id, status, begun);
            Ok(run.ended(status))
        }
        Err(why) => {
            run.process.leave_alone();
            log_end(id, "running", begun);
            Ok(Ended::Stopped(why))
        }
    }
}

fn log_end(id: &str, status: impl Display, begun: Instant) {
    log::debug!(
        "program[{id}]: {status} after {} ms",
        begun.elapsed().as_millis()
    );
}

struct Run<'a> {
    process: Process,
    has_exited: bool,
    /// The pipes, until they are closed.
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
    unwritten: &'a [u8],
    output: Vec<u8>,
    log: RunLog,
    limits: &'a Limits<'a>,
    watch: Watch<'a>,
}

impl<'a> Run<'a> {
    fn new(process: Process, pipes: Pipes, input: &'a [u8], id: &str, limits: &'a Limits) -> Self {
        Run {
            has_exited: false,
            stdin: Some(pipes.stdin).filter(|_| !input.is_empty()),
            stdout: Some(pipes.stdout),
            stderr: Some(pipes.stderr),
            process,
            unwritten: input,
            output: Vec::new(),
            log: RunLog::new(id),
            limits,
            watch: Watch::new(limits, Instant::now()),
        }
    }

    /// Waits until the program has exited.
    ///
    /// # Errors
    /// The reason of the stop, if the program cannot be killed.
    fn wait_for_exit(&mut self) -> Result<(), StopReason> {
        loop {
            self.transfer(self.watch.next_timer());
            if self.has_exited {
                return Ok(());
            }
            let output = self.output.len();
            self.watch
                .on_timers(Instant::now(), output, &self.process)?;
        }
    }

    /// Kills what is left of the group, and reads what is left of the output.
    fn finish_output(&mut self) {
        self.process.signal(Signal::KILL);
        self.stdin = None;
        // A process that has left the group may still hold the pipes open.
        let until = Instant::now() + OUTPUT_TIMEOUT;
        while (self.stdout.is_some() || self.stderr.is_some()) && Instant::now() < until {
            if self.is_output_too_large() {
                self.stdout = None; // standard error may say why
            }
            self.transfer(until);
        }
        self.log.finish();
    }

    /// The end of a run whose program has exited with this status.
    fn ended(&mut self, status: ExitStatus) -> Ended {
        match self.watch.stop_reason() {
            Some(why) => Ended::Stopped(why),
            None if self.is_output_too_large() => Ended::OutputTooLarge,
            None => Ended::Exited(status, mem::take(&mut self.output)),
        }
    }

    /// Writes and reads once what is ready by `until`, and notices that the program has exited.
    fn transfer(&mut self, until: Instant) {
        let [has_exited, stdin, stdout, stderr, _] = self.ready(until);
        self.has_exited |= has_exited;
        if stdin {
            self.write_input();
        }
        if stdout {
            let keeps = self.watch.stop_reason().is_none() && !self.is_output_too_large();
            let output = &mut self.output;
            read(&mut self.stdout, |bytes| {
                if keeps {
                    output.extend_from_slice(bytes);
                }
            });
        }
        if stderr {
            read(&mut self.stderr, |bytes| self.log.add(bytes));
        }
    }

    /// Which of the process (it has exited), the pipes and the caller's cancellation are ready. Waits
    /// for one, but no longer than `until`.
    fn ready(&self, until: Instant) -> [bool; 5] {
        let is_running = !self.has_exited;
        let readable = |fd| (fd, PollFlags::IN);
        wait_ready(
            [
                is_running.then(|| readable(self.process.exit_fd().as_fd())),
                self.stdin
                    .as_ref()
                    .map(|pipe| (pipe.as_fd(), PollFlags::OUT)),
                self.stdout.as_ref().map(|pipe| readable(pipe.as_fd())),
                self.stderr.as_ref().map(|pipe| readable(pipe.as_fd())),
                self.watch.cancelled().filter(|_| is_running).map(readable),
            ],
            until,
        )
    }

    fn write_input(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        match stdin.write(self.unwritten) {
            Ok(written) => self.unwritten = &self.unwritten[written..],
            Err(error) if is_not_ready(&error) => {}
            Err(_) => self.unwritten = &[], // the program does not read all of it
        }
        if self.unwritten.is_empty() {
            self.stdin = None;
        }
    }

    fn is_output_too_large(&self) -> bool {
        self.output.len() > self.limits.output
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::Cancel;
    use crate::handler::Caller;
    use std::ffi::CString;

    fn run_shell(script: &str, input: &[u8], limits: &Limits) -> Ended {
        let args = ["sh", "-c", script].map(|arg| CString::new(arg).unwrap());
        let command = Invocation {
            path: c"/bin/sh",
            args: &args,
            environment: &[c"PATH=/usr/bin:/bin"],
        };
        run_command(&command, input, "id", limits, &Arc::default()).unwrap()
    }

    #[test]
    fn a_run_exits_with_its_status_and_output_or_is_stopped_at_a_limit() {
        let cancel = Cancel::new().unwrap();
        let caller = Caller::new(&|| false, &cancel);
        let limits = Limits {
            time: Duration::from_secs(60),
            deadline: None,
            kill_after: Duration::from_millis(10),
            may_answer_late: false,
            output: 9,
            caller: &caller,
        };
        let exited = run_shell("cat; exit 3", b"to be", &limits);
        let Ended::Exited(status, output) = exited else {
            panic!("the program was not stopped");
        };
        assert_eq!((status.code(), &output[..]), (Some(3), &b"to be"[..]));
        let too_large = run_shell("echo 0123456789; trap '' TERM; sleep 60", b"", &limits);
        assert!(matches!(
            too_large,
            Ended::Stopped(StopReason::OutputTooLarge)
        ));
        let short = Limits {
            time: Duration::from_millis(10),
            ..limits
        };
        let stopped = run_shell("sleep 60", b"", &short);
        assert!(matches!(stopped, Ended::Stopped(StopReason::AtTimeLimit)));
        cancel.cancel();
        let cancelled = run_shell("sleep 60", b"", &limits);
        assert!(matches!(cancelled, Ended::Stopped(StopReason::Cancelled)));
    }
}
