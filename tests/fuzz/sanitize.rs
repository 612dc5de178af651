//! Fuzzes `rpc_common::connection::sanitize` with libFuzzer.

#![no_main]

mod check;

use rpc_common::connection::sanitize::{correlation_id_range, sanitize, Changes, MAX_DEPTH};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::check(bytes));
