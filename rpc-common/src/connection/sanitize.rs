//! Makes frames from the broker safe before amiquip parses them.
//!
//! RabbitMQ delivers a message's properties as the publisher sent them, whatever they contain. amiquip parses them with
//! amq-protocol, which has two weaknesses. It parses nested tables by recursion, so deep ones overflow the stack. It
//! assumes that strings are UTF-8: it drops the property that is not and all after it, or ends the connection.
//! [`sanitize`] changes such frames in place. All lengths stay the same, so no other byte has to move.
//!
//! This module is pure: no sockets, no recursion.

use amq_protocol::protocol::constants::{FRAME_HEADER, FRAME_METHOD};
use std::ops::Range;
use std::str::from_utf8;

/// The maximum nesting depth of tables and arrays. The outermost table counts as 1.
///
/// amq-protocol needs a few kilobytes of stack for each level. No known application comes near this depth.
pub const MAX_DEPTH: usize = 32;

/// The **changes** that [`sanitize`] made to a content header, as far as they concern a reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The original correlation id, if it was changed. The changed one has the same length.
    pub original_correlation_id: Option<Vec<u8>>,
    /// Whether the reply-to was changed: it no longer names the publisher's queue.
    pub is_reply_to_changed: bool,
}

impl Changes {
    /// Whether neither the correlation id nor the reply-to was changed.
    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }
}

/// A **malformed** frame has fields that do not fit into it, or fields of an unknown type. RabbitMQ does not send any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// How a field is encoded (AMQP 0-9-1, 4.2.5). A **field** is a property of a message, an argument of a method, or a
/// value in a table or array.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// A number, or bits, of this many bytes.
    Fixed(usize),
    /// A length of 1 byte, then UTF-8.
    ShortStr,
    /// A short string that [`Changes`] mention.
    CorrelationId,
    /// A short string that [`Changes`] mention.
    ReplyTo,
    /// A length of 4 bytes, as in all below, then bytes that amq-protocol parses as UTF-8.
    LongStr,
    ByteArray,
    /// Entries: a name (a short string), a type (1 byte) and a value.
    Table,
    /// Elements: a type (1 byte) and a value.
    Array,
}
use Layout::{Array, ByteArray, CorrelationId, Fixed, LongStr, ReplyTo, ShortStr, Table};

const OCTET: Layout = Fixed(1);
const SHORT: Layout = Fixed(2);
const LONG: Layout = Fixed(4);
const LONG_LONG: Layout = Fixed(8);

/// A frame consists of a type (1 byte), a channel (2), the payload's size (4), the payload and an end byte.
const SIZE_OFFSET: usize = 3;
const END_LEN: usize = 1;
/// A content header's payload starts with a class (2 bytes), a weight (2) and the body's size (8). The property flags
/// follow (2), then the properties.
const CONTENT_HEADER_START: Layout = Fixed(12);

/// The properties of a message, in the order of their flags, from the highest bit down.
const PROPERTIES: [Layout; 14] = [
    ShortStr,      // content-type
    ShortStr,      // content-encoding
    Table,         // headers
    OCTET,         // delivery-mode
    OCTET,         // priority
    CorrelationId, // correlation-id
    ReplyTo,       // reply-to
    ShortStr,      // expiration
    ShortStr,      // message-id
    LONG_LONG,     // timestamp
    ShortStr,      // type
    ShortStr,      // user-id
    ShortStr,      // app-id
    ShortStr,      // cluster-id
];
const FIRST_PROPERTY_FLAG: usize = 1 << 15;

/// Changes a frame so that amq-protocol parses it safely and completely. `frame` is a whole frame, from its type to its
/// end byte.
///
/// - A table or array deeper than [`MAX_DEPTH`] becomes a byte array.
/// - A long string in a table or array that is not UTF-8 becomes a byte array.
/// - In all other strings, and in the names in a table, each byte that is not UTF-8 becomes `?`.
///
/// Frames without fields (bodies, heartbeats) and unknown methods are not changed: amiquip handles them. Bytes after the
/// last field and flags without a property are not changed either: amq-protocol ignores both.
///
/// # Errors
///
/// [`Malformed`] if the fields cannot be read. The frame may be changed in part.
pub fn sanitize(frame: &mut [u8]) -> Result<Changes, Malformed> {
    let mut changes = Changes::default();
    let (layouts, mut rest) = fields(frame)?;
    for layout in layouts {
        let content = split_off(frame, &mut rest, layout)?;
        let is_text = matches!(layout, ShortStr | CorrelationId | ReplyTo | LongStr);
        if layout == Table {
            sanitize_table(frame, content)?;
        } else if is_text && from_utf8(&frame[content.clone()]).is_err() {
            let text = &mut frame[content];
            match layout {
                CorrelationId => changes.original_correlation_id = Some(text.to_vec()),
                ReplyTo => changes.is_reply_to_changed = true,
                _ => {}
            }
            replace_invalid_utf8(text);
        }
    }
    Ok(changes)
}

/// Returns the range of the correlation id's bytes in a content header frame, or `None` if the frame has none.
pub fn correlation_id_range(frame: &[u8]) -> Option<Range<usize>> {
    let (layouts, mut rest) = fields(frame).ok()?;
    for layout in layouts {
        let content = split_off(frame, &mut rest, layout).ok()?;
        if layout == CorrelationId {
            return Some(content);
        }
    }
    None
}

/// Returns the layouts of a frame's fields, and the range of their bytes.
fn fields(frame: &[u8]) -> Result<(impl Iterator<Item = Layout>, Range<usize>), Malformed> {
    let mut rest = SIZE_OFFSET..frame.len();
    let Some(&frame_type @ (FRAME_METHOD | FRAME_HEADER)) = frame.first() else {
        return Ok((present(&[], 0), rest));
    };
    let payload = split_off(frame, &mut rest, ByteArray)?; // a byte array is a size and bytes, too
    if rest.len() != END_LEN {
        return Err(Malformed);
    }
    rest = payload;
    let mut read = |layout| split_off(frame, &mut rest, layout).map(|content| number(&frame[content]));
    let layouts = if frame_type == FRAME_METHOD {
        present(arguments(read(SHORT)?, read(SHORT)?)?, ALL_PRESENT)
    } else {
        read(CONTENT_HEADER_START)?;
        present(&PROPERTIES, read(SHORT)?)
    };
    Ok((layouts, rest))
}

/// The flags of a method, which has all of its arguments.
const ALL_PRESENT: usize = usize::MAX;

/// Selects the layouts whose flag is set.
fn present(layouts: &'static [Layout], flags: usize) -> impl Iterator<Item = Layout> {
    let is_set = move |index| flags & (FIRST_PROPERTY_FLAG >> index) != 0;
    layouts.iter().enumerate().filter(move |(index, _)| is_set(*index)).map(|(_, layout)| *layout)
}

/// Returns the layouts of a method's arguments; an unknown method has none.
fn arguments(class: usize, method: usize) -> Result<&'static [Layout], Malformed> {
    Ok(match (class, method) {
        (10, 10) => &[OCTET, OCTET, Table, LongStr, LongStr], // connection.start
        (10, 20) | (20, 11) => &[LongStr],                    // connection.secure, channel.open-ok
        (10, 30) => &[SHORT, LONG, SHORT],                    // connection.tune
        (10, 41 | 60) | (60, 21 | 31 | 72) => &[ShortStr], // connection.open-ok, blocked, basic.consume-ok, cancel-ok, get-empty
        (10, 50) | (20, 40) => &[SHORT, ShortStr, SHORT, SHORT], // connection.close, channel.close
        (20, 20 | 21) => &[OCTET],                         // channel.flow, flow-ok
        (30, 11) => &[SHORT],                              // access.request-ok
        (50, 11) => &[ShortStr, LONG, LONG],               // queue.declare-ok
        (50, 31 | 41) => &[LONG],                          // queue.purge-ok, delete-ok
        (60, 30) => &[ShortStr, OCTET],                    // basic.cancel
        (60, 50) => &[SHORT, ShortStr, ShortStr, ShortStr], // basic.return
        (60, 60) => &[ShortStr, LONG_LONG, OCTET, ShortStr, ShortStr], // basic.deliver
        (60, 71) => &[LONG_LONG, OCTET, ShortStr, ShortStr, LONG], // basic.get-ok
        (60, 80 | 90 | 120) => &[LONG_LONG, OCTET],        // basic.ack, reject, nack
        // Only clients send these methods. amq-protocol would parse the table in them.
        (10, 11) | (40, 10 | 30 | 40) | (50, 10 | 20 | 50) | (60, 20) => return Err(Malformed),
        _ => &[],
    })
}

const BYTE_ARRAY_TYPE: u8 = b'x';

/// Returns the layout of a value in a table or array.
///
/// The types are those of RabbitMQ, which differ from AMQP 0-9-1: see <https://www.rabbitmq.com/amqp-0-9-1-errata>.
/// amq-protocol parses them in the same way; it also accepts `U`, as another `s`.
fn value_layout(value_type: u8) -> Result<Layout, Malformed> {
    Ok(match value_type {
        b'V' => Fixed(0),
        b't' | b'b' | b'B' => OCTET,
        b's' | b'U' | b'u' => SHORT,
        b'I' | b'i' | b'f' => LONG,
        b'D' => Fixed(5), // a scale and a LONG
        b'l' | b'L' | b'd' | b'T' => LONG_LONG,
        b'S' => LongStr,
        BYTE_ARRAY_TYPE => ByteArray,
        b'F' => Table,
        b'A' => Array,
        _ => return Err(Malformed),
    })
}

/// Splits a field off the front of `rest`, and returns the range of its content: without the length in front of it.
fn split_off(frame: &[u8], rest: &mut Range<usize>, layout: Layout) -> Result<Range<usize>, Malformed> {
    let len = match layout {
        Fixed(len) => len,
        ShortStr | CorrelationId | ReplyTo => number(&frame[split_off_bytes(rest, 1)?]),
        LongStr | ByteArray | Table | Array => number(&frame[split_off_bytes(rest, 4)?]),
    };
    split_off_bytes(rest, len)
}

fn split_off_bytes(rest: &mut Range<usize>, len: usize) -> Result<Range<usize>, Malformed> {
    if len > rest.len() {
        return Err(Malformed);
    }
    let start = rest.start;
    rest.start += len;
    Ok(start..rest.start)
}

fn number(big_endian: &[u8]) -> usize {
    big_endian.iter().fold(0, |number, &byte| number << 8 | usize::from(byte))
}

/// Sanitizes a table and everything in it. Instead of recursion it uses a stack of nested tables and arrays, each with
/// the range that is not sanitized yet.
fn sanitize_table(frame: &mut [u8], content: Range<usize>) -> Result<(), Malformed> {
    let mut stack = vec![(Table, content)];
    while let Some((container, rest)) = stack.last_mut() {
        if rest.start == rest.end {
            stack.pop();
            continue;
        }
        if *container == Table {
            let name = split_off(frame, rest, ShortStr)?;
            replace_invalid_utf8(&mut frame[name]);
        }
        let type_offset = split_off(frame, rest, OCTET)?.start;
        let layout = value_layout(frame[type_offset])?;
        let value = split_off(frame, rest, layout)?;
        match layout {
            LongStr if from_utf8(&frame[value.clone()]).is_ok() => {}
            Table | Array if stack.len() < MAX_DEPTH => stack.push((layout, value)),
            LongStr | Table | Array => frame[type_offset] = BYTE_ARRAY_TYPE,
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

#[cfg(test)]
#[path = "../../../tests/fuzz/check.rs"]
mod check;

#[cfg(test)]
mod tests {
    use super::check::{check, depth_of_table};
    use super::*;
    use amq_protocol::frame::generation::gen_content_header_frame;
    use amq_protocol::frame::{parse_frame, AMQPFrame};
    use amq_protocol::protocol::basic::AMQPProperties;
    use amq_protocol::protocol::AMQPClass;
    use amq_protocol::types::parsing::parse_value;
    use amq_protocol::types::{AMQPValue, FieldTable};
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use proptest::sample::{select, Index};
    use std::{fs, thread};

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[kind, 0, 1][..], &long(payload.len()), payload, &[0xce]].concat()
    }

    fn long(number: usize) -> [u8; 4] {
        u32::try_from(number).unwrap().to_be_bytes()
    }

    fn short_str(text: &[u8]) -> Vec<u8> {
        [&[u8::try_from(text.len()).unwrap()], text].concat()
    }

    fn long_str(bytes: &[u8]) -> Vec<u8> {
        [&long(bytes.len())[..], bytes].concat()
    }

    /// A content header frame with these property flags, and these bytes behind them.
    fn header(flags: u16, properties: &[u8]) -> Vec<u8> {
        let fixed = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
        frame(2, &[&fixed[..], &flags.to_be_bytes(), properties].concat())
    }

    /// A content header frame whose only property is this table of headers.
    fn headers(table: &[u8]) -> Vec<u8> {
        header(1 << 13, &long_str(table))
    }

    fn sanitized(mut frame: Vec<u8>) -> (Vec<u8>, Changes) {
        let changes = sanitize(&mut frame).unwrap();
        (frame, changes)
    }

    fn properties(frame: &[u8]) -> AMQPProperties {
        match parse_frame(frame).unwrap() {
            ([], AMQPFrame::Header(_, _, header)) => header.properties,
            other => panic!("{other:?}"),
        }
    }

    fn method(frame: &[u8]) -> AMQPClass {
        match parse_frame(frame).unwrap() {
            ([], AMQPFrame::Method(_, method)) => method,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_utf8_in_a_property_becomes_question_marks_and_hides_no_other() {
        let ids = [short_str(b"\xff\xc3\xa9x\xe2\x82"), short_str(b"to\x80"), short_str(b"500")];
        let frame = header(0b111 << 8, &ids.concat());
        assert_eq!(properties(&frame), AMQPProperties::default(), "what amq-protocol makes of it");
        let (frame, changes) = sanitized(frame);
        let properties = properties(&frame);
        assert_eq!(properties.correlation_id().as_deref(), Some("?\u{e9}x??"));
        assert_eq!(properties.reply_to().as_deref(), Some("to?"));
        assert_eq!(properties.expiration().as_deref(), Some("500"));
        let original = b"\xff\xc3\xa9x\xe2\x82".to_vec();
        assert_eq!(changes, Changes { original_correlation_id: Some(original), is_reply_to_changed: true });
        assert_eq!(&frame[correlation_id_range(&frame).unwrap()], "?\u{e9}x??".as_bytes());
    }

    #[test]
    fn the_correlation_id_is_found_behind_other_properties_and_nowhere_else() {
        let all_before = [&b"\x01t\x01e\0\0\0\x03\x01nV\x01\x02"[..], b"\x02id"].concat();
        let frame = header(0b11_1111 << 10, &all_before);
        assert_eq!(&frame[correlation_id_range(&frame).unwrap()], b"id");
        assert_eq!(correlation_id_range(&header(1 << 9, b"\x02id")), None);
        assert_eq!(correlation_id_range(&header(1 << 10, b"\x03id")), None);
        assert_eq!(correlation_id_range(&deliver(b"\x02id")), None);
        assert_eq!(correlation_id_range(&[]), None);
    }

    #[test]
    fn in_a_table_what_is_not_utf8_becomes_bytes_and_a_name_question_marks() {
        let (frame, changes) = sanitized(headers(b"\x02a\xffS\0\0\0\x02b\xff\x01cA\0\0\0\x06S\0\0\0\x01\xfe"));
        assert_eq!(frame, headers(b"\x02a?x\0\0\0\x02b\xff\x01cA\0\0\0\x06x\0\0\0\x01\xfe"));
        assert_eq!(changes, Changes::default());
    }

    #[test]
    fn every_letter_of_rabbitmq_is_followed() {
        let table = b"\x01at\x01\x01bb\x01\x01cB\x01\x01ds\0\x01\x01eu\0\x01\x01fI\0\0\0\x01\x01gi\0\0\0\x01\
            \x01hl\0\0\0\0\0\0\0\x01\x01iL\0\0\0\0\0\0\0\x01\x01jf\0\0\0\0\x01kd\0\0\0\0\0\0\0\0\
            \x01lD\x02\0\0\0\x01\x01mT\0\0\0\0\0\0\0\x01\x01nS\0\0\0\x01s\x01oA\0\0\0\x01V\x01pF\0\0\0\0\
            \x01qx\0\0\0\x01\xff\x01rV\x01sU\0\x01";
        let (frame, _) = sanitized(headers(table));
        assert_eq!(frame, headers(table));
        assert_eq!(properties(&frame).headers().as_ref().unwrap().len(), 19);
    }

    #[test]
    fn what_does_not_fit_or_is_unknown_is_malformed() {
        for bytes in [
            headers(b"\x01az"),                           // a letter that nobody knows
            headers(b"\x01aI\0\0\0"),                     // a number cut short
            headers(b"\x01aS\0\0\0\x02b"),                // a string longer than its table
            headers(b"\x01aF\0\0\0\x04\x01bI\0\0\0\0\0"), // and a number longer than its own
            headers(b"\x01a"),
            headers(b"\x02a"),
            header(1 << 15, b"\x02a"),
            header(1 << 15, b""),
            header(1 << 13, b"\xff\xff\xff\xff"),
            frame(2, &[0; 13]),
            frame(1, &[0; 3]),
            deliver(b"\x03id"),
            vec![1],
            vec![2, 0, 1, 0, 0, 0, 0],
            vec![2, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xce],
            [header(0, b""), vec![0]].concat(),
        ] {
            assert_eq!(sanitize(&mut bytes.clone()), Err(Malformed), "{bytes:?}");
        }
    }

    #[test]
    fn what_amqp_protocol_ignores_is_left_alone() {
        let trailing = header(1 << 10 | 0b11, b"\x02id\xff\xff");
        assert_eq!(sanitized(trailing.clone()).0, trailing);
        assert_eq!(properties(&trailing).correlation_id().as_deref(), Some("id"));
        let unknown = frame(1, &[0, 10, 0, 71, 0xff]);
        assert_eq!(sanitized(unknown.clone()).0, unknown);
        for kind in [3, 8, 0, 255] {
            let other = frame(kind, b"\x01aS\0\0\0\x01\xff");
            assert_eq!(sanitized(other.clone()).0, other);
        }
        assert_eq!(sanitize(&mut []), Ok(Changes::default()));
    }

    /// basic.deliver with this consumer tag.
    fn deliver(tag: &[u8]) -> Vec<u8> {
        let rest = b"\0\0\0\0\0\0\0\x07\x01\x02e\xff\x02k\xfe";
        frame(1, &[&[0, 60, 0, 60], tag, rest].concat())
    }

    #[test]
    fn what_is_not_utf8_in_a_methods_arguments_becomes_question_marks() {
        let deliver = method(&sanitized(deliver(b"\x02t\xff")).0);
        let AMQPClass::Basic(amq_protocol::protocol::basic::AMQPMethod::Deliver(deliver)) = deliver else {
            panic!("{deliver:?}");
        };
        assert_eq!((&*deliver.consumer_tag, deliver.delivery_tag), ("t?", 7));
        assert_eq!((&*deliver.exchange, &*deliver.routing_key), ("e?", "k?"));
        let start = b"\0\x0a\0\x0a\0\x09\0\0\0\x08\x01\xffS\0\0\0\x01\xff\0\0\0\x02P\xff\0\0\0\x01\xfe";
        let changed = b"\0\x0a\0\x0a\0\x09\0\0\0\x08\x01?x\0\0\0\x01\xff\0\0\0\x02P?\0\0\0\x01?";
        assert_eq!(sanitized(frame(1, start)).0, frame(1, changed));
    }

    // Tests run on threads with stacks of 2 MiB, as amiquip's thread does by default.
    #[test]
    fn a_hundred_kilobytes_of_nested_tables_and_arrays_become_harmless() {
        for size in [7, 5] {
            // From the outside in: each level holds all that follow.
            let levels = 100_000 / size;
            let value = (1..=levels).rev().flat_map(|inner| match size {
                7 => [&b"\x01nF"[..], &long((inner - 1) * 7)].concat(),
                _ => [&b"A"[..], &long((inner - 1) * 5)].concat(),
            });
            let name = if size == 7 { &b""[..] } else { b"\x01n" };
            let bytes = headers(&[name, &value.collect::<Vec<_>>()].concat());
            let parsed = thread::spawn(|| properties(&sanitized(bytes).0)).join().unwrap();
            assert_eq!(depth_of_table(parsed.headers().as_ref().unwrap()), MAX_DEPTH);
        }
    }

    #[test]
    fn no_method_brings_deep_tables_past() {
        let bomb: Vec<u8> = (0..2000).rev().flat_map(|level| [&long(level * 7 + 7)[..], b"\x01nF"].concat()).collect();
        let bomb = [&bomb[..], &[0; 4], &[0; 16]].concat();
        for class in [10, 20, 30, 40, 50, 60, 85, 90] {
            for method in 0..=130 {
                for zeros in 0..16 {
                    let bytes = frame(1, &[&[0, class, 0, method], &[0; 16][..zeros], &bomb].concat());
                    check(&bytes);
                }
            }
        }
    }

    /// The values that a hostile publisher can put into a table.
    #[derive(Clone, Debug)]
    enum Value {
        /// A type's letter, and as many bytes as it has.
        Fixed(u8, Vec<u8>),
        LongStr(Vec<u8>),
        Table(Vec<(Vec<u8>, Value)>),
        Array(Vec<Value>),
    }

    impl Value {
        fn encode(&self) -> Vec<u8> {
            match self {
                Value::Fixed(letter, bytes) => [&[*letter], &bytes[..]].concat(),
                Value::LongStr(bytes) => [b"S", &long_str(bytes)[..]].concat(),
                Value::Table(entries) => {
                    let entry = |(name, value): &(Vec<u8>, Value)| [short_str(name), value.encode()].concat();
                    [b"F", &*long_str(&entries.iter().flat_map(entry).collect::<Vec<_>>())].concat()
                }
                Value::Array(values) => {
                    [b"A", &*long_str(&values.iter().flat_map(Value::encode).collect::<Vec<_>>())].concat()
                }
            }
        }

        /// What amq-protocol is to make of this value, inside so many tables and arrays.
        fn expected(&self, depth: usize) -> AMQPValue {
            match self {
                Value::Fixed(..) => parse_value(&self.encode()).unwrap().1,
                Value::LongStr(bytes) => {
                    String::from_utf8(bytes.clone()).map_or(AMQPValue::ByteArray(bytes.clone()), AMQPValue::LongString)
                }
                _ if depth == MAX_DEPTH => AMQPValue::ByteArray(self.encode()[5..].to_vec()),
                Value::Table(entries) => {
                    let entry = |(name, value): &(Vec<u8>, Value)| (question_marks(name), value.expected(depth + 1));
                    AMQPValue::FieldTable(entries.iter().map(entry).collect())
                }
                Value::Array(values) => {
                    AMQPValue::FieldArray(values.iter().map(|value| value.expected(depth + 1)).collect())
                }
            }
        }
    }

    fn question_marks(bytes: &[u8]) -> String {
        let question = |chunk: std::str::Utf8Chunk| format!("{}{}", chunk.valid(), "?".repeat(chunk.invalid().len()));
        bytes.utf8_chunks().map(question).collect()
    }

    /// Text of at most so many bytes, which is often not UTF-8.
    fn text(max: usize) -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            "[a-z\u{e9}\u{20ac}]{0,6}".prop_map(String::into_bytes),
            vec(prop_oneof![Just(b'a'), 0x80u8..], 0..max),
        ]
    }

    fn value() -> impl Strategy<Value = Value> {
        let fixed = prop_oneof![
            Just((b'V', 0)),
            Just((b't', 1)),
            Just((b'b', 1)),
            Just((b'B', 1)),
            Just((b's', 2)),
            Just((b'u', 2)),
            Just((b'U', 2)),
            Just((b'I', 4)),
            Just((b'i', 4)),
            Just((b'D', 5)),
            Just((b'l', 8)),
            Just((b'L', 8)),
            Just((b'T', 8)),
        ];
        let leaf = prop_oneof![
            // The letters of floats are left to an example: a NaN does not equal itself.
            (fixed, any::<[u8; 8]>()).prop_map(|((letter, len), bytes)| Value::Fixed(letter, bytes[..len].to_vec())),
            text(40).prop_map(Value::LongStr),
            text(40).prop_map(|bytes| Value::Fixed(b'x', long_str(&bytes))),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            let wrapped = (vec(any::<bool>(), 0..60), inner.clone());
            prop_oneof![
                vec((text(20), inner.clone()), 0..6).prop_map(Value::Table),
                vec(inner, 0..6).prop_map(Value::Array),
                wrapped.prop_map(|(containers, value)| containers.into_iter().fold(value, |value, is_table| {
                    if is_table {
                        Value::Table(vec![(b"n".to_vec(), value)])
                    } else {
                        Value::Array(vec![value])
                    }
                })),
            ]
        })
    }

    /// A harmless table, as amq-protocol would write it.
    fn harmless_table() -> impl Strategy<Value = FieldTable> {
        let leaf = prop_oneof![
            any::<i32>().prop_map(AMQPValue::LongInt),
            any::<u64>().prop_map(AMQPValue::Timestamp),
            ".{0,8}".prop_map(AMQPValue::LongString),
            vec(any::<u8>(), 0..8).prop_map(AMQPValue::ByteArray),
            Just(AMQPValue::Void),
        ];
        let value = leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..6).prop_map(AMQPValue::FieldArray),
                btree_map(".{0,8}", inner, 0..6).prop_map(AMQPValue::FieldTable),
            ]
        });
        btree_map(".{0,8}", value, 0..6)
    }

    proptest! {
        #[test]
        fn any_headers_and_ids_arrive_complete(
            entries in vec((text(20), value()), 0..6),
            ids in [text(200), text(200), text(20)],
            octets in any::<[u8; 2]>(),
        ) {
            let table = Value::Table(entries);
            let parts = [table.encode()[1..].to_vec(), octets.to_vec(), ids.iter().flat_map(|id| short_str(id)).collect()];
            let bytes = header(0b11_1111 << 8, &parts.concat());
            check(&bytes);
            let len = bytes.len();
            let (frame, changes) = sanitized(bytes);
            prop_assert_eq!(frame.len(), len);
            let properties = properties(&frame);
            prop_assert_eq!(properties.headers().clone().map(AMQPValue::FieldTable), Some(table.expected(0)));
            prop_assert_eq!(*properties.priority(), Some(octets[1]));
            let [id, reply_to, expiration] = &ids;
            prop_assert_eq!(properties.correlation_id(), &Some(question_marks(id)));
            prop_assert_eq!(properties.reply_to(), &Some(question_marks(reply_to)));
            prop_assert_eq!(properties.expiration(), &Some(question_marks(expiration)));
            prop_assert_eq!(changes.original_correlation_id, from_utf8(id).is_err().then(|| id.clone()));
            prop_assert_eq!(changes.is_reply_to_changed, from_utf8(reply_to).is_err());
        }

        #[test]
        fn a_harmless_header_is_left_as_it_is(
            table in proptest::option::of(harmless_table()),
            id in proptest::option::of(".{0,40}"),
            kind in proptest::option::of(".{0,40}"),
            time in proptest::option::of(0u64..),
        ) {
            let mut properties = AMQPProperties::default();
            properties = table.into_iter().fold(properties, AMQPProperties::with_headers);
            properties = id.clone().into_iter().fold(properties, AMQPProperties::with_correlation_id);
            properties = time.into_iter().fold(properties, AMQPProperties::with_timestamp);
            properties = kind.into_iter().fold(properties, AMQPProperties::with_type_);
            let mut buffer = vec![0; 1 << 18];
            let (_, len) = gen_content_header_frame((&mut buffer, 0), 1, 60, 5, &properties).unwrap();
            let frame = &buffer[..len];
            prop_assert_eq!(sanitized(frame.to_vec()), (frame.to_vec(), Changes::default()));
            prop_assert_eq!(correlation_id_range(frame).map(|range| &frame[range]), id.as_ref().map(String::as_bytes));
        }

        #[test]
        fn nothing_breaks_the_promise(kind in 0u8..10, payload in vec(any::<u8>(), 0..200), flags in any::<u16>()) {
            check(&payload);
            check(&frame(kind, &payload));
            check(&header(flags, &payload));
            check(&headers(&payload));
        }

        #[test]
        fn neither_does_a_changed_byte(value in value(), changes in changes()) {
            check(&change(headers(&[&b"\x01n"[..], &value.encode()].concat()), &changes));
        }
    }

    fn changes() -> impl Strategy<Value = Vec<(Index, u8)>> {
        vec(any::<(Index, u8)>(), 1..4)
    }

    fn change(mut bytes: Vec<u8>, changes: &[(Index, u8)]) -> Vec<u8> {
        for (index, byte) in changes {
            let index = index.index(bytes.len());
            bytes[index] = *byte;
        }
        bytes
    }

    /// What the fuzzer found worth keeping.
    fn corpus() -> Vec<Vec<u8>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus/sanitize");
        let files = fs::read_dir(folder).unwrap();
        files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect()
    }

    #[test]
    fn the_fuzzers_corpus_keeps_the_promise() {
        let corpus = corpus();
        assert!(corpus.len() > 100, "the corpus has only {} files", corpus.len());
        for bytes in corpus {
            check(&bytes);
            // And with the payload cut short anywhere.
            if let [kind, _, _, _, _, _, _, payload @ .., _] = &bytes[..] {
                (0..payload.len()).for_each(|len| check(&frame(*kind, &payload[..len])));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]
        #[test]
        fn so_does_a_changed_corpus(bytes in select(corpus()), changes in changes()) {
            check(&change(bytes, &changes));
        }
    }
}
