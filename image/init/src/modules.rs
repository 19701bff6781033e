//! Kernel modules, loaded in the order of the list that `pack-initramfs` wrote.

use std::ffi::CStr;
use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::console;
use crate::failure::{Context, Failure};

/// Path of the list.
pub const LIST: &str = "/lib/modules/load";

/// Paths of a list: one in each line; empty lines are ignored.
pub fn parse(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// Loads every module of the list in its order; returns how many were loaded. A driver without its device (ENODEV, for
/// example that of Hyper-V on another hypervisor) is logged and skipped, with the modules that depend on it. If it was
/// needed, a later step fails.
///
/// # Errors
/// The list or a module can't be read or loaded.
pub fn load_all(list: impl AsRef<Path>) -> Result<usize, Failure> {
    let list = list.as_ref();
    let text = fs::read_to_string(list).context(|| format!("reading {}", list.display()))?;
    let mut loaded = 0;
    let mut skipped = Vec::new();
    for path in parse(&text) {
        let module = File::open(path).context(|| format!("opening the module {path}"))?;
        match finit_module(&module, NO_PARAMETERS, ModuleInitFlags::empty()) {
            Ok(()) => loaded += 1,
            // The module is loaded already.
            Err(Errno::EEXIST) => {}
            Err(Errno::ENODEV) => skipped.push(path),
            // Unknown symbol: of a module that was skipped.
            Err(Errno::ENOENT) if !skipped.is_empty() => skipped.push(path),
            Err(error) => return Err(Failure::new(format!("loading the module {path}"), error)),
        }
    }
    if !skipped.is_empty() {
        console::say(format_args!("no device here for {}", skipped.join(", ")));
    }
    Ok(loaded)
}

const NO_PARAMETERS: &CStr = c"";

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_list_is_paths_in_order() {
        let list = "/lib/modules/b.ko\n\n /lib/modules/a.ko \n";
        assert_eq!(parse(list).collect::<Vec<_>>(), ["/lib/modules/b.ko", "/lib/modules/a.ko"]);
        assert_eq!(parse("").count(), 0);
    }
}
