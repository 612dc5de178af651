//! Computed replies, kept for when their requests are delivered again.
//!
//! The broker waits for an acknowledgement no longer than its `consumer_timeout`. Then it closes the channel or cancels the
//! consumer, and delivers the request again, perhaps to another worker; computing the reply again would take as long again.

use rpc_common::message::{Reply, Request};
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

/// How many replies are kept: the latest ones.
const MAX_KEPT: usize = 64;

/// The latest replies whose channel or consumer had ended when they were sent, of all workers.
#[derive(Default)]
pub(crate) struct KeptReplies(Mutex<VecDeque<(u64, Reply)>>);

impl KeptReplies {
    /// Keeps the reply to this request.
    pub(crate) fn keep(&self, request: &Request, reply: Reply) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.truncate(MAX_KEPT - 1);
        kept.push_front((key(request), reply));
    }

    /// Returns the reply that was kept for this request.
    pub(crate) fn take(&self, request: &Request) -> Option<Reply> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key(request);
        let index = kept.iter().position(|(kept, _)| *kept == key)?;
        kept.remove(index).map(|(_, reply)| reply)
    }
}

/// What identifies a request when it is delivered again.
fn key(request: &Request) -> u64 {
    let mut hasher = DefaultHasher::new();
    (request.correlation_id, request.reply_to, request.body).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_kept_for_its_request_only_and_once() {
        let request = |body| Request { body, reply_to: Some("to"), correlation_id: None, deadline_ms: None };
        let kept = KeptReplies::default();
        assert_eq!(kept.take(&request(b"30")), None);
        kept.keep(&request(b"30"), Ok("832040".into()));
        kept.keep(&request(b"20"), Ok("6765".into()));
        assert_eq!(kept.take(&request(b"31")), None);
        assert_eq!(kept.take(&request(b"30")), Some(Ok("832040".into())));
        assert_eq!(kept.take(&request(b"30")), None);
        (0..MAX_KEPT).for_each(|_| kept.keep(&request(b"30"), Ok("832040".into())));
        assert_eq!(kept.take(&request(b"20")), None, "it was the oldest");
    }
}
