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
use rpc_common::target::{Brokers, Target};
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
pub(crate) struct IsolatedReplies(Mutex<State>);

struct State {
    brokers: Brokers,
    connection: Option<Connection>,
    /// Why there was no answer to the latest reply, and until when no other is tried.
    failure: Option<(Error, Instant)>,
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
        IsolatedReplies(Mutex::new(State { brokers, connection: None, failure: None }))
    }

    /// The next connection goes to the broker that the requests come from.
    pub(crate) fn use_broker(&self, broker: &Target) {
        self.lock().brokers = broker.clone().into();
    }

    /// Publishes a reply, with the original bytes of its correlation id if there are such, and waits for the broker.
    pub(crate) fn publish(&self, reply: Publish, correlation_id: Option<&[u8]>) -> Published {
        let mut state = self.lock();
        match &state.failure {
            Some((error, until)) if Instant::now() < *until => {
                return Published::Unknown(error.clone())
            }
            _ => state.failure = None,
        }
        let published = state.publish(reply, correlation_id);
        if let Published::Unknown(error) = &published {
            state.failure = Some((error.clone(), Instant::now() + BROKER_CALL_TIMEOUT));
        }
        published
    }

    /// Closes the connection if it was not used for a while.
    pub(crate) fn close_idle(&self) {
        if let Ok(mut state) = self.0.try_lock() {
            state.connection.take_if(|open| open.used_at.elapsed() >= IDLE_LIMIT);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn publish(&mut self, reply: Publish, correlation_id: Option<&[u8]>) -> Published {
        let deadline = Deadline::after(BROKER_CALL_TIMEOUT);
        // One that was idle may have ended meanwhile.
        let open = self.connection.take().and_then(|open| open.make_round_trip(&deadline).ok());
        let open = open.map_or_else(|| Connection::open(&self.brokers, &deadline), Ok);
        let mut open = match open {
            Ok(open) => open,
            Err(error) => return Published::Unknown(error),
        };
        open.publisher.publish_with_id(reply, correlation_id);
        let _ = open.publisher.send(); // the round trip tells why it could not
        match open.make_round_trip(&deadline) {
            Ok(open) => {
                self.connection = Some(open);
                Published::Taken
            }
            Err(error) if error.is_about_message() => Published::Refused(error),
            Err(error) => Published::Unknown(error),
        }
    }
}

impl Connection {
    fn open(brokers: &Brokers, deadline: &Deadline) -> Result<Self, Error> {
        let mut link = broker::open_any(brokers, "rpc-server", deadline)?;
        let channel = link.open_channel(deadline)?;
        let returns = channel.listen_for_returns().map_err(|error| link.explain(error))?;
        let publisher = link.publisher(&channel);
        let open = Connection { link, channel, publisher, returns, used_at: Instant::now() };
        open.make_round_trip(deadline) // before the publisher is used
    }

    /// Whatever was published before has been taken when this succeeds.
    fn make_round_trip(mut self, deadline: &Deadline) -> Result<Self, Error> {
        let Connection { link, channel, .. } = &mut self;
        link.within(deadline, Phase::Channel, |_| channel.qos(0, 0, false))?;
        for reply in self.returns.try_iter() {
            self.publisher.take_return();
            log_return(&reply);
        }
        self.used_at = Instant::now();
        Ok(self)
    }
}
