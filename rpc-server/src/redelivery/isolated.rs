//! Publishes replies to redelivered requests, each alone on a connection of its own.
//!
//! The broker may close the channel, or the whole connection, because of a reply: it is too large,
//! or its reply_to is a name that the broker does not accept. Then the request is delivered again,
//! without end, and the broker does not say which reply it refused. So the reply to a redelivered
//! request is published alone: if the broker closes something then, it is because of this reply,
//! and no other request is affected. Over this connection the server also asks whether a caller has
//! gone.

use crate::reply::{add_reply, log_return};
use rpc_common::connection::{
    Connection, Deadline, Endpoint, Error, Message, OpenChannel, Owner, Phase, Publisher,
};
use rpc_common::message::{ErrorCode, Failure, Reply, Request};
use rpc_common::sync::lock;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time without events of the server's loop after which the isolated connection is closed.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout of one reply.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of a caller check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// Cool-down after a publish that timed out.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);

/// Maximum number of unread returned replies: more than the one that is published at a time.
const MAX_UNREAD: usize = 64;

/// The result of publishing a reply.
pub(crate) enum IsolatedResult {
    /// The broker accepted the reply.
    Accepted,
    /// The broker refused the reply, and then also the error sent in its place. (A broker refuses a
    /// message by closing the channel or the connection.)
    Refused(Error),
    /// The connection could not be opened, or ended for another reason.
    Unknown(Error),
}

/// Publishes replies one at a time, for all workers.
#[derive(Default)]
pub(crate) struct IsolatedPublisher(Mutex<Isolated>);

#[derive(Default)]
struct Isolated {
    /// Kept open after a reply that was accepted.
    open: Option<Open>,
    /// The error of the latest reply that got no answer, and the end of the cool-down.
    failure: Option<(Error, Instant)>,
    /// No caller check before this instant, after one that got no answer.
    no_checks_until: Option<Instant>,
}

/// An open connection with its channel.
struct Open {
    // First, so that it is closed first: then closing the channel does not wait.
    connection: Connection,
    channel: OpenChannel,
    publisher: Publisher,
}

impl IsolatedPublisher {
    /// Publishes a reply and waits for the broker. If the broker refuses the reply, an error
    /// replaces it. Without a connection, it connects to `endpoint`.
    pub(crate) fn publish(
        &self,
        endpoint: &Endpoint,
        reply: &mut Reply,
        request: &Request,
    ) -> IsolatedResult {
        let mut state = lock(&self.0);
        if let (true, Some((error, _))) = (state.is_paused(), &state.failure) {
            return IsolatedResult::Unknown(error.clone());
        }
        let mut published = state.publish(endpoint, reply, request);
        if let IsolatedResult::Refused(error) = &published {
            log::warn!("the broker refused a reply, answering with an error: {error}");
            let message =
                "internal error: the broker refused the answer, perhaps because of its size";
            *reply = Err(Failure::new(ErrorCode::Internal, message));
            published = state.publish(endpoint, reply, request);
        }
        if let IsolatedResult::Unknown(error) = &published {
            state.failure = Some((error.clone(), Instant::now() + PAUSE_AFTER_FAILURE));
        }
        published
    }

    /// Whether the broker says that there is no queue of this name. (One that is exclusive to its
    /// caller's connection is refused to us, and exists.)
    pub(crate) fn is_queue_gone(&self, endpoint: &Endpoint, queue: &[u8]) -> bool {
        // amiquip cannot ask for other names.
        let Ok(queue) = str::from_utf8(queue) else {
            return false;
        };
        // A program waits for this: so a connection that is in use is asked the next time.
        let Ok(mut state) = self.0.try_lock() else {
            return false;
        };
        if state.is_paused()
            || state
                .no_checks_until
                .is_some_and(|until| Instant::now() < until)
        {
            return false;
        }
        let deadline = Deadline::after(CHECK_TIMEOUT);
        let answer = state.open(endpoint, &deadline).and_then(|mut open| {
            let answer = open.connection.queue_stats(queue, &deadline);
            if !answer.as_ref().is_err_and(Error::ends_connection) {
                state.open = Some(open);
            }
            answer
        });
        if state.open.is_none() {
            state.no_checks_until = Some(Instant::now() + PAUSE_AFTER_FAILURE);
        }
        answer.is_err_and(|error| error.is_not_found())
    }

    /// Closes the connection, if it is not in use. The next reply opens another one.
    pub(crate) fn close_unused(&self) {
        if let Ok(mut state) = self.0.try_lock() {
            state.open = None;
        }
    }
}

impl Isolated {
    /// Whether the latest attempt got no answer, a short time ago.
    fn is_paused(&self) -> bool {
        self.failure
            .as_ref()
            .is_some_and(|(_, until)| Instant::now() < *until)
    }

    /// Takes the connection, or opens one.
    fn open(&mut self, endpoint: &Endpoint, deadline: &Deadline) -> Result<Open, Error> {
        let open = self
            .open
            .take()
            .filter(|open| open.connection.endpoint.is_same(endpoint));
        // One that is open may have ended since.
        let open = open.and_then(|mut open| open.make_round_trip(deadline).ok().map(|()| open));
        open.map_or_else(|| Open::new(endpoint, deadline), Ok)
    }

    fn publish(&mut self, endpoint: &Endpoint, reply: &Reply, request: &Request) -> IsolatedResult {
        let deadline = Deadline::after(PUBLISH_TIMEOUT);
        let mut open = match self.open(endpoint, &deadline) {
            Ok(open) => open,
            Err(error) => return IsolatedResult::Unknown(error),
        };
        add_reply(&open.publisher, reply, request);
        let _ = open.publisher.flush(); // the round trip returns the cause
        match open.make_round_trip(&deadline) {
            Ok(()) => {
                self.open = Some(open);
                IsolatedResult::Accepted
            }
            Err(error) if error.is_caused_by_message() => IsolatedResult::Refused(error),
            Err(error) => IsolatedResult::Unknown(error),
        }
    }
}

impl Open {
    fn new(endpoint: &Endpoint, deadline: &Deadline) -> Result<Self, Error> {
        let mut connection = Connection::open(endpoint, "rpc-server", deadline, &Owner::Standby)?;
        let (channel, publisher) = connection.open_channel(MAX_UNREAD, deadline)?;
        Ok(Open {
            connection,
            channel,
            publisher,
        })
    }

    /// The broker handles a channel's methods in order: when it answers, it has not refused what
    /// was published before. (A publisher confirm would tell the same, and would have to be enabled
    /// by another round trip.)
    fn make_round_trip(&mut self, deadline: &Deadline) -> Result<(), Error> {
        let result = self
            .channel
            .run_blocking(deadline, Phase::PublishingReply, |amqp| {
                amqp.qos(0, 0, false)
            });
        for message in self.channel.inbox.take().messages {
            if let Message::Returned(reply) = message {
                log_return(&reply);
            }
        }
        result
    }
}
