//! The meaning of RabbitMQ's sentences, where the reply code alone does not say it.
//!
//! `tests/integration/sentences.rs` provokes each sentence at the broker of the tests.

use super::reply_codes::{
    ACCESS_REFUSED, INTERNAL_ERROR, NOT_ALLOWED, NOT_FOUND, PRECONDITION_FAILED,
};
use amiquip::AmqpValue;

/// The **meaning** of a sentence with which RabbitMQ closes a channel or a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Meaning {
    /// A message is larger than `max_message_size`.
    MessageTooLarge,
    /// The user may not write to an exchange.
    ExchangeRefused,
    /// The node, the vhost or the user has as many connections as it may have.
    ConnectionLimit,
    /// The broker is configured to permit no transient queues (RabbitMQ 4.3 and later).
    TransientQueueRefused,
    /// A queue exists and is durable, or transient, unlike its declaration.
    OtherDurability,
    /// A queue exists and has another type than its declaration.
    OtherQueueType,
    /// There is no such queue. (A durable queue whose node is down has the same code.)
    NoQueue,
    /// The queue's consumers have no priority. Of all types of queues, only a stream's have none.
    NoConsumerPriority,
}

/// A **difference** between a queue that exists and its declaration.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// What differs: `durable`, `auto_delete` or an argument of the queue.
    pub name: String,
    /// What the queue has. `None`: the queue does not have this argument, or the sentence does not
    /// tell.
    pub current: Option<AmqpValue>,
}

/// The pattern of a sentence: its reply code, its start and its end. Names of users, vhosts
/// and queues stand in between, and may be any text.
struct Sentence {
    meaning: Meaning,
    code: u16,
    starts: &'static [&'static str],
    end: &'static str,
}

/// The sentences that are recognised.
const SENTENCES: [Sentence; 8] = [
    Sentence {
        meaning: Meaning::MessageTooLarge,
        code: PRECONDITION_FAILED,
        starts: &["PRECONDITION_FAILED - message size "],
        end: "",
    },
    Sentence {
        meaning: Meaning::ExchangeRefused,
        code: ACCESS_REFUSED,
        // The second form is that of RabbitMQ 4.0 and later.
        starts: &[
            "ACCESS_REFUSED - access to exchange '",
            "ACCESS_REFUSED - write access to exchange '",
        ],
        end: "",
    },
    Sentence {
        meaning: Meaning::ConnectionLimit,
        code: NOT_ALLOWED,
        starts: &["NOT_ALLOWED - "],
        end: ") is reached",
    },
    Sentence {
        meaning: Meaning::TransientQueueRefused,
        code: INTERNAL_ERROR,
        starts: &["INTERNAL_ERROR - Feature `transient_nonexcl_queues` "],
        end: "",
    },
    Sentence {
        meaning: Meaning::OtherDurability,
        code: PRECONDITION_FAILED,
        starts: &["PRECONDITION_FAILED - inequivalent arg 'durable' "],
        end: "",
    },
    Sentence {
        meaning: Meaning::OtherQueueType,
        code: PRECONDITION_FAILED,
        starts: &["PRECONDITION_FAILED - inequivalent arg 'x-queue-type' "],
        end: "",
    },
    Sentence {
        meaning: Meaning::NoQueue,
        code: NOT_FOUND,
        starts: &["NOT_FOUND - no queue '"],
        end: "",
    },
    Sentence {
        meaning: Meaning::NoConsumerPriority,
        code: PRECONDITION_FAILED,
        // With a priority that is an integer, that is.
        starts: &["PRECONDITION_FAILED - invalid arg 'x-priority' for queue "],
        end: "",
    },
];

impl Meaning {
    /// The meaning of what the broker said. `None` for every other sentence.
    pub(crate) fn of(code: u16, text: &str) -> Option<Self> {
        let sentence = SENTENCES.iter().find(|sentence| {
            let mut starts = sentence.starts.iter();
            sentence.code == code
                && starts.any(|start| text.starts_with(start))
                && text.ends_with(sentence.end)
        });
        sentence.map(|sentence| sentence.meaning)
    }
}

impl Difference {
    /// The first difference that the broker names. `None` for every other sentence.
    ///
    /// The forms are `… but current is 'VALUE'`, `… but current is the value 'VALUE' of type
    /// 'TYPE'`, and `… but current is none`. A sentence is cut after 255 bytes.
    pub(crate) fn of(code: u16, text: &str) -> Option<Self> {
        let rest = text.strip_prefix("PRECONDITION_FAILED - inequivalent arg '")?;
        let (name, rest) = rest.split_once("' for queue '")?;
        let current = rest.rsplit_once(" but current is ");
        (code == PRECONDITION_FAILED).then(|| Difference {
            name: name.into(),
            current: current.and_then(|(_, current)| parse_value(current)),
        })
    }
}

/// Parses a value of an argument in the words of the broker. `None` for `none`, and for types that
/// no argument of a queue has.
fn parse_value(text: &str) -> Option<AmqpValue> {
    let quoted = text.strip_prefix("the value ").unwrap_or(text);
    let (value, value_type) = match quoted.rsplit_once(" of type ") {
        Some((value, value_type)) => (value, value_type),
        None => (quoted, "'longstr'"),
    };
    let value = value.strip_prefix('\'')?.strip_suffix('\'')?;
    match value_type {
        "'longstr'" => Some(AmqpValue::LongString(value.into())),
        "'bool'" => value.parse().ok().map(AmqpValue::Boolean),
        // The broker compares numbers of different types by their values.
        _ => value.parse().ok().map(AmqpValue::LongLongInt),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_known_by_its_code_its_start_and_its_end_not_by_the_names_in_it() {
        let refused = "ACCESS_REFUSED - access to queue 'q' in vhost 'exchange' refused for user";
        for (code, text, meaning) in [
            (
                406,
                "PRECONDITION_FAILED - message size 9 is larger than configured max size 8",
                Some(Meaning::MessageTooLarge),
            ),
            (404, "PRECONDITION_FAILED - message size 9", None),
            (406, "PRECONDITION_FAILED - invalid expiration", None),
            (
                403,
                "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused",
                Some(Meaning::ExchangeRefused),
            ),
            (
                403,
                "ACCESS_REFUSED - write access to exchange 'amq.default' in vhost '/' refused",
                Some(Meaning::ExchangeRefused),
            ),
            (403, refused, None),
            (
                530,
                "NOT_ALLOWED - access to vhost '/' refused for user 'me': connection limit (5) is reached",
                Some(Meaning::ConnectionLimit),
            ),
            (530, "NOT_ALLOWED - vhost connection limit not found", None),
            (
                404,
                "NOT_FOUND - no queue 'replies' in vhost '/'",
                Some(Meaning::NoQueue),
            ),
            (
                404,
                "NOT_FOUND - home node 'rabbit@b' of durable queue 'replies' in vhost '/' is down or inaccessible",
                None,
            ),
            (
                406,
                "PRECONDITION_FAILED - invalid arg 'x-priority' for queue 's' in vhost '/' of queue type rabbit_stream_queue",
                Some(Meaning::NoConsumerPriority),
            ),
        ] {
            assert_eq!(Meaning::of(code, text), meaning, "{text}");
        }
    }

    #[test]
    fn a_difference_has_the_value_of_the_queue() {
        let long_string = |text: &str| Some(AmqpValue::LongString(text.into()));
        for (end, value) in [
            (
                "received 'true' but current is 'false'",
                long_string("false"),
            ),
            (
                "received 'classic' but current is 'stream'",
                long_string("stream"),
            ),
            (
                "received none but current is the value '10' of type 'signedint'",
                Some(AmqpValue::LongLongInt(10)),
            ),
            (
                "received none but current is the value 'true' of type 'bool'",
                Some(AmqpValue::Boolean(true)),
            ),
            (
                "received none but current is the value 'a 'b' of type 'c'' of type 'longstr'",
                long_string("a 'b' of type 'c'"),
            ),
            (
                "received the value 'quorum' of type 'longstr' but current is none",
                None,
            ),
            (
                "received none but current is the value '1.5' of type 'double'",
                None,
            ),
            ("received none but current is the val", None),
            ("recei", None),
        ] {
            let text = format!(
                "PRECONDITION_FAILED - inequivalent arg 'x-a' for queue 'q' in vhost '/': {end}"
            );
            let difference = Difference {
                name: "x-a".into(),
                current: value,
            };
            assert_eq!(Difference::of(406, &text), Some(difference), "{end}");
            assert_eq!(Difference::of(405, &text), None);
        }
        let other = "PRECONDITION_FAILED - invalid arg 'x-priority' for queue 's' in vhost '/'";
        assert_eq!(Difference::of(406, other), None);
    }
}
