//! Frames of AMQP 0-9-1 (4.2.3): takes whole ones off a stream of bytes, and appends our own to a
//! buffer.
//!
//! A frame is a type (1 byte), a channel (2), the size of the payload (4), the payload and an end
//! byte. Sizes are checked before memory is taken.

use crate::encoding::{put_short_string, Malformed, Reader};
use crate::message::Publish;
use std::ops::Range;
use thiserror::Error;

/// Maximum frame size that we negotiate, in bytes; RabbitMQ's default.
pub(crate) const FRAME_MAX: u32 = 131_072;

/// Maximum size of a content header, in bytes. RabbitMQ does not split a header that outgrows the
/// negotiated frame size because of what RabbitMQ adds (`x-death`, `x-delivery-count`).
const CONTENT_HEADER_MAX: u32 = 1 << 20;

/// Maximum size of a body that RabbitMQ can be configured to carry, in bytes.
const BODY_MAX: u64 = 512 << 20;

/// Type of a method frame.
pub(crate) const METHOD: u8 = 1;

/// Type of a content header frame.
pub(crate) const HEADER: u8 = 2;

/// Type of a body frame.
pub(crate) const BODY: u8 = 3;

/// Type of a heartbeat frame.
pub(crate) const HEARTBEAT: u8 = 8;

/// Last byte of every frame.
const FRAME_END: u8 = 0xce;

/// Length of a frame's type, channel and size.
const FRAME_HEADER_LEN: usize = 7;

/// Size of a frame without its payload.
pub(crate) const FRAME_OVERHEAD: usize = FRAME_HEADER_LEN + 1;

/// First bytes of a TLS alert (RFC 8446, 5.1).
const TLS_ALERT: [u8; 2] = [21, 3];

/// Maximum number of times in a minute that the broker may block or unblock the connection.
pub(crate) const MAX_NOTIFICATIONS: u32 = 100;

/// Initial size of a frame buffer, in bytes.
const FIRST_SIZE: usize = 4 << 10;

/// Maximum size that a frame buffer keeps, in bytes.
const LARGEST_KEPT: usize = 64 << 10;

/// A violation of the protocol by the broker.
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

impl From<Malformed> for FrameError {
    fn from(_: Malformed) -> Self {
        FrameError::Malformed
    }
}

/// A whole frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    /// [`METHOD`], [`HEADER`], [`BODY`] or [`HEARTBEAT`].
    pub(crate) kind: u8,
    pub(crate) channel: u16,
    pub(crate) payload: &'a [u8],
    /// All of its bytes.
    pub(crate) bytes: &'a [u8],
}

/// A **frame buffer** takes bytes in pieces of any size, and gives out whole frames.
pub(crate) struct FrameBuffer {
    buffer: Vec<u8>,
    /// The bytes that are not given out.
    unread: Range<usize>,
}

impl FrameBuffer {
    pub(crate) fn new() -> Self {
        FrameBuffer {
            buffer: vec![0; FIRST_SIZE],
            unread: 0..0,
        }
    }

    /// The space for the next bytes.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        let is_full = self.unread.end == self.buffer.len();
        self.buffer.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        let wanted = if is_full {
            (2 * self.buffer.len()).min(LARGEST_KEPT)
        } else {
            self.buffer.len()
        };
        let frame_len = self.next_frame_len().ok().flatten().unwrap_or_default();
        let len = wanted.max(frame_len);
        if len > self.buffer.len() {
            self.buffer.resize(len, 0);
        } else if self.buffer.len() > LARGEST_KEPT
            && self.unread.len().max(frame_len) <= LARGEST_KEPT
        {
            self.buffer.truncate(LARGEST_KEPT); // after a large frame
            self.buffer.shrink_to_fit();
        }
        &mut self.buffer[self.unread.end..]
    }

    /// `count` bytes were put into the [`space`](Self::space).
    pub(crate) fn advance(&mut self, count: usize) {
        self.unread.end += count;
    }

    /// Gives out the next frame, if it is complete.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let Some(len) = self
            .next_frame_len()?
            .filter(|len| *len <= self.unread.len())
        else {
            return Ok(None);
        };
        let bytes = &self.buffer[self.unread.start..self.unread.start + len];
        self.unread.start += len;
        let (header, payload) = bytes.split_at(FRAME_HEADER_LEN);
        let Some((&FRAME_END, payload)) = payload.split_last() else {
            return Err(FrameError::Malformed);
        };
        let channel = u16::from_be_bytes([header[1], header[2]]);
        Ok(Some(Frame {
            kind: header[0],
            channel,
            payload,
            bytes,
        }))
    }

    /// Gives out the next `len` bytes, if they are there: what comes before the first frame.
    pub(crate) fn take(&mut self, len: usize) -> Option<&[u8]> {
        let start = self.unread.start;
        let bytes = self.buffer[..self.unread.end].get(start..start + len)?;
        self.unread.start += len;
        Some(bytes)
    }

    /// The length of the first frame, if its header is complete.
    fn next_frame_len(&self) -> Result<Option<usize>, FrameError> {
        let bytes = &self.buffer[self.unread.clone()];
        let Some(&[frame_type, second, _, a, b, c, d]) = bytes.first_chunk() else {
            return Ok(None);
        };
        let max = match frame_type {
            HEADER => CONTENT_HEADER_MAX,
            METHOD | BODY | HEARTBEAT => FRAME_MAX,
            _ if [frame_type, second] == TLS_ALERT => return Err(FrameError::Tls),
            _ => return Err(FrameError::NotAmqp),
        };
        match u32::from_be_bytes([a, b, c, d]) {
            size if size > max => Err(FrameError::FrameSize(size)),
            size => Ok(Some(FRAME_OVERHEAD + size as usize)),
        }
    }
}

/// The payload of a content header: the size of the body, and the bytes of the properties with
/// their flags.
pub(crate) fn parse_content_header(payload: &[u8]) -> Result<(usize, &[u8]), FrameError> {
    let mut reader = Reader(payload);
    let _class = reader.short()?;
    let _weight = reader.short()?;
    let body_size = reader.long_long()?;
    if body_size > BODY_MAX {
        return Err(FrameError::BodySize(body_size));
    }
    if reader.0.len() < 2 {
        return Err(FrameError::Malformed); // no flags
    }
    Ok((
        usize::try_from(body_size).map_err(|_| FrameError::BodySize(body_size))?,
        reader.0,
    ))
}

/// Appends a frame whose payload `put` appends. Returns the size of the frame.
pub(crate) fn put_frame(
    to: &mut Vec<u8>,
    frame_type: u8,
    channel: u16,
    put: impl FnOnce(&mut Vec<u8>),
) -> usize {
    let start = to.len();
    to.push(frame_type);
    to.extend_from_slice(&channel.to_be_bytes());
    to.extend_from_slice(&[0; 4]);
    put(to);
    let size =
        u32::try_from(to.len() - start - FRAME_HEADER_LEN).expect("a frame is shorter than 4 GiB");
    to[start + 3..start + FRAME_HEADER_LEN].copy_from_slice(&size.to_be_bytes());
    to.push(FRAME_END);
    to.len() - start
}

/// Appends a method frame: a class and a method, then the arguments.
pub(crate) fn put_method(
    to: &mut Vec<u8>,
    channel: u16,
    method: (u16, u16),
    put: impl FnOnce(&mut Vec<u8>),
) {
    put_frame(to, METHOD, channel, |to| {
        to.extend_from_slice(&method.0.to_be_bytes());
        to.extend_from_slice(&method.1.to_be_bytes());
        put(to);
    });
}

/// Appends the frames of a message to the default exchange.
///
/// # Errors
/// The size of the content header, if it is larger than a frame may be. A header is one frame (AMQP
/// 0-9-1, 4.2.6.1). Then nothing is appended.
pub(crate) fn put_message(
    to: &mut Vec<u8>,
    channel: u16,
    message: &Publish,
    frame_max: usize,
) -> Result<(), usize> {
    /// Class and method of `basic.publish`.
    const PUBLISH: (u16, u16) = (60, 40);
    const CLASS_BASIC_WEIGHT_0: [u8; 4] = [0, 60, 0, 0];
    let start = to.len();
    put_method(to, channel, PUBLISH, |to| {
        to.extend_from_slice(&[0; 2]); // reserved
        put_short_string(to, b""); // the default exchange
        put_short_string(to, message.routing_key);
        to.push(u8::from(message.mandatory)); // bit 0; bit 1 is immediate
    });
    let header_len = put_frame(to, HEADER, channel, |to| {
        to.extend_from_slice(&CLASS_BASIC_WEIGHT_0);
        to.extend_from_slice(&(message.body.len() as u64).to_be_bytes());
        to.extend_from_slice(&message.properties);
    });
    if header_len > frame_max {
        to.truncate(start);
        return Err(header_len);
    }
    let max_payload = frame_max - FRAME_OVERHEAD;
    // A large body would else be moved when the buffer grows.
    to.reserve(message.body.len() + message.body.len().div_ceil(max_payload) * FRAME_OVERHEAD);
    for part in message.body.chunks(max_payload) {
        put_frame(to, BODY, channel, |to| to.extend_from_slice(part));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::properties::Properties;
    use amq_protocol::frame::{parse_frame, AMQPFrame};
    use amq_protocol::protocol::{basic, AMQPClass};
    use proptest::prelude::*;

    pub(crate) fn frame(frame_type: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_frame(&mut bytes, frame_type, 1, |to| {
            to.extend_from_slice(payload);
        });
        bytes
    }

    pub(crate) fn content_header(body_size: u64) -> Vec<u8> {
        frame(
            HEADER,
            &[&[0, 60, 0, 0], &body_size.to_be_bytes()[..], &[0, 0]].concat(),
        )
    }

    /// The payloads of the frames in these pieces.
    fn payloads<'a>(
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Vec<Vec<u8>>, FrameError> {
        let mut buffer = FrameBuffer::new();
        let mut payloads = Vec::new();
        for mut piece in pieces {
            while !piece.is_empty() {
                let space = buffer.space();
                let count = space.len().min(piece.len());
                space[..count].copy_from_slice(&piece[..count]);
                piece = &piece[count..];
                buffer.advance(count);
                while let Some(frame) = buffer.next_frame()? {
                    payloads.push(frame.payload.to_vec());
                }
            }
        }
        Ok(payloads)
    }

    #[test]
    fn what_is_not_plausible_is_an_error() {
        let mut no_end = frame(BODY, b"x");
        *no_end.last_mut().unwrap() = 0;
        for (bytes, error) in [
            (b"HTTP/1.1 400".to_vec(), FrameError::NotAmqp),
            (b"AMQP\0\0\x09\x01".to_vec(), FrameError::NotAmqp),
            (vec![21, 3, 3, 0, 2, 2, 70], FrameError::Tls),
            (
                vec![1, 0, 0, 0xff, 0xff, 0xff, 0xff],
                FrameError::FrameSize(4_294_967_295),
            ),
            (
                frame(BODY, &vec![0; 200_000]),
                FrameError::FrameSize(200_000),
            ),
            (no_end, FrameError::Malformed),
        ] {
            assert_eq!(payloads([&bytes[..]]), Err(error), "{bytes:?}");
        }
        for (payload, error) in [
            (
                &content_header(1 << 40)[7..21],
                FrameError::BodySize(1 << 40),
            ),
            (&[0; 12], FrameError::Malformed),
            (&[0; 3], FrameError::Malformed),
        ] {
            assert_eq!(parse_content_header(payload), Err(error));
        }
    }

    /// RabbitMQ sends one when what it adds to a message fills a frame.
    #[test]
    fn a_content_header_may_be_larger_than_a_frame() {
        let large = frame(HEADER, &vec![0; 200_000]);
        assert!(payloads([&large[..]]).unwrap() == [vec![0; 200_000]]);
    }

    #[test]
    fn after_a_large_frame_the_buffer_is_small_again() {
        let mut buffer = FrameBuffer::new();
        let large = frame(HEADER, &vec![0; 900_000]);
        let small = frame(BODY, b"x");
        for bytes in [&large, &small] {
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let space = buffer.space();
                let count = space.len().min(rest.len());
                space[..count].copy_from_slice(&rest[..count]);
                buffer.advance(count);
                rest = &rest[count..];
            }
            assert!(buffer.next_frame().unwrap().is_some());
        }
        assert!(buffer.buffer.capacity() <= LARGEST_KEPT);
    }

    #[test]
    fn a_message_is_a_method_a_header_and_body_frames_of_the_negotiated_size() {
        let body: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let id = [b'x'; 255];
        let properties = Properties {
            correlation_id: Some(&id),
            ..Properties::default()
        }
        .encode();
        let message = Publish {
            routing_key: &[b'q'; 255],
            mandatory: true,
            properties,
            body: &body,
        };
        let mut bytes = Vec::new();
        put_message(&mut bytes, 7, &message, 4096).unwrap();
        let mut frames = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (after, frame) = parse_frame(rest).unwrap();
            assert!(
                rest.len() - after.len() <= 4096,
                "a frame of {}",
                rest.len() - after.len()
            );
            rest = after;
            frames.push(frame);
        }
        let [AMQPFrame::Method(7, AMQPClass::Basic(basic::AMQPMethod::Publish(publish))), AMQPFrame::Header(7, 60, header), AMQPFrame::Body(7, one), AMQPFrame::Body(7, two), AMQPFrame::Body(7, three)] =
            &frames[..]
        else {
            panic!("{frames:?}");
        };
        assert_eq!(
            (&*publish.routing_key, publish.mandatory, publish.immediate),
            (&*"q".repeat(255), true, false)
        );
        assert_eq!(
            (header.body_size, header.properties.correlation_id()),
            (10_000, &Some("x".repeat(255)))
        );
        assert_eq!([&one[..], two, three].concat(), body);
    }

    #[test]
    fn a_message_whose_header_does_not_fit_into_a_frame_is_an_error() {
        let message = |len| Publish {
            routing_key: b"q",
            mandatory: true,
            properties: vec![0; len],
            body: b"30",
        };
        let mut bytes = vec![1];
        assert_eq!(
            put_message(&mut bytes, 1, &message(4_077), 4096),
            Err(4_097)
        );
        assert_eq!(bytes, [1]);
        assert_eq!(put_message(&mut bytes, 1, &message(4_076), 4096), Ok(()));
    }

    proptest! {
        #[test]
        fn frames_are_given_out_whole_in_any_pieces(
            bodies in proptest::collection::vec(proptest::collection::vec(0u8.., 0..9000), 1..6),
            piece in 1usize..10_000,
        ) {
            let bytes = bodies.iter().flat_map(|body| frame(BODY, body)).collect::<Vec<_>>();
            prop_assert!(payloads(bytes.chunks(piece)).unwrap() == bodies);
        }
    }
}
