//! Kernel modules, in the order that `pack-initramfs` wrote down.

use std::ffi::CStr;
use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::console;
use crate::failure::{Context, Failure};

/// Where the list is.
pub const LIST: &str = "/lib/modules/load";

/// The paths of a list: one a line, empty lines do not count.
pub fn parse(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// Loads every module of the list, in its order; how many were loaded. A driver that finds nothing of its kind here (ENODEV: Hyper-V's
/// on another hypervisor) is told and passed over, with what depends on it; whether it was needed shows later. Anything
/// else is an error.
pub fn load_all(list: impl AsRef<Path>) -> Result<usize, Failure> {
    let list = list.as_ref();
    let text = fs::read_to_string(list).context(|| format!("reading {}", list.display()))?;
    let mut loaded = 0;
    let mut passed_over = Vec::new();
    for path in parse(&text) {
        let module = File::open(path).context(|| format!("opening the module {path}"))?;
        match finit_module(&module, NO_PARAMETERS, ModuleInitFlags::empty()) {
            Ok(()) => loaded += 1,
            // There already.
            Err(Errno::EEXIST) => {}
            Err(Errno::ENODEV) => passed_over.push(path),
            // Unknown symbol: those of a module that was passed over.
            Err(Errno::ENOENT) if !passed_over.is_empty() => passed_over.push(path),
            Err(error) => return Err(Failure::new(format!("loading the module {path}"), error)),
        }
    }
    if !passed_over.is_empty() {
        console::say(format_args!("no device here for {}", passed_over.join(", ")));
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
