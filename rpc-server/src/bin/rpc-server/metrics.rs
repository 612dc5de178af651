//! Serves the metrics to Prometheus, and the probes `/ready` and `/live`, on threads of their own.

use crate::statistics::Statistics;
use httparse::Status;
use prometheus_client::encoding::prometheus_text::{encode, CONTENT_TYPE};
use prometheus_client::registry::Registry;
use rpc_common::connection;
use rpc_common::text::describe_io_error;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Maximum time in which a scraper sends its request, and then takes the page.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The status of a page, and of a probe that succeeds.
const OK: &str = "200 OK";

/// The status of a probe that fails.
const UNAVAILABLE: &str = "503 Service Unavailable";

/// Maximum size of a request, in bytes.
const MAX_REQUEST: usize = 16 << 10;

/// Maximum number of headers of a request.
const MAX_HEADERS: usize = 64;

/// Number of threads that answer scrapers, one at a time each. More scrapers wait until the system
/// hands their connection to a thread that is free.
const THREADS: usize = 16;

/// Interval at which the server's loop reports that it is alive.
pub(crate) const LIVE_INTERVAL: Duration = Duration::from_secs(5);

/// Time without a report of the server's loop after which `/live` says so. The loop waits for the
/// broker for 10 seconds at most, a few times in a row.
const LIVE_LIMIT: Duration = Duration::from_secs(60);

/// Serves the metrics and the probes until the program ends.
///
/// # Errors
/// The reason why the address cannot be used, or the system refuses a thread, for a message.
pub(crate) fn serve(address: SocketAddr, statistics: Arc<Statistics>) -> Result<(), String> {
    let listener = TcpListener::bind(address).map_err(|error| {
        format!(
            "cannot serve metrics on {address}: {}",
            describe_io_error(&error)
        )
    })?;
    let registry = statistics.registry();
    let pages = Arc::new(Pages {
        registry,
        statistics,
    });
    let listener = Arc::new(listener);
    for _ in 0..THREADS {
        let listener = listener.clone();
        let pages = pages.clone();
        let serve = move || loop {
            match listener.accept() {
                // Fails if the scraper takes too long, goes away, or does not speak HTTP.
                Ok((scraper, _)) => drop(answer(scraper, &pages)),
                Err(_) => thread::sleep(TIMEOUT), // there are no descriptors left, for example
            }
        };
        thread::Builder::new()
            .name("metrics".into())
            .spawn(serve)
            .map_err(|error| connection::ErrorKind::no_thread(&error).to_string())?;
    }
    Ok(())
}

/// The pages that are served.
struct Pages {
    registry: Registry,
    statistics: Arc<Statistics>,
}

impl Pages {
    /// The status, the content type and the text of the page at this path.
    fn get(&self, path: &str) -> (&'static str, &'static str, String) {
        let statistics = &self.statistics;
        let is_live = || statistics.was_alive(LIVE_LIMIT, Instant::now());
        let (status, text) = match path {
            "/metrics" => {
                let mut page = String::new();
                encode(&mut page, &self.registry).expect("a string can be written");
                return (OK, CONTENT_TYPE, page);
            }
            "/ready" if statistics.consumers.is_any() => (OK, "ready"),
            "/ready" => (UNAVAILABLE, "no worker consumes"),
            "/live" if is_live() => (OK, "live"),
            "/live" => (UNAVAILABLE, "the loop of the server hangs"),
            _ => ("404 Not Found", "the pages are /metrics, /ready and /live"),
        };
        (status, "text/plain", format!("{text}\n"))
    }
}

/// Answers one request, and closes the connection.
fn answer(mut scraper: TcpStream, pages: &Pages) -> io::Result<()> {
    let target = read_target(&mut scraper)?;
    let (path, _query) = target.split_once('?').unwrap_or((&target, ""));
    let (status, content_type, page) = pages.get(path);
    let len = page.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
    );
    scraper.set_write_timeout(Some(TIMEOUT))?;
    scraper.write_all((head + &page).as_bytes())
}

/// Reads a request without a body, and returns its target: a path, perhaps with a query.
fn read_target(scraper: &mut TcpStream) -> io::Result<String> {
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
