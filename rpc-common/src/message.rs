//! The protocol: how requests, replies and errors become properties and bodies, and back.
//!
//! This module is pure: no sockets, no clock. It reads what tutorial peers send, whose properties
//! are all optional, and writes every property of the table in the README.

use crate::properties::{Properties, Table, TableBuilder, Value};
use crate::text::{escape, format_duration};
use std::time::{Duration, SystemTime};

/// Content type of text: of the numbers of fib, and of errors.
pub const TEXT: &str = "text/plain";

/// Delivery mode of a message that a durable queue keeps on disk.
const PERSISTENT: u8 = 2;

/// Header of a call's deadline, [`Request::deadline_ms`].
pub const DEADLINE_HEADER: &str = "x-deadline-ms";

/// Property `type` of an error reply.
const ERROR_TYPE: &str = "error";

/// Header of a failure's code.
const ERROR_CODE_HEADER: &str = "x-error-code";

/// Header of a failed program's exit code.
const EXIT_CODE_HEADER: &str = "x-exit-code";

/// Property `type` that RabbitMQ gives to a message of AMQP 1.0 whose body is a value, encoded.
const AMQP_1_0_VALUE: &[u8] = b"amqp-1.0";

/// Prefix of the queue names that RabbitMQ makes for direct reply-to.
const DIRECT_REPLY_TO: &[u8] = b"amq.rabbitmq.reply-to";

/// A **request** asks a server to run its function on the body. All but the body is optional. Text
/// from the wire is bytes: a peer may send any.
///
/// ```
/// use rpc_common::message::Request;
/// use rpc_common::properties::Properties;
///
/// let request = Request { body: b"30", reply_to: Some(b"replies"), ..Request::default() };
/// let message = request.encode(b"rpc_queue", None);
/// let properties = Properties::parse(&message.properties).unwrap();
/// let decoded = Request::decode(&properties, message.body, false);
/// assert_eq!(decoded.text(), Ok("30"));
/// assert_eq!(decoded.reply_to, Some(&b"replies"[..]));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request<'a> {
    /// The function's argument; for fib, n in decimal.
    pub body: &'a [u8],
    /// The MIME type of the body.
    pub content_type: Option<&'a [u8]>,
    /// Further headers of the caller.
    pub headers: Table<'a>,
    /// The queue for the reply. A request without one cannot be answered.
    pub reply_to: Option<&'a [u8]>,
    /// The **correlation id** identifies the call: the server copies it into the reply, byte for
    /// byte.
    pub correlation_id: Option<&'a [u8]>,
    /// The call's **deadline**, Unix time in milliseconds: a server does not run the request after
    /// it.
    pub deadline_ms: Option<i64>,
    /// Properties that only foreign clients set.
    pub details: Details<'a>,
    /// Whether the broker has delivered the request before, so that it may have run.
    pub is_redelivered: bool,
}

/// Properties of a request that its function may use, and rpc-client does not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Details<'a> {
    /// The encoding of the body, such as gzip.
    pub content_encoding: Option<&'a [u8]>,
    /// Identifies the message.
    pub message_id: Option<&'a [u8]>,
    /// The kind of the message.
    pub message_type: Option<&'a [u8]>,
    /// The program that sent the message.
    pub app_id: Option<&'a [u8]>,
    /// The user that sent the message: RabbitMQ refuses a message with another user than that of
    /// its connection.
    pub user_id: Option<&'a [u8]>,
}

/// A message to be published to the default exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish<'a> {
    /// The name of the queue.
    pub routing_key: &'a [u8],
    /// Whether the broker returns a message that it cannot route to a queue.
    pub mandatory: bool,
    /// As encoded by [`Properties::encode`].
    pub properties: Vec<u8>,
    /// The body, which the broker does not look at.
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Decodes a request. Only the body is required. A deadline is a signed integer, or its decimal
    /// digits, which is all that STOMP and MQTT can send; any other is ignored. A request without a
    /// `correlation_id` has that of its `message_id`, as clients of AMQP 1.0 expect.
    pub fn decode(properties: &Properties<'a>, body: &'a [u8], is_redelivered: bool) -> Self {
        Request {
            body,
            content_type: properties.content_type,
            headers: properties.headers.unwrap_or_default(),
            reply_to: properties.reply_to.filter(|name| !name.is_empty()),
            correlation_id: properties.correlation_id.or(properties.message_id),
            deadline_ms: match properties.header(DEADLINE_HEADER) {
                Some(Value::Integer(deadline)) => Some(deadline),
                Some(Value::Text(digits)) => std::str::from_utf8(digits)
                    .ok()
                    .and_then(|digits| digits.parse().ok()),
                _ => None,
            },
            details: Details {
                content_encoding: properties.content_encoding,
                message_id: properties.message_id,
                message_type: properties.message_type,
                app_id: properties.app_id,
                user_id: properties.user_id,
            },
            is_redelivered,
        }
    }

    /// The headers whose value is a string, a number or a boolean, as text. Bytes that are not
    /// UTF-8 are replaced.
    pub fn text_headers(&self) -> impl Iterator<Item = (String, String)> + use<'a> {
        self.headers.entries().filter_map(|(name, value)| {
            Some((String::from_utf8_lossy(name).into_owned(), value.to_text()?))
        })
    }

    /// Encodes the request, without its details, as a mandatory, persistent message to `queue`. The
    /// broker drops it if it is still in the queue after `time_left`. The request's deadline is
    /// added to its headers.
    pub fn encode(&self, queue: &'a [u8], time_left: Option<Duration>) -> Publish<'a> {
        let mut headers = TableBuilder::from_table(self.headers);
        if let Some(deadline) = self.deadline_ms {
            // Not an integer: Perl's Net::AMQP dies of one with 64 bits.
            headers = headers.with_text(DEADLINE_HEADER, itoa::Buffer::new().format(deadline));
        }
        let headers = headers.table();
        // RabbitMQ may drop a message with expiration 0 even if a consumer is idle.
        let mut digits = itoa::Buffer::new();
        let expiration = time_left.map(|time_left| digits.format(time_left.as_millis().max(1)));
        let properties = Properties {
            content_type: self.content_type,
            headers: Some(headers).filter(|headers| *headers != Table::default()),
            delivery_mode: Some(PERSISTENT),
            correlation_id: self.correlation_id,
            message_id: self.correlation_id, // servers of AMQP 1.0 copy this one
            reply_to: self.reply_to,
            expiration: expiration.map(str::as_bytes),
            ..Properties::default()
        };
        Publish {
            routing_key: queue,
            mandatory: true,
            properties: properties.encode(),
            body: self.body,
        }
    }

    /// The id of the call for a line of the log, in brackets: safe to print, and it does not
    /// close them.
    pub fn log_id(&self) -> String {
        escape(self.correlation_id.unwrap_or(b"none"))
            .to_string()
            .replace(']', "\\]")
    }

    /// Checks that the body is what the caller means, and not an encoding of it.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] if the caller is a client of AMQP 1.0 that sends the body as a
    /// value: RabbitMQ passes that on in the encoding of AMQP 1.0.
    pub fn check_body(&self) -> Result<(), Failure> {
        if self.details.message_type == Some(AMQP_1_0_VALUE) {
            let message = "invalid argument: the body is a value of AMQP 1.0: send a data section";
            return Err(Failure::new(ErrorCode::InvalidArgument, message));
        }
        Ok(())
    }

    /// Returns the body as text, for functions of text.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] if the body is not UTF-8.
    pub fn text(&self) -> Result<&'a str, Failure> {
        let message = || format!("invalid argument: '{}' is not UTF-8", escape(self.body));
        std::str::from_utf8(self.body)
            .map_err(|_| Failure::new(ErrorCode::InvalidArgument, message()))
    }
}

/// A **reply** is the result of a request.
pub type Reply = Result<Answer, Failure>;

/// An **answer** is what a function returned.
///
/// ```
/// use rpc_common::message::Answer;
///
/// let text = Answer::from("832040".to_owned());
/// assert_eq!(text.content_type.as_deref(), Some("text/plain"));
/// let image = Answer::new(vec![0x89, 0x50]).with_content_type("image/png".into());
/// assert_eq!(image.body.len(), 2);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Answer {
    /// The bytes of the answer.
    pub body: Vec<u8>,
    /// The MIME type of the body.
    pub content_type: Option<String>,
    /// The kind of the message, the property `type`. `error` is that of failures.
    pub message_type: Option<String>,
    /// Headers, for callers that know them.
    pub headers: TableBuilder,
}

impl Answer {
    /// An answer without a content type.
    pub fn new(body: Vec<u8>) -> Self {
        Answer {
            body,
            content_type: None,
            message_type: None,
            headers: TableBuilder::default(),
        }
    }

    /// The answer with this content type.
    #[must_use]
    pub fn with_content_type(self, content_type: String) -> Self {
        Answer {
            content_type: Some(content_type),
            ..self
        }
    }

    /// The answer with this property `type`.
    #[must_use]
    pub fn with_type(self, message_type: String) -> Self {
        Answer {
            message_type: Some(message_type),
            ..self
        }
    }

    /// The answer with these headers.
    #[must_use]
    pub fn with_headers(self, headers: TableBuilder) -> Self {
        Answer { headers, ..self }
    }
}

/// An answer of the type `text/plain`.
impl From<String> for Answer {
    fn from(text: String) -> Self {
        Answer::new(text.into()).with_content_type(TEXT.into())
    }
}

/// A **failure** is the error in an error reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct Failure {
    /// The kind of failure, for programs.
    pub code: ErrorCode,
    /// One sentence, for people. Tutorial clients print it as if it were the answer.
    pub message: String,
    /// The exit code of a program that failed.
    pub exit_code: Option<i32>,
}

impl Failure {
    /// A failure without an exit code.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Failure {
            code,
            message: message.into(),
            exit_code: None,
        }
    }

    /// The failure of a program that ended with this exit code.
    #[must_use]
    pub fn with_exit_code(self, exit_code: i32) -> Self {
        Failure {
            exit_code: Some(exit_code),
            ..self
        }
    }
}

/// The kind of a [`Failure`], the value of the header `x-error-code`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The body is not a valid argument of the function.
    InvalidArgument,
    /// The argument is valid, but this server does not serve it.
    OutOfRange,
    /// The deadline had passed when the server received the request: the function did not run.
    Expired,
    /// The function cannot run at the moment: try later.
    Unavailable,
    /// The caller may not do that.
    PermissionDenied,
    /// The program that is the function failed.
    Failed,
    /// The program was stopped: it ran too long, or its caller has gone.
    TimeLimit,
    /// The request or the reply is too large.
    TooLarge,
    /// The function has a defect.
    Internal,
    /// Any other code, safe to print: escaped, and cut after 64 characters.
    Other(String),
}

impl ErrorCode {
    /// All codes but [`Other`](Self::Other).
    pub const KNOWN: [Self; 9] = [
        Self::InvalidArgument,
        Self::OutOfRange,
        Self::Expired,
        Self::Unavailable,
        Self::PermissionDenied,
        Self::Failed,
        Self::TimeLimit,
        Self::TooLarge,
        Self::Internal,
    ];

    /// The code as it is in the header.
    pub fn as_str(&self) -> &str {
        match self {
            ErrorCode::InvalidArgument => "invalid-argument",
            ErrorCode::OutOfRange => "out-of-range",
            ErrorCode::Expired => "expired",
            ErrorCode::Unavailable => "unavailable",
            ErrorCode::PermissionDenied => "permission-denied",
            ErrorCode::Failed => "failed",
            ErrorCode::TimeLimit => "time-limit",
            ErrorCode::TooLarge => "too-large",
            ErrorCode::Internal => "internal",
            ErrorCode::Other(code) => code,
        }
    }
}

/// Maximum length in characters of an unknown code that is shown.
const MAX_CODE_CHARS: usize = 64;

impl From<&str> for ErrorCode {
    fn from(code: &str) -> Self {
        Self::KNOWN
            .into_iter()
            .find(|known| known.as_str() == code)
            .unwrap_or_else(|| {
                let escaped = escape(code.as_bytes()).to_string();
                Self::Other(escaped.chars().take(MAX_CODE_CHARS).collect())
            })
    }
}

/// Encodes a reply as a message to the queue `reply_to`.
pub fn encode_reply<'a>(
    reply: &'a Reply,
    reply_to: &'a [u8],
    correlation_id: Option<&[u8]>,
) -> Publish<'a> {
    let mut headers = TableBuilder::default();
    let (body, properties) = match reply {
        Ok(answer) => {
            let table = answer.headers.table();
            (
                &answer.body[..],
                Properties {
                    content_type: answer.content_type.as_deref().map(str::as_bytes),
                    message_type: answer.message_type.as_deref().map(str::as_bytes),
                    headers: Some(table).filter(|table| *table != Table::default()),
                    ..Properties::default()
                },
            )
        }
        Err(failure) => {
            headers = headers.with_text(ERROR_CODE_HEADER, failure.code.as_str());
            if let Some(exit_code) = failure.exit_code {
                headers = headers.with(EXIT_CODE_HEADER, Value::Integer(exit_code.into()));
            }
            let content_type = Some(TEXT.as_bytes());
            let message_type = Some(ERROR_TYPE.as_bytes());
            let headers = Some(headers.table());
            (
                failure.message.as_bytes(),
                Properties {
                    content_type,
                    headers,
                    message_type,
                    ..Properties::default()
                },
            )
        }
    };
    Publish {
        routing_key: reply_to,
        // RabbitMQ 3.10 delivers a mandatory message to a direct reply-to and returns it as well.
        mandatory: !reply_to.starts_with(DIRECT_REPLY_TO),
        properties: Properties {
            correlation_id,
            ..properties
        }
        .encode(),
        body,
    }
}

/// Decodes a reply. The body of an answer is unchanged.
///
/// # Errors
/// The failure in an error reply. If it has no code, the code is [`ErrorCode::Internal`], and so is
/// that of a reply that a server of AMQP 1.0 sends as a value: RabbitMQ passes that on in the
/// encoding of AMQP 1.0.
pub fn decode_reply(properties: &Properties, body: Vec<u8>) -> Reply {
    if properties.message_type == Some(AMQP_1_0_VALUE) {
        let message =
            "the reply is a value of AMQP 1.0, not a data section: the server must send a data section";
        return Err(Failure::new(ErrorCode::Internal, message));
    }
    if properties.message_type != Some(ERROR_TYPE.as_bytes()) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        return Ok(Answer {
            body,
            content_type: properties.content_type.map(text),
            message_type: properties.message_type.map(text),
            headers: properties
                .headers
                .map(TableBuilder::from_table)
                .unwrap_or_default(),
        });
    }
    let code = match properties.header(ERROR_CODE_HEADER) {
        Some(Value::Text(code)) => String::from_utf8_lossy(code).as_ref().into(),
        _ => ErrorCode::Internal,
    };
    let exit_code = match properties.header(EXIT_CODE_HEADER) {
        Some(Value::Integer(code)) => code.try_into().ok(),
        _ => None,
    };
    Err(Failure {
        code,
        message: String::from_utf8_lossy(&body).into_owned(),
        exit_code,
    })
}

/// Converts a time to Unix time in milliseconds, as in [`Request::deadline_ms`]; 0 for a time
/// before 1970.
pub fn unix_time_ms(time: SystemTime) -> i64 {
    let since_epoch = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// Text before and after the duration in the message of [`ErrorCode::Expired`].
const EXPIRED_MESSAGE: [&str; 2] = ["expired: ", " after the deadline, by the server's clock"];

/// The message of [`ErrorCode::Expired`] for a request that is this late by the server's clock.
pub fn expired_message(late: Duration) -> String {
    let [start, end] = EXPIRED_MESSAGE;
    format!("{start}{}{end}", format_duration(late))
}

/// The duration in a message of [`expired_message`]. `None` if another program wrote the message.
pub fn parse_expired_message(message: &str) -> Option<Duration> {
    let [start, end] = EXPIRED_MESSAGE;
    let late = message.strip_prefix(start)?.strip_suffix(end)?;
    humantime::parse_duration(late).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::option;
    use proptest::prelude::*;

    fn request() -> Request<'static> {
        Request {
            body: b"30",
            content_type: Some(TEXT.as_bytes()),
            reply_to: Some(b"rpc.reply.1"),
            correlation_id: Some(b"id"),
            deadline_ms: Some(1_767_225_600_000),
            ..Request::default()
        }
    }

    #[test]
    fn a_request_has_every_property_of_the_wire_table() {
        let publish = request().encode(b"rpc_queue", Some(Duration::from_millis(1_500)));
        assert_eq!(
            (publish.body, publish.routing_key, publish.mandatory),
            (&b"30"[..], &b"rpc_queue"[..], true)
        );
        let deadline = TableBuilder::default().with_text("x-deadline-ms", "1767225600000");
        let expected = Properties {
            content_type: Some(b"text/plain"),
            headers: Some(deadline.table()),
            delivery_mode: Some(2),
            correlation_id: Some(b"id"),
            message_id: Some(b"id"),
            reply_to: Some(b"rpc.reply.1"),
            expiration: Some(b"1500"),
            ..Properties::default()
        };
        assert_eq!(Properties::parse(&publish.properties), Ok(expected));
    }

    #[test]
    fn a_request_expires_after_1_ms_at_the_earliest() {
        let expiration = |time_left| {
            let publish = request().encode(b"queue", time_left);
            Properties::parse(&publish.properties)
                .unwrap()
                .expiration
                .map(<[u8]>::to_vec)
        };
        assert_eq!(expiration(Some(Duration::ZERO)).as_deref(), Some(&b"1"[..]));
        assert_eq!(
            expiration(Some(Duration::from_micros(2_999))).as_deref(),
            Some(&b"2"[..])
        );
        assert_eq!(expiration(None), None);
    }

    #[test]
    fn a_bare_body_is_a_request() {
        let request = Request::decode(&Properties::default(), b"7", false);
        assert_eq!(
            request,
            Request {
                body: b"7",
                ..Request::default()
            }
        );
    }

    #[test]
    fn a_message_id_is_the_correlation_id_of_a_request_that_has_none() {
        let id = |correlation_id| {
            let properties = Properties {
                correlation_id,
                message_id: Some(b"m"),
                ..Properties::default()
            };
            Request::decode(&properties, b"30", false).correlation_id
        };
        assert_eq!(id(None), Some(&b"m"[..]));
        assert_eq!(id(Some(b"c")), Some(&b"c"[..]));
    }

    #[test]
    fn a_reply_that_is_a_value_of_amqp_1_0_is_a_failure() {
        let properties = Properties {
            message_type: Some(b"amqp-1.0"),
            ..Properties::default()
        };
        let failure = decode_reply(&properties, b"\0Sw\xa1\x0230".to_vec()).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Internal);
    }

    #[test]
    fn a_deadline_is_a_signed_integer_or_its_digits() {
        let deadline = |value: &[u8]| {
            let table = [b"\x0dx-deadline-ms", value].concat();
            let properties = Properties {
                headers: Some(Table(&table)),
                ..Properties::default()
            };
            Request::decode(&properties, b"30", false).deadline_ms
        };
        assert_eq!(deadline(b"l\x80\0\0\0\0\0\0\0"), Some(i64::MIN));
        assert_eq!(deadline(b"S\0\0\0\x0217"), Some(17));
        for value in [
            &b"i\xff\xff\xff\xff"[..],
            b"S\0\0\0\x021x",
            b"S\0\0\0\x01\xff",
            b"S\0\0\0\0",
            b"T\0\0\0\0\0\0\0\x07",
            b"d\0\0\0\0\0\0\0\0",
            b"V",
        ] {
            assert_eq!(deadline(value), None, "{value:?}");
        }
    }

    #[test]
    fn unix_time_counts_milliseconds_from_1970() {
        let second = Duration::from_secs(1);
        assert_eq!(unix_time_ms(SystemTime::UNIX_EPOCH + second), 1_000);
        assert_eq!(unix_time_ms(SystemTime::UNIX_EPOCH - second), 0);
    }

    #[test]
    fn a_reply_to_a_direct_reply_to_is_not_mandatory() {
        let reply = Ok("1".to_owned().into());
        assert!(encode_reply(&reply, b"rpc.reply.1", None).mandatory);
        assert!(!encode_reply(&reply, b"amq.rabbitmq.reply-to.g2dkA", None).mandatory);
    }

    #[test]
    fn an_unknown_code_is_escaped_and_cut() {
        let code = |code: &str| ErrorCode::from(code).as_str().to_owned();
        assert_eq!(code("quota"), "quota");
        assert_eq!(
            code("\u{7f}\u{9b}\u{2028}\u{202e}"),
            r"\u{7f}\u{9b}\u{2028}\u{202e}"
        );
        assert_eq!(code(&"x".repeat(100_000)), "x".repeat(64));
    }

    fn any_answer() -> impl Strategy<Value = Answer> {
        let texts = [option::of(".{0,60}"), option::of("[a-d]{1,9}")];
        (any::<Vec<u8>>(), texts, option::of(".{0,60}")).prop_map(
            |(body, [content_type, message_type], header)| Answer {
                body,
                content_type,
                message_type,
                headers: header.map_or_else(TableBuilder::default, |text| {
                    TableBuilder::default().with_text("name", &text)
                }),
            },
        )
    }

    fn any_failure() -> impl Strategy<Value = Failure> {
        let code = prop_oneof!["[a-z-]{0,20}", Just("expired".to_owned())];
        (code, ".*", option::of(any::<i32>())).prop_map(|(code, message, exit_code)| Failure {
            code: code.as_str().into(),
            message,
            exit_code,
        })
    }

    #[test]
    fn headers_with_plain_values_are_text() {
        let headers = Table(
            b"\x05arrayA\0\0\0\0\x04boolt\x01\x05bytesx\0\0\0\x01\0\x06doubled\x3f\xf8\0\0\0\0\0\0\
            \x06numberl\xff\xff\xff\xff\xff\xff\xff\xf9\x05tableF\0\0\0\0\x04textS\0\0\0\x03a=b\x04voidV",
        );
        let texts = Request {
            headers,
            ..request()
        }
        .text_headers()
        .collect::<Vec<_>>();
        let expected = [
            ("bool", "true"),
            ("double", "1.5"),
            ("number", "-7"),
            ("text", "a=b"),
        ];
        assert_eq!(
            texts,
            expected.map(|(name, text)| (name.to_owned(), text.to_owned()))
        );
    }

    fn any_bytes() -> impl Strategy<Value = Option<Vec<u8>>> {
        option::of(proptest::collection::vec(any::<u8>(), 1..256))
    }

    /// A computer without a battery for its clock begins in 1970.
    #[test]
    fn the_duration_in_an_expired_message_can_be_parsed_also_if_it_is_decades() {
        for millis in [1, 3_590_999, 1_767_225_600_123] {
            let late = Duration::from_millis(millis);
            assert_eq!(parse_expired_message(&expired_message(late)), Some(late));
        }
        assert_eq!(parse_expired_message("expired: 5s late"), None);
    }

    proptest! {
        #[test]
        fn a_decoded_request_equals_the_encoded_one(
            body: Vec<u8>,
            texts in [any_bytes(), any_bytes(), any_bytes()],
            deadline_ms: Option<i64>,
        ) {
            let [reply_to, correlation_id, content_type] = texts.each_ref().map(Option::as_deref);
            let request =
                Request { body: &body, content_type, reply_to, correlation_id, deadline_ms, ..Request::default() };
            let publish = request.encode(b"queue", None);
            let decoded = Request::decode(&Properties::parse(&publish.properties).unwrap(), publish.body, false);
            let decoded =
                Request { headers: Table::default(), details: Details::default(), ..decoded };
            prop_assert_eq!(decoded, request);
        }

        #[test]
        fn a_decoded_reply_equals_the_encoded_one(
            reply in prop_oneof![any_answer().prop_map(Ok), any_failure().prop_map(Err)],
            id in any_bytes(),
        ) {
            let publish = encode_reply(&reply, b"queue", id.as_deref());
            let properties = Properties::parse(&publish.properties).unwrap();
            prop_assert_eq!(properties.correlation_id, id.as_deref());
            let decoded = decode_reply(&properties, publish.body.to_vec());
            prop_assert_eq!(decoded, reply.clone());
        }
    }
}
