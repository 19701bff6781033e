//! What is made from the definitions of the command line: completions and man pages.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::Cli;

/// The flags of `completions`.
#[derive(Args, Clone, Debug)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// The flags of `man`.
#[derive(Args, Clone, Debug, Default)]
pub struct ManArgs {
    /// Write a page for each command into this directory, instead of the first one to standard output
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// The script that completes command lines in `shell`.
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, &name, &mut script);
    if shell != Shell::Bash {
        return script;
    }
    // clap_complete 4.6 writes a program's name with hyphens in two forms, so that bash finds no command of it.
    let (wrong, right) = (name.replace('-', "__subcmd__"), name.replace('-', "__"));
    String::from_utf8_lossy(&script).replace(&wrong, &right).into_bytes()
}

/// A man page.
#[derive(Clone, Debug)]
pub struct Page {
    /// The name of its file, as `secure-comms-adaptor-pod-list.8`.
    pub file: String,
    /// Its text, in roff.
    pub text: Vec<u8>,
}

/// A page for the program and for each of its commands, the program's first.
///
/// # Errors
/// A page cannot be formatted.
pub fn man_pages() -> std::io::Result<Vec<Page>> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    add_pages(&command, &mut pages)?;
    Ok(pages)
}

/// The section of the manual: commands of an administrator.
const SECTION: &str = "8";

fn add_pages(command: &clap::Command, pages: &mut Vec<Page>) -> std::io::Result<()> {
    // The names of nested commands are of the form `program-command`, once the command is built.
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let man = clap_mangen::Man::new(command.clone()).title(name.to_uppercase()).section(SECTION);
    let mut text = Vec::new();
    man.render(&mut text)?;
    pages.push(Page { file: format!("{name}.{SECTION}"), text });
    for subcommand in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        add_pages(subcommand, pages)?;
    }
    Ok(())
}
