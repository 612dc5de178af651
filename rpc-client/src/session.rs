//! A session: one connection with its reply queue, on a thread of its own.
//!
//! The thread makes the blocking calls, one after the other, so that the event loop never blocks: connecting, consuming,
//! looking at the request queue, closing. Requests and replies do not pass through it.

use crate::call::{Config, Error, ReplyTo};
use amiquip::{ConnectionBlockedNotification, ConsumerMessage, ConsumerOptions, Return};
use crossbeam_channel::{never, unbounded, Receiver, Sender};
use rpc_common::connection::{
    Connection, Deadline, Endpoint, Error as ConnectionError, ErrorKind, Publisher, QueueStats, Watchdog,
};
use std::thread;
use std::time::Duration;
use uuid::Uuid;

/// The queue name that means direct reply-to.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// How many replies, and returned requests, may be unread: some for each call, which may be sent and answered more than
/// once, and some for replies to no call.
const MAX_UNREAD_PER_CALL: usize = 8;
const MAX_UNREAD: usize = 1_000;

/// How long closing may take, at least and at most.
const CLOSE_TIMEOUTS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// A **session**, as the event loop sees it.
pub(crate) struct Session {
    commands: Sender<Command>,
    pub(crate) events: Receiver<SessionEvent>,
    /// `None` until it is connected.
    pub(crate) link: Option<Link>,
    /// Requests that the broker could not route to a queue.
    pub(crate) returns: Receiver<Return>,
    /// Whether the broker blocks publishers, each time that this changes. Disconnected when the connection ends.
    pub(crate) notifications: Receiver<ConnectionBlockedNotification>,
    /// Silent until the consumer is started.
    pub(crate) replies: Receiver<ConsumerMessage>,
    pub(crate) is_consuming: bool,
}

/// What a connected session publishes with.
pub(crate) struct Link {
    pub(crate) broker: String,
    pub(crate) publisher: Publisher,
    pub(crate) reply_queue: String,
    watchdog: Watchdog,
}

/// What the thread does on request.
enum Command {
    CheckQueue,
    Close(Deadline),
}

/// What the thread reports.
pub(crate) enum SessionEvent {
    /// Requests can be published.
    Connected(Link, Receiver<Return>, Receiver<ConnectionBlockedNotification>),
    /// Replies can be received.
    Consuming(Receiver<ConsumerMessage>),
    /// The request queue; `None` if the broker gives no numbers.
    QueueChecked(Option<QueueStats>),
    /// The session has ended.
    Ended(Error),
}

impl Session {
    /// Starts to connect. The deadline is that of connecting.
    pub(crate) fn start(endpoints: Vec<Endpoint>, config: &Config, deadline: Deadline) -> Self {
        let (commands, received) = unbounded();
        let (sender, events) = unbounded();
        let config = config.clone();
        thread::spawn(move || {
            if let Err(error) = run(&endpoints, &config, &deadline, &sender, &received) {
                let _ = sender.send(SessionEvent::Ended(error)); // fails if the event loop has ended
            }
        });
        let (returns, notifications, replies) = (never(), never(), never());
        Session { commands, events, link: None, returns, notifications, replies, is_consuming: false }
    }

    /// Writes the requests that are buffered.
    pub(crate) fn flush(&self) {
        if let Some(link) = &self.link {
            let _ = link.publisher.send(); // fails on a closed channel: the replies report that
        }
    }

    /// Asks for [`SessionEvent::QueueChecked`].
    pub(crate) fn check_queue(&self) {
        let _ = self.commands.send(Command::CheckQueue); // fails if the session has ended
    }

    /// Asks for the cause of the end of the connection, [`SessionEvent::Ended`].
    pub(crate) fn ask_for_cause(&self) {
        let _ = self.commands.send(Command::Close(Deadline::after(Duration::ZERO)));
    }

    /// Ends a blocking call of the thread, and with it the connection.
    pub(crate) fn shut_down(&self) {
        if let Some(link) = &self.link {
            link.watchdog.shut_down();
        }
    }

    /// Closes the connection. Waits for the broker until the deadline, but 10 ms at least and 1 s at most.
    pub(crate) fn close(self, deadline: &Deadline) {
        let _ = self.commands.send(Command::Close(*deadline));
        let timeout = deadline.remaining().clamp(CLOSE_TIMEOUTS.0, CLOSE_TIMEOUTS.1);
        let end = Deadline::after(timeout).instant();
        while self.events.recv_deadline(end).is_ok() {} // until the thread has ended
        self.shut_down();
    }
}

/// The session from its beginning to its end.
fn run(
    endpoints: &[Endpoint],
    config: &Config,
    deadline: &Deadline,
    events: &Sender<SessionEvent>,
    commands: &Receiver<Command>,
) -> Result<(), Error> {
    let send = |event| drop(events.send(event)); // fails if the event loop has ended
    let mut connection = Connection::open_any(endpoints, "rpc-client", deadline)?;
    let max_unread = usize::from(config.in_flight) * MAX_UNREAD_PER_CALL + MAX_UNREAD;
    let (channel, publisher) = connection.open_channel(max_unread, deadline)?;
    let notifications = connection.blocked_notifications(deadline)?;
    let reply_queue = match config.reply_to {
        ReplyTo::Queue => format!("rpc.reply.{}", Uuid::new_v4()),
        ReplyTo::Direct => DIRECT_REPLY_TO.into(),
    };
    if config.reply_to == ReplyTo::Queue {
        publisher.declare_exclusive_queue(&reply_queue); // if it fails, so does the consumer
        let _ = publisher.send();
    }
    let (broker, watchdog) = (connection.broker().to_owned(), connection.watchdog.clone());
    let link = Link { broker, publisher, reply_queue: reply_queue.clone(), watchdog };
    let connected = SessionEvent::Connected(link, channel.returns.clone(), notifications);

    let options = ConsumerOptions { no_ack: true, exclusive: true, ..ConsumerOptions::default() };
    let consume = |connection: &mut Connection, deadline: &Deadline| {
        connection.call(deadline, "starting a consumer", |_| channel.consume(&reply_queue, options.clone()))
    };
    let consumer = if config.reply_to == ReplyTo::Direct {
        let consumer = consume(&mut connection, deadline)?; // has to be there before the first request
        send(connected);
        consumer
    } else {
        // Requests are published meanwhile: replies wait in their queue. A broker that blocks publishers does not
        // answer, so the event loop ends this.
        send(connected);
        let consumer = consume(&mut connection, &Deadline::after(Duration::MAX));
        consumer.map_err(|error| explain_refusal(&mut connection, &reply_queue, error, deadline))?
    };
    send(SessionEvent::Consuming(consumer.receiver().clone()));

    for command in commands {
        match command {
            Command::CheckQueue => send(SessionEvent::QueueChecked(check_queue(&mut connection, &config.queue)?)),
            Command::Close(deadline) => {
                connection.close_by(&deadline)?;
                break;
            }
        }
    }
    connection.close()?; // before the consumer is dropped, which would wait for the broker
    Err(connection.lost("the connection has ended").into())
}

/// Tells whether requests that were sent before the consumer was refused can have run: not if it was the reply queue or
/// the default exchange that was refused.
fn explain_refusal(
    connection: &mut Connection,
    reply_queue: &str,
    error: ConnectionError,
    deadline: &Deadline,
) -> Error {
    match &error.kind {
        ErrorKind::Refused(reason)
            if !reason.text.contains("exchange") && connection.queue_stats(reply_queue, deadline).is_ok() =>
        {
            Error::ConsumeRefused(error)
        }
        _ => Error::Connection(error),
    }
}

fn check_queue(connection: &mut Connection, queue: &str) -> Result<Option<QueueStats>, ConnectionError> {
    // Without a limit, because the end of it would be the end of the connection. Heartbeats bound it.
    match connection.queue_stats(queue, &Deadline::after(Duration::MAX)) {
        Ok(stats) => Ok(Some(stats)),
        Err(error) if error.ends_connection() => Err(error),
        Err(_) => Ok(None),
    }
}
