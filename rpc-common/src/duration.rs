//! Durations as they are typed: `1500ms`, `30s`, `2m`, and a bare number for seconds.

use std::time::Duration;

/// The longest duration that an option takes: RabbitMQ refuses a larger `expiration`.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Reads a duration, 0 to 365 days.
///
/// # Errors
/// A sentence for the prompt when the text is no duration or one that is too long.
pub fn parse(text: &str) -> Result<Duration, String> {
    let duration = match text.parse::<u64>() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text),
    };
    match duration {
        Ok(duration) if duration <= LONGEST => Ok(duration),
        Ok(_) => Err("longer than 365 days".into()),
        Err(_) => Err("not a duration such as 1500ms, 30s or 2m".into()),
    }
}

/// Reads a time limit, 1 ms to 365 days.
///
/// # Errors
/// As [`parse`], and when the limit is shorter than 1 ms.
pub fn parse_limit(text: &str) -> Result<Duration, String> {
    match parse(text)? {
        limit if limit < Duration::from_millis(1) => Err("shorter than 1ms".into()),
        limit => Ok(limit),
    }
}

/// A duration as it could have been typed, for messages.
#[must_use]
pub fn display(duration: Duration) -> impl std::fmt::Display {
    humantime::format_duration(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_type() {
        for (text, millis) in [
            ("1500ms", 1_500),
            ("30s", 30_000),
            ("2m", 120_000),
            ("5", 5_000),
            ("0", 0),
            ("1m 1s", 61_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn says_what_is_wrong() {
        for text in ["", "s", "-1", "1.5.2s", "ten", "1e3", "99999999999999999999999"] {
            assert_eq!(
                parse(text),
                Err("not a duration such as 1500ms, 30s or 2m".into()),
                "{text}"
            );
        }
        for text in ["366d", "31536001", "18446744073709551615"] {
            assert_eq!(parse(text), Err("longer than 365 days".into()), "{text}");
        }
        assert_eq!(parse_limit("999us"), Err("shorter than 1ms".into()));
        assert_eq!(parse_limit("0"), Err("shorter than 1ms".into()));
    }
}
