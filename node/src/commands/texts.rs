//! `completions`, `man` and `openapi`: prints what is made from the definitions of the command line and the API.

use std::fs;

use anyhow::Context as _;

use super::screen::show;
use crate::api;
use crate::cli::texts::{self, CompletionsArgs, ManArgs};

/// Prints the script that completes command lines.
///
/// # Errors
/// It cannot be written.
pub fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    print(texts::completions(args.shell))
}

/// Prints the API's description.
///
/// # Errors
/// It cannot be written.
pub fn openapi() -> anyhow::Result<()> {
    show(&(api::document() + "\n")).map(drop)
}

fn print(text: Vec<u8>) -> anyhow::Result<()> {
    show(&String::from_utf8(text).context("the text is no UTF-8")?).map(drop)
}

/// Prints the program's man page, or writes the pages of all commands into a directory, which is made if it is missing.
///
/// # Errors
/// A page cannot be written.
pub fn man(args: &ManArgs) -> anyhow::Result<()> {
    let pages = texts::man_pages().context("format a man page")?;
    let Some(directory) = &args.directory else {
        return pages.into_iter().next().map_or(Ok(()), |page| print(page.text));
    };
    fs::create_dir_all(directory).with_context(|| format!("make the directory {}", directory.display()))?;
    for page in &pages {
        let path = directory.join(&page.file);
        fs::write(&path, &page.text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
