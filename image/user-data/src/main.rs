//! The program; see the library.

use std::io::Write;
use std::process::ExitCode;

use user_data::cli::{self, Command};
use user_data::run;

fn main() -> ExitCode {
    // Arguments that are no UTF-8 are unknown ones.
    let args = std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned());
    match cli::parse(args) {
        Ok(Command::Print(text)) => print(&text),
        Ok(Command::ProvisionFiles(flags)) if run::provision_this_machine(&flags) => ExitCode::SUCCESS,
        Ok(Command::ProvisionFiles(_)) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("process-user-data: {error}");
            ExitCode::from(error.exit_status)
        }
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
