//! Calls the function that the example `serve_upper` of `rpc-server` serves.
//!
//!     cargo run -p rpc-server --example serve_upper
//!     cargo run -p rpc-client --example call_upper -- "hello"

use rpc_client::{Client, Config};
use std::io::Write;

fn main() -> anyhow::Result<()> {
    let client = Client::new(Config {
        queue: "upper_queue".into(),
        ..Config::default()
    })?;
    for text in std::env::args().skip(1) {
        let answer = client.call(text.as_bytes())?;
        writeln!(std::io::stdout(), "{}", String::from_utf8_lossy(&answer))?;
    }
    Ok(())
}
