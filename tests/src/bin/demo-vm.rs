//! The pod VM's half, by hand: the real agent with stand-ins for the kata agent and the guest components. `wn` in
//! another terminal is the worker node's half.

use std::process::ExitCode;

use anyhow::Result;
use secure_comms_tests::demo::{finish, watch};
use secure_comms_tests::harness::scene::{Scene, SceneOptions};

#[tokio::main]
async fn main() -> ExitCode {
    finish("pp", run().await)
}

async fn run() -> Result<()> {
    let scene = Scene::new(SceneOptions::default()).await?;
    let mut agent = scene.agent().await?;
    println!("The agent waits for its worker node. In another terminal:\n");
    println!("    cargo run --release --bin wn -- {}\n", scene.ssh);
    println!(
        "Once it is there, clients in the VM reach the worker node's echo server at {}.",
        scene.node_inbound
    );
    println!("Ctrl-C ends the VM.\n");
    watch(&mut agent).await
}
