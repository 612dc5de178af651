//! The message conventions: requests, replies and error replies as AMQP properties and bodies.
//!
//! All of it is pure. What a tutorial peer may leave out is optional to read; what ours sends is
//! always complete. The wire table in the README is this file in other words.

use amiquip::{AmqpProperties, AmqpValue, FieldTable, Publish};
use std::fmt::{self, Display, Write};
use std::time::Duration;

const CONTENT_TYPE: &str = "text/plain";
const PERSISTENT: u8 = 2;
const ERROR_TYPE: &str = "error";
const ERROR_CODE_HEADER: &str = "x-error-code";

/// Replies to RabbitMQ's direct reply-to go to names that start so.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// A **request** asks a server to run its function on the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// What the function is applied to; for fib, n in decimal.
    pub body: &'a [u8],
    /// The queue that the answer goes to. A request without one cannot be answered.
    pub reply_to: Option<&'a str>,
    /// The **correlation id** names the call: whoever answers copies it.
    pub correlation_id: Option<&'a str>,
    /// How long the request may lie in queues before the broker drops it.
    pub expiration: Option<Duration>,
}

impl<'a> Request<'a> {
    /// Reads a request; nothing but its body is required.
    #[must_use]
    pub fn decode(properties: &'a AmqpProperties, body: &'a [u8]) -> Self {
        let millis = properties.expiration().as_ref().and_then(|text| text.parse().ok());
        Request {
            body,
            reply_to: properties.reply_to().as_deref().filter(|name| !name.is_empty()),
            correlation_id: properties.correlation_id().as_deref(),
            expiration: millis.map(Duration::from_millis),
        }
    }

    /// The message that carries this request to the queue, mandatory and persistent.
    #[must_use]
    pub fn encode(&self, queue: &str) -> Publish<'a> {
        let mut properties = AmqpProperties::default()
            .with_content_type(CONTENT_TYPE.into())
            .with_delivery_mode(PERSISTENT);
        if let Some(reply_to) = self.reply_to {
            properties = properties.with_reply_to(reply_to.into());
        }
        if let Some(id) = self.correlation_id {
            properties = properties.with_correlation_id(id.into());
        }
        if let Some(expiration) = self.expiration {
            // The broker would drop a message that expires after 0 ms, even before an idle consumer.
            properties = properties.with_expiration(expiration.as_millis().max(1).to_string());
        }
        Publish { mandatory: true, ..Publish::with_properties(self.body, queue, properties) }
    }

    /// The body as text, for functions of text.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] when it is no UTF-8.
    pub fn text(&self) -> Result<&'a str, Failure> {
        std::str::from_utf8(self.body).map_err(|_| Failure {
            code: ErrorCode::InvalidArgument,
            message: format!("invalid argument: '{}' is not UTF-8", escape(self.body)),
        })
    }
}

/// A **reply** is what became of a request: the answer's text, or the failure that stands for it.
pub type Reply = Result<String, Failure>;

/// A **failure** is the remote error that an error reply carries.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure, for programs.
    pub code: ErrorCode,
    /// One sentence, for people; tutorial peers print it in the place of the answer.
    pub message: String,
}

/// The kind of a [`Failure`], as the header `x-error-code` spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The body is not what the function takes.
    InvalidArgument,
    /// The body is well formed, but more than this server serves.
    OutOfRange,
    /// The function broke.
    Internal,
    /// A code that is not one of these, fit to be printed: escaped, and cut at 64 characters.
    Other(String),
}

impl ErrorCode {
    /// The code as it stands in the header.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            ErrorCode::InvalidArgument => "invalid-argument",
            ErrorCode::OutOfRange => "out-of-range",
            ErrorCode::Internal => "internal",
            ErrorCode::Other(code) => code,
        }
    }
}

/// How many characters of an unknown code are shown.
const MOST_CODE_CHARS: usize = 64;

impl From<&str> for ErrorCode {
    fn from(code: &str) -> Self {
        [ErrorCode::InvalidArgument, ErrorCode::OutOfRange, ErrorCode::Internal]
            .into_iter()
            .find(|known| known.as_str() == code)
            .unwrap_or_else(|| {
                let shown = escape(code.as_bytes()).to_string();
                ErrorCode::Other(shown.chars().take(MOST_CODE_CHARS).collect())
            })
    }
}

/// The message that carries a reply to the queue `reply_to`.
#[must_use]
pub fn encode_reply<'a>(
    reply: &'a Reply,
    reply_to: &str,
    correlation_id: Option<&str>,
) -> Publish<'a> {
    let mut properties = AmqpProperties::default().with_content_type(CONTENT_TYPE.into());
    if let Some(id) = correlation_id {
        properties = properties.with_correlation_id(id.into());
    }
    let body = match reply {
        Ok(answer) => answer,
        Err(failure) => {
            let mut headers = FieldTable::new();
            let code = failure.code.as_str().to_owned();
            headers.insert(ERROR_CODE_HEADER.into(), AmqpValue::LongString(code));
            properties = properties.with_type_(ERROR_TYPE.into()).with_headers(headers);
            &failure.message
        }
    };
    Publish {
        // RabbitMQ 3.10 both delivers and returns a mandatory message to a direct reply-to.
        mandatory: !reply_to.starts_with(DIRECT_REPLY_TO),
        ..Publish::with_properties(body.as_bytes(), reply_to, properties)
    }
}

/// Reads a reply: the answer's body as it came, or the failure.
///
/// # Errors
/// The failure that an error reply carries; one without a code counts as [`ErrorCode::Internal`].
pub fn decode_reply(properties: &AmqpProperties, body: Vec<u8>) -> Result<Vec<u8>, Failure> {
    if properties.type_().as_deref() != Some(ERROR_TYPE) {
        return Ok(body);
    }
    let code = properties.headers().as_ref().and_then(|headers| headers.get(ERROR_CODE_HEADER));
    let code = match code {
        Some(AmqpValue::LongString(code)) => code.as_str().into(),
        _ => ErrorCode::Internal,
    };
    Err(Failure { code, message: String::from_utf8_lossy(&body).into_owned() })
}

/// The most digits a number may have: as many as the largest of 64 bits.
const MOST_DIGITS: usize = 20;

/// Why a text is no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NumberError {
    /// Not of the form `[0-9]{1,20}`.
    #[error("not a natural number in decimal digits, 20 at most")]
    Malformed,
    /// Larger than 2^64 - 1.
    #[error("larger than {}", u64::MAX)]
    TooLarge,
}

/// Reads a number by the grammar of the wire, `[0-9]{1,20}`: no sign, no blanks, no other digits.
///
/// # Errors
/// [`NumberError`]; at most the first 21 bytes of the text are looked at.
pub fn parse_number(text: &[u8]) -> Result<u64, NumberError> {
    if text.is_empty() || text.len() > MOST_DIGITS || !text.iter().all(u8::is_ascii_digit) {
        return Err(NumberError::Malformed);
    }
    let digits = std::str::from_utf8(text).map_err(|_| NumberError::Malformed)?;
    digits.parse().map_err(|_| NumberError::TooLarge)
}

/// How many bytes of what came from the wire are shown.
const MOST_SHOWN: usize = 200;

/// What came from the wire, made safe to print: controls, invisible characters and what is no UTF-8
/// are escaped, and what is long is cut.
#[must_use]
pub fn escape(bytes: &[u8]) -> impl Display + '_ {
    Escaped(bytes)
}

struct Escaped<'a>(&'a [u8]);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(MOST_SHOWN)];
        for chunk in shown.utf8_chunks() {
            for char in chunk.valid().chars() {
                match char {
                    '"' | '\'' => f.write_char(char)?,
                    _ => write!(f, "{}", char.escape_debug())?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        if shown.len() < self.0.len() {
            f.write_char('…')?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_has_every_property_of_the_wire_table() {
        let request = Request {
            body: b"30",
            reply_to: Some("rpc.reply.1"),
            correlation_id: Some("id"),
            expiration: Some(Duration::from_millis(1_500)),
        };
        let publish = request.encode("rpc_queue");
        assert_eq!(publish.body, b"30");
        assert_eq!(publish.routing_key, "rpc_queue");
        assert!(publish.mandatory);
        let properties = &publish.properties;
        assert_eq!(properties.content_type().as_deref(), Some("text/plain"));
        assert_eq!(properties.delivery_mode(), &Some(2));
        assert_eq!(properties.expiration().as_deref(), Some("1500"));
        assert_eq!(properties.reply_to().as_deref(), Some("rpc.reply.1"));
        assert_eq!(properties.correlation_id().as_deref(), Some("id"));
    }

    #[test]
    fn a_bare_body_is_a_request() {
        let properties = AmqpProperties::default();
        let request = Request::decode(&properties, b"7");
        assert_eq!(
            request,
            Request { body: b"7", reply_to: None, correlation_id: None, expiration: None }
        );
    }

    #[test]
    fn a_reply_to_a_direct_reply_to_is_not_mandatory() {
        let reply = Ok("1".to_owned());
        assert!(encode_reply(&reply, "rpc.reply.1", None).mandatory);
        assert!(!encode_reply(&reply, "amq.rabbitmq.reply-to.g2dkA", None).mandatory);
    }

    #[test]
    fn numbers_follow_the_grammar() {
        assert_eq!(parse_number(b"0"), Ok(0));
        assert_eq!(parse_number(b"007"), Ok(7));
        assert_eq!(parse_number(b"18446744073709551615"), Ok(u64::MAX));
        assert_eq!(parse_number(b"18446744073709551616"), Err(NumberError::TooLarge));
        for text in ["", " 1", "1 ", "1\n", "+1", "-1", "1.0", "1e3", "0x1f", "٣", "１", "abc"] {
            assert_eq!(parse_number(text.as_bytes()), Err(NumberError::Malformed), "{text:?}");
        }
        assert_eq!(parse_number(&[b'0'; 21]), Err(NumberError::Malformed));
    }

    #[test]
    fn an_unknown_code_is_escaped_and_cut() {
        let code = |code: &str| ErrorCode::from(code).as_str().to_owned();
        assert_eq!(code("quota"), "quota");
        assert_eq!(code("\u{7f}\u{9b}\u{2028}\u{202e}"), r"\u{7f}\u{9b}\u{2028}\u{202e}");
        assert_eq!(code(&"x".repeat(100_000)), "x".repeat(64));
    }

    #[test]
    fn what_is_shown_cannot_steer_a_terminal() {
        assert_eq!(escape(b"it's \"30\"").to_string(), "it's \"30\"");
        assert_eq!(
            escape("\u{1b}[2J\r\n\u{202e}".as_bytes()).to_string(),
            r"\u{1b}[2J\r\n\u{202e}"
        );
        assert_eq!(escape(b"a\xff\xfe").to_string(), r"a\xff\xfe");
        assert_eq!(escape(&[b'x'; 201]).to_string(), "x".repeat(200) + "…");
    }

    fn any_failure() -> impl Strategy<Value = Failure> {
        ("[a-z-]{0,20}", ".*")
            .prop_map(|(code, message)| Failure { code: code.as_str().into(), message })
    }

    proptest! {
        #[test]
        fn requests_survive_the_wire(
            body: Vec<u8>,
            reply_to in proptest::option::of(".{1,40}"),
            id in proptest::option::of(".*"),
            millis in proptest::option::of(1u64..),
        ) {
            let request = Request {
                body: &body,
                reply_to: reply_to.as_deref(),
                correlation_id: id.as_deref(),
                expiration: millis.map(Duration::from_millis),
            };
            let publish = request.encode("queue");
            prop_assert_eq!(Request::decode(&publish.properties, publish.body), request.clone());
        }

        #[test]
        fn replies_survive_the_wire(
            reply in prop_oneof![".*".prop_map(Ok), any_failure().prop_map(Err)],
            id in proptest::option::of(".*"),
        ) {
            let publish = encode_reply(&reply, "queue", id.as_deref());
            prop_assert_eq!(publish.properties.correlation_id(), &id);
            let decoded = decode_reply(&publish.properties, publish.body.to_vec());
            prop_assert_eq!(decoded, reply.clone().map(String::into_bytes));
        }

        #[test]
        fn every_number_is_read_back(n: u64) {
            prop_assert_eq!(parse_number(n.to_string().as_bytes()), Ok(n));
        }

        #[test]
        fn what_is_shown_is_one_line_of_printable_text(bytes: Vec<u8>) {
            prop_assert!(!escape(&bytes).to_string().contains(char::is_control));
        }
    }
}
