//! Demo, the pod VM in a terminal: the real agent with a simulated kata agent and guest components. `demo-node` in
//! another terminal is the worker node.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use secure_comms_tests::demo::{Arguments, Stop, finish, start, unless_stopped, watch};
use secure_comms_tests::harness::process::Child;
use secure_comms_tests::harness::scene::{Scene, SceneOptions};
use secure_comms_tests::usage::is_help;

const USAGE: &str =
    "demo-vm [--dir DIR]: the pod VM of the demo, until Ctrl-C; it prints the command of the other half

  --dir DIR  where the VM's state is kept, so that it may be killed and started again
             (default: secure-comms-demo-UID in the directory for temporary files)

To start over with a new pod, end both halves and remove DIR.";

#[tokio::main]
async fn main() -> ExitCode {
    if is_help(USAGE) {
        return ExitCode::SUCCESS;
    }
    let read = Arguments::read(std::env::args().skip(1)).and_then(|arguments| {
        ensure!(arguments.others.is_empty(), "expected no arguments but --dir DIR; see --help");
        Ok(arguments)
    });
    match read {
        Ok(arguments) => finish("demo-vm", run(&arguments).await),
        Err(error) => {
            eprintln!("demo-vm: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let mut stop = Stop::new()?;
    let directory = arguments.half("vm")?;
    let Some(scene) = unless_stopped(&mut stop, Scene::kept(SceneOptions::default(), &directory)).await?
    else {
        return Ok(());
    };
    let mut agent = start("agent", scene.agent_command()?, &directory)?;
    arguments.leave_agent(&scene)?;
    std::fs::write(arguments.address_file(), scene.ssh.to_string())?;
    watch(&mut agent, &mut stop, "inbound NODESERVICE listens on", async |_: &Child| {
        println!("\nThe agent waits for its worker node. In another terminal:\n");
        println!(
            "    cargo run --release --bin demo-node -- --dir {} {}\n",
            arguments.directory.display(),
            scene.ssh
        );
        println!(
            "Once it is connected, clients in the VM reach the worker node's echo server at {}.",
            scene.node_inbound
        );
        println!("Ctrl-C ends the VM's agent; start it again to continue.\n");
        Ok(())
    })
    .await
}
