//! The program; see the library.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use user_data::cli::{self, Command};
use user_data::{azure_ready, run};

fn main() -> ExitCode {
    // Arguments that are no UTF-8 are unknown ones.
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    let args = args.map(|arg| arg.to_string_lossy().into_owned());
    let (program, command) = if is_azure_ready(&name) {
        ("azure-ready", cli::parse_azure_ready(args))
    } else {
        ("process-user-data", cli::parse(args))
    };
    match command {
        Ok(Command::Print(text)) => print(&text),
        Ok(Command::ProvisionFiles(flags)) => exit(run::provision_this_machine(&flags)),
        Ok(Command::AzureReady(settings)) => exit(azure_ready::report_this_machine(&settings)),
        Err(error) => {
            eprintln!("{program}: {error}");
            ExitCode::from(error.exit_status)
        }
    }
}

/// One file, two names: it is small, and the image has it once.
fn is_azure_ready(name: &OsString) -> bool {
    Path::new(name).file_name().is_some_and(|name| name == "azure-ready")
}

fn exit(is_success: bool) -> ExitCode {
    if is_success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
