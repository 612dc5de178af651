//! Serves fib(n), or a program, over RabbitMQ RPC.

mod cli;
mod limits;
mod metrics;
mod operator;
mod statistics;

use cli::Cli;
use log::LevelFilter;
use operator::Operator;
use rpc_common::background_writer::BackgroundWriter;
use rpc_common::connection::{Error, ErrorKind};
use rpc_common::exit::{is_process_1, print_message, ExitCode};
use rpc_common::message::{Reply, Request};
use rpc_common::text::{describe_io_error, escape};
use rpc_common::{command_line, logging, stdio};
use rpc_server::{
    fib_handler, reap_orphans_during, serve, stop_signal, stop_signal_with, Caller, Handler,
    Program, ProgramCallbacks, Stop,
};
use statistics::Statistics;
use std::sync::Arc;
use std::{io, process};

fn main() -> process::ExitCode {
    if is_process_1() {
        let code = reap_orphans_during(serve_and_report);
        return code.unwrap_or_else(|error| {
            print_message("rpc-server", no_thread(&error));
            ExitCode::Usage.into()
        });
    }
    serve_and_report()
}

fn serve_and_report() -> process::ExitCode {
    let mut cli: Cli = match command_line::parse_args(cli::SHORT_HELP) {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    cli.config.broker.set_variable("RPC_SERVER_URL");
    let result = cli.log.start_for_operator(LevelFilter::Info);
    logging::log_panics();
    let result = result
        .and_then(|()| BackgroundWriter::start(stdio::stdout()))
        .map_err(|error| no_thread(&error))
        .and_then(|stdout| {
            let result = run(&cli, &stdout);
            stdout.flush();
            result
        });
    logging::flush();
    match result {
        Ok(()) => ExitCode::Success.into(),
        Err(error) => {
            print_message("rpc-server", &error);
            ExitCode::from(&error).into()
        }
    }
}

fn no_thread(reason: &io::Error) -> Error {
    Error::configuration(ErrorKind::no_thread(reason))
}

fn run(cli: &Cli, stdout: &BackgroundWriter) -> Result<(), Error> {
    let configuration_error = |reason| Error::configuration(ErrorKind::Configuration(reason));
    limits::raise_open_files(cli.config.worker_count());
    let statistics = Arc::new(Statistics::new(cli.metrics.is_some()));
    let program = cli
        .find_program(callbacks(&statistics))
        .map_err(configuration_error)?;
    if let Some(address) = cli.metrics {
        metrics::serve(address, statistics.clone()).map_err(configuration_error)?;
    }
    let operator = Operator {
        stdout,
        statistics: &statistics,
        live_interval: cli.metrics.map(|_| metrics::LIVE_INTERVAL),
    };
    let announce = |request: String| {
        if !cli.quiet {
            stdout.write_line(format!(" [.] {request}"));
        }
    };
    match program {
        None => {
            let fib = fib_handler(cli.fib.max_n, cli.fib.delay, |n| {
                announce(format!("fib({n})"));
            });
            serve_until_stopped(cli, &fib, &handle_signals(stop_signal())?, &operator)
        }
        Some(program) => {
            let program = Arc::new(program);
            log::info!(
                "serving {}",
                escape(program.path().as_os_str().as_encoded_bytes())
            );
            let program_to_kill = program.clone();
            let stop = handle_signals(stop_signal_with(move || program_to_kill.kill_all()))?;
            let is_started = program.start(cli.config.worker_count(), &stop);
            if !is_started.map_err(configuration_error)? {
                return Ok(());
            }
            let handler = AnnouncedProgram {
                program: &program,
                command_line: program.command_line(),
                announce: &announce,
            };
            let result = serve_until_stopped(cli, &handler, &stop, &operator);
            let stopping_since = statistics.stopping_since();
            let kill_at = cli.config.stop_after.zip(stopping_since);
            program.end(kill_at.and_then(|(after, since)| since.checked_add(after)));
            result
        }
    }
}

fn callbacks(statistics: &Arc<Statistics>) -> ProgramCallbacks {
    let stopped = statistics.runs_stopped.clone();
    let statistics = statistics.clone();
    ProgramCallbacks {
        on_stopped: Box::new(move || {
            stopped.inc();
        }),
        on_start: Box::new(move |reason| statistics.on_program_start(reason)),
    }
}

fn handle_signals(stop: io::Result<Stop>) -> Result<Stop, Error> {
    stop.map_err(|error| {
        let reason = describe_io_error(&error);
        let hint = if error.kind() == io::ErrorKind::WouldBlock {
            ": raise the limit of processes (ulimit -u)" // no thread
        } else {
            ""
        };
        Error::configuration(ErrorKind::Configuration(format!(
            "cannot handle signals: {reason}{hint}"
        )))
    })
}

/// A program whose requests are announced on standard output.
struct AnnouncedProgram<'a> {
    program: &'a Program,
    command_line: String,
    announce: &'a (dyn Fn(String) + Sync),
}

impl Handler for AnnouncedProgram<'_> {
    fn handle(&self, request: &Request, caller: &Caller) -> Reply {
        let size = format_bytes(request.body.len());
        (self.announce)(format!("{} ({size})", self.command_line));
        self.program.handle(request, caller)
    }

    fn is_ready(&self) -> bool {
        self.program.is_ready()
    }

    fn wait_until_ready(&self, stop: &Stop) {
        self.program.wait_until_ready(stop);
    }
}

fn serve_until_stopped(
    cli: &Cli,
    handler: &dyn Handler,
    stop: &Stop,
    operator: &Operator,
) -> Result<(), Error> {
    serve(&cli.config, handler, stop, operator)?;
    log::info!("stopped: {}", operator.statistics.summary());
    Ok(())
}

fn format_bytes(count: usize) -> String {
    match count {
        1 => "1 byte".into(),
        count => format!("{count} bytes"),
    }
}
