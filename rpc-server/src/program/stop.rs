//! Stops a program at the limits of a request, or when it is no longer needed: in stages, from a
//! time in which it may end by itself to SIGKILL.

use super::process::Process;
use crate::handler::Caller;
use rustix::process::Signal;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Time after SIGKILL after which a program is given up.
const GIVE_UP_AFTER: Duration = Duration::from_secs(5);

/// Interval at which is checked whether the caller has gone.
const CALLER_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// The limits of a program while it handles a request.
pub(crate) struct Limits<'a> {
    /// Maximum duration.
    pub(crate) time: Duration,
    /// The caller's deadline.
    pub(crate) deadline: Option<Instant>,
    /// Time between SIGTERM and SIGKILL.
    pub(crate) kill_after: Duration,
    /// Whether a program whose caller no longer waits has `kill_after` to answer before SIGTERM: a
    /// persistent program lives on then.
    pub(crate) may_answer_late: bool,
    /// The largest output, in bytes.
    pub(crate) output: usize,
    pub(crate) caller: &'a Caller<'a>,
}

/// The reason to stop a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopReason {
    AtTimeLimit,
    AtDeadline,
    CallerGone,
    OutputTooLarge,
    /// The server gives the request up.
    Cancelled,
    /// A persistent program gets no further request.
    NotNeeded,
}

impl StopReason {
    /// Whether the caller no longer waits.
    fn is_of_caller(self) -> bool {
        matches!(self, StopReason::AtDeadline | StopReason::CallerGone)
    }
}

/// The stage of a program that has not exited. An instant that is `None` never comes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stage {
    /// The program runs.
    Running,
    /// The program may end, or answer, by itself. Its group gets SIGTERM at `terminate_at`.
    Ending {
        why: StopReason,
        terminate_at: Option<Instant>,
    },
    /// The group got SIGTERM. It gets SIGKILL at `kill_at`.
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
    pub(crate) fn stop_reason(self) -> Option<StopReason> {
        match self {
            Stage::Running => None,
            Stage::Ending { why, .. }
            | Stage::Terminating { why, .. }
            | Stage::Killed { why, .. } => Some(why),
        }
    }

    /// The stage of a program that may end by itself until `kill_after` from now.
    pub(crate) fn ending(why: StopReason, now: Instant, kill_after: Duration) -> Self {
        Stage::Ending {
            why,
            terminate_at: now.checked_add(kill_after),
        }
    }

    /// The stage after SIGTERM.
    fn terminating(why: StopReason, now: Instant, kill_after: Duration) -> Self {
        Stage::Terminating {
            why,
            kill_at: now.checked_add(kill_after),
        }
    }

    /// The next stage at this instant. `None` if the stage stays. A program that runs stays so.
    fn next(self, now: Instant, kill_after: Duration) -> Option<Self> {
        match self {
            Stage::Ending { why, terminate_at } if terminate_at.is_some_and(|at| at <= now) => {
                Some(Stage::terminating(why, now, kill_after))
            }
            Stage::Terminating { why, kill_at } if kill_at.is_some_and(|at| at <= now) => {
                Some(Stage::killed(why, now))
            }
            _ => None,
        }
    }

    /// The stage after SIGKILL.
    pub(crate) fn killed(why: StopReason, now: Instant) -> Self {
        let give_up_at = now + GIVE_UP_AFTER;
        Stage::Killed { why, give_up_at }
    }

    /// The signal with which a stage begins.
    fn signal(self) -> Option<Signal> {
        match self {
            Stage::Running | Stage::Ending { .. } => None,
            Stage::Terminating { .. } => Some(Signal::TERM),
            Stage::Killed { .. } => Some(Signal::KILL),
        }
    }

    /// The instant of the next stage, or of giving the program up. `None` for a program that runs,
    /// or that gets no further signal.
    pub(crate) fn timer(self) -> Option<Instant> {
        match self {
            Stage::Running => None,
            Stage::Ending { terminate_at, .. } => terminate_at,
            Stage::Terminating { kill_at, .. } => kill_at,
            Stage::Killed { give_up_at, .. } => Some(give_up_at),
        }
    }

    pub(crate) fn is_killed(self) -> bool {
        matches!(self, Stage::Killed { .. })
    }

    /// Begins a stage.
    pub(crate) fn begin(&mut self, stage: Stage, process: &Process) {
        *self = stage;
        if let Some(signal) = stage.signal() {
            process.signal(signal);
        }
    }

    /// Begins the next stage when its timer has passed.
    ///
    /// # Errors
    /// The reason of the stop, when it is time to give the program up.
    pub(crate) fn on_timer(
        &mut self,
        now: Instant,
        kill_after: Duration,
        process: &Process,
    ) -> Result<(), StopReason> {
        if let Some(next) = self.next(now, kill_after) {
            self.begin(next, process);
        }
        match *self {
            Stage::Killed { why, give_up_at } if give_up_at <= now => Err(why),
            _ => Ok(()),
        }
    }
}

/// Watches the limits of a program while it handles a request, and stops it at the first that
/// passes.
pub(crate) struct Watch<'a> {
    limits: &'a Limits<'a>,
    /// Instant of the time limit, or of the caller's deadline if that is earlier.
    stop_at: Option<Instant>,
    next_caller_check: Instant,
    stage: Stage,
}

impl<'a> Watch<'a> {
    pub(crate) fn new(limits: &'a Limits, now: Instant) -> Self {
        Watch {
            limits,
            stop_at: now
                .checked_add(limits.time)
                .into_iter()
                .chain(limits.deadline)
                .min(),
            next_caller_check: now + CALLER_CHECK_INTERVAL,
            stage: Stage::Running,
        }
    }

    pub(crate) fn stop_reason(&self) -> Option<StopReason> {
        self.stage.stop_reason()
    }

    /// The file that tells that the request is given up, while the program gets time.
    pub(crate) fn cancelled(&self) -> Option<BorrowedFd<'a>> {
        self.has_time().then(|| self.limits.caller.cancelled())
    }

    /// Whether the program was not told to end: its answer counts.
    pub(crate) fn has_time(&self) -> bool {
        matches!(self.stage, Stage::Running | Stage::Ending { .. })
    }

    /// The instant at which [`on_timers`](Self::on_timers) is due.
    pub(crate) fn next_timer(&self) -> Instant {
        let limit = self.stop_at.filter(|_| self.stop_reason().is_none());
        let timers = limit.into_iter().chain(self.stage.timer());
        timers.fold(self.next_caller_check, Instant::min)
    }

    /// Stops the program when a limit has passed, and begins the next stage of a stop when it is
    /// due.
    ///
    /// # Errors
    /// The reason of the stop, when it is time to give the program up.
    pub(crate) fn on_timers(
        &mut self,
        now: Instant,
        output: usize,
        process: &Process,
    ) -> Result<(), StopReason> {
        let kill_after = self.limits.kill_after;
        if let Some(next) = self.next_by_limits(now, output) {
            self.stage.begin(next, process);
        }
        if self.next_caller_check <= now {
            // Not `now`: the check has taken time.
            self.next_caller_check = Instant::now() + CALLER_CHECK_INTERVAL;
        }
        self.stage.on_timer(now, kill_after, process)
    }

    /// The stage that begins because a limit has passed.
    fn next_by_limits(&self, now: Instant, output: usize) -> Option<Stage> {
        let kill_after = self.limits.kill_after;
        match self.stage {
            Stage::Running => {
                let why = self.reason_to_stop(now, output)?;
                let may_answer = self.limits.may_answer_late && why.is_of_caller();
                Some(if may_answer {
                    Stage::ending(why, now, kill_after)
                } else {
                    Stage::terminating(why, now, kill_after)
                })
            }
            // These leave no time to answer.
            Stage::Ending { why, .. } => self
                .reason_for_all(output)
                .map(|_| Stage::terminating(why, now, kill_after)),
            Stage::Terminating { .. } | Stage::Killed { .. } => None,
        }
    }

    /// A reason to stop a program that runs, or may answer late.
    fn reason_for_all(&self, output: usize) -> Option<StopReason> {
        if self.limits.caller.is_cancelled() {
            Some(StopReason::Cancelled)
        } else if output > self.limits.output {
            Some(StopReason::OutputTooLarge)
        } else {
            None
        }
    }

    fn reason_to_stop(&self, now: Instant, output: usize) -> Option<StopReason> {
        let reason = self.reason_for_all(output);
        if reason.is_some() {
            reason
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::Cancel;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_program_is_terminated_then_killed_then_given_up_for_its_first_reason() {
        let now = Instant::now();
        let stage = Stage::terminating(StopReason::CallerGone, now, SECOND);
        assert_eq!(stage.timer(), Some(now + SECOND));
        assert_eq!(stage.signal(), Some(Signal::TERM));
        assert!(stage.next(now, SECOND).is_none());
        let stage = stage.next(now + SECOND, SECOND).unwrap();
        let give_up_at = now + SECOND + GIVE_UP_AFTER;
        assert_eq!(stage.timer(), Some(give_up_at));
        assert_eq!(stage.signal(), Some(Signal::KILL));
        assert!(stage.next(give_up_at, SECOND).is_none());
        assert_eq!(stage.stop_reason(), Some(StopReason::CallerGone));
    }

    #[test]
    fn a_program_is_not_killed_if_the_time_to_kill_it_is_too_far_away() {
        let now = Instant::now();
        let stage = Stage::terminating(StopReason::AtDeadline, now, Duration::MAX);
        assert!(stage.timer().is_none() && stage.next(now, Duration::ZERO).is_none());
    }

    fn limits<'a>(caller: &'a Caller, may_answer_late: bool) -> Limits<'a> {
        Limits {
            time: 3 * SECOND,
            deadline: Some(Instant::now() + SECOND),
            kill_after: SECOND,
            may_answer_late,
            output: 9,
            caller,
        }
    }

    #[test]
    fn only_a_persistent_program_has_time_to_answer_after_the_deadline() {
        let cancel = Cancel::new().unwrap();
        let caller = Caller::new(&|| false, &cancel);
        for may_answer_late in [true, false] {
            let limits = limits(&caller, may_answer_late);
            let mut watch = Watch::new(&limits, Instant::now());
            assert!(watch.next_by_limits(Instant::now(), 9).is_none());
            let late = Instant::now() + SECOND;
            watch.stage = watch.next_by_limits(late, 0).unwrap();
            assert_eq!(watch.stop_reason(), Some(StopReason::AtDeadline));
            assert_eq!(watch.stage.signal().is_none(), may_answer_late);
            assert!(watch.next_by_limits(late + 3 * SECOND, 0).is_none());
            // There is no time for a program that writes too much.
            let next = watch.next_by_limits(late, 10);
            assert_eq!(next.is_some(), may_answer_late);
        }
    }

    #[test]
    fn each_limit_stops_a_program() {
        let cancel = Cancel::new().unwrap();
        let gone = Caller::new(&|| true, &cancel);
        let waiting = Caller::new(&|| false, &cancel);
        let now = Instant::now();
        let stopped = |caller: &Caller, seconds: u32, output: usize, has_deadline: bool| {
            let mut limits = limits(caller, false);
            limits.deadline = limits.deadline.filter(|_| has_deadline);
            limits.time = 11 * SECOND;
            let watch = Watch::new(&limits, now);
            let next = watch.next_by_limits(now + seconds * SECOND, output);
            next.and_then(Stage::stop_reason)
        };
        assert_eq!(stopped(&waiting, 10, 9, false), None);
        assert_eq!(
            stopped(&waiting, 0, 10, false),
            Some(StopReason::OutputTooLarge)
        );
        assert_eq!(stopped(&waiting, 2, 0, true), Some(StopReason::AtDeadline));
        assert_eq!(
            stopped(&waiting, 11, 0, false),
            Some(StopReason::AtTimeLimit)
        );
        assert_eq!(stopped(&gone, 9, 0, false), None);
        assert_eq!(stopped(&gone, 10, 0, false), Some(StopReason::CallerGone));
        cancel.cancel();
        assert_eq!(stopped(&waiting, 0, 10, true), Some(StopReason::Cancelled));
    }
}
