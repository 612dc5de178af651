//! When to connect again: which errors are final, and how long to wait. Pure but for the random part of the pauses.

use super::error::{Error, ErrorKind};
use backon::{BackoffBuilder, ExponentialBuilder};
use std::time::{Duration, Instant};

/// The first pause and the longest one; up to as much again is added at random.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(2_500);

/// What has worked for this long after a pause is stable: the pauses start again with the first.
const STABLE_AFTER: Duration = Duration::from_secs(1);

/// The **pauses** between attempts: exponential, with jitter, without end.
pub struct Backoff {
    pauses: Pauses,
    /// When the latest pause ends.
    paused_until: Instant,
}

type Pauses = <ExponentialBuilder as BackoffBuilder>::Backoff;

impl Backoff {
    /// Starts with the shortest pause.
    pub fn new(now: Instant) -> Self {
        Backoff { pauses: pauses(), paused_until: now }
    }

    /// How long to wait before the next attempt.
    pub fn next_pause(&mut self, now: Instant) -> Duration {
        if now.saturating_duration_since(self.paused_until) >= STABLE_AFTER {
            self.pauses = pauses();
        }
        let pause = self.pauses.next().unwrap_or(LONGEST_PAUSE); // there is always a next one
        self.paused_until = now + pause;
        pause
    }
}

fn pauses() -> Pauses {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

/// Decides, for both programs, how to go on after an error of the connection.
pub struct Retry {
    backoff: Backoff,
    were_credentials_refused: bool,
}

/// How to go on after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether retrying cannot help.
    pub is_final: bool,
    /// How long to wait before the next attempt, if there is one.
    pub pause: Duration,
}

impl Retry {
    /// No error yet.
    pub fn new(now: Instant) -> Self {
        Retry { backoff: Backoff::new(now), were_credentials_refused: false }
    }

    /// Connected. Only refusals of the credentials that follow one another are final.
    pub fn on_connected(&mut self) {
        self.were_credentials_refused = false;
    }

    /// An attempt failed, or a connection ended.
    ///
    /// The first refusal of the credentials is not final: a broker that shuts down during login looks the same.
    pub fn on_error(&mut self, error: &Error, now: Instant) -> Decision {
        let is_first_refusal = matches!(error.kind, ErrorKind::Credentials(_))
            && !std::mem::replace(&mut self.were_credentials_refused, true);
        let is_final = error.is_permanent() && !is_first_refusal;
        Decision { is_final, pause: self.backoff.next_pause(now) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::Reason;
    use super::*;

    #[test]
    fn pauses_grow_while_nothing_works_and_start_again_when_something_did() {
        let start = Instant::now();
        let (mut backoff, mut now) = (Backoff::new(start), start);
        let pauses = [(); 8].map(|()| {
            let pause = backoff.next_pause(now);
            now += pause; // and the attempt fails at once
            pause
        });
        assert!(pauses[0] >= FIRST_PAUSE && pauses[0] <= 2 * FIRST_PAUSE);
        assert!(pauses[7] >= LONGEST_PAUSE && pauses[7] <= 2 * LONGEST_PAUSE, "{pauses:?}");
        assert!(backoff.next_pause(now + STABLE_AFTER) <= 2 * FIRST_PAUSE);
    }

    fn is_final(retry: &mut Retry, kind: ErrorKind) -> bool {
        retry.on_error(&Error::new("rabbit:5672", kind), Instant::now()).is_final
    }

    fn credentials() -> ErrorKind {
        ErrorKind::Credentials("user 'me'".into())
    }

    #[test]
    fn refusals_are_final_and_lost_connections_are_not() {
        let mut retry = Retry::new(Instant::now());
        assert!(!is_final(&mut retry, ErrorKind::ConnectionLost("reset".into())));
        assert!(!is_final(&mut retry, ErrorKind::ChannelClosed(Reason { code: 404, text: "no".into() })));
        assert!(is_final(&mut retry, ErrorKind::Refused(Reason { code: 403, text: "no".into() })));
    }

    #[test]
    fn credentials_are_final_when_they_are_refused_twice_without_a_connection_in_between() {
        let mut retry = Retry::new(Instant::now());
        assert!(!is_final(&mut retry, credentials()));
        retry.on_connected();
        assert!(!is_final(&mut retry, credentials()));
        assert!(!is_final(&mut retry, ErrorKind::ConnectionLost("reset".into())));
        assert!(is_final(&mut retry, credentials()));
    }
}
