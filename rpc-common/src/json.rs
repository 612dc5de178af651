//! Headers as JSON, and back.

use crate::encoding::Reader;
use crate::properties::{ArrayBuilder, Table, TableBuilder, Value};
use serde_json::{Map, Value as Json};

/// Maximum depth of tables and arrays that are converted. Each level takes stack, and a peer may
/// send any depth.
const MAX_DEPTH: usize = 32;

/// Maximum length in bytes of a header's name, in AMQP.
const MAX_NAME: usize = 255;

/// The headers as a JSON object: of several with one name, the first. Text that is not UTF-8 has
/// replacement characters. A header that is deeper than 32 levels, or malformed, is left out.
///
/// ```
/// use rpc_common::json::{headers_to_json, json_to_headers};
///
/// let json = serde_json::from_str(r#"{"lang": "de", "tries": [1, 2.5, true]}"#).unwrap();
/// let headers = json_to_headers(&json).unwrap();
/// assert_eq!(headers_to_json(headers.table()), json);
/// ```
pub fn headers_to_json(headers: Table) -> Map<String, Json> {
    table_to_json(headers, MAX_DEPTH).unwrap_or_default()
}

/// The headers of a JSON object. An integer has 32 bits if it fits, else 64.
///
/// # Errors
/// The reason why a header cannot be sent, with its name: the name is too long, the number too
/// large, or the value deeper than 32 levels.
pub fn json_to_headers(json: &Map<String, Json>) -> Result<TableBuilder, String> {
    json_to_table(json, MAX_DEPTH)
}

fn table_to_json(table: Table, depth: usize) -> Option<Map<String, Json>> {
    let depth = depth.checked_sub(1)?;
    let mut map = Map::new();
    for (name, value) in table.entries() {
        let name = String::from_utf8_lossy(name).into_owned();
        if let Some(value) = to_json(value, depth) {
            map.entry(name).or_insert(value);
        }
    }
    Some(map)
}

fn to_json(value: Value, depth: usize) -> Option<Json> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(match value {
        Value::Boolean(value) => value.into(),
        Value::Integer(number) => number.into(),
        Value::Unsigned(number) => number.into(),
        Value::Float(number) => number.into(),
        Value::Double(number) => number.into(),
        Value::Timestamp(seconds) => seconds.into(),
        Value::Text(bytes) | Value::Bytes(bytes) => text(bytes).into(),
        Value::Table(table) => table_to_json(table, depth)?.into(),
        Value::Array(bytes) => array_to_json(bytes, depth)?,
        Value::Decimal(scale, number) => (f64::from(number) / 10_f64.powi(scale.into())).into(),
        Value::Void => Json::Null,
    })
}

fn array_to_json(bytes: &[u8], depth: usize) -> Option<Json> {
    let depth = depth.checked_sub(1)?;
    let mut reader = Reader(bytes);
    let mut values = Vec::new();
    while !reader.0.is_empty() {
        values.push(to_json(Value::parse(&mut reader).ok()?, depth)?);
    }
    Some(values.into())
}

fn json_to_table(json: &Map<String, Json>, depth: usize) -> Result<TableBuilder, String> {
    let depth = depth.checked_sub(1).ok_or("too deep")?;
    let mut table = TableBuilder::default();
    for (name, value) in json {
        if name.len() > MAX_NAME {
            return Err(format!("a header's name has {} bytes", name.len()));
        }
        with_value(value, depth, &mut |value| table.add(name, value))
            .map_err(|reason| format!("header '{name}': {reason}"))?;
    }
    Ok(table)
}

/// Calls `with` with the value of a JSON value.
fn with_value(json: &Json, depth: usize, with: &mut dyn FnMut(Value)) -> Result<(), String> {
    match json {
        Json::Null => with(Value::Void),
        Json::Bool(value) => with(Value::Boolean(*value)),
        Json::Number(number) => with(match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Value::Integer(integer),
            (None, Some(double)) if number.is_f64() => Value::Double(double),
            _ => return Err(format!("the number {number} is too large")),
        }),
        Json::String(text) => with(Value::Text(text.as_bytes())),
        Json::Array(values) => {
            let depth = depth.checked_sub(1).ok_or("too deep")?;
            let mut array = ArrayBuilder::default();
            for value in values {
                with_value(value, depth, &mut |value| array.add(value))?;
            }
            with(array.array());
        }
        Json::Object(map) => with(Value::Table(json_to_table(map, depth)?.table())),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(json: Json) -> Map<String, Json> {
        match json {
            Json::Object(map) => map,
            other => panic!("not an object: {other}"),
        }
    }

    #[test]
    fn headers_keep_their_types_and_integers_are_small_where_they_fit() {
        let json = object(json!({
            "big": 3_000_000_000_i64, "bool": true, "list": [1, "two", [null]], "none": null,
            "number": 7, "real": 1.5, "table": {"a": {"b": -1}}, "text": "a"
        }));
        let headers = json_to_headers(&json).unwrap();
        assert_eq!(headers_to_json(headers.table()), json);
        let wire = |name: &str| {
            let mut entries = headers.table().entries();
            entries
                .find(|(entry, _)| *entry == name.as_bytes())
                .unwrap()
                .1
        };
        assert_eq!(wire("number"), Value::Integer(7));
        let small = json_to_headers(&object(json!({"n": 7}))).unwrap();
        assert_eq!(small.table(), Table(b"\x01nI\0\0\0\x07"));
    }

    #[test]
    fn what_cannot_be_sent_is_an_error() {
        let deep = (0..40).fold(Json::from(1), |inner, _| json!([inner]));
        for (json, reason) in [
            (
                json!({"n": u64::MAX}),
                "header 'n': the number 18446744073709551615 is too large",
            ),
            (json!({ "d": deep }), "header 'd': too deep"),
            (
                json!({ "x".repeat(256): 1 }),
                "a header's name has 256 bytes",
            ),
        ] {
            assert_eq!(json_to_headers(&object(json)).unwrap_err(), reason);
        }
    }

    #[test]
    fn a_header_that_is_malformed_or_too_deep_is_left_out() {
        let mut deep = b"V".to_vec();
        for _ in 0..40 {
            let len = u32::try_from(deep.len()).unwrap();
            deep = [&b"A"[..], &len.to_be_bytes(), &deep].concat();
        }
        let table = [b"\x01d", &deep[..], b"\x01nI\0\0\0\x07"].concat();
        assert_eq!(headers_to_json(Table(&table)), object(json!({"n": 7})));
        let malformed = b"\x01aA\0\0\0\x01z\x01nI\0\0\0\x07";
        assert_eq!(headers_to_json(Table(malformed)), object(json!({"n": 7})));
    }
}
