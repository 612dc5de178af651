//! Publishes the requests of calls.

use crate::config::Config;
use crate::pending::Call;
use rpc_common::connection::{HeaderTooLarge, Publisher};
use rpc_common::message::{self, unix_time_ms, DEADLINE_HEADER};
use rpc_common::properties::TableBuilder;
use std::collections::BTreeMap;
use std::time::SystemTime;
use uuid::Uuid;

/// Maximum number of bytes that are encoded before they are written.
const MAX_BUFFERED: usize = 64 << 10;

/// Publishes requests on a connected session.
pub(crate) struct RequestPublisher {
    publisher: Publisher,
    /// The request queue.
    queue: String,
    reply_queue: String,
    content_type: String,
    headers: TableBuilder,
}

impl RequestPublisher {
    pub(crate) fn new(publisher: Publisher, config: &Config, reply_queue: &str) -> Self {
        RequestPublisher {
            publisher,
            queue: config.queue.clone(),
            reply_queue: reply_queue.into(),
            content_type: config.content_type.clone(),
            headers: headers(config),
        }
    }

    /// Adds the request of a call. Writes what was added when that is much.
    ///
    /// # Errors
    /// [`HeaderTooLarge`]; then the request is not added.
    pub(crate) fn add<T>(&self, call: &Call<T>) -> Result<(), HeaderTooLarge> {
        let mut id = Uuid::encode_buffer();
        let id = call.id.as_hyphenated().encode_lower(&mut id);
        let time_left = call.deadline.remaining();
        let request = message::Request {
            body: &call.request.body,
            content_type: Some(self.content_type.as_bytes()),
            headers: self.headers.table(),
            reply_to: Some(self.reply_queue.as_bytes()),
            correlation_id: Some(id.as_bytes()),
            deadline_ms: Some(unix_time_ms(SystemTime::now() + time_left)),
            ..message::Request::default()
        };
        let message = request.encode(self.queue.as_bytes(), Some(time_left));
        self.publisher.add_message(&message)?;
        if self.publisher.buffered() > MAX_BUFFERED {
            self.flush();
        }
        Ok(())
    }

    /// Whether the broker takes what we send at once. Otherwise nothing is encoded: a request would
    /// carry the time that was left then, and would be run when its caller has gone.
    pub(crate) fn is_writable(&self) -> bool {
        !self.publisher.has_backlog()
    }

    /// Writes the requests that were added.
    pub(crate) fn flush(&self) {
        // Fails if the channel or the connection has ended: the inbox tells how.
        let _ = self.publisher.flush();
    }
}

/// The headers of all requests. Of several with one name the last one counts.
fn headers(config: &Config) -> TableBuilder {
    let by_name: BTreeMap<_, _> = config
        .headers
        .iter()
        .map(|(name, value)| (name, value))
        .collect();
    let headers = by_name
        .into_iter()
        .filter(|(name, _)| *name != DEADLINE_HEADER); // that one is of each request
    headers.fold(TableBuilder::default(), |table, (name, value)| {
        table.with_text(name, value)
    })
}
