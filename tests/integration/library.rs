//! Other Rust programs call and serve their own function with the libraries.

use crate::support::programs::{assert_output, command, Program};

#[test]
fn the_examples_call_another_function_with_the_same_loops() {
    let server = Program::spawn("examples/serve_upper", &[]);
    assert_eq!(server.next_line(), "serving upper_queue, Ctrl-C stops");
    assert_output(
        command("examples/call_upper").args(["hello", "Grüße"]),
        0,
        "HELLO\nGRÜSSE\n",
        "",
    );
    server.stop();
}
