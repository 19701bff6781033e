//! `secure-comms-adaptor`: parses, and hands over.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use secure_comms_adaptor::cli::{self, Command};
use secure_comms_adaptor::log;
use secure_comms_adaptor::settings::{self, KeygenSettings, Settings, UsageError, UserDataSettings};
use secure_comms_adaptor::store::{DirectoryStore, Store};
use secure_comms_adaptor::{connect, user_data};
use secure_comms_keys::private_file;
use secure_comms_keys::text::escape;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: u8 = 2;

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    if let Some(usage) = error.downcast_ref::<UsageError>() {
        for fault in usage.faults() {
            complain(fault);
        }
        return ExitCode::from(USAGE);
    }
    complain(&escape(&format!("{error:#}")));
    ExitCode::FAILURE
}

fn complain(line: &str) {
    // Stderr may be closed; the exit code still tells.
    let _ = writeln!(std::io::stderr(), "secure-comms-adaptor: {line}");
}

/// A core would hold the keys, and be written to a disk or be read by whatever collects cores.
fn forbid_core_dumps() -> anyhow::Result<()> {
    nix::sys::prctl::set_dumpable(false).context("forbid core dumps")
}

// One thread: one pod's bytes go through one SSH session, and each hand-over to another thread would cost more than it brings.
#[tokio::main(flavor = "current_thread")]
async fn run() -> anyhow::Result<()> {
    let cli = cli::parse(std::env::args_os());
    let env = |name: &str| std::env::var_os(name);
    log::init(settings::log_level(cli.log, &env)?);
    forbid_core_dumps()?;
    match cli.command {
        Command::Connect(args) => Ok(connect::run(Settings::read(*args, &env)?).await?),
        Command::UserData(args) => print_user_data(UserDataSettings::read(args, &env)?).await,
        Command::Keygen(args) => keygen(KeygenSettings::read(args, &env)?).await,
    }
}

async fn print_user_data(settings: UserDataSettings) -> anyhow::Result<()> {
    let store = DirectoryStore::open(settings.store)?;
    let worker_node = store.worker_node_key().await?.public()?;
    let pod = store.pod_key(&settings.pod).await?;
    let json = user_data::fragment(&pod, &worker_node, &settings.inbounds, &settings.outbounds)?;
    match settings.output {
        Some(path) => Ok(private_file::replace(&path, &json)?),
        None => print(&json),
    }
}

async fn keygen(settings: KeygenSettings) -> anyhow::Result<()> {
    let store = DirectoryStore::open(settings.store)?;
    let mut lines = store.worker_node_key().await?.public()?.authorized_keys_line()? + "\n";
    if let Some(pod) = settings.pod {
        lines += &(store.pod_key(&pod).await?.public()?.authorized_keys_line()? + "\n");
    }
    print(lines.as_bytes())
}

fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("write to standard output")
}
