//! The stream under amiquip: makes frames harmless before amiquip parses them, and sends by way of the outbox.
//!
//! amiquip reserves memory for whatever a frame or a body claims to hold, up to an abort of the process, and is not
//! safe from what a message's publisher put into its properties. So it gets whole frames only, whose sizes
//! [`FrameReader`] has checked, and which went through [`sanitize`].

use crate::outbox::Outbox;
use crate::sanitize::sanitize;
use crate::tls::TlsStream;
use amiquip::IoStream;
use mio::unix::EventedFd;
use mio::{Evented, Poll, PollOpt, Ready, Token};
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The largest frame that we negotiate, in bytes; RabbitMQ's default.
pub(crate) const FRAME_MAX: u32 = 131_072;

/// The largest content header, in bytes: RabbitMQ does not split one that outgrows the negotiated size by what it adds
/// to it (`x-death`, `x-delivery-count`).
const CONTENT_HEADER_MAX: u32 = 1 << 20;

/// The largest body that RabbitMQ can be configured to carry, in bytes.
const BODY_MAX: u64 = 512 << 20;

/// What bytes pass through to the peer and back.
pub(crate) enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream>),
}

impl Transport {
    pub(crate) fn socket(&self) -> &TcpStream {
        match self {
            Transport::Plain(socket) => socket,
            Transport::Tls(stream) => &stream.socket,
        }
    }
}

impl Read for Transport {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => socket.read(buffer),
            Transport::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Transport {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => socket.write(bytes),
            Transport::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // nothing is held back
    }
}

/// A connection that amiquip's I/O loop can poll.
pub(crate) struct Stream {
    outbox: Arc<Outbox>,
    /// The socket, where bytes are read as they come: so reading is in no publisher's way.
    plain: Option<TcpStream>,
    frames: FrameReader,
    greeted: Arc<AtomicBool>,
}

impl Stream {
    /// Hands a connection to the I/O loop; it becomes non-blocking.
    pub(crate) fn new(transport: Transport) -> io::Result<Self> {
        transport.socket().set_nonblocking(true)?;
        let plain = match &transport {
            Transport::Plain(socket) => Some(socket.try_clone()?),
            Transport::Tls(_) => None,
        };
        let outbox = Arc::new(Outbox::new(transport));
        Ok(Stream { outbox, plain, frames: FrameReader::new(), greeted: Arc::default() })
    }

    /// The other way to what this stream sends.
    pub(crate) fn outbox(&self) -> Arc<Outbox> {
        self.outbox.clone()
    }

    /// Whether the peer has sent a frame, which the broker does before we log in.
    pub(crate) fn greeted(&self) -> Arc<AtomicBool> {
        self.greeted.clone()
    }
}

impl Read for Stream {
    /// Reads bytes of whole frames. While there are none this is an error of kind `WouldBlock`.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.frames.read(buffer);
            if count > 0 {
                return Ok(count);
            }
            let space = self.frames.space();
            let count = match &mut self.plain {
                Some(socket) => socket.read(space)?,
                None => self.outbox.read(space)?,
            };
            if count == 0 {
                return Ok(0);
            }
            self.frames.advance(count, &self.outbox)?;
            self.greeted.store(self.frames.saw_frame, Ordering::Relaxed);
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outbox.send(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// The loop reads until it would block, so that what TLS holds decrypted is never forgotten.
impl Evented for Stream {
    fn register(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.outbox.fd()).register(poll, token, ready, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.outbox.fd()).reregister(poll, token, ready, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.outbox.fd()).deregister(poll)
    }
}

impl IoStream for Stream {}

/// A frame is a type (1 byte), a channel (2), a size (4), the payload and an end byte
/// (AMQP 0-9-1, 4.2.3); a content header's payload starts with a class (2), a weight (2) and the
/// body's size (8).
const FRAME_HEADER: usize = 7;
const BODY_SIZE: Range<usize> = FRAME_HEADER + 4..FRAME_HEADER + 12;
const TYPE_METHOD: u8 = 1;
const TYPE_CONTENT_HEADER: u8 = 2;
/// A method's payload starts with a class (2) and a method (2). These are channel.close, basic.deliver, whose
/// arguments start with a consumer tag (a length of 1 byte, then that many) and a delivery tag (8), basic.return,
/// connection.blocked and connection.unblocked.
const METHOD: Range<usize> = FRAME_HEADER..FRAME_HEADER + 4;
const CHANNEL_CLOSE: [u8; 4] = [0, 20, 0, 40];
const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];
const BASIC_RETURN: [u8; 4] = [0, 60, 0, 50];
const BLOCKED: [u8; 4] = [0, 10, 0, 60];
const UNBLOCKED: [u8; 4] = [0, 10, 0, 61];
/// How a TLS record with an alert begins (RFC 8446, 5.1), the answer to what is no TLS.
const TLS_ALERT: [u8; 2] = [21, 3];
const TYPES: [u8; 4] = [TYPE_METHOD, TYPE_CONTENT_HEADER, 3, 8];

/// How many notices that it blocks publishers, or does no longer, a broker may send in each period.
const MOST_NOTICES: u32 = 100;
const NOTICES_PERIOD: Duration = Duration::from_secs(60);

/// How many bytes are read at once: at first, and when there is more.
const FIRST_READ: usize = 4 << 10;
const LARGEST_READ: usize = 64 << 10;

/// Takes bytes in whatever pieces they come, and passes on whole frames, checked and made harmless.
struct FrameReader {
    buffer: Vec<u8>,
    /// Up to where the buffer was passed on, is checked, and is filled.
    passed: usize,
    checked: usize,
    filled: usize,
    /// Whether there was a whole frame.
    saw_frame: bool,
    /// The latest delivery of each channel, by its tag: the content header that follows belongs to it.
    delivery_tags: HashMap<u16, u64>,
    /// How many notices there were since when.
    notices: (u32, Instant),
}

impl FrameReader {
    fn new() -> Self {
        FrameReader {
            buffer: vec![0; FIRST_READ],
            passed: 0,
            checked: 0,
            filled: 0,
            saw_frame: false,
            delivery_tags: HashMap::new(),
            notices: (0, Instant::now()),
        }
    }

    /// Passes on what is checked, as much as there is room for.
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min(self.checked - self.passed);
        buffer[..count].copy_from_slice(&self.buffer[self.passed..self.passed + count]);
        self.passed += count;
        count
    }

    /// Where the next bytes are to be put; everything that is checked was passed on.
    fn space(&mut self) -> &mut [u8] {
        let was_full = self.filled == self.buffer.len();
        self.buffer.copy_within(self.passed..self.filled, 0);
        self.filled -= self.passed;
        (self.passed, self.checked) = (0, 0);
        let wanted = match self.frame_len() {
            Some(len) if len > self.buffer.len() => len,
            _ if was_full && self.buffer.len() < LARGEST_READ => self.buffer.len() * 2,
            _ if self.filled == 0 && self.buffer.len() > LARGEST_READ => LARGEST_READ,
            _ => self.buffer.len(),
        };
        self.buffer.resize(wanted, 0);
        self.buffer.shrink_to(LARGEST_READ);
        &mut self.buffer[self.filled..]
    }

    /// The length of the frame that has not been checked yet, if it is known.
    fn frame_len(&self) -> Option<usize> {
        let head = self.buffer[self.checked..self.filled].get(..FRAME_HEADER)?;
        let payload_len = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
        Some(FRAME_HEADER + payload_len as usize + 1)
    }

    /// Checks the frames that are whole now that `count` more bytes were put into the buffer; fails on the first that
    /// announces what cannot be.
    fn advance(&mut self, count: usize, outbox: &Outbox) -> io::Result<()> {
        self.filled += count;
        while let Some(len) = self.frame_len() {
            check_head(&self.buffer[self.checked..self.filled])?;
            if self.filled - self.checked < len {
                break;
            }
            let frame = self.checked..self.checked + len;
            self.checked = frame.end;
            self.check_frame(frame, outbox)?;
            self.saw_frame = true;
        }
        Ok(())
    }

    fn check_frame(&mut self, frame: Range<usize>, outbox: &Outbox) -> io::Result<()> {
        let frame = &mut self.buffer[frame];
        let changes = sanitize(frame).map_err(|error| invalid(error.to_string()))?;
        let (kind, channel) = (frame[0], u16::from_be_bytes([frame[1], frame[2]]));
        match (kind, frame.get(METHOD)) {
            (TYPE_METHOD, Some(method)) => {
                let method = [method[0], method[1], method[2], method[3]];
                match method {
                    // Before amiquip sees it and confirms: from then on the channel's number means nothing.
                    CHANNEL_CLOSE => outbox.close(channel),
                    BASIC_DELIVER => {
                        let tag = METHOD.end + 1 + usize::from(frame[METHOD.end]);
                        self.delivery_tags.insert(channel, number(&frame[tag..tag + 8]));
                        outbox.count_delivery(channel)?;
                    }
                    BASIC_RETURN => outbox.count_return(channel)?,
                    BLOCKED | UNBLOCKED => self.count_notice()?,
                    _ => {}
                }
            }
            (TYPE_CONTENT_HEADER, _) => {
                let size = frame.get(BODY_SIZE).map_or(0, number);
                if size > BODY_MAX {
                    return Err(invalid(format!("the peer announced a body of {size} bytes")));
                }
                let tag = self.delivery_tags.remove(&channel);
                if let (Some(tag), true) = (tag, changes.concern_a_reply()) {
                    outbox.remember(channel, tag, changes);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn count_notice(&mut self) -> io::Result<()> {
        let (count, since) = &mut self.notices;
        if since.elapsed() >= NOTICES_PERIOD {
            (*count, *since) = (0, Instant::now());
        }
        *count += 1;
        if *count > MOST_NOTICES {
            return Err(invalid(format!(
                "the broker sent more than {MOST_NOTICES} notices a minute"
            )));
        }
        Ok(())
    }
}

/// Checks the first bytes of a frame, or of what is none.
fn check_head(head: &[u8]) -> io::Result<()> {
    if head.starts_with(&TLS_ALERT) {
        return Err(invalid("the peer speaks TLS: is the URL to be amqps://?".into()));
    }
    if !TYPES.contains(&head[0]) {
        return Err(invalid("the peer does not speak AMQP 0-9-1: is that RabbitMQ's port?".into()));
    }
    let most = if head[0] == TYPE_CONTENT_HEADER { CONTENT_HEADER_MAX } else { FRAME_MAX };
    match number(&head[3..FRAME_HEADER]) {
        len if len > u64::from(most) => {
            Err(invalid(format!("the peer announced a frame of {len} bytes")))
        }
        _ => Ok(()),
    }
}

fn number(big_endian: &[u8]) -> u64 {
    big_endian.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[0xce]].concat()
    }

    fn content_header(body_size: u64) -> Vec<u8> {
        frame(2, &[&[0, 60, 0, 0], &body_size.to_be_bytes()[..], &[0, 0]].concat())
    }

    /// An outbox that has nothing to do with what is read.
    fn outbox() -> (Arc<Outbox>, TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Arc::new(Outbox::new(Transport::Plain(socket))), listener.accept().unwrap().0)
    }

    /// What passes a reader that gets these pieces one after the other.
    fn pass<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> io::Result<Vec<u8>> {
        let ((outbox, _peer), mut reader) = (outbox(), FrameReader::new());
        let mut passed = Vec::new();
        for mut piece in pieces {
            while !piece.is_empty() {
                let space = reader.space();
                let count = space.len().min(piece.len());
                space[..count].copy_from_slice(&piece[..count]);
                piece = &piece[count..];
                reader.advance(count, &outbox)?;
                let mut buffer = [0; 1000];
                while let count @ 1.. = reader.read(&mut buffer) {
                    passed.extend(&buffer[..count]);
                }
            }
        }
        Ok(passed)
    }

    fn error(bytes: &[u8]) -> String {
        pass([bytes]).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert_eq!(
            error(b"HTTP/1.1 400"),
            "the peer does not speak AMQP 0-9-1: is that RabbitMQ's port?"
        );
        assert_eq!(error(b"AMQP\0\0\x09\x01"), error(b"HTTP/1.1 400"));
        let alert = [21, 3, 3, 0, 2, 2, 70];
        assert_eq!(error(&alert), "the peer speaks TLS: is the URL to be amqps://?");
        let huge = [1, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(error(&huge), "the peer announced a frame of 4294967295 bytes");
        assert_eq!(
            error(&content_header(1 << 40)),
            "the peer announced a body of 1099511627776 bytes"
        );
        assert_eq!(
            error(&frame(2, &[0; 12])),
            "the peer sent a frame whose fields cannot be read",
            "it has no property flags"
        );
    }

    #[test]
    fn a_channel_that_the_peer_closes_is_closed_before_the_frame_passes() {
        use crate::outbox::{Closed, Publisher};
        let (outbox, _peer) = outbox();
        let mut publisher = Publisher::new(outbox.clone(), 1);
        let close = [&CHANNEL_CLOSE[..], &[1, 144, 0, 0, 0, 0, 0]].concat();
        let mut reader = FrameReader::new();
        for (kind, sent) in [(3, Ok(())), (1, Err(Closed))] {
            let bytes = frame(kind, &close); // a body can hold any bytes
            reader.space()[..bytes.len()].copy_from_slice(&bytes);
            reader.advance(bytes.len(), &outbox).unwrap();
            while reader.read(&mut [0; 100]) > 0 {}
            publisher.ack(1);
            assert_eq!(publisher.send(), sent);
        }
    }

    /// RabbitMQ makes one by what it adds to a message that fills a frame.
    #[test]
    fn a_content_header_may_be_larger_than_a_frame() {
        let headers = [&[2, b'h', b'x', b'x'][..], &[0, 3, 0xd, 0x40], &vec![0; 200_000]].concat();
        let table = [&u32::try_from(headers.len()).unwrap().to_be_bytes()[..], &headers].concat();
        let payload = [&[0, 60, 0, 0][..], &[0; 8], &[0x20, 0], &table].concat();
        let large = frame(2, &payload);
        assert!(pass([&large[..]]).unwrap() == large);
        assert_eq!(
            error(&frame(3, &vec![0; 200_000])),
            "the peer announced a frame of 200000 bytes"
        );
    }

    proptest! {
        #[test]
        fn good_frames_pass_unchanged_in_any_pieces(
            payloads in proptest::collection::vec(proptest::collection::vec(0u8.., 0..9000), 1..6),
            body_size in 0..=BODY_MAX,
            piece in 1usize..10_000,
        ) {
            let mut bytes = Vec::new();
            for payload in &payloads {
                bytes.extend(frame(3, payload));
                bytes.extend(content_header(body_size));
                bytes.extend(frame(8, &[]));
            }
            prop_assert!(pass(bytes.chunks(piece)).unwrap() == bytes);
            bytes.extend(content_header(BODY_MAX + 1));
            prop_assert!(pass(bytes.chunks(piece)).is_err());
        }
    }
}
