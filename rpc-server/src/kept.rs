//! A reply that is kept for when its request is delivered again.
//!
//! The broker waits for an acknowledgement no longer than its `consumer_timeout`; then it closes the channel and delivers
//! the request again. To compute the reply once more would take as long once more.

use rpc_common::message::{Reply, Request};
use std::hash::{DefaultHasher, Hash, Hasher};

/// The latest reply that found its channel closed.
#[derive(Default)]
pub(crate) struct KeptReply(Option<(u64, Reply)>);

impl KeptReply {
    /// Keeps the reply to this request, in the place of an earlier one.
    pub(crate) fn keep(&mut self, request: &Request, reply: Reply) {
        self.0 = Some((key(request), reply));
    }

    /// The reply that was kept for this request.
    pub(crate) fn take(&mut self, request: &Request) -> Option<Reply> {
        let (kept, _) = self.0.as_ref()?; // nearly always none: no body is hashed for it
        if *kept != key(request) {
            return None;
        }
        self.0.take().map(|(_, reply)| reply)
    }
}

/// By what a request is known when it is delivered again.
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
        let request =
            |body| Request { body, reply_to: Some("to"), correlation_id: None, expiration: None };
        let mut kept = KeptReply::default();
        assert_eq!(kept.take(&request(b"30")), None);
        kept.keep(&request(b"30"), Ok("832040".into()));
        assert_eq!(kept.take(&request(b"31")), None);
        assert_eq!(kept.take(&request(b"30")), Some(Ok("832040".into())));
        assert_eq!(kept.take(&request(b"30")), None);
    }
}
