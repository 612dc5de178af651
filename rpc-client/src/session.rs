//! A session: one connection with its reply queue, on a thread of its own.
//!
//! The thread makes the blocking calls, one after the other, so that the event loop never blocks: connecting, starting the
//! consumer, looking at the request queue, closing. Requests and replies do not pass through it.

use crate::call::{Config, Error, ReplyTo};
use crate::pending::Call;
use amiquip::{
    AmqpValue, Confirm, ConnectionBlockedNotification, ConsumerMessage, ConsumerOptions, FieldTable, Return,
};
use crossbeam_channel::{never, unbounded, Receiver, Sender};
use rpc_common::connection::{
    close_timeout, Connection, Deadline, Endpoint, Error as ConnectionError, ErrorKind, Publisher, QueueStats, Watchdog,
};
use rpc_common::message::{self, unix_time_ms};
use std::time::{Duration, Instant, SystemTime};
use std::{mem, thread};
use uuid::Uuid;

/// The queue name that means direct reply-to.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// How many replies, and returned requests, may be unread: some for each call, which may be sent and answered more than
/// once, and some for replies to no call.
const MAX_UNREAD_PER_CALL: usize = 8;
const MAX_UNREAD: usize = 1_000;

/// A **session**, as the event loop sees it.
pub(crate) struct Session {
    commands: Sender<Command>,
    pub(crate) events: Receiver<SessionEvent>,
    /// `None` until it is connected.
    pub(crate) publisher: Option<RequestPublisher>,
    /// Requests that the broker could not route to a queue.
    pub(crate) returns: Receiver<Return>,
    /// Which requests the broker has taken. A returned request is confirmed, too, after its return.
    pub(crate) confirms: Receiver<Confirm>,
    /// Whether the broker blocks publishers, each time that this changes. Disconnected when the connection ends.
    pub(crate) notifications: Receiver<ConnectionBlockedNotification>,
    /// Silent until the consumer is started.
    pub(crate) replies: Receiver<ConsumerMessage>,
    pub(crate) is_consuming: bool,
    /// When the consumer must have started, if it is waited for.
    pub(crate) consumer_deadline: Option<Instant>,
    /// Whether the queue is being looked at.
    pub(crate) is_checking: bool,
    /// When closing must have ended: the first deadline of the pending calls, kept when none is left.
    pub(crate) close_deadline: Deadline,
}

/// Publishes requests on a connected session.
pub(crate) struct RequestPublisher {
    /// Host and port of the broker.
    pub(crate) broker: String,
    publisher: Publisher,
    reply_queue: String,
    content_type: String,
    headers: FieldTable,
    watchdog: Watchdog,
}

impl RequestPublisher {
    /// Buffers the request of a call and marks it sent; [`flush`](Self::flush) writes it.
    pub(crate) fn publish<T>(&self, queue: &str, call: &mut Call<T>) {
        let id = call.id.to_string();
        let time_left = call.deadline.remaining();
        let request = message::Request {
            body: &call.request.body,
            content_type: Some(&self.content_type),
            headers: Some(&self.headers),
            reply_to: Some(&self.reply_queue),
            correlation_id: Some(&id),
            deadline_ms: Some(unix_time_ms(SystemTime::now() + time_left)),
            ..message::Request::default()
        };
        self.publisher.publish(request.encode(queue, Some(time_left)), None);
        call.mark_sent(Instant::now());
    }

    /// Writes the buffered requests.
    pub(crate) fn flush(&self) {
        let _ = self.publisher.flush(); // fails on a closed channel: the replies report that
    }
}

/// What the thread does on request.
enum Command {
    CheckQueue,
    Close(Deadline),
}

/// What the thread reports.
pub(crate) enum SessionEvent {
    /// Requests can be published.
    Connected {
        publisher: RequestPublisher,
        returns: Receiver<Return>,
        confirms: Receiver<Confirm>,
        notifications: Receiver<ConnectionBlockedNotification>,
    },
    /// Replies can be received.
    Consuming(Receiver<ConsumerMessage>),
    /// The request queue, or why the broker gives no numbers.
    QueueChecked(Result<QueueStats, ErrorKind>),
    /// The session has ended with an error.
    Ended(Error),
}

impl Session {
    /// Starts to connect. The deadline is that of connecting. If it `needs_consumers`, a request queue without them ends it.
    pub(crate) fn start(endpoints: Vec<Endpoint>, config: &Config, needs_consumers: bool, deadline: Deadline) -> Self {
        let (commands, received) = unbounded();
        let (sender, events) = unbounded();
        let config = config.clone();
        thread::spawn(move || {
            if let Err(error) = run_session(&endpoints, &config, needs_consumers, &deadline, &sender, &received) {
                let _ = sender.send(SessionEvent::Ended(error)); // fails if the event loop has ended
            }
        });
        Session {
            commands,
            events,
            publisher: None,
            returns: never(),
            confirms: never(),
            notifications: never(),
            replies: never(),
            is_consuming: false,
            consumer_deadline: None,
            is_checking: false,
            close_deadline: deadline,
        }
    }

    /// Asks for [`SessionEvent::QueueChecked`], unless it is still to come.
    pub(crate) fn check_queue(&mut self) {
        if !mem::replace(&mut self.is_checking, true) {
            let _ = self.commands.send(Command::CheckQueue); // fails if the session has ended
        }
    }

    /// The connection has ended: asks for the cause, [`SessionEvent::Ended`].
    pub(crate) fn ask_for_cause(&self) {
        let _ = self.commands.send(Command::Close(self.close_deadline)); // amiquip tells the cause when it closes
    }

    /// Ends the connection, and with it a blocking call of the thread.
    pub(crate) fn shut_down(&self) {
        if let Some(publisher) = &self.publisher {
            publisher.watchdog.shut_down();
        }
    }

    /// Closes the connection. Waits for the broker no longer than [`Connection`] does.
    pub(crate) fn close(self) {
        let _ = self.commands.send(Command::Close(self.close_deadline));
        let limit = Deadline::after(close_timeout(&self.close_deadline));
        while self.events.recv_deadline(limit.instant()).is_ok() {} // until the thread has ended
        self.shut_down(); // if the thread has not ended, this ends its blocking call
    }
}

/// The session from its beginning to its end, on its thread.
fn run_session(
    endpoints: &[Endpoint],
    config: &Config,
    needs_consumers: bool,
    deadline: &Deadline,
    events: &Sender<SessionEvent>,
    commands: &Receiver<Command>,
) -> Result<(), Error> {
    let send = |event| drop(events.send(event)); // fails if the event loop has ended
    let mut connection = Connection::open_any(endpoints, "rpc-client", deadline)?;
    if needs_consumers {
        check_consumers(&mut connection, &config.queue, deadline)?;
    }
    let max_unread = usize::from(config.in_flight) * MAX_UNREAD_PER_CALL + MAX_UNREAD;
    let (channel, publisher) = connection.open_channel(max_unread, deadline)?;
    connection.enable_confirms(&channel, deadline)?;
    let notifications = connection.blocked_notifications(deadline)?;
    let reply_queue = match config.reply_to {
        ReplyTo::Queue => format!("rpc.reply.{}", Uuid::new_v4()),
        ReplyTo::Direct => DIRECT_REPLY_TO.into(),
    };
    if config.reply_to == ReplyTo::Queue {
        publisher.declare_exclusive_queue(&reply_queue); // if it fails, so does the consumer
    }
    let _ = publisher.flush(); // fails on a closed channel: the consumer reports that
    let (broker, watchdog) = (connection.broker().to_owned(), connection.watchdog.clone());
    let (content_type, headers) = (config.content_type.clone(), header_table(config));
    let publisher =
        RequestPublisher { broker, publisher, reply_queue: reply_queue.clone(), content_type, headers, watchdog };
    let (returns, confirms) = (channel.returns.clone(), channel.confirms.clone());
    let connected = SessionEvent::Connected { publisher, returns, confirms, notifications };

    let options = ConsumerOptions { no_ack: true, exclusive: true, ..ConsumerOptions::default() };
    let consume = |connection: &mut Connection, deadline: &Deadline| {
        connection.call(deadline, "starting a consumer", |_| channel.consume(&reply_queue, options.clone()))
    };
    let consumer = if config.reply_to == ReplyTo::Direct {
        let consumer = consume(&mut connection, deadline)?; // must be there before the first request
        send(connected);
        consumer
    } else {
        // Requests are published meanwhile, and their replies wait in the queue. This has no deadline: a broker that
        // blocks publishers answers when it unblocks them. If it does not block them, and has not answered in time or when
        // all calls have expired, the event loop ends this wait by shutting the socket down.
        send(connected);
        let consumer = consume(&mut connection, &Deadline::after(Duration::MAX));
        consumer.map_err(|error| explain_refusal(&mut connection, &reply_queue, error, deadline))?
    };
    send(SessionEvent::Consuming(consumer.receiver().clone()));

    for command in commands {
        match command {
            Command::CheckQueue => send(SessionEvent::QueueChecked(check_queue(&mut connection, &config.queue)?)),
            Command::Close(deadline) => {
                connection.close_by(&deadline)?; // before the consumer is dropped, which would wait for the broker
                break;
            }
        }
    }
    Ok(())
}

fn header_table(config: &Config) -> FieldTable {
    config.headers.iter().map(|(name, value)| (name.clone(), AmqpValue::LongString(value.clone()))).collect()
}

/// Refuses a queue that does not exist or has no consumers.
fn check_consumers(connection: &mut Connection, queue: &str, deadline: &Deadline) -> Result<(), Error> {
    let (queue, broker) = (queue.to_owned(), connection.broker().to_owned());
    match connection.queue_stats(&queue, deadline) {
        Ok(QueueStats { consumers: 0, .. }) => Err(Error::NoConsumers { queue, broker }),
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Err(Error::NoQueue { queue, broker }),
        Err(error) => Err(Error::Connection(error)),
    }
}

/// The error of a consumer that the broker refused, after requests were published: [`Error::RefusedAfterSend`] if they may have
/// run, else [`Error::Connection`].
fn explain_refusal(
    connection: &mut Connection,
    reply_queue: &str,
    error: ConnectionError,
    deadline: &Deadline,
) -> Error {
    let ErrorKind::Refused(reason) = &error.kind else { return Error::Connection(error) };
    // The user may not write to the default exchange: the broker refused the requests.
    let is_about_requests = reason.text.contains("exchange");
    // The user may not configure the reply queue: the broker refused its declaration, and ignored what followed.
    let has_reply_queue = connection.queue_stats(reply_queue, deadline).is_ok();
    if is_about_requests || !has_reply_queue {
        return Error::Connection(error);
    }
    Error::RefusedAfterSend(error) // the user may not read from the reply queue: only the answers are refused
}

fn check_queue(connection: &mut Connection, queue: &str) -> Result<Result<QueueStats, ErrorKind>, ConnectionError> {
    // Without a deadline, which would end the connection when it passes. Heartbeats bound it.
    match connection.queue_stats(queue, &Deadline::after(Duration::MAX)) {
        Err(error) if error.ends_connection() => Err(error),
        stats => Ok(stats.map_err(|error| error.kind)),
    }
}
