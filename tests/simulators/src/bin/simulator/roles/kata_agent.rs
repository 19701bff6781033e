//! `kata-agent`: `--socket PATH`, `--tcp ADDR`, or both.

use anyhow::{Context, Result, bail};
use secure_comms_simulators::args::{Args, until_signal};
use secure_comms_simulators::kata::KataAgent;

pub(super) async fn serve(args: Vec<String>) -> Result<()> {
    let args = Args::parse(args, &["socket", "tcp"])?;
    if args.get("socket").or(args.get("tcp")).is_none() {
        bail!("kata-agent: expected --socket PATH, --tcp ADDR or both");
    }
    let _unix = match args.get("socket") {
        Some(path) => {
            let agent = KataAgent::unix(path)?;
            println!("listening on {path}");
            Some(agent)
        }
        None => None,
    };
    let _tcp = match args.get("tcp") {
        Some(addr) => {
            let addr =
                addr.parse().with_context(|| format!("--tcp {addr:?}: expected such as 127.0.0.1:0"))?;
            let agent = KataAgent::tcp(addr).await?;
            if let Some(addr) = agent.addr() {
                println!("listening on {addr}");
            }
            Some(agent)
        }
        None => None,
    };
    until_signal().await
}
