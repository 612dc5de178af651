//! A worker: a thread that answers one request after the other on a channel of its own.
//!
//! The channel comes from the supervisor: a worker that has none sends a [`Need`] with an inbox, consumes
//! on the [`Lease`] that comes back, answers by the [`Publisher`], and asks again when that has ended.

use crate::handler::{self, Handler};
use crate::isolated::{IsolatedReplies, Published};
use crate::kept::KeptReply;
use crate::signals::Stop;
use amiquip::{Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery, Publish, Return};
use crossbeam_channel::{bounded, never, select_biased, Receiver, RecvTimeoutError, Sender};
use rpc_common::broker::{self, Backoff};
use rpc_common::deadline::{Deadline, Watchdog};
use rpc_common::message::{encode_reply, escape, ErrorCode, Failure, Reply, Request};
use rpc_common::outbox::{Closed, Publisher};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};
use std::{mem, thread};

/// Timeout of a worker's synchronous broker calls.
pub(crate) const BROKER_CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a worker that prefetches looks what has come while it works.
const STAMPING: Duration = Duration::from_millis(100);

/// How many deliveries, and returned replies, may wait beside twice the prefetch: a quorum queue delivers anew what was
/// prefetched when it loses and finds the node that we are connected to.
const MOST_WAITING: usize = 64;

/// A **worker** takes requests from the queue for as long as it gets channels to do so.
///
/// It owns no connection; so one that computes is never waited for, and comes back when it is done.
pub(crate) struct Worker<'a> {
    pub(crate) queue: &'a str,
    pub(crate) prefetch: u16,
    pub(crate) handler: &'a Handler<'a>,
    pub(crate) stop: &'a Stop,
    /// Called by the first worker that consumes, before any request is begun.
    pub(crate) on_ready: &'a (dyn Fn() + Sync),
    pub(crate) ready: &'a Once,
    /// How many requests have expired in the hands of all workers.
    pub(crate) dropped: &'a AtomicU64,
    /// For the replies to requests that were delivered before.
    pub(crate) isolated: &'a IsolatedReplies,
    pub(crate) words: Sender<Word>,
}

/// What a worker tells the supervisor.
pub(crate) enum Word {
    /// It needs a channel.
    Needs(Need),
    /// It consumes.
    Consumes,
}

/// An **inbox** is where a worker gets a channel, and the publisher that answers there.
pub(crate) type Inbox = Sender<(Lease, Publisher)>;

/// A worker **needs** a channel.
pub(crate) struct Need {
    pub(crate) inbox: Inbox,
    pub(crate) because: Because,
}

/// Why a worker needs a channel.
pub(crate) enum Because {
    /// It has had none yet.
    Start,
    /// The broker cancelled its consumer: the queue was deleted.
    Cancelled,
    /// The broker closed its channel.
    ChannelClosed(amiquip::Error),
    /// The connection ended.
    Disconnected,
}

/// A **lease** is a channel, and what ends a wait on it. It closes its channel.
pub(crate) struct Lease {
    /// None once it is closed.
    channel: Option<Channel>,
    watchdog: Arc<Watchdog>,
}

impl Lease {
    pub(crate) fn new(channel: Channel, watchdog: Arc<Watchdog>) -> Self {
        Lease { channel: Some(channel), watchdog }
    }

    /// Runs a blocking call of amiquip; a broker that does not answer it in time loses us.
    fn within<T>(&self, call: impl FnOnce() -> amiquip::Result<T>) -> amiquip::Result<T> {
        let result = self.watchdog.guard(&Deadline::after(BROKER_CALL_TIMEOUT), call);
        result.unwrap_or(Err(amiquip::Error::EventLoopDropped))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.take() {
            let _ = self.within(|| channel.close()); // it may have ended already
        }
    }
}

/// When the deliveries that wait in a worker's hands have come, the first one first.
#[derive(Default)]
struct Arrivals(Mutex<VecDeque<Instant>>);

impl Arrivals {
    /// Takes note of how many wait: those that are new have come since the last time.
    fn stamp(&self, waiting: usize) {
        self.stamps().resize_with(waiting, Instant::now);
    }

    /// When the one that is taken now has come.
    fn next(&self) -> Instant {
        self.stamps().pop_front().unwrap_or_else(Instant::now)
    }

    fn stamps(&self) -> MutexGuard<'_, VecDeque<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a worker answers with.
struct Desk<'a> {
    lease: &'a Lease,
    channel: &'a Channel,
    publisher: &'a mut Publisher,
    kept: &'a mut KeptReply,
}

/// Where the reply to a request goes.
struct Caller<'a> {
    reply_to: &'a str,
    correlation_id: Option<&'a str>,
    /// The bytes of the correlation id, if it is not UTF-8 and was changed to be read.
    original_id: Option<&'a [u8]>,
}

impl Caller<'_> {
    fn message<'a>(&self, reply: &'a Reply) -> Publish<'a> {
        encode_reply(reply, self.reply_to, self.correlation_id)
    }
}

/// How it ends that a worker consumes.
enum End {
    Stopped,
    Cancelled,
}

impl Worker<'_> {
    /// Serves until it is stopped.
    pub(crate) fn run(&self) {
        let (mut because, mut kept) = (Because::Start, KeptReply::default());
        let mut backoff = Backoff::new();
        while let Some((lease, mut publisher)) = self.ask_for_channel(because) {
            because = match self.consume(&lease, &mut publisher, &mut kept) {
                Ok(End::Stopped) => return,
                Ok(End::Cancelled) => Because::Cancelled,
                Err(error @ amiquip::Error::ServerClosedChannel { .. }) => {
                    Because::ChannelClosed(error)
                }
                Err(_) => Because::Disconnected,
            };
            if self.stop.recv_timeout(backoff.next_pause()).is_err_and(|end| !end.is_timeout()) {
                return;
            }
        }
    }

    /// None when it is time to stop.
    fn ask_for_channel(&self, because: Because) -> Option<(Lease, Publisher)> {
        let (inbox, leases) = bounded(1);
        self.words.send(Word::Needs(Need { inbox, because })).ok()?;
        select_biased! {
            recv(self.stop) -> _ => None,
            recv(leases) -> lease => lease.ok(),
        }
    }

    fn consume(
        &self,
        lease: &Lease,
        publisher: &mut Publisher,
        kept: &mut KeptReply,
    ) -> amiquip::Result<End> {
        let Some(channel) = &lease.channel else { return Err(amiquip::Error::ClientClosedChannel) };
        let mut returns = channel.listen_for_returns()?;
        let most = match self.prefetch {
            0 => usize::MAX, // no limit was asked for
            prefetch => 2 * usize::from(prefetch) + MOST_WAITING,
        };
        publisher.limit_waiting(most, most);
        let consumer = lease.within(|| {
            channel.qos(0, self.prefetch, false)?; // per consumer: brokers of 4.3 refuse a global one
            channel.basic_consume(self.queue, ConsumerOptions::default())
        })?;
        self.ready.call_once(self.on_ready);
        let _ = self.words.send(Word::Consumes); // the supervisor may have stopped
        let (arrivals, waiting) = (Arrivals::default(), consumer.receiver().clone());
        let (end, ended) = bounded::<()>(0);
        thread::scope(|scope| {
            // With a prefetch of 1 nothing comes while it works.
            if self.prefetch != 1 {
                scope.spawn(|| {
                    while ended.recv_timeout(STAMPING) == Err(RecvTimeoutError::Timeout) {
                        arrivals.stamp(waiting.len());
                    }
                });
            }
            let _end = end; // dropped when serving ends
            let mut desk = Desk { lease, channel, publisher, kept };
            self.serve(&mut desk, &mut returns, consumer, &arrivals)
        })
    }

    fn serve(
        &self,
        desk: &mut Desk,
        returns: &mut Receiver<Return>,
        consumer: Consumer,
        arrivals: &Arrivals,
    ) -> amiquip::Result<End> {
        loop {
            arrivals.stamp(consumer.receiver().len());
            select_biased! {
                recv(self.stop) -> _ => {
                    drain(desk.lease, &consumer)?;
                    returns.try_iter().for_each(|reply| log_return(&reply));
                    return Ok(End::Stopped);
                }
                recv(returns) -> reply => match reply {
                    Ok(reply) => {
                        desk.publisher.take_return();
                        log_return(&reply);
                    }
                    Err(_) => *returns = never(), // the channel has ended: the consumer says how
                },
                recv(consumer.receiver()) -> got => {
                    let Some(delivery) = broker::delivery(got)? else {
                        mem::forget(consumer); // it would cancel itself once more, and wait for that
                        return Ok(End::Cancelled);
                    };
                    self.step(desk, &consumer, delivery, arrivals.next())?;
                }
            }
        }
    }

    /// Answers one request: the reply first and then the ack, in this order on one channel, so that
    /// a crash in between leaves the request in the queue or the reply delivered, or both.
    fn step(
        &self,
        desk: &mut Desk,
        consumer: &Consumer,
        delivery: Delivery,
        arrived: Instant,
    ) -> amiquip::Result<()> {
        let changes = desk.publisher.take_delivery(delivery.delivery_tag());
        let request = Request::decode(&delivery.properties, &delivery.body);
        let reply_to = match request.reply_to {
            Some(reply_to) if !changes.reply_to => reply_to,
            reply_to => {
                let is_changed = reply_to.is_some();
                let reason =
                    if is_changed { "its reply_to is not UTF-8" } else { "without a reply_to" };
                log::warn!(
                    "rejected a request that cannot be answered, {reason}: '{}'",
                    escape(request.body)
                );
                return consumer.reject(delivery, false);
            }
        };
        if request.expiration.is_some_and(|expiration| arrived.elapsed() >= expiration) {
            self.log_expired(&request);
            return consumer.reject(delivery, false);
        }
        let kept = desk.kept.take(&request);
        let mut reply = kept.unwrap_or_else(|| handler::call(self.handler, &request));
        if let Err(failure) = &reply {
            log::warn!("answered with an error: {}", escape(failure.message.as_bytes()));
        }
        let caller = Caller {
            reply_to,
            correlation_id: request.correlation_id,
            original_id: changes.correlation_id.as_deref(),
        };
        let mut is_published = false;
        if delivery.redelivered {
            match self.publish_isolated(&caller, &mut reply) {
                Published::Taken => is_published = true,
                Published::Refused(error) => {
                    log::warn!("rejected a request whose replies the broker refuses: {error}");
                    return consumer.reject(delivery, false);
                }
                Published::Unknown(error) => log::info!("{error}; answering without a check"),
            }
        }
        if !is_published {
            desk.publisher.publish_with_id(caller.message(&reply), caller.original_id);
        }
        desk.publisher.ack(delivery.delivery_tag());
        let sent = self.send(desk);
        if let Err(amiquip::Error::ServerClosedChannel { .. }) = sent {
            desk.kept.keep(&request, reply);
        }
        sent
    }

    fn log_expired(&self, request: &Request) {
        let count = self.dropped.fetch_add(1, Ordering::Relaxed) + 1;
        log::warn!(
            "dropped a request that expired in our hands, {count} in all (correlation id: {})",
            escape(request.correlation_id.unwrap_or("none").as_bytes())
        );
    }

    /// Publishes a reply where what the broker closes can have no other cause. If it refuses that, an error takes its
    /// place.
    fn publish_isolated(&self, caller: &Caller, reply: &mut Reply) -> Published {
        let error = match self.isolated.publish(caller.message(reply), caller.original_id) {
            Published::Refused(error) => error,
            published => return published,
        };
        log::warn!("the broker refused a reply, answering with an error: {error}");
        *reply = refusal();
        self.isolated.publish(caller.message(reply), caller.original_id)
    }

    /// Sends what the publisher holds.
    fn send(&self, desk: &mut Desk) -> amiquip::Result<()> {
        desk.publisher.send().or_else(|Closed| self.make_round_trip(desk)) // amiquip knows why
    }

    /// Any round trip on this channel tells whether it is still open.
    fn make_round_trip(&self, desk: &Desk) -> amiquip::Result<()> {
        desk.lease.within(|| desk.channel.qos(0, self.prefetch, false))
    }
}

/// Ends the deliveries. What was delivered but not begun goes back to the queue with the channel; and
/// the round trip takes our last ack with it, before the connection is closed.
fn drain(lease: &Lease, consumer: &Consumer) -> amiquip::Result<()> {
    lease.within(|| consumer.cancel())?;
    // amiquip confirms on two ways, one after the other, and ends the connection if nobody listens
    // on the second any more.
    let is_end = |message| matches!(message, ConsumerMessage::ClientCancelled);
    consumer.receiver().iter().any(is_end);
    Ok(())
}

/// The reply in the place of one that the broker refused.
fn refusal() -> Reply {
    let message = "internal error: the broker refused the answer, perhaps for its size".into();
    Err(Failure { code: ErrorCode::Internal, message })
}

pub(crate) fn log_return(reply: &Return) {
    let id = reply.properties.correlation_id().as_deref().unwrap_or("none");
    log::warn!(
        "the caller is gone: its queue '{}' does not exist any more (correlation id: {})",
        escape(reply.routing_key.as_bytes()),
        escape(id.as_bytes()),
    );
}
