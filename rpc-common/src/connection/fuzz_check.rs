//! Checks what holds for any bytes that a broker may send. The fuzzer and the tests use it.

use super::demux::{Demultiplexer, Inboxes};
use super::frames::FrameBuffer;
use super::inbox::Message;
use crate::message::{decode_reply, Request};
use crate::properties::Properties;
use amq_protocol::frame::{parse_frame, AMQPFrame};
use amq_protocol::protocol::connection::AMQPMethod;
use amq_protocol::protocol::AMQPClass;
use amq_protocol::types::{AMQPValue, FieldTable};
use std::sync::atomic::Ordering;

/// Maximum number of unread messages on the open channel.
const MAX_UNREAD: usize = 8;

/// Panics unless these bytes end the connection, or amiquip's parser accepts what it gets of them,
/// and the messages in them can be read. The first byte is the size of the pieces in which the
/// others arrive.
pub fn check(bytes: &[u8]) {
    let Some((piece, mut rest)) = bytes.split_first() else {
        return;
    };
    let inboxes = Inboxes::default();
    let mut buffer = FrameBuffer::new();
    let mut demultiplexer = Demultiplexer::new();
    let inbox = inboxes.open(1, MAX_UNREAD);
    inbox.has_confirms.store(true, Ordering::Relaxed);
    'connection: while !rest.is_empty() {
        let space = buffer.space();
        let count = space
            .len()
            .min(rest.len())
            .min(1 + usize::from(*piece) * 16);
        space[..count].copy_from_slice(&rest[..count]);
        rest = &rest[count..];
        buffer.advance(count);
        while let Ok(Some(frame)) = buffer.next_frame() {
            if demultiplexer.take(&inboxes, frame).is_err() {
                break 'connection;
            }
        }
    }
    check_for_amiquip(&demultiplexer.to_amiquip);
    let arrived = inbox.take();
    assert!(
        arrived.messages.len() <= MAX_UNREAD + 1 && arrived.confirmations.len() <= MAX_UNREAD + 1
    );
    for message in arrived.messages {
        match message {
            Message::Delivery(delivery) => {
                if let Ok(properties) = delivery.properties() {
                    check_properties(&properties, &delivery.body);
                }
            }
            Message::Returned(returned) => drop(returned.correlation_id().map(<[u8]>::len)),
        }
    }
}

/// amq-protocol parses all frames, completely and without deep recursion, and none is of a message.
fn check_for_amiquip(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let (rest, frame) = parse_frame(bytes).expect("amq-protocol parses it");
        match frame {
            AMQPFrame::Method(_, AMQPClass::Connection(AMQPMethod::Start(start))) => {
                assert!(depth(&start.server_properties) <= 2, "nested tables");
            }
            AMQPFrame::Method(..) => {}
            other => panic!("amiquip gets {other:?}"),
        }
        bytes = rest;
    }
}

fn depth(table: &FieldTable) -> usize {
    let inner = |value: &AMQPValue| match value {
        AMQPValue::FieldTable(table) => depth(table),
        AMQPValue::FieldArray(_) => usize::MAX - 1,
        _ => 0,
    };
    1 + table.values().map(inner).max().unwrap_or(0)
}

/// The properties are what they are after they were written again, and requests and replies are
/// decoded from them.
fn check_properties(properties: &Properties, body: &[u8]) {
    let encoded = properties.encode();
    assert_eq!(Properties::parse(&encoded).as_ref(), Ok(properties));
    let request = Request::decode(properties, body, false);
    let id = properties.correlation_id.or(properties.message_id);
    assert_eq!(request.correlation_id, id);
    let texts = request.text_headers().count();
    assert!(texts <= request.headers.entries().count());
    let _ = (
        request.log_id(),
        request.text().is_ok(),
        decode_reply(properties, body.to_vec()).is_ok(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::{select, Index};
    use std::fs;

    /// What the fuzzer found worth keeping.
    fn corpus() -> Vec<Vec<u8>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus/frames");
        let files = fs::read_dir(folder).expect("the corpus is there");
        files
            .map(|file| fs::read(file.expect("it is listed").path()).expect("it can be read"))
            .collect()
    }

    #[test]
    fn the_fuzzers_corpus_keeps_the_promise() {
        let corpus = corpus();
        assert!(
            corpus.len() > 100,
            "the corpus has only {} files",
            corpus.len()
        );
        for bytes in corpus {
            check(&bytes);
            (0..bytes.len())
                .step_by(7)
                .for_each(|len| check(&bytes[..len]));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5_000))]
        #[test]
        fn so_does_a_changed_corpus(mut bytes in select(corpus()), changes in proptest::collection::vec(any::<(Index, u8)>(), 1..4)) {
            for (index, byte) in changes.iter().filter(|_| !bytes.is_empty()).collect::<Vec<_>>() {
                let index = index.index(bytes.len());
                bytes[index] = *byte;
            }
            check(&bytes);
        }
    }
}
