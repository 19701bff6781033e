//! Demo, the worker node in a terminal: the real adaptor with a simulated KBS. `demo-vm` in another terminal is the
//! pod VM.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use secure_comms_tests::demo::{
    Arguments, Stop, finish, run_directory, start, unless_stopped, watch, within,
};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{Scene, SceneOptions, kata_socket_client, socket};
use secure_comms_tests::simulators::kata::client::echo_roundtrip;
use secure_comms_tests::usage::is_help;

const USAGE: &str = "demo-node [--dir DIR] [ADDRESS:PORT]: the worker node of the demo, until Ctrl-C

  ADDRESS:PORT  the agent's address; demo-vm prints it       (default: that of the demo-vm with the same DIR)
  --dir DIR     where the pod's keys are kept, so that it may be killed and started again
                (default: secure-comms-demo-UID in the directory for temporary files)

To start over with a new pod, end both halves and remove DIR.";
/// The echo through a tunnel that is up takes milliseconds.
const ECHO: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    if is_help(USAGE) {
        return ExitCode::SUCCESS;
    }
    let read = Arguments::read(std::env::args().skip(1));
    let (arguments, address) = match read.and_then(|arguments| Ok((address(&arguments)?, arguments))) {
        Ok((address, arguments)) => (arguments, address),
        Err(error) => {
            eprintln!("demo-node: {error:#}");
            return ExitCode::from(2);
        }
    };
    finish("demo-node", run(&arguments, address).await)
}

fn address(arguments: &Arguments) -> Result<SocketAddr> {
    match arguments.others.as_slice() {
        [] => {
            let file = arguments.address_file();
            let text = std::fs::read_to_string(&file).with_context(|| {
                format!(
                    "no demo-vm has left its address in {}: start it first, or give ADDRESS:PORT",
                    file.display()
                )
            })?;
            text.trim().parse().with_context(|| format!("an address in {}", file.display()))
        }
        [address] => address.parse().with_context(|| format!("{address}: expected ADDRESS:PORT")),
        _ => bail!("expected at most one ADDRESS:PORT; see --help"),
    }
}

async fn run(arguments: &Arguments, address: SocketAddr) -> Result<()> {
    let mut stop = Stop::new()?;
    let directory = arguments.half("node")?;
    let Some(mut scene) = unless_stopped(&mut stop, Scene::kept(SceneOptions::default(), &directory)).await?
    else {
        return Ok(());
    };
    scene.kata_inbound = None;
    scene.run_dir = run_directory()?;
    arguments.expect_agent(&mut scene)?;
    let mut adaptor = start("adaptor", scene.adaptor_command(&[address])?, &directory)?;
    println!("The adaptor connects to {address}. Ctrl-C ends the worker node; start it again to continue.\n");
    watch(&mut adaptor, &mut stop, "kubernetes phase up", async |adaptor: &Child| {
        within(ECHO, "the echo of the kata agent", echo(adaptor)).await
    })
    .await
}

async fn echo(adaptor: &Child) -> Result<()> {
    let kata = socket(adaptor, "KATAAGENT").await?;
    let time = echo_roundtrip(&mut kata_socket_client(&kata).await?, 200, 1).await?;
    println!(
        "\nThe kata agent in the VM answers at {}: 200 bytes and their echo took {time:.0?}.",
        kata.display()
    );
    println!("Kill and restart either half, and watch it come back.\n");
    Ok(())
}
