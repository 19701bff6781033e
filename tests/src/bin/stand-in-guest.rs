//! The guest stand-in as a process: the REST front, AA and CDH behind it, or both.
//!
//! - `--listen ADDR --kbs URL [--ca FILE]`: both;
//! - `--cdh-listen UNIXPATH --kbs URL [--ca FILE]`: the back, in the host's network namespace;
//! - `--rest ADDR --cdh UNIXPATH`: the front, in the pod's.
//!
//! The back also takes `--evidence TEXT`, `--attempts N`, `--retry-ms N`, `--answer-limit-ms N`.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use secure_comms_tests::args::{Args, until_told};
use secure_comms_tests::guest::{Backend, Cdh, CdhOptions, CdhSocket, Rest};

const KNOWN: &[&str] = &[
    "listen",
    "rest",
    "cdh",
    "cdh-listen",
    "kbs",
    "ca",
    "evidence",
    "attempts",
    "retry-ms",
    "answer-limit-ms",
];

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse(std::env::args().skip(1), KNOWN)?;
    match (args.get("listen"), args.get("rest").zip(args.get("cdh")), args.get("cdh-listen")) {
        (Some(listen), None, None) => rest(listen, Backend::Local(cdh(&args)?)).await,
        (None, Some((listen, socket)), None) => rest(listen, Backend::Unix(socket.into())).await,
        (None, None, Some(path)) => {
            let _socket = CdhSocket::start(path, cdh(&args)?)?;
            println!("listening on {path}");
            until_told().await
        }
        _ => bail!(
            "expected one of: --listen ADDR --kbs URL; --rest ADDR --cdh PATH; --cdh-listen PATH --kbs URL"
        ),
    }
}

async fn rest(listen: &str, backend: Backend) -> Result<()> {
    let listen =
        listen.parse().with_context(|| format!("{listen:?} is not an address such as 127.0.0.1:0"))?;
    let rest = Rest::start(listen, backend).await?;
    println!("listening on {}", rest.addr());
    until_told().await
}

fn cdh(args: &Args) -> Result<Arc<Cdh>> {
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
    value.parse().map(Some).map_err(|_| anyhow::anyhow!("--{name} {value:?} is not a number"))
}
