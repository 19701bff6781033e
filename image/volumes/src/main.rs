//! `podvm-volumes`: parses, and calls the library.

use std::io::{self, Write};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use argh::FromArgs;
use volumes::cli::{Command, Options, Scratch, Serve};
use volumes::failure::chain;
use volumes::log;
use volumes::mappings::Kernel;
use volumes::mounting::{Patience, Volumes, Woken};
use volumes::roots::Roots;
use volumes::scratch::{self, MARKER, Outcome};
use volumes::spare::{self, Partitions};
use volumes::{service, socket};

fn main() -> ExitCode {
    let args: Vec<String> =
        std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let options = match Options::from_args(&["podvm-volumes"], &args) {
        Ok(options) => options,
        Err(exit) if exit.status.is_ok() => {
            // stdout may be closed: a reader of the help that has read enough.
            drop(writeln!(io::stdout(), "{}", exit.output.trim_end()));
            return ExitCode::SUCCESS;
        }
        Err(exit) => {
            log::line(format_args!("{}", exit.output));
            return ExitCode::from(2);
        }
    };
    let result = match options.command {
        Command::Serve(options) => serve(&options),
        Command::Scratch(options) => make_scratch(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            log::line(format_args!("{text}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &Serve) -> Result<(), String> {
    let settings = options.settings().map_err(|error| error.to_string())?;
    let listener = socket::listen(&options.socket)
        .map_err(|error| format!("listening at {}: {error}", options.socket.display()))?;
    let volumes = Volumes::new(Roots::system(), settings, Box::new(Kernel));
    service::serve(&listener, volumes).map_err(|error| format!("starting the service: {error}"))
}

fn make_scratch(options: &Scratch) -> Result<(), String> {
    // The key is in this process for a moment.
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        log::line(format_args!("scratch: forbidding core dumps: {error}; set LimitCORE=0 in the unit"));
    }
    let partitions: Option<&dyn Partitions> = (!options.labelled_only).then_some(&spare::Kernel);
    match scratch::run(&Roots::system(), MARKER.as_ref(), &Kernel, partitions, &Boot) {
        Ok(Outcome::Mounted) => {}
        Ok(Outcome::WasMounted) => log::line(format_args!("scratch: it is mounted already")),
        Ok(Outcome::NotWanted) => {
            log::line(format_args!("scratch: none is asked for: {MARKER} is not there"))
        }
        Err(error) => return Err(format!("scratch: {}", chain(&error))),
    }
    Ok(())
}

/// The boot, which gives nothing up.
struct Boot;

impl Patience for Boot {
    fn pause(&self, at_most: Duration) -> Woken {
        sleep(at_most);
        Woken::Time
    }
}
