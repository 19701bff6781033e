//! PID 1 of the bare test VM: an initramfs with the agent and the simulator, without a disk or systemd.
//!
//! It does what the units of the image do, in their order: network, podns, user data, then the services, which are
//! restarted whenever they end.

mod network;
mod services;
mod status;

use std::fs;

use anyhow::{Context, Result};
use podvm_init::failure::Failure;
use podvm_init::{console, modules, mounts, power};

use crate::user_data;

/// Prints a line with our prefix on the console.
fn say(line: impl std::fmt::Display) {
    // One write per line, so that lines of several processes do not mix.
    print!("{}", format_args!("bare-init: {line}\n"));
}

/// Runs the machine; powers it off after an error.
pub fn main() -> ! {
    power::off_on_panic();
    match boot() {
        Err(error) => power::fatal(format!("{error:#}")),
    }
}

fn boot() -> Result<std::convert::Infallible> {
    kernel().context("preparing the kernel")?;
    network::up("lo", None)?;
    network::up("eth0", Some(network::QEMU_USER_NETWORK))?;
    services::make_namespace()?;
    match user_data::process()? {
        Some(place) => say(format_args!("user data: {place}")),
        None => say("user data: none"),
    }
    for directory in services::DIRECTORIES {
        fs::create_dir_all(directory).with_context(|| format!("making {directory}"))?;
    }
    let socket = status::listen()?;
    services::supervise(&socket)
}

fn kernel() -> Result<(), Failure> {
    mounts::kernel_file_systems()?;
    console::open()?;
    mounts::run()?;
    let loaded = modules::load_all(modules::LIST)?;
    say(format_args!("{loaded} modules loaded at {}", console::uptime()));
    Ok(())
}
