//! The thread of a session: it makes the blocking calls, one after the other, so that the event
//! loop never blocks: connecting, starting the consumer, `queue_stats`, closing.

use crate::call::Error;
use crate::config::{Config, ReplyTo};
use crate::request_publisher::RequestPublisher;
use amiquip::ConsumerOptions;
use crossbeam_channel::{Receiver, Sender};
use rpc_common::connection::{
    ChannelInbox, Connection, Deadline, Endpoint, Error as ConnectionError, ErrorKind, Link,
    Meaning, Notification, OpenChannel, Owner, Phase, QueueStats, Waker,
};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Name of the queue that means direct reply-to.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// Maximum number of unread replies and returned requests for each call in flight: a call may be
/// sent and answered more than once.
const MAX_UNREAD_PER_CALL: usize = 8;

/// Maximum number of unread replies that belong to no call in flight.
const MAX_UNREAD: usize = 1_000;

/// A command to the thread.
pub(crate) enum ThreadCommand {
    /// Report [`Report::QueueStats`].
    QueueStats,
    /// Close the connection by this deadline, and end.
    Close(Deadline),
}

/// A report of the thread.
pub(crate) enum Report {
    /// A socket is connected, and the event loop is to drive its link. (The link of an attempt
    /// before may have ended.)
    Linked(UnclaimedLink),
    /// Requests can be published.
    Connected(Box<Connected>),
    /// Replies can be received.
    Consuming,
    /// The request queue, or why the broker gives no numbers.
    QueueStats(Result<QueueStats, ErrorKind>),
    /// The session has failed.
    Failed(Error),
    /// The thread has ended; the last report.
    ThreadEnded,
}

/// The parts of a connected session.
pub(crate) struct Connected {
    /// Host and port of the broker.
    pub(crate) address: String,
    pub(crate) publisher: RequestPublisher,
    pub(crate) inbox: ChannelInbox,
    /// Whether the broker blocks publishers, each time that this changes.
    pub(crate) notifications: Receiver<Notification>,
}

/// Reports to the event loop.
pub(crate) struct Reporter {
    pub(crate) reports: Sender<Report>,
    /// Ends the event loop's wait.
    pub(crate) waker: Waker,
}

impl Reporter {
    fn report(&self, report: Report) {
        let _ = self.reports.send(report); // fails if the event loop has ended
        self.waker.wake();
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.report(Report::ThreadEnded);
    }
}

/// A link that nobody drives yet. It is shut down if nobody claims it: the event loop may have
/// ended meanwhile.
pub(crate) struct UnclaimedLink(Option<Arc<Link>>);

impl UnclaimedLink {
    /// Gives the link to the one who drives it.
    pub(crate) fn claim(mut self) -> Option<Arc<Link>> {
        self.0.take()
    }
}

impl Drop for UnclaimedLink {
    fn drop(&mut self) {
        if let Some(link) = &self.0 {
            link.shut_down();
        }
    }
}

/// The brokers that the thread connects to, and its options.
pub(crate) struct Attempt {
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) config: Config,
    /// Whether a request queue without consumers is an error.
    pub(crate) needs_consumers: bool,
    /// The deadline of connecting.
    pub(crate) deadline: Deadline,
}

/// Connects and does what the commands say, until one of them is to close, or the session fails.
pub(crate) fn run(attempt: &Attempt, reporter: &Reporter, commands: &Receiver<ThreadCommand>) {
    let take_link = |link: &Arc<Link>| {
        reporter.report(Report::Linked(UnclaimedLink(Some(link.clone()))));
    };
    let owner = Owner::EventLoop(reporter.waker.clone(), &take_link);
    match Connection::open_any(&attempt.endpoints, "rpc-client", &attempt.deadline, &owner) {
        Ok(mut connection) => {
            let result = run_session(&mut connection, attempt, reporter, commands);
            // Before the connection is closed: the event loop would learn its end first.
            result.unwrap_or_else(|error| reporter.report(Report::Failed(error)));
        }
        Err(error) => reporter.report(Report::Failed(error.into())),
    }
}

/// The session from when it is connected to its end.
fn run_session(
    connection: &mut Connection,
    attempt: &Attempt,
    reporter: &Reporter,
    commands: &Receiver<ThreadCommand>,
) -> Result<(), Error> {
    let Attempt {
        config, deadline, ..
    } = attempt;
    if attempt.needs_consumers {
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
    let connected = Report::Connected(Box::new(Connected {
        address: connection.address().to_owned(),
        publisher: RequestPublisher::new(publisher, config, &reply_queue),
        inbox: channel.inbox.clone(),
        notifications: connection.link().notifications(),
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
        // Requests are published while the consumer is being started; replies wait in the reply
        // queue. This call has no deadline, because a broker that blocks publishers answers only
        // when it unblocks them. For other brokers the event loop sets the limit:
        // `SessionCommand::GiveUp` ends the connection, and this call returns with an error.
        reporter.report(connected);
        let consumer = consume(&Deadline::after(Duration::MAX));
        consumer.map_err(|error| explain_refusal(connection, &reply_queue, error, deadline))?
    };
    reporter.report(Report::Consuming);
    let mut stats_channel = None;
    for command in commands {
        match command {
            ThreadCommand::QueueStats => {
                let stats = queue_stats(connection, &mut stats_channel, &config.queue)?;
                reporter.report(Report::QueueStats(stats));
            }
            ThreadCommand::Close(deadline) => {
                // Before the consumer is dropped, which would wait for the broker.
                connection.close_by(&deadline)?;
                break;
            }
        }
    }
    Ok(())
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
        Err(error) if error.is_exclusive() => Ok(()), // the connection that has it serves it
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
    let stats = connection.queue_stats(reply_queue, deadline);
    let is_missing = stats.is_err_and(|error| error.is_not_found());
    if is_about_requests || is_missing {
        return Error::Connection(error);
    }
    // The user may not read from the reply queue: only the answers are refused.
    Error::RefusedAfterSend(error)
}

/// The numbers of the request queue, on a channel that is kept while the broker does not close it.
fn queue_stats(
    connection: &mut Connection,
    kept: &mut Option<OpenChannel>,
    queue: &str,
) -> Result<Result<QueueStats, ErrorKind>, ConnectionError> {
    // Without a deadline, which would end the connection when it passes. Heartbeats bound it.
    let deadline = Deadline::after(Duration::MAX);
    let opened = match kept.take() {
        Some(channel) => Ok(channel),
        None => connection
            .open_channel(MAX_UNREAD, &deadline)
            .map(|(channel, _)| channel),
    };
    let result = opened.and_then(|channel| {
        let stats = channel.queue_stats(queue, &deadline)?;
        *kept = Some(channel);
        Ok(stats)
    });
    match result {
        Err(error) if error.ends_connection() => Err(error),
        stats => Ok(stats.map_err(|error| error.kind)),
    }
}
