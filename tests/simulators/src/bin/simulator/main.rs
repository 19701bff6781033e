//! Runs a simulator as a process: `simulator ROLE [ARGUMENT...]`, or under a name that is a role.

mod roles;

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("simulator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<()> {
    let mut args = std::env::args().peekable();
    let own = args.next().unwrap_or_default();
    let own = Path::new(&own).file_name().and_then(OsStr::to_str).and_then(roles::find);
    if own.is_none() && args.next_if(|word| word == "-h" || word == "--help").is_some() {
        println!(
            "simulator ROLE [ARGUMENT...]: simulates a system of the pod VM; the roles are {}",
            roles::names()
        );
        return Ok(());
    }
    let role = own.or_else(|| args.next().as_deref().and_then(roles::find));
    let Some(role) = role else {
        bail!("the first argument must be a role: {}", roles::names());
    };
    role(args.collect())
}
