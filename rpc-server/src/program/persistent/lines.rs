//! The lines of JSON between the server and a persistent program.

use base64::prelude::{Engine as _, BASE64_STANDARD};
use rpc_common::json::{headers_to_json, json_to_headers};
use rpc_common::message::{Answer, Failure, Reply, Request};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value as Json};
use std::borrow::Cow;

/// The request as it is shown to the program. Text that is not UTF-8 is left out: with replacement
/// characters two ids could become one.
#[derive(Serialize)]
struct RequestLine<'a> {
    id: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_encoding: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    app_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    headers: Map<String, Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline_ms: Option<i64>,
    redelivered: bool,
}

/// The line of a request, with its newline.
pub(super) fn request_line(id: u64, request: &Request) -> Vec<u8> {
    let data = as_text(request.body);
    let details = &request.details;
    let line = RequestLine {
        id,
        data,
        data_base64: data.is_none().then(|| BASE64_STANDARD.encode(request.body)),
        content_type: request.content_type.and_then(as_text),
        content_encoding: details.content_encoding.and_then(as_text),
        correlation_id: request.correlation_id.and_then(as_text),
        message_id: details.message_id.and_then(as_text),
        r#type: details.message_type.and_then(as_text),
        app_id: details.app_id.and_then(as_text),
        user_id: details.user_id.and_then(as_text),
        headers: headers_to_json(request.headers),
        deadline_ms: request.deadline_ms,
        redelivered: request.is_redelivered,
    };
    let mut line = serde_json::to_vec(&line).expect("text, numbers and maps are JSON");
    line.push(b'\n');
    line
}

fn as_text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Whether a line is `{"ready":true}`. Further fields are ignored.
pub(super) fn is_ready_line(line: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Ready {
        ready: bool,
    }
    serde_json::from_slice::<Ready>(line).is_ok_and(|line| line.ready)
}

#[derive(Deserialize)]
struct ReplyLine<'a> {
    id: u64,
    // `null` is a result, too.
    #[serde(borrow, default, deserialize_with = "some_raw")]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    result_base64: Option<Cow<'a, str>>,
    error: Option<ErrorLine>,
    content_type: Option<String>,
    headers: Option<Map<String, Json>>,
    r#type: Option<String>,
}

#[derive(Deserialize)]
struct ErrorLine {
    code: String,
    message: String,
}

fn some_raw<'de, D: Deserializer<'de>>(value: D) -> Result<Option<&'de RawValue>, D::Error> {
    Deserialize::deserialize(value).map(Some)
}

/// The reply in a line. A result that is a string has `content_type`, unless the line has another.
///
/// # Errors
/// Why the line is not the reply to the request `id`, for the log.
pub(super) fn parse_reply(line: &[u8], id: u64, content_type: &str) -> Result<Reply, String> {
    let reply: ReplyLine = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if reply.id != id {
        return Err(format!("its id is {}, not {id}", reply.id));
    }
    let (body, content_type) = match (reply.result, reply.result_base64, reply.error) {
        (Some(result), None, None) => match serde_json::from_str::<Cow<str>>(result.get()) {
            Ok(text) => (text.into_owned().into_bytes(), content_type),
            Err(_) if result.get().starts_with('"') => return Err("its result is not text".into()),
            Err(_) => (result.get().as_bytes().to_vec(), "application/json"),
        },
        (None, Some(base64), None) => {
            let decoded = BASE64_STANDARD.decode(base64.as_bytes());
            let bytes = decoded.map_err(|error| format!("its result_base64: {error}"))?;
            (bytes, content_type)
        }
        (None, None, Some(ErrorLine { code, message })) => {
            return Ok(Err(Failure::new(code.as_str().into(), message)));
        }
        (None, None, None) => return Err("it has neither a result nor an error".into()),
        _ => return Err("it has more than one of result, result_base64 and error".into()),
    };
    let content_type = reply
        .content_type
        .unwrap_or_else(|| content_type.to_owned());
    let mut answer = Answer::new(body).with_content_type(content_type);
    if let Some(headers) = reply.headers {
        answer = answer.with_headers(json_to_headers(&headers)?);
    }
    if let Some(message_type) = reply.r#type {
        answer = answer.with_type(message_type);
    }
    Ok(Ok(answer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rpc_common::message::{Details, ErrorCode};
    use rpc_common::properties::TableBuilder;

    #[test]
    fn a_request_is_one_line_with_what_is_known_of_it() {
        let headers = TableBuilder::default().with_text("Lang", "de");
        let request = Request {
            body: b"to\nbe",
            content_type: Some(b"text/plain"),
            correlation_id: Some(b"c1"),
            deadline_ms: Some(17),
            headers: headers.table(),
            details: Details {
                message_id: Some(b"m1"),
                message_type: Some(b"t"),
                app_id: Some(b"\xff"),
                ..Details::default()
            },
            ..Request::default()
        };
        let line = String::from_utf8(request_line(7, &request)).unwrap();
        assert_eq!(
            line,
            concat!(
                r#"{"id":7,"data":"to\nbe","content_type":"text/plain","correlation_id":"c1","#,
                r#""message_id":"m1","type":"t","headers":{"Lang":"de"},"deadline_ms":17,"#,
                r#""redelivered":false}"#,
                "\n"
            )
        );
        let bytes = Request {
            body: b"\xff\0",
            is_redelivered: true,
            ..Request::default()
        };
        assert_eq!(
            request_line(8, &bytes),
            b"{\"id\":8,\"data_base64\":\"/wA=\",\"redelivered\":true}\n"
        );
    }

    #[test]
    fn only_the_line_of_a_ready_program_says_so() {
        assert!(is_ready_line(br#" {"ready":true, "version": 2}"#));
        for line in [
            &b""[..],
            b"ready",
            br#"{"ready":false}"#,
            br#"{"ready":1}"#,
            b"[]",
        ] {
            assert!(!is_ready_line(line), "{line:?}");
        }
    }

    fn parse(line: &str) -> Result<Reply, String> {
        parse_reply(line.as_bytes(), 7, "text/x-mine")
    }

    fn answer(line: &str) -> (String, String) {
        let answer = parse(line).unwrap().unwrap();
        let body = String::from_utf8_lossy(&answer.body).into_owned();
        (body, answer.content_type.unwrap_or_default())
    }

    #[test]
    fn a_result_is_text_any_other_json_or_bytes() {
        let mine = |text: &str| (text.to_owned(), "text/x-mine".to_owned());
        let json = |text: &str| (text.to_owned(), "application/json".to_owned());
        assert_eq!(
            answer(r#"{"id":7,"result":"to \u0000\"be\""}"#),
            mine("to \0\"be\"")
        );
        assert_eq!(answer(r#"{"id":7,"result":1.50e3}"#), json("1.50e3"));
        assert_eq!(
            answer(r#"{"id":7,"result": {"a" : [1]}}"#),
            json(r#"{"a" : [1]}"#)
        );
        assert_eq!(
            answer(r#"{"id":7,"result":null,"error":null}"#),
            json("null")
        );
        assert_eq!(answer(r#"{"id":7,"result_base64":"AGE="}"#), mine("\0a"));
        let typed = r#"{"id":7,"result":"x","content_type":"a/b","type":"t","headers":{"h":1}}"#;
        let typed = parse(typed).unwrap().unwrap();
        assert_eq!(typed.content_type.as_deref(), Some("a/b"));
        assert_eq!(typed.message_type.as_deref(), Some("t"));
        assert_eq!(typed.headers.table().entries().count(), 1);
        let deep = format!(
            r#"{{"id":7,"result":{}1{}}}"#,
            "[".repeat(9_999),
            "]".repeat(9_999)
        );
        assert_eq!(answer(&deep).1, "application/json");
    }

    #[test]
    fn an_error_has_a_code_and_a_message() {
        let failure = |code: &str| {
            let line =
                format!(r#"{{"id":7,"error":{{"code":"{code}","message":"m","x":1}},"y":2}}"#);
            parse(&line).unwrap().unwrap_err()
        };
        let expected = Failure::new(ErrorCode::InvalidArgument, "m");
        assert_eq!(failure("invalid-argument"), expected);
        assert_eq!(failure("quota").code.as_str(), "quota");
    }

    #[test]
    fn whatever_is_not_the_reply_to_this_request_is_refused() {
        for line in [
            "",
            "debug: here",
            "7",
            r#"{"result":"x"}"#,
            r#"{"id":8,"result":"x"}"#,
            r#"{"id":"7","result":"x"}"#,
            r#"{"id":7.0,"result":"x"}"#,
            r#"{"id":7}"#,
            r#"{"id":7,"error":null}"#,
            r#"{"id":7,"result":"x","result":"y"}"#,
            r#"{"id":7,"id":7,"result":"x"}"#,
            r#"{"id":7,"result":"x","error":{"code":"c","message":"m"}}"#,
            r#"{"id":7,"result":"x","result_base64":"AA=="}"#,
            r#"{"id":7,"result_base64":"="}"#,
            r#"{"id":7,"error":"m"}"#,
            r#"{"id":7,"error":{"code":"c"}}"#,
            r#"{"id":7,"result":"x","headers":{"h":18446744073709551615}}"#,
            r#"{"id":7,"result":"\ud800"}"#,
            r#"{"id":7,"result":"x"} {"id":8,"result":"y"}"#,
            r#"{"id":7,"result":"x""#,
        ] {
            parse(line).unwrap_err();
        }
        parse_reply(b"{\"id\":7,\"result\":\"\xff\"}", 7, "").unwrap_err();
        parse_reply(b"{\"id\":7,\"result\":\"a\0b\"}", 7, "").unwrap_err();
    }
}
