//! Whether an error ends a run or only its session. Pure.

use rpc_common::connection::{Error, ErrorKind, Meaning, ACCESS_REFUSED};
use std::time::Duration;

/// Minimum pause between two attempts to connect.
pub(crate) const MIN_PAUSE: Duration = Duration::from_millis(10);

/// The progress of the pending calls.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CallProgress {
    NoCalls,
    NothingSent {
        was_connected: bool,
        time_left: Duration,
    },
    Sent,
}

/// Whether an error of a connection ends the run.
///
/// Before anything is sent, the run ends at once if it was never connected, and else when retrying
/// cannot help or the time is up. What was sent may have run: then only a missing permission ends
/// the run.
pub(crate) fn ends_run(error: &Error, progress: CallProgress) -> bool {
    match progress {
        CallProgress::NoCalls => false, // the next call connects again
        CallProgress::Sent => {
            matches!(&error.kind, ErrorKind::Refused(reason) if reason.code == ACCESS_REFUSED)
        }
        CallProgress::NothingSent {
            was_connected,
            time_left,
        } => error.is_permanent() || !was_connected || time_left <= MIN_PAUSE,
    }
}

/// The broker's sentence, if it closed the channel because a request is larger than its
/// `max_message_size`.
pub(crate) fn too_large_reason(error: &Error) -> Option<&str> {
    match &error.kind {
        ErrorKind::ChannelClosed(reason) if reason.meaning() == Some(Meaning::MessageTooLarge) => {
            Some(&reason.text)
        }
        _ => None,
    }
}

/// Whether the broker refused a request: the user may not write to the exchange.
pub(crate) fn is_request_refused(error: &Error) -> bool {
    matches!(&error.kind, ErrorKind::Refused(reason) if reason.meaning() == Some(Meaning::ExchangeRefused))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::connection::Reason;

    fn lost() -> Error {
        Error::new("rabbit:5672", ErrorKind::ConnectionLost("reset".into()))
    }

    fn refused(code: u16) -> Error {
        Error::new(
            "rabbit:5672",
            ErrorKind::Refused(Reason {
                code,
                text: "no".into(),
            }),
        )
    }

    const TIME_LEFT: Duration = Duration::from_secs(30);

    #[test]
    fn a_run_that_was_never_connected_ends_with_the_first_error() {
        let progress = CallProgress::NothingSent {
            was_connected: false,
            time_left: TIME_LEFT,
        };
        assert!(ends_run(&lost(), progress));
    }

    #[test]
    fn a_run_that_was_connected_ends_when_retrying_cannot_help_or_the_time_is_up() {
        let progress = |time_left| CallProgress::NothingSent {
            was_connected: true,
            time_left,
        };
        assert!(!ends_run(&lost(), progress(TIME_LEFT)));
        let credentials = Error::new("rabbit:5672", ErrorKind::Credentials("user 'me'".into()));
        assert!(ends_run(&credentials, progress(TIME_LEFT)));
        assert!(ends_run(&lost(), progress(MIN_PAUSE)));
    }

    #[test]
    fn after_the_first_publish_only_a_refusal_of_access_ends_the_run() {
        assert!(!ends_run(&lost(), CallProgress::Sent));
        assert!(!ends_run(&refused(530), CallProgress::Sent));
        assert!(ends_run(&refused(ACCESS_REFUSED), CallProgress::Sent));
        assert!(!ends_run(&refused(ACCESS_REFUSED), CallProgress::NoCalls));
    }
}
