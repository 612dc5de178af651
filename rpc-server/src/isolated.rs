//! Replies to requests that were delivered before, each alone on a connection that carries nothing else.
//!
//! The broker may close the channel, or the whole connection, because of a reply: it is too large, or its queue is one
//! that we may not write to or that cannot be. Then the request is delivered again, and so on for ever. The broker does
//! not say which reply it refused. So the reply to a redelivered request is published alone: if the broker closes
//! something then, it is because of this reply, and it interrupts no other.

use crate::worker::{log_return, BROKER_CALL_TIMEOUT};
use amiquip::{Channel, Publish, Return};
use crossbeam_channel::Receiver;
use rpc_common::broker::{self, Error, Link};
use rpc_common::deadline::{Deadline, Phase};
use rpc_common::outbox::Publisher;
use rpc_common::target::Brokers;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the connection stays open for the next redelivered request.
pub(crate) const IDLE_LIMIT: Duration = Duration::from_secs(10);

/// What became of a reply.
pub(crate) enum Published {
    /// The broker has taken it.
    Taken,
    /// The broker closed the channel or the connection because of it.
    Refused(Error),
    /// There was no connection, or it broke otherwise.
    Unknown(Error),
}

/// Publishes replies one at a time, for all workers.
pub(crate) struct IsolatedReplies {
    brokers: Brokers,
    connection: Mutex<Option<Connection>>,
}

struct Connection {
    link: Link, // first, so that it is closed first: the channel's own close then costs nothing
    channel: Channel,
    publisher: Publisher,
    returns: Receiver<Return>,
    used_at: Instant,
}

impl IsolatedReplies {
    /// Connects with the first reply.
    pub(crate) fn new(brokers: Brokers) -> Self {
        IsolatedReplies { brokers, connection: Mutex::default() }
    }

    /// Publishes a reply, with the original bytes of its correlation id if there are such, and waits for the broker.
    pub(crate) fn publish(&self, reply: Publish, correlation_id: Option<&[u8]>) -> Published {
        let mut connection = self.lock();
        // One that was idle may have ended meanwhile.
        let mut open = match connection.take().map(Connection::make_round_trip) {
            Some(Ok(open)) => open,
            Some(Err(_)) | None => {
                match Connection::open(&self.brokers).and_then(Connection::make_round_trip) {
                    Ok(open) => open,
                    Err(error) => return Published::Unknown(error),
                }
            }
        };
        open.publisher.publish_with_id(reply, correlation_id);
        let _ = open.publisher.send(); // the round trip tells why it could not
        match open.make_round_trip() {
            Ok(open) => {
                *connection = Some(open);
                Published::Taken
            }
            Err(error) if error.is_close_by_broker() => Published::Refused(error),
            Err(error) => Published::Unknown(error),
        }
    }

    /// Closes the connection if it was not used for a while.
    pub(crate) fn close_idle(&self) {
        let mut connection = self.lock();
        if connection.as_ref().is_some_and(|open| open.used_at.elapsed() >= IDLE_LIMIT) {
            *connection = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn open(brokers: &Brokers) -> Result<Self, Error> {
        let deadline = Deadline::after(BROKER_CALL_TIMEOUT);
        let mut link = broker::open_any(brokers, "rpc-server", &deadline)?;
        let channel = link.open_channel(&deadline)?;
        let returns = channel.listen_for_returns().map_err(|error| link.explain(error))?;
        let publisher = link.publisher(&channel);
        Ok(Connection { link, channel, publisher, returns, used_at: Instant::now() })
    }

    /// Whatever was published before has been taken when this succeeds.
    fn make_round_trip(mut self) -> Result<Self, Error> {
        let deadline = Deadline::after(BROKER_CALL_TIMEOUT);
        let Connection { link, channel, .. } = &mut self;
        link.within(&deadline, Phase::Channel, |_| channel.qos(0, 0, false))?;
        for reply in self.returns.try_iter() {
            self.publisher.take_return();
            log_return(&reply);
        }
        self.used_at = Instant::now();
        Ok(self)
    }
}
