//! The outbox: all that goes to the broker, and a short way into it for what is sent most.
//!
//! By amiquip a publish goes to its I/O thread as three messages and an ack as a fourth, and that thread
//! wakes up, asks the kernel whether it may write, and writes. Measured, a server spent half of its time on
//! that. So a [`Publisher`] writes both itself, in one piece.
//!
//! What keeps the two ways apart: each of them writes whole frames, one at a time; on a channel whose publisher
//! is in use, only that sends content, whose frames must not be mixed; and once the broker has closed a channel
//! nothing is sent on it any more, for that would cost the whole connection.

use crate::sanitize::{correlation_id_range, Changes};
use crate::stream::Transport;
use amiquip::Publish;
use amq_protocol::frame::generation::{
    gen_content_body_frame, gen_content_header_frame, gen_method_frame,
};
use amq_protocol::protocol::basic::{self, AMQPMethod};
use amq_protocol::protocol::AMQPClass;
use mio::unix::EventedFd;
use mio::{Events, Poll, PollOpt, Ready, Token};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// The AMQP class that messages belong to.
const CLASS_BASIC: u16 = 60;

/// What a frame holds beside its payload (AMQP 0-9-1, 4.2.3), and the payload of the smallest frame that
/// every peer has to take (`frame-min-size`): what was negotiated amiquip keeps to itself.
const OVERHEAD: usize = 8;
const PAYLOAD: usize = 4096 - OVERHEAD;

/// More than most frames need, and what a publisher keeps at hand for the next ones, in bytes.
const USUAL: usize = 512;
const MOST_KEPT: usize = 64 << 10;

/// The **outbox** is shared by amiquip's I/O thread and all publishers of a connection.
pub(crate) struct Outbox {
    state: Mutex<State>,
    /// What has come on the channels that have a publisher.
    inbound: Mutex<HashMap<u16, Inbound>>,
}

/// What the broker has sent on a channel and the program has not taken yet.
struct Inbound {
    /// The opening of the channel, as in [`State`].
    opening: u64,
    deliveries: Waiting,
    returns: Waiting,
    /// What was changed in deliveries, by delivery tag.
    changes: BTreeMap<u64, Changes>,
}

/// Messages that wait to be taken, and how many may.
struct Waiting {
    count: usize,
    most: usize,
}

impl Waiting {
    fn add(&mut self, what: &str) -> io::Result<()> {
        self.count += 1;
        if self.count <= self.most {
            return Ok(());
        }
        let reason =
            format!("the broker sent more than {} {what} that were not asked for", self.most);
        Err(io::Error::new(ErrorKind::InvalidData, reason))
    }

    fn take(&mut self) {
        self.count = self.count.saturating_sub(1);
    }
}

/// How many deliveries and returns may wait on a channel whose program does not say.
const MOST_WAITING: usize = 65_535;

struct State {
    transport: Transport,
    /// What the socket has not taken yet. Then a thread waits for it to do so.
    backlog: VecDeque<u8>,
    /// The channels with a publisher that the broker has not closed. Their numbers are used again, so each
    /// opening has one of its own.
    open: HashMap<u16, u64>,
    openings: u64,
}

impl Outbox {
    pub(crate) fn new(transport: Transport) -> Self {
        let (backlog, open) = (VecDeque::new(), HashMap::new());
        let state = Mutex::new(State { transport, backlog, open, openings: 0 });
        Outbox { state, inbound: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with what has come on a channel; nothing where that has no publisher.
    fn with_inbound<T>(&self, channel: u16, act: impl FnOnce(&mut Inbound) -> T) -> Option<T> {
        let mut inbound = self.inbound.lock().unwrap_or_else(PoisonError::into_inner);
        inbound.get_mut(&channel).map(act)
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.state().transport.socket().as_raw_fd()
    }

    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.state().transport.read(buffer)
    }

    /// Takes all of these frames, and sends what the socket takes.
    pub(crate) fn send(self: &Arc<Self>, frames: &[u8]) -> io::Result<()> {
        self.state().send(self, frames)
    }

    /// Nothing is to be sent on this channel any more.
    pub(crate) fn close(&self, channel: u16) {
        self.state().open.remove(&channel);
    }

    /// A delivery comes on this channel.
    ///
    /// # Errors
    /// When more wait there than the program has asked for: the broker floods it.
    pub(crate) fn count_delivery(&self, channel: u16) -> io::Result<()> {
        let counted = self.with_inbound(channel, |inbound| inbound.deliveries.add("messages"));
        counted.unwrap_or(Ok(()))
    }

    /// A returned message comes on this channel.
    ///
    /// # Errors
    /// As [`Outbox::count_delivery`].
    pub(crate) fn count_return(&self, channel: u16) -> io::Result<()> {
        let counted = self.with_inbound(channel, |inbound| inbound.returns.add("returns"));
        counted.unwrap_or(Ok(()))
    }

    /// Keeps what was changed in a delivery, until a publisher of the channel takes that.
    pub(crate) fn remember(&self, channel: u16, delivery_tag: u64, changes: Changes) {
        self.with_inbound(channel, |inbound| inbound.changes.insert(delivery_tag, changes));
    }
}

impl State {
    /// What cannot be sent ends the connection, for whoever reads from it to find out.
    fn send(&mut self, outbox: &Arc<Outbox>, frames: &[u8]) -> io::Result<()> {
        let sent = self.try_send(outbox, frames);
        if sent.is_err() {
            self.give_up();
        }
        sent
    }

    fn give_up(&mut self) {
        let _ = self.transport.socket().shutdown(Shutdown::Both); // fails only when it is down already
        self.backlog.clear();
    }

    fn try_send(&mut self, outbox: &Arc<Outbox>, frames: &[u8]) -> io::Result<()> {
        if !self.backlog.is_empty() {
            self.backlog.extend(frames);
            return Ok(());
        }
        let sent = self.transport.write_some(frames)?;
        if sent < frames.len() {
            self.backlog.extend(&frames[sent..]);
            let outbox = outbox.clone();
            thread::Builder::new().name("backlog".into()).spawn(move || outbox.work_off())?;
        }
        Ok(())
    }
}

impl Outbox {
    /// Sends the backlog as the socket takes it, until it is gone, or the socket is.
    fn work_off(&self) {
        if self.try_work_off().is_err() {
            self.state().give_up();
        }
    }

    fn try_work_off(&self) -> io::Result<()> {
        let poll = Poll::new()?;
        poll.register(&EventedFd(&self.fd()), Token(0), Ready::writable(), PollOpt::level())?;
        loop {
            poll.poll(&mut Events::with_capacity(1), None)?;
            let mut state = self.state();
            let State { transport, backlog, .. } = &mut *state;
            let sent = transport.write_some(backlog.as_slices().0)?;
            backlog.drain(..sent);
            if backlog.is_empty() {
                return Ok(());
            }
        }
    }
}

impl Transport {
    /// Writes until all is written or the socket would block, and says how much that was.
    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            match self.write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }
}

/// A **publisher** sends messages and acks on a channel, from any thread and without ever waiting.
///
/// It is made when the channel is opened. It may overtake what was given to amiquip to send there: before it is
/// used a round trip on the channel has to pass, and from then on nobody else may publish there.
pub struct Publisher {
    outbox: Arc<Outbox>,
    channel: u16,
    opening: u64,
    /// Whole frames that are to be sent.
    frames: Vec<u8>,
}

/// The broker has closed the channel; how, only amiquip knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl Publisher {
    pub(crate) fn new(outbox: Arc<Outbox>, channel: u16) -> Self {
        let mut state = outbox.state();
        state.openings += 1;
        let opening = state.openings;
        state.open.insert(channel, opening);
        drop(state);
        let waiting = || Waiting { count: 0, most: MOST_WAITING };
        let (deliveries, returns, changes) = (waiting(), waiting(), BTreeMap::new());
        let inbound = Inbound { opening, deliveries, returns, changes };
        outbox.inbound.lock().unwrap_or_else(PoisonError::into_inner).insert(channel, inbound);
        Publisher { outbox, channel, opening, frames: Vec::new() }
    }

    /// Has the connection end when more deliveries, or more returns, than these wait on the channel.
    pub fn limit_waiting(&self, deliveries: usize, returns: usize) {
        self.with_inbound(|inbound| {
            (inbound.deliveries.most, inbound.returns.most) = (deliveries, returns);
        });
    }

    /// A delivery was taken. Says what was changed in it so that it could be read.
    #[must_use]
    pub fn take_delivery(&self, delivery_tag: u64) -> Changes {
        let changes = self.with_inbound(|inbound| {
            inbound.deliveries.take();
            inbound.changes.remove(&delivery_tag)
        });
        changes.flatten().unwrap_or_default()
    }

    /// A returned message was taken.
    pub fn take_return(&self) {
        self.with_inbound(|inbound| inbound.returns.take());
    }

    /// Does something with what has come on this opening of the channel; nothing when there is a later one.
    fn with_inbound<T>(&self, act: impl FnOnce(&mut Inbound) -> T) -> Option<T> {
        let is_ours =
            |inbound: &mut Inbound| (inbound.opening == self.opening).then(|| act(inbound));
        self.outbox.with_inbound(self.channel, is_ours).flatten()
    }

    /// Adds a message to what is sent next, by the default exchange.
    pub fn publish(&mut self, message: Publish) {
        self.publish_with_id(message, None);
    }

    /// The same, with these bytes in the place of the message's correlation id, which has the same length.
    pub fn publish_with_id(&mut self, message: Publish, correlation_id: Option<&[u8]>) {
        let channel = self.channel;
        self.add_method(AMQPMethod::Publish(basic::Publish {
            ticket: 0,
            exchange: String::new(), // the default one, as all of ours
            routing_key: message.routing_key,
            mandatory: message.mandatory,
            immediate: message.immediate,
        }));
        let (size, properties) = (message.body.len() as u64, &message.properties);
        let begin = self.frames.len();
        self.add(USUAL, |space| {
            let header = gen_content_header_frame(space, channel, CLASS_BASIC, size, properties);
            header.ok().map(|(_, end)| end)
        });
        let header = &mut self.frames[begin..];
        if let (Some(id), Some(range)) = (correlation_id, correlation_id_range(header)) {
            if range.len() == id.len() {
                header[range].copy_from_slice(id);
            }
        }
        for part in message.body.chunks(PAYLOAD) {
            self.add(part.len() + OVERHEAD, |space| {
                gen_content_body_frame(space, channel, part).ok().map(|(_, end)| end)
            });
        }
    }

    /// Adds the acknowledgement of a delivery to what is sent next.
    pub fn ack(&mut self, delivery_tag: u64) {
        self.add_method(AMQPMethod::Ack(basic::Ack { delivery_tag, multiple: false }));
    }

    fn add_method(&mut self, method: AMQPMethod) {
        let (channel, method) = (self.channel, AMQPClass::Basic(method));
        self.add(USUAL, |space| gen_method_frame(space, channel, &method).ok().map(|(_, end)| end));
    }

    /// Adds what `generate` writes from an index on; it says where that ends, and fails only for lack of
    /// space.
    fn add(&mut self, space: usize, generate: impl Fn((&mut [u8], usize)) -> Option<usize>) {
        let begin = self.frames.len();
        let mut space = space;
        loop {
            self.frames.resize(begin + space, 0);
            if let Some(end) = generate((&mut self.frames, begin)) {
                self.frames.truncate(end);
                return;
            }
            space *= 2;
        }
    }

    /// Sends what was added, in one piece.
    ///
    /// # Errors
    /// [`Closed`]; then none of it is sent. That the connection has ended is for the channel's receivers to
    /// tell.
    pub fn send(&mut self) -> Result<(), Closed> {
        if self.frames.is_empty() {
            return Ok(());
        }
        let mut state = self.outbox.state();
        let is_open = state.open.get(&self.channel) == Some(&self.opening);
        if is_open {
            let _ = state.send(&self.outbox, &self.frames); // the I/O thread meets the end
        }
        drop(state);
        self.frames.clear();
        self.frames.shrink_to(MOST_KEPT);
        if is_open {
            Ok(())
        } else {
            Err(Closed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use amiquip::AmqpProperties;
    use amq_protocol::frame::{parse_frame, AMQPFrame};
    use std::net::{TcpListener, TcpStream};

    /// An outbox, and the peer that it sends to.
    fn outbox() -> (Arc<Outbox>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        (Arc::new(Outbox::new(Transport::Plain(socket))), listener.accept().unwrap().0)
    }

    /// What the peer gets until the connection ends, which is when nobody needs it any more.
    fn received(mut peer: TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        peer.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_message_is_a_method_a_header_and_frames_that_every_peer_takes() {
        let (outbox, peer) = outbox();
        let body: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let properties = AmqpProperties::default().with_correlation_id("x".repeat(255));
        let mut publisher = Publisher::new(outbox, 7);
        publisher.publish(Publish::with_properties(&body, "q".repeat(255), properties.clone()));
        publisher.publish(Publish::new(b"", "empty"));
        publisher.ack(9);
        publisher.send().unwrap();
        drop(publisher);

        let bytes = received(peer);
        let (mut rest, mut frames) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let (after, frame) = parse_frame(rest).unwrap();
            assert!(rest.len() - after.len() <= 4096, "a frame of {}", rest.len() - after.len());
            rest = after;
            frames.push(frame);
        }
        let [AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Publish(publish))), AMQPFrame::Header(7, CLASS_BASIC, header), AMQPFrame::Body(7, one), AMQPFrame::Body(7, two), AMQPFrame::Body(7, three), AMQPFrame::Method(7, _), AMQPFrame::Header(7, CLASS_BASIC, empty), AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Ack(ack)))] =
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
    fn what_the_socket_does_not_take_is_sent_later_and_in_order() {
        let (outbox, peer) = outbox();
        let sent: Vec<u8> = (0..=255).cycle().take(64 << 20).collect(); // more than a socket holds
        for piece in sent.chunks(1 << 20) {
            outbox.send(piece).unwrap();
        }
        assert!(!outbox.state().backlog.is_empty(), "the socket took all at once");
        drop(outbox);
        assert!(received(peer) == sent);
    }

    #[test]
    fn a_backlog_ends_with_its_connection() {
        let (outbox, peer) = outbox();
        outbox.send(&vec![0; 64 << 20]).unwrap();
        drop(peer);
        while Arc::strong_count(&outbox) > 1 {
            thread::yield_now();
        }
        assert!(outbox.state().backlog.is_empty());
    }

    #[test]
    fn nothing_is_sent_on_a_closed_channel_though_its_number_is_used_again() {
        let (outbox, peer) = outbox();
        let [mut closed, mut other] = [7, 8].map(|id| Publisher::new(outbox.clone(), id));
        outbox.close(7);
        let send = |publisher: &mut Publisher| {
            publisher.ack(1);
            publisher.send()
        };
        assert_eq!((send(&mut closed), send(&mut other)), (Err(Closed), Ok(())));
        let mut opened = Publisher::new(outbox, 7);
        assert_eq!((send(&mut closed), send(&mut opened)), (Err(Closed), Ok(())));
        drop((closed, other, opened));
        let channels: Vec<u8> = received(peer).chunks(21).map(|frame| frame[2]).collect();
        assert_eq!(channels, [8, 7]);
    }
}
