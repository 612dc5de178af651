//! A session: one connection with its reply queue, and the thread that makes its blocking calls.
//!
//! The event loop drives the link of the connection: it reads replies, and publishes requests. The
//! thread makes the blocking calls, one after the other, so that the event loop never blocks:
//! connecting, starting the consumer, looking at the request queue, closing.

use crate::call::Error;
use crate::config::{Config, ReplyTo};
use crate::pending::Call;
use crate::requests::Requests;
use amiquip::ConsumerOptions;
use crossbeam_channel::{unbounded, Receiver, Sender};
use rpc_common::connection::{
    close_timeout, ChannelInbox, Connection, Deadline, Endpoint, Error as ConnectionError,
    ErrorKind, HeaderTooLarge, Link, Meaning, Notification, Owner, Phase, Publisher, QueueStats,
    Waker,
};
use rpc_common::message::{self, unix_time_ms, DEADLINE_HEADER};
use rpc_common::properties::TableBuilder;
use rpc_common::sync::lock;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use std::{mem, thread};
use uuid::Uuid;

/// The queue name that means direct reply-to.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// How many replies, and returned requests, may be unread: some for each call, which may be sent
/// and answered more than once, and some for replies to no call.
const MAX_UNREAD_PER_CALL: usize = 8;
const MAX_UNREAD: usize = 1_000;

/// How many bytes of requests are encoded before they are written.
const MAX_BUFFERED: usize = 64 << 10;

/// A **session**, as the event loop sees it.
pub(crate) struct Session {
    commands: Sender<Command>,
    events: Receiver<SessionEvent>,
    /// `None` until a socket is connected.
    link: Option<Arc<Link>>,
    latest_link: Arc<Mutex<LatestLink>>,
    /// `None` until it is connected.
    pub(crate) connected: Option<Connected>,
    pub(crate) is_consuming: bool,
    /// When the consumer must have started, if it is waited for.
    pub(crate) consumer_deadline: Option<Instant>,
    /// Whether the queue is being looked at.
    pub(crate) is_checking: bool,
    /// When closing must have ended: the first deadline of the pending calls, kept when none is
    /// left.
    pub(crate) close_deadline: Deadline,
}

/// The link of a session's latest attempt to connect, for the end of the session.
enum LatestLink {
    None,
    Some(Arc<Link>),
    /// The event loop has ended: nobody drives a link any more.
    Abandoned,
}

impl LatestLink {
    fn replace(&mut self, link: &Arc<Link>) {
        match self {
            LatestLink::Abandoned => link.shut_down(),
            _ => *self = LatestLink::Some(link.clone()),
        }
    }

    fn abandon(&mut self) {
        if let LatestLink::Some(link) = mem::replace(self, LatestLink::Abandoned) {
            link.shut_down();
        }
    }
}

/// What a connected session has.
pub(crate) struct Connected {
    pub(crate) publisher: RequestPublisher,
    pub(crate) inbox: ChannelInbox,
    /// Whether the broker blocks publishers, each time that this changes.
    pub(crate) notifications: Receiver<Notification>,
}

/// Publishes requests on a connected session.
pub(crate) struct RequestPublisher {
    /// Host and port of the broker.
    pub(crate) address: String,
    publisher: Publisher,
    reply_queue: String,
    content_type: String,
    headers: TableBuilder,
}

impl RequestPublisher {
    /// Adds the request of a call, and marks it sent. Writes what was added when that is much.
    ///
    /// # Errors
    /// [`HeaderTooLarge`]; then the request is not sent.
    pub(crate) fn publish<T>(&self, queue: &str, call: &mut Call<T>) -> Result<(), HeaderTooLarge> {
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
        self.publisher
            .publish(&request.encode(queue.as_bytes(), Some(time_left)))?;
        call.mark_sent(Instant::now());
        if self.publisher.buffered() > MAX_BUFFERED {
            self.flush();
        }
        Ok(())
    }

    /// Whether the broker takes what we send. While it does not nothing is encoded: a request would
    /// say how much time it had left then, and would be run when its caller has gone.
    pub(crate) fn is_writable(&self) -> bool {
        !self.publisher.has_backlog()
    }

    /// Writes the requests that were added.
    pub(crate) fn flush(&self) {
        // Fails if the channel or the connection has ended: the inbox tells how.
        let _ = self.publisher.flush();
    }
}

/// What the thread does on request.
enum Command {
    CheckQueue,
    Close(Deadline),
}

/// What the thread reports.
pub(crate) enum SessionEvent {
    /// A socket is connected, and the event loop is to drive its link. (The link of an attempt
    /// before may have ended.)
    Linked(Arc<Link>),
    /// Requests can be published.
    Connected(Box<Connected>),
    /// Replies can be received.
    Consuming,
    /// The request queue, or why the broker gives no numbers.
    QueueChecked(Result<QueueStats, ErrorKind>),
    /// The session has failed.
    Failed(Error),
    /// The thread has ended; the last event.
    ThreadEnded,
}

/// Reports events to the event loop.
struct Reporter {
    events: Sender<SessionEvent>,
    waker: Waker,
}

impl Reporter {
    fn report(&self, event: SessionEvent) {
        let _ = self.events.send(event); // fails if the event loop has ended
        self.waker.wake();
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.report(SessionEvent::ThreadEnded);
    }
}

impl Session {
    /// Starts to connect. The deadline is that of connecting. If it `needs_consumers`, a request
    /// queue without them ends it. The `waker` ends a wait of the event loop.
    pub(crate) fn start(
        endpoints: Vec<Endpoint>,
        config: &Config,
        needs_consumers: bool,
        deadline: Deadline,
        waker: &Waker,
    ) -> Self {
        let (commands, received) = unbounded();
        let (sender, events) = unbounded();
        let config = config.clone();
        let reporter = Reporter {
            events: sender,
            waker: waker.clone(),
        };
        let latest_link = Arc::new(Mutex::new(LatestLink::None));
        let latest = latest_link.clone();
        thread::spawn(move || {
            let take_link = |link: &Arc<Link>| {
                lock(&latest).replace(link);
                reporter.report(SessionEvent::Linked(link.clone()));
            };
            let owner = Owner::Caller(reporter.waker.clone(), &take_link);
            match Connection::open_any(&endpoints, "rpc-client", &deadline, &owner) {
                Ok(mut connection) => {
                    let result = run_session(
                        &mut connection,
                        &config,
                        needs_consumers,
                        &deadline,
                        &reporter,
                        &received,
                    );
                    // Before the connection is closed: the event loop would learn its end first.
                    result.unwrap_or_else(|error| reporter.report(SessionEvent::Failed(error)));
                }
                Err(error) => reporter.report(SessionEvent::Failed(error.into())),
            }
        });
        Session {
            commands,
            events,
            link: None,
            latest_link,
            connected: None,
            is_consuming: false,
            consumer_deadline: None,
            is_checking: false,
            close_deadline: deadline,
        }
    }

    /// The next event, if there is one.
    pub(crate) fn take_event(&mut self) -> Option<SessionEvent> {
        let event = self.events.try_recv().ok()?;
        if let SessionEvent::Linked(link) = &event {
            self.link = Some(link.clone());
        }
        Some(event)
    }

    /// Drives the link until something arrives, a request if it `takes_requests`, or until this
    /// instant.
    pub(crate) fn wait<T>(
        &self,
        until: Option<Instant>,
        requests: &Requests<T>,
        takes_requests: bool,
    ) {
        self.drive(until, requests.waker(), &|| {
            requests.is_ready(takes_requests)
        });
    }

    /// Receives what the broker has sent by now, but no more than `max_reads` pieces: a peer may
    /// never stop sending.
    pub(crate) fn receive(&self, max_reads: u32) {
        let now = Some(Instant::now());
        let has_input = |link: &Arc<Link>| link.drive(now, &|| true);
        let _ = (0..max_reads).find(|_| !self.link.as_ref().is_some_and(has_input));
    }

    fn drive(&self, until: Option<Instant>, waker: &Waker, is_ready: &dyn Fn() -> bool) {
        let is_ready = || is_ready() || !self.events.is_empty();
        match &self.link {
            Some(link) => drop(link.drive(until, &is_ready)),
            None => waker.wait(until, &is_ready),
        }
    }

    /// How the connection ended, if it has after it was opened.
    pub(crate) fn ended(&self) -> Option<ErrorKind> {
        self.connected.as_ref()?;
        self.link.as_ref()?.cause()
    }

    /// Asks for [`SessionEvent::QueueChecked`], unless it is still to come.
    pub(crate) fn check_queue(&mut self) {
        if !mem::replace(&mut self.is_checking, true) {
            let _ = self.commands.send(Command::CheckQueue); // fails if the session has ended
        }
    }

    /// Whether an event waits to be taken.
    pub(crate) fn has_event(&self) -> bool {
        !self.events.is_empty()
    }

    /// Ends the connection, and with it a blocking call of the thread: the broker has not answered
    /// it in time.
    pub(crate) fn give_up(&self) {
        if let Some(link) = &self.link {
            link.give_up();
        }
    }

    /// Closes the connection. Waits for the broker no longer than [`Connection`] does.
    pub(crate) fn close(mut self, waker: &Waker) {
        // Fails if the thread has ended.
        let _ = self.commands.send(Command::Close(self.close_deadline));
        let limit = Deadline::after(close_timeout(&self.close_deadline));
        while !limit.remaining().is_zero() {
            match self.take_event() {
                Some(SessionEvent::ThreadEnded) => break,
                Some(_) => {}
                None => self.drive(Some(limit.instant()), waker, &|| false),
            }
        }
        // If the thread has not ended, this ends its blocking call.
        lock(&self.latest_link).abandon();
    }
}

/// The session from when it is connected to its end, on its thread.
fn run_session(
    connection: &mut Connection,
    config: &Config,
    needs_consumers: bool,
    deadline: &Deadline,
    reporter: &Reporter,
    commands: &Receiver<Command>,
) -> Result<(), Error> {
    if needs_consumers {
        check_consumers(connection, &config.queue, deadline)?;
    }
    let max_unread = usize::from(config.in_flight) * MAX_UNREAD_PER_CALL + MAX_UNREAD;
    let (channel, publisher) = connection.open_channel(max_unread, deadline)?;
    let reply_queue = match config.reply_to {
        ReplyTo::Queue => format!("rpc.reply.{}", Uuid::new_v4()),
        ReplyTo::Direct => DIRECT_REPLY_TO.into(),
    };
    publisher.select_confirms();
    if config.reply_to == ReplyTo::Queue {
        publisher.declare_exclusive_queue(&reply_queue); // if it fails, so does the consumer
    }
    let _ = publisher.flush(); // fails on a closed channel: the consumer reports that
    let publisher = RequestPublisher {
        address: connection.address().to_owned(),
        publisher,
        reply_queue: reply_queue.clone(),
        content_type: config.content_type.clone(),
        headers: headers(config),
    };
    let inbox = channel.inbox.clone();
    let notifications = connection.link().notifications();
    let connected = SessionEvent::Connected(Box::new(Connected {
        publisher,
        inbox,
        notifications,
    }));

    let options = ConsumerOptions {
        no_ack: true,
        exclusive: true,
        ..ConsumerOptions::default()
    };
    let consume = |deadline: &Deadline| {
        channel.run_blocking(deadline, Phase::StartingConsumer, |amqp| {
            amqp.basic_consume(&reply_queue, options.clone())
        })
    };
    // amiquip ends the connection when the consumer is dropped and the broker confirms its
    // cancellation.
    let _consumer = if config.reply_to == ReplyTo::Direct {
        let consumer = consume(deadline)?; // must be there before the first request
        reporter.report(connected);
        consumer
    } else {
        // Requests are published meanwhile, and their replies wait in the queue. This has no
        // deadline: a broker that blocks publishers answers when it unblocks them. If it does not
        // block them, and has not answered in time or when all calls have expired, the event loop
        // ends this wait by shutting the socket down.
        reporter.report(connected);
        let consumer = consume(&Deadline::after(Duration::MAX));
        consumer.map_err(|error| explain_refusal(connection, &reply_queue, error, deadline))?
    };
    reporter.report(SessionEvent::Consuming);

    for command in commands {
        match command {
            Command::CheckQueue => {
                reporter.report(SessionEvent::QueueChecked(check_queue(
                    connection,
                    &config.queue,
                )?));
            }
            Command::Close(deadline) => {
                // Before the consumer is dropped, which would wait for the broker.
                connection.close_by(&deadline)?;
                break;
            }
        }
    }
    Ok(())
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

/// Refuses a queue that does not exist or has no consumers.
fn check_consumers(
    connection: &mut Connection,
    queue: &str,
    deadline: &Deadline,
) -> Result<(), Error> {
    let queue = queue.to_owned();
    let address = connection.address().to_owned();
    match connection.queue_stats(&queue, deadline) {
        Ok(QueueStats { consumers: 0, .. }) => Err(Error::NoConsumers { queue, address }),
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Err(Error::NoQueue { queue, address }),
        Err(error) => Err(Error::Connection(error)),
    }
}

/// The error of a consumer that the broker refused, after requests were published:
/// [`Error::RefusedAfterSend`] if they may have run, else [`Error::Connection`].
fn explain_refusal(
    connection: &mut Connection,
    reply_queue: &str,
    error: ConnectionError,
    deadline: &Deadline,
) -> Error {
    let ErrorKind::Refused(reason) = &error.kind else {
        return Error::Connection(error);
    };
    // The user may not write to the default exchange: the broker refused the requests.
    let is_about_requests = reason.meaning() == Some(Meaning::ExchangeRefused);
    // The user may not configure the reply queue: the broker refused its declaration, and ignored
    // what followed.
    let has_reply_queue = connection.queue_stats(reply_queue, deadline).is_ok();
    if is_about_requests || !has_reply_queue {
        return Error::Connection(error);
    }
    // The user may not read from the reply queue: only the answers are refused.
    Error::RefusedAfterSend(error)
}

fn check_queue(
    connection: &mut Connection,
    queue: &str,
) -> Result<Result<QueueStats, ErrorKind>, ConnectionError> {
    // Without a deadline, which would end the connection when it passes. Heartbeats bound it.
    match connection.queue_stats(queue, &Deadline::after(Duration::MAX)) {
        Err(error) if error.ends_connection() => Err(error),
        stats => Ok(stats.map_err(|error| error.kind)),
    }
}
