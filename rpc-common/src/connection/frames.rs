//! The check of everything that the broker sends, before amiquip sees it.
//!
//! amiquip reserves memory for whatever a frame or a body claims to hold, up to an abort of the process, and fails on
//! some properties that a message's publisher can choose. So it gets only whole frames whose sizes are plausible, and
//! which went through [`sanitize`].

use super::channel::ConnectionState;
use super::sanitize::sanitize;
use amq_protocol::frame::{parse_frame, AMQPFrame};
use amq_protocol::protocol::connection::AMQPMethod;
use amq_protocol::protocol::constants::{FRAME_BODY, FRAME_HEADER, FRAME_HEARTBEAT, FRAME_METHOD};
use amq_protocol::protocol::AMQPClass;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// The largest frame that we negotiate, in bytes; RabbitMQ's default.
pub(crate) const FRAME_MAX: u32 = 131_072;

/// The largest content header, in bytes. RabbitMQ does not split a header that outgrows the negotiated frame size
/// because of what it adds (`x-death`, `x-delivery-count`).
const CONTENT_HEADER_MAX: u32 = 1 << 20;

/// The largest body that RabbitMQ can be configured to carry, in bytes.
const BODY_MAX: u64 = 512 << 20;

/// A frame is a type (1 byte), a channel (2), a size (4), the payload and an end byte (AMQP 0-9-1, 4.2.3).
const FRAME_HEADER_LEN: usize = 7;
/// The payload of a content header starts with a class (2 bytes), a weight (2) and the size of the body (8).
const BODY_SIZE: Range<usize> = FRAME_HEADER_LEN + 4..FRAME_HEADER_LEN + 12;
/// The payload of a method starts with a class (2 bytes) and a method (2).
const METHOD: Range<usize> = FRAME_HEADER_LEN..FRAME_HEADER_LEN + 4;
const CONNECTION_CLOSE: [u8; 4] = [0, 10, 0, 50];
const CONNECTION_BLOCKED: [u8; 4] = [0, 10, 0, 60];
const CONNECTION_UNBLOCKED: [u8; 4] = [0, 10, 0, 61];
const CHANNEL_CLOSE: [u8; 4] = [0, 20, 0, 40];
const BASIC_CANCEL: [u8; 4] = [0, 60, 0, 30];
const BASIC_RETURN: [u8; 4] = [0, 60, 0, 50];
/// Its arguments start with a consumer tag (1 byte of length, then that many) and a delivery tag (8 bytes).
const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];
/// The first bytes of a TLS alert (RFC 8446, 5.1).
const TLS_ALERT: [u8; 2] = [21, 3];

/// How often, in each period, the broker may say that it blocks or unblocks the connection.
const MAX_NOTIFICATIONS: u32 = 100;
const NOTIFICATION_PERIOD: Duration = Duration::from_secs(60);

/// How many bytes are read at once: at first, and when more arrives.
const FIRST_READ: usize = 4 << 10;
const LARGEST_READ: usize = 64 << 10;

/// What the peer must not send.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum FrameError {
    #[error("the peer is not an AMQP server")]
    NotAmqp,
    #[error("the peer answered with TLS")]
    Tls,
    #[error("the broker announced a frame of {0} bytes")]
    FrameSize(u32),
    #[error("the broker announced a body of {0} bytes")]
    BodySize(u64),
    #[error("the broker sent a frame whose fields cannot be read")]
    Malformed,
    #[error("the broker sent more messages than we asked for")]
    TooManyMessages,
    #[error("the broker sent more than {MAX_NOTIFICATIONS} notifications a minute")]
    TooManyNotifications,
}

/// A **frame inspector** takes bytes in pieces of any size, and gives out whole frames that are inspected.
pub(crate) struct FrameInspector {
    state: Arc<ConnectionState>,
    buffer: Vec<u8>,
    /// The buffer is given out up to here, inspected up to `inspected`, and filled up to `filled`.
    read: usize,
    inspected: usize,
    filled: usize,
    notifications: u32,
    notification_period_start: Instant,
}

impl FrameInspector {
    pub(crate) fn new(state: Arc<ConnectionState>) -> Self {
        FrameInspector {
            state,
            buffer: vec![0; FIRST_READ],
            read: 0,
            inspected: 0,
            filled: 0,
            notifications: 0,
            notification_period_start: Instant::now(),
        }
    }

    /// Copies bytes of inspected frames into `buffer`. Returns how many; 0 if there are none.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min(self.inspected - self.read);
        buffer[..count].copy_from_slice(&self.buffer[self.read..self.read + count]);
        self.read += count;
        count
    }

    /// Where the next bytes from the peer go, when [`read`](Self::read) has returned 0.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        let len = if self.filled == self.buffer.len() { 2 * self.filled } else { self.buffer.len() };
        self.buffer.copy_within(self.read..self.filled, 0);
        self.filled -= self.read;
        (self.read, self.inspected) = (0, 0);
        let frame_len = self.next_frame_len().ok().flatten().unwrap_or_default();
        self.buffer.resize(len.min(LARGEST_READ).max(frame_len), 0);
        self.buffer.shrink_to(LARGEST_READ);
        &mut self.buffer[self.filled..]
    }

    /// Inspects the frames that are complete now that `count` bytes were put into [`space`](Self::space).
    pub(crate) fn advance(&mut self, count: usize) -> Result<(), FrameError> {
        self.filled += count;
        while let Some(len) = self.next_frame_len()?.filter(|len| *len <= self.filled - self.inspected) {
            self.inspect(self.inspected..self.inspected + len)?;
            self.inspected += len;
        }
        Ok(())
    }

    /// The length of the first frame that is not inspected yet, if its header is complete.
    fn next_frame_len(&self) -> Result<Option<usize>, FrameError> {
        let bytes = &self.buffer[self.inspected..self.filled];
        let Some(&[frame_type, second, _, a, b, c, d]) = bytes.first_chunk() else { return Ok(None) };
        let max = match frame_type {
            FRAME_HEADER => CONTENT_HEADER_MAX,
            FRAME_METHOD | FRAME_BODY | FRAME_HEARTBEAT => FRAME_MAX,
            _ if [frame_type, second] == TLS_ALERT => return Err(FrameError::Tls),
            _ => return Err(FrameError::NotAmqp),
        };
        match u32::from_be_bytes([a, b, c, d]) {
            size if size > max => Err(FrameError::FrameSize(size)),
            size => Ok(Some(FRAME_HEADER_LEN + size as usize + 1)),
        }
    }

    fn inspect(&mut self, frame: Range<usize>) -> Result<(), FrameError> {
        let frame = &mut self.buffer[frame];
        let changes = sanitize(frame).map_err(|_| FrameError::Malformed)?;
        self.state.saw_frame.store(true, Ordering::Relaxed);
        let channel = u16::from_be_bytes([frame[1], frame[2]]);
        match (frame[0], frame.get(METHOD).and_then(<[u8]>::first_chunk::<4>)) {
            (FRAME_METHOD, Some(&CONNECTION_CLOSE)) => {
                if let Ok((_, AMQPFrame::Method(_, AMQPClass::Connection(AMQPMethod::Close(close))))) =
                    parse_frame(frame)
                {
                    let _ = self.state.close.set(close); // fails if it is not the first one
                }
            }
            // Before amiquip sees it and confirms it: afterwards the channel number is invalid.
            (FRAME_METHOD, Some(&CHANNEL_CLOSE)) => self.state.close(channel),
            (FRAME_METHOD, Some(&BASIC_CANCEL)) => {
                self.state.channel(channel).inspect(|channel| channel.is_cancelled.store(true, Ordering::Relaxed));
            }
            (FRAME_METHOD, Some(&BASIC_DELIVER)) => {
                let tag = METHOD.end + 1 + usize::from(frame[METHOD.end]); // behind the consumer tag
                let delivery_tag = read_number(&frame[tag..tag + 8]);
                self.begin_message(channel, delivery_tag)?;
            }
            (FRAME_METHOD, Some(&BASIC_RETURN)) => self.begin_message(channel, 0)?,
            (FRAME_METHOD, Some(&CONNECTION_BLOCKED | &CONNECTION_UNBLOCKED)) => self.count_notification()?,
            (FRAME_HEADER, _) => {
                let body_size = frame.get(BODY_SIZE).map_or(0, read_number);
                if body_size > BODY_MAX {
                    return Err(FrameError::BodySize(body_size));
                }
                if !changes.is_empty() {
                    self.state.channel(channel).inspect(|channel| channel.keep_changes(changes));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A delivery or a return begins: its content header follows.
    fn begin_message(&self, channel: u16, delivery_tag: u64) -> Result<(), FrameError> {
        let Some(channel) = self.state.channel(channel) else { return Ok(()) };
        channel.delivery_tag.store(delivery_tag, Ordering::Relaxed);
        if channel.is_flooded() {
            return Err(FrameError::TooManyMessages);
        }
        Ok(())
    }

    fn count_notification(&mut self) -> Result<(), FrameError> {
        if self.notification_period_start.elapsed() >= NOTIFICATION_PERIOD {
            (self.notifications, self.notification_period_start) = (0, Instant::now());
        }
        self.notifications += 1;
        if self.notifications > MAX_NOTIFICATIONS {
            return Err(FrameError::TooManyNotifications);
        }
        Ok(())
    }
}

fn read_number(big_endian: &[u8]) -> u64 {
    big_endian.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::never;
    use proptest::prelude::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[0xce]].concat()
    }

    fn content_header(body_size: u64) -> Vec<u8> {
        frame(2, &[&[0, 60, 0, 0], &body_size.to_be_bytes()[..], &[0, 0]].concat())
    }

    /// What an inspector gives out that takes these pieces one after the other.
    fn inspect_all<'a>(
        inspector: &mut FrameInspector,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Vec<u8>, FrameError> {
        let mut output = Vec::new();
        for mut piece in pieces {
            while !piece.is_empty() {
                let space = inspector.space();
                let count = space.len().min(piece.len());
                space[..count].copy_from_slice(&piece[..count]);
                piece = &piece[count..];
                inspector.advance(count)?;
                let mut buffer = [0; 1000];
                while let count @ 1.. = inspector.read(&mut buffer) {
                    output.extend(&buffer[..count]);
                }
            }
        }
        Ok(output)
    }

    fn inspected<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<u8>, FrameError> {
        inspect_all(&mut FrameInspector::new(Arc::default()), pieces)
    }

    #[test]
    fn what_is_not_plausible_is_an_error() {
        for (bytes, error) in [
            (b"HTTP/1.1 400".to_vec(), FrameError::NotAmqp),
            (b"AMQP\0\0\x09\x01".to_vec(), FrameError::NotAmqp),
            (vec![21, 3, 3, 0, 2, 2, 70], FrameError::Tls),
            (vec![1, 0, 0, 0xff, 0xff, 0xff, 0xff], FrameError::FrameSize(4_294_967_295)),
            (frame(3, &vec![0; 200_000]), FrameError::FrameSize(200_000)),
            (content_header(1 << 40), FrameError::BodySize(1 << 40)),
            (frame(2, &[0; 12]), FrameError::Malformed),
        ] {
            assert_eq!(inspected([&bytes[..]]), Err(error), "{bytes:?}");
        }
    }

    #[test]
    fn a_channel_is_marked_closed_before_its_close_frame_is_given_out() {
        let connection = Arc::new(ConnectionState::default());
        let state = connection.open(1, 10, never(), never());
        let mut inspector = FrameInspector::new(connection);
        let close = [&[0, 20, 0, 40][..], &[1, 144, 0, 0, 0, 0, 0]].concat();
        for (kind, is_open) in [(FRAME_BODY, true), (FRAME_METHOD, false)] {
            let bytes = frame(kind, &close); // a body may contain the same bytes
            inspector.space()[..bytes.len()].copy_from_slice(&bytes);
            inspector.advance(bytes.len()).unwrap();
            assert_eq!(*state.is_open.lock().unwrap(), is_open);
            while inspector.read(&mut [0; 100]) > 0 {}
        }
    }

    #[test]
    fn more_returns_than_expected_are_an_error() {
        let (sender, returns) = crossbeam_channel::unbounded();
        let connection = Arc::new(ConnectionState::default());
        connection.open(1, 0, returns, never());
        let mut inspector = FrameInspector::new(connection);
        let returned = frame(1, &[0, 60, 0, 50, 1, 56, 0, 0, 0]);
        assert!(inspect_all(&mut inspector, [&returned[..]]).is_ok());
        let (exchange, routing_key, properties) = (String::new(), String::new(), amiquip::AmqpProperties::default());
        let (reply_code, reply_text, content) = (312, String::new(), Vec::new());
        let unread = amiquip::Return { reply_code, reply_text, exchange, routing_key, content, properties };
        sender.send(unread).unwrap();
        let second = inspect_all(&mut inspector, [&returned[..]]);
        assert_eq!(second, Err(FrameError::TooManyMessages));
    }

    /// RabbitMQ sends one when what it adds to a message fills a frame.
    #[test]
    fn a_content_header_may_be_larger_than_a_frame() {
        let headers = [&[2, b'h', b'x', b'x'][..], &[0, 3, 0xd, 0x40], &vec![0; 200_000]].concat();
        let table = [&u32::try_from(headers.len()).unwrap().to_be_bytes()[..], &headers].concat();
        let payload = [&[0, 60, 0, 0][..], &[0; 8], &[0x20, 0], &table].concat();
        let large = frame(2, &payload);
        assert!(inspected([&large[..]]).unwrap() == large);
    }

    proptest! {
        #[test]
        fn good_frames_are_given_out_unchanged_in_any_pieces(
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
            prop_assert!(inspected(bytes.chunks(piece)).unwrap() == bytes);
            bytes.extend(content_header(BODY_MAX + 1));
            prop_assert!(inspected(bytes.chunks(piece)).is_err());
        }
    }
}
