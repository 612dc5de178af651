//! Open channels, and the one way to publish.
//!
//! Messages and acknowledgements do not pass through amiquip: a publisher writes their frames, on
//! the caller's thread, and the thread that drives the link puts those of the broker into the
//! channel's inbox.
//!
//! Three rules keep this apart from amiquip's writes. Whole frames are written, one caller at a
//! time. On a channel that has a publisher nothing else publishes, so that the frames of two
//! messages are never mixed. Nothing is written on a channel that the broker has closed: the broker
//! would close the connection.

use super::deadline::Deadline;
use super::error::{Error, ErrorKind};
use super::frames::{put_message, put_method};
use super::inbox::{Arrived, Inbox, Message};
use super::link::Link;
use super::phase::Phase;
use super::queue_stats::QueueStats;
use crate::encoding::put_short_string;
use crate::message::Publish;
use crate::sync::lock;
use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum size of the buffer that a publisher keeps for its next frames, in bytes.
const MAX_KEPT: usize = 64 << 10;

/// Class and method of `queue.declare`.
const QUEUE_DECLARE: (u16, u16) = (50, 10);

/// Class and method of `basic.ack`.
const BASIC_ACK: (u16, u16) = (60, 80);

/// Class and method of `basic.reject`.
const BASIC_REJECT: (u16, u16) = (60, 90);

/// Class and method of `basic.nack`.
const BASIC_NACK: (u16, u16) = (60, 120);

/// Class and method of `confirm.select`.
const CONFIRM_SELECT: (u16, u16) = (85, 10);

/// An open channel. A [`Publisher`] publishes and acknowledges on it.
pub struct OpenChannel {
    /// amiquip's channel, for everything but messages.
    pub amqp: amiquip::Channel,
    /// The messages and confirmations of the channel.
    pub inbox: ChannelInbox,
    link: Arc<Link>,
    /// Host and port of the broker, for errors.
    address: String,
}

/// The inbox of a channel: its messages, confirmations, and its end.
#[derive(Clone)]
pub struct ChannelInbox {
    inbox: Arc<Inbox>,
    link: Arc<Link>,
}

/// Who drives the link while a thread waits for an inbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driving {
    /// The thread that waits, in place of the standby thread. There may be one such thread.
    WaitingThread,
    /// The standby thread.
    Standby,
}

impl OpenChannel {
    pub(crate) fn new(
        link: Arc<Link>,
        address: &str,
        amqp: amiquip::Channel,
        max_unread: usize,
    ) -> (Self, Publisher) {
        let channel = amqp.channel_id();
        let inbox = link.open_inbox(channel, max_unread);
        let publisher = Publisher {
            link: link.clone(),
            inbox: inbox.clone(),
            channel,
            frames: RefCell::new(Vec::new()),
        };
        let inbox = ChannelInbox {
            inbox,
            link: link.clone(),
        };
        (
            OpenChannel {
                amqp,
                inbox,
                link,
                address: address.to_owned(),
            },
            publisher,
        )
    }

    /// Runs a blocking call of amiquip. `phase` names the call in the error of a timeout.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when the deadline passes; then the connection has ended. Else the
    /// call's error.
    pub fn run_blocking<'a, T>(
        &'a self,
        deadline: &Deadline,
        phase: Phase,
        call: impl FnOnce(&'a amiquip::Channel) -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        let result = self.link.run_blocking(deadline, phase, || call(&self.amqp));
        result.map_err(|kind| Error::new(&self.address, kind))
    }

    /// The numbers of a queue, by a passive declaration on this channel: if there is no such queue,
    /// the broker closes the channel.
    ///
    /// # Errors
    /// [`ErrorKind::ChannelClosed`] with code 404 if there is no such queue; else as
    /// [`run_blocking`](Self::run_blocking).
    pub fn queue_stats(&self, queue: &str, deadline: &Deadline) -> Result<QueueStats, Error> {
        self.run_blocking(deadline, Phase::QueueStats, |amqp| {
            QueueStats::ask(amqp, queue)
        })
    }

    /// Waits until the broker has taken what was sent, as long as it takes some within each
    /// `timeout`.
    pub fn drain(&self, timeout: Duration) {
        self.link.drain(timeout);
    }

    /// Closes the channel.
    ///
    /// # Errors
    /// As [`run_blocking`](Self::run_blocking).
    pub fn close(self, deadline: &Deadline) -> Result<(), Error> {
        let OpenChannel {
            amqp,
            link,
            address,
            ..
        } = self;
        link.run_blocking(deadline, Phase::ClosingChannel, || amqp.close())
            .map_err(|kind| Error::new(&address, kind))
    }
}

impl ChannelInbox {
    /// Waits until something arrives, until this instant, or until `is_ready`. To ask again whether
    /// it is, use [`Link::wake_all`].
    pub fn wait(&self, driving: Driving, until: Instant, is_ready: &dyn Fn() -> bool) {
        match driving {
            Driving::WaitingThread => self
                .link
                .drive_until(until, &|| self.inbox.has_arrived() || is_ready()),
            Driving::Standby => self.inbox.wait(until, is_ready),
        }
    }

    /// Whether something can be taken.
    pub fn has_arrived(&self) -> bool {
        self.inbox.has_arrived()
    }

    /// Takes the next message.
    pub fn take_message(&self) -> Option<Message> {
        self.inbox.take_message()
    }

    /// Takes all that has arrived.
    pub fn take(&self) -> Arrived {
        self.inbox.take()
    }

    /// The end of the consumer, the channel or the connection, if one of them has ended.
    pub fn ended(&self) -> Option<ErrorKind> {
        self.inbox.ended()
    }
}

/// A **publisher** publishes and acknowledges on one channel, without waiting for the broker. It
/// buffers frames until [`flush`](Self::flush).
pub struct Publisher {
    link: Arc<Link>,
    inbox: Arc<Inbox>,
    channel: u16,
    /// The frames that [`flush`](Self::flush) writes.
    frames: RefCell<Vec<u8>>,
}

/// A message that cannot be published: its properties do not fit into a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its properties and headers take {size} bytes, and a frame holds {max}")]
pub struct HeaderTooLarge {
    /// The size of the frame that they need, in bytes.
    pub size: usize,
    /// The negotiated size of frames.
    pub max: usize,
}

impl Publisher {
    /// Puts the channel into confirm mode, without waiting for an answer: the broker then numbers
    /// the messages that are published on it, from 1, and confirms or refuses each of them.
    pub fn select_confirms(&self) {
        let no_wait = 1;
        self.inbox.has_confirms.store(true, Ordering::Relaxed); // before the broker can send any
        self.put_method(CONFIRM_SELECT, |to| to.push(no_wait));
    }

    /// Adds the declaration of an exclusive queue, without waiting for an answer: if it fails, the
    /// broker closes the channel. The name has at most 255 bytes.
    pub fn declare_exclusive_queue(&self, name: &str) {
        let exclusive = 1 << 2;
        let no_wait = 1 << 4;
        self.put_method(QUEUE_DECLARE, |to| {
            to.extend_from_slice(&[0; 2]); // reserved
            put_short_string(to, name.as_bytes());
            to.push(exclusive | no_wait);
            to.extend_from_slice(&[0; 4]); // no arguments
        });
    }

    /// Adds a message to the default exchange. [`flush`](Self::flush) writes it.
    ///
    /// # Errors
    /// [`HeaderTooLarge`]; then nothing is added.
    pub fn add_message(&self, message: &Publish) -> Result<(), HeaderTooLarge> {
        let max = self.link.frame_max();
        let mut frames = self.frames.borrow_mut();
        put_message(&mut frames, self.channel, message, max)
            .map_err(|size| HeaderTooLarge { size, max })
    }

    /// Adds the acknowledgement of a delivery.
    pub fn ack(&self, delivery_tag: u64) {
        self.put_method(BASIC_ACK, |to| put_tag(to, delivery_tag, 0));
    }

    /// Adds the rejection of a delivery: it leaves the queue, for a dead-letter exchange if there
    /// is one.
    pub fn reject(&self, delivery_tag: u64) {
        self.put_method(BASIC_REJECT, |to| put_tag(to, delivery_tag, 0));
    }

    /// Adds that a delivery goes back to the queue.
    pub fn requeue(&self, delivery_tag: u64) {
        let requeue = 1;
        self.put_method(BASIC_REJECT, |to| put_tag(to, delivery_tag, requeue));
    }

    /// Adds that all unacknowledged deliveries go back to the queue.
    pub fn requeue_all(&self) {
        let all = 0;
        let multiple = 1;
        let requeue = 1 << 1;
        self.put_method(BASIC_NACK, |to| put_tag(to, all, multiple | requeue));
    }

    fn put_method(&self, method: (u16, u16), put: impl FnOnce(&mut Vec<u8>)) {
        put_method(&mut self.frames.borrow_mut(), self.channel, method, put);
    }

    /// Number of bytes that wait for [`flush`](Self::flush).
    pub fn buffered(&self) -> usize {
        self.frames.borrow().len()
    }

    /// Whether the broker does not take what we send at once.
    pub fn has_backlog(&self) -> bool {
        self.link.has_backlog()
    }

    /// Writes what was added, in one piece.
    ///
    /// # Errors
    /// The end of the channel or the connection; then nothing is written.
    pub fn flush(&self) -> Result<(), ErrorKind> {
        let mut frames = self.frames.borrow_mut();
        if frames.is_empty() {
            return Ok(());
        }
        let is_open = lock(&self.inbox.is_open);
        let written = if *is_open {
            self.link.write(&frames)
        } else {
            Err(self.end())
        };
        frames.clear();
        frames.shrink_to(MAX_KEPT);
        written
    }

    fn end(&self) -> ErrorKind {
        let cause = self
            .inbox
            .ended()
            .filter(|end| *end != ErrorKind::ConsumerCancelled)
            .or_else(|| self.link.cause());
        cause.unwrap_or_else(|| ErrorKind::ConnectionLost("it has ended".into()))
    }
}

fn put_tag(to: &mut Vec<u8>, delivery_tag: u64, bits: u8) {
    to.extend_from_slice(&delivery_tag.to_be_bytes());
    to.push(bits);
}
