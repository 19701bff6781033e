//! The guest's programs with the arguments of the real ones, as the units of the image start them. Each checks what it needs of the
//! others, and ends with an error if it was started too early or without its configuration.
//!
//! - `attestation-agent --attestation_sock unix://PATH -c FILE [--initdata-toml FILE]`
//! - `confidential-data-hub [-c FILE]`
//! - `api-server-rest --features all --bind ADDR`
//! - `kata-agent --config FILE`

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use secure_comms_simulators::args::{Args, until_signal};
use secure_comms_simulators::guest::{Backend, Cdh, CdhOptions, CdhSocket, Rest};
use secure_comms_simulators::kata::KataAgent;
use toml::Table;

const AA_SOCKET: &str = "/run/confidential-containers/attestation-agent/attestation-agent.sock";
const CDH_SOCKET: &str = "/run/confidential-containers/cdh.sock";
/// The agent's KBS inbound.
const KBS: &str = "http://127.0.0.1:8080";
const POLICY: &str = "/etc/kata-opa/default-policy.rego";

/// Accepts connections, and answers nothing: here a KBS needs no evidence.
pub(super) async fn attestation_agent(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, &["attestation_sock", "initdata-toml", "c"])?;
    let config = args.get("c").context("attestation-agent: -c FILE is missing")?;
    table(config).context("attestation-agent: -c")?;
    if let Some(path) = args.get("initdata-toml") {
        table(path).context("attestation-agent: --initdata-toml")?;
    }
    let socket = args.get("attestation_sock").context("attestation-agent: --attestation_sock is missing")?;
    let socket = unix_path(socket)?;
    remove_stale(socket)?;
    let _listener = UnixListener::bind(socket).with_context(|| format!("binding {socket}"))?;
    println!("listening on {socket}");
    until_signal().await
}

pub(super) async fn confidential_data_hub(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, &["c"])?;
    let config = args.get("c").map(table).transpose().context("confidential-data-hub: -c")?;
    let url = config.as_ref().and_then(|config| config.get("kbc")?.get("url")?.as_str()).unwrap_or(KBS);
    reached(AA_SOCKET)?;
    for (name, prefix) in [
        ("OCICRYPT_KEYPROVIDER_CONFIG", ""),
        ("CDH_DEFAULT_IMAGE_AUTHENTICATED_REGISTRY_CREDENTIALS", "file://"),
    ] {
        let value = std::env::var(name).with_context(|| format!("confidential-data-hub: {name}"))?;
        let file = value.strip_prefix(prefix).with_context(|| format!("{name}: {value}"))?;
        let text = std::fs::read_to_string(file).with_context(|| format!("{name}: {file}"))?;
        serde_json::from_str::<serde_json::Value>(&text).with_context(|| format!("{name}: {file}"))?;
    }
    remove_stale(CDH_SOCKET)?;
    let _socket = CdhSocket::start(CDH_SOCKET, Arc::new(Cdh::new(CdhOptions::new(url))?))?;
    println!("listening on {CDH_SOCKET}");
    until_signal().await
}

pub(super) async fn api_server_rest(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, &["features", "bind"])?;
    ensure!(args.get("features") == Some("all"), "api-server-rest: expected --features all");
    let bind = args.get("bind").context("api-server-rest: --bind ADDR is missing")?;
    reached(CDH_SOCKET)?;
    let bind = bind.parse().with_context(|| format!("--bind {bind:?}: expected such as 127.0.0.1:8006"))?;
    let rest = Rest::start(bind, Backend::Unix(CDH_SOCKET.into())).await?;
    println!("listening on {}", rest.addr());
    until_signal().await
}

/// With the checks of the real one; serves as the simulator's own role does.
pub(super) async fn kata_agent(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, &["config"])?;
    let config = table(args.get("config").context("kata-agent: --config FILE is missing")?)?;
    let text = |key: &str| {
        config.get(key).and_then(toml::Value::as_str).with_context(|| format!("kata-agent: no {key}"))
    };
    let procs = text("guest_components_procs")?;
    ensure!(procs == "none", "kata-agent: it would start {procs} itself");
    let policy = std::fs::read_to_string(POLICY).with_context(|| format!("kata-agent: {POLICY}"))?;
    ensure!(policy.contains("package agent_policy"), "kata-agent: {POLICY} is no policy");
    reached(CDH_SOCKET)?;
    let socket = unix_path(text("server_addr")?)?;
    let _agent = KataAgent::unix(socket)?;
    println!("listening on {socket}");
    until_signal().await
}

fn table(file: &str) -> Result<Table> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    text.parse().with_context(|| format!("reading {file}"))
}

fn unix_path(address: &str) -> Result<&str> {
    address.strip_prefix("unix://").with_context(|| format!("{address:?}: expected unix://PATH"))
}

/// The socket of another program must be there already.
fn reached(socket: &str) -> Result<()> {
    UnixStream::connect(socket).map(drop).with_context(|| format!("started before {socket} answers"))
}

fn remove_stale(socket: &str) -> Result<()> {
    match std::fs::remove_file(Path::new(socket)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("removing the stale {socket}: {error}")
        }
        _ => Ok(()),
    }
}
