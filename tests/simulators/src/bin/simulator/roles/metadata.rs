//! The metadata service of a cloud.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::time::Duration;

use ::metadata::{Behaviour, Cloud, LONGEST_WAIT, Server, serve_streams};
use anyhow::{Context, Result, bail};
use secure_comms_simulators::args::Args;

/// `metadata --cloud NAME --user-data FILE [--behaviour NAME] (--listen ADDRESS [--late SECONDS] | --stdio yes)`.
///
/// With `--listen` it serves until it is killed, at once or, with `--late`, after a while in which connections are refused. With
/// `--stdio` it serves the one connection that its standard streams are, as qemu's `guestfwd=tcp:ADDRESS-cmd:COMMAND` needs.
pub(super) fn serve(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, &["cloud", "user-data", "behaviour", "listen", "late", "stdio"])?;
    let needed = |name: &str| args.get(name).with_context(|| format!("--{name} is missing"));
    let cloud: Cloud = needed("cloud")?.parse()?;
    let path = needed("user-data")?;
    let user_data = fs::read(path).with_context(|| format!("reading {path}"))?;
    let script = Behaviour::parse(args.get("behaviour").unwrap_or("ok"))?.script(cloud, user_data);
    match (args.get("listen"), args.get("stdio")) {
        (None, Some("yes")) => {
            serve_streams(io::stdin().lock(), io::stdout().lock(), &script).context("serving the connection")
        }
        (Some(address), None) => {
            let late = args.get("late").unwrap_or("0").parse().context("--late is no number of seconds")?;
            std::thread::sleep(Duration::from_secs(late).min(LONGEST_WAIT));
            let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
            let server = Server::start(listener, script).context("starting the service")?;
            println!("listening on {}", server.address());
            loop {
                std::thread::park();
            }
        }
        _ => bail!("expected either --listen ADDRESS or --stdio yes"),
    }
}
