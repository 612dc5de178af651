//! Channels: what the stream below amiquip knows about them, and the one way to publish.
//!
//! Frames are written on the caller's thread, past amiquip's I/O thread. With amiquip's own `basic_publish`, a publish is
//! three messages to that thread and an ack a fourth. Measured, a server spent half of its time on that: writing the
//! frames here took it from 0.79 to 0.94 of the C client's speed.
//!
//! Three rules keep this apart from amiquip's writes. Whole frames are written, one caller at a time ([`FrameWriter`]).
//! On a channel that has a publisher nothing else publishes, so that the frames of two messages are never mixed.
//! Nothing is written on a channel that the broker has closed: the broker would close the connection.

use super::sanitize::{correlation_id_range, Changes};
use super::writer::FrameWriter;
use crate::sync::lock;
use amiquip::{Channel, Confirm, Consumer, ConsumerMessage, ConsumerOptions, FieldTable, Publish, Return};
use amq_protocol::frame::generation::{gen_content_body_frame, gen_content_header_frame, gen_method_frame};
use amq_protocol::protocol::{basic, connection, queue, AMQPClass};
use crossbeam_channel::Receiver;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// The AMQP class that messages belong to.
const CLASS_BASIC: u16 = 60;

/// A frame's size without its payload (AMQP 0-9-1, 4.2.3), and the payload of the smallest frame that every peer must
/// accept (`frame-min-size`): amiquip does not tell the negotiated size.
const FRAME_OVERHEAD: usize = 8;
const MAX_PAYLOAD: usize = 4096 - FRAME_OVERHEAD;

/// More space than most frames need, and the largest buffer that a publisher keeps for its next frames, in bytes.
const FRAME_SPACE: usize = 512;
const MAX_KEPT: usize = 64 << 10;

/// An open channel. Its [`Publisher`] publishes and acknowledges on it.
pub struct OpenChannel {
    /// amiquip's channel, for everything but publishing, acknowledging and consuming.
    pub amqp: Channel,
    /// Published messages that the broker could not route to a queue.
    pub returns: Receiver<Return>,
    /// Which published messages the broker has taken; see [`Connection::enable_confirms`](super::Connection::enable_confirms).
    pub confirms: Receiver<Confirm>,
    pub(crate) state: Arc<ChannelState>,
}

impl OpenChannel {
    /// Starts the channel's consumer; there can be one. Blocks: see [`Connection::call`](super::Connection::call).
    ///
    /// # Errors
    /// How the channel or the connection ended.
    pub fn consume(&self, queue: &str, options: ConsumerOptions) -> amiquip::Result<Consumer<'_>> {
        let consumer = self.amqp.basic_consume(queue, options)?;
        let _ = self.state.deliveries.set(consumer.receiver().clone());
        Ok(consumer)
    }

    /// Whether the broker has cancelled the consumer, even if its receiver has unread deliveries before that.
    pub fn is_cancelled(&self) -> bool {
        self.state.is_cancelled.load(Ordering::Relaxed)
    }

    /// Takes what was changed in a delivery to make it readable.
    pub fn take_changes(&self, delivery_tag: u64) -> Changes {
        lock(&self.state.changes).remove(&delivery_tag).unwrap_or_default()
    }
}

/// A **publisher** publishes and acknowledges on one channel, without waiting for the broker. It buffers what it is given
/// until [`flush`](Self::flush).
pub struct Publisher {
    writer: Arc<FrameWriter>,
    state: Arc<ChannelState>,
    channel: u16,
    /// The frames that [`flush`](Self::flush) writes.
    frames: RefCell<Vec<u8>>,
}

/// The broker has closed the channel; only amiquip knows why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelClosed;

impl Publisher {
    pub(crate) fn new(writer: Arc<FrameWriter>, state: Arc<ChannelState>, channel: u16) -> Self {
        Publisher { writer, state, channel, frames: RefCell::default() }
    }

    /// Adds the declaration of an exclusive queue, without waiting for an answer: if it fails, the broker closes the
    /// channel.
    pub fn declare_exclusive_queue(&self, name: &str) {
        self.add_method(&AMQPClass::Queue(queue::AMQPMethod::Declare(queue::Declare {
            ticket: 0,
            queue: name.into(),
            passive: false,
            durable: false,
            exclusive: true,
            auto_delete: false,
            nowait: true,
            arguments: FieldTable::new(),
        })));
    }

    /// Adds a message to the default exchange. If `correlation_id` is given, these bytes replace the message's own
    /// correlation id, which must have the same length: amiquip's is a string, and cannot hold every id of a peer.
    pub fn publish(&self, message: Publish, correlation_id: Option<&[u8]>) {
        self.add_method(&AMQPClass::Basic(basic::AMQPMethod::Publish(basic::Publish {
            ticket: 0,
            exchange: String::new(),
            routing_key: message.routing_key,
            mandatory: message.mandatory,
            immediate: message.immediate,
        })));
        let (size, properties) = (message.body.len() as u64, &message.properties);
        let start = self.frames.borrow().len();
        self.add(FRAME_SPACE, |space| gen_content_header_frame(space, self.channel, CLASS_BASIC, size, properties));
        if let Some(id) = correlation_id {
            let header = &mut self.frames.borrow_mut()[start..];
            if let Some(range) = correlation_id_range(header).filter(|r| r.len() == id.len()) {
                header[range].copy_from_slice(id);
            }
        }
        if message.body.len() > MAX_KEPT {
            // Growing by doubling would take up to twice the space.
            let frame_count = message.body.len().div_ceil(MAX_PAYLOAD);
            self.frames.borrow_mut().reserve_exact(message.body.len() + frame_count * FRAME_OVERHEAD);
        }
        for part in message.body.chunks(MAX_PAYLOAD) {
            self.add(part.len() + FRAME_OVERHEAD, |space| gen_content_body_frame(space, self.channel, part));
        }
    }

    /// Adds the acknowledgement of a delivery.
    pub fn ack(&self, delivery_tag: u64) {
        let ack = basic::Ack { delivery_tag, multiple: false };
        self.add_method(&AMQPClass::Basic(basic::AMQPMethod::Ack(ack)));
    }

    /// Adds the rejection of a delivery: it leaves the queue, for a dead-letter exchange if there is one.
    pub fn reject(&self, delivery_tag: u64) {
        let reject = basic::Reject { delivery_tag, requeue: false };
        self.add_method(&AMQPClass::Basic(basic::AMQPMethod::Reject(reject)));
    }

    /// Adds that all unacknowledged deliveries go back to the queue.
    pub fn requeue_all(&self) {
        let nack = basic::Nack { delivery_tag: 0, multiple: true, requeue: true }; // 0: all
        self.add_method(&AMQPClass::Basic(basic::AMQPMethod::Nack(nack)));
    }

    fn add_method(&self, method: &AMQPClass) {
        self.add(FRAME_SPACE, |space| gen_method_frame(space, self.channel, method));
    }

    /// Adds a frame. `generate` gets the buffer and the index to write at, and returns the buffer and the index behind the
    /// frame; or an error if it needs more than `space` bytes.
    fn add<E>(
        &self,
        mut space: usize,
        generate: impl for<'b> Fn((&'b mut [u8], usize)) -> Result<(&'b mut [u8], usize), E>,
    ) {
        let mut frames = self.frames.borrow_mut();
        let start = frames.len();
        loop {
            frames.resize(start + space, 0);
            if let Ok(end) = generate((&mut frames, start)).map(|(_, end)| end) {
                return frames.truncate(end);
            }
            space *= 2;
        }
    }

    /// Writes what was added, in one piece.
    ///
    /// # Errors
    /// [`ChannelClosed`]; then nothing is written. The end of the connection is no error here: the channel's receivers
    /// report it.
    pub fn flush(&self) -> Result<(), ChannelClosed> {
        let mut frames = self.frames.borrow_mut();
        if frames.is_empty() {
            return Ok(());
        }
        let is_open = lock(&self.state.is_open);
        if *is_open {
            let _ = self.writer.write(&frames); // fails if the connection has ended
        }
        frames.clear();
        frames.shrink_to(MAX_KEPT);
        is_open.then_some(()).ok_or(ChannelClosed)
    }
}

/// What the stream has seen on a connection.
#[derive(Default)]
pub(crate) struct ConnectionState {
    /// The channels with a publisher, by number.
    channels: Mutex<HashMap<u16, Arc<ChannelState>>>,
    /// Whether the peer has sent a frame.
    pub(crate) saw_frame: AtomicBool,
    /// Why the broker closed the connection, if it said so: during the login, amiquip does not tell.
    pub(crate) close: OnceLock<connection::Close>,
}

/// The state of one opening of a channel. A channel number is used again; each opening has a state of its own.
pub(crate) struct ChannelState {
    /// False once the broker has closed the channel. Locked while something is written on it.
    pub(crate) is_open: Mutex<bool>,
    /// True once the broker has cancelled the channel's consumer.
    pub(crate) is_cancelled: AtomicBool,
    /// What has arrived and was not taken yet.
    deliveries: OnceLock<Receiver<ConsumerMessage>>,
    returns: Receiver<Return>,
    confirms: Receiver<Confirm>,
    max_unread: usize,
    /// The delivery tag of the message whose content header is next; 0 if it is a returned message.
    pub(crate) delivery_tag: AtomicU64,
    /// What was changed in the latest deliveries, by delivery tag.
    changes: Mutex<BTreeMap<u64, Changes>>,
}

impl ConnectionState {
    pub(crate) fn open(
        &self,
        number: u16,
        max_unread: usize,
        returns: Receiver<Return>,
        confirms: Receiver<Confirm>,
    ) -> Arc<ChannelState> {
        let state = Arc::new(ChannelState {
            is_open: Mutex::new(true),
            is_cancelled: AtomicBool::new(false),
            deliveries: OnceLock::new(),
            returns,
            confirms,
            max_unread,
            delivery_tag: AtomicU64::new(0),
            changes: Mutex::default(),
        });
        lock(&self.channels).insert(number, state.clone());
        state
    }

    pub(crate) fn channel(&self, number: u16) -> Option<Arc<ChannelState>> {
        lock(&self.channels).get(&number).cloned()
    }

    /// Marks a channel as closed. From when this returns, nothing more is written on it.
    pub(crate) fn close(&self, number: u16) {
        if let Some(state) = lock(&self.channels).remove(&number) {
            *lock(&state.is_open) = false;
        }
    }
}

impl ChannelState {
    /// Whether more has arrived than the user has asked for.
    pub(crate) fn is_flooded(&self) -> bool {
        let deliveries = self.deliveries.get().map_or(0, Receiver::len);
        deliveries.max(self.returns.len()).max(self.confirms.len()) > self.max_unread
    }

    /// Keeps what was changed in the latest delivery, and drops what belongs to deliveries that must have been taken by now.
    pub(crate) fn keep_changes(&self, new: Changes) {
        let delivery_tag = self.delivery_tag.load(Ordering::Relaxed);
        let mut changes = lock(&self.changes);
        changes.insert(delivery_tag, new);
        let oldest_unread = delivery_tag.saturating_sub(self.max_unread as u64);
        *changes = changes.split_off(&oldest_unread);
    }
}

#[cfg(test)]
mod tests {
    use super::super::writer::tests::writer;
    use super::*;
    use amiquip::AmqpProperties;
    use amq_protocol::frame::{parse_frame, AMQPFrame};
    use crossbeam_channel::never;
    use std::io::Read;
    use std::net::TcpStream;

    fn received(mut peer: TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        peer.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_message_is_a_method_a_header_and_body_frames_that_every_peer_accepts() {
        let (writer, peer) = writer();
        let body: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let properties = AmqpProperties::default().with_correlation_id("x".repeat(255));
        let publisher = Publisher::new(writer, ConnectionState::default().open(7, 1, never(), never()), 7);
        let message = Publish::with_properties(&body, "q".repeat(255), properties.clone());
        publisher.publish(message, None);
        publisher.publish(Publish::new(b"", "empty"), None);
        publisher.ack(9);
        publisher.flush().unwrap();
        drop(publisher);

        let bytes = received(peer);
        let (mut rest, mut frames) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let (after, frame) = parse_frame(rest).unwrap();
            assert!(rest.len() - after.len() <= 4096, "a frame of {}", rest.len() - after.len());
            rest = after;
            frames.push(frame);
        }
        let [AMQPFrame::Method(7, AMQPClass::Basic(basic::AMQPMethod::Publish(publish))), AMQPFrame::Header(7, CLASS_BASIC, header), AMQPFrame::Body(7, one), AMQPFrame::Body(7, two), AMQPFrame::Body(7, three), AMQPFrame::Method(7, _), AMQPFrame::Header(7, CLASS_BASIC, empty), AMQPFrame::Method(7, AMQPClass::Basic(basic::AMQPMethod::Ack(ack)))] =
            &frames[..]
        else {
            panic!("{frames:?}");
        };
        assert_eq!(publish.routing_key, "q".repeat(255));
        assert_eq!((header.body_size, &header.properties), (10_000, &properties));
        assert_eq!([&one[..], two, three].concat(), body);
        assert_eq!((empty.body_size, ack.delivery_tag), (0, 9));
    }

    #[test]
    fn nothing_is_written_on_a_closed_channel_even_if_its_number_is_used_again() {
        let (writer, peer) = writer();
        let state = ConnectionState::default();
        let open = |number| Publisher::new(writer.clone(), state.open(number, 1, never(), never()), number);
        let [closed, other] = [open(7), open(8)];
        state.close(7);
        let send = |publisher: &Publisher| {
            publisher.ack(1);
            publisher.flush()
        };
        assert_eq!((send(&closed), send(&other)), (Err(ChannelClosed), Ok(())));
        let reopened = open(7);
        assert_eq!((send(&closed), send(&reopened)), (Err(ChannelClosed), Ok(())));
        drop((closed, other, reopened, writer));
        let numbers: Vec<u8> = received(peer).chunks(21).map(|frame| frame[2]).collect();
        assert_eq!(numbers, [8, 7]);
    }
}
