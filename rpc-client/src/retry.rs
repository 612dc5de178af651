//! Whether an error ends a run or only its session. Pure.

use rpc_common::connection::{ErrorKind, ACCESS_REFUSED};
use std::time::Duration;

/// The shortest pause between two attempts to connect.
pub(crate) const MIN_PAUSE: Duration = Duration::from_millis(10);

/// How far the pending calls have come.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Progress {
    NoCalls,
    NothingSent { was_connected: bool, time_left: Duration },
    Sent,
}

/// Whether an error of a connection ends the run.
///
/// Before anything is sent, the run ends at once if it was never connected, and else when retrying cannot help or the
/// time is up. What was sent may have run: then only a missing permission ends the run.
pub(crate) fn ends_run(error: &ErrorKind, is_final: bool, progress: Progress) -> bool {
    match progress {
        Progress::NoCalls => false, // the next call connects again
        Progress::Sent => matches!(error, ErrorKind::Refused(reason) if reason.code == ACCESS_REFUSED),
        Progress::NothingSent { was_connected, time_left } => is_final || !was_connected || time_left <= MIN_PAUSE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::connection::Reason;

    const LOST: ErrorKind = ErrorKind::TooManyChannels; // any kind that is no refusal
    const TIME_LEFT: Duration = Duration::from_secs(30);

    #[test]
    fn a_run_that_was_never_connected_ends_with_the_first_error() {
        let progress = Progress::NothingSent { was_connected: false, time_left: TIME_LEFT };
        assert!(ends_run(&LOST, false, progress));
    }

    #[test]
    fn a_run_that_was_connected_ends_when_retrying_cannot_help_or_the_time_is_up() {
        let progress = |time_left| Progress::NothingSent { was_connected: true, time_left };
        assert!(!ends_run(&LOST, false, progress(TIME_LEFT)));
        assert!(ends_run(&LOST, true, progress(TIME_LEFT)));
        assert!(ends_run(&LOST, false, progress(MIN_PAUSE)));
    }

    #[test]
    fn after_the_first_publish_only_a_refusal_of_access_ends_the_run() {
        let refused = ErrorKind::Refused(Reason { code: ACCESS_REFUSED, text: "no".into() });
        assert!(!ends_run(&LOST, true, Progress::Sent));
        assert!(ends_run(&refused, false, Progress::Sent));
        assert!(!ends_run(&refused, true, Progress::NoCalls));
    }
}
