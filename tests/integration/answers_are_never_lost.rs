//! Promise: an answer that arrived is never lost, however slowly standard output is read.

use crate::support::peer::Queue;
use crate::support::programs::{bash, Program};

/// The answers are larger than the buffer of the pipe, and their calls time out before the reader
/// begins to read.
#[test]
fn answers_are_printed_to_a_reader_that_begins_after_the_timeout() {
    let queue = Queue::named("slow_reader");
    let _server = Program::start_server(&queue, &["-q", "--prefetch", "64"]);
    let script = format!(
        "rpc-client --queue {} -t 2s --repeat 30000 30 | {{ sleep 5; uniq -c; }}
         echo ${{PIPESTATUS[0]}}",
        &*queue
    );
    bash(&script)
        .code(0)
        .stdout("  30000 832040\n0\n")
        .stderr("");
}
