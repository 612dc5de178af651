//! The properties of a message and its headers, as bytes of AMQP 0-9-1. Pure.
//!
//! RabbitMQ delivers properties as the publisher sent them, whatever they contain. So strings are
//! bytes here, and nothing recurses: of the headers only the top level is read, and a table or an
//! array in it is skipped by its length.

use crate::encoding::{put_long_string, put_short_string, Malformed, Reader};
use std::iter;

/// The **properties** of a message, borrowed from its content header. All are optional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Properties<'a> {
    /// The MIME type of the body.
    pub content_type: Option<&'a [u8]>,
    /// The encoding of the body, such as gzip.
    pub content_encoding: Option<&'a [u8]>,
    /// Further headers of the publisher.
    pub headers: Option<Table<'a>>,
    /// 2: persistent.
    pub delivery_mode: Option<u8>,
    /// From 0 to 255.
    pub priority: Option<u8>,
    /// Identifies the call.
    pub correlation_id: Option<&'a [u8]>,
    /// The queue for the reply.
    pub reply_to: Option<&'a [u8]>,
    /// Maximum time of the message in a queue: milliseconds, in decimal.
    pub expiration: Option<&'a [u8]>,
    /// Identifies the message.
    pub message_id: Option<&'a [u8]>,
    /// Unix time in seconds.
    pub timestamp: Option<u64>,
    /// The kind of the message.
    pub message_type: Option<&'a [u8]>,
    /// The user that published the message, checked by RabbitMQ.
    pub user_id: Option<&'a [u8]>,
    /// The program that published the message.
    pub app_id: Option<&'a [u8]>,
}

/// Flag of the first property; the following properties have the bits below, in the order of
/// [`Properties`].
const FIRST_FLAG: u16 = 1 << 15;

impl<'a> Properties<'a> {
    /// Parses the end of a content header: the flags, then the properties whose flag is set. Bytes
    /// behind them are ignored.
    ///
    /// # Errors
    /// [`Malformed`] if the properties do not fit into the bytes.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let flags = reader.short()?;
        let mut index = 0;
        let mut is_next_set = || {
            index += 1;
            flags & (FIRST_FLAG >> (index - 1)) != 0
        };
        // The fields are read in this order, which is the order of the flags.
        Ok(Properties {
            content_type: is_next_set().then(|| reader.short_string()).transpose()?,
            content_encoding: is_next_set().then(|| reader.short_string()).transpose()?,
            headers: is_next_set()
                .then(|| reader.long_string().map(Table))
                .transpose()?,
            delivery_mode: is_next_set().then(|| reader.octet()).transpose()?,
            priority: is_next_set().then(|| reader.octet()).transpose()?,
            correlation_id: is_next_set().then(|| reader.short_string()).transpose()?,
            reply_to: is_next_set().then(|| reader.short_string()).transpose()?,
            expiration: is_next_set().then(|| reader.short_string()).transpose()?,
            message_id: is_next_set().then(|| reader.short_string()).transpose()?,
            timestamp: is_next_set().then(|| reader.long_long()).transpose()?,
            message_type: is_next_set().then(|| reader.short_string()).transpose()?,
            user_id: is_next_set().then(|| reader.short_string()).transpose()?,
            app_id: is_next_set().then(|| reader.short_string()).transpose()?,
        })
    }

    /// The bytes that [`parse`](Self::parse) takes. A string longer than 255 bytes is cut.
    pub fn encode(&self) -> Vec<u8> {
        const FLAGS_LEN: usize = 2;
        const TYPICAL_LEN: usize = 192;
        let mut bytes =
            Vec::with_capacity(TYPICAL_LEN + self.headers.map_or(0, |headers| headers.0.len()));
        bytes.extend_from_slice(&[0; FLAGS_LEN]);
        let mut flags = 0;
        let mut flag = FIRST_FLAG;
        let mut put = |is_set: bool| {
            flags |= if is_set { flag } else { 0 };
            flag >>= 1;
        };
        let strings = [self.content_type, self.content_encoding];
        for string in strings {
            put(string.is_some());
            string.inspect(|string| put_short_string(&mut bytes, string));
        }
        put(self.headers.is_some());
        self.headers
            .inspect(|headers| put_long_string(&mut bytes, headers.0));
        for octet in [self.delivery_mode, self.priority] {
            put(octet.is_some());
            bytes.extend(octet);
        }
        for string in [
            self.correlation_id,
            self.reply_to,
            self.expiration,
            self.message_id,
        ] {
            put(string.is_some());
            string.inspect(|string| put_short_string(&mut bytes, string));
        }
        put(self.timestamp.is_some());
        bytes.extend(self.timestamp.map(u64::to_be_bytes).into_iter().flatten());
        for string in [self.message_type, self.user_id, self.app_id] {
            put(string.is_some());
            string.inspect(|string| put_short_string(&mut bytes, string));
        }
        bytes[..FLAGS_LEN].copy_from_slice(&flags.to_be_bytes());
        bytes
    }

    /// The first header of this name.
    pub fn header(&self, name: &str) -> Option<Value<'a>> {
        let mut headers = self.headers?.entries();
        headers
            .find(|(entry, _)| *entry == name.as_bytes())
            .map(|(_, value)| value)
    }
}

/// A **table** of names and values, encoded, without its length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table<'a>(pub &'a [u8]);

impl<'a> Table<'a> {
    /// The entries of the top level, in their order: up to the first one that is malformed, because
    /// no length tells where the next one begins.
    pub fn entries(self) -> impl Iterator<Item = (&'a [u8], Value<'a>)> {
        let mut reader = Reader(self.0);
        iter::from_fn(move || {
            let name = reader.short_string().ok()?;
            Some((name, Value::parse(&mut reader).ok()?))
        })
    }
}

/// A **value** of a table or an array.
///
/// The types are those of RabbitMQ, which differ from AMQP 0-9-1: see
/// <https://www.rabbitmq.com/amqp-0-9-1-errata>.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// `t`
    Boolean(bool),
    /// `b`, `s` or `U`, `I`, `l` or `L`: a signed integer of 1, 2, 4 or 8 bytes.
    Integer(i64),
    /// `B`, `u`, `i`: an unsigned integer of 1, 2 or 4 bytes.
    Unsigned(u32),
    /// `f`
    Float(f32),
    /// `d`
    Double(f64),
    /// `T`: Unix time in seconds.
    Timestamp(u64),
    /// `S`: text, which may be any bytes.
    Text(&'a [u8]),
    /// `x`: bytes.
    Bytes(&'a [u8]),
    /// `F`: a table, with its encoded entries.
    Table(Table<'a>),
    /// `A`: an array, with its encoded values.
    Array(&'a [u8]),
    /// `D`: a decimal number: the number of digits behind the point, and the number without the
    /// point.
    Decimal(u8, u32),
    /// `V`
    Void,
}

impl<'a> Value<'a> {
    /// Takes a type and a value.
    ///
    /// # Errors
    /// [`Malformed`] if the type is unknown, or the value does not fit into the bytes.
    pub fn parse(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        Ok(match reader.octet()? {
            b't' => Value::Boolean(reader.octet()? != 0),
            b'b' => Value::Integer(reader.octet()?.cast_signed().into()),
            b'B' => Value::Unsigned(reader.octet()?.into()),
            b's' | b'U' => Value::Integer(reader.short()?.cast_signed().into()),
            b'u' => Value::Unsigned(reader.short()?.into()),
            b'I' => Value::Integer(reader.long()?.cast_signed().into()),
            b'i' => Value::Unsigned(reader.long()?),
            b'l' | b'L' => Value::Integer(reader.long_long()?.cast_signed()),
            b'f' => Value::Float(f32::from_bits(reader.long()?)),
            b'd' => Value::Double(f64::from_bits(reader.long_long()?)),
            b'T' => Value::Timestamp(reader.long_long()?),
            b'D' => Value::Decimal(reader.octet()?, reader.long()?),
            b'S' => Value::Text(reader.long_string()?),
            b'x' => Value::Bytes(reader.long_string()?),
            b'F' => Value::Table(Table(reader.long_string()?)),
            b'A' => Value::Array(reader.long_string()?),
            b'V' => Value::Void,
            _ => return Err(Malformed),
        })
    }

    /// Appends the type and the value.
    fn put(self, bytes: &mut Vec<u8>) {
        let put_number = |bytes: &mut Vec<u8>, value_type: u8, number: &[u8]| {
            bytes.push(value_type);
            bytes.extend_from_slice(number);
        };
        let put_long = |bytes: &mut Vec<u8>, value_type: u8, long: &[u8]| {
            bytes.push(value_type);
            put_long_string(bytes, long);
        };
        match self {
            Value::Boolean(value) => put_number(bytes, b't', &[value.into()]),
            Value::Integer(number) => match i32::try_from(number) {
                Ok(number) => put_number(bytes, b'I', &number.to_be_bytes()),
                Err(_) => put_number(bytes, b'l', &number.to_be_bytes()),
            },
            Value::Unsigned(number) => put_number(bytes, b'i', &number.to_be_bytes()),
            Value::Float(number) => put_number(bytes, b'f', &number.to_be_bytes()),
            Value::Double(number) => put_number(bytes, b'd', &number.to_be_bytes()),
            Value::Timestamp(seconds) => put_number(bytes, b'T', &seconds.to_be_bytes()),
            Value::Text(text) => put_long(bytes, b'S', text),
            Value::Bytes(long) => put_long(bytes, b'x', long),
            Value::Table(table) => put_long(bytes, b'F', table.0),
            Value::Array(values) => put_long(bytes, b'A', values),
            Value::Decimal(scale, number) => {
                put_number(bytes, b'D', &[scale]);
                bytes.extend_from_slice(&number.to_be_bytes());
            }
            Value::Void => bytes.push(b'V'),
        }
    }

    /// The value as text, if it is a string, a number or a boolean.
    pub fn to_text(self) -> Option<String> {
        Some(match self {
            Value::Text(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Value::Boolean(value) => value.to_string(),
            Value::Integer(number) => number.to_string(),
            Value::Unsigned(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Double(number) => number.to_string(),
            _ => return None,
        })
    }
}

/// Builds a table, entry by entry. A name has at most 255 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableBuilder(Vec<u8>);

impl TableBuilder {
    /// Starts with the entries of a table.
    pub fn from_table(table: Table) -> Self {
        TableBuilder(table.0.to_vec())
    }

    /// Appends a text.
    #[must_use]
    pub fn with_text(self, name: &str, text: &str) -> Self {
        self.with(name, Value::Text(text.as_bytes()))
    }

    /// Appends a signed integer of 8 bytes.
    #[must_use]
    pub fn with_long_long(mut self, name: &str, number: i64) -> Self {
        put_short_string(&mut self.0, name.as_bytes());
        self.0.push(b'l');
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    /// Appends a value. An integer has 4 bytes if it fits, else 8: some clients read no others.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.add(name, value);
        self
    }

    /// Appends a value, as [`with`](Self::with) does.
    pub fn add(&mut self, name: &str, value: Value) {
        put_short_string(&mut self.0, name.as_bytes());
        value.put(&mut self.0);
    }

    /// The table.
    pub fn table(&self) -> Table<'_> {
        Table(&self.0)
    }

    /// The size of the table in bytes.
    pub fn size(&self) -> usize {
        self.0.len()
    }
}

/// Builds an array, value by value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArrayBuilder(Vec<u8>);

impl ArrayBuilder {
    /// Appends a value, as [`TableBuilder::with`] does.
    pub fn add(&mut self, value: Value) {
        value.put(&mut self.0);
    }

    /// The array.
    pub fn array(&self) -> Value<'_> {
        Value::Array(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::frame::generation::gen_content_header_frame;
    use amq_protocol::frame::{parse_frame, AMQPFrame};
    use amq_protocol::protocol::basic::AMQPProperties;
    use amq_protocol::types::{AMQPValue, FieldTable};
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    /// A content header is a frame header (7 bytes), a class (2), a weight (2) and the body's size
    /// (8), then this.
    const FLAGS_OFFSET: usize = 19;

    fn encoded_by_amq_protocol(properties: &AMQPProperties) -> Vec<u8> {
        let mut buffer = vec![0; 1 << 16];
        let (_, len) = gen_content_header_frame((&mut buffer, 0), 1, 60, 5, properties).unwrap();
        buffer[FLAGS_OFFSET..len - 1].to_vec()
    }

    fn parsed_by_amq_protocol(bytes: &[u8]) -> AMQPProperties {
        let payload = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5], bytes].concat();
        let mut frame = vec![2, 0, 1];
        put_long_string(&mut frame, &payload);
        frame.push(0xce);
        match parse_frame(&frame).unwrap().1 {
            AMQPFrame::Header(_, _, header) => header.properties,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn strings_of_any_bytes_are_kept_and_hide_no_other_property() {
        let ids = Properties {
            correlation_id: Some(b"\xff\xc3\xa9x\xe2\x82"),
            reply_to: Some(b"to\x80"),
            expiration: Some(b"500"),
            ..Properties::default()
        };
        assert_eq!(Properties::parse(&ids.encode()), Ok(ids));
        assert_eq!(
            parsed_by_amq_protocol(&ids.encode()),
            AMQPProperties::default(),
            "what amq-protocol makes of it"
        );
    }

    #[test]
    fn a_hundred_kilobytes_of_nested_tables_are_one_value() {
        let mut nested = Vec::new();
        for _ in 0..15_000 {
            let mut outer = vec![1, b'n', b'F'];
            put_long_string(&mut outer, &nested);
            nested = outer;
            if nested.len() > 100_000 {
                break;
            }
        }
        let with_headers = Properties {
            headers: Some(Table(&nested)),
            ..Properties::default()
        };
        let bytes = with_headers.encode();
        let entries = Properties::parse(&bytes)
            .unwrap()
            .headers
            .unwrap()
            .entries()
            .collect::<Vec<_>>();
        assert!(
            matches!(entries[..], [(b"n", Value::Table(table))] if table.0.len() == nested.len() - 7)
        );
    }

    #[test]
    fn every_type_of_rabbitmq_is_read() {
        let table = Table(
            b"\x01at\x01\x01bb\xff\x01cB\xff\x01ds\xff\xff\x01eu\xff\xff\x01fI\xff\xff\xff\xff\x01gi\0\0\0\x01\
            \x01hl\0\0\0\0\0\0\0\x01\x01iL\0\0\0\0\0\0\0\x01\x01jf\0\0\0\0\x01kd\0\0\0\0\0\0\0\0\
            \x01lD\x02\0\0\0\x01\x01mT\0\0\0\0\0\0\0\x01\x01nS\0\0\0\x01s\x01oA\0\0\0\x01V\x01pF\0\0\0\0\
            \x01qx\0\0\0\x01\xff\x01rV\x01sU\0\x01",
        );
        let values = table.entries().map(|(_, value)| value).collect::<Vec<_>>();
        let expected = [
            Value::Boolean(true),
            Value::Integer(-1),
            Value::Unsigned(255),
            Value::Integer(-1),
            Value::Unsigned(65_535),
            Value::Integer(-1),
            Value::Unsigned(1),
            Value::Integer(1),
            Value::Integer(1),
            Value::Float(0.0),
            Value::Double(0.0),
            Value::Decimal(2, 1),
            Value::Timestamp(1),
            Value::Text(b"s"),
            Value::Array(b"V"),
            Value::Table(Table(b"")),
            Value::Bytes(b"\xff"),
            Value::Void,
            Value::Integer(1),
        ];
        assert_eq!(values, expected);
    }

    #[test]
    fn what_does_not_fit_is_malformed_and_ends_a_table() {
        for bytes in [
            &b""[..],
            b"\x80",
            b"\x80\0",
            b"\x80\0\x02a",
            b"\x20\0\0\0\0\x01",
            b"\x04\0\x03id",
        ] {
            assert_eq!(Properties::parse(bytes), Err(Malformed), "{bytes:?}");
        }
        for bytes in [
            &b"\x01az"[..],
            b"\x01aI\0\0\0",
            b"\x01aS\0\0\0\x02b",
            b"\x01a",
            b"\x02a",
        ] {
            let table = [b"\x01nV", bytes].concat();
            assert_eq!(Table(&table).entries().count(), 1, "{bytes:?}");
        }
    }

    fn bytes() -> impl Strategy<Value = Option<Vec<u8>>> {
        option::of(vec(any::<u8>(), 0..256))
    }

    proptest! {
        #[test]
        fn properties_are_read_as_they_were_written(
            strings in [bytes(), bytes(), bytes(), bytes(), bytes(), bytes(), bytes(), bytes(), bytes()],
            headers in bytes(),
            octets in any::<[Option<u8>; 2]>(),
            timestamp: Option<u64>,
        ) {
            let [content_type, content_encoding, correlation_id, reply_to, expiration, message_id, message_type, user_id, app_id] =
                strings.each_ref().map(Option::as_deref);
            let properties = Properties {
                content_type, content_encoding, correlation_id, reply_to, expiration, message_id, message_type, user_id, app_id,
                headers: headers.as_deref().map(Table),
                delivery_mode: octets[0],
                priority: octets[1],
                timestamp,
            };
            let bytes = properties.encode();
            prop_assert_eq!(Properties::parse(&bytes), Ok(properties));
            let longer = [&bytes[..], b"behind"].concat();
            prop_assert_eq!(Properties::parse(&longer), Ok(properties));
            for len in 0..bytes.len() {
                prop_assert_eq!(Properties::parse(&bytes[..len]), Err(Malformed));
            }
        }

        #[test]
        fn amq_protocol_writes_and_reads_the_same_bytes(
            text in "[a-z\u{e9}\u{20ac}]{0,40}", number: i64, small: i32, priority: u8, time: u64
        ) {
            let headers = FieldTable::from([
                ("a".into(), AMQPValue::LongString(text.clone())),
                ("b".into(), AMQPValue::LongLongInt(number)),
                ("c".into(), AMQPValue::LongInt(small)),
            ]);
            let theirs = AMQPProperties::default()
                .with_content_type(text.clone())
                .with_headers(headers)
                .with_priority(priority)
                .with_correlation_id(text.clone())
                .with_timestamp(time)
                .with_app_id(text.clone());
            let table = TableBuilder::default().with_text("a", &text).with_long_long("b", number).with("c", Value::Integer(small.into()));
            let ours = Properties {
                content_type: Some(text.as_bytes()),
                headers: Some(table.table()),
                priority: Some(priority),
                correlation_id: Some(text.as_bytes()),
                timestamp: Some(time),
                app_id: Some(text.as_bytes()),
                ..Properties::default()
            };
            prop_assert_eq!(ours.encode(), encoded_by_amq_protocol(&theirs));
            prop_assert_eq!(parsed_by_amq_protocol(&ours.encode()), theirs);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in vec(any::<u8>(), 0..300)) {
            if let Ok(properties) = Properties::parse(&bytes) {
                let entries = properties.headers.into_iter().flat_map(Table::entries);
                prop_assert!(entries.filter_map(|(_, value)| value.to_text()).count() <= bytes.len());
            }
        }
    }
}
