//! Serves a function: keeps the connection and the request queue, and gives channels to the
//! workers.
//!
//! All workers wait for a channel at first, and again when theirs has ended. They end with the stop
//! signal, or when `Server::channel_offers` is dropped.

use crate::callers::Callers;
use crate::cancel::Cancel;
use crate::channel::{WorkerChannel, BLOCKING_TIMEOUT};
use crate::config::{Config, UrlOrder};
use crate::handler::Handler;
use crate::observer::Observer;
use crate::queue::{self, QueueType};
use crate::redelivery::{IsolatedPublisher, KeptReplies};
use crate::signals::Stop;
use crate::worker::{Service, Worker, WorkerReport};
use crossbeam_channel::{
    after, never, select_biased, tick, unbounded, Receiver, RecvError, Sender,
};
use rpc_common::connection::{
    run_in_background, start_at, start_at_random, Backoff, Connection, Deadline, Driving, Endpoint,
    Error, ErrorKind, Meaning, Notification, Owner, Phase,
};
use rpc_common::message::Publish;
use rpc_common::properties::Properties;
use rpc_common::text::{describe_io_error, format_duration};
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Once;
use std::time::{Duration, Instant};
use std::{io, thread};

/// Timeout of each broker's attempt to connect and to find or declare the queue; and of opening
/// channels.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval at which an isolated connection that is not used is looked for.
const IDLE_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Maximum number of unread messages of the check of permissions: one returned message.
const MAX_UNREAD: usize = 64;

/// Maximum time that a stop waits for a connection that is being opened.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after a login that was refused, before the server has served.
const LOGIN_PAUSE: Duration = Duration::from_secs(3);

/// Serves until `stop` is disconnected: connects, has `handler` answer the requests, and connects
/// again when the connection ends. `observer` is told what happens.
///
/// When it stops, it finishes the requests that it has begun, and leaves the others to other
/// servers.
///
/// ```no_run
/// use rpc_common::message::Request;
/// use rpc_server::{serve, stop_signal, Caller, Config};
///
/// let config = Config { queue: "upper".into(), ..Config::default() };
/// let upper = |request: &Request, _: &Caller| Ok(request.text()?.to_uppercase().into());
/// let stop = stop_signal().expect("the system provides signal handlers");
/// serve(&config, &upper, &stop, &|| println!("ready"))?;
/// # Ok::<_, rpc_common::connection::Error>(())
/// ```
///
/// # Errors
/// When retrying cannot help, before it has consumed for the first time: credentials that are
/// refused twice, permissions, or a queue that can be neither used nor declared. After that it
/// retries without end.
/// [`ErrorKind::TooManyChannels`] at any time. [`ErrorKind::Configuration`] if the system does not
/// provide a thread for each worker.
pub fn serve(
    config: &Config,
    handler: &dyn Handler,
    stop: &Stop,
    observer: &dyn Observer,
) -> Result<(), Error> {
    let mut endpoints = config.broker.endpoints()?;
    if config.url_order == UrlOrder::Random {
        start_at_random(&mut endpoints);
    }
    let workers = config.worker_count();
    let service = Service {
        config,
        handler,
        stop,
        observer,
        driving: if workers == 1 {
            Driving::WaitingThread
        } else {
            Driving::Standby
        },
        has_consumed: Once::new(),
        is_blocked: AtomicBool::new(false),
        isolated: IsolatedPublisher::default(),
        kept: KeptReplies::default(),
        callers: Callers::default(),
        cancel: Cancel::new().map_err(|error| {
            let reason = format!("cannot serve: {}", describe_io_error(&error));
            Error::configuration(ErrorKind::Configuration(reason))
        })?,
    };
    let (report_sender, reports) = unbounded();
    let (channel_offers, offered_channels) = unbounded();
    thread::scope(|scope| {
        for index in 0..workers {
            let worker = Worker::new(&service, report_sender.clone(), offered_channels.clone());
            let started = thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn_scoped(scope, move || worker.run());
            if let Err(error) = started {
                drop(channel_offers); // ends the workers that have started
                return Err(too_few_threads(index, workers, &error));
            }
        }
        drop(report_sender);
        let server = Server {
            service: &service,
            endpoints,
            reports,
            channel_offers,
            waiting: workers,
            queue_type: config.queue_type,
            has_refused_login: false,
            backoff: Backoff::new(Instant::now()),
            ticks: observer.alive_interval().map_or_else(never, tick),
        };
        server.run()
    })
}

/// Checks that the user may publish replies, by a message that no queue takes: without that
/// permission each reply would be refused, and its request run again.
fn check_may_reply(connection: &mut Connection, deadline: &Deadline) -> Result<(), Error> {
    let (channel, publisher) = connection.open_channel(MAX_UNREAD, deadline)?;
    let probe = Publish {
        routing_key: b"rpc.reply.probe",
        mandatory: true, // else the broker drops the message without checking
        properties: Properties::default().encode(),
        body: b"",
    };
    publisher.add_message(&probe).expect("it has no properties");
    let _ = publisher.flush(); // the round trip returns the cause
    channel.run_blocking(deadline, Phase::PublishingReply, |amqp| {
        amqp.qos(0, 0, false)
    })?;
    channel.close(deadline)
}

fn too_few_threads(started: usize, workers: usize, error: &io::Error) -> Error {
    let reason = describe_io_error(error);
    Error::configuration(ErrorKind::Configuration(format!(
        "the system provides threads for {started} of {workers} workers: {reason}: reduce --workers, or raise the limit of processes (ulimit -u, or TasksMax of the unit)"
    )))
}

struct Server<'a> {
    service: &'a Service<'a>,
    /// Starts with the broker that was connected last, or with the next one if that was silent.
    endpoints: Vec<Endpoint>,
    /// Disconnected when all workers have ended.
    reports: Receiver<WorkerReport>,
    /// Gives AMQP channels to the workers.
    channel_offers: Sender<WorkerChannel>,
    /// Number of workers that wait for a channel.
    waiting: usize,
    /// As configured, or quorum where the broker does not permit transient queues.
    queue_type: QueueType,
    /// Whether a broker has refused the login. What checks logins (LDAP) may start later than this
    /// server: so the second refusal is final.
    has_refused_login: bool,
    backoff: Backoff,
    /// The instants at which the observer learns that the loop is alive.
    ticks: Receiver<Instant>,
}

/// A connection, and what was found out or done about the queue.
type Opened = (Connection, String);

impl Server<'_> {
    /// Connects, again and again, until it is time to stop.
    fn run(mut self) -> Result<(), Error> {
        while let Err(error) = self.run_connection() {
            let forbids_transient = error.meaning() == Some(Meaning::TransientQueueRefused);
            if forbids_transient && self.queue_type == QueueType::Auto {
                log::info!("this broker permits no transient queues: using a quorum queue");
                self.queue_type = QueueType::Quorum;
                continue;
            }
            let has_consumed = self.service.has_consumed.is_completed();
            let is_final = match error.kind {
                ErrorKind::TooManyChannels => true,
                _ if has_consumed => false,
                ErrorKind::Credentials(_) => mem::replace(&mut self.has_refused_login, true),
                _ => error.is_permanent() || forbids_transient,
            };
            if is_final {
                return Err(error);
            }
            let pause = match error.kind {
                ErrorKind::Credentials(_) if !has_consumed => {
                    let pause = format_duration(LOGIN_PAUSE);
                    log::warn!("{error}; retrying once, in {pause}");
                    LOGIN_PAUSE
                }
                _ => {
                    log::warn!("{error}; retrying");
                    self.backoff.next_pause(Instant::now())
                }
            };
            if error.is_silence() {
                self.endpoints.rotate_left(1);
            }
            self.service.observer.on_disconnected(&error);
            if self.wait_for(&after(pause), self.service.stop).is_none() {
                break;
            }
        }
        // The replies can go nowhere.
        self.service.cancel.cancel();
        self.wait_for_workers(&never(), &never());
        Ok(())
    }

    /// One connection, from opening it to its end, or until it is time to stop.
    fn run_connection(&mut self) -> Result<(), Error> {
        let Some((mut connection, queue_report)) = self.connect()? else {
            return Ok(());
        };
        let notifications = connection.link().notifications();
        start_at(&mut self.endpoints, connection.address());
        self.service.is_blocked.store(false, Ordering::Relaxed);
        self.service.isolated.close_unused(); // it may have lost its broker, too
        let mut queue_report = Some(queue_report); // until it is logged
        let idle_checks = tick(IDLE_CHECK_INTERVAL);
        loop {
            self.open_channels(&mut connection)?;
            select_biased! {
                recv(self.service.stop) -> _ => break self.service.observer.on_stopping(),
                recv(self.ticks) -> _ => self.service.observer.on_alive(),
                recv(notifications) -> notification => match notification {
                    Ok(Notification::Blocked(reason)) => {
                        self.service.is_blocked.store(true, Ordering::Relaxed);
                        log::warn!("{} blocks publishers: {reason}; waiting", connection.address());
                    }
                    Ok(Notification::Unblocked) => {
                        self.service.is_blocked.store(false, Ordering::Relaxed);
                        log::info!("{} no longer blocks publishers", connection.address());
                    }
                    // Only this tells that the connection has ended: a worker's error may be about
                    // an earlier one.
                    Err(_) => return Err(connection.cause()),
                },
                recv(self.reports) -> report => match report {
                    Ok(WorkerReport::Consuming) => {
                        if let Some(report) = queue_report.take() {
                            log::info!("connected to {}; {report}", connection.address());
                            self.service.observer.on_consuming(connection.address());
                        }
                    }
                    Ok(WorkerReport::LostChannel(error)) => {
                        self.waiting += 1;
                        self.recover_queue(&mut connection, error)?;
                    }
                    Err(_) => break, // the workers have ended
                },
                // The next reply that needs an isolated connection opens another one.
                recv(idle_checks) -> _ => self.service.isolated.close_idle(),
            }
        }
        connection
            .link()
            .limit_blocking(&Deadline::after(BLOCKING_TIMEOUT)); // the workers' calls
        connection.link().wake_all(); // the workers that wait
        let stop_after = self.service.config.stop_after.map_or_else(never, after);
        self.wait_for_workers(&stop_after, &notifications); // before the connection is closed
        if let Err(error) = connection.close() {
            log::warn!("{error}"); // what was not acknowledged is in the queue again
        }
        Ok(())
    }

    /// Connects, and finds or declares the queue, in the background: the stop signal may come
    /// meanwhile. `None` when it is time to stop.
    fn connect(&self) -> Result<Option<Opened>, Error> {
        let endpoints = self.endpoints.clone();
        let queue_type = self.queue_type;
        let queue = self.service.config.queue.clone();
        let connecting = run_in_background(move || {
            let timeout = endpoints.iter().map(|_| ATTEMPT_TIMEOUT).sum(); // for all of them
            let deadline = Deadline::after(timeout);
            let mut connection =
                Connection::open_any(&endpoints, "rpc-server", &deadline, &Owner::Standby)?;
            let declared = queue::find_or_declare(&mut connection, &queue, queue_type, &deadline)?;
            check_may_reply(&mut connection, &deadline)?;
            Ok((connection, queue::describe(&queue, declared)))
        })
        .map_err(Error::configuration)?;
        let Some(connected) = self.wait_for(&connecting, self.service.stop) else {
            // A connection that is opened soon is closed properly.
            let _ = connecting.recv_timeout(STOP_TIMEOUT);
            return Ok(None);
        };
        connected.expect("connecting does not panic").map(Some)
    }

    /// Waits until the workers have ended, which they do when it is time to stop. Gives up the
    /// requests in hand after `stop_after`, or when the connection ends.
    fn wait_for_workers(
        &self,
        stop_after: &Receiver<Instant>,
        connection: &Receiver<Notification>,
    ) {
        let connection_never = never();
        let mut connection = connection;
        loop {
            select_biased! {
                recv(self.ticks) -> _ => self.service.observer.on_alive(),
                recv(self.reports) -> report => if report.is_err() {
                    return; // the workers have ended
                },
                recv(stop_after) -> _ => {
                    log::info!("giving up the requests that have begun, after --stop-after");
                    self.service.cancel.cancel();
                }
                recv(connection) -> notification => if notification.is_err() {
                    log::info!("giving up the requests that have begun: the connection has ended");
                    self.service.cancel.cancel();
                    connection = &connection_never;
                },
            }
        }
    }

    /// Waits for a message. `None` when `stop` says that it is time to stop.
    fn wait_for<T>(&self, messages: &Receiver<T>, stop: &Stop) -> Option<Result<T, RecvError>> {
        loop {
            select_biased! {
                recv(stop) -> _ => {
                    self.service.observer.on_stopping();
                    return None;
                }
                recv(self.ticks) -> _ => self.service.observer.on_alive(),
                recv(messages) -> message => return Some(message),
            }
        }
    }

    /// Opens a channel for each worker that waits for one.
    fn open_channels(&mut self, connection: &mut Connection) -> Result<(), Error> {
        let deadline = Deadline::after(ATTEMPT_TIMEOUT);
        while self.waiting > 0 {
            let channel = WorkerChannel::open(connection, self.service.config.prefetch, &deadline)?;
            let _ = self.channel_offers.send(channel); // fails if the workers have ended
            self.waiting -= 1;
        }
        Ok(())
    }

    /// A worker has lost its channel while the connection works: finds or declares the queue. Where
    /// that does not help, the worker tries again, after its pauses; the others go on.
    fn recover_queue(&mut self, connection: &mut Connection, error: Error) -> Result<(), Error> {
        let queue = &self.service.config.queue;
        match &error.kind {
            ErrorKind::ConsumerCancelled => {}
            ErrorKind::Refused(_) | ErrorKind::StreamQueue(_)
                if !self.service.has_consumed.is_completed() =>
            {
                return Err(error)
            }
            ErrorKind::ChannelClosed(_)
            | ErrorKind::ConsumerForgotten
            | ErrorKind::Refused(_)
            | ErrorKind::StreamQueue(_) => {
                log::warn!("{error}");
            }
            _ => return Ok(()), // the connection that it was about has ended
        }
        let deadline = Deadline::after(ATTEMPT_TIMEOUT);
        let declared = match queue::find_or_declare(connection, queue, self.queue_type, &deadline) {
            Ok(declared) => declared,
            Err(error) if error.ends_connection() => return Err(error),
            Err(error) => {
                log::warn!("{error}");
                return Ok(());
            }
        };
        match (&error.kind, declared) {
            (ErrorKind::ConsumerCancelled, None) => log::warn!(
                "{error} of queue '{queue}', which exists: it was declared again, or a request took longer than its consumer_timeout"
            ),
            (ErrorKind::ConsumerCancelled, Some(_)) => log::warn!("queue '{queue}' was deleted"),
            _ => {}
        }
        log::info!("{}", queue::describe(queue, declared));
        Ok(())
    }
}
