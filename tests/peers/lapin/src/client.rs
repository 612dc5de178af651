//! The RPC tutorial's client, on lapin: lapin-client N... prints fib(N) for each N, one per line,
//! in order.
//!
//! Up to RPC_IN_FLIGHT calls are outstanding at once, 16 unless it is set. With RPC_REPEAT=K it
//! asks for each N K times, and prints the number of calls, the seconds they took, and the median
//! of their latencies in microseconds, instead of the answers.

use anyhow::Context;
use futures_util::{future, stream, StreamExt, TryStreamExt};
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Consumer};
use lapin_peer::{connect, number, queue, variable};
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// The calls that wait for an answer, by correlation id.
type Pending = Mutex<HashMap<String, oneshot::Sender<(Vec<u8>, Instant)>>>;

struct Client {
    channel: Channel,
    server: ShortString,
    replies: ShortString,
    pending: Pending,
}

impl Client {
    async fn call(&self, place: usize, n: &str) -> anyhow::Result<(usize, Vec<u8>, Duration)> {
        // Unique enough as an id: the queue is new and exclusive.
        let id = place.to_string();
        let properties = BasicProperties::default()
            .with_content_type("text/plain".into())
            .with_reply_to(self.replies.clone())
            .with_correlation_id(id.as_str().into());
        let (sender, answer) = oneshot::channel();
        self.pending
            .lock()
            .expect("nobody panics")
            .insert(id, sender);
        let began = Instant::now();
        self.channel
            .basic_publish(
                "".into(),
                self.server.clone(),
                BasicPublishOptions::default(),
                n.as_bytes(),
                properties,
            )
            .await?;
        let (answer, at) = answer.await.context("the connection is lost")?;
        Ok((place, answer, at - began))
    }

    /// Passes each reply to the call that waits for it, and discards other replies.
    async fn dispatch(&self, mut replies: Consumer) -> anyhow::Result<()> {
        while let Some(reply) = replies.try_next().await? {
            let id = reply
                .properties
                .correlation_id()
                .as_ref()
                .map_or("", |id| id.as_str());
            if let Some(waiting) = self.pending.lock().expect("nobody panics").remove(id) {
                let _ = waiting.send((reply.data, Instant::now()));
            }
        }
        anyhow::bail!("the connection is lost")
    }
}

// Measured: faster than with more threads. lapin has its own thread for the socket.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let numbers: Vec<String> = std::env::args().skip(1).collect();
    let in_flight = number("RPC_IN_FLIGHT", 16)?;
    let count = numbers.len() * number("RPC_REPEAT", 1)?;

    let (connection, channel) = connect().await?;
    let options = QueueDeclareOptions {
        exclusive: true,
        ..Default::default()
    };
    let declared = channel
        .queue_declare("".into(), options, FieldTable::default())
        .await?;
    let replies = declared.name().clone();
    let options = BasicConsumeOptions {
        no_ack: true,
        ..Default::default()
    };
    let consumer = channel
        .basic_consume(replies.clone(), "".into(), options, FieldTable::default())
        .await?;
    let client = Client {
        channel,
        server: queue().into(),
        replies,
        pending: Pending::default(),
    };

    let mut answers = vec![Vec::new(); count];
    let mut latencies = Vec::with_capacity(count);
    let began = Instant::now();
    let calls = stream::iter(0..count)
        .map(|place| client.call(place, &numbers[place % numbers.len()]))
        .buffer_unordered(in_flight)
        .try_for_each(|(place, answer, latency)| {
            answers[place] = answer;
            latencies.push(latency);
            future::ok(())
        });
    tokio::select! {
        result = calls => result?,
        result = client.dispatch(consumer) => result?,
    }
    let seconds = began.elapsed().as_secs_f64();

    if variable("RPC_REPEAT").is_some() {
        latencies.sort_unstable();
        println!(
            "{count} {seconds:.6} {:.1}",
            latencies[count / 2].as_secs_f64() * 1e6
        );
    } else {
        for answer in answers {
            println!("{}", String::from_utf8_lossy(&answer));
        }
    }
    connection.close(200, "".into()).await?;
    Ok(())
}
