//! `caa-certs`: makes the certificates of the strict variant, and says what to do with them.

use super::screen::show;
use crate::caa::strict;
use crate::cli::serve::CaaCertsArgs;

/// Makes the certificates, and prints what an operator sets in cloud-api-adaptor.
///
/// # Errors
/// They are there already and are not to be overwritten, a file cannot be written, or standard output cannot be written.
pub fn run(args: &CaaCertsArgs) -> anyhow::Result<()> {
    let made = strict::make(&args.directory, args.overwrite)?;
    show(&made.to_string()).map(drop)
}
