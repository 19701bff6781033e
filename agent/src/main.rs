//! `agent-protocol-forwarder`: parses, binds, and calls [`run`].

use std::io::{self, Write};
use std::process::ExitCode;

use agent_protocol_forwarder::config::file;
use agent_protocol_forwarder::config::flags::{self, Exit, MissingNamespace, Options};
use agent_protocol_forwarder::config::{Config, ConfigError, Inputs, init_data};
use agent_protocol_forwarder::os::systemd::Notifier;
use agent_protocol_forwarder::os::{environment, listener, logging};
use agent_protocol_forwarder::{pod_network, run};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use secure_comms_tunnel::netns::Namespace;
use tokio::signal::unix::{SignalKind, signal};

/// musl's own allocator returns memory to the kernel and requests it again for every large message.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    match start() {
        Ok(()) => {
            log::logger().flush();
            ExitCode::SUCCESS
        }
        Err(exit) => {
            let text = exit.text.trim_end();
            if exit.to_stderr {
                logging::print_last(text);
            } else {
                // stdout may be closed: a reader of the help that has read enough.
                drop(writeln!(io::stdout(), "{text}"));
            }
            ExitCode::from(u8::try_from(exit.code).unwrap_or(1))
        }
    }
}

/// Raises the soft limit of open files to the hard limit: each stream takes a file, and one connection alone may have as
/// many streams as the usual soft limit allows.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
        .map_err(io::Error::from);
    if let Err(error) = raised {
        log::warn!("raising the limit of open files: {error}; set LimitNOFILE= in the unit");
    }
}

/// Disables core dumps: a core would contain the keys.
fn forbid_core_dumps() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false).map_err(io::Error::from) {
        log::warn!("forbidding core dumps: {error}; set LimitCORE=0 in the unit");
    }
}

fn failed(error: impl std::fmt::Display) -> Exit {
    Exit { code: 1, text: format!("agent-protocol-forwarder: {error}"), to_stderr: true }
}

fn start() -> Result<(), Exit> {
    let options = flags::parse(std::env::args_os().skip(1))?;
    logging::init().map_err(|error| Exit { code: 2, ..failed(error) })?;
    environment::warn_of_unknown_variables();
    for flag in &options.unused {
        log::info!("{flag} ignored: not used by Secure Comms");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    if options.missing_namespace == MissingNamespace::MadeOnly {
        return runtime.block_on(make_namespace(&options));
    }
    Config::check_flags(&options).map_err(config_fault)?;
    if options.missing_namespace == MissingNamespace::Made {
        runtime.block_on(make_namespace(&options))?;
    }
    forbid_core_dumps();
    raise_file_limit();
    runtime.block_on(serve(options))
}

fn config_fault(error: ConfigError) -> Exit {
    Exit { code: error.exit_code(), ..failed(error) }
}

/// Makes the pod's namespace if it is missing, and sets `lo` up in it, with one more address if there is one.
async fn make_namespace(options: &Options) -> Result<(), Exit> {
    let Some(namespace) = options.pod_namespace.as_deref().map(Namespace::new) else { return Ok(()) };
    if namespace.make().await.map_err(failed)? {
        log::info!("network namespace {}: made", namespace.path().display());
    }
    pod_network::set_loopback_up(&namespace, options.namespace_address).await.map_err(failed)
}

async fn serve(options: Options) -> Result<(), Exit> {
    // First, so that a signal during the start is handled too.
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let notifier = Notifier::from_env().map_err(failed)?;
    // It ends with the runtime.
    drop(tokio::spawn(logging::write_waiting()));
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        log::info!("stopping");
    };
    tokio::pin!(shutdown);
    let config = tokio::select! {
        config = configuration(options, &notifier) => config?,
        () = &mut shutdown => {
            notifier.stopping("stopping before the start was complete");
            return Ok(());
        }
    };
    run::check_state_dir(&config).map_err(failed)?;
    let listen = config.listen;
    let listener = listener::listen(listen)
        .await
        .map_err(|error| failed(format!("listening on {listen}: {error}; {}", listen_advice(&error))))?;
    // Not before: a fault that ends the start is the first line of the log.
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
    if let Some(pod) = &config.pod {
        log::info!("pod {pod}");
    }
    match listener.local_addr() {
        Ok(address) => log::info!("listens on {address}"),
        Err(error) => return Err(failed(error)),
    }
    run::run(config, listener, notifier, shutdown).await.map_err(failed)
}

/// Waits for the daemon config before anything starts: it decides whether there is an Attestation phase.
async fn configuration(options: Options, notifier: &Notifier) -> Result<Config, Exit> {
    let daemon = match &options.config {
        Some(path) => Some(file::wait_for(path, options.user_data, notifier).await.map_err(failed)?),
        None => None,
    };
    // After the daemon config: what takes init-data out of the user data writes these files first.
    let init_data = options.init_data.as_deref().map(init_data::read).transpose().map_err(failed)?.flatten();
    let digest = options.init_data_digest.as_deref().map(init_data::read_digest);
    let digest = digest.transpose().map_err(failed)?.flatten();
    Config::resolve(options, Inputs { daemon, init_data, digest }).map_err(config_fault)
}

fn listen_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "is another agent running? end it, or change -secure-comms-listen",
        _ => "correct -secure-comms-listen",
    }
}
