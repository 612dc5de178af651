//! The meaning of RabbitMQ's sentences, where the reply code alone does not say it.
//!
//! `tests/integration/sentences.rs` provokes each sentence at the broker of the tests.

use super::reply_codes::{
    ACCESS_REFUSED, INTERNAL_ERROR, NOT_ALLOWED, NOT_FOUND, PRECONDITION_FAILED,
};

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
const SENTENCES: [Sentence; 7] = [
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
        ] {
            assert_eq!(Meaning::of(code, text), meaning, "{text}");
        }
    }
}
