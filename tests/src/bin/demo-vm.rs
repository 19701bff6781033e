//! Demo, the pod VM in a terminal: the real agent with a simulated kata agent and guest components. `demo-node` in
//! another terminal is the worker node.

use std::process::ExitCode;

use anyhow::Result;
use secure_comms_tests::demo::{finish, watch};
use secure_comms_tests::harness::scene::{Scene, SceneOptions};

#[tokio::main]
async fn main() -> ExitCode {
    finish("demo-vm", run().await)
}

async fn run() -> Result<()> {
    let scene = Scene::new(SceneOptions::default()).await?;
    let mut agent = scene.agent().await?;
    println!("The agent waits for its worker node. In another terminal:\n");
    println!("    cargo run --release --bin demo-node -- {}\n", scene.ssh);
    println!(
        "Once it is connected, clients in the VM reach the worker node's echo server at {}.",
        scene.node_inbound
    );
    println!("Ctrl-C ends the VM.\n");
    watch(&mut agent).await
}
