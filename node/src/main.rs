//! `secure-comms-adaptor`: parses the command line and runs the command.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use secure_comms_keys::text::escape;
use secure_comms_node::cli::serve::{ConfigArgs, ConfigCommand};
use secure_comms_node::cli::{self, Cli, Command, Stop};
use secure_comms_node::commands::{
    caa_certs, config, connect, doctor, keygen, keys, pod, serve, status, texts, user_data,
};
use secure_comms_node::logging::{self, Writer};
use secure_comms_node::settings::{
    ConnectSettings, KeygenSettings, LogSettings, ServeSettings, UsageError, UserDataSettings,
    unknown_variables, with_log_flags,
};
use tokio::runtime::Builder;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const NAME: &str = "secure-comms-adaptor";
/// The exit code for an invalid command line or environment.
const USAGE: u8 = 2;
/// Threads of `serve`.
const SERVE_THREADS: usize = 2;
/// Its threads for blocking work, as on the store. Each keeps memory of its own once it has run.
const BLOCKING_THREADS: usize = 16;
/// Time limit for writing the last lines: stderr may be a pipe that is not read.
const FLUSH: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(Stop::Text(text)) => {
            return match io::stdout().write_all(text.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                // The reader has seen what it wanted.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Err(Stop::Fault(fault)) => {
            // Stderr may be closed; the exit code reports the failure as well.
            let _ = writeln!(io::stderr(), "{NAME}: {fault}");
            return ExitCode::from(USAGE);
        }
    };
    let dropped = |count| format!("{NAME}: {count} log lines were dropped: stderr was not read fast enough");
    let stderr = match Writer::start(io::stderr(), dropped) {
        Ok(stderr) => stderr,
        Err(error) => {
            // As above.
            let _ = writeln!(io::stderr(), "{NAME}: start the thread that writes the log: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = run(cli, &stderr).unwrap_or_else(|error| report(&error, &stderr));
    stderr.flush(FLUSH);
    code
}

/// Writes an error, and returns its exit code.
fn report(error: &anyhow::Error, stderr: &Writer) -> ExitCode {
    if let Some(usage) = error.downcast_ref::<UsageError>() {
        for fault in usage.faults() {
            stderr.line(&format!("{NAME}: {fault}"));
        }
        return ExitCode::from(USAGE);
    }
    stderr.line(&format!("{NAME}: {}", escape(&format!("{error:#}"))));
    ExitCode::FAILURE
}

/// A core file would hold the keys, and end up on a disk or at a crash collector.
fn forbid_core_dumps() -> anyhow::Result<()> {
    nix::sys::prctl::set_dumpable(false).context("forbid core dumps")
}

fn run(cli: Cli, stderr: &Writer) -> anyhow::Result<ExitCode> {
    let env = |name: &str| std::env::var_os(name);
    let settings = service_settings(&cli, &env)?;
    let log = match (&cli.command, &settings) {
        // Its settings' file may say it.
        (Command::Serve(_), Some(settings)) => settings.log,
        _ => LogSettings::read(log_level(&cli, &env), cli.log_format, &env)?,
    };
    let journal = std::env::var("JOURNAL_STREAM").ok();
    logging::init(log.level, log.format, journal.as_deref(), stderr.clone());
    forbid_core_dumps()?;
    let names: Vec<_> = std::env::vars_os().map(|(name, _)| name).collect();
    for warning in unknown_variables(names.iter().map(|name| name.as_os_str())) {
        tracing::warn!("{warning}");
    }
    let runtime = runtime_of(&cli.command).enable_all().build().context("start the runtime")?;
    let done = runtime.block_on(command(cli.command, settings, &env));
    // The look-up of a name may be blocked for long: the end does not wait for it.
    runtime.shutdown_background();
    done
}

/// The level of the log. What `doctor` finds is its report: the lines of what it tries would only say it again.
fn log_level(cli: &Cli, env: &dyn Fn(&str) -> Option<std::ffi::OsString>) -> Option<String> {
    let is_quiet = matches!(cli.command, Command::Doctor(_)) && env("SECURE_COMMS_LOG").is_none();
    cli.log.clone().or_else(|| is_quiet.then(|| "error".to_owned()))
}

/// The settings of the service, for the commands that need them.
fn service_settings(
    cli: &Cli,
    env: &dyn Fn(&str) -> Option<std::ffi::OsString>,
) -> Result<Option<ServeSettings>, UsageError> {
    let (flags, config) = match &cli.command {
        // The rules can be removed whatever the settings are.
        Command::Serve(args) if !args.remove_rules => (&args.flags, &args.config),
        Command::Config(ConfigArgs { command: ConfigCommand::Show(args) }) => (&args.flags, &args.config),
        Command::Config(ConfigArgs { command: ConfigCommand::Check(args) }) => (&args.flags, &args.config),
        _ => return Ok(None),
    };
    ServeSettings::read(with_log_flags(flags.clone(), cli), config.clone(), env).map(Some)
}

/// One thread for one pod: its bytes go through one SSH session, and handing them to another thread costs more than it
/// gains. The pods of a node have two, so that a burst of one pod holds up no other.
fn runtime_of(command: &Command) -> Builder {
    match command {
        Command::Serve(_) => {
            let mut runtime = Builder::new_multi_thread();
            runtime.worker_threads(SERVE_THREADS).max_blocking_threads(BLOCKING_THREADS);
            // The allocator asks for huge pages, and with many pods most of each is not used: half of the memory.
            if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
                tracing::debug!("huge pages stay on: {error}");
            }
            runtime
        }
        _ => Builder::new_current_thread(),
    }
}

async fn command(
    command: Command,
    settings: Option<ServeSettings>,
    env: &dyn Fn(&str) -> Option<std::ffi::OsString>,
) -> anyhow::Result<ExitCode> {
    match command {
        Command::Connect(args) => {
            let interrupted = connect::run(ConnectSettings::read(*args, env)?).await?;
            return Ok(interrupted.map_or(ExitCode::SUCCESS, |signal| ExitCode::from(signal.exit_code())));
        }
        Command::Serve(_) => match settings {
            Some(settings) => {
                let interrupted = serve::run(settings).await?;
                return Ok(interrupted.map_or(ExitCode::SUCCESS, |signal| ExitCode::from(signal.exit_code())));
            }
            None => serve::remove_rules().await?,
        },
        Command::Config(args) => {
            let settings = settings.context("read the settings")?;
            match args.command {
                ConfigCommand::Show(args) => config::show(&settings, args.output)?,
                ConfigCommand::Check(_) => config::check(&settings)?,
            }
        }
        Command::UserData(args) => user_data::run(UserDataSettings::read(args, env)?).await?,
        Command::Keygen(args) => keygen::run(KeygenSettings::read(args, env)?).await?,
        Command::CaaCerts(args) => caa_certs::run(&args)?,
        Command::Pod(args) => pod::run(args, env).await?,
        Command::Status(args) => status::run(args, env).await?,
        Command::Keys(args) => keys::run(args, env).await?,
        Command::Doctor(args) => {
            let good = doctor::run(args, env).await?;
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Openapi => texts::openapi()?,
        Command::Completions(args) => texts::completions(&args)?,
        Command::Man(args) => texts::man(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}
