//! Text for people: what is safe to print.

use rustix::io::Errno;
use std::borrow::Cow;
use std::fmt::{self, Display, Write};
use std::io;

// In the form that `options::parse_duration` accepts.
pub use humantime::format_duration;

/// Number of bytes that [`escape`] shows.
const MAX_ESCAPED_BYTES: usize = 200;

/// Makes bytes from the wire safe to print: escapes control characters, invisible characters and
/// invalid UTF-8, and cuts after 200 bytes. What is escaped already stays as it is.
pub fn escape(bytes: &[u8]) -> impl Display + '_ {
    escape_up_to(MAX_ESCAPED_BYTES, bytes)
}

/// As [`escape`], but cuts after `max` bytes.
pub fn escape_up_to(max: usize, bytes: &[u8]) -> impl Display + '_ {
    Escaped { bytes, max }
}

struct Escaped<'a> {
    bytes: &'a [u8],
    max: usize,
}

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.bytes[..self.bytes.len().min(self.max)];
        for chunk in shown.utf8_chunks() {
            for char in chunk.valid().chars() {
                match char {
                    // Harmless, but `escape_debug` would escape them. A text may have been escaped
                    // before, such as the sentence of an error reply.
                    '"' | '\'' | '\\' => f.write_char(char)?,
                    _ => write!(f, "{}", char.escape_debug())?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        if shown.len() < self.bytes.len() {
            f.write_char('…')?;
        }
        Ok(())
    }
}

/// Describes an error of the operating system for a message, such as "connection refused": in lower
/// case, and without its number.
pub fn describe_io_error(error: &io::Error) -> String {
    let text = error.to_string();
    match Errno::from_io_error(error) {
        Some(Errno::MFILE) => return "too many open files: raise the limit (ulimit -n)".into(),
        Some(Errno::NFILE) => {
            return "too many open files on this machine: raise the limit (sysctl fs.file-max)"
                .into()
        }
        _ => {}
    }
    // Messages about a host name say already that it could not be resolved.
    let text = text.trim_start_matches("failed to lookup address information: ");
    let text = text.split(" (os error").next().unwrap_or(text);
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_lowercase().chain(chars).collect()
    })
}

/// Whether a character can control a terminal or reorder text on it: C0 (line ends and tab, too),
/// DEL, C1, and Unicode's line separators and bidirectional controls.
pub fn is_control(char: char) -> bool {
    let reorders = |char| matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    char.is_control() || reorders(char)
}

/// Makes a text of any length safe to print: escapes control characters but newlines and tabs, and
/// invalid UTF-8.
pub fn escape_text(bytes: &[u8]) -> impl Display + '_ {
    EscapedText(bytes)
}

struct EscapedText<'a>(&'a [u8]);

impl Display for EscapedText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_escaped = |char| is_control(char) && !matches!(char, '\n' | '\t');
        for chunk in self.0.utf8_chunks() {
            for part in chunk.valid().split_inclusive(is_escaped) {
                let plain = part.trim_end_matches(is_escaped);
                write!(f, "{plain}{}", part[plain.len()..].escape_debug())?;
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// The text with the password of each URL masked: `amqp://me:***@host`. A password may have any
/// characters but blanks.
///
/// ```
/// use rpc_common::text::mask_passwords;
///
/// assert_eq!(mask_passwords("not a number: 'amqp://me:se/same@host'"), "not a number: 'amqp://me:***@host'");
/// ```
pub fn mask_passwords(text: &str) -> Cow<'_, str> {
    if !text.contains("://") {
        return Cow::Borrowed(text);
    }
    let mask = |word: &str| {
        let (scheme, rest) = word.split_once("://")?;
        let (login, host) = rest.rsplit_once('@')?;
        let (user, password) = login.split_once(':')?;
        if (user, password) == ("user", "password") {
            return None; // the form of a URL, in our own messages
        }
        Some(format!("{scheme}://{user}:***@{host}"))
    };
    let words = text.split_inclusive(char::is_whitespace);
    words
        .map(|word| mask(word).map_or(Cow::Borrowed(word), Cow::Owned))
        .collect::<String>()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_escaped_twice_is_as_escaped_once() {
        let once = escape(b"3\n\xff\\ \x1b").to_string();
        assert_eq!(once, r"3\n\xff\ \u{1b}");
        assert_eq!(escape(once.as_bytes()).to_string(), once);
    }

    #[test]
    fn escaped_text_cannot_control_a_terminal() {
        assert_eq!(escape(b"it's \"30\"").to_string(), "it's \"30\"");
        assert_eq!(
            escape("\u{1b}[2J\r\n\u{202e}".as_bytes()).to_string(),
            r"\u{1b}[2J\r\n\u{202e}"
        );
        assert_eq!(escape(b"a\xff\xfe").to_string(), r"a\xff\xfe");
        assert_eq!(escape(&[b'x'; 201]).to_string(), "x".repeat(200) + "…");
    }

    proptest! {
        #[test]
        fn escaped_text_is_one_line_of_printable_characters(bytes: Vec<u8>) {
            prop_assert!(!escape(&bytes).to_string().contains(char::is_control));
        }
    }

    #[test]
    fn a_long_text_keeps_its_lines_and_tabs_but_cannot_control_a_terminal() {
        let text = "a\tb\nC:\\ \"e\u{301}\"\n".repeat(100);
        assert_eq!(escape_text(text.as_bytes()).to_string(), text);
        let hostile = "\r\0\u{1b}[2J\u{7f}\u{9b}\u{202e}x";
        assert_eq!(
            escape_text(hostile.as_bytes()).to_string(),
            r"\r\0\u{1b}[2J\u{7f}\u{9b}\u{202e}x"
        );
        assert_eq!(escape_text(b"a\xff\xfe\n").to_string(), "a\\xff\\xfe\n");
    }

    #[test]
    fn an_io_error_is_described_in_lower_case_and_without_its_number() {
        let describe = |message| describe_io_error(&io::Error::other(message));
        assert_eq!(
            describe("Connection refused (os error 111)"),
            "connection refused"
        );
        assert_eq!(
            describe("failed to lookup address information: Name or service not known"),
            "name or service not known"
        );
        assert_eq!(describe(""), "");
    }
}
