//! A run of a program: a process group that gets the input, is stopped in time, and leaves nothing
//! behind.
//!
//! A pidfd shows that the program has exited. The program is reaped last: until then its process
//! id, which is also that of its group, belongs to nobody else.

use super::process::{Groups, Invocation, Pipes, Process};
use super::run_log::RunLog;
use crate::handler::Caller;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{fcntl_setfl, OFlags};
use rustix::process::{pidfd_open, PidfdFlags, Signal};
use std::fmt::Display;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// Maximum time in which output is read after the program has exited: a process outside its group
/// may hold the pipes open.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(1);

/// Time after SIGKILL after which a run is given up.
const GIVE_UP_AFTER: Duration = Duration::from_secs(5);

/// Interval at which a run checks whether its caller has gone.
const CALLER_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Maximum number of bytes that are read at a time.
const READ_SIZE: usize = 16 << 10;

/// The limits of a run.
pub(crate) struct Limits<'a> {
    /// Maximum duration of the run.
    pub(crate) time: Duration,
    /// The caller's deadline.
    pub(crate) deadline: Option<Instant>,
    /// Time between SIGTERM and SIGKILL.
    pub(crate) kill_after: Duration,
    /// The largest output, in bytes.
    pub(crate) output: usize,
    pub(crate) caller: &'a Caller<'a>,
}

/// The reason to stop a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopReason {
    AtTimeLimit,
    AtDeadline,
    CallerGone,
    OutputTooLarge,
    /// The server gives the request up.
    Cancelled,
}

/// The end of a run.
pub(crate) enum Ended {
    /// By itself, with this status and standard output.
    Exited(ExitStatus, Vec<u8>),
    /// By itself, with more output than the limit, before it could be stopped.
    OutputTooLarge,
    /// At one of its limits.
    Stopped(StopReason),
}

/// The stage of a run that has not exited.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// The program runs.
    Running,
    /// The group got SIGTERM. It gets SIGKILL at `kill_at`; `None` is never.
    Terminating {
        why: StopReason,
        kill_at: Option<Instant>,
    },
    /// The group got SIGKILL. It is left alone at `give_up_at`.
    Killed {
        why: StopReason,
        give_up_at: Instant,
    },
}

impl Stage {
    /// The reason of the stop. `None` while the program runs.
    fn stop_reason(self) -> Option<StopReason> {
        match self {
            Stage::Running => None,
            Stage::Terminating { why, .. } | Stage::Killed { why, .. } => Some(why),
        }
    }

    /// The next stage at this instant, and the signal of it. `None` if the stage stays. A program
    /// that runs is stopped if there is a `reason`.
    fn next(
        self,
        now: Instant,
        reason: Option<StopReason>,
        kill_after: Duration,
    ) -> Option<(Self, Signal)> {
        match self {
            Stage::Running => {
                let kill_at = now.checked_add(kill_after);
                reason.map(|why| (Stage::Terminating { why, kill_at }, Signal::TERM))
            }
            Stage::Terminating { why, kill_at } if kill_at.is_some_and(|at| at <= now) => {
                let give_up_at = now + GIVE_UP_AFTER;
                Some((Stage::Killed { why, give_up_at }, Signal::KILL))
            }
            Stage::Terminating { .. } | Stage::Killed { .. } => None,
        }
    }

    /// The instant of the next stage, or of giving the program up. `None` for a program that runs,
    /// or that gets no SIGKILL.
    fn timer(self) -> Option<Instant> {
        match self {
            Stage::Running => None,
            Stage::Terminating { kill_at, .. } => kill_at,
            Stage::Killed { give_up_at, .. } => Some(give_up_at),
        }
    }
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
    groups: &Groups,
) -> io::Result<Ended> {
    let begun = Instant::now();
    let (process, pipes) = Process::start(command, groups)?;
    let mut run = Run::new(process, pipes, input, id, limits)?;
    match run.wait_for_exit() {
        Ok(()) => {
            run.finish_output();
            let status = run.process.reap()?;
            log_end(id, status, begun);
            Ok(run.ended(status))
        }
        Err(why) => {
            run.leave_alone();
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
    process: Process<'a>,
    /// Readable when the program has exited.
    pidfd: OwnedFd,
    has_exited: bool,
    /// The pipes, until they are closed.
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
    unwritten: &'a [u8],
    output: Vec<u8>,
    log: RunLog,
    limits: &'a Limits<'a>,
    /// Instant of the time limit, or of the caller's deadline if that is earlier.
    stop_at: Option<Instant>,
    next_caller_check: Instant,
    stage: Stage,
}

impl<'a> Run<'a> {
    fn new(
        process: Process<'a>,
        pipes: Pipes,
        input: &'a [u8],
        id: &str,
        limits: &'a Limits,
    ) -> io::Result<Self> {
        let now = Instant::now();
        let run = Run {
            pidfd: pidfd_open(process.id, PidfdFlags::empty())?,
            has_exited: false,
            stdin: Some(pipes.stdin).filter(|_| !input.is_empty()),
            stdout: Some(pipes.stdout),
            stderr: Some(pipes.stderr),
            process,
            unwritten: input,
            output: Vec::new(),
            log: RunLog::new(id),
            limits,
            stop_at: now
                .checked_add(limits.time)
                .into_iter()
                .chain(limits.deadline)
                .min(),
            next_caller_check: now + CALLER_CHECK_INTERVAL,
            stage: Stage::Running,
        };
        run.pipes()
            .into_iter()
            .flatten()
            .try_for_each(|pipe| fcntl_setfl(pipe, OFlags::NONBLOCK))?;
        Ok(run)
    }

    /// Waits until the program has exited.
    ///
    /// # Errors
    /// The reason of the stop, if the program cannot be killed.
    fn wait_for_exit(&mut self) -> Result<(), StopReason> {
        loop {
            self.transfer(self.next_timer());
            if self.has_exited {
                return Ok(());
            }
            self.on_timers(Instant::now())?;
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
        match self.stage.stop_reason() {
            Some(why) => Ended::Stopped(why),
            None if self.is_output_too_large() => Ended::OutputTooLarge,
            None => Ended::Exited(status, mem::take(&mut self.output)),
        }
    }

    fn pipes(&self) -> [Option<BorrowedFd<'_>>; 3] {
        [
            self.stdin.as_ref().map(AsFd::as_fd),
            self.stdout.as_ref().map(AsFd::as_fd),
            self.stderr.as_ref().map(AsFd::as_fd),
        ]
    }

    /// Writes and reads once what is ready by `until`, and notices that the program has exited.
    fn transfer(&mut self, until: Instant) {
        let [has_exited, stdin, stdout, stderr, _] = self.ready(until);
        self.has_exited |= has_exited;
        if stdin {
            self.write_input();
        }
        if stdout {
            let keeps = self.stage.stop_reason().is_none() && !self.is_output_too_large();
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

    /// Which of the pidfd, the pipes and the caller's cancellation are ready. Waits for one, but no
    /// longer than `until`.
    fn ready(&self, until: Instant) -> [bool; 5] {
        let [stdin, stdout, stderr] = self.pipes();
        let pidfd = Some(self.pidfd.as_fd()).filter(|_| !self.has_exited);
        // While the program runs: after that the pipe stays ready.
        let is_running = self.stage.stop_reason().is_none() && !self.has_exited;
        let cancelled = Some(self.limits.caller.cancelled()).filter(|_| is_running);
        let all = [
            (pidfd, PollFlags::IN),
            (stdin, PollFlags::OUT),
            (stdout, PollFlags::IN),
            (stderr, PollFlags::IN),
            (cancelled, PollFlags::IN),
        ];
        let open = all
            .iter()
            .enumerate()
            .filter_map(|(index, (fd, flags))| Some((index, (*fd)?, *flags)));
        let (indexes, mut polled): (Vec<_>, Vec<_>) = open
            .map(|(index, fd, flags)| (index, PollFd::from_borrowed_fd(fd, flags)))
            .unzip();
        let timeout = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
        let _ = poll(&mut polled, timeout.as_ref()); // interrupted by a signal, nothing is ready
        let mut ready = [false; 5];
        for (index, polled) in indexes.into_iter().zip(polled) {
            ready[index] = !polled.revents().is_empty();
        }
        ready
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

    fn next_timer(&self) -> Instant {
        let limit = self.stop_at.filter(|_| self.stage.stop_reason().is_none());
        let timers = limit.into_iter().chain(self.stage.timer());
        timers.fold(self.next_caller_check, Instant::min)
    }

    /// Stops or kills the program when a limit or a timer has passed.
    ///
    /// # Errors
    /// The reason of the stop, when it is time to give the program up.
    fn on_timers(&mut self, now: Instant) -> Result<(), StopReason> {
        let is_running = self.stage.stop_reason().is_none();
        let reason = is_running.then(|| self.reason_to_stop(now)).flatten();
        if let Some((stage, signal)) = self.stage.next(now, reason, self.limits.kill_after) {
            self.process.signal(signal);
            self.stage = stage;
        }
        if self.next_caller_check <= now {
            // Not `now`: the check has taken time.
            self.next_caller_check = Instant::now() + CALLER_CHECK_INTERVAL;
        }
        match self.stage {
            Stage::Killed { why, give_up_at } if give_up_at <= now => Err(why),
            _ => Ok(()),
        }
    }

    fn is_output_too_large(&self) -> bool {
        self.output.len() > self.limits.output
    }

    /// A program that belongs to another user, or hangs in the kernel, cannot be killed: it is
    /// reaped when it ends.
    fn leave_alone(&mut self) {
        let number = self.process.id.as_raw_nonzero();
        log::warn!("process {number} cannot be killed, and is left alone");
        self.process.leave_alone();
    }

    fn reason_to_stop(&self, now: Instant) -> Option<StopReason> {
        if self.limits.caller.is_cancelled() {
            Some(StopReason::Cancelled)
        } else if self.is_output_too_large() {
            Some(StopReason::OutputTooLarge)
        } else if self.limits.deadline.is_some_and(|deadline| deadline <= now) {
            Some(StopReason::AtDeadline)
        } else if self.stop_at.is_some_and(|stop_at| stop_at <= now) {
            Some(StopReason::AtTimeLimit)
        } else if self.next_caller_check <= now && self.limits.caller.is_gone() {
            Some(StopReason::CallerGone)
        } else {
            None
        }
    }
}

/// Reads once from a pipe. Closes it at its end.
fn read(pipe: &mut Option<impl Read>, on_bytes: impl FnOnce(&[u8])) {
    let mut buffer = [0; READ_SIZE];
    match pipe.as_mut().map(|pipe| pipe.read(&mut buffer)) {
        Some(Ok(len @ 1..)) => on_bytes(&buffer[..len]),
        Some(Err(error)) if is_not_ready(&error) => {}
        _ => *pipe = None,
    }
}

fn is_not_ready(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::Cancel;
    use std::ffi::CString;

    #[test]
    fn a_run_is_terminated_then_killed_then_given_up_for_its_first_reason() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let stage = Stage::Running;
        assert!(stage.next(now, None, second).is_none() && stage.timer().is_none());
        let (stage, signal) = stage
            .next(now, Some(StopReason::CallerGone), second)
            .unwrap();
        assert_eq!((signal, stage.timer()), (Signal::TERM, Some(now + second)));
        let reason = Some(StopReason::AtTimeLimit); // later
        assert!(stage.next(now, reason, second).is_none());
        let (stage, signal) = stage.next(now + second, reason, second).unwrap();
        let give_up_at = now + second + GIVE_UP_AFTER;
        assert_eq!((signal, stage.timer()), (Signal::KILL, Some(give_up_at)));
        assert!(stage.next(give_up_at, reason, second).is_none());
        assert_eq!(stage.stop_reason(), Some(StopReason::CallerGone));
    }

    #[test]
    fn a_run_is_not_killed_if_the_time_to_kill_it_is_too_far_away() {
        let now = Instant::now();
        let reason = Some(StopReason::AtDeadline);
        let (stage, _) = Stage::Running.next(now, reason, Duration::MAX).unwrap();
        assert!(stage.timer().is_none() && stage.next(now, None, Duration::ZERO).is_none());
    }

    fn run_shell(script: &str, input: &[u8], limits: &Limits) -> Ended {
        let args = ["sh", "-c", script].map(|arg| CString::new(arg).unwrap());
        let command = Invocation {
            path: c"/bin/sh",
            args: &args,
            environment: &[c"PATH=/usr/bin:/bin"],
        };
        run_command(&command, input, "id", limits, &Groups::default()).unwrap()
    }

    #[test]
    fn a_run_exits_with_its_status_and_output_or_is_stopped_at_a_limit() {
        let cancel = Cancel::new().unwrap();
        let caller = Caller::new(&|| false, &cancel);
        let limits = Limits {
            time: Duration::from_secs(60),
            deadline: None,
            kill_after: Duration::from_millis(10),
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
