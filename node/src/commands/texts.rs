//! `completions` and `man`: prints what is made from the definitions of the command line.

use std::fs;

use anyhow::Context as _;

use super::print;
use crate::cli::texts::{self, CompletionsArgs, ManArgs};

/// Prints the script that completes command lines.
///
/// # Errors
/// It cannot be written.
pub fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    print(&texts::completions(args.shell))
}

/// Prints the program's man page, or writes the pages of all commands into a directory, which is made if it is missing.
///
/// # Errors
/// A page cannot be written.
pub fn man(args: &ManArgs) -> anyhow::Result<()> {
    let pages = texts::man_pages().context("format a man page")?;
    let Some(directory) = &args.directory else {
        return pages.first().map_or(Ok(()), |page| print(&page.text));
    };
    fs::create_dir_all(directory).with_context(|| format!("make the directory {}", directory.display()))?;
    for page in &pages {
        let path = directory.join(&page.file);
        fs::write(&path, &page.text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
