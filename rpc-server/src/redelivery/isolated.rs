//! Publishes replies that may end a connection, each alone on a connection of its own: those to
//! redelivered requests, and those to a name of direct reply-to that no reply has gone to yet.
//!
//! The broker may close the channel, or the whole connection, because of a reply: it is too large,
//! or its reply_to is a name that the broker does not accept. Then the request is delivered again,
//! without end, and the broker does not say which reply it refused. So the reply to a redelivered
//! request is published alone: if the broker closes something then, it is because of this reply,
//! and no other request is affected. Over this connection the server also asks whether a caller has
//! gone.

use crate::callers::{is_direct_reply_to, QueueState};
use crate::reply::{add_reply, log_return};
use rpc_common::connection::{
    Connection, Deadline, Endpoint, Error, Meaning, Message, OpenChannel, Owner, Phase, Publisher,
};
use rpc_common::message::{ErrorCode, Failure, Reply, Request};
use rpc_common::sync::lock;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time without use after which the isolated connection is closed: longer than the interval at
/// which it is asked whether a caller has gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

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

impl IsolatedResult {
    fn refusal(&self) -> Option<&Error> {
        match self {
            IsolatedResult::Refused(error) => Some(error),
            IsolatedResult::Accepted | IsolatedResult::Unknown(_) => None,
        }
    }
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
    used: Instant,
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
        let is_direct = request.reply_to.is_some_and(is_direct_reply_to);
        let mut state = lock(&self.0);
        if let (true, Some((error, _))) = (state.is_paused(), &state.failure) {
            return IsolatedResult::Unknown(error.clone());
        }
        let mut published = state.publish(endpoint, reply, request);
        // A name that ends the connection ends the next one, too.
        let is_of_name = |error: &Error| is_direct && error.ends_connection();
        if let Some(error) = published.refusal().filter(|error| !is_of_name(error)) {
            log::warn!(
                outcome = ErrorCode::Internal.as_str();
                "the broker refused a reply, answering with an error: {error}"
            );
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

    /// Asks the broker whether there is a queue of this name. (One that is exclusive to its
    /// caller's connection is refused to us, and exists.)
    pub(crate) fn ask(&self, endpoint: &Endpoint, queue: &[u8]) -> QueueState {
        // amiquip cannot ask for other names.
        let Ok(queue) = str::from_utf8(queue) else {
            return QueueState::Exists;
        };
        let mut state = lock(&self.0);
        if state.is_paused()
            || state
                .no_checks_until
                .is_some_and(|until| Instant::now() < until)
        {
            return QueueState::Exists;
        }
        let deadline = Deadline::after(CHECK_TIMEOUT);
        let Ok(mut open) = state.open(endpoint, &deadline) else {
            state.no_checks_until = Some(Instant::now() + PAUSE_AFTER_FAILURE);
            return QueueState::Exists;
        };
        let answer = open.connection.queue_stats(queue, &deadline);
        match answer {
            Err(error) if error.ends_connection() => {
                if error.is_caused_by_message() {
                    return QueueState::Refused;
                }
                state.no_checks_until = Some(Instant::now() + PAUSE_AFTER_FAILURE);
                QueueState::Exists
            }
            answer => {
                state.open = Some(open);
                // Another 404 says that the node of a durable queue is down.
                if answer.is_err_and(|error| error.meaning() == Some(Meaning::NoQueue)) {
                    QueueState::Gone
                } else {
                    QueueState::Exists
                }
            }
        }
    }

    /// Closes a connection that was not used for a while.
    pub(crate) fn close_idle(&self) {
        if let Ok(mut state) = self.0.try_lock() {
            let is_idle = |open: &mut Open| open.used.elapsed() >= IDLE_TIMEOUT;
            state.open.take_if(is_idle);
        }
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
            used: Instant::now(),
        })
    }

    /// The broker handles a channel's methods in order: when it answers, it has not refused what
    /// was published before. (A publisher confirm would tell the same, and would have to be enabled
    /// by another round trip.)
    fn make_round_trip(&mut self, deadline: &Deadline) -> Result<(), Error> {
        self.used = Instant::now();
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
