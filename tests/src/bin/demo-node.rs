//! Demo, the worker node in a terminal: the real adaptor with a simulated KBS. `demo-vm` in another terminal is the
//! pod VM, and prints the ADDRESS that this program takes.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Result;
use secure_comms_tests::demo::{finish, watch};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{Scene, SceneOptions, endpoint, kata_client, up};
use secure_comms_tests::simulators::kata::client::echo_roundtrip;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let address = match arguments.as_slice() {
        [address] => address.parse(),
        _ => "".parse(),
    };
    let Ok(address) = address else {
        eprintln!("demo-node: expected one ADDRESS:PORT, that of the agent; demo-vm prints it");
        return ExitCode::from(2);
    };
    finish("demo-node", run(address).await)
}

async fn run(address: SocketAddr) -> Result<()> {
    let scene = Scene::new(SceneOptions::default()).await?;
    let mut adaptor = Child::spawn("adaptor", scene.adaptor_command(&[address])?)?;
    up(&adaptor).await?;
    let kata = endpoint(&adaptor, "KATAAGENT").await?;
    let time = echo_roundtrip(&mut kata_client(kata).await?, 200, 1).await?;
    println!("The kata agent in the VM answers at {kata}: 200 bytes and their echo took {time:.0?}.");
    println!(
        "Ctrl-C ends the worker node. Its VM serves this pod only: to start again, restart demo-vm first.\n"
    );
    watch(&mut adaptor).await
}
