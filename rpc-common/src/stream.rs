//! The stream under amiquip: checks the sizes that a peer announces before amiquip believes them, and sends by
//! way of the outbox.
//!
//! amiquip reserves memory for whatever a frame or a body claims to hold, up to an abort of the
//! process. So every byte read passes [`FrameCheck`] first.

use crate::outbox::Outbox;
use crate::tls::TlsStream;
use amiquip::IoStream;
use mio::unix::EventedFd;
use mio::{Evented, Poll, PollOpt, Ready, Token};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// The largest frame that we negotiate, in bytes; RabbitMQ's default.
pub(crate) const FRAME_MAX: u32 = 131_072;

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
    check: FrameCheck,
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
        Ok(Stream { outbox, plain, check: FrameCheck::default(), greeted: Arc::default() })
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
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.plain {
            Some(socket) => socket.read(buffer)?,
            None => self.outbox.read(buffer)?,
        };
        self.check.see(&buffer[..count])?;
        // Before amiquip sees it and confirms: from then on the channel's number means nothing.
        self.check.closed.drain(..).for_each(|channel| self.outbox.close(channel));
        self.greeted.store(self.check.passed, Ordering::Relaxed);
        Ok(count)
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
const CONTENT_HEADER: usize = FRAME_HEADER + 12;
const TYPE_METHOD: u8 = 1;
const TYPE_CONTENT_HEADER: u8 = 2;
/// A method's payload starts with a class (2) and a method (2); this is channel.close.
const METHOD_HEADER: usize = FRAME_HEADER + 4;
const CHANNEL_CLOSE: [u8; 4] = [0, 20, 0, 40];
/// How a TLS record with an alert begins (RFC 8446, 5.1), the answer to what is no TLS.
const TLS_ALERT: [u8; 2] = [21, 3];
const TYPES: [u8; 4] = [TYPE_METHOD, TYPE_CONTENT_HEADER, 3, 8];

/// Follows the frames in a stream of bytes, in whatever pieces they come.
#[derive(Default)]
struct FrameCheck {
    /// The first bytes of the current frame, as many as there are of a content header.
    head: [u8; CONTENT_HEADER],
    seen: usize,
    /// Whether a whole frame has passed.
    passed: bool,
    /// The channels that the peer has closed, until they are taken.
    closed: Vec<u16>,
}

impl FrameCheck {
    /// Takes the next bytes of the stream; fails on the first that announce what cannot be.
    fn see(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let wanted = match self.seen {
                0..FRAME_HEADER => FRAME_HEADER - self.seen,
                _ => self.frame_len() - self.seen,
            };
            let (part, rest) = bytes.split_at(wanted.min(bytes.len()));
            self.take(part)?;
            bytes = rest;
        }
        Ok(())
    }

    fn take(&mut self, part: &[u8]) -> io::Result<()> {
        let before = self.seen;
        self.seen += part.len();
        if before < CONTENT_HEADER {
            let end = self.seen.min(CONTENT_HEADER);
            self.head[before..end].copy_from_slice(&part[..end - before]);
        }
        if before < FRAME_HEADER && self.seen >= FRAME_HEADER {
            self.check_frame()?;
        }
        if before < METHOD_HEADER && self.seen >= METHOD_HEADER {
            self.note_close();
        }
        if before < CONTENT_HEADER && self.seen >= CONTENT_HEADER {
            self.check_body()?;
        }
        if self.seen >= FRAME_HEADER && self.seen == self.frame_len() {
            self.seen = 0;
            self.passed = true;
        }
        Ok(())
    }

    fn payload_len(&self) -> u32 {
        u32::from_be_bytes([self.head[3], self.head[4], self.head[5], self.head[6]])
    }

    fn frame_len(&self) -> usize {
        FRAME_HEADER + self.payload_len() as usize + 1
    }

    fn check_frame(&self) -> io::Result<()> {
        if self.head.starts_with(&TLS_ALERT) {
            return invalid("the peer speaks TLS: is the URL to be amqps://?".into());
        }
        if !TYPES.contains(&self.head[0]) {
            return invalid("the peer does not speak AMQP 0-9-1: is that RabbitMQ's port?".into());
        }
        match self.payload_len() {
            len if len > FRAME_MAX => invalid(format!("the peer announced a frame of {len} bytes")),
            _ => Ok(()),
        }
    }

    fn note_close(&mut self) {
        let is_method = self.head[0] == TYPE_METHOD;
        if is_method && self.head[FRAME_HEADER..METHOD_HEADER] == CHANNEL_CLOSE {
            self.closed.push(u16::from_be_bytes([self.head[1], self.head[2]]));
        }
    }

    fn check_body(&self) -> io::Result<()> {
        let mut size = [0; 8];
        size.copy_from_slice(&self.head[CONTENT_HEADER - 8..]);
        match u64::from_be_bytes(size) {
            size if self.head[0] == TYPE_CONTENT_HEADER && size > BODY_MAX => {
                invalid(format!("the peer announced a body of {size} bytes"))
            }
            _ => Ok(()),
        }
    }
}

fn invalid(reason: String) -> io::Result<()> {
    Err(io::Error::new(ErrorKind::InvalidData, reason))
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

    fn error(bytes: &[u8]) -> String {
        FrameCheck::default().see(bytes).unwrap_err().to_string()
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
    }

    #[test]
    fn a_channel_that_the_peer_closes_is_noted() {
        let mut check = FrameCheck::default();
        let close = [&CHANNEL_CLOSE[..], &[1, 144, 0, 0, 0, 0, 0]].concat();
        check.see(&[frame(3, &close), frame(8, &[])].concat()).unwrap();
        assert!(check.closed.is_empty(), "a message can hold any bytes");
        frame(1, &close).chunks(3).for_each(|piece| check.see(piece).unwrap());
        assert_eq!(check.closed, [1]);
    }

    proptest! {
        #[test]
        fn good_frames_pass_in_any_pieces(
            payloads in proptest::collection::vec(proptest::collection::vec(0u8.., 0..40), 1..6),
            body_size in 0..=BODY_MAX,
            piece in 1usize..30,
        ) {
            let mut bytes = Vec::new();
            for payload in &payloads {
                bytes.extend(frame(1, payload));
                bytes.extend(content_header(body_size));
                bytes.extend(frame(8, &[]));
            }
            let mut check = FrameCheck::default();
            for piece in bytes.chunks(piece) {
                prop_assert!(check.see(piece).is_ok());
            }
            prop_assert_eq!(check.seen, 0, "the check has lost the frames' boundaries");
            bytes.extend(content_header(BODY_MAX + 1));
            let verdicts: Vec<_> = {
                let mut check = FrameCheck::default();
                bytes.chunks(piece).map(|piece| check.see(piece).is_ok()).collect()
            };
            prop_assert!(verdicts.contains(&false));
        }
    }
}
