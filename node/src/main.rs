//! `secure-comms-adaptor`: parses the command line and runs the command.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use secure_comms_keys::text::escape;
use secure_comms_node::cli::{self, Command};
use secure_comms_node::commands::{connect, keygen, user_data};
use secure_comms_node::logging;
use secure_comms_node::settings::{self, ConnectSettings, KeygenSettings, UsageError, UserDataSettings};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The exit code for an invalid command line or environment.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    if let Some(usage) = error.downcast_ref::<UsageError>() {
        for fault in usage.faults() {
            print_error(fault);
        }
        return ExitCode::from(USAGE);
    }
    print_error(&escape(&format!("{error:#}")));
    ExitCode::FAILURE
}

fn print_error(line: &str) {
    // Stderr may be closed; the exit code reports the failure as well.
    let _ = writeln!(std::io::stderr(), "secure-comms-adaptor: {line}");
}

/// A core file would hold the keys, and end up on a disk or at a crash collector.
fn forbid_core_dumps() -> anyhow::Result<()> {
    nix::sys::prctl::set_dumpable(false).context("forbid core dumps")
}

// One thread: the bytes of one pod go through one SSH session, and handing them to another thread costs more than it gains.
#[tokio::main(flavor = "current_thread")]
async fn run() -> anyhow::Result<()> {
    let cli = cli::parse(std::env::args_os());
    let env = |name: &str| std::env::var_os(name);
    logging::init(settings::log_level(cli.log, &env)?);
    forbid_core_dumps()?;
    match cli.command {
        Command::Connect(args) => Ok(connect::run(ConnectSettings::read(*args, &env)?).await?),
        Command::UserData(args) => user_data::run(UserDataSettings::read(args, &env)?).await,
        Command::Keygen(args) => keygen::run(KeygenSettings::read(args, &env)?).await,
    }
}
