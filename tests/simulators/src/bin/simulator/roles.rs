//! The roles of a process, by the names of the programs in a pod VM.

mod guest;
mod inspector;
mod installed;
mod kata_agent;
mod metadata;

use std::future::Future;

use anyhow::{Context, Result};
use secure_comms_simulators::args::Args;
use secure_comms_simulators::{bare, user_data};

/// Runs a role with its arguments, until it ends or a signal ends it.
pub(crate) type Role = fn(Vec<String>) -> Result<()>;

const ROLES: [(&str, Role); 9] = [
    ("kata-agent", |args| {
        if has(&args, "--config") { run(installed::kata_agent(args)) } else { run(kata_agent::serve(args)) }
    }),
    ("cdh", |args| run(guest::cdh(args))),
    ("confidential-data-hub", |args| run(installed::confidential_data_hub(args))),
    ("api-server-rest", |args| {
        if has(&args, "--bind") {
            run(installed::api_server_rest(args))
        } else {
            run(guest::api_server_rest(args))
        }
    }),
    ("process-user-data", process_user_data),
    ("attestation-agent", |args| run(installed::attestation_agent(args))),
    ("metadata", metadata::serve),
    ("inspector", |args| run(inspector::serve(args))),
    // The kernel's name for PID 1 of an initramfs.
    ("init", |_| bare::main()),
];

/// Whether the arguments are those of the real program.
fn has(args: &[String], flag: &str) -> bool {
    args.iter().any(|arg| arg == flag)
}

/// The role of this name.
pub(crate) fn find(name: &str) -> Option<Role> {
    ROLES.iter().find(|(known, _)| *known == name).map(|(_, role)| *role)
}

/// All names, for an error message.
pub(crate) fn names() -> String {
    ROLES.map(|(name, _)| name).join(", ")
}

/// One thread is enough for the small load, and the VM is small.
fn run(role: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("starting the runtime")?.block_on(role)
}

fn process_user_data(mut args: Vec<String>) -> Result<()> {
    // Name of the subcommand of the real program that the simulator implements.
    args.retain(|arg| arg != "provision-files");
    Args::parse(args, &[])?;
    match user_data::process()? {
        Some(place) => println!("user data: {place}"),
        None => println!("user data: none"),
    }
    Ok(())
}
