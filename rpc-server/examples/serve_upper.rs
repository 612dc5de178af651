//! Serves another function with the same loop: the request's text in upper case.
//!
//!     cargo run -p rpc-server --example serve_upper
//!     cargo run -p rpc-client --example call_upper -- "hello"

use rpc_common::message::Request;
use rpc_server::{serve, stop_signal, Caller, Config};

fn main() -> anyhow::Result<()> {
    let config = Config {
        queue: "upper_queue".into(),
        ..Config::default()
    };
    let upper = |request: &Request, _: &Caller| Ok(request.text()?.to_uppercase().into());
    serve(&config, &upper, &stop_signal()?, &|| {
        println!("serving upper_queue, Ctrl-C stops");
    })?;
    Ok(())
}
