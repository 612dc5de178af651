//! The loop: takes requests, sends them, waits for their answers, and connects again in between.

use crate::calls::{Call, Calls, Returned};
use crate::input::BadLine;
use crate::session::{RawReply, ReplyTo, Session, Wire};
use amiquip::{Channel, ConnectionBlockedNotification, Consumer, Return};
use crossbeam_channel::{
    bounded, never, select, Receiver, RecvError, RecvTimeoutError, TryRecvError,
};
use rpc_common::broker::{self, Backoff, Counts};
use rpc_common::deadline::{in_background, Deadline};
use rpc_common::duration;
use rpc_common::exit::{in_words, Exit, ExitCode};
use rpc_common::message::{decode_reply, escape, Failure};
use rpc_common::target::Brokers;
use std::fmt::{self, Display};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};
use std::{io, mem, thread};
use uuid::Uuid;

/// Reply code of AMQP 0-9-1: no permission. Asking again cannot help, and what was asked did not run.
const ACCESS_REFUSED: u16 = 403;

/// After how long a silence the request queue is looked at, and how often then.
const FIRST_LOOK: Duration = Duration::from_millis(500);
const NEXT_LOOK: Duration = Duration::from_secs(1);

/// How many round trips a look may take: three, with time to spare.
const LOOK: u32 = 10;
const SHORTEST_ROUND_TRIP: Duration = Duration::from_millis(20);

/// The shortest wait between two attempts to connect.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

/// How many replies are taken before anything else is looked at.
const AT_ONCE: usize = 64;

/// How many calls may be outstanding at once, if nothing else is said.
const IN_FLIGHT: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// How to call.
#[derive(Clone, Debug)]
pub struct Config {
    /// The brokers, tried in turn.
    pub brokers: Brokers,
    /// The request queue.
    pub queue: String,
    /// The limit of each call, connecting included.
    pub timeout: Duration,
    /// How many calls may be outstanding at once.
    pub in_flight: NonZeroUsize,
    /// Where replies go.
    pub reply_to: ReplyTo,
}

impl Config {
    /// Calls of up to 30 s, 64 at once, to `queue` of the broker that the environment names.
    ///
    /// # Errors
    /// [`broker::Error::Url`]
    pub fn new(queue: &str) -> Result<Self, broker::Error> {
        let brokers = Brokers::from_env()?;
        Ok(Config {
            brokers,
            queue: queue.into(),
            timeout: Duration::from_secs(30),
            in_flight: IN_FLIGHT,
            reply_to: ReplyTo::default(),
        })
    }
}

/// A **request** is what a call sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Whatever the caller knows it by; it stays here.
    pub tag: u64,
    /// What the function is applied to.
    pub body: Vec<u8>,
}

/// An **outcome** is how a call ended.
#[derive(Debug)]
pub struct Outcome {
    /// What was asked.
    pub request: Request,
    /// The correlation id of the call.
    pub correlation_id: Uuid,
    /// From the first publish to the end of the call; none if nothing was published.
    pub latency: Option<Duration>,
    /// The answer's body, or why there is none.
    pub result: Result<Vec<u8>, Error>,
}

/// A **client** makes calls; it connects with the first one and stays connected.
pub struct Client {
    config: Config,
    session: Option<Session>,
}

/// Takes the outcomes at hand, in the order in which they came.
pub type OnOutcomes<'a> = dyn FnMut(Vec<Outcome>) -> io::Result<()> + 'a;

impl Client {
    /// A client that has not connected yet.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Client { config, session: None }
    }

    /// Calls the function with `body` and waits for the answer's body.
    ///
    /// # Errors
    /// Any [`Error`] but [`Error::BadReply`] and [`Error::Output`].
    ///
    /// # Panics
    /// Never: a run gives every request its outcome, or an error.
    pub fn call(&mut self, body: &str) -> Result<Vec<u8>, Error> {
        let (requests, taken) = bounded(1);
        let _ = requests.send(Request { tag: 0, body: body.into() }); // there is room for it
        drop(requests);
        let mut result = None;
        self.run(&taken, &mut |outcomes| {
            result = outcomes.into_iter().next().map(|outcome| outcome.result);
            Ok(())
        })?;
        result.expect("a run gives every request its outcome")
    }

    /// Makes a call of every request until `requests` ends, and tells `on_outcomes` how each ended.
    ///
    /// Calls that are unanswered when a connection breaks are sent again on the next one, under the
    /// same correlation id, until their deadline.
    ///
    /// # Errors
    /// [`Error::Broker`] or [`Error::Unheard`] when the broker is not to be had: it is the outcome of what is
    /// unanswered, too, and requests that were not taken stay. [`Error::Output`] when `on_outcomes` fails.
    pub fn run(
        &mut self,
        requests: &Receiver<Request>,
        on_outcomes: &mut OnOutcomes,
    ) -> Result<(), Error> {
        let Client { config, session } = self;
        let mut run = Run {
            config,
            requests,
            brokers: config.brokers.clone(),
            refused: 0,
            broker: session.as_ref().map(|session| session.wire.broker()),
            more_requests: true,
            calls: Calls::default(),
            outcomes: Vec::new(),
            look_at: Instant::now() + FIRST_LOOK,
            known: Known::Nothing,
            warned: false,
            discarded: 0,
            on_outcomes,
        };
        let mut backoff = Backoff::new();
        while run.await_call() {
            let opens = session.is_none();
            let (error, unheard) = match run.attempt(session) {
                Ok(()) => break,
                Err(Error::Broker(error)) => (error, false),
                Err(Error::Unheard(error)) => (error, true),
                Err(error) => return Err(error),
            };
            run.tell()?;
            run.known.breaks(&error);
            if unheard || run.is_final(&error, opens) {
                let wrap = if unheard { Error::Unheard } else { Error::Broker };
                while let Some(call) = run.calls.pop() {
                    run.end(call, Err(wrap(error.clone())));
                }
                run.tell()?;
                return Err(wrap(error));
            }
            log::info!("{error}: connecting again");
            if !run.calls.is_empty() {
                // Half of the time that is left, so that the other half is there to connect in.
                let pause = backoff.next_pause().min(until(run.next_deadline().instant()) / 2);
                thread::sleep(pause.max(SHORTEST_PAUSE));
            }
            if run.calls.any_sent() {
                run.expire(); // else the next attempt says why nothing was sent
            }
            run.tell()?;
        }
        Ok(())
    }
}

/// A **run** is what outlives the sessions on which its calls are made.
struct Run<'a> {
    config: &'a Config,
    requests: &'a Receiver<Request>,
    /// The one that was connected last comes first.
    brokers: Brokers,
    /// How often in a row our credentials were refused.
    refused: u32,
    /// Host and port of the broker that was connected last; none before the first connection.
    broker: Option<String>,
    /// False once `requests` has ended.
    more_requests: bool,
    calls: Calls,
    /// Outcomes that have not been told yet.
    outcomes: Vec<Outcome>,
    /// When to look at the request queue, if nothing comes until then.
    look_at: Instant,
    /// Why there may be no answer, as far as is known.
    known: Known,
    /// Whether it was said that nobody serves.
    warned: bool,
    /// How many replies came late, or twice.
    discarded: u64,
    on_outcomes: &'a mut OnOutcomes<'a>,
}

impl Run<'_> {
    /// Waits until there is a call in hand, and begins it if need be; false when there will be none.
    fn await_call(&mut self) -> bool {
        if self.calls.is_empty() && self.more_requests {
            match self.requests.recv() {
                Ok(request) => {
                    self.begin(request);
                }
                Err(_) => self.more_requests = false,
            }
        }
        !self.calls.is_empty()
    }

    fn begin(&mut self, request: Request) -> &mut Call {
        self.calls.begin(Uuid::new_v4(), request, Deadline::after(self.config.timeout))
    }

    /// Makes calls on the session at hand or on a new one. It stays at hand if it lasts.
    fn attempt(&mut self, at_hand: &mut Option<Session>) -> Result<(), Error> {
        let mut session = match at_hand.take() {
            Some(session) => session,
            None => self.open_session()?,
        };
        let ended = self.converse(&mut session);
        if ended.is_ok() {
            *at_hand = Some(session);
        } else {
            // What has been received is not received again.
            session.wire.replies_at_hand().for_each(|reply| self.on_reply(reply));
            let broker = self.broker();
            session.wire.notices.try_iter().for_each(|notice| self.known.changes(&broker, notice));
        }
        ended
    }

    /// Opens a session within the latest deadline; what runs out of time earlier is told meanwhile.
    fn open_session(&mut self) -> Result<Session, Error> {
        let latest = self.calls.last_deadline().unwrap_or_else(|| self.next_deadline());
        let (brokers, reply_to) = (self.brokers.clone(), self.config.reply_to);
        let in_flight = self.config.in_flight.get();
        let open = move || Session::open(&brokers, reply_to, in_flight, &latest);
        let is_last = |run: &Self| run.next_deadline().instant() >= latest.instant();
        let session = if is_last(self) {
            open()? // as for a single call, which is spared the thread
        } else {
            let opening = in_background(open);
            loop {
                let opened = if is_last(self) {
                    opening.recv().map_err(|_| RecvTimeoutError::Disconnected)
                } else {
                    opening.recv_deadline(self.next_deadline().instant())
                };
                match opened {
                    Err(RecvTimeoutError::Timeout) => {
                        self.expire();
                        self.tell()?;
                    }
                    opened => break opened.expect("opening a session does not panic")?,
                }
            }
        };
        let broker = session.wire.broker();
        log::info!("connected to {broker}");
        self.brokers.begin_with(&broker);
        self.broker = Some(broker);
        self.refused = 0;
        Ok(session)
    }

    /// Whether an error ends the run. While no call in hand was sent, one that keeps us from connecting
    /// does: at once if we never were connected, else when the time is up. When a call was sent, which
    /// may have run, only a refusal does.
    fn is_final(&mut self, error: &broker::Error, opened: bool) -> bool {
        let nothing_sent = opened && !self.calls.is_empty() && !self.calls.any_sent();
        let hopeless = self.broker.is_none()
            || (!error.is_transient() && !self.may_be_shutting_down(error))
            || self.next_deadline().remaining() <= SHORTEST_PAUSE;
        (nothing_sent && hopeless)
            || matches!(error, broker::Error::Refused { code: ACCESS_REFUSED, .. })
    }

    /// A broker that shuts down in the handshake looks as if it refused our credentials: once.
    fn may_be_shutting_down(&mut self, error: &broker::Error) -> bool {
        self.refused += 1;
        matches!(error, broker::Error::Credentials { .. }) && self.refused == 1
    }

    fn broker(&self) -> String {
        self.broker.clone().unwrap_or_default()
    }

    fn next_deadline(&self) -> Deadline {
        self.calls.next_deadline().unwrap_or_else(|| Deadline::after(self.config.timeout))
    }

    /// Makes calls on one session, until every request has its outcome or the session ends.
    fn converse(&mut self, session: &mut Session) -> Result<(), Error> {
        let Session { wire, channel } = session;
        let mut consumer = None;
        let ended = self.talk(wire, channel, &mut consumer);
        if ended.is_ok() {
            mem::forget(consumer); // the session lasts, and its replies with it
        } else {
            wire.hang_up();
        }
        ended
    }

    /// Sends the calls that have begun and then, as there is room, those that are still to come; and
    /// receives what comes back.
    fn talk<'a>(
        &mut self,
        wire: &mut Wire,
        channel: &'a Channel,
        consumer: &mut Option<Consumer<'a>>,
    ) -> Result<(), Error> {
        let (queue, broker) = (&self.config.queue, self.broker());
        wire.close_by(&self.next_deadline());
        self.known = Known::Nothing; // what kept the last session from working is over
        self.take_replies(wire)?; // a session that was at hand may have ended meanwhile
        if wire.is_direct() {
            *consumer = wire.consume(channel, &self.next_deadline(), |_| {})?;
        }
        for call in self.calls.outgoing() {
            wire.publish(channel, queue, call)?;
        }
        let deadline = self.next_deadline();
        let on_notice = |notice| self.known.changes(&broker, notice);
        match wire.consume(channel, &deadline, on_notice) {
            Err(error) if wire.is_unheard(&error, &deadline) => return Err(Error::Unheard(error)),
            started => *consumer = started?.or(consumer.take()),
        }
        self.look_at = Instant::now() + FIRST_LOOK;
        let no_requests = never();
        while self.more_requests || !self.calls.is_empty() {
            wire.flush();
            if let Some(deadline) = self.calls.next_deadline() {
                wire.close_by(&deadline); // should the session end now, a silent broker delays no call
            }
            let requests = if self.has_room() { self.requests } else { &no_requests };
            let mut patience = self.patience();
            if patience.is_zero() {
                self.tick(wire, channel)?; // the time does not wait for a peer that never stops sending
                patience = self.patience();
            }
            // Outcomes pile up while more are at hand; then nothing is waited for, and a tick tells them.
            if !self.outcomes.is_empty() {
                patience = Duration::ZERO;
            }
            select! {
                recv(wire.replies) -> got => {
                    self.on_reply(wire.reply(got)?);
                    self.take_replies(wire)?;
                }
                recv(wire.returns) -> request => {
                    if let Ok(request) = request {
                        wire.take_return();
                        self.on_return(&request);
                    }
                }
                recv(wire.notices) -> notice => match notice {
                    Ok(notice) => self.known.changes(&broker, notice),
                    Err(_) => wire.notices = never(), // why, the replies tell
                },
                recv(requests) -> request => match request {
                    Ok(request) => {
                        wire.publish(channel, queue, self.begin(request))?;
                        while self.has_room() {
                            let Ok(request) = self.requests.try_recv() else { break };
                            wire.publish(channel, queue, self.begin(request))?;
                        }
                    }
                    Err(_) => self.more_requests = false,
                },
                default(patience) => self.tick(wire, channel)?,
            }
        }
        self.tell()
    }

    /// Takes the replies at hand, or learns of the session's end.
    fn take_replies(&mut self, wire: &mut Wire) -> Result<(), Error> {
        for _ in 0..AT_ONCE {
            let got = match wire.replies.try_recv() {
                Ok(got) => Ok(got),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => Err(RecvError),
            };
            self.on_reply(wire.reply(got)?);
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.more_requests && self.calls.len() < self.config.in_flight.get()
    }

    /// Does what the time asks for, and tells the outcomes that have piled up.
    fn tick(&mut self, wire: &mut Wire, channel: &Channel) -> Result<(), Error> {
        self.expire();
        self.tell()?;
        let now = Instant::now();
        while let Some(call) = self.calls.resend_due(now) {
            wire.publish(channel, &self.config.queue, call)?;
        }
        wire.flush();
        if !self.calls.is_empty() && now >= self.look_at {
            self.look(wire)?;
        }
        Ok(())
    }

    /// Nothing has come for a while: looks why, for the user to know.
    fn look(&mut self, wire: &mut Wire) -> Result<(), Error> {
        self.look_at = Instant::now() + NEXT_LOOK;
        // A look that is cut off at the deadline of one call would cost the others their connection.
        let long = wire.round_trip.max(SHORTEST_ROUND_TRIP) * LOOK;
        let takes_too_long = self.next_deadline().remaining() < long;
        if takes_too_long || matches!(self.known, Known::Blocked(_)) {
            return Ok(()); // a broker that is blocked reads nothing of ours
        }
        let Some(seen) = wire.look(&self.config.queue, &self.next_deadline())? else {
            self.known = Known::Nothing;
            return Ok(());
        };
        self.known = Known::Queue(seen);
        if seen.consumers == 0 && !self.warned {
            let (queue, limit) = (&self.config.queue, duration::display(self.config.timeout));
            log::warn!("no server is consuming '{queue}'; waiting up to {limit}");
            self.warned = true;
        }
        Ok(())
    }

    fn on_reply(&mut self, (properties, body): RawReply) {
        self.look_at = Instant::now() + FIRST_LOOK;
        if let Some(call) = self.calls.on_reply(properties.correlation_id().as_deref()) {
            self.end(call, decode_reply(&properties, body).map_err(Error::Remote));
        } else {
            self.discarded += 1;
            log::info!("discarded a reply to no call in hand, {} in all", self.discarded);
        }
    }

    fn on_return(&mut self, request: &Return) {
        let id = request.properties.correlation_id().as_deref();
        let (queue, target) = (self.config.queue.clone(), self.broker());
        let error = Error::NoServer { queue, target };
        match self.calls.on_return(id, Instant::now()) {
            Some(Returned::Ended(call)) => self.end(call, Err(error)),
            Some(Returned::SentAgain) => log::info!("{error} sending again"),
            None => {}
        }
    }

    /// How long nothing has to happen.
    fn patience(&self) -> Duration {
        let look = |event: Instant| until(event.min(self.look_at));
        self.calls.next_event().map_or(Duration::MAX, look)
    }

    /// Ends the calls that have run out of time.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(call) = self.calls.expire(now) {
            let (queue, target) = (self.config.queue.clone(), self.broker());
            let limit = call.deadline.to_string();
            self.end(
                call,
                Err(Error::NoAnswer { queue, target, limit, known: self.known.clone() }),
            );
        }
    }

    fn end(&mut self, call: Call, result: Result<Vec<u8>, Error>) {
        let (request, correlation_id) = (call.request, call.id);
        let latency = call.first_sent.map(|first_sent| first_sent.elapsed());
        self.outcomes.push(Outcome { request, correlation_id, latency, result });
    }

    fn tell(&mut self) -> Result<(), Error> {
        if self.outcomes.is_empty() {
            return Ok(());
        }
        (self.on_outcomes)(mem::take(&mut self.outcomes)).map_err(Error::Output)
    }
}

fn until(instant: Instant) -> Duration {
    instant.saturating_duration_since(Instant::now())
}

/// What is **known** of why there is no answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Known {
    /// Nothing.
    #[default]
    Nothing,
    /// The request queue as it was last seen.
    Queue(Counts),
    /// The broker takes no requests, and says why: it is short of memory or disk space.
    Blocked(String),
    /// There is no connection any more, and why.
    Broken(String),
}

impl Known {
    /// The broker takes no requests any more, or does again.
    fn changes(&mut self, broker: &str, notice: ConnectionBlockedNotification) {
        *self = match notice {
            ConnectionBlockedNotification::Blocked(reason) => {
                let reason = escape(reason.as_bytes()).to_string();
                log::warn!("{broker} takes no requests: {reason}; waiting");
                Known::Blocked(reason)
            }
            ConnectionBlockedNotification::Unblocked => {
                log::info!("{broker} takes requests again");
                Known::Nothing
            }
        };
    }

    /// The connection ended. Where the broker reads nothing, that it did not answer explains nothing.
    fn breaks(&mut self, error: &broker::Error) {
        *self = match error {
            broker::Error::TimedOut { .. }
                if matches!(self, Known::Blocked(_) | Known::Queue(_)) =>
            {
                return
            }
            broker::Error::TimedOut { phase, .. } => Known::Broken(format!("timed out in {phase}")),
            error => Known::Broken(error.to_string()),
        };
    }
}

impl Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Known::Nothing => f.write_str("is rpc-server running, or busy?"),
            Known::Queue(Counts { messages, consumers }) => {
                let s = |count: &u32| if *count == 1 { "" } else { "s" };
                let (one, two) = (s(consumers), s(messages));
                write!(
                    f,
                    "the queue had {consumers} consumer{one} and {messages} message{two} waiting"
                )
            }
            Known::Blocked(reason) => write!(f, "the broker takes no requests: {reason}"),
            Known::Broken(reason) => f.write_str(reason),
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker is not to be had: the call was not sent, or refused.
    #[error(transparent)]
    Broker(#[from] broker::Error),
    /// The broker took the request and refuses us its answer.
    #[error(transparent)]
    Unheard(broker::Error),
    /// The request queue does not exist: nothing ran.
    #[error("no queue '{queue}' on {target}: is rpc-server running?")]
    NoServer {
        /// The request queue.
        queue: String,
        /// Host and port of the broker.
        target: String,
    },
    /// The deadline passed: the function may or may not have run.
    #[error("no answer from '{queue}' on {target} within {limit}: {known}")]
    NoAnswer {
        /// The request queue.
        queue: String,
        /// Host and port of the broker.
        target: String,
        /// The limit.
        limit: String,
        /// What is known of why.
        known: Known,
    },
    /// The server answered with an error.
    #[error("{}", escape(.0.message.as_bytes()))]
    Remote(Failure),
    /// The server answered with what is no answer.
    #[error("bad reply: '{reply}' is {reason}: does another program serve this queue?")]
    BadReply {
        /// What came, fit to be printed.
        reply: String,
        /// Why it is no answer.
        reason: &'static str,
    },
    /// Options that do not go together.
    #[error("{0}: try --help")]
    Usage(&'static str),
    /// A line of input is no number.
    #[error(transparent)]
    BadLine(#[from] BadLine),
    /// The input could not be read.
    #[error("cannot read standard input: {}", in_words(.0))]
    Input(io::Error),
    /// The answers could not be written.
    #[error("cannot write to standard output: {}", in_words(.0))]
    Output(io::Error),
}

/// The codes of calls that no server answered.
const OWN_CODES: [&str; 6] =
    ["unreachable", "no-server", "timeout", "bad-reply", "usage", "output"];

impl Error {
    /// The error's code for programs: the server's, or one of ours. A server that uses one of ours gets `internal`.
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            Error::Remote(failure) if OWN_CODES.contains(&failure.code.as_str()) => "internal",
            Error::Broker(_) | Error::Unheard(_) => "unreachable",
            Error::NoServer { .. } => "no-server",
            Error::NoAnswer { .. } => "timeout",
            Error::Remote(failure) => failure.code.as_str(),
            Error::BadReply { .. } => "bad-reply",
            Error::Usage(_) | Error::BadLine(_) | Error::Input(_) => "usage",
            Error::Output(_) => "output",
        }
    }
}

impl Exit for Error {
    fn exit_code(&self) -> ExitCode {
        match self {
            Error::Broker(error) => error.exit_code(),
            Error::NoServer { .. } => ExitCode::NoServer,
            Error::NoAnswer { .. } | Error::Unheard(_) => ExitCode::NoAnswer,
            Error::Remote(_) | Error::BadReply { .. } => ExitCode::RemoteError,
            Error::Usage(_) | Error::BadLine(_) | Error::Input(_) => ExitCode::Usage,
            Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                ExitCode::BrokenPipe
            }
            Error::Output(_) => ExitCode::Output,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_cannot_use_the_clients_own_codes() {
        let code = |code: &str| {
            let failure = Failure { code: code.into(), message: "no".into() };
            Error::Remote(failure).code().to_owned()
        };
        assert_eq!([code("quota"), code("out-of-range")], ["quota", "out-of-range"]);
        assert_eq!([code("unreachable"), code("timeout")], ["internal", "internal"]);
    }
}
