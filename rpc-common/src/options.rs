//! The values of options: names, durations and sizes.

use std::time::Duration;

/// Maximum duration that an option accepts: RabbitMQ refuses a longer `expiration`.
const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Maximum message size that RabbitMQ can be configured to accept (`max_message_size`), in bytes.
pub const MAX_SIZE: usize = 512 << 20;

/// Parses a name that goes into an AMQP short string: 1 to 255 bytes without control characters.
///
/// # Errors
/// The reason why the name is refused, for a message.
pub fn parse_name(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("the queue name must not be empty".into()),
        1..=255 if text.contains(char::is_control) => {
            Err("must not contain control characters".into())
        }
        1..=255 => Ok(text.into()),
        len => Err(format!("must be at most 255 bytes long, not {len}")),
    }
}

/// Parses a MIME type, which is an AMQP short string: 1 to 255 bytes without control characters.
///
/// # Errors
/// The reason why the type is refused, for a message.
pub fn parse_content_type(text: &str) -> Result<String, String> {
    parse_name(text).map_err(|_| "not a content type such as text/plain".into())
}

/// Parses a duration of 0 to 365 days: `1500ms`, `1.5s`, `2m`; a bare number is seconds.
///
/// # Errors
/// The reason why the duration is refused, for a message.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let is_number = !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.');
    let unit = if is_number { "s" } else { "" };
    match humantime::parse_duration(&format!("{text}{unit}")) {
        Ok(duration) if duration <= MAX_DURATION => Ok(duration),
        Ok(_) => Err("must be at most 365 days".into()),
        Err(_) => Err("not a duration such as 1500ms, 30s or 2m".into()),
    }
}

/// Parses a timeout: a duration of 1 ms to 365 days.
///
/// # Errors
/// As [`parse_duration`].
pub fn parse_timeout(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        timeout if timeout < Duration::from_millis(1) => Err("must be at least 1ms".into()),
        timeout => Ok(timeout),
    }
}

/// Parses a size in bytes: `512KiB`, `8MiB`, `1GiB`; a bare number is bytes.
///
/// # Errors
/// The reason why the size is refused, for a message.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let with_unit = units
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
    let (digits, shift) = with_unit.unwrap_or((text, 0));
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("not a size such as 512KiB, 8MiB or a number of bytes".into());
    }
    match digits
        .parse::<usize>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
    {
        Some(size) if size <= MAX_SIZE => Ok(size),
        _ => Err("must be at most 512MiB, RabbitMQ's limit".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_1_to_255_bytes_without_control_characters() {
        assert_eq!(parse_name(&"x".repeat(255)), Ok("x".repeat(255)));
        assert_eq!(
            parse_name(""),
            Err("the queue name must not be empty".into())
        );
        assert_eq!(
            parse_name("a\0"),
            Err("must not contain control characters".into())
        );
        let too_long = Err("must be at most 255 bytes long, not 256".into());
        assert_eq!(parse_name(&"ä".repeat(128)), too_long);
    }

    #[test]
    fn durations_have_units_or_are_seconds() {
        for (text, millis) in [
            ("1500ms", 1_500),
            ("30s", 30_000),
            ("2m", 120_000),
            ("5", 5_000),
            ("0", 0),
            ("0.2", 200),
            ("1.5", 1_500),
            ("1.5s", 1_500),
            ("1m 1s", 61_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(millis)),
                "{text}"
            );
        }
    }

    #[test]
    fn sizes_have_units_or_are_bytes() {
        for (text, size) in [
            ("0", 0),
            ("9", 9),
            ("512KiB", 512 << 10),
            ("8MiB", 8 << 20),
            ("512MiB", MAX_SIZE),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "MiB", "-1", "1.5MiB", "8MB", "8 MiB", "+1"] {
            assert_eq!(
                parse_size(text),
                Err("not a size such as 512KiB, 8MiB or a number of bytes".into()),
                "{text}"
            );
        }
        for text in [
            "513MiB",
            "1GiB",
            "18446744073709551616",
            "18014398509481984KiB",
        ] {
            assert_eq!(
                parse_size(text),
                Err("must be at most 512MiB, RabbitMQ's limit".into()),
                "{text}"
            );
        }
    }

    #[test]
    fn an_invalid_duration_is_refused_with_the_reason() {
        for text in [
            "",
            "s",
            "-1",
            ".",
            "1.",
            "1.5.2s",
            "1.5.2",
            "ten",
            "1e3",
            "99999999999999999999999",
        ] {
            assert_eq!(
                parse_duration(text),
                Err("not a duration such as 1500ms, 30s or 2m".into()),
                "{text}"
            );
        }
        for text in ["366d", "31536001", "18446744073709551615"] {
            assert_eq!(
                parse_duration(text),
                Err("must be at most 365 days".into()),
                "{text}"
            );
        }
        assert_eq!(parse_timeout("1ms"), Ok(Duration::from_millis(1)));
        assert_eq!(parse_timeout("999us"), Err("must be at least 1ms".into()));
        assert_eq!(parse_timeout("0"), Err("must be at least 1ms".into()));
    }
}
