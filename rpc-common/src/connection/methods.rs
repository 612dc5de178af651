//! The methods that the broker sends (AMQP 0-9-1, 1.2 to 1.9): those that we take, and those that
//! amiquip gets.
//!
//! amiquip parses methods with amq-protocol, which assumes that strings are UTF-8, and parses
//! nested tables by recursion. So it gets only methods that a broker may send to it, whose
//! arguments fit, and whose strings are made UTF-8. Pure.

use super::frames::{Frame, FrameError};
use crate::encoding::{Malformed, Reader};
use crate::properties::{Table, Value};
use std::str::from_utf8;

/// A method that concerns more than amiquip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method<'a> {
    /// `connection.tune`
    Tune,
    /// `connection.close`
    ConnectionClose { code: u16, text: &'a [u8] },
    /// `connection.blocked`
    Blocked { reason: &'a [u8] },
    /// `connection.unblocked`
    Unblocked,
    /// `channel.close`
    ChannelClose { code: u16, text: &'a [u8] },
    /// `channel.close-ok`
    ChannelCloseOk,
    /// `basic.cancel`
    Cancel,
    /// `basic.deliver`
    Deliver {
        delivery_tag: u64,
        is_redelivered: bool,
    },
    /// `basic.return`
    Return { routing_key: &'a [u8] },
    /// `basic.ack`: the broker has taken published messages.
    Ack {
        delivery_tag: u64,
        is_multiple: bool,
    },
    /// `basic.nack`: the broker has not taken published messages.
    Nack {
        delivery_tag: u64,
        is_multiple: bool,
    },
    /// Any other method that a broker may send.
    Other,
}

/// Offset of a method's arguments in its frame: after the frame header, the class and the method.
const ARGUMENTS: usize = 7 + 4;

impl<'a> Method<'a> {
    /// Reads the payload of a method frame.
    pub(crate) fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut arguments = Reader(payload);
        let class = arguments.short()?;
        let method = arguments.short()?;
        Ok(match (class, method) {
            (10, 30) => Method::Tune,
            (10, 50) => Method::ConnectionClose {
                code: arguments.short()?,
                text: arguments.short_string()?,
            },
            (10, 60) => Method::Blocked {
                reason: arguments.short_string()?,
            },
            (10, 61) => Method::Unblocked,
            (20, 40) => Method::ChannelClose {
                code: arguments.short()?,
                text: arguments.short_string()?,
            },
            (20, 41) => Method::ChannelCloseOk,
            (60, 30) => Method::Cancel,
            (60, 50) => {
                let _code = arguments.short()?;
                let _text = arguments.short_string()?;
                let _exchange = arguments.short_string()?;
                Method::Return {
                    routing_key: arguments.short_string()?,
                }
            }
            (60, 60) => {
                arguments.short_string()?; // the consumer tag: a channel has one consumer
                Method::Deliver {
                    delivery_tag: arguments.long_long()?,
                    is_redelivered: arguments.octet()? != 0,
                }
            }
            (60, 80) => Method::Ack {
                delivery_tag: arguments.long_long()?,
                is_multiple: arguments.octet()? & 1 != 0,
            },
            (60, 120) => Method::Nack {
                delivery_tag: arguments.long_long()?,
                is_multiple: arguments.octet()? & 1 != 0,
            },
            _ => Method::Other,
        })
    }
}

/// The encoding of an argument.
#[derive(Clone, Copy)]
enum Argument {
    /// A number, or bits, of this many bytes.
    Fixed(usize),
    ShortString,
    LongString,
    Table,
}
use Argument::{Fixed, LongString, ShortString};

/// The arguments of the methods that amiquip gets, by class and method. Others end the connection.
fn arguments(class: u16, method: u16) -> Result<&'static [Argument], Malformed> {
    Ok(match (class, method) {
        (10, 10) => &[Fixed(2), Argument::Table, LongString, LongString], // connection.start
        (10, 20) | (20, 11) => &[LongString], // connection.secure, channel.open-ok
        (10, 30) => &[Fixed(8)],              // connection.tune
        // connection.open-ok, basic.consume-ok, cancel-ok.
        (10, 41) | (60, 21 | 31) => &[ShortString],
        // connection.close-ok, channel.close-ok, queue.bind-ok, unbind-ok, basic.qos-ok
        (10, 51) | (20, 41) | (50, 21 | 51) | (60, 11) => &[],
        (20, 40) => &[Fixed(2), ShortString, Fixed(4)], // channel.close
        (50, 11) => &[ShortString, Fixed(8)],           // queue.declare-ok
        (60, 30) => &[ShortString, Fixed(1)],           // basic.cancel
        _ => return Err(Malformed),
    })
}

/// Depth of nested tables in `connection.start`, the only method with a table: RabbitMQ's
/// capabilities are a table in the server's properties.
const MAX_DEPTH: u32 = 2;

/// Appends a method frame to what amiquip gets, with `?` in place of bytes that are not UTF-8.
///
/// # Errors
/// [`FrameError::Malformed`] if a broker does not send such a method to a client, or its arguments
/// cannot be read. Then nothing is appended.
pub(crate) fn put_for_amiquip(to: &mut Vec<u8>, frame: Frame) -> Result<(), FrameError> {
    let mut reader = Reader(frame.payload);
    let layouts = arguments(reader.short()?, reader.short()?)?;
    let len = reader.0.len();
    let mut texts = Vec::new();
    for layout in layouts {
        let text = match layout {
            Fixed(len) => {
                reader.bytes(*len)?;
                continue;
            }
            Argument::Table => {
                check_table(Table(reader.long_string()?), MAX_DEPTH)?;
                continue;
            }
            ShortString => reader.short_string()?,
            LongString => reader.long_string()?,
        };
        let end = ARGUMENTS + len - reader.0.len();
        texts.push(end - text.len()..end);
    }
    let start = to.len();
    to.extend_from_slice(frame.bytes);
    for text in texts {
        replace_invalid_utf8(&mut to[start..][text]);
    }
    Ok(())
}

/// Refuses a table that is nested deeper than `depth`, that has arrays, or whose text is not UTF-8.
fn check_table(table: Table, depth: u32) -> Result<(), Malformed> {
    let mut reader = Reader(table.0);
    while !reader.0.is_empty() {
        let name = reader.short_string()?;
        from_utf8(name).map_err(|_| Malformed)?;
        match Value::parse(&mut reader)? {
            Value::Table(table) if depth > 1 => check_table(table, depth - 1)?,
            Value::Table(_) | Value::Array(_) => return Err(Malformed),
            Value::Text(text) => drop(from_utf8(text).map_err(|_| Malformed)?),
            _ => {}
        }
    }
    Ok(())
}

fn replace_invalid_utf8(mut bytes: &mut [u8]) {
    while let Err(error) = from_utf8(bytes) {
        let start = error.valid_up_to();
        let end = error.error_len().map_or(bytes.len(), |len| start + len);
        bytes[start..end].fill(b'?');
        bytes = &mut bytes[end..];
    }
}

/// `connection.tune` as amiquip gets it: without heartbeats, which are ours. Returns the broker's
/// interval in seconds.
pub(crate) fn take_heartbeat(tune: &mut [u8]) -> u16 {
    const HEARTBEAT: usize = ARGUMENTS + 2 + 4; // after channel-max and frame-max
    let interval = u16::from_be_bytes([tune[HEARTBEAT], tune[HEARTBEAT + 1]]);
    tune[HEARTBEAT..HEARTBEAT + 2].fill(0);
    interval
}

#[cfg(test)]
mod tests {
    use super::super::frames::{put_method, METHOD};
    use super::*;
    use crate::encoding::put_long_string;
    use amq_protocol::frame::{parse_frame, AMQPFrame};
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn method(class: u16, method: u16, arguments: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_method(&mut bytes, 0, (class, method), |to| {
            to.extend_from_slice(arguments);
        });
        bytes
    }

    fn for_amiquip(bytes: &[u8]) -> Result<Vec<u8>, FrameError> {
        let mut to = b"before".to_vec();
        let payload = &bytes[7..bytes.len() - 1];
        put_for_amiquip(
            &mut to,
            Frame {
                kind: METHOD,
                channel: 0,
                payload,
                bytes,
            },
        )?;
        Ok(to.split_off(6))
    }

    #[test]
    fn messages_confirmations_and_ends_are_told_from_other_methods() {
        for (class, number, arguments, expected) in [
            (10, 30, &[0, 0, 0, 2, 0, 0, 0, 60][..], Method::Tune),
            (
                10,
                50,
                b"\x01\x40\x02by\0\0\0\0",
                Method::ConnectionClose {
                    code: 320,
                    text: b"by",
                },
            ),
            (10, 60, b"\x03mem", Method::Blocked { reason: b"mem" }),
            (10, 61, b"", Method::Unblocked),
            (
                20,
                40,
                b"\x01\x94\x02no\0\0\0\0",
                Method::ChannelClose {
                    code: 404,
                    text: b"no",
                },
            ),
            (20, 41, b"", Method::ChannelCloseOk),
            (60, 30, b"\x01t\x01", Method::Cancel),
            (
                60,
                50,
                b"\x01\x38\x01t\0\x03q\xffx",
                Method::Return {
                    routing_key: b"q\xffx",
                },
            ),
            (
                60,
                60,
                b"\x01t\0\0\0\0\0\0\0\x07\x01\0\0",
                Method::Deliver {
                    delivery_tag: 7,
                    is_redelivered: true,
                },
            ),
            (
                60,
                80,
                b"\0\0\0\0\0\0\0\x07\x01",
                Method::Ack {
                    delivery_tag: 7,
                    is_multiple: true,
                },
            ),
            (
                60,
                120,
                b"\0\0\0\0\0\0\0\x07\x02",
                Method::Nack {
                    delivery_tag: 7,
                    is_multiple: false,
                },
            ),
            (60, 21, b"\x01t", Method::Other),
        ] {
            let bytes = method(class, number, arguments);
            assert_eq!(Method::parse(&bytes[7..bytes.len() - 1]), Ok(expected));
        }
        assert_eq!(Method::parse(&[0, 60, 0]), Err(Malformed));
        assert_eq!(Method::parse(b"\0\x3c\0\x50\0\0"), Err(Malformed));
    }

    #[test]
    fn what_is_not_utf8_in_a_method_becomes_question_marks() {
        let close = |text: &[u8]| method(20, 40, &[&[1, 148, 4], text, &[0, 60, 0, 40]].concat());
        assert_eq!(for_amiquip(&close(b"\xffa\xe2\x82")), Ok(close(b"?a??")));
        assert_eq!(for_amiquip(&close(b"good")), Ok(close(b"good")));
    }

    fn start(table: &[u8]) -> Vec<u8> {
        let mut arguments = vec![0, 9];
        put_long_string(&mut arguments, table);
        put_long_string(&mut arguments, b"PLAIN");
        put_long_string(&mut arguments, b"en_US");
        method(10, 10, &arguments)
    }

    #[test]
    fn connection_start_has_tables_as_rabbitmq_sends_them_only() {
        let rabbitmq =
            start(b"\x0ccapabilitiesF\0\0\0\x0d\x0abasic.nackt\x01\x07productS\0\0\0\x08RabbitMQ");
        assert_eq!(for_amiquip(&rabbitmq), Ok(rabbitmq));
        for table in [
            &b"\x01aF\0\0\0\x0e\x01bF\0\0\0\x07\x01cF\0\0\0\0"[..], // three deep
            b"\x01aA\0\0\0\0",
            b"\x01aS\0\0\0\x01\xff",
            b"\x01\xffV",
            b"\x01az",
            b"\x01aI\0\0",
        ] {
            assert_eq!(
                for_amiquip(&start(table)),
                Err(FrameError::Malformed),
                "{table:?}"
            );
        }
    }

    #[test]
    fn no_method_of_a_message_reaches_amiquip_and_none_that_only_clients_send() {
        for class in [10, 20, 30, 40, 50, 60, 85, 90] {
            for number in 0..=130 {
                let is_forwarded = for_amiquip(&method(class, number, &[0; 40])).is_ok();
                assert_eq!(is_forwarded, arguments(class, number).is_ok());
                assert!(
                    !is_forwarded
                        || ![40, 50, 60, 71, 72, 80, 90, 120].contains(&number)
                        || class != 60
                );
            }
        }
    }

    #[test]
    fn tune_tells_amiquip_that_there_are_no_heartbeats() {
        let mut tune = method(10, 30, &[0, 1, 0, 2, 0, 0, 0, 60]);
        assert_eq!(take_heartbeat(&mut tune), 60);
        assert_eq!(tune, method(10, 30, &[0, 1, 0, 2, 0, 0, 0, 0]));
    }

    proptest! {
        #[test]
        fn what_amiquip_gets_is_parsed(
            class in prop_oneof![Just(10u16), Just(20), Just(50), Just(60)],
            number in 10u16..60,
            arguments in vec(any::<u8>(), 0..60),
        ) {
            if let Ok(bytes) = for_amiquip(&method(class, number, &arguments)) {
                let (rest, frame) = parse_frame(&bytes).unwrap();
                prop_assert!(rest.is_empty() && matches!(frame, AMQPFrame::Method(0, _)));
            }
        }
    }
}
