//! amiquip's side of a connection: its end of the socketpair, and what it sends during the login,
//! completed.

use super::frames::{FrameBuffer, FrameError, FRAME_MAX, METHOD};
use crate::encoding::{Malformed, Reader};
use amiquip::IoStream;
use amq_protocol::frame::generation::gen_method_frame;
use amq_protocol::frame::{parse_frame, AMQPFrame};
use amq_protocol::protocol::connection::{AMQPMethod, StartOk};
use amq_protocol::protocol::AMQPClass;
use amq_protocol::types::AMQPValue;
use mio::unix::EventedFd;
use mio::{Evented, Poll, PollOpt, Ready, Token};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// amiquip's end of the socketpair, which does not block.
pub(crate) struct AmiquipStream(pub(crate) UnixStream);

impl Read for AmiquipStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for AmiquipStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Evented for AmiquipStream {
    fn register(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.0.as_raw_fd()).register(poll, token, ready, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.0.as_raw_fd()).reregister(poll, token, ready, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.0.as_raw_fd()).deregister(poll)
    }
}

impl IoStream for AmiquipStream {}

/// The values that both sides agreed on at the end of the login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Negotiated {
    /// The largest frame, in bytes.
    pub(crate) frame_max: u32,
    /// The interval of heartbeats, in seconds.
    pub(crate) heartbeat: u16,
}

/// Takes what amiquip sends, and gives out whole frames for the broker: publishers write between
/// them.
pub(crate) struct FromAmiquip {
    pub(crate) buffer: FrameBuffer,
    login: Login,
}

/// The progress of amiquip's login.
enum Login {
    /// amiquip has sent nothing: the protocol header is not a frame.
    Begin { connection_name: String },
    /// amiquip has sent the protocol header, and perhaps start-ok.
    Handshake { connection_name: String },
    /// amiquip has sent tune-ok.
    Done,
}

/// Length of the protocol header: "AMQP" and the version.
const PROTOCOL_HEADER_LEN: usize = 8;

impl FromAmiquip {
    /// `connection_name` is what RabbitMQ shows in its list of connections.
    pub(crate) fn new(connection_name: String) -> Self {
        FromAmiquip {
            buffer: FrameBuffer::new(),
            login: Login::Begin { connection_name },
        }
    }

    /// Appends the frames that are complete to what is written to the broker. `heartbeat` is the
    /// interval for tune-ok. Returns what was negotiated, when tune-ok is among the frames.
    pub(crate) fn take_frames(
        &mut self,
        to_broker: &mut Vec<u8>,
        heartbeat: u16,
    ) -> Result<Option<Negotiated>, FrameError> {
        if let Login::Begin { connection_name } = &mut self.login {
            let Some(header) = self.buffer.take(PROTOCOL_HEADER_LEN) else {
                return Ok(None);
            };
            to_broker.extend_from_slice(header);
            let connection_name = std::mem::take(connection_name);
            self.login = Login::Handshake { connection_name };
        }
        let mut negotiated = None;
        while let Some(frame) = self.buffer.next_frame()? {
            let start = to_broker.len();
            to_broker.extend_from_slice(frame.bytes);
            let (Login::Handshake { connection_name }, METHOD) = (&self.login, frame.kind) else {
                continue;
            };
            let mut payload = Reader(frame.payload);
            let method = (payload.short()?, payload.short()?);
            if method == START_OK {
                let completed = complete_start_ok(frame.bytes, connection_name)?;
                to_broker.truncate(start);
                to_broker.extend_from_slice(&completed);
            } else if method == TUNE_OK {
                negotiated = Some(complete_tune_ok(&mut to_broker[start..], heartbeat)?);
                self.login = Login::Done;
            }
        }
        Ok(negotiated)
    }
}

/// Class and method of `connection.start-ok`.
const START_OK: (u16, u16) = (10, 11);

/// Class and method of `connection.tune-ok`.
const TUNE_OK: (u16, u16) = (10, 31);

/// Encodes start-ok with more client properties. Without this capability, RabbitMQ refuses a login
/// by closing the socket after 3 s, as a broker that shuts down does.
fn complete_start_ok(frame: &[u8], connection_name: &str) -> Result<Vec<u8>, FrameError> {
    let Ok((_, AMQPFrame::Method(0, AMQPClass::Connection(AMQPMethod::StartOk(mut start_ok))))) =
        parse_frame(frame)
    else {
        return Err(FrameError::Malformed);
    };
    let StartOk {
        client_properties: properties,
        ..
    } = &mut start_ok;
    properties.insert(
        "connection_name".into(),
        AMQPValue::LongString(connection_name.into()),
    );
    if let Some(AMQPValue::FieldTable(capabilities)) = properties.get_mut("capabilities") {
        capabilities.insert(
            "authentication_failure_close".into(),
            AMQPValue::Boolean(true),
        );
    }
    let mut completed = vec![0; FRAME_MAX as usize];
    let method = AMQPClass::Connection(AMQPMethod::StartOk(start_ok));
    let (_, end) =
        gen_method_frame((&mut completed, 0), 0, &method).map_err(|_| FrameError::Malformed)?;
    completed.truncate(end);
    Ok(completed)
}

/// Sets the interval of the heartbeats, which amiquip believes to be off.
fn complete_tune_ok(frame: &mut [u8], heartbeat: u16) -> Result<Negotiated, Malformed> {
    // The frame header, class and method, channel-max, frame-max.
    const HEARTBEAT_OFFSET: usize = 7 + 4 + 2 + 4;
    let mut reader = Reader(&frame[7 + 4 + 2..]);
    let frame_max = reader.long()?;
    reader.short()?;
    frame[HEARTBEAT_OFFSET..HEARTBEAT_OFFSET + 2].copy_from_slice(&heartbeat.to_be_bytes());
    Ok(Negotiated {
        frame_max,
        heartbeat,
    })
}

#[cfg(test)]
mod tests {
    use super::super::frames::put_method;
    use super::*;
    use amq_protocol::types::FieldTable;

    fn put(from: &mut FromAmiquip, bytes: &[u8]) {
        from.buffer.space()[..bytes.len()].copy_from_slice(bytes);
        from.buffer.advance(bytes.len());
    }

    #[test]
    fn start_ok_gets_a_connection_name_and_a_capability_and_keeps_the_rest() {
        let entry = |name: &str| (name.to_owned(), AMQPValue::Boolean(true));
        let start_ok = |client_properties| {
            let mechanism = "PLAIN".into();
            let response = "\0me\0sesame".into();
            let locale = "en_US".into();
            AMQPClass::Connection(AMQPMethod::StartOk(StartOk {
                client_properties,
                mechanism,
                response,
                locale,
            }))
        };
        let capabilities = AMQPValue::FieldTable(FieldTable::from([entry("connection.blocked")]));
        let original = start_ok(FieldTable::from([("capabilities".into(), capabilities)]));
        let capabilities = FieldTable::from([
            entry("authentication_failure_close"),
            entry("connection.blocked"),
        ]);
        let expected = start_ok(FieldTable::from([
            ("capabilities".into(), AMQPValue::FieldTable(capabilities)),
            (
                "connection_name".into(),
                AMQPValue::LongString("rpc-server".into()),
            ),
        ]));
        let mut frame = vec![0; 1000];
        let (_, len) = gen_method_frame((&mut frame, 0), 0, &original).unwrap();
        let mut from = FromAmiquip::new("rpc-server".into());
        let mut to_broker = Vec::new();
        put(&mut from, b"AMQP\0\0");
        assert_eq!(from.take_frames(&mut to_broker, 10), Ok(None));
        put(&mut from, b"\x09\x01");
        put(&mut from, &frame[..len]);
        assert_eq!(from.take_frames(&mut to_broker, 10), Ok(None));
        assert_eq!(
            parse_frame(&to_broker[8..]),
            Ok((&[][..], AMQPFrame::Method(0, expected)))
        );
    }

    #[test]
    fn tune_ok_gets_the_heartbeats_and_tells_the_size_of_frames() {
        let tune_ok = |heartbeat: u8| {
            let mut bytes = Vec::new();
            put_method(&mut bytes, 0, (10, 31), |to| {
                to.extend_from_slice(&[0, 9, 0, 0, 0x20, 0, 0, heartbeat]);
            });
            bytes
        };
        let mut from = FromAmiquip::new(String::new());
        let mut to_broker = Vec::new();
        put(&mut from, &[b"AMQP\0\0\x09\x01", &tune_ok(0)[..]].concat());
        let negotiated = Negotiated {
            frame_max: 8192,
            heartbeat: 7,
        };
        assert_eq!(from.take_frames(&mut to_broker, 7), Ok(Some(negotiated)));
        assert_eq!(to_broker[8..], tune_ok(7));
        put(&mut from, &tune_ok(0));
        to_broker.clear();
        assert_eq!(
            from.take_frames(&mut to_broker, 7),
            Ok(None),
            "after the login nothing is changed"
        );
        assert_eq!(to_broker, tune_ok(0));
    }
}
