//! The supervisor: keeps the connection, the request queue and the workers' channels alive.

use crate::handler::Handler;
use crate::queue::{self, QueueType, NOT_FOUND, PRECONDITION_FAILED};
use crate::signals::Stop;
use crate::worker::{Need, Report, Worker};
use amiquip::{Channel, ConnectionBlockedNotification};
use crossbeam_channel::{bounded, select_biased, unbounded, Receiver, Sender};
use rpc_common::broker::{self, Error, Link};
use rpc_common::deadline::Deadline;
use rpc_common::message::escape;
use rpc_common::target::Target;
use std::convert::Infallible;
use std::thread;
use std::time::Duration;

/// What to serve, and from where.
#[derive(Clone, Debug)]
pub struct Config {
    /// The broker.
    pub target: Target,
    /// The request queue.
    pub queue: String,
    /// How the request queue is declared, should it not exist.
    pub queue_type: QueueType,
    /// How many requests are worked on at once, each in a thread with a channel of its own.
    pub workers: usize,
    /// Unacknowledged requests per worker, `basic.qos`.
    pub prefetch: u16,
}

impl Config {
    /// One worker, one request at a time, on `queue` of the broker that the environment names.
    ///
    /// # Errors
    /// [`Error::Url`]
    pub fn new(queue: &str) -> Result<Self, Error> {
        Ok(Config {
            target: Target::from_env()?,
            queue: queue.into(),
            queue_type: QueueType::Auto,
            workers: 1,
            prefetch: 1,
        })
    }
}

/// How long one attempt to connect, declare and open the workers' channels may take.
const ATTEMPT: Duration = Duration::from_secs(10);

/// A worker's stack; whatever is deep is on the heap, and `RUST_MIN_STACK` is for amiquip's thread.
const WORKER_STACK: usize = 2 << 20;

/// Serves until `stop` ends: connects, takes requests, has `handler` answer them, and connects again
/// when the connection breaks. Calls `on_ready` once, when all workers wait for requests.
///
/// When it is stopped it finishes what it has begun, and leaves the rest to other servers.
///
/// # Errors
/// What trying again cannot help: bad credentials, no permission, a queue that cannot be had.
///
/// # Panics
/// When the system refuses a thread, as [`thread::spawn`] does.
pub fn serve(
    config: &Config,
    handler: &Handler,
    stop: &Stop,
    on_ready: &dyn Fn(),
) -> Result<(), Error> {
    let (report, reports) = unbounded();
    let (begin, ready) = bounded(0);
    let link = thread::scope(|scope| {
        for number in 1..=config.workers {
            let worker = Worker {
                queue: &config.queue,
                prefetch: config.prefetch,
                handler,
                stop,
                ready: &ready,
                reports: report.clone(),
            };
            thread::Builder::new()
                .name(format!("worker-{number}"))
                .stack_size(WORKER_STACK)
                .spawn_scoped(scope, move || worker.run())
                .expect("the system has threads to spare");
        }
        drop(report);
        let queue_type = config.queue_type;
        Supervisor {
            config,
            stop,
            on_ready,
            begin: Some(begin),
            reports,
            waiting: Vec::new(),
            queue_type,
            consuming: 0,
        }
        .run()
        // The scope waits for the workers; they are gone before the connection is.
    })?;
    if let Some(Err(error)) = link.map(|mut link| link.close()) {
        log::warn!("{error}"); // what was not acknowledged is in the queue again
    }
    Ok(())
}

struct Supervisor<'a> {
    config: &'a Config,
    stop: &'a Stop,
    on_ready: &'a dyn Fn(),
    /// Dropped to let the workers begin, when all consume for the first time.
    begin: Option<Sender<Infallible>>,
    reports: Receiver<Report>,
    /// The inboxes of workers that wait for a channel.
    waiting: Vec<Sender<Channel>>,
    /// As configured, until the broker teaches us better.
    queue_type: QueueType,
    /// How many workers have begun to consume on this connection.
    consuming: usize,
}

impl Supervisor<'_> {
    /// Returns the link when it is time to stop, if there is one.
    fn run(&mut self) -> Result<Option<Link>, Error> {
        let mut pauses = broker::pauses();
        let mut last = None;
        loop {
            self.consuming = 0;
            let error = match self.supervise() {
                Ok(link) => return Ok(Some(link)),
                Err(error) => error,
            };
            if queue::forbids_transient(&error) && self.queue_type == QueueType::Auto {
                log::info!("this broker permits no transient queue: declaring a quorum queue");
                self.queue_type = QueueType::Quorum;
                continue;
            }
            if self.consuming > 0 {
                (pauses, last) = (broker::pauses(), None);
            }
            if self.is_final(&error, last.as_ref()) {
                return Err(error);
            }
            if last.as_ref() != Some(&error) {
                log::warn!("{error}: trying again");
            }
            last = Some(error);
            if self.stopped_within(pauses.next().unwrap_or(ATTEMPT)) {
                return Ok(None);
            }
        }
    }

    /// Once served, always hopeful. Before that, a refusal is final; one of the credentials only the
    /// second time, because a broker that shuts down in the handshake looks the same.
    fn is_final(&self, error: &Error, last: Option<&Error>) -> bool {
        let hopeless = !error.is_transient()
            || (queue::forbids_transient(error) && self.queue_type == QueueType::Transient);
        let first_time = matches!(error, Error::Credentials { .. }) && last != Some(error);
        let never_served = self.begin.is_some();
        never_served && hopeless && !first_time
    }

    /// One connection, from opening it to its end. Returns it when it is time to stop.
    fn supervise(&mut self) -> Result<Link, Error> {
        let deadline = Deadline::after(ATTEMPT);
        let mut link = broker::open(&self.config.target, "rpc-server", &deadline)?;
        let notices = link.notices(&deadline)?;
        log::info!("connected to {}", self.config.target);
        self.ensure_queue(&mut link)?;
        loop {
            self.give_channels(&mut link)?;
            select_biased! {
                recv(self.stop) -> _ => return Ok(link),
                recv(notices) -> notice => match notice {
                    Ok(ConnectionBlockedNotification::Blocked(reason)) => {
                        log::warn!("the broker takes no replies for now: {}", escape(reason.as_bytes()));
                    }
                    Ok(ConnectionBlockedNotification::Unblocked) => log::info!("the broker takes replies again"),
                    Err(_) => return Err(link.explain(amiquip::Error::EventLoopDropped)),
                },
                recv(self.reports) -> report => match report {
                    Ok(Report::Consumes) => self.count_consumer(),
                    Ok(Report::NeedsChannel { inbox, because }) => {
                        self.waiting.push(inbox);
                        self.mend(&mut link, because)?;
                    }
                    Err(_) => return Ok(link), // the workers have seen the stop before us
                },
            }
        }
    }

    /// Restores what a worker needs. Of the end of a connection, which may be one of the past, it is
    /// not the workers that we learn.
    fn mend(&mut self, link: &mut Link, because: Need) -> Result<(), Error> {
        match because {
            Need::Start | Need::Connection => return Ok(()),
            Need::Cancelled => log::warn!("queue '{}' was deleted", self.config.queue),
            Need::ChannelClosed(error) => match Error::of(error, link.target()) {
                error @ Error::ChannelClosed { code: NOT_FOUND | PRECONDITION_FAILED, .. } => {
                    log::warn!("{error}");
                }
                error => return Err(error),
            },
        }
        self.ensure_queue(link)
    }

    fn ensure_queue(&self, link: &mut Link) -> Result<(), Error> {
        queue::ensure(link, &self.config.queue, self.queue_type, &Deadline::after(ATTEMPT))
    }

    fn give_channels(&mut self, link: &mut Link) -> Result<(), Error> {
        while let Some(inbox) = self.waiting.last() {
            let channel = link.open_channel(&Deadline::after(ATTEMPT))?;
            let _ = inbox.send(channel); // a worker that has stopped meanwhile needs none
            self.waiting.pop();
        }
        Ok(())
    }

    fn count_consumer(&mut self) {
        self.consuming += 1;
        if self.consuming == self.config.workers && self.begin.is_some() {
            (self.on_ready)();
            self.begin = None;
        }
    }

    /// Waits; true when the stop came first.
    fn stopped_within(&self, pause: Duration) -> bool {
        self.stop.recv_timeout(pause) == Err(crossbeam_channel::RecvTimeoutError::Disconnected)
    }
}
