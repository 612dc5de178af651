//! Publishes replies to redelivered requests, each alone on a connection of its own.
//!
//! The broker may close the channel, or the whole connection, because of a reply: it is too large, or its queue does not
//! exist or may not be written to. Then the request is delivered again, without end, and the broker does not say which
//! reply it refused. So the reply to a redelivered request is published alone: if the broker closes something then, it is
//! because of this reply, and no other request is affected.

use amiquip::{Publish, Return};
use rpc_common::connection::{Connection, Deadline, Endpoint, Error, OpenChannel, Publisher};
use rpc_common::text::escape;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the connection is closed, so that it does not stay open for good.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long one reply may take; and for how long none is tried after one that got no answer.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// How many returned replies may be unread: more than the one that is published at a time.
const MAX_UNREAD: usize = 64;

/// What happened to a reply.
pub(crate) enum Published {
    /// The broker accepted it.
    Accepted,
    /// The broker closed the channel or the connection because of it.
    Refused(Error),
    /// The connection could not be opened, or ended for another reason.
    Unknown(Error),
}

/// Publishes replies one at a time, for all workers.
#[derive(Default)]
pub(crate) struct IsolatedPublisher(Mutex<State>);

#[derive(Default)]
struct State {
    /// Kept open after a reply that was accepted.
    open: Option<Open>,
    /// Why the latest reply got no answer, and until when no other is tried.
    failure: Option<(Error, Instant)>,
}

/// An open connection with its channel.
struct Open {
    connection: Connection, // first, so that it is closed first: then closing the channel does not wait
    channel: OpenChannel,
    publisher: Publisher,
}

impl IsolatedPublisher {
    /// Publishes a reply and waits for the broker. If it has no connection, it connects to `endpoint`. See
    /// [`Publisher::publish`] for `correlation_id`.
    pub(crate) fn publish(&self, endpoint: &Endpoint, reply: Publish, correlation_id: Option<&[u8]>) -> Published {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &state.failure {
            Some((error, until)) if Instant::now() < *until => return Published::Unknown(error.clone()),
            _ => state.failure = None,
        }
        let published = state.publish(endpoint, reply, correlation_id);
        if let Published::Unknown(error) = &published {
            state.failure = Some((error.clone(), Instant::now() + PUBLISH_TIMEOUT));
        }
        published
    }

    /// Closes the connection, if it is not in use. The next reply opens another one.
    pub(crate) fn close_unused(&self) {
        if let Ok(mut state) = self.0.try_lock() {
            state.open = None;
        }
    }
}

impl State {
    fn publish(&mut self, endpoint: &Endpoint, reply: Publish, correlation_id: Option<&[u8]>) -> Published {
        let deadline = Deadline::after(PUBLISH_TIMEOUT);
        let mut open = match self.open.take().map_or_else(|| Open::new(endpoint, &deadline), Ok) {
            Ok(open) => open,
            Err(error) => return Published::Unknown(error),
        };
        open.publisher.publish(reply, correlation_id);
        let _ = open.publisher.send(); // the round trip returns the cause
        match open.wait_for_broker(&deadline) {
            Ok(()) => {
                self.open = Some(open);
                Published::Accepted
            }
            Err(error) if error.is_caused_by_message() => Published::Refused(error),
            Err(error) => Published::Unknown(error),
        }
    }
}

impl Open {
    fn new(endpoint: &Endpoint, deadline: &Deadline) -> Result<Self, Error> {
        let mut connection = Connection::open(endpoint, "rpc-server", deadline)?;
        let (channel, publisher) = connection.open_channel(MAX_UNREAD, deadline)?;
        Ok(Open { connection, channel, publisher })
    }

    /// A round trip: when it succeeds, the broker has accepted what was published before.
    fn wait_for_broker(&mut self, deadline: &Deadline) -> Result<(), Error> {
        let channel = &self.channel.amqp;
        self.connection.call(deadline, "publishing a reply", |_| channel.qos(0, 0, false))?;
        self.channel.returns.try_iter().for_each(|reply| log_return(&reply));
        Ok(())
    }
}

/// Logs a reply that the broker returned.
pub(crate) fn log_return(reply: &Return) {
    let id = reply.properties.correlation_id().as_deref().unwrap_or("none");
    log::warn!(
        "the caller is gone: its queue '{}' no longer exists (correlation id: {})",
        escape(reply.routing_key.as_bytes()),
        escape(id.as_bytes()),
    );
}
