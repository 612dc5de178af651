//! A computed reply, kept for when its request is delivered again.
//!
//! The broker waits for an acknowledgement no longer than its `consumer_timeout`. Then it closes the channel and delivers
//! the request again; computing the reply again would take as long again.

use rpc_common::message::{Reply, Request};
use std::hash::{DefaultHasher, Hash, Hasher};

/// The latest reply whose channel was closed before it was sent.
#[derive(Default)]
pub(crate) struct KeptReply(Option<(u64, Reply)>);

impl KeptReply {
    /// Keeps the reply to this request. It replaces an earlier one.
    pub(crate) fn keep(&mut self, request: &Request, reply: Reply) {
        self.0 = Some((key(request), reply));
    }

    /// Returns the reply that was kept for this request.
    pub(crate) fn take(&mut self, request: &Request) -> Option<Reply> {
        // Without a kept reply, which is nearly always, the body is not hashed.
        self.0.take_if(|(kept, _)| *kept == key(request)).map(|(_, reply)| reply)
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
        let mut kept = KeptReply::default();
        assert_eq!(kept.take(&request(b"30")), None);
        kept.keep(&request(b"30"), Ok("832040".into()));
        assert_eq!(kept.take(&request(b"31")), None);
        assert_eq!(kept.take(&request(b"30")), Some(Ok("832040".into())));
        assert_eq!(kept.take(&request(b"30")), None);
    }
}
