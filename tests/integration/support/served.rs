//! A program that is served, and its callers.

use super::eventually;
use super::peer::{call, Queue};
use super::programs::Program;
use amiquip::{AmqpProperties, AmqpValue, Delivery};
use rpc_common::message::{decode_reply, ErrorCode, Failure, Reply};
use rpc_common::properties::{Properties, TableBuilder, Value};
use rustix::process::{test_kill_process, Pid};

/// A queue that is served by a program.
pub(crate) struct Served {
    pub(crate) queue: Queue,
    pub(crate) server: Program,
}

impl Served {
    pub(crate) fn start(test: &str, args: &[&str]) -> Self {
        let queue = Queue::named(test);
        let server = Program::start_server(&queue, args);
        Served { queue, server }
    }

    /// Serves a persistent program in Python.
    pub(crate) fn python(test: &str, options: &[&str], script: &str) -> Self {
        let program = ["--persistent", "--", "python3", "-c", script];
        Served::start(test, &[options, &program].concat())
    }

    /// Serves a shell script.
    pub(crate) fn script(test: &str, options: &[&str], script: &str) -> Self {
        Served::start(test, &[options, &["--", "sh", "-c", script]].concat())
    }

    pub(crate) fn ask(&self, body: &[u8]) -> Reply {
        self.ask_with(body, AmqpProperties::default())
    }

    pub(crate) fn ask_with(&self, body: &[u8], properties: AmqpProperties) -> Reply {
        let reply = call(&self.queue, body, properties);
        decode(reply)
    }

    /// Waits until the server announces a request with this text.
    pub(crate) fn wait_for_request(&self, text: &str) {
        while !self.server.next_line().contains(text) {}
    }

    #[track_caller]
    pub(crate) fn assert_answer(&self, body: &[u8], answer: &[u8]) {
        let reply = self.ask(body);
        assert!(
            reply.as_ref().is_ok_and(|reply| reply.body == answer),
            "{:?}",
            self.server.new_log()
        );
    }
}

/// The reply in a message that amiquip has received.
pub(crate) fn decode(reply: Delivery) -> Reply {
    let properties = &reply.properties;
    let body = reply.body;
    let bytes = |text: &Option<String>| text.clone().map(String::into_bytes);
    let content_type = bytes(properties.content_type());
    let message_type = bytes(properties.type_());
    let mut headers = TableBuilder::default();
    for (name, value) in properties.headers().clone().unwrap_or_default() {
        headers = match value {
            AmqpValue::LongString(text) => headers.with_text(&name, &text),
            AmqpValue::LongInt(number) => headers.with(&name, Value::Integer(number.into())),
            other => panic!("a header of a reply is {other:?}"),
        };
    }
    let properties = Properties {
        content_type: content_type.as_deref(),
        message_type: message_type.as_deref(),
        headers: Some(headers.table()),
        ..Properties::default()
    };
    decode_reply(&properties, body)
}

pub(crate) fn failure(code: ErrorCode, message: &str) -> Failure {
    Failure::new(code, message)
}

pub(crate) fn wait_until_ended(pids: &[Pid]) {
    let is_running = |pid: &Pid| test_kill_process(*pid).is_ok();
    eventually("the end of the processes", || {
        (!pids.iter().any(is_running)).then_some(())
    });
}
