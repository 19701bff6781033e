//! PID 1 of the bare test VM: an initramfs with the agent and its stand-ins, and neither a disk nor systemd.
//!
//! It does by hand, in their order, what the units of the image do: network, podns, user data, and then the services, which are
//! started again whenever they end.

mod network;
mod services;
mod status;

use std::fs;

use anyhow::{Context, Result};
use podvm_init::failure::Failure;
use podvm_init::{console, modules, mounts, power};

use crate::user_data;

/// A line on the console, all of which start alike.
fn say(line: impl std::fmt::Display) {
    // One write for a line, so that lines of several processes do not mix.
    print!("{}", format_args!("bare-init: {line}\n"));
}

/// Runs the machine; ends it when it can't go on.
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
