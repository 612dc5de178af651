//! Serves the metrics to Prometheus, on a thread of its own.

use httparse::Status;
use prometheus_client::encoding::prometheus_text::{encode, CONTENT_TYPE};
use prometheus_client::registry::Registry;
use rpc_common::text::describe_io_error;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// Maximum time in which a scraper sends its request, and then takes the page. Others wait
/// meanwhile.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum size of a request, in bytes.
const MAX_REQUEST: usize = 16 << 10;

/// Maximum number of headers of a request.
const MAX_HEADERS: usize = 64;

/// Serves the metrics until the program ends.
///
/// # Errors
/// The reason why the address cannot be used, for a message.
pub(crate) fn serve(address: SocketAddr, registry: Registry) -> Result<(), String> {
    let listener = TcpListener::bind(address).map_err(|error| {
        format!(
            "cannot serve metrics on {address}: {}",
            describe_io_error(&error)
        )
    })?;
    let serve = move || loop {
        match listener.accept() {
            // Fails if the scraper takes too long, goes away, or does not speak HTTP.
            Ok((scraper, _)) => drop(answer(scraper, &registry)),
            Err(_) => thread::sleep(TIMEOUT), // there are no descriptors left, for example
        }
    };
    thread::Builder::new()
        .name("metrics".into())
        .spawn(serve)
        .expect("the system provides a thread");
    Ok(())
}

/// Answers one request, and closes the connection.
fn answer(mut scraper: TcpStream, registry: &Registry) -> io::Result<()> {
    let mut page = String::new();
    let (status, content_type) = if read_path(&mut scraper)? == "/metrics" {
        encode(&mut page, registry).expect("a string can be written");
        ("200 OK", CONTENT_TYPE)
    } else {
        page.push_str("the metrics are at /metrics\n");
        ("404 Not Found", "text/plain")
    };
    let len = page.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
    );
    scraper.set_write_timeout(Some(TIMEOUT))?;
    scraper.write_all((head + &page).as_bytes())
}

/// Reads a request without a body, and returns its path.
fn read_path(scraper: &mut TcpStream) -> io::Result<String> {
    let begun = Instant::now();
    let mut received = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        // Fails if no time is left.
        scraper.set_read_timeout(Some(TIMEOUT.saturating_sub(begun.elapsed())))?;
        let len = scraper.read(&mut buffer)?;
        received.extend_from_slice(&buffer[..len]);
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&received) {
            Ok(Status::Complete(_)) => return Ok(request.path.unwrap_or_default().into()),
            Ok(Status::Partial) if len > 0 && received.len() < MAX_REQUEST => {}
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
}
