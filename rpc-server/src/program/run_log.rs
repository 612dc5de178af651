//! Logs the lines that a program writes to standard error.

use rpc_common::logging::PROGRAM_TARGET;
use rpc_common::text::escape_up_to;

/// Maximum number of lines of a run that are logged.
const MAX_LINES: u64 = 100;

/// Maximum length in bytes of a line that is logged.
const MAX_LINE: usize = 1_000;

/// Logs the lines of one run.
pub(crate) struct RunLog {
    /// Identifies the request, safe to print.
    id: String,
    /// The line that has not ended, as far as it is shown.
    line: Vec<u8>,
    /// Number of lines that have begun.
    lines: u64,
    is_in_line: bool,
}

impl RunLog {
    pub(crate) fn new(id: &str) -> Self {
        RunLog {
            id: id.into(),
            line: Vec::new(),
            lines: 0,
            is_in_line: false,
        }
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if !self.is_in_line {
                self.lines += 1;
                self.is_in_line = true;
            }
            let text = part.strip_suffix(b"\n").unwrap_or(part);
            // One more than is shown, to show that there is more.
            let room = (MAX_LINE + 1).saturating_sub(self.line.len());
            if self.lines <= MAX_LINES {
                self.line.extend_from_slice(&text[..text.len().min(room)]);
            }
            if text.len() < part.len() {
                self.end_line();
            }
        }
    }

    /// Logs what is left, and how many lines were not logged. What follows begins anew.
    pub(crate) fn finish(&mut self) {
        if self.is_in_line {
            self.end_line();
        }
        if self.lines > MAX_LINES {
            let id = &self.id;
            let more = self.lines - MAX_LINES;
            log::info!(target: PROGRAM_TARGET, "program[{id}]: {more} more lines");
        }
        self.lines = 0;
    }

    fn end_line(&mut self) {
        if self.lines <= MAX_LINES {
            let id = &self.id;
            let line = escape_up_to(MAX_LINE, &self.line);
            log::info!(target: PROGRAM_TARGET, "program[{id}]: {line}");
        }
        self.line.clear();
        self.is_in_line = false;
    }
}
