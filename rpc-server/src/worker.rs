//! A worker: a thread that answers one request after the other on a channel of its own.

use crate::handler::{self, Handler};
use crate::signals::Stop;
use amiquip::{Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery, Return};
use crossbeam_channel::{bounded, select_biased, Receiver, Sender};
use rpc_common::message::{encode_reply, escape, Request};
use std::convert::Infallible;

/// A **worker** takes requests from the queue for as long as it gets channels to do so.
///
/// It owns no connection. When its channel ends it asks the supervisor for another one; so a worker
/// that computes is never waited for, and comes back when it is done.
pub(crate) struct Worker<'a> {
    pub(crate) queue: &'a str,
    pub(crate) prefetch: u16,
    pub(crate) handler: &'a Handler<'a>,
    pub(crate) stop: &'a Stop,
    /// Ends when all workers consume; no request is begun before that.
    pub(crate) ready: &'a Receiver<Infallible>,
    pub(crate) reports: Sender<Report>,
}

/// What a worker tells its supervisor.
pub(crate) enum Report {
    /// It waits for a channel to be sent to `inbox`.
    NeedsChannel { inbox: Sender<Channel>, because: Need },
    /// It consumes.
    Consumes,
}

/// Why a worker needs a channel.
pub(crate) enum Need {
    /// It has had none yet.
    Start,
    /// The broker cancelled its consumer: the queue was deleted.
    Cancelled,
    /// The broker closed its channel.
    ChannelClosed(amiquip::Error),
    /// The connection ended.
    Connection,
}

/// How it ends that a worker serves on a channel.
enum End {
    Stopped,
    Cancelled,
}

impl Worker<'_> {
    /// Serves until it is stopped.
    pub(crate) fn run(&self) {
        let mut because = Need::Start;
        while let Some(channel) = self.ask_for_channel(because) {
            because = match self.serve(&channel) {
                Ok(End::Stopped) => return,
                Ok(End::Cancelled) => Need::Cancelled,
                Err(error @ amiquip::Error::ServerClosedChannel { .. }) => {
                    Need::ChannelClosed(error)
                }
                Err(_) => Need::Connection,
            }
        }
    }

    /// None when it is time to stop.
    fn ask_for_channel(&self, because: Need) -> Option<Channel> {
        let (inbox, channels) = bounded(1);
        self.reports.send(Report::NeedsChannel { inbox, because }).ok()?;
        select_biased! {
            recv(self.stop) -> _ => None,
            recv(channels) -> channel => channel.ok(),
        }
    }

    fn serve(&self, channel: &Channel) -> amiquip::Result<End> {
        channel.qos(0, self.prefetch, false)?; // per consumer: brokers of 4.3 refuse a global one
        let returns = channel.listen_for_returns()?;
        let consumer = channel.basic_consume(self.queue, ConsumerOptions::default())?;
        let _ = self.reports.send(Report::Consumes);
        select_biased! {
            recv(self.stop) -> _ => {}
            recv(self.ready) -> _ => {}
        }
        loop {
            select_biased! {
                recv(self.stop) -> _ => {
                    drain(&consumer)?;
                    return Ok(End::Stopped);
                }
                recv(returns) -> reply => if let Ok(reply) = reply {
                    log_return(&reply);
                },
                recv(consumer.receiver()) -> message => match message {
                    Ok(ConsumerMessage::Delivery(delivery)) => self.step(channel, &consumer, delivery)?,
                    Ok(ConsumerMessage::ServerCancelled) => return Ok(End::Cancelled),
                    Ok(
                        ConsumerMessage::ServerClosedChannel(error)
                        | ConsumerMessage::ServerClosedConnection(error),
                    ) => return Err(error),
                    Ok(ConsumerMessage::ClientCancelled | ConsumerMessage::ClientClosedChannel) => {
                        return Err(amiquip::Error::ClientClosedChannel)
                    }
                    Ok(ConsumerMessage::ClientClosedConnection) => {
                        return Err(amiquip::Error::ClientClosedConnection)
                    }
                    Err(_) => return Err(amiquip::Error::EventLoopDropped),
                },
            }
        }
    }

    /// Answers one request: the reply first and then the ack, in this order on one channel, so that
    /// a crash in between leaves the request in the queue or the reply delivered, or both.
    fn step(
        &self,
        channel: &Channel,
        consumer: &Consumer,
        delivery: Delivery,
    ) -> amiquip::Result<()> {
        let request = Request::decode(&delivery.properties, &delivery.body);
        let Some(reply_to) = request.reply_to else {
            log::warn!(
                "rejected a request that cannot be answered, without a reply_to: '{}'",
                escape(request.body)
            );
            return consumer.reject(delivery, false);
        };
        let reply = handler::call(self.handler, &request);
        if let Err(failure) = &reply {
            log::warn!("answered with an error: {}", escape(failure.message.as_bytes()));
        }
        channel.basic_publish("", encode_reply(&reply, reply_to, request.correlation_id))?;
        consumer.ack(delivery)
    }
}

/// Ends the deliveries. What was delivered but not begun goes back to the queue with the channel; and
/// the round trip takes our last ack with it, before the connection is closed.
fn drain(consumer: &Consumer) -> amiquip::Result<()> {
    consumer.cancel()?;
    // amiquip confirms on two ways, one after the other, and ends the connection if nobody listens
    // on the second any more.
    let is_end = |message| matches!(message, ConsumerMessage::ClientCancelled);
    consumer.receiver().iter().any(is_end);
    Ok(())
}

fn log_return(reply: &Return) {
    let id = reply.properties.correlation_id().as_deref().unwrap_or("none");
    log::warn!(
        "the caller is gone: its queue '{}' does not exist any more (correlation id: {})",
        escape(reply.routing_key.as_bytes()),
        escape(id.as_bytes()),
    );
}
