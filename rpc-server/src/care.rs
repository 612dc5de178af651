//! Care: what a worker remembers of replies that the broker did not take.
//!
//! A reply can be larger than the broker takes, or its queue one that we may not write to. Then the broker
//! closes the channel and delivers the request again, for ever if it were simply answered again. Which
//! reply it was the broker does not say, and it tells so late; so after such an end a worker
//! waits after each reply until the broker has taken it, for a while.
//!
//! Nor does it wait for ever: a request that takes longer than its `consumer_timeout` is delivered again.
//! The reply that comes too late is kept for that.

use rpc_common::message::{ErrorCode, Failure, Reply, Request};
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

/// How many requests are answered with care.
const CAREFUL: u32 = 64;

/// How many refused requests are remembered.
const REMEMBERED: usize = 64;

/// What a worker has learned of replies that were refused.
#[derive(Default)]
pub(crate) struct Care {
    /// How many requests are still to be answered with care.
    left: u32,
    /// The requests whose replies were refused, the latest last, and how often that was.
    refused: VecDeque<(u64, u32)>,
    /// A reply that found its channel closed, because the broker would not wait for it any longer.
    kept: Option<(u64, Reply)>,
}

/// What is to be done with a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Answer it.
    Answer,
    /// Its answer was refused: answer with an error, which may be taken.
    AnswerError,
    /// That was refused as well: reject it.
    Reject,
}

impl Care {
    /// The broker closed the channel: perhaps it refused a reply.
    pub(crate) fn begin(&mut self) {
        self.left = CAREFUL;
    }

    /// Whether to wait until the broker has taken the reply of the next request.
    pub(crate) fn is_needed(&mut self) -> bool {
        let needed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        needed
    }

    /// What is to be done with a request.
    pub(crate) fn verdict(&self, request: &Request) -> Verdict {
        if self.refused.is_empty() {
            return Verdict::Answer; // as nearly always: no body is hashed for it
        }
        let key = key(request);
        match self.refused.iter().find(|(refused, _)| *refused == key) {
            None => Verdict::Answer,
            Some((_, 1)) => Verdict::AnswerError,
            Some(_) => Verdict::Reject,
        }
    }

    /// Keeps a reply for when its request is delivered again: to compute it again would take as long again.
    pub(crate) fn keep(&mut self, key: u64, reply: Reply) {
        self.kept = Some((key, reply));
    }

    /// The reply that was kept for this request.
    pub(crate) fn take_kept(&mut self, request: &Request) -> Option<Reply> {
        let (kept, _) = self.kept.as_ref()?;
        if *kept != key(request) {
            return None;
        }
        self.kept.take().map(|(_, reply)| reply)
    }

    /// The reply to this request was refused.
    pub(crate) fn refuse(&mut self, key: u64) {
        if let Some((_, times)) = self.refused.iter_mut().find(|(refused, _)| *refused == key) {
            *times += 1;
            return;
        }
        self.refused.push_back((key, 1));
        if self.refused.len() > REMEMBERED {
            self.refused.pop_front();
        }
    }
}

/// By what a request is known when it is delivered again.
pub(crate) fn key(request: &Request) -> u64 {
    let mut hasher = DefaultHasher::new();
    (request.correlation_id, request.reply_to, request.body).hash(&mut hasher);
    hasher.finish()
}

/// The answer in the place of one that the broker refused.
pub(crate) fn refusal() -> Reply {
    let message = "internal error: the broker refused the answer, perhaps for its size".into();
    Err(Failure { code: ErrorCode::Internal, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(body: &[u8]) -> Request<'_> {
        Request { body, reply_to: Some("replies"), correlation_id: Some("1"), expiration: None }
    }

    #[test]
    fn a_request_is_answered_then_answered_with_an_error_and_then_rejected() {
        let mut care = Care::default();
        let (large, other) = (request(b"30"), request(b"31"));
        for verdict in [Verdict::Answer, Verdict::AnswerError, Verdict::Reject, Verdict::Reject] {
            assert_eq!(care.verdict(&large), verdict);
            assert_eq!(care.verdict(&other), Verdict::Answer);
            care.refuse(key(&large));
        }
    }

    #[test]
    fn care_wears_off_and_memory_is_bounded() {
        let mut care = Care::default();
        assert!(!care.is_needed());
        care.begin();
        assert_eq!((0..1000).filter(|_| care.is_needed()).count(), CAREFUL as usize);
        (0..1000).for_each(|key| care.refuse(key));
        assert_eq!(care.refused.len(), REMEMBERED);
    }
}
