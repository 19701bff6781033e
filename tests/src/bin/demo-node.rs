//! The worker node's half, by hand: the real adaptor with a stand-in for the KBS. `pp` in another terminal is the pod
//! VM's half, and says what to give as ADDRESS here.

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
        eprintln!("wn: {arguments:?}: expected one address and port, that of the agent: `pp` prints it");
        return ExitCode::from(2);
    };
    finish("wn", run(address).await)
}

async fn run(address: SocketAddr) -> Result<()> {
    let scene = Scene::new(SceneOptions::default()).await?;
    let mut adaptor = Child::spawn("adaptor", scene.adaptor_command(&[address])?)?;
    up(&adaptor).await?;
    let kata = endpoint(&adaptor, "KATAAGENT").await?;
    let time = echo_roundtrip(&mut kata_client(kata).await?, 200, 1).await?;
    println!("The kata agent in the VM answers at {kata}: 200 bytes there and back in {time:.0?}.");
    println!("Kill and restart either half, and watch it come back. Ctrl-C ends the worker node's half.\n");
    watch(&mut adaptor).await
}
