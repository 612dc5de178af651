//! Publishes replies, and logs those that the broker returns.

use rpc_common::connection::{Publisher, Returned};
use rpc_common::message::{encode_reply, ErrorCode, Failure, Reply, Request};
use rpc_common::text::escape;

/// Adds the reply to a request. An error replaces a reply whose properties do not fit into a frame:
/// one with an error code of kilobytes.
pub(crate) fn add_reply(publisher: &Publisher, reply: &Reply, request: &Request) {
    let add = |reply: &Reply| {
        publisher.add_message(&encode_reply(
            reply,
            request.reply_to.unwrap_or_default(),
            request.correlation_id,
        ))
    };
    if let Err(error) = add(reply) {
        log::warn!(
            outcome = ErrorCode::Internal.as_str();
            "cannot publish a reply: {error}"
        );
        let message = "internal error: the properties of the reply are too large";
        let _ = add(&Err(Failure::new(ErrorCode::Internal, message))); // it is small
    }
}

/// Logs a reply that the broker returned.
pub(crate) fn log_return(reply: &Returned) {
    log::info!(
        outcome = "returned"; // of the reply
        "a reply was returned: there is no queue '{}', the caller has gone or reconnected (correlation id: {})",
        escape(&reply.routing_key),
        escape(reply.correlation_id().unwrap_or(b"none")),
    );
}
