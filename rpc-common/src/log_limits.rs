//! What the log leaves out: lines beyond a rate, and lines for which the queue to a slow reader has
//! no room. Both are counted. Pure.

use log::Level;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Maximum number of lines that a call site logs in each window.
const MAX_LINES: u64 = 5;

/// Maximum number of lines about requests with the same outcome in each window: each line is about
/// another request.
const MAX_REQUEST_LINES: u64 = 100;

/// Maximum number of outcomes that have a window each. The others share one: a function chooses its
/// error codes.
const MAX_OUTCOMES: usize = 32;

/// The outcome in the count of the outcomes that share a window.
const OTHER_OUTCOMES: &str = "other";

/// Length of a window.
const WINDOW_LENGTH: Duration = Duration::from_secs(60);

/// Time for which a repeated line, with no other line between, is counted before it is logged
/// again.
const REPETITION_LENGTH: Duration = Duration::from_secs(300);

/// A line of the log.
#[derive(Clone, Copy)]
pub(crate) struct Line<'a> {
    pub(crate) level: Level,
    pub(crate) target: &'a str,
    pub(crate) text: &'a str,
}

/// What logs a line.
#[derive(PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// A place in the source: a module and a line, and at what level.
    CallSite(Option<&'static str>, Option<u32>, Level),
    /// A request that ended with this outcome.
    Request(String),
}

/// What becomes of a line that is repeated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repetitions {
    /// Counted, for an operator.
    Counted,
    /// Logged as any other line: whoever waits at a prompt sees that something happens.
    Logged,
}

/// A fixed-window rate limiter, with a window for each source, and one for a line that is repeated.
pub(crate) struct RateLimiter {
    windows: HashMap<Source, Window>,
    repetitions: Repetitions,
    /// Since the latest line was logged.
    repetition: Option<Window>,
}

/// A **window** counts lines: those of one source, or those that are the same.
struct Window {
    start: Instant,
    logged: u64,
    suppressed: Suppressed,
}

/// The lines that a window suppressed.
pub(crate) struct Suppressed {
    pub(crate) level: Level,
    pub(crate) target: String,
    /// The outcome of the requests that the lines are about.
    outcome: Option<String>,
    count: u64,
    last: String,
}

impl Suppressed {
    /// The line of the log that says what was suppressed.
    pub(crate) fn message(&self) -> String {
        let Suppressed { count, last, .. } = self;
        let outcome = self.outcome.as_ref().map(|outcome| format!(" ({outcome})"));
        let outcome = outcome.unwrap_or_default();
        format!("suppressed {count} similar lines{outcome}; the last: {last}")
    }
}

impl Window {
    fn new(line: Line, outcome: Option<String>, now: Instant) -> Self {
        Window {
            start: now,
            logged: 0,
            suppressed: Suppressed {
                level: line.level,
                target: line.target.into(),
                outcome,
                count: 0,
                last: line.text.into(),
            },
        }
    }
}

impl RateLimiter {
    pub(crate) fn new(repetitions: Repetitions) -> Self {
        RateLimiter {
            windows: HashMap::new(),
            repetitions,
            repetition: None,
        }
    }

    /// Counts a line. Returns whether it may be logged, and what was suppressed before.
    pub(crate) fn count(
        &mut self,
        source: Source,
        line: Line,
        now: Instant,
    ) -> (bool, Vec<Suppressed>) {
        let mut ended = self.end_windows(now);
        // Each line about a request is about another one.
        let is_request = matches!(source, Source::Request(_));
        let is_repeated = |repetition: &Window| repetition.suppressed.last == line.text;
        let is_over = |repetition: &mut Window| is_request || !is_repeated(repetition);
        ended.extend(suppressed(self.repetition.take_if(is_over)));
        if let Some(repetition) = &mut self.repetition {
            repetition.suppressed.count += 1;
            return (false, ended);
        }
        let source = self.limit_outcomes(source);
        let (max, outcome) = match &source {
            Source::CallSite(..) => (MAX_LINES, None),
            Source::Request(outcome) => (MAX_REQUEST_LINES, Some(outcome.clone())),
        };
        let window = self
            .windows
            .entry(source)
            .or_insert_with(|| Window::new(line, outcome, now));
        if window.logged >= max {
            window.suppressed.count += 1;
            window.suppressed.last = line.text.into();
            return (false, ended);
        }
        window.logged += 1;
        if self.repetitions == Repetitions::Counted && !is_request {
            self.repetition = Some(Window::new(line, None, now));
        }
        (true, ended)
    }

    /// Ends the windows that are over, and returns what they suppressed.
    pub(crate) fn end_windows(&mut self, now: Instant) -> Vec<Suppressed> {
        let is_over = |window: &Window, length| now.duration_since(window.start) >= length;
        let repetition = self
            .repetition
            .take_if(|window| is_over(window, REPETITION_LENGTH));
        let windows = self
            .windows
            .extract_if(|_, window| is_over(window, WINDOW_LENGTH))
            .map(|(_, window)| window);
        suppressed(repetition.into_iter().chain(windows))
    }

    /// Ends all windows, and returns what they suppressed.
    pub(crate) fn end_all(&mut self) -> Vec<Suppressed> {
        let windows = self.windows.drain().map(|(_, window)| window);
        suppressed(self.repetition.take().into_iter().chain(windows))
    }

    /// Whether a window has suppressed lines.
    pub(crate) fn has_suppressed(&self) -> bool {
        let mut windows = self.repetition.iter().chain(self.windows.values());
        windows.any(|window| window.suppressed.count > 0)
    }

    /// Replaces the outcome of a request that is one too many.
    fn limit_outcomes(&self, source: Source) -> Source {
        let is_request = |source: &&Source| matches!(source, Source::Request(_));
        let has_window = self.windows.contains_key(&source);
        if is_request(&&source)
            && !has_window
            && self.windows.keys().filter(is_request).count() >= MAX_OUTCOMES
        {
            return Source::Request(OTHER_OUTCOMES.into());
        }
        source
    }
}

/// What these windows suppressed.
fn suppressed(windows: impl IntoIterator<Item = Window>) -> Vec<Suppressed> {
    windows
        .into_iter()
        .map(|window| window.suppressed)
        .filter(|suppressed| suppressed.count > 0)
        .collect()
}

/// A **queue share** is the part of the queue to the log's reader that some lines may use. When
/// the part is full, lines are dropped until half of the part is free: so the dropped lines are one
/// gap in the log, where their count is logged.
pub(crate) struct QueueShare {
    /// Maximum number of lines in the queue, those of other shares included.
    max: usize,
    dropped: Option<Dropped>,
}

/// Lines that were dropped.
pub(crate) struct Dropped {
    /// Of the first line.
    pub(crate) target: String,
    pub(crate) count: u64,
}

impl QueueShare {
    pub(crate) fn new(max: usize) -> Self {
        QueueShare { max, dropped: None }
    }

    /// Whether a line may join the queue, in which `waiting` lines are. If not, the line is
    /// counted. Called after `end_gap`.
    pub(crate) fn admit(&mut self, target: &str, waiting: usize) -> bool {
        if self.dropped.is_none() && waiting < self.max {
            return true;
        }
        let new = || Dropped {
            target: target.into(),
            count: 0,
        };
        self.dropped.get_or_insert_with(new).count += 1;
        false
    }

    /// The lines that were dropped, if the reader has gone on since.
    pub(crate) fn end_gap(&mut self, waiting: usize) -> Option<Dropped> {
        self.dropped.take_if(|_| waiting <= self.max / 2)
    }

    /// The lines that were dropped.
    pub(crate) fn take_dropped(&mut self) -> Option<Dropped> {
        self.dropped.take()
    }

    pub(crate) fn has_dropped(&self) -> bool {
        self.dropped.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line<'_> {
        Line {
            level: Level::Warn,
            target: "rpc_server",
            text,
        }
    }

    fn call_site(line: u32) -> Source {
        Source::CallSite(None, Some(line), Level::Warn)
    }

    fn request(outcome: &str) -> Source {
        Source::Request(outcome.into())
    }

    fn messages(suppressed: &[Suppressed]) -> Vec<String> {
        suppressed.iter().map(Suppressed::message).collect()
    }

    /// Counts a line; returns whether it is logged, and what was suppressed before.
    fn count(
        limiter: &mut RateLimiter,
        source: Source,
        text: &str,
        now: Instant,
    ) -> (bool, Vec<String>) {
        let (is_logged, ended) = limiter.count(source, line(text), now);
        (is_logged, messages(&ended))
    }

    #[test]
    fn a_line_that_is_repeated_is_logged_again_after_five_minutes() {
        let mut limiter = RateLimiter::new(Repetitions::Counted);
        let start = Instant::now();
        let mut lost_at = |seconds| {
            let now = start + Duration::from_secs(seconds);
            count(&mut limiter, call_site(1), "lost", now)
        };
        assert_eq!(lost_at(0), (true, vec![]));
        for seconds in 1..300 {
            assert_eq!(lost_at(seconds), (false, vec![]));
        }
        let counted = "suppressed 299 similar lines; the last: lost";
        assert_eq!(lost_at(300), (true, vec![counted.into()]));
        assert_eq!(lost_at(301), (false, vec![]));
    }

    #[test]
    fn a_call_site_logs_five_lines_a_minute_and_the_others_are_counted() {
        let mut limiter = RateLimiter::new(Repetitions::Logged);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut lost = |n, now| count(&mut limiter, call_site(1), &format!("lost {n}"), now);
        let logged = (0..100).filter(|n| lost(*n, at(0)).0).count();
        assert_eq!(logged, 5);
        assert_eq!(lost(100, at(59)), (false, vec![]));
        let counted = "suppressed 96 similar lines; the last: lost 100";
        assert_eq!(lost(101, at(60)), (true, vec![counted.into()]));
        assert_eq!(lost(102, at(200)), (true, vec![]), "a new window");
        let found = count(&mut limiter, call_site(2), "found", at(200));
        assert_eq!(found, (true, vec![]), "another call site");
    }

    #[test]
    fn requests_have_a_hundred_lines_a_minute_for_each_outcome() {
        let mut limiter = RateLimiter::new(Repetitions::Logged);
        let start = Instant::now();
        let mut logged = |outcome, times| {
            let source = || request(outcome);
            let logs = |n: &u32| {
                let text = format!("request[{n}]: {outcome}");
                count(&mut limiter, source(), &text, start).0
            };
            (0..times).filter(logs).count()
        };
        assert_eq!(logged("failed", 150), 100);
        assert_eq!(logged("expired", 7), 7);
        let later = |seconds| start + Duration::from_secs(seconds);
        assert!(limiter.has_suppressed());
        assert_eq!(limiter.end_windows(later(59)).len(), 0);
        assert_eq!(
            messages(&limiter.end_windows(later(60))),
            ["suppressed 50 similar lines (failed); the last: request[149]: failed"],
            "without another line"
        );
        assert!(!limiter.has_suppressed());
    }

    /// Requests without a correlation id have the same lines.
    #[test]
    fn lines_of_requests_that_are_the_same_are_not_a_repetition() {
        let mut limiter = RateLimiter::new(Repetitions::Counted);
        let now = Instant::now();
        assert!(count(&mut limiter, call_site(1), "lost", now).0);
        assert!(!count(&mut limiter, call_site(1), "lost", now).0);
        let counted = "suppressed 1 similar lines; the last: lost";
        let failed = |limiter: &mut _| count(limiter, request("failed"), "failed", now);
        assert_eq!(failed(&mut limiter), (true, vec![counted.into()]));
        assert_eq!(failed(&mut limiter), (true, vec![]));
    }

    #[test]
    fn a_function_with_many_error_codes_does_not_flood_the_log() {
        let mut limiter = RateLimiter::new(Repetitions::Logged);
        let now = Instant::now();
        let logged = (0..10_000)
            .filter(|n| count(&mut limiter, request(&n.to_string()), "x", now).0)
            .count();
        assert_eq!(logged, MAX_OUTCOMES + 100);
        assert!(count(&mut limiter, request("0"), "x", now).0);
        let counted = "suppressed 9868 similar lines (other); the last: x";
        assert_eq!(messages(&limiter.end_all()), [counted]);
    }

    #[test]
    fn lines_are_dropped_from_a_full_share_until_half_of_it_is_free() {
        let mut share = QueueShare::new(10);
        assert!(share.admit("first", 9));
        assert!(!share.has_dropped());
        assert!(!share.admit("second", 10));
        assert!(!share.admit("third", 9), "the gap goes on");
        assert!(share.has_dropped());
        assert!(share.end_gap(6).is_none());
        let dropped = share.end_gap(5).expect("half of the share is free");
        assert_eq!((dropped.count, &*dropped.target), (2, "second"));
        assert!(share.admit("fourth", 5) && share.take_dropped().is_none());
    }
}
