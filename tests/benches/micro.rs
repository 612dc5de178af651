//! Benchmarks of the parts of a call: `cargo bench -p rpc-benches`.

use divan::{black_box, Bencher};
use rpc_common::fib::parse_number;
use rpc_common::message::{decode_reply, encode_reply, Reply, Request, TEXT};
use rpc_common::properties::Properties;
use rpc_common::text::escape;
use std::time::Duration;

fn main() {
    divan::main();
}

const ID: &[u8] = b"67e55044-10b1-426f-9247-bb680e5fe0c8";
const REPLY_TO: &[u8] = b"rpc.reply.67e55044-10b1-426f-9247-bb680e5fe0c8";

mod fib {
    use super::{black_box, Bencher};
    use rpc_common::fib::fib;

    /// Up to 93, fib(n) fits in 64 bits; the largest is the default of `--max-n`.
    const NUMBERS: [u64; 6] = [30, 93, 94, 1_000, 100_000, 1_000_000];

    #[divan::bench(args = NUMBERS)]
    fn number(n: u64) -> impl Sized {
        fib(black_box(n))
    }

    #[divan::bench(args = NUMBERS)]
    fn decimal_text(bencher: Bencher, n: u64) {
        let number = fib(n);
        bencher.bench_local(|| black_box(&number).to_string());
    }
}

fn request() -> Request<'static> {
    Request {
        body: b"30",
        content_type: Some(TEXT.as_bytes()),
        reply_to: Some(REPLY_TO),
        correlation_id: Some(ID),
        deadline_ms: Some(1_767_225_600_000),
        ..Request::default()
    }
}

#[divan::bench]
fn request_encode(bencher: Bencher) {
    let request = request();
    bencher.bench_local(|| black_box(&request).encode(b"rpc_queue", Some(Duration::from_secs(30))));
}

#[divan::bench]
fn request_decode(bencher: Bencher) {
    let properties = request()
        .encode(b"rpc_queue", Some(Duration::from_secs(30)))
        .properties;
    bencher.bench_local(|| {
        let properties = Properties::parse(black_box(&properties)).expect("they are well formed");
        let request = Request::decode(&properties, b"30", false);
        black_box(request.deadline_ms)
    });
}

#[divan::bench]
fn reply_encode(bencher: Bencher) {
    let reply: Reply = Ok("832040".to_owned().into());
    bencher
        .bench_local(|| black_box(encode_reply(black_box(&reply), REPLY_TO, Some(ID))).mandatory);
}

#[divan::bench]
fn reply_decode(bencher: Bencher) {
    let reply: Reply = Ok("832040".to_owned().into());
    let properties = encode_reply(&reply, REPLY_TO, Some(ID)).properties;
    bencher
        .with_inputs(|| b"832040".to_vec())
        .bench_local_values(|body| {
            let properties =
                Properties::parse(black_box(&properties)).expect("they are well formed");
            decode_reply(&properties, body)
        });
}

#[divan::bench(args = ["7", "18446744073709551615", "thirty"])]
fn number_parse(text: &str) -> impl Sized {
    parse_number(black_box(text.as_bytes()))
}

#[divan::bench]
fn escape_plain() -> String {
    escape(black_box(b"832040")).to_string()
}

#[divan::bench]
fn escape_hostile() -> String {
    escape(black_box("\u{1b}[2J\r\n\u{202e}".as_bytes())).to_string()
}
