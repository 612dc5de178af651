//! Checks what `rpc_common::connection::sanitize` guarantees for any bytes. The fuzzer and the tests of that module use it.

use super::{correlation_id_range, sanitize, Changes, MAX_DEPTH};
use amq_protocol::frame::{parse_frame, AMQPFrame};
use amq_protocol::protocol::connection::AMQPMethod;
use amq_protocol::protocol::AMQPClass;
use amq_protocol::types::{AMQPValue, FieldTable};

/// The methods that a broker sends, by class and method (AMQP 0-9-1 and RabbitMQ's extensions).
const BROKER_METHODS: [(u8, &[u8]); 8] = [
    (10, &[10, 20, 30, 41, 50, 51, 60, 61]),                   // connection
    (20, &[11, 20, 21, 40, 41]),                               // channel
    (30, &[11]),                                               // access
    (40, &[11, 21, 31, 51]),                                   // exchange
    (50, &[11, 21, 31, 41, 51]),                               // queue
    (60, &[11, 21, 30, 31, 50, 60, 71, 72, 80, 90, 111, 120]), // basic
    (85, &[11]),                                               // confirm
    (90, &[11, 21, 31]),                                       // tx
];
/// The offset of the property flags in a content header: after the frame header, the class, the weight and the body size.
const FLAGS_OFFSET: usize = 7 + 12;

/// Panics unless sanitize refuses these bytes, or changes them into a frame that amq-protocol parses completely and without
/// deep recursion.
pub(crate) fn check(bytes: &[u8]) {
    let mut frame = bytes.to_vec();
    let Ok(changes) = sanitize(&mut frame) else { return };
    let range = correlation_id_range(&frame);
    assert_eq!(range, correlation_id_range(bytes), "the correlation id has moved");
    if let Some(original) = changes.original_correlation_id {
        assert_eq!(original, bytes[range.unwrap()]);
    }
    let mut again = frame.clone();
    assert_eq!(sanitize(&mut again), Ok(Changes::default()));
    assert_eq!(again, frame, "a second pass changes the frame again");

    match parse_frame(&frame) {
        Ok((_, AMQPFrame::Header(_, _, header))) => {
            let flags = u16::from_be_bytes([frame[FLAGS_OFFSET], frame[FLAGS_OFFSET + 1]]);
            assert_eq!(header.properties.bitmask(), flags & !0b11, "a property is missing");
            let depth = header.properties.headers().as_ref().map_or(0, depth_of_table);
            assert!(depth <= MAX_DEPTH, "tables and arrays are nested {depth} deep");
        }
        Ok((_, AMQPFrame::Method(_, AMQPClass::Connection(AMQPMethod::Start(start))))) => {
            let depth = depth_of_table(&start.server_properties);
            assert!(depth <= MAX_DEPTH, "tables and arrays are nested {depth} deep");
        }
        Ok(_) => {}
        Err(error) => assert!(!is_legal(&frame), "amq-protocol refuses this frame: {error:?}"),
    }
}

/// How deep tables and arrays are nested, this one included.
pub(crate) fn depth_of_table(table: &FieldTable) -> usize {
    1 + table.values().map(depth).max().unwrap_or(0)
}

fn depth(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::FieldTable(table) => depth_of_table(table),
        AMQPValue::FieldArray(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Whether a broker may send this frame. If sanitize accepts it, amq-protocol must parse it.
fn is_legal(frame: &[u8]) -> bool {
    match frame {
        [.., end] if *end != 0xce => false,
        [2, ..] => true,
        [1, _, _, _, _, _, _, 0, class, 0, method, ..] => {
            BROKER_METHODS.iter().any(|(broker_class, methods)| broker_class == class && methods.contains(method))
        }
        _ => false,
    }
}
