//! Serves a function: keeps the connection and the request queue, and gives channels to the workers.

use crate::handler::Handler;
use crate::isolated::{IsolatedPublisher, IDLE_TIMEOUT};
use crate::kept::KeptReply;
use crate::queue::{self, QueueType};
use crate::worker::{Stop, Worker, WorkerChannel, WorkerEvent};
use amiquip::ConnectionBlockedNotification;
use crossbeam_channel::{bounded, select_biased, unbounded, Receiver, Sender};
use rpc_common::connection::{
    run_in_background, start_at, start_at_random, Connection, Deadline, Endpoint, Error, ErrorKind, Retry,
};
use rpc_common::options::{self, BrokerOptions};
use rpc_common::text::{escape, parse_name};
use std::mem;
use std::num::NonZeroUsize;
use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

/// What to serve. The defaults are those of the command line.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Requests")]
pub struct Config {
    /// Request queue
    #[arg(long, value_name = "NAME", default_value = "rpc_queue", value_parser = parse_name)]
    pub queue: String,

    /// auto | transient | classic | quorum: how to declare the queue if it does not exist
    #[arg(long, value_name = "TYPE", default_value = "auto", hide_possible_values = true)]
    pub queue_type: QueueType,

    /// Requests served at once, each on a channel of its own; 0: one per core
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(..=1024))]
    pub workers: u16,

    /// Unacknowledged requests per worker (basic.qos)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub prefetch: u16,

    /// Where the broker is.
    #[command(flatten)]
    pub broker: BrokerOptions,
}

impl Default for Config {
    fn default() -> Self {
        options::from_args(&[])
    }
}

impl Config {
    fn worker_count(&self) -> usize {
        let cores = || thread::available_parallelism().map_or(1, NonZeroUsize::get);
        match self.workers {
            0 => cores(),
            workers => workers.into(),
        }
    }
}

/// How long an attempt to connect and to find or declare the queue may take, for each broker; and opening a channel.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection that is being opened is waited for when it is time to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves until `stop` is disconnected: connects, has `handler` answer the requests, and connects again when the
/// connection ends. Calls `on_ready` once, before the first request is handled.
///
/// When it stops, it finishes the requests that it has begun, and leaves the others to other servers.
///
/// # Errors
/// When retrying cannot help, before it has served for the first time: credentials, permissions, or a queue that can be
/// neither used nor declared. After that it retries without end. [`ErrorKind::TooManyChannels`] at any time.
///
/// # Panics
/// When the system refuses a thread.
pub fn serve(config: &Config, handler: &Handler, stop: &Stop, on_ready: &(dyn Fn() + Sync)) -> Result<(), Error> {
    let mut endpoints = config.broker.endpoints()?;
    start_at_random(&mut endpoints);
    let (event_sender, events) = unbounded();
    let ready = Once::new();
    let on_ready = || ready.call_once(on_ready);
    let isolated = IsolatedPublisher::new(endpoints.clone());
    let connection = thread::scope(|scope| {
        let mut channel_senders = Vec::new();
        for index in 0..config.worker_count() {
            let (channel_sender, channels) = bounded(1);
            channel_senders.push(channel_sender);
            let worker = Worker {
                index,
                queue: &config.queue,
                prefetch: config.prefetch,
                handler,
                stop,
                on_ready: &on_ready,
                isolated: &isolated,
                events: event_sender.clone(),
                channels,
                kept: KeptReply::default(),
            };
            thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn_scoped(scope, move || worker.run())
                .expect("the system provides a thread");
        }
        drop(event_sender);
        let mut server = Server {
            config,
            endpoints,
            stop,
            ready: &ready,
            isolated: &isolated,
            events,
            channel_senders,
            waiting: Vec::new(),
            queue_type: config.queue_type,
            last_error: None,
            is_consuming: false,
        };
        server.run()
        // The scope waits for the workers. They end before the connection is closed.
    })?;
    if let Some(Err(error)) = connection.map(|mut connection| connection.close()) {
        log::warn!("{error}"); // what was not acknowledged is in the queue again
    }
    log::info!("stopped");
    Ok(())
}

struct Server<'a> {
    config: &'a Config,
    /// Starts with the broker that was connected last.
    endpoints: Vec<Endpoint>,
    stop: &'a Stop,
    /// Completed when a worker has consumed for the first time.
    ready: &'a Once,
    isolated: &'a IsolatedPublisher,
    events: Receiver<WorkerEvent>,
    /// By the workers' index.
    channel_senders: Vec<Sender<WorkerChannel>>,
    /// The workers that wait for a channel.
    waiting: Vec<usize>,
    /// As configured, or quorum where the broker does not permit transient queues.
    queue_type: QueueType,
    /// The error that was logged last, until a worker consumes.
    last_error: Option<Error>,
    /// Whether a worker consumes on this connection.
    is_consuming: bool,
}

/// A connection, what the broker notifies, and what was found out or done about the queue.
type Connected = (Connection, Receiver<ConnectionBlockedNotification>, String);

impl Server<'_> {
    /// Connects, again and again. When it is time to stop, returns the connection, if there is one.
    fn run(&mut self) -> Result<Option<Connection>, Error> {
        let mut retry = Retry::new(Instant::now());
        loop {
            let error = match self.run_connection(&mut retry) {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            let forbids_transient = queue::forbids_transient(&error);
            if forbids_transient && self.queue_type == QueueType::Auto {
                log::info!("this broker permits no transient queues: using a quorum queue");
                self.queue_type = QueueType::Quorum;
                continue;
            }
            let decision = retry.on_error(&error, Instant::now());
            let cannot_help = decision.is_final || forbids_transient;
            let has_served = self.ready.is_completed();
            if (cannot_help && !has_served) || error.kind == ErrorKind::TooManyChannels {
                return Err(error);
            }
            if self.last_error.as_ref() != Some(&error) {
                log::warn!("{error}; retrying");
            }
            self.last_error = Some(error);
            if self.stop.recv_timeout(decision.pause).is_err_and(|end| end.is_disconnected()) {
                return Ok(None);
            }
        }
    }

    /// One connection, from opening it to its end. When it is time to stop, returns it, if there is one.
    fn run_connection(&mut self, retry: &mut Retry) -> Result<Option<Connection>, Error> {
        let connecting = self.connect();
        let (mut connection, notifications, queue_report) = select_biased! {
            recv(self.stop) -> _ => {
                // If it is opened soon, it is closed properly.
                let connected = connecting.recv_timeout(STOP_TIMEOUT).ok().and_then(Result::ok);
                return Ok(connected.map(|(connection, ..)| connection));
            }
            recv(connecting) -> connected => connected.expect("connecting does not panic")?,
        };
        retry.on_connected();
        self.is_consuming = false;
        start_at(&mut self.endpoints, connection.broker());
        self.isolated.use_endpoint(&connection.endpoint);
        loop {
            self.open_channels(&mut connection)?;
            select_biased! {
                recv(self.stop) -> _ => return Ok(Some(connection)),
                recv(notifications) -> notification => match notification {
                    Ok(notification) => log_notification(connection.broker(), &notification),
                    // Only this tells that the connection has ended: a worker's error may be about an earlier one.
                    Err(_) => return Err(connection.close_for_cause(amiquip::Error::EventLoopDropped)),
                },
                recv(self.events) -> event => match event {
                    Ok(WorkerEvent::Consuming) => {
                        if !mem::replace(&mut self.is_consuming, true) {
                            log::info!("connected to {}; {queue_report}", connection.broker());
                            self.last_error = None;
                        }
                    }
                    Ok(WorkerEvent::NeedsChannel { worker, lost }) => {
                        self.waiting.push(worker);
                        if let Some(error) = lost {
                            self.recover_queue(&mut connection, error)?;
                        }
                    }
                    Err(_) => return Ok(Some(connection)), // the workers have stopped
                },
                default(IDLE_TIMEOUT) => self.isolated.close_idle(),
            }
        }
    }

    /// Connects, and finds or declares the queue, in the background: the stop signal may come meanwhile.
    fn connect(&self) -> Receiver<Result<Connected, Error>> {
        let (endpoints, queue_type) = (self.endpoints.clone(), self.queue_type);
        let queue = self.config.queue.clone();
        run_in_background(move || {
            let deadline = Deadline::after(endpoints.iter().map(|_| ATTEMPT_TIMEOUT).sum());
            let mut connection = Connection::open_any(&endpoints, "rpc-server", &deadline)?;
            let notifications = connection.blocked_notifications(&deadline)?;
            let report = queue::find_or_declare(&mut connection, &queue, queue_type, &deadline)?;
            Ok((connection, notifications, report))
        })
    }

    /// Opens a channel for each worker that waits for one.
    fn open_channels(&mut self, connection: &mut Connection) -> Result<(), Error> {
        let deadline = Deadline::after(ATTEMPT_TIMEOUT);
        while let Some(&worker) = self.waiting.last() {
            let channel = WorkerChannel::open(connection, self.config.prefetch, &deadline)?;
            let _ = self.channel_senders[worker].send(channel); // fails if it has stopped
            self.waiting.pop();
        }
        Ok(())
    }

    /// A worker has lost its channel while the connection works: finds or declares the queue.
    fn recover_queue(&mut self, connection: &mut Connection, error: Error) -> Result<(), Error> {
        let queue = &self.config.queue;
        match &error.kind {
            ErrorKind::ConsumerCancelled => log::warn!("queue '{queue}' was deleted"),
            ErrorKind::ChannelClosed(_) => log::warn!("{error}"),
            ErrorKind::Refused(_) => return Err(error),
            _ => return Ok(()), // the connection that it was about has ended
        }
        let deadline = Deadline::after(ATTEMPT_TIMEOUT);
        log::info!("{}", queue::find_or_declare(connection, queue, self.queue_type, &deadline)?);
        Ok(())
    }
}

fn log_notification(broker: &str, notification: &ConnectionBlockedNotification) {
    match notification {
        ConnectionBlockedNotification::Blocked(reason) => {
            log::warn!("{broker} blocks publishers: {}; waiting", escape(reason.as_bytes()));
        }
        ConnectionBlockedNotification::Unblocked => {
            log::info!("{broker} no longer blocks publishers");
        }
    }
}
