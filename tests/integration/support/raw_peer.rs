//! A peer that encodes its own frames, to publish what no client library can.

use super::TEST_TIMEOUT;
use std::io::{Read, Write};
use std::net::TcpStream;

const TYPE_METHOD: u8 = 1;
const TYPE_CONTENT_HEADER: u8 = 2;
const TYPE_BODY: u8 = 3;

/// Flags of properties in a content header (AMQP 0-9-1, 4.2.6.1).
pub(crate) const HEADERS: u16 = 1 << 13;
pub(crate) const CORRELATION_ID: u16 = 1 << 10;
pub(crate) const REPLY_TO: u16 = 1 << 9;
pub(crate) const EXPIRATION: u16 = 1 << 8;

/// A connection with one channel.
pub(crate) struct RawPeer(TcpStream);

impl RawPeer {
    /// Connects to a private node as user guest.
    pub(crate) fn connect(url: &str) -> Self {
        let stream =
            TcpStream::connect(url.trim_start_matches("amqp://")).expect("the node listens");
        stream
            .set_read_timeout(Some(TEST_TIMEOUT))
            .expect("the timeout is not zero");
        let mut peer = RawPeer(stream);
        peer.0
            .write_all(b"AMQP\x00\x00\x09\x01")
            .expect("the connection is open");
        peer.expect_method([0, 10, 0, 10]); // connection.start
        let login = [
            &[0; 4][..],
            b"\x05PLAIN",
            b"\x00\x00\x00\x0c\x00guest\x00guest",
            b"\x05en_US",
        ];
        peer.send(
            0,
            TYPE_METHOD,
            &[&[0, 10, 0, 11], &login.concat()[..]].concat(),
        ); // start-ok
        let tune = peer.expect_method([0, 10, 0, 30]);
        let without_heartbeat = [&tune[4..10], &[0, 0]].concat();
        peer.send(
            0,
            TYPE_METHOD,
            &[&[0, 10, 0, 31], &without_heartbeat[..]].concat(),
        ); // tune-ok
        peer.send(0, TYPE_METHOD, b"\x00\x0a\x00\x28\x01/\x00\x00"); // connection.open
        peer.expect_method([0, 10, 0, 41]);
        peer.send(1, TYPE_METHOD, b"\x00\x14\x00\x0a\x00"); // channel.open
        peer.expect_method([0, 20, 0, 11]);
        peer
    }

    /// Publishes the body `30` to an exchange and a routing key, with these property flags and
    /// encoded properties. Waits until the broker has processed it.
    pub(crate) fn publish(
        &mut self,
        (exchange, routing_key): (&str, &[u8]),
        flags: u16,
        properties: &[&[u8]],
    ) {
        let publish = [&[0, 60, 0, 40, 0, 0][..], &short_str(exchange.as_bytes())];
        let publish = [&publish.concat()[..], &short_str(routing_key), &[0]].concat();
        self.send(1, TYPE_METHOD, &publish);
        let fixed = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
        let header = [&fixed, &flags.to_be_bytes()[..], &properties.concat()].concat();
        self.send(1, TYPE_CONTENT_HEADER, &header);
        self.send(1, TYPE_BODY, b"30");
        self.send(1, TYPE_METHOD, &[0, 60, 0, 10, 0, 0, 0, 0, 0, 0, 0]); // basic.qos
        self.expect_method([0, 60, 0, 11]);
    }

    /// Waits for a message in the queue. Returns the whole frame of its content header, and its
    /// body.
    pub(crate) fn take(&mut self, queue: &str) -> (Vec<u8>, Vec<u8>) {
        super::eventually("a message", || {
            let get = [
                &[0, 60, 0, 70, 0, 0][..],
                &short_str(queue.as_bytes()),
                &[1],
            ]
            .concat();
            self.send(1, TYPE_METHOD, &get);
            let answer = self.next_frame();
            (answer[7..11] == [0, 60, 0, 71]).then_some(())
        });
        let header = self.next_frame();
        let body = self.next_frame();
        (header, body[7..body.len() - 1].to_vec())
    }

    fn send(&mut self, channel: u8, kind: u8, payload: &[u8]) {
        let size = u32::try_from(payload.len())
            .expect("the payload is small")
            .to_be_bytes();
        let frame = [&[kind, 0, channel], &size[..], payload, &[0xce]].concat();
        self.0.write_all(&frame).expect("the connection is open");
    }

    /// Reads a frame, checks that it is this method, and returns its payload.
    #[track_caller]
    fn expect_method(&mut self, method: [u8; 4]) -> Vec<u8> {
        let frame = self.next_frame();
        let payload = &frame[7..frame.len() - 1];
        assert_eq!(payload[..4], method, "{}", String::from_utf8_lossy(payload));
        payload.to_vec()
    }

    fn next_frame(&mut self) -> Vec<u8> {
        let mut head = [0; 7];
        self.0
            .read_exact(&mut head)
            .expect("the connection is open");
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut frame = [&head[..], &vec![0; size + 1]].concat();
        self.0
            .read_exact(&mut frame[7..])
            .expect("the connection is open");
        frame
    }
}

pub(crate) fn short_str(text: &[u8]) -> Vec<u8> {
    [
        &[u8::try_from(text.len()).expect("the text is short")],
        text,
    ]
    .concat()
}

pub(crate) fn long_str(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).expect("the text is short enough");
    [&len.to_be_bytes()[..], bytes].concat()
}

/// A table that contains a table, which contains a table, and so on: `size` bytes or a few less.
pub(crate) fn nested_tables(size: usize) -> Vec<u8> {
    nested(size, b"\x01aF", b"\x01aF")
}

/// A table that contains an array, which contains an array, and so on: `size` bytes or a few less.
pub(crate) fn nested_arrays(size: usize) -> Vec<u8> {
    nested(size, b"\x01aA", b"A")
}

fn nested(size: usize, outermost: &[u8], inner: &[u8]) -> Vec<u8> {
    let level = inner.len() + 4;
    let levels = (size - outermost.len() - 4) / level;
    let len = |inside: usize| {
        u32::try_from(inside * level)
            .expect("the size is small")
            .to_be_bytes()
    };
    let mut table = [outermost, &len(levels)].concat();
    for inside in (0..levels).rev() {
        table.extend([inner, &len(inside)].concat());
    }
    long_str(&table)
}

/// A table with one header whose value has `size` bytes.
pub(crate) fn large_table(size: usize) -> Vec<u8> {
    long_str(&[b"\x01aS", &long_str(&vec![b'x'; size])[..]].concat())
}
