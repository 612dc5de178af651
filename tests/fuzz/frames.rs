//! Fuzzes what reads the broker's frames and the properties in them, with libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| rpc_common::connection::fuzz_check::check(bytes));
