//! The guest components: the back (AA and CDH) in the host's network namespace, the front in the pod's.
//!
//! - `cdh --listen UNIXPATH --kbs URL [--ca FILE]`
//! - `api-server-rest --listen ADDR --cdh UNIXPATH`, or with its own back: `--listen ADDR --kbs URL [--ca FILE]`
//!
//! A back also takes `--evidence TEXT`, `--attempts N`, `--retry-ms N`, `--answer-limit-ms N`.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use secure_comms_simulators::args::{Args, until_signal};
use secure_comms_simulators::guest::{Backend, Cdh, CdhOptions, CdhSocket, Rest};

const KNOWN: &[&str] = &["listen", "cdh", "kbs", "ca", "evidence", "attempts", "retry-ms", "answer-limit-ms"];

pub(super) async fn cdh(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, KNOWN)?;
    let path = args.get("listen").context("cdh: --listen UNIXPATH is missing")?;
    let _socket = CdhSocket::start(path, back(&args)?)?;
    println!("listening on {path}");
    until_signal().await
}

pub(super) async fn api_server_rest(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, KNOWN)?;
    let listen = args.get("listen").context("api-server-rest: --listen ADDR is missing")?;
    let listen =
        listen.parse().with_context(|| format!("{listen:?} is not an address such as 127.0.0.1:0"))?;
    let backend = match (args.get("cdh"), args.get("kbs")) {
        (Some(socket), None) => Backend::Unix(socket.into()),
        (None, Some(_)) => Backend::Local(back(&args)?),
        _ => bail!("api-server-rest: expected one of --cdh UNIXPATH and --kbs URL"),
    };
    let rest = Rest::start(listen, backend).await?;
    println!("listening on {}", rest.addr());
    until_signal().await
}

fn back(args: &Args) -> Result<Arc<Cdh>> {
    let mut options = CdhOptions::new(args.get("kbs").context("--kbs URL is missing")?);
    if let Some(file) = args.get("ca") {
        options.ca_pem = Some(std::fs::read_to_string(file).with_context(|| format!("--ca {file}"))?);
    }
    if let Some(evidence) = args.get("evidence") {
        evidence.clone_into(&mut options.evidence);
    }
    options.attempts = number(args, "attempts")?.unwrap_or(options.attempts);
    options.retry = number(args, "retry-ms")?.map_or(options.retry, Duration::from_millis);
    options.answer_limit =
        number(args, "answer-limit-ms")?.map_or(options.answer_limit, Duration::from_millis);
    Ok(Arc::new(Cdh::new(options)?))
}

fn number<T: FromStr>(args: &Args, name: &str) -> Result<Option<T>> {
    let Some(value) = args.get(name) else { return Ok(None) };
    value.parse().map(Some).map_err(|_| anyhow!("--{name} {value:?} is not a number"))
}
