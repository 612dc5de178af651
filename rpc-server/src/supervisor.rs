//! The supervisor: keeps the connection, the request queue and the workers' channels alive.

use crate::handler::Handler;
use crate::isolated::{IsolatedReplies, IDLE_LIMIT};
use crate::queue::{self, QueueType, PRECONDITION_FAILED};
use crate::signals::Stop;
use crate::worker::{Because, Inbox, Lease, Need, Word, Worker};
use amiquip::ConnectionBlockedNotification;
use crossbeam_channel::{select_biased, unbounded, Receiver};
use rpc_common::broker::{self, Backoff, Error, Link, NOT_FOUND};
use rpc_common::deadline::{in_background, Deadline};
use rpc_common::message::escape;
use rpc_common::target::Brokers;
use std::num::NonZeroUsize;
use std::sync::atomic::AtomicU64;
use std::sync::Once;
use std::time::Duration;
use std::{mem, thread};

/// What to serve, and from where.
#[derive(Clone, Debug)]
pub struct Config {
    /// The brokers, tried in turn.
    pub brokers: Brokers,
    /// The request queue.
    pub queue: String,
    /// How the request queue is declared, should it not exist.
    pub queue_type: QueueType,
    /// How many requests are worked on at once, each in a thread with a channel of its own.
    pub workers: NonZeroUsize,
    /// Unacknowledged requests per worker, `basic.qos`; 0 for no limit.
    pub prefetch: u16,
}

impl Config {
    /// One worker, one request at a time, on `queue` of the broker that the environment names.
    ///
    /// # Errors
    /// [`Error::Url`]
    pub fn new(queue: &str) -> Result<Self, Error> {
        Ok(Config {
            brokers: Brokers::from_env()?,
            queue: queue.into(),
            queue_type: QueueType::Auto,
            workers: NonZeroUsize::MIN,
            prefetch: 1,
        })
    }
}

/// How long a connection that is being opened is waited for when it is time to stop.
const FAREWELL: Duration = Duration::from_secs(1);

/// An open connection, what the broker says of it, and what was done to have the queue.
type Connected = (Link, Receiver<ConnectionBlockedNotification>, String);

/// How long an attempt to connect and to have the queue may take, or one to open channels.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Serves until `stop` ends: connects, takes requests, has `handler` answer them, and connects again
/// when the connection breaks. Calls `on_ready` once, before the first request is begun.
///
/// When it is stopped it finishes what it has begun, and leaves the rest to other servers.
///
/// # Errors
/// What trying again cannot help, before it has first served: bad credentials, no permission, a queue
/// that cannot be had. After that it hopes for ever.
///
/// # Panics
/// When the system refuses a thread, as [`thread::spawn`] does.
pub fn serve(
    config: &Config,
    handler: &Handler,
    stop: &Stop,
    on_ready: &(dyn Fn() + Sync),
) -> Result<(), Error> {
    let (word, words) = unbounded();
    let (ready, dropped) = (&Once::new(), &AtomicU64::new(0));
    let isolated = &IsolatedReplies::new(config.brokers.clone());
    let link = thread::scope(|scope| {
        for number in 1..=config.workers.get() {
            let worker = Worker {
                queue: &config.queue,
                prefetch: config.prefetch,
                handler,
                stop,
                on_ready,
                ready,
                dropped,
                isolated,
                words: word.clone(),
            };
            thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn_scoped(scope, move || worker.run())
                .expect("the system has threads to spare");
        }
        drop(word);
        let queue_type = config.queue_type;
        let brokers = config.brokers.clone();
        let (waiting, last, settled) = (Vec::new(), None, false);
        Supervisor {
            config,
            brokers,
            stop,
            ready,
            isolated,
            words,
            waiting,
            queue_type,
            last,
            settled,
        }
        .run()
        // The scope waits for the workers; they are gone before the connection is.
    })?;
    if let Some(Err(error)) = link.map(|mut link| link.close()) {
        log::warn!("{error}"); // what was not acknowledged is in the queue again
    }
    log::info!("stopped");
    Ok(())
}

struct Supervisor<'a> {
    config: &'a Config,
    /// The one that was connected last comes first.
    brokers: Brokers,
    stop: &'a Stop,
    /// Done when a worker has consumed.
    ready: &'a Once,
    isolated: &'a IsolatedReplies,
    words: Receiver<Word>,
    /// The inboxes of workers that wait for a channel.
    waiting: Vec<Inbox>,
    /// As configured, until the broker teaches us better.
    queue_type: QueueType,
    /// Why there is no connection, once that is said.
    last: Option<Error>,
    /// Whether a worker has consumed on this connection.
    settled: bool,
}

impl Supervisor<'_> {
    /// Keeps connecting. Returns the link when it is time to stop, if there is one.
    fn run(&mut self) -> Result<Option<Link>, Error> {
        let mut backoff = Backoff::new();
        loop {
            let error = match self.supervise() {
                Ok(link) => return Ok(link),
                Err(error) => error,
            };
            if queue::forbids_transient(&error) && self.queue_type == QueueType::Auto {
                log::info!("this broker permits no transient queue: declaring a quorum queue");
                self.queue_type = QueueType::Quorum;
                continue;
            }
            self.settled = false;
            if self.is_final(&error) {
                return Err(error);
            }
            if self.last.as_ref() != Some(&error) {
                log::warn!("{error}; trying again");
            }
            self.last = Some(error);
            if self.stopped_within(backoff.next_pause()) {
                return Ok(None);
            }
        }
    }

    /// Once served, always hopeful. Before that, a refusal is final; one of the credentials only the
    /// second time, because a broker that shuts down in the handshake looks the same.
    fn is_final(&self, error: &Error) -> bool {
        let hopeless = !error.is_transient()
            || (queue::forbids_transient(error) && self.queue_type == QueueType::Transient);
        let first_time =
            matches!(error, Error::Credentials { .. }) && self.last.as_ref() != Some(error);
        let never_served = !self.ready.is_completed();
        let own_fault = matches!(error, Error::TooManyChannels { .. });
        own_fault || (never_served && hopeless && !first_time)
    }

    /// One connection, from opening it to its end. Returns it, if it is there, when it is time to stop.
    fn supervise(&mut self) -> Result<Option<Link>, Error> {
        let connecting = self.connect();
        let (mut link, notices, queue) = select_biased! {
            recv(self.stop) -> _ => {
                // Should it come, it is closed as it should be.
                let connected = connecting.recv_timeout(FAREWELL).ok().and_then(Result::ok);
                return Ok(connected.map(|(link, ..)| link));
            }
            recv(connecting) -> connected => connected.expect("connecting does not panic")?,
        };
        let broker = link.target().to_string();
        self.brokers.begin_with(&broker);
        self.isolated.use_broker(link.target());
        loop {
            self.give_channels(&mut link)?;
            select_biased! {
                recv(self.stop) -> _ => return Ok(Some(link)),
                recv(notices) -> notice => match notice {
                    Ok(ConnectionBlockedNotification::Blocked(reason)) => {
                        log::warn!("the broker takes no replies for now: {}", escape(reason.as_bytes()));
                    }
                    Ok(ConnectionBlockedNotification::Unblocked) => log::info!("the broker takes replies again"),
                    Err(_) => return Err(link.explain(amiquip::Error::EventLoopDropped)),
                },
                recv(self.words) -> word => match word {
                    Ok(Word::Needs(Need { inbox, because })) => {
                        self.waiting.push(inbox);
                        self.mend(&mut link, because)?;
                    }
                    Ok(Word::Consumes) => {
                        if !mem::replace(&mut self.settled, true) {
                            log::info!("connected to {broker}; {queue}");
                            self.last = None;
                        }
                    }
                    Err(_) => return Ok(Some(link)), // the workers have seen the stop before us
                },
                default(IDLE_LIMIT) => {
                    self.isolated.close_idle();
                    log::logger().flush(); // counts of lines that were not logged
                }
            }
        }
    }

    /// Restores what a worker needs. Of the end of a connection, which may be one of the past, it is
    /// not the workers that we learn.
    fn mend(&mut self, link: &mut Link, because: Because) -> Result<(), Error> {
        match because {
            Because::Start | Because::Disconnected => return Ok(()),
            Because::Cancelled => log::warn!("queue '{}' was deleted", self.config.queue),
            Because::ChannelClosed(error) => match Error::of(error, link.target()) {
                error @ Error::ChannelClosed { code: NOT_FOUND | PRECONDITION_FAILED, .. } => {
                    log::warn!("{error}");
                }
                error => return Err(error),
            },
        }
        let deadline = Deadline::after(ATTEMPT);
        let queue = queue::ensure(link, &self.config.queue, self.queue_type, &deadline)?;
        log::info!("{queue}");
        Ok(())
    }

    /// Connects and sees to the queue, in the background, because the stop may come meanwhile.
    fn connect(&self) -> Receiver<Result<Connected, Error>> {
        let (brokers, queue) = (self.brokers.clone(), self.config.queue.clone());
        let queue_type = self.queue_type;
        in_background(move || {
            let deadline = Deadline::after(ATTEMPT * brokers.count());
            let mut link = broker::open_any(&brokers, "rpc-server", &deadline)?;
            let notices = link.notices(&deadline)?;
            let queue = queue::ensure(&mut link, &queue, queue_type, &deadline)?;
            Ok((link, notices, queue))
        })
    }

    fn give_channels(&mut self, link: &mut Link) -> Result<(), Error> {
        let deadline = Deadline::after(ATTEMPT);
        while let Some(inbox) = self.waiting.last() {
            let channel = link.open_channel(&deadline)?;
            let publisher = link.publisher(&channel);
            let _ = inbox.send((Lease::new(channel, link.watchdog()), publisher)); // it may have stopped
            self.waiting.pop();
        }
        Ok(())
    }

    /// Waits; true when the stop came first.
    fn stopped_within(&self, pause: Duration) -> bool {
        self.stop.recv_timeout(pause) == Err(crossbeam_channel::RecvTimeoutError::Disconnected)
    }
}
